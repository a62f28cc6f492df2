"""Programs that print VMCS and VMCB dumps, imitated: the formats of their sources, with values of our own; and what happens to a log
between the machine and the reader.

A printed line is a list of pieces: plain text, or `Printed(key, text)` for a value.  Damage works on pieces, so a test knows which
values are still whole afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple, Union

from vtdbg.svm import fields as vmcb_fields
from vtdbg.vmx import fields as vmcs_fields

Key = Union[int, str]


class Printed(NamedTuple):
    """A value as printed.  `key` None for numbers that are no field."""

    key: object
    text: str


Piece = Union[str, Printed]
Row = List[Piece]
Values = Mapping[Key, int]


@dataclass(frozen=True)
class Where:
    """Where a value stands in the final text."""

    key: Key
    value: int
    start: int
    end: int
    record: int


def _vmcs(values: Values) -> Callable[[str, int], Printed]:
    def printed(name: str, digits: int) -> Printed:
        encoding = vmcs_fields.find(name).encoding
        return Printed(encoding, f"{values[encoding]:0{digits}x}")
    return printed


def kvm_intel(values: Values, kernel: Tuple[int, int] = (6, 8), *, efer: str = "", apic: bool = True, pdptrs: bool = True, cet: bool = False,
              msrs: Sequence[Tuple[int, int]] = (), pointer: int = 0xFFFF888006BD9000) -> List[Row]:
    """dump_vmcs of arch/x86/kvm/vmx/vmx.c.  `efer` "effective" or "autoload" prints a number that is no field; `cet` 6.18's lines."""
    v = _vmcs(values)

    def segment(label: str, name: str) -> Row:
        return [f"{label} sel=0x", v(f"GUEST_{name}_SELECTOR", 4), ", attr=0x", v(f"GUEST_{name}_AR_BYTES", 5), ", limit=0x",
                v(f"GUEST_{name}_LIMIT", 8), ", base=0x", v(f"GUEST_{name}_BASE", 16)]

    def table(label: str, name: str) -> Row:
        return [f"{label}                           limit=0x", v(f"GUEST_{name}_LIMIT", 8), ", base=0x", v(f"GUEST_{name}_BASE", 16)]

    rows: List[Row] = []
    if kernel >= (5, 15):
        rows.append([f"VMCS {pointer:016x}, last attempted VM-entry on CPU 3"])
    rows += [["*** Guest State ***"],
             ["CR0: actual=0x", v("GUEST_CR0", 16), ", shadow=0x", v("CR0_READ_SHADOW", 16), ", gh_mask=", v("CR0_GUEST_HOST_MASK", 16)],
             ["CR4: actual=0x", v("GUEST_CR4", 16), ", shadow=0x", v("CR4_READ_SHADOW", 16), ", gh_mask=", v("CR4_GUEST_HOST_MASK", 16)],
             ["CR3 = 0x", v("GUEST_CR3", 16)]]
    if pdptrs:
        rows += [["PDPTR0 = 0x", v("GUEST_PDPTR0", 16), "  PDPTR1 = 0x", v("GUEST_PDPTR1", 16)],
                 ["PDPTR2 = 0x", v("GUEST_PDPTR2", 16), "  PDPTR3 = 0x", v("GUEST_PDPTR3", 16)]]
    rows += [["RSP = 0x", v("GUEST_RSP", 16), "  RIP = 0x", v("GUEST_RIP", 16)],
             ["RFLAGS=0x", v("GUEST_RFLAGS", 8), "         DR7 = 0x", v("GUEST_DR7", 16)],
             ["Sysenter RSP=", v("GUEST_SYSENTER_ESP", 16), " CS:RIP=", v("GUEST_SYSENTER_CS", 4), ":", v("GUEST_SYSENTER_EIP", 16)],
             segment("CS:  ", "CS"), segment("DS:  ", "DS"), segment("SS:  ", "SS"), segment("ES:  ", "ES"), segment("FS:  ", "FS"),
             segment("GS:  ", "GS"), table("GDTR:", "GDTR"), segment("LDTR:", "LDTR"), table("IDTR:", "IDTR"), segment("TR:  ", "TR")]
    if kernel < (5, 12):
        rows.append(["EFER =     0x", v("GUEST_IA32_EFER", 16), "  PAT = 0x", v("GUEST_IA32_PAT", 16)])
    else:
        rows.append(["EFER= 0x", Printed(None, f"{0xd01:016x}"), f" ({efer})"] if efer else ["EFER= 0x", v("GUEST_IA32_EFER", 16)])
        rows.append(["PAT = 0x", v("GUEST_IA32_PAT", 16)])
    rows.append(["DebugCtl = 0x", v("GUEST_IA32_DEBUGCTL", 16), "  DebugExceptions = 0x", v("GUEST_PENDING_DBG_EXCEPTIONS", 16)])
    if kernel >= (5, 8):
        rows.append(["PerfGlobCtl = 0x", v("GUEST_IA32_PERF_GLOBAL_CTRL", 16)])
    rows.append(["BndCfgS = 0x", v("GUEST_BNDCFGS", 16)])
    rows.append(["Interruptibility = ", v("GUEST_INTERRUPTIBILITY_INFO", 8), "  ActivityState = ", v("GUEST_ACTIVITY_STATE", 8)])
    if apic:
        rows.append(["InterruptStatus = ", v("GUEST_INTR_STATUS", 4)])
    if msrs:
        rows.append(["MSR guest autoload:"])
        rows += [[f"  {index:2}: msr=0x{number:08x} value=0x{value:016x}"] for index, (number, value) in enumerate(msrs)]
    if cet:
        rows.append(["S_CET = 0x", v("GUEST_S_CET", 16), ", SSP = 0x", v("GUEST_SSP", 16), ", SSP TABLE = 0x", v("GUEST_INTR_SSP_TABLE", 16)])
    rows.append(["*** Host State ***"])
    rows += _host_rows(v)
    if kernel < (5, 12):
        rows.append(["EFER = 0x", v("HOST_IA32_EFER", 16), "  PAT = 0x", v("HOST_IA32_PAT", 16)])
    else:
        rows += [["EFER= 0x", v("HOST_IA32_EFER", 16)], ["PAT = 0x", v("HOST_IA32_PAT", 16)]]
    if kernel >= (5, 8):
        rows.append(["PerfGlobCtl = 0x", v("HOST_IA32_PERF_GLOBAL_CTRL", 16)])
    if cet:
        rows.append(["S_CET = 0x", v("HOST_S_CET", 16), ", SSP = 0x", v("HOST_SSP", 16), ", SSP TABLE = 0x", v("HOST_INTR_SSP_TABLE", 16)])
    rows.append(["*** Control State ***"])
    if kernel < (5, 18):
        rows += [["PinBased=", v("PIN_BASED_VM_EXEC_CONTROL", 8), " CPUBased=", v("CPU_BASED_VM_EXEC_CONTROL", 8), " SecondaryExec=",
                  v("SECONDARY_VM_EXEC_CONTROL", 8)],
                 ["EntryControls=", v("VM_ENTRY_CONTROLS", 8), " ExitControls=", v("VM_EXIT_CONTROLS", 8)]]
    else:
        rows += [["CPUBased=0x", v("CPU_BASED_VM_EXEC_CONTROL", 8), " SecondaryExec=0x", v("SECONDARY_VM_EXEC_CONTROL", 8), " TertiaryExec=0x",
                  v("TERTIARY_VM_EXEC_CONTROL", 16)],
                 ["PinBased=0x", v("PIN_BASED_VM_EXEC_CONTROL", 8), " EntryControls=", v("VM_ENTRY_CONTROLS", 8), " ExitControls=",
                  v("VM_EXIT_CONTROLS", 8)]]
    rows += _control_rows(v)
    rows.append(["TSC Offset = 0x", v("TSC_OFFSET", 16)])
    rows.append(["TSC Multiplier = 0x", v("TSC_MULTIPLIER", 16)])
    if apic:
        status = values[vmcs_fields.find("GUEST_INTR_STATUS").encoding]
        rows.append([f"SVI|RVI = {status >> 8:02x}|{status & 0xff:02x} TPR Threshold = 0x", v("TPR_THRESHOLD", 2)])
        addresses: Tuple[Row, Row] = (["APIC-access addr = 0x", v("APIC_ACCESS_ADDR", 16), " "],
                                      ["virt-APIC addr = 0x", v("VIRTUAL_APIC_PAGE_ADDR", 16)])
        # pr_cont begins a line of its own where another processor printed in between.
        rows += [addresses[0] + addresses[1]] if kernel < (6, 0) else list(addresses)
    rows.append(["PostedIntrVec = 0x", v("POSTED_INTR_NV", 2)])
    rows.append(["EPT pointer = 0x", v("EPT_POINTER", 16)])
    rows.append(["PLE Gap=", v("PLE_GAP", 8), " Window=", v("PLE_WINDOW", 8)])
    rows.append(["Virtual processor ID = 0x", v("VIRTUAL_PROCESSOR_ID", 4)])
    if kernel >= (6, 10):
        rows.append(["VE info address = 0x", v("VE_INFORMATION_ADDRESS", 16)])
        rows.append(["ve_info: 0x00000030 0xffffffff 0x0000000000000181 0x0000000000001000 0x0000000000002000 0x0000"])
    return rows


