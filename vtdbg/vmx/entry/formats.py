"""Formats that both the host-state and the guest-state area check: PAT, EFER, CET, FRED, PKRS and other MSRs that VM entry and exit load.

Each function gives what is wrong with a value, or None.  They are the conditions under which WRMSR of the value would fault.
"""

from __future__ import annotations

from typing import Optional

from vtdbg import bits
from vtdbg.vmx.entry.rules import Missing, State, bit_list, mask_of, named_bits

CR0_FIXED0, CR0_FIXED1, CR4_FIXED0, CR4_FIXED1 = 0x486, 0x487, 0x488, 0x489
CR0_NEVER_CHECKED = 1 << 30 | 1 << 29
"""CD and NW: VM entries and exits do not change them (SDM vol. 3, Checks on Host Control Registers, MSRs, and SSP)."""
PE, PG = 1, 1 << 31

EFER_INTEL = 0xD01
"""SCE, LME, LMA, NXE: what Intel processors define (SDM vol. 4, IA32_EFER)."""
LME, LMA = 1 << 8, 1 << 10
SPEC_CTRL_DEFINED = 0x5FF
"""IBRS, STIBP, SSBD, IPRED_DIS_U/S, RRSBA_DIS_U/S, PSFD, DDPD_U, BHI_DIS_S (SDM vol. 4, IA32_SPEC_CTRL)."""
LBR_CTL_DEFINED = 0x7F000F
RTIT_CTL_DEFINED = 0x0180FFFF8F7BFFFF
"""TraceEn to EventEn, ADDR0 to ADDR3, DisTNT, InjectPsbPmiOnEnable (SDM vol. 3, IA32_RTIT_CTL MSR)."""
FRED_CONFIG_RESERVED = 1 << 2 | 3 << 4 | 1 << 11
"""Bits 2, 5:4 and 11 (Intel FRED specification, FRED Configuration MSR); 1:0, 3, 8:6, 10:9 and 63:12 are defined."""


def fixed_bits(register: str, name: str, value: int, fixed0: int, fixed1: int) -> Optional[str]:
    """A control register against the bits that VMX operation fixes."""
    low, high = fixed0 & ~value, value & ~fixed1 & 0xFFFFFFFFFFFFFFFF
    wrong = []
    if low:
        wrong.append(f"must be 1: {named_bits(register, low)}")
    if high:
        wrong.append(f"must be 0: {named_bits(register, high)}")
    return f"{name} {value:#x}: {'; '.join(wrong)}" if wrong else None


def cr3(state: State, name: str) -> Optional[str]:
    value = state[name]
    lam = value & (mask_of("cr3", "LAM_U48") | mask_of("cr3", "LAM_U57"))
    plain = value & ~lam
    wide = state.too_wide(plain)
    if wide:
        return f"{name} {value:#x}: {bit_list(wide)} must be 0 (beyond the physical-address width)"
    if lam and not state.msr(CR4_FIXED1) & mask_of("cr4", "LAM_SUP"):
        return f"{name} {value:#x}: {bit_list(lam)} must be 0 on a processor without linear-address masking"
    return None


def pat(name: str, value: int) -> Optional[str]:
    """Each byte of IA32_PAT is 0 (UC), 1 (WC), 4 (WT), 5 (WP), 6 (WB) or 7 (UC-)."""
    wrong = [f"PA{index} = {value >> 8 * index & 0xFF:#x}" for index in range(8) if value >> 8 * index & 0xFF not in (0, 1, 4, 5, 6, 7)]
    return f"{name} {value:#x}: {', '.join(wrong)} is no memory type (0, 1, 4, 5, 6 or 7)" if wrong else None


def efer_reserved(name: str, value: int) -> Optional[str]:
    wrong = value & ~EFER_INTEL
    return f"{name} {value:#x}: {named_bits('efer', wrong)} must be 0" if wrong else None


