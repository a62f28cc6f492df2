"""KVM's dump_vmcb and Xen's svm_vmcb_dump.

Formats: Linux arch/x86/kvm/svm/svm.c, dump_vmcb, 3.2 to 6.19; Xen xen/arch/x86/hvm/svm, svm_vmcb_dump, 3.0 to 4.20.
Xen prints some fields as one 64-bit word with the field beside them; "%#x" has no padding, so a number at a cut is not trusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from vtdbg.textdump.lines import Follow, Lines, is_gap, shown, streams, word_set
from vtdbg.textdump.model import Builder, Segment, TextDump, in_field_order, mixed
from vtdbg.textdump.phrases import Match, Phrase, Record, Table, phrase, scan_joined, shape, table

FARTHEST = 200
KVM, XEN = "KVM dump_vmcb", "Xen svm_vmcb_dump"

_CONTROL: Tuple[Tuple[str, str], ...] = (
    ("cr_read", "{cr.read:4}"), ("cr_write", "{cr.write:4}"), ("dr_read", "{dr.read:4}"), ("dr_write", "{dr.write:4}"),
    ("exceptions", "{intercept_exceptions:8}"), ("pause filter count", "{pause_filter_count:d}"),
    ("pause filter threshold", "{pause_filter_thresh:d}"), ("iopm_base_pa", "{iopm_base_pa:16}"), ("msrpm_base_pa", "{msrpm_base_pa:16}"),
    ("tsc_offset", "{tsc_offset:16}"), ("asid", "{asid:d}"), ("tlb_ctl", "{tlb_ctl:d}"), ("erap_ctl", "{erap_ctl:d}"), ("int_ctl", "{int_ctl:8}"),
    ("int_vector", "{int_vector:8}"), ("int_state", "{int_state:8}"), ("exit_info1", "{exit_info_1:16}"),
    ("exit_info2", "{exit_info_2:16}"), ("exit_int_info", "{exit_int_info:8}"), ("exit_int_info_err", "{exit_int_info_err:8}"),
    ("nested_ctl", "{nested_ctl:d}"), ("misc_ctl", "{nested_ctl:d}"), ("nested_cr3", "{nested_cr3:16}"), ("avic_vapic_bar", "{avic_vapic_bar:16}"),
    ("ghcb", "{ghcb_gpa:16}"), ("event_inj", "{event_inj:8}"), ("event_inj_err", "{event_inj_err:8}"), ("virt_ext", "{virt_ext:d}"),
    ("lbr_ctl", "{virt_ext:d}"), ("misc_ctl2", "{virt_ext:d}"), ("next_rip", "{next_rip:16}"), ("avic_backing_page", "{avic_backing_page:16}"),
    ("avic_logical_id", "{avic_logical_id:16}"), ("avic_physical_id", "{avic_physical_id:16}"), ("vmsa_pa", "{vmsa_pa:16}"),
    ("allowed_sev_features", "{allowed_sev_features:16}"), ("guest_sev_features", "{guest_sev_features:16}"),
)
"""KVM's control area: one field a line."""

