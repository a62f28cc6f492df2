"""Is this page a VMCS?  The cheap questions that a scan asks of each page, and what several pages say about one another."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import Counter, deque
from typing import Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.evidence import Evidence
from vtdbg.lanes import column, lanes, zero_lanes
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.vmx import layouts as vmcs_layouts
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, SHADOW_BIT, Layout
from vtdbg.vmx.plausibility import BY_ENCODING, STRONG, Masked, Rule, judge_values
from vtdbg.vmx.vmcs import Vmcs

DISTINCTIVE = 0x10000
"""Below it a revision identifier is a small number, with which any page may begin by accident."""

_HEADER = struct.Struct("<II")
_ENOUGH = 5
_ENOUGH_WITH_ABORT = 12
_HEADER_SIZE = 12
_NO_STRAY_BYTES = 4
"""What a page gets beside the points of its fields, at most."""
_CODES = {2: "H", 4: "I", 8: "Q"}
_MANY = 128
"""Pages with one revision identifier that are asked together; fewer are faster one by one."""


class RevisionFilter:
    """The strong rules of every layout that a revision identifier may mean, read with one `struct` call a layout."""

    def __init__(self, layout: Optional[Layout] = None, extra: Sequence[Layout] = ()) -> None:
        self._extra = tuple(extra) if layout is None else (layout,)
        self._only = layout is not None
        own = {number for item in self._extra for number in item.revision_ids}
        self.revision_ids: FrozenSet[int] = frozenset(own if self._only else own | set(vmcs_layouts.revision_ids()))
        self.first_dwords: FrozenSet[int] = self.revision_ids | {number | SHADOW_BIT for number in self.revision_ids}
        """With and without the shadow-VMCS indicator."""
        self._readers: Dict[int, List[_StrongFields]] = {}

    def survivors(self, page: bytes) -> List[Layout]:
        """The layouts for which the page's control words, link pointer, host control registers and RFLAGS speak.

        A page of a small revision identifier whose abort indicator is no abort code needs more of them.
        """
        first, abort = _HEADER.unpack_from(page)
        revision = first & ~SHADOW_BIT
        needed = _ENOUGH_WITH_ABORT if abort > 0xFF and revision < DISTINCTIVE else _ENOUGH
        return [reader.layout for reader in self._of(revision) if reader.points(page) >= needed]

    def can_fit(self, page: bytes, survivors: Sequence[Layout]) -> bool:
        """Can the score of one of `survivors` (see there) reach what a VMCS needs?  Never False where it does; without words, hence quick."""
        revision = vmcs_layouts.header_words(page)[0]
        return any(reader.most(page) >= vmcs_layouts.FITS for reader in self._of(revision) if reader.layout in survivors)

    def worth_a_look(self, data: memoryview, first_dwords: Sequence[int]) -> bytes:
        """For the pages of `data`, whose first dwords are given: 1 for each that can have survivors or be empty; one byte a page.

        Never 0 for a page that has survivors or is empty.  Where many pages have one revision identifier, all are asked at once: memory can
        hold nothing but pages that begin with a small number.
        """
        found = 0
        revisions = Counter([first & ~SHADOW_BIT for first in first_dwords if first in self.first_dwords])
        for revision, pages in revisions.items():
            wanted = (revision, revision | SHADOW_BIT)
            here = int.from_bytes(bytes([first in wanted for first in first_dwords]), "little")
            if pages >= _MANY:
                readers = self._of(revision)
                fullest = max(readers, key=lambda reader: reader.strong)
                asked = 0
                for reader in readers:
                    enough, blank = reader.of_all(data)
                    asked |= enough | blank if reader is fullest else enough
                here &= asked
            found |= here
        return found.to_bytes(len(first_dwords), "little")

    def reasons(self, page: bytes) -> Tuple[Optional[Layout], List[Evidence]]:
        """For a page without survivors: the layout that came nearest and what speaks against it."""
        readers = [reader for reader in self._of(vmcs_layouts.header_words(page)[0]) if reader.fits_in(page)]
        if not readers:
            return None, [Evidence(-1, f"{len(page)} bytes are too short")]
        best = max(readers, key=lambda reader: reader.points(page))
        abort = vmcs_layouts.header_words(page)[2]
        evidence = judge_values(best.values(page))
        return best.layout, evidence + ([Evidence(-4, f"the abort indicator {abort:#x} is no VMX-abort code")] if abort > 0xFF else [])

    def layouts_of(self, revision: int) -> List[Layout]:
        """Every layout that is considered for a revision identifier."""
        return [reader.layout for reader in self._of(revision)]

    def _of(self, revision: int) -> "List[_StrongFields]":
        found = self._readers.get(revision)
        if found is None:
            known = [item for item in self._extra if revision in item.revision_ids] if self._only else vmcs_layouts.layouts_for(revision, self._extra)
            found = self._readers[revision] = [_StrongFields(item) for item in known]
        return found


class _JudgedFields:
    """Fields of one layout in one unpacking: those that `rules` judge, by encoding."""

    def __init__(self, layout: Layout, rules: Mapping[int, Rule]) -> None:
        self.layout = layout
        places = sorted((layout.fields[encoding].offset, layout.fields[encoding].size, encoding) for encoding in rules if encoding in layout.fields)
        form, at = "<", 0
        for offset, size, _ in places:
            form += f"{offset - at}x{_CODES[size]}"
            at = offset + size
        self._struct = struct.Struct(form)
        self._rules = [(rules[encoding].judge, rules[encoding].good, rules[encoding].bad) for _, _, encoding in places]
        self._encodings = [encoding for _, _, encoding in places]
        self._needed = max(self._struct.size, layout.extent)
        self._places = [(offset, size, rules[encoding]) for offset, size, encoding in places]

    def fits_in(self, page: bytes) -> bool:
        return len(page) >= self._needed

    def points(self, page: bytes) -> int:
        if len(page) < self._needed:
            return -1
        total = 0
        for (judge, good, bad), value in zip(self._rules, self._struct.unpack_from(page)):
            if value:
                verdict = judge(value)
                total += good if verdict else bad if verdict is False else 0
        return total

    def values(self, page: bytes) -> Mapping[int, int]:
        return dict(zip(self._encodings, self._struct.unpack_from(page)))


class _StrongFields(_JudgedFields):
    """The strong fields of one layout: for many pages at once, and the others only where those speak for a page."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, STRONG)
        self.strong = len(self._places)
        # Access rights in another form than VMREAD gives are not judged here: taken for good.
        self._in_form = frozenset() if layout.access_rights == "plain" else ACCESS_RIGHTS_FIELDS & set(layout.fields)
        self._all: Optional[_JudgedFields] = None

    def most(self, page: bytes) -> int:
        """The score (`layouts.score_page`) is not above this."""
        if self._all is None:
            self._all = _JudgedFields(self.layout, {encoding: rule for encoding, rule in BY_ENCODING.items() if encoding not in self._in_form})
        unjudged = sum(max(BY_ENCODING[encoding].good, 0) for encoding in self._in_form if encoding in BY_ENCODING)
        return self._all.points(page) + unjudged + _NO_STRAY_BYTES

    def of_all(self, data: memoryview) -> Tuple[int, int]:
        """(pages that can have enough points, pages in which no strong field is set) of `data`, whole pages; 1 in the lane (a byte) of each."""
        count = len(data) // PAGE_SIZE
        every = lanes(0x80, 1, count)
        # A byte holds every sum: at most 57 points speak for a page, 47 against it.
        total, blank = lanes(0x80 - _ENOUGH, 1, count), every
        for offset, size, rule in self._places:
            mask = rule.judge
            assert isinstance(mask, Masked)
            numbers = int.from_bytes(column(data, offset, size, PAGE_SIZE), "little")
            zero, good = int.from_bytes(zero_lanes(numbers, size, count), "little"), 0
            if not mask.wanted >> 8 * size:
                differing = (numbers ^ lanes(mask.wanted, size, count)) & lanes(mask.mask & (1 << 8 * size) - 1, size, count)
                good = int.from_bytes(zero_lanes(differing, size, count), "little")
            total += (good >> 7) * rule.good
            if mask.otherwise is None:
                total += ((every ^ zero ^ good) >> 7) * rule.bad
            if offset >= _HEADER_SIZE:
                blank &= zero
        return (total & every) >> 7, blank >> 7


