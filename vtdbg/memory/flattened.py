"""makedumpfile's flattened form, which QEMU's dump-guest-memory -z and `makedumpfile -F` write: a kdump or ELF file as a stream of
records (offset, size, bytes) that may come in any order and may overwrite each other.

Layout: makedumpfile.h `makedumpfile_header`, `makedumpfile_data_header`, big-endian (version 1.7; read November 2026).
"""

from __future__ import annotations

import heapq
import struct
from array import array
from bisect import bisect_right
from typing import Iterator, List, Tuple

from vtdbg.machine import Machine
from vtdbg.memory import elf, kdump
from vtdbg.memory.source import ByteSource, size_text

FORMAT = "flattened"
TITLE = "makedumpfile's flattened form of a kdump or ELF file (QEMU dump-guest-memory -z)"

SIGNATURE = b"makedumpfile".ljust(16, b"\0")
_HEADER = struct.Struct(">16sqq")            # signature, type, version
_HEADER_SIZE = 4096
_RECORD = struct.Struct(">qq")               # offset in the file that is meant, size; (-1, -1) ends
_LIMIT = 1 << 62


class FlattenedFile(ByteSource):
    """The file that the records make, read through an index of the records (24 bytes each): nothing is copied until it is read.
    Bytes that no record wrote are zeros, as in the sparse file that `makedumpfile -R` makes."""

    contiguous = False

    def __init__(self, container: ByteSource) -> None:
        self.path, self._container = container.path, container
        self.warnings: List[str] = []
        self._starts, self._sizes, self._offsets = _index(container, self.warnings)
        self.size = self._starts[-1] + self._sizes[-1] if self._starts else 0

    def records(self) -> int:
        return len(self._starts)

    def slice(self, offset: int, size: int) -> memoryview:
        end = min(offset + size, self.size)
        if offset < 0 or end <= offset:
            return memoryview(b"")
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and end <= self._starts[index] + self._sizes[index]:
            return self._container.slice(self._offsets[index] + offset - self._starts[index], end - offset)
        out = bytearray(end - offset)
        index = max(index, 0)
        while index < len(self._starts) and self._starts[index] < end:
            first = max(self._starts[index], offset)
            last = min(self._starts[index] + self._sizes[index], end)
            if first < last:
                out[first - offset:last - offset] = self._container.slice(self._offsets[index] + first - self._starts[index], last - first)
            index += 1
        return memoryview(out)

    def data(self, offset: int, size: int) -> memoryview:
        covered, index = offset, bisect_right(self._starts, offset) - 1
        while 0 <= index < len(self._starts) and self._starts[index] <= covered < offset + size:
            covered = max(covered, self._starts[index] + self._sizes[index])
            index += 1
        return self.slice(offset, min(size, covered - offset))

    def extents(self, offset: int, size: int) -> Iterator[Tuple[int, int]]:
        index = max(bisect_right(self._starts, offset) - 1, 0)
        first = last = offset
        while index < len(self._starts) and self._starts[index] < offset + size:
            start, end = max(self._starts[index], offset), min(self._starts[index] + self._sizes[index], offset + size)
            index += 1
            if start > last:
                if last > first:
                    yield first, last - first
                first = start
            last = max(last, end) if end > start else last
        if last > first:
            yield first, last - first

    def close(self) -> None:
        self._container.close()


def recognise(header: bytes, path: str) -> bool:
    return header[:16] == SIGNATURE


def read(source: ByteSource) -> Machine:
    signature, kind, version = source.unpack(_HEADER, 0, "the header of the flattened form")
    if signature != SIGNATURE:
        raise source.error("not makedumpfile's flattened form (no 'makedumpfile' at the beginning)", 0)
    if (kind, version) != (1, 1):
        raise source.error(f"flattened form of type {kind}, version {version}: only 1, 1 is known", 16)
    inner = FlattenedFile(source)
    if not inner.records():
        raise source.error("the flattened form holds no record; the copy is cut", _HEADER_SIZE)
    header = bytes(inner.slice(0, 8))
    reader = kdump if kdump.recognise(header, source.path) else elf
    if reader is elf and not elf.recognise(header, source.path):
        raise source.error("the records hold neither a kdump nor an ELF core; the copy is damaged", _HEADER_SIZE)
    machine: Machine = reader.read(inner)
    machine.format = f"{FORMAT} {machine.format}"
    machine.provenance = f"flattened {machine.provenance}"
    machine.details["file size"] = f"{size_text(source.size)} in {inner.records()} records"
    machine.warnings[:0] = inner.warnings
    return machine


def _index(container: ByteSource, warnings: List[str]) -> "Tuple[array[int], array[int], array[int]]":
    """(start, size, offset in the container) of pieces that are sorted and disjoint; where records overlap the later one holds."""
    starts, sizes, offsets = array("Q"), array("Q"), array("Q")
    at = _HEADER_SIZE
    while True:
        row = container.slice(at, _RECORD.size)
        if len(row) < _RECORD.size:
            warnings.append("the file is cut: the flattened form has no end mark, so pages at the end are missing")
            break
        start, size = _RECORD.unpack(row)
        if start == size == -1:
            break
        if start < 0 or size < 0 or start + size > _LIMIT:
            raise container.error(f"a damaged record of the flattened form (offset {start}, size {size})", at)
        at += _RECORD.size
        stored = min(size, max(container.size - at, 0))
        if stored:
            starts.append(start)
            sizes.append(stored)
            offsets.append(at)
        if stored < size:
            warnings.append(f"the file is cut inside a record of the flattened form: {size_text(size - stored)} or more are missing")
            break
        at += size
    if any(starts[i] + sizes[i] > starts[i + 1] for i in range(len(starts) - 1)):
        return _sorted(starts, sizes, offsets)
    return starts, sizes, offsets


def _sorted(starts: "array[int]", sizes: "array[int]", offsets: "array[int]") -> "Tuple[array[int], array[int], array[int]]":
    """Sweep over the starts with a heap of the records that are open; the one latest in the file is on top."""
    order = sorted(range(len(starts)), key=starts.__getitem__)
    out = array("Q"), array("Q"), array("Q")
    open_records: List[Tuple[int, int]] = []                         # (-position in the file, record)

    def emit(first: int, last: int) -> None:
        """Pieces of [first, last) from the open records, none of which begins inside it."""
        while first < last and open_records:
            record = open_records[0][1]
            end = starts[record] + sizes[record]
            if end <= first:
                heapq.heappop(open_records)
                continue
            piece = min(end, last) - first
            where = offsets[record] + first - starts[record]
            if out[0] and out[0][-1] + out[1][-1] == first and out[2][-1] + out[1][-1] == where:
                out[1][-1] += piece
            else:
                out[0].append(first)
                out[1].append(piece)
                out[2].append(where)
            first += piece

    position = 0
    for record in order:
        emit(position, starts[record])
        position = starts[record]
        heapq.heappush(open_records, (-record, record))
    emit(position, _LIMIT * 2)
    return out
