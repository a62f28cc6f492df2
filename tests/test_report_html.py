"""The report page: the words of the commands, inert whatever the dump holds, and usable in a real browser by keyboard, mouse and on paper."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.browser import Browser
from support.live import had
from support.tables import G1, K4, TableBuilder
from test_hierarchy import three_levels
from test_nested_verbs import FRAME, HOOKED, ORIGINAL, PATCHED, image, pages_of, switching, view, vmcs_page

from vtdbg.address_map import address_map
from vtdbg.commands.report_page import ReportPage
from vtdbg.commands.run import Outcome, run_words
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration, Range
from vtdbg.memory.open import open_machine
from vtdbg.render.html import HtmlRenderer, embedded, page, render_html
from vtdbg.render.pictures import exact_ranges, map_data, msr_data, msr_names
from vtdbg.render.text import render_text
from vtdbg.report import Group, Lines, Pairs, Report, Table, Value
from vtdbg.svm.bitmaps import MsrPermissionMap
from vtdbg.vmx.bitmaps import MsrBitmap
from vtdbg.vmx.ept import Ept, ept_walk
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.permission import READ, WRITE

VM_A, EPTP_A = 0x6826000, 0x685105E
VOID = {"meta", "link", "br", "input"}
HOSTILE_NAME = "<img src=x onerror=document.title='owned'><script>window.owned=1<!--&amp;\"'.raw"


class Parsed(HTMLParser):
    """Elements, ids, links and text of a page; raises where elements are not nested as they have to be."""

    def __init__(self, words: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.text: List[str] = []
        self.scripts: List[str] = []
        self._open: List[str] = []
        self.feed(words)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not (self._open and self._open[-1] == "style"):
            self.text.append(data)

    def values(self, name: str) -> List[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def command(words: List[str]) -> Outcome:
    session = Session()
    try:
        return run_words(words, session, lambda report, _: render_text(report, 80))
    finally:
        session.close()


def written(source: Path, out: Path, *options: str) -> str:
    outcome = command(["report", str(out), "-s", str(source), *options])
    assert not outcome.error, outcome.error
    return out.read_text("ascii")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def nested_page(intel_nested: Path, folder: Path) -> Path:
    written(intel_nested, folder / "nested.html")
    return folder / "nested.html"


@pytest.fixture(scope="module")
def plain_page(intel_plain: Path, folder: Path) -> Path:
    written(intel_plain, folder / "plain.html")
    return folder / "plain.html"


@pytest.fixture(scope="module")
def amd_page(amd_exit: Path, folder: Path) -> Path:
    written(amd_exit, folder / "amd.html")
    return folder / "amd.html"


@pytest.fixture(scope="module")
def hooked(intel_plain: Path, folder: Path) -> Path:
    """VM A with an execute-only page, a page without execute and far, large pages, in a file with a hostile name."""
    path = folder / HOSTILE_NAME
    shutil.copyfile(intel_plain, path)
    machine = open_machine(intel_plain)
    with machine.memory as memory:
        steps = [ept_walk(memory, EPTP_A, gpa).steps for gpa in (0x1000, 0x2000)]
    changes = {steps[0][-1].address: (steps[0][-1].entry or 0) & ~3, steps[1][-1].address: (steps[1][-1].entry or 0) & ~4}
    pdpt = steps[0][1].address
    assert pdpt is not None
    # 64 pages of 1 GiB, write-back, from 64 GiB on.
    changes.update({pdpt + 8 * index: (index << 30 & 0x7FFFFFFFFF) | 0xB7 for index in range(64, 128)})
    with open(path, "r+b") as file:
        for address, entry in changes.items():
            assert address is not None
            file.seek(address)
            file.write(struct.pack("<Q", entry))
    return path


@pytest.fixture(scope="module")
def values(intel_plain: Path) -> Dict[int, int]:
    with open_machine(intel_plain).memory as memory:
        return {value.field.encoding: value.value for value in Vmcs.from_page(memory.read_page(VM_A)).values()}


@pytest.fixture(scope="module")
def switched_page(values: Dict[int, int], folder: Path) -> Path:
    """A guest with two views in its EPTP list: the second one runs another frame."""
    plain, hooking = view(0xA00000), view(0xB00000, (FRAME, 4))
    listed = struct.pack("<2Q", plain.root | 0x1E, hooking.root | 0x1E) + bytes(K4 - 16)
    path = image(folder / "switched.raw", *pages_of(plain, hooking), (HOOKED, ORIGINAL), (FRAME, PATCHED), (0xC00000, listed),
                 (0xC01000, switching(values, plain.root | 0x1E, 0xC00000)), (0xC02000, bytes(K4)))
    written(path, folder / "switched.html", "--format", "raw")
    return folder / "switched.html"


def scattered() -> TableBuilder:
    """6000 pages, every second address, each to a frame of its own; a misconfigured one; far from them a page of 1 GiB."""
    builder = TableBuilder(base=0x1000000)
    for number in range(6000):
        at, _ = builder.entry_address(2 * number * K4, 1, 7)
        builder.set(at, (number * 7919 % 8192 + 16) * K4 | (6 << 3) | (7 if number % 2 else 5))
    at, _ = builder.entry_address(K4, 1, 7)
    builder.set(at, 0x32)
    builder.map(64 * G1, 0, G1, 0xB7, 7)
    return builder


@pytest.fixture(scope="module")
def scattered_page(values: Dict[int, int], folder: Path) -> Path:
    builder = scattered()
    path = image(folder / "scattered.raw", *pages_of(builder), (0x800000, vmcs_page(values, EPT_POINTER=builder.root | 0x1E)))
    written(path, folder / "scattered.html", "--format", "raw")
    return folder / "scattered.html"


@pytest.fixture(scope="module")
def hooked_page(hooked: Path, folder: Path) -> Path:
    written(hooked, folder / "hooked.html")
    return folder / "hooked.html"


# ---- the page as a file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["nested_page", "amd_page", "hooked_page"])
def test_the_page_is_well_formed_and_stands_alone(which: str, request: pytest.FixtureRequest) -> None:
    """Every id once, every link to a place on the page, nothing loaded, and a policy that allows this script and this style only."""
    content = request.getfixturevalue(which).read_text("ascii")
    found = Parsed(content)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    links = [link for link in found.values("href") if link != "data:,"]
    assert len(links) >= 5 and all(link.startswith("#") and link[1:] in ids for link in links)
    assert not found.values("src") and "style" not in {name for _, attributes in found.elements for name in attributes}
    assert [attributes.get("type") for tag, attributes in found.elements if tag == "script"] == ["application/json", None]
    policy = next(attributes["content"] or "" for tag, attributes in found.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    digest = base64.b64encode(hashlib.sha256(found.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(("fixture", "which", "words"), [
    ("plain_page", "intel_plain", "vmcs check"), ("nested_page", "intel_nested", "vmcs list"), ("plain_page", "intel_plain", "exit explain"),
    ("plain_page", "intel_plain", "vmcs dump"), ("plain_page", "intel_plain", "ept map"), ("plain_page", "intel_plain", "ept lint"),
    ("amd_page", "amd_exit", "vmcb check"),
    ("amd_page", "amd_exit", "vmcb dump"), ("amd_page", "amd_exit", "npt dump"), ("amd_page", "amd_exit", "exit explain"),
    ("amd_page", "amd_exit", "source info"), ("amd_page", "amd_exit", "msrbitmap dump")])
def test_the_page_has_the_words_of_the_commands(fixture: str, which: str, words: str, request: pytest.FixtureRequest) -> None:
    shown = Parsed(request.getfixturevalue(fixture).read_text("ascii")).words
    report = command([*words.split(), "-s", str(request.getfixturevalue(which))]).report
    assert report is not None
    wanted = list(cells(report.blocks))
    assert len(wanted) >= 7 and [line for line in wanted if " ".join(line.split()) not in shown] == []


def cells(blocks: Any) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, Group):
            yield from cells(block.blocks)
        elif isinstance(block, Table):
            for row in block.rows:
                yield from (value.text if isinstance(value, Value) else str(value) for (_, heading), value in zip(block.columns, row)
                            if heading and value is not None)
        elif isinstance(block, Pairs):
            yield from (value.text if isinstance(value, Value) else str(value) for _, _, value in block.items if not isinstance(value, bool))
        elif isinstance(block, Lines):
            yield from (value.text if isinstance(value, Value) else str(value) for value in block.lines)


def test_the_nested_guest_is_under_the_vm_whose_memory_holds_its_vmcs(nested_page: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """vmcs12 is in L1's memory, at the address where L1 has put it; vmcs02 is the one that the nested guest ran with."""
    content = nested_page.read_text("ascii")
    tree = content[content.index("<nav"):content.index("</nav>")]
    at = {name: int(words.split()[0], 16) for name, words in intel_nested_truth["nested"]["found"].items()}
    outer, inner, below = (tree.index(f"VMCS at {address:#x}<") for address in (at["vmcs01"], 0x31000, at["vmcs02"]))
    assert outer < tree.index("Hypervisor inside") < inner < below
    assert f"other-{at['shadow_vmcs']:x}" in tree and f"other-{at['cached_vmcs12']:x}" in tree


