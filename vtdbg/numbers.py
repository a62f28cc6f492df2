"""Numbers as people type and paste them."""

from __future__ import annotations

import re
from typing import Tuple

from vtdbg.errors import UsageError

# Compiled where they are first used (re keeps them): most commands need one of them or none.
_PLAIN = r"[+-]?(0[xX][0-9a-fA-F_`]+|0[bB][01_]+|0[oO][0-7_]+|[0-9][0-9_]*)$"
_WINDBG = r"([0-9a-fA-F]{1,8})`([0-9a-fA-F]{8})$"
_SUFFIX = r"([0-9][0-9a-fA-F]*)[hH]$"
_HEX_DIGITS = r"[0-9a-fA-F]*[a-fA-F][0-9a-fA-F]*$"
UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_number(text: str) -> int:
    """0x10, 16, 0b1, 10h, WinDbg's fffff800`12345678, 1_000.  Bare hex digits are refused with the way to write them, and so are digits that
    begin with 0 (KVM's 0000000000001000).

    Another bare decimal stays decimal: the same words mean the same in every front end.
    """
    stripped = text.strip()
    if re.match(r"0[0-9]+$", stripped) and stripped.strip("0"):
        raise UsageError(f"{text!r} begins with 0 as hexadecimal numbers in logs do: write 0x{stripped}, or the decimal number without the zeros")
    if re.match(_PLAIN, stripped):
        try:
            return int(stripped.replace("`", ""), 0) if stripped.strip("0") else 0
        except ValueError:
            # Underscores side by side or at the end, -010, and decimal numbers of more digits than Python converts.
            raise UsageError(f"{text[:40]!r} is not a number") from None
    windbg = re.match(_WINDBG, stripped)
    if windbg:
        return int(windbg.group(1) + windbg.group(2), 16)
    suffix = re.match(_SUFFIX, stripped)
    if suffix:
        return int(suffix.group(1), 16)
    if re.match(_HEX_DIGITS, stripped):
        raise UsageError(f"{text!r} is not a number; for hexadecimal write 0x{stripped}")
    raise UsageError(f"{text!r} is not a number")


def parse_size(text: str) -> int:
    """A number with an optional unit: 4k, 2M, 1g."""
    unit = UNITS.get(text.strip()[-1:].lower())
    return parse_number(text.strip()[:-1]) * unit if unit and len(text.strip()) > 1 else parse_number(text)


def parse_range(text: str) -> Tuple[int, int]:
    """"0x1000-0x2000" -> (first, end exclusive); "0x1000+4k" -> start and length; "0x1000" -> one page."""
    for mark in ("+", "-"):
        first, found, last = text.partition(mark)
        if found and first:
            start = parse_number(first)
            end = start + parse_size(last) if mark == "+" else parse_number(last)
            if end <= start:
                raise UsageError(f"range {text!r} ends before it begins")
            return start, end
    start = parse_number(text)
    return start, start + 4096


def size_text(size: int) -> str:
    """A size in the largest unit that divides it: 4 KiB, 2 MiB, 1 GiB, 123 bytes."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} byte{'s' * (size != 1)}"
