"""`exit trace`: a live target runs from exit to exit; each in one line, then how many of which kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, Mapping, Optional

from vtdbg.commands.live import live_machine
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import chosen_vmcb, chosen_vmcs
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.report import FINDINGS, Lines, Report, Table, Value, hexa
from vtdbg.targets.live import LiveMachine
from vtdbg.targets.trace import Exit, trace

MSR_READ, MSR_WRITE, IO = 31, 32, 30
"""SDM vol. 3, appendix VMX Basic Exit Reasons."""
SVM_IO, SVM_MSR = 0x7B, 0x7C
"""APM vol. 2, appendix SVM Intercept Exit Codes."""


@verb(
    "exit trace",
    "resume the target to its exit handler, again and again, and note each exit",
    Arg("handler", "address", "where the handler begins: an address or symbol (HOST_RIP, or behind VMRUN)"),
    Opt("--count", "int", "how many exits", default=20),
    Opt("--vmcs", "address", "physical address of the VMCS (default: HOST_RIP's, or the only one)"),
    Opt("--vmcb", "address", "physical address of the VMCB"),
    Opt("--timeout", "int", "seconds to wait for one exit, where the debugger can"),
    live=True,
)
def exit_trace(session: Session, handler: int, count: int, vmcs: Optional[int], vmcb: Optional[int], timeout: Optional[int]) -> Report:
    """RESUMES the target.  It sets a breakpoint of its own, removes it, and stops the target at the last exit; Ctrl-C ends it earlier."""
    if not 1 <= count <= 100000:
        raise UsageError(f"--count {count}: 1 to 100000 exits")
    if vmcs is not None and vmcb is not None:
        raise UsageError("give one of --vmcs and --vmcb")
    machine = live_machine(session)

    def read() -> Exit:
        session.forget()
        machine.refresh()
        try:
            return replace(_exit(session, machine, vmcs, vmcb), processor=machine.port.selected())
        finally:
            # GDB reads memory of its own while it resumes.
            machine.mode.virtual()

    machine.mode.virtual()
    with machine.port.quiet():
        found = trace(machine.port, handler, count, read, timeout)
    session.forget()
    report = Report("exit trace", header=session.header(), notes=list(machine.warnings), python=[
        *session.python_open(), "from vtdbg.targets.trace import trace", "# trace(machine.port, handler, count, read)"])
    if found.ended:
        report.notes.append(f"after {len(found.exits)} of {count} exits: {found.ended}")
        report.status = FINDINGS
    several = len({item.processor for item in found.exits}) > 1
    table = Table("exits", (("number", "#"), *((("processor", "processor"),) * several), ("code", "exit"),
                            ("name", "name"), ("rip", "guest RIP"), ("summary", "what")), empty="no exit")
    for number, item in enumerate(found.exits, 1):
        whose = [Value(item.processor, "" if item.processor is None else str(item.processor))] * several
        table.add(str(number), *whose, Value(item.code, f"{item.code:#x}"), item.name, hexa(item.rip), item.summary)
    report.add(table)
    for key, title, rows in (("reasons", "By reason", found.by_reason()), ("accesses", "By MSR or port", found.by_access())):
        if rows:
            counts = Table(key, (("what", "what"), ("count", "count")), title=title, headings=False)
            for what, number in rows:
                counts.add(what, str(number))
            report.add(counts)
    places = Table("places", (("rip", "guest RIP"), ("count", "count")), title="By guest RIP", headings=False)
    for rip, number in found.by_rip()[:20]:
        places.add(hexa(rip), str(number))
    report.add(places)
    if len(found.by_rip()) > 20:
        report.add(Lines("more", [Value(None, f"... and {len(found.by_rip()) - 20} more addresses", "dim")]))
    return report


def _exit(session: Session, machine: LiveMachine, vmcs: Optional[int], vmcb: Optional[int]) -> Exit:
    if vmcs is None and vmcb is None:
        block = machine.where.block
        if block is None:
            vmcs = machine.current("vmcs")
        else:
            vmcs, vmcb = (block.address, None) if block.kind == "vmcs" else (None, block.address)
    live = machine.registers()
    if vmcs is not None:
        return _vmx(session, vmcs, live)
    return _svm(session, vmcb, live)


def _vmx(session: Session, address: int, live: Mapping[str, Optional[int]]) -> Exit:
    from vtdbg.vmx.exits import explain_vm_exit

    item = chosen_vmcs(session, address)[0].vmcs
    # A VM exit does not touch the general registers: at the handler's first instruction they are the guest's.
    registers = {name: value for name, value in live.items() if name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")}
    found = explain_vm_exit(vmcs=item, registers=registers)
    what = ""
    if found.code in (MSR_READ, MSR_WRITE) and live.get("rcx") is not None:
        what = f"MSR {(live['rcx'] or 0) & 0xFFFFFFFF:#x} {'read' if found.code == MSR_READ else 'write'}"
    if found.code == IO:
        qualification = item.get("EXIT_QUALIFICATION") or 0
        what = f"port {qualification >> 16 & 0xFFFF:#x} {'in' if qualification & 8 else 'out'}"
    return Exit(found.code, found.name, item.get("GUEST_RIP"), getattr(found, "summary", "") or found.title, what)


def _svm(session: Session, address: Optional[int], live: Mapping[str, Optional[int]]) -> Exit:
    from vtdbg.svm.exits import explain_svm_exit

    item = chosen_vmcb(session, address)[0].vmcb
    known: Dict[str, Optional[int]] = {name: value for name, value in live.items() if name in ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")}
    found = explain_svm_exit(vmcb=item, registers=known, memory=session.machine.memory)
    what, info = "", item.get("exit_info_1") or 0
    if found.code == SVM_MSR and live.get("rcx") is not None:
        what = f"MSR {(live['rcx'] or 0) & 0xFFFFFFFF:#x} {'write' if info & 1 else 'read'}"
    if found.code == SVM_IO:
        what = f"port {info >> 16 & 0xFFFF:#x} {'in' if info & 1 else 'out'}"
    return Exit(found.code, found.name, item.get("rip"), getattr(found, "summary", "") or found.title, what)
