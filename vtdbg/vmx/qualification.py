"""Exit qualifications: each format in words (SDM vol. 3, Basic VM-Exit Information).

`describe` picks the format by the row of `data/exit_reasons.csv`; a format is a bit table and, where bits depend on others, a function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.errors import MemoryUnavailable
from vtdbg.explain import Fact, bit_facts
from vtdbg.vmx.controls import control
from vtdbg.vmx.guest import Guest
from vtdbg.x86 import msrs
from vtdbg.x86.operand import GPRS

GROUP = "EXIT_QUALIFICATION"

ENTRY_FAILURES: Mapping[int, str] = {
    0: "a check on the guest-state area failed (any other than those with a number of their own)",
    2: "the PDPTEs cannot be loaded: reserved bits in one of the four, at GUEST_CR3 or in GUEST_PDPTR0-3",
    3: "an NMI is to be injected while blocking by STI is set",
    4: "the VMCS link pointer is invalid: not all ones, and not the address of a VMCS with the right revision identifier",
}
"""Reason 33 (SDM vol. 3, VM-Entry Failures During or After Loading Guest State); 1 is not used."""

TASK_SWITCH_SOURCES = ("CALL", "IRET", "JMP", "a task gate in the IDT")


@dataclass(frozen=True)
class Qualification:
    """`summary` is the exit in one sentence as far as the qualification tells it."""

    facts: Tuple[Fact, ...]
    summary: str = ""
    notes: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a format needs besides its number.  `vector` is the exception's, for reason 0."""

    guest: Guest
    source: str
    vector: Optional[int] = None
    linear: Optional[int] = None
    physical: Optional[int] = None

    def fact(self, label: str, value: Optional[int], meaning: str, warning: str = "") -> Fact:
        return Fact(label, value, meaning, self.source, warning, GROUP)

    def bits(self, table: str, value: int) -> Iterator[Fact]:
        return bit_facts(bits.table(table), value, GROUP, self.source)


def _known(register: str, value: Optional[int]) -> str:
    return f"{register} (value not given)" if value is None else register


def describe(form: str, value: int, context: Context) -> Qualification:
    """`value` in format `form` (the `qualification` column of exit_reasons.csv) as facts and a sentence."""
    if form in FORMATS:
        return FORMATS[form](value, context)
    if form.startswith("qual_"):
        return _plain(form, value, context)
    if not form and value:
        why = "this exit clears the qualification: the number is not of this exit, or another field was read"
        return Qualification((context.fact("exit qualification", value, "", why),))
    return Qualification(())


def _unless_zero(value: int, context: Context, meaning: str) -> Qualification:
    return Qualification((context.fact("exit qualification", value, meaning),) if value else ())


def _plain(form: str, value: int, context: Context) -> Qualification:
    return Qualification(tuple(context.bits(form, value)))


def _exception(value: int, context: Context) -> Qualification:
    if context.vector == 1:
        return _debug(value, context)
    if context.vector == 14:
        return Qualification((context.fact("faulting linear address", value, "goes to CR2"),), f"at {value:#x}")
    if context.vector is None:
        return _unless_zero(value, context, "a linear address for #PF, DR6 bits for #DB, else 0; the vector is unknown")
    return describe("", value, context)


def _debug(value: int, context: Context) -> Qualification:
    facts = context.bits("qual_db", value)
    hits = [f"breakpoint {number}" for number in range(4) if value >> number & 1]
    hits += [text for bit, text in ((14, "single step (BS)"), (13, "debug-register access (BD)"), (11, "bus lock (BLD)"), (16, "in an RTM region"))
             if value >> bit & 1]
    return Qualification(tuple(facts), ", ".join(hits) or "no condition recorded")


def _task_switch(value: int, context: Context) -> Qualification:
    selector = value & 0xFFFF
    return replace(_plain("qual_task_switch", value, context),
                   summary=f"task switch to TSS selector {selector:#x} by {TASK_SWITCH_SOURCES[value >> 30 & 3]}")