_SAVE_PAIRS: Tuple[Tuple[str, str, str, str], ...] = (
    ("cr0", "cr0", "cr2", "cr2"), ("cr3", "cr3", "cr4", "cr4"), ("dr6", "dr6", "dr7", "dr7"), ("rip", "rip", "rflags", "rflags"),
    ("rsp", "rsp", "rax", "rax"), ("s_cet", "s_cet", "ssp", "ssp"), ("star", "star", "lstar", "lstar"), ("cstar", "cstar", "sfmask", "sfmask"),
    ("kernel_gs_base", "kernel_gs_base", "sysenter_cs", "sysenter_cs"), ("sysenter_esp", "sysenter_esp", "sysenter_eip", "sysenter_eip"),
    ("gpat", "g_pat", "dbgctl", "dbgctl"), ("br_from", "br_from", "br_to", "br_to"), ("excp_from", "last_excp_from", "excp_to", "last_excp_to"),
    ("rax", "rax", "rbx", "gpr.rbx"), ("rcx", "gpr.rcx", "rdx", "gpr.rdx"), ("rsi", "gpr.rsi", "rdi", "gpr.rdi"), ("rbp", "gpr.rbp", "rsp", "rsp"),
    ("r8", "gpr.r8", "r9", "gpr.r9"), ("r10", "gpr.r10", "r11", "gpr.r11"), ("r12", "gpr.r12", "r13", "gpr.r13"),
    ("r14", "gpr.r14", "r15", "gpr.r15"), ("xcr0", "vmsa.xcr0", "xss", "vmsa.xss"), ("pl0_ssp", "vmsa.pl0_ssp", "pl1_ssp", "vmsa.pl1_ssp"),
    ("pl2_ssp", "vmsa.pl2_ssp", "pl3_ssp", "vmsa.pl3_ssp"),
)
"""KVM's save area: two fields a line."""

_PLAIN_REGISTERS = frozenset(("cr0", "cr3", "dr6", "rip", "rsp", "rax", "rcx", "rsi", "rbp", "r8", "r10", "r12", "r14"))
"""First labels that a Linux oops prints too, three to a line: they count only where nothing else is on the line."""

_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")


def _kvm() -> Iterator[Phrase]:
    for label, slot in _CONTROL:
        yield phrase(f"kvm.{label}", f"{label}: {slot}", strong=label not in ("exceptions", "asid", "tsc_offset"))
    yield phrase("kvm.intercepts", "intercepts: {intercept_misc1:8} {intercept_misc2:8}")
    yield phrase("kvm.intercepts64", "intercepts: {intercepts.both:16}")
    yield phrase("kvm.exit_code", "exit_code: {exit.code:8|16}")
    for first, name, second, other in _SAVE_PAIRS:
        yield phrase(f"kvm.{first}", f"{first}: {{{name}:16}} {second}: {{{other}:16}}", strong=first not in _PLAIN_REGISTERS)
    for label, name in (("isst_addr", "isst_addr"), ("sev_features", "vmsa.sev_features"), ("u_cet", "vmsa.u_cet")):
        yield phrase(f"kvm.{label}", f"{label}: {{{name}:16}}")
    for name in _SEGMENTS:
        yield phrase(f"kvm.{name}", f"{name}: s: {{{name}.selector:4}} a: {{{name}.attrib:4}} l: {{{name}.limit:8}} b: {{{name}.base:16}}")
    yield phrase("kvm.cpl", "cpl: {cpl:d} efer: {efer:16}")
    yield phrase("kvm.vmpl", "vmpl: {vmpl:d} cpl: {cpl:d} efer: {efer:16}")


_XEN: Tuple[Tuple[str, str, bool], ...] = tuple((label, slot, strong) for label, slot, strong in (
    ("cr_intercepts", "{intercept_cr:x}", True), ("dr_intercepts", "{intercept_dr:x}", True),
    ("exception_intercepts", "{intercept_exceptions:x}", True), ("general1_intercepts", "{intercept_misc1:x}", True),
    ("general2_intercepts", "{intercept_misc2:x}", True), ("pause_filter_threshold", "{pause_filter_thresh:d}", True),
    ("pause_filter_count", "{pause_filter_count:d}", True), ("tlb_control", "{tlb_ctl:x}", True), ("vintr", "{vintr.both:x}", True),
    ("int_stat", "{int_state:x}", True), ("interrupt_shadow", "{int_state:x}", True), ("eventinj", "{event_inj.both:x}", True),
    ("exitcode", "{exit_code:x}", True), ("exit_int_info", "{exit_int_info.both:x}", True), ("exitintinfo", "{exit_int_info.both:x}", True),
    ("exitinfo1", "{exit_info_1:x}", True), ("exitinfo2", "{exit_info_2:x}", True), ("np_ctrl", "{nested_ctl:x}", True),
    ("np_enable", "{nested_ctl:x}", True), ("guest_asid", "{asid:x}", True), ("virt_ext", "{virt_ext:x}", True),
    ("CR0", "0x{cr0:16}", False), ("CR2", "0x{cr2:16}", False), ("CR3", "0x{cr3:16}", False), ("CR4", "0x{cr4:16}", False),
    ("RSP", "0x{rsp:16}", False), ("RIP", "0x{rip:16}", False), ("RAX", "0x{rax:16}", False), ("RFLAGS", "0x{rflags:16}", False),
    ("DR6", "0x{dr6:16}", False), ("DR7", "0x{dr7:16}", False), ("CSTAR", "0x{cstar:16}", False), ("SFMask", "0x{sfmask:16}", True),
    ("KernGSBase", "0x{kernel_gs_base:16}", True), ("PAT", "0x{g_pat:16}", False), ("SSP", "0x{ssp:16}", False), ("S_CET", "0x{s_cet:16}", False),
    ("ISST", "0x{isst_addr:16}", True), ("H_CR3", "0x{nested_cr3:16}", True), ("CleanBits", "{clean:x}", True),
))


