"""Two-dimensional translation: KVM_TRANSLATE, an independent walker, and stacked views (L2 through L1 to L0)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Dict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import K4, M2, TableBuilder

import vtdbg
from vtdbg.memory.views import GuestPhysicalMemory, LinearMemory
from vtdbg.svm.npt import Npt
from vtdbg.vmx.ept import Ept
from vtdbg.walk import Access
from vtdbg.x86.paging import Paging

VMS = {"A": 0x6826000, "B": 0x6BD9000}


def eptp_of(memory: vtdbg.PhysicalMemory, page: int) -> int:
    """Field 0x201a where Bochs 2.7 keeps it."""
    return memory.read_u64(page + 0x10 + ((1 * 4 + 0) * 64 + 0x1A) * 4)


@pytest.mark.parametrize("vm", VMS)
def test_linear_addresses_of_a_guest_go_where_kvm_translate_says(vm: str, intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM_TRANSLATE of the running kernel: ten addresses by 4 KiB, 2 MiB and 1 GiB pages, upper half and lower; then pagemap for the rest."""
    memory = vtdbg.open(str(intel_plain)).memory
    truth = intel_plain_truth["vms"][vm]
    eptp, cr3 = eptp_of(memory, VMS[vm]), int(truth["kvm_get_sregs"]["cr3"], 16)
    frames = {int(gpa, 16): int(hpa, 16) for gpa, hpa in truth["gpa_to_hpa_pagemap"].items()}
    mapped = 0
    for gva, gpa in truth["gva_to_gpa_kvm_translate"].items():
        found = vtdbg.translate(memory, int(gva, 16), cr3=cr3, eptp=eptp)
        assert found.gpa == int(gpa, 16)
        frame = frames.get(int(gpa, 16) & -K4)
        if found.hpa is None:
            assert found.dimension == "nested" and int(gpa, 16) & -K4 in (0xD0000000, 0x1001000)
        elif frame is not None:
            assert found.hpa == frame + (int(gpa, 16) & K4 - 1)
        mapped += found.mapped
        # Nothing of the path is left out: a nested walk before each guest entry, the final one at the end.
        assert [step.dimension for step in found.steps].count("guest") == len(found.guest.steps)
        assert all(step.nested is not None and step.nested.mapped for step in found.guest.steps)
        assert len(found.steps) == sum(1 + len(step.nested.steps) for step in found.guest.steps if step.nested) + len(found.final.steps)
    assert mapped == 8


