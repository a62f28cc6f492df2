"""`ept hooks` and `npt hooks`: pages that stand out in one table, or that several tables map differently, with what their bytes say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from vtdbg.commands.nested import RANGE, ROOT_OPTION, Root, nested_report, python_tables
from vtdbg.commands.nested_diff import named
from vtdbg.commands.registry import Opt
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.nested.hooks import SIGNS, Hook, Patch, View, hooks, instructions, kinship, patches, read_pair, view, view_hooks
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
    """What stands out in the tables of `root`, by themselves or against those of `first`."""

    root: Root
    title: str
    found: Sequence[Hook]
    first: Optional[Root] = None
    seen: Optional[View] = None
    """The tables as they were looked at; None where their pointer is not valid."""


def all_hooks(memory: PhysicalMemory, roots: Sequence[Root], first: int = 0, last: int = (1 << 64) - 1) -> Tuple[List[Hooks], List[str]]:
    """Each table by itself, then each further table of a guest against the first one of that guest; and which tables are of separate guests.

    Tables that share most of their frames are views of one guest.
    """
    found: List[Hooks] = []
    for root in roots:
        title = f"stands out in {named(root)}"
        if root.tables.root_problem:
            found.append(Hooks(root, title, ()))
            continue
        seen = view(memory, root.tables, first, last)
        found.append(Hooks(root, title, hooks(seen.rows), seen=seen))
    guests: List[Tuple[Root, View]] = []
    strangers: List[str] = []
    for number, item in enumerate([item for item in found if item.seen is not None]):
        assert item.seen is not None
        for first_root, base in guests:
            common, same = kinship(base.rows, item.seen.rows)
            if common and 2 * same > common:
                title = f"{named(item.root)} against {named(first_root)}: {size_text(same)} of {size_text(common)} go to the same frames"
                found.append(Hooks(item.root, title, list(view_hooks(base.rows, item.seen.rows, number)), first_root))
                break
            strangers.append(f"{item.root.title} and {first_root.title}")
        else:
            guests.append((item.root, item.seen))
    return found, strangers


def hooks_report(command: str, session: Session, roots: Sequence[Root], *, notes: Sequence[str] = (), gpa: Optional[str] = None, mode: str = "64",
                 limit: int = 200, no_code: bool = False) -> Report:
    """What stands out in each table, then what each further table of the same guest says differently from the first one of that guest."""
    if limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 row")
    start, end = parse_range(gpa) if gpa else (0, 1 << 64)
    kind = command.split()[0]
    report = nested_report(command, session, roots)
    report.notes += notes
    report.python += ["from vtdbg.nested.hooks import hooks, view"]
    part = f", {start:#x}, {end - 1:#x}" if gpa else ""
    groups, strangers = all_hooks(session.machine.memory, roots, start, end - 1)
    for item in groups:
        report.add(hooks_group(item, session, kind, mode=int(mode), limit=limit, no_code=no_code))
        if item.found or item.first is None and (item.seen is None or not item.seen.complete):
            report.status = FINDINGS
        if item.seen is not None:
            report.python.append(f"print(hooks(view(machine.memory, {python_tables(kind, item.root)}{part}).rows))")
    if strangers:
        words = f"not compared, because they share less than half of their frames (separate guests): {'; '.join(strangers)}"
        report.add(Lines("strangers", [Value(strangers, words, "dim")]))
    return report


def hooks_group(item: Hooks, session: Session, kind: str, *, mode: int, limit: int, no_code: bool) -> Group:
    """One table's hooks with what their bytes say, and what was not looked at."""
    root, seen = item.root, item.seen
    if item.first is not None:
        group = Group("views", item.title, [], {"first": f"{item.first.tables.root:#x}", "second": f"{root.tables.root:#x}"})
        group.blocks += _blocks(item.found, session, kind, root, mode, limit, no_code)
        return group
    group = Group("tables", item.title, [], {"root": f"{root.tables.root:#x}"})
    if seen is None:
        group.add(Lines("problem", [Value(root.tables.root_problem, root.tables.root_problem, "bad")]))
        return group
    group.blocks += _blocks(item.found, session, kind, root, mode, limit, no_code)
    if not seen.complete:
        group.add(Lines("problem", [Value(None, f"not all of it was seen: the first {len(seen.rows)} ranges; --gpa A-B looks at a part", "warn")]))
    if seen.problems:
        words = f"{seen.problems} problem{'s' * (seen.problems != 1)} in these tables, which `{kind} dump` lists: no hook is looked for there"
        group.add(Lines("broken", [Value(seen.problems, words, "dim")]))
    return group


def _blocks(found: Sequence[Hook], session: Session, kind: str, root: Root, mode: int, limit: int, no_code: bool) -> List[Block]:
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
    if len(found) > limit:
        blocks.append(Lines("cut", [Value(len(found) - limit, f"... {len(found) - limit} more rows: --limit shows more", "warn")]))
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
