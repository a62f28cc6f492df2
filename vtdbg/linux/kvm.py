"""KVM's VMs, vCPUs and control blocks, by its own objects: `vm_list`, struct kvm, struct vcpu_svm or vcpu_vmx, and what each processor runs.

Members are looked for by the debugger's types, not by the kernel's version.  VARIANTS says which commit made the differences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.linux.kernel import Kernel, NoSymbol, Symbols

LONGEST = 4096
"""VMs, and vCPUs of one (KVM_MAX_VCPUS is 4096 at most)."""
MOST_NOTES = 8
_NO_CPU = -1
_IN_GUEST = (1, 2)
"""IN_GUEST_MODE, and EXITING_GUEST_MODE: another processor wants this one to leave its guest, and it has not left yet (enum in kvm_host.h)."""


class Variant(NamedTuple):
    """`has` (a type and a member, or a symbol) tells that the kernel is of `since` or newer; what `commit` is called."""

    what: str
    has: Tuple[str, ...]
    since: str
    commit: str


# Nothing is read by release, only by type: a release below serves for one line of `kvm list`.  6.1 was looked at; the others are those in which
# the commits are known to have come, and no kernel of theirs was at hand (November 2026).
VARIANTS = (
    Variant("SVM: svm_data is a structure, before that a pointer to one", ("svm_cpu_data", "save_area_pa"), "6.1",
            "KVM: SVM: do not allocate struct svm_cpu_data dynamically"),
    Variant("a VM's vCPUs are an XArray, before that an array of pointers", ("kvm", "vcpu_array"), "5.17",
            "KVM: Convert the kvm->vcpus array to a xarray"),
    Variant("SVM: vmcb01 and nested.vmcb02, before that one VMCB (vmcb, vmcb_pa)", ("vcpu_svm", "vmcb01"), "5.13",
            "KVM: SVM: Use a separate vmcb for the nested L2 guest"),
    Variant("kvm_running_vcpu: which vCPU a processor has loaded", ("kvm_running_vcpu",), "5.6", "KVM: Move running VCPU from ARM to common code"),
    Variant("VMX: vmcs01, each VMCS with its state", ("vcpu_vmx", "vmcs01"), "3.1", "KVM: VMX: Keep list of loaded VMCSs, instead of vcpus"),
)
"""The newest first."""


def at_least(symbols: Symbols) -> str:
    """The oldest release whose KVM has the types of this one, by VARIANTS; empty where it is older than all of them."""
    found = (row.since for row in VARIANTS if (symbols.has(*row.has) if len(row.has) > 1 else symbols.get(f"&{row.has[0]}") is not None))
    return next(found, "")


@dataclass(frozen=True)
class KvmBlock:
    """A control block of a vCPU.  `name` is KVM's (vmcb01, vmcs02, ...), `kind` "vmcb" or "vmcs"; `address` physical, None where not mapped."""

    name: str
    kind: str
    address: Optional[int]
    current: bool = False
    """It is the one that this vCPU enters its guest with."""


@dataclass(frozen=True)
class Vcpu:
    """`id` is vcpu_id; `cpu` the processor that it is loaded on, or was last."""

    pointer: int
    id: int
    cpu: Optional[int]
    in_guest: Optional[bool]
    """It is in its guest, or just before or behind it."""
    blocks: Tuple[KvmBlock, ...]
    vm: int
    pid: Optional[int]
    vmcb12: Optional[int] = None
    """SVM: guest-physical address of the VMCB that the guest ran its own guest with last."""

    @property
    def current(self) -> Optional[KvmBlock]:
        return next((block for block in self.blocks if block.current), None)

    @property
    def title(self) -> str:
        whose = f"process {self.pid}" if self.pid is not None else f"struct kvm at {self.vm:#x}"
        return f"vCPU {self.id} of {whose}"


