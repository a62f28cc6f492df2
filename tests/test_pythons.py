"""The same text from every supported Python that this machine has: WinDbg's pykd brings 3.9, GDB whatever it was built with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = (["vmcs", "list"], ["vmcs", "dump"], ["vmcs", "check"], ["ept", "dump"], ["gva", "walk", "0x1000"], ["exit", "explain"], ["gdt", "dump"],
            ["vmcs", "get", "GUEST_RIP", "--json"], ["decode", "cr0", "0x80000011"], ["source", "info"])


def others() -> List[str]:
    """Interpreters from 3.9 on besides the one that runs the tests: on the PATH, or kept by pyenv."""
    found = {}
    candidates = [shutil.which(f"python3.{minor}") for minor in range(9, 15)]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))]
    for path in candidates:
        if path is None:
            continue
        asked = subprocess.run([path, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
        version = asked.stdout.strip()
        if asked.returncode == 0 and re.fullmatch(r"3\.\d+", version) and int(version[2:]) >= 9 and version != "%d.%d" % sys.version_info[:2]:
            found.setdefault(version, path)
    versions = sorted(found, key=lambda version: int(version[2:]))
    # The oldest and the newest: what lies between them has both their limits.
    return [found[version] for version in dict.fromkeys(versions[:1] + versions[-1:])]


def output(python: str, words: List[str]) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run([python, "-W", "error", "-m", "vtdbg", *words, "-s", "sample:vmx"], capture_output=True, text=True, env=variables, timeout=60)
    assert done.stderr == "" and done.returncode in (0, 1), done
    return done.stdout


@pytest.mark.parametrize("python", others() or [pytest.param("", marks=pytest.mark.skip(reason="no other Python 3.9 to 3.13 with venv on this machine"))])
def test_another_python_prints_the_same(python: str, tmp_path: Path) -> None:
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "tabulate", "capstone"], check=True)
    for words in COMMANDS:
        assert output(str(interpreter), words) == output(sys.executable, words), words
