"""The general registers that an exiting instruction reads: the `inputs` column of exit_reasons.csv, and MSRs by name."""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

from vtdbg.explain import Fact
from vtdbg.vmx.guest import Guest
from vtdbg.x86 import msrs

GROUP = "registers"


def parse(column: str) -> Tuple[Tuple[str, str], ...]:
    """"EAX=leaf;ECX=subleaf" -> (("EAX", "leaf"), ("ECX", "subleaf"))."""
    pairs = (item.partition("=") for item in column.split(";") if item)
    return tuple((register, meaning) for register, _, meaning in pairs)


def value_of(guest: Guest, register: str) -> Optional[int]:
    """"RAX", "EAX" (low 32 bits), or "EDX:EAX" (64 bits out of two); None where a register is not given."""
    high, pair, low = register.partition(":")
    if pair:
        parts = value_of(guest, high), value_of(guest, low)
        return None if parts[0] is None or parts[1] is None else parts[0] << 32 | parts[1]
    if register.startswith("E"):
        whole = guest.register("R" + register[1:])
        return None if whole is None else whole & 0xFFFFFFFF
    return guest.register(register)


def facts(column: str, guest: Guest) -> Iterator[Fact]:
    """One fact for each register that is given; what is not given says nothing."""
    for register, meaning in parse(column):
        value = value_of(guest, register)
        if value is not None:
            yield Fact(f"{register} ({meaning})", value, msrs.name_of(value) if meaning == "MSR" else "", group=GROUP)


def summary(title: str, column: str, guest: Guest) -> str:
    """"CPUID leaf 0x1 subleaf 0x0", "WRMSR MSR 0xc0000080 (IA32_EFER) value 0xd01 (NXE LMA LME SCE)"; empty without the registers."""
    words = []
    table = None
    for register, meaning in parse(column):
        value = value_of(guest, register)
        if value is None:
            return ""
        words.append(f"{meaning} {value:#x}")
        if meaning == "MSR":
            words.append(f"({msrs.name_of(value)})")
            table = msrs.find(value).table
        elif meaning == "value" and table is not None:
            words.append(f"({table.describe(value)})")
    return " ".join([title, *words]) if words else ""
