"""Checks on the guest's segment registers and descriptor tables: a failure is an entry failure, exit reason 33.

SDM vol. 3, Checks on Guest Segment Registers; Checks on Guest Descriptor-Table Registers (chapter VM Entries).  Dated 2026-11.
"""

from __future__ import annotations

from typing import Callable, Optional, Tuple

from vtdbg.vmx.entry import formats
from vtdbg.vmx.entry.rules import Gate, RuleBook, State, all_of, any_of, bit_list, mask_of, off, on

SEE = "SDM vol. 3, Checks on Guest Segment Registers"
SEE_TABLES = "SDM vol. 3, Checks on Guest Descriptor-Table Registers"

book = RuleBook("guest", SEE, ("entry-failure", 33, 0))

CODE_DATA = ("CS", "SS", "DS", "ES", "FS", "GS")
DATA = ("DS", "ES", "FS", "GS")

S, P, L, DB, G, UNUSABLE = 1 << 4, 1 << 7, 1 << 13, 1 << 14, 1 << 15, 1 << 16
AR_RESERVED = 0xFFFE0F00
"""Bits 31:17 and 11:8 of the access rights."""

TYPES = {
    0: "read-only data", 1: "accessed read-only data", 2: "writable data", 3: "accessed writable data", 4: "expand-down read-only data",
    5: "accessed expand-down read-only data", 6: "expand-down writable data", 7: "accessed expand-down writable data", 8: "execute-only code",
    9: "accessed execute-only code", 10: "readable code", 11: "accessed readable code", 12: "conforming execute-only code",
    13: "accessed conforming execute-only code", 14: "conforming readable code", 15: "accessed conforming readable code",
}
SYSTEM_TYPES = {1: "available 16-bit TSS", 2: "LDT", 3: "busy 16-bit TSS", 9: "available TSS", 11: "busy TSS", 12: "call gate", 14: "interrupt gate",
                15: "trap gate"}

VIRTUAL_8086: Gate = lambda state: bool(state["GUEST_RFLAGS"] & mask_of("rflags", "VM"))     # noqa: E731 - a gate beside the others
NOT_VIRTUAL_8086: Gate = lambda state: not state["GUEST_RFLAGS"] & mask_of("rflags", "VM")   # noqa: E731
UNRESTRICTED = on("sec", "UNRESTRICTED_GUEST")
RESTRICTED = off("sec", "UNRESTRICTED_GUEST")
LONG_GUEST = on("entry", "IA32E_MODE")


def rights(name: str) -> str:
    return f"GUEST_{name}_AR_BYTES"


def usable(name: str) -> Gate:
    field = rights(name)
    return lambda state: not state[field] & UNUSABLE


def checked(name: str) -> Gate:
    """The manual checks CS always and the other registers while they are usable; in virtual-8086 mode the access rights are 0xf3 anyway."""
    return NOT_VIRTUAL_8086 if name == "CS" else all_of(NOT_VIRTUAL_8086, usable(name))


def always(name: str) -> Optional[Gate]:
    """No condition."""
    return None


def dpl(state: State, name: str) -> int:
    return state[rights(name)] >> 5 & 3


def kind(state: State, name: str) -> int:
    return state[rights(name)] & 0xF


def type_text(value: int, *, system: bool = False) -> str:
    words = SYSTEM_TYPES.get(value, "reserved") if system else TYPES[value]
    return f"type {value} ({words})"


Checker = Callable[[State, str], Optional[str]]


def each(names: Tuple[str, ...], suffix: str, row: str, must: str, fields: Tuple[str, ...], check: Checker,
         when: Callable[[str], Optional[Gate]], hint: str = "", see: str = "") -> None:
    """One rule for each register; "{}" in `must` and `fields` is its name."""
    for name in names:
        book.add(f"guest.{name.lower()}.{suffix}", row, must.format(name), tuple(field.format(name) for field in fields),
                 lambda state, name=name: check(state, name), when=when(name), hint=hint, see=see)   # type: ignore[misc]


# -- selectors --------------------------------------------------------------------------------------------------------------

