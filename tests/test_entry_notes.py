"""VMCSs filled the way two course drivers for Windows fill them, mistakes included, run on a processor model.

A thin 64-bit hypervisor that copies the running system into the guest, and a 32-bit one for PAE Windows without EPT.  What the processor
says is one number; the report has to name what the authors had to find by hand.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Sequence, Tuple

import pytest
from support.entry_cases import ModelMemory, capabilities
from support.vmxcpu import Case, Worker
from support.vmxcpu.places import GUEST_CODE, HOST_CODE, MSR_BITMAP, PAE_PDPT, PML4, TSS, VMCS

from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.entry import check_vm_entry, lint_vm_entry, predict_vm_entry
from vtdbg.vmx.vmcs import Vmcs

pytestmark = pytest.mark.live

KERNEL64, KERNEL32 = 0xFFFFF80000000000, 0x80000000
KERNEL_MAP = {PML4 + 8 * 0x1F0: struct.pack("<Q", 0x2007)}
"""The kernel's half of the 64-bit address space shows the first GiB too; PAE's four directories all do."""
GDT64: Mapping[int, int] = {0x10: 0x00209B0000000000, 0x18: 0x00409300_00000000, 0x28: 0x00CFF3000000FFFF, 0x50: 0x0040F3000000 << 16 | 0x3C00}
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR")


def descriptor(selector: int, gdt: Mapping[int, int]) -> Tuple[int, int, int]:
    """(base, limit in bytes, access rights) as a driver cuts them out of the GDT: LSL for the limit, bits 23:8 of the high half for the rights."""
    low, high = gdt.get(selector, 0) & 0xFFFFFFFF, gdt.get(selector, 0) >> 32
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
    limit = low & 0xFFFF | high & 0xF0000
    rights = high >> 8 & 0xF0FF
    if rights & 0x8000:
        limit = limit << 12 | 0xFFF
    return base, limit, rights if selector else rights | 0x10000


def adjusted(worker: Worker, wanted: int, msr: int) -> int:
    value = worker.msrs[msr]
    return (wanted | value & 0xFFFFFFFF) & value >> 32


def thin_64(worker: Worker) -> Dict[str, int]:
    """A driver on 64-bit Windows: the guest goes on where the driver was called, the host keeps the kernel's tables."""
    values: Dict[str, int] = {}
    running = {"ES": 0x2B, "CS": 0x10, "SS": 0x18, "DS": 0x2B, "FS": 0x53, "GS": 0x2B, "LDTR": 0}
    for name in SEGMENTS:
        selector = running[name] & 0xFFF8
        base, limit, rights = descriptor(selector, GDT64)
        values.update({f"GUEST_{name}_SELECTOR": selector, f"GUEST_{name}_BASE": base, f"GUEST_{name}_LIMIT": limit,
                       f"GUEST_{name}_AR_BYTES": rights})
        if name != "LDTR":
            values[f"HOST_{name}_SELECTOR"] = selector
    values.update({
        "GUEST_TR_SELECTOR": 0x40, "GUEST_TR_BASE": KERNEL64 + TSS, "GUEST_TR_LIMIT": 0x67, "GUEST_TR_AR_BYTES": 0x8B,
        "GUEST_CR0": 0x80050033, "GUEST_CR3": PML4, "GUEST_CR4": 0x2620, "GUEST_DR7": 0x400, "GUEST_RFLAGS": 0x246,
        "GUEST_RSP": KERNEL64 + 0x9400, "GUEST_RIP": KERNEL64 + GUEST_CODE, "VMCS_LINK_POINTER": 0xFFFFFFFFFFFFFFFF,
        "GUEST_IA32_DEBUGCTL": 0, "GUEST_IA32_PAT": 0x0007010600070106, "GUEST_IA32_EFER": 0xD01,
        "GUEST_FS_BASE": 0, "GUEST_GS_BASE": KERNEL64 + 0x18000, "GUEST_SYSENTER_CS": 0, "GUEST_SYSENTER_ESP": 0, "GUEST_SYSENTER_EIP": 0,
        "GUEST_GDTR_BASE": KERNEL64 + 0x19000, "GUEST_GDTR_LIMIT": 0x57, "GUEST_IDTR_BASE": KERNEL64 + 0x1A000, "GUEST_IDTR_LIMIT": 0xFFF,
        "HOST_TR_SELECTOR": 0x40, "HOST_TR_BASE": KERNEL64 + TSS, "HOST_CR0": 0x80050033, "HOST_CR3": PML4, "HOST_CR4": 0x2620,
        "HOST_RSP": KERNEL64 + 0x9000 + 0xE00, "HOST_RIP": KERNEL64 + HOST_CODE, "HOST_IA32_PAT": 0x0007010600070106, "HOST_IA32_EFER": 0xD01,
        "HOST_FS_BASE": 0, "HOST_GS_BASE": 0x000000C5A1B70000,      # read from IA32_KERNEL_GS_BASE in ring 0: the user's block
        "HOST_IA32_SYSENTER_CS": 0, "HOST_IA32_SYSENTER_ESP": 0, "HOST_IA32_SYSENTER_EIP": 0,
        "HOST_GDTR_BASE": KERNEL64 + 0x19000, "HOST_IDTR_BASE": KERNEL64 + 0x1A000,
        "PIN_BASED_VM_EXEC_CONTROL": adjusted(worker, 0, 0x48D), "CPU_BASED_VM_EXEC_CONTROL": adjusted(worker, 1 << 31 | 1 << 28, 0x48E),
        "SECONDARY_VM_EXEC_CONTROL": adjusted(worker, 0, 0x48B), "MSR_BITMAP": MSR_BITMAP,
        "VM_EXIT_CONTROLS": adjusted(worker, 1 << 9 | 1 << 15, 0x48F), "VM_ENTRY_CONTROLS": adjusted(worker, 1 << 9, 0x490),
    })
    return values


