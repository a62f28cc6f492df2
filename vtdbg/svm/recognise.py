"""Does this page look like a VMCB?  A VMCB has no revision identifier: only what VMRUN requires of its fields tells it from other pages."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Dict, List, NamedTuple, Optional, Tuple

from vtdbg.evidence import ADDRESS_LIMIT, Evidence, Judge, canonical, is_page, is_pat
from vtdbg.svm import fields as vmcb_fields

VMCB, HOST_SAVE_AREA = "vmcb", "host-save-area"

SAVE_AREA = 0x400
"""APM vol. 2, appendix VMCB Layout: the state-save area begins at 0x400; EFER is at 0xd0 in it."""

_SVME = 1 << 12
_EFER_BITS = (0, 8, 10, 11, 13, 14, 15, 17, 18, 20, 21)
"""SCE, LME, LMA, NXE, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE (APM vol. 2, Extended Feature Enable Register (EFER))."""

_CONTROL_RESERVED = ((0x18, 0x3C), (0x160, 0x3E0))
"""Bytes of the control area that processors leave alone; 0x3e0 to 0x3ff is for software (APM vol. 2, appendix VMCB Layout)."""

FITS = 30
"""Points that a VMCB needs.  Real ones reach 60 and more; nothing else in the memories that were looked at came above 0, except a host save area."""


class Mark(NamedTuple):
    """What one look at a page asks: is the qword at `offset`, under `mask`, the number `wanted` (which is not 0)?"""

    offset: int
    mask: int
    wanted: int


_QWORD = (1 << 64) - 1

EFER = Mark(0x4D0, _QWORD & ~sum(1 << bit for bit in _EFER_BITS), _SVME)
"""SVME set and no reserved bit: VMRUN refuses any other EFER (APM vol. 2, VMRUN Instruction, Canonicalization and Consistency Checks), so this
rules out nearly every page."""

EFER_WITHOUT_SVME = Mark(0x4D0, _QWORD & ~sum(1 << bit for bit in _EFER_BITS if bit not in (8, 10)), 0x500)
"""LME and LMA set, SVME forgotten: VMRUN refuses it, and the author of such a VMCB is looking for it.  A guest outside long mode without SVME has
nothing here that tells its page from others."""

SEV_ES = Mark(0x90, _QWORD & ~0xF8, 7)
"""The nested control of an SEV-ES guest: NP, SEV and SEV-ES enabled.  Its EFER is in the encrypted VMSA, not at 0x4d0."""


@dataclass(frozen=True)
class Rule:
    """`good` and `bad` are the points of field `name` where the judgement is True or False.  Unlike in a VMCS a zero counts, where
    VMRUN refuses it."""

    name: str
    good: int
    bad: int
    judge: Judge
    passed: str
    failed: str


_CR0_DEFINED = 0xE005003F
_CR4_RESERVED = ~(0x1FFFFFF & ~(1 << 13 | 1 << 14 | 1 << 15))
_EXIT_CODES = 0x403


def _base(value: int) -> Optional[bool]:
    return None if value == 0 else is_page(value)


def _if_set(judge: Judge) -> Judge:
    return lambda value: judge(value) if value else None


def _exit_code(value: int) -> bool:
    # Negative codes are failures: VMEXIT_INVALID is -1 (also as a 32-bit number).  0xf0000000: Hyper-V's.
    return value <= _EXIT_CODES or value >= (1 << 64) - 16 or 0xFFFFFFF0 <= value <= 0xFFFFFFFF or value == 0xF0000000


CONTROL_RULES: Tuple[Rule, ...] = (
    Rule("intercept_misc2", 8, -12, lambda value: value & 1 == 1, "intercepts VMRUN, as it has to", "does not intercept VMRUN, as it has to"),
    Rule("asid", 4, -8, lambda value: 0 < value < 1 << 16, "is a guest's ASID", "is no guest's ASID"),
    Rule("iopm_base_pa", 3, -6, _base, "is the address of a page", "is not the address of a page"),
    Rule("msrpm_base_pa", 3, -6, _base, "is the address of a page", "is not the address of a page"),
    Rule("tlb_ctl", 0, -5, lambda value: value in (0, 1, 3, 7), "", "is no TLB control"),
    Rule("exit_code", 2, -6, _exit_code, "is in range", "is no exit code"),
    Rule("nested_ctl", 1, -5, _if_set(lambda value: value < 1 << 8), "has no undefined bit", "has undefined bits"),
    Rule("nested_cr3", 4, -4, _if_set(lambda value: value & ~0x18 & 0xFFF == 0 and value < ADDRESS_LIMIT), "is the address of a table",
         "is not the address of a table"),
    Rule("event_inj", 0, -3, lambda value: value & 0x7FFFF000 == 0, "", "has reserved bits"),
)

SAVE_RULES: Tuple[Rule, ...] = (
    Rule("cr0", 4, -6, _if_set(lambda value: not value & ~_CR0_DEFINED), "has no undefined bit", "has undefined bits"),
    Rule("cr3", 2, -4, _if_set(lambda value: value < ADDRESS_LIMIT), "is a physical address", "is no physical address"),
    Rule("cr4", 3, -6, _if_set(lambda value: not value & _CR4_RESERVED), "has no undefined bit", "has undefined bits"),
    Rule("dr6", 3, -3, _if_set(lambda value: value & 0xFFFF0FF0 & ~0x10800 == 0xFFFF0FF0 & ~0x10800 and value < 1 << 32),
         "has its constant bits", "lacks its constant bits"),
    Rule("dr7", 3, -3, _if_set(lambda value: bool(value & 1 << 10) and value < 1 << 32), "has bit 10 (always 1)", "lacks bit 10 or has high bits"),
    Rule("rflags", 5, -6, lambda value: value & 2 == 2 and not value & ~0x3F7FD7, "has bit 1 and no reserved bit",
         "lacks bit 1 or has reserved bits"),
    Rule("rip", 2, -4, _if_set(canonical), "is canonical", "is not canonical"),
    Rule("rsp", 1, -4, _if_set(canonical), "is canonical", "is not canonical"),
    Rule("cs.attrib", 4, -5, lambda value: False if value >> 12 else True if value & 0x98 == 0x98 else None, "is a present code segment",
         "has reserved bits"),
    Rule("tr.attrib", 2, -5, lambda value: False if value >> 12 else True if value & 0x95 == 0x81 else None, "is a TSS", "has reserved bits"),
    Rule("g_pat", 3, -3, _if_set(is_pat), "has eight memory types", "holds what is no memory type"),
    Rule("cpl", 0, -5, lambda value: value < 4, "", "is no privilege level"),
)
"""Sources: APM vol. 2, VMRUN Instruction (Canonicalization and Consistency Checks; State Saved and Loaded); appendix VMCB Layout.  Points are
ours."""


@cache
def _places() -> Dict[str, Tuple[int, int]]:
    names = {rule.name for rule in CONTROL_RULES + SAVE_RULES} | {"nested_ctl", "vmsa_pa", "rax", "efer"}
    rows = {name: vmcb_fields.find(name) for name in names}
    return {name: (row.offset, row.offset + row.size) for name, row in rows.items()}


def _value(page: bytes, name: str) -> int:
    first, end = _places()[name]
    return int.from_bytes(page[first:end], "little")


_BRIEF = {"intercept_misc2": "VMRUN intercept", "cs.attrib": "CS", "tr.attrib": "TR", "iopm_base_pa": "IOPM", "msrpm_base_pa": "MSRPM",
          "nested_cr3": "nCR3"}


def is_sev_es(page: bytes) -> bool:
    return _value(page, "nested_ctl") & 7 == 7


def _judged(page: bytes, rules: Tuple[Rule, ...]) -> List[Evidence]:
    evidence = []
    for rule in rules:
        value = _value(page, rule.name)
        verdict = rule.judge(value)
        if verdict and rule.good:
            evidence.append(Evidence(rule.good, f"{rule.name} {value:#x} {rule.passed}", _BRIEF.get(rule.name, rule.name)))
        elif verdict is False:
            evidence.append(Evidence(rule.bad, f"{rule.name} {value:#x} {rule.failed}"))
    return evidence


def _reserved(page: bytes) -> Evidence:
    stray = sum(end - first - page.count(0, first, end) for first, end in _CONTROL_RESERVED)
    if stray:
        return Evidence(-min(16, 2 + stray // 4), f"{stray} reserved bytes of the control area are not 0")
    return Evidence(4, "the reserved bytes of the control area are 0", "reserved bytes")


def quick(page: bytes) -> bool:
    """What decides most pages that passed the EFER filter, without words: the VMRUN intercept or RFLAGS.  Either may be what is wrong."""
    rflags = _value(page, "rflags")
    return bool(page[0x10] & 1) or (rflags & 2 == 2 and rflags < 1 << 22)


@cache
def _reader() -> Tuple[struct.Struct, Tuple[Tuple[int, Judge, int, int], ...]]:
    """All fields that rules judge in one unpacking, and their rules: (0 control area or 1 save area, judge, good, bad)."""
    rows = sorted((*_places()[rule.name], area, rule) for area, rules in enumerate((CONTROL_RULES, SAVE_RULES)) for rule in rules)
    form, at = "<", 0
    for first, end, _, _ in rows:
        form += f"{first - at}x{_CODES[end - first]}"
        at = end
    return struct.Struct(form), tuple((area, rule.judge, rule.good, rule.bad) for _, _, area, rule in rows)


_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
# What a page gets beside the points of its fields, at most: EFER and reserved bytes; VMSA, encryption and reserved bytes; the host's state.
_BESIDE, _BESIDE_SEV_ES, _BESIDE_HOST = 8, 24, 14


def can_fit(page: bytes) -> bool:
    """Can the points of `judge_page` reach FITS?  Never False where they do; without words, hence quick."""
    unpacker, rules = _reader()
    points = [0, 0]
    for (area, judge, good, bad), value in zip(rules, unpacker.unpack_from(page)):
        verdict = judge(value)
        points[area] += good if verdict else bad if verdict is False else 0
    control, save = points
    return max(control + save + _BESIDE, control + _BESIDE_SEV_ES, save + _BESIDE_HOST) >= FITS


def judge_page(page: bytes) -> Tuple[str, List[Evidence]]:
    """(VMCB or HOST_SAVE_AREA, evidence): what the page is taken for if the points reach FITS.  `page` is 4096 bytes.

    A page whose control area is 0 is no VMCB (VMRUN needs an ASID and the VMRUN intercept): if its save area holds the state of a host, it
    is what VMRUN saved at VM_HSAVE_PA.  Real processors keep that page in a form of their own; QEMU uses the layout of the VMCB.
    """
    if not any(page[0:SAVE_AREA]):
        evidence = [Evidence(4, "the control area is 0", "empty control area"), _efer(page)]
        return HOST_SAVE_AREA, evidence + _judged(page, SAVE_RULES) + [_host_state(page)]
    evidence = _judged(page, CONTROL_RULES)
    if is_sev_es(page):
        vmsa = _value(page, "vmsa_pa")
        plausible = vmsa != 0 and is_page(vmsa)
        evidence.append(Evidence(12 if plausible else -12, f"vmsa_pa {vmsa:#x} is {'' if plausible else 'not '}the address of a page"))
        evidence.append(Evidence(8, "nested paging, SEV and SEV-ES are enabled"))
    else:
        evidence.append(_efer(page))
        evidence += _judged(page, SAVE_RULES)
    return VMCB, [*evidence, _reserved(page)]


def taken_for(page: bytes) -> str:
    """VMCB or HOST_SAVE_AREA where the points of `judge_page` reach FITS, else empty."""
    kind, evidence = judge_page(page)
    return kind if sum(item.points for item in evidence) >= FITS else ""


def _efer(page: bytes) -> Evidence:
    # What the marks let pass.
    if not _value(page, "efer") & _SVME:
        return Evidence(-4, f"EFER {_value(page, 'efer'):#x} lacks SVME: VMRUN refuses it")
    return Evidence(4, f"EFER {_value(page, 'efer'):#x} has SVME and no undefined bit", "EFER")


def _host_state(page: bytes) -> Evidence:
    paging = _value(page, "cr0") & 0x80000001 == 0x80000001 and _value(page, "efer") & 0x1500 == 0x1500
    if paging and _value(page, "cpl") == 0 and _value(page, "rip"):
        return Evidence(6, "64-bit paging at privilege level 0: the state of a host", "state of a host")
    return Evidence(-12, "not the state of a 64-bit host")
