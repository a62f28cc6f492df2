"""`ept find` and `npt find`: who maps this frame, in every table of the memory."""

from __future__ import annotations

from typing import Optional, Sequence

from vtdbg.commands.nested import LIMIT, RANGE, ROOT_OPTION, Root, nested_report, python_tables, title_of
from vtdbg.commands.nested_dump import interrupted, not_looked_at, unseen
from vtdbg.commands.progress import Watch, range_words
from vtdbg.commands.registry import Arg, Opt
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.nested.find import Found, find
from vtdbg.numbers import parse_range, parse_size, size_text
from vtdbg.report import FINDINGS, Group, Lines, Report, Table, Value, hexa

HPA = Arg("hpa", "address", "host-physical address")
FIND_OPTIONS = (Opt("--length", "text", "look for all of these bytes, not one: 4k, 0x100", metavar="SIZE"), RANGE, LIMIT)


def find_report(command: str, session: Session, roots: Sequence[Root], hpa: int, *, length: str = "1", gpa: Optional[str] = None,
                limit: int = 1000) -> Report:
    """Every guest-physical address that reaches the bytes, for each root; status 1 where nothing does."""
    size = parse_size(length or "1")
    if limit < 1 or size < 1 or hpa < 0 or hpa + size > 1 << 64:
        raise UsageError("an address below 2^64, a length of at least 1 byte and a limit of at least 1 row are needed")
    kind = command.split()[0]
    report = nested_report(command, session, roots)
    report.python.append("from vtdbg.nested.find import find")
    words = f"HPA {hpa:#x}" + (f" to {hpa + size - 1:#x}" if size > 1 else "")
    anything = False
    part = f", first={parse_range(gpa)[0]:#x}, last={parse_range(gpa)[1] - 1:#x}" if gpa else ""
    first, end = parse_range(gpa) if gpa else (0, 1 << 64)
    for number, root in enumerate(roots):
        if root.tables.root_problem:
            report.add(Group("tables", title_of(root, words), [Lines("problem", [Value(None, root.tables.root_problem, "bad")])], {}))
            report.status = FINDINGS
            continue
        watch = Watch(session, range_words)
        found = find(session.machine.memory, root.tables, hpa, size, limit, first, end - 1, watch)
        anything = anything or bool(found.places)
        group = _group(found, title_of(root, words), f"{kind} walk {{:#x}} {ROOT_OPTION[kind]} {root.python}", root)
        report.add(group)
        report.python += [
            f"for place in find(machine.memory, {python_tables(kind, root)}, {hpa:#x}, {size:#x}{part}).places:",
            "    print(hex(place.gpa), hex(place.hpa), hex(place.length), place.row.permissions)",
        ]
        if watch.stopped:
            group.add(interrupted(watch.next.start if watch.next is not None else None))
            report.status = FINDINGS
            report.blocks += not_looked_at(roots[number + 1:])
            break
    if not anything:
        report.status = FINDINGS
    return report


def _group(found: Found, title: str, link: str, root: Root) -> Group:
    table = Table(
        "places",
        (("gpa", "guest-physical"), ("hpa", "host-physical"), ("length", "size"), ("page_size", "page of"), ("permissions", "perm"),
         ("memory_type", "type"), ("flags", "flags")),
        empty="no guest-physical address goes there" if found.complete else "none found in the part of the tables that could be read",
    )
    for place in found.places:
        row = place.row
        table.add(hexa(place.gpa, 9, link=link.format(place.gpa)), hexa(place.hpa, 9, link=f"phys {place.hpa:#x}"),
                  Value(place.length, size_text(place.length)), Value(row.page_size, size_text(row.page_size)), str(row.permissions),
                  row.memory_type, Value(list(row.flags), " ".join(row.flags)))
    group = Group("tables", title, [table], {"root": f"{root.tables.root:#x}", "complete": found.complete})
    if found.tables:
        lines = [Value(f"{at:#x}", f"the table of level {level} at {at:#x} lies there: these very tables are stored in the frame", "warn")
                 for at, level in found.tables]
        group.add(Lines("inside", lines))
    if found.reached is not None:
        group.add(Lines("problem", [Value(found.problem, unseen(found.reached, found.problem, root), "warn")]))
    elif found.problem:
        group.add(Lines("problem", [Value(found.problem, f"not all of it was seen: {found.problem}", "warn")]))
    return group
