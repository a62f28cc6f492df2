"""EXITINFO1 and EXITINFO2 in words, by the bit table that `data/svm_exit_codes.csv` gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.explain import Fact, bit_facts
from vtdbg.svm.exit_codes import ExitCode
from vtdbg.x86 import msrs, vectors

DECODE_ASSISTS = "defined only with decode assists (CPUID Fn8000_000A EDX bit 7); 0 may mean that the processor has none"
AVIC_TRAPS = frozenset({0x20, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3E0})
"""APIC registers whose unaccelerated write is a trap: it is done when the exit comes (APM vol. 2, Advanced Virtual Interrupt Controller,
Virtual APIC Register Accesses; Linux 6.12.117 avic.c)."""


@dataclass(frozen=True)
class ExitInputs:
    """What is known of an exit: numbers by VMCB field name with their source, and general-purpose registers that the VMCB does not hold."""

    row: ExitCode
    numbers: Mapping[str, Tuple[int, str]] = field(default_factory=dict)
    registers: Mapping[str, Optional[int]] = field(default_factory=dict)

    def get(self, name: str) -> Optional[int]:
        found = self.numbers.get(name)
        return None if found is None else found[0]

    def source(self, name: str) -> str:
        found = self.numbers.get(name)
        return "" if found is None else found[1]

    def register(self, name: str) -> Optional[int]:
        """A guest register by its 64-bit name; RAX and RSP are the VMCB's where it is known (APM vol. 2, VMRUN Instruction)."""
        name = name.lower()
        return self.get(name) if name in ("rax", "rsp") and self.get(name) is not None else self.registers.get(name)


def info_facts(inputs: ExitInputs) -> Iterator[Fact]:
    """EXITINFO1 and EXITINFO2 where this exit defines them: a headline each, then the bits."""
    for name, label, table in (("exit_info_1", "EXITINFO1", inputs.row.info1), ("exit_info_2", "EXITINFO2", inputs.row.info2)):
        if not table:
            continue
        value = inputs.get(name)
        if value is None:
            what = bits.table(table).title.partition(": ")[2]
            yield Fact(label, None, f"not given ({what})" if what else "not given", group=label)
            continue
        headline = HEADLINES.get(table, _plain)(inputs, value)
        warning = DECODE_ASSISTS if inputs.row.decode and value == 0 else ""
        yield Fact(label, value, headline, inputs.source(name), warning, label)
        said = table in WITHOUT_BITS or (table == "svm_cr_access" and not value >> 63)
        yield from (fact for fact in bit_facts(bits.table(table), value, label, inputs.source(name)) if fact.warning or not said)


def stale_facts(inputs: ExitInputs) -> Iterator[Fact]:
    """Numbers that are there and that this exit did not write."""
    for name, label, table in (("exit_info_1", "EXITINFO1", inputs.row.info1), ("exit_info_2", "EXITINFO2", inputs.row.info2)):
        value = inputs.get(name)
        if value and not table and inputs.row.category not in ("software", "unknown") and inputs.row.kind == "exit":
            yield Fact(label, value, f"not defined for {inputs.row.name}: the value of an older exit", inputs.source(name), group=label)


def npf_words(info1: int) -> str:
    """"write, page not present, final translation" out of the EXITINFO1 of a nested page fault."""
    table = bits.table("npf_info1")
    access = "instruction fetch" if table.test(info1, "ID") else "write" if table.test(info1, "RW") else "read"
    if table.test(info1, "RSV"):
        cause = "reserved bit set in a nested entry"
    else:
        cause = "page present, access not allowed" if table.test(info1, "P") else "page not present"
    stage = "guest page-table walk" if table.test(info1, "GPT") else "final translation" if table.test(info1, "FINAL") else "stage not reported"
    extra = [table[ident].name for ident in ("RMP", "ENC", "SIZEMISMATCH", "VMPL", "SSS", "SS", "PK") if table.test(info1, ident)]
    return ", ".join([access, cause, stage] + extra)


def _npf(_inputs: ExitInputs, value: int) -> str:
    return npf_words(value)


def _ioio(_inputs: ExitInputs, value: int) -> str:
    table = bits.table("svm_ioio")
    sizes = [size for ident, size in (("SZ8", 8), ("SZ16", 16), ("SZ32", 32)) if table.test(value, ident)]
    addresses = [size for ident, size in (("A16", 16), ("A32", 32), ("A64", 64)) if table.test(value, ident)]
    string = table.test(value, "STR")
    name = ("INS" if string else "IN") if value & 1 else ("OUTS" if string else "OUT")
    words = [("REP " if table.test(value, "REP") else "") + name, f"port {table.get(value, 'PORT'):#x}"]
    words.append(f"{sizes[0]}-bit" if len(sizes) == 1 else f"size bits {value >> 4 & 7:#x} (not one size!)")
    if string:
        words.append(f"segment {table['SEG'].meaning(value)}")
        words.append(f"{addresses[0]}-bit address" if len(addresses) == 1 else f"address-size bits {value >> 7 & 7:#x}")
    return ", ".join(words)


