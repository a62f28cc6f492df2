"""Open a dump: recognise its format by content and hand it to that format's reader."""

from __future__ import annotations

import difflib
import os
from types import ModuleType
from typing import List, Optional, Tuple

from vtdbg.errors import UnknownName
from vtdbg.machine import Machine
from vtdbg.memory import avml, elf, flattened, kdump, lime, raw, vmware, windows
from vtdbg.memory.foreign import HEADER_SIZE, what_it_is
from vtdbg.memory.source import DumpFile

# In the order in which they are asked; each module has FORMAT, TITLE, recognise(header, path) and read(source).  Raw is what is left.
_READERS: Tuple[ModuleType, ...] = (elf, kdump, flattened, lime, avml, windows, vmware, raw)


def formats() -> List[Tuple[str, str]]:
    """(name, what it is) of every dump format that can be read; the names are what `format=` takes."""
    return [(reader.FORMAT, reader.TITLE) for reader in _READERS]


def open_machine(path: "str | os.PathLike[str]", format: Optional[str] = None) -> Machine:
    """The memory dump at `path` as a Machine: memory, processors, and in `warnings` what a reader has to know.

    The format is recognised by content; `format` (a name of `formats()`) forces one.  The file is mapped, not read: opening costs the
    same whatever its size.  `machine.memory.close()` gives the mapping back (or `with machine.memory:`).

    Raises FormatError where the file is missing, empty, of another type (said which), damaged or cut before its memory begins, and
    UnknownName for a format that does not exist.  A dump whose tail is missing opens with a warning.
    """
    reader = _reader_named(format) if format is not None else None
    file = DumpFile(path)
    try:
        machine: Machine = (reader or _recognise(file)).read(file)
    except BaseException:
        file.close()
        raise
    return machine


def _reader_named(name: str) -> ModuleType:
    names = {reader.FORMAT: reader for reader in _READERS}
    found = names.get(name.lower())
    if found is None:
        raise UnknownName("dump format", name, tuple(difflib.get_close_matches(name.lower(), names, 3, 0.4)) or tuple(names))
    return found


def _recognise(file: DumpFile) -> ModuleType:
    header = bytes(file.slice(0, HEADER_SIZE))
    for reader in _READERS:
        if reader is not raw and reader.recognise(header, file.path):
            return reader
    foreign = what_it_is(header)
    if foreign is not None:
        raise file.error(foreign)
    return raw
