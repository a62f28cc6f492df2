"""The command line: statuses, one-line errors, options in any place, the same words in every form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import List, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.live import PATIENCE

from vtdbg.commands import registry
from vtdbg.errors import UsageError
from vtdbg.numbers import parse_number, parse_range, size_text


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def vtdbg(*words: object, **environment: str) -> Ran:
    """The real program in a process of its own, without a terminal."""
    variables = {**{key: value for key, value in os.environ.items() if key not in ("VTDBG_SOURCE", "COLUMNS")}, **environment}
    done = subprocess.run([sys.executable, "-m", "vtdbg", *map(str, words)], capture_output=True, text=True, env=variables, timeout=PATIENCE)
    return Ran(done.returncode, done.stdout, done.stderr)


def refused(*words: object) -> str:
    """The one line of a command that refuses its input."""
    ran = vtdbg(*words)
    assert ran.status == 2, ran
    assert ran.out == ""
    assert ran.err.count("\n") == 1 and ran.err.startswith("vtdbg: "), ran.err
    assert "Traceback" not in ran.err and ran.err.isascii()
    return ran.err


def test_every_verb_has_help_and_every_group_lists_its_verbs() -> None:
    for verb in registry.all_verbs():
        text = registry.usage(verb)
        assert verb.name in text and verb.summary
        for option in verb.options:
            assert option.flag in text and option.help
    overview = vtdbg("--help")
    assert overview.status == 0
    for group in registry.GROUPS:
        assert f"  {group} " in overview.out
    listed = vtdbg("vmcs")
    assert listed.status == 0 and "vmcs dump" in listed.out
    assert vtdbg("vmcs", "dump", "--help").status == 0


def test_help_fits_a_terminal_and_explains_one_word_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns are what a terminal has at least.  `decode` is a group and its only verb: its --help is the verb's, not a list that names itself."""
    monkeypatch.setenv("COLUMNS", "80")
    registry.parser_for.cache_clear()
    for verb in registry.all_verbs():
        assert max(map(len, registry.usage(verb).splitlines())) <= 80, verb.name
    for group in registry.GROUPS:
        assert max(map(len, vtdbg(group, "--help").out.splitlines())) <= 80, group
    assert max(map(len, vtdbg().out.splitlines())) <= 80
    for word in ("decode", "report", "phys", "where", "cpuid"):
        assert vtdbg(word, "--help").out == vtdbg("help", word).out == registry.usage(registry.find_verb([word])[0]), word


def test_a_source_by_option_before_or_after_the_verb_or_by_variable(intel_plain: Path) -> None:
    after = vtdbg("vmcs", "list", "-s", intel_plain)
    before = vtdbg("-s", intel_plain, "vmcs", "list")
    variable = vtdbg("vmcs", "list", VTDBG_SOURCE=str(intel_plain))
    assert after.status == 0 and after.out == before.out == variable.out
    assert "0x6826000" in after.out


def test_without_a_source_the_way_to_name_one_is_said() -> None:
    assert "-s" in refused("vmcs", "list")


@pytest.mark.parametrize(("words", "said"), [
    (["vmsc", "list"], "did you mean vmcs"),
    (["vmcs", "lsit"], "did you mean list"),
    (["vmcs", "get", "GUEST_RPI"], "did you mean GUEST_RIP"),
    (["vmcs", "dump", "0x6826010"], "not 4 KiB aligned"),
    (["vmcs", "dump", "0x40000000"], "0x40000000"),
    (["vmcs", "dump", "deadbeef"], "write 0xdeadbeef"),
    (["vmcs", "dump", "zzz"], "is not a number"),
    (["vmcs", "dump", "0x6826000", "--layout", "bochs_27"], "did you mean bochs_2.7"),
    (["vmcs", "dump", "0x1000"], "0x1000"),
    (["ept", "walk", "0x1000", "--eptp", "0x1000", "--access", "q"], "q"),
    (["ept", "walk"], "required: GPA"),
    (["vmcb", "dump", "0x123"], "not 4 KiB aligned"),
    (["vmcb", "get", "ripp"], "did you mean"),
    (["vmcs", "list", "--format", "elff"], "did you mean elf"),
])
def test_bad_input_is_one_line_that_says_what_and_where(intel_plain: Path, words: List[str], said: str) -> None:
    assert said in refused(*words, "-s", intel_plain)


