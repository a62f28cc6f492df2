"""What is no dump of a VMCS or VMCB but says something of one: QEMU's register dump after a failed entry, bhyve's exit lines.

QEMU: target/i386/cpu-dump.c and "KVM: entry failed, hardware error 0x80000021" (target/i386/kvm/kvm.c).
The registers are the guest's as KVM reports them.  CR0 and CR4 there are what the guest would read (through the read shadow), so they
are no GUEST_CR0 and GUEST_CR4; CR3 and EFER can differ from the fields too.  They are kept in `extras["registers"]`.
bhyve: usr.sbin/bhyve/amd64/vmexit.c, "vm exit[0]": the exit reason in decimal and without its upper half.
"""

from __future__ import annotations

import re
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

from vtdbg.textdump.lines import Lines, word_set
from vtdbg.textdump.model import Builder, TextDump, in_field_order

QEMU = "QEMU register dump"
BHYVE = "bhyve"

_FAILED = re.compile(r"\b(?:entry failed, hardware error|hardware_entry_failure_reason ?[:=]?) ?(0x[0-9a-f]{1,16})(?![\w.])", re.I)
_INTERNAL = re.compile(r"\binternal error\. Suberror: ?(\d{1,4})\b", re.IGNORECASE)
_GPR = re.compile(r"(?<![A-Za-z0-9_])([ER][A-D]X|[ER][SD]I|[ER][BS]P|R8|R9|R1[0-5]) ?=([0-9a-f]{8}|[0-9a-f]{16})(?![\w.])", re.I)
_IP = re.compile(r"^(?:E|R)IP=([0-9a-f]{8}|[0-9a-f]{16}) (?:E|R)FL=([0-9a-f]{8}) \[", re.IGNORECASE)
_SEGMENT = re.compile(r"^(ES|CS|SS|DS|FS|GS|LDT|TR) ?= ?([0-9a-f]{4}) ([0-9a-f]{8}|[0-9a-f]{16}) ([0-9a-f]{8}) ([0-9a-f]{8})(?: DPL=.{0,40})?$",
                      re.IGNORECASE)
_TABLE = re.compile(r"^(GDT|IDT) ?= ?([0-9a-f]{8}|[0-9a-f]{16}) ([0-9a-f]{8})$", re.IGNORECASE)
_CR = re.compile(r"^CR0=([0-9a-f]{8}) CR2=([0-9a-f]{8}|[0-9a-f]{16}) CR3=([0-9a-f]{8}|[0-9a-f]{16}) CR4=([0-9a-f]{8})$", re.IGNORECASE)
_DR = re.compile(r"^DR6=([0-9a-f]{8}|[0-9a-f]{16}) DR7=([0-9a-f]{8}|[0-9a-f]{16})$", re.IGNORECASE)
_EFER = re.compile(r"^EFER=([0-9a-f]{16})$", re.IGNORECASE)
_OTHER = re.compile(r"^(?:DR0=|CCS=|Code=|FCW=|FPR\d|XMM\d|CPU#\d|If you're runn|support, the failure|state for Intel VT|which is not supported)")

KEYWORDS = word_set("""
    kvm failed suberror hardware_entry_failure_reason eax rax esi rsi eip rip es cs ss ds fs gs ldt tr gdt idt cr0 dr6 efer r8 r12 edi
    vm exit_reason qualification exitcode exitinfo1 exitinfo2 inst_length inst_error inst_type status reason code
""")

MARKERS = word_set("hardware hardware_entry_failure_reason suberror eip efl rfl inst_length inst_type exit_reason exitinfo1")
"""Lower-case words that other logs seldom have."""

FARTHEST = 60

_VMCS_SEGMENT = {"LDT": "LDTR"}
_REMARK = "QEMU register dump: as KVM reports the guest, not read from the VMCS"
_VMCB_REMARK = "QEMU register dump: as KVM reports the guest, not read from the VMCB"


def access_rights(flags: int) -> Optional[int]:
    """VMCS access rights of QEMU's segment flags (bits 8 to 23 of a descriptor's upper half), None for a segment that is not present.

    KVM reports "present" for what is not unusable (vmx_get_segment), so the real access rights of one without it are unknown.
    """
    return flags >> 8 & 0xF0FF if flags & 1 << 15 else None


def attrib(flags: int) -> int:
    """A VMCB's 12-bit attributes of QEMU's segment flags."""
    return (flags >> 8 & 0xFF) | (flags >> 12 & 0xF00)


class _Block:
    """A register dump that is being read, with the failure line before it."""

    def __init__(self, first: int) -> None:
        self.first = self.last = first
        self.reason: Optional[int] = None
        self.reason_line = 0
        self.gpr: Dict[str, int] = {}
        self.ip: Optional[Tuple[int, int, int]] = None
        self.segments: Dict[str, Tuple[int, int, int, int, int]] = {}
        self.tables: Dict[str, Tuple[int, int, int]] = {}
        self.lines: Set[int] = set()
        self.notes: List[str] = []

    @property
    def registers(self) -> bool:
        return self.ip is not None or bool(self.segments)


