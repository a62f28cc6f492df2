"""Fields that the controls leave unused are told from those that count."""

from __future__ import annotations

import pytest

from vtdbg.vmx import fields
from vtdbg.vmx.gates import gate_of, unused_because
from vtdbg.vmx.vmcs import Vmcs


def test_every_gate_of_the_table_can_be_evaluated() -> None:
    """With nothing known no gate may say "used" because of a control that nobody has seen."""
    empty = Vmcs.from_values({})
    for field in fields.fields().values():
        gate = gate_of(empty, field)
        assert gate.used is not False
        if field.gate:
            assert gate.used is None and gate.why


def why(name: str, **values: int) -> "str | None":
    return unused_because(Vmcs.from_values(values), fields.find(name))


def test_efer_is_not_loaded_while_the_entry_control_is_0() -> None:
    """SDM vol. 3, VM-Entry Controls: IA32_EFER is loaded from the VMCS only with "load IA32_EFER"."""
    reason = why("GUEST_IA32_EFER", VM_ENTRY_CONTROLS=0x11FF, VM_EXIT_CONTROLS=0x36DFF)
    assert reason == 'not loaded: VM-entry control "Load IA32_EFER" is 0'
    assert why("GUEST_IA32_EFER", VM_ENTRY_CONTROLS=0x91FF, VM_EXIT_CONTROLS=0x36DFF) is None


def test_a_saved_field_is_fresh_even_if_it_is_not_loaded() -> None:
    values = Vmcs.from_values({"VM_ENTRY_CONTROLS": 0x11FF, "VM_EXIT_CONTROLS": 0x36DFF | 1 << 20})
    gate = gate_of(values, fields.find("GUEST_IA32_EFER"))
    assert gate.used and "saved by VM exits, not loaded" in gate.why


def test_secondary_controls_count_as_zero_while_they_are_not_activated() -> None:
    """SDM vol. 3, Processor-Based VM-Execution Controls: with bit 31 of the primary controls 0 the secondary ones act as if 0."""
    assert why("EPT_POINTER", CPU_BASED_VM_EXEC_CONTROL=0, SECONDARY_VM_EXEC_CONTROL=2) == 'unused: secondary control "Enable EPT" is 0'
    assert why("EPT_POINTER", CPU_BASED_VM_EXEC_CONTROL=1 << 31, SECONDARY_VM_EXEC_CONTROL=2) is None
    assert gate_of(Vmcs.from_values({"SECONDARY_VM_EXEC_CONTROL": 2}), fields.find("EPT_POINTER")).used is None


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("VM_ENTRY_INTR_INFO_FIELD", 0x306, "not valid: bit 31 is 0"),
    ("VM_EXIT_INTR_INFO", 0x306, "not valid: bit 31 is 0"),
])
def test_an_event_without_its_valid_bit_is_an_old_one(name: str, value: int, reason: str) -> None:
    assert why(name, **{name: value}) == reason
    assert why(name, **{name: value | 1 << 31}) is None


def test_addresses_of_an_older_exit_are_not_of_this_one() -> None:
    """A HLT exit (12) writes neither the guest-physical nor the guest-linear address."""
    assert "older" in (why("GUEST_PHYSICAL_ADDRESS", VM_EXIT_REASON=12, EXIT_QUALIFICATION=0) or "")
    assert "older" in (why("GUEST_LINEAR_ADDRESS", VM_EXIT_REASON=12, EXIT_QUALIFICATION=0) or "")
    assert why("GUEST_PHYSICAL_ADDRESS", VM_EXIT_REASON=48, EXIT_QUALIFICATION=0x181) is None
    assert why("GUEST_LINEAR_ADDRESS", VM_EXIT_REASON=48, EXIT_QUALIFICATION=0x181) is None
    assert why("GUEST_LINEAR_ADDRESS", VM_EXIT_REASON=48, EXIT_QUALIFICATION=0x1) is not None


def test_a_failed_entry_writes_reason_and_qualification_only() -> None:
    """SDM vol. 3, VM-Entry Failures During or After Loading Guest State."""
    failed = {"VM_EXIT_REASON": 0x80000021, "EXIT_QUALIFICATION": 0, "IDT_VECTORING_INFO_FIELD": 0x80000306}
    assert "failed VM entry" in (why("IDT_VECTORING_INFO_FIELD", **failed) or "")
    assert why("EXIT_QUALIFICATION", **failed) is None


def test_counts_decide_over_their_lists() -> None:
    assert why("VM_ENTRY_MSR_LOAD_ADDR", VM_ENTRY_MSR_LOAD_COUNT=0) == "unused: VM_ENTRY_MSR_LOAD_COUNT is 0"
    assert why("VM_ENTRY_MSR_LOAD_ADDR", VM_ENTRY_MSR_LOAD_COUNT=2) is None
    assert why("CR3_TARGET_VALUE1", CR3_TARGET_COUNT=1) == "unused: CR3_TARGET_COUNT is 1"
    assert why("CR3_TARGET_VALUE0", CR3_TARGET_COUNT=1) is None
