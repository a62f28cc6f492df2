"""What two VMCSs or two VMCBs say differently: only what differs, bit by bit, each with what the change means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from vtdbg.bits import BitTable, read_rows
from vtdbg.record import Record

SUSPICIOUS, CONTROL, PROGRESS, UNUSED = "suspicious", "control", "progress", "unused"
CLASSES: Mapping[str, str] = {
    SUSPICIOUS: "Suspicious: set once in a guest's life, or worth a look",
    CONTROL: "Control changes: what the hypervisor wants has changed",
    PROGRESS: "Guest progress: the guest runs, exits happen",
    UNUSED: "Without effect: the controls leave these fields unused on both sides",
}
"""Classes in the order of a report."""


class Meaning(NamedTuple):
    """The class of a change and why."""

    name: str
    why: str


class BitChange(NamedTuple):
    """A field inside a word: identifier (or "bits 5:3" where it has none), and its meaning before and after."""

    ident: str
    before: str
    after: str
    flag: bool

    def __str__(self) -> str:
        if self.flag:
            return f"{self.ident} {'set' if self.after != '0x0' and self.after != '0' else 'cleared'}"
        return f"{self.ident} {self.before} -> {self.after}"


@dataclass(frozen=True)
class FieldChange:
    """A field (a row of the field table) that both sides know and that differs.  `before` and `after` are its values,
    `bits` what of a word with a bit table changed."""

    field: Any
    before: int
    after: int
    bits: Tuple[BitChange, ...]
    meaning: Meaning
    sources: Tuple[str, str]

    @property
    def name(self) -> str:
        return str(self.field.name)

    @property
    def title(self) -> str:
        return str(self.field.title)

    @property
    def group(self) -> str:
        return str(self.field.group)

    @property
    def digits(self) -> int:
        """Hex digits of a full value."""
        return int(self.field.digits)

    @property
    def step(self) -> int:
        """How far a plain number went, as a signed number of the field's width."""
        width = self.digits * 4
        difference = (self.after - self.before) & ((1 << width) - 1)
        return difference - (1 << width) if difference >> (width - 1) else difference


@dataclass(frozen=True)
class RecordDiff:
    """`changes` by class in the order of CLASSES and by field inside; `equal` fields are the same; fields that one side does not know are no
    difference and no agreement."""

    changes: Tuple[FieldChange, ...]
    equal: int
    only_before: Tuple[str, ...]
    only_after: Tuple[str, ...]


Unused = Callable[[Any, Any], Optional[str]]
"""(record, field) -> why the field does not count there, None where it does or where that is unknown."""


def diff_records(kind: str, before: "Record[Any, Any]", after: "Record[Any, Any]", unused: Unused) -> RecordDiff:
    """The fields of two records of a kind ("vmcs", "vmcb") that differ.  `unused` is the kind's `unused_because`."""
    second = {value.field.number: value for value in after.values()}
    known: Dict[int, Any] = {}
    changes: List[FieldChange] = []
    equal = 0
    for value in before.values():
        field = value.field
        known[field.number] = value
        other = second.get(field.number)
        if other is None:
            continue
        if other.value == value.value:
            equal += 1
            continue
        why = unused(before, field)
        meaning = Meaning(UNUSED, why) if why and unused(after, field) else meaning_of(kind, field, value.value ^ other.value)
        bits = _bits(field.table, value.value, other.value) if field.table is not None else ()
        changes.append(FieldChange(field, value.value, other.value, bits, meaning, (value.source, other.source)))
    order = list(CLASSES)
    changes.sort(key=lambda change: order.index(change.meaning.name))
    return RecordDiff(tuple(changes), equal, tuple(value.field.name for number, value in known.items() if number not in second),
                      tuple(value.field.name for number, value in second.items() if number not in known))


def _bits(table: BitTable, before: int, after: int) -> Tuple[BitChange, ...]:
    changed = before ^ after
    rows = [row for row in table.fields if row.mask & changed and row.kind not in ("address", "linear")]
    found = [BitChange(row.ident or f"bits {row.bits}", row.meaning(before), row.meaning(after), row.high == row.low and not row.values)
             for row in rows]
    outside = changed & ~table.defined_mask()
    if outside:
        found.append(BitChange(f"undefined bits {outside:#x}", f"{before & outside:#x}", f"{after & outside:#x}", flag=False))
    return tuple(found)


# ---- what a change means ------------------------------------------------------------------------------------------------------------

class _Row(NamedTuple):
    bits: Tuple[str, ...]
    meaning: Meaning


@cache
def _rows(kind: str) -> Mapping[str, Tuple[_Row, ...]]:
    found: Dict[str, List[_Row]] = {}
    for row in read_rows("diff_classes.csv"):
        if row["kind"] == kind:
            found.setdefault(row["match"], []).append(_Row(tuple(filter(None, row["bits"].split(";"))), Meaning(row["class"], row["why"])))
    return {match: tuple(sorted(rows, key=lambda row: not row.bits)) for match, rows in found.items()}


def meaning_of(kind: str, field: Any, changed: int) -> Meaning:
    """What it means that the bits `changed` of a field changed (data/diff_classes.csv)."""
    table: Optional[BitTable] = field.table
    for match in (field.name, f"group:{field.group}"):
        for row in _rows(kind).get(match, ()):
            if not row.bits or (table is not None and any(table[ident].mask & changed for ident in row.bits)):
                return row.meaning
    return Meaning(SUSPICIOUS, "nothing is known of how this field changes")