@dataclass(frozen=True)
class CpuState:
    """What one processor has current: `block` physical and `kind`, by `evidence`; `vcpu` whose it is, where known.

    `offset` is the processor's per-CPU area; `save_area` its host save area (SVM).
    """

    number: int
    offset: int
    block: Optional[int] = None
    kind: str = ""
    evidence: str = ""
    vcpu: Optional[Vcpu] = None
    running: bool = False
    """The vCPU is loaded now (kvm_running_vcpu); False where it only was the last one."""
    save_area: Optional[int] = None


@dataclass(frozen=True)
class KvmState:
    """Everything, as of one stop.  `vendor` "svm" or "vmx"; `notes` what could not be read, one line each."""

    vendor: str
    vcpus: Tuple[Vcpu, ...]
    cpus: Tuple[CpuState, ...]
    vms: Tuple[Tuple[int, Optional[int]], ...]
    root: str
    notes: Tuple[str, ...] = ()
    since: str = ""
    """The release that the types are of, or older than they are."""
    by_address: Dict[int, Tuple[Vcpu, KvmBlock]] = field(default_factory=dict)

    def find(self, vcpu: int, pid: Optional[int] = None) -> Vcpu:
        """The vCPU with this id, of the VM of process `pid` where there are several.  Raises UsageError."""
        found = [item for item in self.vcpus if item.id == vcpu and pid in (None, item.pid)]
        if not found:
            known = ", ".join(f"{item.pid}/{item.id}" for item in self.vcpus[:16]) or "none"
            raise UsageError(f"KVM has no such vCPU; it has {known} (process/vCPU)")
        if len(found) > 1:
            listed = ", ".join(f"vcpu:{item.pid}/{item.id}" for item in found[:8])
            raise UsageError(f"several VMs have a vCPU {vcpu}: {listed}")
        return found[0]


def read_kvm(kernel: Kernel) -> KvmState:
    """KVM's state.  Raises NoSymbol where the symbols lack what everything hangs on, MemoryUnavailable where that cannot be read."""
    notes: List[str] = []
    vendor = _vendor(kernel)
    vcpus: List[Vcpu] = []
    vms: List[Tuple[int, Optional[int]]] = []
    try:
        for vm in _vms(kernel):
            pid = kernel.number(vm, "kvm", "userspace_pid") if kernel.symbols.has("kvm", "userspace_pid") else None
            vms.append((vm, pid))
            vcpus += _vcpus(kernel, vendor, vm, pid, notes)
            if len(vcpus) > LONGEST or len(notes) > MOST_NOTES:
                notes.append(f"the rest is not read: {len(vms)} VMs, {len(vcpus)} vCPUs so far")
                break
    except (MemoryUnavailable, UsageError) as error:
        notes.append(f"vm_list: {error}")
    cpus = tuple(_processors(kernel, vendor, {item.pointer: item for item in vcpus}, notes))
    by_address = {block.address: (item, block) for item in vcpus for block in item.blocks if block.address is not None}
    return KvmState(vendor, tuple(vcpus), cpus, tuple(vms), kernel.root.source, tuple(notes), at_least(kernel.symbols), by_address)


def _vendor(kernel: Kernel) -> str:
    """Both modules' types may be there; only one is loaded into the kernel, the other has no per-processor data with something in it."""
    symbols = kernel.symbols
    amd, intel = symbols.get("&svm_data") is not None, symbols.get("&current_vmcs") is not None
    if amd and intel:
        try:
            amd = any(_svm_data(kernel, offset) for offset in kernel.offsets())
        except (MemoryUnavailable, NoSymbol):
            amd = False
    if not amd and not intel:
        raise NoSymbol("the debugger has vm_list and neither svm_data nor current_vmcs: load the symbols of kvm-amd or kvm-intel too")
    return "svm" if amd else "vmx"


def _vms(kernel: Kernel) -> Iterator[int]:
    link = kernel.symbols.offset("kvm", "vm_list")
    for entry in kernel.list(kernel.symbols.address("vm_list")):
        yield entry - link


