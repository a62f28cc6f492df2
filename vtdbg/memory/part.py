"""Part of a memory, and how long reading takes: what a search over a slow connection needs to know before it begins."""

from __future__ import annotations

import time
from typing import Iterator, List, Optional, Sequence, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory, Range

_PIECE, _SAMPLE, _PLACES = 1 << 16, 4 * PAGE_SIZE, 8
"""Bytes read at once; bytes of a sample; at how many places one is taken."""
_LONG = 3.0
"""Seconds after which two samples are enough."""


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


def measured_seconds(memory: PhysicalMemory, size: int, limit: float) -> Optional[float]:
    """How long reading `size` bytes takes by the time of a few pages; None where none of them can be read.

    The fastest of several samples says what the connection can do: one that waits for a busy machine says nothing of it.  The first that
    promises less than `limit` seconds is enough.  They lie apart, so that pages which a cache holds already do not decide.
    """
    least: Optional[float] = None
    started = time.perf_counter()
    for number, (at, count) in enumerate(_samples(memory.ranges() or ())):
        begin = time.perf_counter()
        try:
            memory.read(at, count)
        except MemoryUnavailable:
            continue
        seconds = (time.perf_counter() - begin) * size / count
        least = seconds if least is None else min(least, seconds)
        if least <= limit or number >= _PLACES - 1 or number and time.perf_counter() - started > _LONG:
            break
    return least


def _samples(ranges: Sequence[Range]) -> Iterator[Range]:
    """Places in the middle of equal parts of what exists; then, for where none of it can be read, the beginnings of the ranges."""
    total = sum(length for _, length in ranges)
    for number in range(_PLACES):
        left = total * (2 * number + 1) // (2 * _PLACES) & -PAGE_SIZE
        for start, length in ranges:
            if left < length:
                yield start + left, min(length - left, _SAMPLE)
                break
            left -= length
    yield from ((start, min(length, _SAMPLE)) for start, length in ranges[:_PLACES])
