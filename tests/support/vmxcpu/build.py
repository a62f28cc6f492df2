"""What the model needs, made once into a cache directory: the preloaded shim (g++), the bochscpu wheel (pip), a CPython 3.11 to run it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, List, Optional

from support.live import Unavailable

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("VTDBG_CACHE", HERE.parents[2] / ".cache")) / "vmxcpu"
WHEEL = "bochscpu-python==0.4.0"
WHEEL_PYTHON = (3, 11)


def _candidates() -> Iterator[str]:
    if sys.version_info[:2] == WHEEL_PYTHON:
        yield sys.executable
    on_path = shutil.which("python3.11")
    if on_path:
        yield on_path
    yield from sorted(str(path) for path in Path.home().glob(".pyenv/versions/3.11.*/bin/python3.11"))
    yield from sorted(str(path) for path in Path("/usr").glob("local/bin/python3.11"))


def python() -> str:
    """A CPython 3.11: the wheel's compiled module is for that one."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable(f"the processor model is built for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    for candidate in _candidates():
        asked = subprocess.run([candidate, "-c", "import sys; print(sys.version_info[:2] == (3, 11))"], capture_output=True, text=True, check=False)
        if asked.stdout.strip() == "True":
            return candidate
    raise Unavailable("the processor model needs a CPython 3.11 (python3.11 on PATH); none was found")


def _run(command: List[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise Unavailable(f"{' '.join(command[:4])} ... failed: {last}")


def shim() -> Path:
    """The preloaded library, compiled when its source has changed."""
    source = HERE / "shim.cc"
    target = CACHE / f"shim-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.so"
    if not target.exists():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise Unavailable("the processor model needs a C++ compiler (g++); none was found")
        CACHE.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        _run([compiler, "-shared", "-fPIC", "-O1", "-o", str(part), str(source), "-ldl"])
        part.replace(target)
    return target


def wheel(interpreter: Optional[str] = None) -> Path:
    """The folder that has the `bochscpu` package; installed there, not into the environment that runs the tests."""
    target = CACHE / WHEEL.replace("==", "-")
    if not (target / "bochscpu").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=str(CACHE)) as folder:
            _run([interpreter or python(), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                  "--target", folder + "/site", WHEEL])
            if not target.exists():
                os.rename(folder + "/site", target)
    return target
