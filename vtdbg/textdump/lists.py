"""Lists of fields, one a line: hvext's `!dump_vmcs`, HAXM's log, VirtualBox' names, and what people print themselves.

hvext: `0x0000000000000010 Guest CS selector` (github.com/tandasat/hvext, hvext_intel.js, 2025).
HAXM: `4012 VMX_ENTRY_CONTROLS: 11ff` (github.com/intel/haxm, core/dump_vmcs.c): hexadecimal without padding.
Generic: any name that the field table knows, or an encoding, and a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from vtdbg.record import name_key
from vtdbg.textdump.lines import Lines, is_gap, shown, word_set
from vtdbg.textdump.model import Builder, Segment, TextDump, in_field_order, mixed
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.fields import VmcsField

FARTHEST = 200
HVEXT, HAXM, GENERIC = "hvext !dump_vmcs", "HAXM", "field list"

HAXM_ORDER: Tuple[int, ...] = (
    0x4000, 0x4002, 0x401E, 0x4004, 0x4006, 0x4008, 0x400C, 0x400E, 0x4010, 0x4012, 0x4014, 0x4016, 0x4018, 0x401A, 0x401C, 0x6000, 0x6002, 0x6004,
    0x6006, 0x400A, 0x6008, 0x0000, 0x2000, 0x2002, 0x2004, 0x2006, 0x2008, 0x200A, 0x2010, 0x2012, 0x2014, 0x201A, 0x482E, 0x4400, 0x4402, 0x4404,
    0x4406, 0x4408, 0x440A, 0x440C, 0x440E, 0x6400, 0x6402, 0x6404, 0x6406, 0x6408, 0x640A, 0x2400, 0x6C16, 0x6C14, 0x6C00, 0x6C02, 0x6C04, 0x0C02,
    0x0C06, 0x0C00, 0x0C08, 0x0C0A, 0x0C04, 0x0C0C, 0x6C06, 0x6C08, 0x6C0A, 0x6C0C, 0x6C0E, 0x4C00, 0x6C10, 0x6C12, 0x681E, 0x6820, 0x681C, 0x6800,
    0x6802, 0x6804, 0x0800, 0x0802, 0x0804, 0x0806, 0x0808, 0x080A, 0x080C, 0x080E, 0x4814, 0x4816, 0x4818, 0x481A, 0x481C, 0x481E, 0x4820, 0x4822,
    0x6806, 0x6808, 0x680A, 0x680C, 0x680E, 0x6810, 0x6812, 0x6814, 0x6816, 0x6818, 0x4800, 0x4802, 0x4804, 0x4806, 0x4808, 0x480A, 0x480C, 0x480E,
    0x4810, 0x4812, 0x2800, 0x2802, 0x2804, 0x2806, 0x2808, 0x280A, 0x280C, 0x280E, 0x2810, 0x681A, 0x6822, 0x482A, 0x6824, 0x6826, 0x4828, 0x4824,
    0x4826,
)
"""The order in which HAXM prints (core/dump_vmcs.c, dump_vmcs_list): lines that go back in it are of another processor."""

_HAXM_PLACE: Mapping[int, int] = {encoding: place for place, encoding in enumerate(HAXM_ORDER)}

_VBOX: Mapping[str, str] = {
    "CTRL_PIN_EXEC": "PIN_BASED_VM_EXEC_CONTROL", "CTRL_PROC_EXEC": "CPU_BASED_VM_EXEC_CONTROL", "CTRL_PROC_EXEC2": "SECONDARY_VM_EXEC_CONTROL",
    "CTRL_EXCEPTION_BITMAP": "EXCEPTION_BITMAP", "CTRL_PAGEFAULT_ERROR_MASK": "PAGE_FAULT_ERROR_CODE_MASK",
    "CTRL_PAGEFAULT_ERROR_MATCH": "PAGE_FAULT_ERROR_CODE_MATCH", "CTRL_CR3_TARGET_COUNT": "CR3_TARGET_COUNT", "CTRL_EXIT": "VM_EXIT_CONTROLS",
    "CTRL_EXIT_MSR_STORE_COUNT": "VM_EXIT_MSR_STORE_COUNT", "CTRL_EXIT_MSR_LOAD_COUNT": "VM_EXIT_MSR_LOAD_COUNT", "CTRL_ENTRY": "VM_ENTRY_CONTROLS",
    "CTRL_ENTRY_MSR_LOAD_COUNT": "VM_ENTRY_MSR_LOAD_COUNT", "CTRL_ENTRY_INTERRUPTION_INFO": "VM_ENTRY_INTR_INFO_FIELD",
    "CTRL_ENTRY_EXCEPTION_ERRCODE": "VM_ENTRY_EXCEPTION_ERROR_CODE", "CTRL_ENTRY_INSTR_LENGTH": "VM_ENTRY_INSTRUCTION_LEN",
    "CTRL_TPR_THRESHOLD": "TPR_THRESHOLD", "CTRL_CR0_MASK": "CR0_GUEST_HOST_MASK", "CTRL_CR4_MASK": "CR4_GUEST_HOST_MASK",
    "CTRL_CR0_READ_SHADOW": "CR0_READ_SHADOW", "CTRL_CR4_READ_SHADOW": "CR4_READ_SHADOW", "CTRL_EPTP": "EPT_POINTER", "CTRL_MSR_BITMAP": "MSR_BITMAP",
    "CTRL_TSC_OFFSET": "TSC_OFFSET", "CTRL_IO_BITMAP_A": "IO_BITMAP_A", "CTRL_IO_BITMAP_B": "IO_BITMAP_B",
    "RO_VM_INSTR_ERROR": "VM_INSTRUCTION_ERROR",
    "RO_EXIT_REASON": "VM_EXIT_REASON", "RO_EXIT_INTERRUPTION_INFO": "VM_EXIT_INTR_INFO",
    "RO_EXIT_INTERRUPTION_ERROR_CODE": "VM_EXIT_INTR_ERROR_CODE", "RO_IDT_VECTORING_INFO": "IDT_VECTORING_INFO_FIELD",
    "RO_IDT_VECTORING_ERROR_CODE": "IDT_VECTORING_ERROR_CODE", "RO_EXIT_INSTR_LENGTH": "VM_EXIT_INSTRUCTION_LEN",
    "RO_EXIT_INSTR_INFO": "VMX_INSTRUCTION_INFO", "RO_EXIT_QUALIFICATION": "EXIT_QUALIFICATION", "RO_GUEST_LINEAR_ADDR": "GUEST_LINEAR_ADDRESS",
    "RO_GUEST_PHYS_ADDR": "GUEST_PHYSICAL_ADDRESS", "GUEST_INT_STATE": "GUEST_INTERRUPTIBILITY_INFO", "GUEST_VMCS_LINK_PTR": "VMCS_LINK_POINTER",
    "GUEST_DEBUGCTL": "GUEST_IA32_DEBUGCTL", "GUEST_PAT": "GUEST_IA32_PAT", "GUEST_EFER": "GUEST_IA32_EFER", "HOST_PAT": "HOST_IA32_PAT",
    "HOST_EFER": "HOST_IA32_EFER", "GUEST_PENDING_DEBUG_XCPTS": "GUEST_PENDING_DBG_EXCEPTIONS", "PREEMPT_TIMER_VALUE": "VMX_PREEMPTION_TIMER_VALUE",
    "HOST_SYSENTER_CS": "HOST_IA32_SYSENTER_CS", "HOST_SYSENTER_ESP": "HOST_IA32_SYSENTER_ESP", "HOST_SYSENTER_EIP": "HOST_IA32_SYSENTER_EIP",
    "GUEST_PDPTE0": "GUEST_PDPTR0", "GUEST_PDPTE1": "GUEST_PDPTR1", "GUEST_PDPTE2": "GUEST_PDPTR2", "GUEST_PDPTE3": "GUEST_PDPTR3",
}
"""VirtualBox' names without VMX_VMCS32_ and _FULL (include/VBox/vmm/hm_vmx.h), where they are not Linux' own."""

PAIR = re.compile(r"(?<!\w)0x(?:0000)?[0-9a-f]{4}[\s:=\])>-]{1,6}0x[0-9a-f]", re.IGNORECASE)
"""An encoding and a value, without a word."""

_SHARED = 0x2010
"""TSC_OFFSET: a VMCB has a field of the same name."""

_VBOX_NAME = re.compile(r"VMX_VMCS(?:16|32|64)?_(\w+?)(?:_(FULL|HIGH))?", re.IGNORECASE)

_EXTRA_TITLES: Mapping[str, int] = {"Last PID-pointer": 0x0008}
"""hvext's titles that differ from the manual's."""

_HVEXT = re.compile(r"^0x([0-9a-f]{16}) ([A-Za-z][\w /()-]{1,70})$", re.IGNORECASE)
_HVEXT_FAILED = re.compile(r"^\*{3,} ?FAILED ?\*{3,} ([A-Za-z][\w /()-]{1,70})$")
_HAXM = re.compile(r"(?<![\w.])([0-9a-f]{4}) ((?:VMX|VM_EXIT_INFO|HOST|GUEST)_\w{2,50}) ?: ?([0-9a-f]{1,16})(?![\w.]|\u2026)", re.IGNORECASE)
_VALUE = (r"(?P<value>0[xX][0-9a-fA-F]{1,16}(?:[`'][0-9a-fA-F]{8})?|0n\d{1,20}|[0-9a-fA-F]{1,8}[`'][0-9a-fA-F]{8}|[0-9a-fA-F]{1,20}[hH]?)"
          r"(?![\w.`'%]|\u2026)")
_SIGN = r" ?(?:[:=]{1,2}>?|->|\u2192|(?= )) ?"
_NAMED = re.compile(r"(?<![\w$.])(?P<name>[A-Za-z][A-Za-z0-9]{0,20}(?:_[A-Za-z0-9]{1,30}){1,9})"
                    r"(?: ?[\[(] ?(?:0x)?(?P<encoding>[0-9a-fA-F]{1,8})h? ?[\])])?" + _SIGN + _VALUE)
_TITLED = re.compile(r"^(?:0x[0-9a-f]{1,8} )?(?P<name>[A-Za-z][A-Za-z0-9_ /().-]{3,70}?)(?: ?\[ ?(?:0x)?[0-9a-f]{1,8}h? ?\])?"
                     r" ?(?:[:=]{1,2}>?|->) ?" + _VALUE + r"[.,; ]*$", re.IGNORECASE)
_ENCODED = re.compile(r"^(?:vmread ?\(? ?|field ?|\[ ?)?0x(?P<encoding>[0-9a-fA-F]{4}|0000[0-9a-fA-F]{4}) ?[\])]?"
                      r"(?: ?(?P<name>[A-Za-z][A-Za-z0-9_ /().-]{0,70}?))?" + _SIGN + _VALUE + r"[.,; ]*$")
_SHORT = word_set("""cr0 cr3 cr4 rsp rip rflags dr7 eptp vpid fs_base gs_base tr_base es_base cs_base ss_base ds_base io_rip io_rcx io_rsi io_rdi
                      smbase pinv hkid pmladdr""")
"""Aliases that many other programs print for other things."""


@dataclass(frozen=True)
class Entry:
    """A field and its value on a line.  `digits` as printed, `marked` when something says that they are hexadecimal."""

    line: int
    encoding: int
    value: Optional[int]
    digits: str
    marked: bool
    half: bool = False
    doubtful: bool = False


@cache
def _titles() -> Dict[str, int]:
    """The manual's titles, with and without what stands in parentheses."""
    found = {name_key(title): encoding for title, encoding in _EXTRA_TITLES.items()}
    for encoding, row in vmcs_fields.fields().items():
        for title in (row.title, row.name, re.sub(r" ?\([^)]*\)", "", row.title)):
            found.setdefault(name_key(title), encoding)
    return found


