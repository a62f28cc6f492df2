"""The one page-walk engine.  x86 paging, EPT and NPT are three sets of level tables (`TableSet`) given to it.

A table set is data: levels (which address bits index the table, which bit table lays out an entry), which bits make an entry
present, which bits grant what, and the rules that a present entry must keep.  `compile_tables` turns it into masks for one
processor (physical-address width, features); `descend` walks one address through them, `vtdbg.enumeration` all addresses.

What each processor does with the result (which fault, which qualification) is said by the modules that own the table sets:
`vtdbg.vmx.ept`, `vtdbg.svm.npt`, `vtdbg.x86.paging`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Callable, FrozenSet, Iterable, List, NamedTuple, Optional, Protocol, Tuple, Union

from vtdbg import bits
from vtdbg.bits import BitTable, BitValue
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.memory.base import PhysicalMemory

MAXPHYADDR = 52
"""No processor has more physical-address bits (SDM vol. 3, CPUID-Wide Addressing; APM vol. 2, Long-Mode Page Translation)."""

Condition = Tuple[Tuple[str, bool], ...]
"""((feature, needed state), ...): a row counts only where all of them hold."""


# ---- level tables: data -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LevelSpec:
    """One level: `shift` is the lowest address bit of its index; `table` and `leaf` name the bit tables of an entry that references
    the next table and of one that maps a page (empty: no such entry at this level).  A level with both has the PS bit to tell them apart;
    where feature `leaf_needs` is absent, the processor ignores PS there."""

    number: int
    name: str
    shift: int
    index_bits: int = 9
    table: str = ""
    leaf: str = ""
    leaf_needs: str = ""


@dataclass(frozen=True)
class Right:
    """A permission: `letter` is what is printed, `ident` the entry's bit, `inverted` for a bit that takes away (XD)."""

    letter: str
    ident: str
    name: str
    inverted: bool = False
    when: Condition = ()


@dataclass(frozen=True)
class RuleSpec:
    """What a present entry must not be: the bits `idents` together have one of `values` (bit i of a value is `idents[i]`, or the
    number of a single wider field); without `values`: any of the bits is 1.  `on` is "leaf", "table" or "any", `levels` () for all."""

    id: str
    text: str
    see: str
    idents: Tuple[str, ...]
    values: Tuple[int, ...] = ()
    on: str = "any"
    levels: Tuple[int, ...] = ()
    when: Condition = ()


@dataclass(frozen=True, eq=False)
class TableSet:
    """The level tables of one kind of translation, highest level first.  `present`: any of these bits makes an entry present.

    `optional`: bits that have their meaning only under a condition; otherwise the processor ignores them and software may use them.
    """

    id: str
    title: str
    levels: Tuple[LevelSpec, ...]
    present: Tuple[str, ...]
    rights: Tuple[Right, ...]
    rules: Tuple[RuleSpec, ...] = ()
    see: str = ""
    entry_size: int = 8
    optional: Tuple[Tuple[str, Condition], ...] = ()


# ---- compiled for one processor -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Rule:
    """A rule as masks: broken where `entry & mask == value`, or, with `value` None, where any bit of `mask` is 1."""

    id: str
    text: str
    see: str
    mask: int
    value: Optional[int] = None


@dataclass(frozen=True, eq=False)
class EntryKind:
    """An entry of one level that maps a page, or that references a table.  `grants` are rights that this entry cannot withhold.

    `bits` is the entry's bit table with the bits that are not in use on this processor made "ignored".
    """

    bits: BitTable
    leaf: bool
    address: int
    high_address: int
    high_shift: int
    grants: int
    rules: Tuple[Rule, ...]

    def address_of(self, entry: int) -> int:
        """Where the entry points: the page's or table's physical address."""
        return entry & self.address | (entry & self.high_address) << self.high_shift

    def broken(self, entry: int) -> Tuple[Rule, ...]:
        """The rules that `entry` breaks, all of them."""
        return tuple([rule for rule in self.rules if (entry & rule.mask if rule.value is None else entry & rule.mask == rule.value)])


