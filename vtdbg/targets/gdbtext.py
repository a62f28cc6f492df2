"""What both GDB adapters share: GDB's commands and what GDB prints for them (GDB 11 and newer)."""

from __future__ import annotations

import re
from abc import abstractmethod
from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, Optional, Tuple, Type

from vtdbg.errors import UsageError
from vtdbg.targets.interrupts import held_back, waiting_at_most
from vtdbg.targets.port import GENERAL, Port, TargetError, TargetGone, Unsupported

WRONG_ARCHITECTURE = (
    "GDB and the stub disagree on the size of the registers: GDB was connected while the processor was in another mode, or has the wrong "
    "architecture.  Type: disconnect, then: set architecture i386:x86-64, then: target remote {endpoint}"
)
NOT_STOPPED = "the target is running: stop it first (Ctrl-C, or `interrupt`)"
NO_TARGET = ("GDB has no target: connect first, for instance `target remote 127.0.0.1:1234`; where GDB refuses that because of the 'g' packet, "
             "type `set architecture i386:x86-64` before it")
GONE = "the connection to the target is lost: {text}; connect again (QEMU keeps the target as it was)"

RUNNING = 0.3
"""Seconds that a Ctrl-C waits for a stop of the running target."""

# A dereference (not a product or a pointer type), a member, an element.
_DEREFERENCE = re.compile(r"(?:^|[-+*/%&|^~!<>=,(?:])\s*\*|->|\[")
_WORD = re.compile(r"(?<![\w$.&>])[A-Za-z_]\w*")

_WRONG = re.compile(r"'g' packet reply is too long|Truncated register \d+ in remote 'g' packet|Bogus trace status reply|unexpected register size")
_RUNNING = re.compile(r"while the (?:target|selected thread|program) is running|Selected thread is running|target is running")
_NONE = re.compile(r"has no registers now|No (?:selected )?(?:frame|thread|process)|not (?:being run|connected)|No registers|no process|"
                   r"target is `?(?:exec|native|None)|command can only be used with remote target|no running inferior", re.I)
_GONE = re.compile(r"Remote connection closed|Remote communication error|Connection reset|Broken pipe|Target disconnected|"
                   r"Connection timed out|can only be sent to a remote target|"
                   r"Connection no longer exists|Remote failure reply: E99|Ignoring packet error|Watchdog timeout", re.I)


def error_of(message: str, endpoint: str = "HOST:PORT") -> TargetError:
    """GDB's complaint as one of ours: which kind it is, and what to do."""
    line = " ".join(message.split()).rstrip(".")
    known: List[Tuple[re.Pattern[str], Type[TargetError], str]] = [
        (_WRONG, TargetError, WRONG_ARCHITECTURE), (_RUNNING, TargetError, NOT_STOPPED), (_GONE, TargetGone, GONE), (_NONE, TargetError, NO_TARGET)]
    for pattern, kind, text in known:
        if pattern.search(line):
            return kind(text.format(text=line, endpoint=endpoint))
    return TargetError(line or "GDB refuses without a reason")


