"""`page ...`: the pages and lists that a VMCS points to, besides tables and permission bitmaps."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

from vtdbg import bits
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import STALE_VMCS, VmcsAt, host_vmcs
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.report import FINDINGS, Block, Group, Lines, Pairs, Report, Table, Value, hexa, text
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx import msr_areas, structures
from vtdbg.vmx.bitmaps import ExceptionBitmap, VmcsAccessBitmap
from vtdbg.vmx.gates import unused_because

VMCS = Arg("vmcs", "address", "physical address of the VMCS (default: every one that a scan finds)", nargs="?")
AT = Opt("--at", "address", "the page at this physical address, whatever a VMCS says")

Make = Callable[[Session, Optional[VmcsAt], int], List[Block]]


def _page_report(command: str, session: Session, vmcs: Optional[int], at: Optional[int], field: str, make: Make) -> Report:
    """One group for each VMCS whose `field` points to the page, or for the page at `at`."""
    report = Report(
        command, header=session.header(), notes=list(session.machine.warnings), python=[*session.python_open(), "from vtdbg.vmx import structures"]
    )
    if at is not None:
        report.add(Group("pages", f"page {at:#x}", make(session, None, at), {"address": f"{at:#x}"}))
        return report
    report.notes.append(STALE_VMCS)
    row = vmcs_fields.find(field)
    for item in host_vmcs(session, vmcs):
        address, unused = item.vmcs.get(field), unused_because(item.vmcs, row)
        group = Group("pages", f"{row.title} of {item.title}", [], {"address": None if address is None else f"{address:#x}"})
        report.add(group)
        if address is None or unused:
            words = (
                f"unknown: this VMCS has no {field}"
                if address is None
                else f"{unused} ({field} is {address:#x}; --at {address:#x} shows the page all the same)"
            )
            group.add(Lines("why", [Value(words, words, "dim")]))
            continue
        group.add(Pairs("page", [("address", "at", hexa(address, 9, link=f"phys {address:#x}"))]))
        group.blocks += make(session, item, address)
        if any(isinstance(block, Lines) and block.key == "problems" for block in group.blocks):
            report.status = FINDINGS
    return report


def _problems(problems: Tuple[str, ...]) -> List[Block]:
    return [Lines("problems", [Value(line, line, "bad") for line in problems], bullet="! ")] if problems else []


def _vectors(vectors: Tuple[int, ...]) -> str:
    return " ".join(f"{vector:#x}" for vector in vectors) or "none"


@verb("page vapic", "virtual-APIC page", VMCS, AT)
def vapic(session: Session, vmcs: Optional[int], at: Optional[int]) -> Report:
    """The registers by name, and the vectors requested and in service."""

    def make(session: Session, _item: Optional[VmcsAt], address: int) -> List[Block]:
        found = structures.decode_virtual_apic(session.machine.memory.read_page(address & ~0xFFF))
        table = Table("registers", (("name", "register"), ("value", "value"), ("title", "meaning"), ("offset", "")), headings=False)
        for register in found.registers:
            table.add(register.name, hexa(register.value, 8, "" if register.value else "dim"), text(register.title, "dim"), hexa(register.offset, 3))
        facts = Pairs("vectors")
        facts.add("requested", "requested (VIRR)", Value(list(found.requested), _vectors(found.requested)))
        facts.add("in_service", "in service (VISR)", Value(list(found.in_service), _vectors(found.in_service)))
        facts.add("level", "level-triggered (VTMR)", Value(list(found.level), _vectors(found.level)))
        return [facts, table]

    return _page_report("page vapic", session, vmcs, at, "VIRTUAL_APIC_PAGE_ADDR", make)


@verb("page pml", "page-modification log", VMCS, AT, Opt("--pml-index", "int", "GUEST_PML_INDEX, with --at"))
def pml(session: Session, vmcs: Optional[int], at: Optional[int], pml_index: Optional[int]) -> Report:
    """The guest-physical pages logged since the hypervisor last emptied it, the oldest first."""

    def make(session: Session, item: Optional[VmcsAt], address: int) -> List[Block]:
        index = pml_index if pml_index is not None else item.vmcs.get("GUEST_PML_INDEX") if item is not None else None
        if index is None:
            raise UsageError("where the log ends is unknown: give --pml-index")
        found = structures.decode_pml(session.machine.memory.read_page(address), index)
        table = Table("entries", (("number", "entry"), ("gpa", "guest-physical")), empty="nothing is logged")
        for number, gpa in enumerate(found.addresses):
            table.add(str(511 - number), hexa(gpa, 9, link=f"ept walk {gpa:#x}"))
        facts = Pairs("log", [("index", "next entry", Value(found.index, "none: the log is full" if found.full else str(found.index)))])
        return [facts, table, *_problems(found.problems)]

    return _page_report("page pml", session, vmcs, at, "PML_ADDRESS", make)


@verb("page posted", "posted-interrupt descriptor", VMCS, AT)
def posted(session: Session, vmcs: Optional[int], at: Optional[int]) -> Report:
    """The vectors that wait, the notification, and whether it is suppressed."""

    def make(session: Session, _item: Optional[VmcsAt], address: int) -> List[Block]:
        found = structures.decode_posted_interrupts(session.machine.memory.read(address, 64), address)
        facts = Pairs("descriptor")
        facts.add("requests", "requests (PIR)", Value(list(found.requests), _vectors(found.requests)))
        facts.add("outstanding", "outstanding notification (ON)", found.outstanding)
        facts.add("suppress", "suppress notification (SN)", found.suppress)
        facts.add("notification_vector", "notification vector (NV)", hexa(found.notification_vector, 2))
        facts.add("destination", "destination (NDST)", hexa(found.destination, 8))
        return [facts, *_problems(found.problems)]

    return _page_report("page posted", session, vmcs, at, "POSTED_INTR_DESC_ADDR", make)


@verb("page ve", "virtualization-exception information area", VMCS, AT)
def ve(session: Session, vmcs: Optional[int], at: Optional[int]) -> Report:
    """What the guest's #VE handler sees; a busy word that is not 0 turns further #VE into EPT violations."""

    def make(session: Session, _item: Optional[VmcsAt], address: int) -> List[Block]:
        found = structures.decode_ve_info(session.machine.memory.read(address, 0x22))
        facts = Pairs("area")
        facts.add("state", "state", Value(found.state, found.state, "warn" if found.busy else ""))
        facts.add("busy_word", "busy word", hexa(found.busy_word, 8))
        facts.add("exit_reason", "exit reason", str(found.exit_reason))
        facts.add("qualification", "qualification", hexa(found.qualification, 16))
        facts.add("guest_linear_address", "guest-linear address", hexa(found.guest_linear_address, 16))
        facts.add("guest_physical_address", "guest-physical address", hexa(found.guest_physical_address, 16))
        facts.add("eptp_index", "EPTP index", str(found.eptp_index))
        return [facts, *_problems(found.problems)]

    return _page_report("page ve", session, vmcs, at, "VE_INFORMATION_ADDRESS", make)


