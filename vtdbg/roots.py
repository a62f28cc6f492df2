"""EPT and NPT roots found from below, without any VMCS or VMCB: pages that look like tables, and tables that point to several of them.

A page table is recognised by its entries: what is reserved is 0, memory types exist, addresses lie below the end of memory.  Alone that proves
little; a chain of four levels, every one of which has the form of its level, is no accident.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from vtdbg.errors import UsageError
from vtdbg.evidence import Evidence
from vtdbg.machine import Machine
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory

TABLE_LIMIT = 1 << 18
"""Pages that are kept as possible tables."""
ROOT_LIMIT = 1 << 10
REACHED_LIMIT = 1 << 14
"""Tables of one root that are counted."""
FITS = 20

_ADDRESS = 0x000FFFFFFFFFF000
_LARGE = 1 << 7
_ENTRIES = struct.Struct("<512Q")
_PIECE = 1 << 22
_TYPES = frozenset({0, 1, 4, 5, 6})
_WB = 6
_AD = 1 << 6
_A, _D = 1 << 8, 1 << 9
"""SDM vol. 3, Extended-Page-Table Pointer (EPTP); Accessed and Dirty Flags for EPT."""


class Form(NamedTuple):
    """What entries of a kind of tables look like (see FORMS)."""

    title: str
    present: int
    table: Callable[[int], bool]
    leaf: Callable[[int], bool]
    cached: Callable[[int], bool]


def _ept_leaf(entry: int) -> bool:
    return entry >> 3 & 7 in _TYPES and entry & 3 != 2


FORMS: Mapping[str, Form] = {
    # SDM vol. 3, Formats of EPT Paging-Structure Entries: bits 6:3 of an entry that refers to a table are reserved; a leaf has its memory
    # type in bits 5:3.  Bits 2:0 = 010b and 110b are misconfigurations.
    "ept": Form("EPT", 7, lambda entry: not entry & 0x78 and entry & 3 != 2, _ept_leaf, lambda entry: entry >> 3 & 7 == _WB),
    # APM vol. 2, Nested Paging: every access by the guest is a user access, so that U has to be 1 all the way; G means nothing.
    "npt": Form("NPT", 1, lambda entry: entry & 0x105 == 5, lambda entry: entry & 0x105 == 5, lambda entry: not entry & 0x18),
}


class _Page(NamedTuple):
    """One page as a table: what its entries can be."""

    children: Tuple[int, ...]
    """Where entries that have the form of a reference to a table lead; empty where one entry has no such form."""
    large: int
    large_bits: int
    """Address bits that occur in large pages: their alignment says of which level they are."""
    leaves: int
    cached: int
    inside: int
    """Of the leaves: how many are cached (write-back), how many lead into existing memory."""
    odd: int
    """Entries that are no leaf of the last level."""
    accessed: Tuple[int, int]
    """Pages with the accessed flag, were this a table of the last level or a directory; -1 where one has the dirty flag alone, which no
    processor leaves behind."""


def _accessed(pages: Sequence[int]) -> int:
    return -1 if any(entry & (_A | _D) == _D for entry in pages) else sum(1 for entry in pages if entry & _A)


@dataclass(frozen=True)
class Root:
    """The top of nested tables.  `pointer` is how a control block would name it, if its memory type is write-back."""

    address: int
    levels: int
    score: int
    evidence: Tuple[Evidence, ...]
    tables: int
    leaves: int
    accessed: int = 0
    """Pages with the accessed flag."""

    @property
    def eptp(self) -> int:
        """As an EPTP: write-back, walk length, and accessed and dirty flags where pages have them.

        A processor sets those with EPTP[6] only; KVM sets them itself in the tables of a nested guest, with EPTP[6] at 0 (Linux 6.1
        arch/x86/kvm/vmx/vmx.c, construct_eptp).
        """
        return self.address | (self.levels - 1) << 3 | _WB | (_AD if self.accessed else 0)


class RootFinder:
    """`read` looks at every page (interrupt it whenever you want), `roots` says what the pages seen so far give."""

    def __init__(self, machine: "Machine | PhysicalMemory", kind: str) -> None:
        if kind not in FORMS:
            raise UsageError(f"cannot look for roots of {kind!r}; known: {', '.join(FORMS)}")
        self._memory = machine.memory if isinstance(machine, Machine) else machine
        ranges = self._memory.ranges()
        if ranges is None:
            raise UsageError("cannot look for roots: which physical memory exists is not known here")
        self.form = FORMS[kind]
        self.end = max([start + length for start, length in ranges] + [0])
        self.done = 0
        self.cut = False
        """More pages looked like tables than are kept."""
        # Bits of addresses beyond 1 TiB or the end of memory: wrong in every entry of a directory.
        beyond = _ADDRESS & ~((1 << max(self.end.bit_length(), 40)) - 1)
        self._beyond = int.from_bytes(beyond.to_bytes(8, "little") * 512, "little")
        self._pages: Dict[int, _Page] = {}

    def read(self, progress: Optional[Callable[[int], None]] = None, part: Optional[PhysicalMemory] = None) -> None:
        """Every page of the memory, or of a `part` of it, once; `progress` gets the bytes done so far."""
        for start, view in (part or self._memory).views():
            data = view.cast("B") if view.format != "B" else view
            for at in range(-start % PAGE_SIZE, len(data) - PAGE_SIZE + 1, _PIECE):
                piece = bytes(data[at:at + _PIECE])
                for inner in range(0, len(piece) - PAGE_SIZE + 1, PAGE_SIZE):
                    self._look(start + at + inner, piece[inner:inner + PAGE_SIZE])
                self.done += len(piece)
                if progress is not None:
                    progress(self.done)

    def _look(self, address: int, page: bytes) -> None:
        whole = int.from_bytes(page, "little")
        if not whole or whole & self._beyond and bin(whole & self._beyond).count("1") > 256:
            return
        if len(self._pages) >= TABLE_LIMIT:
            self.cut = True
            return
        found = self._as_table([entry for entry in _ENTRIES.unpack(page) if entry])
        if found is not None:
            self._pages[address] = found

    def _as_table(self, entries: Sequence[int]) -> Optional[_Page]:
        form, end = self.form, self.end
        used = [entry for entry in entries if entry & form.present]
        # What is not present may hold anything; bit 63 alone is "suppress #VE".
        if not used or len(entries) - len(used) > len(used) + 8 and any(entry & ~(1 << 63) for entry in entries if not entry & form.present):
            return None
        children: List[int] = []
        large = bits = 0
        for entry in used:
            if entry & _LARGE and form.leaf(entry):
                large += 1
                # Bit 12 of a large page is its PAT bit (NPT).
                bits |= entry & _ADDRESS & ~0x1000
            elif not entry & _LARGE and form.table(entry) and entry & _ADDRESS < end:
                children.append(entry & _ADDRESS)
            else:
                children, large = [], 0
                break
        good = [entry for entry in used if form.leaf(entry)]
        odd = len(used) - len(good)
        if not children and not large and odd > len(good):
            return None
        cached = sum(1 for entry in good if form.cached(entry))
        inside = sum(1 for entry in good if entry & _ADDRESS < end)
        accessed = _accessed(good), _accessed([entry for entry in used if entry & _LARGE]) if large else 0
        return _Page(tuple(dict.fromkeys(children)), large, bits, len(good), cached, inside, odd, accessed)

    # --- from the leaves up -------------------------------------------------------------------------------------------------------------

    def roots(self) -> List[Root]:
        """Roots with the evidence for each, best first, at most ROOT_LIMIT."""
        pages = self._pages
        # References to tables have the form of uncached leaves (NPT: of any leaf): a page most of whose entries lead to tables is a directory.
        level1 = {address for address, page in pages.items() if page.leaves and page.odd <= page.leaves and page.inside
                  and (not page.children or 2 * sum(1 for child in page.children if child in pages) < len(page.children))}
        level2 = self._level(level1, 21)
        level3 = self._level(level2, 30)
        level4 = self._level(level3)
        level5 = {address for address in self._level(level4) if address not in level4}
        lower = {child for address in level5 for child in pages[address].children}
        found = [self._root(address, 5) for address in sorted(level5)[:ROOT_LIMIT]]
        below = {child for address in level4 for child in pages[address].children if child != address}
        tops = [address for address in sorted(level4) if address not in below and address not in lower]
        found += [self._root(address, 4) for address in tops[:ROOT_LIMIT]]
        return sorted((root for root in found if root.score >= FITS), key=lambda root: (-root.score, root.address))[:ROOT_LIMIT]

    def _level(self, below: Set[int], large: Optional[int] = None) -> Set[int]:
        """Pages that refer to tables of the level below, mostly (an empty table is no page that was kept), or to pages of 2**`large` bytes."""
        found = set()
        for address, page in self._pages.items():
            known = sum(1 for child in page.children if child in below and child != address)
            if page.large and (large is None or page.large_bits & ((1 << large) - 1)):
                continue
            if known * 2 >= len(page.children) and (known or page.large):
                found.add(address)
        return found

    def _root(self, address: int, levels: int) -> Root:
        pages = self._pages
        seen = {(address, levels)}
        queue = deque([(address, levels)])
        leaves = cached = inside = large = empty = accessed = 0
        odd_flags = False
        while queue and len(seen) < REACHED_LIMIT:
            at, level = queue.popleft()
            page = pages.get(at)
            if page is None:
                empty += 1
            elif level == 1:
                leaves, cached, inside = leaves + page.leaves, cached + page.cached, inside + page.inside
                accessed, odd_flags = accessed + page.accessed[0], odd_flags or page.accessed[0] < 0
            else:
                large += page.large
                accessed, odd_flags = accessed + page.accessed[1], odd_flags or page.accessed[1] < 0
                for child in page.children:
                    if (child, level - 1) not in seen:
                        seen.add((child, level - 1))
                        queue.append((child, level - 1))
        evidence = [Evidence(8, f"{levels} levels of tables of which every entry has the form of its level", f"{levels} levels"),
                    Evidence(min(12, 2 * len(seen)), f"{len(seen)} tables are reached", f"{len(seen)} tables")]
        total = leaves + large
        if leaves:
            share = cached / leaves
            words = f"{cached} of {leaves} pages of the last level are cached (write-back)"
            evidence.append(Evidence(8 if share >= 0.5 else -8, words, f"{cached} of {leaves} pages cached"))
            share = inside / leaves
            words = f"{inside} of {leaves} lead into the memory that exists"
            evidence.append(Evidence(6 if share >= 0.5 else -12, words, f"{inside} of {leaves} in memory"))
        elif large:
            evidence.append(Evidence(4, f"{large} large pages", f"{large} large pages"))
        if empty * 2 > len(seen):
            evidence.append(Evidence(-6, f"{empty} of {len(seen)} tables hold nothing or are not in the memory"))
        if self.form is FORMS["ept"] and accessed > 0 and not odd_flags:
            words = f"{accessed} of {total} pages have the accessed flag, which processors set where EPTP[6] is 1 (and KVM for nested guests)"
            evidence.append(Evidence(0, words, f"{accessed} accessed"))
        else:
            accessed = 0
        return Root(address, levels, sum(item.points for item in evidence), tuple(evidence), len(seen), total, accessed)


def find_roots(machine: "Machine | PhysicalMemory", kind: str = "ept") -> List[Root]:
    """Roots of EPTs ("ept") or nested page tables ("npt") in memory, best first, without any control block.

    NPTs have the form of ordinary page tables: those of a process whose every page belongs to the user look the same.
    Raises UsageError where which memory exists is not known.
    """
    finder = RootFinder(machine, kind)
    finder.read()
    return finder.roots()
