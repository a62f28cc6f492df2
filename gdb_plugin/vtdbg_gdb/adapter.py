"""The `gdb` module as a debugger port."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, Optional

import gdb

from vtdbg.errors import UsageError
from vtdbg.targets.gdbtext import NO_TARGET, NOT_STOPPED, GdbPort, error_of
from vtdbg.targets.interrupts import carried_out, held_back, waiting_at_most
from vtdbg.targets.port import TargetError, TargetGone, unavailable

OUT_OF_STEP = ("interrupted while the stub owed the answer to `monitor {command}`: GDB would take it for that of the next packet.  Type: disconnect, "
               "and connect again")


def _machine_interface() -> bool:
    """Is this GDB driven through MI?  GDB itself does not tell its Python."""
    try:
        with open("/proc/self/cmdline", "rb") as file:
            return re.search(rb"(?:^|\0)--?i(?:nterpreter)?[=\0]mi", file.read()) is not None
    except OSError:
        return False


class InProcessPort(GdbPort):
    """The GDB that this Python runs in.  What GDB raises becomes one of vtdbg's errors."""

    name = "GDB"
    _send: Optional[Callable[[str], Optional[bytes]]] = None

    def execute(self, command: str) -> str:
        try:
            return str(gdb.execute(command, from_tty=False, to_string=True))
        except gdb.error as error:
            raise error_of(str(error), self._where()) from error

    @contextmanager
    def quiet(self) -> Iterator[None]:
        # GDB prints every stop on its own, to_string or not: where it prints leads elsewhere for the time.
        if _machine_interface():
            # The stop's records are the protocol; a client does not show them as text.
            yield
            return
        gdb.flush()
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)

        def shown_again() -> None:
            gdb.flush()
            os.dup2(kept, 1)

        try:
            os.dup2(nowhere, 1)
            yield
        finally:
            try:
                carried_out(shown_again)
            finally:
                os.close(nowhere)
                os.close(kept)

    def require_stopped(self) -> None:
        """TargetError where there is no target, or it runs."""
        self._send = None
        thread = gdb.selected_thread()
        if thread is None or not thread.is_valid():
            raise TargetError(NO_TARGET)
        if thread.is_running() and not self.in_condition:
            raise TargetError(NOT_STOPPED)

    @property
    def in_condition(self) -> bool:
        """Is a breakpoint's condition being evaluated?  For GDB's user the target runs then, and still it has a frame."""
        thread = gdb.selected_thread()
        if thread is None or not thread.is_running():
            return False
        try:
            return bool(gdb.selected_frame().is_valid())
        except gdb.error:
            return False

    def monitor(self, command: str) -> str:
        # GDB lets a Ctrl-C end `monitor` before it has read the answer, which it would then take for the answer of the next packet (remote.c,
        # remote_target::rcmd): the Ctrl-C waits for it, but not for ever.
        with held_back(), waiting_at_most():
            try:
                return super().monitor(command)
            except KeyboardInterrupt:
                raise TargetGone(OUT_OF_STEP.format(command=command)) from None

    def packet(self, text: str) -> bytes:
        if self._send is None:
            # Kept for the rest of the command: looking it up costs as much as a packet.
            self._send = getattr(self.connection(), "send_packet", None)
        if self._send is None:
            # Before GDB 13, and for targets that are not remote.
            return super().packet(text)
        try:
            answer: Optional[bytes] = self._send(text)
            return answer or b""
        except (gdb.error, ValueError, RuntimeError) as error:
            raise error_of(str(error), self._where()) from error

    @staticmethod
    def connection() -> Any:
        return getattr(gdb.selected_inferior(), "connection", None)

    def endpoint(self) -> Optional[str]:
        connection = self.connection()
        details = getattr(connection, "details", None)
        return details.replace("tcp:", "") if details else super().endpoint()

    def _where(self) -> str:
        return getattr(self.connection(), "details", None) or "HOST:PORT"

    def read_virtual(self, address: int, size: int) -> bytes:
        try:
            return bytes(gdb.selected_inferior().read_memory(address, size))
        except gdb.MemoryError as error:
            raise unavailable(address, size, str(error)) from error
        except gdb.error as error:
            raise self._gone_or(error, address, size) from error

    def write_virtual(self, address: int, data: bytes) -> None:
        try:
            gdb.selected_inferior().write_memory(address, data)
        except gdb.MemoryError as error:
            raise unavailable(address, len(data), str(error)) from error
        except gdb.error as error:
            raise self._gone_or(error, address, len(data)) from error

    def _gone_or(self, error: gdb.error, address: int, size: int) -> Exception:
        made = error_of(str(error), self._where())
        return made if isinstance(made, TargetGone) else unavailable(address, size, str(error))

    def evaluate(self, expression: str) -> int:
        try:
            value = gdb.parse_and_eval(expression)
            if value.type.code == gdb.TYPE_CODE_VOID:
                raise UsageError(f"{expression} has no value")
            if value.type.strip_typedefs().code in (gdb.TYPE_CODE_FUNC, gdb.TYPE_CODE_ARRAY):
                value = value.address
            return int(value.cast(gdb.lookup_type("unsigned long"))) & (1 << 64) - 1
        except gdb.error as error:
            made = error_of(str(error), self._where())
            raise (made if isinstance(made, TargetGone) else UsageError(f"{expression}: {made}")) from error

    def select(self, number: int) -> None:
        for thread in gdb.selected_inferior().threads():
            if thread.num == number:
                # Not GDB's command `thread`: that says so in the middle of a report.
                thread.switch()
                return
        raise TargetError(f"GDB has no thread {number}")

    @contextmanager
    def viewed_from(self, number: int) -> Iterator[None]:
        if number == self.selected():
            yield
            return
        # A thread that is selected again is at its innermost frame.
        with self._frame_kept(), super().viewed_from(number):
            yield

    @contextmanager
    def _frame_kept(self) -> Iterator[None]:
        """The frame that the user has selected is selected again at the end."""
        level = self._level()
        try:
            yield
        finally:
            if level:
                carried_out(lambda: self._select_frame(level))

    def _select_frame(self, level: int) -> None:
        """Not by GDB's command `frame`, which says so in the middle of a report."""
        try:
            frame = gdb.newest_frame()
            for _ in range(level):
                frame = frame.older() or frame
            frame.select()
        except gdb.error as error:
            raise error_of(str(error), self._where()) from error

    @contextmanager
    def _innermost(self) -> Iterator[None]:
        """In an outer frame (`up`, `frame 1`) GDB's registers are those of the caller, and to write one writes to the stack: inside, the frame is
        that of the processor."""
        if not self._level():
            yield
            return
        with self._frame_kept():
            self._select_frame(0)
            yield

    def registers(self) -> Mapping[str, Optional[int]]:
        with self._innermost():
            return super().registers()

    def write_register(self, name: str, value: int) -> None:
        with self._innermost():
            super().write_register(name, value)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        # A step selects the innermost frame, too.
        with self._innermost(), super().stepping():
            yield

    @staticmethod
    def _level() -> int:
        """The number of the selected frame; 0 where there is none."""
        try:
            return int(gdb.selected_frame().level())
        except gdb.error:
            return 0

    def selected(self) -> Optional[int]:
        thread = gdb.selected_thread()
        return int(thread.num) if thread is not None else None
