"""What is wrong with nested tables, or will be: entry by entry, and against what else is known of the machine.

Every check says only what its inputs bear out; without them it is undecided, and names what is missing.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import islice
from typing import Callable, Dict, FrozenSet, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from vtdbg import bits
from vtdbg.enumeration import Enumeration, Range
from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.nested.filter import has_flag, outside
from vtdbg.nested.meant import told_apart
from vtdbg.numbers import size_text
from vtdbg.vmx.ept import Ept
from vtdbg.walk import Structure
from vtdbg.x86.mtrr import Mtrrs

FAIL, NOTE, UNDECIDED, PASS = "fail", "note", "undecided", "pass"
KEPT = 1 << 18
"""Ranges that are kept.  Where there are more, the checks that need all of them have the tables enumerated again."""
ALIASED = 1 << 20
"""Ranges whose frames are compared with one another: they have to be sorted."""
REMARKS = 100
"""Remarks of one check that are kept; `Remark.more` of the last one counts the rest."""
COUNTED = 1 << 13
"""Remarks of one check that are counted: each costs a walk or a search, and hostile tables have one for every page."""


class Check(NamedTuple):
    """`title` is what is looked for, `why` what it does to the guest or the host."""

    title: str
    why: str
    see: str


CHECKS: Mapping[str, Check] = {
    "pointer": Check("the pointer to the tables", "VM entry or VMRUN fails",
                     "SDM vol. 3, Checks on VMX Controls; APM vol. 2, Canonicalization and Consistency Checks"),
    "entries": Check("entries that break a rule", "the first access there exits with a misconfiguration (EPT) or a nested page fault (NPT)",
                     "SDM vol. 3, EPT Misconfigurations; APM vol. 2, Nested Paging"),
    "loop": Check("tables that contain themselves", "guest accesses reach the tables through addresses that nobody meant to map",
                  "SDM vol. 3, EPT Translation Mechanism"),
    "lost-rights": Check("rights that a parent takes away", "the leaf grants them and the guest does not get them: all levels have to agree",
                         "SDM vol. 3, EPT Translation Mechanism; APM vol. 2, Nested Paging"),
    "frames": Check("frames that the memory does not have", "the guest's accesses go to a device or to nothing; mapped write-back, neither works",
                    "SDM vol. 3, EPT and Memory Typing; APM vol. 2, Nested Paging"),
    "ram": Check("RAM that is not mapped", "the first access to it exits; a hypervisor that expects none there hangs or crashes its guest",
                 "SDM vol. 3, EPT Violations"),
    "mtrr": Check("memory types against the MTRRs",
                  "with EPT the MTRRs do not count for guest accesses: the entry's type does, and cached device registers break the device",
                  "SDM vol. 3, Memory Type Used for Translated Guest-Physical Addresses"),
    "uncached": Check("everything uncacheable", "every access of the guest goes to memory: it runs far slower than it should",
                      "SDM vol. 3, EPT and Memory Typing"),
    "alias": Check("frames that several addresses reach",
                   "what is written at one address changes the other; different memory types for one frame are undefined behaviour",
                   "SDM vol. 3, Programming the PAT"),
    "tables": Check("nested tables that the guest can reach", "a guest that writes there maps itself all of the host's memory",
                    "SDM vol. 3, EPT Translation Mechanism"),
    "control-pages": Check("control structures that the guest can reach", "a guest that writes there changes its own intercepts or its VMCS",
                           "SDM vol. 3, Software Use of the VMCS and Related Structures; APM vol. 2, VMRUN Instruction"),
    "flags": Check("accessed and dirty flags", "whoever tracks writes by them misses some", "SDM vol. 3, Accessed and Dirty Flags for EPT"),
    "suppress-ve": Check("suppress-#VE bits", "an EPT violation there becomes a #VE in the guest, or does not, against what the bit seems to say",
                         "SDM vol. 3, Convertible EPT Violations"),
}
"""What is checked, in the order of the report."""

EPT_ONLY = ("mtrr", "uncached", "flags", "suppress-ve")
"""Nested tables of AMD ask for a PAT entry, and the host's MTRRs count with it: there is no type of their own to compare."""


