"""A VMCS as values by field, wherever they came from: a page and its layout, VMREADs, pasted text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from vtdbg.errors import FormatError, UnknownName
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.fields import VmcsField

if TYPE_CHECKING:
    from vtdbg.vmx.layouts import Candidate, Layout

Name = Union[str, int]


@dataclass(frozen=True)
class FieldValue:
    """A field, its value, and where the value is from ("page offset 0x1c8, layout bochs_2.7", "text line 12")."""

    field: VmcsField
    value: int
    source: str


class MissingField(UnknownName):
    """The field exists, this VMCS does not have its value: the layout lacks it, or nobody gave it."""

    def __init__(self, field: VmcsField, origin: str) -> None:
        self.field = field
        super().__init__("value", field.name)
        self.message = f"{field.name} ({field.title}) is unknown: {origin}"
        self.args = (self.message,)


class Vmcs:
    """Values by field.  A field that is absent is unknown, never 0.

    `layout`, `candidates`, `revision_id`, `shadow`, `abort_indicator`, `launch_state` are known for a page, None otherwise.
    `warnings` is what a reader must be told (stale, guessed, inferred).
    """

    def __init__(self, values: Mapping[int, FieldValue], origin: str, *, layout: "Optional[Layout]" = None,
                 candidates: "Sequence[Candidate]" = (), revision_id: Optional[int] = None, shadow: Optional[bool] = None,
                 abort_indicator: Optional[int] = None, launch_state: Optional[int] = None, warnings: Sequence[str] = ()) -> None:
        self._values: Dict[int, FieldValue] = dict(sorted(values.items()))
        self.origin = origin
        self.layout = layout
        self.candidates = tuple(candidates)
        self.revision_id = revision_id
        self.shadow = shadow
        self.abort_indicator = abort_indicator
        self.launch_state = launch_state
        self.warnings: List[str] = list(warnings)

    @classmethod
    def from_values(cls, values: Mapping[Name, int], source: str = "given value") -> "Vmcs":
        """Values by encoding or by any known name: {0x681E: 0x1000, "HOST_RIP": ...}.

        Raises UnknownName for a field that nobody knows, FormatError for a value wider than the field.
        """
        decoded: Dict[int, FieldValue] = {}
        for name, value in values.items():
            field = vmcs_fields.find(name)
            if value < 0 or value >> (field.size * 8):
                raise FormatError(field.name, f"value {value:#x} does not fit in {field.size * 8} bits")
            decoded[field.encoding] = FieldValue(field, value, source)
        return cls(decoded, source)

    @classmethod
    def from_page(cls, page: bytes, layout: "Union[str, Layout, Path, None]" = None, source: str = "page") -> "Vmcs":
        """Bytes of a VMCS region (up to 4096).  `layout` by name, by file or as an object; None recognises it by content.

        Raises FormatError where no layout fits, or where two fit equally well: the error lists the candidates with their scores.
        """
        from vtdbg.vmx import layouts

        return layouts.decode_page(page, layout, source)

    @classmethod
    def from_text(cls, text: str, index: Optional[int] = None) -> "Vmcs":
        """A VMCS out of a log: KVM's dump_vmcs, Xen, hvext, HAXM, VirtualBox.  `index` picks one of several dumps in the text.

        Raises FormatError where the text has no dump, or several and no `index`.
        """
        from vtdbg import textdump

        return textdump.vmcs_from_text(text, index)

    def __getitem__(self, name: Name) -> int:
        return self.value(name).value

    def value(self, name: Name) -> FieldValue:
        """The value with its provenance; UnknownName for no such field, MissingField (a KeyError) where this VMCS lacks it."""
        field = vmcs_fields.find(name)
        found = self._values.get(field.encoding)
        if found is None:
            lacking = f"layout {self.layout.id} has no place for it" if self.layout else f"not in the {self.origin}"
            raise MissingField(field, lacking)
        return found

    def get(self, name: Name, default: Optional[int] = None) -> Optional[int]:
        """The value, or `default` where it is unknown; a name that nobody knows still raises UnknownName."""
        found = self._values.get(vmcs_fields.find(name).encoding)
        return default if found is None else found.value

    def source(self, name: Name) -> str:
        return self.value(name).source

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, (str, int)):
            return False
        field = vmcs_fields.get(name)
        return field is not None and field.encoding in self._values

    def __iter__(self) -> Iterator[str]:
        return (value.field.name for value in self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[Tuple[str, int]]:
        """(canonical name, value) in encoding order."""
        return ((value.field.name, value.value) for value in self._values.values())

    def values(self) -> Iterator[FieldValue]:
        """Every known value with its field and provenance, in encoding order."""
        return iter(self._values.values())

    def replaced(self, values: Mapping[Name, int], source: str = "given value") -> "Vmcs":
        """A copy with some values changed or added."""
        merged = dict(self._values)
        merged.update(Vmcs.from_values(values, source)._values)
        return Vmcs(merged, self.origin, layout=self.layout, candidates=self.candidates, revision_id=self.revision_id, shadow=self.shadow,
                    abort_indicator=self.abort_indicator, launch_state=self.launch_state, warnings=self.warnings)
