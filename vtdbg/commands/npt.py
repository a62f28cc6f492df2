"""`npt walk|dump`: the nested page tables of AMD, with the same words as `ept`."""

from __future__ import annotations

from typing import Any, Optional

from vtdbg.commands.nested import ACCESS, GPA, npt_roots, walk_report
from vtdbg.commands.nested_diff import DIFF_OPTIONS, chosen_sides, diff_report
from vtdbg.commands.nested_dump import DUMP_OPTIONS, dump_report
from vtdbg.commands.nested_find import FIND_OPTIONS, HPA, find_report
from vtdbg.commands.nested_hooks import HOOK_OPTIONS, hooks_report
from vtdbg.commands.nested_lint import LINT_OPTIONS, lint_report
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import Report

NCR3 = Opt("--ncr3", "address", "nested CR3 (default: that of the VMCB)")
VMCB = Opt("--vmcb", "address", "take the nested CR3 from this VMCB (default: every VMCB that a scan finds)")
OTHER_NCR3 = Opt("--other-ncr3", "address", "nested CR3 of the second tables")
OTHER_VMCB = Opt("--other-vmcb", "address", "take it from this VMCB")


@verb("npt walk", "where a guest-physical address goes, entry by entry", GPA, NCR3, VMCB, ACCESS)
def walk(session: Session, gpa: int, ncr3: Optional[int], vmcb: Optional[int], access: Optional[str]) -> Report:
    """Each level with its entry, its flags and the permissions so far; the host address, or the level, the bit and the rule why not."""
    return walk_report("npt walk", session, npt_roots(session, ncr3, vmcb), gpa, access)


@verb("npt dump", "what the nested tables map, as ranges: all of it, or by address, rights, type, size and flags", NCR3, VMCB, *DUMP_OPTIONS)
def dump(session: Session, ncr3: Optional[int], vmcb: Optional[int], **options: Any) -> Report:
    """Neighbours with the same permissions, memory type and page size that go to neighbouring frames are one row."""
    return dump_report("npt dump", session, npt_roots(session, ncr3, vmcb), **options)


@verb("npt find", "who maps this frame: the guest-physical addresses that reach a host-physical one", HPA, NCR3, VMCB, *FIND_OPTIONS)
def find(session: Session, hpa: int, ncr3: Optional[int], vmcb: Optional[int], **options: Any) -> Report:
    """The reverse map, for every table that is found; also says where the frame holds one of the tables itself."""
    return find_report("npt find", session, npt_roots(session, ncr3, vmcb), hpa, **options)


@verb("npt diff", "what two nested tables map differently", NCR3, VMCB, OTHER_NCR3, OTHER_VMCB, *DIFF_OPTIONS)
def diff(session: Session, ncr3: Optional[int], vmcb: Optional[int], other_ncr3: Optional[int], other_vmcb: Optional[int],
         other: Optional[str], **options: Any) -> Report:
    """Two roots of one dump (--other-ncr3, --other-vmcb), or a root in two dumps (--other)."""
    sides = chosen_sides(session, npt_roots, ncr3, vmcb, other, other_ncr3, other_vmcb)
    return diff_report("npt diff", session, sides, **options)


@verb("npt hooks", "pages that stand out: no execute, split, or mapped differently by other nested tables", NCR3, VMCB,
      Opt("--with", "address", "compare with the tables of this nested CR3 too (several may be given)", many=True), *HOOK_OPTIONS)
def hooks(session: Session, ncr3: Optional[int], vmcb: Optional[int], **options: Any) -> Report:
    """In each table: pages without execute inside executable memory, small pages that leave the rule of the large ones around them.
    Between the tables of several VMCBs or given with --with: pages with another frame or other rights, and their bytes.
    """
    roots = npt_roots(session, ncr3, vmcb)
    known = {root.title for root in roots}
    roots += [root for pointer in options.pop("with") or [] for root in npt_roots(session, pointer, None) if root.title not in known]
    return hooks_report("npt hooks", session, roots, **options)


@verb("npt lint", "what is wrong with the nested tables: entries, rights, coverage, types, aliases, reachable structures", NCR3, VMCB, *LINT_OPTIONS)
def lint(session: Session, ncr3: Optional[int], vmcb: Optional[int], **options: Any) -> Report:
    """Each remark with where it is and why it matters.  A check that lacks an input is undecided and names it; nothing is claimed without."""
    return lint_report("npt lint", session, npt_roots(session, ncr3, vmcb), **options)


@verb("npt roots", "NPT roots found from below, without any VMCB: pages that look like tables, and what points to them")
def roots(session: Session) -> Report:
    """For memory whose VMCB is gone, on the processor or of an unknown layout.  Each root with evidence, score, and who names it."""
    from vtdbg.commands.roots import roots_report

    return roots_report("npt roots", session, "npt")
