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

import vtdbg
from vtdbg.commands.field_links import rows, vmcs_links
from vtdbg.commands.registry import find_verb, parse
from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.render.dml import CHUNK, chunks, escape, render_dml
from vtdbg.render.text import render_text
from vtdbg.report import Group, Lines, Pairs, Report, Table, Value, hexa, text
from vtdbg.svm import fields as vmcb_fields
from vtdbg.vmx import fields as vmcs_fields

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


# --- links of field values --------------------------------------------------------------------------------------------------------

LINKED = {
    "intel_plain": ["vmcs dump 0x6826000", "vmcs dump 0x6bd9000", "vmcs list", "vmcs get EPT_POINTER --at 0x6826000",
                    "ept walk 0x1000 --vmcs 0x6826000", "gva walk 0xffff800000001000 --vmcs 0x6826000"],
    "amd_exit": ["vmcb dump", "vmcb list", "npt walk 0x1000", "gva walk 0xffff800000000091"],
}


def linked_cells(words: str, source: str) -> Dict[str, str]:
    """Command -> the cell that runs it, as WinDbg would get it."""
    outcome = run_words(words.split(), Session(source=source), lambda report, options: render_dml(report, 80))
    assert not outcome.error, outcome.error
    return {html.unescape(command): html.unescape(cell) for command, cell in re.findall(r'<exec cmd="vt ([^"]*)">([^<]*)</exec>', outcome.text)}


def test_every_link_names_a_field_and_a_command_that_exists() -> None:
    for (kind, match), commands in rows().items():
        fields = vmcs_fields if kind == "vmcs" else vmcb_fields
        assert match.startswith("group:") and match[6:] in fields.GROUPS or fields.find(match).name == match, match
        for command in commands:
            for word in re.findall(r"\{(.*?)\}", command):
                assert word in ("at", "value", "page", "code") or fields.find(word).name == word, command
            verb, words = find_verb(re.sub(r"\{.*?\}", "0x1000", command).split())
            parse(verb, words, Session().convert)


@pytest.mark.parametrize(("fixture", "words"), [(fixture, words) for fixture, commands in LINKED.items() for words in commands])
def test_every_link_runs(fixture: str, words: str, request: pytest.FixtureRequest) -> None:
    """What a click runs succeeds: no link leads to an error line."""
    source = str(request.getfixturevalue(fixture))
    links = linked_cells(words, source)
    assert links
    for command in links:
        outcome = run_words(command.split(), Session(source=source), lambda report, options: render_text(report, 80))
        assert outcome.status in (0, 1) and not outcome.error, f"{command}: {outcome.error}"


def test_the_fields_of_a_vmcs_lead_where_they_point(intel_plain: Path) -> None:
    """KVM's VMCS at 0x6826000: with EPT, an MSR bitmap, a guest in 64-bit mode; without I/O bitmaps, virtual APIC page, MSR areas."""
    links = linked_cells("vmcs dump 0x6826000", str(intel_plain))
    vmcs = vtdbg.Vmcs.from_page(vtdbg.open(str(intel_plain)).memory.read_page(0x6826000))
    expected = {
        f"ept dump --eptp {vmcs['EPT_POINTER']:#x}": "EPT_POINTER",
        f"msrbitmap dump --at {vmcs['MSR_BITMAP']:#x}": "MSR_BITMAP",
        f"gva walk {vmcs['GUEST_RIP']:#x} --vmcs 0x6826000": "GUEST_RIP",
        f"gva walk {vmcs['HOST_RIP']:#x} --vmcs 0x6826000 --host": "HOST_RIP",
        f"ept walk {vmcs['GUEST_CR3'] & ~0xFFF:#x} --eptp {vmcs['EPT_POINTER']:#x}": "GUEST_CR3",
        f"phys {vmcs['HOST_CR3'] & ~0xFFF:#x}": "HOST_CR3",
    }
    for command, field in expected.items():
        assert int(links[command], 16) == vmcs[field], command
    tables = {f"{kind} dump --vmcs 0x6826000{whose}" for kind in ("gdt", "idt", "tss") for whose in ("", " --host")}
    assert tables | {"exit explain 0x6826000", "page exceptions 0x6826000"} <= set(links)
    assert not [command for command in links if command.startswith(("iobitmap", "page vapic", "page msrs", "vmcs dump"))]


