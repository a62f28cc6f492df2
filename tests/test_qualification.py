"""Exit qualifications in words: each format's fields, and what cannot be in it (SDM vol. 3, Basic VM-Exit Information)."""

from __future__ import annotations

from typing import Dict, List, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.vmx import qualification
from vtdbg.vmx.exits import explain_vm_exit, reasons
from vtdbg.vmx.guest import Guest
from vtdbg.vmx.qualification import Context, apic_register
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.operand import GPRS


def context(values: Optional[Dict[str, int]] = None, registers: Optional[Dict[str, int]] = None, **rest: Optional[int]) -> Context:
    return Context(Guest(Vmcs.from_values(dict(values or {})), registers), "given value", **rest)


def said(form: str, value: int, **rest: Optional[int]) -> str:
    return qualification.describe(form, value, context(**rest)).summary


def warnings(form: str, value: int) -> List[str]:
    return [fact.warning for fact in qualification.describe(form, value, context()).facts if fact.warning]


@pytest.mark.parametrize(("value", "text"), [
    (0x0, "MOV CR0, RAX"), (0x203, "MOV CR3, RDX"), (0x313, "MOV RBX, CR3"), (0xF08, "MOV CR8, R15"), (0x404, "MOV CR4, RSP"),
    (0x20, "CLTS (clears CR0.TS)"),
    (0x00070030, "LMSW 0x7 from a register: CR0[3:0] = 0x7 (PE cannot be cleared)"),
    (0xFFF80070, "LMSW 0xfff8 from memory: CR0[3:0] = 0x8 (PE cannot be cleared)")])
def test_control_registers(value: int, text: str) -> None:
    assert said("qual_cr", value) == text
    assert not warnings("qual_cr", value)


def test_control_register_value_is_decoded() -> None:
    """With the register's value the sentence says which bits it has."""
    found = qualification.describe("qual_cr", 0x0, context(registers={"rax": 0x80000011}))
    assert found.summary == "MOV CR0, RAX: PG ET PE"


@pytest.mark.parametrize("value", [0x1, 0x2, 0xD, 0x40, 0x1000, 0x10000, 0x1 << 32, 0x24, 0x120, 0x00070034])
def test_control_register_words_that_cannot_be(value: int) -> None:
    """CR1 and CR2 have no exit, bits of another access type and reserved bits are 0, CLTS and LMSW are about CR0."""
    assert warnings("qual_cr", value)


@pytest.mark.parametrize(("value", "text"), [(0x007, "MOV DR7, RAX"), (0x817, "MOV R8, DR7"), (0x316, "MOV RBX, DR6")])
def test_debug_registers(value: int, text: str) -> None:
    assert said("qual_dr", value) == text


def test_dr4_depends_on_cr4() -> None:
    assert any("CR4.DE" in note for note in qualification.describe("qual_dr", 4, context()).notes)
    assert warnings("qual_dr", 0x8) and warnings("qual_dr", 0x20)


@pytest.mark.parametrize(("value", "text"), [
    (0x00800000, "OUT port 0x80 (DX), 1 byte"), (0x00710008, "IN port 0x71 (DX), 1 byte"), (0x00600049, "IN port 0x60 (immediate), 2 bytes"),
    (0x03F80003, "OUT port 0x3f8 (DX), 4 bytes"), (0x01F00039, "REP INSW port 0x1f0 (DX), 2 bytes"), (0x00800010, "OUTSB port 0x80 (DX), 1 byte")])
def test_io(value: int, text: str) -> None:
    assert said("qual_io", value) == text
    assert not warnings("qual_io", value)


@pytest.mark.parametrize(("value", "complaint"), [(0x2, "1, 2 and 4 bytes"), (0x7, "1, 2 and 4 bytes"), (0x20, "REP without"), (0x50, "from DX"),
                                                  (0x01000040, "immediate port has 8 bits"), (0x80, "reserved"), (1 << 32, "reserved")])
def test_io_that_cannot_be(value: int, complaint: str) -> None:
    assert any(complaint in text for text in warnings("qual_io", value))


