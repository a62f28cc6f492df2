"""Lines of a pasted log without what loggers and mailers put before them.

A prefix tells two things besides where the content begins: that the line is a record of its own (so it does not continue the line
before), and who printed it (dumps of two processors interleave in one log).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Optional, Pattern, Sequence, Tuple

LONGEST_LINE = 20_000
"""Characters of one line that are looked at; a real log line has a few hundred."""

_BLANKS = re.compile(r"[\s\u00a0\u1680\u2000-\u200b\u202f\u205f\u3000\ufeff]+")
_COLOUR = re.compile(r"\x1b\[[0-9;]{0,16}[A-Za-z]")
_ENTITIES = {"&nbsp;": " ", "&gt;": ">", "&lt;": "<", "&quot;": '"', "&amp;": "&"}

KERNEL_TIME = re.compile(r"\[ {0,12}\d{1,7}\.\d{6}\]")
"""printk's timestamp.  On a serial line it also stands in the middle: user space wrote without a line end before it."""

_DATE = r"(?:[A-Z][a-z]{2} {1,2}\d{1,2} \d\d:\d\d:\d\d(?:\.\d{1,9})?|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?: ?Z|[+-]\d\d:?\d\d)?)"


@dataclass(frozen=True)
class _Prefix:
    """One kind of prefix.  `logged`: a logger writes it, so the line begins a record.  Group 1 of the pattern, if any, says who printed it."""

    pattern: Pattern[str]
    logged: bool


_PREFIXES: Tuple[_Prefix, ...] = tuple(_Prefix(re.compile(pattern), logged) for pattern, logged in (
    (r"\(XEN\) ?", True),
    (r"\(d\d{1,5}\) ?", True),
    (r"<\d{1,3}> ?", True),
    (r"\[ ?\d{1,7}[.,]\d{3,9}\] ?", True),
    (r"\[ ?([TC] ?\d{1,9})\] ?", True),
    (rf"\[{_DATE}\] ?", True),
    (r"\[[A-Z][a-z]{2} [A-Z][a-z]{2} \d{1,2} \d\d:\d\d:\d\d \d{4}\] ?", True),
    (rf"{_DATE} (?:[\w.-]{{1,64}} (?=[\w./-]{{1,64}}(?:\[\d{{1,9}}\])?:))?", True),
    (r"\d\d:\d\d:\d\d\.\d{3,9} ", True),
    (r"\d{8} \d{1,6}\.\d{6,9} ", True),
    # ftrace: "CPU 0/KVM-251862 [019] 6384.13: bprint: dump_vmcs: "
    (r"([^\[\]]{1,48}-\d{1,9}) \[\d{1,4}\] (?:[^\s:\[\]]{4,6} )?\d{1,9}\.\d{1,9}: (?:bprint|bputs|print): [\w.]{1,64}: ?", True),
    (r"(?:localhost )?/?(?:kernel|netbsd)(?:\[\d{1,9}\])?: ?", True),
    (r"(?i:kvm_intel|kvm_amd|kvm|svm|vmx): ?", True),
    (r"(?i:kvm) (\[\d{1,9}\]): ?", True),
    (r"\(intelhaxm\) ?", True),
    (r"haxm_[a-z]{3,8}: ?", True),
    (r"\[[A-Za-z]\w{2,20}\] ", True),
))

_QUOTE = re.compile(r"(?:[>|] ?)+")
_XEN_DOMAIN = re.compile(r"(?:[>|] ?)*>>> ?Domain \d")


@dataclass(frozen=True)
class Line:
    """A line: `number` from 1, `text` without prefix and with single blanks, `logged` and `key` as the prefix says.

    `junk` is what stood before a kernel timestamp in the middle of the line: another writer's words.
    """

    number: int
    text: str
    logged: bool
    key: str
    junk: str = ""


def collapse(raw: str) -> str:
    """Single blanks for tabs, no-break spaces and runs; no terminal colours, no HTML entities."""
    if "\x1b" in raw:
        raw = _COLOUR.sub("", raw)
    if "&" in raw:
        for entity, character in _ENTITIES.items():
            raw = raw.replace(entity, character)
    return _BLANKS.sub(" ", raw).strip()


def _strip(text: str) -> Tuple[str, bool, str]:
    """(content, is a record of its own, who printed it)."""
    logged, key = False, ""
    position = 0
    for _ in range(16):
        quote = None if _XEN_DOMAIN.match(text, position) else _QUOTE.match(text, position)
        if quote:
            position = quote.end()
        for prefix in _PREFIXES:
            match = prefix.pattern.match(text, position)
            if match:
                position = match.end()
                logged |= prefix.logged
                if match.re.groups and match.group(1):
                    key = match.group(1).replace(" ", "")
                break
        else:
            if not quote:
                break
        while position < len(text) and text[position] == " ":
            position += 1
    return text[position:], logged, key


