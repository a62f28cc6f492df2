"""Physical memory as the engine reads it, and which of it exists."""

from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, CachedMemory, PhysicalMemory, Range, merge_ranges
from vtdbg_windbg.engine import INTERRUPTED, Engine, EngineError, Interrupted

MISSING_IN_DUMP = "not in the dump"
MISSING_LIVE = "the target does not answer for it"
MOST_RUNS = 4096
WIDEST = 1 << 52


class EngineMemory(PhysicalMemory):
    """Reads that cross missing memory are retried page by page, so that the error names the first address that is missing."""

    def __init__(self, engine: Engine, dump: bool) -> None:
        self._engine, self._missing = engine, MISSING_IN_DUMP if dump else MISSING_LIVE
        # Over the KD protocol a piece takes a round trip for each 4 KB anyway: short pieces keep Ctrl-Break prompt.
        self._piece = 1 << 20 if dump else 1 << 16
        self._ranges: Optional[List[Range]] = None
        self._asked = False

    def read(self, address: int, size: int) -> bytes:
        if address < 0 or size < 0 or address + size > WIDEST:
            raise MemoryUnavailable(address, size, "no physical address")
        self._stop_if_interrupted()
        data = self._there(address, size)
        if len(data) < size:
            # A Ctrl-Break that came during the read made the engine refuse it: then nothing is known to be missing.
            self._stop_if_interrupted()
            raise MemoryUnavailable(address + len(data), size - len(data), self._missing)
        return data

    def _there(self, address: int, size: int) -> bytes:
        """What exists from `address` on: the engine's answer ends early at the end of a run, and may be refused as a whole."""
        data = self._engine.read_physical(address, size) if size else b""
        end = address + size
        while len(data) < size:
            at = address + len(data)
            count = min(end, (at | (PAGE_SIZE - 1)) + 1) - at
            piece = self._engine.read_physical(at, count)
            if not piece:
                break
            data += piece
        return data

    def ranges(self) -> Optional[List[Range]]:
        if not self._asked:
            # With an interrupt waiting the engine refuses reads, which would look like memory that nobody knows.
            self._stop_if_interrupted()
            self._ranges = physical_ranges(self._engine)
            if self._ranges is None:
                self._stop_if_interrupted()
            self._asked = True
        return self._ranges

    @property
    def remote(self) -> bool:
        # A dump too: the engine can be another machine's (--remote).
        return True

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        ranges = self.ranges()
        if ranges is None:
            raise EngineError("which physical memory exists is not known (no MmPhysicalMemoryBlock), so nothing can be searched: "
                              "give an address, or what to search (--scan A-B)")
        for start, length in ranges:
            at, end = start, start + length
            while at < end:
                self._stop_if_interrupted()
                # Pieces begin at their own multiples, so that a hole costs no more than one of them.
                count = min(end, (at | (self._piece - 1)) + 1) - at
                data = self._there(at, count)
                if len(data) < count:
                    self._stop_if_interrupted()
                if data:
                    yield at, memoryview(data)
                at += count if len(data) == count else (len(data) & -PAGE_SIZE) + PAGE_SIZE

    def _stop_if_interrupted(self) -> None:
        if self._engine.interrupted():
            raise Interrupted(INTERRUPTED)


class EngineCache(CachedMemory):
    """Whole pages of an EngineMemory.  Scans go past it: they read everything once."""

    def __init__(self, memory: EngineMemory) -> None:
        super().__init__(memory)

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        return self._memory.views()


def physical_ranges(engine: Engine) -> Optional[List[Range]]:
    """What the kernel took for RAM when it started: the PHYSICAL_MEMORY_DESCRIPTOR that MmPhysicalMemoryBlock points to; None if unreadable.

    A dump can hold less (a kernel dump does), a device's memory is not in it.
    """
    variable = engine.physical_memory_block()
    if not variable:
        return None
    block = _number(engine, variable, 8)
    count = _number(engine, block, 4) if block else None
    if not block or not count or count > MOST_RUNS:
        return None
    ranges: List[Range] = []
    # NumberOfRuns (4 bytes, padded), NumberOfPages, then runs of BasePage and PageCount (wdm.h).
    table = engine.read_virtual(block + 16, 16 * count)
    if len(table) < 16 * count:
        return None
    for at in range(0, len(table), 16):
        first, pages = (int.from_bytes(table[at + half:at + half + 8], "little") * PAGE_SIZE for half in (0, 8))
        if not 0 < pages <= WIDEST or first + pages > WIDEST:
            return None
        ranges.append((first, pages))
    return merge_ranges(ranges)


def _number(engine: Engine, address: int, size: int) -> Optional[int]:
    data = engine.read_virtual(address, size)
    return int.from_bytes(data, "little") if len(data) == size else None
