"""The VMCB page against a compiler's debug information for Linux' `struct vmcb`, names, provenance, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg.errors import FormatError, UnknownName
from vtdbg.memory.open import open_machine
from vtdbg.svm import fields
from vtdbg.svm.gates import unused_because
from vtdbg.svm.vmcb import MissingField, Vmcb

VMCB_ADDRESS = 0x1F22000
DATA = Path(__file__).parent / "data" / "amd"


def page_of(path: Path) -> bytes:
    return open_machine(path).memory.read(VMCB_ADDRESS, 4096)


@pytest.fixture(scope="session", params=["exit", "l2"])
def dump(request: pytest.FixtureRequest) -> Tuple[bytes, Dict[str, Any]]:
    path = request.getfixturevalue(f"amd_{request.param}")
    return page_of(path), json.loads((DATA / f"kvm96-{request.param}.vmcb-dwarf.json").read_text())


def dwarf_values(members: Dict[str, Any]) -> Iterator[Tuple[str, int, int]]:
    """(name, offset, value) of every member of struct vmcb that the compiler described."""
    for name, member in members.items():
        offset = int(member["off"], 16)
        if "vals" in member:
            yield from ((f"{name}[{index}]", offset + 4 * index, int(word, 16)) for index, word in enumerate(member["vals"]))
        elif "hex" in member:
            yield name, offset, int.from_bytes(bytes.fromhex(member["hex"]), "little")
        else:
            yield name, offset, int(member["val"], 16)


def test_every_member_that_the_compiler_knows_has_the_same_place_and_value(dump: Tuple[bytes, Dict[str, Any]]) -> None:
    """Offset and name of each DWARF member of struct vmcb are those of the table, and its value is the one decoded from the page."""
    page, dwarf = dump
    vmcb = Vmcb.from_page(page)
    compared = 0
    for name, offset, value in dwarf_values(dwarf):
        if "reserved" in name:
            assert fields.get(offset) is None
            continue
        assert fields.find(name).offset == offset, name
        assert vmcb[name] == value, name
        assert vmcb[offset] == value, name
        compared += 1
    assert compared == 96


def test_the_kernels_own_account_of_the_guest_agrees(dump: Tuple[bytes, Dict[str, Any]]) -> None:
    """The guest program printed CR3, GDT and TR base; the VMCB holds the same."""
    vmcb = Vmcb.from_page(dump[0])
    assert (vmcb["cr3"], vmcb["gdtr.base"], vmcb["gdtr.limit"]) == (0x1000, 0x5000, 0x3F)
    assert (vmcb["tr.base"], vmcb["tr.selector"]) == (0xFFFF800000002000, 0x30)


@pytest.mark.parametrize("name", ["rip", "save.rip", "RIP", "GUEST_RIP", "0x578", 0x578, "SVM_GUEST_RIP"])
def test_a_field_has_many_names(name: object) -> None:
    assert fields.find(name).name == "rip"  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "canonical"), [
    ("control.exit_code", "exit_code"), ("EXITCODE", "exit_code"), ("exitcode", "exit_code"), ("N_CR3", "nested_cr3"), ("_h_cr3", "nested_cr3"),
    ("NCr3", "nested_cr3"), ("SVM_CONTROL64_EXITINFO1", "exit_info_1"), ("exit_info1", "exit_info_1"), ("CsSelector", "cs.selector"),
    ("save.cs.sel", "cs.selector"), ("lbr_ctl", "virt_ext"), ("misc_ctl2", "virt_ext"), ("gpat", "g_pat"),
    ("pause filter count", "pause_filter_count"),
    ("_general1_intercepts", "intercept_misc1"), ("control.intercept[4]", "intercept_misc2"), ("VmcbClean", "clean"), ("excp_to", "last_excp_to")])
def test_names_of_linux_bochs_xen_the_apm_and_logs_find_the_field(name: str, canonical: str) -> None:
    assert fields.find(name).name == canonical


def test_provenance_is_the_offset() -> None:
    vmcb = Vmcb.from_page(bytes(4096))
    assert vmcb.source("exit_code") == "VMCB offset 0x70"
    assert Vmcb.from_page(bytes(4096), source="VMCB at 0x0").source("rip") == "VMCB at 0x0 offset 0x578"
    assert Vmcb.from_values({"rip": 1}, source="text line 3").source("rip") == "text line 3"


def test_what_is_absent_is_unknown_and_never_zero() -> None:
    vmcb = Vmcb.from_values({"rip": 0})
    assert vmcb["rip"] == 0
    assert vmcb.get("rsp") is None
    assert "rsp" not in vmcb
    with pytest.raises(MissingField, match="rsp .RSP. is unknown"):
        vmcb["rsp"]


def test_an_unknown_name_suggests_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean exit_code"):
        Vmcb.from_values({})["save.exit_coed"]
    with pytest.raises(UnknownName, match=r"0x70 \(exit_code, 8 bytes\)"):
        Vmcb.from_values({})["0x74"]


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="does not fit in 16 bits"):
        Vmcb.from_values({"cs.selector": 0x10000})
    with pytest.raises(FormatError, match="does not fit"):
        Vmcb.from_values({"rip": -1})


@pytest.mark.parametrize("layout", sorted(fields.LAYOUTS))
def test_no_two_fields_overlap_and_every_row_is_complete(layout: str) -> None:
    rows = list(fields.fields(layout).values())
    for row, following in zip(rows, rows[1:]):
        assert row.offset + row.size <= following.offset
    for row in rows:
        assert row.group in fields.GROUPS and row.notes and row.offset + row.size <= 4096
        assert row.table is None or row.table.width <= row.size * 8 or row.bits in ("int_state", "event_inj", "svm_exit_int_info"), row.name


def test_the_encrypted_save_area_has_its_own_layout() -> None:
    """The VMSA begins with the segments: its RIP is at 0x178, where the VMCB has RIP at 0x400 + 0x178 (Linux struct sev_es_save_area)."""
    page = bytearray(4096)
    page[0x178:0x180] = (0xFFFF800000001234).to_bytes(8, "little")
    page[0x308:0x310] = (0x5A5A).to_bytes(8, "little")
    vmsa = Vmcb.from_page(bytes(page), layout="vmsa")
    assert (vmsa["rip"], vmsa["rcx"], vmsa.source("rip")) == (0xFFFF800000001234, 0x5A5A, "VMSA offset 0x178")
    shared = set(fields.names("vmsa")) & set(fields.names()) - {"tsc_offset", "event_inj"}
    assert len(shared) > 60
    for name in shared:
        assert fields.find(name).offset == fields.find(name, "vmsa").offset + 0x400, name


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=4200))
def test_any_bytes_give_values_or_one_error(data: bytes) -> None:
    """Each value is exactly its bytes; a cut page leaves the rest unknown and says so."""
    if not 0 < len(data) <= 4096:
        with pytest.raises(FormatError):
            Vmcb.from_page(data)
        return
    vmcb = Vmcb.from_page(data)
    for value in vmcb.values():
        assert value.data == data[value.field.offset:value.field.offset + value.field.size]
    for row in fields.fields().values():
        assert (row.name in vmcb) == (row.offset + row.size <= len(data))
    assert any("unknown" in warning for warning in vmcb.warnings) == (len(vmcb) < len(fields.fields()))


def test_sev_es_save_area_is_not_the_guests() -> None:
    page = bytearray(4096)
    page[0x90] = 5
    assert any("VMSA" in warning for warning in Vmcb.from_page(bytes(page)).warnings)


def test_replaced_keeps_the_rest() -> None:
    vmcb = Vmcb.from_values({"rip": 1, "rsp": 2})
    changed = vmcb.replaced({"rsp": 3}, source="test")
    assert dict(changed.items()) == {"rip": 1, "rsp": 3}
    assert changed.source("rsp") == "test"
    assert dict(changed.without("rip").items()) == {"rsp": 3}


UNUSED = [
    ({"nested_ctl": 0}, "nested_cr3", "nested paging is off"),
    ({"nested_ctl": 0}, "g_pat", "nested paging is off"),
    ({"event_inj": 0x306}, "event_inj", r"not valid: a past event \(vector 6, exception\)"),
    ({"event_inj": 0}, "event_inj", "no event"),
    ({"event_inj": 0x80000306}, "event_inj_err", "EV of event_inj is 0"),
    ({"event_inj": 0x306}, "event_inj_err", "V of event_inj is 0"),
    ({"exit_int_info": 0x306}, "exit_int_info", "past event"),
    ({"exit_code": 0x78}, "exit_info_1", r"not defined for this exit \(HLT\)"),
    ({"exit_code": 0x400}, "next_rip", "nRIP is saved for intercepted instructions"),
    ({"exit_code": 0x60}, "insn_bytes", "data accesses"),
    ({"exit_code": 2**64 - 1}, "exit_info_2", "VMRUN was refused"),
    ({"exit_code": 0xFFFFFFFF}, "exit_info_2", "VMRUN was refused"),
    ({"int_ctl": 0}, "avic_backing_page", "AVIC enable"),
    ({"int_ctl": 0}, "int_vector", "V_IRQ is 0"),
    ({"virt_ext": 0}, "br_from", "LBR virtualization"),
    ({"nested_ctl": 1}, "vmsa_pa", "SEV-ES"),
    ({"nested_ctl": 7}, "rip", "encrypted VMSA"),
    ({"intercept_misc1": 0}, "msrpm_base_pa", "MSR_PROT is 0"),
    ({}, "gdtr.selector", "no such part"),
]


@pytest.mark.parametrize(("values", "field", "reason"), UNUSED)
def test_a_field_that_does_not_count_says_why(values: Dict[str, int], field: str, reason: str) -> None:
    assert re.search(reason, unused_because(Vmcb.from_values(values), field) or "")


@pytest.mark.parametrize(("values", "field"), [
    ({"nested_ctl": 1}, "nested_cr3"), ({"event_inj": 0x80000306}, "event_inj"), ({"event_inj": 0x80000B0E}, "event_inj_err"),
    ({"exit_code": 0x400}, "exit_info_2"), ({"exit_code": 0x72}, "next_rip"), ({"exit_code": 0x400}, "insn_bytes"),
    ({"int_ctl": 1 << 31}, "avic_vapic_bar"), ({"nested_ctl": 0}, "rip"), ({}, "nested_cr3"),
    ({}, "exit_info_1"), ({"exit_code": 0x3F7}, "exit_info_1")])
def test_a_field_that_counts_or_of_which_nothing_is_known_has_no_reason(values: Dict[str, int], field: str) -> None:
    """A missing control makes the answer unknown, which is not "unused"."""
    assert unused_because(Vmcb.from_values(values), field) is None


def test_a_real_vmcb_says_what_does_not_count(dump: Tuple[bytes, Dict[str, Any]]) -> None:
    """KVM 6.1 without SEV and AVIC, with nested paging: N_CR3 and G_PAT count, GHCB and AVIC pointers do not."""
    vmcb = Vmcb.from_page(dump[0])
    unused = {row.name for row in fields.fields().values() if unused_because(vmcb, row)}
    assert {"ghcb_gpa", "vmsa_pa", "avic_backing_page", "br_from", "event_inj", "exit_int_info"} <= unused
    assert not {"nested_cr3", "g_pat", "rip", "exit_code", "msrpm_base_pa", "iopm_base_pa"} & unused
