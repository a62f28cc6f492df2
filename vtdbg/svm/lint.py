"""VMCB lints: states that VMRUN accepts and that break later.  Severity "lint": no processor refuses them."""

from __future__ import annotations

from typing import List, Optional

from vtdbg import bits
from vtdbg.errors import UsageError
from vtdbg.findings import Finding
from vtdbg.memory.base import PhysicalMemory
from vtdbg.rules import Gate, Missing, RuleBook, all_of, bit_list
from vtdbg.svm import events
from vtdbg.svm.capabilities import SvmCapabilities
from vtdbg.svm.entry import LONG, NESTED, PLAIN_STATE, SEV_ES, Host, SvmState, Wrong, off, on
from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86 import vectors

SEE_INTERCEPTS = "APM vol. 2, Instruction Intercepts; Interrupt Intercepts"
SEE_SAVE = "APM vol. 2, VMRUN Instruction, Loading Guest State"

book: RuleBook[SvmState] = RuleBook("guest", SEE_SAVE, ("enters",), severity="lint")
controls: RuleBook[SvmState] = RuleBook("controls", SEE_INTERCEPTS, ("enters",), severity="lint")


def _intercepted(id: str, word: str, ident: str, danger: str, hint: str = "", when: Optional[Gate[SvmState]] = None) -> None:
    """The intercept bit should be 1."""
    row = bits.table(word)[ident]

    @controls.rule(f"lint.{id}", "", f"{ident} is intercepted", word, when=when, hint=hint)
    def check(state: SvmState) -> Wrong:
        return None if state.on(word, ident) else f"{ident} ({word} bit {row.low}) is not intercepted: {danger}"


_intercepted("intercept.shutdown", "intercept_misc1", "SHUTDOWN", "a triple fault of the guest shuts the processor down, the host with it")
_intercepted("intercept.intr", "intercept_misc1", "INTR", "the host's interrupts are delivered through the guest's IDT")
_intercepted("intercept.nmi", "intercept_misc1", "NMI", "the host's NMIs are delivered through the guest's IDT")
_intercepted("intercept.io", "intercept_misc1", "IOIO_PROT", "the guest reaches every port of the machine")
_intercepted("intercept.msr", "intercept_misc1", "MSR_PROT", "the guest reads and writes the processor's MSRs, VM_HSAVE_PA and EFER.SVME among them")
_intercepted("intercept.invlpga", "intercept_misc1", "INVLPGA", "the guest flushes translations of any ASID")
for _ident in ("VMLOAD", "VMSAVE"):
    _intercepted(f"intercept.{_ident.lower()}", "intercept_misc2", _ident, "the guest, whose EFER.SVME is 1, moves state to and from any address",
                 when=off("virt_ext", "VMSAVE_VMLOAD"))
for _ident in ("STGI", "CLGI"):
    _intercepted(f"intercept.{_ident.lower()}", "intercept_misc2", _ident, "the guest changes the processor's global interrupt flag",
                 when=off("int_ctl", "V_GIF_ENABLE"))
_intercepted("intercept.skinit", "intercept_misc2", "SKINIT", "the guest can restart the processor into a secure loader")


def _map(name: str, ident: str) -> None:
    @controls.rule(f"lint.{name}", "", f"{name} is the address of a map", name, when=on("intercept_misc1", ident))
    def check(state: SvmState) -> Wrong:
        value = state[name]
        if value & ~0xFFF == 0:
            return f"{name} is {value:#x} while {ident} is 1: the map is physical page 0"
        return f"{name} is {value:#x}: {bit_list(value & 0xFFF)} are ignored, the map begins at {value & ~0xFFF:#x}" if value & 0xFFF else None


_map("iopm_base_pa", "IOIO_PROT")
_map("msrpm_base_pa", "MSR_PROT")


@controls.rule("lint.asid.range", "", "the ASID is one that the processor has", "asid", see="APM vol. 2, Address Space Identifier")
def _asid(state: SvmState) -> Wrong:
    count = state.caps.asids
    if count is None:
        raise Missing("number of ASIDs (CPUID Fn8000_000A EBX)")
    return f"asid {state['asid']} is not below {count}, the number of ASIDs" if state["asid"] >= count else None