class GdbPort(Port):
    """A GDB, by its command line."""

    name = "GDB"
    _ready_to_step = False

    @abstractmethod
    def execute(self, command: str) -> str:
        """What GDB prints for a command.  Raises the error that `error_of` makes."""

    def registers(self) -> Mapping[str, Optional[int]]:
        text = self.execute("info registers")
        found: Dict[str, Optional[int]] = {}
        for name, value in re.findall(r"^(\w+)\s+(0x[0-9a-fA-F]+)\s", text, re.M):
            found["rflags" if name == "eflags" else name] = int(value, 16)
        if "rip" not in found:
            architecture = self.execute("show architecture").strip()
            raise TargetError(f"GDB shows no 64-bit registers ({architecture}): {WRONG_ARCHITECTURE.format(endpoint=self.endpoint() or 'HOST:PORT')}")
        return found

    def write_register(self, name: str, value: int) -> None:
        if name not in GENERAL and name not in ("rip", "rflags"):
            raise Unsupported(f"register {name} is not written through GDB")
        self.execute(f"set var ${'eflags' if name == 'rflags' else name} = {value:#x}")

    def step(self) -> None:
        with self.stepping(), waiting_at_most():
            self.execute("stepi")

    @contextmanager
    def stepping(self) -> Iterator[None]:
        if self._ready_to_step:
            yield
            return
        # A Ctrl-C between a setting and its being put back would leave it to the user.
        with held_back(), self._setting("scheduler-locking", "on"), self._setting("step-mode", "on"):
            self._ready_to_step = True
            try:
                yield
            finally:
                self._ready_to_step = False

    @contextmanager
    def _setting(self, name: str, value: str) -> Iterator[None]:
        shown = self.execute(f"show {name}")
        before = re.search(r"\"(\w+)\"|\bis (\w+)\b", shown)
        try:
            self.execute(f"set {name} {value}")
        except TargetGone:
            raise
        except TargetError:
            # "Target 'remote' cannot support this command": one processor, nothing to lock.
            before = None
        try:
            yield
        finally:
            if before is not None:
                self.execute(f"set {name} {before.group(1) or before.group(2)}")

    def evaluate(self, expression: str) -> int:
        try:
            text = self.execute(f"output/x (unsigned long)({expression})")
        except TargetGone:
            raise
        except TargetError as error:
            raise UsageError(f"{expression}: {error}") from error
        # What GDB has to say of an earlier stop can stand before it.
        number = re.search(r"(0x[0-9a-f]+)\s*$", text)
        if number is None:
            raise UsageError(f"{expression}: not a number ({text.strip()[:60]})")
        return int(number.group(1), 16)

    def reads_memory(self, expression: str) -> bool:
        return _DEREFERENCE.search(expression) is not None or any(self._is_variable(word) for word in _WORD.findall(expression))

    def _is_variable(self, word: str) -> bool:
        """Has it an address, and is it neither a function nor an array, which stand for theirs?"""
        try:
            self.execute(f"output &({word})")
            return re.search(r"[\[(]", self.execute(f"whatis {word}")) is None
        except TargetGone:
            raise
        except TargetError:
            return False

    def monitor(self, command: str) -> str:
        return self.execute(f"monitor {command}").replace("\r\n", "\n")

    def packet(self, text: str) -> bytes:
        answer = re.search(r'received: "(.*)"', self.execute(f"maintenance packet {text}"), re.S)
        if answer is None:
            raise TargetError(f"GDB shows no answer to {text[:40]}")
        return answer.group(1).encode("latin-1", "replace")

    def endpoint(self) -> Optional[str]:
        found = re.search(r"^\*\s+\d+\s+(?:extended-)?remote (\S+)", self.execute("info connections"), re.M)
        return found.group(1).replace("tcp:", "") if found else None

    def processors(self) -> Dict[int, str]:
        rows = re.findall(r"^[* ]\s+(\d+)\s+(.+?)\s*$", self.execute("info threads"), re.M)
        return {int(number): re.sub(r"\s{2,}.*|\s0x[0-9a-f]{8,}.*", "", title) for number, title in rows if "Target Id" not in title}

    def selected(self) -> Optional[int]:
        # 0 where there is none.  `info threads` would ask the stub for the registers of every processor.
        return int(self.execute("output $_thread").strip() or "0") or None

    def select(self, number: int) -> None:
        self.execute(f"thread {number}")

    def run_to(self, address: int, timeout: Optional[float] = None) -> bool:
        # A Ctrl-C waits for the breakpoint to be known, and to be gone; while the target runs it waits for the next stop, but not for long: GDB
        # passes it on to the target, and where that has just stopped by itself both forget it.
        with held_back():
            made = self.execute(f"thbreak *{address:#x}")
            number = re.search(r"reakpoint (\d+)", made)
            try:
                with waiting_at_most(RUNNING):
                    self._resume(timeout)
                return self.registers().get("rip") == address
            finally:
                if number is not None and re.search(rf"^{number.group(1)}\s", self.execute("info breakpoints"), re.M):
                    self.execute(f"delete {number.group(1)}")

    def _resume(self, timeout: Optional[float]) -> None:
        """Until the next stop, whatever it is."""
        self.execute("continue")