@cache
def keywords() -> FrozenSet[str]:
    """Lower-case words one of which stands in every line that can matter: names, the first words of titles, hypervisors' own prefixes."""
    found = {"vmread", "field", "guest", "host", "qualification"} | {name.lower() for name in _VBOX}
    for row in vmcs_fields.fields().values():
        names = [name.lower() for name in row.aliases + (row.name,)]
        found.update(names + [f"{name}_{ending}" for name in names for ending in ("full", "high")])
        found.update(re.findall(r"[a-z_][a-z0-9_]*", row.title.lower())[:1])
    common = word_set("address last exit original instruction exception page secondary primary virtual i high low shared io reserved")
    return frozenset(found - common)


@cache
def markers() -> FrozenSet[str]:
    """Lower-case words that other logs seldom have."""
    return (keywords() - _SHORT - word_set("apic field idt msr pid sub vm vmx")) | word_set("""
        vmx_pin_controls vmx_primary_processor_controls vmx_secondary_processor_controls vmx_exception_bitmap vmx_exit_controls vmx_entry_controls
        vmx_entry_interrupt_info vmx_cr0_mask vmx_cr4_mask vmx_cr0_read_shadow vmx_vpid vmx_io_bitmap_a vmx_msr_bitmap vmx_tsc_offset vmx_eptp
        vmx_instruction_error_code vm_exit_info_reason vm_exit_info_qualification vm_exit_info_idt_vectoring guest_vmcs_link_ptr guest_pdpte0
        guest_interruptibility guest_pending_dbe""")


