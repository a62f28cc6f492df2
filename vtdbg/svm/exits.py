"""Explain a #VMEXIT: what each number means, and what a handler does about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, Optional, Tuple, Union

from vtdbg.errors import UsageError
from vtdbg.explain import Explanation, Fact, unique
from vtdbg.memory.base import PhysicalMemory
from vtdbg.svm import events, exit_codes
from vtdbg.svm.events import SvmEvent
from vtdbg.svm.exit_advice import advise
from vtdbg.svm.exit_codes import ExitCode
from vtdbg.svm.exit_info import ExitInputs, info_facts, stale_facts
from vtdbg.svm.guest import SvmGuest, code_facts, nested_walk_facts
from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86.disasm import Instruction

_FROM_VMCB = ("exit_info_1", "exit_info_2", "exit_int_info", "exit_int_info_err", "event_inj", "event_inj_err", "next_rip", "rip", "rax", "rsp",
              "dr6", "int_state", "insn_len", "insn_bytes", "intercept_cr", "intercept_dr", "intercept_exceptions", "intercept_misc1",
              "intercept_misc2", "intercept_misc3", "nested_ctl")


@dataclass(frozen=True)
class SvmExit(Explanation):
    """An explained #VMEXIT.  `facts` in groups EXITINFO1, EXITINFO2, EXITINTINFO, EVENTINJ, guest; None where a number is unknown.

    `gpa` and `linear_address` are what the exit reports, `port` the I/O port, `msr` the index (of ECX).
    """

    row: Optional[ExitCode] = None
    exit_info_1: Optional[int] = None
    exit_info_2: Optional[int] = None
    event: Optional[SvmEvent] = None
    injection: Optional[SvmEvent] = None
    gpa: Optional[int] = None
    linear_address: Optional[int] = None
    port: Optional[int] = None
    msr: Optional[int] = None


def explain_svm_exit(exit_code: Union[int, str, None] = None, exit_info_1: Optional[int] = None, exit_info_2: Optional[int] = None,
                     exit_int_info: Optional[int] = None, event_inj: Optional[int] = None, vmcb: Optional[Vmcb] = None,
                     registers: Optional[Mapping[str, Optional[int]]] = None, *, memory: Optional[PhysicalMemory] = None,
                     ncr3: Optional[int] = None) -> SvmExit:
    """Explain an exit from numbers, from a VMCB, or from both (a given number wins).  What is not given is unknown, never 0.

    `exit_code` by number (also as 32-bit prints show -1) or by name ("NPF"); `exit_int_info` and `event_inj` with the error code in bits 63:32
    or without; `registers` are guest registers by lower-case 64-bit name ("rcx"): the VMCB holds only RAX and RSP.  `memory` is host-physical
    memory: with a VMCB (or `ncr3`) it gives the instruction at RIP and the walk behind a nested page fault.
    Raises UsageError where there is neither an exit code nor a VMCB with one, UnknownName for a name of no exit.
    """
    code = _code_of(exit_code, vmcb)
    row = exit_codes.get(code)
    given = {"exit_info_1": exit_info_1, "exit_info_2": exit_info_2, "exit_int_info": exit_int_info, "event_inj": event_inj}
    inputs = ExitInputs(row or _unknown_row(code), _numbers(given, vmcb), registers or {})
    event, injection = _event(inputs, "exit_int_info"), _event(inputs, "event_inj")
    facts = list(info_facts(inputs)) if row else list(_raw_facts(inputs))
    stale = list(stale_facts(inputs))
    for found, label in ((event, "EXITINTINFO"), (injection, "EVENTINJ")):
        if found is None or found.value == 0:
            continue
        (facts if found.valid else stale).extend(_event_facts(inputs, found, label))
    facts += list(_guest_facts(inputs))
    instruction, with_memory = _memory_facts(inputs, vmcb, memory, ncr3)
    facts += with_memory
    info1, info2 = inputs.get("exit_info_1"), inputs.get("exit_info_2")
    return SvmExit(
        kind="svm", code=code, name=inputs.row.name, title=inputs.row.title, facts=tuple(facts), stale=tuple(stale),
        advice=unique(advise(inputs, event, injection, vmcb) if row else ()), notes=tuple(_notes(inputs)), known=row is not None,
        see=inputs.row.see, summary=_summary(inputs, facts), instruction=instruction, row=row, exit_info_1=info1,
        exit_info_2=info2, event=event, injection=injection,
        gpa=_typed(inputs, "svm_gpa"), linear_address=_typed(inputs, "svm_linear"), msr=_msr_index(inputs),
        port=info1 >> 16 & 0xFFFF if inputs.row.info1 == "svm_ioio" and info1 is not None else None)


def _memory_facts(inputs: ExitInputs, vmcb: Optional[Vmcb], memory: Optional[PhysicalMemory],
                  ncr3: Optional[int]) -> Tuple[Optional[Instruction], List[Fact]]:
    if vmcb is not None and vmcb.layout != "vmcb":
        return None, []
    guest = SvmGuest(vmcb if vmcb is not None else Vmcb.from_values({}), memory, ncr3)
    instruction, facts = code_facts(guest, inputs.row)
    walk = nested_walk_facts(guest, _typed(inputs, "svm_gpa"), inputs.get("exit_info_1")) if inputs.row.name == "NPF" else ()
    return instruction, [*facts, *walk]


def _summary(inputs: ExitInputs, facts: List[Fact]) -> str:
    """"Nested page fault: write, page not present, final translation; guest-physical address 0x200000"."""
    words = [fact.meaning for fact in facts if fact.label == "EXITINFO1" and fact.meaning and fact.value is not None]
    gpa, linear = _typed(inputs, "svm_gpa"), _typed(inputs, "svm_linear")
    if gpa is not None:
        words.append(f"guest-physical address {gpa:#x}")
    if linear is not None:
        words.append(f"linear address {linear:#x}")
    return inputs.row.title + (f": {'; '.join(words)}" if words else "")


def _code_of(exit_code: Union[int, str, None], vmcb: Optional[Vmcb]) -> int:
    if isinstance(exit_code, str):
        return exit_codes.find(exit_code).code
    code = exit_code if exit_code is not None else vmcb.get("exit_code") if vmcb is not None else None
    if code is None:
        raise UsageError("no exit code: give one, or a VMCB that has one")
    return exit_codes.signed(code)


def _numbers(given: Mapping[str, Optional[int]], vmcb: Optional[Vmcb]) -> Dict[str, Tuple[int, str]]:
    numbers: Dict[str, Tuple[int, str]] = {}
    if vmcb is not None and vmcb.layout == "vmcb":
        for name in _FROM_VMCB:
            if name in vmcb:
                numbers[name] = (vmcb[name], vmcb.source(name))
    for name, value in given.items():
        if value is not None:
            numbers[name] = (value, "given value")
            # A given event word does not go with the VMCB's error code.
            numbers.pop(f"{name}_err", None)
    return numbers


def _unknown_row(code: int) -> ExitCode:
    return ExitCode("exit", code, f"{code:#x}", "", "", "exit code in no table", "unknown", "", "", "",
                    nrip=False, insn=False, decode=False, length=None,
                    handler="", see="APM vol. 2, appendix SVM Intercept Exit Codes", aliases=(), notes="")


def _event(inputs: ExitInputs, name: str) -> Optional[SvmEvent]:
    value = inputs.get(name)
    return None if value is None else events.decode(name, value, inputs.get(f"{name}_err"))


def _event_facts(inputs: ExitInputs, event: SvmEvent, label: str) -> Iterator[Fact]:
    yield Fact(label, event.value, event.meaning, inputs.source(event.field), "; ".join(event.problems), label)


def _raw_facts(inputs: ExitInputs) -> Iterator[Fact]:
    for name, label in (("exit_info_1", "EXITINFO1"), ("exit_info_2", "EXITINFO2")):
        if inputs.get(name) is not None:
            yield Fact(label, inputs.get(name), "no format is known for this exit", inputs.source(name), group=label)


def _guest_facts(inputs: ExitInputs) -> Iterator[Fact]:
    """Of the guest, what a reader of the exit wants: RIP, next RIP, instruction bytes, the registers that are the instruction's operands."""
    rip, next_rip = inputs.get("rip"), inputs.get("next_rip")
    if rip is not None:
        yield Fact("RIP", rip, "", inputs.source("rip"), group="guest")
    if next_rip is not None and inputs.row.nrip:
        yield Fact("next_rip", next_rip, *_next_rip_words(rip, next_rip), group="guest")
    length, data = inputs.get("insn_len"), inputs.get("insn_bytes")
    if inputs.row.insn and length and data is not None:
        warning = f"{length} bytes: the field holds 15" if length > 15 else ""
        fetched = data.to_bytes(15, "little")[:min(length, 15)]
        yield Fact("instruction bytes", length, fetched.hex(" "), inputs.source("insn_bytes"), warning, "guest")
    for name in _OPERANDS.get(inputs.row.name, ()):
        number = inputs.register(name)
        if number is not None:
            yield Fact(name.upper(), number, "", "VMCB" if name == "rax" and inputs.get("rax") is not None else "given value", group="guest")


