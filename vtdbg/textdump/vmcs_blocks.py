"""KVM's dump_vmcs and Xen's vmcs_dump_vcpu: three blocks of phrases, many of which are the same for the guest and the host.

"EFER= 0x0000000000000d01" does not say whose EFER it is.  Each phrase has a place in the order of printing; what stands in both blocks
is given to the block that its neighbours show, and to none where they do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

from vtdbg.textdump.lines import Follow, Line, Lines, is_gap, shown, streams
from vtdbg.textdump.model import Builder, Segment, TextDump, in_field_order, mixed
from vtdbg.textdump.phrases import Item, Match, Record, scan_joined, shape
from vtdbg.textdump.vmcs_phrases import ALWAYS, CONTROL, GUEST, HEADER_POSITION, HEADERS, HOST, XEN_FAIL_ZERO, Place, phrases, rows

KVM, XEN = "KVM dump_vmcs", "Xen vmcs_dump_vcpu"
FARTHEST = 200
"""Lines without a word of the dump after which it is over."""

_HEADER = re.compile(r"\*{2,}\s*(guest|host|control) state\b", re.IGNORECASE)
_AREA = re.compile(r"\*{3,} ?VMCS Areas? ?\*{3,}", re.IGNORECASE)
_POINTER = re.compile(r"\bVMCS ((?:0x)?[0-9a-f]{6,16}|\(____ptrval____\)|\(null\)), last attempted VM-entry on CPU (\d{1,5})(?!\d)", re.IGNORECASE)
_DOMAIN = re.compile(r">>> ?Domain (\d{1,5}) ?<<<", re.IGNORECASE)
_VCPU = re.compile(r"^VCPU (\d{1,5})$", re.IGNORECASE)
_HEADING = re.compile(r"^sel attr limit base$|^\*{6,}$", re.IGNORECASE)
_MSR_LIST = re.compile(r"^MSR ([a-z]+(?: [a-z]+)?):?$", re.IGNORECASE)
_MSR = re.compile(r"^\d{1,3}:? msr=0x([0-9a-f]{8}) value=0x([0-9a-f]{16})$", re.IGNORECASE)
_ENTRY_ERROR = re.compile(r"\bVM(LAUNCH|RESUME) error: ?0x([0-9a-f]{1,2})$", re.IGNORECASE)
_FAILURE = re.compile(r"vmentry failure|failed vm ?entry|caused by (?:invalid guest state|MSR|machine check)|VM-?entry fail", re.IGNORECASE)
_CONTEXT = re.compile(r"\bCONTEXT: (hvm guest|pv guest|hypervisor)\b")
_GPR = re.compile(r"\b(r[a-ds][xpi]|r8|r9|r1[0-5]): ([0-9a-f]{16})(?![0-9A-Za-z_])")
"""Xen's registers, in small letters; a Linux oops prints its own in capitals."""


@dataclass
class Event:
    """Something understood: a header, a phrase, an MSR entry, a gap.  `anchor` is the place that is beyond doubt."""

    line: int
    what: str
    anchor: Optional[Tuple[int, int]] = None
    match: Optional[Match] = None
    lines: Mapping[int, int] = field(default_factory=dict)
    """Line of each item, by the item's offset."""
    data: Tuple[str, ...] = ()
    rip_first: bool = False
    at_cut: bool = False
    """The text ends right after it, without a line end."""


