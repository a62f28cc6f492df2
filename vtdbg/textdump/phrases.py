"""Matching of printed phrases that the way to the reader has damaged.

A phrase is written the way the program that prints it writes its format: `CR0: actual=0x{GUEST_CR0:16}, shadow=0x{CR0_READ_SHADOW:16}`.
The number after the colon is the number of digits that it pads to: a value with fewer is cut and does not count; `5+` is padded to 5
digits and longer where the value is.  `x` is unpadded hexadecimal, `d` decimal.  `[0x]` is a "0x" that some versions print.
Blanks, case, colons and commas may be lost; the equal sign may not: "CS: 0010 DS: 0000" in a kernel's oops is not "CS=0010 DS=0000" of a VMCS dump.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, FrozenSet, List, Mapping, Optional, Pattern, Protocol, Sequence, Tuple

_SLOT = re.compile(r"\{([A-Za-z0-9_.]+):([0-9a-z|+]+)\}")
_TOKEN = re.compile(r"[A-Za-z0-9_]+| +|.")
_WORD = re.compile(r"[A-Za-z0-9_]+|[^\sA-Za-z0-9_]")
_JUNK = re.compile(r" ?(?:<[^<>]{0,40}>|[^\s,]{0,80})")
_HIDDEN = re.compile(r" ?(?:0x)?<", re.IGNORECASE)
_TAG = re.compile(r" ?\( ?(effective|autoload|corrupted!?) ?\)", re.IGNORECASE)
_SYMBOL = re.compile(r" ?\([^()]{0,200}(?:\)|$)")
_HARMLESS = re.compile(r"[\s.,;:|*`'\"\\<>()-]*(?:<br ?/?>)?[\s.,;:|*`'\"\\<>()-]*$", re.IGNORECASE)
_HEX = re.compile(r" ?(0x)?([0-9a-f]{1,16})(?![0-9A-Za-z_]|\.\.|\u2026)", re.IGNORECASE)
_DECIMAL = re.compile(r" ?([0-9]{1,20})(?![0-9A-Za-z_]|\.\.|\u2026)")

_PIECE = re.compile(r" ?(?:0x?)?[0-9a-f]*", re.IGNORECASE)
"""What is left of a number at the end of a cut text."""
_END = re.compile(r" *$")

UNPADDED = "x"
DECIMAL = "d"


@dataclass(frozen=True)
class Slot:
    """A label and its value.  `widths` are the digits that a whole value has, empty for unpadded ones."""

    name: str
    label: Pattern[str]
    words: Tuple[str, ...]
    widths: Tuple[int, ...]
    kind: str
    prefix: bool
    longer: bool


@dataclass(frozen=True)
class Phrase:
    """One printed phrase.  `strong`: nobody else prints this, so it counts wherever it stands in a line.  `whole`: it counts only whole."""

    id: str
    slots: Tuple[Slot, ...]
    strong: bool
    symbol: bool
    whole: bool

    @property
    def first_word(self) -> str:
        return self.slots[0].words[0]


@dataclass(frozen=True)
class Item:
    """A slot that was found: its value, None where the value is damaged, and where in the text it stands.

    `doubtful` is an unpadded value that ends where the text ends: the rest of it may be missing.  `foreign` is a number in another
    form than this program prints: neither hidden nor at the end of the line.
    """

    slot: Slot
    value: Optional[int]
    start: int
    end: int
    doubtful: bool = False
    foreign: bool = False
    hidden: bool = False
    """`<private>` stands in its place."""


@dataclass(frozen=True)
class Match:
    phrase: Phrase
    items: Tuple[Item, ...]
    start: int
    end: int
    tag: str
    unfinished: bool
    """The text ended before the phrase did."""
    remark_end: int = 0
    """Where the last remark or symbol in parentheses ends."""

    @property
    def good(self) -> int:
        return sum(item.value is not None for item in self.items)


def _label(literal: str) -> Pattern[str]:
    """A literal as a pattern that survives lost or added blanks, colons, commas and closing parentheses."""
    parts: List[str] = [" ?"]
    for token in _TOKEN.findall(literal):
        if token.isspace():
            parts.append(" ?")
        elif re.fullmatch(r"\w+", token):
            parts.append(re.escape(token))
        elif token == ":":
            parts.append(" ?:?")
        elif token in ",)":
            parts.append(f" ?{re.escape(token)}?")
        else:
            parts.append(" ?" + re.escape(token))
    # A label that is a word must not be the front part of a longer word.
    tail = r"(?![0-9A-Za-z_])" if parts[-1][-1:].isalnum() else ""
    return re.compile("".join(parts) + tail, re.IGNORECASE)


def words(text: str) -> Tuple[str, ...]:
    """Words and signs, without the signs that get lost."""
    return tuple(word for word in _WORD.findall(text.lower()) if word not in (":", "=", ","))


def phrase(identifier: str, form: str, *, strong: bool = True, symbol: bool = False, whole: bool = False) -> Phrase:
    """A phrase out of its format.  `symbol`: a "(symbol+0x12)" may stand after a value."""
    slots: List[Slot] = []
    position = 0
    for match in _SLOT.finditer(form):
        literal = form[position:match.start()]
        position = match.end()
        prefix = literal.endswith("0x")
        optional = literal.endswith("[0x]")
        literal = literal[:-2] if prefix else literal[:-4] if optional else literal
        spec = match.group(2)
        kind = spec if spec in (UNPADDED, DECIMAL) else "hex"
        widths = tuple(int(width) for width in spec.rstrip("+").split("|")) if kind == "hex" else ()
        slots.append(Slot(match.group(1), _label(literal), words(literal), widths, kind, prefix, spec.endswith("+")))
    return Phrase(identifier, tuple(slots), strong, symbol, whole)


@dataclass(frozen=True)
class Table:
    """Phrases by the first word of each."""

    phrases: Mapping[str, Tuple[Phrase, ...]]
    first: Pattern[str]
    beginnings: FrozenSet[Tuple[str, ...]]
    """Every beginning (in words) of a phrase's first label."""
    keywords: FrozenSet[str]


