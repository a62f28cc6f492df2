"""vtdbg: what a hypervisor developer needs to see of VT-x and SVM, from a dump or a live machine.

The public names are loaded when they are first used: `import vtdbg` has to stay cheap inside GDB and WinDbg.
"""

from __future__ import annotations

# Type checkers take this for the constant of `typing`; importing that would be most of the cost of this module.
TYPE_CHECKING = False

__version__ = "0.1.0"

_PUBLIC: Dict[str, str] = {
    "open": "vtdbg.opening:open_source",
    "memory_from_segments": "vtdbg.memory.base:memory_from_segments",
    "PhysicalMemory": "vtdbg.memory.base:PhysicalMemory",
    "MemoryUnavailable": "vtdbg.errors:MemoryUnavailable",
    "VtdbgError": "vtdbg.errors:VtdbgError",
    "Machine": "vtdbg.machine:Machine",
    "Cpu": "vtdbg.machine:Cpu",
    "Vmcs": "vtdbg.vmx.vmcs:Vmcs",
    "VmxCapabilities": "vtdbg.vmx.capabilities:VmxCapabilities",
    "check_vm_entry": "vtdbg.vmx.entry:check_vm_entry",
    "predict_vm_entry": "vtdbg.vmx.entry:predict_vm_entry",
    "ept_walk": "vtdbg.vmx.ept:ept_walk",
    "npt_walk": "vtdbg.svm.npt:npt_walk",
    "translate": "vtdbg.gva:translate",
    "GuestPhysicalMemory": "vtdbg.memory.views:GuestPhysicalMemory",
    "LinearMemory": "vtdbg.memory.views:LinearMemory",
    "explain_vm_exit": "vtdbg.vmx.exits:explain_vm_exit",
    "explain_vmcs": "vtdbg.vmx.exits:explain_vmcs",
    "explain_svm_exit": "vtdbg.svm.exits:explain_svm_exit",
    "Vmcb": "vtdbg.svm.vmcb:Vmcb",
    "lint_vm_entry": "vtdbg.vmx.entry:lint_vm_entry",
    "lint_vmcb": "vtdbg.svm.lint:lint_vmcb",
    "SvmCapabilities": "vtdbg.svm.capabilities:SvmCapabilities",
    "check_vmrun": "vtdbg.svm.entry:check_vmrun",
    "Finding": "vtdbg.findings:Finding",
    "scan": "vtdbg.scanner:scan",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from typing import Any, Dict, List

    from vtdbg.errors import MemoryUnavailable, VtdbgError
    from vtdbg.findings import Finding
    from vtdbg.gva import translate
    from vtdbg.machine import Cpu, Machine
    from vtdbg.memory.base import PhysicalMemory, memory_from_segments
    from vtdbg.memory.views import GuestPhysicalMemory, LinearMemory
    from vtdbg.opening import open_source as open
    from vtdbg.scanner import scan
    from vtdbg.svm.capabilities import SvmCapabilities
    from vtdbg.svm.entry import check_vmrun
    from vtdbg.svm.exits import explain_svm_exit
    from vtdbg.svm.lint import lint_vmcb
    from vtdbg.svm.npt import npt_walk
    from vtdbg.svm.vmcb import Vmcb
    from vtdbg.vmx.capabilities import VmxCapabilities
    from vtdbg.vmx.entry import check_vm_entry, lint_vm_entry, predict_vm_entry
    from vtdbg.vmx.ept import ept_walk
    from vtdbg.vmx.exits import explain_vm_exit, explain_vmcs
    from vtdbg.vmx.vmcs import Vmcs


def __getattr__(name: str) -> Any:
    target = _PUBLIC.get(name)
    if target is None:
        raise AttributeError(f"module 'vtdbg' has no attribute {name!r}")
    import importlib

    module, _, attribute = target.partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *_PUBLIC})