@verb("page eptplist", "EPTP list of VMFUNC 0", VMCS, AT, Opt("--all", "flag", "entries that are 0 too"))
def eptplist(session: Session, vmcs: Optional[int], at: Optional[int], all: bool) -> Report:
    """The 512 EPT pointers that the guest may switch to, with what is wrong with those that it may not."""

    def make(session: Session, _item: Optional[VmcsAt], address: int) -> List[Block]:
        table = Table(
            "entries", (("index", "index"), ("eptp", "EPTP"), ("words", "meaning"), ("problems", "")), empty="every entry is 0", wrap="words"
        )
        for entry in structures.decode_eptp_list(session.machine.memory.read_page(address), session.caps):
            if entry.eptp or all:
                words = "; ".join(entry.problems) if entry.problems else bits.describe("eptp", entry.eptp)
                link = f"ept dump --eptp {entry.eptp:#x}" if entry.valid else ""
                table.add(
                    str(entry.index),
                    hexa(entry.eptp, 16, link=link),
                    Value(words, words, "bad" if entry.problems else ""),
                    Value(list(entry.problems), ""),
                )
        return [table]

    return _page_report("page eptplist", session, vmcs, at, "EPTP_LIST_ADDRESS", make)


@verb("page vmread", "VMREAD bitmap: the fields that a guest reads without an exit", VMCS, AT)
def vmread(session: Session, vmcs: Optional[int], at: Optional[int]) -> Report:
    """Fields by name whose bit is 0: with VMCS shadowing they are read from the shadow VMCS."""
    return _page_report("page vmread", session, vmcs, at, "VMREAD_BITMAP", _access_bitmap)


@verb("page vmwrite", "VMWRITE bitmap: the fields that a guest writes without an exit", VMCS, AT)
def vmwrite(session: Session, vmcs: Optional[int], at: Optional[int]) -> Report:
    """Fields by name whose bit is 0: with VMCS shadowing they are written to the shadow VMCS."""
    return _page_report("page vmwrite", session, vmcs, at, "VMWRITE_BITMAP", _access_bitmap)


def _access_bitmap(session: Session, _item: Optional[VmcsAt], address: int) -> List[Block]:
    found = VmcsAccessBitmap.read(session.machine.memory, address)
    table = Table("passed", (("encoding", "encoding"), ("name", "field")), title="Fields that pass", empty="none: every access exits", headings=False)
    for field in found.passed():
        table.add(hexa(field.encoding, 4), field.name)
    unknown = found.passed_unknown()
    blocks: List[Block] = [table]
    if unknown:
        blocks.append(
            Lines(
                "unknown",
                [
                    Value(
                        list(unknown),
                        f"bits of no known field that are 0: {', '.join(f'{number:#x}' for number in unknown[:16])}"
                        + (" ..." if len(unknown) > 16 else ""),
                        "warn",
                    )
                ],
            )
        )
    return blocks


