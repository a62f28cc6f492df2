"""What VMLAUNCH and VMRESUME ask before they look at any field, as far as a VMCS can show it.

SDM vol. 3, Basic VM-Entry Checks.  These rules take part only where their input is known: which instruction will be executed is not in the VMCS.
"""

from __future__ import annotations

from typing import Optional, Tuple

from vtdbg.vmx.entry.rules import Rule, RuleBook, State

book = RuleBook("controls", "SDM vol. 3, Basic VM-Entry Checks", ("VMfailInvalid",))


def launched(state: State) -> Optional[bool]:
    """The launch state, where the page's layout says what its number means."""
    layout, number = state.vmcs.layout, state.vmcs.launch_state
    if layout is None or number is None:
        return None
    name = layout.launch_states.get(number)
    return None if name is None else name == "launched"


@book.rule("launch.shadow", "B3", "the current VMCS is not a shadow VMCS (bit 31 of its first dword is 0)")
def _shadow(state: State) -> Optional[str]:
    if state.vmcs.shadow:
        return "this is a shadow VMCS (bit 31 of its first dword is 1): it can be read and written, not entered"
    return None


@book.rule("launch.vmlaunch", "B5", "VMLAUNCH finds the launch state clear", outcome=("VMfailValid", 4),
           hint="use VMRESUME, or VMCLEAR and VMPTRLD before VMLAUNCH")
def _vmlaunch(state: State) -> Optional[str]:
    return "VMLAUNCH on a VMCS whose launch state is launched" if launched(state) else None


@book.rule("launch.vmresume", "B6", "VMRESUME finds the launch state launched", outcome=("VMfailValid", 5),
           hint="the first entry after VMCLEAR has to be VMLAUNCH")
def _vmresume(state: State) -> Optional[str]:
    return None if launched(state) else "VMRESUME on a VMCS whose launch state is clear"


SHADOW, VMLAUNCH, VMRESUME = book.rules


def rules_for(state: State) -> Tuple[Rule, ...]:
    """The rules whose input is known."""
    rules: Tuple[Rule, ...] = ()
    if state.vmcs.shadow is not None:
        rules += (SHADOW,)
    if state.instruction is not None and launched(state) is not None:
        rules += (VMLAUNCH if state.instruction == "vmlaunch" else VMRESUME,)
    return rules
