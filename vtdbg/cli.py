"""The command line: `vtdbg GROUP VERB ...`."""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Optional, Sequence

from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.report import Report

GLOBAL_FLAGS = ("-s", "--source", "--format", "--layout", "--caps", "--host-paging", "--inside", "--scan", "--color", "--width")


def _render(report: Report, options: Dict[str, Any]) -> str:
    from vtdbg.render.text import render_text, terminal_width, wants_colour

    return render_text(report, options.get("width") or terminal_width(), wants_colour(sys.stdout, options.get("color") or "auto"))


def show_progress(line: str) -> None:
    """One line on the terminal that the next one replaces; empty to clear it."""
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()


def reorder(words: Sequence[str]) -> List[str]:
    """Common options may stand before the group too: `vtdbg -s DUMP vmcs list`."""
    leading: List[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help", "--version"):
        flag = rest.pop(0)
        leading.append(flag)
        if flag in GLOBAL_FLAGS and rest:
            leading.append(rest.pop(0))
    position = 2 if len(rest) > 1 and not rest[1].startswith("-") else 1
    return rest[:position] + leading + rest[position:]


def _shell(words: Sequence[str]) -> int:
    from vtdbg.shell import run_shell

    try:
        return run_shell(words, _render, show_progress if sys.stderr.isatty() else None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command; the return value is the exit status."""
    if arguments is None:
        _escape_what_cannot_be_printed()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        # Here and not further in: one that comes while a session is being closed is one line too.
        print("vtdbg: interrupted", file=sys.stderr)
        return 130


def _escape_what_cannot_be_printed() -> None:
    """The name of a file can hold what the terminal's encoding does not have, or no characters at all; Python escapes such only on stderr."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _run(arguments: Optional[Sequence[str]]) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = given if given[:1] == ["gdb"] else reorder(given)
    if words[:1] == ["--version"]:
        import vtdbg

        print(f"vtdbg {vtdbg.__version__}")
        return 0
    if words[:1] == ["gdb"]:
        from vtdbg.targets.start import start_gdb

        return start_gdb(words[1:])
    if "shell" in words[:1]:
        return _shell(words[1:])
    session = Session(progress=show_progress if sys.stderr.isatty() else None)
    try:
        outcome = run_words(words, session, _render)
        if outcome.error:
            print(outcome.error, file=sys.stderr)
        sys.stdout.write(outcome.text)
        sys.stdout.flush()
        return outcome.status
    except BrokenPipeError:
        # `vtdbg ... | head`: the reader has what it wants; Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        session.close()


if __name__ == "__main__":
    sys.exit(main())
