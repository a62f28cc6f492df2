"""A report in the debugger markup language of WinDbg: the same visible text, with colours and with links that run the next command.

Tags: "Customizing Debugger Output Using DML" of the Windows debugger documentation (read November 2026).
"""

from __future__ import annotations

import re
from typing import Dict, Iterator, List, Mapping, Tuple

from vtdbg.render.text import DEFAULT_WIDTH, TextRenderer
from vtdbg.report import Report, Value

DEFAULT_PREFIX = "vt"
"""The alias under which a debugger session runs vtdbg."""

CHUNK = 16000
"""dbgeng keeps 16,383 characters of one output call and loses the rest without a word (measured, 10.0.15063.400)."""

_OPEN: Mapping[str, str] = {
    "dim": '<col fg="subfg">', "good": '<col fg="emphfg">', "bad": '<col fg="errfg">', "warn": '<col fg="warnfg">', "strong": "<b>",
}
_CLOSE: Mapping[str, str] = {"dim": "</col>", "good": "</col>", "bad": "</col>", "warn": "</col>", "strong": "</b>"}

# While the table is laid out a mark is an SGR sequence with a number of its own: tabulate knows that those take no room.
_MARKED = re.compile(r"\x1b\[1;(\d+)m(.*?)\x1b\[0m")
# What must not be cut in two: a link or a styled piece with its text, a tag, an entity.
_PIECE = re.compile(r'<exec [^>]*>[^<]*</exec>|<[^>]*>|&[a-z]+;|.', re.DOTALL)


def escape(words: str) -> str:
    """Text that DML shows as it is.  Quotes matter inside attributes only, and are escaped everywhere."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


class DmlRenderer(TextRenderer):
    """Text whose styled cells are coloured and whose linked cells run `prefix`, the link and `suffix` when they are clicked."""

    def __init__(self, width: int = DEFAULT_WIDTH, prefix: str = DEFAULT_PREFIX, suffix: str = "") -> None:
        super().__init__(width)
        self._prefix, self._suffix = prefix, suffix
        self._tags: Dict[Tuple[str, str], int] = {}
        self._by_number: List[Tuple[str, str]] = []

    def mark(self, words: str, value: Value) -> str:
        if not words or not (value.link or value.style in _OPEN):
            return words
        key = value.style, value.link
        if key not in self._tags:
            self._tags[key] = len(self._by_number)
            self._by_number.append(key)
        return f"\x1b[1;{self._tags[key]}m{words}\x1b[0m"

    def render(self, report: Report) -> str:
        """ASCII DML that ends with a newline."""
        marked = super().render(report)
        pieces, at = [], 0
        for found in _MARKED.finditer(marked):
            pieces += [escape(marked[at:found.start()]), self._tagged(found.group(2), *self._by_number[int(found.group(1))])]
            at = found.end()
        return ascii_only("".join([*pieces, escape(marked[at:])]))

    def _tagged(self, words: str, style: str, link: str) -> str:
        inner = escape(words)
        if link:
            command = escape(f"{self._prefix} {link} {self._suffix}".rstrip())
            inner = f'<exec cmd="{command}">{inner}</exec>'
        return _OPEN.get(style, "") + inner + _CLOSE.get(style, "")


def render_dml(report: Report, width: int = DEFAULT_WIDTH, prefix: str = DEFAULT_PREFIX, suffix: str = "") -> str:
    """The report as DML; what it shows is what `render_text` of the same width prints.  A click runs `prefix`, a command and `suffix`."""
    return DmlRenderer(width, prefix, suffix).render(report)


def ascii_only(words: str) -> str:
    """The console behind a debugger may not encode more: other characters become "?"."""
    return words.encode("ascii", "replace").decode("ascii")


def chunks(words: str, limit: int = CHUNK, dml: bool = False) -> Iterator[str]:
    """The text in pieces of at most `limit` characters, cut at line ends; a longer line is cut anywhere, but never inside a tag or entity."""
    piece = ""
    for line in words.splitlines(keepends=True):
        if len(piece) + len(line) <= limit:
            piece += line
            continue
        if piece:
            yield piece
        piece = ""
        for part in _PIECE.findall(line) if dml else line:
            if len(piece) + len(part) > limit and piece:
                yield piece
                piece = ""
            piece += part
    if piece:
        yield piece
