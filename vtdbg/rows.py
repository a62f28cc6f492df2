"""The packaged tables: rows of the CSV files under `data`.  Bit layouts, fields, MSRs and exit codes are all read through here."""

from __future__ import annotations

import csv
import io
import os
from typing import Dict, Iterator

from vtdbg.errors import UnknownName


def read_data(name: str) -> bytes:
    """The bytes of a file under vtdbg/data, wherever the package is (a folder, a zip file); UnknownName where there is no such file."""
    # What pkgutil.get_data does, without importing it: a short command is mostly imports.
    assert __spec__ is not None and __file__ is not None
    try:
        data = __spec__.loader.get_data(os.path.join(os.path.dirname(__file__), "data", *name.split("/")))  # type: ignore[union-attr]
    except OSError as error:
        raise UnknownName("data file", name) from error
    return bytes(data)


def read_rows(name: str) -> Iterator[Dict[str, str]]:
    """The rows of a packaged CSV file under vtdbg/data; lines that begin with # are provenance, not rows."""
    reader = csv.reader(line for line in io.StringIO(read_data(name).decode("utf-8")) if not line.startswith("#"))
    columns = next(reader, [])
    return (dict(zip(columns, row)) for row in reader if row)