def table(rows: Sequence[Phrase]) -> Table:
    by_word: Dict[str, List[Phrase]] = {}
    beginnings = set()
    for row in rows:
        by_word.setdefault(row.first_word, []).append(row)
        for length in range(1, len(row.slots[0].words) + 1):
            beginnings.add(row.slots[0].words[:length])
    first = "|".join(re.escape(word) for word in sorted(by_word, key=len, reverse=True))
    pattern = re.compile(rf"(?<![0-9A-Za-z_.$%@])(?:{first})(?![0-9A-Za-z_])", re.IGNORECASE)
    return Table({word: tuple(found) for word, found in by_word.items()}, pattern, frozenset(beginnings), frozenset(by_word))


def _value(slot: Slot, text: str, position: int, strong: bool, cut: bool, more: bool) -> Tuple[Optional[int], int, bool]:
    """(value or None, end, doubtful).  `cut`: the text ends without a line end.  `more`: other slots follow this one."""
    if slot.kind == DECIMAL:
        found = _DECIMAL.match(text, position)
        if not found:
            return None, position, False
        doubtful = cut and found.end() == len(text) and found.group(1) != "0"
        return (None if doubtful else int(found.group(1))), found.end(), doubtful
    found = _HEX.match(text, position)
    if not found:
        return None, position, False
    digits = found.group(2)
    if slot.kind == UNPADDED:
        # %#x prints "0" for 0 and "0x.." for anything else; older programs pad to 8 or 16 digits.
        padded = digits.startswith("0") and len(digits) > 1
        if (padded and len(digits) not in (8, 16)) or (digits != "0" and slot.prefix and not found.group(1)):
            return None, found.end(), False
        # "0" can be the beginning of "0x10".
        doubtful = cut and found.end() == len(text) and len(digits) < 16
        return (None if doubtful else int(digits, 16)), found.end(), doubtful
    if slot.prefix and not strong and not found.group(1):
        return None, position, False
    widths = slot.widths
    at_end = found.end() == len(text)
    if len(widths) > 1 and at_end and (more or cut):
        # A value of the shorter width can be a cut one of the longer width.
        widths = (max(widths),)
    whole = len(digits) in widths
    if slot.longer and not digits.startswith("0") and len(digits) >= min(widths):
        # Nothing says how long it is: at the end of a cut text its rest can be missing.
        whole = len(digits) == 16 or not (at_end and cut)
    return (int(digits, 16) if whole else None), found.end(), False


