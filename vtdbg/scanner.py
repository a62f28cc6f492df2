"""Find the control blocks of hypervisors in memory: every VMCS and VMCB, with the evidence for each.

One number at a fixed place of each page decides whether the page is looked at: the revision identifier of a VMCS, EFER of a VMCB.  It is
read with a stride over a mapped view, so that a scan costs one cache miss a page; only the few pages that pass are copied and judged.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from vtdbg.errors import FormatError, MemoryUnavailable, UsageError
from vtdbg.evidence import Evidence, summarize
from vtdbg.lanes import column, lanes
from vtdbg.machine import Machine
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.vmx.find import DISTINCTIVE, Known, RevisionFilter, relations
from vtdbg.vmx.layouts import SHADOW_BIT, Candidate, Layout, decode_candidates, header_words, is_empty, rank
from vtdbg.vmx.vmcs import Vmcs

if TYPE_CHECKING:
    from vtdbg.svm.recognise import Mark

KINDS = ("vmcs", "vmcb")

CLASSES = {
    "vmcs": "VMCS",
    "shadow-vmcs": "shadow VMCS",
    "kvm-vmcs12": "vmcs12 of a nested hypervisor under KVM",
    "ambiguous": "VMCS of undecided layout",
    "vmxon-region": "VMXON region, or a VMCS never written back",
    "empty": "a guest's VMXON region, or a stale vmcs12 page",
    "vmcb": "VMCB",
    "host-save-area": "host save area (VM_HSAVE_PA) in the layout of a VMCB",
    "rejected": "not a control block",
}
"""What a page can be taken for."""

_REASONS = {
    "vmxon-region": "nothing except its revision identifier: a VMXON region, or a VMCS that was never written back to memory",
    "empty": "nothing except KVM's vmcs12 revision identifier: a guest's VMXON region, or a vmcs12 whose live copy KVM keeps elsewhere",
}

Progress = Callable[[int], None]
"""Called with the number of bytes scanned so far."""


@dataclass(frozen=True)
class Found:
    """A page that is a control block, or was taken into account as one.

    `kind` "vmcs" or "vmcb"; `classification` a key of CLASSES; `score` the sum of `evidence`; `candidates` the VMCS layouts that were
    scored, best first; `vmcs` the decoded page where there is one; `relations` what other pages say about it (see `relate`);
    `reason` why it was rejected or not decoded.
    """

    kind: str
    address: int
    classification: str
    score: int
    evidence: Tuple[Evidence, ...] = ()
    candidates: Tuple[Candidate, ...] = ()
    vmcs: Optional[Vmcs] = None
    relations: Tuple[str, ...] = ()
    reason: str = ""

    @property
    def layout_id(self) -> str:
        """The layout of a decoded VMCS; empty where there is none."""
        if self.vmcs is not None and self.vmcs.layout is not None:
            return self.vmcs.layout.id
        return ""

    @property
    def title(self) -> str:
        """What to write behind "VMCS at ...": empty for an ordinary one."""
        words = [CLASSES[self.classification]] if self.classification not in ("vmcs", "vmcb") else []
        return "; ".join([*words, *self.relations])

    @cached_property
    def summary(self) -> str:
        """One line: relations, reason, and the weightiest evidence."""
        return "; ".join(part for part in (*self.relations, self.reason, summarize(self.evidence)) if part)


def scan(machine: "Machine | PhysicalMemory", kinds: Sequence[str] = KINDS, *, layout: Optional[Layout] = None, extra: Sequence[Layout] = (),
         rejected: bool = False, progress: Optional[Progress] = None) -> Iterator[Found]:
    """Control blocks in the memory of `machine`, in address order, one at a time: stop whenever you have seen enough.

    `kinds`: "vmcs", "vmcb" or both.  `layout`: take every VMCS for this layout; `extra`: layouts to consider beside the packaged ones.
    `rejected`: also yield, with the evidence, pages that begin with a known revision identifier and are no VMCS.  Pages that hold only a
    small revision identifier come last: they count only where a VMCS with the same identifier was found.
    `relate` adds what the pages found say about one another.

    What a scan does not find: a VMCS whose layout nobody published, one that a processor keeps on chip and has not written back, and a VMCB
    whose EFER has neither SVME nor LMA.  Decode those by address.

    Raises UsageError for an unknown kind, and where nobody knows which memory exists.
    """
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise UsageError(f"cannot scan for {wrong[0]!r}; known: {', '.join(KINDS)}")
    memory = machine.memory if isinstance(machine, Machine) else machine
    if memory.ranges() is None:
        raise UsageError("cannot scan: which physical memory exists is not known here; give the address of the control block")
    finders: List[_Finder] = []
    if "vmcs" in kinds:
        finders.append(_VmcsFinder(RevisionFilter(layout, extra), rejected))
    if "vmcb" in kinds:
        from vtdbg.svm import recognise

        finders += [_VmcbFinder((recognise.EFER, recognise.EFER_WITHOUT_SVME), rejected), _VmcbFinder((recognise.SEV_ES,), rejected)]
    return _found(memory, finders, progress)


def _found(memory: PhysicalMemory, finders: "Sequence[_Finder]", progress: Optional[Progress]) -> Iterator[Found]:
    for address, page, finder in sweep(memory, finders, progress):
        found = finder.judge(address, page)
        if found is not None:
            yield found
    for finder in finders:
        yield from finder.rest()


def relate(found: Iterable[Found], machine: "Machine | PhysicalMemory") -> List[Found]:
    """The same with `relations` filled in: which shadow VMCS belongs to which VMCS, whose guest page a vmcs12 is, ..."""
    memory = machine.memory if isinstance(machine, Machine) else machine
    listed = list(found)
    known = [Known(item.address, item.vmcs, item.classification == "kvm-vmcs12")
             for item in listed if item.vmcs is not None and item.classification in ("vmcs", "shadow-vmcs", "kvm-vmcs12")]
    said = relations(known, [item.address for item in listed if item.classification == "empty"], memory)
    return [replace(item, relations=tuple(said[item.address])) if item.kind == "vmcs" and item.address in said else item for item in listed]


# --- one pass over the pages -----------------------------------------------------------------------------------------------------

_CHUNK_PAGES = 4096
_MANY = 128
"""Pages of a chunk that pass before it pays to ask all of them one more question together."""
_ZERO = bytes(4)


class _Finder:
    """What decides by one number at a fixed place of a page whether to look at it, and judges the pages that pass."""

    def passing(self, data: memoryview) -> List[int]:
        """Indexes of the pages of `data` (whole pages) that are worth a look."""
        raise NotImplementedError

    def wants(self, page: bytes) -> bool:
        """Is this page, which can be cut short, worth a look?"""
        raise NotImplementedError

    def judge(self, address: int, page: bytes) -> Optional[Found]:
        raise NotImplementedError

    def rest(self) -> Iterator[Found]:
        """What was held back until the whole memory was seen."""
        return iter(())


def sweep(memory: PhysicalMemory, finders: Sequence[_Finder], progress: Optional[Progress] = None) -> Iterator[Tuple[int, bytes, _Finder]]:
    """(address, page, finder) of every page whose number at the finder's place is one that it wants, in address order.

    A page that no view holds whole is read from the memory; at an end of memory it can be shorter than 4096 bytes.
    """
    done, last_split = 0, -1
    for start, view in memory.views():
        data = view.cast("B") if view.format != "B" else view
        first = -start % PAGE_SIZE
        whole = max(0, (len(data) - first) // PAGE_SIZE)
        split = [start - start % PAGE_SIZE] if first else []
        end = start + len(data)
        if end % PAGE_SIZE and end - end % PAGE_SIZE not in split:
            split.append(end - end % PAGE_SIZE)
        for address in split[:1] if first else ():
            if address != last_split:
                yield from _split_page(memory, address, finders)
                last_split = address
        for piece in range(0, whole, _CHUNK_PAGES):
            pages = min(_CHUNK_PAGES, whole - piece)
            at = first + piece * PAGE_SIZE
            yield from _chunk(start + at, data[at:at + pages * PAGE_SIZE], finders)
            done += pages * PAGE_SIZE
            if progress is not None:
                progress(done)
        for address in split[1:] if first else split:
            if address != last_split:
                yield from _split_page(memory, address, finders)
                last_split = address


def _chunk(address: int, data: memoryview, finders: Sequence[_Finder]) -> Iterator[Tuple[int, bytes, _Finder]]:
    hits: List[Tuple[int, int]] = []
    for number, finder in enumerate(finders):
        hits += [(index, number) for index in finder.passing(data)]
    for index, number in sorted(hits):
        at = index * PAGE_SIZE
        yield address + at, bytes(data[at:at + PAGE_SIZE]), finders[number]


def _split_page(memory: PhysicalMemory, address: int, finders: Sequence[_Finder]) -> Iterator[Tuple[int, bytes, _Finder]]:
    page = b""
    for size in (PAGE_SIZE, PAGE_SIZE // 2, PAGE_SIZE // 4):
        try:
            page = memory.read(address, size)
            break
        except MemoryUnavailable:
            continue
    for finder in finders:
        if finder.wants(page):
            yield address, page, finder


# --- VMCS ------------------------------------------------------------------------------------------------------------------------


_KVM_LAYOUTS = "kvm_vmcs12"


class _VmcsFinder(_Finder):
    def __init__(self, revisions: RevisionFilter, rejected: bool) -> None:
        self._revisions, self._rejected = revisions, rejected
        self._real: Dict[int, int] = {}
        self._empty = array("Q")
        self._empty_first = array("I")

    def passing(self, data: memoryview) -> List[int]:
        wanted = self._revisions.first_dwords
        first_dwords = data.cast("I")[::PAGE_SIZE // 4].tolist()
        # Most chunks hold nothing: the set looks through the whole column without a step in Python.
        if wanted.isdisjoint(first_dwords):
            return []
        hits = [index for index, value in enumerate(first_dwords) if value in wanted]
        if self._rejected or len(hits) < _MANY:
            return hits
        worth = self._revisions.worth_a_look(data, first_dwords)
        return [index for index in hits if worth[index]]

    def wants(self, page: bytes) -> bool:
        return len(page) >= 4 and int.from_bytes(page[:4], "little") in self._revisions.first_dwords

    def judge(self, address: int, page: bytes) -> Optional[Found]:
        if is_empty(page):
            return self._judge_empty(address, page)
        survivors = self._revisions.survivors(page)
        if not self._rejected and not self._revisions.can_fit(page, survivors):
            return None
        ranked = rank(page, survivors) if survivors else []
        if not ranked or not ranked[0].fits:
            return self._reject(address, page, ranked)
        revision, shadow, _ = header_words(page)
        self._real[revision] = self._real.get(revision, 0) + 1
        best = ranked[0]
        try:
            vmcs = decode_candidates(page, ranked, f"page {address:#x}")
        except FormatError as error:
            return Found("vmcs", address, "ambiguous", best.score, best.evidence, tuple(ranked), reason=error.message)
        what = "kvm-vmcs12" if best.layout.id.startswith(_KVM_LAYOUTS) else "shadow-vmcs" if shadow else "vmcs"
        return Found("vmcs", address, what, best.score, best.evidence, tuple(ranked), vmcs)

    def _reject(self, address: int, page: bytes, ranked: Sequence[Candidate]) -> Optional[Found]:
        if not self._rejected:
            return None
        if ranked:
            return Found("vmcs", address, "rejected", ranked[0].score, ranked[0].evidence, tuple(ranked), reason="too little looks like a VMCS")
        _, evidence = self._revisions.reasons(page)
        score = sum(item.points for item in evidence)
        return Found("vmcs", address, "rejected", score, tuple(evidence), reason="only its first number is that of a VMCS")

    def _judge_empty(self, address: int, page: bytes) -> Optional[Found]:
        revision, shadow, abort = header_words(page)
        if revision >= DISTINCTIVE:
            return self._empty_found(address, revision, shadow)
        if abort > 0xFF:
            reason = f"only the number {revision:#x}, and behind it {abort:#x}, which is no VMX-abort code"
            return self._not_empty(address, reason) if self._rejected else None
        self._empty.append(address)
        self._empty_first.append(int.from_bytes(page[:4], "little"))
        return None

    def rest(self) -> Iterator[Found]:
        for address, first in zip(self._empty, self._empty_first):
            revision = first & ~SHADOW_BIT
            if revision in self._real:
                yield self._empty_found(address, revision, bool(first & SHADOW_BIT))
            elif self._rejected:
                yield self._not_empty(address, f"only the number {revision:#x}, and no VMCS with that revision identifier was found")

    def _empty_found(self, address: int, revision: int, shadow: bool) -> Found:
        software = any(item.id.startswith(_KVM_LAYOUTS) for item in self._revisions.layouts_of(revision))
        what = "empty" if software or shadow else "vmxon-region"
        return Found("vmcs", address, what, 0, reason=_REASONS[what])

    def _not_empty(self, address: int, reason: str) -> Found:
        return Found("vmcs", address, "rejected", 0, reason=reason)


# --- VMCB ------------------------------------------------------------------------------------------------------------------------


class _VmcbFinder(_Finder):
    """`marks` are at one place of the page, and no number has two of them."""

    def __init__(self, marks: "Sequence[Mark]", rejected: bool) -> None:
        self._marks, self._rejected = marks, rejected
        self._offset = marks[0].offset

    def passing(self, data: memoryview) -> List[int]:
        count = len(data) // PAGE_SIZE
        # The lower half first: that is half of the work, and what passes it is rare.
        low = int.from_bytes(column(data, self._offset, 4, PAGE_SIZE), "little")
        hits: List[int] = []
        for _, mask, wanted in self._marks:
            differing = (low ^ lanes(wanted & 0xFFFFFFFF, 4, count)) & lanes(mask & 0xFFFFFFFF, 4, count)
            if _ZERO in differing.to_bytes(4 * count, "little"):
                values = data.cast("Q")[self._offset // 8::PAGE_SIZE // 8]
                hits += [index for index, value in enumerate(values) if value & mask == wanted]
        return hits

    def wants(self, page: bytes) -> bool:
        value = int.from_bytes(page[self._offset:self._offset + 8], "little")
        return len(page) >= self._offset + 8 and any(value & mark.mask == mark.wanted for mark in self._marks)

    def judge(self, address: int, page: bytes) -> Optional[Found]:
        from vtdbg.svm import recognise

        if len(page) < PAGE_SIZE or not recognise.quick(page) or not (self._rejected or recognise.can_fit(page)):
            return None
        if self._marks != (recognise.SEV_ES,) and recognise.is_sev_es(page):
            return None
        what, evidence = recognise.judge_page(page)
        score = sum(item.points for item in evidence)
        if score >= recognise.FITS:
            return Found("vmcb", address, what, score, tuple(evidence))
        if not self._rejected:
            return None
        return Found("vmcb", address, "rejected", score, tuple(evidence), reason="too little looks like a VMCB")
