"""All of a paging structure at once: merged ranges, or every leaf, and what is wrong with it.

Works from the same compiled level tables (`vtdbg.level_tables`) as a walk: what an entry is, what it grants and which rules it breaks is said there
once.  Each table is read once; a run of entries that step by one page is found by one comparison of the whole table as one big number, so
that a regular table of 512 pages costs about as much as one entry.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.level_tables import EntryKind, Level, Permissions, Rule, Tables, memory_type_of
from vtdbg.memory.base import PhysicalMemory
from vtdbg.walk import Structure
from vtdbg.x86.paging import sign_extended

WORK_LIMIT = 1 << 23
"""Runs of pages (and tables, times _TABLE_WORK) that are enumerated before giving up: a table that contains itself has more pages than
anybody can list."""
_TABLE_WORK = 64
REPEATED_LIMIT = 1 << 20
"""Of that, what may be spent on tables that were seen before.  Tables are shared (1 GiB of one repeated page is 262,144 runs), but where most of
the work is old tables in new places, there is nothing to learn from more of it: a second or two instead of half a minute."""
PROBLEM_LIMIT = 10_000
_CACHE_ITEMS = 1 << 15
_UNMERGED = ("A", "D")


class Range(NamedTuple):
    """Pages that lie side by side in both address spaces and mean the same.

    `start` and `target` (where the first page goes) and `length` are in bytes; `attributes` are the entries' bits besides address and rights
    (memory type, ignore PAT, global, protection key, ...; not accessed and dirty unless asked for).
    """

    start: int
    target: int
    length: int
    page_size: int
    rights: int
    attributes: int
    kind: EntryKind
    tables: Tables

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.start + self.length

    @property
    def permissions(self) -> Permissions:
        """Granted by all levels together."""
        return self.tables.letters(self.rights)

    @property
    def memory_type(self) -> str:
        return _memory_type(self.kind, self.attributes)

    @property
    def pages(self) -> int:
        return self.length // self.page_size

    @property
    def flags(self) -> Tuple[str, ...]:
        """Identifiers of the attributes that are 1, without the memory type."""
        return _flags(self.kind, self.attributes)


# Of millions of ranges few differ in these.

@lru_cache(maxsize=1024)
def _memory_type(kind: EntryKind, attributes: int) -> str:
    return memory_type_of(kind.bits, attributes)


@lru_cache(maxsize=1024)
def _flags(kind: EntryKind, attributes: int) -> Tuple[str, ...]:
    return tuple(row.ident for row in kind.bits.fields
                 if row.kind in ("flag", "number") and row.mask & attributes and row.ident not in ("PWT", "PCD", "PAT"))


class Leaf(NamedTuple):
    """One page: where it goes, and the entry that says so.  `entry_address` is None for an entry in a register."""

    start: int
    target: int
    page_size: int
    rights: int
    entry: int
    entry_address: Optional[int]
    level: int
    kind: EntryKind
    tables: Tables

    @property
    def permissions(self) -> Permissions:
        return self.tables.letters(self.rights)


class Withheld(NamedTuple):
    """An entry that references a table and takes away `rights` that the entries above it grant; `start` and `length` are what it spans."""

    start: int
    length: int
    rights: int
    path: Tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Something that a walk would stumble over: `kind` is "misconfiguration" (entries that break rules), "unreadable" (a table that the memory
    does not have), "loop" (a table that is reached through itself; the processor walks it) or "limit" (given up).

    `start` and `length` are the addresses concerned, `path` the addresses of the entries that lead there, the last one included; `entries` is
    how many neighbouring entries are alike.  A table that is reached by several paths is reported for the first.
    """

    kind: str
    start: int
    length: int
    text: str
    level: int = 0
    entry: Optional[int] = None
    path: Tuple[int, ...] = ()
    entries: int = 1
    rules: Tuple[Rule, ...] = ()


