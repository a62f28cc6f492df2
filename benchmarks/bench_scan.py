"""Scanning a warm 1 GiB image for control blocks, against a loop that slices every page, in the same run.

The image is made of filled pages (every page is stored, nothing is sparse) with one real VMCS page in it, and read once before
the first measurement, so that the figures are those of the scan and not of the disk.  A second image has 1 as the first number of
every page: the accident that revision identifier 1 invites.
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


def filled(pages: int, first: int) -> bytes:
    """Pages of random bytes; `first` is the first dword of each, or -1 for a random one."""
    chance = random.Random(1)
    data = bytearray(chance.randbytes(pages * PAGE_SIZE))
    for at in range(0, len(data), PAGE_SIZE) if first >= 0 else ():
        struct.pack_into("<II", data, at, first, 0)
    return bytes(data)


def make_image(file: BinaryIO, first: int, vmcs: bytes) -> None:
    block = filled(4096, first)
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


def best(action: Callable[[], List[int]]) -> Tuple[float, List[int]]:
    figures, result = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        result = action()
        figures.append(time.perf_counter() - start)
    return min(figures), result


def main() -> None:
    wanted = RevisionFilter().first_dwords
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "sample.raw"
        with open(unpacked, "wb") as target:
            unpack_sparse(SAMPLE.read_bytes(), target)
        with open(unpacked, "rb") as sample:
            sample.seek(VMCS_AT)
            vmcs = sample.read(PAGE_SIZE)
        for title, first in (("random pages", -1), ("every page begins with 1", 1)):
            path = Path(folder) / "image.raw"
            with open(path, "wb") as file:
                make_image(file, first, vmcs)
            name = str(path)
            print(f"{SIZE >> 20} MiB, {title}")
            rows: Dict[str, Tuple[float, List[int]]] = {
                "a loop that slices every page": best(lambda: slice_every_page(name, wanted)),  # noqa: B023
                "stride alone": best(lambda: stride_only(name, wanted)),  # noqa: B023
                "scan for VMCSs": best(lambda: scan_for(("vmcs",))(name)),  # noqa: B023
                "scan for VMCSs and VMCBs": best(lambda: scan_for(("vmcs", "vmcb"))(name)),  # noqa: B023
            }
            loop = rows["a loop that slices every page"][0]
            for row, (seconds, found) in rows.items():
                print(f"  {row}: {seconds * 1000:.0f} ms, {SIZE / seconds / 1e9:.1f} GB/s, {loop / seconds:.1f} times the loop"
                      + (f"; found {[hex(address) for address in found]}" if row.startswith("scan") else ""))


if __name__ == "__main__":
    main()
