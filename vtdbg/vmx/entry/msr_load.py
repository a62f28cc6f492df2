"""The entries of the VM-entry MSR-load area: a bad one is an entry failure, exit reason 34, whose qualification is its number (from 1).

SDM vol. 3, Loading MSRs (chapter VM Entries).  Dated 2026-11.
"""

from __future__ import annotations

import struct
from typing import Callable, List, Mapping, NamedTuple, Optional, Union

from vtdbg.vmx.capabilities import msr_name
from vtdbg.vmx.entry import formats
from vtdbg.vmx.entry.controls import count_is_not_0
from vtdbg.vmx.entry.formats import LME, PG
from vtdbg.vmx.entry.rules import EFER_MSR, Failure, Missing, RuleBook, State

SEE = "SDM vol. 3, Loading MSRs"
ENTRY_SIZE = 16
MOST_ENTRIES = 4096
"""More than any processor loads (512 * 8): what a damaged count asks for beyond it is not read."""

book = RuleBook("guest", SEE, ("entry-failure", 34))

FORBIDDEN: Mapping[int, str] = {
    0xC0000100: "IA32_FS_BASE is loaded from the guest-state area",
    0xC0000101: "IA32_GS_BASE is loaded from the guest-state area",
    0x9B: "IA32_SMM_MONITOR_CTL can be loaded only in SMM",
    0x9E: "IA32_SMBASE cannot be written",
    0x79: "IA32_BIOS_UPDT_TRIG cannot be loaded by a VM entry",
    0x8B: "IA32_BIOS_SIGN_ID cannot be loaded by a VM entry",
}


class MsrEntry(NamedTuple):
    """One entry of an MSR area."""

    number: int
    msr: int
    reserved: int
    value: int

    @property
    def title(self) -> str:
        return f"entry {self.number} ({msr_name(self.msr)} = {self.value:#x})"


def read_area(state: State, address: int, count: int) -> List[MsrEntry]:
    """The entries; Missing where memory lacks them."""
    data = state.read(address, ENTRY_SIZE * min(count, MOST_ENTRIES))
    return [MsrEntry(number + 1, *struct.unpack_from("<IIQ", data, ENTRY_SIZE * number)) for number in range(len(data) // ENTRY_SIZE)]


def _efer(state: State, entry: MsrEntry) -> Optional[str]:
    wrong = formats.efer_reserved("the value", entry.value)
    if wrong is None and state["GUEST_CR0"] & PG and bool(entry.value & LME) != state.on("entry", "IA32E_MODE"):
        return "LME cannot change while the guest's CR0.PG is 1"
    return wrong


def _canonical(state: State, entry: MsrEntry) -> Optional[str]:
    return None if state.canonical(entry.value) else "the value is not canonical"


def _32_bits(state: State, entry: MsrEntry) -> Optional[str]:
    return formats.high_half("the value", entry.value)


VALUES: Mapping[int, Callable[[State, MsrEntry], Optional[str]]] = {
    EFER_MSR: _efer,
    0x277: lambda state, entry: formats.pat("the value", entry.value),
    0x175: _canonical, 0x176: _canonical, 0xC0000082: _canonical, 0xC0000083: _canonical, 0xC0000102: _canonical,
    0xC0000084: _32_bits, 0xC0000103: _32_bits,
    0x10: lambda state, entry: None, 0x174: lambda state, entry: None, 0xC0000081: lambda state, entry: None,
}
"""When WRMSR of the value would fault: IA32_EFER, IA32_PAT, SYSENTER_ESP and EIP, LSTAR, CSTAR, KERNEL_GS_BASE, FMASK, TSC_AUX; TSC, SYSENTER_CS
and STAR take any value (SDM vol. 4, Architectural MSRs)."""


def problem(state: State, entry: MsrEntry) -> Optional[str]:
    """Why the entry cannot be loaded, or None; Missing where only the processor knows."""
    if entry.reserved:
        return f"bits 63:32 of its first quadword are {entry.reserved:#x}, they must be 0"
    if entry.msr >> 8 == 8:
        return "MSRs 0x800 to 0x8ff (x2APIC) cannot be loaded"
    if entry.msr in FORBIDDEN and not (entry.msr == 0x9B and state.in_smm):
        return FORBIDDEN[entry.msr]
    check = VALUES.get(entry.msr)
    if check is None:
        raise Missing(f"whether WRMSR of {entry.value:#x} to {msr_name(entry.msr)} faults on this processor")
    return check(state, entry)


@book.rule("guest.msr_load", "M1", "every entry of the VM-entry MSR-load area can be loaded", "VM_ENTRY_MSR_LOAD_ADDR", "VM_ENTRY_MSR_LOAD_COUNT",
           when=count_is_not_0("VM_ENTRY_MSR_LOAD_COUNT"))
def _msr_load(state: State) -> Union[None, str, Failure]:
    unknown: List[str] = []
    first: Optional[Failure] = None
    count = state["VM_ENTRY_MSR_LOAD_COUNT"]
    for entry in read_area(state, state["VM_ENTRY_MSR_LOAD_ADDR"], count):
        try:
            wrong = problem(state, entry)
        except Missing as problem_:
            unknown.extend(problem_.names)
            continue
        if wrong is not None:
            first = Failure(f"{entry.title} of the VM-entry MSR-load area: {wrong}", number=None if unknown else entry.number)
            break
    if first is not None:
        return first
    if unknown:
        raise Missing(*unknown[:3])
    if count > MOST_ENTRIES:
        raise Missing(f"entries beyond {MOST_ENTRIES} of the VM-entry MSR-load area")
    return None


RULES = book.rules
