"""What people read, word for word: the output of commands on memory of real hypervisors.

After a deliberate change: VTDBG_UPDATE_GOLDEN=1 pytest tests/test_golden.py, and read the difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict

import pytest

from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.render.text import render_text
from vtdbg.report import Report

GOLDEN = Path(__file__).parent / "golden"

COMMANDS = {
    "vmcs-list": ("intel_plain", "vmcs list"),
    "vmcs-list-nested": ("intel_nested", "vmcs list"),
    "vmcs-dump-a": ("intel_plain", "vmcs dump 0x6826000"),
    "vmcs-dump-b-guest": ("intel_plain", "vmcs dump 0x6bd9000 --group guest"),
    "vmcs-get": ("intel_plain", "vmcs get GUEST_RIP VM_EXIT_REASON GUEST_IA32_EFER"),
    "ept-walk": ("intel_plain", "ept walk 0x1000 --vmcs 0x6826000 --caps bochs-2.7-skylake-x"),
    "ept-walk-absent": ("intel_plain", "ept walk 0x1001000 --vmcs 0x6826000 --access w --caps bochs-2.7-skylake-x"),
    "ept-walk-mmio": ("intel_plain", "ept walk 0xd0000000 --vmcs 0x6826000 --caps bochs-2.7-skylake-x"),
    "ept-dump-filtered": ("intel_plain", "ept dump --vmcs 0x6826000 --flag D --size 4k --hpa 0x1e3d000-0x29c2000 --caps bochs-2.7-skylake-x"),
    "ept-find": ("intel_plain", "ept find 0x7900000 --length 4k"),
    "ept-lint": ("intel_plain", "ept lint --vmcs 0x6826000 --ram 0x0-0x12000 --caps bochs-2.7-skylake-x"),
    "ept-hooks": ("intel_plain", "ept hooks"),
    "ept-diff": ("intel_plain", "ept diff"),
    "npt-lint": ("amd_exit", "npt lint"),
    "vmcs-diff": ("intel_plain", "vmcs diff 0x6826000 0x6bd9000"),
    "ept-dump": ("intel_plain", "ept dump --vmcs 0x6826000 --caps bochs-2.7-skylake-x"),
    "ept-map": ("intel_plain", "ept map --vmcs 0x6826000 --caps bochs-2.7-skylake-x"),
    "ept-map-part": ("intel_plain", "ept map --vmcs 0x6826000 --gpa 0-0x40000 --by size"),
    "gva-walk": ("intel_plain", "gva walk 0xffff800000001000 --vmcs 0x6826000 --caps bochs-2.7-skylake-x"),
    "exit-explain": ("intel_plain", "exit explain 0x6826000"),
    "vmcb-list": ("amd_exit", "vmcb list"),
    "vmcb-dump": ("amd_exit", "vmcb dump"),
    "vmcb-get": ("amd_exit", "vmcb get rip exit_code nested_cr3 cs.attrib"),
    "npt-walk": ("amd_exit", "npt walk 0x1000"),
    "npt-walk-mmio": ("amd_exit", "npt walk 0x200000"),
    "npt-dump": ("amd_exit", "npt dump"),
    "npt-map": ("amd_exit", "npt map"),
    "gva-walk-amd": ("amd_exit", "gva walk 0xffff800000000091"),
    "source-scan-nested": ("intel_nested", "source scan"),
    "source-scan-amd": ("amd_exit", "source scan"),
    "ept-roots": ("intel_nested", "ept roots"),
    "npt-roots": ("amd_exit", "npt roots"),
    "source-info-elf": ("amd_exit", "source info"),
}


def output(source: Path, words: str) -> str:
    """The text of a command line at 80 columns, without colour."""
    session = Session()

    def render(report: Report, _options: Dict[str, Any]) -> str:
        return render_text(report, 80)

    try:
        outcome = run_words([*words.split(), "-s", str(source)], session, render)
    finally:
        session.close()
    assert not outcome.error, outcome.error
    return outcome.text


@pytest.mark.parametrize("name", COMMANDS)
def test_output(name: str, request: pytest.FixtureRequest) -> None:
    fixture, words = COMMANDS[name]
    text = output(request.getfixturevalue(fixture), words)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("VTDBG_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(COMMANDS)
