"""Single numbers of the current guest, for a debugger's expressions and conditions: $vmcs("GUEST_RIP"), $gpa(gva), ..."""

from __future__ import annotations

from typing import List, Optional, Tuple, Union

from vtdbg.commands.nested import npt_tables
from vtdbg.commands.select import VmcbAt, VmcsAt, chosen_vmcb, chosen_vmcs, found_blocks
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.gva import translate
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.views import GuestPhysicalMemory
from vtdbg.svm.npt import Npt
from vtdbg.svm.vmcb import Vmcb
from vtdbg.targets.live import LiveMachine
from vtdbg.vmx.controls import control
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.walk import Structure
from vtdbg.x86.paging import Paging


def vmcs_field(session: Session, name: Union[str, int], address: Optional[int] = None) -> int:
    """The field of the VMCS at `address`, of the guest that runs or ran last, or of the only one there is."""
    return _vmcs(session, address).vmcs[name]


def vmcb_field(session: Session, name: Union[str, int], address: Optional[int] = None) -> int:
    """The same of a VMCB."""
    return _vmcb(session, address).vmcb[name]


def exit_reason(session: Session) -> int:
    """Basic exit reason (VMX), or EXITCODE (SVM), of the guest that runs or ran last."""
    block = _block(session)
    return block["EXIT_REASON"] & 0xFFFF if isinstance(block, Vmcs) else block["exit_code"]


def hpa_of(session: Session, gpa: int) -> int:
    """Host-physical address of a guest-physical one; UsageError with the reason where it is not mapped."""
    _, tables = _space(session)
    if tables is None:
        raise UsageError("the guest has no nested paging: its physical addresses are the host's or shadowed")
    walk = tables.walk(session.machine.memory, gpa, None)
    if not walk.mapped or walk.hpa is None:
        raise UsageError(f"GPA {gpa:#x}: {walk.outcome}: {walk.reason}")
    return walk.hpa


def gpa_of(session: Session, gva: int) -> int:
    """Guest-physical address of a guest's linear one; UsageError with the reason where it is not mapped."""
    paging, tables = _space(session)
    walk = translate(session.machine.memory, gva, paging=paging, nested=tables, caps=session.caps)
    found = walk.gpa if walk.final is not None else walk.hpa
    if found is None:
        raise UsageError(f"GVA {gva:#x}: {walk.outcome}: {walk.reason}")
    return found


def guest_memory(session: Session) -> PhysicalMemory:
    """Physical memory as the guest sees it that runs, ran last, or is the only one."""
    _, tables = _space(session)
    return session.machine.memory if tables is None else GuestPhysicalMemory(session.machine.memory, tables)


def guest_mode(session: Session) -> Optional[int]:
    """16, 32 or 64: how the code of that guest is decoded, as of its last exit; None where its control block does not say."""
    block = _block(session)
    if isinstance(block, Vmcs):
        from vtdbg.vmx.guest import Guest

        return Guest(block).mode()
    from vtdbg.svm.guest import SvmGuest

    return SvmGuest(block).mode()


def _space(session: Session) -> Tuple[Paging, Optional[Structure]]:
    """How the guest that runs, or ran last, translates.  While it runs its live control registers count, not those of the last exit."""
    block = _block(session)
    machine = session.machine
    live = machine.registers() if isinstance(machine, LiveMachine) and machine.where.mode == "guest" else {}
    if isinstance(block, Vmcs):
        paging = Paging.from_vmcs(block)
        tables: Optional[Structure] = Ept.from_vmcs(block, session.caps) if control(block, "sec", "EPT") is not False else None
    else:
        paging = Paging.from_registers(block.get("cr0"), block["cr3"], block.get("cr4"), block.get("efer"), pat=block.get("g_pat"))
        tables = npt_tables(session, Npt.from_vmcb(block)) if block["nested_ctl"] & 1 else None
    cr3 = live.get("cr3")
    if cr3 is not None:
        paging = Paging.from_registers(live.get("cr0"), cr3, live.get("cr4"), live.get("efer"))
    return paging, tables


def _block(session: Session) -> Union[Vmcs, Vmcb]:
    where = session.machine.where if isinstance(session.machine, LiveMachine) else None
    kind = where.block.kind if where is not None and where.block is not None else None
    kind = kind or next((name for name in ("vmcs", "vmcb") if session.machine.current(name) is not None), None)
    if kind == "vmcs" or (kind is None and any(found.vmcs is not None for found in found_blocks(session, "vmcs"))):
        return _vmcs(session, None).vmcs
    return _vmcb(session, None).vmcb


def _vmcs(session: Session, address: Optional[int]) -> VmcsAt:
    chosen = chosen_vmcs(session, _current(session, "vmcs") if address is None else address)
    _only([item.address for item in chosen], "VMCS")
    return chosen[0]


def _vmcb(session: Session, address: Optional[int]) -> VmcbAt:
    chosen = chosen_vmcb(session, _current(session, "vmcb") if address is None else address)
    _only([item.address for item in chosen], "VMCB")
    return chosen[0]


def _current(session: Session, kind: str) -> Optional[int]:
    machine = session.machine
    block = machine.where.block if isinstance(machine, LiveMachine) else None
    return block.address if block is not None and block.kind == kind else machine.current(kind)


def _only(addresses: List[Optional[int]], what: str) -> None:
    if len(addresses) > 1:
        listed = ", ".join(f"{address:#x}" for address in addresses if address is not None)
        raise UsageError(f"which {what}? There are {listed}: give the address as the second argument")
