"""One table compared as a whole: the columns say what a look at each entry says, on tables of every shape."""

from __future__ import annotations

import struct
from random import Random
from typing import Any, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vtdbg
from vtdbg.enumeration import Enumeration, leaves, ranges
from vtdbg.svm.npt import Npt
from vtdbg.table_runs import LEAF, Judge, Pages, _irregular, _numbers, contents, shapes_of
from vtdbg.vmx.ept import Ept
from vtdbg.walk import Structure
from vtdbg.x86.paging import Paging

XD = 1 << 63
STRUCTURES = [("EPT", Ept(0x101E)), ("NPT", Npt(0x1000, "4-level", 48)), ("4-level", Paging.named("4-level", 0x1000)),
              ("PAE", Paging.named("PAE", 0x1000)), ("32-bit", Paging.named("32-bit", 0x1000))]
STYLES = ("scattered", "runs", "holes", "edge", "mixed")


def table(structure: Structure, depth: int, style: str, seed: int) -> bytes:
    """The entries of a table: frames at random, in runs, with holes that hold garbage, at the end of the address space, or anything at all."""
    random = Random(seed)
    level = structure.tables.levels[depth]
    size, width = level.page_size, 8 * level.entry_size
    limit = 1 << (structure.tables.width if width == 64 else 32)
    large = level.large if level.table is not None else 0
    flags = [0x37 | large, 0x37 | large, 0x33 | large, 0x35 | large] if isinstance(structure, Ept) else [7 | large, 3 | large, 5 | large]
    if not isinstance(structure, Ept) and width == 64:
        flags += [7 | large | XD, 7 | large | 0x10]
    entries: List[int] = []
    target, low = 0, flags[0]
    while len(entries) < level.entries:
        draw = random.random()
        if style in ("scattered", "holes", "mixed") or draw < 0.1:
            target, low = random.randrange(limit // size) * size, random.choice(flags)
        if style == "edge" and draw < 0.1:
            target = limit - size * random.choice([1, 2, 3, 40])
        if style in ("holes", "mixed") and draw > 0.6:
            entries += [random.choice([0, random.getrandbits(width) & ~structure.tables.present])] * random.choice([1, 2, 30])
            continue
        # Accessed, dirty and ignored bits tell no range from another, unless every bit counts.
        noise = random.choice([0, 0, 0x100, 0x200, 0x600]) | (random.getrandbits(7) << 52 if width == 64 and style == "edge" else 0)
        for _ in range(random.choice([1, 1, 2, 7]) if style != "scattered" else 1):
            entries.append(target | low | noise if style != "mixed" or random.random() > 0.05 else random.getrandbits(width))
            target = (target + size) % limit
    return struct.pack(f"<{level.entries}{'Q' if width == 64 else 'I'}", *(entry & (1 << width) - 1 for entry in entries[:level.entries]))


@pytest.mark.parametrize("name, structure", STRUCTURES, ids=[name for name, _ in STRUCTURES])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), style=st.sampled_from(STYLES), exact=st.booleans(), above=st.integers(1, 2))
def test_columns_are_what_the_entries_are_one_by_one(name: str, structure: Any, seed: int, style: str, exact: bool, above: int) -> None:
    tables = structure.tables
    shape = shapes_of(tables, frozenset(), exact)[-above]
    data = table(structure, len(tables.levels) - above, style, seed)
    judge = Judge(shape)
    found = contents(shape, tables, data, judge)
    plain = _irregular(shape, tables.present, _numbers(shape, int.from_bytes(data, "little") & shape.keep_all), Judge(shape))
    # The numbers of broken rules are in the order in which they were met; which rules they are is judged elsewhere.
    assert [run[:3] + (min(run[3], 2),) for run in found] == [run[:3] + (min(run[3], 2),) for run in plain]
    if isinstance(found, Pages):
        kind = shape.level.leaf
        assert kind is not None and all(what == LEAF for _, _, _, what in plain)
        assert list(found.targets) == [kind.address_of(entry) for _, _, entry, _ in plain]
        assert list(found.rights) == [(entry ^ tables.inverted | kind.grants) & tables.rights_mask for _, _, entry, _ in plain]
        assert list(found.attributes) == [entry & shape.attributes for _, _, entry, _ in plain]
        assert found.pages == sum(count for _, count, _, _ in plain)
    else:
        assert style in ("mixed", "edge") or shape.masks is None or len(plain) <= 1


