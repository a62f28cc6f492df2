"""Explained #VMEXITs against the kernel's own trace, and every exit code of the tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.errors import UnknownName, UsageError
from vtdbg.explain import ADVICE_KINDS
from vtdbg.memory.base import memory_from_segments
from vtdbg.memory.open import open_machine
from vtdbg.svm import events
from vtdbg.svm.exit_codes import exit_codes, find, get, signed
from vtdbg.svm.exits import SvmExit, explain_svm_exit
from vtdbg.svm.vmcb import Vmcb

VMCB_ADDRESS = 0x1F22000
ROW = re.compile(r"kvm_exit: vcpu 0 reason (.+?)\s+rip (\S+) info1 (\S+) info2 (\S+) intr_info (\S+) error_code (\S+)$")


class Row(NamedTuple):
    """One line of the kernel's trace and the line that follows."""

    reason: str
    rip: int
    info1: int
    info2: int
    intr_info: int
    error_code: int
    following: str


def rows(truth: Dict[str, Any]) -> Iterator[Row]:
    lines: List[str] = truth["kvm_exit_trace"]
    for line, following in zip(lines, [*lines[1:], ""]):
        found = ROW.search(line)
        if found:
            reason, *numbers = found.groups()
            yield Row(reason, *(int(number, 16) for number in numbers), following)  # type: ignore[call-arg]
        else:
            assert "kvm_inj_exception" in line


@pytest.fixture(scope="module", params=["amd_exit_truth", "amd_l2_truth"])
def truth(request: pytest.FixtureRequest) -> Dict[str, Any]:
    found: Dict[str, Any] = request.getfixturevalue(request.param)
    return found


def explained(truth: Dict[str, Any]) -> Iterator[Tuple[Row, SvmExit]]:
    for row in rows(truth):
        yield row, explain_svm_exit(row.reason, row.info1, row.info2, exit_int_info=row.intr_info | row.error_code << 32)


def test_every_row_of_the_kernels_trace_is_explained_and_called_as_the_kernel_calls_it(truth: Dict[str, Any]) -> None:
    """88 lines of the trace: 82 exits and 6 injections; each exit is in the tables under the kernel's reason, nothing in it is unknown."""
    assert len(truth["kvm_exit_trace"]) == 88
    found = list(explained(truth))
    assert len(found) == 82
    for row, result in found:
        assert result.known and result.row is not None and result.row.kvm == row.reason
        assert not [fact for fact in result.facts if fact.value is None or fact.warning.startswith(("reserved bits", "no bit"))], row
        assert result.title in result.summary


def test_io_exits_agree_with_what_the_guests_vmm_was_told(truth: Dict[str, Any]) -> None:
    """KVM told user space direction, port and size of each I/O exit; EXITINFO1 says the same, and RIP advances to EXITINFO2."""
    told = [found.groups() for found in (re.search(r"rip=(\S+) io (in|out) port=(\S+) size=(\d)", line) for line in truth["user_exits"]) if found]
    exits = [(row, result) for row, result in explained(truth) if row.reason == "io"]
    assert len(exits) == len(told) == 12
    for (_, direction, port, size), (row, result) in zip(told, exits):
        words = result.fact("EXITINFO1")
        assert words is not None and words.meaning == f"{direction.upper()}, port {port}, {8 * int(size)}-bit"
        assert result.port == int(port, 16)
        assert f"{row.info2:#x}" in result.advised("rip")[0].text
        assert 1 <= row.info2 - row.rip <= 2


def test_mmio_exits_are_reserved_bit_faults_at_the_address_that_the_vmm_emulated(truth: Dict[str, Any]) -> None:
    """KVM marks MMIO pages with a reserved bit: once the entry is there, the nested page fault has the RSVD bit, and user space gets the GPA."""
    emulated = {int(found.group(1), 16) for found in (re.search(r"mmio [rw] gpa=(\S+)", line) for line in truth["user_exits"]) if found}
    reserved = {result.gpa for _, result in explained(truth) if "reserved bit" in result.summary}
    assert reserved == {0x200000, 0x300008} and reserved <= emulated
    read_only = [result for row, result in explained(truth) if row.info1 == 0x100000007]
    assert read_only and all("write, page present, access not allowed, final translation" in result.summary for result in read_only)


