"""Questions to whole nested tables: filters, reverse map, difference, hooks and lint, against tables that an independent builder made, against
what a kernel said of its own, and on hostile ones."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tables import K4, M2, TableBuilder
from test_walk import EPT_CASE, NPT_CASE, tables

import vtdbg
from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration, Range, ranges
from vtdbg.errors import VtdbgError
from vtdbg.nested import diff as diffs
from vtdbg.nested.diff import diff
from vtdbg.nested.filter import Totals, matching, parse_wanted
from vtdbg.nested.find import find
from vtdbg.nested.hooks import hooks, patches, view, view_hooks
from vtdbg.nested.lint import CHECKS, ControlPage, Inputs, Remark, lint
from vtdbg.vmx.ept import Ept
from vtdbg.x86.mtrr import Mtrrs

CASES = pytest.mark.parametrize("case", [EPT_CASE, NPT_CASE], ids=["EPT", "NPT"])
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# ---- properties ---------------------------------------------------------------------------------------------------------------------

@CASES
@FEW
@given(data=st.data())
def test_tables_do_not_differ_from_themselves_and_a_page_is_found_by_its_frame(case: Any, data: st.DataObject) -> None:
    builder = data.draw(tables(case))
    structure, memory = case[2](builder.root), builder.memory()
    assert not list(diff(memory, structure, memory, structure))
    for made in builder.made[:8]:
        address = made.address + data.draw(st.integers(0, made.size - 1))
        walk = structure.walk(memory, address)
        assert walk.maps_to is not None
        found = find(memory, structure, walk.maps_to)
        assert address in [place.gpa for place in found.places] and found.complete
        assert sorted(place.gpa for place in found.places) == sorted(
            other.address + walk.maps_to - other.target for other in builder.made if other.target <= walk.maps_to < other.target + other.size)


@CASES
@FEW
@given(data=st.data())
def test_a_difference_is_what_the_two_builders_say_page_by_page(case: Any, data: st.DataObject) -> None:
    one, two = data.draw(tables(case)), data.draw(tables(case))
    both = one.made + two.made
    addresses = {made.address + step for made in both for step in (0, made.size - K4)}
    changes = list(diff(one.memory(), case[2](one.root), two.memory(), case[2](two.root), aspects=frozenset(("frame", "permissions"))))
    assert all(before.end <= after.start for before, after in zip(changes, changes[1:]))
    for address in addresses:
        was, now = one.truth(address), two.truth(address)
        change = next((item for item in changes if item.start <= address < item.end), None)
        if was is None or now is None:
            assert change is not None and change.kind == ("added" if was is None else "removed")
            continue
        frames = was.target - was.address != now.target - now.address
        assert (change is not None) == (frames or was.allowed != now.allowed)
        assert change is None or (("frame" in change.aspects) == frames and ("permissions" in change.aspects) == (was.allowed != now.allowed))


@CASES
@FEW
@given(data=st.data())
def test_filters_split_the_pages_and_lose_none(case: Any, data: st.DataObject) -> None:
    builder = data.draw(tables(case))
    structure, memory = case[2](builder.root), builder.memory()
    rows = list(Enumeration(memory, structure))

    def pages(**words: Any) -> List[Tuple[int, int]]:
        wanted = parse_wanted(structure.tables, **words)
        found = matching(iter(list(Enumeration(memory, structure, apart=wanted.apart))), wanted)
        return [(row.start + step, row.target + step) for row in found for step in range(0, row.length, row.page_size)]

    every = pages()
    assert len(every) == sum(row.pages for row in rows) == len(builder.made)
    for letter in "rwx":
        assert sorted(pages(perm=letter) + pages(perm="!" + letter)) == every
    assert sorted(page for size in ("4k", "2m", "1g") for page in pages(size=size)) == every
    types = {row.memory_type for row in rows}
    assert sorted(page for name in types for page in pages(memory_type=name.lower())) == every
    for permissions in {str(row.permissions) for row in rows}:
        assert set(pages(perm=permissions)) == {page for page in every if structure.walk(memory, page[0]).permissions == permissions}
    made = builder.made[0]
    inside = pages(hpa=f"{made.target:#x}+{made.size:#x}")
    assert (made.address, made.target) in inside
    assert set(inside) == {(page.address, page.target) for page in builder.made
                           if page.target < made.target + made.size and page.target + page.size > made.target}


@pytest.mark.parametrize("words", [{"perm": "q"}, {"perm": "r-"}, {"perm": "!"}, {"size": "8k"}, {"flags": ["NOPE"]}, {"memory_type": "zz"},
                                   {"hpa": "5-4"}])
def test_a_filter_that_means_nothing_is_an_error_in_one_line(words: Dict[str, Any]) -> None:
    with pytest.raises(VtdbgError) as error:
        parse_wanted(Ept(0x1E).tables, **words)
    assert "\n" not in str(error.value)


# ---- hooks with known answers -------------------------------------------------------------------------------------------------------

def identity(hooked: Optional[Dict[int, Tuple[int, int]]] = None, split: Tuple[int, ...] = (1,)) -> TableBuilder:
    """8 MiB mapped to themselves by 2 MiB pages, those in `split` by 4 KiB ones; `hooked` {page: (frame, rights)} differ."""
    builder = TableBuilder()
    for index in range(4):
        if index not in split:
            builder.map(index * M2, index * M2, M2, 0xB7, 7)
            continue
        for at in range(index * M2, (index + 1) * M2, K4):
            frame, rights = (hooked or {}).get(at, (at, 7))
            builder.map(at, frame, K4, 0x30 | rights, 7)
    return builder


def found_in(builder: TableBuilder) -> Dict[int, Tuple[str, ...]]:
    return {hook.start: hook.signs for hook in view(builder.memory(), Ept(builder.root | 0x1E)).hooks}


def test_hooks_in_one_table_are_named_by_what_they_do() -> None:
    at = M2 + 0x5000
    assert found_in(identity(split=())) == {}
    assert found_in(identity()) == {M2: ("split",)}
    assert found_in(identity({at: (at, 4)})) == {at: ("execute-only", "other-rights")}
    assert found_in(identity({at: (0x7000000, 4)})) == {at: ("execute-only", "other-frame", "other-rights")}
    assert found_in(identity({at: (at, 3)})) == {at: ("no-execute", "other-rights")}
    assert found_in(identity({at: (0x7000000, 7)})) == {at: ("other-frame",)}
    [hook] = view(identity({at: (0x7000000, 7)}).memory(), Ept(0x1001E)).hooks
    assert (hook.target, hook.expected, hook.moved, hook.usual) == (0x7000000, at, True, "rwx")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from((0, 1, 510, 511)), st.sampled_from((0, 1, 7, 511)), st.sampled_from((0, 1 << 30, K4)),
                          st.sampled_from((1, 3, 4, 5, 7))), max_size=12), st.sets(st.integers(0, 5)))
def test_what_stands_out_does_not_depend_on_how_much_is_judged_at_a_time(odd: List[Tuple[int, int, int, int, int]], large: Set[int]) -> None:
    """Six GiB mapped to themselves: by pages of 1 GiB (`large`), or of 2 MiB of which some are taken apart, with odd pages at the borders."""
    builder, taken = TableBuilder(base=1 << 40), {(gib, mib) for gib, mib, _, _, _ in odd}
    pages = {(gib, mib, page): (shift, rights) for gib, mib, page, shift, rights in odd}
    for gib in range(6):
        if gib in large and not any(at == gib for at, _ in taken):
            builder.map(gib << 30, gib << 30, 1 << 30, 0xB7, 7)
            continue
        for mib in range(512):
            start = (gib << 30) + mib * M2
            if (gib, mib) not in taken:
                builder.map(start, start, M2, 0xB7, 7)
                continue
            for page in range(512):
                shift, rights = pages.get((gib, mib, page), (0, 7))
                builder.map(start + page * K4, start + page * K4 + shift, K4, 0x30 | rights, 7)
    rows = list(Enumeration(builder.memory(), Ept(builder.root | 0x1E)))
    whole = list(hooks(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtdbg.nested.hooks._CHUNK", 1)
        assert list(hooks(rows)) == whole
    assert [hook.start for hook in whole] == sorted(hook.start for hook in whole)
    # A page that goes elsewhere than everything around it is one, wherever it lies (the first and the last page of all have half the surroundings).
    for (gib, mib, page), (shift, _) in pages.items():
        start = (gib << 30) + mib * M2 + page * K4
        if shift == 1 << 30 and len(taken) == len(odd) and 0 < start < (6 << 30) - M2:
            assert any("other-frame" in hook.signs for hook in whole if hook.start <= start < hook.start + hook.length)


@CASES
@FEW
@given(data=st.data())
def test_lint_says_the_same_whether_ranges_are_kept_or_enumerated_again(case: Any, data: st.DataObject) -> None:
    builder = data.draw(tables(case))
    structure, memory = case[2](builder.root), builder.memory()
    inputs = Inputs(ram=[(0, 1 << 32)], ram_source="test", host_ram=[(0, 1 << 30)], control_pages=[ControlPage(0x1000, 0x1000, "x")], ve=True)
    whole = lint(memory, structure, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtdbg.nested.lint.KEPT", 1)
        assert lint(memory, structure, inputs) == whole


def test_what_was_not_compared_is_said_with_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages go to one frame, one of them behind the ranges that are compared: not passed, and the part that is named shows what is there."""
    builder = TableBuilder()
    for index in range(8):
        builder.map(2 * index * K4, (0x100 + 2 * index) * K4, K4, 0x37, 7)
    for index in (9, 10):
        builder.map(2 * index * K4, 0x7000000, K4, 0x37, 7)
    ept, memory = Ept(builder.root | 0x1E), builder.memory()
    assert [remark.verdict for remark in lint(memory, ept) if remark.id == "alias"] == ["note"]
    monkeypatch.setattr("vtdbg.nested.lint.ALIASED", 8)
    [open_one] = [remark for remark in lint(memory, ept) if remark.id == "alias"]
    assert open_one.verdict == "undecided" and "0x12000" in open_one.missing[0]
    found = re.search("--gpa (0x[0-9a-f]+)-(0x[0-9a-f]+)", open_one.missing[0])
    assert found
    [seen] = [remark for remark in lint(memory, ept, Inputs(), int(found.group(1), 16), int(found.group(2), 16)) if remark.id == "alias"]
    assert (seen.verdict, seen.start) == ("note", 20 * K4)


