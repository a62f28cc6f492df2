"""EPT: walks of a real hypervisor's tables against its kernel's own account, the manual's rules one by one, and a processor model."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import Any, Dict, List, Optional, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import G1, K4, M2, TableBuilder
from support.vmxcpu import Case, Worker
from support.vmxcpu.places import EPT_PML4, FREE, PDPT, PML4

import vtdbg
from vtdbg.enumeration import Enumeration
from vtdbg.kvm_entries import EPT_MARKER, EPT_MARKER_MASK, mmio_entry
from vtdbg.memory.views import GuestPhysicalMemory
from vtdbg.vmx.ept import Ept, eptp_problems
from vtdbg.walk import Access

VMS = {"A": 0x6826000, "B": 0x6BD9000}


class Caps:
    """A processor for the rules: everything supported unless told otherwise."""

    def __init__(self, width: Optional[int] = 46, cap: Optional[int] = 0xF0106734141 | 1 << 7 | 1 << 23 | 1 << 22) -> None:
        self.physical_address_width, self.ept_vpid_cap = width, cap


# ---- a real hypervisor's tables -----------------------------------------------------------------------------------------------------

def eptp_of(memory: vtdbg.PhysicalMemory, page: int) -> int:
    """Field 0x201a where Bochs 2.7 keeps it: slot 26 of the 64-bit control fields."""
    return memory.read_u64(page + 0x10 + ((1 * 4 + 0) * 64 + 0x1A) * 4)


@pytest.fixture(scope="module")
def machine(intel_plain: Path) -> Any:
    with vtdbg.open(str(intel_plain)).memory as memory:
        yield memory


@pytest.mark.parametrize("vm", VMS)
def test_every_page_of_a_guest_is_where_pagemap_says(vm: str, machine: Any, intel_plain_truth: Dict[str, Any]) -> None:
    """/proc/self/pagemap of the process that owns the guest's memory, 18 pages: 17 equal, and the one that KVM never mapped is not present."""
    truth = intel_plain_truth["vms"][vm]
    eptp = eptp_of(machine, VMS[vm])
    equal = []
    for gpa, hpa in truth["gpa_to_hpa_pagemap"].items():
        walk = vtdbg.ept_walk(machine, eptp, int(gpa, 16))
        if walk.hpa == int(hpa, 16):
            equal.append(gpa)
            assert walk.outcome == "mapped" and walk.page_size in (K4, M2)
        else:
            assert gpa in truth["not_in_ept"]
            assert (walk.outcome, walk.hpa, walk.level, walk.steps[-1].entry) == ("violation", None, 1, 0)
            assert "level 1 PTE" in walk.reason and "not present" in walk.reason
    assert len(equal) == 17 and len(truth["gpa_to_hpa_pagemap"]) == 18


@pytest.mark.parametrize("vm", VMS)
def test_the_slot_that_kvm_made_read_only_cannot_be_written(vm: str, machine: Any, intel_plain_truth: Dict[str, Any]) -> None:
    slot = next(slot for slot in intel_plain_truth["vms"][vm]["memslots"] if slot["readonly"])
    eptp = eptp_of(machine, VMS[vm])
    gpa = int(slot["gpa"], 16)
    assert vtdbg.ept_walk(machine, eptp, gpa, "r").permissions == "r-x"
    walk = vtdbg.ept_walk(machine, eptp, gpa, "w")
    assert walk.outcome == "violation" and walk.hpa is None and walk.maps_to == vtdbg.ept_walk(machine, eptp, gpa).hpa
    assert walk.qualification == 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8
    assert "W=0" in walk.reason and "level 1" in walk.reason


