"""`decode`: any register, control word, field, entry or MSR, by name and value."""

from __future__ import annotations

from vtdbg import decode as decoding
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import FINDINGS, Lines, Report, Table, Value, hexa, text


@verb(
    "decode",
    "a register, control word, VMCS or VMCB field, table entry or MSR in words",
    Arg("name", "register", 'what it is: cr0, eptp, ar, sec, GUEST_CR4, ept_pde_2m, "msr 0x48b", ...'),
    Arg("value", "int", "its value"),
    Opt("--all", "flag", "bits that are 0 too"),
)
def decode(session: Session, name: str, value: int, all: bool) -> Report:
    """Every bit that says something; reserved bits with the wrong value are called wrong."""
    found = decoding.decode(name, value)
    report = Report("decode", python=["from vtdbg.decode import decode", f"print(decode({name!r}, {value:#x}).words)"])
    title = f"{found.name} {value:#x}: {found.what}" if found.what and found.what != found.name else f"{found.name} {value:#x}"
    if found.table is not None:
        table = Table(
            "bits", (("bits", "bits"), ("ident", "name"), ("value", "value"), ("name", "meaning")), title=title, wrap="name", empty="no bit is set"
        )
        shown = {row.field.bits for row in found.table.shown(value)}
        for row in found.rows:
            if all or row.field.bits in shown:
                one = row.field
                words = one.name if one.kind in ("flag", "inverted") else f"{one.name}: {row.meaning}"
                wrong = one.kind in ("reserved0", "reserved1") and one.bits in shown and not found.mask
                table.add(one.bits, text(one.ident or "-"), hexa(row.number), Value(one.name, words, "bad" if wrong else "" if row.number else "dim"))
        report.add(table)
        report.add(Lines("see", [Value(found.table.see, f"see: {found.table.see}", "dim")]))
    else:
        report.add(Lines("value", [Value(f"{value:#x}", title)]))
    if found.settings:
        controls = Table("settings", (("bit", "bit"), ("ident", "control"), ("setting", "may be"), ("name", "")), title="Allowed settings")
        for setting in found.settings:
            controls.add(
                str(setting.bit),
                setting.ident or setting.name,
                Value(setting.setting, setting.setting, "dim" if setting.setting == "must be 0" else ""),
                setting.name,
            )
        report.add(controls)
    if found.problems:
        report.add(Lines("problems", [Value(problem, problem, "bad") for problem in found.problems], bullet="! "))
        report.status = FINDINGS
    if found.notes:
        report.add(Lines("notes", list(found.notes), bullet="- "))
    return report
