"""The VMRUN checks: every reason why VMRUN ends with EXITCODE -1 (VMEXIT_INVALID), all of them at once.

APM vol. 2, VMRUN Instruction, Canonicalization and Consistency Checks; Event Injection; Nested Paging, VMRUN and #VMEXIT Consistency Checks.
The processor reports one code whatever failed, and no order: the order here is the VMRUN instruction itself, then the control area, then the
state-save area in the order of the manual's list.  Dated 2026-11.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Union

from vtdbg import bits
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.findings import Finding
from vtdbg.memory.base import PhysicalMemory
from vtdbg.rules import Failure, Gate, Missing, RuleBook, all_of, bit_list, mask_of, named_bits
from vtdbg.svm import events
from vtdbg.svm.capabilities import CET_IBT, CET_SS, LONG_MODE, UNKNOWN, Allowed, Feature, SvmCapabilities
from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86 import vectors

MAXPHYADDR = "physical-address width (CPUID Fn8000_0008 EAX[7:0])"
C_BIT = "position of the encryption bit (CPUID Fn8000_001F EBX[5:0])"
VMSA = "the VMSA (encrypted)"

SEE_VMRUN = "APM vol. 2, VMRUN Instruction"
SEE_CHECKS = "APM vol. 2, Canonicalization and Consistency Checks"
SEE_NESTED = "APM vol. 2, Nested Paging, VMRUN and #VMEXIT Consistency Checks"
SEE_AVIC = "APM vol. 2, Advanced Virtual Interrupt Controller, VMRUN and #VMEXIT"
SEE_SEV = "APM vol. 2, Encrypted State (SEV-ES); Secure Nested Paging (SEV-SNP)"
SEE_VNMI = "APM vol. 2, NMI Virtualization"
SEE_CET = "APM vol. 2, Shadow Stacks, SVM"
SEE_PDPTE = "APM vol. 2, Legacy PAE Mode; PAE Paging"

IOPM_SIZE, MSRPM_SIZE = 0x3000, 0x2000
"""12 KiB and 8 KiB (APM vol. 2, I/O Permissions Map; MSR Permissions Map)."""

LINEAR_HINT = "this looks like a linear address: the VMCB holds physical addresses (MmGetPhysicalAddress, virt_to_phys)"

Host = Mapping[str, Optional[int]]


class SvmState:
    """What the rules read: the VMCB, the processor, memory, and the host's registers at the VMRUN ("efer", "cr0", "cpl")."""

    def __init__(self, vmcb: Vmcb, caps: Optional[SvmCapabilities] = None, memory: Optional[PhysicalMemory] = None, *,
                 host: Optional[Host] = None, vmcb_address: Optional[int] = None) -> None:
        self.vmcb, self.caps, self.memory = vmcb, caps or UNKNOWN, memory
        self.host, self.vmcb_address = host or {}, vmcb_address
        self.fields: Dict[str, int] = dict(vmcb.items())

    def __getitem__(self, name: str) -> int:
        """The field by its canonical name."""
        try:
            return self.fields[name]
        except KeyError:
            raise Missing(name) from None

    def on(self, name: str, ident: str) -> bool:
        """Is the bit 1?  `on("efer", "SVME")`; the field's name is also its table's, except where TABLES says otherwise."""
        return self[name] & mask_of(TABLES.get(name, name), ident) != 0

    def host_register(self, name: str, what: str) -> int:
        value = self.host.get(name)
        if value is None:
            raise Missing(what)
        return value

    def has(self, feature: Feature) -> bool:
        answer = self.caps.has(feature)
        if answer is None:
            raise Missing(str(feature))
        return answer

    def feature(self, ident: str) -> bool:
        """A feature of CPUID Fn8000_000A EDX."""
        answer = self.caps.feature(ident)
        if answer is None:
            raise Missing(f"CPUID Fn8000_000A EDX ({bits.table('svm_features')[ident].name})")
        return answer

    def too_wide(self, address: int, encrypted: bool = False) -> int:
        """The bits of a physical address beyond the processor's width; with `encrypted` the C-bit is not one of them.

        Every processor has 32 bits and none more than 52, so the width is not needed for what lies outside the two.
        """
        if not address >> 32:
            return 0
        width = self.caps.physical_address_width
        wide = address >> 52 << 52 if width is None else address >> width << width
        if encrypted and wide and not wide >> 52:
            c_bit = self.caps.encryption_bit
            if c_bit is None and wide & (wide - 1) == 0:
                raise Missing(C_BIT)
            wide &= ~(c_bit or 0)
        if not wide and width is None:
            raise Missing(MAXPHYADDR)
        return wide

    def allowed(self, value: int, allowed: Allowed) -> int:
        """The bits of `value` that may not be 1; Missing where only bits of unknown features are in question."""
        wrong = value & ~allowed.may_be_one
        unsure = 0
        for mask in allowed.unknown:
            unsure |= mask
        if wrong & ~unsure:
            return wrong & ~unsure
        if wrong:
            raise Missing(*(str(feature) for mask, feature in allowed.unknown.items() if wrong & mask))
        return 0