def _by_title(title: str) -> Optional[VmcsField]:
    encoding = _titles().get(name_key(title))
    return vmcs_fields.fields()[encoding] if encoding is not None else None


def _by_name(name: str) -> Tuple[Optional[VmcsField], bool]:
    """(field, the name is that of its high half)."""
    if name.lower() in _SHORT:
        return None, False
    found = vmcs_fields.get(name)
    if found is not None:
        return found, False
    upper = name.upper()
    box = _VBOX_NAME.fullmatch(upper)
    if box:
        plain = re.sub(r"_ACCESS_RIGHTS$", "_AR_BYTES", re.sub(r"_SEL$", "_SELECTOR", _VBOX.get(box.group(1), box.group(1))))
        return vmcs_fields.get(plain), box.group(2) == "HIGH"
    for ending in ("_HIGH", "_FULL"):
        if upper.endswith(ending):
            found = vmcs_fields.get(name[:-len(ending)])
            if found is not None and found.width == "64":
                return found, ending == "_HIGH"
    return None, False


def _number(text: str) -> Tuple[Optional[int], str, bool]:
    """(value, its digits, hexadecimal for sure)."""
    plain = text.replace("`", "").replace("'", "")
    if plain[:2].lower() == "0x":
        return int(plain[2:], 16), plain[2:], True
    if plain[:2].lower() == "0n":
        return int(plain[2:]), plain[2:], True
    if plain[-1] in "hH":
        return int(plain[:-1], 16), plain[:-1], True
    if len(plain) > 16:
        return None, plain, False
    return int(plain, 16), plain, plain != text or bool(re.search(r"[a-fA-F]", plain)) or (plain.startswith("0") and len(plain) > 1)


