"""The guest of a VM exit as its explanation needs it: registers, mode, segment bases and memory, out of a VMCS and what else is known."""

from __future__ import annotations

from typing import Dict, Mapping, Optional, Union

from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
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
ADDRESS_MASK = (1 << 64) - 1


class Guest:
    """`registers` by lower- or upper-case name win over the VMCS; what nobody gave is None.

    `memory` is host-physical memory; `eptp` replaces the VMCS's EPT_POINTER and says that the guest runs on EPT.
    """

    def __init__(self, vmcs: Vmcs, registers: Optional[Mapping[str, Optional[int]]] = None, memory: Optional[PhysicalMemory] = None,
                 eptp: Optional[int] = None) -> None:
        self.memory, self.eptp = memory, eptp
        self.registers: Dict[str, int] = {name.lower(): value for name, value in (registers or {}).items() if value is not None}
        saved: Dict[Union[str, int], int] = {IN_VMCS[name]: value for name, value in self.registers.items() if name in IN_VMCS}
        self.vmcs = vmcs.replaced(saved, "given register") if saved else vmcs

    def register(self, name: str) -> Optional[int]:
        """RAX, R8, RSP, CR0, ... in any case."""
        key = name.lower()
        return self.vmcs.get(IN_VMCS[key]) if key in IN_VMCS else self.registers.get(key)

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

    def nested_root(self) -> Optional[int]:
        """The EPTP that the guest runs on, None without EPT; UsageError where that is not known."""
        if self.eptp is not None:
            return self.eptp
        enabled = control(self.vmcs, "sec", "EPT")
        if enabled is False:
            return None
        root = self.vmcs.get("EPT_POINTER")
        if enabled is None or root is None:
            raise UsageError("whether the guest runs on EPT, and on which, is not known: give the EPTP or a VMCS with EPT_POINTER")
        return root

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at linear `address`, through the guest's paging and EPT.

        Raises MemoryUnavailable with the dimension and level that stopped, UsageError where what a walk begins with is not known.
        """
        from vtdbg.gva import translate
        from vtdbg.x86.paging import Paging

        if self.memory is None:
            raise UsageError("no memory was given")
        paging, root = Paging.from_vmcs(self.vmcs), self.nested_root()
        data = b""
        while len(data) < size:
            at = (address + len(data)) & ADDRESS_MASK
            piece = min(size - len(data), PAGE_SIZE - at % PAGE_SIZE)
            found = translate(self.memory, at, paging=paging, eptp=root)
            if found.hpa is None:
                raise MemoryUnavailable(at, piece, f"{found.dimension or 'guest'} walk: {found.reason}", "guest-linear")
            try:
                data += self.memory.read(found.hpa, piece)
            except MemoryUnavailable as error:
                raise MemoryUnavailable(at, piece, f"its host-physical address {found.hpa:#x}: {error.reason}", "guest-linear") from error
        return data
