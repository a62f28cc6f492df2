"""ELF core with physical addresses: QEMU's dump-guest-memory, virsh dump --memory-only, kdump's /proc/vmcore, VirtualBox' dumpvmcore.

The format is the System V gABI's; what QEMU does differently is in QEMU dump/dump.c (read November 2026): e_ehsize is 8 in old versions, so it
is not looked at; more than 0xfffe program headers are counted in sh_info of section 0; with paging the same memory has one header for
every virtual address that it is mapped at.
"""

from __future__ import annotations

import os
import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

from vtdbg.machine import Machine
from vtdbg.memory.notes import MAX_NOTES, NoteFacts, facts_of_notes
from vtdbg.memory.runs import Run, RunMemory, settle_runs
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "elf"
TITLE = "ELF core (QEMU dump-guest-memory, virsh dump, /proc/vmcore, VirtualBox)"

MAGIC = b"\x7fELF"
PN_XNUM = 0xFFFF
MAX_HEADERS = 1 << 22
ADDRESS_LIMIT = 1 << 52
"""First address that no x86 processor can have (SDM vol. 3, "Paging: physical-address width": MAXPHYADDR is at most 52)."""

_TYPES = {0: "an ELF file without a type", 1: "an ELF object file", 2: "an ELF executable (a kernel, a program)", 3: "an ELF shared library"}
_MACHINES = {2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "PowerPC 64", 22: "S/390", 40: "ARM", 183: "AArch64", 243: "RISC-V", 258: "LoongArch"}
_X86 = {3: "i386", 62: "x86-64"}
_PT_LOAD, _PT_NOTE = 1, 4


class _Class(NamedTuple):
    """Where the fields are in one of the two classes of ELF."""

    bits: int
    header: struct.Struct            # e_type, e_machine, e_phoff, e_shoff, e_phentsize, e_phnum; from offset 16
    program: struct.Struct           # in the order of the file
    columns: Tuple[int, ...]         # where p_type, p_offset, p_paddr, p_filesz, p_memsz are in `program`
    section_info: int                # offset of sh_info in a section header


_CLASSES = {
    1: _Class(32, struct.Struct("<HHIIII4x2xHH"), struct.Struct("<8I"), (0, 1, 3, 4, 5), 28),
    2: _Class(64, struct.Struct("<HHIQQQ4x2xHH"), struct.Struct("<IIQQQQQQ"), (0, 2, 4, 5, 6), 44),
}


class _Segments(NamedTuple):
    loads: List[Run]                 # as the headers say, in the order of the file
    notes: List[Tuple[int, int]]     # (offset, size)
    beyond: int                      # headers whose physical address no processor can have
    unstored: int                    # bytes that headers name (p_memsz) and the file does not store (p_filesz)


def recognise(header: bytes, path: str) -> bool:
    return header[:4] == MAGIC


def read(source: ByteSource) -> Machine:
    kind = _check_header(source)
    offset, count = _program_table(source, kind)
    segments = _read_segments(source, kind, offset, count)
    warnings: List[str] = []
    if not segments.loads:
        raise source.error("an ELF core that stores no memory (no PT_LOAD with bytes in the file)", offset)
    if len(segments.loads) > 1 and not any(address for address, _, _ in segments.loads):
        raise source.error("the core of a process: its program headers have no physical addresses; give a dump of the machine's memory")
    named, twice = settle_runs(segments.loads)
    runs = [(address + start - at, size, start) for address, length, at in named for start, size in source.extents(at, length)]
    total, lost = sum(run[1] for run in runs), sum(run[1] for run in named) - sum(run[1] for run in runs)
    if not runs:
        raise source.error(f"the file ends at {source.size:#x}, before any of the memory that its headers name; the copy is cut")
    if lost > 0:
        warnings.append(f"the file is cut: {size_text(lost)} of {size_text(total + lost)} of memory are missing; reads of them fail")
    if segments.beyond:
        warnings.append(f"{count_text(segments.beyond, 'program header')} with a physical address beyond 52 bits left out")
    facts = _read_notes(source, segments)
    warnings += facts.warnings
    details: Dict[str, str] = {"file size": size_text(source.size), "class": f"ELF{kind.bits}", "program headers": str(count)}
    if facts.cpus:
        details["processors"] = f"{len(facts.cpus)} ({facts.cpus[0].source})"
    if twice:
        details["stored twice"] = f"{size_text(twice)} (overlapping program headers; the one with the lowest start is read)"
    if segments.unstored:
        details["named but not stored"] = size_text(segments.unstored)
    details.update(facts.details)
    provenance = f"ELF core, {size_text(total)} in {count_text(len(runs), 'run')}, {count_text(len(facts.cpus), 'processor')}"
    return Machine(RunMemory(source, runs), os.path.basename(source.path), FORMAT, provenance, facts.cpus, details, warnings)


