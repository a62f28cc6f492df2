"""Checks on the VM-execution, VM-exit and VM-entry control fields: a failure is VMfailValid with error 7.

SDM vol. 3, Checks on VMX Controls and Host-State Area (chapter VM Entries), in the manual's order.  Dated 2026-11.
"""

from __future__ import annotations

from typing import Callable, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.vmx.capabilities import WORD_SOURCES, msr_name
from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.entry.rules import (
    Check,
    Failure,
    Gate,
    Missing,
    RuleBook,
    State,
    all_of,
    bit_list,
    mask_of,
    named_bits,
    off,
    on,
)

SEE_EXECUTION = "SDM vol. 3, Checks on VMX Controls: VM-Execution Control Fields"
SEE_EXIT = "SDM vol. 3, Checks on VMX Controls: VM-Exit Control Fields"
SEE_ENTRY = "SDM vol. 3, Checks on VMX Controls: VM-Entry Control Fields"

book = RuleBook("controls", SEE_EXECUTION, ("VMfailValid", 7))

CR4_FIXED1, BASIC, MISC, EPT_VPID_CAP = 0x489, 0x480, 0x485, 0x48C
LINEAR_HINT = "this looks like a linear address: the VMCS holds physical addresses (MmGetPhysicalAddress, virt_to_phys)"


# -- shapes that many rules share -------------------------------------------------------------------------------------------

def allowed_settings(word: str) -> Check:
    """The word keeps to its capability MSR."""
    def check(state: State) -> Optional[str]:
        value = state.word(word)
        allowed = state.caps.allowed(word) if state.caps is not None else None
        if allowed is None:
            source = WORD_SOURCES[word]
            raise Missing(msr_name(source.msr) + (f" or {msr_name(source.true_msr)} with IA32_VMX_BASIC" if source.true_msr else ""))
        low, high = allowed.violations(value)
        if not low and not high:
            return None
        wrong = []
        if low:
            wrong.append(f"must be 1: {named_bits(word, low)}")
        if high:
            wrong.append(f"must be 0: {named_bits(word, high)}")
        return f"{WORDS[word]} {value:#x} against {msr_name(allowed.source_msr)}: {'; '.join(wrong)}"
    return check


def address_of(name: str, alignment: int = 4096) -> Check:
    """The field is a physical address: aligned, and inside the physical-address width."""
    def check(state: State) -> Union[None, str, Failure]:
        value = state[name]
        low = value & (alignment - 1)
        hint = LINEAR_HINT if value >> 47 == 0x1FFFF else ""
        if low:
            return Failure(f"{name} {value:#x} is not aligned to {alignment} bytes: {bit_list(low)} must be 0", hint)
        wide = state.too_wide(value)
        if wide:
            return Failure(f"{name} {value:#x} is beyond the physical-address width: {bit_list(wide)} must be 0", hint)
        return None
    return check


def address(id: str, row: str, name: str, what: str, when: Gate, alignment: int = 4096) -> None:
    book.add(id, row, f"{what} is aligned to {alignment} bytes and inside the physical-address width", (name,), address_of(name, alignment),
             when=when)


def needs(id: str, row: str, needing: Tuple[str, str], needed: Tuple[str, str], value: bool = True, see: str = "") -> None:
    """Control `needing` = 1 wants control `needed` to be `value`."""
    mask = mask_of(*needed)
    names = tuple(f'"{bits.table(word)[ident].name}"' for word, ident in (needing, needed))

    def check(state: State) -> Optional[str]:
        if state.test(needed[0], mask) == value:
            return None
        return f"{names[0]} is 1 while {names[1]} is {int(not value)}"

    book.add(id, row, f"{names[0]} = 1 requires {names[1]} = {int(value)}", (WORDS[needing[0]], WORDS[needed[0]]), check,
             when=on(*needing), see=see)


