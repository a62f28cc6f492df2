"""`caps show|adjust|presets`: what a processor's capability MSRs allow, and the value that a VMM must write."""

from __future__ import annotations

import re
from typing import Dict, List, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session, given_registers
from vtdbg.errors import UsageError
from vtdbg.numbers import parse_number
from vtdbg.report import FINDINGS, Group, Lines, Pairs, Report, Table, Value, hexa, text
from vtdbg.svm.capabilities import SvmCapabilities
from vtdbg.vmx.adjust import ForcedBit
from vtdbg.vmx.capabilities import WORD_SOURCES, VmxCapabilities, msr_name, presets

SOURCE = Arg("processor", "text", "a file of MSR values (JSON, rdmsr, vmxcap, a log), or the name of a preset (default: --caps)", nargs="?")
MSR = Opt("--msr", "text", "one MSR by index or name, added to the file's: 0x48b=0x...", many=True, metavar="MSR=VALUE")
PRINT_MSRS = ("for index, value in caps.items():", "    print(hex(index), hex(value))")
MSR_VM_CR = 0xC0010114
CPUID = Opt("--cpuid", "text", "one CPUID leaf: 0x8000000a=EAX,EBX,ECX,EDX", many=True, metavar="LEAF=REGISTERS")
VMX_MSRS = range(0x480, 0x494)
DECODED = {"vmx_basic": 0x480, "vmx_misc": 0x485, "ept_vpid_cap": 0x48C, "feature_control": 0x3A}


def capabilities(session: Session, processor: Optional[str], msr: Optional[List[str]], cpuid: Optional[List[str]] = None) -> VmxCapabilities:
    """The capabilities that the user named: a file or preset, and single MSRs and CPUID leaves on top."""
    if processor is not None:
        session.caps_name = processor
    found = session.caps
    values: Dict[Union[int, str], int] = {}
    for item in msr or []:
        name, given, value = item.partition("=")
        if not given:
            raise UsageError(f"--msr {item!r}: write MSR=VALUE, for instance 0x48b=0x005fbcff00000000")
        values[name.strip()] = parse_number(value)
        hexadecimal = int(name, 16) if re.fullmatch(r"\d{3}", name.strip()) else 0
        if hexadecimal in VMX_MSRS:
            raise UsageError(f"--msr {item!r}: {name.strip()} is decimal; for the MSR of VMX write 0x{name.strip()}")
    leaves = dict(_leaf(item) for item in cpuid or [])
    if leaves:
        known: Dict[Union[int, str], int] = dict(found.items()) if found is not None else {}
        known.update(values)
        return VmxCapabilities.from_msrs(known, found.physical_address_width if found is not None else None, cpuid=leaves)
    if found is None and not values:
        raise UsageError(f"no processor: give a file of MSR values, --msr, or a preset ({', '.join(presets())})")
    if found is None:
        return VmxCapabilities.from_msrs(values)
    return found.replaced(values)


def _leaf(text: str) -> Tuple[Tuple[int, int], Tuple[int, int, int, int]]:
    """LEAF[.SUBLEAF]=EAX,EBX,ECX,EDX."""
    name, given, values = text.partition("=")
    registers = [parse_number(value) for value in values.split(",")] if given else []
    if len(registers) != 4:
        raise UsageError(f"--cpuid {text!r}: write LEAF=EAX,EBX,ECX,EDX, for instance 0x8000000a=1,0x8000,0,0x119b9cff")
    leaf, _, subleaf = name.partition(".")
    return (parse_number(leaf), parse_number(subleaf) if subleaf else 0), (registers[0], registers[1], registers[2], registers[3])


