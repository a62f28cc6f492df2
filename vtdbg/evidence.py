"""Evidence: points for or against what a page of memory is taken for, each with words that a reader can judge."""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Optional, Sequence


class Evidence(NamedTuple):
    """`points` for (positive) or against (negative), and why in words; `brief` names it where there is little room."""

    points: int
    text: str
    brief: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.points:+d})"


Judge = Callable[[int], Optional[bool]]
"""True, False, or None for a value that says nothing."""

ADDRESS_LIMIT = 1 << 52
PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})


def is_page(value: int) -> bool:
    """A page-aligned physical address below 2**52."""
    return value & 0xFFF == 0 and value < ADDRESS_LIMIT


def is_pat(value: int) -> bool:
    """Eight memory types (SDM vol. 3, Page Attribute Table (PAT))."""
    return all(value >> shift & 0xFF in PAT_TYPES for shift in range(0, 64, 8))


def canonical(value: int) -> bool:
    """Canonical for 57-bit linear addresses, hence for 48-bit ones too (SDM vol. 1, Canonical Addressing)."""
    return value >> 56 in (0, 0xFF)


def summarize(evidence: Sequence[Evidence], limit: int = 4) -> str:
    """One line: the names of the first things that speak for it, what speaks against in full, how much more there is.

    Evidence for is in the order of the rules, which begin with the strongest.
    """
    against = sorted((item for item in evidence if item.points < 0), key=lambda item: item.points)
    pro = [item for item in evidence if item.points > 0]
    parts = []
    if pro:
        parts.append("for: " + ", ".join([item.brief or item.text for item in pro[:limit]] + _more(len(pro) - limit)))
    if against:
        parts.append("against: " + ", ".join([item.text for item in against[:limit]] + _more(len(against) - limit)))
    return "; ".join(parts)


def _more(count: int) -> List[str]:
    return [f"{count} more"] if count > 0 else []
