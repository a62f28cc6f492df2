"""Checks on the guest's control registers, debug registers and MSRs, on RIP, RFLAGS and SSP: a failure is an entry failure, exit reason 33.

SDM vol. 3, Checks on the Guest-State Area (chapter VM Entries), in the manual's order; segments are in guest_segments.py, activity,
interruptibility, the link pointer and PDPTEs in guest_nonregister.py.  Dated 2026-11.
"""

from __future__ import annotations

from typing import Optional, Union

from vtdbg import bits
from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.entry import formats
from vtdbg.vmx.entry.controls import EXTERNAL, INFO, event_type, injecting
from vtdbg.vmx.entry.formats import CR0_FIXED0, CR0_FIXED1, CR0_NEVER_CHECKED, CR4_FIXED0, CR4_FIXED1, LMA, LME, PE, PG
from vtdbg.vmx.entry.guest_segments import L
from vtdbg.vmx.entry.rules import Failure, Gate, RuleBook, State, all_of, any_of, bit_list, mask_of, off, on

SEE_REGISTERS = "SDM vol. 3, Checks on Guest Control Registers, Debug Registers, and MSRs"
SEE_RIP = "SDM vol. 3, Checks on Guest RIP, RFLAGS, and SSP"

book = RuleBook("guest", SEE_REGISTERS, ("entry-failure", 33, 0))

ENTRY_CONTROLS = WORDS["entry"]
LONG_GUEST = on("entry", "IA32E_MODE")
LEGACY_GUEST = off("entry", "IA32E_MODE")


@book.rule("guest.cr0", "G1", "GUEST_CR0 keeps to IA32_VMX_CR0_FIXED0 and FIXED1 (PE and PG are free with unrestricted guest)", "GUEST_CR0",
           hint="a guest in real-address mode or without paging needs unrestricted guest (with EPT); NE (bit 5) has to be 1 in any guest")
def _cr0(state: State) -> Optional[str]:
    value = state["GUEST_CR0"]
    fixed0, fixed1 = state.msr(CR0_FIXED0) & ~CR0_NEVER_CHECKED, state.msr(CR0_FIXED1) | CR0_NEVER_CHECKED
    if fixed0 & ~value & (PE | PG) and state.on("sec", "UNRESTRICTED_GUEST"):
        fixed0 &= ~(PE | PG)
    return formats.fixed_bits("cr0", "GUEST_CR0", value, fixed0, fixed1)


@book.rule("guest.cr0.pg", "G2", "GUEST_CR0.PG = 1 requires GUEST_CR0.PE = 1", "GUEST_CR0")
def _cr0_pg(state: State) -> Optional[str]:
    value = state["GUEST_CR0"]
    return f"GUEST_CR0 {value:#x}: PG (bit 31) is 1 while PE (bit 0) is 0" if value & PG and not value & PE else None


@book.rule("guest.cr4", "G3", "GUEST_CR4 keeps to IA32_VMX_CR4_FIXED0 and FIXED1", "GUEST_CR4",
           hint="VMXE (bit 13) has to be 1 in the guest: hide it with the CR4 guest/host mask and read shadow")
def _cr4(state: State) -> Optional[str]:
    return formats.fixed_bits("cr4", "GUEST_CR4", state["GUEST_CR4"], state.msr(CR4_FIXED0), state.msr(CR4_FIXED1))


@book.rule("guest.cr4.cet", "G4", "GUEST_CR4.CET = 1 requires GUEST_CR0.WP = 1", "GUEST_CR4", "GUEST_CR0",
           when=lambda state: bool(state["GUEST_CR4"] & mask_of("cr4", "CET")))
def _cet(state: State) -> Optional[str]:
    return None if state["GUEST_CR0"] & mask_of("cr0", "WP") else "GUEST_CR4.CET is 1 while GUEST_CR0.WP is 0"


LOADS_DEBUG = on("entry", "LOAD_DEBUG_CONTROLS")
DEBUGCTL = "GUEST_IA32_DEBUGCTL"


@book.rule("guest.debugctl", "G5", "guest IA32_DEBUGCTL has no reserved bit", DEBUGCTL, when=LOADS_DEBUG)
def _debugctl(state: State) -> Optional[str]:
    value = state[DEBUGCTL]
    wrong = bits.table("debugctl").kind_mask("reserved0") & value
    if wrong:
        return f"{DEBUGCTL} {value:#x}: {bit_list(wrong)} must be 0"
    if value & mask_of("debugctl", "BUS_LOCK_DETECT") and not state.cpuid(7, "ecx", 24, "bus-lock debug exceptions"):
        return f"{DEBUGCTL} {value:#x}: bit 2 must be 0 on a processor without bus-lock debug exceptions"
    if value & mask_of("debugctl", "RTM_DEBUG") and not state.cpuid(7, "ebx", 11, "RTM"):
        return f"{DEBUGCTL} {value:#x}: bit 15 must be 0 on a processor without RTM"
    return None