def _events(lines: Lines, numbers: Sequence[int]) -> List[Event]:
    """What is understood of the candidate lines, in order."""
    events: List[Event] = []
    records: List[Tuple[Record, List[int], int]] = []
    shapes: Set[str] = set()
    done = 0
    gaps: List[Tuple[int, str]] = []
    for number in numbers:
        if number <= done:
            continue
        line = lines.line(number)
        plain = _plain_event(line.number, line.text) or _wrapped_event(lines, line)
        if plain:
            events.append(plain)
            done = max(plain.lines.values(), default=number)
            continue
        follow = Follow(lines, number, _HEADER)
        record, starts = scan_joined(phrases(), line.text, follow)
        if record.matches:
            records.append((record, starts, number))
            if any(match.phrase.strong and match.good for match in record.matches):
                shapes.add(shape(record.lead))
            done = number + len(starts) - 1
        elif is_gap(line.text):
            gaps.append((number, line.text))
    for record, starts, number in records:
        if number == 1 and lines.first_is_cut and not record.lead:
            # What stands before a label is cut off: "my_handler: CR3 = " looks like "CR3 = ".
            record = replace(record, clean=False)
        known = not record.lead or shape(record.lead) in shapes or not any(character.isalnum() for character in record.lead)
        for match in record.matches:
            if match.good and (match.phrase.strong or (record.clean and known)):
                event = _phrase_event(match, record, starts, number)
                event.at_cut = match is record.matches[-1] and _ends_open(lines, number + len(starts) - 1)
                events.append(event)
            elif match.phrase.strong or (record.clean and known):
                events.append(Event(number, "damaged", data=(match.phrase.id,)))
    events.extend(Event(number, "gap", data=(text,)) for number, text in gaps)
    return sorted(events, key=lambda event: event.line)


def _ends_open(lines: Lines, number: int) -> bool:
    """A remark after line `number` can be missing: the text ends there, or in the middle of the remark."""
    following = lines.next_soft(number)
    return lines.ends_open and (number == lines.last or (following is not None and following.number == lines.last and following.text[:1] == "("))


def _phrase_event(match: Match, record: Record, starts: Sequence[int], number: int) -> Event:
    where = {item.start: number + sum(start <= item.start for start in starts[1:]) for item in match.items}
    row = rows()[match.phrase.id]
    anchor = None
    if match.tag in ("effective", "autoload"):
        # Only the guest's EFER is printed with a remark.
        anchor = (GUEST, 20)
    elif len(row.places) == 1:
        anchor = row.places[0][:2]
    names = [other.phrase.id for other in record.matches]
    rip_first = "rip" in names and "rsp" in names and names.index("rip") < names.index("rsp")
    return Event(where[match.items[0].start], "phrase", anchor, match, where, rip_first=rip_first)


_AROUND = ((_POINTER, "pointer"), (_AREA, "area"), (_DOMAIN, "domain"), (_VCPU, "vcpu"), (_MSR_LIST, "msrlist"), (_MSR, "msr"),
           (_ENTRY_ERROR, "error"), (_CONTEXT, "context"))


def _plain_event(number: int, text: str) -> Optional[Event]:
    """Headers and the lines around a dump."""
    header = _HEADER.search(text)
    if header:
        block = HEADERS[header.group(1).lower()]
        return Event(number, "header", (block, HEADER_POSITION[block]))
    for pattern, what in _AROUND:
        match = pattern.search(text)
        if match:
            return Event(number, what, data=tuple(match.groups()))
    if _HEADING.match(text):
        return Event(number, "heading")
    registers = _GPR.findall(text)
    if registers and text.startswith(registers[0][0]):
        return Event(number, "gpr", data=tuple(part for pair in registers for part in pair))
    if _FAILURE.search(text):
        return Event(number, "failure", data=(text,))
    return None


def _wrapped_event(lines: Lines, line: Line) -> Optional[Event]:
    """A header that is broken into two lines."""
    following = lines.next_soft(line.number)
    if following is None:
        return None
    joined = f"{line.text} {following.text}"
    for pattern in (_HEADER, _POINTER, _AREA, _DOMAIN, _MSR_LIST, _MSR):
        match = pattern.search(joined)
        if match and match.start() < len(line.text) < match.end():
            event = _plain_event(line.number, joined[match.start():match.end()])
            if event is not None:
                event.lines = {0: following.number}
            return event
    return None


