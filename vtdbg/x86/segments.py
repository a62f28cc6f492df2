"""A segment register as a control block holds it, against the descriptor that its selector names: every difference, and whether it matters.

A processor copies a descriptor when a segment register is loaded and never looks at it again; a VM entry loads the copy alone.  So the two can
differ for ever: the guest runs with the held copy until it reloads the register.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Tuple

from vtdbg import bits
from vtdbg.memory.holes import Readable
from vtdbg.x86.descriptor_tables import TableRow, find_descriptor
from vtdbg.x86.descriptors import AR_UNUSABLE, SegmentDescriptor

REGISTERS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
DATA_REGISTERS = ("ES", "SS", "DS", "FS", "GS")
TYPE_BIT_0 = 1
TYPE_BUSY = 2
LDTR_AFTER_RESET = (0, 0xFFFF, 0x82)
"""Base, limit and access rights (SDM vol. 3, Processor State After Reset)."""


@dataclass(frozen=True)
class SegmentState:
    """What is held.  `access_rights` in the VMCS form; None is unknown."""

    name: str
    selector: Optional[int]
    base: Optional[int]
    limit: Optional[int]
    access_rights: Optional[int]

    @property
    def null(self) -> bool:
        """Index 0 of the GDT, whatever the RPL."""
        return self.selector is not None and self.selector & 0xFFFC == 0

    @property
    def unusable(self) -> Optional[bool]:
        return None if self.access_rights is None else bool(self.access_rights & AR_UNUSABLE)


@dataclass(frozen=True)
class Difference:
    """`field` is "base", "limit" or the identifier of an access-rights bit; `held` and `descriptor` its two values."""

    field: str
    held: int
    descriptor: int
    matters: bool
    why: str


@dataclass(frozen=True)
class SegmentComparison:
    """`row` is the descriptor's place, None where no descriptor is to be looked up.  `notes` say why something was not compared."""

    state: SegmentState
    row: Optional[TableRow]
    differences: Tuple[Difference, ...]
    notes: Tuple[str, ...]

    @property
    def matters(self) -> bool:
        return any(difference.matters for difference in self.differences)


@dataclass(frozen=True)
class Mode:
    """Where the segments are used: in IA-32e mode, with 64-bit code.  `subject` is who runs with the held values ("the guest")."""

    long_mode: bool
    code64: bool
    subject: str = "the guest"


def compare(state: SegmentState, row: TableRow, mode: Mode) -> SegmentComparison:
    """The held values of one register against the descriptor in `row`."""
    descriptor = row.descriptor
    if descriptor is None:
        return SegmentComparison(state, row, (), (f"the descriptor cannot be read: {row.unreadable}",))
    if not isinstance(descriptor, SegmentDescriptor) or descriptor.kind not in _wanted_kinds(state.name):
        why = f"selector {state.selector:#x} names a {descriptor.type_name}: loading {state.name} with it would fault"
        held = state.access_rights or 0
        kind = Difference("TYPE", held & 0x1F, descriptor.raw >> 40 & 0x1F, matters=True, why=why)
        return SegmentComparison(state, row, (kind,), ())
    differences: List[Difference] = []
    if state.unusable:
        matters = not (mode.code64 and state.name in DATA_REGISTERS)
        why = (f"unusable: {mode.subject} faults when it uses {state.name}, until it reloads the register" if matters
               else f"unusable: without effect in 64-bit mode, where {state.name} needs no descriptor")
        differences.append(Difference("UNUSABLE", 1, 0, matters, why))
        return SegmentComparison(state, row, tuple(differences), ())
    if state.base is not None and state.base != descriptor.base:
        differences.append(_base(state, descriptor, mode))
    if state.limit is not None and state.limit != descriptor.limit:
        differences.append(_limit(state, descriptor, mode))
    if state.access_rights is not None:
        differences.extend(_rights(state.name, state.access_rights, descriptor.access_rights, mode))
    notes = tuple(f"{state.name} {what} is unknown" for what, value in
                  (("base", state.base), ("limit", state.limit), ("access-rights word", state.access_rights)) if value is None)
    return SegmentComparison(state, row, tuple(differences), notes + descriptor.problems)


def compare_null(state: SegmentState, mode: Mode) -> SegmentComparison:
    """A null selector: the register should be unusable."""
    if state.unusable is None:
        return SegmentComparison(state, None, (), ("null selector; whether the segment is unusable is unknown",))
    if state.name in ("CS", "TR"):
        why = f"{state.name} may not be null"
        return SegmentComparison(state, None, (Difference("selector", state.selector or 0, 0, matters=True, why=why),), ())
    if state.unusable:
        return SegmentComparison(state, None, (), ("null selector, unusable",))
    matters = not mode.code64 or state.name == "LDTR"
    if state.name == "LDTR" and (state.base, state.limit, state.access_rights) == LDTR_AFTER_RESET:
        matters, why = False, "usable although the selector is null: the state of LDTR after a reset, which lasts until the first LLDT"
    elif state.name == "LDTR":
        why = f"usable although the selector is null: {mode.subject} can use selectors of the LDT at {state.base or 0:#x} until it executes LLDT"
    else:
        why = f"usable although the selector is null: {mode.subject} can use {state.name} until it reloads the register"
    return SegmentComparison(state, None, (Difference("UNUSABLE", 0, 1, matters, why),), ())


