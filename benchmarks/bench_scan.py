"""Scanning a warm 1 GiB image for control blocks, against a loop that slices every page, in the same run.

The image is made of filled pages (every page is stored, nothing is sparse) with one real VMCS page in it, and read once before
the first measurement, so that the figures are those of the scan and not of the disk.  In the other images every page lies: it begins with 1
(the accident that revision identifier 1 invites), or it has an EFER that VMRUN accepts where a VMCB has it.  Figures are processor time, the
best of several runs in turn.
"""

from __future__ import annotations

import mmap
import random
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, Callable, Dict, FrozenSet, List, Tuple

from vtdbg.memory.base import PAGE_SIZE
from vtdbg.memory.open import open_machine
from vtdbg.samples import unpack_sparse
from vtdbg.scanner import scan
from vtdbg.vmx.find import RevisionFilter

SIZE = int(sys.argv[1]) << 20 if len(sys.argv) > 1 else 1 << 30
RUNS = 5
SAMPLE = Path(__file__).parent.parent / "vtdbg" / "data" / "samples" / "kvm-vmx.raw.xz"
VMCS_AT = 0x6826000


def filled(pages: int, lie: bytes, offset: int) -> bytes:
    """Pages of random bytes, with `lie` at `offset` of each."""
    chance = random.Random(1)
    data = bytearray(chance.randbytes(pages * PAGE_SIZE))
    for at in range(offset, len(data), PAGE_SIZE):
        data[at:at + len(lie)] = lie
    return bytes(data)


def make_image(file: BinaryIO, lie: bytes, offset: int, vmcs: bytes) -> None:
    block = filled(4096, lie, offset)
    for _ in range(SIZE // len(block)):
        file.write(block)
    file.seek(SIZE // 2)
    file.write(vmcs)
    file.flush()


def slice_every_page(path: str, wanted: FrozenSet[int]) -> List[int]:
    """The plain way: a slice and an integer for each page."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        return [at for at in range(0, len(image), PAGE_SIZE) if int.from_bytes(image[at:at + PAGE_SIZE][:4], "little") in wanted]


def stride_only(path: str, wanted: FrozenSet[int]) -> List[int]:
    """The bound: one strided look a page, nothing else."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image, memoryview(image) as view:
        column = view.cast("I")[::PAGE_SIZE // 4].tolist()
    return [] if wanted.isdisjoint(column) else [at for at, value in enumerate(column) if value in wanted]


def scan_for(kinds: Tuple[str, ...]) -> Callable[[str], List[int]]:
    def run(path: str) -> List[int]:
        machine = open_machine(path, "raw")
        with machine.memory:
            return [found.address for found in scan(machine, kinds)]
    return run


def best(actions: Dict[str, Callable[[str], List[int]]], name: str) -> Dict[str, Tuple[float, List[int]]]:
    """Seconds of the processor and what was found, by title."""
    figures: Dict[str, List[float]] = {title: [] for title in actions}
    found: Dict[str, List[int]] = {}
    for _ in range(RUNS):
        for title, action in actions.items():
            start = time.process_time()
            found[title] = action(name)
            figures[title].append(time.process_time() - start)
    return {title: (min(seconds), found[title]) for title, seconds in figures.items()}


def main() -> None:
    wanted = RevisionFilter().first_dwords
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "sample.raw"
        with open(unpacked, "wb") as target:
            unpack_sparse(SAMPLE.read_bytes(), target)
        with open(unpacked, "rb") as sample:
            sample.seek(VMCS_AT)
            vmcs = sample.read(PAGE_SIZE)
        for title, lie, offset in (("random pages", b"", 0), ("every page begins with 1", struct.pack("<II", 1, 0), 0),
                                   ("every page has the EFER of a VMCB", struct.pack("<Q", 0x1D00), 0x4D0)):
            path = Path(folder) / "image.raw"
            with open(path, "wb") as file:
                make_image(file, lie, offset, vmcs)
            print(f"{SIZE >> 20} MiB, {title}")
            rows = best({
                "a loop that slices every page": lambda name: slice_every_page(name, wanted),
                "stride alone": lambda name: stride_only(name, wanted),
                "scan for VMCSs": scan_for(("vmcs",)),
                "scan for VMCBs": scan_for(("vmcb",)),
                "scan for VMCSs and VMCBs": scan_for(("vmcs", "vmcb")),
            }, str(path))
            loop = rows["a loop that slices every page"][0]
            for row, (seconds, found) in rows.items():
                print(f"  {row}: {seconds * 1000:.0f} ms, {SIZE / seconds / 1e9:.1f} GB/s, {loop / seconds:.1f} times the loop"
                      + (f"; found {[hex(address) for address in found]}" if row.startswith("scan") else ""))


if __name__ == "__main__":
    main()
