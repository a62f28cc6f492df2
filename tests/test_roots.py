"""Nested tables found from below: exactly those that control blocks name, and nothing in memory that only resembles tables."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.work import processor_time

from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.machine import Machine
from vtdbg.memory.base import PhysicalMemory, memory_from_segments
from vtdbg.memory.open import open_machine
from vtdbg.render.text import render_text
from vtdbg.roots import FITS, find_roots
from vtdbg.scanner import scan

ROOT_MASK = 0x000FFFFFFFFFF000


@pytest.mark.parametrize("which", ["intel_plain", "intel_nested"])
def test_every_ept_that_a_vmcs_names_is_found_and_no_other(which: str, request: pytest.FixtureRequest) -> None:
    machine = open_machine(request.getfixturevalue(which))
    pointers = {item.vmcs["EPT_POINTER"] for item in scan(machine, ("vmcs",)) if item.vmcs is not None and item.classification == "vmcs"}
    found = find_roots(machine)
    assert {root.address for root in found} == {pointer & ROOT_MASK for pointer in pointers} and len(pointers) >= 2
    # With memory type, walk length, and the accessed and dirty flags that show in the pages: the EPTP itself.  Where the tables are those of a
    # nested guest (vmcs02), KVM has set the flags.
    assert {root.eptp for root in found if root.eptp not in pointers} <= {pointer | 1 << 6 for pointer in pointers}
    assert len({root.eptp for root in found} & pointers) == {"intel_plain": 2, "intel_nested": 3}[which]
    assert all(root.levels == 4 and root.score >= FITS and root.leaves for root in found)


@pytest.mark.parametrize("which", ["amd_exit", "amd_l2"])
def test_the_npt_that_the_kernel_printed_is_found(which: str, request: pytest.FixtureRequest) -> None:
    machine = open_machine(request.getfixturevalue(which))
    vmcb = int(request.getfixturevalue(f"{which}_truth")["vmcb_pa"], 16)
    ncr3 = int.from_bytes(machine.memory.read(vmcb + 0xB0, 8), "little")
    assert [root.address for root in find_roots(machine, "npt")] == [ncr3]
    assert find_roots(machine, "ept") == []


def test_without_a_vmcs_the_root_is_still_found(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """The pages of the control blocks overwritten: the tables say enough."""
    machine = open_machine(intel_plain)
    roots = [root.address for root in find_roots(machine)]
    gone = {0x6826000, int(intel_plain_truth["vms"]["B"]["vmcs_pa"], 16)}
    segments: List[Tuple[int, bytes]] = []
    for start, view in machine.memory.views():
        for at in range(0, len(view), 4096):
            page = bytes(view[at:at + 4096])
            if page.strip(b"\0") and start + at not in gone:
                segments.append((start + at, page))
    assert [root.address for root in find_roots(memory_from_segments(segments))] == roots


def tables(pages: Dict[int, List[Tuple[int, int]]]) -> PhysicalMemory:
    """Pages of (index, entry)."""
    segments = []
    for address, entries in pages.items():
        data = bytearray(4096)
        for index, entry in entries:
            struct.pack_into("<Q", data, index * 8, entry)
        segments.append((address, bytes(data)))
    return memory_from_segments(segments)


def test_five_levels_and_large_pages() -> None:
    chain = {0x1000: [(0, 0x2007)], 0x2000: [(0, 0x3007)], 0x3000: [(0, 0x4007)], 0x4000: [(0, 0x5007), (1, 0x200000B7)], 0x5000: [(3, 0x1037)]}
    root, = find_roots(tables(chain))
    assert (root.address, root.levels, root.eptp) == (0x1000, 5, 0x1026)
    del chain[0x1000]
    root, = find_roots(tables(chain))
    assert (root.address, root.levels, root.eptp, root.tables, root.leaves) == (0x2000, 4, 0x201E, 4, 2)


@pytest.mark.parametrize(("leaf", "large", "flags"), [
    (0x1037, 0x200000B7, 0), (0x1137, 0x200000B7, 0x40), (0x1037, 0x200003B7, 0x40), (0x1137, 0x200002B7, 0), (0x1237, 0x200001B7, 0)])
def test_accessed_flags_in_pages_are_in_the_eptp(leaf: int, large: int, flags: int) -> None:
    """SDM vol. 3, Accessed and Dirty Flags for EPT: with EPTP[6] at 1 a processor sets bit 8, and bit 9 only with it; else both are software's."""
    root, = find_roots(tables({0x2000: [(0, 0x3007)], 0x3000: [(0, 0x4007)], 0x4000: [(0, 0x5007), (1, large)], 0x5000: [(3, leaf)]}))
    assert root.eptp == 0x201E | flags


