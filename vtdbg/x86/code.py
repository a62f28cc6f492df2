"""The instruction at a guest's RIP, whoever the guest's processor is: bytes through its segment base and paging, then capstone."""

from __future__ import annotations

from typing import Optional, Protocol, Tuple

from vtdbg.errors import MemoryUnavailable, VtdbgError
from vtdbg.memory.base import PAGE_SIZE
from vtdbg.x86.disasm import MAX_LENGTH, Instruction, disassemble


class CodeReader(Protocol):
    """What knows a guest's segment bases and reads its linear memory (VtdbgError where it cannot)."""

    def segment_base(self, segment: str) -> Optional[int]: ...

    def read(self, address: int, size: int) -> bytes: ...


def linear_address(guest: CodeReader, rip: int, mode: int) -> Optional[int]:
    """The linear address of CS:`rip` in 16-, 32- or 64-bit mode; None where the base of CS is not known."""
    # In 64-bit mode the base of CS is taken as 0 (SDM vol. 1, Segmentation in 64-Bit Mode).
    base = 0 if mode == 64 else guest.segment_base("CS")
    return None if base is None else (rip + base) & ((1 << (64 if mode == 64 else 32)) - 1)


def instruction_at(guest: CodeReader, rip: int, mode: int) -> Tuple[Optional[Instruction], str]:
    """(instruction, why there is none) at CS:`rip` of a guest in 16-, 32- or 64-bit mode."""
    address = linear_address(guest, rip, mode)
    if address is None:
        return None, "the base of CS is not known"
    data, problem = b"", ""
    try:
        data = guest.read(address, min(MAX_LENGTH, PAGE_SIZE - address % PAGE_SIZE))
        if len(data) < MAX_LENGTH:
            data += guest.read(address + len(data), MAX_LENGTH - len(data))
    except MemoryUnavailable as error:
        problem = str(error)
    except VtdbgError as error:
        return None, str(error)
    if not data:
        return None, problem
    try:
        # Branch targets and RIP-relative addresses come out right for an instruction at RIP, not at its linear address.
        found = disassemble(data, rip, mode)
    except VtdbgError as error:
        return None, str(error)
    if found is None:
        return None, problem or f"no instruction that capstone knows at {address:#x}: {data.hex(' ')}"
    return found, ""
