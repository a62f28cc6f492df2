"""Do these values look like a VMCS?  One table of rules; each hit is points with words, so that a reader can see why.

A rule looks at what nearly every real VMCS has and arbitrary bytes have not: the default1 bits of the control words, the VMCS link
pointer, the fixed bits of CR0 and CR4, RFLAGS bit 1, canonical addresses, the reserved bits of access rights.  A zero is no
evidence: a field that nobody has written yet, or that a shadow VMCS does not use, is zero.  A single wrong field does not condemn a
page: people look at a VMCS because something in it is wrong.
"""

from __future__ import annotations

from typing import List, Mapping, NamedTuple, Optional, Tuple

from vtdbg.evidence import ADDRESS_LIMIT, Evidence, Judge, canonical, is_page, is_pat
from vtdbg.vmx import fields as vmcs_fields


class Rule(NamedTuple):
    """`good` and `bad` are the points of each field of `encodings` whose value is not 0 and passes or fails.  `judge` answers True,
    False, or None for a value that says nothing.  `passed` and `failed` are the words, `brief` a short name; `group` names several
    fields together."""

    encodings: Tuple[int, ...]
    good: int
    bad: int
    judge: Judge
    passed: str
    failed: str
    group: str = ""
    brief: str = ""


class Masked:
    """A judgement that is a comparison, so that a scan can make it for many pages at once: True where `value & mask == wanted` (which is not
    0); `otherwise` judges the other values, never as True."""

    def __init__(self, mask: int, wanted: int, otherwise: Optional[Judge] = None) -> None:
        self.mask, self.wanted, self.otherwise = mask, wanted, otherwise

    def __call__(self, value: int) -> Optional[bool]:
        if value & self.mask == self.wanted:
            return True
        return False if self.otherwise is None else self.otherwise(value)


PIN, PROC, EXIT, ENTRY = 0x4000, 0x4002, 0x400C, 0x4012

DEFAULT1 = {PIN: 0x16, PROC: 0x04006172, EXIT: 0x36DFB, ENTRY: 0x11FB}
"""Reserved bits that every processor requires to be 1, whatever its TRUE capability MSRs allow for CR3 exiting and debug controls
(SDM vol. 3, appendix VMX Capability Reporting Facility, Reserved Controls and Default Settings).  The kind default1 of the bit tables,
here as numbers because a scan asks often."""

ALL_ONES = (1 << 64) - 1
CR0_DEFINED = 0xE005003F
CR4_DEFINED = 0x11BFF7FFF
RFLAGS_DEFINED = 0x3F7FD7
BASIC_REASONS = 96
"""More than the basic exit reasons that exist, so that a new one is no evidence against."""


def _default1(encoding: int, brief: str) -> Rule:
    wanted = DEFAULT1[encoding]
    return Rule((encoding,), 8, -6, Masked(wanted, wanted), "has all default1 bits", f"lacks default1 bits ({wanted:#x})",
                brief=brief)


def _with(bits: int, defined: int) -> Masked:
    """All of `bits` and nothing outside `defined`."""
    return Masked(ALL_ONES & ~defined | bits, bits)


def _other_link(value: int) -> Optional[bool]:
    # A page: a shadow VMCS may be linked.  0xffffffff: a 32-bit hypervisor that forgot the high half.
    return None if value == 0xFFFFFFFF or is_page(value) else False


def _cr3(value: int) -> bool:
    # Bits 62 and 61 are the LAM controls, bits 11:0 can be a PCID.
    return not value & ~(ADDRESS_LIMIT - 1 | 3 << 61)


def _cr4(value: int) -> Optional[bool]:
    return False if value & ~CR4_DEFINED else True if value & 1 << 13 else None


def _eptp(value: int) -> bool:
    # Memory type UC or WB, walk length 4 or 5, bits 11:8 reserved (SDM vol. 3, Extended-Page-Table Pointer (EPTP)).
    return value & 7 in (0, 6) and value >> 3 & 7 in (3, 4) and not value & 0xF00 and value < ADDRESS_LIMIT


def _access_rights(value: int) -> bool:
    # Bits 31:17 and 11:8 are reserved (SDM vol. 3, Guest Register State).
    return not value & 0xFFFE0F00


def _code_rights(value: int) -> Optional[bool]:
    return _access_rights(value) and (True if value & 0x10091 == 0x91 else None)


def _task_rights(value: int) -> Optional[bool]:
    return _access_rights(value) and (True if value & 0x1009F in (0x8B, 0x83) else None)


def _page_or_ones(value: int) -> Optional[bool]:
    # Hypervisors mark an address that they do not use with all ones.
    return True if is_page(value) else None if value == ALL_ONES else False


_HOST_SELECTORS = tuple(range(0x0C00, 0x0C0E, 2))
_LINEAR = (*range(0x6806, 0x681A, 2), *range(0x6C06, 0x6C16, 2))
_RIGHTS = (0x4814, 0x4818, 0x481A, 0x481C, 0x481E, 0x4820)
_PAGES = (0x2000, 0x2002, 0x2004, 0x200E, 0x2012, 0x2014)

