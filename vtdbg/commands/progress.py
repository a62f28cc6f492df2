"""A line that says how far a long command is: only where somebody watches, and only once it has taken a while."""

from __future__ import annotations

import time
from typing import Callable, Iterable, Iterator, TypeVar

from vtdbg.commands.session import Session

FIRST_AFTER, EVERY = 0.7, 0.2
_STRIDE = 1024

T = TypeVar("T")


def watched(items: Iterable[T], session: Session, words: Callable[[int, T], str]) -> Iterator[T]:
    """`items`, with `words(how many, the last one)` shown by the session's front end now and then; the line is cleared at the end."""
    if session.progress is None:
        yield from items
        return
    due, shown = time.monotonic() + FIRST_AFTER, False
    try:
        for count, item in enumerate(items):
            if count % _STRIDE == 0 and time.monotonic() > due:
                session.progress(words(count, item))
                due, shown = time.monotonic() + EVERY, True
            yield item
    finally:
        if shown:
            session.progress("")
