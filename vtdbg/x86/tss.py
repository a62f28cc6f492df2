"""Task-state segments of 16, 32 and 64 bits, and the I/O permission bitmap behind them.

Sources: SDM vol. 3, Task-State Segment (TSS); 16-Bit Task-State Segment (TSS); 64-Bit Task State Segment; SDM vol. 1, I/O Permission Bit Map.
Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Tuple

from vtdbg.bit_ranges import clear_ranges
from vtdbg.errors import FormatError
from vtdbg.memory.holes import Readable, Span

_Rows = Tuple[Tuple[str, int, int], ...]

FIELDS: Mapping[int, _Rows] = {
    16: (("LINK", 0x00, 2), ("SP0", 0x02, 2), ("SS0", 0x04, 2), ("SP1", 0x06, 2), ("SS1", 0x08, 2), ("SP2", 0x0A, 2), ("SS2", 0x0C, 2),
         ("IP", 0x0E, 2), ("FLAGS", 0x10, 2), ("AX", 0x12, 2), ("CX", 0x14, 2), ("DX", 0x16, 2), ("BX", 0x18, 2), ("SP", 0x1A, 2),
         ("BP", 0x1C, 2), ("SI", 0x1E, 2), ("DI", 0x20, 2), ("ES", 0x22, 2), ("CS", 0x24, 2), ("SS", 0x26, 2), ("DS", 0x28, 2),
         ("LDT", 0x2A, 2)),
    32: (("LINK", 0x00, 2), ("ESP0", 0x04, 4), ("SS0", 0x08, 2), ("ESP1", 0x0C, 4), ("SS1", 0x10, 2), ("ESP2", 0x14, 4), ("SS2", 0x18, 2),
         ("CR3", 0x1C, 4), ("EIP", 0x20, 4), ("EFLAGS", 0x24, 4), ("EAX", 0x28, 4), ("ECX", 0x2C, 4), ("EDX", 0x30, 4), ("EBX", 0x34, 4),
         ("ESP", 0x38, 4), ("EBP", 0x3C, 4), ("ESI", 0x40, 4), ("EDI", 0x44, 4), ("ES", 0x48, 2), ("CS", 0x4C, 2), ("SS", 0x50, 2),
         ("DS", 0x54, 2), ("FS", 0x58, 2), ("GS", 0x5C, 2), ("LDT", 0x60, 2), ("T", 0x64, 2), ("IOMAP_BASE", 0x66, 2), ("SSP", 0x68, 4)),
    64: (("RSP0", 0x04, 8), ("RSP1", 0x0C, 8), ("RSP2", 0x14, 8), ("IST1", 0x24, 8), ("IST2", 0x2C, 8), ("IST3", 0x34, 8), ("IST4", 0x3C, 8),
         ("IST5", 0x44, 8), ("IST6", 0x4C, 8), ("IST7", 0x54, 8), ("IOMAP_BASE", 0x66, 2)),
}
"""(name, offset, bytes) by the size of the TSS.  The T flag is bit 0 of its word; SSP counts only with CET."""

MIN_LIMIT: Mapping[int, int] = {16: 0x2B, 32: 0x67, 64: 0x67}
"""A smaller limit raises #TS (SDM vol. 3, TSS Descriptor)."""

PORTS = 1 << 16
MAX_TSS = 0x66 + 2 + 0xFFFF + PORTS // 8 + 1
"""A bitmap further away than a 16-bit base can point to is not looked at."""


@dataclass(frozen=True)
class IoPermissionBitmap:
    """`base` is relative to the TSS; `open_ports` are ranges (first, last) that code above IOPL may use; None: the bytes could not be read.

    A port whose byte, or the byte after it, lies beyond the TSS limit is closed: the processor always reads two bytes.
    """

    base: int
    open_ports: Optional[Tuple[Tuple[int, int], ...]]
    covered: int
    """Ports that the limit leaves room for: those from here up are closed."""
    note: str = ""

    def allows(self, port: int, size: int = 1) -> Optional[bool]:
        """May code above IOPL access `size` bytes at `port`?  None: unknown."""
        if self.open_ports is None:
            return None
        return all(any(first <= at <= last for first, last in self.open_ports) for at in range(port, port + size))


