"""One map of a VMCS page: which field is where, and in which form; decoding a page and writing one."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Dict, Mapping, NamedTuple, Optional, Tuple

from vtdbg.errors import FormatError
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.fields import VmcsField
from vtdbg.vmx.vmcs import Name

PAGE_SIZE = 4096
SHADOW_BIT = 1 << 31
"""Bit 31 of the first dword is the shadow-VMCS indicator, bits 30:0 the revision identifier (SDM vol. 3, Format of the VMCS Region)."""

ACCESS_RIGHTS_FIELDS = frozenset(range(0x4814, 0x4824, 2))
"""Guest ES to TR access rights, the only fields that some processors store in another form."""

ACCESS_RIGHTS_FORMS = {
    "plain": "32 bits as VMREAD gives them",
    "rotated": "32 bits, rotated left by 8",
    "packed": "16 bits, the unusable bit (16) moved to bit 11",
    "unknown": "not known: access rights are not decoded",
}

Span = Tuple[int, int]
"""(offset, size) in bytes"""


class LayoutField(NamedTuple):
    """Where one field is: `size` bytes at `offset`.  `note` says what is special ("inferred from ...", "until Linux 5.7")."""

    offset: int
    size: int
    note: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def inferred(self) -> bool:
        """Not published for this layout: taken from a relative."""
        return "inferred" in self.note


@dataclass(frozen=True)
class Layout:
    """One map of a VMCS page.

    `revision_ids` bits 30:0 of the first dword; `launch_state` (offset, size) or None where it is not known, its values in
    `launch_states`; `access_rights` a key of ACCESS_RIGHTS_FORMS; `complete`: every byte that is not in `fields`, header or `other`
    is unused (software layouts), so that data there speak against the layout.  `fields` by encoding.  `caveats` is what a reader of
    values has to be told, `notes` what explains the layout (formula, single source).
    """

    id: str
    title: str
    revision_ids: Tuple[int, ...]
    region_size: int
    access_rights: str
    fields: Mapping[int, LayoutField]
    revision_offset: int = 0
    abort_offset: Optional[int] = 4
    launch_state: Optional[Span] = None
    launch_states: Mapping[int, str] = dataclass_field(default_factory=dict)
    complete: bool = False
    other: Mapping[str, Span] = dataclass_field(default_factory=dict)
    sources: Tuple[str, ...] = ()
    caveats: Tuple[str, ...] = ()
    notes: Tuple[str, ...] = ()
    valid_for: str = ""

    @cached_property
    def extent(self) -> int:
        """Bytes of a page that decoding needs: the end of the last field."""
        return max([place.end for place in self.fields.values()] + [8])

    def gaps(self, size: int) -> Tuple[Span, ...]:
        """(first, end) of the bytes below `size` that belong to no field, header or other known member."""
        return tuple((first, min(last, size)) for first, last in self._gaps if first < size)

    @cached_property
    def _gaps(self) -> Tuple[Span, ...]:
        taken = [(self.revision_offset, 4), *self.other.values(), *((place.offset, place.size) for place in self.fields.values())]
        taken += [(self.abort_offset, 4)] if self.abort_offset is not None else []
        taken += [self.launch_state] if self.launch_state is not None else []
        found, at = [], 0
        for offset, size in sorted(taken):
            if offset > at:
                found.append((at, offset))
            at = max(at, offset + size)
        return (*found, (at, PAGE_SIZE)) if at < PAGE_SIZE else tuple(found)

    def launch_state_name(self, value: Optional[int]) -> str:
        """"clear", "launched", or the number where the layout has no word for it; "unknown" for None."""
        return "unknown" if value is None else self.launch_states.get(value, f"{value:#x} (no meaning in this layout)")

    def raw_values(self, page: bytes) -> Dict[int, int]:
        """Field values by encoding, as VMREAD would give them, without provenance: what recognition scores.

        Access rights of an unknown form are left out.  The page has to have `extent` bytes.
        """
        values: Dict[int, int] = {}
        form = self.access_rights
        for encoding, place in self.fields.items():
            value = int.from_bytes(page[place.offset:place.offset + place.size], "little")
            if encoding in ACCESS_RIGHTS_FIELDS and form != "plain":
                if form == "unknown":
                    continue
                value = unpacked(value) if form == "packed" else rotated_right(value)
            values[encoding] = value
        return values

    def write_page(self, values: Mapping[Name, int], *, revision_id: Optional[int] = None, shadow: bool = False,
                   abort_indicator: int = 0, launch_state: int = 0) -> bytes:
        """The page that decodes to `values` (by encoding or any known name): `region_size` bytes, zeros where nothing is given.

        Raises UnknownName for a field that nobody knows, FormatError where the layout has no place for it or it does not fit.
        """
        page = bytearray(self.region_size)
        revision = self.revision_ids[0] if revision_id is None else revision_id
        self._store(page, "revision identifier", self.revision_offset, 4, revision | (SHADOW_BIT if shadow else 0))
        if self.abort_offset is not None:
            self._store(page, "abort indicator", self.abort_offset, 4, abort_indicator)
        if self.launch_state is not None:
            self._store(page, "launch state", *self.launch_state, launch_state)
        elif launch_state:
            raise FormatError(self.id, "the layout has no known place for the launch state")
        for name, value in values.items():
            field = vmcs_fields.find(name)
            place = self.fields.get(field.encoding)
            if place is None:
                raise FormatError(self.id, f"the layout has no place for {field.name}")
            if value < 0 or value >> (field.size * 8):
                raise FormatError(field.name, f"value {value:#x} does not fit in {field.size * 8} bits")
            self._store(page, field.name, place.offset, place.size, self._stored(field, value))
        return bytes(page)

    def _stored(self, field: VmcsField, value: int) -> int:
        if field.encoding not in ACCESS_RIGHTS_FIELDS:
            return value
        if self.access_rights == "unknown":
            raise FormatError(self.id, f"how {field.name} is stored is not known")
        return stored_access_rights(field, value, self.access_rights)

    def _store(self, page: bytearray, what: str, offset: int, size: int, value: int) -> None:
        if value < 0 or value >> (size * 8):
            raise FormatError(self.id, f"{what} {value:#x} does not fit in {size} bytes", offset)
        page[offset:offset + size] = value.to_bytes(size, "little")


def stored_access_rights(field: VmcsField, value: int, form: str) -> int:
    """Access rights `value` of `field`, as VMREAD gives them, in the `form` "plain", "rotated" or "packed"; FormatError where it cannot hold them."""
    if form == "packed":
        return _packed(field, value)
    return _rotated_left(value) if form == "rotated" else value


def _rotated_left(value: int) -> int:
    return ((value << 8) | (value >> 24)) & 0xFFFFFFFF


def rotated_right(value: int) -> int:
    """Rotated access rights as VMREAD gives them."""
    return ((value >> 8) | (value << 24)) & 0xFFFFFFFF


_PACKED_UNUSABLE = 1 << 11
_UNUSABLE = 1 << 16


def unpacked(value: int) -> int:
    """Packed access rights as VMREAD gives them."""
    return (value & ~_PACKED_UNUSABLE) | (_UNUSABLE if value & _PACKED_UNUSABLE else 0)


def _packed(field: VmcsField, value: int) -> int:
    if value & ~(_UNUSABLE | 0xFFFF) or value & _PACKED_UNUSABLE:
        raise FormatError(field.name, f"value {value:#x} has reserved bits that the packed form cannot hold")
    return (value & 0xFFFF) | (_PACKED_UNUSABLE if value & _UNUSABLE else 0)
