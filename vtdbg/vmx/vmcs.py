"""A VMCS as values by field, wherever they came from: a page and its layout, VMREADs, pasted text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, NamedTuple, Optional, Sequence, Union

from vtdbg.record import MissingField, Name, Record, checked_values
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.fields import VmcsField

if TYPE_CHECKING:
    import os

    from vtdbg.vmx.layouts import Candidate, Layout

__all__ = ["FieldValue", "MissingField", "Name", "Vmcs"]


class FieldValue(NamedTuple):
    """A field, its value, and where the value is from ("page offset 0x1c8, layout bochs_2.7", "text line 12")."""

    field: VmcsField
    value: int
    source: str


class Vmcs(Record[VmcsField, FieldValue]):
    """Values by field.  A field that is absent is unknown, never 0.

    `layout`, `candidates`, `revision_id`, `shadow`, `abort_indicator`, `launch_state` are known for a page, None otherwise.
    `warnings` is what a reader must be told (stale, guessed, inferred).  `empty`: a page that holds nothing except its header; it has no
    values, because zeros that no processor has stored are not the fields' values.  `absent` says of single fields why they are unknown.
    """

    def __init__(self, values: Mapping[int, FieldValue], origin: str, *, layout: "Optional[Layout]" = None,
                 candidates: "Sequence[Candidate]" = (), revision_id: Optional[int] = None, shadow: Optional[bool] = None,
                 abort_indicator: Optional[int] = None, launch_state: Optional[int] = None, warnings: Sequence[str] = (),
                 empty: bool = False, absent: Optional[Mapping[int, str]] = None) -> None:
        super().__init__(values, origin, warnings)
        self.layout = layout
        self.candidates = tuple(candidates)
        self.revision_id = revision_id
        self.shadow = shadow
        self.abort_indicator = abort_indicator
        self.launch_state = launch_state
        self.empty = empty
        self.absent: Mapping[int, str] = dict(absent or {})

    def _find(self, name: Name) -> VmcsField:
        return vmcs_fields.find(name)

    def _known(self, name: Name) -> Optional[VmcsField]:
        return vmcs_fields.get(name)

    def _lacking(self, field: VmcsField) -> str:
        if self.empty:
            return f"{self.origin} holds nothing except its header"
        if field.encoding in self.absent:
            return self.absent[field.encoding]
        return f"layout {self.layout.id} has no place for it" if self.layout else super()._lacking(field)

    @classmethod
    def from_values(cls, values: Mapping[Name, int], source: str = "given value") -> "Vmcs":
        """Values by encoding or by any known name: {0x681E: 0x1000, "HOST_RIP": ...}.

        Raises UnknownName for a field that nobody knows, FormatError for a value wider than the field.
        """
        return cls(checked_values(values, vmcs_fields.find, lambda field, value: FieldValue(field, value, source)), source)

    @classmethod
    def from_page(cls, page: bytes, layout: "Union[str, os.PathLike[str], Layout, None]" = None, source: str = "page") -> "Vmcs":
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

    def replaced(self, values: Mapping[Name, int], source: str = "given value") -> "Vmcs":
        """A copy with some values changed or added."""
        merged = dict(self._values)
        merged.update(Vmcs.from_values(values, source)._values)
        return Vmcs(merged, self.origin, layout=self.layout, candidates=self.candidates, revision_id=self.revision_id, shadow=self.shadow,
                    abort_indicator=self.abort_indicator, launch_state=self.launch_state, warnings=self.warnings,
                    absent=self.absent)
