"""Runs in Windows' Python: measure.py DUMP EPTP: `ept dump` of the same tables through each backend; one JSON object."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Dict

import pykd
from vtdbg_windbg.ctypes_engine import CtypesEngine
from vtdbg_windbg.engine import Engine
from vtdbg_windbg.port import DbgEngPort
from vtdbg_windbg.pykd_engine import PykdEngine
from vtdbg_windbg.target import machine_of

from vtdbg.enumeration import Enumeration
from vtdbg.memory.base import PhysicalMemory
from vtdbg.vmx.ept import Ept

RUNS = 3


class PykdBytes(PykdEngine):
    """pykd as scripts use it: `loadBytes`, which makes a list of numbers of one byte each."""

    name = "pykd loadBytes"

    def _load(self, address: int, size: int, physical: bool) -> bytes:
        return bytes(self.pykd.loadBytes(address, size, physical))


class PykdEntries(PykdEngine):
    """pykd as scripts use it: one `loadQWords` of one entry after the other."""

    name = "pykd an entry"

    def _load(self, address: int, size: int, physical: bool) -> bytes:
        return b"".join(self.pykd.loadQWords(at, 1, physical)[0].to_bytes(8, "little") for at in range(address, address + size, 8))


class Counted(PhysicalMemory):
    """Counts the reads that reach the engine."""

    def __init__(self, engine: Engine) -> None:
        self.reads = 0
        self._engine_read = engine.read_physical
        engine.read_physical = self._counted  # type: ignore[method-assign]

    def _counted(self, address: int, size: int) -> bytes:
        self.reads += 1
        return self._engine_read(address, size)

    def read(self, address: int, size: int) -> bytes:
        return self._counted(address, size)

    def ranges(self) -> None:
        return None


def measured(engine: Engine, eptp: int) -> Dict[str, Any]:
    counter = Counted(engine)
    best, rows, tables, reads, reading = float("inf"), 0, 0, 0, float("inf")
    for _ in range(RUNS):
        counter.reads = 0
        machine = machine_of(DbgEngPort(engine))
        counter.reads = 0
        start = time.perf_counter()
        found = Enumeration(machine.memory, Ept(eptp))
        rows = sum(1 for _ in found)
        best = min(best, time.perf_counter() - start)
        tables, reads = found.tables_read, counter.reads
        addresses = list(machine.memory._pages)  # type: ignore[attr-defined]
        start = time.perf_counter()
        for address in addresses:
            engine.read_physical(address, 4096)
        reading = min(reading, time.perf_counter() - start)
    return {"seconds": best, "reading": reading, "rows": rows, "tables": tables, "reads": reads}


def main(dump: str, eptp: int) -> None:
    pykd.initialize()
    pykd.loadDump(dump)
    engines = (CtypesEngine.of_this_process(), PykdEngine(), PykdBytes(), PykdEntries())
    print(json.dumps({engine.name: measured(engine, eptp) for engine in engines}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2], 0))
    os._exit(0)