def _host_rows(v: Callable[[str, int], Printed]) -> List[Row]:
    def selectors(names: str) -> Row:
        row: Row = []
        for name in names.split():
            row += [f"{' ' if row else ''}{name}=", v(f"HOST_{name}_SELECTOR", 4)]
        return row

    return [["RIP = 0x", v("HOST_RIP", 16), "  RSP = 0x", v("HOST_RSP", 16)],
            selectors("CS SS DS ES FS GS TR"),
            ["FSBase=", v("HOST_FS_BASE", 16), " GSBase=", v("HOST_GS_BASE", 16), " TRBase=", v("HOST_TR_BASE", 16)],
            ["GDTBase=", v("HOST_GDTR_BASE", 16), " IDTBase=", v("HOST_IDTR_BASE", 16)],
            ["CR0=", v("HOST_CR0", 16), " CR3=", v("HOST_CR3", 16), " CR4=", v("HOST_CR4", 16)],
            ["Sysenter RSP=", v("HOST_IA32_SYSENTER_ESP", 16), " CS:RIP=", v("HOST_IA32_SYSENTER_CS", 4), ":", v("HOST_IA32_SYSENTER_EIP", 16)]]


def _control_rows(v: Callable[[str, int], Printed]) -> List[Row]:
    return [["ExceptionBitmap=", v("EXCEPTION_BITMAP", 8), " PFECmask=", v("PAGE_FAULT_ERROR_CODE_MASK", 8), " PFECmatch=",
             v("PAGE_FAULT_ERROR_CODE_MATCH", 8)],
            ["VMEntry: intr_info=", v("VM_ENTRY_INTR_INFO_FIELD", 8), " errcode=", v("VM_ENTRY_EXCEPTION_ERROR_CODE", 8), " ilen=",
             v("VM_ENTRY_INSTRUCTION_LEN", 8)],
            ["VMExit: intr_info=", v("VM_EXIT_INTR_INFO", 8), " errcode=", v("VM_EXIT_INTR_ERROR_CODE", 8), " ilen=",
             v("VM_EXIT_INSTRUCTION_LEN", 8)],
            ["        reason=", v("VM_EXIT_REASON", 8), " qualification=", v("EXIT_QUALIFICATION", 16)],
            ["IDTVectoring: info=", v("IDT_VECTORING_INFO_FIELD", 8), " errcode=", v("IDT_VECTORING_ERROR_CODE", 8)]]


