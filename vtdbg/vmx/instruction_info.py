"""VM-exit instruction information: which operands the instruction had (SDM vol. 3, Information for VM Exits Due to Instruction Execution)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.explain import Fact
from vtdbg.vmx.guest import Guest
from vtdbg.x86.operand import GPRS, SEGMENTS, MemoryOperand, Operand, RegisterOperand, is_long, memory_operand, narrow

GROUP = "VMX_INSTRUCTION_INFO"

ADDRESS_SIZES = {0: 16, 1: 32, 2: 64}
RDRAND_SIZES = {0: 2, 1: 4, 2: 8}

FIXED_SIZES: Mapping[str, int] = {
    "INVEPT": 16, "INVVPID": 16, "INVPCID": 16, "VMCLEAR": 8, "VMPTRLD": 8, "VMPTRST": 8, "VMXON": 8, "SLDT": 2, "STR": 2, "LLDT": 2, "LTR": 2,
}
"""Bytes of the memory operand (SDM vol. 2 and 3, the instructions' pages)."""

MNEMONICS: Mapping[int, str] = {
    19: "VMCLEAR", 21: "VMPTRLD", 22: "VMPTRST", 23: "VMREAD", 25: "VMWRITE", 27: "VMXON", 50: "INVEPT", 53: "INVVPID", 57: "RDRAND", 58: "INVPCID",
    61: "RDSEED", 63: "XSAVES", 64: "XRSTORS", 67: "UMWAIT", 68: "TPAUSE", 69: "LOADIWKEY", 80: "URDMSR", 81: "UWRMSR", 84: "RDMSR", 85: "WRMSRNS",
}
"""The instruction of an exit reason; for reasons 46 and 47 the information itself says which."""

_MEMORY_IDENTS = ("SEGMENT", "ADDRESS_SIZE", "SCALING", "BASE_REGISTER", "BASE_REGISTER_INVALID", "INDEX_REGISTER", "INDEX_REGISTER_INVALID")


@dataclass(frozen=True)
class InstructionInfo:
    """The decoded word.  `reg1` is the register operand where `in_register`; `reg2` the other register operand ("RAX", or "XMM3").

    For a memory operand `segment`, `base`, `index`, `scale` and `address_size` (bits) are its parts; `problems` says what cannot be.
    """

    table: str
    value: int
    mnemonic: str
    in_register: Optional[bool] = None
    segment: Optional[str] = None
    base: Optional[str] = None
    index: Optional[str] = None
    scale: int = 1
    address_size: Optional[int] = None
    reg1: Optional[str] = None
    reg2: Optional[str] = None
    operand_size: Optional[int] = None
    problems: Tuple[str, ...] = ()


def decode(table: str, value: int, reason: int) -> InstructionInfo:
    """The information word of exit `reason` (`table` as exit_reasons.csv names it) as operands.

    A scaling of 0 means x1 (not "no index"): the index counts unless its invalid bit is set.
    """
    layout = bits.table(table)
    idents = set(layout.idents())

    def number(ident: str) -> Optional[int]:
        return layout.get(value, ident) if ident in idents else None

    problems = [f"reserved bits {row.field.bits} are {row.number:#x}" for row in layout.reserved_violations(value)]
    mnemonic = MNEMONICS.get(reason, "")
    if "IDENTITY" in idents:
        mnemonic = layout["IDENTITY"].meaning(value)
    reg1, reg2 = number("REG1"), number("REG2")
    if table == "ii_loadiwkey":
        return InstructionInfo(table, value, mnemonic, reg1=f"XMM{reg1}", reg2=f"XMM{reg2}", problems=tuple(problems))
    if table in ("ii_rdrand", "ii_msr_imm"):
        operand = number("OPERAND_REGISTER" if table == "ii_rdrand" else "GPR_HOLDING_DATA") or 0
        size = 8 if table == "ii_msr_imm" else RDRAND_SIZES.get(number("OPERAND_SIZE") or 0)
        if size is None:
            problems.append(f"operand size {number('OPERAND_SIZE')} does not exist")
        if mnemonic in ("UMWAIT", "TPAUSE"):
            size = 4    # r32 in every mode (SDM vol. 2)
        return InstructionInfo(table, value, mnemonic, in_register=True, reg1=GPRS[operand], operand_size=size, problems=tuple(problems))
    if number("MEMORY_REGISTER"):
        return InstructionInfo(table, value, mnemonic, in_register=True, reg1=GPRS[reg1 or 0], reg2=_name(reg2), problems=tuple(problems))
    return _memory_form(table, value, mnemonic, reg2, problems)


def _memory_form(table: str, value: int, mnemonic: str, reg2: Optional[int], problems: List[str]) -> InstructionInfo:
    layout = bits.table(table)
    parts = {ident: layout.get(value, ident) for ident in _MEMORY_IDENTS if ident in layout.idents()}
    segment = parts["SEGMENT"]
    if segment >= len(SEGMENTS):
        problems.append(f"segment register {segment} does not exist")
    address_size = ADDRESS_SIZES.get(parts["ADDRESS_SIZE"])
    if address_size is None:
        problems.append(f"address size {parts['ADDRESS_SIZE']} does not exist")
    has_base = not parts.get("BASE_REGISTER_INVALID", 1)
    has_index = not parts.get("INDEX_REGISTER_INVALID", 1)
    if address_size == 16 and has_index and parts["SCALING"]:
        problems.append("16-bit addressing has no scaling")
    operand_size = None
    if "OPERAND_SIZE" in layout.idents():
        operand_size = 4 if layout.get(value, "OPERAND_SIZE") else 2
    return InstructionInfo(
        table, value, mnemonic, in_register=False, segment=SEGMENTS[segment] if segment < len(SEGMENTS) else None,
        base=GPRS[parts["BASE_REGISTER"]] if has_base else None, index=GPRS[parts["INDEX_REGISTER"]] if has_index else None,
        scale=1 << parts.get("SCALING", 0) if has_index else 1, address_size=address_size, reg2=_name(reg2),
        operand_size=operand_size, problems=tuple(problems))


def _name(number: Optional[int]) -> Optional[str]:
    return None if number is None else GPRS[number]


def operand_bytes(info: InstructionInfo, guest_is_long: Optional[bool]) -> Optional[int]:
    """How many bytes of memory the instruction accesses at its operand; None where that depends on what is unknown (or on XCR0)."""
    if info.mnemonic in FIXED_SIZES:
        return FIXED_SIZES[info.mnemonic]
    if info.mnemonic in ("VMREAD", "VMWRITE"):
        return None if guest_is_long is None else 8 if guest_is_long else 4
    if info.mnemonic in ("SGDT", "SIDT", "LGDT", "LIDT"):
        return None if guest_is_long is None else 10 if guest_is_long else 6
    return None


def operand(info: InstructionInfo, displacement: Optional[int], guest: Guest) -> Optional[Operand]:
    """The operand that the exit is about, its address computed where the registers are known; None where the information has none."""
    mode = guest.mode()
    if info.in_register:
        register = info.reg1 or ""
        size = info.operand_size
        if size is None and info.mnemonic in ("VMREAD", "VMWRITE"):
            size = None if mode is None else 8 if mode == 64 else 4
        return RegisterOperand(register, size, guest.register(register))
    if info.in_register is None or info.segment is None or info.address_size is None:
        return None
    guest_is_long = None if mode is None and info.address_size != 64 else is_long(mode, info.address_size)
    size = operand_bytes(info, guest_is_long)
    if displacement is None:
        return MemoryOperand(info.segment, info.base, info.index, info.scale, 0, info.address_size, size=size,
                             missing="needs the exit qualification (the displacement)")
    return memory_operand(info.segment, info.base, info.index, info.scale, displacement, info.address_size,
                          register=guest.register, segment_base=guest.segment_base, mode=mode, size=size)


def facts(info: InstructionInfo, guest: Guest, source: str = "") -> List[Fact]:
    """What the word says, in words; parts that the manual leaves undefined for this form are left out."""
    found = [Fact("instruction", None, info.mnemonic, source, group=GROUP, numeric=False)] if info.mnemonic else []
    width = (info.operand_size or 8) * 8
    if info.reg1 and info.table != "ii_loadiwkey":
        found.append(_register_fact("register operand", info.reg1, width, guest, source))
    elif info.reg1:
        found.append(Fact("first register", None, info.reg1, source, group=GROUP, numeric=False))
    if info.reg2:
        label = bits.table(info.table)["REG2"].name
        found.append(_register_fact(label, info.reg2, 64, guest, source))
    if info.in_register is False:
        found.append(Fact("segment", None, info.segment or "?", source, group=GROUP, numeric=False))
        found.append(Fact("address size", info.address_size, f"{info.address_size}-bit" if info.address_size else "?", source, group=GROUP))
        if info.base:
            found.append(_register_fact("base register", info.base, 64, guest, source))
        if info.index:
            found.append(_register_fact("index register", info.index, 64, guest, source))
            found.append(Fact("scale", info.scale, f"x{info.scale}", source, group=GROUP))
        if info.operand_size and not is_long(guest.mode(), info.address_size or 0):
            found.append(Fact("operand size", info.operand_size, f"{info.operand_size * 8}-bit", source, group=GROUP))
    found += [Fact("instruction information", info.value, "", source, f"impossible: {problem}", GROUP) for problem in info.problems]
    return found


def _register_fact(label: str, register: str, width: int, guest: Guest, source: str) -> Fact:
    value = guest.register(register)
    shown = narrow(register, width)
    return Fact(label, value, shown if value is not None else f"{shown} (value not given)", source, group=GROUP)