def _xen() -> Iterator[Phrase]:
    for label, slot, strong in _XEN:
        # %#x prints its own "0x"; [0x] also lets 0 stand without it.
        prefix = "" if slot.startswith("0x") or slot.endswith(":d}") else "0x"
        yield phrase(f"xen.{label}", f"{label} = {prefix}{slot}", strong=strong)
    yield phrase("xen.event_inj", "event_inj {event_inj.both:16}, valid? {flag.valid:d}, ec? {flag.ec:d}, type {flag.type:d}, "
                                  "vector 0x{flag.vector:x}")
    yield phrase("xen.iopm_base_pa", "iopm_base_pa = [0x]{iopm_base_pa:x} msrpm_base_pa = 0x{msrpm_base_pa:x} tsc_offset = 0x{tsc_offset:x}")
    yield phrase("xen.msrpm_base_pa", "msrpm_base_pa = 0x{msrpm_base_pa:x} tsc_offset = 0x{tsc_offset:x}")
    yield phrase("xen.asid", "asid = 0x{asid:x} np_ctrl = 0x{nested_ctl:x}")
    yield phrase("xen.cpl", "cpl = {cpl:d} efer = 0x{efer:x} star = 0x{star:x} lstar = 0x{lstar:x}", strong=False)
    yield phrase("xen.vmload", "virtual vmload/vmsave = {flag.vmload:d}")
    for name in _SEGMENTS:
        high = name.upper()
        yield phrase(f"xen.{name}", f"{high}: {{{name}.selector:4}} {{{name}.attrib:4}} {{{name}.limit:8}} {{{name}.base:16}}",
                     strong=False)
        yield phrase(f"xen-old.{name}", f"{high}: sel=0x{{{name}.selector:4}}, attr=0x{{{name}.attrib:4}}, limit=0x{{{name}.limit:8}}, "
                                        f"base=0x{{{name}.base:16}}", strong=False)


@cache
def phrases(dialect: str) -> Table:
    return table(list(_kvm() if dialect == KVM else _xen()))


KEYWORDS = frozenset([label.split()[0].lower() for label, _ in _CONTROL] + [row[0] for row in _SAVE_PAIRS] + list(_SEGMENTS)
                     + [label.lower() for label, _, _ in _XEN]
                     ) | word_set("""
    sel iopm_base_pa msrpm_base_pa asid cpl lstar intercepts exit_code isst_addr u_cet vmpl vmcb event_inj virtual paddr dumping domain vcpu
    sev_features
""")

