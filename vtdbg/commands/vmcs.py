"""`vmcs dump|get|layouts`: every VMCS of a dump by name and value."""

from __future__ import annotations

from typing import Dict, Iterator, List, Optional, Sequence

from vtdbg.commands.field_links import Link, no_link, vmcs_links
from vtdbg.commands.records import Shown, group_tables, unparsed_block, values_table
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import STALE_VMCS, VmcsAt, chosen_vmcs, fields_and_address
from vtdbg.commands.session import Session, find_layout
from vtdbg.report import FINE, Group, Lines, Pairs, Report, Table, Value, hex_or_none, hexa, text
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.gates import gate_of
from vtdbg.vmx.vmcs import FieldValue, Vmcs
from vtdbg.vmx.words import value_in_words

ADDRESS = Arg("address", "address", "physical address of the VMCS page (default: every one that a scan finds)", nargs="?")
TEXT = Opt("--text", "path", "take the VMCS from a log (KVM, Xen, hvext, HAXM, VirtualBox); - is the standard input", metavar="FILE")
INDEX = Opt("--index", "int", "which dump of the text, from 0")

VMREAD_OPTIONS = (
    Opt("--yes", "flag", "with --vmread: do not ask"),
    Opt("--assume-host", "flag", "with --vmread: the processor is in the host, although nothing in memory says so"),
    Opt("--no-patch", "flag", "with --vmread: use a VMREAD that is in the code already instead of writing one at RIP"),
)
VMREAD_PYTHON = (
    "from vtdbg.targets.inject import Injector",
    "with Injector(machine.port, lambda: None) as target:",
    "    print(target.vmreads([0x681e]).values)",
)

GROUPS: Dict[str, tuple[str, ...]] = {
    "guest": ("guest-register", "guest-non-register"),
    "host": ("host",),
    "control": ("execution-control", "exit-control", "entry-control"),
    "exit": ("exit-info",),
}


@verb(
    "vmcs dump",
    "every field by name and value, decoded bit by bit",
    ADDRESS,
    TEXT,
    INDEX,
    Opt("--group", "choice", "only these fields", choices=tuple(GROUPS)),
    Opt("--all", "flag", "every field, also those that are 0 and matter for SMM, SEAM or FRED only"),
    Opt("--used", "flag", "only fields that the processor uses"),
    Opt("--vmread", "flag", "live target: the current VMCS by injected VMREADs, whatever its page's layout (asks first)"),
    *VMREAD_OPTIONS,
)
def dump(
    session: Session,
    address: Optional[int],
    text: Optional[str],
    index: Optional[int],
    group: Optional[str],
    all: bool,
    used: bool,
    vmread: bool,
    yes: bool,
    assume_host: bool,
    no_patch: bool,
) -> Report:
    """Fields that the controls leave unused are dimmed, with the control that leaves them unused."""
    if vmread:
        from vtdbg.commands.live import vmread_vmcs

        notes: List[str] = []
        chosen = [VmcsAt(None, vmread_vmcs(session, address, yes, assume_host, no_patch, notes))]
        report = Report("vmcs dump", header=session.header(), notes=[*session.machine.warnings, *notes])
        report.python = [*session.python_open(), *VMREAD_PYTHON]
    else:
        chosen = chosen_vmcs(session, address, text, index)
        report = _report("vmcs dump", session, chosen, text)
    for item in chosen:
        link = vmcs_links(item.vmcs, address) if vmread else _links(item)
        shown = [value for value in shown_values(item.vmcs, link) if group is None or value.group in GROUPS[group]]
        blocks = [_head(item), *group_tables(shown, vmcs_fields.GROUPS, all, used), *unparsed_block(item.text)]
        report.add(Group("vmcs", item.title, blocks, {"address": hex_or_none(item.address)}))
    return report


@verb(
    "vmcs get",
    "the value of some fields",
    Arg("field", "field", "name or encoding; several may follow, and the address of the page", nargs="+"),
    Opt("--at", "address", "physical address of the VMCS page (default: every one that a scan finds)"),
    TEXT,
    INDEX,
)
def get(session: Session, field: List[str], at: Optional[int], text: Optional[str], index: Optional[int]) -> Report:
    """Any source's name is understood (GUEST_RIP, VMCS_GUEST_RIP, "Guest RIP"), or the encoding (0x681e)."""
    # An encoding has 16 bits (SDM vol. 3, Field Encoding in VMCS).
    names, at = fields_and_address(field, at, 0x10000)
    wanted = [vmcs_fields.find(name) for name in names]
    chosen = chosen_vmcs(session, at, text, index)
    report = _report("vmcs get", session, chosen, text)
    for item in chosen:
        # A field that this VMCS lacks is an error here, not a row: scripts rely on the exit status.
        values = [item.vmcs.value(row.encoding) for row in wanted]
        link = _links(item)
        table = values_table(_shown(item.vmcs, value, link) for value in values)
        report.add(Group("vmcs", item.title, [table], {"address": hex_or_none(item.address)}))
    return report