def test_the_fields_of_a_vmcb_lead_where_they_point(amd_exit: Path) -> None:
    links = linked_cells("vmcb dump", str(amd_exit))
    machine = vtdbg.open(str(amd_exit))
    (at,) = {int(command.split()[-1], 16) for command in links if command.startswith("gdt dump")}
    vmcb = vtdbg.Vmcb.from_page(machine.memory.read_page(at))
    for command, field in ((f"npt dump --ncr3 {vmcb['nested_cr3']:#x}", "nested_cr3"),
                           (f"msrbitmap dump --at {vmcb['msrpm_base_pa']:#x} --svm", "msrpm_base_pa"),
                           (f"gva walk {vmcb['rip']:#x} --vmcb {at:#x}", "rip"),
                           (f"npt walk {vmcb['cr3'] & ~0xFFF:#x} --ncr3 {vmcb['nested_cr3']:#x}", "cr3")):
        assert int(links[command], 16) == vmcb[field], command
    assert f"exit explain {at:#x} --vmcb" in links


def test_addresses_that_are_not_of_this_memory_are_no_links(intel_nested: Path, intel_nested_truth: Dict[str, Any], tmp_path: Path) -> None:
    """A log is of another machine; what a nested hypervisor wrote into its VMCS is physical in its own guest."""
    machine = vtdbg.open(str(intel_nested))
    nested = [found.address for found in vtdbg.scan(machine) if found.classification == "kvm-vmcs12"]
    assert nested
    for address in nested:
        assert linked_cells(f"vmcs dump {address:#x}", str(intel_nested)) == {}
    log = tmp_path / "log"
    log.write_text("*** Guest State ***\nCR0: actual=0x0000000080050033, shadow=0x0, gh_mask=0\nCR3 = 0x0000000001000000\n"
                   "*** Control State ***\nEPT pointer = 0x000000000685105e\n")
    assert linked_cells(f"vmcs dump --text {log}", str(intel_nested)) == {}


@pytest.mark.parametrize(("rights", "entry", "linear"), [(0xA09B, 1 << 9, 0xFFFFFFFF81000010), (0xC09B, 0, 0x1000010), (0x9B, 0, 0x1000010)])
def test_the_code_of_a_guest_is_at_the_base_of_cs_outside_64_bit_mode(rights: int, entry: int, linear: int) -> None:
    """In 64-bit mode the base of CS counts as 0; elsewhere linear addresses wrap at 4 GiB."""
    rip = 0xFFFFFFFF81000010 if entry else 0x81000010
    vmcs = vtdbg.Vmcs.from_values({"GUEST_RIP": rip, "GUEST_CS_BASE": 0x80000000, "GUEST_CS_AR_BYTES": rights, "VM_ENTRY_CONTROLS": entry | 0x11FB})
    assert vmcs_links(vmcs, 0x5000)("GUEST_RIP", "guest-register", rip) == f"gva walk {linear:#x} --vmcs 0x5000"
    assert vmcs_links(vmcs, None)("GUEST_RIP", "guest-register", rip) == ""


def test_a_pointer_that_counts_for_nothing_is_no_link() -> None:
    """No EPT: CR3 is a physical address of the host's memory; a link pointer of all ones is none (SDM vol. 3, VMCS Link Pointer)."""
    without = {"GUEST_CR3": 0x5018, "EPT_POINTER": 0x685105E, "CPU_BASED_VM_EXEC_CONTROL": 0, "VMCS_LINK_POINTER": (1 << 64) - 1}
    vmcs = vtdbg.Vmcs.from_values(without)
    assert vmcs_links(vmcs, 0x5000)("GUEST_CR3", "guest-register", 0x5018) == "phys 0x5000"
    assert vmcs_links(vmcs, 0x5000)("VMCS_LINK_POINTER", "guest-non-register", (1 << 64) - 1) == ""
    assert vmcs_links(vmcs, 0x5000)("VMCS_LINK_POINTER", "guest-non-register", 0x7000) == "vmcs dump 0x7000"


def test_links_carry_the_options_that_they_need() -> None:
    """A click on a report of another source, or of pages by a forced layout, looks at the same; a path with blanks is one word."""
    report = Report("x", [Lines("l", [text("here", link="phys 0x1000")])])
    assert 'cmd="vt phys 0x1000 -s &quot;C:\\a b&quot;"' in render_dml(report, suffix='-s "C:\\a b"')


def test_other_characters_become_question_marks() -> None:
    assert render_dml(Report("x", [Lines("l", ["caf\u00e9 \u2192"])])) == "caf? ?\n"