@controls.rule("lint.tlb_control", "", "TLB control is 0, 1, or 3 or 7 with flush by ASID", "tlb_ctl", see="APM vol. 2, TLB Control")
def _tlb(state: SvmState) -> Wrong:
    value = state["tlb_ctl"]
    if value in (0, 1):
        return None
    if value not in (3, 7):
        return f"tlb_ctl is {value}: only 0, 1, 3 and 7 are defined (KVM refuses others as a nested hypervisor's)"
    return None if state.feature("FLUSH_BY_ASID") else f"tlb_ctl is {value} on a processor without flush by ASID"


@controls.rule("lint.sev_es.lbr", "", "LBR virtualization is on for an SEV-ES guest", "virt_ext", when=SEV_ES,
               see="APM vol. 2, Encrypted State (SEV-ES)")
def _sev_lbr(state: SvmState) -> Wrong:
    return None if state.on("virt_ext", "LBR_VIRT") else "SEV-ES is on while LBR virtualization (virt_ext bit 0) is 0"


@controls.rule("lint.avic.nested", "", "AVIC runs with nested paging", "int_ctl", "nested_ctl", when=on("int_ctl", "AVIC"),
               see="APM vol. 2, Advanced Virtual Interrupt Controller")
def _avic_nested(state: SvmState) -> Wrong:
    return None if state.on("nested_ctl", "NP_ENABLE") else "AVIC enable is 1 while NP_ENABLE is 0"


EVENT = on("event_inj", "V")


@controls.rule("lint.event.error_code", "", "EVENTINJ has an error code exactly where the exception pushes one", "event_inj", "cr0",
               when=EVENT, see=events.SEE_INJECTION, hint="the handler pops an error code that is not there, or returns to it")
def _error_code(state: SvmState) -> Wrong:
    event = events.decode("event_inj", state["event_inj"])
    row = vectors.vector(event.vector)
    if event.type != events.EXCEPTION or row is None:
        return f"event_inj {event.value:#x}: EV (bit 11) is 1 for a {event.type_name}" if event.error_code_valid else None
    wanted = row.has_error_code and state.on("cr0", "PE")
    if wanted == event.error_code_valid:
        return None
    how = "without an error code: EV (bit 11) is 0" if wanted else "with an error code: EV (bit 11) is 1"
    return f"event_inj {event.value:#x} injects {row.mnemonic} {how}"


@controls.rule("lint.event.vector64", "", "an injected #OF or #BR is of a guest that has INTO and BOUND", "event_inj", "cs.attrib",
               when=all_of(EVENT, PLAIN_STATE, LONG, on("cs.attrib", "L")), see=events.SEE_INJECTION)
def _vector64(state: SvmState) -> Wrong:
    event = events.decode("event_inj", state["event_inj"])
    wrong = event.type == events.EXCEPTION and event.vector in (4, 5)
    return f"event_inj {event.value:#x} injects {vectors.title(event.vector)} into 64-bit mode, which cannot raise it" if wrong else None


@controls.rule("lint.event.interrupt_flag", "", "an interrupt is injected while the guest can take one", "event_inj", "rflags", "int_state",
               when=all_of(EVENT, PLAIN_STATE), see=events.SEE_INJECTION, hint="EVENTINJ delivers whatever RFLAGS.IF says: wait for the VINTR exit")
def _interrupt_flag(state: SvmState) -> Wrong:
    event = events.decode("event_inj", state["event_inj"])
    if event.type != events.INTERRUPT:
        return None
    if not state.on("rflags", "IF"):
        return f"event_inj {event.value:#x} injects an interrupt while RFLAGS.IF is 0"
    return f"event_inj {event.value:#x} injects an interrupt in an interrupt shadow" if state.on("int_state", "INTERRUPT_SHADOW") else None


@controls.rule("lint.event.return_address", "", "a software interrupt is injected with the address to return to", "event_inj", "next_rip",
               when=EVENT, see=events.SEE_INJECTION)
def _return_address(state: SvmState) -> Wrong:
    event = events.decode("event_inj", state["event_inj"])
    soft = event.type == events.SOFTWARE_INTERRUPT or (event.type == events.EXCEPTION and event.vector in (3, 4))
    if not soft or state["next_rip"]:
        return None
    return f"event_inj {event.value:#x} injects {event.title} while next_rip is 0: with NRIP save the guest returns to 0"


@book.rule("lint.efer.lma", "", "EFER.LMA is what LME and PG make it", "efer", "cr0", when=PLAIN_STATE)
def _lma(state: SvmState) -> Wrong:
    wanted = state.on("efer", "LME") and state.on("cr0", "PG")
    if wanted == state.on("efer", "LMA"):
        return None
    return f"efer is {state['efer']:#x}: LMA is {int(not wanted)} while LME and CR0.PG make it {int(wanted)}; VMRUN does not check it"


