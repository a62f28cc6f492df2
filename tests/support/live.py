"""Tests on real engines: an engine that cannot be had skips its tests loudly, or fails them where VTDBG_REQUIRE_LIVE=1 asks for them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Callable, Iterator, Protocol, TypeVar

PATIENCE = 600.0
"""Seconds that a test waits for what has to come.  It only ends what hangs: a busy machine takes many times as long as an idle one."""


class Unavailable(Exception):
    """An engine that the tests compare with cannot be had on this machine; the text says why."""


class Closing(Protocol):
    def close(self) -> None: ...


T = TypeVar("T")
C = TypeVar("C", bound=Closing)


def had(engine: str, make: Callable[[], T]) -> T:
    """What `make` makes of the engine."""
    # Programs that no test runs, like the processor model's worker, know Unavailable without pytest.
    import pytest

    try:
        return make()
    except Unavailable as problem:
        if os.environ.get("VTDBG_REQUIRE_LIVE") == "1":
            pytest.fail(f"{engine} is required (VTDBG_REQUIRE_LIVE=1): {problem}", pytrace=False)
        pytest.skip(f"LIVE TEST SKIPPED: {engine}: {problem}")


@contextmanager
def started(engine: str, make: Callable[[], C]) -> Iterator[C]:
    """The same for what has to be closed."""
    made = had(engine, make)
    try:
        yield made
    finally:
        made.close()
