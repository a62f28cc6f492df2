"""Commands, completion, convenience functions and events of GDB for vtdbg; no decoding is done here."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence

import gdb

from vtdbg.commands import registry
from vtdbg.errors import VtdbgError
from vtdbg.targets.interrupts import deliver

if TYPE_CHECKING:
    from vtdbg.commands.run import Outcome
    from vtdbg_gdb.session import GdbSession

SOURCE_OPTIONS = ("-s", "--source")
INTERRUPTED = "vt: interrupted; the target is as it was"


class Front:
    """What all commands of one GDB share."""

    def __init__(self) -> None:
        self._session: "Optional[GdbSession]" = None

    @property
    def session(self) -> "GdbSession":
        """Made for the first command: sourcing the plugin has to be cheap."""
        if self._session is None:
            from vtdbg_gdb.session import GdbSession

            self._session = GdbSession()
        return self._session

    def forget(self) -> None:
        """The target ran, or the user wrote to it."""
        if self._session is not None:
            self._session.forget()

    @property
    def lost(self) -> bool:
        """Was a connection lost while there was something to put back?"""
        return self._session is not None and self._session.lost

    def reconnected(self) -> None:
        """A thread has appeared: GDB is connected, to something."""
        if self._session is None:
            return
        try:
            self._session.reconnected()
        except VtdbgError as error:
            self._session.said = str(error)
        self._say()

    def _say(self) -> None:
        if self._session is not None and self._session.said:
            gdb.write(f"! {self._session.said}\n")
            self._session.said = None

    def run(self, words: Sequence[str]) -> None:
        try:
            outcome = self._outcome(words)
            gdb.set_convenience_variable("vt_status", outcome.status)
            if not outcome.error:
                gdb.write(outcome.text)
        except VtdbgError as error:
            raise gdb.GdbError(f"vt: {error}".replace("\n", " ")) from None
        if outcome.error:
            raise gdb.GdbError(outcome.error)

    def _outcome(self, words: Sequence[str]) -> "Outcome":
        from vtdbg.commands.run import run_words
        from vtdbg.commands.session import Session

        try:
            if any(word in SOURCE_OPTIONS or word.startswith("--source=") for word in words):
                other = Session(program="vt", evaluate=self.session.evaluate)
                outcome = run_words(words, other, _render)
                other.close()
                return outcome
            with self.session.command():
                return run_words(words, self.session, _render)
        finally:
            self._say()

    def complete(self, words: Sequence[str], prefix: str) -> List[str]:
        sources: Dict[str, Callable[[], Sequence[str]]] = {"field": lambda: _field_names(words[0]), "register": _register_names,
                                                           "address": self._selectors}
        return registry.complete(words, prefix, sources)

    def _selectors(self) -> Sequence[str]:
        """vcpu:ID, cpu:N, ... of a target that is stopped."""
        from vtdbg.commands.selector import selectors

        session = self.session
        if not session.has_machine:
            return ()
        with session.command():
            return selectors(session.machine)


def _field_names(group: str) -> Sequence[str]:
    if group == "vmcb":
        from vtdbg.svm import fields as svm_fields

        return [row.name for row in svm_fields.fields().values()]
    from vtdbg.vmx import fields as vmx_fields

    return [row.name for row in vmx_fields.fields().values()]


def _register_names() -> Sequence[str]:
    from vtdbg import bits

    return sorted(bits.tables())


def _render(report: Any, options: Dict[str, Any]) -> str:
    from vtdbg.render.text import render_text, wants_colour

    choice = options.get("color") or "auto"
    styled = bool(gdb.parameter("style enabled")) and wants_colour(sys.__stdout__)
    return render_text(report, options.get("width") or gdb.parameter("width") or 80, styled if choice == "auto" else choice == "always")


def _one_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Ctrl-C in the function is our line, also one that comes too late for the command and in time for what it has to say: GDB shows "Quit"."""
    def invoke(*arguments: Any) -> Any:
        # Made before, and nothing is called between here and GDB: Python looks for a Ctrl-C at calls, and one can come twice, out of a command of
        # GDB's and out of its Python.
        said = gdb.GdbError(INTERRUPTED)
        try:
            return function(*arguments)
        except KeyboardInterrupt:
            try:    # noqa: SIM105 - to make a `suppress` would be a call
                deliver()
            except KeyboardInterrupt:
                pass
            raise said from None

    return invoke


class VtCommand(gdb.Command):
    """One word of GDB: `vt`, a group, or a verb.  `words` are the words of the command line that it stands for."""

    def __init__(self, front: Front, name: str, words: Sequence[str], help: str, prefix: bool = False) -> None:
        self._front, self._words = front, list(words)
        self.__doc__ = help
        # A prefix command answers `help` and TAB with its subcommands, and is called where none of them is meant.
        super().__init__(name, gdb.COMMAND_DATA, prefix=prefix)

    @_one_line
    def invoke(self, argument: str, from_tty: bool) -> None:
        self.dont_repeat()
        try:
            words = shlex.split(argument)
        except ValueError as error:
            raise gdb.GdbError(f"vt: {error} in {argument!r}") from None
        self._front.run([*self._words, *words])

    def complete(self, text: str, word: Optional[str]) -> Any:
        typed = text.split()
        last = typed.pop() if text and not text[-1].isspace() and typed else ""
        try:
            found = self._front.complete([*self._words, *typed], last)
        except (VtdbgError, KeyboardInterrupt):
            return []
        # GDB replaces only what it takes for the word, which ends at "-" and ".".
        skipped = len(last) - len(word or "") if last.endswith(word or "") else 0
        return [item[skipped:] for item in found]


