"""Registers as Windows keeps them: CONTEXT of a thread, KSPECIAL_REGISTERS of a processor, and where the latter are found in a dump.

Layouts: CONTEXT of winnt.h (AMD64, i386); KSPECIAL_REGISTERS of the public symbols of ntoskrnl (x64); KDDEBUGGER_DATA64 of wdbgexts.h
(read November 2026, checked against what dbgeng 10.0.15063 shows).
"""

from __future__ import annotations

import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

from vtdbg.errors import VtdbgError
from vtdbg.machine import Cpu
from vtdbg.memory.base import PhysicalMemory

# ContextFlags: the processor, and which groups of registers are filled.
CONTEXT_AMD64, CONTEXT_I386 = 0x100000, 0x10000
_CONTROL, _INTEGER, _SEGMENTS, _DEBUG = 1, 2, 4, 0x10
UNFILLED = 0x45474150
"""What Windows leaves in parts of a dump header that it does not fill: "PAGE"."""

CONTEXT64_SIZE, CONTEXT32_SIZE = 0x100, 0xCC                       # as far as the registers below go
_FLAGS64, _SEGMENTS64, _DEBUG64, _GENERAL64 = 0x30, 0x38, 0x48, 0x78
_NAMES_SEGMENTS64 = ("cs_selector", "ds_selector", "es_selector", "fs_selector", "gs_selector", "ss_selector")
_NAMES_DEBUG64 = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
_NAMES_GENERAL64 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip")
_GENERAL32 = 0x8C
_NAMES_32 = ("gs_selector", "fs_selector", "es_selector", "ds_selector", "rdi", "rsi", "rbx", "rdx", "rcx", "rax", "rbp", "rip",
             "cs_selector", "rflags", "rsp", "ss_selector")

# KSPECIAL_REGISTERS (x64): offset, format, registers.
SPECIAL_SIZE = 0xD8
_SPECIAL: Tuple[Tuple[int, str, Tuple[str, ...]], ...] = (
    (0x00, "<4Q", ("cr0", "cr2", "cr3", "cr4")),
    (0x56, "<HQ", ("gdtr_limit", "gdtr_base")),
    (0x66, "<HQ", ("idtr_limit", "idtr_base")),
    (0x70, "<HH", ("tr_selector", "ldtr_selector")),
    (0xA0, "<7Q", ("cr8", "gs_base", "kernel_gs_base", "star", "lstar", "cstar", "sfmask")),
)

# KDDEBUGGER_DATA64.
_KDBG_SIZE = 0x300
_KDBG_TAG, _KDBG_PROCESSOR_BLOCK, _KDBG_CONTEXT, _KDBG_SPECIAL = 0x10, 0x218, 0x2BC, 0x2F2
MAX_PROCESSORS = 2048


class Found(NamedTuple):
    """Processors out of kernel memory; `problem` says why there are none, or fewer than there should be."""

    cpus: List[Cpu]
    problem: str


def context64(data: bytes) -> Dict[str, int]:
    """Registers of an AMD64 CONTEXT: those whose group its ContextFlags says is filled."""
    (flags,) = struct.unpack_from("<I", data, _FLAGS64)
    if flags == UNFILLED or not flags & CONTEXT_AMD64:
        return {}
    *segments, rflags = struct.unpack_from("<6HI", data, _SEGMENTS64)
    general = dict(zip(_NAMES_GENERAL64, struct.unpack_from("<17Q", data, _GENERAL64)))
    selectors = dict(zip(_NAMES_SEGMENTS64, segments))
    control = {"rflags": rflags, "rip": general.pop("rip"), "rsp": general.pop("rsp"),
               "cs_selector": selectors.pop("cs_selector"), "ss_selector": selectors.pop("ss_selector")}
    debug = dict(zip(_NAMES_DEBUG64, struct.unpack_from("<6Q", data, _DEBUG64)))
    return {name: value for bit, part in ((_CONTROL, control), (_INTEGER, general), (_SEGMENTS, selectors), (_DEBUG, debug)) if flags & bit
            for name, value in part.items()}


def context32(data: bytes) -> Dict[str, int]:
    """Registers of an i386 CONTEXT, by their 64-bit names."""
    (flags,) = struct.unpack_from("<I", data)
    if flags == UNFILLED or not flags & CONTEXT_I386:
        return {}
    values = dict(zip(_NAMES_32, struct.unpack_from("<16I", data, _GENERAL32)))
    control = ("rbp", "rip", "cs_selector", "rflags", "rsp", "ss_selector")
    integer = ("rdi", "rsi", "rbx", "rdx", "rcx", "rax")
    segments = ("gs_selector", "fs_selector", "es_selector", "ds_selector")
    return {name: values[name] for bit, names in ((_CONTROL, control), (_INTEGER, integer), (_SEGMENTS, segments)) if flags & bit for name in names}


def special64(data: bytes) -> Dict[str, int]:
    """Registers of KSPECIAL_REGISTERS; nothing if the processor did not save them (CR0 without protection and paging, or no CR3)."""
    found = {name: value for offset, layout, names in _SPECIAL for name, value in zip(names, struct.unpack_from(layout, data, offset))}
    return found if found["cr0"] & 0x80000001 == 0x80000001 and found["cr3"] else {}


def processors_of_kernel(memory: PhysicalMemory, directory_table_base: int, debugger_data: int, count: int) -> Found:
    """Every processor's registers out of its KPRCB: debugger data block -> KiProcessorBlock -> KPRCB.ProcessorState.

    `debugger_data` is the linear address of KDDEBUGGER_DATA64 (the header's KdDebuggerDataBlock), `count` the header's NumberProcessors.
    A block that cannot be read, or that is encoded (Windows 8 and later, in dumps that Windows did not write itself), gives no processor.
    """
    from vtdbg.memory.views import LinearMemory
    from vtdbg.x86.paging import Paging

    if not 0 < count <= MAX_PROCESSORS:
        return Found([], f"the header says {count} processors")
    problem = "the debugger data block is not in the dump"
    for mode in ("4-level", "5-level"):
        try:
            linear = LinearMemory(memory, Paging.named(mode, directory_table_base))
            block = linear.read(debugger_data, _KDBG_SIZE)
        except VtdbgError:
            continue
        if block[_KDBG_TAG:_KDBG_TAG + 4] != b"KDBG":
            problem = "the debugger data block is encoded or damaged"
            continue
        cpus = list(_processors(linear, block, count))
        missing = count - len(cpus)
        return Found(cpus, f"the registers of {missing} of {count} processors are not in the dump" if missing else "")
    return Found([], problem)


def _processors(linear: PhysicalMemory, block: bytes, count: int) -> Iterator[Cpu]:
    (table,) = struct.unpack_from("<Q", block, _KDBG_PROCESSOR_BLOCK)
    (context_at,) = struct.unpack_from("<H", block, _KDBG_CONTEXT)
    (special_at,) = struct.unpack_from("<H", block, _KDBG_SPECIAL)
    for number in range(count):
        try:
            prcb = linear.read_u64(table + 8 * number)
            registers = special64(linear.read(prcb + special_at, SPECIAL_SIZE)) if prcb and special_at else {}
            if registers and context_at:
                registers.update(context64(linear.read(prcb + context_at, CONTEXT64_SIZE)))
        except VtdbgError:
            continue
        if registers:
            yield Cpu(number, registers, f"KPRCB of processor {number}: ProcessorState")
