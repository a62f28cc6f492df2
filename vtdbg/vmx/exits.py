"""A VM exit in words: every number of it decoded, what the handler has to do, which control caused it.

Numbers alone are enough (`explain_vm_exit(48, 0x781)`); a Vmcs supplies what is not given; memory adds the instruction and the operand.
"""

from __future__ import annotations

from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Union

from vtdbg import bits
from vtdbg.errors import UsageError
from vtdbg.explain import Advice, Explanation, Fact, bit_facts, named, unique
from vtdbg.memory.base import PhysicalMemory
from vtdbg.vmx import advice, causes, events, guest_code, inputs, instruction_info, nested_walk, operands, qualification
from vtdbg.vmx.events import Event
from vtdbg.vmx.exit_reasons import ENTRY_FAILURE, ExitReason, NumberedError, aborts, find, instruction_errors, reason_word, reasons
from vtdbg.vmx.guest import Guest
from vtdbg.vmx.guest_code import Code
from vtdbg.vmx.instruction_info import InstructionInfo
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.operand import MemoryOperand, Operand, RegisterOperand, memory_operand

__all__ = ["ExitReason", "NumberedError", "aborts", "explain_abort", "explain_instruction_error", "explain_vm_exit", "explain_vmcs", "find",
           "instruction_errors", "reasons"]

LAST_REASON = 85
ENTRY_FAILURES = (33, 34, 41)
SMM_EXITS = (5, 6, 18)
"""Reasons of SMM VM exits, the only ones from VMX root operation (SDM vol. 3, SMM VM Exits)."""

SEE_REASON = "SDM vol. 3, Basic VM-Exit Information"
SEE_FAILURE = "SDM vol. 3, VM-Entry Failures During or After Loading Guest State"


def explain_vm_exit(reason: Union[int, str, None] = None, qualification: Optional[int] = None, instruction_info: Optional[int] = None,
                    interruption_info: Optional[int] = None, registers: Optional[Mapping[str, Optional[int]]] = None,
                    vmcs: Optional[Vmcs] = None, *, error_code: Optional[int] = None, idt_vectoring_info: Optional[int] = None,
                    idt_vectoring_error_code: Optional[int] = None, instruction_length: Optional[int] = None,
                    guest_linear_address: Optional[int] = None, guest_physical_address: Optional[int] = None, msr_data: Optional[int] = None,
                    memory: Optional[PhysicalMemory] = None, eptp: Optional[int] = None) -> Explanation:
    """One VM exit explained.

    `reason` is the exit-reason word (with its flags, or the basic reason alone) or a name; None takes it from `vmcs`.  Every other number
    that is None comes from `vmcs`, or is unknown.  `registers` are the guest's by name ("rax", "efer", "fs_base"); `memory` is host-physical
    memory, read through `eptp` or the VMCS's EPTP and the guest's paging.  Raises UsageError without any reason, UnknownName for a name
    that nobody knows, FormatError for a number that does not fit into its VMCS field.
    """
    word = reason_word(reason) if isinstance(reason, str) else reason
    given = {"VM_EXIT_REASON": word, "EXIT_QUALIFICATION": qualification, "VMX_INSTRUCTION_INFO": instruction_info,
             "VM_EXIT_INTR_INFO": interruption_info, "VM_EXIT_INTR_ERROR_CODE": error_code, "IDT_VECTORING_INFO_FIELD": idt_vectoring_info,
             "IDT_VECTORING_ERROR_CODE": idt_vectoring_error_code, "VM_EXIT_INSTRUCTION_LEN": instruction_length,
             "GUEST_LINEAR_ADDRESS": guest_linear_address, "GUEST_PHYSICAL_ADDRESS": guest_physical_address, "MSR_DATA": msr_data,
             "EPT_POINTER": eptp}
    known = (vmcs if vmcs is not None else Vmcs.from_values({})).replaced({name: value for name, value in given.items() if value is not None})
    if known.get("VM_EXIT_REASON") is None:
        raise UsageError("no exit reason: give one, or a VMCS that has VM_EXIT_REASON")
    return _Explainer(Guest(known, registers, memory, eptp)).explain()


