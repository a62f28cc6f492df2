"""The guest of a VM exit as its explanation needs it: registers, mode, segment bases and memory, out of a VMCS and what else is known."""

from __future__ import annotations

from typing import Dict, Mapping, Optional

from vtdbg.memory.base import PhysicalMemory
from vtdbg.vmx.controls import control
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.disasm import code_mode

IN_VMCS: Mapping[str, str] = {
    "rsp": "GUEST_RSP", "rip": "GUEST_RIP", "rflags": "GUEST_RFLAGS", "cr0": "GUEST_CR0", "cr3": "GUEST_CR3", "cr4": "GUEST_CR4",
    "dr7": "GUEST_DR7", "gdtr_base": "GUEST_GDTR_BASE", "idtr_base": "GUEST_IDTR_BASE",
    **{f"{segment}_base": f"GUEST_{segment.upper()}_BASE" for segment in ("es", "cs", "ss", "ds", "fs", "gs")},
}
"""Registers that a VM exit saves in the VMCS (SDM vol. 3, Saving Guest State); the others are in the VMM's own save area."""

CODE_L, CODE_D = 1 << 13, 1 << 14
UNUSABLE = 1 << 16


class Guest:
    """`registers` by lower- or upper-case name win over the VMCS; what nobody gave is None."""

    def __init__(self, vmcs: Vmcs, registers: Optional[Mapping[str, Optional[int]]] = None, memory: Optional[PhysicalMemory] = None) -> None:
        self.vmcs, self.memory = vmcs, memory
        self.registers: Dict[str, int] = {name.lower(): value for name, value in (registers or {}).items() if value is not None}

    def register(self, name: str) -> Optional[int]:
        """RAX, R8, RSP, CR0, ... in any case."""
        key = name.lower()
        if key in self.registers:
            return self.registers[key]
        return self.vmcs.get(IN_VMCS[key]) if key in IN_VMCS else None

    def segment_base(self, segment: str) -> Optional[int]:
        return self.register(f"{segment.lower()}_base")

    def long_mode(self) -> Optional[bool]:
        """IA32_EFER.LMA: a VM exit copies it into the entry control "IA-32e mode guest" (SDM vol. 3, Saving Non-Register State)."""
        efer = self.registers.get("efer")
        if efer is not None:
            return bool(efer >> 10 & 1)
        found = control(self.vmcs, "entry", "IA32E_MODE")
        if found is None and control(self.vmcs, "exit", "SAVE_IA32_EFER"):
            saved = self.vmcs.get("GUEST_IA32_EFER")
            return None if saved is None else bool(saved >> 10 & 1)
        return found

    def mode(self) -> Optional[int]:
        """16, 32 or 64: how the guest's code is decoded."""
        rights = self.vmcs.get("GUEST_CS_AR_BYTES")
        if rights is None:
            rights = self.registers.get("cs_attributes")
        return code_mode(self.long_mode(), None if rights is None else bool(rights & CODE_L), None if rights is None else bool(rights & CODE_D))

    def mode_text(self) -> str:
        mode = self.mode()
        return "mode unknown" if mode is None else f"{mode}-bit code" + (" (compatibility mode)" if mode < 64 and self.long_mode() else "")

    def next_rip(self, length: int) -> Optional[int]:
        """RIP behind an instruction of `length` bytes: it wraps at 32 bits outside 64-bit mode; None where RIP or the mode is unknown."""
        rip = self.register("rip")
        mode = self.mode()
        if rip is None:
            return None
        if mode is None:
            # Below 2 GiB both widths agree.
            return rip + length if rip + length < 1 << 31 else None
        return (rip + length) & ((1 << (64 if mode == 64 else 32)) - 1)

    def cpl(self) -> Optional[int]:
        """SS.DPL, which is the CPL at every exit (SDM vol. 3, Guest Register State)."""
        rights = self.vmcs.get("GUEST_SS_AR_BYTES")
        return None if rights is None else rights >> 5 & 3
