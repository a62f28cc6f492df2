"""Verbs that need a live target: `msr read`, `cpuid`, `sgdt`, `vmcs layout learn`, and VMREADs for `vmcs dump --vmread`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, cast

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session
from vtdbg.errors import UsageError
from vtdbg.record import Name
from vtdbg.report import Pairs, Report, Table, Value, hexa
from vtdbg.targets.inject import Injector
from vtdbg.targets.live import LiveMachine
from vtdbg.targets.port import TargetError, TargetGone, Unsupported
from vtdbg.targets.stub import halted
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.capabilities import MsrKey, VmxCapabilities
from vtdbg.vmx.presence import to_ask
from vtdbg.vmx.vmcs import Vmcs

if TYPE_CHECKING:
    from vtdbg.vmx.learn import Learnt

YES = Opt("--yes", "flag", "do not ask: an instruction is written to the target, stepped, and everything put back")
HOST = Opt("--assume-host", "flag", "the processor is in the host, although nothing in memory says so")
NO_PATCH = Opt("--no-patch", "flag", "use a VMREAD that is in the code already instead of writing one at RIP")
ASK = "{what}: writes an instruction at RIP of the stopped target, steps it and puts everything back. Do it? (y or n) "


def live_machine(session: Session) -> LiveMachine:
    """The live target; UsageError for a dump."""
    machine = session.machine
    if not isinstance(machine, LiveMachine):
        raise UsageError(f"{machine.name} is a dump: this needs a live target (in GDB or WinDbg, or -s gdb:HOST:PORT)")
    return machine


def injector(session: Session, what: str, yes: bool, assume_host: bool) -> Injector:
    """To be used with `with`; asks, and refuses outside of the host."""
    machine = live_machine(session)
    machine.refresh()
    where = machine.where
    machine.mode.virtual()

    def allowed() -> None:
        if where.mode == "guest":
            raise UsageError(f"the processor is in a guest ({where.reason}): instructions are injected in the host only; "
                             "run to the exit handler first")
        if where.mode != "host" and not assume_host:
            raise UsageError(f"it is not known whether the processor is in the host ({where.reason}); if you know that it is: --assume-host")
        if halted(machine.port, machine.dialect):
            raise UsageError("the processor is halted (HLT): it would execute nothing before an interrupt; take another one (`where`), or run to "
                             "an address first")
        if not yes and not _agreed(what):
            raise UsageError(f"{what} changes the target for a moment: answer y, or give --yes")

    return Injector(machine.port, allowed)


def _agreed(what: str) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    question = ASK.format(what=what)
    try:
        answer = input(question) if os.name == "nt" else _typed(question)
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def _typed(question: str) -> str:
    """A line of the terminal.  Inside GDB `input` would not see a Ctrl-C before the line has ended."""
    import select

    sys.stdout.write(question)
    sys.stdout.flush()
    line = b""
    while not line.endswith(b"\n"):
        if select.select([sys.stdin.fileno()], [], [], 0.1)[0]:
            more = os.read(sys.stdin.fileno(), 256)
            if not more:
                raise EOFError
            line += more
    return line.decode(errors="replace")


def _report(command: str, session: Session, python: str) -> Report:
    machine = live_machine(session)
    lines = ["from vtdbg.targets.inject import Injector", "with Injector(machine.port, lambda: None) as target:", f"    print({python})"]
    return Report(command, header=session.header(), notes=list(machine.warnings), python=[*session.python_open(), *lines])


@verb("msr read", "RDMSR on the stopped processor", Arg("msr", "text", "name or number; several may follow", nargs="+"), YES, HOST, live=True)
def msr_read(session: Session, msr: List[str], yes: bool, assume_host: bool) -> Report:
    """The instruction is injected: only in the host at CPL 0, after a yes.  An MSR that does not exist faults; the target is put back even so."""
    from vtdbg.x86 import msrs

    numbers = [_msr_index(name) for name in msr]
    try:
        # A debugger that reads MSRs itself changes nothing and needs no yes.
        values = {number: live_machine(session).port.rdmsr(number) for number in numbers}
    except Unsupported:
        with injector(session, "msr read", yes, assume_host) as target:
            values = {number: target.rdmsr(number) for number in numbers}
    report = _report("msr read", session, f"hex(target.rdmsr({numbers[0]:#x}))")
    table = Table("msrs", (("index", "msr"), ("name", "name"), ("value", "value"), ("meaning", "meaning")), headings=False)
    for number, value in values.items():
        row = msrs.msrs().get(number)
        meaning = row.table.describe(value) if row is not None and row.table is not None else ""
        table.add(hexa(number), row.name if row is not None else "", hexa(value, 16), meaning)
    report.add(table)
    return report


# SDM vol. 3, appendix VMX Capability Reporting Facility: which MSRs every VMX processor has, and what says that it has the others.
# A processor is not asked for one that it lacks: RDMSR of that faults.
CAPABILITY_MSRS = (0x3A, *range(0x480, 0x48B))
CONDITIONAL_MSRS: Tuple[Tuple[Tuple[int, ...], Callable[[VmxCapabilities], Optional[bool]]], ...] = (
    ((0x48D, 0x48E, 0x48F, 0x490), lambda caps: caps.true_controls),
    ((0x48B,), lambda caps: caps.supports("proc", "SEC_CONTROLS")),
    ((0x48C,), lambda caps: caps.supports("sec", "EPT") or caps.supports("sec", "VPID")),
    ((0x491,), lambda caps: caps.supports("sec", "VMFUNC")),
    ((0x492,), lambda caps: caps.supports("proc", "TERTIARY_CONTROLS")),
    ((0x493,), lambda caps: caps.supports("exit", "ACTIVATE_SECONDARY_CONTROLS")),
)
CPUID_ADDRESS_SIZES = 0x80000008


def live_capabilities(session: Session, yes: bool, assume_host: bool) -> VmxCapabilities:
    """The capability MSRs of the live processor: by the debugger's own RDMSR, else injected in the host after a yes.

    An MSR that the processor refuses stays unknown, and so does the address width where CPUID cannot be executed.
    """
    port = live_machine(session).port
    try:
        values = existing_msrs(port.rdmsr)
        if values:
            return VmxCapabilities.from_msrs(cast(Mapping[MsrKey, int], values), origin="RDMSR by the debugger")
    except Unsupported:
        pass
    with injector(session, "--rdmsr", yes, assume_host) as target:
        values = existing_msrs(target.rdmsr)
        width = target.cpuid(CPUID_ADDRESS_SIZES)[0] & 0xFF
    known = cast(Mapping[MsrKey, int], values)
    return VmxCapabilities.from_msrs(known, physical_address_width=width or None, origin="RDMSR and CPUID of the live processor")


def existing_msrs(rdmsr: Callable[[int], int]) -> Dict[int, int]:
    """The capability MSRs that the processor has by what the others say; one that is refused all the same stays unknown."""
    values: Dict[int, int] = {}

    def read(indexes: Sequence[int]) -> None:
        for index in indexes:
            try:
                values[index] = rdmsr(index)
            except (Unsupported, TargetGone):
                raise
            except TargetError:
                continue

    read(CAPABILITY_MSRS)
    for indexes, exist in CONDITIONAL_MSRS:
        if exist(VmxCapabilities.from_msrs(cast(Mapping[MsrKey, int], values))):
            read(indexes)
    return values


def _msr_index(name: str) -> int:
    """By number too: a processor has MSRs that no table names."""
    from vtdbg.x86 import msrs

    index = msrs.parse_index(name)
    return msrs.find(name).index if index is None else index


@verb("cpuid", "CPUID on the stopped processor", Arg("leaf", "int", "EAX"), Arg("subleaf", "int", "ECX", nargs="?"), YES, HOST, live=True)
def cpuid(session: Session, leaf: int, subleaf: Optional[int], yes: bool, assume_host: bool) -> Report:
    """The instruction is injected: only in the host at CPL 0, after a yes."""
    with injector(session, "cpuid", yes, assume_host) as target:
        words = target.cpuid(leaf, subleaf or 0)
    report = _report("cpuid", session, f"target.cpuid({leaf:#x}, {subleaf or 0:#x})")
    facts = Pairs("cpuid", title=f"CPUID {leaf:#x}" + (f", {subleaf:#x}" if subleaf else ""))
    for name, value in zip(("eax", "ebx", "ecx", "edx"), words):
        facts.add(name, name, hexa(value, 8))
    report.add(facts)
    return report


@verb("sgdt", "GDTR, IDTR, TR and LDTR of the stopped processor, by SGDT, SIDT, STR and SLDT", YES, HOST, live=True)
def sgdt(session: Session, yes: bool, assume_host: bool) -> Report:
    """For stubs that do not show them.  The instructions are injected: only in the host at CPL 0, after a yes."""
    with injector(session, "sgdt", yes, assume_host) as target:
        found = target.tables()
    report = _report("sgdt", session, "target.tables()")
    facts = Pairs("tables")
    for name, value in found.items():
        facts.add(name, name.replace("_", " "), hexa(value, 16 if name.endswith("base") else 4))
    report.add(facts)
    return report


def vmread_vmcs(session: Session, address: Optional[int], yes: bool, assume_host: bool, no_patch: bool, report_notes: List[str]) -> Vmcs:
    """Every field of the current VMCS by VMREAD, on a processor of any layout.  `address` of its page helps to tell host from guest."""
    if address is not None:
        live_machine(session).consider("vmcs", address)
    with injector(session, "--vmread", yes, assume_host) as target:
        # A VMREAD of a field that does not exist overwrites the VM-instruction error: the processor's own MSRs say which do.
        caps = session.caps if no_patch or session.caps is not None else _caps_of(target)
        wanted = to_ask(caps)
        result = target.vmreads(wanted, patch=not no_patch)
    if caps is not None:
        report_notes.append(f"{len(to_ask(None)) - len(wanted)} fields were not asked for: by {caps.origin} this processor lacks them")
    if result.overwritten:
        refused = ", ".join(vmcs_fields.find(encoding).name for encoding in result.refused[:4]) + ", ..." * (len(result.refused) > 4)
        report_notes.append(f"VMREADs of fields that this processor lacks ({refused}) have set the VM-instruction error to 12; the value shown is "
                            "the one before" + ("; --caps says which fields there are" if caps is None else ""))
    return Vmcs.from_values(cast(Mapping[Name, int], result.values), "VMREAD")


def _caps_of(target: Injector) -> VmxCapabilities:
    return VmxCapabilities.from_msrs(cast(Mapping[MsrKey, int], existing_msrs(target.rdmsr)), origin="its capability MSRs")


@verb(
    "vmcs layout",
    "learn this processor's VMCS layout: VMREAD values against the page",
    Arg("action", "choice", "learn", choices=("learn",)),
    Arg("address", "address", "physical address of the current VMCS"),
    Opt("--out", "path", "layout file to write, with what was seen", metavar="FILE"),
    Opt("--merge", "path", "a file that --out wrote at an earlier stop: what was seen then counts too; may be repeated", metavar="FILE", many=True),
    Opt("--by-writing", "flag", "also change every writable field for a moment, by VMWRITE, and see where the page changes (asks first)"),
    YES, HOST, NO_PATCH,
    live=True,
)
def layout(session: Session, action: str, address: int, out: Optional[str], merge: Optional[List[str]], by_writing: bool, yes: bool,
           assume_host: bool, no_patch: bool) -> Report:
    """A field is placed where its value is the only one of its kind in the page; fields that are 0 or not unique stay open until another stop
    tells (--merge).  A known layout that explains every value places the others, and is named.

    --by-writing proves the place of every writable field, whatever is in it: each is complemented, looked for in the page and put back before the
    next one; page and fields are compared with before at the end.  It changes the VMCS that the hypervisor has current, for a moment.

    The page has to hold what the processor holds: true for emulators, and on hardware after VMCLEAR.
    """
    from vtdbg.targets.writing import Written, place_by_writing
    from vtdbg.vmx.infer import Sample
    from vtdbg.vmx.learn import learn, load_samples, save

    if by_writing and no_patch:
        raise UsageError("--by-writing needs VMWRITE, which --no-patch does not allow")
    earlier = [sample for path in merge or [] for sample in load_samples(path)]
    machine = live_machine(session)
    notes: List[str] = []
    vmcs = vmread_vmcs(session, address, yes, assume_host, no_patch, notes)
    session.forget()
    page = machine.memory.read_page(address)
    samples = [*earlier, Sample(page, {item.field.encoding: item.value for item in vmcs.values()}, "VMREAD and the page of the same VMCS")]
    written = Written({}, "unknown", ())
    if by_writing:
        def page_now() -> bytes:
            session.forget()
            try:
                return machine.memory.read_page(address)
            finally:
                machine.mode.virtual()

        with injector(session, "--by-writing, which changes each field of the current VMCS for a moment,", yes, assume_host) as target:
            written = place_by_writing(target, samples[-1].values, page_now)
        if not written.places:
            notes.append("no VMWRITE changed the page: this processor does not keep the current VMCS in memory")
    learnt = learn(samples, written=written.places, form=written.form)
    report = _report("vmcs layout", session, "target.vmreads([0x681e])")
    report.notes += [*notes, *learnt.inference.notes]
    if out:
        save(learnt, samples, out)
    absent = [place for place in learnt.inference.places if place.status == "absent"]
    if absent:
        report.notes.append(f"{len(absent)} values stand nowhere in the page: it does not hold what the processor holds (VMCLEAR writes it), or in "
                            "another form; do not believe places that one such page alone gives")
    report.add(_learnt_facts(learnt, len(samples), out))
    report.add(_learnt_fields(learnt))
    return report


def _learnt_facts(learnt: "Learnt", stops: int, out: Optional[str]) -> Pairs:
    facts = Pairs("layout", title=f"Layout of revision {learnt.layout.revision_ids[0]:#x}")
    facts.add("placed", "fields placed", f"{len(learnt.layout.fields)} of {len(learnt.inference.places)} read")
    if learnt.written:
        facts.add("written", "by writing", str(len(learnt.written)))
    facts.add("unique", "by the pages alone", str(len(learnt.inference.placed)))
    facts.add("stops", "from", f"{stops} stop{'s' * (stops != 1)}")
    facts.add("access_rights", "access rights", learnt.layout.access_rights)
    explained = f"{', '.join(learnt.known)}: every one of {learnt.explained} different values that are not 0 is where it has its field"
    facts.add("known", "known layout", Value(list(learnt.known), explained if learnt.known else "none explains every value",
                                             "good" if learnt.known else ""))
    if out:
        facts.add("file", "written to", out)
    return facts


def _learnt_fields(learnt: "Learnt") -> Table:
    """Every field that was read: placed ones by offset, then the open ones."""
    table = Table("fields", (("offset", "offset"), ("size", "size"), ("name", "field"), ("status", "status"), ("why", "why")), wrap="why")
    status = learnt.status
    for encoding, place in sorted(learnt.layout.fields.items(), key=lambda item: item[1].offset):
        known = encoding in learnt.from_known
        here = status[encoding]
        proof = "written" if encoding in learnt.written else "known" if known else "unique"
        table.add(hexa(place.offset, 3), str(place.size), vmcs_fields.find(encoding).name, proof,
                  Value(here.why, f"{here.status} by the pages: {here.why}" if known else here.why if proof == "unique" else "", "dim"))
    for here in learnt.open:
        word = {"silent": "unknown"}.get(here.status, here.status)
        table.add("", str(here.size), vmcs_fields.find(here.encoding).name, Value(word, word, "warn"), Value(here.why, here.why, "dim"))
    return table
