"""x86 paging: the level tables of its four modes, and the page fault that an access causes.

Sources: SDM vol. 3, Paging (32-Bit Paging; PAE Paging; 4-Level Paging and 5-Level Paging; Access Rights; Page-Fault Exceptions);
APM vol. 2, Page Translation and Protection.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, FrozenSet, List, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.errors import UnknownName, UsageError
from vtdbg.level_tables import (
    MAXPHYADDR,
    EntryKind,
    LevelSpec,
    Permissions,
    Right,
    RuleSpec,
    Tables,
    TableSet,
    compile_tables,
    long_levels,
    memory_type_of,
)
from vtdbg.memory.base import PhysicalMemory
from vtdbg.names import near_names
from vtdbg.walk import (
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
    where,
)

if TYPE_CHECKING:
    from vtdbg.vmx.vmcs import Vmcs

_RIGHTS = (Right("r", "P", "read"), Right("w", "RW", "write"), Right("x", "XD", "execute", inverted=True), Right("u", "US", "user access"))
_RESERVED = "SDM vol. 3, Page-Fault Exceptions (RSVD flag)"
_XD = RuleSpec("xd-disabled", "bit 63 (XD) is reserved while IA32_EFER.NXE is 0", _RESERVED, ("XD",), when=(("nxe", False),))

LONG_MODE = TableSet(
    "x86-64", "x86-64 paging",
    levels=long_levels(),
    present=("P",), rights=_RIGHTS,
    rules=(_XD, RuleSpec("page-size-1g", "bit 7 (PS) is reserved: the processor does not support 1-GByte pages (CPUID.80000001H:EDX[26])",
                         _RESERVED, ("PS",), on="leaf", levels=(3,), when=(("1g", False),))),
    see="SDM vol. 3, 4-Level Paging and 5-Level Paging",
    # Bit 11 restarts HLAT paging, ordinary paging ignores it; keys without CR4.PKE and CR4.PKS are ignored.
    optional=(("R", (("hlat", True),)), ("PKEY", (("pkeys", True),))))

PAE = TableSet(
    "pae", "PAE paging",
    levels=(
        LevelSpec(3, "PDPTE", 30, 2, table="pae_pdpte"),
        LevelSpec(2, "PDE", 21, table="pae_pde", leaf="pae_pde_2m"),
        LevelSpec(1, "PTE", 12, leaf="pae_pte"),
    ),
    present=("P",), rights=_RIGHTS, rules=(_XD,), see="SDM vol. 3, PAE Paging")

LEGACY = TableSet(
    "32-bit", "32-bit paging",
    levels=(
        LevelSpec(2, "PDE", 22, 10, table="pde32", leaf="pde32_4m", leaf_needs="pse"),
        LevelSpec(1, "PTE", 12, 10, leaf="pte32"),
    ),
    present=("P",), rights=_RIGHTS, see="SDM vol. 3, 32-Bit Paging", entry_size=4)

MODES: Mapping[str, Tuple[Optional[TableSet], int]] = {
    "none": (None, 0), "32-bit": (LEGACY, 2), "PAE": (PAE, 3), "4-level": (LONG_MODE, 4), "5-level": (LONG_MODE, 5)}
"""Paging mode -> (table set, highest level)."""

ROOT_MASKS: Mapping[str, int] = {"none": 0, "32-bit": bits.mask(31, 12), "PAE": bits.mask(31, 5), "4-level": bits.mask(51, 12),
                                 "5-level": bits.mask(51, 12)}
"""The bits of CR3 that are the root table's address (SDM vol. 3, Paging, tables "Use of CR3 with ...")."""

_ALIASES = {"off": "none", "nopaging": "none", "32": "32-bit", "32bit": "32-bit", "legacy": "32-bit", "pse": "32-bit", "pae": "PAE",
            "long": "4-level", "4": "4-level", "4level": "4-level", "5": "5-level", "5level": "5-level", "la57": "5-level"}


def mode_named(name: str) -> str:
    """"4-level" for "4-level", "4level", "long", ...; UnknownName with the near ones."""
    for mode in MODES:
        if name.lower() == mode.lower():
            return mode
    mode = _ALIASES.get(name.lower().replace("-", "").replace("_", "").replace(" ", ""), "")
    if not mode:
        raise UnknownName("paging mode", name, near_names(name, [*MODES]) or tuple(MODES))
    return mode