@verb("caps show", "the control words and features that a processor allows", SOURCE, MSR, CPUID)
def show(session: Session, processor: Optional[str], msr: Optional[List[str]], cpuid: Optional[List[str]]) -> Report:
    """For each control: may it be 1, must it be 1.  A control whose MSR is not known is unknown, not absent.

    Of an AMD processor: the SVM features of CPUID Fn8000_000A and VM_CR.
    """
    caps = capabilities(session, processor, msr, cpuid)
    svm = SvmCapabilities.of(caps)
    if svm.cpuid(0x8000000A) is not None or caps.msr(MSR_VM_CR) is not None:
        return _show_svm(session, caps, svm)
    report = Report(
        "caps show",
        notes=[*caps.warnings, *caps.problems()],
        python=_python(session, *PRINT_MSRS),
    )
    facts = Pairs("processor")
    facts.add("physical_address_width", "physical-address width", _known(caps.physical_address_width))
    facts.add("revision", "VMCS revision", hexa(caps.revision))
    facts.add("region_size", "VMCS region size", _known(caps.region_size))
    facts.add("cr0_fixed0", "CR0 bits that must be 1", _fixed("cr0", caps.cr0_fixed0))
    facts.add("cr0_fixed1", "CR0 bits that may be 1", hexa(caps.cr0_fixed1))
    facts.add("cr4_fixed0", "CR4 bits that must be 1", _fixed("cr4", caps.cr4_fixed0))
    facts.add("cr4_fixed1", "CR4 bits that may be 1", hexa(caps.cr4_fixed1))
    report.add(facts)
    for name, index in DECODED.items():
        value = caps.msr(index)
        if value is not None:
            report.add(_feature_table(name, value))
    for word in WORD_SOURCES:
        report.add(_word_group(caps, word))
    return report


@verb(
    "caps adjust",
    "the value to write for wanted controls, and what was forced",
    Arg("word", "choice", "control word", choices=tuple(WORD_SOURCES)),
    Arg("wanted", "text", "a number, or names of controls (EPT VPID ...)", nargs="+"),
    Opt("--processor", "text", "file or preset (default: --caps)"),
    MSR,
)
def adjust(session: Session, word: str, wanted: List[str], processor: Optional[str], msr: Optional[List[str]]) -> Report:
    """The allowed-0/allowed-1 arithmetic with the TRUE MSRs: the value, and every bit that had to change, with why."""
    caps = capabilities(session, processor, msr)
    numbers = [item for item in wanted if item[:1].isdigit()]
    if numbers and len(wanted) > 1:
        raise UsageError("give one number or names of controls, not both")
    target = parse_number(numbers[0]) if numbers else list(wanted)
    found = caps.adjust(word, target)
    report = Report("caps adjust", python=_python(session, f"print(caps.adjust({word!r}, {target!r}))"))
    facts = Pairs("adjustment", title=bits.table(word).title)
    digits = bits.table(word).width // 4
    facts.add("wanted", "wanted", hexa(found.wanted, digits))
    facts.add("value", "write", hexa(found.value, digits, "strong"))
    facts.add("source", "by", f"{msr_name(found.source_msr)} ({found.source_msr:#x})" if found.source_msr is not None else None)
    report.add(facts)
    for key, title, rows, style in (
        ("forced_on", "Forced to 1", found.forced_on, ""),
        ("forced_off", "Not available: forced to 0", found.forced_off, "bad"),
    ):
        if rows:
            report.add(_forced_table(key, title, rows, style))
    if found.notes:
        report.add(Lines("notes", list(found.notes), bullet="- "))
    if found.possible is not True:
        report.status = FINDINGS
    return report


@verb(
    "caps support",
    "can this processor run VMX or SVM, and what is missing",
    SOURCE,
    MSR,
    CPUID,
    Opt("--reg", "text", "a register, for what depends on it: cr0=0x80050033, cr4=..., efer=...", many=True, metavar="NAME=VALUE"),
)
def support(
    session: Session, processor: Optional[str], msr: Optional[List[str]], cpuid: Optional[List[str]], reg: Optional[List[str]]
) -> Report:
    """CPUID, IA32_FEATURE_CONTROL, the fixed bits of CR0 and CR4, EFER, VM_CR: each met, not met or unknown, and what to do about it.

    Registers that are not given are taken from the first processor of the source, where it has one.
    """
    from vtdbg.x86.support import support_report

    registers: Dict[str, Optional[int]] = dict(session.machine.cpus[0].registers) if session.has_machine and session.machine.cpus else {}
    registers.update(given_registers(reg or []))
    caps = capabilities(session, processor, msr, cpuid)
    table = Table(
        "checks",
        (("verdict", "verdict"), ("title", "condition"), ("found", ""), ("id", ""), ("advice", ""), ("see", "")),
        headings=False,
        wrap="title",
    )
    styles = {"pass": "good", "fail": "bad", "unknown": "warn"}
    for check in support_report(caps, registers):
        words = f"{check.title}: {check.found}" + (f". To do: {check.advice}" if check.verdict != "pass" and check.advice else "")
        table.add(text(check.verdict, styles[check.verdict]), Value(check.title, words), check.found, check.id, check.advice, check.see)
    report = Report("caps support", [table], notes=list(caps.warnings))
    report.python = _python(
        session, "from vtdbg.x86.support import support_report", f"for check in support_report(caps, {registers!r}):", "    print(check)"
    )
    if any(row[0].data == "fail" for row in table.rows if isinstance(row[0], Value)):
        report.status = FINDINGS
    return report


