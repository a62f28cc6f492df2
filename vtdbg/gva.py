"""Two-dimensional translation: linear -> guest-physical through the guest's tables, guest-physical -> host-physical through EPT or NPT.

Every guest paging-structure entry lies at a guest-physical address that is itself walked through the nested tables (SDM vol. 3, Guest-Physical
Addresses; APM vol. 2, Nested Table Walk), so a translation can stop in either dimension, at any level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.level_tables import Permissions
from vtdbg.machine import Machine
from vtdbg.memory.base import PhysicalMemory
from vtdbg.svm.npt import Npt
from vtdbg.vmx.ept import Ept, EptCapabilities, ept_for
from vtdbg.walk import Access, AccessLike, Fetched, Step, Structure, Walk, check_address, parse_access, where
from vtdbg.x86.paging import Paging

_NESTED_ENTRY = Access(read=True, linear="page-walk")


@dataclass(frozen=True)
class Translation:
    """Where a linear address goes, in both dimensions.

    `guest` is the walk of the guest's tables (each step has the nested walk of its entry in `.nested`), `final` the nested walk of the
    address it gave (None where the guest's walk did not get that far, or without nested tables).  `outcome` as for `Walk`, for the dimension
    that stopped; `dimension` ("guest" or "nested"), `level` and `reason` say where and why; `fault` is the walk that stopped.
    """

    gva: int
    guest: Walk
    final: Optional[Walk]
    outcome: str
    reason: str = ""
    fault: Optional[Walk] = None
    nested_structure: str = ""
    notes: Tuple[str, ...] = ()

    @property
    def mapped(self) -> bool:
        return self.outcome == "mapped"

    @property
    def gpa(self) -> Optional[int]:
        """The guest-physical address; without nested tables it is the physical address.  None where the guest's tables give none."""
        return self.guest.hpa

    @property
    def hpa(self) -> Optional[int]:
        if self.outcome != "mapped":
            return None
        return self.guest.hpa if self.final is None else self.final.hpa

    @property
    def dimension(self) -> Optional[str]:
        """Which dimension stopped the translation; None where none did."""
        return self.fault.dimension if self.fault is not None else None

    @property
    def level(self) -> Optional[int]:
        return self.fault.level if self.fault is not None else None

    @property
    def qualification(self) -> Optional[int]:
        """What the processor reports: page-fault error code (guest), exit qualification or EXITINFO1 (nested)."""
        return self.fault.qualification if self.fault is not None else None

    @property
    def steps(self) -> Tuple[Step, ...]:
        """Every entry that is read, in the processor's order: the nested entries that lead to a guest entry, then that entry."""
        steps: List[Step] = []
        for step in self.guest.steps:
            steps.extend(step.nested.steps if step.nested is not None else ())
            steps.append(step)
        steps.extend(self.final.steps if self.final is not None else ())
        return tuple(steps)

    @property
    def page_size(self) -> Optional[int]:
        """Bytes that are contiguous in every dimension: the smaller of the two pages."""
        sizes = [walk.page_size for walk in (self.guest, self.final) if walk is not None and walk.page_size is not None]
        return min(sizes) if self.outcome == "mapped" else None

    @property
    def permissions(self) -> Permissions:
        """What both dimensions allow; "u" (user access) is the guest's."""
        if self.final is None:
            return self.guest.permissions
        nested = self.final.permissions
        return Permissions("".join(letter if letter in "u-" or letter in nested else "-" for letter in self.guest.permissions))

    @property
    def memory_type(self) -> Optional[str]:
        return self.guest.memory_type if self.final is None else self.final.memory_type

    @property
    def access(self) -> Optional[Access]:
        return self.guest.access

    @property
    def assumptions(self) -> Tuple[str, ...]:
        seen: Dict[str, None] = {}
        for walk in (self.guest, self.final, *(step.nested for step in self.guest.steps)):
            seen.update(dict.fromkeys(walk.assumptions if walk is not None else ()))
        return tuple(seen)


class _ThroughNested:
    """Guest paging-structure entries, each found by a nested walk of its own."""

    def __init__(self, memory: PhysicalMemory, nested: Structure) -> None:
        self._memory, self._nested = memory, nested

    def fetch(self, address: int, size: int) -> Fetched:
        walk = self._nested.walk(self._memory, address, _NESTED_ENTRY)
        if walk.hpa is None:
            return Fetched(None, f"its guest-physical address {address:#x} is not mapped: {walk.reason}", walk)
        try:
            return Fetched(int.from_bytes(self._memory.read(walk.hpa, size), "little"), "", walk, walk.hpa)
        except MemoryUnavailable as error:
            return Fetched(None, f"{error.space} address {walk.hpa:#x}: {error.reason}", walk, walk.hpa)


def translate(machine: Union[Machine, PhysicalMemory], gva: int, cr3: Optional[int] = None, eptp: Optional[int] = None,
              paging: Union[None, str, Paging] = None, *, ncr3: Optional[int] = None, nested: Optional[Structure] = None,
              access: AccessLike = None, caps: Optional[EptCapabilities] = None, cpu: int = 0) -> Translation:
    """Translate linear address `gva`: GVA -> GPA -> HPA, every step of both dimensions.

    `paging` is a `Paging`, a mode by name ("4-level", "5-level", "PAE", "32-bit", "none"), or None / "auto": of processor `cpu` where the machine
    knows its registers and no nested tables are given, else 4-level (said in `.assumptions`).  `cr3` None is that of `paging` or of the processor.
    `eptp`, `ncr3` or `nested` (an `Ept` or `Npt`) are the nested tables; without them `gva` is an address of the host.  `access` as for `ept_walk`.

    Raises UsageError where CR3 is not known or two nested tables are given; never for what the tables hold.
    """
    wanted = parse_access(access)
    check_address(gva, "linear address")
    memory = machine.memory if isinstance(machine, Machine) else machine
    tables = _nested_tables(eptp, ncr3, nested, caps)
    mode = _paging(machine, cr3, paging, cpu, nested=tables is not None)
    if tables is None:
        guest = mode.walk(memory, gva, wanted)
        return Translation(gva, guest, None, guest.outcome, guest.reason, None if guest.mapped else guest)
    if tables.root_problem:
        # Nothing runs with this root: the guest's tables are not looked at.
        final = tables.walk(memory, 0, wanted)
        unread = replace(mode.walk(memory, gva, wanted, source=_Refuses(tables.root_problem)), outcome="unreadable", reason=tables.root_problem)
        return Translation(gva, unread, None, final.outcome, final.reason, final, final.structure)
    guest = mode.walk(memory, gva, wanted, source=_ThroughNested(memory, tables))
    structure = next((step.nested.structure for step in guest.steps if step.nested is not None), "")
    if guest.hpa is None:
        culprit = guest.steps[-1].nested if guest.outcome == "unreadable" and guest.steps else None
        if culprit is not None and not culprit.mapped:
            step = guest.steps[-1]
            return Translation(gva, guest, None, culprit.outcome, f"the guest's {where(step)} is not reachable: {culprit.reason}", culprit, structure)
        return Translation(gva, guest, None, guest.outcome, guest.reason, guest, structure)
    final = tables.walk(memory, guest.hpa, wanted)
    final = _advanced(final, guest, tables, caps)
    return Translation(gva, guest, final, final.outcome, final.reason, None if final.mapped else final, final.structure,
                       _flag_updates(guest, wanted) + final.notes)


class _Refuses:
    """No entry can be read: the nested root is not valid."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def fetch(self, address: int, size: int) -> Fetched:
        return Fetched(None, self._reason)


def _nested_tables(eptp: Optional[int], ncr3: Optional[int], nested: Optional[Structure],
                   caps: Optional[EptCapabilities]) -> Optional[Structure]:
    if sum(item is not None for item in (eptp, ncr3, nested)) > 1:
        raise UsageError("give one of eptp, ncr3 and nested")
    if eptp is not None:
        return ept_for(check_address(eptp, "EPTP"), caps)
    if ncr3 is not None:
        return Npt(check_address(ncr3, "nCR3"), width=caps.physical_address_width if caps is not None else None)
    return nested


def _paging(machine: Union[Machine, PhysicalMemory], cr3: Optional[int], paging: Union[None, str, Paging], cpu: int, *, nested: bool) -> Paging:
    if isinstance(paging, Paging):
        return paging if cr3 is None else paging.with_cr3(cr3)
    registers = machine.cpus[cpu] if isinstance(machine, Machine) and 0 <= cpu < len(machine.cpus) and not nested else None
    known = registers.get("cr3") if registers is not None else None
    root = cr3 if cr3 is not None else known
    if root is None:
        raise UsageError("CR3 is not known: give cr3" + (" (the guest's, GUEST_CR3)" if nested else ""))
    if paging is not None and paging.lower() != "auto":
        return Paging.named(paging, root)
    if registers is not None and registers.get("cr4") is not None:
        return Paging.from_registers(registers.get("cr0"), root, registers.get("cr4"), registers.get("efer"), pat=registers.get("pat"))
    return replace(Paging.named("4-level", root), unknown=("paging mode not given: 4-level taken",))


def _flag_updates(guest: Walk, access: Optional[Access]) -> Tuple[str, ...]:
    """What the processor writes to the guest's tables on the way, where the nested tables do not let it: it sets A in the entries that it
    uses, and D in the leaf for a write (SDM vol. 3, Accessed and Dirty Flags; EPT Violations)."""
    notes = []
    for step in guest.steps if access is not None else ():
        if step.nested is None or step.entry is None or "w" in step.nested.permissions:
            continue
        idents = step.table.idents()
        flags = [flag for flag, needed in (("A", True), ("D", access is not None and access.write and step.leaf))
                 if needed and flag in idents and not step.table.test(step.entry, flag)]
        if flags:
            notes.append(f"the processor has to set {' and '.join(flags)} in the guest's {where(step)}, whose page the nested tables do not let it "
                         "write: a violation")
    return tuple(notes)


def _advanced(final: Walk, guest: Walk, tables: Structure, caps: Optional[EptCapabilities]) -> Walk:
    """Bits 11:9 of an EPT violation's qualification: what the guest's own tables say of the page, where the processor reports it.

    SDM vol. 3, table "Exit Qualification for EPT Violations": only with IA32_VMX_EPT_VPID_CAP[22] and for a translated linear address.
    """
    if final.qualification is None or not isinstance(tables, Ept) or final.access is None or final.access.linear != "translation":
        return final
    known = caps or tables.caps
    cap = known.ept_vpid_cap if known is not None else None
    if cap is None or not bits.table("ept_vpid_cap").test(cap, "ADVANCED_EXIT_INFO"):
        return final
    rights = guest.permissions
    extra = bits.table("qual_ept").encode(USER=int(rights.user), GUEST_RW=int(rights.write), GUEST_XD=int(not rights.execute))
    return replace(final, qualification=final.qualification | extra)
