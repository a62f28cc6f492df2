"""The guest of a #VMEXIT with its memory: the instruction at its RIP, and the walk of the nested tables behind a nested page fault."""

from __future__ import annotations

from typing import FrozenSet, Iterator, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.errors import UsageError, VtdbgError
from vtdbg.explain import Fact
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.views import GuestPhysicalMemory, LinearMemory
from vtdbg.svm.exit_codes import ExitCode
from vtdbg.svm.npt import Npt, npt_walk
from vtdbg.svm.vmcb import Vmcb
from vtdbg.walk import Access
from vtdbg.x86.code import instruction_at
from vtdbg.x86.disasm import Instruction, code_mode, disassemble
from vtdbg.x86.paging import Paging

NP_ENABLE, SEV = 1, 2
"""Of nested_ctl (APM vol. 2, appendix VMCB Layout, Control Area)."""


class SvmGuest:
    """Registers, mode and linear memory of the guest.  `memory` is host-physical memory; `ncr3` replaces the VMCB's nested_cr3."""

    def __init__(self, vmcb: Vmcb, memory: Optional[PhysicalMemory] = None, ncr3: Optional[int] = None) -> None:
        self.vmcb, self.memory, self.ncr3 = vmcb, memory, ncr3

    def segment_base(self, segment: str) -> Optional[int]:
        return self.vmcb.get(f"{segment.lower()}.base")

    def mode(self) -> Optional[int]:
        """16, 32 or 64: how the guest's code is decoded; None where EFER or the attributes of CS are unknown."""
        efer, attributes = self.vmcb.get("efer"), self.vmcb.get("cs.attrib")
        table = bits.table("vmcb_attrib")
        return code_mode(None if efer is None else bits.table("efer").test(efer, "LMA"),
                         None if attributes is None else table.test(attributes, "L"), None if attributes is None else table.test(attributes, "DB"))

    def nested_root(self) -> Optional[int]:
        """The nested CR3 that the guest runs on, None without nested paging; UsageError where that is not known."""
        if self.ncr3 is not None:
            return self.ncr3
        control, root = self.vmcb.get("nested_ctl"), self.vmcb.get("nested_cr3")
        if control is not None and not control & NP_ENABLE:
            return None
        if control is None or root is None:
            raise UsageError("the guest's nested tables are not known: give nCR3, or a VMCB with nested_ctl and nested_cr3")
        return root

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at linear `address`, through the guest's paging and the nested tables.

        Raises MemoryUnavailable with the level that stopped, UsageError where what a walk begins with is not known or memory is encrypted.
        """
        if self.memory is None:
            raise UsageError("no memory was given")
        if (self.vmcb.get("nested_ctl") or 0) & SEV:
            raise UsageError("SEV: the guest's memory is encrypted with its own key")
        cr3, root = self.vmcb.get("cr3"), self.nested_root()
        if cr3 is None:
            raise UsageError(f"the VMCB ({self.vmcb.origin}) has no cr3")
        paging = Paging.from_registers(self.vmcb.get("cr0"), cr3, self.vmcb.get("cr4"), self.vmcb.get("efer"))
        below = self.memory if root is None else GuestPhysicalMemory(self.memory, Npt(root))
        return LinearMemory(below, paging).read(address, size)


def code_facts(guest: SvmGuest, row: ExitCode) -> Tuple[Optional[Instruction], Tuple[Fact, ...]]:
    """The instruction at RIP, from memory or from the bytes that the exit saved; a fact that says why there is none where memory was given."""
    rip, mode = guest.vmcb.get("rip"), guest.mode()
    if rip is None or mode is None or row.category in ("software", "vmgexit") or row.advance == "undefined":
        return None, ()
    label = {"trap": "next instruction", "event": "next instruction", "none": "first instruction"}.get(row.advance, "instruction")
    found, problem = (None, "") if guest.memory is None else instruction_at(guest, rip, mode)
    source = "memory"
    saved = _saved_bytes(guest.vmcb) if row.insn else b""
    if found is None and saved:
        found, source = disassemble(saved, rip, mode), "insn_bytes"
    if found is None:
        return None, (Fact(label, None, f"not read: {problem}", group="code"),) if problem else ()
    return found, (Fact(label, found.address, f"{found.data.hex(' ')}  {found.text} ({mode}-bit code)", source, _mismatch(guest.vmcb, row, found),
                        "code"),)


def _saved_bytes(vmcb: Vmcb) -> bytes:
    """What the processor fetched (APM vol. 2, Decode Assists); empty where it saved none."""
    length, data = vmcb.get("insn_len"), vmcb.get("insn_bytes")
    return data.to_bytes(15, "little")[:min(length, 15)] if length and data is not None else b""


_MNEMONICS: Mapping[str, Tuple[str, ...]] = {
    "MSR": ("rdmsr", "wrmsr"), "SWINT": ("int",), "ICEBP": ("int1",), "WBINVD": ("wbinvd", "wbnoinvd"), "MONITOR": ("monitor", "monitorx"),
    "MWAIT": ("mwait", "mwaitx"), "MWAIT_COND": ("mwait", "mwaitx"), "IDLE_HLT": ("hlt",), "PUSHF": ("pushf", "pushfd", "pushfq"),
    "POPF": ("popf", "popfd", "popfq"), "IRET": ("iret", "iretd", "iretq"), "IOIO": ("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd"),
}
_PLAIN = frozenset({"RDTSC", "RDPMC", "CPUID", "RSM", "INVD", "PAUSE", "HLT", "INVLPG", "INVLPGA", "VMRUN", "VMMCALL", "VMLOAD", "VMSAVE", "STGI",
                    "CLGI", "SKINIT", "RDTSCP", "XSETBV", "RDPRU", "INVPCID"})


def _mismatch(vmcb: Vmcb, row: ExitCode, found: Instruction) -> str:
    wanted: FrozenSet[str] = frozenset(_MNEMONICS.get(row.name, ())) or (frozenset({row.name.lower()}) if row.name in _PLAIN else frozenset())
    if wanted and not wanted & set(found.mnemonic.split()):
        return f"not the instruction of this exit ({' or '.join(sorted(wanted))}): RIP was advanced since, or the memory is of another time"
    next_rip = vmcb.get("next_rip")
    if row.nrip and next_rip and next_rip != found.next:
        return f"it ends at {found.next:#x}, next_rip is {next_rip:#x}: the memory is of another time"
    return ""


def nested_walk_facts(guest: SvmGuest, gpa: Optional[int], info1: Optional[int]) -> Iterator[Fact]:
    """What the nested tables say now of the address of a nested page fault; a warning where they do not give this exit any more."""
    if guest.memory is None or gpa is None or info1 is None:
        return
    table = bits.table("npf_info1")
    write, fetch = table.test(info1, "RW"), table.test(info1, "ID")
    wanted = Access(not write and not fetch, write, fetch, user=True, linear="page-walk" if table.test(info1, "GPT") else "translation")
    try:
        root = guest.nested_root()
        if root is None:
            return
        walk = npt_walk(guest.memory, root, gpa, wanted)
    except VtdbgError as error:
        yield Fact("NPT walk", None, f"not done: {error}", group="npt walk")
        return
    warning = ""
    if walk.outcome == "mapped":
        warning = "these tables allow the access: they changed since (the handler mapped the page), or the memory is of another time"
    last = walk.steps[-1] if walk.steps else None
    where = f"{walk.outcome}: {walk.reason}" if walk.reason else walk.outcome
    if walk.hpa is not None:
        where += f", host-physical {walk.hpa:#x}"
    yield Fact("NPT walk", last.entry if last is not None else None, where, f"nCR3 {root:#x}", warning, "npt walk")
