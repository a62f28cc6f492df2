"""The debugger port: what vtdbg needs of a debugger, whichever it is.

GDB in its own process, a gdb driven through MI, and DbgEng implement it.  Everything above (physical memory, host or guest, injection, exit
trace) is written against this class and knows no debugger.  What a debugger or its target cannot do raises `Unsupported`, in words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, Optional, TypeVar

from vtdbg.errors import MemoryUnavailable, VtdbgError
from vtdbg.memory.base import Range
from vtdbg.targets.interrupts import carried_out

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")


class TargetError(VtdbgError):
    """The target or the debugger did not do what was asked: gone, running, refused.  One line."""


class TargetGone(TargetError):
    """The connection is lost; nothing more can be asked or restored."""


class Unsupported(TargetError):
    """This debugger or this target cannot do it at all; the text says what would."""


_Port = TypeVar("_Port", bound="Port")


class Port(ABC):
    """A stopped target, seen from one of its processors.

    Numbers are unsigned.  Every method raises TargetError (or a subclass) where the debugger refuses and TargetGone where the connection is lost.
    """

    name: str = "debugger"

    def __enter__(self: _Port) -> _Port:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- needed of every debugger ----------------------------------------------------------------------------------------------

    @abstractmethod
    def registers(self) -> Mapping[str, Optional[int]]:
        """What the debugger knows of the selected processor by lower-case name: GENERAL, rip, rflags, cs, ss, ..., and, where the target
        tells, cr0, cr3, cr4, efer, gdtr_base, gdtr_limit, idtr_base, idtr_limit, tr_selector, tr_base, tr_limit.  Absent or None is unknown."""

    @abstractmethod
    def write_register(self, name: str, value: int) -> None:
        """One register of GENERAL, rip or rflags."""

    @abstractmethod
    def read_virtual(self, address: int, size: int) -> bytes:
        """Memory as the selected processor's own address translation shows it.  Raises MemoryUnavailable."""

    @abstractmethod
    def write_virtual(self, address: int, data: bytes) -> None:
        """The same for writing.  Raises MemoryUnavailable."""

    @abstractmethod
    def step(self) -> None:
        """One instruction of the selected processor, the others standing still; returns when it has stopped again."""

    @abstractmethod
    def evaluate(self, expression: str) -> int:
        """An expression of the debugger's language; UsageError where it has no value."""

    def reads_memory(self, expression: str) -> bool:
        """Does the debugger read the target's memory for the value of an expression?  False where that is not known."""
        return False

    # -- what a debugger may lack ----------------------------------------------------------------------------------------------

    def read_physical(self, address: int, size: int) -> bytes:
        """Physical memory, where the debugger itself reads it (DbgEng does, GDB does not: see `physical.py`)."""
        raise Unsupported(f"{self.name} has no physical reads of its own")

    def physical_ranges(self) -> Optional[List[Range]]:
        """Which physical memory exists, where the debugger itself knows."""
        return None

    def monitor(self, command: str) -> str:
        """A command of the target's own monitor (`monitor ...` in GDB)."""
        raise Unsupported(f"{self.name} has no monitor")

    def packet(self, text: str) -> bytes:
        """A raw packet of the remote protocol and its answer, as it is on the wire; empty where the stub does not know the packet."""
        raise Unsupported(f"{self.name} has no remote protocol")

    def endpoint(self) -> Optional[str]:
        """Where the stub listens, "HOST:PORT", or None."""
        return None

    def load_symbols(self, path: str) -> None:
        """Has the debugger load a file of symbols and types."""
        raise Unsupported(f"{self.name} is not told to load symbols: load {path} by its own commands")

    def rdmsr(self, index: int) -> int:
        """A model-specific register of the selected processor, where the debugger itself reads them (DbgEng does)."""
        raise Unsupported(f"{self.name} does not read MSRs")

    def processors(self) -> Dict[int, str]:
        """The debugger's numbers of the processors, with a title each."""
        return {}

    def selected(self) -> Optional[int]:
        """The number of the selected processor."""
        return None

    def select(self, number: int) -> None:
        """Look from another processor."""
        raise Unsupported(f"{self.name} cannot select a processor")

    @contextmanager
    def viewed_from(self, number: int) -> Iterator[None]:
        """Looks from processor `number`; the user's own is selected again whatever happens, a Ctrl-C included."""
        before = self.selected()
        if before == number:
            yield
            return
        back = before
        try:
            self.select(number)
            yield
        finally:
            if back is not None:
                carried_out(lambda: self.select(back))

    def run_to(self, address: int, timeout: Optional[float] = None) -> bool:
        """Resume until an instruction at `address` is reached; False where the target stopped for another reason.

        Sets and removes its own breakpoint, and leaves the user's alone.  Only commands whose name says that they resume call this.
        """
        raise Unsupported(f"{self.name} cannot run to an address")

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The steps inside share what the debugger has to be told before them, and told again after them."""
        yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What the debugger prints of stops inside is not shown."""
        yield

    def close(self) -> None:
        """Lets go of the target without resuming it."""
        return


def unavailable(address: int, size: int, reason: str) -> MemoryUnavailable:
    """What `read_virtual` raises."""
    return MemoryUnavailable(address, size, reason, "virtual")