@book.rule("guest.dr7", "G6", "bits 63:32 of GUEST_DR7 are 0", "GUEST_DR7", when=LOADS_DEBUG)
def _dr7(state: State) -> Optional[str]:
    return formats.high_half("GUEST_DR7", state["GUEST_DR7"])


@book.rule("guest.long_mode.pg", "G7", '"IA-32e mode guest" requires GUEST_CR0.PG = 1', ENTRY_CONTROLS, "GUEST_CR0", when=LONG_GUEST)
def _long_pg(state: State) -> Optional[str]:
    return None if state["GUEST_CR0"] & PG else f'GUEST_CR0 {state["GUEST_CR0"]:#x}: PG (bit 31) is 0 while "IA-32e mode guest" is 1'


@book.rule("guest.long_mode.pae", "G7", '"IA-32e mode guest" requires GUEST_CR4.PAE = 1', ENTRY_CONTROLS, "GUEST_CR4", when=LONG_GUEST)
def _long_pae(state: State) -> Optional[str]:
    value = state["GUEST_CR4"]
    return None if value & mask_of("cr4", "PAE") else f'GUEST_CR4 {value:#x}: PAE (bit 5) is 0 while "IA-32e mode guest" is 1'


for _ident in ("PCIDE", "FRED"):
    book.add(f"guest.legacy.{_ident.lower()}", "G8", f"GUEST_CR4.{_ident} = 1 requires \"IA-32e mode guest\" = 1", (ENTRY_CONTROLS, "GUEST_CR4"),
             lambda state, ident=_ident: f'GUEST_CR4 {state["GUEST_CR4"]:#x}: {ident} is 1 while "IA-32e mode guest" is 0'  # type: ignore[misc]
             if state["GUEST_CR4"] & mask_of("cr4", ident) else None, when=LEGACY_GUEST)


@book.rule("guest.cr3", "G9", "the bits of GUEST_CR3 beyond the physical-address width are 0", "GUEST_CR3")
def _cr3(state: State) -> Optional[str]:
    return formats.cr3(state, "GUEST_CR3")


def _canonical(id: str, row: str, name: str, when: Optional[Gate] = None) -> None:
    book.add(id, row, f"{name} is canonical", (name,), lambda state: formats.canonical(state, name), when=when)


_canonical("guest.sysenter_esp", "G10", "GUEST_SYSENTER_ESP")
_canonical("guest.sysenter_eip", "G10", "GUEST_SYSENTER_EIP")
book.add("guest.perf_global_ctrl", "G11", "guest IA32_PERF_GLOBAL_CTRL has no reserved bit", ("GUEST_IA32_PERF_GLOBAL_CTRL",),
         lambda state: formats.perf_global_ctrl(state, "GUEST_IA32_PERF_GLOBAL_CTRL"), when=on("entry", "LOAD_IA32_PERF_GLOBAL_CTRL"))
book.add("guest.pat", "G12", "each byte of guest IA32_PAT is a memory type", ("GUEST_IA32_PAT",),
         lambda state: formats.pat("GUEST_IA32_PAT", state["GUEST_IA32_PAT"]), when=on("entry", "LOAD_IA32_PAT"))

LOADS_EFER = on("entry", "LOAD_IA32_EFER")
EFER = "GUEST_IA32_EFER"


@book.rule("guest.efer.reserved", "G13", "guest IA32_EFER has no reserved bit", EFER, when=LOADS_EFER)
def _efer_reserved(state: State) -> Optional[str]:
    return formats.efer_reserved(EFER, state[EFER])


@book.rule("guest.efer.lma", "G13", 'LMA of guest IA32_EFER equals "IA-32e mode guest"', EFER, ENTRY_CONTROLS, when=LOADS_EFER,
           hint='change "IA-32e mode guest" (bit 9 of the VM-entry controls) together with EFER.LMA')
def _efer_lma(state: State) -> Optional[str]:
    lma, long_guest = bool(state[EFER] & LMA), state.on("entry", "IA32E_MODE")
    return None if lma == long_guest else f'{EFER} {state[EFER]:#x}: LMA (bit 10) is {int(lma)} while "IA-32e mode guest" is {int(long_guest)}'


@book.rule("guest.efer.lme", "G13", "LME equals LMA in guest IA32_EFER where GUEST_CR0.PG is 1", EFER, "GUEST_CR0",
           when=all_of(LOADS_EFER, lambda state: bool(state["GUEST_CR0"] & PG)))
def _efer_lme(state: State) -> Optional[str]:
    value = state[EFER]
    lme, lma = bool(value & LME), bool(value & LMA)
    return None if lme == lma else f"{EFER} {value:#x}: LME (bit 8) is {int(lme)} and LMA (bit 10) is {int(lma)} with paging on"


