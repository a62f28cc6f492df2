"""Part of a memory, and how long reading takes: what a search over a slow connection needs to know before it begins."""

from __future__ import annotations

import time
from typing import Iterator, List, Optional, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory, Range

_PIECE, _SAMPLE, _PLACES = 1 << 16, 4, 8
"""Bytes read at once; pages of a sample; how many places are tried where memory is missing."""


class PartOfMemory(PhysicalMemory):
    """`memory` between `first` and `end` (exclusive), which are moved outwards to whole pages; outside of it nothing exists."""

    def __init__(self, memory: PhysicalMemory, first: int, end: int) -> None:
        self._memory, self.space = memory, memory.space
        self._first, self._end = first & -PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE

    def read(self, address: int, size: int) -> bytes:
        if address < self._first or address + size > self._end:
            raise MemoryUnavailable(address, size, "outside of the part that is looked at")
        return self._memory.read(address, size)

    def ranges(self) -> Optional[List[Range]]:
        """The part that exists; all of it where the memory does not know."""
        whole = self._memory.ranges()
        if whole is None:
            return [(self._first, self._end - self._first)]
        cut = [(max(start, self._first), min(start + length, self._end)) for start, length in whole]
        return [(start, end - start) for start, end in cut if start < end]

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        for start, length in self.ranges() or ():
            at, end = start, start + length
            while at < end:
                # Pieces begin at their own multiples; one that is not all there is read page by page.
                count = min(end, (at | (_PIECE - 1)) + 1) - at
                yield from _pieces(self._memory, at, count)
                at += count

    @property
    def remote(self) -> bool:
        return self._memory.remote


def _pieces(memory: PhysicalMemory, address: int, size: int) -> Iterator[Tuple[int, memoryview]]:
    try:
        yield address, memoryview(memory.read(address, size))
        return
    except MemoryUnavailable:
        pass
    for at in range(address, address + size, PAGE_SIZE):
        try:
            yield at, memoryview(memory.read(at, PAGE_SIZE))
        except MemoryUnavailable:
            continue


def measured_seconds(memory: PhysicalMemory, size: int) -> Optional[float]:
    """How long reading `size` bytes takes by the time of a few pages; None where none of them can be read."""
    for start, length in (memory.ranges() or ())[:_PLACES]:
        sample = min(length, _SAMPLE * PAGE_SIZE)
        begin = time.perf_counter()
        try:
            memory.read(start, sample)
        except MemoryUnavailable:
            continue
        return (time.perf_counter() - begin) * size / sample
    return None