@dataclass(frozen=True)
class TssField:
    """`value` is None where the byte could not be read or lies beyond the limit."""

    name: str
    offset: int
    size: int
    value: Optional[int]


@dataclass(frozen=True)
class Tss:
    """`bits` 16, 32 or 64; `io_bitmap` is None for a 16-bit TSS and where its base is unknown."""

    address: int
    bits: int
    limit: int
    fields: Tuple[TssField, ...]
    io_bitmap: Optional[IoPermissionBitmap]
    problems: Tuple[str, ...]

    def get(self, name: str) -> Optional[int]:
        """The value of a field ("RSP0", "IST1", "IOMAP_BASE"); None where it is unknown.  Raises FormatError for a field that it has not."""
        for field in self.fields:
            if field.name == name.upper():
                return field.value
        raise FormatError(f"{self.bits}-bit TSS", f"there is no field {name}")


def decode_tss(data: bytes, bits: int = 64, limit: Optional[int] = None, address: int = 0) -> Tss:
    """A TSS out of its bytes.  `limit` is the last byte by its descriptor (default: all of `data`); bytes that `data` lacks are unknown.

    Raises FormatError for a size that no TSS has.
    """
    if bits not in FIELDS:
        raise FormatError("TSS", f"there is no {bits}-bit TSS")
    last = len(data) - 1 if limit is None else limit
    values = tuple(TssField(name, offset, size, _value(data, offset, size, last)) for name, offset, size in FIELDS[bits])
    problems: List[str] = []
    if last < MIN_LIMIT[bits]:
        problems.append(f"limit {last:#x} is below {MIN_LIMIT[bits]:#x}: the processor raises #TS when it uses the TSS")
    if len(data) <= min(last, MIN_LIMIT[bits]):
        problems.append(f"only {len(data)} bytes of it could be read")
    if bits == 64:
        problems.extend(_stack_problems(values))
    return Tss(address, bits, last, values, _io_bitmap(data, values, last), tuple(problems))


def _value(data: bytes, offset: int, size: int, limit: int) -> Optional[int]:
    if offset + size > len(data) or offset + size - 1 > limit:
        return None
    return int.from_bytes(data[offset:offset + size], "little")


def _stack_problems(values: Tuple[TssField, ...]) -> List[str]:
    return [f"{field.name} {field.value:#x} is not canonical: using it raises #SS" for field in values
            if field.value is not None and field.size == 8 and field.value >> 56 not in (0, 0xFF)]


def _io_bitmap(data: bytes, values: Tuple[TssField, ...], limit: int) -> Optional[IoPermissionBitmap]:
    base = next((field.value for field in values if field.name == "IOMAP_BASE"), None)
    if base is None:
        return None
    if base >= limit:
        return IoPermissionBitmap(base, (), 0, f"base {base:#x} is not below the limit {limit:#x}: every port access above IOPL raises #GP")
    covered = min((limit - base) * 8, PORTS)
    wanted = (covered + 7) // 8
    bitmap = data[base:base + wanted]
    if len(bitmap) < wanted:
        return IoPermissionBitmap(base, None, covered, f"{wanted - len(bitmap)} of its {wanted} bytes could not be read")
    note = ""
    after = base + PORTS // 8
    if covered == PORTS and after < len(data) and after <= limit and data[after] != 0xFF:
        note = "the byte after the bitmap is not all ones: a 16- or 32-bit access at the last ports reads it"
    return IoPermissionBitmap(base, clear_ranges(bitmap, covered), covered, note)


def read_tss(memory: Readable, base: int, limit: int, bits: int = 64) -> Tss:
    """The TSS at linear address `base` with its I/O permission bitmap; `limit` is the last byte by its descriptor (or the TR limit).

    Bounded: at most the TSS, the farthest bitmap that its base field can name and its final byte.  What cannot be read is unknown.
    """
    return decode_tss(Span(memory, base, min(limit, MAX_TSS) + 1).prefix(), bits, limit, base)
