"""Who runs whom: control blocks of a scan as hypervisors, their VMs, the virtual processors of those, and the hypervisors inside the VMs.

A hypervisor is what VM exits return to (VMX: one HOST_RIP) or, for SVM, one I/O permission bitmap; a VM is one set of nested tables.  A control
block in a page that a VM's tables map belongs to a hypervisor inside that VM, unless the tables map a control block of the VM itself:
then the hypervisor hides nothing from its guest, and what is mapped proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

from vtdbg.errors import UsageError, VtdbgError
from vtdbg.machine import Machine
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.views import GuestPhysicalMemory
from vtdbg.scanner import Found
from vtdbg.svm.nesting import merged, same_guest
from vtdbg.svm.npt import Npt
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx.controls import control
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.find import EPT_PRESENT, NPT_PRESENT, Budget, equal_guest, find_in_tables
from vtdbg.vmx.guest import Guest
from vtdbg.vmx.kvm_nested import Record, nested_records
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.mode import mode_name

DEPTH_LIMIT = 6
BLOCK_LIMIT = 4096
"""Control blocks that are sorted into a tree; real machines have one for each virtual processor."""


MOST_COMPARED = 1 << 10
"""Pairs of VMCBs that are compared in full: each costs some walks, and hostile memory has thousands of both."""


class Tables(NamedTuple):
    """The nested tables of a VM: what points to them, and as the walks take them."""

    pointer: int
    root: int
    levels: int
    structure: Union[Ept, Npt]

    @property
    def name(self) -> str:
        return f"EPTP {self.pointer:#x}" if isinstance(self.structure, Ept) else f"nCR3 {self.pointer:#x}"


@dataclass(eq=False)
class Block:
    """One control block: `address` is where it is in the memory of the hypervisor that uses it, `found.address` in the scanned memory."""

    address: int
    found: Found
    fields: "Union[Vmcs, Vmcb]"
    tables: Optional[Tables] = None
    shadow: Optional[Found] = None
    """The shadow VMCS that its link pointer names."""
    shadow_of: Optional[int] = None
    """The guest-physical address of the VMCS that the shadow stands for, where that is known."""
    ran_with: List["Block"] = field(default_factory=list)
    """The control blocks of the hypervisor below that held the same guest (KVM: vmcs02, vmcb02)."""
    ran_with_by: Dict[int, str] = field(default_factory=dict)
    """The evidence for each of these, by its address."""
    copy: Optional[Found] = None
    """The live copy that the hypervisor below keeps of it (KVM: the cached vmcs12)."""

    @property
    def kind(self) -> str:
        return self.found.kind

    @property
    def tag(self) -> Tuple[str, Optional[int]]:
        """("VPID", n) or ("ASID", n); None where it is unknown or not used."""
        if isinstance(self.fields, Vmcb):
            return "ASID", self.fields.get("asid")
        return "VPID", self.fields.get("VIRTUAL_PROCESSOR_ID") if control(self.fields, "sec", "VPID") is not False else None

    @cached_property
    def mode(self) -> str:
        """The mode of the guest's processor (`mode_name`)."""
        values = self.fields
        if isinstance(values, Vmcb):
            efer, attributes = values.get("efer"), values.get("cs.attrib")
            return mode_name(values.get("cr0"), values.get("cr4"), None if efer is None else bool(efer >> 10 & 1), values.get("rflags"),
                             None if attributes is None else bool(attributes >> 9 & 1))
        rights = values.get("GUEST_CS_AR_BYTES")
        return mode_name(values.get("GUEST_CR0"), values.get("GUEST_CR4"), Guest(values).long_mode(), values.get("GUEST_RFLAGS"),
                         None if rights is None else bool(rights >> 13 & 1))

    @property
    def registers(self) -> Mapping[str, Optional[int]]:
        """The guest's rip, rsp, cr3."""
        names = ("rip", "rsp", "cr3")
        return {name: self.fields.get(name if self.kind == "vmcb" else f"GUEST_{name.upper()}") for name in names}


@dataclass(eq=False)
class Page:
    """A page that is no control block and yet says something: a VMXON region, a stale vmcs12, a host save area."""

    address: int
    found: Found
    what: str
    copy: Optional[Found] = None