def parse(lines: Lines, candidates: Sequence[int], claimed: Set[int], _reserved: Set[int]) -> List[TextDump]:
    """QEMU's and bhyve's blocks in `lines`.  Adds the lines that were understood to `claimed`."""
    dumps: List[TextDump] = []
    block: Optional[_Block] = None
    for number in candidates:
        if number in claimed:
            continue
        text = lines.line(number).text
        failed, internal = _FAILED.search(text), _INTERNAL.search(text)
        starts = failed or internal or _GPR.match(text)
        if block is not None and (number - block.last > FARTHEST or ((failed or internal) and (block.registers or block.reason is not None))):
            dumps.extend(_finish(block, claimed))
            block = None
        if block is None:
            if not starts:
                continue
            block = _Block(number)
        if failed:
            block.reason, block.reason_line = int(failed.group(1), 16), number
        elif internal:
            block.notes.append(f"line {number}: KVM internal error, suberror {internal.group(1)}")
        elif not _register_line(block, number, text):
            continue
        block.last = number
        block.lines.add(number)
    if block is not None:
        dumps.extend(_finish(block, claimed))
    return dumps + _bhyve(lines, candidates, claimed)


def _register_line(block: _Block, number: int, text: str) -> bool:
    """One line of QEMU's dump.  True where it is one."""
    found = _GPR.findall(text)
    if found and _GPR.match(text):
        block.gpr.update({name.lower(): int(value, 16) for name, value in found})
        return True
    instruction = _IP.match(text)
    if instruction:
        block.ip = (int(instruction.group(1), 16), int(instruction.group(2), 16), number)
        return True
    segment = _SEGMENT.match(text)
    if segment:
        name, selector, base, limit, flags = segment.groups()
        block.segments[name.upper()] = (int(selector, 16), int(base, 16), int(limit, 16), int(flags, 16), number)
        return True
    register = _TABLE.match(text)
    if register:
        block.tables[register.group(1).upper()] = (int(register.group(2), 16), int(register.group(3), 16), number)
        return True
    for pattern, names in ((_CR, ("cr0", "cr2", "cr3", "cr4")), (_DR, ("dr6", "dr7")), (_EFER, ("efer",))):
        match = pattern.match(text)
        if match:
            block.gpr.update(dict(zip(names, (int(value, 16) for value in match.groups()))))
            return True
    return _OTHER.match(text) is not None


def _finish(block: _Block, claimed: Set[int]) -> List[TextDump]:
    if not block.registers and block.reason is None:
        return []
    # KVM gives VMEXIT_INVALID (-1) for a failed VMRUN, an exit reason or a VM-instruction error for a failed VM entry.
    amd = block.reason is not None and block.reason & 0xFFFFFFFF == 0xFFFFFFFF
    intel = block.reason is not None and (block.reason >> 31 == 1 or 0 < block.reason < 64)
    kind = "vmcb" if amd else "vmcs" if intel else "registers"
    builder = Builder("vmcb" if amd else "vmcs")
    builder.notes.extend(block.notes)
    if block.registers:
        _take_registers(builder, block, amd)
        builder.note("QEMU prints the guest's registers as KVM reports them: what KVM sets itself (CR0, CR4, controls, host state) is unknown")
    if block.reason is not None:
        _take_reason(builder, block.reason, block.reason_line, amd)
    if block.gpr:
        builder.extras["registers"] = dict(block.gpr)
    values = in_field_order(builder.kind, builder.settled())
    if kind == "registers":
        builder.extras["values"] = values
        values = {}
        builder.note("nothing says whether this is an Intel or an AMD processor")
    claimed |= block.lines
    return [TextDump(kind, QEMU, values, block.first, block.last, notes=builder.notes, extras=builder.extras)]


