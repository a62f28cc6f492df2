"""Bounds on work that hold on a busy machine too."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import Any, Iterator


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """AssertionError once what is inside has had so much processor time: what other programs take does not count, and a hang ends."""
    def over(number: int, frame: Any) -> None:
        raise AssertionError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