_INSIDE = frozenset(("header", "phrase", "msr", "msrlist", "pointer"))
_OPENING = frozenset(("pointer", "domain", "vcpu", "area"))
_HELD = frozenset(("failure", "error"))
"""Xen says what failed before it dumps: such a line belongs to the next dump if one begins before this one goes on."""


class _Splitter:
    """Cuts events into pieces that can each be of one dump: in the order of the blocks, every phrase once."""

    def __init__(self) -> None:
        self.pieces: List[List[Event]] = []
        self._current: List[Event] = []
        self._held: List[Event] = []
        self._seen: Set[str] = set()
        self._headers: Set[int] = set()
        self._last_block = -1
        self._last_line = 0

    def take(self, event: Event) -> None:
        if event.what in _HELD:
            self._held.append(event)
            return
        if self._current and self._begins(event):
            self.pieces.append(self._current)
            self._current, self._seen, self._headers, self._last_block = [], set(), set(), -1
        self._current += self._held + [event]
        self._held = []
        if event.what in _INSIDE:
            self._last_line = event.line
        if _identity(event):
            self._seen.add(_identity(event))
        if event.anchor is not None:
            self._last_block = max(self._last_block, event.anchor[0])
            if event.what == "header":
                self._headers.add(event.anchor[0])

    def finish(self) -> List[List[Event]]:
        self._current += self._held
        return self.pieces + [self._current] if self._current else self.pieces

    def _begins(self, event: Event) -> bool:
        """Whether this event cannot be of the piece that is being collected."""
        if event.what in _INSIDE and self._last_line and event.line - self._last_line > FARTHEST:
            return True
        if _identity(event) in self._seen:
            return True
        if event.anchor is None:
            return event.what in _OPENING
        block = event.anchor[0]
        if event.what != "header":
            return block < self._last_block
        return block in self._headers or block < self._last_block or (block == GUEST and self._last_block == GUEST)


def _identity(event: Event) -> str:
    """What a dump prints once; empty for what it can print twice."""
    if event.match is None:
        return ""
    row = rows()[event.match.phrase.id]
    return row.phrase.id if len(row.places) < 2 else ""


def _positions(event: Event) -> Set[int]:
    """The positions that a phrase can have, its value whole or not."""
    identifier = event.match.phrase.id if event.match is not None else event.data[0] if event.what == "damaged" else ""
    return {place[1] for place in rows()[identifier].places} if identifier else set()


def _runs(pieces: Sequence[List[Event]]) -> List[List[List[Event]]]:
    """Pieces that follow each other with nothing in between that tells them apart."""
    runs: List[List[List[Event]]] = []
    last = -FARTHEST
    for piece in pieces:
        apart = piece[0].what in ("domain", "vcpu") or piece[0].line - last > FARTHEST
        if apart or not runs:
            runs.append([])
        runs[-1].append(piece)
        last = piece[-1].line
    return runs


def _as_segment(piece: Sequence[Event]) -> Segment:
    positions = [event.anchor[1] for event in piece if event.anchor is not None]
    present: Set[int] = set(positions)
    for event in piece:
        present |= _positions(event)
    starts = piece[0].what in _OPENING or (bool(positions) and positions[0] <= 1)
    low, high = (1 if starts else min(positions, default=1)), max(positions, default=0)
    hole = any(low < position < high and position not in present for position in ALWAYS)
    return Segment(starts, high >= 66, hole)


