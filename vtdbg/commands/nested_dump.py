"""`ept dump` and `npt dump`: everything that nested tables map, or the part of it that somebody wants to see."""

from __future__ import annotations

from typing import Iterator, List, Optional, Sequence, Tuple

from vtdbg.commands.nested import LIMIT, RANGE, ROOT_OPTION, Root, nested_report, python_tables, title_of
from vtdbg.commands.progress import Watched, range_words
from vtdbg.commands.registry import Opt
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration, Range
from vtdbg.errors import UsageError
from vtdbg.memory_map import whole_pages
from vtdbg.nested.filter import EVERYTHING, Totals, Wanted, counted, matching, parse_wanted
from vtdbg.nested.meant import Told, faults
from vtdbg.numbers import parse_range, size_text
from vtdbg.report import FINDINGS, Block, Group, Lines, Report, Table, Value, hex_or_none, hexa

DUMP_OPTIONS = (
    RANGE,
    Opt("--hpa", "text", "only what goes to these host-physical addresses: A-B or A+SIZE", metavar="RANGE"),
    Opt("--perm", "text", "only pages with these rights: x, rw, !w, r!x, or exactly as printed: r-x", metavar="RIGHTS"),
    Opt("--type", "text", "only this memory type: uc, wc, wt, wp, wb (npt: pat0 to pat7)"),
    Opt("--size", "text", "only pages of this size: 4k, 2m, 1g"),
    Opt("--flag", "text", "only pages with this flag, ! before it for those without (several may be given)", many=True, metavar="NAME"),
    Opt("--ignore-page-size", "flag", "merge neighbours although their pages differ in size"),
    LIMIT,
)

COUNTED = 1 << 20
"""Rows that are counted for the sum after the limit is reached; hostile tables have more than anybody waits for."""


def dump_report(command: str, session: Session, roots: Sequence[Root], *, gpa: Optional[str] = None, hpa: Optional[str] = None,
                perm: Optional[str] = None, type: Optional[str] = None, size: Optional[str] = None, flag: Optional[List[str]] = None,
                ignore_page_size: bool = False, limit: int = 1000) -> Report:
    """All wanted ranges of each root, problems with the path to them, and a line that sums up."""
    first, end = parse_range(gpa) if gpa else (0, 1 << 64)
    if limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 row")
    kind = command.split()[0]
    report = nested_report(command, session, roots)
    report.python.append("from vtdbg.enumeration import ranges")
    known = session.machine.memory.ranges()
    existing = whole_pages([(start, start + length) for start, length in known]) if known is not None else None
    for number, root in enumerate(roots):
        wanted = parse_wanted(root.tables.tables, perm, hpa, type, size, flag or ())
        what = _what(gpa, first, end, wanted)
        group = Group("tables", title_of(root, what), [], {"root": f"{root.tables.root:#x}"})
        report.add(group)
        if root.tables.root_problem:
            group.add(Lines("problem", [Value(root.tables.root_problem, root.tables.root_problem, "bad")]))
            report.status = FINDINGS
            continue
        found, totals = Enumeration(session.machine.memory, root.tables, first, end - 1, apart=wanted.apart), Totals(existing)
        # Watched first: a filter that little passes works long without a row.
        every = Watched(found, session, range_words)
        rows = matching(counted(every, wanted, totals), EVERYTHING, ignore_page_size)
        table, more, counting = range_table(rows, limit, f"{kind} walk {{:#x}} {ROOT_OPTION[kind]} {root.python}", totals)
        group.add(table)
        if more:
            words = f"... {'at least ' * counting}{more} more rows: --limit shows more, --gpa a part"
            group.add(Lines("cut", [Value(limit, words, "warn")]))
        if every.interrupted:
            group.add(interrupted(every.next.start if every.next is not None else None))
            report.status = FINDINGS
        group.add(Lines("summary", [_summary(found, totals, wanted != EVERYTHING, counting)]))
        if totals.outside_first is not None:
            group.add(_outside(totals.outside, totals.outside_first))
        wrong, meant = faults(session.machine.memory, root.tables, found.problems)
        group.blocks += problem_tables(wrong, meant)
        if wrong:
            report.status = FINDINGS
        filters = {"perm": perm, "hpa": hpa, "memory_type": type, "size": size, "flags": flag}
        chosen = "".join(f", {name}={value!r}" for name, value in filters.items() if value)
        report.python += _python(python_tables(kind, root), first, end - 1, chosen, ignore_page_size=ignore_page_size)
        if every.interrupted:
            report.blocks += not_looked_at(roots[number + 1:])
            break
    return report


def _python(made: str, first: int, last: int, chosen: str, *, ignore_page_size: bool) -> List[str]:
    """The loop that prints the same rows."""
    more = ", ignore_page_size=True" if ignore_page_size else ""
    shown = "    print(hex(row.start), hex(row.end), hex(row.target), row.permissions, row.memory_type)"
    if not chosen:
        return [f"for row in ranges(machine.memory, {made}, {first:#x}, {last:#x}{more}):", shown]
    return [f"tables = {made}", "from vtdbg.nested.filter import matching, parse_wanted", f"wanted = parse_wanted(tables.tables{chosen})",
            f"for row in matching(ranges(machine.memory, tables, {first:#x}, {last:#x}, apart=wanted.apart), wanted{more}):", shown]


