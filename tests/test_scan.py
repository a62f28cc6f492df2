"""Finding control blocks in memory: exactly the real ones, told apart, whatever the memory looks like."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.lanes import column, lanes, zero_lanes
from vtdbg.memory.base import PhysicalMemory, memory_from_segments
from vtdbg.memory.open import open_machine
from vtdbg.scanner import CLASSES, Found, relate, scan
from vtdbg.svm import recognise
from vtdbg.vmx import find, layouts
from vtdbg.vmx.find import Budget, find_in_ept
from vtdbg.vmx.layout_map import Layout
from vtdbg.vmx.vmcs import Vmcs

VM_A = 0x6826000


def by_address(found: List[Found]) -> Dict[int, str]:
    return {item.address: item.classification for item in found}


def real_page(path: Path, address: int) -> bytes:
    with open_machine(path).memory as memory:
        return memory.read_page(address)


# --- real memory ------------------------------------------------------------------------------------------------------------------


def test_two_vmcss_and_the_vmxon_region_among_ten_pages_with_the_revision_id(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM's page allocations: one VMCS for each VM and the VMXON region; seven other pages begin with 0x2b by accident."""
    machine = open_machine(intel_plain)
    found = list(scan(machine))
    assert by_address(found) == {VM_A: "vmcs", int(intel_plain_truth["vms"]["B"]["vmcs_pa"], 16): "vmcs", 0x6692000: "vmxon-region"}
    assert all(item.layout_id == "bochs_2.7" and item.score > 100 for item in found if item.classification == "vmcs")
    with_rejected = list(scan(machine, rejected=True))
    rejected = [item for item in with_rejected if item.classification == "rejected"]
    assert len(with_rejected) == 10 and len(rejected) == 7 and all(item.reason and "\n" not in item.summary for item in rejected)
    assert len({item.address for item in with_rejected}) == 10


