"""`make demo`: the main job on memory of a real hypervisor that comes with the package."""

from __future__ import annotations

import sys
from typing import Sequence

from vtdbg.cli import main

STEPS: Sequence[Sequence[str]] = (
    ("vmcs", "list"),
    ("vmcs", "dump", "0x6826000", "--group", "control"),
    ("ept", "walk", "0x1000", "--vmcs", "0x6826000"),
    ("ept", "walk", "0xfee00000", "--vmcs", "0x6826000"),
    ("exit", "explain", "0x6826000"),
    ("vmcs", "check", "0x6bd9000", "--caps", "bochs-2.7-skylake-x"),
)
SOURCE = "sample:vmx"


def run() -> int:
    """Each step with the command line that does it; 0 unless a command refuses its input."""
    print("A dump of a machine that runs KVM on VMX, with two virtual machines in it. Nothing is simulated here:\n"
          "the VMCS pages are decoded from raw memory. Try the same on yours with -s YOUR_DUMP.")
    for step in STEPS:
        print(f"\n$ vtdbg {' '.join(step)} -s {SOURCE}\n", flush=True)
        if main([*step, "-s", SOURCE]) == 2:
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
