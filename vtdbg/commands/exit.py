"""`exit explain|reasons`: what a VM exit means and what its handler has to do."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, List, Mapping, Optional, TypeVar

from vtdbg.commands.records import unparsed_block
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import STALE_VMCB, STALE_VMCS, chosen_vmcb, chosen_vmcs, found_blocks, of_index, read_text
from vtdbg.commands.session import Session, given_registers
from vtdbg.errors import FormatError, UnknownName, UsageError
from vtdbg.explain import Advice, Explanation, Fact
from vtdbg.names import near_names
from vtdbg.numbers import parse_number
from vtdbg.record import name_key
from vtdbg.report import Block, Group, Lines, Report, Table, Value, hexa, text
from vtdbg.svm import exit_codes
from vtdbg.svm.exits import explain_svm_exit
from vtdbg.vmx import exits as vmx_exits

E = TypeVar("E")

ADVICE_TITLES = {"rip": "RIP", "event": "event", "shadow": "interruptibility", "cause": "cause", "avoid": "avoid", "emulate": "handler", "fix": "fix"}

NUMBERS = (
    Opt("--reason", "text", "exit-reason word or basic reason (number), or its name", metavar="N|NAME"),
    Opt("--qualification", "int", "exit qualification"),
    Opt("--instruction-info", "int", "VM-exit instruction information"),
    Opt("--interruption-info", "int", "VM-exit interruption information"),
    Opt("--error-code", "int", "VM-exit interruption error code"),
    Opt("--idt-vectoring-info", "int", "IDT-vectoring information"),
    Opt("--idt-vectoring-error-code", "int", "IDT-vectoring error code"),
    Opt("--instruction-length", "int", "VM-exit instruction length"),
    Opt("--guest-linear-address", "int", "guest-linear address"),
    Opt("--guest-physical-address", "int", "guest-physical address"),
)
SVM_NUMBERS = (
    Opt("--exit-code", "text", "SVM: EXITCODE (number), or its name", metavar="N|NAME"),
    Opt("--exit-info-1", "int", "SVM: EXITINFO1"),
    Opt("--exit-info-2", "int", "SVM: EXITINFO2"),
    Opt("--exit-int-info", "int", "SVM: EXITINTINFO"),
    Opt("--event-inj", "int", "SVM: EVENTINJ"),
)


@verb(
    "exit explain",
    "what an exit means, from memory, a log or numbers",
    Arg("what", "exit", "physical address of the VMCS or VMCB (default: every one that a scan finds); or the reason of VMX and its qualification, or "
        "the exit code of SVM, EXITINFO1 and EXITINFO2: numbers, or a name first", nargs="*"),
    *NUMBERS,
    *SVM_NUMBERS,
    Opt("--reg", "text", "a guest register, for operands: rbx=0x1000", many=True, metavar="NAME=VALUE"),
    Opt("--instruction-error", "int", "explain a VM-instruction error instead"),
    Opt("--abort", "int", "explain a VMX-abort indicator instead"),
    Opt("--vmcb", "flag", "the address is that of a VMCB"),
    Opt("--text", "path", "take the VMCS or VMCB from a log; - is the standard input", metavar="FILE"),
    Opt("--index", "int", "which dump of the text, from 0"),
)
def explain(
    session: Session,
    what: List[str],
    reg: Optional[List[str]],
    instruction_error: Optional[int],
    abort: Optional[int],
    vmcb: bool,
    text: Optional[str],
    index: Optional[int],
    **numbers: Any,
) -> Report:
    """Every number in words, the operand and the instruction where memory and registers are known, and the advice for the handler:
    does RIP advance, what has to be injected again, which control caused the exit, how to avoid it.
    """
    report = Report("exit explain")
    registers = given_registers(reg or [])
    given = {name: value for name, value in numbers.items() if value is not None}
    address = _address_or_numbers(session, report, what, given)
    if instruction_error is not None or abort is not None:
        _numbered(report, instruction_error, abort)
        return report
    if text is not None:
        _from_text(report, text, index, registers, given)
    elif address is None and ("reason" in given or "exit_code" in given):
        _from_numbers(report, given, registers)
    else:
        _from_memory(report, session, address, vmcb, registers, given)
    return report


def _address_or_numbers(session: Session, report: Report, words: List[str], given: Dict[str, Any]) -> Optional[int]:
    """What stands without an option: the address of a page; or an exit, which goes to `given`.

    An address has 12 zero bits, and only where there is memory to look at; every other number, and every name, is an exit.
    """
    if not words:
        return None
    first = words[0]
    vmx, svm = _known_exit(vmx_exits.find, first), _known_exit(exit_codes.find, first)
    number = _as_number(first)
    if number is None and vmx is None and svm is None:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9 _-]*", first) and session.evaluate is None:
            known = [*(row.name for row in vmx_exits.reasons().values()), *exit_codes.names()]
            raise UnknownName("exit", first, near_names(first, known))
        number = session.resolved(session.convert("address", first))
        vmx = svm = None
    if number is not None and len(words) == 1 and not number & 0xFFF and (number or session.has_machine):
        return number
    if {"reason", "exit_code"} & set(given):
        raise UsageError(f"{first!r} and --reason or --exit-code: one of them says which exit it is")
    if number is not None and vmx is not None:
        # A reason has bits 15:0 and flags in 31:25; more is a number of something else.
        vmx = vmx if not number >> 16 & ~0xFE00 and number >= 0 else None
    if vmx is None and svm is None:
        raise UsageError(f"{first} is neither the address of a page (4 KiB aligned) nor an exit: `exit reasons` lists them{_without_0x(first)}")
    if vmx is not None and svm is not None:
        failed = vmx_exits.instruction_errors().get(number) if number is not None else None
        report.notes.append(f"{first} is taken for VMX exit reason {vmx.number} ({vmx.name}); SVM: --exit-code {first} ({svm.name})"
                            + (f"; what VM_INSTRUCTION_ERROR holds: --instruction-error {first} ({failed.name})" if failed is not None else ""))
    names = ("reason", "qualification") if vmx is not None else ("exit_code", "exit_info_1", "exit_info_2")
    if len(words) > len(names):
        raise UsageError(f"{' '.join(words[len(names):])}: behind {first} only {' and '.join(names[1:])} can stand; the others have options (--help)")
    for name, word in zip(names, words):
        if name in given:
            raise UsageError(f"{word} and --{name.replace('_', '-')}: give one of them")
        given[name] = word if name in ("reason", "exit_code") else parse_number(word)
    return None


def _known_exit(find: Callable[[str], E], word: str) -> Optional[E]:
    try:
        return find(word)
    except UnknownName:
        return None


def _as_number(word: str) -> Optional[int]:
    try:
        return parse_number(word)
    except UsageError:
        return None


def _without_0x(word: str) -> str:
    """For a reason out of a kernel's log, which prints hexadecimal without 0x."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,12}", word):
        return ""
    if not int(word, 16) & 0xFFF:
        return f"; for hexadecimal write 0x{word}"
    meant = _known_exit(vmx_exits.find, f"0x{word}")
    return f"; for hexadecimal write 0x{word} ({meant.name})" if meant is not None else ""