# --- what several pages say about one another -------------------------------------------------------------------------------------

_LINK_POINTER, _VPID, _EPT_POINTER = 0x2800, 0x0000, 0x201A
_GUEST_STATE = (0x681C, 0x6802, 0x6816, 0x6818, 0x6814, 0x680E, 0x6810, 0x0802, 0x080E, 0x4810, 0x4812, 0x6800)
"""Guest RSP, CR3, GDTR, IDTR, TR, FS, GS base, CS and TR selector, GDTR and IDTR limit, CR0."""


class Known(NamedTuple):
    """A VMCS that was found: where, what it holds, and whether it is a vmcs12 (the VMCS of a nested hypervisor, kept by software)."""

    address: int
    vmcs: Vmcs
    software: bool


def relations(found: Iterable[Known], empty: Iterable[int], memory: PhysicalMemory) -> Dict[int, List[str]]:
    """What can be proved about each address, in words: link pointers, shared VPIDs, equal guest state, guest pages.

    `empty`: addresses of pages that hold only a revision identifier; those of a software VMCS are looked for in the guests' memory too.
    """
    known = sorted(found, key=lambda item: item.address)
    said: Dict[int, List[str]] = {}
    _links(known, said)
    _same_vpid(known, said)
    _same_guest(known, said)
    wanted = {item.address for item in known if item.software} | set(empty)
    if wanted:
        _guest_pages(known, wanted, memory, said)
    return said


