"""`ept hooks` and `npt hooks`: pages that stand out in one table, or that several tables map differently, with what their bytes say."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from vtdbg.commands.nested import RANGE, ROOT_OPTION, Root, nested_report, python_tables
from vtdbg.commands.nested_diff import named
from vtdbg.commands.nested_dump import interrupted, not_looked_at, unseen
from vtdbg.commands.progress import Watch, range_words
from vtdbg.commands.registry import Opt
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration, Range
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.nested.diff import Segment
from vtdbg.nested.hooks import HOOKS, SIGNS, Hook, Kinship, Patch, View, instructions, patches, read_pair, view, view_hooks
from vtdbg.numbers import parse_range, size_text
from vtdbg.report import FINDINGS, Block, Group, Lines, Report, Table, Value, hexa

HOOK_OPTIONS = (
    RANGE,
    Opt("--mode", "choice", "how the code is decoded (default: 64 bits)", choices=("16", "32", "64"), default="64"),
    Opt("--limit", "int", "stop after this many rows a table", default=200),
    Opt("--no-code", "flag", "no bytes, no disassembly"),
)
_PATCHES = 4
"""Differing places of a page that are shown."""


@dataclass(frozen=True)
class Hooks:
    """What stands out in the tables of `root`, by themselves or against those of `first`; `more` how many there are besides `found`."""

    root: Root
    title: str
    found: Sequence[Hook]
    first: Optional[Root] = None
    seen: Optional[View] = None
    """The tables as they were looked at; None where their pointer is not valid."""
    more: int = 0
    stopped: bool = False
    """Ctrl-C ended it."""

    @property
    def all_kept(self) -> bool:
        return self.seen is not None and self.seen.ranges == len(self.seen.rows)


@dataclass
class AllHooks:
    """What stands out, table by table; which tables are of separate guests; which were not looked at, because Ctrl-C came before."""

    found: List[Hooks]
    strangers: List[str]
    left: List[Root]


def all_hooks(memory: PhysicalMemory, roots: Sequence[Root], first: int = 0, last: int = (1 << 64) - 1, session: Optional[Session] = None) \
        -> AllHooks:
    """Each table by itself, then each further table of a guest against the first one of that guest.

    Tables that share most of their frames are views of one guest.  With a `session` its front end shows how far it is, and Ctrl-C ends it.
    """
    result = AllHooks([], [], [])
    for number, root in enumerate(roots):
        title = f"stands out in {named(root)}"
        if root.tables.root_problem:
            result.found.append(Hooks(root, title, ()))
            continue
        watch = Watch(session, range_words)
        seen = view(memory, root.tables, first, last, watch)
        result.found.append(Hooks(root, title, seen.hooks, seen=seen, more=seen.more, stopped=watch.stopped))
        if watch.stopped:
            result.left = list(roots[number + 1:])
            return result
    _compare(memory, result, first, last, session)
    return result


def _compare(memory: PhysicalMemory, result: AllHooks, first: int, last: int, session: Optional[Session]) -> None:
    """Adds what further tables of the same guest say."""
    guests: List[Hooks] = []
    for number, item in enumerate([item for item in result.found if item.seen is not None]):
        for base in guests:
            # The ranges that are kept say whether it is one guest; only then all of them are compared, where there are more.
            views = _views(memory, base, item, number, None, session)
            if views.kin.close and not views.stopped and not (base.all_kept and item.all_kept):
                views = _views(memory, base, item, number, (first, last), session)
            if views.kin.close or views.stopped:
                same = f"{size_text(views.kin.same)} of {size_text(views.kin.common)} go to the same frames"
                title = f"{named(item.root)} against {named(base.root)}: {same}"
                result.found.append(Hooks(item.root, title, views.found, base.root, more=views.more, stopped=views.stopped))
                if views.stopped:
                    return
                break
            result.strangers.append(f"{item.root.title} and {base.root.title}")
        else:
            guests.append(item)


class _Views(NamedTuple):
    """What one table maps otherwise than another: the first HOOKS places, and how many more there are."""

    found: List[Hook]
    more: int
    kin: Kinship
    stopped: bool


def _views(memory: PhysicalMemory, base: Hooks, item: Hooks, number: int, part: Optional[Tuple[int, int]], session: Optional[Session]) -> _Views:
    """The pages that the tables of `item` map otherwise: out of the ranges that were kept, or of all ranges of a part."""
    assert base.seen is not None and item.seen is not None
    one: Iterable[Range] = base.seen.rows if part is None else Enumeration(memory, base.root.tables, *part)
    two: Iterable[Range] = item.seen.rows if part is None else Enumeration(memory, item.root.tables, *part)
    watch: Watch[Segment] = Watch(session, lambda count, pair: f"{count} ranges compared, at {pair[0]:#x}")
    kin = Kinship()
    every = view_hooks(one, two, number, lambda pairs: watch(kin.counted(pairs)))
    found = list(islice(every, HOOKS))
    return _Views(found, sum(1 for _ in every), kin, watch.stopped)


def hooks_report(command: str, session: Session, roots: Sequence[Root], *, notes: Sequence[str] = (), gpa: Optional[str] = None, mode: str = "64",
                 limit: int = 200, no_code: bool = False) -> Report:
    """What stands out in each table, then what each further table of the same guest says differently from the first one of that guest."""
    if limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 row")
    start, end = parse_range(gpa) if gpa else (0, 1 << 64)
    kind = command.split()[0]
    report = nested_report(command, session, roots)
    report.notes += notes
    report.python += ["from vtdbg.nested.hooks import view"]
    part = f", {start:#x}, {end - 1:#x}" if gpa else ""
    everything = all_hooks(session.machine.memory, roots, start, end - 1, session)
    for item in everything.found:
        report.add(hooks_group(item, session, kind, mode=int(mode), limit=limit, no_code=no_code))
        if item.found or item.stopped or item.first is None and (item.seen is None or not item.seen.complete):
            report.status = FINDINGS
        if item.seen is not None:
            report.python.append(f"print(view(machine.memory, {python_tables(kind, item.root)}{part}).hooks)")
    if everything.strangers:
        words = f"not compared, because they share less than half of their frames (separate guests): {'; '.join(everything.strangers)}"
        report.add(Lines("strangers", [Value(everything.strangers, words, "dim")]))
    report.blocks += not_looked_at(everything.left)
    return report


def hooks_group(item: Hooks, session: Session, kind: str, *, mode: int, limit: int, no_code: bool) -> Group:
    """One table's hooks with what their bytes say, and what was not looked at."""
    root, seen = item.root, item.seen
    if item.first is not None:
        group = Group("views", item.title, [], {"first": f"{item.first.tables.root:#x}", "second": f"{root.tables.root:#x}"})
        group.blocks += _blocks(item, session, kind, root, mode, limit, no_code)
        if item.stopped:
            group.add(interrupted(None))
        return group
    group = Group("tables", item.title, [], {"root": f"{root.tables.root:#x}"})
    if seen is None:
        group.add(Lines("problem", [Value(root.tables.root_problem, root.tables.root_problem, "bad")]))
        return group
    group.blocks += _blocks(item, session, kind, root, mode, limit, no_code)
    if item.stopped:
        group.add(interrupted(seen.reached))
    elif not seen.complete:
        group.add(Lines("problem", [Value(f"{seen.reached:#x}", unseen(seen.reached, seen.why, root), "warn")]))
    if seen.problems:
        words = f"{seen.problems} problem{'s' * (seen.problems != 1)} in these tables, which `{kind} dump` lists: no hook is looked for there"
        group.add(Lines("broken", [Value(seen.problems, words, "dim")]))
    if seen.meant:
        words = f"{seen.meant} page{'s' * (seen.meant != 1)} that KVM makes fault on purpose (MMIO), which `{kind} dump` lists: no hook"
        group.add(Lines("mmio", [Value(seen.meant, words, "dim")]))
    return group


