"""What the script of a report page draws: address spaces and MSR bitmaps as plain numbers and words."""

from __future__ import annotations

import base64
from typing import Any, Dict, List, Mapping, Union

from vtdbg.address_map import EXACT, PAGE, AddressMap, Meaning, letters_for, marked
from vtdbg.numbers import size_text
from vtdbg.svm.bitmaps import MSR_RANGES, MsrPermissionMap
from vtdbg.vmx.bitmaps import HIGH_FIRST, MsrBitmap
from vtdbg.x86 import msrs
from vtdbg.x86.permission import READ, WRITE

RANGE_MSRS = 0x2000


def map_data(picture: AddressMap, title: str, walk: str) -> Dict[str, Any]:
    """An address space: `walk` is the command line of a walk, with "{}" for the address.

    `pieces` are [first page, pages, mapped pages, page of the frame or null, ranges, [index in `meanings`, ...]]: page numbers, because a
    number of JavaScript is exact up to 2**53.
    """
    meanings: Dict[Meaning, int] = {}
    pieces: List[List[Any]] = []
    for piece in picture.pieces:
        indexes = [meanings.setdefault(meaning, len(meanings)) for meaning in piece.meanings]
        pieces.append([piece.start // PAGE, (piece.end - piece.start) // PAGE, piece.mapped // PAGE,
                       None if piece.target is None else piece.target // PAGE, piece.ranges, indexes])
    letters = letters_for((meaning.permissions for meaning in meanings if not meaning.problem), "perm")
    return {
        "title": title, "walk": walk, "pieces": pieces, "aggregated": picture.grain != EXACT,
        "meanings": [{"perm": meaning.permissions, "type": meaning.memory_type, "size": size_text(meaning.page_size) if meaning.page_size else "",
                      "flags": " ".join(meaning.flags), "problem": meaning.problem, "mark": marked(meaning),
                      "letter": letters.get(meaning.permissions, "")} for meaning in meanings],
    }


Bitmap = Union[MsrBitmap, MsrPermissionMap]


def msr_data(bitmap: Bitmap, title: str) -> Dict[str, Any]:
    """An MSR bitmap: for each range of 0x2000 MSRs the bits of reads and of writes (base64, one bit an MSR, 1: exits)."""
    firsts = tuple(MSR_RANGES) if isinstance(bitmap, MsrPermissionMap) else (0, HIGH_FIRST)
    return {"title": title, "ranges": [
        {"first": first, **{access: base64.b64encode(bitmap.bits(first, access)).decode("ascii") for access in (READ, WRITE)}} for first in firsts]}


def msr_names() -> Mapping[str, str]:
    """Names of the MSRs that bitmaps cover, by index in decimal."""
    return {str(index): row.name for index, row in msrs.msrs().items() if any(0 <= index - first < RANGE_MSRS for first in MSR_RANGES)}
