"""VM-exit instruction information and the operands that it describes (SDM vol. 3, Information for VM Exits Due to Instruction Execution)."""

from __future__ import annotations

import struct
from typing import Dict, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.explain import Explanation, Fact
from vtdbg.memory.base import memory_from_segments
from vtdbg.vmx import instruction_info
from vtdbg.vmx.exits import explain_vm_exit, reasons
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.operand import GPRS, MemoryOperand, RegisterOperand, memory_operand, narrow, signed

MASK64 = (1 << 64) - 1
LONG: Dict[str, int] = {"VM_ENTRY_CONTROLS": 1 << 9, "GUEST_CS_AR_BYTES": 0xA09B}


def word(table: str, **numbers: int) -> int:
    return bits.table(table).encode(**numbers)


def invpcid(info: int, displacement: int = 0, registers: Optional[Dict[str, int]] = None,
            values: Optional[Dict[str, int]] = None) -> Explanation:
    vmcs = Vmcs.from_values(dict(values or {}))
    return explain_vm_exit(58, displacement, info, registers=registers, vmcs=vmcs)


def memory_part(explanation: Explanation) -> MemoryOperand:
    assert isinstance(explanation.operand, MemoryOperand)
    return explanation.operand


def test_scaling_0_is_times_1() -> None:
    """A scaling field of 0 multiplies the index by 1; code that takes it for "no index" reads the wrong descriptor."""
    info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER=1, SEGMENT=3, ADDRESS_SIZE=2)
    operand = memory_part(invpcid(info, 0x10, {"rbx": 0x1000, "rcx": 0x20}))
    assert (operand.scale, operand.linear, operand.text) == (1, 0x1030, "DS:[RBX + RCX + 0x10]")


def test_invalid_bits_take_registers_away() -> None:
    """The register fields are undefined while the invalid bits are 1, whatever they hold."""
    info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER=1, BASE_REGISTER_INVALID=1, INDEX_REGISTER_INVALID=1, SCALING=3, SEGMENT=3, ADDRESS_SIZE=2)
    operand = memory_part(invpcid(info, 0x2000, {"rbx": 0x1000, "rcx": 0x20}))
    assert (operand.base, operand.index, operand.linear, operand.text) == (None, None, 0x2000, "DS:[0x2000]")


@pytest.mark.parametrize(("size", "base", "displacement", "offset"), [
    (2, MASK64, 2, 1), (1, 0xFFFFFFFF, 2, 1), (1, 0x1_0000_1000, 0xFFFFFFF0_FFFFFFF0, 0xFF0), (0, 0x1FFFF, 2, 1), (0, 0x8000, 0xABCD_FFFF, 0x7FFF)])
def test_offsets_wrap_at_the_address_size(size: int, base: int, displacement: int, offset: int) -> None:
    """Bits of the qualification beyond the address size are undefined, and the sum wraps."""
    info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER_INVALID=1, SEGMENT=3, ADDRESS_SIZE=size)
    operand = memory_part(invpcid(info, displacement, {"rbx": base}, LONG))
    assert operand.effective == offset == operand.linear


def test_segment_bases_in_64_bit_mode() -> None:
    """DS, ES, SS and CS have base 0 in 64-bit mode, FS and GS the base of the VMCS; in 32-bit mode all have, and the sum has 32 bits."""
    values = {**LONG, **{f"GUEST_{name}_BASE": 0x7F000000 for name in ("ES", "CS", "SS", "DS")}, "GUEST_FS_BASE": 0xFFFF888000000000,
              "GUEST_GS_BASE": 0xFFFF800000000000}
    for number, linear in ((0, 0x1000), (1, 0x1000), (2, 0x1000), (3, 0x1000), (4, 0xFFFF888000001000), (5, 0xFFFF800000001000)):
        info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER_INVALID=1, SEGMENT=number, ADDRESS_SIZE=2)
        assert memory_part(invpcid(info, 0, {"rbx": 0x1000}, values)).linear == linear
    flat32 = {"VM_ENTRY_CONTROLS": 0, "GUEST_CS_AR_BYTES": 0xC09B, "GUEST_DS_BASE": 0xFFFFF000}
    info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER_INVALID=1, SEGMENT=3, ADDRESS_SIZE=1)
    assert memory_part(invpcid(info, 0, {"rbx": 0x1234}, flat32)).linear == 0x234