@dataclass(frozen=True, eq=False)
class Level:
    number: int
    name: str
    shift: int
    entries: int
    entry_size: int
    large: int
    table: Optional[EntryKind]
    leaf: Optional[EntryKind]

    def index(self, address: int) -> int:
        return address >> self.shift & self.entries - 1

    def kind(self, entry: int) -> EntryKind:
        """What a present entry is here."""
        if self.leaf is not None and (self.table is None or entry & self.large):
            return self.leaf
        assert self.table is not None
        return self.table

    @property
    def page_size(self) -> int:
        return 1 << self.shift


@dataclass(frozen=True, eq=False)
class Tables:
    """A table set as masks, for one physical-address width and one set of features.  `rights` are (letter, mask, name)."""

    id: str
    title: str
    see: str
    levels: Tuple[Level, ...]
    present: int
    rights: Tuple[Tuple[str, int, str], ...]
    inverted: int
    rights_mask: int
    width: int

    @property
    def address_bits(self) -> int:
        """How many bits of an address the levels use."""
        top = self.levels[0]
        return top.shift + (top.entries - 1).bit_length()

    def letters(self, effective: int) -> "Permissions":
        """The rights in words' first letters.  A right without a bit (32-bit paging cannot forbid fetches) goes with any other right."""
        return _letters(self, effective)

    def right(self, letter: str) -> int:
        """The mask of a right; 0 where this set does not have it."""
        return next((mask for known, mask, _ in self.rights if known == letter), 0)


class Permissions(str):
    """Effective permissions as text, a "-" for each that is missing: "r-x" (EPT), "rwxu" (EPT with mode-based execute: x for supervisor-mode
    and u for user-mode linear addresses), "rwxu" (x86 paging and NPT: u is user access)."""

    __slots__ = ()

    @property
    def read(self) -> bool:
        return "r" in self

    @property
    def write(self) -> bool:
        return "w" in self

    @property
    def execute(self) -> bool:
        return "x" in self

    @property
    def user(self) -> bool:
        return "u" in self


@lru_cache(maxsize=1024)
def _letters(tables: Tables, effective: int) -> Permissions:
    return Permissions("".join(letter if effective & (mask or tables.rights_mask) else "-" for letter, mask, _ in tables.rights))


def holds(when: Condition, features: FrozenSet[str]) -> bool:
    return all((feature in features) == wanted for feature, wanted in when)


@lru_cache(maxsize=256)
def compile_tables(spec: TableSet, top: int, width: int, features: FrozenSet[str] = frozenset(), ignore: int = 0) -> Tables:
    """`spec` from level `top` down, for a processor with `width` physical-address bits and `features` (names that the rows' conditions use).

    `ignore` are address bits that are neither address nor reserved: AMD's C-bit.
    """
    levels = tuple(_level(spec, row, width, features, ignore) for row in spec.levels if row.number <= top)
    rights = tuple(row for row in spec.rights if holds(row.when, features))
    masks = {row.ident: _ident_mask(spec, row.ident) for row in rights}
    return Tables(spec.id, spec.title, spec.see, levels, _or(_ident_mask(spec, ident) for ident in spec.present if _counts(spec, ident, features)),
                  tuple((row.letter, masks[row.ident], row.name) for row in rights),
                  _or(masks[row.ident] for row in rights if row.inverted), _or(masks.values()), width)


