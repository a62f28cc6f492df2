"""An address space as a picture: what an EPT, NPT or guest paging structure maps, as pieces few enough to draw and as rows of letters.

Pieces come from `vtdbg.enumeration` in address order.  Where there are more than can be drawn they are taken together, and the map says how:
first neighbours of equal meaning that go to scattered frames, then everything in blocks of a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from vtdbg.enumeration import Enumeration, Problem, Range
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.nested.meant import Told, told_apart
from vtdbg.walk import Structure

PAGE = 4096
PIECES = 4096
"""Pieces of a map unless asked for more."""
WORK_LIMIT = 1 << 22
"""Runs of pages that a picture is made of (see `vtdbg.enumeration`): 16 GiB of scattered 4 KiB pages; more would take longer than a glance."""
COLUMNS, ROWS = 64, 24

EXACT, ANY_FRAME = 0, 1
"""Grains of a map: every range by itself; ranges of equal meaning together, whatever frames they go to.  A larger grain is a block in bytes."""

MMIO = "MMIO"
"""In place of "misconfiguration", for entries that KVM makes fault on purpose."""
DRAWN_PROBLEMS = ("misconfiguration", "unreadable")
"""Problems that are a part of the address space; loops and limits are not a place."""


Tell = Callable[[Iterable[Problem]], Iterable[Told]]


def untold(problems: Iterable[Problem]) -> Iterable[Told]:
    """Nobody knows of any problem that it is meant so."""
    return (Told(problem, "") for problem in problems)


class Meaning(NamedTuple):
    """What is the same for all pages of a range."""

    permissions: str
    memory_type: str
    page_size: int
    flags: Tuple[str, ...]
    problem: str = ""


class Piece(NamedTuple):
    """Addresses `start` to `end` (exclusive): `mapped` bytes of them are mapped, by `ranges` ranges, which mean `meanings`.

    `target` is where `start` goes; None where ranges to different frames were taken together, or nothing is mapped.
    """

    start: int
    end: int
    mapped: int
    meanings: Tuple[Meaning, ...]
    target: Optional[int]
    ranges: int = 1


@dataclass(frozen=True)
class AddressMap:
    """`grain`: EXACT, ANY_FRAME or the block size that pieces were taken together in; `ranges` how many there were; `told` are the problems."""

    pieces: Tuple[Piece, ...]
    grain: int
    ranges: int
    found: Enumeration
    told: Tuple[Told, ...] = ()


def picture(memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1) -> AddressMap:
    """What an `Ept`, `Npt` or `Paging` maps from `first` to `last` (inclusive)."""
    return address_map(Enumeration(memory, structure, first, last, limit=WORK_LIMIT), tell=partial(told_apart, memory, structure))


def address_map(found: Enumeration, limit: int = PIECES, rows: Optional[Iterable[Range]] = None, tell: Tell = untold) -> AddressMap:
    """Everything that `found` enumerates, in at most `limit` pieces (64 or more).  `rows` is `found` itself, or what watches it; `tell` says
    which of the problems are meant so (`vtdbg.nested.meant`)."""
    if limit < 64:
        raise UsageError(f"a map of {limit} pieces is no picture: at least 64")
    known: Dict[Tuple[int, int, int], Tuple[Meaning]] = {}
    pieces: List[Piece] = []
    grain = EXACT
    count = 0
    # The last piece, in variables: a large structure has millions of ranges, and most of them only make it longer.
    first, end, mapped, meanings, target, ranges = 0, -1, 0, _NONE, None, 0
    for row in found if rows is None else rows:
        start, goes_to, length = row[0], row[1], row[2]
        count += 1
        key = row[4], row[5], row[3]
        single = known.get(key) or _meaning(known, key, row)
        if grain and (start == end and meanings == single
                      or grain > ANY_FRAME and length < grain and end - first <= grain and first // grain == start // grain and ranges):
            if target is not None and (goes_to != target + start - first or meanings != single or start != end):
                target = None
            if single[0] not in meanings:
                meanings += single
            end, mapped, ranges = max(end, start + length), mapped + length, ranges + 1
            continue
        if ranges:
            pieces.append(Piece(first, end, mapped, meanings, target, ranges))
            if len(pieces) > 2 * limit:
                pieces, grain = coarsened(pieces, grain, limit)
        first, end, mapped, meanings, target, ranges = start, start + length, length, single, goes_to, 1
    if ranges:
        pieces.append(Piece(first, end, mapped, meanings, target, ranges))
    told = tuple(tell(found.problems))
    for problem, meant in told:
        if problem.kind in DRAWN_PROBLEMS and problem.length:
            meaning = Meaning("", "", 0, (), MMIO if meant else problem.kind)
            pieces.append(Piece(problem.start, problem.start + problem.length, 0, (meaning,), None, 0))
    pieces.sort(key=lambda piece: piece.start)
    if grain or len(pieces) > limit:
        pieces, grain = coarsened(pieces, grain, limit)
    return AddressMap(tuple(pieces), grain, count, found, told)


_NONE: Tuple[Meaning, ...] = ()


def _meaning(known: Dict[Tuple[int, int, int], Tuple[Meaning]], key: Tuple[int, int, int], row: Range) -> Tuple[Meaning]:
    """The meaning of a range, worked out once for each combination: there are millions of ranges and few meanings."""
    found = (Meaning(str(row.permissions), row.memory_type, row.page_size, row.flags),)
    if len(known) < PIECES:
        known[key] = found
    return found


def coarsened(pieces: Sequence[Piece], grain: int, limit: int) -> Tuple[List[Piece], int]:
    """The pieces, taken together with a larger and larger grain until `limit` are left, and that grain."""
    result = list(pieces)
    while True:
        merged: List[Piece] = []
        for piece in result:
            if merged and grain and _mergeable(merged[-1], piece, grain):
                merged[-1] = _merged(merged[-1], piece)
            else:
                merged.append(piece)
        result = merged
        if len(result) <= limit or grain >= 1 << 64:
            return result, grain
        grain = ANY_FRAME if grain == EXACT else 2 * PAGE if grain == ANY_FRAME else 2 * grain


def _mergeable(one: Piece, two: Piece, grain: int) -> bool:
    if one.end == two.start and one.meanings == two.meanings and len(one.meanings) == 1:
        return True
    # What is as large as a block stays a piece of its own: only the small ones are too many.
    return grain > ANY_FRAME and one.end - one.start <= grain and two.end - two.start < grain and one.start // grain == two.start // grain


def _merged(one: Piece, two: Piece) -> Piece:
    meanings = one.meanings if set(two.meanings) <= set(one.meanings) else tuple(dict.fromkeys(one.meanings + two.meanings))
    target = one.target if _continues(one, two) else None
    return Piece(one.start, max(one.end, two.end), one.mapped + two.mapped, meanings, target, one.ranges + two.ranges)


def _continues(one: Piece, two: Piece) -> bool:
    return (one.target is not None and two.target is not None and one.end == two.start and one.target + one.end - one.start == two.target
            and len(one.meanings) == 1 and one.meanings == two.meanings)


# ---- rows of letters ------------------------------------------------------------------------------------------------------------------

NOTHING, SEVERAL, BROKEN, UNREADABLE, ON_PURPOSE = ".", "*", "!", "?", "~"
SPECIAL: Mapping[str, str] = {
    NOTHING: "nothing is mapped", SEVERAL: "several of these", BROKEN: "a misconfiguration in it", UNREADABLE: "a table that cannot be read",
    ON_PURPOSE: "KVM's MMIO: every access faults on purpose",
}

# Letters that always mean the same, so that one learns them; others are handed out as they come.
LETTERS: Mapping[str, Mapping[str, str]] = {
    "perm": {"rwx": "A", "rwxu": "A", "rw-": "W", "rw-u": "W", "r-x": "X", "r-xu": "X", "r--": "R", "r--u": "R", "--x": "E", "--xu": "E",
             "---": "N", "----": "N"},
    "type": {"WB": "B", "UC": "U", "WC": "C", "WT": "T", "WP": "P"},
    "size": {"4 KiB": "K", "2 MiB": "M", "4 MiB": "F", "1 GiB": "G"},
}
STYLES: Mapping[str, Mapping[str, str]] = {
    "perm": {"r-x": "good", "r-xu": "good", "rw-": "warn", "rw-u": "warn", "r--": "cyan", "r--u": "cyan", "--x": "magenta", "--xu": "magenta",
             "---": "dim", "----": "dim"},
    "type": {"WB": "good", "UC": "warn", "WC": "cyan", "WT": "magenta", "WP": "blue"},
    "size": {"4 KiB": "warn", "2 MiB": "good", "4 MiB": "good", "1 GiB": "cyan"},
}
"""Styles of letters on a terminal that has colours; what is usual (rwx) is plain.  The letters say it all without."""
MARK_STYLES: Mapping[str, str] = {NOTHING: "dim", SEVERAL: "strong", BROKEN: "bad", UNREADABLE: "bad", ON_PURPOSE: "blue"}
_SPARE = "DHIJLOQSVYZABCEFGKMNPRTUWX"


def value_of(meaning: Meaning, by: str) -> str:
    """What a letter stands for: the permissions, the memory type or the page size of a meaning."""
    from vtdbg.numbers import size_text

    return meaning.permissions if by == "perm" else meaning.memory_type if by == "type" else size_text(meaning.page_size)


def letters_for(values: Iterable[str], by: str) -> Dict[str, str]:
    """A letter for each value; more values than letters share the mark for several."""
    taken: Dict[str, str] = {}
    for value in values:
        if value not in taken:
            used = set(taken.values())
            wanted = LETTERS[by].get(value, "")
            free = [letter for letter in _SPARE if letter not in used and letter not in LETTERS[by].values()]
            taken[value] = wanted if wanted and wanted not in used else free[0] if free else SEVERAL
    return taken


@dataclass(frozen=True)
class Row:
    """`cells` is a letter for each cell, the first one at `start`; lower case: mapped in part."""

    start: int
    cells: str


@dataclass(frozen=True)
class Gap:
    """Rows in which nothing is mapped, left out."""

    start: int
    end: int


@dataclass(frozen=True)
class Chart:
    """Rows and gaps in address order; `cell` bytes a letter; `letters` value -> letter, `special` the marks that occur."""

    lines: Tuple[Union[Row, Gap], ...]
    cell: int
    letters: Mapping[str, str]
    special: Tuple[str, ...]
    by: str = "perm"

    def style_of(self, letter: str) -> str:
        """The style of a letter or mark, where there are colours."""
        if letter in MARK_STYLES:
            return MARK_STYLES[letter]
        meant = next((value for value, one in self.letters.items() if one == letter.upper()), "")
        return STYLES[self.by].get(meant, "")

    def spans(self, cells: str) -> Tuple[Tuple[int, str], ...]:
        """(letters, style) of a row, neighbours of one style as one."""
        styles = {letter: self.style_of(letter) for letter in set(cells)}
        return tuple((len(list(same)), style) for style, same in groupby(styles[letter] for letter in cells))


def cell_size(pieces: Sequence[Piece], columns: int = COLUMNS, rows: int = ROWS) -> int:
    """The smallest cell (a power of two, a page or more) with which everything that is mapped fits into `rows` rows; empty rows do not count."""
    cell = PAGE
    while _rows_taken(pieces, cell * columns) > rows:
        cell *= 2
    return cell


def _rows_taken(pieces: Sequence[Piece], span: int) -> int:
    taken, reached = 0, -1
    for piece in pieces:
        first, last = max(piece.start // span, reached + 1), (piece.end - 1) // span
        if last >= first:
            taken += last - first + 1
            reached = last
    return taken


def chart(pieces: Sequence[Piece], by: str = "perm", columns: int = COLUMNS, rows: int = ROWS, cell: Optional[int] = None) -> Chart:
    """The pieces (in address order) as rows of letters, by "perm", "type" or "size"."""
    if by not in LETTERS:
        raise UsageError(f"a map is drawn by {', '.join(LETTERS)}, not by {by!r}")
    if columns < 1 or rows < 1:
        raise UsageError("a map has at least one row and one column")
    size = cell or cell_size(pieces, columns, rows)
    letters = letters_for((value_of(meaning, by) for piece in pieces for meaning in piece.meanings if not meaning.problem), by)
    lines: List[Union[Row, Gap]] = []
    marks = set()
    for number, members in _by_row(pieces, size * columns):
        start = number * size * columns
        cells = "".join(_letter(members, start + at * size, start + (at + 1) * size, letters, by) for at in range(columns))
        previous = lines[-1].start + size * columns if lines and isinstance(lines[-1], Row) else 0
        if start > previous:
            lines.append(Gap(previous, start))
        lines.append(Row(start, cells))
        marks |= set(cells)
    return Chart(tuple(lines), size, letters, tuple(mark for mark in SPECIAL if mark in marks), by)


def _by_row(pieces: Sequence[Piece], span: int) -> Iterator[Tuple[int, List[Piece]]]:
    """(row number, the pieces that touch it), in order; rows without any are left out."""
    waiting: List[Piece] = []
    number, at = 0, 0
    while at < len(pieces) or waiting:
        if not waiting:
            number = max(number, pieces[at].start // span)
        end = (number + 1) * span
        while at < len(pieces) and pieces[at].start < end:
            waiting.append(pieces[at])
            at += 1
        waiting = [piece for piece in waiting if piece.end > number * span]
        if waiting:
            yield number, waiting
        waiting = [piece for piece in waiting if piece.end > end]
        number += 1


def _letter(pieces: Sequence[Piece], start: int, end: int, letters: Mapping[str, str], by: str) -> str:
    """The mark of one cell: what is wrong comes before what is mapped."""
    covered, values, problems = 0, set(), set()
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.end, end)
        if low >= high:
            continue
        whole = piece.mapped == piece.end - piece.start
        covered += high - low if whole else 0
        for meaning in piece.meanings:
            if meaning.problem:
                problems.add(meaning.problem)
            else:
                values.add(value_of(meaning, by))
    if problems - {MMIO}:
        return BROKEN if "misconfiguration" in problems else UNREADABLE
    if problems:
        return SEVERAL if values else ON_PURPOSE
    if not values:
        return NOTHING
    if len(values) > 1:
        return SEVERAL
    letter = letters[values.pop()]
    return letter if covered >= end - start else letter.lower()


# ---- what deserves a look -------------------------------------------------------------------------------------------------------------

EXECUTE_ONLY, NO_EXECUTE = "execute-only", "read-write without execute"


def marked(meaning: Meaning) -> str:
    """What hooks look like: pages that are executed but not read, and pages that are written but not executed; empty for the others."""
    permissions = meaning.permissions
    if "x" in permissions and "r" not in permissions and "w" not in permissions:
        return EXECUTE_ONLY
    if permissions and "x" not in permissions and "w" in permissions:
        return NO_EXECUTE
    return ""
