"""VMware: a .vmem image with the .vmss (suspended) or .vmsn (snapshot) file beside it, or such a file with the memory inside.

Layout: crash's vmware_vmss.c/.h (VMware, Inc.) and volatility3's layers/vmware.py (both read November 2026).  The file is a list of named
groups of tags; a tag is (value size 6 bits, number of indices 2 bits, length of the name 8 bits), name, indices, value; the sizes 62 and 63
mean a (compressed) block with its own length.  Group "memory" says which pages of the image are which physical pages.
"""

from __future__ import annotations

import os
import struct
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from vtdbg.machine import Cpu, Machine
from vtdbg.memory.base import PAGE_SIZE
from vtdbg.memory.runs import Run, RunMemory, settle_runs
from vtdbg.memory.source import ByteSource, DumpFile, count_text, size_text

FORMAT = "vmware"
TITLE = "VMware .vmem with its .vmss/.vmsn, or a .vmss/.vmsn with the memory inside"

MAGICS = {0xBED2BED2: 64, 0xBED3BED3: 64, 0xBAD1BAD1: 64, 0xBAD2BAD2: 64, 0xBED0BED0: 32}
MAX_GROUPS = 4096
MAX_TAGS = 1 << 18
MAX_REGIONS = 4096
MAX_CPUS = 4096

_HEADER = struct.Struct("<III")              # magic, version, number of groups
_GROUP = struct.Struct("<64sQQ")             # name, offset, size
_BLOCK = struct.Struct("<QQH")               # size in the file, size in memory, padding before the data
_COMPRESSED_BLOCK, _PLAIN_BLOCK = 62, 63

