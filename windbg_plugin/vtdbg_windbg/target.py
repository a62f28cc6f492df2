"""A session of the engine as a Machine: memory through a page cache, registers when somebody asks for them."""

from __future__ import annotations

from typing import Iterator, Mapping, Optional

from vtdbg.machine import Cpu, Machine
from vtdbg.numbers import size_text
from vtdbg.targets.live import LiveMachine
from vtdbg.targets.physical import PhysicalMode
from vtdbg.targets.processors import Processors
from vtdbg.targets.stub import Dialect
from vtdbg.targets.where import Where
from vtdbg_windbg.port import NO_MSRS, DbgEngPort

SESSION, FORMAT = "the debugger's session", "dbgeng"


class LaterRegisters(Mapping[str, Optional[int]]):
    """Registers of one processor, read at the first look: switching a live target's processor costs a second."""

    def __init__(self, port: DbgEngPort, number: int) -> None:
        self._port, self._number = port, number
        self._found: Optional[Mapping[str, Optional[int]]] = None

    def _registers(self) -> Mapping[str, Optional[int]]:
        if self._found is None:
            with self._port.on(self._number):
                self._found = self._port.with_msrs()
        return self._found

    def __getitem__(self, name: str) -> Optional[int]:
        return self._registers()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registers())

    def __len__(self) -> int:
        return len(self._registers())


class DbgEngMachine(LiveMachine):
    """A live kernel session: what LiveMachine is for a stub, with all processors, and physical memory that the engine reads itself."""

    def __init__(self, port: DbgEngPort) -> None:
        self.port = port
        self.dialect = Dialect("dbgeng", "", monitor=False)
        self.mode = PhysicalMode(port, self.dialect)
        self.where = Where("unknown", "not looked at yet")
        self.stale, self.places = True, []
        self.processors = Processors(self, port, linux=False)
        Machine.__init__(self, port.memory, SESSION, FORMAT, live=True)
        _describe(self, port)

    def refresh(self) -> None:
        """Finds out whether the selected processor is in the host, by the control blocks that a command named or a scan found."""
        if self.stale:
            self.processors.forget()
            self.stale = False
        self.where = self.processors.selected().where

    def search(self) -> str:
        """Nothing is searched unasked: the engine's reads are slow."""
        return ""

    def current(self, kind: str) -> Optional[int]:
        return None

    def kvm(self) -> None:
        """Windows is no Linux."""

    def release(self) -> None:
        """The session is the debugger's: nothing is let go of."""
        return


def machine_of(port: DbgEngPort) -> Machine:
    """The session that the port looks at.  Its memory is a page cache: `drop` it when the target has run."""
    if port.live:
        return DbgEngMachine(port)
    machine = Machine(port.memory, SESSION, FORMAT)
    _describe(machine, port)
    return machine


def _describe(machine: Machine, port: DbgEngPort) -> None:
    debuggee, ranges = port.debuggee, port.physical_ranges()
    machine.cpus = [Cpu(number, LaterRegisters(port, number), port.name) for number in port.processors()]
    machine.details = {"session": debuggee.title, "processors": str(len(machine.cpus)), "MSRs": "by RDMSR" if port.live else NO_MSRS}
    total = f", {size_text(sum(length for _, length in ranges))} of physical memory" if ranges else ""
    machine.provenance = f"{'live kernel' if port.live else debuggee.title} through {port.name} ({port.engine.name}){total}"