@dataclass(frozen=True)
class Remark:
    """What a check found.  `verdict` is "fail", "note" (odd, and often meant so), "undecided" or "pass".

    `start` and `length` are guest-physical, None where it is about no address; `path` the addresses of the entries that lead there; `missing`
    the inputs without which the check is undecided; `more` how many further ones of the kind were left out, or, with `at_least`, how many
    were counted before the check was given up.
    """

    id: str
    verdict: str
    message: str
    start: Optional[int] = None
    length: int = 0
    path: Tuple[int, ...] = ()
    missing: Tuple[str, ...] = ()
    more: int = 0
    at_least: bool = False

    @property
    def check(self) -> Check:
        return CHECKS[self.id]


class ControlPage(NamedTuple):
    """Host-physical bytes that no guest should reach: a VMCS, a permission bitmap, ..."""

    address: int
    size: int
    what: str


@dataclass(frozen=True)
class Inputs:
    """What the checks are made against; None is unknown.

    `ram` are guest-physical (start, end) and `ram_source` says whose they are; `host_ram` are the dump's own, which count where the tables map
    memory to itself.  `control_pages` () means that a scan found none.  `ve`: is "EPT-violation #VE" on in the VMCS?
    """

    ram: Optional[Sequence[Tuple[int, int]]] = None
    ram_source: str = ""
    host_ram: Optional[Sequence[Tuple[int, int]]] = None
    mtrrs: Optional[Mtrrs] = None
    control_pages: Optional[Sequence[ControlPage]] = None
    ve: Optional[bool] = None


@dataclass(frozen=True)
class Seen:
    """Tables that were enumerated once, for all checks.  `kept` are the first KEPT of `count` ranges from `first` to `last`; nothing from
    `reached` on was seen, and `why` says for what reason ("" where `watch` ended it); `whole`: all of it was."""

    memory: PhysicalMemory
    structure: Structure
    kept: Tuple[Range, ...]
    count: int
    found: Enumeration
    whole: bool
    first: int
    last: int
    reached: int
    why: str
    apart: FrozenSet[str]

    @property
    def rows(self) -> Iterable[Range]:
        """All ranges, in address order."""
        if self.count == len(self.kept):
            return self.kept
        return islice(Enumeration(self.memory, self.structure, self.first, self.last, apart=self.apart), self.count)

    @property
    def missing(self) -> Tuple[str, ...]:
        """What was not seen, as a missing input."""
        return (f"the tables from {self.reached:#x} on: --gpa {self.reached:#x}-{min(self.last, self.top):#x}",)

    @property
    def top(self) -> int:
        """The last address that the tables translate."""
        return (1 << self.structure.tables.address_bits) - 1

    @property
    def part(self) -> bool:
        """Somebody asked for less than the whole address space."""
        return self.first > 0 or self.last < self.top


def look(memory: PhysicalMemory, structure: Structure, first: int = 0, last: int = (1 << 64) - 1,
         watch: Callable[[Iterable[Range]], Iterable[Range]] = iter) -> Seen:
    """Enumerates the tables from guest-physical `first` to `last` (inclusive) for the checks.  `watch` is passed the ranges on the way, and may
    end it."""
    apart = frozenset(("A", "D") if isinstance(structure, Ept) else ())
    found = Enumeration(memory, structure, first, last, apart=apart)
    kept: List[Range] = []
    count, reached = 0, first
    for row in watch(found):
        if count < KEPT:
            kept.append(row)
        count, reached = count + 1, row[0] + row[2]
    limit = next((problem for problem in found.problems if problem.kind == "limit"), None)
    if limit is not None and count > len(kept):
        # Tables that were given up are not all compared anyway: what is kept has to do, and where it ends is said.
        return Seen(memory, structure, tuple(kept), len(kept), found, whole=False, first=first, last=last, reached=kept[-1].end, why=limit.text,
                    apart=apart)
    return Seen(memory, structure, tuple(kept), count, found, found.complete, first, last, limit.start if limit else reached,
                limit.text if limit else "", apart)


