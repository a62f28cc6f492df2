"""One GDB as a vtdbg session: the target is looked at when a command needs it, and forgotten when it runs."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager
from typing import Iterator, List, Optional, Tuple

import gdb

from vtdbg.commands.session import OWN_GDB, Session
from vtdbg.errors import UsageError
from vtdbg.targets.live import LiveMachine
from vtdbg.targets.port import TargetGone
from vtdbg.targets.stub import QUERY, SET
from vtdbg_gdb.adapter import InProcessPort

PUT_BACK = "the connection was lost while the stub's memory packets were physical; they are virtual again"


class _Progress:
    """One line on GDB's terminal that the next one replaces; empty to clear it."""

    def __init__(self) -> None:
        self._shown = False

    def __call__(self, line: str) -> None:
        if line or self._shown:
            gdb.write(f"\r\x1b[K{line}", gdb.STDERR)
            gdb.flush(gdb.STDERR)
        self._shown = bool(line)


class GdbSession(Session):
    """`machine` is the target that GDB is connected to at the moment of the command."""

    def __init__(self) -> None:
        # GDB's own standard error, not what Python makes of it.
        watched = sys.__stderr__ is not None and sys.__stderr__.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        super().__init__(program="vt", progress=_Progress() if watched else None)
        self.port = InProcessPort()
        self.evaluate = self._evaluate
        self._live: Optional[LiveMachine] = None
        self._connection: Tuple[object, ...] = ()
        self._stack: Optional[ExitStack] = None
        self._lost_at: Optional[str] = None
        self.said: Optional[str] = None
        self._evaluated: List[str] = []

    @property
    def _outermost(self) -> LiveMachine:
        self.port.require_stopped()
        connection = self.port.connection()
        now = (getattr(connection, "num", None), self.port.endpoint(), self.fast)
        if self._live is None or self._connection != now:
            known = self._live.places if self._live is not None and self._connection[:2] == now[:2] else ()
            self.leave()
            self._repair(now[1])
            self._live, self._connection = LiveMachine(self.port, self.fast, known), now
            self._cache.clear()
        self.source = f"gdb:{self._live.name}"
        if self._stack is not None:
            self._stack.enter_context(self._live.reading())
        self._live.refresh()
        while self._evaluated:
            self.said = self._live.doubt(self._evaluated.pop()) or self.said
        return self._live

    def _look_from(self, symbols: Tuple[str, ...], thread: Optional[int]) -> None:
        if symbols or thread is not None:
            raise UsageError(OWN_GDB)

    @property
    def has_machine(self) -> bool:
        return self.port.connection() is not None

    @contextmanager
    def command(self) -> Iterator[None]:
        """The physical reads of one command share one switch of the stub's mode."""
        with ExitStack() as stack:
            self._stack = stack
            self._evaluated.clear()
            try:
                yield
            except TargetGone:
                self.leave()
                raise
            finally:
                self._stack = None

    def leave(self) -> None:
        """Forgets the target: it is another one now, or gone.  GDB's connection is GDB's."""
        live = self._live
        if live is not None and live.mode.abandoned:
            self._lost_at = live.name
        self._live, self._connection = None, ()
        self._cache.clear()
        if live is not None:
            live.memory.close()

    def _repair(self, endpoint: object) -> None:
        """A connection that broke in the middle of a read left QEMU in physical mode: it keeps that over a disconnect."""
        if self._lost_at is not None and self._lost_at == endpoint and self.port.packet(QUERY) == b"1":
            self.port.packet(SET + "0")
            self.said = PUT_BACK
        # Last: a Ctrl-C before that leaves it to be done.
        self._lost_at = None

    @property
    def lost(self) -> bool:
        return self._lost_at is not None or (self._live is not None and self._live.mode.abandoned)

    def reconnected(self) -> None:
        """A target is there again: where the last one was lost in physical mode, what GDB itself reads must not wait for the next command."""
        if self._live is not None and self._live.mode.abandoned:
            self.leave()
        if self._lost_at is not None and self.port.connection() is not None:
            self.port.require_stopped()
            self._repair(self.port.endpoint())

    def forget(self) -> None:
        self._cache.clear()
        if self._live is not None:
            self._live.memory.drop()

    def close(self) -> None:
        """`configure` calls this when the source changes; GDB's target is not ours to close."""

    def _evaluate(self, expression: str) -> int:
        if self._live is not None:
            self._live.mode.virtual()
        value = self.port.evaluate(expression)
        # Where the processor is, is found out when the command needs the target.
        self._evaluated.append(expression)
        return value
