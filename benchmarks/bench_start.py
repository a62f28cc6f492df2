"""Start-up: what `import vtdbg`, a first decode and a whole `vmcs list` cost in a cold process, against bare Python in the same run.

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
from typing import List, Sequence

from vtdbg.samples import unpack_sparse

RUNS = 9
DECODE = "import vtdbg; m = vtdbg.open({!r}); vtdbg.Vmcs.from_page(m.memory.read_page(0x6826000)); m.memory.close()"
PACKED = Path(__file__).parent.parent / "vtdbg" / "data" / "samples" / "kvm-vmx.raw.xz"


def timed(commands: Sequence[Sequence[str]]) -> List[float]:
    """Median seconds of each process, started RUNS times in turn after once to warm up: a machine that slows down slows down all of them."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    figures: List[List[float]] = [[] for _ in commands]
    for _ in range(RUNS + 1):
        for command, seconds in zip(commands, figures):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in figures]


def main() -> None:
    with tempfile.NamedTemporaryFile(suffix=".raw") as image:
        with open(image.name, "wb") as target:
            unpack_sparse(PACKED.read_bytes(), target)
        rows = [
            ("bare Python", [sys.executable, "-c", "pass"]),
            ("bare Python and tabulate", [sys.executable, "-c", "import tabulate"]),
            ("import vtdbg", [sys.executable, "-c", "import vtdbg"]),
            ("import vtdbg and decode one VMCS page",
             [sys.executable, "-c", DECODE.format(image.name)]),
            ("vtdbg vmcs list, 128 MiB raw image", [sys.executable, "-m", "vtdbg", "vmcs", "list", "-s", image.name]),
        ]
        script = Path(sys.executable).parent / "vtdbg"
        if script.exists():
            rows.append(("the same by the installed program", [str(script), "vmcs", "list", "-s", image.name]))
        times = timed([command for _, command in rows])
        bare = times[0]
        for (title, _), seconds in zip(rows, times):
            print(f"{title}: {seconds * 1000:.0f} ms, {seconds / bare:.1f} times bare Python, {(seconds - bare) * 1000:.0f} ms more")


if __name__ == "__main__":
    main()
