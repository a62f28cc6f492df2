"""The bitmaps of a VMCS: MSR, I/O, VMREAD and VMWRITE bitmaps and the exception bitmap.  What exits, what passes, which byte and bit decide.

Sources: SDM vol. 3, MSR-Bitmap Address; I/O-Bitmap Addresses; VMREAD-Bitmap and VMWRITE-Bitmap Addresses; Exception Bitmap; Instructions That
Cause VM Exits Conditionally; Other Causes of VM Exits.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, List, Mapping, Optional, Tuple

from vtdbg import bit_ranges
from vtdbg.bits import table as bit_table
from vtdbg.errors import UsageError
from vtdbg.memory.base import PhysicalMemory
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.controls import control, control_name
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86 import msrs
from vtdbg.x86.permission import READ, WRITE, BitmapQuery, MsrRange, check_access, named_ranges, need_size
from vtdbg.x86.vectors import vector as vector_row

PAGE = 4096

LOW_LAST, HIGH_FIRST, HIGH_LAST = 0x1FFF, 0xC0000000, 0xC0001FFF

MSR_REGIONS: Mapping[Tuple[str, int], int] = {(READ, 0): 0x000, (READ, HIGH_FIRST): 0x400, (WRITE, 0): 0x800, (WRITE, HIGH_FIRST): 0xC00}
"""Offset of the 1-KByte bitmap for (access, first MSR of the range)."""


@dataclass(frozen=True)
class MsrBitmap:
    """The 4 KiB at MSR_BITMAP: a bit that is 1 makes the access exit."""

    page: bytes

    def __post_init__(self) -> None:
        need_size("MSR bitmap", self.page, PAGE)

    @classmethod
    def read(cls, memory: PhysicalMemory, address: int) -> "MsrBitmap":
        """The bitmap at physical `address`; MemoryUnavailable where it cannot be read."""
        return cls(memory.read(address, PAGE))

    @classmethod
    def build(cls, passed_reads: Iterable[int] = (), passed_writes: Iterable[int] = ()) -> "MsrBitmap":
        """A bitmap in which everything exits but these; UsageError for an MSR that no bit covers."""
        page = bytearray(b"\xff" * PAGE)
        for access, indexes in ((READ, passed_reads), (WRITE, passed_writes)):
            for index in indexes:
                place = msr_place(index, access)
                if place is None:
                    raise UsageError(f"MSR {index:#x} has no bit in an MSR bitmap: it always exits")
                page[place[0]] &= ~(1 << place[1]) & 0xFF
        return cls(bytes(page))

    def query(self, index: int, access: str) -> BitmapQuery:
        """Does RDMSR or WRMSR of `index` exit?  `access` is "read" or "write"."""
        check_access(access)
        what = f"{'RDMSR' if access == READ else 'WRMSR'} of {index:#x} ({msrs.name_of(index)})"
        place = msr_place(index, access)
        if place is None:
            return BitmapQuery(what, None, None, exits=True,
                               why="outside 0 to 0x1fff and 0xc0000000 to 0xc0001fff no bit decides: it always exits")
        byte, bit = place
        exits = bool(self.page[byte] >> bit & 1)
        return BitmapQuery(what, byte, bit, exits, f"byte {byte:#x} bit {bit} of the MSR bitmap is {int(exits)}")

    def passed(self, access: str) -> Tuple[MsrRange, ...]:
        """The MSRs whose access does not exit, as ranges with names."""
        return self._ranges(access, bit_ranges.clear_ranges)

    def intercepted(self, access: str) -> Tuple[MsrRange, ...]:
        """The MSRs that a bit makes exit; those outside both ranges always do."""
        return self._ranges(access, bit_ranges.set_ranges)

    def bits(self, first: int, access: str) -> bytes:
        """The 1 KByte of a range of MSRs (`first` 0 or HIGH_FIRST), one bit an MSR."""
        offset = MSR_REGIONS[access, first]
        return self.page[offset:offset + 0x400]

    def _ranges(self, access: str, find: Callable[[bytes], bit_ranges.Ranges]) -> Tuple[MsrRange, ...]:
        check_access(access)
        found: List[MsrRange] = []
        for first in (0, HIGH_FIRST):
            found.extend(named_ranges(find(self.bits(first, access)), first))
        return tuple(found)


def msr_place(index: int, access: str) -> Optional[Tuple[int, int]]:
    """(byte, bit) of an MSR in the bitmap; None for the MSRs that no bit covers."""
    first = 0 if 0 <= index <= LOW_LAST else HIGH_FIRST if HIGH_FIRST <= index <= HIGH_LAST else None
    if first is None:
        return None
    return MSR_REGIONS[access, first] + ((index - first) >> 3), (index - first) & 7


def query_msr(vmcs: Vmcs, memory: PhysicalMemory, index: int, access: str) -> BitmapQuery:
    """Does RDMSR or WRMSR of `index` exit in the guest of this VMCS?  Takes "Use MSR bitmaps" into account."""
    check_access(access)
    what = f"{'RDMSR' if access == READ else 'WRMSR'} of {index:#x} ({msrs.name_of(index)})"
    used = control(vmcs, "proc", "USE_MSR_BITMAPS")
    if used is None:
        return BitmapQuery(what, None, None, None, f"unknown: {control_name('proc', 'USE_MSR_BITMAPS')} is unknown")
    if not used:
        return BitmapQuery(what, None, None, exits=True, why=f"{control_name('proc', 'USE_MSR_BITMAPS')} is 0: every RDMSR and WRMSR exits")
    address = vmcs.get("MSR_BITMAP")
    if address is None:
        return BitmapQuery(what, None, None, None, "unknown: MSR_BITMAP is unknown")
    return MsrBitmap.read(memory, address).query(index, access)


@dataclass(frozen=True)
class IoBitmaps:
    """Bitmap A (ports 0 to 0x7fff) and B (0x8000 to 0xffff), 4 KiB each: a bit that is 1 makes the access exit."""

    a: bytes
    b: bytes

    def __post_init__(self) -> None:
        need_size("I/O bitmap A", self.a, PAGE)
        need_size("I/O bitmap B", self.b, PAGE)

    @classmethod
    def read(cls, memory: PhysicalMemory, address_a: int, address_b: int) -> "IoBitmaps":
        """The bitmaps at these physical addresses; MemoryUnavailable where one cannot be read."""
        return cls(memory.read(address_a, PAGE), memory.read(address_b, PAGE))

    @classmethod
    def build(cls, passed: Iterable[Tuple[int, int]] = ()) -> "IoBitmaps":
        """Bitmaps in which every port exits but those in the ranges (first, last)."""
        both = bytearray(b"\xff" * (2 * PAGE))
        bit_ranges.fill(both, passed, value=False)
        return cls(bytes(both[:PAGE]), bytes(both[PAGE:]))

    def query(self, port: int, size: int = 1) -> BitmapQuery:
        """Does an access of `size` bytes (1, 2, 4) at `port` exit?  One bit that is 1 is enough; an access that wraps around 0xffff always exits."""
        if size not in (1, 2, 4) or not 0 <= port <= 0xFFFF:
            raise UsageError(f"an I/O access has 1, 2 or 4 bytes at a port below 0x10000, not {size} at {port:#x}")
        what = f"{size}-byte access at port {port:#x}"
        if port + size > 0x10000:
            return BitmapQuery(what, None, None, exits=True, why="it wraps around port 0xffff: it exits whatever the bitmaps say")
        for at in range(port, port + size):
            if bit_ranges.test(self.a + self.b, at):
                letter, inside = ("B", at - 0x8000) if at >= 0x8000 else ("A", at)
                return BitmapQuery(what, inside >> 3, inside & 7, exits=True,
                                   why=f"port {at:#x}: byte {inside >> 3:#x} bit {inside & 7} of I/O bitmap {letter} is 1")
        letter, inside = ("B", port - 0x8000) if port >= 0x8000 else ("A", port)
        return BitmapQuery(what, inside >> 3, inside & 7, exits=False,
                           why=f"its {'bits are' if size > 1 else 'bit is'} 0 from byte {inside >> 3:#x} bit {inside & 7} of I/O bitmap {letter}")

    def passed(self) -> bit_ranges.Ranges:
        """Ranges of ports whose byte accesses do not exit."""
        return bit_ranges.clear_ranges(self.a + self.b)

    def intercepted(self) -> bit_ranges.Ranges:
        return bit_ranges.set_ranges(self.a + self.b)


def query_port(vmcs: Vmcs, memory: PhysicalMemory, port: int, size: int = 1) -> BitmapQuery:
    """Does the access exit in the guest of this VMCS?  "Use I/O bitmaps" overrides "Unconditional I/O exiting"."""
    what = f"{size}-byte access at port {port:#x}"
    used, always = control(vmcs, "proc", "USE_IO_BITMAPS"), control(vmcs, "proc", "UNCOND_IO_EXITING")
    if used is None or (not used and always is None):
        return BitmapQuery(what, None, None, None, "unknown: the primary processor-based controls are unknown")
    if not used:
        why = f"{control_name('proc', 'USE_IO_BITMAPS')} is 0 and {control_name('proc', 'UNCOND_IO_EXITING')} is {int(bool(always))}"
        return BitmapQuery(what, None, None, always, why)
    a, b = vmcs.get("IO_BITMAP_A"), vmcs.get("IO_BITMAP_B")
    if a is None or b is None:
        return BitmapQuery(what, None, None, None, "unknown: IO_BITMAP_A or IO_BITMAP_B is unknown")
    return IoBitmaps.read(memory, a, b).query(port, size)


@dataclass(frozen=True)
class VmcsAccessBitmap:
    """The VMREAD or VMWRITE bitmap of VMCS shadowing: bit n is for the field whose encoding has n in bits 14:0; 1 makes the access exit."""

    page: bytes

    def __post_init__(self) -> None:
        need_size("VMREAD or VMWRITE bitmap", self.page, PAGE)

    @classmethod
    def read(cls, memory: PhysicalMemory, address: int) -> "VmcsAccessBitmap":
        return cls(memory.read(address, PAGE))

    @classmethod
    def build(cls, passed: Iterable[int] = ()) -> "VmcsAccessBitmap":
        """A bitmap in which every field exits but those with these encodings."""
        page = bytearray(b"\xff" * PAGE)
        bit_ranges.fill(page, ((encoding, encoding) for encoding in passed), value=False)
        return cls(bytes(page))

    def query(self, encoding: int) -> BitmapQuery:
        """Does VMREAD or VMWRITE with this value in the register operand exit?"""
        field = vmcs_fields.get(encoding & 0x7FFF)
        what = f"field {encoding:#x} ({field.name if field else 'unknown field'})"
        if encoding >> 15:
            return BitmapQuery(what, None, None, exits=True, why="a bit above 14 is 1 in the register operand: it exits whatever the bitmap says")
        byte, bit = encoding >> 3, encoding & 7
        exits = bool(self.page[byte] >> bit & 1)
        return BitmapQuery(what, byte, bit, exits, f"byte {byte:#x} bit {bit} of the bitmap is {int(exits)}")

    def passed(self) -> Tuple[vmcs_fields.VmcsField, ...]:
        """The known fields whose access does not exit (a 64-bit field by its full encoding)."""
        return tuple(field for encoding, field in vmcs_fields.fields().items() if not self.query(encoding).exits)

    def passed_unknown(self) -> Tuple[int, ...]:
        """Encodings without a known field whose bit is 0, at most 64 of them: the bitmap of a careless VMM."""
        found = (encoding for first, last in bit_ranges.clear_ranges(self.page) for encoding in range(first, last + 1)
                 if vmcs_fields.get(encoding) is None)
        return tuple(encoding for _, encoding in zip(range(64), found))


PF_VECTOR, NMI_VECTOR = 14, 2


@dataclass(frozen=True)
class ExceptionRow:
    """One vector of the exception bitmap; `exits` in words where it depends on the error code."""

    vector: int
    name: str
    bit: int
    exits: str


@dataclass(frozen=True)
class ExceptionBitmap:
    """EXCEPTION_BITMAP with what narrows bit 14: a page fault exits by its bit where error code & `pfec_mask` == `pfec_match`, and by the opposite
    of its bit where not.  `pfec_mask` and `pfec_match` None: unknown."""

    bitmap: int
    pfec_mask: Optional[int] = None
    pfec_match: Optional[int] = None

    @classmethod
    def of(cls, vmcs: Vmcs) -> "Optional[ExceptionBitmap]":
        bitmap = vmcs.get("EXCEPTION_BITMAP")
        return None if bitmap is None else cls(bitmap, vmcs.get("PAGE_FAULT_ERROR_CODE_MASK"), vmcs.get("PAGE_FAULT_ERROR_CODE_MATCH"))

    def query(self, vector: int, error_code: Optional[int] = None) -> BitmapQuery:
        """Does the exception exit?  A page fault needs its error code, unless no error code can make a difference."""
        if not 0 <= vector < 32:
            raise UsageError(f"vector {vector} is no exception: the exception bitmap has bits for 0 to 31")
        bit = bool(self.bitmap >> vector & 1)
        name = _vector_name(vector)
        if vector == NMI_VECTOR:
            return BitmapQuery(name, None, 2, None, 'bit 2 does not count for NMIs: the pin-based control "NMI exiting" decides')
        if vector != PF_VECTOR:
            return BitmapQuery(name, None, vector, bit, f"bit {vector} of the exception bitmap is {int(bit)}")
        what = name if error_code is None else f"{name} with error code {error_code:#x}"
        if self.pfec_mask is None or self.pfec_match is None:
            return BitmapQuery(what, None, vector, None, "unknown: PAGE_FAULT_ERROR_CODE_MASK or _MATCH is unknown")
        if self.pfec_match & ~self.pfec_mask:
            return BitmapQuery(what, None, vector, not bit, f"bit 14 is {int(bit)} and no error code can match "
                               f"(match {self.pfec_match:#x} has bits outside mask {self.pfec_mask:#x}): the opposite of the bit counts")
        if self.pfec_mask == 0:
            return BitmapQuery(what, None, vector, bit, f"bit 14 is {int(bit)} and every error code matches (mask 0, match 0)")
        if error_code is None:
            return BitmapQuery(what, None, vector, None, f"depends on the error code: {self.page_faults()}")
        matches = error_code & self.pfec_mask == self.pfec_match
        return BitmapQuery(what, None, vector, bit if matches else not bit,
                           f"bit 14 is {int(bit)}; {error_code:#x} & mask {self.pfec_mask:#x} is {error_code & self.pfec_mask:#x}, "
                           f"match is {self.pfec_match:#x}: {'the bit counts' if matches else 'the opposite of the bit counts'}")

    def page_faults(self) -> str:
        """Which page faults exit, in words."""
        if self.pfec_mask is None or self.pfec_match is None:
            return "unknown: PAGE_FAULT_ERROR_CODE_MASK or _MATCH is unknown"
        bit = bool(self.bitmap >> PF_VECTOR & 1)
        if self.pfec_match & ~self.pfec_mask:
            return "all page faults exit" if not bit else "no page fault exits"
        if self.pfec_mask == 0:
            return "all page faults exit" if bit else "no page fault exits"
        table = bit_table("pfec")
        parts = [f"{row.ident or f'bits {row.bits}'}={row.of(self.pfec_match):#x}" for row in table.fields if row.mask & self.pfec_mask]
        condition = " and ".join(reversed(parts))
        return f"page faults exit if {condition} in the error code" if bit else f"page faults exit unless {condition} in the error code"

    def rows(self) -> Tuple[ExceptionRow, ...]:
        """Every vector that exits or may."""
        found = []
        for vector in range(32):
            bit = self.bitmap >> vector & 1
            answer = self.query(vector)
            if vector == PF_VECTOR and (bit or answer.exits is not False):
                found.append(ExceptionRow(vector, _vector_name(vector), bit, self.page_faults()))
            elif bit and vector != PF_VECTOR:
                found.append(ExceptionRow(vector, _vector_name(vector), bit, "exits" if answer.exits else answer.why))
        return tuple(found)


def _vector_name(vector: int) -> str:
    known = vector_row(vector)
    return f"{known.mnemonic} ({known.title})" if known else f"vector {vector}"
