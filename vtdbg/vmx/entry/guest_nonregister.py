"""Checks on the guest's non-register state and its PDPTEs: exit reason 33, with an exit qualification of its own for some.

SDM vol. 3, Checks on Guest Non-Register State; Checks on Guest Page-Directory-Pointer-Table Entries (chapter VM Entries).  Dated 2026-11.
"""

from __future__ import annotations

import struct
from typing import Optional, Tuple, Union

from vtdbg import bits
from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.entry.controls import BASIC, EXTERNAL, INFO, MISC, NMI, event_type, injecting
from vtdbg.vmx.entry.formats import PG
from vtdbg.vmx.entry.guest_segments import dpl
from vtdbg.vmx.entry.rules import Failure, Gate, Missing, RuleBook, State, all_of, bit_list, mask_of, off, on

SEE = "SDM vol. 3, Checks on Guest Non-Register State"
SEE_PDPTE = "SDM vol. 3, Checks on Guest Page-Directory-Pointer-Table Entries"
QUALIFICATION_PDPTE, QUALIFICATION_NMI, QUALIFICATION_LINK = 2, 3, 4
"""SDM vol. 3, VM-Entry Failures During or After Loading Guest State."""

book = RuleBook("guest", SEE, ("entry-failure", 33, 0))

ACTIVITY, INTERRUPTIBILITY, PENDING, LINK = ("GUEST_ACTIVITY_STATE", "GUEST_INTERRUPTIBILITY_INFO", "GUEST_PENDING_DBG_EXCEPTIONS",
                                             "VMCS_LINK_POINTER")
ENTRY_CONTROLS, RFLAGS, DEBUGCTL = WORDS["entry"], "GUEST_RFLAGS", "GUEST_IA32_DEBUGCTL"
ACTIVE, HLT, SHUTDOWN, WAIT_FOR_SIPI = range(4)
ACTIVITY_NAMES = ("active", "HLT", "shutdown", "wait-for-SIPI")
STI, MOV_SS, SMI, BY_NMI, ENCLAVE = 1, 2, 4, 8, 16
DB, MC = 1, 18


# -- activity state ---------------------------------------------------------------------------------------------------------

@book.rule("guest.activity.supported", "V1", "the activity state is one that IA32_VMX_MISC[8:6] allows", ACTIVITY)
def _activity(state: State) -> Optional[str]:
    value = state[ACTIVITY]
    if value == ACTIVE:
        return None
    if value > WAIT_FOR_SIPI:
        return f"{ACTIVITY} {value:#x} is no activity state (0 active, 1 HLT, 2 shutdown, 3 wait-for-SIPI)"
    ident = ("", "ACTIVITY_HLT", "ACTIVITY_SHUTDOWN", "ACTIVITY_WAIT_SIPI")[value]
    if state.capability("vmx_misc", MISC, ident):
        return None
    return f"{ACTIVITY} is {value} ({ACTIVITY_NAMES[value]}), which this processor does not support"


def _activity_is(value: int) -> Gate:
    return lambda state: state[ACTIVITY] == value


@book.rule("guest.activity.hlt_dpl", "V2", "a guest in the HLT state has SS.DPL = 0", ACTIVITY, "GUEST_SS_AR_BYTES", when=_activity_is(HLT))
def _hlt_dpl(state: State) -> Optional[str]:
    value = dpl(state, "SS")
    return f"{ACTIVITY} is 1 (HLT) while SS.DPL is {value}" if value else None


@book.rule("guest.activity.blocking", "V3", "a guest with blocking by STI or MOV SS is in the active state", ACTIVITY, INTERRUPTIBILITY,
           when=lambda state: bool(state[INTERRUPTIBILITY] & (STI | MOV_SS)))
def _activity_blocking(state: State) -> Optional[str]:
    value = state[ACTIVITY]
    if value == ACTIVE:
        return None
    return f"{ACTIVITY} is {value} while {INTERRUPTIBILITY} {state[INTERRUPTIBILITY]:#x} blocks by {_blocking(state)}"


def _blocking(state: State) -> str:
    value = state[INTERRUPTIBILITY]
    return " and ".join(name for mask, name in ((STI, "STI (bit 0)"), (MOV_SS, "MOV SS (bit 1)")) if value & mask)


@book.rule("guest.activity.event", "V4", "the injected event is one that the activity state lets in", ACTIVITY, INFO,
           when=all_of(injecting, lambda state: state[ACTIVITY] in (HLT, SHUTDOWN, WAIT_FOR_SIPI)),
           hint="set GUEST_ACTIVITY_STATE to 0 (active) when an event is injected: a halted guest wakes up")
