"""What commands share: the source, the layout and the capabilities that the user named, and the machine behind them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from vtdbg.errors import NoMemory, UsageError
from vtdbg.machine import Machine
from vtdbg.numbers import parse_number

if TYPE_CHECKING:
    from vtdbg.vmx.capabilities import VmxCapabilities
    from vtdbg.vmx.layouts import Layout

SOURCE_VARIABLE = "VTDBG_SOURCE"
OWN_GDB = "--symbols and --thread are for a gdb of our own (-s gdb:HOST:PORT); in GDB: `add-symbol-file FILE`, `thread N`"


class Expression(str):
    """An address that is no number, until it is known whether there is a debugger that understands it."""

    __slots__ = ()


@dataclass
class Session:
    """One user at one source.  A front end makes it once: the CLI for a command, a shell or a debugger for its life.

    `machine` is opened when a command first needs it; a debugger front end passes its own.  `evaluate` turns an expression that
    is not a plain number into one (GDB and WinDbg have their own expressions).
    """

    source: Optional[str] = None
    format: Optional[str] = None
    layout_name: Optional[str] = None
    caps_name: Optional[str] = None
    evaluate: Optional[Callable[[str], int]] = None
    program: str = "vtdbg"
    inside: Tuple[int, ...] = ()
    """Control blocks whose guests the command looks into, the outermost first: each address is physical in the guest before it."""
    scan: str = ""
    """What searches read: empty for all, unless that takes long; "all"; or a part of the memory ("0x0-0x10000000")."""
    host_paging: Optional[str] = None
    """The host's paging mode at VMRUN, which is the format of its nested page tables, where the user says it."""
    symbols: Tuple[str, ...] = ()
    thread: Optional[int] = None
    """Of a gdb of our own: files of symbols for it, and the processor that is looked from."""
    fast: bool = True
    """A live target's RAM is read directly where that is possible."""
    progress: Optional[Callable[[str], None]] = None
    _machine: Optional[Machine] = None
    _cache: Dict[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        """The dump or target, or the guest in it that --inside names; UsageError where the user named none."""
        machine = self._outermost
        for depth in range(len(self.inside)):
            machine = self._guest(machine, self.inside[:depth + 1])
        return machine

    def _guest(self, outer: Machine, path: Tuple[int, ...]) -> Machine:
        from vtdbg.targets.guest import guest_machine

        key = f"guest {path} {self.layout_name} {self.caps_name} {self.host_paging}"
        if key not in self._cache:
            outer.consider("vmcs", path[-1])
            self._cache[key] = guest_machine(outer, path[-1], self.layout, self.caps, self.host_paging)
        guest: Machine = self._cache[key]
        return guest

    @property
    def _outermost(self) -> Machine:
        if self._machine is None:
            if not self.source:
                raise NoMemory(f"no memory to look at: name a dump with -s FILE (or set {SOURCE_VARIABLE})")
            if self.source.startswith("gdb:"):
                from vtdbg.targets import connect

                self._machine = connect(self.source, self.fast, self.symbols, self.thread)
            elif self.source.startswith("sample:"):
                from vtdbg.samples import open_sample

                self._machine = open_sample(self.source[len("sample:") :])
            else:
                from vtdbg.memory.open import open_machine

                self._machine = open_machine(self.source, self.format)
        return self._machine

    @property
    def has_machine(self) -> bool:
        return self._machine is not None or bool(self.source)

    def close(self) -> None:
        """Lets go of the dump or the connection."""
        machine, self._machine = self._machine, None
        close = getattr(machine.memory, "close", None) if machine is not None else None
        if close is not None:
            close()

    def configure(self, options: Dict[str, Any]) -> None:
        """Takes the common options of one command line; a new source closes the old one."""
        source = options.get("source") or self.source or os.environ.get(SOURCE_VARIABLE)
        form = options.get("format") or self.format
        if (source, form) != (self.source, self.format) and self._machine is not None:
            self.close()
        if (source, form) != (self.source, self.format):
            self._cache.clear()
        self.source, self.format = source, form
        self.fast = not options.get("no_fast")
        self._look_from(tuple(options.get("symbols") or ()), options.get("thread"))
        self.scan = options.get("scan") or ""
        self.host_paging = options.get("host_paging") or self.host_paging
        self.inside = ()
        self.inside = tuple(self.resolved(item) for item in options.get("inside") or ())
        self.layout_name = options.get("layout") or self.layout_name
        self.caps_name = options.get("caps") or self.caps_name

    def _look_from(self, symbols: Tuple[str, ...], thread: Optional[int]) -> None:
        if (symbols or thread is not None) and not (self.source or "").startswith("gdb:"):
            raise UsageError(OWN_GDB)
        self.symbols, self.thread = symbols or self.symbols, thread if thread is not None else self.thread
        prepare = getattr(self._machine, "look_from", None)
        if prepare is not None and (symbols or thread is not None):
            prepare(symbols, thread)

    def convert(self, kind: str, text: str) -> Any:
        """An argument's text as its kind: addresses and numbers through `evaluate` where they are expressions."""
        if kind not in ("address", "int"):
            return text
        if kind == "address" and text[:4].lower() in ("vcpu", "cpu:"):
            from vtdbg.commands.selector import Selector, is_selector

            if is_selector(text):
                return Selector(text)
        try:
            return parse_number(text)
        except UsageError:
            if self.evaluate is not None:
                return self.evaluate(text)
            if kind == "address":
                return Expression(text)
            raise

    def resolved(self, value: Any) -> Any:
        """An argument whose text was a selector or an expression, now that the target is known; anything else as it is."""
        if isinstance(value, list):
            return [self.resolved(item) for item in value]
        if isinstance(value, Expression):
            return self._evaluated(value)
        if type(value).__name__ != "Selector":
            return value
        from vtdbg.commands.selector import address_of

        return address_of(self.machine, value)

    def _evaluated(self, text: str) -> int:
        """By the gdb of our own; without one only numbers are addresses."""
        if not (self.source or "").startswith("gdb:"):
            if text == "-" or any(mark in text for mark in (os.sep, ".", ":")) or os.path.exists(text):
                image = "" if text == "-" else f"a memory image is named with -s {text}, "
                raise UsageError(f"{text!r} is no address: {image}a log with --text {text}")
            return parse_number(text)
        from vtdbg.commands.live import live_machine

        return live_machine(self).evaluate(text)

    @property
    def layout(self) -> "Optional[Layout]":
        """The layout that the user forced, by name or file."""
        if not self.layout_name:
            return None
        return find_layout(self.layout_name)

    @property
    def caps(self) -> "Optional[VmxCapabilities]":
        """The capability MSRs that the user gave."""
        if not self.caps_name:
            return None
        from vtdbg.vmx.capabilities import VmxCapabilities

        return VmxCapabilities.load(self.caps_name)

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """A result kept until the target runs or the source changes (scans)."""
        if self.inside:
            key = f"{key} inside {self.inside}"
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def has_remembered(self, key: str) -> bool:
        """Is there a result under this key?"""
        return (f"{key} inside {self.inside}" if self.inside else key) in self._cache

    def forget(self) -> None:
        """The target ran: nothing that was read is still true."""
        self._cache.clear()
        drop = getattr(self._machine.memory, "drop", None) if self._machine is not None else None
        if drop is not None:
            drop()

    def header(self) -> str:
        """The line that says where values come from."""
        machine = self.machine
        # A live target finds out where its processor is, now that the command has said which control blocks there are.
        machine.refresh()
        return machine.provenance or f"{machine.name} ({machine.format})"

    def python_open(self) -> List[str]:
        """The first lines of every --python."""
        lines = ["import vtdbg"]
        if self.source and self.source.startswith("sample:"):
            lines += ["from vtdbg.samples import open_sample", f"machine = open_sample({self.source[len('sample:'):]!r})"]
        elif self.source and self.source.startswith("gdb:") and (self.symbols or self.thread is not None or not self.fast):
            given = [f"fast={self.fast}"] * (not self.fast) + [f"symbols={self.symbols!r}"] * bool(self.symbols)
            given += [] if self.thread is None else [f"thread={self.thread}"]
            lines += ["from vtdbg.targets import connect", f"machine = connect({self.source!r}, {', '.join(given)})"]
        elif self.source:
            extra = f", format={self.format!r}" if self.format else ""
            lines.append(f"machine = vtdbg.open({self.source!r}{extra})")
        if self.inside:
            lines.append("from vtdbg.targets.guest import guest_machine")
        layout = f", layout={self.layout_name!r}" if self.layout_name else ""
        return [*lines, *(f"machine = guest_machine(machine, {address:#x}{layout})" for address in self.inside)]


def given_registers(assignments: List[str]) -> Dict[str, Optional[int]]:
    """NAME=VALUE options as registers by lower-case name."""
    registers: Dict[str, Optional[int]] = {}
    for item in assignments:
        name, found, value = item.partition("=")
        if not found:
            raise UsageError(f"--reg {item!r}: write NAME=VALUE, for instance rbx=0x1000")
        registers[name.strip().lower()] = parse_number(value)
    return registers


def find_layout(name: str) -> "Layout":
    """A packaged layout by name, or a user's own by the path of its file."""
    from vtdbg.vmx import layout_file, layouts

    if name not in layouts.layouts() and (os.path.exists(name) or os.sep in name or name.endswith(".json")):
        return layout_file.load_layout(name)
    return layouts.layout(name)
