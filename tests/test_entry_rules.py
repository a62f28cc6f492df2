"""Every VM-entry rule has one VMCS that passes it and one that fails only it; every row of the inventory has a rule or a reason."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import pytest
from support.vmxcpu.guests import baseline

from vtdbg import bits
from vtdbg.findings import Finding
from vtdbg.memory.base import memory_from_segments
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.capabilities import WORD_SOURCES, VmxCapabilities
from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.entry import check_vm_entry, predict_vm_entry
from vtdbg.vmx.entry import launch as launch_rules
from vtdbg.vmx.entry.predict import UNDECIDABLE, all_rules, rule
from vtdbg.vmx.vmcs import Vmcs

Control = Tuple[str, str]
REVISION, PAGE, LIST, LINKED = 0x11, 0x18000, 0x19000, 0x1A000
HIGH, BAD_LINEAR = 1 << 46, 0x800000000000


def every_capability() -> Dict[int, int]:
    """A processor that supports every control, with the default1 bits that real ones have."""
    msrs = {0x480: REVISION | 4096 << 32 | 6 << 50 | 1 << 54 | 1 << 55 | 1 << 58, 0x485: 4 << 16 | 7 << 6,
            0x486: 0x80000021, 0x487: 0xFFFFFFFF, 0x488: 0x2000, 0x489: bits.table("cr4").kind_mask("flag") & ~bits.table("cr4")["LA57"].mask,
            0x48C: bits.table("ept_vpid_cap").kind_mask("flag") & ~bits.table("ept_vpid_cap")["WALK_5"].mask | 10 << 48}
    must = {"pin": 0x16, "proc": 0x04006172, "exit": 0x36DFB, "entry": 0x11FB}
    for word, source in WORD_SOURCES.items():
        may = bits.table(word).kind_mask("flag", "default1")
        value = must.get(word, 0) | may << 32 if source.halves else may
        for index in (source.msr, source.true_msr):
            if index is not None:
                msrs[index] = value
    return msrs


CPUID: Mapping[Tuple[int, int], Tuple[int, int, int, int]] = {
    (7, 0): (2, 1 << 2 | 1 << 11, 1 << 24, 1 << 26 | 1 << 31), (7, 2): (0, 0, 0, 0x1F), (0xA, 0): (4 << 8 | 4, 0, 0, 3),
    (0x14, 0): (0, 0x7F, 0xF, 0),
}
"""SGX, RTM, bus-lock exceptions, SPEC_CTRL features; four general and three fixed counters; Intel PT without event trace and TNT disable."""

GOOD: Mapping[str, int] = {
    **dict.fromkeys(("IO_BITMAP_A", "IO_BITMAP_B", "MSR_BITMAP", "VIRTUAL_APIC_PAGE_ADDR", "APIC_ACCESS_ADDR", "POSTED_INTR_DESC_ADDR",
        "PML_ADDRESS", "SPPTP", "EPTP_LIST_ADDRESS", "VMREAD_BITMAP", "VMWRITE_BITMAP", "VE_INFORMATION_ADDRESS", "HLATP",
        "LOW_PASID_DIRECTORY_ADDR", "HIGH_PASID_DIRECTORY_ADDR", "PID_POINTER_TABLE", "VM_EXIT_MSR_STORE_ADDR", "VM_EXIT_MSR_LOAD_ADDR"),
        PAGE),
    "VIRTUAL_PROCESSOR_ID": 1, "EPT_POINTER": 0xE01E, "TSC_MULTIPLIER": 1 << 48, "VM_ENTRY_MSR_LOAD_ADDR": LIST,
    "HOST_IA32_FRED_CONFIG": 0x1000, "GUEST_IA32_FRED_CONFIG": 0x1000,
}


def page(data: bytes) -> bytes:
    return data.ljust(4096, b"\0")


MEMORY = {PAGE: page(b""), LIST: page(struct.pack("<IIQ", 0xC0000082, 0, 0x1000)), LINKED: page(struct.pack("<I", REVISION)),
          0x14000: page(struct.pack("<4Q", 0x3001, 0, 0x3001, 0))}


@dataclass(frozen=True)
class Row:
    """`setup` and `on` make a VMCS that passes; `bad`, `turn_on` and `turn_off` make it fail `id` (and `also`, which say the same)."""

    id: str
    bad: Mapping[str, int] = field(default_factory=dict)
    on: Sequence[Control] = ()
    turn_on: Sequence[Control] = ()
    turn_off: Sequence[Control] = ()
    setup: Mapping[str, int] = field(default_factory=dict)
    mode: str = "64-bit"
    host: str = "64-bit"
    also: Sequence[str] = ()
    caps: Mapping[int, int] = field(default_factory=dict)
    cpuid: Mapping[Tuple[int, int], Tuple[int, int, int, int]] = field(default_factory=dict)
    memory: Mapping[int, bytes] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    bad_given: Mapping[str, Any] = field(default_factory=dict)


EPT, TPR, VID = ("sec", "EPT"), ("proc", "VIRTUAL_TPR"), ("sec", "VIRT_INTR_DELIVERY")
MTF_LESS = {index: every_capability()[index] & ~(1 << 59) for index in (0x482, 0x48E)}
INFO, RFLAGS = "VM_ENTRY_INTR_INFO_FIELD", "GUEST_RFLAGS"
VALID = 1 << 31


RING3 = {"GUEST_CS_SELECTOR": 0x33, "GUEST_CS_AR_BYTES": 0xA0FB, "GUEST_SS_SELECTOR": 0x2B, "GUEST_SS_AR_BYTES": 0xC0F3}


def address_rows() -> List[Row]:
    table: Sequence[Tuple[str, str, Sequence[Control]]] = (
        ("controls.io_bitmap_a", "IO_BITMAP_A", [("proc", "USE_IO_BITMAPS")]), ("controls.io_bitmap_b", "IO_BITMAP_B", [("proc", "USE_IO_BITMAPS")]),
        ("controls.msr_bitmap", "MSR_BITMAP", [("proc", "USE_MSR_BITMAPS")]), ("controls.virtual_apic", "VIRTUAL_APIC_PAGE_ADDR", [TPR]),
        ("controls.apic_access", "APIC_ACCESS_ADDR", [("sec", "VIRT_APIC_ACCESSES")]),
        ("controls.pml.address", "PML_ADDRESS", [EPT, ("sec", "PAGE_MOD_LOGGING")]),
        ("controls.posted.descriptor", "POSTED_INTR_DESC_ADDR",
         [("pin", "POSTED_INTR"), ("pin", "INTR_EXITING"), TPR, VID, ("exit", "ACK_INTR_ON_EXIT")]),
        ("controls.sub_page_write.table", "SPPTP", [EPT, ("sec", "SUB_PAGE_WRITE")]),
        ("controls.eptp_switching.list", "EPTP_LIST_ADDRESS", [EPT, ("sec", "VMFUNC"), ("vmfunc", "EPTP_SWITCHING")]),
        ("controls.shadow.vmread", "VMREAD_BITMAP", [("sec", "SHADOW_VMCS")]), ("controls.shadow.vmwrite", "VMWRITE_BITMAP", [("sec",
                                                                                                                               "SHADOW_VMCS")]),
        ("controls.ve_information", "VE_INFORMATION_ADDRESS", [("sec", "EPT_VIOLATION_VE")]),
        ("controls.pasid.low", "LOW_PASID_DIRECTORY_ADDR", [("sec", "PASID_TRANSLATION")]),
        ("controls.pasid.high", "HIGH_PASID_DIRECTORY_ADDR", [("sec", "PASID_TRANSLATION")]),
    )
    rows = [Row(one, {name: PAGE + 0x20}, on=on) for one, name, on in table]
    rows += [Row(one, {name: HIGH | PAGE}, on=on) for one, name, on in table]
    ipi = [("proc", "TERTIARY_CONTROLS"), ("tert", "IPI_VIRT"), TPR]
    rows += [Row("controls.ipi_virtualization.table", {"PID_POINTER_TABLE": PAGE + 4}, on=ipi),
             Row("controls.ipi_virtualization.last", {"PID_POINTER_TABLE": HIGH - 4096, "LAST_PID_POINTER_INDEX": 512}, on=ipi),
             Row("controls.hlat.pointer", {"HLATP": PAGE | 1}, on=[("proc", "TERTIARY_CONTROLS"), ("tert", "HLAT"), EPT])]
    for kind, name in (("exit_msr_store", "VM_EXIT_MSR_STORE"), ("exit_msr_load", "VM_EXIT_MSR_LOAD")):
        rows += [Row(f"controls.{kind}", {f"{name}_ADDR": PAGE + 8}, setup={f"{name}_COUNT": 1}),
                 Row(f"controls.{kind}", {f"{name}_ADDR": HIGH - 16}, setup={f"{name}_COUNT": 2, f"{name}_ADDR": HIGH - 32})]
    rows.append(Row("controls.entry_msr_load", {"VM_ENTRY_MSR_LOAD_ADDR": LIST + 8}, setup={"VM_ENTRY_MSR_LOAD_COUNT": 1},
                    memory={LIST: page(struct.pack("<QQIIQ", 0x10, 0x10, 0x10, 0, 0))}))
    return rows


def needs_rows() -> List[Row]:
    tert = [("proc", "TERTIARY_CONTROLS")]
    table: Sequence[Tuple[str, Sequence[Control], Control]] = (
        ("controls.virtual_nmis", [("pin", "VIRTUAL_NMIS"), ("pin", "NMI_EXITING")], ("pin", "NMI_EXITING")),
        ("controls.nmi_window", [("proc", "NMI_WINDOW_EXITING"), ("pin", "NMI_EXITING"), ("pin", "VIRTUAL_NMIS")], ("pin", "VIRTUAL_NMIS")),
        ("controls.x2apic.tpr_shadow", [("sec", "VIRTUAL_X2APIC"), TPR], TPR), ("controls.apic_register.tpr_shadow", [("sec", "APIC_REGISTER_VIRT"),
                                                                                                                      TPR], TPR),
        ("controls.interrupt_delivery.tpr_shadow", [VID, ("pin", "INTR_EXITING"), TPR], TPR),
        ("controls.ipi_virtualization.tpr_shadow", [*tert, ("tert", "IPI_VIRT"), TPR], TPR),
        ("controls.interrupt_delivery.exiting", [VID, TPR, ("pin", "INTR_EXITING")], ("pin", "INTR_EXITING")),
        ("controls.posted.delivery", [("pin", "POSTED_INTR"), ("pin", "INTR_EXITING"), TPR, VID, ("exit", "ACK_INTR_ON_EXIT")], VID),
        ("controls.posted.acknowledge", [("pin", "POSTED_INTR"),
        ("pin", "INTR_EXITING"), TPR, VID, ("exit", "ACK_INTR_ON_EXIT")], ("exit", "ACK_INTR_ON_EXIT")),
        ("controls.pml.ept", [EPT, ("sec", "PAGE_MOD_LOGGING")], EPT), ("controls.unrestricted_guest.ept", [EPT, ("sec", "UNRESTRICTED_GUEST")], EPT),
        ("controls.mode_based_execute.ept", [EPT, ("sec", "MODE_BASED_EPT_EXEC")], EPT),
        ("controls.sub_page_write.ept", [EPT, ("sec", "SUB_PAGE_WRITE")], EPT),
        ("controls.eptp_switching.ept", [EPT, ("sec", "VMFUNC"), ("vmfunc", "EPTP_SWITCHING")], EPT),
        ("controls.hlat.ept", [*tert, ("tert", "HLAT"), EPT], EPT), ("controls.paging_write.ept", [*tert, ("tert", "EPT_PAGING_WRITE_CONTROL"), EPT],
                                                                     EPT),
        ("controls.paging_verification.ept", [*tert, ("tert", "GUEST_PAGING_VERIFICATION"), EPT], EPT),
        ("controls.apic_timer.delivery", [*tert, ("tert", "APIC_TIMER_VIRT"), TPR, VID, ("pin", "INTR_EXITING")], VID),
        ("controls.preemption_timer.save", [("exit", "SAVE_VMX_PREEMPTION_TIMER"), ("pin", "PREEMPTION_TIMER")], ("pin", "PREEMPTION_TIMER")),
    )
    rows = [Row(one, on=on, turn_off=[needed]) for one, on, needed in table]
    pt = [("sec", "PT_USE_GPA"), EPT, ("entry", "LOAD_IA32_RTIT_CTL"), ("exit", "CLEAR_IA32_RTIT_CTL")]
    rows += [Row("controls.pt_guest_physical.ept", on=pt, turn_off=[EPT]), Row("controls.pt_guest_physical.load", on=pt, turn_off=[pt[2]]),
             Row("controls.pt_guest_physical.clear", on=pt, turn_off=[pt[3]]),
             Row("controls.x2apic.apic_access", on=[("sec", "VIRTUAL_X2APIC"), TPR], turn_on=[("sec", "VIRT_APIC_ACCESSES")])]
    return rows


def control_rows() -> List[Row]:
    tert, posted = ("proc", "TERTIARY_CONTROLS"), [("pin", "POSTED_INTR"), ("pin", "INTR_EXITING"), TPR, VID, ("exit", "ACK_INTR_ON_EXIT")]
    cap = every_capability()[0x48C]

    def without(ident: str) -> Dict[int, int]:
        return {0x48C: cap & ~bits.table("ept_vpid_cap")[ident].mask}

    return [
        Row("controls.pin.allowed", {"PIN_BASED_VM_EXEC_CONTROL": 0}), Row("controls.pin.allowed", {"PIN_BASED_VM_EXEC_CONTROL": 0x116}),
        Row("controls.proc.allowed", {"CPU_BASED_VM_EXEC_CONTROL": 0x04006173}), Row("controls.sec.allowed", {"SECONDARY_VM_EXEC_CONTROL": 1 << 29}),
        Row("controls.tert.allowed", {"TERTIARY_VM_EXEC_CONTROL": 1 << 40}, on=[tert]), Row("controls.cr3_targets", {"CR3_TARGET_COUNT": 5},
                                                                                            setup={"CR3_TARGET_COUNT": 4}),
        Row("controls.tpr_threshold.reserved", {"TPR_THRESHOLD": 0x10}, on=[TPR]),
        Row("controls.tpr_threshold.vtpr", {"TPR_THRESHOLD": 4}, on=[TPR], setup={"TPR_THRESHOLD": 3},
            memory={PAGE: bytes(0x80) + b"\x30" + bytes(0xF7F)}),
        Row("controls.posted.vector", {"POSTED_INTR_NV": 0x100}, on=posted, setup={"POSTED_INTR_NV": 0xFF}),
        Row("controls.vpid", {"VIRTUAL_PROCESSOR_ID": 0}, on=[("sec", "VPID")]),
        Row("controls.eptp.memory_type", {"EPT_POINTER": 0xE01C}, on=[EPT]), Row("controls.eptp.memory_type", {"EPT_POINTER": 0xE018}, on=[EPT],
                                                                                 caps=without("UC")),
        Row("controls.eptp.walk_length", {"EPT_POINTER": 0xE016}, on=[EPT]), Row("controls.eptp.walk_length", {"EPT_POINTER": 0xE026}, on=[EPT]),
        Row("controls.eptp.ad", {"EPT_POINTER": 0xE05E}, on=[EPT], caps=without("AD")), Row("controls.eptp.sss", {"EPT_POINTER": 0xE09E}, on=[EPT],
                                                                                            caps=without("SSS")),
        Row("controls.eptp.reserved", {"EPT_POINTER": 0xE81E}, on=[EPT]), Row("controls.eptp.reserved", {"EPT_POINTER": HIGH | 0xE01E}, on=[EPT]),
        Row("controls.vmfunc.allowed", {"VM_FUNCTION_CONTROL": 2}, on=[("sec", "VMFUNC")]),
        Row("controls.tsc_multiplier", {"TSC_MULTIPLIER": 0}, on=[("sec", "TSC_SCALING")]),
        Row("controls.hlat.prefix", {"HLAT_PREFIX_SIZE": 11}, on=[tert, ("tert", "HLAT"), EPT], setup={"HLAT_PREFIX_SIZE": 10}),
        Row("controls.apic_timer.vector", {"GUEST_APIC_TIMER_VECTOR": 0x100}, on=[tert, ("tert", "APIC_TIMER_VIRT"), TPR, VID, ("pin",
                                                                                                                                "INTR_EXITING")]),
        Row("controls.exit.allowed", {"VM_EXIT_CONTROLS": 0x236FFA}), Row("controls.exit2.allowed", {"SECONDARY_VM_EXIT_CONTROLS": 1 << 9},
                                                                          on=[("exit", "ACTIVATE_SECONDARY_CONTROLS")]),
        Row("controls.entry.allowed", {"VM_ENTRY_CONTROLS": 0x93FB | 1 << 30}),
        Row("controls.event.type", {INFO: VALID | 1 << 8 | 3}), Row("controls.event.type", {INFO: VALID | 7 << 8}, caps=MTF_LESS),
        Row("controls.event.vector", {INFO: VALID | 2 << 8 | 3}, setup={INFO: VALID | 2 << 8 | 2}), Row("controls.event.vector",
                                                                                                        {INFO: VALID | 3 << 8 | 32}),
        Row("controls.event.vector", {INFO: VALID | 7 << 8 | 1}, setup={INFO: VALID | 7 << 8}),
        Row("controls.event.error_code", {INFO: VALID | 3 << 8 | 13}, setup={INFO: VALID | 1 << 11 | 3 << 8 | 13}),
        Row("controls.event.error_code", {INFO: VALID | 1 << 11 | 3 << 8 | 6}, setup={INFO: VALID | 3 << 8 | 6}),
        Row("controls.event.error_code", {INFO: VALID | 1 << 11 | 3 << 8 | 13}, setup={INFO: VALID | 3 << 8 | 13}, mode="real"),
        Row("controls.event.error_code", {INFO: VALID | 1 << 11 | 2 << 8 | 2}),
        Row("controls.event.reserved", {INFO: VALID | 1 << 12 | 3 << 8 | 6}, setup={INFO: VALID | 1 << 13 | 3 << 8 | 6}),
        Row("controls.event.error_code_bits", {"VM_ENTRY_EXCEPTION_ERROR_CODE": 0x10000}, setup={INFO: VALID | 1 << 11 | 3 << 8 | 13}),
        Row("controls.event.length", {"VM_ENTRY_INSTRUCTION_LEN": 0}, setup={INFO: VALID | 4 << 8 | 0x80, "VM_ENTRY_INSTRUCTION_LEN": 2}),
        Row("controls.event.length", {"VM_ENTRY_INSTRUCTION_LEN": 16}, setup={INFO: VALID | 6 << 8 | 3, "VM_ENTRY_INSTRUCTION_LEN": 15}),
        Row("controls.smm", turn_on=[("entry", "DEACT_DUAL_MONITOR")]),
    ]


def host_rows() -> List[Row]:
    rows = [
        Row("host.cr0", {"HOST_CR0": 0x80050013}), Row("host.cr4", {"HOST_CR4": 0x620}), Row("host.cr4", {"HOST_CR4": 0xA620}),
        Row("host.cr4.cet", {"HOST_CR0": 0x80040033}, setup={"HOST_CR4": 0x802620}), Row("host.cr3", {"HOST_CR3": HIGH | 0x1000}),
        Row("host.cr3", {"HOST_CR3": 1 << 61 | 0x1000}, caps={0x489: every_capability()[0x489] & ~bits.table("cr4")["LAM_SUP"].mask}),
        Row("host.perf_global_ctrl", {"HOST_IA32_PERF_GLOBAL_CTRL": 0x10}, on=[("exit", "LOAD_IA32_PERF_GLOBAL_CTRL")],
            setup={"HOST_IA32_PERF_GLOBAL_CTRL": 0x70000000F}),
        Row("host.pat", {"HOST_IA32_PAT": 0x0007040600070402}, on=[("exit", "LOAD_IA32_PAT")]),
        Row("host.efer.reserved", {"HOST_IA32_EFER": 0xD03}), Row("host.efer.long_mode", {"HOST_IA32_EFER": 0xC01}),
        Row("host.s_cet", {"HOST_S_CET": 0x40}, on=[("exit", "LOAD_CET_STATE")]), Row("host.s_cet", {"HOST_S_CET": 0xC00}, on=[("exit",
                                                                                                                                "LOAD_CET_STATE")]),
        Row("host.s_cet.address", {"HOST_S_CET": BAD_LINEAR}, on=[("exit", "LOAD_CET_STATE")]),
        Row("host.ssp_table", {"HOST_INTR_SSP_TABLE": BAD_LINEAR}, on=[("exit", "LOAD_CET_STATE")]),
        Row("host.ssp", {"HOST_SSP": 0x1002}, on=[("exit", "LOAD_CET_STATE")]),
        Row("host.ssp.address", {"HOST_SSP": BAD_LINEAR}, on=[("exit", "LOAD_CET_STATE")]),
        Row("host.ssp.address", {"HOST_SSP": 1 << 32}, on=[("exit", "LOAD_CET_STATE")], mode="PAE", host="PAE"),
        Row("host.pkrs", {"HOST_IA32_PKRS": 1 << 32}, on=[("exit", "LOAD_PKRS")]),
        Row("host.cs.null", {"HOST_CS_SELECTOR": 0}), Row("host.tr.null", {"HOST_TR_SELECTOR": 0}),
        Row("host.ss.null", {"HOST_SS_SELECTOR": 0}, mode="PAE", host="PAE"),
        Row("host.size.legacy", bad_given={"host_long_mode": False}, given={"host_long_mode": True}),
        Row("host.size.long", bad_given={"host_long_mode": True}, given={"host_long_mode": False}, mode="PAE", host="PAE"),
        Row("host.size.guest", turn_on=[("entry", "IA32E_MODE")], mode="PAE", host="PAE", also=("host.size.legacy",),
            setup={"GUEST_IA32_EFER": 0}, turn_off=[("entry", "LOAD_IA32_EFER")]),
        Row("host.size.pcide", {"HOST_CR4": 0x22620}, mode="PAE", host="PAE"), Row("host.size.rip", {"HOST_RIP": 1 << 32}, mode="PAE", host="PAE"),
        Row("host.size.pae", {"HOST_CR4": 0x2600}), Row("host.rip", {"HOST_RIP": BAD_LINEAR}),
    ]
    canonical = {"sysenter_esp": "HOST_IA32_SYSENTER_ESP", "sysenter_eip": "HOST_IA32_SYSENTER_EIP", "fs.base": "HOST_FS_BASE",
                 "gs.base": "HOST_GS_BASE",
                 "gdtr.base": "HOST_GDTR_BASE", "idtr.base": "HOST_IDTR_BASE", "tr.base": "HOST_TR_BASE"}
    rows += [Row(f"host.{one}", {name: BAD_LINEAR}, setup={name: 0xFFFF800000000000}) for one, name in canonical.items()]
    rows += [Row(f"host.{name.lower()}.selector", {f"HOST_{name}_SELECTOR": value}) for name in ("CS", "SS", "DS", "ES", "FS", "GS",
                                                                                                 "TR") for value in (0x1B, 0x1C)]
    exit2: List[Control] = [("exit", "ACTIVATE_SECONDARY_CONTROLS")]
    fred = [*exit2, ("exit2", "LOAD_IA32_FRED")]
    rows += [Row("host.spec_ctrl", {"HOST_IA32_SPEC_CTRL": 0x200}, on=[*exit2, ("exit2", "LOAD_IA32_SPEC_CTRL")], setup={"HOST_IA32_SPEC_CTRL": 5}),
             Row("host.fred.config", {"HOST_IA32_FRED_CONFIG": 4}, on=fred)]
    rows += [Row(f"host.fred.{name.lower()}", {f"HOST_IA32_FRED_{name}": value}, on=fred) for name, value in
             (("RSP1", 8), ("RSP2", BAD_LINEAR), ("RSP3", 0x20), ("SSP1", 4), ("SSP2", 1), ("SSP3", BAD_LINEAR))]
    return rows


def register_rows() -> List[Row]:
    fred = [("entry", "LOAD_IA32_FRED")]
    cet = [("entry", "LOAD_CET_STATE")]
    rows = [
        Row("guest.cr0", {"GUEST_CR0": 0x80050013}), Row("guest.cr0", {"GUEST_CR0": 0x50033}, mode="32-bit"),
        Row("guest.cr0.pg", {"GUEST_CR0": 0x80000030}, mode="real"),
        Row("guest.cr4", {"GUEST_CR4": 0x620}), Row("guest.cr4.cet", {"GUEST_CR0": 0x80040033}, setup={"GUEST_CR4": 0x802620}),
        Row("guest.debugctl", {"GUEST_IA32_DEBUGCTL": 8}, on=[("entry", "LOAD_DEBUG_CONTROLS")], setup={"GUEST_IA32_DEBUGCTL": 0x8007}),
        Row("guest.debugctl", {"GUEST_IA32_DEBUGCTL": 4}, on=[("entry", "LOAD_DEBUG_CONTROLS")], cpuid={(7, 0): (0, 0, 0, 0)}),
        Row("guest.dr7", {"GUEST_DR7": 1 << 32 | 0x400}, on=[("entry", "LOAD_DEBUG_CONTROLS")]),
        Row("guest.long_mode.pg", {"GUEST_CR0": 0x50033}, on=[EPT, ("sec", "UNRESTRICTED_GUEST")]), Row("guest.long_mode.pae", {"GUEST_CR4": 0x2600}),
        Row("guest.legacy.pcide", {"GUEST_CR4": 0x22610}, mode="32-bit"), Row("guest.legacy.fred", {"GUEST_CR4": 1 << 32 | 0x2610}, mode="32-bit",
                                                                              setup={**RING3, "GUEST_CS_AR_BYTES": 0xC0FB}),
        Row("guest.cr3", {"GUEST_CR3": HIGH | 0x1000}), Row("guest.sysenter_esp", {"GUEST_SYSENTER_ESP": BAD_LINEAR}),
        Row("guest.sysenter_eip", {"GUEST_SYSENTER_EIP": BAD_LINEAR}),
        Row("guest.perf_global_ctrl", {"GUEST_IA32_PERF_GLOBAL_CTRL": 1 << 35}, on=[("entry", "LOAD_IA32_PERF_GLOBAL_CTRL")]),
        Row("guest.pat", {"GUEST_IA32_PAT": 0x0307040600070406}, on=[("entry", "LOAD_IA32_PAT")]),
        Row("guest.efer.reserved", {"GUEST_IA32_EFER": 0x1D01}), Row("guest.efer.lma", {"GUEST_IA32_EFER": 0xD01 & ~0x500}),
        Row("guest.efer.lme", {"GUEST_IA32_EFER": 0xD01 & ~0x100}), Row("guest.bndcfgs", {"GUEST_BNDCFGS": 4}, on=[("entry", "LOAD_BNDCFGS")]),
        Row("guest.rtit_ctl", {"GUEST_IA32_RTIT_CTL": 1 << 18}, on=[("entry", "LOAD_IA32_RTIT_CTL")], setup={"GUEST_IA32_RTIT_CTL": 0x2000}),
        Row("guest.rtit_ctl", {"GUEST_IA32_RTIT_CTL": 1 << 55}, on=[("entry", "LOAD_IA32_RTIT_CTL")]),
        Row("guest.s_cet", {"GUEST_S_CET": 0xC00}, on=cet, setup={"GUEST_S_CET": 0x400}), Row("guest.ssp_table",
                                                                                              {"GUEST_INTR_SSP_TABLE": BAD_LINEAR}, on=cet),
        Row("guest.ssp", {"GUEST_SSP": 2}, on=cet), Row("guest.ssp.width", {"GUEST_SSP": 1 << 50}, on=cet, setup={"GUEST_SSP": BAD_LINEAR}),
        Row("guest.pkrs", {"GUEST_IA32_PKRS": 1 << 40}, on=[("entry", "LOAD_PKRS")]),
        Row("guest.lbr_ctl", {"GUEST_IA32_LBR_CTL": 0x10}, on=[("entry", "LOAD_GUEST_IA32_LBR_CTL")]),
        Row("guest.uinv", {"GUEST_UINV": 0x100}, on=[("entry", "LOAD_UINV")]),
        Row("guest.spec_ctrl", {"GUEST_IA32_SPEC_CTRL": 1 << 63}, on=[("entry", "LOAD_GUEST_IA32_SPEC_CTRL")], setup={"GUEST_IA32_SPEC_CTRL": 0x5FF}),
        Row("guest.fred.config", {"GUEST_IA32_FRED_CONFIG": 0x800}, on=fred),
        Row("guest.rip.high", {"GUEST_RIP": 1 << 32 | 0xB000}, mode="compatibility"), Row("guest.rip.width", {"GUEST_RIP": 1 << 48},
                                                                                          setup={"GUEST_RIP": BAD_LINEAR}),
        Row("guest.rflags.reserved", {RFLAGS: 0}), Row("guest.rflags.reserved", {RFLAGS: 0xFFFFF80012345002}), Row("guest.rflags.reserved",
                                                                                                                   {RFLAGS: 0x8002}),
        Row("guest.rflags.vm", {"GUEST_CR0": 0x30}, mode="virtual-8086", on=[EPT, ("sec", "UNRESTRICTED_GUEST")]),
        Row("guest.rflags.if", {RFLAGS: 2}, setup={INFO: VALID | 0x30, RFLAGS: 0x202}),
    ]
    rows += [Row(f"guest.fred.{name.lower()}", {f"GUEST_IA32_FRED_{name}": value}, on=fred) for name, value in
             (("RSP1", 8), ("RSP2", BAD_LINEAR), ("RSP3", 0x20), ("SSP1", 4), ("SSP2", 1), ("SSP3", BAD_LINEAR))]
    return rows


def segment_rows() -> List[Row]:
    rows: List[Row] = []
    for name in ("CS", "SS", "DS", "ES", "FS", "GS"):
        low, rights, limit, selector = name.lower(), f"GUEST_{name}_AR_BYTES", f"GUEST_{name}_LIMIT", f"GUEST_{name}_SELECTOR"
        good = 0xA09B if name == "CS" else 0xC093
        usable = {rights: good, limit: 0xFFFFFFFF, selector: 0x18}
        rows += [
            Row(f"guest.{low}.v86_base", {f"GUEST_{name}_BASE": 0x12340}, mode="virtual-8086"), Row(f"guest.{low}.v86_limit", {limit: 0xFFFFF},
                                                                                                    mode="virtual-8086"),
            Row(f"guest.{low}.v86_rights", {rights: 0x93}, mode="virtual-8086"),
            Row(f"guest.{low}.base", {f"GUEST_{name}_BASE": BAD_LINEAR if name in ("FS", "GS") else 1 << 32}, setup=usable),
            Row(f"guest.{low}.s", {rights: good & ~0x10}, setup=usable), Row(f"guest.{low}.p", {rights: good & ~0x80}, setup=usable),
            Row(f"guest.{low}.reserved", {rights: good | 0x100}, setup=usable), Row(f"guest.{low}.reserved", {rights: good | 1 << 20}, setup=usable),
            Row(f"guest.{low}.granularity", {limit: 0xFFFFF000}, setup=usable),
            Row(f"guest.{low}.granularity", {rights: good & ~0x8000, limit: 0x100000}, setup=usable),
        ]
        if name in ("DS", "ES", "FS", "GS"):
            rows += [Row(f"guest.{low}.type", {rights: 0xC092}, setup=usable), Row(f"guest.{low}.type", {rights: 0xC099}, setup=usable),
                     Row(f"guest.{low}.dpl", {selector: 0x1B}, setup=usable)]
    ldt = {"GUEST_LDTR_AR_BYTES": 0x82, "GUEST_LDTR_LIMIT": 0xFF, "GUEST_LDTR_SELECTOR": 0x28}
    restricted_free = [EPT, ("sec", "UNRESTRICTED_GUEST")]
    rows += [
        Row("guest.tr.ti", {"GUEST_TR_SELECTOR": 0x24}), Row("guest.ldtr.ti", {"GUEST_LDTR_SELECTOR": 0x2C}, setup=ldt),
        Row("guest.ss.rpl", {"GUEST_CS_SELECTOR": 0x30}, setup=RING3),
        Row("guest.ss.dpl", {"GUEST_SS_SELECTOR": 0x28, "GUEST_CS_SELECTOR": 0x30}, setup=RING3),
        Row("guest.ss.dpl_0", {"GUEST_CS_AR_BYTES": 0xC093}, setup={**RING3, "GUEST_CS_AR_BYTES": 0xC0FB}, mode="32-bit", on=restricted_free),
        Row("guest.tr.base", {"GUEST_TR_BASE": BAD_LINEAR}), Row("guest.ldtr.base", {"GUEST_LDTR_BASE": BAD_LINEAR}, setup=ldt),
        Row("guest.cs.type", {"GUEST_CS_AR_BYTES": 0xA091}), Row("guest.cs.type", {"GUEST_CS_AR_BYTES": 0xA09A}), Row("guest.cs.type",
                                                                                                                      {"GUEST_CS_AR_BYTES": 0xA093}),
        Row("guest.ss.type", {"GUEST_SS_AR_BYTES": 0xC091}),
        Row("guest.cs.dpl", {"GUEST_CS_AR_BYTES": 0xA0BB}), Row("guest.cs.dpl", {"GUEST_CS_AR_BYTES": 0xA0BF}),
        Row("guest.cs.dpl", {"GUEST_CS_AR_BYTES": 0xC0F3}, setup={"GUEST_CS_AR_BYTES": 0xC093}, mode="32-bit", on=restricted_free),
        Row("guest.cs.db", {"GUEST_CS_AR_BYTES": 0xE09B}),
        Row("guest.tr.usable", {"GUEST_TR_AR_BYTES": 0x1008B}), Row("guest.tr.type", {"GUEST_TR_AR_BYTES": 0x83}),
        Row("guest.tr.type", {"GUEST_TR_AR_BYTES": 0x89}, mode="32-bit"),
        Row("guest.tr.s", {"GUEST_TR_AR_BYTES": 0x9B}), Row("guest.tr.p", {"GUEST_TR_AR_BYTES": 0xB}), Row("guest.tr.reserved",
                                                                                                           {"GUEST_TR_AR_BYTES": 0x18B}),
        Row("guest.tr.granularity", {"GUEST_TR_AR_BYTES": 0x808B}), Row("guest.tr.granularity", {"GUEST_TR_LIMIT": 0x100067}),
        Row("guest.ldtr.type", {"GUEST_LDTR_AR_BYTES": 0x83}, setup=ldt), Row("guest.ldtr.s", {"GUEST_LDTR_AR_BYTES": 0x92}, setup=ldt),
        Row("guest.ldtr.p", {"GUEST_LDTR_AR_BYTES": 2}, setup=ldt), Row("guest.ldtr.reserved", {"GUEST_LDTR_AR_BYTES": 0x482}, setup=ldt),
        Row("guest.ldtr.granularity", {"GUEST_LDTR_AR_BYTES": 0x8082}, setup=ldt),
        Row("guest.gdtr.base", {"GUEST_GDTR_BASE": BAD_LINEAR}), Row("guest.idtr.base", {"GUEST_IDTR_BASE": BAD_LINEAR}),
        Row("guest.gdtr.limit", {"GUEST_GDTR_LIMIT": 0x10000}), Row("guest.idtr.limit", {"GUEST_IDTR_LIMIT": 0xFFFFFFFF}),
        Row("guest.fred.ss_dpl", {"GUEST_SS_AR_BYTES": 0xC0B3, "GUEST_SS_SELECTOR": 0x29, "GUEST_CS_SELECTOR": 0x31, "GUEST_CS_AR_BYTES": 0xA0BB},
            setup={"GUEST_CR4": 1 << 32 | 0x2620}),
        Row("guest.fred.cs_l", {"GUEST_CS_AR_BYTES": 0xC09B}, setup={"GUEST_CR4": 1 << 32 | 0x2620}),
        Row("guest.fred.iopl", {RFLAGS: 0x1002}, setup={**RING3, "GUEST_CR4": 1 << 32 | 0x2620}),
    ]
    return rows


def other_rows() -> List[Row]:
    activity, blocking, pending, link = "GUEST_ACTIVITY_STATE", "GUEST_INTERRUPTIBILITY_INFO", "GUEST_PENDING_DBG_EXCEPTIONS", "VMCS_LINK_POINTER"
    nmi = VALID | 2 << 8 | 2
    shadow = page(struct.pack("<I", REVISION | 1 << 31))
    ept_pae = {"mode": "PAE", "on": [EPT], "setup": {"GUEST_PDPTR0": 0x3001, "GUEST_PDPTR3": 0x3E18}}
    return [
        Row("guest.activity.supported", {activity: 4}, setup={activity: 3}), Row("guest.activity.supported", {activity: 2},
                                                                                 caps={0x485: 4 << 16 | 5 << 6}),
        Row("guest.activity.hlt_dpl", {activity: 1}, setup=RING3), Row("guest.activity.blocking", {activity: 1}, setup={blocking: 2}),
        Row("guest.activity.event", {activity: 1}, setup={INFO: VALID | 3 << 8 | 6}), Row("guest.activity.event", {activity: 2},
                                                                                          setup={INFO: VALID | 0x30, RFLAGS: 0x202}),
        Row("guest.activity.event", {activity: 3}, setup={INFO: nmi}),
        Row("guest.activity.smm", {activity: 3}, on=[("entry", "SMM")], setup={blocking: 4}, given={"in_smm": True}),
        Row("guest.interruptibility.reserved", {blocking: 0x20}), Row("guest.interruptibility.both", {blocking: 3}, setup={RFLAGS: 0x202,
                                                                                                                           blocking: 1}),
        Row("guest.interruptibility.sti_if", {blocking: 1}), Row("guest.interruptibility.external", {blocking: 1}, setup={INFO: VALID | 0x30,
                                                                                                                          RFLAGS: 0x202}),
        Row("guest.interruptibility.nmi_mov_ss", {blocking: 2}, setup={INFO: nmi}),
        Row("guest.interruptibility.smi", {blocking: 4}), Row("guest.interruptibility.smi", {blocking: 0}, on=[("entry", "SMM")],
                                                              setup={blocking: 4}, given={"in_smm": True}),
        Row("guest.interruptibility.nmi", {blocking: 8}, on=[("pin", "NMI_EXITING"), ("pin", "VIRTUAL_NMIS")], setup={INFO: nmi}),
        Row("guest.interruptibility.enclave", {blocking: 0x12}, setup={blocking: 0x10}),
        Row("guest.interruptibility.enclave", {blocking: 0x10}, cpuid={(7, 0): (0, 0, 0, 0)}),
        Row("guest.pending_debug.reserved", {pending: 0x10}), Row("guest.pending_debug.reserved", {pending: 1 << 63}),
        Row("guest.pending_debug.reserved", {pending: 0x800}, cpuid={(7, 0): (0, 0, 0, 0)}),
        Row("guest.pending_debug.bs", {pending: 0}, setup={blocking: 2, RFLAGS: 0x102, pending: 0x4000}),
        Row("guest.pending_debug.bs", {pending: 0x4000}, setup={blocking: 2}),
        Row("guest.pending_debug.bs", {"GUEST_IA32_DEBUGCTL": 2}, setup={blocking: 2, RFLAGS: 0x102, pending: 0x4000}),
        Row("guest.pending_debug.rtm", {pending: 0x10000}, setup={pending: 0x11000}), Row("guest.pending_debug.rtm", {blocking: 2},
                                                                                          setup={pending: 0x11000}),
        Row("guest.link_pointer", {link: 0xFFFFFFFF}), Row("guest.link_pointer", {link: LINKED + 8}, setup={link: LINKED}),
        Row("guest.link_pointer.revision", {link: PAGE}), Row("guest.link_pointer.revision", {link: LINKED}, memory={LINKED: shadow}),
        Row("guest.link_pointer.revision", {link: LINKED}, on=[("sec", "SHADOW_VMCS")]), Row("guest.link_pointer.current", {link: LINKED},
                                                                                             bad_given={"vmcs_address": LINKED}),
        Row("guest.pdptes", {"GUEST_PDPTR2": 0x3003}, **ept_pae), Row("guest.pdptes", {"GUEST_PDPTR0": HIGH | 1}, **ept_pae),
        Row("guest.pdptes", {"GUEST_CR3": 0x14020}, mode="PAE", memory={0x14000: page(struct.pack("<8Q", 1, 0, 0, 0, 0x3041, 0, 0, 0))}),
        Row("guest.msr_load", {"VM_ENTRY_MSR_LOAD_COUNT": 1}, memory={LIST: page(struct.pack("<IIQ", 0xC0000100, 0, 0))}),
        Row("guest.msr_load", {"VM_ENTRY_MSR_LOAD_COUNT": 2}, setup={"VM_ENTRY_MSR_LOAD_COUNT": 1},
            memory={LIST: page(struct.pack("<IIQIIQ", 0x10, 0, 0, 0x277, 0, 2))}),
    ]


ROWS = address_rows() + needs_rows() + control_rows() + host_rows() + register_rows() + segment_rows() + other_rows()
NEVER_FAILS = {"guest.interruptibility.nmi_sti": "the manual lets the processor choose: it is undecided where it matters"}


def build(row: Row, *, broken: bool) -> Tuple[Vmcs, VmxCapabilities, Dict[str, Any]]:
    msrs = {**every_capability(), **row.caps}
    values: Dict[str, int] = dict.fromkeys(vmcs_fields.names(), 0)
    for encoding, value in baseline(every_capability(), row.mode, row.host).items():
        values[vmcs_fields.find(encoding).name] = value
    values.update(GOOD)
    values.update(row.setup)
    for word, ident in row.on:
        values[WORDS[word]] |= bits.table(word)[ident].mask
    given = dict(row.given)
    if broken:
        values.update(row.bad)
        for word, ident in row.turn_on:
            values[WORDS[word]] |= bits.table(word)[ident].mask
        for word, ident in row.turn_off:
            values[WORDS[word]] &= ~bits.table(word)[ident].mask
        given.update(row.bad_given)
    given.setdefault("host_long_mode", row.host == "64-bit")
    given.setdefault("vmcs_address", 0x6000)
    given["memory"] = memory_from_segments([(address, data) for address, data in {**MEMORY, **row.memory}.items()])
    caps = VmxCapabilities.from_msrs(msrs, physical_address_width=46, linear_address_width=48, cpuid={**CPUID, **row.cpuid})
    return Vmcs.from_values(values), caps, given


def not_passed(findings: List[Finding]) -> Dict[str, str]:
    return {finding.id: finding.verdict for finding in findings if finding.verdict != "pass"}


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.id}-{index}" for index, row in enumerate(ROWS)])
def test_rule_passes_and_fails_alone(row: Row) -> None:
    vmcs, caps, given = build(row, broken=False)
    assert not_passed(check_vm_entry(vmcs, caps, **given)) == {}
    assert predict_vm_entry(vmcs, caps, **given) == "enters"
    vmcs, caps, given = build(row, broken=True)
    findings = check_vm_entry(vmcs, caps, **given)
    assert not_passed(findings) == dict.fromkeys((row.id, *row.also), "fail")
    failed = next(finding for finding in findings if finding.id == row.id)
    assert failed.message and failed.see.startswith("SDM vol. 3") and set(failed.fields) <= set(vmcs_fields.names())
    if not row.also:
        assert predict_vm_entry(vmcs, caps, **given)[:2] == rule(row.id).outcome[:2]


def test_every_rule_is_in_the_table() -> None:
    assert {one.id for one in all_rules()} == {row.id for row in ROWS} | set(NEVER_FAILS)


def inventory() -> List[str]:
    return (Path(__file__).parent / "data/entry_inventory.txt").read_text().split()


def test_every_row_of_the_inventory_has_a_rule_or_a_reason() -> None:
    """159 checks of the SDM's chapter VM Entries: none is forgotten, none is both decided and undecidable."""
    rows = inventory()
    assert len(rows) == len(set(rows)) == 159
    decided = {one.row for one in all_rules() + launch_rules.book.rules}
    assert decided | set(UNDECIDABLE) == set(rows)
    assert not decided & set(UNDECIDABLE)


