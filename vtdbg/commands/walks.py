"""A page walk as blocks of a report: each level with its entry, flags and the permissions so far, then the result or the reason."""

from __future__ import annotations

from typing import List, Optional, Sequence

from vtdbg.numbers import size_text
from vtdbg.report import Block, Group, Lines, Pairs, Table, Value, hexa, text
from vtdbg.walk import Step, Walk

COLUMNS = (
    ("level", "level"),
    ("address", "entry at"),
    ("entry", "entry"),
    ("permissions", "so far"),
    ("flags", "flags"),
    ("dimension", ""),
    ("place", ""),
)
MARK = {"mapped": "good", "violation": "bad", "misconfiguration": "bad", "unreadable": "warn"}


def walk_group(walk: Walk, title: str, linked: str = "") -> Group:
    """The walk under its title.  `linked` is what a click on an address runs, with {} for the address ("phys {}")."""
    data = {"structure": walk.structure, "root": f"{walk.root:#x}", "address": f"{walk.address:#x}", "outcome": walk.outcome}
    group = Group("walk", title, [steps_table(walk.steps, linked)], data)
    group.add(result(walk, linked))
    group.blocks += remarks(walk)
    return group


def steps_table(steps: Sequence[Step], linked: str = "") -> Table:
    """One row an entry, in the order in which the processor reads them; `linked` as in `walk_group`, for where an entry lies and where it leads."""
    table = Table("steps", COLUMNS, wrap="flags", empty="no entry was read")
    for step in steps:
        style = "bad" if step.broken else "" if step.present else "dim"
        place = hexa(step.address, 9, link=_link(linked, step.address)) if step.address is not None else text(step.place)
        leads = step.entry & step.table["ADDRESS"].mask if step.entry is not None and step.present and not step.broken else None
        table.add(
            f"{step.level} {step.name}",
            place,
            hexa(step.entry, 16, style, _link(linked, leads)),
            text(str(step.permissions)),
            Value(step.describe(), step.describe(), style),
            step.dimension,
            step.place,
        )
    return table


def _link(linked: str, address: Optional[int]) -> str:
    return linked.format(f"{address:#x}") if linked and address is not None else ""


def result(walk: Walk, linked: str = "") -> Pairs:
    """Outcome, address, size, permissions, memory type, and what the processor would report."""
    facts = Pairs("result")
    facts.add("outcome", "result", Value(walk.outcome, walk.outcome if walk.mapped else f"{walk.outcome}: {walk.reason}", MARK[walk.outcome]))
    if walk.maps_to is not None:
        what = "address" if walk.mapped else "would be"
        facts.add(
            "hpa", what, hexa(walk.maps_to, 9, "strong" if walk.mapped else "dim", _link(linked, walk.hpa))
        )
    if walk.page_size is not None:
        facts.add("page_size", "page size", Value(walk.page_size, size_text(walk.page_size)))
        facts.add("permissions", "permissions", str(walk.permissions))
    if walk.memory_type is not None:
        facts.add("memory_type", "memory type", walk.memory_type)
    if walk.qualification is not None:
        facts.add("qualification", "reported as", hexa(walk.qualification))
    if walk.hole is not None:
        facts.add("hole", "affects", Value(walk.hole, f"{size_text(walk.hole)} around the address"))
    if not walk.mapped:
        facts.add("reason", "", Value(walk.reason, ""))
    return facts


def remarks(walk: Walk) -> List[Block]:
    """What the walk notes and what it had to assume."""
    blocks: List[Block] = []
    if walk.rules:
        blocks.append(Lines("rules", [Value(rule.id, f"rule: {rule.text} ({rule.see})", "dim") for rule in walk.rules]))
    if walk.notes:
        blocks.append(Lines("notes", [Value(note, note) for note in walk.notes], bullet="- "))
    if walk.assumptions:
        blocks.append(Lines("assumptions", [Value(line, f"assumed: {line}", "dim") for line in walk.assumptions]))
    return blocks


def access_text(access: Optional[str]) -> str:
    return f" for {access}" if access else ""
