"""Which ranges of an enumeration somebody wants to see, and what they sum up to."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Dict, FrozenSet, Iterable, Iterator, List, Optional, Sequence, Tuple

from vtdbg.enumeration import Range, join
from vtdbg.errors import UnknownName, UsageError
from vtdbg.level_tables import PAT_TYPES, EntryKind, Tables
from vtdbg.names import near_names
from vtdbg.numbers import parse_range, parse_size, size_text

FLAGS_OF_USE = frozenset(("A", "D"))
"""Flags that the processor sets: an enumeration keeps pages apart by them only where it is asked to (`Enumeration(apart=)`)."""


@dataclass(frozen=True)
class Wanted:
    """A page is wanted where everything holds that is given.

    `granted` and `denied` are masks of rights, `targets` (first, end) in bytes of host-physical addresses, `memory_type` as printed ("WB"),
    `page_size` in bytes, `flags` (identifier, state).
    """

    granted: int = 0
    denied: int = 0
    targets: Optional[Tuple[int, int]] = None
    memory_type: str = ""
    page_size: Optional[int] = None
    flags: Tuple[Tuple[str, bool], ...] = ()

    @property
    def apart(self) -> FrozenSet[str]:
        """What the enumeration has to keep apart for this."""
        return frozenset(name for name, _ in self.flags) & FLAGS_OF_USE

    def part_of(self, row: Range) -> Optional[Range]:
        """The pages of `row` that are wanted, whole pages; None where there are none."""
        if row.rights & self.granted != self.granted or row.rights & self.denied:
            return None
        if self.page_size is not None and row.page_size != self.page_size:
            return None
        if self.memory_type and row.memory_type.upper() != self.memory_type:
            return None
        if not all(has_flag(row, name) == state for name, state in self.flags):
            return None
        if self.targets is None:
            return row
        low, high = self.targets
        first = max(low - row.target, 0) // row.page_size * row.page_size
        last = min(-(-(high - row.target) // row.page_size) * row.page_size, row.length)
        return None if last <= first else row._replace(start=row.start + first, target=row.target + first, length=last - first)


def has_flag(row: Range, ident: str) -> bool:
    return bool(row.attributes & _flag_mask(row.kind, ident))


@lru_cache(maxsize=256)
def _flag_mask(kind: EntryKind, ident: str) -> int:
    return kind.bits[ident].mask if ident in kind.bits.idents() else 0


EVERYTHING = Wanted()


def matching(rows: Iterable[Range], wanted: Wanted, ignore_page_size: bool = False) -> Iterator[Range]:
    """The wanted parts of `rows` (which have their page sizes kept apart); with `ignore_page_size`, neighbours merged across sizes afterwards."""
    if wanted == EVERYTHING and not ignore_page_size:
        yield from rows
        return
    held: Optional[Range] = None
    for row in rows:
        part = wanted.part_of(row)
        if part is None:
            continue
        joined = join(held, part, ignore_page_size) if held is not None else None
        if held is not None and joined is None:
            yield held
        held = joined or part
    if held is not None:
        yield held


def outside(row: Range, memory: Sequence[Tuple[int, int]]) -> Iterator[Range]:
    """The parts of a range whose frames are not in `memory`, sorted (start, end) without overlaps."""
    at, end = row.target, row.target + row.length
    for low, high in memory[max(bisect_right(memory, (at, 1 << 64)) - 1, 0):]:
        if low >= end:
            break
        if low > at:
            yield row._replace(start=row.start + at - row.target, target=at, length=low - at)
        at = max(at, high)
    if at < end:
        yield row._replace(start=row.start + at - row.target, target=at, length=end - at)


@dataclass
class Totals:
    """What ranges sum up to; bytes by memory type, pages by size.  `memory` is what exists, sorted (start, end), where that is known: `outside`
    are the bytes that go elsewhere, `outside_first` the first range of them."""

    memory: Optional[Sequence[Tuple[int, int]]] = None
    outside: int = 0
    outside_first: Optional[Range] = None
    ranges: int = 0
    pages: Dict[int, int] = field(default_factory=dict)
    types: Dict[str, int] = field(default_factory=dict)
    first: Optional[int] = None
    end: int = 0
    _span: Tuple[int, int] = (0, 0)
    _hole: Tuple[int, int] = (0, 0)

    @property
    def bytes(self) -> int:
        return sum(size * count for size, count in self.pages.items())

    def add(self, row: Range) -> None:
        """Count a range whose pages are of one size."""
        start, target, length, size, memory_type = row.start, row.target, row.length, row.page_size, row.memory_type
        self.pages[size] = self.pages.get(size, 0) + length // size
        self.types[memory_type] = self.types.get(memory_type, 0) + length
        if self.first is None or start < self.first:
            self.first = start
        if start + length > self.end:
            self.end = start + length
        if self.memory is None or self._span[0] <= target < target + length <= self._span[1]:
            return
        if self._hole[0] <= target < target + length <= self._hole[1]:
            self.outside += length
        else:
            self._look_outside(row, self.memory)

    def _look_outside(self, row: Range, memory: Sequence[Tuple[int, int]]) -> None:
        at = bisect_right(memory, (row.target, 1 << 64)) - 1
        self._span = memory[at] if at >= 0 else self._span
        for part in outside(row, memory):
            self.outside += part.length
            self.outside_first = self.outside_first or part
            # Next rows often go to the same hole.
            after = bisect_right(memory, (part.target, 1 << 64))
            self._hole = memory[after - 1][1] if after else 0, memory[after][0] if after < len(memory) else 1 << 64


def counted(rows: Iterable[Range], wanted: Wanted, totals: Totals) -> Iterator[Range]:
    """The wanted parts of `rows`, each counted on the way: before page sizes are merged."""
    everything = wanted == EVERYTHING
    for row in rows:
        part = row if everything else wanted.part_of(row)
        if part is not None:
            totals.add(part)
            yield part


# ---- what people type ---------------------------------------------------------------------------------------------------------------

def parse_wanted(tables: Tables, perm: Optional[str] = None, hpa: Optional[str] = None, memory_type: Optional[str] = None,
                 size: Optional[str] = None, flags: Sequence[str] = ()) -> Wanted:
    """A filter out of words: perm "x", "rw", "!w", "r!x" or exactly as printed ("r-x"), hpa "A-B" or "A+SIZE", type "uc", size "4k",
    flags "D", "!SVE".  Raises UsageError or UnknownName with what there is."""
    granted, denied = parse_permissions(tables, perm) if perm else (0, 0)
    return Wanted(granted, denied, parse_range(hpa) if hpa else None, _type(memory_type) if memory_type else "",
                  _size(tables, size) if size else None, tuple(_flag(tables, item) for item in flags))


def parse_permissions(tables: Tables, text: str) -> Tuple[int, int]:
    """(rights that must be granted, rights that must not be)."""
    letters = [letter for letter, _, _ in tables.rights]
    words = text.lower().replace(",", "").replace(" ", "")
    if "-" in words:
        if len(words) != len(letters) or any(given not in (letter, "-") for given, letter in zip(words, letters)):
            raise UsageError(f"--perm {text!r}: with a '-' give all {len(letters)} places as printed, out of {''.join(letters)!r}")
        granted = sum(tables.right(letter) for letter, given in zip(letters, words) if given != "-")
        return granted, tables.rights_mask & ~granted
    masks, at = [0, 0], 0
    while at < len(words):
        without = words[at] == "!"
        at += without
        letter = words[at] if at < len(words) else ""
        if letter not in letters or not letter:
            raise UsageError(f"--perm {text!r}: give letters of {''.join(letters)!r} that must be granted, with ! before one that must not")
        masks[without] |= tables.right(letter)
        at += 1
    return masks[0], masks[1]


def _type(text: str) -> str:
    known = [*PAT_TYPES.values(), *(f"PAT{index}" for index in range(8))]
    if text.upper() not in known:
        raise UnknownName("memory type", text, near_names(text.upper(), known) or tuple(known))
    return text.upper()


def _size(tables: Tables, text: str) -> int:
    sizes = [level.page_size for level in reversed(tables.levels) if level.leaf is not None]
    size = parse_size(text)
    if size not in sizes:
        raise UsageError(f"--size {text}: {tables.title} has pages of {', '.join(map(size_text, sizes))}")
    return size


def _flag(tables: Tables, text: str) -> Tuple[str, bool]:
    known = flag_names(tables)
    name = text.lstrip("!")
    found = {ident.upper(): ident for ident in known}.get(name.upper())
    if found is None:
        raise UnknownName("flag", name, near_names(name.upper(), known) or tuple(known))
    return found, not text.startswith("!")


def flag_names(tables: Tables) -> List[str]:
    """Identifiers of the flags that pages of these tables have, rights and page size apart; what is not in use is not one."""
    names: List[str] = []
    for level in tables.levels:
        for row in level.leaf.bits.fields if level.leaf is not None else ():
            if row.kind == "flag" and row.ident != "PS" and not row.mask & (tables.rights_mask | tables.present) and row.ident not in names:
                names.append(row.ident)
    return names
