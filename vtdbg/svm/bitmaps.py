"""The permission maps of a VMCB: MSRPM, two bits an MSR, and IOPM, one bit a port.

Sources: APM vol. 2, MSR Intercepts; IOIO Intercepts.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, List, Mapping, Optional, Tuple

from vtdbg import bit_ranges
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.svm.vmcb import Vmcb
from vtdbg.x86 import msrs
from vtdbg.x86.permission import ACCESSES, READ, BitmapQuery, MsrRange, check_access, named_ranges, need_size

MSRPM_SIZE = 0x2000
IOPM_SIZE = 0x3000
IOPM_PORTS = 0x10000 + 3
"""A 4-byte access at port 0xffff looks at three bits behind the last port's."""

MSR_RANGES: Mapping[int, int] = {0x00000000: 0x0000, 0xC0000000: 0x0800, 0xC0010000: 0x1000}
"""First MSR of each range of 0x2000 -> offset of its 2 KiB; the last 2 KiB of the map are reserved."""
MSRS_IN_RANGE = 0x2000

INTERCEPT_IOIO, INTERCEPT_MSR = "IOIO_PROT", "MSR_PROT"


def msrpm_place(index: int, access: str) -> Optional[Tuple[int, int]]:
    """(byte, bit) of an MSR in the MSRPM: the lower bit of the pair for reads, the upper for writes; None for the MSRs that it does not cover."""
    check_access(access)
    for first, offset in MSR_RANGES.items():
        if first <= index < first + MSRS_IN_RANGE:
            at = (index - first) * 2 + (0 if access == READ else 1)
            return offset + (at >> 3), at & 7
    return None


@dataclass(frozen=True)
class MsrPermissionMap:
    """The 8 KiB at msrpm_base_pa: a bit that is 1 makes the access exit."""

    data: bytes

    def __post_init__(self) -> None:
        need_size("MSRPM", self.data, MSRPM_SIZE)

    @classmethod
    def read(cls, memory: PhysicalMemory, address: int) -> "MsrPermissionMap":
        """The map at physical `address` (bits 11:0 are ignored); MemoryUnavailable where it cannot be read."""
        return cls(memory.read(address & ~0xFFF, MSRPM_SIZE))

    @classmethod
    def build(cls, passed_reads: Iterable[int] = (), passed_writes: Iterable[int] = ()) -> "MsrPermissionMap":
        """A map in which everything exits but these; UsageError for an MSR that it does not cover."""
        data = bytearray(b"\xff" * MSRPM_SIZE)
        for access, indexes in zip(ACCESSES, (passed_reads, passed_writes)):
            for index in indexes:
                place = msrpm_place(index, access)
                if place is None:
                    raise UsageError(f"MSR {index:#x} has no bits in an MSRPM: it always exits")
                data[place[0]] &= ~(1 << place[1]) & 0xFF
        return cls(bytes(data))

    def query(self, index: int, access: str) -> BitmapQuery:
        """Does RDMSR or WRMSR of `index` exit?  `access` is "read" or "write"."""
        place = msrpm_place(index, access)
        what = f"{'RDMSR' if access == READ else 'WRMSR'} of {index:#x} ({msrs.name_of(index)})"
        if place is None:
            return BitmapQuery(what, None, None, exits=True, why="outside the three ranges of the MSRPM: it always exits")
        byte, bit = place
        exits = bool(self.data[byte] >> bit & 1)
        return BitmapQuery(what, byte, bit, exits, f"byte {byte:#x} bit {bit} of the MSRPM is {int(exits)}")

    def passed(self, access: str) -> Tuple[MsrRange, ...]:
        """The MSRs whose access does not exit, as ranges with names."""
        check_access(access)
        found: List[MsrRange] = []
        for first in MSR_RANGES:
            found.extend(named_ranges(bit_ranges.clear_ranges(self.bits(first, access)), first))
        return tuple(found)

    def intercepted(self, access: str) -> Tuple[MsrRange, ...]:
        """The MSRs of the three ranges whose access exits; those outside always do."""
        check_access(access)
        found: List[MsrRange] = []
        for first in MSR_RANGES:
            found.extend(named_ranges(bit_ranges.set_ranges(self.bits(first, access)), first))
        return tuple(found)

    def bits(self, first: int, access: str) -> bytes:
        """The bits of reads or of writes of a range of MSRs (`first` a key of MSR_RANGES), one bit an MSR."""
        offset = MSR_RANGES[first]
        return _every_other(self.data[offset:offset + 0x800], access)


