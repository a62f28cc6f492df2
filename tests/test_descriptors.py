"""Descriptors, gates and task-state segments: against the tables of real kernels, KVM's own account of its guests, and their inverses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg.errors import FormatError, MemoryUnavailable
from vtdbg.memory.base import PhysicalMemory, memory_from_segments
from vtdbg.memory.open import open_machine
from vtdbg.svm import segments as svm_segments
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx import segments as vmx_segments
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86 import descriptors as d
from vtdbg.x86.descriptor_tables import find_descriptor, read_idt, read_table
from vtdbg.x86.segments import Mode, SegmentState, compare_in_tables
from vtdbg.x86.tss import decode_tss, read_tss

ADDRESS = 0x000FFFFFFFFFF000


class Linear:
    """Four-level paging in eight lines, kept apart from vtdbg's walker so that the two can disagree."""

    def __init__(self, memory: PhysicalMemory, cr3: int) -> None:
        self.memory, self.cr3 = memory, cr3

    def read(self, address: int, size: int) -> bytes:
        table = self.cr3 & ADDRESS
        for shift in (39, 30, 21, 12):
            entry = self.memory.read_u64(table + (address >> shift & 511) * 8)
            if not entry & 1:
                raise MemoryUnavailable(address, size, f"entry at shift {shift} is not present", "linear")
            if shift == 12 or (shift < 39 and entry & 0x80):
                mask = (1 << shift) - 1
                assert (address & 0xFFF) + size <= 4096
                return self.memory.read((entry & ADDRESS & ~mask) | (address & mask), size)
            table = entry & ADDRESS
        raise AssertionError("not reached")


def vmcs_at(path: Path, address: int) -> Vmcs:
    return Vmcs.from_page(open_machine(str(path)).memory.read_page(address), layout="bochs_2.7")


def host(path: Path, address: int) -> "tuple[Vmcs, Linear]":
    vmcs = vmcs_at(path, address)
    return vmcs, Linear(open_machine(str(path)).memory, vmcs["HOST_CR3"])