def _table_indicator(state: State, name: str) -> Optional[str]:
    value = state[f"GUEST_{name}_SELECTOR"]
    return f"GUEST_{name}_SELECTOR {value:#x}: TI (bit 2) must be 0, the register is loaded from the GDT" if value & 4 else None


each(("TR",), "ti", "R1", "TI of the {} selector is 0", ("GUEST_{}_SELECTOR",), _table_indicator, always)
each(("LDTR",), "ti", "R1", "TI of the {} selector is 0 where LDTR is usable", ("GUEST_{}_SELECTOR", "GUEST_{}_AR_BYTES"), _table_indicator, usable)


@book.rule("guest.ss.rpl", "R2", "RPL of SS equals RPL of CS without unrestricted guest", "GUEST_SS_SELECTOR", "GUEST_CS_SELECTOR",
           when=all_of(NOT_VIRTUAL_8086, RESTRICTED))
def _ss_rpl(state: State) -> Optional[str]:
    ss, cs = state["GUEST_SS_SELECTOR"], state["GUEST_CS_SELECTOR"]
    return None if ss & 3 == cs & 3 else f"GUEST_SS_SELECTOR {ss:#x} has RPL {ss & 3}, GUEST_CS_SELECTOR {cs:#x} has RPL {cs & 3}"


# -- bases ------------------------------------------------------------------------------------------------------------------

def _v86_base(state: State, name: str) -> Optional[str]:
    base, selector = state[f"GUEST_{name}_BASE"], state[f"GUEST_{name}_SELECTOR"]
    return None if base == selector << 4 else f"GUEST_{name}_BASE {base:#x} is not GUEST_{name}_SELECTOR {selector:#x} << 4 in virtual-8086 mode"


def _canonical_base(state: State, name: str) -> Optional[str]:
    return formats.canonical(state, f"GUEST_{name}_BASE")


def _low_base(state: State, name: str) -> Optional[str]:
    return formats.high_half(f"GUEST_{name}_BASE", state[f"GUEST_{name}_BASE"])


each(CODE_DATA, "v86_base", "R3", "{} base is the selector << 4 in virtual-8086 mode", ("GUEST_{}_BASE", "GUEST_{}_SELECTOR"), _v86_base,
     lambda name: VIRTUAL_8086)
each(("TR", "FS", "GS"), "base", "R4", "{} base is canonical", ("GUEST_{}_BASE",), _canonical_base, always)
each(("LDTR",), "base", "R4", "{} base is canonical where LDTR is usable", ("GUEST_{}_BASE", "GUEST_{}_AR_BYTES"), _canonical_base, usable)
each(("CS",), "base", "R5", "bits 63:32 of {} base are 0", ("GUEST_{}_BASE",), _low_base, always)
each(("SS", "DS", "ES"), "base", "R5", "bits 63:32 of {} base are 0 where it is usable", ("GUEST_{}_BASE", "GUEST_{}_AR_BYTES"), _low_base, usable)

# -- limits and access rights in virtual-8086 mode ----------------------------------------------------------------------------

each(CODE_DATA, "v86_limit", "R6", "{} limit is 0xffff in virtual-8086 mode", ("GUEST_{}_LIMIT",),
     lambda state, name: None if state[f"GUEST_{name}_LIMIT"] == 0xFFFF
     else f"GUEST_{name}_LIMIT is {state[f'GUEST_{name}_LIMIT']:#x} in virtual-8086 mode, it must be 0xffff", lambda name: VIRTUAL_8086)
each(CODE_DATA, "v86_rights", "R7", "{} access rights are 0xf3 in virtual-8086 mode", ("GUEST_{}_AR_BYTES",),
     lambda state, name: None if state[rights(name)] == 0xF3
     else f"{rights(name)} is {state[rights(name)]:#x} in virtual-8086 mode, it must be 0xf3", lambda name: VIRTUAL_8086)


# -- access rights ----------------------------------------------------------------------------------------------------------

@book.rule("guest.cs.type", "R8", "CS is accessed code (type 9, 11, 13 or 15); with unrestricted guest type 3 too", rights("CS"),
           when=NOT_VIRTUAL_8086,
           hint="copy the access-rights byte of the descriptor: a CS that has been loaded is type 11 (0x9b)")
