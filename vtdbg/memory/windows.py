"""Windows kernel crash dumps: PAGEDU64 (complete, bitmap, and the range form of Windows 11) and complete PAGEDUMP of 32-bit Windows.

Layout: DUMP_HEADER64 and DUMP_HEADER32 as dbgeng reads them, from volatility3's crash64.json, crash.json and crash_common.json and from
kdmp-parser's kdmp-parser-structs.h; CONTEXT from winnt.h (all read November 2026).  Space that Windows does not fill holds "PAGE".
"""

from __future__ import annotations

import os
import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

from vtdbg.machine import Cpu, Machine
from vtdbg.memory.base import PAGE_SIZE
from vtdbg.memory.bitmap import PageBitmap
from vtdbg.memory.runs import Run, RunMemory, settle_runs
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "windows"
TITLE = "Windows kernel crash dump (MEMORY.DMP: complete, bitmap, ranges)"

MAX_PAGE = 1 << 40                           # 52 bits of physical address
MAX_RUNS = 1 << 22
_UNFILLED_32, _UNFILLED_64 = 0x45474150, 0x4547415045474150


class _Header(NamedTuple):
    """Where the fields of one of the two headers are; every one is `word` (4 or 8 bytes) wide unless it is said."""

    bits: int
    size: int
    word: str
    directory_table_base: int
    machine: int                 # 4 bytes
    processors: int              # 4 bytes
    bugcheck: int                # 4 bytes
    bugcheck_parameters: int
    debugger_data: int
    memory_block: int            # NumberOfRuns (4 bytes), NumberOfPages (a word), runs of two words
    max_runs: int
    context: int
    dump_type: int               # 4 bytes


HEADER64 = _Header(64, 0x2000, "Q", 0x10, 0x30, 0x34, 0x38, 0x40, 0x80, 0x88, 42, 0x348, 0xF98)
HEADER32 = _Header(32, 0x1000, "I", 0x10, 0x20, 0x24, 0x28, 0x2C, 0x60, 0x64, 86, 0x320, 0xF88)

_X86_MACHINES = (0x8664, 0x14C)

# DumpType: what it is, and how its pages are found ("runs", "bitmap", "ranges" or, as a sentence, why not).
_SMALL = "it holds a few pages by virtual address, no physical memory; set Windows to write a complete memory dump"
DUMP_TYPES: "Dict[int, Tuple[str, str]]" = {
    1: ("complete", "runs"),
    2: ("kernel", "bitmap"),
    3: ("header only", "it has no memory; set Windows to write a complete memory dump"),
    4: ("small (triage)", _SMALL),
    5: ("complete, bitmap", "bitmap"),
    6: ("kernel, bitmap", "bitmap"),
    7: ("automatic, bitmap", "bitmap"),
    8: ("kernel, ranges", "ranges"),
    9: ("kernel and user, ranges", "ranges"),
    10: ("complete, ranges", "ranges"),
}

# Offset in CONTEXT -> register; CONTEXT of winnt.h for AMD64 and for i386.
_CONTEXT64_SEGMENTS = ("cs_selector", "ds_selector", "es_selector", "fs_selector", "gs_selector", "ss_selector")
_CONTEXT64_DEBUG = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
_CONTEXT64_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip")
_CONTEXT32_GENERAL = ("gs_selector", "fs_selector", "es_selector", "ds_selector", "rdi", "rsi", "rbx", "rdx", "rcx", "rax", "rbp", "rip",
                      "cs_selector", "rflags", "rsp", "ss_selector")
_CONTEXT_AMD64, _CONTEXT_I386 = 0x100000, 0x10000
_CONTROL, _INTEGER, _SEGMENTS, _DEBUG = 1, 2, 4, 0x10       # what ContextFlags says is filled


def recognise(header: bytes, path: str) -> bool:
    return header[:8] in (b"PAGEDU64", b"PAGEDUMP")


