"""Physical memory with as much of a Windows kernel in it as dbgeng wants to see, and the PAGEDU64 dump of it.

dbgeng finds its way from the debugger data block: module list, processors (KPCR, KPRCB), physical memory block.  All of it lies in the simulated
memory, mapped by page tables of its own, in a run beside the memory that is being wrapped.  The engine takes it for Windows 7 x64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

Put = Callable[[int, bytes], None]
Numbers = Callable[..., None]

PAGE, HEADER = 0x1000, 0x2000
ADDRESS = 0x000FFFFFFFFFF000
BUILD, TIMESTAMP = 7601, 0x4CE7951A

# The kernel's image: what is at which offset.
NT, NT_PAGES = 0xFFFFF80000000000, 0x60
CODE, VMREAD_AT, MODULES, MODULE, NAMES, PROCESSES = (NT + offset for offset in (0x1000, 0x1080, 0x2000, 0x2100, 0x2300, 0x2800))
PROCESSOR_BLOCK, DEBUGGER_BLOCK, VARIABLES, STACK, PCR = (NT + offset for offset in (0x3000, 0x4000, 0x5000, 0x9000, 0x10000))
HIGHEST_PAGE, POOL, BUILD_NAME, BUGCHECK, MEMORY_BLOCK, DESCRIPTOR = (VARIABLES + offset for offset in (0, 0x100, 0x200, 0x300, 0x400, 0x408))
# Within the area of one processor, and within its KPRCB.
PCR_STRIDE, PRCB, THREAD, PROCESS, GDT, IDT = 0x8000, 0x180, 0x4000, 0x5000, 0x7000, 0x7800
PRCB_THREAD, PRCB_NUMBER, PRCB_SPECIAL, PRCB_CONTEXT, PRCB_VENDOR = 0x08, 0x24, 0x40, 0x120, 0x5C0

TABLES_AT, IMAGE_AT, META_PAGES = 0x0, 0x20000, 0x20 + NT_PAGES
"""The run of the kernel: page tables first, then its image."""

MAX_RUNS = 42
"""A complete dump's header has room for so many."""

