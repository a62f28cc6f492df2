"""`exit trace`: run to the exit handler again and again, note each exit, count."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Tuple

from vtdbg.errors import VtdbgError
from vtdbg.targets.interrupts import deliver, held_back
from vtdbg.targets.port import Port, TargetGone, Unsupported


@dataclass(frozen=True)
class Exit:
    """One stop at the handler: the reason (VMX) or exit code (SVM) by number and name, where the guest was, and in one line what happened.

    `what` is "MSR 0x10 read" or "port 0x3f8 out" where the exit is one of those, else empty.
    """

    code: int
    name: str
    rip: Optional[int]
    summary: str
    what: str = ""
    processor: Optional[int] = None
    """The debugger's number of the processor whose exit it was."""


@dataclass
class Trace:
    """`ended` is why it stopped before the wanted number of exits; empty where it did not."""

    exits: List[Exit] = field(default_factory=list)
    ended: str = ""

    def by_reason(self) -> List[Tuple[str, int]]:
        return Counter(f"{item.code:#x} {item.name}" for item in self.exits).most_common()

    def by_rip(self) -> List[Tuple[Optional[int], int]]:
        return Counter(item.rip for item in self.exits).most_common()

    def by_access(self) -> List[Tuple[str, int]]:
        return Counter(item.what for item in self.exits if item.what).most_common()


def trace(port: Port, handler: int, count: int, read: Callable[[], Exit], timeout: Optional[float] = None) -> Trace:
    """Up to `count` exits: resumes to `handler`, calls `read`.  Its breakpoint is removed after each stop; Ctrl-C ends it, with what there is.

    Raises TargetGone where the connection is lost, Unsupported where the debugger cannot do it at all.
    """
    found = Trace()
    try:
        # A Ctrl-C comes between two exits, or (`run_to`) while the next one is waited for.
        with held_back():
            _until(found, port, handler, count, read, timeout)
    except KeyboardInterrupt:
        if len(found.exits) < count:
            found.ended = found.ended or "interrupted"
        _settle(port)
    except TargetGone:
        raise
    except VtdbgError as error:
        if isinstance(error, Unsupported) and not found.exits:
            raise
        found.ended = str(error)
    return found


def _until(found: Trace, port: Port, handler: int, count: int, read: Callable[[], Exit], timeout: Optional[float]) -> None:
    while len(found.exits) < count:
        deliver()
        if not port.run_to(handler, timeout):
            found.ended = f"the target stopped elsewhere (RIP {port.registers().get('rip') or 0:#x})"
            return
        found.exits.append(read())


def _settle(port: Port) -> None:
    """One Ctrl-C can come twice, out of a command of GDB's and out of its Python: the second one would take what was found."""
    for _ in range(2):
        try:
            time.sleep(0.01)
            port.selected()
        except KeyboardInterrupt:
            continue
