"""`ept lint` and `npt lint`: what is wrong with the tables, each with where and why; what cannot be decided, with what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from vtdbg.commands.nested import RANGE, ROOT_OPTION, Root, nested_report, python_tables
from vtdbg.commands.nested_diff import named
from vtdbg.commands.nested_dump import interrupted, not_looked_at, unseen
from vtdbg.commands.progress import Watch, Watched, range_words
from vtdbg.commands.registry import Opt
from vtdbg.commands.select import found_blocks, read_text
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError, VtdbgError
from vtdbg.memory_map import parse_memory_map, parse_spans, whole_pages
from vtdbg.nested.lint import CHECKS, ControlPage, Inputs, Remark, Seen, checks, lint, look, made_checks
from vtdbg.numbers import parse_range, size_text
from vtdbg.report import FINDINGS, Group, Lines, Report, Table, Value, hexa
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.controls import control
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.gates import unused_because
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.mtrr import Mtrrs

LINT_OPTIONS = (
    Opt("--ram", "text", "guest-physical RAM: A-B or A+SIZE (several may be given)", many=True, metavar="RANGE"),
    Opt("--e820", "path", "the guest's memory map: a kernel log with e820 lines, or /proc/iomem; - is the standard input", metavar="FILE"),
    Opt("--mtrr", "path", "the MTRRs' values, as for --caps (IA32_MTRR_DEF_TYPE, PHYSBASE, PHYSMASK, fixed ranges)", metavar="FILE"),
    RANGE,
    Opt("--all", "flag", "checks that pass too"),
)

VMCS_PAGES: Tuple[Tuple[str, int, str], ...] = (
    ("MSR_BITMAP", 0x1000, "the MSR bitmap"),
    ("IO_BITMAP_A", 0x1000, "I/O bitmap A"),
    ("IO_BITMAP_B", 0x1000, "I/O bitmap B"),
    ("VMREAD_BITMAP", 0x1000, "the VMREAD bitmap"),
    ("VMWRITE_BITMAP", 0x1000, "the VMWRITE bitmap"),
    ("EPTP_LIST_ADDRESS", 0x1000, "the EPTP list"),
    ("PML_ADDRESS", 0x1000, "the page-modification log"),
    ("VIRTUAL_APIC_PAGE_ADDR", 0x1000, "the virtual-APIC page"),
    ("POSTED_INTR_DESC_ADDR", 0x40, "the posted-interrupt descriptor"),
    ("VM_EXIT_MSR_STORE_ADDR", 0x10, "the VM-exit MSR-store area"),
    ("VM_EXIT_MSR_LOAD_ADDR", 0x10, "the VM-exit MSR-load area"),
    ("VM_ENTRY_MSR_LOAD_ADDR", 0x10, "the VM-entry MSR-load area"),
)
"""What a VMCS points to and a guest has no business with (SDM vol. 3, VM-Execution Control Fields; VM-Exit Controls for MSRs).  The APIC-access
page and the virtualization-exception information area are for the guest, and not here."""

VMCB_PAGES: Tuple[Tuple[str, int, str], ...] = (
    ("iopm_base_pa", 0x3000, "the I/O permission map"),
    ("msrpm_base_pa", 0x2000, "the MSR permission map"),
)
"""APM vol. 2, I/O Intercepts; MSR Intercepts."""

OWN_PAGES = ("vmcs", "shadow-vmcs", "vmxon-region", "vmcb", "host-save-area")
"""Pages of the hypervisor that runs on the machine.  What a guest hypervisor keeps in its own memory (vmcs12 pages) is meant to be there."""


def lint_report(command: str, session: Session, roots: Sequence[Root], *, ram: Optional[List[str]] = None, e820: Optional[str] = None,
                mtrr: Optional[str] = None, gpa: Optional[str] = None, all: bool = False) -> Report:
    """All checks on each root; status 1 where one fails.  Checks without their inputs are undecided and say what is missing."""
    kind = command.split()[0]
    first, end = parse_range(gpa) if gpa else (0, 1 << 64)
    if ram and e820:
        raise UsageError("give one of --ram and --e820")
    spans = parse_spans(ram) if ram else parse_memory_map(read_text(e820), e820) if e820 else None
    source = "--ram" if ram else e820 or ""
    report = nested_report(command, session, roots)
    mtrrs = _mtrrs(session, mtrr)
    ranges = session.machine.memory.ranges()
    host = whole_pages([(start, start + length) for start, length in ranges]) if ranges is not None else None
    pages, problem = _control_pages(session)
    if problem:
        report.notes.append(problem)
    report.python.append("from vtdbg.nested.lint import Inputs, lint")
    if mtrr:
        report.python += ["from vtdbg.x86.mtrr import Mtrrs", f"mtrrs = Mtrrs.from_msrs(dict(vtdbg.VmxCapabilities.from_file({mtrr!r}).items()))"]
    for number, root in enumerate(roots):
        inputs = Inputs(spans, source, host, mtrrs, pages, _ve(session, root))
        made = _watched(session, root, inputs, first, end - 1)
        group = _group(made.remarks, root, kind, all)
        report.add(group)
        if made.seen is not None and made.seen.part:
            words = f"only what lies from {first:#x} to {end - 1:#x} was looked at: frames that are reached from outside too do not show"
            group.blocks.insert(0, Lines("part", [Value(gpa, words, "warn")]))
        if made.seen is not None and made.seen.why:
            group.add(Lines("unseen", [Value(f"{made.seen.reached:#x}", unseen(made.seen.reached, made.seen.why, root), "warn")]))
        if any(remark.verdict == "fail" for remark in made.remarks):
            report.status = FINDINGS
        part = f", {first:#x}, {end - 1:#x}" if gpa else ""
        given = f"ram={spans!r}, ram_source={source!r}, host_ram={host!r}, mtrrs={'mtrrs' if mtrr else None}, ve={inputs.ve!r}"
        report.python += [f"inputs = Inputs({given})", f"for remark in lint(machine.memory, {python_tables(kind, root)}, inputs{part}):",
                          "    print(remark.verdict, remark.id, remark.message)"]
        if made.stopped:
            group.add(interrupted(made.stopped_at))
            report.status = FINDINGS
            report.blocks += not_looked_at(roots[number + 1:])
            break
    return report


@dataclass(frozen=True)
class _Made:
    """What the checks said; `stopped`: Ctrl-C ended it, at guest-physical `stopped_at` or (None) between two checks."""

    remarks: List[Remark]
    seen: Optional[Seen] = None
    stopped: bool = False
    stopped_at: Optional[int] = None


def _watched(session: Session, root: Root, inputs: Inputs, first: int, last: int) -> _Made:
    """All checks, with a line that says how far they are; those that Ctrl-C kept from being made are undecided."""
    if root.tables.root_problem:
        return _Made(lint(session.machine.memory, root.tables, inputs))
    watch = Watch(session, range_words)
    seen = look(session.machine.memory, root.tables, first, last, watch)
    if watch.stopped:
        return _Made([remark for made in checks(seen, inputs) for remark in made], seen, stopped=True, stopped_at=seen.reached)
    names = ["pointer", *made_checks(root.tables)]
    every = Watched(checks(seen, inputs), session, lambda count, made: f"check {count + 1} of {len(names)}: {made[0].check.title}", stride=1)
    remarks: List[Remark] = []
    count = 0
    for made in every:
        remarks, count = remarks + made, count + 1
    if every.interrupted:
        remarks += [Remark(name, "undecided", "not made: interrupted") for name in names[count:]]
    return _Made(remarks, seen, stopped=every.interrupted)


def _mtrrs(session: Session, path: Optional[str]) -> Optional[Mtrrs]:
    """Out of the file that was named for them, else out of the capabilities where they have MTRRs too."""
    from vtdbg.vmx.capabilities import VmxCapabilities

    if path:
        return Mtrrs.from_msrs(dict(VmxCapabilities.from_file(path).items()))
    values = dict(session.caps.items()) if session.caps is not None else {}
    return Mtrrs.from_msrs(values) if 0x2FF in values else None


def _control_pages(session: Session) -> Tuple[Optional[List[ControlPage]], str]:
    """Where the hypervisor's own structures are, by a scan; None with the reason where none can be made."""
    pages: Dict[Tuple[int, int], ControlPage] = {}
    try:
        found = [item for kind in ("vmcs", "vmcb") for item in found_blocks(session, kind) if item.classification in OWN_PAGES]
    except VtdbgError as error:
        return None, f"no scan for control structures: {error}"
    titles = {"vmcs": "VMCS", "shadow-vmcs": "shadow VMCS", "vmxon-region": "VMXON region", "vmcb": "VMCB", "host-save-area": "host save area"}
    for item in found:
        pages[item.address, 0x1000] = ControlPage(item.address, 0x1000, f"the {titles[item.classification]} at {item.address:#x}")
        pointed: Iterator[ControlPage] = iter(())
        if item.vmcs is not None:
            pointed = _of_vmcs(item.vmcs, f"VMCS at {item.address:#x}")
        elif item.classification == "vmcb":
            pointed = _of_vmcb(Vmcb.from_page(session.machine.memory.read_page(item.address)), f"VMCB at {item.address:#x}")
        for page in pointed:
            pages.setdefault((page.address, page.size), page)
    return list(pages.values()), ""