def _generic(line: int, text: str, cut: bool) -> List[Entry]:
    """Fields on one line by name, title or encoding."""
    entries: List[Entry] = []
    for match in _NAMED.finditer(text):
        row, half = _by_name(match.group("name"))
        if row is None:
            continue
        if match.group("encoding") and int(match.group("encoding"), 16) & ~1 != row.encoding:
            continue
        entries.append(_entry(line, row, match.group("value"), half=half, doubtful=cut and match.end() == len(text)))
    if entries:
        return entries
    encoded = _ENCODED.match(text)
    if encoded:
        number = int(encoded.group("encoding"), 16)
        row = vmcs_fields.get(number)
        if encoded.group("name") and row not in (_by_name(encoded.group("name"))[0], _by_title(encoded.group("name"))):
            return []
        return [_entry(line, row, encoded.group("value"), half=bool(number & 1), doubtful=cut)] if row else []
    titled = _TITLED.match(text)
    if titled:
        row = _by_title(titled.group("name"))
        return [_entry(line, row, titled.group("value"), half=False, doubtful=cut)] if row else []
    return []


def _entry(line: int, row: VmcsField, text: str, *, half: bool, doubtful: bool) -> Entry:
    value, digits, marked = _number(text)
    if value is not None and value >> ((4 if half else row.size) * 8):
        value = None
    return Entry(line, row.encoding, value, digits, marked, half, doubtful and len(digits) < row.digits and digits != "0")