_Run = Tuple[int, int, int, int]
"""(index, how many entries, the first one, what they are).  Leaves step by one page; broken entries break the same rules; a table is alone.

Plain tuples of numbers, because the garbage collector does not look into those: a large structure has a million of them.
"""
_LEAF, _TABLE, _BROKEN = range(3)
"""What entries are; _BROKEN and above: which set of rules they break (`_Judge.rules`)."""


class _Shape(NamedTuple):
    """Constants of one level for whole-table comparison: the lanes of a table as one number."""

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


@lru_cache(maxsize=128)
def _shapes(tables: Tables, apart: FrozenSet[str], exact: bool) -> Tuple[_Shape, ...]:
    return tuple(_shape(tables, level, apart, exact) for level in tables.levels)


def _shape(tables: Tables, level: Level, apart: FrozenSet[str], exact: bool) -> _Shape:
    width = level.entry_size * 8
    lane = (1 << width) - 1
    ones = sum(1 << width * index for index in range(level.entries))
    attributes = ruled = address = 0
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
    return _Shape(level, "Q" if width == 64 else "I", level.entries * level.entry_size, lane, keep * ones, ones, steps,
                  lane if exact else attributes, ruled, fits, address)


def _attributes(tables: Tables, level: Level, kind: EntryKind, apart: FrozenSet[str]) -> int:
    """The bits of a leaf that tell ranges apart, besides address and rights."""
    mask = 0
    for row in kind.bits.fields:
        if row.kind in ("flag", "enum", "number") and row.ident != "PS" and (row.ident not in _UNMERGED or row.ident in apart):
            mask |= row.mask
    return mask & ~(tables.rights_mask | tables.present | level.large)


class _Judge:
    """What the entries of one level are.  That depends on few of their bits, and few combinations of those occur."""

    _LIMIT = 4096
    """Combinations that are kept: hostile tables do not get to keep all of theirs."""

    def __init__(self, shape: _Shape) -> None:
        self._level, self._ruled = shape.level, shape.ruled
        self.known: Dict[int, int] = {}
        self.rules: List[Tuple[Rule, ...]] = []

    def of(self, entry: int) -> int:
        """_LEAF, _TABLE, or _BROKEN plus the number of the rules that it breaks."""
        key = entry & self._ruled
        found = self.known.get(key)
        if found is None:
            kind = self._level.kind(entry)
            rules = kind.broken(entry)
            if not rules:
                found = _LEAF if kind.leaf else _TABLE
            else:
                if rules not in self.rules:
                    self.rules.append(rules)
                found = _BROKEN + self.rules.index(rules)
            if len(self.known) < self._LIMIT:
                self.known[key] = found
        return found


def _runs(shape: _Shape, tables: Tables, data: bytes, judge: _Judge) -> List[_Run]:
    """What a table holds, pages that step by one page taken together; entries that are not present are left out."""
    whole = int.from_bytes(data, "little") & shape.keep_all
    if not whole:
        return []
    first, count = whole & shape.lane, shape.level.entries
    if (shape.linear and first & tables.present and whole == first * shape.ones + shape.steps and judge.of(first) == _LEAF
            and _uniform(shape, first, count, judge)):
        return [(0, count, first, _LEAF)]
    entries = array(shape.code)
    entries.frombytes(whole.to_bytes(shape.size, "little"))
    if sys.byteorder == "big":
        entries.byteswap()
    return _irregular(shape, tables.present, entries, judge)


def _uniform(shape: _Shape, entry: int, count: int, judge: _Judge) -> bool:
    """Are `count` entries that step by one page from `entry`, a legal one, all legal, without a carry out of the address bits?

    Only the address changes on the way, and it grows: if the last entry is legal and in range, all are.
    """
    last = entry + (count - 1) * shape.level.page_size
    return not (entry ^ last) & ~shape.address and judge.of(last) == _LEAF


