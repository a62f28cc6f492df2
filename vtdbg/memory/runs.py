"""Memory that a file stores as it is: physical runs, each at some offset of the file."""

from __future__ import annotations

from bisect import bisect_right
from typing import Iterable, Iterator, List, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory, Range, merge_ranges
from vtdbg.memory.source import ByteSource

Run = Tuple[int, int, int]
"""(physical address, length in bytes, offset in the file)"""

_PIECE = 1 << 20


class RunMemory(PhysicalMemory):
    """Physical runs over a ByteSource.  `runs` have to be sorted and disjoint, which `settle_runs` makes them."""

    def __init__(self, source: ByteSource, runs: Iterable[Run], missing: str = "not in the dump") -> None:
        self._source, self._missing = source, missing
        self._runs: List[Run] = list(runs)
        self._starts = [address for address, _, _ in self._runs]

    def read(self, address: int, size: int) -> bytes:
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and size >= 0:
            start, length, offset = self._runs[index]
            if address + size <= start + length:
                data = bytes(self._source.data(offset + address - start, size))
                if len(data) == size:
                    return data
                raise MemoryUnavailable(address + len(data), size - len(data), "beyond the end of the file")
        return self._read_across(address, size, max(index, 0))

    def _read_across(self, address: int, size: int, index: int) -> bytes:
        if size < 0 or address < 0:
            raise MemoryUnavailable(address, size, "negative address or size")
        wanted, end, pieces = address, address + size, []
        while wanted < end:
            if index == len(self._runs):
                raise MemoryUnavailable(wanted, end - wanted, self._missing)
            start, length, offset = self._runs[index]
            index += 1
            if start > wanted:
                raise MemoryUnavailable(wanted, end - wanted, self._missing)
            if start + length <= wanted:
                continue
            count = min(end, start + length) - wanted
            pieces.append(bytes(self._source.data(offset + wanted - start, count)))
            if len(pieces[-1]) < count:
                raise MemoryUnavailable(wanted + len(pieces[-1]), end - wanted - len(pieces[-1]), "beyond the end of the file")
            wanted += count
        return b"".join(pieces)

    def ranges(self) -> List[Range]:
        return merge_ranges((address, length) for address, length, _ in self._runs)

    def runs(self) -> List[Run]:
        """How the file stores it: sorted, disjoint (physical address, length, offset in the file)."""
        return list(self._runs)

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        for address, length, offset in self._runs:
            yield from source_views(self._source, address, length, offset)

    def close(self) -> None:
        self._source.close()


def source_views(source: ByteSource, address: int, length: int, offset: int) -> Iterator[Tuple[int, memoryview]]:
    """One run as views: whole where the source can show it without a copy, else in page-aligned pieces of at most 1 MiB."""
    if source.contiguous:
        yield address, source.data(offset, length)
        return
    at = 0
    while at < length:
        count = min(_PIECE - (address + at) % PAGE_SIZE, length - at)
        yield address + at, source.data(offset + at, count)
        at += count


def settle_runs(runs: Iterable[Run]) -> Tuple[List[Run], int]:
    """Sorted, disjoint runs out of any; neighbours that continue each other in the file too become one.

    Where runs overlap, the one that begins first (then: the longer) is kept and the other is cut.  The second value is
    the number of bytes that were cut off *and* lie elsewhere in the file, that is, memory that the file stores twice.
    """
    settled: List[Run] = []
    twice = end = 0
    for address, length, offset in sorted(runs, key=lambda run: (run[0], -run[1], run[2])):
        if length <= 0:
            continue
        last = settled[-1] if settled else (0, 0, 0)
        same_bytes = bool(settled) and offset - last[2] == address - last[0]
        cut = min(max(end - address, 0), length)
        if cut and not same_bytes:
            twice += cut
        if cut == length:
            continue
        address, length, offset = address + cut, length - cut, offset + cut
        if settled and same_bytes and address == last[0] + last[1]:
            settled[-1] = last[0], last[1] + length, last[2]
        else:
            settled.append((address, length, offset))
        end = address + length
    return settled, twice
