"""What a VMCS itself records of an entry that failed: it narrows down which of the checks can be to blame.

A failure during or after the loading of guest state writes the exit reason with bit 31 set, and the qualification; by then the checks of the
controls and of host state have passed (SDM vol. 3, VM-Entry Failures During or After Loading Guest State; read November 2026).  A VMfail writes the
VM-instruction error only, and neither is erased by what comes later: an error number alone does not say when it was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from vtdbg.rules import Outcome
from vtdbg.vmx.exit_reasons import ENTRY_FAILURE, instruction_errors
from vtdbg.vmx.vmcs import Vmcs

GUEST_STATE, MSR_LOADING = 33, 34
_ORDER = {GUEST_STATE: 1, MSR_LOADING: 2}
"""Exit reason -> its place in the order of the entry; what comes as a VMfail is before them."""
_ENTRY_ERRORS = (4, 5, 7, 8)


@dataclass(frozen=True)
class RecordedFailure:
    """A failed entry by its exit reason (33 guest state, 34 MSR loading); the qualification is None where the source lacks it."""

    reason: int
    qualification: Optional[int]

    def passed(self, outcome: Outcome) -> bool:
        """Had the checks that are reported as `outcome` passed when this entry failed?"""
        stage = _ORDER.get(int(outcome[1]), 0) if outcome[0] == "entry-failure" else 0
        return stage < _ORDER[self.reason]


def recorded_failure(vmcs: Vmcs) -> Optional[RecordedFailure]:
    """The failed entry that VM_EXIT_REASON tells of; None where it tells of none, or is not known."""
    reason = vmcs.get("VM_EXIT_REASON")
    if reason is None or not reason & ENTRY_FAILURE or reason & 0xFFFF not in _ORDER:
        return None
    return RecordedFailure(reason & 0xFFFF, vmcs.get("EXIT_QUALIFICATION"))


def recorded_error(vmcs: Vmcs) -> Optional[str]:
    """The VM-instruction error in words where it is one of a failed VMLAUNCH or VMRESUME; nobody knows when it was written."""
    number = vmcs.get("VM_INSTRUCTION_ERROR")
    known = instruction_errors().get(number) if number in _ENTRY_ERRORS and number is not None else None
    return None if known is None else f"{number} ({known.title})"
