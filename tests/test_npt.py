"""NPT: walks of KVM-AMD's tables against pagemap and KVM's exit trace, and the manual's rules for nested faults."""

from __future__ import annotations

import json
import re
import struct
from typing import Any, Dict, List, Tuple

import pytest
from support.tables import G1, K4, M2, TableBuilder

import vtdbg
from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration
from vtdbg.memory.views import GuestPhysicalMemory
from vtdbg.svm.npt import ASSUMED_WIDTH, Npt
from vtdbg.walk import Access

DUMPS = ["amd_exit", "amd_l2"]
NX = 1 << 63
QEMU_LEAVES_P_CLEAR = 1
"""EXITINFO1 of a reserved-bit fault: QEMU's processor reports RSV without P, which a real one sets with it (APM: RSV is of a present entry)."""


@pytest.fixture(params=DUMPS)
def dump(request: pytest.FixtureRequest) -> Tuple[vtdbg.PhysicalMemory, int, Dict[str, Any]]:
    truth = request.getfixturevalue(f"{request.param}_truth")
    memory = vtdbg.open(str(request.getfixturevalue(request.param))).memory
    return memory, int(truth["vmcb"]["nested_cr3"], 16), truth


def test_26_guest_pages_go_where_pagemap_says(dump: Any) -> None:
    """19 equal, 7 that KVM had not mapped yet, none wrong; every entry on the way is the one that an independent walker read."""
    memory, ncr3, truth = dump
    outcomes: List[str] = []
    for page in truth["gpa_truth"]:
        walk = vtdbg.npt_walk(memory, ncr3, int(page["gpa"], 16))
        assert [[step.level, hex(step.address), hex(step.entry)] for step in walk.steps] == page["npt_path"]
        if walk.hpa is not None:
            assert walk.hpa == int(page["hpa_pagemap"], 16)
        else:
            assert walk.outcome == "violation" and page["status"] == "npt-not-present" and walk.steps[-1].entry == 0
        outcomes.append(walk.outcome)
    assert (len(outcomes), outcomes.count("mapped"), outcomes.count("violation")) == (26, 19, 7)


def test_mmio_entries_with_the_reserved_bit_51_do_not_translate(dump: Any) -> None:
    """KVM installs present entries with bit 51 set for pages without a slot, here at 0x200000 and 0x300000 (the program's MMIO)."""
    memory, ncr3, truth = dump
    marked = [leaf for leaf in truth["npt_leaves"] if int(leaf["pte"], 16) >> 51 & 1]
    assert [leaf["gpa"] for leaf in marked] == ["0x200000", "0x300000"]
    for leaf in marked:
        for width in (None, 48, 40):
            walk = vtdbg.npt_walk(memory, ncr3, int(leaf["gpa"], 16) + 8, "w", width=width)
            assert (walk.outcome, walk.hpa, walk.maps_to) == ("misconfiguration", None, None)
            assert walk.exitinfo1 == walk.qualification == 1 << 32 | 0xF
            assert [rule.id for rule in walk.rules] == ["address-width"]
            assert "reserved bit" in walk.reason and "KVM" in walk.reason and leaf["gpa"] in walk.reason
    assert walk.assumptions and not any("width" in text for text in walk.assumptions)
    assert vtdbg.npt_walk(memory, ncr3, 0x200000, width=52).hpa == 0x8000000200000, "a processor with 52 address bits would use bit 51"


def test_all_leaves_are_enumerated_and_nothing_else(dump: Any) -> None:
    memory, ncr3, truth = dump
    rows = Enumeration(memory, Npt(ncr3))
    found = {(hex(leaf.start), hex(leaf.entry), leaf.page_size) for leaf in rows.leaves()}
    broken = {(hex(problem.start), hex(problem.entry or 0), problem.length) for problem in rows.problems}
    assert found | broken == {(leaf["gpa"], leaf["pte"], leaf["size"]) for leaf in truth["npt_leaves"]}
    assert list(rows) and {(hex(problem.start), hex(problem.entry or 0), problem.length) for problem in rows.problems} == broken, "merged or not"
    assert len(broken) == 2 and all(problem.kind == "misconfiguration" and problem.path for problem in rows.problems)