def msr_area(name: str) -> Callable[[State], Union[None, str, Failure]]:
    """The address of an MSR-load or MSR-store area, and the address of its last byte."""
    count_name = name.replace("_ADDR", "_COUNT")
    aligned = address_of(name, 16)

    def check(state: State) -> Union[None, str, Failure]:
        wrong = aligned(state)
        if wrong is not None:
            return wrong
        start, count = state[name], state[count_name]
        last = start + 16 * count - 1
        if state.too_wide(last):
            return f"the last of the {count} entries at {name} {start:#x} ends at {last:#x}, beyond the physical-address width"
        return None
    return check


def count_is_not_0(name: str) -> Gate:
    return lambda state: state[name] != 0


# -- VM-execution control fields --------------------------------------------------------------------------------------------

for _word, _row, _title in (("pin", "E1", "pin-based controls"), ("proc", "E2", "primary processor-based controls")):
    book.add(f"controls.{_word}.allowed", _row, f"the {_title} keep to the processor's allowed settings", (WORDS[_word],), allowed_settings(_word),
             hint="adjust with the capability MSR: value | low half, then & high half")
book.add("controls.sec.allowed", "E3", "the secondary processor-based controls keep to the processor's allowed settings", (WORDS["sec"],),
         allowed_settings("sec"), when=on("proc", "SEC_CONTROLS"), hint="use IA32_VMX_PROCBASED_CTLS2 (0x48B)")
book.add("controls.tert.allowed", "E4", "the tertiary processor-based controls keep to the processor's allowed settings", (WORDS["tert"],),
         allowed_settings("tert"), when=on("proc", "TERTIARY_CONTROLS"))


@book.rule("controls.cr3_targets", "E5", "the CR3-target count is not above IA32_VMX_MISC[24:16]", "CR3_TARGET_COUNT")
def _cr3_targets(state: State) -> Optional[str]:
    count = state["CR3_TARGET_COUNT"]
    if not count:
        return None
    most = state.capability("vmx_misc", MISC, "CR3_TARGETS")
    return f"CR3_TARGET_COUNT is {count}, the processor has {most} CR3-target values" if count > most else None


address("controls.io_bitmap_a", "E6", "IO_BITMAP_A", "I/O-bitmap A address", on("proc", "USE_IO_BITMAPS"))
address("controls.io_bitmap_b", "E6", "IO_BITMAP_B", "I/O-bitmap B address", on("proc", "USE_IO_BITMAPS"))
address("controls.msr_bitmap", "E7", "MSR_BITMAP", "MSR-bitmap address", on("proc", "USE_MSR_BITMAPS"))
address("controls.virtual_apic", "E8", "VIRTUAL_APIC_PAGE_ADDR", "virtual-APIC address", on("proc", "VIRTUAL_TPR"))


@book.rule("controls.tpr_threshold.reserved", "E9", "bits 31:4 of the TPR threshold are 0 without virtual-interrupt delivery", "TPR_THRESHOLD",
           when=all_of(on("proc", "VIRTUAL_TPR"), off("sec", "VIRT_INTR_DELIVERY")))
def _tpr_threshold(state: State) -> Optional[str]:
    value = state["TPR_THRESHOLD"]
    return f"TPR_THRESHOLD {value:#x}: {bit_list(value >> 4 << 4)} must be 0" if value >> 4 else None


@book.rule("controls.tpr_threshold.vtpr", "E10", "TPR threshold[3:0] is not above VTPR[7:4] without APIC-access virtualization and virtual-interrupt "
           "delivery", "TPR_THRESHOLD", "VIRTUAL_APIC_PAGE_ADDR",
           when=all_of(on("proc", "VIRTUAL_TPR"), off("sec", "VIRT_APIC_ACCESSES"), off("sec", "VIRT_INTR_DELIVERY")))
def _tpr_threshold_vtpr(state: State) -> Optional[str]:
    threshold = state["TPR_THRESHOLD"] & 0xF
    if not threshold:
        return None
    vtpr = state.read(state["VIRTUAL_APIC_PAGE_ADDR"] + 0x80, 1)[0]
    if threshold <= vtpr >> 4:
        return None
    return f"TPR_THRESHOLD {threshold} is above bits 7:4 of VTPR {vtpr:#x} (byte 0x80 of the virtual-APIC page)"