def test_an_event_that_was_cut_off_is_the_one_that_the_kernel_injects_again(truth: Dict[str, Any]) -> None:
    """After each exit with EXITINTINFO.V the trace has kvm_inj_exception [reinjected] of that exception; after the others it does not.

    0x306 without V is an old event: not to be injected.
    """
    again, old = 0, 0
    for row, result in explained(truth):
        reinjected = re.search(r"kvm_inj_exception: (#\w+) \[reinjected\]", row.following)
        advice = result.advised("event")
        assert bool(advice) == bool(reinjected)
        if reinjected:
            again += 1
            assert result.event is not None and result.event.valid and reinjected.group(1) in result.event.title
            assert f"EVENTINJ = {row.intr_info:#x}" in advice[0].text
        elif row.intr_info:
            old += 1
            assert row.intr_info == 0x306
            assert [fact.meaning for fact in result.stale] == ["not valid: a past event (vector 6, exception)"]
    assert (again, old) == (3, 3)


def test_page_table_walk_faults_are_in_the_guests_page_tables_and_the_others_are_not(truth: Dict[str, Any]) -> None:
    """Bit 33 of EXITINFO1: the fault was on an access of the walk of the guest's tables, so the GPA is in one of them."""
    tables = {int(address, 16) >> 12 for walk in truth["gva_walks"] for _, address, _ in walk["guest_path"]}
    stages: Dict[str, Set[int]] = {"guest page-table walk": set(), "final translation": set()}
    for _, result in explained(truth):
        if result.name == "NPF" and result.gpa is not None:
            stages["guest page-table walk" if "guest page-table walk" in result.summary else "final translation"].add(result.gpa >> 12)
    assert len(stages["guest page-table walk"]) == 8
    assert stages["guest page-table walk"] <= tables
    assert not stages["final translation"] & tables


def test_the_vmcb_of_the_dump_explains_its_own_exit(amd_exit: Path) -> None:
    """Stopped just after #VMEXIT 0x400: the VMCB gives the code, EXITINFO and RIP with their offsets."""
    vmcb = Vmcb.from_page(open_machine(amd_exit).memory.read(VMCB_ADDRESS, 4096))
    result = explain_svm_exit(vmcb=vmcb)
    assert (result.name, result.gpa) == ("NPF", 0x200000)
    assert result.summary == ("Nested page fault: write, reserved bit set in a nested entry, final translation; guest-physical address 0x200000")
    fact = result.fact("EXITINFO1")
    assert fact is not None and fact.source == "VMCB offset 0x78"
    rip = result.fact("RIP")
    assert rip is not None and rip.value == 0xFFFF800000000091
    assert not result.warnings()


