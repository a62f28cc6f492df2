"""The other pages that a VMCS points to: EPTP list, PML buffer, virtual-APIC page, posted-interrupt descriptor, #VE information area, VMXON region.

Sources: SDM vol. 3, EPTP Switching; Page-Modification Logging; Virtual-APIC Page; Posted-Interrupt Processing; Convertible EPT Violations,
Virtualization-Exception Information; VMXON Region.  Dated 2026-11.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import List, Mapping, Optional, Tuple

from vtdbg.bits import read_rows
from vtdbg.errors import FormatError
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.ept import eptp_problems
from vtdbg.x86.permission import need_size

PAGE = 4096
EPTP_ENTRIES = PML_ENTRIES = 512
VE_BUSY = 0xFFFFFFFF
REASON_EPT_VIOLATION = 48
SHADOW_BIT = 1 << 31


@dataclass(frozen=True)
class EptpEntry:
    """`valid`: VMFUNC 0 with this index switches; otherwise it causes a VM exit, for the reasons in `problems`."""

    index: int
    eptp: int
    problems: Tuple[str, ...]

    @property
    def valid(self) -> bool:
        return not self.problems


def decode_eptp_list(page: bytes, caps: Optional[VmxCapabilities] = None) -> Tuple[EptpEntry, ...]:
    """All 512 entries of an EPTP list; FormatError for anything but a page."""
    need_size("EPTP list", page, PAGE)
    return tuple(EptpEntry(index, eptp, tuple(eptp_problems(eptp, caps))) for index, eptp in enumerate(struct.unpack("<512Q", page)))


@dataclass(frozen=True)
class PmlBuffer:
    """`addresses` are the logged guest-physical page addresses, the oldest first.  `index` is GUEST_PML_INDEX: where the next one goes.

    The processor counts down from 511; below 0 (0xffff) the buffer is full and the next write exits.
    """

    index: int
    full: bool
    addresses: Tuple[int, ...]
    problems: Tuple[str, ...]


def decode_pml(page: bytes, index: int) -> PmlBuffer:
    """The entries behind `index` of a page-modification log; FormatError for anything but a page."""
    need_size("PML buffer", page, PAGE)
    full = not 0 <= index < PML_ENTRIES
    problems: List[str] = []
    if full and index != 0xFFFF:
        problems.append(f"index {index:#x} is outside 0 to 511: it counts as full, but only 0xffff is what the processor leaves behind")
    first = 0 if full else index + 1
    entries = struct.unpack("<512Q", page)[first:]
    problems.extend(f"entry {first + number} is {entry:#x}: bits 11:0 have to be 0" for number, entry in enumerate(entries) if entry & 0xFFF)
    return PmlBuffer(index, full, tuple(reversed(entries)), tuple(problems))


@cache
def _apic_registers() -> Mapping[int, Tuple[str, str]]:
    return {int(row["offset"], 0): (row["name"], row["title"]) for row in read_rows("apic_registers.csv")}


VIRTUAL_NAMES: Mapping[int, str] = {0x80: "VTPR", 0xA0: "VPPR", 0xB0: "VEOI", 0x300: "VICR_LO", 0x310: "VICR_HI"}
"""The SDM's names of the virtualized registers (Virtual APIC State)."""


@dataclass(frozen=True)
class ApicRegister:
    """`name` is Linux' (apicdef.h) or the SDM's for a virtual register; `value` 32 bits."""

    offset: int
    name: str
    title: str
    value: int


@dataclass(frozen=True)
class VirtualApic:
    """`in_service`, `requested` and `level` are the vectors of VISR, VIRR and VTMR; `rvi` and `svi` what GUEST_INTR_STATUS should agree with."""

    registers: Tuple[ApicRegister, ...]
    in_service: Tuple[int, ...]
    requested: Tuple[int, ...]
    level: Tuple[int, ...]

    @property
    def rvi(self) -> int:
        """The highest requested vector, 0 for none."""
        return max(self.requested, default=0)

    @property
    def svi(self) -> int:
        """The highest vector in service, 0 for none."""
        return max(self.in_service, default=0)

    def get(self, name: str) -> int:
        """The value of a register ("VTPR", "APIC_ESR"); FormatError for one that the page has not."""
        for register in self.registers:
            if register.name == name.upper():
                return register.value
        raise FormatError("virtual-APIC page", f"there is no register {name}")


def decode_virtual_apic(page: bytes) -> VirtualApic:
    """The named registers of a virtual-APIC page and the vectors of its three 256-bit registers; FormatError for anything but a page."""
    need_size("virtual-APIC page", page, PAGE)
    registers = tuple(ApicRegister(offset, VIRTUAL_NAMES.get(offset, name), title, int.from_bytes(page[offset:offset + 4], "little"))
                      for offset, (name, title) in sorted(_apic_registers().items()))
    return VirtualApic(registers, _vectors(page, 0x100), _vectors(page, 0x200), _vectors(page, 0x180))