needs("controls.virtual_nmis", "E11", ("pin", "VIRTUAL_NMIS"), ("pin", "NMI_EXITING"))
needs("controls.nmi_window", "E12", ("proc", "NMI_WINDOW_EXITING"), ("pin", "VIRTUAL_NMIS"))
address("controls.apic_access", "E13", "APIC_ACCESS_ADDR", "APIC-access address", on("sec", "VIRT_APIC_ACCESSES"))
needs("controls.x2apic.tpr_shadow", "E14", ("sec", "VIRTUAL_X2APIC"), ("proc", "VIRTUAL_TPR"))
needs("controls.apic_register.tpr_shadow", "E14", ("sec", "APIC_REGISTER_VIRT"), ("proc", "VIRTUAL_TPR"))
needs("controls.interrupt_delivery.tpr_shadow", "E14", ("sec", "VIRT_INTR_DELIVERY"), ("proc", "VIRTUAL_TPR"))
needs("controls.ipi_virtualization.tpr_shadow", "E14", ("tert", "IPI_VIRT"), ("proc", "VIRTUAL_TPR"))
needs("controls.x2apic.apic_access", "E15", ("sec", "VIRTUAL_X2APIC"), ("sec", "VIRT_APIC_ACCESSES"), value=False)
needs("controls.interrupt_delivery.exiting", "E16", ("sec", "VIRT_INTR_DELIVERY"), ("pin", "INTR_EXITING"))
needs("controls.posted.delivery", "E17", ("pin", "POSTED_INTR"), ("sec", "VIRT_INTR_DELIVERY"))
needs("controls.posted.acknowledge", "E18", ("pin", "POSTED_INTR"), ("exit", "ACK_INTR_ON_EXIT"))


@book.rule("controls.posted.vector", "E19", "the posted-interrupt notification vector is not above 255", "POSTED_INTR_NV", when=on("pin",
                                                                                                                                   "POSTED_INTR"))
def _posted_vector(state: State) -> Optional[str]:
    value = state["POSTED_INTR_NV"]
    return f"POSTED_INTR_NV {value:#x} is not a vector: {bit_list(value & 0xFF00)} must be 0" if value > 0xFF else None


address("controls.posted.descriptor", "E20", "POSTED_INTR_DESC_ADDR", "posted-interrupt descriptor address", on("pin", "POSTED_INTR"), 64)


@book.rule("controls.vpid", "E21", "the VPID is not 0", "VIRTUAL_PROCESSOR_ID", when=on("sec", "VPID"),
           hint="VPID 0 belongs to the VMM: give every virtual processor a number from 1")
def _vpid(state: State) -> Optional[str]:
    return None if state["VIRTUAL_PROCESSOR_ID"] else 'VIRTUAL_PROCESSOR_ID is 0 while "Enable VPID" is 1'


EPT = on("sec", "EPT")


@book.rule("controls.eptp.memory_type", "E22", "EPTP[2:0] is a memory type that IA32_VMX_EPT_VPID_CAP allows (0 UC, 6 WB)", "EPT_POINTER", when=EPT)
def _eptp_memory_type(state: State) -> Optional[str]:
    value = state["EPT_POINTER"]
    kind = value & 7
    supported = {0: "UC", 6: "WB"}.get(kind)
    if supported is None:
        return f"EPT_POINTER {value:#x}: memory type {kind} (bits 2:0) is neither 0 (UC) nor 6 (WB)"
    if state.capability("ept_vpid_cap", EPT_VPID_CAP, supported):
        return None
    return f"EPT_POINTER {value:#x}: memory type {kind} ({supported}) is not one that this processor uses for EPT structures"


@book.rule("controls.eptp.walk_length", "E23", "EPTP[5:3] is a page-walk length that IA32_VMX_EPT_VPID_CAP allows, less 1", "EPT_POINTER", when=EPT,
           hint="write 3 for a 4-level walk: the field is the length less 1")
