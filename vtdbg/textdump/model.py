"""What comes out of a text: dumps, their values with the line each is from, and what was not understood."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

from vtdbg.errors import FormatError
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm.vmcb import FieldValue as VmcbValue
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.vmcs import FieldValue as VmcsValue
from vtdbg.vmx.vmcs import Vmcs

Key = Union[int, str]
"""A VMCS encoding, or a VMCB field's Linux name."""


@dataclass(frozen=True)
class TextValue:
    """A value and where it is from: "text line 12", with what limits it in parentheses."""

    value: int
    line: int
    source: str


@dataclass
class TextDump:
    """One dump.

    `kind` "vmcs", "vmcb" or "registers"; `dialect` who printed it; `values` by VMCS encoding or by VMCB field name;
    `unparsed` the lines inside the dump that were not understood; `notes` what a reader must know; `extras` what is no field
    (general registers, MSR lists, the effective EFER, the failure line); `counts` of values, lines and unparsed lines.
    """

    kind: str
    dialect: str
    values: Dict[Key, TextValue]
    first_line: int
    last_line: int
    unparsed: List[Tuple[int, str]] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    extras: Dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> Mapping[str, int]:
        return {"values": len(self.values), "lines": self.last_line - self.first_line + 1, "unparsed": len(self.unparsed)}

    @property
    def origin(self) -> str:
        return f"{self.dialect} text, lines {self.first_line}-{self.last_line}"

    def warnings(self) -> List[str]:
        """The notes, and that lines were not understood."""
        unread = [f"{len(self.unparsed)} lines of the dump were not understood, first line {self.unparsed[0][0]}: {self.unparsed[0][1]}"
                  ] if self.unparsed else []
        return self.notes + unread

    def vmcs(self) -> Vmcs:
        """The values as a Vmcs; FormatError where this is no VMCS dump."""
        if self.kind != "vmcs":
            raise FormatError(self.origin, f"is a {self.kind} dump, not a VMCS dump")
        values = {encoding: VmcsValue(vmcs_fields.find(encoding), found.value, found.source) for encoding, found in self.values.items()
                  if isinstance(encoding, int)}
        return Vmcs(values, self.origin, warnings=self.warnings())

    def vmcb(self) -> Vmcb:
        """The values as a Vmcb; FormatError where this is no VMCB dump."""
        if self.kind != "vmcb":
            raise FormatError(self.origin, f"is a {self.kind} dump, not a VMCB dump")
        values = {}
        for name, found in self.values.items():
            row = vmcb_fields.find(name)
            values[row.offset] = VmcbValue(row, found.value, found.source)
        return Vmcb(values, self.origin, warnings=self.warnings())


class Builder:
    """Collects the values of one dump; values that contradict each other are a sign of two dumps mixed in one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.seen: Dict[Key, List[TextValue]] = {}
        self.lines: Set[int] = set()
        """Lines of which something was understood."""
        self.notes: List[str] = []
        self.extras: Dict[str, Any] = {}

    def size(self, key: Key) -> int:
        return vmcs_fields.find(key).size if self.kind == "vmcs" else vmcb_fields.find(key).size

    def add(self, key: Key, value: int, line: int, remark: str = "") -> bool:
        """A value as printed on `line`; False (and nothing kept) where it does not fit in the field."""
        if value < 0 or value >> (self.size(key) * 8):
            return False
        source = f"text line {line}" + (f" ({remark})" if remark else "")
        self.seen.setdefault(key, []).append(TextValue(value, line, source))
        self.lines.add(line)
        return True

    def add_name(self, name: str, value: int, line: int, remark: str = "") -> bool:
        """The same by canonical field name."""
        key: Key = vmcs_fields.find(name).encoding if self.kind == "vmcs" else name
        return self.add(key, value, line, remark)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def has(self, name: str) -> bool:
        key: Key = vmcs_fields.find(name).encoding if self.kind == "vmcs" else name
        return key in self.seen

    def value(self, name: str) -> Optional[int]:
        key: Key = vmcs_fields.find(name).encoding if self.kind == "vmcs" else name
        return self.seen[key][0].value if key in self.seen else None

    def remark(self, name: str, remark: str) -> None:
        """Says more about where a value is from."""
        key: Key = vmcs_fields.find(name).encoding if self.kind == "vmcs" else name
        if key in self.seen:
            self.seen[key] = [TextValue(found.value, found.line, f"text line {found.line} ({remark})") for found in self.seen[key]]

    def settled(self) -> Dict[Key, TextValue]:
        """One value a field; none where the text has two for it."""
        values: Dict[Key, TextValue] = {}
        for key, found in self.seen.items():
            if len({item.value for item in found}) == 1:
                values[key] = found[0]
            else:
                lines = " and ".join(str(item.line) for item in found[:3])
                self.note(f"{self.name(key)} has different values on lines {lines}: none is used")
        return values

    def keep_agreed(self) -> None:
        """Of dumps that were printed at the same time: only what is printed more than once, always with the same value."""
        before = len(self.seen)
        self.seen = {key: found for key, found in self.seen.items() if len(found) > 1 and len({item.value for item in found}) == 1}
        self.extras["mixed"] = True
        self.note(f"several processors printed at the same time: {before - len(self.seen)} fields are left out because nothing says "
                  "which dump a line belongs to")

    def name(self, key: Key) -> str:
        return vmcs_fields.find(key).name if self.kind == "vmcs" else str(key)


@dataclass(frozen=True)
class Segment:
    """A piece of text that can be of one dump: `starts` with what its program prints first, `ends` with what it prints late,
    `hole`: something that is always printed is missing in between."""

    starts: bool
    ends: bool
    hole: bool


def mixed(segments: Sequence[Segment]) -> bool:
    """Whether dumps that follow each other were printed at the same time, so that a piece can hold lines of two.

    Where a processor's lines go on after another's, an earlier piece is incomplete and a later one has no beginning, or a hole where
    it changes from one dump to the other.  A dump that is cut, before a whole one or after one, shows only one of the two.
    """
    earlier, later = segments[:-1], segments[1:]
    headless = any(not segment.starts for segment in later)
    incomplete = any(not segment.ends or segment.hole for segment in earlier)
    cut = any(not segment.ends for segment in earlier)
    return (headless and incomplete) or (cut and any(segment.hole for segment in later))


def in_field_order(kind: str, values: Mapping[Key, TextValue]) -> Dict[Key, TextValue]:
    """Values in the order of the field table."""
    if kind == "vmcb":
        return dict(sorted(values.items(), key=lambda item: vmcb_fields.find(item[0]).offset))
    return dict(sorted(values.items(), key=lambda item: item[0] if isinstance(item[0], int) else 0))


def describe(dumps: Sequence[TextDump]) -> str:
    """"0: KVM dump_vmcs, lines 3-40 (98 values); 1: ..."."""
    return "; ".join(f"{index}: {dump.dialect}, lines {dump.first_line}-{dump.last_line} ({len(dump.values)} values)"
                     for index, dump in enumerate(dumps))