MARKERS = word_set("""
    vmcb iopm_base_pa msrpm_base_pa cr_read cr_write dr_read dr_write intercepts int_ctl int_vector int_state exit_code exit_info1 exit_info2
    exit_int_info exit_int_info_err nested_ctl nested_cr3 misc_ctl misc_ctl2 avic_vapic_bar event_inj event_inj_err virt_ext lbr_ctl next_rip vmsa_pa
    avic_backing_page avic_logical_id avic_physical_id gdtr ldtr idtr kernel_gs_base sysenter_cs sysenter_esp gpat br_from excp_from lstar cstar
    sfmask
    cr_intercepts dr_intercepts exception_intercepts general1_intercepts general2_intercepts tlb_control vintr int_stat interrupt_shadow
    exitcode exitintinfo exitinfo1 exitinfo2 np_ctrl guest_asid kerngsbase h_cr3 cleanbits
""")
"""Lower-case words that other logs seldom have."""

_KVM_POINTER = re.compile(r"(?:\b(SVM|SEV|SEV-ES|SEV-SNP) (?:vCPU(\d{1,6}) )?)?VMCB ((?:0x)?[0-9a-f]{6,16}|\(____ptrval____\)), "
                          r"last attempted VMRUN on CPU (\d{1,5})(?!\d)", re.IGNORECASE)
_KVM_AREA = re.compile(r"\bVMCB (Control|State Save) Area\b|FAILED VMRUN WITH VMCB", re.IGNORECASE)
_XEN_START = re.compile(r"\bDumping guest's current state at ([\w .:-]{1,60}?)\.{3}", re.IGNORECASE)
_XEN_SIZE = re.compile(r"\bSize of VMCB = \d{1,6}, (?:p?addr(?:ess)?) = (?:0x)?([0-9a-f]{1,16})\b", re.IGNORECASE)
_DOMAIN = re.compile(r">>> ?Domain (\d{1,5}) ?<<<", re.IGNORECASE)
_VCPU = re.compile(r"^VCPU (\d{1,5})$", re.IGNORECASE)
_HEADING = re.compile(r"^sel attr limit base$", re.IGNORECASE)

NEGATIVE_EXITS = range(0xFFFFFFF0, 0x100000000)
"""VMEXIT_INVALID is -1, VMEXIT_BUSY -2, ... (APM vol. 2, appendix SVM Intercept Exit Codes); KVM before 6.19 prints 32 of the 64 bits."""


@dataclass
class _Open:
    """A dump that is being read."""

    dialect: str
    builder: Builder = field(default_factory=lambda: Builder("vmcb"))
    first: int = 0
    last: int = 0
    area: str = ""
    strong: bool = False
    parts: Dict[str, int] = field(default_factory=dict)
    phrases: Set[str] = field(default_factory=set)


def parse(lines: Lines, candidates: Sequence[int], claimed: Set[int], reserved: Set[int]) -> List[TextDump]:
    """The KVM and Xen VMCB dumps in `lines`.

    Adds the lines that were understood to `claimed`, and those that look like the dump's, understood or not, to `reserved`.
    """
    dumps: List[TextDump] = []
    for numbers in streams(lines, candidates).values():
        best: List[TextDump] = []
        best_sets: Tuple[Set[int], Set[int]] = (set(), set())
        for dialect in (KVM, XEN):
            # A few labels are in both: the dialect that explains more of the text is the one.
            sets: Tuple[Set[int], Set[int]] = (set(), set())
            found = _Reader(lines, dialect, *sets).read(numbers)
            if sum(len(dump.values) for dump in found) > sum(len(dump.values) for dump in best):
                best, best_sets = found, sets
        dumps.extend(best)
        claimed |= best_sets[0]
        reserved |= best_sets[1]
    return dumps