def test_host_tr_base_is_the_tss_base_in_the_host_gdt(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    vmcs, linear = host(intel_plain, 0x6826000)
    assert vmcs["HOST_TR_SELECTOR"] == 0x40
    row = find_descriptor(linear, vmcs["HOST_GDTR_BASE"], 0x7F, 0x40, long_mode=True)
    assert row.descriptor.kind == "tss" and row.descriptor.bits == 64 and row.descriptor.busy and row.descriptor.size == 16
    assert row.descriptor.base == vmcs["HOST_TR_BASE"]


def test_linux_gdt_entries(intel_plain: Path) -> None:
    """Linux' 64-bit GDT (arch/x86/kernel/cpu/common.c, DECLARE_PER_CPU_PAGE_ALIGNED gdt_page): the words are GDT_ENTRY_INIT's."""
    vmcs, linear = host(intel_plain, 0x6826000)
    table = read_table(linear, vmcs["HOST_GDTR_BASE"], 0x7F, long_mode=True)
    words = {row.selector: int.from_bytes(row.raw[:8], "little") for row in table.rows}
    assert {selector: words[selector] for selector in (0x08, 0x10, 0x18, 0x20, 0x28, 0x30)} == {
        0x08: 0x00CF9B000000FFFF, 0x10: 0x00AF9B000000FFFF, 0x18: 0x00CF93000000FFFF, 0x20: 0x00CFFB000000FFFF, 0x28: 0x00CFF3000000FFFF,
        0x30: 0x00AFFB000000FFFF}
    kernel = table.by_selector(0x10).descriptor
    assert (kernel.kind, kernel.bits, kernel.dpl, kernel.limit, kernel.access_rights) == ("code", 64, 0, 0xFFFFFFFF, 0xA09B)
    assert kernel.vmcb_attrib == 0xA9B and kernel.type_name == "code, execute/read, accessed" and kernel.flags == "P G L"
    for selector, word in words.items():
        found = table.by_selector(selector).descriptor
        if found.kind in ("code", "data", "tss"):
            assert d.encode_segment(found.base, found.limit, found.access_rights, found.size)[:8] == word.to_bytes(8, "little")
    assert [row.selector for row in table.rows if row.descriptor.size == 16] == [0x40]


def test_linux_idt_gates(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """Every gate of Linux is a present 64-bit interrupt gate of KERNEL_CS; #DF, NMI, #DB and #MC have stacks of their own (IST)."""
    vmcs, linear = host(intel_plain, 0x6826000)
    table = read_idt(linear, vmcs["HOST_IDTR_BASE"], 0xFFF, long_mode=True)
    # The kernel maps its idt_table read-only at the address in IDTR: both ways lead to the same bytes.
    physical = int(intel_plain_truth["symbols"]["idt_table"], 16) - 0xFFFFFFFF81000000 + 0x1000000
    assert b"".join(row.raw for row in table.rows) == linear.memory.read_page(physical)
    gates = {row.index: row.descriptor for row in table.rows}
    assert len(gates) == 256
    assert all(gate.kind == "interrupt gate" and gate.selector == 0x10 and gate.offset >> 47 == 0x1FFFF for gate in gates.values())
    assert {vector for vector in (1, 2, 8, 18) if gates[vector].ist} == {1, 2, 8, 18}
    assert gates[3].dpl == 3 and gates[14].dpl == 0


def test_host_comparison_of_a_healthy_kvm(intel_plain: Path) -> None:
    """KVM's host state is the kernel's own GDT: nothing that matters differs; the TR limit of 0x67 loses only an unused I/O bitmap."""
    vmcs, linear = host(intel_plain, 0x6826000)
    found = {one.state.name: one for one in vmx_segments.compare_host(vmcs, linear)}
    assert [name for name, one in found.items() if one.matters] == []
    assert found["TR"].row.descriptor.base == vmcs["HOST_TR_BASE"]
    assert [item.field for item in found["TR"].differences] == ["limit"]
    assert (found["TR"].differences[0].held, found["TR"].differences[0].why.count("nothing is lost")) == (0x67, 1)
    # LTR marks the descriptor busy; loading CS and SS marks theirs accessed.
    assert found["CS"].differences == () and found["SS"].differences == ()


def test_a_wrong_host_tr_base_matters(intel_plain: Path) -> None:
    vmcs, linear = host(intel_plain, 0x6826000)
    wrong = vmcs.replaced({"HOST_TR_BASE": vmcs["HOST_TR_BASE"] + 8, "HOST_CS_SELECTOR": 0x30, "HOST_SS_SELECTOR": 0x1B})
    found = {one.state.name: one for one in vmx_segments.compare_host(wrong, linear)}
    assert [item.field for item in found["TR"].differences if item.matters] == ["base"]
    assert [(item.field, item.held, item.descriptor) for item in found["CS"].differences if item.matters] == [("DPL", 0, 3)]
    assert any(item.field == "selector" and item.matters for item in found["SS"].differences)


@pytest.mark.parametrize("vm, page, address", [("A", "0x8000", 0x6826000), ("B", "0x8000", 0x6BD9000)])
def test_guest_segments_agree_with_kvm_and_with_the_guests_gdt(intel_plain: Path, intel_plain_truth: Dict[str, Any], vm: str, page: str,
                                                              address: int) -> None:
    """KVM_GET_SREGS splits the access-rights bytes into their bits; the guest's GDT (identity mapped at 0x8000) has the same descriptors."""
    truth = intel_plain_truth["vms"][vm]
    vmcs = vmcs_at(intel_plain, address)
    for name, segment in truth["kvm_segments"].items():
        value = {key: int(text, 16) if text.startswith("0x") else int(text) for key, text in segment.items()}
        state = vmx_segments.guest_segment(vmcs, "LDTR" if name == "ldt" else name.upper())
        rights = (value["type"] | value["s"] << 4 | value["dpl"] << 5 | value["p"] << 7 | value["avl"] << 12 | value["l"] << 13 | value["db"] << 14
                  | value["g"] << 15 | value["unusable"] << 16)
        assert (state.selector, state.base, state.limit, state.access_rights) == (value["sel"], value["base"], value["limit"], rights), name
    memory = open_machine(str(intel_plain)).memory
    hpa = int(truth["gpa_to_hpa_pagemap"][page], 16)
    guest = memory_from_segments([(int(page, 16), memory.read_page(hpa))])
    found = {one.state.name: one for one in vmx_segments.compare_guest(vmcs, guest)}
    base, limit = (int(part, 16) for part in truth["kvm_get_sregs"]["gdt"].split("/"))
    assert (base, limit) == (vmcs["GUEST_GDTR_BASE"], vmcs["GUEST_GDTR_LIMIT"])
    mattering = {(name, item.field) for name, one in found.items() for item in one.differences if item.matters}
    # The program that made VM B spoilt CS on purpose: type 1 is data, the descriptor says code.
    assert mattering == ({("CS", "TYPE")} if vm == "B" else set())
    # KVM leaves LDTR as a reset does: usable with a null selector.
    assert [item.field for item in found["LDTR"].differences] == ["UNUSABLE"] and "reset" in found["LDTR"].differences[0].why
    assert {item.field for item in found["FS"].differences} <= {"base", "TYPE"} and not found["FS"].matters


def test_amd_guest_segments_agree_with_the_debugger(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """VMCB attributes against QEMU's `info registers` is another machine state; against the compiler's decoding of the same page it is exact."""
    machine = open_machine(str(amd_exit))
    vmcb = Vmcb.from_page(machine.memory.read_page(int(amd_exit_truth["vmcb_pa"], 16)))
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        truth = {key: int(value, 16) for key, value in amd_exit_truth["vmcb"]["save"][name].items()}
        state = svm_segments.segment(vmcb, name.upper())
        assert (state.selector, state.base, state.limit) == (truth["sel"], truth["base"], truth["limit"])
        assert d.vmcb_attrib(state.access_rights) == truth["attrib"]
    hpa = {row["gpa"]: row["hpa_pagemap"] for row in amd_exit_truth["gpa_truth"] if row["status"] == "OK"}
    guest = memory_from_segments([(0x5000, machine.memory.read_page(int(hpa["0x5000"], 16)))])
    found = {one.state.name: one for one in svm_segments.compare_guest(vmcb, guest)}
    assert [name for name, one in found.items() if one.matters] == []
    assert found["CS"].row.descriptor.access_rights == 0xA09B or found["CS"].differences[0].field == "TYPE"


def test_amd_host_tables_by_the_debuggers_registers(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """QEMU's `info registers` has the GDT and IDT registers; the IDT's handlers have the addresses that /proc/kallsyms gave them."""
    text = amd_exit_truth["stage"]["info_registers"]
    memory = open_machine(str(amd_exit)).memory
    cr3 = int(re.search(r"CR3=([0-9a-f]+)", text).group(1), 16)
    base, limit = (int(part, 16) for part in re.search(r"GDT= +([0-9a-f]+) ([0-9a-f]+)", text).groups())
    linear = Linear(memory, cr3)
    table = read_table(linear, base, limit, long_mode=True)
    cs = re.search(r"CS =([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)", text)
    row = table.by_selector(int(cs.group(1), 16))
    # QEMU prints the descriptor's second dword without the base: access rights 8 bits higher than the VMCS keeps them.
    assert row.descriptor.access_rights == int(cs.group(4), 16) >> 8 & 0xF0FF
    assert row.descriptor.limit == int(cs.group(3), 16)
    tss = next(row.descriptor for row in table.rows if row.descriptor.kind == "tss")
    assert tss.base == 0xFFFFFE0000003000 and table.rows[0].descriptor.kind == "null"
    assert amd_exit_truth["l1_va_to_pa"]["0xfffffe0000003000"] == "0x5806000"
    task = read_tss(linear, tss.base, tss.limit)
    assert task.problems == () and task.get("RSP0") >> 47 == 0x1FFFF and task.get("IST1") >> 47 == 0x1FFFF
    assert task.io_bitmap.covered == 0 and task.io_bitmap.allows(0x80) is False


# ---- the forms ------------------------------------------------------------------------------------------------------------------------

def test_a_null_selector_is_unusable_whatever_entry_0_holds() -> None:
    """What the users' notes get wrong when they write the bits of GDT entry 0: only the unusable bit counts for a null selector."""
    found = d.decode(bytes.fromhex("ffff0000009bcf00"))
    assert d.access_rights_for(0x3, found) == d.access_rights_for(0, None) == 0x10000
    assert d.access_rights_for(0x8, found) == 0xC09B
    assert d.vmcb_attrib(0x10000) == 0 and d.from_vmcb_attrib(0) == 0x10000


def test_the_limit_bits_are_masked_out_of_the_access_rights() -> None:
    """Bits 11:8 of the word are reserved and VM entry checks them: the descriptor's limit 19:16 is there before masking."""
    found = d.decode((0x00CF93000000FFFF).to_bytes(8, "little"))
    assert (0x00CF93000000FFFF >> 40) & 0xFFFF == 0xCF93 and found.access_rights == 0xC093


@pytest.mark.parametrize("hexa, long_mode, expected", [
    ("ffff0000009acf00", False, ("code", "code, execute/read", 32, 0, 0xFFFFFFFF)),
    ("67000050008b0000", False, ("tss", "32-bit TSS (busy)", 32, 0x5000, 0x67)),
    ("6700005000890000feffffff00000000", True, ("tss", "64-bit TSS (available)", 64, 0xFFFFFFFE00005000, 0x67)),
    ("0f00002000820000", False, ("ldt", "LDT", 0, 0x2000, 0xF)),
    ("0000000000960000", False, ("data", "data, read/write, expand-down", 16, 0, 0)),
    ("0000000000810000", True, ("reserved", "reserved type 0x1", 0, 0, 0)),
    ("0000000000000000", True, ("null", "null", 0, 0, 0)),
])
def test_segment_descriptors(hexa: str, long_mode: bool, expected: "tuple[str, str, int, int, int]") -> None:
    found = d.decode(bytes.fromhex(hexa), long_mode)
    assert (found.kind, found.type_name, found.bits, found.base, found.limit) == expected


@pytest.mark.parametrize("hexa, long_mode, expected", [
    ("341210000385785600fffffff00000000"[:32], True, None),
    ("34121000018e7856ffffffff00000000", True, ("interrupt gate", 64, 0x10, 0xFFFFFFFF56781234, 0, 1, True)),
    ("34120800008f7856", False, ("trap gate", 32, 0x08, 0x56781234, 0, 0, True)),
    ("3412080000e60000", False, ("interrupt gate", 16, 0x08, 0x1234, 3, 0, True)),
    ("0000280000850000", False, ("task gate", 0, 0x28, 0, 0, 0, True)),
])
def test_idt_gates(hexa: str, long_mode: bool, expected: "tuple[str, int, int, int, int, int, bool] | None") -> None:
    found = d.decode_gate(bytes.fromhex(hexa), long_mode)
    if expected is None:
        assert found.kind == "reserved" and found.problems            # type 5 does not exist in IA-32e mode
        return
    assert (found.kind, found.bits, found.selector, found.offset, found.dpl, found.ist, found.present) == expected


def test_half_of_a_wide_descriptor_is_refused() -> None:
    """The upper half of a 64-bit TSS base is not invented."""
    with pytest.raises(FormatError, match="16"):
        d.decode(bytes.fromhex("6700005000890000"), long_mode=True)
    with pytest.raises(FormatError, match="8"):
        d.decode(b"abc")
    with pytest.raises(FormatError, match="16"):
        d.decode_gate(bytes(8), long_mode=True)


def test_impossible_limits_are_refused_by_the_encoder() -> None:
    with pytest.raises(FormatError, match="fff"):
        d.encode_segment(0, 0xFFFFF000, 0x809B)
    with pytest.raises(FormatError, match="20 bits"):
        d.encode_segment(0, 0x100000, 0x009B)
    with pytest.raises(FormatError, match="reserved"):
        d.encode_segment(0, 0, 0xCF9B)


RIGHTS = st.integers(0, 0xFFFF).map(lambda word: word & d.AR_MASK | 0x10)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFF), RIGHTS)
def test_segment_round_trip(base: int, limit_field: int, rights: int) -> None:
    limit = d.limit_of(limit_field, bool(rights & 0x8000))
    found = d.decode(d.encode_segment(base, limit, rights), long_mode=True)
    assert (found.base, found.limit, found.access_rights) == (base, limit, rights)
    back = d.from_vmcb_attrib(d.vmcb_attrib(rights))
    assert back & 0xFFFF == rights and bool(back & d.AR_UNUSABLE) == (not rights & 0x80)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFFF), st.sampled_from([0x82, 0x89, 0x8B, 0xE9]))
