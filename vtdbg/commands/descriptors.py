"""`gdt|ldt|idt|tss dump` and `decode`: descriptor tables of the guest, of the host, or at an address, and raw descriptors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, List, Optional, Sequence, Tuple

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import chosen_blocks
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.views import GuestPhysicalMemory, LinearMemory
from vtdbg.report import FINDINGS, Block, Group, Lines, Pairs, Report, Table, Value, hex_or_none, hexa, text
from vtdbg.svm import segments as svm_segments
from vtdbg.svm.npt import Npt
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx import segments as vmx_segments
from vtdbg.vmx.controls import control
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.descriptor_tables import DescriptorTable, TableRow, find_descriptor, read_idt, read_table
from vtdbg.x86.descriptors import GateDescriptor, SegmentDescriptor, decode, decode_gate
from vtdbg.x86.paging import Paging
from vtdbg.x86.segments import SegmentComparison
from vtdbg.x86.tss import read_tss

WHERE = (
    Opt("--vmcs", "address", "the guest of this VMCS (default: of every VMCS and VMCB that a scan finds)"),
    Opt("--vmcb", "address", "the guest of this VMCB"),
    Opt("--host", "flag", "with --vmcs: the host that its host-state area describes"),
    Opt("--cpu", "int", "the processor's own registers, where the source has them"),
    Opt("--base", "address", "a table at this address instead"),
    Opt("--limit", "int", "its limit (last byte)"),
    Opt("--physical", "flag", "--base is a physical address"),
    Opt("--32", "flag", "8-byte system descriptors and gates: not IA-32e mode"),
)


# A VM exit sets the limits of GDTR and IDTR to 0xffff and that of TR to 0x67 (SDM vol. 3, Loading Host Segment and Descriptor-Table
# Registers); how long the host's tables are is not in a VMCS.  An IDT has 4 KiB, a GDT hardly more; what lies behind is other data.
HOST_SHOWN = 0xFFF
HOST_LIMIT_NOTE = "a VM exit sets the limit 0xffff; how long the host's table is, is not in the VMCS: its first 4 KiB are shown (--limit N)"


@dataclass(frozen=True)
class View:
    """Linear memory and the descriptor-table registers of somebody: a guest, a host, a processor."""

    title: str
    memory: PhysicalMemory
    long_mode: bool
    tables: "dict[str, Tuple[Optional[int], Optional[int]]]"
    """GDT, LDT, IDT, TSS -> (base, limit); None is unknown."""
    selector: Optional[int] = None
    """The task register's."""
    compare: Optional[Callable[[], Sequence[SegmentComparison]]] = None
    limit_note: str = ""


def _dump(kind: str, session: Session, options: "dict[str, Any]") -> Report:
    views, stale = _views(kind, session, options)
    report = Report(f"{kind.lower()} dump", header=session.header(), notes=[*session.machine.warnings, *stale], python=session.python_open())
    for view in views:
        base, limit = view.tables[kind]
        group = Group("tables", f"{kind} of {view.title}", [], {"base": hex_or_none(base), "limit": limit})
        report.add(group)
        if base is None or limit is None:
            group.add(Lines("unknown", [Value(None, f"unknown: the source does not say where the {kind} is", "warn")]))
            continue
        group.blocks += _tss_blocks(view, base, limit) if kind == "TSS" else _table_blocks(kind, view, base, limit)
        if view.compare is not None and kind == "GDT":
            comparison = _comparison(view.compare())
            group.add(comparison)
            if any("matters" in str(row[-1].data) for row in comparison.rows if isinstance(row[-1], Value)):
                report.status = FINDINGS
    report.python += ["from vtdbg.x86.descriptor_tables import read_table", "# memory: a LinearMemory; base, limit: of GDTR", "print(machine.name)"]
    return report


