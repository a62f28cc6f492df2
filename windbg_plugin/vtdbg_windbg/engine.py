"""What is needed of the debugger engine, whichever way its calls are made, and which sessions are of no use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Optional

from vtdbg.targets.port import TargetError


class EngineError(TargetError):
    """The engine refused a call; one line."""


class Interrupted(TargetError):
    """Ctrl-Break."""


INTERRUPTED = "interrupted (Ctrl-Break)"


@dataclass(frozen=True)
class Debuggee:
    """`kind`: "none", "user" or "kernel".  `machine` is the IMAGE_FILE_MACHINE_* of the processors, None where nobody says."""

    kind: str = "none"
    dump: bool = False
    machine: Optional[int] = None
    running: bool = False
    title: str = "no target"


AMD64 = 0x8664
MACHINES = {0x14C: "32-bit x86", 0x1C0: "ARM", 0x1C4: "ARM", 0xAA64: "ARM64"}


class Engine(ABC):
    """One session of dbgeng.  Reads give what is there: fewer bytes than asked for, or none, and never an invented one."""

    name = ""
    inside = False
    """In the debugger's own process: output goes to its command window."""

    @abstractmethod
    def debuggee(self) -> Debuggee: ...

    @abstractmethod
    def read_physical(self, address: int, size: int) -> bytes:
        """The bytes from `address` on that one call of the engine gives, at most `size`; b"" where the first one is missing."""

    @abstractmethod
    def read_virtual(self, address: int, size: int) -> bytes:
        """The same by the current processor's own translation."""

    @abstractmethod
    def write_virtual(self, address: int, data: bytes) -> int:
        """How many bytes were written."""

    @abstractmethod
    def register(self, name: str) -> Optional[int]:
        """A register of the current processor by the engine's name; None where there is none of that name."""

    @abstractmethod
    def write_register(self, name: str, value: int) -> None: ...

    @abstractmethod
    def rdmsr(self, index: int) -> int:
        """A model-specific register of the current processor; EngineError where the target refuses (every dump does)."""

    @abstractmethod
    def evaluate(self, expression: str) -> int:
        """A MASM expression; UsageError where it has no value."""

    @abstractmethod
    def execute(self, command: str) -> None:
        """A debugger command whose output nobody wants."""

    @abstractmethod
    def step(self) -> None:
        """One instruction of the current processor; returns when it has stopped."""

    @abstractmethod
    def processor(self) -> int:
        """Number of the current processor."""

    @abstractmethod
    def processors(self) -> int:
        """How many there are."""

    @abstractmethod
    def physical_memory_block(self) -> Optional[int]:
        """Address of the kernel's variable MmPhysicalMemoryBlock; None where the kernel's debugger data block cannot be found."""

    @abstractmethod
    def write(self, words: str, dml: bool = False) -> None:
        """One piece of output, below the engine's limit."""

    @abstractmethod
    def prefers_dml(self) -> bool:
        """`.prefer_dml`."""

    @abstractmethod
    def interrupted(self) -> bool:
        """Whether the user pressed Ctrl-Break since the last call."""


def check(debuggee: Debuggee) -> None:
    """TargetError, in one line, for a session that has no physical memory and registers of x86-64 to look at."""
    if debuggee.kind == "none":
        raise TargetError("the debugger has no target: open a kernel dump (-z MEMORY.DMP) or attach to a kernel")
    if debuggee.kind == "user":
        raise TargetError("a user-mode session has no physical memory and no control registers: open a kernel dump or attach to a kernel")
    if debuggee.running:
        raise TargetError("the target is running: break in first (Ctrl-Break)")
    if debuggee.machine is not None and debuggee.machine != AMD64:
        kind = MACHINES.get(debuggee.machine, f"machine type {debuggee.machine:#x}")
        raise TargetError(f"the target is {kind}, not x86-64: its hypervisor structures are not read here")