def test_bad_files_are_one_line(tmp_path: Path, intel_plain: Path) -> None:
    empty, prose, cut = tmp_path / "empty", tmp_path / "notes.txt", tmp_path / "cut.elf"
    empty.write_bytes(b"")
    prose.write_text("VMLAUNCH fails with error 7 and I do not know why.\n" * 200)
    cut.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x04\x00")
    assert "empty" in refused("vmcs", "list", "-s", empty)
    assert "notes.txt" in refused("vmcs", "list", "-s", prose)
    assert "cut.elf" in refused("vmcs", "list", "-s", cut)
    assert "nowhere" in refused("vmcs", "list", "-s", tmp_path / "nowhere")
    assert refused("vmcs", "list", "-s", tmp_path)
    layout = tmp_path / "mine.json"
    layout.write_text("{")
    assert "mine.json" in refused("vmcs", "dump", "0x6826000", "-s", intel_plain, "--layout", layout)


def test_json_has_a_schema_and_addresses_as_hex_strings(intel_plain: Path) -> None:
    data = json.loads(vtdbg("vmcs", "get", "GUEST_RIP", "--at", "0x6826000", "-s", intel_plain, "--json").out)
    assert data["schema"] == 1 and data["command"] == "vmcs get"
    field = data["vmcs"][0]["fields"][0]
    assert field["name"] == "GUEST_RIP" and field["value"] == "0x000000000001009d"
    assert "offset 0x" in field["source"] and "bochs_2.7" in field["source"]


@pytest.mark.parametrize("words", [["vmcs", "dump", "0x6826000"], ["vmcs", "list"], ["ept", "walk", "0x1000", "--vmcs", "0x6826000"],
                                   ["gva", "walk", "0x1000", "--vmcs", "0x6826000"], ["source", "info"], ["vmcs", "get", "GUEST_RIP"]])
def test_the_python_of_a_command_runs(intel_plain: Path, tmp_path: Path, words: List[str]) -> None:
    """--python prints a program; it has to be one, and to see the same memory."""
    shown = vtdbg(*words, "-s", intel_plain, "--python")
    assert shown.status == 0 and shown.out.startswith("import vtdbg\n")
    done = subprocess.run([sys.executable, "-W", "error", "-c", shown.out], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_colour_only_on_request_or_a_terminal(intel_plain: Path) -> None:
    words = ["vmcs", "dump", "0x6826000", "-s", intel_plain]
    assert "\x1b" not in vtdbg(*words).out
    assert "\x1b[2m" in vtdbg(*words, "--color", "always").out


def test_output_is_ascii_and_fits_80_columns(intel_plain: Path) -> None:
    """Debugger consoles: 80 columns, no other characters.  A single long word may stick out."""
    for words in (["vmcs", "dump"], ["vmcs", "list"], ["ept", "walk", "0x1000"], ["source", "info"], ["vmcs", "layouts"], ["exit", "explain"],
                  ["gva", "walk", "0x1000", "--vmcs", "0x6826000"]):
        out = vtdbg(*words, "-s", intel_plain, "--width", "80").out
        assert out.isascii() and out
        assert [line for line in out.splitlines() if len(line) > 80] == [], words


def test_a_reader_that_goes_away_is_not_an_error(intel_plain: Path) -> None:
    line = f"{sys.executable} -m vtdbg vmcs dump -s {intel_plain} | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == ""


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Inside GDB and WinDbg the import is paid at every start."""
    code = "import sys, vtdbg; print(sorted({'capstone', 'tabulate', 'pygdbmi', 'json', 'csv', 'argparse', 'mmap'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("text", "number"), [
    ("0x1000", 0x1000), ("4096", 4096), ("0b101", 5), ("1000h", 0x1000), ("fffff800`12345678", 0xFFFFF80012345678), ("0000", 0), ("1_000", 1000)])
def test_numbers_as_people_write_them(text: str, number: int) -> None:
    assert parse_number(text) == number


@given(st.text("0123456789abcdefxXhHoOb_`+-", max_size=12))
def test_any_text_is_a_number_or_one_error(text: str) -> None:
    try:
        assert isinstance(parse_number(text), int)
    except UsageError as error:
        assert "\n" not in str(error)


def test_ranges_and_sizes() -> None:
    assert parse_range("0x1000-0x3000") == (0x1000, 0x3000)
    assert parse_range("0x1000+8k") == (0x1000, 0x3000)
    assert parse_range("0x1000") == (0x1000, 0x2000)
    with pytest.raises(UsageError, match="ends before"):
        parse_range("0x3000-0x1000")
    assert size_text(1 << 21) == "2 MiB" and size_text(123) == "123 bytes" and size_text(0) == "0 bytes"


def test_completion_knows_verbs_options_and_fields() -> None:
    from vtdbg.vmx import fields

    assert registry.complete([], "vm") == ["vmcb", "vmcs"]
    assert "dump" in registry.complete(["vmcs"], "d")
    assert "--layout" in registry.complete(["vmcs", "dump"], "--l")
    assert "GUEST_RIP" in registry.complete(["vmcs", "get"], "guest_r", {"field": fields.names})
    assert registry.complete(["nothing"], "x") == []