@book.rule("lint.cpl", "", "CPL is SS.DPL", "cpl", "ss.attrib", "cr0", "rflags", when=all_of(PLAIN_STATE, on("cr0", "PE"), off("rflags", "VM")),
           hint="VMRUN takes the CPL from the field at 0x4cb, not from SS")
def _cpl(state: SvmState) -> Wrong:
    dpl = bits.table("vmcb_attrib").get(state["ss.attrib"], "DPL")
    return f"cpl is {state['cpl']} while SS.DPL is {dpl}" if state["cpl"] != dpl else None


@book.rule("lint.rflags", "", "RFLAGS has bit 1 set and no reserved bit", "rflags", when=PLAIN_STATE,
           hint="a pointer written to RFLAGS looks like this")
def _rflags(state: SvmState) -> Wrong:
    wrong = bits.table("rflags").reserved_violations(state["rflags"])
    return f"rflags is {state['rflags']:#x}: wrong reserved bits {', '.join(value.field.bits for value in wrong)}" if wrong else None


@book.rule("lint.rip", "", "RIP is an address of the guest's mode", "rip", "cs.attrib", "efer", "cr0", when=PLAIN_STATE)
def _rip(state: SvmState) -> Wrong:
    rip = state["rip"]
    if not rip >> 32:
        return None
    if not (LONG(state) and state.on("cs.attrib", "L")):
        return f"rip is {rip:#x} while the guest is not in 64-bit mode: {bit_list(rip >> 32 << 32)} are set"
    return None if _canonical(state, rip) else f"rip {rip:#x} is not canonical"


def _canonical(state: SvmState, address: int) -> bool:
    def fits(width: int) -> bool:
        return address >> (width - 1) in (0, (1 << (65 - width)) - 1)
    if fits(48) or not fits(57):
        return fits(48)
    width = state.caps.linear_address_width
    if width is None:
        raise Missing("linear-address width (CPUID Fn8000_0008 EAX[15:8])")
    return fits(width)


BASES = ("fs.base", "gs.base", "gdtr.base", "idtr.base", "ldtr.base", "tr.base", "kernel_gs_base", "lstar", "cstar", "sysenter_esp", "sysenter_eip")


@book.rule("lint.bases", "AV27", "bases and entry points are canonical", *BASES, when=PLAIN_STATE,
           see="APM vol. 2, Canonicalization and Consistency Checks")
def _bases(state: SvmState) -> Wrong:
    wrong = [name for name in BASES if not _canonical(state, state[name])]
    return f"not canonical, VMRUN and VMLOAD sign-extend them: {', '.join(f'{name} {state[name]:#x}' for name in wrong)}" if wrong else None


@book.rule("lint.no_paging", "", "a guest without paging has nested paging below it", "cr0", "nested_ctl",
           when=all_of(PLAIN_STATE, off("nested_ctl", "NP_ENABLE")), see="APM vol. 2, Paged Real Mode")
def _no_paging(state: SvmState) -> Wrong:
    if state.on("cr0", "PG"):
        return None
    return "CR0.PG and NP_ENABLE are both 0: the guest's addresses are the host's physical addresses (shadow paging runs it with PG = 1)"


@book.rule("lint.g_pat.zero", "", "G_PAT is not 0 with nested paging", "g_pat", when=all_of(PLAIN_STATE, NESTED), hint="copy the PAT MSR of the host",
           see="APM vol. 2, Nested Paging, Memory Typing")
def _g_pat(state: SvmState) -> Wrong:
    return "g_pat is 0: every access of the guest is uncacheable" if state["g_pat"] == 0 else None


RULES = controls.rules + book.rules


def lint_vmcb(vmcb: Vmcb, caps: Optional[SvmCapabilities] = None, memory: Optional[PhysicalMemory] = None, *,
              host: Optional[Host] = None) -> List[Finding]:
    """What `check_vmrun` does not refuse and a developer wants to know: `Finding`s of severity "lint".  Raises UsageError for a VMSA."""
    if vmcb.layout != "vmcb":
        raise UsageError("the lints are about the VMCB: a VMSA cannot be checked by itself")
    state = SvmState(vmcb, caps, memory, host=host)
    return [rule.decide(state)[0] for rule in RULES]
