"""caps support: the conditions of VMXON and VMRUN, against machines on which a hypervisor really ran."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict

import pytest

from vtdbg.memory.open import open_machine
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.support import Check, support_report

INTEL_CPUID = {(1, 0): (0x50654, 0, 1 << 5, 0)}


def by_id(checks: "list[Check]") -> Dict[str, Check]:
    return {check.id: check for check in checks}


def test_the_machine_that_ran_kvm_passes(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM entered VMX operation on it: with its MSRs and the host registers that its VMCS holds, nothing may fail."""
    vmcs = Vmcs.from_page(open_machine(str(intel_plain)).memory.read_page(0x6826000), layout="bochs_2.7")
    caps = VmxCapabilities.from_msrs({key: int(value, 16) for key, value in intel_plain_truth["msrs"].items()}, 40, cpuid=INTEL_CPUID)
    found = support_report(caps, {"cr0": vmcs["HOST_CR0"], "cr4": vmcs["HOST_CR4"]})
    assert {check.id: check.verdict for check in found} == dict.fromkeys(by_id(found), "pass")
    assert set(by_id(found)) == {"vmx.cpuid", "vmx.feature-control.lock", "vmx.feature-control.enable", "vmx.cr0-fixed", "vmx.cr4-fixed",
                                 "vmx.cr4-vmxe", "vmx.efer", "vmx.basic", "vmx.region"}
    assert "0x2b" in by_id(found)["vmx.region"].advice and "4096 bytes" in by_id(found)["vmx.region"].found


def test_the_machine_that_ran_kvm_amd_passes(amd_exit_truth: Dict[str, Any]) -> None:
    """The program's own RDMSR of VM_CR, EFER and VM_HSAVE_PA on the machine; CPUID 8000000A of QEMU's SVM."""
    line = next(text for text in amd_exit_truth["guest_truth"] if text.startswith("msr "))
    value = {name: int(number, 16) for name, number in re.findall(r"(\w+)=0x([0-9a-f]+)", line)}
    cpuid = {(0, 0): (0xD, 0x68747541, 0x444D4163, 0x69746E65), (0x80000001, 0): (0, 0, 4, 0), (0x8000000A, 0): (1, 16, 0, 1)}
    caps = VmxCapabilities.from_msrs({0xC0010114: value["vm_cr"], 0xC0000080: value["efer"], 0xC0010117: value["hsave"]}, cpuid=cpuid)
    found = by_id(support_report(caps))
    assert {check.verdict for check in found.values()} == {"pass"}
    assert set(found) == {"svm.cpuid", "svm.vm-cr", "svm.features", "svm.efer", "svm.hsave"}


def test_nothing_known_is_unknown_and_says_what_to_give() -> None:
    found = support_report(VmxCapabilities.from_msrs({}))
    assert {check.verdict for check in found} == {"unknown"}
    assert all(check.advice.startswith("give ") for check in found)
    assert {check.id.split(".")[0] for check in found} == {"vmx", "svm"}


@pytest.mark.parametrize("value, lock, enable, words", [
    (0, "fail", "fail", "write it once"), (5, "pass", "pass", ""), (4, "fail", "pass", "write it once"), (1, "pass", "fail", "firmware"),
    (3, "pass", "fail", "SMX"),
])
def test_feature_control(value: int, lock: str, enable: str, words: str) -> None:
    """VMXON needs the lock bit and the enable for the mode it is executed in (SDM vol. 3, Enabling and Entering VMX Operation)."""
    found = by_id(support_report(VmxCapabilities.from_msrs({0x3A: value}, cpuid=INTEL_CPUID)))
    assert (found["vmx.feature-control.lock"].verdict, found["vmx.feature-control.enable"].verdict) == (lock, enable)
    assert words in found["vmx.feature-control.lock"].advice + found["vmx.feature-control.enable"].advice


def test_fixed_bits_name_what_to_change() -> None:
    caps = VmxCapabilities.preset("i7-6700k")
    found = by_id(support_report(caps, {"cr0": 0x80050013, "cr4": 0x2020 | 1 << 30, "efer": 0xD01}))
    assert found["vmx.cr0-fixed"].verdict == "fail" and "set CR0.NE" in found["vmx.cr0-fixed"].advice
    assert found["vmx.cr4-fixed"].verdict == "fail" and "clear bits 0x40000000" in found["vmx.cr4-fixed"].advice
    # CR4.VMXE is a fixed bit too, but the VMM sets it: a row of its own.
    off = by_id(support_report(caps, {"cr0": 0x80050033, "cr4": 0x20, "efer": 0xD01}))
    assert off["vmx.cr4-fixed"].verdict == "pass" and off["vmx.cr4-vmxe"].verdict == "fail"
    assert off["vmx.cpuid"].verdict == "pass" and off["vmx.feature-control.lock"].verdict == "unknown"


def test_vmx_that_is_hidden_fails() -> None:
    caps = VmxCapabilities.from_msrs({0x3A: 5}, cpuid={(1, 0): (0, 0, 0, 0)})
    assert by_id(support_report(caps))["vmx.cpuid"].verdict == "fail"


@pytest.mark.parametrize("vm_cr, verdict, words", [(0, "pass", ""), (0x10, "fail", "clear VM_CR.SVMDIS"), (0x18, "fail", "SVM_LOCK_KEY")])
def test_svm_disabled_by_vm_cr(vm_cr: int, verdict: str, words: str) -> None:
    """SVMDIS forbids EFER.SVME; LOCK makes it read-only (APM vol. 2, VM_CR MSR)."""
    found = by_id(support_report(VmxCapabilities.from_msrs({0xC0010114: vm_cr, 0xC0000080: 0x500})))
    assert found["svm.vm-cr"].verdict == verdict and words in found["svm.vm-cr"].advice
    assert found["svm.efer"].verdict == "fail"