def _take_registers(builder: Builder, block: _Block, amd: bool) -> None:
    remark = _VMCB_REMARK if amd else _REMARK
    prefix = "" if amd else "GUEST_"
    stack = block.gpr.get("rsp", block.gpr.get("esp"))
    if block.ip:
        address, flags, line = block.ip
        builder.add_name(prefix + ("rip" if amd else "RIP"), address, line, remark)
        builder.add_name(prefix + ("rflags" if amd else "RFLAGS"), flags, line, remark)
        if stack is not None:
            builder.add_name(prefix + ("rsp" if amd else "RSP"), stack, line, remark)
    if amd and ("rax" in block.gpr or "eax" in block.gpr) and block.ip:
        builder.add_name("rax", block.gpr.get("rax", block.gpr.get("eax", 0)), block.ip[2], remark)
    for name, (selector, base, limit, flags, line) in block.segments.items():
        full = _VMCS_SEGMENT.get(name, name)
        if amd:
            for member, value in (("selector", selector), ("base", base), ("limit", limit), ("attrib", attrib(flags))):
                builder.add_name(f"{full.lower()}.{member}", value, line, remark)
            continue
        rights = access_rights(flags)
        for ending, number in (("SELECTOR", selector), ("BASE", base), ("LIMIT", limit)):
            builder.add_name(f"GUEST_{full}_{ending}", number, line, remark)
        if rights is None:
            builder.note(f"line {line}: {full} is not present or unusable: its access rights are unknown")
        else:
            builder.add_name(f"GUEST_{full}_AR_BYTES", rights, line, remark)
    for name, (base, limit, line) in block.tables.items():
        if amd:
            builder.add_name(f"{name.lower()}r.base", base, line, remark)
            builder.add_name(f"{name.lower()}r.limit", limit, line, remark)
        else:
            builder.add_name(f"GUEST_{name}R_BASE", base, line, remark)
            builder.add_name(f"GUEST_{name}R_LIMIT", limit, line, remark)


def _take_reason(builder: Builder, reason: int, line: int, amd: bool) -> None:
    builder.extras["hardware_entry_failure_reason"] = reason
    builder.lines.add(line)
    if amd:
        builder.add_name("exit_code", 0xFFFFFFFFFFFFFFFF, line, "hardware_entry_failure_reason")
    elif reason >> 31 == 1:
        builder.add_name("VM_EXIT_REASON", reason, line, "hardware_entry_failure_reason")
    elif 0 < reason < 64:
        # KVM gives the VM-instruction error where VMLAUNCH or VMRESUME itself failed (vmx_handle_exit, vmx->fail).
        builder.add_name("VM_INSTRUCTION_ERROR", reason, line, "hardware_entry_failure_reason")


_BHYVE_START = re.compile(r"^vm exit\[(\d{1,4})\]$", re.IGNORECASE)
_BHYVE = re.compile(r"^(reason|rip|inst_length|status|exit_reason|qualification|inst_type|inst_error|exitcode|exitinfo1|exitinfo2) "
                    r"(0x[0-9a-f]{1,16}|\d{1,20}|VMX|SVM)$", re.IGNORECASE)
_BHYVE_VMX: Mapping[str, str] = {"rip": "GUEST_RIP", "inst_length": "VM_EXIT_INSTRUCTION_LEN", "exit_reason": "VM_EXIT_REASON",
                                 "qualification": "EXIT_QUALIFICATION"}
_BHYVE_SVM: Mapping[str, str] = {"rip": "rip", "exitcode": "exit_code", "exitinfo1": "exit_info_1", "exitinfo2": "exit_info_2"}


def _bhyve(lines: Lines, candidates: Sequence[int], claimed: Set[int]) -> List[TextDump]:
    dumps: List[TextDump] = []
    start = 0
    found: Dict[str, Tuple[str, int]] = {}
    vcpu = 0
    for number in list(candidates) + [0]:
        text = lines.line(number).text if number else ""
        begins = _BHYVE_START.match(text)
        if (begins or not number or number - start > 20) and start and found:
            dumps.extend(_bhyve_dump(start, vcpu, found, claimed))
            start, found = 0, {}
        if begins:
            start, vcpu, found = number, int(begins.group(1)), {}
            continue
        row = _BHYVE.match(text) if start else None
        # The last number of a text without a line end can be cut.
        if row and not (lines.ends_cut and number == lines.last and row.group(2) != "0"):
            found[row.group(1).lower()] = (row.group(2), number)
    return dumps


def _bhyve_dump(start: int, vcpu: int, found: Mapping[str, Tuple[str, int]], claimed: Set[int]) -> List[TextDump]:
    kind = found.get("reason", ("", 0))[0].upper()
    if kind not in ("VMX", "SVM"):
        return []
    builder = Builder("vmcs" if kind == "VMX" else "vmcb")
    builder.extras["vcpu"] = vcpu
    for label, name in (_BHYVE_VMX if kind == "VMX" else _BHYVE_SVM).items():
        if label not in found:
            continue
        text, line = found[label]
        value = int(text, 16) if text[:2].lower() == "0x" else int(text)
        builder.add_name(name, value, line, "bits 15:0 only" if label == "exit_reason" else "")
    error = found.get("inst_error")
    if kind == "VMX" and error and int(error[0], 0):
        builder.add_name("VM_INSTRUCTION_ERROR", int(error[0], 0), error[1])
    if builder.has("VM_EXIT_REASON") if kind == "VMX" else False:
        builder.note("bhyve prints bits 15:0 of the exit reason: its flags are unknown")
    if not builder.seen:
        return []
    last = max(line for _, line in found.values())
    claimed |= {start, *(line for _, line in found.values())}
    return [TextDump(builder.kind, BHYVE, in_field_order(builder.kind, builder.settled()), start, last, notes=builder.notes, extras=builder.extras)]
