"""`gva walk`: a linear address through the guest's tables and the nested ones, every entry of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Tuple

from vtdbg.commands.nested import ACCESS, npt_tables
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import chosen_blocks
from vtdbg.commands.session import Session
from vtdbg.commands.walks import MARK, access_text, remarks, steps_table
from vtdbg.errors import UsageError
from vtdbg.gva import Translation, translate
from vtdbg.numbers import size_text
from vtdbg.report import FINDINGS, Group, Pairs, Report, Value, hexa
from vtdbg.svm.npt import Npt
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.walk import Structure, Walk, parse_access
from vtdbg.x86.paging import Paging

PHYSICAL = "phys {}"
"""What a click on an address of this memory runs."""


@dataclass(frozen=True)
class View:
    """One address space: how linear addresses are translated, through which nested tables, and whose it is."""

    title: str
    paging: Paging
    nested: Optional[Structure]
    python: str


@verb(
    "gva walk",
    "a linear address through both dimensions, entry by entry",
    Arg("gva", "address", "linear address"),
    Opt("--vmcs", "address", "the guest of this VMCS"),
    Opt("--vmcb", "address", "the guest of this VMCB"),
    Opt("--host", "flag", "an address of the host: with --vmcs its HOST_CR3, else the CR3 of the processor"),
    Opt("--cr3", "address", "another CR3"),
    Opt("--eptp", "address", "nested tables by their EPT pointer"),
    Opt("--ncr3", "address", "nested tables by their nested CR3"),
    Opt("--paging", "text", "paging mode where it is not known: 4-level, 5-level, PAE, 32-bit, none"),
    ACCESS,
)
def walk(
    session: Session,
    gva: int,
    vmcs: Optional[int],
    vmcb: Optional[int],
    host: bool,
    cr3: Optional[int],
    eptp: Optional[int],
    ncr3: Optional[int],
    paging: Optional[str],
    access: Optional[str],
) -> Report:
    """The guest's tables are guest-physical: each of their entries is itself found through EPT or NPT, and those entries are shown too.

    Without an option the guest of every VMCS and VMCB that a scan finds is walked.
    """
    parse_access(access)
    views, stale = _views(session, vmcs, vmcb, host, cr3, eptp, ncr3, paging)
    report = Report("gva walk", header=session.header(), notes=[*session.machine.warnings, *stale], python=session.python_open())
    for view in views:
        found = translate(session.machine.memory, gva, paging=view.paging, nested=view.nested, access=access, caps=session.caps)
        report.add(_group(found, f"GVA {gva:#x}{access_text(access)}: {view.title}", _next_walk(view.nested)))
        if not found.mapped:
            report.status = FINDINGS
        report.python.append(f"walk = vtdbg.translate(machine, {gva:#x}, {view.python}, access={access!r})")
    report.python.append("print(walk.outcome, walk.gpa, walk.hpa, walk.reason)")
    return report


def _views(
    session: Session,
    vmcs: Optional[int],
    vmcb: Optional[int],
    host: bool,
    cr3: Optional[int],
    eptp: Optional[int],
    ncr3: Optional[int],
    mode: Optional[str],
) -> Tuple[List[View], List[str]]:
    """The address spaces that the options name, and what has to be said of how fresh they are."""
    if eptp is not None and ncr3 is not None:
        raise UsageError("give one of --eptp and --ncr3")
    given = Ept(eptp, session.caps) if eptp is not None else npt_tables(session, Npt(ncr3)) if ncr3 is not None else None
    if vmcs is None and vmcb is None and (host or cr3 is not None):
        return [_bare_view(session, host, cr3, given, mode)], []
    intel, amd, stale = chosen_blocks(session, vmcs, vmcb)
    if host and amd:
        raise UsageError("a VMCB does not hold the host's CR3: give --cr3, or leave out --vmcb")
    views = [_vmcs_view(session, item.vmcs, item.title, host, given) for item in intel]
    views += [_vmcb_view(session, item.vmcb, item.title, given) for item in amd]
    if not views:
        raise UsageError("no VMCS and no VMCB found: give --vmcs, --vmcb, or --cr3")
    return [_adjusted(view, cr3, mode) for view in views], stale


def _adjusted(view: View, cr3: Optional[int], mode: Optional[str]) -> View:
    paging = view.paging if mode is None else Paging.named(mode, view.paging.cr3)
    paging = paging if cr3 is None else paging.with_cr3(cr3)
    return View(view.title, paging, view.nested, view.python.replace(f"cr3={view.paging.cr3:#x}", f"cr3={paging.cr3:#x}"))


def _bare_view(session: Session, host: bool, cr3: Optional[int], nested: Optional[Structure], mode: Optional[str]) -> View:
    """No control block: CR3 as given, or the processor's own."""
    cpu = session.machine.cpus[0] if session.machine.cpus else None
    root = cr3 if cr3 is not None else cpu.get("cr3") if cpu is not None else None
    if root is None:
        raise UsageError("CR3 is not known to this source: give --cr3")
    if mode is not None:
        paging = Paging.named(mode, root)
    elif cpu is not None and cpu.get("cr4") is not None:
        paging = Paging.from_registers(cpu.get("cr0"), root, cpu.get("cr4"), cpu.get("efer"))
    else:
        paging = Paging.from_registers(None, root, None, None)
    whose = "the processor's own tables" if host and cr3 is None else f"CR3 {root:#x}"
    return View(whose, paging, nested, _python(paging, nested))