def test_the_processor_decides_about_nmi_during_blocking_by_sti() -> None:
    """A processor may or may not refuse it (SDM vol. 3, Checks on Guest Non-Register State), so the answer is not ours."""
    row = Row("guest.interruptibility.nmi_sti", {"GUEST_INTERRUPTIBILITY_INFO": 1}, setup={INFO: VALID | 2 << 8 | 2, RFLAGS: 0x202})
    vmcs, caps, given = build(row, broken=True)
    assert not_passed(check_vm_entry(vmcs, caps, **given)) == {row.id: "undecided"}
    outcome = predict_vm_entry(vmcs, caps, **given)
    assert outcome[:2] == ("undecided", "enters")


@pytest.mark.parametrize(("row", "outcome"), [
    (Row("guest.pdptes", {"GUEST_PDPTR0": 3}, mode="PAE", on=[EPT]), ("entry-failure", 33, 2)),
    (Row("guest.link_pointer", {"VMCS_LINK_POINTER": 1}), ("entry-failure", 33, 4)),
    (Row("guest.cs.type", {"GUEST_CS_AR_BYTES": 0xA091}), ("entry-failure", 33, 0)),
    (Row("guest.msr_load", {"VM_ENTRY_MSR_LOAD_COUNT": 3},
         memory={LIST: page(struct.pack("<IIQIIQIIQ", 0x10, 0, 0, 0x175, 0, BAD_LINEAR, 0xC0000100, 0, 0))}), ("entry-failure", 34, 2)),
    (Row("controls.vpid", {"VIRTUAL_PROCESSOR_ID": 0, "HOST_CS_SELECTOR": 0}, on=[("sec", "VPID")]), ("VMfailValid", 7)),
    (Row("host.cs.null", {"HOST_CS_SELECTOR": 0, "GUEST_RFLAGS": 0}), ("VMfailValid", 8)),
], ids=lambda value: str(value) if isinstance(value, tuple) else value.id)
def test_outcome(row: Row, outcome: Tuple[object, ...]) -> None:
    vmcs, caps, given = build(row, broken=True)
    assert predict_vm_entry(vmcs, caps, **given) == outcome