def xen_intel(values: Values, *, domain: int = 1, vcpu: int = 0, keyhandler: bool = True, efer: str = "VMCS", failure: str = "") -> List[Row]:
    """vmcs_dump_vcpu of xen/arch/x86/hvm/vmx/vmcs.c, 4.6 to 4.20.  The registers in parentheses differ from the fields on purpose."""
    v = _vmcs(values)

    def segment(label: str, name: str) -> Row:
        return [f"{label}: ", v(f"GUEST_{name}_SELECTOR", 4), " ", v(f"GUEST_{name}_AR_BYTES", 5), " ", v(f"GUEST_{name}_LIMIT", 8), " ",
                v(f"GUEST_{name}_BASE", 16)]

    def table(label: str, name: str) -> Row:
        return [f"{label}:            ", v(f"GUEST_{name}_LIMIT", 8), " ", v(f"GUEST_{name}_BASE", 16)]

    def now(name: str, digits: int) -> str:
        return f" (0x{values[vmcs_fields.find(name).encoding] ^ 0x10:0{digits}x})"

    rows: List[Row] = []
    if keyhandler:
        rows += [[f">>> Domain {domain} <<<"], [f"\tVCPU {vcpu}"]]
    if failure:
        rows.append([failure])
    rows += [["************* VMCS Area **************"]] if not keyhandler else []
    rows += [["*** Guest State ***"],
             ["CR0: actual=0x", v("GUEST_CR0", 16), ", shadow=0x", v("CR0_READ_SHADOW", 16), ", gh_mask=", v("CR0_GUEST_HOST_MASK", 16)],
             ["CR4: actual=0x", v("GUEST_CR4", 16), ", shadow=0x", v("CR4_READ_SHADOW", 16), ", gh_mask=", v("CR4_GUEST_HOST_MASK", 16)],
             ["CR3 = 0x", v("GUEST_CR3", 16)],
             ["PDPTE0 = 0x", v("GUEST_PDPTR0", 16), "  PDPTE1 = 0x", v("GUEST_PDPTR1", 16)],
             ["PDPTE2 = 0x", v("GUEST_PDPTR2", 16), "  PDPTE3 = 0x", v("GUEST_PDPTR3", 16)],
             ["RSP = 0x", v("GUEST_RSP", 16), now("GUEST_RSP", 16), "  RIP = 0x", v("GUEST_RIP", 16), now("GUEST_RIP", 16)],
             ["RFLAGS=0x", v("GUEST_RFLAGS", 8), now("GUEST_RFLAGS", 8), "  DR7 = 0x", v("GUEST_DR7", 16)],
             ["Sysenter RSP=", v("GUEST_SYSENTER_ESP", 16), " CS:RIP=", v("GUEST_SYSENTER_CS", 4), ":", v("GUEST_SYSENTER_EIP", 16)],
             ["       sel  attr  limit   base"],
             segment("  CS", "CS"), segment("  DS", "DS"), segment("  SS", "SS"), segment("  ES", "ES"), segment("  FS", "FS"), segment("  GS", "GS"),
             table("GDTR", "GDTR"), segment("LDTR", "LDTR"), table("IDTR", "IDTR"), segment("  TR", "TR")]
    if efer == "VMCS":
        rows.append(["EFER(VMCS) = 0x", v("GUEST_IA32_EFER", 16), "  PAT = 0x", v("GUEST_IA32_PAT", 16)])
    elif efer:
        rows.append(["EFER(MSR LL) = 0x", Printed(None, f"{0x501:016x}"), "  PAT = 0x", v("GUEST_IA32_PAT", 16)])
    else:
        rows.append(["EFER = 0x", v("GUEST_IA32_EFER", 16), "  PAT = 0x", v("GUEST_IA32_PAT", 16)])
    rows += [["PreemptionTimer = 0x", v("VMX_PREEMPTION_TIMER_VALUE", 8), "  SM Base = 0x", v("GUEST_SMBASE", 8)],
             ["DebugCtl = 0x", v("GUEST_IA32_DEBUGCTL", 16), "  DebugExceptions = 0x", v("GUEST_PENDING_DBG_EXCEPTIONS", 16)],
             ["PerfGlobCtl = 0x", v("GUEST_IA32_PERF_GLOBAL_CTRL", 16), "  BndCfgS = 0x", v("GUEST_BNDCFGS", 16)],
             ["Interruptibility = ", v("GUEST_INTERRUPTIBILITY_INFO", 8), "  ActivityState = ", v("GUEST_ACTIVITY_STATE", 8)],
             ["InterruptStatus = ", v("GUEST_INTR_STATUS", 4)],
             ["*** Host State ***"]]
    host = _host_rows(v)
    host[0] = ["RIP = 0x", v("HOST_RIP", 16), " (vmx_asm_vmexit_handler)  RSP = 0x", v("HOST_RSP", 16)]
    rows += host
    rows += [["EFER = 0x", v("HOST_IA32_EFER", 16), "  PAT = 0x", v("HOST_IA32_PAT", 16)],
             ["PerfGlobCtl = 0x", v("HOST_IA32_PERF_GLOBAL_CTRL", 16)],
             ["*** Control State ***"],
             ["PinBased=", v("PIN_BASED_VM_EXEC_CONTROL", 8), " CPUBased=", v("CPU_BASED_VM_EXEC_CONTROL", 8), " SecondaryExec=",
              v("SECONDARY_VM_EXEC_CONTROL", 8)],
             ["EntryControls=", v("VM_ENTRY_CONTROLS", 8), " ExitControls=", v("VM_EXIT_CONTROLS", 8)]]
    rows += _control_rows(v)
    rows += [["TSC Offset = 0x", v("TSC_OFFSET", 16), "  TSC Multiplier = 0x", v("TSC_MULTIPLIER", 16)],
             ["TPR Threshold = 0x", v("TPR_THRESHOLD", 2), "  PostedIntrVec = 0x", v("POSTED_INTR_NV", 2)],
             ["EPT pointer = 0x", v("EPT_POINTER", 16), "  EPTP index = 0x", v("EPTP_INDEX", 4)],
             ["CR3 target0=", v("CR3_TARGET_VALUE0", 16), " target1=", v("CR3_TARGET_VALUE1", 16)],
             ["PLE Gap=", v("PLE_GAP", 8), " Window=", v("PLE_WINDOW", 8)],
             ["Virtual processor ID = 0x", v("VIRTUAL_PROCESSOR_ID", 4), " VMfunc controls = ", v("VM_FUNCTION_CONTROL", 16)],
             ["**************************************"]]
    return rows