def lint(memory: PhysicalMemory, structure: Structure, inputs: Inputs = Inputs(), first: int = 0, last: int = (1 << 64) - 1) -> List[Remark]:
    """Every check on the tables, in the order of CHECKS; never raises for what they hold."""
    if structure.root_problem:
        return [Remark("pointer", FAIL, structure.root_problem)]
    return [remark for remarks in checks(look(memory, structure, first, last), inputs) for remark in remarks]


def checks(seen: Seen, inputs: Inputs) -> Iterator[List[Remark]]:
    """The remarks of one check after the other; the pointer is known to be valid."""
    yield [Remark("pointer", PASS, "")]
    for name in made_checks(seen.structure):
        made = list(_capped(name, _MAKERS[name](seen, inputs)))
        if not seen.whole and not made:
            made = [Remark(name, UNDECIDED, "not all of the tables were seen", missing=seen.missing)]
        yield made or [Remark(name, PASS, "")]


def made_checks(structure: Structure) -> List[str]:
    """Names of the checks that `checks` makes behind the one on the pointer."""
    return [name for name in _MAKERS if name not in EPT_ONLY or isinstance(structure, Ept)]


def _capped(name: str, remarks: Iterable[Remark]) -> Iterator[Remark]:
    held: Optional[Remark] = None
    count = 0
    for count, remark in enumerate(islice(remarks, COUNTED), 1):
        if count <= REMARKS:
            if held is not None:
                yield held
            held = remark
    if held is not None:
        yield replace(held, more=max(count - REMARKS, 0), at_least=count == COUNTED)


# ---- the tables by themselves -------------------------------------------------------------------------------------------------------

