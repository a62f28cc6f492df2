"""`where`: every processor of a live target, host or guest, in whose guest, and how that is known."""

from __future__ import annotations

from typing import Callable, List, Optional

from vtdbg.commands.live import live_machine
from vtdbg.commands.registry import verb
from vtdbg.commands.session import Session
from vtdbg.report import Report, Table, Value, hexa, text
from vtdbg.targets.processors import Seen

MODES = {"host": ("host", ""), "guest": ("GUEST", "strong"), "unknown": ("unknown", "warn")}


@verb("where", "every processor: host or guest, whose, and how that is known", live=True)
def where(session: Session) -> Report:
    """One row a processor of the debugger.  Each is decided by itself; the selected one (*) stays selected.

    With KVM's symbols in the debugger it is also said which of Linux' processors (CPU) each is, and whose the control block is.
    """
    machine = live_machine(session)
    machine.settle()
    report = Report("where", header=session.header(), notes=list(machine.warnings))
    seen = machine.processors.all()
    selected = machine.port.selected()
    heads = (("thread", "processor"), ("mode", "mode"), ("rip", "RIP"), ("block", "block"), ("vcpu", "whose" if machine.kvm() is not None else ""),
             ("cpu", ""), ("reason", ""))
    table = Table("processors", heads, empty="the debugger shows no processors")
    reasons = Table("reasons", (("thread", ""), ("words", "processor"), ("reason", "by")), wrap="reason", headings=False)
    for item in seen:
        table.add(*_row(item, item.number == selected, machine.owner))
        number = f"processor {item.number}" + (f", CPU {item.cpu.number}" if item.cpu is not None else "")
        reasons.add(Value(item.number, ""), number, _why(item))
    report.add(table)
    report.add(reasons)
    report.notes += [note for item in seen for note in item.where.notes if note not in report.notes]
    report.notes += [item.conflict for item in seen if item.conflict and item.conflict not in report.notes]
    report.python = [*session.python_open(), "for seen in machine.processors.all():", "    print(seen.number, seen.where.text, seen.current)"]
    return report


def _row(item: Seen, selected: bool, owner: Callable[[int], str]) -> List[Value]:
    words, style = MODES[item.where.mode]
    block: Optional[int] = item.where.block.address if item.where.block is not None else None
    kind = item.where.block.kind if item.where.block is not None else ""
    current = item.current
    if block is None and current is not None and item.where.mode == "host":
        block, kind = current.address, current.kind
    shown = hexa(block, link=f"{kind} dump {block:#x}") if block is not None else Value(None, "", "dim")
    whose = owner(block) if block is not None else ""
    number = Value({"number": item.number, "selected": selected, "title": item.title}, f"{item.number}{'*' if selected else ''}",
                   "strong" if selected else "")
    cpu = Value(None if item.cpu is None else item.cpu.number, "")
    return [number, text(words, style), hexa(item.registers.get("rip"), 16), shown, text(whose), cpu, Value(_why(item), "")]


def _why(item: Seen) -> str:
    return item.where.reason + (f"; CPU {item.cpu.number} by its {item.by}" if item.cpu is not None else "")