def xen_intel_old(values: Values) -> List[Row]:
    """vmcs_dump_vcpu of Xen 4.2.  Its VMExit ilen is the VM-entry instruction length and its qualification has 32 bits: no fields."""
    v = _vmcs(values)

    def segment(name: str) -> Row:
        return [f"{name}: sel=0x", v(f"GUEST_{name}_SELECTOR", 4), ", attr=0x", v(f"GUEST_{name}_AR_BYTES", 5), ", limit=0x",
                v(f"GUEST_{name}_LIMIT", 8), ", base=0x", v(f"GUEST_{name}_BASE", 16)]

    def table(name: str) -> Row:
        return [f"{name}:                           limit=0x", v(f"GUEST_{name}_LIMIT", 8), ", base=0x", v(f"GUEST_{name}_BASE", 16)]

    rows: List[Row] = [["*** Guest State ***"],
                       ["CR0: actual=0x", v("GUEST_CR0", 16), ", shadow=0x", v("CR0_READ_SHADOW", 16), ", gh_mask=", v("CR0_GUEST_HOST_MASK", 16)],
                       ["CR4: actual=0x", v("GUEST_CR4", 16), ", shadow=0x", v("CR4_READ_SHADOW", 16), ", gh_mask=", v("CR4_GUEST_HOST_MASK", 16)],
                       ["CR3: actual=0x", v("GUEST_CR3", 16), ", target_count=2"],
                       ["     target0=", v("CR3_TARGET_VALUE0", 16), ", target1=", v("CR3_TARGET_VALUE1", 16)],
                       ["RSP = 0x", v("GUEST_RSP", 16), " (0x0000000000000010)  RIP = 0x", v("GUEST_RIP", 16), " (0x0000000000000020)"],
                       ["RFLAGS=0x", v("GUEST_RFLAGS", 16), " (0x0000000000000246)  DR7 = 0x", v("GUEST_DR7", 16)],
                       segment("CS"), segment("DS"), segment("SS"), segment("ES"), segment("FS"), segment("GS"),
                       table("GDTR"), segment("LDTR"), table("IDTR"), segment("TR"),
                       ["Guest PAT = 0x", v("GUEST_IA32_PAT", 16)],
                       ["TSC Offset = ", v("TSC_OFFSET", 16)],
                       ["DebugCtl=", v("GUEST_IA32_DEBUGCTL", 16), " DebugExceptions=", v("GUEST_PENDING_DBG_EXCEPTIONS", 16)],
                       ["Interruptibility=0001 ActivityState=0000"],
                       ["*** Host State ***"],
                       ["RSP = 0x", v("HOST_RSP", 16), "  RIP = 0x", v("HOST_RIP", 16)]]
    selectors: Row = []
    for name in ("CS", "DS", "ES", "FS", "GS", "SS", "TR"):
        selectors += [f"{' ' if selectors else ''}{name}=", v(f"HOST_{name}_SELECTOR", 4)]
    rows += [selectors] + _host_rows(v)[2:]
    rows += [["Host PAT = 0x", v("HOST_IA32_PAT", 16)], ["*** Control State ***"],
             ["PinBased=", v("PIN_BASED_VM_EXEC_CONTROL", 8), " CPUBased=", v("CPU_BASED_VM_EXEC_CONTROL", 8), " SecondaryExec=",
              v("SECONDARY_VM_EXEC_CONTROL", 8)],
             ["EntryControls=", v("VM_ENTRY_CONTROLS", 8), " ExitControls=", v("VM_EXIT_CONTROLS", 8)],
             ["ExceptionBitmap=", v("EXCEPTION_BITMAP", 8)],
             ["VMEntry: intr_info=", v("VM_ENTRY_INTR_INFO_FIELD", 8), " errcode=", v("VM_ENTRY_EXCEPTION_ERROR_CODE", 8), " ilen=",
              v("VM_ENTRY_INSTRUCTION_LEN", 8)],
             ["VMExit: intr_info=", v("VM_EXIT_INTR_INFO", 8), " errcode=", v("VM_EXIT_INTR_ERROR_CODE", 8), " ilen=",
              Printed(None, f"{values[0x401A]:08x}")],
             ["        reason=", v("VM_EXIT_REASON", 8), " qualification=", Printed(None, f"{values[0x6400] & 0xffffffff:08x}")],
             ["IDTVectoring: info=", v("IDT_VECTORING_INFO_FIELD", 8), " errcode=", v("IDT_VECTORING_ERROR_CODE", 8)],
             ["EPT pointer = 0x", v("EPT_POINTER", 16)]]
    return rows