def test_all_failures_in_processor_order() -> None:
    bad = {"GUEST_RFLAGS": 0, "VIRTUAL_PROCESSOR_ID": 0, "HOST_TR_SELECTOR": 0, "GUEST_CS_AR_BYTES": 0xA091}
    vmcs, caps, given = build(Row("", bad, on=[("sec", "VPID")]), broken=True)
    failed = [(finding.area, finding.id) for finding in check_vm_entry(vmcs, caps, **given) if finding.failed]
    assert failed == [("controls", "controls.vpid"), ("host", "host.tr.null"), ("guest", "guest.cs.type"), ("guest", "guest.rflags.reserved")]


@pytest.mark.parametrize("name", ["GUEST_CR0", "HOST_CR4", "PIN_BASED_VM_EXEC_CONTROL", "SECONDARY_VM_EXEC_CONTROL", "GUEST_CS_AR_BYTES",
                                  "VMCS_LINK_POINTER",
                                  "VM_ENTRY_INTR_INFO_FIELD"])
def test_a_missing_field_makes_its_rules_undecided_and_names_itself(name: str) -> None:
    """Never pass by default: without the field no rule that reads it unconditionally passes."""
    full, caps, given = build(Row(""), broken=False)
    vmcs = Vmcs.from_values({key: value for key, value in full.items() if key != name})
    findings = check_vm_entry(vmcs, caps, **given)
    undecided = [finding for finding in findings if finding.undecided]
    assert undecided and all(finding.missing == (name,) for finding in undecided)
    outcome = predict_vm_entry(vmcs, caps, **given)
    assert outcome == ("undecided", "enters", (name,))


