"""All the checks of a VM entry, and what the processor would report."""

from __future__ import annotations

from functools import cache
from typing import Dict, List, Optional, Tuple, Union

from vtdbg.findings import Finding
from vtdbg.memory.base import PhysicalMemory
from vtdbg.rules import Rule as AnyRule
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.entry import controls, guest_nonregister, guest_segments, guest_state, host_state, launch, msr_load
from vtdbg.vmx.entry.rules import Failure, Rule, State
from vtdbg.vmx.vmcs import Vmcs

Outcome = Union[str, Tuple[object, ...]]
"""'enters' | ('VMfailInvalid',) | ('VMfailValid', error) | ('entry-failure', reason, qualification) | ('undecided', outcome, missing inputs)"""

UNDECIDABLE: Dict[str, str] = {
    "B1": "the mode of the processor at VMLAUNCH is not in the VMCS: #UD comes before any field is read",
    "B2": "the privilege level at VMLAUNCH is not in the VMCS: #GP(0) comes before any field is read",
    "B4": "blocking by MOV SS at VMLAUNCH is state of the processor, not of the VMCS",
    "E45": "instruction timeout and bus-lock detection have no check of their own: the allowed settings (controls.sec.allowed) cover them",
    "V20": "the preemption timer, the PML index and the guest interrupt status are not checked by the processor",
    "M2": "a machine check during the entry is an event, not a state",
}
"""Rows of the inventory of checks that no state can decide, or that have no check."""


@cache
def all_rules() -> Tuple[Rule, ...]:
    """Every rule, in the processor's order: controls, host state, guest registers, segments, RIP, other guest state, PDPTEs, MSRs."""
    return (controls.RULES + host_state.RULES + guest_state.REGISTER_RULES + guest_segments.RULES + guest_state.RIP_RULES
            + guest_nonregister.RULES + guest_nonregister.PDPTE_RULES + msr_load.RULES)


@cache
def _by_id() -> Dict[str, Rule]:
    return {one.id: one for one in launch.book.rules + all_rules()}


def rule(id: str) -> Rule:
    """The rule by its id; KeyError where there is none."""
    return _by_id()[id]


def check_vm_entry(vmcs: Vmcs, caps: Optional[VmxCapabilities] = None, memory: Optional[PhysicalMemory] = None, *,
                   vmcs_address: Optional[int] = None, host_long_mode: Optional[bool] = None, in_smm: bool = False,
                   instruction: Optional[str] = None, lint: bool = False) -> List[Finding]:
    """Every check of a VM entry with its verdict, in the processor's order (SDM vol. 3, chapter VM Entries).

    `caps` are the capability MSRs of the processor that will enter; without them what depends on them is undecided.  `memory` is physical
    memory as the processor sees it: the VMCS link pointer's target, PDPTEs without EPT, the virtual-APIC page and the MSR-load area are read
    from it.  `vmcs_address` is where this VMCS lies, `host_long_mode` whether the VMM runs in IA-32e mode (else taken from the host state),
    `in_smm` whether it runs in SMM, `instruction` 'vmlaunch' or 'vmresume' to check the launch state too.  `lint` appends the findings of
    `lint_vm_entry`.  Raises nothing: an input that is missing makes its checks undecided.
    """
    state = State(vmcs, caps, memory, vmcs_address=vmcs_address, host_long_mode=host_long_mode, in_smm=in_smm, instruction=instruction)
    findings = [one.decide(state)[0] for one in launch.rules_for(state) + all_rules()]
    if lint:
        from vtdbg.vmx.entry import lints

        findings += [one.decide(state)[0] for one in lints.RULES]
    return findings


def lint_vm_entry(vmcs: Vmcs, caps: Optional[VmxCapabilities] = None, memory: Optional[PhysicalMemory] = None) -> List[Finding]:
    """Mistakes that enter and break later; severity 'lint'."""
    from vtdbg.vmx.entry import lints

    state = State(vmcs, caps, memory)
    return [one.decide(state)[0] for one in lints.RULES]


def predict_vm_entry(vmcs: Vmcs, caps: Optional[VmxCapabilities] = None, memory: Optional[PhysicalMemory] = None, *,
                     vmcs_address: Optional[int] = None, host_long_mode: Optional[bool] = None, in_smm: bool = False,
                     instruction: Optional[str] = None) -> Outcome:
    """What the processor reports; the arguments are those of `check_vm_entry`.

    'enters'; ('VMfailValid', 7) for a control field, 8 for host state (4 and 5 for the launch state, ('VMfailInvalid',) for a shadow VMCS);
    ('entry-failure', 33, qualification) for guest state: 0, 2 PDPTE, 3 NMI, 4 link pointer; ('entry-failure', 34, entry number) for the
    MSR-load area.  Where checks are undecided that can change the answer: ('undecided', the outcome if they pass, (missing inputs...)).

    The manual lets a processor check controls and host state in any order, and guest state too: where both 7 and 8 apply the processor may
    report either (Bochs and KVM report 7), and where guest-state checks with different qualifications fail, any of them; the answer here
    is the first in the manual's order.
    """
    state = State(vmcs, caps, memory, vmcs_address=vmcs_address, host_long_mode=host_long_mode, in_smm=in_smm, instruction=instruction)
    missing: List[str] = []
    doubtful = set()
    for one in launch.rules_for(state) + all_rules():
        finding, failure = one.decide(state)
        if finding.undecided:
            missing.extend(name for name in finding.missing if name not in missing)
            doubtful.add(one.outcome)
        elif failure is not None:
            outcome = _outcome(one, failure)
            if outcome is None:
                return ("undecided", ("entry-failure", 34, None), (*missing, "which entry of the MSR-load area the processor refuses first"))
            # An undecided check before it that would be reported in the same way changes nothing.
            return outcome if doubtful <= {one.outcome} else ("undecided", outcome, tuple(missing))
    return ("undecided", "enters", tuple(missing)) if missing else "enters"


def _outcome(failed: "AnyRule[State]", failure: Failure) -> Optional[Tuple[object, ...]]:
    if failed.outcome[:2] != ("entry-failure", 34):
        return failed.outcome
    return None if failure.number is None else (*failed.outcome, failure.number)