def test_views_that_disagree_about_a_page() -> None:
    """EPTP switching: the second view runs another frame, the first one shows the original."""
    at = M2 + 0x5000
    one, two = identity(), identity({at: (0x7000000, 4)})
    first = view(one.memory(), Ept(one.root | 0x1E)).rows
    second = view(two.memory(), Ept(two.root | 0x1E)).rows
    [hook] = view_hooks(first, second, 1)
    assert (hook.start, hook.length, hook.signs) == (at, K4, ("view-frame", "view-rights"))
    assert (hook.expected, hook.target, hook.usual, hook.permissions) == (at, 0x7000000, "rwx", "--x")


def test_the_bytes_of_a_hook_are_shown_as_code(tmp_path: Path) -> None:
    """An inline hook: the frame in use begins a function with a jump where the original has its prologue."""
    at = M2 + 0x5000
    builder = identity({at: (0x800000, 4)})
    original = b"\x90" * 64 + b"\x48\x89\x5c\x24\x08\x57" + b"\x90" * (K4 - 70)
    changed = original[:64] + b"\xe9\x00\x10\x00\x00\x57" + original[70:]
    image = bytearray(0x900000)
    for base, page in builder.pages.items():
        image[base:base + K4] = page
    image[at:at + K4], image[0x800000:0x801000] = original, changed
    path = tmp_path / "hooked.raw"
    path.write_bytes(bytes(image))
    assert [(patch.offset, len(patch.usual)) for patch in patches(original, changed)] == [(64, 5)]
    words = ["ept", "hooks", "--eptp", hex(builder.root | 0x1E), "-s", str(path), "--format", "raw"]
    outcome = run_words(words, Session(), lambda report, _: str(report))
    assert outcome.report is not None and outcome.status == 1
    texts = str(outcome.report)
    assert "mov qword ptr [rsp + 8], rbx" in texts and f"jmp {at + 64 + 5 + 0x1000:#x}" in texts


