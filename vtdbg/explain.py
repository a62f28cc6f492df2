"""What an explained VM exit consists of, for Intel and AMD alike: facts, advice and notes, as data.

`vtdbg.vmx.exits` and `vtdbg.svm.exits` make these, a renderer prints them; neither knows of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Iterator, Optional, Tuple

from vtdbg.bits import BitTable
from vtdbg.x86.disasm import Instruction
from vtdbg.x86.operand import Operand

ADVICE_KINDS = ("rip", "event", "shadow", "cause", "avoid", "emulate", "fix")
"""rip: does RIP advance, by how much.  event: what has to be injected again.  shadow: interruptibility to clear.  cause: the control or
intercept that made this exit.  avoid: how not to get it.  emulate: what the handler has to do.  fix: what is wrong and has to be changed."""


@dataclass(frozen=True)
class Fact:
    """One decoded number of the exit.

    `value` is None where it is unknown; `numeric` is False for a fact that is words alone, with no number to know.  `group` is the field
    that it is a part of ("EXIT_QUALIFICATION", "EXITINFO1"); `source` says where the number is from ("VMCB offset 0x78", "given value");
    `warning` is set where the number cannot be believed or is impossible.
    """

    label: str
    value: Optional[int]
    meaning: str = ""
    source: str = ""
    warning: str = ""
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Advice:
    """What a handler does about the exit.  `kind` is one of ADVICE_KINDS, `see` the manual's section."""

    kind: str
    text: str
    see: str = ""


@dataclass(frozen=True)
class Explanation:
    """An exit in words.

    `kind` is "vmx" or "svm", `code` the basic exit reason or EXITCODE, `name` the kernel's identifier ("EPT_VIOLATION", "NPF"), `title` the
    manual's words.  `known` is False for a code in no table.  `stale` lists values that exist and are not of this exit, with why.
    `summary` is one sentence; `operand` and `instruction` are None where there is none or nothing to find it with (a note says which).
    """

    kind: str
    code: int
    name: str
    title: str
    facts: Tuple[Fact, ...] = ()
    advice: Tuple[Advice, ...] = ()
    notes: Tuple[str, ...] = ()
    stale: Tuple[Fact, ...] = ()
    known: bool = True
    see: str = ""
    summary: str = ""
    operand: Optional[Operand] = None
    instruction: Optional[Instruction] = None

    def __str__(self) -> str:
        """The whole explanation as lines of text: what `print` shows in a script."""
        lines = [named(self.name, self.title) + (f": {self.summary}" if self.summary else "")]
        for fact in self.facts + self.stale:
            value = "" if fact.value is None else f"{fact.value:#x}"
            lines.append("  " + "  ".join(part for part in (f"{fact.label}:", value, fact.meaning, fact.warning and f"[{fact.warning}]") if part))
        lines += [f"  {item.kind}: {item.text}" for item in self.advice]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def group(self, name: str) -> Tuple[Fact, ...]:
        """The facts of one field."""
        return tuple(fact for fact in self.facts if fact.group == name)

    def fact(self, label: str) -> Optional[Fact]:
        """The first fact with that label, None where there is none."""
        return next((fact for fact in self.facts if fact.label == label), None)

    def advised(self, kind: str) -> Tuple[Advice, ...]:
        return tuple(advice for advice in self.advice if advice.kind == kind)

    def warnings(self) -> Tuple[str, ...]:
        """Every warning, with the fact that it is about."""
        return tuple(f"{fact.label}: {fact.warning}" for fact in self.facts if fact.warning)


def named(name: str, title: str) -> str:
    """"EPT_VIOLATION (EPT violation)"; "HLT" where the manual's title is the identifier."""
    return name if title.lower() == name.lower() else f"{name} ({title})"


def bit_facts(table: BitTable, value: int, group: str, source: str = "") -> Iterator[Fact]:
    """The parts of `value` that say something, one fact each; reserved bits that are wrong carry a warning."""
    for decoded in table.shown(value):
        row = decoded.field
        reserved = row.kind in ("reserved0", "reserved1")
        warning = f"reserved bits {row.bits} must be {'1' if row.kind == 'reserved1' else '0'}" if reserved else ""
        yield Fact(row.name if not reserved else f"reserved {row.bits}", decoded.number, decoded.meaning, source, warning, group)
    outside = value & ~table.defined_mask()
    if outside:
        yield Fact("undefined bits", outside, "", source, f"no bit of {table.title} is defined there", group)


def unique(advice: Iterable[Advice]) -> Tuple[Advice, ...]:
    """In order, each once."""
    return tuple(dict.fromkeys(advice))