def _cr(value: int, context: Context) -> Qualification:
    number, access, register = value & 15, value >> 4 & 3, GPRS[value >> 8 & 15]
    facts = [context.fact("control register", number, f"CR{number}", "" if number in (0, 3, 4, 8) else "no exit exists for this register"),
             context.fact("access", access, bits.table("qual_cr")["ACCESS"].meaning(value))]
    if access < 2:
        given = context.guest.register(register)
        facts.append(context.fact("register", given, _known(register, given)))
        arrow = f"MOV CR{number}, {register}" if access == 0 else f"MOV {register}, CR{number}"
        if access == 0 and given is not None and number in (0, 4):
            arrow += f": {bits.table(f'cr{number}').describe(given)}"
        summary = arrow
        leftovers = value & ~0xF3F
    elif access == 2:
        summary, leftovers = "CLTS (clears CR0.TS)", value & ~0x3F
        if number:
            facts.append(context.fact("control register", number, f"CR{number}", "CLTS writes CR0"))
    else:
        data = value >> 16 & 0xFFFF
        where = "memory" if value >> 6 & 1 else "a register"
        linear = context.linear if value >> 6 & 1 else None
        facts.append(context.fact("LMSW source data", data, bits.table("cr0").describe(data & 15)))
        facts.append(context.fact("LMSW operand", value >> 6 & 1, where + (f" at linear address {linear:#x}" if linear is not None else "")))
        summary, leftovers = f"LMSW {data:#x} from {where}: CR0[3:0] = {data & 15:#x} (PE cannot be cleared)", value & ~0xFFFF007F
        if number:
            facts.append(context.fact("control register", number, f"CR{number}", "LMSW writes CR0"))
    if leftovers:
        facts.append(context.fact("reserved bits", leftovers, "", "reserved for this access, must be 0"))
    return Qualification(tuple(facts), summary)


def _dr(value: int, context: Context) -> Qualification:
    number, register = value & 7, GPRS[value >> 8 & 15]
    given = context.guest.register(register)
    to_register = value >> 4 & 1
    facts = [context.fact("debug register", number, f"DR{number}"),
             context.fact("direction", to_register, "from DR" if to_register else "to DR"),
             context.fact("register", given, _known(register, given))]
    facts += [fact for fact in context.bits("qual_dr", value) if fact.warning]
    notes = ("DR4 and DR5 are DR6 and DR7 while CR4.DE is 0, and #UD while it is 1",) if number in (4, 5) else ()
    return Qualification(tuple(facts), f"MOV {register}, DR{number}" if to_register else f"MOV DR{number}, {register}", notes)


def _io(value: int, context: Context) -> Qualification:
    port, size = value >> 16 & 0xFFFF, {0: 1, 1: 2, 3: 4}.get(value & 7)
    reading, string, repeated, immediate = (value >> bit & 1 for bit in (3, 4, 5, 6))
    facts = list(context.bits("qual_io", value))
    width = {1: "B", 2: "W", 4: "D"}.get(size or 0, "?")
    name = ("REP " if repeated else "") + (("INS" if reading else "OUTS") + width if string else "IN" if reading else "OUT")
    wrong = [text for bad, text in ((size is None, "sizes are 1, 2 and 4 bytes (0, 1, 3)"),
                                    (repeated and not string, "REP without a string instruction"),
                                    (string and immediate, "a string instruction takes its port from DX"),
                                    (immediate and port > 255, "an immediate port has 8 bits")) if bad]
    facts += [context.fact("exit qualification", value, "", f"impossible: {text}") for text in wrong]
    size_text = f"{size} byte{'s' if size != 1 else ''}" if size else "impossible size"
    return Qualification(tuple(facts), f"{name} port {port:#x} ({'immediate' if immediate else 'DX'}), {size_text}")


def _apic_access(value: int, context: Context) -> Qualification:
    kind, offset = value >> 12 & 15, value & 0xFFF
    facts = list(context.bits("qual_apic", value))
    if kind >= 10:
        facts = [fact for fact in facts if fact.label != "offset"]
        return Qualification(tuple(facts), bits.table("qual_apic")["TYPE"].meaning(value))
    name = apic_register(offset)
    facts.append(context.fact("APIC register", offset, name))
    return Qualification(tuple(facts), f"{bits.table('qual_apic')['TYPE'].meaning(value)} of APIC register {name}")


def _apic_write(value: int, context: Context) -> Qualification:
    name = apic_register(value & 0xFFF)
    facts = _plain("qual_apic_write", value, context).facts + (context.fact("APIC register", value & 0xFFF, name),)
    return Qualification(facts, f"write of APIC register {name}")