class _Reader:
    """One dialect, one stream of lines."""

    def __init__(self, lines: Lines, dialect: str, claimed: Set[int], reserved: Set[int]) -> None:
        self._lines, self._dialect, self._claimed, self.reserved = lines, dialect, claimed, reserved
        self._finished: List[_Open] = []
        self._open: Optional[_Open] = None
        self._shapes: Set[str] = set()
        self._lookalike: Set[int] = set()
        self._context: Dict[str, int] = {}

    def read(self, numbers: Sequence[int]) -> List[TextDump]:
        rows = phrases(self._dialect)
        done = 0
        for number in numbers:
            if number <= done:
                continue
            line = self._lines.line(number)
            if self._plain(number, line.text):
                continue
            broken = self._broken(number)
            if broken and self._plain(number, broken):
                done = number + 1
                if self._open is not None:
                    self._open.builder.lines.add(number + 1)
                continue
            follow = Follow(self._lines, number, _KVM_AREA)
            record, starts = scan_joined(rows, line.text, follow)
            if any(match.phrase.strong or match.good for match in record.matches):
                self._lookalike.add(number)
            if record.matches and self._accept(record, starts, number):
                done = number + len(starts) - 1
            elif self._open is not None and is_gap(line.text):
                self._open.builder.note(f"line {number}: lines are missing here ({shown(line.text, 80)})")
                self._open.builder.lines.add(number)
        self._close()
        return self._dumps()

    def _broken(self, number: int) -> str:
        """The words of a header that is broken into two lines, or nothing."""
        line, following = self._lines.line(number), self._lines.next_soft(number)
        if following is None:
            return ""
        joined = f"{line.text} {following.text}"
        for pattern in (_KVM_POINTER, _KVM_AREA) if self._dialect == KVM else (_XEN_START, _XEN_SIZE, _DOMAIN):
            match = pattern.search(joined)
            if match and match.start() < len(line.text) < match.end():
                return joined
        return ""

    def _start(self, number: int) -> _Open:
        self._close()
        self._open = _Open(self._dialect, first=number, last=number)
        self._open.builder.extras.update(self._context)
        return self._open

    def _plain(self, number: int, text: str) -> bool:
        """Headers.  True where the line is one."""
        if self._dialect == KVM:
            pointer = _KVM_POINTER.search(text)
            if pointer:
                current = self._start(number)
                current.builder.note(f"VMCB pointer {pointer.group(3)}, last attempted VMRUN on CPU {pointer.group(4)}")
                current.builder.extras["cpu"] = int(pointer.group(4))
                if pointer.group(2):
                    current.builder.extras["vcpu"] = int(pointer.group(2))
                if pointer.group(1) and pointer.group(1).upper() in ("SEV-ES", "SEV-SNP"):
                    current.builder.note(f"{pointer.group(1).upper()}: the save area below is the decrypted VMSA")
                current.builder.lines.add(number)
                return True
            area = _KVM_AREA.search(text)
            if area:
                self._area(number, (area.group(1) or "control").lower())
                return True
            return False
        for pattern, key in ((_DOMAIN, "domain"), (_VCPU, "vcpu")):
            match = pattern.search(text)
            if match:
                self._close()
                self._context[key] = int(match.group(1))
                return True
        start = _XEN_START.search(text)
        if start:
            current = self._start(number)
            current.builder.extras["from"] = start.group(1)
            current.builder.lines.add(number)
            return True
        size = _XEN_SIZE.search(text)
        if size:
            current = self._open if self._open is not None and not self._open.builder.seen else self._start(number)
            current.builder.extras["address"] = int(size.group(1), 16)
            current.builder.lines.add(number)
            current.strong = True
            return True
        if _HEADING.match(text) and self._open is not None:
            self._open.builder.lines.add(number)
            return True
        return False

    def _area(self, number: int, area: str) -> None:
        current = self._open
        if current is None or (area == "control" and current.builder.seen) or current.area == "state save" or number - current.last > FARTHEST:
            current = self._start(number)
        current.area = area
        current.last = number
        current.strong = True
        current.builder.lines.add(number)

    def _accept(self, record: Record, starts: Sequence[int], number: int) -> bool:
        strong = any(match.good and (match.phrase.strong or match.good == len(match.phrase.slots) >= 3) for match in record.matches)
        if strong:
            self._shapes.add(shape(record.lead))
        known = not any(character.isalnum() for character in record.lead) or shape(record.lead) in self._shapes
        # KVM prints one phrase a line: three registers on a line are somebody else's.
        alone = self._dialect == XEN or len(record.matches) == 1
        taken = [match for match in record.matches if match.phrase.strong or (record.clean and known and alone and self._whole(match))]
        if number == 1 and not record.lead:
            cut = self._lines.first_is_cut
            taken = [match for match in taken if match.start or (match.phrase.id not in _CUT_LABELS and (match.phrase.strong or not cut))]
        if not any(match.good for match in taken):
            if self._open is not None and any(match.phrase.strong for match in record.matches):
                self._open.last = max(self._open.last, number)
            return False
        current = self._open
        if current is None or number - current.last > FARTHEST:
            if not strong:
                return False
            current = self._start(number)
        elif self._goes_back(current, taken):
            current = self._start(number)
        for match in taken:
            if match.good:
                current.phrases.add(match.phrase.id)
            self._take(current, match, starts, number)
        current.strong |= strong
        return True

    def _whole(self, match: Match) -> bool:
        """KVM's pairs of registers count as pairs: half of one can be the beginning of an oops' three."""
        return self._dialect == XEN or (
            len(match.items) == len(match.phrase.slots) and all(item.value is not None or item.hidden for item in match.items))

    def _goes_back(self, current: _Open, taken: Sequence[Match]) -> bool:
        """A phrase that a dump prints once stands here again: another dump whose header is lost, or a second processor."""
        return any(match.phrase.id in current.phrases for match in taken if match.good)

    def _take(self, current: _Open, match: Match, starts: Sequence[int], number: int) -> None:
        for item in match.items:
            line = number + sum(start <= item.start for start in starts[1:])
            current.last = max(current.last, line)
            if item.doubtful:
                current.builder.note(f"line {line}: the text ends inside or right after {item.slot.name}: its value is not used")
            if item.value is None:
                continue
            name = item.slot.name
            current.builder.lines.add(line)
            if name.startswith("gpr."):
                registers: Dict[str, int] = current.builder.extras.setdefault("registers", {})
                registers[name[4:]] = item.value
            elif name.startswith("vmsa."):
                vmsa: Dict[str, int] = current.builder.extras.setdefault("vmsa", {})
                vmsa[name[5:]] = item.value
            else:
                self._take_value(current, name, item.value, line, item.end - item.start)

    def _take_value(self, current: _Open, name: str, value: int, line: int, length: int) -> None:
        builder = current.builder
        halves = _WIDE.get(name)
        if halves:
            builder.add_name(halves[0], value & 0xFFFFFFFF, line)
            builder.add_name(halves[1], value >> 32, line)
        elif name == "exit.code":
            if value in NEGATIVE_EXITS and length < 16:
                builder.add_name("exit_code", value | 0xFFFFFFFF00000000, line, "printed with 32 of 64 bits, negative")
            else:
                builder.add_name("exit_code", value, line, "printed with 32 of 64 bits" if length < 16 else "")
        elif name in ("cr.read", "cr.write", "dr.read", "dr.write"):
            current.parts[name] = value
            what = name[:2]
            if f"{what}.read" in current.parts and f"{what}.write" in current.parts:
                # The low 16 bits intercept reads, the high 16 bits writes (APM vol. 2, appendix VMCB Layout, Control Area).
                builder.add_name(f"intercept_{what}", current.parts.pop(f"{what}.write") << 16 | current.parts.pop(f"{what}.read"), line)
        elif not name.startswith("flag.") and not builder.add_name(name, value, line):
            builder.note(f"line {line}: the value of {name} does not fit in the field")

    def _close(self) -> None:
        current = self._open
        self._open = None
        if current is None or not current.strong or not current.builder.seen:
            return
        for what in ("cr", "dr"):
            missing = {f"{what}.read", f"{what}.write"} & set(current.parts)
            if missing:
                current.builder.note(f"only half of the intercepts was found: intercept_{what} is unknown")
        self._finished.append(current)

    def _dumps(self) -> List[TextDump]:
        """The dumps; those that were printed at the same time as one, with what they agree on."""
        runs: List[List[_Open]] = []
        for found in self._finished:
            if runs and found.first - runs[-1][-1].last <= FARTHEST and found.builder.extras.get("vcpu") == runs[-1][-1].builder.extras.get("vcpu"):
                runs[-1].append(found)
            else:
                runs.append([found])
        dumps: List[TextDump] = []
        for run in runs:
            groups = [run] if mixed([_as_segment(found) for found in run]) else [[found] for found in run]
            dumps.extend(dump for dump in map(self._dump, groups) if dump is not None)
        return dumps

    def _dump(self, group: Sequence[_Open]) -> Optional[TextDump]:
        builder = group[0].builder
        for other in group[1:]:
            builder.notes += [note for note in other.builder.notes if note not in builder.notes]
            builder.lines |= other.builder.lines
            for key, found in other.builder.seen.items():
                builder.seen.setdefault(key, []).extend(found)
        if len(group) > 1:
            builder.keep_agreed()
        values = builder.settled()
        if not values:
            return None
        self._claimed |= builder.lines
        self.reserved |= self._lookalike
        first, last = min(builder.lines | {group[0].first}), max(builder.lines | {found.last for found in group})
        return TextDump("vmcb", self._dialect, in_field_order("vmcb", values), first, last, notes=builder.notes, extras=builder.extras)


