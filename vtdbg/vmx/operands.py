"""What lies at a memory operand, and what a register operand selects: descriptors, pointers, field encodings (SDM vol. 3, VMX Instruction
Reference; vol. 2, INVPCID, LGDT/LIDT, SGDT, SIDT, XSAVES)."""

from __future__ import annotations

from typing import Callable, Iterator, List, Mapping, Optional

from vtdbg.errors import VtdbgError
from vtdbg.explain import Fact
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.guest import Guest
from vtdbg.vmx.instruction_info import InstructionInfo
from vtdbg.x86.operand import Operand, RegisterOperand, signed

GROUP = "operand"

INVPCID_TYPES = ("individual address", "single context", "all contexts with globals", "all contexts without globals")
INVVPID_TYPES = ("individual address", "single context", "all contexts", "single context without globals")
INVEPT_TYPES = {1: "single context", 2: "all contexts"}

WRITTEN_BY_INSTRUCTION = ("VMPTRST", "VMREAD", "SGDT", "SIDT", "SLDT", "STR")
"""Their memory operand is a destination: what lies there now says nothing."""


def type_facts(info: InstructionInfo, guest: Guest) -> Iterator[Fact]:
    """What the second register operand selects: the kind of invalidation, the VMCS field."""
    if info.reg2 is None or info.table == "ii_loadiwkey":
        return
    value = guest.register(info.reg2)
    if value is None:
        yield Fact("selected by register", None, f"needs {info.reg2}", group=GROUP)
    elif info.mnemonic in ("VMREAD", "VMWRITE"):
        known = vmcs_fields.get(value)
        if known is None:
            yield Fact("VMCS field", value, "", warning="no VMCS field has this encoding: VM-instruction error 12", group=GROUP)
        else:
            high = " (high 32 bits)" if value & 1 else ""
            yield Fact("VMCS field", value, f"{known.name} ({known.title}){high}", group=GROUP)
            if info.mnemonic == "VMWRITE" and known.group == "exit-info":
                yield Fact("VMCS field", value, known.name, warning="read-only unless IA32_VMX_MISC[29] is 1: VM-instruction error 13", group=GROUP)
    elif info.mnemonic in _TYPES:
        named = _TYPES[info.mnemonic](value)
        yield Fact("type", value, named or "", warning="" if named else _bad_type(info.mnemonic), group=GROUP)


_TYPES: Mapping[str, Callable[[int], Optional[str]]] = {
    "INVPCID": lambda value: INVPCID_TYPES[value] if value < 4 else None,
    "INVVPID": lambda value: INVVPID_TYPES[value] if value < 4 else None,
    "INVEPT": INVEPT_TYPES.get,
}


def _bad_type(mnemonic: str) -> str:
    return "no such type: #GP(0)" if mnemonic == "INVPCID" else "no such type: VM-instruction error 28"


def contents(info: InstructionInfo, operand: Optional[Operand], guest: Guest) -> Iterator[Fact]:
    """The operand's value out of the guest's memory, or which step failed."""
    if isinstance(operand, RegisterOperand):
        if info.mnemonic in ("LLDT", "LTR") and operand.value is not None:
            yield _selector(operand.value & 0xFFFF)
        return
    if operand is None or guest.memory is None or info.mnemonic in WRITTEN_BY_INSTRUCTION:
        return
    size = 576 if info.mnemonic in ("XSAVES", "XRSTORS") else operand.size
    if operand.linear is None or size is None:
        yield Fact("operand in memory", None, f"not read: {operand.missing or 'needs the guest mode'}", group=GROUP)
        return
    try:
        data = guest.read(operand.linear, size)
    except VtdbgError as error:
        yield Fact("operand in memory", None, f"not read: {error}", group=GROUP)
        return
    yield from _decoded(info, data, guest)


def _decoded(info: InstructionInfo, data: bytes, guest: Guest) -> List[Fact]:
    first, second = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    kind = guest.register(info.reg2) if info.reg2 else None
    if info.mnemonic == "INVPCID":
        return _descriptor("PCID", first, 12, second, kind in (None, 0), "#GP(0)")
    if info.mnemonic == "INVVPID":
        return _descriptor("VPID", first, 16, second, kind in (None, 0), "VM-instruction error 28")
    if info.mnemonic == "INVEPT":
        wrong = "reserved, must be 0: VM-instruction error 28" if second else ""
        return [Fact("EPTP", first, group=GROUP), Fact("descriptor bits 127:64", second, warning=wrong, group=GROUP)]
    if info.mnemonic in ("VMCLEAR", "VMPTRLD", "VMXON"):
        wrong = "not aligned to 4 KiB" if first & 0xFFF else ""
        label = "VMXON pointer" if info.mnemonic == "VMXON" else "VMCS pointer"
        return [Fact(label, first, "a guest-physical address", warning=wrong, group=GROUP)]
    if info.mnemonic in ("LGDT", "LIDT"):
        base = int.from_bytes(data[2:], "little")
        if info.operand_size == 2 and len(data) == 6:
            base &= 0xFFFFFF    # a 16-bit operand size loads 24 bits of base
        limit = int.from_bytes(data[:2], "little")
        return [Fact("limit", limit, group=GROUP), Fact("base", base, group=GROUP)]
    if info.mnemonic in ("LLDT", "LTR"):
        return [_selector(first)]
    if info.mnemonic in ("XSAVES", "XRSTORS"):
        header = int.from_bytes(data[512:520], "little"), int.from_bytes(data[520:528], "little")
        return [Fact("XSTATE_BV", header[0], group=GROUP), Fact("XCOMP_BV", header[1], group=GROUP)]
    value = int.from_bytes(data[:8], "little")
    return [Fact("operand in memory", value, group=GROUP)]


def _descriptor(name: str, first: int, width: int, address: int, uses_address: bool, failure: str) -> List[Fact]:
    """INVPCID and INVVPID: an identifier, reserved bits, a linear address that only type 0 uses."""
    identifier, reserved = first & ((1 << width) - 1), first >> width
    facts = [Fact(name, identifier, group=GROUP)]
    if reserved:
        facts.append(Fact(f"descriptor bits 63:{width}", reserved, warning=f"reserved, must be 0: {failure}", group=GROUP))
    if name == "VPID" and identifier == 0 and uses_address:
        facts.append(Fact(name, 0, warning=f"VPID 0 is the host's: {failure}", group=GROUP))
    # Canonical for 57 bits: a processor with 48 refuses more, but which it is is not known here.
    wrong = f"not canonical: {failure}" if uses_address and not -(1 << 56) <= signed(address, 64) < 1 << 56 else ""
    facts.append(Fact("address to invalidate", address, "" if uses_address else "this type does not use it",
                      warning=wrong, group=GROUP))
    return facts


def _selector(value: int) -> Fact:
    value &= 0xFFFF
    table = "LDT" if value & 4 else "GDT"
    wrong = "the selector of an LDT or TSS must be in the GDT: #GP" if value & 4 else ""
    return Fact("selector", value, f"{value:#x} ({table} entry {value >> 3}, RPL {value & 3})", warning=wrong, group=GROUP)