def match_phrase(row: Phrase, text: str, position: int, cut: bool = False) -> Optional[Match]:
    """`row` at `position`, as much of it as is there; None where it does not begin there."""
    items: List[Item] = []
    cursor = position
    index = remark_end = 0
    unfinished = False
    while index < len(row.slots):
        step = _next_slot(row, index, text, cursor)
        if step is None:
            rest = words(text[cursor:cursor + 64])
            unfinished = bool(items) and (not rest or any(_begins(slot.words, rest) for slot in row.slots[index:]))
            cursor = len(text) if unfinished else cursor
            break
        found, after = step
        if index == 0 and found != 0:
            return None
        slot = row.slots[found]
        value, end, doubtful = _value(slot, text, after, row.strong, cut, found + 1 < len(row.slots))
        if value is None and not doubtful:
            if _END.match(text, after):
                unfinished = True
                cursor = len(text)
                break
            junk = _JUNK.match(text, after)
            end = max(end, junk.end() if junk else after)
        if row.symbol:
            symbol = _SYMBOL.match(text, end)
            end = symbol.end() if symbol else end
            remark_end = end if symbol else remark_end
        hidden = value is None and _HIDDEN.match(text, after) is not None
        foreign = value is None and not hidden and (end < len(text) or not _PIECE.fullmatch(text, after, end))
        items.append(Item(slot, value, after, end, doubtful, foreign, hidden))
        if foreign and found and not slot.words:
            # Columns without labels: what follows a column in another form is not the next column.
            cursor = end
            break
        cursor = end
        index = found + 1
    if not items and not unfinished:
        return None
    columns = len(row.slots) > 1 and not row.slots[1].words
    if columns and sum(not item.foreign for item in items) < 2:
        # One number after a label without a sign is too little to know a row of a table by.
        return None
    if row.whole and (len(items) < len(row.slots) or any(item.value is None for item in items)):
        return None
    tag = _TAG.match(text, cursor)
    if tag:
        cursor = remark_end = tag.end()
    return Match(row, tuple(items), position, cursor, tag.group(1).lower() if tag else "", unfinished, remark_end)


def _begins(label: Tuple[str, ...], rest: Tuple[str, ...]) -> bool:
    """`rest` is the beginning of `label`; its last word may be cut."""
    return len(rest) <= len(label) and label[:len(rest) - 1] == rest[:-1] and label[len(rest) - 1].startswith(rest[-1])


def _next_slot(row: Phrase, index: int, text: str, cursor: int) -> Optional[Tuple[int, int]]:
    """(slot, end of its label) of the first slot from `index` on whose label stands at `cursor`; earlier ones are lost."""
    for found in range(index, len(row.slots)):
        label = row.slots[found].label.match(text, cursor)
        if label and label.end() > cursor:
            return found, label.end()
    return None


@dataclass(frozen=True)
class Record:
    """The phrases of one printed line.  `lead` stands before the first, `clean` says that nothing else stands between or after."""

    matches: Tuple[Match, ...]
    lead: str
    tail: str
    clean: bool
    wanting: bool
    """The line seems to go on in the next one."""

    tail_start: int = 0

    def spans(self, boundary: int) -> bool:
        """What stands before `boundary` goes on after it, whole or not."""
        return any(match.start < boundary < match.end for match in self.matches) or (self.wanting and self.tail_start < boundary)

    def reaches(self, boundary: int) -> bool:
        """Some phrase begins before `boundary` and has a value, a hidden value or a remark after it."""
        return any(match.start < boundary and (match.remark_end > boundary or any(not item.foreign and item.start >= boundary - 1
                                                                                  for item in match.items)) for match in self.matches)


