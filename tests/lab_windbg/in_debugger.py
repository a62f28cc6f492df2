"""Run by `!py -g` in the debugger's process: Ctrl-Break at chosen moments, and what pykd's bootstrapper does with `!py -g -m`.

The bare pykd.pyd gives a script no arguments: a test writes the folders to import from, and the name of a function in sys.argv, before this text.
"""

import ctypes
import runpy
import sys
import time

import vtdbg_windbg.app as app
from vtdbg_windbg.ctypes_engine import CtypesEngine
from vtdbg_windbg.engine import Engine
from vtdbg_windbg.pykd_engine import PykdEngine


def interrupt() -> None:
    """IDebugControl::SetInterrupt of the debugger's own session: what Ctrl-Break does."""
    CtypesEngine.of_this_process().control.method(4, "SetInterrupt", ctypes.c_uint32)(1)


def broken(engine: Engine, method: str, call: int) -> Engine:
    """The engine; the user presses Ctrl-Break in the given call of `method`.

    Somebody takes it then: the plugin when it asks the engine next, or pykd, which asks four times a second, and whose SystemExit comes a little
    later.  So the plugin asks until either has happened, and by pykd's engine, which leaves interrupts to pykd, the call takes until then.
    """
    real, asked, left = getattr(engine, method), engine.interrupted, [call]

    def call_and_press(*arguments, **options):
        left[0] -= 1
        result = real(*arguments, **options)
        if not left[0]:
            interrupt()
            while isinstance(engine, PykdEngine):
                time.sleep(0.01)
        return result

    def interrupted() -> bool:
        pressed = left[0] <= 0
        while pressed and not asked():
            time.sleep(0.01)
        if pressed:
            left[0] = sys.maxsize
        return pressed

    setattr(engine, method, call_and_press)
    engine.interrupted = interrupted
    return engine


def case(title: str, engine: Engine, *words: str) -> None:
    """One command in a session whose engine is this one."""
    app.make_engine = lambda own: engine
    print(f"[{title}]")
    print(f"status {app.main(list(words))}")


def module(*words: str) -> None:
    """`!py -g -m vtdbg_windbg WORDS` as pykd's bootstrapper runs it (its sources, windbgext.cpp): a short stack, an empty argv[0], runpy."""
    sys.setrecursionlimit(500)
    sys.argv = ["", *words]
    print(f"[-m {' '.join(words)}]")
    runpy.run_module("vtdbg_windbg", run_name="__main__", alter_sys=True)


def modules() -> None:
    module("vmcs", "get", "GUEST_RIP", "--at", "0x6826000")
    module("vmcs", "get", "NOBODY")
    module("vmcs", "dump", "0x6826000")


def reading() -> None:
    case("read", broken(CtypesEngine.of_this_process(), "read_physical", 2), "vmcs", "list")


def writing() -> None:
    case("write", broken(CtypesEngine.of_this_process(), "write", 1), "exit", "reasons")


def reading_by_pykd() -> None:
    """The engine's interrupt is pykd's to take: it raises SystemExit."""
    case("read", broken(PykdEngine(), "read_physical", 2), "vmcs", "list")


globals()[sys.argv[1]]()
