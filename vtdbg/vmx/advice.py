"""What a handler does with GUEST_RIP, with events and with interruptibility after a VM exit."""

from __future__ import annotations

from typing import Iterator, List, Optional

from vtdbg import bits
from vtdbg.explain import Advice
from vtdbg.vmx import events
from vtdbg.vmx.events import Event
from vtdbg.vmx.guest import Guest
from vtdbg.x86 import vectors

SEE_RIP = "SDM vol. 3, Saving RIP, RSP, RFLAGS, and SSP"
SEE_LENGTH = "SDM vol. 3, Information for VM Exits Due to Instruction Execution"
SEE_BLOCKING = "SDM vol. 3, Guest Non-Register State; VM entry, Checks on Guest Non-Register State"
SEE_NMI = "SDM vol. 3, Information About NMI Unblocking Due to IRET"

BLOCKED_BY_STI_OR_MOV_SS = 3
BLOCKED_BY_NMI = 8
TRAP_FLAG = 1 << 8


def rip(kind: str, guest: Guest, length: Optional[int], decoded: Optional[int], event: Optional[Event], during: Optional[Event],
        qualification: Optional[int]) -> List[Advice]:
    """Does RIP advance, by how much?  `kind` is the `rip` column of exit_reasons.csv, `during` the event that was being delivered.

    `length` is VM_EXIT_INSTRUCTION_LEN where this exit defines it, `decoded` the length of the instruction that was disassembled at RIP.
    """
    if kind == "task" and qualification is not None and qualification >> 30 & 3 != 3:
        kind = "instruction"
    if kind == "instruction":
        return list(_instruction(guest, length))
    if kind == "exception":
        return list(_exception(guest, length, event))
    if kind == "access" and during is not None and during.valid:
        return [Advice("rip", f"do not advance RIP: the exit came while {during.name} was being delivered, which is delivered again", SEE_RIP)]
    if kind == "access" and decoded is not None:
        behind = guest.next_rip(decoded)
        target = f", to GUEST_RIP = {behind:#x}" if behind is not None else ""
        return [Advice("rip", f"{ACCESS}; only an emulated access advances it, by the {decoded} bytes of the instruction at GUEST_RIP{target} "
                       "(VM_EXIT_INSTRUCTION_LEN is undefined here)", SEE_RIP)]
    return [Advice("rip", RIP_TEXTS[kind], SEE_RIP)] if kind in RIP_TEXTS else []


ACCESS = "do not advance RIP when the cause is removed: fault-like, the instruction runs again"


RIP_TEXTS = {
    "trap": "do not advance RIP: trap-like, the instruction is done and GUEST_RIP is behind it",
    "event": "do not advance RIP: the exit came between two instructions, GUEST_RIP is where the guest goes on",
    "access": f"{ACCESS}; only an emulated access advances it, by a length that the handler "
              "decodes itself (VM_EXIT_INSTRUCTION_LEN is undefined here)",
    "task": "after the emulated task switch GUEST_RIP is the new task's EIP; nothing is added",
    "failure": "RIP does not matter: the guest did not run, and its state was not saved",
    "dead": "do not advance RIP: there is nothing to go on with",
}


def _instruction(guest: Guest, length: Optional[int]) -> Iterator[Advice]:
    text = "fault-like, GUEST_RIP is at the instruction: after emulating it add VM_EXIT_INSTRUCTION_LEN"
    if length is not None:
        behind = guest.next_rip(length)
        text += f" = {length}" + (f", GUEST_RIP = {behind:#x}" if behind is not None else "")
        if not 1 <= length <= 15:
            text += ", which no instruction has: do not trust it"
    yield Advice("rip", text + "; injecting a fault instead leaves RIP where it is", f"{SEE_RIP}; {SEE_LENGTH.replace('SDM vol. 3, ', '')}")


def _exception(guest: Guest, length: Optional[int], event: Optional[Event]) -> Iterator[Advice]:
    if event is None or not event.valid:
        yield Advice("rip", "do not advance RIP for a fault; the vector is not known", SEE_RIP)
    elif event.type in (events.SOFTWARE, events.PRIVILEGED_SOFTWARE):
        behind = guest.next_rip(length) if length is not None else None
        size = f" = {length}" if length is not None else ""
        target = f", GUEST_RIP = {behind:#x}" if behind is not None else ""
        yield Advice("rip", f"GUEST_RIP is at the instruction ({event.name}): add VM_EXIT_INSTRUCTION_LEN{size}{target} only when the event is "
                     "swallowed; when it is injected the entry's instruction length does that", SEE_RIP)
    elif event.type == events.NMI:
        yield Advice("rip", RIP_TEXTS["event"], SEE_RIP)
    else:
        yield Advice("rip", f"do not advance RIP: {event.name} left GUEST_RIP as the guest's handler would see it", SEE_RIP)


def event(number: int, guest: Guest, interruption: Optional[Event], error_code: Optional[int], during: Optional[Event],
          during_error: Optional[int], length: Optional[int], qualification: Optional[int]) -> List[Advice]:
    """What to inject: the event whose delivery the exit broke off, the exception that the VMM reflects, or #DF for both.

    Events that cannot be (with `problems`) are not injected: the entry would fail.
    """
    again = during is not None and during.valid and not during.problems
    found: List[Advice] = []
    if during is not None and again:
        through_gate = number == 9 and qualification is not None and qualification >> 30 & 3 == 3
        found += _through_task_gate(during) if through_gate else _redeliver(during, guest, during_error, length)
    if number == 0 and interruption is not None and interruption.valid and not interruption.problems:
        found += _reflect(interruption, error_code, length, qualification)
        if during is not None and again:
            found += _both(during, interruption)
    return found


