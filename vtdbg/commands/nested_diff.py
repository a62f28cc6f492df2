"""`ept diff` and `npt diff`: two roots of one dump, or a root in two dumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from vtdbg.commands.nested import LIMIT, RANGE, Root, nested_report, python_tables
from vtdbg.commands.nested_dump import interrupted
from vtdbg.commands.progress import Watched
from vtdbg.commands.registry import Opt
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration
from vtdbg.errors import UsageError
from vtdbg.nested.diff import ASPECTS, WORK, Broken, Change, Segment, Side, broken, diff_ranges, given_up
from vtdbg.nested.meant import Told, told_apart
from vtdbg.numbers import parse_range, size_text
from vtdbg.report import FINDINGS, Block, Group, Lines, Report, Table, Value, hexa

OTHER = Opt("--other", "path", "the second dump (default: the same one)", metavar="SOURCE")
DIFF_OPTIONS = (
    OTHER,
    RANGE,
    Opt("--flags", "flag", "accessed and dirty flags too"),
    Opt("--ignore-page-size", "flag", "the same mapping by pages of another size is no difference"),
    LIMIT,
)

Roots = Callable[[Session, Optional[int], Optional[int]], List[Root]]


@dataclass(frozen=True)
class Sides:
    """The two tables to compare, and whose memory the second one is in."""

    before: Root
    after: Root
    other: Session


def other_session(session: Session, source: str) -> Session:
    """The second dump, read with the layout and the capabilities of the first."""
    return Session(source=source, layout_name=session.layout_name, caps_name=session.caps_name, host_paging=session.host_paging,
                   program=session.program)


def chosen_sides(session: Session, roots: Roots, pointer: Optional[int], block: Optional[int], other: Optional[str],
                 other_pointer: Optional[int], other_block: Optional[int]) -> Sides:
    """Which two tables are meant.  What is not said of the second is taken from the first; a scan counts where it leaves one possibility."""
    second = session if other is None else other_session(session, other)
    if other is None and other_pointer is None and other_block is None:
        both = roots(session, pointer, block)
        if len(both) != 2:
            raise UsageError(f"two tables are needed, {_found(both)}: name the second one, or another dump with --other")
        return Sides(both[0], both[1], session)
    before = roots(session, pointer, block)
    after = roots(second, other_pointer if other_pointer is not None or other_block is not None else pointer,
                  other_block if other_block is not None or other_pointer is not None else block)
    if len(before) == 1 and len(after) == 1:
        return Sides(before[0], after[0], second)
    raise UsageError(f"which tables? first: {_found(before)}; second: {_found(after)}")


def named(root: Root) -> str:
    """ "EPTP 0x685105e (VMCS at 0x6826000)"."""
    return root.title + (f" ({', '.join(root.users)})" if root.users else "")


def _found(roots: Sequence[Root]) -> str:
    return f"{len(roots)} found ({', '.join(root.title for root in roots)})"


def diff_report(command: str, session: Session, sides: Sides, *, gpa: Optional[str] = None, flags: bool = False, ignore_page_size: bool = False,
                limit: int = 1000) -> Report:
    """What the second tables map otherwise; status 1 where there is a difference."""
    first, end = parse_range(gpa) if gpa else (0, 1 << 64)
    if limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 row")
    kind = command.split()[0]
    report = nested_report(command, session, [sides.before, sides.after])
    if sides.other is not session:
        report.notes.append(f"second: {sides.other.header()}")
    named_sides = (("first", sides.before), ("second", sides.after))
    problems = [f"{name}: {root.tables.root_problem}" for name, root in named_sides if root.tables.root_problem]
    if problems:
        raise UsageError("; ".join(problems))
    apart = frozenset(("A", "D") if flags else ())
    before = Enumeration(session.machine.memory, sides.before.tables, first, end - 1, apart=apart, limit=WORK)
    after = Enumeration(sides.other.machine.memory, sides.after.tables, first, end - 1, apart=apart, limit=WORK)
    aspects = frozenset(aspect for aspect in ASPECTS if not (ignore_page_size and aspect == "page size"))
    watched: List[Watched[Segment]] = []

    def watch(items: Iterator[Segment]) -> Iterator[Segment]:
        # The segments, not the changes: what is alike makes none, and takes its time.
        watched.append(Watched(items, session, lambda count, item: f"{count} ranges compared, at {item[0]:#x}"))
        return iter(watched[0])

    table, totals, more = _table(diff_ranges(before, after, aspects, watch), limit)
    words = f"first: {named(sides.before)}; second: {named(sides.after)}"
    group = Group("tables", words, [table], {"before": f"{sides.before.tables.root:#x}", "after": f"{sides.after.tables.root:#x}"})
    report.add(group)
    if more:
        group.add(Lines("cut", [Value(more, f"... {more} more rows: --limit shows more, --gpa a part", "warn")]))
    stopped = [item.next[0] if item.next is not None else None for item in watched if item.interrupted]
    for at in stopped:
        group.add(interrupted(at))
    reached = min(given_up(before), given_up(after))
    if reached < 1 << 64:
        for name, found in (("first", before), ("second", after)):
            group.add(Lines("problem", [Value(name, f"{name}: not all of it was seen: {problem.text}", "warn")
                                        for problem in found.problems[-1:] if problem.kind == "limit"]))
        group.add(Lines("end", [Value(f"{reached:#x}", f"compared up to {reached - 1:#x}" if reached else "nothing was compared", "warn")]))
    wrong = broken(before, after, *(at for at in stopped if at is not None))
    first_side = session.machine.memory, sides.before.tables
    second_side = sides.other.machine.memory, sides.after.tables
    told = [(item.side, one) for item in wrong for one in told_apart(*(second_side if item.side == "second" else first_side), [item.problem])]
    group.blocks += _broken_blocks(told, limit)
    whole = reached == 1 << 64 and not stopped
    group.add(Lines("summary", [_summary(totals, wrong, whole)]))
    if totals or not whole or any(item.side != "both" for item in wrong):
        report.status = FINDINGS
    second = "machine" if sides.other is session else "other"
    report.python += [
        *([] if sides.other is session else [f"other = vtdbg.open({sides.other.source!r})"]),
        "from vtdbg.nested.diff import diff",
        f"for change in diff(machine.memory, {python_tables(kind, sides.before)}, {second}.memory, {python_tables(kind, sides.after)}):",
        "    print(change.kind, hex(change.start), hex(change.length), change.aspects, change.before, change.after)",
    ]
    return report


def _table(changes: Iterable[Change], limit: int) -> Tuple[Table, Dict[str, int], int]:
    """Up to `limit` rows; bytes by what changed; how many more rows there are."""
    table = Table(
        "changes",
        (("kind", "what"), ("start", "guest-physical"), ("last", ""), ("length", "size"), ("before", "first"), ("after", "second"), ("aspects", "")),
        empty="no difference",
        wrap="after",
    )
    totals: Dict[str, int] = {}
    more = 0
    for change in changes:
        what = _what(change)
        totals[what] = totals.get(what, 0) + change.length
        if len(table.rows) == limit:
            more += 1
            continue
        table.add(
            Value(change.kind, what, "warn"),
            hexa(change.start, 9),
            hexa(change.end - 1, 9),
            Value(change.length, size_text(change.length)),
            _side(change.before, change.after, change.aspects),
            _side(change.after, change.before, change.aspects),
            Value(list(change.aspects), ""),
        )
    return table, totals, more


def _what(change: Change) -> str:
    """In a few words: what changed, or who maps it alone; "?" where the other side's tables are not there to say."""
    if change.kind == "changed":
        return ", ".join(change.aspects)
    return f"{change.kind}?" if "unreadable" in change.aspects else change.kind


