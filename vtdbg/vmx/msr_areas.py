"""The MSR-load and MSR-store areas of a VMCS, with the entries that would make the VM entry or VM exit fail.

Sources: SDM vol. 3, VM-Exit Controls for MSRs; VM-Entry Controls for MSRs; Loading MSRs (VM entry); Saving MSRs; Loading MSRs (VM exit);
VMX Aborts.  Compared with Linux 6.12.117 arch/x86/kvm/vmx/nested.c (nested_vmx_load_msr_check, nested_vmx_store_msr_check).  Dated 2026-11.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Iterable, List, Mapping, Optional, Tuple

from vtdbg.memory.holes import Readable, Span
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86 import msrs

ENTRY_SIZE = 16
MAX_ENTRIES = 4096
"""The highest maximum that IA32_VMX_MISC[27:25] can report; more is not read."""

ENTRY_LOAD, EXIT_STORE, EXIT_LOAD = "entry-load", "exit-store", "exit-load"

AREAS: Mapping[str, Tuple[str, str]] = {
    ENTRY_LOAD: ("VM_ENTRY_MSR_LOAD_ADDR", "VM_ENTRY_MSR_LOAD_COUNT"),
    EXIT_STORE: ("VM_EXIT_MSR_STORE_ADDR", "VM_EXIT_MSR_STORE_COUNT"),
    EXIT_LOAD: ("VM_EXIT_MSR_LOAD_ADDR", "VM_EXIT_MSR_LOAD_COUNT"),
}

FS_BASE, GS_BASE = 0xC0000100, 0xC0000101
SMM_MONITOR_CTL, SMBASE = 0x9B, 0x9E
BIOS_UPDT_TRIG, BIOS_SIGN_ID = 0x79, 0x8B

NEVER_LOADED: Mapping[int, str] = {
    FS_BASE: "IA32_FS_BASE cannot be loaded from an area: FS base is a field of the VMCS",
    GS_BASE: "IA32_GS_BASE cannot be loaded from an area: GS base is a field of the VMCS",
    SMM_MONITOR_CTL: "IA32_SMM_MONITOR_CTL can be written only in SMM",
}
MODEL_SPECIFIC: Mapping[int, str] = {
    BIOS_UPDT_TRIG: "model-specific: processors may refuse the microcode MSRs in an area, and KVM does",
    BIOS_SIGN_ID: "model-specific: processors may refuse the microcode MSRs in an area, and KVM does",
}
NEVER_STORED: Mapping[int, str] = {SMBASE: "IA32_SMBASE can be read only in SMM"}

CONSEQUENCE: Mapping[str, str] = {
    ENTRY_LOAD: "VM entry fails with exit reason 34 and the entry's number as exit qualification",
    EXIT_STORE: "VM exit ends in a VMX abort (indicator 1)",
    EXIT_LOAD: "VM exit ends in a VMX abort (indicator 4)",
}


@dataclass(frozen=True)
class MsrEntry:
    """`number` counts from 1, as the exit qualification of a failed entry does.  `problems` make the load or store fail."""

    number: int
    address: int
    index: int
    reserved: int
    value: int
    problems: Tuple[str, ...]
    notes: Tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return msrs.name_of(self.index)


@dataclass(frozen=True)
class MsrArea:
    """`kind` is "entry-load", "exit-store" or "exit-load"; `problems` concern the area as a whole, `unreadable` says where reading ended."""

    kind: str
    address: int
    count: int
    entries: Tuple[MsrEntry, ...]
    problems: Tuple[str, ...]
    unreadable: str = ""

    @property
    def first_failing(self) -> Optional[MsrEntry]:
        """The entry that the processor would stop at."""
        return next((entry for entry in self.entries if entry.problems), None)

    @property
    def consequence(self) -> str:
        """What the processor does when an entry cannot be loaded or stored."""
        return CONSEQUENCE[self.kind]


def entry_problems(kind: str, index: int, reserved: int) -> List[str]:
    """Why the processor refuses an entry, from its index and bits 63:32; a value that WRMSR would refuse is not looked for."""
    problems = []
    if reserved:
        problems.append(f"bits 63:32 are {reserved:#x}: they are reserved")
    if index >> 8 == 8:
        problems.append(f"{index:#x} is an x2APIC register: it cannot be {'stored' if kind == EXIT_STORE else 'loaded'}")
    rules = NEVER_STORED if kind == EXIT_STORE else NEVER_LOADED
    if index in rules:
        problems.append(rules[index])
    return problems


def decode_entry(kind: str, number: int, address: int, data: bytes) -> MsrEntry:
    """One entry of 16 bytes: MSR index (bits 31:0), reserved (63:32), MSR data (127:64)."""
    index, reserved, value = struct.unpack("<IIQ", data)
    notes = [] if index in msrs.msrs() else ["no processor known here has this MSR: loading or storing it fails where it does not exist"]
    if index in MODEL_SPECIFIC:
        notes.append(MODEL_SPECIFIC[index])
    return MsrEntry(number, address, index, reserved, value, tuple(entry_problems(kind, index, reserved)), tuple(notes))


def read_area(memory: Readable, kind: str, address: int, count: int, caps: Optional[VmxCapabilities] = None) -> MsrArea:
    """The area at physical `address`; bounded: at most 4096 entries are read, `count` says how many there are.

    An area with a count of 0 is not looked at by the processor, and not here either.
    """
    problems: List[str] = []
    if count == 0:
        return MsrArea(kind, address, 0, (), ())
    width = caps.structure_address_width if caps is not None else None
    maximum = caps.msr_list_max if caps is not None else None
    end = address + count * ENTRY_SIZE - 1
    if address & 0xF:
        problems.append(f"address {address:#x} is not aligned to 16 bytes: VM entry fails")
    if width is not None and end >> width:
        problems.append(f"the area ends at {end:#x}, beyond the {width} bits of physical addresses: VM entry fails")
    if maximum is not None and count > maximum:
        problems.append(f"{count} entries are more than the {maximum} that IA32_VMX_MISC[27:25] recommends: the processor may do anything")
    if count > MAX_ENTRIES:
        problems.append(f"only the first {MAX_ENTRIES} of {count} entries are shown")
    shown = min(count, MAX_ENTRIES)
    span = Span(memory, address, shown * ENTRY_SIZE)
    entries: List[MsrEntry] = []
    unreadable = ""
    for number in range(1, shown + 1):
        data = span.get((number - 1) * ENTRY_SIZE, ENTRY_SIZE)
        if isinstance(data, str):
            unreadable = f"from entry {number}: {data}"
            break
        entries.append(decode_entry(kind, number, address + (number - 1) * ENTRY_SIZE, data))
    return MsrArea(kind, address, count, _with_repeats(entries), tuple(problems), unreadable)


def _with_repeats(entries: Iterable[MsrEntry]) -> Tuple[MsrEntry, ...]:
    first: "dict[int, int]" = {}
    found = []
    for entry in entries:
        before = first.setdefault(entry.index, entry.number)
        notes = entry.notes if before == entry.number else (*entry.notes, f"the same MSR as entry {before}: the last one counts")
        found.append(MsrEntry(entry.number, entry.address, entry.index, entry.reserved, entry.value, entry.problems, notes))
    return tuple(found)


def area_of(vmcs: Vmcs, memory: Readable, kind: str, caps: Optional[VmxCapabilities] = None) -> Optional[MsrArea]:
    """The area that the VMCS points to; None where its address or count is unknown."""
    address, count = (vmcs.get(name) for name in AREAS[kind])
    if count == 0:
        return MsrArea(kind, address or 0, 0, (), ())
    return None if address is None or count is None else read_area(memory, kind, address, count, caps)


def encode_area(values: Iterable[Tuple[int, int]]) -> bytes:
    """The bytes of an area out of (MSR index, value) pairs: what a VMM writes, and the inverse of reading."""
    return b"".join(struct.pack("<IIQ", index, 0, value) for index, value in values)