def _rank(match: Match) -> Tuple[int, int, int, bool]:
    """The better of two phrases that begin alike: more values, fewer foreign ones, more of it, all of it."""
    return match.good, -sum(item.foreign for item in match.items), len(match.items), len(match.items) == len(match.phrase.slots)


def scan(rows: Table, text: str, cut: bool = False) -> Record:
    """The phrases in `text`, from left to right."""
    matches: List[Match] = []
    lead, clean, open_end = "", True, False
    position = end = 0
    while True:
        word = rows.first.search(text, position)
        if word is None:
            break
        best: Optional[Match] = None
        unfinished = False
        for row in rows.phrases[word.group().lower()]:
            found = match_phrase(row, text, word.start(), cut)
            unfinished |= found is not None and found.unfinished
            if found and (best is None or _rank(found) > _rank(best)):
                best = found
        if best is None:
            position = word.end()
            continue
        between = text[end:best.start]
        if not matches:
            lead = between.strip()
        elif not _HARMLESS.match(between):
            clean = False
        matches.append(best)
        open_end = unfinished
        position = end = max(best.end, word.end())
    tail = text[end:].lstrip(" ),").strip()
    tail_start = text.find(tail, end) if tail else len(text)
    clean = clean and not any(item.foreign for match in matches for item in match.items)
    wanting = bool(matches and open_end and not tail) or bool(matches and matches[-1].unfinished) or _is_beginning(rows, tail if matches else text)
    whole = bool(_HARMLESS.match(tail)) or bool(matches and matches[-1].unfinished) or _is_beginning(rows, tail)
    whole = whole or (cut and _is_cut_beginning(rows, tail))
    clean = clean and whole
    return Record(tuple(matches), lead, tail, clean, wanting, tail_start)


def _is_beginning(rows: Table, text: str) -> bool:
    if len(text) > 64:
        return False
    found = words(text)
    return bool(found) and found in rows.beginnings


def _is_cut_beginning(rows: Table, text: str) -> bool:
    """The beginning of a phrase whose last word may be cut too: what stands at the end of a cut text."""
    found = words(text[:64])
    return bool(found) and len(text) <= 64 and any(len(label) == len(found) and _begins(label, found) for label in rows.beginnings)


@lru_cache(maxsize=256)
def shape(lead: str) -> str:
    """A lead with its digits made equal, so that the same logger's prefix compares equal on every line."""
    return re.sub(r"[0-9a-f]*\d[0-9a-f]*", "#", lead[-60:].lower())


class Following(Protocol):
    """The lines after a line, as far as they can be the rest of it."""

    @property
    def cut(self) -> bool:
        """The last word of what has been given is the last of a text without a line end."""

    def next(self) -> Optional[str]:
        """The next line, None where there is none that can belong to it."""


def scan_joined(rows: Table, text: str, following: Following, limit: int = 6) -> Tuple[Record, List[int]]:
    """`scan`, with following lines joined on as long as that completes something.

    Returns the record and the offsets in the joined text at which each joined line begins.
    """
    record = scan(rows, text, following.cut)
    starts = [0]
    tried = text
    pending: List[int] = []
    boundary = len(text)
    for _ in range(limit):
        foreign = any(item.foreign for match in record.matches for item in match.items)
        more = following.next() if (record.matches or record.wanting) and not foreign else None
        # A remark or a second value in parentheses can stand on a line of its own; it does not announce itself.
        if more is None or not (record.wanting or pending or more.startswith("(")):
            break
        joint = len(tried)
        pending.append(joint + 1)
        tried = tried + " " + more
        longer = scan(rows, tried, following.cut)
        if longer.reaches(boundary) or longer.reaches(joint):
            record, starts, pending, boundary = longer, starts + pending, [], len(tried)
        elif not longer.wanting or not longer.spans(joint):
            break
    return record, starts
