"""VM exits in words: the tables against the kernel's trace, real VMCS pages, and any numbers at all."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vtdbg
from vtdbg import bits
from vtdbg.errors import FormatError, UnknownName, UsageError
from vtdbg.explain import ADVICE_KINDS, Explanation
from vtdbg.vmx import events, exits, fields
from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.exits import explain_abort, explain_instruction_error, explain_vm_exit, explain_vmcs
from vtdbg.vmx.vmcs import Vmcs

VM_A, VM_B = 0x6826000, 0x6BD9000


def everything(explanation: Explanation) -> Iterator[str]:
    yield explanation.name
    yield explanation.title
    yield explanation.summary
    for fact in explanation.facts + explanation.stale:
        yield f"{fact.label} {fact.meaning} {fact.warning} {fact.source}"
    for item in explanation.advice:
        yield f"{item.text} {item.see}"
    yield from explanation.notes


def texts(explanation: Explanation, kind: str) -> List[str]:
    return [item.text for item in explanation.advised(kind)]


# -- the tables --------------------------------------------------------------------------------------------------------------------


def test_every_reason_has_a_row() -> None:
    """Reasons 0 to 85, each once; 35, 38, 42, 71, 82 and 83 are reserved (SDM vol. 3, appendix VMX Basic Exit Reasons)."""
    assert sorted(exits.reasons()) == list(range(86))
    assert [number for number, row in exits.reasons().items() if row.reserved] == [35, 38, 42, 71, 82, 83]
    assert len({row.name for row in exits.reasons().values()}) == 86


def test_rows_name_what_exists() -> None:
    """Every bit table, control and mnemonic column of the rows is one that exists; formats agree with the VMCS fields' own gates."""
    for row in exits.reasons().values():
        for name in (row.qualification, row.instruction_info):
            if name.startswith(("qual_", "ii_")):
                assert bits.table(name).title
        if row.cause.startswith("@"):
            assert row.cause[1:] in exits.causes.RULES
        elif row.cause not in ("", "always", "entry"):
            for term in re.split(r"[|&]", row.cause):
                word, ident = term.split(".")
                assert word in WORDS and bits.table(word)[ident].ident == ident
        if not row.reserved:
            assert row.rip in ("instruction", "trap", "event", "access", "exception", "task", "failure", "dead")
            assert row.see.startswith("SDM vol. 3, ")

    def gate(name: str) -> List[int]:
        return [int(number) for number in fields.find(name).gate.partition("reason.")[2].split(",")]

    assert gate("VMX_INSTRUCTION_INFO") == [number for number, row in exits.reasons().items() if row.instruction_info]
    assert gate("GUEST_PHYSICAL_ADDRESS") == [number for number, row in exits.reasons().items() if row.gpa]


def test_instruction_lengths_where_the_manual_lists_them() -> None:
    """VM_EXIT_INSTRUCTION_LEN is defined for every fault-like instruction exit (SDM vol. 3, Information for VM Exits Due to Instruction
    Execution) and for no exit between instructions."""
    for row in exits.reasons().values():
        if row.rip == "instruction":
            assert row.length == "yes", row.name
        if row.rip in ("event", "trap", "failure", "dead", "reserved"):
            assert row.length == "", row.name


@pytest.mark.parametrize(("name", "number"), [("EPT_VIOLATION", 48), ("48", 48), ("0x30", 48), ("vmcall_instruction", 18), ("RDMSR", 31),
                                              ("MTF", 37), ("XCPT_OR_NMI", 0), ("EPT violation", 48), ("0x80000021", 33)])
def test_reasons_by_any_name(name: str, number: int) -> None:
    assert exits.find(name).number == number


def test_unknown_reason_suggests() -> None:
    with pytest.raises(UnknownName, match="EPT_VIOLATION"):
        exits.find("EPT_VIOLATON")


# -- the kernel's trace ------------------------------------------------------------------------------------------------------------


def trace_rows(truth: Dict[str, Any]) -> List[Dict[str, str]]:
    return truth["kvm_exit_trace"]


def explain_row(row: Dict[str, str]) -> Explanation:
    """KVM's tracepoint: info1 is the qualification, info2 the IDT-vectoring information, intr_info the interruption information."""
    return explain_vm_exit(row["reason"], int(row["info1"], 16), interruption_info=int(row["intr_info"], 16),
                           idt_vectoring_info=int(row["info2"], 16), error_code=int(row["error_code"], 16))


