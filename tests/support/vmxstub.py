"""A live VMX target for tests: `VmxStub` starts the processor model with a small hypervisor behind a gdbstub on loopback.

The hypervisor launches a guest that runs CPUID, VMCALL, RDMSR, a read of a hole in EPT, and HLT, for ever; its exit handler steps RIP on.
"""

from __future__ import annotations

import ast
import os
import subprocess
from typing import Dict

from support.vmxcpu import build

START, HANDLER, GUEST, GUEST_PML4, VMCS = 0x1A000, 0x1A400, 0x1B000, 0x1C000, 0x6000
EXITS = (10, 18, 31, 48, 12)
"""CPUID, VMCALL, RDMSR, EPT violation, HLT (SDM vol. 3, appendix VMX Basic Exit Reasons), in the order of the guest's loop."""


class VmxStub:
    """`port`; `layout` {encoding: offset} as the processor itself told by VMWRITE."""

    def __init__(self, dialect: str = "vmware") -> None:
        interpreter = build.python()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment.update(LD_PRELOAD=str(build.shim()), PYTHONPATH=str(build.wheel(interpreter)),
                           VMXCPU_MODEL="corei3_cnl", PYTHONDONTWRITEBYTECODE="1")
        command = [interpreter, str(build.HERE.parent / "vmxstub_server.py"), dialect]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("READY"):
            self.close()
            raise RuntimeError("the VMX stub does not start")
        self.port: int
        self.layout: Dict[int, int]
        self.port, self.layout = ast.literal_eval(line[5:].strip())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> "VmxStub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