def test_missing_registers_are_named() -> None:
    """Without the register there is no address, and the text says which is needed; RSP and FS come from the VMCS."""
    info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER=9, SCALING=2, SEGMENT=4, ADDRESS_SIZE=2)
    operand = memory_part(invpcid(info, 0, {"rbx": 1}))
    assert operand.linear is None and operand.effective is None and operand.missing == "needs R9, the base of FS"
    stack = word("ii_inv", BASE_REGISTER=4, INDEX_REGISTER_INVALID=1, SEGMENT=2, ADDRESS_SIZE=2)
    assert memory_part(invpcid(stack, 8, {}, {"GUEST_RSP": 0x7000})).linear == 0x7008


def test_mode_that_is_not_known_is_not_guessed() -> None:
    """A 32-bit address with a DS base: 64-bit code ignores that base, 32-bit code adds it."""
    info = word("ii_inv", BASE_REGISTER=3, INDEX_REGISTER_INVALID=1, SEGMENT=3, ADDRESS_SIZE=1)
    assert "mode" in memory_part(invpcid(info, 0, {"rbx": 1}, {"GUEST_DS_BASE": 0x1000})).missing
    assert memory_part(invpcid(info, 0, {"rbx": 1}, {"GUEST_DS_BASE": 0})).linear == 1


@pytest.mark.parametrize(("info", "complaint"), [
    (word("ii_inv", SEGMENT=6, ADDRESS_SIZE=2), "segment register 6"), (word("ii_inv", SEGMENT=3, ADDRESS_SIZE=5), "address size 5"),
    (1 << 10 | word("ii_inv", SEGMENT=3, ADDRESS_SIZE=2), "reserved bits 10"),
    (word("ii_inv", SEGMENT=3, ADDRESS_SIZE=0, SCALING=1), "16-bit addressing has no scaling")])
def test_words_that_cannot_be(info: int, complaint: str) -> None:
    explanation = invpcid(info)
    assert any(complaint in text for text in explanation.warnings())
    if "16-bit" not in complaint and "reserved" not in complaint:
        assert explanation.operand is None


def test_information_for_an_exit_that_has_none() -> None:
    """The field is undefined then: kept as a value of an older exit, not decoded."""
    explanation = explain_vm_exit(10, 0, 0x12345678)
    assert explanation.operand is None and not explanation.group("VMX_INSTRUCTION_INFO")
    assert [fact.value for fact in explanation.stale] == [0x12345678]


@pytest.mark.parametrize(("reason", "identity", "name"), [(46, 0, "SGDT"), (46, 1, "SIDT"), (46, 2, "LGDT"), (46, 3, "LIDT"), (47, 0, "SLDT"),
                                                          (47, 1, "STR"), (47, 2, "LLDT"), (47, 3, "LTR")])
def test_identities(reason: int, identity: int, name: str) -> None:
    table = reasons()[reason].instruction_info
    fact = explain_vm_exit(reason, 0, word(table, IDENTITY=identity, SEGMENT=3, ADDRESS_SIZE=2)).fact("instruction")
    assert fact is not None and fact.meaning == name


def test_register_forms() -> None:
    """Bit 10: the operand is reg1; what bits 31:15 hold of a memory form is undefined and not read."""
    info = word("ii_vmread", MEMORY_REGISTER=1, REG1=9, REG2=2, SEGMENT=7)
    explanation = explain_vm_exit(25, 0, info, registers={"r9": 0x55, "rdx": 0x681E})
    assert isinstance(explanation.operand, RegisterOperand)
    assert (explanation.operand.register, explanation.operand.value) == ("R9", 0x55)
    field = explanation.fact("VMCS field")
    assert field is not None and field.meaning.startswith("GUEST_RIP (") and not explanation.warnings()


