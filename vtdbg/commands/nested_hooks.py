"""`ept hooks` and `npt hooks`: pages that stand out in one table, or that several tables map differently, with what their bytes say."""

from __future__ import annotations

from typing import Dict, Iterable, List, Sequence, Tuple

from vtdbg.commands.nested import ROOT_OPTION, Root, nested_report, python_tables
from vtdbg.commands.nested_diff import named
from vtdbg.commands.registry import Opt
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.nested.hooks import SIGNS, Hook, Patch, View, hooks, instructions, kinship, patches, read_pair, view, view_hooks
from vtdbg.numbers import size_text
from vtdbg.report import FINDINGS, Block, Group, Lines, Report, Table, Value, hexa

HOOK_OPTIONS = (
    Opt("--mode", "choice", "how the code is decoded (default: 64 bits)", choices=("16", "32", "64"), default="64"),
    Opt("--limit", "int", "stop after this many rows a table", default=200),
    Opt("--no-code", "flag", "no bytes, no disassembly"),
)
_PATCHES = 4
"""Differing places of a page that are shown."""


def hooks_report(command: str, session: Session, roots: Sequence[Root], *, notes: Sequence[str] = (), mode: str = "64", limit: int = 200,
                 no_code: bool = False) -> Report:
    """What stands out in each table, then what each further table of the same guest says differently from the first one of that guest."""
    if limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 row")
    kind = command.split()[0]
    report = nested_report(command, session, roots)
    report.notes += notes
    report.python += ["from vtdbg.nested.hooks import hooks, view"]
    views: List[Tuple[Root, View]] = []
    for root in roots:
        group = Group("tables", f"stands out in {named(root)}", [], {"root": f"{root.tables.root:#x}"})
        report.add(group)
        if root.tables.root_problem:
            group.add(Lines("problem", [Value(root.tables.root_problem, root.tables.root_problem, "bad")]))
            report.status = FINDINGS
            continue
        seen = view(session.machine.memory, root.tables)
        views.append((root, seen))
        _add(report, group, session, hooks(seen.rows), kind, root, int(mode), limit, no_code)
        if not seen.complete:
            report.status = FINDINGS
            group.add(Lines("problem", [Value(None, f"not all of it was seen: the first {len(seen.rows)} ranges", "warn")]))
        if seen.problems:
            words = f"{seen.problems} problem{'s' * (seen.problems != 1)} in these tables, which `{kind} dump` lists: no hook is looked for there"
            group.add(Lines("broken", [Value(seen.problems, words, "dim")]))
        report.python.append(f"print(hooks(view(machine.memory, {python_tables(kind, root)}).rows))")
    _compare(report, session, views, kind, int(mode), limit, no_code)
    return report


def _compare(report: Report, session: Session, views: Sequence[Tuple[Root, View]], kind: str, mode: int, limit: int, no_code: bool) -> None:
    """Tables that share most of their frames are views of one guest; each is compared with the first of its guest."""
    guests: List[Tuple[int, Root, View]] = []
    strangers: List[str] = []
    for number, (root, seen) in enumerate(views):
        for _, first_root, first in guests:
            common, same = kinship(first.rows, seen.rows)
            if common and 2 * same > common:
                title = f"{named(root)} against {named(first_root)}: {size_text(same)} of {size_text(common)} go to the same frames"
                group = Group("views", title, [], {"first": f"{first_root.tables.root:#x}", "second": f"{root.tables.root:#x}"})
                report.add(group)
                _add(report, group, session, list(view_hooks(first.rows, seen.rows, number)), kind, root, mode, limit, no_code)
                break
            strangers.append(f"{root.title} and {first_root.title}")
        else:
            guests.append((number, root, seen))
    if strangers:
        words = f"not compared, because they share less than half of their frames (separate guests): {'; '.join(strangers)}"
        report.add(Lines("strangers", [Value(strangers, words, "dim")]))


def _add(report: Report, group: Group, session: Session, found: Sequence[Hook], kind: str, root: Root, mode: int, limit: int, no_code: bool) -> None:
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
    group.add(table)
    if not found:
        return
    report.status = FINDINGS
    signs = [sign for sign in SIGNS if any(sign in hook.signs for hook in found)]
    group.add(Lines("signs", [Value(sign, f"{sign}: {SIGNS[sign]}", "dim") for sign in signs]))
    if len(found) > limit:
        group.add(Lines("cut", [Value(len(found) - limit, f"... {len(found) - limit} more rows: --limit shows more", "warn")]))
    if not no_code:
        for hook in found[:limit]:
            if hook.moved:
                group.blocks += _bytes(session, hook, mode)


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