def _check_header(source: ByteSource) -> _Class:
    ident = bytes(source.slice(0, 16))
    if ident[:4] != MAGIC:
        raise source.error("not an ELF file (no \\x7fELF at the beginning)", 0)
    if len(ident) < 16 or ident[4] not in _CLASSES:
        raise source.error("an ELF file of unknown class (neither 32 nor 64 bits)", 4)
    if ident[5] != 1:
        raise source.error("a big-endian ELF file: not of an x86 machine", 5)
    kind = _CLASSES[ident[4]]
    e_type, e_machine = source.unpack(struct.Struct("<HH"), 16, "the ELF header")
    if e_type != 4:
        raise source.error(f"{_TYPES.get(e_type, f'an ELF file of type {e_type}')}, not a core dump", 16)
    if e_machine not in _X86:
        raise source.error(f"the core of a machine that is not x86 ({_MACHINES.get(e_machine, f'e_machine {e_machine}')})", 18)
    return kind


def _program_table(source: ByteSource, kind: _Class) -> Tuple[int, int]:
    """(offset, number) of the program headers, checked against the size of the file."""
    _, _, _, _, offset, sections, entry_size, count = source.unpack(kind.header, 16, "the ELF header")
    if entry_size != kind.program.size:
        raise source.error(f"e_phentsize is {entry_size}, not {kind.program.size}: the ELF header is damaged", 42 if kind.bits == 32 else 54)
    if count == PN_XNUM:
        (count,) = source.unpack(struct.Struct("<I"), sections + kind.section_info, "section header 0, which holds the number of program headers")
    if count == 0:
        raise source.error("an ELF core without program headers (Xen's dump-core keeps its pages in sections; that is not read)", offset)
    if count > MAX_HEADERS:
        raise source.error(f"{count} program headers are more than {MAX_HEADERS}: the header is damaged", offset)
    if offset + count * entry_size > source.size:
        raise source.error(f"the table of {count} program headers ends at {offset + count * entry_size:#x}, the file at {source.size:#x}; "
                           "the copy is cut or the header lies", offset)
    return offset, count


def _program_headers(source: ByteSource, kind: _Class, offset: int, count: int) -> Iterator[Tuple[int, int, int, int, int]]:
    """(p_type, p_offset, p_paddr, p_filesz, p_memsz) of each, in the order of the file."""
    a, b, c, d, e = kind.columns
    for row in kind.program.iter_unpack(source.slice(offset, count * kind.program.size)):
        yield row[a], row[b], row[c], row[d], row[e]


def _read_segments(source: ByteSource, kind: _Class, offset: int, count: int) -> _Segments:
    loads: List[Run] = []
    notes: List[Tuple[int, int]] = []
    beyond = unstored = 0
    for p_type, p_offset, p_paddr, p_filesz, p_memsz in _program_headers(source, kind, offset, count):
        if p_type == _PT_NOTE:
            notes.append((p_offset, p_filesz))
        elif p_type == _PT_LOAD:
            unstored += max(p_memsz - p_filesz, 0)
            if p_paddr + p_filesz > ADDRESS_LIMIT:
                beyond += 1
            elif p_filesz:
                loads.append((p_paddr, p_filesz, p_offset))
    return _Segments(loads, notes, beyond, unstored)


def _read_notes(source: ByteSource, segments: _Segments) -> NoteFacts:
    """All PT_NOTE segments as one: Linux makes one, others may make several."""
    joined = bytearray()
    for offset, size in segments.notes:
        joined += source.slice(offset, min(size, MAX_NOTES - len(joined)))
    facts = facts_of_notes(memoryview(joined))
    if any(offset + size > source.size for offset, size in segments.notes):
        facts.warnings.append("the notes lie beyond the end of the file: registers of some processors are missing")
    return facts
