"""`windbg`: the files that carry a command line from WinDbg to vtdbg, and what to type there."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import List, Optional

from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.errors import FormatError, UsageError
from vtdbg.report import Lines, Report, Value

PACKAGES = ("vtdbg", "vtdbg_windbg", "tabulate", "capstone")
SCRIPT, COMMANDS = "vt.py", "vt.wds"
GLOBAL = "-g"
"""In pykd's main interpreter.  In one of its own, which `!py` makes without it, the exception of a Ctrl-Break never arrives, and the debugger hangs
when the script ends (measured: pykd 0.3.4.15 with CPython 3.9, whose pending calls belong to an interpreter)."""


@verb(
    "windbg",
    "write the script for WinDbg and print what to type there",
    Opt("--out", "path", "folder for the script, without blanks in its name (default: vtdbg in the home folder)", metavar="FOLDER"),
    Opt("--bootstrapper", "flag", "only what to type with pykd's bootstrapper (pykd.dll), which needs no script"),
)
def windbg(session: Session, out: Optional[str], bootstrapper: bool) -> Report:
    """With pykd's bootstrapper (pykd.dll) `!py -g -m vtdbg_windbg` works as it is.  With the bare pykd.pyd of the wheel on PyPI `!py` passes a
    script empty words: a script that reads them from the engine's aliases, and an alias that calls it, make `vt ept walk 0x1000` work."""
    report = Report("windbg", python=["# python -m vtdbg_windbg -z MEMORY.DMP vmcs list"])
    if bootstrapper:
        report.add(Lines("type", [".load pykd.dll", ".prefer_dml 1", f"aS vt !py {GLOBAL} -m vtdbg_windbg", "vt ept walk 0x1000"],
                         title="Type in WinDbg (pykd.dll beside the debugger's extensions)", verbatim=True))
        return report
    folder = os.path.abspath(out or os.path.join(os.path.expanduser("~"), "vtdbg"))
    if any(character.isspace() for character in folder):
        raise UsageError(f"{folder}: `!py` takes no file with blanks in its name; name another folder with --out")
    paths = [_written(folder, SCRIPT, _script()), _written(folder, COMMANDS, f"!py {GLOBAL} {os.path.join(folder, SCRIPT)}\n")]
    report.add(Lines("written", paths, title="Written", verbatim=True))
    report.add(Lines("type", [f".load {_pykd()}", ".prefer_dml 1", f"aS vt $$>a<{paths[1]}", "vt ept walk 0x1000"],
                     title="Type in WinDbg, each line by itself", verbatim=True))
    if sys.version_info >= (3, 10) or not _folder_of("pykd"):
        words = (f"this Python {sys.version_info[0]}.{sys.version_info[1]} has no pykd, and PyPI has it up to CPython 3.9: run `vtdbg windbg` with a "
                 "Python that has it, or leave pykd out: `.server tcp:port=5005` in WinDbg, then in a terminal "
                 "`python -m vtdbg_windbg --remote tcp:server=localhost,port=5005 ept walk 0x1000`")
        report.add(Lines("without_pykd", [Value(words, words, "warn")], bullet="! "))
    return report


def _script() -> str:
    """The program that `!py` runs; it knows where the packages are, because the debugger's Python may not."""
    folders: List[str] = []
    for name in PACKAGES:
        folder = _folder_of(name)
        if folder and folder not in folders:
            folders.append(folder)
    return "\n".join([
        '"""Written by `vtdbg windbg`: carries the words of the alias vt to vtdbg."""',
        "import sys",
        f"sys.path[:0] = [folder for folder in {folders!r} if folder not in sys.path]",
        "from vtdbg_windbg.alias import run",
        "run()",
        "",
    ])


def _folder_of(name: str) -> str:
    """The folder that has to be on sys.path for `import name`; empty where it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None and name == "vtdbg_windbg":
        # A checkout: the plugin lies beside the package.
        beside = os.path.join(os.path.dirname(_folder_of("vtdbg") + os.sep), "windbg_plugin")
        return beside if os.path.isdir(beside) else ""
    if found is None or not found.origin:
        return ""
    module = os.path.abspath(found.origin)
    return os.path.dirname(os.path.dirname(module) if os.path.basename(module) == "__init__.py" else module)


def _pykd() -> str:
    """pykd.pyd of this Python, or where it would be."""
    folder = _folder_of("pykd")
    return os.path.join(folder, "pykd", "pykd.pyd") if folder else os.path.join("FOLDER", "pykd", "pykd.pyd")


def _written(folder: str, name: str, content: str) -> str:
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise FormatError(path, f"cannot be written: {error.strerror or error}") from error
    return path