def test_the_pages_of_nested_virtualization_are_told_apart(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """vmcs01, vmcs02, shadow VMCS, KVM's cached vmcs12, the guest's flushed and its stale vmcs12 page, and both VMXON regions."""
    machine = open_machine(intel_nested)
    found = relate(scan(machine), machine)
    truth = intel_nested_truth
    at = {name: int(words.split()[0], 16) for name, words in truth["nested"]["found"].items()}
    pages = {int(gpa, 16): int(hpa, 16) for gpa, hpa in truth["nested"]["gpa_to_hpa"].items()}
    assert by_address(found) == {
        at["vmcs01"]: "vmcs", at["vmcs02"]: "vmcs", at["shadow_vmcs"]: "shadow-vmcs", at["cached_vmcs12"]: "kvm-vmcs12",
        pages[0x31000]: "kvm-vmcs12", pages[0x32000]: "empty", pages[0x30000]: "empty",
        int(truth["vms"]["B"]["vmcs_pa"], 16): "vmcs", 0x6AC4000: "vmcs", 0x6691000: "vmxon-region"}
    said = {item.address: item.relations for item in found}
    assert f"its link pointer names the shadow VMCS at {at['shadow_vmcs']:#x}" in said[at["vmcs01"]]
    assert said[at["shadow_vmcs"]] == (f"the link pointer of {at['vmcs01']:#x} names it",)
    # KVM: one VPID for a virtual processor and its nested guest, unless the nested hypervisor asks for VPIDs of its own.
    assert f"same VPID 0x3 as {at['vmcs02']:#x}" in said[at["vmcs01"]]
    assert f"runs the guest of the nested VMCS at {pages[0x31000]:#x} (12 guest registers are equal)" in said[at["vmcs02"]]
    for gpa in (0x30000, 0x31000, 0x32000):
        assert f"guest page {gpa:#x} of the VM of {at['vmcs01']:#x}" in said[pages[gpa]]
    assert any("the hypervisor's own copy" in words for words in said[at["cached_vmcs12"]])


@pytest.mark.parametrize("which", ["amd_exit", "amd_l2"])
def test_the_vmcb_and_the_host_save_area(which: str, request: pytest.FixtureRequest) -> None:
    """KVM prints where its VMCB is; VM_HSAVE_PA was read from the MSR.  QEMU keeps the host's state there in the layout of a VMCB."""
    truth = request.getfixturevalue(f"{which}_truth")
    found = list(scan(open_machine(request.getfixturevalue(which))))
    assert by_address(found) == {int(truth["vmcb_pa"], 16): "vmcb", int(truth["vm_hsave_pa"], 16): "host-save-area"}
    assert [item.kind for item in found] == ["vmcb", "vmcb"] and found[0].score > 2 * recognise.FITS


def test_scanning_for_one_kind_only(intel_plain: Path, amd_exit: Path) -> None:
    assert list(scan(open_machine(intel_plain), kinds=("vmcb",))) == []
    assert list(scan(open_machine(amd_exit), kinds=("vmcs",))) == []
    with pytest.raises(UsageError, match="cannot scan for 'ept'"):
        scan(open_machine(amd_exit), kinds=("ept",))


def test_efer_filter_is_what_vmrun_accepts() -> None:
    """VMRUN fails when EFER.SVME is 0 or a reserved bit is 1; the bits are those of the EFER table."""
    mark = recognise.EFER
    assert mark.wanted == 1 << 12 == bits.table("efer")["SVME"].mask and mark.mask & ~mark.wanted == bits.table("efer").kind_mask("reserved0")
    assert all(value & mark.mask == mark.wanted for value in (0x1D00, 0x1D01, 0x1000))


def test_a_vmcb_that_vmrun_refuses_for_efer_is_found(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """Guest EFER without SVME is a common first mistake (VMRUN: VMEXIT_INVALID): the block is found, and what is wrong is said."""
    page = bytearray(real_page(amd_exit, int(amd_exit_truth["vmcb_pa"], 16)))
    page[0x4D0:0x4D8] = struct.pack("<Q", int(amd_exit_truth["vmcb"]["save"]["efer"], 16) & ~(1 << 12))
    found, = scan(memory_from_segments([(0x5000, bytes(page))]))
    assert (found.address, found.classification) == (0x5000, "vmcb") and "lacks SVME: VMRUN refuses it" in found.summary
    wanted, without = recognise.EFER, recognise.EFER_WITHOUT_SVME
    assert not any(value & wanted.mask == wanted.wanted and value & without.mask == without.wanted for value in range(1 << 16))
    # What VMRUN saves of the host has SVME: without it the page is something else.
    area = bytearray(real_page(amd_exit, int(amd_exit_truth["vm_hsave_pa"], 16)))
    area[0x4D0:0x4D8] = struct.pack("<Q", 0xD01)
    assert list(scan(memory_from_segments([(0x5000, bytes(area))]))) == []


# --- memory of every shape --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vmcs_page(intel_plain: Path) -> bytes:
    return real_page(intel_plain, VM_A)


@pytest.fixture(scope="module")
def vmcb_page(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> bytes:
    return real_page(amd_exit, int(amd_exit_truth["vmcb_pa"], 16))


def test_a_control_block_at_physical_0_is_found(vmcs_page: bytes, vmcb_page: bytes) -> None:
    """0 is an address like any other."""
    for page, kind in ((vmcs_page, "vmcs"), (vmcb_page, "vmcb")):
        found = list(scan(memory_from_segments([(0, page)])))
        assert [(item.address, item.classification) for item in found] == [(0, kind)]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_runs_may_begin_end_and_be_cut_anywhere(data: st.DataObject, vmcs_page: bytes, vmcb_page: bytes) -> None:
    """A page that lies across several stored runs is found like one that lies in a single run."""
    memory = bytes(4096) + vmcs_page + bytes(4096) + vmcb_page + bytes(100)
    base = 0x10000
    cuts = sorted({0, len(memory), *data.draw(st.lists(st.integers(1, len(memory) - 1), max_size=6))})
    segments = [(base + first, memory[first:end]) for first, end in zip(cuts, cuts[1:])]
    found = list(scan(memory_from_segments(segments)))
    assert by_address(found) == {base + 0x1000: "vmcs", base + 0x3000: "vmcb"}


def test_a_view_that_starts_inside_a_page_and_a_memory_that_ends_in_one(vmcs_page: bytes) -> None:
    memory = memory_from_segments([(0x1010, bytes(0xFF0) + vmcs_page + vmcs_page[:2000])])
    assert by_address(list(scan(memory))) == {0x2000: "vmcs"}
    # A layout that needs 1 KiB decodes from a page of which only that is there.
    values = {encoding: value for encoding, value in layouts.layout("bochs_2.7").raw_values(vmcs_page).items()
              if encoding in layouts.layout("hw_haswell").fields}
    cut = layouts.layout("hw_haswell").write_page(values)[:1024]
    assert by_address(list(scan(memory_from_segments([(0x5000, cut)])))) == {0x5000: "vmcs"}


class Lazy(PhysicalMemory):
    """Pages that count who reads them; a page behind the second may not be touched."""

    def __init__(self, pages: Dict[int, bytes]) -> None:
        self.pages = pages
        self.given: List[int] = []

    def read(self, address: int, size: int) -> bytes:
        raise MemoryUnavailable(address, size)

    def ranges(self) -> Optional[List[Tuple[int, int]]]:
        return [(address, len(data)) for address, data in self.pages.items()]

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        for address, data in self.pages.items():
            self.given.append(address)
            yield address, memoryview(data)


def test_a_scan_gives_what_it_has_and_reads_no_further(vmcs_page: bytes) -> None:
    memory = Lazy({0x1000: vmcs_page, 0x100000: vmcs_page, 0x200000: vmcs_page})
    first = next(iter(scan(memory)))
    assert first.address == 0x1000 and memory.given == [0x1000]


def test_progress_counts_bytes(vmcs_page: bytes) -> None:
    seen: List[int] = []
    list(scan(memory_from_segments([(0, bytes(40 << 20)), (64 << 20, vmcs_page)]), progress=seen.append))
    assert seen == sorted(seen) and seen[-1] == (40 << 20) + 4096 and len(seen) == 4


def test_a_memory_of_unknown_extent_is_refused_at_once() -> None:
    class Live(Lazy):
        def ranges(self) -> Optional[List[Tuple[int, int]]]:
            return None

    with pytest.raises(UsageError, match="which physical memory exists is not known"):
        scan(Live({}))


# --- accidents --------------------------------------------------------------------------------------------------------------------


def test_pages_that_begin_with_1_are_no_vmcss() -> None:
    """Revision identifiers 1, 4, 0xd ... are small numbers: pages of integers, counters, and single numbers begin with them."""
    pages = [struct.pack("<1024I", *range(start, start + 1024)) for start in (1, 4, 0xD, 0xE, 0xF, 0x10, 0x12)]
    pages += [struct.pack("<I", number) + bytes(4092) for number in (1, 4, 0x10)]
    pages += [struct.pack("<I", 1) + b"\xff" * 4092, struct.pack("<II", 1, 0) + b"\x01\0\0\0" * 1022]
    memory = memory_from_segments([(0x1000 * number, page) for number, page in enumerate(pages)])
    assert list(scan(memory)) == []
    rejected = list(scan(memory, rejected=True))
    assert len(rejected) == len(pages) and all(item.classification == "rejected" and item.reason for item in rejected)


@settings(deadline=None, max_examples=80)
@given(revision=st.sampled_from(layouts.revision_ids()), seed=st.integers(0, 1 << 32), filled=st.integers(1, 4092), shadow=st.booleans())
def test_random_pages_are_neither_found_nor_an_error(revision: int, seed: int, filled: int, shadow: bool) -> None:
    """Dense and sparse ones: `filled` bytes are random, the last one is never 0."""
    chance = random.Random(seed)
    body = bytearray(4091) + b"\x01"
    for at in chance.sample(range(4091), filled - 1):
        body[at] = chance.randrange(256)
    page = struct.pack("<I", revision | (layouts.SHADOW_BIT if shadow else 0)) + bytes(body)
    for item in scan(memory_from_segments([(0, page)]), rejected=True):
        assert item.classification == "rejected" and "\n" not in item.summary + item.title


@settings(deadline=None, max_examples=60)
@given(changes=st.lists(st.tuples(st.integers(0, 8191), st.integers(0, 255)), max_size=400))
def test_mutated_control_blocks_are_judged_without_an_error(changes: List[Tuple[int, int]], vmcs_page: bytes, vmcb_page: bytes) -> None:
    memory = bytearray(vmcs_page + vmcb_page)
    for at, value in changes:
        memory[at] = value
    whole = memory_from_segments([(0, bytes(memory))])
    for item in relate(scan(whole, rejected=True), whole):
        assert item.classification in CLASSES and item.score == sum(entry.points for entry in item.evidence)


def test_a_forced_layout_decides_which_revision_id_is_looked_for(vmcs_page: bytes) -> None:
    known = layouts.layout("bochs_2.7")
    mine = Layout("mine", "mine", (0x77777,), 4096, "rotated", known.fields, launch_state=(8, 4), launch_states={0: "clear", 1: "launched"})
    page = mine.write_page(dict(Vmcs.from_page(vmcs_page).items()))
    memory = memory_from_segments([(0x1000, page), (0x2000, vmcs_page)])
    assert {item.address: item.layout_id for item in scan(memory)} == {0x2000: "bochs_2.7"}
    assert {item.address: item.layout_id for item in scan(memory, layout=mine)} == {0x1000: "mine"}
    assert {item.address: item.layout_id for item in scan(memory, extra=[mine])} == {0x1000: "mine", 0x2000: "bochs_2.7"}


def test_a_vmcs_of_undecided_layout_is_reported_undecoded(vmcs_page: bytes) -> None:
    known = layouts.layout("bochs_2.7")
    fields = dict(known.fields)
    fields[0x681E], fields[0x681C] = fields[0x681C], fields[0x681E]
    rival = Layout("rival", "RIP and RSP exchanged", known.revision_ids, 4096, "rotated", fields, launch_state=(8, 4),
                   launch_states=known.launch_states, complete=True)
    item, = scan(memory_from_segments([(0, vmcs_page)]), extra=[rival])
    assert item.classification == "ambiguous" and item.vmcs is None and "--layout" in item.reason


def vmcb(page: bytes, changes: Dict[int, bytes]) -> bytes:
    changed = bytearray(page)
    for at, data in changes.items():
        changed[at:at + len(data)] = data
    return bytes(changed)


@pytest.mark.parametrize("changes", [{0x10: b"\x7e"}, {0x58: bytes(4)}, {0x4D0: b"\0\x0d"}, {0x4D0: bytes(8)},
                                     {0x40: b"\x01"}, {0x558: b"\xff" * 8}, {0x5F8: b"\x99"}])
def test_a_vmcb_with_one_wrong_field_is_still_found_unless_it_is_the_filter(changes: Dict[int, bytes], vmcb_page: bytes) -> None:
    """People look at a VMCB because VMRUN refuses it.  EFER with neither SVME nor LMA is the one mistake that hides it from a scan."""
    found = by_address(list(scan(memory_from_segments([(0x1000, vmcb(vmcb_page, changes))]))))
    assert found == ({} if changes == {0x4D0: bytes(8)} else {0x1000: "vmcb"})


def test_the_vmcb_of_an_encrypted_guest_is_found_without_its_state(vmcb_page: bytes) -> None:
    """SEV-ES: the save area is in the encrypted VMSA, whose address the control area holds; what is at 0x400 is not the guest's state."""
    page = vmcb(vmcb_page, {0x90: b"\x07", 0x108: struct.pack("<Q", 0x1234000), 0x400: bytes(0xC00)})
    item, = scan(memory_from_segments([(0x1000, page)]))
    assert item.classification == "vmcb" and any("vmsa_pa 0x1234000" in entry.text for entry in item.evidence)
    page = vmcb(page, {0x108: struct.pack("<Q", 0x1234001)})
    assert list(scan(memory_from_segments([(0x1000, page)]))) == []


# --- guest pages in an EPT --------------------------------------------------------------------------------------------------------


def test_guest_pages_are_found_by_their_host_address(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """/proc/self/pagemap said which host page each guest page has; the page that is not in the EPT is not found."""
    memory = open_machine(intel_plain).memory
    vm = intel_plain_truth["vms"]["A"]
    eptp = Vmcs.from_page(memory.read_page(VM_A))["EPT_POINTER"]
    wanted = {int(hpa, 16): int(gpa, 16) for gpa, hpa in vm["gpa_to_hpa_pagemap"].items()}
    found, complete = find_in_ept(memory, eptp, set(wanted))
    absent = {int(gpa, 16) for gpa in vm["not_in_ept"]}
    assert complete and found == {hpa: gpa for hpa, gpa in wanted.items() if gpa not in absent}


def test_an_ept_that_loops_or_is_missing_ends(intel_plain: Path) -> None:
    loop = b"".join(struct.pack("<Q", 0x1007) for _ in range(512))
    assert find_in_ept(memory_from_segments([(0x1000, loop)]), 0x101E, {0x1000})[0] == {0x1000: 0}
    assert find_in_ept(memory_from_segments([(0x1000, loop)]), 0x501E, {0x1000}) == ({}, False)
    many = memory_from_segments([(0x1000 * n, struct.pack("<Q", 0x1000 * (n + 1) | 7) * 512) for n in range(1, 9)])
    assert find_in_ept(many, 0x101E, {0x99000}, Budget(2)) == ({}, False)


def test_a_guest_page_is_found_through_five_levels_and_large_pages() -> None:
    """Bits 5:3 of the EPTP: walk length minus 1 (SDM vol. 3, Extended-Page-Table Pointer (EPTP)); bit 7 ends the walk early."""
    def table(index: int, entry: int) -> bytes:
        return bytes(8 * index) + struct.pack("<Q", entry) + bytes(8 * (511 - index))

    tables = [table(1, 0x2007), table(2, 0x3007), table(3, 0x4007), table(4, 0x4000B7)]
    memory = memory_from_segments([(0x1000 * number, data) for number, data in enumerate(tables, 1)])
    base = 1 << 48 | 2 << 39 | 3 << 30 | 4 << 21
    assert find_in_ept(memory, 0x1026, {0x5FF000, 0x600000}) == ({0x5FF000: base + 0x1FF000}, True)


# --- many pages asked together ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(width=st.sampled_from([1, 2, 4, 8]), count=st.integers(1, 40), seed=st.integers(0, 1 << 32), data=st.data())
def test_a_column_and_its_zeros_are_those_of_each_record(width: int, count: int, seed: int, data: st.DataObject) -> None:
    chance = random.Random(seed)
    stride = data.draw(st.sampled_from([16, 64, 4096]))
    offset = data.draw(st.integers(0, stride - width))
    records = [bytes(chance.choice((0, 0, 0, 0x80, 0xFF, 1)) for _ in range(stride)) for _ in range(count)]
    plain = [bytes(record[offset:offset + width]) for record in records]
    whole = column(memoryview(b"".join(records)), offset, width, stride)
    assert whole == b"".join(plain)
    assert zero_lanes(int.from_bytes(whole, "little"), width, count) == bytes(0 if any(number) else 0x80 for number in plain)
    assert lanes(0x5A, width, count) == sum(0x5A << 8 * width * index for index in range(count))


def _liar(chance: random.Random, genuine: bytes) -> bytes:
    """A page that a scan may be misled by: noise, nothing, ones, or parts of a real VMCS, with a known revision identifier."""
    shape = chance.choices(range(6), (1, 1, 2, 9, 1, 9))[0]
    body = bytearray(genuine if shape < 3 else bytes(4096) if shape == 3 else b"\xff" * 4096 if shape == 4 else chance.randbytes(4096))
    for _ in range(chance.choice([0, 0, 1, 8, 200])):
        body[chance.randrange(4096)] = chance.randrange(256)
    if shape == 2:
        end = chance.randrange(4096)
        body[end:] = bytes(4096 - end)
    revision = chance.choice([1, 0x2B, 0x2B, 0x10]) | chance.choice([0, layouts.SHADOW_BIT])
    header = struct.pack("<III", revision, chance.choice([0, 0, 2, 0x1234]), chance.randrange(2))
    return header + bytes(body[12:])


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 1 << 32))
def test_pages_asked_together_are_judged_as_if_asked_one_by_one(seed: int, vmcs_page: bytes) -> None:
    """Where more than _MANY pages of a chunk begin with a revision identifier, columns of fields rule most of them out first."""
    chance = random.Random(seed)
    pages = [_liar(chance, vmcs_page) for _ in range(4 * find._MANY)]
    whole = memory_from_segments([(0, b"".join(pages))])
    # One page a segment: no two of them are asked together.
    apart = memory_from_segments([(0x1000 * number, page) for number, page in enumerate(pages)])
    first, second = list(scan(whole, kinds=("vmcs",))), list(scan(apart, kinds=("vmcs",)))
    assert [(item.address, item.classification, item.score) for item in first] == [(item.address, item.classification, item.score) for item in second]
    assert first


def test_a_fuller_look_says_of_each_layout_what_its_reader_says(vmcs_page: bytes) -> None:
    """Upper bounds in lanes are the sums of the rules, except that a link pointer that is not all ones is never held against a page."""
    chance = random.Random(5)
    for name in ("bochs_2.7", "hyperv_evmcs_v1", "hw_haswell", "vmware_nested_ws9", "kvm_vmcs12"):
        reader = find._StrongFields(layouts.layout(name))
        pages = [_liar(chance, vmcs_page) for _ in range(300)]
        enough, blank = reader.of_all(memoryview(b"".join(pages)))
        for index, page in enumerate(pages):
            if reader.points(page) >= find._ENOUGH:
                assert enough >> 8 * index & 1
            if layouts.is_empty(page):
                assert blank >> 8 * index & 1


def test_many_pages_of_a_number_and_nothing_else_cost_no_memory() -> None:
    """They count only where a VMCS with the number is found; until then they are kept as addresses."""
    pages = 2000
    memory = memory_from_segments([(0, (struct.pack("<I", 0x10) + bytes(4092)) * pages)])
    tracemalloc.start()
    try:
        assert list(scan(memory)) == []
        assert tracemalloc.get_traced_memory()[1] < pages * 1024
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 32), name=st.sampled_from(["bochs_2.7", "hw_haswell", "hw_nehalem", "kvm_vmcs12", "xen_vvmcs", "vmware_nested_ws9"]))
def test_the_quick_bound_of_a_score_is_never_below_the_score(seed: int, name: str, vmcs_page: bytes, vmcb_page: bytes) -> None:
    """What rules a page out without words may not rule out one that the words would let through."""
    chance = random.Random(seed)
    layout = layouts.layout(name)
    reader = find._StrongFields(layout)
    known = {encoding: value for encoding, value in layouts.layout("bochs_2.7").raw_values(vmcs_page).items() if encoding in layout.fields}
    own = layout.write_page({} if layout.access_rights == "unknown" else known)
    for genuine in (own.ljust(4096, b"\0"), bytes(4096), b"\xff" * 4096, chance.randbytes(4096)):
        page = bytearray(genuine)
        for _ in range(chance.choice([0, 1, 20])):
            page[chance.randrange(4096)] = chance.randrange(256)
        assert reader.most(bytes(page)) >= layouts.score_page(bytes(page), layout).score
    for genuine in (vmcb_page, bytes(0x400) + vmcb_page[0x400:], vmcb_page[:0x90] + b"\x07" + vmcb_page[0x91:], bytes(4096), chance.randbytes(4096)):
        page = bytearray(genuine)
        for _ in range(chance.choice([0, 1, 20])):
            page[chance.randrange(4096)] = chance.randrange(256)
        _, evidence = recognise.judge_page(bytes(page))
        assert recognise.can_fit(bytes(page)) or sum(item.points for item in evidence) < recognise.FITS
