"""kdump-compressed and diskdump files: makedumpfile, QEMU's dump-guest-memory -z/-l/-s, virsh dump --format kdump-*.

Layout: makedumpfile's IMPLEMENTATION file and diskdump_mod.h, version 1.7; QEMU include/sysemu/dump.h (read November 2026).
Block 0 is the header, then the sub-header, two bitmaps (pages that exist, pages that are stored), one 24-byte descriptor a stored page, the pages.
"""

from __future__ import annotations

import os
import struct
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.machine import Cpu, Machine
from vtdbg.memory.base import Range
from vtdbg.memory.bitmap import PageBitmap
from vtdbg.memory.chunks import Chunk, ChunkMemory
from vtdbg.memory.compression import ZSTD_HELP, Decompress, best_lzo, best_snappy, inflate, unzstd_or_none
from vtdbg.memory.notes import MAX_NOTES, MAX_VMCOREINFO, facts_of_notes, vmcoreinfo_details
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "kdump"
TITLE = "kdump-compressed dump (makedumpfile, QEMU dump-guest-memory -z), diskdump"

SIGNATURES = (b"KDUMP   ", b"DISKDUMP")

_DESCRIPTOR = struct.Struct("<QIIQ")        # offset in the file, stored size, flags, page flags
MAX_VERSION = 6
_VIEW_PAGES = 256

# Bits of a descriptor's `flags` and of the header's `status` (makedumpfile.h, diskdump_mod.h).
ZLIB, LZO, SNAPPY, INCOMPLETE, ZSTD = 0x1, 0x2, 0x4, 0x8, 0x20
_NAMES = {ZLIB: "zlib", LZO: "lzo", SNAPPY: "snappy", ZSTD: "zstd"}
_COMPRESSED = ZLIB | LZO | SNAPPY | ZSTD


class _Layout(NamedTuple):
    """disk_dump_header and kdump_sub_header of a 32-bit or a 64-bit kernel."""

    bits: int
    header: int                  # offset of `status`, after the time stamp, which is aligned to a long
    sub_header: struct.Struct


_FIELDS = struct.Struct("<IIIIIIIIII")       # status, block_size, sub_hdr_size, bitmap_blocks, max_mapnr, ram, device, written, cpu, nr_cpus
_LAYOUTS = (
    _Layout(64, 424, struct.Struct("<QiiQQQQQQQQQQQ")),
    _Layout(32, 412, struct.Struct("<IiiIIQIQIQIQQQ")),
)


class _SubHeader(NamedTuple):
    phys_base: int
    dump_level: int
    split: int
    start_pfn: int
    end_pfn: int
    offset_vmcoreinfo: int
    size_vmcoreinfo: int
    offset_note: int
    size_note: int
    offset_eraseinfo: int
    size_eraseinfo: int
    start_pfn_64: int
    end_pfn_64: int
    max_mapnr_64: int


class _Header(NamedTuple):
    bits: int
    version: int
    release: str
    status: int
    block_size: int
    sub_blocks: int
    bitmap_blocks: int
    max_mapnr: int
    cpus: int


