"""A layout out of a page and known values: what is proved is right, what is not proved is not guessed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Dict, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import textdump
from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.errors import FormatError
from vtdbg.memory.open import open_machine
from vtdbg.render.text import render_text
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx import layouts
from vtdbg.vmx.infer import Sample, infer
from vtdbg.vmx.layout_file import load_layout, save_layout
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, SHADOW_BIT
from vtdbg.vmx.vmcs import Vmcs

VM_B = 0x6BD9000
LOG = Path(__file__).parent / "data/intel/kvm-bochs27.serial.log"


@pytest.fixture(scope="module")
def page(intel_plain: Path) -> bytes:
    with open_machine(intel_plain).memory as memory:
        return memory.read_page(VM_B)


@pytest.fixture(scope="module")
def printed() -> Dict[int, int]:
    """What KVM's dump_vmcs printed of this VMCS."""
    dump, = textdump.of_kind(textdump.parse(LOG.read_text(errors="replace")), "vmcs")
    return {value.field.encoding: value.value for value in dump.vmcs().values()}


def occurrences(page: bytes, data: bytes) -> List[int]:
    """By comparing at every place that a field can have."""
    return [at for at in range(8, 4096 - len(data) + 1, min(len(data), 4)) if page[at:at + len(data)] == data]


def rotated(value: int) -> int:
    return (value << 8 | value >> 24) & 0xFFFFFFFF


def test_every_field_of_bochs_whose_value_is_unique_is_rebuilt(page: bytes, printed: Dict[int, int]) -> None:
    """Bochs 2.7's layout out of one page and the text of dump_vmcs: all fields whose value stands once are placed where the layout has them."""
    truth = layouts.layout("bochs_2.7")
    found = infer([Sample(page, printed)])
    unique, several = {}, set()
    for encoding, value in printed.items():
        stored = rotated(value) if encoding in ACCESS_RIGHTS_FIELDS else value
        at = occurrences(page, stored.to_bytes(vmcs_fields.find(encoding).size, "little"))
        if value and len(at) == 1:
            unique[encoding] = truth.fields[encoding].offset
        elif value:
            several.add(encoding)
    assert {encoding: place.offset for encoding, place in found.layout.fields.items()} == unique and len(unique) >= 45
    assert found.layout.access_rights == "rotated" == truth.access_rights and found.layout.revision_ids == (0x2B,)
    # The others are listed with their candidates, the true place among them, and are not in the layout.
    places = {place.encoding: place for place in found.places}
    for encoding in several:
        assert places[encoding].status == "ambiguous" and truth.fields[encoding].offset in places[encoding].candidates
        assert places[encoding].count > 1 and encoding not in found.layout.fields
    best = found.agreements[0]
    assert (best.layout, best.different, best.same, best.explained) == ("bochs_2.7", 0, len(unique), best.compared)


def test_a_second_page_places_what_the_first_left_open(page: bytes, printed: Dict[int, int], intel_plain: Path) -> None:
    """Candidates are merged: a place counts only if every page has its value there."""
    with open_machine(intel_plain).memory as memory:
        other = memory.read_page(0x6826000)
    values = dict(Vmcs.from_page(other).items())
    by_encoding = {vmcs_fields.find(name).encoding: value for name, value in values.items()}
    one, both = infer([Sample(page, printed)]), infer([Sample(page, printed), Sample(other, by_encoding)])
    assert len(both.placed) > len(one.placed)
    truth = layouts.layout("bochs_2.7")
    assert all(truth.fields[encoding].offset == place.offset for encoding, place in both.layout.fields.items())


@pytest.mark.parametrize("name", ["bochs_2.7", "hw_haswell", "kvm_vmcs12"])
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(1, 1 << 30))
def test_a_written_page_gives_its_layout_back(name: str, seed: int) -> None:
    """With a value of its own in each field, every field is placed, in each form of access rights."""
    truth = layouts.layout(name)
    values: Dict[int, int] = {}
    for number, encoding in enumerate(truth.fields):
        size = vmcs_fields.find(encoding).size
        # Odd bytes that differ from each other and from their neighbours': no value begins inside another.
        start = (seed * 7 + number * 37) % 40000 + 0x4001
        values[encoding] = start if size == 2 else int.from_bytes(struct.pack("<HH", start, 0xC0F1)[:4], "little") | (
            (0xA5D30000 | start) << 32 if size == 8 else 0)
        if encoding in ACCESS_RIGHTS_FIELDS:
            values[encoding] = 0x10000 | number << 12 & 0xF000 | (seed + number) % 0x7F + 0x80
    page = truth.write_page(values)
    found = infer([Sample(page, values)])
    for place in found.placed:
        if place.encoding not in ACCESS_RIGHTS_FIELDS:
            assert place.candidates[0] == truth.fields[place.encoding].offset, vmcs_fields.find(place.encoding).name
    assert len(found.placed) > len(values) // 2