def _vcpus(kernel: Kernel, vendor: str, vm: int, pid: Optional[int], notes: List[str]) -> List[Vcpu]:
    found: List[Vcpu] = []
    try:
        for pointer in _vcpu_pointers(kernel, vm):
            found.append(_vcpu(kernel, vendor, pointer, vm, pid))
    except (MemoryUnavailable, UsageError) as error:
        notes.append(f"vCPUs of struct kvm at {vm:#x}: {error}")
    return found


def _vcpu_pointers(kernel: Kernel, vm: int) -> Iterator[int]:
    symbols = kernel.symbols
    if symbols.has("kvm", "vcpu_array"):
        yield from (pointer for _, pointer in kernel.array(vm + symbols.offset("kvm", "vcpu_array")))
        return
    place = vm + symbols.offset("kvm", "vcpus")
    size = symbols.size("((struct kvm *)0)->vcpus") or 0
    for number in range(min(size // 8, LONGEST)):
        pointer = kernel.u64(place + 8 * number)
        if pointer:
            yield pointer


def _vcpu(kernel: Kernel, vendor: str, pointer: int, vm: int, pid: Optional[int]) -> Vcpu:
    symbols = kernel.symbols
    cpu = kernel.number(pointer, "kvm_vcpu", "cpu")
    in_guest = kernel.number(pointer, "kvm_vcpu", "mode") in _IN_GUEST if symbols.has("kvm_vcpu", "mode") else None
    outer = pointer - symbols.offset(f"vcpu_{vendor}", "vcpu")
    blocks, vmcb12 = (_svm_blocks(kernel, outer), _vmcb12(kernel, outer)) if vendor == "svm" else (_vmx_blocks(kernel, outer), None)
    return Vcpu(pointer, kernel.number(pointer, "kvm_vcpu", "vcpu_id"), None if cpu == _NO_CPU else cpu, in_guest, tuple(blocks), vm, pid, vmcb12)


def _svm_blocks(kernel: Kernel, svm: int) -> Iterator[KvmBlock]:
    symbols = kernel.symbols
    if not symbols.has("vcpu_svm", "vmcb01"):
        yield KvmBlock("vmcb", "vmcb", kernel.plain(kernel.pointer(svm, "vcpu_svm", "vmcb_pa")), current=True)
        return
    current = kernel.pointer(svm, "vcpu_svm", "current_vmcb")
    for name, member in (("vmcb01", "vmcb01"), ("vmcb02", "nested.vmcb02")):
        info = svm + symbols.offset("vcpu_svm", member)
        if not kernel.pointer(info, "kvm_vmcb_info", "ptr"):
            continue
        yield KvmBlock(name, "vmcb", kernel.plain(kernel.pointer(info, "kvm_vmcb_info", "pa")), info == current)


def _vmcb12(kernel: Kernel, svm: int) -> Optional[int]:
    if not kernel.symbols.has("vcpu_svm", "nested.vmcb12_gpa"):
        return None
    address = kernel.pointer(svm, "vcpu_svm", "nested.vmcb12_gpa")
    # INVALID_GPA, all ones, before 5.13 also 0.
    return address if address and address >> 52 == 0 else None


def _vmx_blocks(kernel: Kernel, vmx: int) -> Iterator[KvmBlock]:
    symbols = kernel.symbols
    current = kernel.pointer(vmx, "vcpu_vmx", "loaded_vmcs")
    for name, member in (("vmcs01", "vmcs01"), ("vmcs02", "nested.vmcs02")):
        if not symbols.has("vcpu_vmx", member):
            continue
        loaded = vmx + symbols.offset("vcpu_vmx", member)
        page = kernel.pointer(loaded, "loaded_vmcs", "vmcs")
        if page:
            yield KvmBlock(name, "vmcs", kernel.physical(page), loaded == current)
        shadow = kernel.pointer(loaded, "loaded_vmcs", "shadow_vmcs") if symbols.has("loaded_vmcs", "shadow_vmcs") else 0
        if shadow:
            yield KvmBlock("shadow", "vmcs", kernel.physical(shadow))
    cached = kernel.pointer(vmx, "vcpu_vmx", "nested.cached_vmcs12") if symbols.has("vcpu_vmx", "nested.cached_vmcs12") else 0
    if cached:
        yield KvmBlock("vmcs12", "vmcs", kernel.physical(cached))


def _svm_data(kernel: Kernel, offset: int) -> int:
    """The address of the processor's struct svm_cpu_data; 0 where it has none (yet)."""
    place, symbols = kernel.per_cpu("svm_data", offset), kernel.symbols
    size = symbols.size("svm_data")
    whole = size > 8 if size is not None else symbols.has("svm_cpu_data", "save_area_pa")
    return place if whole else kernel.u64(place)


def _processors(kernel: Kernel, vendor: str, vcpus: Dict[int, Vcpu], notes: List[str]) -> Iterator[CpuState]:
    try:
        offsets = kernel.offsets()
    except MemoryUnavailable as error:
        notes.append(f"__per_cpu_offset: {error}")
        return
    for number, offset in enumerate(offsets):
        try:
            running = kernel.u64(kernel.per_cpu("kvm_running_vcpu", offset)) if kernel.symbols.get("&kvm_running_vcpu") is not None else 0
            vcpu = vcpus.get(running)
            yield (_svm_cpu if vendor == "svm" else _vmx_cpu)(kernel, number, offset, vcpu, vcpus)
        except (MemoryUnavailable, UsageError) as error:
            if len(notes) <= 2 * MOST_NOTES:
                notes.append(f"CPU {number}: {error}")
            yield CpuState(number, offset)


def _svm_cpu(kernel: Kernel, number: int, offset: int, vcpu: Optional[Vcpu], vcpus: Dict[int, Vcpu]) -> CpuState:
    data = _svm_data(kernel, offset)
    save_area = None
    if data and kernel.symbols.has("svm_cpu_data", "save_area_pa"):
        save_area = kernel.plain(kernel.pointer(data, "svm_cpu_data", "save_area_pa")) or None
    current = vcpu.current if vcpu is not None else None
    if vcpu is not None and current is not None:
        # Not svm_data.current_vmcb: that is what was loaded last, and stays when a vCPU goes over to vmcb02.
        return CpuState(number, offset, current.address, "vmcb", f"kvm_running_vcpu of CPU {number}: {vcpu.title}, {current.name}",
                        vcpu, running=True, save_area=save_area)
    pointer = kernel.pointer(data, "svm_cpu_data", "current_vmcb") if data and kernel.symbols.has("svm_cpu_data", "current_vmcb") else 0
    address = kernel.physical(pointer) if pointer else None
    if address is None:
        return CpuState(number, offset, save_area=save_area)
    owner, name = _owner(address, vcpus)
    whose = f": {owner.title}, {name}" if owner is not None else ""
    return CpuState(number, offset, address, "vmcb", f"svm_data.current_vmcb of CPU {number}, loaded last{whose}", owner, save_area=save_area)


def _vmx_cpu(kernel: Kernel, number: int, offset: int, vcpu: Optional[Vcpu], vcpus: Dict[int, Vcpu]) -> CpuState:
    pointer = kernel.u64(kernel.per_cpu("current_vmcs", offset))
    address = kernel.physical(pointer) if pointer else None
    if address is None:
        return CpuState(number, offset, vcpu=vcpu)
    owner, name = _owner(address, vcpus)
    whose = f": {owner.title}, {name}" if owner is not None else ""
    return CpuState(number, offset, address, "vmcs", f"current_vmcs of CPU {number}{whose}", owner or vcpu, running=vcpu is not None)


def _owner(address: int, vcpus: Dict[int, Vcpu]) -> Tuple[Optional[Vcpu], str]:
    return next(((vcpu, block.name) for vcpu in vcpus.values() for block in vcpu.blocks if block.address == address), (None, ""))


def is_linux(symbols: Symbols) -> bool:
    """Has the debugger KVM's symbols?"""
    return symbols.get("&vm_list") is not None and symbols.has("kvm", "vm_list")
