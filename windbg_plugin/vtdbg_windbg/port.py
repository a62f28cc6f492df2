"""The debugger port over DbgEng: registers by the engine's names, processors by `~Ns`, physical memory by the engine's own reads."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, Optional

from vtdbg.errors import UsageError
from vtdbg.memory.base import Range
from vtdbg.targets.port import GENERAL, Port, TargetError, Unsupported, unavailable
from vtdbg_windbg.engine import INTERRUPTED, Engine, EngineError, Interrupted, check
from vtdbg_windbg.memory import EngineCache, EngineMemory

SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")

# Name in vtdbg -> name in dbgeng; the port's users know a selector as "cs", those of Cpu.registers as "cs_selector".
NAMES: Mapping[str, str] = {
    **{name: name for name in GENERAL},
    "rip": "rip", "rflags": "efl",
    **{name: name for name in SEGMENTS},
    **{f"{name}_selector": name for name in SEGMENTS},
    "cr0": "cr0", "cr2": "cr2", "cr3": "cr3", "cr4": "cr4", "cr8": "cr8",
    "dr0": "dr0", "dr1": "dr1", "dr2": "dr2", "dr3": "dr3", "dr6": "dr6", "dr7": "dr7",
    "gdtr_base": "gdtr", "gdtr_limit": "gdtl", "idtr_base": "idtr", "idtr_limit": "idtl", "tr_selector": "tr", "ldtr_selector": "ldtr",
}

# By RDMSR, on a live target only (SDM vol. 4, IA-32 Architectural MSRs).
MSRS: Mapping[str, int] = {
    "efer": 0xC0000080, "star": 0xC0000081, "lstar": 0xC0000082, "cstar": 0xC0000083, "sfmask": 0xC0000084,
    "fs_base": 0xC0000100, "gs_base": 0xC0000101, "kernel_gs_base": 0xC0000102,
}
NO_MSRS = "a dump has no MSRs: RDMSR works on a live kernel only"


class DbgEngPort(Port):
    """A kernel session; `memory` is its physical memory through a page cache, which a step drops.

    Nothing here writes to a dump: the engine's and pykd's own writes to one are not to be relied on.
    """

    name = "DbgEng"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.debuggee = engine.debuggee()
        check(self.debuggee)
        self.memory = EngineCache(EngineMemory(engine, self.debuggee.dump))
        self._interrupted = False
        """A Ctrl-Break was taken that has not been reported."""

    @property
    def live(self) -> bool:
        return not self.debuggee.dump

    def registers(self) -> Mapping[str, Optional[int]]:
        """Without MSRs, each of which is a round trip: `with_msrs` has them."""
        return {name: self.engine.register(theirs) for name, theirs in NAMES.items()}

    def with_msrs(self) -> Mapping[str, Optional[int]]:
        """The registers, and those that RDMSR gives; None where the target refuses."""
        found: Dict[str, Optional[int]] = dict(self.registers())
        for name, index in MSRS.items():
            try:
                found[name] = self.rdmsr(index)
            except TargetError:
                found[name] = None
        return found

    def rdmsr(self, index: int) -> int:
        """A model-specific register of the selected processor; TargetError on a dump and where the target refuses."""
        if not self.live:
            raise Unsupported(NO_MSRS)
        try:
            return self.engine.rdmsr(index)
        except EngineError as error:
            raise EngineError(f"MSR {index:#x}: the target refuses RDMSR ({error})") from error

    def write_register(self, name: str, value: int) -> None:
        self._writable()
        if name not in NAMES:
            raise UsageError(f"{name}: no register that can be written here")
        self.engine.write_register(NAMES[name], value)

    def read_virtual(self, address: int, size: int) -> bytes:
        data = self.engine.read_virtual(address, size) if size else b""
        if len(data) < size and self._take_interrupt():
            data = self.engine.read_virtual(address, size)
        if len(data) < size:
            raise unavailable(address + len(data), size - len(data), "not mapped, or not in the dump" if self.debuggee.dump else "not mapped")
        return data

    def write_virtual(self, address: int, data: bytes) -> None:
        self._writable()
        self.memory.drop()
        try:
            count = self._written(address, data)
        except EngineError as error:
            raise unavailable(address, len(data), str(error)) from error
        if count < len(data):
            raise unavailable(address + count, len(data) - count, "the target refuses the write")

    def _written(self, address: int, data: bytes) -> int:
        try:
            return self.engine.write_virtual(address, data)
        except EngineError:
            if not self._take_interrupt():
                raise
        return self.engine.write_virtual(address, data)

    def _take_interrupt(self) -> bool:
        """While a Ctrl-Break waits the engine refuses virtual memory, even to put a target back: it is taken, and the next step reports it."""
        taken = self.engine.interrupted()
        self._interrupted = self._interrupted or taken
        return taken

    def _writable(self) -> None:
        if not self.live:
            raise Unsupported("nothing is written to a dump")

    def step(self) -> None:
        if not self.live:
            raise Unsupported("a dump does not run")
        self._take_interrupt()
        if self._interrupted:
            self._interrupted = False
            raise Interrupted(INTERRUPTED)
        try:
            self.engine.step()
        finally:
            # Whatever was read may have changed.
            self.memory.drop()

    def run_to(self, address: int, timeout: Optional[float] = None) -> bool:
        raise Unsupported("in WinDbg nothing is run to an address: `exit trace` is for GDB, or -s gdb:HOST:PORT")

    def evaluate(self, expression: str) -> int:
        return self.engine.evaluate(expression)

    def read_physical(self, address: int, size: int) -> bytes:
        return self.memory.read(address, size)

    def physical_ranges(self) -> Optional[List[Range]]:
        return self.memory.ranges()

    def processors(self) -> Dict[int, str]:
        return {number: f"processor {number}" for number in range(self.engine.processors())}

    def selected(self) -> Optional[int]:
        return self.engine.processor()

    def select(self, number: int) -> None:
        if number == self.engine.processor():
            return
        try:
            self.engine.execute(f"~{number}s")
        except EngineError as error:
            raise EngineError(f"processor {number}: the engine does not switch to it ({error})") from error
        if self.engine.processor() != number:
            raise EngineError(f"processor {number}: the engine did not switch to it")

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Looks from processor `number`; the user's own is selected again whatever happens.

        The command that switches takes a Ctrl-Break that waits: it is noted before, and reported when all is as it was.
        """
        before = self.engine.processor()
        self._take_interrupt()
        self.select(number)
        try:
            yield
        finally:
            self._take_interrupt()
            self.select(before)
        if self._interrupted:
            self._interrupted = False
            raise Interrupted(INTERRUPTED)