def test_wide_system_descriptor_round_trip(base: int, limit: int, rights: int) -> None:
    found = d.decode(d.encode_segment(base, limit, rights, 16), long_mode=True)
    assert (found.base, found.limit, found.access_rights, found.size, found.problems) == (base, limit, rights, 16, ())


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([("interrupt gate", 64), ("trap gate", 32), ("interrupt gate", 16), ("trap gate", 64)]), st.integers(0, 0xFFFF),
       st.integers(0, (1 << 64) - 1), st.integers(0, 3), st.integers(0, 7), st.booleans())
def test_gate_round_trip(kind: "tuple[str, int]", selector: int, offset: int, dpl: int, ist: int, present: bool) -> None:
    name, width = kind
    offset &= (1 << width) - 1
    ist = ist if width == 64 else 0
    found = d.decode_gate(d.encode_gate(name, selector, offset, width=width, dpl=dpl, present=present, ist=ist), width == 64)
    assert (found.kind, found.bits, found.selector, found.offset, found.dpl, found.ist, found.present) == (name, width, selector, offset, dpl, ist,
                                                                                                          present)


LIMITS = st.one_of(st.integers(-1, 0x400), st.integers(0x10000, 1 << 64))


@settings(deadline=None, max_examples=120)
@given(st.binary(min_size=0, max_size=96), st.booleans(), LIMITS, st.sampled_from([16, 32, 64]))
def test_any_bytes_decode_or_are_refused(data: bytes, long_mode: bool, limit: int, bits: int) -> None:
    for decoder in (d.decode, d.decode_gate):
        for size in (8, 16):
            try:
                decoder(data[:size], long_mode)
            except FormatError:
                continue
    memory = memory_from_segments([(0x1000, data or b"\0")])
    assert len(read_table(memory, 0x1000, limit, long_mode).rows) <= 8192
    assert len(read_idt(memory, 0x1000, limit, long_mode).rows) <= 256
    tss = read_tss(memory, 0x1000, limit, bits)
    assert tss.get("LINK" if bits != 64 else "RSP0") is None or len(data) >= 2