def _eptp_walk_length(state: State) -> Optional[str]:
    value = state["EPT_POINTER"]
    length = (value >> 3 & 7) + 1
    if length not in (4, 5):
        return f"EPT_POINTER {value:#x}: bits 5:3 are {length - 1}, a page-walk length of {length}; EPT has 4 or 5 levels"
    if state.capability("ept_vpid_cap", EPT_VPID_CAP, f"WALK_{length}"):
        return None
    return f"EPT_POINTER {value:#x}: the processor does not support a page-walk length of {length} (bits 5:3 are {length - 1})"


def eptp_feature(id: str, row: str, bit: int, feature: str, says: str, enables: str) -> None:
    """An EPTP bit that must be 0 unless IA32_VMX_EPT_VPID_CAP has `feature`."""
    def check(state: State) -> Optional[str]:
        value = state["EPT_POINTER"]
        if value & 1 << bit and not state.capability("ept_vpid_cap", EPT_VPID_CAP, feature):
            return f"EPT_POINTER {value:#x}: bit {bit} enables {enables}, which the processor does not support"
        return None
    book.add(id, row, f"EPTP[{bit}] is 0 unless the processor {says}", ("EPT_POINTER",), check, when=EPT)


eptp_feature("controls.eptp.ad", "E24", 6, "AD", "has accessed and dirty flags for EPT", "accessed and dirty flags")
eptp_feature("controls.eptp.sss", "E25", 7, "SSS", "enforces supervisor shadow-stack pages in EPT", "supervisor shadow-stack control")


@book.rule("controls.eptp.reserved", "E26", "EPTP[11:8] and the bits beyond the physical-address width are 0", "EPT_POINTER", when=EPT)
def _eptp_reserved(state: State) -> Optional[str]:
    value = state["EPT_POINTER"]
    wrong = value & 0xF00
    if not wrong:
        wrong = state.too_wide(value)
    return f"EPT_POINTER {value:#x}: {bit_list(wrong)} must be 0" if wrong else None


needs("controls.pml.ept", "E27", ("sec", "PAGE_MOD_LOGGING"), ("sec", "EPT"))
address("controls.pml.address", "E28", "PML_ADDRESS", "PML address", on("sec", "PAGE_MOD_LOGGING"))
needs("controls.unrestricted_guest.ept", "E29", ("sec", "UNRESTRICTED_GUEST"), ("sec", "EPT"))
needs("controls.mode_based_execute.ept", "E30", ("sec", "MODE_BASED_EPT_EXEC"), ("sec", "EPT"))
needs("controls.sub_page_write.ept", "E31", ("sec", "SUB_PAGE_WRITE"), ("sec", "EPT"))
address("controls.sub_page_write.table", "E32", "SPPTP", "sub-page-permission-table pointer", on("sec", "SUB_PAGE_WRITE"))
book.add("controls.vmfunc.allowed", "E33", "the VM-function controls keep to IA32_VMX_VMFUNC", (WORDS["vmfunc"],), allowed_settings("vmfunc"),
         when=on("sec", "VMFUNC"))
needs("controls.eptp_switching.ept", "E34", ("vmfunc", "EPTP_SWITCHING"), ("sec", "EPT"))
address("controls.eptp_switching.list", "E35", "EPTP_LIST_ADDRESS", "EPTP-list address", on("vmfunc", "EPTP_SWITCHING"))
address("controls.shadow.vmread", "E36", "VMREAD_BITMAP", "VMREAD-bitmap address", on("sec", "SHADOW_VMCS"))
address("controls.shadow.vmwrite", "E36", "VMWRITE_BITMAP", "VMWRITE-bitmap address", on("sec", "SHADOW_VMCS"))
address("controls.ve_information", "E37", "VE_INFORMATION_ADDRESS", "virtualization-exception information address", on("sec", "EPT_VIOLATION_VE"))
needs("controls.pt_guest_physical.ept", "E38", ("sec", "PT_USE_GPA"), ("sec", "EPT"))
needs("controls.pt_guest_physical.load", "E38", ("sec", "PT_USE_GPA"), ("entry", "LOAD_IA32_RTIT_CTL"))
needs("controls.pt_guest_physical.clear", "E38", ("sec", "PT_USE_GPA"), ("exit", "CLEAR_IA32_RTIT_CTL"))