def _side(side: Optional[Side], other: Optional[Side], aspects: Sequence[str]) -> Value:
    """What one side says; of what both agree in, only the frame and the rights."""
    if side is None:
        return Value(aspects[0], aspects[0], "bad") if aspects else Value(None, "-", "dim")
    words = [f"{side.target:#x}", str(side.permissions)]
    if other is None or side.memory_type != other.memory_type:
        words.append(side.memory_type)
    if other is None or side.flags != other.flags:
        words.append(" ".join(side.flags) or "no flags")
    if other is None or side.page_size != other.page_size:
        words.append(size_text(side.page_size))
    data = {"target": f"{side.target:#x}", "permissions": str(side.permissions), "memory_type": side.memory_type, "flags": list(side.flags),
            "page_size": side.page_size}
    return Value(data, " ".join(words))


def _broken_blocks(told: Sequence[Tuple[str, Told]], limit: int) -> List[Block]:
    """Entries that lead nowhere, by side; those that both sides have are counted."""
    table = Table("broken", (("side", "side"), ("start", "guest-physical"), ("length", "size"), ("kind", "problem"), ("text", "what"), ("path", "")),
                  title="Entries that lead nowhere", wrap="text")
    different = [(side, one) for side, one in told if side != "both"]
    for side, one in different[:limit]:
        problem = one.problem
        table.add(Value(side, side, "warn"), hexa(problem.start, 9), Value(problem.length, size_text(problem.length)),
                  Value(problem.kind, "MMIO" if one.meant else problem.kind, "dim" if one.meant else "bad"), one.text,
                  Value([f"{address:#x}" for address in problem.path], ""))
    blocks: List[Block] = [table] if table.rows else []
    if len(different) > limit:
        blocks.append(Lines("broken_cut", [Value(len(different) - limit, f"... {len(different) - limit} more of them: --limit shows more", "warn")]))
    alike = sum(1 for side, one in told if side == "both" and not one.meant)
    if alike:
        words = f"{alike} {'entries or tables are' if alike > 1 else 'entry or table is'} broken in both alike (`dump` lists them)"
        blocks.append(Lines("broken_alike", [Value(alike, words, "dim")]))
    pages = sum(one.problem.entries for side, one in told if side == "both" and one.meant)
    if pages:
        words = f"{pages} page{'s' * (pages != 1)} that KVM makes fault on purpose (MMIO) in both alike"
        blocks.append(Lines("mmio_alike", [Value(pages, words, "dim")]))
    return blocks


def _summary(totals: Dict[str, int], wrong: Sequence[Broken], whole: bool) -> Value:
    words = "; ".join(f"{size_text(size)} {what}" for what, size in totals.items())
    nothing = "both map the same" if whole and all(item.side == "both" for item in wrong) else "what was seen is mapped alike"
    return Value(totals, words or nothing, "dim")
