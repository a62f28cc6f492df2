"""Questions to the control words: is a control on, taking into account the control that activates its word."""

from __future__ import annotations

import re
from functools import cache
from typing import Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.vmx.vmcs import Vmcs

WORDS: Mapping[str, str] = {
    "pin": "PIN_BASED_VM_EXEC_CONTROL",
    "proc": "CPU_BASED_VM_EXEC_CONTROL",
    "sec": "SECONDARY_VM_EXEC_CONTROL",
    "tert": "TERTIARY_VM_EXEC_CONTROL",
    "exit": "VM_EXIT_CONTROLS",
    "exit2": "SECONDARY_VM_EXIT_CONTROLS",
    "entry": "VM_ENTRY_CONTROLS",
    "vmfunc": "VM_FUNCTION_CONTROL",
}

ACTIVATED_BY: Mapping[str, Tuple[str, str]] = {
    "sec": ("proc", "SEC_CONTROLS"),
    "tert": ("proc", "TERTIARY_CONTROLS"),
    "exit2": ("exit", "ACTIVATE_SECONDARY_CONTROLS"),
    "vmfunc": ("sec", "VMFUNC"),
}
"""A word that is not activated counts as 0, whatever it holds (SDM vol. 3, Processor-Based VM-Execution Controls; VM-Exit Controls;
VM-Function Controls)."""


@cache
def _bit(word: str, ident: str) -> Tuple[int, bits.BitField]:
    row = bits.table(word)[ident]
    return row.mask, row


_PREFIXES = ("SECONDARY_EXEC_", "SECONDARY_VM_EXIT_", "TERTIARY_EXEC_", "CPU_BASED_", "PIN_BASED_", "VM_EXIT_", "VM_ENTRY_")
_FILLERS = frozenset({"ENABLE", "USE", "ACTIVATE", "EXITING"})


def find_control(word: str, name: str) -> bits.BitField:
    """The control by identifier or name, or as Linux' headers write it (SECONDARY_EXEC_ENABLE_EPT); UnknownName with the near names."""
    table = bits.table(word)
    if name.lower() not in (known.lower() for row in table.fields for known in (row.ident, row.name)):
        wanted = _essence(name)
        same = {row.low: row for row in table.fields for known in (row.ident, row.name) if known and _essence(known) == wanted}
        if len(same) == 1:
            return next(iter(same.values()))
    return table[name]


def _essence(name: str) -> str:
    """What sets a name apart: without the prefix of its word, and without "enable" and its like."""
    text = name.strip().upper()
    text = next((text[len(prefix):] for prefix in _PREFIXES if text.startswith(prefix)), text)
    return "".join(part for part in re.split(r"[^A-Z0-9]+", text) if part not in _FILLERS)


def word_value(vmcs: Vmcs, word: str) -> Optional[int]:
    """The word as the processor uses it: 0 while its activating control is 0; None where that cannot be known."""
    gate = ACTIVATED_BY.get(word)
    if gate is not None:
        active = control(vmcs, *gate)
        if active is False:
            return 0
        if active is None:
            return None
    return vmcs.get(WORDS[word])


def control(vmcs: Vmcs, word: str, ident: str) -> Optional[bool]:
    """Is the control (`control(vmcs, "sec", "EPT")`) on?  None: unknown.

    `ident` is the identifier or name in the word's bit table.  Raises UnknownName for a control that does not exist.
    """
    value = word_value(vmcs, word)
    if value is None:
        return None
    return bool(value & _bit(word, ident)[0])


def control_name(word: str, ident: str) -> str:
    """What people call it: `VM-entry control "Load IA32_EFER"`."""
    titles = {"pin": "pin-based control", "proc": "primary control", "sec": "secondary control", "tert": "tertiary control",
              "exit": "VM-exit control", "exit2": "secondary VM-exit control", "entry": "VM-entry control", "vmfunc": "VM-function control"}
    return f'{titles[word]} "{_bit(word, ident)[1].name}"'