def test_every_trace_row_decodes(intel_plain_truth: Dict[str, Any]) -> None:
    """The 90 kvm_exit rows of a real KVM: the kernel's name is the row's name, nothing is unknown, nothing impossible."""
    rows = trace_rows(intel_plain_truth)
    assert len(rows) == 90
    for row in rows:
        explanation = explain_row(row)
        assert explanation.name == row["reason"] == exits.reasons()[explanation.code].linux
        assert explanation.known and not explanation.warnings(), row
        assert not [fact for fact in explanation.stale if fact.group == "EXIT_QUALIFICATION"]


def test_what_the_trace_rows_say(intel_plain_truth: Dict[str, Any]) -> None:
    """The guest program of this VM: OUT to 0x80 by DX, IN from 0x71, MOV CR0 from RAX and RDX, UD2, a write that faults while #UD is
    being delivered; read back from the trace."""
    said = {explain_row(row).summary for row in trace_rows(intel_plain_truth)}
    assert {"OUT port 0x80 (DX), 1 byte", "IN port 0x71 (DX), 1 byte", "MOV CR0, RAX", "MOV CR0, RDX"} <= said
    undefined = [row for row in trace_rows(intel_plain_truth) if row["reason"] == "EXCEPTION_NMI"]
    assert [fact.meaning for row in undefined for fact in explain_row(row).facts if fact.label == "vector"] == ["#UD (invalid opcode)"] * 4
    during = [row for row in trace_rows(intel_plain_truth) if int(row["info2"], 16)]
    assert during
    for row in during:
        explanation = explain_row(row)
        assert explanation.code == 48
        assert any("VM_ENTRY_INTR_INFO_FIELD = 0x80000306" in text for text in texts(explanation, "event"))
        assert texts(explanation, "rip")[0].startswith("do not advance RIP: the exit came while #UD")
    for row in trace_rows(intel_plain_truth):
        if row["reason"] == "EPT_VIOLATION":
            # Bit 8 is 0 for the guest's page tables (a write, because EPT accessed and dirty flags are on), 1 for the data itself.
            expected = "write of a guest paging-structure entry" if row["info1"].endswith("082") else "at a linear address"
            assert expected in explain_row(row).summary, row


# -- VMCS pages of a real hypervisor -----------------------------------------------------------------------------------------------


def vmcs_at(path: Path, address: int) -> "tuple[Vmcs, vtdbg.PhysicalMemory]":
    memory = vtdbg.open(path).memory
    return Vmcs.from_page(memory.read(address, 4096)), memory


def test_halted_guest(intel_plain: Path) -> None:
    """VM A: its last exit is HLT.  The addresses of an older EPT violation and the event that was injected once are told apart from it,
    and the instruction at GUEST_RIP, through guest paging and EPT, is the program's HLT."""
    vmcs, memory = vmcs_at(intel_plain, VM_A)
    explanation = explain_vmcs(vmcs, memory)
    assert (explanation.code, explanation.name) == (12, "HLT")
    assert explanation.instruction is not None
    assert (explanation.instruction.text, explanation.instruction.length, explanation.instruction.mode) == ("hlt", 1, 64)
    assert explanation.instruction.address == vmcs["GUEST_RIP"]
    stale = {fact.label: fact.meaning for fact in explanation.stale}
    assert stale["guest-physical address"].startswith("of an older exit")
    assert stale["guest-linear address"].startswith("of an older exit")
    assert {fact.label: fact.value for fact in explanation.stale} == {
        "guest-physical address": 0x1001010, "guest-linear address": 0xFFFF800000005010, "event to inject": 0x306}
    assert stale["event to inject"].startswith("none: bit 31 is 0") and "#UD" in stale["event to inject"]
    assert texts(explanation, "cause") == ['primary control "HLT exiting" (bit 7) is 1']
    assert f"GUEST_RIP = {vmcs['GUEST_RIP'] + 1:#x}" in texts(explanation, "rip")[0]
    assert not explanation.warnings()
    assert explanation.facts[0].source.startswith("page offset 0x918")


def test_failed_entry(intel_plain: Path) -> None:
    """VM B: 0x80000021.  A failed entry writes only reason and qualification: everything else in the VMCS is of an older exit."""
    vmcs, memory = vmcs_at(intel_plain, VM_B)
    explanation = explain_vmcs(vmcs, memory)
    assert (explanation.code, explanation.name) == (33, "INVALID_STATE")
    assert any("vmcs check" in text for text in texts(explanation, "fix"))
    assert {fact.label for fact in explanation.stale} >= {"guest-linear address", "guest-physical address", "instruction length"}
    assert texts(explanation, "rip")[0].startswith("RIP does not matter")
    assert not explanation.advised("shadow") and not explanation.advised("cause")