def _irregular(shape: _Shape, present: int, entries: "array[int]", judge: _Judge) -> List[_Run]:
    runs: List[_Run] = []
    append, known, ruled = runs.append, judge.known, shape.ruled
    step = shape.level.page_size if shape.linear else 1 << 65
    expected, open_at, opened = -1, -1, 0
    for index, entry in enumerate(entries):
        if entry == expected:
            expected += step
            continue
        if open_at >= 0:
            if index - open_at == 1:
                append((open_at, 1, opened, _LEAF))
            else:
                _close(shape, runs, open_at, index - open_at, opened, judge)
            open_at = expected = -1
        if not entry & present:
            continue
        what = known.get(entry & ruled)
        if what is None:
            what = judge.of(entry)
        if what == _LEAF:
            open_at, opened, expected = index, entry, entry + step
        elif what >= _BROKEN and runs and runs[-1][3] == what and runs[-1][0] + runs[-1][1] == index:
            # Neighbours that break the same rules are one problem, whatever else they hold.
            runs[-1] = runs[-1][0], runs[-1][1] + 1, runs[-1][2], what
        else:
            append((index, 1, entry, what))
    if open_at >= 0:
        _close(shape, runs, open_at, len(entries) - open_at, opened, judge)
    return runs


def _close(shape: _Shape, runs: List[_Run], at: int, count: int, entry: int, judge: _Judge) -> None:
    """Append a run of leaves; one that leaves the legal addresses on the way is taken apart there."""
    if count == 1 or _uniform(shape, entry, count, judge):
        runs.append((at, count, entry, _LEAF))
        return
    for step in range(count):
        here = entry + step * shape.level.page_size
        what = judge.of(here)
        goes_on = runs and runs[-1][3] == what and runs[-1][0] + runs[-1][1] == at + step
        if goes_on and (what >= _BROKEN or step and not (runs[-1][2] ^ here) & ~shape.address):
            runs[-1] = runs[-1][0], runs[-1][1] + 1, runs[-1][2], what
        else:
            runs.append((at + step, 1, here, what))


class _Frame(NamedTuple):
    """A table on the way: what is left of it, where its addresses begin, what its path grants, and (`whole`) whether all of it is wanted."""

    depth: int
    table: int
    runs: Iterator[_Run]
    base: int
    rights: int
    entry_address: Optional[int]
    whole: bool
    rows_before: int


_Batch = Tuple[List[Range], Optional[int], bool]
"""(ranges of one table, one a run; where the table lies; whether no two of them are one range)"""


