"""The fast path: where QEMU runs on this machine its RAM is read from its own process instead of through the stub.

The process is the one that listens at the stub's port.  One `monitor gpa2hva` a run of RAM tells where it lies in that process; a run that is
a shared mapping of a file (memory-backend-file,share=on) is mapped here, any other is read from /proc/PID/mem.  Some pages of each run are
compared with the stub before any is believed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Set, Tuple

from vtdbg.errors import MemoryUnavailable, VtdbgError
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory, Range
from vtdbg.targets.port import Port, TargetError, TargetGone
from vtdbg.targets.stub import gpa_to_hva

_LOCAL = ("localhost", "127.", "::1", "[::1]", "")
_COMPARED = 6
_PIECE = 1 << 20
LEGACY = (0xA0000, 0x100000)
"""Video memory and ROM below 1 MiB: the chipset puts RAM in their place while the machine runs (PAM, SMRAM).  The stub knows what is there."""


class NoFastPath(VtdbgError):
    """Why the fast path cannot be taken; the stub serves instead."""


@dataclass(frozen=True)
class Run:
    """`length` bytes of RAM at physical `start`, at `offset` of `file` (mapped, or the process' memory)."""

    start: int
    length: int
    offset: int
    mapped: Optional[memoryview]


class FastMemory(PhysicalMemory):
    """Runs of RAM read directly; what they lack comes from `stub`."""

    def __init__(self, runs: List[Run], process_memory: Optional[int], stub: PhysicalMemory, how: str) -> None:
        self._runs = sorted(runs, key=lambda run: run.start)
        self._starts = [run.start for run in self._runs]
        self._file, self._stub, self.how = process_memory, stub, how

    def ranges(self) -> Optional[List[Range]]:
        return self._stub.ranges()

    def read(self, address: int, size: int) -> bytes:
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and size >= 0:
            run = self._runs[index]
            at = address - run.start
            if at + size <= run.length:
                return self._of(run, at, size)
        return self._stub.read(address, size)

    def _of(self, run: Run, at: int, size: int) -> bytes:
        if run.mapped is not None:
            return bytes(run.mapped[run.offset + at:run.offset + at + size])
        try:
            data = os.pread(self._file, size, run.offset + at) if self._file is not None else b""
        except OSError as error:
            raise MemoryUnavailable(run.start + at, size, f"the emulator's memory cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise MemoryUnavailable(run.start + at, size, "the emulator's memory ends there: has it ended?")
        return data

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        for start, length in self.ranges() or ():
            at, end = start, start + length
            while at < end:
                index = bisect_right(self._starts, at) - 1
                run = self._runs[index] if index >= 0 else None
                if run is not None and run.start <= at < run.start + run.length:
                    stop = min(end, run.start + run.length)
                    if run.mapped is not None:
                        yield at, run.mapped[run.offset + at - run.start:run.offset + stop - run.start]
                    else:
                        for piece in range(at, stop, _PIECE):
                            yield piece, memoryview(self._of(run, piece - run.start, min(_PIECE, stop - piece)))
                else:
                    later = [first for first in self._starts if first > at]
                    stop = min([end, at + _PIECE, *later[:1]])
                    with contextlib.suppress(MemoryUnavailable):
                        yield at, memoryview(self._stub.read(at, stop - at))
                at = stop

    def close(self) -> None:
        descriptor, self._file = self._file, None
        if descriptor is not None:
            os.close(descriptor)
        self._runs, self._starts = [], []


def fast_memory(port: Port, stub: PhysicalMemory, blocks: Sequence[Range]) -> FastMemory:
    """The fast path of the target behind `port`, verified against `stub`.  Raises NoFastPath with the reason.

    `blocks` are the pieces of RAM and ROM, each of one region: ROM that lies in the middle of RAM has neighbours on both sides that look like
    one piece in the emulator's process.
    """
    pid = _listener(port.endpoint())
    known = [block for block in blocks if not LEGACY[0] <= block[0] < LEGACY[1]]
    if not known:
        raise NoFastPath("the memory map is not known")
    maps = _maps(pid)
    runs: List[Run] = []
    descriptor: Optional[int] = None
    mapped_files: Set[str] = set()
    try:
        for start, length in known:
            run, path = _run(port, pid, start, length, maps)
            if run is None:
                continue
            if path:
                mapped_files.add(path)
            elif descriptor is None:
                descriptor = _open_memory(pid)
            runs.append(run)
        if not runs:
            raise NoFastPath("the emulator does not say where its RAM is (monitor gpa2hva)")
        how = f"RAM mapped from {', '.join(sorted(mapped_files))}" if mapped_files else f"RAM read from process {pid}"
        memory = FastMemory(runs, descriptor, stub, how)
        _compare(memory, stub, runs)
        descriptor = None
        return memory
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _listener(endpoint: Optional[str]) -> int:
    """The process of this machine that listens at the stub's port."""
    host, _, port = (endpoint or "").rpartition(":")
    if not port.isdigit() or not host.startswith(_LOCAL):
        raise NoFastPath(f"the emulator is not on this machine ({endpoint or 'unknown endpoint'})")
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue
        # The listening socket (state 0A), or the accepted connection: QEMU's listener is closed while a client is there.
        inodes |= {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) == int(port) and row[3] in ("0A", "01")}
    for name in os.listdir("/proc") if inodes else ():
        if name.isdigit() and int(name) != os.getpid() and _has_socket(name, inodes):
            return int(name)
    raise NoFastPath(f"no process that can be looked at listens at port {port} (another user's, or in a container)")


def _has_socket(pid: str, inodes: Set[str]) -> bool:
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            if found and found.group(1) in inodes:
                return True
    except OSError:
        pass
    return False


_Map = Tuple[int, int, bool, int, str]


def _maps(pid: int) -> List[_Map]:
    """(first, end, shared, file offset, path) of the process' mappings."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise NoFastPath(f"the mappings of process {pid} cannot be read: {error.strerror}") from error
    rows = []
    for line in lines:
        parts = line.split(None, 5)
        first, _, end = parts[0].partition("-")
        rows.append((int(first, 16), int(end, 16), parts[1].endswith("s"), int(parts[2], 16), parts[5] if len(parts) > 5 else ""))
    return rows


def _run(port: Port, pid: int, start: int, length: int, maps: List[_Map]) -> Tuple[Optional[Run], str]:
    """Where the run of RAM is, and the file that it is mapped from, if any.  Both ends are asked: a run can be made of two blocks."""
    try:
        first = gpa_to_hva(port.monitor(f"gpa2hva {start:#x}"))
        last = gpa_to_hva(port.monitor(f"gpa2hva {start + length - 1:#x}"))
    except TargetGone:
        raise
    except TargetError:
        return None, ""
    if first is None or last is None or first[0] != last[0] or last[1] - first[1] != length - 1:
        return None, ""
    address = first[1]
    for begin, end, shared, offset, path in maps:
        if begin <= address and address + length <= end:
            if shared and path.startswith("/") and not path.startswith("/dev/zero"):
                view = _map_file(f"/proc/{pid}/root{path}", path, offset + address - begin + length)
                if view is not None:
                    return Run(start, length, offset + address - begin, view), path
            return Run(start, length, address, None), ""
    return None, ""


def _map_file(inside: str, path: str, needed: int) -> Optional[memoryview]:
    for name in (path, inside):
        try:
            descriptor = os.open(name, os.O_RDONLY)
        except OSError:
            continue
        try:
            if os.fstat(descriptor).st_size >= needed:
                return memoryview(mmap.mmap(descriptor, needed, access=mmap.ACCESS_READ))
        except (OSError, ValueError):
            continue
        finally:
            os.close(descriptor)
    return None


def _open_memory(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError as error:
        raise NoFastPath(f"the memory of process {pid} cannot be opened: {error.strerror} (ptrace permission)") from error


def _compare(memory: FastMemory, stub: PhysicalMemory, runs: List[Run]) -> None:
    """Some pages of each run, first and last among them, read both ways."""
    for run in runs:
        pages = max(run.length // PAGE_SIZE, 1)
        wanted = sorted({number * (pages - 1) // (_COMPARED - 1) for number in range(_COMPARED)})
        for number in wanted:
            address, size = run.start + number * PAGE_SIZE, min(PAGE_SIZE, run.length)
            if memory.read(address, size) != stub.read(address, size):
                raise NoFastPath(f"the emulator's own memory and the stub differ at {address:#x}")
