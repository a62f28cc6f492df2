"""Where a click on a field's value leads, by the rows of `data/field_links.csv`; text without links does not change."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Tuple

from vtdbg.bits import read_rows
from vtdbg.record import Gate, Record

if TYPE_CHECKING:
    from vtdbg.svm.vmcb import Vmcb
    from vtdbg.vmx.vmcs import Vmcs

NO_POINTER = (1 << 64) - 1
PAGE_MASK = 0xFFF
_WORD = re.compile(r"\{([^{}]+)\}")

Link = Callable[[str, str, int], str]
"""(field, group, value) -> the command line that a click runs, empty for none"""


def no_link(_name: str, _group: str, _value: int) -> str:
    """For values whose addresses are not of the memory that is looked at."""
    return ""


@cache
def rows() -> Mapping[Tuple[str, str], Tuple[str, ...]]:
    """(kind, field or "group:NAME") -> commands, in the order in which they are tried."""
    found: Dict[Tuple[str, str], Tuple[str, ...]] = {}
    for row in read_rows("field_links.csv"):
        key = row["kind"], row["match"]
        found[key] = (*found.get(key, ()), row["command"])
    return found


def vmcs_links(vmcs: "Vmcs", at: Optional[int]) -> Link:
    """For a VMCS of this memory; `at` is its physical address, None where it has none."""
    from vtdbg.vmx.gates import gate_of
    from vtdbg.vmx.guest import Guest
    from vtdbg.x86.code import linear_address

    guest, rip = Guest(vmcs), vmcs.get("GUEST_RIP")
    mode = guest.mode()
    code = None if rip is None or mode is None else linear_address(guest, rip, mode)
    return _links("vmcs", vmcs, lambda name: gate_of(vmcs, vmcs.field(name)), at, code)


def vmcb_links(vmcb: "Vmcb", at: Optional[int]) -> Link:
    """For a VMCB of this memory.  A VMSA has none: it is a page of its own, and no command starts from it."""
    from vtdbg.svm.gates import gate_of
    from vtdbg.svm.guest import SvmGuest
    from vtdbg.x86.code import linear_address

    guest, rip = SvmGuest(vmcb), vmcb.get("rip")
    mode = guest.mode()
    code = None if rip is None or mode is None else linear_address(guest, rip, mode)
    return _links(vmcb.layout, vmcb, lambda name: gate_of(vmcb, vmcb.field(name)), at, code)


def _links(kind: str, record: "Record[Any, Any]", gate: Callable[[str], Gate], at: Optional[int], code: Optional[int]) -> Link:
    known = rows()

    def word(name: str, value: int) -> Optional[int]:
        own = {"at": at, "value": value, "page": value & ~PAGE_MASK, "code": code}
        if name in own:
            return own[name]
        return record.get(name) if gate(name).used else None

    def link(name: str, group: str, value: int) -> str:
        if value == NO_POINTER:
            return ""
        commands = known.get((kind, name)) or known.get((kind, f"group:{group}"), ())
        return next(filter(None, (_filled(command, lambda wanted: word(wanted, value)) for command in commands)), "")

    return link


def _filled(command: str, word: Callable[[str], Optional[int]]) -> str:
    """The command with its numbers; empty where one of them is not known."""
    numbers = {name: word(name) for name in _WORD.findall(command)}
    return "" if None in numbers.values() else _WORD.sub(lambda match: f"{numbers[match.group(1)]:#x}", command)
