"""Nested page tables: the host's own table formats, walked for guest-physical addresses, and what #VMEXIT(NPF) reports.

Sources: APM vol. 2, Nested Paging (Nested Table Walk; Nested versus Guest Page Faults, Fault Ordering; Guest Mode Execute Trap
Extension); Long-Mode Page Translation.  Compared with Linux 6.1 arch/x86/kvm and Bochs 783b58f paging.cc.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Mapping, Optional, Protocol, Tuple

from vtdbg import bits
from vtdbg.errors import UsageError
from vtdbg.kvm_entries import software_words
from vtdbg.level_tables import Right, RuleSpec, Tables, TableSet, compile_tables, long_levels, memory_type_of
from vtdbg.memory.base import PhysicalMemory
from vtdbg.walk import (
    OUTCOMES,
    Access,
    AccessLike,
    Descent,
    EntrySource,
    MemorySource,
    Walk,
    check_address,
    denied,
    descend,
    parse_access,
    reason_of,
)

if TYPE_CHECKING:
    from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86.paging import LEGACY, PAE, ROOT_MASKS, Paging, features, mode_named

_SEE = "APM vol. 2, Page-Translation-Table Entry Fields, Reserved Bits"

NPT = TableSet(
    "npt", "NPT",
    levels=long_levels("npt_", third="PDPE"),
    present=("P",),
    rights=(Right("r", "P", "read"), Right("w", "RW", "write"), Right("x", "NX", "execute", inverted=True), Right("u", "US", "user access")),
    rules=(RuleSpec("nx-disabled", "bit 63 (NX) is reserved while the host's EFER.NXE is 0", _SEE, ("NX",), when=(("nxe", False),)),),
    see="APM vol. 2, Nested Paging; Long-Mode Page Translation",
    # Nested translations have neither global pages nor protection keys: software may use the bits.
    optional=(("G", (("global", True),)), ("MPK", (("pkeys", True),))))

FORMATS: Mapping[str, Tuple[TableSet, int]] = {"32-bit": (LEGACY, 2), "PAE": (PAE, 3), "4-level": (NPT, 4), "5-level": (NPT, 5)}
"""The host's paging mode -> (table set, highest level): nested tables have the format of the host's own."""

ASSUMED_WIDTH = 51
"""Taken where the physical-address width is unknown.  Processors with 52 bits exist, but none has memory at 2^51, and KVM marks MMIO
entries with bit 51: to take it for an address would invent a translation (Linux 6.1, arch/x86/kvm/mmu/spte.c, kvm_mmu_reset_all_pte_masks)."""


class HasWidth(Protocol):
    """What the walk asks of a processor; `vtdbg.SvmCapabilities` and `vtdbg.VmxCapabilities` answer it."""

    @property
    def physical_address_width(self) -> Optional[int]: ...


@dataclass(frozen=True)
class Npt:
    """Nested page tables: nCR3, and the host state that decides how the entries are read.

    `mode` is the host's paging mode at VMRUN (None: 4-level is taken and said).  `width` is the physical-address width (CPUID 80000008h EAX[7:0],
    less what memory encryption takes), None: 51 is taken and said.  `nxe` is the host's EFER.NXE (None: 1 is taken).  `c_bit` is the number
    of the encryption bit of SEV or SME, which is no address bit.  `gmet` and `read_only_gpt` are bits 3 and 6 of nested_ctl.
    """

    ncr3: int
    mode: Optional[str] = None
    width: Optional[int] = None
    nxe: Optional[bool] = None
    pse: Optional[bool] = None
    c_bit: Optional[int] = None
    gmet: bool = False
    read_only_gpt: bool = False
    pat: Optional[int] = None

    @classmethod
    def from_vmcb(cls, vmcb: "Vmcb") -> "Npt":
        """The nested tables that a VMCB uses; UsageError where it has no nested CR3 or nested paging is off.

        Their format is that of the host's own paging at VMRUN (APM vol. 2, Nested Paging), which the VMCB does not say: 4-level is taken, and said.
        """
        control, root = vmcb.get("nested_ctl"), vmcb.get("nested_cr3")
        if control is None or root is None:
            raise UsageError(f"the VMCB ({vmcb.origin}) has no nested CR3; give the nCR3")
        table = bits.table("nested_ctl")
        if not table.test(control, "NP_ENABLE"):
            raise UsageError(f"nested paging is not in use: NP_ENABLE (nested_ctl bit 0) is 0 in the VMCB ({vmcb.origin})")
        return cls(root, gmet=table.test(control, "GMET"), read_only_gpt=table.test(control, "READ_ONLY_GPT"))

    def on_host(self, registers: "Mapping[str, Optional[int]]", mode: Optional[str] = None, width: Optional[int] = None) -> "Npt":
        """The same tables as a host with these registers at VMRUN uses them; `mode` and `width` where somebody said them.

        Only what is not as assumed is taken from the registers: a command says the same on a live host as on a dump of it.
        """
        if mode is None and registers.get("cr4") is not None and registers.get("efer") is not None:
            found = Paging.from_registers(registers.get("cr0"), 0, registers["cr4"], registers["efer"])
            mode = None if found.mode in ("4-level", "none") else found.mode
        efer = registers.get("efer")
        nxe = False if efer is not None and not bits.table("efer").test(efer, "NXE") else self.nxe
        return replace(self, mode=mode or self.mode, width=width or self.width, nxe=nxe)

    @cached_property
    def format(self) -> str:
        mode = mode_named(self.mode) if self.mode is not None else "4-level"
        if mode == "none":
            raise UsageError("nested paging needs a host that uses paging: give 4-level, 5-level, PAE or 32-bit")
        return mode

    @property
    def _c_mask(self) -> int:
        return 0 if self.c_bit is None else 1 << self.c_bit

    @cached_property
    def root(self) -> int:
        return self.ncr3 & ROOT_MASKS[self.format] & ~self._c_mask

    @cached_property
    def root_problem(self) -> str:
        beyond = self.ncr3 & ~self._c_mask
        width = self.width or ASSUMED_WIDTH
        if beyond >> width:
            return f"nCR3 {self.ncr3:#x} is not valid: it has bits at or above the physical-address width ({width}); VMRUN ends with VMEXIT_INVALID"
        return ""

    @property
    def registers(self) -> Optional[Tuple[int, ...]]:
        return None

    @property
    def sign_bits(self) -> int:
        return 0

    def reaches(self, rights: int) -> bool:
        return self.gmet or bool(rights & self.tables.right("u"))

    @cached_property
    def tables(self) -> Tables:
        spec, top = FORMATS[self.format]
        return compile_tables(spec, top, self.width or ASSUMED_WIDTH, features(self.nxe, self.pse), self._c_mask)

    @cached_property
    def assumptions(self) -> Tuple[str, ...]:
        texts = []
        if self.mode is None:
            texts.append("a VMCB does not say the host's paging mode: 4-level taken")
        if self.width is None:
            texts.append(f"physical-address width unknown: {ASSUMED_WIDTH} taken")
        if self.nxe is None and self.format != "32-bit":
            texts.append("a VMCB does not say the host's EFER.NXE: 1 taken")
        if self.pse is None and self.format == "32-bit":
            texts.append("the host's CR4.PSE unknown: 1 taken")
        if self.gmet:
            texts.append("guest mode execute trap: data accesses of supervisor mode taken as allowed on U/S=0 pages")
        return tuple(texts)

    def walk(self, memory: PhysicalMemory, address: int, access: AccessLike = None, *, source: Optional[EntrySource] = None) -> Walk:
        """Where guest-physical `address` goes, and the nested page fault that `access` causes; never raises for what the tables hold."""
        wanted = parse_access(access)
        gpa = check_address(address, "guest-physical address")
        structure = f"NPT, {self.format}"
        if self.root_problem:
            return Walk("nested", structure, self.root, gpa, (), "misconfiguration", self.root_problem, wanted, assumptions=self.assumptions)
        tables = self.tables
        if gpa >> tables.address_bits:
            limit = tables.address_bits
            return Walk("nested", structure, self.root, gpa, (), "violation",
                        f"guest-physical address {gpa:#x} has bits above {limit - 1}: {structure} translates {limit} bits",
                        wanted, qualification=None if wanted is None else self._info1(wanted, present=False, reserved=False),
                        assumptions=self.assumptions)
        found = descend(source or MemorySource(memory), tables, self.root, gpa)
        return self._judge(found, structure, wanted)

    def _judge(self, found: Descent, structure: str, access: Optional[Access]) -> Walk:
        outcome = OUTCOMES[found.end]
        memory_type: Optional[str] = None
        if found.end == "leaf":
            memory_type = memory_type_of(found.last.table, found.last.entry or 0, self.pat)
            outcome, reason = self._permitted(found, access)
        else:
            reason = reason_of(found, lambda step: software_words(step, found.address, "npt"), "has a reserved bit set")
        info1: Optional[int] = None
        if access is not None and outcome in ("violation", "misconfiguration"):
            info1 = self._info1(access, present=found.end != "not-present", reserved=found.end == "misconfigured")
        return Walk("nested", structure, found.root, found.address, found.steps, outcome, reason, access, found.maps_to, found.page_size,
                    found.permissions, memory_type, info1, None if outcome == "mapped" else found.hole, found.last.broken,
                    (), self.assumptions)

    def _writes(self, access: Access) -> bool:
        """The processor's accesses to guest page tables count as writes (APM vol. 2, Nested Table Walk), except with read-only guest
        page tables enabled."""
        return access.write or (access.linear == "page-walk" and not self.read_only_gpt)

    def _permitted(self, found: Descent, access: Optional[Access]) -> Tuple[str, str]:
        tables, rights = found.tables, found.rights
        user = tables.right("u")
        # Every guest access is a user access to the nested tables; with GMET, supervisor mode is told apart.
        if not rights & user and (not self.gmet or (access is not None and access.user)):
            return "violation", denied(found, user, "guest access (always a user access to the nested tables)")
        if access is None:
            return "mapped", ""
        if self._writes(access) and not rights & tables.right("w"):
            what = "write" if access.write else "write (an access to a guest page table counts as one)"
            return "violation", denied(found, tables.right("w"), what)
        if access.fetch:
            if tables.right("x") and not rights & tables.right("x"):
                return "violation", denied(found, tables.right("x"), "fetch")
            if self.gmet and rights & user and not access.user:
                return "violation", "fetch is not allowed: with guest mode execute trap, supervisor mode may not fetch from a page with U/S=1"
        return "mapped", ""

    def _info1(self, access: Access, *, present: bool, reserved: bool) -> int:
        """EXITINFO1 of #VMEXIT(NPF) (APM vol. 2, Nested versus Guest Page Faults, Fault Ordering)."""
        walking = access.linear == "page-walk"
        numbers = {"P": present, "RW": self._writes(access), "US": not self.gmet or bool(access.user), "RSV": reserved,
                   "ID": access.fetch and self.nxe is not False, "SS": access.shadow_stack, "FINAL": not walking, "GPT": walking}
        return bits.table("npf_info1").encode(**{ident: int(on) for ident, on in numbers.items()})