def _declare(kind: str, title: str) -> None:
    @verb(
        f"{kind.lower()} dump",
        f"{title}, entry by entry",
        *WHERE,
        description=f"{title} of the guest or the host of a VMCS, of the guest of a VMCB, of a processor, or at an address.",
    )
    def dump(session: Session, **options: Any) -> Report:
        return _dump(kind, session, options)


for _kind, _title in (
    ("GDT", "the global descriptor table"),
    ("LDT", "the local descriptor table"),
    ("IDT", "the interrupt descriptor table"),
    ("TSS", "the task-state segment"),
):
    _declare(_kind, _title)


@verb(
    "gdt decode",
    "raw descriptors from their numbers",
    Arg("descriptor", "int", "8 bytes as one number; give two for a 16-byte system descriptor", nargs="+"),
    Opt("--32", "flag", "not IA-32e mode"),
)
def gdt_decode(session: Session, descriptor: List[int], **options: Any) -> Report:
    """Base, limit after granularity, type, DPL, flags, and the access-rights word as VMWRITE wants it."""
    data = _raw(descriptor)
    found = decode(data, not options["32"])
    table = _empty_table("GDT")
    _add_row(table, "GDT", TableRow(0, 0, 0, data, found))
    return Report(
        "gdt decode",
        [table],
        python=["from vtdbg.x86.descriptors import decode", f"print(decode(bytes.fromhex({data.hex()!r}), {not options['32']}))"],
    )


@verb(
    "idt decode",
    "a raw gate from its numbers",
    Arg("descriptor", "int", "8 bytes as one number; give two for a 16-byte gate", nargs="+"),
    Opt("--32", "flag", "not IA-32e mode"),
)
def idt_decode(session: Session, descriptor: List[int], **options: Any) -> Report:
    """Target, selector, type, DPL and IST."""
    data = _raw(descriptor)
    table = _empty_table("IDT")
    _add_row(table, "IDT", TableRow(0, 0, 0, data, decode_gate(data, not options["32"])))
    return Report(
        "idt decode",
        [table],
        python=["from vtdbg.x86.descriptors import decode_gate", f"print(decode_gate(bytes.fromhex({data.hex()!r}), {not options['32']}))"],
    )


def _raw(numbers: Sequence[int]) -> bytes:
    if len(numbers) > 2 or any(number >> 64 or number < 0 for number in numbers):
        raise UsageError("a descriptor is one number of 64 bits, or two: the lower half first")
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def _views(kind: str, session: Session, options: "dict[str, Any]") -> Tuple[List[View], List[str]]:
    """Whose tables the options name, and what has to be said of how fresh they are."""
    vmcs, vmcb, host, cpu, base = (options[name] for name in ("vmcs", "vmcb", "host", "cpu", "base"))
    not options["32"]
    if cpu is not None:
        return [_given(kind, _cpu_view(session, cpu), options)], []
    intel, amd, stale = chosen_blocks(session, vmcs, vmcb)
    if host and amd:
        raise UsageError("a VMCB does not describe the host: --cpu 0 takes the processor's own registers")
    views = [_host_view(session, item.vmcs, item.title) if host else _guest_view(session, item.vmcs, item.title) for item in intel]
    views += [_vmcb_view(session, item.vmcb, item.title) for item in amd]
    if not views and session.machine.cpus:
        return [_given(kind, _cpu_view(session, cpu.index), options) for cpu in session.machine.cpus], []
    if not views:
        raise UsageError("whose table? no VMCS and no VMCB found: give --vmcs, --vmcb, --cpu, or --base and --limit")
    return [_given(kind, view, options) for view in views], stale


def _given(kind: str, view: View, options: "dict[str, Any]") -> View:
    """The view with the table where the user says it is."""
    base, limit = options["base"], options["limit"]
    long_mode = view.long_mode and not options["32"]
    if base is None and limit is None:
        return replace(view, long_mode=long_mode)
    if base is None:
        return replace(view, long_mode=long_mode, tables={**view.tables, kind: (view.tables[kind][0], limit)}, limit_note="")
    if limit is None:
        raise UsageError("--base needs --limit (the last byte of the table)")
    return replace(view, long_mode=long_mode, tables={**view.tables, kind: (base, limit)}, selector=None, compare=None, limit_note="")


