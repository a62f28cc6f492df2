"""`ept walk|dump`: where a guest-physical address goes, and everything that an EPT maps."""

from __future__ import annotations

from typing import Any, Optional

from vtdbg.commands.nested import ACCESS, GPA, ept_roots, walk_report
from vtdbg.commands.nested_dump import DUMP_OPTIONS, dump_report
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import Report

EPTP = Opt("--eptp", "address", "EPT pointer (default: that of the VMCS)")
VMCS = Opt("--vmcs", "address", "take the EPT pointer from this VMCS (default: every VMCS that a scan finds)")


@verb("ept walk", "where a guest-physical address goes, entry by entry", GPA, EPTP, VMCS, ACCESS)
def walk(session: Session, gpa: int, eptp: Optional[int], vmcs: Optional[int], access: Optional[str]) -> Report:
    """Each level with its entry, its flags and the permissions so far; the host address, or the level, the bit and the rule why not."""
    return walk_report("ept walk", session, ept_roots(session, eptp, vmcs), gpa, access)


@verb("ept dump", "what the EPT maps, as ranges: all of it, or by address, rights, type, size and flags", EPTP, VMCS, *DUMP_OPTIONS)
def dump(session: Session, eptp: Optional[int], vmcs: Optional[int], **options: Any) -> Report:
    """Neighbours with the same permissions, memory type and page size that go to neighbouring frames are one row."""
    return dump_report("ept dump", session, ept_roots(session, eptp, vmcs), **options)