def npt_walk(memory: PhysicalMemory, ncr3: int, gpa: int, access: AccessLike = None, caps: Optional[HasWidth] = None, *,
             mode: Optional[str] = None, width: Optional[int] = None, nxe: Optional[bool] = None, pse: Optional[bool] = None,
             c_bit: Optional[int] = None, gmet: bool = False, read_only_gpt: bool = False, pat: Optional[int] = None) -> Walk:
    """Walk guest-physical address `gpa` through the nested page tables at `ncr3` (the VMCB's nested_cr3).

    `access` as for `ept_walk`.  `.outcome` is "violation" for an entry that is not present or forbids the access and "misconfiguration" for a
    reserved bit: both are a nested page fault, and `.qualification` (`.exitinfo1`) is its EXITINFO1.  `width` or `caps` give the physical-address
    width, `mode` the host's paging mode ("4-level", "5-level", "PAE", "32-bit"); for the rest see `Npt`.  What is not given is assumed, and
    `.assumptions` says so.

    Never raises for the contents of the tables; raises UsageError for an address that is not a 64-bit number, UnknownName for a mode.
    Source: APM vol. 2, Nested Paging.
    """
    check_address(ncr3, "nCR3")
    if c_bit is not None and not 32 <= c_bit <= 63:
        raise UsageError(f"the C-bit is an address bit between 32 and 63, not {c_bit}")
    known = width if width is not None or caps is None else caps.physical_address_width
    return _npt(ncr3, mode, known, nxe, pse, c_bit, gmet, read_only_gpt, pat).walk(memory, gpa, access)


@lru_cache(maxsize=64)
def _npt(ncr3: int, mode: Optional[str], width: Optional[int], nxe: Optional[bool], pse: Optional[bool], c_bit: Optional[int], gmet: bool,
         read_only_gpt: bool, pat: Optional[int]) -> Npt:
    """Walks of one root come in numbers; what depends on the root and the host only is worked out once."""
    return Npt(ncr3, mode, width, nxe, pse, c_bit, gmet, read_only_gpt, pat)

