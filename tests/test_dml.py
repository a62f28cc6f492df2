"""Output for WinDbg: what is visible is the plain text, links run commands, and no piece is longer than the engine keeps."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import COMMANDS

from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.render.dml import CHUNK, chunks, escape, render_dml
from vtdbg.render.text import render_text
from vtdbg.report import Group, Lines, Pairs, Report, Table, Value, hexa, text

ENGINE_LIMIT = 16383
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).map(str.strip)


def visible(dml: str) -> str:
    """What a window shows: tags away, entities as characters (DML's four are HTML's)."""
    return html.unescape(re.sub(r"<[^>]*>", "", dml))


def sample() -> Report:
    report = Report("x", header='memory of <a> & "b"', notes=["stale <now>"])
    table = Table("rows", (("a", "addr<ess>"), ("b", "meaning")), title="Title & more", wrap="b")
    table.add(hexa(0x1000, 9, link='ept walk 0x1000 --vmcs "0x2000"'), Value(None, "a <b> & c " * 20, "bad"))
    table.add(hexa(0x2000, 9, "dim", link="phys 0x2000"), text("fine", "good"))
    report.add(Group("g", "Group <1>", [table, Pairs("p", [("k", "label <", text("x > y", "strong"))]), Lines("l", ["plain & simple"])]))
    return report


def test_the_visible_text_is_the_plain_text() -> None:
    assert visible(render_dml(sample())) == render_text(sample())


def test_links_run_the_alias_with_the_command_escaped() -> None:
    dml = render_dml(sample(), prefix="vt")
    assert '<exec cmd="vt ept walk 0x1000 --vmcs &quot;0x2000&quot;">0x000001000</exec>' in dml
    assert '<col fg="subfg"><exec cmd="vt phys 0x2000">0x000002000</exec></col>' in dml
    assert '<exec cmd="!py -m vtdbg_windbg phys 0x2000">' in render_dml(sample(), prefix="!py -m vtdbg_windbg")


def test_nothing_but_our_own_tags_is_in_it() -> None:
    """Text that looks like a tag is data: a name out of a dump must not become a link."""
    evil = Report("x", [Lines("l", ['<exec cmd="q">click</exec>', text('<link cmd="x">', "bad", '"><exec cmd="q">')])])
    tags = re.findall(r"<[^>]*>", render_dml(evil))
    assert [tag for tag in tags if not re.fullmatch(r'<col fg="\w+">|</col>|<exec cmd="vt [^"<>]*">|</exec>', tag)] == []
    assert len([tag for tag in tags if tag.startswith("<exec")]) == 1


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(ASCII, ASCII, st.sampled_from(["", "dim", "good", "bad", "warn", "strong"])), max_size=6), st.integers(40, 120))
def test_any_text_survives(rows: List[Any], width: int) -> None:
    report = Report("x", header="h")
    table = Table("t", (("a", "A"), ("b", "B")))
    for words, link, style in rows:
        table.add(Value(words, words, style, link), text(link, style))
    report.add(table)
    dml = render_dml(report, width)
    assert visible(dml) == render_text(report, width)
    assert dml.isascii()


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("source")])
def test_every_golden_output_as_dml(name: str, request: pytest.FixtureRequest) -> None:
    fixture, words = COMMANDS[name]
    path: Path = request.getfixturevalue(fixture)
    session = Session()
    shown: Dict[str, str] = {}

    def render(report: Report, _options: Dict[str, Any]) -> str:
        shown["text"], shown["dml"] = render_text(report, 80), render_dml(report, 80)
        return shown["dml"]

    try:
        outcome = run_words([*words.split(), "-s", str(path)], session, render)
    finally:
        session.close()
    assert not outcome.error
    assert visible(shown["dml"]) == shown["text"]
    for command in re.findall(r'<exec cmd="vt ([^"]*)">', shown["dml"]):
        assert run_words([*command.split(), "--help"], Session(), render).error == "", command


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(st.sampled_from("abc <>&;\""), max_size=80), max_size=20), st.integers(60, 200))
def test_chunks_lose_nothing_and_cut_no_tag(lines: List[str], limit: int) -> None:
    words = "".join(f'<exec cmd="{escape(line[:8])}">{escape(line[:8])}</exec>{escape(line[8:])}\n' for line in lines)
    pieces = list(chunks(words, limit=max(limit, 140), dml=True))
    assert "".join(pieces) == words
    for piece in pieces:
        assert len(piece) <= max(limit, 140)
        assert piece.count("<exec ") == piece.count("</exec>")
        assert re.search(r"&[a-z]*$", piece) is None


def test_chunks_of_plain_text() -> None:
    words = "x" * 50000 + "\n" + "line\n" * 20000
    pieces = list(chunks(words))
    assert "".join(pieces) == words and max(map(len, pieces)) <= CHUNK < ENGINE_LIMIT
    assert all(piece.endswith("\n") for piece in pieces[4:])
    assert list(chunks("")) == []


def test_other_characters_become_question_marks() -> None:
    assert render_dml(Report("x", [Lines("l", ["caf\u00e9 \u2192"])])) == "caf? ?\n"
