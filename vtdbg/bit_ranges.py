"""Bitmaps as ranges of bit numbers; bit n is bit n % 8 of byte n // 8, as in every bitmap of VT-x, SVM and the TSS."""

from __future__ import annotations

from typing import Iterable, List, Optional, Tuple

Ranges = Tuple[Tuple[int, int], ...]
"""(first, last) pairs, ascending, apart."""


def set_ranges(bitmap: bytes, count: Optional[int] = None) -> Ranges:
    """Ranges of the bits below `count` (default: all) that are 1."""
    return _ranges(bitmap, count, wanted=True)


def clear_ranges(bitmap: bytes, count: Optional[int] = None) -> Ranges:
    """Ranges of the bits below `count` (default: all) that are 0."""
    return _ranges(bitmap, count, wanted=False)


def _ranges(bitmap: bytes, count: Optional[int], *, wanted: bool) -> Ranges:
    hit, miss = (0xFF, 0) if wanted else (0, 0xFF)
    found: List[Tuple[int, int]] = []
    start: Optional[int] = None
    for index, byte in enumerate(bitmap):
        # Whole bytes at once: bitmaps are mostly all ones or all zeros.
        if byte == (miss if start is None else hit):
            continue
        for bit in range(8):
            if bool(byte >> bit & 1) == wanted:
                if start is None:
                    start = index * 8 + bit
            elif start is not None:
                found.append((start, index * 8 + bit - 1))
                start = None
    if start is not None:
        found.append((start, len(bitmap) * 8 - 1))
    if count is None:
        return tuple(found)
    return tuple((first, min(last, count - 1)) for first, last in found if first < count)


def fill(bitmap: bytearray, ranges: Iterable[Tuple[int, int]], *, value: bool) -> None:
    """Set or clear the bits of `ranges` (first, last) in place."""
    for first, last in ranges:
        for bit in range(first, last + 1):
            if value:
                bitmap[bit >> 3] |= 1 << (bit & 7)
            else:
                bitmap[bit >> 3] &= ~(1 << (bit & 7)) & 0xFF


def test(bitmap: bytes, bit: int) -> bool:
    return bool(bitmap[bit >> 3] >> (bit & 7) & 1)
