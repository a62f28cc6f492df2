"""Which control made a VM exit, and how not to get it: the `cause` column of exit_reasons.csv evaluated against a VMCS.

The rules that begin with @ need arithmetic: exception bitmap with page-fault filter, CR masks and shadows, MSR and I/O bitmaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, List, Mapping, Optional

from vtdbg import bits
from vtdbg.errors import MemoryUnavailable
from vtdbg.explain import Advice
from vtdbg.vmx.bitmaps import msr_place
from vtdbg.vmx.controls import control, control_name
from vtdbg.vmx.events import NMI, Event
from vtdbg.vmx.guest import Guest
from vtdbg.x86 import msrs
from vtdbg.x86.operand import GPRS
from vtdbg.x86.permission import READ, WRITE

SEE_CONDITIONAL = "SDM vol. 3, Instructions That Cause VM Exits Conditionally"
SEE_EXCEPTION = "SDM vol. 3, Exception Bitmap; Other Causes of VM Exits"
SEE_MASKS = "SDM vol. 3, Guest/Host Masks and Read Shadows for CR0 and CR4"
SEE_MSR = "SDM vol. 3, MSR-Bitmap Address"
SEE_SHADOWING = "SDM vol. 3, VMCS Shadowing Bitmap Addresses"
SEE_EPT = "SDM vol. 3, EPT Violations; EPT Misconfigurations; Convertible EPT Violations"
SEE_IO = "SDM vol. 3, I/O-Bitmap Addresses"


@dataclass(frozen=True)
class Exit:
    """What the rules look at."""

    guest: Guest
    number: int
    qualification: Optional[int]
    event: Optional[Event]
    error_code: Optional[int]


def advice(cause: str, what: Exit) -> List[Advice]:
    """Kinds "cause" and "avoid" for the `cause` column of the exit's row."""
    if cause == "always":
        return [Advice("cause", "unconditional: no control decides this exit", "SDM vol. 3, Instructions That Cause VM Exits Unconditionally"),
                Advice("avoid", "cannot be avoided")]
    if cause.startswith("@"):
        return list(RULES[cause[1:]](what))
    return list(_by_controls(cause, what)) if cause and cause != "entry" else []


def state(what: Exit, word: str, ident: str) -> str:
    """'primary control "HLT exiting" (bit 7) is 1', without the value where it is not known."""
    row = bits.table(word)[ident]
    value = control(what.guest.vmcs, word, ident)
    return f"{control_name(word, ident)} (bit {row.low})" + ("" if value is None else f" is {int(value)}")


def _by_controls(cause: str, what: Exit) -> Iterator[Advice]:
    for alternative in cause.split("|"):
        terms = [tuple(term.split(".")) for term in alternative.split("&")]
        values = [control(what.guest.vmcs, word, ident) for word, ident in terms]
        if "|" in cause and False in values:
            continue
        text = " and ".join(state(what, word, ident) for word, ident in terms)
        if False in values:
            text += ": these controls do not give this exit, they changed since or belong to another VMCS"
        yield Advice("cause", text, SEE_CONDITIONAL)
        word, ident = terms[-1]
        yield Advice("avoid", f"clear {control_name(word, ident)} (bit {bits.table(word)[ident].low})")


def _exception(what: Exit) -> Iterator[Advice]:
    event = what.event
    if event is None or not event.valid:
        yield Advice("cause", "an exception whose bit in EXCEPTION_BITMAP is 1, or an NMI with NMI exiting: the vector is not known", SEE_EXCEPTION)
        return
    if event.type == NMI:
        yield from _by_controls("pin.NMI_EXITING", what)
        return
    bitmap = what.guest.vmcs.get("EXCEPTION_BITMAP")
    if event.vector == 14:
        yield from _page_fault(what, bitmap)
        return
    if event.vector > 31:
        return
    bit = f"EXCEPTION_BITMAP bit {event.vector} ({event.name})"
    shown = "" if bitmap is None else f" is {bitmap >> event.vector & 1}"
    doubt = ": this bitmap does not give this exit, it changed since or belongs to another VMCS" if shown == " is 0" else ""
    yield Advice("cause", bit + shown + doubt, SEE_EXCEPTION)
    yield Advice("avoid", f"clear {bit}: the guest then handles {event.name} itself")


