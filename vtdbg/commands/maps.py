"""`ept map` and `npt map`: the guest-physical address space as rows of letters."""

from __future__ import annotations

from functools import partial
from typing import List, Optional, Sequence

from vtdbg.address_map import ANY_FRAME, EXACT, LETTERS, SPECIAL, WORK_LIMIT, AddressMap, Gap, address_map, chart, marked
from vtdbg.commands.ept import EPTP, VMCS
from vtdbg.commands.nested import RANGE, Root, ept_roots, nested_report, npt_roots, python_tables, title_of
from vtdbg.commands.nested_dump import interrupted, not_looked_at, problem_tables
from vtdbg.commands.npt import NCR3, VMCB
from vtdbg.commands.progress import Watched, range_words
from vtdbg.commands.registry import Opt, verb
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration
from vtdbg.errors import UsageError
from vtdbg.nested.meant import told_apart
from vtdbg.numbers import parse_range, size_text
from vtdbg.report import FINDINGS, Block, Cell, Group, Lines, Report, Table, Value, hexa

BY = Opt("--by", "choice", "what the letters stand for", choices=tuple(LETTERS), default="perm")
ROWS = Opt("--rows", "int", "at most this many rows of 64 letters", default=24)
MOST_ROWS = 4096
SHOWN_MARKS = 16
TITLES = {"perm": "permissions", "type": "memory type", "size": "pages of"}


@verb("ept map", "what the EPT maps, as a picture in letters", EPTP, VMCS, RANGE, BY, ROWS)
def ept_map(session: Session, eptp: Optional[int], vmcs: Optional[int], gpa: Optional[str], by: str, rows: int) -> Report:
    """Rows of 64 letters, zoomed to what is mapped; rows in which nothing is mapped are left out.  A capital letter stands for a cell that is
    mapped whole, a small one for a cell that is mapped in part."""
    return map_report("ept map", session, ept_roots(session, eptp, vmcs), gpa, by, rows)


@verb("npt map", "what the nested tables map, as a picture in letters", NCR3, VMCB, RANGE, BY, ROWS)
def npt_map(session: Session, ncr3: Optional[int], vmcb: Optional[int], gpa: Optional[str], by: str, rows: int) -> Report:
    """Rows of 64 letters, zoomed to what is mapped; rows in which nothing is mapped are left out.  A capital letter stands for a cell that is
    mapped whole, a small one for a cell that is mapped in part."""
    return map_report("npt map", session, npt_roots(session, ncr3, vmcb), gpa, by, rows)


def map_report(command: str, session: Session, roots: Sequence[Root], gpa: Optional[str], by: str, rows: int) -> Report:
    """One picture for each root."""
    if not 1 <= rows <= MOST_ROWS:
        raise UsageError(f"--rows {rows}: from 1 to {MOST_ROWS}")
    first, end = parse_range(gpa) if gpa else (0, 1 << 64)
    kind = command.split()[0]
    report = nested_report(command, session, roots)
    report.python.append("from vtdbg.address_map import chart, picture")
    for number, root in enumerate(roots):
        found = Enumeration(session.machine.memory, root.tables, first, end - 1, limit=WORK_LIMIT)
        every = Watched(found, session, range_words)
        picture = address_map(found, rows=every, tell=partial(told_apart, session.machine.memory, root.tables))
        words = "address space" if not gpa else f"GPA {first:#x} to {end - 1:#x}"
        cut = [interrupted(every.next.start if every.next is not None else None)] if every.interrupted else []
        report.add(Group("maps", title_of(root, words), [*map_blocks(picture, by, rows), *cut], {"root": f"{root.tables.root:#x}"}))
        if cut or any(not told.meant for told in picture.told):
            report.status = FINDINGS
        made = f"picture(machine.memory, {python_tables(kind, root)}, {first:#x}, {end - 1:#x})"
        report.python.append(f"print(chart({made}.pieces, {by!r}, rows={rows}))")
        if cut:
            report.blocks += not_looked_at(roots[number + 1:])
            break
    return report


