"""Which VMCB the hypervisor below ran a nested guest with: KVM's vmcb02, for the vmcb12 that the guest's hypervisor made.

KVM merges vmcb02 out of vmcb12 and of vmcb01, with which the guest's hypervisor itself runs (Linux 6.1, arch/x86/kvm/svm/nested.c,
nested_vmcb02_prepare_control, nested_vmcb02_prepare_save, recalc_intercepts).  While the nested guest runs, its state in vmcb12 is that of
VMRUN: the merge still shows.
"""

from __future__ import annotations

from itertools import islice
from typing import Callable, Mapping, Optional, Sequence

from vtdbg.enumeration import Enumeration
from vtdbg.memory.base import PhysicalMemory
from vtdbg.svm.npt import Npt
from vtdbg.svm.vmcb import Vmcb

GUEST_STATE = ("rsp", "rip", "cr3", "cr0", "efer", "gdtr.base", "idtr.base", "tr.base", "fs.base", "gs.base", "cs.selector", "tr.selector")
LASTING_STATE = (("efer", 0), ("cr4", 1 << 6), ("gdtr.base", 0), ("gdtr.limit", 0), ("idtr.base", 0), ("idtr.limit", 0))
"""(field, bits that do not count) of what a guest seldom changes, and VMRUN loads: what vmcb12 says of it at VMRUN, vmcb02 says while the guest
runs.  CR4.MCE is the host's (svm_set_cr4)."""
CLEARED: Mapping[str, int] = {"intercept_cr": 1 << 8 | 1 << 24, "intercept_dr": 0, "intercept_exceptions": 0, "intercept_misc1": 1 << 4,
                              "intercept_misc2": 1 << 1}
"""Intercepts, and those of vmcb01 that KVM leaves out of vmcb02: CR8 reads and writes, VINTR, VMMCALL (recalc_intercepts)."""
MSR_PROT = 1 << 28
_LEAST_STATE = 6
_PAGES = 64
"""Ranges of the tables that are compared."""
_WORK = 1 << 14
_MASK64 = (1 << 64) - 1

Down = Callable[[int], Optional[int]]
"""A guest-physical address of the guest's hypervisor in the memory of the hypervisor below; None where it is not mapped."""


def same_guest(one: Vmcb, two: Vmcb) -> bool:
    """Do both hold one state, as right after the nested #VMEXIT?"""
    pairs = [(one.get(name), two.get(name)) for name in GUEST_STATE]
    used = [(first, second) for first, second in pairs if first and second]
    return len(used) >= _LEAST_STATE and all(first == second for first, second in used)


def merged(candidate: Vmcb, nested: Vmcb, outer: Sequence[Vmcb], memory: PhysicalMemory, guest: PhysicalMemory, down: Down) -> str:
    """What shows that `candidate` (in `memory`) was merged out of `nested` (in `guest`) and one of `outer`; empty where something does not fit.

    All of it is needed: the intercepts of both, the I/O permission map of the outer one, the sum of the TSC offsets, an MSR permission map of its
    own only where `nested` intercepts MSRs, the state that lasts, and nested tables that lead where both levels together do.
    """
    if not _lasting_state(candidate, nested) or not any(_of_both(candidate, nested, one) for one in outer):
        return ""
    ranges = _composed(candidate, nested, memory, guest, down)
    if not ranges:
        return ""
    return ("intercepts, permission maps and TSC offset are those of this one and of its hypervisor's VMCB merged, its nested tables lead where both "
            f"levels do ({ranges} range{'s' * (ranges != 1)} compared)")


def _lasting_state(one: Vmcb, two: Vmcb) -> bool:
    pairs = [(one.get(name), two.get(name), ignored) for name, ignored in LASTING_STATE]
    return all(first is not None and second is not None and not (first ^ second) & ~ignored for first, second, ignored in pairs)


def _of_both(candidate: Vmcb, nested: Vmcb, outer: Vmcb) -> bool:
    for name, cleared in CLEARED.items():
        wide, one, two = candidate.get(name), nested.get(name), outer.get(name)
        if wide is None or one is None or two is None or (one | two & ~cleared) & ~wide:
            return False
    own_map = bool((nested.get("intercept_misc1") or 0) & MSR_PROT)
    if (candidate.get("msrpm_base_pa") == outer.get("msrpm_base_pa")) == own_map:
        return False
    offsets = [one.get("tsc_offset") for one in (nested, outer)]
    return (candidate.get("iopm_base_pa") == outer.get("iopm_base_pa") and None not in offsets
            and candidate.get("tsc_offset") == sum(offset or 0 for offset in offsets) & _MASK64)


def _composed(candidate: Vmcb, nested: Vmcb, memory: PhysicalMemory, guest: PhysicalMemory, down: Down) -> int:
    """Ranges of the candidate's tables that go where the nested tables (if there are any) and the guest's lead together; 0 where one does not."""
    tables = Npt.from_vmcb(candidate)
    inner = Npt.from_vmcb(nested) if (nested.get("nested_ctl") or 0) & 1 else None
    if tables.root_problem or inner is not None and inner.root_problem:
        return 0
    count = 0
    for row in islice(Enumeration(memory, tables, limit=_WORK), _PAGES):
        middle = inner.walk(guest, row.start).maps_to if inner is not None else row.start
        if middle is None or down(middle) != row.target:
            return 0
        count += 1
    return count