_GENERAL = ("rax", "rcx", "rdx", "rbx", "rbp", "rsp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
_FLAGS = ("eflags", "EFLAGS")


class Tag(NamedTuple):
    """One tag.  `offset` and `size` are of the value in the file; `block` is None, "plain" or "compressed"."""

    name: str
    indices: Tuple[int, ...]
    offset: int
    size: int
    block: Optional[str]


class State(NamedTuple):
    """What a .vmss/.vmsn says of memory and processors."""

    regions: List[Tuple[int, int, int]]          # (physical page, page in the image, number of pages)
    memory: Optional[Tuple[int, int]]            # (offset, size) of the memory inside this file
    cpus: List[Cpu]
    warnings: List[str]


def recognise(header: bytes, path: str) -> bool:
    if int.from_bytes(header[:4], "little") in MAGICS and len(header) >= _HEADER.size:
        return True
    return path.lower().endswith(".vmem") and _beside(path, (".vmss", ".vmsn")) is not None


def read(source: ByteSource) -> Machine:
    if int.from_bytes(source.slice(0, 4), "little") in MAGICS:
        state = read_state(source)
        if state.memory is not None:
            return _machine(source, state, state.memory[0], state.memory[1], source.path)
        image = _beside(source.path, (".vmem",))
        if image is None:
            raise source.error("a VMware state file without memory inside, and no .vmem of the same name beside it: put both in one folder")
        vmem = DumpFile(image)
        machine = _machine(vmem, state, 0, vmem.size, source.path)
        source.close()
        return machine
    beside = _beside(source.path, (".vmss", ".vmsn"))
    if beside is None:
        raise source.error("neither a VMware state file nor a .vmem with a .vmss or .vmsn of the same name beside it; "
                           "the format raw reads it as it is")
    sidecar = DumpFile(beside)
    try:
        state = read_state(sidecar)
    finally:
        sidecar.close()
    return _machine(source, state, 0, source.size, beside)


def _machine(image: ByteSource, state: State, offset: int, size: int, state_path: str) -> Machine:
    if not state.regions:
        named: List[Run] = [(0, size, offset)]
    else:
        named = [(page * PAGE_SIZE, count * PAGE_SIZE, offset + at * PAGE_SIZE) for page, at, count in state.regions]
    end = min(offset + size, image.size)
    stored = [(address, min(length, end - at), at) for address, length, at in named if at < end]
    if not stored:
        raise image.error(f"the image ends before the first region that {os.path.basename(state_path)} names; "
                          "the copy is cut or it is of another machine")
    runs, twice = settle_runs(stored)
    total = sum(length for _, length, _ in runs)
    lost = sum(length for _, length, _ in named) - sum(length for _, length, _ in stored)
    warnings = list(state.warnings)
    if lost:
        warnings.append(f"the image is cut: {size_text(lost)} of {size_text(total + lost)} of memory are missing; reads of them fail")
    if twice:
        warnings.append(f"{size_text(twice)} of physical memory are named by two regions; the first is read")
    details = {"file size": size_text(image.size), "state file": os.path.basename(state_path), "regions": str(len(state.regions))}
    provenance = f"VMware, {size_text(total)} in {count_text(len(runs), 'run')}, {count_text(len(state.cpus), 'processor')}"
    return Machine(RunMemory(image, runs), os.path.basename(image.path), FORMAT, provenance, state.cpus, details, warnings)


def read_state(source: ByteSource) -> State:
    """The groups "memory" and "cpu" of a .vmss/.vmsn file; FormatError where it is damaged or has the 32-bit form."""
    magic, _, count = source.unpack(_HEADER, 0, "the VMware state header")
    if MAGICS.get(magic) is None:
        raise source.error(f"not a VMware state file (magic {magic:#x})", 0)
    if MAGICS[magic] == 32:
        raise source.error("a VMware state file of the old 32-bit form: not read", 0)
    if count > MAX_GROUPS or _HEADER.size + count * _GROUP.size > source.size:
        raise source.error(f"{count} groups do not fit into the file of {source.size:#x} bytes; the copy is cut or the header lies", 8)
    values: Dict[str, Dict[int, int]] = {"regionPPN": {}, "regionPageNum": {}, "regionSize": {}}
    regions, memory = None, None
    warnings: List[str] = []
    registers: Dict[int, Dict[str, int]] = {}
    for number in range(count):
        name, offset, size = source.unpack(_GROUP, _HEADER.size + number * _GROUP.size, "the list of groups")
        group = name.split(b"\0")[0]
        if group not in (b"memory", b"cpu"):
            continue
        if group == b"cpu" and offset >= source.size:
            warnings.append("the file is cut before the group of the processors: their registers are missing")
            continue
        for tag in _tags(source, offset):
            if group == b"cpu":
                _register(source, tag, registers)
            elif tag.name == "regionsCount":
                regions = _value(source, tag)
            elif tag.name in values and tag.indices and len(values[tag.name]) < MAX_REGIONS:
                values[tag.name][tag.indices[0]] = _value(source, tag)
            elif tag.name == "Memory" and tag.block == "compressed":
                raise source.error("the memory inside this state file is compressed by VMware: not read; take a snapshot that leaves a .vmem",
                                   tag.offset)
            elif tag.name == "Memory" and tag.block:
                memory = tag.offset, tag.size
                if tag.offset + tag.size > source.size:
                    # Nothing of this group is left behind the image; without the regions the image cannot be placed.
                    if regions is None:
                        raise source.error("the file is cut inside the image of memory, before the list of its regions", tag.offset)
                    break
    cpus = [Cpu(n, registers[n], "VMware state, group cpu") for n in sorted(registers)]
    return State(_regions(source, regions or 0, values), memory, cpus, warnings)


def _regions(source: ByteSource, count: int, values: "Dict[str, Dict[int, int]]") -> List[Tuple[int, int, int]]:
    if count > MAX_REGIONS:
        raise source.error(f"{count} regions of memory: more than {MAX_REGIONS}, the file is damaged")
    out = []
    for number in range(count):
        missing = [name for name, found in values.items() if number not in found]
        if missing:
            raise source.error(f"region {number} of memory has no {missing[0]}: the file is damaged")
        out.append((values["regionPPN"][number], values["regionPageNum"][number], values["regionSize"][number]))
    return out


def _tags(source: ByteSource, at: int) -> Iterator[Tag]:
    """The tags of the group at offset `at`, up to its null tag."""
    for _ in range(MAX_TAGS):
        head = source.slice(at, 2)
        if len(head) < 2:
            raise source.error("the file ends inside a group of tags; the copy is cut", at)
        low, name_length = head[0], head[1]
        if low == 0 and name_length == 0:
            return
        size, index_count = low & 0x3F, low >> 6
        begin = at + 2 + name_length
        indices = source.unpack(struct.Struct(f"<{index_count}I"), begin, "a tag")
        name = bytes(source.slice(at + 2, name_length)).decode("ascii", "backslashreplace")
        at = begin + 4 * index_count
        block = None
        if size in (_COMPRESSED_BLOCK, _PLAIN_BLOCK):
            block = "compressed" if size == _COMPRESSED_BLOCK else "plain"
            size, _, padding = source.unpack(_BLOCK, at, "a block")
            at += _BLOCK.size + padding
        yield Tag(name, indices, at, size, block)
        at += size
    raise source.error(f"a group of more than {MAX_TAGS} tags: the file is damaged", at)


def _value(source: ByteSource, tag: Tag) -> int:
    data = source.slice(tag.offset, min(tag.size, 8))
    if len(data) < tag.size or tag.size > 8:
        raise source.error(f"{tag.name} is no number of at most 8 bytes", tag.offset)
    return int.from_bytes(data, "little")


def _register(source: ByteSource, tag: Tag, registers: "Dict[int, Dict[str, int]]") -> None:
    """Registers as single tags (older VMware) or as the blocks gpregs, CR64 and IDTR (newer)."""
    if not tag.indices or tag.indices[0] >= MAX_CPUS:
        return
    known = tag.name in _GENERAL or tag.name in _FLAGS or tag.name in ("rip", "CR64", "IDTR", "gpregs")
    if not known:
        return
    data = bytes(source.slice(tag.offset, min(tag.size, 256)))
    if len(data) < tag.size:
        return
    cpu = registers.setdefault(tag.indices[0], {})
    number = int.from_bytes(data[:8], "little")
    if tag.block:
        if tag.name == "gpregs" and tag.size == 128:
            cpu.update(zip(_GENERAL, struct.unpack("<16Q", data)))
        elif tag.name == "CR64" and tag.size == 72:
            cpu.update((f"cr{n}", value) for n, value in enumerate(struct.unpack("<9Q", data)) if n in (0, 2, 3, 4, 8))
        elif tag.name == "IDTR" and tag.size == 10:
            cpu["idtr_limit"], cpu["idtr_base"] = struct.unpack("<HQ", data)
    elif tag.name in _GENERAL or tag.name == "rip":
        cpu[tag.name] = number
    elif tag.name in _FLAGS:
        cpu["rflags"] = cpu.get("rflags", 0) | number
    elif tag.name == "CR64" and len(tag.indices) > 1 and tag.indices[1] in (0, 2, 3, 4):
        cpu[f"cr{tag.indices[1]}"] = number
    elif tag.name == "IDTR" and len(tag.indices) > 1 and tag.indices[1] in (1, 2):
        cpu["idtr_base"] = cpu.get("idtr_base", 0) | (number & 0xFFFFFFFF) << 32 * (tag.indices[1] - 1)


def _beside(path: str, endings: Tuple[str, ...]) -> Optional[str]:
    """The file of the same name with one of the endings, if it is there."""
    stem = os.path.splitext(path)[0]
    return next((stem + ending for ending in endings if os.path.isfile(stem + ending)), None)