def _or(masks: Iterable[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _counts(spec: TableSet, ident: str, features: FrozenSet[str]) -> bool:
    """A present bit that is a right counts only where the right does (XU without mode-based execute is ignored)."""
    return all(holds(row.when, features) for row in spec.rights if row.ident == ident)


def _ident_mask(spec: TableSet, ident: str) -> int:
    """The bit `ident`, which sits at the same place at every level that has it."""
    for row in reversed(spec.levels):
        for name in (row.leaf, row.table):
            if name and ident in bits.table(name).idents():
                return bits.table(name)[ident].mask
    return 0


def _level(spec: TableSet, row: LevelSpec, width: int, features: FrozenSet[str], ignore: int) -> Level:
    has_leaf = bool(row.leaf) and (not row.leaf_needs or row.leaf_needs in features)
    table = _kind(spec, row, row.table, width, features, ignore, leaf=False) if row.table else None
    leaf = _kind(spec, row, row.leaf, width, features, ignore, leaf=True) if has_leaf else None
    large = bits.table(row.leaf)["PS"].mask if leaf is not None and table is not None else 0
    return Level(row.number, row.name, row.shift, 1 << row.index_bits, spec.entry_size, large, table, leaf)


def _kind(spec: TableSet, row: LevelSpec, name: str, width: int, features: FrozenSet[str], ignore: int, *, leaf: bool) -> EntryKind:
    table = _in_use(bits.table(name), spec, features)
    idents = table.idents()
    address = table["ADDRESS"].mask
    high = table["ADDRESS_39_32"] if "ADDRESS_39_32" in idents else None
    high_mask, high_shift = (high.mask, 32 - high.low) if high else (0, 0)
    beyond = address >> width << width
    if high is not None:
        # PSE-36: a processor with fewer than 40 bits reserves the upper ones of the field (SDM vol. 3, 32-Bit Paging, table 5-4's M).
        beyond |= (high_mask << high_shift >> width << width) >> high_shift
    rules = [Rule("reserved-bits", f"bits {field.bits} are reserved here and must be 0", table.see, field.mask & ~ignore)
             for field in table.fields if field.kind == "reserved0"]
    if beyond & ~ignore:
        rules.append(Rule("address-width", f"address bits at or above the physical-address width ({width}) must be 0", table.see, beyond & ~ignore))
    for rule in spec.rules:
        if rule.on not in ("any", "leaf" if leaf else "table") or (rule.levels and row.number not in rule.levels) or not holds(rule.when, features):
            continue
        rules.extend(_rules(rule, table))
    granted = _or(_ident_mask(spec, right.ident) for right in spec.rights if right.ident not in idents)
    return EntryKind(table, leaf, address & ~ignore & ~beyond, high_mask & ~beyond, high_shift, granted, tuple(rules))


def _in_use(table: BitTable, spec: TableSet, features: FrozenSet[str]) -> BitTable:
    """`table` with the optional bits whose condition fails made "ignored": to show them by name would be wrong (KVM keeps own bits there)."""
    unused = {ident for ident, when in spec.optional if not holds(when, features)}
    if unused.isdisjoint(table.idents()):
        return table
    return replace(table, fields=tuple(replace(row, kind="ignored", name=f"ignored ({row.name}: not in use)") if row.ident in unused else row
                                       for row in table.fields))


def _rules(rule: RuleSpec, table: BitTable) -> List[Rule]:
    if not all(ident in table.idents() for ident in rule.idents):
        return []
    fields = [table[ident] for ident in rule.idents]
    mask = _or(field.mask for field in fields)
    if not rule.values:
        return [Rule(rule.id, rule.text, rule.see, mask)]
    if len(fields) == 1:
        return [Rule(rule.id, rule.text, rule.see, mask, number << fields[0].low) for number in rule.values]
    return [Rule(rule.id, rule.text, rule.see, mask, _or(field.mask for at, field in enumerate(fields) if number >> at & 1))
            for number in rule.values]


# ---- accesses -----------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Access:
    """What is attempted.  `user`: from CPL 3 (EPT with mode-based execute: to a user-mode linear address; None: unknown, taken as supervisor).
    `implicit`: by the processor itself (descriptor tables).  `ac`: EFLAGS.AC, None unknown.

    `linear` says how a guest-physical access came about: "translation" (through a linear address), "page-walk" (to a guest
    paging-structure entry on the way) or None (by no linear address at all, for instance loading PDPTEs).
    """

    read: bool = False
    write: bool = False
    fetch: bool = False
    user: Optional[bool] = None
    implicit: bool = False
    ac: Optional[bool] = None
    shadow_stack: bool = False
    linear: Optional[str] = "translation"

    def __str__(self) -> str:
        words = [name for name, on in (("read", self.read), ("write", self.write), ("fetch", self.fetch)) if on]
        if self.shadow_stack:
            words.append("shadow-stack")
        if self.user:
            words.insert(0, "user")
        return " ".join(words) or "no access"


AccessLike = Union[None, str, Access]

_WORDS = {"read": "r", "r": "r", "write": "w", "w": "w", "execute": "x", "exec": "x", "fetch": "x", "x": "x", "rw": "rw", "rx": "rx", "wx": "wx",
          "rwx": "rwx", "user": "u", "u": "u", "shadow-stack": "s", "page-walk": "p"}


def parse_access(access: AccessLike) -> Optional[Access]:
    """None, an Access, or words: "r", "rw", "execute", "user fetch", "write,user", "page-walk".  UsageError for anything else."""
    if access is None or isinstance(access, Access):
        return access
    letters = ""
    for word in access.lower().replace("+", " ").replace(",", " ").replace("|", " ").split():
        known = _WORDS.get(word) or (word if word and set(word) <= set("rwxu") else None)
        if known is None:
            raise UsageError(f"unknown access {access!r}: give r, w, x or combinations, with 'user' or 'page-walk' beside them")
        letters += known
    if not letters:
        raise UsageError("an empty access: give r, w, x, or None for no access")
    page_walk = "p" in letters
    return Access("r" in letters or page_walk and "w" not in letters, "w" in letters, "x" in letters, "u" in letters or None,
                  shadow_stack="s" in letters, linear="page-walk" if page_walk else "translation")


# ---- one walk -----------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Step:
    """One entry that a walk read.  `address` is where it lies (None: in a register, see `place`), `entry` its value (None: unreadable).

    `permissions` are those in force after this entry.  `dimension` is "guest" for an entry of x86 paging, "nested" for EPT and NPT.
    `nested` is the walk that found the entry itself, where the tables lie in guest-physical memory; `host_address` is what it gave.
    """

    level: int
    name: str
    index: int
    address: Optional[int]
    entry: Optional[int]
    table: BitTable = field(repr=False)
    present: bool
    leaf: bool
    permissions: Permissions
    dimension: str = "nested"
    place: str = ""
    broken: Tuple[Rule, ...] = ()
    nested: "Optional[Walk]" = None
    host_address: Optional[int] = None

    @property
    def decoded(self) -> List[BitValue]:
        """The entry's fields in descending bit order; [] where it is not present (its bits then mean nothing) or not readable."""
        return self.table.decode(self.entry) if self.entry is not None and self.present else []

    @property
    def software_bits(self) -> Optional[int]:
        """The bits that the processor does not look at and that are 1: of a non-present entry all, of a present one the ignored ones."""
        if self.entry is None:
            return None
        return self.entry & self.table.kind_mask("ignored") if self.present else self.entry

    def describe(self) -> str:
        """The flags in one line."""
        if self.entry is None:
            return "unreadable"
        if not self.present:
            return "not present" + (f", software bits {self.entry:#x}" if self.entry else "")
        return self.table.describe(self.entry)


class Fetched(NamedTuple):
    """A paging-structure entry as a source gives it: `entry` None with a `reason` where it cannot be had."""

    entry: Optional[int]
    reason: str = ""
    nested: "Optional[Walk]" = None
    host_address: Optional[int] = None


class EntrySource(Protocol):
    """Who reads paging-structure entries for `descend`."""

    def fetch(self, address: int, size: int) -> Fetched: ...


class MemorySource:
    """Entries straight from a PhysicalMemory."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory

    def fetch(self, address: int, size: int) -> Fetched:
        try:
            return Fetched(int.from_bytes(self._memory.read(address, size), "little"), host_address=address)
        except MemoryUnavailable as error:
            return Fetched(None, error.reason)


@dataclass(frozen=True)
class Descent:
    """What the tables say of one address, before any access is judged.

    `end`: "leaf", "not-present", "misconfigured" or "unreadable".  `rights` is the AND over the entries used, the last one included.
    """

    tables: Tables
    root: int
    address: int
    steps: Tuple[Step, ...]
    end: str
    rights: int
    maps_to: Optional[int] = None
    page_size: Optional[int] = None
    detail: str = ""

    @property
    def last(self) -> Step:
        return self.steps[-1]

    @property
    def permissions(self) -> Permissions:
        """What all entries together grant; nothing where there is no page."""
        return self.tables.letters(self.rights if self.end == "leaf" else 0)

    @property
    def hole(self) -> int:
        """How many bytes of address space the last entry stands for."""
        return next(level.page_size for level in self.tables.levels if level.number == self.last.level)

    def without(self, mask: int) -> Optional[Step]:
        """The first step whose entry withholds the right `mask`."""
        for step in self.steps:
            kind = self.kind_of(step)
            if step.entry is not None and not (step.entry ^ self.tables.inverted | kind.grants) & mask:
                return step
        return None

    def kind_of(self, step: Step) -> EntryKind:
        level = next(level for level in self.tables.levels if level.number == step.level)
        return level.kind(step.entry or 0)


def descend(source: EntrySource, tables: Tables, root: int, address: int, dimension: str = "nested",
            registers: Optional[Tuple[int, ...]] = None, register_name: str = "PDPTE") -> Descent:
    """Walk `address` from the table at `root`.  `registers` are the top level's entries where the processor keeps them in registers."""
    steps: List[Step] = []
    rights = tables.rights_mask
    base = root
    for depth, level in enumerate(tables.levels):
        index = level.index(address)
        at: Optional[int] = base + index * level.entry_size
        if registers is not None and depth == 0:
            at, fetched, place = None, Fetched(registers[index]), f"{register_name}{index}"
        else:
            assert at is not None
            fetched, place = source.fetch(at, level.entry_size), ""
        entry = fetched.entry
        if entry is None:
            kind = level.table or level.leaf
            assert kind is not None
            steps.append(Step(level.number, level.name, index, at, None, kind.bits, present=False, leaf=False, permissions=tables.letters(rights),
                              dimension=dimension, place=place, nested=fetched.nested))
            return Descent(tables, root, address, tuple(steps), "unreadable", rights, detail=fetched.reason)
        kind = level.kind(entry)
        present = bool(entry & tables.present)
        # A right that this level's entries do not have a bit for (PAE's PDPTE) cannot be withheld by it.
        rights = rights & (entry ^ tables.inverted | kind.grants) if present else 0
        broken = kind.broken(entry) if present else ()
        steps.append(Step(level.number, level.name, index, at, entry, kind.bits, present, kind.leaf and present, tables.letters(rights), dimension,
                          place, broken, fetched.nested, fetched.host_address))
        if not present:
            return Descent(tables, root, address, tuple(steps), "not-present", 0)
        if broken:
            return Descent(tables, root, address, tuple(steps), "misconfigured", rights)
        if kind.leaf:
            size = level.page_size
            return Descent(tables, root, address, tuple(steps), "leaf", rights, kind.address_of(entry) | address & size - 1, size)
        base = kind.address_of(entry)
    raise AssertionError("the lowest level has no leaf")


@dataclass(frozen=True)
class Walk:
    """Where one address goes, every entry on the way, and what the processor would do.

    `outcome`: "mapped"; "violation" (an entry is not present, or the permissions do not allow `access`); "misconfiguration" (an entry, or
    the root pointer, breaks a rule: an EPT misconfiguration, a page fault with the RSVD bit elsewhere); "unreadable" (an entry cannot be
    read: the memory at hand does not have it).  `address` is what was walked (the guest-physical or linear address), `hpa` where it goes
    in the memory that holds the tables, None unless mapped; `maps_to` is the same for a page that is there but does not allow `access`.
    `qualification` is what the processor reports for `access` (EPT: exit qualification; NPT: EXITINFO1; x86 paging: page-fault error code),
    None without `access` or without a fault.  `hole` is how many bytes around the address share the fault.  `assumptions` are what had to
    be assumed for want of input.
    """

    dimension: str
    structure: str
    root: int
    address: int
    steps: Tuple[Step, ...]
    outcome: str
    reason: str
    access: Optional[Access] = None
    maps_to: Optional[int] = None
    page_size: Optional[int] = None
    permissions: Permissions = Permissions("")
    memory_type: Optional[str] = None
    qualification: Optional[int] = None
    hole: Optional[int] = None
    rules: Tuple[Rule, ...] = ()
    notes: Tuple[str, ...] = ()
    assumptions: Tuple[str, ...] = ()

    @property
    def mapped(self) -> bool:
        return self.outcome == "mapped"

    @property
    def hpa(self) -> Optional[int]:
        return self.maps_to if self.outcome == "mapped" else None

    @property
    def gpa(self) -> int:
        return self.address

    @property
    def exitinfo1(self) -> Optional[int]:
        """NPT's name for `qualification`."""
        return self.qualification

    @property
    def level(self) -> Optional[int]:
        """The level of the last entry read; None where none was."""
        return self.steps[-1].level if self.steps else None

    @property
    def leaf(self) -> Optional[Step]:
        """The entry that maps the page; None where the walk did not get there."""
        return self.steps[-1] if self.steps and self.steps[-1].leaf and not self.steps[-1].broken else None


class Structure(Protocol):
    """A paging structure as an object (`Ept`, `Npt`, `Paging`): what enumeration, memory views and two-dimensional walks need of it."""

    @property
    def tables(self) -> Tables: ...

    @property
    def root(self) -> int: ...

    @property
    def root_problem(self) -> str:
        """Why the root pointer itself is not valid; empty where it is."""

    @property
    def registers(self) -> Optional[Tuple[int, ...]]:
        """The top level's entries where they are in registers and not in memory at `root` (PAE's PDPTEs)."""

    @property
    def sign_bits(self) -> int:
        """Width from which addresses are sign-extended to 64 bits (48 or 57 for long-mode linear addresses); 0: they are not."""


    def reaches(self, rights: int) -> bool:
        """Can any access at all use a page to which the entries together grant `rights`?"""

    def walk(self, memory: PhysicalMemory, address: int, access: AccessLike = None) -> Walk: ...


PAT_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}
"""SDM vol. 3, Page Attribute Table (PAT), table "Memory Types That Can Be Encoded With PAT"."""


def memory_type_of(table: BitTable, entry: int, pat: Optional[int] = None) -> str:
    """The memory type that a leaf entry asks for.

    EPT: "WB", "UC ignore PAT".  Elsewhere "WB" where `pat` (IA32_PAT) is known, else which of its entries decides: "PAT0" to "PAT7".
    """
    idents = table.idents()
    if "MEMORY_TYPE" in idents:
        name = table["MEMORY_TYPE"].meaning(entry)
        return f"{name} ignore PAT" if table.test(entry, "IPAT") else name
    index = sum(table.get(entry, ident) << at for at, ident in enumerate(("PWT", "PCD", "PAT")) if ident in idents)
    return f"PAT{index}" if pat is None else PAT_TYPES.get(pat >> 8 * index & 7, f"PAT{index} (reserved type)")


def where(step: Step) -> str:
    """"level 2 PDE at 0x1000"."""
    return f"level {step.level} {step.name} " + (f"at {step.address:#x}" if step.address is not None else f"in {step.place}")


def reason_of(descent: Descent, explain: Callable[[Step], str] = lambda step: "", broken: str = "is misconfigured") -> str:
    """Why a descent that found no leaf ended, in words; `explain` may add what software keeps in the entry's bits, `broken` is what the
    manual says of an entry that breaks a rule."""
    step = descent.last
    if descent.end == "unreadable":
        return f"{where(step)} cannot be read: {descent.detail}"
    assert step.entry is not None
    more = explain(step)
    if descent.end == "not-present":
        what = f"{where(step)} is not present (entry {step.entry:#x})"
    else:
        rules = "; ".join(f"{rule.text} (found {step.entry & rule.mask:#x})" for rule in step.broken)
        what = f"{where(step)} {broken} (entry {step.entry:#x}): {rules}"
    return f"{what}; {more}" if more else what


def denied(descent: Descent, mask: int, what: str) -> str:
    """"write is not allowed: level 1 PTE at 0x1008 has W=0 (entry 0x...)"."""
    step = descent.without(mask)
    if step is None or step.entry is None:
        return f"{what} is not allowed"
    field = next(field for field in step.table.fields if field.mask & mask)
    return f"{what} is not allowed: {where(step)} has {field.ident}={field.of(step.entry)} (entry {step.entry:#x})"


def check_address(address: int, what: str) -> int:
    """`address` if it is one: UsageError for a negative one or one of more than 64 bits."""
    if address < 0 or address >> 64:
        raise UsageError(f"{what} {address:#x} is not a 64-bit number")
    return address