def explain_vmcs(vmcs: Vmcs, memory: Optional[PhysicalMemory] = None, registers: Optional[Mapping[str, Optional[int]]] = None) -> Explanation:
    """The last VM exit of a VMCS.  Raises UsageError where the VMCS does not have VM_EXIT_REASON."""
    return explain_vm_exit(registers=registers, vmcs=vmcs, memory=memory)


class _Explainer:
    """One exit: the numbers, each decoded once."""

    def __init__(self, guest: Guest) -> None:
        self.vmcs, self.guest = guest.vmcs, guest
        vmcs = guest.vmcs
        self.word = vmcs["VM_EXIT_REASON"]
        self.number = self.word & 0xFFFF
        self.row = reasons().get(self.number)
        self.failed = bool(self.word & ENTRY_FAILURE) or self.number in ENTRY_FAILURES
        self.qualification = vmcs.get("EXIT_QUALIFICATION")
        self.event = self._event("VM_EXIT_INTR_INFO", "exit_int_info")
        self.during = self._event("IDT_VECTORING_INFO_FIELD", "idt_vectoring_info")
        self.notes: List[str] = []
        self.stale: List[Fact] = []
        self.operand: Optional[Operand] = None
        self.code: Optional[Code] = None
        self.summary = ""

    def _event(self, field: str, table: str) -> Optional[Event]:
        value = self.vmcs.get(field)
        return None if value is None or self.failed else events.decode(table, value)

    def source(self, field: str) -> str:
        return self.vmcs.source(field) if field in self.vmcs else ""

    def explain(self) -> Explanation:
        facts = list(self._reason_facts())
        if self.row is None or self.row.reserved:
            facts += self._raw_facts()
        else:
            facts += self._qualification_facts(self.row)
            facts += self._address_facts(self.row)
            facts += self._instruction_facts(self.row)
            facts += self._input_facts(self.row)
            facts += self._event_facts()
            facts += self._entry_event_facts()
            facts += self._code_facts(self.row)
        row = self.row
        if row is None:
            return Explanation("vmx", self.number, f"REASON{self.number}", "in no table", tuple(facts), notes=tuple(self.notes), known=False,
                               see="SDM vol. 3, appendix VMX Basic Exit Reasons")
        return Explanation("vmx", self.number, row.name, row.title, tuple(facts), unique(self._advice(row)), tuple(dict.fromkeys(self.notes)),
                           tuple(self.stale), not row.reserved, row.see, self.summary, self.operand, self.code.instruction if self.code else None)

    def _reason_facts(self) -> Iterator[Fact]:
        group, source = "VM_EXIT_REASON", self.source("VM_EXIT_REASON")
        row = self.row
        if row is None:
            yield Fact("basic exit reason", self.number, f"{self.number}: in no table (0 to {LAST_REASON} are known)", source,
                       "this number is no exit reason that any of our sources knows", group)
        elif row.reserved:
            also = f"; other sources call it {', '.join(row.aliases)}" if row.aliases else ""
            yield Fact("basic exit reason", self.number, f"{self.number}: reserved{also}", source, "no processor gives this reason", group)
        else:
            yield Fact("basic exit reason", self.number, named(row.name, row.title), source, group=group)
        for fact in bit_facts(bits.table("exit_reason"), self.word, group, source):
            if fact.label != bits.table("exit_reason")["BASIC"].name:
                yield fact
        if self.word >> 27 & 1:
            self.notes.append("from enclave mode: GUEST_RIP is the asynchronous exit pointer and the registers are synthetic, the enclave's own "
                              "are not visible; nothing can be emulated")
        for problem in self._reason_problems():
            yield Fact("exit reason", self.word, "", source, problem, group)

    def _reason_problems(self) -> Iterator[str]:
        marked = bool(self.word & ENTRY_FAILURE)
        if marked and self.number not in ENTRY_FAILURES:
            yield f"impossible: bit 31 (VM-entry failure) with reason {self.number}; only 33, 34 and 41 are entry failures"
        if not marked and self.number in ENTRY_FAILURES and self.word >> 16:
            yield f"impossible: reason {self.number} is an entry failure and bit 31 is 0"
        elif not marked and self.number in ENTRY_FAILURES:
            self.notes.append(f"the whole field would be {self.number | ENTRY_FAILURE:#x}: bit 31 is set for an entry failure")
        if self.word >> 29 & 1 and self.number not in SMM_EXITS:
            yield "impossible: only an SMM VM exit comes from VMX root operation (bit 29)"
        if self.word >> 28 & 1 and not self.word >> 29 & 1:
            yield "impossible: a pending MTF VM exit (bit 28) is only recorded by an SMM VM exit from VMX root operation (bit 29)"

    def _raw_facts(self) -> Iterator[Fact]:
        """What is known of an exit that nobody knows, as it is."""
        for name in ("EXIT_QUALIFICATION", "VMX_INSTRUCTION_INFO", "VM_EXIT_INTR_INFO", "IDT_VECTORING_INFO_FIELD", "VM_EXIT_INSTRUCTION_LEN"):
            field = self.vmcs.get(name)
            if field:
                yield Fact(name, field, "no format: the reason is reserved or unknown", self.source(name), group=name)

    def _exception_vector(self) -> Optional[int]:
        return self.event.vector if self.number == 0 and self.event is not None and self.event.valid else None

    def _qualification_facts(self, row: ExitReason) -> Iterable[Fact]:
        if self.qualification is None:
            return [Fact("exit qualification", None, "not given", group=qualification.GROUP)] if row.qualification not in ("", "undefined") else []
        linear = self.vmcs.get("GUEST_LINEAR_ADDRESS") if self._has_linear(row) else None
        physical = self.vmcs.get("GUEST_PHYSICAL_ADDRESS") if row.gpa else None
        found = qualification.describe(row.qualification, self.qualification, qualification.Context(
            self.guest, self.source("EXIT_QUALIFICATION"), self._exception_vector(), linear, physical))
        self.notes += found.notes
        self.summary = found.summary
        return found.facts

    def _has_linear(self, row: ExitReason) -> Optional[bool]:
        """Did this exit write GUEST_LINEAR_ADDRESS?  None: it depends on a qualification that is not given."""
        if self.failed or not row.gla:
            return False
        if row.gla == "yes":
            return True
        if self.qualification is None:
            return None
        if row.gla == "ept":
            return bool(self.qualification >> 7 & 1)
        if row.gla == "lmsw":
            return self.qualification & 0x70 == 0x70
        # INS and OUTS; for an SMI the same, in the SMM-transfer monitor's format.
        return bool(self.qualification >> 4 & 1)

    def _address_facts(self, row: ExitReason) -> Iterator[Fact]:
        for name, title, written in (("GUEST_LINEAR_ADDRESS", "guest-linear address", self._has_linear(row)),
                                     ("GUEST_PHYSICAL_ADDRESS", "guest-physical address", bool(row.gpa) and not self.failed)):
            value = self.vmcs.get(name)
            if value is None:
                if written:
                    yield Fact(title, None, "not given", group=name)
            elif written is None:
                yield Fact(title, value, "only if bit 7 or 4 of the exit qualification says so (not given)", self.source(name), group=name)
            elif written:
                yield Fact(title, value, source=self.source(name), group=name)
            elif value:
                self._old(name, title, value, "this exit does not write it")
        value = self.vmcs.get("MSR_DATA")
        if value is not None and self.number in (79, 85):
            yield Fact("MSR data", value, "", self.source("MSR_DATA"), group="MSR_DATA")
        elif value:
            self._old("MSR_DATA", "MSR data", value, "this exit does not write it")

        if self.number in (48, 49) and not self.failed:
            yield from nested_walk.facts(self.guest, self.number, self.vmcs.get("GUEST_PHYSICAL_ADDRESS"), self.qualification)

    def _old(self, name: str, title: str, value: int, why: str) -> None:
        self.stale.append(Fact(title, value, f"of an older exit: {why}", self.source(name), group=name))

    def _has_instruction_info(self, row: ExitReason) -> bool:
        if not row.instruction_info or self.failed:
            return False
        # For I/O only the string instructions have any (SDM vol. 3, Information for VM Exits Due to Instruction Execution).
        return row.number != 30 or self.qualification is None or bool(self.qualification >> 4 & 1)

    def _instruction_facts(self, row: ExitReason) -> Iterator[Fact]:
        name = "VMX_INSTRUCTION_INFO"
        value = self.vmcs.get(name)
        if not self._has_instruction_info(row):
            if value:
                self._old(name, "instruction information", value, "this exit has none")
        elif value is None:
            yield Fact("instruction information", None, "not given", group=name)
        else:
            info = instruction_info.decode(row.instruction_info, value, row.number)
            yield from instruction_info.facts(info, self.guest, self.source(name))
            self.operand = self._string_operand(info) if row.number == 30 else instruction_info.operand(info, self.qualification, self.guest)
            yield from self._operand_facts(info)
            yield from operands.type_facts(info, self.guest)
            yield from operands.contents(info, self.operand, self.guest)
        yield from self._length_facts(row)

    def _input_facts(self, row: ExitReason) -> Iterator[Fact]:
        yield from inputs.facts(row.inputs, self.guest)
        self.summary = self.summary or inputs.summary(row.title.split(" ")[0], row.inputs, self.guest)

    def _string_operand(self, info: InstructionInfo) -> Optional[Operand]:
        """INS writes ES:RDI, OUTS reads segment:RSI; ES cannot be overridden (SDM vol. 2, INS and OUTS)."""
        if info.address_size is None or self.qualification is None:
            return None
        reading = self.qualification >> 3 & 1
        segment = "ES" if reading else info.segment
        if segment is None:
            return None
        return memory_operand(segment, "RDI" if reading else "RSI", None, 1, 0, info.address_size, register=self.guest.register,
                              segment_base=self.guest.segment_base, mode=self.guest.mode(), size=(self.qualification & 7) + 1)

    def _operand_facts(self, info: InstructionInfo) -> Iterator[Fact]:
        found, group = self.operand, "operand"
        if isinstance(found, RegisterOperand):
            yield Fact("operand", found.value, found.text, group=group)
        elif isinstance(found, MemoryOperand):
            yield Fact("operand", None, found.text + (f", {found.size} bytes" if found.size else ""), group=group, numeric=False)
            if found.effective is not None:
                yield Fact("effective address", found.effective, group=group)
            if found.linear is not None:
                yield Fact("linear address", found.linear, group=group)
            else:
                yield Fact("linear address", None, found.missing, group=group)
            written = self.vmcs.get("GUEST_LINEAR_ADDRESS")
            if self.number == 30 and written is not None and found.linear is not None and written != found.linear:
                self.notes.append(f"GUEST_LINEAR_ADDRESS is {written:#x}: the registers given are not those of the exit, or the segment is unusable")

    def _code_facts(self, row: ExitReason) -> Iterator[Fact]:
        if self.guest.memory is None or row.rip == "dead":
            return
        self.code = guest_code.at_rip(self.guest, self._length(), frozenset(row.mnemonics))
        self.notes += self.code.notes
        label = "next instruction" if row.rip in ("trap", "event") else "first instruction" if self.failed else "instruction"
        found = self.code.instruction
        if found is None:
            yield Fact(label, None, f"not read: {self.code.problem}", group="code")
        else:
            yield Fact(label, found.address, f"{found.data.hex(' ')}  {found.text} ({self.guest.mode_text()})", group="code")

    def _length_facts(self, row: ExitReason) -> Iterator[Fact]:
        name = "VM_EXIT_INSTRUCTION_LEN"
        value = self.vmcs.get(name)
        if value is None:
            return
        if self._has_length(row):
            warning = "" if 1 <= value <= 15 else "an instruction has 1 to 15 bytes"
            yield Fact("instruction length", value, "", self.source(name), warning, name)
        elif value:
            self._old(name, "instruction length", value, "undefined for this exit")

    def _has_length(self, row: ExitReason) -> bool:
        if self.failed:
            return False
        software = self.during is not None and self.during.valid and self.during.type in events.WITH_LENGTH
        if row.number == 0 and self.event is not None and self.event.valid and self.event.type in events.WITH_LENGTH:
            return True
        if row.length == "task":
            return software or self.qualification is None or self.qualification >> 30 & 3 != 3
        return row.length == "yes" or (row.length == "event" and software)

    def _length(self) -> Optional[int]:
        return self.vmcs.get("VM_EXIT_INSTRUCTION_LEN") if self.row is not None and self._has_length(self.row) else None

    def _event_facts(self) -> Iterator[Fact]:
        if self.failed:
            for name, title in (("VM_EXIT_INTR_INFO", "interruption information"), ("IDT_VECTORING_INFO_FIELD", "IDT-vectoring information")):
                value = self.vmcs.get(name)
                if value:
                    self._old(name, title, value, "a failed entry writes only the exit reason and the qualification")
            return
        error = self.vmcs.get("VM_EXIT_INTR_ERROR_CODE")
        if self.event is not None:
            yield from events.facts(self.event, error, self.source("VM_EXIT_INTR_INFO"))
            for problem in self._event_problems(self.event):
                yield Fact("interruption", self.event.value, "", self.source("VM_EXIT_INTR_INFO"), problem, "VM_EXIT_INTR_INFO")
        elif self.number == 0:
            yield Fact("interruption", None, "not given: which exception it is stays unknown", group="VM_EXIT_INTR_INFO")
        if error and not (self.event is not None and self.event.valid and self.event.error_code_valid):
            self._old("VM_EXIT_INTR_ERROR_CODE", "interruption error code", error, "no valid error code")
        if self.during is not None:
            error = self.vmcs.get("IDT_VECTORING_ERROR_CODE")
            yield from events.facts(self.during, error, self.source("IDT_VECTORING_INFO_FIELD"))
            if self.during.valid and not self._can_be_during_delivery():
                yield Fact("event being delivered", self.during.value, self.during.title, self.source("IDT_VECTORING_INFO_FIELD"),
                           "impossible: this exit does not occur during event delivery", "IDT_VECTORING_INFO_FIELD")

    def _can_be_during_delivery(self) -> bool:
        """SDM vol. 3, Information for VM Exits That Occur During Event Delivery: not a #DF that exits by itself, not a triple fault."""
        if self.number == 0 and self._exception_vector() == 8:
            return False
        return self.row is not None and (self.row.rip in ("exception", "task", "access") or self.number == 75)

    def _event_problems(self, event: Event) -> Iterator[str]:
        if event.valid and self.number not in (0, 1):
            yield f"impossible: only reasons 0 and 1 have a valid VM_EXIT_INTR_INFO, this is {self.number}"
        if not event.valid and self.number == 0:
            yield ("impossible: an exception or NMI exit has bit 31 set; a VMCS that has not had a VM exit yet has zeros here"
                   if not self.word and not event.value else "impossible: an exception or NMI exit has bit 31 set")
        if event.valid and self.number == 1 and event.type != events.EXTERNAL:
            yield "impossible: reason 1 is an external interrupt"
        if event.valid and self.number == 0 and event.type == events.EXTERNAL:
            yield "impossible: an external interrupt has reason 1"

    def _entry_event_facts(self) -> Iterator[Fact]:
        """The event that the VMM asked the last entry to inject: a VM exit clears its valid bit, a failed entry does not."""
        name = "VM_ENTRY_INTR_INFO_FIELD"
        value = self.vmcs.get(name)
        if value is None:
            return
        event = events.decode("entry_int_info", value)
        if event.valid:
            yield from events.facts(event, self.vmcs.get("VM_ENTRY_EXCEPTION_ERROR_CODE"), self.source(name))
            if not self.failed:
                self.notes.append(f"{name} is valid: written after this exit, the next entry injects it (a VM exit clears the valid bit)")
        elif value:
            self.stale.append(events.facts(event, None, self.source(name))[0])

    def _advice(self, row: ExitReason) -> Iterator[Advice]:
        length = self._length()
        error = self.vmcs.get("VM_EXIT_INTR_ERROR_CODE") if self.event is not None and self.event.valid and self.event.error_code_valid else None
        again = self.during if self._can_be_during_delivery() else None
        if self.failed:
            yield from self._failure_advice()
        if self.code is not None and self.code.passed:
            yield Advice("rip", "the VMM has advanced GUEST_RIP already: do not add the length again", advice.SEE_RIP)
        else:
            decoded = self.code.instruction.length if self.code is not None and self.code.instruction is not None else None
            yield from advice.rip("failure" if self.failed else row.rip, self.guest, length, decoded, self.event, again, self.qualification)
        yield from advice.event(self.number, self.guest, self.event, error, again, self.vmcs.get("IDT_VECTORING_ERROR_CODE"),
                                self.vmcs.get("VM_EXIT_INSTRUCTION_LEN"), self.qualification)
        yield from advice.shadow(row.rip, self.guest, self._nmi_unblocked(row), self.during)
        yield from causes.advice(row.cause, causes.Exit(self.guest, self.number, self.qualification, self.event, error))
        if row.emulate:
            yield Advice("emulate", row.emulate, row.see)

    def _nmi_unblocked(self, row: ExitReason) -> bool:
        """Did an IRET unblock NMI and then fail?  Bit 12 is undefined for #DF (SDM vol. 3, Information About NMI Unblocking Due to IRET)."""
        if self.number == 0:
            return self.event is not None and self.event.valid and self.event.nmi_unblocked and self.event.vector != 8
        return qualification.nmi_unblocked(row.qualification, self.qualification)

    def _failure_advice(self) -> Iterator[Advice]:
        areas: Dict[int, str] = {
            33: "a check on the guest state failed: run `vmcs check`, area guest, which reports every failed check and not only the first",
            34: "an MSR of the VM-entry MSR-load area cannot be loaded: FS/GS base, an x2APIC MSR, SMM-only, reserved bits, or WRMSR faults",
            41: "a machine check came during the entry: look at the host's MC banks"}
        if self.number in areas:
            yield Advice("fix", areas[self.number], SEE_FAILURE)
        yield Advice("fix", "the guest has not run: the host was loaded as by a VM exit, the guest-state area and the other exit-information fields "
                     "were not written; the valid bit of VM_ENTRY_INTR_INFO_FIELD stays as it was", SEE_FAILURE)