def test_an_ept_of_a_nested_hypervisor_is_drawn_in_its_vms_memory(values: Dict[int, int], folder: Path) -> None:
    """EPT12: the tables that L1 made for L2 lie in L1's memory, and so do those that L2 made for L3; pages of each are listed."""
    path = image(folder / "levels.raw", *[(at, bytes(page)) for at, page in three_levels(values).pages.items()])
    content = written(path, folder / "levels.html", "--format", "raw")
    shown = Parsed(content).words
    for pointer in (0x20001E, 0x2001E):
        assert f"Guest-physical address space through EPTP {pointer:#x}" in shown
    maps = json.loads(Parsed(content).scripts[0])["maps"]
    inner, = [item for item in maps if item["title"].endswith("EPTP 0x2001e")]
    # L2's page 7 is L1's page 9 (the frame here is guest-physical), and no command line reaches it.
    assert [piece[3] for piece in inner["pieces"] if piece[0] <= 7 < piece[0] + piece[1]] == [9] and inner["walk"] == ""
    assert "It runs inside the VM with EPTP 0x20001e" in shown


def test_hooks_between_the_views_of_a_guest_are_listed_with_their_code(switched_page: Path) -> None:
    found = Parsed(switched_page.read_text("ascii"))
    shown = found.words
    assert "Hooks: 2 places" in shown and "entry 1 of the EPTP list of the VMCS at 0xc01000" in shown and "jmp 0x206045" in shown
    hooks = json.loads(found.scripts[0])["maps"][0]["hooks"]
    assert [HOOKED // K4, 1, f"view-frame, view-rights: another table has {FRAME:#x} --x"] in hooks


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20), st.integers(0, 1 << 40), st.sampled_from([5, 7])), max_size=40))
@settings(max_examples=50, deadline=None)
def test_exact_ranges_decode_to_what_they_were(steps: List[Tuple[int, int, int, int]]) -> None:
    kind, tables = Ept(0x1E).tables.levels[-1].leaf, Ept(0x1E).tables
    assert kind is not None
    rows, end = [], 0
    for gap, pages, target, rights in steps:
        rows.append(Range((end + gap) * K4, target * K4, pages * K4, K4, rights, 0x30, kind, tables))
        end += gap + pages
    meanings: Dict[Any, int] = {}
    numbers, value, shift = [], 0, 0
    for byte in base64.b64decode(exact_ranges(rows, meanings)):
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    found, at, goes = [], 0, 0
    for gap, pages, meaning, step in zip(*[iter(numbers)] * 4):
        goes += -(step + 1) // 2 if step % 2 else step // 2
        found.append(((at + gap) * K4, goes * K4, pages * K4, str(list(meanings)[meaning].permissions)))
        at, goes = at + gap + pages, goes + pages
    assert found == [(row.start, row.target, row.length, str(row.permissions)) for row in rows]