def test_rip_that_the_vmm_advanced(intel_plain: Path) -> None:
    """KVM adds the length before it stops; with GUEST_RIP behind the instruction the instruction is still found, and nothing is added twice."""
    vmcs, memory = vmcs_at(intel_plain, VM_A)
    moved = vmcs.replaced({"GUEST_RIP": vmcs["GUEST_RIP"] + 1})
    explanation = explain_vmcs(moved, memory)
    assert explanation.instruction is not None and explanation.instruction.text == "hlt"
    assert explanation.instruction.address == vmcs["GUEST_RIP"]
    assert texts(explanation, "rip") == ["the VMM has advanced GUEST_RIP already: do not add the length again"]


def test_bytes_of_another_time(intel_plain: Path) -> None:
    """An exit whose instruction is not at GUEST_RIP says so instead of showing the bytes as if they were it."""
    vmcs, memory = vmcs_at(intel_plain, VM_A)
    explanation = explain_vm_exit(10, vmcs=vmcs, memory=memory, instruction_length=2)
    assert any("not the instruction of this exit (cpuid)" in note for note in explanation.notes)


@pytest.mark.parametrize(("change", "step"), [({"GUEST_CR3": 0x7FFF000}, "nested walk: the guest's level 4 PML4E"),
                                              ({"EPT_POINTER": 0x7FFF01E}, "nested walk"),
                                              ({"GUEST_RIP": 0x7FFFFFFFF000}, "guest walk: level 4 PML4E")])
def test_unreadable_instruction_says_which_step_failed(intel_plain: Path, change: Dict[str, int], step: str) -> None:
    vmcs, memory = vmcs_at(intel_plain, VM_A)
    explanation = explain_vmcs(vmcs.replaced(dict(change)), memory)
    assert explanation.instruction is None
    fact = explanation.fact("instruction")
    assert fact is not None and fact.meaning.startswith("not read: ") and step in fact.meaning, fact


def test_memory_without_ept_is_not_guessed(intel_plain: Path) -> None:
    """Whether the guest runs on EPT decides what its addresses mean: unknown controls stop the read, an EPTP that is given goes on."""
    vmcs, memory = vmcs_at(intel_plain, VM_A)
    wanted = ("GUEST_RIP", "GUEST_CR0", "GUEST_CR3", "GUEST_CR4", "GUEST_CS_AR_BYTES", "GUEST_CS_BASE", "VM_ENTRY_CONTROLS", "VM_EXIT_REASON",
              "VM_EXIT_INSTRUCTION_LEN")
    part = Vmcs.from_values({name: vmcs[name] for name in wanted})
    blind = explain_vmcs(part, memory)
    fact = blind.fact("instruction")
    assert blind.instruction is None and fact is not None and "EPTP" in fact.meaning
    given = explain_vm_exit(vmcs=part, memory=memory, eptp=vmcs["EPT_POINTER"])
    assert given.instruction is not None and given.instruction.text == "hlt"


def test_nested_vmcs_pages(intel_nested: Path) -> None:
    """vmcs01 and vmcs02 of KVM with a hypervisor in its guest: each is explained without an impossible value."""
    for address in (0x6B53000, 0x6BA1000):
        vmcs, memory = vmcs_at(intel_nested, address)
        explanation = explain_vmcs(vmcs, memory)
        assert explanation.known and not explanation.warnings(), explanation.warnings()


# -- numbers alone -----------------------------------------------------------------------------------------------------------------


def test_numbers_alone() -> None:
    """Every reason is explained from its number, and what was not given is unknown, not 0."""
    for number, row in exits.reasons().items():
        explanation = explain_vm_exit(number)
        assert explanation.code == number and explanation.known == (not row.reserved)
        if row.reserved:
            assert "reserved" in explanation.facts[0].meaning and explanation.warnings() and not explanation.advice
        else:
            assert explanation.advised("rip"), row.name
        if row.qualification.startswith("qual_"):
            fact = explanation.fact("exit qualification")
            assert fact is not None and fact.value is None and fact.meaning == "not given", row.name


def test_missing_reason_is_an_error() -> None:
    with pytest.raises(UsageError, match="exit reason"):
        explain_vm_exit()
    with pytest.raises(UsageError, match="exit reason"):
        explain_vmcs(Vmcs.from_values({}))
    with pytest.raises(FormatError, match="VM_EXIT_REASON"):
        explain_vm_exit(1 << 32)