def explain_instruction_error(number: int) -> Explanation:
    """A VM-instruction error (VMCS field 0x4400, after VMfailValid) in words; an unknown or reserved number says so."""
    return _explain_numbered(number, instruction_errors(), "VM-instruction error", "SDM vol. 3, VM Instruction Error Numbers")


def explain_abort(number: int) -> Explanation:
    """A VMX-abort indicator (the second dword of the VMCS region) in words; 0 is no abort."""
    if number == 0:
        return Explanation("vmx", 0, "NONE", "no VMX abort", (Fact("VMX-abort indicator", 0, "0: no abort"),), see="SDM vol. 3, VMX Aborts")
    found = _explain_numbered(number, aborts(), "VMX-abort indicator", "SDM vol. 3, VMX Aborts")
    note = "after a VMX abort the logical processor is in a shutdown state: it stays there until reset"
    return Explanation(found.kind, found.code, found.name, found.title, found.facts, found.advice, (note,), known=found.known, see=found.see)


def _explain_numbered(number: int, table: Mapping[int, NumberedError], label: str, see: str) -> Explanation:
    row = table.get(number)
    if row is None or row.title == "reserved":
        title = "reserved" if row else "in no table"
        return Explanation("vmx", number, row.name if row else f"ERROR{number}", title,
                           (Fact(label, number, f"{number}: {title}", warning="no processor gives this number"),), known=False, see=see)
    where = f" (by {' or '.join(row.instructions.split())})" if row.instructions else ""
    return Explanation("vmx", number, row.name, row.title, (Fact(label, number, f"{row.name}: {row.title}{where}"),),
                       (Advice("fix", row.fix, see),), see=see)
