"""The VMs of a list of control blocks, one a row: control blocks with the same nested tables.  `source scan` draws the whole tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple

from vtdbg.report import Table, Value, hexa
from vtdbg.scanner import Found
from vtdbg.vmx.find import equal_guest
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.mode import mode_name

if TYPE_CHECKING:
    from vtdbg.svm.vmcb import Vmcb

_COLUMNS = (("host", "host RIP"), ("pointer", "EPTP"), ("tags", "VPID"), ("processors", "vCPUs"), ("mode", "mode"), ("blocks", "VMCS"))
_SVM_COLUMNS = (("host", "IOPM"), ("pointer", "nCR3"), ("tags", "ASID"), ("processors", "vCPUs"), ("mode", "mode"), ("blocks", "VMCB"))
_VMCS_LINKS, _VMCB_LINKS = ("ept dump --eptp", "vmcs dump"), ("npt dump --ncr3", "vmcb dump")
_EPT, _VPID, _IA32E = 1 << 1, 1 << 5, 1 << 9
_SECONDARY = 1 << 31
"""Secondary controls EPT and VPID, entry control "IA-32e mode guest", primary control "activate secondary controls"."""
_NESTED = 64


def vmcs_vms(found: Sequence[Found]) -> Table:
    """VMs of the hypervisor that owns the memory; shadow VMCSs, and those that run the guest of a nested hypervisor, are not counted."""
    vms: Dict[Tuple[int, int, int], List[Vmcs]] = {}
    where: Dict[Tuple[int, int, int], List[int]] = {}
    nested = [item.vmcs for item in found if item.vmcs is not None and item.classification == "kvm-vmcs12"][:_NESTED]
    for item in found:
        vmcs = item.vmcs
        if vmcs is None or item.classification != "vmcs" or any(equal_guest(vmcs, other) for other in nested):
            continue
        secondary = _secondary(vmcs)
        pointer = vmcs.get("EPT_POINTER") if secondary & _EPT else None
        key = (vmcs.get("HOST_RIP", -1) or -1, -1 if pointer is None else pointer, item.address if pointer is None else 0)
        vms.setdefault(key, []).append(vmcs)
        where.setdefault(key, []).append(item.address)
    table = Table("vms", _COLUMNS, title="VMs: VMCSs with the same EPT" if vms else "", wrap="blocks")
    for key, members in vms.items():
        tags = [member.get("VIRTUAL_PROCESSOR_ID") for member in members if _secondary(member) & _VPID]
        _row(table, key, [tag for tag in tags if tag is not None], [_vmcs_mode(member) for member in members], where[key], _VMCS_LINKS)
    return table


def vmcb_vms(blocks: Sequence[Tuple[int, Vmcb]]) -> Table:
    """The same for (address, VMCB)."""
    vms: Dict[Tuple[int, int, int], List[Vmcb]] = {}
    where: Dict[Tuple[int, int, int], List[int]] = {}
    for address, vmcb in blocks:
        pointer = vmcb.get("nested_cr3") if (vmcb.get("nested_ctl") or 0) & 1 else None
        bitmap = vmcb.get("iopm_base_pa")
        key = (-1 if bitmap is None else bitmap, -1 if pointer is None else pointer, address if pointer is None else 0)
        vms.setdefault(key, []).append(vmcb)
        where.setdefault(key, []).append(address)
    table = Table("vms", _SVM_COLUMNS, title="VMs: VMCBs with the same nested tables" if vms else "", wrap="blocks")
    for key, members in vms.items():
        tags = [member.get("asid") for member in members]
        _row(table, key, [tag for tag in tags if tag is not None], [_vmcb_mode(member) for member in members], where[key], _VMCB_LINKS)
    return table


def _row(table: Table, key: Tuple[int, int, int], tags: Sequence[int], modes: Sequence[str], where: Sequence[int], links: Tuple[str, str]) -> None:
    pointer = Value(None, "none", "dim") if key[1] < 0 else hexa(key[1], link=f"{links[0]} {key[1]:#x}")
    numbers = [f"{tag:#x}" for tag in dict.fromkeys(tags)]
    kinds = list(dict.fromkeys(modes))
    addresses = [f"{address:#x}" for address in where]
    # One cell, one link.
    link = f"{links[1]} {addresses[0]}" if len(addresses) == 1 else ""
    table.add(hexa(None if key[0] < 0 else key[0]), pointer, Value(numbers, ", ".join(numbers[:3]) + (" ..." if len(numbers) > 3 else "")),
              Value(len(where), str(len(where))), Value(kinds, ", ".join(kinds)), Value(addresses, " ".join(addresses), link=link))


def _secondary(vmcs: Vmcs) -> int:
    used = (vmcs.get("CPU_BASED_VM_EXEC_CONTROL") or 0) & _SECONDARY
    return (vmcs.get("SECONDARY_VM_EXEC_CONTROL") or 0) if used else 0


def _vmcs_mode(vmcs: Vmcs) -> str:
    entry, rights = vmcs.get("VM_ENTRY_CONTROLS"), vmcs.get("GUEST_CS_AR_BYTES")
    return mode_name(vmcs.get("GUEST_CR0"), vmcs.get("GUEST_CR4"), None if entry is None else bool(entry & _IA32E), vmcs.get("GUEST_RFLAGS"),
                     None if rights is None else bool(rights >> 13 & 1))


def _vmcb_mode(vmcb: Vmcb) -> str:
    efer, attributes = vmcb.get("efer"), vmcb.get("cs.attrib")
    return mode_name(vmcb.get("cr0"), vmcb.get("cr4"), None if efer is None else bool(efer >> 10 & 1), vmcb.get("rflags"),
                     None if attributes is None else bool(attributes >> 9 & 1))