TABLES = {"intercept_exceptions": "exception_bitmap", "cs.attrib": "vmcb_attrib", "ss.attrib": "vmcb_attrib"}
"""Bit tables that are not called like their field."""

launch: RuleBook[SvmState] = RuleBook("host", SEE_VMRUN, ("exception",))
controls: RuleBook[SvmState] = RuleBook("controls", SEE_CHECKS, ("VMEXIT_INVALID",))
guest: RuleBook[SvmState] = RuleBook("guest", SEE_CHECKS, ("VMEXIT_INVALID",))

Wrong = Union[None, str, Failure]


def on(name: str, ident: str) -> Gate[SvmState]:
    """The bit is 1."""
    return lambda state: state.on(name, ident)


def off(name: str, ident: str) -> Gate[SvmState]:
    return lambda state: not state.on(name, ident)


LONG = all_of(on("efer", "LME"), on("cr0", "PG"))
NESTED = on("nested_ctl", "NP_ENABLE")
SEV = on("nested_ctl", "SEV")
SEV_ES = on("nested_ctl", "SEV_ES")
AVIC = on("int_ctl", "AVIC")
PLAIN_STATE = off("nested_ctl", "SEV_ES")
"""The guest's state is in the save area, not in an encrypted VMSA."""


# -- the VMRUN instruction --------------------------------------------------------------------------------------------------

@launch.rule("host.svme", "AV1", "EFER.SVME of the host is 1, else VMRUN is an invalid opcode")
def _host_svme(state: SvmState) -> Wrong:
    efer = state.host_register("efer", "the host's EFER at the VMRUN")
    return None if efer & mask_of("efer", "SVME") else f"the host's EFER is {efer:#x}: SVME (bit 12) is 0, VMRUN raises #UD"


@launch.rule("host.cpl", "AV1", "VMRUN runs at CPL 0, else #GP")
def _host_cpl(state: SvmState) -> Wrong:
    cpl = state.host_register("cpl", "the host's CPL at the VMRUN")
    return f"VMRUN at CPL {cpl} raises #GP" if cpl else None


@launch.rule("host.vmcb_address", "AV1", "the VMCB's address is aligned to 4096 bytes and inside the physical-address width, else #GP")
def _vmcb_address(state: SvmState) -> Wrong:
    address = state.vmcb_address
    if address is None:
        raise Missing("the physical address of the VMCB")
    if address & 0xFFF:
        return f"the VMCB is at {address:#x}, not aligned to 4096 bytes: VMRUN raises #GP"
    wide = state.too_wide(address, encrypted=True)
    return f"the VMCB's address {address:#x} is beyond the physical-address width: {bit_list(wide)} must be 0" if wide else None


@launch.rule("host.nested_paging", "AV22", "nested paging needs the host's paging on (CR0.PG = 1)", "nested_ctl", when=NESTED, see=SEE_NESTED)
def _host_paging(state: SvmState) -> Wrong:
    cr0 = state.host_register("cr0", "the host's CR0 at the VMRUN")
    return None if cr0 >> 31 & 1 else f"NP_ENABLE is 1 while the host's CR0 is {cr0:#x}: PG (bit 31) is 0"


# -- the control area -------------------------------------------------------------------------------------------------------

@controls.rule("controls.vmrun_intercept", "AV14", "VMRUN is intercepted", "intercept_misc2",
               hint="set bit 0 of the word at offset 0x10 (VMRUN): the processor insists on it")
def _vmrun_intercept(state: SvmState) -> Wrong:
    return None if state.on("intercept_misc2", "VMRUN") else f"intercept_misc2 is {state['intercept_misc2']:#x}: VMRUN (bit 0) is 0"