def map_blocks(picture: AddressMap, by: str = "perm", rows: int = 24) -> List[Block]:
    """The rows, their scale, the legend, what was taken together, and the places that deserve a look."""
    drawn = chart(picture.pieces, by, rows=rows)
    if not drawn.lines:
        return [Lines("rows", [Value([], "nothing is mapped")])]
    span = len(next(line.cells for line in drawn.lines if not isinstance(line, Gap))) * drawn.cell
    scale = Value({"cell": drawn.cell, "row": span}, f"a letter is {size_text(drawn.cell)}, a row {size_text(span)}", "dim")
    table = Table("rows", (("start", "guest-physical"), ("cells", "cells")), headings=False)
    for line in drawn.lines:
        if isinstance(line, Gap):
            table.add(Value(f"{line.start:#x}", "..."), Value("", f"nothing mapped for {about(line.end - line.start)}", "dim"))
        else:
            table.add(hexa(line.start, 12), Value(line.cells, line.cells, spans=drawn.spans(line.cells)))
    legend = Table("legend", (("letter", "letter"), ("meaning", "meaning")), headings=False)
    for value, letter in drawn.letters.items():
        legend.add(Value(letter, letter, spans=drawn.spans(letter)), f"{TITLES[by]} {value}")
    for mark in drawn.special:
        legend.add(Value(mark, mark, spans=drawn.spans(mark)), SPECIAL[mark])
    if any(letter.islower() for line in drawn.lines if not isinstance(line, Gap) for letter in line.cells):
        legend.add("a-z", "small letter: mapped in part")
    return [Lines("scale", [scale]), table, legend, *aggregation(picture), *marks(picture), *problems(picture)]


def about(size: int) -> str:
    """A size in a unit in which it is short: gaps are not worth seven digits."""
    exact = size_text(size)
    if len(exact.split()[0]) <= 4:
        return exact
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"about {size / unit:.1f} {name}"
    return exact


def aggregation(picture: AddressMap) -> List[Block]:
    """How ranges were taken together, if they were."""
    if picture.grain == EXACT:
        return []
    how = "neighbours that differ in their frames only" if picture.grain == ANY_FRAME else f"everything within blocks of {size_text(picture.grain)}"
    words = f"{picture.ranges} ranges are too many for a picture: {how} is drawn as one; --gpa A-B shows a part in full"
    if picture.grain == ANY_FRAME:
        words = words.replace(" is drawn as one", " are drawn as one")
    return [Lines("aggregated", [Value({"ranges": picture.ranges, "grain": picture.grain}, words, "warn")])]


def marks(picture: AddressMap) -> List[Block]:
    """Execute-only pages and pages without execute, where those are few."""
    table = Table("marks", (("start", "guest-physical"), ("target", "host-physical"), ("size", "size"), ("permissions", "perm"), ("what", "what")),
                  title="Execute-only, and read-write without execute")
    more = 0
    for piece in picture.pieces:
        for meaning in piece.meanings:
            what = marked(meaning)
            if not what:
                continue
            if len(table.rows) == SHOWN_MARKS:
                more += 1
                continue
            target: Cell = hexa(piece.target, 9) if piece.target is not None else "several"
            table.add(hexa(piece.start, 9), target, Value(piece.end - piece.start, size_text(piece.end - piece.start)), meaning.permissions, what)
    if not table.rows:
        return []
    return [table, *([Lines("more_marks", [Value(more, f"... and {more} more", "dim")])] if more else [])]


def problems(picture: AddressMap) -> List[Block]:
    """The first problems by place, and what is meant so; `dump` has all of them with the path."""
    wrong, meant = [told for told in picture.told if not told.meant], [told for told in picture.told if told.meant]
    more = picture.found.problem_count - len(picture.found.problems)
    blocks = problem_tables(wrong, meant, SHOWN_MARKS)
    return [*blocks, *([Lines("uncounted", [Value(more, f"... and {more} more that were not kept", "dim")])] if more > 0 else [])]
