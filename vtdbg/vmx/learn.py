"""A VMCS layout out of one page and the values of its fields: who has VMREADs of a current VMCS and its page can learn where fields are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Tuple

from vtdbg.errors import FormatError
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, PAGE_SIZE, SHADOW_BIT, Layout, LayoutField

HEADER = 8
"""Revision identifier and VMX-abort indicator (SDM vol. 3, Format of the VMCS Region)."""


@dataclass(frozen=True)
class Learnt:
    """`layout` has the fields that could be placed; `unplaced` are the encodings that could not; `agreeing` (layout, fields in common) of the
    packaged layouts that contradict nothing."""

    layout: Layout
    unplaced: Tuple[int, ...]
    read: int
    agreeing: Tuple[Tuple[str, int], ...]


def learn(page: bytes, values: Mapping[int, int]) -> Learnt:
    """Places each field whose value stands at one place of the page only, and again with the places that are taken left out.

    `page` 4096 bytes, `values` by encoding.  The form of access rights is the one that places more of them.  Raises FormatError for a short page.
    """
    if len(page) < PAGE_SIZE:
        raise FormatError("page", f"{len(page)} bytes; a VMCS region is read as one page")
    best: Dict[int, LayoutField] = {}
    form = "plain"
    for candidate in ("plain", "rotated"):
        placed = _place(page, values, candidate)
        if sum(encoding in ACCESS_RIGHTS_FIELDS for encoding in placed) > sum(encoding in ACCESS_RIGHTS_FIELDS for encoding in best) or not best:
            best, form = placed, candidate
    revision = int.from_bytes(page[:4], "little") & ~SHADOW_BIT
    layout = Layout(f"learnt_{revision:x}", f"learnt by VMREAD, revision {revision:#x}", (revision,), PAGE_SIZE, form, dict(sorted(best.items())),
                    sources=("VMREAD values compared with the page of the same VMCS",),
                    caveats=("learnt from one VMCS: fields that were 0 or not unique are missing",))
    return Learnt(layout, tuple(sorted(set(values) - set(best))), len(values), _agreeing(best, form))


def _stored(encoding: int, value: int, form: str) -> bytes:
    size = vmcs_fields.find(encoding).size
    if form == "rotated" and encoding in ACCESS_RIGHTS_FIELDS:
        value = (value << 8 | value >> 24) & 0xFFFFFFFF
    return value.to_bytes(size, "little")


def _places(page: bytes, data: bytes) -> List[int]:
    found, at = [], page.find(data, HEADER)
    while at >= 0:
        if at % min(len(data), 4) == 0:
            found.append(at)
        at = page.find(data, at + 1)
    return found


def _place(page: bytes, values: Mapping[int, int], form: str) -> Dict[int, LayoutField]:
    stored = {encoding: _stored(encoding, value, form) for encoding, value in values.items() if value}
    owners: Dict[bytes, int] = {}
    for data in stored.values():
        owners[data] = owners.get(data, 0) + 1
    # A value that two fields share cannot tell them apart, wherever it stands.
    open_fields = {encoding: _places(page, data) for encoding, data in stored.items() if owners[data] == 1}
    placed: Dict[int, LayoutField] = {}
    taken = bytearray(PAGE_SIZE)
    # The long and distinctive first: a 16-bit value is found inside longer ones.
    progress = True
    while progress:
        progress = False
        for encoding in sorted(open_fields, key=lambda item: -len(stored[item])):
            size = len(stored[encoding])
            free = [at for at in open_fields[encoding] if not any(taken[at:at + size])]
            if len(free) == 1 and (size > 2 or not any(len(stored[other]) > 2 for other in open_fields if other != encoding)):
                placed[encoding] = LayoutField(free[0], size)
                taken[free[0]:free[0] + size] = b"\1" * size
                del open_fields[encoding]
                progress = True
        if not progress and any(len(stored[item]) > 2 for item in open_fields):
            # What is left of the longer ones is ambiguous for good; the short ones may still be told apart.
            open_fields = {encoding: places for encoding, places in open_fields.items() if len(stored[encoding]) <= 2}
            progress = bool(open_fields)
    return placed


def _agreeing(placed: Mapping[int, LayoutField], form: str) -> Tuple[Tuple[str, int], ...]:
    from vtdbg.vmx.layouts import layouts

    rows = []
    for known in layouts().values():
        common = [encoding for encoding in placed if encoding in known.fields]
        same = [encoding for encoding in common if known.fields[encoding].offset == placed[encoding].offset]
        if common and len(same) == len(common) and known.access_rights in (form, "unknown"):
            rows.append((known.id, len(same)))
    return tuple(sorted(rows, key=lambda row: -row[1]))