def _say(said: Dict[int, List[str]], address: int, words: str) -> None:
    said.setdefault(address, []).append(words)


def _links(known: Sequence[Known], said: Dict[int, List[str]]) -> None:
    shadows = {item.address for item in known if item.vmcs.shadow}
    for item in known:
        target = item.vmcs.get(_LINK_POINTER)
        if target in shadows and not item.vmcs.shadow:
            _say(said, item.address, f"its link pointer names the shadow VMCS at {target:#x}")
            _say(said, target or 0, f"the link pointer of {item.address:#x} names it")


def _same_vpid(known: Sequence[Known], said: Dict[int, List[str]]) -> None:
    by_vpid: Dict[int, List[int]] = {}
    for item in known:
        vpid = item.vmcs.get(_VPID)
        if vpid and not item.software and not item.vmcs.shadow:
            by_vpid.setdefault(vpid, []).append(item.address)
    for vpid, addresses in by_vpid.items():
        for address in addresses if len(addresses) > 1 else ():
            others = ", ".join(f"{other:#x}" for other in addresses if other != address)
            _say(said, address, f"same VPID {vpid:#x} as {others}")


def _same_guest(known: Sequence[Known], said: Dict[int, List[str]]) -> None:
    by_stack: Dict[int, List[Known]] = {}
    for nested in known:
        stack = nested.vmcs.get(_GUEST_STATE[0])
        if nested.software and stack:
            by_stack.setdefault(stack, []).append(nested)
    for item in known if by_stack else ():
        if item.software or item.vmcs.shadow:
            continue
        for nested in by_stack.get(item.vmcs.get(_GUEST_STATE[0]) or 0, ())[:_PARTNERS]:
            equal = equal_guest(item.vmcs, nested.vmcs)
            if equal:
                _say(said, item.address, f"runs the guest of the nested VMCS at {nested.address:#x} ({equal} guest registers are equal)")
                _say(said, nested.address, f"its guest ran with the VMCS at {item.address:#x}")


_PARTNERS = 8
"""Nested VMCSs of one stack pointer that are compared: hostile memory can hold the same page a million times."""


def equal_guest(one: Vmcs, other: Vmcs) -> int:
    """How many registers show that both hold the state of one guest; 0 where they do not."""
    pairs = [(one.get(encoding), other.get(encoding)) for encoding in _GUEST_STATE]
    used = [(first, second) for first, second in pairs if first and second]
    same = len(used) >= 6 and pairs[0][0] == pairs[0][1] and all(first == second for first, second in used)
    return len(used) if same else 0


