"""Checks on the host-state area and on the address-space size: a failure is VMfailValid with error 8.

SDM vol. 3, Checks on Host-State Area; Checks Related to Address-Space Size (chapter VM Entries).  Dated 2026-11.
"""

from __future__ import annotations

from typing import Optional

from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.entry import formats
from vtdbg.vmx.entry.formats import CR0_FIXED0, CR0_FIXED1, CR0_NEVER_CHECKED, CR4_FIXED0, CR4_FIXED1, LMA, LME
from vtdbg.vmx.entry.rules import EFER_MSR, Gate, Missing, RuleBook, State, is_canonical, mask_of, off, on

SEE_REGISTERS = "SDM vol. 3, Checks on Host Control Registers, MSRs, and SSP"
SEE_SEGMENTS = "SDM vol. 3, Checks on Host Segment and Descriptor-Table Registers"
SEE_SIZE = "SDM vol. 3, Checks Related to Address-Space Size"

book = RuleBook("host", SEE_REGISTERS, ("VMfailValid", 8))

EXIT_CONTROLS, ENTRY_CONTROLS = WORDS["exit"], WORDS["entry"]
HOST_64 = on("exit", "HOST_ADDR_SPACE_SIZE")
HOST_32 = off("exit", "HOST_ADDR_SPACE_SIZE")
FIXED_HINT = "take the value that the VMM runs with: VMXON would have failed with this one"


@book.rule("host.cr0", "H1", "HOST_CR0 keeps to IA32_VMX_CR0_FIXED0 and FIXED1", "HOST_CR0", hint=FIXED_HINT)
def _cr0(state: State) -> Optional[str]:
    return formats.fixed_bits("cr0", "HOST_CR0", state["HOST_CR0"], state.msr(CR0_FIXED0) & ~CR0_NEVER_CHECKED,
                              state.msr(CR0_FIXED1) | CR0_NEVER_CHECKED)


@book.rule("host.cr4", "H2", "HOST_CR4 keeps to IA32_VMX_CR4_FIXED0 and FIXED1", "HOST_CR4", hint=FIXED_HINT)
def _cr4(state: State) -> Optional[str]:
    return formats.fixed_bits("cr4", "HOST_CR4", state["HOST_CR4"], state.msr(CR4_FIXED0), state.msr(CR4_FIXED1))


@book.rule("host.cr4.cet", "H3", "HOST_CR4.CET = 1 requires HOST_CR0.WP = 1", "HOST_CR4", "HOST_CR0",
           when=lambda state: bool(state["HOST_CR4"] & mask_of("cr4", "CET")))
def _cet(state: State) -> Optional[str]:
    return None if state["HOST_CR0"] & mask_of("cr0", "WP") else "HOST_CR4.CET is 1 while HOST_CR0.WP is 0"


@book.rule("host.cr3", "H4", "the bits of HOST_CR3 beyond the physical-address width are 0", "HOST_CR3")
def _cr3(state: State) -> Optional[str]:
    return formats.cr3(state, "HOST_CR3")


def _canonical(id: str, row: str, name: str, what: str, see: str, when: Optional[Gate] = None) -> None:
    book.add(id, row, f"{what} is canonical", (name,), lambda state: formats.canonical(state, name), see=see, when=when)


_canonical("host.sysenter_esp", "H5", "HOST_IA32_SYSENTER_ESP", "host IA32_SYSENTER_ESP", SEE_REGISTERS)
_canonical("host.sysenter_eip", "H5", "HOST_IA32_SYSENTER_EIP", "host IA32_SYSENTER_EIP", SEE_REGISTERS)
book.add("host.perf_global_ctrl", "H6", "host IA32_PERF_GLOBAL_CTRL has no reserved bit", ("HOST_IA32_PERF_GLOBAL_CTRL",),
         lambda state: formats.perf_global_ctrl(state, "HOST_IA32_PERF_GLOBAL_CTRL"), when=on("exit", "LOAD_IA32_PERF_GLOBAL_CTRL"))
book.add("host.pat", "H7", "each byte of host IA32_PAT is a memory type", ("HOST_IA32_PAT",),
         lambda state: formats.pat("HOST_IA32_PAT", state["HOST_IA32_PAT"]), when=on("exit", "LOAD_IA32_PAT"))

LOADS_EFER = on("exit", "LOAD_IA32_EFER")


@book.rule("host.efer.reserved", "H8", "host IA32_EFER has no reserved bit", "HOST_IA32_EFER", when=LOADS_EFER)
def _efer_reserved(state: State) -> Optional[str]:
    return formats.efer_reserved("HOST_IA32_EFER", state["HOST_IA32_EFER"])


@book.rule("host.efer.long_mode", "H8", 'LMA and LME of host IA32_EFER equal the VM-exit control "Host address-space size"', "HOST_IA32_EFER",
           EXIT_CONTROLS, when=LOADS_EFER)