def page_fault_exits(bitmap: int, mask: int, match: int, error_code: int) -> bool:
    """Does a page fault with this error code exit?  Bit 14 of the bitmap is used as it is where (PFEC & mask) == match, else inverted."""
    wanted = bool(bitmap >> 14 & 1)
    return wanted if error_code & mask == match else not wanted


def _page_fault(what: Exit, bitmap: Optional[int]) -> Iterator[Advice]:
    mask, match = what.guest.vmcs.get("PAGE_FAULT_ERROR_CODE_MASK"), what.guest.vmcs.get("PAGE_FAULT_ERROR_CODE_MATCH")
    rule = "EXCEPTION_BITMAP bit 14 = 1 and (PFEC & PAGE_FAULT_ERROR_CODE_MASK) == PAGE_FAULT_ERROR_CODE_MATCH, or bit 14 = 0 and they differ"
    if bitmap is None or mask is None or match is None or what.error_code is None:
        yield Advice("cause", rule, SEE_EXCEPTION)
    else:
        relation = "==" if what.error_code & mask == match else "!="
        text = (f"EXCEPTION_BITMAP bit 14 is {bitmap >> 14 & 1} and PFEC & mask = {what.error_code:#x} & {mask:#x} = "
                f"{what.error_code & mask:#x} {relation} match {match:#x}")
        if not page_fault_exits(bitmap, mask, match, what.error_code):
            text += ": these controls do not give this exit, they changed since or belong to another VMCS"
        yield Advice("cause", text, SEE_EXCEPTION)
    yield Advice("avoid", "no page fault exits with EXCEPTION_BITMAP bit 14 = 0, PAGE_FAULT_ERROR_CODE_MASK = 0 and PAGE_FAULT_ERROR_CODE_MATCH = 0",
                 SEE_EXCEPTION)


def _cr(what: Exit) -> Iterator[Advice]:
    if what.qualification is None:
        yield Advice("cause", "guest/host masks and read shadows for CR0 and CR4, CR3-load and CR3-store exiting, CR8-load and CR8-store exiting",
                     SEE_MASKS)
        return
    number, access = what.qualification & 15, what.qualification >> 4 & 3
    named = {(3, 0): "CR3_LOAD_EXITING", (3, 1): "CR3_STORE_EXITING", (8, 0): "CR8_LOAD_EXITING", (8, 1): "CR8_STORE_EXITING"}.get((number, access))
    if access >= 2 or number in (0, 4):
        yield from _masked(what, 4 if number == 4 and access == 0 else 0, access)
    elif named is not None:
        yield from _by_controls(f"proc.{named}", what)
        if number == 3 and access == 0:
            yield from _cr3_targets(what)


def _cr3_targets(what: Exit) -> Iterator[Advice]:
    count = what.guest.vmcs.get("CR3_TARGET_COUNT")
    yield Advice("avoid", f"or put the value into a CR3-target value ({'at most 4' if count is None else f'CR3_TARGET_COUNT is {count}, at most 4'})",
                 "SDM vol. 3, CR3-Target Controls")


def written_value(what: Exit, access: int) -> Optional[int]:
    """The value that a MOV to CR or LMSW writes, 0 for CLTS; None where the register is not given."""
    qualification = what.qualification or 0
    if access == 0:
        return what.guest.register(GPRS[qualification >> 8 & 15])
    return qualification >> 16 & 0xFFFF if access == 3 else 0


def exiting_bits(access: int, value: int, mask: int, shadow: int) -> int:
    """The bits of CR0 or CR4 for which a write exits; `access` as in the qualification (0 MOV, 2 CLTS, 3 LMSW).

    CLTS exits where TS is 1 in mask and shadow; LMSW writes bits 3:0 only and can set PE but not clear it.
    """
    if access == 2:
        return mask & shadow & 8
    if access == 3:
        return mask & ((value ^ shadow) & 0xE | value & ~shadow & 1)
    return (value ^ shadow) & mask


