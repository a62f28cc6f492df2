"""Can this machine enter VMX operation, or use SVM: every condition with what is known of it and what to do about it.

Sources: SDM vol. 3, Discovering Support for VMX; Enabling and Entering VMX Operation; Restrictions on VMX Operation; VMXON Region;
APM vol. 2, Enabling SVM; SVM Feature Identification.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional

from vtdbg import bits
from vtdbg.vmx.capabilities import VmxCapabilities

PASS, FAIL, UNKNOWN = "pass", "fail", "unknown"

CPUID_VMX, CPUID_SMX, CPUID_SVM = 5, 6, 2
CR4_VMXE = 1 << 13
EFER_LME, EFER_LMA, EFER_SVME = 1 << 8, 1 << 10, 1 << 12
MSR_EFER, MSR_VM_CR, MSR_VM_HSAVE_PA, MSR_FEATURE_CONTROL = 0xC0000080, 0xC0010114, 0xC0010117, 0x3A
VM_CR_LOCK, VM_CR_SVMDIS = 1 << 3, 1 << 4
CPUID_SVML = 2
"""CPUID.8000000AH:EDX[2]: SVM-Lock, which makes VM_CR.LOCK exist."""


@dataclass(frozen=True)
class Check:
    """One condition.  `found` is the value that decided; `advice` what to do where it is not met, or what to give where it is unknown."""

    id: str
    title: str
    verdict: str
    found: str
    advice: str
    see: str


@dataclass(frozen=True)
class MachineState:
    """What is known of a processor: `caps` holds MSRs and CPUID, `registers` lower-case names ("cr0", "cr4", "efer").  Absent is unknown."""

    caps: VmxCapabilities
    registers: Mapping[str, Optional[int]]

    def register(self, name: str) -> Optional[int]:
        value = self.registers.get(name)
        return self.caps.msr(MSR_EFER) if value is None and name == "efer" else value


_SEE_VMX = "SDM vol. 3, Enabling and Entering VMX Operation"
_SEE_FIXED = "SDM vol. 3, Restrictions on VMX Operation"
_SEE_SVM = "APM vol. 2, Enabling SVM"


def support_report(caps: VmxCapabilities, registers: Optional[Mapping[str, Optional[int]]] = None) -> List[Check]:
    """The conditions for VMX, or for SVM where CPUID or an SVM MSR shows an AMD processor; both where the vendor is unknown.

    Every row is pass, fail or unknown; an unknown row names what to give.
    """
    state = MachineState(caps, registers or {})
    vmx, svm = _vendor(state)
    return (vmx_support(state) if vmx else []) + (svm_support(state) if svm else [])


def _vendor(state: MachineState) -> "tuple[bool, bool]":
    """Whose conditions are worth showing."""
    leaf0 = state.caps.cpuid(0)
    if leaf0 is not None:
        name = b"".join(leaf0[register].to_bytes(4, "little") for register in (1, 3, 2))
        amd = name in (b"AuthenticAMD", b"HygonGenuine")
        return not amd, amd
    if state.caps.basic is not None or state.caps.msr(MSR_FEATURE_CONTROL) is not None or state.caps.cpuid_bit(1, "ecx", CPUID_VMX):
        return True, False
    if state.caps.msr(MSR_VM_CR) is not None or state.caps.cpuid(0x8000000A) is not None or state.caps.cpuid_bit(0x80000001, "ecx", CPUID_SVM):
        return False, True
    return True, True


def _check(check_id: str, title: str, ok: Optional[bool], found: str, advice: str, see: str) -> Check:
    verdict = UNKNOWN if ok is None else PASS if ok else FAIL
    return Check(check_id, title, verdict, found, "" if ok else advice, see)


def _value(value: Optional[int]) -> str:
    return "unknown" if value is None else f"{value:#x}"


def vmx_support(state: MachineState) -> List[Check]:
    """The conditions of VMXON, in the order in which a VMM meets them."""
    caps = state.caps
    has_vmx = caps.cpuid_bit(1, "ecx", CPUID_VMX)
    if has_vmx is None and caps.basic is not None:
        has_vmx, found = True, "IA32_VMX_BASIC could be read"
    else:
        found = "unknown" if has_vmx is None else f"CPUID.1:ECX[5] is {int(has_vmx)}"
    checks = [_check("vmx.cpuid", "The processor supports VMX (CPUID.1:ECX.VMX)", has_vmx, found,
                     "give CPUID leaf 1" if has_vmx is None else "no VT-x here: another processor, or a hypervisor that hides it (turn nesting on)",
                     "SDM vol. 3, Discovering Support for VMX")]
    checks.extend(_feature_control(state))
    checks.extend(_fixed_bits(state))
    checks.append(_vmxe(state))
    checks.append(_efer(state))
    checks.extend(_region(state))
    return checks


def _feature_control(state: MachineState) -> List[Check]:
    value = state.caps.msr(MSR_FEATURE_CONTROL)
    smx = state.caps.cpuid_bit(1, "ecx", CPUID_SMX)
    title = "IA32_FEATURE_CONTROL is locked (bit 0): VMXON raises #GP otherwise"
    enabled = "IA32_FEATURE_CONTROL enables VMXON outside SMX operation (bit 2)"
    if value is None:
        give = "give MSR 0x3a"
        return [_check("vmx.feature-control.lock", title, None, "unknown", give, _SEE_VMX),
                _check("vmx.feature-control.enable", enabled, None, "unknown", give, _SEE_VMX)]
    table = bits.table("feature_control")
    locked, outside, inside = table.test(value, "LOCK"), table.test(value, "VMX_OUTSIDE_SMX"), table.test(value, "VMX_INSIDE_SMX")
    unlocked = "write it once: bits 2 and 0 set (the MSR stays so until reset)"
    if outside:
        advice = ""
    elif not locked:
        advice = unlocked
    elif inside:
        advice = "VMX is enabled in SMX operation only: enable it in the firmware setup, or enter SMX with GETSEC[SENTER]"
    else:
        advice = "the firmware locked VMX off: enable virtualization in its setup and power-cycle"
    checks = [_check("vmx.feature-control.lock", title, locked, f"{value:#x}", unlocked, _SEE_VMX),
              _check("vmx.feature-control.enable", enabled, outside, f"{value:#x}", advice, _SEE_VMX)]
    if inside and smx is False:
        checks.append(_check("vmx.feature-control.smx", "Bit 1 (VMX in SMX operation) is set only where SMX exists", ok=False, found=f"{value:#x}",
                             advice="CPUID.1:ECX.SMX is 0: the bit should not be writable; the value may be from another machine", see=_SEE_VMX))
    return checks


def _fixed_bits(state: MachineState) -> List[Check]:
    checks = []
    for name, fixed0, fixed1 in (("cr0", state.caps.cr0_fixed0, state.caps.cr0_fixed1), ("cr4", state.caps.cr4_fixed0, state.caps.cr4_fixed1)):
        value = state.register(name)
        title = f"{name.upper()} has the bits that VMX operation fixes (IA32_VMX_{name.upper()}_FIXED0, _FIXED1)"
        if value is None or fixed0 is None or fixed1 is None:
            missing = [what for what, known in ((name.upper(), value), (f"IA32_VMX_{name.upper()}_FIXED0", fixed0),
                                                (f"IA32_VMX_{name.upper()}_FIXED1", fixed1)) if known is None]
            checks.append(_check(f"vmx.{name}-fixed", title, None, _value(value), f"give {' and '.join(missing)}", _SEE_FIXED))
            continue
        # CR4.VMXE has a row of its own: before VMXON it is the VMM's to set.
        on = fixed0 & ~value & ~(CR4_VMXE if name == "cr4" else 0)
        off = value & ~fixed1
        advice = "; ".join(filter(None, (f"set {_names(name, on)}" if on else "", f"clear {_names(name, off)}" if off else "")))
        checks.append(_check(f"vmx.{name}-fixed", title, not on and not off, f"{value:#x}", f"{advice} before VMXON (#GP otherwise)", _SEE_FIXED))
    return checks


def _names(register: str, mask: int) -> str:
    table = bits.table(register)
    named = [row.ident for row in reversed(table.fields) if row.ident and row.high == row.low and row.mask & mask]
    rest = mask & ~sum(table[ident].mask for ident in named)
    return " ".join([*(f"{register.upper()}.{ident}" for ident in named), *([f"bits {rest:#x}"] if rest else [])])


def _vmxe(state: MachineState) -> Check:
    value = state.register("cr4")
    fixed1 = state.caps.cr4_fixed1
    possible = fixed1 is None or bool(fixed1 & CR4_VMXE)
    advice = "give CR4" if value is None else "set CR4.VMXE (bit 13) before VMXON: it raises #UD otherwise" if possible \
        else "IA32_VMX_CR4_FIXED1 does not allow CR4.VMXE: the value is not of a VMX processor"
    return _check("vmx.cr4-vmxe", "CR4.VMXE is set", None if value is None else bool(value & CR4_VMXE), _value(value), advice, _SEE_VMX)


def _efer(state: MachineState) -> Check:
    """A 64-bit VMM: long mode has to be active, since VMXON in compatibility mode is #UD and a 32-bit host needs other controls."""
    value = state.register("efer")
    title = "Long mode is active (EFER.LMA): what a 64-bit VMM assumes"
    ok = None if value is None else bool(value & EFER_LMA)
    advice = "give EFER" if value is None else "a 32-bit VMM is possible: VM-exit control \"Host address-space size\" has to be 0 then"
    return _check("vmx.efer", title, ok, _value(value), advice, "SDM vol. 3, Checks Related to Address-Space Size")