@dataclass(frozen=True)
class Paging:
    """How linear addresses are translated: the mode, CR3, and the register bits that decide about access.

    A bit that is None is unknown: what is taken instead is said in the walk's `assumptions` where it matters (WP and NXE as 1, the others
    as 0).  `pdptes` are PAE's four entries where the processor keeps them in registers (the VMCS has them under EPT); without them they are
    read from memory at CR3.  `width` is MAXPHYADDR of the processor that does the paging (the virtual one of a guest), None unknown.
    `hlatp` and `hlat_prefix` are HLAT paging's root pointer and prefix size (VMCS fields of these names), None without HLAT.
    """

    mode: str
    cr3: int
    wp: Optional[bool] = None
    nxe: Optional[bool] = None
    pse: Optional[bool] = None
    smep: Optional[bool] = None
    smap: Optional[bool] = None
    pke: Optional[bool] = None
    pks: Optional[bool] = None
    pdptes: Optional[Tuple[int, int, int, int]] = None
    width: Optional[int] = None
    pkru: Optional[int] = None
    pkrs: Optional[int] = None
    pat: Optional[int] = None
    unknown: Tuple[str, ...] = ()
    hlatp: Optional[int] = None
    hlat_prefix: int = 0

    @classmethod
    def named(cls, mode: str, cr3: int, **known: Optional[bool]) -> "Paging":
        """A mode by name: "4-level", "5-level", "PAE", "32-bit", "none"; `known` are bits as in the constructor."""
        return cls(mode_named(mode), check_address(cr3, "CR3"), **known)  # type: ignore[arg-type]

    @classmethod
    def from_registers(cls, cr0: Optional[int], cr3: int, cr4: Optional[int], efer: Optional[int], *, long_mode: Optional[bool] = None,
                       pdptes: Optional[Tuple[int, int, int, int]] = None, width: Optional[int] = None, pkru: Optional[int] = None,
                       pkrs: Optional[int] = None, pat: Optional[int] = None) -> "Paging":
        """The mode out of register values; None is unknown.  `long_mode` says EFER.LMA where EFER itself is unknown (VM-entry control
        "IA-32e mode guest")."""
        unknown: List[str] = []
        lma = bits.table("efer").test(efer, "LMA") if efer is not None else long_mode
        mode = _mode(_test("cr0", cr0, "PG"), _test("cr4", cr4, "PAE"), lma, _test("cr4", cr4, "LA57"), unknown)
        return cls(mode, check_address(cr3, "CR3"), _test("cr0", cr0, "WP"), _test("efer", efer, "NXE"), _test("cr4", cr4, "PSE"),
                   _test("cr4", cr4, "SMEP"), _test("cr4", cr4, "SMAP"), _test("cr4", cr4, "PKE"), _test("cr4", cr4, "PKS"),
                   pdptes if mode == "PAE" else None, width, pkru, pkrs, pat, tuple(unknown))

    @classmethod
    def from_vmcs(cls, vmcs: "Vmcs", width: Optional[int] = None) -> "Paging":
        """The guest's paging out of a VMCS; UsageError where it has no GUEST_CR3.

        With EPT, a guest in PAE mode uses the VMCS's PDPTE fields and not memory (SDM vol. 3, Loading Page-Directory-Pointer-Table Entries).
        """
        from vtdbg.vmx.controls import control

        cr3 = vmcs.get("GUEST_CR3")
        if cr3 is None:
            raise UsageError(f"the VMCS ({vmcs.origin}) has no GUEST_CR3; give CR3")
        loaded = control(vmcs, "entry", "LOAD_IA32_EFER")
        pdptes = tuple(vmcs.get(f"GUEST_PDPTR{index}") for index in range(4))
        registers = pdptes if control(vmcs, "sec", "EPT") and None not in pdptes else None
        paging = cls.from_registers(vmcs.get("GUEST_CR0"), cr3, vmcs.get("GUEST_CR4"), vmcs.get("GUEST_IA32_EFER") if loaded else None,
                                    long_mode=control(vmcs, "entry", "IA32E_MODE"), pdptes=registers,  # type: ignore[arg-type]
                                    width=width, pat=vmcs.get("GUEST_IA32_PAT"))
        if control(vmcs, "tert", "HLAT"):
            return replace(paging, hlatp=vmcs.get("HLATP"), hlat_prefix=vmcs.get("HLAT_PREFIX_SIZE") or 0)
        return paging

    def with_cr3(self, cr3: int) -> "Paging":
        """The same mode with another root."""
        return replace(self, cr3=check_address(cr3, "CR3"), pdptes=None)

    @property
    def root(self) -> int:
        return self.cr3 & ROOT_MASKS[self.mode]

    @property
    def root_problem(self) -> str:
        return ""

    @property
    def registers(self) -> Optional[Tuple[int, ...]]:
        return self.pdptes

    @property
    def sign_bits(self) -> int:
        return self.linear_bits if self.linear_bits > 32 else 0

    def reaches(self, rights: int) -> bool:
        return True

    @property
    def linear_bits(self) -> int:
        return {"none": 32, "32-bit": 32, "PAE": 32, "4-level": 48, "5-level": 57}[self.mode]

    @property
    def title(self) -> str:
        spec, _ = MODES[self.mode]
        return "no paging" if spec is None else f"{self.mode} paging"

    @cached_property
    def tables(self) -> Tables:
        """The level tables; UsageError where paging is off."""
        spec, top = MODES[self.mode]
        if spec is None:
            raise UsageError("paging is off (CR0.PG=0): there are no tables")
        return compile_tables(spec, top, self.width or MAXPHYADDR, features(self.nxe, self.pse, keys=self.pke is not False or self.pks is not False))

    @cached_property
    def assumptions(self) -> Tuple[str, ...]:
        texts = list(self.unknown)
        if self.mode != "none" and self.width is None:
            texts.append(f"physical-address width of the paging processor unknown: {MAXPHYADDR} taken")
        if self.nxe is None and self.mode not in ("none", "32-bit"):
            texts.append("IA32_EFER.NXE unknown: 1 taken")
        if self.pse is None and self.mode == "32-bit":
            texts.append("CR4.PSE unknown: 1 taken")
        return tuple(texts)

    def walk(self, memory: PhysicalMemory, address: int, access: AccessLike = None, *, source: Optional[EntrySource] = None) -> Walk:
        """Where linear `address` goes in `memory`, and the page fault that `access` causes; never raises for what the tables hold.

        `outcome` "violation" is a page fault for an entry that is not present or forbids the access (or a non-canonical address, #GP),
        "misconfiguration" a page fault for a reserved bit; `qualification` is the page-fault error code.
        """
        wanted = parse_access(access)
        check_address(address, "linear address")
        if self.linear_bits == 32 and address >> 32:
            return self._without_tables(address, "violation", f"linear address {address:#x} has more than 32 bits ({self.title})", wanted)
        if self.mode == "none":
            return replace(self._without_tables(address, "mapped", "", wanted), maps_to=address, page_size=1 << 32, permissions=Permissions("rwxu"))
        if self.linear_bits != 32 and not canonical(address, self.linear_bits):
            reason = f"linear address {address:#x} is not canonical ({self.linear_bits} bits): #GP, no page fault"
            return self._without_tables(address, "violation", reason, wanted)
        entries = source or MemorySource(memory)
        restarted: Tuple[str, ...] = ()
        if self._in_hlat(address):
            found = descend(entries, self._hlat_tables, (self.hlatp or 0) & ROOT_MASKS[self.mode], address, "guest")
            restart = next((step for step in found.steps if step.present and not step.broken and step.table.test(step.entry or 0, "R")), None)
            if restart is None:
                return self._judge(found, wanted, hlat=True)
            restarted = (f"HLAT paging was left at {where(restart)} (restart, bit 11): ordinary paging translates the address",)
        walk = self._judge(descend(entries, self.tables, self.root, address, "guest", self.pdptes), wanted)
        return replace(walk, notes=restarted + walk.notes) if restarted else walk

    def _in_hlat(self, address: int) -> bool:
        """Does HLAT paging translate the address: are its upper `hlat_prefix` bits all 1 (SDM vol. 3, HLAT Paging)?"""
        if self.hlatp is None or self.mode not in ("4-level", "5-level"):
            return False
        return not self.hlat_prefix or address >> 64 - self.hlat_prefix == (1 << self.hlat_prefix) - 1

    @cached_property
    def _hlat_tables(self) -> Tables:
        spec, top = MODES[self.mode]
        assert spec is not None
        known = features(self.nxe, self.pse, keys=self.pke is not False or self.pks is not False)
        return compile_tables(spec, top, self.width or MAXPHYADDR, known | {"hlat"})

    def _without_tables(self, address: int, outcome: str, reason: str, access: Optional[Access]) -> Walk:
        return Walk("guest", self.title, self.root, address, (), outcome, reason, access, assumptions=self.assumptions)

    def _judge(self, found: Descent, access: Optional[Access], *, hlat: bool = False) -> Walk:
        outcome = _OUTCOMES[found.end]
        reason, memory_type, code, assumed = "", None, None, self.assumptions
        if found.end == "leaf":
            memory_type = memory_type_of(found.last.table, found.last.entry or 0, self.pat)
            if access is not None:
                verdict = judge(self, found, access)
                outcome, reason, code = verdict.outcome, verdict.reason, verdict.error_code
                assumed = assumed + verdict.assumptions
        else:
            reason = reason_of(found, broken="has a reserved bit set")
            if access is not None and outcome != "unreadable":
                code = error_code(self, access, present=found.end == "misconfigured", reserved=found.end == "misconfigured")
        if hlat and code is not None:
            code |= bits.table("pfec")["HLAT"].mask
        title = f"HLAT, {self.title}" if hlat else self.title
        return Walk("guest", title, found.root, found.address, found.steps, outcome, reason, access, found.maps_to, found.page_size,
                    found.permissions, memory_type, code, None if outcome == "mapped" else found.hole, found.last.broken,
                    (), assumed)