def _cs_type(state: State) -> Optional[str]:
    value = kind(state, "CS")
    if value in (9, 11, 13, 15):
        return None
    if value == 3:
        if state.on("sec", "UNRESTRICTED_GUEST"):
            return None
        return f"{rights('CS')} {state[rights('CS')]:#x}: {type_text(3)} is for CS only with unrestricted guest; it must be accessed code"
    return f"{rights('CS')} {state[rights('CS')]:#x}: CS has {type_text(value)}; it must be 9, 11, 13 or 15 (accessed code)"


@book.rule("guest.ss.type", "R9", "SS, where usable, is accessed writable data (type 3 or 7)", rights("SS"), when=checked("SS"))
def _ss_type(state: State) -> Optional[str]:
    value = kind(state, "SS")
    return None if value in (3,
                             7) else f"{rights('SS')} {state[rights('SS')]:#x}: SS has {type_text(value)}; it must be 3 or 7 (accessed writable data)"


def _data_type(state: State, name: str) -> Optional[str]:
    value = kind(state, name)
    if not value & 1:
        return f"{rights(name)} {state[rights(name)]:#x}: {name} has {type_text(value)}; the accessed bit (bit 0) must be 1"
    if value & 8 and not value & 2:
        return f"{rights(name)} {state[rights(name)]:#x}: {name} has {type_text(value)}; a code segment in {name} must be readable (bit 1)"
    return None


each(DATA, "type", "R10", "{}, where usable, is accessed, and readable if it is code", ("GUEST_{}_AR_BYTES",), _data_type, checked)


def _bit(mask: int, name_of_bit: str) -> Checker:
    def check(state: State, name: str) -> Optional[str]:
        value = state[rights(name)]
        return None if value & mask else f"{rights(name)} {value:#x}: {name_of_bit} must be 1 ({name} is usable)"
    return check


each(CODE_DATA, "s", "R11", "{}, where usable, is a code or data segment (S = 1)", ("GUEST_{}_AR_BYTES",), _bit(S, "S (bit 4)"), checked)


@book.rule("guest.cs.dpl", "R12", "CS.DPL suits its type: 0 for data, SS.DPL for non-conforming code, not above SS.DPL for conforming code",
           rights("CS"), rights("SS"), when=NOT_VIRTUAL_8086)
def _cs_dpl(state: State) -> Optional[str]:
    value, cs = kind(state, "CS"), dpl(state, "CS")
    if value == 3:
        return f"{rights('CS')} {state[rights('CS')]:#x}: DPL is {cs}; CS of type 3 must have DPL 0" if cs else None
    if value in (9, 11):
        ss = dpl(state, "SS")
        return None if cs == ss else f"CS.DPL is {cs}, SS.DPL is {ss}; they must be equal (CS has {type_text(value)})"
    if value in (13, 15):
        ss = dpl(state, "SS")
        return None if cs <= ss else f"CS.DPL {cs} is above SS.DPL {ss} (CS has {type_text(value)})"
    return None     # guest.cs.type fails


@book.rule("guest.ss.dpl", "R13", "SS.DPL equals RPL of SS without unrestricted guest", rights("SS"), "GUEST_SS_SELECTOR",
           when=all_of(NOT_VIRTUAL_8086, RESTRICTED))
def _ss_dpl(state: State) -> Optional[str]:
    value, rpl = dpl(state, "SS"), state["GUEST_SS_SELECTOR"] & 3
    return None if value == rpl else f"SS.DPL is {value} ({rights('SS')} {state[rights('SS')]:#x}), RPL of its selector is {rpl}"


@book.rule("guest.ss.dpl_0", "R13", "SS.DPL is 0 where CS has type 3 or the guest is in real-address mode", rights("SS"), rights("CS"), "GUEST_CR0",
           when=all_of(NOT_VIRTUAL_8086, any_of(lambda state: kind(state, "CS") == 3, lambda state: not state["GUEST_CR0"] & 1)))
def _ss_dpl_0(state: State) -> Optional[str]:
    value = dpl(state, "SS")
    return f"SS.DPL is {value} ({rights('SS')} {state[rights('SS')]:#x}); it must be 0" if value else None