@verb("exit reasons", "every exit reason and exit code in one list",
      Arg("which", "text", "vmx or svm; or a number, a name or a part of one: only those", nargs="?"))
def reasons(session: Session, which: Optional[str]) -> Report:
    """The basic exit reasons of the SDM and the exit codes of the APM, with the kernel's names."""
    report = Report(
        "exit reasons",
        python=["from vtdbg.vmx.exits import reasons", "for number, row in reasons().items():", "    print(number, row.name, row.title)"],
    )
    maker = MAKERS.get((which or "").lower(), "")
    named = () if which is None or maker else (_known_exit(vmx_exits.find, which), _known_exit(exit_codes.find, which))

    def wanted(kind: str, number: int, row: "vmx_exits.ExitReason | exit_codes.ExitCode") -> bool:
        return which is None or maker == kind or (not maker and (row in named or _has(which, number, row)))

    vmx = [row for row in vmx_exits.reasons().values() if wanted("vmx", row.number, row)]
    svm = [row for row in exit_codes.exit_codes().values() if wanted("svm", row.code, row)]
    if not vmx and not svm:
        known = [*(row.name for row in vmx_exits.reasons().values()), *exit_codes.names()]
        raise UnknownName("exit", which, near_names(which, known))
    if vmx:
        table = Table("vmx", (("number", "reason"), ("hex", "hex"), ("name", "name"), ("title", "meaning")), title="VMX basic exit reasons")
        for row in vmx:
            table.add(Value(row.number, str(row.number)), hexa(row.number, 2), row.name, row.title)
        report.add(table)
    if svm:
        table = Table("svm", (("code", "code"), ("name", "name"), ("title", "meaning")), title="SVM exit codes")
        for code in svm:
            table.add(hexa(code.code, 3), code.name, code.title)
        report.add(table)
    return report


