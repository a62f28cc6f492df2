"""`ept walk|dump`: where a guest-physical address goes, and everything that an EPT maps."""

from __future__ import annotations

from typing import Any, Optional

from vtdbg.commands.nested import ACCESS, GPA, ept_roots, walk_report, with_eptp_lists
from vtdbg.commands.nested_diff import DIFF_OPTIONS, chosen_sides, diff_report
from vtdbg.commands.nested_dump import DUMP_OPTIONS, dump_report
from vtdbg.commands.nested_find import FIND_OPTIONS, HPA, find_report
from vtdbg.commands.nested_hooks import HOOK_OPTIONS, hooks_report
from vtdbg.commands.nested_lint import LINT_OPTIONS, lint_report
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import Report

EPTP = Opt("--eptp", "address", "EPT pointer (default: that of the VMCS)")
VMCS = Opt("--vmcs", "address", "take the EPT pointer from this VMCS (default: every VMCS that a scan finds)")
OTHER_EPTP = Opt("--other-eptp", "address", "EPT pointer of the second tables")
OTHER_VMCS = Opt("--other-vmcs", "address", "take it from this VMCS")


@verb("ept walk", "where a guest-physical address goes, entry by entry", GPA, EPTP, VMCS, ACCESS)
def walk(session: Session, gpa: int, eptp: Optional[int], vmcs: Optional[int], access: Optional[str]) -> Report:
    """Each level with its entry, its flags and the permissions so far; the host address, or the level, the bit and the rule why not."""
    return walk_report("ept walk", session, ept_roots(session, eptp, vmcs), gpa, access)


@verb("ept dump", "what the EPT maps, as ranges: all of it, or by address, rights, type, size and flags", EPTP, VMCS, *DUMP_OPTIONS)
def dump(session: Session, eptp: Optional[int], vmcs: Optional[int], **options: Any) -> Report:
    """Neighbours with the same permissions, memory type and page size that go to neighbouring frames are one row."""
    return dump_report("ept dump", session, ept_roots(session, eptp, vmcs), **options)


@verb("ept find", "who maps this frame: the guest-physical addresses that reach a host-physical one", HPA, EPTP, VMCS, *FIND_OPTIONS)
def find(session: Session, hpa: int, eptp: Optional[int], vmcs: Optional[int], **options: Any) -> Report:
    """The reverse map, for every table that is found; also says where the frame holds one of the tables itself."""
    return find_report("ept find", session, ept_roots(session, eptp, vmcs), hpa, **options)


@verb("ept diff", "what two EPTs map differently", EPTP, VMCS, OTHER_EPTP, OTHER_VMCS, *DIFF_OPTIONS)
def diff(session: Session, eptp: Optional[int], vmcs: Optional[int], other_eptp: Optional[int], other_vmcs: Optional[int],
         other: Optional[str], **options: Any) -> Report:
    """Two roots of one dump (--other-eptp, --other-vmcs), or a root in two dumps (--other)."""
    sides = chosen_sides(session, ept_roots, eptp, vmcs, other, other_eptp, other_vmcs)
    return diff_report("ept diff", session, sides, **options)


@verb("ept hooks", "pages that stand out: execute-only, split, or mapped differently by another EPT", EPTP, VMCS,
      Opt("--with", "address", "compare with this EPTP too (several may be given)", many=True), *HOOK_OPTIONS)
def hooks(session: Session, eptp: Optional[int], vmcs: Optional[int], **options: Any) -> Report:
    """In each EPT: execute-only pages, pages without execute inside executable memory, small pages that leave the rule of the large ones around
    them.  Between the EPTs of an EPTP list, of several VMCSs or given with --with: pages with another frame or other rights, and their bytes.
    """
    further = options.pop("with") or []
    roots, notes = with_eptp_lists(session, ept_roots(session, eptp, vmcs), further)
    return hooks_report("ept hooks", session, roots, notes=notes, **options)


@verb("ept lint", "what is wrong with the EPT: entries, rights, coverage, types, aliases, reachable structures", EPTP, VMCS, *LINT_OPTIONS)
def lint(session: Session, eptp: Optional[int], vmcs: Optional[int], **options: Any) -> Report:
    """Each remark with where it is and why it matters.  A check that lacks an input is undecided and names it; nothing is claimed without."""
    return lint_report("ept lint", session, ept_roots(session, eptp, vmcs), **options)


@verb("ept roots", "EPT roots found from below, without any VMCS: pages that look like tables, and what points to them")
def roots(session: Session) -> Report:
    """For memory whose VMCS is gone, on the processor or of an unknown layout.  Each root with evidence, score, and who names it."""
    from vtdbg.commands.roots import roots_report

    return roots_report("ept roots", session, "ept")
