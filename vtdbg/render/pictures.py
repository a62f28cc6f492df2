"""What the script of a report page draws: address spaces and MSR bitmaps as plain numbers and words."""

from __future__ import annotations

import base64
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Union

from vtdbg.address_map import DRAWN_PROBLEMS, EXACT, MMIO, PAGE, AddressMap, Meaning, letters_for, marked
from vtdbg.enumeration import Range
from vtdbg.nested.hooks import Hook
from vtdbg.numbers import size_text
from vtdbg.svm.bitmaps import MSR_RANGES, MsrPermissionMap
from vtdbg.vmx.bitmaps import HIGH_FIRST, MsrBitmap
from vtdbg.x86 import msrs
from vtdbg.x86.permission import READ, WRITE

RANGE_MSRS = 0x2000


def map_data(picture: AddressMap, title: str, walk: str, hooks: Sequence[Hook] = (), exact: Sequence[Range] = ()) -> Dict[str, Any]:
    """An address space: `walk` is the command line of a walk, with "{}" for the address; `exact` all ranges of a picture that was taken together,
    which is then exact as soon as one zooms in (`detail`, and `faults` as [first page, pages, index in `meanings`]).

    `hooks` are [first page, pages, words], `pieces` [first page, pages, mapped pages, page of the frame or null, ranges, [index in
    `meanings`, ...]]: page numbers, because a number of JavaScript is exact up to 2**53.
    """
    meanings: Dict[Meaning, int] = {}
    pieces: List[List[Any]] = []
    for piece in picture.pieces:
        indexes = [meanings.setdefault(meaning, len(meanings)) for meaning in piece.meanings]
        pieces.append([piece.start // PAGE, (piece.end - piece.start) // PAGE, piece.mapped // PAGE,
                       None if piece.target is None else piece.target // PAGE, piece.ranges, indexes])
    detail = exact_ranges(exact, meanings) if exact else ""
    faults = [[problem.start // PAGE, problem.length // PAGE,
               meanings.setdefault(Meaning("", "", 0, (), MMIO if meant else problem.kind), len(meanings))]
              for problem, meant in picture.told if problem.kind in DRAWN_PROBLEMS and problem.length] if exact else []
    letters = letters_for((meaning.permissions for meaning in meanings if not meaning.problem), "perm")
    return {
        "title": title, "walk": walk, "pieces": pieces, "aggregated": picture.grain != EXACT, "detail": detail, "faults": faults,
        "hooks": [[hook.start // PAGE, hook.length // PAGE, hook_words(hook)] for hook in hooks],
        "meanings": [{"perm": meaning.permissions, "type": meaning.memory_type, "size": size_text(meaning.page_size) if meaning.page_size else "",
                      "flags": " ".join(meaning.flags), "problem": meaning.problem, "mark": marked(meaning),
                      "letter": letters.get(meaning.permissions, "")} for meaning in meanings],
    }


def hook_words(hook: Hook) -> str:
    """What makes a page stand out, in a line."""
    words = ", ".join(hook.signs)
    if hook.view is not None:
        return f"{words}: another table has {hook.target:#x} {hook.permissions}"
    return words + (f": expected at {hook.expected:#x}" if hook.moved else "")


def exact_ranges(rows: Sequence[Range], meanings: Dict[Meaning, int]) -> str:
    """Ranges as numbers of seven bits a byte, least first, the top bit set in all but the last byte of a number; base64.

    Four numbers a range, all of them pages: from the end of the range before it, how many, its meaning (added to `meanings` where it is new), and
    where it goes from where the range before it ended, twice that, less one where it is negative.
    """
    out = bytearray()
    known: Dict[Tuple[int, int, int], int] = {}
    end = target = 0
    for row in rows:
        key = row.rights, row.attributes, row.page_size
        if key not in known:
            known[key] = meanings.setdefault(Meaning(str(row.permissions), row.memory_type, row.page_size, row.flags), len(meanings))
        start, pages, step = row.start // PAGE, row.length // PAGE, row.target // PAGE - target
        for number in (start - end, pages, known[key], 2 * step if step >= 0 else -2 * step - 1):
            while number > 0x7F:
                out.append(number & 0x7F | 0x80)
                number >>= 7
            out.append(number)
        end, target = start + pages, row.target // PAGE + pages
    return base64.b64encode(out).decode("ascii")


Bitmap = Union[MsrBitmap, MsrPermissionMap]


def msr_data(bitmap: Bitmap, title: str) -> Dict[str, Any]:
    """An MSR bitmap: for each range of 0x2000 MSRs the bits of reads and of writes (base64, one bit an MSR, 1: exits)."""
    firsts = tuple(MSR_RANGES) if isinstance(bitmap, MsrPermissionMap) else (0, HIGH_FIRST)
    return {"title": title, "ranges": [
        {"first": first, **{access: base64.b64encode(bitmap.bits(first, access)).decode("ascii") for access in (READ, WRITE)}} for first in firsts]}


def msr_names() -> Mapping[str, str]:
    """Names of the MSRs that bitmaps cover, by index in decimal."""
    return {str(index): row.name for index, row in msrs.msrs().items() if any(0 <= index - first < RANGE_MSRS for first in MSR_RANGES)}
