"""The guest of a VMCS or VMCB as a Machine: its physical memory through its nested tables, its processor as of the last exit.

What runs on a dump runs inside a guest of it then: the control blocks of a hypervisor in the guest, the tables that it makes for guests of its own.
Guests of guests stack.
"""

from __future__ import annotations

from typing import Mapping, Optional, Tuple, Union

from vtdbg.errors import FormatError, UsageError
from vtdbg.machine import Cpu, Machine
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.views import GuestPhysicalMemory
from vtdbg.svm.npt import Npt
from vtdbg.svm.recognise import VMCB, taken_for
from vtdbg.svm.vmcb import Vmcb
from vtdbg.targets.where import of_vmcb, of_vmcs
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.controls import control
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.layouts import Layout
from vtdbg.vmx.vmcs import Vmcs

NO_TABLES = "this guest has no nested tables: its CR3 is physical for its hypervisor, so the memory shown is the hypervisor's"


class GuestMachine(Machine):
    """A guest of `outer`.  Where `outer` runs, this is as fresh as its control block: as of the last exit."""

    def __init__(self, outer: Machine, memory: PhysicalMemory, title: str, cpu: Cpu, note: str) -> None:
        super().__init__(memory, outer.name, "guest", "", [cpu], {"guest of": title}, [], guest=True)
        self._outer, self._title, self._note = outer, title, note
        self.refresh()

    def host_registers(self) -> Mapping[str, Optional[int]]:
        return self.cpus[0].registers

    def refresh(self) -> None:
        outer = self._outer
        outer.refresh()
        self.provenance = f"{outer.provenance or f'{outer.name} ({outer.format})'}, inside the guest of the {self._title}"
        self.warnings = [*outer.warnings, *([self._note] if self._note else [])]


def guest_machine(machine: Machine, address: int, layout: Union[None, str, Layout] = None, caps: Optional[VmxCapabilities] = None,
                  host_paging: Optional[str] = None) -> GuestMachine:
    """The guest whose VMCS or VMCB is in the page at physical `address` of `machine`; which of the two it is, the page tells.

    `layout` as for `Vmcs.from_page`; `caps` judge the EPT entries; `host_paging` is the format of nested page tables.  Raises UsageError where
    the page is neither, and where its nested paging cannot be followed; MemoryUnavailable where it cannot be read.
    """
    block = _control_block(machine.memory.read_page(address), address, layout)
    kind = "VMCS" if isinstance(block, Vmcs) else "VMCB"
    memory, note = _memory_of(machine, block, caps, host_paging)
    registers = (of_vmcs(address, block) if isinstance(block, Vmcs) else of_vmcb(address, block)).guest
    title = f"{kind} at {address:#x}"
    return GuestMachine(machine, memory, title, Cpu(0, registers, f"guest state of the {title}, as of the last exit"), note)


def _control_block(page: bytes, address: int, layout: Union[None, str, Layout]) -> Union[Vmcs, Vmcb]:
    try:
        return Vmcs.from_page(page, layout, f"page {address:#x}")
    except FormatError as error:
        if taken_for(page) == VMCB:
            return Vmcb.from_page(page)
        raise UsageError(f"the page at {address:#x} is neither a VMCB nor a VMCS that can be read ({error})") from error


def _memory_of(machine: Machine, block: Union[Vmcs, Vmcb], caps: Optional[VmxCapabilities],
               host_paging: Optional[str]) -> Tuple[PhysicalMemory, str]:
    memory = machine.memory
    if isinstance(block, Vmcs):
        # Without EPT the processor uses the guest's CR3 as it is (SDM vol. 3, EPT Overview): it is physical for the hypervisor.
        if control(block, "sec", "EPT") is False:
            return memory, NO_TABLES
        return GuestPhysicalMemory(memory, Ept.from_vmcs(block, caps)), ""
    if block["nested_ctl"] & 1 == 0:
        return memory, NO_TABLES
    return GuestPhysicalMemory(memory, Npt.from_vmcb(block).on_host(machine.host_registers(), host_paging)), ""
