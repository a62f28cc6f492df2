"""MTRRs: which memory type the processor gives a physical address, out of the values of the MSRs.

Sources: SDM vol. 3, Memory Type Range Registers (MTRRs): IA32_MTRR_DEF_TYPE MSR, Fixed Range MTRRs, Variable Range MTRRs, MTRR Precedences,
Base and Mask Calculations.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence, Set, Tuple

from vtdbg import bits
from vtdbg.errors import FormatError

MTRRCAP, DEF_TYPE, PHYSBASE0 = 0xFE, 0x2FF, 0x200
VARIABLE_MAX = 10
"""Pairs that have MSR numbers of their own name; Linux and processors know no more."""
FIXED: Tuple[Tuple[int, int, int], ...] = (
    (0x250, 0x00000, 0x10000), (0x258, 0x80000, 0x4000), (0x259, 0xA0000, 0x4000),
    (0x268, 0xC0000, 0x1000), (0x269, 0xC8000, 0x1000), (0x26A, 0xD0000, 0x1000), (0x26B, 0xD8000, 0x1000),
    (0x26C, 0xE0000, 0x1000), (0x26D, 0xE8000, 0x1000), (0x26E, 0xF0000, 0x1000), (0x26F, 0xF8000, 0x1000),
)
"""(MSR, first address, bytes that each of its eight fields covers)"""
FIXED_END = 0x100000
UC = 0


@dataclass(frozen=True)
class Typed:
    """Physical addresses [start, end) of one memory type ("WB"); None: unknown, or a mixture that the manual leaves undefined (see `why`)."""

    start: int
    end: int
    memory_type: Optional[str]
    why: str = ""


@dataclass(frozen=True)
class Mtrrs:
    """`fixed` is by MSR; `variable` (base, mask, type) are the valid pairs; `unknown` says which MSRs are missing that would count."""

    enabled: bool
    fixed_enabled: bool
    default: int
    fixed: Mapping[int, int]
    variable: Tuple[Tuple[int, int, int], ...]
    unknown: Tuple[str, ...] = ()

    @classmethod
    def from_msrs(cls, values: Mapping[int, int]) -> "Mtrrs":
        """Values by MSR index.  Raises FormatError without IA32_MTRR_DEF_TYPE, and for a mask that is not contiguous."""
        def_type = values.get(DEF_TYPE)
        if def_type is None:
            raise FormatError("MTRRs", "IA32_MTRR_DEF_TYPE (0x2ff) is not among the values: nothing can be said without it")
        table = bits.table("mtrr_def_type")
        cap = values.get(MTRRCAP)
        count = min(cap & 0xFF, VARIABLE_MAX) if cap is not None else None
        pairs, unknown = [], []
        for number in range(VARIABLE_MAX if count is None else count):
            base, mask = values.get(PHYSBASE0 + 2 * number), values.get(PHYSBASE0 + 2 * number + 1)
            if mask is not None and not bits.table("mtrr_physmask").test(mask, "V"):
                continue
            if base is None or mask is None:
                if count is not None or base is not mask:
                    unknown.append(f"IA32_MTRR_PHYS{'BASE' if base is None else 'MASK'}{number}")
                continue
            pairs.append(_pair(number, base, mask))
        if count is None:
            unknown.append(f"IA32_MTRRCAP (how many variable ranges there are; {len(pairs)} are given)")
        fixed = {msr: values[msr] for msr, _, _ in FIXED if msr in values}
        fixed_on = table.test(def_type, "FE")
        if fixed_on and len(fixed) < len(FIXED):
            unknown.append("fixed-range MTRRs: " + ", ".join(f"{msr:#x}" for msr, _, _ in FIXED if msr not in fixed))
        return cls(table.test(def_type, "E"), fixed_on, table.get(def_type, "TYPE"), fixed, tuple(pairs), tuple(unknown))

    def types(self, first: int, end: int) -> List[Typed]:
        """The types of [first, end), neighbours of one type merged."""
        rows: List[Typed] = []
        for start, stop in _pairs(sorted(self._edges(first, end))):
            memory_type, why = self._of(start)
            last = rows[-1] if rows else None
            if last is not None and (last.memory_type, last.why) == (memory_type, why):
                rows[-1] = Typed(last.start, stop, memory_type, why)
            else:
                rows.append(Typed(start, stop, memory_type, why))
        return rows

    def _edges(self, first: int, end: int) -> Set[int]:
        edges = {first, end}
        if self.fixed_enabled and first < FIXED_END:
            edges.update(start + step * size for _, start, size in FIXED for step in range(8))
            edges.add(FIXED_END)
        for base, mask, _ in self.variable:
            edges.update((base & mask, (base & mask) + (mask & -mask)))
        return {edge for edge in edges if first <= edge <= end}

    def _of(self, address: int) -> Tuple[Optional[str], str]:
        if not self.enabled:
            return _name(UC), ""
        if self.fixed_enabled and address < FIXED_END:
            msr, start, size = max((row for row in FIXED if row[1] <= address), key=lambda row: row[1])
            value = self.fixed.get(msr)
            if value is None:
                return None, f"MSR {msr:#x} is not given"
            return _name(value >> 8 * ((address - start) // size) & 0xFF), ""
        found = {kind for base, mask, kind in self.variable if address & mask == base & mask}
        if UC in found:
            return _name(UC), ""
        if any("PHYS" in name for name in self.unknown):
            return None, f"{', '.join(name for name in self.unknown if 'PHYS' in name)} not given"
        if not found:
            return _name(self.default), ""
        if len(found) == 1:
            return _name(found.pop()), ""
        if found == {4, 6}:
            return _name(4), ""
        return None, "overlapping variable ranges of types that the manual does not combine"


def _pair(number: int, base: int, mask: int) -> Tuple[int, int, int]:
    kind, start = bits.table("mtrr_physbase").get(base, "TYPE"), bits.table("mtrr_physbase").get(base, "BASE")
    wide = bits.table("mtrr_physmask").get(mask, "MASK")
    size = wide & -wide
    # A mask without holes plus its lowest bit is a power of two: the range is [base, base + size).
    if not wide or (wide + size) & (wide + size - 1):
        raise FormatError(f"IA32_MTRR_PHYSMASK{number}", f"mask {wide:#x} is not contiguous: the addresses it covers are not one range")
    return start, wide, kind


def _pairs(edges: Sequence[int]) -> List[Tuple[int, int]]:
    return list(zip(edges, edges[1:]))


def _name(kind: int) -> Optional[str]:
    """The type's name; None for a reserved one."""
    return bits.table("mtrr_physbase")["TYPE"].values.get(kind)