@pytest.mark.parametrize(("word", "complaint"), [
    (0x8000000A, "bit 31 .VM-entry failure. with reason 10"), (0x04000021, "bit 31 is 0"), (0x20000030, "bit 29"), (0x10000030, "bit 28"),
    (0x00010030, "reserved"), (0x40000030, "reserved")])
def test_impossible_reason_words(word: int, complaint: str) -> None:
    assert any(re.search(complaint, text) for text in explain_vm_exit(word).warnings())


@pytest.mark.parametrize(("bit", "ident"), [(25, "SHSTK_BUSY"), (26, "BUS_LOCK"), (27, "ENCLAVE")])
def test_reason_flags_that_go_with_any_exit(bit: int, ident: str) -> None:
    explanation = explain_vm_exit(1 << bit | 48, 0x181)
    assert not explanation.warnings() and explanation.code == 48
    assert explanation.fact(bits.table("exit_reason")[ident].name) is not None


def test_basic_reason_of_an_entry_failure_without_bit_31() -> None:
    """People type the basic reason: 33 is taken, and the whole field is named."""
    explanation = explain_vm_exit(33, 4)
    assert explanation.summary.startswith("the VMCS link pointer") and not explanation.warnings()
    assert any("0x80000021" in note for note in explanation.notes)


@pytest.mark.parametrize(("value", "words"), [(0, "guest-state area"), (2, "PDPTE"), (3, "STI"), (4, "link pointer")])
def test_entry_failure_qualifications(value: int, words: str) -> None:
    assert words in explain_vm_exit(0x80000021, value).summary


def test_entry_failure_qualification_that_cannot_be() -> None:
    assert any("impossible" in text for text in explain_vm_exit(0x80000021, 1).warnings())


def test_msr_load_failure_names_the_entry() -> None:
    """Reason 34: the qualification is the number of the entry, from 1; entries are 16 bytes."""
    vmcs = Vmcs.from_values({"VM_ENTRY_MSR_LOAD_ADDR": 0x5000, "VM_ENTRY_MSR_LOAD_COUNT": 3})
    assert "0x5020" in explain_vm_exit(0x80000022, 3, vmcs=vmcs).summary
    assert any("VM_ENTRY_MSR_LOAD_COUNT is 3" in text for text in explain_vm_exit(0x80000022, 4, vmcs=vmcs).warnings())
    assert any("number 1" in text for text in explain_vm_exit(0x80000022, 0, vmcs=vmcs).warnings())


# -- events ------------------------------------------------------------------------------------------------------------------------


def test_valid_bit_first() -> None:
    """0x306 without bit 31 is an event of the past: it is not pending, is not injected, and is no #UD now."""
    explanation = explain_vm_exit(48, 0x181, interruption_info=0x306, idt_vectoring_info=0x306)
    assert not explanation.advised("event") and not explanation.warnings()
    found = [fact for fact in explanation.facts if fact.label in ("interruption", "event being delivered")]
    assert len(found) == 2 and all(fact.value == 0x306 and fact.meaning.startswith("none: bit 31 is 0") for fact in found)


@pytest.mark.parametrize(("info", "error", "length", "text"), [
    (0x80000306, None, None, "VM_ENTRY_INTR_INFO_FIELD = 0x80000306"),
    (0x80000B0D, 0x10, None, "VM_ENTRY_INTR_INFO_FIELD = 0x80000b0d, VM_ENTRY_EXCEPTION_ERROR_CODE = 0x10"),
    (0x80000B0D, None, None, "needs the error code"),
    (0x80000480, None, 2, "VM_ENTRY_INTR_INFO_FIELD = 0x80000480, VM_ENTRY_INSTRUCTION_LEN = 0x2"),
    (0x80000603, None, None, "needs VM_EXIT_INSTRUCTION_LEN"),
    (0x80001202, None, None, "VM_ENTRY_INTR_INFO_FIELD = 0x80000202"),
    (0x80001B0E, 2, None, "VM_ENTRY_INTR_INFO_FIELD = 0x80000b0e, VM_ENTRY_EXCEPTION_ERROR_CODE = 0x2"),
])
def test_injecting_again(info: int, error: Optional[int], length: Optional[int], text: str) -> None:
    """Type, vector and error code go into the entry words; bit 12, undefined in the IDT-vectoring information, does not; types 4 to 6 need
    the instruction length (SDM vol. 3, Event Injection)."""
    explanation = explain_vm_exit(48, 0x181, idt_vectoring_info=info, idt_vectoring_error_code=error, instruction_length=length)
    assert any(text in item for item in texts(explanation, "event")), texts(explanation, "event")