@verb(
    "vmcs layouts",
    "the page layouts that are known, or one of them field by field",
    Arg("name", "text", "a layout's name, or a layout file", nargs="?"),
)
def layouts(session: Session, name: Optional[str]) -> Report:
    """No manual gives the layout of a VMCS page.  These are published or measured ones; --layout takes a file of the same form."""
    from vtdbg.vmx import layouts as known

    report = Report(
        "vmcs layouts",
        python=[
            "from vtdbg.vmx.layouts import layouts",
            "for name, layout in layouts().items():",
            "    print(name, layout.revision_ids, len(layout.fields))",
        ],
    )
    if name is None:
        table = Table(
            "layouts", (("id", "layout"), ("revisions", "revision"), ("fields", "fields"), ("access_rights", "rights"), ("title", "of")), wrap="title"
        )
        for layout in known.layouts().values():
            table.add(layout.id, _revisions(layout.revision_ids), str(len(layout.fields)), layout.access_rights, layout.title)
        report.add(table)
        report.add(Lines("hint", [Value(None, "A revision id does not identify a layout: pages are recognised by content.", "dim")]))
        return report
    layout = find_layout(name)
    facts = Pairs("layout", title=f"Layout {layout.id}: {layout.title}")
    facts.add("revision_ids", "revision ids", ", ".join(f"{number:#x}" for number in layout.revision_ids) or "any")
    facts.add("access_rights", "access rights", known.ACCESS_RIGHTS_FORMS[layout.access_rights])
    facts.add("valid_for", "valid for", layout.valid_for)
    report.add(facts)
    for key, title, lines in (("sources", "Sources", layout.sources), ("caveats", "Caveats", layout.caveats), ("notes", "Notes", layout.notes)):
        if lines:
            report.add(Lines(key, list(lines), title=title, bullet="- "))
    table = Table("fields", (("offset", "offset"), ("size", "size"), ("encoding", "encoding"), ("name", "field"), ("note", "note")))
    for encoding, place in sorted(layout.fields.items(), key=lambda entry: entry[1].offset):
        table.add(hexa(place.offset, 3), str(place.size), hexa(encoding, 4), vmcs_fields.find(encoding).name, text(place.note, "dim"))
    report.add(table)
    return report


def _revisions(numbers: Sequence[int]) -> Value:
    """The revision ids in JSON, the first of them in text."""
    words = [f"{number:#x}" for number in numbers]
    return Value(words, (words[0] + (f" +{len(words) - 1}" if len(words) > 1 else "")) if words else "any")


def _report(command: str, session: Session, chosen: List[VmcsAt], text: Optional[str]) -> Report:
    """The frame that dump and get share: where from, how fresh, and the Python of it."""
    report = Report(command, status=FINE)
    if text is not None:
        report.header = f"VMCS from text {text}"
        report.python = ["import vtdbg", f"vmcs = vtdbg.Vmcs.from_text(open({text!r}).read())"]
    else:
        report.header = session.header()
        report.notes = [*session.machine.warnings, STALE_VMCS]
        report.python = session.python_open()
        for item in chosen:
            layout = item.vmcs.layout.id if item.vmcs.layout else None
            report.python.append(f"vmcs = vtdbg.Vmcs.from_page(machine.memory.read_page({item.address:#x}), layout={layout!r})")
    report.python += ["for name, value in vmcs.items():", "    print(name, hex(value))"]
    return report


def _head(item: VmcsAt) -> Pairs:
    """What the page itself says, and why it is taken for what it is."""
    vmcs, facts = item.vmcs, Pairs("page")
    if vmcs.layout is not None:
        facts.add("layout", "layout", vmcs.layout.id)
    if vmcs.revision_id is not None:
        facts.add(
            "revision_id",
            "revision id",
            Value(f"{vmcs.revision_id:#x}", f"{vmcs.revision_id:#x}" + (" with bit 31: a shadow VMCS" if vmcs.shadow else "")),
        )
    if vmcs.abort_indicator is not None:
        facts.add("abort_indicator", "abort indicator", hexa(vmcs.abort_indicator, style="bad" if vmcs.abort_indicator else ""))
    if vmcs.launch_state is not None and vmcs.layout is not None:
        facts.add("launch_state", "launch state", vmcs.layout.launch_state_name(vmcs.launch_state))
    if item.found is not None:
        facts.add("evidence", "evidence", item.found.summary)
    for number, warning in enumerate(vmcs.warnings):
        facts.add(f"warning{number or ''}", "note", text(warning, "warn"))
    return facts


def _links(item: VmcsAt) -> Link:
    """Addresses out of a log, or of a nested hypervisor's VMCS, are not of this memory."""
    return no_link if item.address is None or item.nested else vmcs_links(item.vmcs, item.address)


def shown_values(vmcs: Vmcs, link: Link = no_link) -> Iterator[Shown]:
    """Every known value of the VMCS, in words, with what the gates say of it."""
    return (_shown(vmcs, value, link) for value in vmcs.values())


def _shown(vmcs: Vmcs, value: FieldValue, link: Link = no_link) -> Shown:
    field, gate = value.field, gate_of(vmcs, value.field)
    doubtful = gate.used is None and value.value == 0
    unused = gate.used is False or doubtful
    return Shown(
        field.name,
        field.title,
        field.group,
        value.value,
        field.digits,
        value_in_words(field, value.value),
        value.source,
        why=gate.why if unused else "",
        note="" if unused else gate.why,
        doubtful=doubtful,
        link="" if unused else link(field.name, field.group, value.value),
    )