def pae_32(worker: Worker) -> Dict[str, int]:
    """A driver on 32-bit Windows with PAE: no secondary controls, every data segment left unusable for the guest's code to load."""
    stack = KERNEL32 + 0x9000      # one page was allocated
    selectors = {"ES": 0x20, "CS": 0x08, "SS": 0x10, "DS": 0x20, "FS": 0x30, "GS": 0}
    values: Dict[str, int] = {}
    for name, selector in selectors.items():
        values.update({f"GUEST_{name}_SELECTOR": selector, f"HOST_{name}_SELECTOR": selector, f"GUEST_{name}_AR_BYTES": 0x10000})
    values.update({
        "GUEST_CS_AR_BYTES": 0xC09B, "GUEST_CS_LIMIT": 0xFFFFFFFF, "GUEST_LDTR_AR_BYTES": 0x10000,
        "GUEST_TR_SELECTOR": 0x28, "GUEST_TR_AR_BYTES": 0x8B, "GUEST_TR_BASE": KERNEL32 + 0x42000, "GUEST_TR_LIMIT": 0x20AB,
        "GUEST_CR0": 0x80010031, "GUEST_CR3": PAE_PDPT, "GUEST_CR4": 0x2020 | 0x6D8, "GUEST_DR7": 0x400, "GUEST_RFLAGS": 0x2,
        "GUEST_RSP": stack + 0x1000, "GUEST_RIP": KERNEL32 + GUEST_CODE, "VMCS_LINK_POINTER": 0xFFFFFFFFFFFFFFFF, "GUEST_IA32_DEBUGCTL": 0,
        "GUEST_GDTR_BASE": KERNEL32 + 0x3F000, "GUEST_GDTR_LIMIT": 0x3FF, "GUEST_IDTR_BASE": KERNEL32 + 0x3F400, "GUEST_IDTR_LIMIT": 0x7FF,
        "GUEST_SYSENTER_CS": 8, "GUEST_SYSENTER_ESP": 0xF78A6000, "GUEST_SYSENTER_EIP": 0x8053E540,
        "HOST_CR0": 0x80010031, "HOST_CR3": PAE_PDPT, "HOST_CR4": 0x2020 | 0x6D8, "HOST_TR_SELECTOR": 0x28, "HOST_TR_BASE": KERNEL32 + 0x42000,
        "HOST_GDTR_BASE": KERNEL32 + 0x3F000, "HOST_IDTR_BASE": KERNEL32 + 0x3F400,
        "HOST_IA32_SYSENTER_CS": 8, "HOST_IA32_SYSENTER_ESP": 0xF78A6000, "HOST_IA32_SYSENTER_EIP": 0x8053E540,
        "HOST_RSP": stack + 0x2000, "HOST_RIP": KERNEL32 + HOST_CODE,       # a page above what was allocated
        "PIN_BASED_VM_EXEC_CONTROL": adjusted(worker, 0, 0x481), "CPU_BASED_VM_EXEC_CONTROL": adjusted(worker, 0, 0x482),
        "VM_EXIT_CONTROLS": adjusted(worker, 0, 0x483), "VM_ENTRY_CONTROLS": adjusted(worker, 0, 0x484),
    })
    return values