@pytest.mark.parametrize(("value", "text"), [
    (0x781, "read at a linear address; EPT allows nothing there (not present, or no right common to all levels)"),
    (0x18A, "write at a linear address; EPT allows r--, write is missing"),
    (0x19A, "write at a linear address; EPT allows rw-: the permission is there, so look at bits 6 and 13 to 15, sub-page permissions, "
            "or an entry that changed"),
    (0x1AA, "write at a linear address; EPT allows r-x, write is missing"),
    (0x19C, "instruction fetch at a linear address; EPT allows rw-, execute is missing"),
    (0x82, "write of a guest paging-structure entry while the processor walked for a linear address; "
           "EPT allows nothing there (not present, or no right common to all levels)"),
    (0x1, "read with no linear address; EPT allows nothing there (not present, or no right common to all levels)")])
def test_ept_violations(value: int, text: str) -> None:
    """Bits 2:0 the access, 5:3 what EPT allows, 8:7 what the address is."""
    assert said("qual_ept", value) == text


def test_ept_addresses_are_in_the_sentence() -> None:
    assert said("qual_ept", 0x182, linear=0xFFFF800000001000, physical=0x5000).startswith(
        "write at linear address 0xffff800000001000, guest-physical 0x5000; ")


def test_ept_bits_that_are_undefined() -> None:
    """Bit 8 means nothing while bit 7 is 0, bits 9 to 11 nothing unless both are 1: they are not read as if they did."""
    def meaning(value: int, ident: str) -> Optional[str]:
        name = bits.table("qual_ept")[ident].name
        facts = qualification.describe("qual_ept", value, context()).facts
        return next((fact.meaning for fact in facts if fact.label == name), None)

    assert meaning(0x101, "TRANSLATED") == "undefined while bit 7 is 0"
    assert meaning(0x281, "USER") == "undefined unless bits 7 and 8 are 1"
    assert meaning(0x381, "USER") == "1"
    off = Context(Guest(Vmcs.from_values({"CPU_BASED_VM_EXEC_CONTROL": 1 << 31, "SECONDARY_VM_EXEC_CONTROL": 2})), "")
    facts = qualification.describe("qual_ept", 0x1C1, off).facts
    assert any(fact.meaning.startswith("undefined while mode-based") for fact in facts)
    assert any("IA32_VMX_EPT_VPID_CAP[22]" in note for note in qualification.describe("qual_ept", 0x781, context()).notes)


def test_linear_address_only_where_bit_7_says_so() -> None:
    """GUEST_LINEAR_ADDRESS of an EPT violation with bit 7 clear is of an older exit (SDM vol. 3, Basic VM-Exit Information)."""
    for value, written in ((0x181, True), (0x81, True), (0x1, False)):
        explanation = explain_vm_exit(48, value, guest_linear_address=0x1234, guest_physical_address=0x5000)
        assert (explanation.fact("guest-linear address") is not None) == written
        assert ("guest-linear address" in [fact.label for fact in explanation.stale]) != written


def test_register_numbers_of_every_table() -> None:
    """0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, 5 RBP, 6 RSI, 7 RDI, 8-15 R8-R15, in qualifications and instruction information alike."""
    rows = [row for name, table in bits.tables().items() if name.startswith(("qual_", "ii_")) for row in table.fields if "RAX" in row.values.values()]
    assert len(rows) == 18
    for row in rows:
        assert [row.values[number] for number in range(16)] == list(GPRS), row


def test_ept_violation_without_an_access_cannot_be() -> None:
    assert any("impossible" in text for text in warnings("qual_ept", 0x180))
    assert warnings("qual_ept", 1 << 20 | 0x181)


@pytest.mark.parametrize(("offset", "text"), [(0xB0, "0xb0 APIC_EOI (end of interrupt (EOI))"), (0x300, "APIC_ICR"), (0x310, "APIC_ICR2"),
                                              (0x110, "vectors 32 to 63"), (0x270, "APIC_IRR (vectors 224 to 255)"), (0x84, "APIC_TASKPRI"),
                                              (0x400, "(no register)")])
