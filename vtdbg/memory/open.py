"""Open a dump: recognise its format by content and hand it to that format's reader."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import List, Mapping, Optional, Tuple

from vtdbg.errors import UnknownName
from vtdbg.machine import Machine
from vtdbg.memory.foreign import HEADER_SIZE, what_it_is
from vtdbg.memory.source import DumpFile

_STARTS: Mapping[str, Tuple[bytes, ...]] = {
    "elf": (b"\x7fELF",),
    "kdump": (b"KDUM", b"DISK"),
    "flattened": (b"make",),
    "lime": (b"EMiL",),
    "avml": (b"AVML",),
    "windows": (b"PAGE",),
    "vmware": tuple(magic.to_bytes(4, "little") for magic in (0xBED2BED2, 0xBED3BED3, 0xBAD1BAD1, 0xBAD2BAD2, 0xBED0BED0)),
    "raw": (),
}
"""The modules of this folder that read a format, in the order in which they are asked, and the first four bytes of their files: a reader is
imported only where it has a chance.  Each has FORMAT, TITLE, recognise(header, path), which decides, and read(source).  Raw is what is left."""


def _reader(name: str) -> ModuleType:
    return importlib.import_module(f"vtdbg.memory.{name}")


def formats() -> List[Tuple[str, str]]:
    """(name, what it is) of every dump format that can be read; the names are what `format=` takes."""
    return [(reader.FORMAT, reader.TITLE) for reader in map(_reader, _STARTS)]


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
    names = {reader.FORMAT: reader for reader in map(_reader, _STARTS)}
    found = names.get(name.lower())
    if found is None:
        import difflib

        raise UnknownName("dump format", name, tuple(difflib.get_close_matches(name.lower(), names, 3, 0.4)) or tuple(names))
    return found


def _recognise(file: DumpFile) -> ModuleType:
    header = bytes(file.slice(0, HEADER_SIZE))
    for name, starts in _STARTS.items():
        # VMware keeps the memory in a file without a header, beside the one that describes it.
        if header[:4] in starts or (name == "vmware" and file.path.lower().endswith(".vmem")):
            reader = _reader(name)
            if reader.recognise(header, file.path):
                return reader
    foreign = what_it_is(header)
    if foreign is not None:
        raise file.error(foreign)
    return _reader("raw")
