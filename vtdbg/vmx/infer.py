"""A VMCS layout out of pages and the values that are known to be in them: pasted VMREADs, dump_vmcs, a debugger's list.

A field is placed where its value stands at one place only, over all pages together, or where the other places are those of fields that are
placed.  Everything else is reported with its candidates and not guessed: two fields with the same value are two candidates each, whatever looks
likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from vtdbg.errors import FormatError
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx import layouts
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, PAGE_SIZE, SHADOW_BIT, Layout, LayoutField, stored_access_rights

HEADER = 8
"""Revision identifier and VMX-abort indicator (SDM vol. 3, Format of the VMCS Region)."""
BY_ELIMINATION = "the other places are those of other fields"
UNDECIDED_FORM = "the form of access rights is not decided"
FORMS = ("plain", "rotated", "packed")


@dataclass(frozen=True)
class Sample:
    """A page and values of its fields by encoding; `source` says where the values are from."""

    page: bytes
    values: Mapping[int, int]
    source: str = "given values"


@dataclass(frozen=True)
class Place:
    """What is known of one field's place: `status` is "unique", "ambiguous" (several candidates), "conflict" (another field claims the only
    one), "absent" (the value is nowhere) or "silent" (0 in every sample: zeros are everywhere).

    `candidates` are offsets, at most 512 of them; `count` is how many there are.
    """

    encoding: int
    size: int
    status: str
    candidates: Tuple[int, ...]
    count: int
    why: str = ""


@dataclass(frozen=True)
class Agreement:
    """How a packaged layout compares: values that it explains, of those whose field it has; places that it shares and contradicts."""

    layout: str
    explained: int
    compared: int
    same: int
    different: int


@dataclass(frozen=True)
class Inference:
    """`layout` has the fields whose place is unique; `places` says what is known of every field; `agreements` best first."""

    layout: Layout
    places: Tuple[Place, ...]
    agreements: Tuple[Agreement, ...]
    forms: Tuple[str, ...]
    """Forms of access rights that the pages allow."""
    notes: Tuple[str, ...]

    @property
    def placed(self) -> Tuple[Place, ...]:
        return tuple(place for place in self.places if place.status == "unique")


def infer(samples: Sequence[Sample], name: str = "inferred") -> Inference:
    """The layout that `samples` prove, called `name`.

    Raises FormatError for pages of different revision identifiers, values wider than their field, and pages that are not 4096 bytes.
    """
    if not samples:
        raise FormatError(name, "no page to learn from")
    for sample in samples:
        _check(sample)
    revision = int.from_bytes(samples[0].page[:4], "little") & ~SHADOW_BIT
    for sample in samples:
        other = int.from_bytes(sample.page[:4], "little") & ~SHADOW_BIT
        if other != revision:
            raise FormatError(sample.source, f"the revision identifier is {other:#x}, that of the first page {revision:#x}: not one layout")
    forms = tuple(form for form in FORMS if _possible(samples, form))
    form = forms[0] if len(forms) == 1 else "unknown"
    notes = []
    rights = any(encoding in ACCESS_RIGHTS_FIELDS for sample in samples for encoding in sample.values)
    if rights and not forms:
        notes.append("the access rights are in none of the known forms (plain, rotated, packed) in the page")
    elif rights and len(forms) > 1:
        notes.append(f"the access rights are in the page as {' and as '.join(forms)}: their form is not decided")
    encodings = sorted({encoding for sample in samples for encoding in sample.values})
    places = _eliminated(_without_conflicts([_place(samples, encoding, form) for encoding in encodings]))
    found = {place.encoding: LayoutField(place.candidates[0], place.size) for place in places if place.status == "unique"}
    layout = Layout(name, f"inferred from {len(samples)} page{'s' * (len(samples) != 1)}, revision {revision:#x}", (revision,), PAGE_SIZE,
                    form, found,
                    sources=tuple(dict.fromkeys(sample.source for sample in samples)),
                    caveats=("inferred from values in memory: fields that were 0, or whose value stood in several places, are missing",))
    return Inference(layout, tuple(places), _agreements(samples, found), forms, tuple(notes))


def _check(sample: Sample) -> None:
    if len(sample.page) != PAGE_SIZE:
        raise FormatError(sample.source, f"{len(sample.page)} bytes of page; a VMCS region is read as one page of {PAGE_SIZE}")
    for encoding, value in sample.values.items():
        field = vmcs_fields.find(encoding)
        if value < 0 or value >> (field.size * 8):
            raise FormatError(sample.source, f"{field.name}: value {value:#x} does not fit in {field.size * 8} bits")


def _possible(samples: Sequence[Sample], form: str) -> bool:
    """Do all access rights stand somewhere in this form?"""
    used = {encoding for sample in samples for encoding, value in sample.values.items() if encoding in ACCESS_RIGHTS_FIELDS and value}
    return bool(used) and all(_offsets(samples, encoding, form) for encoding in used)


def _stored(encoding: int, value: int, form: str) -> Optional[bytes]:
    field = vmcs_fields.find(encoding)
    if encoding not in ACCESS_RIGHTS_FIELDS:
        return value.to_bytes(field.size, "little")
    try:
        return stored_access_rights(field, value, form).to_bytes(_size(encoding, form), "little")
    except (FormatError, OverflowError):
        return None


def _size(encoding: int, form: str) -> int:
    return 2 if form == "packed" and encoding in ACCESS_RIGHTS_FIELDS else vmcs_fields.find(encoding).size


def _offsets(samples: Sequence[Sample], encoding: int, form: str) -> List[int]:
    """Offsets at which every sample has its value of the field."""
    common: Optional[FrozenSet[int]] = None
    for sample in samples:
        value = sample.values.get(encoding)
        if value is None:
            continue
        data = _stored(encoding, value, form)
        here = frozenset() if data is None else frozenset(_find(sample.page, data))
        common = here if common is None else common & here
    return sorted(common or ())


def _find(page: bytes, data: bytes) -> List[int]:
    found = []
    # 8-byte fields are 4-aligned in some layouts.
    step = min(len(data), 4)
    at = page.find(data, HEADER)
    while at >= 0:
        if at % step == 0:
            found.append(at)
        at = page.find(data, at + 1)
    return found


def _place(samples: Sequence[Sample], encoding: int, form: str) -> Place:
    size = _size(encoding, form)
    if not any(sample.values.get(encoding) for sample in samples):
        return Place(encoding, size, "silent", (), 0, "0 in every page")
    if encoding in ACCESS_RIGHTS_FIELDS and form == "unknown":
        offsets = sorted({offset for known in FORMS for offset in _offsets(samples, encoding, known)})
        status = "ambiguous" if offsets else "absent"
        return Place(encoding, size, status, tuple(offsets[:512]), len(offsets), UNDECIDED_FORM)
    offsets = _offsets(samples, encoding, form)
    status = "unique" if len(offsets) == 1 else "ambiguous" if offsets else "absent"
    why = {"unique": "", "ambiguous": f"its value stands in {len(offsets)} places", "absent": "its value stands nowhere"}[status]
    return Place(encoding, size, status, tuple(offsets[:512]), len(offsets), why)


def _without_conflicts(places: List[Place]) -> List[Place]:
    """Fields that claim the same bytes: of those the wider one keeps its place (the narrower value is a part of it), equals lose it both."""
    unique = sorted((place for place in places if place.status == "unique"), key=lambda place: place.candidates[0])
    lost: Dict[int, int] = {}
    for number, place in enumerate(unique):
        for other in unique[number + 1:]:
            if other.candidates[0] >= place.candidates[0] + place.size:
                break
            if other.size <= place.size:
                lost[other.encoding] = place.encoding
            if place.size <= other.size:
                lost[place.encoding] = other.encoding
    return [place if place.encoding not in lost else
            Place(place.encoding, place.size, "conflict", place.candidates, place.count,
                  f"{vmcs_fields.find(lost[place.encoding]).name} claims the same bytes") for place in places]


def _eliminated(places: List[Place]) -> List[Place]:
    """No two fields share bytes: where a placed field is, no other one is.  Again and again, until nothing follows any more."""
    found = {place.encoding: place for place in places}
    # Of more candidates than are kept, one that is left need not be the only one.
    still_open = [place for place in places if place.status == "ambiguous" and place.count == len(place.candidates)
                  and place.why != UNDECIDED_FORM]
    taken = bytearray(PAGE_SIZE)
    fresh = [place for place in places if place.status == "unique"]
    while fresh:
        for place in fresh:
            taken[place.candidates[0]:place.candidates[0] + place.size] = b"\1" * place.size
        fresh = []
        for place in still_open:
            free = tuple(at for at in place.candidates if not any(taken[at:at + place.size]))
            if len(free) == 1:
                found[place.encoding] = Place(place.encoding, place.size, "unique", free, 1, BY_ELIMINATION)
                fresh.append(found[place.encoding])
            elif not free:
                found[place.encoding] = Place(place.encoding, place.size, "conflict", place.candidates, place.count,
                                              "all its places are those of other fields")
            elif len(free) < place.count:
                found[place.encoding] = Place(place.encoding, place.size, "ambiguous", free, len(free),
                                              f"its value stands in {len(free)} places that are not another field's")
        still_open = [found[place.encoding] for place in still_open if found[place.encoding].status == "ambiguous"]
        fresh = _without_overlap(fresh, found)
    return [found[place.encoding] for place in places]


def _without_overlap(fresh: List[Place], found: Dict[int, Place]) -> List[Place]:
    """Of fields that are left with overlapping places at the same time none can be believed."""
    kept = []
    for place in fresh:
        others = [other for other in fresh if other is not place and other.candidates[0] < place.candidates[0] + place.size
                  and place.candidates[0] < other.candidates[0] + other.size]
        if others:
            found[place.encoding] = Place(place.encoding, place.size, "conflict", place.candidates, 1,
                                          f"{vmcs_fields.find(others[0].encoding).name} claims the same bytes")
        else:
            kept.append(place)
    return kept


def _agreements(samples: Sequence[Sample], found: Mapping[int, LayoutField]) -> Tuple[Agreement, ...]:
    agreements = []
    for name, known in layouts.layouts().items():
        explained = compared = 0
        for sample in samples:
            raw = known.raw_values(sample.page)
            for encoding, value in sample.values.items():
                if encoding in raw and value:
                    compared += 1
                    explained += raw[encoding] == value
        shared = [encoding for encoding in found if encoding in known.fields]
        same = sum(known.fields[encoding].offset == found[encoding].offset for encoding in shared)
        agreements.append(Agreement(name, explained, compared, same, len(shared) - same))
    return tuple(sorted(agreements, key=lambda item: (-item.same, -item.explained, item.different, item.layout)))
