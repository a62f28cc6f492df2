"""`ept walk|dump`: where a guest-physical address goes, and everything that an EPT maps."""

from __future__ import annotations

from typing import Optional

from vtdbg.commands.nested import ACCESS, GPA, LIMIT, RANGE, dump_report, ept_roots, walk_report
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import Report

EPTP = Opt("--eptp", "address", "EPT pointer (default: that of the VMCS)")
VMCS = Opt("--vmcs", "address", "take the EPT pointer from this VMCS (default: every VMCS that a scan finds)")


@verb("ept walk", "where a guest-physical address goes, entry by entry", GPA, EPTP, VMCS, ACCESS)
def walk(session: Session, gpa: int, eptp: Optional[int], vmcs: Optional[int], access: Optional[str]) -> Report:
    """Each level with its entry, its flags and the permissions so far; the host address, or the level, the bit and the rule why not."""
    return walk_report("ept walk", session, ept_roots(session, eptp, vmcs), gpa, access)


@verb("ept dump", "everything that the EPT maps, as ranges", EPTP, VMCS, RANGE, LIMIT)
def dump(session: Session, eptp: Optional[int], vmcs: Optional[int], gpa: Optional[str], limit: int) -> Report:
    """Neighbours with the same permissions, memory type and page size that go to neighbouring frames are one row."""
    return dump_report("ept dump", session, ept_roots(session, eptp, vmcs), gpa, limit)
