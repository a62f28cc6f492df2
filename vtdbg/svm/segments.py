"""The segment registers of a VMCB against the descriptors that their selectors name (APM vol. 2, Segment State in the VMCB)."""

from __future__ import annotations

from typing import Tuple

from vtdbg.memory.holes import Readable
from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86.descriptors import from_vmcb_attrib
from vtdbg.x86.segments import REGISTERS, Mode, SegmentComparison, SegmentState, compare_in_tables

CR0_PE, RFLAGS_VM, EFER_LMA, ATTRIB_L = 1 << 0, 1 << 17, 1 << 10, 1 << 9


def segment(vmcb: Vmcb, name: str) -> SegmentState:
    """What the VMCB holds for register `name`, its attributes in the VMCS form.

    P = 0 stands for unusable: SVM ignores the attributes of a segment that is not present.
    """
    lower = name.lower()
    attrib = vmcb.get(f"{lower}.attrib")
    return SegmentState(name, vmcb.get(f"{lower}.selector"), vmcb.get(f"{lower}.base"), vmcb.get(f"{lower}.limit"),
                        None if attrib is None else from_vmcb_attrib(attrib))


def compare_guest(vmcb: Vmcb, memory: Readable) -> Tuple[SegmentComparison, ...]:
    """Every segment register of the VMCB against its descriptor; `memory` is the guest's linear memory."""
    states = [segment(vmcb, name) for name in REGISTERS]
    cr0, rflags, efer, attrib = vmcb.get("cr0"), vmcb.get("rflags"), vmcb.get("efer"), vmcb.get("cs.attrib")
    if cr0 is None or rflags is None or efer is None or attrib is None:
        return tuple(SegmentComparison(state, None, (), ("the guest's mode is unknown",)) for state in states)
    if not cr0 & CR0_PE or rflags & RFLAGS_VM:
        where = "virtual-8086 mode" if cr0 & CR0_PE else "real-address mode"
        return tuple(SegmentComparison(state, None, (), (f"{where}: segment registers are not loaded from descriptors",)) for state in states)
    long_mode = bool(efer & EFER_LMA)
    mode = Mode(long_mode, long_mode and bool(attrib & ATTRIB_L))
    ldtr = next(state for state in states if state.name == "LDTR")
    ldt = (None, None) if ldtr.unusable else (ldtr.base, ldtr.limit)
    gdt = vmcb.get("gdtr.base"), vmcb.get("gdtr.limit")
    return tuple(compare_in_tables(state, gdt, ldt, mode, memory) for state in states)