class KdumpMemory(ChunkMemory):
    """One page is one chunk, found through the bitmap of stored pages and the descriptor table, both read in place."""

    def __init__(self, source: ByteSource, page_size: int, exists: PageBitmap, stored: PageBitmap, descriptors: int,
                 decompress: "Dict[int, Decompress]", dump_level: int) -> None:
        super().__init__(source, page_size)
        self._page_size, self._exists, self._stored, self._descriptors = page_size, exists, stored, descriptors
        self._decompress, self._dump_level = decompress, dump_level
        self._data = descriptors + stored.total * _DESCRIPTOR.size
        self._last: Tuple[Tuple[int, int, int], bytes] = ((0, 0, 0), b"")

    def locate(self, address: int) -> Chunk:
        page = address // self._page_size
        rank = self._stored.rank(page)
        if rank is None:
            excluded = f"the page was left out of the dump (dump level {self._dump_level})" if page in self._exists else "not in the dump"
            raise MemoryUnavailable(address, 1, excluded)
        return Chunk(rank, page * self._page_size, self._page_size)

    def load(self, chunk: Chunk) -> bytes:
        where = self._descriptors + chunk.key * _DESCRIPTOR.size
        row = self._source.slice(where, _DESCRIPTOR.size)
        if len(row) < _DESCRIPTOR.size:
            raise MemoryUnavailable(chunk.address, chunk.size, "its descriptor is beyond the end of the file")
        offset, size, flags, _ = _DESCRIPTOR.unpack(row)
        if size == 0 or size > self._page_size * 2 or offset < self._data:
            raise MemoryUnavailable(chunk.address, chunk.size,
                                    f"damaged page descriptor at file offset {where:#x} (offset {offset:#x}, size {size:#x})")
        if (offset, size, flags) == self._last[0]:
            # makedumpfile and QEMU store one page of zeros for all.
            return self._last[1]
        stored = bytes(self._source.data(offset, size))
        if len(stored) < size:
            raise MemoryUnavailable(chunk.address, chunk.size, "beyond the end of the file")
        data = self._expand(chunk, offset, stored, flags)
        self._last = (offset, size, flags), data
        return data

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        """Up to 1 MiB of neighbouring pages at a time.  The rank runs along with the pages instead of being looked up for each."""
        for first, count in self._stored.runs():
            rank = self._stored.rank(first) or 0
            pages: List[bytes] = []
            for page in range(first, first + count):
                try:
                    pages.append(self.load(Chunk(rank + page - first, page * self._page_size, self._page_size)))
                except MemoryUnavailable:
                    if pages:
                        yield (page - len(pages)) * self._page_size, memoryview(b"".join(pages))
                    pages = []
                    continue
                if len(pages) == _VIEW_PAGES or page == first + count - 1:
                    yield (page + 1 - len(pages)) * self._page_size, memoryview(b"".join(pages))
                    pages = []

    def _expand(self, chunk: Chunk, offset: int, stored: bytes, flags: int) -> bytes:
        kind = flags & _COMPRESSED
        if kind == 0:
            data = stored
        else:
            decompress = self._decompress.get(kind)
            if decompress is None:
                how = f"is zstd-compressed; {ZSTD_HELP}" if kind == ZSTD else f"has impossible flags {flags:#x}"
                raise MemoryUnavailable(chunk.address, chunk.size, f"the page at file offset {offset:#x} {how}")
            try:
                data = decompress(stored, self._page_size)
            except ValueError as error:
                raise MemoryUnavailable(chunk.address, chunk.size, f"the page at file offset {offset:#x} does not decompress: {error}") from error
        if len(data) != self._page_size:
            raise MemoryUnavailable(chunk.address, chunk.size, f"the page at file offset {offset:#x} has {len(data):#x} bytes")
        return data

    def ranges(self) -> List[Range]:
        return [(first * self._page_size, count * self._page_size) for first, count in self._stored.runs()]


def recognise(header: bytes, path: str) -> bool:
    return header[:8] in SIGNATURES


def read(source: ByteSource) -> Machine:
    header = _read_header(source)
    sub = _read_sub_header(source, header)
    warnings: List[str] = []
    if sub is not None and sub.split:
        raise source.error("one piece of a split dump; join the pieces first with `makedumpfile --reassemble`", header.block_size)
    if header.status & ZSTD and unzstd_or_none() is None:
        raise source.error(f"its pages are zstd-compressed: {ZSTD_HELP}, or write the dump with zlib (makedumpfile -c)")
    exists, stored, descriptors = _read_bitmaps(source, header, sub)
    if stored.total == 0:
        raise source.error("a kdump that stores no page", (1 + header.sub_blocks) * header.block_size)
    table_end = descriptors + stored.total * _DESCRIPTOR.size
    if table_end > source.size:
        raise source.error(f"the table of {stored.total} page descriptors ends at {table_end:#x}, the file at {source.size:#x}; "
                           "the copy is cut or the header lies", descriptors)
    warnings += _tail_warning(source, descriptors, stored.total)
    if header.status & INCOMPLETE:
        warnings.append("marked as incomplete by the program that wrote it: some pages are missing")
    cpus, details, more = _read_notes(source, sub, header)
    warnings += more
    decompress: Dict[int, Decompress] = {ZLIB: inflate, LZO: best_lzo(), SNAPPY: best_snappy()}
    zstd: Optional[Callable[[bytes, int], bytes]] = unzstd_or_none()
    if zstd is not None:
        decompress[ZSTD] = zstd
    level = sub.dump_level if sub is not None else 0
    memory = KdumpMemory(source, header.block_size, exists, stored, descriptors, decompress, level)
    facts = {
        "file size": size_text(source.size),
        "header": f"version {header.version}, {header.bits}-bit",
        "compression": _NAMES.get(header.status & _COMPRESSED, "by page"),
        "pages": f"{stored.total} stored of {exists.total} that exist",
    }
    if level:
        facts["dump level"] = str(level)
    if header.release:
        facts["kernel release"] = header.release
    facts["processors"] = f"{len(cpus)} ({cpus[0].source})" if cpus else f"{header.cpus} by the header, no registers"
    facts.update(details)
    provenance = (f"kdump, {size_text(stored.total * header.block_size)} of {size_text(exists.total * header.block_size)} stored, "
                  f"{count_text(len(cpus), 'processor')}")
    return Machine(memory, os.path.basename(source.path), FORMAT, provenance, cpus, facts, warnings)