# ---- tables with holes ------------------------------------------------------------------------------------------------------------------

def test_a_hole_is_a_row_that_says_so() -> None:
    good = d.encode_segment(0, 0xFFFFFFFF, 0xA09B)
    memory = memory_from_segments([(0xFF0, bytes(8) + good), (0x1008, good)])
    table = read_table(memory, 0xFF0, 0x1F, long_mode=True)
    assert [row.selector for row in table.rows] == [0, 8, 0x10, 0x18]
    assert table.rows[2].descriptor is None and "0x1000" in table.rows[2].unreadable
    assert table.rows[3].descriptor.access_rights == 0xA09B


def test_limits_cut_and_bound_tables() -> None:
    memory = memory_from_segments([(0, bytes(0x20000))])
    assert len(read_table(memory, 0, 0xFFFFFFFF, long_mode=False).rows) == 8192
    assert "0xffff" in read_table(memory, 0, 0xFFFFFFFF, long_mode=False).warnings[0]
    assert "3 bytes" in read_table(memory, 0, 0x12, long_mode=False).warnings[0]
    tss = memory_from_segments([(0, bytes(8) + d.encode_segment(0x5000, 0x67, 0x89, 16))])
    assert "upper half" in read_table(tss, 0, 0xF, long_mode=True).rows[1].unreadable
    assert "limit" in find_descriptor(tss, 0, 0xF, 0x10, long_mode=True).unreadable
    assert "upper half" in find_descriptor(tss, 0, 0xF, 0x8, long_mode=True).unreadable