def _guest_pages(known: Sequence[Known], wanted: Set[int], memory: PhysicalMemory, said: Dict[int, List[str]]) -> None:
    mapped: Set[int] = set()
    searched = []
    budget = Budget()
    by_root: Dict[int, Tuple[Dict[int, int], bool]] = {}
    for item in known:
        eptp = item.vmcs.get(_EPT_POINTER)
        if item.software or item.vmcs.shadow or not eptp or eptp >> 3 & 7 not in (3, 4):
            continue
        root = eptp & (_TABLE_ADDRESS | 0x38)
        if root not in by_root:
            by_root[root] = find_in_ept(memory, eptp, wanted, budget)
        pages, complete = by_root[root]
        searched.append(complete)
        for page, gpa in pages.items():
            mapped.add(page)
            _say(said, page, f"guest page {gpa:#x} of the VM of {item.address:#x}")
    if searched and all(searched):
        for item in known:
            if item.software and item.address not in mapped:
                _say(said, item.address, "in no guest's memory (EPTs of the VMCSs found): taken for the hypervisor's own copy")


_TABLE_LIMIT = 8192
_SEARCH_LIMIT = 16384
_TABLE_ADDRESS = 0x000FFFFFFFFFF000
_ENTRIES = struct.Struct("<512Q")
_NO_ENTRIES = bytes(PAGE_SIZE)
EPT_PRESENT, NPT_PRESENT = 5, 1
"""Bits of which one marks an entry that maps: read or execute (EPT; writable alone is a misconfiguration); present (NPT)."""


class Budget:
    """What searches through several sets of tables may read together: at most `tables` of them, whatever the pointers say."""

    def __init__(self, tables: int = _SEARCH_LIMIT) -> None:
        self.left = tables


def find_in_ept(memory: PhysicalMemory, eptp: int, wanted: Set[int], budget: Optional[Budget] = None) -> Tuple[Dict[int, int], bool]:
    """Guest-physical addresses of host pages `wanted` in an EPT of 4 or 5 levels: ({host page: GPA}, was everything searched).

    Reads at most 8192 tables.  Entries that cannot be read and misconfigured ones (writable, not readable) are passed over.
    """
    return find_in_tables(memory, eptp & _TABLE_ADDRESS, (eptp >> 3 & 7) + 1, EPT_PRESENT, wanted, budget)


def find_in_tables(memory: PhysicalMemory, root: int, levels: int, present: int, wanted: Set[int],
                   budget: Optional[Budget] = None) -> Tuple[Dict[int, int], bool]:
    """`find_in_ept` for tables of `levels` levels at `root`, whose entries map where one of the bits `present` is set."""
    found: Dict[int, int] = {}
    budget = budget or Budget()
    ordered = sorted(wanted)
    tables = deque([(root, levels, 0)])
    seen = {(root, levels)}
    complete = True
    read = 0
    while tables:
        table, level, base = tables.popleft()
        if read >= _TABLE_LIMIT or budget.left <= 0:
            return found, False
        read += 1
        budget.left -= 1
        try:
            data = memory.read(table, PAGE_SIZE)
        except MemoryUnavailable:
            complete = False
            continue
        if data == _NO_ENTRIES or (level == 1 and wanted.isdisjoint(_addresses(data))):
            continue
        span = 1 << (12 + 9 * (level - 1))
        for index, entry in enumerate(_ENTRIES.unpack(data)):
            if not entry & present:
                continue
            address, gpa = entry & _TABLE_ADDRESS, base + index * span
            if level > 1 and not entry & 0x80:
                if (address, level - 1) not in seen:
                    seen.add((address, level - 1))
                    tables.append((address, level - 1, gpa))
            elif level == 1:
                if address in wanted:
                    found.setdefault(address, gpa)
            elif level < 4:
                first = address & -span
                for page in ordered[bisect_left(ordered, first):bisect_left(ordered, first + span)]:
                    found.setdefault(page, gpa + page - first)
    return found, complete


_ALL_ADDRESSES = int.from_bytes(_TABLE_ADDRESS.to_bytes(8, "little") * 512, "little")


def _addresses(data: bytes) -> Tuple[int, ...]:
    """The address bits of all entries of a table at once: most tables lead to nothing that is wanted."""
    return _ENTRIES.unpack((int.from_bytes(data, "little") & _ALL_ADDRESSES).to_bytes(PAGE_SIZE, "little"))