def kvm_amd(values: Values, kernel: Tuple[int, int] = (6, 8)) -> List[Row]:
    """dump_vmcb of arch/x86/kvm/svm/svm.c."""
    def v(name: str, form: str) -> Printed:
        return Printed(name, format(values[name], form))

    def control(label: str, name: str, form: str) -> Row:
        return [f"{label + ':':<20}", v(name, form)]

    def halves(label: str, name: str) -> List[Row]:
        return [[f"{label + '_read:':<20}", Printed(None, f"{values[name] & 0xffff:04x}")],
                [f"{label + '_write:':<20}", Printed(None, f"{values[name] >> 16:04x}")]]

    rows: List[Row] = []
    if kernel >= (5, 15):
        rows.append(["SVM vCPU0 VMCB 00000000d19b8b4e, last attempted VMRUN on CPU 5"] if kernel >= (6, 15)
                    else ["VMCB 00000000d19b8b4e, last attempted VMRUN on CPU 5"])
    rows.append(["VMCB Control Area:"])
    rows += halves("cr", "intercept_cr") + halves("dr", "intercept_dr")
    rows.append(control("exceptions", "intercept_exceptions", "08x"))
    if kernel < (5, 10):
        rows.append([f"{'intercepts:':<20}{values['intercept_misc2']:08x}{values['intercept_misc1']:08x}"])
    else:
        rows.append([f"{'intercepts:':<20}", v("intercept_misc1", "08x"), " ", v("intercept_misc2", "08x")])
    rows += [control("pause filter count", "pause_filter_count", "d"), control("pause filter threshold", "pause_filter_thresh", "d"),
             control("iopm_base_pa", "iopm_base_pa", "016x"), control("msrpm_base_pa", "msrpm_base_pa", "016x"),
             control("tsc_offset", "tsc_offset", "016x"), control("asid", "asid", "d"), control("tlb_ctl", "tlb_ctl", "d"),
             control("int_ctl", "int_ctl", "08x"), control("int_vector", "int_vector", "08x"), control("int_state", "int_state", "08x")]
    if kernel >= (6, 19):
        rows.append(control("exit_code", "exit_code", "016x"))
    else:
        rows.append([f"{'exit_code:':<20}", Printed("exit_code", f"{values['exit_code'] & 0xffffffff:08x}")])
    rows += [control("exit_info1", "exit_info_1", "016x"), control("exit_info2", "exit_info_2", "016x"),
             control("exit_int_info", "exit_int_info", "08x"), control("exit_int_info_err", "exit_int_info_err", "08x"),
             control("nested_ctl" if kernel < (6, 19) else "misc_ctl", "nested_ctl", "d"), control("nested_cr3", "nested_cr3", "016x"),
             control("avic_vapic_bar", "avic_vapic_bar", "016x"), control("event_inj", "event_inj", "08x"),
             control("event_inj_err", "event_inj_err", "08x"), control("virt_ext" if kernel < (6, 19) else "misc_ctl2", "virt_ext", "d"),
             control("next_rip", "next_rip", "016x"), control("avic_backing_page", "avic_backing_page", "016x"),
             control("avic_logical_id", "avic_logical_id", "016x"), control("avic_physical_id", "avic_physical_id", "016x"),
             ["VMCB State Save Area:"]]
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr"):
        rows.append([f"{name + ':':<5} s: ", v(f"{name}.selector", "04x"), " a: ", v(f"{name}.attrib", "04x"), " l: ", v(f"{name}.limit", "08x"),
                     " b: ", v(f"{name}.base", "016x")])
    if kernel >= (6, 5):
        rows.append(["vmpl: ", v("vmpl", "d"), "   cpl:  ", v("cpl", "d"), "               efer:          ", v("efer", "016x")])
    else:
        rows.append(["cpl:            ", v("cpl", "d"), "                efer:         ", v("efer", "016x")])
    pairs = [("cr0", "cr0", "cr2", "cr2"), ("cr3", "cr3", "cr4", "cr4"), ("dr6", "dr6", "dr7", "dr7"), ("rip", "rip", "rflags", "rflags"),
             ("rsp", "rsp", "rax", "rax"), ("star", "star", "lstar", "lstar"), ("cstar", "cstar", "sfmask", "sfmask"),
             ("kernel_gs_base", "kernel_gs_base", "sysenter_cs", "sysenter_cs"), ("sysenter_esp", "sysenter_esp", "sysenter_eip", "sysenter_eip"),
             ("gpat", "g_pat", "dbgctl", "dbgctl"), ("br_from", "br_from", "br_to", "br_to"),
             ("excp_from", "last_excp_from", "excp_to", "last_excp_to")]
    if kernel >= (6, 18):
        pairs.insert(5, ("s_cet", "s_cet", "ssp", "ssp"))
    for first, name, second, other in pairs:
        rows.append([f"{first + ':':<15} ", v(name, "016x"), f" {second + ':':<13} ", v(other, "016x")])
    if kernel >= (6, 15):
        rows.append([f"{'rax:':<15} ", v("rax", "016x"), f" {'rbx:':<13} {0xb0b:016x}"])
        rows.append([f"{'r14:':<15} {0x14:016x} {'r15:':<13} {0x15:016x}"])
    return rows