def _ept(value: int, context: Context) -> Qualification:
    facts = []
    valid, translated = value >> 7 & 1, value >> 8 & 1
    advanced = valid and translated
    undefined: Dict[str, str] = {}
    if not valid:
        undefined.update(TRANSLATED="undefined while bit 7 is 0")
    if not advanced:
        undefined.update(dict.fromkeys(("USER", "GUEST_RW", "GUEST_XD"), "undefined unless bits 7 and 8 are 1"))
    if control(context.guest.vmcs, "sec", "MODE_BASED_EPT_EXEC") is False:
        undefined.update(USER_EXECUTABLE="undefined while mode-based execute control is off")
    table = bits.table("qual_ept")
    names = {table[ident].name: why for ident, why in undefined.items()}
    for fact in context.bits("qual_ept", value):
        facts.append(replace(fact, meaning=names[fact.label]) if fact.label in names else fact)
    notes = []
    if advanced and value & 0xE00:
        notes.append("bits 9 to 11 mean something only where IA32_VMX_EPT_VPID_CAP[22] (advanced information for EPT violations) is 1")
    if not valid:
        notes.append("no linear address: the processor was loading the PDPTEs (MOV to CR) or writing a trace")
    if not value & 7:
        facts.append(context.fact("exit qualification", value, "", "impossible: an access is a read, a write or a fetch"))
    return Qualification(tuple(facts), _ept_sentence(value, context), tuple(notes))