def _masked(what: Exit, number: int, access: int) -> Iterator[Advice]:
    """CR0 and CR4: which bits of the written value the VMM owns and the guest wants to differ from the shadow."""
    vmcs, table = what.guest.vmcs, bits.table(f"cr{number}")
    mask, shadow = vmcs.get(f"CR{number}_GUEST_HOST_MASK"), vmcs.get(f"CR{number}_READ_SHADOW")
    names = f"CR{number}_GUEST_HOST_MASK, CR{number}_READ_SHADOW"
    if mask is None or shadow is None:
        yield Advice("cause", f"a bit that is 1 in the mask and differs between the value and the shadow ({names})", SEE_MASKS)
    else:
        value = written_value(what, access)
        differ = None if value is None else exiting_bits(access, value, mask, shadow)
        text = {2: "CLTS exits where TS (bit 3) is 1 in the mask and in the shadow", 3: f"LMSW {value or 0:#x}: (value ^ shadow) & mask"}.get(
            access, "(value ^ shadow) & mask" + ("" if value is not None else "; the value is not given"))
        text += f"; mask {mask:#x}, shadow {shadow:#x}"
        if differ:
            text += f": {table.describe(differ)}"
        elif differ == 0:
            text += ": no bit differs, so these masks do not give this exit; they changed since or belong to another VMCS"
        yield Advice("cause", text, SEE_MASKS)
    yield Advice("avoid", f"clear the bits in CR{number}_GUEST_HOST_MASK that the guest may own: a guest-owned bit never exits", SEE_MASKS)
    if access == 0:
        yield Advice("emulate", f"check the value (reserved bits, #GP(0)); GUEST_CR{number} gets it with the fixed bits of VMX operation, "
                     f"CR{number}_READ_SHADOW what the guest is to read; for CR0.PG and CR4.PAE also EFER.LMA, the entry control IA-32e mode guest "
                     "and the PDPTEs", SEE_MASKS)
    elif access == 2:
        yield Advice("emulate", "clear TS in GUEST_CR0 and in CR0_READ_SHADOW", SEE_MASKS)
    else:
        yield Advice("emulate", "set bits 3:0 of CR0 (PE can be set, never cleared) in GUEST_CR0 and in CR0_READ_SHADOW", SEE_MASKS)


def _msr_read(what: Exit) -> Iterator[Advice]:
    return _msr(what, write=False)


def _msr_write(what: Exit) -> Iterator[Advice]:
    return _msr(what, write=True)


def msr_index(what: Exit) -> Optional[int]:
    """ECX for RDMSR and WRMSR, the qualification for the newer instructions."""
    if what.number in (31, 32):
        rcx = what.guest.register("rcx")
        return None if rcx is None else rcx & 0xFFFFFFFF
    return what.qualification


def _msr(what: Exit, *, write: bool) -> Iterator[Advice]:
    used = control(what.guest.vmcs, "proc", "USE_MSR_BITMAPS")
    if used is False:
        yield Advice("cause", f"{state(what, 'proc', 'USE_MSR_BITMAPS')}: every RDMSR and WRMSR exits", SEE_MSR)
        yield Advice("avoid", f"set {control_name('proc', 'USE_MSR_BITMAPS')}, give MSR_BITMAP a page and clear the MSR's bit in it", SEE_MSR)
        return
    index = msr_index(what)
    kind = WRITE if write else READ
    if index is None:
        yield Advice("cause", f"the MSR's {kind} bit in the MSR bitmap, or an MSR outside 0-0x1fff and 0xc0000000-0xc0001fff; "
                     "ECX is not given", SEE_MSR)
        return
    place = msr_place(index, kind)
    if place is None:
        yield Advice("cause", f"MSR {index:#x} is in neither range of the bitmap (0-0x1fff, 0xc0000000-0xc0001fff): it always exits", SEE_MSR)
        yield Advice("avoid", "cannot be avoided: no bitmap bit for this MSR", SEE_MSR)
        return
    byte, bit = place
    page = what.guest.vmcs.get("MSR_BITMAP")
    where = f" (physical address {page + byte:#x})" if page is not None else ""
    name = f"MSR {index:#x} ({msrs.name_of(index)})"
    text = f"{name}, {kind}: bit {bit} of byte {byte:#x} of the MSR bitmap{where}{_bit_in_memory(what, page, byte, bit)}"
    yield Advice("cause", text if used else f"{text}, or use of MSR bitmaps is off", SEE_MSR)
    yield Advice("avoid", f"clear bit {bit} of byte {byte:#x} of the MSR bitmap", SEE_MSR)


