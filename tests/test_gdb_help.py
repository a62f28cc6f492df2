"""The help that GDB shows is that of the verbs as they are declared.

After a change of a verb: VTDBG_UPDATE_GOLDEN=1 pytest tests/test_gdb_help.py writes the file that the plugin reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
from lab_amd import build
from support.live import PATIENCE, had

import vtdbg
from vtdbg.commands import registry
from vtdbg.commands.gdbhelp import help_texts
from vtdbg.targets.start import gdb_arguments, gdb_environment, plugin_file

FILE = Path(__file__).parent.parent / "gdb_plugin" / "vtdbg_gdb" / "help.json"


def test_help_is_that_of_the_verbs() -> None:
    """Sourcing the plugin reads texts from a file instead of importing every verb: they must be the declared ones."""
    texts = help_texts()
    if os.environ.get("VTDBG_UPDATE_GOLDEN"):
        FILE.write_text(json.dumps(texts, indent=0) + "\n")
    assert json.loads(FILE.read_text()) == texts, "a verb has changed: VTDBG_UPDATE_GOLDEN=1 pytest tests/test_gdb_help.py"


def test_help_is_complete_and_readable() -> None:
    """Every verb with its arguments and options, ASCII, no line wider than a terminal, the first line short enough for GDB's lists."""
    texts = help_texts()
    for found in registry.all_verbs():
        text = texts[found.name]
        for word in [*(item.name.upper() for item in found.arguments), *(item.flag for item in found.options)]:
            assert word in text, (found.name, word)
        first, *others = text.splitlines()
        assert text.isascii() and len(first) <= 110 and max(map(len, others)) <= 90, found.name
        assert text.startswith(found.summary[:1].upper() + found.summary[1:] + ".\n\nUsage: vt " + found.name)


def gdb(*commands: str) -> "list[str]":
    """What a GDB with the plugin and no target prints for each command."""
    words = [word for command in commands for word in ("-ex", command, "-ex", "echo \\n====\\n")]
    done = subprocess.run(gdb_arguments(["-q", "-nx", "-batch", "-ex", "set width 0", *words]), env=gdb_environment(), capture_output=True, text=True,
                          timeout=PATIENCE, check=False)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    return done.stdout.split("\n====\n")[:-1]


@pytest.fixture(scope="module")
def real() -> Iterator[None]:
    had("gdb", lambda: build.require("gdb"))
    yield


@pytest.mark.live
def test_help_of_every_verb_in_gdb(real: None) -> None:
    """`help vmcs dump` is that verb's, not its group's; the same under `vt`, where `exit` and `source` are to be had."""
    texts = help_texts()
    shown = gdb(*(f"help vt {name}" for name in texts))
    for (name, text), found in zip(texts.items(), shown):
        below = [other for other in texts if other.startswith(name + " ")]
        assert found.strip() == text.strip() or (below and found.strip().startswith(text.strip())), name
    vmcs, explain, group, everything = gdb("help vmcs dump", "help vt exit explain", "help vmcs", "help vt")
    assert vmcs.strip() == texts["vmcs dump"] and explain.strip() == texts["exit explain"]
    for found in registry.verbs_of("vmcs"):
        assert f"\n{found.name} -- " in group
    for name in registry.GROUPS:
        assert f"\nvt {name} -- " in everything


@pytest.mark.live
def test_words_of_gdb_stay_gdbs(real: None) -> None:
    """`exit` and `source` are GDB's commands, with the plugin or without; vtdbg's are below `vt`."""
    leave, read, ours, lists = gdb("help exit", "help source", "help vt source info", "vt exit")
    assert "Exit gdb" in leave and "Read commands from a file" in read and "vt source info" in ours
    assert "exit explain" in lists and "exit trace" in lists


COMPLETIONS = {
    "vmcs d": ["vmcs diff", "vmcs dump"], "vt exit e": ["vt exit explain"], "vt np": ["vt npt"], "vmcs get GUEST_RI": ["vmcs get GUEST_RIP"],
    "vt vmcs get GUEST_RI": ["vt vmcs get GUEST_RIP"], "vmcs get GUEST_RIP GUEST_RS": ["vmcs get GUEST_RIP GUEST_RSP"],
    "vmcb get cs.l": ["vmcb get cs.limit"], "decode cr": ["decode cr0", "decode cr3", "decode cr4", "decode cr8"],
    "vmcs dump --vm": ["vmcs dump --vmread"], "phys 0x1000 --gu": ["phys 0x1000 --guest"], "vmcs layout l": ["vmcs layout learn"], "vmcs nothing": [],
}


@pytest.mark.live
def test_completion(real: None) -> None:
    """Verbs, options, field names and registers."""
    shown = gdb(*(f"complete {typed}" for typed in COMPLETIONS))
    assert {typed: found.splitlines() for typed, found in zip(COMPLETIONS, shown)} == COMPLETIONS


@pytest.mark.live
def test_a_wrong_verb_has_suggestions(real: None) -> None:
    done = subprocess.run(gdb_arguments(["-q", "-nx", "-batch", "-ex", "vmcs dmup"]), env=gdb_environment(), capture_output=True, text=True,
                          timeout=PATIENCE, check=False)
    assert done.stderr.strip() == "vt: unknown vmcs command 'dmup'; did you mean dump?"


@pytest.mark.live
def test_installed_apart_from_its_dependencies(real: None, tmp_path: Path) -> None:
    """No environment lies beside the packages: GDB's Python gets the folder that this Python has tabulate from, whose 0.10 is a package."""
    for name, place in (("vtdbg", Path(vtdbg.__file__).parent), ("vtdbg_gdb", Path(plugin_file()).parent)):
        (tmp_path / name).symlink_to(place)
    done = subprocess.run([sys.executable, "-m", "vtdbg", "gdb", "-q", "-nx", "-batch", "-ex", "vt exit explain --reason 48"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "EPT_VIOLATION" in done.stdout and done.stderr == "", done
