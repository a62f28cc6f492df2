"""A VMCB as values by field, wherever they came from: a page, given values, pasted text.  The encrypted VMSA has a layout of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence

from vtdbg.errors import FormatError
from vtdbg.record import MissingField, Name, Record, checked_values
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm.fields import VmcbField

__all__ = ["FieldValue", "MissingField", "Name", "Vmcb"]

PAGE = 4096
SEV_ES = 1 << 2
"""Of nested_ctl (APM vol. 2, appendix VMCB Layout, Control Area)."""


@dataclass(frozen=True)
class FieldValue:
    """A field, its value, and where the value is from ("VMCB offset 0x70", "text line 12")."""

    field: VmcbField
    value: int
    source: str

    @property
    def data(self) -> bytes:
        """The value as it is in memory."""
        return self.value.to_bytes(self.field.size, "little")


class Vmcb(Record[VmcbField, FieldValue]):
    """Values by field.  A field that is absent is unknown, never 0.

    Names are Linux' ("exit_code", "cs.selector"), offsets count too (`vmcb[0x70]`).  `layout` is "vmcb" or "vmsa".
    `warnings` is what a reader must be told (cut page, SEV-ES save area).
    """

    def __init__(self, values: Mapping[int, FieldValue], origin: str, *, layout: str = "vmcb", warnings: Sequence[str] = ()) -> None:
        super().__init__(values, origin, warnings)
        self.layout = layout

    def _find(self, name: Name) -> VmcbField:
        return vmcb_fields.find(name, self.layout)

    def _known(self, name: Name) -> Optional[VmcbField]:
        return vmcb_fields.get(name, self.layout)

    @classmethod
    def from_values(cls, values: Mapping[Name, int], source: str = "given value", layout: str = "vmcb") -> "Vmcb":
        """Values by offset or by any known name: {"rip": 0x1000, 0x70: 0x400}.

        Raises UnknownName for a field that nobody knows, FormatError for a value wider than the field.
        """
        checked = checked_values(values, lambda name: vmcb_fields.find(name, layout), lambda field, value: FieldValue(field, value, source))
        return cls(checked, source, layout=layout)

    @classmethod
    def from_page(cls, page: bytes, layout: str = "vmcb", source: Optional[str] = None) -> "Vmcb":
        """Bytes of a VMCB, or of a VMSA (decrypted), up to 4096; fields beyond the last byte are unknown.

        `source` names the page in the provenance ("VMCB at 0x1f22000"; default "VMCB").  Raises FormatError for no bytes or more than a page.
        """
        rows = vmcb_fields.fields(layout)
        origin = source or vmcb_fields.LAYOUTS[layout]
        if not 0 < len(page) <= PAGE:
            raise FormatError(origin, f"{len(page)} bytes; {vmcb_fields.LAYOUTS[layout]} is one page of {PAGE}")
        values = {offset: FieldValue(row, int.from_bytes(page[offset:offset + row.size], "little"), f"{origin} offset {offset:#x}")
                  for offset, row in rows.items() if offset + row.size <= len(page)}
        return cls(values, origin, layout=layout, warnings=_page_warnings(values, rows, len(page), layout))

    @classmethod
    def from_text(cls, text: str, index: Optional[int] = None) -> "Vmcb":
        """A VMCB out of a log: KVM's dump_vmcb, Xen.  `index` picks one of several dumps in the text.

        Raises FormatError where the text has no dump, or several and no `index`.
        """
        from vtdbg import textdump

        return textdump.vmcb_from_text(text, index)

    def replaced(self, values: Mapping[Name, int], source: str = "given value") -> "Vmcb":
        """A copy with some values changed or added."""
        merged = dict(self._values)
        merged.update(Vmcb.from_values(values, source, self.layout)._values)
        return Vmcb(merged, self.origin, layout=self.layout, warnings=self.warnings)

    def without(self, *names: Name) -> "Vmcb":
        """A copy in which these fields are unknown."""
        gone = {self._find(name).number for name in names}
        return Vmcb({number: value for number, value in self._values.items() if number not in gone}, self.origin, layout=self.layout,
                    warnings=self.warnings)


def _page_warnings(values: Mapping[int, FieldValue], rows: Mapping[int, VmcbField], size: int, layout: str) -> List[str]:
    warnings = []
    missing = len(rows) - len(values)
    if missing:
        warnings.append(f"only {size:#x} of {PAGE:#x} bytes: {missing} fields are unknown")
    nested_ctl = values.get(vmcb_fields.find("nested_ctl").offset) if layout == "vmcb" else None
    if nested_ctl is not None and nested_ctl.value & SEV_ES:
        warnings.append("SEV-ES: the guest's state is in the encrypted VMSA; what the save area here holds is not it")
    return warnings