@book.rule("controls.tsc_multiplier", "E39", "the TSC multiplier is not 0", "TSC_MULTIPLIER", when=on("sec", "TSC_SCALING"))
def _tsc_multiplier(state: State) -> Optional[str]:
    return None if state["TSC_MULTIPLIER"] else 'TSC_MULTIPLIER is 0 while "Use TSC scaling" is 1'


needs("controls.hlat.ept", "E40", ("tert", "HLAT"), ("sec", "EPT"))


@book.rule("controls.hlat.pointer", "E40", "HLATP[2:0], HLATP[11:5] and the bits beyond the physical-address width are 0", "HLATP", when=on("tert",
                                                                                                                                            "HLAT"))
def _hlatp(state: State) -> Optional[str]:
    value = state["HLATP"]
    wrong = value & 0xFE7 or state.too_wide(value)
    return f"HLATP {value:#x}: {bit_list(wrong)} must be 0" if wrong else None


@book.rule("controls.hlat.prefix", "E40", "the HLAT prefix size is not above IA32_VMX_EPT_VPID_CAP[53:48]", "HLAT_PREFIX_SIZE", when=on("tert",
                                                                                                                                        "HLAT"))
def _hlat_prefix(state: State) -> Optional[str]:
    value = state["HLAT_PREFIX_SIZE"]
    if not value:
        return None
    most = state.capability("ept_vpid_cap", EPT_VPID_CAP, "MAX_HLAT_PREFIX")
    return f"HLAT_PREFIX_SIZE is {value}, the processor allows {most}" if value > most else None


needs("controls.paging_write.ept", "E41", ("tert", "EPT_PAGING_WRITE_CONTROL"), ("sec", "EPT"))
needs("controls.paging_verification.ept", "E41", ("tert", "GUEST_PAGING_VERIFICATION"), ("sec", "EPT"))
address("controls.pasid.low", "E42", "LOW_PASID_DIRECTORY_ADDR", "low PASID directory address", on("sec", "PASID_TRANSLATION"))
address("controls.pasid.high", "E42", "HIGH_PASID_DIRECTORY_ADDR", "high PASID directory address", on("sec", "PASID_TRANSLATION"))
address("controls.ipi_virtualization.table", "E43", "PID_POINTER_TABLE", "PID-pointer table address", on("tert", "IPI_VIRT"), 8)


@book.rule("controls.ipi_virtualization.last", "E43", "the last entry of the PID-pointer table is inside the physical-address width",
           "PID_POINTER_TABLE", "LAST_PID_POINTER_INDEX", when=on("tert", "IPI_VIRT"))
def _pid_table_end(state: State) -> Optional[str]:
    last = state["PID_POINTER_TABLE"] + 8 * state["LAST_PID_POINTER_INDEX"] + 7
    if state.too_wide(last):
        return f"entry {state['LAST_PID_POINTER_INDEX']} of the PID-pointer table ends at {last:#x}, beyond the physical-address width"
    return None


needs("controls.apic_timer.delivery", "E44", ("tert", "APIC_TIMER_VIRT"), ("sec", "VIRT_INTR_DELIVERY"))


@book.rule("controls.apic_timer.vector", "E44", "the virtual timer vector is not above 255", "GUEST_APIC_TIMER_VECTOR", when=on("tert",
                                                                                                                                "APIC_TIMER_VIRT"))
def _apic_timer_vector(state: State) -> Optional[str]:
    value = state["GUEST_APIC_TIMER_VECTOR"]
    return f"GUEST_APIC_TIMER_VECTOR {value:#x}: {bit_list(value & 0xFF00)} must be 0" if value > 0xFF else None


# -- VM-exit control fields -------------------------------------------------------------------------------------------------