MAKERS = {"vmx": "vmx", "intel": "vmx", "vt-x": "vmx", "svm": "svm", "amd": "svm", "amd-v": "svm"}


def _has(wanted: str, number: int, row: "vmx_exits.ExitReason | exit_codes.ExitCode") -> bool:
    """The number, or a part of a name."""
    given = _as_number(wanted)
    if given is not None:
        return given in (number, number & 0xFFFFFFFF)
    part = name_key(wanted)
    return bool(part) and any(part in name_key(name) for name in (row.name, row.title, *row.aliases))


def _split(given: Mapping[str, Any]) -> "tuple[Dict[str, Any], Dict[str, Any]]":
    """The numbers of VMX and those of SVM; mixing them is an error."""
    svm_names = {option.dest for option in SVM_NUMBERS}
    svm = {name: value for name, value in given.items() if name in svm_names}
    vmx = {name: value for name, value in given.items() if name not in svm_names}
    for numbers, key in ((svm, "exit_code"), (vmx, "reason")):
        if isinstance(numbers.get(key), str):
            numbers[key] = _number_or_name(numbers[key])
    if svm and vmx:
        raise UsageError(
            f"--{next(iter(svm)).replace('_', '-')} is of SVM and --{next(iter(vmx)).replace('_', '-')} of VMX: an exit is one or the other"
        )
    return vmx, svm


def _number_or_name(given: str) -> Any:
    if not (given[:1].isdigit() or given[:1] == "-"):
        return given
    number = parse_number(given)
    hint = _without_0x(given) if given.isdigit() and number >> 16 else ""
    if hint and vmx_exits.reasons().get(number & 0xFFFF) is None:
        raise UsageError(f"{given} is no exit reason{hint}")
    return number


def _from_numbers(report: Report, given: Mapping[str, Any], registers: Mapping[str, Optional[int]]) -> None:
    vmx, svm = _split(given)
    if svm:
        found: Explanation = explain_svm_exit(registers=registers, **svm)
    else:
        found = vmx_exits.explain_vm_exit(registers=registers, **vmx)
    report.add(explanation_group(found, ""))
    if not found.known and found.kind == "vmx" and exit_codes.get(found.code) is not None:
        report.notes.append(f"{found.code:#x} is an exit code of SVM ({exit_codes.find(found.code).name}): --exit-code {found.code:#x}")
    call = "explain_svm_exit" if svm else "explain_vm_exit"
    report.python = ["import vtdbg", f"exit = vtdbg.{call}({_arguments(svm or vmx, registers)})", "print(exit)"]


def _arguments(numbers: Mapping[str, Any], registers: Mapping[str, Optional[int]]) -> str:
    words = [f"{name}={value:#x}" if isinstance(value, int) else f"{name}={value!r}" for name, value in numbers.items()]
    return ", ".join(words + ([f"registers={dict(registers)!r}"] if registers else []))


def _from_text(report: Report, path: str, index: Optional[int], registers: Mapping[str, Optional[int]], given: Mapping[str, Any]) -> None:
    from vtdbg import textdump

    vmx, svm = _split(given)
    dumps = [dump for dump in textdump.parse(read_text(path)) if dump.kind in ("vmcs", "vmcb") and dump.values]
    if not dumps:
        raise FormatError(path, f"no VMCS or VMCB dump in it; looked for {textdump.LOOKED_FOR}")
    report.header = f"from text {path}"
    for dump in dumps if index is None else [of_index(dumps, index, "dump")]:
        if dump.kind == "vmcb":
            found: Explanation = explain_svm_exit(vmcb=dump.vmcb(), registers=registers, **svm)
        else:
            found = vmx_exits.explain_vm_exit(vmcs=dump.vmcs(), registers=registers, **vmx)
        group = explanation_group(found, dump.origin)
        group.blocks += unparsed_block(dump)
        report.add(group)
        report.notes += [note for note in dump.notes if note not in report.notes]
    report.python = ["import vtdbg", "from vtdbg.vmx.exits import explain_vmcs", f"print(explain_vmcs(vtdbg.Vmcs.from_text(open({path!r}).read())))"]


