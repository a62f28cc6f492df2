"""The lab's kernel and initial RAM disk, from Debian packages and one C file."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple

from support.live import Unavailable

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("VTDBG_CACHE", HERE.parents[1] / ".cache")) / "lab_amd"
MODULES = ("virt/lib/irqbypass", "arch/x86/kernel/msr", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd", "drivers/crypto/ccp/ccp")
NEEDED = {"qemu-system-x86_64": "qemu-system-x86", "gdb": "gdb", "gcc": "gcc", "objcopy": "binutils", "dpkg": "dpkg", "apt-get": "apt",
          "busybox": "busybox-static"}


class Built(NamedTuple):
    kernel: Path
    initrd: Path
    ready: int
    """Where the VMM stops for the tests, a linear address of its process."""
    smp_ready: int
    """The same of the VMM for two processors."""
    modules: Path
    """KVM's modules as Debian ships them, with their BTF."""


def require(*programs: str) -> None:
    missing = [NEEDED.get(name, name) for name in programs if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"needs {', '.join(missing)} (apt-get install {' '.join(missing)})")


def _run(command: List[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise Unavailable(f"{' '.join(command[:4])} ... failed: {last}")
    return done.stdout


def _kernel_package() -> str:
    """The package that linux-image-amd64 stands for at the moment."""
    found = re.search(r"Depends: (linux-image-[0-9]\S*-amd64)$", _run(["apt-cache", "depends", "linux-image-amd64"], HERE), re.M)
    if found is None:
        raise Unavailable("apt knows no linux-image-amd64: the lab's kernel is Debian's")
    return found.group(1)


def build() -> Built:
    """The lab's files, made where they are missing (20 s, and a download of 70 MB)."""
    require(*NEEDED)
    CACHE.mkdir(parents=True, exist_ok=True)
    existing = sorted(CACHE.glob("linux-image-*-amd64"))
    tree = existing[-1] if existing else _unpack_kernel(_kernel_package())
    version = tree.name[len("linux-image-"):]
    source = b"".join((HERE / name).read_bytes() for name in ("vmm.c", "init", "smp.c", "init_smp", "build.py"))
    target = CACHE / f"{version}-{hashlib.sha256(source).hexdigest()[:12]}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _make(tree, version, Path(folder) / "made")
            _put(Path(folder) / "made", target)
    return Built(tree / f"boot/vmlinuz-{version}", target / "initrd.gz",
                 int((target / "ready").read_text(), 16), int((target / "smp_ready").read_text(), 16),
                 tree / f"lib/modules/{version}/kernel/arch/x86/kvm")


def _unpack_kernel(package: str) -> Path:
    target = CACHE / package
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=5", package], folder)
        archive = next(folder.glob("*.deb"))
        _run(["dpkg", "-x", archive.name, "tree"], folder)
        _put(folder / "tree", target)
    return target


def _put(made: Path, target: Path) -> None:
    """Two runs at a time make the same; the first one's serves."""
    try:
        os.rename(made, target)
    except OSError:
        if not target.exists():
            raise


def _make(tree: Path, version: str, folder: Path) -> None:
    folder.mkdir()
    _run(["gcc", "-O1", "-static", "-no-pie", "-o", "vmm", str(HERE / "vmm.c")], folder)
    _run(["gcc", "-O1", "-static", "-no-pie", "-pthread", "-o", "smp", str(HERE / "smp.c")], folder)
    for program, symbol, file in (("vmm", "truth_ready", "ready"), ("smp", "smp_ready", "smp_ready")):
        address = re.search(rf"^([0-9a-f]+) T {symbol}$", _run(["nm", program], folder), re.M)
        assert address is not None
        (folder / file).write_text(address.group(1))
    _run(["strip", "vmm", "smp"], folder)
    files: Dict[str, Path] = {"bin/busybox": Path(shutil.which("busybox") or ""), "init": HERE / "init", "vmm": folder / "vmm",
                              "init_smp": HERE / "init_smp", "smp": folder / "smp"}
    for module in MODULES:
        name = Path(module).name + ".ko"
        _run(["objcopy", "--strip-debug", "--remove-section", ".BTF", str(tree / f"lib/modules/{version}/kernel/{module}.ko"), name], folder)
        files[f"m/{name}"] = folder / name
    (folder / "initrd.gz").write_bytes(gzip.compress(_archive(files), 9, mtime=0))


def _archive(files: Dict[str, Path]) -> bytes:
    """A cpio archive in the "newc" form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    folders = sorted({str(parent) for name in files for parent in Path(name).parents if str(parent) != "."} | {"dev", "proc", "sys"})
    rows = [(name, 0o040755, b"") for name in folders] + [(name, 0o100755, path.read_bytes()) for name, path in sorted(files.items())]
    output = bytearray()
    for number, (name, mode, data) in enumerate([*rows, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        output += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        output += bytes(-len(output) % 4) + data
        output += bytes(-len(output) % 4)
    return bytes(output)