def _guest_view(session: Session, vmcs: Vmcs, title: str) -> View:
    memory = session.machine.memory
    if control(vmcs, "sec", "EPT") is not False:
        memory = GuestPhysicalMemory(memory, Ept.from_vmcs(vmcs, session.caps))
    linear = LinearMemory(memory, Paging.from_vmcs(vmcs))
    mode = vmx_segments.guest_mode(vmcs)
    tables = {
        "GDT": (vmcs.get("GUEST_GDTR_BASE"), vmcs.get("GUEST_GDTR_LIMIT")),
        "IDT": (vmcs.get("GUEST_IDTR_BASE"), vmcs.get("GUEST_IDTR_LIMIT")),
        "LDT": (vmcs.get("GUEST_LDTR_BASE"), vmcs.get("GUEST_LDTR_LIMIT")),
        "TSS": (vmcs.get("GUEST_TR_BASE"), vmcs.get("GUEST_TR_LIMIT")),
    }
    return View(
        f"the guest of {title}",
        linear,
        mode is None or mode.long_mode,
        tables,
        vmcs.get("GUEST_TR_SELECTOR"),
        lambda: vmx_segments.compare_guest(vmcs, linear),
    )


def _host_view(session: Session, vmcs: Vmcs, title: str) -> View:
    wide = control(vmcs, "exit", "HOST_ADDR_SPACE_SIZE")
    paging = Paging.from_registers(vmcs.get("HOST_CR0"), vmcs["HOST_CR3"], vmcs.get("HOST_CR4"), None, long_mode=wide)
    linear = LinearMemory(session.machine.memory, paging)
    tables = {
        "GDT": (vmcs.get("HOST_GDTR_BASE"), HOST_SHOWN),
        "IDT": (vmcs.get("HOST_IDTR_BASE"), HOST_SHOWN),
        "LDT": (None, None),
        "TSS": (vmcs.get("HOST_TR_BASE"), 0x67),
    }
    return View(
        f"the host of {title}",
        linear,
        wide is not False,
        tables,
        vmcs.get("HOST_TR_SELECTOR"),
        lambda: vmx_segments.compare_host(vmcs, linear),
        HOST_LIMIT_NOTE,
    )


def _vmcb_view(session: Session, vmcb: Vmcb, title: str) -> View:
    memory = session.machine.memory
    if vmcb["nested_ctl"] & 1:
        memory = GuestPhysicalMemory(memory, Npt.from_vmcb(vmcb))
    linear = LinearMemory(memory, Paging.from_registers(vmcb.get("cr0"), vmcb["cr3"], vmcb.get("cr4"), vmcb.get("efer")))
    tables = {
        kind: (vmcb.get(f"{name}.base"), vmcb.get(f"{name}.limit"))
        for kind, name in (("GDT", "gdtr"), ("IDT", "idtr"), ("LDT", "ldtr"), ("TSS", "tr"))
    }
    return View(
        f"the guest of {title}",
        linear,
        bool((vmcb.get("efer") or 0) >> 10 & 1),
        tables,
        vmcb.get("tr.selector"),
        lambda: svm_segments.compare_guest(vmcb, linear),
    )


