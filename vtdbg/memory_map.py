"""Which addresses are RAM, out of what firmware and kernels print."""

from __future__ import annotations

import re
from typing import Iterable, List, Sequence, Tuple

from vtdbg.errors import FormatError
from vtdbg.memory.base import PAGE_SIZE, merge_ranges
from vtdbg.numbers import parse_range

Span = Tuple[int, int]
"""(first address, end exclusive)"""

# Linux 6.1, arch/x86/kernel/e820.c, e820__print_table; older kernels print no "mem" and no brackets' content but the numbers.
_E820 = re.compile(r"(?:BIOS-)?e820: (?:\[mem )?(0x)?([0-9a-f]+)\s*-\s*(?:0x)?([0-9a-f]+)\]?\s+\(?(usable|ram|system ram)\b", re.IGNORECASE)
# Linux 6.1, kernel/resource.c, r_show: nested lines are indented and lie inside their parent.
_IOMEM = re.compile(r"^\s*([0-9a-f]+)-([0-9a-f]+) : System RAM\b", re.IGNORECASE)


def parse_memory_map(text: str, source: str = "text") -> List[Span]:
    """RAM out of a kernel log with e820 lines ("BIOS-e820: [mem 0x...-0x...] usable") or out of /proc/iomem ("... : System RAM").

    Whole pages only.  Raises FormatError where there is no such line.
    """
    found: List[Span] = []
    for line in text.splitlines():
        e820, iomem = _E820.search(line), _IOMEM.match(line)
        if e820:
            found.append((int(e820.group(2), 16), int(e820.group(3), 16) + 1))
        elif iomem:
            found.append((int(iomem.group(1), 16), int(iomem.group(2), 16) + 1))
    if not found:
        raise FormatError(source, "no memory map in it: e820 lines of a kernel log and '...-... : System RAM' of /proc/iomem are read")
    if any(end > 1 << 52 or end <= start for start, end in found):
        raise FormatError(source, "a range of the memory map ends before it begins, or beyond 52 bits")
    return whole_pages(found)


def parse_spans(texts: Iterable[str]) -> List[Span]:
    """RAM as people type it: "A-B" (B exclusive) or "A+SIZE"."""
    return whole_pages([parse_range(text) for text in texts])


def whole_pages(spans: Sequence[Span]) -> List[Span]:
    """Sorted and merged, cut to the whole 4 KiB pages in them."""
    cut = [(-(-start // PAGE_SIZE) * PAGE_SIZE, end // PAGE_SIZE * PAGE_SIZE) for start, end in spans]
    merged = merge_ranges(sorted((start, end - start) for start, end in cut if end > start))
    return [(start, start + length) for start, length in merged]