GENERAL = {name: 0x78 + 8 * index for index, name in enumerate(
    ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"))}

# The GDT: 64-bit kernel code (without it dbgeng takes the processor for an x86), data, user code and data, and a 64-bit TSS in two slots.
DESCRIPTORS = {2: 0x00209B0000000000, 3: 0x00CF93000000FFFF, 4: 0x00CFFB000000FFFF, 5: 0x00CFF3000000FFFF, 6: 0x0020FB0000000000}
TSS_SLOT, TSS_AT, TSS_LIMIT = 8, 0x6000, 0x67
LDT_SELECTOR, CR8 = 0x70, 2


def context(rip: int, rsp: int, **registers: int) -> bytes:
    """CONTEXT of winnt.h: the flags say what is filled, and MxCsr is there twice."""
    data = bytearray(0x4D0)
    struct.pack_into("<I", data, 0x118, 0x1F80)
    struct.pack_into("<II6HI", data, 0x30, 0x10001F, 0x1F80, 0x10, 0x2B, 0x2B, 0x53, 0x2B, 0x18, 0x246)
    for name, value in {**registers, "rip": rip, "rsp": rsp}.items():
        struct.pack_into("<Q", data, GENERAL[name], value)
    return bytes(data)


def special_registers(cr3: int, pcr: int) -> bytes:
    """KSPECIAL_REGISTERS: CR0-CR4, DR0-DR7, GDTR, IDTR, TR, LDTR, MXCSR, CR8, GS bases, STAR, LSTAR, CSTAR, FMASK."""
    data = struct.pack("<4Q6Q", 0x80050031, 0, cr3, 0x426F8, 0, 0, 0, 0, 0xFFFF0FF0, 0x400)
    data += struct.pack("<6xHQ6xHQHHI6Q", 8 * TSS_SLOT + 15, pcr + GDT, 0x7FF, pcr + IDT, 8 * TSS_SLOT, LDT_SELECTOR, 0x1F80, 0, 0, 0, 0, 0, CR8)
    data += struct.pack("<6Q", pcr, 0, 0x0023001000000000, NT + 0x1100, NT + 0x1200, 0x4700)
    return data.ljust(0xE0, b"\0")


def portable_executable() -> bytes:
    """The header of an ntoskrnl.exe with one section."""
    size = NT_PAGES * PAGE
    dos = bytearray(0x40)
    dos[:2] = b"MZ"
    struct.pack_into("<I", dos, 0x3C, 0x40)
    file_header = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, TIMESTAMP, 0, 0, 0xF0, 0x22)
    optional = bytearray(0xF0)
    struct.pack_into("<HBBIIIII", optional, 0, 0x20B, 9, 0, 0x1000, 0, 0, 0x1000, 0x1000)
    struct.pack_into("<QII6HIIIIHH", optional, 24, NT, 0x1000, 0x200, 6, 1, 6, 1, 6, 1, 0, size, 0x400, 0, 1, 0)
    struct.pack_into("<I", optional, 108, 16)
    section = struct.pack("<8s6IHHI", b".text", size - 0x1000, 0x1000, size - 0x1000, 0x400, 0, 0, 0, 0, 0x60000020)
    return bytes(dos) + file_header + bytes(optional) + section


def debugger_data() -> bytes:
    """KDDEBUGGER_DATA64 of wdbgexts.h: addresses of kernel variables, then offsets and sizes within its structures."""
    data = bytearray(0x340)
    struct.pack_into("<QQII", data, 0, DEBUGGER_BLOCK, DEBUGGER_BLOCK, 0x4742444B, len(data))
    pointers = {0x18: NT, 0x20: CODE + 6, 0x48: MODULES, 0x50: PROCESSES, 0x88: BUGCHECK, 0xF8: HIGHEST_PAGE, 0x138: PAGE, 0x1C8: POOL,
                0x1D0: POOL + 8, 0x1D8: POOL + 16, 0x208: BUILD_NAME, 0x218: PROCESSOR_BLOCK, 0x270: MEMORY_BLOCK, 0x290: 0xFFFFF68000000000}
    for offset, value in pointers.items():
        struct.pack_into("<Q", data, offset, value)
    sizes = {0x36: 1, 0x29A: 0xB8, 0x29C: 0x38, 0x29E: 0x28, 0x2A0: 0x70, 0x2A2: 0x164, 0x2A8: 0x4D0, 0x2AA: 0x338, 0x2AC: 0x290, 0x2AE: 0x28,
             0x2B0: 0x4D00, 0x2B4: PRCB_THREAD, 0x2B6: 0x44, 0x2BA: PRCB_VENDOR, 0x2BC: PRCB_CONTEXT, 0x2BE: PRCB_NUMBER, 0x2C0: 0x498, 0x2E0: 0x4E80,
             0x2E2: 0x18, 0x2E4: 0x20, 0x2E6: PRCB, 0x2F2: PRCB_SPECIAL, 0x2F4: 0x10, 0x2F6: 0x18, 0x2F8: 0x20, 0x2FA: 0x30, 0x2FC: 0x28, 0x2FE: 0x50,
             0x300: 0x40}
    for offset, value in sizes.items():
        struct.pack_into("<H", data, offset, value)
    return bytes(data)


@dataclass
class Image:
    """Sparse physical memory: `pages` by frame number, `runs` of (first frame, count); a page of a run that is not in `pages` is zero."""

    pages: Dict[int, Union[bytes, bytearray]] = field(default_factory=dict)
    runs: List[Tuple[int, int]] = field(default_factory=list)
    cpus: int = 2
    cr3: int = 0
    next_table: int = 0

    @property
    def end(self) -> int:
        return max(first + count for first, count in self.runs)

    def exists(self, frame: int) -> bool:
        return any(first <= frame < first + count for first, count in self.runs)

    def read(self, address: int, size: int) -> bytes:
        """Up to `size` bytes; what lies outside the runs ends the answer."""
        data = b""
        while size and self.exists(address >> 12):
            page = self.pages.get(address >> 12, bytes(PAGE))
            piece = bytes(page[address & 0xFFF:(address & 0xFFF) + size])
            data, address, size = data + piece, address + len(piece), size - len(piece)
        return data

    def write(self, address: int, data: bytes) -> None:
        while data:
            page = self.pages.get(address >> 12, bytes(PAGE))
            if not isinstance(page, bytearray):
                page = self.pages[address >> 12] = bytearray(page)
            piece = data[:PAGE - (address & 0xFFF)]
            page[address & 0xFFF:(address & 0xFFF) + len(piece)] = piece
            data, address = data[len(piece):], address + len(piece)

    def u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def physical(self, linear: int) -> Optional[int]:
        """Through the kernel's tables; None where nothing is mapped."""
        table = self.cr3
        for shift in (39, 30, 21, 12):
            entry = self.u64((table & ADDRESS) + (linear >> shift & 511) * 8)
            if not entry & 1:
                return None
            table = entry
        return table & ADDRESS | linear & 0xFFF

    def read_linear(self, linear: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            at = linear + len(data)
            physical = self.physical(at)
            piece = b"" if physical is None else self.read(physical, min(size - len(data), PAGE - (at & 0xFFF)))
            if not piece:
                break
            data += piece
        return data

    def write_linear(self, linear: int, data: bytes) -> int:
        for index, byte in enumerate(data):
            physical = self.physical(linear + index)
            if physical is None:
                return index
            self.write(physical, bytes([byte]))
        return len(data)

    def map(self, linear: int, physical: int) -> None:
        table = self.cr3
        for shift in (39, 30, 21):
            entry = table + (linear >> shift & 511) * 8
            if not self.u64(entry) & 1:
                self.write(entry, struct.pack("<Q", self.next_table | 0x67))
                self.next_table += PAGE
            table = self.u64(entry) & ADDRESS
        self.write(table + (linear >> 12 & 511) * 8, struct.pack("<Q", physical | 0x63))


def wrap(segments: Iterable[Tuple[int, bytes]], cpus: int = 2, empty: Sequence[Tuple[int, int]] = ()) -> Image:
    """The segments (page-aligned physical address, bytes), and `empty` runs of pages, as memory of a Windows machine whose kernel lies behind."""
    image = Image(cpus=cpus)
    for address, data in sorted(segments):
        for offset in range(0, len(data), PAGE):
            image.pages[address + offset >> 12] = bytes(data[offset:offset + PAGE]).ljust(PAGE, b"\0")
        image.runs.append((address >> 12, (len(data) + PAGE - 1) // PAGE))
    image.runs += empty
    meta = (image.end + 0x1FF) & ~0x1FF
    image.runs.append((meta, META_PAGES))
    if len(image.runs) > MAX_RUNS:
        raise ValueError(f"{len(image.runs)} runs: a complete dump has room for {MAX_RUNS}")
    _add_kernel(image, meta << 12)
    return image


def _add_kernel(image: Image, meta: int) -> None:
    base = meta + IMAGE_AT
    image.cr3, image.next_table = meta + TABLES_AT, meta + TABLES_AT + PAGE
    image.write(image.cr3 + 0x1ED * 8, struct.pack("<Q", image.cr3 | 0x63))          # the self map of Windows 7
    for index in range(NT_PAGES):
        image.map(NT + index * PAGE, base + index * PAGE)

    def put(linear: int, data: bytes) -> None:
        image.write(base + linear - NT, data)

    def numbers(linear: int, *values: int) -> None:
        put(linear, struct.pack(f"<{len(values)}Q", *(value & (1 << 64) - 1 for value in values)))

    def unicode_string(linear: int, words: str) -> bytes:
        raw = words.encode("utf-16le")
        put(linear, raw + b"\0\0")
        return struct.pack("<HHIQ", len(raw), len(raw) + 2, 0, linear)

    put(NT, portable_executable())
    put(CODE, bytes.fromhex("0f01c1 90 90 cc c3") + b"\x90" * 64)                    # vmcall; nop; nop; int3; ret
    put(VMREAD_AT, bytes.fromhex("0f78d0 c3"))                                       # vmread rax, rdx; ret
    entry = bytearray(0xE0)                                                          # KLDR_DATA_TABLE_ENTRY
    struct.pack_into("<QQ", entry, 0, MODULES, MODULES)
    struct.pack_into("<QQI", entry, 0x30, NT, CODE, NT_PAGES * PAGE)
    entry[0x48:0x58] = unicode_string(NAMES, "\\SystemRoot\\system32\\ntoskrnl.exe")
    entry[0x58:0x68] = unicode_string(NAMES + 0x80, "ntoskrnl.exe")
    struct.pack_into("<IHH", entry, 0x68, 0x8804000, 1, 0)
    struct.pack_into("<I", entry, 0x80, TIMESTAMP)
    put(MODULE, bytes(entry))
    numbers(MODULES, MODULE, MODULE)
    numbers(PROCESSES, PROCESSES, PROCESSES)
    for number in range(image.cpus):
        _add_processor(image, put, numbers, number)
    numbers(HIGHEST_PAGE, image.end)
    numbers(POOL, 0x7FFFFFEFFFF, 0xFFFF080000000000, 0x7FFFFFEFFFF)
    put(BUILD_NAME, b"7601.17514.amd64fre.win7sp1_rtm.101119-1850\0")
    numbers(BUGCHECK, 0xE2, 0, 0, 0, 0)                                              # MANUALLY_INITIATED_CRASH
    numbers(MEMORY_BLOCK, DESCRIPTOR)
    numbers(DESCRIPTOR, len(image.runs), sum(count for _, count in image.runs), *(number for run in image.runs for number in run))
    put(DEBUGGER_BLOCK, debugger_data())


def _add_processor(image: Image, put: "Put", numbers: "Numbers", number: int) -> None:
    pcr = PCR + number * PCR_STRIDE
    for slot, descriptor in DESCRIPTORS.items():
        numbers(pcr + GDT + 8 * slot, descriptor)
    task = pcr + TSS_AT
    numbers(pcr + GDT + 8 * TSS_SLOT, TSS_LIMIT | (task & 0xFFFFFF) << 16 | 0x8B << 40 | (task >> 24 & 0xFF) << 56, task >> 32)
    numbers(task + 4, STACK + 0x1000 * number)
    numbers(pcr + 0x18, pcr, pcr + PRCB)
    prcb = pcr + PRCB
    put(prcb + PRCB_SPECIAL, special_registers(image.cr3, pcr))
    put(prcb + PRCB_CONTEXT, context(CODE + number, STACK + 0x400 * number, rax=0x1111 + number, rcx=0x2222 + number))
    numbers(prcb + PRCB_THREAD, pcr + THREAD)
    put(prcb + PRCB_NUMBER, struct.pack("<I", number))
    put(prcb + PRCB_VENDOR, b"GenuineIntel\0")
    numbers(PROCESSOR_BLOCK + 8 * number, prcb)
    numbers(pcr + THREAD + 0x70, pcr + PROCESS)                                      # KTHREAD.ApcState.Process
    numbers(pcr + PROCESS + 0x28, image.cr3)                                         # EPROCESS.DirectoryTableBase


def write_dump(path: Path, image: Image, kind: str = "complete") -> Path:
    """kind "complete": type 1, the runs' pages follow the header.  "bitmap": type 5, a bitmap of the pages comes first."""
    frames = [frame for first, count in sorted(image.runs) for frame in range(first, first + count)]
    with open(path, "wb") as out:
        if kind == "complete":
            out.write(_header(image, 1, HEADER + len(frames) * PAGE))
        else:
            bits = bytearray((image.end + 7) // 8)
            for frame in frames:
                bits[frame >> 3] |= 1 << (frame & 7)
            first_page = HEADER + 0x38 + len(bits) + 0xFFF & ~0xFFF
            summary = bytearray(first_page - HEADER)
            struct.pack_into("<4s4s", summary, 0, b"FDMP", b"DUMP")
            struct.pack_into("<QQQ", summary, 0x20, first_page, len(frames), image.end)
            summary[0x38:0x38 + len(bits)] = bits
            out.write(_header(image, 5, first_page + len(frames) * PAGE) + summary)
        for frame in frames:
            out.write(image.pages.get(frame, bytes(PAGE)))
    return path


def _header(image: Image, dump_type: int, size: int) -> bytes:
    """DUMP_HEADER64; Windows fills what it does not use with "PAGE"."""
    data = bytearray(b"PAGE" * (HEADER // 4))
    struct.pack_into("<8sII", data, 0, b"PAGEDU64", 15, BUILD)
    struct.pack_into("<4Q", data, 0x10, image.cr3, 0, MODULES, PROCESSES)
    struct.pack_into("<III", data, 0x30, 0x8664, image.cpus, 0xE2)
    data[0x40:0x80] = bytes(0x40)
    struct.pack_into("<Q", data, 0x80, DEBUGGER_BLOCK)
    struct.pack_into("<IIQ", data, 0x88, len(image.runs), 0x45474150, sum(count for _, count in image.runs))
    for index, run in enumerate(image.runs):
        struct.pack_into("<QQ", data, 0x98 + 16 * index, *run)
    data[0x348:0x348 + 3000] = context(CODE, STACK, rax=0x1111, rcx=0x2222).ljust(3000, b"\0")
    struct.pack_into("<IIQQII", data, 0xF00, 0x80000003, 0, 0, CODE, 0, 0)           # EXCEPTION_RECORD64: a breakpoint
    struct.pack_into("<I", data, 0xF98, dump_type)
    struct.pack_into("<QQ", data, 0xFA0, size, 132000000000000000)                   # RequiredDumpSpace, SystemTime
    data[0xFB0:0x1030] = bytes(128)
    struct.pack_into("<Q5I", data, 0x1030, 600000000, 0, 0, 1, 0x110, 0)             # SystemUpTime, ProductType, SuiteMask
    return bytes(data)


def gather(frames: Sequence[int], most: int) -> List[Tuple[int, int]]:
    """Runs (first, count) that hold all the frames, at most `most` of them: the shortest gaps are filled."""
    runs = [[frame, frame] for frame in sorted(set(frames))]
    gaps = sorted(range(1, len(runs)), key=lambda index: runs[index][0] - runs[index - 1][1], reverse=True)
    keep = set(gaps[:most - 1])
    merged: List[List[int]] = []
    for index, (first, last) in enumerate(runs):
        if merged and (index not in keep or first == merged[-1][1] + 1):
            merged[-1][1] = last
        else:
            merged.append([first, last])
    return [(first, last - first + 1) for first, last in merged]
