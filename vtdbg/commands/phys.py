"""`phys`: physical memory, host's or guest's, in the formats of GDB's `x`."""

from __future__ import annotations

from typing import List, Optional, Set, Tuple

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.report import Lines, Report, Table, Value, hexa

ROW = 16
MOST = 1 << 16
LENGTH = 128
BITS = ("16", "32", "64")


@verb(
    "phys",
    "physical memory: numbers, text, instructions",
    Arg("address", "text", "physical address"),
    Arg("fmt", "text", "as GDB's x has it: a count, x d u o t a c f s i z, and b h w g (8gx, 4i, /16xb)", nargs="?"),
    Opt("--length", "int", "without a format: how many bytes (default 128)"),
    Opt("--guest", "flag", "the address is guest-physical: through the EPT or NPT of the guest that runs, or of the only one there is"),
    Opt("--bits", "choice", "instructions: the code is 16-, 32- or 64-bit (default: what the processor's mode is)", choices=BITS),
)
def phys(session: Session, address: str, fmt: Optional[str], length: Optional[int], guest: bool, bits: Optional[str]) -> Report:
    """Without a format two 64-bit numbers a row, lowest address first, and the bytes as text; what is not ASCII is a dot.

    A format is a count, a letter and a size, in this order or another: x and z hexadecimal, d signed, u unsigned, o octal, t binary, a address,
    c character, f floating point, s string, i instruction; b 1 byte, h 2, w 4, g 8.  It can stand in front of the address with its slash:
    phys /8gx 0x1000.
    """
    if address.startswith("/"):
        if fmt is None:
            raise UsageError(f"phys {address}: where? Give the address behind the format")
        address, fmt = fmt, address
    at = int(session.resolved(session.convert("address", address)))
    if fmt is not None and length is not None:
        raise UsageError(f"give one of --length and a format: {fmt} says how many there are")
    memory = session.machine.memory
    if guest:
        from vtdbg.commands.values import guest_memory

        memory = guest_memory(session)
    if fmt is None:
        if bits is not None:
            raise UsageError("--bits is for instructions: give the format i, for instance 8i")
        report = _numbers(memory, at, LENGTH if length is None else length)
        python = f"print(machine.memory.read({at:#x}, {LENGTH if length is None else length}).hex())"
    else:
        report = _examined(session, memory, at, fmt, guest, bits)
        python = f"from vtdbg.examine import parse_format, rows; print(rows(machine.memory, {at:#x}, parse_format({fmt!r})))"
    report.header = session.header()
    report.notes = [*session.machine.warnings, *report.notes]
    report.python = [*session.python_open(), python]
    return report


def _numbers(memory: PhysicalMemory, address: int, length: int) -> Report:
    if not 0 < length <= MOST:
        raise UsageError(f"--length {length}: from 1 to {MOST} bytes")
    data = memory.read(address, length)
    table = Table("rows", (("address", "address"), ("low", "+0"), ("high", "+8"), ("bytes", ""), ("text", "text")))
    for at in range(0, length, ROW):
        row = data[at:at + ROW]
        halves = [Value(half.hex(), f"{int.from_bytes(half, 'little'):#0{2 * len(half) + 2}x}" if half else "") for half in (row[:8], row[8:])]
        table.add(hexa(address + at, 12), *halves, Value(row.hex(), ""), _printable(row))
    return Report("phys", [table])


def _examined(session: Session, memory: PhysicalMemory, address: int, fmt: str, guest: bool, bits: Optional[str]) -> Report:
    from vtdbg.examine import code, parse_format, rows

    wanted = parse_format(fmt)
    report = Report("phys")
    if wanted.letter != "i":
        if bits is not None:
            raise UsageError("--bits is for instructions: give the format i, for instance 8i")
        lines = [Value({"address": f"{row.address:#x}", "values": list(row.data)}, f"{row.address:#014x}  {'  '.join(row.texts)}".rstrip())
                 for row in rows(memory, address, wanted)]
        report.add(Lines("rows", lines, verbatim=True))
        return report
    mode, why = (int(bits), "") if bits is not None else _mode(session, guest)
    if why:
        report.notes.append(why)
    table = Table("code", (("address", "address"), ("bytes", "bytes"), ("text", "instruction")), headings=False)
    for at, data, text in code(memory, address, wanted.count, mode):
        table.add(hexa(at, 12), data.hex(" "), text)
    report.add(table)
    return report


def _mode(session: Session, guest: bool) -> Tuple[int, str]:
    """Bitness of the code, and what has to be said where nothing tells it."""
    if guest:
        from vtdbg.commands.values import guest_mode

        mode, whose = guest_mode(session), "the guest"
    else:
        mode, whose = _host_mode(session), "the processor"
    return (64, f"the mode of {whose} is not known: shown as 64-bit code (--bits says otherwise)") if mode is None else (mode, "")


def _host_mode(session: Session) -> Optional[int]:
    from vtdbg.x86.disasm import code_mode

    machine = session.machine
    machine.refresh()
    found: Set[Optional[int]] = set()
    for cpu in machine.cpus:
        cr0, efer, rights = cpu.get("cr0"), cpu.get("efer"), cpu.get("cs_attributes")
        if cr0 is not None and not cr0 & 1:
            found.add(16)
            continue
        long_mode = None if efer is None else bool(efer >> 10 & 1)
        # A hypervisor's code in long mode is 64-bit: VM exits load CS with L=1, and VMRUN is not a thing of compatibility mode.
        found.add(code_mode(long_mode, True if rights is None else bool(rights >> 13 & 1), None if rights is None else bool(rights >> 14 & 1)))
    return found.pop() if len(found) == 1 else None


def _printable(row: bytes) -> str:
    characters: List[str] = [chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row]
    return "".join(characters)