def _region(state: MachineState) -> List[Check]:
    caps = state.caps
    see = "SDM vol. 3, VMXON Region; appendix VMX Capability Reporting Facility, Basic VMX Information"
    if caps.basic is None:
        return [_check("vmx.basic", "IA32_VMX_BASIC says what VMXON region and VMCS look like", None, "unknown", "give MSR 0x480", see)]
    table = bits.table("vmx_basic")
    revision, size = caps.revision or 0, caps.region_size or 0
    limit = "below 4 GiB" if table.test(caps.basic, "32BIT_PHYS_ADDR_ONLY") else f"below 2^{caps.physical_address_width}" \
        if caps.physical_address_width else "within the physical-address width"
    memory_type = table["MEMORY_TYPE"].meaning(caps.basic)
    sane = 0 < size <= 4096 and not table.reserved_violations(caps.basic) and table.get(caps.basic, "MEMORY_TYPE") in (0, 6)
    found = f"revision {revision:#x}, {size} bytes, memory type {memory_type}, {limit}"
    rules = "the value breaks the manual's rules (size 1 to 4096, memory type UC or WB, reserved bits 0): it may be cut or from elsewhere"
    return [_check("vmx.basic", "IA32_VMX_BASIC says what VMXON region and VMCS look like", sane, found, rules, see),
            Check("vmx.region", "What to allocate for the VMXON region and for each VMCS", PASS, found,
                  f"{size} bytes, 4-KiB aligned, {limit}, mapped {memory_type}; write {revision:#x} into the first dword "
                  "(bit 31 is 0 except in a shadow VMCS), nothing else", see)]