def test_nmi_delivered_again_needs_its_blocking_cleared() -> None:
    """Its delivery has set blocking by NMI; injecting it again with that set fails the entry (SDM vol. 3, Checks on Guest Non-Register State)."""
    explanation = explain_vm_exit(48, 0x181, idt_vectoring_info=0x80000202)
    assert any(text.startswith("clear blocking by NMI") for text in texts(explanation, "shadow"))


@pytest.mark.parametrize("info", [0x80000703, 0x80000100, 0x80000206 | 1, 0x80000301 | 0xFF, 0x80000604 | 8, 0x80000E03, 0x8000B306])
def test_impossible_events_are_not_injected(info: int) -> None:
    """Reserved type, NMI with another vector, an exception above 31, a software exception that is neither #BP nor #OF, an error code
    for a software exception, reserved bits."""
    explanation = explain_vm_exit(48, 0x181, idt_vectoring_info=info)
    assert any("impossible" in text for text in explanation.warnings())
    assert not explanation.advised("event")


def test_exits_that_are_not_during_delivery() -> None:
    """A triple fault, an instruction, an intercepted #DF never leave IDT-vectoring information (SDM vol. 3, Information for VM Exits That
    Occur During Event Delivery)."""
    for explanation in (explain_vm_exit(2, 0, idt_vectoring_info=0x80000306), explain_vm_exit(10, 0, idt_vectoring_info=0x80000306),
                        explain_vm_exit(0, 0, interruption_info=0x80000B08, error_code=0, idt_vectoring_info=0x80000306)):
        assert any("does not occur during event delivery" in text for text in explanation.warnings())
        assert not any("injected again" in text for text in texts(explanation, "event"))


def test_interruption_information_belongs_to_reasons_0_and_1() -> None:
    assert any("only reasons 0 and 1" in text for text in explain_vm_exit(10, 0, interruption_info=0x80000306).warnings())
    assert any("bit 31 set" in text for text in explain_vm_exit(0, 0, interruption_info=0x306).warnings())
    assert any("external interrupt" in text for text in explain_vm_exit(1, 0, interruption_info=0x80000306).warnings())
    assert any("reason 1" in text for text in explain_vm_exit(0, 0, interruption_info=0x80000031).warnings())
    assert not explain_vm_exit(1, 0, interruption_info=0x80000031).warnings()


def test_page_fault_exit() -> None:
    """#PF: error code in words, CR2 from the qualification, and a second fault while #GP was delivered is #DF."""
    explanation = explain_vm_exit(0, 0xFFFF8000DEAD0000, interruption_info=0x80000B0E, error_code=0x17, idt_vectoring_info=0x80000B0D,
                                  idt_vectoring_error_code=0)
    said = str([fact.meaning for fact in explanation.facts])
    assert "user-mode instruction fetch, protection violation" in said
    advice = texts(explanation, "event")
    assert any("CR2 = 0xffff8000dead0000" in text for text in advice)
    # #PF during the delivery of #GP is handled one after the other; #GP during #PF would be #DF.
    assert not any("#DF" in text for text in advice)
    reverse = explain_vm_exit(0, 0, interruption_info=0x80000B0D, error_code=0, idt_vectoring_info=0x80000B0E, idt_vectoring_error_code=2)
    assert any("0x80000b08" in text for text in texts(reverse, "event"))


def test_nmi_unblocking() -> None:
    """Bit 12 where it is defined: interruption information (not for #DF), EPT violation, SPP, PML, notify; not during event delivery."""
    def blocked(explanation: Explanation) -> bool:
        return any(text.startswith("set blocking by NMI") for text in texts(explanation, "shadow"))

    assert blocked(explain_vm_exit(0, 0, interruption_info=0x80001B0D, error_code=0))
    assert not blocked(explain_vm_exit(0, 0, interruption_info=0x80001B08, error_code=0))
    for reason, qualification in ((48, 0x1181), (66, 0x1800), (62, 0x1000), (75, 0x1000)):
        assert blocked(explain_vm_exit(reason, qualification)), reason
        assert not blocked(explain_vm_exit(reason, qualification & ~0x1000)), reason
    assert not blocked(explain_vm_exit(48, 0x1181, idt_vectoring_info=0x80000306))


# -- advice ------------------------------------------------------------------------------------------------------------------------