@dataclass(eq=False)
class Vm:
    """Control blocks with the same nested tables.  `memory` is the guest's physical memory."""

    tables: Optional[Tables]
    blocks: List[Block]
    below: PhysicalMemory
    parent: "Optional[Vm]" = None
    hypervisors: List["Hypervisor"] = field(default_factory=list)
    pages: List[Page] = field(default_factory=list)
    maps_itself: bool = False
    """Its tables map a control block of its own."""

    @cached_property
    def memory(self) -> PhysicalMemory:
        return GuestPhysicalMemory(self.below, self.tables.structure) if self.tables is not None else self.below

    @property
    def tags(self) -> List[str]:
        """VPIDs or ASIDs, each once."""
        return list(dict.fromkeys(f"{name} {number:#x}" for name, number in (block.tag for block in self.blocks) if number is not None))

    def steps_down(self, address: int) -> List[Optional[int]]:
        """`address` of this guest, in the memory of the hypervisor that runs it, and so on to the scanned memory; ends with None where a
        translation fails."""
        found: List[Optional[int]] = [address]
        vm: Optional[Vm] = self
        while vm is not None and address is not None:
            below = vm.tables.structure.walk(vm.below, address).hpa if vm.tables is not None else address
            found.append(below)
            if below is None:
                break
            address, vm = below, vm.parent
        return found


@dataclass(eq=False)
class Hypervisor:
    """What VM exits return to.  `level` 0 owns the scanned memory, 1 runs in a VM of level 0, ..."""

    kind: str
    level: int
    identity: Optional[int]
    vms: List[Vm] = field(default_factory=list)
    pages: List[Page] = field(default_factory=list)

    @property
    def title(self) -> str:
        if self.kind == "vmcb":
            return "SVM, " + (f"I/O permission bitmap {self.identity:#x}" if self.identity is not None else "I/O permission bitmap unknown")
        return "VT-x, " + (f"exits to RIP {self.identity:#x}" if self.identity is not None else "host RIP unknown")

    @property
    def cr3s(self) -> List[int]:
        """HOST_CR3 of its VMCSs, each once (a VMCB has none)."""
        values = [block.fields.get("HOST_CR3") for vm in self.vms for block in vm.blocks if isinstance(block.fields, Vmcs)]
        return list(dict.fromkeys(value for value in values if value is not None))


@dataclass
class Hierarchy:
    """The whole tree; `rest` are pages of the scan that have no place in it, `notes` what a reader has to know."""

    hypervisors: List[Hypervisor]
    rest: List[Found]
    notes: List[str]


class KvmPair(NamedTuple):
    """What KVM's own objects say of a vmcb02: the vmcb01 of the same vCPU, the guest-physical vmcb12 that it stands for, and whose it is."""

    vmcb01: int
    vmcb12: int
    words: str


def hierarchy(machine: "Machine | PhysicalMemory", found: Sequence[Found], kvm: Optional[Mapping[int, KvmPair]] = None) -> Hierarchy:
    """The findings of a scan as a tree.  Bounded: at most BLOCK_LIMIT control blocks, a fixed number of tables, DEPTH_LIMIT levels.

    `kvm` is what is known of vmcb02s by the kernel's symbols, by their addresses.
    """
    memory = machine.memory if isinstance(machine, Machine) else machine
    return _Builder(memory, isinstance(machine, Machine) and machine.guest, kvm or {}).build(list(found))


_ROLES = {"vmxon-region": "VMXON region, or a VMCS never written back", "empty": "VMXON region or stale vmcs12",
          "host-save-area": "host save area (VM_HSAVE_PA)"}


