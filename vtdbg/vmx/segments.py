"""The segment registers of a VMCS, guest and host, against the descriptors that their selectors name.

Sources: SDM vol. 3, Guest Register State; Loading Host Segment and Descriptor-Table Registers.  Dated 2026-11.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

from vtdbg.memory.holes import Readable
from vtdbg.vmx.controls import control
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.descriptor_tables import MAX_LIMIT
from vtdbg.x86.descriptors import AR_UNUSABLE, SegmentDescriptor
from vtdbg.x86.segments import REGISTERS, Difference, Mode, SegmentComparison, SegmentState, compare_in_tables
from vtdbg.x86.tss import read_tss

CR0_PE, RFLAGS_VM, EFER_LMA, AR_L = 1 << 0, 1 << 17, 1 << 10, 1 << 13

HOST_CODE_32, HOST_CODE_64, HOST_DATA, HOST_TSS = 0xC09B, 0xA09B, 0xC093, 0x8B
HOST_TR_LIMIT = 0x67
"""What a VM exit gives the host's registers, whatever the descriptors say: code type 11 with L = host address-space size and D = its inverse,
data type 3, busy TSS; G = 1 and limit 0xffffffff for all but TR; GDTR and IDTR limits 0xffff; LDTR unusable."""


def guest_mode(vmcs: Vmcs) -> Optional[Mode]:
    """IA-32e mode and 64-bit code of the guest; None where that is unknown."""
    long_mode = control(vmcs, "entry", "IA32E_MODE")
    rights = vmcs.get("GUEST_CS_AR_BYTES")
    if long_mode is None:
        efer = vmcs.get("GUEST_IA32_EFER")
        if efer is None:
            return None
        long_mode = bool(efer & EFER_LMA)
    if long_mode and rights is None:
        return None
    return Mode(long_mode, long_mode and bool((rights or 0) & AR_L))


def guest_segment(vmcs: Vmcs, name: str) -> SegmentState:
    """What the VMCS holds for guest register `name`."""
    return SegmentState(name, vmcs.get(f"GUEST_{name}_SELECTOR"), vmcs.get(f"GUEST_{name}_BASE"), vmcs.get(f"GUEST_{name}_LIMIT"),
                        vmcs.get(f"GUEST_{name}_AR_BYTES"))


def compare_guest(vmcs: Vmcs, memory: Readable) -> Tuple[SegmentComparison, ...]:
    """Every guest segment register against its descriptor; `memory` is the guest's linear memory.

    In real-address and virtual-8086 mode no descriptor is used, and a note says so.
    """
    states = [guest_segment(vmcs, name) for name in REGISTERS]
    mode = guest_mode(vmcs)
    cr0, rflags = vmcs.get("GUEST_CR0"), vmcs.get("GUEST_RFLAGS")
    if mode is None or cr0 is None or rflags is None:
        return tuple(SegmentComparison(state, None, (), ("the guest's mode is unknown",)) for state in states)
    if not cr0 & CR0_PE or rflags & RFLAGS_VM:
        where = "virtual-8086 mode" if cr0 & CR0_PE else "real-address mode"
        return tuple(SegmentComparison(state, None, (), (f"{where}: segment registers are not loaded from descriptors",)) for state in states)
    gdt = vmcs.get("GUEST_GDTR_BASE"), vmcs.get("GUEST_GDTR_LIMIT")
    ldtr = next(state for state in states if state.name == "LDTR")
    ldt = (None, None) if ldtr.unusable else (ldtr.base, ldtr.limit)
    return tuple(compare_in_tables(state, gdt, ldt, mode, memory) for state in states)


def host_segment(vmcs: Vmcs, name: str) -> SegmentState:
    """What register `name` holds after a VM exit: the host-state area's selector and bases, everything else fixed by the processor."""
    if name == "LDTR":
        return SegmentState("LDTR", 0, None, None, AR_UNUSABLE)
    selector = vmcs.get(f"HOST_{name}_SELECTOR")
    if name == "TR":
        return SegmentState("TR", selector, vmcs.get("HOST_TR_BASE"), HOST_TR_LIMIT, HOST_TSS)
    if name == "CS":
        wide = control(vmcs, "exit", "HOST_ADDR_SPACE_SIZE")
        return SegmentState("CS", selector, 0, 0xFFFFFFFF, None if wide is None else HOST_CODE_64 if wide else HOST_CODE_32)
    base = vmcs.get(f"HOST_{name}_BASE") if name in ("FS", "GS") else 0
    if selector is not None and selector & 0xFFFC == 0:
        return SegmentState(name, selector, base, None, AR_UNUSABLE)
    return SegmentState(name, selector, base, 0xFFFFFFFF, HOST_DATA)


def compare_host(vmcs: Vmcs, memory: Readable) -> Tuple[SegmentComparison, ...]:
    """What every host segment register holds after a VM exit against its descriptor; `memory` is the host's linear memory.

    The GDT is read from HOST_GDTR_BASE with the limit 0xffff that a VM exit sets: the table's own limit is not in the VMCS.
    """
    wide = control(vmcs, "exit", "HOST_ADDR_SPACE_SIZE")
    states = [host_segment(vmcs, name) for name in REGISTERS]
    if wide is None:
        return tuple(SegmentComparison(state, None, (), ("the host's mode is unknown: VM-exit controls are missing",)) for state in states)
    mode = Mode(wide, wide, "the host")
    found: List[SegmentComparison] = []
    for state in states:
        if state.name == "LDTR":
            found.append(SegmentComparison(state, None, (), ("a VM exit makes LDTR unusable: a host with an LDT has to execute LLDT again",)))
            continue
        one = compare_in_tables(state, (vmcs.get("HOST_GDTR_BASE"), MAX_LIMIT), (None, None), mode, memory)
        if state.selector is not None and state.selector & 7:
            why = "RPL and TI of host selectors have to be 0: VM entry fails"
            bad = Difference("selector", state.selector, state.selector & ~7, matters=True, why=why)
            one = SegmentComparison(one.state, one.row, (bad, *one.differences), one.notes)
        found.append(_with_tr_limit(one, memory) if state.name == "TR" else one)
    return tuple(found)


def _with_tr_limit(one: SegmentComparison, memory: Readable) -> SegmentComparison:
    """Whether the TR limit of 0x67 hurts depends on the TSS: only an I/O permission bitmap lies behind it."""
    descriptor = one.row.descriptor if one.row is not None else None
    if not isinstance(descriptor, SegmentDescriptor) or all(difference.field != "limit" for difference in one.differences):
        return one
    bitmap = read_tss(memory, descriptor.base, descriptor.limit, descriptor.bits or 64).io_bitmap
    used = bitmap is None or bitmap.covered > 0
    why = ("a VM exit sets the limit to 0x67: the I/O permission bitmap is out of reach until the host executes LTR again" if used
           else "a VM exit sets the limit to 0x67: the TSS has no I/O permission bitmap inside its limit, so nothing is lost")
    differences = tuple(Difference("limit", item.held, item.descriptor, used, why) if item.field == "limit" else item for item in one.differences)
    return SegmentComparison(one.state, one.row, differences, one.notes)
