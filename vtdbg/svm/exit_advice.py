"""What a handler does about a #VMEXIT: RIP, the event that was cut off, the interrupt shadow, what caused the exit, how to avoid it."""

from __future__ import annotations

from typing import Callable, Dict, Iterator, Optional

from vtdbg import bits
from vtdbg.explain import Advice
from vtdbg.svm import events
from vtdbg.svm.events import EXCEPTION, SOFTWARE_INTERRUPT, SvmEvent
from vtdbg.svm.exit_info import AVIC_TRAPS, ExitInputs
from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86 import vectors

SEE_NRIP = "APM vol. 2, State Saved on Exit (nRIP)"
SEE_SHADOW = "APM vol. 2, Interrupt Shadows"
SHADOW = 1


def advise(inputs: ExitInputs, event: Optional[SvmEvent], injection: Optional[SvmEvent], vmcb: Optional[Vmcb] = None) -> Iterator[Advice]:
    """In the order in which a handler needs it."""
    row = inputs.row
    if row.category == "invalid":
        yield from _refused(inputs, vmcb)
        return
    if row.handler:
        yield Advice("emulate", row.handler, row.see)
    rip = _RIP.get(row.advance)
    if rip is not None:
        yield Advice("rip", rip(inputs), row.see if row.name == "IOIO" else SEE_NRIP)
    if event is not None and event.valid:
        yield Advice("event", _reinjection(inputs, event), events.SEE_EXITINTINFO)
    if injection is not None and injection.valid:
        yield Advice("event", f"EVENTINJ is valid: the next VMRUN injects {injection.title}; a second event cannot be injected with it",
                     events.SEE_INJECTION)
    if row.category == "instruction" and row.advance == "fault" and (inputs.get("int_state") or 0) & SHADOW:
        yield Advice("shadow", "the guest is in an interrupt shadow (after STI or MOV SS): clear INTERRUPT_SHADOW of int_state when RIP is advanced, "
                               "else the next instruction keeps it", SEE_SHADOW)
    yield from _cause(inputs)


def _refused(inputs: ExitInputs, vmcb: Optional[Vmcb]) -> Iterator[Advice]:
    yield Advice("rip", "no guest instruction ran and the guest state is as the VMCB has it", inputs.row.see)
    yield Advice("emulate", inputs.row.handler, inputs.row.see)
    if inputs.row.code != -1 or vmcb is None:
        return
    from vtdbg.findings import failures
    from vtdbg.svm.entry import check_vmrun

    found = failures(check_vmrun(vmcb))
    for finding in found:
        yield Advice("fix", finding.message, finding.see)
    if not found:
        yield Advice("fix", "no check fails on the values at hand; the VMCB may have been changed since, or the check needs what is not known here "
                            "(capabilities of the processor)", inputs.row.see)


def _at_instruction(inputs: ExitInputs) -> str:
    row, next_rip = inputs.row, inputs.get("next_rip")
    if row.name == "IOIO":
        info2 = inputs.get("exit_info_2")
        after = "the RIP in EXITINFO2" if info2 is None else f"{info2:#x} (EXITINFO2)"
        return f"RIP is at the I/O instruction: when the access is done set RIP to {after}"
    if not row.nrip:
        return ("RIP is at the instruction, which runs again after the next VMRUN; this exit saves no nRIP: "
                "advance RIP only after emulating the instruction, by its decoded length")
    if next_rip:
        return f"RIP is at the instruction: when it is done set RIP to next_rip ({next_rip:#x})"
    length = f"it is {row.length} bytes long without prefixes" if row.length else "decode it for its length"
    why = "next_rip is unknown here" if next_rip is None else "next_rip is 0, the processor saved none"
    return f"RIP is at the instruction: when it is done advance RIP behind it ({why}: {length})"


def _soft(inputs: ExitInputs) -> str:
    next_rip = inputs.get("next_rip")
    after = f"next_rip ({next_rip:#x})" if next_rip else "RIP + 1 (without prefixes)"
    return f"RIP is at the INT3 or INTO: to give the exception to the guest inject it with the return address at {after}"


def _debug(inputs: ExitInputs) -> str:
    dr6 = inputs.get("dr6")
    if dr6 is None:
        return "#DB is a fault (instruction breakpoint, DR access) or a trap (single step, data breakpoint): DR6 says which, it is unknown here"
    trap = "a trap: RIP is after the instruction" if dr6 & 0x4000 else "a fault for an instruction breakpoint or a DR access, else a trap"
    return f"DR6 is {dr6:#x} ({bits.table('dr6').describe(dr6)}): {trap}; do not advance RIP"


def _avic(inputs: ExitInputs) -> str:
    info1 = inputs.get("exit_info_1")
    if info1 is None:
        return "RIP depends on the APIC register: EXITINFO1 is unknown"
    if info1 >> 32 & 1 and info1 & 0xFF0 in AVIC_TRAPS:
        return "trap: the write of the APIC register is done and RIP is after it, do not advance"
    return "fault: RIP is at the instruction, emulate the access and advance RIP by its decoded length"