def test_the_two_that_stop_say_where(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    memory = vtdbg.open(str(intel_plain)).memory
    eptp = eptp_of(memory, VMS["A"])
    mmio = vtdbg.translate(memory, 0xFFFF800000004008, cr3=0x1000, eptp=eptp, access="r")
    assert (mmio.outcome, mmio.dimension, mmio.level, mmio.qualification) == ("misconfiguration", "nested", 1, None) and "KVM" in mmio.reason
    absent = vtdbg.translate(memory, 0xFFFF800000005010, cr3=0x1000, eptp=eptp, access="w")
    assert (absent.outcome, absent.dimension, absent.level, absent.gpa) == ("violation", "nested", 1, 0x1001010)
    assert absent.qualification == 1 << 1 | 1 << 7 | 1 << 8 and absent.permissions == "----" and absent.page_size is None
    guest = vtdbg.translate(memory, 0x123000000000, cr3=0x1000, eptp=eptp, access="w")
    assert (guest.outcome, guest.dimension, guest.gpa, guest.final) == ("violation", "guest", None, None) and guest.qualification == 2


@pytest.mark.parametrize("which", ["amd_exit", "amd_l2"])
def test_kvm_amds_guest_in_both_dimensions(which: str, request: pytest.FixtureRequest) -> None:
    """15 walks by an independent walker with their guest entries; one of them leads to an MMIO entry, which that walker followed."""
    truth = request.getfixturevalue(f"{which}_truth")
    memory = vtdbg.open(str(request.getfixturevalue(which))).memory
    ncr3 = int(truth["vmcb"]["nested_cr3"], 16)
    for walk in truth["gva_walks"]:
        found = vtdbg.translate(memory, int(walk["gva"], 16), cr3=0x1000, ncr3=ncr3)
        assert [[step.level, hex(step.address), hex(step.entry)] for step in found.guest.steps] == walk["guest_path"]
        assert found.gpa == (None if walk["gpa"] is None else int(walk["gpa"], 16))
        if walk["gpa"] == "0x200000":
            assert (found.outcome, found.hpa, found.dimension) == ("misconfiguration", None, "nested")
        else:
            assert found.hpa == (None if walk["hpa"] is None else int(walk["hpa"], 16))


def test_the_registers_of_a_guest_that_runs_do_not_decide_about_the_hosts_addresses(amd_l2: Path) -> None:
    """Stopped inside the guest, CR3 is the guest's: with nested tables given, the mode is not taken from the processor either."""
    machine = vtdbg.open(str(amd_l2))
    found = vtdbg.translate(machine, 0xFFFF800000000000, cr3=0x1000, ncr3=0x1F52000)
    assert found.mapped and "paging mode not given: 4-level taken" in found.assumptions
    with pytest.raises(vtdbg.VtdbgError, match="GUEST_CR3"):
        vtdbg.translate(machine, 0, ncr3=0x1F52000)


# ---- made tables --------------------------------------------------------------------------------------------------------------------

def two_dimensions(guest_leaf: int = 0x7067, nested: int = 0x37, table_rights: int = 7) -> Any:
    """A guest whose tables are at guest-physical 0x1000 upwards; guest-physical page n is host page 0x100 + n."""
    ept = TableBuilder(base=0x400000)
    guest = TableBuilder(base=0x1000)
    at, _ = guest.entry_address(0x40000000, 1, 0x67)
    guest.set(at, guest_leaf)
    for gpa in sorted(guest.pages) + [0x7000]:
        flags = nested if gpa == 0x7000 else 0x30 | table_rights
        ept.map(gpa, 0x100000 + gpa, K4, flags, 7)
    segments = [(0x100000 + gpa, bytes(page)) for gpa, page in guest.pages.items()]
    return ept.memory(*segments, (0x107000, bytes(range(256)) * 16)), guest.root, ept.root | 0x1E


def test_every_step_of_both_dimensions_is_in_order() -> None:
    memory, cr3, eptp = two_dimensions()
    found = vtdbg.translate(memory, 0x40000123, cr3=cr3, eptp=eptp, access="r")
    assert (found.gpa, found.hpa, found.outcome, found.page_size) == (0x7123, 0x107123, "mapped", K4)
    assert [(step.dimension, step.level) for step in found.steps] == (
        [step for guest in (4, 3, 2, 1) for step in [("nested", 4), ("nested", 3), ("nested", 2), ("nested", 1), ("guest", guest)]]
        + [("nested", 4), ("nested", 3), ("nested", 2), ("nested", 1)])
    assert [step.host_address for step in found.guest.steps] == [0x100000 + step.address for step in found.guest.steps]


def test_a_guest_table_that_the_nested_tables_do_not_reach_stops_there() -> None:
    """The nested violation of a guest paging-structure access: qualification bit 7 without bit 8."""
    memory, cr3, eptp = two_dimensions(table_rights=0)
    found = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, access="w")
    assert (found.outcome, found.dimension, found.level, found.gpa, found.hpa) == ("violation", "nested", 1, None, None)
    assert found.qualification == 1 << 0 | 1 << 7 and "level 4 PML4E" in found.reason and "level 1 PTE" in found.reason
    assert found.guest.outcome == "unreadable" and found.fault is not None and found.fault.address == cr3


def test_with_accessed_flags_the_guests_tables_have_to_be_writable() -> None:
    memory, cr3, eptp = two_dimensions(table_rights=5)
    assert vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp).mapped
    found = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp | 0x40, access="r")
    assert (found.outcome, found.qualification) == ("violation", 3 | 0b101 << 3 | 1 << 7)


def test_flags_that_the_processor_cannot_set_in_the_guests_tables_are_noted() -> None:
    """Accessed and dirty flags are written by the processor: with the guest's tables read-only in the EPT, an entry without A is trouble."""
    memory, cr3, eptp = two_dimensions(guest_leaf=0x7007, table_rights=5)
    [note] = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, access="w").notes
    assert "set A and D in the guest's level 1 PTE" in note
    [note] = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, access="r").notes
    assert "set A in the guest's level 1 PTE" in note
    assert not vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp).notes
    memory, cr3, eptp = two_dimensions(guest_leaf=0x7007)
    assert not vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, access="w").notes