def _efer_long_mode(state: State) -> Optional[str]:
    value, size = state["HOST_IA32_EFER"], state.on("exit", "HOST_ADDR_SPACE_SIZE")
    lme, lma = bool(value & LME), bool(value & LMA)
    if lme == lma == size:
        return None
    return f'HOST_IA32_EFER {value:#x}: LME is {int(lme)} and LMA is {int(lma)}, "Host address-space size" is {int(size)}; the three have to be equal'


CET = on("exit", "LOAD_CET_STATE")


def _for_host_size(state: State, name: str) -> Optional[str]:
    """Canonical for a 64-bit host, below 4 GiB for a 32-bit one."""
    if state.on("exit", "HOST_ADDR_SPACE_SIZE"):
        return formats.canonical(state, name)
    return formats.high_half(name, state[name])


book.add("host.s_cet", "H9", "host IA32_S_CET has no reserved bit, and not both SUPPRESS and TRACKER", ("HOST_S_CET",),
         lambda state: formats.s_cet("HOST_S_CET", state["HOST_S_CET"]), when=CET)
book.add("host.s_cet.address", "H9", "host IA32_S_CET is canonical (bits 63:32 are 0 for a 32-bit host)", ("HOST_S_CET", EXIT_CONTROLS),
         lambda state: _for_host_size(state, "HOST_S_CET"), when=CET)
_canonical("host.ssp_table", "H9", "HOST_INTR_SSP_TABLE", "host IA32_INTERRUPT_SSP_TABLE_ADDR", SEE_REGISTERS, when=CET)
book.add("host.ssp", "H10", "bits 1:0 of host SSP are 0", ("HOST_SSP",), lambda state: formats.ssp_aligned("HOST_SSP", state["HOST_SSP"]), when=CET)
book.add("host.ssp.address", "H10", "host SSP is canonical (bits 63:32 are 0 for a 32-bit host)", ("HOST_SSP", EXIT_CONTROLS),
         lambda state: _for_host_size(state, "HOST_SSP"), when=CET)
book.add("host.pkrs", "H11", "bits 63:32 of host IA32_PKRS are 0", ("HOST_IA32_PKRS",),
         lambda state: formats.high_half("HOST_IA32_PKRS", state["HOST_IA32_PKRS"]), when=on("exit", "LOAD_PKRS"))

FRED = on("exit2", "LOAD_IA32_FRED")
book.add("host.fred.config", "H12", "host IA32_FRED_CONFIG has no reserved bit and is canonical", ("HOST_IA32_FRED_CONFIG",),
         lambda state: formats.fred_config(state, "HOST_IA32_FRED_CONFIG"), when=FRED)


def _fred_stack(name: str) -> None:
    book.add(f"host.fred.{name[-4:].lower()}", "H12", f"{name} is aligned and canonical", (name,), lambda state: formats.fred_stack(state, name),
             when=FRED)


for _name in ("RSP1", "RSP2", "RSP3", "SSP1", "SSP2", "SSP3"):
    _fred_stack(f"HOST_IA32_FRED_{_name}")

book.add("host.spec_ctrl", "H13", "host IA32_SPEC_CTRL has no reserved bit", ("HOST_IA32_SPEC_CTRL",),
         lambda state: formats.spec_ctrl(state, "HOST_IA32_SPEC_CTRL"), when=on("exit2", "LOAD_IA32_SPEC_CTRL"))


# -- segments and descriptor tables -----------------------------------------------------------------------------------------

def _selector(register: str) -> None:
    name = f"HOST_{register}_SELECTOR"

    def check(state: State) -> Optional[str]:
        value = state[name]
        if not value & 7:
            return None
        return f"{name} {value:#x}: RPL (bits 1:0) is {value & 3} and TI (bit 2) is {value >> 2 & 1}; all three must be 0"

    book.add(f"host.{register.lower()}.selector", "S1", f"RPL and TI of the host {register} selector are 0", (name,), check, see=SEE_SEGMENTS,
             hint="write the selector & 0xf8: a VM exit loads it with CPL 0")


for _register in ("CS", "SS", "DS", "ES", "FS", "GS", "TR"):
    _selector(_register)


def _not_null(register: str, row: str, when: Optional[Gate] = None, suffix: str = "") -> None:
    name = f"HOST_{register}_SELECTOR"
    book.add(f"host.{register.lower()}.null", row, f"the host {register} selector is not 0{suffix}", (name,),
             lambda state: None if state[name] else f"{name} is 0", see=SEE_SEGMENTS, when=when)


_not_null("CS", "S2")
_not_null("TR", "S2")
_not_null("SS", "S3", HOST_32, " where the host is not 64-bit")
for _register in ("FS", "GS", "GDTR", "IDTR", "TR"):
    _canonical(f"host.{_register.lower()}.base", "S4", f"HOST_{_register}_BASE", f"host {_register} base", SEE_SEGMENTS)

