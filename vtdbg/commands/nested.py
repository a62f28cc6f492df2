"""What the `ept` and `npt` verbs share: which tables are meant, and walks of them as a report."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

from vtdbg.commands.registry import Arg, Opt
from vtdbg.commands.select import STALE_VMCB, STALE_VMCS, chosen_vmcb, chosen_vmcs, host_vmcs
from vtdbg.commands.session import Session
from vtdbg.commands.walks import access_text, walk_group
from vtdbg.errors import UsageError, VtdbgError
from vtdbg.report import FINDINGS, Lines, Report, Value
from vtdbg.svm.capabilities import SvmCapabilities
from vtdbg.svm.npt import Npt
from vtdbg.vmx.controls import control
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.structures import decode_eptp_list
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.walk import parse_access

if TYPE_CHECKING:
    from vtdbg.walk import Structure

GPA = Arg("gpa", "address", "guest-physical address")
RANGE = Opt("--gpa", "text", "only this range: A-B or A+SIZE", metavar="RANGE")
LIMIT = Opt("--limit", "int", "stop after this many rows", default=1000)
ACCESS = Opt("--access", "text", "what the guest does: r, w, x or a combination (default: nothing is judged but presence)")

ROOT_OPTION = {"ept": "--eptp", "npt": "--ncr3"}


@dataclass(frozen=True)
class Root:
    """Nested tables, where the pointer to them is from, and the Python that makes them."""

    tables: "Structure"
    title: str
    python: str
    users: List[str] = field(default_factory=list)


def ept_roots(session: Session, eptp: Optional[int], vmcs: Optional[int]) -> List[Root]:
    """The EPT that the user named, or those of every VMCS that a scan finds, each pointer once."""
    if eptp is not None:
        return [Root(Ept(eptp, session.caps), f"EPTP {eptp:#x}", f"{eptp:#x}")]
    roots: Dict[int, Root] = {}
    problems = []
    for item in host_vmcs(session, vmcs):
        try:
            tables = Ept.from_vmcs(item.vmcs, session.caps)
        except UsageError as error:
            problems.append(f"{item.title}: {error}")
            continue
        root = roots.setdefault(tables.eptp, Root(tables, f"EPTP {tables.eptp:#x}", f"{tables.eptp:#x}"))
        root.users.append(item.title)
    if not roots:
        raise UsageError("; ".join(problems) or "no EPT pointer; give --eptp")
    return list(roots.values())


def with_eptp_lists(session: Session, roots: Sequence[Root], further: Sequence[int] = ()) -> Tuple[List[Root], List[str]]:
    """`roots`, the EPTPs in `further`, and those in the EPTP lists of the VMCSs that use these roots; and what has to be said of the lists."""
    pointers = {root.tables.eptp: root for root in roots if isinstance(root.tables, Ept)}
    notes: List[str] = []
    for eptp in further:
        pointers.setdefault(eptp, ept_roots(session, eptp, None)[0])
    for item in (chosen_vmcs(session) if any(root.users for root in roots) else ()):
        if item.vmcs.get("EPT_POINTER") not in pointers:
            continue
        listed, words = listed_views(item.vmcs, item.title, session)
        notes += words
        for view in listed:
            root = pointers.setdefault(view.tables.eptp, view) if isinstance(view.tables, Ept) else view
            root.users.extend(title for title in view.users if title not in root.users)
    return list(pointers.values()), notes


def listed_views(vmcs: Vmcs, title: str, session: Session) -> Tuple[List[Root], List[str]]:
    """The valid entries of the EPTP list that a VMCS makes its guest's VMFUNC use, and what has to be said of the list."""
    address = vmcs.get("EPTP_LIST_ADDRESS")
    if address is None or control(vmcs, "vmfunc", "EPTP_SWITCHING") is not True:
        return [], []
    try:
        entries = decode_eptp_list(session.machine.memory.read_page(address), session.caps)
    except VtdbgError as error:
        return [], [f"the EPTP list of {title} was not read: {error}"]
    notes = []
    wrong = [entry for entry in entries if entry.eptp and not entry.valid]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        notes.append(f"entry {wrong[0].index} ({wrong[0].eptp:#x}){more} is no valid EPTP in the EPTP list of {title}: switching to it exits")
    return [Root(Ept(entry.eptp, session.caps), f"EPTP {entry.eptp:#x}", f"{entry.eptp:#x}", [f"entry {entry.index} of the EPTP list of {title}"])
            for entry in entries if entry.eptp and entry.valid], notes