def test_permissions_are_those_of_both_dimensions() -> None:
    memory, cr3, eptp = two_dimensions(nested=0x35)
    found = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, paging="4-level", access="w")
    assert (found.outcome, found.dimension, found.permissions) == ("violation", "nested", "r-xu")
    memory, cr3, eptp = two_dimensions(guest_leaf=0x7065)
    paging = Paging("4-level", cr3, wp=True)
    found = vtdbg.translate(memory, 0x40000000, eptp=eptp, paging=paging, access="user w")
    assert (found.outcome, found.dimension, found.qualification) == ("violation", "guest", 0b111)


def test_advanced_exit_information_comes_from_the_guests_tables() -> None:
    """IA32_VMX_EPT_VPID_CAP[22]: bits 11:9 of the qualification are user, writable and execute-disable of the guest's own page."""
    class Caps:
        physical_address_width = 46
        ept_vpid_cap = 0x6734141

    memory, cr3, eptp = two_dimensions(guest_leaf=0x7065 | 1 << 63, nested=0)
    plain = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, access="r")
    assert plain.qualification == 1 << 0 | 1 << 7 | 1 << 8
    advanced = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=eptp, access="r", caps=Caps())
    assert advanced.qualification == 1 << 0 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 11


def test_a_nested_root_that_is_not_valid_is_the_answer() -> None:
    memory, cr3, _ = two_dimensions()
    found = vtdbg.translate(memory, 0x40000000, cr3=cr3, eptp=0x400006)
    assert (found.outcome, found.dimension, found.hpa) == ("misconfiguration", "nested", None) and "page-walk length" in found.reason


def test_guests_without_paging_and_nested_tables_as_an_object() -> None:
    memory, _, eptp = two_dimensions()
    found = vtdbg.translate(memory, 0x7123, cr3=0, paging="none", nested=Ept(eptp))
    assert (found.gpa, found.hpa, found.guest.steps) == (0x7123, 0x107123, ())
    assert vtdbg.translate(memory, 0x107123, cr3=0, paging="none").hpa == 0x107123


def test_pae_guests_use_the_pdptes_of_the_vmcs() -> None:
    directory = struct.pack("<Q", 0x2000E3) + bytes(K4 - 8)
    ept = TableBuilder(base=0x400000)
    ept.map(0x3000, 0x103000, K4, 0x37, 7)
    ept.map(M2, 0x600000, M2, 0xB7, 7)
    memory = ept.memory((0x103000, directory))
    paging = Paging.from_registers(0x80000011, 0xDEAD0020, 0x20, 0, pdptes=(0x3001, 0, 0, 0))
    found = vtdbg.translate(memory, 0x1234, eptp=ept.root | 0x1E, paging=paging)
    assert (found.gpa, found.hpa) == (0x201234, 0x601234), "CR3 itself is not looked at"
    assert [step.place or step.name for step in found.guest.steps] == ["PDPTE0", "PDE"]


def stack(depth: int) -> Any:
    """`depth` EPTs inside each other; guest page n of each is page n + 0x40 of the one below.  Returns (memory, [EPTP of L0, L1, ...])."""
    shift, span = 0x40 * K4, 0x200 * K4
    layers = []
    for level in range(depth):
        builder = TableBuilder(base=0x20000 + level * 0x8000)
        for gpa in range(0, span, K4):
            builder.map(gpa, gpa + shift, K4, 0x37, 7)
        layers.append(builder)
    segments = []
    for level, builder in enumerate(layers):
        # The tables of level n lie in the memory of level n - 1's guest, which is shifted n times.
        segments.extend((address + level * shift, bytes(page)) for address, page in builder.pages.items())
    content = bytes(at >> 12 & 0xFF for at in range(0, span, 16)) * 16
    base = depth * shift + 0x100 * K4
    return vtdbg.memory_from_segments([*segments, (base, content)]), [builder.root | 0x1E for builder in layers], base - depth * shift


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_views_stack(depth: int) -> None:
    """The memory of an L2 guest through L1's EPT in the memory of L1 through L0's EPT."""
    memory, eptps, gpa = stack(depth)
    view: vtdbg.PhysicalMemory = memory
    for eptp in eptps:
        view = GuestPhysicalMemory(view, Ept(eptp))
    physical = gpa + depth * 0x40 * K4
    assert view.read(gpa, 16 * K4) == memory.read(physical, 16 * K4)
    assert view.read(gpa + 0xFF9, 0x20) == memory.read(physical + 0xFF9, 0x20)
    assert view.read(gpa, 100 * K4) == memory.read(physical, 100 * K4), "long reads enumerate, short ones walk"
    listed = view.ranges()
    assert listed is not None and any(start <= gpa < start + length for start, length in listed)
    assert b"".join(bytes(piece) for _, piece in view.views()) == b"".join(view.read(start, length) for start, length in listed)
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        view.read(gpa + 0x100 * K4, 8)
    assert error.value.space == "guest-physical" and error.value.address == gpa + 0x100 * K4