def _cr(inputs: ExitInputs, value: int) -> str:
    if not value >> 63:
        return "no register reported: CLTS, LMSW or SMSW, or no decode assists (MOV bit is 0)"
    return f"MOV with {_gpr(inputs, value)}"


def _gpr(inputs: ExitInputs, value: int) -> str:
    name = bits.table("svm_dr_access")["GPR"].meaning(value)
    number = inputs.register(name)
    return f"{name} = {number:#x}" if number is not None else name


def _dr(inputs: ExitInputs, value: int) -> str:
    return f"MOV with {_gpr(inputs, value)}" + ("" if value else " (or no decode assists)")


def _msr(inputs: ExitInputs, value: int) -> str:
    index = inputs.register("rcx")
    name = "MSR in ECX (unknown here)" if index is None else f"{msrs.name_of(index & 0xFFFF_FFFF)} ({index & 0xFFFF_FFFF:#x})"
    if value > 1:
        return f"{value:#x} is neither RDMSR (0) nor WRMSR (1)"
    low, high = inputs.register("rax"), inputs.register("rdx")
    if value == 0:
        return f"RDMSR of {name}"
    data = "" if low is None or high is None else f" = {(high & 0xFFFF_FFFF) << 32 | low & 0xFFFF_FFFF:#x}"
    return f"WRMSR of {name}{data}"


def _error_code(inputs: ExitInputs, value: int) -> str:
    words = vectors.describe_error_code(inputs.row.code - 0x40, value & 0xFFFF_FFFF)
    return f"error code {value & 0xFFFF_FFFF:#x}" + (f": {words}" if words else "")


def _pfec(_inputs: ExitInputs, value: int) -> str:
    return f"page-fault error code: {vectors.describe_page_fault(value)}"


def _linear(inputs: ExitInputs, _value: int) -> str:
    return "linear address that faulted (what CR2 would be)" if inputs.row.category == "exception" else "linear address of the operand"


def _task(_inputs: ExitInputs, value: int) -> str:
    return f"to the TSS of selector {value & 0xFFFF:#x}"


def _task_reason(_inputs: ExitInputs, value: int) -> str:
    table = bits.table("svm_task_switch_2")
    how = "by IRET" if table.test(value, "IRET") else "by far JMP" if table.test(value, "JMP") else "by CALL, interrupt or exception"
    error = f", error code {value & 0xFFFF_FFFF:#x}" if table.test(value, "HAS_ERROR_CODE") else ""
    return how + error


def _avic_access(_inputs: ExitInputs, value: int) -> str:
    offset = value & 0xFF0
    kind = "trap: the write is done" if value >> 32 & 1 and offset in AVIC_TRAPS else "fault: the access is to be emulated"
    return f"{'write' if value >> 32 & 1 else 'read'} of APIC offset {offset:#x}, {kind}"


def _ipi_reason(_inputs: ExitInputs, value: int) -> str:
    return bits.table("svm_avic_ipi_2")["REASON"].meaning(value)


def _words(text: str) -> Callable[[ExitInputs, int], str]:
    return lambda _inputs, _value: text


def _plain(inputs: ExitInputs, value: int) -> str:
    return ""


HEADLINES: Dict[str, Callable[[ExitInputs, int], str]] = {
    "npf_info1": _npf,
    "svm_gpa": _words("guest-physical address of the access"),
    "svm_ioio": _ioio,
    "svm_next_rip": _words("RIP of the next instruction"),
    "svm_cr_access": _cr,
    "svm_dr_access": _dr,
    "svm_msr_access": _msr,
    "svm_error_code": _error_code,
    "pfec": _pfec,
    "svm_linear": _linear,
    "svm_swint": lambda _inputs, value: f"INT {value & 0xFF:#x}",
    "svm_new_value": _words("value written"),
    "svm_invpcid_type": lambda _inputs, value: bits.table("svm_invpcid_type")["TYPE"].meaning(value),
    "svm_task_switch_1": _task,
    "svm_task_switch_2": _task_reason,
    "svm_avic_ipi_1": _words("the ICR that the guest wrote"),
    "svm_avic_ipi_2": _ipi_reason,
    "svm_avic_noaccel_1": _avic_access,
    "svm_avic_noaccel_2": lambda _inputs, value: f"vector {value & 0xFF:#x} (of an EOI write)",
}

WITHOUT_BITS = frozenset({"svm_gpa", "svm_next_rip", "svm_linear", "svm_new_value", "svm_error_code", "svm_swint", "svm_dr_access", "svm_msr_access",
                          "svm_invpcid_type", "svm_ioio", "svm_task_switch_1", "svm_avic_noaccel_1", "svm_avic_noaccel_2"})
"""Tables that the headline says in full; of their bits only the wrong ones are shown."""