@book.rule("guest.bndcfgs", "G14", "guest IA32_BNDCFGS[11:2] are 0 and its base is canonical", "GUEST_BNDCFGS", when=on("entry", "LOAD_BNDCFGS"))
def _bndcfgs(state: State) -> Optional[str]:
    value = state["GUEST_BNDCFGS"]
    if value & 0xFFC:
        return f"GUEST_BNDCFGS {value:#x}: {bit_list(value & 0xFFC)} must be 0"
    return formats.canonical(state, "GUEST_BNDCFGS")


@book.rule("guest.rtit_ctl", "G15", "guest IA32_RTIT_CTL has no reserved bit", "GUEST_IA32_RTIT_CTL", when=on("entry", "LOAD_IA32_RTIT_CTL"))
def _rtit_ctl(state: State) -> Optional[str]:
    value = state["GUEST_IA32_RTIT_CTL"]
    wrong = value & ~formats.RTIT_CTL_DEFINED
    if wrong:
        return f"GUEST_IA32_RTIT_CTL {value:#x}: {bit_list(wrong)} must be 0"
    if value and state.caps is not None and state.caps.cpuid(0x14) is not None:
        return _rtit_features(state, value)
    if value:
        state.cpuid(0x14, "ebx", 0, "Intel PT features")
    return None


RTIT_FEATURES = ((1 << 7, "ebx", 0, "CR3 filtering"), (1 << 1 | 0xF << 19 | 0xF << 24, "ebx", 1, "configurable PSB and cycle-accurate mode"),
                 (0xFFFF << 32, "ebx", 2, "IP filtering"), (1 << 9 | 0xF << 14, "ebx", 3, "MTC"), (1 << 5 | 1 << 12, "ebx", 4, "PTWRITE"),
                 (1 << 4, "ebx", 5, "power-event trace"), (1 << 56, "ebx", 6, "PSB and PMI preservation"), (1 << 31, "ebx", 7, "event trace"),
                 (1 << 55, "ebx", 8, "TNT disable"), (1 << 8, "ecx", 0, "ToPA"), (1 << 6, "ecx", 3, "trace-transport output"))
"""Bits of IA32_RTIT_CTL by what enumerates them (SDM vol. 3, Detection of Intel PT and Capability Enumeration)."""


def _rtit_features(state: State, value: int) -> Optional[str]:
    for mask, register, bit, what in RTIT_FEATURES:
        if value & mask and not state.cpuid(0x14, register, bit, what):
            return f"GUEST_IA32_RTIT_CTL {value:#x}: {bit_list(value & mask)} must be 0 on a processor without {what}"
    return None


LOADS_CET = on("entry", "LOAD_CET_STATE")
book.add("guest.s_cet", "G16", "guest IA32_S_CET has no reserved bit, and not both SUPPRESS and TRACKER", ("GUEST_S_CET",),
         lambda state: formats.s_cet("GUEST_S_CET", state["GUEST_S_CET"]), when=LOADS_CET)
_canonical("guest.ssp_table", "G16", "GUEST_INTR_SSP_TABLE", when=LOADS_CET)
book.add("guest.pkrs", "G17", "bits 63:32 of guest IA32_PKRS are 0", ("GUEST_IA32_PKRS",),
         lambda state: formats.high_half("GUEST_IA32_PKRS", state["GUEST_IA32_PKRS"]), when=on("entry", "LOAD_PKRS"))


@book.rule("guest.lbr_ctl", "G18", "guest IA32_LBR_CTL has no reserved bit", "GUEST_IA32_LBR_CTL", when=on("entry", "LOAD_GUEST_IA32_LBR_CTL"))
def _lbr_ctl(state: State) -> Optional[str]:
    wrong = state["GUEST_IA32_LBR_CTL"] & ~formats.LBR_CTL_DEFINED
    return f"GUEST_IA32_LBR_CTL {state['GUEST_IA32_LBR_CTL']:#x}: {bit_list(wrong)} must be 0" if wrong else None


LOADS_FRED = on("entry", "LOAD_IA32_FRED")
book.add("guest.fred.config", "G19", "guest IA32_FRED_CONFIG has no reserved bit and is canonical", ("GUEST_IA32_FRED_CONFIG",),
         lambda state: formats.fred_config(state, "GUEST_IA32_FRED_CONFIG"), when=LOADS_FRED)
for _name in ("RSP1", "RSP2", "RSP3", "SSP1", "SSP2", "SSP3"):
    book.add(f"guest.fred.{_name.lower()}", "G19", f"GUEST_IA32_FRED_{_name} is aligned and canonical", (f"GUEST_IA32_FRED_{_name}",),
             lambda state, name=f"GUEST_IA32_FRED_{_name}": formats.fred_stack(state, name), when=LOADS_FRED)    # type: ignore[misc]
