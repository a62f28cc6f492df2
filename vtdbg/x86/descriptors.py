"""Segment descriptors and gates: decode, encode, and the two packed forms of the access rights that a VMCS and a VMCB hold.

Sources: SDM vol. 3, Segment Descriptors; System Descriptor Types; Segment Descriptor Tables in IA-32e Mode; IDT Descriptors; 64-Bit Mode IDT;
APM vol. 2, Legacy Segment Descriptors; Long-Mode Segment Descriptors.  Dated 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.errors import FormatError

AR_UNUSABLE = 1 << 16
AR_MASK = 0xF0FF
"""Descriptor bits 55:52 and 47:40 in the place where the VMCS keeps them; bits 11:8 (limit 19:16 in the descriptor) are reserved there."""

NULL_ACCESS_RIGHTS = AR_UNUSABLE
"""What to write for a null selector: only the unusable bit counts (SDM vol. 3, Checks on Guest Segment Registers)."""

_CODE_TYPES = ("execute-only", "execute-only, accessed", "execute/read", "execute/read, accessed", "execute-only, conforming",
               "execute-only, conforming, accessed", "execute/read, conforming", "execute/read, conforming, accessed")
_DATA_TYPES = ("read-only", "read-only, accessed", "read/write", "read/write, accessed", "read-only, expand-down",
               "read-only, expand-down, accessed", "read/write, expand-down", "read/write, expand-down, accessed")


@dataclass(frozen=True)
class SystemType:
    """A type of a system descriptor (S = 0).  `bits` is the size of what it describes: a 16-, 32- or 64-bit TSS or gate."""

    kind: str
    name: str
    bits: int = 0
    busy: bool = False


SYSTEM_TYPES_32: Mapping[int, SystemType] = {
    0x1: SystemType("tss", "16-bit TSS (available)", 16),
    0x2: SystemType("ldt", "LDT"),
    0x3: SystemType("tss", "16-bit TSS (busy)", 16, busy=True),
    0x4: SystemType("call gate", "16-bit call gate", 16),
    0x5: SystemType("task gate", "task gate"),
    0x6: SystemType("interrupt gate", "16-bit interrupt gate", 16),
    0x7: SystemType("trap gate", "16-bit trap gate", 16),
    0x9: SystemType("tss", "32-bit TSS (available)", 32),
    0xB: SystemType("tss", "32-bit TSS (busy)", 32, busy=True),
    0xC: SystemType("call gate", "32-bit call gate", 32),
    0xE: SystemType("interrupt gate", "32-bit interrupt gate", 32),
    0xF: SystemType("trap gate", "32-bit trap gate", 32),
}
SYSTEM_TYPES_64: Mapping[int, SystemType] = {
    0x2: SystemType("ldt", "LDT", 64),
    0x9: SystemType("tss", "64-bit TSS (available)", 64),
    0xB: SystemType("tss", "64-bit TSS (busy)", 64, busy=True),
    0xC: SystemType("call gate", "64-bit call gate", 64),
    0xE: SystemType("interrupt gate", "64-bit interrupt gate", 64),
    0xF: SystemType("trap gate", "64-bit trap gate", 64),
}
"""SDM vol. 3, System Descriptor Types: what is absent is reserved."""

GATES = frozenset({"call gate", "task gate", "interrupt gate", "trap gate"})


@dataclass(frozen=True)
class SegmentDescriptor:
    """A code, data, LDT or TSS descriptor (`kind`: "code" "data" "ldt" "tss" "null" "reserved").

    `limit` is the last byte after granularity, `limit_field` what is stored.  `bits` for a TSS: 16, 32 or 64; for code: its operand size.
    `problems` says what a processor would not accept or a reader must know.
    """

    raw: int
    size: int
    kind: str
    type_name: str
    bits: int
    base: int
    limit: int
    limit_field: int
    type: int
    code_or_data: bool
    dpl: int
    present: bool
    avl: bool
    long: bool
    db: bool
    granularity: bool
    busy: bool
    problems: Tuple[str, ...] = ()

    @property
    def access_rights(self) -> int:
        """The word as VMWRITE wants it: descriptor bits 55:40 without the limit's bits (SDM vol. 3, Guest Register State)."""
        return self.raw >> 40 & AR_MASK

    @property
    def vmcb_attrib(self) -> int:
        """The word as a VMCB keeps it: descriptor bits 55:52 and 47:40 packed in 12 bits (APM vol. 2, Segment State in the VMCB)."""
        return vmcb_attrib(self.access_rights)

    @property
    def flags(self) -> str:
        """The bits beside type and DPL that are 1: "P G L"."""
        return " ".join(name for name, value in (("P", self.present), ("G", self.granularity), ("L", self.long), ("D/B", self.db),
                                                 ("AVL", self.avl)) if value)


