"""Any register, control word, field, entry or MSR by name and value: one name space over every bit table.

A name is looked for in this order: "msr NAME|INDEX"; a bit table or its alias; a VMCS field; a VMCB field; an MSR.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Dict, List, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.bits import BitTable, BitValue
from vtdbg.errors import UnknownName, UsageError
from vtdbg.names import near_names
from vtdbg.record import name_key
from vtdbg.svm import fields as vmcb_fields
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.capabilities import WORD_SOURCES
from vtdbg.vmx.words import MASKS
from vtdbg.x86 import msrs

ALIASES: Mapping[str, Tuple[str, ...]] = {
    "pin": ("pin_based", "pin_controls", "pinbased"),
    "proc": ("primary", "cpu_based", "procbased", "primary_controls"),
    "sec": ("secondary", "procbased2", "secondary_exec", "secondary_controls"),
    "tert": ("tertiary", "procbased3", "tertiary_controls"),
    "exit": ("exit_controls", "vmexit_controls"),
    "exit2": ("secondary_exit_controls", "exit_controls2"),
    "entry": ("entry_controls", "vmentry_controls"),
    "vmfunc": ("vm_function_controls",),
    "feature_control": ("feat_ctl", "featurecontrol"),
    "ept_vpid_cap": ("eptvpid", "ept_cap"),
    "entry_int_info": ("entry_intr_info", "vmentry_intr_info", "event_injection"),
    "exit_int_info": ("intr_info", "exit_intr_info", "vmexit_intr_info"),
    "idt_vectoring_info": ("idtv", "idt_info", "idt_vectoring"),
    "access_rights": ("ar", "attr", "ar_bytes", "segment_access_rights"),
    "vmcb_attrib": ("attrib", "attributes"),
    "interruptibility": ("interruptibility_state", "intr_state"),
    "activity": ("activity_state",),
    "pending_dbg": ("pending_debug", "pending_debug_exceptions"),
    "guest_intr_status": ("interrupt_status", "rvi_svi"),
    "exit_reason": ("reason",),
    "qual_ept": ("ept_violation", "qualification_ept"),
    "rflags": ("eflags", "flags"),
    "pfec": ("page_fault_error_code", "pf_error"),
    "exception_bitmap": ("exceptions", "intercept_exceptions"),
    "debugctl": ("debug_ctl", "debugctlmsr"),
    "mtrr_def_type": ("mtrr", "mtrr_deftype"),
    "mtrrcap": ("mtrr_cap",),
    "mtrr_physbase": ("physbase",),
    "mtrr_physmask": ("physmask",),
    "segment_descriptor": ("descriptor", "gdt_entry"),
    "event_inj": ("eventinj",),
    "svm_exit_int_info": ("exitintinfo",),
    "npf_info1": ("npf",),
    "ept_pml5e": ("ept_level5",), "ept_pml4e": ("ept_level4",), "ept_pdpte": ("ept_level3",), "ept_pde": ("ept_level2",), "ept_pte": ("ept_level1",),
    "npt_pml5e": ("npt_level5",), "npt_pml4e": ("npt_level4",), "npt_pdpte": ("npt_level3",), "npt_pde": ("npt_level2",), "npt_pte": ("npt_level1",),
    "pml5e": ("level5",), "pml4e": ("level4",), "pdpte": ("level3",), "pde": ("level2",), "pte": ("level1",),
}
"""What people type for a table.  KVM prints "intr_info" for the exit-interruption information of a VM exit."""


LEAVES: Mapping[str, str] = {"ept_pdpte": "ept_pdpte_1g", "ept_pde": "ept_pde_2m", "pdpte": "pdpte_1g", "pde": "pde_2m", "pae_pde": "pae_pde_2m",
                             "pde32": "pde32_4m", "npt_pdpte": "npt_pdpte_1g", "npt_pde": "npt_pde_2m"}
"""Entries that reference a table, and what they are when bit 7 (PS) is 1."""
PS = 1 << 7
EPT_RIGHTS = 0x407
"""R, W, X and XU: an EPT entry without any of them is not present."""

EXPLAINED: Mapping[str, str] = {
    "EXIT_QUALIFICATION": "its form depends on the exit reason: `exit explain REASON {value:#x}`",
    "VMX_INSTRUCTION_INFO": "its form depends on the exit reason: `exit explain --reason REASON --instruction-info {value:#x}`",
    "VM_INSTRUCTION_ERROR": "`exit explain --instruction-error {value}` says what it means",
    "exit_reason": "`exit explain --reason {value:#x}` says what it means",
    "VM_EXIT_REASON": "`exit explain --reason {value:#x}` says what it means",
    "exit_code": "`exit explain --exit-code {value:#x}` says what it means",
    "exit_info_1": "its form depends on the exit code: `exit explain --exit-code CODE --exit-info-1 {value:#x}`",
    "exit_info_2": "its form depends on the exit code: `exit explain --exit-code CODE --exit-info-2 {value:#x}`",
}
"""Numbers that another command explains, because they mean nothing by themselves or more than their bits."""

MASK_MSRS = frozenset({0x486, 0x487, 0x488, 0x489, 0x491, 0x492, 0x493})
"""Fixed bits of CR0 and CR4 and the allowed-1 settings of 64-bit words: 1 means "may be 1" (or "must be"), not that the bit is in force."""


@dataclass(frozen=True)
class ControlSetting:
    """What a capability MSR says of one control: `setting` is "0 or 1", "must be 1", "must be 0" or "contradictory"."""

    bit: int
    ident: str
    name: str
    setting: str


@dataclass(frozen=True)
class Decoded:
    """A value in words.  `what` says what the name was taken for, `table` how it is laid out (None: nobody lays it out).

    `rows` are all fields in descending bit order; `problems` are reserved bits with the wrong value and what else cannot be.
    `settings` is for an MSR of allowed settings, whose halves are two copies of a control word.
    """

    name: str
    what: str
    value: int
    table: Optional[BitTable]
    rows: Tuple[BitValue, ...]
    problems: Tuple[str, ...]
    notes: Tuple[str, ...] = ()
    settings: Tuple[ControlSetting, ...] = ()
    mask: bool = False
    """The value selects bits of the table's register (a guest/host mask, a CR fixed-bits MSR): no bit of it is reserved."""

    @property
    def words(self) -> str:
        """One line: the fields that say something; the number alone where there is no table."""
        if self.table is None:
            return f"{self.value:#x}"
        return self.table.describe_mask(self.value) if self.mask else self.table.describe(self.value)