_OUTCOMES = {"leaf": "mapped", "not-present": "violation", "misconfigured": "misconfiguration", "unreadable": "unreadable"}


def features(nxe: Optional[bool], pse: Optional[bool], *, keys: bool = False) -> FrozenSet[str]:
    """What the tables' conditions ask; unknown is taken as on."""
    return frozenset(name for name, on in (("nxe", nxe is not False), ("pse", pse is not False), ("1g", True), ("pkeys", keys)) if on)


def _test(table: str, value: Optional[int], ident: str) -> Optional[bool]:
    return None if value is None else bits.table(table).test(value, ident)


def _mode(paging: Optional[bool], pae: Optional[bool], lma: Optional[bool], la57: Optional[bool], unknown: List[str]) -> str:
    """SDM vol. 3, Paging Modes and Control Bits; what has to be assumed is appended to `unknown`."""
    if paging is False:
        return "none"
    if paging is None:
        unknown.append("CR0 unknown: paging taken as on")
    if lma is None and pae is not False:
        unknown.append("IA32_EFER.LMA unknown: long mode taken")
        lma = True
    if lma:
        if la57 is None:
            unknown.append("CR4.LA57 unknown: 4-level paging taken")
        return "5-level" if la57 else "4-level"
    if pae is None:
        unknown.append("CR4.PAE unknown: PAE paging taken")
    return "32-bit" if pae is False else "PAE"