def resolve(events: Sequence[Event], index: int) -> Optional[Place]:
    """The place of the phrase at `index`: the only one that its neighbours allow, or the one right beside a neighbour."""
    event = events[index]
    assert event.match is not None
    row = rows()[event.match.phrase.id]
    places = [place for place in row.places if event.anchor is None or place[0] == event.anchor[0]]
    if event.rip_first and row.phrase.id in ("rip", "rsp"):
        # Only the host's line begins with RIP.
        places = [place for place in places if place[0] == HOST]
    if not row.places:
        return (CONTROL, 0, "")
    if len(places) <= 1:
        return places[0] if places else None
    before, after = _neighbour(events, index, -1), _neighbour(events, index, 1)
    fitting: List[Place] = []
    beside: List[Place] = []
    for place in places:
        position = place[1]
        if (before.position is not None and before.position > position) or (after.position is not None and after.position < position):
            continue
        fitting.append(place)
        if before.beside(position) or after.beside(position):
            beside.append(place)
    if len(beside) == 1:
        return beside[0]
    if len(fitting) == 1 and (before.position is not None or after.position is not None):
        return fitting[0]
    return None


@dataclass(frozen=True)
class _Neighbour:
    """The nearest phrase in one direction whose place is beyond doubt."""

    position: Optional[int]
    gap: bool
    """The text says that lines are missing in between."""
    present: FrozenSet[int]
    """Positions that the doubtful phrases in between can have."""

    def beside(self, position: int) -> bool:
        """Nothing that is always printed is missing between this and `position`."""
        if self.position is None or self.gap:
            return False
        low, high = min(self.position, position), max(self.position, position)
        return not any(low < other < high and other not in self.present for other in ALWAYS)


def _neighbour(events: Sequence[Event], index: int, step: int) -> _Neighbour:
    gap = False
    present: Set[int] = set()
    at = index + step
    while 0 <= at < len(events):
        event = events[at]
        gap |= event.what == "gap"
        if event.anchor is not None:
            return _Neighbour(event.anchor[1], gap, frozenset(present))
        present |= _positions(event)
        at += step
    return _Neighbour(None, gap, frozenset(present))


def _strong_enough(events: Sequence[Event]) -> bool:
    """Something that only such a dump prints: a phrase of its own, or three values in the right form on one line."""
    return any(event.match is not None and (event.match.phrase.strong or event.match.good == len(event.match.phrase.slots) >= 3)
               for event in events)


def _build(pieces: Sequence[Sequence[Event]], claimed: Set[int]) -> Optional[TextDump]:
    """One dump of its events; of several pieces that were printed at the same time, what they agree on."""
    inside = [event for piece in pieces for event in piece if event.what in _INSIDE]
    if not inside or not _strong_enough(inside):
        return None
    reading = _Reading(mixed=len(pieces) > 1)
    for piece in pieces:
        for index in range(len(piece)):
            reading.take(piece, index)
    builder = reading.builder
    if not builder.seen:
        return None
    if reading.lists:
        builder.extras["msr_lists"] = reading.lists
    old = any(event.match is not None and event.match.phrase.id.startswith("xen-old") for event in inside)
    _finish(builder, xen=reading.xen, old=old)
    if reading.mixed:
        builder.keep_agreed()
    values = builder.settled()
    if not values:
        return None
    first, last = inside[0].line, max(max([event.line, *event.lines.values()]) for event in inside)
    claimed |= (builder.lines | {event.line for event in inside}) - reading.unread
    return TextDump("vmcs", XEN if reading.xen else KVM, in_field_order("vmcs", values), first, last, notes=builder.notes, extras=builder.extras)


