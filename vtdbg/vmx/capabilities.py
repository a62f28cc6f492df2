"""What a VMX processor can do: the capability MSRs IA32_VMX_BASIC (0x480) to IA32_VMX_EXIT_CTLS2 (0x493), and questions to them.

Whatever was not given is unknown: every answer can be None, and None is never "no".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from vtdbg import bits
from vtdbg.errors import FormatError, UnknownName
from vtdbg.names import near_names
from vtdbg.vmx.controls import ACTIVATED_BY
from vtdbg.x86 import msrs

if TYPE_CHECKING:
    from vtdbg.vmx.adjust import Adjustment

FEATURE_CONTROL, BASIC, MISC, EPT_VPID_CAP = 0x3A, 0x480, 0x485, 0x48C
CR0_FIXED0, CR0_FIXED1, CR4_FIXED0, CR4_FIXED1 = 0x486, 0x487, 0x488, 0x489

CAPABILITY_MSRS = (FEATURE_CONTROL, *range(0x480, 0x494))
"""What `caps show` asks for (SDM vol. 3, appendix VMX Capability Reporting Facility; vol. 4, Architectural MSRs)."""


@dataclass(frozen=True)
class WordSource:
    """Where a control word's allowed settings are.  `true_msr` supersedes `msr` where IA32_VMX_BASIC[55] is 1.

    `halves`: bits 31:0 of the MSR are the allowed-0 settings and 63:32 the allowed-1 settings; otherwise all 64 bits are allowed-1 settings and
    every control may be 0.
    """

    msr: int
    true_msr: Optional[int]
    halves: bool


WORD_SOURCES: Mapping[str, WordSource] = {
    "pin": WordSource(0x481, 0x48D, halves=True),
    "proc": WordSource(0x482, 0x48E, halves=True),
    "sec": WordSource(0x48B, None, halves=True),
    "tert": WordSource(0x492, None, halves=False),
    "exit": WordSource(0x483, 0x48F, halves=True),
    "exit2": WordSource(0x493, None, halves=False),
    "entry": WordSource(0x484, 0x490, halves=True),
    "vmfunc": WordSource(0x491, None, halves=False),
}
"""SDM vol. 3, appendix VMX Capability Reporting Facility: Pin-Based VM-Execution Controls, ..., VM Functions."""


@dataclass(frozen=True)
class Allowed:
    """The settings that VM entry accepts: bits of `must_be_one` have to be 1, bits outside `may_be_one` have to be 0.

    `source_msr` is the MSR that says so; for a word that cannot be activated it is the MSR of the control that would activate it.
    """

    must_be_one: int
    may_be_one: int
    source_msr: int

    def violations(self, value: int) -> Tuple[int, int]:
        """(bits that are 0 and must be 1, bits that are 1 and must be 0) of `value`."""
        return self.must_be_one & ~value, value & ~self.may_be_one


MsrKey = Union[int, str]
Cpuid = Mapping[Tuple[int, int], Tuple[int, int, int, int]]
"""(leaf, subleaf) -> (EAX, EBX, ECX, EDX)"""


def msr_name(index: int) -> str:
    """"IA32_VMX_BASIC" for 0x480; "MSR 0x999" for what has no name."""
    return msrs.name_of(index)


def msr_index(key: MsrKey) -> int:
    """The index for 0x480, "0x480" or any known name ("IA32_VMX_BASIC", "MSR_IA32_VMX_BASIC", "vmx_basic"); UnknownName otherwise."""
    return key if isinstance(key, int) else msrs.find(key).index


class VmxCapabilities:
    """Capability MSRs by index, and what CPUID adds (address widths, features).  Immutable.

    `origin` says where the values are from; `warnings` what a reader must know of them (processors disagree, a line was not understood).
    `partial` is what is known of MSRs by single bits, {index: (value, mask of the bits that are known)}: enough for `supports` and `forced`,
    not for a value.
    """

    def __init__(self, values: Mapping[int, int], *, physical_address_width: Optional[int] = None, linear_address_width: Optional[int] = None,
                 cpuid: Optional[Cpuid] = None, origin: str = "given values", warnings: Sequence[str] = (),
                 partial: Optional[Mapping[int, Tuple[int, int]]] = None) -> None:
        for index, value in values.items():
            if value < 0 or value >> 64:
                raise FormatError(msr_name(index), f"value {value:#x} does not fit in 64 bits")
        self._msrs: Dict[int, int] = dict(sorted(values.items()))
        self._partial: Dict[int, Tuple[int, int]] = dict(partial or {})
        self._cpuid: Dict[Tuple[int, int], Tuple[int, int, int, int]] = dict(cpuid or {})
        self._physical, self._linear = physical_address_width, linear_address_width
        self.origin = origin
        self.warnings: Tuple[str, ...] = tuple(warnings)

    @classmethod
    def from_msrs(cls, values: Mapping[MsrKey, int], physical_address_width: Optional[int] = None,
                  linear_address_width: Optional[int] = None, cpuid: Optional[Cpuid] = None,
                  origin: str = "given values") -> "VmxCapabilities":
        """Values by index or name: {0x480: ..., "IA32_VMX_MISC": ...}.

        `physical_address_width` is CPUID.80000008H:EAX[7:0] (MAXPHYADDR), `linear_address_width` EAX[15:8]; without them `cpuid` is asked, and
        for the linear width IA32_VMX_CR4_FIXED1.  Raises UnknownName for a name that nobody knows, FormatError for an impossible value.
        """
        for name, width, low, high in (("physical_address_width", physical_address_width, 32, 52),
                                       ("linear_address_width", linear_address_width, 32, 64)):
            if width is not None and not low <= width <= high:
                raise FormatError(name, f"{width} is not between {low} and {high}")
        return cls({msr_index(key): value for key, value in values.items()}, physical_address_width=physical_address_width,
                   linear_address_width=linear_address_width, cpuid=cpuid, origin=origin)

    @classmethod
    def from_text(cls, text: str, source: str = "text") -> "VmxCapabilities":
        """MSR values out of JSON, `rdmsr` output, a VirtualBox log, WinDbg, ...: see vtdbg.vmx.capability_text."""
        from vtdbg.vmx import capability_text

        return capability_text.parse(text, source)

    @classmethod
    def from_file(cls, path: Union[str, Path]) -> "VmxCapabilities":
        """`from_text` of a file; FormatError where it cannot be read or has no capability MSR."""
        from vtdbg.vmx import capability_text

        return capability_text.parse_file(path)

    @classmethod
    def load(cls, name: str) -> "VmxCapabilities":
        """What a user names: a preset, or a file for `from_file`."""
        from vtdbg.vmx import capability_text

        return capability_text.load(name)

    @classmethod
    def preset(cls, name: str) -> "VmxCapabilities":
        """A processor that ships with vtdbg (`presets()` lists them); UnknownName with the near ones."""
        from vtdbg.vmx import capability_text

        return capability_text.preset(name)

    def replaced(self, values: Mapping[MsrKey, int]) -> "VmxCapabilities":
        """A copy with some MSRs changed or added; address widths, CPUID and warnings stay."""
        merged = {**self._msrs, **{msr_index(key): value for key, value in values.items()}}
        return VmxCapabilities(merged, physical_address_width=self._physical, linear_address_width=self._linear, cpuid=self._cpuid,
                               origin=self.origin, warnings=self.warnings, partial=self._partial)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (int, str)) and msr_index(key) in self._msrs

    def __len__(self) -> int:
        return len(self._msrs)

    def items(self) -> Iterable[Tuple[int, int]]:
        """(index, value) of every known MSR, in index order."""
        return self._msrs.items()

    def msr(self, key: MsrKey) -> Optional[int]:
        """The value, None where it is unknown."""
        return self._msrs.get(msr_index(key))

    def cpuid(self, leaf: int, subleaf: int = 0) -> Optional[Tuple[int, int, int, int]]:
        """(EAX, EBX, ECX, EDX), None where it is unknown."""
        return self._cpuid.get((leaf, subleaf))

    def cpuid_bit(self, leaf: int, register: str, bit: int, subleaf: int = 0) -> Optional[bool]:
        """One bit of CPUID: `cpuid_bit(1, "ecx", 5)` is VMX; None where the leaf is unknown."""
        registers = self.cpuid(leaf, subleaf)
        return None if registers is None else bool(registers[("eax", "ebx", "ecx", "edx").index(register)] >> bit & 1)

    @property
    def basic(self) -> Optional[int]:
        return self.msr(BASIC)

    @property
    def misc(self) -> Optional[int]:
        return self.msr(MISC)

    @property
    def ept_vpid_cap(self) -> Optional[int]:
        return self.msr(EPT_VPID_CAP)

    @property
    def cr0_fixed0(self) -> Optional[int]:
        """Bits of CR0 that have to be 1 in VMX operation (SDM vol. 3, VMX-Fixed Bits in CR0)."""
        return self.msr(CR0_FIXED0)

    @property
    def cr0_fixed1(self) -> Optional[int]:
        """Bits of CR0 that may be 1 in VMX operation."""
        return self.msr(CR0_FIXED1)

    @property
    def cr4_fixed0(self) -> Optional[int]:
        return self.msr(CR4_FIXED0)

    @property
    def cr4_fixed1(self) -> Optional[int]:
        return self.msr(CR4_FIXED1)

    @property
    def physical_address_width(self) -> Optional[int]:
        """MAXPHYADDR in bits."""
        if self._physical is not None:
            return self._physical
        sizes = self.cpuid(0x80000008)
        return None if sizes is None else sizes[0] & 0xFF

    @property
    def linear_address_width(self) -> Optional[int]:
        """48 or 57 bits: what "canonical" means to the checks.

        Where nobody says it, CR4.LA57 allowed to be 1 in VMX operation shows a processor of 57 bits (SDM vol. 3, VMX-Fixed Bits in CR4).
        """
        if self._linear is not None:
            return self._linear
        sizes = self.cpuid(0x80000008)
        if sizes is not None:
            return sizes[0] >> 8 & 0xFF
        if self.cr4_fixed1 is None:
            return None
        return 57 if bits.table("cr4").test(self.cr4_fixed1, "LA57") else 48

    @property
    def revision(self) -> Optional[int]:
        """The VMCS revision identifier: what the first dword of a VMXON region and of a VMCS has to hold."""
        return None if self.basic is None else bits.table("vmx_basic").get(self.basic, "REVISION")

    @property
    def region_size(self) -> Optional[int]:
        """Bytes to allocate for a VMXON region or a VMCS."""
        return None if self.basic is None else bits.table("vmx_basic").get(self.basic, "REGION_SIZE")

    @property
    def structure_address_width(self) -> Optional[int]:
        """Width of the physical addresses of VMXON region, VMCS and what the VMCS points to: 32 where IA32_VMX_BASIC[48] is 1."""
        if self.basic is not None and bits.table("vmx_basic").test(self.basic, "32BIT_PHYS_ADDR_ONLY"):
            return 32
        return self.physical_address_width

    @property
    def msr_list_max(self) -> Optional[int]:
        """The recommended maximum of entries in an MSR-load or MSR-store area: 512 * (N + 1)."""
        return None if self.misc is None else 512 * (bits.table("vmx_misc").get(self.misc, "MSR_LIST_MAX") + 1)

    @property
    def cr3_target_max(self) -> Optional[int]:
        return None if self.misc is None else bits.table("vmx_misc").get(self.misc, "CR3_TARGETS")

    @property
    def true_controls(self) -> Optional[bool]:
        """IA32_VMX_BASIC[55]: the TRUE MSRs exist and default1 controls may be 0."""
        if self.basic is not None:
            return bits.table("vmx_basic").test(self.basic, "TRUE_CTLS")
        # An MSR that could be read exists.
        return True if any(source.true_msr in self._msrs for source in WORD_SOURCES.values()) else None

    def feature(self, table: str, ident: str) -> Optional[bool]:
        """A bit of "vmx_basic", "vmx_misc", "ept_vpid_cap" or "feature_control"; None: unknown."""
        value = self.msr(table)
        return None if value is None else bits.table(table).test(value, ident)

    def allowed(self, word: str) -> Optional[Allowed]:
        """The settings of control word `word` ("pin", "proc", "sec", "tert", "exit", "exit2", "entry", "vmfunc") that VM entry accepts.

        None where the MSR that decides is unknown: without IA32_VMX_BASIC[55] nobody knows whether the TRUE MSR supersedes the other.
        A word that no control can activate allows only 0.
        """
        source = _source(word)
        gate = ACTIVATED_BY.get(word)
        if gate is not None and self.supports(*gate) is False:
            above = self.allowed(gate[0])
            return None if above is None else Allowed(0, 0, above.source_msr)
        index = source.msr
        if source.true_msr is not None:
            if self.true_controls is None:
                return None
            index = source.true_msr if self.true_controls else source.msr
        value = self.msr(index)
        if value is None:
            return None
        if source.halves:
            return Allowed(value & 0xFFFFFFFF, value >> 32, index)
        return Allowed(0, value, index)

    def supports(self, word: str, ident: str) -> Optional[bool]:
        """May the control be 1 (`supports("sec", "EPT")`)?  None: unknown.  UnknownName for a control or word that does not exist.

        The allowed-1 halves of an MSR and of its TRUE MSR are equal (SDM vol. 3, appendix VMX Capability Reporting Facility), so either answers.
        """
        source = _source(word)
        mask = bits.table(word)[ident].mask
        gate = ACTIVATED_BY.get(word)
        if gate is not None and self.supports(*gate) is False:
            return False
        shift = 32 if source.halves else 0
        for index in (source.true_msr, source.msr):
            found = None if index is None else self._bits(index, mask << shift)
            if found is not None:
                return bool(found)
        return None

    def forced(self, word: str, ident: str) -> Optional[bool]:
        """Must the control be 1?  None: unknown."""
        mask = bits.table(word)[ident].mask
        allowed = self.allowed(word)
        if allowed is not None:
            return bool(allowed.must_be_one & mask)
        source = _source(word)
        if not source.halves:
            return None if self._bits(source.msr, mask) is None else False
        index: Optional[int] = source.msr
        if source.true_msr is not None:
            index = None if self.true_controls is None else source.true_msr if self.true_controls else source.msr
        found = None if index is None else self._bits(index, mask)
        return None if found is None else bool(found)

    def problems(self) -> List[str]:
        """What no processor would report: the values may be cut to 32 bits, mixed up or of two processors.  [] where nothing is strange."""
        found: List[str] = []
        for source in WORD_SOURCES.values():
            plain, true = self.msr(source.msr), self._msrs.get(source.true_msr or -1)
            for index, value in ((source.msr, plain), (source.true_msr, true)):
                if index is None or value is None or not source.halves or not value & ~(value >> 32) & 0xFFFFFFFF:
                    continue
                cut = ": the upper half is 0, was the value cut to 32 bits?" if not value >> 32 else ""
                found.append(f"{msr_name(index)}: bits {value & ~(value >> 32) & 0xFFFFFFFF:#x} must be 1 and must be 0{cut}")
            if plain is not None and true is not None and plain >> 32 != true >> 32:
                found.append(f"{msr_name(source.msr)} and {msr_name(source.true_msr or 0)} differ in bits 63:32: they have to be equal")
        for fixed0, fixed1 in ((CR0_FIXED0, CR0_FIXED1), (CR4_FIXED0, CR4_FIXED1)):
            low, high = self.msr(fixed0), self.msr(fixed1)
            if low is not None and high is not None and low & ~high:
                found.append(f"{msr_name(fixed0)} and {msr_name(fixed1)}: bits {low & ~high:#x} must be 1 and must be 0")
        if self.basic is not None:
            found.extend(f"IA32_VMX_BASIC: reserved bits {wrong.field.bits} are {wrong.number:#x}"
                         for wrong in bits.table("vmx_basic").reserved_violations(self.basic))
            if not 0 < (self.region_size or 0) <= 4096:
                found.append(f"IA32_VMX_BASIC: a VMCS of {self.region_size} bytes; it has 1 to 4096")
        return found

    def _bits(self, index: int, mask: int) -> Optional[int]:
        """The bits of `mask` of an MSR; None where one of them is unknown."""
        value, known = self._msrs.get(index), -1
        if value is None:
            value, known = self._partial.get(index, (0, 0))
        return value & mask if known & mask == mask else None

    def adjust(self, word: str, wanted: Union[int, Iterable[str]]) -> "Adjustment":
        """The value that a VMM must write for the `wanted` controls (a number, or identifiers): see vtdbg.vmx.adjust."""
        from vtdbg.vmx import adjust

        return adjust.adjust(self, word, wanted)


def _source(word: str) -> WordSource:
    source = WORD_SOURCES.get(word)
    if source is None:
        raise UnknownName("control word", word, near_names(word, WORD_SOURCES) or tuple(WORD_SOURCES))
    return source


def presets() -> List[str]:
    """Names of the processors that ship with vtdbg."""
    from vtdbg.vmx import capability_text

    return capability_text.preset_names()