def test_every_form_of_access_rights_is_considered(page: bytes) -> None:
    encodings = sorted(ACCESS_RIGHTS_FIELDS)
    values = {encoding: 0x10000 | 0x8091 + 0x1000 * number for number, encoding in enumerate(encodings[:6])}
    for form, base in (("plain", "kvm_vmcs12"), ("rotated", "bochs_2.7"), ("packed", "hw_haswell"), ("packed", None)):
        if base is None:
            data = bytearray(struct.pack("<I", 0x2B) + bytes(4092))
            for number, value in enumerate(values.values()):
                struct.pack_into("<H", data, 0x100 + 2 * number, value & 0xFFFF | 1 << 11)
            made = bytes(data)
        else:
            known = layouts.layout(base)
            made = known.write_page({encoding: value for encoding, value in values.items() if encoding in known.fields})
        used = values if base is None else {encoding: value for encoding, value in values.items() if encoding in layouts.layout(base).fields}
        found = infer([Sample(made, used)])
        assert found.forms == (form,) and found.layout.access_rights == form and len(found.placed) == len(used), form


def test_two_fields_that_claim_one_place_lose_it() -> None:
    """RSP and RIP have one value, and it stands once: one of them is not where it seems."""
    made = bytearray(struct.pack("<I", 0x2B) + bytes(4092))
    struct.pack_into("<Q", made, 0x200, 0x123456789ABCDEF0)
    found = infer([Sample(bytes(made), {0x681E: 0x123456789ABCDEF0, 0x681C: 0x123456789ABCDEF0, 0x4402: 0x9ABCDEF0, 0x6800: 0x77, 0x6802: 0})])
    assert {place.encoding: place.status for place in found.places} == {
        0x681E: "conflict", 0x681C: "conflict", 0x4402: "conflict", 0x6800: "absent", 0x6802: "silent"}
    assert not found.layout.fields
    # The exit reason is only the lower half of RIP.
    found = infer([Sample(bytes(made), {0x681E: 0x123456789ABCDEF0, 0x4402: 0x9ABCDEF0})])
    assert {place.encoding: place.status for place in found.places} == {0x681E: "unique", 0x4402: "conflict"}


def test_the_file_is_read_back_and_decodes_the_page(page: bytes, printed: Dict[int, int], tmp_path: Path) -> None:
    found = infer([Sample(page, printed, "dmesg")], "mine")
    path = tmp_path / "mine.json"
    save_layout(found.layout, path)
    again = load_layout(path)
    assert again.fields == found.layout.fields
    vmcs = Vmcs.from_page(page, again)
    assert all(vmcs[encoding] == printed[encoding] for encoding in again.fields)


@settings(deadline=None, max_examples=40)
@given(data=st.binary(min_size=4088, max_size=4088),
       values=st.dictionaries(st.sampled_from(sorted(vmcs_fields.fields())), st.integers(0, 65535), max_size=30))
def test_lying_pages_are_bounded_and_what_is_placed_is_there(data: bytes, values: Dict[int, int]) -> None:
    made = struct.pack("<II", 0x2B, 0) + data
    found = infer([Sample(made, values)])
    for place in found.placed:
        if place.encoding not in ACCESS_RIGHTS_FIELDS:
            assert int.from_bytes(made[place.candidates[0]:place.candidates[0] + place.size], "little") == values[place.encoding]


def test_a_page_of_one_byte_repeated_places_nothing() -> None:
    found = infer([Sample(b"\x11" * 4096, {0x681E: 0x1111111111111111, 0x0802: 0x1111})])
    assert not found.placed and all(place.count > 500 and len(place.candidates) <= 512 for place in found.places)


def test_what_cannot_be_merged_is_refused(page: bytes) -> None:
    other = struct.pack("<I", 0x12 | SHADOW_BIT) + page[4:]
    with pytest.raises(FormatError, match="revision identifier is 0x12"):
        infer([Sample(page, {0x681E: 1}), Sample(other, {0x681E: 1}, "other")])
    with pytest.raises(FormatError, match="does not fit in 16 bits"):
        infer([Sample(page, {0x0802: 0x10000})])
    with pytest.raises(FormatError, match="one page"):
        infer([Sample(page[:100], {0x681E: 1})])


def test_the_command(intel_plain: Path, page: bytes, tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        session = Session()
        outcome = run_words(["vmcs", *words], session, lambda report, _options: render_text(report, 100))
        session.close()
        return outcome

    path, file = tmp_path / "mine.json", tmp_path / "page.bin"
    file.write_bytes(page)
    outcome = run("infer", "0x6bd9000", "--text", str(LOG), "--out", str(path), "--name", "mine", "-s", str(intel_plain))
    assert not outcome.error and "access rights  rotated" in outcome.text and "0xe88   8     0x681e    GUEST_RIP" in outcome.text
    read = run("get", "GUEST_RIP", "--at", "0x6bd9000", "--layout", str(path), "-s", str(intel_plain))
    assert "0x000000000001009e" in read.text and "offset 0xe88" in read.text
    # A file of one page and single values need no dump.
    alone = run("infer", str(file), "--value", "GUEST_RIP=0x1009e", "--value", "0x4402=0x80000021")
    assert "0xe88   8     0x681e    GUEST_RIP" in alone.text and "0x918   4     0x4402    VM_EXIT_REASON" in alone.text
    for words, message in ((("infer", str(file)), "no values"), (("infer", str(file), "--value", "GUEST_RIP"), "NAME=VALUE"),
                           (("infer", str(file), str(file), "--text", str(LOG)), "2 pages and 1 texts"),
                           (("infer", str(path), "--value", "GUEST_RIP=1"), "a file of one page has 4096"),
                           (("infer", str(file), "--value", "GUEST_RIP=0", "--out", str(path)), "nothing to write")):
        assert message in run(*words).error
