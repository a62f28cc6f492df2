"""Differences of VMCSs and VMCBs; MTRRs and memory maps, which lints need."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vtdbg
from vtdbg import bits
from vtdbg.errors import FormatError
from vtdbg.memory_map import parse_memory_map
from vtdbg.record_diff import CLASSES, diff_records, meaning_of
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm import gates as vmcb_gates
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx import gates as vmcs_gates
from vtdbg.x86.mtrr import Mtrrs


def test_every_field_has_a_class_and_every_row_fits_a_field() -> None:
    for kind, rows in (("vmcs", vmcs_fields.fields().values()), ("vmcb", vmcb_fields.fields("vmcb").values())):
        for field in rows:
            assert meaning_of(kind, field, 0).name in CLASSES
            assert not meaning_of(kind, field, 0).why.startswith("nothing is known"), field.name
    for row in bits.read_rows("diff_classes.csv"):
        assert row["class"] in CLASSES and None not in row, row
        groups = vmcs_fields.GROUPS if row["kind"] == "vmcs" else vmcb_fields.GROUPS
        if row["match"].startswith("group:"):
            assert row["match"][6:] in groups
            continue
        known = vmcs_fields.find(row["match"]) if row["kind"] == "vmcs" else vmcb_fields.find(row["match"])
        assert known.name == row["match"]
        for ident in filter(None, row["bits"].split(";")):
            assert known.table is not None and ident in known.table.idents(), (row["match"], ident)


@settings(max_examples=40, deadline=None)
@given(values=st.dictionaries(st.sampled_from(sorted(vmcs_fields.fields())), st.integers(0, 0xFFFF), max_size=40),
       others=st.dictionaries(st.sampled_from(sorted(vmcs_fields.fields())), st.integers(0, 0xFFFF), max_size=40))
def test_a_difference_is_exactly_what_differs(values: Dict[Any, int], others: Dict[Any, int]) -> None:
    one, two = vtdbg.Vmcs.from_values(values), vtdbg.Vmcs.from_values(others)
    assert not diff_records("vmcs", one, one, vmcs_gates.unused_because).changes
    found = diff_records("vmcs", one, two, vmcs_gates.unused_because)
    assert {change.field.encoding for change in found.changes} == {key for key in values if key in others and values[key] != others[key]}
    assert found.equal == len([key for key in values if others.get(key) == values[key]])
    assert (len(found.only_before), len(found.only_after)) == (len(values.keys() - others.keys()), len(others.keys() - values.keys()))
    for change in found.changes:
        assert (change.before + change.step) % (1 << 4 * change.digits) == change.after
        if change.field.table is not None:
            shown = {bit.ident for bit in change.bits}
            flags = {row.ident for row in change.field.table.fields if row.kind == "flag" and row.mask & (change.before ^ change.after)}
            assert flags <= shown


def test_two_states_of_one_guest_differ_as_the_debugger_saw_them(amd_exit: Path, amd_l2: Path, amd_exit_truth: Dict[str, Any],
                                                                 amd_l2_truth: Dict[str, Any]) -> None:
    """The exit codes of both dumps are those that GDB read on the machine; nothing that is set once differs."""
    with vtdbg.open(str(amd_exit)).memory as first, vtdbg.open(str(amd_l2)).memory as second:
        one, two = (vtdbg.Vmcb.from_page(memory.read_page(0x1F22000)) for memory in (first, second))
    found = diff_records("vmcb", one, two, vmcb_gates.unused_because)
    changed = {change.name: change for change in found.changes}
    assert (changed["exit_code"].before, changed["exit_code"].after) == (
        int(amd_exit_truth["stage"]["exit_code"], 16), int(amd_l2_truth["stage"]["exit_code"], 16))
    assert {change.meaning.name for change in found.changes} == {"progress", "unused"}


def test_what_stands_for_a_takeover_is_suspicious() -> None:
    one = vtdbg.Vmcs.from_values({"HOST_RIP": 0xFFFFFFFFC0376F40, "GUEST_RIP": 0x1000, "GUEST_CR0": 0x80050033, "EXCEPTION_BITMAP": 0x60042})
    two = one.replaced({"HOST_RIP": 0xFFFFFFFFC0400000, "GUEST_RIP": 0x1003, "GUEST_CR0": 0x80040033, "EXCEPTION_BITMAP": 0x60040})
    found = {change.name: change for change in diff_records("vmcs", one, two, vmcs_gates.unused_because).changes}
    assert {name: change.meaning.name for name, change in found.items()} == {
        "HOST_RIP": "suspicious", "GUEST_CR0": "suspicious", "GUEST_RIP": "progress", "EXCEPTION_BITMAP": "control"}
    assert [str(bit) for bit in found["GUEST_CR0"].bits] == ["WP cleared"] and found["GUEST_RIP"].step == 3


def test_mtrrs_of_the_manuals_example() -> None:
    """SDM vol. 3, Base and Mask Calculations, example: 0-100 MiB WB but 64-68 MiB and 15-16 MiB UC, 8 MiB WC at 0xa0000000."""
    msrs = {0xFE: 8, 0x2FF: 0x800,
            0x200: 0x0000006, 0x201: 0xFFC000800, 0x202: 0x4000006, 0x203: 0xFFE000800, 0x204: 0x6000006, 0x205: 0xFFFC00800,
            0x206: 0x4000000, 0x207: 0xFFFC00800, 0x208: 0x0F00000, 0x209: 0xFFFF00800, 0x20A: 0xA0000001, 0x20B: 0xFFF800800,
            0x20C: 0, 0x20D: 0, 0x20E: 0, 0x20F: 0}
    mib = 1 << 20
    found = [(row.start // mib, row.end // mib, row.memory_type) for row in Mtrrs.from_msrs(msrs).types(0, 1 << 32)]
    assert found == [(0, 15, "WB"), (15, 16, "UC"), (16, 64, "WB"), (64, 68, "UC"), (68, 100, "WB"), (100, 2560, "UC"), (2560, 2568, "WC"),
                     (2568, 4096, "UC")]


def test_mtrrs_that_are_missing_are_unknown_and_not_the_default() -> None:
    """With FE=1 the first megabyte is what the fixed-range MTRRs say; a variable range that is not given could be anywhere."""
    assert [row.memory_type for row in Mtrrs.from_msrs({0xFE: 0, 0x2FF: 0xC06}).types(0, 0x200000)][0] is None
    assert {row.memory_type for row in Mtrrs.from_msrs({0xFE: 1, 0x2FF: 0x806}).types(0, 0x200000)} == {None}
    assert {row.memory_type for row in Mtrrs.from_msrs({0xFE: 1, 0x2FF: 0x006}).types(0, 0x200000)} == {"UC"}, "E=0: everything is UC"
    fixed = dict.fromkeys((592, 600, 616, 617, 618, 619, 620, 621, 622, 623), 434041037028460038)
    types = Mtrrs.from_msrs({0xFE: 0, 0x2FF: 0xC06, 0x259: 0, **fixed}).types(0, 0x200000)
    assert [(row.start, row.end, row.memory_type) for row in types] == [(0, 0xA0000, "WB"), (0xA0000, 0xC0000, "UC"), (0xC0000, 0x200000, "WB")]
    with pytest.raises(FormatError):
        Mtrrs.from_msrs({0x200: 6})


def test_memory_maps_as_a_kernel_prints_them(intel_plain_truth: Dict[str, Any]) -> None:
    """/proc/iomem of the fixture's host, and its e820 lines in the serial log of the same boot."""
    iomem = parse_memory_map("\n".join(intel_plain_truth["iomem"]))
    assert iomem == [(0x1000, 0x9F000), (0x100000, 0x7FF0000)]
    e820 = "[    0.0] BIOS-e820: [mem 0x0000000000001000-0x000000000009efff] usable\n" \
           "[    0.0] BIOS-e820: [mem 0x000000000009f000-0x000000000009ffff] reserved\n" \
           "[    0.0] BIOS-e820: [mem 0x0000000000100000-0x0000000007feffff] usable\n"
    assert parse_memory_map(e820) == iomem
    with pytest.raises(FormatError):
        parse_memory_map("nothing of the kind")
