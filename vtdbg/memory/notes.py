"""The notes of a core file: registers of the processors and what the kernel says of itself.

Layouts: QEMU target/i386/arch_dump.c (`QEMUCPUState`, `x86_64_elf_prstatus`), Linux include/uapi/linux/elfcore.h (`elf_prstatus`) with
arch/x86/include/asm/user_64.h and user_32.h (`user_regs_struct`); read November 2026.
"""

from __future__ import annotations

import struct
import time
from typing import Dict, List, NamedTuple, Tuple

from vtdbg.machine import Cpu
from vtdbg.memory.source import count_text

MAX_CPUS = 8192
MAX_NOTES = 16 << 20
"""Bytes of notes that are looked at: twice what 8,192 processors need."""
MAX_VMCOREINFO = 1 << 16

NT_PRSTATUS = 1

QEMU_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")
QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldtr", "tr", "gdtr", "idtr")
QEMU_CONTROL = ("cr0", "cr1", "cr2", "cr3", "cr4")

_QEMU_HEAD = struct.Struct("<II18Q")        # version, size of the structure, general registers
_QEMU_SEGMENT = struct.Struct("<III4xQ")    # selector, limit, flags, padding, base
_QEMU_CR = struct.Struct("<5Q")
_QEMU_GS = struct.Struct("<Q")              # QEMU 4.1 and later
QEMU_STATE_SIZE = _QEMU_HEAD.size + 10 * _QEMU_SEGMENT.size + _QEMU_CR.size

# user_regs_struct in the order of the structure; "orig_*" is no register.
PRSTATUS_64 = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip",
               "cs_selector", "rflags", "rsp", "ss_selector", "fs_base", "gs_base", "ds_selector", "es_selector", "fs_selector", "gs_selector")
PRSTATUS_32 = ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rax", "ds_selector", "es_selector", "fs_selector", "gs_selector", "orig_eax", "rip",
               "cs_selector", "rflags", "rsp", "ss_selector")
_PRSTATUS_REGISTERS_64 = 112                # offsetof(elf_prstatus, pr_reg)
_PRSTATUS_REGISTERS_32 = 72


class Note(NamedTuple):
    name: str
    kind: int
    data: memoryview


class NoteFacts(NamedTuple):
    """What the notes of one dump say.  `details` has the kernel's VMCOREINFO text; `warnings` what could not be read."""

    cpus: List[Cpu]
    details: Dict[str, str]
    warnings: List[str]


def split_notes(data: memoryview) -> Tuple[List[Note], bool]:
    """The notes of a PT_NOTE segment (name and descriptor padded to 4 bytes) up to the end or a header of zeros, and whether the last
    one is cut."""
    notes: List[Note] = []
    at, head = 0, struct.Struct("<III")
    while at + head.size <= len(data):
        name_size, data_size, kind = head.unpack_from(data, at)
        if not (name_size or data_size or kind):
            break
        name_at = at + head.size
        data_at = name_at + (name_size + 3 & ~3)
        end = data_at + data_size
        if end > len(data):
            return notes, True
        name = bytes(data[name_at:name_at + min(name_size, 64)]).split(b"\0")[0]
        notes.append(Note(name.decode("ascii", "backslashreplace"), kind, data[data_at:end]))
        at = data_at + (data_size + 3 & ~3)
    return notes, False


