"""Windows kernel crash dumps: PAGEDU64 (complete, bitmap, and the range form of Windows 11) and complete PAGEDUMP of 32-bit Windows.

Layout: DUMP_HEADER64 and DUMP_HEADER32 as dbgeng reads them, from volatility3's crash64.json, crash.json and crash_common.json and from
kdmp-parser's kdmp-parser-structs.h (all read November 2026).  Space that Windows does not fill holds "PAGE".
"""

from __future__ import annotations

import os
import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

from vtdbg.machine import Cpu, Machine
from vtdbg.memory import windows_context
from vtdbg.memory.base import PAGE_SIZE
from vtdbg.memory.bitmap import PageBitmap
from vtdbg.memory.runs import Run, RunMemory, settle_runs
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "windows"
TITLE = "Windows kernel crash dump (MEMORY.DMP: complete, bitmap, ranges)"

MAX_PAGE = 1 << 40                           # 52 bits of physical address
MAX_RUNS = 1 << 22
_UNFILLED = (0, 0x45474150, 0x4547415045474150)          # "PAGE": not filled


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
    memory = RunMemory(source, runs)
    cpus, context, more = _processors(source, header, memory)
    details = {"file size": size_text(source.size), "dump type": name, "processors": str(_number(source, header.processors)),
               "directory table base": f"{_number(source, header.directory_table_base, header.word):#x}", **context}
    bugcheck = _number(source, header.bugcheck)
    if bugcheck not in _UNFILLED:
        width = 8 if header.word == "Q" else 4
        parameters = ", ".join(f"{_number(source, header.bugcheck_parameters + n * width, header.word):#x}" for n in range(4))
        details["bugcheck"] = f"{bugcheck:#x} ({parameters})"
    block = _number(source, header.debugger_data, header.word)
    if block not in _UNFILLED:
        details["KdDebuggerDataBlock"] = f"{block:#x}"
    return Machine(memory, os.path.basename(source.path), FORMAT,
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


def _processors(source: ByteSource, header: _Header, memory: RunMemory) -> Tuple[List[Cpu], Dict[str, str], List[str]]:
    """Every processor out of kernel memory; where that fails the one whose CONTEXT is in the header, which is the one that wrote the dump."""
    base = _number(source, header.directory_table_base, header.word)
    count = _number(source, header.processors)
    block = _number(source, header.debugger_data, header.word)
    size = windows_context.CONTEXT64_SIZE if header.bits == 64 else windows_context.CONTEXT32_SIZE
    context = bytes(source.slice(header.context, size))
    crashed = windows_context.context64(context) if header.bits == 64 else windows_context.context32(context)
    details = {"context of the header": ", ".join(f"{name} {crashed[name]:#x}" for name in ("rip", "rsp") if name in crashed) or "not filled"}
    problem = "of 32-bit Windows only the header's registers are read"
    if header.bits == 64:
        found = windows_context.processors_of_kernel(memory, base, block, count)
        if found.cpus:
            return found.cpus, details, [found.problem] if found.problem else []
        problem = found.problem
    warnings = []
    if not crashed:
        warnings.append(f"of the registers only cr3 (the directory table base) is known: the header has no CONTEXT, and {problem}")
    elif count != 1:
        warnings.append(f"{count} processors: the registers are those of the one that wrote the dump; {problem}")
    return [Cpu(0, {**crashed, "cr3": base}, "dump header: CONTEXT, DirectoryTableBase")], details, warnings


def _number(source: ByteSource, offset: int, word: str = "I") -> int:
    return int(source.unpack(struct.Struct("<" + word), offset, "the dump header")[0])