def _activity_event(state: State) -> Optional[str]:
    activity, kind, vector = state[ACTIVITY], event_type(state), state[INFO] & 0xFF
    allowed = {
        HLT: kind in (EXTERNAL, NMI) or (kind == 3 and vector in (DB, MC)) or (kind == 7 and vector == 0),
        SHUTDOWN: kind == NMI or (kind == 3 and vector == MC),
        WAIT_FOR_SIPI: False,
    }[activity]
    return None if allowed else f"{INFO} {state[INFO]:#x} injects type {kind}, vector {vector} in the {ACTIVITY_NAMES[activity]} state"


@book.rule("guest.activity.smm", "V5", "the activity state is not wait-for-SIPI where the entry is to SMM", ACTIVITY, ENTRY_CONTROLS,
           when=on("entry", "SMM"))
def _activity_smm(state: State) -> Optional[str]:
    return f'{ACTIVITY} is 3 (wait-for-SIPI) while "Entry to SMM" is 1' if state[ACTIVITY] == WAIT_FOR_SIPI else None


# -- interruptibility state -------------------------------------------------------------------------------------------------

@book.rule("guest.interruptibility.reserved", "V6", "bits 31:5 of the interruptibility state are 0", INTERRUPTIBILITY)
def _interruptibility(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    return f"{INTERRUPTIBILITY} {value:#x}: {bit_list(value >> 5 << 5)} must be 0" if value >> 5 else None


@book.rule("guest.interruptibility.both", "V7", "blocking by STI and blocking by MOV SS are not both 1", INTERRUPTIBILITY)
def _both(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    return f"{INTERRUPTIBILITY} {value:#x}: blocking by STI (bit 0) and by MOV SS (bit 1) are both 1" if value & 3 == 3 else None


@book.rule("guest.interruptibility.sti_if", "V8", "blocking by STI is 0 while RFLAGS.IF is 0", INTERRUPTIBILITY, RFLAGS,
           when=lambda state: not state[RFLAGS] & mask_of("rflags", "IF"))
def _sti_if(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    return f"{INTERRUPTIBILITY} {value:#x}: blocking by STI (bit 0) is 1 while {RFLAGS}.IF is 0" if value & STI else None


def _injects(kind: int) -> Gate:
    return lambda state: injecting(state) and event_type(state) == kind


@book.rule("guest.interruptibility.external", "V9", "no blocking by STI or MOV SS where an external interrupt is injected", INTERRUPTIBILITY, INFO,
           when=_injects(EXTERNAL), hint="inject in the interrupt window: RFLAGS.IF = 1 and no blocking by STI or MOV SS")
def _external(state: State) -> Optional[str]:
    if not state[INTERRUPTIBILITY] & (STI | MOV_SS):
        return None
    return f"{INFO} {state[INFO]:#x} injects an external interrupt while {INTERRUPTIBILITY} {state[INTERRUPTIBILITY]:#x} blocks by {_blocking(state)}"


@book.rule("guest.interruptibility.nmi_mov_ss", "V10", "no blocking by MOV SS where an NMI is injected", INTERRUPTIBILITY, INFO, when=_injects(NMI))
def _nmi_mov_ss(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    return f"{INFO} injects an NMI while {INTERRUPTIBILITY} {value:#x} blocks by MOV SS (bit 1)" if value & MOV_SS else None


@book.rule("guest.interruptibility.nmi_sti", "V10", "no blocking by STI where an NMI is injected, on processors that want that", INTERRUPTIBILITY,
           INFO,
           when=_injects(NMI), outcome=("entry-failure", 33, QUALIFICATION_NMI))
def _nmi_sti(state: State) -> Optional[str]:
    if state[INTERRUPTIBILITY] & STI:
        # The manual leaves it to the processor, and no capability MSR tells.
        raise Missing("whether this processor refuses NMI injection during blocking by STI (the manual allows both)")
    return None


@book.rule("guest.interruptibility.smi", "V11", "blocking by SMI is 0 outside SMM and 1 where the entry is to SMM", INTERRUPTIBILITY, ENTRY_CONTROLS)
def _smi(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    if value & SMI:
        return None if state.in_smm else f"{INTERRUPTIBILITY} {value:#x}: blocking by SMI (bit 2) is 1 outside SMM"
    return f'{INTERRUPTIBILITY} {value:#x}: blocking by SMI (bit 2) is 0 while "Entry to SMM" is 1' if state.on("entry", "SMM") else None


@book.rule("guest.interruptibility.nmi", "V12", "no blocking by NMI where an NMI is injected with virtual NMIs", INTERRUPTIBILITY, INFO, WORDS["pin"],
           when=all_of(_injects(NMI), on("pin", "VIRTUAL_NMIS")), hint="wait for the NMI window (NMI-window exiting), then inject")
def _virtual_nmi(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    return f"{INFO} injects an NMI while {INTERRUPTIBILITY} {value:#x} blocks by NMI (bit 3) and virtual NMIs are on" if value & BY_NMI else None


@book.rule("guest.interruptibility.enclave", "V13", "enclave interruption is 1 only without blocking by MOV SS and on a processor with SGX",
           INTERRUPTIBILITY,
           when=lambda state: bool(state[INTERRUPTIBILITY] & ENCLAVE))
def _enclave(state: State) -> Optional[str]:
    value = state[INTERRUPTIBILITY]
    if value & MOV_SS:
        return f"{INTERRUPTIBILITY} {value:#x}: enclave interruption (bit 4) and blocking by MOV SS (bit 1) are both 1"
    return None if state.cpuid(7, "ebx", 2, "SGX") else f"{INTERRUPTIBILITY} {value:#x}: bit 4 must be 0 on a processor without SGX"


# -- pending debug exceptions -----------------------------------------------------------------------------------------------

BUS_LOCK, ENABLED, BS, RTM = 1 << 11, 1 << 12, 1 << 14, 1 << 16


@book.rule("guest.pending_debug.reserved", "V14",
           "bits 63:17, 15, 13 and 10:4 of the pending debug exceptions are 0, bit 11 without bus-lock exceptions",
           PENDING)
def _pending(state: State) -> Optional[str]:
    value = state[PENDING]
    wrong = bits.table("pending_dbg").kind_mask("reserved0") & value
    if wrong:
        return f"{PENDING} {value:#x}: {bit_list(wrong)} must be 0"
    if value & BUS_LOCK and not state.cpuid(7, "ecx", 24, "bus-lock debug exceptions"):
        return f"{PENDING} {value:#x}: bit 11 must be 0 on a processor without bus-lock debug exceptions"
    return None


@book.rule("guest.pending_debug.bs", "V15", "BS says whether a single step is due where STI or MOV SS blocks or the guest is halted", PENDING, RFLAGS,
           INTERRUPTIBILITY, ACTIVITY, DEBUGCTL,
           when=lambda state: bool(state[INTERRUPTIBILITY] & (STI | MOV_SS)) or state[ACTIVITY] == HLT,
           hint="with RFLAGS.TF = 1 set bit 14 of the pending debug exceptions, or clear blocking by STI and MOV SS")
def _pending_bs(state: State) -> Optional[str]:
    bs, single_step = bool(state[PENDING] & BS), bool(state[RFLAGS] & mask_of("rflags", "TF"))
    if single_step and bs == bool(state[DEBUGCTL] & mask_of("debugctl", "BTF")):
        return f"{PENDING} {state[PENDING]:#x}: BS (bit 14) is {int(bs)} while RFLAGS.TF is 1 and IA32_DEBUGCTL.BTF is {int(bs)}; " \
               f"it must be {int(not bs)}"
    if not single_step and bs:
        return f"{PENDING} {state[PENDING]:#x}: BS (bit 14) is 1 while RFLAGS.TF is 0"
    return None


@book.rule("guest.pending_debug.rtm", "V16", "pending debug exceptions of an RTM region: bit 12 is 1, the other bits are 0, no blocking by MOV SS",
           PENDING, INTERRUPTIBILITY, when=lambda state: bool(state[PENDING] & RTM))
def _pending_rtm(state: State) -> Optional[str]:
    value = state[PENDING]
    if value & ~RTM != ENABLED:
        return f"{PENDING} {value:#x}: with RTM (bit 16) only bit 12 may and must be 1"
    if state[INTERRUPTIBILITY] & MOV_SS:
        return f"{PENDING} {value:#x}: RTM (bit 16) is 1 while blocking by MOV SS is 1"
    return None if state.cpuid(7, "ebx", 11, "RTM") else f"{PENDING} {value:#x}: bit 16 must be 0 on a processor without RTM"


# -- VMCS link pointer ------------------------------------------------------------------------------------------------------

ALL_ONES = (1 << 64) - 1
LINK_OUTCOME = ("entry-failure", 33, QUALIFICATION_LINK)


def _linked(state: State) -> bool:
    return state[LINK] != ALL_ONES


@book.rule("guest.link_pointer", "V17", "the VMCS link pointer is all ones, or aligned to 4096 bytes and inside the physical-address width", LINK,
           outcome=LINK_OUTCOME, when=_linked)
def _link(state: State) -> Union[None, str, Failure]:
    value = state[LINK]
    half = {0xFFFFFFFF: "only the low half was written", 0xFFFFFFFF00000000: "only the high half was written"}.get(value)
    hint = f"{half}: write all 64 bits (a 32-bit VMM writes encodings 0x2800 and 0x2801)" if half else \
        "write 0xffffffffffffffff unless VMCS shadowing is used"
    low = value & 0xFFF
    if low:
        return Failure(f"{LINK} {value:#x}: {bit_list(low)} must be 0", hint)
    wide = state.too_wide(value)
    return Failure(f"{LINK} {value:#x}: {bit_list(wide)} must be 0 (beyond the physical-address width)", hint) if wide else None


@book.rule("guest.link_pointer.revision", "V18", "the linked VMCS has the processor's revision, and its shadow bit equals \"VMCS shadowing\"", LINK,
           WORDS["sec"], outcome=LINK_OUTCOME, when=_linked, hint="write 0xffffffffffffffff unless VMCS shadowing is used")
def _link_revision(state: State) -> Optional[str]:
    value = state[LINK]
    if value & 0xFFF or value >> 52:
        return None     # guest.link_pointer fails; there is nothing to read
    header = struct.unpack("<I", state.read(value, 4))[0]
    revision = state.capability("vmx_basic", BASIC, "REVISION")
    if header & 0x7FFFFFFF != revision:
        return f"the VMCS at {LINK} {value:#x} has revision {header & 0x7FFFFFFF:#x}, the processor has {revision:#x}"
    shadowing = state.on("sec", "SHADOW_VMCS")
    if bool(header >> 31) == shadowing:
        return None
    return f'the VMCS at {LINK} {value:#x} is {"a shadow" if header >> 31 else "an ordinary"} VMCS while "VMCS shadowing" is {int(shadowing)}'


@book.rule("guest.link_pointer.current", "V19", "the VMCS link pointer is not the address of the current VMCS", LINK, outcome=LINK_OUTCOME,
           when=lambda state: _linked(state) and not state.in_smm)
def _link_current(state: State) -> Optional[str]:
    if state[LINK] & 0xFFF:
        return None     # no VMCS is there
    if state.vmcs_address is None:
        raise Missing("the address of this VMCS")
    return f"{LINK} {state[LINK]:#x} is the address of this VMCS" if state[LINK] == state.vmcs_address else None


RULES = book.rules

# -- PDPTEs: checked last ---------------------------------------------------------------------------------------------------

pdpte_book = RuleBook("guest", SEE_PDPTE, ("entry-failure", 33, QUALIFICATION_PDPTE))

PAE_GUEST = all_of(off("entry", "IA32E_MODE"), lambda state: bool(state["GUEST_CR0"] & PG),
                   lambda state: bool(state["GUEST_CR4"] & mask_of("cr4", "PAE")))


def _pdptes(state: State) -> Tuple[Tuple[str, int], ...]:
    """(where, entry) of the four entries: the VMCS has them with EPT, memory at CR3 without."""
    if state.on("sec", "EPT"):
        return tuple((f"GUEST_PDPTR{index}", state[f"GUEST_PDPTR{index}"]) for index in range(4))
    base = state["GUEST_CR3"] & 0xFFFFFFE0
    return tuple((f"PDPTE{index} at {base + 8 * index:#x}", entry) for index, entry in enumerate(struct.unpack("<4Q", state.read(base, 32))))


@pdpte_book.rule("guest.pdptes", "T1", "the present PDPTEs of a PAE guest have no reserved bit", "GUEST_PDPTR0", "GUEST_PDPTR1", "GUEST_PDPTR2",
                 "GUEST_PDPTR3", "GUEST_CR3", when=PAE_GUEST,
                 hint="with EPT, VM entry takes the PDPTEs from the VMCS: write them whenever the guest's CR3 changes; they have no R/W bit")
def _pdpte(state: State) -> Optional[str]:
    reserved = bits.table("pae_pdpte").kind_mask("reserved0")
    for where, entry in _pdptes(state):
        if entry & 1:
            wrong = entry & reserved or state.too_wide(entry)
            if wrong:
                return f"{where} is {entry:#x}: {bit_list(wrong)} must be 0 in a present entry"
    return None


PDPTE_RULES = pdpte_book.rules