def _haxm(line: int, text: str, cut: bool) -> List[Entry]:
    entries = []
    for match in _HAXM.finditer(text):
        row = vmcs_fields.get(int(match.group(1), 16))
        if row is None or int(match.group(1), 16) & 1:
            continue
        doubtful = cut and match.end() == len(text) and match.group(3) != "0"
        value = int(match.group(3), 16)
        entries.append(Entry(line, row.encoding, None if doubtful or value >> (row.size * 8) else value, match.group(3), marked=True,
                             doubtful=doubtful))
    return entries


def _hvext(line: int, text: str) -> List[Entry]:
    match = _HVEXT.match(text)
    row = _by_title(match.group(2)) if match else None
    if match is None or row is None:
        return []
    value = int(match.group(1), 16)
    return [Entry(line, row.encoding, None if value >> (row.size * 8) else value, match.group(1), marked=True)]


def _runs(entries: Sequence[Tuple[str, Entry]]) -> Iterator[Tuple[str, List[Entry]]]:
    """Entries of one dialect that stand near each other."""
    run: List[Entry] = []
    dialect = ""
    for kind, entry in entries:
        if run and (kind != dialect or entry.line - run[-1].line > FARTHEST):
            yield dialect, run
            run = []
        dialect = kind
        run.append(entry)
    if run:
        yield dialect, run


def _parts(dialect: str, run: Sequence[Entry]) -> List[List[Entry]]:
    """The run cut where a field is printed again, or where HAXM's order goes back."""
    parts: List[List[Entry]] = [[]]
    seen: Set[Tuple[int, bool]] = set()
    last = -1
    for entry in run:
        key = (entry.encoding, entry.half)
        place = _HAXM_PLACE.get(entry.encoding, last) if dialect == HAXM else last
        if key in seen or place < last:
            parts.append([])
            seen = set()
        last = place
        seen.add(key)
        parts[-1].append(entry)
    return parts


def _interleaved(dialect: str, parts: Sequence[Sequence[Entry]]) -> bool:
    """Whether the parts are dumps that were printed at the same time, not one after the other."""
    if len(parts) < 2 or dialect == HVEXT:
        return False
    if dialect == HAXM:
        places = [[_HAXM_PLACE[entry.encoding] for entry in part if entry.encoding in _HAXM_PLACE] for part in parts]
        end = len(HAXM_ORDER) - 1
        return mixed([Segment(starts=row[0] == 0, ends=row[-1] == end, hole=row[-1] - row[0] + 1 != len(row)) for row in places if row])
    # Somebody's own list: one after the other, each has the same fields in the same order.
    orders = [[(entry.encoding, entry.half) for entry in part] for part in parts]
    return any(order != orders[0] for order in orders[:-1]) or orders[-1] != orders[0][:len(orders[-1])]


