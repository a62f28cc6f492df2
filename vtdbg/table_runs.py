"""What one table holds, compared as a whole: runs of entries that step by one page, without a look at each entry where that can be avoided.

A table is taken as one big number with a lane for each entry.  A regular table of 512 pages is one comparison; one of pages at random, which are
all legal, is a few operations on the whole number; only a table that holds several kinds of entries is gone through entry by entry.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache
from itertools import compress
from operator import sub
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from vtdbg.lanes import lanes
from vtdbg.level_tables import EntryKind, Level, Rule, Tables

_UNMERGED = ("A", "D")

Run = Tuple[int, int, int, int]
"""(index, how many entries, the first one, what they are).  Leaves step by one page; broken entries break the same rules; a table is alone.

Plain tuples of numbers, because the garbage collector does not look into those: a large structure has a million of them.
"""
LEAF, TABLE, BROKEN = range(3)
"""What entries are; BROKEN and above: which set of rules they break (`Judge.rules`)."""


class Pages:
    """A table in which everything that is present is a legal page, column by column: one item for each run of pages that step by one page.

    `offsets` and `lengths` are in bytes of address space; `rights` are those of the entry alone; `pages` counts them.
    """

    __slots__ = ("offsets", "lengths", "targets", "rights", "attributes", "pages", "_shape", "_whole")

    def __init__(self, shape: "Shape", whole: int, offsets: Sequence[int], lengths: Sequence[int], targets: Sequence[int], rights: Sequence[int],
                 attributes: Sequence[int], pages: int) -> None:
        self.offsets, self.lengths, self.targets, self.rights, self.attributes = offsets, lengths, targets, rights, attributes
        self.pages, self._shape, self._whole = pages, shape, whole

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Run]:
        entries, shift = _numbers(self._shape, self._whole), self._shape.level.shift
        return ((offset >> shift, length >> shift, entries[offset >> shift], LEAF) for offset, length in zip(self.offsets, self.lengths))


Content = Union[Sequence[Run], Pages]
"""What a table holds, in the order of its entries; entries that are not present are left out."""


class _Masks(NamedTuple):
    """What the columns of a table are taken out with, in every lane; `size` is a page's.  `body` are all lanes but the last."""

    telling: int
    present: int
    address: int
    others: int
    target: int
    inverted: int
    grants: int
    rights: int
    attributes: int
    size: int
    body: int


class Shape(NamedTuple):
    """Constants of one level for whole-table comparison: the lanes of a table as one number.

    `linear`: a step of a page stays inside a lane, all the way from the first entry to the last.
    """

    level: Level
    code: str
    size: int
    lane: int
    keep_all: int
    ones: int
    steps: int
    attributes: int
    ruled: int
    linear: bool
    address: int
    masks: Optional[_Masks]
    """None where a step of a page could leave its lane, or no entry maps a page."""


@lru_cache(maxsize=128)
def shapes_of(tables: Tables, apart: FrozenSet[str], exact: bool) -> Tuple[Shape, ...]:
    """The shape of each level.  `apart`: bits that keep pages apart beside the usual ones; `exact`: every bit does."""
    return tuple(_shape(tables, level, apart, exact) for level in tables.levels)


def _shape(tables: Tables, level: Level, apart: FrozenSet[str], exact: bool) -> Shape:
    width = level.entry_size * 8
    lane = (1 << width) - 1
    attributes = ruled = address = 0
    masks = None
    keep = tables.present | tables.rights_mask | level.large
    for kind in (level.table, level.leaf):
        if kind is None:
            continue
        keep |= kind.address | kind.high_address
        for rule in kind.rules:
            ruled |= rule.mask
        if kind.leaf:
            attributes = _attributes(tables, level, kind, apart)
            address = kind.bits["ADDRESS"].mask
    ruled |= level.large
    keep = lane if exact else keep | attributes | ruled
    steps = sum(level.page_size * index << width * index for index in range(level.entries))
    # A step that does not fit in a lane (the top levels) would run into the next one.
    fits = level.leaf is not None and level.page_size * level.entries <= lane
    kept = lane if exact else attributes
    # Where the address reaches to the top of its lane (32-bit paging), a step could leave it; those tables are small.
    if fits and level.leaf is not None and not level.leaf.high_address and not (address + level.page_size) & ~lane:
        everywhere = [lanes(number, level.entry_size, level.entries) for number in (
            ruled | tables.present, tables.present, address, lane & ~address, level.leaf.address, tables.inverted, level.leaf.grants,
            tables.rights_mask, kept, level.page_size)]
        masks = _Masks._make([*everywhere, (1 << width * (level.entries - 1)) - 1])
    return Shape(level, "Q" if width == 64 else "I", level.entries * level.entry_size, lane, lanes(keep, level.entry_size, level.entries),
                 lanes(1, level.entry_size, level.entries), steps, kept, ruled, fits, address, masks)


