"""Ctrl-C kept waiting while a target is not as it was: what is half changed must be put back before anything else happens."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Iterator


def _can_block() -> bool:
    """Windows has no signal masks; only the main thread is interrupted by a Ctrl-C."""
    return hasattr(signal, "pthread_sigmask") and threading.current_thread() is threading.main_thread()


@contextmanager
def held_back() -> Iterator[None]:
    """A Ctrl-C inside is delivered at the end, as KeyboardInterrupt.  Where that cannot be had it comes when it comes."""
    if not _can_block():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def let_through() -> Iterator[None]:
    """Inside `held_back`: a Ctrl-C that waits is delivered now, and one that comes inside is at once (something that may last is done here)."""
    if not _can_block():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