def _entries(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    for told in told_apart(seen.memory, seen.structure, seen.found.problems):
        problem = told.problem
        if problem.kind == "misconfiguration":
            yield Remark("entries", NOTE if told.meant else FAIL, told.text, problem.start, problem.length, problem.path)
        elif problem.kind == "unreadable":
            yield Remark("entries", UNDECIDED, problem.text, problem.start, problem.length, problem.path, ("the tables' memory",))
        elif problem.kind == "limit":
            yield Remark("entries", UNDECIDED, problem.text, problem.start, problem.length, problem.path, seen.missing)


def _loops(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    for problem in seen.found.problems:
        if problem.kind == "loop":
            yield Remark("loop", FAIL, problem.text, problem.start, problem.length, problem.path)


_LEAVES = 1 << 17
"""Leaves, and tables on the way to them, that are looked at below entries that take rights away."""
_LEAVES_EACH = 1 << 19
"""As `vtdbg.enumeration.WORK_LIMIT`, for one such entry: what is below it may be tables without a page."""


def _lost(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    """Leaves under an entry that takes something away, which grant it themselves; neighbours with the same loss are one remark."""
    tables, budget, after = seen.structure.tables, _LEAVES, 0
    for entry in seen.found.withheld:
        if entry.start < after:
            continue
        start, length, lost = 0, 0, 0
        below = Enumeration(seen.memory, seen.structure, entry.start, entry.start + entry.length - 1, limit=_LEAVES_EACH)
        for leaf in islice(below.leaves(), budget):
            budget -= 1
            own = (leaf.entry ^ tables.inverted | leaf.kind.grants) & tables.rights_mask & ~leaf.rights
            if own != lost or leaf.start != start + length:
                if lost:
                    yield _loss(seen, start, length, lost)
                start, length, lost = leaf.start, 0, own
            length += leaf.page_size
        if lost:
            yield _loss(seen, start, length, lost)
        after, budget = entry.start + entry.length, budget - below.tables_read if below.complete else 0
        if budget <= 0:
            words = f"not all leaves from {entry.start:#x} on were compared: there are too many"
            yield Remark("lost-rights", UNDECIDED, words, entry.start, missing=("the rest of the tables",))
            return


def _loss(seen: Seen, start: int, length: int, lost: int) -> Remark:
    tables = seen.structure.tables
    walk = seen.structure.walk(seen.memory, start)
    takers = [f"level {step.level} {step.name} at {step.address:#x}" for step in walk.steps[:-1]
              if step.entry is not None and step.address is not None and ~(step.entry ^ tables.inverted) & lost]
    names = ", ".join(name for _, mask, name in tables.rights if mask & lost)
    words = f"{size_text(length)} grant {names} in their leaves and lose it in {' and '.join(takers) or 'an entry above'}"
    return Remark("lost-rights", FAIL, words, start, length, tuple(step.address for step in walk.steps if step.address is not None))


def _uncached(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    ept = seen.structure
    total, cached = 0, False
    for row in seen.rows:
        total += row.length if row.rights else 0
        cached = bool(row.rights) and row.memory_type != "UC"
        if cached:
            break
    if total >= 1 << 20 and not cached and seen.whole:
        yield Remark("uncached", FAIL, f"all {size_text(total)} are mapped with memory type UC")
    if isinstance(ept, Ept) and bits.table("eptp").get(ept.eptp, "MEMORY_TYPE") == 0:
        yield Remark("uncached", NOTE, f"EPTP {ept.eptp:#x} asks for UC accesses to the tables (bits 2:0 are 0): every walk goes to memory")


def _flags(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    ept = seen.structure
    if not isinstance(ept, Ept):
        return
    if ept.access_flags:
        for row in seen.rows:
            if has_flag(row, "D") and not has_flag(row, "A"):
                yield Remark("flags", NOTE, "dirty and not accessed: a processor sets both, so software wrote this entry", row.start, row.length)
        return
    used = replace(ept, eptp=ept.eptp | bits.table("eptp")["AD"].mask)
    count = length = 0
    first: Optional[int] = None
    for row in islice(Enumeration(seen.memory, used, seen.first, seen.last, apart=frozenset(("A", "D"))), None if seen.whole else seen.count):
        if has_flag(row, "A") or has_flag(row, "D"):
            count, length, first = count + 1, length + row.length, row.start if first is None else first
    if count:
        words = f"EPTP[6] is 0, and {size_text(length)} have bit 8 or 9 set: the processor ignores them here and never sets them"
        yield Remark("flags", NOTE, words, first, length)


_TABLES = 1 << 14
"""Tables whose entries that are not present are looked at."""


def _suppress(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    """Bit 63 counts in entries that map a page and in those that are not present (SDM vol. 3, Convertible EPT Violations)."""
    suppressed = total = 0
    firsts: Dict[bool, Range] = {}
    for row in seen.rows:
        if row.rights:
            state = has_flag(row, "SVE")
            firsts.setdefault(state, row)
            total, suppressed = total + row.length, suppressed + row.length * state
    if inputs.ve is None:
        yield Remark("suppress-ve", UNDECIDED, f"{size_text(suppressed)} of {size_text(total)} have bit 63 (suppress #VE) set",
                     missing=('the secondary control "EPT-violation #VE"',))
    elif inputs.ve and suppressed == total and total:
        yield Remark("suppress-ve", NOTE, "EPT-violation #VE is on, and every mapped page suppresses it: no violation of these becomes a #VE")
    elif inputs.ve and total > suppressed:
        first = firsts[False]
        words = f"EPT-violation #VE is on: violations on {size_text(total - suppressed)} (bit 63 is 0) are delivered to the guest"
        yield Remark("suppress-ve", NOTE, words, first.start, first.length)
    elif not inputs.ve and suppressed:
        first = firsts[True]
        words = f"bit 63 (suppress #VE) is 1 in {size_text(suppressed)} and has no effect: EPT-violation #VE is off"
        yield Remark("suppress-ve", NOTE, words, first.start, first.length)
    if inputs.ve:
        count, spans = _absent(seen)
        if count:
            words = f"EPT-violation #VE is on: accesses to what is not mapped are delivered to the guest by {count} entries " \
                    f"that are not present and have bit 63 at 0 (they span {size_text(spans)})"
            yield Remark("suppress-ve", NOTE, words)


def _absent(seen: Seen) -> Tuple[int, int]:
    """(entries that are not present and do not suppress #VE, bytes that they span, each table once)."""
    tables = seen.structure.tables
    sizes = {level.number: level.page_size for level in tables.levels}
    count = spans = 0
    for at, level in islice(seen.found.table_levels.items(), _TABLES):
        try:
            entries = array("Q", seen.memory.read(at, PAGE_SIZE))
        except MemoryUnavailable:
            continue
        if sys.byteorder == "big":
            entries.byteswap()
        absent = sum(1 for entry in entries if not entry & tables.present and not entry >> 63)
        count, spans = count + absent, spans + absent * sizes[level]
    return count, spans


# ---- against the machine ------------------------------------------------------------------------------------------------------------

def identity(rows: Iterable[Range]) -> Tuple[int, int]:
    """(bytes that are mapped to themselves, bytes that are mapped): a hypervisor under a running system maps it all to itself."""
    same = total = 0
    for row in rows:
        same, total = same + row.length * (row.start == row.target), total + row.length
    return same, total


def _frames(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    """One remark a memory type: a dump that was cut to size lacks most of what is mapped, and a device is not in any."""
    if inputs.host_ram is None:
        yield Remark("frames", UNDECIDED, "which physical memory exists is not known", missing=("the ranges of the memory",))
        return
    found: Dict[str, Tuple[int, int, Range]] = {}
    for row in seen.rows:
        for part in outside(row, inputs.host_ram) if row.rights else ():
            count, total, first = found.get(row.memory_type, (0, 0, part))
            found[row.memory_type] = count + 1, total + part.length, first
    for memory_type, (count, total, first) in found.items():
        places = f"in {count} places, the first one" if count > 1 else "all"
        words = f"{size_text(total)} mapped {memory_type} go to addresses that are not in this memory, {places} to HPA {first.target:#x}"
        yield Remark("frames", NOTE, words, first.start, first.length)


def _ram(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    ram, source = inputs.ram, inputs.ram_source
    if ram is None:
        same, total = identity(seen.rows)
        if inputs.host_ram is None or 2 * same <= total:
            reason = "which addresses are RAM for this guest is not known"
            if inputs.host_ram is not None and total:
                reason += " (the dump's own ranges are the host's, and these tables do not map memory to itself)"
            yield Remark("ram", UNDECIDED, reason, missing=("the guest's memory map: --ram A-B, or --e820 FILE",))
            return
        ram, source = inputs.host_ram, "the dump's own ranges; most of what is mapped is mapped to itself"
    if not seen.whole:
        yield Remark("ram", UNDECIDED, "not all of the tables were seen", missing=seen.missing)
        return
    asked = [(max(start, seen.first), min(end, seen.last + 1)) for start, end in ram if start <= seen.last and end > seen.first]
    for start, end in gaps(asked, ((row.start, row.end) for row in seen.rows if seen.structure.reaches(row.rights))):
        yield Remark("ram", FAIL, f"{size_text(end - start)} of RAM up to {end - 1:#x} are not mapped ({source})", start, end - start)


def gaps(wanted: Sequence[Tuple[int, int]], there: Iterable[Tuple[int, int]]) -> Iterator[Tuple[int, int]]:
    """The parts of `wanted` that `there` leaves out; both are sorted (start, end), `there` without overlaps, and taken one by one."""
    spans, reached = iter(there), 0
    current = next(spans, None)
    for start, end in wanted:
        at = max(start, reached)
        reached = max(reached, end)
        while at < end:
            while current is not None and current[1] <= at:
                current = next(spans, None)
            if current is None or current[0] >= end:
                yield at, end
                break
            if current[0] > at:
                yield at, current[0]
            at = max(at, current[1])


def _mtrr(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    if inputs.mtrrs is None:
        yield Remark("mtrr", UNDECIDED, "the MTRRs are not known", missing=("the values of the MTRRs: --mtrr FILE",))
        return
    held: Optional[Tuple[int, int, str, str]] = None
    unknown: Dict[str, int] = {}
    for row in seen.rows:
        if not row.rights:
            continue
        for part in inputs.mtrrs.types(row.target, row.target + row.length):
            if part.memory_type is None:
                unknown[part.why] = unknown.get(part.why, 0) + part.end - part.start
                continue
            if part.memory_type == row.memory_type:
                continue
            start, length = row.start + part.start - row.target, part.end - part.start
            if held is not None and (held[0] + held[1], held[2:]) == (start, (row.memory_type, part.memory_type)):
                held = held[0], held[1] + length, *held[2:]
                continue
            if held is not None:
                yield _mismatch(*held)
            held = start, length, row.memory_type, part.memory_type
    if held is not None:
        yield _mismatch(*held)
    for why, length in unknown.items():
        yield Remark("mtrr", UNDECIDED, f"the MTRRs' type of {size_text(length)} is not known: {why}", missing=(why,))
    if inputs.mtrrs.unknown:
        yield Remark("mtrr", UNDECIDED, f"not all MTRRs are given: {'; '.join(inputs.mtrrs.unknown)}", missing=inputs.mtrrs.unknown)


def _mismatch(start: int, length: int, mapped: str, mtrr: str) -> Remark:
    cached = mapped in ("WB", "WT", "WP")
    what = "a device's registers would be cached" if cached and mtrr == "UC" else "RAM would not be cached" if mtrr == "WB" and mapped == "UC" else ""
    words = f"{size_text(length)} are mapped {mapped} where the MTRRs say {mtrr}" + (f": {what}" if what else "")
    return Remark("mtrr", FAIL if what else NOTE, words, start, length)


def _aliases(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    """Each range against the one before it, by frame, that reaches furthest."""
    furthest: Optional[Range] = None
    rows = list(islice((row for row in seen.rows if row.rights), ALIASED + 1))
    if len(rows) > ALIASED:
        at = rows.pop().start
        words = f"frames were compared with one another up to {at - 1:#x} only, in the first {ALIASED} ranges"
        yield Remark("alias", UNDECIDED, words, missing=(f"a comparison of less: --gpa {at:#x}-{min(seen.last, seen.top):#x} compares the others",))
    rows.sort(key=lambda row: (row.target, row.start))
    for row in rows:
        if furthest is not None and row.target < furthest.target + furthest.length:
            length = min(row.target + row.length, furthest.target + furthest.length) - row.target
            other = furthest.start + row.target - furthest.target
            words = f"HPA {row.target:#x} ({size_text(length)}) is reached at {other:#x} ({furthest.permissions} {furthest.memory_type}) and at " \
                    f"{row.start:#x} ({row.permissions} {row.memory_type})"
            # Which types two PAT entries are is the host's IA32_PAT: that they differ proves nothing.
            worse = isinstance(seen.structure, Ept) and row.memory_type != furthest.memory_type
            yield Remark("alias", FAIL if worse else NOTE, words, row.start, length)
        if furthest is None or row.target + row.length > furthest.target + furthest.length:
            furthest = row


def _tables(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    pages = [ControlPage(at, PAGE_SIZE, f"the table of level {level} at {at:#x}") for at, level in sorted(seen.found.table_levels.items())]
    yield from _reached("tables", seen.rows, pages)


def _control_pages(seen: Seen, inputs: Inputs) -> Iterator[Remark]:
    if inputs.control_pages is None:
        yield Remark("control-pages", UNDECIDED, "where the control structures are is not known", missing=("a scan of the memory",))
        return
    yield from _reached("control-pages", seen.rows, sorted(inputs.control_pages))


def _reached(name: str, rows: Iterable[Range], pages: Sequence[ControlPage]) -> Iterator[Remark]:
    """Pages (sorted by address) that some range reaches."""
    starts = [page.address for page in pages]
    widest = max((page.size for page in pages), default=0)
    for row in rows:
        if not row.rights:
            continue
        for page in pages[bisect_left(starts, row.target - widest + 1):bisect_left(starts, row.target + row.length)]:
            if page.address + page.size <= row.target:
                continue
            at = max(page.address, row.target)
            can = "write" if row.permissions.write else "read" if row.permissions.read else "run"
            yield Remark(name, FAIL if row.permissions.write else NOTE, f"{page.what} can be reached: the guest can {can} it ({row.permissions})",
                         row.start + at - row.target, min(page.address + page.size, row.target + row.length) - at)


_MAKERS: Mapping[str, Callable[[Seen, Inputs], Iterator[Remark]]] = {
    "entries": _entries, "loop": _loops, "lost-rights": _lost, "frames": _frames, "ram": _ram, "mtrr": _mtrr, "uncached": _uncached,
    "alias": _aliases, "tables": _tables, "control-pages": _control_pages, "flags": _flags, "suppress-ve": _suppress,
}
