"""LiME, version 1: each range of memory behind a 32-byte header.  (LiME's "raw" and "padded" files have no header: they are raw images.)

Layout: LiME doc/README.md, "LiME Memory Range Header version 1" (read November 2026); the last address is inclusive.  AVML writes the
same without compression.
"""

from __future__ import annotations

import os
import struct
from typing import Iterator, List, NamedTuple

from vtdbg.machine import Machine
from vtdbg.memory.runs import Run, RunMemory, settle_runs
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "lime"
TITLE = "LiME (and AVML without compression)"

MAGIC = b"EMiL"
HEADER = struct.Struct("<4sIQQ8x")           # magic, version, first address, last address (inclusive)
MAX_RANGES = 1 << 20


class RangeFormat(NamedTuple):
    """What tells the formats apart that put this header before each range: LiME and AVML."""

    name: str
    magic: bytes
    version: int


class RangeHeader(NamedTuple):
    """One header.  `data` is the file offset behind it; physical addresses `first` to `last`, inclusive."""

    data: int
    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


_LIME = RangeFormat("LiME", MAGIC, 1)


class RangeHeaders:
    """The headers of a file, one after the other: the reader of the ranges says where the next one is.

    A damaged first header is a FormatError; what follows good ranges and is no header is left out with a warning.
    """

    def __init__(self, source: ByteSource, form: RangeFormat, warnings: List[str]) -> None:
        self._source, self._form, self._warnings = source, form, warnings
        self.next, self.count = 0, 0

    def __iter__(self) -> Iterator[RangeHeader]:
        source, form = self._source, self._form
        while self.next < source.size:
            at = self.next
            if source.size - at < HEADER.size and self.count:
                self._warnings.append(f"{source.size - at} bytes at the end of the file are no range header")
                return
            magic, version, first, last = source.unpack(HEADER, at, f"{form.name}: a range header")
            if magic != form.magic:
                if not self.count:
                    raise source.error(f"not {form.name}: no {form.magic.decode()} at the beginning", 0)
                self._warnings.append(f"no range header at offset {at:#x}: the {size_text(source.size - at)} from there are left out")
                return
            if version != form.version:
                raise source.error(f"{form.name} version {version}: only version {form.version} is known", at + 4)
            if last < first or last >= 1 << 52:
                raise source.error(f"{form.name}: a range from {first:#x} to {last:#x}; the header is damaged", at + 8)
            self.count += 1
            if self.count > MAX_RANGES:
                raise source.error(f"more than {MAX_RANGES} {form.name} ranges: the file is damaged", at)
            header = RangeHeader(at + HEADER.size, first, last)
            self.next = header.data + header.size
            yield header


def recognise(header: bytes, path: str) -> bool:
    return header[:4] == MAGIC


def read(source: ByteSource) -> Machine:
    runs: List[Run] = []
    warnings: List[str] = []
    for header in RangeHeaders(source, _LIME, warnings):
        stored = min(header.size, source.size - header.data)
        if stored < header.size:
            warnings.append(f"the file is cut: {size_text(header.size - stored)} of the range at {header.first:#x} are missing; reads of them fail")
        if stored:
            runs.append((header.first, stored, header.data))
    if not runs:
        raise source.error("a LiME file that ends before its first byte of memory; the copy is cut", 0)
    settled, twice = settle_runs(runs)
    if twice:
        warnings.append(f"{size_text(twice)} of memory are in more than one range; the range with the lowest start is read")
    total = sum(length for _, length, _ in settled)
    details = {"file size": size_text(source.size), "ranges": str(len(runs))}
    return Machine(RunMemory(source, settled), os.path.basename(source.path), FORMAT,
                   f"LiME, {size_text(total)} in {count_text(len(settled), 'run')}", [], details, warnings)