# ---- lint with known answers --------------------------------------------------------------------------------------------------------

NOTHING = Inputs()


def said(builder: TableBuilder, inputs: Inputs = NOTHING, eptp: int = 0x1E) -> Dict[str, List[Remark]]:
    found: Dict[str, List[Remark]] = {}
    for remark in lint(builder.memory(), Ept(builder.root | eptp), inputs):
        found.setdefault(remark.id, []).append(remark)
    assert set(found) == set(CHECKS), "a check that says nothing, not even that it passed"
    return found


def test_without_inputs_nothing_is_claimed() -> None:
    found = said(identity(split=()))
    assert {name for name, remarks in found.items() if remarks[0].verdict == "undecided"} == {
        "frames", "ram", "mtrr", "control-pages", "suppress-ve"}
    assert all(remark.missing for remarks in found.values() for remark in remarks if remark.verdict == "undecided")


def test_ram_that_is_not_mapped() -> None:
    found = said(identity(split=()), Inputs(ram=[(0, 0x900000)]))
    assert [(remark.verdict, remark.start, remark.length) for remark in found["ram"]] == [("fail", 0x800000, 0x100000)]
    assert [remark.verdict for remark in said(identity(), Inputs(host_ram=[(0x1000, 0x800000)]))["ram"]] == ["pass"]


