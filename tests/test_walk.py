"""The page-walk engine and the enumeration: what both say of tables that an independent builder made, and of hostile ones."""

from __future__ import annotations

import struct
from random import Random
from typing import Any, List, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tables import G1, K4, M2, TableBuilder

import vtdbg
from vtdbg.enumeration import Enumeration, leaves, ranges
from vtdbg.errors import UsageError
from vtdbg.svm.npt import Npt
from vtdbg.vmx.ept import Ept
from vtdbg.walk import Access, parse_access
from vtdbg.x86.paging import Paging

XD = 1 << 63
# Which structures the properties run over: (name, what the builder needs, how to read it).  The present bits and rights are written out here
# once more, on purpose.
EPT_CASE = ("EPT", {"top": 4, "rights": 7}, lambda root: Ept(root | 0x1E))
EPT5_CASE = ("EPT 5", {"top": 5, "rights": 7}, lambda root: Ept(root | 0x26))
NPT_CASE = ("NPT", {"top": 4, "rights": 7 | XD, "inverse": XD}, lambda root: Npt(root, "4-level", 48))
NPT5_CASE = ("NPT 5", {"top": 5, "rights": 7 | XD, "inverse": XD}, lambda root: Npt(root, "5-level", 48))
LONG_CASE = ("4-level", {"top": 4, "rights": 7 | XD, "inverse": XD}, lambda root: Paging.named("4-level", root))
LA57_CASE = ("5-level", {"top": 5, "rights": 7 | XD, "inverse": XD}, lambda root: Paging.named("5-level", root))
PAE_CASE = ("PAE", {"top": 3, "rights": 7 | XD, "inverse": XD, "top_grants": 6}, lambda root: Paging.named("PAE", root))
CASES = [EPT_CASE, EPT5_CASE, NPT_CASE, NPT5_CASE, LONG_CASE, LA57_CASE, PAE_CASE]
MAPPED_ANYHOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def address_space(case: Any) -> int:
    return {"PAE": 32, "EPT 5": 52, "NPT 5": 52, "5-level": 56}.get(case[0], 47)


