"""WinDbg: everything that an EPT maps, read through dbgeng by ctypes and by pykd, on the same dump in the same process.

  ctypes           the plugin's own way, inside pykd's process too: the engine reads a table into a buffer
  pykd             the plugin's other backend (--backend pykd): a table at once, as 512 numbers
  pykd loadBytes   a table at once as 4096 numbers, the way of pykd's own examples
  pykd an entry    each entry by itself, the usual way of scripts

For each way what `ept dump` takes without printing, and what of it is reading: decoding costs the same each way, and no way of reading makes
it go away.  The engine, pykd and the Python (3.9) are those of Windows, under Wine.
bench_windbg.py [TABLES]: how many page tables of 512 pages (default 512).
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from lab_windbg.image import wrap, write_dump  # noqa: E402
from lab_windbg.lab import Lab, Unavailable, windows_path  # noqa: E402

TABLES = int(sys.argv[1]) if len(sys.argv) > 1 else 512
ROOT_AT = 0x100000


def tables(count: int) -> bytes:
    """PML4, PDPT, page directories and `count` page tables that map frames in a row, in a run at ROOT_AT."""
    directories = (count + 511) // 512
    first = ROOT_AT + 0x2000 + directories * 4096
    image = bytearray(first - ROOT_AT + count * 4096)
    struct.pack_into("<Q", image, 0, ROOT_AT + 0x1000 | 7)
    for index in range(directories):
        struct.pack_into("<Q", image, 0x1000 + 8 * index, ROOT_AT + 0x2000 + index * 4096 | 7)
    for index in range(count):
        struct.pack_into("<Q", image, 0x2000 + index * 8, first + index * 4096 | 7)
        struct.pack_into("<512Q", image, first - ROOT_AT + index * 4096, *[frame << 12 | 0x37 for frame in range(index * 512, index * 512 + 512)])
    return bytes(image)


def main() -> int:
    try:
        lab = Lab().prepare()
    except Unavailable as problem:
        print(f"skipped: {problem}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        dump = write_dump(Path(folder) / "ept.dmp", wrap([(ROOT_AT, tables(TABLES))]))
        output = lab.run_python("measure.py", windows_path(dump), f"{ROOT_AT | 0x5E:#x}")
    told = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    fast = told["ctypes"]
    print(f"{fast['tables']} tables of {TABLES * 512} pages; reads of the engine a table: {fast['reads'] / fast['tables']:.2f}")
    print(f"{'':15} {'EPT dump':>11} {'of it reading':>14}   ctypes is so many times as fast: EPT dump, reading")
    for name, one in told.items():
        assert (one["rows"], one["tables"]) == (fast["rows"], fast["tables"])
        whole, reading = one["seconds"], one["reading"]
        print(f"{name:<15} {whole * 1e3:8.1f} ms {reading * 1e3:11.1f} ms   {whole / fast['seconds']:32.1f} {reading / fast['reading']:10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
