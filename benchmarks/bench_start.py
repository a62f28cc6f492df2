"""Start-up: what `import vtdbg` and a whole `vmcs list` cost, against bare Python in the same run.

The processes write .pyc files where they can (an installed package has them), whatever PYTHONDONTWRITEBYTECODE says here.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Sequence

from vtdbg.samples import unpack_sparse

RUNS = 9
DECODE = "import vtdbg; m = vtdbg.open({!r}); vtdbg.Vmcs.from_page(m.memory.read_page(0x6826000)); m.memory.close()"
PACKED = Path(__file__).parent.parent / "vtdbg" / "data" / "samples" / "kvm-vmx.raw.xz"


def timed(command: Sequence[str]) -> float:
    """Median seconds of a process, started RUNS times after one that warms up."""
    figures = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        figures.append(time.perf_counter() - start)
    return statistics.median(figures[1:])


def main() -> None:
    with tempfile.NamedTemporaryFile(suffix=".raw") as image:
        with open(image.name, "wb") as target:
            unpack_sparse(PACKED.read_bytes(), target)
        bare = timed([sys.executable, "-c", "pass"])
        rows = [
            ("import vtdbg", [sys.executable, "-c", "import vtdbg"]),
            ("import vtdbg and decode one VMCS page",
             [sys.executable, "-c", DECODE.format(image.name)]),
            ("vtdbg vmcs list, 128 MiB raw image", [sys.executable, "-m", "vtdbg", "vmcs", "list", "-s", image.name]),
        ]
        print(f"bare Python: {bare * 1000:.0f} ms")
        for title, command in rows:
            seconds = timed(command)
            print(f"{title}: {seconds * 1000:.0f} ms, {seconds / bare:.1f} times bare Python, {(seconds - bare) * 1000:.0f} ms more")


if __name__ == "__main__":
    main()
