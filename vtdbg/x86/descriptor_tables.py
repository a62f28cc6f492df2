"""GDT, LDT and IDT in memory: every entry, with the holes that cannot be read told apart from entries that are zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Tuple, Union

from vtdbg.memory.holes import Readable, Span
from vtdbg.x86.descriptors import Descriptor, SegmentDescriptor, decode, decode_gate, is_wide

MAX_LIMIT = 0xFFFF
"""GDTR, IDTR and an LDT's useful range end here: a selector has 13 index bits (SDM vol. 3, Global Descriptor Table Register)."""

@dataclass(frozen=True)
class TableRow:
    """One entry: `index` is the vector in an IDT, the descriptor's number otherwise; `selector` the GDT or LDT selector with RPL 0.

    `descriptor` is None where the bytes could not be read: then `unreadable` says why.
    """

    index: int
    selector: int
    address: int
    raw: bytes
    descriptor: Optional[Descriptor]
    unreadable: str = ""


@dataclass(frozen=True)
class DescriptorTable:
    """`kind` is "GDT", "LDT" or "IDT"; `limit` is the last byte, as given."""

    kind: str
    base: int
    limit: int
    long_mode: bool
    rows: Tuple[TableRow, ...]
    warnings: Tuple[str, ...]

    def by_selector(self, selector: int) -> Optional[TableRow]:
        """The row that a selector names; None outside the limit and inside a 16-byte descriptor's upper half."""
        wanted = selector & 0xFFF8
        return next((row for row in self.rows if row.selector & 0xFFF8 == wanted), None)


def read_table(memory: Readable, base: int, limit: int, long_mode: bool, kind: str = "GDT") -> DescriptorTable:
    """Every descriptor of a GDT or LDT at linear address `base` (or physical, if that is what `memory` reads), `limit` the last byte.

    In IA-32e mode a system descriptor takes two slots.  Bounded: what lies beyond 0xffff is named, not read.
    """
    length, warnings = _length(kind, limit)
    span = Span(memory, base, length)
    rows: List[TableRow] = []
    at = 0
    ti = 4 if kind == "LDT" else 0
    while at + 8 <= length:
        size = 8
        data = span.get(at, 8)
        if isinstance(data, bytes) and is_wide(int.from_bytes(data, "little"), long_mode):
            size = 16
            data = span.get(at, 16) if at + 16 <= length else "the limit cuts its upper half off"
        rows.append(_row(at >> 3, at | ti, base + at, data, size, long_mode))
        at += size
    if at < length:
        warnings.append(f"limit {limit:#x}: the last {length - at} bytes are no whole descriptor")
    if kind == "GDT" and rows and isinstance(rows[0].descriptor, SegmentDescriptor) and rows[0].descriptor.raw:
        warnings.append("entry 0 is not zero: the processor never uses it")
    return DescriptorTable(kind, base, limit, long_mode, tuple(rows), tuple(warnings))


def read_idt(memory: Readable, base: int, limit: int, long_mode: bool) -> DescriptorTable:
    """Every gate of an IDT: 16 bytes a vector in IA-32e mode, 8 otherwise; at most 256."""
    length, warnings = _length("IDT", limit)
    size = 16 if long_mode else 8
    if length > 256 * size:
        warnings.append(f"limit {limit:#x} reaches beyond vector 255: the rest is never used")
        length = 256 * size
    span = Span(memory, base, length)
    rows: List[TableRow] = []
    for vector in range(length // size):
        data = span.get(vector * size, size)
        address = base + vector * size
        if isinstance(data, str):
            rows.append(TableRow(vector, vector, address, b"", None, data))
        else:
            rows.append(TableRow(vector, vector, address, data, decode_gate(data, long_mode)))
    if length % size:
        warnings.append(f"limit {limit:#x}: the last {length % size} bytes are no whole gate")
    return DescriptorTable("IDT", base, limit, long_mode, tuple(rows), tuple(warnings))


def find_descriptor(memory: Readable, base: int, limit: int, selector: int, long_mode: bool) -> TableRow:
    """The descriptor that `selector` names in the table at `base`; a row without descriptor says why there is none."""
    at = selector & 0xFFF8
    address = base + at
    if at + 7 > limit:
        return TableRow(at >> 3, selector, address, b"", None, f"selector {selector:#x} is beyond the table's limit {limit:#x}")
    span = Span(memory, address, 8)
    data = span.get(0, 8)
    size = 8
    if isinstance(data, bytes) and is_wide(int.from_bytes(data, "little"), long_mode):
        size = 16
        data = Span(memory, address, 16).get(0, 16) if at + 15 <= limit else f"the table's limit {limit:#x} cuts its upper half off"
    return _row(at >> 3, selector, address, data, size, long_mode)


def _row(index: int, selector: int, address: int, data: Union[bytes, str], size: int, long_mode: bool) -> TableRow:
    if isinstance(data, str):
        return TableRow(index, selector, address, b"", None, data)
    return TableRow(index, selector, address, data, decode(data[:size], long_mode))


def _length(kind: str, limit: int) -> Tuple[int, List[str]]:
    if limit < 0:
        return 0, [f"{kind} limit {limit} is negative"]
    if limit > MAX_LIMIT:
        return MAX_LIMIT + 1, [f"{kind} limit {limit:#x} is beyond 0xffff: only the first 64 KiB are read"]
    return limit + 1, []