def test_exitinfo1_of_kvms_nested_faults_follows_from_the_access(dump: Any) -> None:
    """KVM's trace of the pages it faulted in: low word (not present, write, user), and final translation or table walk as bit 32 or 33.

    A fault of the table walk is a write whatever the guest does, as accesses to guest tables count as writes.
    """
    memory, ncr3, truth = dump
    empty = vtdbg.memory_from_segments([(0, bytes(K4))])
    seen = set()
    for line in truth["kvm_exit_trace"]:
        match = re.search(r"reason npf .* info1 (0x[0-9a-f]+) info2 (0x[0-9a-f]+)", line)
        if match is None:
            continue
        info1, gpa = (int(text, 16) for text in match.groups())
        walking = bool(info1 >> 33 & 1)
        access = Access(read=not info1 & 2, write=bool(info1 & 2) and not walking, fetch=bool(info1 & 16),
                        linear="page-walk" if walking else "translation")
        reserved = bool(info1 & 8)
        walk = vtdbg.npt_walk(memory if reserved else empty, ncr3 if reserved else 0, gpa, access)
        expected = info1 | QEMU_LEAVES_P_CLEAR if reserved else info1
        if info1 & 1 and not reserved:
            # Present and denied: the read-only slot at 0x800000.
            walk = vtdbg.npt_walk(memory, ncr3, gpa, access)
        assert walk.exitinfo1 == expected, line
        seen.add(info1 & ~1)
    assert {0x200000006, 0x100000004, 0x100000006, 0x100000014} <= seen


def test_a_guest_reads_through_its_nested_tables(dump: Any) -> None:
    memory, ncr3, truth = dump
    guest = GuestPhysicalMemory(memory, Npt(ncr3))
    for walk in truth["gva_walks"]:
        for _, address, entry in walk["guest_path"]:
            assert guest.read_u64(int(address, 16)) == int(entry, 16)
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        guest.read(0x11FF8, 16)
    assert error.value.space == "guest-physical"
    # The list of what can be read is what single reads find.
    listed = guest.ranges()
    assert listed is not None
    present = {at for start, length in listed for at in range(start, start + length, K4)}
    for leaf in truth["npt_leaves"]:
        start = int(leaf["gpa"], 16)
        for gpa in range(start, start + leaf["size"], K4):
            try:
                guest.read(gpa, K4)
                readable = True
            except vtdbg.MemoryUnavailable:
                readable = False
            assert readable == (gpa in present)
    assert b"".join(bytes(view) for _, view in guest.views()) == b"".join(guest.read(start, length) for start, length in listed)


# ---- the manual's rules -------------------------------------------------------------------------------------------------------------

def one_page(leaf: int, size: int = K4, table: int = 7, top: int = 4, gpa: int = 0x40000000) -> Tuple[vtdbg.PhysicalMemory, int]:
    builder = TableBuilder(top=top, rights=7 | NX, inverse=NX)
    at, _ = builder.entry_address(gpa, {K4: 1, M2: 2, G1: 3}[size], table)
    builder.set(at, leaf)
    return builder.memory(), builder.root


@pytest.mark.parametrize("leaf, table, access, outcome, info1", [
    (0x1007, 7, "r", "mapped", None), (0x1007, 7, "w", "mapped", None), (0x1007, 7, "x", "mapped", None),
    (0x1005, 7, "r", "mapped", None), (0x1005, 7, "w", "violation", 0x100000007), (0x1005, 7, "x", "mapped", None),
    (0x1005, 7, "page-walk", "violation", 0x200000007), (0x1007 | NX, 7, "x", "violation", 0x100000015), (0x1007 | NX, 7, "r", "mapped", None),
    (0x1003, 7, "r", "violation", 0x100000005), (0x1003, 7, "page-walk", "violation", 0x200000007), (0x1007, 3, "x", "violation", 0x100000015),
    (0x1007, 5, "w", "violation", 0x100000007), (0x1007, 7 | NX, "x", "violation", 0x100000015),
    (0x1006, 7, "r", "violation", 0x100000004), (0, 7, "w", "violation", 0x100000006), (0, 7, "x", "violation", 0x100000014),
    (0x1007 | 1 << 48, 7, "r", "misconfiguration", 0x10000000D), (0x1007 | 1 << 48, 7, "w", "misconfiguration", 0x10000000F),
])
def test_what_a_nested_fault_reports(leaf: int, table: int, access: str, outcome: str, info1: Any) -> None:
    """Every guest access is a user access to the nested tables; P, RW, US, RSV, ID in the low word, 32 final, 33 table walk."""
    memory, root = one_page(leaf, table=table)
    walk = vtdbg.npt_walk(memory, root, 0x40000000, access, mode="4-level", width=48, nxe=True)
    assert (walk.outcome, walk.exitinfo1, walk.assumptions) == (outcome, info1, ())
    assert (walk.hpa == 0x1000) == (outcome == "mapped")


def test_a_supervisor_page_is_nobodys() -> None:
    memory, root = one_page(0x1003)
    walk = vtdbg.npt_walk(memory, root, 0x40000000)
    assert (walk.outcome, walk.hpa, walk.maps_to) == ("violation", None, 0x1000) and "US=0" in walk.reason