def test_tables_of_pages_at_random_are_taken_column_by_column() -> None:
    """The path that the figures are about is the one that is taken: scattered, with holes, and where runs are short."""
    for name, structure in STRUCTURES[:4]:
        shape = shapes_of(structure.tables, frozenset(), False)[-1]  # noqa: FBT003
        for style in ("scattered", "holes", "runs"):
            data = table(structure, len(structure.tables.levels) - 1, style, 3)
            assert isinstance(contents(shape, structure.tables, data, Judge(shape)), Pages), (name, style)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32), style=st.sampled_from(STYLES[:3]), above=st.sampled_from([7, 5, 1]), case=st.sampled_from(STRUCTURES[:3]))
def test_rows_of_whole_tables_are_the_walks_of_their_pages(seed: int, style: str, above: int, case: Any) -> None:
    """Each page of two neighbouring tables, one at the end of the first's addresses: what the enumeration says is what a walk says."""
    name, structure = case
    depth = len(structure.tables.levels)
    parts = [table(structure, depth - 1, style, seed + number) for number in range(2)]
    image = bytearray(0x6000)
    for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4000 | above), (0x3008, 0x5007)):
        struct.pack_into("<Q", image, at, entry)
    image[0x4000:0x6000] = parts[0] + parts[1]
    memory = vtdbg.memory_from_segments([(0, bytes(image))])
    random = Random(seed)
    listed = {}
    for row in ranges(memory, structure):
        for step in range(0, row.length, row.page_size):
            listed[row.start + step] = row.target + step, row.permissions, row.memory_type
    single = {leaf.start: leaf for leaf in leaves(memory, structure)}
    assert set(single) == set(listed)
    for page in random.sample(range(1024), 80):
        walk = structure.walk(memory, page << 12)
        # Every access of a guest is a user access for the NPT (APM vol. 2, Nested Paging).
        refused = name == "NPT" and page << 12 in listed and "u" not in listed[page << 12][1]
        assert walk.mapped == (page << 12 in listed and not refused)
        if walk.mapped:
            target, permissions, memory_type = listed[page << 12]
            assert (walk.hpa, walk.permissions) == (target, permissions)
            leaf = single[page << 12]
            assert (leaf.target, leaf.permissions, leaf.entry, leaf.entry_address) == (target, permissions, walk.steps[-1].entry, 0x4000 + 8 * page)


def test_a_part_of_a_table_of_pages_is_that_part() -> None:
    """A range that begins and ends inside such a table gives the rows of the whole, cut to it."""
    structure = STRUCTURES[0][1]
    image = bytearray(0x5000)
    for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)):
        struct.pack_into("<Q", image, at, entry)
    image[0x4000:] = table(structure, 3, "runs", 11)
    memory = vtdbg.memory_from_segments([(0, bytes(image))])
    every = {row.start + step: row.target + step for row in ranges(memory, structure) for step in range(0, row.length, row.page_size)}
    for first, last in ((0, 0x1FFFFF), (0x1000, 0x1FFFFF), (0x3000, 0xABFFF), (0xFF000, 0xFF000)):
        part = Enumeration(memory, structure, first, last)
        found = {row.start + step: row.target + step for row in part for step in range(0, row.length, row.page_size)}
        assert found == {start: target for start, target in every.items() if first <= start <= last}
        assert sum(part.pages.values()) == len(found)
