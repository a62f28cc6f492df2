"""Which VMCB fields count?  The gates of `data/vmcb_fields.csv`, evaluated on a VMCB.

A field that the controls leave unused, or that this #VMEXIT did not write, still holds a number; shown as if it counted it would mislead.
"""

from __future__ import annotations

from typing import Optional, Union

from vtdbg import bits
from vtdbg.record import USED, Gate
from vtdbg.svm import events
from vtdbg.svm.exit_codes import ExitCode, exit_codes, signed
from vtdbg.svm.fields import VmcbField
from vtdbg.svm.vmcb import SEV_ES, Vmcb

SAVE_AREA = 0x400
VMLOAD_NOTE = "loaded by VMLOAD and saved by VMSAVE; VMRUN and #VMEXIT do not touch it"
"""APM vol. 2, VMSAVE and VMLOAD Instructions."""

_WORDS = {
    "nested_cr3": "not used: nested paging is off (NP_ENABLE is 0): the guest runs on its CR3 alone",
    "g_pat": "not used: nested paging is off (NP_ENABLE is 0): the guest uses the host's PAT",
    "int_vector": "not used: V_IRQ is 0, no virtual interrupt is pending",
    "pause_filter_count": "not used: PAUSE is not intercepted",
    "pause_filter_thresh": "not used: PAUSE is not intercepted",
    "iopm_base_pa": "not used: I/O is not intercepted (IOIO_PROT is 0)",
    "msrpm_base_pa": "not used: MSRs are not intercepted (MSR_PROT is 0)",
    "ssp": "not used: CR4.CET is 0",
    "s_cet": "no effect: CR4.CET is 0",
    "isst_addr": "not used: CR4.CET is 0",
}


def gate_of(vmcb: Vmcb, field: VmcbField) -> Gate:
    """Does the processor use this field, or did the last #VMEXIT write it?"""
    if field.layout != "vmcb":
        return USED
    if field.offset >= SAVE_AREA and (vmcb.get("nested_ctl") or 0) & SEV_ES:
        return Gate(used=False, why="SEV-ES: the guest's state is in the encrypted VMSA, VMRUN does not load this")
    for term in filter(None, field.gate.split("&")):
        gate = _term(vmcb, field, term)
        if gate.used is not True:
            return gate
    return USED


def unused_because(vmcb: Vmcb, field: Union[str, int, VmcbField]) -> Optional[str]:
    """Why the field does not count ("not used: nested paging is off ..."), None where it does or where that cannot be known.

    Raises UnknownName for a field that nobody knows.
    """
    row = field if isinstance(field, VmcbField) else vmcb.field(field)
    gate = gate_of(vmcb, row)
    return gate.why if gate.used is False else None


def _term(vmcb: Vmcb, field: VmcbField, term: str) -> Gate:
    if term == "never":
        return Gate(used=False, why=f"not used: the {field.name.split('.')[0].upper()} register has no such part")
    name, _, ident = term.partition(".")
    if name == "exit":
        return _written_by_exit(vmcb, ident)
    value = vmcb.get(name)
    if value is None:
        return Gate(used=None, why=f"{name} is unknown")
    table = vmcb.field(name).table
    if table is None or table.test(value, ident):
        return USED
    return Gate(used=False, why=_why_clear(vmcb, field, name, value, table[ident]))


def _why_clear(vmcb: Vmcb, field: VmcbField, name: str, value: int, bit: bits.BitField) -> str:
    if bit.ident == "V":
        event = events.decode(name, value)
        return event.meaning if field.name == name else f"not used: V of {name} is 0"
    if bit.ident == "EV":
        return f"not used: the event has no error code (EV of {name} is 0)"
    return _WORDS.get(field.name, f"not used: {bit.name} ({name} bit {bit.bits}) is 0")


def _written_by_exit(vmcb: Vmcb, what: str) -> Gate:
    code = vmcb.get("exit_code")
    if code is None:
        return Gate(used=None, why="exit_code is unknown")
    row = exit_codes().get(signed(code))
    if row is None:
        return Gate(used=None, why=f"exit code {code:#x} is in no table")
    if row.category == "software":
        return Gate(used=None, why="what software defined for its own exit is not known")
    return USED if _writes(row, what) else Gate(used=False, why=_not_written(row, what))


def _writes(row: ExitCode, what: str) -> bool:
    return bool({"info1": row.info1, "info2": row.info2, "next_rip": row.nrip, "insn": row.insn}[what])


def _not_written(row: ExitCode, what: str) -> str:
    if row.category == "invalid":
        return "not written: VMRUN was refused"
    if what == "next_rip":
        return f"not written by this exit ({row.name}): nRIP is saved for intercepted instructions"
    if what == "insn":
        return f"not written by this exit ({row.name}): instruction bytes are saved for data accesses of NPF and #PF"
    return f"not defined for this exit ({row.name})"
