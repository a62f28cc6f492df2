"""VMCS page layouts: decoding real pages, writing pages, recognition by content, and every way in which a page or a file can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.errors import FormatError, UnknownName, VtdbgError
from vtdbg.evidence import Evidence
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx import layouts as L
from vtdbg.vmx import plausibility
from vtdbg.vmx.layout_map import Layout, LayoutField
from vtdbg.vmx.vmcs import MissingField, Vmcs

ALL = sorted(L.layouts())
AR = sorted(L.ACCESS_RIGHTS_FIELDS)
VM_A, VM_B = 0x6826000, 0x6BD9000


def page_at(path: Path, address: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(address)
        return file.read(4096)


@pytest.fixture(scope="module")
def page_a(intel_plain: Path) -> bytes:
    return page_at(intel_plain, VM_A)


# --- the data ---------------------------------------------------------------------------------------------------------------------


def test_the_index_agrees_with_the_files_it_lists() -> None:
    folder = Path(L.__file__).parents[1] / "data/layouts"
    assert {path.stem for path in folder.glob("*.json")} == set(ALL)
    for row in L.index():
        if row.layout:
            layout = L.layout(row.layout)
            assert (layout.id, layout.revision_ids, layout.title) == (row.layout, row.revision_ids, row.title)


@pytest.mark.parametrize("name", ALL)
def test_every_layout_says_where_it_is_from_and_what_for(name: str) -> None:
    layout = L.layout(name)
    assert layout.sources and layout.valid_for and layout.access_rights in L.ACCESS_RIGHTS_FORMS
    assert layout.extent <= layout.region_size <= 4096


def test_constants_of_the_rules_are_those_of_the_bit_tables() -> None:
    """The scan keeps numbers for speed; the bit tables with their citations are what they mean."""
    words = {plausibility.PIN: "pin", plausibility.PROC: "proc", plausibility.EXIT: "exit", plausibility.ENTRY: "entry"}
    for encoding, table in words.items():
        assert plausibility.DEFAULT1[encoding] == bits.table(table).kind_mask("default1")
    for table, defined in (("cr0", plausibility.CR0_DEFINED), ("cr4", plausibility.CR4_DEFINED), ("rflags", plausibility.RFLAGS_DEFINED)):
        nothing = bits.table(table).kind_mask("reserved0", "ignored", "undefined")
        assert defined == (1 << 64) - 1 & ~nothing, table


def test_revision_4_takes_only_what_nobody_measured_from_haswell() -> None:
    """Coffee Lake's map was found by VMWRITE: exit information and access rights cannot be found so, and equal Haswell's by inference."""
    coffee, haswell = L.layout("hw_coffee_lake_refresh"), L.layout("hw_haswell")
    for encoding, place in coffee.fields.items():
        read_only = encoding >> 10 & 3 == 1
        assert place.inferred == (read_only or encoding in L.ACCESS_RIGHTS_FIELDS), hex(encoding)
        if encoding in haswell.fields:
            assert (place.offset, place.size) == (haswell.fields[encoding].offset, haswell.fields[encoding].size)
    vmcs = Vmcs.from_page(coffee.write_page({"GUEST_RIP": 0x1000, "VM_EXIT_REASON": 12}), coffee)
    assert vmcs.source("GUEST_RIP") == "page offset 0x1d8, layout hw_coffee_lake_refresh"
    assert vmcs.source("VM_EXIT_REASON") == "page offset 0x16c, layout hw_coffee_lake_refresh, inferred from revision 18 (Haswell)"


@pytest.mark.parametrize("name, form, stored", [
    ("hw_haswell", 0xA09B, 0xA09B), ("hw_haswell", 0x1C000, 0xC800), ("hw_haswell", 0x10000, 0x0800),
    ("hw_sandy", 0xA09B, 0x00A09B00), ("hw_sandy", 0x10000, 0x01000000), ("bochs_2.7", 0xC093, 0x00C09300), ("kvm_vmcs12", 0x10000, 0x10000)])
def test_access_rights_are_stored_plain_rotated_or_packed(name: str, form: int, stored: int) -> None:
    """Rotated: published probes of Penryn to Sandy Bridge read back index << 24.  Packed: Bochs' VMCS_AR_PACK moves bit 16 to bit 11."""
    layout = L.layout(name)
    page = layout.write_page({"GUEST_CS_AR_BYTES": form})
    place = layout.fields[0x4816]
    assert int.from_bytes(page[place.offset:place.offset + place.size], "little") == stored
    assert Vmcs.from_page(page, layout)["GUEST_CS_AR_BYTES"] == form


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_access_rights_in_another_form_than_the_layouts_are_noticed(form: str, page_a: bytes) -> None:
    """Bochs' CPU models may select the packed form: rotated, every one of them would have reserved bits."""
    layout = L.layout("bochs_2.7")
    values = {**layout.raw_values(page_a), 0x4820: 0x10000}
    page = replace(layout, access_rights=form).write_page(values)
    vmcs = Vmcs.from_page(page)
    assert {encoding: vmcs[encoding] for encoding in AR} == {encoding: values[encoding] for encoding in AR}
    assert any("rotated in layout bochs_2.7: " in warning and f"would have reserved bits, decoded as {form}" in warning for warning in vmcs.warnings)


