"""What GDB's own `help` shows of a verb.

GDB takes a command's help when the command is registered, and sourcing the plugin must not import every verb: so the texts are kept in a file
beside the plugin, which tests/test_gdb_help.py compares with the declarations (VTDBG_UPDATE_GOLDEN=1 writes it).
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Dict, List, Tuple

from vtdbg.commands import registry
from vtdbg.commands.registry import Arg, Opt, Verb

WIDTH = 79


def help_texts() -> Dict[str, str]:
    """The help of every verb by its name ("vmcs dump"); imports all of them."""
    return {found.name: help_text(found) for found in registry.all_verbs()}


def help_text(found: Verb) -> str:
    """The summary on the first line (GDB lists commands with it), how it is written, what it does, its arguments and options."""
    summary = found.summary[:1].upper() + found.summary[1:]
    lines = [f"{summary}.", "", *_usage(found)]
    if found.description:
        lines += ["", *(line for part in inspect.cleandoc(found.description).split("\n\n") for line in [*textwrap.wrap(part, WIDTH), ""])][:-1]
    for title, rows in (("Arguments:", [(_name(item), item.help) for item in found.arguments]),
                        ("Options:", [(_flag(item), item.help) for item in found.options])):
        if rows:
            lines += ["", title, *_rows(rows)]
    lines += ["", f"`vt {found.name} --help` has the options of every command (--json, --width, ...) too."]
    return "\n".join(lines)


def _usage(found: Verb) -> List[str]:
    return _joined(["vt", found.name, *(_written(item) for item in found.arguments), *(f"[{_flag(item)}]" for item in found.options)])


def _joined(words: List[str]) -> List[str]:
    """In lines, none broken inside of an option and its value."""
    lines = ["Usage:"]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("      ")
        lines[-1] += f" {word}"
    return lines


def _name(item: Arg) -> str:
    return item.name.upper()


def _written(item: Arg) -> str:
    name = "|".join(item.choices) if item.choices else _name(item)
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [...]"}.get(item.nargs, name)


def _flag(item: Opt) -> str:
    if item.kind == "flag":
        return item.flag
    return f"{item.flag} {'|'.join(item.choices) if item.choices else item.metavar or item.kind.upper()}"


def _rows(rows: List[Tuple[str, str]]) -> List[str]:
    width = min(max(len(name) for name, _ in rows), 24)
    lines: List[str] = []
    for name, text in rows:
        pieces = textwrap.wrap(text, WIDTH - width - 4) or [""]
        if len(name) > width:
            lines.append(f"  {name}")
            name = ""
        lines += [f"  {name if not number else '':<{width}}  {piece}".rstrip() for number, piece in enumerate(pieces)]
    return lines
