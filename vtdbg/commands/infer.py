"""`vmcs infer`: a page layout out of pages and the values that are known to be in them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.session import Session
from vtdbg.errors import FormatError, UsageError
from vtdbg.numbers import parse_number
from vtdbg.report import Lines, Pairs, Report, Table, Value, hexa, text
from vtdbg.vmx import fields as vmcs_fields

if TYPE_CHECKING:
    from vtdbg.vmx.infer import Inference, Place, Sample

SHOWN = 6


@verb(
    "vmcs infer",
    "learn a page layout from pages and known values; the file is read by --layout",
    Arg("page", "text", "address of a VMCS page in the source, or a file of one page; several may follow", nargs="+"),
    Opt("--text", "path", "values of the page: pasted VMREADs, dump_vmcs, ...; one for each page, or several for one", metavar="FILE", many=True),
    Opt("--index", "int", "which dump of the text, from 0"),
    Opt("--value", "text", "one more value of the first page", metavar="NAME=V", many=True),
    Opt("--out", "path", "write the layout to this file", metavar="FILE"),
    Opt("--name", "text", "the layout's name", default="inferred"),
)
def infer(session: Session, page: List[str], text: Optional[List[str]], index: Optional[int], value: Optional[List[str]], out: Optional[str],
          name: str) -> Report:
    """A field is placed where its value stands at one place of the page only (over all pages together); the others are listed with their
    candidates and not guessed.  Fields that are 0 everywhere cannot be placed: give a second page in which they are not.
    """
    from vtdbg.vmx.infer import infer as learn
    from vtdbg.vmx.layout_file import save_layout

    samples, notes = _samples(session, page, text or [], index, value or [])
    found = learn(samples, name)
    report = Report("vmcs infer", notes=[*notes, *found.notes])
    report.header = f"layout from {len(samples)} page{'s' * (len(samples) != 1)}: " + ", ".join(sample.source for sample in samples)
    report.add(_summary(found, out))
    report.add(_placed(found))
    report.add(_others(found))
    report.add(_known(found))
    if out is not None:
        if not found.placed:
            raise FormatError(out, "no field could be placed: nothing to write")
        save_layout(found.layout, out)
        report.add(Lines("written", [Value(out, f"written to {out}: use it with --layout {out}", "good")]))
    report.python = [*session.python_open(), "from vtdbg.vmx.infer import Sample, infer",
                     "found = infer([Sample(page, dict(values))])  # bytes of the page, values by encoding",
                     "print(found.layout.fields, found.agreements[0])"]
    return report


def _samples(session: Session, pages: List[str], texts: List[str], index: Optional[int], given: List[str]) -> "Tuple[List[Sample], List[str]]":
    from vtdbg.vmx.infer import Sample

    if len(pages) > 1 and len(texts) != len(pages):
        raise UsageError(f"{len(pages)} pages and {len(texts)} texts: give one --text for each page, in the same order")
    if not texts and not given:
        raise UsageError("no values: give --text FILE or --value NAME=V")
    notes: List[str] = []
    samples = []
    for number, page in enumerate(pages):
        values: Dict[int, int] = {}
        sources = [page]
        for path in texts if len(pages) == 1 else texts[number:number + 1]:
            _merge(values, _text_values(path, index), path, notes)
            sources.append(path)
        if number == 0:
            _merge(values, _given(given), "--value", notes)
        samples.append(Sample(_page(session, page), values, " with ".join(sources)))
    return samples, notes


def _merge(values: Dict[int, int], more: Dict[int, int], source: str, notes: List[str]) -> None:
    """Values that two sources give differently are those of another moment: neither counts."""
    for encoding, value in more.items():
        if values.setdefault(encoding, value) != value:
            notes.append(f"{source}: {vmcs_fields.find(encoding).name} is {value:#x}, elsewhere {values[encoding]:#x}: the first is taken")


def _text_values(path: str, index: Optional[int]) -> Dict[int, int]:
    from vtdbg.commands.select import text_dumps

    dumps = text_dumps(path, "vmcs", index)
    if len(dumps) != 1:
        raise UsageError(f"{path} has {len(dumps)} VMCS dumps: --index picks one")
    return {value.field.encoding: value.value for value in dumps[0].vmcs().values()}


def _given(assignments: List[str]) -> Dict[int, int]:
    values = {}
    for item in assignments:
        name, found, value = item.partition("=")
        if not found:
            raise UsageError(f"--value {item!r}: write NAME=VALUE, for instance GUEST_RIP=0x1000")
        values[vmcs_fields.find(name.strip()).encoding] = parse_number(value)
    return values


def _page(session: Session, page: str) -> bytes:
    from vtdbg.commands.select import aligned_page

    if os.path.isfile(page):
        try:
            with open(page, "rb") as file:
                data = file.read(4097)
        except OSError as error:
            raise FormatError(page, f"cannot be read: {error.strerror or error}") from error
        if len(data) != 4096:
            raise FormatError(page, f"{'more than 4096' if len(data) > 4096 else len(data)} bytes: a file of one page has 4096; "
                                    "for a dump give the address, and the dump with -s")
        return data
    return aligned_page(session, session.resolved(session.convert("address", page)), "VMCS")


def _summary(found: "Inference", out: Optional[str]) -> Pairs:
    facts = Pairs("layout")
    facts.add("id", "layout", found.layout.id)
    facts.add("revision_id", "revision id", hexa(found.layout.revision_ids[0]))
    facts.add("access_rights", "access rights", " or ".join(found.forms) or "unknown")
    counts: Dict[str, int] = {}
    for place in found.places:
        counts[place.status] = counts.get(place.status, 0) + 1
    facts.add("counts", "fields", Value(counts, ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))))
    return facts


def _placed(found: "Inference") -> Table:
    table = Table("fields", (("offset", "offset"), ("size", "size"), ("encoding", "encoding"), ("name", "field")), title="Placed",
                  empty="no field's value is unique")
    for place in sorted(found.placed, key=lambda item: item.candidates[0]):
        table.add(hexa(place.candidates[0], 3), str(place.size), hexa(place.encoding, 4), vmcs_fields.find(place.encoding).name)
    return table


def _others(found: "Inference") -> Table:
    columns = (("name", "field"), ("status", "status"), ("candidates", "candidates"), ("why", "why"))
    table = Table("others", columns, title="Not placed", wrap="candidates")
    for place in found.places:
        if place.status not in ("unique", "silent"):
            table.add(vmcs_fields.find(place.encoding).name, text(place.status, "warn" if place.status != "ambiguous" else ""), _candidates(place),
                      text(place.why if place.status != "ambiguous" else "", "dim"))
    silent = [vmcs_fields.find(place.encoding).name for place in found.places if place.status == "silent"]
    if silent:
        table.add(Value(silent, f"{len(silent)} fields"), "silent", "", text("0 in every page", "dim"))
    return table


def _candidates(place: "Place") -> Value:
    offsets = [f"{offset:#x}" for offset in place.candidates]
    return Value(offsets, ", ".join(offsets[:SHOWN]) + (f" and {place.count - SHOWN} more" if place.count > SHOWN else ""))


def _known(found: "Inference") -> Table:
    table = Table("agreements", (("layout", "layout"), ("same", "same place"), ("different", "other place"), ("explained", "values explained")),
                  title="Known layouts")
    for item in found.agreements[:SHOWN]:
        table.add(text(item.layout, "good" if item.same and not item.different else ""), str(item.same), str(item.different),
                  Value([item.explained, item.compared], f"{item.explained} of {item.compared}"))
    return table
