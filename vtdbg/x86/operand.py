"""The address that a memory operand names: base, index, scale, displacement, address size, segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Union

GPRS = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15")
"""General-purpose registers in the order of their numbers (SDM vol. 2, Instruction Format)."""

SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
"""Segment registers in the order of their numbers."""

Lookup = Callable[[str], Optional[int]]
"""A register's or segment base's value by name, None where it is unknown."""


@dataclass(frozen=True)
class MemoryOperand:
    """A memory operand.  `displacement` is signed and as wide as `address_size` (bits); `size` is what is accessed, in bytes.

    `effective` is the offset in the segment, `linear` the linear address.  Where one is None `missing` says what is needed ("needs RBX").
    """

    segment: str
    base: Optional[str]
    index: Optional[str]
    scale: int
    displacement: int
    address_size: int
    effective: Optional[int] = None
    linear: Optional[int] = None
    size: Optional[int] = None
    missing: str = ""

    @property
    def text(self) -> str:
        """"DS:[RBX + RCX*4 - 0x8]", registers as wide as the address."""
        parts = [narrow(self.base, self.address_size)] if self.base else []
        if self.index:
            parts.append(narrow(self.index, self.address_size) + (f"*{self.scale}" if self.scale > 1 else ""))
        if not parts:
            return f"{self.segment}:[{self.displacement & mask(self.address_size):#x}]"
        sign = "-" if self.displacement < 0 else "+"
        tail = f" {sign} {abs(self.displacement):#x}" if self.displacement else ""
        return f"{self.segment}:[{' + '.join(parts)}{tail}]"


@dataclass(frozen=True)
class RegisterOperand:
    """A register operand, `value` None where it is unknown."""

    register: str
    size: Optional[int]
    value: Optional[int] = None

    @property
    def text(self) -> str:
        return narrow(self.register, self.size * 8) if self.size else self.register


Operand = Union[MemoryOperand, RegisterOperand]


def mask(width: int) -> int:
    return (1 << width) - 1


def signed(value: int, width: int) -> int:
    """The low `width` bits of `value` as a signed number."""
    value &= mask(width)
    return value - (1 << width) if value >> (width - 1) else value


def narrow(register: str, width: int) -> str:
    """The name of the low `width` bits: narrow("RBX", 16) -> "BX", narrow("R8", 32) -> "R8D"."""
    if width >= 64 or register not in GPRS:
        return register
    if register[1:].isdigit():
        return register + {32: "D", 16: "W", 8: "B"}[width]
    return {32: "E" + register[1:], 16: register[1:], 8: register[1:2] + "L"}[width]


def memory_operand(segment: str, base: Optional[str], index: Optional[str], scale: int, displacement: int, address_size: int, *,
                   register: Lookup, segment_base: Lookup, mode: Optional[int], size: Optional[int] = None) -> MemoryOperand:
    """The operand with its address computed as the processor does (SDM vol. 1, Operand Addressing; vol. 3, Segmentation in IA-32e Mode).

    The offset wraps at `address_size` bits.  In 64-bit mode only FS and GS have a base; elsewhere the linear address has 32 bits.
    `mode` is 16, 32, 64, or None for unknown.
    """
    shift = signed(displacement, address_size)
    offset: Optional[int] = shift
    needed = []
    for name, factor in ((base, 1), (index, scale)):
        if name is None:
            continue
        value = register(name)
        if value is None:
            needed.append(name)
            offset = None
        elif offset is not None:
            offset += value * factor
    if offset is not None:
        offset &= mask(address_size)
    start = _segment_start(segment, segment_base, mode, address_size)
    if isinstance(start, str):
        needed.append(start)
    linear = None
    if offset is not None and isinstance(start, int):
        linear = (start + offset) & mask(64 if is_long(mode, address_size) else 32)
    return MemoryOperand(segment, base, index, scale, shift, address_size, offset, linear, size,
                         f"needs {', '.join(dict.fromkeys(needed))}" if needed else "")


def is_long(mode: Optional[int], address_size: int) -> bool:
    """Only 64-bit mode has 64-bit addresses, so such an address tells the mode."""
    return mode == 64 or (mode is None and address_size == 64)


def _segment_start(segment: str, segment_base: Lookup, mode: Optional[int], address_size: int) -> Union[int, str]:
    """The segment's base, or what is needed to know it."""
    if is_long(mode, address_size) and segment not in ("FS", "GS"):
        return 0
    base = segment_base(segment)
    if base is None:
        return f"the base of {segment}"
    if mode is None and address_size != 64 and base and segment not in ("FS", "GS"):
        return "the guest's mode (64-bit code ignores this segment base)"
    return base
