"""Scans as commands run them: not unasked where they take minutes, with a line of progress, and with what was found so far after Ctrl-C."""

from __future__ import annotations

import time
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.part import PartOfMemory, measured_seconds
from vtdbg.numbers import parse_range, size_text
from vtdbg.scanner import KINDS, Found, relate, scan

# SDM vol. 3, Software Use of the VMCS and Related Structures: a processor may keep the values of a current VMCS to itself until VMCLEAR.
STALE_VMCS = "a VMCS in memory may be stale: a current one may be kept in the processor until VMCLEAR"
STALE_VMCB = "a VMCB in memory is as of the last #VMEXIT; while the guest runs, its registers are elsewhere"
_FIRST_AFTER, _EVERY = 0.7, 0.2
MOST_SECONDS = 120
"""A search that takes longer than this by the speed of its first pages is not begun unless it was asked for with --scan."""
NEVER_LONG = 2 << 20
"""Bytes; even a serial line (115200 baud) brings so much in three minutes."""
EVERYTHING = "all"


def searched_memory(session: Session) -> PhysicalMemory:
    """The memory that a search reads: the part that --scan names, or all of it; UsageError where that takes long and nobody said "all"."""
    memory = session.machine.memory
    part = session.scan and session.scan != EVERYTHING
    if part:
        memory = PartOfMemory(memory, *parse_range(session.scan))
    ranges = memory.ranges()
    if ranges is None:
        raise UsageError("cannot scan: which physical memory exists is not known here; give the address of the control block, "
                         "or what to search (--scan A-B)")
    total = sum(length for _, length in ranges)
    measured = memory.remote and session.scan != EVERYTHING and total > NEVER_LONG
    seconds = measured_seconds(memory, total, MOST_SECONDS) if measured else None
    if seconds is not None and seconds > MOST_SECONDS:
        raise UsageError(f"searching {size_text(total & -(1 << 20))} takes about {_duration(seconds)} through this connection "
                         f"({total / seconds / 1e6:.2g} MB/s): give the address, {'a smaller' if part else 'a'} part of the memory (--scan A-B), "
                         "or --scan all")
    return memory


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= unit:
            count = round(seconds / unit)
            return f"{count} {name}{'s' * (count != 1)}"
    return f"{seconds:.0f} seconds"


class Scanned(NamedTuple):
    """What a scan found; `partial` says what is missing where it was interrupted."""

    found: List[Found]
    partial: str = ""


def scanned_blocks(session: Session, kinds: Sequence[str] = KINDS) -> Scanned:
    """What a scan of the memory finds, in address order; kept until the target runs, unless it was interrupted.

    Ctrl-C ends the scan, not the command: the caller shows what there is and says that it is partial.
    """
    missing = [kind for kind in kinds if not session.has_remembered(_key(session, kind))]
    partial = ""
    if missing:
        found, partial = _scan(session, missing)
        for item in found:
            # A live target compares its processors with them.
            session.machine.consider(item.classification, item.address)
        if partial:
            return Scanned([item for item in found if item.kind in kinds], partial)
        for kind in missing:
            session.remembered(_key(session, kind), lambda: [item for item in found if item.kind == kind])  # noqa: B023
    whole: List[Found] = []
    for kind in kinds:
        whole += session.remembered(_key(session, kind), list)
    return Scanned(whole)


def _key(session: Session, kind: str) -> str:
    return f"scan {kind} {session.layout_name} {session.scan}"


def _scan(session: Session, kinds: Sequence[str]) -> Tuple[List[Found], str]:
    machine, memory = session.machine, searched_memory(session)
    done = [0]
    report = _reporter(session, memory, done)

    def count(scanned: int) -> None:
        done[0] = scanned
        report()

    found: List[Found] = []
    partial = ""
    try:
        for item in scan(memory, kinds=kinds, layout=session.layout, progress=count):
            found.append(item)
        found = relate(found, machine)
    except KeyboardInterrupt:
        partial = f"interrupted after {size_text(done[0])}: what follows is partial, and pages were not compared with one another"
    finally:
        if session.progress is not None:
            session.progress("")
    return found, partial


def _reporter(session: Session, memory: PhysicalMemory, done: List[int]) -> Callable[[], None]:
    """Says how far the scan is, now and then, once it has taken a while."""
    progress = session.progress
    if progress is None:
        return lambda: None
    total: Optional[int] = sum(length for _, length in memory.ranges() or ())
    due = [time.monotonic() + _FIRST_AFTER]

    def report() -> None:
        if time.monotonic() > due[0] and progress is not None:
            due[0] = time.monotonic() + _EVERY
            progress(f"scanned {size_text(done[0])} of {size_text(total or 0)} (Ctrl-C shows what was found)")

    return report