Table = Tuple[Optional[int], Optional[int]]
"""(base, limit) of a GDT or LDT; None: unknown."""


def compare_in_tables(state: SegmentState, gdt: Table, ldt: Table, mode: Mode, memory: Readable) -> SegmentComparison:
    """One register against the descriptor in the table that its selector's TI bit names; `gdt` and `ldt` are (base, limit)."""
    if state.selector is None:
        return SegmentComparison(state, None, (), ("the selector is unknown",))
    if state.null:
        return compare_null(state, mode)
    in_ldt = bool(state.selector & 4)
    base, limit = ldt if in_ldt else gdt
    if base is None or limit is None:
        return SegmentComparison(state, None, (), (f"the {'LDT' if in_ldt else 'GDT'} is unknown or unusable",))
    return compare(state, find_descriptor(memory, base, limit, state.selector, mode.long_mode), mode)


def _wanted_kinds(name: str) -> Tuple[str, ...]:
    return {"LDTR": ("ldt",), "TR": ("tss",), "CS": ("code",)}.get(name, ("code", "data"))


def _until_reload(name: str, mode: Mode) -> str:
    return f"{mode.subject} runs with the held value until it reloads {name}"


def _base(state: SegmentState, descriptor: SegmentDescriptor, mode: Mode) -> Difference:
    held, real = state.base or 0, descriptor.base
    if state.name == "TR":
        why = f"the processor takes stacks (RSP0, IST) and the I/O bitmap from the TSS at {held:#x}, not from the one of the descriptor at {real:#x}"
        return Difference("base", held, real, matters=True, why=why)
    if state.name in ("FS", "GS") and mode.long_mode:
        why = f"in 64-bit mode the base is IA32_{state.name}_BASE: the descriptor's counts only when the register is loaded"
        return Difference("base", held, real, matters=False, why=why)
    if mode.code64 and state.name in ("ES", "CS", "SS", "DS"):
        return Difference("base", held, real, matters=False, why="64-bit mode takes the bases of ES, CS, SS and DS as 0")
    return Difference("base", held, real, matters=True, why=_until_reload(state.name, mode))


def _limit(state: SegmentState, descriptor: SegmentDescriptor, mode: Mode) -> Difference:
    held, real = state.limit or 0, descriptor.limit
    if mode.code64 and state.name not in ("LDTR", "TR"):
        return Difference("limit", held, real, matters=False, why="64-bit mode does not check limits")
    if state.name == "TR":
        return Difference("limit", held, real, matters=True, why="the limit says how much of the I/O permission bitmap counts")
    return Difference("limit", held, real, matters=True, why=_until_reload(state.name, mode))


def _rights(name: str, held: int, real: int, mode: Mode) -> List[Difference]:
    table = bits.table("access_rights")
    found: List[Difference] = []
    for row in table.fields:
        if not row.ident or row.ident == "UNUSABLE" or (held ^ real) & row.mask == 0:
            continue
        matters, why = _right(name, row.ident, row.of(held) ^ row.of(real), row.of(held), mode)
        found.append(Difference(row.ident, row.of(held), row.of(real), matters, why))
    return found


def _right(name: str, ident: str, changed: int, held: int, mode: Mode) -> Tuple[bool, str]:
    """Whether a difference of one access-rights field matters, and why."""
    if ident == "TYPE" and name in ("LDTR", "TR"):
        if name == "TR" and changed == TYPE_BUSY:
            if held & TYPE_BUSY:
                return False, "LTR marks the descriptor busy: it was made available again, as it has to be for the next LTR"
            return True, "TR has to be busy: VM entry fails"
        return True, _until_reload(name, mode)
    if ident == "TYPE" and changed == TYPE_BIT_0:
        return False, "the accessed bit: loading the register sets it in the copy, and in the descriptor"
    if ident == "AVL":
        return False, "software's own bit: the processor ignores it"
    if mode.code64 and name in DATA_REGISTERS and ident in ("DB", "G", "L"):
        return False, "64-bit mode ignores it for data segments"
    if mode.code64 and ident == "G":
        return False, "64-bit mode does not check limits"
    if ident == "DPL" and name == "SS":
        return True, "the DPL of SS is the current privilege level"
    return True, _until_reload(name, mode)
