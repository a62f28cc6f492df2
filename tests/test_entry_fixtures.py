"""The checks on VMCSs of a real hypervisor: KVM's VM A that runs, and its VM B whose entry fails (exit reason 0x80000021).

The monitor of VM B set CS.type to 1 with KVM_SET_SREGS; the kernel's dump shows the result and not the cause.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from support.entry_cases import capabilities as model_capabilities
from support.vmxcpu import Worker
from support.vmxcpu.places import VMCS

from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.findings import Finding
from vtdbg.memory.open import open_machine
from vtdbg.render.text import render_text
from vtdbg.vmx import layouts
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.entry import check_vm_entry, msr_load, predict_vm_entry
from vtdbg.vmx.entry.predict import rule
from vtdbg.vmx.entry.recorded import recorded_error, recorded_failure
from vtdbg.vmx.vmcs import Vmcs

VMCS_A, VMCS_B = 0x6826000, 0x6BD9000


def capabilities(truth: Dict[str, Any]) -> VmxCapabilities:
    """The MSRs that the guest kernel's own rdmsr read; Bochs has 40 physical-address bits."""
    return VmxCapabilities.from_msrs({int(index, 16): int(value, 16) for index, value in truth["msrs"].items()}, physical_address_width=40)


def rest(findings: List[Finding]) -> Dict[str, str]:
    return {finding.id: finding.verdict for finding in findings if finding.verdict != "pass"}


def test_failed_entry_is_explained_from_the_page(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    caps = capabilities(intel_plain_truth)
    with open_machine(intel_plain).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(VMCS_B))
        findings = check_vm_entry(vmcs, caps, memory, vmcs_address=VMCS_B)
        assert rest(findings) == {"guest.cs.type": "fail"}
        assert predict_vm_entry(vmcs, caps, memory, vmcs_address=VMCS_B) == ("entry-failure", 33, 0)
        # What the processor wrote.
        assert (vmcs["VM_EXIT_REASON"], vmcs["EXIT_QUALIFICATION"]) == (0x80000021, 0)
    failed = next(finding for finding in findings if finding.failed)
    assert "type 1" in failed.message and "0xa091" in failed.message and failed.area == "guest"
    assert intel_plain_truth["vms"]["B"]["kvm_segments"]["cs"]["type"] == "0x1"


def test_running_guest_passes_every_check(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    caps = capabilities(intel_plain_truth)
    with open_machine(intel_plain).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(VMCS_A))
        assert rest(check_vm_entry(vmcs, caps, memory, vmcs_address=VMCS_A)) == {}
        assert predict_vm_entry(vmcs, caps, memory, vmcs_address=VMCS_A) == "enters"


def test_launch_state_of_the_page(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """VM A has been launched: VMLAUNCH would fail with error 4, VMRESUME would not."""
    caps = capabilities(intel_plain_truth)
    with open_machine(intel_plain).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(VMCS_A))
        assert predict_vm_entry(vmcs, caps, memory, vmcs_address=VMCS_A, instruction="vmlaunch") == ("VMfailValid", 4)
        assert predict_vm_entry(vmcs, caps, memory, vmcs_address=VMCS_A, instruction="vmresume") == "enters"


@pytest.mark.parametrize("role", ["vmcs01", "vmcs02"])
def test_nested_hypervisor_s_vmcss_pass(role: str, intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """KVM entered with both; vmcs01 links a shadow VMCS, whose revision and shadow bit are read from memory."""
    caps = capabilities(intel_nested_truth)
    address = int(intel_nested_truth["nested"]["found"][role].split()[0], 16)
    with open_machine(intel_nested).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(address))
        assert (vmcs["VMCS_LINK_POINTER"] == (1 << 64) - 1) == (role == "vmcs02")
        assert rest(check_vm_entry(vmcs, caps, memory, vmcs_address=address)) == {}
        assert predict_vm_entry(vmcs, caps, memory, vmcs_address=address) == "enters"


def test_linked_vmcs_that_memory_lacks_is_undecided(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    caps = capabilities(intel_nested_truth)
    address = int(intel_nested_truth["nested"]["found"]["vmcs01"].split()[0], 16)
    with open_machine(intel_nested).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(address))
    outcome = predict_vm_entry(vmcs, caps, None, vmcs_address=address)
    assert outcome[:2] == ("undecided", "enters")
    assert outcome[2] == (f"memory at {vmcs['VMCS_LINK_POINTER']:#x}",)


def test_failed_entry_is_explained_from_the_kernel_s_dump(intel_plain_truth: Dict[str, Any]) -> None:
    """The values that dump_vmcs printed, without the page: the same check fails, and what the dump does not print is undecided, not passed."""
    caps = capabilities(intel_plain_truth)
    printed = {int(encoding, 16): int(value, 16) for encoding, value in intel_plain_truth["vms"]["B"]["dump_vmcs_by_encoding"].items()}
    vmcs = Vmcs.from_values(printed, "kernel log")
    findings = check_vm_entry(vmcs, caps)
    assert [finding.id for finding in findings if finding.failed] == ["guest.cs.type"]
    for finding in findings:
        if finding.undecided:
            assert not any(name in vmcs for name in finding.missing if name.isupper()), finding


def test_failed_entry_is_explained_from_the_log_s_text(intel_plain_truth: Dict[str, Any]) -> None:
    """The serial log as it is, its lines interleaved with other output: `Vmcs.from_text` reads it, and the cause is the same."""
    text = (Path(__file__).parent / "data/intel/kvm-bochs27.serial.log").read_text()
    findings = check_vm_entry(Vmcs.from_text(text), capabilities(intel_plain_truth))
    assert [finding.id for finding in findings if finding.failed] == ["guest.cs.type"]
    assert not {"GUEST_CS_AR_BYTES", "GUEST_RFLAGS", "GUEST_CR0"} & {name for finding in findings for name in finding.missing}