def test_selectors_with_ti_look_into_the_ldt() -> None:
    code = d.encode_segment(0x1000, 0xFFFF, 0x9B)
    memory = memory_from_segments([(0x2000, bytes(8) + code)])
    state = SegmentState("CS", 0xF, 0x1000, 0xFFFF, 0x9B)
    assert compare_in_tables(state, (0, 0x7F), (0x2000, 0xF), Mode(long_mode=False, code64=False), memory).differences == ()
    assert "LDT" in compare_in_tables(state, (0, 0x7F), (None, None), Mode(long_mode=False, code64=False), memory).notes[0]


def test_a_null_selector_with_a_usable_segment() -> None:
    """Outside 64-bit mode it can be used until the register is reloaded; an LDT behind a null selector can be used in any mode."""
    memory = memory_from_segments([(0, bytes(8))])
    protected, wide = Mode(long_mode=False, code64=False), Mode(long_mode=True, code64=True)
    for mode, matters in ((protected, True), (wide, False)):
        assert compare_in_tables(SegmentState("ES", 3, 0, 0xFFFFFFFF, 0xC093), (0, 7), (None, None), mode, memory).matters is matters
    assert compare_in_tables(SegmentState("LDTR", 0, 0x5000, 0xF, 0x82), (0, 7), (None, None), wide, memory).matters is True
    assert compare_in_tables(SegmentState("ES", 0, 0, 0, 0x10000), (0, 7), (None, None), protected, memory).differences == ()
    assert compare_in_tables(SegmentState("TR", 0, 0, 0x67, 0x8B), (0, 7), (None, None), wide, memory).matters is True


