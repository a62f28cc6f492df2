"""`decode`: any register, control word, field, entry or MSR, by name and value."""

from __future__ import annotations

from typing import List, Optional

from vtdbg import decode as decoding
from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session
from vtdbg.report import FINDINGS, Lines, Pairs, Report, Table, Value, hexa, text
from vtdbg.svm import bitmaps as svm_bitmaps
from vtdbg.vmx import bitmaps as vmx_bitmaps
from vtdbg.x86 import msrs
from vtdbg.x86.permission import ACCESSES


@verb(
    "decode",
    "a register, control word, VMCS or VMCB field, table entry or MSR in words",
    Arg("name", "register", "what it is: cr0, eptp, ar, sec, GUEST_CR4, ept_pde_2m, msr 0x48b, ...", nargs="+"),
    Arg("value", "text", "its value"),
    Opt("--all", "flag", "bits that are 0 too"),
)
def decode(session: Session, name: List[str], value: str, all: bool) -> Report:
    """Every bit that says something; reserved bits with the wrong value are called wrong."""
    number = int(session.convert("int", value))
    report = decoded(" ".join(name), number, all)
    if value.isdecimal() and number > 9:
        # Logs print hexadecimal without 0x, and digits alone do not show it.
        report.notes.append(f"{value} is decimal here; hexadecimal would be 0x{value}")
    return report


def decoded(name: str, value: int, all: bool = False) -> Report:
    """What `decode NAME VALUE` prints."""
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
                words = one.name if one.kind in ("flag", "inverted") and not one.values else f"{one.name}: {row.meaning}"
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


@verb(
    "msr show",
    "an MSR by name or index: names, the bits that intercept it, and a value in words",
    Arg("msr", "text", "name or index"),
    Arg("value", "int", "its value", nargs="?"),
)
def msr_show(session: Session, msr: str, value: Optional[int]) -> Report:
    """Every name that sources give the index, and which byte and bit of VMX' MSR bitmap and of SVM's permission map decide about it."""
    found = msrs.find(msr)
    facts = Pairs("msr", title=f"MSR {found.index:#x} {found.name}")
    if found.aliases:
        facts.add("aliases", "also", Value(list(found.aliases), ", ".join(found.aliases)))
    for access in ACCESSES:
        for key, title, place in (
            ("vmx", "MSR bitmap", vmx_bitmaps.msr_place(found.index, access)),
            ("svm", "MSRPM", svm_bitmaps.msrpm_place(found.index, access)),
        ):
            words = f"byte {place[0]:#x} bit {place[1]}" if place is not None else "no bit: always exits"
            facts.add(f"{key}_{access}", f"{access}, {title}", Value(place, words))
    report = Report("msr show", [facts], python=["from vtdbg.x86 import msrs", f"print(msrs.find({msr!r}))"])
    if value is not None:
        shown = decoded(f"msr {found.index:#x}", value)
        report.blocks += shown.blocks
        report.status = shown.status
    return report