@dataclass(frozen=True)
class GateDescriptor:
    """A call, task, interrupt or trap gate.  `ist` is 0 where the gate has none (it is a field of 64-bit interrupt and trap gates only);
    `parameters` is the count of a 16- or 32-bit call gate."""

    raw: int
    size: int
    kind: str
    type_name: str
    bits: int
    type: int
    selector: int
    offset: int
    dpl: int
    present: bool
    ist: int
    parameters: int
    problems: Tuple[str, ...] = ()


Descriptor = Union[SegmentDescriptor, GateDescriptor]


def limit_of(limit_field: int, granularity: bool) -> int:
    """The last byte of the segment: with granularity the field counts 4 KiB pages (SDM vol. 3, Segment Descriptors)."""
    return limit_field << 12 | 0xFFF if granularity else limit_field


def type_name(type_field: int, code_or_data: bool, long_mode: bool) -> str:
    """"code, execute/read, accessed", "data, read/write", "64-bit TSS (busy)"."""
    if code_or_data:
        return f"code, {_CODE_TYPES[type_field & 7]}" if type_field & 8 else f"data, {_DATA_TYPES[type_field & 7]}"
    known = (SYSTEM_TYPES_64 if long_mode else SYSTEM_TYPES_32).get(type_field)
    return known.name if known else f"reserved type {type_field:#x}"


def type_in_any_mode(type_field: int, code_or_data: bool) -> str:
    """The type's name where the mode is not known: as in long mode, or as in 32-bit mode for the types that long mode reserves."""
    name = type_name(type_field, code_or_data, long_mode=True)
    return type_name(type_field, code_or_data, long_mode=False) if name.startswith("reserved") else name


def vmcb_attrib(access_rights: int) -> int:
    """VMCS access rights in the VMCB's packed form.  An unusable segment is 0 there: SVM has no unusable bit, P = 0 says it
    (APM vol. 2, Segment State in the VMCB; Linux 6.12 svm_set_segment)."""
    if access_rights & AR_UNUSABLE:
        return 0
    return (access_rights & 0xFF) | (access_rights >> 4 & 0xF00)


def from_vmcb_attrib(attrib: int) -> int:
    """The VMCB's packed form as VMCS access rights; P = 0 becomes unusable."""
    rights = (attrib & 0xFF) | (attrib & 0xF00) << 4
    return rights if attrib & 0x80 else rights | AR_UNUSABLE


def access_rights_for(selector: int, descriptor: Optional[SegmentDescriptor]) -> int:
    """What to VMWRITE for a segment register that was loaded with `selector`: the descriptor's word, or unusable for a null selector."""
    if descriptor is None or selector & 0xFFFC == 0:
        return NULL_ACCESS_RIGHTS
    return descriptor.access_rights


def is_wide(low: int, long_mode: bool) -> bool:
    """Does the descriptor with bits 63:0 `low` take 16 bytes?  In IA-32e mode: LDT, TSS and call gates."""
    return long_mode and not low >> 44 & 1 and low >> 40 & 0xF in (2, 9, 0xB, 0xC)