_RIP: Dict[str, Callable[[ExitInputs], str]] = {
    "fault": _at_instruction,
    "fault-exception": lambda _inputs: "RIP is at the faulting instruction: leave it there to inject the exception or to run the instruction again",
    "soft": _soft,
    "debug": _debug,
    "trap": lambda _inputs: "trap: the instruction is done and RIP is after it, do not advance",
    "event": lambda _inputs: "the event came between instructions: RIP is the next one to run, do not advance",
    "abort": lambda _inputs: "abort: the guest cannot go on at RIP reliably",
    "avic": _avic,
    "undefined": lambda _inputs: "the state saved in the VMCB is undefined after a shutdown: do not resume at RIP",
}
"""By the column `advance` of data/svm_exit_codes.csv."""


def _reinjection(inputs: ExitInputs, event: SvmEvent) -> str:
    row = inputs.row
    cut = f"the exit cut off the delivery of {event.title}"
    if row.name == "TASK_SWITCH":
        return f"{cut}: it goes through the task gate, the task switch delivers it; do not inject it again"
    if row.category == "exception" and event.type == EXCEPTION:
        becomes = vectors.double_fault(event.vector, row.code - 0x40)
        if becomes:
            second = vectors.name(row.code - 0x40)
            return f"{cut}: with {second} it becomes {becomes}, unless you resolve {second} and inject the first again"
    soft = event.type == SOFTWARE_INTERRUPT or (event.type == EXCEPTION and event.vector in (3, 4))
    if soft:
        return (f"{cut}: RIP is still at the INT instruction, so running it again delivers it; to inject it instead, "
                "set EVENTINJ and make the return address the instruction after it (next_rip, where the processor uses it)")
    error = ", error code as in exit_int_info_err" if event.error_code_valid else ""
    return f"{cut}: when this exit is handled inject it again (EVENTINJ = {event.value:#x}{error}), else it is lost"


def _cause(inputs: ExitInputs) -> Iterator[Advice]:
    row, intercept = inputs.row, inputs.row.intercept
    if row.name == "NPF":
        yield Advice("avoid", _avoid_npf(inputs), row.see)
        return
    if intercept is None:
        return
    word = inputs.get(intercept.field)
    state = "" if word is None else f" = {word:#x}"
    text = f"asked for by bit {intercept.bit} ({intercept.ident}) of {intercept.field}{state}"
    if word is not None and not word >> intercept.bit & 1:
        text = (f"bit {intercept.bit} ({intercept.ident}) of {intercept.field}{state} is 0 now: the exit is older than the word, "
                "or the hypervisor under this one asked for it")
    yield Advice("cause", text, row.see)
    yield Advice("avoid", _AVOID.get(row.name, _clear)(inputs, f"bit {intercept.bit} of {intercept.field}"), row.see)


def _clear(_inputs: ExitInputs, where: str) -> str:
    return f"clear {where}"


def _avoid_npf(inputs: ExitInputs) -> str:
    info1 = inputs.get("exit_info_1")
    if info1 is not None and bits.table("npf_info1").test(info1, "RSV"):
        # Linux 6.12.117 kvm_mmu_set_mmio_spte_mask: bit 51 of an entry that is never to translate.
        return "clear the reserved bit of the nested entry (npt walk shows which), unless it marks a device's page: KVM sets bit 51 for MMIO"
    return "give the guest-physical page a nested translation that allows the access (npt walk shows what it has)"


def _avoid_msr(inputs: ExitInputs, where: str) -> str:
    index, info1 = inputs.register("rcx"), inputs.get("exit_info_1")
    access = "read or write" if info1 is None else "write" if info1 & 1 else "read"
    name = "the MSR of ECX" if index is None else f"MSR {index & 0xFFFFFFFF:#x}"
    return f"clear the {access} bit of {name} in the MSR permission map (msrpm_base_pa); MSRs outside its ranges always exit while {where} is 1"


def _avoid_io(inputs: ExitInputs, where: str) -> str:
    info1 = inputs.get("exit_info_1")
    port = "the port" if info1 is None else f"port {info1 >> 16 & 0xFFFF:#x}"
    return f"clear the bits of {port} in the I/O permission map (iopm_base_pa), one for each byte of the access, or {where} for all ports"


_AVOID: Dict[str, Callable[[ExitInputs, str], str]] = {
    "MSR": _avoid_msr,
    "IOIO": _avoid_io,
    "VMRUN": lambda _inputs, _where: "it cannot be avoided: VMRUN refuses a VMCB that does not intercept VMRUN",
    "INTR": lambda _inputs, where: f"with {where} clear the host's interrupts go to the guest's IDT: keep it unless interrupts are the guest's",
    "PAUSE": lambda _inputs, where: f"raise pause_filter_count, or clear {where}",
    "BUS_LOCK": lambda _inputs, where: f"raise bus_lock_counter, or clear {where}",
    "WRITE_CR0": lambda _inputs, where: f"clear {where}; the selective intercept (CR0_WRITE_OTHER_THAN_TS_MP) exits for less",
}
