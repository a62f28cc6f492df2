"""What an SVM processor can do: CPUID Fn8000_000A and what the VMRUN checks need of other leaves and of VM_CR.

Whatever was not given is unknown: every answer can be None, and None is never "no".
"""

from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.errors import FormatError
from vtdbg.vmx.capabilities import Cpuid, VmxCapabilities

VM_CR, EFER_MSR, VM_HSAVE_PA = 0xC0010114, 0xC0000080, 0xC0010117


class Feature(NamedTuple):
    """A CPUID bit; `inverted`: the feature is there where the bit is 0."""

    leaf: int
    register: str
    bit: int
    name: str
    subleaf: int = 0
    inverted: bool = False

    def __str__(self) -> str:
        return f"CPUID Fn{self.leaf >> 16:04X}_{self.leaf & 0xFFFF:04X} {self.register.upper()}[{self.bit}] ({self.name})"


LONG_MODE = Feature(0x80000001, "edx", 29, "long mode")
CET_SS = Feature(7, "ecx", 7, "shadow stacks")
CET_IBT = Feature(7, "edx", 20, "indirect-branch tracking")

CR4_ALWAYS = 0x7FF
"""CR4 bits 10:0 exist on every processor with SVM: SVM came with AMD64, which has them all (APM vol. 2, CR4 Register)."""

CR4_FEATURES: Mapping[str, Feature] = {
    "UMIP": Feature(7, "ecx", 2, "UMIP"), "LA57": Feature(7, "ecx", 16, "5-level paging"), "FSGSBASE": Feature(7, "ebx", 0, "FSGSBASE"),
    "PCIDE": Feature(1, "ecx", 17, "PCID"), "OSXSAVE": Feature(1, "ecx", 26, "XSAVE"), "SMEP": Feature(7, "ebx", 7, "SMEP"),
    "SMAP": Feature(7, "ebx", 20, "SMAP"), "PKE": Feature(7, "ecx", 3, "protection keys"), "CET": CET_SS,
    "FRED": Feature(7, "eax", 17, "FRED", subleaf=1),
}
"""CR4 bits that depend on a CPUID feature; the others above bit 10 are reserved on AMD processors (APM vol. 2, CR4 Register)."""

EFER_ALWAYS = ("SCE", "LME", "LMA", "NXE", "SVME")
EFER_FEATURES: Mapping[str, Feature] = {
    "LMSLE": Feature(0x80000008, "ebx", 20, "EFER.LMSLE", inverted=True), "FFXSR": Feature(0x80000001, "edx", 25, "FFXSR"),
    "TCE": Feature(0x80000001, "ecx", 17, "translation cache extension"), "MCOMMIT": Feature(0x80000008, "ebx", 8, "MCOMMIT"),
    "INTWB": Feature(0x80000008, "ebx", 13, "interruptible WBINVD"), "UAIE": Feature(0x80000021, "eax", 7, "upper-address ignore"),
    "AUTOIBRS": Feature(0x80000021, "eax", 8, "automatic IBRS"),
}
"""EFER bits that depend on a CPUID feature (APM vol. 2, Extended Feature Enable Register)."""


class Allowed(NamedTuple):
    """Bits of a register that may be 1; bits that are `unknown` because their feature (named) is."""

    may_be_one: int
    unknown: Mapping[int, Feature]


