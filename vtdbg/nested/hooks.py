"""Pages that somebody treats unlike their surroundings: how EPT hooks look, in one table and between several.

A hook needs a page of its own: an execute-only page that runs other bytes than reads see, a page without execute that exits when it is run,
or a second table with another frame for the same page.  Large pages are split for it, and that shows as well.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import islice
from typing import Callable, Dict, Hashable, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar

from vtdbg.enumeration import Enumeration, Range
from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.nested.diff import Segment, diff_ranges
from vtdbg.nested.meant import faults
from vtdbg.walk import Structure
from vtdbg.x86.disasm import MAX_LENGTH, Instruction, disassemble

SIGNS: Mapping[str, str] = {
    "execute-only": "can be run and not be read: what runs here is not what a reader sees, or every read exits",
    "no-execute": "readable and writable inside executable memory: the first fetch exits, which is how a breakpoint on execution works",
    "other-frame": "does not go where the pages around it go",
    "other-rights": "has other rights than the pages around it",
    "split": "large page split into small ones that all say the same: prepared for a hook, or a hook that was taken away",
    "view-frame": "goes to another frame in another table: what is seen depends on the view that is active",
    "view-rights": "has other rights in another table",
}
"""What makes a page stand out, and what it means.  Read-only memory is not in this list: it is how ROMs and shared pages look."""

KEPT = 1 << 18
"""Ranges of one table that are kept, to see which tables are views of one guest.  What stands out is looked for on the way, in all of them."""
HOOKS = 1 << 16
"""Hooks of one table that are kept; hostile tables have one for every page."""
_CHUNK = 1 << 16
"""Ranges that are judged together, or those of the largest page if there are more: up to 2**18."""

Watch = Callable[[Iterable[Range]], Iterable[Range]]
"""Passed what is enumerated, on the way; may end it."""


@dataclass(frozen=True)
class Hook:
    """`length` bytes from `start` (guest-physical) that stand out, by the keys of SIGNS.

    `target` is where they go, `expected` where their surroundings or the first table say they should (None: nobody says); `permissions` are
    theirs, `usual` those around them or in the first table.  `view` is the number of the table that disagrees with the first one.
    """

    start: int
    length: int
    signs: Tuple[str, ...]
    target: int
    permissions: str
    page_size: int
    expected: Optional[int] = None
    usual: str = ""
    view: Optional[int] = None

    @property
    def moved(self) -> bool:
        return self.expected is not None and self.expected != self.target


@dataclass(frozen=True)
class View:
    """What one table maps, and what stands out in it.

    `rows` are the first KEPT ranges of `ranges`; `hooks` the first HOOKS hooks, in address order, `more` how many there are besides.
    `complete`: nothing was left out; where it is False, everything from `reached` on was, and `why` says for what reason ("" where `watch`
    ended it).  `problems` counts what is wrong with the table, `meant` the pages that KVM makes fault on purpose (MMIO).
    """

    rows: Tuple[Range, ...]
    ranges: int
    hooks: Tuple[Hook, ...]
    more: int
    complete: bool
    reached: int
    why: str = ""
    problems: int = 0
    meant: int = 0


def view(memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1, watch: Watch = iter) -> View:
    """What a table maps from guest-physical `first` to `last` (inclusive), each table read once and little kept of it."""
    found = Enumeration(memory, structure, first, last)
    kept: List[Range] = []
    count, reached = 0, first

    def noted() -> Iterator[Range]:
        nonlocal count, reached
        for row in watch(found):
            if count < KEPT:
                kept.append(row)
            count, reached = count + 1, row[0] + row[2]
            yield row

    every = hooks(noted())
    shown = tuple(islice(every, HOOKS))
    more = sum(1 for _ in every)
    limit = next((problem for problem in found.problems if problem.kind == "limit"), None)
    wrong, meant = faults(memory, structure, found.problems)
    pages = sum(item.problem.entries for item in meant)
    return View(tuple(kept), count, shown, more, found.complete, limit.start if limit else reached, limit.text if limit else "",
                len(wrong) - (limit is not None) + found.problem_count - len(found.problems), pages)


# ---- one table ----------------------------------------------------------------------------------------------------------------------

_Note = Callable[..., None]
_Key = TypeVar("_Key", bound=Hashable)


class _Area(NamedTuple):
    """An aligned area that several ranges share, all of it mapped by pages smaller than `size`."""

    start: int
    size: int
    pieces: Tuple[Range, ...]


def hooks(rows: Iterable[Range]) -> Iterator[Hook]:
    """What stands out in the ranges of one table (page sizes kept apart, in address order), in address order.

    A page is judged by what is around it, up to the largest page: few rows are held at a time.
    """
    held: List[Range] = []
    low = area = 0
    for row in rows:
        area = area or max(level.page_size for level in row.tables.levels if level.leaf is not None)
        high = row.start // area * area
        if len(held) >= _CHUNK and high > low:
            held.append(row)
            yield from _hooks_between(held, low, high)
            # Whatever touches the border is what the next ones are compared with.
            held, low = [one for one in held if one.end >= high], high
        else:
            held.append(row)
    yield from _hooks_between(held, low, 1 << 64)


def _hooks_between(rows: Sequence[Range], low: int, high: int) -> List[Hook]:
    """What stands out from `low` to `high`, which no area crosses; `rows` are those and the ones right before and behind."""
    found: Dict[Tuple[int, int], Hook] = {}

    def note(row: Range, sign: str, expected: Optional[int] = None, usual: str = "") -> None:
        known = found.get((row.start, row.length))
        if known is None:
            found[row.start, row.length] = Hook(row.start, row.length, (sign,), row.target, row.permissions, row.page_size, expected, usual)
        else:
            found[row.start, row.length] = Hook(row.start, row.length, (*known.signs, sign), row.target, row.permissions, row.page_size,
                                                known.expected if expected is None else expected, known.usual or usual)

    own = range(bisect_left(rows, (low,)), bisect_left(rows, (high,)))
    for index in own:
        row = rows[index]
        permissions = row.permissions
        if permissions.execute and not permissions.read:
            note(row, "execute-only")
        elif permissions.read and permissions.write and not permissions.execute and _surrounded(rows, index):
            note(row, "no-execute")
    starts = [row.start for row in rows]
    sizes = sorted({level.page_size for level in (rows[0].tables.levels if rows else ()) if level.leaf is not None})
    for size in sizes[1:]:
        for area in _areas(rows, size):
            if low <= area.start < high:
                _judge(area, rows, starts, note)
        for index in own:
            row = rows[index]
            # A split that serves no purpose any more: pages that all say what one large page would.
            if row.page_size < size and not row.start % size and not row.length % size and row.length <= 16 * size \
                    and _large_around(row.start, row.end, row.target - row.start, size, rows, starts):
                note(row, "split")
    return [found[key] for key in sorted(found)]


def _surrounded(rows: Sequence[Range], index: int) -> bool:
    """Is executable memory right before and right behind?"""
    if not 0 < index < len(rows) - 1:
        return False
    before, row, after = rows[index - 1], rows[index], rows[index + 1]
    return before.end == row.start and after.start == row.end and before.permissions.execute and after.permissions.execute


def _areas(rows: Sequence[Range], size: int) -> Iterator[_Area]:
    """Areas of `size` that are mapped in full, by smaller pages, in more than one range."""
    current, covered = -1, 0
    pieces: List[Range] = []
    for row in rows:
        start, length = row[0], row[2]
        if row[3] >= size:
            continue
        first, last = start // size, (start + length - 1) // size
        # Nearly all rows are small and within one area.
        for at in (first,) if first == last else (first, last):
            if first != last:
                low, high = max(start, at * size), min(start + length, (at + 1) * size)
                piece = row._replace(start=low, target=row.target + low - start, length=high - low)
            else:
                piece = row
            if piece[2] == size:
                continue
            if at != current:
                if covered == size:
                    yield _Area(current * size, size, tuple(pieces))
                current, covered, pieces = at, 0, []
            pieces.append(piece)
            covered += piece[2]
    if covered == size:
        yield _Area(current * size, size, tuple(pieces))


def _judge(area: _Area, rows: Sequence[Range], starts: Sequence[int], note: "_Note") -> None:
    """Pieces of an area that leave the rule of their area: where most of it goes on as the memory around it does."""
    offset = _most((piece.target - piece.start, piece.length) for piece in area.pieces)
    around = [row for row in (_at(area.start - 1, rows, starts), _at(area.start + area.size, rows, starts)) if row is not None]
    if offset is None or not any(row.target - row.start == offset for row in around):
        return
    rights = _most((piece.permissions, piece.length) for piece in area.pieces)
    for piece in area.pieces:
        if piece.target - piece.start != offset:
            note(piece, "other-frame", piece.start + offset, str(rights or ""))
        if rights is not None and piece.permissions != rights:
            note(piece, "other-rights", None, str(rights))


def _large_around(start: int, end: int, offset: int, size: int, rows: Sequence[Range], starts: Sequence[int]) -> bool:
    around = (_at(start - 1, rows, starts), _at(end, rows, starts))
    return all(row is not None and row.page_size >= size and row.target - row.start == offset for row in around)


def _at(address: int, rows: Sequence[Range], starts: Sequence[int]) -> Optional[Range]:
    index = bisect_right(starts, address) - 1
    return rows[index] if index >= 0 and rows[index].end > address else None


def _most(weights: "Iterable[Tuple[_Key, int]]") -> "Optional[_Key]":
    """What more than half of the weight is for."""
    total: Dict[_Key, int] = {}
    for key, weight in weights:
        total[key] = total.get(key, 0) + weight
    best = max(total, key=total.__getitem__)
    return best if 2 * total[best] > sum(total.values()) else None


# ---- several tables -----------------------------------------------------------------------------------------------------------------

class Kinship:
    """How much of what two tables both map goes to the same frame: views of one guest share nearly all of their frames."""

    def __init__(self) -> None:
        self.common = self.same = 0

    def counted(self, pairs: Iterable[Segment]) -> Iterator[Segment]:
        """The segments of a comparison, counted on the way (the `watch` of `diff_ranges`)."""
        for segment in pairs:
            start, end, first, second = segment
            if first is not None and second is not None:
                self.common += end - start
                self.same += (end - start) * (first.target - first.start == second.target - second.start)
            yield segment

    @property
    def close(self) -> bool:
        return 0 < self.common < 2 * self.same


def view_hooks(first: Iterable[Range], other: Iterable[Range], number: int, watch: Callable[[Iterator[Segment]], Iterator[Segment]] = iter) \
        -> Iterator[Hook]:
    """Pages that table `number` maps otherwise than the first: another frame, or other rights.  `watch` as for `diff_ranges`."""
    for change in diff_ranges(first, other, frozenset(("frame", "permissions")), watch):
        if change.before is None or change.after is None:
            continue
        signs = tuple(sign for aspect, sign in (("frame", "view-frame"), ("permissions", "view-rights")) if aspect in change.aspects)
        yield Hook(change.start, change.length, signs, change.after.target, change.after.permissions, change.after.page_size,
                   change.before.target, change.before.permissions, number)


# ---- what the bytes say -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Patch:
    """Bytes of a page that differ: at `offset`, `usual` in the expected frame, `found` in the other."""

    offset: int
    usual: bytes
    found: bytes


def patches(usual: bytes, found: bytes, gap: int = 8) -> List[Patch]:
    """Where two pages of the same size differ; differences less than `gap` bytes apart are one."""
    runs: List[List[int]] = []
    for at, (one, two) in enumerate(zip(usual, found)):
        if one != two:
            if runs and at - runs[-1][1] < gap:
                runs[-1][1] = at + 1
            else:
                runs.append([at, at + 1])
    return [Patch(low, usual[low:high], found[low:high]) for low, high in runs]


def read_pair(memory: PhysicalMemory, hook: Hook) -> Optional[Tuple[bytes, bytes]]:
    """The first page of a hook as expected and as found; None where a frame is not in the memory or nobody says what to expect."""
    if hook.expected is None:
        return None
    try:
        return memory.read(hook.expected & -PAGE_SIZE, PAGE_SIZE), memory.read(hook.target & -PAGE_SIZE, PAGE_SIZE)
    except MemoryUnavailable:
        return None


def instructions(page: bytes, base: int, offset: int, length: int, mode: int) -> List[Instruction]:
    """The instructions of a page that cover `length` bytes from `offset` on, at most eight; `base` is the address of its first byte.

    Where an instruction begins is not written anywhere: decoding starts some bytes before, and falls into step.
    Raises UsageError where capstone is not installed.
    """
    found: List[Instruction] = []
    at = max((offset & ~15) - 16, 0)
    while at < min(offset + length, len(page)) and len(found) < 8:
        one = disassemble(page[at:at + MAX_LENGTH], base + at, mode)
        size = one.length if one is not None else 1
        if one is not None and at + size > offset:
            found.append(one)
        at += size
    return found
