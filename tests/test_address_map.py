"""The picture of an address space: every cell says what a walk of its pages says, whatever was left out or taken together."""

from __future__ import annotations

import re
from typing import Dict, List, Set

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import G1, K4, M2, TableBuilder
from support.work import processor_time

from vtdbg.address_map import (
    ANY_FRAME,
    BROKEN,
    EXACT,
    EXECUTE_ONLY,
    LETTERS,
    NO_EXECUTE,
    UNREADABLE,
    AddressMap,
    Gap,
    Meaning,
    address_map,
    chart,
    marked,
)
from vtdbg.commands.maps import map_blocks
from vtdbg.enumeration import Enumeration
from vtdbg.errors import UsageError
from vtdbg.memory.base import memory_from_segments
from vtdbg.render.text import render_text
from vtdbg.report import Report
from vtdbg.vmx.ept import Ept, ept_walk

RWX, WB = 7, 6 << 3
EPTP_FLAGS = 0x1E
"""Write-back tables, page-walk length 4."""


def picture_of(builder: TableBuilder, limit: int = 4096, first: int = 0, last: int = (1 << 48) - 1) -> AddressMap:
    return address_map(Enumeration(builder.memory(), Ept(builder.root | EPTP_FLAGS), first, last), limit)


def small_pages(frames: "List[tuple[int, int, int]]") -> TableBuilder:
    """4 KiB pages (page number, frame number, rights)."""
    builder = TableBuilder(base=0x10000000)
    for page, frame, rights in frames:
        builder.map(page * K4, frame * K4, K4, rights | WB, RWX)
    return builder


pages = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 1 << 20), st.sampled_from([1, 3, 5, 7, 4])), min_size=1, max_size=60,
                 unique_by=lambda item: item[0])