class _Reading:
    """The values of one dump, as its events are gone through."""

    def __init__(self, *, mixed: bool) -> None:
        self.mixed = mixed
        self.builder = Builder("vmcs")
        self.unread: Set[int] = set()
        self.lists: Dict[str, List[Tuple[int, int]]] = {}
        self.xen = False
        self._list: Optional[str] = None

    def take(self, piece: Sequence[Event], index: int) -> None:
        event = piece[index]
        self.builder.lines.update(event.lines.values() if event.match is None else ())
        if event.match is not None:
            self._list = None
            self._take_phrase(piece, index, event.match)
        elif event.what == "msrlist":
            self._list = event.data[0].lower()
            self.lists.setdefault(self._list, [])
            self.builder.lines.add(event.line)
        elif event.what == "msr" and self._list is not None:
            self.lists[self._list].append((int(event.data[0], 16), int(event.data[1], 16)))
            self.builder.lines.add(event.line)
        elif event.what == "gap":
            self.builder.note(f"line {event.line}: lines are missing here ({shown(event.data[0], 80)})")
            self.builder.lines.add(event.line)
        elif event.what in ("msr", "damaged"):
            self.unread.add(event.line)
        else:
            self.xen |= _take_context(self.builder, event)

    def _take_phrase(self, piece: Sequence[Event], index: int, match: Match) -> None:
        event = piece[index]
        place = resolve(piece, index)
        if self.mixed and len(rows()[match.phrase.id].places) > 1:
            place = None
        if place is None:
            self.unread.add(event.line)
            self.builder.note(f"line {event.line}: nothing says whether {match.items[0].slot.name.strip('_')} is the guest's or the host's")
            return
        self.xen |= match.phrase.id.startswith(("xen", "pdpte", "preemption", "smbase"))
        _take(self.builder, event, place, self.unread)


def _take(builder: Builder, event: Event, place: Place, unread: Set[int]) -> None:
    """The values of one phrase."""
    match = event.match
    assert match is not None
    parts: Dict[str, int] = {}
    for item in match.items:
        line = event.lines[item.start]
        if item.value is None:
            unread.add(line)
            continue
        builder.lines.add(line)
        name = item.slot.name
        if name.islower() or "." in name:
            parts[name] = item.value
        elif match.tag in ("effective", "autoload"):
            _effective(builder, match.tag, item, line)
        elif event.at_cut and place[2] + name[1:] == "GUEST_IA32_EFER":
            unread.add(line)
            builder.note(f"line {line}: the text ends where KVM can say that this EFER is no field: it is not used")
        elif not builder.add_name(place[2] + name[1:] if name.startswith("_") else name, item.value, line):
            unread.add(line)
    _take_parts(builder, event, parts, match)
    if match.unfinished and match.good < len(match.phrase.slots):
        unread.add(max(event.lines.values()))


def _effective(builder: Builder, tag: str, item: Item, line: int) -> None:
    assert item.value is not None
    builder.extras["effective_efer"] = item.value
    builder.extras["effective_efer_line"] = line
    what = "computed by KVM" if tag == "effective" else "from the VM-entry MSR-load list"
    builder.note(f"line {line}: EFER {item.value:#x} is {tag}: {what}, not the field; GUEST_IA32_EFER is unknown")


def _take_parts(builder: Builder, event: Event, parts: Dict[str, int], match: Match) -> None:
    """Values that are no whole field."""
    if "svi" in parts and "rvi" in parts:
        builder.add_name("GUEST_INTR_STATUS", parts["svi"] << 8 | parts["rvi"], event.line)
    if "efer.list" in parts:
        builder.extras["effective_efer"] = parts["efer.list"]
        builder.note(f"line {event.line}: EFER {parts['efer.list']:#x} is from the MSR-load list, not the field; GUEST_IA32_EFER is unknown")
    now = {name[4:]: value for name, value in parts.items() if name.startswith("now.")}
    if now:
        current: Dict[str, int] = builder.extras.setdefault("current", {})
        current.update(now)
    if match.phrase.id == "ve_info" and len(parts) == 6:
        builder.extras["ve_info"] = {name[3:]: value for name, value in parts.items()}
    if match.phrase.id == "ve" and match.tag:
        builder.note(f"line {event.line}: KVM says that the #VE information address is corrupted")