def test_packed_access_rights_refuse_what_they_cannot_hold() -> None:
    for value in (0x20000, 0x800):
        with pytest.raises(FormatError, match="reserved bits that the packed form cannot hold"):
            L.layout("hw_haswell").write_page({"GUEST_CS_AR_BYTES": value})


def test_access_rights_of_an_unknown_form_are_not_decoded(page_a: bytes) -> None:
    known = L.layout("bochs_2.7")
    layout = Layout("mine", "mine", (0x2B,), 4096, "unknown", known.fields)
    vmcs = Vmcs.from_page(page_a, layout)
    assert "GUEST_CS_AR_BYTES" not in vmcs and "GUEST_CS_LIMIT" in vmcs
    with pytest.raises(MissingField, match="GUEST_CS_AR_BYTES .*is unknown: how layout mine stores access rights is not known"):
        vmcs["GUEST_CS_AR_BYTES"]


# --- writing and reading back -----------------------------------------------------------------------------------------------------


@st.composite
def field_values(draw: st.DrawFn, layout: Layout) -> Dict[int, int]:
    known = [encoding for encoding in layout.fields if layout.access_rights != "unknown" or encoding not in L.ACCESS_RIGHTS_FIELDS]
    chosen = draw(st.lists(st.sampled_from(known), unique=True, min_size=1, max_size=40))
    values = {}
    for encoding in chosen:
        if layout.access_rights == "packed" and encoding in L.ACCESS_RIGHTS_FIELDS:
            values[encoding] = draw(st.integers(0, 0xFFFF)) & 0xF7FF | draw(st.sampled_from([0, 1 << 16]))
        else:
            values[encoding] = draw(st.integers(0, (1 << vmcs_fields.find(encoding).size * 8) - 1))
    return values


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_written_page_decodes_to_its_values(name: str, data: st.DataObject) -> None:
    layout = L.layout(name)
    values = data.draw(field_values(layout))
    vmcs = Vmcs.from_page(layout.write_page(values), layout)
    if not any(values.values()):
        assert vmcs.empty
        return
    assert {encoding: vmcs[encoding] for encoding in values} == values
    assert all(value == 0 for name_, value in vmcs.items() if vmcs_fields.find(name_).encoding not in values)
    assert vmcs.warnings[-len(layout.caveats) or len(vmcs.warnings):] == list(layout.caveats)


@pytest.mark.parametrize("name", ALL)
def test_no_two_fields_of_a_layout_touch(name: str) -> None:
    """Writing ones to one field leaves every other field 0."""
    layout = L.layout(name)
    for encoding, place in layout.fields.items():
        page = bytearray(4096)
        page[place.offset:place.end] = b"\xff" * place.size
        assert [key for key, value in layout.raw_values(bytes(page)).items() if value] in ([encoding], [])


