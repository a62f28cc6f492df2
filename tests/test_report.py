"""One report, several forms: what people read fits the width and is ASCII, what programs read keeps every value."""

from __future__ import annotations

import io
import json
import re

from hypothesis import given
from hypothesis import strategies as st

from vtdbg.render.text import render_json, render_text, wants_colour
from vtdbg.report import Group, Lines, Pairs, Report, Table, Value, hexa, text

words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
sentences = st.lists(words, min_size=1, max_size=30).map(" ".join)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def sample(meaning: str) -> Report:
    table = Table("fields", (("name", "field"), ("value", "value"), ("meaning", "meaning")), title="Guest state")
    table.add("GUEST_RIP", hexa(0x1000, 16), text(meaning, "dim"))
    table.add("GUEST_CR0", hexa(None), "")
    pairs = Pairs("facts", [("one", "first fact", hexa(1)), ("two", "second", True)])
    return Report("test", [Group("vmcs", "VMCS at 0x0", [table, pairs], {"address": "0x0"}), Lines("prose", [meaning])],
                  header="raw image", notes=["may be stale"], python=["import vtdbg"])


@given(sentences)
def test_text_keeps_to_the_width_and_loses_no_word(meaning: str) -> None:
    shown = render_text(sample(meaning), width=80)
    longest_word = max(len(word) for word in meaning.split())
    assert max(len(line) for line in shown.splitlines()) <= max(80, 40 + longest_word)
    squeezed = "".join(shown.split())
    assert "".join(meaning.split()) in squeezed or all(word in shown for word in meaning.split())
    assert shown.isascii() and shown.endswith("\n") and "\x1b" not in shown


@given(sentences)
def test_colour_changes_nothing_but_colour(meaning: str) -> None:
    plain, coloured = render_text(sample(meaning), 80), render_text(sample(meaning), 80, colour=True)
    assert "\x1b[2m" in coloured
    assert [line.rstrip() for line in ANSI.sub("", coloured).splitlines()] == plain.splitlines()


def test_json_has_the_schema_the_groups_as_lists_and_numbers_as_hex_strings() -> None:
    data = json.loads(render_json(sample("a b")))
    assert data["schema"] == 1 and data["command"] == "test" and data["notes"] == ["may be stale"]
    assert data["vmcs"][0]["address"] == "0x0"
    assert data["vmcs"][0]["fields"] == [{"name": "GUEST_RIP", "value": "0x0000000000001000", "meaning": "a b"},
                                         {"name": "GUEST_CR0", "value": None, "meaning": ""}]
    assert data["vmcs"][0]["facts"] == {"one": "0x1", "two": True}


def test_an_unknown_value_is_not_zero() -> None:
    assert hexa(None) == Value(None, "unknown", "dim")
    assert hexa(0, 4).text == "0x0000"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_and_not_with_no_color() -> None:
    assert wants_colour(Terminal(), "auto", {})
    assert not wants_colour(Terminal(), "auto", {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), "auto", {"TERM": "dumb"})
    assert not wants_colour(io.StringIO(), "auto", {})
    assert wants_colour(io.StringIO(), "always", {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), "never", {})
