"""x86 instructions with a memory operand put together from their parts: what a test knows of an instruction before anybody decodes it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Optional

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
SEGMENT_PREFIX = {"es": 0x26, "cs": 0x2E, "ss": 0x36, "ds": 0x3E, "fs": 0x64, "gs": 0x65}


@dataclass(frozen=True)
class Memory:
    """[segment: base + index*scale + displacement]; numbers of registers, None for none.  `rip` is RIP-relative.

    `bits` is the address size; `width` the bytes of displacement to encode (0, 1, 4), raised where the form demands it.
    """

    base: Optional[int] = None
    index: Optional[int] = None
    scale: int = 1
    displacement: int = 0
    width: int = 0
    segment: Optional[str] = None
    bits: int = 64
    rip: bool = False

    def default_segment(self) -> str:
        return "ss" if self.base in (4, 5) else "ds"


def instruction(opcode: str, reg: int, operand: "Memory | int", *, mode: int = 64, mandatory: str = "", wide: bool = False) -> bytes:
    """Bytes of an instruction: `opcode` in hex, `reg` in ModRM.reg, `operand` a Memory or a register's number.

    `mandatory` are prefixes that belong to the opcode ("66", "f3"); `wide` sets REX.W; `mode` is 32 or 64.
    """
    prefixes, rex = b"", 8 if wide else 0
    rex |= 4 if reg & 8 else 0
    if isinstance(operand, int):
        modrm = bytes([0xC0 | (reg & 7) << 3 | operand & 7])
        rex |= 1 if operand & 8 else 0
    else:
        if operand.segment is not None:
            prefixes += bytes([SEGMENT_PREFIX[operand.segment]])
        if operand.bits != mode:
            prefixes += b"\x67"
        modrm = _modrm(reg & 7, operand, mode) if operand.bits != 16 else _modrm16(reg & 7, operand)
        rex |= (1 if (operand.base or 0) & 8 else 0) | (2 if (operand.index or 0) & 8 else 0)
    return prefixes + bytes.fromhex(mandatory) + (bytes([0x40 | rex]) if rex else b"") + bytes.fromhex(opcode) + modrm


def _modrm(reg: int, operand: Memory, mode: int) -> bytes:
    four = struct.pack("<i", operand.displacement)
    if operand.rip:
        return bytes([reg << 3 | 5]) + four
    if operand.base is None and operand.index is None and mode == 32:
        return bytes([reg << 3 | 5]) + four
    scale = {1: 0, 2: 1, 4: 2, 8: 3}[operand.scale]
    index = 4 if operand.index is None else operand.index & 7
    if operand.base is None:
        return bytes([reg << 3 | 4, scale << 6 | index << 3 | 5]) + four
    # RBP and R13 as a base have no form without displacement; RSP and R12 need a SIB byte.
    width = max(operand.width, 1 if operand.base & 7 == 5 else 0)
    mod = {0: 0, 1: 1, 4: 2}[width]
    tail = {0: b"", 1: struct.pack("<b", operand.displacement) if width == 1 else b"", 4: four}[width]
    if operand.index is None and operand.base & 7 != 4:
        return bytes([mod << 6 | reg << 3 | operand.base & 7]) + tail
    return bytes([mod << 6 | reg << 3 | 4, scale << 6 | index << 3 | operand.base & 7]) + tail


_BASES16 = {(3, 6): 0, (3, 7): 1, (5, 6): 2, (5, 7): 3, (6, None): 4, (7, None): 5, (5, None): 6, (3, None): 7}


def _modrm16(reg: int, operand: Memory) -> bytes:
    """16-bit addressing: BX or BP, plus SI or DI."""
    two = struct.pack("<H", operand.displacement & 0xFFFF)
    if operand.base is None and operand.index is None:
        return bytes([reg << 3 | 6]) + two
    rm = _BASES16[(operand.base, operand.index)]
    width = max(operand.width, 1 if rm == 6 else 0)
    if width == 0:
        return bytes([reg << 3 | rm])
    if width == 1:
        return bytes([0x40 | reg << 3 | rm]) + struct.pack("<b", operand.displacement)
    return bytes([0x80 | reg << 3 | rm]) + two
