"""Fields of a VMCS or VMCB as blocks of a report: one table a group, each value in words, what does not count dimmed with why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, NamedTuple, Optional

from vtdbg.report import Block, Lines, Table, Value, hexa, text

if TYPE_CHECKING:
    from vtdbg.textdump import TextDump

UNPARSED_SHOWN = 200


class Shown(NamedTuple):
    """A value as the command wants it shown: `why` is set where it does not count, `note` where it counts and something has to be said."""

    name: str
    title: str
    group: str
    value: int
    digits: int
    meaning: str
    source: str
    why: str = ""
    note: str = ""
    doubtful: bool = False
    """Whether it counts depends on what is not known here (SMM, SEAM, FRED, a VMfail): not worth a line while it is 0."""
    link: str = ""
    """The command that a click on the value runs."""


COLUMNS = (("name", "field"), ("value", "value"), ("meaning", "meaning"), ("source", ""), ("title", ""), ("used", ""))


def group_tables(values: Iterable[Shown], titles: Mapping[str, str], show_all: bool = False, used_only: bool = False) -> List[Block]:
    """Tables in the order of `titles`.  What is left out is counted in the last line.

    `used_only` leaves out fields that do not count; without `show_all` those go too that are 0 and count for SMM, SEAM or FRED only.
    """
    blocks: List[Block] = []
    by_group: Dict[str, List[Shown]] = {key: [] for key in titles}
    hidden = 0
    for value in values:
        if (used_only and value.why) or (value.doubtful and value.value == 0 and not show_all):
            hidden += 1
        else:
            by_group.setdefault(value.group, []).append(value)
    for key, rows in by_group.items():
        if rows:
            table = Table("fields", COLUMNS, title=titles.get(key, key), wrap="meaning", headings=not blocks)
            for row in rows:
                table.add(*_row(row))
            blocks.append(table)
    if hidden:
        one = hidden == 1
        which = "not count" if used_only else "0 and matter for SMM, SEAM, FRED or after a VMfail only"
        verb = ("does" if one else "do") if used_only else ("is" if one else "are")
        which = which.replace("matter", "matters") if one else which
        more = "" if used_only else f" (--all shows {'it' if one else 'them'})"
        blocks.append(Lines("hidden", [Value(hidden, f"{hidden} field{'' if one else 's'} {verb} {which}: not shown{more}.", "dim")]))
    return blocks


WIDEST = 34


def _number(row: Shown, style: str) -> Value:
    """The value in full width; arrays of bytes (up to 32) without leading zeros and cut, so that the table stays readable.  JSON has them whole."""
    whole = hexa(row.value, row.digits, style, row.link)
    if row.digits <= 16:
        return whole
    words = f"{row.value:#x}"
    return Value(whole.data, words if len(words) <= WIDEST else words[:WIDEST - 3] + "...", style, row.link)


def _row(row: Shown) -> List[Any]:
    style = "dim" if row.why else ""
    reserved = "!" in row.meaning
    words = in_words(row)
    return [
        text(row.name, style),
        _number(row, style),
        Value(row.meaning, words, style or ("warn" if reserved else "")),
        text(row.source),
        text(row.title),
        Value(not row.why, ""),
    ]


def values_table(rows: Iterable[Shown]) -> Table:
    """Some fields with where their values are from."""
    columns = (("name", "field"), ("value", "value"), ("meaning", "meaning"), ("source", "from"))
    table = Table("fields", columns, wrap="meaning", headings=False)
    for row in rows:
        words = Value(row.meaning, in_words(row), "dim" if row.why else "")
        table.add(row.name, _number(row, ""), words, Value(row.source, short_source(row.source), "dim"))
    return table


def unparsed_block(dump: "Optional[TextDump]") -> List[Block]:
    """The lines of a log that nobody understood, with their numbers: nothing is dropped silently."""
    if dump is None or not dump.unparsed:
        return []
    rows = Table("unparsed", (("line", "line"), ("text", "text")), title=f"{len(dump.unparsed)} lines were not understood", headings=False)
    for number, line in dump.unparsed[:UNPARSED_SHOWN]:
        rows.add(str(number), "".join(letter if " " <= letter <= "~" else "?" for letter in line))
    return [rows]


def in_words(row: Shown) -> str:
    """Why it does not count, what it means, what else there is to say."""
    # "0" says nothing that the value does not; nor do the words for a 0 that does not count.
    meaning = "" if row.meaning == "0" or (row.why and row.value == 0) else row.meaning
    return "; ".join(part for part in (row.why, meaning, row.note) if part)


def short_source(source: str) -> str:
    """The provenance without what the title and the head of the group say already (page and layout)."""
    found = re.search(r"offset 0x[0-9a-f]+", source)
    return found.group() if found and ", inferred" not in source else source
