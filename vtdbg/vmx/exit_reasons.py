"""The tables of VM exits: basic exit reasons, VM-instruction errors, VMX-abort indicators, by number and by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Mapping, Tuple, Union

from vtdbg import bits
from vtdbg.errors import UnknownName
from vtdbg.names import near_names
from vtdbg.record import name_key

PREFIXES = ("EXIT_REASON_", "VMX_EXIT_REASON_", "VMX_EXIT_", "VMX_VMEXIT_", "VMEXIT_", "REASON_")
"""What Linux, ia32-doc, VirtualBox and Bochs write before the name."""

ENTRY_FAILURE = 1 << 31
"""Set in the exit reason of a VM entry that failed (SDM vol. 3, Basic VM-Exit Information)."""


@dataclass(frozen=True)
class ExitReason:
    """A row of `data/exit_reasons.csv`; the head of that file says what the columns hold."""

    number: int
    name: str
    title: str
    linux: str
    aliases: Tuple[str, ...]
    qualification: str
    instruction_info: str
    rip: str
    length: str
    gla: str
    gpa: str
    cause: str
    emulate: str
    see: str
    mnemonics: Tuple[str, ...]
    inputs: str

    @property
    def reserved(self) -> bool:
        return self.rip == "reserved"


@dataclass(frozen=True)
class NumberedError:
    """A row of vm_instruction_errors.csv or vmx_aborts.csv."""

    number: int
    name: str
    title: str
    aliases: Tuple[str, ...]
    fix: str
    instructions: str = ""


@cache
def reasons() -> Mapping[int, ExitReason]:
    """Every basic exit reason 0 to 85 by number, the reserved ones included."""
    found = {}
    for row in bits.read_rows("exit_reasons.csv"):
        number = int(row.pop("number"))
        found[number] = ExitReason(number=number, aliases=tuple(row.pop("aliases").split()),
                                   mnemonics=tuple(row.pop("mnemonics").split()), **row)
    return found


@cache
def _numbered(name: str) -> Mapping[int, NumberedError]:
    return {int(row["number"]): NumberedError(int(row["number"]), row["name"], row["title"], tuple(row["aliases"].split()), row["fix"],
                                              row.get("instructions", "")) for row in bits.read_rows(name)}


def instruction_errors() -> Mapping[int, NumberedError]:
    """VM-instruction errors 1 to 28 by number."""
    return _numbered("vm_instruction_errors.csv")


def aborts() -> Mapping[int, NumberedError]:
    """VMX-abort indicators by number."""
    return _numbered("vmx_aborts.csv")


def find(name: Union[int, str]) -> ExitReason:
    """The reason by number or by any source's name ("EPT_VIOLATION", "48", "EXIT_REASON_EPT_VIOLATION", "ept violation"); UnknownName with the
    near names."""
    text = str(name).strip()
    try:
        number = int(text, 0)
    except ValueError:
        bare = next((text[len(prefix):] for prefix in PREFIXES if text.upper().startswith(prefix)), text)
        row = _by_name().get(name_key(text)) or _by_name().get(name_key(bare))
        if row is None:
            raise UnknownName("VM-exit reason", name, near_names(bare, [row.name for row in reasons().values()])) from None
        return row
    found = reasons().get(number & 0xFFFF)
    if found is None:
        raise UnknownName("VM-exit reason", name)
    return found


@cache
def _by_name() -> Mapping[str, ExitReason]:
    """Canonical names win over those of other sources, which sometimes give another reason's name."""
    found = {name_key(row.name): row for row in reasons().values()}
    for row in reasons().values():
        for alias in row.aliases if row.reserved else (*row.aliases, row.title):
            found.setdefault(name_key(alias), row)
    return found


def reason_word(text: str) -> int:
    """An exit-reason word as people write it: a number with its flags ("0x80000021"), or a name."""
    try:
        return int(text.strip(), 0)
    except ValueError:
        return find(text).number
