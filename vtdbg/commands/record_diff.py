"""`vmcs diff` and `vmcb diff`: two pages, two dumps, or a page and a log; only what differs, by what it means."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from vtdbg.commands.nested_diff import OTHER, other_session
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.select import STALE_VMCB, STALE_VMCS, VmcbAt, VmcsAt, chosen_vmcb, chosen_vmcs
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.record_diff import CLASSES, SUSPICIOUS, FieldChange, RecordDiff, diff_records
from vtdbg.report import FINDINGS, Lines, Report, Table, Value, hexa
from vtdbg.svm import gates as vmcb_gates
from vtdbg.svm import words as vmcb_words
from vtdbg.vmx import gates as vmcs_gates
from vtdbg.vmx import words as vmcs_words

At = Union[VmcsAt, VmcbAt]
Words = Callable[[Any, int], str]
FIRST = Arg("first", "address", "physical address of the first page", nargs="?")
SECOND = Arg("second", "address", "physical address of the second page (default: the first one, where another dump is given)", nargs="?")
DIFF_OPTIONS = (
    Opt("--text", "path", "take the first one from a log", metavar="FILE"),
    Opt("--index", "int", "which dump of that log, from 0"),
    Opt("--other-text", "path", "take the second one from a log (it may be the same)", metavar="FILE"),
    Opt("--other-index", "int", "which dump of that log, from 0"),
    OTHER,
    Opt("--class", "choice", "only changes of this class", choices=tuple(CLASSES)),
)
_CODES = ("exit-info", "exit")
"""Groups whose words say more than their bits."""
_POINTERS = ("RIP", "RSP", "_LEN", "TIMER_VALUE")
_STYLES = {"suspicious": "bad", "control": "warn", "progress": "", "unused": "dim"}


@verb("vmcs diff", "what two VMCSs say differently, bit by bit and by what it means", FIRST, SECOND, *DIFF_OPTIONS)
def vmcs(session: Session, **options: Any) -> Report:
    """Two pages (two addresses), one page in two dumps (--other), or a page and a log.  Guest progress, control changes and what is suspicious
    are told apart.  A field that one side does not know is no difference."""
    return _diff("vmcs", session, chosen_vmcs, vmcs_gates.unused_because, vmcs_words.value_in_words, STALE_VMCS, **options)


@verb("vmcb diff", "what two VMCBs say differently, bit by bit and by what it means", FIRST, SECOND, *DIFF_OPTIONS)
def vmcb(session: Session, **options: Any) -> Report:
    """Two pages (two addresses), one page in two dumps (--other), or a page and a log.  Guest progress, control changes and what is suspicious
    are told apart.  A field that one side does not know is no difference."""
    return _diff("vmcb", session, chosen_vmcb, vmcb_gates.unused_because, vmcb_words.value_in_words, STALE_VMCB, **options)


def _diff(kind: str, session: Session, choose: Callable[..., Sequence[At]], unused: Callable[[Any, Any], Optional[str]], words: Words,
          stale: str, **options: Any) -> Report:
    one, two, second = _sides(kind, session, choose, **options)
    report = Report(f"{kind} diff", header=_header(one, session, options["text"]))
    for session_, item in ((session, one), (second, two)):
        if item.address is not None:
            report.notes += [note for note in (*session_.machine.warnings, stale) if note not in report.notes]
    if second is not session and two.address is not None:
        report.notes.insert(0, f"second: {second.header()}")
    found = diff_records(kind, _record(one), _record(two), unused)
    report.add(Lines("compared", [Value([one.title, two.title], f"first: {one.title}; second: {two.title}")]))
    wanted = options["class"]
    shown = [change for change in found.changes if wanted in (None, change.meaning.name)]
    for name, title in CLASSES.items():
        rows = [change for change in shown if change.meaning.name == name]
        if rows:
            report.add(_table(rows, title, _STYLES[name], words))
    report.add(Lines("summary", _summary(found)))
    if any(change.meaning.name == SUSPICIOUS for change in found.changes):
        report.status = FINDINGS
    report.python = _python(kind, session, second, one, two, options)
    return report


def _record(item: At) -> Any:
    return item.vmcs if isinstance(item, VmcsAt) else item.vmcb


def _sides(kind: str, session: Session, choose: Callable[..., Sequence[At]], first: Optional[int], second: Optional[int], text: Optional[str],
           index: Optional[int], other_text: Optional[str], other_index: Optional[int], other: Optional[str], **_: Any) -> Tuple[At, At, Session]:
    """The two to compare.  One address with --text or --other-text is the page; with --other it counts for both dumps."""
    if text is not None and other_text is None and first is not None and second is None:
        first, second = None, first
    elsewhere = session if other is None else other_session(session, other)
    if text is None and first is None and other is None and other_text is None:
        both = list(choose(session))
        if len(both) == 2:
            return both[0], both[1], session
        raise UsageError(f"which two? {_listed(both)}")
    one = _only(choose(session, first, text, index), kind, "first")
    if second is None and other_text is None and other is None and text is None:
        raise UsageError(f"the second {kind.upper()} is missing: an address, --other with another dump, or --other-text with a log")
    if second is None and other_text is None and text is None:
        second = one.address
    two = _only(choose(elsewhere, second, other_text, other_index), kind, "second")
    return one, two, elsewhere


def _only(found: Sequence[At], kind: str, which: str) -> At:
    if len(found) != 1:
        raise UsageError(f"which {kind.upper()} is the {which} one? {_listed(found)}")
    return found[0]


def _listed(found: Sequence[At]) -> str:
    return f"{len(found)} found" + (f" ({', '.join(item.title for item in found)})" if found else "")


def _header(one: At, session: Session, text: Optional[str]) -> str:
    return session.header() if one.address is not None or text is None else f"first: text {text}"


def _table(rows: Sequence[FieldChange], title: str, style: str, words: Words) -> Table:
    table = Table("changes", (("name", "field"), ("before", "first"), ("after", "second"), ("words", "what changed"), ("class", ""), ("bits", ""),
                              ("sources", "")), title=title, wrap="words")
    for change in rows:
        table.add(
            Value(change.name, change.name, style),
            hexa(change.before),
            hexa(change.after),
            Value(change.meaning.why, _words(change, words)),
            Value(change.meaning.name, ""),
            Value([{"ident": bit.ident, "before": bit.before, "after": bit.after} for bit in change.bits], ""),
            Value(list(change.sources), ""),
        )
    return table


def _words(change: FieldChange, words: Words) -> str:
    """What was and is, in words; or the bits; or how far a pointer went where that is not far; then why it is in its class."""
    parts: List[str] = []
    said = words(change.field, change.before), words(change.field, change.after)
    if all(said) and said[0] != said[1] and (change.field.table is None or change.group in _CODES):
        parts.append(" -> ".join(said))
    elif change.bits:
        parts.append(", ".join(map(str, change.bits)))
    elif change.name.upper().endswith(_POINTERS) and abs(change.step) < 1 << 16:
        parts.append(f"{'+' if change.step > 0 else '-'}{abs(change.step):#x}")
    if change.meaning.why:
        parts.append(change.meaning.why)
    return "; ".join(parts)


def _summary(found: RecordDiff) -> List[Value]:
    counts: Dict[str, int] = {}
    for change in found.changes:
        counts[change.meaning.name] = counts.get(change.meaning.name, 0) + 1
    words = ", ".join(f"{counts[name]} {name}" for name in CLASSES if name in counts)
    differ = f"{len(found.changes)} fields differ ({words})" if counts else "no field differs"
    lines = [Value({"classes": counts, "equal": found.equal}, f"{differ}, {found.equal} are equal.", "dim")]
    for side, names in (("first", found.only_before), ("second", found.only_after)):
        if names:
            some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            lines.append(Value(list(names), f"{len(names)} fields are known of the {side} only, and not compared: {some}", "dim"))
    return lines


def _python(kind: str, session: Session, second: Session, one: At, two: At, options: Dict[str, Any]) -> List[str]:
    name = "Vmcs" if kind == "vmcs" else "Vmcb"
    lines = session.python_open() if one.address is not None or session.has_machine else ["import vtdbg"]
    if second is not session:
        lines.append(f"other = vtdbg.open({second.source!r})")
    machines = ("machine", "machine" if second is session else "other")
    for variable, item, machine, text in (("first", one, machines[0], options["text"]), ("second", two, machines[1], options["other_text"])):
        if item.address is None:
            lines.append(f"{variable} = vtdbg.{name}.from_text(open({text!r}).read())")
        else:
            lines.append(f"{variable} = vtdbg.{name}.from_page({machine}.memory.read_page({item.address:#x}))")
    return [*lines, "from vtdbg.record_diff import diff_records", f"from vtdbg.{'vmx' if kind == 'vmcs' else 'svm'}.gates import unused_because",
            f"for change in diff_records({kind!r}, first, second, unused_because).changes:",
            "    print(change.meaning.name, change.name, hex(change.before), hex(change.after), *change.bits)"]