class _Builder:
    def __init__(self, memory: PhysicalMemory, guest: bool, kvm: Mapping[int, KvmPair]) -> None:
        self._memory, self._guest, self._kvm = memory, guest, kvm
        self._budget = Budget()
        self._notes: List[str] = []
        self._copies: List[Block] = []

    def build(self, found: List[Found]) -> Hierarchy:
        blocks = [block for block in (self._block(item) for item in found[:BLOCK_LIMIT]) if block is not None]
        if len(found) > BLOCK_LIMIT:
            self._notes.append(f"{len(found) - BLOCK_LIMIT} of {len(found)} pages are not sorted in: too many for real control blocks")
        shadows = {item.address: item for item in found if item.classification == "shadow-vmcs"}
        for block in blocks:
            target = block.fields.get("VMCS_LINK_POINTER") if isinstance(block.fields, Vmcs) else None
            block.shadow = shadows.pop(target, None) if target is not None else None
        pages = [Page(item.address, item, _ROLES[item.classification]) for item in found[:BLOCK_LIMIT] if item.classification in _ROLES]
        # In a guest's memory a vmcs12 is the VMCS of a hypervisor there.
        software = [] if self._guest else [block for block in blocks if block.found.classification == "kvm-vmcs12"]
        real = [block for block in blocks if block not in software]
        self._pair(real, software)
        tops, left, pages = self._level(self._memory, real, software, pages, 0, None)
        self._copies = left
        self._stand_for(tops)
        placed = {block.found.address for block in _all_blocks(tops)} | {page.found.address for page in _all_pages(tops)}
        placed |= {item.address for block in _all_blocks(tops) for item in (block.shadow, block.copy) if item is not None}
        placed |= {page.copy.address for page in _all_pages(tops) if page.copy is not None}
        placed |= {helper.found.address for block in _all_blocks(tops) for helper in block.ran_with}
        placed |= self._give_pages(tops, pages)
        if self._budget.left <= 0:
            self._notes.append("the nested tables are too many to be searched in full: a hypervisor inside a guest may be shown beside it")
        return Hierarchy(tops, [item for item in found if item.address not in placed], self._notes)

    def _block(self, item: Found) -> Optional[Block]:
        if item.kind == "vmcs" and item.vmcs is not None and item.classification in ("vmcs", "kvm-vmcs12"):
            return Block(item.address, item, item.vmcs)
        if item.classification == "vmcb":
            try:
                return Block(item.address, item, Vmcb.from_page(self._memory.read_page(item.address), source=f"VMCB at {item.address:#x}"))
            except VtdbgError:
                return None
        return None

    def _pair(self, real: List[Block], software: List[Block]) -> None:
        """KVM runs a nested guest with a VMCS of its own (vmcs02): the one that holds the guest of a vmcs12."""
        by_stack: Dict[int, List[Block]] = {}
        for block in real:
            stack = block.registers["rsp"]
            if stack and block.kind == "vmcs":
                by_stack.setdefault(stack, []).append(block)
        for nested in software:
            for block in by_stack.get(nested.registers["rsp"] or 0, ())[:8]:
                if isinstance(block.fields, Vmcs) and isinstance(nested.fields, Vmcs) and equal_guest(block.fields, nested.fields):
                    _ran_with(nested, block, "the same guest state")

    # --- one level of physical memory -----------------------------------------------------------------------------------------------

    def _level(self, memory: PhysicalMemory, native: List[Block], guests: List[Block], pages: List[Page], level: int,
               parent: Optional[Vm]) -> Tuple[List[Hypervisor], List[Block], List[Page]]:
        """Hypervisors of blocks whose addresses are in `memory`; and what belongs to nobody here.

        `native` can own memory; `guests` (vmcs12 that software keeps) can only be inside some VM.
        """
        for block in native:
            block.tables = _tables_of(block)
        places = {item.address: item for item in (*native, *guests)}
        where = {page.address: page for page in pages}
        vms = self._vms(memory, native, parent)
        inside = self._inside(memory, vms, set(places) | set(where))
        helpers = {id(block) for nested in guests for block in nested.ran_with}
        owner = _owners(vms, inside, helpers)
        _pair_vmcbs(memory, native, owner, inside, self._kvm if parent is None else {})
        hidden = {id(block) for nested in (*guests, *native) if nested.address in owner for block in nested.ran_with}
        left = [block for block in guests if block.address not in owner]
        outside = [page for page in pages if page.address not in owner]
        for vm in vms:
            vm.blocks = [block for block in vm.blocks if block.address not in owner and id(block) not in hidden]
        for vm in vms:
            if level + 1 < DEPTH_LIMIT:
                mine = [(gpa, page) for page, gpa in inside.get(id(vm), {}).items() if owner.get(page) is vm]
                self._fill(vm, [(gpa, places[page]) for gpa, page in mine if page in places],
                           [(gpa, where[page]) for gpa, page in mine if page in where], level)
        return _hypervisors([vm for vm in vms if vm.blocks], level), left, outside

    def _fill(self, vm: Vm, blocks: List[Tuple[int, Block]], pages: List[Tuple[int, Page]], level: int) -> None:
        """The hypervisors in the memory of `vm`, whose control blocks are at (guest-physical) addresses there."""
        for gpa, block in blocks:
            block.address = gpa
        for gpa, page in pages:
            page.address = gpa
        moved = [page for _, page in pages]
        vm.hypervisors, left, vm.pages = self._level(vm.memory, [block for _, block in blocks], [], moved, level + 1, vm)
        self._copies += left

    def _vms(self, memory: PhysicalMemory, blocks: List[Block], parent: Optional[Vm]) -> List[Vm]:
        vms: Dict[Tuple[str, int, int], Vm] = {}
        for block in blocks:
            tables = block.tables
            key = (block.kind, tables.root, 0) if tables is not None else (block.kind, -1, block.address)
            vm = vms.setdefault(key, Vm(tables, [], memory, parent))
            vm.blocks.append(block)
        return list(vms.values())

    def _inside(self, memory: PhysicalMemory, vms: List[Vm], wanted: Set[int]) -> Dict[int, Dict[int, int]]:
        """{id of the VM: {address in `memory`: guest-physical address}} of the wanted pages in each VM's tables."""
        found: Dict[int, Dict[int, int]] = {}
        for vm in vms:
            tables = vm.tables
            if tables is None or not wanted:
                continue
            present = EPT_PRESENT if isinstance(tables.structure, Ept) else NPT_PRESENT
            mapped, _ = find_in_tables(memory, tables.root, tables.levels, present, wanted, self._budget)
            own = {block.address for block in vm.blocks}
            vm.maps_itself = not own.isdisjoint(mapped)
            if not vm.maps_itself:
                found[id(vm)] = mapped
        return found

    # --- what KVM keeps of a nested hypervisor ----------------------------------------------------------------------------------------

    def _stand_for(self, tops: List[Hypervisor]) -> None:
        """Which page each cached vmcs12 stands for, where KVM's own record says it."""
        if not self._copies:
            return
        guests = [vm for vm in _all_vms(tops) if vm.parent is None]
        places = {gpa for vm in guests for gpa in _marked(vm)}
        records = nested_records(self._memory, [block.found.address for block in self._copies], places)
        for copy in self._copies:
            for record in records.get(copy.found.address, ()):
                # Several guests can use the same address: then the record does not say whose it is.
                takers = [vm for vm in guests if record.current in _marked(vm)]
                if len(takers) == 1:
                    self._apply(takers[0], record, copy)

    def _apply(self, vm: Vm, record: Record, copy: Block) -> None:
        for page in vm.pages:
            if page.address == record.current and page.found.classification == "empty":
                page.what, page.copy = f"current vmcs12 (KVM's record at {record.address:#x}); its page is stale", copy.found
            elif page.address == record.vmxon and page.found.classification == "empty":
                page.what = f"VMXON region (KVM's record at {record.address:#x})"
        for block in _inner_blocks(vm):
            if block.address == record.current:
                block.copy = copy.found
        shadowed = [block for block in vm.blocks if block.shadow is not None]
        if len(shadowed) == 1:
            shadowed[0].shadow_of = record.current

    def _give_pages(self, tops: List[Hypervisor], pages: List[Page]) -> Set[int]:
        """VMXON regions and host save areas of the scanned memory to the only hypervisor of their kind."""
        given: Set[int] = set()
        for page in pages:
            kind = "vmcb" if page.found.classification == "host-save-area" else "vmcs"
            takers = [item for item in tops if item.kind == kind]
            if len(takers) == 1 and page.found.classification != "empty":
                takers[0].pages.append(page)
                given.add(page.found.address)
        return given