def read(source: ByteSource) -> Machine:
    magic = bytes(source.slice(0, 8))
    if magic not in (b"PAGEDU64", b"PAGEDUMP"):
        raise source.error("not a Windows kernel dump (neither PAGEDU64 nor PAGEDUMP at the beginning)", 0)
    header = HEADER64 if magic == b"PAGEDU64" else HEADER32
    if source.size < header.size:
        raise source.error(f"the file ends inside the dump header ({source.size:#x} of {header.size:#x} bytes); the copy is cut", source.size)
    kind = _number(source, header.dump_type)
    machine = _number(source, header.machine)
    if machine not in _X86_MACHINES:
        raise source.error(f"the dump of a machine that is not x86 (image type {machine:#x})", header.machine)
    name, how = DUMP_TYPES.get(kind, (f"of type {kind:#x}", "this type is not known; set Windows to write a complete memory dump"))
    if header.bits == 32 and how in ("bitmap", "ranges"):
        how = "of 32-bit Windows only complete dumps are read"
    if how not in ("runs", "bitmap", "ranges"):
        raise source.error(f"a {name} Windows dump: {how}", header.dump_type)
    if how == "runs":
        runs = list(_header_runs(source, header))
    elif how == "bitmap":
        runs = list(_bitmap_runs(source, header))
    else:
        runs = list(_range_runs(source, header))
    return _machine(source, header, name, runs)


def _machine(source: ByteSource, header: _Header, name: str, named: List[Run]) -> Machine:
    stored = [(address, min(length, source.size - offset), offset) for address, length, offset in named if offset < source.size]
    if not stored:
        raise source.error("the file ends before its first page of memory; the copy is cut", source.size)
    runs, _ = settle_runs(stored)
    total = sum(length for _, length, _ in runs)
    lost = sum(length for _, length, _ in settle_runs(named)[0]) - total
    warnings = [f"the file is cut: {size_text(lost)} of {size_text(total + lost)} of memory are missing; reads of them fail"] if lost > 0 else []
    cpus, more = _processors(source, header)
    details = {"file size": size_text(source.size), "dump type": name, "processors": str(_number(source, header.processors)),
               "directory table base": f"{_number(source, header.directory_table_base, header.word):#x}"}
    bugcheck = _number(source, header.bugcheck)
    if bugcheck not in (0, _UNFILLED_32):
        width = 8 if header.word == "Q" else 4
        parameters = ", ".join(f"{_number(source, header.bugcheck_parameters + n * width, header.word):#x}" for n in range(4))
        details["bugcheck"] = f"{bugcheck:#x} ({parameters})"
    block = _number(source, header.debugger_data, header.word)
    if block not in (0, _UNFILLED_32, _UNFILLED_64):
        details["KdDebuggerDataBlock"] = f"{block:#x}"
    return Machine(RunMemory(source, runs), os.path.basename(source.path), FORMAT,
                   f"Windows dump, {name}, {size_text(total)} in {count_text(len(runs), 'run')}", cpus, details, warnings + more)


def _header_runs(source: ByteSource, header: _Header) -> Iterator[Run]:
    """Complete dump: the runs of the header one after another."""
    count = _number(source, header.memory_block)
    pair = struct.Struct("<2" + header.word)
    first = header.memory_block + pair.size
    if not 0 < count <= header.max_runs:
        raise source.error(f"the header names {count} runs of memory, it has room for {header.max_runs}: the header is damaged", header.memory_block)
    offset = header.size
    for at in range(first, first + count * pair.size, pair.size):
        page, pages = source.unpack(pair, at, "the runs of memory")
        yield _checked_run(source, at, page, pages, offset)
        offset += pages * PAGE_SIZE


def _bitmap_runs(source: ByteSource, header: _Header) -> Iterator[Run]:
    """SDMP/FDMP: a bitmap of the pages that are stored, which follow in order."""
    layout = struct.Struct("<4s4s24xQ8xQ")
    magic, valid, first_page, pages = source.unpack(layout, header.size, "the bitmap header")
    if magic not in (b"SDMP", b"FDMP") or valid != b"DUMP":
        raise source.error("no bitmap header (neither SDMP nor FDMP): an old form of kernel dump, which is not read, or damaged", header.size)
    at = header.size + layout.size
    if pages > MAX_PAGE or at + (pages + 7) // 8 > min(source.size, first_page):
        raise source.error(f"the bitmap of {pages} pages does not fit before the first page at {first_page:#x} "
                           f"(the file has {source.size:#x} bytes); the copy is cut or the header lies", header.size + 0x20)
    bitmap = PageBitmap(source, at, pages)
    offset = first_page
    for first, count in bitmap.runs():
        yield first * PAGE_SIZE, count * PAGE_SIZE, offset
        offset += count * PAGE_SIZE