def _vmcs_view(session: Session, vmcs: Vmcs, title: str, host: bool, nested: Optional[Structure]) -> View:
    if host:
        # After a VM exit a 64-bit host has LMA and LME set whatever IA32_EFER was loaded (SDM vol. 3, Loading Host Control Registers).
        from vtdbg.vmx.controls import control

        paging = Paging.from_registers(
            vmcs["HOST_CR0"], vmcs["HOST_CR3"], vmcs["HOST_CR4"], None, long_mode=control(vmcs, "exit", "HOST_ADDR_SPACE_SIZE")
        )
        return View(f"host of {title}", paging, None, _python(paging, None))
    tables = nested
    if tables is None:
        from vtdbg.vmx.controls import control

        tables = Ept.from_vmcs(vmcs, session.caps) if control(vmcs, "sec", "EPT") is not False else None
    paging = Paging.from_vmcs(vmcs)
    return View(f"guest of {title}", paging, tables, _python(paging, tables))


def _vmcb_view(session: Session, vmcb: Vmcb, title: str, nested: Optional[Structure]) -> View:
    tables = nested
    if tables is None and vmcb["nested_ctl"] & 1:
        tables = npt_tables(session, Npt.from_vmcb(vmcb))
    paging = Paging.from_registers(vmcb.get("cr0"), vmcb["cr3"], vmcb.get("cr4"), vmcb.get("efer"), pat=vmcb.get("g_pat"))
    return View(f"guest of {title}", paging, tables, _python(paging, tables))


def _python(paging: Paging, nested: Optional[Structure]) -> str:
    eptp, ncr3 = getattr(nested, "eptp", None), getattr(nested, "ncr3", None)
    words = [f"cr3={paging.cr3:#x}", f"paging={paging.mode!r}"]
    words += [f"eptp={eptp:#x}"] if eptp is not None else [f"ncr3={ncr3:#x}"] if ncr3 is not None else []
    return ", ".join(words)


def _next_walk(nested: Optional[Structure]) -> str:
    """What a click on an address of the guest's own tables runs: the walk of the nested tables, where there are any."""
    eptp, ncr3 = getattr(nested, "eptp", None), getattr(nested, "ncr3", None)
    return f"ept walk {{}} --eptp {eptp:#x}" if eptp is not None else f"npt walk {{}} --ncr3 {ncr3:#x}" if ncr3 is not None else PHYSICAL


def _group(found: Translation, title: str, linked: str) -> Group:
    group = Group("walk", title, [], {"gva": f"{found.gva:#x}", "outcome": found.outcome})
    for step in found.guest.steps:
        if step.nested is not None:
            group.add(_dimension(step.nested, f"{step.nested.structure}: to the guest's {step.name}, GPA {step.nested.address:#x}", "nested"))
        table = steps_table([step], linked)
        table.title = f"guest {found.guest.structure}, level {step.level}"
        table.headings = False
        group.add(Group("guest", "", [table]))
    if found.final is not None:
        group.add(_dimension(found.final, f"{found.final.structure}: to the page, GPA {found.final.address:#x}", "final"))
    facts = Pairs("result")
    facts.add(
        "outcome",
        "result",
        Value(found.outcome, "mapped" if found.mapped else f"{found.outcome} ({found.dimension} tables): {found.reason}", MARK[found.outcome]),
    )
    if found.gpa is not None and found.final is not None:
        facts.add("gpa", "guest-physical", hexa(found.gpa, 9, link=linked.format(f"{found.gpa:#x}")))
    if found.hpa is not None:
        facts.add("hpa", "host-physical" if found.final is not None else "physical", hexa(found.hpa, 9, "strong", PHYSICAL.format(f"{found.hpa:#x}")))
    if found.page_size is not None:
        facts.add("page_size", "page size", Value(found.page_size, f"{size_text(found.page_size)} contiguous"))
        facts.add("permissions", "permissions", str(found.permissions))
        facts.add("memory_type", "memory type", found.memory_type)
    if found.qualification is not None:
        facts.add("qualification", "reported as", hexa(found.qualification))
    if not found.mapped:
        facts.add("reason", "", Value(found.reason, ""))
    group.add(facts)
    group.blocks += remarks(_said_once(found))
    return group


def _said_once(found: Translation) -> Walk:
    """The remarks of every walk together, each once."""
    from dataclasses import replace

    last = found.fault or found.final or found.guest
    notes = dict.fromkeys(note for walk in (found.guest, found.final) if walk is not None for note in walk.notes)
    return replace(last, notes=tuple(notes), assumptions=found.assumptions)


def _dimension(walk: Walk, title: str, key: str) -> Group:
    table = steps_table(walk.steps, PHYSICAL)
    table.headings = False
    where = f" = HPA {walk.hpa:#x}" if walk.hpa is not None else ""
    return Group(key, title + where, [table], {"gpa": f"{walk.address:#x}", "outcome": walk.outcome})
