"""The EPT walk behind an EPT violation or misconfiguration, where memory is at hand: which entry did it, and is it still so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Optional

from vtdbg import bits
from vtdbg.errors import VtdbgError
from vtdbg.explain import Fact
from vtdbg.vmx.controls import control
from vtdbg.vmx.guest import Guest

if TYPE_CHECKING:
    from vtdbg.walk import Access

GROUP = "ept walk"
COMPARED = 0x1FF & ~0x40
"""Bits of the qualification that a walk gives whatever the processor's capabilities: access, permissions, bits 7 and 8."""


def access_of(qualification: int) -> "Access":
    """The access that bits 2:0 and 8:7 of an EPT violation's qualification describe."""
    from vtdbg.walk import Access

    how = None if not qualification >> 7 & 1 else "translation" if qualification >> 8 & 1 else "page-walk"
    user = bool(qualification >> 9 & 1) if qualification & 0x180 == 0x180 else None
    return Access(bool(qualification & 1), bool(qualification & 2), bool(qualification & 4), user=user, linear=how)


def facts(guest: Guest, number: int, physical: Optional[int], qualification: Optional[int]) -> Iterator[Fact]:
    """What the tables say now of the address; a warning where they do not give this exit any more."""
    from vtdbg.vmx.ept import ept_walk

    if guest.memory is None or physical is None or (number == 48 and qualification is None):
        return
    wanted = access_of(qualification or 0) if number == 48 else None
    if wanted is not None and not (wanted.read or wanted.write or wanted.fetch):
        return
    try:
        root = guest.nested_root()
        if root is None:
            return
        walk = ept_walk(guest.memory, root, physical, wanted, mbec=bool(control(guest.vmcs, "sec", "MODE_BASED_EPT_EXEC")))
    except VtdbgError as error:
        yield Fact("EPT walk", None, f"not done: {error}", group=GROUP)
        return
    expected = {48: "violation", 49: "misconfiguration"}[number]
    warning = ""
    if walk.outcome not in (expected, "unreadable"):
        warning = "these tables do not give this exit: they changed since (the handler mapped the page), or the memory is of another time"
    elif number == 48 and walk.qualification is not None and (walk.qualification ^ (qualification or 0)) & COMPARED:
        different = bits.table("qual_ept").describe((walk.qualification ^ (qualification or 0)) & COMPARED)
        warning = f"the tables give qualification {walk.qualification:#x} now; what differs: {different}"
    last = walk.steps[-1] if walk.steps else None
    where = f"{walk.outcome}: {walk.reason}" if walk.reason else walk.outcome
    if walk.hpa is not None:
        where += f", host-physical {walk.hpa:#x}"
    yield Fact("EPT walk", last.entry if last is not None else None, where, f"EPTP {root:#x}", warning, GROUP)
