"""Page tables made by hand, entry by entry, apart from vtdbg's own level tables: what walks and enumerations are compared with."""

from __future__ import annotations

import struct
from bisect import bisect_left
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

from vtdbg.memory.base import PhysicalMemory, memory_from_segments

K4, M2, M4, G1 = 1 << 12, 1 << 21, 1 << 22, 1 << 30


@dataclass(frozen=True)
class Mapping:
    """A page that the builder made: `allowed` is what all its entries together grant."""

    address: int
    target: int
    size: int
    allowed: int
    entry: int
    entry_address: int


class TableBuilder:
    """Tables of 8-byte entries with 9 index bits (EPT, NPT, 4- and 5-level paging), from level `top` down.

    `table_flags(level)` are the low bits of the entries that reference tables; `inverse` the bits that take away instead of granting (XD);
    `rights` all bits that grant or take away.  Tables are allocated from `base` upwards; `top_bits` is 2 for the PDPT of PAE paging.
    """

    def __init__(self, top: int = 4, base: int = 0x10000, rights: int = 7, inverse: int = 0, top_bits: int = 9, top_grants: int = 0) -> None:
        self.top, self.rights, self.inverse, self.top_bits, self.top_grants = top, rights, inverse, top_bits, top_grants
        self.pages: Dict[int, bytearray] = {}
        self.free = base
        self.root = self.page()
        self.made: List[Mapping] = []
        self._starts: List[int] = []
        self._ends: Dict[int, int] = {}

    def page(self) -> int:
        at = self.free
        self.free += K4
        self.pages[at] = bytearray(K4)
        return at

    def set(self, address: int, entry: int) -> None:
        struct.pack_into("<Q", self.pages[address & -K4], address & K4 - 1, entry)

    def get(self, address: int) -> int:
        return int(struct.unpack_from("<Q", self.pages[address & -K4], address & K4 - 1)[0])

    def entry_address(self, address: int, level: int, flags: int = 0) -> Tuple[int, int]:
        """(where the entry of `address` at `level` lies, what the tables above grant); tables are made with `flags` where there are none."""
        table, granted = self.root, self.rights
        for depth in range(self.top, level, -1):
            at = table + (address >> 3 + 9 * depth & 511) * 8
            entry = self.get(at)
            if not entry:
                entry = self.page() | flags
                self.set(at, entry)
            granted &= entry ^ self.inverse | (self.top_grants if depth == self.top else 0)
            table = entry & 0x000FFFFFFFFFF000
        return table + (address >> 3 + 9 * level & 511) * 8, granted

    def map(self, address: int, target: int, size: int, leaf_flags: int, table_flags: int) -> Optional[Mapping]:
        """One page; None where something is mapped there already."""
        level = {K4: 1, M2: 2, G1: 3}[size]
        # Pages do not overlap: of those that begin before this one's end, the last one reaches furthest.
        place = bisect_left(self._starts, address + size)
        if place and self._ends[self._starts[place - 1]] > address:
            return None
        at, granted = self.entry_address(address, level, table_flags)
        if self.get(at):
            return None
        entry = target | leaf_flags
        self.set(at, entry)
        made = Mapping(address, target, size, granted & (entry ^ self.inverse), entry, at)
        self.made.append(made)
        self._starts.insert(place, address)
        self._ends[address] = address + size
        return made

    def memory(self, *more: Tuple[int, bytes]) -> PhysicalMemory:
        return memory_from_segments([(address, bytes(page)) for address, page in self.pages.items()] + list(more))

    def truth(self, address: int) -> Optional[Mapping]:
        return next((made for made in self.made if made.address <= address < made.address + made.size), None)

    def pages_4k(self) -> Iterator[Tuple[int, Mapping]]:
        for made in sorted(self.made, key=lambda item: item.address):
            for step in range(0, made.size, K4):
                yield made.address + step, made
