"""What two mappings say differently: pages that came, went, or go elsewhere, with other rights, another memory type, size or flags.

Both are taken as streams of ranges in address order, so that tables of any size need little memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Callable, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from vtdbg.enumeration import Enumeration, Problem, Range
from vtdbg.level_tables import Permissions
from vtdbg.memory.base import PhysicalMemory
from vtdbg.walk import Structure

WORK = 1 << 21
"""As `vtdbg.enumeration.WORK_LIMIT`: every range costs more here.  8 GiB of 4 KiB pages of which no two follow each other."""
ASPECTS = ("frame", "permissions", "type", "flags", "page size")
"""What can differ of a page that both sides map."""
BROKEN = ("misconfiguration", "unreadable", "loop")


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
    "changed", and then `aspects` says in what.  Both sides' targets step along with the address.

    For "added" and "removed", `aspects` is ("misconfiguration",) where the other side has entries that break rules, ("unreadable",) where its
    tables are not in the memory (whether it maps the page is then unknown), else ()."""

    kind: str
    start: int
    length: int
    before: Optional[Side]
    after: Optional[Side]
    aspects: Tuple[str, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length


Segment = Tuple[int, int, Optional[Range], Optional[Range]]
"""(start, end, range of the first side, of the second)"""


def diff_ranges(before: Iterable[Range], after: Iterable[Range], aspects: FrozenSet[str] = frozenset(ASPECTS),
                watch: Callable[[Iterator[Segment]], Iterator[Segment]] = iter) -> Iterator[Change]:
    """Changes in address order, neighbours that changed alike as one.  `aspects` are those of ASPECTS that count.

    `watch` is passed what is compared on the way, and may end it.  Where the sides are `Enumeration`s, what one of them could not read, or gave
    up before, is not taken for a page that is not mapped.
    """
    held: Optional[Change] = None
    for change in _changes(before, after, aspects, watch):
        joined = _joined(held, change) if held is not None else None
        if held is not None and joined is None:
            yield held
        held = joined or change
    if held is not None:
        yield held


def _changes(before: Iterable[Range], after: Iterable[Range], aspects: FrozenSet[str],
             watch: Callable[[Iterator[Segment]], Iterator[Segment]]) -> Iterator[Change]:
    holes = _Holes(before), _Holes(after)
    for start, end, one, two in watch(segments(iter(before), iter(after))):
        if one is not None and two is not None:
            change = _change(start, end - start, one, two, aspects)
            if change is not None:
                yield change
            continue
        end = min(end, given_up(before), given_up(after))
        if start >= end:
            return
        row = one or two
        assert row is not None
        for low, high, why in holes[row is one].pieces(start, end):
            shown = side_of(row, low)
            aspect = (why,) if why else ()
            yield (Change("removed", low, high - low, shown, None, aspect) if row is one
                   else Change("added", low, high - low, None, shown, aspect))


def given_up(side: Iterable[Range]) -> int:
    """The address at which an enumeration gave up; 2**64 where it did not."""
    last = side.problems[-1] if isinstance(side, Enumeration) and side.problems else None
    return last.start if last is not None and last.kind == "limit" else 1 << 64


class _Holes:
    """Where a side maps nothing because its tables are wrong there.  An enumeration is ahead of its ranges: what it met up to them is known."""

    def __init__(self, side: Iterable[Range]) -> None:
        self._side = side if isinstance(side, Enumeration) else None
        self._taken = 0
        self._holes: List[Tuple[int, int, str]] = []

    def pieces(self, start: int, end: int) -> Iterator[Tuple[int, int, str]]:
        """(start, end, kind of problem, or "" where entries are not present)."""
        problems = self._side.problems if self._side is not None else []
        for problem in problems[self._taken:]:
            if problem.kind in ("misconfiguration", "unreadable"):
                insort(self._holes, (problem.start, problem.start + problem.length, problem.kind))
        self._taken = len(problems)
        for first, last, kind in self._holes[max(bisect_left(self._holes, (start, 0, "")) - 1, 0):]:
            if first >= end or start == end:
                break
            if last <= start:
                continue
            if first > start:
                yield start, first, ""
                start = first
            yield start, min(last, end), kind
            start = min(last, end)
        if start < end:
            yield start, end, ""


def diff(memory: PhysicalMemory, before: Structure, other: PhysicalMemory, after: Structure, *, first: int = 0, last: int = (1 << 64) - 1,
         apart: FrozenSet[str] = frozenset(), aspects: FrozenSet[str] = frozenset(ASPECTS)) -> Iterator[Change]:
    """The same for two structures (`Ept`, `Npt`), each in its memory.  `apart` {"A", "D"} compares accessed and dirty flags too."""
    return diff_ranges(Enumeration(memory, before, first, last, apart=apart, limit=WORK),
                       Enumeration(other, after, first, last, apart=apart, limit=WORK), aspects)


def side_of(row: Range, address: int) -> Side:
    return Side(row.target + address - row.start, row.permissions, row.memory_type, row.flags, row.page_size)


def segments(before: Iterator[Range], after: Iterator[Range]) -> Iterator[Segment]:
    """Segments wherever either maps something; ends where either side changes its range."""
    one, two = next(before, None), next(after, None)
    at = 0
    while one is not None or two is not None:
        if one is not None and two is not None and one[0] == two[0] >= at and one[2] == two[2]:
            at = one[0] + one[2]
            yield one[0], at, one, two
            one, two = next(before, None), next(after, None)
            continue
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


def _change(start: int, length: int, one: Range, two: Range, aspects: FrozenSet[str]) -> Optional[Change]:
    # Nearly everything is equal, and to compare numbers is cheaper than to say what they mean.
    if one[1] - one[0] == two[1] - two[0] and one[3:] == two[3:]:
        return None
    before, after = side_of(one, start), side_of(two, start)
    pairs = ((before.target, after.target), (before.permissions, after.permissions), (before.memory_type, after.memory_type),
             (before.flags, after.flags), (before.page_size, after.page_size))
    differ = tuple(name for name, (was, now) in zip(ASPECTS, pairs) if was != now and name in aspects)
    return Change("changed", start, length, before, after, differ) if differ else None


@dataclass(frozen=True)
class Broken:
    """Entries that lead nowhere on one side (`side` "first" or "second") or, alike, on "both": they break rules, or name a table that
    cannot be read or that contains itself.  `problem` is that of the first side that has it."""

    side: str
    problem: Problem


def broken(before: Enumeration, after: Enumeration, end: int = 1 << 64) -> List[Broken]:
    """What neither side maps below `end` because its tables are wrong there, in address order; after both have been iterated.

    Alike is what has the same place, rules and entry: where the tables lie does not count.  Nothing is said of what one side did not reach.
    """
    end = min(end, given_up(before), given_up(after))
    one = {_problem_key(problem): problem for problem in before.problems if problem.kind in BROKEN}
    two = {_problem_key(problem): problem for problem in after.problems if problem.kind in BROKEN}
    found = [Broken("both" if key in two else "first", problem) for key, problem in one.items()]
    found += [Broken("second", problem) for key, problem in two.items() if key not in one]
    return sorted((item for item in found if item.problem.start < end), key=lambda item: (item.problem.start, item.side))


def _problem_key(problem: Problem) -> Tuple[object, ...]:
    entry = problem.entry if problem.kind == "misconfiguration" else None
    return problem.kind, problem.start, problem.length, entry, tuple(rule.id for rule in problem.rules)


def _joined(one: Change, two: Change) -> Optional[Change]:
    if one.end != two.start or (one.kind, one.aspects) != (two.kind, two.aspects):
        return None
    for was, now in ((one.before, two.before), (one.after, two.after)):
        if (was is None) != (now is None):
            return None
        if was is not None and now is not None and (was.target + one.length, was[1:]) != (now.target, now[1:]):
            return None
    return Change(one.kind, one.start, one.length + two.length, one.before, one.after, one.aspects)
