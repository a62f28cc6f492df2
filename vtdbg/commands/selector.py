"""`vcpu:1`, `cpu:0`: a control block by KVM's own objects, wherever a command takes an address.

    vcpu:ID          the block that vCPU ID enters its guest with            vcpu:PID/ID      of the VM of process PID
    vcpu:ID.vmcb02   another of its blocks: vmcb01, vmcb02, vmcb12, vmcs01, vmcs02, vmcs12, shadow
    cpu:N            what Linux' processor N has current
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, List

from vtdbg.errors import UsageError

if TYPE_CHECKING:
    from vtdbg.linux.kvm import KvmState, Vcpu
    from vtdbg.machine import Machine

_VCPU = re.compile(r"vcpu:(?:(\d+)/)?(\d+)(?:\.(\w+))?", re.I)
_CPU = re.compile(r"cpu:(\d+)", re.I)
HOW = "write vcpu:ID, vcpu:PID/ID, vcpu:ID.vmcb02 or cpu:N"
NO_SYMBOLS = "needs a live target and KVM's symbols in the debugger (docs/gdb.md, KVM's own objects)"


def selectors(machine: "Machine") -> List[str]:
    """What can be written for the control blocks that KVM's objects name; empty where nobody knows them.  Nothing is searched for it."""
    from vtdbg.targets.live import LiveMachine

    state = machine.kvm() if isinstance(machine, LiveMachine) else None
    if state is None:
        return []
    ids = [vcpu.id for vcpu in state.vcpus]
    found = [f"vcpu:{number}" for number in ids if ids.count(number) == 1]
    for vcpu in state.vcpus:
        whose = f"vcpu:{vcpu.id}" if vcpu.pid is None else f"vcpu:{vcpu.pid}/{vcpu.id}"
        names = [block.name for block in vcpu.blocks if block.address is not None] + ["vmcb12"] * (vcpu.vmcb12 is not None)
        found += [whose] * any(block.current for block in vcpu.blocks) + [f"{whose}.{name}" for name in names]
    found += [f"cpu:{cpu.number}" for cpu in state.cpus if cpu.block is not None]
    return list(dict.fromkeys(found))


class Selector(str):
    """The text of one, until the target is known."""

    __slots__ = ()


def is_selector(text: str) -> bool:
    return text[:5].lower() == "vcpu:" or text[:4].lower() == "cpu:"


def address_of(machine: "Machine", text: str) -> int:
    """The physical address of the control block.  UsageError where the text is none, KVM has none such, or nobody knows KVM's objects."""
    vcpu, cpu = _VCPU.fullmatch(text), _CPU.fullmatch(text)
    if vcpu is None and cpu is None:
        raise UsageError(f"{text!r}: {HOW}")
    state = kvm_state(machine, text)
    if cpu is not None:
        return _of_cpu(state, int(cpu.group(1)))
    assert vcpu is not None
    found = state.find(int(vcpu.group(2)), int(vcpu.group(1)) if vcpu.group(1) else None)
    name = (vcpu.group(3) or "").lower()
    if name == "vmcb12":
        return _vmcb12(machine, found)
    block = found.current if not name else next((block for block in found.blocks if block.name == name), None)
    if block is None:
        has = ", ".join(block.name for block in found.blocks) or "none"
        raise UsageError(f"{found.title} has no {name or 'current control block'}; it has {has}")
    if block.address is None:
        raise UsageError(f"the {block.name} of {found.title} is at a kernel address that is not mapped")
    return block.address


def kvm_state(machine: "Machine", what: str) -> "KvmState":
    """KVM's objects; UsageError says what is missing."""
    from vtdbg.targets.live import LiveMachine

    if not isinstance(machine, LiveMachine):
        raise UsageError(f"{what} {NO_SYMBOLS}; {machine.name} is no such")
    machine.refresh()
    state = machine.kvm()
    if state is None:
        # The host's page tables, through which they are read, may be known to a control block that a search finds.
        machine.settle()
        state = machine.kvm()
    if state is None:
        why = "; ".join(machine.processors.notes) or "it has no symbol vm_list"
        raise UsageError(f"{what} {NO_SYMBOLS}: {why}")
    return state


def _of_cpu(state: "KvmState", number: int) -> int:
    found = next((cpu for cpu in state.cpus if cpu.number == number), None)
    if found is None:
        raise UsageError(f"cpu:{number}: Linux' CPUs are 0 to {len(state.cpus) - 1}")
    if found.block is None:
        raise UsageError(f"cpu:{number}: CPU {number} has no control block current")
    return found.block


def _vmcb12(machine: "Machine", vcpu: "Vcpu") -> int:
    """The page of the guest's memory that holds the VMCB which the guest made for its own guest."""
    from vtdbg.svm.npt import Npt
    from vtdbg.svm.vmcb import Vmcb

    first = next((block for block in vcpu.blocks if block.name == "vmcb01"), None)
    if vcpu.vmcb12 is None or first is None or first.address is None:
        raise UsageError(f"{vcpu.title} has run no guest of its own: no vmcb12")
    vmcb = Vmcb.from_page(machine.memory.read_page(first.address))
    if not vmcb["nested_ctl"] & 1:
        raise UsageError(f"vmcb12 of {vcpu.title} is at {vcpu.vmcb12:#x} in its memory, and that has no nested tables")
    walk = Npt.from_vmcb(vmcb).walk(machine.memory, vcpu.vmcb12, None)
    if walk.hpa is None:
        raise UsageError(f"vmcb12 of {vcpu.title} is at GPA {vcpu.vmcb12:#x}: {walk.outcome}: {walk.reason}")
    return walk.hpa
