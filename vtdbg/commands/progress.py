"""Long commands: a line that says how far they are, where somebody watches and once it has taken a while; and what there is so far after Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import Any, Callable, Generic, Iterable, Iterator, Optional, TypeVar

from vtdbg.commands.session import Session

FIRST_AFTER, EVERY = 0.7, 0.2
_STRIDE = 1024

T = TypeVar("T")


class Watched(Generic[T]):
    """`items`, with `words(how many, the last one)` shown by the session's front end now and then; the line is cleared at the end.

    Ctrl-C ends the items early, and `interrupted` says so: whoever works through them goes on with what there is.  `next` is then the first
    item that was left out, where it is known.
    """

    def __init__(self, items: Iterable[T], session: Session, words: Callable[[int, T], str]) -> None:
        self._items, self._progress, self._words = items, session.progress, words
        self.interrupted = False
        self.next: Optional[T] = None

    def __iter__(self) -> Iterator[T]:
        due, shown = time.monotonic() + FIRST_AFTER, False
        try:
            with _noting_ctrl_c(self._stop):
                for count, item in enumerate(self._items):
                    if self.interrupted:
                        self.next = item
                        return
                    if self._progress is not None and count % _STRIDE == 0 and time.monotonic() > due:
                        self._progress(self._words(count, item) + " (Ctrl-C shows what there is)")
                        due, shown = time.monotonic() + EVERY, True
                    yield item
        except KeyboardInterrupt:
            # A front end that handles the signal itself (GDB) raises this wherever the program is.
            self.interrupted = True
        finally:
            if shown and self._progress is not None:
                self._progress("")

    def _stop(self) -> None:
        self.interrupted = True


@contextmanager
def _noting_ctrl_c(note: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `note` instead of breaking off wherever the program happens to be; a second one is an ordinary one again.

    Only where Python's own handler is in place: a debugger's is left alone.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def noted(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note()

    signal.signal(signal.SIGINT, noted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
