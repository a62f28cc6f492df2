#!/usr/bin/env python3
"""Reads and scans of each dump format, as ratios against a plain-Python way to do the same in the same run.

    bench_memory.py [MiB]

Plain ways: for formats that store pages as they are, seek and read of an ordinary file with a search through the list of runs, and a loop that
slices every page; for kdump, counting the bits of the bitmap up to the page, then zlib; for AVML, expanding frames from the beginning.
Ratios above 1 say how many times faster vtdbg is.  The memory column is what opening the dump and 2,000 reads added to the process' heap.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Callable, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import dumps  # noqa: E402

from vtdbg.memory.base import PhysicalMemory  # noqa: E402
from vtdbg.memory.open import open_machine  # noqa: E402

PAGE = 4096
READS = 2000


def contents(mib: int) -> List[Tuple[int, bytes]]:
    """`mib` MiB on both sides of a hole; a third of the pages zeros, a third text, a third noise."""
    chance = random.Random(5)
    noise = [chance.randbytes(PAGE) for _ in range(64)]
    pages = [(bytes(PAGE), b"%08d" % n * 512, noise[n % 64])[n % 3] for n in range(mib * 256)]
    half = len(pages) // 2
    return [(0, b"".join(pages[:half])), (0x10000000, b"".join(pages[half:]))]


def timed(action: Callable[[], object], least: float = 0.1) -> float:
    """Seconds for one call: the best of several."""
    best, spent = float("inf"), 0.0
    while spent < least:
        begin = time.perf_counter()
        action()
        took = time.perf_counter() - begin
        best, spent = min(best, took), spent + took
    return best


def scan(memory: PhysicalMemory) -> int:
    """The first quadword of every page, as a scan for control structures reads it."""
    found = 0
    for _, view in memory.views():
        found += sum(1 for value in view.cast("Q")[::512] if value == 1)
    return found


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    segments = contents(mib)
    chance = random.Random(6)
    addresses = [start + chance.randrange(len(data) // PAGE) * PAGE for _ in range(READS // 2) for start, data in segments]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "raw": segments[0][1] + segments[1][1], "elf": dumps.elf(segments), "lime": dumps.lime(segments),
            "windows": dumps.windows64(segments, "bitmap"), "kdump": dumps.kdump(segments), "avml": dumps.avml(segments)}
        files["flattened"] = dumps.flattened(files["kdump"], range(0, len(files["kdump"]), 16384))
        print(f"{mib} MiB; {READS} random 4 KiB reads; scan of one quadword a page")
        print("format      read us  plain us  ratio    scan ms  plain ms  ratio    open ms  heap KiB")
        for kind, content in files.items():
            path = folder / kind
            path.write_bytes(content)
            hole = 0x10000000 - len(segments[0][1])
            report(kind, path, addresses if kind != "raw" else [at - hole if at >= 0x10000000 else at for at in addresses])


def report(kind: str, path: Path, addresses: List[int]) -> None:
    opening = timed(lambda: open_machine(path).memory.close())
    tracemalloc.start()
    memory = open_machine(path).memory
    for address in addresses:
        memory.read(address, PAGE)
    heap = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    memory.close()
    memory = open_machine(path).memory

    def read_all() -> None:
        for address in addresses:
            memory.read(address, PAGE)

    ours, scanning = timed(read_all) / len(addresses), timed(lambda: scan(memory))
    plain_read, plain_scan = plain(kind, path, memory, addresses)
    print(f"{kind:10} {ours * 1e6:8.2f} {plain_read * 1e6:9.2f} {plain_read / ours:6.1f}   {scanning * 1e3:8.2f} {plain_scan * 1e3:9.2f} "
          f"{plain_scan / scanning:6.1f}   {opening * 1e3:8.3f} {heap / 1024:9.0f}")
    memory.close()


def plain(kind: str, path: Path, memory: PhysicalMemory, addresses: List[int]) -> Tuple[float, float]:
    """Seconds a read and seconds a scan of the plain way."""
    if kind in ("kdump", "flattened"):
        return plain_kdump(path.with_name("kdump"), addresses[:40])
    if kind == "avml":
        return plain_avml(path, addresses[:4])
    runs = memory.runs()  # type: ignore[attr-defined]
    with open(path, "rb") as file:
        def read_all() -> None:
            for address in addresses:
                for start, length, offset in runs:
                    if start <= address < start + length:
                        file.seek(offset + address - start)
                        file.read(PAGE)
                        break

        def scan_all() -> int:
            found = 0
            for _, length, offset in runs:
                file.seek(offset)
                data = file.read(length)
                for at in range(0, length, PAGE):
                    page = data[at:at + PAGE]
                    found += struct.unpack_from("<Q", page)[0] == 1
            return found

        return timed(read_all) / len(addresses), timed(scan_all)


def plain_kdump(path: Path, addresses: List[int]) -> Tuple[float, float]:
    data = path.read_bytes()
    block, blocks, bitmaps = struct.unpack_from("<III", data, 428)
    first = (1 + blocks) * block
    bitmap = data[first + bitmaps * block // 2:first + bitmaps * block]
    table = first + bitmaps * block

    def page(address: int) -> bytes:
        pfn = address // PAGE
        rank = sum(bin(byte).count("1") for byte in bitmap[:pfn // 8]) + bin(bitmap[pfn // 8] & ((1 << pfn % 8) - 1)).count("1")
        offset, size, flags = struct.unpack_from("<QII", data, table + 24 * rank)
        return zlib.decompress(data[offset:offset + size]) if flags else data[offset:offset + size]

    def scan_all() -> int:
        found, rank = 0, 0
        for pfn in range(len(bitmap) * 8):
            if bitmap[pfn // 8] >> pfn % 8 & 1:
                offset, size, flags = struct.unpack_from("<QII", data, table + 24 * rank)
                content = zlib.decompress(data[offset:offset + size]) if flags else data[offset:offset + size]
                found += struct.unpack_from("<Q", content)[0] == 1
                rank += 1
        return found

    return timed(lambda: [page(address) for address in addresses]) / len(addresses), timed(scan_all)


def plain_avml(path: Path, addresses: List[int]) -> Tuple[float, float]:
    from vtdbg.memory.compression import unsnappy
    data = path.read_bytes()

    def expand(until: int) -> bytes:
        """Memory up to `until`, frame by frame."""
        at = 0
        while at < len(data):
            _, _, address, last = struct.unpack_from("<4sIQQ", data, at)
            at += 32
            while address <= last:
                kind, size = data[at], int.from_bytes(data[at + 1:at + 4], "little")
                if kind < 2:
                    body = data[at + 8:at + 4 + size]
                    content = unsnappy(body, 1 << 16) if kind == 0 else body
                    if address <= until < address + len(content):
                        return content
                    address += len(content)
                at += 4 + size
            at += 8
        return b""

    reading = timed(lambda: [expand(address) for address in addresses]) / len(addresses)
    return reading, timed(lambda: expand(1 << 60))


if __name__ == "__main__":
    main()