def _data_dpl(state: State, name: str) -> Optional[str]:
    value, rpl, level = kind(state, name), state[f"GUEST_{name}_SELECTOR"] & 3, dpl(state, name)
    if value > 11 or level >= rpl:
        return None
    return f"{name}.DPL {level} is below RPL {rpl} of GUEST_{name}_SELECTOR {state[f'GUEST_{name}_SELECTOR']:#x}"


each(DATA, "dpl", "R14", "DPL of {}, where usable and not conforming code, is not below its RPL without unrestricted guest",
     ("GUEST_{}_AR_BYTES", "GUEST_{}_SELECTOR"), _data_dpl, lambda name: all_of(checked(name), RESTRICTED))
each(CODE_DATA, "p", "R15", "{}, where usable, is present", ("GUEST_{}_AR_BYTES",), _bit(P, "P (bit 7)"), checked,
     hint="a null selector is unusable: set bit 16 of its access rights")


def _reserved(state: State, name: str) -> Optional[str]:
    wrong = state[rights(name)] & AR_RESERVED
    return f"{rights(name)} {state[rights(name)]:#x}: {bit_list(wrong)} must be 0" if wrong else None


each(CODE_DATA, "reserved", "R16", "bits 31:17 and 11:8 of the access rights of {}, where usable, are 0", ("GUEST_{}_AR_BYTES",), _reserved, checked,
     hint="clear what LAR or the descriptor's limit bits 19:16 left in bits 11:8")


@book.rule("guest.cs.db", "R17", "CS.D/B is 0 where CS.L is 1 in IA-32e mode", rights("CS"), when=all_of(NOT_VIRTUAL_8086, LONG_GUEST))
def _cs_db(state: State) -> Optional[str]:
    value = state[rights("CS")]
    return f"{rights('CS')} {value:#x}: L (bit 13) and D/B (bit 14) are both 1" if value & L and value & DB else None


def _granularity(state: State, name: str) -> Optional[str]:
    limit, value = state[f"GUEST_{name}_LIMIT"], state[rights(name)]
    if value & G and limit & 0xFFF != 0xFFF:
        return f"GUEST_{name}_LIMIT {limit:#x} has 0 bits in 11:0, so G (bit 15 of {rights(name)} {value:#x}) must be 0"
    if not value & G and limit >> 20:
        return f"GUEST_{name}_LIMIT {limit:#x} has 1 bits in 31:20, so G (bit 15 of {rights(name)} {value:#x}) must be 1"
    return None


LIMIT_HINT = "the field is the limit in bytes (what LSL gives), not the descriptor's 20 bits"
each(CODE_DATA, "granularity", "R18", "limit and granularity of {}, where usable, agree", ("GUEST_{}_LIMIT", "GUEST_{}_AR_BYTES"), _granularity,
     checked, hint=LIMIT_HINT)


# -- TR and LDTR ------------------------------------------------------------------------------------------------------------

@book.rule("guest.tr.usable", "R19", "TR is usable", rights("TR"), hint="every guest needs a TR, a real-mode one too: 0x8b, limit 0x67 or more")
def _tr_usable(state: State) -> Optional[str]:
    value = state[rights("TR")]
    return f"{rights('TR')} {value:#x}: unusable (bit 16) must be 0" if value & UNUSABLE else None


@book.rule("guest.tr.type", "R19", "TR is a busy TSS (type 11; outside IA-32e mode 3 too)", rights("TR"), "VM_ENTRY_CONTROLS",
           hint="set the busy bit: a TR that has been loaded is type 11 (0x8b)")
def _tr_type(state: State) -> Optional[str]:
    value = kind(state, "TR")
    if value == 11:
        return None
    if value == 3:
        if not state.on("entry", "IA32E_MODE"):
            return None
        return f"{rights('TR')} {state[rights('TR')]:#x}: TR has {type_text(3, system=True)}; it must be 11 (busy TSS) in IA-32e mode"
    return f"{rights('TR')} {state[rights('TR')]:#x}: TR has {type_text(value, system=True)}; it must be 11 (busy TSS)"


