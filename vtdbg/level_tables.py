"""Page tables as data: which address bits index a table, which bits of an entry say what, which rules a present entry must keep.

A `TableSet` is written down by the module that owns it (`vtdbg.vmx.ept`, `vtdbg.svm.npt`, `vtdbg.x86.paging`), out of rows and the names of
bit tables.  `compile_tables` turns it into masks for one processor (physical-address width, features): what `vtdbg.walk` walks one
address with, and `vtdbg.enumeration` all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import FrozenSet, Iterable, List, Optional, Tuple

from vtdbg import bits
from vtdbg.bits import BitTable

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


def long_levels(prefix: str = "", third: str = "PDPTE") -> Tuple[LevelSpec, ...]:
    """The five levels of 512 entries that EPT, NPT and long-mode paging have in common; their bit tables begin with `prefix`, and AMD calls
    entries of the third level otherwise."""
    return (
        LevelSpec(5, "PML5E", 48, table=f"{prefix}pml5e"),
        LevelSpec(4, "PML4E", 39, table=f"{prefix}pml4e"),
        LevelSpec(3, third, 30, table=f"{prefix}pdpte", leaf=f"{prefix}pdpte_1g"),
        LevelSpec(2, "PDE", 21, table=f"{prefix}pde", leaf=f"{prefix}pde_2m"),
        LevelSpec(1, "PTE", 12, leaf=f"{prefix}pte"),
    )


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


# ---- memory types -------------------------------------------------------------------------------------------------------------------

PAT_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}
"""SDM vol. 3, Page Attribute Table (PAT), table "Memory Types That Can Be Encoded With PAT"."""


def memory_type_of(table: BitTable, entry: int, pat: Optional[int] = None) -> str:
    """The memory type that a leaf entry asks for.

    EPT: "WB", which IPAT (a flag of the leaf) makes final.  Elsewhere "WB" where `pat` (IA32_PAT) is known, else which of its entries
    decides: "PAT0" to "PAT7".
    """
    idents = table.idents()
    if "MEMORY_TYPE" in idents:
        return table["MEMORY_TYPE"].meaning(entry)
    index = sum(table.get(entry, ident) << at for at, ident in enumerate(("PWT", "PCD", "PAT")) if ident in idents)
    return f"PAT{index}" if pat is None else PAT_TYPES.get(pat >> 8 * index & 7, f"PAT{index} (reserved type)")