def run(worker: Worker, values: Mapping[str, int], bits: int, memory: Mapping[int, bytes]) -> Tuple[Any, Vmcs, Any, Dict[str, Any]]:
    """(the processor's outcome, the VMCS, capabilities, arguments of the checks); fields that were never written are 0."""
    by_encoding = {vmcs_fields.find(name).encoding: value for name, value in values.items()}
    full = {encoding: by_encoding.get(encoding, 0) for encoding in worker.layout if encoding in vmcs_fields.fields()}
    memory = {**KERNEL_MAP, GUEST_CODE: b"\x0f\xa2\xf4", **memory}      # the guest executes CPUID, which always exits
    outcome = worker.launch_many([Case(full, memory=memory, host=f"{bits}-bit")])[0]
    given = {"memory": ModelMemory(worker.memory, memory), "vmcs_address": VMCS, "host_long_mode": bits == 64}
    return outcome, Vmcs.from_values(full), capabilities(worker), given


@dataclass(frozen=True)
class Mistake:
    """`changes` to what the notes write; the processor's answer; the checks that must be named."""

    title: str
    changes: Mapping[str, int]
    outcome: Tuple[object, ...]
    failing: Sequence[str]
    hint: str = ""
    memory: Mapping[int, bytes] = field(default_factory=dict)


MISTAKES_64: Sequence[Mistake] = (
    Mistake("exit controls adjusted from 0, without host address-space size", {"VM_EXIT_CONTROLS": 0x36DFB}, ("VMfailValid", 8),
            ["host.size.long", "host.size.guest", "host.size.rip"], "bit 9"),
    Mistake("entry controls adjusted from 0, without IA-32e mode guest", {"VM_ENTRY_CONTROLS": 0x11FB}, ("entry-failure", 33, 0),
            ["guest.rip.high", "guest.pdptes"]),
    Mistake("host selectors as read, with their RPL", {"HOST_DS_SELECTOR": 0x2B, "HOST_ES_SELECTOR": 0x2B, "HOST_FS_SELECTOR": 0x53,
                                                       "HOST_GS_SELECTOR": 0x2B},
            ("VMfailValid", 8), ["host.ds.selector", "host.es.selector", "host.fs.selector", "host.gs.selector"], "0xf8"),
    Mistake("the address of a flags variable written instead of the flags", {"GUEST_RFLAGS": KERNEL64 + 0x9F28}, ("entry-failure", 33, 0),
            ["guest.rflags.reserved"], "pointer"),
    Mistake("a null LDTR without the unusable bit", {"GUEST_LDTR_AR_BYTES": 0}, ("entry-failure", 33, 0),
            ["guest.ldtr.type", "guest.ldtr.p"], "0x10000"),
    Mistake("limit bits 19:16 left in the access rights", {"GUEST_ES_AR_BYTES": 0xCFF3}, ("entry-failure", 33, 0), ["guest.es.reserved"], "11:8"),
    Mistake("the descriptor's 20-bit limit with granularity", {"GUEST_DS_LIMIT": 0xFFFFE}, ("entry-failure", 33, 0), ["guest.ds.granularity"],
            "bytes"),
    Mistake("TR taken as an available TSS", {"GUEST_TR_AR_BYTES": 0x89}, ("entry-failure", 33, 0), ["guest.tr.type"], "busy"),
    Mistake("the MSR bitmap's linear address", {"MSR_BITMAP": KERNEL64 + MSR_BITMAP}, ("VMfailValid", 7), ["controls.msr_bitmap"], "physical"),
    Mistake("VMXE missing in the guest's CR4", {"GUEST_CR4": 0x620}, ("entry-failure", 33, 0), ["guest.cr4"], "read shadow"),
    Mistake("VPID enabled and never written", {"SECONDARY_VM_EXEC_CONTROL": 1 << 5}, ("VMfailValid", 7), ["controls.vpid"], "from 1"),
)