def _range_runs(source: ByteSource, header: _Header) -> Iterator[Run]:
    """RDMP (Windows 11): pairs of first page and number of pages between 0x2030 and the first page."""
    layout = struct.Struct("<I4s4s4xQQ")
    marker, magic, valid, metadata, first_page = source.unpack(layout, header.size, "the range header")
    if marker != 0x40 or magic != b"RDMP" or valid != b"DUMP":
        raise source.error("no range header (RDMP): the header is damaged", header.size)
    if metadata != first_page - 0x2020 or first_page > source.size:
        raise source.error(f"the ranges take {metadata:#x} bytes before the first page at {first_page:#x} (the file has {source.size:#x} bytes); "
                           "the copy is cut or the header lies", header.size + 0x10)
    offset, pair = first_page, struct.Struct("<QQ")
    for number, at in enumerate(range(header.size + 0x30, first_page - pair.size + 1, pair.size)):
        page, pages = source.unpack(pair, at, "the ranges")
        if pages == 0 or number >= MAX_RUNS:
            return
        yield _checked_run(source, at, page, pages, offset)
        offset += pages * PAGE_SIZE


def _checked_run(source: ByteSource, at: int, page: int, pages: int, offset: int) -> Run:
    if pages == 0 or page + pages > MAX_PAGE:
        raise source.error(f"a run of {pages} pages from page {page:#x}: the header is damaged", at)
    return page * PAGE_SIZE, pages * PAGE_SIZE, offset


def _processors(source: ByteSource, header: _Header) -> Tuple[List[Cpu], List[str]]:
    """The one processor whose CONTEXT is in the header; the others' registers are in kernel memory only."""
    if header.bits == 64:
        (flags,) = source.unpack(struct.Struct("<I"), header.context + 0x30, "the CONTEXT")
        registers = _context64(source, header.context, flags) if flags != _UNFILLED_32 and flags & _CONTEXT_AMD64 else {}
    else:
        (flags,) = source.unpack(struct.Struct("<I"), header.context, "the CONTEXT")
        registers = _context32(source, header.context, flags) if flags != _UNFILLED_32 and flags & _CONTEXT_I386 else {}
    registers["cr3"] = _number(source, header.directory_table_base, header.word)
    warnings = []
    if len(registers) == 1:
        warnings.append("the header has no CONTEXT: of the registers only cr3 (the directory table base) is known")
    count = _number(source, header.processors)
    if count > 1:
        warnings.append(f"{count} processors: the header has the registers of the one that wrote the dump only")
    return [Cpu(0, registers, "dump header: CONTEXT, DirectoryTableBase")], warnings


def _context64(source: ByteSource, at: int, flags: int) -> Dict[str, int]:
    segments = source.unpack(struct.Struct("<6HI"), at + 0x38, "the CONTEXT")
    debug = source.unpack(struct.Struct("<6Q"), at + 0x48, "the CONTEXT")
    general = dict(zip(_CONTEXT64_GENERAL, source.unpack(struct.Struct("<17Q"), at + 0x78, "the CONTEXT")))
    selectors = dict(zip(_CONTEXT64_SEGMENTS, segments))
    control = {"rflags": segments[6], "rip": general.pop("rip"), "rsp": general.pop("rsp"),
               "cs_selector": selectors.pop("cs_selector"), "ss_selector": selectors.pop("ss_selector")}
    found: Dict[str, int] = {}
    for bit, part in ((_CONTROL, control), (_INTEGER, general), (_SEGMENTS, selectors), (_DEBUG, dict(zip(_CONTEXT64_DEBUG, debug)))):
        if flags & bit:
            found.update(part)
    return found


def _context32(source: ByteSource, at: int, flags: int) -> Dict[str, int]:
    values = dict(zip(_CONTEXT32_GENERAL, source.unpack(struct.Struct("<16I"), at + 0x8C, "the CONTEXT")))
    control = ("rbp", "rip", "cs_selector", "rflags", "rsp", "ss_selector")
    integer = ("rdi", "rsi", "rbx", "rdx", "rcx", "rax")
    segments = ("gs_selector", "fs_selector", "es_selector", "ds_selector")
    return {name: values[name] for bit, names in ((_CONTROL, control), (_INTEGER, integer), (_SEGMENTS, segments)) if flags & bit for name in names}


def _number(source: ByteSource, offset: int, word: str = "I") -> int:
    return int(source.unpack(struct.Struct("<" + word), offset, "the dump header")[0])