def _through_task_gate(during: Event) -> Iterator[Advice]:
    text = f"the emulated task switch is the delivery of {during.title}: do not inject it again"
    if during.error_code_valid:
        text += "; push IDT_VECTORING_ERROR_CODE onto the new task's stack"
    if during.type in events.WITH_LENGTH:
        text += "; the EIP that is saved in the old TSS is behind the instruction (GUEST_RIP + VM_EXIT_INSTRUCTION_LEN)"
    if during.type == events.NMI:
        text += "; NMIs are blocked in the new task: leave bit 3 of GUEST_INTERRUPTIBILITY_INFO set"
    yield Advice("event", text, "SDM vol. 3, Treatment of Task Switches")


def _redeliver(during: Event, guest: Guest, error_code: Optional[int], length: Optional[int]) -> Iterator[Advice]:
    made = events.injection(during, error_code, length)
    yield Advice("event", f"{during.title} was being delivered and is lost unless it is injected again: {made.text}", events.SEE_INJECTION)
    if during.type == events.NMI:
        yield Advice("shadow", "clear blocking by NMI (bit 3 of GUEST_INTERRUPTIBILITY_INFO) before injecting the NMI again: its delivery has "
                     "set it, and with virtual NMIs the entry fails otherwise", SEE_BLOCKING)
    cr0 = guest.register("cr0")
    if during.error_code_valid and (cr0 is None or not cr0 & 1):
        yield Advice("event", "in real mode (CR0.PE = 0) no error code may be delivered: clear bit 11 there", events.SEE_INJECTION)


def _reflect(interruption: Event, error_code: Optional[int], length: Optional[int], qualification: Optional[int]) -> Iterator[Advice]:
    if interruption.type == events.NMI:
        yield Advice("event", "it is the host's NMI: run the host's NMI handler (INT 2 or through its IDT); NMIs stay blocked until an IRET",
                     events.SEE_INJECTION)
        return
    if interruption.vector == 18:
        yield Advice("event", "it is the host's machine check: run the host's #MC handler", events.SEE_INJECTION)
        return
    made = events.injection(interruption, error_code, length)
    yield Advice("event", f"to let the guest have {interruption.name}: {made.text}", events.SEE_INJECTION)
    if interruption.vector == 14:
        target = f" = {qualification:#x}" if qualification is not None else " = the exit qualification"
        yield Advice("event", f"set CR2{target} first: the exit did not, and CR2 is not in the VMCS", "SDM vol. 3, Recording VM-Exit Information")
    if interruption.vector == 1 and interruption.type == events.HARDWARE:
        yield Advice("event", "set DR6 from the exit qualification, clear DR7.GD where BD is set, and DEBUGCTL.LBR: the exit did none of it",
                     "SDM vol. 3, Architectural State Before a VM Exit")


def _both(during: Event, second: Event) -> Iterator[Advice]:
    if during.type != events.HARDWARE or second.type != events.HARDWARE:
        return
    result = vectors.double_fault(during.vector, second.vector)
    if result == "#DF":
        yield Advice("event", f"{second.name} during the delivery of {during.name} is a double fault for the guest: inject #DF "
                     f"(VM_ENTRY_INTR_INFO_FIELD = {events.VALID | events.ERROR_CODE | 0x308:#x}, error code 0) unless you remove the cause of "
                     f"{second.name} and inject {during.name} again", vectors.SEE_DOUBLE_FAULT)
    elif result == "shutdown":
        yield Advice("event", f"{second.name} during the delivery of #DF is a triple fault for the guest", vectors.SEE_DOUBLE_FAULT)


def shadow(kind: str, guest: Guest, unblocked: bool, during: Optional[Event]) -> List[Advice]:
    """Interruptibility and pending debug exceptions: what an emulated instruction would have changed, and NMI blocking that IRET took away."""
    found = list(_after_instruction(guest)) if kind == "instruction" else []
    if unblocked and not (during is not None and during.valid):
        found.append(Advice("shadow", "set blocking by NMI (bit 3 of GUEST_INTERRUPTIBILITY_INFO) before resuming: an IRET took it away and then "
                            "failed, and will run again", SEE_NMI))
    return found


def _after_instruction(guest: Guest) -> Iterator[Advice]:
    blocking = guest.vmcs.get("GUEST_INTERRUPTIBILITY_INFO")
    if blocking is None:
        yield Advice("shadow", "when RIP advances clear blocking by STI and by MOV SS (bits 0 and 1 of GUEST_INTERRUPTIBILITY_INFO)", SEE_BLOCKING)
    elif blocking & BLOCKED_BY_STI_OR_MOV_SS:
        words = bits.table("interruptibility").describe(blocking & BLOCKED_BY_STI_OR_MOV_SS, names=True)
        yield Advice("shadow", f"when RIP advances clear {words}: GUEST_INTERRUPTIBILITY_INFO = {blocking & ~BLOCKED_BY_STI_OR_MOV_SS:#x} "
                     "(a guest in HLT with such blocking fails the next entry)", SEE_BLOCKING)
    flags = guest.register("rflags")
    if flags is not None and flags & TRAP_FLAG:
        yield Advice("shadow", "RFLAGS.TF is 1: when RIP advances set BS (bit 14) in GUEST_PENDING_DBG_EXCEPTIONS, the guest is single-stepping",
                     "SDM vol. 3, Checks on Guest Non-Register State")
