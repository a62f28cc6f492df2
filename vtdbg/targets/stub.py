"""Which stub is at the other end?  Found out by asking it, never assumed.

QEMU has `qqemu.PhyMemMode` (docs/system/gdb.rst, "Using unusual CPU modes"/"Examining physical memory") and a monitor; VMware's stub switches
with `monitor phys` and `monitor virt` and has no query; Bochs' has neither, and no control registers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Tuple

from vtdbg.memory.base import Range, merge_ranges
from vtdbg.targets.port import Port, TargetError, TargetGone

QUERY, SET = "qqemu.PhyMemMode", "Qqemu.PhyMemMode:"

NO_PHYSICAL = (
    "this stub cannot read physical memory: it has neither QEMU's PhyMemMode nor VMware's `monitor phys` (Bochs' own stub is such a one).  "
    "Page tables, VMCS and VMCB cannot be reached through it; write the memory to a file in the emulator and open that, "
    "or give values by hand (vmcs --text, exit explain --reason)"
)


@dataclass(frozen=True)
class Dialect:
    """`name` "qemu", "vmware" or "plain"; `physical` how it reads physical memory: "mode" (PhyMemMode), "monitor" (monitor phys), or "" for not
    at all; `monitor` whether `monitor` commands are answered."""

    name: str
    physical: str
    monitor: bool

    @property
    def title(self) -> str:
        return {"qemu": "QEMU", "vmware": "VMware"}.get(self.name, "a stub without physical reads")


def probe(port: Port) -> Dialect:
    """Asks the stub what it is.  The target's state is not changed.  Raises TargetGone where nobody answers."""
    answer = _ask(port, QUERY)
    if answer in (b"0", b"1"):
        return Dialect("qemu", "mode", monitor=bool(_monitor(port, "info version")))
    words = _monitor(port, "help")
    if re.search(r"\bphys\b", words) and re.search(r"\bvirt\b", words):
        return Dialect("vmware", "monitor", monitor=True)
    return Dialect("plain", "", monitor=bool(words))


def _ask(port: Port, packet: str) -> bytes:
    try:
        return port.packet(packet)
    except TargetGone:
        raise
    except TargetError:
        return b""


def _monitor(port: Port, command: str) -> str:
    try:
        return port.monitor(command)
    except TargetGone:
        raise
    except TargetError:
        return ""


# --- what QEMU's monitor prints ---------------------------------------------------------------------------------------------------

_RAM_LINE = re.compile(r"^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (ram|rom|romd|nv-ram)\): (\S+)", re.M)


def ram_blocks(mtree: str) -> List[Range]:
    """RAM and ROM of the system's address space out of `info mtree -f`, piece by piece: neighbours are of different regions."""
    for view in re.split(r"^FlatView #\d+\s*$", mtree, flags=re.M):
        if re.search(r'AS "memory"', view):
            return [(int(first, 16), int(last, 16) - int(first, 16) + 1) for first, last, _, _ in _RAM_LINE.findall(view)]
    return []


def ram_ranges(mtree: str) -> List[Range]:
    """What there is of RAM and ROM; QEMU answers zeros for everything else."""
    return merge_ranges(ram_blocks(mtree))


_TABLE = re.compile(r"^(GDT|IDT)\s*=\s*([0-9a-f]+)\s+([0-9a-f]+)", re.M)
_SEGMENT = re.compile(r"^(CS|LDT|TR)\s*=\s*([0-9a-f]+)\s+([0-9a-f]+)\s+([0-9a-f]+)\s+([0-9a-f]+)", re.M)
_CONTROL = re.compile(r"\b(CR[0234]|EFER)\s*=\s*([0-9a-f]+)")
_CPL = re.compile(r"\bCPL=(\d)")