def test_with_memory_the_instruction_and_the_nested_entry_are_shown(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """The guest program's own account: the write of 4 bytes to GPA 0x200000 is by an instruction that ends at 0x...98.

    The nested entry is KVM's MMIO entry of the truth; all of it goes through the guest's tables and the nested ones.
    """
    memory = open_machine(amd_exit).memory
    result = explain_svm_exit(vmcb=Vmcb.from_page(memory.read(VMCB_ADDRESS, 4096)), memory=memory)
    told = re.search(r"rip=(\S+) mmio w gpa=0x200000 len=4", "\n".join(amd_exit_truth["user_exits"]))
    assert told is not None and result.instruction is not None
    assert result.instruction.next == int(told.group(1), 16)
    assert result.instruction.text == "mov dword ptr [0x200000], eax"
    walk = result.fact("NPT walk")
    entry, = (int(leaf["pte"], 16) for leaf in amd_exit_truth["npt_leaves"] if leaf["gpa"] == "0x200000")
    assert walk is not None and walk.value == entry and walk.meaning.startswith("misconfiguration") and not walk.warning


def test_without_its_memory_the_instruction_says_what_failed(amd_exit: Path) -> None:
    vmcb = Vmcb.from_page(open_machine(amd_exit).memory.read(VMCB_ADDRESS, 4096))
    result = explain_svm_exit(vmcb=vmcb, memory=memory_from_segments([(0, bytes(4096))]))
    fact = result.fact("instruction")
    assert result.instruction is None and fact is not None and fact.meaning.startswith("not read: cannot read")
    assert explain_svm_exit(vmcb=vmcb).fact("instruction") is None
    saved = vmcb.replaced({"insn_len": 8, "insn_bytes": int.from_bytes(b"\x89\x04\x25\0\0\x20\0\x90", "little")})
    found = explain_svm_exit(vmcb=saved).instruction
    assert found is not None and found.text == "mov dword ptr [0x200000], eax"


def test_an_instruction_that_is_not_the_exits_is_suspect() -> None:
    """RIP was advanced, or the memory is of another time: the bytes at RIP are not a CPUID."""
    memory = memory_from_segments([(0x1000, b"\x0f\xa2\x90" + bytes(4093))])
    real_mode = {"exit_code": 0x72, "efer": 0x1000, "cr0": 0x10, "cr4": 0, "cr3": 0, "cs.attrib": 0x9B, "cs.base": 0x1000, "nested_ctl": 0}
    good = explain_svm_exit(vmcb=Vmcb.from_values({**real_mode, "rip": 0, "next_rip": 2}), memory=memory)
    assert good.instruction is not None and good.instruction.mnemonic == "cpuid" and not good.warnings()
    assert "memory is of another time" in explain_svm_exit(vmcb=Vmcb.from_values({**real_mode, "rip": 2}), memory=memory).warnings()[0]
    assert "next_rip is 0x3" in explain_svm_exit(vmcb=Vmcb.from_values({**real_mode, "rip": 0, "next_rip": 3}), memory=memory).warnings()[0]


# -- the tables -------------------------------------------------------------------------------------------------------------

def test_every_code_is_there() -> None:
    """0 to 0xa6, NPF to VMGEXIT, software, and the four refusals; and the VMGEXIT codes of a GHCB."""
    codes = {row.code for row in exit_codes().values() if row.kind == "exit"}
    assert codes == set(range(0xA7)) | {0x400, 0x401, 0x402, 0x403, 0xF0000000, -1, -2, -3, -4}
    assert len([row for row in exit_codes().values() if row.kind == "vmgexit"]) == 13


@pytest.mark.parametrize("code", sorted(exit_codes()))
def test_every_code_explains_itself_with_numbers_and_without(code: int) -> None:
    row = exit_codes()[code]
    for numbers in ((None, None), (0, 0), (2**64 - 1, 2**64 - 1), (0x0123456789ABCDEF, 1)):
        result = explain_svm_exit(code, *numbers, exit_int_info=0x80000B0E, event_inj=0x80000306)
        assert result.known and result.name == row.name and result.see
        assert all(advice.kind in ADVICE_KINDS and advice.text.isascii() for advice in result.advice)
        assert all(fact.meaning.isascii() for fact in result.facts)
        assert all(bits.table(table) for table in (row.info1, row.info2) if table)
        if row.kind == "exit" and row.category not in ("software",):
            assert result.advice, row.name


@pytest.mark.parametrize(("code", "field", "bit"), [
    (0x00, "intercept_cr", "CR0_READ"), (0x14, "intercept_cr", "CR4_WRITE"), (0x37, "intercept_dr", "DR7_WRITE"),
    (0x4E, "intercept_exceptions", "PF"), (0x60, "intercept_misc1", "INTR"), (0x7B, "intercept_misc1", "IOIO_PROT"),
    (0x7F, "intercept_misc1", "SHUTDOWN"), (0x80, "intercept_misc2", "VMRUN"),
    (0x8D, "intercept_misc2", "XSETBV"), (0x8F, "intercept_misc2", "EFER_WRITE_TRAP"), (0x9F, "intercept_misc2", "CR15_WRITE_TRAP"),
    (0xA2, "intercept_misc3", "INVPCID"), (0xA5, "intercept_misc3", "BUS_LOCK_THRESHOLD")])
def test_the_exit_code_is_the_number_of_the_intercept_bit(code: int, field: str, bit: str) -> None:
    intercept = find(code).intercept
    assert intercept is not None and (intercept.field, intercept.ident) == (field, bit)


def test_the_fixtures_exits_are_all_asked_for_by_the_vmcbs_intercepts(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """Each traced exit has its intercept bit set in the VMCB that KVM ran (it does not change them in this guest)."""
    vmcb = Vmcb.from_page(open_machine(amd_exit).memory.read(VMCB_ADDRESS, 4096))
    names = set()
    for row, result in explained(amd_exit_truth):
        assert result.row is not None
        intercept = result.row.intercept
        if intercept is None:
            assert row.reason == "npf"
            continue
        names.add(row.reason)
        assert vmcb[intercept.field] >> intercept.bit & 1, row.reason
        assert "asked for by" in explain_svm_exit(row.reason, row.info1, row.info2, vmcb=vmcb).advised("cause")[0].text
    assert len(names) == 11


@pytest.mark.parametrize(("value", "code"), [(0xFFFFFFFF, -1), (2**64 - 1, -1), (0xFFFFFFFE, -2), (0x400, 0x400), (0xF0000000, 0xF0000000)])
def test_minus_one_in_any_width(value: int, code: int) -> None:
    """KVM's dmesg and QEMU show EXITCODE -1 as ffffffff."""
    assert signed(value) == code
    assert explain_svm_exit(value).code == code


@pytest.mark.parametrize(("name", "code"), [
    ("npf", 0x400), ("VMEXIT_NPF", 0x400), ("SVM_EXIT_NPF", 0x400), ("0x7c", 0x7C), ("hypercall", 0x81), ("-1", -1), ("VMEXIT_INVALID", -1),
    ("GP excp", 0x4D), ("EXCEPTION_GP", 0x4D), ("CR0_WRITE", 0x10), ("write_cr0", 0x10)])
def test_names_of_the_kernel_the_apm_and_xen(name: str, code: int) -> None:
    assert find(name).code == code


# -- formats ----------------------------------------------------------------------------------------------------------------

def meaning(result: SvmExit, label: str = "EXITINFO1") -> str:
    fact = result.fact(label)
    assert fact is not None
    return fact.meaning


def test_cr_access_with_and_without_decode_assists() -> None:
    """Bit 63 says that it was a MOV and that the register number counts; without it RAX must not be claimed (APM vol. 2, Decode Assists)."""
    assert meaning(explain_svm_exit("WRITE_CR4", 1 << 63 | 3, registers={"rbx": 0x6F0})) == "MOV with RBX = 0x6f0"
    without = explain_svm_exit("WRITE_CR4", 0)
    assert "RAX" not in meaning(without) and "no register reported" in meaning(without)
    assert "decode assists" in without.warnings()[0]


def test_msr_access_names_the_msr_and_the_value() -> None:
    result = explain_svm_exit("MSR", 1, registers={"rcx": 0xC0000080, "rax": 0xFFFFFFFF00000D01, "rdx": 0x1})
    assert meaning(result) == "WRMSR of IA32_EFER (0xc0000080) = 0x100000d01"
    assert result.msr == 0xC0000080
    assert "write bit of MSR 0xc0000080" in result.advised("avoid")[0].text
    assert "unknown" in meaning(explain_svm_exit("MSR", 0))


def test_string_io_has_segment_and_address_size() -> None:
    value = bits.table("svm_ioio").encode(PORT=0x1F0, SEG=3, A64=1, SZ16=1, REP=1, STR=1, TYPE=1)
    assert meaning(explain_svm_exit("IOIO", value)) == "REP INS, port 0x1f0, 16-bit, segment DS, 64-bit address"
    assert "not one size" in meaning(explain_svm_exit("IOIO", 0x60 << 0 | 0x70 | 1))


def test_page_fault_intercept_has_error_code_and_address() -> None:
    result = explain_svm_exit("EXCP_PF", 0x6, 0xDEAD000)
    assert meaning(result) == "page-fault error code: user-mode write, page not present"
    assert result.linear_address == 0xDEAD000
    assert "CR2" in result.advised("emulate")[0].text


def test_task_switch_says_how() -> None:
    result = explain_svm_exit("TASK_SWITCH", 0x28, 1 << 44 | 1 << 38 | 0x18)
    assert meaning(result) == "to the TSS of selector 0x28"
    assert meaning(result, "EXITINFO2") == "by far JMP, error code 0x18"


def test_avic_writes_are_traps_or_faults_by_register() -> None:
    """A write of the EOI register (0xb0) is done when the exit comes, a read of it is not; a write of the timer's current count is a fault."""
    assert "trap" in explain_svm_exit("AVIC_UNACCELERATED_ACCESS", 1 << 32 | 0xB0).advised("rip")[0].text
    assert "fault" in explain_svm_exit("AVIC_UNACCELERATED_ACCESS", 0xB0).advised("rip")[0].text
    assert "fault" in explain_svm_exit("AVIC_UNACCELERATED_ACCESS", 1 << 32 | 0x390).advised("rip")[0].text
    assert meaning(explain_svm_exit("AVIC_INCOMPLETE_IPI", 0, 1 << 32 | 5), "EXITINFO2") == "target not running"


@pytest.mark.parametrize(("next_rip", "words"), [(0x1002, "set RIP to next_rip (0x1002)"), (0, "the processor saved none: it is 2 bytes long"),
                                                 (None, "next_rip is unknown here: it is 2 bytes long")])
def test_where_rip_goes_after_cpuid(next_rip: Optional[int], words: str) -> None:
    values = {"rip": 0x1000, "exit_code": 0x72}
    vmcb = Vmcb.from_values(values if next_rip is None else {**values, "next_rip": next_rip})
    assert words in explain_svm_exit(vmcb=vmcb).advised("rip")[0].text


def test_a_next_rip_that_is_not_behind_rip_is_suspect() -> None:
    """KVM moves RIP when it skips an instruction: next_rip then is not behind the instruction at RIP."""
    vmcb = Vmcb.from_values({"rip": 0x1002, "exit_code": 0x72, "next_rip": 0x1002})
    assert "RIP was changed" in explain_svm_exit(vmcb=vmcb).warnings()[0]


def test_a_second_exception_during_delivery_becomes_a_double_fault() -> None:
    """#PF while #PF is delivered is #DF (APM vol. 2, #DF - Double-Fault Exception); #UD while #PF is delivered is not."""
    assert "becomes #DF" in explain_svm_exit("EXCP_PF", 2, 0, exit_int_info=0x80000B0E | 2 << 32).advised("event")[0].text
    assert "inject it again" in explain_svm_exit("EXCP_UD", exit_int_info=0x80000B0E).advised("event")[0].text


def test_a_software_interrupt_is_not_blindly_injected_again() -> None:
    assert "running it again delivers it" in explain_svm_exit("NPF", 0, 0, exit_int_info=0x80000480).advised("event")[0].text
    assert "task switch delivers it" in explain_svm_exit("TASK_SWITCH", 0x28, 0, exit_int_info=0x80000308).advised("event")[0].text


def test_the_interrupt_shadow_is_cleared_with_the_instruction() -> None:
    vmcb = Vmcb.from_values({"exit_code": 0x78, "int_state": 1, "rip": 0x10})
    assert "INTERRUPT_SHADOW" in explain_svm_exit(vmcb=vmcb).advised("shadow")[0].text
    assert not explain_svm_exit(vmcb=vmcb.replaced({"int_state": 0})).advised("shadow")


def test_a_number_that_the_exit_does_not_define_is_stale() -> None:
    result = explain_svm_exit("HLT", 0x10000000E)
    assert [fact.meaning for fact in result.stale] == ["not defined for HLT: the value of an older exit"]
    assert result.group("EXITINFO1") == ()


def test_given_numbers_win_over_the_vmcb_and_say_so() -> None:
    vmcb = Vmcb.from_values({"exit_code": 0x400, "exit_info_1": 1, "exit_info_2": 2, "exit_int_info": 0x80000B0D, "exit_int_info_err": 0x28})
    result = explain_svm_exit(None, exit_info_2=0x5000, vmcb=vmcb)
    assert result.gpa == 0x5000
    fact = result.fact("EXITINFO2")
    assert fact is not None and fact.source == "given value"
    assert result.event is not None and result.event.error_code == 0x28
    other = explain_svm_exit(None, exit_int_info=0x80000B0E, vmcb=vmcb)
    assert other.event is not None and other.event.error_code is None


def test_instruction_bytes_are_shown_for_a_nested_page_fault() -> None:
    vmcb = Vmcb.from_values({"exit_code": 0x400, "insn_len": 3, "insn_bytes": int.from_bytes(b"\x89\x04\x25" + bytes(12), "little")})
    fact = explain_svm_exit(vmcb=vmcb).fact("instruction bytes")
    assert fact is not None and fact.meaning == "89 04 25"


def test_an_exit_code_of_no_table_is_said_to_be_one() -> None:
    result = explain_svm_exit(0x3F7, 5)
    assert not result.known and "no table has this exit code" in result.notes[0]
    assert get(0x3F7) is None
    with pytest.raises(UnknownName, match="VMMCALL"):
        explain_svm_exit("VMMCAL")
    with pytest.raises(UsageError, match="no exit code"):
        explain_svm_exit()
    with pytest.raises(UsageError, match="no exit code"):
        explain_svm_exit(vmcb=Vmcb.from_values({"rip": 1}))


def test_a_ghcb_code_is_not_an_exit_code() -> None:
    assert "GHCB" in explain_svm_exit(0x80000001).notes[0]


@pytest.mark.parametrize(("value", "error", "words"), [
    (0x80000B0E, 2, "#PF (page fault), exception, error code 0x2 (supervisor-mode write, page not present)"),
    (0x80000B0E, None, "#PF (page fault), exception, error code unknown"), (0x80000202, None, "NMI"),
    (0x80000480, None, "vector 0x80, software interrupt"), (0x80000031, None, "vector 0x31, external or virtual interrupt"),
    (0x306, None, "not valid: a past event (vector 6, exception)"),
    (0, None, "no event: V is 0")])
def test_events_in_words(value: int, error: Optional[int], words: str) -> None:
    assert events.decode("event_inj", value, error).meaning == words


@pytest.mark.parametrize(("value", "problem"), [
    (0x80000106, "type 1 is reserved"), (0x80000302, "vector 2 is the NMI"), (0x80001306, "reserved bits"), (0x80000B06, "#UD has no error code"),
    (0x80000A02, "only an exception")])
def test_events_that_cannot_be(value: int, problem: str) -> None:
    assert any(problem in found for found in events.decode("event_inj", value).problems)
    assert not events.decode("event_inj", value & 0x7FFFFFFF).problems


WORD = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=200)
@given(WORD | st.sampled_from(sorted(code for code in exit_codes() if code >= 0)), WORD, WORD, WORD, st.integers(0, 2**32 - 1))
def test_any_numbers_are_explained(code: int, info1: int, info2: int, event: int, injected: int) -> None:
    """Impossible combinations are shown as such: no exception, every text printable."""
    result = explain_svm_exit(code, info1, info2, event, injected, registers={"rcx": info1, "rax": info2})
    assert result.title and all(fact.meaning.isprintable() for fact in (*result.facts, *result.stale))
