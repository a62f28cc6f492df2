"""The `ept` verbs as they are typed: hooks through an EPTP list, differences of two dumps, the filters of `dump`, lint with its inputs; hostile
tables under a limit of processor time; the line of progress on a terminal, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from support.live import PATIENCE
from support.tables import G1, K4, M2, TableBuilder

from vtdbg import enumeration
from vtdbg.commands.run import Outcome, run_words
from vtdbg.commands.session import Session
from vtdbg.machine import Machine
from vtdbg.memory.base import memory_from_segments
from vtdbg.memory.open import open_machine
from vtdbg.render.text import render_text
from vtdbg.vmx import fields, layouts
from vtdbg.vmx.vmcs import Vmcs

VM_A = 0x6826000


def typed(*words: str, session: Optional[Session] = None) -> Outcome:
    own = session or Session()
    try:
        return run_words(list(words), own, lambda report, options: json.dumps(report.to_json()) if options.get("json") else render_text(report, 120))
    finally:
        own.close()


def text(*words: str, status: int) -> str:
    outcome = typed(*words)
    assert not outcome.error, outcome.error
    assert outcome.status == status, outcome.text
    return " ".join(outcome.text.split())


def rows(table: str, *words: str) -> List[Dict[str, Any]]:
    """The rows of a table in the JSON of all groups."""
    outcome = typed(*words, "--json")
    assert not outcome.error, outcome.error
    return [plain(row) for group in json.loads(outcome.text)["tables"] for row in group.get(table, ())]


def plain(value: Any) -> Any:
    """Addresses as hex() writes them."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return hex(int(value, 16)) if isinstance(value, str) and re.fullmatch("0x[0-9a-f]+", value) else value


def image(path: Path, *segments: Tuple[int, bytes]) -> Path:
    data = bytearray(max(address + len(content) for address, content in segments))
    for address, content in segments:
        data[address:address + len(content)] = content
    path.write_bytes(data)
    return path


def pages_of(*builders: TableBuilder) -> List[Tuple[int, bytes]]:
    return [(address, bytes(page)) for builder in builders for address, page in builder.pages.items()]


# ---- a guest with EPTP switching -------------------------------------------------------------------------------------------------------

HOOKED = M2 + 0x5000
ORIGINAL = b"\x90" * 64 + b"\x48\x89\x5c\x24\x08\x57" + b"\x90" * (K4 - 70)
PATCHED = ORIGINAL[:64] + b"\xe9\x00\x10\x00\x00\x57" + ORIGINAL[70:]
FRAME = 0x900000


def view(base: int, hooked: Optional[Tuple[int, int]] = None) -> TableBuilder:
    """8 MiB mapped to themselves, the second 2 MiB by 4 KiB pages; the page HOOKED by (frame, rights)."""
    builder = TableBuilder(base=base)
    for index in (0, 2, 3):
        builder.map(index * M2, index * M2, M2, 0xB7, 7)
    for at in range(M2, 2 * M2, K4):
        frame, rights = hooked if hooked is not None and at == HOOKED else (at, 7)
        builder.map(at, frame, K4, 0x30 | rights, 7)
    return builder


@pytest.fixture(scope="module")
def values(intel_plain: Path) -> Dict[int, int]:
    with open_machine(intel_plain).memory as memory:
        return {value.field.encoding: value.value for value in Vmcs.from_page(memory.read_page(VM_A)).values()}


def vmcs_page(values: Dict[int, int], **changed: int) -> bytes:
    more = {fields.find(name).encoding: value for name, value in changed.items()}
    return layouts.layout("bochs_2.7").write_page({**values, fields.find("VMCS_LINK_POINTER").encoding: (1 << 64) - 1, **more})


def switching(values: Dict[int, int], eptp: int, listed: int) -> bytes:
    """A VMCS with "enable VM functions" (bit 13) and "EPTP switching" (bit 0 of the VM-function controls) on."""
    secondary = values[fields.find("SECONDARY_VM_EXEC_CONTROL").encoding] | 1 << 13
    return vmcs_page(values, EPT_POINTER=eptp, SECONDARY_VM_EXEC_CONTROL=secondary, VM_FUNCTION_CONTROL=1, EPTP_LIST_ADDRESS=listed)


