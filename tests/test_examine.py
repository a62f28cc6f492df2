"""`phys ADDR FMT`: GDB's `x` formats on memory that is known; what GDB itself prints is compared in test_gdb_live.py."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import memory_from_segments
from vtdbg.commands.run import Outcome, run_words
from vtdbg.commands.session import Session
from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.examine import LETTERS, SIZES, code, parse_format, rows
from vtdbg.machine import Cpu, Machine
from vtdbg.memory.base import PhysicalMemory
from vtdbg.render.text import render_text
from vtdbg.report import Report

FLAT64 = {"cr0": 0x80000011, "efer": 0xD00}
REAL = {"cr0": 0x10, "efer": 0}
COMPATIBILITY = {"cr0": 0x80000011, "efer": 0xD00, "cs_attributes": 0xC09B}


def run(memory: PhysicalMemory, *words: str, registers: "Dict[str, int] | None" = None) -> Outcome:
    machine = Machine(memory, "made", "test", cpus=[] if registers is None else [Cpu(0, registers)])

    def render(report: Report, _options: Dict[str, Any]) -> str:
        return render_text(report, 80)

    return run_words(["phys", *words], Session(_machine=machine), render)


def test_letters_and_sizes_in_any_order() -> None:
    assert parse_format("8gx") == parse_format("/8gx") == parse_format("8xg")
    assert (parse_format("s").size, parse_format("a").size, parse_format("d").size, parse_format("4").letter) == ("b", "g", "w", "x")


@pytest.mark.parametrize("text", ["", "/", "8q", "xd", "bg", "0x", "-3x", "99999999x", "3x4", "gs", "8 x", "x" * 3 + "?"])
def test_what_is_no_format_is_one_line_with_what_there_is(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_format(text)
    assert "\n" not in str(raised.value) and repr(text) in str(raised.value)


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=8, max_size=256), st.sampled_from("xzduota"), st.sampled_from("bhwg"))
def test_numbers_are_those_of_the_bytes(data: bytes, letter: str, size: str) -> None:
    """Whatever the base, the number is the little-endian one of struct; rows follow each other without a gap."""
    width = SIZES[size]
    count = len(data) // width
    found = rows(memory_from_segments([(0x1000, data)]), 0x1000, parse_format(f"{count}{letter}{size}"))
    kind = {"b": "b", "h": "h", "w": "i", "g": "q"}[size]
    wanted = struct.unpack(f"<{count}{kind}", data[:count * width])
    base = {"x": 16, "z": 16, "o": 8, "t": 2, "a": 16}.get(letter, 10)
    at = 0x1000
    numbers = []
    for row in found:
        assert row.address == at and len(" " * 14 + "  ".join(row.texts)) <= 80
        at += len(row.texts) * width
        numbers += [int(words.strip().lstrip("0") or "0", 8) if base == 8 else int(words, base) for words in row.texts]
    mask = (1 << 64) - 1 if letter == "a" else (1 << 8 * width) - 1
    assert [number & mask for number in numbers] == [number & mask for number in wanted]


@settings(deadline=None, max_examples=60)
@given(st.floats(width=32), st.floats())
def test_floats_read_back(single: float, double: float) -> None:
    """Enough digits are printed that the same number comes back."""
    for form, value, size in (("<f", single, "w"), ("<d", double, "g")):
        data = struct.pack(form, value)
        words = rows(memory_from_segments([(0, data)]), 0, parse_format(f"f{size}"))[0].texts[0]
        if value == value:
            assert struct.pack(form, float(words)) == data
        else:
            assert "nan(" in words


def test_strings_follow_each_other_and_end_where_memory_ends() -> None:
    memory = memory_from_segments([(0xFF0, b'a"\\\x80\n\0' + b"second\0" + b"end")])
    found = rows(memory, 0xFF0, parse_format("5s"))
    assert [row.texts[0] for row in found[:2]] == ['"a\\"\\\\\\200\\n"', '"second"']
    assert found[2].address == 0xFFD and found[2].texts[0] == '"end" <not in this memory>' and len(found) == 3
    wide = memory_from_segments([(0, "h\u00e9\u20ac".encode("utf-16-le") + bytes(4000))])
    assert rows(wide, 0, parse_format("sh"))[0].texts == ('u"h\\351\\u20ac"',)
    endless = rows(memory_from_segments([(0, b"x" * 4096)]), 0, parse_format("2s"))
    assert [(row.address, len(row.texts[0])) for row in endless] == [(0, 205), (200, 205)]


def test_instructions_in_the_mode_of_the_processor() -> None:
    """48 is a prefix in 64-bit code and an instruction (DEC) elsewhere; real mode has 16-bit registers."""
    memory = memory_from_segments([(0x1000, bytes.fromhex("4889c890") + b"\xcc" * 60)])
    for registers, options, wanted in ((FLAT64, (), "mov rax, rcx"), (REAL, (), "dec ax"), (COMPATIBILITY, (), "dec eax"),
                                       (FLAT64, ("--bits", "16"), "dec ax")):
        text = run(memory, "0x1000", "2i", *options, registers=registers).text
        assert wanted in text and "not known" not in text, text
    text = run(memory, "0x1000", "/2i").text
    assert "mov rax, rcx" in text and "the mode of the processor is not known: shown as 64-bit code" in " ".join(text.split())


def test_code_ends_where_memory_ends() -> None:
    """An instruction whose bytes are not all there is not made up; one that nobody knows is one byte."""
    memory = memory_from_segments([(0x1FE0, bytes.fromhex("0690") + b"\x90" * 29 + bytes.fromhex("e80000"))])
    found = list(code(memory, 0x1FE0, 99, 64))
    assert [text for _, _, text in found[:2]] == ["(bad)", "nop"] and "goes on where it cannot be read" in found[-1][2] and len(found) == 32
    with pytest.raises(MemoryUnavailable):
        list(code(memory_from_segments([(0, b"\x90")]), 0x5000, 1, 64))


def test_the_slash_in_front_and_what_excludes_each_other() -> None:
    memory = memory_from_segments([(0x1000, bytes(range(64)))])
    assert run(memory, "/4xw", "0x1000").text == run(memory, "0x1000", "4wx").text
    report = json.loads(run(memory, "0x1000", "2xg", "--json").text)
    assert report["rows"] == [{"address": "0x1000", "values": ["0x0706050403020100", "0x0f0e0d0c0b0a0908"]}]
    for words, said in ((("/8x",), "where?"), (("0x1000", "8x", "--length", "4"), "one of --length"), (("0x1000", "4yb"), "'y' is no format"),
                        (("0x1000", "8x", "--bits", "16"), "for instructions"), (("0x1000", "--bits", "16"), "for instructions")):
        assert said in run(memory, *words).error, words


def test_every_letter_and_size_prints() -> None:
    memory = memory_from_segments([(0, bytes(range(256)))])
    for letter in LETTERS:
        for size in SIZES:
            outcome = run(memory, "0x10", f"3{letter}{size}", registers=FLAT64)
            assert (letter + size == "sg") is bool(outcome.error) and outcome.text.isascii(), (letter, size, outcome.error)


def test_capstone_is_not_imported_for_numbers(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(8192))
    words = ["phys", "0x0", "4x", "-s", str(tmp_path / "ram")]
    program = f"import sys; from vtdbg.cli import main; main({words!r}); sys.exit('capstone' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