def test_rights_that_the_parent_takes_away() -> None:
    builder = TableBuilder()
    builder.map(0, 0x40000000, K4, 0x37, 5)
    [remark] = said(builder)["lost-rights"]
    assert (remark.verdict, remark.start, remark.length) == ("fail", 0, K4) and "write" in remark.message and "level 4 PML4E" in remark.message
    kept = TableBuilder()
    kept.map(0, 0x40000000, K4, 0x35, 5)
    assert [remark.verdict for remark in said(kept)["lost-rights"]] == ["pass"]


def test_memory_types_against_the_mtrrs() -> None:
    """A device (MTRR UC) mapped WB is cached; RAM (WB) mapped UC is not."""
    builder = TableBuilder()
    builder.map(0xC0000000, 0xC0000000, M2, 0xB7, 7)
    builder.map(0, 0, M2, 0x87, 7)
    mtrrs = Mtrrs.from_msrs({0xFE: 1, 0x2FF: 0x806, 0x200: 0xC0000000, 0x201: 0xFC0000800})
    found = {remark.start: remark for remark in said(builder, Inputs(mtrrs=mtrrs))["mtrr"]}
    assert {start: remark.verdict for start, remark in found.items()} == {0: "fail", 0xC0000000: "fail"}
    assert "cached" in found[0xC0000000].message


def test_aliases_tables_and_control_structures_in_reach() -> None:
    builder = identity(split=())
    builder.map(0x40000000, 0x200000, K4, 0x37, 7)
    found = said(builder, Inputs(control_pages=[ControlPage(0x300000, K4, "the VMCS"), ControlPage(0x9000000, K4, "out of reach")]))
    assert [(remark.start, remark.verdict) for remark in found["alias"]] == [(0x40000000, "note")]
    assert {remark.start for remark in found["tables"]} == set(builder.pages), "the tables lie in the memory that is mapped to itself"
    assert [(remark.start, remark.verdict) for remark in found["control-pages"]] == [(0x300000, "fail")]