@pytest.fixture(scope="module")
def switched(values: Dict[int, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One VMCS whose EPTP list has two views: the second runs another frame at HOOKED, execute-only."""
    plain, hooking = view(0xA00000), view(0xB00000, (FRAME, 4))
    listed = struct.pack("<3Q", plain.root | 0x1E, hooking.root | 0x1E, 0xDEADBEEF001) + bytes(K4 - 24)
    return image(tmp_path_factory.mktemp("views") / "switched.raw", *pages_of(plain, hooking), (HOOKED, ORIGINAL), (FRAME, PATCHED),
                 (0xC00000, listed), (0xC01000, switching(values, plain.root | 0x1E, 0xC00000)), (0xC02000, bytes(K4)))


def test_a_hook_in_an_eptp_list_is_found_with_its_bytes_as_code(switched: Path) -> None:
    """SDM vol. 3, EPTP Switching: VMFUNC takes the guest to the EPT of any valid entry of the list that the VMCS names."""
    shown = text("ept", "hooks", "-s", str(switched), "--format", "raw", status=1)
    assert "EPTP 0xb0001e (entry 1 of the EPTP list of VMCS at 0xc01000) against EPTP 0xa0001e (VMCS at 0xc01000" in shown
    assert "0x000205000 4 KiB 0x000900000 --x 0x000205000 rwx view-frame, view-rights" in shown
    assert "5 bytes differ in 1 place" in shown
    assert "0x000205040 mov qword ptr [rsp + 8], rbx jmp 0x206045" in shown
    assert "entry 2 (0xdeadbeef001) is no valid EPTP" in shown
    # What the tables alone say of the second view: an execute-only page that leaves the rule of its surroundings.
    assert "execute-only" in shown


def test_hooks_of_a_part(switched: Path) -> None:
    words = ("ept", "hooks", "-s", str(switched), "--format", "raw", "--no-code", "--gpa")
    assert "view-frame" in text(*words, "0x200000-0x210000", status=1)
    shown = text(*words, "0x0-0x200000", status=0)
    assert "nothing stands out" in shown and "2 MiB of 2 MiB go to the same frames" in shown


def test_the_list_counts_only_with_the_controls_that_activate_it(values: Dict[int, int], tmp_path: Path) -> None:
    plain, hooking = view(0xA00000), view(0xB00000, (FRAME, 4))
    listed = struct.pack("<2Q", plain.root | 0x1E, hooking.root | 0x1E) + bytes(K4 - 16)
    path = image(tmp_path / "off.raw", *pages_of(plain, hooking), (HOOKED, ORIGINAL), (FRAME, PATCHED), (0xC00000, listed),
                 (0xC01000, vmcs_page(values, EPT_POINTER=plain.root | 0x1E, VM_FUNCTION_CONTROL=1, EPTP_LIST_ADDRESS=0xC00000,
                                      SECONDARY_VM_EXEC_CONTROL=values[fields.find("SECONDARY_VM_EXEC_CONTROL").encoding] & ~(1 << 13))),
                 (0xC02000, bytes(K4)))
    assert "EPTP list" not in text("ept", "hooks", "-s", str(path), "--format", "raw", status=1)
    shown = text("ept", "hooks", "-s", str(path), "--format", "raw", "--with", hex(hooking.root | 0x1E), status=1)
    assert "EPTP 0xb0001e against EPTP 0xa0001e" in shown and "jmp 0x206045" in shown


def test_the_epts_of_several_processors_are_compared_and_those_of_strangers_are_not(values: Dict[int, int], tmp_path: Path) -> None:
    one, two = view(0xA00000), view(0xB00000, (FRAME, 4))
    stranger = TableBuilder(base=0xD00000)
    stranger.map(0, 0x40000000, G1, 0xB7, 7)
    blocks = [(0xC00000 + K4 * number, vmcs_page(values, EPT_POINTER=builder.root | 0x1E)) for number, builder in enumerate((one, two, stranger))]
    path = image(tmp_path / "vcpus.raw", *pages_of(one, two, stranger), (HOOKED, ORIGINAL), (FRAME, PATCHED), *blocks)
    shown = text("ept", "hooks", "-s", str(path), "--format", "raw", status=1)
    assert re.search(r"EPTP 0xb0001e \(VMCS at 0xc01000[^:]* against EPTP 0xa0001e \(VMCS at 0xc00000[^:]*: "
                     "8188 KiB of 8 MiB go to the same frames", shown)
    assert "jmp 0x206045" in shown
    assert "not compared, because they share less than half of their frames (separate guests): EPTP 0xd0001e and EPTP 0xa0001e" in shown


def test_nested_page_tables_of_amd_are_compared_alike(tmp_path: Path) -> None:
    """The same in the host's own format: a page of the second root goes to another frame and is not executable (NX, bit 63)."""
    def tables(base: int, frame: int, nx: int) -> TableBuilder:
        builder = TableBuilder(base=base, inverse=1 << 63, rights=1 << 63 | 7)
        for at in range(M2, 2 * M2, K4):
            builder.map(at, frame if at == HOOKED else at, K4, 0x67 | (nx << 63 if at == HOOKED else 0), 0x67)
        return builder

    path = image(tmp_path / "npt.raw", *pages_of(tables(0xA00000, HOOKED, 0), tables(0xB00000, FRAME, 1)), (HOOKED, ORIGINAL), (FRAME, PATCHED))
    words = ("-s", str(path), "--format", "raw")
    shown = text("npt", "hooks", "--ncr3", "0xa00000", "--with", "0xb00000", *words, status=1)
    assert "0x000205000 4 KiB 0x000900000 rw-u 0x000205000 rwxu view-frame, view-rights" in shown and "jmp 0x206045" in shown
    change, = rows("changes", "npt", "diff", "--ncr3", "0xa00000", "--other-ncr3", "0xb00000", *words)
    assert (change["start"], change["aspects"]) == (hex(HOOKED), ["frame", "permissions"])
    assert [row["gpa"] for row in rows("places", "npt", "find", hex(FRAME), "--ncr3", "0xb00000", *words)] == [hex(HOOKED)]


# ---- differences -------------------------------------------------------------------------------------------------------------------------

def test_two_dumps_are_compared_by_name(tmp_path: Path) -> None:
    one, two = view(0xA00000), view(0xA00000, (FRAME, 4))
    before, after = image(tmp_path / "before.raw", *pages_of(one)), image(tmp_path / "after.raw", *pages_of(two))
    words = ("ept", "diff", "-s", str(before), "--format", "raw", "--eptp", "0xa0001e")
    assert "both map the same" in text(*words, "--other", str(before), status=0)
    change, = rows("changes", *words, "--other", str(after))
    assert (change["start"], change["length"], change["aspects"]) == ("0x205000", K4, ["frame", "permissions"])
    assert (change["before"]["target"], change["after"]["target"], change["after"]["permissions"]) == ("0x205000", "0x900000", "--x")
    assert "second: raw image" in text(*words, "--other", str(after), status=1)


def test_entries_that_lead_nowhere_are_reported_for_their_side(tmp_path: Path) -> None:
    """A page that becomes misconfigured, a table that is not in the second dump, and a broken entry that both have."""
    def tables(rights: int) -> TableBuilder:
        builder = TableBuilder(base=0x10000)
        builder.map(0, 0x400000, K4, 0x30 | rights, 7)
        builder.map(K4, 0x401000, K4, 0x37, 7)
        builder.map(2 * K4, 0x402000, K4, 0x32, 7)
        builder.map(G1, 0x403000, K4, 0x37, 7)
        return builder

    one, two = tables(7), tables(2)
    far, _ = two.entry_address(G1, 1)
    before = image(tmp_path / "before.raw", *pages_of(one))
    after = image(tmp_path / "after.raw", *[(at, page) for at, page in pages_of(two) if at < far & -K4])
    words = ("ept", "diff", "-s", str(before), "--format", "raw", "--eptp", "0x1001e", "--other", str(after))
    assert [(row["start"], row["kind"], row["aspects"], row["after"]) for row in rows("changes", *words)] == [
        ("0x0", "removed", ["misconfiguration"], "misconfiguration"), (hex(G1), "removed", ["unreadable"], "unreadable")]
    broken = rows("broken", *words)
    assert [(row["side"], row["start"], row["kind"]) for row in broken] == [("second", "0x0", "misconfiguration"), ("second", hex(G1), "unreadable")]
    assert broken[0]["path"][-1] == hex(two.made[0].entry_address) and len(broken[0]["path"]) == 4
    shown = text(*words, status=1)
    assert "removed? " in shown, "what cannot be read is not said to be gone"
    assert "1 entry or table is broken in both alike" in shown


def test_what_one_side_gave_up_before_is_not_said_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enumeration, "REPEATED_LIMIT", 2000)
    path = image(tmp_path / "x.raw", (0x5000, HOSTILE["self"]), *pages_of(view(0xA00000)))
    for words in (("--eptp", "0x501e", "--other-eptp", "0xa0001e"), ("--eptp", "0xa0001e", "--other-eptp", "0x501e")):
        found = rows("changes", "ept", "diff", "-s", str(path), "--format", "raw", *words)
        assert {row["kind"] for row in found} <= {"changed"} or all(int(row["start"], 16) < 8 * M2 for row in found)
        shown = text("ept", "diff", "-s", str(path), "--format", "raw", *words, status=1)
        end = int(re.findall(r"compared up to (0x[0-9a-f]+)", shown)[0], 16)
        assert all(int(row["last"], 16) <= end for row in found) and "reached again and again" in shown and "both map the same" not in shown


# ---- dump --------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of every size, several rights, types and flags; one goes where no memory is."""
    builder = TableBuilder(base=0x10000)
    for address, target, size, flags in ((0, 0x4000, K4, 0x37), (0x1000, 0x5000, K4, 0x37), (0x2000, 0x6000, K4, 0x35), (0x3000, 0x7000, K4, 0x34),
                                         (0x4000, 0x8000, K4, 0x07), (0x5000, 0x9000, K4, 0x37 | 1 << 6), (0x6000, 0xA000, K4, 0x37 | 3 << 8),
                                         (M2, 0x200000, M2, 0xB7), (G1, G1, G1, 0xB7)):
        builder.map(address, target, size, flags, 7)
    return image(tmp_path_factory.mktemp("mixed") / "mixed.raw", *pages_of(builder), (0x3FF000, bytes(K4)))


EPTP_AD = "0x1005e"
FILTERS = {
    "--perm x": ["0x0", "0x2000", "0x3000", "0x4000", "0x5000", "0x6000", hex(M2), hex(G1)],
    "--perm !w": ["0x2000", "0x3000"],
    "--perm r-x": ["0x2000"],
    "--perm x!r": ["0x3000"],
    "--gpa 0x2000-0x5000": ["0x2000", "0x3000", "0x4000"],
    "--gpa 0x1000+0x1000": ["0x1000"],
    "--hpa 0x7000-0x9000": ["0x3000", "0x4000"],
    "--type uc": ["0x4000"],
    "--size 2m": [hex(M2)],
    "--size 1g": [hex(G1)],
    "--size 4k --perm w --type wb": ["0x0", "0x5000", "0x6000"],
    "--flag ipat": ["0x5000"],
    "--flag D": ["0x6000"],
    "--flag !D --size 4k --gpa 0x5000-0x7000": ["0x5000"],
}


@pytest.mark.parametrize("words", FILTERS)
def test_every_filter_of_dump(words: str, mixed: Path) -> None:
    found = rows("ranges", "ept", "dump", "-s", str(mixed), "--format", "raw", "--eptp", EPTP_AD, *words.split())
    assert [row["first"] for row in found] == FILTERS[words]


def test_page_sizes_are_kept_or_ignored(tmp_path: Path) -> None:
    path = image(tmp_path / "x.raw", *pages_of(view(0xA00000)))
    words = ("ept", "dump", "-s", str(path), "--format", "raw", "--eptp", "0xa0001e")
    assert [(row["first"], row["page_size"]) for row in rows("ranges", *words)] == [("0x0", M2), (hex(M2), K4), (hex(2 * M2), M2)]
    row, = rows("ranges", *words, "--ignore-page-size")
    assert (row["first"], row["last"], row["size"], row["page_size"]) == ("0x0", hex(4 * M2 - 1), 4 * M2, K4)


def test_the_summary_counts_by_size_and_type_and_says_what_lies_outside(mixed: Path) -> None:
    shown = text("ept", "dump", "-s", str(mixed), "--format", "raw", "--eptp", EPTP_AD, status=0)
    assert ("1050652 KiB mapped in 8 ranges, from 0x0 to 0x7fffffff (7 pages of 4 KiB, 1 page of 2 MiB, 1 page of 1 GiB; "
            "WB 1050648 KiB, UC 4 KiB)") in shown
    assert "1 GiB of it go to addresses that are not in this memory, the first at 0x40000000 to HPA 0x40000000" in shown
    assert "match" in text("ept", "dump", "-s", str(mixed), "--format", "raw", "--eptp", EPTP_AD, "--type", "uc", status=0)


@pytest.mark.parametrize("words", ["--perm q", "--gpa 5-4", "--hpa zz", "--size 8k", "--flag nope", "--type zz", "--limit 0"])
def test_a_filter_that_means_nothing_is_refused_in_one_line(words: str, mixed: Path) -> None:
    outcome = typed("ept", "dump", "-s", str(mixed), "--format", "raw", "--eptp", EPTP_AD, *words.split())
    assert outcome.status == 2 and outcome.error and "\n" not in outcome.error


# ---- lint --------------------------------------------------------------------------------------------------------------------------------

def linted(path: Path, eptp: int, *more: str) -> Dict[str, List[Dict[str, Any]]]:
    found: Dict[str, List[Dict[str, Any]]] = {}
    for row in rows("remarks", "ept", "lint", "-s", str(path), "--format", "raw", "--eptp", hex(eptp), *more):
        found.setdefault(row["id"], []).append(row)
    return found


def test_mtrrs_out_of_a_file(tmp_path: Path) -> None:
    """A device that the MTRRs call UC is mapped WB, and RAM that they call WB is mapped UC (SDM vol. 3, MTRRs: default type WB, one UC range)."""
    builder = TableBuilder(base=0x10000)
    builder.map(0, 0, M2, 0x87, 7)
    builder.map(M2, M2, M2, 0xB7, 7)
    builder.map(0xC0000000, 0xC0000000, M2, 0xB7, 7)
    path, msrs = image(tmp_path / "x.raw", *pages_of(builder)), tmp_path / "mtrr.txt"
    msrs.write_text("0xfe 0x501\n0x2ff 0x806\n0x200 0xc0000000\n0x201 0xfc0000800\n")
    found = linted(path, builder.root | 0x1E, "--mtrr", str(msrs))["mtrr"]
    assert [(row["verdict"], row["start"], row["length"]) for row in found] == [("fail", "0x0", M2), ("fail", "0xc0000000", M2)]
    right = TableBuilder(base=0x10000)
    right.map(0, 0, M2, 0xB7, 7)
    right.map(0xC0000000, 0xC0000000, M2, 0x87, 7)
    path = image(tmp_path / "right.raw", *pages_of(right))
    assert "mtrr" not in linted(path, right.root | 0x1E, "--mtrr", str(msrs))


def test_memory_maps_given_and_out_of_a_log(tmp_path: Path) -> None:
    path, log = image(tmp_path / "x.raw", *pages_of(view(0xA00000))), tmp_path / "dmesg.txt"
    log.write_text("[    0.000000] BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable\n"
                   "[    0.000000] BIOS-e820: [mem 0x0000000000100000-0x00000000008fffff] usable\n")
    for words in (("--ram", "0x100000-0x900000"), ("--e820", str(log))):
        row, = linted(path, 0xA0001E, *words)["ram"]
        assert (row["verdict"], row["start"], row["length"]) == ("fail", hex(8 << 20), 1 << 20)
    assert "ram" not in linted(path, 0xA0001E, "--ram", "0x100000-0x800000")


def test_a_dump_whose_memory_is_mapped_to_itself_says_itself_what_is_ram(tmp_path: Path) -> None:
    """A hypervisor under a running system maps memory to itself: the ranges of an ELF core are then the guest's too."""
    tables = view(0xA00000)
    segments = [*pages_of(tables), (0, bytes(K4)), (0x7FF000, bytes(0x2000))]
    machine = Machine(memory_from_segments(segments), "x", "test", "test")
    outcome = typed("ept", "lint", "--eptp", "0xa0001e", "--json", session=Session(_machine=machine))
    found = [plain(row) for row in json.loads(outcome.text)["tables"][0]["remarks"] if row["id"] == "ram"]
    assert found[0]["start"] == "0x800000" and found[0]["verdict"] == "fail"


def test_control_structures_in_reach_of_the_guest(values: Dict[int, int], tmp_path: Path) -> None:
    """The VMCS, the MSR bitmap and the EPT itself lie in memory that the EPT maps writable; and then not."""
    for reach in (True, False):
        builder = TableBuilder(base=0x300000)
        builder.map(0, 0, M2, 0xB7, 7)
        if reach:
            builder.map(M2, M2, M2, 0xB7, 7)
        page = vmcs_page(values, EPT_POINTER=builder.root | 0x1E, MSR_BITMAP=0x210000)
        path = image(tmp_path / f"{reach}.raw", *pages_of(builder), (0x220000, page), (0x210000, b"\xff" * K4), (0x3FF000, bytes(K4)))
        found = linted(path, builder.root | 0x1E)
        assert ("tables" in found) == reach
        said = {(row["start"], row["verdict"]) for row in found.get("control-pages", ())}
        assert said == ({("0x210000", "fail"), ("0x220000", "fail")} if reach else set())


def ve_dump(values: Dict[int, int], path: Path, on: int, leaf: int, absent: int) -> Path:
    """"EPT-violation #VE" is bit 18 of the secondary controls; `leaf` and `absent` are bits 63 of a page and of what is not mapped."""
    builder = TableBuilder(base=0x300000)
    builder.map(0, 0x100000, K4, 0x37 | leaf << 63, 7)
    for at, page in builder.pages.items():
        for index in range(512):
            if not struct.unpack_from("<Q", page, 8 * index)[0]:
                builder.set(at + 8 * index, absent << 63)
    secondary = values[fields.find("SECONDARY_VM_EXEC_CONTROL").encoding] & ~(1 << 18) | on << 18
    page = vmcs_page(values, EPT_POINTER=builder.root | 0x1E, SECONDARY_VM_EXEC_CONTROL=secondary)
    return image(path, *pages_of(builder), (0x220000, page), (0x3FF000, bytes(K4)))


def test_suppress_ve_counts_in_pages_and_in_what_is_not_present(values: Dict[int, int], tmp_path: Path) -> None:
    """SDM vol. 3, Convertible EPT Violations: bit 63 of an entry that maps a page or is not present decides; that of a reference to a table
    is ignored."""
    def said(on: int, leaf: int, absent: int) -> str:
        path = ve_dump(values, tmp_path / f"{on}{leaf}{absent}.raw", on, leaf, absent)
        outcome = typed("ept", "lint", "-s", str(path), "--format", "raw", "--json")
        return " / ".join(row["message"] for group in json.loads(outcome.text)["tables"] for row in group["remarks"] if row["id"] == "suppress-ve")

    assert said(0, 0, 0) == ""
    assert "has no effect" in said(0, 1, 1)
    assert "every mapped page suppresses it" in said(1, 1, 1) and "not present" not in said(1, 1, 1)
    assert "violations on 4 KiB (bit 63 is 0)" in said(1, 0, 1)
    assert "by 2044 entries that are not present" in said(1, 1, 0)


def test_frames_that_the_memory_does_not_have(mixed: Path) -> None:
    row, = linted(mixed, 0x1005E)["frames"]
    assert (row["verdict"], row["start"], row["length"]) == ("note", hex(G1), G1) and "1 GiB mapped WB" in row["message"]
    small = TableBuilder(base=0x10000)
    small.map(0, 0x10000, K4, 0x37, 7)
    assert "frames" not in linted(image(mixed.parent / "inside.raw", *pages_of(small)), 0x1001E)


# ---- hostile tables ------------------------------------------------------------------------------------------------------------------------

def _random_pages(seed: int, large: bool) -> bytes:
    """64 tables in which every entry is valid: a table or, some of them, a large page anywhere."""
    import random

    chance = random.Random(seed)

    def entry() -> int:
        if large and chance.random() < 0.3:
            return chance.randrange(1 << 20) << 30 & 0xFFFFFFFFFF000 | 0x80 | chance.choice((0, 8, 0x20, 0x28, 0x30)) | chance.choice((1, 3, 5, 7))
        return chance.randrange(64) << 12 | chance.choice((1, 3, 5, 7))

    return struct.pack("<32768Q", *(entry() for _ in range(32768)))


HOSTILE: Dict[str, bytes] = {
    "self": struct.pack("<512Q", *[0x5007] * 512),
    "ones": b"\xff" * K4,
    "random": _random_pages(1, large=False),
    "large": _random_pages(2, large=True),
}
VERBS = ("dump", "map", "find 0x7fff0000", "hooks", "lint", "diff --other-eptp 0x601e")


def hostile_image(path: Path, name: str) -> Path:
    content = HOSTILE[name]
    return image(path, (0x5000, content), (0x6000, content)) if len(content) == K4 else image(path, (0, content))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tables_end_and_the_report_says_what_was_cut(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that contains itself, all ones, every entry valid at random: the work is counted, in ranges and tables read, for every verb."""
    monkeypatch.setattr(enumeration, "REPEATED_LIMIT", 3000)
    monkeypatch.setattr("vtdbg.nested.lint._LEAVES", 3000)
    made: List[enumeration.Enumeration] = []
    batches = enumeration.Enumeration._batches
    work = [0]

    def counted(self: enumeration.Enumeration, *words: Any) -> Iterator[Any]:
        made.append(self)
        for batch in batches(self, *words):
            work[0] += len(batch[0])
            yield batch

    monkeypatch.setattr(enumeration.Enumeration, "_batches", counted)
    path = hostile_image(tmp_path / "x.raw", name)
    for verb in VERBS:
        work[0], words = 0, verb.split()
        made.clear()
        outcome = typed("ept", *words, "--eptp", "0x501e", "-s", str(path), "--format", "raw")
        assert not outcome.error and (outcome.status == 1 or name == "ones"), verb
        runs = sum(found.tables_read for found in made)
        # The limit, one table more than it, and the few enumerations that a verb makes (lint: one for each entry that takes rights away).
        assert work[0] <= 16 * (3000 + 512) and runs <= 64 * 5 * len(made), verb
        shown = " ".join(outcome.text.split())
        if name == "ones":
            assert "must be 0" in shown or "1 problem in these tables" in shown or verb.startswith(("find", "diff")), verb
        else:
            assert "given up at" in shown or "not all" in shown, verb


@pytest.mark.parametrize(("name", "verb"), [("self", "diff --other-eptp 0x601e"), ("large", "lint")])
def test_at_the_real_limits_it_is_seconds_and_little_memory(name: str, verb: str, tmp_path: Path) -> None:
    """In a process that the kernel ends after ten times the processor time that it takes, or at 600 MiB of address space."""
    path = hostile_image(tmp_path / "x.raw", name)

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (200, 200))
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))

    done = subprocess.run([sys.executable, "-m", "vtdbg", "ept", *verb.split(), "--eptp", "0x501e", "-s", str(path), "--format", "raw"],
                          capture_output=True, text=True, check=False, preexec_fn=bounded)
    assert done.returncode == 1 and not done.stderr, done.stderr[-500:]
    assert re.search(r"given up|not all of the tables", " ".join(done.stdout.split()))


def test_the_page_of_a_hostile_machine_is_written_and_says_so(values: Dict[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enumeration, "REPEATED_LIMIT", 20_000)
    blocks = [(0x100000 + K4 * number, vmcs_page(values, EPT_POINTER=root | 0x1E)) for number, root in enumerate((0x5000, 0x7000, 0x20000))]
    path = image(tmp_path / "x.raw", (0x5000, HOSTILE["self"]), (0x7000, HOSTILE["ones"]), (0x20000, HOSTILE["large"]), *blocks)
    out = tmp_path / "x.html"
    assert not typed("report", str(out), "-s", str(path), "--format", "raw").error
    content = out.read_text("ascii")
    assert len(content) < 4 << 20 and content.count("given up at") >= 2 and "must be 0" in content
    assert content.count("not listed: the tables were given up") == 4, "no hooks and no ranges of two of them"


def test_a_dump_full_of_hostile_vms_is_not_an_hour_of_work(values: Dict[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each VM has tables that reach one another at random: after the first ones that were given up, the others get little work each."""
    monkeypatch.setattr(enumeration, "REPEATED_LIMIT", 30_000)
    blocks = [(0x100000 + K4 * number, vmcs_page(values, EPT_POINTER=0x20000 + K4 * number | 0x1E)) for number in range(12)]
    path = image(tmp_path / "x.raw", (0x20000, HOSTILE["random"]), *blocks)
    work = [0]
    batches = enumeration.Enumeration._batches

    def counted(self: enumeration.Enumeration, *words: Any) -> Iterator[Any]:
        for batch in batches(self, *words):
            work[0] += len(batch[0])
            yield batch

    monkeypatch.setattr(enumeration.Enumeration, "_batches", counted)
    assert not typed("report", str(tmp_path / "x.html"), "-s", str(path), "--format", "raw").error
    assert work[0] < 2 * 40_000 + 12 * (2 << 14), "two in full, and the others, with their comparisons, in short"


# ---- on a terminal ---------------------------------------------------------------------------------------------------------------------------

# Progress is shown from the beginning: on a fast machine nothing takes long enough.
AT_ONCE = "import sys; from vtdbg.commands import progress; progress.FIRST_AFTER = 0.0; from vtdbg.cli import main; sys.exit(main(sys.argv[1:]))"


def on_terminal(path: Path, *words: str, until: bytes = b"", keys: bytes = b"") -> Tuple[int, str]:
    """(status, everything written) of a process that has a terminal; `keys` are typed once `until` was seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", AT_ONCE, *words, "-s", str(path), "--format", "raw"])
    seen, end = b"", time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            seen += piece
            if keys and until in seen:
                os.write(terminal, keys)
                keys = b""
    finally:
        os.close(terminal)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), seen.decode()


SLOW = ("dump --limit 3", "map", "diff --other-eptp 0x601e --limit 3", "find 0x7fff0000", "hooks --limit 3 --no-code", "lint")


@pytest.mark.parametrize("verb", SLOW)
def test_progress_on_a_terminal_and_what_ctrl_c_leaves(verb: str, tmp_path: Path) -> None:
    """A long one says how far it is; Ctrl-C ends it with what there is so far, in good order and marked as partial."""
    path = hostile_image(tmp_path / "x.raw", "self" if verb != SLOW[2] else "large")
    status, seen = on_terminal(path, "ept", *verb.split(), "--eptp", "0x501e", until=b"Ctrl-C", keys=b"\x03")
    assert re.search(r"\d+ ranges( compared)?, at 0x[0-9a-f]+ \(Ctrl-C shows what there is\)", seen)
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*[mK]", "", seen).split())
    assert "partial" in plain and "interrupted at 0x" in plain and "Traceback" not in plain and status == 1
    # The line of progress is wiped before anything is printed.
    assert seen.rindex("\x1b[K") < seen.index("interrupted at")


# A SIGINT to the process when the 5000th range is taken.
PRESSED = """
import os, signal
begin = progress.Watched.__init__

def watched(self, items, *rest, **more):
    def pressed():
        for number, item in enumerate(items):
            if number == 5000:
                os.kill(os.getpid(), signal.SIGINT)
            yield item
    begin(self, pressed(), *rest, **more)

progress.Watched.__init__ = watched
"""


def pressed(path: Path, *words: str, at: int = 5000) -> str:
    """What a command in a pipe writes that gets a SIGINT when item number `at` of something is taken."""
    program = AT_ONCE.replace("sys.exit(", f"exec({PRESSED.replace('5000', str(at))!r}); sys.exit(")
    done = subprocess.run([sys.executable, "-c", program, *words, "-s", str(path), "--format", "raw"], capture_output=True, text=True, check=False,
                          timeout=PATIENCE)
    assert done.stderr == "" and "\x1b" not in done.stdout and done.returncode == 1, (done.stderr, done.stdout)
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("verb", SLOW)
def test_a_pipe_gets_no_progress_and_ctrl_c_works_there_too(verb: str, tmp_path: Path) -> None:
    path = hostile_image(tmp_path / "x.raw", "self" if verb != SLOW[2] else "large")
    shown = pressed(path, "ept", *verb.split(), "--eptp", "0x501e")
    assert "partial" in shown and "interrupted at 0x" in shown


def test_one_ctrl_c_ends_it_for_all_tables_and_says_which_were_not_looked_at(values: Dict[int, int], tmp_path: Path) -> None:
    """Eight processors have eight EPTs: nobody presses Ctrl-C eight times, or takes what was skipped for what has no finding."""
    blocks = [(0x100000 + K4 * number, vmcs_page(values, EPT_POINTER=root | 0x1E)) for number, root in enumerate((0x5000, 0x6000))]
    path = image(tmp_path / "x.raw", (0x5000, HOSTILE["self"]), (0x6000, struct.pack("<512Q", *[0x6007] * 512)), *blocks)
    for verb in ("dump --limit 3", "map", "find 0x7fff0000", "hooks --no-code", "lint"):
        shown = pressed(path, "ept", *verb.split())
        assert shown.count("partial") == 1 and "not looked at: all through EPTP 0x601e (VMCS at 0x101000" in shown, verb


def test_ctrl_c_between_two_checks_leaves_those_that_were_made(mixed: Path) -> None:
    """Item ten of something is a check (the tables have less than ten ranges): those before it stand, the others are undecided, not passed."""
    shown = pressed(mixed, "ept", "lint", "--eptp", EPTP_AD, at=10)
    made = rows("remarks", "ept", "lint", "--eptp", EPTP_AD, "--all", "-s", str(mixed), "--format", "raw")
    assert made and "not made: interrupted" in shown and "suppress-#VE bits: not made" in shown and "partial" in shown
    assert "the pointer to the tables" in shown[shown.index("looked for, and not found"):]


# ---- entries that fault on purpose -----------------------------------------------------------------------------------------------------------

def kvm_mmio(gpa: int, generation: int) -> int:
    """As make_mmio_spte of Linux 6.1 (arch/x86/kvm/mmu/spte.c) writes it for EPT on a processor without the L1TF bug: the page, W and X without R,
    bits 7:0 of the generation in 10:3, bits 18:8 in 62:52."""
    return gpa & -K4 | 0b110 | (generation & 0xFF) << 3 | (generation >> 8) << 52


def test_a_mistake_among_mmio_pages_is_found_and_they_are_not_mistakes(tmp_path: Path) -> None:
    """A framebuffer of KVM is many such entries side by side; one that is only writable breaks the same rule and is a mistake."""
    builder, wrong, wrong_at = TableBuilder(base=0x10000), 5, 0
    for index in range(16):
        gpa = 0xFD000000 + index * K4
        at, _ = builder.entry_address(gpa, 1, 7)
        builder.set(at, kvm_mmio(gpa, 0x1234) if index != wrong else 0x400000 | 0b110)
        wrong_at = at if index == wrong else wrong_at
    path = image(tmp_path / "x.raw", *pages_of(builder))
    words = ("-s", str(path), "--format", "raw", "--eptp", "0x1001e")
    assert [(row["start"], row["path"][-1]) for row in rows("problems", "ept", "dump", *words)] == [(hex(0xFD005000), hex(wrong_at))]
    assert [(row["start"], row["length"]) for row in rows("meant", "ept", "dump", *words)] == [(hex(0xFD000000), 5 * K4), (hex(0xFD006000), 10 * K4)]
    remarks = rows("remarks", "ept", "lint", *words)
    assert [(row["verdict"], row["start"]) for row in remarks] == [("fail", hex(0xFD005000)), ("note", hex(0xFD000000)), ("note", hex(0xFD006000))]
    assert "generation 4660" in remarks[1]["message"]
    shown = text("ept", "hooks", *words, status=0)
    assert "1 problem in these tables" in shown and "15 pages that KVM makes fault on purpose" in shown
    drawn = text("ept", "map", *words, status=1)
    assert "~~~~~!~~~~~~~~~~......" in drawn and "~ KVM's MMIO" in drawn
    builder.set(wrong_at, kvm_mmio(0xFD005000, 0x1234))
    image(path, *pages_of(builder))
    for verb in ("dump", "lint", "hooks", "map"):
        shown = text("ept", verb, *words, status=0)
        assert "0xfd00f000" in shown or "0xfd00ffff" in shown or verb in ("hooks", "map")
        assert "problem in these" not in shown and "fail " not in shown and " ! " not in shown, verb


def test_mmio_of_a_host_with_memory_encryption(tmp_path: Path) -> None:
    """There KVM marks with all reserved address bits (svm_adjust_mmio_mask): bits 51:43 on a processor that encrypts with bit 47."""
    builder = TableBuilder(base=0x10000)
    for gpa in (0xFED00000, 0xFEE00000):
        at, _ = builder.entry_address(gpa, 1, 7)
        builder.set(at, gpa | 1 | (1 << 52) - (1 << 43) | 6 << 3)
    at, _ = builder.entry_address(0x1000, 1, 7)
    builder.set(at, 0x2000 | 1 | (1 << 52) - (1 << 43) | 6 << 3)
    path = image(tmp_path / "x.raw", *pages_of(builder))
    remarks = rows("remarks", "npt", "lint", "-s", str(path), "--format", "raw", "--ncr3", "0x10000")
    assert [(row["verdict"], row["start"]) for row in remarks] == [("fail", "0x1000"), ("note", "0xfed00000"), ("note", "0xfee00000")]


# ---- the same in Python ----------------------------------------------------------------------------------------------------------------------

def printed_by(lines: str, capsys: pytest.CaptureFixture[str]) -> List[str]:
    capsys.readouterr()
    exec(lines, {})
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("words", ["", "--perm x!r", "--gpa 0x2000-0x5000 --ignore-page-size", "--flag D --size 4k", "--hpa 0x7000-0x9000"])
def test_python_of_dump_prints_the_same_rows(words: str, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("ept", "dump", "-s", str(mixed), "--format", "raw", "--eptp", EPTP_AD, *words.split())
    expected = [(row["first"], row["target"], row["permissions"], row["memory_type"]) for row in rows("ranges", *command)]
    found = [line.split() for line in printed_by(typed(*command, "--python").text, capsys)]
    assert [(start, target, permissions, kind) for start, _, target, permissions, kind in found] == expected and expected


def test_python_has_the_capabilities_and_the_controls_of_the_vmcs(values: Dict[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mode-based execute control is bit 22 of the secondary controls; a processor without execute-only pages makes a misconfiguration of one."""
    builder = TableBuilder(base=0x10000, rights=0x407)
    builder.map(0, 0x100000, K4, 0x433, 0x407)
    builder.map(K4, 0x101000, K4, 0x34, 0x407)
    secondary = values[fields.find("SECONDARY_VM_EXEC_CONTROL").encoding] | 1 << 22
    page = vmcs_page(values, EPT_POINTER=builder.root | 0x1E, SECONDARY_VM_EXEC_CONTROL=secondary)
    path = image(tmp_path / "x.raw", *pages_of(builder), (0x220000, page))
    caps = tmp_path / "caps.txt"
    caps.write_text("0x48c 0xf0106114140\n")
    for more in ((), ("--caps", str(caps))):
        command = ("ept", "dump", "-s", str(path), "--format", "raw", *more)
        expected = [row["permissions"] for row in rows("ranges", *command)]
        lines = typed(*command, "--python").text
        assert [line.split()[3] for line in printed_by(lines, capsys)] == expected == (["rw-u", "--x-"] if not more else ["rw-u"])
        assert "mbec=True" in lines and ("caps=caps" in lines) == bool(more)
        walk = typed("ept", "walk", "0x1000", *command[2:], "--python").text
        assert printed_by(walk, capsys)[0].startswith("misconfiguration" if more else "mapped")


def test_python_of_lint_says_the_same(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("ept", "lint", "-s", str(mixed), "--format", "raw", "--eptp", EPTP_AD, "--ram", "0x0-0x10000")
    shown = [f"{row['verdict']} {row['id']} {row['message']}" for row in rows("remarks", *command)]
    found = printed_by(typed(*command, "--python").text, capsys)
    assert shown and set(shown) <= set(found)