texts = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", "--><img src=x onerror=x>", "\" onmouseover=x \"", "'", "</td></table>", "&lt;", "\x00\x1b\u202e\u2028", "]]>"])


@given(texts, texts, texts)
@settings(max_examples=100, deadline=None)
def test_any_text_is_inert_and_readable(one: str, two: str, three: str) -> None:
    table = Table("rows", (("a", one), ("b", "b")), [[Value(None, two, "bad", three), one]], title=three)
    report = Report("x", [Group("g", two, [table, Pairs("p", [("k", one, three)]), Lines("l", [one, two], bullet="- "),
                                           Lines("m", [one], verbatim=True)])], header=one, notes=[two])
    found = Parsed(render_html(report))
    assert {tag for tag, _ in found.elements} <= {"p", "b", "section", "h3", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span",
                                                  "ul", "li", "pre"}
    assert {name for _, attributes in found.elements for name in attributes} <= {"class", "scope", "title", "aria-hidden"}
    visible = "".join(letter if letter.isprintable() else " " if letter in "\n\t" else "?" for letter in two)
    assert any(visible in line for line in found.text) or not visible
    anchored = HtmlRenderer({three: "#" + one}).value(Value(None, two, "", three))
    assert {tag for tag, _ in Parsed(anchored).elements} <= {"a", "span"}