@given(pages, st.sampled_from(sorted(LETTERS)))
@settings(max_examples=20, deadline=None)
def test_colours_say_what_the_letters_say_and_add_no_letter(frames: "List[tuple[int, int, int]]", by: str) -> None:
    """Without colours nothing of them is left; with colours each letter of a kind has one style, whatever is beside it."""
    report = Report("ept map")
    report.blocks = list(map_blocks(picture_of(small_pages(frames)), by))
    plain, coloured = render_text(report, 80), render_text(report, 80, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain and "\x1b" not in plain
    styles: Dict[str, Set[str]] = {}
    for line in coloured.splitlines():
        if not re.fullmatch("0x[0-9a-f]{12}  .{64}", re.sub(r"\x1b\[[0-9;]*m", "", line)):
            continue
        for style, letters in re.findall(r"(\x1b\[[0-9;]+m)?([^\x1b]+)(?:\x1b\[0m)?", line.split("  ", 1)[1]):
            for letter in letters.strip():
                styles.setdefault(letter.upper(), set()).add(style)
    assert all(len(found) == 1 for found in styles.values()), styles
    wanted = {"R": "\x1b[36m", "W": "\x1b[33m", "A": "", "X": "\x1b[32m", "E": "\x1b[35m", ".": "\x1b[2m"} if by == "perm" else {"B": "\x1b[32m"}
    assert all(styles.get(letter, {style}) == {style} for letter, style in wanted.items()), styles


@given(pages)
@settings(max_examples=40, deadline=None)
def test_at_4_kib_every_letter_is_what_a_walk_says(frames: "List[tuple[int, int, int]]") -> None:
    builder = small_pages(frames)
    memory, eptp = builder.memory(), builder.root | EPTP_FLAGS
    drawn = chart(picture_of(builder).pieces, cell=K4)
    meaning = {letter: value for value, letter in drawn.letters.items()}
    seen = set()
    for line in drawn.lines:
        if isinstance(line, Gap):
            continue
        assert len(line.cells) == 64
        for at, letter in enumerate(line.cells):
            walk = ept_walk(memory, eptp, line.start + at * K4)
            seen.add(walk.address // K4)
            # Without the capability MSRs execute-only pages are taken as legal.
            assert (letter != ".") == walk.mapped
            if walk.mapped:
                assert meaning[letter] == str(walk.permissions)
    assert {page for page, _, _ in frames} <= seen, "a mapped page is in no row"


@given(pages, st.sampled_from([2 * K4, 16 * K4, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_a_small_letter_is_a_cell_that_is_mapped_in_part(frames: "List[tuple[int, int, int]]", cell: int) -> None:
    rights = {page: bits for page, _, bits in frames}
    drawn = chart(picture_of(small_pages(frames)).pieces, cell=cell)
    for line in drawn.lines:
        for at, letter in enumerate("" if isinstance(line, Gap) else line.cells):
            inside = [rights[page] for page in range((line.start + at * cell) // K4, (line.start + (at + 1) * cell) // K4) if page in rights]
            if not inside:
                assert letter == "."
            elif len(set(inside)) > 1:
                assert letter == "*"
            else:
                assert letter.isupper() == (len(inside) == cell // K4)


@given(pages, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_the_zoom_is_the_finest_that_fits(frames: "List[tuple[int, int, int]]", rows: int) -> None:
    pieces = picture_of(small_pages(frames)).pieces
    drawn = chart(pieces, rows=rows)
    count = sum(not isinstance(line, Gap) for line in drawn.lines)
    assert count <= rows
    if drawn.cell > K4:
        finer = chart(pieces, cell=drawn.cell // 2)
        assert sum(not isinstance(line, Gap) for line in finer.lines) > rows


def test_rows_and_gaps_cover_the_space_without_a_hole() -> None:
    builder = small_pages([(0, 1, RWX), (5000, 2, RWX)])
    builder.map(G1, 1 << 33, M2, RWX | WB | 0x80, RWX)
    drawn = chart(picture_of(builder).pieces)
    reached = 0
    for line in drawn.lines:
        assert line.start == reached
        reached = line.end if isinstance(line, Gap) else line.start + 64 * drawn.cell
    assert reached >= G1 + M2


def test_a_misconfiguration_is_shown_whatever_surrounds_it() -> None:
    builder = small_pages([(page, page + 1, RWX) for page in range(512)])
    # A writable page has to be readable (SDM vol. 3, EPT Misconfigurations).
    at, _ = builder.entry_address(100 * K4, 1)
    builder.set(at, 0x5000 | 2)
    drawn = chart(picture_of(builder).pieces, rows=1)
    assert drawn.cell == 8 * K4
    row = drawn.lines[0]
    assert not isinstance(row, Gap) and row.cells[100 // 8] == BROKEN and row.cells.count(BROKEN) == 1 and BROKEN in drawn.special


def test_a_table_outside_the_memory_is_not_nothing_mapped() -> None:
    builder = small_pages([(0, 1, RWX)])
    at, _ = builder.entry_address(M2, 2)
    builder.set(at, 0xDEAD000 | RWX)
    drawn = chart(picture_of(builder).pieces)
    assert any(UNREADABLE in line.cells for line in drawn.lines if not isinstance(line, Gap))


def test_execute_only_and_no_execute_are_marked() -> None:
    assert [marked(Meaning(words, "WB", K4, ())) for words in ("--x", "rw-", "rw-u", "rwx", "r--", "---", "", "r-x")] == [
        EXECUTE_ONLY, NO_EXECUTE, NO_EXECUTE, "", "", "", "", ""]


def text_of(picture: AddressMap) -> str:
    return render_text(Report("ept map", map_blocks(picture)))


def test_hooks_are_listed_with_their_frames() -> None:
    picture = picture_of(small_pages([(0, 16, RWX), (1, 77, 4), (2, 18, 3), (3, 19, RWX)]))
    shown = text_of(picture)
    assert "0x000001000     0x00004d000    4 KiB  --x   execute-only" in shown
    assert "0x000002000     0x000012000    4 KiB  rw-   read-write without execute" in shown


def test_many_ranges_are_taken_together_and_that_is_said() -> None:
    """Scattered frames first (the permissions stay exact), then blocks."""
    scattered = small_pages([(page, 7 * page % 4099 + 1, RWX) for page in range(1000)])
    exact, together = picture_of(scattered), picture_of(scattered, limit=64)
    assert exact.grain == EXACT and len(exact.pieces) == exact.ranges and "too many" not in text_of(exact)
    assert together.grain == ANY_FRAME and len(together.pieces) == 1 and together.pieces[0].target is None
    assert f"{exact.ranges} ranges are too many" in text_of(together)
    assert together.pieces[0].mapped == 1000 * K4 and together.pieces[0].ranges == exact.ranges
    alternating = small_pages([(2 * page, page + 1, RWX if page % 2 else 1) for page in range(1000)])
    blocks = picture_of(alternating, limit=64)
    assert blocks.grain > K4 and len(blocks.pieces) <= 64 and "blocks of" in text_of(blocks)
    assert sum(piece.mapped for piece in blocks.pieces) == 1000 * K4
    assert {meaning.permissions for piece in blocks.pieces for meaning in piece.meanings} == {"rwx", "r--"}


def test_hostile_tables_take_bounded_time_and_pieces() -> None:
    """A root that references itself, and a table in which every entry is a valid page of its own."""
    root = 0x1000
    loop = memory_from_segments([(root, (root | RWX).to_bytes(8, "little") * 512)])
    with processor_time(60):
        picture = address_map(Enumeration(loop, Ept(root | EPTP_FLAGS), limit=100_000))
    assert len(picture.pieces) <= 4096 and {problem.kind for problem in picture.found.problems} == {"loop", "limit"}
    assert "limit" in text_of(picture)


def test_impossible_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 64"):
        picture_of(small_pages([(0, 1, RWX)]), limit=3)
    with pytest.raises(UsageError, match="perm, type, size"):
        chart((), by="colour")