# ---- TSS --------------------------------------------------------------------------------------------------------------------------------

def test_io_permission_bitmap_ends_two_bytes_before_the_limit() -> None:
    """The processor reads two bytes for every port: a port counts only if the byte after its own is inside the limit too
    (SDM vol. 1, I/O Permission Bit Map)."""
    data = bytearray(0x68 + 8192 + 1)
    data[0x66:0x68] = (0x68).to_bytes(2, "little")
    data[0x68:] = b"\xff" * 8193
    data[0x68 + 0x60 // 8] &= ~0x11 & 0xFF                       # ports 0x60 and 0x64
    data[0x68 + 0x3F8 // 8] = 0                                  # 0x3f8 to 0x3ff
    tss = decode_tss(bytes(data))
    assert tss.io_bitmap.open_ports == ((0x60, 0x60), (0x64, 0x64), (0x3F8, 0x3FF))
    assert tss.io_bitmap.allows(0x3F8, 4) is True and tss.io_bitmap.allows(0x3FE, 4) is False and tss.io_bitmap.allows(0x61) is False
    cut = decode_tss(bytes(data), limit=0x68 + 0x60 // 8)
    assert cut.io_bitmap.covered == 0x60 and cut.io_bitmap.open_ports == ()
    short = decode_tss(bytes(data[:0x80]), limit=0x68 + 8192)
    assert short.io_bitmap.open_ports is None and short.io_bitmap.allows(0x60) is None


def test_tss_fields_of_each_size() -> None:
    data = bytes(range(0x70))
    assert decode_tss(data, 64).get("RSP0") == int.from_bytes(data[4:12], "little")
    assert decode_tss(data, 64).get("IST7") == int.from_bytes(data[0x54:0x5C], "little")
    assert decode_tss(data, 32).get("ESP0") == int.from_bytes(data[4:8], "little")
    assert decode_tss(data, 16).get("LDT") == 0x2B2A
    assert "#TS" in decode_tss(data, 64, limit=0x60).problems[0] and decode_tss(data, 64, limit=0x60).get("IOMAP_BASE") is None
    with pytest.raises(FormatError):
        decode_tss(data, 8)