RULES: Tuple[Rule, ...] = (
    _default1(PIN, "pin-based controls"), _default1(PROC, "primary controls"), _default1(EXIT, "VM-exit controls"),
    _default1(ENTRY, "VM-entry controls"),
    Rule((0x2800,), 8, -6, Masked(ALL_ONES, ALL_ONES, _other_link), "is all ones", "is neither all ones nor the address of a page",
         brief="link pointer"),
    Rule((0x6C00,), 6, -6, _with(0x80000021, CR0_DEFINED), "has PE, NE and PG and no undefined bit",
         "lacks PE, NE or PG or has undefined bits", brief="host CR0"),
    Rule((0x6C04,), 6, -6, _with(1 << 13, CR4_DEFINED), "has VMXE and no undefined bit", "lacks VMXE or has undefined bits", brief="host CR4"),
    Rule((0x6C02,), 2, -4, _cr3, "is a physical address", "is no physical address", brief="host CR3"),
    Rule((0x6C16,), 3, -6, lambda value: canonical(value) and (True if value >= 0x1000 else None), "is canonical", "is not canonical",
         brief="host RIP"),
    Rule((0x6820,), 5, -5, _with(2, RFLAGS_DEFINED), "has bit 1 and no reserved bit", "lacks bit 1 or has reserved bits", brief="RFLAGS"),
    Rule((0x6800,), 3, -4, lambda value: not value & ~CR0_DEFINED, "has no undefined bit", "has undefined bits", brief="CR0"),
    Rule((0x6804,), 3, -4, _cr4, "has VMXE and no undefined bit", "has undefined bits", brief="CR4"),
    Rule((0x6802,), 1, -3, _cr3, "is a physical address", "is no physical address", brief="CR3"),
    Rule((0x681A,), 3, -3, lambda value: value & 1 << 10 != 0 and value < 1 << 32, "has bit 10 (always 1)",
         "lacks bit 10 (always 1) or has high bits", brief="DR7"),
    Rule((0x4816,), 4, -4, _code_rights, "is an accessed, present segment", "has reserved bits", brief="CS"),
    Rule((0x4822,), 4, -4, _task_rights, "is a busy TSS", "has reserved bits", brief="TR"),
    Rule((0x201A,), 4, -3, _eptp, "has the form of an EPTP", "has not the form of an EPTP", brief="EPTP"),
    Rule((0x4402,), 2, -5, lambda value: value & 0xFFFF < BASIC_REASONS and not value & 0x41FF0000, "is in range", "is no exit reason",
         brief="exit reason"),
    Rule((0x4824,), 0, -4, lambda value: value < 0x20, "", "has undefined bits"),
    Rule((0x4826,), 0, -4, lambda value: value < 4, "", "is no activity state"),
    Rule((0x400A,), 0, -2, lambda value: value <= 4, "", "is more than 4"),
    Rule((0x4400,), 0, -3, lambda value: value <= 0x40, "", "is no error number"),
    Rule((0x401A, 0x440C), 1, -3, lambda value: value <= 15, "at most 15", "is longer than an instruction", "instruction lengths"),
    Rule((0x2804, 0x2C00), 3, -3, is_pat, "with eight memory types", "holds what is no memory type", "PAT values"),
    Rule(_HOST_SELECTORS, 2, -4, lambda value: value & 7 == 0, "with RPL and TI 0", "has RPL or TI set", "host selectors"),
    Rule(_LINEAR, 1, -3, canonical, "canonical", "is not canonical", "linear addresses"),
    Rule(_RIGHTS, 1, -4, _access_rights, "without reserved bits", "has reserved bits", "access rights"),
    Rule((0x4810, 0x4812), 1, -3, lambda value: value <= 0xFFFF, "in 16 bits", "is larger than 0xffff", "table limits"),
    Rule(_PAGES, 1, -2, _page_or_ones, "page-aligned", "is not the address of a page", "physical addresses"),
)
"""In the order in which evidence is shown.  Sources: SDM vol. 3, Checks on VMX Controls and Host-State Area; Checks on the Guest-State
Area; Format of the VMCS Region; appendix VMX Capability Reporting Facility.  Points are ours, set so that the VMCSs of real
hypervisors stand far above accidents."""


def judge_values(values: Mapping[int, int]) -> List[Evidence]:
    """Evidence for and against `values` (by encoding) being those of a VMCS.  A field that is absent or 0 is no evidence."""
    evidence: List[Evidence] = []
    for rule in RULES:
        passed: List[int] = []
        for encoding in rule.encodings:
            value = values.get(encoding)
            if not value:
                continue
            verdict = rule.judge(value)
            if verdict:
                passed.append(encoding)
            elif verdict is False and rule.bad:
                evidence.append(Evidence(rule.bad, f"{_name(encoding)} {value:#x} {rule.failed}"))
        if passed and rule.good:
            evidence.append(Evidence(rule.good * len(passed), _words(rule, passed, values), rule.brief or f"{len(passed)} {rule.group}"))
    return evidence


def _words(rule: Rule, passed: List[int], values: Mapping[int, int]) -> str:
    if rule.group:
        return f"{len(passed)} {rule.group} {rule.passed}"
    return f"{_name(passed[0])} {values[passed[0]]:#x} {rule.passed}"


def _name(encoding: int) -> str:
    return vmcs_fields.find(encoding).name


_STRONG = (PIN, PROC, EXIT, ENTRY, 0x2800, 0x6C00, 0x6C04, 0x6820)
STRONG: Mapping[int, Rule] = {rule.encodings[0]: rule for rule in RULES if rule.encodings[0] in _STRONG}
"""The rules that a scan asks first: control words, link pointer, host CR0 and CR4, RFLAGS."""

BY_ENCODING: Mapping[int, Rule] = {encoding: rule for rule in RULES for encoding in rule.encodings}
