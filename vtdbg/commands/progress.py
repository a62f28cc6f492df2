"""Long commands: a line that says how far they are, where somebody watches and once it has taken a while; and what there is so far after Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Generic, Iterable, Iterator, Optional, TypeVar

from vtdbg.commands.session import Session

if TYPE_CHECKING:
    from vtdbg.enumeration import Range

FIRST_AFTER, EVERY = 0.7, 0.2
_STRIDE = 1024

T = TypeVar("T")


class Watched(Generic[T]):
    """`items`, with `words(how many, the last one)` shown by the session's front end now and then; the line is cleared at the end.

    Ctrl-C ends the items early, and `interrupted` says so: whoever works through them goes on with what there is.  `next` is then the first
    item that was left out, where it is known.
    """

    def __init__(self, items: Iterable[T], session: Session, words: Callable[[int, T], str], stride: int = _STRIDE) -> None:
        """`stride`: the clock is looked at every so many items."""
        self._items, self._progress, self._words, self._stride = items, session.progress, words, stride
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
                    if self._progress is not None and count % self._stride == 0 and time.monotonic() > due:
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


class Watch(Generic[T]):
    """Makes what is passed to it `Watched`, once; without a session it is passed on as it is."""

    def __init__(self, session: Optional[Session], words: Callable[[int, T], str]) -> None:
        self._session, self._words = session, words
        self._made: Optional[Watched[T]] = None

    def __call__(self, items: Iterable[T]) -> Iterator[T]:
        if self._session is None:
            return iter(items)
        self._made = Watched(items, self._session, self._words)
        return iter(self._made)

    @property
    def stopped(self) -> bool:
        """Ctrl-C ended it."""
        return self._made is not None and self._made.interrupted

    @property
    def next(self) -> Optional[T]:
        """The first item that was left out, where it is known."""
        return self._made.next if self._made is not None else None


def range_words(count: int, row: Range) -> str:
    return f"{count} ranges, at {row.start:#x}"


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