def xen_amd(values: Values, *, domain: int = 1) -> List[Row]:
    """svm_vmcb_dump of xen/arch/x86/hvm/svm, 4.13 to 4.20."""
    def h(name: str) -> Printed:
        return Printed(name, f"{values[name]:#x}" if values[name] else "0")

    def wide(name: str, other: str) -> str:
        value = values[other] << 32 | values[name]
        return f"{value:#x}" if value else "0"

    def v(name: str) -> Printed:
        return Printed(name, f"{values[name]:016x}")

    rows: List[Row] = [[f">>> Domain {domain} <<<"], ["\tVCPU 0"], ["Dumping guest's current state at key_handler..."],
                       ["Size of VMCB = 4096, paddr = 000000021f5b4000, vaddr = ffff83021f5b4000"],
                       ["cr_intercepts = ", h("intercept_cr"), " dr_intercepts = ", h("intercept_dr"), " exception_intercepts = ",
                        h("intercept_exceptions")],
                       ["general1_intercepts = ", h("intercept_misc1"), " general2_intercepts = ", h("intercept_misc2")],
                       ["iopm_base_pa = ", h("iopm_base_pa"), " msrpm_base_pa = ", h("msrpm_base_pa"), " tsc_offset = ", h("tsc_offset")],
                       ["tlb_control = ", h("tlb_ctl"), f" vintr = {wide('int_ctl', 'int_vector')} int_stat = ", h("int_state")],
                       [f"event_inj {values['event_inj_err'] << 32 | values['event_inj']:016x}, valid? 1, ec? 0, type 3, vector 0xe"],
                       ["exitcode = ", h("exit_code"), f" exit_int_info = {wide('exit_int_info', 'exit_int_info_err')}"],
                       ["exitinfo1 = ", h("exit_info_1"), " exitinfo2 = ", h("exit_info_2")],
                       ["asid = ", h("asid"), " np_ctrl = ", h("nested_ctl"), ":"],
                       ["virtual vmload/vmsave = 1, virt_ext = ", h("virt_ext")],
                       ["cpl = ", Printed("cpl", str(values["cpl"])), " efer = ", h("efer"), " star = ", h("star"), " lstar = ", h("lstar")],
                       ["CR0 = 0x", v("cr0"), " CR2 = 0x", v("cr2")], ["CR3 = 0x", v("cr3"), " CR4 = 0x", v("cr4")],
                       ["RSP = 0x", v("rsp"), "  RIP = 0x", v("rip")], ["RAX = 0x", v("rax"), "  RFLAGS=0x", v("rflags")],
                       ["DR6 = 0x", v("dr6"), ", DR7 = 0x", v("dr7")], ["CSTAR = 0x", v("cstar"), " SFMask = 0x", v("sfmask")],
                       ["KernGSBase = 0x", v("kernel_gs_base"), " PAT = 0x", v("g_pat")],
                       ["SSP = 0x", v("ssp"), " S_CET = 0x", v("s_cet"), " ISST = 0x", v("isst_addr")],
                       ["H_CR3 = 0x", v("nested_cr3"), " CleanBits = ", h("clean")], ["       sel attr  limit   base"]]
    for label in ("  CS", "  DS", "  SS", "  ES", "  FS", "  GS", "GDTR", "LDTR", "IDTR", "  TR"):
        name = label.strip().lower()
        rows.append([f"{label}: ", Printed(f"{name}.selector", f"{values[f'{name}.selector']:04x}"), " ",
                     Printed(f"{name}.attrib", f"{values[f'{name}.attrib']:04x}"), " ",
                     Printed(f"{name}.limit", f"{values[f'{name}.limit']:08x}"), " ", Printed(f"{name}.base", f"{values[f'{name}.base']:016x}")])
    return rows