@verb("page vmxon", "VMXON region", Arg("at", "address", "physical address of the region"))
def vmxon(session: Session, at: int) -> Report:
    """What VMXON would find: the revision identifier and the alignment."""

    def make(session: Session, _item: Optional[VmcsAt], address: int) -> List[Block]:
        found = structures.decode_vmxon(session.machine.memory.read(address, 4096), session.caps, address)
        facts = Pairs("region", [("revision", "revision id", hexa(found.revision)), ("nonzero", "bytes used behind it", str(found.nonzero_bytes))])
        return [facts, *_problems(found.problems)]

    return _page_report("page vmxon", session, None, at, "VMCS_LINK_POINTER", make)


@verb(
    "page msrs",
    "MSR-load and MSR-store areas",
    VMCS,
    Opt("--at", "address", "an area at this physical address"),
    Opt("--count", "int", "its entries, with --at"),
    Opt("--kind", "choice", "what it is, with --at", choices=tuple(msr_areas.AREAS), default=msr_areas.ENTRY_LOAD),
)
def msrs(session: Session, vmcs: Optional[int], at: Optional[int], count: Optional[int], kind: str) -> Report:
    """Every entry by name, and those that would make the VM entry fail or the VM exit abort."""
    report = Report(
        "page msrs",
        header=session.header(),
        notes=list(session.machine.warnings),
        python=[*session.python_open(), "from vtdbg.vmx.msr_areas import area_of"],
    )
    if at is not None:
        if count is None:
            raise UsageError("--at needs --count")
        found = msr_areas.read_area(session.machine.memory, kind, at, count, session.caps)
        report.add(Group("areas", f"{kind} area at {at:#x}", _area(found), {"kind": kind}))
        return report
    report.notes.append(STALE_VMCS)
    for item in host_vmcs(session, vmcs):
        for one in msr_areas.AREAS:
            area = msr_areas.area_of(item.vmcs, session.machine.memory, one, session.caps)
            blocks: List[Block] = (
                [Lines("why", [Value(None, "unknown: address or count is not in this VMCS", "warn")])] if area is None else _area(area)
            )
            report.add(Group("areas", f"{one} area of {item.title}", blocks, {"kind": one}))
            if area is not None and (area.problems or area.first_failing):
                report.status = FINDINGS
    return report


def _area(found: msr_areas.MsrArea) -> List[Block]:
    facts = Pairs("area", [("address", "at", hexa(found.address, 9, link=f"phys {found.address:#x}")), ("count", "entries", str(found.count))])
    table = Table(
        "entries",
        (("number", "entry"), ("index", "MSR"), ("name", "name"), ("value", "value"), ("problems", "problems")),
        wrap="problems",
        empty="no entries",
    )
    for entry in found.entries:
        words = "; ".join([*entry.problems, *entry.notes])
        table.add(
            str(entry.number),
            hexa(entry.index, 8),
            entry.name,
            hexa(entry.value, 16),
            Value(list(entry.problems), words, "bad" if entry.problems else "dim"),
        )
    blocks: List[Block] = [facts, table]
    if found.unreadable:
        blocks.append(Lines("unreadable", [Value(found.unreadable, found.unreadable, "warn")]))
    failing: Any = found.first_failing
    lines = [*found.problems, *([f"entry {failing.number}: {found.consequence}"] if failing is not None else [])]
    return [*blocks, *_problems(tuple(lines))]


@verb("page exceptions", "exception bitmap with the page-fault mask and match", VMCS)
def exceptions(session: Session, vmcs: Optional[int]) -> Report:
    """Which exceptions exit; a page fault by its bit, the mask and the match together."""
    report = Report(
        "page exceptions",
        header=session.header(),
        notes=[*session.machine.warnings, STALE_VMCS],
        python=[*session.python_open(), "from vtdbg.vmx.bitmaps import ExceptionBitmap"],
    )
    for item in host_vmcs(session, vmcs):
        found = ExceptionBitmap.of(item.vmcs)
        group = Group("bitmaps", f"exception bitmap of {item.title}", [])
        report.add(group)
        if found is None:
            group.add(Lines("why", [Value(None, "unknown: EXCEPTION_BITMAP is not in this VMCS", "warn")]))
            continue
        table = Table("vectors", (("vector", "vector"), ("name", "exception"), ("exits", "exits")), headings=False, empty="no exception exits")
        for row in found.rows():
            table.add(str(row.vector), row.name, row.exits)
        group.add(Pairs("word", [("bitmap", "bitmap", hexa(found.bitmap, 8)), ("page_faults", "page faults", found.page_faults())]))
        group.add(table)
    return report