def _owners(vms: List[Vm], inside: Dict[int, Dict[int, int]], helpers: Set[int]) -> Dict[int, Vm]:
    """{address: the VM in whose memory it is}.  Where several VMs map a page, one that runs a guest of its own comes before the tables with
    which a nested guest ran (`helpers`).  VMs that map each other's control blocks prove nothing and own none of them."""
    ordered = sorted(vms, key=lambda vm: all(id(block) in helpers for block in vm.blocks))
    owner: Dict[int, Vm] = {}
    for vm in ordered:
        for page in inside.get(id(vm), {}):
            owner.setdefault(page, vm)
    for vm in _circular(vms, owner):
        for block in vm.blocks:
            owner.pop(block.address, None)
    return owner


def _pair_vmcbs(memory: PhysicalMemory, blocks: Sequence[Block], owner: Mapping[int, Vm], inside: Mapping[int, Mapping[int, int]],
                kvm: Mapping[int, "KvmPair"]) -> None:
    """The VMCB with which the hypervisor below ran the guest of a VMCB inside a VM (KVM: vmcb02 for vmcb12), by the best evidence that there is.

    Evidence that fits several is none.
    """
    outside = [block for block in blocks if block.kind == "vmcb" and block.address not in owner]
    inner = [block for block in blocks if block.kind == "vmcb" and block.address in owner]
    by_stack: Dict[int, List[Block]] = {}
    for block in outside:
        by_stack.setdefault(block.registers["rsp"] or 0, []).append(block)
    fits: List[Tuple[Block, Block, str]] = []
    left = MOST_COMPARED
    for nested in inner:
        vm = owner[nested.address]
        gpa = inside.get(id(vm), {}).get(nested.address)
        named = [block for block in outside if block.address in kvm and kvm[block.address].vmcb12 == gpa
                 and kvm[block.address].vmcb01 in (one.address for one in vm.blocks)]
        if named:
            _ran_with(nested, named[0], kvm[named[0].address].words)
            continue
        near = by_stack.get(nested.registers["rsp"] or 0, [])[:8] if nested.registers["rsp"] else []
        alike = [block for block in near if block not in vm.blocks and _same_guest(block, nested)]
        if alike:
            for block in alike:
                _ran_with(nested, block, "the same guest state")
            continue
        for block in outside[:max(left, 0)]:
            left -= 1
            words = _merged(memory, vm, block, nested)
            if words:
                fits.append((nested, block, words))
    for nested, block, words in fits:
        taken = any(block in other.ran_with for other in inner)
        if not taken and sum(one is nested for one, _, _ in fits) == 1 and sum(one is block for _, one, _ in fits) == 1:
            _ran_with(nested, block, words)


