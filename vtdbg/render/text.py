"""A report as text: ASCII, at most `width` columns where words allow, colour only on request."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import IO, Any, List, Mapping, Optional, Sequence

from vtdbg.report import Block, Cell, Group, Lines, Pairs, Report, Table, Value, cell

DEFAULT_WIDTH = 80
NARROWEST_COLUMN = 16
COLUMN_GAP = 2

# SGR sequences (ECMA-48); only colours that stay readable on light and dark backgrounds.
SGR: Mapping[str, str] = {"dim": "\x1b[2m", "good": "\x1b[32m", "bad": "\x1b[1;31m", "warn": "\x1b[33m", "strong": "\x1b[1m",
                          "cyan": "\x1b[36m", "magenta": "\x1b[35m", "blue": "\x1b[34m"}
RESET = "\x1b[0m"


class TextRenderer:
    """Turns reports into text.  Subclasses change how a piece of styled text is marked (colour, DML)."""

    def __init__(self, width: int = DEFAULT_WIDTH, colour: bool = False) -> None:
        self.width, self.colour = max(width, 40), colour

    def mark(self, words: str, value: Value) -> str:
        """`words`, a line of `value`'s text, with its style; must not change the visible width."""
        if self.colour and value.style in SGR and words:
            return f"{SGR[value.style]}{words}{RESET}"
        return words

    def painted(self, words: str, value: Value) -> str:
        """As `mark`, with the spans of `value` each in its style where `words` are its whole text."""
        if not value.spans or words != value.text:
            return self.mark(words, value)
        pieces, at = [], 0
        for length, style in value.spans:
            piece = words[at:at + length]
            pieces.append(self.mark(piece, Value(None, piece, style)))
            at += length
        return "".join([*pieces, words[at:]])

    def plain(self, words: str) -> str:
        """Text that is not a cell (headings, prose)."""
        return words

    def render(self, report: Report) -> str:
        lines: List[str] = []
        if report.header:
            lines += [self.mark(line, Value(None, line, "dim")) for line in self._wrapped(report.header)]
        for note in report.notes:
            lines += [self.mark(line, Value(None, line, "warn")) for line in self._wrapped("! " + note, indent="  ")]
        if lines and report.blocks:
            lines.append("")
        lines += self._blocks(report.blocks)
        return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"

    def _blocks(self, blocks: Sequence[Block]) -> List[str]:
        lines: List[str] = []
        for block in blocks:
            piece = self._block(block)
            if piece and lines:
                lines.append("")
            lines += piece
        return lines

    def _block(self, block: Block) -> List[str]:
        title = [self.mark(line, Value(None, line, "strong")) for line in self._wrapped(block.title)] if block.title else []
        if isinstance(block, Group):
            body = self._blocks(block.blocks)
        elif isinstance(block, Table):
            body = self._table(block)
        elif isinstance(block, Pairs):
            body = self._pairs(block)
        else:
            body = self._lines(block)
        return title + body if body else title

    def _wrapped(self, words: str, indent: str = "", width: Optional[int] = None) -> List[str]:
        return textwrap.wrap(words, width or self.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]

    def _lines(self, block: Lines) -> List[str]:
        lines = []
        for content in block.lines:
            value = cell(content)
            words = block.bullet + value.text
            for line in [words] if block.verbatim else self._wrapped(words, indent=_indent(block, words)):
                lines.append(self.mark(line, value))
        return lines

    def _pairs(self, block: Pairs) -> List[str]:
        rows = [[Value(None, label), content] for _, label, content in block.items]
        return self._tabulated([], rows, 1)

    def _table(self, block: Table) -> List[str]:
        if not block.rows:
            return self._wrapped(block.empty) if block.empty else []
        shown = [index for index, (_, heading) in enumerate(block.columns) if heading]
        rows = [[row[index] for index in shown] for row in block.rows]
        keys = [block.columns[index][0] for index in shown]
        flexible = keys.index(block.wrap) if block.wrap else len(shown) - 1
        headings = [block.columns[index][1] for index in shown] if block.headings else []
        return self._tabulated(headings, rows, flexible)

    def _tabulated(self, headings: Sequence[str], rows: Sequence[Sequence[Cell]], flexible: int) -> List[str]:
        """Columns by tabulate; the flexible column is wrapped to what the others leave."""
        from tabulate import tabulate

        values = [[cell(content) for content in row] for row in rows]
        if not values:
            return []
        count = max(len(row) for row in values)
        natural = [max([len(row[index].text) for row in values if index < len(row)] + [len(heading) for heading in headings[index:index + 1]])
                   for index in range(count)]
        taken = sum(natural) - natural[flexible] + COLUMN_GAP * (count - 1)
        room = max(self.width - taken, NARROWEST_COLUMN)
        cells = []
        for row in values:
            line = []
            for index, value in enumerate(row):
                pieces = self._wrapped(value.text, width=room) if index == flexible and len(value.text) > room else [value.text]
                line.append("\n".join(self.painted(piece, value) for piece in pieces))
            cells.append(line)
        if headings:
            # As a row of its own: tabulate pads the columns of real headers by two more.
            cells.insert(0, [self.mark(heading, Value(None, heading, "dim")) for heading in headings])
        table = tabulate(cells, tablefmt="plain", disable_numparse=True)
        return table.splitlines()


def _indent(block: Lines, words: str) -> str:
    """Behind the bullet, or deeper than a line that is itself indented (a tree)."""
    lead = len(words) - len(words.lstrip())
    return " " * (len(block.bullet) + (lead + 4 if lead else 0))


def wants_colour(stream: IO[str], choice: str = "auto", environment: Optional[Mapping[str, str]] = None) -> bool:
    """`choice` is auto, always or never; auto means a terminal, NO_COLOR (https://no-color.org) unset and TERM not dumb."""
    if choice != "auto":
        return choice == "always"
    variables = os.environ if environment is None else environment
    if variables.get("NO_COLOR") or variables.get("TERM") == "dumb":
        return False
    return stream.isatty()


def terminal_width(stream: Optional[IO[str]] = None) -> int:
    """COLUMNS, else the terminal's width, else 80."""
    import shutil

    if (stream or sys.stdout).isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    return DEFAULT_WIDTH


def render_text(report: Report, width: int = DEFAULT_WIDTH, colour: bool = False) -> str:
    """The report as text that ends with a newline."""
    return TextRenderer(width, colour).render(report)


def render_json(report: Report) -> str:
    """The report as JSON (see Report.to_data), addresses as hex strings."""
    import json

    data: Any = report.to_data()
    return json.dumps(data, indent=1, ensure_ascii=True) + "\n"