ABOUT = """vtdbg: VMCS, VMCB, EPT, NPT, exits and descriptors of the target.

Every group of commands is below `vt`, and under its own name where GDB has no
command of that name (`exit` and `source` are GDB's).  `help vt vmcs dump`
explains one.  Numbers can be expressions of GDB ($rax, a symbol); put quotes
around one with spaces."""
EXPRESSIONS = "Numbers can be expressions of GDB ($rax, a symbol); put quotes around\none with spaces."


def _verb_help() -> Dict[str, str]:
    """The help of every verb by its name: out of a file, since asking the verbs would import them all."""
    import json

    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "help.json"), encoding="ascii") as file:
        found: Dict[str, str] = json.load(file)
    return found


def _register_group(front: Front, start: str, group: str, verbs: Dict[str, str]) -> None:
    """`start` is "" or "vt ": the group and its verbs under it."""
    alone = verbs.get(group)
    below = {name: help for name, help in verbs.items() if name.startswith(group + " ")}
    summary = registry.GROUPS[group]
    example = start + next(iter(below), group)
    about = alone or (f"{summary[:1].upper()}{summary[1:]}.\n\n"
                      f"`{start}{group}` alone lists what there is, `help {example}` explains one.\n{EXPRESSIONS}")
    VtCommand(front, start + group, [group], about, prefix=bool(below))
    for name, help in below.items():
        VtCommand(front, start + name, name.split(), help)


class Function(gdb.Function):
    """A convenience function: its errors are GDB errors, so that a breakpoint's condition fails loudly."""

    def __init__(self, front: Front, name: str, what: Callable[..., int], help: str) -> None:
        self._front, self._what = front, what
        self.__doc__ = help
        super().__init__(name)

    @_one_line
    def invoke(self, *arguments: Any) -> int:
        plain = [item.string() if item.type.strip_typedefs().code in (gdb.TYPE_CODE_ARRAY, gdb.TYPE_CODE_PTR) and _is_text(item)
                 else int(item) & (1 << 64) - 1 for item in arguments]
        try:
            session = self._front.session
            if session.port.in_condition:
                # GDB tells nobody when it goes on because a condition does not hold.
                session.forget()
            with session.command():
                return self._what(session, *plain)
        except VtdbgError as error:
            raise gdb.GdbError(f"vt: {error}".replace("\n", " ")) from None
        except TypeError as error:
            raise gdb.GdbError(f"vt: wrong arguments: {error}") from None


def _is_text(value: gdb.Value) -> bool:
    target = value.type.strip_typedefs().target().strip_typedefs()
    return target.code in (gdb.TYPE_CODE_INT, gdb.TYPE_CODE_CHAR) and target.sizeof == 1


def _lazily(name: str) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        from vtdbg.commands import values

        return int(getattr(values, name)(*arguments))

    return call


FUNCTIONS = (
    ("vmcs", "vmcs_field", 'A field of the VMCS: $vmcs("GUEST_RIP"), or of the one at an address: $vmcs("GUEST_RIP", 0x6826000).'),
    ("vmcb", "vmcb_field", 'A field of the VMCB: $vmcb("rip"), or of the one at an address: $vmcb("rip", $rax).'),
    ("gpa", "gpa_of", "$gpa(GVA): the guest-physical address of a guest's linear address."),
    ("hpa", "hpa_of", "$hpa(GPA): the host-physical address of a guest-physical address, through EPT or NPT."),
    ("exit_reason", "exit_reason", "$exit_reason(): the basic exit reason of the VMCS, or EXITCODE of the VMCB."),
)


def _defined(word: str) -> bool:
    """Does GDB have a command of this name (`exit`, `source`)?"""
    try:
        gdb.execute(f"help {word}", to_string=True)
    except gdb.error:
        return False
    return True


def register() -> None:
    """Once a GDB: `vt`, the groups whose names GDB does not have, the functions, and the events that end what was read."""
    front = Front()
    # Asked before any is registered: GDB takes the beginning of a command's name for the command.
    free = [group for group in registry.GROUPS if not _defined(group)]
    verbs = _verb_help()
    VtCommand(front, "vt", [], ABOUT, prefix=True)
    for group in registry.GROUPS:
        for start in ("vt ", "") if group in free else ("vt ",):
            _register_group(front, start, group, verbs)
    for name, function, help in FUNCTIONS:
        Function(front, name, _lazily(function), help)
    for name in ("stop", "cont", "exited", "memory_changed", "register_changed", "inferior_call", "new_objfile", "clear_objfiles"):
        event = getattr(gdb.events, name, None)
        if event is not None:
            event.connect(lambda *_: front.forget())
    appeared = getattr(gdb.events, "new_thread", None)
    if appeared is not None:
        # Not at once: GDB is in the middle of connecting.  And not for nothing: GDB 13 crashes at its end when such an event still waits (-batch).
        appeared.connect(lambda *_: gdb.post_event(front.reconnected) if front.lost else None)