def clean(number: int, raw: str) -> Line:
    """The line without its prefixes."""
    text = collapse(raw[:LONGEST_LINE])
    junk = ""
    start = 0
    for match in KERNEL_TIME.finditer(text):
        start = match.start()
    if start:
        junk = _strip(text[:start])[0].strip()
        if junk == "":
            start = 0
    content, logged, key = _strip(text[start:])
    return Line(number, content, logged, key, junk)


class Lines:
    """The lines of a text, cleaned when they are asked for."""

    def __init__(self, text: str) -> None:
        self.raw: List[str] = text.split("\n")
        self.ends_open = self.raw[-1].strip() != "" and not self.raw[-1].endswith("\r")
        """The text does not end with a line end: the rest of its last line may be missing."""
        self.ends_cut = self.ends_open and not self.raw[-1][-1:].isspace()
        """The last word itself may be cut."""
        self._cleaned: Dict[int, Line] = {}

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def last(self) -> int:
        """Number of the last line that is not blank, 0 for none."""
        for number in range(len(self.raw), 0, -1):
            if self.raw[number - 1].strip():
                return number
        return 0

    @property
    def first_is_cut(self) -> bool:
        """The first line begins without what a logger or a mailer puts before the next ones: its beginning may be missing."""
        if collapse(self.raw[0][:LONGEST_LINE]) != self.line(1).text:
            return False
        following = [number for number in range(2, min(len(self.raw), 8) + 1) if self.raw[number - 1].strip()]
        return any(collapse(self.raw[number - 1][:LONGEST_LINE]) != self.line(number).text for number in following)

    def line(self, number: int) -> Line:
        """Line `number`, from 1."""
        found = self._cleaned.get(number)
        if found is None:
            found = self._cleaned[number] = clean(number, self.raw[number - 1])
        return found

    def next_soft(self, number: int) -> Optional[Line]:
        """The line after `number` if it may be the rest of it: it has no log prefix of its own and is not blank."""
        if number >= len(self.raw):
            return None
        line = self.line(number + 1)
        return line if line.text and not line.logged else None


_GAP = re.compile(r"(?:\W{0,4}(?:\.{3,}|\u2026)\W{0,4}|\W{0,4}(?:snip|snipped|cut|truncated|omitted|skipped)\W{0,8}"
                  r"|.{0,40}\b\d{1,9} (?:messages|callbacks|output lines) (?:suppressed|dropped).{0,20}|.{0,40}\bcallbacks suppressed)$", re.I)


def is_gap(text: str) -> bool:
    """The line says that lines are missing here: "...", "52 messages suppressed", "[snip]"."""
    return len(text) < 160 and _GAP.match(text) is not None


def shown(raw: str, limit: int = 200) -> str:
    """A raw line as a report shows it: one line of printable ASCII, cut at `limit`."""
    text = "".join(character if 0x20 <= ord(character) < 0x7F else "?" for character in collapse(raw[:limit * 4]))
    return text if len(text) <= limit else text[:limit - 3] + "..."


def word_set(text: str) -> FrozenSet[str]:
    """The words of a text, for tables of keywords."""
    return frozenset(text.split())


class Follow:
    """Gives the lines after a line while they can be the rest of it."""

    def __init__(self, lines: Lines, number: int, stop: Optional[Pattern[str]] = None) -> None:
        self._lines, self._number, self._stop = lines, number, stop

    @property
    def cut(self) -> bool:
        return self._lines.ends_cut and self._number == self._lines.last

    def next(self) -> Optional[str]:
        line = self._lines.next_soft(self._number)
        if line is None or (self._stop is not None and self._stop.search(line.text)):
            return None
        self._number = line.number
        return line.text


def streams(lines: Lines, candidates: Sequence[int]) -> Dict[str, List[int]]:
    """Candidate lines by who printed them, where the prefixes say so: dumps of two processors interleave."""
    keys = {lines.line(number).key for number in candidates} - {""}
    if len(keys) < 2:
        return {"": list(candidates)}
    found: Dict[str, List[int]] = {}
    key = ""
    for number in candidates:
        line = lines.line(number)
        if line.logged:
            key = line.key
        if is_gap(line.text):
            for others in found.values():
                others.append(number)
        else:
            # A line without any prefix is the rest of the one before it.
            found.setdefault(key, []).append(number)
    return found