def _blocks(item: Hooks, session: Session, kind: str, root: Root, mode: int, limit: int, no_code: bool) -> List[Block]:
    found, count = item.found, len(item.found) + item.more
    table = Table(
        "hooks",
        (("start", "guest-physical"), ("length", "size"), ("target", "goes to"), ("permissions", "perm"), ("expected", "expected"),
         ("usual", "usual"), ("signs", "why")),
        empty="nothing stands out",
    )
    for hook in found[:limit]:
        table.add(
            hexa(hook.start, 9, link=f"{kind} walk {hook.start:#x} {ROOT_OPTION[kind]} {root.python}"),
            Value(hook.length, size_text(hook.length)),
            hexa(hook.target, 9, link=f"phys {hook.target:#x}"),
            hook.permissions,
            hexa(hook.expected, 9) if hook.expected is not None else Value(None, "-", "dim"),
            Value(hook.usual or None, hook.usual or "-", "" if hook.usual else "dim"),
            Value(list(hook.signs), ", ".join(hook.signs), "warn"),
        )
    if not found:
        return [table]
    signs = [sign for sign in SIGNS if any(sign in hook.signs for hook in found)]
    blocks: List[Block] = [table, Lines("signs", [Value(sign, f"{sign}: {SIGNS[sign]}", "dim") for sign in signs])]
    if count > limit:
        words = f"... {count - limit} more rows: " + ("--limit shows more" if limit < len(found) else "--gpa A-B shows a part")
        blocks.append(Lines("cut", [Value(count - limit, words, "warn")]))
    for hook in found[:limit]:
        if hook.moved and not no_code:
            blocks += _bytes(session, hook, mode)
    return blocks