def _cpu_view(session: Session, index: int) -> View:
    cpu = next((cpu for cpu in session.machine.cpus if cpu.index == index), None)
    cr3 = cpu.get("cr3") if cpu is not None else None
    if cpu is None or cr3 is None:
        raise UsageError(f"the source does not know the registers of processor {index}: give --vmcs, --vmcb, or --physical")
    linear = LinearMemory(session.machine.memory, Paging.from_registers(cpu.get("cr0"), cr3, cpu.get("cr4"), cpu.get("efer")))
    tables = {
        kind: (cpu.get(f"{name}_base"), cpu.get(f"{name}_limit")) for kind, name in (("GDT", "gdtr"), ("IDT", "idtr"), ("LDT", "ldtr"), ("TSS", "tr"))
    }
    long_mode = bool((cpu.get("efer") or 1 << 10) >> 10 & 1)
    return View(f"processor {index} ({cpu.source})", linear, long_mode, tables, cpu.get("tr_selector"))


def _empty_table(kind: str) -> Table:
    if kind == "IDT":
        return Table(
            "entries",
            (
                ("vector", "vector"),
                ("type", "gate"),
                ("target", "target"),
                ("selector", "sel"),
                ("dpl", "dpl"),
                ("ist", "ist"),
                ("raw", ""),
                ("problems", ""),
            ),
            wrap="type",
        )
    return Table(
        "entries",
        (
            ("selector", "sel"),
            ("type", "type"),
            ("base", "base"),
            ("limit", "limit"),
            ("dpl", "dpl"),
            ("flags", "flags"),
            ("access_rights", "AR"),
            ("vmcb_attrib", ""),
            ("raw", ""),
            ("problems", ""),
        ),
        wrap="type",
    )


def _table_blocks(kind: str, view: View, base: int, limit: int) -> List[Block]:
    found: DescriptorTable
    found = read_idt(view.memory, base, limit, view.long_mode) if kind == "IDT" else read_table(view.memory, base, limit, view.long_mode, kind)
    facts = Pairs("register")
    facts.add("base", "base", hexa(base, 16))
    facts.add("limit", "limit", hexa(limit, 4))
    table = _empty_table(kind)
    zero = unreadable = 0
    problems: List[str] = []
    for row in found.rows:
        if row.unreadable:
            unreadable += 1
            if unreadable == 1:
                problems.append(f"{row.address:#x}: {row.unreadable}")
        elif not any(row.raw):
            zero += 1
        else:
            _add_row(table, kind, row)
            if row.descriptor is not None:
                problems += [f"{'vector' if kind == 'IDT' else 'selector'} {row.selector:#x}: {problem}" for problem in row.descriptor.problems]
    blocks: List[Block] = [facts, table]
    counts = [f"{count} {what}" for count, what in ((zero, "zero"), (unreadable, "unreadable")) if count]
    if counts:
        blocks.append(Lines("left_out", [Value({"zero": zero, "unreadable": unreadable}, "entries left out: " + ", ".join(counts), "dim")]))
    lines = [*([view.limit_note] if view.limit_note else []), *found.warnings, *problems]
    if lines:
        blocks.append(Lines("problems", [Value(line, line, "warn") for line in lines], bullet="! "))
    return blocks


def _add_row(table: Table, kind: str, row: TableRow) -> None:
    found = row.descriptor
    raw, problems = Value(row.raw.hex(), ""), Value(list(found.problems) if found is not None else [row.unreadable], "")
    style = "dim" if isinstance(found, (SegmentDescriptor, GateDescriptor)) and not found.present else ""
    if kind == "IDT":
        number = hexa(row.index, 2)
        if isinstance(found, GateDescriptor):
            table.add(
                number,
                text(found.type_name, style),
                hexa(found.offset, 16, style),
                hexa(found.selector, 4),
                str(found.dpl),
                str(found.ist or ""),
                raw,
                problems,
            )
        else:
            table.add(number, text(getattr(found, "type_name", "unknown"), "bad"), None, None, "", "", raw, problems)
        return
    number = hexa(row.selector, 4)
    if isinstance(found, SegmentDescriptor):
        rights = hexa(found.access_rights, 4, "strong")
        table.add(
            number,
            text(found.type_name, style),
            hexa(found.base, 8, style),
            hexa(found.limit, 4),
            str(found.dpl),
            found.flags,
            rights,
            hexa(found.vmcb_attrib, 3),
            raw,
            problems,
        )
    elif isinstance(found, GateDescriptor):
        words = f"{found.type_name} to {found.selector:#x}:{found.offset:#x}"
        table.add(number, text(words, style), None, None, str(found.dpl), "P" if found.present else "", None, None, raw, problems)
    else:
        table.add(number, text(row.unreadable or "unknown", "bad"), None, None, "", "", None, None, raw, problems)