def perf_global_ctrl(state: State, name: str) -> Optional[str]:
    """Bits of counters that do not exist (SDM vol. 4, IA32_PERF_GLOBAL_CTRL; CPUID leaf 0AH)."""
    value = state[name]
    if not value:
        return None
    if value >> 49:
        return f"{name} {value:#x}: {bit_list(value >> 49 << 49)} must be 0"
    leaf = state.caps.cpuid(0xA) if state.caps is not None else None
    if leaf is None:
        raise Missing("CPUID.0AH: performance counters")
    eax, _, ecx, edx = leaf
    fixed = ((1 << (edx & 0x1F)) - 1) | (ecx if eax & 0xFF >= 5 else 0)
    defined = ((1 << (eax >> 8 & 0xFF)) - 1) | fixed << 32
    wrong = value & ~defined & ~(1 << 48)
    if wrong:
        return f"{name} {value:#x}: {bit_list(wrong)} must be 0 (no such counter)"
    if value >> 48 & 1:
        raise Missing("IA32_PERF_CAPABILITIES: performance metrics")
    return None


def spec_ctrl(state: State, name: str) -> Optional[str]:
    value = state[name]
    wrong = value & ~SPEC_CTRL_DEFINED
    if wrong:
        return f"{name} {value:#x}: {bit_list(wrong)} must be 0"
    if not value:
        return None
    if value & 3:
        state_has = state.cpuid(7, "edx", 26, "IBRS and IBPB") or state.cpuid(7, "edx", 27, "STIBP")
        if not state_has:
            return f"{name} {value:#x}: {bit_list(value & 3)} must be 0 on a processor without IBRS and STIBP"
    if value & 4 and not state.cpuid(7, "edx", 31, "SSBD"):
        return f"{name} {value:#x}: bit 2 must be 0 on a processor without SSBD"
    for mask, bit, what in ((1 << 7, 0, "PSFD"), (3 << 3, 1, "IPRED_CTRL"), (3 << 5, 2, "RRSBA_CTRL"), (1 << 8, 3, "DDPD_U"), (1 << 10, 4,
                                                                                                                               "BHI_CTRL")):
        if value & mask and not state.cpuid(7, "edx", bit, what, subleaf=2):
            return f"{name} {value:#x}: {bit_list(value & mask)} must be 0 on a processor without {what}"
    return None


def high_half(name: str, value: int, low: int = 32) -> Optional[str]:
    """Bits from `low` up are 0."""
    return f"{name} {value:#x}: {bit_list(value >> low << low)} must be 0" if value >> low else None


def canonical(state: State, name: str) -> Optional[str]:
    value = state[name]
    return None if state.canonical(value) else f"{name} {value:#x} is not canonical"


def s_cet(name: str, value: int) -> Optional[str]:
    """Reserved bits, and not both SUPPRESS and TRACKER."""
    wrong = bits.table("s_cet").kind_mask("reserved0") & value
    if wrong:
        return f"{name} {value:#x}: {bit_list(wrong)} must be 0"
    if value & mask_of("s_cet", "SUPPRESS") and value & mask_of("s_cet", "TRACKER"):
        return f"{name} {value:#x}: SUPPRESS (bit 10) and TRACKER (bit 11) are both 1"
    return None


def ssp_aligned(name: str, value: int) -> Optional[str]:
    return f"{name} {value:#x}: {bit_list(value & 3)} must be 0" if value & 3 else None


def same_above_width(state: State, name: str) -> Optional[str]:
    """Bits 63:N are equal, N the processor's linear-address width: what RIP and SSP need, one bit less than canonical."""
    value = state[name]
    if value >> 48 in (0, 0xFFFF):
        return None
    top = value >> state.linear_width
    if top in (0, (1 << (64 - state.linear_width)) - 1):
        return None
    return f"{name} {value:#x}: bits 63:{state.linear_width} are neither all 0 nor all 1"


def fred_config(state: State, name: str) -> Optional[str]:
    value = state[name]
    wrong = value & FRED_CONFIG_RESERVED
    return f"{name} {value:#x}: {bit_list(wrong)} must be 0" if wrong else canonical(state, name)


def fred_stack(state: State, name: str) -> Optional[str]:
    """RSP1 to RSP3 are aligned to 64 bytes, SSP1 to SSP3 to 8, and all are canonical."""
    value = state[name]
    wrong = value & (7 if "SSP" in name else 0x3F)
    return f"{name} {value:#x}: {bit_list(wrong)} must be 0" if wrong else canonical(state, name)