@pytest.mark.parametrize(("reason", "encoding", "text"), [
    (23, 0x4402, "VM_EXIT_REASON"), (25, 0x4402, "read-only unless IA32_VMX_MISC[29]"), (23, 0x7FFE, "no VMCS field"),
    (23, 0x2801, "(high 32 bits)")])
def test_vmread_and_vmwrite_name_the_field(reason: int, encoding: int, text: str) -> None:
    info = word("ii_vmread", MEMORY_REGISTER=1, REG1=0, REG2=1)
    said = " ".join(f"{fact.meaning} {fact.warning}" for fact in explain_vm_exit(reason, 0, info, registers={"rcx": encoding}).facts)
    assert text in said


@pytest.mark.parametrize(("reason", "value", "text"), [
    (58, 0, "individual address"), (58, 3, "all contexts without globals"), (58, 4, "#GP(0)"), (53, 1, "single context"), (53, 9, "error 28"),
    (50, 1, "single context"), (50, 2, "all contexts"), (50, 0, "error 28")])
def test_types(reason: int, value: int, text: str) -> None:
    info = word("ii_inv", REG2=2, SEGMENT=3, ADDRESS_SIZE=2, BASE_REGISTER_INVALID=1, INDEX_REGISTER_INVALID=1)
    fact = explain_vm_exit(reason, 0x1000, info, registers={"rdx": value}).fact("type")
    assert fact is not None and text in f"{fact.meaning} {fact.warning}"


# -- operands in memory: a guest without EPT whose paging maps 0x5000 to 0x5000 and nothing else ----------------------------------------

FLAT: Dict[str, int] = {**LONG, "CPU_BASED_VM_EXEC_CONTROL": 0, "GUEST_CR0": 0x80000001, "GUEST_CR4": 0x20, "GUEST_CR3": 0x1000, "GUEST_RIP": 0x5000}


def flat_memory(data: bytes) -> Dict[int, bytes]:
    tables = {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4000 + 8 * 5: 0x5003}
    pages = {address & ~0xFFF: bytearray(4096) for address in tables}
    for address, entry in tables.items():
        struct.pack_into("<Q", pages[address & ~0xFFF], address & 0xFFF, entry)
    return {**{address: bytes(page) for address, page in pages.items()}, 0x5000: data.ljust(4096, b"\0")}


DIRECT = word("ii_inv", REG2=2, SEGMENT=3, ADDRESS_SIZE=2, BASE_REGISTER_INVALID=1, INDEX_REGISTER_INVALID=1)


def read_operand(reason: int, data: bytes, info: int = DIRECT, displacement: int = 0x5800, registers: Optional[Dict[str, int]] = None) -> Explanation:
    memory = memory_from_segments(list(flat_memory(bytes(0x800) + data).items()))
    return explain_vm_exit(reason, displacement, info, registers=registers, vmcs=Vmcs.from_values(dict(FLAT)), memory=memory)


def test_invpcid_descriptor() -> None:
    """Bits 11:0 the PCID, 63:12 reserved, 127:64 the linear address (SDM vol. 2, INVPCID)."""
    def facts(data: bytes, kind: int) -> Dict[str, Fact]:
        return {fact.label: fact for fact in read_operand(58, data, registers={"rdx": kind}).group("operand")}

    found = facts(struct.pack("<QQ", 0x1123, 0x7FFF00000000), 0)
    assert found["PCID"].value == 0x123 and "#GP(0)" in found["descriptor bits 63:12"].warning
    assert found["address to invalidate"].value == 0x7FFF00000000 and not found["address to invalidate"].warning
    odd = struct.pack("<QQ", 1, 1 << 62)
    assert "not canonical" in facts(odd, 0)["address to invalidate"].warning
    # Type 2 uses neither PCID nor address.
    assert not facts(odd, 2)["address to invalidate"].warning


