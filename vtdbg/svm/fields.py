"""The VMCB and VMSA fields: one row of `data/vmcb_fields.csv` each, found by offset or by any source's name for it."""

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

LAYOUTS = {"vmcb": "VMCB", "vmsa": "VMSA"}
"""vmcb: control area at 0, save area at 0x400.  vmsa: the save area of an SEV-ES guest, a page of its own that its key encrypts."""

GROUPS = {
    "intercepts": "Control area: intercepts",
    "control": "Control area: TSC, ASID, TLB, clean bits",
    "interrupt": "Control area: interrupts and event injection",
    "nested": "Control area: nested paging and virtualization extensions",
    "avic": "Control area: AVIC",
    "sev": "Control area: SEV-ES and SEV-SNP",
    "exit": "Control area: exit information",
    "decode": "Control area: decode assist",
    "software": "Control area: software (Hyper-V)",
    "segments": "State-save area: segments and descriptor tables",
    "registers": "State-save area: registers",
    "gprs": "State-save area: general-purpose registers",
    "msrs": "State-save area: MSRs",
    "cet": "State-save area: control-flow enforcement",
    "debug": "State-save area: debug and last-branch registers",
    "fpu": "State-save area: x87, SSE and AVX",
}
"""Groups in the order of the APM's appendix (APM vol. 2, appendix VMCB Layout)."""


class VmcbField(NamedTuple):
    """One field.  `size` in bytes, `kind` "int" or "bytes", `by` "vmload" for what VMRUN does not move; `gate` see the head of the CSV."""

    layout: str
    offset: int
    size: int
    name: str
    title: str
    group: str
    kind: str
    gate: str
    by: str
    bits: str
    aliases: Tuple[str, ...]
    notes: str

    @property
    def number(self) -> int:
        return self.offset

    @property
    def digits(self) -> int:
        """Hex digits of a full value."""
        return self.size * 2

    @property
    def table(self) -> "Optional[BitTable]":
        # Decoding a page needs the fields, not the bits of the fields.
        from vtdbg.bits import table

        return table(self.bits) if self.bits else None


def _field(row: Mapping[str, str]) -> VmcbField:
    return VmcbField(row["table"], int(row["offset"], 16), int(row["size"]), row["name"], row["title"], row["group"], row["kind"], row["gate"],
                     row["by"], row["bits"], tuple(filter(None, row["aliases"].split(";"))), row["source"])


@cache
def fields(layout: str = "vmcb") -> Mapping[int, VmcbField]:
    """Every known field of the layout ("vmcb", "vmsa") by its offset; UnknownName for another layout."""
    if layout not in LAYOUTS:
        raise UnknownName("VMCB layout", layout, near_names(layout, LAYOUTS))
    return {row.offset: row for row in map(_field, read_rows("vmcb_fields.csv")) if row.layout == layout}


@cache
def _by_name(layout: str) -> Dict[str, VmcbField]:
    return name_index(fields(layout).values())


def names(layout: str = "vmcb") -> List[str]:
    """Canonical names in offset order (completion)."""
    return [row.name for row in fields(layout).values()]


def find(name: Union[str, int], layout: str = "vmcb") -> VmcbField:
    """The field by offset (0x70, "0x70") or by any source's name in any case, "save." or "control." before it or not.

    Raises UnknownName with the near names, or with the field that covers the offset.
    """
    found = get(name, layout)
    if found is None:
        shown = hex(name) if isinstance(name, int) else name
        near = _near(name, layout)
        raise UnknownName(f"{LAYOUTS[layout]} field", shown, near)
    return found


def get(name: Union[str, int], layout: str = "vmcb") -> Optional[VmcbField]:
    """Like `find`, None where nobody knows it."""
    if isinstance(name, int):
        return fields(layout).get(name)
    text = name.strip()
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        return fields(layout).get(int(text, 16))
    known = _by_name(layout)
    area, _, member = text.partition(".")
    # Debuggers print Linux' struct vmcb as control.asid and save.cs.base.
    return known.get(name_key(text)) or (known.get(name_key(member)) if area.lower() in ("control", "save") else None)


def _near(name: Union[str, int], layout: str) -> Tuple[str, ...]:
    if isinstance(name, int):
        return _near_offsets(name, layout)
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", name.strip()):
        return _near_offsets(int(name, 16), layout)
    return near_names(re.sub(r"^(save|control)\.", "", name.strip().lower()), names(layout))


def _near_offsets(offset: int, layout: str) -> Tuple[str, ...]:
    rows = sorted(fields(layout).values(), key=lambda row: max(row.offset - offset, offset - row.offset - row.size + 1, 0))[:2]
    return tuple(f"{row.offset:#x} ({row.name}, {row.size} bytes)" for row in rows)
