"""The page that `report` writes: the other verbs' reports, control block by control block, and the pictures between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

from vtdbg.address_map import EXACT, PIECES, WORK_LIMIT, address_map
from vtdbg.commands import registry
from vtdbg.commands.bitmaps import Owner, msr_bitmap_of
from vtdbg.commands.maps import aggregation, map_blocks
from vtdbg.commands.nested import Root, listed_views
from vtdbg.commands.nested_hooks import Hooks, all_hooks, hooks_group
from vtdbg.commands.nested_lint import lint_report
from vtdbg.commands.scanning import scanned_blocks
from vtdbg.commands.select import STALE_VMCB, STALE_VMCS
from vtdbg.commands.session import Session
from vtdbg.commands.tree import kvm_pairs
from vtdbg.enumeration import Enumeration, Range
from vtdbg.errors import UsageError, VtdbgError
from vtdbg.hierarchy import Block as TreeBlock
from vtdbg.hierarchy import Hierarchy, Hypervisor, Tables, Vm, hierarchy
from vtdbg.machine import Machine
from vtdbg.memory.base import PhysicalMemory
from vtdbg.nested.meant import told_apart
from vtdbg.render.html import HtmlRenderer, escape, page
from vtdbg.render.pictures import map_data, msr_data, msr_names
from vtdbg.report import Block, Group, Lines, Report, Table, Value, cell
from vtdbg.scanner import Found
from vtdbg.svm.npt import Npt
from vtdbg.vmx.ept import Ept
from vtdbg.vmx.vmcs import Vmcs

MOST_BLOCKS = 64
"""Control blocks in full; a dump full of false ones must not make a page that no browser opens."""
ALL_PIECES = 1 << 15
"""Pieces of all address spaces of a page together."""
LISTED_RANGES = 500
SHOWN_HOOKS = 50
"""Hooks of each table that are listed with their bytes; the picture marks MARKED_HOOKS."""
MARKED_HOOKS = 1000
SIBLINGS = 8
"""Other VMs of the hypervisor whose tables are compared with those of a VM: the processors of one guest can have tables of their own."""
EXACT_RANGES = 1 << 18
"""Ranges of all address spaces of a page together that are put on it one by one, so that a picture zooms down to each page."""
FOLDED_ROWS = 16
MOST_GIVEN_UP = 2
SHORT_WORK = 1 << 14
"""Work (see `vtdbg.enumeration`) for the tables of a VM once so many were given up: a dump full of hostile tables must not take an hour."""
SAMPLE = 64
"""Ranges by which two tables are judged to be views of one guest."""
TOO_MUCH = Lines("too_much", [Value(None, "not listed: the tables were given up (see the picture)", "warn")])


def run_verb(session: Session, name: str, **given: Any) -> Report:
    """Another verb's report; what is not given is as on a command line without it."""
    found, _ = registry.find_verb(name.split())
    values: Dict[str, Any] = {argument.name: None for argument in found.arguments}
    values.update({option.dest: False if option.kind == "flag" else option.default for option in found.options})
    unknown = set(given) - set(values)
    if unknown:
        raise UsageError(f"{name} has no argument {', '.join(sorted(unknown))}")
    return found.run(session, **{**values, **given})


@dataclass
class Shown:
    """A control block of the tree that is shown in full; `session` sees the memory in which its addresses mean something."""

    block: TreeBlock
    session: Session
    html: HtmlRenderer
    below: bool = False
    """It is a control block of the hypervisor below the one that runs the VM."""

    @property
    def kind(self) -> str:
        return self.block.kind

    @property
    def ident(self) -> str:
        return f"{self.kind}-{self.block.found.address:x}"

    @property
    def title(self) -> str:
        words = f"{self.kind.upper()} at {self.block.address:#x}"
        if self.block.address != self.block.found.address:
            words += f" of the guest-physical memory around it ({self.block.found.address:#x})"
        return words + (", of the hypervisor below, with which this guest ran" if self.below else "")