book.see = SEE_EXIT
book.add("controls.exit.allowed", "X1", "the VM-exit controls keep to the processor's allowed settings", (WORDS["exit"],), allowed_settings("exit"),
         hint="adjust with the capability MSR: value | low half, then & high half")
book.add("controls.exit2.allowed", "X2", "the secondary VM-exit controls keep to IA32_VMX_EXIT_CTLS2", (WORDS["exit2"],), allowed_settings("exit2"),
         when=on("exit", "ACTIVATE_SECONDARY_CONTROLS"))
needs("controls.preemption_timer.save", "X3", ("exit", "SAVE_VMX_PREEMPTION_TIMER"), ("pin", "PREEMPTION_TIMER"))
for _kind, _row, _what in (("STORE", "X4", "VM-exit MSR-store"), ("LOAD", "X5", "VM-exit MSR-load")):
    _name = f"VM_EXIT_MSR_{_kind}_ADDR"
    book.add(f"controls.exit_msr_{_kind.lower()}", _row, f"the {_what} area is aligned to 16 bytes and inside the physical-address width",
             (_name, _name.replace("_ADDR", "_COUNT")), msr_area(_name), when=count_is_not_0(_name.replace("_ADDR", "_COUNT")))

# -- VM-entry control fields ------------------------------------------------------------------------------------------------

book.see = SEE_ENTRY
book.add("controls.entry.allowed", "N1", "the VM-entry controls keep to the processor's allowed settings", (WORDS["entry"],),
         allowed_settings("entry"),
         hint="adjust with the capability MSR: value | low half, then & high half")

INFO = "VM_ENTRY_INTR_INFO_FIELD"
EXTERNAL, NMI, HARDWARE, OTHER = 0, 2, 3, 7
WITH_LENGTH = (4, 5, 6)
WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
"""Exceptions that deliver an error code; #CP (21) joins them on processors with CET (SDM vol. 3, Exception and Interrupt Reference)."""


def injecting(state: State) -> bool:
    return state[INFO] >> 31 != 0


def event_type(state: State) -> int:
    return state[INFO] >> 8 & 7


@book.rule("controls.event.type", "N2", "the type of the injected event is not reserved", INFO, when=injecting)
def _event_type(state: State) -> Optional[str]:
    kind = event_type(state)
    if kind == 1:
        return f"{INFO} {state[INFO]:#x}: type 1 (bits 10:8) is reserved"
    if kind == OTHER and not state.supports("proc", "MONITOR_TRAP_FLAG"):
        return f"{INFO} {state[INFO]:#x}: type 7 (other event) is for processors with the monitor trap flag"
    return None


@book.rule("controls.event.vector", "N3", "the vector suits the type of the injected event", INFO, when=injecting)
def _event_vector(state: State) -> Optional[str]:
    info = state[INFO]
    kind, vector = event_type(state), info & 0xFF
    if kind == NMI and vector != 2:
        return f"{INFO} {info:#x}: an NMI has vector 2, this is {vector}"
    if kind == HARDWARE and vector > 31:
        return f"{INFO} {info:#x}: a hardware exception has a vector up to 31, this is {vector}"
    if kind == OTHER and vector:
        # With FRED transitions, vectors 1 and 2 stand for SYSCALL and SYSENTER.
        if vector <= 2 and state["GUEST_CR4"] & mask_of("cr4", "FRED"):
            return None
        return f"{INFO} {info:#x}: the only other event is a pending MTF VM exit, vector 0; this is {vector}"
    return None


@book.rule("controls.event.error_code", "N4", "the injected event delivers an error code exactly where the exception has one", INFO,
           "GUEST_CR0", "SECONDARY_VM_EXEC_CONTROL", when=injecting,
           hint="set bit 11 (deliver error code) for #DF, #TS, #NP, #SS, #GP, #PF and #AC in protected mode, and for nothing else")