def _next_rip_words(rip: Optional[int], next_rip: int) -> Tuple[str, str, str]:
    """(meaning, source, warning) of next_rip."""
    if next_rip == 0:
        return "not saved: the processor has no NRIP save, or it was not turned on", "", ""
    if rip is None:
        return "RIP of the next instruction", "", ""
    length = (next_rip - rip) & (2**64 - 1)
    warning = "" if 1 <= length <= 15 else "not behind the instruction at RIP: RIP was changed since, or next_rip is of an older exit"
    return (f"{length} bytes after RIP" if not warning else "RIP of a next instruction"), "", warning


_OPERANDS = {
    "CPUID": ("rax", "rcx"), "MSR": ("rcx", "rax", "rdx"), "XSETBV": ("rcx", "rax", "rdx"), "VMMCALL": ("rax", "rbx", "rcx", "rdx"),
    "RDPMC": ("rcx",), "RDPRU": ("rcx",), "VMRUN": ("rax",), "VMLOAD": ("rax",), "VMSAVE": ("rax",), "INVLPGA": ("rax", "rcx"),
    "MONITOR": ("rax", "rcx", "rdx"), "MWAIT": ("rax", "rcx"), "MWAIT_COND": ("rax", "rcx"), "SKINIT": ("rax",), "INVLPGB": ("rax", "rcx", "rdx"),
    "IOIO": ("rax",),
}
"""Registers that are operands of the instruction (APM vol. 3, the instruction's page)."""


def _notes(inputs: ExitInputs) -> List[str]:
    notes = []
    if inputs.row.category == "unknown":
        notes.append("no table has this exit code: a newer processor, or not an EXITCODE")
    if inputs.row.kind == "vmgexit":
        notes.append("this is a SW_EXITCODE of a GHCB; the VMCB's EXITCODE is then VMGEXIT (0x403)")
    if inputs.row.name == "NPF":
        notes.append("the walk of the nested tables is always a user access, whatever the guest's CPL: the user bit says nothing of the guest")
    if (inputs.get("nested_ctl") or 0) & 4:
        notes.append("SEV-ES guest: its registers are in the encrypted VMSA, those of the VMCB are not the guest's")
    return notes


def _typed(inputs: ExitInputs, table: str) -> Optional[int]:
    for name, found in (("exit_info_1", inputs.row.info1), ("exit_info_2", inputs.row.info2)):
        if found == table:
            return inputs.get(name)
    return None


def _msr_index(inputs: ExitInputs) -> Optional[int]:
    index = inputs.register("rcx") if inputs.row.name == "MSR" else None
    return None if index is None else index & 0xFFFF_FFFF