def _of_vmcs(vmcs: Vmcs, owner: str) -> Iterator[ControlPage]:
    for name, size, what in VMCS_PAGES:
        address = vmcs.get(name)
        if address and address != (1 << 64) - 1 and not unused_because(vmcs, vmcs_fields.find(name)):
            yield ControlPage(address, size, f"{what} of the {owner} ({name})")


def _of_vmcb(vmcb: Vmcb, owner: str) -> Iterator[ControlPage]:
    for name, size, what in VMCB_PAGES:
        address = vmcb.get(name)
        if address:
            yield ControlPage(address & ~0xFFF, size, f"{what} of the {owner} ({name})")


def _ve(session: Session, root: Root) -> Optional[bool]:
    """Is "EPT-violation #VE" on in the VMCSs that use these tables?  None where nobody knows, or where they differ."""
    if not isinstance(root.tables, Ept) or not root.users:
        return None
    states = {control(item.vmcs, "sec", "EPT_VIOLATION_VE") for item in found_blocks(session, "vmcs")
              if item.vmcs is not None and item.vmcs.get("EPT_POINTER") == root.tables.eptp}
    return states.pop() if len(states) == 1 else None


_STYLE = {"fail": "bad", "note": "warn", "undecided": "dim", "pass": "good"}


def _group(remarks: Sequence[Remark], root: Root, kind: str, all: bool) -> Group:
    group = Group("tables", f"lint of {named(root)}", [], {"root": f"{root.tables.root:#x}"})
    table = Table("remarks", (("verdict", "verdict"), ("start", "guest-physical"), ("length", "size"), ("message", "what"), ("id", ""), ("path", ""),
                              ("missing", ""), ("see", "")), wrap="message", empty="nothing to say")
    shown = [remark for remark in remarks if remark.verdict in ("fail", "note") or (all and remark.verdict == "pass")]
    # What fails first, in the order of the checks.
    for remark in sorted(shown, key=lambda remark: ("fail", "note", "pass").index(remark.verdict)):
        link = f"{kind} walk {remark.start:#x} {ROOT_OPTION[kind]} {root.python}" if remark.start is not None else ""
        words = remark.message or remark.check.title
        table.add(
            Value(remark.verdict, remark.verdict, _STYLE[remark.verdict]),
            hexa(remark.start, 9, link=link) if remark.start is not None else Value(None, "-", "dim"),
            Value(remark.length, size_text(remark.length) if remark.length else ""),
            Value(remark.message, words + (f" (and {'at least ' * remark.at_least}{remark.more} more of this kind)" if remark.more else "")),
            remark.id,
            Value([f"{address:#x}" for address in remark.path], ""),
            Value(list(remark.missing), ""),
            remark.check.see,
        )
    group.add(table)
    said = [name for name in CHECKS if any(remark.id == name and remark.verdict in ("fail", "note") for remark in remarks)]
    if said:
        group.add(Lines("why", [Value(name, f"{CHECKS[name].title}: {CHECKS[name].why} ({CHECKS[name].see})", "dim") for name in said]))
    open_ones = [remark for remark in remarks if remark.verdict == "undecided"]
    if open_ones:
        lines = [Value({"id": remark.id, "message": remark.message, "missing": list(remark.missing)},
                       f"{remark.check.title}: {remark.message}" + (f"; missing: {', '.join(remark.missing)}" if remark.missing else ""))
                 for remark in open_ones]
        group.add(Lines("undecided", lines, title="Undecided", bullet="- "))
    passed = [remark.check.title for remark in remarks if remark.verdict == "pass"]
    group.add(Lines("passed", [Value([remark.id for remark in remarks if remark.verdict == "pass"],
                                     f"looked for, and not found: {'; '.join(passed)}" if passed else "no check passed", "dim")]))
    return group