def _bit_in_memory(what: Exit, page: Optional[int], byte: int, bit: int) -> str:
    if page is None or what.guest.memory is None:
        return ""
    try:
        value = what.guest.memory.read_u8((page & ~0xFFF) + byte) >> bit & 1
    except MemoryUnavailable as error:
        return f"; {error}"
    doubt = "" if value else ": this bitmap does not give this exit, it changed since or belongs to another VMCS"
    return f", which is {value}{doubt}"


def _io(what: Exit) -> Iterator[Advice]:
    used = control(what.guest.vmcs, "proc", "USE_IO_BITMAPS")
    if used is False:
        yield from _by_controls("proc.UNCOND_IO_EXITING", what)
        return
    if what.qualification is None:
        yield Advice("cause", "the port's bit in an I/O bitmap, or unconditional I/O exiting; the port is not known", SEE_IO)
        return
    port, size = what.qualification >> 16 & 0xFFFF, (what.qualification & 7) + 1
    if port + size > 0x10000:
        yield Advice("cause", f"the access to ports {port:#x}-{port + size - 1:#x} wraps around: it always exits", SEE_IO)
        return
    places = []
    for each in range(port, port + size):
        name = "IO_BITMAP_B" if each & 0x8000 else "IO_BITMAP_A"
        byte, bit = (each & 0x7FFF) // 8, each & 7
        places.append(f"{name} byte {byte:#x} bit {bit}{_bit_in_memory(what, what.guest.vmcs.get(name), byte, bit)}")
    text = f"port {port:#x}: " + ("any of " if size > 1 else "") + ", ".join(places)
    if used is None:
        text += f"; or {control_name('proc', 'UNCOND_IO_EXITING')} where I/O bitmaps are not used"
    yield Advice("cause", text, SEE_IO)
    yield Advice("avoid", "clear " + ("these bits" if size > 1 else "that bit"), SEE_IO)


def _ept(what: Exit) -> Iterator[Advice]:
    yield Advice("cause", f"{state(what, 'sec', 'EPT')}, and the EPT entries for the guest-physical address (see `ept walk`)", SEE_EPT)
    yield Advice("avoid", "change those entries" + ("; or have the guest take #VE: EPT-violation #VE on, bit 63 (suppress #VE) of the entry 0"
                                                    if what.number == 48 else ""), SEE_EPT)


def _vmcs_access(what: Exit, bitmap: str) -> Iterator[Advice]:
    shadowing = control(what.guest.vmcs, "sec", "SHADOW_VMCS")
    if shadowing is False:
        yield Advice("cause", "unconditional while VMCS shadowing is off", SEE_CONDITIONAL)
        yield Advice("avoid", f"{control_name('sec', 'SHADOW_VMCS')} with the field's bit clear in {bitmap}", SEE_SHADOWING)
        return
    tail = "" if shadowing else " (without VMCS shadowing it always exits)"
    yield Advice("cause", f"the field encoding's bit in {bitmap}, or an encoding with a bit of 63:15 set{tail}", SEE_CONDITIONAL)
    yield Advice("avoid", f"clear bit (encoding & 7) of byte (encoding & 0x7fff) >> 3 of {bitmap}", SEE_SHADOWING)


def _vmread(what: Exit) -> Iterator[Advice]:
    return _vmcs_access(what, "VMREAD_BITMAP")


def _vmwrite(what: Exit) -> Iterator[Advice]:
    return _vmcs_access(what, "VMWRITE_BITMAP")


def _tpr(what: Exit) -> Iterator[Advice]:
    threshold = what.guest.vmcs.get("TPR_THRESHOLD")
    yield Advice("cause", f"{state(what, 'proc', 'VIRTUAL_TPR')}: bits 7:4 of the virtual TPR are below TPR_THRESHOLD"
                 + ("" if threshold is None else f" ({threshold & 15})"), "SDM vol. 3, TPR Virtualization")
    yield Advice("avoid", "set TPR_THRESHOLD to 0 while no interrupt waits, or use virtual-interrupt delivery, which evaluates the priority itself")


RULES: Mapping[str, Callable[[Exit], Iterator[Advice]]] = {
    "exception": _exception, "cr": _cr, "msr_read": _msr_read, "msr_write": _msr_write, "io": _io,
    "ept": _ept, "vmread": _vmread, "vmwrite": _vmwrite, "tpr": _tpr,
}
