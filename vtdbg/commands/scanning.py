"""Scans as commands run them: with a line of progress where somebody watches, and with what was found so far after Ctrl-C."""

from __future__ import annotations

import time
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

from vtdbg.commands.session import Session
from vtdbg.numbers import size_text
from vtdbg.scanner import KINDS, Found, relate, scan

_FIRST_AFTER, _EVERY = 0.7, 0.2


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
        if partial:
            return Scanned([item for item in found if item.kind in kinds], partial)
        for kind in missing:
            session.remembered(_key(session, kind), lambda: [item for item in found if item.kind == kind])  # noqa: B023
    whole: List[Found] = []
    for kind in kinds:
        whole += session.remembered(_key(session, kind), list)
    return Scanned(whole)


def _key(session: Session, kind: str) -> str:
    return f"scan {kind} {session.layout_name}"


def _scan(session: Session, kinds: Sequence[str]) -> Tuple[List[Found], str]:
    machine = session.machine
    done = [0]
    report = _reporter(session, done)

    def count(scanned: int) -> None:
        done[0] = scanned
        report()

    found: List[Found] = []
    partial = ""
    try:
        for item in scan(machine, kinds=kinds, layout=session.layout, progress=count):
            found.append(item)
        found = relate(found, machine)
    except KeyboardInterrupt:
        partial = f"interrupted after {size_text(done[0])}: what follows is partial, and pages were not compared with one another"
    finally:
        if session.progress is not None:
            session.progress("")
    return found, partial


def _reporter(session: Session, done: List[int]) -> Callable[[], None]:
    """Says how far the scan is, now and then, once it has taken a while."""
    progress = session.progress
    if progress is None:
        return lambda: None
    total: Optional[int] = sum(length for _, length in session.machine.memory.ranges() or ())
    due = [time.monotonic() + _FIRST_AFTER]

    def report() -> None:
        if time.monotonic() > due[0] and progress is not None:
            due[0] = time.monotonic() + _EVERY
            progress(f"scanned {size_text(done[0])} of {size_text(total or 0)} (Ctrl-C shows what was found)")

    return report