json_data = st.recursive(texts | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
                         max_leaves=8)


@given(json_data)
@settings(max_examples=100, deadline=None)
def test_embedded_data_cannot_end_its_element(data: Any) -> None:
    words = embedded(data)
    assert json.loads(words) == data and "<" not in words and ">" not in words and words.isascii()


def test_a_hostile_title_does_not_leave_the_title() -> None:
    found = Parsed(page("</title><script>1</script>", "<p>x</p>", {}).decode("ascii"))
    assert len([tag for tag, _ in found.elements if tag == "script"]) == 2 and len([tag for tag, _ in found.elements if tag == "title"]) == 1


def test_a_dump_is_not_overwritten_and_a_page_is(amd_exit: Path, folder: Path) -> None:
    """`vtdbg report DUMP -s OTHER` is one slip away."""
    victim = folder / "dump.elf"
    victim.write_bytes(b"\x7fELF precious")
    refused = command(["report", str(victim), "-s", str(amd_exit)])
    assert refused.status == 2 and "is not replaced" in refused.error and victim.read_bytes() == b"\x7fELF precious"
    again = folder / "again.html"
    assert written(amd_exit, again) == written(amd_exit, again)
    assert not [path for path in folder.iterdir() if path.name.startswith(".vtdbg-")]
    nowhere = command(["report", str(folder / "no" / "such" / "x.html"), "-s", str(amd_exit)])
    assert nowhere.status == 2 and "cannot be written" in nowhere.error and "\n" not in nowhere.error


def test_a_nested_vmcs_is_read_in_its_vms_memory_and_not_judged_by_the_processors_capabilities(intel_nested: Path, folder: Path) -> None:
    """KVM makes up the capability MSRs that a nested hypervisor reads; the processor's would give verdicts on the wrong question."""
    content = written(intel_nested, folder / "caps.html", "--caps", "bochs-2.7-skylake-x")
    inner = content[content.index('id="vmcs-2997000"'):]
    inner = inner[:inner.index('<section class="block"')]
    assert "VMCS at 0x31000 of the guest-physical memory around it (0x2997000)" in inner
    assert "without IA32_VMX_" in inner and "exit reason 10 CPUID" in inner
    outer = content[content.index('id="vmcs-6b53000"'):]
    assert "without IA32_VMX_" not in outer[:outer.index("<h4>Last exit")]