def test_invvpid_and_invept_descriptors() -> None:
    found = {fact.label: fact for fact in read_operand(53, struct.pack("<QQ", 0x2_0001, 0x1000), registers={"rdx": 0}).group("operand")}
    assert found["VPID"].value == 1 and "error 28" in found["descriptor bits 63:16"].warning
    found = {fact.label: fact for fact in read_operand(50, struct.pack("<QQ", 0x501E, 7), registers={"rdx": 1}).group("operand")}
    assert found["EPTP"].value == 0x501E and "error 28" in found["descriptor bits 127:64"].warning


@pytest.mark.parametrize(("identity", "data", "base"), [(2, struct.pack("<HQ", 0xFFF, 0xFFFF800000001000), 0xFFFF800000001000)])
def test_pseudo_descriptor(identity: int, data: bytes, base: int) -> None:
    info = word("ii_gdtr_idtr", IDENTITY=identity, SEGMENT=3, ADDRESS_SIZE=2, BASE_REGISTER_INVALID=1, INDEX_REGISTER_INVALID=1, OPERAND_SIZE=1)
    found = {fact.label: fact.value for fact in read_operand(46, data, info).group("operand")}
    assert (found["limit"], found["base"]) == (0xFFF, base)


@pytest.mark.parametrize(("operand_size", "base"), [(1, 0x89ABCDEF), (0, 0xABCDEF)])
def test_pseudo_descriptor_outside_64_bit_mode(operand_size: int, base: int) -> None:
    """Six bytes; LGDT and LIDT with a 16-bit operand size load 24 bits of base (SDM vol. 2, LGDT/LIDT)."""
    info = word("ii_gdtr_idtr", IDENTITY=3, SEGMENT=3, ADDRESS_SIZE=1, BASE_REGISTER_INVALID=1, INDEX_REGISTER_INVALID=1, OPERAND_SIZE=operand_size)
    unpaged = {"VM_ENTRY_CONTROLS": 0, "GUEST_CS_AR_BYTES": 0xC09B, "CPU_BASED_VM_EXEC_CONTROL": 0, "GUEST_CR0": 1, "GUEST_CR4": 0, "GUEST_CR3": 0,
               "GUEST_DS_BASE": 0}
    memory = memory_from_segments([(0x5000, bytes(0x800) + struct.pack("<HI", 0x3FF, 0x89ABCDEF))])
    found = explain_vm_exit(46, 0x5800, info, vmcs=Vmcs.from_values(dict(unpaged)), memory=memory)
    assert memory_part(found).size == 6
    assert {fact.label: fact.value for fact in found.group("operand")}["base"] == base


def test_destination_operands_are_not_read() -> None:
    """SGDT writes its operand: what lies there now is not its value."""
    info = word("ii_gdtr_idtr", IDENTITY=0, SEGMENT=3, ADDRESS_SIZE=2, BASE_REGISTER_INVALID=1, INDEX_REGISTER_INVALID=1)
    explanation = read_operand(46, b"\xff" * 10, info)
    assert memory_part(explanation).linear == 0x5800
    assert {fact.label for fact in explanation.group("operand")} == {"operand", "effective address", "linear address"}


def test_unreadable_operand_names_the_step() -> None:
    """A linear address that the guest's tables do not map, and one whose page the memory lacks, are told apart."""
    unmapped = read_operand(58, b"", displacement=0x6800).fact("operand in memory")
    assert unmapped is not None and unmapped.value is None and "level 1 PTE" in unmapped.meaning and "not present" in unmapped.meaning
    memory = memory_from_segments([(address, data) for address, data in flat_memory(b"").items() if address != 0x5000])
    absent = explain_vm_exit(58, 0x5800, DIRECT, vmcs=Vmcs.from_values(dict(FLAT)), memory=memory).fact("operand in memory")
    assert absent is not None and "host-physical address 0x5800" in absent.meaning


