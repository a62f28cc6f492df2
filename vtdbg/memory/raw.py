"""Raw image: the byte at file offset n is the byte at physical address n."""

from __future__ import annotations

import os
from typing import Iterator, List, Tuple

from vtdbg.machine import Machine
from vtdbg.memory.base import PAGE_SIZE
from vtdbg.memory.runs import RunMemory
from vtdbg.memory.source import ByteSource, size_text

FORMAT = "raw"
TITLE = "raw image (offset = physical address): pmemsave, memory-backend-file, dd, vmem"

_MAX_EXTENTS = 1 << 16
PCI_HOLE = 3 << 30


class RawMemory(RunMemory):
    """All of the file.  `views` leaves out what a sparse file does not store (it reads as zeros), so that a scan of a large
    sparse image touches only what is there."""

    def __init__(self, source: ByteSource) -> None:
        super().__init__(source, [(0, source.size, 0)], missing="beyond the end of the raw image")

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        for start, end in data_extents(self._source.path, self._source.size):
            yield start, self._source.slice(start, end - start)


def recognise(header: bytes, path: str) -> bool:
    """Anything can be raw memory: the caller has to have asked every other format first."""
    return True


def read(source: ByteSource) -> Machine:
    machine = Machine(RawMemory(source), os.path.basename(source.path), FORMAT, f"raw image, {size_text(source.size)}")
    machine.details["file size"] = size_text(source.size)
    if source.size % PAGE_SIZE:
        machine.warnings.append(f"the size {source.size:#x} is not a multiple of 4 KiB: the image is cut, or not a raw image of memory")
    if source.size > PCI_HOLE:
        machine.warnings.append("larger than 3 GiB without a map of its holes: if this is the RAM file of a virtual machine, what lies above "
                                "the PCI hole (it begins at 3 GiB or later and ends at 4 GiB) is at a higher physical address than shown")
    return machine


def data_extents(path: str, size: int) -> List[Tuple[int, int]]:
    """(first, end) of the page-aligned parts of the file that the file system stores; one extent where it cannot say."""
    whole = [(0, size)]
    if not hasattr(os, "SEEK_DATA"):
        return whole
    extents: List[Tuple[int, int]] = []
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return whole
    try:
        at = 0
        while at < size and len(extents) < _MAX_EXTENTS:
            try:
                start = os.lseek(descriptor, at, os.SEEK_DATA) & -PAGE_SIZE
            except OSError:
                # ENXIO: no data after `at`.
                return extents if os.lseek(descriptor, 0, os.SEEK_END) >= size else whole
            at = min(-(-os.lseek(descriptor, start, os.SEEK_HOLE) // PAGE_SIZE) * PAGE_SIZE, size)
            if start >= at:
                break
            if extents and start <= extents[-1][1]:
                extents[-1] = extents[-1][0], at
            else:
                extents.append((start, at))
        if at < size:
            extents.append((at, size))
    except OSError:
        return whole
    finally:
        os.close(descriptor)
    return extents
