"""`npt walk|dump`: the nested page tables of AMD, with the same words as `ept`."""

from __future__ import annotations

from typing import Any, Optional

from vtdbg.commands.nested import ACCESS, GPA, npt_roots, walk_report
from vtdbg.commands.nested_dump import DUMP_OPTIONS, dump_report
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import Report

NCR3 = Opt("--ncr3", "address", "nested CR3 (default: that of the VMCB)")
VMCB = Opt("--vmcb", "address", "take the nested CR3 from this VMCB (default: every VMCB that a scan finds)")


@verb("npt walk", "where a guest-physical address goes, entry by entry", GPA, NCR3, VMCB, ACCESS)
def walk(session: Session, gpa: int, ncr3: Optional[int], vmcb: Optional[int], access: Optional[str]) -> Report:
    """Each level with its entry, its flags and the permissions so far; the host address, or the level, the bit and the rule why not."""
    return walk_report("npt walk", session, npt_roots(session, ncr3, vmcb), gpa, access)


@verb("npt dump", "what the nested tables map, as ranges: all of it, or by address, rights, type, size and flags", NCR3, VMCB, *DUMP_OPTIONS)
def dump(session: Session, ncr3: Optional[int], vmcb: Optional[int], **options: Any) -> Report:
    """Neighbours with the same permissions, memory type and page size that go to neighbouring frames are one row."""
    return dump_report("npt dump", session, npt_roots(session, ncr3, vmcb), **options)