def decode(data: bytes, long_mode: bool = False) -> Descriptor:
    """One descriptor of a GDT or LDT out of its 8 bytes (16 for a system descriptor in IA-32e mode).

    Raises FormatError for other lengths: half of a 64-bit TSS descriptor is not decoded with an invented upper half.
    """
    if len(data) < 8:
        raise FormatError("descriptor", f"{len(data)} bytes; a descriptor has 8")
    low = int.from_bytes(data[:8], "little")
    wanted = 16 if is_wide(low, long_mode) else 8
    if len(data) != wanted:
        hint = " (a system descriptor in IA-32e mode)" if wanted == 16 else ""
        raise FormatError("descriptor", f"{len(data)} bytes; this one has {wanted}{hint}")
    raw = int.from_bytes(data, "little")
    if not low >> 44 & 1:
        known = (SYSTEM_TYPES_64 if long_mode else SYSTEM_TYPES_32).get(low >> 40 & 0xF)
        if known is not None and known.kind in GATES:
            return _gate(raw, len(data), known, long_mode, in_idt=False)
    return _segment(raw, len(data), long_mode)


def decode_gate(data: bytes, long_mode: bool = False) -> Descriptor:
    """One entry of an IDT: 16 bytes in IA-32e mode, 8 otherwise; a SegmentDescriptor of kind "null" or "reserved" for what is no gate.

    Raises FormatError for other lengths.
    """
    wanted = 16 if long_mode else 8
    if len(data) != wanted:
        raise FormatError("IDT gate", f"{len(data)} bytes; a gate has {wanted} {'in' if long_mode else 'outside'} IA-32e mode")
    raw = int.from_bytes(data, "little")
    known = (SYSTEM_TYPES_64 if long_mode else SYSTEM_TYPES_32).get(raw >> 40 & 0xF)
    if raw >> 44 & 1 or known is None or known.kind not in GATES or known.kind == "call gate":
        found = _segment(raw & bits.mask(63), wanted, long_mode)
        if raw == 0:
            return found
        return _reserved(raw, wanted, found, f"{found.type_name} is no gate: delivery through it raises #GP")
    return _gate(raw, wanted, known, long_mode, in_idt=True)


def _segment(raw: int, size: int, long_mode: bool) -> SegmentDescriptor:
    low = raw & bits.mask(63)
    table = bits.table("segment_descriptor")
    kind_bits, code_or_data = table.get(low, "TYPE"), table.test(low, "S")
    granularity, long, db = table.test(low, "G"), table.test(low, "L"), table.test(low, "DB")
    limit_field = table.get(low, "LIMIT_19_16") << 16 | table.get(low, "LIMIT_15_0")
    base = table.get(low, "BASE_31_24") << 24 | table.get(low, "BASE_23_0")
    problems: List[str] = []
    kind, width, busy = "data", 32 if db else 16, False
    if code_or_data and kind_bits & 8:
        kind = "code"
        if long and long_mode:
            width = 64
            if db:
                problems.append("L and D are both 1: reserved, a far transfer to it raises #GP")
    elif not code_or_data:
        known = (SYSTEM_TYPES_64 if long_mode else SYSTEM_TYPES_32).get(kind_bits)
        kind, width, busy = (known.kind, known.bits, known.busy) if known else ("null" if low == 0 else "reserved", 0, False)
        if kind == "reserved":
            problems.append(f"type {kind_bits:#x} is reserved{' in IA-32e mode' if long_mode else ''}")
        if size == 16:
            base |= (raw >> 64 & 0xFFFFFFFF) << 32
            if raw >> 104 & 0x1F:
                problems.append("bits 12:8 of the fourth dword are not 0: the type field there has to be 0")
    name = "null" if low == 0 else type_name(kind_bits, code_or_data, long_mode)
    return SegmentDescriptor(raw, size, kind, name, width, base, limit_of(limit_field, granularity), limit_field, kind_bits, code_or_data,
                             table.get(low, "DPL"), table.test(low, "P"), table.test(low, "AVL"), long, db, granularity, busy, tuple(problems))


def _reserved(raw: int, size: int, found: SegmentDescriptor, problem: str) -> SegmentDescriptor:
    return SegmentDescriptor(raw, size, "reserved", found.type_name, 0, found.base, found.limit, found.limit_field, found.type, found.code_or_data,
                             found.dpl, found.present, found.avl, found.long, found.db, found.granularity, busy=False, problems=(problem,))