book.add("guest.uinv", "G20", "bits 15:8 of guest UINV are 0", ("GUEST_UINV",),
         lambda state: formats.high_half("GUEST_UINV", state["GUEST_UINV"], 8), when=on("entry", "LOAD_UINV"))
book.add("guest.spec_ctrl", "G21", "guest IA32_SPEC_CTRL has no reserved bit", ("GUEST_IA32_SPEC_CTRL",),
         lambda state: formats.spec_ctrl(state, "GUEST_IA32_SPEC_CTRL"), when=on("entry", "LOAD_GUEST_IA32_SPEC_CTRL"))

REGISTER_RULES = book.rules

# -- RIP, RFLAGS, SSP: checked after the segment registers ------------------------------------------------------------------

rip_book = RuleBook("guest", SEE_RIP, ("entry-failure", 33, 0))

CODE_64 = all_of(LONG_GUEST, lambda state: bool(state["GUEST_CS_AR_BYTES"] & L))
NOT_CODE_64 = any_of(LEGACY_GUEST, lambda state: not state["GUEST_CS_AR_BYTES"] & L)
RFLAGS = "GUEST_RFLAGS"


@rip_book.rule("guest.rip.high", "P1", "GUEST_RIP[63:32] are 0 outside 64-bit mode", "GUEST_RIP", ENTRY_CONTROLS, "GUEST_CS_AR_BYTES",
               when=NOT_CODE_64)
def _rip_high(state: State) -> Optional[str]:
    value = state["GUEST_RIP"]
    return f"GUEST_RIP {value:#x} is above 4 GiB while the guest is not in 64-bit mode (IA-32e mode guest and CS.L)" if value >> 32 else None


@rip_book.rule("guest.rip.width", "P2", "the bits of GUEST_RIP beyond the linear-address width are equal in 64-bit mode", "GUEST_RIP", ENTRY_CONTROLS,
               "GUEST_CS_AR_BYTES", when=CODE_64)
def _rip_width(state: State) -> Optional[str]:
    return formats.same_above_width(state, "GUEST_RIP")


@rip_book.rule("guest.rflags.reserved", "P3", "GUEST_RFLAGS bits 63:22, 15, 5 and 3 are 0 and bit 1 is 1", RFLAGS)
def _rflags(state: State) -> Union[None, str, Failure]:
    value = state[RFLAGS]
    wrong = bits.table("rflags").kind_mask("reserved0") & value
    words = []
    if wrong:
        words.append(f"{bit_list(wrong)} must be 0")
    if not value & 2:
        words.append("bit 1 must be 1")
    if not words:
        return None
    hint = "this looks like an address: was a pointer to the flags written, or RSP?" if value >> 32 and value >> 47 in (0, 0x1FFFF) else ""
    return Failure(f"{RFLAGS} {value:#x}: {'; '.join(words)}", hint or ("the flags register is never 0: bit 1 is always set" if not value else ""))


@rip_book.rule("guest.rflags.vm", "P4", "RFLAGS.VM is 0 in IA-32e mode and in real-address mode", RFLAGS, ENTRY_CONTROLS, "GUEST_CR0",
               when=lambda state: bool(state[RFLAGS] & mask_of("rflags", "VM")))
def _rflags_vm(state: State) -> Optional[str]:
    if not state["GUEST_CR0"] & PE:
        return f"{RFLAGS} {state[RFLAGS]:#x}: VM (bit 17) is 1 while GUEST_CR0.PE is 0"
    return f'{RFLAGS} {state[RFLAGS]:#x}: VM (bit 17) is 1 while "IA-32e mode guest" is 1' if state.on("entry", "IA32E_MODE") else None


@rip_book.rule("guest.rflags.if", "P5", "RFLAGS.IF is 1 where an external interrupt is injected", RFLAGS, INFO,
               when=lambda state: injecting(state) and event_type(state) == EXTERNAL,
               hint="wait for RFLAGS.IF = 1 with interrupt-window exiting, then inject")
def _rflags_if(state: State) -> Optional[str]:
    if state[RFLAGS] & mask_of("rflags", "IF"):
        return None
    return f"{INFO} {state[INFO]:#x} injects an external interrupt while IF (bit 9) of {RFLAGS} {state[RFLAGS]:#x} is 0"


rip_book.add("guest.ssp", "P6", "bits 1:0 of guest SSP are 0", ("GUEST_SSP",), lambda state: formats.ssp_aligned("GUEST_SSP", state["GUEST_SSP"]),
             when=LOADS_CET)
rip_book.add("guest.ssp.width", "P6", "the bits of guest SSP beyond the linear-address width are equal", ("GUEST_SSP",),
             lambda state: formats.same_above_width(state, "GUEST_SSP"), when=LOADS_CET)

RIP_RULES = rip_book.rules