def hvext(values: Values) -> List[Row]:
    """`!dump_vmcs` of hvext: 16 digits and the manual's title."""
    return [["0x", Printed(encoding, f"{values[encoding]:016x}"), " " + re.sub(r" \([A-Z]+\)$", "", row.title) if encoding else " " + row.title]
            for encoding, row in vmcs_fields.fields().items() if encoding in values and not row.title.startswith("(")]


HAXM_NAMES = {0x4000: "VMX_PIN_CONTROLS", 0x4002: "VMX_PRIMARY_PROCESSOR_CONTROLS", 0x4012: "VMX_ENTRY_CONTROLS", 0x4402: "VM_EXIT_INFO_REASON",
              0x6400: "VM_EXIT_INFO_QUALIFICATION", 0x681E: "GUEST_RIP", 0x6C16: "HOST_RIP", 0x4824: "GUEST_INTERRUPTIBILITY", 0x0000: "VMX_VPID"}


def haxm(values: Values, order: Sequence[int]) -> List[Row]:
    """HAXM's dump_vmcs: encoding, name, unpadded hexadecimal.  Its reader goes by the encoding, so only some names here are HAXM's."""
    return [[f"{encoding:04x} {HAXM_NAMES.get(encoding, f'VMX_FIELD_{encoding:X}')}: ", Printed(encoding, f"{values[encoding]:x}")]
            for encoding in order]


def field_list(values: Values, style: str) -> List[Row]:
    """What people print themselves."""
    forms: Dict[str, Callable[[int, str, int], Row]] = {
        "name: 0x": lambda encoding, name, value: [f"{name}: ", Printed(encoding, f"{value:#x}")],
        "name = 0x": lambda encoding, name, value: [f"{name:<32} = ", Printed(encoding, f"{value:#018x}")],
        "encoding 0x": lambda encoding, name, value: [f"{encoding:#010x} ", Printed(encoding, f"{value:#x}")],
        "vmread": lambda encoding, name, value: [f"vmread({encoding:#06x}) = ", Printed(encoding, f"{value:#x}")],
        "windbg": lambda encoding, name, value: [f"{name} : ", Printed(encoding, f"{value >> 32:08x}`{value & 0xffffffff:08x}")],
    }
    return [forms[style](encoding, vmcs_fields.find(encoding).name, value) for encoding, value in values.items() if isinstance(encoding, int)]


LIST_STYLES = ("name: 0x", "name = 0x", "encoding 0x", "vmread", "windbg")


# --- between the machine and the reader --------------------------------------------------------------------------------------------


PREFIXES: Mapping[str, Callable[[int], str]] = {
    "none": lambda number: "",
    "dmesg": lambda number: f"[{673 + number / 100:12.6f}] ",
    "dmesg module": lambda number: f"[{673 + number / 100:12.6f}] kvm_intel: ",
    "caller": lambda number: f"[{28040.9 + number / 100:12.6f}][T78789] ",
    "syslog": lambda number: f"Jun 24 12:00:{number % 60:02} host kernel: [{10639.238 + number / 100:12.6f}] ",
    "iso": lambda number: f"2024-06-24T12:00:{number % 60:02}.123456+02:00 host-7 kernel: kvm_intel: ",
    "module": lambda number: "kvm_intel: ",
    "xen": lambda number: "(XEN) ",
    "xen date": lambda number: f"(XEN) [2019-11-02 14:09:{number % 60:02}] ",
    "xen time": lambda number: f"(XEN) [ {3158.419563 + number:11.6f}] ",
    "domain": lambda number: "(d2) ",
    "ftrace": lambda number: f"CPU 0/KVM-251862 [019] {6384.13 + number / 100:.2f}: bprint: dump_vmcs: ",
    "ftrace long": lambda number: f" CPU 0/KVM-251862  [019] .... {6384.134567 + number / 100:.6f}: bprint: vmx_dump_sel.constprop.0: ",
    "svm": lambda number: f"[{673 + number / 100:12.6f}] SVM: ",
    "amd": lambda number: "kvm_amd: ",
    "haxm": lambda number: "haxm_warning: ",
    "mac": lambda number: "2019-01-11 13:29:19.100928+0800  localhost kernel[0]: (intelhaxm) haxm_warn: ",
}

