"""`vmcs list`: which VMCSs are in the memory.  Apart from the other verbs, because it is what a cold process is asked first: no field's bits,
links and gates are loaded for it."""

from __future__ import annotations

from vtdbg.commands.owners import owner_columns
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.scanning import STALE_VMCS, scanned_blocks, searched_memory
from vtdbg.commands.session import Session
from vtdbg.commands.vms import vmcs_vms
from vtdbg.report import Report, Table, hexa, text
from vtdbg.scanner import scan


@verb(
    "vmcs list",
    "find every VMCS in the memory, with the evidence",
    Opt("--rejected", "flag", "also show pages that begin with a known revision id and are no VMCS"),
)
def list_(session: Session, rejected: bool) -> Report:
    """Scans page by page for regions that begin with a known revision id and decode to something plausible.

    A revision id alone proves nothing: many pages begin with one by accident.  The score sums the evidence, for and against.
    """
    found, partial = scanned_blocks(session, ("vmcs",))
    # What is found tells a live target where its processor is.
    report = Report("vmcs list", header=session.header(), notes=list(session.machine.warnings))
    if partial:
        report.notes.append(partial)
    owners = owner_columns(session)
    table = Table(
        "vmcs",
        (("address", "address"), ("kind", "kind"), *owners.heads, ("layout", "layout"), ("score", "score"), ("summary", "evidence")),
        empty="no VMCS found",
        wrap="summary",
    )
    for item in found:
        table.add(
            hexa(item.address, link=f"vmcs dump {item.address:#x}"),
            text(item.classification, "good" if item.vmcs else "dim"),
            *owners.cells(item.address),
            item.layout_id,
            str(item.score),
            item.summary,
        )
    report.add(table)
    report.add(vmcs_vms(found))
    if rejected:
        near = Table(
            "rejected",
            (("address", "address"), ("layout", "layout"), ("score", "score"), ("summary", "why not")),
            title="Rejected pages",
            empty="none",
            wrap="summary",
        )
        for item in scan(searched_memory(session), kinds=("vmcs",), layout=session.layout, rejected=True):
            if item.classification == "rejected":
                near.add(hexa(item.address), item.layout_id, str(item.score), item.summary)
        report.add(near)
    if found:
        report.notes.append(STALE_VMCS)
    report.python = [
        *session.python_open(),
        'for found in vtdbg.scan(machine, kinds=("vmcs",)):',
        "    print(hex(found.address), found.classification, found.score, found.evidence)",
    ]
    return report
