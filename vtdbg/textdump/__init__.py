"""VMCS and VMCB values out of text that people paste: KVM, Xen, hvext, HAXM, VirtualBox, bhyve and QEMU logs, lists of fields.

Each dialect is a table of what the program prints.  A value counts only where it is whole and where its place says whose it is:
what is missing is unknown, never 0; what was not understood is listed with its line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Pattern, Sequence, Set, Tuple

from vtdbg.errors import FormatError, UsageError
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm.vmcb import Vmcb
from vtdbg.textdump import lists, registers, vmcb_blocks, vmcs_blocks, vmcs_phrases
from vtdbg.textdump.lines import LONGEST_LINE, Lines, shown
from vtdbg.textdump.model import Builder, TextDump, TextValue, describe, in_field_order
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.vmcs import Vmcs

__all__ = ["TextDump", "TextValue", "of_kind", "parse", "vmcb_from_text", "vmcs_from_text"]

_WORDS = re.compile(r"[a-z_][a-z0-9_]*")
_ALPHANUMERIC = re.compile(r"[0-9A-Za-z]")
_MARKS = ("...", "\u2026", "0x", "snip", "suppressed", "VMX_", "VM_EXIT_", "GUEST_", "HOST_")
FARTHEST = 200
"""Lines around a marked one that can belong to the same dump."""

LOOKED_FOR = ("KVM dump_vmcs or dump_vmcb, Xen's VMCS and VMCB dumps, hvext !dump_vmcs, HAXM, VirtualBox, bhyve, "
              "QEMU's \"KVM: entry failed\", lists of field names or encodings with values")


Parser = Callable[[Lines, Sequence[int], Set[int], Set[int]], List[TextDump]]


@dataclass(frozen=True)
class _Dialect:
    """A reader, the words one of which stands near everything that it reads, and those one of which stands in every line."""

    read: Parser
    markers: FrozenSet[str]
    keywords: FrozenSet[str]
    numbers: Optional[Pattern[str]] = None
    """What marks a line of numbers only."""


@cache
def _dialects() -> Tuple[_Dialect, ...]:
    return (_Dialect(vmcb_blocks.parse, vmcb_blocks.MARKERS, vmcb_blocks.KEYWORDS),
            _Dialect(vmcs_blocks.parse, vmcs_phrases.MARKERS, vmcs_phrases.KEYWORDS),
            _Dialect(registers.parse, registers.MARKERS, registers.KEYWORDS),
            _Dialect(lists.parse, lists.markers(), lists.keywords(), lists.PAIR))


def _words(raw: str) -> List[str]:
    return _WORDS.findall(raw[:LONGEST_LINE].lower())


def _candidates(lines: Lines) -> List[List[int]]:
    """For each dialect, the numbers of the lines that can hold something of it: lines with one of its words near a line with a marker.

    This is all that is done with the other lines of a log.
    """
    dialects = _dialects()
    marked: List[List[int]] = [[] for _ in dialects]
    for index, raw in enumerate(lines.raw):
        words = _words(raw)
        for dialect, found in zip(dialects, marked):
            if not dialect.markers.isdisjoint(words) or (dialect.numbers is not None and "0x" in raw and dialect.numbers.search(raw)):
                found.append(index + 1)
    return [_near(lines, dialect, found) for dialect, found in zip(dialects, marked)]


def _near(lines: Lines, dialect: _Dialect, marked: Sequence[int]) -> List[int]:
    """Lines with a word of the dialect, or that say that lines are missing, not farther from a marked line than a dump has holes."""
    found: List[int] = []
    done = 0
    for center in marked:
        for number in range(max(done + 1, center - FARTHEST), min(center + FARTHEST, len(lines)) + 1):
            raw = lines.raw[number - 1]
            if not dialect.keywords.isdisjoint(_words(raw)) or any(mark in raw for mark in _MARKS):
                found.append(number)
            done = number
    return found


def parse(text: str) -> List[TextDump]:
    """Every dump in `text`, in the order of their first lines.  The time is linear in the length of the text.

    A text that is JSON as `vmcs dump --json` and `vmcb dump --json` print it gives its dumps too.
    """
    document = _json_document(text)
    if document is not None:
        return document
    lines = Lines(text)
    claimed: Set[int] = set()
    reserved: Set[int] = set()
    dumps: List[TextDump] = []
    # What stands inside a dump of another dialect and was not understood is damage, not something of the next dialect.
    for dialect, candidates in zip(_dialects(), _candidates(lines)):
        inside = {number for dump in dumps for number in range(dump.first_line, dump.last_line + 1)} | reserved
        dumps.extend(dialect.read(lines, [number for number in candidates if number not in inside], claimed, reserved))
    dumps.sort(key=lambda dump: (dump.first_line, dump.last_line))
    for dump in dumps:
        dump.unparsed = _unparsed(lines, dump, claimed)
    return dumps


def _unparsed(lines: Lines, dump: TextDump, claimed: Set[int]) -> List[Tuple[int, str]]:
    """Lines of the dump that nobody understood, and what another writer put before a line that was."""
    found: List[Tuple[int, str]] = []
    for number in range(dump.first_line, dump.last_line + 1):
        raw = lines.raw[number - 1]
        if not _ALPHANUMERIC.search(raw):
            continue
        if number not in claimed:
            found.append((number, shown(raw)))
        elif lines.line(number).junk:
            found.append((number, shown(lines.line(number).junk)))
        if len(raw) > LONGEST_LINE:
            found.append((number, f"{len(raw) - LONGEST_LINE} characters of a line of {len(raw)} were not read"))
    return found


def of_kind(dumps: Sequence[TextDump], kind: str) -> List[TextDump]:
    """The dumps of a kind ("vmcs", "vmcb") that hold values; FormatError where there is none, naming what else the text has."""
    found = [dump for dump in dumps if dump.kind == kind and dump.values]
    # Registers that QEMU prints beside a real dump are not a second one.
    found = [dump for dump in found if dump.dialect != registers.QEMU] or found
    if not found:
        what = kind.upper()
        others = [dump for dump in dumps if dump.kind != kind and dump.values]
        hint = f"; it has {describe(others)}" if others else f"; looked for {LOOKED_FOR}"
        raise FormatError("text", f"no {what} dump in it{hint}")
    return found


def _choose(dumps: Sequence[TextDump], kind: str, index: Optional[int]) -> TextDump:
    """The dump that is meant; FormatError where there is none, or several and no index."""
    found, what = of_kind(dumps, kind), kind.upper()
    if index is None:
        if len(found) > 1:
            raise FormatError("text", f"{len(found)} {what} dumps in it, choose one by its index: {describe(found)}")
        return found[0]
    if not 0 <= index < len(found):
        raise UsageError(f"no {what} dump {index} in the text; it has {describe(found)}")
    return found[index]


def vmcs_from_text(text: str, index: Optional[int] = None) -> Vmcs:
    """The VMCS in a log.  `index` from 0 picks one of several.

    Raises FormatError where the text has no VMCS dump, or several and no `index` (the error lists them with their lines).
    """
    return _choose(parse(text), "vmcs", index).vmcs()


def vmcb_from_text(text: str, index: Optional[int] = None) -> Vmcb:
    """The VMCB in a log.  `index` from 0 picks one of several.

    Raises FormatError where the text has no VMCB dump, or several and no `index` (the error lists them with their lines).
    """
    return _choose(parse(text), "vmcb", index).vmcb()


def _json_document(text: str) -> Optional[List[TextDump]]:
    """The dumps of a JSON text, None where it is none."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    last = text.count("\n") + 1
    dumps = []
    for kind in ("vmcs", "vmcb"):
        builder = Builder(kind)
        for name, value in _pairs(document):
            row: Any = vmcs_fields.get(name) if kind == "vmcs" else vmcb_fields.get(name)
            if row is not None:
                builder.add(row.encoding if kind == "vmcs" else row.name, value, 1)
        if len(builder.seen) > 1:
            values = {key: TextValue(found[0].value, 1, f"JSON, {builder.name(key)}") for key, found in builder.seen.items()
                      if len({item.value for item in found}) == 1}
            dumps.append(TextDump(kind, "JSON", in_field_order(kind, values), 1, last))
    # Some names mean a field in both; the kind that knows more of them is meant.
    return sorted(dumps, key=lambda dump: -len(dump.values))[:1]


def _pairs(document: Any) -> Iterator[Tuple[str, int]]:
    """Names and numbers: {"GUEST_RIP": "0x10"} or {"name": "GUEST_RIP", "value": "0x10"}, at any depth."""
    pending = [document]
    seen = 0
    while pending and seen < 1_000_000:
        seen += 1
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            yield from _pairs_of(item)
            pending.extend(value for value in item.values() if isinstance(value, (dict, list)))


def _pairs_of(item: Dict[str, Any]) -> Iterator[Tuple[str, int]]:
    name = item.get("name", item.get("field"))
    if isinstance(name, str) and "value" in item:
        number = _json_number(item["value"])
        if number is not None:
            yield name, number
        return
    for key, value in item.items():
        number = _json_number(value)
        if number is not None and not isinstance(value, bool):
            yield key, number


def _json_number(value: Any) -> Optional[int]:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", value):
        return int(value, 16)
    return None