def npt_roots(session: Session, ncr3: Optional[int], vmcb: Optional[int]) -> List[Root]:
    """The nested tables that the user named, or those of every VMCB that a scan finds, each root once."""
    if ncr3 is not None:
        return [Root(npt_tables(session, Npt(ncr3)), f"nCR3 {ncr3:#x}", f"{ncr3:#x}")]
    roots: Dict[int, Root] = {}
    problems = []
    for item in chosen_vmcb(session, vmcb):
        try:
            tables = npt_tables(session, Npt.from_vmcb(item.vmcb))
        except UsageError as error:
            problems.append(f"{item.title}: {error}")
            continue
        root = roots.setdefault(tables.ncr3, Root(tables, f"nCR3 {tables.ncr3:#x}", f"{tables.ncr3:#x}"))
        root.users.append(item.title)
    if not roots:
        raise UsageError("; ".join(problems) or "no nested CR3; give --ncr3")
    return list(roots.values())


def npt_tables(session: Session, tables: Npt) -> Npt:
    """Nested tables as the host of this session uses them.  What neither the user, --caps nor the host's registers say stays assumed, and said."""
    width = SvmCapabilities.of(session.caps).physical_address_width if session.caps is not None else None
    return tables.on_host(session.machine.host_registers(), session.host_paging, width)


def title_of(root: Root, words: str) -> str:
    """ "GPA 0x1000 through EPTP 0x3afa05e (VMCS at 0x6826000)"."""
    return f"{words} through {root.title}" + (f" ({', '.join(root.users)})" if root.users else "")


def nested_report(command: str, session: Session, roots: Sequence[Root]) -> Report:
    """The frame of every report on nested tables: where from, how fresh, and the first lines of its Python."""
    kind = command.split()[0]
    report = Report(command, header=session.header(), notes=list(session.machine.warnings))
    if any(root.users for root in roots):
        report.notes.append(STALE_VMCS if kind == "ept" else STALE_VMCB)
    report.python = [*session.python_open(), *python_caps(session),
                     "from vtdbg.vmx.ept import Ept" if kind == "ept" else "from vtdbg.svm.npt import Npt"]
    return report


def python_caps(session: Session) -> List[str]:
    """The line that makes `caps`, where the user gave capabilities."""
    return [f"caps = vtdbg.VmxCapabilities.load({session.caps_name!r})"] if session.caps_name else []


def python_tables(kind: str, root: Root) -> str:
    """The expression that makes the tables of a root as they were read: "Ept(0x1000)", "Ept(0x1000, caps=caps, mbec=True)"."""
    return f"{'Ept' if kind == 'ept' else 'Npt'}({root.python}{python_arguments(root)})"


def python_arguments(root: Root) -> str:
    """The arguments besides the pointer that are not as assumed: controls of the VMCS, the host's paging, and `caps` (see `nested_report`)."""
    tables = root.tables
    assert isinstance(tables, (Ept, Npt))
    given = [(field.name, getattr(tables, field.name), field.default) for field in fields(tables)[1:] if field.name != "unknown"]
    return "".join(f", {name}={'caps' if name == 'caps' else repr(value)}" for name, value, default in given if value != default)


def walk_report(command: str, session: Session, roots: Sequence[Root], gpa: int, access: Optional[str]) -> Report:
    """One walk for each root; status 1 where one of them does not get through."""
    parse_access(access)
    kind = command.split()[0]
    report = Report(command, header=session.header(), notes=list(session.machine.warnings))
    if any(root.users for root in roots):
        report.notes.append(STALE_VMCS if kind == "ept" else STALE_VMCB)
    report.python = [*session.python_open(), *python_caps(session)]
    for root in roots:
        walk = root.tables.walk(session.machine.memory, gpa, access)
        report.add(walk_group(walk, title_of(root, f"GPA {gpa:#x}{access_text(access)}"), "phys {}"))
        if not walk.mapped:
            report.status = FINDINGS
        report.python.append(f"walk = vtdbg.{kind}_walk(machine.memory, {root.python}, {gpa:#x}, access={access!r}{python_arguments(root)})")
    report.python.append("print(walk.outcome, walk.hpa, walk.reason)")
    if len(roots) > 1:
        option = "--vmcs or --eptp" if kind == "ept" else "--vmcb or --ncr3"
        report.add(Lines("hint", [Value(None, f"{len(roots)} tables were found and walked; {option} picks one.", "dim")]))
    return report
