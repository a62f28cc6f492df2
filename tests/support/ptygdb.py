"""A gdb at a terminal, as a person has it: a pseudo-terminal, the plugin inside, real Ctrl-C; and a wire that presses Ctrl-C at a packet."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import Callable, List, Optional

from support.live import PATIENCE
from support.livegdb import Wire
from vtdbg.targets.start import gdb_environment, plugin_file

PROMPT = b"(gdb) "
CTRL_C = b"\x03"


class PtyGdb:
    """`command` types a line and returns what is shown until the next prompt; `press` sends a key at any time, from any thread."""

    QUIET = 0.03
    """Seconds without a word after which nothing more is said."""

    def __init__(self, *commands: str, patience: float = PATIENCE) -> None:
        self._patience, self._number = patience, 0
        self._terminal, theirs = os.openpty()
        before = ("set pagination off", "set width 0", "set confirm off", "set style enabled off", f"source {plugin_file()}")
        words = [word for command in (*before, *commands) for word in ("-ex", command)]
        # A session of its own with this terminal as its own: Ctrl-C is then a signal to it.
        self._process = subprocess.Popen(["setsid", "--ctty", "gdb", "-q", "-nx", *words], stdin=theirs, stdout=theirs, stderr=theirs,
                                         env={**gdb_environment(), "TERM": "dumb", "COLUMNS": "80"})
        os.close(theirs)
        self.banner = self._until_prompt()

    def command(self, line: str) -> str:
        os.write(self._terminal, line.encode() + b"\n")
        shown = self._until_prompt()
        return shown.partition("\n")[2]

    def press(self, key: bytes = CTRL_C) -> None:
        os.write(self._terminal, key)

    def settle(self) -> None:
        """Reads what a late key still causes: other prompts."""
        self._number += 1
        os.write(self._terminal, f"echo settled-{self._number}\\n\n".encode())
        self._until(f"\nsettled-{self._number}\r\n".encode() + PROMPT, anywhere=True)
        while select.select([self._terminal], [], [], self.QUIET)[0]:
            os.read(self._terminal, 65536)

    def _until_prompt(self) -> str:
        return self._until(PROMPT).decode(errors="replace").replace("\r\n", "\n")[:-len(PROMPT)]

    def _until(self, end: bytes, anywhere: bool = False) -> bytes:
        found, last = b"", time.monotonic() + self._patience
        while not (end in found if anywhere else found.endswith(end)):
            if not select.select([self._terminal], [], [], max(last - time.monotonic(), 0))[0]:
                raise AssertionError(f"no prompt within {self._patience} s: {found[-2000:]!r}")
            found += os.read(self._terminal, 65536)
        return found

    def close(self) -> None:
        # Killed, not told to quit: gdb would detach, and that resumes the target.
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def __enter__(self) -> "PtyGdb":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PressingWire(Wire):
    """A relay that presses a key when the `at`-th packet since `arm` passes: before the stub has it, or (`late`) behind the stub's answer."""

    DELAY = 0.01
    """Seconds that a signal may take from the terminal to gdb."""

    def __init__(self, port: int) -> None:
        self.press: Optional[Callable[[], None]] = None
        self.packets: List[bytes] = []
        self.fired = False
        self._at, self._late, self._due = -1, False, False
        super().__init__(port)

    def arm(self, at: int, late: bool) -> None:
        self.packets, self.fired, self._due = [], False, False
        self._at, self._late = at, late

    def disarm(self) -> None:
        self._at = -1

    def passing(self, data: bytes, to_stub: bool) -> None:
        if to_stub and b"$" in data:
            self.packets.append(data)
            if len(self.packets) == self._at:
                if self._late:
                    self._due = True
                else:
                    self._fire()

    def passed(self, to_stub: bool) -> None:
        if not to_stub and self._due:
            self._due = False
            self._fire()

    def _fire(self) -> None:
        self.fired = True
        if self.press is not None:
            self.press()
            time.sleep(self.DELAY)