def _dump(dialect: str, parts: Sequence[Sequence[Entry]], lines: Lines, claimed: Set[int]) -> Optional[TextDump]:
    builder = Builder("vmcs")
    entries = [entry for part in parts for entry in part]
    hexadecimal = any(_hexadecimal(entry.digits) for entry in entries)
    halves: Dict[int, List[Entry]] = {}
    ambiguous = 0
    for entry in entries:
        if entry.value is None:
            if entry.doubtful:
                builder.note(f"line {entry.line}: the text ends inside or right after the value of {vmcs_fields.find(entry.encoding).name}: not used")
            continue
        if not entry.marked and not hexadecimal and entry.value > 9:
            ambiguous += 1
            continue
        if entry.half:
            halves.setdefault(entry.encoding, []).append(entry)
            builder.lines.add(entry.line)
            continue
        builder.add(entry.encoding, entry.value, entry.line, "the last word of the text: may be cut" if entry.doubtful else "")
    if ambiguous:
        builder.note(f"{ambiguous} values are left out: digits without 0x can be decimal or hexadecimal")
    for encoding, found in halves.items():
        _join_halves(builder, encoding, found)
    if not builder.seen:
        return None
    if len(parts) > 1:
        builder.keep_agreed()
        if not builder.seen:
            return None
    numbers = sorted({entry.line for entry in entries})
    gaps = [number for number in range(numbers[0], numbers[-1] + 1) if number not in builder.lines and is_gap(lines.line(number).text)] \
        if numbers[-1] - numbers[0] < 100 * FARTHEST else []
    for number in gaps:
        builder.note(f"line {number}: lines are missing here ({shown(lines.raw[number - 1], 80)})")
        builder.lines.add(number)
    claimed |= builder.lines
    return TextDump("vmcs", dialect, in_field_order("vmcs", builder.settled()), numbers[0], numbers[-1], notes=builder.notes, extras=builder.extras)


def _hexadecimal(digits: str) -> bool:
    """Digits that no program prints in decimal: with letters, or padded with zeros."""
    return not digits.isdigit() or (len(digits) > 4 and digits[0] == "0")


def _join_halves(builder: Builder, encoding: int, found: Sequence[Entry]) -> None:
    """The high half of a 64-bit field, printed beside what a 32-bit VMREAD gave of the low half."""
    low = builder.seen.get(encoding)
    values = {entry.value for entry in found}
    if not low or len(values) != 1:
        return
    high = values.pop() or 0
    if low[0].value >> 32 == 0 and high:
        line = low[0].line
        del builder.seen[encoding]
        builder.add(encoding, high << 32 | low[0].value, line, f"high half on line {found[0].line}")


def _is_definition(entries: Sequence[Entry]) -> bool:
    """Source text: `GUEST_RIP = 0x681e` gives encodings, not values.  And a lone `tsc_offset:` can be a VMCB's."""
    if all(entry.encoding == _SHARED for entry in entries):
        return True
    same = sum(entry.value == entry.encoding and entry.value != 0 for entry in entries)
    return same * 2 > len(entries)


def parse(lines: Lines, candidates: Sequence[int], claimed: Set[int], _reserved: Set[int]) -> List[TextDump]:
    """The lists of fields in `lines`.  Adds the lines that were understood to `claimed`."""
    entries: List[Tuple[str, Entry]] = []
    failed: Dict[int, str] = {}
    for number in candidates:
        if number in claimed:
            continue
        text = lines.line(number).text
        cut = lines.ends_cut and number == lines.last
        failure = _HVEXT_FAILED.match(text)
        if failure:
            failed[number] = failure.group(1)
            continue
        for dialect, found in ((HVEXT, _hvext(number, text)), (HAXM, _haxm(number, text, cut)), (GENERIC, _generic(number, text, cut))):
            if found:
                entries.extend((dialect, entry) for entry in found)
                break
    dumps = []
    for dialect, run in _runs(entries):
        if _is_definition(run):
            continue
        parts = _parts(dialect, run)
        groups = [parts] if _interleaved(dialect, parts) else [[part] for part in parts]
        for group in groups:
            dump = _dump(dialect, group, lines, claimed)
            if dump is not None:
                dumps.append(dump)
                _note_failed(dump, failed, claimed)
    return dumps


def _note_failed(dump: TextDump, failed: Mapping[int, str], claimed: Set[int]) -> None:
    """Fields whose VMREAD failed: this processor does not have them."""
    names = []
    for number, title in failed.items():
        if dump.first_line - FARTHEST <= number <= dump.last_line + FARTHEST and number not in claimed:
            row = _by_title(title)
            names.append(row.name if row else title)
            claimed.add(number)
    if names:
        dump.extras["failed"] = names
        dump.notes.append(f"VMREAD failed for {len(names)} fields: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
