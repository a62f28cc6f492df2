"""The instruction that a VM exit is about: read at the guest's RIP, and compared with what the exit says it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import FrozenSet, Optional, Tuple

from vtdbg.vmx.guest import Guest
from vtdbg.x86.code import instruction_at
from vtdbg.x86.disasm import Instruction


@dataclass(frozen=True)
class Code:
    """`instruction` is None where it cannot be had, and `problem` says which step failed.

    `passed` is True where GUEST_RIP is behind the instruction: a VMM that had advanced it already when the VMCS was stored.
    """

    instruction: Optional[Instruction]
    problem: str = ""
    passed: bool = False
    notes: Tuple[str, ...] = ()


def at_rip(guest: Guest, length: Optional[int], mnemonics: FrozenSet[str]) -> Code:
    """The instruction at CS:RIP; `length` and `mnemonics` are what the exit says of it (None and empty: nothing)."""
    rip, mode = guest.register("rip"), guest.mode()
    if rip is None:
        return Code(None, "GUEST_RIP is not known")
    if mode is None:
        return Code(None, "the guest's mode is not known (needs GUEST_CS_AR_BYTES and the entry control IA-32e mode guest)")
    found, problem = instruction_at(guest, rip, mode)
    if mnemonics and length and not (found is not None and matches(found, length, mnemonics)):
        before, _ = instruction_at(guest, rip - length, mode)
        if before is not None and matches(before, length, mnemonics):
            note = f"GUEST_RIP {rip:#x} is already behind the instruction: the VMM has advanced it since the exit"
            return Code(before, passed=True, notes=(note,))
    notes = []
    if found is not None and mnemonics and not _named(found, mnemonics):
        notes.append(f"the bytes at GUEST_RIP are not the instruction of this exit ({' or '.join(sorted(mnemonics))}): "
                     "they or GUEST_RIP changed since, or the memory is of another time")
    elif found is not None and length and found.length != length:
        notes.append(f"the instruction at GUEST_RIP has {found.length} bytes, VM_EXIT_INSTRUCTION_LEN is {length}: the memory is of another time")
    return Code(found, problem, notes=tuple(notes))


def matches(found: Instruction, length: int, mnemonics: FrozenSet[str]) -> bool:
    return found.length == length and _named(found, mnemonics)


def _named(found: Instruction, mnemonics: FrozenSet[str]) -> bool:
    """Is one of the words of the instruction's name among `mnemonics`?  ("rep insb" is "insb")"""
    return any(word in mnemonics for word in found.mnemonic.split())
