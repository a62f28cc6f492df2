"""Runs in Windows' Python: opens a target, then runs command lines through the plugin with each backend.

session.py TARGET FILE: TARGET is a dump or kd:OPTIONS.  FILE holds one JSON object a line: {"backend", "words", optional "interrupt", "dml"}.
Prints one JSON object a line: {"status", "text"} of each, then what `facts` says of the session.  Opening is pykd's: both backends then look at the
same session of the engine, as they do inside WinDbg.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Dict, List

import pykd
from vtdbg_windbg.app import execute
from vtdbg_windbg.ctypes_engine import CtypesEngine
from vtdbg_windbg.engine import Engine
from vtdbg_windbg.pykd_engine import PykdEngine


def main(target: str, path: str) -> None:
    pykd.initialize()
    if target.startswith("kd:"):
        pykd.attachKernel(target[3:])
    else:
        pykd.loadDump(target)
    engines: Dict[str, Engine] = {"ctypes": CtypesEngine.of_this_process(), "pykd": PykdEngine()}
    written: List[str] = []
    for engine in engines.values():
        engine.write = lambda words, dml=False: written.append(words)  # type: ignore[method-assign]
    with open(path, encoding="ascii") as file:
        requests: List[Dict[str, Any]] = [json.loads(line) for line in file]
    for request in requests:
        engine = engines[request["backend"]]
        if request.get("interrupt"):
            # IDebugControl::SetInterrupt: what Ctrl-Break does.
            import ctypes

            engines["ctypes"].control.method(4, "SetInterrupt", ctypes.c_uint32)(1)  # type: ignore[attr-defined]
        status = execute(engine, request["words"], bool(request.get("dml")))
        print(json.dumps({"status": status, "text": "".join(written), "longest": max(map(len, written), default=0)}), flush=True)
        written.clear()
    print(json.dumps({name: [engine.processor(), engine.register("rip")] for name, engine in engines.items()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
    # The engine does not always unload cleanly.
    sys.stdout.flush()
    import os

    os._exit(0)