@dataclass(frozen=True)
class _Target:
    """What a name leads to."""

    name: str
    what: str
    table: str
    width: int
    msr: Optional[int] = None
    mask: bool = False


@cache
def _tables() -> Dict[str, str]:
    """Bit-table ids by the key of id, title and aliases; ids win."""
    found: Dict[str, str] = {}
    for table in bits.tables().values():
        found.setdefault(name_key(table.title), table.id)
    for table_id, aliases in ALIASES.items():
        for alias in aliases:
            found[name_key(alias)] = table_id
    for table_id in bits.tables():
        found[name_key(table_id)] = table_id
    return found


def names() -> List[str]:
    """Every name that completion should offer: tables and their aliases, VMCS fields, VMCB fields, MSRs."""
    aliases = (alias for aliases in ALIASES.values() for alias in aliases)
    return list(dict.fromkeys([*bits.tables(), *aliases, *vmcs_fields.names(), *vmcb_fields.names(), *msrs.names()]))


def decode(name: str, value: int) -> Decoded:
    """The value in words.  `name` is a table ("cr4", "eptp"), a field ("GUEST_CR0", "0x6800", "int_ctl") or an MSR ("IA32_EFER", "msr 0x480").

    Raises UnknownName with the near names, UsageError for a negative value or one above 64 bits.  A value that is wider than what it is
    decoded as is a problem of the result, not an error.
    """
    if value < 0 or value >> 64:
        raise UsageError(f"{value:#x} is not a value of 64 bits")
    target = _find(name)
    leaf = LEAVES.get(target.table) if value & PS else None
    if leaf is not None:
        target = replace(target, name=leaf, what=bits.table(leaf).title, table=leaf)
    table = bits.table(target.table) if target.table else None
    problems = _problems(target, table, value)
    notes = _notes(target, table, value)
    settings = control_settings(target.msr, value) if target.msr is not None else ()
    rows = tuple(table.decode(value)) if table is not None else ()
    return Decoded(target.name, target.what, value, table, rows, problems, notes, settings, target.mask)


def _find(name: str) -> _Target:
    words = name.strip().split(None, 1)
    if len(words) == 2 and words[0].lower() == "msr":
        return _msr(msrs.find(words[1]))
    text = " ".join(words)
    table_id = _tables().get(name_key(text)) if name_key(text) else None
    if table_id is not None:
        table = bits.table(table_id)
        return _Target(table.id, table.title, table.id, table.width)
    field = vmcs_fields.get(text)
    if field is not None:
        return _Target(field.name, f"VMCS field {field.encoding:#06x}, {field.title}", MASKS.get(field.name, field.bits), field.size * 8,
                       mask=field.name in MASKS)
    vmcb_field = None if text[:1].isdigit() else vmcb_fields.get(text)
    if vmcb_field is not None:
        what = f"VMCB field at offset {vmcb_field.offset:#x}, {vmcb_field.title}"
        return _Target(vmcb_field.name, what, vmcb_field.bits, vmcb_field.size * 8)
    if msrs.indexes(text):
        return _msr(msrs.find(text))
    known = msrs.msrs().get(int(text, 16)) if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}", text) else None
    raise UnknownName("name", name, (f"msr {known.index:#x} ({known.name})",) if known is not None else near_names(text, names()))


