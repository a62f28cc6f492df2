"""The reverse map: which guest-physical addresses reach a host-physical one, and whether it holds a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, List, Optional, Tuple

from vtdbg.enumeration import Enumeration, Range
from vtdbg.memory.base import PhysicalMemory
from vtdbg.walk import Structure

WORK = 1 << 21
"""As `vtdbg.enumeration.WORK_LIMIT`, for questions where somebody waits for the answer."""


@dataclass(frozen=True)
class Place:
    """`length` bytes from guest-physical `gpa` on reach the host-physical bytes from `hpa` on.  `row` is the range that they are in."""

    gpa: int
    hpa: int
    length: int
    row: Range


@dataclass(frozen=True)
class Found:
    """`places` in the order of their guest-physical addresses; `tables` (address, level) of the tables that lie in the bytes asked for;
    `complete` False where the tables were too much to enumerate, or `limit` places were found (`places` are the first ones)."""

    places: Tuple[Place, ...]
    tables: Tuple[Tuple[int, int], ...]
    complete: bool
    problem: str = ""
    reached: Optional[int] = None
    """Where the tables were given up: nothing is said of what lies from here on."""


def places(rows: Iterator[Range], first: int, end: int) -> Iterator[Place]:
    """Every way that ranges reach host-physical [first, end)."""
    for row in rows:
        low, high = max(first, row.target), min(end, row.target + row.length)
        if low < high:
            yield Place(row.start + low - row.target, low, high - low, row)


def find(memory: PhysicalMemory, structure: Structure, hpa: int, size: int = 1, limit: int = 10_000, first: int = 0, last: int = (1 << 64) - 1,
         watch: Callable[[Iterable[Range]], Iterable[Range]] = iter) -> Found:
    """Who maps the `size` bytes at host-physical `hpa` (a page that nobody may access counts: its permissions are "---"), by guest-physical
    addresses from `first` to `last`.

    `watch` is passed the ranges on the way, and may end it.  Never raises for what the tables hold.
    """
    rows = Enumeration(memory, structure, first, last, limit=WORK)
    found: List[Place] = []
    cut = False
    for place in places(iter(watch(rows)), hpa, hpa + size):
        cut = len(found) == limit
        if cut:
            break
        found.append(place)
    tables = tuple(sorted((at, level) for at, level in rows.table_levels.items() if at < hpa + size and at + 4096 > hpa))
    limit_hit = next((problem.start for problem in rows.problems if problem.kind == "limit"), None)
    return Found(tuple(found), tables, rows.complete and not cut, _problem(rows, cut), limit_hit)


def _problem(rows: Enumeration, cut: bool) -> str:
    if cut:
        return "more places than can be listed"
    given_up: Optional[str] = next((problem.text for problem in rows.problems if problem.kind in ("limit", "unreadable")), None)
    return given_up or rows.problems[-1].text if not rows.complete and rows.problems else given_up or ""