@pytest.mark.parametrize("page", [b"\xff" * 4096, struct.pack("<Q", 0x1007) * 512, struct.pack("<Q", 0x1037) * 512, struct.pack("<512Q", *range(512)),
                                  b"a page of text, over and over.. " * 128, struct.pack("<Q", 0x2B) + bytes(4088)])
def test_lying_pages_give_no_root_with_four_levels_of_truth(page: bytes) -> None:
    """All ones, a page that only contains itself, leaves without a parent, counters, text, revision identifiers: bounded, without an error."""
    memory = memory_from_segments([(0x1000 * number, page) for number in range(64)])
    with processor_time(60):
        for kind in ("ept", "npt"):
            for root in find_roots(memory, kind):
                # A page that is its own child at each level is a legal table.
                assert page == struct.pack("<Q", 0x1007) * 512 and root.tables <= 5


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1 << 32), form=st.sampled_from([0x7, 0x37, 0xB7, 0x67, 0x3]))
def test_random_tables_are_bounded(seed: int, form: int) -> None:
    """Every entry valid and random: whatever is found reaches no more tables than there are pages a level."""
    chance = random.Random(seed)
    pages = [struct.pack("<512Q", *(chance.randrange(16) << 12 | form for _ in range(512))) for _ in range(16)]
    for kind in ("ept", "npt"):
        for root in find_roots(memory_from_segments([(0, b"".join(pages))]), kind):
            assert root.tables <= 16 * 5 and root.score == sum(item.points for item in root.evidence)


def test_unknown_memory_and_unknown_kinds_are_refused() -> None:
    class Live(PhysicalMemory):
        def read(self, address: int, size: int) -> bytes:
            return bytes(size)

        def ranges(self) -> None:
            return None

    with pytest.raises(UsageError, match="which physical memory exists is not known"):
        find_roots(Live())
    with pytest.raises(UsageError, match="known: ept, npt"):
        find_roots(memory_from_segments([(0, bytes(4096))]), "pte")


def test_the_command_names_who_points_to_it_and_survives_ctrl_c(intel_plain: Path) -> None:
    def run(session: Session) -> str:
        outcome = run_words(["ept", "roots"], session, lambda report, _options: render_text(report, 100))
        assert not outcome.error
        return outcome.text

    session = Session(str(intel_plain))
    words = run(session)
    session.close()
    assert "0x6851000  0x685105e  34     0x6826000" in words

    class Interrupted(PhysicalMemory):
        inner = tables({0x2000: [(0, 0x3007)], 0x3000: [(0, 0x4007)], 0x4000: [(0, 0x5007)], 0x5000: [(3, 0x2037)]})
        seen = 0

        def read(self, address: int, size: int) -> bytes:
            return self.inner.read(address, size)

        def ranges(self) -> List[Tuple[int, int]]:
            return [(0x2000, 0x4000), (0x100000, 4096)]

        def views(self) -> Any:
            yield from self.inner.views()
            Interrupted.seen += 1
            if Interrupted.seen == 1:
                raise KeyboardInterrupt

    words = run(Session(_machine=Machine(Interrupted(), "x", "test", "test")))
    assert "interrupted after 16 KiB" in words and "0x2000" in words and "nobody" in words