def _tss_blocks(view: View, base: int, limit: int) -> List[Block]:
    width = 64 if view.long_mode else 32
    gdt_base, gdt_limit = view.tables.get("GDT", (None, None))
    facts = Pairs("register")
    facts.add("base", "base", hexa(base, 16))
    facts.add("limit", "limit", hexa(limit, 4))
    if view.selector is not None and gdt_base is not None and gdt_limit is not None:
        row = find_descriptor(view.memory, gdt_base, gdt_limit, view.selector, view.long_mode)
        facts.add("selector", "selector", hexa(view.selector, 4))
        if isinstance(row.descriptor, SegmentDescriptor):
            found = row.descriptor
            same = found.base == base
            words = f"{found.type_name}, base {found.base:#x}, limit {found.limit:#x}" + ("" if same else ": not the base in use")
            facts.add("descriptor", "descriptor", Value(words, words, "" if same else "bad"))
            if found.bits in (16, 32, 64) and found.kind == "tss":
                width, limit = found.bits, max(limit, found.limit)
    tss = read_tss(view.memory, base, limit, width)
    table = Table("fields", (("name", "field"), ("value", "value"), ("offset", "offset")), title=f"{tss.bits}-bit TSS", headings=False)
    for field in tss.fields:
        table.add(field.name, hexa(field.value, field.size * 2), text(f"offset {field.offset:#x}", "dim"))
    blocks: List[Block] = [facts, table]
    if tss.io_bitmap is not None:
        ports = tss.io_bitmap.open_ports
        words = (
            "unknown"
            if ports is None
            else "none"
            if not ports
            else ", ".join(f"{first:#x}" if first == last else f"{first:#x}-{last:#x}" for first, last in ports[:64])
        )
        blocks.append(Pairs("io_bitmap", [("base", "I/O bitmap", f"at TSS + {tss.io_bitmap.base:#x}"), ("open", "ports open above IOPL", words)]))
        if tss.io_bitmap.note:
            blocks.append(Lines("io_note", [tss.io_bitmap.note], bullet="- "))
    if tss.problems:
        blocks.append(Lines("problems", [Value(line, line, "warn") for line in tss.problems], bullet="! "))
    return blocks


def _comparison(found: Sequence[SegmentComparison]) -> Table:
    table = Table(
        "segments",
        (("name", "register"), ("selector", "sel"), ("verdict", "against its descriptor"), ("state", "")),
        title="Segment registers",
        wrap="verdict",
    )
    for one in found:
        words, style = _verdict(one)
        differences = [
            {"field": item.field, "held": f"{item.held:#x}", "descriptor": f"{item.descriptor:#x}", "matters": item.matters, "why": item.why}
            for item in one.differences
        ]
        data = {"differences": differences, "notes": list(one.notes), "verdict": "matters" if one.matters else "fine"}
        table.add(one.state.name, hexa(one.state.selector, 4), Value(words, words, style), Value(data, ""))
    return table


def _verdict(one: SegmentComparison) -> Tuple[str, str]:
    """The comparison in words, and its style."""
    words = [f"{item.field} is {item.held:#x}, descriptor {item.descriptor:#x}: {item.why}" for item in one.differences]
    words += list(one.notes)
    if not words:
        return ("equal", "good") if one.row is not None else ("", "")
    return "; ".join(words), "bad" if one.matters else "dim"