# -- address-space size -----------------------------------------------------------------------------------------------------

LINEAR_HOST_FIELDS = ("HOST_RIP", "HOST_RSP", "HOST_IDTR_BASE", "HOST_GDTR_BASE", "HOST_TR_BASE")


def vmm_is_64_bit(state: State) -> bool:
    """Is IA32_EFER.LMA 1 where VMLAUNCH is executed?

    Who gave `host_long_mode` or the EFER of the processor knows.  Else the host state tells: a VMM writes there what it runs with.
    """
    if state.host_long_mode is not None:
        return state.host_long_mode
    efer = state.caps.msr(EFER_MSR) if state.caps is not None else None
    if efer is None and state.on("exit", "LOAD_IA32_EFER"):
        efer = state.fields.get("HOST_IA32_EFER")
    if efer is not None:
        return bool(efer & LMA)
    if any(state.fields.get(name, 0) >> 32 for name in LINEAR_HOST_FIELDS):
        return True
    raise Missing("the VMM's own mode (IA32_EFER.LMA at VMLAUNCH)")


@book.rule("host.size.legacy", "A1", 'outside IA-32e mode, "IA-32e mode guest" and "Host address-space size" are 0', EXIT_CONTROLS, ENTRY_CONTROLS,
           see=SEE_SIZE, when=lambda state: state.on("exit", "HOST_ADDR_SPACE_SIZE") or state.on("entry", "IA32E_MODE"))
def _size_legacy(state: State) -> Optional[str]:
    if vmm_is_64_bit(state):
        return None
    return f'"Host address-space size" is {int(state.on("exit", "HOST_ADDR_SPACE_SIZE"))} and "IA-32e mode guest" is ' \
           f'{int(state.on("entry", "IA32E_MODE"))} while the VMM runs outside IA-32e mode; both must be 0'


@book.rule("host.size.long", "A2", 'in IA-32e mode, "Host address-space size" is 1', EXIT_CONTROLS, see=SEE_SIZE, when=HOST_32,
           hint='set bit 9 of the VM-exit controls: a 64-bit VMM needs "Host address-space size"')
def _size_long(state: State) -> Optional[str]:
    return '"Host address-space size" is 0 while the VMM runs in IA-32e mode' if vmm_is_64_bit(state) else None


@book.rule("host.size.guest", "A3", '"Host address-space size" = 0 requires "IA-32e mode guest" = 0', EXIT_CONTROLS, ENTRY_CONTROLS, see=SEE_SIZE,
           when=HOST_32)
def _size_guest(state: State) -> Optional[str]:
    return '"IA-32e mode guest" is 1 while "Host address-space size" is 0' if state.on("entry", "IA32E_MODE") else None


@book.rule("host.size.pcide", "A3", '"Host address-space size" = 0 requires HOST_CR4.PCIDE = 0', EXIT_CONTROLS, "HOST_CR4", see=SEE_SIZE,
           when=HOST_32)
def _size_pcide(state: State) -> Optional[str]:
    return 'HOST_CR4.PCIDE is 1 while "Host address-space size" is 0' if state["HOST_CR4"] & mask_of("cr4", "PCIDE") else None


@book.rule("host.size.rip", "A3", '"Host address-space size" = 0 requires HOST_RIP[63:32] = 0', EXIT_CONTROLS, "HOST_RIP", see=SEE_SIZE, when=HOST_32,
           hint='a 64-bit VMM needs "Host address-space size" (bit 9 of the VM-exit controls)')
def _size_rip(state: State) -> Optional[str]:
    value = state["HOST_RIP"]
    return f'HOST_RIP {value:#x} is above 4 GiB while "Host address-space size" is 0' if value >> 32 else None


@book.rule("host.size.pae", "A4", '"Host address-space size" = 1 requires HOST_CR4.PAE = 1', EXIT_CONTROLS, "HOST_CR4", see=SEE_SIZE, when=HOST_64)
def _size_pae(state: State) -> Optional[str]:
    return None if state["HOST_CR4"] & mask_of("cr4", "PAE") else 'HOST_CR4.PAE is 0 while "Host address-space size" is 1'


@book.rule("host.rip", "A4", '"Host address-space size" = 1 requires a canonical HOST_RIP', EXIT_CONTROLS, "HOST_RIP", "HOST_CR4", see=SEE_SIZE,
           when=HOST_64)
def _rip(state: State) -> Optional[str]:
    # Bases and MSRs may have the processor's full width; RIP has the width of the paging that HOST_CR4 brings (KVM commit
    # "KVM: nVMX: fix canonical check of vmcs12 HOST_RIP", 2024).
    value = state["HOST_RIP"]
    if is_canonical(value, 48):
        return None
    if is_canonical(value, 57) and state["HOST_CR4"] & mask_of("cr4", "LA57"):
        return None
    return f"HOST_RIP {value:#x} is not canonical"

RULES = book.rules