def test_blocking_is_cleared_when_rip_advances() -> None:
    """STI; HLT: the handler of HLT advances RIP, so blocking by STI has to go, or the entry into the HLT state fails."""
    blocked = explain_vm_exit(12, 0, vmcs=Vmcs.from_values({"GUEST_INTERRUPTIBILITY_INFO": 9}))
    assert any("GUEST_INTERRUPTIBILITY_INFO = 0x8" in text for text in texts(blocked, "shadow"))
    assert not explain_vm_exit(12, 0, vmcs=Vmcs.from_values({"GUEST_INTERRUPTIBILITY_INFO": 8})).advised("shadow")
    assert explain_vm_exit(12, 0).advised("shadow")
    stepping = explain_vm_exit(12, 0, vmcs=Vmcs.from_values({"GUEST_INTERRUPTIBILITY_INFO": 0, "GUEST_RFLAGS": 0x102}))
    assert any("BS (bit 14)" in text for text in texts(stepping, "shadow"))


@pytest.mark.parametrize(("mode", "rip", "expected"), [("64", 0xFFFFFFFFFFFFFFFF, 0x1), ("32", 0xFFFFFFFF, 0x1), ("64", 0xFFFFFFFF, 0x100000001)])
def test_rip_wraps_as_the_mode_says(mode: str, rip: int, expected: int) -> None:
    rights, control = (0xA09B, 1 << 9) if mode == "64" else (0xC09B, 0)
    vmcs = Vmcs.from_values({"GUEST_RIP": rip, "GUEST_CS_AR_BYTES": rights, "VM_ENTRY_CONTROLS": control})
    assert f"GUEST_RIP = {expected:#x};" in texts(explain_vm_exit(10, 0, vmcs=vmcs, instruction_length=2), "rip")[0]


def test_trap_like_exits_do_not_advance() -> None:
    for number in (43, 45, 56, 74):
        assert texts(explain_vm_exit(number, 0), "rip")[0].startswith("do not advance RIP: trap-like"), number


def test_triple_fault_is_not_skipped() -> None:
    """Code that adds the (undefined) instruction length after a triple fault is a common mistake."""
    explanation = explain_vm_exit(2, 0, instruction_length=3)
    assert texts(explanation, "rip") == ["do not advance RIP: there is nothing to go on with"]
    assert [fact.label for fact in explanation.stale] == ["instruction length"]


def test_invd_is_not_run_on_the_host() -> None:
    assert "WBINVD" in texts(explain_vm_exit(13, 0), "emulate")[0] and "do not run INVD" in texts(explain_vm_exit(13, 0), "emulate")[0]


def test_a_control_that_is_off_is_not_the_cause() -> None:
    """The VMCS given does not have the control of this exit: said, not papered over."""
    vmcs = Vmcs.from_values({"CPU_BASED_VM_EXEC_CONTROL": 0})
    assert "is 0: these controls do not give this exit" in texts(explain_vm_exit(12, 0, vmcs=vmcs), "cause")[0]


@pytest.mark.parametrize(("index", "reason", "text"), [
    (0xC0000082, 31, "bit 2 of byte 0x410"), (0xC0000082, 32, "bit 2 of byte 0xc10"), (0x1D9, 31, "bit 1 of byte 0x3b"),
    (0x1D9, 32, "bit 1 of byte 0x83b"), (0x40000000, 31, "it always exits"), (0x2000, 31, "it always exits")])
def test_msr_bitmap_place(index: int, reason: int, text: str) -> None:
    """SDM vol. 3, MSR-Bitmap Address: four 1-KByte bitmaps, reads then writes, low then high MSRs."""
    assert text in texts(explain_vm_exit(reason, 0, registers={"rcx": index}), "cause")[0]


def test_io_bitmap_place() -> None:
    """OUT of two bytes at 0x7fff touches the last bit of bitmap A and the first of B; at 0xffff it wraps and always exits."""
    text = texts(explain_vm_exit(30, 0x7FFF0001), "cause")[0]
    assert "IO_BITMAP_A byte 0xfff bit 7" in text and "IO_BITMAP_B byte 0x0 bit 0" in text
    assert "always exits" in texts(explain_vm_exit(30, 0xFFFF0001), "cause")[0]


# -- VM-instruction errors and aborts ----------------------------------------------------------------------------------------------


def test_instruction_errors() -> None:
    """1 to 28; 14, 21 and 27 are not used (SDM vol. 3, VM Instruction Error Numbers)."""
    assert sorted(exits.instruction_errors()) == list(range(1, 29))
    for number, row in exits.instruction_errors().items():
        explanation = explain_instruction_error(number)
        assert explanation.known == (number not in (14, 21, 27))
        if explanation.known:
            assert explanation.title == row.title and explanation.advised("fix") and row.instructions
    assert "VMRESUME with non-launched VMCS" in explain_instruction_error(5).title
    assert not explain_instruction_error(29).known and not explain_instruction_error(0).known


