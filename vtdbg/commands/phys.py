"""`phys`: bytes of physical memory, as numbers and as text."""

from __future__ import annotations

from typing import List

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.report import Report, Table, Value, hexa

ROW = 16
MOST = 1 << 16


@verb(
    "phys",
    "bytes of physical memory, as 64-bit numbers and as text",
    Arg("address", "address", "physical address"),
    Opt("--length", "int", "how many bytes (default 128)", default=128),
    Opt("--guest", "flag", "the address is guest-physical: through the EPT or NPT of the guest that runs, or of the only one there is"),
)
def phys(session: Session, address: int, length: int, guest: bool) -> Report:
    """Two 64-bit numbers a row, lowest address first, and the bytes as text; what is not ASCII is a dot."""
    if not 0 < length <= MOST:
        raise UsageError(f"--length {length}: from 1 to {MOST} bytes")
    memory = session.machine.memory
    if guest:
        from vtdbg.targets.values import guest_memory

        memory = guest_memory(session)
    data = memory.read(address, length)
    table = Table("rows", (("address", "address"), ("low", "+0"), ("high", "+8"), ("bytes", ""), ("text", "text")))
    for at in range(0, length, ROW):
        row = data[at:at + ROW]
        halves = [Value(half.hex(), f"{int.from_bytes(half, 'little'):#0{2 * len(half) + 2}x}" if half else "") for half in (row[:8], row[8:])]
        table.add(hexa(address + at, 12), *halves, Value(row.hex(), ""), _printable(row))
    return Report("phys", [table], session.header(), list(session.machine.warnings),
                  python=[*session.python_open(), f"print(machine.memory.read({address:#x}, {length}).hex())"])


def _printable(row: bytes) -> str:
    characters: List[str] = [chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row]
    return "".join(characters)
