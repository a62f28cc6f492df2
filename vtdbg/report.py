"""The one result model: what every command returns, and what text, JSON, HTML and DML are made of.

A report is a list of blocks.  A cell is a `Value`: what JSON gets, what a person reads, how it is styled, and the command that a click runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

SCHEMA = 1
"""Version of the JSON form; it grows when a key changes its meaning or goes away."""

FINE, FINDINGS, BAD_INPUT = 0, 1, 2
"""Exit status: all fine; something was found that needs attention; the input was unusable."""


class Value(NamedTuple):
    """One cell.  `style`: '' | 'dim' | 'good' | 'bad' | 'warn' | 'strong'.  `link` is a vtdbg command line ("ept walk 0x1000").

    `spans` (letters, style) make a picture of the text where there are colours; they may also be 'cyan', 'magenta' and 'blue', and say nothing that
    the text does not.
    """

    data: Any
    text: str
    style: str = ""
    link: str = ""
    spans: Tuple[Tuple[int, str], ...] = ()


Cell = Union[Value, str, int, bool, None]


def hexa(value: Optional[int], digits: int = 0, style: str = "", link: str = "") -> Value:
    """A number in hexadecimal, padded to `digits`; None is an unknown value."""
    if value is None:
        return Value(None, "unknown", "dim")
    text = f"{value:#0{digits + 2}x}" if value >= 0 else f"{value:#x}"
    return Value(text, text, style, link)


def hex_or_none(number: Optional[int]) -> Optional[str]:
    """An address as JSON has it; None stays None, 0 stays an address."""
    return None if number is None else f"{number:#x}"


def text(words: str, style: str = "", link: str = "") -> Value:
    return Value(words, words, style, link)


def cell(content: Cell) -> Value:
    """Plain content as a Value: numbers in decimal, None as unknown, booleans as yes and no."""
    if isinstance(content, Value):
        return content
    if content is None:
        return Value(None, "", "dim")
    if isinstance(content, bool):
        return Value(content, "yes" if content else "no")
    return Value(content, str(content))


@dataclass
class Table:
    """Rows under headings.  `columns` are (JSON key, heading, can be wrapped); a hidden column ("" heading) is in JSON only."""

    key: str
    columns: Sequence[Tuple[str, str]]
    rows: List[Sequence[Cell]] = field(default_factory=list)
    title: str = ""
    wrap: str = ""
    """Key of the column that gives way when the line gets too long (default: the last one)."""
    empty: str = ""
    """What a person reads when there are no rows."""
    headings: bool = True

    def add(self, *cells: Cell) -> None:
        self.rows.append(cells)


@dataclass
class Pairs:
    """Label and value, one a line: (JSON key, label, value)."""

    key: str
    items: List[Tuple[str, str, Cell]] = field(default_factory=list)
    title: str = ""

    def add(self, key: str, label: str, content: Cell) -> None:
        self.items.append((key, label, content))


@dataclass
class Lines:
    """Prose: one paragraph an item, wrapped at the width unless it is `verbatim` (something to type or to copy)."""

    key: str
    lines: Sequence[Cell] = field(default_factory=list)
    title: str = ""
    bullet: str = ""
    verbatim: bool = False


@dataclass
class Group:
    """Blocks that belong together: one VMCS, one walk.  In JSON the groups of one key are a list of objects."""

    key: str
    title: str
    blocks: "List[Block]" = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)
    """More keys for the JSON object of the group."""

    def add(self, block: "Block") -> None:
        self.blocks.append(block)


Block = Union[Table, Pairs, Lines, Group]


@dataclass
class Report:
    """What a command found.  `python` are the lines that do the same with the library (`--python`)."""

    command: str
    blocks: List[Block] = field(default_factory=list)
    header: str = ""
    """Where the values come from and how fresh they are; the first line of the text."""
    notes: List[str] = field(default_factory=list)
    """What the reader must not miss: stale, guessed, truncated."""
    status: int = FINE
    python: List[str] = field(default_factory=list)

    def add(self, block: Block) -> None:
        self.blocks.append(block)

    def to_data(self) -> Dict[str, Any]:
        """The JSON form: {"schema", "command", "header", "notes", "status", one key a block}."""
        data: Dict[str, Any] = {"schema": SCHEMA, "command": self.command, "header": self.header, "notes": list(self.notes),
                                "status": self.status}
        data.update(_blocks_data(self.blocks))
        return data


def _blocks_data(blocks: Sequence[Block]) -> Dict[str, Any]:
    data: Dict[str, Any] = {}
    for block in blocks:
        if isinstance(block, Group):
            item = {"title": block.title, **block.data, **_blocks_data(block.blocks)}
            data.setdefault(block.key, []).append(item)
        elif isinstance(block, Table):
            keys = [key for key, _ in block.columns]
            rows = [{key: cell(content).data for key, content in zip(keys, row)} for row in block.rows]
            data.setdefault(block.key, []).extend(rows)
        elif isinstance(block, Pairs):
            data.setdefault(block.key, {}).update({key: cell(content).data for key, _, content in block.items})
        else:
            data.setdefault(block.key, []).extend(cell(line).data for line in block.lines)
    return data