def test_without_capabilities_nothing_that_needs_them_passes() -> None:
    vmcs, _, given = build(Row(""), broken=False)
    findings = {finding.id: finding for finding in check_vm_entry(vmcs, None, **given)}
    for one in ("controls.pin.allowed", "controls.proc.allowed", "controls.exit.allowed", "controls.entry.allowed", "host.cr0", "host.cr4",
                "guest.cr0", "guest.cr4"):
        assert findings[one].verdict == "undecided", one
        assert "IA32_VMX_" in findings[one].missing[0]
    assert findings["guest.cs.type"].verdict == "pass"


def test_physical_address_width_is_needed_only_where_it_decides() -> None:
    """Every processor has at least 32 address bits and none more than 52."""
    row = Row("", on=[("proc", "USE_MSR_BITMAPS")])
    for address, verdict in ((0x18000, "pass"), (0x123456789000, "undecided"), (1 << 53, "fail"), (0x123456789001, "fail")):
        vmcs, caps, given = build(row, broken=False)
        caps = VmxCapabilities.from_msrs(dict(caps.items()))
        found = {finding.id: finding for finding in check_vm_entry(vmcs.replaced({"MSR_BITMAP": address}), caps, **given)}
        assert found["controls.msr_bitmap"].verdict == verdict, hex(address)