def test_the_reason_of_a_stacked_view_names_the_layer_that_lacks_it() -> None:
    memory, eptps, gpa = stack(2)
    inner = GuestPhysicalMemory(GuestPhysicalMemory(memory, Ept(eptps[0])), Ept(eptps[1]))
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        inner.read(0x1FF * K4, 8)
    assert "guest-physical address 0x23f000" in str(error.value) and "level 2 PDE at 0x22008 is not present" in str(error.value)


@settings(max_examples=40, deadline=None)
@given(offset=st.integers(0, 20 * K4), size=st.integers(0, 20 * K4))
def test_reads_across_pages_are_the_bytes_of_the_pages_in_order(offset: int, size: int) -> None:
    """Pages mapped in reverse order: any slice of the guest's memory is the slice of the pages put together."""
    builder = TableBuilder(base=0x400000)
    data = bytes(index * 7 + (index >> 8) & 0xFF for index in range(24 * K4))
    for index in range(24):
        builder.map(0x10000 + index * K4, 0x100000 + (23 - index) * K4, K4, 0x37, 7)
    memory = builder.memory(*[(0x100000 + (23 - index) * K4, data[index * K4:(index + 1) * K4]) for index in range(24)])
    for view in (GuestPhysicalMemory(memory, Ept(builder.root | 0x1E)), GuestPhysicalMemory(memory, Npt(builder.root)),
                 LinearMemory(memory, Paging.named("4-level", builder.root))):
        if offset + size <= 24 * K4:
            assert view.read(0x10000 + offset, size) == data[offset:offset + size]
        else:
            with pytest.raises(vtdbg.MemoryUnavailable) as error:
                view.read(0x10000 + offset, size)
            assert error.value.address == 0x10000 + 24 * K4


def test_a_view_of_tables_that_contain_themselves_ends() -> None:
    memory = vtdbg.memory_from_segments([(0, struct.pack("<Q", 7) * 512)])
    view = LinearMemory(memory, Paging.named("4-level", 0), limit=10_000)
    assert view.read(0x123456789ABC & -8, 8) == struct.pack("<Q", 7)
    with pytest.raises(vtdbg.VtdbgError, match="too much to list"):
        view.ranges()


def test_reads_that_cannot_be() -> None:
    memory, _, eptp = two_dimensions()
    view = GuestPhysicalMemory(memory, Ept(eptp))
    assert view.read(0x7000, 0) == b""
    for address, size in ((-1, 4), (0x7000, -1), ((1 << 64) - 4, 8)):
        with pytest.raises(vtdbg.MemoryUnavailable):
            view.read(address, size)
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        GuestPhysicalMemory(memory, Ept(0x400006)).read(0x7000, 4)
    assert "page-walk length" in str(error.value)


def test_memory_that_is_mapped_and_not_in_the_dump_names_both_addresses() -> None:
    builder = TableBuilder(base=0x400000)
    builder.map(0x7000, 0xABC000, K4, 0x37, 7)
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        GuestPhysicalMemory(builder.memory(), Ept(builder.root | 0x1E)).read(0x7008, 4)
    assert error.value.address == 0x7008 and "0xabc008" in str(error.value)
    walk = vtdbg.ept_walk(builder.memory(), builder.root | 0x1E, 0x7008, Access(read=True))
    assert walk.hpa == 0xABC008, "where it goes is known all the same"
