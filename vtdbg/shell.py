"""`vtdbg shell`: the same commands at a prompt, with one source kept open, history, and completion of verbs, options, fields and addresses seen.

Without a terminal it runs the lines of its standard input, so that commands can be piped in.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
from typing import IO, Any, Callable, Dict, List, Optional, Sequence

from vtdbg.commands import registry
from vtdbg.commands.run import Render, run_words
from vtdbg.commands.session import Session
from vtdbg.errors import VtdbgError
from vtdbg.report import BAD_INPUT, FINE, Report

PROMPT = "vtdbg> "
HISTORY_VARIABLE = "VTDBG_HISTORY"
HISTORY_LENGTH = 1000
ADDRESSES_KEPT = 4096
LEAVE = ("exit", "quit")
HELP = """\
In the shell: `source FILE` (or gdb:HOST:PORT) changes what is looked at, as -s
does with any command; `help [GROUP [VERB]]`; `exit` or Ctrl-D leaves.  Tab
completes verbs, options, fields, files and the addresses that were printed.
"""
_PER_COMMAND = ("--json", "--python", "--scan", "--no-fast")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{3,16}\b")


class Shell:
    """One session at a prompt.  `run` takes a line and prints what comes of it; `complete` says what can stand at the cursor."""

    def __init__(self, session: Session, render: Render) -> None:
        self.session, self._render = session, render
        self._seen: Dict[str, None] = {}

    @property
    def addresses(self) -> List[str]:
        """Addresses that were printed, the latest last."""
        return list(self._seen)

    def run(self, line: str) -> Optional[int]:
        """Runs a line; its exit status, or None for a line that leaves the shell."""
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            return self._error(f"{str(error).lower()} in the line")
        if not words:
            return FINE
        if words[0] in LEAVE and len(words) == 1:
            return None
        if words[0] == "source" and len(words) == 2 and words[1] not in _verbs("source") and not words[1].startswith("-"):
            return self._switch(words[1])
        try:
            outcome = run_words(words, self.session, self._render)
        except KeyboardInterrupt:
            return self._error("interrupted")
        except VtdbgError as error:
            return self._error(str(error))
        if outcome.error:
            print(outcome.error, file=sys.stderr)
        text = outcome.text + (HELP if words == ["help"] else "")
        sys.stdout.write(text)
        sys.stdout.flush()
        self._remember(text)
        return outcome.status

    def _error(self, words: str) -> int:
        print(f"{self.session.program}: {words}".replace("\n", " "), file=sys.stderr)
        return BAD_INPUT

    def _switch(self, source: str) -> int:
        """Opens another source; the old one stays where the new one cannot be opened."""
        before, form = self.session.source, self.session.format
        try:
            self.session.close()
            self.session.forget()
            self.session.source, self.session.format = source, None
            print(self.session.header())
            return FINE
        except KeyboardInterrupt:
            problem = "interrupted"
        except VtdbgError as error:
            problem = str(error)
        self.session.source, self.session.format = before, form
        return self._error(problem)

    def _remember(self, text: str) -> None:
        for word in _ADDRESS.findall(text):
            self._seen.pop(word, None)
            self._seen[word] = None
        for word in list(self._seen)[:-ADDRESSES_KEPT]:
            del self._seen[word]

    # --- completion -----------------------------------------------------------------------------------------------------------------

    def complete(self, line: str, prefix: str) -> List[str]:
        """What can stand behind `line` (everything before the word) where `prefix` is typed."""
        try:
            words = shlex.split(line)
        except ValueError:
            return []
        if words[:1] == ["help"]:
            words = words[1:]
            return registry.complete(words, prefix) if len(words) < 2 else []
        if not words:
            return sorted({word for word in (*registry.GROUPS, "help", *LEAVE) if word.startswith(prefix)})
        if words[0] not in registry.GROUPS:
            return []
        found = self._values(words, prefix)
        if found is None:
            found = registry.complete(words, prefix, {"field": lambda: _fields(words[0]), "address": lambda: self.addresses,
                                                      "path": lambda: _paths(prefix)})
        if words == ["source"]:
            found = sorted({*found, *_paths(prefix)})
        if prefix.startswith("0x"):
            found = sorted({*found, *(word for word in self._seen if word.startswith(prefix))})
        return found

    def _values(self, words: Sequence[str], prefix: str) -> Optional[List[str]]:
        """Values of the option before the cursor; None where there is none that takes a value."""
        try:
            verb, _ = registry.find_verb(words)
        except VtdbgError:
            return None
        flag = "--source" if words[-1] == "-s" else words[-1]
        option = next((option for option in (*verb.options, *registry.COMMON_OPTIONS) if option.flag == flag and option.kind != "flag"), None)
        if option is None:
            return None
        if option.kind == "path" or flag in ("--layout", "--caps"):
            names = _layouts() if flag == "--layout" else []
            return sorted(name for name in names if name.startswith(prefix)) + _paths(prefix)
        candidates = option.choices or (self.addresses if option.kind == "address" else ())
        return sorted(word for word in candidates if word.startswith(prefix))


def _verbs(group: str) -> List[str]:
    return [found.words[1] for found in registry.verbs_of(group) if len(found.words) > 1]


def _fields(group: str) -> List[str]:
    if group == "vmcb":
        from vtdbg.svm import fields as vmcb_fields

        return [row.name for row in vmcb_fields.fields().values()]
    from vtdbg.vmx import fields as vmcs_fields

    return [row.name for row in vmcs_fields.fields().values()]


def _layouts() -> List[str]:
    from vtdbg.vmx.layouts import layouts

    return list(layouts())


def _paths(prefix: str) -> List[str]:
    found = glob.glob(glob.escape(os.path.expanduser(prefix)) + "*")
    # A name with a space has to be quoted, which a completed word cannot become.
    return sorted(path + "/" if os.path.isdir(path) else path for path in found[:1000] if " " not in path)


# --- the terminal ------------------------------------------------------------------------------------------------------------------


def run_shell(words: Sequence[str], render: Render, progress: Optional[Callable[[str], None]] = None) -> int:
    """`vtdbg shell WORDS`: the common options, then lines until the end of the input; the exit status is the worst one of piped lines."""
    parser = registry.ArgumentParser(prog="vtdbg shell", add_help=False, allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    registry.add_common_options(parser, without=_PER_COMMAND)
    session = Session(progress=progress)
    try:
        options = vars(parser.parse_args(list(words)))
    except VtdbgError as error:
        print(f"vtdbg: {error}", file=sys.stderr)
        return BAD_INPUT
    if options.pop("help"):
        sys.stdout.write(parser.format_help())
        return FINE

    def with_defaults(report: Report, given: Dict[str, Any]) -> str:
        wanted = {name: value for name, value in given.items() if value is not None and (name, value) != ("color", "auto")}
        return render(report, {**options, **wanted})

    try:
        session.configure(options)
        shell = Shell(session, with_defaults)
        interactive = sys.stdin.isatty()
        if interactive and session.source:
            print_source(session)
        return _prompt(shell) if interactive else _piped(shell, sys.stdin)
    finally:
        session.close()


def print_source(session: Session) -> None:
    """What is open, or why it is not: the shell starts either way."""
    try:
        print(session.header())
    except VtdbgError as error:
        print(f"{session.program}: {error}".replace("\n", " "), file=sys.stderr)


def _piped(shell: Shell, lines: IO[str]) -> int:
    worst = FINE
    for line in lines:
        status = shell.run(line)
        if status is None:
            break
        worst = max(worst, status)
    return worst


def _prompt(shell: Shell) -> int:
    history = _with_readline(shell)
    try:
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                print()
                return FINE
            except KeyboardInterrupt:
                print()
                continue
            if shell.run(line) is None:
                return FINE
    finally:
        history()


def history_path() -> str:
    """VTDBG_HISTORY, else the user's state folder (XDG Base Directory Specification)."""
    given = os.environ.get(HISTORY_VARIABLE)
    if given:
        return given
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "vtdbg", "history")


def _with_readline(shell: Shell) -> Callable[[], None]:
    """Editing, history and completion where Python has readline; what is returned writes the history."""
    try:
        import readline
    except ImportError:
        return lambda: None
    found: List[str] = []

    def completer(prefix: str, state: int) -> Optional[str]:
        if state == 0:
            found[:] = shell.complete(readline.get_line_buffer()[:readline.get_begidx()], prefix)
        if state >= len(found):
            return None
        # One candidate is a whole word, unless it is a folder.
        return found[state] + " " * (len(found) == 1 and not found[state].endswith("/"))

    readline.set_completer_delims(" \t\n")
    readline.set_completer(completer)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    path = history_path()
    try:
        readline.read_history_file(path)
    except OSError:
        # The first time there is none.
        readline.clear_history()
    readline.set_history_length(HISTORY_LENGTH)

    def save() -> None:
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            readline.write_history_file(path)
        except OSError:
            # A history that cannot be kept is no reason to complain.
            return

    return save


__all__ = ["HELP", "PROMPT", "Shell", "history_path", "run_shell"]