def _from_memory(
    report: Report, session: Session, address: Optional[int], vmcb: bool, registers: Mapping[str, Optional[int]], given: Mapping[str, Any]
) -> None:
    vmx, svm = _split(given)
    memory = session.machine.memory
    report.header, report.notes = session.header(), list(session.machine.warnings)
    report.python = [*session.python_open(), "from vtdbg.vmx.exits import explain_vmcs"]
    vmcb = vmcb or (address is not None and session.machine.kind_of(address) == "vmcb")
    intel = address is not None or (session.machine.current("vmcb") is None and (session.machine.current("vmcs") or found_blocks(session, "vmcs")))
    if not vmcb and not svm and intel:
        report.notes.append(STALE_VMCS)
        for item in chosen_vmcs(session, address):
            seen = None if item.nested else memory
            found: Explanation = vmx_exits.explain_vm_exit(vmcs=item.vmcs, memory=seen, registers=registers, **vmx)
            report.add(explanation_group(found, item.title))
            report.python.append(f"print(explain_vmcs(vtdbg.Vmcs.from_page(machine.memory.read_page({item.address:#x})), machine.memory))")
        return
    report.notes.append(STALE_VMCB)
    for block in chosen_vmcb(session, address):
        found = explain_svm_exit(vmcb=block.vmcb, registers=registers, memory=memory, **svm)
        report.add(explanation_group(found, block.title))
        report.python += [
            f"vmcb = vtdbg.Vmcb.from_page(machine.memory.read_page({block.address:#x}))",
            "print(vtdbg.explain_svm_exit(vmcb=vmcb, memory=machine.memory))",
        ]


def _numbered(report: Report, instruction_error: Optional[int], abort: Optional[int]) -> None:
    if instruction_error is not None:
        report.add(explanation_group(vmx_exits.explain_instruction_error(instruction_error), "", "VM-instruction error"))
    if abort is not None:
        report.add(explanation_group(vmx_exits.explain_abort(abort), "", "VMX abort"))
    report.python = [
        "from vtdbg.vmx.exits import explain_abort, explain_instruction_error",
        f"print(explain_instruction_error({instruction_error}))" if instruction_error is not None else f"print(explain_abort({abort}))",
    ]


def explanation_group(found: Explanation, where: str, kind: str = "") -> Group:
    """An explanation under one title: facts by field, what is stale, advice."""
    label = kind or ("exit code" if found.kind == "svm" else "exit reason")
    number = f"{found.code:#x}" if found.kind == "svm" and found.code >= 0 else str(found.code)
    words = f": {found.title}" if found.title.lower() != found.name.lower() else ""
    title = f"{label} {number} {found.name}{words}" + (f" ({where})" if where else "")
    data = {"kind": found.kind, "code": found.code, "name": found.name, "known": found.known, "see": found.see, "where": where}
    blocks: List[Block] = []
    summary = getattr(found, "summary", "")
    if summary and summary != found.title:
        blocks.append(Lines("summary", [text(summary, "strong")]))
    blocks.append(_facts("facts", found.facts, ""))
    if found.stale:
        blocks.append(_facts("stale", found.stale, "Not of this exit", dim=True))
    if found.advice:
        blocks.append(_advice(found.advice))
    if found.notes:
        blocks.append(Lines("notes", list(found.notes), title="Notes", bullet="- "))
    if found.see:
        blocks.append(Lines("see_lines", [Value(None, f"see: {found.see}", "dim")]))
    return Group("exit", title, blocks, data)


def _facts(key: str, facts: "tuple[Fact, ...]", title: str, dim: bool = False) -> Table:
    table = Table(
        key,
        (("label", "what"), ("value", "value"), ("meaning", "meaning"), ("group", ""), ("source", ""), ("warning", "")),
        title=title,
        wrap="meaning",
        headings=False,
    )
    for fact in facts:
        style = "bad" if fact.warning else "dim" if dim else ""
        meaning = "; ".join(part for part in (_meaning(fact), fact.warning) if part)
        number = hexa(fact.value, style=style) if fact.numeric else Value(None, "")
        table.add(text(fact.label, style), number, Value(fact.meaning, meaning, style), fact.group, fact.source, fact.warning)
    return table


def _meaning(fact: Fact) -> str:
    """The meaning where it adds something to the value."""
    return "" if fact.value is not None and fact.meaning in (str(fact.value), f"{fact.value:#x}") else fact.meaning


def _advice(advice: "tuple[Advice, ...]") -> Table:
    table = Table("advice", (("kind", "kind"), ("text", "what to do"), ("see", "")), title="What to do", headings=False)
    for item in advice:
        table.add(text(ADVICE_TITLES[item.kind], "strong"), item.text, item.see)
    return table
