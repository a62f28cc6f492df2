"""Searches over slow connections: not begun unasked where they take minutes, and limited to a part of the memory where the user names one."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vtdbg
from vtdbg.commands.run import Outcome, run_words
from vtdbg.commands.session import Session
from vtdbg.errors import MemoryUnavailable
from vtdbg.machine import Machine
from vtdbg.memory.base import CachedMemory, PhysicalMemory, Range
from vtdbg.memory.part import PartOfMemory, measured_seconds
from vtdbg.render.text import render_text
from vtdbg.targets.live import LiveMemory

PAGE = 4096


class Clock:
    """What the measurement takes for the time: it passes in reads only, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("vtdbg.memory.part.time", made)
    return made


class Slow(PhysicalMemory):
    """`memory` behind a connection that takes `seconds` for each read; notes what is read."""

    def __init__(self, clock: Clock, memory: PhysicalMemory, seconds: float, known: bool = True) -> None:
        self.clock, self.memory, self.seconds, self.known = clock, memory, seconds, known
        self.reads: List[Tuple[int, int]] = []

    def read(self, address: int, size: int) -> bytes:
        self.clock.now += self.seconds
        self.reads.append((address, size))
        return self.memory.read(address, size)

    def ranges(self) -> Optional[List[Range]]:
        return self.memory.ranges() if self.known else None

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        return PhysicalMemory.views(self)

    @property
    def remote(self) -> bool:
        return True


