"""A session of the engine as a Machine: memory through a page cache, registers when somebody asks for them."""

from __future__ import annotations

from typing import Dict, Iterator, List, Mapping, Optional

from vtdbg.machine import Cpu, Machine
from vtdbg.numbers import size_text
from vtdbg_windbg.memory import EngineCache
from vtdbg_windbg.port import NO_MSRS, DbgEngPort


class LaterRegisters(Mapping[str, Optional[int]]):
    """Registers of one processor, read at the first look: switching a live target's processor costs a second."""

    def __init__(self, port: DbgEngPort, number: int) -> None:
        self._port, self._number = port, number
        self._found: Optional[Mapping[str, Optional[int]]] = None

    def _registers(self) -> Mapping[str, Optional[int]]:
        if self._found is None:
            with self._port.on(self._number):
                self._found = self._port.registers()
        return self._found

    def __getitem__(self, name: str) -> Optional[int]:
        return self._registers()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registers())

    def __len__(self) -> int:
        return len(self._registers())


def machine_of(port: DbgEngPort) -> Machine:
    """The session that the port looks at.  Its memory is a page cache: `drop` it when the target has run."""
    debuggee, engine = port.debuggee, port.engine
    source = f"DbgEng ({engine.name})"
    cpus: List[Cpu] = [Cpu(number, LaterRegisters(port, number), port.name) for number in port.processors()]
    details: Dict[str, str] = {"session": debuggee.title, "processors": str(len(cpus)), "MSRs": "by RDMSR" if port.live else NO_MSRS}
    ranges = port.physical_ranges()
    total = f", {size_text(sum(length for _, length in ranges))} of physical memory" if ranges else ""
    provenance = f"{'live kernel' if port.live else debuggee.title} through {source}{total}"
    return Machine(EngineCache(port.memory), "the debugger's session", "dbgeng", provenance, cpus, details, [], port.live)