def test_uncacheable_everything_and_misconfigured_entries_with_their_path() -> None:
    builder = TableBuilder()
    builder.map(0, 0, M2, 0x87, 7)
    made = builder.map(M2, M2, K4, 0x02, 7)
    assert made is not None
    found = said(builder)
    assert found["uncached"][0].verdict == "fail"
    [remark] = found["entries"]
    assert (remark.verdict, remark.start, remark.path[-1]) == ("fail", M2, made.entry_address) and len(remark.path) == 4


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_misconfiguration_is_found_at_every_level_with_its_path(level: int) -> None:
    """SDM vol. 3, EPT Misconfigurations: in a reference to a table, bits 7:3 (level 4) or 6:3 are reserved; in a page, memory type 2 is."""
    builder = TableBuilder()
    builder.map(0, 0x40000000, K4, 0x37, 7)
    gpa = 5 << 12 + 9 * (level - 1)
    at, _ = builder.entry_address(gpa, level, 7)
    builder.set(at, 0x50000000 | 7 | (1 << 4 if level == 1 else 1 << 6))
    [remark] = said(builder)["entries"]
    assert (remark.verdict, remark.start, remark.length) == ("fail", gpa, 1 << 12 + 9 * (level - 1))
    assert remark.path[-1] == at and len(remark.path) == 5 - level and f"level {level} " in remark.message
    assert Ept(builder.root | 0x1E).walk(builder.memory(), gpa).outcome == "misconfiguration"


def test_aliases_of_other_memory_types_fail_and_without_any_nothing_is_said() -> None:
    """SDM vol. 3, Programming the PAT: one frame cached in one place and uncached in another is undefined."""
    builder = identity(split=())
    builder.map(0x40000000, 0x200000, K4, 0x07, 7)
    [remark] = said(builder)["alias"]
    assert (remark.verdict, remark.start, remark.length) == ("fail", 0x40000000, K4) and "0x200000" in remark.message
    assert [remark.verdict for remark in said(identity(split=()))["alias"]] == ["pass"]


def test_tables_that_can_only_be_read_are_a_note_and_out_of_reach_nothing() -> None:
    read_only, apart = TableBuilder(base=0x10000), TableBuilder(base=0x10000)
    read_only.map(0, 0x10000, K4, 0x31, 7)
    apart.map(0, 0x9000000, K4, 0x37, 7)
    assert [(remark.verdict, remark.start) for remark in said(read_only)["tables"]] == [("note", 0)]
    assert [remark.verdict for remark in said(apart)["tables"]] == ["pass"]


# ---- what kernels said of their own tables ------------------------------------------------------------------------------------------