def _ept_sentence(value: int, context: Context) -> str:
    kinds = [text for bit, text in ((0, "read"), (1, "write"), (2, "instruction fetch")) if value >> bit & 1] or ["access"]
    if not value >> 7 & 1:
        what = "with no linear address"
    elif value >> 8 & 1:
        what = "at" + (f" linear address {context.linear:#x}" if context.linear is not None else " a linear address")
    else:
        what = "of a guest paging-structure entry while the processor walked for" + (
            f" linear address {context.linear:#x}" if context.linear is not None else " a linear address")
    where = f", guest-physical {context.physical:#x}" if context.physical is not None else ""
    allowed = value >> 3 & 7
    permission = "".join(letter if allowed >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    # Bits 5:3 are ANDed over the levels: 0 does not tell a missing entry from levels that give no right together.
    nothing = not allowed and not value >> 6 & 1
    cause = "EPT allows nothing there (not present, or no right common to all levels)" if nothing else f"EPT allows {permission}"
    missing = [kind for bit, kind in ((0, "read"), (1, "write"), (2, "execute")) if value >> bit & 1 and not allowed >> bit & 1]
    if missing and allowed:
        cause += f", {' and '.join(missing)} is missing"
    elif not missing and value & 7:
        cause += ": the permission is there, so look at bits 6 and 13 to 15, sub-page permissions, or an entry that changed"
    return f"{' and '.join(kinds)} {what}{where}; {cause}"


def _spp(value: int, context: Context) -> Qualification:
    return replace(_plain("qual_spp", value, context), summary="SPP miss" if value >> 11 & 1 else "SPP misconfiguration")


def _sipi(value: int, context: Context) -> Qualification:
    vector = value & 0xFF
    return replace(_plain("qual_sipi", value, context), summary=f"SIPI vector {vector:#x}: start at physical address {vector << 12:#x}")


def _eoi(value: int, context: Context) -> Qualification:
    return replace(_plain("qual_eoi", value, context), summary=f"EOI of vector {value & 0xFF:#x}")


def _invlpg(value: int, context: Context) -> Qualification:
    return replace(_plain("qual_invlpg", value, context), summary=f"INVLPG of linear address {value:#x}")


def _mwait(value: int, context: Context) -> Qualification:
    return Qualification(_plain("qual_mwait", value, context).facts, "the monitor is armed" if value & 1 else "the monitor is not armed")


def _notify(value: int, context: Context) -> Qualification:
    return replace(_plain("qual_notify", value, context), summary="the VM context is invalid" if value & 1 else "the VM context is valid")


def _msr(value: int, context: Context) -> Qualification:
    index = value & 0xFFFFFFFF
    return replace(_plain("qual_msr", value, context), summary=f"MSR {index:#x} ({msrs.name_of(index)})")


def _displacement(value: int, context: Context) -> Qualification:
    return Qualification((context.fact("displacement", value, ""),) if value else ())


def _entry_failure(value: int, context: Context) -> Qualification:
    meaning = ENTRY_FAILURES.get(value, "in no table")
    return Qualification((context.fact("entry failure", value, meaning, "" if value in ENTRY_FAILURES else "impossible: 0, 2, 3 or 4"),), meaning)


def _msr_load(value: int, context: Context) -> Qualification:
    count, table = context.guest.vmcs.get("VM_ENTRY_MSR_LOAD_COUNT"), context.guest.vmcs.get("VM_ENTRY_MSR_LOAD_ADDR")
    warning = ""
    if value == 0:
        warning = "impossible: the first entry is number 1"
    elif count is not None and value > count:
        warning = f"impossible: VM_ENTRY_MSR_LOAD_COUNT is {count}"
    where = f" at physical address {table + 16 * (value - 1):#x}" if table is not None and value else ""
    meaning = f"entry {value} of the VM-entry MSR-load area{where} could not be loaded"
    facts = [context.fact("MSR entry", value, meaning, warning)]
    if table is not None and value and not warning:
        facts += _msr_entry(table + 16 * (value - 1), value, context)
    return Qualification(tuple(facts), meaning)


def _msr_entry(address: int, number: int, context: Context) -> Iterator[Fact]:
    """The entry itself, where memory is at hand."""
    from vtdbg.vmx import msr_areas

    memory = context.guest.memory
    if memory is None:
        return
    try:
        entry = msr_areas.decode_entry(msr_areas.ENTRY_LOAD, number, address, memory.read(address, 16))
    except MemoryUnavailable as error:
        yield context.fact("MSR of the entry", None, f"not read: {error}")
        return
    why = "; ".join(entry.problems) or "nothing in the entry itself forbids it: the value is one that WRMSR refuses, or the MSR does not exist"
    yield context.fact("MSR of the entry", entry.index, f"{entry.name}: {why}")
    yield context.fact("value of the entry", entry.value, "")


def _smi_io(value: int, context: Context) -> Qualification:
    # Only a VM exit to an SMM-transfer monitor fills it (SDM vol. 3, SMM VM Exits).
    return _io(value, context) if value else Qualification(())


def _undefined(value: int, context: Context) -> Qualification:
    return _unless_zero(value, context, "undefined for this exit")


FORMATS: Mapping[str, Callable[[int, Context], Qualification]] = {
    "exception": _exception, "displacement": _displacement, "entry_failure": _entry_failure, "msr_load": _msr_load, "smi_io": _smi_io,
    "undefined": _undefined, "qual_db": _debug, "qual_task_switch": _task_switch, "qual_cr": _cr, "qual_dr": _dr, "qual_io": _io,
    "qual_apic": _apic_access, "qual_apic_write": _apic_write, "qual_ept": _ept, "qual_spp": _spp, "qual_sipi": _sipi, "qual_eoi": _eoi,
    "qual_invlpg": _invlpg, "qual_mwait": _mwait, "qual_notify": _notify, "qual_msr": _msr,
}


@cache
def _apic_registers() -> Mapping[int, str]:
    named = {int(row["offset"], 0): f"{row['name']} ({row['title']})" for row in bits.read_rows("apic_registers.csv")}
    for first, name in ((0x100, "APIC_ISR"), (0x180, "APIC_TMR"), (0x200, "APIC_IRR")):
        for index in range(8):
            named[first + 16 * index] = f"{name} (vectors {32 * index} to {32 * index + 31})"
    return named


def apic_register(offset: int) -> str:
    """"0xb0 APIC_EOI (end of interrupt (EOI))", or that there is none; a register is 16 bytes apart from the next."""
    found = _apic_registers().get(offset & ~15)
    inside = f", byte {offset & 15}" if offset & 15 else ""
    return f"{offset:#x} {found}{inside}" if found else f"{offset:#x} (no register)"


def nmi_unblocked(form: str, value: Optional[int]) -> bool:
    """Does bit 12 say that an IRET unblocked NMI before this exit?  (SDM vol. 3, Information About NMI Unblocking Due to IRET)"""
    return value is not None and form in ("qual_ept", "qual_spp", "qual_pml", "qual_notify") and bool(value >> 12 & 1)
