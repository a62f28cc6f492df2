"""`msrbitmap dump|query` and `iobitmap dump|query`: what exits and what passes, for VMX and SVM alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from vtdbg import bits
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import chosen_blocks
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.report import Block, Group, Lines, Report, Table, Value, hexa, text
from vtdbg.svm import bitmaps as svm_maps
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx import bitmaps as vmx_maps
from vtdbg.vmx.controls import control
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86 import msrs
from vtdbg.x86.permission import READ, WRITE, BitmapQuery, MsrRange

WHOSE = (
    Opt("--vmcs", "address", "of this VMCS (default: of every VMCS and VMCB that a scan finds)"),
    Opt("--vmcb", "address", "of this VMCB"),
    Opt("--at", "address", "a bitmap at this physical address instead (with --svm: the MSRPM or IOPM)"),
    Opt("--svm", "flag", "the page at --at is SVM's"),
)
MANY = 512
"""A range that covers this many MSRs is not spelt out by name."""


@dataclass(frozen=True)
class Owner:
    """Whose bitmap: a VMCS, a VMCB, or a page by itself."""

    title: str
    vmcs: Optional[Vmcs] = None
    vmcb: Optional[Vmcb] = None
    page: Optional[int] = None
    svm: bool = False


def _owners(session: Session, vmcs: Optional[int], vmcb: Optional[int], at: Optional[int], is_svm: bool) -> Tuple[List[Owner], List[str]]:
    if at is not None:
        return [Owner(f"page {at:#x}", page=at, svm=is_svm)], []
    intel, amd, stale = chosen_blocks(session, vmcs, vmcb)
    owners = [Owner(item.title, vmcs=item.vmcs) for item in intel] + [Owner(item.title, vmcb=item.vmcb, svm=True) for item in amd]
    if not owners:
        raise UsageError("no VMCS and no VMCB found: give --vmcs, --vmcb or --at")
    return owners, stale


def _report(command: str, session: Session, stale: Sequence[str]) -> Report:
    return Report(command, header=session.header(), notes=[*session.machine.warnings, *stale], python=session.python_open())


@verb("msrbitmap dump", "the MSRs whose reads and writes do not exit", *WHOSE, Opt("--intercepted", "flag", "those that exit instead"))
def msr_dump(session: Session, vmcs: Optional[int], vmcb: Optional[int], at: Optional[int], svm: bool, intercepted: bool) -> Report:
    """Ranges with names.  MSRs outside the ranges that the bitmap covers always exit."""
    owners, stale = _owners(session, vmcs, vmcb, at, svm)
    report = _report("msrbitmap dump", session, stale)
    for owner in owners:
        group = Group("bitmaps", f"MSR bitmap of {owner.title}", [])
        report.add(group)
        found = msr_bitmap_of(owner, session.machine.memory)
        if isinstance(found, str):
            group.add(Lines("why", [Value(found, found, "warn")]))
            continue
        report.python.append(_python(found, owner))
        for access in (READ, WRITE):
            ranges = found.intercepted(access) if intercepted else found.passed(access)
            group.add(_msr_table(access, ranges, intercepted))
    return report


@verb(
    "msrbitmap query",
    "does an access to one MSR exit, and which bit decides",
    Arg("msr", "text", "name or index; several may follow", nargs="+"),
    *WHOSE,
)
def msr_query(session: Session, msr: List[str], vmcs: Optional[int], vmcb: Optional[int], at: Optional[int], svm: bool) -> Report:
    """The byte and the bit for reads and for writes, and the rule for MSRs that no bit covers."""
    owners, stale = _owners(session, vmcs, vmcb, at, svm)
    indexes = [msrs.find(name).index for name in msr]
    report = _report("msrbitmap query", session, stale)
    for owner in owners:
        answers = [_msr_answer(owner, session.machine.memory, index, access) for index in indexes for access in (READ, WRITE)]
        report.add(Group("bitmaps", f"MSR bitmap of {owner.title}", [_answers(answers)]))
        found = msr_bitmap_of(owner, session.machine.memory)
        if not isinstance(found, str):
            report.python.append(_python(found, owner))
            report.python.append(f"print(bitmap.query({indexes[0]:#x}, 'read'))")
    return report


@verb(
    "iobitmap dump",
    "the ports whose accesses do not exit",
    *WHOSE,
    Opt("--at-b", "address", "I/O bitmap B, with --at for A"),
    Opt("--intercepted", "flag", "those that exit instead"),
)
def io_dump(
    session: Session, vmcs: Optional[int], vmcb: Optional[int], at: Optional[int], svm: bool, at_b: Optional[int], intercepted: bool
) -> Report:
    """Ranges of ports.  A wider access exits if one of its ports does."""
    owners, stale = _owners(session, vmcs, vmcb, at, svm)
    report = _report("iobitmap dump", session, stale)
    for owner in owners:
        found = _io_bitmap(owner, session.machine.memory, at_b)
        group = Group("bitmaps", f"I/O bitmaps of {owner.title}", [])
        report.add(group)
        if isinstance(found, str):
            group.add(Lines("why", [Value(found, found, "warn")]))
            continue
        report.python.append(_python(found, owner, at_b))
        ranges = found.intercepted() if intercepted else found.passed()
        table = Table(
            "ranges",
            (("first", "first"), ("last", "last"), ("count", "ports")),
            title="Ports that exit" if intercepted else "Ports that pass",
            empty="none",
        )
        for first, last in ranges:
            table.add(hexa(first, 4), hexa(last, 4), str(last - first + 1))
        group.add(table)
    return report


@verb(
    "iobitmap query",
    "does an access to one port exit, and which bit decides",
    Arg("port", "int", "port"),
    *WHOSE,
    Opt("--at-b", "address", "I/O bitmap B, with --at for A"),
    Opt("--size", "int", "bytes of the access: 1, 2 or 4", default=1),
)
def io_query(
    session: Session, port: int, vmcs: Optional[int], vmcb: Optional[int], at: Optional[int], svm: bool, at_b: Optional[int], size: int
) -> Report:
    """The byte and the bit, and the rule for accesses that wrap around port 0xffff."""
    owners, stale = _owners(session, vmcs, vmcb, at, svm)
    report = _report("iobitmap query", session, stale)
    for owner in owners:
        found = _io_bitmap(owner, session.machine.memory, at_b)
        if owner.vmcs is not None:
            answer = vmx_maps.query_port(owner.vmcs, session.machine.memory, port, size)
        elif owner.vmcb is not None:
            answer = svm_maps.query_port(owner.vmcb, session.machine.memory, port, size)
        elif isinstance(found, str):
            raise UsageError(found)
        else:
            answer = found.query(port, size)
        report.add(Group("bitmaps", f"I/O bitmaps of {owner.title}", [_answers([answer])]))
        if not isinstance(found, str):
            report.python += [_python(found, owner, at_b), f"print(bitmap.query({port:#x}, {size}))"]
    return report


def msr_bitmap_of(owner: Owner, memory: PhysicalMemory) -> "vmx_maps.MsrBitmap | svm_maps.MsrPermissionMap | str":
    """The bitmap, or why there is none."""
    if owner.page is not None:
        return svm_maps.MsrPermissionMap.read(memory, owner.page) if owner.svm else vmx_maps.MsrBitmap.read(memory, owner.page)
    if owner.vmcb is not None:
        if not bits.table("intercept_misc1").test(owner.vmcb["intercept_misc1"], svm_maps.INTERCEPT_MSR):
            return "the MSR_PROT intercept is 0: no MSR access exits, whatever the map says"
        return svm_maps.MsrPermissionMap.read(memory, owner.vmcb["msrpm_base_pa"])
    assert owner.vmcs is not None
    if control(owner.vmcs, "proc", "USE_MSR_BITMAPS") is not True:
        return 'primary control "Use MSR bitmaps" is 0 or unknown: every RDMSR and WRMSR exits'
    return vmx_maps.MsrBitmap.read(memory, owner.vmcs["MSR_BITMAP"])


def _io_bitmap(owner: Owner, memory: PhysicalMemory, at_b: Optional[int]) -> "vmx_maps.IoBitmaps | svm_maps.IoPermissionMap | str":
    """The bitmaps, or why there are none."""
    if owner.page is not None:
        if owner.svm:
            return svm_maps.IoPermissionMap.read(memory, owner.page)
        if at_b is None:
            raise UsageError("VMX has two I/O bitmaps: give --at for A and --at-b for B")
        return vmx_maps.IoBitmaps.read(memory, owner.page, at_b)
    if owner.vmcb is not None:
        if not bits.table("intercept_misc1").test(owner.vmcb["intercept_misc1"], svm_maps.INTERCEPT_IOIO):
            return "the IOIO_PROT intercept is 0: no port access exits, whatever the map says"
        return svm_maps.IoPermissionMap.read(memory, owner.vmcb["iopm_base_pa"])
    assert owner.vmcs is not None
    if control(owner.vmcs, "proc", "USE_IO_BITMAPS") is not True:
        always = control(owner.vmcs, "proc", "UNCOND_IO_EXITING")
        verdict = "every port access exits" if always else "no port access exits"
        return f'primary control "Use I/O bitmaps" is 0 and "Unconditional I/O exiting" is {int(bool(always))}: {verdict}'
    return vmx_maps.IoBitmaps.read(memory, owner.vmcs["IO_BITMAP_A"], owner.vmcs["IO_BITMAP_B"])


def _msr_answer(owner: Owner, memory: PhysicalMemory, index: int, access: str) -> BitmapQuery:
    if owner.vmcs is not None:
        return vmx_maps.query_msr(owner.vmcs, memory, index, access)
    if owner.vmcb is not None:
        return svm_maps.query_msr(owner.vmcb, memory, index, access)
    found = msr_bitmap_of(owner, memory)
    if isinstance(found, str):
        raise UsageError(found)
    return found.query(index, access)


def _answers(answers: Sequence[BitmapQuery]) -> Block:
    table = Table("answers", (("what", "access"), ("exits", "exits"), ("why", "because"), ("byte", ""), ("bit", "")), headings=False, wrap="why")
    for answer in answers:
        verdict = (
            Value(None, "unknown", "warn")
            if answer.exits is None
            else Value(answer.exits, "exits" if answer.exits else "passes", "" if answer.exits else "good")
        )
        table.add(answer.what, verdict, answer.why, None if answer.byte is None else hexa(answer.byte, 3), answer.bit)
    return table


def _msr_table(access: str, ranges: Sequence[MsrRange], intercepted: bool) -> Table:
    title = f"{'Reads' if access == READ else 'Writes'} that {'exit' if intercepted else 'pass'}"
    table = Table(access, (("first", "first"), ("last", "last"), ("names", "names")), title=title, headings=False, empty="none")
    for item in ranges:
        names = ", ".join(item.names) if item.count < MANY else f"{item.count} MSRs, {len(item.names)} with a name"
        table.add(hexa(item.first, 8), hexa(item.last, 8) if item.last != item.first else text(""), Value(list(item.names), names))
    return table


def _python(found: object, owner: Owner, at_b: Optional[int] = None) -> str:
    package = "svm" if owner.svm else "vmx"
    name = type(found).__name__
    if owner.page is not None:
        addresses = f"{owner.page:#x}" + (f", {at_b:#x}" if at_b is not None else "")
    elif owner.vmcb is not None:
        addresses = f"{owner.vmcb['msrpm_base_pa' if 'Msr' in name else 'iopm_base_pa']:#x}"
    else:
        assert owner.vmcs is not None
        addresses = f"{owner.vmcs['MSR_BITMAP']:#x}" if "Msr" in name else f"{owner.vmcs['IO_BITMAP_A']:#x}, {owner.vmcs['IO_BITMAP_B']:#x}"
    return f"from vtdbg.{package}.bitmaps import {name}; bitmap = {name}.read(machine.memory, {addresses})"