@controls.rule("controls.msrpm", "AV15", "the MSR permission map ends inside the physical-address width", "msrpm_base_pa")
def _msrpm(state: SvmState) -> Wrong:
    return _map_end(state, "msrpm_base_pa", MSRPM_SIZE)


@controls.rule("controls.iopm", "AV15", "the I/O permission map ends inside the physical-address width", "iopm_base_pa")
def _iopm(state: SvmState) -> Wrong:
    return _map_end(state, "iopm_base_pa", IOPM_SIZE)


def _map_end(state: SvmState, name: str, size: int) -> Wrong:
    """The low 12 bits of the address are ignored."""
    start = state[name] & ~0xFFF
    last = start + size - 1
    if last >> 64 or state.too_wide(last, encrypted=True):
        return Failure(f"{name} {state[name]:#x}: the map of {size // 1024} KiB ends at {last & (2**64 - 1):#x}, beyond the physical-address width",
                       LINEAR_HINT if start >> 47 == 0x1FFFF else "")
    return None


@controls.rule("controls.asid", "AV17", "the guest's ASID is not 0", "asid", hint="ASID 0 is the host's: give every virtual processor one from 1")
def _asid(state: SvmState) -> Wrong:
    return None if state["asid"] else "asid is 0"


@controls.rule("controls.nested_paging", "AV21", "the processor has nested paging", "nested_ctl", when=NESTED, see=SEE_NESTED)
def _nested_paging(state: SvmState) -> Wrong:
    return None if state.feature("NP") else "NP_ENABLE is 1 on a processor without nested paging (CPUID Fn8000_000A EDX[0] is 0)"


@controls.rule("controls.nested_cr3", "AV21", "N_CR3 is inside the physical-address width", "nested_cr3", when=NESTED, see=SEE_NESTED)
def _nested_cr3(state: SvmState) -> Wrong:
    value = state["nested_cr3"]
    wide = state.too_wide(value, encrypted=True)
    return Failure(f"nested_cr3 {value:#x}: {bit_list(wide)} must be 0", LINEAR_HINT if value >> 47 == 0x1FFFF else "") if wide else None


@controls.rule("controls.vnmi", "AV23", "virtual NMIs need the NMI intercept", "int_ctl", "intercept_misc1",
               when=on("int_ctl", "V_NMI_ENABLE"), see=SEE_VNMI)
def _vnmi(state: SvmState) -> Wrong:
    return None if state.on("intercept_misc1", "NMI") else "V_NMI_ENABLE (int_ctl bit 26) is 1 while NMI (intercept_misc1 bit 1) is 0"


@controls.rule("controls.avic.supported", "AV24", "the processor has the AVIC", "int_ctl", when=AVIC, see=SEE_AVIC)
def _avic(state: SvmState) -> Wrong:
    return None if state.feature("AVIC") else "AVIC enable (int_ctl bit 31) is 1 on a processor without AVIC (CPUID Fn8000_000A EDX[13] is 0)"


@controls.rule("controls.avic.x2avic", "AV24", "x2AVIC needs AVIC", "int_ctl", when=on("int_ctl", "X2AVIC"), see=SEE_AVIC)
def _x2avic(state: SvmState) -> Wrong:
    return None if state.on("int_ctl", "AVIC") else "x2AVIC enable (int_ctl bit 30) is 1 while AVIC enable (bit 31) is 0"


def _avic_address(name: str) -> None:
    @controls.rule(f"controls.avic.{name[5:]}", "AV24", f"{name} is inside the physical-address width", name, when=AVIC, see=SEE_AVIC)
    def check(state: SvmState) -> Wrong:
        # Bits 11:0 of the physical table pointer hold the highest index, those of the others are ignored.
        wide = state.too_wide(state[name] & ~0xFFF, encrypted=True)
        return f"{name} {state[name]:#x} is beyond the physical-address width: {bit_list(wide)} must be 0" if wide else None


for _name in ("avic_backing_page", "avic_logical_id", "avic_physical_id"):
    _avic_address(_name)


@controls.rule("controls.avic.max_index", "AV24", "the highest index of the physical APIC table is one that the mode has",
               "avic_physical_id", "int_ctl", when=AVIC, see=SEE_AVIC)
