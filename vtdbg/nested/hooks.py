"""Pages that somebody treats unlike their surroundings: how EPT hooks look, in one table and between several.

A hook needs a page of its own: an execute-only page that runs other bytes than reads see, a page without execute that exits when it is run,
or a second table with another frame for the same page.  Large pages are split for it, and that shows as well.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice
from typing import Callable, Dict, Hashable, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar

from vtdbg.enumeration import Enumeration, Range
from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.nested.diff import diff_ranges, segments
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

ROWS = 1 << 18
"""Ranges of one table that are looked at."""


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
    """The ranges of one table: at most ROWS, `complete` says whether these are all; `problems` counts what is wrong with the table."""

    rows: Tuple[Range, ...]
    complete: bool
    problems: int = 0


def view(memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1) -> View:
    """What a table maps from guest-physical `first` to `last` (inclusive)."""
    found = Enumeration(memory, structure, first, last)
    rows = tuple(islice(found, ROWS + 1))
    return View(rows[:ROWS], found.complete and len(rows) <= ROWS, found.problem_count)


# ---- one table ----------------------------------------------------------------------------------------------------------------------

_Note = Callable[..., None]
_Key = TypeVar("_Key", bound=Hashable)


class _Area(NamedTuple):
    """An aligned area that several ranges share, all of it mapped by pages smaller than `size`."""

    start: int
    size: int
    pieces: Tuple[Range, ...]


def hooks(rows: Sequence[Range]) -> List[Hook]:
    """What stands out in the ranges of one table (page sizes kept apart), in address order."""
    found: Dict[Tuple[int, int], Hook] = {}

    def note(row: Range, sign: str, expected: Optional[int] = None, usual: str = "") -> None:
        known = found.get((row.start, row.length))
        if known is None:
            found[row.start, row.length] = Hook(row.start, row.length, (sign,), row.target, row.permissions, row.page_size, expected, usual)
        else:
            found[row.start, row.length] = Hook(row.start, row.length, (*known.signs, sign), row.target, row.permissions, row.page_size,
                                                known.expected if expected is None else expected, known.usual or usual)

    for index, row in enumerate(rows):
        permissions = row.permissions
        if permissions.execute and not permissions.read:
            note(row, "execute-only")
        elif permissions.read and permissions.write and not permissions.execute and _surrounded(rows, index):
            note(row, "no-execute")
    starts = [row.start for row in rows]
    sizes = sorted({level.page_size for level in (rows[0].tables.levels if rows else ()) if level.leaf is not None})
    for size in sizes[1:]:
        for area in _areas(rows, size):
            _judge(area, rows, starts, note)
        for row in rows:
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
    current = -1
    pieces: List[Range] = []
    for row in rows:
        if row.page_size >= size:
            continue
        first, last = row.start // size, (row.end - 1) // size
        for at in (first,) if first == last else (first, last):
            low, high = max(row.start, at * size), min(row.end, (at + 1) * size)
            if high - low == size:
                continue
            if at != current:
                if sum(piece.length for piece in pieces) == size:
                    yield _Area(current * size, size, tuple(pieces))
                current, pieces = at, []
            pieces.append(row if high - low == row.length else row._replace(start=low, target=row.target + low - row.start, length=high - low))
    if sum(piece.length for piece in pieces) == size:
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
    best = max(total, key=lambda key: total[key])
    return best if 2 * total[best] > sum(total.values()) else None


# ---- several tables -----------------------------------------------------------------------------------------------------------------

def kinship(one: Sequence[Range], two: Sequence[Range]) -> Tuple[int, int]:
    """(bytes that both map, bytes of them that go to the same frame): views of one guest share nearly all of their frames."""
    common = same = 0
    for start, end, first, second in segments(iter(one), iter(two)):
        if first is not None and second is not None:
            common += end - start
            same += (end - start) * (first.target - first.start == second.target - second.start)
    return common, same


def view_hooks(first: Sequence[Range], other: Sequence[Range], number: int) -> Iterator[Hook]:
    """Pages that table `number` maps otherwise than the first: another frame, or other rights."""
    for change in diff_ranges(first, other, frozenset(("frame", "permissions"))):
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