def _event_error_code(state: State) -> Optional[str]:
    info = state[INFO]
    kind, vector, deliver = event_type(state), info & 0xFF, bool(info >> 11 & 1)
    if kind != HARDWARE:
        return f"{INFO} {info:#x}: bit 11 delivers an error code, which only a hardware exception has" if deliver else None
    # With unrestricted guest and CR0.PE = 0 the guest is in real-address mode, where no exception has an error code.
    if not state["GUEST_CR0"] & 1 and state.on("sec", "UNRESTRICTED_GUEST"):
        return f"{INFO} {info:#x}: bit 11 delivers an error code to a guest in real-address mode (CR0.PE = 0)" if deliver else None
    has_code = vector in WITH_ERROR_CODE or (vector == 21 and bool(state.msr(CR4_FIXED1) & mask_of("cr4", "CET")))
    if deliver == has_code or state.capability("vmx_basic", BASIC, "NO_HW_ERROR_CODE_CC"):
        return None
    return f"{INFO} {info:#x}: exception {vector} {'has an' if has_code else 'has no'} error code, bit 11 is {int(deliver)}"


@book.rule("controls.event.reserved", "N5", "bits 30:12 of the injected event are 0", INFO, when=injecting)
def _event_reserved(state: State) -> Optional[str]:
    info = state[INFO]
    wrong = info & 0x7FFFF000
    if wrong == 1 << 13 and event_type(state) == HARDWARE and state.capability("vmx_basic", BASIC, "NESTED_EXCEPTION"):
        return None
    return f"{INFO} {info:#x}: {bit_list(wrong)} must be 0" if wrong else None


@book.rule("controls.event.error_code_bits", "N6", "bits 31:16 of the delivered error code are 0", "VM_ENTRY_EXCEPTION_ERROR_CODE", INFO,
           when=lambda state: injecting(state) and bool(state[INFO] >> 11 & 1))
def _event_error_code_bits(state: State) -> Optional[str]:
    value = state["VM_ENTRY_EXCEPTION_ERROR_CODE"]
    return f"VM_ENTRY_EXCEPTION_ERROR_CODE {value:#x}: {bit_list(value & 0xFFFF0000)} must be 0" if value >> 16 else None


@book.rule("controls.event.length", "N7", "an injected software event has an instruction length from 1 to 15 (0 where IA32_VMX_MISC[30] is 1)",
           "VM_ENTRY_INSTRUCTION_LEN", INFO, when=lambda state: injecting(state) and event_type(state) in WITH_LENGTH,
           hint="copy VM_EXIT_INSTRUCTION_LEN: the guest's return address is RIP plus this length")
def _event_length(state: State) -> Optional[str]:
    length = state["VM_ENTRY_INSTRUCTION_LEN"]
    if 1 <= length <= 15 or (length == 0 and state.capability("vmx_misc", MISC, "ZERO_LEN_INS")):
        return None
    return f"VM_ENTRY_INSTRUCTION_LEN is {length} with a software event (type {event_type(state)}); it has to be 1 to 15"


book.add("controls.entry_msr_load", "N8", "the VM-entry MSR-load area is aligned to 16 bytes and inside the physical-address width",
         ("VM_ENTRY_MSR_LOAD_ADDR", "VM_ENTRY_MSR_LOAD_COUNT"), msr_area("VM_ENTRY_MSR_LOAD_ADDR"), when=count_is_not_0("VM_ENTRY_MSR_LOAD_COUNT"))


@book.rule("controls.smm", "N9", '"Entry to SMM" and "Deactivate dual-monitor treatment" are 0 outside SMM, and never both 1', WORDS["entry"])
def _smm(state: State) -> Optional[str]:
    enter, deactivate = state.on("entry", "SMM"), state.on("entry", "DEACT_DUAL_MONITOR")
    if enter and deactivate:
        return '"Entry to SMM" and "Deactivate dual-monitor treatment" are both 1'
    if state.in_smm or not (enter or deactivate):
        return None
    return f'"{"Entry to SMM" if enter else "Deactivate dual-monitor treatment"}" is 1 outside SMM'


RULES = book.rules
