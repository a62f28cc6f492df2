"""The front end: words of the user in, a report in the debugger's command window out."""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

from vtdbg.commands.registry import COMMON_OPTIONS
from vtdbg.commands.run import run_words
from vtdbg.commands.session import SOURCE_VARIABLE, Session
from vtdbg.errors import UsageError, VtdbgError
from vtdbg.machine import Machine
from vtdbg.render.dml import ascii_only, chunks, render_dml
from vtdbg.render.text import DEFAULT_WIDTH, render_text
from vtdbg.report import BAD_INPUT, Report
from vtdbg_windbg.engine import INTERRUPTED, Engine, Interrupted
from vtdbg_windbg.port import DbgEngPort
from vtdbg_windbg.target import machine_of

OWN_OPTIONS = ("--backend", "-z", "--remote", "--prefix")
BACKENDS = ("ctypes", "pykd")
CARRIED = ("--source", "--format", "--layout", "--caps")


class DebuggerSession(Session):
    """A Session whose memory is the debugger's, unless the user names another source."""

    engine: Engine

    @property
    def machine(self) -> Machine:
        if self._machine is None and not self.source:
            self._machine = machine_of(DbgEngPort(self.engine))
        return super().machine

    @property
    def has_machine(self) -> bool:
        return True

    def configure(self, options: Dict[str, Any]) -> None:
        # The session is the source here, not a dump that the environment names.
        variable = os.environ.pop(SOURCE_VARIABLE, None)
        try:
            super().configure(options)
        finally:
            if variable is not None:
                os.environ[SOURCE_VARIABLE] = variable


def split_options(words: Sequence[str]) -> Tuple[Dict[str, str], List[str]]:
    """The front end's own options, which stand before the command, and the command."""
    own: Dict[str, str] = {}
    rest = list(words)
    while rest and rest[0] in OWN_OPTIONS + ("--plain",):
        name = rest.pop(0)
        if name != "--plain" and not rest:
            raise UsageError(f"{name} needs a value")
        own[name] = "" if name == "--plain" else rest.pop(0)
    if own.get("--backend", BACKENDS[0]) not in BACKENDS:
        raise UsageError(f"--backend {own['--backend']}: one of {', '.join(BACKENDS)}")
    return own, rest


def make_engine(own: Dict[str, str]) -> Engine:
    """The engine that the options ask for: ctypes, which is ten times as fast, unless they say otherwise."""
    from vtdbg_windbg.ctypes_engine import CtypesEngine

    if "-z" in own:
        return CtypesEngine.open_dump(own["-z"])
    if "--remote" in own:
        return CtypesEngine.connect(own["--remote"])
    if own.get("--backend") == "pykd":
        from vtdbg_windbg.pykd_engine import PykdEngine

        return PykdEngine()
    return CtypesEngine.of_this_process()


def carried(options: Dict[str, Any]) -> str:
    """The options of a command that its links need too: without them a click would look at another source, or read pages by another layout."""
    given = [(option.flag, options.get(option.dest)) for option in COMMON_OPTIONS if option.flag in CARRIED]
    return " ".join(f'{flag} "{value}"' if " " in str(value) else f"{flag} {value}" for flag, value in given if value)


def execute(engine: Engine, words: Sequence[str], dml: bool, prefix: str = "vt") -> int:
    """Runs one command in the engine's session; the return value is the exit status.  Every refusal is one line."""
    session = DebuggerSession(program=prefix, evaluate=engine.evaluate)
    session.engine = engine

    def render(report: Report, options: Dict[str, Any]) -> str:
        width = options.get("width") or DEFAULT_WIDTH
        return render_dml(report, width, prefix, carried(options)) if dml else render_text(report, width)

    try:
        outcome = run_words(words, session, render)
    finally:
        session.close()
    plain = not dml or outcome.report is None or any(word in ("--json", "--python") for word in words)
    if outcome.error:
        engine.write(ascii_only(outcome.error) + "\n")
    for number, piece in enumerate(chunks(ascii_only(outcome.text), dml=not plain)):
        if number and engine.interrupted():
            raise Interrupted(INTERRUPTED)
        engine.write(piece, dml=not plain)
    # A Ctrl-Break that came too late for this command is not the next one's.
    engine.interrupted()
    return outcome.status


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command line; `arguments` do not include the program."""
    try:
        own, words = split_options(sys.argv[1:] if arguments is None else arguments)
        engine = make_engine(own)
        return execute(engine, words, "--plain" not in own and engine.prefers_dml(), own.get("--prefix", "vt"))
    except VtdbgError as error:
        print(f"vt: {error}")
        return BAD_INPUT
    except (KeyboardInterrupt, SystemExit):
        # pykd ends a script on Ctrl-Break by SystemExit.
        print(f"vt: {INTERRUPTED}")
        return BAD_INPUT
