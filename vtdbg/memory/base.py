"""Who can answer "read n bytes at physical address p": the protocol, and the helpers that everything else reads through."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

from vtdbg.errors import MemoryUnavailable, UsageError

PAGE_SIZE = 4096

Buffer = Union[bytes, bytearray, memoryview]
Range = Tuple[int, int]
"""(first address, length in bytes)"""

_Memory = TypeVar("_Memory", bound="PhysicalMemory")


class PhysicalMemory(ABC):
    """Bytes by physical address.  `read` gives all the bytes or raises; it never invents one."""

    space = "physical"

    @abstractmethod
    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`, or MemoryUnavailable with the first address that is missing."""

    @abstractmethod
    def ranges(self) -> Optional[List[Range]]:
        """Sorted, disjoint, merged (address, length) of what exists, or None where that is unknown (a live target)."""

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        """(address, bytes without a copy) of every stored run, in address order; empty where there is nothing to map.

        What scans read: a memory that decompresses or asks a debugger yields page-aligned pieces that it reads itself.
        """
        for start, length in self.ranges() or ():
            for at in range(start, start + length, 1 << 20):
                piece = min(1 << 20, start + length - at)
                try:
                    yield at, memoryview(self.read(at, piece))
                except MemoryUnavailable:
                    continue

    @property
    def remote(self) -> bool:
        """Does every read go over a connection, which can be slow?"""
        return False

    def close(self) -> None:
        """Give back what the memory holds open (a mapped file); nothing where it holds nothing.  Reading afterwards is an error."""
        return

    def __enter__(self: _Memory) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_u8(self, address: int) -> int:
        return self.read(address, 1)[0]

    def read_u16(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def read_u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        return int(struct.unpack("<Q", self.read(address, 8))[0])

    def read_page(self, address: int) -> bytes:
        """The 4 KiB page at `address`, which has to be page-aligned."""
        if address % PAGE_SIZE:
            raise UsageError(f"address {address:#x} is not aligned to a 4 KiB page")
        return self.read(address, PAGE_SIZE)


class SegmentMemory(PhysicalMemory):
    """Memory out of (address, buffer) segments: dumps that store physical runs as they are, and memory made in tests.

    Buffers are kept as memoryviews: nothing is copied until it is read.
    """

    def __init__(self, segments: Iterable[Tuple[int, Buffer]]) -> None:
        self._segments: List[Tuple[int, memoryview]] = sorted(
            ((address, memoryview(data).cast("B")) for address, data in segments if len(data)), key=lambda item: item[0])
        previous_end = 0
        for address, data in self._segments:
            if address < 0:
                raise UsageError(f"a segment has the negative address {address:#x}")
            if address < previous_end:
                raise UsageError(f"segment at {address:#x} overlaps the one that ends at {previous_end:#x}")
            previous_end = address + len(data)
        self._starts = [address for address, _ in self._segments]

    def read(self, address: int, size: int) -> bytes:
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            start, data = self._segments[index]
            offset = address - start
            if offset + size <= len(data) and size >= 0:
                return bytes(data[offset:offset + size])
        return self._read_across(address, size, max(index, 0))

    def _read_across(self, address: int, size: int, index: int) -> bytes:
        if size < 0 or address < 0:
            raise MemoryUnavailable(address, size, "negative address or size")
        wanted, pieces = address, []
        end = address + size
        for start, data in self._segments[index:]:
            if wanted >= end or start > wanted:
                break
            if start + len(data) > wanted:
                piece = data[wanted - start:min(end, start + len(data)) - start]
                pieces.append(bytes(piece))
                wanted += len(piece)
        if wanted < end:
            raise MemoryUnavailable(wanted, end - wanted)
        return b"".join(pieces)

    def ranges(self) -> List[Range]:
        return merge_ranges((address, len(data)) for address, data in self._segments)

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        return iter(self._segments)


class CachedMemory(PhysicalMemory):
    """Whole pages of a slow memory, kept until `drop` (a live target drops them when it runs)."""

    def __init__(self, memory: PhysicalMemory, pages: int = 16384) -> None:
        self._memory, self._limit = memory, pages
        self._pages: "OrderedDict[int, bytes]" = OrderedDict()
        self.space = memory.space

    def drop(self) -> None:
        self._pages.clear()

    def ranges(self) -> Optional[List[Range]]:
        return self._memory.ranges()

    @property
    def remote(self) -> bool:
        return self._memory.remote

    def read_page(self, address: int) -> bytes:
        page = self._pages.get(address)
        if page is None:
            page = self._memory.read_page(address)
            self._pages[address] = page
            if len(self._pages) > self._limit:
                self._pages.popitem(last=False)
        return page

    def read(self, address: int, size: int) -> bytes:
        first, last = address & -PAGE_SIZE, (address + max(size, 1) - 1) & -PAGE_SIZE
        if last - first > 16 * PAGE_SIZE:
            return self._memory.read(address, size)
        try:
            data = b"".join(self.read_page(at) for at in range(first, last + 1, PAGE_SIZE))
        except MemoryUnavailable:
            # A memory can end inside a page; the read itself may lie before the end.
            return self._memory.read(address, size)
        return data[address - first:address - first + size]


def merge_ranges(ranges: Iterable[Range]) -> List[Range]:
    """Sorted ranges with touching and overlapping neighbours made one."""
    merged: List[Range] = []
    for start, length in sorted(ranges):
        if merged and start <= merged[-1][0] + merged[-1][1]:
            first, so_far = merged[-1]
            merged[-1] = first, max(so_far, start + length - first)
        elif length > 0:
            merged.append((start, length))
    return merged


def memory_from_segments(segments: Sequence[Tuple[int, Buffer]]) -> PhysicalMemory:
    """A PhysicalMemory out of bytes: [(physical address, bytes), ...].  Segments may touch and must not overlap.

    Unlike a dump it needs no file: for scripts and tests.  Raises UsageError where two segments overlap.
    """
    return SegmentMemory(segments)