def _avic_index(state: SvmState) -> Wrong:
    """AVIC: 8 bits, of which 255 is the broadcast; x2AVIC: 511, or 4095 with the extension (Linux 6.12.117 svm.h)."""
    index = state["avic_physical_id"] & 0xFFF
    if not state.on("int_ctl", "X2AVIC"):
        return f"avic_physical_id has the highest index {index}: AVIC addresses 0 to 254" if index > 0xFE else None
    if index <= 0x1FF:
        return None
    raise Missing("the highest x2AVIC index of the processor (511, or 4095 with the extension)")


@controls.rule("controls.sev.nested", "AV25", "SEV needs nested paging", "nested_ctl", when=SEV, see=SEE_SEV)
def _sev_nested(state: SvmState) -> Wrong:
    return None if state.on("nested_ctl", "NP_ENABLE") else "SEV (nested_ctl bit 1) is 1 while NP_ENABLE (bit 0) is 0"


@controls.rule("controls.sev.es", "AV25", "SEV-ES needs SEV", "nested_ctl", when=SEV_ES, see=SEE_SEV)
def _sev_es(state: SvmState) -> Wrong:
    return None if state.on("nested_ctl", "SEV") else "SEV-ES (nested_ctl bit 2) is 1 while SEV (bit 1) is 0"


@controls.rule("controls.sev.vmsa", "AV25", "the VMSA is a page of the guest's, assigned, not busy, aligned and inside the physical-address width",
               "vmsa_pa", when=SEV_ES, see=SEE_SEV)
def _vmsa(state: SvmState) -> Wrong:
    address = state["vmsa_pa"]
    if address & 0xFFF:
        return f"vmsa_pa {address:#x} is not aligned to 4096 bytes"
    wide = state.too_wide(address, encrypted=True)
    if wide:
        return f"vmsa_pa {address:#x} is beyond the physical-address width: {bit_list(wide)} must be 0"
    raise Missing(VMSA, "the reverse-map entry of its page")


@controls.rule("controls.sev.allowed_features", "AV25", "SEV_FEATURES of the VMSA has only bits of ALLOWED_SEV_FEATURES", "allowed_sev_features",
               when=all_of(SEV_ES, on("allowed_sev_features", "VALID")), see=SEE_SEV)
def _allowed_features(state: SvmState) -> Wrong:
    raise Missing(VMSA)


@controls.rule("controls.event.type", "AV16", "the type of a valid EVENTINJ is 0, 2, 3 or 4", "event_inj", when=on("event_inj", "V"),
               see=events.SEE_INJECTION)
def _event_type(state: SvmState) -> Wrong:
    kind = state["event_inj"] >> 8 & 7
    return None if kind in events.TYPES else f"event_inj {state['event_inj']:#x}: type {kind} (bits 10:8) is reserved"


@controls.rule("controls.event.vector", "AV16", "EVENTINJ of type exception has the vector of an exception", "event_inj",
               when=all_of(on("event_inj", "V"), lambda state: state["event_inj"] >> 8 & 7 == events.EXCEPTION), see=events.SEE_INJECTION)
def _event_vector(state: SvmState) -> Wrong:
    vector = state["event_inj"] & 0xFF
    if vector == 2:
        return Failure(f"event_inj {state['event_inj']:#x}: vector 2 is the NMI, not an exception", "inject an NMI with type 2")
    if vector > 31:
        return Failure(f"event_inj {state['event_inj']:#x}: vector {vector:#x} is no exception", "inject interrupts with type 0, INT n with type 4")
    if vectors.vector(vector) is None:
        raise Missing(f"whether this processor has an exception with vector {vector}")
    return None


# -- the state-save area, in the order of the manual's list --------------------------------------------------------------------

@guest.rule("guest.efer.svme", "AV2", "EFER.SVME is 1", "efer", when=PLAIN_STATE,
            hint="set EFER bit 12 in the guest's EFER although the guest must not see it; hide it by intercepting the MSR")
def _svme(state: SvmState) -> Wrong:
    return None if state.on("efer", "SVME") else f"efer is {state['efer']:#x}: SVME (bit 12) is 0"


@guest.rule("guest.cr0.cd_nw", "AV3", "CR0.NW is 0 where CR0.CD is 0", "cr0", when=PLAIN_STATE)
def _cd_nw(state: SvmState) -> Wrong:
    wrong = state.on("cr0", "NW") and not state.on("cr0", "CD")
    return f"cr0 is {state['cr0']:#x}: NW (bit 29) is 1 while CD (bit 30) is 0" if wrong else None