def test_nx_is_reserved_while_the_hosts_nxe_is_0() -> None:
    memory, root = one_page(0x1007 | NX)
    walk = vtdbg.npt_walk(memory, root, 0x40000000, "x", nxe=False)
    assert (walk.outcome, walk.exitinfo1) == ("misconfiguration", 0x10000000D), "and a fetch is not told apart"
    assert [rule.id for rule in walk.rules] == ["nx-disabled"]
    assert any("NXE" in text for text in vtdbg.npt_walk(memory, root, 0).assumptions)


@pytest.mark.parametrize("level, bit", [(4, 7), (4, 8), (5, 7), (5, 8)])
def test_reserved_bits_of_upper_entries(level: int, bit: int) -> None:
    builder = TableBuilder(top=5, rights=7)
    builder.map(0, 0x1000, K4, 7, 7)
    at, _ = builder.entry_address(0, level)
    builder.set(at, builder.get(at) | 1 << bit)
    walk = vtdbg.npt_walk(builder.memory(), builder.root, 0, mode="5-level")
    assert (walk.outcome, walk.level) == ("misconfiguration", level)


@pytest.mark.parametrize("leaf, size, expected", [
    (0x40000087, M2, 0x40000000), (0x40001087, M2, 0x40000000), (0x40002087, M2, None), (0x40100087, M2, None),
    (0x40000087, G1, 0x40000000), (0x60000087, G1, None)])
def test_large_pages_reserve_the_address_bits_below_their_size_but_pat(leaf: int, size: int, expected: Any) -> None:
    memory, root = one_page(leaf, size)
    walk = vtdbg.npt_walk(memory, root, 0x40000000)
    assert (walk.hpa, walk.page_size) == (expected, size if expected else None)


def test_five_levels_and_addresses_beyond_four() -> None:
    memory, root = one_page(0x1007, top=5, gpa=1 << 50)
    assert vtdbg.npt_walk(memory, root, (1 << 50) + 1, mode="5-level").hpa == 0x1001
    walk = vtdbg.npt_walk(memory, root, 1 << 50, "r")
    assert (walk.outcome, walk.steps) == ("violation", ()) and "48 bits" in walk.reason
    assert any("4-level" in text for text in walk.assumptions)


def test_hosts_in_pae_and_32_bit_mode_have_nested_tables_of_their_own_format() -> None:
    pae = TableBuilder(top=3, rights=7 | NX, inverse=NX, top_grants=6)
    pde, _ = pae.entry_address(0xC0200000, 2, 1)
    pae.set(pde, pae.page() | 7)
    pae.map(0xC0200000, 0x5000, K4, 7, 1)
    walk = vtdbg.npt_walk(pae.memory(), pae.root, 0xC0200123, "w", mode="PAE")
    assert (walk.hpa, [step.name for step in walk.steps]) == (0x5123, ["PDPTE", "PDE", "PTE"])
    directory = bytearray(K4)
    struct.pack_into("<I", directory, 4 * (0xC0400000 >> 22), 0x00C00087)
    struct.pack_into("<I", directory, 4 * (0x00400000 >> 22), 0x2007)
    table = bytearray(K4)
    struct.pack_into("<I", table, 4 * 5, 0x9003)
    memory = vtdbg.memory_from_segments([(0x1000, bytes(directory)), (0x2000, bytes(table))])
    assert vtdbg.npt_walk(memory, 0x1000, 0xC0412345, "x", mode="32-bit").hpa == 0xC12345
    assert vtdbg.npt_walk(memory, 0x1000, 0xC0412345, mode="32-bit", pse=False).outcome == "unreadable", "PS is ignored without CR4.PSE"
    walk = vtdbg.npt_walk(memory, 0x1000, 0x405000, mode="32-bit")
    assert (walk.outcome, walk.maps_to) == ("violation", 0x9000), "a supervisor page"


def test_the_c_bit_is_no_address_bit() -> None:
    c_bit = 1 << 47
    builder = TableBuilder(rights=7)
    builder.map(0x40000000, 0x1000, K4, 7, 7)
    for page in list(builder.pages.values()):
        for offset in range(0, K4, 8):
            entry = struct.unpack_from("<Q", page, offset)[0]
            if entry:
                struct.pack_into("<Q", page, offset, entry | c_bit)
    memory = builder.memory()
    assert vtdbg.npt_walk(memory, builder.root | c_bit, 0x40000000, "w", c_bit=47, width=43).hpa == 0x1000
    assert vtdbg.npt_walk(memory, builder.root, 0x40000000, "w", width=43).outcome == "misconfiguration"