@book.rule("guest.ldtr.type", "R20", "LDTR, where usable, is an LDT (type 2)", rights("LDTR"), when=usable("LDTR"))
def _ldtr_type(state: State) -> Optional[str]:
    value = kind(state, "LDTR")
    return None if value == 2 else f"{rights('LDTR')} {state[rights('LDTR')]:#x}: LDTR has {type_text(value, system=True)}; it must be 2 (LDT)"


def _system(state: State, name: str) -> Optional[str]:
    value = state[rights(name)]
    return f"{rights(name)} {value:#x}: S (bit 4) must be 0, {name} is a system segment" if value & S else None


UNUSABLE_HINT = "a guest without an LDT has an unusable LDTR: access rights 0x10000"
for _name, _row, _hint in (("TR", "R19", ""), ("LDTR", "R20", UNUSABLE_HINT)):
    _where = ", where usable," if _name == "LDTR" else ""
    _when = always if _name == "TR" else usable
    each((_name,), "s", _row, f"{{}}{_where} is a system segment (S = 0)", ("GUEST_{}_AR_BYTES",), _system, _when, hint=_hint)
    each((_name,), "p", _row, f"{{}}{_where} is present", ("GUEST_{}_AR_BYTES",), _bit(P, "P (bit 7)"), _when, hint=_hint)
    each((_name,), "reserved", _row, f"bits 31:17 and 11:8 of the access rights of {{}}{_where} are 0", ("GUEST_{}_AR_BYTES",),
         _reserved, _when, hint=_hint)
    each((_name,), "granularity", _row, f"limit and granularity of {{}}{_where} agree", ("GUEST_{}_LIMIT", "GUEST_{}_AR_BYTES"), _granularity, _when,
         hint=_hint or LIMIT_HINT)


# -- FRED -------------------------------------------------------------------------------------------------------------------

FRED_GUEST: Gate = lambda state: bool(state["GUEST_CR4"] & mask_of("cr4", "FRED"))  # noqa: E731


@book.rule("guest.fred.ss_dpl", "R21", "SS.DPL is 0 or 3 in a guest with FRED transitions", rights("SS"), "GUEST_CR4", when=FRED_GUEST)
def _fred_ss_dpl(state: State) -> Optional[str]:
    value = dpl(state, "SS")
    return f"SS.DPL is {value}; FRED transitions know only 0 and 3" if value in (1, 2) else None


@book.rule("guest.fred.cs_l", "R21", "a guest with FRED transitions and SS.DPL = 0 is in 64-bit mode (CS.L = 1)", rights("CS"), rights("SS"),
           "GUEST_CR4",
           when=all_of(FRED_GUEST, lambda state: dpl(state, "SS") == 0))
def _fred_cs_l(state: State) -> Optional[str]:
    value = state[rights("CS")]
    return None if value & L else f"{rights('CS')} {value:#x}: L (bit 13) must be 1 with FRED transitions in ring 0"


@book.rule("guest.fred.iopl", "R21", "RFLAGS.IOPL is 0 in a guest with FRED transitions and SS.DPL = 3", "GUEST_RFLAGS", rights("SS"), "GUEST_CR4",
           when=all_of(FRED_GUEST, lambda state: dpl(state, "SS") == 3))
def _fred_iopl(state: State) -> Optional[str]:
    value = state["GUEST_RFLAGS"] >> 12 & 3
    return f"GUEST_RFLAGS.IOPL is {value}; it must be 0 with FRED transitions in ring 3" if value else None


# -- descriptor tables ------------------------------------------------------------------------------------------------------

book.see = SEE_TABLES


def _limit16(state: State, name: str) -> Optional[str]:
    return formats.high_half(f"GUEST_{name}_LIMIT", state[f"GUEST_{name}_LIMIT"], 16)


each(("GDTR", "IDTR"), "base", "D1", "{} base is canonical", ("GUEST_{}_BASE",), _canonical_base, always)
each(("GDTR", "IDTR"), "limit", "D2", "bits 31:16 of {} limit are 0", ("GUEST_{}_LIMIT",), _limit16, always)

RULES = book.rules