@guest.rule("guest.cr0.high", "AV4", "CR0[63:32] is 0", "cr0", when=PLAIN_STATE)
def _cr0_high(state: SvmState) -> Wrong:
    return high_half(state, "cr0")


def high_half(state: SvmState, name: str) -> Wrong:
    value = state[name]
    return f"{name} is {value:#x}: {bit_list(value >> 32 << 32)} must be 0" if value >> 32 else None


@guest.rule("guest.cr3", "AV5", "the must-be-zero bits of CR3 are 0", "cr3", "efer", "cr0", when=PLAIN_STATE)
def _cr3(state: SvmState) -> Wrong:
    value = state["cr3"]
    if not value >> 32:
        return None
    if not LONG(state):
        raise Missing("what this processor does with CR3[63:32] outside long mode")
    sev = "nested_ctl" not in state.fields or state.on("nested_ctl", "SEV")
    wide = state.too_wide(value, encrypted=sev)
    return Failure(f"cr3 is {value:#x}: {bit_list(wide)} must be 0", LINEAR_HINT if value >> 47 == 0x1FFFF else "") if wide else None


@guest.rule("guest.cr4", "AV6", "the reserved bits of CR4 are 0", "cr4", when=PLAIN_STATE)
def _cr4(state: SvmState) -> Wrong:
    wrong = state.allowed(state["cr4"], state.caps.cr4())
    return f"cr4 is {state['cr4']:#x}: must be 0: {named_bits('cr4', wrong)}" if wrong else None


@guest.rule("guest.dr6.high", "AV7", "DR6[63:32] is 0", "dr6", when=PLAIN_STATE)
def _dr6(state: SvmState) -> Wrong:
    return high_half(state, "dr6")


@guest.rule("guest.dr7.high", "AV8", "DR7[63:32] is 0", "dr7", when=PLAIN_STATE)
def _dr7(state: SvmState) -> Wrong:
    return high_half(state, "dr7")


@guest.rule("guest.efer.reserved", "AV9", "the must-be-zero bits of EFER are 0", "efer", when=PLAIN_STATE)
def _efer(state: SvmState) -> Wrong:
    wrong = state.allowed(state["efer"], state.caps.efer())
    return f"efer is {state['efer']:#x}: must be 0: {named_bits('efer', wrong)}" if wrong else None


@guest.rule("guest.efer.long_mode", "AV10", "EFER.LMA and EFER.LME are 0 on a processor without long mode", "efer",
            when=all_of(PLAIN_STATE, lambda state: state.on("efer", "LMA") or state.on("efer", "LME")))
def _long_mode(state: SvmState) -> Wrong:
    return None if state.has(LONG_MODE) else f"efer is {state['efer']:#x}: LME or LMA is 1 on a processor without long mode"


@guest.rule("guest.long.pae", "AV11", "long mode with paging needs CR4.PAE", "efer", "cr0", "cr4", when=all_of(PLAIN_STATE, LONG))
def _long_pae(state: SvmState) -> Wrong:
    return None if state.on("cr4", "PAE") else f"EFER.LME and CR0.PG are 1 while cr4 is {state['cr4']:#x}: PAE (bit 5) is 0"


@guest.rule("guest.long.pe", "AV12", "long mode with paging needs CR0.PE", "efer", "cr0", when=all_of(PLAIN_STATE, LONG))
def _long_pe(state: SvmState) -> Wrong:
    return None if state.on("cr0", "PE") else f"EFER.LME and CR0.PG are 1 while cr0 is {state['cr0']:#x}: PE (bit 0) is 0"


@guest.rule("guest.long.cs", "AV13", "CS.L and CS.D are not both 1 in long mode with paging", "efer", "cr0", "cr4", "cs.attrib",
            when=all_of(PLAIN_STATE, LONG, on("cr4", "PAE")), hint="a 64-bit code segment has L = 1 and D = 0: attributes 0xa9b")
def _long_cs(state: SvmState) -> Wrong:
    wrong = state.on("cs.attrib", "L") and state.on("cs.attrib", "DB")
    return f"cs.attrib is {state['cs.attrib']:#x}: L (bit 9) and D (bit 10) are both 1" if wrong else None


