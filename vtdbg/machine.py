"""A dump or a live target as one thing: memory, processors, and where the values come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional

from vtdbg.memory.base import PhysicalMemory


@dataclass(frozen=True)
class Cpu:
    """One processor.  `registers` holds what the source knows, by lower-case name ("rip", "cr3", "efer", "gdtr_base",
    "gdtr_limit", "tr_selector", "tr_base", "tr_limit", "tr_attributes", ...); None or absent is "unknown", never 0."""

    index: int
    registers: Mapping[str, Optional[int]] = field(default_factory=dict)
    source: str = ""

    def get(self, name: str) -> Optional[int]:
        return self.registers.get(name)


@dataclass
class Machine:
    """`memory` is physical memory; `format` how it is stored ("elf", "raw", ...); `provenance` what a header line says of it;
    `details` further facts of the format for `source info`; `warnings` what a reader must know (truncated, stale, ...).
    `guest`: the memory is a guest's, and a VMCS in a software layout there (vmcs12) is one of its own hypervisor."""

    memory: PhysicalMemory
    name: str
    format: str
    provenance: str = ""
    cpus: List[Cpu] = field(default_factory=list)
    details: Dict[str, str] = field(default_factory=dict)
    warnings: List[str] = field(default_factory=list)
    live: bool = False
    guest: bool = False

    def refresh(self) -> None:
        """Before something is said of it: a live target that has run finds out anew where its processor is.  A dump does not change."""
        return

    def host_registers(self) -> Mapping[str, Optional[int]]:
        """What is known of the registers with which the hypervisor runs that owns this memory; empty where a source cannot tell its registers
        from those of a guest, as a dump cannot."""
        return {}

    def current(self, kind: str) -> Optional[int]:
        """The address of the control block ("vmcs" or "vmcb") that the selected processor has current by its hypervisor's own objects."""
        return None

    def kind_of(self, address: int) -> str:
        """"vmcs" or "vmcb" where the hypervisor's own objects say which the control block at `address` is, else ""."""
        return ""

    def owner(self, address: int) -> str:
        """Whose control block it is at `address`, by the hypervisor's own objects."""
        return ""

    def consider(self, kind: str, address: int) -> None:
        """A control block (`kind` as a scan classifies it) that was found or named: a live target compares its processor with it."""
        return
