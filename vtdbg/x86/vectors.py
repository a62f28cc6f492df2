"""Interrupt vectors: their names, their error codes in words, and what a second exception during delivery becomes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import List, Mapping, Optional

from vtdbg import bits

SEE_DOUBLE_FAULT = "SDM vol. 3, Interrupt 8 - Double Fault Exception (#DF)"


@dataclass(frozen=True)
class Vector:
    """One row of `data/vectors.csv`; its head says what `kind`, `error_code` and `category` can be."""

    number: int
    mnemonic: str
    title: str
    kind: str
    error_code: str
    category: str

    @property
    def has_error_code(self) -> bool:
        """Does the exception push an error code (in protected mode)?"""
        return self.error_code != "none"


@cache
def vectors() -> Mapping[int, Vector]:
    """The vectors that have a meaning of their own."""
    return {int(row["vector"]): Vector(int(row["vector"]), row["mnemonic"], row["title"], row["kind"], row["error_code"], row["class"])
            for row in bits.read_rows("vectors.csv")}


def vector(number: int) -> Optional[Vector]:
    """The row of an exception vector or NMI, None for the others (reserved below 32, interrupts above)."""
    return vectors().get(number)


def name(number: int) -> str:
    """"#UD", "NMI", or "vector 0x31"."""
    found = vector(number)
    return found.mnemonic if found else f"vector {number:#x}"


def title(number: int) -> str:
    """"#UD (invalid opcode)", "vector 0x31 (interrupt)", "vector 15 (reserved)"."""
    found = vector(number)
    if found:
        return f"{found.mnemonic} ({found.title})"
    return f"vector {number} (reserved)" if number < 32 else f"vector {number:#x} (interrupt)"


def describe_error_code(number: int, error_code: int) -> str:
    """The error code of exception `number` in words; empty where the exception has none.

    Selector format (SDM vol. 3, Error Code): bit 0 EXT, bit 1 IDT, bit 2 TI, 15:3 the index.
    """
    found = vector(number)
    if found is None or found.error_code in ("none", "zero", "security"):
        return ""
    if found.error_code == "page-fault":
        return describe_page_fault(error_code)
    if found.error_code == "control-protection":
        return bits.table("cpec").describe(error_code, names=True)
    return describe_selector_error(error_code)


def describe_selector_error(error_code: int) -> str:
    """"GDT selector 0x28", "IDT gate 0x21, external event"; "no selector" for 0."""
    index = error_code & 0xFFF8
    words: List[str] = []
    if error_code & 2:
        words.append(f"IDT gate {index >> 3:#x}")
    elif index:
        words.append(f"{'LDT' if error_code & 4 else 'GDT'} selector {index:#x}")
    else:
        words.append("no selector")
    if error_code & 1:
        words.append("external event (EXT)")
    if error_code >> 16:
        words.append(f"reserved bits 31:16={error_code >> 16:#x}!")
    return ", ".join(words)


def describe_page_fault(error_code: int) -> str:
    """"user-mode write, page not present", with what else the bits of a page-fault error code say."""
    table = bits.table("pfec")
    mode = "user-mode" if table.test(error_code, "U") else "supervisor-mode"
    access = "instruction fetch" if table.test(error_code, "I") else "write" if table.test(error_code, "W") else "read"
    cause = "protection violation" if table.test(error_code, "P") else "page not present"
    rest = [decoded.field.name for decoded in table.decode(error_code)
            if decoded.number and decoded.ident and decoded.ident not in ("P", "W", "U", "I")]
    rest += [f"reserved bits {decoded.field.bits}={decoded.number:#x}!" for decoded in table.reserved_violations(error_code)]
    return ", ".join([f"{mode} {access}", cause] + rest)


def double_fault(first: int, second: int) -> Optional[str]:
    """What exception `second` during the delivery of exception `first` becomes: "#DF", "shutdown", or None for one after the other.

    Only for hardware exceptions: interrupts and NMI are benign as `first` (SDM vol. 3, Interrupt 8).
    """
    rows = vector(first), vector(second)
    classes = [row.category if row else "benign" for row in rows]
    if classes[0] == "double-fault":
        return "shutdown" if classes[1] in ("contributory", "page-fault") else None
    if classes[0] == "contributory" and classes[1] == "contributory":
        return "#DF"
    if classes[0] == "page-fault" and classes[1] in ("contributory", "page-fault"):
        return "#DF"
    return None