def canonical(address: int, width: int) -> bool:
    """Bits 63 to `width`-1 of a linear address are all equal (SDM vol. 1, Canonical Addressing)."""
    return (address >> width - 1) in (0, (1 << 65 - width) - 1)


def sign_extended(address: int, width: int) -> int:
    """The canonical form of a `width`-bit linear address, as 64 bits."""
    return address | (1 << 64) - (1 << width) if width < 64 and address >> width - 1 & 1 else address


# ---- access rights ------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Verdict:
    outcome: str
    reason: str = ""
    error_code: Optional[int] = None
    assumptions: Tuple[str, ...] = ()


def error_code(paging: Paging, access: Access, *, present: bool, reserved: bool = False, key: bool = False) -> int:
    """The page-fault error code (SDM vol. 3, Page-Fault Exceptions).

    The I/D flag is reported only where the processor distinguishes fetches: NXE (with PAE or long mode) or SMEP.
    """
    fetch = access.fetch and ((paging.nxe is not False and paging.mode != "32-bit") or bool(paging.smep))
    return bits.table("pfec").encode(P=int(present), W=int(access.write), U=int(bool(access.user) and not access.implicit), RSVD=int(reserved),
                                     I=int(fetch), PK=int(key), SS=int(access.shadow_stack))


def judge(paging: Paging, found: Descent, access: Access) -> Verdict:
    """Does the page that was found allow the access (SDM vol. 3, Determination of Access Rights)?"""
    assumed: List[str] = []
    user = bool(access.user) and not access.implicit
    if access.user is None and not access.implicit:
        assumed.append("privilege of the access unknown: supervisor taken")
    reason = _denial(paging, found, access, user, assumed)
    if reason:
        return Verdict("violation", reason, error_code(paging, access, present=True), tuple(assumed))
    reason = _key_denial(paging, found, access, user, assumed)
    if reason:
        return Verdict("violation", reason, error_code(paging, access, present=True, key=True), tuple(assumed))
    return Verdict("mapped", assumptions=tuple(assumed))


