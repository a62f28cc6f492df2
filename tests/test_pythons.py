"""The same text from the oldest and the newest Python on this machine: WinDbg's pykd brings 3.9, GDB whatever it was built with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from support.live import PATIENCE

ROOT = Path(__file__).parent.parent
COMMANDS = (["vmcs", "list"], ["vmcs", "dump"], ["vmcs", "check"], ["ept", "dump"], ["gva", "walk", "0x1000"], ["exit", "explain"], ["gdt", "dump"],
            ["vmcs", "get", "GUEST_RIP", "--json"], ["decode", "cr0", "0x80000011"], ["source", "info"])
PROGRAM = f"""
from vtdbg.cli import main
for words in {COMMANDS!r}:
    assert main([*words, '-s', 'sample:vmx', '--width', '80']) in (0, 1)
"""


def others() -> List[str]:
    """Interpreters from 3.9 on besides the one that runs the tests: on the PATH, or kept by pyenv."""
    found = {}
    candidates = [shutil.which(f"python3.{minor}") for minor in range(9, 15)]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))]
    for path in filter(None, candidates):
        # Asked, because a name on the PATH can be a stub for an interpreter that is not there (pyenv's shims).
        asked = subprocess.run([path, "-c", "import sys, ensurepip; print(sys.version_info[1])"], capture_output=True, text=True)
        minor = int(asked.stdout) if asked.returncode == 0 else 0
        if 9 <= minor != sys.version_info[1]:
            found.setdefault(minor, path)
    return [found[minor] for minor in sorted({min(found, default=0), max(found, default=0)} - {0})]


def output(python: str) -> str:
    """What all the commands print, in one process."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, env=variables, timeout=PATIENCE)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.parametrize("python", others() or [pytest.param("", marks=pytest.mark.skip(reason="no other Python from 3.9 on this machine"))])
def test_another_python_prints_the_same(python: str, tmp_path: Path) -> None:
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "tabulate", "capstone"], check=True)
    assert output(str(interpreter)) == output(sys.executable)
