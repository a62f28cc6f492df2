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
    """`command` types a line and returns what is shown until the next prompt; `press` sends a key at any time, from any thread.  `type`, `until`
    and `prompt` are its parts."""

    SILENCE = 30.0
    """Seconds without a word after which a line is typed whose answer brings a prompt: Ctrl-C makes the terminal drop what is on its way, in
    both directions."""

    def __init__(self, *commands: str, patience: float = PATIENCE) -> None:
        self._patience, self._number, self._shown = patience, 0, b""
        self._terminal, theirs = os.openpty()
        before = ("set pagination off", "set width 0", "set confirm off", "set style enabled off", f"source {plugin_file()}")
        words = [word for command in (*before, *commands) for word in ("-ex", command)]
        # A session of its own with this terminal as its own: Ctrl-C is then a signal to it.
        self._process = subprocess.Popen(["setsid", "--ctty", "gdb", "-q", "-nx", *words], stdin=theirs, stdout=theirs, stderr=theirs,
                                         env={**gdb_environment(), "TERM": "dumb", "COLUMNS": "80", "INPUTRC": os.devnull})
        os.close(theirs)
        self.banner = self.prompt()

    @property
    def pid(self) -> int:
        return self._process.pid

    def command(self, line: str) -> str:
        self.type(line)
        return self.prompt().partition("\n")[2]

    def type(self, line: str) -> None:
        os.write(self._terminal, line.encode() + b"\n")

    def until(self, words: str) -> str:
        """What is shown until `words`, which may be followed by more."""
        found = self._until(words.encode(), self._patience, anywhere=True)
        assert found is not None, f"no {words!r} within {self._patience} s: {self._shown[-2000:]!r}"
        return found.decode(errors="replace").replace("\r\n", "\n")

    def prompt(self) -> str:
        """What is shown until the next prompt."""
        end, last = PROMPT, time.monotonic() + self._patience
        while time.monotonic() < last:
            found = self._until(end, self.SILENCE)
            if found is not None:
                return found.decode(errors="replace").replace("\r\n", "\n")[:-len(PROMPT)]
            end = self._mark()
        raise AssertionError(f"no prompt within {self._patience} s: {self._shown[-2000:]!r}")

    def _mark(self) -> bytes:
        """Types a line; how its answer ends."""
        self._number += 1
        self.type(f"echo mark-{self._number}\\n")
        return f"\nmark-{self._number}\r\n".encode() + PROMPT

    def press(self, key: bytes = CTRL_C) -> None:
        os.write(self._terminal, key)

    def settle(self) -> None:
        """Reads what a late key still causes: other prompts, or that a line is not taken.

        GDB looks at a Ctrl-C before it takes a line that was typed behind it, so a second line in a row that is answered with nothing else has
        nothing before it any more.
        """
        calm, last = 0, time.monotonic() + self._patience
        while calm < 2:
            assert time.monotonic() < last, f"no calm within {self._patience} s: {self._shown[-2000:]!r}"
            mark = self._mark()
            found = self._until(mark, self.SILENCE, anywhere=True)
            calm = calm + 1 if found is not None and found.endswith(mark) else 0

    def _until(self, end: bytes, silence: float, anywhere: bool = False) -> Optional[bytes]:
        """What is shown until there is `end`, at its end or anywhere; None after so many seconds without a word (what came is kept)."""
        while not (end in self._shown if anywhere else self._shown.endswith(end)):
            if not select.select([self._terminal], [], [], silence)[0]:
                return None
            self._shown += os.read(self._terminal, 65536)
        found, self._shown = self._shown, b""
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
