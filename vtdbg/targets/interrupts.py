"""Ctrl-C kept waiting while a target is not as it was: what is half changed must be put back before anything else happens."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Callable, Iterator, Optional, TypeVar

_T = TypeVar("_T")


def _can_block() -> bool:
    """Windows has no signal masks; only the main thread is interrupted by a Ctrl-C."""
    return hasattr(signal, "pthread_sigmask") and threading.current_thread() is threading.main_thread()


@contextmanager
def held_back() -> Iterator[None]:
    """A Ctrl-C inside is delivered at the end, as KeyboardInterrupt.  Where that cannot be had it comes when it comes."""
    if not _can_block():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # This call itself raises where a Ctrl-C has come just before it, and has blocked the signal by then.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def carried_out(action: Callable[[], _T]) -> _T:
    """What `action` returns, which puts something back: begun again where a Ctrl-C cuts it short, and that comes when it is done.

    pykd ends a script on Ctrl-Break by SystemExit, which waits like a Ctrl-C.
    """
    interrupted: Optional[BaseException] = None
    while True:
        try:
            result = action()
            break
        except (KeyboardInterrupt, SystemExit) as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
    return result


def deliver() -> None:
    """Inside `held_back`: raises KeyboardInterrupt where a Ctrl-C waits."""
    if not _can_block():
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


PATIENCE = 2.0


@contextmanager
def waiting_at_most(seconds: float = PATIENCE) -> Iterator[None]:
    """Inside `held_back`: a Ctrl-C waits for what is inside, but no longer than `seconds`: whoever does not answer must not hold the user.

    GDB takes a Ctrl-C during a step for one to the target and forgets it, so it must not come before it has to.
    """
    if not _can_block():
        yield
        return
    done = threading.Event()

    def let_through() -> None:
        # A signal to the process is handled by whichever thread does not block it: this one then.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        done.wait()

    timer = threading.Timer(seconds, let_through)
    timer.daemon = True
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        done.set()