def _read_header(source: ByteSource) -> _Header:
    if bytes(source.slice(0, 8)) not in SIGNATURES:
        raise source.error("not a kdump file (neither KDUMP nor DISKDUMP at the beginning)", 0)
    version, = source.unpack(struct.Struct("<i"), 8, "the kdump header")
    if not 0 <= version <= MAX_VERSION:
        raise source.error(f"kdump header version {version}: versions up to {MAX_VERSION} are known", 8)
    machine = _text(source, 12 + 4 * 65)
    if machine and machine != "x86_64" and not (len(machine) == 4 and machine[0] == "i" and machine.endswith("86")):
        raise source.error(f"the dump of a machine that is not x86 ({machine})", 12 + 4 * 65)
    for layout in _LAYOUTS:
        fields = source.unpack(_FIELDS, layout.header, "the kdump header")
        status, block_size, sub_blocks, bitmap_blocks, max_mapnr = fields[:5]
        if block_size in (0x1000, 0x2000, 0x4000, 0x8000, 0x10000) and sub_blocks and bitmap_blocks:
            nr_cpus = fields[9] if fields[9] <= 1 << 16 else 0
            return _Header(layout.bits, version, _text(source, 12 + 2 * 65), status, block_size, sub_blocks, bitmap_blocks, max_mapnr, nr_cpus)
    raise source.error("no block size in the header: the header is damaged", _LAYOUTS[0].header + 4)


def _read_sub_header(source: ByteSource, header: _Header) -> Optional[_SubHeader]:
    """None for diskdump, whose sub-header is another structure without what is needed here.  Fields that came with a later header
    version than this file's are 0."""
    if bytes(source.slice(0, 8)) != b"KDUMP   ":
        return None
    layout = next(layout for layout in _LAYOUTS if layout.bits == header.bits)
    values = list(source.unpack(layout.sub_header, header.block_size, "the kdump sub-header"))
    # (header version that brought it, number of fields up to then), makedumpfile IMPLEMENTATION.
    known = next((fields for version, fields in ((1, 2), (2, 5), (3, 7), (4, 9), (5, 11)) if header.version <= version), len(values))
    return _SubHeader(*(value if index < known else 0 for index, value in enumerate(values)))


def _read_bitmaps(source: ByteSource, header: _Header, sub: Optional[_SubHeader]) -> Tuple[PageBitmap, PageBitmap, int]:
    """(pages that exist, pages that are stored, offset of the descriptors)"""
    first = (1 + header.sub_blocks) * header.block_size
    size = header.bitmap_blocks * header.block_size
    if sum(there for _, there in source.extents(first, size)) < size:
        raise source.error(f"the bitmaps ({header.bitmap_blocks} blocks) end at {first + size:#x}, the file at {source.size:#x}; "
                           "the copy is cut or the header lies", first)
    pages = sub.max_mapnr_64 if sub is not None and sub.max_mapnr_64 else header.max_mapnr
    room = size // 2 * 8
    if pages > room:
        raise source.error(f"max_mapnr says {pages} pages, the bitmaps have room for {room}: the header is damaged", first)
    if pages * header.block_size > 1 << 52:
        raise source.error(f"max_mapnr says {pages} pages: more than x86 can address", first)
    return PageBitmap(source, first, pages), PageBitmap(source, first + size // 2, pages), first + size


def _tail_warning(source: ByteSource, descriptors: int, total: int) -> List[str]:
    """Whether the last pages that the table names are in the file.  Pages lie in the order of the table, but for the one of zeros."""
    count = min(total, 4096)
    rows = source.slice(descriptors + (total - count) * _DESCRIPTOR.size, count * _DESCRIPTOR.size)
    end = max(offset + size for offset, size, _, _ in _DESCRIPTOR.iter_unpack(rows))
    if end <= source.size:
        return []
    return [f"the file is cut: pages are stored up to {end:#x}, the file ends at {source.size:#x} ({size_text(end - source.size)} are missing); "
            "reads of those fail"]


def _read_notes(source: ByteSource, sub: Optional[_SubHeader], header: _Header) -> "Tuple[List[Cpu], Dict[str, str], List[str]]":
    if sub is None:
        return [], {}, []
    details: Dict[str, str] = {}
    warnings: List[str] = []
    cpus: List[Cpu] = []
    if sub.size_note:
        if sub.offset_note + sub.size_note > source.size or sub.size_note > MAX_NOTES:
            warnings.append(f"the notes ({sub.size_note:#x} bytes at {sub.offset_note:#x}) lie beyond the end of the file: no registers")
        else:
            facts = facts_of_notes(source.slice(sub.offset_note, sub.size_note))
            cpus, details = facts.cpus, facts.details
            warnings += facts.warnings
    if sub.size_vmcoreinfo and "vmcoreinfo" not in details and sub.offset_vmcoreinfo + sub.size_vmcoreinfo <= source.size:
        details.update(vmcoreinfo_details(source.slice(sub.offset_vmcoreinfo, min(sub.size_vmcoreinfo, MAX_VMCOREINFO))))
    return cpus, details, warnings


def _text(source: ByteSource, offset: int) -> str:
    """A string of `struct new_utsname`: 65 bytes, zero-terminated."""
    raw = bytes(source.slice(offset, 65)).split(b"\0")[0].decode("ascii", "backslashreplace")
    return "".join(c if c.isprintable() else "?" for c in raw)