def test_unknown_control_with_a_good_field_passes() -> None:
    """A rule whose requirement holds passes whether it applies or not."""
    vmcs, caps, given = build(Row(""), broken=False)
    vmcs = Vmcs.from_values({key: value for key, value in vmcs.items() if key != "SECONDARY_VM_EXEC_CONTROL"})
    found = {finding.id: finding.verdict for finding in check_vm_entry(vmcs, caps, **given)}
    assert found["controls.vpid"] == "pass" and found["controls.sec.allowed"] == "undecided"


def test_the_vmm_is_taken_for_what_its_host_state_shows() -> None:
    """Nobody said in which mode VMLAUNCH runs: a host RIP above 4 GiB is 64-bit code; a low one without EFER proves nothing."""
    row = Row("", turn_off=[("exit", "LOAD_IA32_EFER")])
    vmcs, caps, given = build(row, broken=True)
    given.pop("host_long_mode")
    assert predict_vm_entry(vmcs.replaced({"HOST_RIP": 0xFFFFF80000001000}), caps, **given) == "enters"
    outcome = predict_vm_entry(vmcs, caps, **given)
    assert outcome[0] == "undecided" and "mode" in outcome[2][0]


def test_hints_for_known_mistakes() -> None:
    def failed(row: Row) -> Optional[Finding]:
        vmcs, caps, given = build(row, broken=True)
        return next(finding for finding in check_vm_entry(vmcs, caps, **given) if finding.id == row.id)

    assert "only the low half" in failed(Row("guest.link_pointer", {"VMCS_LINK_POINTER": 0xFFFFFFFF})).hint
    assert "pointer" in failed(Row("guest.rflags.reserved", {RFLAGS: 0xFFFFF80012345678})).hint
    assert "linear address" in failed(Row("controls.msr_bitmap", {"MSR_BITMAP": 0xFFFFF80012345000}, on=[("proc", "USE_MSR_BITMAPS")])).hint
    assert "0xf8" in failed(Row("host.ds.selector", {"HOST_DS_SELECTOR": 0x2B})).hint
