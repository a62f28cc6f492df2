"""One instruction at the guest's RIP, by capstone, in the guest's mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from vtdbg.errors import UsageError

MODES = (16, 32, 64)
MAX_LENGTH = 15
"""The longest instruction that a processor decodes (SDM vol. 2, Instruction Format)."""


@dataclass(frozen=True)
class Instruction:
    """A disassembled instruction.  `text` is mnemonic and operands, in Intel syntax; `mode` 16, 32 or 64."""

    address: int
    data: bytes
    mnemonic: str
    text: str
    mode: int

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def next(self) -> int:
        """The address that follows, as wide as the mode's instruction pointer."""
        return (self.address + self.length) & ((1 << (64 if self.mode == 64 else 32)) - 1)

    def __str__(self) -> str:
        return f"{self.address:#x}: {self.data.hex(' ')}  {self.text}"


def disassemble(data: bytes, address: int, mode: int) -> Optional[Instruction]:
    """The first instruction of `data`, which begins at linear `address`; None where capstone knows no instruction.

    Raises UsageError for a mode that is not 16, 32 or 64, and where capstone is not installed.
    """
    if mode not in MODES:
        raise UsageError(f"no such processor mode: {mode} (16, 32 or 64)")
    try:
        import capstone  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError("capstone is not installed: no disassembly (pip install capstone)") from error
    engine = capstone.Cs(capstone.CS_ARCH_X86, {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[mode])
    for _, size, mnemonic, operands in engine.disasm_lite(data[:MAX_LENGTH], address, count=1):
        return Instruction(address, bytes(data[:size]), mnemonic, f"{mnemonic} {operands}".strip(), mode)
    return None


def code_mode(long_mode: Optional[bool], cs_long: Optional[bool], cs_default_big: Optional[bool]) -> Optional[int]:
    """16, 32 or 64 out of EFER.LMA, CS.L and CS.D; None where what decides is unknown (SDM vol. 3, Code Segment Descriptor in 64-bit Mode)."""
    if long_mode is None:
        return None
    if long_mode:
        if cs_long is None:
            return None
        if cs_long:
            return 64
    if cs_default_big is None:
        return None
    return 32 if cs_default_big else 16