def _ran_with(nested: Block, block: Block, words: str) -> None:
    nested.ran_with.append(block)
    nested.ran_with_by[block.address] = words


def _same_guest(one: Block, two: Block) -> bool:
    return isinstance(one.fields, Vmcb) and isinstance(two.fields, Vmcb) and same_guest(one.fields, two.fields)


def _merged(memory: PhysicalMemory, vm: Vm, block: Block, nested: Block) -> str:
    """The evidence that `block` was merged out of `nested`, in the memory of `vm`, and of a control block of `vm`."""
    if not isinstance(block.fields, Vmcb) or not isinstance(nested.fields, Vmcb) or vm.tables is None:
        return ""
    outer = [one.fields for one in vm.blocks if one is not block and isinstance(one.fields, Vmcb)]
    structure = vm.tables.structure
    try:
        return merged(block.fields, nested.fields, outer, memory, vm.memory, lambda address: structure.walk(memory, address).maps_to)
    except UsageError:
        return ""


def _circular(vms: List[Vm], owner: Mapping[int, Vm]) -> List[Vm]:
    """VMs that are inside themselves by way of others."""
    outer = {id(vm): next((owner[block.address] for block in vm.blocks if block.address in owner), None) for vm in vms}
    state: Dict[int, int] = {}
    circular: List[Vm] = []
    for number, start in enumerate(vms):
        path: List[Vm] = []
        at: Optional[Vm] = start
        while at is not None and id(at) not in state:
            state[id(at)] = number
            path.append(at)
            at = outer[id(at)]
        if at is not None and state[id(at)] == number and at in path:
            circular += path[path.index(at):]
    return circular


def _hypervisors(vms: List[Vm], level: int) -> List[Hypervisor]:
    found: Dict[Tuple[str, Optional[int]], Hypervisor] = {}
    for vm in vms:
        first = vm.blocks[0]
        identity = first.fields.get("HOST_RIP" if first.kind == "vmcs" else "iopm_base_pa")
        found.setdefault((first.kind, identity), Hypervisor(first.kind, level, identity)).vms.append(vm)
    return list(found.values())


def _tables_of(block: Block) -> Optional[Tables]:
    """The nested tables of a control block; None where it uses none, or a pointer that no processor accepts."""
    values = block.fields
    try:
        if isinstance(values, Vmcs):
            ept = Ept.from_vmcs(values)
            return None if ept.root_problem else Tables(ept.eptp, ept.root, ept.levels, ept)
        npt = Npt.from_vmcb(values)
        return None if npt.root_problem else Tables(npt.ncr3, npt.root, 4, npt)
    except UsageError:
        return None


def _all_vms(hypervisors: Sequence[Hypervisor]) -> List[Vm]:
    found = []
    for item in hypervisors:
        for vm in item.vms:
            found += [vm, *_all_vms(vm.hypervisors)]
    return found


def _all_blocks(hypervisors: Sequence[Hypervisor]) -> List[Block]:
    return [block for vm in _all_vms(hypervisors) for block in vm.blocks]


def _all_pages(hypervisors: Sequence[Hypervisor]) -> List[Page]:
    return [page for vm in _all_vms(hypervisors) for page in vm.pages] + [page for item in hypervisors for page in item.pages]


def _inner_blocks(vm: Vm) -> List[Block]:
    """Control blocks directly in the memory of `vm`."""
    return [block for item in vm.hypervisors for inner in item.vms for block in inner.blocks]


def _marked(vm: Vm) -> Set[int]:
    """Guest-physical addresses of pages that begin like a VMCS."""
    return {page.address for page in vm.pages} | {block.address for block in _inner_blocks(vm)}