def _bytes(session: Session, hook: Hook, mode: int) -> List[Block]:
    """What the first page of a moved hook holds, against the frame where it should go."""
    pair = read_pair(session.machine.memory, hook)
    where = f"GPA {hook.start:#x}: frame {hook.target:#x} instead of {hook.expected or 0:#x}"
    if pair is None:
        return [Lines("code", [Value(None, f"{where}: the bytes of one of them are not in the memory", "warn")])]
    found = patches(*pair)
    if not found:
        return [Lines("code", [Value(where, f"{where}: the same bytes", "dim")])]
    count = sum(sum(one != two for one, two in zip(patch.usual, patch.found)) for patch in found)
    title = f"{where}: {count} byte{'s' * (count != 1)} differ in {len(found)} place{'s' * (len(found) != 1)}"
    table = Table("code", (("address", "guest-physical"), ("usual", "expected frame"), ("found", "frame in use")), title=title)
    for patch in found[:_PATCHES]:
        for address, one, two in _lines(pair, hook.start, patch, mode):
            table.add(hexa(address, 9), one, two)
    blocks: List[Block] = [table]
    if len(found) > _PATCHES:
        blocks.append(Lines("cut", [Value(len(found), f"... {len(found) - _PATCHES} more places", "dim")]))
    return blocks


def _lines(pair: Tuple[bytes, bytes], base: int, patch: Patch, mode: int) -> List[Tuple[int, str, str]]:
    """(address, what is expected there, what is there), instruction by instruction; bytes alone where they are no code or capstone is missing."""
    try:
        sides = [instructions(page, base, patch.offset, len(patch.usual), mode) for page in pair]
    except UsageError:
        sides = [[], []]
    if not all(sides):
        return [(base + patch.offset, patch.usual[:16].hex(" "), patch.found[:16].hex(" "))]
    texts: Dict[int, List[str]] = {}
    for number, side in enumerate(sides):
        for one in side:
            texts.setdefault(one.address, ["", ""])[number] = one.text
    return [(address, *_pair(texts[address])) for address in sorted(texts)]


def _pair(words: Iterable[str]) -> Tuple[str, str]:
    one, two = words
    return one, two