def test_the_status_says_whether_a_block_fails(intel_plain: Path, amd_exit: Path, folder: Path) -> None:
    """VM B of the dump failed to enter (the kernel printed the failure)."""
    assert command(["report", str(folder / "a.html"), "-s", str(intel_plain), "--caps", "bochs-2.7-skylake-x"]).status == 1
    assert command(["report", str(folder / "b.html"), "-s", str(amd_exit)]).status == 0
    assert '<span class="badge bad">1 fail</span>' in (folder / "a.html").read_text()


def test_a_limit_is_said(intel_nested: Path, folder: Path) -> None:
    content = written(intel_nested, folder / "one.html", "--limit", "1")
    assert "control blocks were found; the first 1 are on this page" in content and content.count('<section class="block" id="vmcs-') == 1
    assert "not on this page" in content


def test_a_memory_without_control_blocks_makes_a_page_that_says_so(folder: Path) -> None:
    empty = folder / "empty.raw"
    empty.write_bytes(bytes(1 << 16))
    assert "No VMCS and no VMCB was found" in written(empty, folder / "empty.html", "--format", "raw")


def test_a_picture_of_scattered_pages_stays_small_and_says_that_it_is_coarse() -> None:
    builder = TableBuilder(base=0x10000000)
    for number in range(6000):
        at, _ = builder.entry_address(2 * number * K4, 1, 7)
        builder.set(at, (number + 1) * K4 | (6 << 3) | (7 if number % 2 else 5))
    picture = address_map(Enumeration(builder.memory(), Ept(builder.root | 0x1E)))
    data = map_data(picture, "x", "ept walk {}")
    assert data["aggregated"] and len(data["pieces"]) <= 4096 and len(json.dumps(data)) < 400_000
    assert sum(mapped for _, _, mapped, _, _, _ in data["pieces"]) == 6000


@given(st.binary(min_size=64, max_size=64), st.sampled_from([MsrBitmap, MsrPermissionMap]))
@settings(max_examples=10, deadline=None)
def test_the_bits_of_the_msr_picture_are_the_answers_of_the_bitmap(seed: bytes, kind: Any) -> None:
    bitmap = kind((seed * 128)[:4096 if kind is MsrBitmap else 8192])
    for part in msr_data(bitmap, "x")["ranges"]:
        for access in (READ, WRITE):
            bits = base64.b64decode(part[access])
            assert len(bits) == 0x400
            for index in range(0, 0x2000, 7):
                assert bool(bits[index >> 3] >> (index & 7) & 1) == bitmap.query(part["first"] + index, access).exits


def test_names_are_those_of_the_msr_table() -> None:
    names = msr_names()
    assert names[str(0x10)] == "IA32_TIME_STAMP_COUNTER" and names[str(0xC0000080)] == "IA32_EFER" and len(names) > 500


def test_python_of_the_command_writes_the_same_page(amd_exit: Path, folder: Path, amd_page: Path) -> None:
    out = folder / "python.html"
    lines = command(["report", str(out), "-s", str(amd_exit), "--python"]).text
    out.unlink()
    exec(lines, {})
    assert out.read_bytes() == amd_page.read_bytes()


def test_a_target_that_cannot_be_scanned_makes_a_page(amd_exit: Path) -> None:
    from vtdbg.machine import Machine
    from vtdbg.memory.base import PhysicalMemory

    class Unknown(PhysicalMemory):
        def read(self, address: int, size: int) -> bytes:
            return bytes(size)

        def ranges(self) -> None:
            return None

    shown = Parsed(ReportPage(Session(_machine=Machine(Unknown(), "stub", "live"))).render().decode("ascii")).words
    assert "cannot scan: which physical memory exists is not known here" in shown


# ---- in a browser -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with had("headless Chromium", Browser) as made:
        yield made


def opened(browser: Browser, path: Path) -> None:
    browser.emulate("screen", "light")
    browser.console()
    browser.requests()
    browser.open(path)


FOCUS = "const e = document.activeElement; return e.tagName.toLowerCase() + (e.getAttribute('href') || e.getAttribute('aria-label') || '')"
PICTURE = 'figure[data-map="0"] > svg'


