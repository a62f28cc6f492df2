"""QEMU on loopback, for tests: the lab with KVM in it, and a bare machine that never ran."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, TypeVar

from support.live import PATIENCE

from . import build

POINTS = ("vmrun", "guest", "exit")
"""At VMRUN; in the guest, after an exit for #UD; in the host just after #VMEXIT 0x400 (NPF)."""
SMP_POINTS = ("one", "both", "nested")
"""Processor 1 in vCPU 1 of VM A and processor 0 in the host; both in VM A; processor 1 in the guest of VM B's guest."""
BOOT_PATIENCE = 4 * PATIENCE
MEMORY = 96 << 20

S = TypeVar("S", bound="Staged")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Qemu:
    """A process that listens with its gdbstub at `port` and with QMP at `folder`/qmp.sock."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        build.require("qemu-system-x86_64", "gdb")
        self.folder = folder
        self._log = open(folder / "qemu.log", "wb")     # noqa: SIM115 - it lives as long as the process
        while not self._started(arguments):
            said = (folder / "qemu.log").read_text(errors="replace")
            # Somebody else had the port first.
            if "in use" not in said or said.count("\n") > 9:
                self.close()
                raise RuntimeError("QEMU does not start: " + said[-500:])

    def _started(self, arguments: Sequence[str]) -> bool:
        self.port = free_port()
        command = ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-gdb", f"tcp:127.0.0.1:{self.port}",
                   "-qmp", f"unix:{self.folder}/qmp.sock,server=on,wait=off", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            # QMP is answered once everything is there.  The port itself is not tried: QEMU serves one debugger, and a connection is one.
            try:
                self.qmp("query-status")
                return True
            except (OSError, ValueError):
                time.sleep(0.05)
        return False

    @property
    def source(self) -> str:
        return f"gdb:127.0.0.1:{self.port}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def qmp(self, execute: str, **arguments: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.folder / "qmp.sock"))
            with connection.makefile("rw", encoding="utf-8") as stream:
                stream.readline()
                for request in ({"execute": "qmp_capabilities"}, {"execute": execute, "arguments": arguments}):
                    stream.write(json.dumps(request) + "\n")
                    stream.flush()
                    while True:
                        answer = json.loads(stream.readline())
                        if "return" in answer or "error" in answer:
                            break
        if "error" in answer:
            raise RuntimeError(answer["error"]["desc"])
        return answer["return"]

    @property
    def running(self) -> bool:
        return bool(self.qmp("query-status")["running"])

    def dump(self, path: Path) -> Path:
        """An ELF core of the machine, written by QEMU."""
        self.qmp("dump-guest-memory", paging=False, protocol=f"file:{path}")
        return path


class BareQemu(Qemu):
    """A machine that has not executed an instruction, with `data` at physical `address`.  Its RAM is QEMU's own, not a file."""

    def __init__(self, folder: Path, data: bytes = b"", address: int = 0x100000, smp: int = 1) -> None:
        extra: List[str] = []
        if data:
            (folder / "data").write_bytes(data)
            extra = ["-device", f"loader,file={folder / 'data'},addr={address:#x},force-raw=on"]
        super().__init__(folder, ["-m", "64M", "-smp", str(smp), *extra])


class Staged(Qemu):
    """Linux and its KVM.  `advance` takes it from point to point, in the order of `points` only, by a gdb that runs `script`."""

    points: Sequence[str]
    script: str

    def __init__(self, folder: Path, files: build.Built, ready: int, machine: Sequence[str], kernel: str) -> None:
        """`ready`: the address that the first stage waits for; `machine` and `kernel`: further arguments of QEMU and of the kernel."""
        self.files, self._ready = files, ready
        self.state: Dict[str, Any] = {}
        self.point = ""
        super().__init__(folder, [
            "-cpu", "EPYC,+svm,+npt,-rdrand,-rdseed", *machine, "-m", f"{MEMORY >> 20}M", "-no-reboot", "-serial", f"file:{folder / 'serial.log'}",
            "-object", f"memory-backend-file,id=ram0,size={MEMORY},mem-path={folder / 'ram'},share=on", "-machine", "pc,memory-backend=ram0",
            "-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", kernel])

    def advance(self: S, point: str) -> S:
        if self.point == point:
            return self
        if self.point and self.points.index(point) < self.points.index(self.point):
            raise RuntimeError(f"the machine is past {point}: it is at {self.point}")
        result = self.folder / "stage.json"
        environment = {**os.environ, "LAB_PORT": str(self.port), "LAB_POINT": point, "LAB_READY": str(self._ready),
                       "LAB_LOG": str(self.folder / "serial.log"), "LAB_RESULT": str(result), "LAB_RESULT_SO_FAR": json.dumps(self.state)}
        command = ["gdb", "-q", "-nx", "-batch", "-x", str(build.HERE / self.script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BOOT_PATIENCE, check=False)
        if not result.exists():
            raise RuntimeError(f"the lab did not reach {point}: {done.stderr[-800:]}\n{self.log[-800:]}")
        self.state = json.loads(result.read_text())
        result.unlink()
        self.point = point
        return self

    @property
    def log(self) -> str:
        return (self.folder / "serial.log").read_text(errors="replace")

    def truth(self, name: str) -> int:
        """A number of the TRUTH lines: "hsave", "cr3", "pid_a", ..."""
        found = re.search(rf"\b{name}=(0x[0-9a-f]+|\d+)", self.log)
        assert found is not None, name
        return int(found.group(1), 0)


class Smp(Staged):
    """KVM with two VMs on two processors (smp.c), the kernel at a random place."""

    points, script = SMP_POINTS, "stage_smp.py"

    def __init__(self, folder: Path) -> None:
        files = build.build()
        super().__init__(folder, files, files.smp_ready, ["-smp", "2"],
                         "rdinit=/init_smp console=ttyS0,115200 norandmaps panic=-1 loglevel=4 random.trust_cpu=off")

    def kallsyms(self) -> str:
        """The lines of /proc/kallsyms that the kernel printed."""
        return "".join(line + "\n" for line in re.findall(r"^KSYM (\w+ \w .*?)\r?$", self.log, re.M))


class Lab(Staged):
    """KVM with one guest."""

    points, script = POINTS, "stage.py"

    def __init__(self, folder: Path) -> None:
        files = build.build()
        super().__init__(folder, files, files.ready, [],
                         "console=ttyS0,115200 nokaslr norandmaps init_on_free=1 hugepages=1 panic=-1 loglevel=4 random.trust_cpu=off")

    def pagemap(self) -> List[Tuple[int, int]]:
        """(guest-physical, host-physical) of the guest's pages that the host's kernel had mapped, by its own /proc/self/pagemap."""
        rows = [(int(gpa, 16), int(hpa, 16)) for gpa, hpa in re.findall(r"TRUTH gpa=(\w+) hpa=(\w+)", self.log)]
        return [(gpa, hpa) for gpa, hpa in rows if hpa != (1 << 64) - 1]