class SvmCapabilities:
    """CPUID leaves, address widths and the SVM MSRs.  Immutable.  `origin` says where the values are from."""

    def __init__(self, cpuid: Optional[Cpuid] = None, *, physical_address_width: Optional[int] = None, linear_address_width: Optional[int] = None,
                 msrs: Optional[Mapping[int, int]] = None, origin: str = "given values") -> None:
        for name, width, low, high in (("physical_address_width", physical_address_width, 32, 52),
                                       ("linear_address_width", linear_address_width, 32, 64)):
            if width is not None and not low <= width <= high:
                raise FormatError(name, f"{width} is not between {low} and {high}")
        self._cpuid: Dict[Tuple[int, int], Tuple[int, int, int, int]] = dict(cpuid or {})
        self._msrs = dict(msrs or {})
        self._physical, self._linear = physical_address_width, linear_address_width
        self.origin = origin

    @classmethod
    def from_cpuid(cls, leaves: Mapping[Union[int, Tuple[int, int]], Tuple[int, int, int, int]], physical_address_width: Optional[int] = None,
                   msrs: Optional[Mapping[int, int]] = None, origin: str = "given values") -> "SvmCapabilities":
        """{0x8000000A: (eax, ebx, ecx, edx), (7, 0): ...}; `msrs` by index (VM_CR 0xC0010114, VM_HSAVE_PA 0xC0010117, EFER 0xC0000080)."""
        return cls({(key if isinstance(key, tuple) else (key, 0)): value for key, value in leaves.items()},
                   physical_address_width=physical_address_width, msrs=msrs, origin=origin)

    @classmethod
    def of(cls, values: VmxCapabilities) -> "SvmCapabilities":
        """What a text of CPUID leaves and MSR values says of SVM: `SvmCapabilities.of(VmxCapabilities.from_text(...))`."""
        return cls(values._cpuid, physical_address_width=values._physical, linear_address_width=values._linear, msrs=dict(values.items()),
                   origin=values.origin)

    def cpuid(self, leaf: int, subleaf: int = 0) -> Optional[Tuple[int, int, int, int]]:
        """(EAX, EBX, ECX, EDX), None where it is unknown.  A leaf above the highest one of its range counts as 0 in every register.

        Leaf 0 and leaf 0x80000000 give the highest; what a processor or an emulator answers above it means nothing (APM vol. 3, CPUID Fn0000_0000
        and Fn8000_0000; QEMU answers with the highest basic leaf).
        """
        top = self._cpuid.get((leaf & 0x80000000, 0))
        if top is not None and leaf > top[0]:
            return 0, 0, 0, 0
        return self._cpuid.get((leaf, subleaf))

    def has(self, feature: Feature) -> Optional[bool]:
        """Has the processor the feature?  None: the leaf is unknown."""
        registers = self.cpuid(feature.leaf, feature.subleaf)
        if registers is None:
            return None
        value = bool(registers[("eax", "ebx", "ecx", "edx").index(feature.register)] >> feature.bit & 1)
        return value != feature.inverted

    def feature(self, ident: str) -> Optional[bool]:
        """A feature of Fn8000_000A EDX by its identifier ("NP", "NRIPS", "AVIC"); None: unknown.  UnknownName for no such feature."""
        row = bits.table("svm_features")[ident]
        return self.has(Feature(0x8000000A, "edx", row.low, row.name))

    @property
    def asids(self) -> Optional[int]:
        """How many address-space identifiers there are, 0 among them."""
        leaf = self.cpuid(0x8000000A)
        return None if leaf is None else leaf[1]

    @property
    def physical_address_width(self) -> Optional[int]:
        if self._physical is not None:
            return self._physical
        sizes = self.cpuid(0x80000008)
        return None if sizes is None else sizes[0] & 0xFF

    @property
    def linear_address_width(self) -> Optional[int]:
        if self._linear is not None:
            return self._linear
        sizes = self.cpuid(0x80000008)
        return None if sizes is None else sizes[0] >> 8 & 0xFF

    @property
    def encryption_bit(self) -> Optional[int]:
        """Mask of the C-bit of memory encryption, 0 where there is none; None: unknown (APM vol. 3, CPUID Fn8000_001F)."""
        leaf = self.cpuid(0x8000001F)
        if leaf is None:
            return None
        return 1 << (leaf[1] & 0x3F) if leaf[0] & 3 else 0

    def msr(self, index: int) -> Optional[int]:
        return self._msrs.get(index)

    def cr4(self) -> Allowed:
        """Bits that CR4 may have."""
        return self._allowed("cr4", CR4_ALWAYS, CR4_FEATURES)

    def efer(self) -> Allowed:
        """Bits that EFER may have."""
        always = 0
        for ident in EFER_ALWAYS:
            always |= bits.table("efer")[ident].mask
        return self._allowed("efer", always, EFER_FEATURES)

    def _allowed(self, table: str, always: int, features: Mapping[str, Feature]) -> Allowed:
        unknown: Dict[int, Feature] = {}
        for ident, feature in features.items():
            mask = bits.table(table)[ident].mask
            has = self.has(feature)
            if has is None:
                unknown[mask] = feature
            elif has:
                always |= mask
        return Allowed(always, unknown)

    def problems(self) -> List[str]:
        """Why SVM cannot be used here, as far as it is known: the feature, VM_CR.SVMDIS, EFER.SVME (APM vol. 2, Enabling SVM)."""
        found = []
        if self.has(Feature(0x80000001, "ecx", 2, "SVM")) is False:
            found.append("CPUID Fn8000_0001 ECX[2] is 0: no SVM")
        vm_cr, efer = self.msr(VM_CR), self.msr(EFER_MSR)
        if vm_cr is not None and bits.table("vm_cr").test(vm_cr, "SVMDIS"):
            locked = bits.table("vm_cr").test(vm_cr, "LOCK")
            found.append("VM_CR.SVMDIS is 1: EFER.SVME cannot be set" + (" (VM_CR.LOCK is 1: the firmware turned SVM off)" if locked else ""))
        if efer is not None and not bits.table("efer").test(efer, "SVME"):
            found.append("EFER.SVME is 0: VMRUN is an invalid opcode")
        return found


UNKNOWN = SvmCapabilities(origin="nothing is known of the processor")