def interrupted(at: Optional[int]) -> Lines:
    """What has to be said of a table that Ctrl-C cut off before guest-physical `at`."""
    where = f" at {at:#x}" if at is not None else ""
    return Lines("interrupted", [Value(hex_or_none(at), f"interrupted{where}: what is shown and summed up here is partial", "warn")])


def not_looked_at(roots: Sequence[Root]) -> List[Block]:
    """What has to be said of the tables that Ctrl-C kept from being looked at."""
    if not roots:
        return []
    return [Lines("left", [Value([root.title for root in roots], f"not looked at: {', '.join(title_of(root, 'all') for root in roots)}", "warn")])]


def unseen(at: int, why: str, root: Root) -> str:
    """What was not looked at, for what reason, and how to look there."""
    end = (1 << root.tables.tables.address_bits) - 1
    reason = f" ({why})" if why else ""
    return f"not looked at: from {at:#x} on{reason}; `--gpa {at:#x}-{end:#x}` looks there"


def _what(gpa: Optional[str], first: int, end: int, wanted: Wanted) -> str:
    words = f"GPA {first:#x} to {end - 1:#x}" if gpa else "everything mapped"
    return words if wanted == EVERYTHING else f"{words} that matches"


def range_table(rows: Iterator[Range], limit: int, link: str, totals: Totals) -> Tuple[Table, int, bool]:
    """Up to `limit` rows, each linked to the walk of its first address; how many more there are, and whether counting was given up."""
    table = Table(
        "ranges",
        (
            ("first", "guest-physical"),
            ("last", ""),
            ("target", "host-physical"),
            ("size", "size"),
            ("page_size", "pages of"),
            ("permissions", "perm"),
            ("memory_type", "type"),
            ("flags", "flags"),
        ),
        empty="nothing is mapped",
    )
    more = 0
    for row in rows:
        totals.ranges += 1
        if len(table.rows) == limit:
            more += 1
            if more == COUNTED:
                return table, more, True
            continue
        table.add(
            hexa(row.start, 9, link=link.format(row.start)),
            hexa(row.end - 1, 9),
            hexa(row.target, 9, link=f"phys {row.target:#x}"),
            Value(row.length, size_text(row.length)),
            Value(row.page_size, size_text(row.page_size)),
            str(row.permissions),
            row.memory_type,
            Value(list(row.flags), " ".join(row.flags)),
        )
    return table, more, False


def _summary(found: Enumeration, totals: Totals, filtered: bool, counting: bool) -> Value:
    counts = ", ".join(f"{count} page{'s' * (count != 1)} of {size_text(size)}" for size, count in sorted(totals.pages.items()))
    types = ", ".join(f"{name} {size_text(size)}" for name, size in sorted(totals.types.items(), key=lambda item: -item[1]))
    span = f", from {totals.first:#x} to {totals.end - 1:#x}" if totals.first is not None else ""
    which = f"{totals.ranges} range{'s' * (totals.ranges != 1)}{(' that match' + 'es' * (totals.ranges == 1)) * filtered}"
    words = (f"{'at least ' * counting}{size_text(totals.bytes)} mapped in {which}{span} ({counts or 'no pages'}"
             f"{'; ' + types if types else ''}); {found.tables_read} tables read")
    data = {
        "bytes": totals.bytes,
        "ranges": totals.ranges,
        "pages": {str(size): count for size, count in totals.pages.items()},
        "types": dict(totals.types),
        "first": None if totals.first is None else f"{totals.first:#x}",
        "end": f"{totals.end:#x}",
        "tables": found.tables_read,
        "complete": found.complete,
    }
    return Value(data, words, "dim")


def _outside(size: int, first: Range) -> Lines:
    words = f"{size_text(size)} of it go to addresses that are not in this memory, the first at {first.start:#x} to HPA {first.target:#x}"
    return Lines("outside", [Value({"bytes": size, "first": f"{first.start:#x}", "target": f"{first.target:#x}"}, words, "warn")])


def problem_tables(wrong: Sequence[Told], meant: Sequence[Told], limit: int = 1 << 32) -> List[Block]:
    """What a walk stumbles over, with the path to it: mistakes, and entries that are made so on purpose; at most `limit` rows of each."""
    blocks: List[Block] = []
    for key, title, style, items in (("problems", "Problems", "bad", wrong), ("meant", "Entries that fault on purpose", "dim", meant)):
        table = Table(
            key, (("kind", "problem"), ("start", "at"), ("length", "size"), ("text", "what"), ("path", "")), title=title, wrap="text"
        )
        for told in items[:limit]:
            problem = told.problem
            table.add(
                Value(problem.kind, "MMIO" if told.meant else problem.kind, style),
                hexa(problem.start, 9),
                Value(problem.length, size_text(problem.length)),
                told.text,
                Value([f"{address:#x}" for address in problem.path], ""),
            )
        if table.rows:
            blocks.append(table)
        if len(items) > limit:
            blocks.append(Lines(f"more_{key}", [Value(len(items) - limit, f"... and {len(items) - limit} more: `dump` lists them", "dim")]))
    return blocks
