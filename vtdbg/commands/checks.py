"""`vmcs check` and `vmcb check`: every reason why the entry fails, those first that the processor finds first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from vtdbg.commands.records import unparsed_block
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import NESTED_ADDRESSES, STALE_VMCB, STALE_VMCS, chosen_vmcb, chosen_vmcs
from vtdbg.commands.session import Session
from vtdbg.findings import Finding
from vtdbg.memory.base import PhysicalMemory
from vtdbg.report import FINDINGS, Block, Cell, Group, Lines, Pairs, Report, Table, Value, hex_or_none, text

if TYPE_CHECKING:
    from vtdbg.vmx.entry.recorded import RecordedFailure
    from vtdbg.vmx.vmcs import Vmcs

OPTIONS = (
    Opt("--text", "path", "take it from a log; - is the standard input", metavar="FILE"),
    Opt("--index", "int", "which dump of the text, from 0"),
    Opt("--all", "flag", "list the checks that pass too"),
    Opt("--lint", "flag", "also mistakes that enter and break later"),
)
UNEXPLAINED = ("Fields were written since, or memory has changed; nested under KVM (tracepoint kvm:kvm_nested_vmenter_failed) or in Bochs (its log) "
               "the processor names the check itself")
PASSED_THEN = "here but passed at the entry that failed, if what they read was not written since"
COLUMNS = (
    ("id", "check"),
    ("message", "what"),
    ("verdict", ""),
    ("severity", ""),
    ("area", ""),
    ("see", ""),
    ("fields", ""),
    ("hint", ""),
    ("missing", ""),
)


@verb(
    "vmcs check",
    "every VM-entry check that fails, not only the first",
    Arg("address", "address", "physical address of the VMCS page (default: every one that a scan finds)", nargs="?"),
    *OPTIONS,
    Opt("--resume", "flag", "the entry is by VMRESUME (checks the launch state too)"),
    Opt("--launch", "flag", "the entry is by VMLAUNCH"),
    Opt("--rdmsr", "flag", "live target: take the capability MSRs from its processor (an injected RDMSR asks first)"),
    Opt("--yes", "flag", "with --rdmsr: do not ask"),
    Opt("--assume-host", "flag", "with --rdmsr: the processor is in the host, although nothing in memory says so"),
)
def check_vmcs(
    session: Session,
    address: Optional[int],
    text: Optional[str],
    index: Optional[int],
    all: bool,
    lint: bool,
    resume: bool,
    launch: bool,
    rdmsr: bool,
    yes: bool,
    assume_host: bool,
) -> Report:
    """All the checks of a VM entry: controls, host state, guest state, MSR-load area.  A check whose input is missing is undecided, with
    the input named; --caps or --rdmsr gives the capability MSRs that many need.
    """
    from vtdbg.vmx.entry import check_vm_entry, predict_vm_entry
    from vtdbg.vmx.entry.recorded import recorded_failure

    chosen = chosen_vmcs(session, address, text, index)
    memory = session.machine.memory if text is None else None
    report = _report("vmcs check", session, text, STALE_VMCS)
    caps = session.caps
    if rdmsr:
        from vtdbg.commands.live import live_capabilities

        caps = live_capabilities(session, yes, assume_host)
        report.notes.append(f"capabilities: {caps.origin}")
    instruction = "vmresume" if resume else "vmlaunch" if launch else None
    for item in chosen:
        given: Dict[str, Any] = {"vmcs_address": None if item.nested else item.address, "instruction": instruction}
        seen = None if item.nested else memory
        if item.nested:
            whose = f"VMCS at {item.address:#x} is {NESTED_ADDRESSES}"
            report.notes.append(f"{whose}: checks that read memory are undecided, and --caps have to be those that its hypervisor sees")
        findings = check_vm_entry(item.vmcs, caps, seen, lint=lint, **given)
        outcome = predict_vm_entry(item.vmcs, caps, seen, **given)
        failure = recorded_failure(item.vmcs)
        group = Group(
            "vmcs",
            item.title,
            _blocks(findings, _outcome_words(outcome), all, _recorded(item.vmcs, failure, outcome), failure),
            {"address": hex_or_none(item.address), "outcome": _outcome_data(outcome)},
        )
        group.blocks += unparsed_block(item.text)
        report.add(group)
        report.notes += [warning for warning in item.vmcs.warnings if warning not in report.notes] if text is not None else []
        _status(report, findings)
        report.python += _python(session, "vmcs", item.address, text, "vtdbg.check_vm_entry(vmcs, caps, {memory})", memory)
    return report


@verb(
    "vmcb check",
    "every VMRUN check that fails, not only the first",
    Arg("address", "address", "physical address of the VMCB page, 0 included (default: every one that a scan finds)", nargs="?"),
    *OPTIONS,
)
def check_vmcb(session: Session, address: Optional[int], text: Optional[str], index: Optional[int], all: bool, lint: bool) -> Report:
    """All the consistency checks of VMRUN.  A check whose input is missing is undecided, with the input named."""
    from vtdbg.svm.capabilities import SvmCapabilities
    from vtdbg.svm.entry import check_vmrun
    from vtdbg.svm.lint import lint_vmcb

    chosen = chosen_vmcb(session, address, text, index)
    memory = session.machine.memory if text is None else None
    caps = SvmCapabilities.of(session.caps) if session.caps is not None else None
    report = _report("vmcb check", session, text, STALE_VMCB)
    for item in chosen:
        report.notes += [warning for warning in item.vmcb.warnings if warning not in report.notes]
        findings = check_vmrun(item.vmcb, caps, memory, vmcb_address=item.address)
        if lint:
            findings += lint_vmcb(item.vmcb, caps, memory)
        report.add(Group("vmcb", item.title, _blocks(findings, _vmrun_words(findings), all), {"address": hex_or_none(item.address)}))
        _status(report, findings)
        report.python += _python(session, "vmcb", item.address, text, "vtdbg.check_vmrun(vmcb, None, {memory})", memory)
    return report


def _report(command: str, session: Session, path: Optional[str], stale: str) -> Report:
    if path is not None:
        return Report(command, header=f"from text {path}", python=["import vtdbg"])
    return Report(command, header=session.header(), notes=[*session.machine.warnings, stale], python=session.python_open())


def _status(report: Report, findings: Sequence[Finding]) -> None:
    if any(finding.failed for finding in findings):
        report.status = FINDINGS


def _blocks(findings: Sequence[Finding], outcome: Value, show_all: bool, recorded: Optional[Value] = None,
            failure: "Optional[RecordedFailure]" = None) -> List[Block]:
    """Failures in processor order, lints, undecided, then the passes: counted, or listed.

    `failure`: a failed entry that the VMCS records; undecided checks that passed then are set apart from those that can explain it.
    """
    facts = Pairs("result")
    facts.add("outcome", "the processor", outcome)
    if recorded is not None:
        facts.add("recorded", "it recorded", recorded)
    blocks: List[Block] = [facts]
    failed = [finding for finding in findings if finding.failed and finding.severity == "fail"]
    lints = [finding for finding in findings if finding.failed and finding.severity != "fail"]
    undecided = [finding for finding in findings if finding.undecided]
    passed = [finding for finding in findings if not finding.failed and not finding.undecided]
    for key, title, rows, style in (
        ("failures", "Failures, in processor order", failed, "bad"),
        ("lints", "Enters, and breaks later", lints, "warn"),
    ):
        if rows:
            blocks.append(_failures(key, title, rows, style))
    before: List[Finding] = []
    if failure is not None:
        from vtdbg.vmx.entry.predict import rule

        then = {finding.id for finding in undecided if finding.severity == "fail" and failure.passed(rule(finding.id).outcome)}
        before = [finding for finding in undecided if finding.id in then]
        undecided = [finding for finding in undecided if finding.id not in then]
    if undecided:
        blocks.append(_undecided("undecided", f"{_checks_are(len(undecided))} undecided for want of input", undecided, show_all))
    if before and show_all:
        blocks.append(_undecided("passed_then", f"{_checks_are(len(before))} undecided {PASSED_THEN}", before, show_all))
    elif before:
        words = f"{_checks_are(len(before))} undecided {PASSED_THEN} (--all lists them)."
        blocks.append(Lines("passed_then", [Value([finding.id for finding in before], words, "dim")]))
    if show_all:
        blocks.append(_plain("passes", f"{len(passed)} checks pass", passed, "good"))
    else:
        blocks.append(Lines("passed", [Value(len(passed), f"{len(passed)} checks pass{' (--all lists them)' if passed else ''}.", "dim")]))
    return blocks


def _row(finding: Finding, message: Value, style: str) -> Tuple[Any, ...]:
    return (
        text(finding.id, style),
        message,
        finding.verdict,
        finding.severity,
        finding.area,
        finding.see,
        Value(list(finding.fields), ""),
        finding.hint,
        Value(list(finding.missing), ""),
    )


def _failures(key: str, title: str, rows: Sequence[Finding], style: str) -> Table:
    table = Table(key, COLUMNS, title=title, headings=False, wrap="message")
    for finding in rows:
        words = finding.message + (f". Try: {finding.hint}" if finding.hint else "") + f" [{finding.see}]"
        table.add(*_row(finding, Value(finding.message, words), style))
    return table


def _plain(key: str, title: str, rows: Sequence[Finding], style: str) -> Table:
    table = Table(key, COLUMNS, title=title, headings=False, wrap="message")
    for finding in rows:
        table.add(*_row(finding, Value(finding.message, finding.message), style))
    return table


def _checks_are(number: int) -> str:
    return f"{number} check{'s are' if number > 1 else ' is'}"


def _undecided(key: str, title: str, rows: Sequence[Finding], show_all: bool) -> Block:
    """Undecided checks, together where they lack the same input: the reader wants to know what to give."""
    if show_all:
        return _plain(key, title, rows, "warn")
    by_input: Dict[Tuple[str, ...], List[Finding]] = {}
    for finding in rows:
        by_input.setdefault(finding.missing, []).append(finding)
    lines: List[Cell] = []
    for missing, findings in sorted(by_input.items(), key=lambda entry: -len(entry[1])):
        names = [finding.id for finding in findings]
        lines.append(Value({"missing": list(missing), "checks": names}, f"without {', '.join(missing)}: {', '.join(names)}"))
    return Lines(key, lines, title=title, bullet="- ")


def _recorded(vmcs: "Vmcs", failure: "Optional[RecordedFailure]", outcome: Any) -> Optional[Value]:
    """What the VMCS records of a failed entry, beside what was found; None where it records none."""
    from vtdbg.vmx.entry.recorded import recorded_error

    if failure is None:
        error = recorded_error(vmcs)
        return None if error is None else Value(error, f"VM-instruction error {error}, of the last VMfail, whenever that was", "warn")
    seen = ("entry-failure", failure.reason, failure.qualification)
    words = _outcome_words(seen).text + ", as of the last exit"
    if outcome == "enters" or (outcome[0] != "undecided" and outcome[:2] != seen[:2]):
        return Value(_outcome_data(seen), f"{words}: not what these fields give. {UNEXPLAINED}", "warn")
    return Value(_outcome_data(seen), words)


def _outcome_words(outcome: Any) -> Value:
    """What the processor does, as it would be seen."""
    if outcome == "enters":
        return Value("enters", "enters the guest", "good")
    if outcome[0] == "undecided":
        rest = _outcome_words(outcome[1])
        return Value(_outcome_data(outcome), f"cannot be told; if what is undecided passes: {rest.text}", "warn")
    words = {
        "VMfailInvalid": "VMfailInvalid: no current VMCS (CF=1)",
        "VMfailValid": f"VMfailValid: the entry fails with VM-instruction error {outcome[1] if len(outcome) > 1 else ''}",
    }
    if outcome[0] == "entry-failure":
        qualification = outcome[2]
        return Value(
            _outcome_data(outcome),
            f"VM exit with reason {outcome[1]} (0x{0x80000000 | outcome[1]:x}: VM-entry failure), qualification "
            + ("unknown" if qualification is None else str(qualification)),
            "bad",
        )
    return Value(_outcome_data(outcome), words[outcome[0]], "bad")


def _outcome_data(outcome: Any) -> Any:
    return [_outcome_data(item) for item in outcome] if isinstance(outcome, tuple) else outcome


def _vmrun_words(findings: Sequence[Finding]) -> Value:
    if any(finding.failed and finding.severity == "fail" for finding in findings):
        return Value("VMEXIT_INVALID", "#VMEXIT with exit code -1 (VMEXIT_INVALID)", "bad")
    if any(finding.undecided and finding.severity == "fail" for finding in findings):
        return Value("undecided", "cannot be told; if what is undecided passes: runs the guest", "warn")
    return Value("enters", "runs the guest", "good")


def _python(session: Session, kind: str, address: Optional[int], path: Optional[str], call: str, memory: Optional[PhysicalMemory]) -> List[str]:
    name = "Vmcs" if kind == "vmcs" else "Vmcb"
    made = f"vtdbg.{name}.from_text(open({path!r}).read())" if path is not None else f"vtdbg.{name}.from_page(machine.memory.read_page({address:#x}))"
    caps = f"vtdbg.VmxCapabilities.load({session.caps_name!r})" if session.caps_name else "None"
    return [
        f"{kind} = {made}",
        f"caps = {caps}",
        f"for finding in {call.format(memory='machine.memory' if memory is not None else 'None')}:",
        "    print(finding.verdict, finding.id, finding.message)",
    ]
