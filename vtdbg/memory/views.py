"""Memory seen through a translation: guest-physical memory through EPT or NPT, linear memory through CR3.  Views stack.

`GuestPhysicalMemory(GuestPhysicalMemory(memory, ept01), ept12)` is the memory of an L2 guest; `LinearMemory` on top of it is a process there.
A view is a debugger's: it reads what is mapped, whatever the permissions say of reading (an execute-only page can be looked at).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Iterator, List, Optional, Tuple

from vtdbg.enumeration import Enumeration
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory, Range, merge_ranges
from vtdbg.walk import Structure
from vtdbg.x86.paging import Paging

_LARGE = 16 * PAGE_SIZE
_PIECE = 1 << 20
_WORK_LIMIT = 1 << 22


class TranslatedMemory(PhysicalMemory):
    """The PhysicalMemory protocol for the addresses that `structure` translates into addresses of `memory`.

    Nothing is kept between reads: on a live target a view is as fresh as its memory.  `limit` bounds the work of `ranges` and `views`.
    """

    def __init__(self, memory: PhysicalMemory, structure: Structure, limit: int = _WORK_LIMIT) -> None:
        self._memory, self._structure, self._limit = memory, structure, limit

    @property
    def memory(self) -> PhysicalMemory:
        """The memory below."""
        return self._memory

    @property
    def structure(self) -> Structure:
        return self._structure

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`, across pages; MemoryUnavailable with the first address that cannot be had and why: the level and entry
        where the translation ends, or the address below and what the memory there says of it."""
        if size < 0 or address < 0:
            raise MemoryUnavailable(address, size, "negative address or size", self.space)
        if address + size > 1 << 64:
            raise MemoryUnavailable(max(address, 1 << 64), size, "beyond 64-bit addresses", self.space)
        pieces: List[bytes] = []
        at, end = address, address + size
        for start, target, length in self._extents(address, end):
            if start > at:
                break
            pieces.append(self._read_below(at, target, min(length, end - at), end))
            at += len(pieces[-1])
        if at < end:
            walk = self._structure.walk(self._memory, at)
            raise MemoryUnavailable(at, end - at, f"{walk.structure}: {walk.reason or 'the walk and the enumeration disagree'}", self.space)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _extents(self, at: int, end: int) -> Iterator[Tuple[int, int, int]]:
        """(address, address below, bytes) from `at` on, as long as pages follow each other; a short read walks, a long one enumerates."""
        if end - at <= _LARGE or not self._has_tables():
            while at < end:
                walk = self._structure.walk(self._memory, at)
                if walk.hpa is None or walk.page_size is None:
                    return
                length = walk.page_size - at % walk.page_size
                yield at, walk.hpa, length
                at += length
            return
        for row in Enumeration(self._memory, self._structure, at, end - 1, ignore_page_size=True):
            if not self._structure.reaches(row.rights):
                return
            skip = max(at - row.start, 0)
            yield row.start + skip, row.target + skip, row.length - skip

    def _has_tables(self) -> bool:
        return not (isinstance(self._structure, Paging) and self._structure.mode == "none")

    def _read_below(self, address: int, below: int, size: int, end: int) -> bytes:
        try:
            return self._memory.read(below, size)
        except MemoryUnavailable as error:
            first = address + max(error.address - below, 0)
            reason = f"it is {self._memory.space} address {below + first - address:#x}: {error.reason}"
            raise MemoryUnavailable(first, end - first, reason, self.space) from error

    def _present(self) -> "Optional[Iterator[Tuple[int, int, int]]]":
        """(address, address below, bytes) of everything that is mapped and that the memory below has; None where that is not known."""
        below = self._memory.ranges()
        if below is None:
            return None
        if not self._has_tables():
            return iter([(start, start, min(length, (1 << 32) - start)) for start, length in below if start < 1 << 32])
        return self._mapped(below)

    def _mapped(self, below: List[Range]) -> Iterator[Tuple[int, int, int]]:
        starts = [start for start, _ in below]
        rows = Enumeration(self._memory, self._structure, ignore_page_size=True, limit=self._limit)
        for row in rows:
            if not self._structure.reaches(row.rights):
                continue
            for start, length in below[max(bisect_right(starts, row.target) - 1, 0):]:
                if start >= row.target + row.length:
                    break
                first, last = max(start, row.target), min(start + length, row.target + row.length)
                if first < last:
                    yield row.start + first - row.target, first, last - first
        if not rows.complete:
            raise UsageError(f"the {self._structure.tables.title} tables at {self._structure.root:#x} map too much to list "
                             f"(more than {self._limit} runs); they may contain themselves")

    def ranges(self) -> Optional[List[Range]]:
        """What is mapped and exists below; None where the memory below does not know what it has.

        Enumerates the whole structure.  UsageError where the tables map more than can be listed (tables that contain themselves).
        """
        present = self._present()
        return None if present is None else merge_ranges((address, length) for address, _, length in present)

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        for address, below, length in self._present() or ():
            for at in range(0, length, _PIECE):
                try:
                    yield address + at, memoryview(self._memory.read(below + at, min(_PIECE, length - at)))
                except MemoryUnavailable:
                    continue


class GuestPhysicalMemory(TranslatedMemory):
    """A guest's physical memory: `nested_tables` is an `Ept` or `Npt`, whose tables lie in `memory`."""

    space = "guest-physical"

    def __init__(self, memory: PhysicalMemory, nested_tables: Structure, limit: int = _WORK_LIMIT) -> None:
        super().__init__(memory, nested_tables, limit)


class LinearMemory(TranslatedMemory):
    """Linear (virtual) memory: `paging` is a `Paging`, whose tables lie in `memory` (physical, or a guest's)."""

    space = "linear"

    def __init__(self, memory: PhysicalMemory, paging: Paging, limit: int = _WORK_LIMIT) -> None:
        super().__init__(memory, paging, limit)