def _msr(msr: msrs.Msr) -> _Target:
    also = [alias for alias in msr.aliases if name_key(alias) != name_key(msr.name)]
    aliases = f" (also {', '.join(also)})" if also else ""
    return _Target(msr.name, f"MSR {msr.index:#x}{aliases}", msr.bits, 64, msr.index, mask=msr.index in MASK_MSRS)


def _problems(target: _Target, table: Optional[BitTable], value: int) -> Tuple[str, ...]:
    problems = []
    if value >> target.width:
        problems.append(f"bits above {target.width - 1} are set: {target.name} has {target.width} bits")
    if table is not None and not (target.mask or _stale(table, value) or _absent(table, value)):
        for wrong in table.reserved_violations(value):
            should = "1" if wrong.field.kind == "reserved1" else "0"
            problems.append(f"reserved bits {wrong.field.bits} are {wrong.number:#x}: they have to be {should}" if wrong.field.high != wrong.field.low
                            else f"reserved bit {wrong.field.bits} is {wrong.number}: it has to be {should}")
        for row in table.fields:
            if row.kind == "enum" and row.of(value) not in row.values:
                problems.append(f"{row.ident or row.name} (bits {row.bits}) is {row.of(value)}: the value is reserved")
    return tuple(problems)


def _notes(target: _Target, table: Optional[BitTable], value: int) -> Tuple[str, ...]:
    notes = []
    if target.name in EXPLAINED:
        notes.append(EXPLAINED[target.name].format(value=value))
    elif table is None and not _word_of(target.msr):
        notes.append(f"nobody lays {target.name} out in bits: it is a number, an address or a list that has its own command")
    if target.table in LEAVES.values():
        notes.append("bit 7 is 1: the entry maps a page" if value & PS
                     else "bit 7 is 0: the entry references a table, it does not map a page of this size")
    if table is not None and _absent(table, value):
        notes.append("not present: the processor looks at nothing else in it")
    elif table is not None and _stale(table, value):
        notes.append("the valid bit is 0: the rest is left over from an older event and says nothing")
    return tuple(notes)


def _stale(table: BitTable, value: int) -> bool:
    """An event format whose valid bit is 0."""
    return "VALID" in table.idents() and not table.test(value, "VALID")


def _absent(table: BitTable, value: int) -> bool:
    """A paging-structure entry that is not present."""
    if table.id.startswith("ept_p"):
        return not value & EPT_RIGHTS
    return _PAGING_ENTRY.match(table.id) is not None and not table.test(value, "P")


_PAGING_ENTRY = re.compile(r"(npt_|pae_)?(pml5e|pml4e|pdpte|pde|pte)(_[12][gm])?$|p[dt]e32(_4m)?$")
"""Ids of the tables of entries with a present bit."""


def _word_of(index: Optional[int]) -> Optional[str]:
    """The control word whose allowed settings the MSR reports in two halves."""
    for word, source in WORD_SOURCES.items():
        if source.halves and index is not None and index in (source.msr, source.true_msr):
            return word
    return None


def control_settings(index: int, value: int) -> Tuple[ControlSetting, ...]:
    """What a capability MSR allows for each bit of its control word, in descending order; () for an MSR that reports none.

    Bits 31:0 are the allowed-0 settings and 63:32 the allowed-1 settings; the 64-bit words have allowed-1 settings only
    (SDM vol. 3, appendix VMX Capability Reporting Facility).
    """
    for word, source in WORD_SOURCES.items():
        if index in (source.msr, source.true_msr):
            must, may = (value & 0xFFFFFFFF, value >> 32) if source.halves else (0, value)
            return tuple(_setting(row, must, may) for row in bits.table(word).fields if row.high == row.low)
    return ()


def _setting(row: bits.BitField, must: int, may: int) -> ControlSetting:
    forced, allowed = bool(must & row.mask), bool(may & row.mask)
    setting = {(False, True): "0 or 1", (True, True): "must be 1", (False, False): "must be 0", (True, False): "contradictory"}[forced, allowed]
    return ControlSetting(row.low, row.ident, row.name, setting)
