"""The VMCS fields: one row of `data/vmcs_fields.csv` each, found by encoding or by any source's name for it."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from vtdbg.errors import UnknownName
from vtdbg.names import near_names
from vtdbg.record import name_index, name_key
from vtdbg.rows import read_rows

if TYPE_CHECKING:
    from vtdbg.bits import BitTable

WIDTHS = {"16": 2, "64": 8, "32": 4, "natural": 8}

GROUPS = {
    "guest-register": "Guest-state area: registers",
    "guest-non-register": "Guest-state area: non-register state",
    "host": "Host-state area",
    "execution-control": "VM-execution controls",
    "exit-control": "VM-exit controls",
    "entry-control": "VM-entry controls",
    "exit-info": "VM-exit information",
}
"""Groups in the SDM's order (SDM vol. 3, Organization of VMCS Data)."""

_ALIAS_COLUMNS = ("ia32doc", "bochs", "xen", "kut", "rust", "tdx", "vbox")


class VmcsField(NamedTuple):
    """One field.  `size` in bytes is what a VMREAD gives (natural-width: 8); `gate` see the head of vmcs_fields.csv."""

    encoding: int
    name: str
    title: str
    width: str
    type: str
    group: str
    gate: str
    bits: str
    aliases: Tuple[str, ...]
    notes: str

    @property
    def number(self) -> int:
        return self.encoding

    @property
    def size(self) -> int:
        return WIDTHS[self.width]

    @property
    def digits(self) -> int:
        """Hex digits of a full value."""
        return self.size * 2

    @property
    def table(self) -> "Optional[BitTable]":
        # Decoding a page needs the fields, not the bits of the fields.
        from vtdbg.bits import table

        return table(self.bits) if self.bits else None


def _field(row: Mapping[str, str]) -> VmcsField:
    aliases = tuple(dict.fromkeys(row[column] for column in _ALIAS_COLUMNS if row[column]))
    return VmcsField(int(row["encoding"], 16), row["name"], row["title"], row["width"], row["type"], row["group"],
                     row["gate"], row["bits"], aliases, row["notes"])


@cache
def fields() -> Mapping[int, VmcsField]:
    """Every known field by its (even, full-access) encoding, in encoding order."""
    rows = [_field(row) for row in read_rows("vmcs_fields.csv")]
    return {row.encoding: row for row in sorted(rows, key=lambda row: row.encoding)}


@cache
def by_canonical_name() -> Mapping[str, VmcsField]:
    """Every known field by its name, exactly as it is written here."""
    return {row.name: row for row in fields().values()}


@cache
def _by_name() -> Dict[str, VmcsField]:
    return name_index(fields().values())


def names() -> List[str]:
    """Canonical names in encoding order (completion)."""
    return [row.name for row in fields().values()]


def find(name: Union[str, int]) -> VmcsField:
    """The field by encoding (int, "0x681e", "26654") or by any source's name in any case; UnknownName with the near names.

    The high-access encoding of a 64-bit field (odd) finds the field itself.
    """
    found = get(name)
    if found is None:
        shown = hex(name) if isinstance(name, int) else name
        raise UnknownName("VMCS field", shown, _near(name.strip()) if isinstance(name, str) else near_encodings(name))
    return found


def get(name: Union[str, int]) -> Optional[VmcsField]:
    """Like `find`, None where nobody knows it."""
    if isinstance(name, str):
        canonical = by_canonical_name().get(name)
        if canonical is not None:
            return canonical
        text = name.strip()
        if re.fullmatch(r"0[xX][0-9a-fA-F]+|[1-9][0-9]*|0", text):
            return get(int(text, 0))
        return _by_name().get(name_key(text))
    found = fields().get(name)
    if found is None and name & 1:
        found = fields().get(name & ~1)
        # Only 64-bit fields have a high half (SDM vol. 3, Field Encoding in VMCS).
        if found is not None and found.width != "64":
            return None
    return found


def _near(name: str) -> Tuple[str, ...]:
    """For a number without its 0x the field that it would name with it."""
    if re.fullmatch(r"[0-9a-fA-F]{1,4}", name):
        meant = get(int(name, 16))
        return (f"{meant.encoding:#x} ({meant.name})",) if meant is not None else ()
    return near_encodings(int(name, 16)) if re.fullmatch(r"0[xX][0-9a-fA-F]+", name) else near_names(name, names())


def near_encodings(encoding: int) -> Tuple[str, ...]:
    close = sorted(fields(), key=lambda known: abs(known - encoding))[:2]
    return tuple(f"{known:#x} ({fields()[known].name})" for known in close)
