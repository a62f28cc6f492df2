"""Enumerating an EPT, and single walks, against two plain ways to do it, in the same run.

Tables are made in memory: 512 and 2048 page tables of 4 KiB pages (262,144 and 1,048,576 leaves), regular (frames in a row, accessed and dirty
flags at random), and scattered (every frame at random: nothing can be merged).

  object per page   a walk in the usual manner: one object a leaf, neighbours merged afterwards
  unpack and merge  each table unpacked at once, one comparison a leaf
  vtdbg             `vtdbg.enumeration.ranges`, every row made the same three numbers as those of the other two, in a list
  rows once         the same rows (rights of all levels, memory type, flags) looked at once and let go, as filters and dumps do

Each figure is processor time, the best of several runs in turn; what is compared is checked to be equal first.
"""

from __future__ import annotations

import gc
import random
import struct
import sys
import time
from dataclasses import dataclass
from typing import Callable, Iterator, List, Tuple

import vtdbg
from vtdbg.enumeration import leaves, ranges
from vtdbg.memory.base import PhysicalMemory
from vtdbg.vmx.ept import Ept

Row = Tuple[int, int, int]
ADDRESS = 0x000FFFFFFFFFF000
RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 5


def build(tables: int, scattered: bool) -> PhysicalMemory:
    """`tables` page tables of 512 pages; the root at 0, EPTP 0x5e."""
    directories = (tables + 511) // 512
    first = 0x2000 + directories * 4096
    image = bytearray(first + tables * 4096)
    chance = random.Random(1)
    struct.pack_into("<Q", image, 0, 0x1000 | 7)
    for index in range(directories):
        struct.pack_into("<Q", image, 0x1000 + 8 * index, (0x2000 + index * 4096) | 7)
    for index in range(tables):
        struct.pack_into("<Q", image, 0x2000 + index * 8, (first + index * 4096) | 7)
        frames = [chance.randrange(1 << 24) for _ in range(512)] if scattered else range(index * 512, index * 512 + 512)
        struct.pack_into("<512Q", image, first + index * 4096, *[frame << 12 | 0x37 | chance.randrange(4) << 8 for frame in frames])
    return vtdbg.memory_from_segments([(0, bytes(image))])


@dataclass(frozen=True)
class Page:
    gpa: int
    hpa: int
    size: int
    rights: int
    memory_type: int


def pages_of(memory: PhysicalMemory, table: int, level: int, base: int, rights: int) -> Iterator[Page]:
    shift = 3 + 9 * level
    for index in range(512):
        entry = memory.read_u64(table + 8 * index)
        if not entry & 7:
            continue
        granted = rights & entry
        if level > 1 and not entry & 0x80:
            yield from pages_of(memory, entry & ADDRESS, level - 1, base + (index << shift), granted)
        else:
            yield Page(base + (index << shift), entry & ADDRESS, 1 << shift, granted, entry >> 3 & 15)


def object_per_page(memory: PhysicalMemory) -> List[Row]:
    rows: List[Row] = []
    last = None
    for page in pages_of(memory, 0, 4, 0, 7):
        start, target, length = rows[-1] if rows else (0, 0, 0)
        if last and (last.rights, last.memory_type, start + length, target + length) == (page.rights, page.memory_type, page.gpa, page.hpa):
            rows[-1] = start, target, length + page.size
        else:
            rows.append((page.gpa, page.hpa, page.size))
        last = page
    return rows


def unpack_and_merge(memory: PhysicalMemory) -> List[Row]:
    rows: List[Row] = []
    start = target = end = 0
    meaning = -1
    pending = [(0, 4, 0, 7)]
    while pending:
        table, level, base, rights = pending.pop()
        below = []
        for index, entry in enumerate(struct.unpack("<512Q", memory.read(table, 4096))):
            if not entry & 7:
                continue
            gpa = base + (index << 3 + 9 * level)
            if level > 1 and not entry & 0x80:
                below.append((entry & ADDRESS, level - 1, gpa, rights & entry))
                continue
            hpa, now = entry & ADDRESS, (rights & entry) | entry & 0x78
            if gpa == end and hpa == target + end - start and now == meaning:
                end += 1 << 3 + 9 * level
            else:
                if end > start:
                    rows.append((start, target, end - start))
                start, target, end, meaning = gpa, hpa, gpa + (1 << 3 + 9 * level), now
        pending.extend(reversed(below))
    rows.append((start, target, end - start))
    return rows


def ours(memory: PhysicalMemory) -> List[Row]:
    return [(row.start, row.target, row.length) for row in ranges(memory, Ept(0x5E))]


def every_row(memory: PhysicalMemory) -> None:
    for _ in ranges(memory, Ept(0x5E)):
        pass


def best(work: Callable[[], object], runs: int) -> float:
    """Seconds of the processor, the best of `runs`."""
    times = []
    for _ in range(runs):
        gc.collect()
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return min(times)


def enumerate_all() -> None:
    print(f"{'tables':27} {'object per page':>15} {'unpack and merge':>16} {'vtdbg':>9} {'rows once':>9}   times faster than the first and second")
    for tables, scattered in ((512, False), (2048, False), (512, True)):
        memory = build(tables, scattered)
        assert ours(memory) == unpack_and_merge(memory) == object_per_page(memory)
        slow = best(lambda: object_per_page(memory), 1)  # noqa: B023
        turns = [(best(lambda: unpack_and_merge(memory), 1), best(lambda: ours(memory), 1), best(lambda: every_row(memory), 1))  # noqa: B023
                 for _ in range(RUNS)]
        plain, fast, once = map(min, zip(*turns))
        title = f"{tables * 512:,} leaves, {'scattered' if scattered else 'regular'}"
        print(f"{title:27} {slow * 1e3:12.0f} ms {plain * 1e3:13.1f} ms {fast * 1e3:6.1f} ms {once * 1e3:6.1f} ms"
              f"   {slow / fast:.0f} and {plain / fast:.1f}; rows once {slow / once:.0f} and {plain / once:.1f}")


def singles() -> None:
    memory = build(8, scattered=False)
    ept = Ept(0x5E)
    count = 2000

    def walks() -> None:
        for index in range(count):
            ept.walk(memory, index << 12)

    def every_leaf() -> None:
        for _ in leaves(memory, ept, 0, (count << 12) - 1):
            pass

    one, listed = best(walks, RUNS) / count, best(every_leaf, RUNS) / count
    print(f"one walk of 4 levels with every step kept: {one * 1e6:.0f} us; the same page out of `leaves`: {listed * 1e6:.1f} us "
          f"({one / listed:.0f} times less)")


if __name__ == "__main__":
    enumerate_all()
    singles()