@pytest.mark.parametrize("vm", VMS)
def test_kvms_mmio_entry_is_a_misconfiguration_and_its_software_bits_are_read(vm: str, machine: Any, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM marks MMIO pages by W and X without R.  The guest's 0xffff800000004008 goes to 0xd0000008, which has no memory slot; the
    processor has 40 address bits, so KVM's precaution against L1TF sets bits 39:35 and moves the page's own there."""
    gpa = int(intel_plain_truth["vms"][vm]["gva_to_gpa_kvm_translate"]["0xffff800000004008"], 16)
    walk = vtdbg.ept_walk(machine, eptp_of(machine, VMS[vm]), gpa, "r")
    assert (walk.outcome, walk.hpa, walk.qualification) == ("misconfiguration", None, None)
    assert [rule.id for rule in walk.rules] == ["write-without-read"]
    assert walk.steps[-1].entry is not None and walk.steps[-1].entry & 7 == 0b110
    assert "KVM" in walk.reason and "0xd0000000" in walk.reason and "39:35" in walk.reason
    assert walk.steps[-1].software_bits is not None
    found = mmio_entry(walk.steps[-1].entry, gpa, EPT_MARKER, EPT_MARKER_MASK)
    assert found is not None and found.l1tf_low == 35
    assert mmio_entry(walk.steps[-1].entry, gpa + K4, EPT_MARKER, EPT_MARKER_MASK) is None, "another page's entry is not claimed"


@pytest.mark.parametrize("vm", VMS)
def test_all_pages_of_a_guest_lie_in_its_memory_slots(vm: str, machine: Any, intel_plain_truth: Dict[str, Any]) -> None:
    """The enumeration equals a walk at each of its pages, stays inside the slots that KVM was given, and finds nothing else in them."""
    eptp = eptp_of(machine, VMS[vm])
    slots = [(int(slot["gpa"], 16), int(slot["size"], 16)) for slot in intel_plain_truth["vms"][vm]["memslots"]]
    rows = Enumeration(machine, Ept(eptp))
    listed = set()
    for row in rows:
        for step in range(0, row.length, K4):
            walk = vtdbg.ept_walk(machine, eptp, row.start + step)
            assert (walk.hpa, walk.permissions, walk.page_size) == (row.target + step, row.permissions, row.page_size)
            assert row.memory_type == walk.memory_type == "WB" and walk.ignore_pat and "IPAT" in row.flags
            listed.add(row.start + step)
            in_slot = any(base <= row.start + step < base + size for base, size in slots)
            # KVM's own pages: identity map, APIC access, TSS, which it puts below 4 GiB.
            assert in_slot or 0xFEE00000 <= row.start + step < 0x100000000
    assert [problem.kind for problem in rows.problems] == ["misconfiguration"]
    for base, size in slots:
        assert {gpa for gpa in range(base, base + size, K4) if vtdbg.ept_walk(machine, eptp, gpa).mapped} == {
            gpa for gpa in listed if base <= gpa < base + size}


def test_bits_that_this_vm_does_not_use_are_not_named(machine: Any) -> None:
    """KVM keeps "host-writable" and "MMU-writable" in bits 57 and 58, which are VGP and paging-write only under controls that are 0 here."""
    leaf = vtdbg.ept_walk(machine, eptp_of(machine, VMS["A"]), 0x1000).steps[-1]
    assert leaf.entry is not None and leaf.entry >> 57 & 3 == 3
    words = leaf.describe().split()
    assert not {"VGP", "PWA", "SPP", "SSS", "XU"} & set(words) and {"A", "D", "R", "W", "X"} <= set(words)
    assert leaf.software_bits is not None and leaf.software_bits >> 57 & 3 == 3
    named = Ept(eptp_of(machine, VMS["A"]), paging_write=True).walk(machine, 0x1000).steps[-1].describe().split()
    assert "PWA" in named and "VGP" not in named


def test_a_guests_memory_reads_as_its_pages(machine: Any, intel_plain_truth: Dict[str, Any]) -> None:
    """GuestPhysicalMemory: the guest's GDT and code as KVM_GET_SREGS places them; a read across pages is the pages' bytes in guest order."""
    eptp = eptp_of(machine, VMS["A"])
    guest = GuestPhysicalMemory(machine, Ept(eptp))
    pages = {int(gpa, 16): int(hpa, 16) for gpa, hpa in intel_plain_truth["vms"]["A"]["gpa_to_hpa_pagemap"].items()}
    across = guest.read(0x1FF8, 16)
    assert across == machine.read(pages[0x1000] + 0xFF8, 8) + machine.read(pages[0x2000], 8)
    assert guest.read_u64(0x1000) == 0x2023, "the guest's PML4E 0, at CR3 0x1000, references the table at 0x2000 and was used"
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        guest.read(0x1000FF8, 16)
    assert (error.value.address, error.value.space) == (0x1001000, "guest-physical")
    assert "level 1 PTE" in str(error.value) and "not present" in str(error.value)
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        guest.read(0xD0000000, 4)
    assert "misconfigured" in str(error.value)


class Changed(vtdbg.PhysicalMemory):
    """Memory with other bytes at one place."""

    def __init__(self, memory: vtdbg.PhysicalMemory, at: int, data: bytes) -> None:
        self._memory, self._at, self._data = memory, at, data

    def ranges(self) -> Any:
        return self._memory.ranges()

    def read(self, address: int, size: int) -> bytes:
        data = bytearray(self._memory.read(address, size))
        for offset, byte in enumerate(self._data, self._at - address):
            if 0 <= offset < size:
                data[offset] = byte
        return bytes(data)


@settings(max_examples=60, deadline=None)
@given(level=st.integers(0, 3), entry=st.integers(0, 511), value=st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0x6851907, 0x6850987])),
       data=st.data())
def test_a_changed_entry_of_a_real_ept_is_walked_and_listed_without_a_traceback(level: int, entry: int, value: int, data: st.DataObject,
                                                                                 machine: Any) -> None:
    """Any of the tables on the way to 0x1000 with one entry of any value (or one that references the tables themselves)."""
    eptp = eptp_of(machine, VMS["A"])
    table = (vtdbg.ept_walk(machine, eptp, 0x1000).steps[level].address or 0) & -K4
    memory = Changed(machine, table + entry * 8, struct.pack("<Q", value))
    rows = Enumeration(memory, Ept(eptp), limit=3000)
    listed = list(rows)
    assert rows.complete or rows.problems[-1].kind == "limit"
    for row in data.draw(st.lists(st.sampled_from(listed), max_size=3)) if listed else ():
        assert vtdbg.ept_walk(memory, eptp, row.start).maps_to == row.target
    gpa = entry << 12 + 9 * (3 - level)
    walk = vtdbg.ept_walk(memory, eptp, gpa, "r")
    assert walk.outcome in ("mapped", "violation", "misconfiguration", "unreadable") and bool(walk.reason) == (not walk.mapped)


# ---- the manual's rules -------------------------------------------------------------------------------------------------------------

def one_page(leaf: int, size: int = K4, table: int = 7, gpa: int = 0x40000000) -> Tuple[vtdbg.PhysicalMemory, int]:
    builder = TableBuilder()
    builder.entry_address(gpa, {K4: 1, M2: 2, G1: 3}[size], table)
    at, _ = builder.entry_address(gpa, {K4: 1, M2: 2, G1: 3}[size])
    builder.set(at, leaf)
    return builder.memory(), builder.root


RULES: List[Tuple[str, str, int, int, Dict[str, Any], Caps]] = [
    # (rule, why, leaf entry, page size, arguments, processor)
    ("write-without-read", "bit 0 clear and bit 1 set", 0x1000 | 2, K4, {}, Caps()),
    ("write-without-read", "whatever bit 2 is", 0x1000 | 6, K4, {}, Caps()),
    ("write-without-read", "in a large page as well", 1 << 30 | 0x82, M2, {}, Caps()),
    ("execute-only", "bits 2:0 are 100b, capability bit 0 is 0", 0x1000 | 4, K4, {}, Caps(cap=0x6334140)),
    ("user-execute-only", "the same for bit 10 with mode-based execute", 0x1000 | 0x400, K4, {"mbec": True}, Caps(cap=0x6334140)),
    ("memory-type", "2 is reserved", 0x1000 | 2 << 3 | 7, K4, {}, Caps()),
    ("memory-type", "3 is reserved", 0x1000 | 3 << 3 | 7, K4, {}, Caps()),
    ("memory-type", "7 is reserved", 1 << 30 | 7 << 3 | 0x87, G1, {}, Caps()),
    ("reserved-bits", "bits 20:12 of a 2-MByte page", 1 << 30 | 0x1000 | 0xB7, M2, {}, Caps()),
    ("reserved-bits", "bits 20:12 of a 2-MByte page", 1 << 30 | 0x100000 | 0xB7, M2, {}, Caps()),
    ("reserved-bits", "bits 29:12 of a 1-GByte page", 1 << 30 | 0x20000000 | 0xB7, G1, {}, Caps()),
    ("address-width", "bit 46 with 46 address bits", 1 << 46 | 0x37, K4, {}, Caps()),
    ("address-width", "bit 51 with 46 address bits", 1 << 51 | 0xB7, M2, {}, Caps()),
    ("page-size-2m", "capability bit 16 is 0", 1 << 30 | 0xB7, M2, {}, Caps(cap=0x6324141)),
    ("page-size-1g", "capability bit 17 is 0", 1 << 30 | 0xB7, G1, {}, Caps(cap=0x6314141)),
    ("paging-write-without-read", "bit 58 with bit 0 clear under EPT paging-write control", 1 << 58 | 0x1000 | 4, K4, {"paging_write": True},
     Caps()),
]


@pytest.mark.parametrize("rule, why, leaf, size, arguments, caps", RULES, ids=[f"{row[0]}-{row[1]}".replace(" ", "_") for row in RULES])
def test_what_makes_an_entry_misconfigured(rule: str, why: str, leaf: int, size: int, arguments: Dict[str, Any], caps: Caps) -> None:
    memory, root = one_page(leaf, size)
    walk = vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, "r", caps, **arguments)
    assert (walk.outcome, walk.hpa, walk.qualification) == ("misconfiguration", None, None), why
    assert rule in [broken.id for broken in walk.rules]
    assert "SDM" in walk.rules[0].see and f"{leaf:#x}" in walk.reason


@pytest.mark.parametrize("level, bit", [(5, bit) for bit in range(3, 8)] + [(4, bit) for bit in range(3, 8)] + [(3, bit) for bit in range(3, 7)]
                         + [(2, bit) for bit in range(3, 7)])
def test_reserved_bits_of_entries_that_reference_tables(level: int, bit: int) -> None:
    """Bits 7:3 of a PML5E and PML4E, bits 6:3 of a PDPTE and PDE that reference a table."""
    builder = TableBuilder(top=5)
    builder.map(0x40000000, 0x1000, K4, 0x37, 7)
    at, _ = builder.entry_address(0x40000000, level)
    builder.set(at, builder.get(at) | 1 << bit)
    walk = vtdbg.ept_walk(builder.memory(), builder.root | 0x26, 0x40000000)
    assert (walk.outcome, walk.level, walk.steps[-1].address) == ("misconfiguration", level, at)
    assert [rule.id for rule in walk.rules] == ["reserved-bits"]


@pytest.mark.parametrize("leaf, why", [
    (0x1000 | 0x37 | 1 << 7, "bit 7 of a PTE is ignored"), (0x1000 | 0x37 | 0x7FF << 52, "bits 62:52 are ignored"),
    (0x1000 | 0x37 | 0x300, "accessed and dirty in any state"), (0x1000 | 0x37 | 1 << 63, "suppress #VE"), (0x1000 | 4, "execute-only, supported"),
    (0x1000 | 0x37 | 1 << 10, "XU without mode-based execute is ignored"), (0x1000 | 0x37 | 1 << 11, "bit 11 is ignored")])
def test_what_does_not_make_an_entry_misconfigured(leaf: int, why: str) -> None:
    memory, root = one_page(leaf)
    assert vtdbg.ept_walk(memory, root | 0x1E, 0x40000123, None, Caps()).hpa == 0x1123, why


def test_an_entry_without_permissions_is_not_present_whatever_else_it_holds() -> None:
    """Bits 2:0 all 0: bits 63:3 mean nothing, so no rule applies; what software keeps there is shown."""
    memory, root = one_page(0xDEADBEEF00000BB8)
    walk = vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, "w")
    assert walk.outcome == "violation" and walk.steps[-1].software_bits == 0xDEADBEEF00000BB8 and not walk.steps[-1].decoded
    assert "software bits 0xdeadbeef00000bb8" in walk.reason
    assert walk.qualification == 1 << 1 | 1 << 7 | 1 << 8
    memory, root = one_page(0x1000 | 0x400, table=0x407)
    assert vtdbg.ept_walk(memory, root | 0x1E, 0x40000000).outcome == "violation", "bit 10 makes it present only with mode-based execute"
    assert vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, "user x", mbec=True).outcome == "mapped"


def test_a_misconfiguration_goes_before_a_violation_that_an_upper_entry_would_cause() -> None:
    """Permissions are judged when the whole walk is done: a PDE without W does not hide a broken PTE from a write."""
    memory, root = one_page(0x1000 | 2 << 3 | 7, table=5)
    assert vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, "w").outcome == "misconfiguration"


def test_permissions_are_anded_and_the_entry_that_withholds_is_named() -> None:
    builder = TableBuilder()
    builder.map(0x40000000, 0x1000, K4, 0x37, 7)
    at, _ = builder.entry_address(0x40000000, 3)
    builder.set(at, builder.get(at) & ~4)
    memory = builder.memory()
    walk = vtdbg.ept_walk(memory, builder.root | 0x1E, 0x40000000, "x")
    assert (walk.outcome, walk.permissions, walk.maps_to) == ("violation", "rw-", 0x1000)
    assert walk.qualification == 1 << 2 | 0b011 << 3 | 1 << 7 | 1 << 8
    assert f"level 3 PDPTE at {at:#x} has X=0" in walk.reason
    assert [step.permissions for step in walk.steps] == ["rwx", "rw-", "rw-", "rw-"]


def test_a_page_that_nobody_may_touch_is_not_mapped() -> None:
    """R only above, X only below: the entries together grant nothing, so every access is a violation."""
    memory, root = one_page(0x1000 | 0x30 | 4, table=1)
    walk = vtdbg.ept_walk(memory, root | 0x1E, 0x40000000)
    assert (walk.outcome, walk.permissions, walk.hpa, walk.maps_to) == ("violation", "---", None, 0x1000)


@pytest.mark.parametrize("access, linear, ad, expected", [
    (Access(read=True), "translation", False, 1 << 0 | 1 << 7 | 1 << 8),
    (Access(write=True), "translation", False, 1 << 1 | 1 << 7 | 1 << 8),
    (Access(read=True, write=True), "translation", True, 3 | 1 << 7 | 1 << 8),
    (Access(fetch=True), "translation", False, 1 << 2 | 1 << 7 | 1 << 8),
    (Access(read=True, linear="page-walk"), "page-walk", False, 1 << 0 | 1 << 7),
    (Access(read=True, linear="page-walk"), "page-walk", True, 3 | 1 << 7),
    (Access(read=True, linear=None), None, False, 1 << 0),
    (Access(read=True, shadow_stack=True), "translation", False, 1 << 0 | 1 << 7 | 1 << 8 | 1 << 13),
])
def test_the_exit_qualification_of_a_page_that_is_not_present(access: Access, linear: Any, ad: bool, expected: int) -> None:
    """Bits 2:0 the access, 5:3 what the entries grant (nothing), 7 by a linear address, 8 its translation rather than a table on the way.
    With EPTP[6], an access to a guest paging structure counts as a write and reports both."""
    memory, root = one_page(0)
    assert vtdbg.ept_walk(memory, root | (0x5E if ad else 0x1E), 0x40000000, access).qualification == expected


def test_with_accessed_flags_a_guest_table_on_a_read_only_page_is_a_violation() -> None:
    memory, root = one_page(0x1000 | 0x35)
    for eptp, outcome in ((root | 0x1E, "mapped"), (root | 0x5E, "violation")):
        walk = vtdbg.ept_walk(memory, eptp, 0x40000000, "page-walk")
        assert walk.outcome == outcome
    assert walk.qualification == 3 | 0b101 << 3 | 1 << 7 and "EPTP[6]" in walk.reason


def test_mode_based_execute_tells_user_from_supervisor_fetches() -> None:
    memory, root = one_page(0x1000 | 0x33 | 0x400, table=0x407)
    arguments: Dict[str, Any] = {"mbec": True}
    assert vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, "user x", **arguments).outcome == "mapped"
    walk = vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, "x", **arguments)
    assert (walk.outcome, walk.permissions) == ("violation", "rw-u")
    assert walk.qualification == 1 << 2 | 0b011 << 3 | 1 << 6 | 1 << 7 | 1 << 8


def test_supervisor_shadow_stack_pages() -> None:
    """With EPTP[7], a supervisor shadow-stack access needs R everywhere, W above the leaf and SSS in the leaf; without, it is like data."""
    for leaf, table, expected in ((0x1031 | 1 << 60, 7, "mapped"), (0x1033 | 1 << 60, 7, "mapped"), (0x1033, 7, "violation"),
                                  (0x1031 | 1 << 60, 5, "violation"), (0x1034 | 1 << 60, 7, "violation")):
        memory, root = one_page(leaf, table=table)
        walk = vtdbg.ept_walk(memory, root | 0x9E, 0x40000000, Access(write=True, shadow_stack=True))
        assert walk.outcome == expected, hex(leaf)
    assert walk.qualification is not None and walk.qualification >> 13 & 3 == 3


@pytest.mark.parametrize("eptp, caps, words", [
    (0x5018, None, None), (0x501E, None, None), (0x505E, None, None), (0x5026, None, None), (0x509E, None, None),
    (0x501F, None, "memory type"), (0x5019, None, "memory type"), (0x5006, None, "page-walk length"), (0x502E, None, "page-walk length"),
    (0x511E, None, "reserved bits 11:8"), (1 << 52 | 0x501E, None, "reserved bits 63:52"), (1 << 46 | 0x1E, Caps(), "width (46)"),
    (0x505E, Caps(cap=0x4141), "bit 6"), (0x509E, Caps(cap=0x4141), "bit 7"), (0x5026, Caps(cap=0x4141), "5 levels"),
    (0x5018, Caps(cap=0x4041), "not supported"), (0x501E, Caps(cap=0x141), "not supported")])
def test_the_eptp_itself_is_checked(eptp: int, caps: Optional[Caps], words: Optional[str]) -> None:
    problems = eptp_problems(eptp, caps)
    memory = vtdbg.memory_from_segments([(0x5000, bytes(K4))])
    walk = vtdbg.ept_walk(memory, eptp, 0, None, caps)
    if words is None:
        assert not problems and walk.outcome == "violation"
    else:
        assert len(problems) == 1 and words in problems[0] and words in walk.reason
        assert walk.outcome == "misconfiguration" and not walk.steps and "VM entry" in walk.reason


def test_a_bare_root_address_gets_a_hint_how_to_walk_it() -> None:
    assert "0x501e" in vtdbg.ept_walk(vtdbg.memory_from_segments([(0x5000, bytes(K4))]), 0x5000, 0).reason


def test_addresses_that_the_walk_length_does_not_cover() -> None:
    """4-level EPT: bits 51:48 of the guest-physical address must be 0, otherwise a violation; 5 levels use them."""
    builder = TableBuilder(top=5)
    builder.map(1 << 50, 0x7000, K4, 0x37, 7)
    memory = builder.memory()
    assert vtdbg.ept_walk(memory, builder.root | 0x26, (1 << 50) + 5).hpa == 0x7005
    walk = vtdbg.ept_walk(memory, builder.root | 0x1E, 1 << 50, "r")
    assert (walk.outcome, walk.steps, walk.qualification) == ("violation", (), 1 | 1 << 7 | 1 << 8) and "48 bits" in walk.reason
    walk = vtdbg.ept_walk(memory, builder.root | 0x26, 1 << 60, "r")
    assert (walk.outcome, walk.qualification) == ("violation", None) and "no processor" in walk.reason


def test_what_is_assumed_is_said_and_what_is_given_is_not() -> None:
    memory, root = one_page(0x1037)
    assert len(vtdbg.ept_walk(memory, root | 0x1E, 0).assumptions) == 2
    assert vtdbg.ept_walk(memory, root | 0x1E, 0, None, Caps()).assumptions == ()
    assert "width" in vtdbg.ept_walk(memory, root | 0x1E, 0, None, Caps(width=None)).assumptions[0]


@pytest.mark.parametrize("leaf, expected", [(0x1007, "UC"), (0x100F, "WC"), (0x1027, "WT"),
                                            (0x102F, "WP"), (0x1037, "WB"), (0x1077, "WB")])
def test_memory_types_of_leaves(leaf: int, expected: str) -> None:
    memory, root = one_page(leaf)
    assert vtdbg.ept_walk(memory, root | 0x1E, 0x40000000).memory_type == expected


def test_the_ept_of_a_vmcs_is_read_with_its_controls() -> None:
    base = {"EPT_POINTER": 0x505E, "CPU_BASED_VM_EXEC_CONTROL": 1 << 31, "SECONDARY_VM_EXEC_CONTROL": 2 | 1 << 22}
    ept = Ept.from_vmcs(vtdbg.Vmcs.from_values(base))
    assert (ept.root, ept.levels, ept.access_flags, ept.mbec, ept.spp) == (0x5000, 4, True, True, False)
    with pytest.raises(vtdbg.VtdbgError, match="EPT is not in use"):
        Ept.from_vmcs(vtdbg.Vmcs.from_values({**base, "SECONDARY_VM_EXEC_CONTROL": 0}))
    with pytest.raises(vtdbg.VtdbgError, match="no EPT pointer"):
        Ept.from_vmcs(vtdbg.Vmcs.from_values({"GUEST_RIP": 0}))
    unknown = Ept.from_vmcs(vtdbg.Vmcs.from_values({"EPT_POINTER": 0x505E}))
    assert any("Mode-based" in text for text in unknown.assumptions)


# ---- a processor model --------------------------------------------------------------------------------------------------------------

GPA = 1 << 39           # its own PML4E, PDPTE, PDE and PTE
LINEAR = 1 << 30        # the guest's PDPTE 1 leads there
TABLES = (FREE, FREE + K4, FREE + 2 * K4)
TARGET = FREE + 3 * K4
OFFSET = TARGET + 0x800     # HLTs lie there, behind the entry that the page may begin with
EXITS = {48: "violation", 49: "misconfiguration", 12: "mapped"}

# What Bochs 3.0's processor does otherwise than the manual.  Each is applied to our answer before comparing, so that the list is complete.
BOCHS_REPORTS_ONLY_THE_WRITE = "with EPTP[6]=1, an access to a guest paging structure reports bit 1 and not bit 0"
BOCHS_IGNORES_BIT_12_OF_LARGE_PAGES = "bit 12 of a large page is not checked (it masks the address with ...e000)"


def _pool(random: Random, good: int, reserved: List[int]) -> int:
    """An entry that is mostly good."""
    entry = good
    roll = random.random()
    if roll < 0.35:
        return entry | 7
    if roll < 0.7:
        return entry | random.randrange(8)
    if roll < 0.8:
        return entry | random.randrange(8) | random.getrandbits(12) << 52
    if roll < 0.9:
        return entry | random.randrange(8) | random.choice([0x100, 0x200, 0x300, 0x400, 0x800])
    return entry | random.choice([7, 5, 1, 3]) | 1 << random.choice(reserved)


def _case(random: Random) -> Tuple[Dict[int, int], int, str, bool, bool]:
    """EPT entries by address, EPTP, access, page-walk or not; the last says whether a large page has bit 12 set."""
    page = TARGET >> 12
    depth = random.choice([1, 1, 1, 2, 3])
    entries = {EPT_PML4 + 8: _pool(random, TABLES[0], [3, 4, 5, 6, 7, 40, 45, 51])}
    kind = random.choice([0x30, 0x30, 0x30, 0x00, 0x08, 0x20, 0x28, 0x70, 0x10, 0x18, 0x38])
    if depth == 3:
        entries[TABLES[0]] = _pool(random, 0x80 | kind, [12, 13, 20, 21, 29, 40, 51])
    else:
        entries[TABLES[0]] = _pool(random, TABLES[1], [3, 4, 5, 6, 40, 44, 51])
        if depth == 2:
            entries[TABLES[1]] = _pool(random, 0x80 | kind, [12, 13, 20, 40, 51])
        else:
            entries[TABLES[1]] = _pool(random, TABLES[2], [3, 4, 5, 6, 40, 47, 51])
            entries[TABLES[2] + 8 * page] = _pool(random, TARGET | kind, [7, 40, 48, 51])
    large = [entry for at, entry in entries.items() if entry & 0x80 and at in TABLES[:2]]
    eptp = EPT_PML4 | 3 << 3 | random.choice([6, 6, 0]) | random.choice([0, 0x40])
    return entries, eptp, random.choice(["read", "write", "fetch"]), random.random() < 0.3, any(entry >> 12 & 1 for entry in large)


def _ours(worker: Worker, memory: bytes, entries: Dict[int, int], data: Dict[int, bytes], eptp: int, access: str,
          caps: vtdbg.VmxCapabilities) -> Any:
    page = bytearray(memory)
    for at, value in [*((at, struct.pack("<Q", entry)) for at, entry in entries.items()), *data.items()]:
        page[at:at + len(value)] = value
    return vtdbg.translate(vtdbg.memory_from_segments([(0, bytes(page))]), LINEAR + OFFSET, cr3=PML4, eptp=eptp, access=access, caps=caps,
                           paging=vtdbg_paging())


def vtdbg_paging() -> Any:
    from vtdbg.x86.paging import Paging

    return Paging.from_registers(0x80050033, PML4, 0x2620, 0xD01, width=40)


def test_thousands_of_random_entries_do_what_a_processor_model_does(vmx_worker: Worker) -> None:
    """Random EPT entries at all four levels, EPTPs, accesses to data, code and guest tables: outcome, qualification and guest-physical
    address are those of Bochs' processor."""
    worker = vmx_worker
    caps = vtdbg.VmxCapabilities.from_msrs(dict(worker.msrs), physical_address_width=worker.physical_address_width)
    random = Random(20261122)
    plans, cases = [], []
    for _ in range(3000):
        entries, eptp, access, through_table, bit_12 = _case(random)
        # Either the linear address leads to the page under test, or a guest page directory lies in it and is read on the way.
        pdpte = (GPA + TARGET) | 0x67 if through_table else GPA | 0xE7
        data = {PDPT + 8: struct.pack("<Q", pdpte), TARGET: struct.pack("<Q", 0x00E7) + b"\xf4" * 4088 if through_table else b"\xf4" * 4096}
        plans.append((entries, eptp, access, through_table, bit_12, data))
        cases.append(worker.ept_case(access, GPA + OFFSET, entries, eptp, data=data, registers={"rdi": LINEAR + OFFSET}))
    compared: Dict[str, int] = {}
    for plan, outcome in zip(plans, launch(worker, cases)):
        entries, eptp, access, through_table, bit_12, data = plan
        ours = _ours(worker, worker.memory, entries, data, eptp, access, caps)
        text = f"{[hex(entry) for entry in entries.values()]} EPTP {eptp:#x} {access} {through_table}: {outcome.kind} {outcome.number}"
        if bit_12 and ours.outcome == "misconfiguration" and ours.fault.leaf is None:
            [rule, step] = ours.fault.rules[0], ours.fault.steps[-1]
            if len(ours.fault.rules) == 1 and rule.id == "reserved-bits" and step.entry & rule.mask == 0x1000 and step.entry & 0x80:
                compared[BOCHS_IGNORES_BIT_12_OF_LARGE_PAGES] = compared.get(BOCHS_IGNORES_BIT_12_OF_LARGE_PAGES, 0) + 1
                assert outcome.number in (12, 48), text
                continue
        assert outcome.kind == "exit" and outcome.number in EXITS, text
        assert ours.outcome == EXITS[outcome.number], f"{text}; we say {ours.outcome}: {ours.reason}"
        compared[ours.outcome] = compared.get(ours.outcome, 0) + 1
        if outcome.number == 12:
            continue
        assert outcome.fields[0x2400] == ours.fault.address, text
        if outcome.number == 48:
            expected = ours.qualification
            if ours.fault.access.linear == "page-walk" and eptp & 0x40:
                compared[BOCHS_REPORTS_ONLY_THE_WRITE] = compared.get(BOCHS_REPORTS_ONLY_THE_WRITE, 0) + 1
                expected &= ~1
            assert outcome.fields[0x6400] == expected, f"{text}: {outcome.fields[0x6400]:#x}, we say {expected:#x}: {ours.reason}"
    assert all(compared.get(word, 0) > 300 for word in ("mapped", "violation", "misconfiguration")), compared
    assert compared[BOCHS_REPORTS_ONLY_THE_WRITE] > 20 and compared[BOCHS_IGNORES_BIT_12_OF_LARGE_PAGES] > 0


def launch(worker: Worker, cases: List[Case]) -> List[Any]:
    return [outcome for at in range(0, len(cases), 1000) for outcome in worker.launch_many(cases[at:at + 1000])]


@settings(max_examples=40, deadline=None)
@given(leaf=st.integers(0, (1 << 64) - 1), table=st.integers(0, 0xFFF), access=st.sampled_from(["r", "w", "x", "user x"]), mbec=st.booleans())
def test_a_violation_has_a_qualification_and_nothing_else_has(leaf: int, table: int, access: str, mbec: bool) -> None:
    memory, root = one_page(leaf, table=table & 0x707 | 1)
    walk = vtdbg.ept_walk(memory, root | 0x1E, 0x40000000, access, Caps(), mbec=mbec)
    assert (walk.qualification is not None) == (walk.outcome == "violation")
    assert (walk.hpa is not None) == (walk.outcome == "mapped") and (not walk.rules) == (walk.outcome != "misconfiguration")