def _take_context(builder: Builder, event: Event) -> bool:
    """Lines around the values.  True where they are Xen's."""
    builder.lines.add(event.line)
    if event.what == "pointer":
        builder.note(f"VMCS pointer {event.data[0]}, last attempted VM-entry on CPU {event.data[1]}")
        builder.extras["cpu"] = int(event.data[1])
        return False
    if event.what in ("domain", "vcpu"):
        builder.extras[event.what] = int(event.data[0])
    elif event.what == "failure":
        builder.extras.setdefault("failures", []).append(event.data[0])
    elif event.what == "error":
        builder.extras["instruction_error"] = (event.data[0].upper(), int(event.data[1], 16), event.line)
    elif event.what == "context":
        builder.extras["context"] = event.data[0].lower()
    elif event.what == "gpr" and builder.extras.get("context") == "hvm guest":
        registers: Dict[str, int] = builder.extras.setdefault("registers", {})
        registers.update({event.data[i].lower(): int(event.data[i + 1], 16) for i in range(0, len(event.data), 2)})
    return event.what in ("area", "domain", "vcpu", "error")


def _finish(builder: Builder, *, xen: bool, old: bool) -> None:
    """What only the whole dump shows."""
    error: Any = builder.extras.get("instruction_error")
    if error:
        instruction, number, line = error
        builder.add_name("VM_INSTRUCTION_ERROR", number, line, f"VM{instruction} error")
        builder.remark("VM_EXIT_REASON", f"stale: VM{instruction} failed with error {number}, this is of an earlier exit")
        builder.note(f"VM{instruction} failed with VM-instruction error {number}: reason= and qualification= are of an earlier exit")
    if old and builder.has("VM_EXIT_INSTRUCTION_LEN"):
        # vmcs_dump_vcpu of Xen 4.2 prints VM_ENTRY_INSTRUCTION_LEN in this place.
        del builder.seen[_encoding("VM_EXIT_INSTRUCTION_LEN")]
        builder.note("this version of Xen prints the VM-entry instruction length as VMExit ilen: the VM-exit instruction length is unknown")
    if not xen and not old:
        for name, activate in (("TERTIARY_VM_EXEC_CONTROL", 17), ("SECONDARY_VM_EXEC_CONTROL", 31)):
            if builder.value(name) == 0 and not (builder.value("CPU_BASED_VM_EXEC_CONTROL") or 0) >> activate & 1:
                builder.remark(name, "KVM prints 0 also where the processor has no such controls")
    if xen or old:
        zero = [name for name in sorted(XEN_FAIL_ZERO) if builder.value(name) == 0]
        for name in zero:
            builder.remark(name, "Xen prints 0 also for a field that the processor lacks")


def _encoding(name: str) -> int:
    from vtdbg.vmx import fields

    return fields.find(name).encoding


def parse(lines: Lines, candidates: Sequence[int], claimed: Set[int], reserved: Set[int]) -> List[TextDump]:
    """The KVM and Xen VMCS dumps in `lines`.

    Adds the lines that were understood to `claimed`, and those that look like the dump's, understood or not, to `reserved`.
    """
    dumps: List[TextDump] = []
    for numbers in streams(lines, candidates).values():
        splitter = _Splitter()
        events = _events(lines, numbers)
        for event in events:
            splitter.take(event)
        for run in _with_context(splitter.finish()):
            if mixed([_as_segment(piece) for piece in run]):
                found = [_build(run, claimed)]
            else:
                found = [_build([piece], claimed) for piece in run]
            dumps.extend(dump for dump in found if dump is not None)
        if dumps:
            reserved.update(event.line for event in events)
    return dumps


def _with_context(pieces: Sequence[List[Event]]) -> List[List[List[Event]]]:
    """Runs of dumps.  "Domain 1", "VCPU 0" and the failure line are put to the dump after them."""
    whole: List[List[Event]] = []
    pending: List[Event] = []
    for piece in pieces:
        if not _strong_enough(piece):
            pending += [event for event in piece if event.what in _OPENING or event.what in _HELD]
            continue
        whole.append(pending + piece)
        # The domain is said once for all its vCPUs.
        pending = [event for event in pending + piece if event.what == "domain"]
    return _runs(whole)