def test_write_page_says_what_it_cannot_do() -> None:
    layout = L.layout("hw_skylake")
    with pytest.raises(FormatError, match="hw_skylake: the layout has no place for HOST_RIP"):
        layout.write_page({"HOST_RIP": 1})
    with pytest.raises(FormatError, match="VIRTUAL_PROCESSOR_ID: value 0x10000 does not fit in 16 bits"):
        layout.write_page({"VPID": 0x10000})
    with pytest.raises(UnknownName, match="GUEST_RIP"):
        layout.write_page({"GUEST_RIPP": 1})


@pytest.mark.parametrize("name", ALL)
def test_a_saved_layout_loads_as_itself(name: str, tmp_path: Path) -> None:
    L.save_layout(L.layout(name), tmp_path / "x.json")
    assert L.load_layout(tmp_path / "x.json") == L.layout(name)


# --- real pages against what the kernel said --------------------------------------------------------------------------------------


def test_the_page_of_vm_b_is_what_the_kernel_printed(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """Every field of KVM's own dump_vmcs equals the decoded page, except EFER: KVM prints an effective value, the field is not loaded."""
    vm = intel_plain_truth["vms"]["B"]
    vmcs = Vmcs.from_page(page_at(intel_plain, int(vm["vmcs_pa"], 16)))
    said = {int(encoding, 16): int(value, 16) for encoding, value in vm["dump_vmcs_by_encoding"].items()}
    different = {encoding for encoding, value in said.items() if vmcs[encoding] != value}
    assert len(said) >= 100 and different == {0x2806}
    assert vmcs["GUEST_IA32_EFER"] == 0 and not vmcs["VM_ENTRY_CONTROLS"] >> 15 & 1
    assert (vmcs.layout.id, vmcs.revision_id, vmcs.shadow, vmcs.abort_indicator, vmcs.launch_state) == ("bochs_2.7", 0x2B, False, 0, 1)
    assert vmcs.layout.launch_state_name(vmcs.launch_state) == "launched"


def test_the_page_of_vm_a_is_what_the_ioctls_said(page_a: bytes, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM_GET_SREGS and KVM_GET_REGS; rip is behind the HLT, because KVM has skipped it in its cached copy."""
    vm, vmcs = intel_plain_truth["vms"]["A"], Vmcs.from_page(page_a)
    names = {"ldt": "LDTR"}
    for segment, said in vm["kvm_segments"].items():
        name = names.get(segment, segment.upper())
        assert vmcs[f"GUEST_{name}_SELECTOR"] == int(said["sel"], 16)
        assert vmcs[f"GUEST_{name}_BASE"] == int(said["base"], 16)
        assert vmcs[f"GUEST_{name}_LIMIT"] == int(said["limit"], 16)
        rights = vmcs[f"GUEST_{name}_AR_BYTES"]
        parts = {"type": rights & 15, "s": rights >> 4 & 1, "dpl": rights >> 5 & 3, "p": rights >> 7 & 1, "avl": rights >> 12 & 1,
                 "l": rights >> 13 & 1, "db": rights >> 14 & 1, "g": rights >> 15 & 1, "unusable": rights >> 16 & 1}
        assert parts == {part: int(said[part], 0) for part in parts}, segment
    assert vmcs["GUEST_CR0"] == int(vm["kvm_get_sregs"]["cr0"], 16) and vmcs["GUEST_CR3"] == int(vm["kvm_get_sregs"]["cr3"], 16)
    assert vmcs["GUEST_RSP"] == int(vm["kvm_get_regs"]["rsp"], 16) and vmcs["GUEST_RFLAGS"] == int(vm["kvm_get_regs"]["rflags"], 16)
    assert vmcs["GUEST_RIP"] + vmcs["VM_EXIT_INSTRUCTION_LEN"] == int(vm["kvm_get_regs"]["rip"], 16)
    assert vmcs["VM_EXIT_REASON"] == 12
    assert vmcs.source("GUEST_ES_SELECTOR") == "page offset 0x210, layout bochs_2.7"


def test_the_cached_vmcs12_is_what_get_nested_state_said(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """KVM_GET_NESTED_STATE hands out the vmcs12 itself; what the nested hypervisor had written by VMWRITE is at the fields' places."""
    nested = intel_nested_truth["nested"]
    page = page_at(intel_nested, int(nested["found"]["cached_vmcs12"], 16))
    for offset, words in nested["kvm_get_nested_state_vmcs12_words"].items():
        at = int(offset, 16)
        assert [page[at + 4 * i:at + 4 * i + 4][::-1].hex() for i in range(8)] == words
    vmcs = Vmcs.from_page(page)
    assert vmcs.layout.id == "kvm_vmcs12" and vmcs.revision_id == int(nested["vmcs12_revision"], 16)
    for field, value in nested["sentinels_in_current_vmcs12"].items():
        assert vmcs[field.split()[0]] == int(value, 16)
    assert {name: vmcs[name] for name in ("GUEST_LDTR_AR_BYTES", "GUEST_TR_AR_BYTES", "HOST_RSP", "VMCS_LINK_POINTER")} == {
        "GUEST_LDTR_AR_BYTES": 0x10000, "GUEST_TR_AR_BYTES": 0x8B, "HOST_RSP": 0x20F00, "VMCS_LINK_POINTER": (1 << 64) - 1}


def test_bit_31_marks_a_shadow_vmcs(intel_nested: Path) -> None:
    vmcs = Vmcs.from_page(page_at(intel_nested, 0x6BA3000))
    assert (vmcs.revision_id, vmcs.shadow, vmcs.layout.id) == (0x2B, True, "bochs_2.7")
    assert vmcs["GUEST_RIP"] == 0x1122334455667788


def test_a_page_that_holds_only_its_revision_id_has_no_values(intel_nested: Path) -> None:
    """The page of a current vmcs12: KVM's live copy is elsewhere, zeros here are not the fields' values."""
    vmcs = Vmcs.from_page(page_at(intel_nested, 0x2998000))
    assert vmcs.empty and len(vmcs) == 0 and vmcs.revision_id == 0x11E57ED0 and vmcs.get("GUEST_RIP") is None
    assert any("unknown, not 0" in warning for warning in vmcs.warnings)
    with pytest.raises(MissingField, match="GUEST_RIP .*holds nothing except its header"):
        vmcs["GUEST_RIP"]
    with pytest.raises(FormatError, match="only zeros: not a VMCS"):
        Vmcs.from_page(bytes(4096))


def test_a_field_in_the_third_dword_is_no_launch_state() -> None:
    """Hyper-V's enlightened VMCS has HOST_ES_SELECTOR at 8, where others keep the launch state."""
    layout = L.layout("hyperv_evmcs_v1")
    assert Vmcs.from_page(layout.write_page({"HOST_ES_SELECTOR": 0x18}), layout)["HOST_ES_SELECTOR"] == 0x18
    assert Vmcs.from_page(L.layout("bochs_2.7").write_page({}, launch_state=1), "bochs_2.7").empty


# --- recognition ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("address", [VM_A, VM_B])
def test_real_values_are_recognised_in_every_layout(name: str, address: int, intel_plain: Path) -> None:
    """The values of a real VMCS, written in each layout, are recognised as that layout or as one that decodes the page to the same values."""
    real = Vmcs.from_page(page_at(intel_plain, address))
    layout = L.layout(name)
    values = {value.field.encoding: value.value for value in real.values() if value.field.encoding in layout.fields}
    page = layout.write_page(values)
    for revision in layout.revision_ids:
        page = layout.write_page(values, revision_id=revision)
        found = L.candidates(page)
        if name == "vmware_nested_ws9":
            # Six published fields are too little to recognise; named by the user it decodes.
            with pytest.raises(FormatError, match="vmware_nested_ws9"):
                Vmcs.from_page(page)
            assert Vmcs.from_page(page, name)["GUEST_CR3"] == values[0x6802]
            continue
        vmcs = Vmcs.from_page(page)
        assert found[0].layout.id == vmcs.layout.id
        shared = [encoding for encoding in values if encoding in vmcs.layout.fields]
        assert len(shared) > 25 and all(vmcs[encoding] == values[encoding] for encoding in shared)
        if vmcs.layout.id != name:
            assert any(name in warning and "the same values" in warning for warning in vmcs.warnings)


KERNEL = st.integers(0xFFFF800000001000, 0xFFFFFFFFFFFFFFFF)
USER = st.integers(0x1000, 0x00007FFFFFFFFFFF)
PAGE = st.integers(1, (1 << 40) - 1).map(lambda number: number << 12)
SELECTOR = st.integers(1, 0x1FFF).map(lambda number: number << 3)


def control(encoding: int) -> "st.SearchStrategy[int]":
    """Default1 bits and any others that are defined."""
    table = bits.table({0x4000: "pin", 0x4002: "proc", 0x400C: "exit", 0x4012: "entry"}[encoding])
    allowed = (1 << 32) - 1 & ~table.kind_mask("reserved0")
    return st.integers(0, (1 << 32) - 1).map(lambda value: value & allowed | plausibility.DEFAULT1[encoding])


@st.composite
def valid_vmcs(draw: st.DrawFn) -> Dict[int, int]:
    """Values such as VM entry accepts them, everything else that the fields can hold drawn at random."""
    values = {encoding: draw(control(encoding)) for encoding in (0x4000, 0x4002, 0x400C, 0x4012)}
    values.update({0x2800: (1 << 64) - 1, 0x6C00: 0x80050033, 0x6C04: draw(st.sampled_from([0x2000, 0x26E0, 0x3726F0])), 0x6C02: draw(PAGE),
                   0x6820: draw(st.integers(0, 0xCD5)) & 0xCD5 | 2, 0x6800: draw(st.sampled_from([0x80000031, 0x80050033, 0x31, 0x30])),
                   0x6804: draw(st.sampled_from([0x2000, 0x26E0])), 0x6802: draw(PAGE), 0x681A: 0x400, 0x201A: draw(PAGE) | 0x5E,
                   0x4816: draw(st.sampled_from([0xA09B, 0xC09B, 0x9B, 0x93])), 0x4822: 0x8B, 0x4402: draw(st.integers(0, 77))})
    values.update({encoding: draw(SELECTOR) for encoding in (0x0C02, 0x0C04, 0x0C0C)})
    values.update({encoding: draw(KERNEL) for encoding in (0x6C16, 0x6C14, 0x6C08, 0x6C0A, 0x6C0C, 0x6C0E)})
    values.update({encoding: draw(st.one_of(KERNEL, USER)) for encoding in (0x681E, 0x681C, 0x6810, 0x6814, 0x6816, 0x6818)})
    values.update({encoding: draw(st.integers(0, 0xFFFF)) for encoding in (0x0800, 0x0802, 0x0804, 0x0806, 0x080E, 0x4810, 0x4812)})
    values.update({encoding: draw(st.integers(0, (1 << 64) - 1)) for encoding in (0x2010, 0x6400, 0x6000, 0x6002)})
    values.update({encoding: draw(PAGE) for encoding in (0x2000, 0x2002, 0x2004)})
    return values


@pytest.mark.parametrize("name", [name for name in ALL if name != "vmware_nested_ws9"])
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(values=valid_vmcs())
def test_a_valid_vmcs_is_recognised_or_refused_and_never_misread(name: str, values: Dict[int, int]) -> None:
    layout = L.layout(name)
    stored = {encoding: value for encoding, value in values.items() if encoding in layout.fields}
    try:
        vmcs = Vmcs.from_page(layout.write_page(stored))
    except FormatError as error:
        assert name in str(error) and "--layout" in str(error)
        # Few layouts know so little that a real VMCS can stay below the line.
        assert len(layout.fields) < 40
        return
    assert vmcs.layout is not None
    assert all(vmcs[encoding] == value for encoding, value in stored.items() if encoding in vmcs.layout.fields)


def test_an_equal_decoding_is_named_and_no_conflict(page_a: bytes) -> None:
    """Bochs 2.8 and 3.0 keep the fields that both have at the same places."""
    values = {encoding: value for encoding, value in L.layout("bochs_2.7").raw_values(page_a).items() if encoding in L.layout("bochs_2.8").fields}
    vmcs = Vmcs.from_page(L.layout("bochs_2.8").write_page(values))
    assert vmcs.warnings[0] == f"the content does not tell layout {vmcs.layout.id} from " + (
        "bochs_2.8" if vmcs.layout.id == "bochs_3.0" else "bochs_3.0") + ": they decode this page to the same values"


def test_evidence_says_why_in_words(page_a: bytes) -> None:
    best = L.candidates(page_a)[0]
    assert best.fits and best.score == sum(item.points for item in best.evidence)
    texts = [item.text for item in best.evidence]
    assert "VMCS_LINK_POINTER 0xffffffffffffffff is all ones" in texts
    assert "every byte that is not 0 belongs to a field" in texts
    wrong = next(item for item in L.candidates(page_a) if item.layout.id == "bochs_3.0")
    assert not wrong.fits and any("lacks default1 bits" in item.text for item in wrong.evidence)
    assert str(Evidence(-4, "x")) == "x (-4)"


def test_a_vmcs_with_a_wrong_field_is_still_one(intel_plain: Path) -> None:
    """People look at a VMCS because something in it is wrong: any one field may be."""
    layout = L.layout("bochs_2.7")
    values = layout.raw_values(page_at(intel_plain, VM_B))
    for encoding in (0x4000, 0x4002, 0x400C, 0x4012, 0x2800, 0x6C00, 0x6C04, 0x6C16, 0x6820, 0x4816, 0x201A):
        page = layout.write_page({**values, encoding: 0x5A5A5A5A})
        assert Vmcs.from_page(page).layout.id == "bochs_2.7"


def swapped(layout: Layout, one: int, other: int) -> Layout:
    fields = dict(layout.fields)
    fields[one], fields[other] = fields[other], fields[one]
    return Layout("swapped", "two fields exchanged", layout.revision_ids, 4096, layout.access_rights, fields, launch_state=layout.launch_state,
                  launch_states=layout.launch_states, complete=layout.complete)


def test_two_layouts_that_fit_equally_well_are_not_guessed_between(page_a: bytes) -> None:
    """GUEST_RIP and GUEST_RSP exchanged: both readings are plausible, so the error lists both with their scores and the way out."""
    rival = swapped(L.layout("bochs_2.7"), 0x681E, 0x681C)
    with pytest.raises(FormatError) as error:
        L.decode_page(page_a, extra=[rival])
    text = str(error.value)
    assert "more than one layout fits" in text and "bochs_2.7 126" in text and "swapped 126" in text and "--layout" in text
    assert L.decode_page(page_a, "bochs_2.7", extra=[rival])["GUEST_RIP"] == 0x1009D
    assert L.decode_page(page_a, rival)["GUEST_RIP"] == 0x20FF8


def test_a_forced_layout_is_used_and_what_speaks_against_it_is_said(page_a: bytes) -> None:
    vmcs = Vmcs.from_page(page_a, "bochs_3.0")
    assert vmcs.layout.id == "bochs_3.0"
    assert any("layout bochs_2.7 fits the content better (126 points)" in warning for warning in vmcs.warnings)
    vmcs = Vmcs.from_page(page_a, "hw_haswell")
    assert any("the revision identifier 0x2b is not one of layout hw_haswell (0x12)" in warning for warning in vmcs.warnings)


def test_an_unknown_revision_id_names_itself_and_what_to_try() -> None:
    with pytest.raises(FormatError, match=r"revision identifier 0x777 .*known: 0x1, .*--layout"):
        Vmcs.from_page((0x777).to_bytes(4, "little") + b"\0" * 100 + b"\x01" * 3992)
    with pytest.raises(FormatError, match=r"0x13 fits the content .*also that of Core i9-14900K.*unpublished, .*--layout NAME\|FILE"):
        Vmcs.from_page((0x13).to_bytes(4, "little") + b"\0" * 100 + b"\x01" * 3992)


def test_slots_that_hold_more_than_the_field_are_told() -> None:
    """Xen keeps each field in 8 bytes: a 16-bit field whose slot holds more is cut, and the reader is told."""
    layout = L.layout("xen_vvmcs")
    page = bytearray(layout.write_page({"GUEST_RIP": 0x1000, "GUEST_ES_SELECTOR": 0x10}))
    page[layout.fields[0x0800].offset + 2] = 1
    vmcs = Vmcs.from_page(bytes(page), layout)
    assert vmcs["GUEST_ES_SELECTOR"] == 0x10
    assert any("more bits than the field has" in warning and "GUEST_ES_SELECTOR" in warning for warning in vmcs.warnings)


# --- pages that are wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 15, 4097, 8192])
def test_a_page_of_impossible_size_is_refused(size: int, page_a: bytes) -> None:
    with pytest.raises(FormatError, match=f"{size} bytes cannot be a VMCS region"):
        Vmcs.from_page((page_a * 2)[:size])


@pytest.mark.parametrize("layout", [None, "bochs_2.7"])
def test_a_cut_page_decodes_whole_or_not_at_all(layout: "str | None", page_a: bytes) -> None:
    whole = Vmcs.from_page(page_a)
    for size in [*range(16, 4096, 61), 3975, 3976]:
        if size >= whole.layout.extent:
            assert dict(Vmcs.from_page(page_a[:size], layout).items()) == dict(whole.items())
            continue
        with pytest.raises(FormatError, match=rf"{size} bytes .*bochs_2\.7.* needs 3976"):
            Vmcs.from_page(page_a[:size], layout)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_arbitrary_bytes_raise_nothing_but_our_errors(data: st.DataObject) -> None:
    revision = data.draw(st.sampled_from([*L.revision_ids(), 0x13, 0]))
    body = data.draw(st.one_of(st.binary(min_size=12, max_size=4092), st.binary(min_size=1, max_size=32).map(lambda piece: (piece * 4092)[:4092])))
    page = (revision | data.draw(st.sampled_from([0, L.SHADOW_BIT]))).to_bytes(4, "little") + body
    try:
        vmcs = Vmcs.from_page(page, data.draw(st.sampled_from([None, *ALL])))
    except VtdbgError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 <= value.value < 1 << (value.field.size * 8) for value in vmcs.values())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=200))