class ReportPage:
    """Gathers the page: first the sections, because what is found there is shown in the tree beside them."""

    def __init__(self, session: Session, limit: int = MOST_BLOCKS) -> None:
        self._session, self._limit = session, limit
        self.maps: List[Dict[str, Any]] = []
        self.msrs: List[Dict[str, Any]] = []
        self.total = self.shown = self.failing = 0
        self._pieces, self._exact, self._given_up = PIECES, EXACT_RANGES, 0
        self._states: Dict[str, Tuple[str, str]] = {}
        self._sections: List[str] = []
        self._places: Dict[int, Tuple[Session, HtmlRenderer]] = {}
        self._anchors: Dict[str, str] = {}

    def render(self) -> bytes:
        """The page as bytes to be written to a file."""
        session = self._session
        tree, notes = self._hierarchy()
        vms = [vm for hypervisor in tree.hypervisors for vm in _all_vms(hypervisor)]
        blocks = [item for vm in vms for block in vm.blocks for item in (block, *block.ran_with)]
        self.total, self.shown = len(blocks), min(len(blocks), self._limit)
        self._pieces = max(256, min(PIECES, ALL_PIECES // max(len(vms), 1)))
        for block in blocks[:self.shown]:
            self._anchors[f"{block.kind} dump {block.found.address:#x}"] = f"#{block.kind}-{block.found.address:x}"
        html = HtmlRenderer(self._anchors, session.program)
        self._sections.append(self._machine_section(html, tree))
        kinds = {block.kind for block in blocks}
        notes = [*session.machine.warnings, *[STALE_VMCS] * ("vmcs" in kinds), *[STALE_VMCB] * ("vmcb" in kinds), *tree.notes, *notes]
        if self.total > self.shown:
            notes.append(f"{self.total} control blocks were found; the first {self.shown} are on this page (--limit shows more)")
        nav = self._tree(tree)
        body = "\n".join([
            '<a class="skip" href="#main">Skip to the contents</a>',
            f'<header><h1>{escape(session.machine.name)}</h1><p class="dim">{escape(session.header())}</p>'
            f'{html.notes(Report("report", notes=notes))}</header>',
            f'<div class="columns">{nav}<main id="main" tabindex="-1">', *self._sections, "</main></div>",
        ])
        data = {"maps": self.maps, "msrs": self.msrs, "msr_names": dict(msr_names()) if self.msrs else {}}
        return page(f"vtdbg report: {session.machine.name}", body, data)

    def _hierarchy(self) -> Tuple[Hierarchy, List[str]]:
        """Everything that a scan finds as a tree; an empty one, and why, where the target cannot be scanned."""
        try:
            found, partial = scanned_blocks(self._session)
        except UsageError as error:
            return Hierarchy([], [], []), [str(error)]
        return hierarchy(self._session.machine, found, kvm_pairs(self._session)), [partial] if partial else []

    def _place(self, outer: Optional[Vm]) -> Tuple[Session, HtmlRenderer]:
        """The session in whose memory the addresses in control blocks mean something: for those of a hypervisor in the VM `outer` that is the
        physical memory of the VM."""
        session = self._session
        if outer is None:
            return session, HtmlRenderer(self._anchors, session.program)
        key = id(outer)
        if key not in self._places:
            words = f"guest-physical memory of the VM with {_tables_words(outer.tables)}"
            machine = Machine(outer.memory, words, "guest-physical", words)
            # Without the capability MSRs that the user gave: a nested hypervisor sees those that the hypervisor below makes up for it.
            inner = Session(layout_name=session.layout_name, program=session.program, _machine=machine)
            # Without links: no command line names this memory.
            self._places[key] = inner, HtmlRenderer(self._anchors, "")
        return self._places[key]

    # ---- the tree, and a section for each VM on the way ----

    def _tree(self, tree: Hierarchy) -> str:
        lines = ['<nav aria-label="Machine and VMs"><ul><li><a href="#machine">', escape(self._session.machine.name), "</a><ul>"]
        lines += [self._hypervisor(item) for item in tree.hypervisors]
        others = _others(tree)[:self._limit]
        if others:
            self._sections.append(self._other_section(others))
            lines.append('<li><a href="#others">Other pages</a><ul>')
            lines += [f'<li><a href="#other-{item.address:x}">{escape(f"{item.address:#x}")}</a> {escape(words)}</li>' for item, words in others]
            lines.append("</ul></li>")
        return "".join([*lines, "</ul></li></ul></nav>"])

    def _hypervisor(self, item: Hypervisor) -> str:
        label = f"Hypervisor{' inside' if item.level else ''}: {item.title}"
        pages = [f"<li>{escape(f'page {entry.address:#x}: {entry.what}')}</li>" for entry in item.pages]
        return f"<li>{escape(label)}<ul>{''.join(self._vm(vm, item.vms) for vm in item.vms)}{''.join(pages)}</ul></li>"

    def _vm(self, vm: Vm, beside: Sequence[Vm]) -> str:
        ident = f"vm-{len(self._sections)}"
        self._sections.append("")
        place = len(self._sections) - 1
        inner: List[str] = []
        shown: List[Shown] = []
        # A nested guest runs with a control block of the hypervisor below (KVM: vmcs02), whose addresses are those of that hypervisor.
        below = vm.parent.parent if vm.parent is not None else None
        members = [(block, vm.parent) for block in vm.blocks] + [(helper, below) for block in vm.blocks for helper in block.ran_with]
        for block, outer in members:
            if f"{block.kind}-{block.found.address:x}" in self._states:
                continue
            if len(self._states) >= self._limit:
                inner.append(f"<li>{escape(f'{block.kind.upper()} at {block.address:#x}')} (not on this page)</li>")
                continue
            item = Shown(block, *self._place(outer), below=outer is not vm.parent)
            self._states[item.ident] = "", ""
            shown.append(item)
        if shown or not vm.blocks:
            self._sections[place] = self._vm_section(ident, vm, shown, beside)
        for item in shown:
            words, style = self._states[item.ident]
            badge = f' <span class="badge {style}">{escape(words)}</span>' if words else ""
            inner.append(f'<li><a href="#{item.ident}">{escape(f"{item.kind.upper()} at {item.block.address:#x}")}</a>{badge}</li>')
        inner += [f"<li>{escape(f'page {entry.address:#x}: {entry.what}')}</li>" for entry in vm.pages]
        inner += [self._hypervisor(item) for item in vm.hypervisors]
        label = escape(_vm_words(vm))
        head = f'<a href="#{ident}">{label}</a>' if self._sections[place] else label
        return f"<li>{head}<ul>{''.join(inner)}</ul></li>"

    # ---- sections ----

    def _said(self, make: Callable[[], Report]) -> List[Block]:
        """The blocks of another verb's report; what it refuses becomes a line, because the rest of the page is of use without it."""
        try:
            return make().blocks
        except VtdbgError as error:
            return [Lines("problem", [Value(str(error), str(error), "warn")])]

    def _machine_section(self, html: HtmlRenderer, tree: Hierarchy) -> str:
        session = self._session
        pieces = ['<section id="machine"><h2>Machine</h2>', html.blocks(self._said(lambda: run_verb(session, "source info")), fold=FOLDED_ROWS)]
        kinds = {item.kind for item in tree.rest} | {hypervisor.kind for hypervisor in tree.hypervisors}
        for kind in sorted(kinds, reverse=True):
            pieces.append(f"<h3>{kind.upper()} pages found</h3>" + html.blocks(self._listed(f"{kind} list")))
        if not kinds:
            pieces.append('<p class="warn">No VMCS and no VMCB was found.</p>')
        return "\n".join([*pieces, "</section>"])

    def _listed(self, name: str) -> List[Block]:
        return self._said(lambda: run_verb(self._session, name))

    def _other_section(self, others: Sequence[Tuple[Found, str]]) -> str:
        """Control blocks that no processor runs from: their fields, without checks, because their addresses are a guest's."""
        html = HtmlRenderer(self._anchors, self._session.program)
        pieces = ['<section id="others"><h2>Other pages</h2>']
        for item, words in others:
            fields = self._fields(item) if item.vmcs is not None else []
            inner = f"<details><summary>Fields</summary>{html.blocks(_inside(fields), 5)}</details>" if fields else ""
            pieces.append(f'<section class="block" id="other-{item.address:x}"><h3>{escape(f"{item.address:#x}: {words}")}</h3>'
                          f"<p>{escape(item.summary)}</p>{inner}</section>")
        return "\n".join([*pieces, "</section>"])

    def _fields(self, item: Found) -> List[Block]:
        return self._said(lambda: run_verb(self._session, "vmcs dump", address=item.address))

    def _vm_section(self, ident: str, vm: Vm, shown: Sequence[Shown], beside: Sequence[Vm]) -> str:
        pieces = [f'<section id="{ident}"><h2>{escape(_vm_words(vm))}</h2>']
        if vm.parent is not None:
            words = f"It runs inside the VM with {_tables_words(vm.parent.tables)}: addresses in its control blocks are guest-physical there."
            pieces.append(f"<p>{escape(words)} The capability MSRs that its hypervisor sees are not known.</p>")
        if vm.maps_itself:
            pieces.append('<p class="warn">Its tables map its own control block: the guest can change it.</p>')
        if vm.tables is not None:
            session, html = self._place(vm.parent)
            further, notes = self._views(session, vm, beside)
            pieces += [f'<p class="warn">{escape(note)}</p>' for note in notes]
            pieces.append(self._address_space(session, html, vm.tables, further, _users(vm), numbers_named=vm.parent is None))
        else:
            pieces.append('<p class="warn">No nested tables are in use, or the pointer to them is one that no processor accepts.</p>')
        for item in shown:
            pieces.append(self._block_section(item))
            if item.below and item.block.tables is not None:
                named = item.session is self._session
                pieces.append(self._address_space(item.session, item.html, item.block.tables, [], [item.title], numbers_named=named))
        return "\n".join([*pieces, "</section>"])

    def _views(self, session: Session, vm: Vm, beside: Sequence[Vm]) -> Tuple[List[Root], List[str]]:
        """Tables that may be other views of the same guest: the EPTP lists of its control blocks, and the VMs of the same hypervisor."""
        further: List[Root] = []
        notes: List[str] = []
        for block in vm.blocks:
            if isinstance(block.fields, Vmcs):
                listed, words = listed_views(block.fields, f"the VMCS at {block.address:#x}", session)
                further, notes = [*further, *listed], [*notes, *words]
        for other in [other for other in beside if other is not vm and other.tables is not None][:SIBLINGS]:
            assert other.tables is not None and vm.tables is not None
            if not _alike(session.machine.memory, vm.tables, other.tables):
                continue
            further.append(Root(_structure(other.tables, session), other.tables.name, "", _users(other)))
        return further, notes

    def _address_space(self, session: Session, html: HtmlRenderer, tables: Tables, further: Sequence[Root], users: Sequence[str], *,
                       numbers_named: bool) -> str:
        """Picture, letters, ranges, hooks and lint.  `further`: tables that may be views of the same guest; `users`: control blocks that use
        these.  `numbers_named`: a command line can ask for an address of it."""
        pointer = tables.pointer
        kind, option = ("ept", "eptp") if isinstance(tables.structure, Ept) else ("npt", "ncr3")
        structure = _structure(tables, session)
        title = f"Guest-physical address space through {tables.name}"
        if structure.root_problem:
            return f'<p class="bad">{escape(structure.root_problem)}</p>'
        found = Enumeration(session.machine.memory, structure, limit=WORK_LIMIT if self._given_up < MOST_GIVEN_UP else SHORT_WORK)
        kept: List[Range] = []
        tell = partial(told_apart, session.machine.memory, structure)
        picture = address_map(found, self._pieces, _kept(found, kept, self._exact + 1), tell)
        exact = kept if picture.grain != EXACT and len(kept) <= self._exact else []
        self._exact -= len(exact)
        whole = found.complete
        self._given_up += not whole
        views = [root for root in further if root.tables.root != structure.root] if whole else []
        own = Root(structure, tables.name, f"{pointer:#x}", list(users))
        hooks = self._hooks(session, own, views) if whole else []
        # What stands out in another table by itself is not in this picture.
        marks = [mark for item in hooks if own in (item.root, item.first) for mark in item.found if mark.signs != ("split",)]
        walk = f"{kind} walk {{}} --{option} {pointer:#x}" if numbers_named else ""
        self.maps.append(map_data(picture, title, walk, marks[:MARKED_HOOKS], exact))
        rows = self._said(lambda: run_verb(session, f"{kind} dump", limit=LISTED_RANGES, **{option: pointer})) if whole else [TOO_MUCH]
        ranges = html.blocks(_inside(rows), 4)
        groups: List[Block] = [hooks_group(item, session, kind, mode=64, limit=SHOWN_HOOKS, no_code=False) for item in hooks] or [TOO_MUCH]
        count = len({(mark.start, mark.length) for item in hooks for mark in item.found})
        many = f" (the picture marks the first {MARKED_HOOKS})" if len(marks) > MARKED_HOOKS else ""
        heading = f"Hooks: {f'{count} place' + 's' * (count != 1) if count else 'none' if whole else 'not looked for'}{many}"
        coarse = [] if exact else aggregation(picture)
        return (f'<figure data-map="{len(self.maps) - 1}"><figcaption>{escape(title)}</figcaption>'
                "<noscript><p>The picture needs JavaScript; below it is in letters.</p></noscript></figure>"
                f"{html.blocks(coarse)}"
                f"<details{' open' * bool(marks)}><summary>{escape(heading)}</summary>{html.blocks(groups, 4)}</details>"
                f"{self._lint(session, html, kind, own) if whole and numbers_named else ''}"
                f"<details><summary>The same in letters, and what deserves a look</summary>{html.blocks(map_blocks(picture), 4)}</details>"
                f"<details><summary>Ranges</summary>{ranges}</details>")

    def _lint(self, session: Session, html: HtmlRenderer, kind: str, own: Root) -> str:
        """What is wrong with the tables; only where control structures and RAM of the same memory can be compared with them."""
        blocks = _inside(self._said(lambda: lint_report(f"{kind} lint", session, [own])))
        verdicts = [cell(row[0]).text for block in blocks if isinstance(block, Table) for row in block.rows]
        fails, notes = verdicts.count("fail"), verdicts.count("note")
        heading = "Lint: " + (", ".join([f"{fails} fail"] * bool(fails) + [f"{notes} note{'s' * (notes != 1)}"] * bool(notes)) or "nothing found")
        return f"<details{' open' * bool(fails)}><summary>{heading}</summary>{html.blocks(blocks, 4, FOLDED_ROWS)}</details>"

    def _hooks(self, session: Session, own: Root, further: Sequence[Root]) -> List[Hooks]:
        """What stands out in a VM's own tables and in the EPTP lists of it, and against further tables where those are views of the same guest."""
        found = all_hooks(session.machine.memory, [own, *further]).found
        listed = {id(root) for root in further if root.python}
        return [item for item in found if item.root is own or item.first is own or item.first is None and item.found and id(item.root) in listed]

    def _block_section(self, item: Shown) -> str:
        session, html, kind, block = item.session, item.html, item.kind, item.block
        chosen = {"address": block.address}
        checked = self._said(lambda: run_verb(session, f"{kind} check", **chosen))
        explained = self._said(lambda: run_verb(session, "exit explain", vmcb=kind == "vmcb", what=[f"{block.address:#x}"]))
        fields = self._said(lambda: run_verb(session, f"{kind} dump", **chosen))
        self._states[item.ident] = self._state(checked)
        facts = [f"<p>{escape(words)}</p>" for words in _block_words(block)]
        pieces = [f'<section class="block" id="{item.ident}"><h3>{escape(item.title)}</h3>', *facts,
                  f"<h4>{'VM entry' if kind == 'vmcs' else 'VMRUN'}</h4>", html.blocks(_inside(checked), 5),
                  "<h4>Last exit</h4>", html.blocks(explained, 5),
                  self._msr_bitmap(item),
                  f"<details><summary>Fields of the {kind.upper()}</summary>{html.blocks(_inside(fields), 5)}</details></section>"]
        return "\n".join(pieces)

    def _state(self, checked: Sequence[Block]) -> Tuple[str, str]:
        """What the tree says of a control block: how many checks fail, else how many are undecided."""
        counts = {"failures": 0, "undecided": 0}
        refused = True
        for block in _inside(checked):
            refused = refused and block.key == "problem"
            if block.key == "failures" and isinstance(block, Table):
                counts["failures"] = len(block.rows)
            elif block.key == "undecided" and isinstance(block, Lines):
                counts["undecided"] = sum(len(line.data["checks"]) for line in block.lines if isinstance(line, Value) and isinstance(line.data, dict))
        if counts["failures"]:
            self.failing += 1
            return f"{counts['failures']} fail", "bad"
        if refused:
            return "not checked", "warn"
        return (f"{counts['undecided']} undecided", "warn") if counts["undecided"] else ("passes", "good")

    def _msr_bitmap(self, item: Shown) -> str:
        values, title = item.block.fields, f"MSR bitmap of {item.title}"
        owner = Owner(item.title, vmcs=values) if isinstance(values, Vmcs) else Owner(item.title, vmcb=values, svm=True)
        try:
            found = msr_bitmap_of(owner, item.session.machine.memory)
        except VtdbgError as error:
            found = str(error)
        if isinstance(found, str):
            return f'<h4>MSR bitmap</h4><p class="warn">{escape(found)}</p>'
        self.msrs.append(msr_data(found, title))
        words = item.html.blocks(_inside(self._said(lambda: run_verb(item.session, "msrbitmap dump", **{item.kind: item.block.address}))), 5)
        return (f'<figure data-msr="{len(self.msrs) - 1}"><figcaption>{escape(title)}</figcaption></figure>'
                f"<details><summary>MSRs whose accesses do not exit</summary>{words}</details>")


def _users(vm: Vm) -> List[str]:
    return [f"{block.kind.upper()} at {block.address:#x}" for block in vm.blocks]


def _alike(memory: PhysicalMemory, one: Tables, two: Tables) -> bool:
    """Do the first pages of the second tables go where the first tables say?  To compare all of what strangers map would take its time."""
    rows = list(islice(Enumeration(memory, two.structure, limit=SHORT_WORK), SAMPLE))
    return 2 * sum(one.structure.walk(memory, row.start).hpa == row.target for row in rows) > len(rows)


def _structure(tables: Tables, session: Session) -> Union[Ept, Npt]:
    """With the capability MSRs that the user gave, which the tree was made without."""
    return Ept(tables.pointer, session.caps) if isinstance(tables.structure, Ept) else tables.structure


def _kept(rows: Iterable[Range], kept: List[Range], limit: int) -> Iterator[Range]:
    """The rows, of which the first `limit` are kept."""
    for row in rows:
        if len(kept) < limit:
            kept.append(row)
        yield row


def _inside(blocks: Sequence[Block]) -> List[Block]:
    """The blocks without the group around them: the page has a heading of its own."""
    return [inner for block in blocks for inner in (block.blocks if isinstance(block, Group) else [block])]


def _all_vms(hypervisor: Hypervisor) -> List[Vm]:
    """The VMs of a hypervisor and of those inside them, in the order of the tree."""
    found: List[Vm] = []
    for vm in hypervisor.vms:
        found.append(vm)
        for inner in vm.hypervisors:
            found += _all_vms(inner)
    return found


def _tables_words(tables: Optional[Tables]) -> str:
    return tables.name if tables is not None else "no nested tables"


def _vm_words(vm: Vm) -> str:
    return f"VM with {_tables_words(vm.tables)}" + (f", {', '.join(vm.tags[:4])}" if vm.tags else "")


def _block_words(block: TreeBlock) -> List[str]:
    """What the tree knows of a control block besides its fields."""
    words = [f"guest in {block.mode}"]
    words += [f"its guest ran with the {helper.kind.upper()} at {helper.found.address:#x} of the hypervisor below"
              + (f" ({block.ran_with_by[helper.address]})" if helper.address in block.ran_with_by else "") for helper in block.ran_with]
    if block.shadow is not None:
        words.append(f"shadow VMCS at {block.shadow.address:#x}: what its guest's VMREAD and VMWRITE reach")
    if block.copy is not None:
        words.append(f"this page is stale: the live copy is at {block.copy.address:#x}")
    return words


def _others(tree: Hierarchy) -> List[Tuple[Found, str]]:
    """Pages that are shown beside the tree: shadow VMCSs and live copies of blocks in it, and what has no place there."""
    found: Dict[int, Tuple[Found, str]] = {}
    for top in tree.hypervisors:
        for vm in _all_vms(top):
            for block in vm.blocks:
                if block.shadow is not None:
                    found[block.shadow.address] = block.shadow, f"shadow VMCS of the VMCS at {block.found.address:#x}"
                if block.copy is not None:
                    found[block.copy.address] = block.copy, f"live copy of the VMCS at {block.found.address:#x}"
            for entry in vm.pages:
                if entry.copy is not None:
                    found[entry.copy.address] = entry.copy, f"live copy of the page at {entry.found.address:#x}"
    for item in tree.rest:
        found.setdefault(item.address, (item, item.title or item.classification))
    return [found[address] for address in sorted(found)]
