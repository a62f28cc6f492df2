"""Events in VMX words: VM-exit interruption information, IDT-vectoring information, and what to write to inject an event at VM entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from vtdbg import bits
from vtdbg.explain import Fact
from vtdbg.x86 import vectors

VALID = 1 << 31
ERROR_CODE = 1 << 11
NMI_UNBLOCKED = 1 << 12
EXTERNAL, NMI, HARDWARE, SOFTWARE_INTERRUPT, PRIVILEGED_SOFTWARE, SOFTWARE, OTHER = 0, 2, 3, 4, 5, 6, 7
WITH_LENGTH = (SOFTWARE_INTERRUPT, PRIVILEGED_SOFTWARE, SOFTWARE)
"""Types whose delivery pushes the RIP behind the instruction: they need an instruction length (SDM vol. 3, VM-Entry Controls for Event Injection)."""

SEE_INJECTION = "SDM vol. 3, Event Injection; VM-Entry Controls for Event Injection"
FIELDS = {"exit_int_info": "VM_EXIT_INTR_INFO", "idt_vectoring_info": "IDT_VECTORING_INFO_FIELD", "entry_int_info": "VM_ENTRY_INTR_INFO_FIELD"}


@dataclass(frozen=True)
class Event:
    """One of the three interruption words.  `table` names its layout; `problems` says what cannot be in a valid word."""

    table: str
    value: int
    valid: bool
    vector: int
    type: int
    error_code_valid: bool
    nmi_unblocked: bool
    problems: Tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """"#PF (page fault), hardware exception" whether or not the valid bit is set."""
        return f"{vectors.title(self.vector)}, {bits.table(self.table)['TYPE'].meaning(self.value)}"

    @property
    def name(self) -> str:
        return vectors.name(self.vector)

    @property
    def is_exception(self) -> bool:
        return self.type in (HARDWARE, PRIVILEGED_SOFTWARE, SOFTWARE)


def decode(table: str, value: int) -> Event:
    """`value` in layout `table`: "exit_int_info", "idt_vectoring_info" or "entry_int_info"."""
    vector, kind = value & 0xFF, value >> 8 & 7
    valid = bool(value & VALID)
    unblocked = table == "exit_int_info" and bool(value & NMI_UNBLOCKED)
    problems = tuple(_problems(table, value, vector, kind)) if valid else ()
    return Event(table, value, valid, vector, kind, bool(value & ERROR_CODE), unblocked, problems)


def _problems(table: str, value: int, vector: int, kind: int) -> List[str]:
    found = [f"reserved bits {row.field.bits} are {row.number:#x}" for row in bits.table(table).reserved_violations(value)]
    if kind == 1:
        found.append("type 1 is reserved")
    if kind == NMI and vector != 2:
        found.append(f"an NMI has vector 2, not {vector}")
    if kind == HARDWARE and vector > 31:
        found.append(f"a hardware exception has a vector below 32, not {vector:#x}")
    if kind == SOFTWARE and vector not in (3, 4):
        found.append("a software exception is #BP (3) or #OF (4)")
    if kind == PRIVILEGED_SOFTWARE and vector != 1:
        found.append("a privileged software exception is #DB (1), by INT1")
    if kind == SOFTWARE_INTERRUPT and table == "exit_int_info":
        found.append("INT n never exits by itself: a software interrupt only occurs in the IDT-vectoring information")
    if kind == OTHER and vector > 2:
        found.append("other events are the pending MTF VM exit (0), and with FRED SYSCALL (1) and SYSENTER (2)")
    if value & ERROR_CODE:
        row = vectors.vector(vector)
        if kind != HARDWARE:
            found.append("only a hardware exception has an error code")
        elif row is None or not row.has_error_code:
            found.append(f"{vectors.name(vector)} has no error code")
    return found


def facts(event: Event, error_code: Optional[int], source: str = "") -> List[Fact]:
    """Valid bit first: without it the rest of the word is what an older event left there."""
    group = FIELDS[event.table]
    label = {"exit_int_info": "interruption", "idt_vectoring_info": "event being delivered", "entry_int_info": "event to inject"}[event.table]
    if not event.valid:
        left = f"none: bit 31 is 0; the rest ({event.title}) is left from an earlier event" if event.value else "none: bit 31 is 0"
        return [Fact(label, event.value, left, source, group=group)]
    found = [Fact(label, event.value, event.title, source, group=group),
             Fact("vector", event.vector, vectors.title(event.vector), source, group=group),
             Fact("type", event.type, bits.table(event.table)["TYPE"].meaning(event.value), source, group=group)]
    if event.error_code_valid:
        if error_code is None:
            found.append(Fact("error code", None, "valid, not given", source, group=group))
        else:
            words = vectors.describe_error_code(event.vector, error_code)
            found.append(Fact("error code", error_code, words, source, group=group))
    if event.nmi_unblocked:
        found.append(Fact("NMI unblocking due to IRET", 1, "", source, group=group))
    found += [Fact(label, event.value, event.title, source, f"impossible: {problem}", group) for problem in event.problems]
    return found


@dataclass(frozen=True)
class Injection:
    """What to VMWRITE so that the next VM entry delivers an event: `fields` in the order of writing; `missing` what is still needed."""

    event: Event
    fields: Tuple[Tuple[str, int], ...]
    missing: Tuple[str, ...] = ()

    @property
    def text(self) -> str:
        writes = ", ".join(f"{name} = {value:#x}" for name, value in self.fields)
        return writes + "".join(f"; needs {what}" for what in self.missing)


def injection(event: Event, error_code: Optional[int], instruction_length: Optional[int]) -> Injection:
    """The VM-entry words that deliver `event` again.

    Bit 12 is NMI unblocking on an exit and undefined in the IDT-vectoring information, but reserved at entry: it is left out.
    """
    kept = event.value & (VALID | ERROR_CODE | 0x7FF)
    if "NESTED" in bits.table("entry_int_info").idents():
        kept |= event.value & bits.table("entry_int_info")["NESTED"].mask
    fields: Dict[str, int] = {"VM_ENTRY_INTR_INFO_FIELD": kept}
    missing: List[str] = []
    if event.error_code_valid:
        if error_code is None:
            missing.append("the error code for VM_ENTRY_EXCEPTION_ERROR_CODE")
        else:
            fields["VM_ENTRY_EXCEPTION_ERROR_CODE"] = error_code
    if event.type in WITH_LENGTH:
        if instruction_length is None:
            missing.append("VM_EXIT_INSTRUCTION_LEN for VM_ENTRY_INSTRUCTION_LEN")
        else:
            fields["VM_ENTRY_INSTRUCTION_LEN"] = instruction_length
    return Injection(event, tuple(fields.items()), tuple(missing))