def _attributes(tables: Tables, level: Level, kind: EntryKind, apart: FrozenSet[str]) -> int:
    """The bits of a leaf that tell ranges apart, besides address and rights."""
    mask = 0
    for row in kind.bits.fields:
        if row.kind in ("flag", "enum", "number") and row.ident != "PS" and (row.ident not in _UNMERGED or row.ident in apart):
            mask |= row.mask
    return mask & ~(tables.rights_mask | tables.present | level.large)


class Judge:
    """What the entries of one level are.  That depends on few of their bits, and few combinations of those occur."""

    _LIMIT = 4096
    """Combinations that are kept: hostile tables do not get to keep all of theirs."""

    def __init__(self, shape: Shape) -> None:
        self._level, self._ruled = shape.level, shape.ruled
        self.known: Dict[int, int] = {}
        self.rules: List[Tuple[Rule, ...]] = []

    def of(self, entry: int) -> int:
        """LEAF, TABLE, or BROKEN plus the number of the rules that it breaks."""
        key = entry & self._ruled
        found = self.known.get(key)
        if found is None:
            kind = self._level.kind(entry)
            rules = kind.broken(entry)
            if not rules:
                found = LEAF if kind.leaf else TABLE
            else:
                if rules not in self.rules:
                    self.rules.append(rules)
                found = BROKEN + self.rules.index(rules)
            if len(self.known) < self._LIMIT:
                self.known[key] = found
        return found


def contents(shape: Shape, tables: Tables, data: bytes, judge: Judge) -> Content:
    """What a table holds, pages that step by one page taken together; entries that are not present are left out."""
    whole = int.from_bytes(data, "little") & shape.keep_all
    if not whole:
        return ()
    first, count = whole & shape.lane, shape.level.entries
    if (shape.linear and first & tables.present and whole == first * shape.ones + shape.steps and judge.of(first) == LEAF
            and _uniform(shape, first, count, judge)):
        return ((0, count, first, LEAF),)
    return _pages(shape, tables, whole, judge) or _irregular(shape, tables.present, _numbers(shape, whole), judge)


def _numbers(shape: Shape, whole: int) -> List[int]:
    """The lanes one by one."""
    entries = array(shape.code)
    entries.frombytes(whole.to_bytes(shape.size, "little"))
    if sys.byteorder == "big":
        entries.byteswap()
    return entries.tolist()


def _uniform(shape: Shape, entry: int, count: int, judge: Judge) -> bool:
    """Are `count` entries that step by one page from `entry`, a legal one, all legal, without a carry out of the address bits?

    Only the address changes on the way, and it grows: if the last entry is legal and in range, all are.
    """
    last = entry + (count - 1) * shape.level.page_size
    return not (entry ^ last) & ~shape.address and judge.of(last) == LEAF


# ---- nothing but pages -----------------------------------------------------------------------------------------------------------------