@guest.rule("guest.s_cet", "AV18", "the reserved bits of S_CET are 0", "s_cet", when=PLAIN_STATE, see=SEE_CET)
def _s_cet(state: SvmState) -> Wrong:
    value = state["s_cet"]
    if not value & ~mask_of("s_cet", "SH_STK_EN") & ~mask_of("s_cet", "WR_SHSTK_EN") or not state.has(CET_SS):
        return None
    reserved = bits.table("s_cet").kind_mask("reserved0") & value
    if not reserved and not state.has(CET_IBT):
        reserved = value & ~3
    return f"s_cet is {value:#x}: must be 0: {named_bits('s_cet', reserved)}" if reserved else None


@guest.rule("guest.cet.wp", "AV19", "CR4.CET needs CR0.WP", "cr4", "cr0", when=all_of(PLAIN_STATE, on("cr4", "CET")), see=SEE_CET)
def _cet_wp(state: SvmState) -> Wrong:
    return None if state.on("cr0", "WP") else f"CR4.CET is 1 while cr0 is {state['cr0']:#x}: WP (bit 16) is 0"


@guest.rule("guest.cet.vm86", "AV20", "user shadow stacks are off in virtual-8086 mode", "cr4", "rflags",
            when=all_of(PLAIN_STATE, on("cr4", "CET"), on("rflags", "VM")), see=SEE_CET)
def _cet_vm86(state: SvmState) -> Wrong:
    # U_CET is not in the VMCB: it is the processor's at the time of the VMRUN.
    u_cet = state.host_register("u_cet", "U_CET at the VMRUN")
    return f"CR4.CET is 1, U_CET {u_cet:#x} has SH_STK_EN (bit 0) and rflags {state['rflags']:#x} has VM (bit 17)" if u_cet & 1 else None


PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})
"""UC, WC, WT, WP, WB, UC- (APM vol. 2, Page-Attribute Table Mechanism)."""


@guest.rule("guest.g_pat", "AV21", "every field of G_PAT is a memory type", "g_pat", when=all_of(PLAIN_STATE, NESTED), see=SEE_NESTED)
def _g_pat(state: SvmState) -> Wrong:
    value = state["g_pat"]
    wrong = [f"PA{index} is {byte:#x}" for index, byte in enumerate(value.to_bytes(8, "little")) if byte not in PAT_TYPES]
    return f"g_pat is {value:#x}: {', '.join(wrong)}" if wrong else None


def _pae_guest(state: SvmState) -> bool:
    return state.on("cr0", "PG") and state.on("cr4", "PAE") and not state.on("efer", "LME")


@guest.rule("guest.pdpte", "AV26", "the reserved bits of the four PDPTEs of a PAE guest are 0 (without nested paging they are loaded by VMRUN)",
            "cr3", "cr0", "cr4", "efer", when=all_of(PLAIN_STATE, off("nested_ctl", "NP_ENABLE"), _pae_guest), see=SEE_PDPTE)
def _pdpte(state: SvmState) -> Wrong:
    address = state["cr3"] & 0xFFFF_FFE0
    if state.memory is None:
        raise Missing(f"memory at {address:#x}")
    try:
        table = state.memory.read(address, 32)
    except MemoryUnavailable as problem:
        raise Missing(f"memory at {problem.address:#x}") from None
    wrong = []
    for index in range(4):
        entry = int.from_bytes(table[8 * index:8 * index + 8], "little")
        if entry & 1:
            reserved = entry & 0x1E6 | state.too_wide(entry & ~0xFFF)
            if reserved:
                wrong.append(f"PDPTE{index} at {address + 8 * index:#x} is {entry:#x}: {bit_list(reserved)} must be 0")
    return "; ".join(wrong) or None


RULES = launch.rules + controls.rules + guest.rules


def check_vmrun(vmcb: Vmcb, caps: Optional[SvmCapabilities] = None, memory: Optional[PhysicalMemory] = None, *,
                host: Optional[Host] = None, vmcb_address: Optional[int] = None) -> List[Finding]:
    """Every VMRUN check on this VMCB: `Finding`s with verdict pass, fail or undecided (which input is missing).

    `caps` what is known of the processor; `memory` physical memory, for the PDPTEs of a PAE guest without nested paging; `host` the host's
    registers at the VMRUN ("efer", "cr0", "cpl", "u_cet"); `vmcb_address` where the VMCB is.  Raises UsageError for a VMSA.
    """
    if vmcb.layout != "vmcb":
        raise UsageError("VMRUN checks the VMCB: a VMSA cannot be checked by itself")
    state = SvmState(vmcb, caps, memory, host=host, vmcb_address=vmcb_address)
    return [rule.decide(state)[0] for rule in RULES]