def asked(memory: PhysicalMemory, words: str) -> Outcome:
    session = Session(source="target", _machine=Machine(memory, "target", "live", live=True))
    return run_words(words.split(), session, lambda report, options: render_text(report, 80))


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 60), min_size=1, max_size=20), st.integers(0, 60 * PAGE), st.integers(1, 40 * PAGE))
def test_a_part_has_the_pages_that_exist_in_it_and_no_other(pages: "set[int]", first: int, length: int) -> None:
    whole = vtdbg.memory_from_segments([(page * PAGE, bytes([page]) * PAGE) for page in sorted(pages)])
    part = PartOfMemory(whole, first, first + length)
    wanted = sorted(page for page in pages if first // PAGE <= page <= (first + length - 1) // PAGE)
    seen = [(at // PAGE + index, view[index * PAGE]) for at, view in part.views() for index in range(len(view) // PAGE)]
    assert seen == [(page, page) for page in wanted]
    assert sum(size for _, size in part.ranges() or ()) == len(wanted) * PAGE
    for page in pages:
        if page in wanted:
            assert part.read(page * PAGE, PAGE) == whole.read(page * PAGE, PAGE)
        else:
            with pytest.raises(MemoryUnavailable):
                part.read(page * PAGE, PAGE)


def test_a_long_search_is_refused_with_how_long_it_takes(intel_plain: Path, clock: Clock) -> None:
    """128 MiB at 20 ms a read of four pages (0.8 MB/s, what KD gives) are minutes; nothing but the sample was read."""
    memory = Slow(clock, vtdbg.open(str(intel_plain)).memory, 0.02)
    for words in ("vmcs list", "vmcs dump", "ept walk 0x1000", "source scan", "ept roots", "vmcs list --rejected"):
        outcome = asked(memory, words)
        assert outcome.status == 2 and "\n" not in outcome.error, outcome
        assert "searching 128 MiB takes about 3 minutes through this connection (0.82 MB/s): " in outcome.error
        assert outcome.error.endswith("give the address, a part of the memory (--scan A-B), or --scan all")
    assert set(memory.reads) == {((2 * number + 1) * (8 << 20), 4 * PAGE) for number in range(8)}
    assert asked(memory, "vmcs get GUEST_RIP --at 0x6826000").status == 0
    outcome = asked(Slow(clock, vtdbg.open(str(intel_plain)).memory, 0.02), "vmcs list --scan 0+0x7fff000")
    assert outcome.status == 2 and "a smaller part of the memory" in outcome.error


def test_where_samples_take_long_two_are_enough(intel_plain: Path, clock: Clock) -> None:
    memory = Slow(clock, vtdbg.open(str(intel_plain)).memory, 4.0)
    assert "takes about 9 hours" in asked(memory, "vmcs list").error and len(memory.reads) == 2


def test_a_part_of_a_slow_memory_is_searched(intel_plain: Path, clock: Clock) -> None:
    """Only the part is read; what is found in it is what a search of everything finds there."""
    memory = Slow(clock, vtdbg.open(str(intel_plain)).memory, 0.005)
    outcome = asked(memory, "vmcs list --scan 0x6820000-0x6830000")
    assert outcome.status == 0, outcome.error
    assert "0x6826000" in outcome.text and "0x6bd9000" not in outcome.text
    assert all(at >= 0x6820000 and at + size <= 0x6830000 for at, size in memory.reads)


def test_all_of_it_is_searched_where_the_user_says_so(clock: Clock) -> None:
    class Huge(Slow):
        """Four pages that are said to be 16 GiB."""

        def ranges(self) -> Optional[List[Range]]:
            return [(0, 16 << 30)]

        def views(self) -> Iterator[Tuple[int, memoryview]]:
            yield 0, memoryview(self.memory.read(0, 4 * PAGE))

    memory = Huge(clock, vtdbg.memory_from_segments([(0, bytes(4 * PAGE))]), 0.01)
    assert "searching 16 GiB takes about 3 hours through" in asked(memory, "vmcs list").error
    assert asked(memory, "vmcs list --scan all").text.endswith("no VMCS found\n")


def test_where_nobody_knows_what_exists_a_part_can_be_searched(intel_plain: Path, clock: Clock) -> None:
    memory = Slow(clock, vtdbg.open(str(intel_plain)).memory, 0.0, known=False)
    assert "which physical memory exists is not known here" in asked(memory, "vmcs list").error
    assert "0x6826000" in asked(memory, "vmcs list --scan 0x6820000+64k").text


def test_a_fast_memory_is_not_asked(clock: Clock) -> None:
    """Files are mapped: nothing is measured.  What stands between passes the question on."""
    memory = vtdbg.memory_from_segments([(0x5000, bytes(PAGE))])
    assert not memory.remote and not CachedMemory(memory).remote
    slow = Slow(clock, memory, 0.01)
    machine = Machine(slow, "target", "live", live=True)
    for outer in (CachedMemory(slow), LiveMemory(machine, slow), PartOfMemory(slow, 0, 0x8000)):  # type: ignore[arg-type]
        assert outer.remote


class Holed(Slow):
    """What is below 0x5000 is said to exist and cannot be read."""

    def read(self, address: int, size: int) -> bytes:
        if address < 0x5000:
            raise MemoryUnavailable(address, size, "refused")
        return super().read(address, size)


def test_a_measurement_skips_ranges_that_cannot_be_read(clock: Clock) -> None:
    memory = vtdbg.memory_from_segments([(0x1000, bytes(PAGE)), (0x5000, bytes(PAGE))])
    assert measured_seconds(Holed(clock, memory, 0.001), PAGE, 0) == 0.001
    assert measured_seconds(Holed(clock, vtdbg.memory_from_segments([(0x1000, bytes(PAGE))]), 0.001), PAGE, 0) is None


def test_one_slow_read_does_not_make_a_connection_slow(intel_plain: Path, clock: Clock) -> None:
    """The machine that serves it may have had something else to do."""
    class Busy(Slow):
        def read(self, address: int, size: int) -> bytes:
            self.seconds = 0.05 if len(self.reads) < 2 else 0.0
            return super().read(address, size)

    memory = Busy(clock, vtdbg.open(str(intel_plain)).memory, 0.0)
    assert "0x6826000" in asked(memory, "vmcs list").text


def test_little_memory_is_searched_however_slow(clock: Clock) -> None:
    memory = Slow(clock, vtdbg.memory_from_segments([(0, bytes(2 << 20))]), 1000.0)
    assert asked(memory, "vmcs list").text.endswith("no VMCS found\n")
    assert len(memory.reads) == 2