def test_aborts() -> None:
    assert [number for number in range(20) if explain_abort(number).known] == [0, 1, 2, 3, 4, 5, 6, 13]
    assert "not in the SDM" in explain_abort(13).advice[0].text
    assert "no VMX abort" in explain_abort(0).title


# -- anything at all ---------------------------------------------------------------------------------------------------------------

WORD32, WORD64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
REASONS = st.one_of(st.integers(0, 90), st.builds(lambda basic, flags: basic | flags, st.integers(0, 90), WORD32), WORD32)


def test_every_reason_with_random_words() -> None:
    """86 reasons times every field at its extremes."""
    for number in range(90):
        for word in (0, 0xFFFFFFFF, 0x5A5A5A5A, 0x80000306, 0xA5A5A5A5):
            explanation = explain_vm_exit(number, word << 32 | word, word, word, error_code=word, idt_vectoring_info=word,
                                          idt_vectoring_error_code=word, instruction_length=word, guest_linear_address=word,
                                          guest_physical_address=word)
            for text in everything(explanation):
                assert text.isascii()


@settings(max_examples=300, deadline=None)
@given(reason=REASONS, qualification=st.none() | WORD64, info=st.none() | WORD32, interruption=st.none() | WORD32, vectoring=st.none() | WORD32,
       length=st.none() | WORD32, error=st.none() | WORD32, linear=st.none() | WORD64,
       registers=st.dictionaries(st.sampled_from(["rax", "rbx", "rcx", "rsp", "r8", "efer", "fs_base", "cr0", "rflags"]), WORD64),
       values=st.dictionaries(st.sampled_from(["GUEST_CS_AR_BYTES", "VM_ENTRY_CONTROLS", "CPU_BASED_VM_EXEC_CONTROL", "EXCEPTION_BITMAP",
                                               "PAGE_FAULT_ERROR_CODE_MASK", "PAGE_FAULT_ERROR_CODE_MATCH", "SECONDARY_VM_EXEC_CONTROL",
                                               "GUEST_INTERRUPTIBILITY_INFO", "VM_ENTRY_INTR_INFO_FIELD", "PIN_BASED_VM_EXEC_CONTROL"]), WORD32))
def test_no_numbers_break_it(reason: int, qualification: Optional[int], info: Optional[int], interruption: Optional[int], vectoring: Optional[int],
                             length: Optional[int], error: Optional[int], linear: Optional[int], registers: Dict[str, int],
                             values: Dict[str, int]) -> None:
    """Impossible combinations are shown as such: every call returns, in ASCII, with advice of known kinds."""
    explanation = explain_vm_exit(reason, qualification, info, interruption, registers, Vmcs.from_values(dict(values)), error_code=error,
                                  idt_vectoring_info=vectoring, idt_vectoring_error_code=error, instruction_length=length,
                                  guest_linear_address=linear)
    assert explanation.code == reason & 0xFFFF
    assert all(text.isascii() for text in everything(explanation))
    assert {item.kind for item in explanation.advice} <= set(ADVICE_KINDS)
    for item in explanation.advised("event"):
        for word in re.findall(r"VM_ENTRY_INTR_INFO_FIELD = (0x[0-9a-f]+)", item.text):
            # What is advised to be injected is a word that a VM entry accepts as far as its own bits go.
            assert not events.decode("entry_int_info", int(word, 16)).problems


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["GUEST_RIP", "GUEST_CR3", "EPT_POINTER", "GUEST_CR4", "GUEST_CR0", "GUEST_CS_BASE",
                                                "EXIT_QUALIFICATION", "GUEST_PDPTR0"]), WORD64), reason=st.integers(0, 85), info=WORD32)