def test_guest_mode_execute_trap() -> None:
    """GMET: supervisor mode may not fetch from pages with U/S=1, and uses pages with U/S=0."""
    memory, root = one_page(0x1007)
    assert vtdbg.npt_walk(memory, root, 0x40000000, Access(fetch=True, user=True), gmet=True).mapped
    assert vtdbg.npt_walk(memory, root, 0x40000000, Access(fetch=True, user=False), gmet=True).exitinfo1 == 0x100000011
    memory, root = one_page(0x1003)
    assert vtdbg.npt_walk(memory, root, 0x40000000, Access(fetch=True, user=False), gmet=True).mapped
    assert not vtdbg.npt_walk(memory, root, 0x40000000, Access(read=True, user=True), gmet=True).mapped


def test_read_only_guest_page_tables() -> None:
    memory, root = one_page(0x1005)
    assert not vtdbg.npt_walk(memory, root, 0x40000000, "page-walk").mapped
    assert vtdbg.npt_walk(memory, root, 0x40000000, "page-walk", read_only_gpt=True).mapped


def test_ncr3_is_checked() -> None:
    memory = vtdbg.memory_from_segments([(0, bytes(K4))])
    walk = vtdbg.npt_walk(memory, 1 << 48, 0, width=48)
    assert walk.outcome == "misconfiguration" and "VMEXIT_INVALID" in walk.reason and not walk.steps
    assert vtdbg.npt_walk(memory, 0xFFF, 0).outcome == "violation", "low bits are no part of the address; a root at 0 is legal"


def test_memory_types_need_the_pat() -> None:
    memory, root = one_page(0x1007 | 1 << 4)
    assert vtdbg.npt_walk(memory, root, 0x40000000).memory_type == "PAT2"
    assert vtdbg.npt_walk(memory, root, 0x40000000, pat=0x0007040600070406).memory_type == "UC-"
    memory, root = one_page(0x40001087 | 1 << 3, M2)
    assert vtdbg.npt_walk(memory, root, 0x40000000).memory_type == "PAT5", "PAT is bit 12 of a large page"


def test_the_width_that_is_assumed_is_said() -> None:
    memory, root = one_page(0x1007)
    assert any(str(ASSUMED_WIDTH) in text for text in vtdbg.npt_walk(memory, root, 0).assumptions)


def test_the_format_is_that_of_the_host(tmp_path: Any) -> None:
    """Nested tables have the format of the host's own paging (APM vol. 2, Nested Paging): on a host with CR4.LA57 they have five levels.  The
    VMCB does not say it; --host-paging does, and a host whose registers are known."""
    builder = TableBuilder(top=5, rights=7)
    builder.map(0x7000, 0x123000, K4, 0x67, 7)
    path = tmp_path / "ram.raw"
    path.write_bytes(b"".join(bytes(builder.pages.get(at, bytes(K4))) for at in range(0, builder.free, K4)))
    session = Session(str(path))

    def walked(extra: str) -> Any:
        outcome = run_words(f"npt walk 0x7000 --ncr3 {builder.root:#x} --json {extra}".split(), session, lambda report, _options: "")
        return json.loads(outcome.text)["walk"][0]

    assert walked("")["outcome"] != "mapped" or walked("")["address"] != "0x000123000"
    found = walked("--host-paging 5-level")
    assert found["outcome"] == "mapped" and [step["level"][0] for step in found["steps"]] == list("54321")
    long_mode = {"cr0": 0x80050033, "cr4": 0x1020, "efer": 0xD01}
    on_host = Npt(builder.root).on_host(long_mode)
    assert on_host.walk(builder.memory(), 0x7123).hpa == 0x123123
    assert Npt(builder.root).on_host({**long_mode, "cr4": 0x20}).walk(builder.memory(), 0x7123).hpa != 0x123123
    # What is not known of a host changes nothing.
    assert Npt(builder.root).on_host({"cr4": 0x1020}) == Npt(builder.root)
    session.close()


def test_execute_disable_of_a_host_without_nxe_is_reserved() -> None:
    """Bit 63 of an entry is reserved while the host's EFER.NXE is 0 (APM vol. 2, No-Execute Page-Protection)."""
    memory, root = one_page(0x1067 | NX)
    registers = {"cr0": 0x80050033, "cr4": 0x20, "efer": 0x501}
    assert Npt(root).on_host(registers).walk(memory, 0x40000000).outcome == "misconfiguration"
    assert Npt(root).on_host({**registers, "efer": 0xD01}).walk(memory, 0x40000000).outcome == "mapped"
