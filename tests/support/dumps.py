"""Writers of every dump format, from the formats' own descriptions: what tests compare with each other, mutate and cut.

All take segments, [(physical address, bytes), ...], sorted, disjoint and page-aligned where the format has pages only, and give the bytes of
the file.  None of them uses the readers' code.  What other programs wrote is in tests/data/dumps.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

PAGE = 4096
Segments = Sequence[Tuple[int, bytes]]


def pages_of(segments: Segments) -> Dict[int, bytes]:
    """Page frame number -> page; segments have to be page-aligned."""
    found: Dict[int, bytes] = {}
    for address, data in segments:
        assert address % PAGE == 0 and len(data) % PAGE == 0
        for at in range(0, len(data), PAGE):
            found[(address + at) // PAGE] = bytes(data[at:at + PAGE])
    return found


def note(name: str, kind: int, data: bytes) -> bytes:
    raw = name.encode() + b"\0"
    return struct.pack("<III", len(raw), len(data), kind) + raw + bytes(-len(raw) % 4) + data + bytes(-len(data) % 4)


def qemu_note(**registers: int) -> bytes:
    """QEMUCPUState with the named registers (rax ... rip, rflags, cr0 ... cr4, kernel_gs_base); the rest is 0."""
    order = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"]
    state = struct.pack("<II", 1, 0x1B8) + b"".join(struct.pack("<Q", registers.get(name, 0)) for name in order)
    state += bytes(240)
    state += b"".join(struct.pack("<Q", registers.get(f"cr{n}", 0)) for n in range(5)) + struct.pack("<Q", registers.get("kernel_gs_base", 0))
    return note("QEMU", 0, state)


def raw(segments: Segments) -> bytes:
    """Holes are zeros, as in any raw image."""
    out = bytearray(max((address + len(data) for address, data in segments), default=0))
    for address, data in segments:
        out[address:address + len(data)] = data
    return bytes(out)


def elf(segments: Segments, notes: bytes = b"", bits: int = 64, ehsize: Optional[int] = None, extended: bool = False,
        loads: Optional[Sequence[Tuple[int, int, int, int]]] = None) -> bytes:
    """ET_CORE.  `extended` counts the program headers in sh_info; `loads`, (segment, offset in it, address, size), makes other program
    headers than one a segment."""
    phsize, header_size = (56, 64) if bits == 64 else (32, 52)
    if loads is None:
        loads = [(index, 0, address, len(data)) for index, (address, data) in enumerate(segments)]
    count = len(loads) + 1
    section_at = header_size
    table_at = header_size + (64 if bits == 64 else 40) * extended
    notes_at = table_at + phsize * count
    at = notes_at + len(notes)
    where = []
    for _, data in segments:
        where.append(at)
        at += len(data)

    def program(kind: int, offset: int, address: int, size: int, memory_size: int) -> bytes:
        if bits == 64:
            return struct.pack("<IIQQQQQQ", kind, 0, offset, 0, address, size, memory_size, 0)
        return struct.pack("<8I", kind, offset, 0, address, size, memory_size, 0, 0)

    table = program(4, notes_at, 0, len(notes), len(notes))
    table += b"".join(program(1, where[index] + offset, address, size, size) for index, offset, address, size in loads)
    shown = 0xFFFF if extended else count
    ehsize = header_size if ehsize is None else ehsize
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    word = "Q" if bits == 64 else "I"
    header = ident + struct.pack(f"<HHI{word}{word}{word}IHHHHHH", 4, 62 if bits == 64 else 3, 1, 0, table_at, section_at if extended else 0, 0,
                                 ehsize, phsize, shown, 0, 1 if extended else 0, 0)
    section = b""
    if extended:
        section = struct.pack("<IIQQQQIIQQ" if bits == 64 else "<10I", 0, 0, 0, 0, 0, 0, 0, count, 0, 0)
    return header + section + table + notes + b"".join(bytes(data) for _, data in segments)


# Compressors that any decompressor has to understand: snappy and LZO1X of literals only.

def snappy_literals(data: bytes) -> bytes:
    length, size = b"", len(data)
    while True:
        length += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
        size >>= 7
        if not size:
            break
    return length + b"".join(b"\xf4" + struct.pack("<H", len(part) - 1) + part for part in (data[at:at + 65536] for at in range(0, len(data), 65536)))


def lzo_literals(data: bytes) -> bytes:
    """Literals (at least 4), then the end mark."""
    rest = len(data) - 18
    if rest <= 0:
        head = bytes([len(data) + 17])
    else:
        zeros, last = divmod(rest - 1, 255)
        head = b"\0" + bytes(zeros) + bytes([last + 1])
    return head + data + b"\x11\0\0"


COMPRESSORS: Dict[str, Tuple[int, Callable[[bytes], bytes]]] = {
    "plain": (0, bytes), "zlib": (1, zlib.compress), "lzo": (2, lzo_literals), "snappy": (4, snappy_literals),
    "zstd": (32, bytes)}


def kdump(segments: Segments, compression: str = "zlib", notes: bytes = b"", vmcoreinfo: bytes = b"", max_mapnr: Optional[int] = None,
          excluded: Sequence[int] = (), split: int = 0, version: int = 6, bits: int = 64, machine: bytes = b"x86_64",
          signature: bytes = b"KDUMP   ", compress: Optional[Callable[[bytes], bytes]] = None) -> bytes:
    """`excluded`: page frame numbers that exist and are not stored.  `compress` in the place of the literals-only compressors."""
    flag, plain = COMPRESSORS[compression]
    literals, compress = compress is None and compression in ("lzo", "snappy"), compress or plain
    pages = pages_of(segments)
    top = max(list(pages) + list(excluded), default=0) + 1 if max_mapnr is None else max_mapnr
    bitmap_size = -(-top // 8 // PAGE) * PAGE or PAGE
    exists, stored = bytearray(bitmap_size), bytearray(bitmap_size)
    for pfn in list(pages) + list(excluded):
        exists[pfn // 8] |= 1 << pfn % 8
    for pfn in pages:
        stored[pfn // 8] |= 1 << pfn % 8
    sub_at, notes_at = PAGE, PAGE + 512
    tail = notes + vmcoreinfo
    sub_blocks = -(-(512 + len(tail)) // PAGE)
    utsname = b"".join(text.ljust(65, b"\0") for text in (b"Linux", b"", b"", b"", machine, b""))
    header = signature + struct.pack("<i", version) + utsname
    header = header.ljust(424 if bits == 64 else 412, b"\0")
    header += struct.pack("<10I", flag, PAGE, sub_blocks, bitmap_size * 2 // PAGE, min(top, 0xFFFFFFFF), 0, 0, 0, 0, 1)
    values = (0, 31 if excluded else 0, split, 0, 0, notes_at + len(notes) if vmcoreinfo else 0, len(vmcoreinfo),
              notes_at if notes else 0, len(notes), 0, 0, 0, top, top)
    sub = struct.pack("<QiiQQQQQQQQQQQ" if bits == 64 else "<IiiIIQIQIQIQQQ", *values)
    out = header.ljust(sub_at, b"\0") + sub.ljust(512, b"\0") + tail
    out = out.ljust((1 + sub_blocks) * PAGE, b"\0") + bytes(exists) + bytes(stored)
    data_at = len(out) + 24 * len(pages)
    table, body = b"", bytearray()
    zero_at: Optional[Tuple[int, int, int]] = None
    for pfn in sorted(pages):
        packed, used = compress(pages[pfn]), flag
        if len(packed) >= PAGE and compression != "plain":
            # Both programs store a page as it is where compression does not make it smaller.
            packed, used = (packed, used) if literals else (pages[pfn], 0)
        entry = (data_at + len(body), len(packed), used)
        if not any(pages[pfn]):
            if zero_at is None:
                zero_at = entry
                body += packed
            entry = zero_at
        else:
            body += packed
        table += struct.pack("<QIIQ", *entry, 0)
    return out + table + bytes(body)


def flattened(data: bytes, cuts: Sequence[int] = (), order: Optional[Sequence[int]] = None, end: bool = True) -> bytes:
    """`data` in records that are cut at `cuts` and written in `order`; `end` writes the end mark."""
    edges = sorted({0, len(data), *(cut for cut in cuts if 0 < cut < len(data))})
    records = list(zip(edges, edges[1:]))
    out = bytearray(struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0"))
    for index in (order if order is not None else range(len(records))):
        first, last = records[index]
        out += struct.pack(">qq", first, last - first) + data[first:last]
    return bytes(out + (struct.pack(">qq", -1, -1) if end else b""))


def lime(segments: Segments) -> bytes:
    return b"".join(struct.pack("<4sIQQQ", b"EMiL", 1, address, address + len(data) - 1, 0) + bytes(data) for address, data in segments)


def avml(segments: Segments, compress: Callable[[bytes], bytes] = snappy_literals) -> bytes:
    """Frames of 64 KiB, every second one stored plain, as a snappy writer does with what does not shrink."""
    out = b""
    for address, data in segments:
        stream = b"\xff\x06\x00\x00sNaPpY"
        for number, at in enumerate(range(0, len(data), 65536)):
            plain = bytes(data[at:at + 65536])
            kind, body = (1, plain) if number % 2 else (0, compress(plain))
            stream += bytes([kind]) + (len(body) + 4).to_bytes(3, "little") + bytes(4) + body
        out += struct.pack("<4sIQQQ", b"AVML", 2, address, address + len(data) - 1, 0) + stream + struct.pack("<Q", len(stream))
    return out


def windows64(segments: Segments, kind: str = "full", dump_type: Optional[int] = None, **registers: int) -> bytes:
    """PAGEDU64.  kind: "full" (runs of the header), "bitmap" (FDMP), "ranges" (RDMP)."""
    pages = pages_of(segments)
    header = bytearray(b"PAGE" * 0x800)
    struct.pack_into("<8sII", header, 0, b"PAGEDU64", 15, 19041)
    struct.pack_into("<Q", header, 0x10, registers.get("cr3", 0x1AA000))
    struct.pack_into("<III", header, 0x30, 0x8664, 1, 0xE2)
    struct.pack_into("<4Q", header, 0x40, 1, 2, 3, 4)
    struct.pack_into("<Q", header, 0x80, 0xFFFFF80000004000)
    runs = [(address // PAGE, len(data) // PAGE) for address, data in segments]
    if kind == "full":
        struct.pack_into("<IIQ", header, 0x88, len(runs), 0, sum(count for _, count in runs))
        for index, run in enumerate(runs):
            struct.pack_into("<QQ", header, 0x98 + 16 * index, *run)
    context = bytearray(0x4D0)
    struct.pack_into("<IIHHHHHHI", context, 0x30, 0x10001F, 0x1F80, 0x10, 0x2B, 0x2B, 0x53, 0x2B, 0x18, 0x246)
    struct.pack_into("<I", context, 0x118, 0x1F80)                       # FltSave.MxCsr, which has to equal MxCsr
    order = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"]
    struct.pack_into("<17Q", context, 0x78, *(registers.get(name, 0) for name in order))
    header[0x348:0x348 + len(context)] = context
    struct.pack_into("<I", header, 0xF98, dump_type if dump_type is not None else {"full": 1, "bitmap": 5, "ranges": 10}[kind])
    body = b"".join(pages[pfn] for pfn in sorted(pages))
    if kind == "full":
        return bytes(header) + body
    if kind == "bitmap":
        top = max(pages, default=0) + 1
        bits = bytearray(-(-top // 8))
        for pfn in pages:
            bits[pfn // 8] |= 1 << pfn % 8
        first = -(-(0x2038 + len(bits)) // PAGE) * PAGE
        summary = struct.pack("<4s4s24xQQQ", b"FDMP", b"DUMP", first, len(pages), top) + bits
        return bytes(header) + summary.ljust(first - 0x2000, b"\0") + body
    first = -(-(0x2030 + 16 * (len(runs) + 1)) // PAGE) * PAGE
    summary = struct.pack("<I4s4sIQQIIQ", 0x40, b"RDMP", b"DUMP", 0, first - 0x2020, first, len(runs), 0, len(pages))
    summary += b"".join(struct.pack("<QQ", *run) for run in runs)
    return bytes(header) + summary.ljust(first - 0x2000, b"\0") + body


def windows32(segments: Segments) -> bytes:
    """PAGEDUMP, complete."""
    header = bytearray(b"PAGE" * 0x400)
    struct.pack_into("<8sIII", header, 0, b"PAGEDUMP", 15, 2600, 0x39000)
    struct.pack_into("<III", header, 0x20, 0x14C, 1, 0xD1)
    struct.pack_into("<II", header, 0x64, len(segments), sum(len(data) // PAGE for _, data in segments))
    for index, (address, data) in enumerate(segments):
        struct.pack_into("<II", header, 0x6C + 8 * index, address // PAGE, len(data) // PAGE)
    struct.pack_into("<I", header, 0x320, 0x10007)
    struct.pack_into("<16I", header, 0x320 + 0x8C, 0, 0x30, 0x23, 0x23, 1, 2, 3, 4, 5, 6, 7, 0x80401000, 8, 0x246, 0x8054A000, 0x10)
    struct.pack_into("<I", header, 0xF88, 1)
    return bytes(header) + b"".join(bytes(data) for _, data in segments)


def vmware_state(regions: Sequence[Tuple[int, int, int]], memory: Optional[bytes] = None, cpu: bytes = b"", magic: int = 0xBED2BED2) -> bytes:
    """A .vmss/.vmsn: regions as (physical page, page in the image, pages); `memory` puts the image inside."""
    groups: List[Tuple[bytes, bytes]] = [(b"Checkpoint", vmware_tag("fileversion", (), 7)), (b"cpu", cpu)]
    body = vmware_tag("regionsCount", (), len(regions))
    for index, (page, at, count) in enumerate(regions):
        body += vmware_tag("regionPageNum", (index,), at) + vmware_tag("regionPPN", (index,), page) + vmware_tag("regionSize", (index,), count)
    if memory is not None:
        body += vmware_block("Memory", (0, 0), memory, padding=37)
    groups.append((b"memory", body))
    out = struct.pack("<III", magic, 8, len(groups))
    at = len(out) + 80 * len(groups)
    for name, data in groups:
        out += struct.pack("<64sQQ", name, at, len(data) + 2)
        at += len(data) + 2
    return out + b"".join(data + b"\0\0" for _, data in groups)


def vmware_tag(name: str, indices: Tuple[int, ...], value: int, size: int = 4) -> bytes:
    return bytes([size | len(indices) << 6, len(name)]) + name.encode() + struct.pack(f"<{len(indices)}I", *indices) + value.to_bytes(size, "little")


def vmware_block(name: str, indices: Tuple[int, ...], data: bytes, padding: int = 0, compressed: bool = False) -> bytes:
    head = bytes([(62 if compressed else 63) | len(indices) << 6, len(name)]) + name.encode() + struct.pack(f"<{len(indices)}I", *indices)
    return head + struct.pack("<QQH", len(data), len(data), padding) + bytes(padding) + data


def vmware_pair(segments: Segments, folder: Path, name: str, ending: str = ".vmss") -> Path:
    """A .vmem and its state file in `folder`; gives the path of the .vmem."""
    regions, image = vmware_image(segments)
    (folder / f"{name}{ending}").write_bytes(vmware_state(regions))
    path = folder / f"{name}.vmem"
    path.write_bytes(image)
    return path


def vmware_image(segments: Segments) -> Tuple[List[Tuple[int, int, int]], bytes]:
    regions, image = [], b""
    for address, data in segments:
        regions.append((address // PAGE, len(image) // PAGE, len(data) // PAGE))
        image += bytes(data)
    return regions, image


def every_format(segments: Segments) -> Dict[str, bytes]:
    """Each format that one file holds, by a name for the test's output.  Raw and VMware's pair are apart: raw has no holes."""
    regions, image = vmware_image(segments)
    core = elf(segments, qemu_note(rip=1))
    zlib_dump = kdump(segments, "zlib")
    formats = {
        "elf64": core,
        "elf64-qemu": elf(segments, qemu_note(rip=1), ehsize=8, extended=True),
        "elf32": elf([s for s in segments if s[0] + len(s[1]) < 1 << 32], bits=32),
        "kdump-zlib": zlib_dump, "kdump-plain": kdump(segments, "plain"),
        "kdump-lzo": kdump(segments, "lzo"), "kdump-snappy": kdump(segments, "snappy"),
        "kdump-32": kdump(segments, "zlib", bits=32, machine=b"i686"),
        "flat-kdump": flattened(zlib_dump, range(1000, len(zlib_dump), 5000)),
        "flat-elf": flattened(core, [64, 100, 5000], order=None),
        "lime": lime(segments), "avml": avml(segments),
        "windows-full": windows64(segments, "full"), "windows-bitmap": windows64(segments, "bitmap"), "windows-ranges": windows64(segments, "ranges"),
        "vmware-inside": vmware_state(regions, image),
    }
    if all(address + len(data) < 1 << 32 for address, data in segments):
        formats["windows32"] = windows32(segments)
    return formats