def _every_other(pairs: bytes, access: str) -> bytes:
    """The read (or write) bits of a map of pairs as a plain bitmap of half the size."""
    shift = 0 if access == READ else 1
    return bytes(_NIBBLE[shift][pairs[at]] | _NIBBLE[shift][pairs[at + 1]] << 4 for at in range(0, len(pairs), 2))


_NIBBLE = tuple(tuple(sum((byte >> (2 * pair + shift) & 1) << pair for pair in range(4)) for byte in range(256)) for shift in (0, 1))


@dataclass(frozen=True)
class IoPermissionMap:
    """The 12 KiB at iopm_base_pa: a bit that is 1 makes the access exit."""

    data: bytes

    def __post_init__(self) -> None:
        need_size("IOPM", self.data, IOPM_SIZE)

    @classmethod
    def read(cls, memory: PhysicalMemory, address: int) -> "IoPermissionMap":
        """The map at physical `address` (bits 11:0 are ignored); MemoryUnavailable where it cannot be read."""
        return cls(memory.read(address & ~0xFFF, IOPM_SIZE))

    @classmethod
    def build(cls, passed: Iterable[Tuple[int, int]] = ()) -> "IoPermissionMap":
        """A map in which every port exits but those in the ranges (first, last)."""
        data = bytearray(b"\xff" * IOPM_SIZE)
        bit_ranges.fill(data, passed, value=False)
        return cls(bytes(data))

    def query(self, port: int, size: int = 1) -> BitmapQuery:
        """Does an access of `size` bytes (1, 2, 4) at `port` exit?  One bit that is 1 is enough, the three behind port 0xffff included."""
        if size not in (1, 2, 4) or not 0 <= port <= 0xFFFF:
            raise UsageError(f"an I/O access has 1, 2 or 4 bytes at a port below 0x10000, not {size} at {port:#x}")
        what = f"{size}-byte access at port {port:#x}"
        for at in range(port, port + size):
            if bit_ranges.test(self.data, at):
                return BitmapQuery(what, at >> 3, at & 7, exits=True, why=f"port {at:#x}: byte {at >> 3:#x} bit {at & 7} of the IOPM is 1")
        return BitmapQuery(what, port >> 3, port & 7, exits=False,
                           why=f"its {'bits are' if size > 1 else 'bit is'} 0 from byte {port >> 3:#x} bit {port & 7} of the IOPM")

    def passed(self) -> bit_ranges.Ranges:
        """Ranges of ports whose byte accesses do not exit."""
        return bit_ranges.clear_ranges(self.data, 0x10000)

    def intercepted(self) -> bit_ranges.Ranges:
        return bit_ranges.set_ranges(self.data, 0x10000)


def query_msr(vmcb: Vmcb, memory: PhysicalMemory, index: int, access: str) -> BitmapQuery:
    """Does RDMSR or WRMSR of `index` exit in the guest of this VMCB?  Takes the MSR_PROT intercept into account."""
    check_access(access)
    what = f"{'RDMSR' if access == READ else 'WRMSR'} of {index:#x} ({msrs.name_of(index)})"
    return _intercepted(vmcb, what, INTERCEPT_MSR) or _unknown(vmcb, what, "msrpm_base_pa") \
        or MsrPermissionMap.read(memory, vmcb["msrpm_base_pa"]).query(index, access)


def query_port(vmcb: Vmcb, memory: PhysicalMemory, port: int, size: int = 1) -> BitmapQuery:
    """Does the access exit in the guest of this VMCB?  Takes the IOIO_PROT intercept into account."""
    what = f"{size}-byte access at port {port:#x}"
    return _intercepted(vmcb, what, INTERCEPT_IOIO) or _unknown(vmcb, what, "iopm_base_pa") \
        or IoPermissionMap.read(memory, vmcb["iopm_base_pa"]).query(port, size)


def _intercepted(vmcb: Vmcb, what: str, ident: str) -> Optional[BitmapQuery]:
    """The answer where the intercept that makes the map count is off or unknown; None where the map decides."""
    value = vmcb.get("intercept_misc1")
    if value is None:
        return BitmapQuery(what, None, None, None, f"unknown: the {ident} intercept is unknown")
    table = vmcb.value("intercept_misc1").field.table
    if table is not None and not table.test(value, ident):
        return BitmapQuery(what, None, None, exits=False, why=f"the {ident} intercept is 0: nothing exits, whatever the map says")
    return None


def _unknown(vmcb: Vmcb, what: str, field: str) -> Optional[BitmapQuery]:
    return None if vmcb.get(field) is not None else BitmapQuery(what, None, None, None, f"unknown: {field} is unknown")