NOISE = (
    "usb 1-1: new high-speed USB device number 3 using xhci_hcd",
    "[  700.000001] audit: type=1400 apparmor=\"ALLOWED\" operation=\"open\" pid=1234",
    "[  700.000002] RIP: 0010:vmx_vcpu_run+0x1234/0x5678 [kvm_intel]",
    "[  700.000003] RSP: 0018:ffffc9000058fa00 EFLAGS: 00010246",
    "[  700.000004] RAX: 00000000deadbeef RBX: 1111111111111111 RCX: 2222222222222222",
    "[  700.000005] FS:  00007f2e6ffe2740(0000) GS:ffff888007a00000(0000) knlGS:0000000000000000",
    "[  700.000006] CS:  0010 DS: 0000 ES: 0000 CR0: 0000000080050033",
    "[  700.000007] CR2: 00007f2e6ffe2000 CR3: 0000000123456000 CR4: 00000000003526f0",
    "EFER=0000000000000d01",
    "CR0=80050033 CR2=00007f2e CR3=12345000 CR4=000006f0",
    "CR0=0x80050033 CR3=0x1000 EFER=0x500",
    "my_handler: CR3 = 0x00000000dead1000",
    "some emulator: RIP = 0x00000000dead2000 mode=64",
    "The reply of the day before said that the TSC was fine.",
    "",
)

CASES: Mapping[str, Callable[[str], str]] = {"kept": lambda text: text, "lower": str.lower, "upper": str.upper}
BLANKS: Mapping[str, Callable[[str], str]] = {
    "kept": lambda text: text,
    "collapsed": lambda text: re.sub(r" +", " ", text),
    "no-break": lambda text: text.replace(" ", "\u00a0"),
    "tabs": lambda text: re.sub(r"  +", "\t", text),
}


def on_text(rows: Sequence[Row], change: Callable[[str], str]) -> List[Row]:
    """Changes what is printed around the values."""
    return [[piece if isinstance(piece, Printed) else change(piece) for piece in row] for row in rows]


def lost_colons(rows: Sequence[Row]) -> List[Row]:
    """Colons after a label are lost where something else separates it from what follows."""
    return on_text(rows, lambda text: re.sub(r":(?= )", "", text))


def private(rows: Sequence[Row], hidden: Callable[[int], bool]) -> List[Row]:
    """`<private>` in place of some values."""
    count = 0
    result: List[Row] = []
    for row in rows:
        changed: Row = []
        for piece in row:
            if isinstance(piece, Printed):
                count += 1
                changed.append("<private>" if hidden(count) else piece)
            else:
                changed.append(piece)
        result.append(changed)
    return result


def break_points(row: Row) -> List[Tuple[int, int]]:
    """(piece, offset) of every place where a mail program or a terminal can break the line: at a blank, or after an equal sign."""
    points = []
    seen_value = False
    for index, piece in enumerate(row):
        if isinstance(piece, Printed):
            seen_value = True
            continue
        for match in re.finditer(r"(?<=\S) +(?=\S)|(?<==)(?=0x$|$)", piece):
            if seen_value or match.start() > 0:
                points.append((index, match.end()))
        if index and piece[:1] in " \t" and piece.strip():
            points.append((index, len(piece) - len(piece.lstrip())))
        if piece[-1:] in " \t" and index + 1 < len(row) and piece.strip():
            points.append((index, len(piece)))
    return sorted(set(points))


def wrap(row: Row, points: Sequence[Tuple[int, int]]) -> List[Row]:
    """The row broken at the points."""
    result: List[Row] = [[]]
    for index, piece in enumerate(row):
        if isinstance(piece, Printed):
            result[-1].append(piece)
            continue
        last = 0
        for number, offset in sorted(points):
            if number == index:
                result[-1].append(piece[last:offset].rstrip(" "))
                result.append([])
                last = offset
        result[-1].append(piece[last:])
    return result


def render(records: Sequence[Sequence[Row]], values: Values, prefix: Callable[[int], str] = PREFIXES["none"], quote: str = "",
           trailing: str = "") -> Tuple[str, List[Where]]:
    """The text, and where each value stands in it.  A record is a printed line as one row or, wrapped, as several: only its first has the prefix."""
    text = ""
    where: List[Where] = []
    for number, record in enumerate(records):
        for index, row in enumerate(record):
            text += quote + (prefix(number) if index == 0 else "")
            for piece in row:
                start = len(text)
                text += piece.text if isinstance(piece, Printed) else piece
                if isinstance(piece, Printed) and piece.key is not None:
                    key = piece.key
                    assert isinstance(key, (int, str))
                    where.append(Where(key, values[key], start, len(text), number))
            text += trailing + "\n"
    return text, where


def vmcs_encodings() -> List[int]:
    return list(vmcs_fields.fields())


def vmcb_names() -> List[str]:
    return [row.name for row in vmcb_fields.fields().values() if row.kind == "int"]