def test_string_io() -> None:
    """OUTS reads segment:RSI with the segment of the information, INS writes ES:RDI whatever it says; the others have no information."""
    registers = {"rsi": 0x1000, "rdi": 0x2000, "fs_base": 0x70000000}
    info = word("ii_ins_outs", SEGMENT=4, ADDRESS_SIZE=2)
    outs = explain_vm_exit(30, 0x00800010, info, registers=registers, guest_linear_address=0x70001000)
    assert (memory_part(outs).linear, memory_part(outs).size, memory_part(outs).text) == (0x70001000, 1, "FS:[RSI]")
    ins = explain_vm_exit(30, 0x00800019, info, registers=registers)
    assert (memory_part(ins).linear, memory_part(ins).size, memory_part(ins).text) == (0x2000, 2, "ES:[RDI]")
    plain = explain_vm_exit(30, 0x00800000, info, registers=registers)
    assert plain.operand is None and [fact.label for fact in plain.stale] == ["instruction information"]
    differs = explain_vm_exit(30, 0x00800010, info, registers=registers, guest_linear_address=0x1)
    assert any("GUEST_LINEAR_ADDRESS is 0x1" in note for note in differs.notes)


def test_narrow_names() -> None:
    assert [narrow("RAX", width) for width in (64, 32, 16, 8)] == ["RAX", "EAX", "AX", "AL"]
    assert [narrow("R9", width) for width in (64, 32, 16, 8)] == ["R9", "R9D", "R9W", "R9B"]


@settings(max_examples=300, deadline=None)
@given(base=st.none() | st.sampled_from(GPRS), index=st.none() | st.sampled_from(GPRS), scale=st.sampled_from([1, 2, 4, 8]),
       displacement=st.integers(0, MASK64), size=st.sampled_from([16, 32, 64]), values=st.lists(st.integers(0, MASK64), min_size=16, max_size=16),
       start=st.integers(0, MASK64), segment=st.sampled_from(["DS", "FS"]), mode=st.sampled_from([16, 32, 64]))
def test_addresses_are_the_sum(base: Optional[str], index: Optional[str], scale: int, displacement: int, size: int, values: "list[int]", start: int,
                               segment: str, mode: int) -> None:
    """The linear address is the sum of its parts, each wrapped where the processor wraps, for any numbers."""
    registers = dict(zip(GPRS, values))
    found = memory_operand(segment, base, index, scale, displacement, size, register=registers.get, segment_base=lambda _: start, mode=mode)
    total = (registers.get(base or "", 0) + registers.get(index or "", 0) * scale + displacement) % (1 << size)
    origin = 0 if mode == 64 and segment == "DS" else start
    assert found.effective == total
    assert found.linear == (origin + total) % (1 << (64 if mode == 64 else 32))
    assert found.displacement == signed(displacement, size) and found.text.isascii()


@settings(max_examples=300, deadline=None)
@given(reason=st.sampled_from(sorted(number for number, row in reasons().items() if row.instruction_info)), info=st.integers(0, 2**32 - 1),
       long=st.booleans())
def test_any_word(reason: int, info: int, long: bool) -> None:
    """Every word of every group decodes; an operand with an address has used only registers that exist."""
    registers = {name.lower(): 0x1000 for name in GPRS}
    explanation = explain_vm_exit(reason, 0, info, registers=registers, vmcs=Vmcs.from_values(dict(LONG) if long else {}))
    decoded = instruction_info.decode(reasons()[reason].instruction_info, info, reason)
    if decoded.problems and reason != 30:
        assert explanation.warnings()
    if isinstance(explanation.operand, MemoryOperand):
        assert explanation.operand.linear is not None or explanation.operand.missing


def test_umwait_operand_is_32_bits() -> None:
    """UMWAIT and TPAUSE have an r32 operand in every mode (SDM vol. 2); RDRAND has the size that the word says, and 3 is no size."""
    info = word("ii_rdrand", OPERAND_REGISTER=9, OPERAND_SIZE=2)
    for reason, name in ((67, "R9D"), (68, "R9D"), (57, "R9"), (61, "R9")):
        shown = explain_vm_exit(reason, 0, info).operand
        assert isinstance(shown, RegisterOperand) and shown.text == name
    assert any("operand size 3" in text for text in explain_vm_exit(57, 0, word("ii_rdrand", OPERAND_SIZE=3)).warnings())