_KVM_ALWAYS = tuple(f"kvm.{label}" for label in (
    "cr_read", "cr_write", "dr_read", "dr_write", "exceptions", "iopm_base_pa", "msrpm_base_pa", "tsc_offset", "asid", "tlb_ctl", "int_ctl",
    "int_vector", "int_state", "exit_code", "exit_info1", "exit_info2", "exit_int_info", "exit_int_info_err", "nested_cr3", "event_inj",
    "event_inj_err", "next_rip", "es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr", "cr0", "cr3", "dr6", "rip", "rsp", "star",
    "cstar", "kernel_gs_base", "sysenter_esp", "gpat", "br_from", "excp_from"))
_XEN_ALWAYS = tuple(f"xen.{label}" for label in (
    "cr_intercepts", "dr_intercepts", "exception_intercepts", "general1_intercepts", "general2_intercepts", "iopm_base_pa", "tlb_control", "vintr",
    "exitcode", "exitinfo1", "exitinfo2", "cpl", "CR0", "CR2", "CR3", "CR4", "RSP",
    "RIP", "RAX", "RFLAGS", "DR6", "DR7", "CSTAR", "SFMask", "KernGSBase", "PAT", "H_CR3", "cs", "ds", "ss", "es", "fs", "gs", "gdtr", "ldtr", "idtr",
    "tr"))
"""What every version prints, in its order."""


def _as_segment(found: _Open) -> Segment:
    order = _KVM_ALWAYS if found.dialect == KVM else _XEN_ALWAYS
    there = [index for index, name in enumerate(order) if name in found.phrases or name.replace("xen.", "xen-old.") in found.phrases]
    if not there:
        return Segment(starts=False, ends=False, hole=True)
    return Segment(starts=there[0] == 0, ends=there[-1] == len(order) - 1, hole=there[-1] - there[0] + 1 != len(there))


_CUT_LABELS = frozenset(("kvm.star", "kvm.sev_features", "xen.CR3"))
"""Labels that are the ends of others (lstar, guest_sev_features, H_CR3): at the very beginning of a text they can be cut ones."""

_WIDE: Mapping[str, Tuple[str, str]] = {
    "intercepts.both": ("intercept_misc1", "intercept_misc2"),
    "vintr.both": ("int_ctl", "int_vector"),
    "event_inj.both": ("event_inj", "event_inj_err"),
    "exit_int_info.both": ("exit_int_info", "exit_int_info_err"),
}
"""What is printed as one 64-bit word and is two fields (APM vol. 2, appendix VMCB Layout, Control Area)."""