def test_every_frame_of_the_pagemap_is_found(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """/proc/PID/pagemap of the process that owns the guest's memory, read inside the host."""
    with vtdbg.open(str(intel_plain)).memory as memory:
        vmcs = vtdbg.Vmcs.from_page(memory.read_page(0x6826000))
        ept = Ept.from_vmcs(vmcs)
        known = {int(gpa, 16): int(hpa, 16) for gpa, hpa in intel_plain_truth["vms"]["A"]["gpa_to_hpa_pagemap"].items()}
        mapped = {gpa: hpa for gpa, hpa in known.items() if ept.walk(memory, gpa).hpa is not None}
        assert len(mapped) >= 15
        for gpa, hpa in mapped.items():
            assert gpa in [place.gpa for place in find(memory, ept, hpa).places]


def test_npt_leaves_are_found_by_their_frames_and_mmio_is_a_note(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    with vtdbg.open(str(amd_exit)).memory as memory:
        vmcb = vtdbg.Vmcb.from_page(memory.read_page(0x1F22000))
        npt = vtdbg.svm.npt.Npt(vmcb["nested_cr3"])
        noted = {remark.start for remark in lint(memory, npt) if remark.id == "entries" and remark.verdict == "note"}
        mmio = {int(leaf["gpa"], 16) for leaf in amd_exit_truth["npt_leaves"] if int(leaf["pte"], 16) >> 51 & 1}
        assert noted == mmio and mmio
        for leaf in amd_exit_truth["npt_leaves"]:
            gpa, pte = int(leaf["gpa"], 16), int(leaf["pte"], 16)
            if gpa not in mmio:
                frame = pte & 0xFFFFFFFFFF000 & -leaf["size"]
                assert gpa in [place.gpa for place in find(memory, npt, frame).places]


# ---- hostile tables -----------------------------------------------------------------------------------------------------------------

HOSTILE = {
    "self": struct.pack("<512Q", *[0x5007] * 512),
    "ones": b"\xff" * K4,
    "pages": struct.pack("<512Q", *[(index * 0x1234567 << 12) & 0xFFFFFFFFFF000 | (0x5007 if index % 3 else 0x87) for index in range(512)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tables_end_and_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that contains itself, all ones, entries everywhere: every question ends within its bounds."""
    for name_of_limit in ("hooks.KEPT", "lint.KEPT", "lint.ALIASED", "hooks._CHUNK"):
        monkeypatch.setattr(f"vtdbg.nested.{name_of_limit}", 3000)
    monkeypatch.setattr("vtdbg.nested.find.WORK", 20_000)
    monkeypatch.setattr(diffs, "WORK", 5_000)
    monkeypatch.setattr("vtdbg.nested.lint._LEAVES", 2000)
    memory, ept = vtdbg.memory_from_segments([(0x5000, HOSTILE[name])]), Ept(0x501E)
    seen = view(memory, ept)
    assert len(seen.hooks) + seen.more == len(list(hooks(Enumeration(memory, ept))))
    found, remarks = find(memory, ept, 0x7FFF0000), lint(memory, ept)
    assert not list(diff(memory, ept, memory, ept))
    assert all("\n" not in remark.message for remark in remarks)
    if name == "self":
        assert not seen.complete and not found.complete and "given up" in found.problem
        assert {remark.verdict for remark in remarks if remark.id == "loop"} == {"fail"}
        assert not [remark for remark in remarks if remark.id == "ram" and remark.verdict == "pass"]
    if name == "ones":
        assert not seen.rows and [remark.verdict for remark in remarks if remark.id == "entries"] == ["fail"]


def test_ranges_of_a_part_agree_with_the_filter_on_the_whole() -> None:
    builder = identity()
    memory, ept = builder.memory(), Ept(builder.root | 0x1E)
    part = list(ranges(memory, ept, M2, 2 * M2 - 1))
    assert [(row.start, row.length, row.page_size) for row in part] == [(M2, M2, K4)]


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 64), max_size=8, unique=True), rows=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 9)), max_size=12))
def test_what_goes_outside_the_memory_is_counted_page_by_page(cuts: List[int], rows: List[Tuple[int, int]]) -> None:
    """The sum of a dump, against a look at every page: ranges may begin, end or lie in any hole, whatever the row before them did."""
    bounds = sorted(cuts[:len(cuts) // 2 * 2])
    memory = [(low << 12, high << 12) for low, high in zip(bounds[::2], bounds[1::2])]
    tables = Ept(0x1E).tables
    kind = tables.levels[-1].leaf
    assert kind is not None
    totals, start, missing = Totals(memory), 0, []
    for frame, pages in rows:
        totals.add(Range(start, frame << 12, pages << 12, K4, 7, 0x30, kind, tables))
        missing += [start + step * K4 for step in range(pages) if not any(low <= frame + step << 12 < high for low, high in memory)]
        start += pages << 12
    assert totals.outside == len(missing) * K4
    assert (totals.outside_first.start if totals.outside_first else None) == (missing[0] if missing else None)
