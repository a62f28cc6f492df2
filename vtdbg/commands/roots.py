"""`ept roots` and `npt roots`: nested tables found in memory without any control block that names them."""

from __future__ import annotations

import time
from typing import Callable, Dict, List, Optional

from vtdbg.commands.scanning import scanned_blocks, searched_memory
from vtdbg.commands.session import Session
from vtdbg.evidence import summarize
from vtdbg.numbers import size_text
from vtdbg.report import Report, Table, Value, hexa
from vtdbg.roots import RootFinder
from vtdbg.svm.vmcb import Vmcb

ORDINARY = "nested page tables have the form of ordinary ones: tables of a process whose every page is a user page look the same"
_ADDRESS = 0x000FFFFFFFFFF000
_EVERY = 0.2


def roots_report(command: str, session: Session, kind: str) -> Report:
    """Every root with evidence, score, and the control blocks that name it."""
    report = Report(command)
    part = searched_memory(session)
    # What leads into memory is judged by all of it, whatever part is searched.
    finder = RootFinder(session.machine, kind)
    try:
        finder.read(_progress(session), part)
    except KeyboardInterrupt:
        report.notes.append(f"interrupted after {size_text(finder.done)}: what follows is partial")
    finally:
        if session.progress is not None:
            session.progress("")
    if finder.cut:
        report.notes.append("more pages look like tables than are kept: some roots may be missing")
    users = _users(session, kind)
    report.header = session.header()
    report.notes = [*session.machine.warnings, *report.notes]
    pointer_name = "EPTP" if kind == "ept" else "nCR3"
    columns = (("root", "root"), ("pointer", pointer_name), ("score", "score"), ("named_by", "named by"), ("summary", "evidence"))
    table = Table("roots", columns, empty=f"no {finder.form.title} found", wrap="summary")
    for root in finder.roots():
        pointer = root.eptp if kind == "ept" else root.address
        named = users.get(root.address, [])
        table.add(hexa(root.address), hexa(pointer, link=f"{kind} dump --{'eptp' if kind == 'ept' else 'ncr3'} {pointer:#x}"), str(root.score),
                  Value(named, " ".join(named[:2]) + (" ..." if len(named) > 2 else "") or "nobody", "" if named else "warn"),
                  summarize(root.evidence))
    report.add(table)
    if kind == "npt" and table.rows:
        report.notes.append(ORDINARY)
    report.python = [*session.python_open(), "from vtdbg.roots import find_roots", f"for root in find_roots(machine, {kind!r}):",
                     "    print(hex(root.address), root.levels, root.score, root.tables, root.leaves)"]
    return report


def _progress(session: Session) -> Optional[Callable[[int], None]]:
    progress = session.progress
    if progress is None:
        return None
    due = [time.monotonic() + _EVERY]

    def count(done: int) -> None:
        if time.monotonic() > due[0]:
            due[0] = time.monotonic() + _EVERY
            progress(f"looked at {size_text(done)} (Ctrl-C shows what was found)")

    return count


def _users(session: Session, kind: str) -> Dict[int, List[str]]:
    """{root: addresses of the control blocks that name it}"""
    users: Dict[int, List[str]] = {}
    found, _ = scanned_blocks(session, ("vmcs" if kind == "ept" else "vmcb",))
    for item in found:
        if kind == "ept":
            pointer = item.vmcs.get("EPT_POINTER") if item.vmcs is not None else None
        elif item.classification == "vmcb":
            pointer = Vmcb.from_page(session.machine.memory.read_page(item.address)).get("nested_cr3")
        else:
            pointer = None
        if pointer:
            users.setdefault(pointer & _ADDRESS, []).append(f"{item.address:#x}")
    return users