def _gate(raw: int, size: int, known: SystemType, long_mode: bool, in_idt: bool) -> GateDescriptor:
    offset = (raw & 0xFFFF) | (raw >> 48 & 0xFFFF) << 16
    problems: List[str] = []
    ist = parameters = 0
    if size == 16:
        offset |= (raw >> 64 & 0xFFFFFFFF) << 32
        if not in_idt and raw >> 104 & 0x1F:
            problems.append("bits 12:8 of the fourth dword are not 0: the type field there has to be 0")
    if known.kind == "task gate":
        offset = 0
    elif known.bits == 16:
        offset &= 0xFFFF
    if in_idt and long_mode:
        ist = raw >> 32 & 7
    elif known.kind == "call gate" and not long_mode:
        parameters = raw >> 32 & 0x1F
    if size == 16 and in_idt and not _canonical(offset, 57):
        problems.append(f"offset {offset:#x} is not canonical: delivery through the gate raises #GP")
    if not in_idt and known.kind in ("interrupt gate", "trap gate"):
        problems.append(f"{known.name} outside the IDT: any use of the selector raises #GP")
    return GateDescriptor(raw, size, known.kind, known.name, known.bits, raw >> 40 & 0xF, raw >> 16 & 0xFFFF, offset, raw >> 45 & 3,
                          bool(raw >> 47 & 1), ist, parameters, tuple(problems))


def _canonical(address: int, width: int) -> bool:
    return address >> (width - 1) in (0, (1 << (65 - width)) - 1)


def encode_segment(base: int, limit: int, access_rights: int, size: int = 8) -> bytes:
    """The descriptor with this base, this last byte and these access rights (VMCS form; an unusable word gives a null descriptor).

    The inverse of `decode`: raises FormatError where no descriptor can say it (base too wide, a limit that the granularity cannot express).
    """
    if access_rights & AR_UNUSABLE:
        return bytes(size)
    if access_rights & ~AR_MASK:
        raise FormatError("access rights", f"bits {access_rights & ~AR_MASK:#x} are reserved")
    if size not in (8, 16) or base < 0 or base >> (64 if size == 16 else 32):
        raise FormatError("descriptor", f"base {base:#x} does not fit in a descriptor of {size} bytes")
    limit_field = limit
    if access_rights & 0x8000:
        if limit & 0xFFF != 0xFFF:
            raise FormatError("descriptor", f"limit {limit:#x} does not end in fff, as it must with granularity 1")
        limit_field = limit >> 12
    if limit < 0 or limit_field >> 20:
        raise FormatError("descriptor", f"limit {limit:#x} does not fit in 20 bits")
    low = ((limit_field & 0xFFFF) | (base & 0xFFFFFF) << 16 | access_rights << 40 | (limit_field >> 16) << 48 | (base >> 24 & 0xFF) << 56)
    return (low | base >> 32 << 64).to_bytes(size, "little")


def encode_gate(kind: str, selector: int, offset: int, *, width: int = 64, dpl: int = 0, present: bool = True, ist: int = 0,
                parameters: int = 0) -> bytes:
    """A gate of `kind` ("interrupt gate", "trap gate", "call gate", "task gate") and `width` 16, 32 or 64; the inverse of the decoders.

    Raises FormatError for a kind that the width does not have or a value that does not fit.
    """
    types = SYSTEM_TYPES_64 if width == 64 else SYSTEM_TYPES_32
    found = [number for number, known in types.items() if known.kind == kind and known.bits in (width, 0)]
    if not found:
        raise FormatError("gate", f"there is no {width}-bit {kind}")
    if offset < 0 or offset >> width or selector >> 16 or dpl > 3 or ist > 7 or parameters > 31:
        raise FormatError("gate", f"selector {selector:#x}, offset {offset:#x}, DPL {dpl}, IST {ist} or parameter count {parameters} does not fit")
    raw = ((offset & 0xFFFF) | selector << 16 | (ist | parameters) << 32 | found[0] << 40 | dpl << 45 | int(present) << 47
           | (offset >> 16 & 0xFFFF) << 48 | (offset >> 32) << 64)
    return raw.to_bytes(16 if width == 64 else 8, "little")
