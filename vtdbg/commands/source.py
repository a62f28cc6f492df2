"""`source info|scan`: what the dump or the target is, and which hypervisors and VMs are in it."""

from __future__ import annotations

from vtdbg.commands.registry import verb
from vtdbg.commands.session import Session
from vtdbg.machine import Machine
from vtdbg.numbers import size_text
from vtdbg.report import Lines, Pairs, Report, Table, Value, hexa, text

SHOWN_RANGES = 64


@verb("source info", "format, memory ranges, processors, and what is missing")
def info(session: Session) -> Report:
    """What the source is, which physical memory it holds, which processors it describes, and what it cannot answer."""
    machine = session.machine
    # Before the header, which says what a live target finds out for them.
    cpus = _cpus(machine)
    report = Report("source info", header=session.header(), notes=list(machine.warnings))
    facts = Pairs("source", title="Source")
    facts.add("name", "name", machine.name)
    facts.add("format", "format", machine.format)
    facts.add("live", "live target", machine.live)
    for key, value in machine.details.items():
        lines = value.count("\n") + 1
        shown = value if lines == 1 else f"{lines} lines (--json has them)"
        facts.add(key.lower().replace(" ", "_"), key, Value(value, shown))
    report.add(facts)
    ranges = machine.memory.ranges()
    if ranges is None:
        report.add(Lines("ranges_unknown", ["memory ranges: unknown to this target"]))
    else:
        total = sum(length for _, length in ranges)
        table = Table(
            "ranges",
            (("first", "first address"), ("last", "last address"), ("size", "size")),
            title=f"Physical memory: {size_text(total)} in {len(ranges)} range{'s' * (len(ranges) != 1)}",
            empty="none",
        )
        for first, length in ranges[:SHOWN_RANGES]:
            table.add(hexa(first, 12), hexa(first + length - 1, 12), size_text(length))
        report.add(table)
        if len(ranges) > SHOWN_RANGES:
            report.add(Lines("more_ranges", [f"... and {len(ranges) - SHOWN_RANGES} more ranges"]))
    report.add(cpus)
    report.python = [*session.python_open(), "print(machine.format, machine.memory.ranges(), machine.cpus)"]
    return report


REGISTERS = ("rip", "rsp", "rflags", "cr0", "cr3", "cr4", "efer", "gdtr_base", "idtr_base", "tr_base")


def _cpus(machine: Machine) -> Table:
    processors = machine.cpus
    known = [name for name in REGISTERS if any(cpu.get(name) is not None for cpu in processors)]
    table = Table(
        "cpus",
        (("cpu", "cpu"), ("register", "register"), ("value", "value"), ("source", "from")),
        title="Processors",
        empty="this source says nothing of registers",
    )
    for cpu in processors:
        for name in known:
            table.add(str(cpu.index), name, hexa(cpu.get(name), 16), text(cpu.source, "dim"))
    return table


@verb("source scan", "which hypervisors, VMs and virtual processors are in the memory, as a tree")
def scan(session: Session) -> Report:
    """Finds every VMCS and VMCB and says who runs whom: what VM exits return to, one VM for each set of nested tables, and the hypervisors inside
    the VMs, found in their guest's memory through its tables.  Ctrl-C shows what was found so far.
    """
    from vtdbg.commands.tree import scan_report

    return scan_report(session)