def info_registers(text: str) -> Dict[str, int]:
    """GDTR, IDTR, LDTR, TR, control registers and EFER out of `monitor info registers`: what the stub's own registers lack."""
    found: Dict[str, int] = {}
    for name, base, limit in _TABLE.findall(text):
        key = name.lower() + "r"
        found[f"{key}_base"], found[f"{key}_limit"] = int(base, 16), int(limit, 16)
    for name, selector, base, limit, flags in _SEGMENT.findall(text):
        key = {"TR": "tr", "LDT": "ldtr"}.get(name, "cs")
        found[f"{key}_base"], found[f"{key}_limit"] = int(base, 16), int(limit, 16)
        found[f"{key}_attributes"] = int(flags, 16) >> 8 & 0xF0FF
        if name != "CS":
            # CS by its selector is among the stub's own registers.
            found[f"{key}_selector"] = int(selector, 16)
    for name, value in _CONTROL.findall(text):
        found[name.lower()] = int(value, 16)
    level = _CPL.search(text)
    if level:
        found["cpl"] = int(level.group(1))
    return found


_HEADING = re.compile(r"^CPU#(\d+)\s*$", re.M)
_GENERAL = re.compile(r"\b([RE](?:AX|BX|CX|DX|SI|DI|BP|SP|IP)|R\d+)\s*=\s*([0-9a-f]+)")


def sections(text: str) -> Dict[int, str]:
    """`monitor info registers -a` by the number of QEMU's processor; a QEMU that knows no -a shows one, without a heading: 0."""
    parts = _HEADING.split(text)
    return {int(parts[at]): parts[at + 1] for at in range(1, len(parts), 2)} or {0: text}


def of_processor(text: str, live: Mapping[str, Optional[int]], number: Callable[[], Optional[int]] = lambda: None) -> Dict[str, int]:
    """What the monitor says of the processor with the general registers `live`; empty where no processor has them.

    The monitor has a processor of its own, the first one, whichever thread the debugger has selected.  `number` (QEMU's number of the thread)
    is asked only where several processors have the same registers and different tables.
    """
    same = {cpu: section for cpu, section in sections(text).items() if _same_registers(section, live)}
    found = {cpu: info_registers(section) for cpu, section in same.items()}
    first = next(iter(found.values()), {})
    if all(item == first for item in found.values()):
        return first
    mine = number()
    return {} if mine is None else found.get(mine, {})


def _same_registers(section: str, live: Mapping[str, Optional[int]]) -> bool:
    compared = False
    for name, shown in _GENERAL.findall(section):
        wide = name.startswith("R")
        mine = live.get(name.lower() if wide else "r" + name[1:].lower())
        if mine is None:
            continue
        if int(shown, 16) != (mine if wide else mine & 0xFFFFFFFF):
            return False
        compared = True
    return compared


_NUMBER = re.compile(r"\bCPU\s?#(\d+)")


def number_in(title: str) -> Optional[int]:
    """QEMU's number of a processor in the name that its stub gives the thread ("CPU#1 [running]")."""
    found = _NUMBER.search(title)
    return int(found.group(1)) if found else None


def halted(port: Port, dialect: Dialect) -> bool:
    """Does QEMU say of the selected processor that it is halted?  It executes nothing until an interrupt, not even a single step."""
    return dialect.name == "qemu" and "[halted" in port.processors().get(port.selected() or 0, "")


def all_registers(port: Port, dialect: Dialect) -> Mapping[str, Optional[int]]:
    """The port's registers with what the monitor adds of the same processor; absent is unknown."""
    registers = dict(port.registers())
    if dialect.name == "qemu":
        text = _monitor(port, "info registers -a") or _monitor(port, "info registers")
        for name, value in of_processor(text, registers, lambda: number_in(port.processors().get(port.selected() or 0, ""))).items():
            if registers.get(name) is None:
                registers[name] = value
    return registers


def gpa_to_hva(text: str) -> Optional[Tuple[str, int]]:
    """`monitor gpa2hva A`: the region's name and the address in QEMU's own process."""
    found = re.search(r"\((.*?)\) is (0x[0-9a-f]+)", text)
    return (found.group(1), int(found.group(2), 16)) if found else None
