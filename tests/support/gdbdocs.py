"""The GDB sessions that README.md and docs/ show, typed into a real GDB at a terminal and compared.

After a deliberate change: VTDBG_UPDATE_GOLDEN=1 pytest tests/test_gdb_live.py tests/test_gdb_vmx.py tests/test_gdb_linux.py -k documented
rewrites them; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Dict, Iterator, List, Match, Tuple

from support.ptygdb import PtyGdb

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "gdb.md")
BLOCK = re.compile(r"^```\n(\(gdb\) .*?)^```$", re.M | re.S)
MACHINES = ("live, QEMU at", "live, VMware at")
SYMBOLS = re.compile(r"^\(gdb\) (?:add-symbol-file|kvm|thread)\b", re.M)
"""Sessions with these are of the lab with two processors and KVM's symbols."""
CUT = "..."
"""A line that stands for the rest of a long output."""


def sessions(machine: str, symbols: bool = False) -> "Iterator[Tuple[Path, str]]":
    """(document, session) of every shown session on that machine, with KVM's symbols or without."""
    for path in DOCUMENTS:
        for match in BLOCK.finditer(path.read_text()):
            if machine in match.group(1) and (SYMBOLS.search(match.group(1)) is not None) == symbols:
                yield path, match.group(1)


def unknown_sessions() -> List[str]:
    """Sessions of no machine that a test has: nobody would compare them."""
    found = [match.group(1) for path in DOCUMENTS for match in BLOCK.finditer(path.read_text())]
    return [session for session in found if not any(name in session for name in MACHINES)]


def check(gdb: PtyGdb, machine: str, symbols: bool = False) -> int:
    """Types every session on the machine, in order; how many there were.  Fails where something else is shown now."""
    count = 0
    for path, session in list(sessions(machine, symbols)):
        real = ""
        for command, shown in re.findall(r"^\(gdb\) ([^\n]*)\n((?:(?!\(gdb\) ).*\n)*)", session, re.M):
            lines = [line.rstrip() for line in gdb.command(command).rstrip("\n").split("\n")]
            wanted = shown.splitlines()
            if CUT in wanted:
                lines = [*lines[:wanted.index(CUT)], CUT]
            real += f"(gdb) {command}\n" + "".join(f"{line}\n" for line in lines)
        count += 1
        if os.environ.get("VTDBG_UPDATE_GOLDEN"):
            path.write_text(path.read_text().replace(session, real))
            continue
        assert normalised(session) == normalised(real), f"{path.name} shows something else than GDB does now:\n{real}"
    return count


def normalised(text: str) -> str:
    """Without what differs from run to run: the port, GDB's history numbers, the numbers of processes, and which addresses they are.  The same
    address in two places is still the same; line breaks follow the length of the port."""
    names: Dict[str, str] = {}

    def name(match: Match[str]) -> str:
        return names.setdefault(match.group(0), f"address{len(names)}") if int(match.group(0), 16) >= 0x1000 else match.group(0)

    text = re.sub(r"127\.0\.0\.1:\d+", "HOST:PORT", text)
    text = re.sub(r"^\$\d+ = ", "$N = ", text, flags=re.M)
    text = re.sub(r"\b0x[0-9a-f]+\b", name, text)
    text = re.sub(r"\s+", " ", text)
    # Not that of the first process.
    for number, process in enumerate(dict.fromkeys(re.findall(r"\bprocess ([2-9]|\d\d+)\b", text))):
        text = re.sub(rf"\b{process}\b", f"process{number}", text)
    return text
