"""What two mappings say differently: pages that came, went, or go elsewhere, with other rights, another memory type, size or flags.

Both are taken as streams of ranges in address order, so that tables of any size need little memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import FrozenSet, Iterable, Iterator, NamedTuple, Optional, Tuple

from vtdbg.enumeration import Enumeration, Range
from vtdbg.level_tables import Permissions
from vtdbg.memory.base import PhysicalMemory
from vtdbg.walk import Structure

WORK = 1 << 19
"""As `vtdbg.enumeration.WORK_LIMIT`: every range costs more here."""
ASPECTS = ("frame", "permissions", "type", "flags", "page size")
"""What can differ of a page that both sides map."""


class Side(NamedTuple):
    """How one side maps the first page of a change.  `target` is host-physical; `flags` are identifiers."""

    target: int
    permissions: Permissions
    memory_type: str
    flags: Tuple[str, ...]
    page_size: int


@dataclass(frozen=True)
class Change:
    """`length` bytes from guest-physical `start` on.  `kind` is "added" (only the second maps them), "removed" (only the first) or
    "changed", and then `aspects` says in what.  Both sides' targets step along with the address."""

    kind: str
    start: int
    length: int
    before: Optional[Side]
    after: Optional[Side]
    aspects: Tuple[str, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length


def diff_ranges(before: Iterable[Range], after: Iterable[Range], aspects: FrozenSet[str] = frozenset(ASPECTS)) -> Iterator[Change]:
    """Changes in address order, neighbours that changed alike as one.  `aspects` are those of ASPECTS that count."""
    held: Optional[Change] = None
    for start, end, one, two in segments(iter(before), iter(after)):
        change = _change(start, end - start, one, two, aspects)
        if change is None:
            continue
        joined = _joined(held, change) if held is not None else None
        if held is not None and joined is None:
            yield held
        held = joined or change
    if held is not None:
        yield held


def diff(memory: PhysicalMemory, before: Structure, other: PhysicalMemory, after: Structure, *, first: int = 0, last: int = (1 << 64) - 1,
         apart: FrozenSet[str] = frozenset(), aspects: FrozenSet[str] = frozenset(ASPECTS)) -> Iterator[Change]:
    """The same for two structures (`Ept`, `Npt`), each in its memory.  `apart` {"A", "D"} compares accessed and dirty flags too."""
    return diff_ranges(Enumeration(memory, before, first, last, apart=apart, limit=WORK),
                       Enumeration(other, after, first, last, apart=apart, limit=WORK), aspects)


def side_of(row: Range, address: int) -> Side:
    return Side(row.target + address - row.start, row.permissions, row.memory_type, row.flags, row.page_size)


def segments(before: Iterator[Range], after: Iterator[Range]) -> Iterator[Tuple[int, int, Optional[Range], Optional[Range]]]:
    """(start, end, range of the first side, of the second) wherever either maps something; ends where either side changes its range."""
    one, two = next(before, None), next(after, None)
    at = 0
    while one is not None or two is not None:
        at = max(at, min(row.start for row in (one, two) if row is not None))
        here = one if one is not None and one.start <= at else None
        there = two if two is not None and two.start <= at else None
        end = min([row.end for row in (here, there) if row is not None]
                  + [row.start for row, now in ((one, here), (two, there)) if row is not None and now is None])
        yield at, end, here, there
        at = end
        if one is not None and one.end <= at:
            one = next(before, None)
        if two is not None and two.end <= at:
            two = next(after, None)


def _change(start: int, length: int, one: Optional[Range], two: Optional[Range], aspects: FrozenSet[str]) -> Optional[Change]:
    before = side_of(one, start) if one is not None else None
    after = side_of(two, start) if two is not None else None
    if before is None or after is None:
        return Change("added" if before is None else "removed", start, length, before, after)
    pairs = ((before.target, after.target), (before.permissions, after.permissions), (before.memory_type, after.memory_type),
             (before.flags, after.flags), (before.page_size, after.page_size))
    differ = tuple(name for name, (was, now) in zip(ASPECTS, pairs) if was != now and name in aspects)
    return Change("changed", start, length, before, after, differ) if differ else None


def _joined(one: Change, two: Change) -> Optional[Change]:
    if one.end != two.start or (one.kind, one.aspects) != (two.kind, two.aspects):
        return None
    for was, now in ((one.before, two.before), (one.after, two.after)):
        if (was is None) != (now is None):
            return None
        if was is not None and now is not None and (was.target + one.length, was[1:]) != (now.target, now[1:]):
            return None
    return Change(one.kind, one.start, one.length + two.length, one.before, one.after, one.aspects)