def _vectors(page: bytes, offset: int) -> Tuple[int, ...]:
    """A 256-bit register: 32 bits in every 16 bytes."""
    return tuple(32 * word + bit for word in range(8) for bit in range(32)
                 if int.from_bytes(page[offset + 16 * word:offset + 16 * word + 4], "little") >> bit & 1)


@dataclass(frozen=True)
class PostedInterruptDescriptor:
    """`requests` are the posted vectors; `destination` is the APIC id that the notification goes to (in the form that the mode wants)."""

    requests: Tuple[int, ...]
    outstanding: bool
    suppress: bool
    notification_vector: int
    destination: int
    problems: Tuple[str, ...]


def decode_posted_interrupts(data: bytes, address: int = 0) -> PostedInterruptDescriptor:
    """The 64 bytes at POSTED_INTR_DESC_ADDR.  ON and PIR are the processor's; SN, NV and NDST are read by what posts (the VT-d hardware).

    FormatError for another size.
    """
    need_size("posted-interrupt descriptor", data, 64)
    word = int.from_bytes(data, "little")
    problems = []
    if address & 63:
        problems.append(f"address {address:#x} is not aligned to 64 bytes: VM entry fails")
    outstanding = bool(word >> 256 & 1)
    requests = tuple(vector for vector in range(256) if word >> vector & 1)
    if requests and not outstanding:
        problems.append("vectors are posted and ON is 0: they wait for the next notification")
    return PostedInterruptDescriptor(requests, outstanding, bool(word >> 257 & 1), word >> 272 & 0xFF, word >> 288 & 0xFFFFFFFF, tuple(problems))


@dataclass(frozen=True)
class VirtualizationExceptionInfo:
    """`busy`: the dword at 4 is 0xffffffff, and EPT violations exit instead of raising #VE until software clears it."""

    exit_reason: int
    busy_word: int
    qualification: int
    guest_linear_address: int
    guest_physical_address: int
    eptp_index: int
    problems: Tuple[str, ...]

    @property
    def busy(self) -> bool:
        return self.busy_word == VE_BUSY

    @property
    def state(self) -> str:
        """What the busy dword means for the next convertible EPT violation."""
        if self.busy:
            return "#VE is off: the area is in use until the handler clears the dword at offset 4; EPT violations exit"
        return "#VE can be delivered"


def decode_ve_info(data: bytes) -> VirtualizationExceptionInfo:
    """The virtualization-exception information area: the first 34 bytes count; FormatError for fewer."""
    if len(data) < 0x22:
        raise FormatError("#VE information area", f"{len(data)} bytes; it has at least 34")
    reason, busy, qualification, linear, physical, index = struct.unpack_from("<IIQQQH", data)
    problems = []
    if busy not in (0, VE_BUSY):
        problems.append(f"the dword at offset 4 is {busy:#x}: any value but 0xffffffff lets #VE through, the processor writes 0xffffffff")
    if busy == VE_BUSY and reason != REASON_EPT_VIOLATION:
        problems.append(f"the exit reason is {reason}: the processor writes 48 (EPT violation)")
    return VirtualizationExceptionInfo(reason, busy, qualification, linear, physical, index, tuple(problems))


@dataclass(frozen=True)
class VmxonRegion:
    """`revision` is bits 30:0 of the first dword; `nonzero_bytes` counts the bytes behind it that are not 0."""

    revision: int
    nonzero_bytes: int
    problems: Tuple[str, ...]


def decode_vmxon(page: bytes, caps: Optional[VmxCapabilities] = None, address: int = 0) -> VmxonRegion:
    """A VMXON region: software writes the revision identifier and nothing else; FormatError for fewer than 4 bytes."""
    if len(page) < 4:
        raise FormatError("VMXON region", f"{len(page)} bytes; it has at least 4")
    first = int.from_bytes(page[:4], "little")
    problems = []
    if address & 0xFFF:
        problems.append(f"address {address:#x} is not aligned to 4 KiB: VMXON fails")
    width = caps.structure_address_width if caps is not None else None
    if width is not None and address >> width:
        problems.append(f"address {address:#x} is beyond the {width} bits of physical addresses: VMXON fails")
    if first & SHADOW_BIT:
        problems.append("bit 31 of the first dword is 1: VMXON fails")
    revision = first & ~SHADOW_BIT
    expected = caps.revision if caps is not None else None
    if expected is not None and revision != expected:
        problems.append(f"revision identifier {revision:#x} is not the processor's {expected:#x} (IA32_VMX_BASIC[30:0]): VMXON fails")
    return VmxonRegion(revision, sum(1 for byte in page[4:] if byte), tuple(problems))
