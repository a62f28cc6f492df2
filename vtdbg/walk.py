"""The one page-walk engine.  x86 paging, EPT and NPT are three sets of level tables (`vtdbg.level_tables`) given to it.

`descend` walks one address and says what the tables hold; what each processor makes of that (which fault, which qualification) is said by
the modules that own the table sets: `vtdbg.vmx.ept`, `vtdbg.svm.npt`, `vtdbg.x86.paging`.  `Walk` is the answer of all three.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, List, NamedTuple, Optional, Protocol, Tuple, Union

from vtdbg.bits import BitTable, BitValue
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.level_tables import EntryKind, Permissions, Rule, Tables
from vtdbg.memory.base import PhysicalMemory


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
    def ignore_pat(self) -> Optional[bool]:
        """EPT: the leaf's memory type counts whatever the guest's PAT says (IPAT=1), or the two are combined.  None: there is no such bit."""
        leaf = self.leaf
        return None if leaf is None or leaf.entry is None or "IPAT" not in leaf.table.idents() else leaf.table.test(leaf.entry, "IPAT")

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


OUTCOMES = {"leaf": "mapped", "not-present": "violation", "misconfigured": "misconfiguration", "unreadable": "unreadable"}
"""What a descent through nested tables comes to, before an access is judged."""


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
