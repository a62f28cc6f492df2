"""Runs in Windows' Python: opens a target, then runs command lines through the plugin with each backend.

session.py TARGET FILE: TARGET is a dump or kd:OPTIONS.  FILE holds one JSON object a line: {"backend", "words", optional "interrupt", "state"}.
"interrupt": 0 for a Ctrl-Break before the command, [METHOD, N] for one in the Nth call of that method of the engine.  "state": "go" where the
target was told to run and nobody waits for it, "running" where it does run, until it is broken into after the command; "began": the file that is
there once it does.
Prints one JSON object a line: {"status", "text"} of each, then the selected processor and all registers.  Opening is pykd's: both backends
then look at the same session of the engine, as they do inside WinDbg.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
import traceback
from typing import Any, Callable, Dict, List

import pykd
from vtdbg_windbg.app import execute
from vtdbg_windbg.ctypes_engine import CtypesEngine
from vtdbg_windbg.engine import Engine
from vtdbg_windbg.port import DbgEngPort
from vtdbg_windbg.pykd_engine import PykdEngine
from vtdbg_windbg.target import machine_of

STATUS_GO, INTERRUPT_ACTIVE, INTERRUPT_PASSIVE, INFINITE = 1, 0, 1, 0xFFFFFFFF


def control(engine: Engine, place: int, *types: Any) -> Callable[..., int]:
    """A method of IDebugControl."""
    method: Callable[..., int] = engine.control.method(place, f"method {place}", *types)  # type: ignore[attr-defined]
    return method


def interrupt(engine: Engine, kind: int = INTERRUPT_PASSIVE) -> None:
    """IDebugControl::SetInterrupt: what Ctrl-Break does."""
    control(engine, 4, ctypes.c_uint32)(kind)


def at_call(engine: Engine, method: str, number: int, press: Callable[[], None]) -> None:
    """The Ctrl-Break comes in the Nth call from now: before memory is read, after all else; one during a step is lost in it."""
    real, left = getattr(engine, method), [number]

    def counted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0] and method.startswith("read_"):
            press()
        result = real(*arguments, **options)
        if not left[0] and not method.startswith("read_"):
            press()
        return result

    setattr(engine, method, counted)


def go(engine: Engine) -> None:
    """IDebugControl::SetExecutionStatus: what `g` does; the target runs when somebody waits for it."""
    if not engine.debuggee().running:
        control(engine, 50, ctypes.c_uint32)(STATUS_GO)


def while_running(engine: Engine, run: Callable[[Engine], int], write: Callable[..., None], began: str) -> int:
    """`run` in another thread, with an engine of its own, while this one waits for the running target; then the break-in."""
    go(engine)
    statuses: List[int] = []

    def other() -> None:
        mine = CtypesEngine.of_this_process()
        mine.write = write  # type: ignore[method-assign]
        # The machine is told to run when the wait has begun.
        while not os.path.exists(began):
            time.sleep(0.01)
        try:
            statuses.append(run(mine))
        finally:
            interrupt(mine, INTERRUPT_ACTIVE)

    thread = threading.Thread(target=other)
    thread.start()
    control(engine, 93, ctypes.c_uint32, ctypes.c_uint32)(0, INFINITE)
    thread.join()
    return statuses[0]


def main(target: str, path: str) -> None:
    pykd.initialize()
    if target.startswith("kd:"):
        pykd.attachKernel(target[3:])
    else:
        pykd.loadDump(target)
    engines: Dict[str, Engine] = {"ctypes": CtypesEngine.of_this_process(), "pykd": PykdEngine()}
    written: List[str] = []

    def write(words: str, dml: bool = False) -> None:
        written.append(words)

    for engine in engines.values():
        engine.write = write  # type: ignore[method-assign]
    with open(path, encoding="ascii") as file:
        requests: List[Dict[str, Any]] = [json.loads(line) for line in file]
    for request in requests:
        engine, words = engines[request["backend"]], request["words"]
        if request.get("interrupt") == 0:
            interrupt(engines["ctypes"])
        elif request.get("interrupt"):
            at_call(engine, *request["interrupt"], lambda: interrupt(engines["ctypes"]))
        if request.get("state") == "running":
            status = while_running(engine, lambda mine: execute(mine, words, dml=False), write, request["began"])  # noqa: B023
        else:
            if request.get("state") == "go":
                go(engines["ctypes"])
            status = execute(engine, words, dml=False)
        print(json.dumps({"status": status, "text": "".join(written), "longest": max(map(len, written), default=0)}), flush=True)
        written.clear()
    ends: Dict[str, Any] = {name: [engine.processor(), engine.register("rip")] for name, engine in engines.items()}
    ends["registers"] = {name: [dict(cpu.registers) for cpu in machine_of(DbgEngPort(engine)).cpus] for name, engine in engines.items()}
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except Exception:  # noqa: BLE001 - whatever it is, the process has to end
        traceback.print_exc()
    # The engine does not always unload cleanly.
    sys.stdout.flush()
    os._exit(0)