class Enumeration:
    """All pages of a structure (an `Ept`, `Npt` or `Paging`) between `first` and `last` (inclusive), in address order.

    Iterating yields `Range` rows; `leaves()` yields every `Leaf`.  Each iteration starts afresh and fills `problems` (at most PROBLEM_LIMIT of
    them and the one of kind "limit", `problem_count` counts all), `withheld` (at most PROBLEM_LIMIT), `tables_read`, `table_levels` (the level
    of each table by its address) and `pages` (how many of each size).  A row need not be mapped for everybody: a page to which the entries
    together grant nothing has permissions "---".

    `apart` names bits that keep ranges apart although they are usually of no interest: {"A", "D"}.  `ignore_page_size` merges across page
    sizes (the smallest is then given).  `limit` bounds the work (runs, and tables, which count as 64), and REPEATED_LIMIT that on tables seen
    before: a table that contains itself ends with a problem of kind "limit", and `complete` stays False.  Memory stays bounded whatever the
    tables hold.

    Raises UsageError where the range is empty or paging is off.
    """

    def __init__(self, memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1, *,
                 apart: FrozenSet[str] = frozenset(), ignore_page_size: bool = False, limit: int = WORK_LIMIT) -> None:
        if first > last or first < 0:
            raise UsageError(f"the range {first:#x} to {last:#x} is empty")
        self._memory, self._structure, self._tables = memory, structure, structure.tables
        self._first, self._last, self._limit = first, last, limit
        self._apart, self._ignore_page_size = frozenset(apart), ignore_page_size
        self._reset()

    def _reset(self) -> None:
        self.problems: List[Problem] = []
        self.problem_count = 0
        self.withheld: List[Withheld] = []
        self.tables_read = 0
        self.table_levels: Dict[int, int] = {}
        self.pages: Dict[int, int] = {}
        self.complete = False
        self._seen: "OrderedDict[Tuple[int, int], List[_Run]]" = OrderedDict()
        self._kept = 0
        self._judges: List[_Judge] = []
        self._barren: Set[Tuple[int, int]] = set()
        self._reported: Set[Tuple[int, int, int]] = set()
        self._loops: Set[int] = set()
        self._repeated = 0

    def __iter__(self) -> Iterator[Range]:
        held: Optional[Range] = None
        for batch, _, apart in self._batches(_shapes(self._tables, self._apart, exact=False)):
            for row in batch[:1] if apart else batch:
                joined = join(held, row, self._ignore_page_size) if held is not None else None
                if held is not None and joined is None:
                    yield held
                held = joined or row
            if apart and len(batch) > 1 and held is not None:
                yield held
                yield from batch[1:-1]
                held = batch[-1]
        if held is not None:
            yield held

    def leaves(self) -> Iterator[Leaf]:
        """Every page by itself, with its entry as it is in memory."""
        tables = self._tables
        levels = {level.page_size: level for level in tables.levels}
        for batch, table, _ in self._batches(_shapes(tables, self._apart, exact=True)):
            for row in batch:
                level, size = levels[row.page_size], row.page_size
                for step in range(0, row.length, size):
                    start = row.start + step
                    at = None if table is None else table + level.index(start) * level.entry_size
                    yield Leaf(start, row.target + step, size, row.rights, row.attributes + step, at, level.number, row.kind, tables)

    def _batches(self, shapes: Tuple[_Shape, ...]) -> Iterator[_Batch]:
        """The traversal that everything else is made of: runs of one table after the other, in address order."""
        self._reset()
        structure, tables, first, last = self._structure, self._tables, self._first, self._last
        if structure.root_problem:
            self._problem(Problem("misconfiguration", 0, 1 << tables.address_bits, structure.root_problem))
            self.complete = True
            return
        self._judges = [_Judge(shape) for shape in shapes]
        in_registers = structure.registers is not None
        stack: List[_Frame] = []
        top = self._table(shapes, stack, structure.root, None, 0)
        stack.append(_Frame(0, structure.root, iter(top), 0, tables.rights_mask, None, whole=False, rows_before=0))
        inverted, pages, new = tables.inverted, self.pages, tuple.__new__
        rows, visited, reached = 0, len(top), first
        while stack:
            frame = stack[-1]
            depth, whole, base, granted, shape = frame.depth, frame.whole, frame.base, frame.rights, shapes[frame.depth]
            shift, page_size, attributes = shape.level.shift, shape.level.page_size, shape.attributes
            leaf_kind, table_kind = shape.level.leaf, shape.level.table
            sign_bits = 0 if depth else structure.sign_bits
            table_at = None if in_registers and not depth else frame.table
            batch: List[Range] = []
            entered = False
            if whole and leaf_kind is not None and table_kind is None and not self._judges[depth].rules and not leaf_kind.high_address:
                # All of it is wanted and nothing but pages is in it: no question to ask of an entry.
                address, grants = leaf_kind.address, leaf_kind.grants
                batch = [new(Range, (base + (index << shift), entry & address, entries << shift, page_size,
                                     granted & (entry ^ inverted | grants), entry & attributes, leaf_kind, tables))
                         for index, entries, entry, _ in frame.runs]
                rows += len(batch)
            for index, entries, entry, what in frame.runs:
                start, length = base + (index << shift), entries << shift
                if sign_bits:
                    start = sign_extended(start, sign_bits)
                if not whole and (start > last or start + length <= first):
                    continue
                if what == _LEAF:
                    assert leaf_kind is not None
                    if not whole and (start < first or start + length - 1 > last):
                        skip = max(first - start, 0) >> shift << shift
                        length = min(length, ((last - start >> shift) + 1) << shift) - skip
                        start, entry = start + skip, entry + skip
                    rights = granted & (entry ^ inverted | leaf_kind.grants)
                    batch.append(Range(start, leaf_kind.address_of(entry), length, page_size, rights, entry & attributes, leaf_kind, tables))
                    rows += 1
                elif what == _TABLE:
                    assert table_kind is not None
                    table = table_kind.address_of(entry)
                    if (table, depth + 1) in self._barren:
                        continue
                    at = None if table_at is None else table_at + index * shape.level.entry_size
                    self._watch_loop(stack, shape.level, (index, 1, entry, what), table, start, at)
                    runs = self._table(shapes, stack, table, at, start)
                    rights = granted & (entry ^ inverted | table_kind.grants)
                    if rights != granted and len(self.withheld) < PROBLEM_LIMIT:
                        self.withheld.append(Withheld(start, length, granted & ~rights, _path(stack, at)))
                    stack.append(_Frame(depth + 1, table, iter(runs), start, rights, at, first <= start and start + length - 1 <= last, rows))
                    visited += len(runs)
                    entered, reached = True, start
                    break
                else:
                    self._broken(stack, shape.level, (index, entries, entry, what), start)
            if batch:
                pages[page_size] = pages.get(page_size, 0) + (sum([row[2] for row in batch]) >> shift)
                reached = batch[-1][0] + batch[-1][2]
                # Runs that lie side by side differ in some bit; where the tables above take no right away, that bit counts.
                yield batch, table_at, granted == tables.rights_mask
            if not entered:
                stack.pop()
                if whole and rows == frame.rows_before:
                    self._barren.add((frame.table, depth))
            if visited + _TABLE_WORK * self.tables_read > self._limit or self._repeated > REPEATED_LIMIT:
                # Whoever compares or sums up has to know: this one is kept however many there are.
                self.problem_count += 1
                self.problems.append(self._given_up(reached, rows))
                return
        self.complete = True

    def _table(self, shapes: Tuple[_Shape, ...], stack: List[_Frame], table: int, entry_address: Optional[int], start: int) -> List[_Run]:
        """The runs of a table, parsed once; what cannot be read of it is reported once, and taken as not present."""
        depth = len(stack)
        known = self._seen.get((table, depth))
        if known is not None:
            self._seen.move_to_end((table, depth))
            self._repeated += len(known) + 1
            return known
        shape, registers = shapes[depth], self._structure.registers
        self.tables_read += 1
        if table in self.table_levels:
            self._repeated += _TABLE_WORK
        if depth or registers is None:
            self.table_levels.setdefault(table, shape.level.number)
        try:
            if not depth and registers is not None:
                data = b"".join(value.to_bytes(shape.level.entry_size, "little") for value in registers)
            else:
                data = self._memory.read(table, shape.size)
        except MemoryUnavailable as error:
            readable = max(error.address - table, 0) // shape.level.entry_size * shape.level.entry_size
            data = self._beginning(table, min(readable, shape.size))
            missing = len(data) // shape.level.entry_size << shape.level.shift
            what = f"from {table + len(data):#x} on " if data else ""
            self._problem(Problem("unreadable", start + missing, (shape.level.entries << shape.level.shift) - missing,
                                  f"the table at {table:#x} cannot be read {what}({error.reason})", path=_path(stack, entry_address)))
            data = data.ljust(shape.size, b"\0")
        runs = _runs(shape, self._tables, data, self._judges[depth])
        self._seen[table, depth] = runs
        self._kept += len(runs) + 1
        while self._kept > _CACHE_ITEMS and len(self._seen) > 1:
            _, dropped = self._seen.popitem(last=False)
            self._kept -= len(dropped) + 1
        return runs

    def _given_up(self, at: int, rows: int) -> Problem:
        words = f"given up at {at:#x} after {rows} runs of pages in {self.tables_read} tables"
        if self._repeated > REPEATED_LIMIT:
            return Problem("limit", at, 0, f"{words}: the same tables are reached again and again; give a smaller range")
        return Problem("limit", at, 0, f"{words}; give a smaller range, or a higher limit")

    def _beginning(self, table: int, size: int) -> bytes:
        try:
            return self._memory.read(table, size) if size else b""
        except MemoryUnavailable:
            return b""

    def _watch_loop(self, stack: List[_Frame], level: Level, run: _Run, table: int, start: int, entry_address: Optional[int]) -> None:
        for item in stack:
            if item.table == table and table not in self._loops and len(self._loops) < PROBLEM_LIMIT:
                self._loops.add(table)
                entry = self._as_stored(stack[-1], level, run[0], run[2])
                text = f"level {level.number} {level.name} {entry:#x} references table {table:#x}, through which it was reached"
                self._problem(Problem("loop", start, level.page_size, text, level.number, entry, _path(stack, entry_address)))

    def _broken(self, stack: List[_Frame], level: Level, run: _Run, start: int) -> None:
        """Report entries that break rules, once for a table, however many paths lead to it."""
        frame, (index, entries, entry, what) = stack[-1], run
        key = frame.table, frame.depth, index
        if key in self._reported or len(self._reported) >= 2 * PROBLEM_LIMIT:
            return
        self._reported.add(key)
        rules = self._judges[frame.depth].rules[what - _BROKEN]
        entry = self._as_stored(frame, level, index, entry)
        at = None if self._structure.registers is not None and not frame.depth else frame.table + index * level.entry_size
        where = f"level {level.number} {level.name}" + (f" at {at:#x}" if at is not None else "")
        more = f" and {entries - 1} more" if entries > 1 else ""
        text = f"{where}{more} (entry {entry:#x}): {'; '.join(rule.text for rule in rules)}"
        self._problem(Problem("misconfiguration", start, entries << level.shift, text, level.number, entry, _path(stack, at), entries, rules))

    def _as_stored(self, frame: _Frame, level: Level, index: int, entry: int) -> int:
        """An entry with the bits that were masked off to compare tables; read again, which happens for problems only."""
        registers = self._structure.registers
        if not frame.depth and registers is not None:
            return registers[index]
        try:
            return int.from_bytes(self._memory.read(frame.table + index * level.entry_size, level.entry_size), "little")
        except MemoryUnavailable:
            return entry

    def _problem(self, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEM_LIMIT:
            self.problems.append(problem)


def join(one: Range, two: Range, ignore_page_size: bool = False) -> Optional[Range]:
    """One range for two, if they follow each other in both address spaces and mean the same; None where they do not."""
    length = one.length
    if two.start != one.start + length or two.target != one.target + length or two.rights != one.rights:
        return None
    if one.page_size == two.page_size and one.attributes == two.attributes:
        return one._replace(length=length + two.length)
    if not ignore_page_size or one.flags != two.flags or one.memory_type != two.memory_type:
        return None
    # The attributes are compared by name: PAT is bit 7 of a PTE and bit 12 of a large page.
    small = one if one.page_size <= two.page_size else two
    return one._replace(length=length + two.length, page_size=small.page_size, attributes=small.attributes, kind=small.kind)


def _path(stack: List[_Frame], last: Optional[int]) -> Tuple[int, ...]:
    """The addresses of the entries that lead to where the traversal is, and `last`."""
    return tuple(at for at in (*(frame.entry_address for frame in stack), last) if at is not None)


def ranges(memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1, *, apart: FrozenSet[str] = frozenset(),
           ignore_page_size: bool = False, limit: int = WORK_LIMIT) -> Enumeration:
    """The pages of an `Ept`, `Npt` or `Paging` as merged ranges: iterate the result, then look at its `problems`.  See `Enumeration`."""
    return Enumeration(memory, structure, first, last, apart=apart, ignore_page_size=ignore_page_size, limit=limit)


def leaves(memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1, *, limit: int = WORK_LIMIT) -> Iterator[Leaf]:
    """Every page of an `Ept`, `Npt` or `Paging`, with its entry.  What is wrong with the tables is not reported: use `Enumeration` for that."""
    return Enumeration(memory, structure, first, last, limit=limit).leaves()