MISTAKES_32: Sequence[Mistake] = (
    Mistake("the high half of the link pointer forgotten", {"VMCS_LINK_POINTER": 0xFFFFFFFF}, ("entry-failure", 33, 4),
            ["guest.link_pointer"], "only the low half"),
    Mistake("PDPTEs with R/W and U/S as in other tables", {}, ("entry-failure", 33, 2), ["guest.pdptes"], "R/W",
            {PAE_PDPT: struct.pack("<4Q", 0x3007, 0x3007, 0x3007, 0x3007)}),
    Mistake("host selectors with RPL 3", {"HOST_DS_SELECTOR": 0x23, "HOST_ES_SELECTOR": 0x23}, ("VMfailValid", 8), ["host.ds.selector",
                                                                                                                    "host.es.selector"], "0xf8"),
    Mistake("a host without SS", {"HOST_SS_SELECTOR": 0}, ("VMfailValid", 8), ["host.ss.null"]),
    Mistake("64-bit controls in a 32-bit driver", {"VM_EXIT_CONTROLS": 0x36FFF}, ("VMfailValid", 8), ["host.size.legacy"]),
    Mistake("CR0.NE missing", {"GUEST_CR0": 0x80010011}, ("entry-failure", 33, 0), ["guest.cr0"], "NE"),
    Mistake("controls not adjusted at all", {"PIN_BASED_VM_EXEC_CONTROL": 0, "VM_ENTRY_CONTROLS": 0}, ("VMfailValid", 7),
            ["controls.pin.allowed", "controls.entry.allowed"], "low half"),
)


def check_mistake(worker: Worker, values: Mapping[str, int], bits: int, mistake: Mistake) -> None:
    outcome, vmcs, caps, given = run(worker, {**values, **mistake.changes}, bits, mistake.memory)
    expected = (outcome.kind, outcome.number, outcome.qualification)[:len(mistake.outcome)]
    assert expected == mistake.outcome
    assert predict_vm_entry(vmcs, caps, **given) == mistake.outcome
    failed = [finding for finding in check_vm_entry(vmcs, caps, **given) if finding.failed]
    assert [finding.id for finding in failed] == list(mistake.failing)
    assert mistake.hint in " ".join(finding.hint for finding in failed)


def test_thin_hypervisor_enters(vmx_worker: Worker) -> None:
    """Nothing stops the entry, and the first CPUID exits."""
    outcome, vmcs, caps, given = run(vmx_worker, thin_64(vmx_worker), 64, {})
    assert (outcome.kind, outcome.number) == ("exit", 10)
    assert predict_vm_entry(vmcs, caps, **given) == "enters"


def test_thin_hypervisor_s_later_trouble_is_named(vmx_worker: Worker) -> None:
    _, vmcs, caps, given = run(vmx_worker, thin_64(vmx_worker), 64, {})
    lints = [finding.id for finding in lint_vm_entry(vmcs, caps, given["memory"]) if finding.failed]
    assert lints == ["lint.instruction.rdtscp", "lint.instruction.invpcid", "lint.instruction.xsaves", "lint.stack.shared", "lint.host_gs.user",
                     "lint.host_gdtr.limit", "lint.cr4.vmxe", "lint.cr0.ne"]


@pytest.mark.parametrize("mistake", MISTAKES_64, ids=[mistake.title for mistake in MISTAKES_64])
def test_mistake_of_the_64_bit_driver(vmx_worker: Worker, mistake: Mistake) -> None:
    check_mistake(vmx_worker, thin_64(vmx_worker), 64, mistake)


def test_pae_driver_enters(vmx_worker: Worker) -> None:
    """The PDPTEs come from memory at CR3: there is no EPT."""
    outcome, vmcs, caps, given = run(vmx_worker, pae_32(vmx_worker), 32, {})
    assert (outcome.kind, outcome.number) == ("exit", 10)
    assert predict_vm_entry(vmcs, caps, **given) == "enters"
    without_memory = {**given, "memory": None}
    assert predict_vm_entry(vmcs, caps, **without_memory) == ("undecided", "enters", (f"memory at {PAE_PDPT:#x}",))


def test_pae_driver_s_later_trouble_is_named(vmx_worker: Worker) -> None:
    _, vmcs, caps, given = run(vmx_worker, pae_32(vmx_worker), 32, {})
    lints = [finding.id for finding in lint_vm_entry(vmcs, caps, given["memory"]) if finding.failed]
    assert lints == ["lint.instruction.rdtscp", "lint.instruction.invpcid", "lint.instruction.xsaves", "lint.default1", "lint.stack.close",
                     "lint.host_fs.zero",
                     "lint.host_gdtr.limit", "lint.host_tr.limit", "lint.cr4.vmxe", "lint.cr0.ne", "lint.ss.unusable", "lint.ds.unusable"]


@pytest.mark.parametrize("mistake", MISTAKES_32, ids=[mistake.title for mistake in MISTAKES_32])
def test_mistake_of_the_32_bit_driver(vmx_worker: Worker, mistake: Mistake) -> None:
    check_mistake(vmx_worker, pae_32(vmx_worker), 32, mistake)