def test_mutated_real_pages_decode_or_raise_our_errors(page_a: bytes, changes: List[Any]) -> None:
    page = bytearray(page_a)
    for at, value in changes:
        page[at] = value
    try:
        vmcs = Vmcs.from_page(bytes(page))
    except VtdbgError as error:
        assert "\n" not in str(error)
    else:
        # With few bytes changed nothing but Bochs 2.7's map can fit a page that carries its revision identifier.
        assert vmcs.layout is None or vmcs.layout.id == "bochs_2.7" or vmcs.revision_id != 0x2B


# --- layout files -----------------------------------------------------------------------------------------------------------------

GOOD: Dict[str, Any] = {"id": "mine", "revision_ids": ["0x777"], "fields": {"GUEST_RIP": "0x1c8", "0x4402": 364, "VMCS_GUEST_RSP": {"offset": 16}}}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_users_layout_file_decodes_a_page(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    layout = L.load_layout(path)
    assert layout.fields[0x681E] == LayoutField(0x1C8, 8) and layout.fields[0x681C].offset == 16 and layout.fields[0x4402].size == 4
    page = layout.write_page({"GUEST_RIP": 0x401000, "VM_EXIT_REASON": 48})
    for named in (path, str(path), layout):
        assert dict(Vmcs.from_page(page, named).items()) == {"VM_EXIT_REASON": 48, "GUEST_RSP": 0, "GUEST_RIP": 0x401000}
    with pytest.raises(FormatError, match=r"0x777 fits the content \(mine -?\d+; 20 points are needed\)"):
        L.decode_page(page, extra=[layout])


@pytest.mark.parametrize("change, message", [
    ({"fields": {"GUEST_RIPP": 16}}, "unknown VMCS field 'GUEST_RIPP'; did you mean GUEST_RIP"),
    ({"fields": {"GUEST_RIP": 100, "GUEST_RSP": 104}}, "GUEST_RSP at 0x68 to 0x70 overlaps GUEST_RIP at 0x64 to 0x6c"),
    ({"fields": {"GUEST_RIP": 4}}, "GUEST_RIP at 0x4 to 0xc overlaps header abort_indicator at 0x4 to 0x8"),
    ({"fields": {"GUEST_RIP": 4090}}, "GUEST_RIP at 0xffa to 0x1002 is outside the region of 0x1000 bytes"),
    ({"fields": {"GUEST_RIP": {"offset": 16, "size": 2}}}, r"GUEST_RIP \(natural width\) cannot be 2 bytes: 4 or 8"),
    ({"fields": {"GUEST_RIP": 16, "0x681e": 32}}, "GUEST_RIP is given twice, as 'GUEST_RIP' and '0x681e'"),
    ({"fields": {"GUEST_RIP": -8}}, "GUEST_RIP: '-8' is not a number that can be an offset"),
    ({"fields": {"GUEST_RIP": "here"}}, "GUEST_RIP: 'here' is not a number"),
    ({"fields": {"GUEST_RIP": {"size": 8}}}, "GUEST_RIP has no offset"),
    ({"fields": {"GUEST_RIP": {"offset": 16, "bytes": 8}}}, "GUEST_RIP: unknown key 'bytes'"),
    ({"fields": []}, "'fields' is not a JSON object"),
    ({"revision_ids": []}, "'revision_ids' needs at least one number below 0x80000000"),
    ({"revision_ids": ["0x8000002b"]}, "'revision_ids' needs"),
    ({"access_rights": "sideways"}, "'access_rights' is 'sideways', not one of plain, rotated, packed, unknown"),
    ({"access_rights": []}, "'access_rights' is"),
    ({"region_size": 8192}, "'region_size' is 8192"),
    ({"header": {"revision_id": [4, 4]}}, r"header revision_id has to be \[0, 4\]"),
    ({"header": {"revision_id": [0, 4], "launch": [8, 4]}}, "unknown header part 'launch'"),
    ({"feilds": {}}, "unknown key 'feilds'; did you mean fields"),
    ({"other": {"mine": [16, 0]}}, "other mine has no bytes"),
    ({"complete": "yes"}, "'complete' is not true or false"),
    ({"sources": "me"}, "'sources' is not a list"),
])
def test_a_wrong_layout_file_is_one_line_with_file_and_place(change: Dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, **change})
    with pytest.raises(FormatError, match=message) as error:
        L.load_layout(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("{", "not a layout file"), ("", "not a layout file"), ("[]", "is not a JSON object"), ("[" * 100000, "not a layout file"),
    ('{"id": "a", "id": "b"}', "'id' is given twice"), ('{"id": "a"}', "the key 'revision_ids' is missing"), ("\x00\x01", "not a layout file")])
def test_a_file_that_is_no_layout(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        L.load_layout(write(tmp_path, text))


def test_a_layout_file_that_is_not_there_or_binary_or_huge(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read the layout file"):
        L.load_layout(tmp_path / "none.json")
    with pytest.raises(FormatError, match="cannot read the layout file"):
        L.load_layout(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not a layout file"):
        L.load_layout(tmp_path / "b.json")
    with open(tmp_path / "h.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(FormatError, match="larger than 1 MiB"):
        L.load_layout(tmp_path / "h.json")


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_layout_files_load_or_say_why(data: st.DataObject, tmp_path: Path) -> None:
    text = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        L.parse_layout(bytes(text), "mine.json")
    except FormatError as error:
        assert str(error).startswith("mine.json") and "\n" not in str(error)


def test_layouts_are_found_by_name_in_any_case_and_near_names_are_suggested() -> None:
    assert L.find_layout("HW_Haswell") is L.layout("hw_haswell")
    with pytest.raises(UnknownName, match="unknown layout 'hw_haswel'; did you mean hw_haswell"):
        L.find_layout("hw_haswel")
    with pytest.raises(UnknownName, match="bochs_2.7"):
        L.layouts()["zzz"]
