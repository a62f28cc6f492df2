"""Extended page tables: the level tables, the misconfiguration rules, and what the processor reports for an access.

Sources: SDM vol. 3, The Extended Page Table Mechanism (EPT Translation Mechanism; EPT Violations; EPT Misconfigurations; Prioritization
of EPT Misconfigurations and EPT Violations); Table "Exit Qualification for EPT Violations".  Compared with Bochs 783b58f paging.cc and
Linux 6.12 vmx.h.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, List, NamedTuple, Optional, Protocol, Tuple

from vtdbg import bits
from vtdbg.errors import UsageError
from vtdbg.kvm_entries import software_words
from vtdbg.level_tables import MAXPHYADDR, Right, RuleSpec, Tables, TableSet, compile_tables, long_levels, memory_type_of
from vtdbg.memory.base import PhysicalMemory
from vtdbg.walk import (
    OUTCOMES,
    Access,
    AccessLike,
    Descent,
    EntrySource,
    MemorySource,
    Step,
    Walk,
    check_address,
    denied,
    descend,
    parse_access,
    reason_of,
)

if TYPE_CHECKING:
    from vtdbg.vmx.vmcs import Vmcs

_MISCONFIGURATIONS = "SDM vol. 3, EPT Misconfigurations"
_VIOLATIONS = "SDM vol. 3, EPT Violations"

EPT = TableSet(
    "ept", "EPT",
    levels=long_levels("ept_"),
    present=("R", "W", "X", "XU"),
    rights=(
        Right("r", "R", "read"),
        Right("w", "W", "write"),
        Right("x", "X", "execute"),
        Right("u", "XU", "execute for user-mode linear addresses", when=(("mbec", True),)),
    ),
    rules=(
        RuleSpec("write-without-read", "bit 0 (R) is 0 and bit 1 (W) is 1: a writable page has to be readable", _MISCONFIGURATIONS,
                 ("R", "W"), (0b10,)),
        RuleSpec("execute-only", "bit 0 (R) is 0 and bit 2 (X) is 1, and the processor does not support execute-only translations "
                 "(IA32_VMX_EPT_VPID_CAP[0]=0)", _MISCONFIGURATIONS, ("R", "X"), (0b10,), when=(("execute-only", False),)),
        RuleSpec("user-execute-only", "bit 0 (R) is 0 and bit 10 (XU) is 1, and the processor does not support execute-only translations "
                 "(IA32_VMX_EPT_VPID_CAP[0]=0)", _MISCONFIGURATIONS, ("R", "XU"), (0b10,), when=(("execute-only", False), ("mbec", True))),
        RuleSpec("memory-type", "the memory type (bits 5:3) is 2, 3 or 7, which are reserved", _MISCONFIGURATIONS,
                 ("MEMORY_TYPE",), (2, 3, 7), on="leaf"),
        RuleSpec("page-size-1g", "bit 7 is 1 and the processor does not support 1-GByte pages (IA32_VMX_EPT_VPID_CAP[17]=0)",
                 _MISCONFIGURATIONS, ("PS",), on="leaf", levels=(3,), when=(("1g", False),)),
        RuleSpec("page-size-2m", "bit 7 is 1 and the processor does not support 2-MByte pages (IA32_VMX_EPT_VPID_CAP[16]=0)",
                 _MISCONFIGURATIONS, ("PS",), on="leaf", levels=(2,), when=(("2m", False),)),
        RuleSpec("paging-write-without-read", "bit 0 (R) is 0 and bit 58 (paging-write access) is 1", _MISCONFIGURATIONS, ("R", "PWA"), (0b10,),
                 on="leaf", when=(("paging-write", True),)),
    ),
    see="SDM vol. 3, EPT Translation Mechanism",
    optional=(("XU", (("mbec", True),)), ("A", (("ad", True),)), ("D", (("ad", True),)), ("SSS", (("sss", True),)), ("SPP", (("spp", True),)),
              ("PWA", (("paging-write", True),)), ("VGP", (("verify-paging", True),))))

_EPTP = "SDM vol. 3, Extended-Page-Table Pointer (EPTP); Checks on VMX Controls, VM-Execution Control Fields"


class EptCapabilities(Protocol):
    """What the walk asks of a processor; `vtdbg.VmxCapabilities` answers it.  None is "unknown"."""

    @property
    def physical_address_width(self) -> Optional[int]: ...

    @property
    def ept_vpid_cap(self) -> Optional[int]:
        """IA32_VMX_EPT_VPID_CAP, MSR 0x48c."""


def eptp_problems(eptp: int, caps: Optional[EptCapabilities] = None) -> List[str]:
    """Why VM entry refuses this EPTP; [] where it does not (SDM vol. 3, Checks on VMX Controls)."""
    table = bits.table("eptp")
    cap_table = bits.table("ept_vpid_cap")
    cap = caps.ept_vpid_cap if caps is not None else None

    def lacks(ident: str) -> bool:
        return cap is not None and not cap_table.test(cap, ident)

    problems = []
    memory_type, length = table.get(eptp, "MEMORY_TYPE"), table.get(eptp, "WALK_LENGTH")
    if memory_type not in (0, 6):
        problems.append(f"memory type (bits 2:0) is {memory_type}: it has to be 0 (UC) or 6 (WB)")
    elif lacks("WB" if memory_type == 6 else "UC"):
        problems.append(f"memory type (bits 2:0) {memory_type} is not supported by the processor (IA32_VMX_EPT_VPID_CAP)")
    if length not in (3, 4):
        problems.append(f"page-walk length (bits 5:3) is {length}: it has to be 3 (4 levels) or 4 (5 levels)")
    elif lacks("WALK_4" if length == 3 else "WALK_5"):
        problems.append(f"a page-walk length of {length + 1} levels is not supported by the processor (IA32_VMX_EPT_VPID_CAP)")
    if table.test(eptp, "AD") and lacks("AD"):
        problems.append("bit 6 (accessed and dirty flags) is 1 and the processor does not support it (IA32_VMX_EPT_VPID_CAP[21]=0)")
    if table.test(eptp, "SSS") and lacks("SSS"):
        problems.append("bit 7 (supervisor shadow-stack) is 1 and the processor does not support it (IA32_VMX_EPT_VPID_CAP[23]=0)")
    problems.extend(f"reserved bits {wrong.field.bits} are {wrong.number:#x}" for wrong in table.reserved_violations(eptp))
    width = (caps.physical_address_width if caps is not None else None) or MAXPHYADDR
    if table.get(eptp, "ROOT") >> width:
        problems.append(f"the root table's address {table.get(eptp, 'ROOT'):#x} has bits at or above the physical-address width ({width})")
    return problems


@dataclass(frozen=True)
class Ept:
    """An EPT: its pointer, and the processor state that decides how its entries are read.

    `caps` None: a processor that supports everything and has 52 physical-address bits is assumed, and walks say so.  `mbec`, `paging_write`,
    `spp` and `verify_paging` are the controls of these names in the VMCS; accessed/dirty flags and shadow-stack are in the EPTP.
    """

    eptp: int
    caps: Optional[EptCapabilities] = None
    mbec: bool = False
    paging_write: bool = False
    spp: bool = False
    verify_paging: bool = False
    unknown: Tuple[str, ...] = ()

    @classmethod
    def from_vmcs(cls, vmcs: "Vmcs", caps: Optional[EptCapabilities] = None) -> "Ept":
        """The EPT that a VMCS uses.  UsageError where the VMCS has no EPTP or "enable EPT" is 0."""
        from vtdbg.vmx.controls import control, control_name

        eptp = vmcs.get("EPT_POINTER")
        if eptp is None:
            raise UsageError(f"the VMCS ({vmcs.origin}) has no EPT pointer; give the EPTP")
        if control(vmcs, "sec", "EPT") is False:
            raise UsageError(f"EPT is not in use: {control_name('sec', 'EPT')} is 0 in the VMCS ({vmcs.origin})")
        states = {name: control(vmcs, word, ident) for name, word, ident in _CONTROLS}
        unknown = tuple(f"{control_name(word, ident)} unknown: taken as 0" for name, word, ident in _CONTROLS if states[name] is None)
        return cls(eptp, caps, **{name: bool(state) for name, state in states.items()}, unknown=unknown)

    @cached_property
    def root(self) -> int:
        return bits.table("eptp").get(self.eptp, "ROOT")

    @property
    def registers(self) -> Optional[Tuple[int, ...]]:
        return None

    @property
    def sign_bits(self) -> int:
        return 0

    def reaches(self, rights: int) -> bool:
        return bool(rights)

    @cached_property
    def access_flags(self) -> bool:
        """EPTP[6]: accessed and dirty flags are in use."""
        return bits.table("eptp").test(self.eptp, "AD")

    @cached_property
    def levels(self) -> int:
        return 5 if bits.table("eptp").get(self.eptp, "WALK_LENGTH") == 4 else 4

    @cached_property
    def root_problem(self) -> str:
        problems = eptp_problems(self.eptp, self.caps)
        if not problems:
            return ""
        hint = ""
        if self.eptp == self.root:
            hint = f"; if this is the address of a root table, walk it as {self.eptp | 0x1E:#x} (4 levels, WB)"
        return f"EPTP {self.eptp:#x} is not valid: {'; '.join(problems)} (VM entry fails with error 7){hint}"

    @cached_property
    def tables(self) -> Tables:
        cap = self.caps.ept_vpid_cap if self.caps is not None else None
        table = bits.table("ept_vpid_cap")
        names = {name for name, ident in _FEATURES if cap is None or table.test(cap, ident)}
        switches = (("mbec", self.mbec), ("paging-write", self.paging_write), ("spp", self.spp), ("verify-paging", self.verify_paging),
                    ("ad", self.access_flags), ("sss", bits.table("eptp").test(self.eptp, "SSS")))
        names.update(name for name, on in switches if on)
        width = self.caps.physical_address_width if self.caps is not None else None
        return compile_tables(EPT, self.levels, width or MAXPHYADDR, frozenset(names))

    @cached_property
    def assumptions(self) -> Tuple[str, ...]:
        texts = list(self.unknown)
        if self.caps is None or self.caps.ept_vpid_cap is None:
            texts.append("IA32_VMX_EPT_VPID_CAP unknown: execute-only translations, 2-MByte and 1-GByte pages taken as supported")
        if self.caps is None or self.caps.physical_address_width is None:
            texts.append(f"physical-address width unknown: {MAXPHYADDR} taken")
        return tuple(texts)

    def walk(self, memory: PhysicalMemory, address: int, access: AccessLike = None, *, source: Optional[EntrySource] = None) -> Walk:
        """Where guest-physical `address` goes, and what the processor does for `access`; never raises for what the tables hold."""
        wanted = parse_access(access)
        gpa = check_address(address, "guest-physical address")
        structure = f"EPT, {self.levels} levels"
        if self.root_problem:
            return Walk("nested", structure, self.root, gpa, (), "misconfiguration", self.root_problem, wanted, assumptions=self.assumptions)
        tables = self.tables
        if gpa >> min(tables.address_bits, MAXPHYADDR):
            limit = min(tables.address_bits, MAXPHYADDR)
            return Walk("nested", structure, self.root, gpa, (), "violation",
                        f"guest-physical address {gpa:#x} has bits above {limit - 1}: "
                        + (f"EPT of {self.levels} levels translates {limit} bits" if limit < MAXPHYADDR else "no processor has such an address"),
                        wanted, qualification=None if wanted is None or gpa >> MAXPHYADDR else self._qualification(wanted, 0, None),
                        assumptions=self.assumptions)
        found = descend(source or MemorySource(memory), tables, self.root, gpa)
        return self._judge(found, structure, wanted)

    def _judge(self, found: Descent, structure: str, access: Optional[Access]) -> Walk:
        outcome = OUTCOMES[found.end]
        reason = "" if found.end == "leaf" else reason_of(found, lambda step: software_words(step, found.address, "ept"))
        memory_type: Optional[str] = None
        notes: Tuple[str, ...] = ()
        if found.end == "leaf":
            outcome, reason = self._permitted(found, access)
            memory_type = memory_type_of(found.last.table, found.last.entry or 0)
            notes = self._notes(found.last)
        qualification = self._qualification(access, found.rights, found.last) if access is not None and outcome == "violation" else None
        return Walk("nested", structure, found.root, found.address, found.steps, outcome, reason, access, found.maps_to, found.page_size,
                    found.permissions, memory_type, qualification, None if outcome == "mapped" else found.hole, found.last.broken,
                    notes, self.assumptions)

    def _permitted(self, found: Descent, access: Optional[Access]) -> Tuple[str, str]:
        if access is None:
            if self.reaches(found.rights):
                return "mapped", ""
            return "violation", "no access is allowed: the entries together grant neither read, write nor execute"
        if access.shadow_stack and access.user is not True and bits.table("eptp").test(self.eptp, "SSS"):
            return self._shadow_stack(found)
        for mask, what in self._needed(access):
            if not found.rights & mask:
                return "violation", denied(found, mask, what)
        return "mapped", ""

    def _needed(self, access: Access) -> List[Tuple[int, str]]:
        """The rights that an access needs, as (mask in an entry, words)."""
        tables = self.tables
        needed = []
        if access.read:
            needed.append((tables.right("r"), "read"))
        if access.write:
            needed.append((tables.right("w"), "write"))
        elif access.linear == "page-walk" and self.access_flags:
            # EPTP[6]: the processor treats its accesses to guest paging structures as writes (SDM vol. 3, Accessed and Dirty Flags for EPT).
            needed.append((tables.right("w"), "write (an access to a guest paging structure counts as one while EPTP[6]=1)"))
        if access.fetch:
            user = self.mbec and bool(access.user)
            needed.append((tables.right("u" if user else "x"), "fetch by a user-mode linear address" if user else "fetch"))
        return needed

    def _shadow_stack(self, found: Descent) -> Tuple[str, str]:
        """Supervisor shadow-stack access with EPTP[7]=1: R in every entry, W in all but the leaf, SSS in the leaf."""
        tables, leaf = found.tables, found.last
        read, write = tables.right("r"), tables.right("w")
        if not found.rights & read:
            return "violation", denied(found, read, "supervisor shadow-stack access")
        for step in found.steps[:-1]:
            if step.entry is not None and not step.entry & write:
                return "violation", denied(found, write, "supervisor shadow-stack access")
        if leaf.entry is not None and not leaf.table.test(leaf.entry, "SSS"):
            return "violation", f"supervisor shadow-stack access is not allowed: EPTP[7]=1 and the leaf has SSS=0 (bit 60, entry {leaf.entry:#x})"
        return "mapped", ""

    def _notes(self, leaf: Step) -> Tuple[str, ...]:
        notes = []
        if self.spp and leaf.entry is not None and "SPP" in leaf.table.idents() and leaf.table.test(leaf.entry, "SPP"):
            notes.append("sub-page write permissions apply to this page: a write that bit 1 forbids may be allowed by the sub-page table")
        if self.verify_paging and leaf.entry is not None and leaf.table.test(leaf.entry, "VGP"):
            notes.append("guest-paging verification applies to this page: it can cause a violation that this walk does not predict")
        return tuple(notes)

    def _qualification(self, access: Access, rights: int, leaf: Optional[Step]) -> int:
        """The exit qualification of an EPT violation (SDM vol. 3, table "Exit Qualification for EPT Violations").

        `rights` is the AND over the entries used.  Bits 9 to 11 (advanced information) need the guest's own tables: `vtdbg.translate` adds
        them where the processor reports them.
        """
        table = bits.table("qual_ept")
        page_walk = access.linear == "page-walk"
        write = access.write or (page_walk and self.access_flags)
        numbers = {"READ": access.read or (page_walk and self.access_flags), "WRITE": write, "FETCH": access.fetch,
                   "READABLE": rights & self.tables.right("r"), "WRITABLE": rights & self.tables.right("w"),
                   "EXECUTABLE": rights & self.tables.right("x"), "USER_EXECUTABLE": rights & self.tables.right("u"),
                   "GLA_VALID": access.linear is not None, "TRANSLATED": access.linear == "translation", "SHSTK_ACCESS": access.shadow_stack,
                   "SSS_PAGE": bits.table("eptp").test(self.eptp, "SSS") and leaf is not None and leaf.leaf and leaf.entry is not None
                   and leaf.table.test(leaf.entry, "SSS")}
        return table.encode(**{ident: int(bool(number)) for ident, number in numbers.items()})


_FEATURES = (("execute-only", "EXECUTE_ONLY"), ("1g", "1GB_PAGES"), ("2m", "2MB_PAGES"))
_CONTROLS = (("mbec", "sec", "MODE_BASED_EPT_EXEC"), ("spp", "sec", "SUB_PAGE_WRITE"),
             ("paging_write", "tert", "EPT_PAGING_WRITE_CONTROL"), ("verify_paging", "tert", "GUEST_PAGING_VERIFICATION"))


def ept_walk(memory: PhysicalMemory, eptp: int, gpa: int, access: AccessLike = None, caps: Optional[EptCapabilities] = None, *,
             mbec: bool = False, paging_write: bool = False, spp: bool = False, verify_paging: bool = False) -> Walk:
    """Walk guest-physical address `gpa` through the EPT at `eptp` (an EPTP: root address, page-walk length, memory type), both in bytes.

    `access` is None ("where does it go"), a text like "r", "write", "user fetch", "page-walk", or an `Access`; with it, `.outcome` and
    `.qualification` are what the processor does.  `caps` is a `VmxCapabilities`; without it the walk assumes a processor that supports everything
    and says so in `.assumptions`.  The flags are the VMCS controls mode-based execute, paging-write, sub-page permissions, paging verification.

    Never raises for the contents of the tables; raises UsageError for an address that is not a 64-bit number or an access that is none.
    Source: SDM vol. 3, The Extended Page Table Mechanism (EPT).
    """
    check_address(eptp, "EPTP")
    return ept_for(eptp, caps, mbec=mbec, paging_write=paging_write, spp=spp, verify_paging=verify_paging).walk(memory, gpa, access)


def ept_for(eptp: int, caps: Optional[EptCapabilities] = None, *, mbec: bool = False, paging_write: bool = False, spp: bool = False,
            verify_paging: bool = False) -> Ept:
    """`Ept` for these values; what depends on the pointer and the processor only is worked out once for many walks."""
    known = _Known(None, None) if caps is None else _Known(caps.physical_address_width, caps.ept_vpid_cap)
    return _ept(eptp, known, mbec, paging_write, spp, verify_paging)


class _Known(NamedTuple):
    """The two values of a processor that decide, as a key."""

    physical_address_width: Optional[int]
    ept_vpid_cap: Optional[int]


@lru_cache(maxsize=64)
def _ept(eptp: int, caps: _Known, mbec: bool, paging_write: bool, spp: bool, verify_paging: bool) -> Ept:
    return Ept(eptp, caps, mbec, paging_write, spp, verify_paging)