@verb("caps presets", "the processors whose capability MSRs ship with vtdbg")
def list_presets(session: Session) -> Report:
    """Named sets of capability MSRs for --caps, with where their values are from."""
    table = Table("presets", (("name", "name"), ("msrs", "MSRs"), ("width", "address bits"), ("source", "from")), wrap="source")
    for name in presets():
        caps = VmxCapabilities.preset(name)
        table.add(name, str(len(caps)), caps.physical_address_width, caps.origin)
    return Report("caps presets", [table], python=["from vtdbg.vmx.capabilities import presets", "print(presets())"])


def _show_svm(session: Session, caps: VmxCapabilities, svm: SvmCapabilities) -> Report:
    """What an AMD processor can do for a hypervisor."""
    report = Report("caps show", notes=list(caps.warnings), python=_python(session, "print(vtdbg.SvmCapabilities.of(caps).feature('NP'))"))
    facts = Pairs("processor")
    leaf = svm.cpuid(0x8000000A)
    facts.add("revision", "SVM revision", _known(leaf[0] & 0xFF if leaf is not None else None))
    facts.add("asids", "address-space identifiers", _known(svm.asids))
    facts.add("physical_address_width", "physical-address width", _known(svm.physical_address_width))
    report.add(facts)
    if leaf is not None:
        report.add(_feature_table("svm_features", leaf[3]))
    vm_cr = caps.msr(MSR_VM_CR)
    if vm_cr is not None:
        report.add(_feature_table("vm_cr", vm_cr))
    return report


def _known(number: Optional[int]) -> Value:
    return Value(None, "unknown", "dim") if number is None else Value(number, str(number))


def _fixed(name: str, value: Optional[int]) -> Value:
    return Value(None, "unknown", "dim") if value is None else Value(f"{value:#x}", f"{value:#x} {bits.describe(name, value)}")


def _feature_table(name: str, value: int) -> Table:
    layout = bits.table(name)
    table = Table(name, (("name", "feature"), ("value", "value"), ("bits", "bits")), title=f"{layout.title} {value:#x}", headings=False, wrap="name")
    for decoded in layout.decode(value):
        if decoded.ident:
            flag = decoded.field.kind == "flag"
            shown = ("yes" if decoded.number else "no") if flag else decoded.meaning
            table.add(decoded.field.name, Value(decoded.number, shown, "dim" if flag and not decoded.number else ""), text(decoded.field.bits, "dim"))
    return table


def _word_group(caps: VmxCapabilities, word: str) -> Group:
    layout, allowed = bits.table(word), caps.allowed(word)
    where = f" ({msr_name(allowed.source_msr)})" if allowed is not None else ": unknown, its MSR was not given"
    table = Table("controls", (("name", "control"), ("allowed", "allowed"), ("bit", "bit"), ("ident", "")), headings=False)
    for row in layout.fields:
        if row.ident:
            may, must = caps.supports(word, row.ident), caps.forced(word, row.ident)
            words = "unknown" if may is None else "no" if not may else "must be 1" if must else "yes"
            table.add(row.name, Value({"may": may, "must": must}, words, "dim" if not may else ""), text(row.bits, "dim"), row.ident)
    return Group("words", layout.title + where, [table], {"word": word})


def _forced_table(key: str, title: str, rows: "tuple[ForcedBit, ...]", style: str) -> Table:
    table = Table(key, (("bit", "bit"), ("ident", "control"), ("why", "why"), ("name", "")), title=title, headings=False, wrap="why")
    for row in rows:
        table.add(str(row.bit), text(row.ident or "reserved", style), row.why, row.name)
    return table


def _python(session: Session, *lines: str) -> List[str]:
    return [
        "import vtdbg",
        f"caps = vtdbg.VmxCapabilities.load({session.caps_name!r})" if session.caps_name else "caps = vtdbg.VmxCapabilities.from_msrs({})",
        *lines,
    ]