def _pages(shape: Shape, tables: Tables, whole: int, judge: Judge) -> Optional[Pages]:
    """The columns of a table in which everything that is present is a legal page; None where something else is."""
    masks, ones, level = shape.masks, shape.ones, shape.level
    if masks is None:
        return None
    present, holes = tables.present, None
    keys = whole & masks.telling
    key = keys & shape.lane
    if keys != key * ones:
        kinds = set(_numbers(shape, keys))
        if any(key & present and judge.of(key) != LEAF for key in kinds):
            return None
        if any(not key & present for key in kinds):
            holes = _numbers(shape, keys & masks.present)
    elif not key & present or judge.of(key) != LEAF:
        return None
    count, size, width = level.entries, level.page_size, 8 * level.entry_size
    addresses = whole & masks.address
    # 0 in a lane: the next entry is this one, one page on.  Nothing is added outside the address bits, which end below the top of the lane.
    # The last lane has no next entry: whatever follows it differs.
    differing = ((addresses + masks.size) ^ (addresses >> width) | (whole ^ whole >> width) & masks.others) & masks.body | masks.body + 1
    offsets: Sequence[int] = range(0, count * size, size)
    lengths: Sequence[int] = [size] * count
    columns: List[Sequence[int]] = [_column(shape, whole & masks.target),
                                    _column(shape, (whole ^ masks.inverted | masks.grants) & masks.rights),
                                    _column(shape, whole & masks.attributes)]
    # As many zero bytes in a row as a lane has are rare where no lane is 0.
    if holes is not None or bytes(level.entry_size) in differing.to_bytes(shape.size, "little"):
        starts = [1, *_numbers(shape, differing)[:-1]]
        bounds = [*compress(offsets, starts), count * size]
        offsets, lengths = bounds[:-1], list(map(sub, bounds[1:], bounds))
        columns = _only(columns, starts)
        if holes is not None:
            present_starts = list(compress(holes, starts))
            (offsets, lengths), columns = _only([offsets, lengths], present_starts), _only(columns, present_starts)
    targets, rights, attributes = columns
    return Pages(shape, whole, offsets, lengths, targets, rights, attributes, sum(lengths) // size)


def _only(columns: Sequence[Sequence[int]], wanted: Sequence[int]) -> List[Sequence[int]]:
    return [list(compress(column, wanted)) for column in columns]


def _column(shape: Shape, whole: int) -> Sequence[int]:
    """The lanes one by one; most columns hold the same number in all of them."""
    first = whole & shape.lane
    return [first] * shape.level.entries if whole == first * shape.ones else _numbers(shape, whole)


# ---- entries of several kinds ----------------------------------------------------------------------------------------------------------

def _irregular(shape: Shape, present: int, entries: Sequence[int], judge: Judge) -> List[Run]:
    runs: List[Run] = []
    append, known, ruled = runs.append, judge.known, shape.ruled
    step = shape.level.page_size if shape.linear else 1 << 65
    expected, open_at, opened = -1, -1, 0
    for index, entry in enumerate(entries):
        if entry == expected:
            expected += step
            continue
        if open_at >= 0:
            if index - open_at == 1:
                append((open_at, 1, opened, LEAF))
            else:
                _close(shape, runs, open_at, index - open_at, opened, judge)
            open_at = expected = -1
        if not entry & present:
            continue
        what = known.get(entry & ruled)
        if what is None:
            what = judge.of(entry)
        if what == LEAF:
            open_at, opened, expected = index, entry, entry + step
        elif what >= BROKEN and runs and runs[-1][3] == what and runs[-1][0] + runs[-1][1] == index:
            # Neighbours that break the same rules are one problem, whatever else they hold.
            runs[-1] = runs[-1][0], runs[-1][1] + 1, runs[-1][2], what
        else:
            append((index, 1, entry, what))
    if open_at >= 0:
        _close(shape, runs, open_at, len(entries) - open_at, opened, judge)
    return runs


def _close(shape: Shape, runs: List[Run], at: int, count: int, entry: int, judge: Judge) -> None:
    """Append a run of leaves; one that leaves the legal addresses on the way is taken apart there."""
    if count == 1 or _uniform(shape, entry, count, judge):
        runs.append((at, count, entry, LEAF))
        return
    for step in range(count):
        here = entry + step * shape.level.page_size
        what = judge.of(here)
        goes_on = runs and runs[-1][3] == what and runs[-1][0] + runs[-1][1] == at + step
        if goes_on and (what >= BROKEN or step and not (runs[-1][2] ^ here) & ~shape.address):
            runs[-1] = runs[-1][0], runs[-1][1] + 1, runs[-1][2], what
        else:
            runs.append((at + step, 1, here, what))
