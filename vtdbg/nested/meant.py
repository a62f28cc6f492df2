"""Entries that break a rule on purpose, told apart from mistakes.

KVM makes its entries for pages without memory (MMIO) so that every access exits with a misconfiguration (`vtdbg.kvm_entries`).  An enumeration
takes neighbours that break the same rules for one problem, whatever else they hold: here they are looked at one by one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Iterable, Iterator, List, NamedTuple, Optional, Tuple

from vtdbg.enumeration import Problem
from vtdbg.errors import MemoryUnavailable
from vtdbg.kvm_entries import MARKERS, MmioEntry, about_mmio, mmio_of
from vtdbg.memory.base import PhysicalMemory
from vtdbg.vmx.ept import Ept
from vtdbg.walk import Structure

LOOKED_AT = 1 << 15
"""Entries that are looked at: hostile tables have millions of broken ones.  The rest stays what it is to the processor, a misconfiguration."""


class Told(NamedTuple):
    """A problem, or the part of it in which all entries are alike in this; `meant` is what the software wants with them, "" where nobody knows."""

    problem: Problem
    meant: str

    @property
    def text(self) -> str:
        """What a person reads: of what is meant so, which entry it is, and not the rule that it breaks."""
        return f"{self.meant}; entry {self.problem.entry:#x} at {self.problem.path[-1]:#x}" if self.meant else self.problem.text


def told_apart(memory: PhysicalMemory, structure: Structure, problems: Iterable[Problem]) -> Iterator[Told]:
    """The problems of an enumeration, in their order; those whose neighbours differ in what is meant by them in parts."""
    left = LOOKED_AT
    for problem in problems:
        # Only entries for single pages are made so.
        if problem.kind != "misconfiguration" or problem.level != 1 or not problem.path or problem.entries > left:
            yield Told(problem, "")
            continue
        left -= problem.entries
        yield from _parts(memory, structure, problem)


def faults(memory: PhysicalMemory, structure: Structure, problems: Iterable[Problem]) -> Tuple[List[Told], List[Told]]:
    """(what is wrong, what is meant so)."""
    told = list(told_apart(memory, structure, problems))
    return [item for item in told if not item.meant], [item for item in told if item.meant]


def _parts(memory: PhysicalMemory, structure: Structure, problem: Problem) -> Iterator[Told]:
    kind = "ept" if isinstance(structure, Ept) else "npt"
    size = problem.length // problem.entries
    marker, mask = MARKERS[kind]
    entries = _entries(memory, structure, problem)
    if not any(entry & mask == marker for entry in entries):
        yield Told(problem, "")
        return
    begin = 0
    found = [mmio_of(entry, problem.start + at * size, kind) for at, entry in enumerate(entries)]
    for at in range(1, len(found) + 1):
        if at == len(found) or found[at] != found[begin]:
            part = _part(structure, problem, entries, begin, at)
            yield Told(part, _words(found[begin], part))
            begin = at


def _entries(memory: PhysicalMemory, structure: Structure, problem: Problem) -> List[int]:
    """The entries as they are in memory."""
    if problem.entries == 1 and problem.entry is not None:
        return [problem.entry]
    size = _entry_size(structure)
    try:
        data = memory.read(problem.path[-1], problem.entries * size)
    except MemoryUnavailable:
        return []
    return [int.from_bytes(data[at:at + size], "little") for at in range(0, len(data), size)]


def _entry_size(structure: Structure) -> int:
    return structure.tables.levels[-1].entry_size


def _part(structure: Structure, problem: Problem, entries: List[int], begin: int, end: int) -> Problem:
    if (begin, end) == (0, problem.entries):
        return problem
    size, at = problem.length // problem.entries, problem.path[-1] + begin * _entry_size(structure)
    more = f" and {end - begin - 1} more" if end - begin > 1 else ""
    rules = "; ".join(rule.text for rule in problem.rules)
    return replace(problem, start=problem.start + begin * size, length=(end - begin) * size, entry=entries[begin], entries=end - begin,
                   path=(*problem.path[:-1], at),
                   text=f"level {problem.level} {structure.tables.levels[-1].name} at {at:#x}{more} (entry {entries[begin]:#x}): {rules}")


def _words(found: Optional[MmioEntry], part: Problem) -> str:
    if found is None:
        return ""
    pages = f"KVM's MMIO entry for page {part.start:#x}" if part.entries == 1 else \
        f"KVM's MMIO entries for pages {part.start:#x} to {part.start + part.length - 1:#x}"
    return f"{pages} ({about_mmio(found)})"