def test_no_memory_breaks_it(intel_plain: Path, changes: Dict[str, int], reason: int, info: int) -> None:
    """Real memory behind a VMCS with arbitrary pointers: walks end with a reason, operands and instructions are read or said not to be."""
    vmcs, memory = vmcs_at(intel_plain, VM_A)
    explanation = explain_vm_exit(reason, vmcs=vmcs.replaced(dict(changes)), memory=memory, instruction_info=info,
                                  registers=dict.fromkeys(["rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "r8", "r9"], 0x10000))
    assert all(text.isascii() for text in everything(explanation))


# -- registers that an instruction reads, and entries that failed --------------------------------------------------------------------


def test_inputs_by_name() -> None:
    """WRMSR and RDMSR name the MSR and decode its value; CPUID its leaf; without the registers nothing is claimed."""
    registers = {"rcx": 0xC0000080, "rax": 0xFFFFFFFF00000D01, "rdx": 0}
    assert explain_vm_exit(32, 0, registers=registers).summary == "WRMSR MSR 0xc0000080 (IA32_EFER) value 0xd01 (NXE LMA LME SCE)"
    assert explain_vm_exit(31, 0, registers=registers).summary == "RDMSR MSR 0xc0000080 (IA32_EFER)"
    assert explain_vm_exit(10, 0, registers={"rax": 0x1_00000007, "rcx": 1}).summary == "CPUID leaf 0x7 subleaf 0x1"
    assert explain_vm_exit(32, 0, registers={"rcx": 0x10}).summary == ""
    assert "MSR 0xc0000082 (IA32_LSTAR)" in explain_vm_exit(78, 0xC0000082).summary


def test_failed_msr_load_reads_the_entry() -> None:
    """Reason 34 with memory: which MSR the entry names, and what in the entry is illegal (FS base cannot be loaded)."""
    entries = struct.pack("<IIQ", 0x277, 0, 0) + struct.pack("<IIQ", 0xC0000100, 0, 0x1000)
    memory = vtdbg.memory_from_segments([(0x5000, entries)])
    vmcs = Vmcs.from_values({"VM_ENTRY_MSR_LOAD_ADDR": 0x5000, "VM_ENTRY_MSR_LOAD_COUNT": 2})
    fact = explain_vm_exit(0x80000022, 2, vmcs=vmcs, memory=memory).fact("MSR of the entry")
    assert fact is not None and fact.value == 0xC0000100 and "FS" in fact.meaning
    valid = explain_vm_exit(0x80000022, 1, vmcs=vmcs, memory=memory).fact("MSR of the entry")
    assert valid is not None and "IA32_PAT" in valid.meaning and "nothing in the entry itself" in valid.meaning
    beyond = explain_vm_exit(0x80000022, 2, vmcs=vmcs.replaced({"VM_ENTRY_MSR_LOAD_ADDR": 0x9000}), memory=memory).fact("MSR of the entry")
    assert beyond is not None and beyond.value is None and beyond.meaning.startswith("not read")


def test_task_gate_delivers_the_event_itself() -> None:
    """Reason 9 by a task gate: the emulated switch is the delivery; an error code goes onto the new stack; by JMP nothing was delivered."""
    gate = explain_vm_exit(9, 0xC0000028, idt_vectoring_info=0x80000B0D, idt_vectoring_error_code=0x10)
    advised = texts(gate, "event")
    assert len(advised) == 1 and "do not inject it again" in advised[0] and "push IDT_VECTORING_ERROR_CODE" in advised[0]
    assert texts(gate, "rip")[0].startswith("after the emulated task switch")


def test_a_vmcs_without_an_exit() -> None:
    """All zeros: reason 0 without a valid event is no exception exit, it is no exit at all yet."""
    zeros = {"VM_EXIT_REASON": 0, "VM_EXIT_INTR_INFO": 0, "EXIT_QUALIFICATION": 0, "IDT_VECTORING_INFO_FIELD": 0}
    assert any("has not had a VM exit yet" in text for text in explain_vmcs(Vmcs.from_values(dict(zeros))).warnings())


def test_enclave_exit() -> None:
    """Bit 27: registers and RIP are not the enclave's."""
    assert any("asynchronous exit pointer" in note for note in explain_vm_exit(1 << 27 | 10, 0).notes)


def test_printing() -> None:
    """`print(explanation)` in a script shows everything, a line each."""
    explanation = vtdbg.explain_vm_exit(48, 0x182, guest_physical_address=0x5000)
    lines = str(explanation).splitlines()
    assert lines[0].startswith("EPT_VIOLATION (EPT violation): write at a linear address, guest-physical 0x5000")
    assert len(lines) == 1 + len(explanation.facts) + len(explanation.stale) + len(explanation.advice) + len(explanation.notes)
    assert "  guest-physical address:  0x5000" in lines
    assert str(vtdbg.explain_vm_exit("0x80000021", 0)).splitlines()[2] == "  VM-entry failure:  0x1  1"
    assert str(vtdbg.explain_vmcs(Vmcs.from_values({"VM_EXIT_REASON": 12}))).splitlines()[0] == "HLT"