def test_apic_registers(offset: int, text: str) -> None:
    """SDM vol. 3, Local APIC Register Address Map: a register every 16 bytes; ISR, TMR and IRR are eight each."""
    assert text in apic_register(offset)
    assert text in said("qual_apic", 0x1000 | offset)
    assert text in said("qual_apic_write", offset)


def test_apic_access_types() -> None:
    assert said("qual_apic", 0x0B0).startswith("data read of APIC register") and said("qual_apic", 0x10B0).startswith("data write")
    # The offset is undefined for guest-physical accesses.
    assert "0xb0" not in said("qual_apic", 0xF0B0)
    assert not any(fact.label == "offset" for fact in qualification.describe("qual_apic", 0xA0B0, context()).facts)


@pytest.mark.parametrize(("form", "value", "text"), [
    ("qual_task_switch", 0x40000028, "task switch to TSS selector 0x28 by IRET"), ("qual_task_switch", 0xC0000028, "task gate in the IDT"),
    ("qual_sipi", 0x9A, "start at physical address 0x9a000"), ("qual_eoi", 0x31, "EOI of vector 0x31"), ("qual_spp", 0x800, "SPP miss"),
    ("qual_spp", 0, "SPP misconfiguration"), ("qual_invlpg", 0xFFFF800000000000, "INVLPG of linear address 0xffff800000000000"),
    ("qual_mwait", 1, "the monitor is armed"), ("qual_notify", 1, "context is invalid"), ("qual_msr", 0xC0000080, "MSR 0xc0000080"),
    ("qual_db", 0x4003, "breakpoint 0, breakpoint 1, single step (BS)"), ("qual_db", 0, "no condition recorded")])
def test_other_formats(form: str, value: int, text: str) -> None:
    assert text in said(form, value)
    assert not warnings(form, value)


def test_exception_format_follows_the_vector() -> None:
    """#DB has the DR6 bits, #PF the linear address, every other vector clears the field."""
    assert said("exception", 0x4000, vector=1) == "single step (BS)"
    assert said("exception", 0x1234, vector=14) == "at 0x1234"
    assert any("clears the qualification" in fact.warning for fact in qualification.describe("exception", 5, context(vector=6)).facts)
    unknown = qualification.describe("exception", 5, context()).facts
    assert "vector is unknown" in unknown[0].meaning and not unknown[0].warning


def test_a_qualification_that_the_exit_clears() -> None:
    """Not 0 where the manual says that it is cleared: not of this exit."""
    assert any("not of this exit" in text for text in explain_vm_exit(10, 1).warnings())
    assert not explain_vm_exit(10, 0).warnings()


def test_page_modification_log_only_has_bit_12() -> None:
    """All other bits are undefined: they are neither shown nor wrong."""
    assert not warnings("qual_pml", 0xFFFFFFFFFFFFEFFF)
    assert not qualification.describe("qual_pml", 0xFFFFFFFFFFFFEFFF, context()).facts
    assert qualification.describe("qual_pml", 0x1000, context()).facts


def test_every_format_of_the_reasons_is_one() -> None:
    for row in reasons().values():
        assert row.qualification == "" or row.qualification in qualification.FORMATS or bits.table(row.qualification).title


@settings(max_examples=400, deadline=None)
@given(form=st.sampled_from(sorted({row.qualification for row in reasons().values()})), value=st.integers(0, 2**64 - 1),
       vector=st.none() | st.integers(0, 255), linear=st.none() | st.integers(0, 2**64 - 1))
def test_any_value(form: str, value: int, vector: Optional[int], linear: Optional[int]) -> None:
    """Every format describes every number, in ASCII; a number that sets a reserved bit of the format's table gets a warning."""
    found = qualification.describe(form, value, context(vector=vector, linear=linear))
    assert all(text.isascii() for fact in found.facts for text in (fact.label, fact.meaning, fact.warning)) and found.summary.isascii()
    if form.startswith("qual_") and bits.table(form).reserved_violations(value):
        assert any(fact.warning for fact in found.facts)
