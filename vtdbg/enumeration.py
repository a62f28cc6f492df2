"""All of a paging structure at once: merged ranges, or every leaf, and what is wrong with it.

Works from the same compiled level tables (`vtdbg.level_tables`) as a walk: what an entry is, what it grants and which rules it breaks is said there
once.  Each table is read once and compared as a whole (`vtdbg.table_runs`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, repeat
from typing import Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.level_tables import EntryKind, Level, Permissions, Rule, Tables, memory_type_of
from vtdbg.memory.base import PhysicalMemory
from vtdbg.table_runs import BROKEN, LEAF, TABLE, Content, Judge, Pages, Run, Shape, contents, shapes_of
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


class _Frame(NamedTuple):
    """A table on the way: what is left of it, where its addresses begin, what its path grants, and (`whole`) whether all of it is wanted."""

    depth: int
    table: int
    runs: Iterator[Run]
    pages: Optional[Pages]
    base: int
    rights: int
    entry_address: Optional[int]
    whole: bool
    rows_before: int


class _Rows:
    """The ranges of a table of nothing but pages, each made when it is asked for: most are looked at once, and the garbage collector has none
    of them to look after."""

    def __init__(self, pages: Pages, base: int, page_size: int, granted: int, kind: EntryKind, tables: Tables) -> None:
        offsets = pages.offsets
        self._starts: Sequence[int] = (range(base + offsets.start, base + offsets.stop, offsets.step) if isinstance(offsets, range)
                                       else [base + offset for offset in offsets])
        self._rights = pages.rights if granted == tables.rights_mask else [granted & own for own in pages.rights]
        self._pages, self._same = pages, (page_size, kind, tables)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, at: int) -> Range:
        pages, (page_size, kind, tables) = self._pages, self._same
        return Range(self._starts[at], pages.targets[at], pages.lengths[at], page_size, self._rights[at], pages.attributes[at], kind, tables)

    def __iter__(self) -> Iterator[Range]:
        return self.between(0, len(self))

    def between(self, first: int, end: int) -> Iterator[Range]:
        pages, (page_size, kind, tables) = self._pages, self._same
        columns = (self._starts, pages.targets, pages.lengths, self._rights, pages.attributes)
        starts, targets, lengths, rights, attributes = [column[first:end] for column in columns] if end - first < len(self) else columns
        # What Range(...) does for one row, without a call of Python for each.
        return map(tuple.__new__, repeat(Range), zip(starts, targets, lengths, repeat(page_size), rights, attributes, repeat(kind), repeat(tables)))


_Batch = Tuple[Union[List[Range], _Rows], Optional[int], bool]
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
        self._seen: "OrderedDict[Tuple[int, int], Content]" = OrderedDict()
        self._kept = 0
        self._judges: List[Judge] = []
        self._barren: Set[Tuple[int, int]] = set()
        self._reported: Set[Tuple[int, int, int]] = set()
        self._loops: Set[int] = set()
        self._repeated = 0

    def __iter__(self) -> Iterator[Range]:
        return chain.from_iterable(self._merged())

    def _merged(self) -> Iterator[Iterable[Range]]:
        """The rows in portions: a table of pages that cannot be merged is handed on without a step of Python for each."""
        held: Optional[Range] = None
        for batch, _, apart in self._batches(shapes_of(self._tables, self._apart, exact=False)):
            ready: List[Range] = []
            for row in (batch[0],) if apart else batch:
                # Most rows go elsewhere than where the one before them ends.
                joined = join(held, row, self._ignore_page_size) if held is not None and held[1] + held[2] == row[1] else None
                if held is not None and joined is None:
                    ready.append(held)
                held = joined or row
            if apart and len(batch) > 1 and held is not None:
                ready.append(held)
                yield ready
                yield batch.between(1, len(batch) - 1) if isinstance(batch, _Rows) else batch[1:-1]
                held = batch[-1]
            else:
                yield ready
        if held is not None:
            yield (held,)

    def leaves(self) -> Iterator[Leaf]:
        """Every page by itself, with its entry as it is in memory."""
        tables = self._tables
        levels = {level.page_size: level for level in tables.levels}
        for batch, table, _ in self._batches(shapes_of(tables, self._apart, exact=True)):
            for start, target, length, size, rights, entry, kind, _ in batch:
                level = levels[size]
                at = None if table is None else table + level.index(start) * level.entry_size
                if length == size:
                    yield Leaf(start, target, size, rights, entry, at, level.number, kind, tables)
                    continue
                places = repeat(None) if at is None else range(at, at + length // size * level.entry_size, level.entry_size)
                yield from map(Leaf, range(start, start + length, size), range(target, target + length, size), repeat(size), repeat(rights),
                               range(entry, entry + length, size), places, repeat(level.number), repeat(kind), repeat(tables))

    def _batches(self, shapes: Tuple[Shape, ...]) -> Iterator[_Batch]:
        """The traversal that everything else is made of: runs of one table after the other, in address order."""
        self._reset()
        structure, tables, first, last = self._structure, self._tables, self._first, self._last
        if structure.root_problem:
            self._problem(Problem("misconfiguration", 0, 1 << tables.address_bits, structure.root_problem))
            self.complete = True
            return
        self._judges = [Judge(shape) for shape in shapes]
        in_registers = structure.registers is not None
        stack: List[_Frame] = []
        top = self._table(shapes, stack, structure.root, None, 0)
        stack.append(_Frame(0, structure.root, iter(top), None, 0, tables.rights_mask, None, whole=False, rows_before=0))
        inverted, pages = tables.inverted, self.pages
        rows, visited, reached = 0, len(top), first
        while stack:
            frame = stack[-1]
            depth, whole, base, granted, shape = frame.depth, frame.whole, frame.base, frame.rights, shapes[frame.depth]
            shift, page_size, attributes = shape.level.shift, shape.level.page_size, shape.attributes
            leaf_kind, table_kind = shape.level.leaf, shape.level.table
            sign_bits = 0 if depth else structure.sign_bits
            table_at = None if in_registers and not depth else frame.table
            entered = False
            if frame.pages is not None and leaf_kind is not None:
                # All of it is wanted and nothing but pages is in it: no question to ask of an entry.
                rows += len(frame.pages)
                pages[page_size] = pages.get(page_size, 0) + frame.pages.pages
                in_bulk = _Rows(frame.pages, base, page_size, granted, leaf_kind, tables)
                reached = in_bulk[-1].end
                yield in_bulk, table_at, granted == tables.rights_mask
            batch: List[Range] = []
            for index, entries, entry, what in frame.runs:
                start, length = base + (index << shift), entries << shift
                if sign_bits:
                    start = sign_extended(start, sign_bits)
                if not whole and (start > last or start + length <= first):
                    continue
                if what == LEAF:
                    assert leaf_kind is not None
                    if not whole and (start < first or start + length - 1 > last):
                        skip = max(first - start, 0) >> shift << shift
                        length = min(length, ((last - start >> shift) + 1) << shift) - skip
                        start, entry = start + skip, entry + skip
                    rights = granted & (entry ^ inverted | leaf_kind.grants)
                    batch.append(Range(start, leaf_kind.address_of(entry), length, page_size, rights, entry & attributes, leaf_kind, tables))
                    rows += 1
                elif what == TABLE:
                    assert table_kind is not None
                    table = table_kind.address_of(entry)
                    if (table, depth + 1) in self._barren:
                        continue
                    at = None if table_at is None else table_at + index * shape.level.entry_size
                    self._watch_loop(stack, shape.level, (index, 1, entry, what), table, start, at)
                    found = self._table(shapes, stack, table, at, start)
                    rights = granted & (entry ^ inverted | table_kind.grants)
                    if rights != granted and len(self.withheld) < PROBLEM_LIMIT:
                        self.withheld.append(Withheld(start, length, granted & ~rights, _path(stack, at)))
                    inside = first <= start and start + length - 1 <= last
                    only_pages = found if inside and isinstance(found, Pages) else None
                    stack.append(_Frame(depth + 1, table, iter(() if only_pages else found), only_pages, start, rights, at, inside, rows))
                    visited += len(found)
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

    def _table(self, shapes: Tuple[Shape, ...], stack: List[_Frame], table: int, entry_address: Optional[int], start: int) -> Content:
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
        found = contents(shape, self._tables, data, self._judges[depth])
        self._seen[table, depth] = found
        self._kept += len(found) + 1
        while self._kept > _CACHE_ITEMS and len(self._seen) > 1:
            _, dropped = self._seen.popitem(last=False)
            self._kept -= len(dropped) + 1
        return found

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

    def _watch_loop(self, stack: List[_Frame], level: Level, run: Run, table: int, start: int, entry_address: Optional[int]) -> None:
        for item in stack:
            if item.table == table and table not in self._loops and len(self._loops) < PROBLEM_LIMIT:
                self._loops.add(table)
                entry = self._as_stored(stack[-1], level, run[0], run[2])
                text = f"level {level.number} {level.name} {entry:#x} references table {table:#x}, through which it was reached"
                self._problem(Problem("loop", start, level.page_size, text, level.number, entry, _path(stack, entry_address)))

    def _broken(self, stack: List[_Frame], level: Level, run: Run, start: int) -> None:
        """Report entries that break rules, once for a table, however many paths lead to it."""
        frame, (index, entries, entry, what) = stack[-1], run
        key = frame.table, frame.depth, index
        if key in self._reported or len(self._reported) >= 2 * PROBLEM_LIMIT:
            return
        self._reported.add(key)
        rules = self._judges[frame.depth].rules[what - BROKEN]
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