def readout(browser: Browser, figure: str = "map") -> str:
    return str(browser.run(f"return document.querySelector('figure[data-{figure}] .readout').textContent"))


def cell(browser: Browser) -> int:
    return int(browser.run(f"return document.querySelector(`{PICTURE}`).dataset.cell"))


@pytest.mark.live
@pytest.mark.parametrize("which", ["nested_page", "amd_page", "hooked_page"])
def test_it_opens_without_an_error_and_without_a_request(which: str, browser: Browser, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    opened(browser, path)
    assert browser.run("return document.querySelectorAll('figure[data-map] > svg rect').length") > 20
    shot = browser.screenshot()
    assert shot.startswith(b"\x89PNG") and len(shot) > 30_000
    assert browser.console() == []
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert asked == [path.resolve().as_uri()]


@pytest.mark.live
def test_hostile_names_are_text(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    assert browser.run("return document.querySelector('h1').textContent") == HOSTILE_NAME
    assert browser.run("return [document.title, window.owned === undefined, document.images.length, document.scripts.length]") == [
        f"vtdbg report: {HOSTILE_NAME}", True, 0, 2]


@pytest.mark.live
def test_the_policy_stops_a_script_that_got_in(browser: Browser, amd_page: Path, folder: Path) -> None:
    """The second line of defence, tried by breaking the first."""
    broken = folder / "broken.html"
    broken.write_text(amd_page.read_text().replace("<h1>", "<script>window.owned=1</script><img src=x onerror='window.owned=2'><h1>"))
    opened(browser, broken)
    assert browser.run("return window.owned === undefined")
    assert any("Content Security Policy" in line for line in browser.console())


@pytest.mark.live
def test_the_keyboard_reaches_the_tree_the_zoom_the_picture_and_the_details(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    seen = []
    for _ in range(40):
        browser.press("Tab")
        seen.append(browser.run(FOCUS))
    assert seen[0] == "a#main" and seen[1] == "a#machine" and f"a#vmcs-{VM_A:x}" in seen
    order = [next(at for at, item in enumerate(seen) if item.startswith(start))
             for start in ("a#machine", "buttonZoom in", "buttonZoom out", "buttonShow", "input", "svgGuest-physical address space", "summary")]
    assert order == sorted(order)


@pytest.mark.live
def test_arrow_keys_in_the_tree(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    browser.press("Tab", "Tab", "Down")
    second = browser.run(FOCUS)
    browser.press("Up")
    assert second.startswith("a#vm-") and browser.run(FOCUS) == "a#machine"


@pytest.mark.live
def test_the_keyboard_zooms_down_to_a_page_and_names_it(browser: Browser, hooked: Path, hooked_page: Path) -> None:
    """What the picture says of the page under the cursor is what a walk says."""
    opened(browser, hooked_page)
    browser.run(f"document.querySelector(`{PICTURE}`).focus()")
    whole = cell(browser)
    assert whole > 4096 * 8
    sizes = [whole]
    while sizes[-1] > 4096:
        browser.press("+")
        sizes.append(cell(browser))
        assert sizes[-1] < sizes[-2]
    assert "0x1000 to 0x1fff" in readout(browser)
    with open_machine(hooked).memory as memory:
        for gpa in (0x1000, 0x2000, 0x3000, 0x4000):
            walk = ept_walk(memory, EPTP_A, gpa)
            said = readout(browser)
            assert said.startswith(f"{gpa:#x} to {gpa + 0xFFF:#x}: {walk.permissions} {walk.memory_type}") and f"goes to {walk.hpa:#x}" in said
            assert f"vtdbg ept walk {gpa:#x} --eptp {EPTP_A:#x}" in said
            browser.press("Right")
    browser.press("+")
    assert "nothing finer" in readout(browser)
    browser.press("-")
    assert cell(browser) == 4096 * 8
    browser.press("Home")
    assert cell(browser) == whole


@pytest.mark.live
def test_a_picture_of_thousands_of_scattered_pages_zooms_down_to_each(browser: Browser, scattered_page: Path) -> None:
    """From afar they are taken together; close by, each says what a walk says."""
    opened(browser, scattered_page)
    browser.run(f"document.querySelector(`{PICTURE}`).focus()")
    assert "taken together" in readout(browser)
    builder = scattered()
    memory, eptp = builder.memory(), builder.root | 0x1E
    for gpa in (0, 2 * K4, 4321 * 2 * K4, 5999 * 2 * K4, 64 * G1 + 0x1234000):
        browser.run("const i = document.querySelector('figure[data-map] input'); i.value = ''; i.focus()")
        browser.press(*hex(gpa), "Enter")
        walk, said = ept_walk(memory, eptp, gpa), readout(browser)
        assert said.startswith(f"{gpa:#x} to {gpa + 0xFFF:#x}: {walk.permissions} WB") and f"goes to {walk.hpa:#x}" in said, said
    browser.run("const i = document.querySelector('figure[data-map] input'); i.value = ''; i.focus()")
    browser.press(*"0x1000", "Enter")
    assert readout(browser).startswith("0x1000 to 0x1fff: misconfiguration")
    assert browser.console() == []


@pytest.mark.live
def test_a_key_goes_to_the_next_hook(browser: Browser, switched_page: Path) -> None:
    opened(browser, switched_page)
    browser.run(f"document.querySelector(`{PICTURE}`).focus()")
    while cell(browser) > 4096:
        browser.press("+")
    browser.press("h")
    assert readout(browser).startswith(f"{HOOKED:#x} to") and "hook at 0x205000 (view-frame, view-rights" in readout(browser)
    assert browser.run(f"return document.querySelectorAll(`{PICTURE} .flag`).length") == 1


@pytest.mark.live
def test_hooks_and_misconfigurations_are_marked(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    browser.run(f"document.querySelector(`{PICTURE}`).focus()")
    flags = f"return document.querySelectorAll(`{PICTURE} .flag`).length"
    assert browser.run(flags) >= 1, "a hook is seen from afar"
    while cell(browser) > 4096:
        browser.press("+")
    assert browser.run(flags) == 2
    assert "execute-only" in readout(browser)
    browser.press("Right")
    assert "read-write without execute" in readout(browser)
    browser.run("document.querySelector('figure[data-map] input').focus()")
    browser.press(*"0xd0000000", "Enter")
    assert readout(browser).startswith("0xd0000000 to 0xd0000fff: KVM's MMIO")
    drawn = {kind: browser.run(f"return document.querySelectorAll(`{PICTURE} .p-{kind}`).length") for kind in ("mmio", "broken")}
    assert drawn == {"mmio": 1, "broken": 0}, "KVM makes this entry fault on purpose"
    legend = browser.run("return document.querySelector('figure[data-map] .legend').textContent")
    assert "execute-only" in legend and "~ = KVM's MMIO" in legend and "memory type WB" in legend


@pytest.mark.live
def test_the_mouse_selects_and_zooms(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    where = (f"const s = document.querySelector(`{PICTURE}`); s.scrollIntoView({{block: 'center'}}); "
             "const b = s.querySelector('.cursor').getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]")
    before = cell(browser)
    x, y = browser.run(where)
    browser.mouse(x + 3 * browser.run(f"return document.querySelector(`{PICTURE} .cursor`).getBoundingClientRect().width"), y, 1)
    moved = readout(browser)
    browser.mouse(x, y, 2)
    assert cell(browser) == before // 8 and moved.startswith(f"{3 * before:#x} to")


@pytest.mark.live
def test_msrs_are_named_by_keyboard_and_mouse(browser: Browser, hooked: Path, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    with open_machine(hooked).memory as memory:
        bitmap = MsrBitmap.read(memory, _msr_bitmap_address(memory))
    browser.run("document.querySelector('figure[data-msr] > svg').focus()")
    browser.press("n")
    said = readout(browser, "msr")
    index = int(re.findall(r"0x[0-9a-f]+", said)[0], 16)
    first = min(item.first for access in (READ, WRITE) for item in bitmap.passed(access))
    assert index == first == 0x10 and "IA32_TIME_STAMP_COUNTER" in said
    assert ("RDMSR does not exit" in said) == (bitmap.query(index, READ).exits is False)
    assert ("WRMSR does not exit" in said) == (bitmap.query(index, WRITE).exits is False)
    x, y = browser.run("const s = document.querySelector('figure[data-msr] > svg'); s.scrollIntoView({block: 'center'}); "
                       "const b = s.querySelector('.msr-exit').getBoundingClientRect(); return [b.x + b.width * (0x3A + 0.5) / 256, b.y + 4]")
    browser.mouse(x, y)
    assert "0x0000003a IA32_FEATURE_CONTROL" in readout(browser, "msr")


def _msr_bitmap_address(memory: Any) -> int:
    from vtdbg.vmx.vmcs import Vmcs

    return Vmcs.from_page(memory.read_page(VM_A))["MSR_BITMAP"]


CONTRAST = """
const parse = (words) => words.match(/[\\d.]+/g).map(Number).slice(0, 3);
const luminance = (rgb) => { const [r, g, b] = rgb.map((c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const paper = parse(getComputedStyle(document.body).backgroundColor), found = {};
for (const name of ["body", ".dim", ".bad", ".warn", ".good", "nav a"])
  { const e = document.querySelector(name); if (e) found[name] = ratio(parse(getComputedStyle(e).color), paper); }
for (const name of ["all", "rw", "rx", "x"])
  { const e = document.querySelector("figure svg .p-" + name), t = document.querySelector("figure svg text.in:not(.alarm)");
    if (e) found["p-" + name] = ratio(parse(getComputedStyle(t).fill), parse(getComputedStyle(e).fill)); }
return [paper, found];
"""


@pytest.mark.live
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser: Browser, hooked_page: Path, scheme: str) -> None:
    """Contrast of 4.5 to 1 and more (WCAG 2.2, Contrast (Minimum)) for each style of text, and for letters on the colours of the picture."""
    opened(browser, hooked_page)
    browser.emulate("screen", scheme)
    paper, found = browser.run(CONTRAST)
    assert (sum(paper) > 600) == (scheme == "light")
    assert len(found) >= 9 and {name: value for name, value in found.items() if value < 4.5} == {}


@pytest.mark.live
def test_on_paper_everything_is_unfolded_and_on_white(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    browser.emulate("print", "dark")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return getComputedStyle(document.querySelector('.toolbar')).display") == "none"
    assert browser.run("return document.querySelectorAll('details').length") > 3
    unfolded = browser.run("return document.querySelectorAll('details[open]').length")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return document.querySelectorAll('details:not([open])').length") == 0
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run("return document.querySelectorAll('details[open]').length") == unfolded
    browser.emulate("", "light")
    assert browser.pdf().startswith(b"%PDF-")
    assert browser.console() == []


@pytest.mark.live
def test_a_narrow_window_does_not_scroll_sideways(browser: Browser, hooked_page: Path) -> None:
    opened(browser, hooked_page)
    browser.tools("Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1, mobile=False)
    try:
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        # What does not fit scrolls in its own box, and is not squeezed: evidence in columns of two letters, a picture with letters of three pixels.
        assert browser.run("return document.querySelector('.table-vmcs td:last-child').getBoundingClientRect().width") >= 200
        assert browser.run(f"return document.querySelector(`{PICTURE}`).getBoundingClientRect().width") >= 600
        browser.run(f"document.querySelector(`{PICTURE}`).focus()")
        browser.press(*["Right"] * 40)
        seen = browser.run(f"const c = document.querySelector(`{PICTURE} .cursor`).getBoundingClientRect(); return [c.left, c.right]")
        assert seen[0] >= 0 and seen[1] <= 420, "the cursor is scrolled into sight"
        said = browser.run("return document.querySelector('figure[data-map] .readout').getBoundingClientRect().left")
        assert said >= 0, "and what it says stays in sight"
    finally:
        browser.tools("Emulation.clearDeviceMetricsOverride")