@pytest.mark.live
@pytest.mark.parametrize(("launched", "instruction", "error"), [
    (False, "vmlaunch", None), (True, "vmlaunch", 4), (False, "vmresume", 5), (True, "vmresume", None)])
def test_launch_state_on_the_processor(vmx_worker: Worker, launched: bool, instruction: str, error: Optional[int]) -> None:
    """VMLAUNCH wants a clear VMCS (error 4), VMRESUME a launched one (error 5); the page's header says which it is.

    An entry leaves the VMCS launched, a failure leaves it as it was: the page that comes back says so.
    """
    outcome = vmx_worker.launch(vmx_worker.baseline(), launched=launched, instruction=instruction, dump=[(VMCS, 4096)])
    assert outcome.entered if error is None else (outcome.kind, outcome.number) == ("VMfailValid", error)
    vmcs = Vmcs.from_page(outcome.memory[(VMCS, 4096)], "bochs_2.8")
    caps = model_capabilities(vmx_worker)
    now_launched = launched or error is None
    assert predict_vm_entry(vmcs, caps, instruction="vmlaunch") == (("VMfailValid", 4) if now_launched else "enters")
    assert predict_vm_entry(vmcs, caps, instruction="vmresume") == ("enters" if now_launched else ("VMfailValid", 5))


def test_shadow_vmcs_is_not_entered(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """A shadow VMCS (here the one that vmcs01 links) is read and written by VMREAD and VMWRITE; VMLAUNCH and VMRESUME fail with VMfailInvalid
    (SDM vol. 3, Basic VM-Entry Checks).  The processor model does not look at the bit."""
    address = int(intel_nested_truth["nested"]["found"]["shadow_vmcs"].split()[0], 16)
    with open_machine(intel_nested).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(address))
        assert predict_vm_entry(vmcs, capabilities(intel_nested_truth), memory, vmcs_address=address) == ("VMfailInvalid",)


def test_failed_entry_narrows_down_what_is_undecided(intel_plain: Path) -> None:
    """Exit reason 33 is written after controls and host state have passed (SDM vol. 3, VM-Entry Failures During or After Loading Guest
    State): without the capability MSRs the undecided checks that the whole page shows to pass are those that are set apart."""
    with open_machine(intel_plain).memory as memory:
        vmcs = Vmcs.from_page(memory.read_page(VMCS_B))
    recorded = recorded_failure(vmcs)
    assert recorded is not None and (recorded.reason, recorded.qualification) == (33, 0)
    undecided = [finding for finding in check_vm_entry(vmcs) if finding.undecided]
    passed = {finding.id for finding in undecided if recorded.passed(rule(finding.id).outcome)}
    left = {finding.id for finding in undecided} - passed
    assert {"controls.pin.allowed", "host.cr0", "host.cr4"} <= passed
    assert {"guest.cr0", "guest.cr4"} <= left and all(rule(one).area == "guest" for one in left)


@pytest.mark.parametrize("reason", [0x0C, 0x21, 0x80000029])
def test_other_exits_say_nothing_of_a_failed_entry(reason: int) -> None:
    """Without bit 31 the reason is of an exit from a guest that ran; a machine check (41) can come at any point of the entry."""
    assert recorded_failure(Vmcs.from_values({"VM_EXIT_REASON": reason})) is None
    assert recorded_failure(Vmcs.from_values({})) is None


def test_msr_loading_comes_last() -> None:
    """Exit reason 34 is written when guest state has passed and an MSR of the list was refused (SDM vol. 3, Loading MSRs)."""
    recorded = recorded_failure(Vmcs.from_values({"VM_EXIT_REASON": 0x80000022}))
    assert recorded is not None and recorded.qualification is None
    assert recorded.passed(rule("guest.cr0").outcome) and recorded.passed(rule("host.cr0").outcome)
    assert not any(recorded.passed(one.outcome) for one in msr_load.RULES)


def test_vm_instruction_error_of_an_entry_is_told() -> None:
    """Only the errors of VMLAUNCH and VMRESUME; the number outlives the instruction that wrote it."""
    assert (recorded_error(Vmcs.from_values({"VM_INSTRUCTION_ERROR": 7})) or "").startswith("7 (")
    assert recorded_error(Vmcs.from_values({"VM_INSTRUCTION_ERROR": 12})) is None
    assert recorded_error(Vmcs.from_values({})) is None


def test_failure_that_nothing_explains_is_said(intel_plain: Path, intel_plain_truth: Dict[str, Any], tmp_path: Path) -> None:
    """The VMCS of the failed entry with CS put right: it would enter now, and still records that it did not."""
    caps = tmp_path / "caps.txt"
    caps.write_text("".join(f"{index} {value}\n" for index, value in intel_plain_truth["msrs"].items()))
    image = bytearray(intel_plain.read_bytes())
    layout = layouts.layout("bochs_2.7")
    image[VMCS_B:VMCS_B + 4096] = layout.write_page({**{value.field.encoding: value.value for value in Vmcs.from_page(
        bytes(image[VMCS_B:VMCS_B + 4096])).values()}, 0x4816: 0xA09B})
    path = tmp_path / "fixed.raw"
    path.write_bytes(image)
    session = Session(str(path))
    outcome = run_words(f"vmcs check {VMCS_B:#x} --caps {caps}".split(), session, lambda report, _options: render_text(report, 400))
    session.close()
    assert "enters the guest" in outcome.text and "not what these fields give" in outcome.text and "kvm_nested_vmenter_failed" in outcome.text