def _denial(paging: Paging, found: Descent, access: Access, user: bool, assumed: List[str]) -> str:
    tables, rights = found.tables, found.rights
    write, execute, user_page = tables.right("w"), tables.right("x"), bool(rights & tables.right("u"))
    if user and not user_page:
        return denied(found, tables.right("u"), "user access")
    if access.shadow_stack:
        return _shadow_stack_denial(found, user, user_page)
    if access.write and not rights & write:
        if paging.wp is None and not user:
            assumed.append("CR0.WP unknown: 1 taken")
        if user or paging.wp is not False:
            return denied(found, write, "write" if user else "write (supervisor, CR0.WP=1)")
    if access.fetch and execute and not rights & execute:
        return denied(found, execute, "fetch")
    if user or not user_page:
        return ""
    if access.fetch:
        if paging.smep is None:
            assumed.append("CR4.SMEP unknown: 0 taken")
        elif paging.smep:
            return "fetch is not allowed: supervisor mode may not fetch from a user page (CR4.SMEP=1)"
    if access.read or access.write:
        if paging.smap is None:
            assumed.append("CR4.SMAP unknown: 0 taken")
        elif paging.smap and (access.implicit or not access.ac):
            if access.ac is None and not access.implicit:
                assumed.append("EFLAGS.AC unknown: 0 taken")
            return "data access is not allowed: supervisor mode may not access a user page (CR4.SMAP=1, EFLAGS.AC=0)"
    return ""


def _shadow_stack_denial(found: Descent, user: bool, user_page: bool) -> str:
    """A shadow-stack page: R/W=1 in all entries but the leaf, which has R/W=0 and D=1; user and supervisor do not share
    (SDM vol. 3, Access Rights, Shadow-Stack Accesses)."""
    leaf = found.last
    assert leaf.entry is not None
    write, idents = found.tables.right("w"), leaf.table.idents()
    if user != user_page:
        return "shadow-stack access is not allowed: a supervisor shadow-stack access needs a supervisor page"
    if leaf.entry & write or "D" not in idents or not leaf.table.test(leaf.entry, "D"):
        return f"shadow-stack access is not allowed: the leaf has to have R/W=0 and D=1 (entry {leaf.entry:#x})"
    for step in found.steps[:-1]:
        kind: EntryKind = found.kind_of(step)
        if not ((step.entry or 0) | kind.grants) & write:
            return f"shadow-stack access is not allowed: level {step.level} {step.name} has R/W=0 (entry {step.entry or 0:#x})"
    return ""


def _key_denial(paging: Paging, found: Descent, access: Access, user: bool, assumed: List[str]) -> str:
    """Protection keys: PKRU for user pages, IA32_PKRS for supervisor pages; fetches are not concerned (SDM vol. 3, Protection Keys)."""
    leaf = found.last
    if paging.mode not in ("4-level", "5-level") or not (access.read or access.write) or leaf.entry is None:
        return ""
    user_page = bool(found.rights & found.tables.right("u"))
    enabled, name, rights = (paging.pke, "PKRU", paging.pkru) if user_page else (paging.pks, "IA32_PKRS", paging.pkrs)
    key = leaf.table.get(leaf.entry, "PKEY")
    if not enabled:
        return ""
    if rights is None:
        assumed.append(f"{name} unknown: every access taken as allowed by it")
        return ""
    if rights >> 2 * key & 1:
        return f"data access is not allowed: protection key {key} has AD=1 in {name} ({rights:#x})"
    if access.write and rights >> 2 * key + 1 & 1 and (user or paging.wp is not False):
        return f"write is not allowed: protection key {key} has WD=1 in {name} ({rights:#x})"
    return ""