def facts_of_notes(data: memoryview) -> NoteFacts:
    """Processors and details out of the notes.

    NT_PRSTATUS is told by its size: the class of the file says nothing (QEMU writes ELF64 with notes of an i386).  The `QEMU` note has all
    that NT_PRSTATUS has and the system registers besides, so it wins where both are there.
    """
    qemu: List[Cpu] = []
    plain: List[Cpu] = []
    details: Dict[str, str] = {}
    warnings: List[str] = []
    too_many = False
    notes, cut = split_notes(data)
    for note in notes:
        if note.name == "QEMU" and note.kind == 0:
            if len(note.data) < QEMU_STATE_SIZE:
                warnings.append(f"QEMU's note for processor {len(qemu)} has only {len(note.data):#x} bytes: left out")
            elif len(qemu) < MAX_CPUS:
                qemu.append(Cpu(len(qemu), qemu_registers(note.data), "QEMU note"))
            else:
                too_many = True
        elif note.name == "CORE" and note.kind == NT_PRSTATUS:
            registers = prstatus_registers(note.data)
            if not registers:
                warnings.append(f"NT_PRSTATUS of processor {len(plain)} has only {len(note.data):#x} bytes: left out")
            elif len(plain) < MAX_CPUS:
                plain.append(Cpu(len(plain), registers, "NT_PRSTATUS note"))
            else:
                too_many = True
        elif note.name == "VMCOREINFO":
            details.update(vmcoreinfo_details(note.data))
    if too_many:
        warnings.append(f"the notes name more than {MAX_CPUS} processors: the rest is left out")
    if cut:
        warnings.append("the notes are cut: registers of some processors are missing")
    if len(warnings) > 8:
        warnings[8:] = [f"and {count_text(len(warnings) - 8, 'more warning')} about the notes"]
    return NoteFacts(qemu or plain, details, warnings)


def qemu_registers(data: memoryview) -> Dict[str, int]:
    """Registers of QEMU's CPU-state note.

    `*_attributes` are bits 8-15 and 20-23 of the descriptor's second doubleword, shifted down by 8: the access-rights format of the VMCS
    without its "unusable" bit, which the note does not have.  EFER is not in the note, so it stays unknown.
    """
    _, size, *general = _QEMU_HEAD.unpack_from(data)
    registers: Dict[str, int] = dict(zip(QEMU_GENERAL, general))
    at = _QEMU_HEAD.size
    for name in QEMU_SEGMENTS:
        selector, limit, flags, base = _QEMU_SEGMENT.unpack_from(data, at)
        at += _QEMU_SEGMENT.size
        registers[f"{name}_base"], registers[f"{name}_limit"] = base, limit
        if name not in ("gdtr", "idtr"):
            registers[f"{name}_selector"], registers[f"{name}_attributes"] = selector, flags >> 8 & 0xF0FF
    registers.update((name, value) for name, value in zip(QEMU_CONTROL, _QEMU_CR.unpack_from(data, at)) if name != "cr1")
    at += _QEMU_CR.size
    if min(size, len(data)) >= at + _QEMU_GS.size:
        registers["kernel_gs_base"] = _QEMU_GS.unpack_from(data, at)[0]
    return registers


def prstatus_registers(data: memoryview) -> Dict[str, int]:
    """Registers of NT_PRSTATUS, empty if it is too short: no control registers, no descriptor tables; selectors without their hidden parts."""
    for names, at, layout in ((PRSTATUS_64, _PRSTATUS_REGISTERS_64, "Q"), (PRSTATUS_32, _PRSTATUS_REGISTERS_32, "I")):
        values = struct.Struct(f"<{len(names)}{layout}")
        if len(data) >= at + values.size:
            return {name: value for name, value in zip(names, values.unpack_from(data, at)) if not name.startswith("orig_")}
    return {}


def vmcoreinfo_details(data: memoryview) -> Dict[str, str]:
    """The kernel's VMCOREINFO text (at most 64 KiB of it) and, by themselves, the lines that a reader asks for first."""
    text = bytes(data[:MAX_VMCOREINFO]).split(b"\0")[0].decode("ascii", "backslashreplace")
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    details = {"vmcoreinfo": text}
    for line in text.split("\n"):
        key, _, value = line.partition("=")
        title = {"OSRELEASE": "kernel release", "KERNELOFFSET": "kernel offset (KASLR)", "CRASHTIME": "crash time"}.get(key)
        if title:
            details[title] = _date(value) if key == "CRASHTIME" else value
    return details


def _date(text: str) -> str:
    """Seconds since 1970 as a date; anything else as it is."""
    if not (text.isascii() and text.isdigit() and len(text) <= 11):
        return text
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(int(text)))
