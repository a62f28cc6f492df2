"""`vmcb list|dump|get`: every VMCB of a dump by name and value."""

from __future__ import annotations

from typing import Iterator, List, Optional

from vtdbg.commands.field_links import Link, no_link, vmcb_links
from vtdbg.commands.owners import owner_columns
from vtdbg.commands.records import Shown, group_tables, unparsed_block, values_table
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.scanning import scanned_blocks
from vtdbg.commands.select import STALE_VMCB, VmcbAt, chosen_vmcb, fields_and_address
from vtdbg.commands.session import Session
from vtdbg.commands.vms import vmcb_vms
from vtdbg.report import Group, Pairs, Report, Table, Value, hex_or_none, hexa, text
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm.gates import unused_because
from vtdbg.svm.vmcb import FieldValue, Vmcb
from vtdbg.svm.words import value_in_words

ADDRESS = Arg("address", "address", "physical address of the VMCB page, 0 included (default: every one that a scan finds)", nargs="?")
TEXT = Opt("--text", "path", "take the VMCB from a log (KVM dump_vmcb, Xen); - is the standard input", metavar="FILE")
INDEX = Opt("--index", "int", "which dump of the text, from 0")


@verb("vmcb list", "find every VMCB in the memory, with the evidence")
def list_(session: Session) -> Report:
    """A VMCB has no signature: pages are taken for one by what a VMRUN would have to accept.  0 is a legal address."""
    found, partial = scanned_blocks(session, ("vmcb",))
    # What is found tells a live target where its processor is.
    report = Report("vmcb list", header=session.header(), notes=list(session.machine.warnings))
    owners = owner_columns(session)
    table = Table(
        "vmcb", (("address", "address"), ("kind", "kind"), *owners.heads, ("score", "score"), ("summary", "evidence")), empty="no VMCB found",
        wrap="summary",
    )
    if partial:
        report.notes.append(partial)
    for item in found:
        table.add(
            hexa(item.address, link=f"vmcb dump {item.address:#x}"),
            text(item.classification, "good" if item.classification == "vmcb" else "dim"),
            *owners.cells(item.address),
            str(item.score),
            item.summary,
        )
    report.add(table)
    read = session.machine.memory.read_page
    report.add(vmcb_vms([(item.address, Vmcb.from_page(read(item.address))) for item in found if item.classification == "vmcb"]))
    if found:
        report.notes.append(STALE_VMCB)
    report.python = [
        *session.python_open(),
        'for found in vtdbg.scan(machine, kinds=("vmcb",)):',
        "    print(hex(found.address), found.classification, found.score, found.evidence)",
    ]
    return report


@verb(
    "vmcb dump",
    "every field by name and value, decoded bit by bit",
    ADDRESS,
    TEXT,
    INDEX,
    Opt("--vmsa", "flag", "the page is an SEV-ES save area (VMSA), decrypted"),
    Opt("--used", "flag", "only fields that the processor uses"),
)
def dump(session: Session, address: Optional[int], text: Optional[str], index: Optional[int], vmsa: bool, used: bool) -> Report:
    """Fields that the controls leave unused are dimmed, with the control that leaves them unused."""
    layout = "vmsa" if vmsa else "vmcb"
    chosen = chosen_vmcb(session, address, text, index, layout)
    report = _report("vmcb dump", session, chosen, text)
    for item in chosen:
        facts = Pairs("page")
        if item.found is not None:
            facts.add("evidence", "evidence", item.found.summary)
        for number, warning in enumerate(item.vmcb.warnings):
            facts.add(f"warning{number or ''}", "note", Value(warning, warning, "warn"))
        blocks = group_tables(shown_values(item.vmcb, _links(item)), vmcb_fields.GROUPS, used_only=used)
        report.add(Group("vmcb", item.title, [facts, *blocks, *unparsed_block(item.text)], {"address": hex_or_none(item.address)}))
    return report


@verb(
    "vmcb get",
    "the value of some fields",
    Arg("field", "field", "name or offset; several may follow, and the address of the page", nargs="+"),
    Opt("--at", "address", "physical address of the VMCB page (default: every one that a scan finds)"),
    TEXT,
    INDEX,
)
def get(session: Session, field: List[str], at: Optional[int], text: Optional[str], index: Optional[int]) -> Report:
    """Linux' member names (rip, exit_code, cs.selector), the names of the APM, Xen and Bochs, or the offset (0x70)."""
    names, at = fields_and_address(field, at, 0x1000)
    wanted = [vmcb_fields.find(name) for name in names]
    chosen = chosen_vmcb(session, at, text, index)
    report = _report("vmcb get", session, chosen, text)
    for item in chosen:
        link = _links(item)
        table = values_table(_shown(item.vmcb, item.vmcb.value(row.offset), link) for row in wanted)
        report.add(Group("vmcb", item.title, [table], {"address": hex_or_none(item.address)}))
    return report


def _report(command: str, session: Session, chosen: List[VmcbAt], text: Optional[str]) -> Report:
    """The frame that dump and get share: where from, how fresh, and the Python of it."""
    report = Report(command)
    if text is not None:
        report.header = f"VMCB from text {text}"
        report.python = ["import vtdbg", f"vmcb = vtdbg.Vmcb.from_text(open({text!r}).read())"]
    else:
        report.header = session.header()
        report.notes = [*session.machine.warnings, STALE_VMCB]
        report.python = session.python_open()
        report.python += [f"vmcb = vtdbg.Vmcb.from_page(machine.memory.read_page({item.address:#x}), {item.vmcb.layout!r})" for item in chosen]
    report.python += ["for name, value in vmcb.items():", "    print(name, hex(value))"]
    return report


def _links(item: VmcbAt) -> Link:
    """Addresses out of a log are not of this memory."""
    return no_link if item.address is None else vmcb_links(item.vmcb, item.address)


def shown_values(vmcb: Vmcb, link: Link = no_link) -> Iterator[Shown]:
    """Every value of the VMCB in words, with what its controls say of it."""
    return (_shown(vmcb, value, link) for value in vmcb.values())


def _shown(vmcb: Vmcb, value: FieldValue, link: Link = no_link) -> Shown:
    field = value.field
    why = unused_because(vmcb, field) or ""
    return Shown(
        field.name,
        field.title,
        field.group,
        value.value,
        field.digits,
        value_in_words(field, value.value),
        value.source,
        why=why,
        link="" if why else link(field.name, field.group, value.value),
    )