@st.composite
def tables(draw: st.DrawFn, case: Any) -> TableBuilder:
    """A few pages of all sizes, some next to each other, with random rights in leaves and in the tables above."""
    builder = TableBuilder(**case[1])
    ept = case[0].startswith("EPT")
    table_flags = st.sampled_from([7, 5, 3, 1] if ept else [7, 5, 3, 1, 7 | XD])
    if case[0] == "PAE":
        table_flags = st.just(1)
    sizes = [K4, K4, K4, M2] if case[0] == "PAE" else [K4, K4, K4, M2, G1]
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.sampled_from(sizes))
        address = draw(st.integers(0, (1 << address_space(case)) // size - 1)) * size
        target = draw(st.integers(0, (1 << 40) // size - 64)) * size
        flags = draw(st.sampled_from([7, 5, 3, 1, 4] if ept else [7, 5, 3, 1, 7 | XD, 5 | XD]))
        flags |= (draw(st.sampled_from([0x30, 0x00, 0x70])) if ept else 0x60) | (0 if size == K4 else 0x80)
        above = draw(table_flags)
        for index in range(draw(st.sampled_from([1, 1, 3, 20]))):
            if address + (index + 1) * size <= 1 << address_space(case):
                if case[0] == "PAE":
                    # Entries of the PDPT have no rights and reserve bits 2:1; the page directory's have them.
                    pde, _ = builder.entry_address(address, 2, 1)
                    if size == K4 and not builder.get(pde):
                        builder.set(pde, builder.page() | draw(st.sampled_from([7, 5, 3, 7 | XD])))
                builder.map(address + index * size, target + index * size, size, flags, above)
    return builder


def letters(case: Any, allowed: int) -> str:
    if case[0].startswith("EPT"):
        return "".join(letter if allowed >> at & 1 else "-" for at, letter in enumerate("rwx"))
    return "".join(letter if bit else "-" for letter, bit in
                   (("r", allowed & 1), ("w", allowed & 2), ("x", allowed & XD), ("u", allowed & 4)))


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
@MAPPED_ANYHOW
@given(data=st.data())
def test_a_walk_says_what_the_builder_made(case: Any, data: st.DataObject) -> None:
    builder = data.draw(tables(case))
    structure, memory = case[2](builder.root), builder.memory()
    for made in builder.made:
        for address in (made.address, made.address + made.size - 1, made.address + made.size // 2 + 8):
            walk = structure.walk(memory, address)
            assert walk.maps_to == made.target + address - made.address
            assert (walk.page_size, walk.permissions) == (made.size, letters(case, made.allowed))
            assert (walk.steps[-1].entry, walk.steps[-1].address) == (made.entry, made.entry_address)
            usable = bool(made.allowed) if case[0].startswith("EPT") else bool(made.allowed & 4) or not case[0].startswith("NPT")
            assert walk.outcome == ("mapped" if usable else "violation")
            assert (walk.hpa is not None) == usable
    for address in data.draw(st.lists(st.integers(0, (1 << address_space(case)) - 1), max_size=5)):
        if builder.truth(address) is None:
            walk = structure.walk(memory, address)
            assert (walk.outcome, walk.hpa, walk.maps_to) == ("violation", None, None)
            assert walk.hole and builder.truth(address & -walk.hole) is None


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
@MAPPED_ANYHOW
@given(data=st.data())
def test_the_enumeration_is_every_page_and_nothing_else(case: Any, data: st.DataObject) -> None:
    builder = data.draw(tables(case))
    structure, memory = case[2](builder.root), builder.memory()
    every = sorted((made.address, made.target, made.size, letters(case, made.allowed), made.entry, made.entry_address) for made in builder.made)
    found = [(leaf.start, leaf.target, leaf.page_size, leaf.permissions, leaf.entry, leaf.entry_address) for leaf in leaves(memory, structure)]
    assert found == every
    rows = ranges(memory, structure)
    expanded = []
    before = None
    for row in rows:
        expanded.extend((row.start + step, row.target + step, row.page_size, row.permissions) for step in range(0, row.length, row.page_size))
        assert before is None or (before.end, before.target + before.length, before.page_size, before.permissions, before.memory_type) != (
            row.start, row.target, row.page_size, row.permissions, row.memory_type), "two rows that could be one"
        before = row
    assert expanded == [page[:4] for page in every]
    assert rows.complete and not rows.problems
    assert sum(rows.pages.values()) == len(every)
    assert rows.tables_read == len(builder.pages)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
@MAPPED_ANYHOW
@given(data=st.data())
def test_a_part_of_the_address_space_is_that_part_of_the_whole(case: Any, data: st.DataObject) -> None:
    builder = data.draw(tables(case))
    structure, memory = case[2](builder.root), builder.memory()
    anchor = data.draw(st.sampled_from(builder.made))
    first = max(anchor.address + data.draw(st.integers(-5 * K4, anchor.size + 5 * K4)), 0)
    last = first + data.draw(st.integers(0, 3 * M2))
    wanted = [leaf for leaf in leaves(memory, structure) if leaf.start <= last and leaf.start + leaf.page_size > first]
    part = Enumeration(memory, structure, first, last)
    assert [(leaf.start, leaf.target) for leaf in part.leaves()] == [(leaf.start, leaf.target) for leaf in wanted]
    assert part.tables_read <= len(builder.pages)


def words(entries: List[int]) -> bytes:
    return struct.pack("<512Q", *entries)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 32), case=st.sampled_from([EPT_CASE, NPT_CASE, LONG_CASE]))
def test_random_tables_walk_and_enumeration_agree_page_by_page(seed: int, case: Any) -> None:
    """Pages full of arbitrary entries that reference each other: in a window, each page is in the enumeration exactly if the walk finds it;
    where the walk meets a broken entry or a table that is not there, the enumeration reports it."""
    pages = 6
    random = Random(seed)

    def entry() -> int:
        kind = random.randrange(8)
        if kind == 0:
            return 0
        low = random.choice([7, 7, 7, 3, 5, 1, 0x37, 0x87, 0xB7, 0x77, 2, 4, 0x1F])
        at = random.randrange(pages + 1) << 12 if kind < 7 else random.randrange(1 << 40) << 12
        return at | low | (random.getrandbits(12) << 52 if kind == 6 else 0)

    memory = vtdbg.memory_from_segments([(index * K4, words([entry() for _ in range(512)])) for index in range(pages)])
    structure = case[2](0)
    first = random.randrange(1 << 35) << 12
    window = 48
    last = first + window * K4 - 1
    rows = Enumeration(memory, structure, first, last, limit=1 << 20)
    listed = {}
    for leaf in rows.leaves():
        for step in range(0, min(leaf.page_size, last + 1 - leaf.start), K4):
            if first <= leaf.start + step <= last:
                listed[leaf.start + step] = (leaf.target + step, leaf.page_size, leaf.permissions, leaf.level)
    trouble = [(problem.start, problem.start + problem.length) for problem in rows.problems if problem.kind in ("misconfiguration", "unreadable")]
    for address in range(first, last + 1, K4):
        walk = structure.walk(memory, address)
        if walk.maps_to is not None:
            assert listed.pop(address) == (walk.maps_to, walk.page_size, walk.permissions, walk.level)
        elif walk.outcome in ("misconfiguration", "unreadable"):
            # A table that several paths lead to is reported for the first path, so only its existence is certain.
            assert trouble
    assert not listed


def test_a_root_that_contains_itself_ends_and_says_so() -> None:
    """Every entry of the one table references the table: 512^4 pages that a processor would walk, a bounded list here."""
    memory = vtdbg.memory_from_segments([(0x5000, words([0x5007] * 512))])
    rows = Enumeration(memory, Paging.named("4-level", 0x5000), limit=20_000)
    count = sum(1 for _ in rows)
    assert 0 < count < 20_000 and not rows.complete
    kinds = [problem.kind for problem in rows.problems]
    assert kinds.count("loop") == 1 and kinds[-1] == "limit"
    assert rows.tables_read == 4, "one parse a level"
    walk = Paging.named("4-level", 0x5000).walk(memory, 0x123456789)
    assert walk.mapped and walk.hpa == 0x5789 and len(walk.steps) == 4


def test_pages_of_all_ones_are_one_problem_a_table() -> None:
    memory = vtdbg.memory_from_segments([(index * K4, b"\xff" * K4) for index in range(4)])
    for structure in (Ept(0x1E), Npt(0), Paging.named("4-level", 0)):
        rows = Enumeration(memory, structure)
        assert not list(rows) and rows.complete
        assert [(problem.kind, problem.entries) for problem in rows.problems] == [("misconfiguration", 512)]


def test_a_subtree_without_pages_is_looked_at_once_however_often_it_is_shared() -> None:
    """512 * 512 * 512 ways lead to one empty page table: each of the four tables is parsed once."""
    memory = vtdbg.memory_from_segments([(0, words([0x1007] * 512) + words([0x2007] * 512) + words([0x3007] * 512) + bytes(K4))])
    rows = Enumeration(memory, Ept(0x1E))
    assert not list(rows) and rows.complete and not rows.problems and rows.tables_read == 4


def test_a_shared_table_is_read_once_and_shown_at_every_place() -> None:
    builder = TableBuilder()
    for index in range(4):
        builder.map(index * K4, (0x800 + index) * K4, K4, 0x37, 7)
    pde, _ = builder.entry_address(0, 2)
    builder.set(pde + 8 * 5, builder.get(pde))
    rows = Enumeration(builder.memory(), Ept(builder.root | 0x1E))
    assert [(row.start, row.target, row.length) for row in rows] == [(0, 0x800000, 4 * K4), (5 * M2, 0x800000, 4 * K4)]
    assert rows.tables_read == 4


def test_a_table_beyond_memory_is_reported_with_the_way_to_it_and_the_rest_is_still_listed() -> None:
    builder = TableBuilder()
    builder.map(0, 0x800000, K4, 0x37, 7)
    pde, _ = builder.entry_address(M2, 2, 7)
    builder.set(pde, 0x7F000007)
    memory = builder.memory()
    rows = Enumeration(memory, Ept(builder.root | 0x1E))
    assert [(row.start, row.target) for row in rows] == [(0, 0x800000)]
    [problem] = rows.problems
    assert (problem.kind, problem.start, problem.length, problem.path[-1]) == ("unreadable", M2, M2, pde)
    assert "0x7f000000" in problem.text
    walk = vtdbg.ept_walk(memory, builder.root | 0x1E, M2 + 0x3008)
    assert (walk.outcome, walk.level, walk.steps[-1].address) == ("unreadable", 1, 0x7F000018)
    assert "0x7f000018" in walk.reason and walk.hpa is None


def test_a_table_cut_off_by_the_end_of_memory_is_listed_as_far_as_it_goes() -> None:
    builder = TableBuilder()
    for index in range(512):
        builder.map(index * K4, index * K4, K4, 0x37, 7)
    last = max(builder.pages)
    builder.pages[last] = builder.pages[last][:8 * 100]
    rows = Enumeration(builder.memory(), Ept(builder.root | 0x1E))
    assert [(row.start, row.length) for row in rows] == [(0, 100 * K4)]
    assert [(problem.kind, problem.start) for problem in rows.problems] == [("unreadable", 100 * K4)]


def test_a_run_ends_where_its_addresses_leave_the_physical_address_width() -> None:
    """Entries that step by a page across the width: those below are pages, those above are misconfigured, in walk and enumeration."""
    class Narrow:
        physical_address_width = 36
        ept_vpid_cap = None

    builder = TableBuilder()
    for index in range(512):
        builder.map(index * K4, (1 << 36) - 0x80000 + index * K4, K4, 0x37, 7)
    memory, ept = builder.memory(), Ept(builder.root | 0x1E, Narrow())
    rows = Enumeration(memory, ept)
    assert [(row.start, row.length) for row in rows] == [(0, 0x80000)]
    assert [(problem.start, problem.length, problem.entries) for problem in rows.problems] == [(0x80000, M2 - 0x80000, 384)]
    assert ept.walk(memory, 0x7F000).mapped and ept.walk(memory, 0x80000).outcome == "misconfiguration"


def test_accessed_and_dirty_flags_do_not_split_a_range_unless_asked_for() -> None:
    """EPTP[6]=1 makes bits 8 and 9 flags; a page that was written and one that was not mean the same."""
    builder = TableBuilder()
    for index in range(8):
        builder.map(index * K4, (16 + index) * K4, K4, 0x37 | (0x300 if index % 2 else 0), 7)
    memory, ept = builder.memory(), Ept(builder.root | 0x5E)
    assert len(list(ranges(memory, ept))) == 1
    split = list(ranges(memory, ept, apart=frozenset({"D"})))
    assert len(split) == 8 and split[1].flags == ("D",)


def test_page_sizes_are_kept_apart_unless_told_otherwise() -> None:
    builder = TableBuilder()
    for index in range(512):
        builder.map(index * K4, 0x40000000 + index * K4, K4, 0x37, 7)
    builder.map(M2, 0x40000000 + M2, M2, 0xB7, 7)
    memory, ept = builder.memory(), Ept(builder.root | 0x1E)
    assert [(row.page_size, row.length) for row in ranges(memory, ept)] == [(K4, M2), (M2, M2)]
    assert [(row.page_size, row.length) for row in ranges(memory, ept, ignore_page_size=True)] == [(K4, 2 * M2)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_32_bit_tables_are_listed_as_they_are_walked(seed: int) -> None:
    """Entries of four bytes, 1024 to a table, 4 MiB pages beyond 4 GiB (PSE-36), in a window of random tables."""
    random = Random(seed)
    directory = [random.choice([0, 0x2007, 0x3025, random.getrandbits(32), random.getrandbits(10) << 22 | 0x87 | random.getrandbits(8) << 13])
                 for _ in range(1024)]
    regular = [0x00ABC007 + (index << 12) for index in range(1024)]
    mixed = [random.choice([0, 0x5007 + (index << 12), random.getrandbits(32)]) for index in range(1024)]
    memory = vtdbg.memory_from_segments([(0x1000, struct.pack("<1024I", *directory)), (0x2000, struct.pack("<1024I", *regular)),
                                         (0x3000, struct.pack("<1024I", *mixed))])
    paging = Paging("32-bit", 0x1000, pse=True, width=40)
    first = random.randrange(1 << 8) << 22
    rows = Enumeration(memory, paging, first, first + (8 << 22) - 1)
    listed = {row.start + step: (row.target + step, row.page_size, row.permissions, row.memory_type)
              for row in rows for step in range(0, row.length, row.page_size)}
    for address in range(first, first + (8 << 22), K4):
        walk = paging.walk(memory, address)
        known = listed.get(address) or listed.get(address & -(1 << 22))
        if walk.maps_to is None:
            assert known is None or known[1] == K4 and address not in listed
        else:
            assert known is not None and walk.page_size is not None
            offset = address & walk.page_size - 1
            assert (walk.maps_to - offset, walk.page_size, walk.permissions, walk.memory_type) == known


def test_upper_half_addresses_are_listed_as_they_are_used() -> None:
    builder = TableBuilder(rights=7)
    builder.map(0x800000000000, 0x7000, K4, 7, 7)
    paging = Paging.named("4-level", builder.root)
    memory = builder.memory()
    [row] = ranges(memory, paging)
    assert row.start == 0xFFFF800000000000 and paging.walk(memory, row.start + 5).hpa == 0x7005
    assert [row.start for row in ranges(memory, paging, 0xFFFF800000000000)] == [row.start]
    assert not list(ranges(memory, paging, 0, 0x7FFFFFFFFFFF))


@pytest.mark.parametrize("text, read, write, fetch, user, linear", [
    ("r", True, False, False, None, "translation"), ("write", False, True, False, None, "translation"),
    ("execute", False, False, True, None, "translation"), ("fetch", False, False, True, None, "translation"),
    ("rw", True, True, False, None, "translation"), ("user read", True, False, False, True, "translation"),
    ("user,x", False, False, True, True, "translation"), ("page-walk", True, False, False, None, "page-walk"),
    ("page-walk write", False, True, False, None, "page-walk"), ("read+write", True, True, False, None, "translation")])
def test_accesses_by_name(text: str, read: bool, write: bool, fetch: bool, user: Any, linear: str) -> None:
    access = parse_access(text)
    assert access == Access(read, write, fetch, user, linear=linear)
    assert parse_access(access) is access and parse_access(None) is None


@pytest.mark.parametrize("text", ["", "q", "readwrite", "r;w", " "])
def test_an_access_that_is_none_is_an_error_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_access(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [
    lambda memory: vtdbg.ept_walk(memory, 0x1E, -1), lambda memory: vtdbg.ept_walk(memory, -1, 0),
    lambda memory: vtdbg.ept_walk(memory, 0x1E, 1 << 64),
    lambda memory: vtdbg.npt_walk(memory, 1 << 64, 0), lambda memory: vtdbg.npt_walk(memory, 0, 0, mode="none"),
    lambda memory: vtdbg.npt_walk(memory, 0, 0, mode="7-level"), lambda memory: vtdbg.npt_walk(memory, 0, 0, c_bit=3),
    lambda memory: vtdbg.translate(memory, 0), lambda memory: vtdbg.translate(memory, -5, cr3=0),
    lambda memory: vtdbg.translate(memory, 0, cr3=0, eptp=0x1E, ncr3=0), lambda memory: Enumeration(memory, Ept(0x1E), 5, 4),
    lambda memory: Enumeration(memory, Paging.named("none", 0))])
def test_arguments_that_cannot_work_are_errors_in_one_line(call: Any) -> None:
    with pytest.raises(vtdbg.VtdbgError) as error:
        call(vtdbg.memory_from_segments([(0, bytes(K4))]))
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(entry=st.integers(0, (1 << 64) - 1), address=st.integers(0, (1 << 64) - 1), low=st.integers(0, (1 << 12) - 1),
       access=st.sampled_from([None, "r", "w", "x", "user read", "rw", "page-walk"]))
def test_any_bits_anywhere_give_a_walk_and_never_a_traceback(entry: int, address: int, low: int, access: Any) -> None:
    memory = vtdbg.memory_from_segments([(0, words([entry] * 512)), (entry & 0xFFFFFFFFFF000 or K4, words([entry ^ 0x80] * 512))])
    walks: List[Tuple[str, str]] = []
    for walk in (vtdbg.ept_walk(memory, low, address, access), vtdbg.ept_walk(memory, low | 0x1E, address, access, mbec=True),
                 vtdbg.npt_walk(memory, low, address, access), vtdbg.npt_walk(memory, low, address, access, mode="5-level", width=40)):
        walks.append((walk.outcome, walk.reason))
    for mode in ("none", "32-bit", "PAE", "4-level", "5-level"):
        for nested in ({}, {"eptp": 0x1E}, {"ncr3": 0}):
            found = vtdbg.translate(memory, address, cr3=low << 12, paging=mode, access=access, **nested)
            walks.append((found.outcome, found.reason))
            assert all(step.describe() and step.decoded is not None for step in found.steps)
    for outcome, reason in walks:
        assert outcome in ("mapped", "violation", "misconfiguration", "unreadable")
        assert bool(reason) == (outcome != "mapped") and "\n" not in reason