def svm_support(state: MachineState) -> List[Check]:
    """The conditions of VMRUN, in the order of the APM's flow chart."""
    caps = state.caps
    has_svm = caps.cpuid_bit(0x80000001, "ecx", CPUID_SVM)
    checks = [_check("svm.cpuid", "The processor supports SVM (CPUID.80000001H:ECX.SVM)", has_svm,
                     "unknown" if has_svm is None else f"ECX[2] is {int(has_svm)}",
                     "give CPUID leaf 0x80000001" if has_svm is None else "no SVM here: another processor, or a hypervisor that hides it", _SEE_SVM)]
    checks.append(_vm_cr(state))
    features = caps.cpuid(0x8000000A)
    title = "CPUID.8000000AH: SVM revision, number of ASIDs, features"
    if features is None:
        checks.append(_check("svm.features", title, None, "unknown", "give CPUID leaf 0x8000000a", "APM vol. 2, SVM Feature Identification"))
    else:
        nested = bool(features[3] & 1)
        checks.append(_check("svm.features", title, features[1] > 1, f"revision {features[0] & 0xFF}, {features[1]} ASIDs, nested paging "
                             f"{'yes' if nested else 'no'}", "fewer than 2 ASIDs leave none for a guest: the host has ASID 0",
                             "APM vol. 2, SVM Feature Identification"))
    efer = state.register("efer")
    checks.append(_check("svm.efer", "EFER.SVME is set", None if efer is None else bool(efer & EFER_SVME), _value(efer),
                         "give EFER (MSR 0xc0000080)" if efer is None else
                         "set EFER.SVME (bit 12): VMRUN and its relatives raise #UD otherwise", _SEE_SVM))
    area = caps.msr(MSR_VM_HSAVE_PA)
    usable = None if area is None else area != 0 and not area & 0xFFF
    checks.append(_check("svm.hsave", "VM_HSAVE_PA points to a host save area", usable, _value(area),
                         "give MSR 0xc0010117" if area is None else "allocate a page and write its physical address (4-KiB aligned): "
                         "VMRUN keeps the host's state there", "APM vol. 2, VM_HSAVE_PA MSR"))
    return checks


def _vm_cr(state: MachineState) -> Check:
    value = state.caps.msr(MSR_VM_CR)
    title = "VM_CR.SVMDIS is 0: EFER.SVME can be set"
    if value is None:
        return _check("svm.vm-cr", title, None, "unknown", "give MSR 0xc0010114", _SEE_SVM)
    features = state.caps.cpuid(0x8000000A)
    can_lock = features is None or bool(features[3] >> CPUID_SVML & 1)
    if not value & VM_CR_LOCK:
        advice = "clear VM_CR.SVMDIS: the lock is open"
    elif can_lock:
        advice = "the firmware disabled and locked SVM: enable it in its setup (or write the key to SVM_LOCK_KEY, MSR 0xc0010118, if it set one)"
    else:
        advice = "the firmware disabled SVM and the processor has no SVM lock (CPUID.8000000AH:EDX.SVML=0): enable it in the firmware setup"
    return _check("svm.vm-cr", title, not value & VM_CR_SVMDIS, f"{value:#x}", advice, _SEE_SVM)
