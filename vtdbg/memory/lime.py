"""LiME, version 1: each range of memory behind a 32-byte header.  (LiME's "raw" and "padded" files have no header: they are raw images.)

Layout: LiME doc/README.md, "LiME Memory Range Header version 1" (read November 2026); the last address is inclusive.  AVML writes the
same without compression.
"""

from __future__ import annotations

import os
import struct
from typing import List

from vtdbg.machine import Machine
from vtdbg.memory.runs import Run, RunMemory, settle_runs
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "lime"
TITLE = "LiME (and AVML without compression)"

MAGIC = b"EMiL"
HEADER = struct.Struct("<4sIQQ8x")           # magic, version, first address, last address
MAX_RANGES = 1 << 20


def recognise(header: bytes, path: str) -> bool:
    return header[:4] == MAGIC


def read(source: ByteSource) -> Machine:
    runs: List[Run] = []
    warnings: List[str] = []
    at = 0
    while at < source.size:
        if source.size - at < HEADER.size and runs:
            warnings.append(f"{source.size - at} bytes at the end of the file are no range header")
            break
        magic, version, first, last = source.unpack(HEADER, at, "a LiME range header")
        if magic != MAGIC:
            if not runs:
                raise source.error("not a LiME file (no EMiL at the beginning)", 0)
            warnings.append(f"no range header at offset {at:#x}: the {size_text(source.size - at)} from there are left out")
            break
        if version != 1:
            raise source.error(f"LiME version {version}: only version 1 is known", at + 4)
        if last < first or last >= 1 << 52:
            raise source.error(f"a LiME range from {first:#x} to {last:#x}: the header is damaged", at + 8)
        if len(runs) >= MAX_RANGES:
            raise source.error(f"more than {MAX_RANGES} LiME ranges: the file is damaged", at)
        length = last - first + 1
        stored = min(length, source.size - at - HEADER.size)
        if stored < length:
            warnings.append(f"the file is cut: {size_text(length - stored)} of the range at {first:#x} are missing; reads of them fail")
        if stored:
            runs.append((first, stored, at + HEADER.size))
        at += HEADER.size + length
    if not runs:
        raise source.error("a LiME file that ends before its first byte of memory; the copy is cut", 0)
    settled, twice = settle_runs(runs)
    if twice:
        warnings.append(f"{size_text(twice)} of memory are in more than one range; the range with the lowest start is read")
    total = sum(length for _, length, _ in settled)
    details = {"file size": size_text(source.size), "ranges": str(len(runs))}
    return Machine(RunMemory(source, settled), os.path.basename(source.path), FORMAT,
                   f"LiME, {size_text(total)} in {count_text(len(settled), 'run')}", [], details, warnings)
