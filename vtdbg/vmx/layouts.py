"""The VMCS layouts: by name, by revision identifier, by what a page holds.

No manual gives the layout of a VMCS region (SDM vol. 3, Format of the VMCS Region: "implementation-specific" after the first eight
bytes).  `data/layouts/*.json` holds what was published or measured, one file a layout; `index.csv` beside them says which revision
identifier belongs to which layouts, so that only those are read.  A revision identifier does not identify a layout: several products
use the same number, and some changed their layout and kept it.  `candidates` therefore looks at the content.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from vtdbg.errors import FormatError, UnknownName
from vtdbg.evidence import Evidence
from vtdbg.names import near_names
from vtdbg.rows import read_data, read_rows
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.layout_file import PathLike, load_layout, parse_layout, save_layout
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, ACCESS_RIGHTS_FORMS, PAGE_SIZE, SHADOW_BIT, Layout, LayoutField, rotated_right, unpacked
from vtdbg.vmx.plausibility import judge_values
from vtdbg.vmx.vmcs import FieldValue, Vmcs

__all__ = ["ACCESS_RIGHTS_FIELDS", "ACCESS_RIGHTS_FORMS", "Candidate", "Evidence", "FITS", "IndexRow", "Layout", "LayoutField", "PAGE_SIZE",
           "SHADOW_BIT", "candidates", "decode_candidates", "decode_page", "find_layout", "header_words", "index", "is_empty", "layout",
           "layouts", "layouts_for", "load_layout", "parse_layout", "rank", "revision_ids", "save_layout", "score_page"]

class IndexRow(NamedTuple):
    """A row of `data/layouts/index.csv`; `layout` is empty for a revision identifier whose layout nobody published."""

    layout: str
    revision_ids: Tuple[int, ...]
    title: str


@cache
def index() -> Tuple[IndexRow, ...]:
    """Which layouts carry which revision identifiers, without reading the layouts."""
    return tuple(IndexRow(row["layout"], tuple(int(number, 16) for number in row["revision_ids"].split()), row["title"])
                 for row in read_rows("layouts/index.csv"))


@cache
def _ids_by_revision() -> Mapping[int, Tuple[str, ...]]:
    found: Dict[int, List[str]] = {}
    for row in index():
        for revision in row.revision_ids if row.layout else ():
            found.setdefault(revision, []).append(row.layout)
    return {revision: tuple(ids) for revision, ids in found.items()}


def revision_ids() -> Tuple[int, ...]:
    """Every revision identifier for which there is a layout, sorted."""
    return tuple(sorted(_ids_by_revision()))


def layouts_for(revision_id: int, extra: Sequence[Layout] = ()) -> List[Layout]:
    """The layouts that a revision identifier (bit 31 is ignored) may mean; reads only those.  `extra`: a user's own, first."""
    revision_id &= SHADOW_BIT - 1
    own = [known for known in extra if revision_id in known.revision_ids]
    return own + [layout(name) for name in _ids_by_revision().get(revision_id, ())]


class _Layouts(Mapping[str, Layout]):
    """Layouts by id, each read when it is asked for."""

    def __getitem__(self, name: str) -> Layout:
        return layout(name)

    def __iter__(self) -> Iterator[str]:
        return (row.layout for row in index() if row.layout)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def layouts() -> Mapping[str, Layout]:
    """Every packaged layout by id; a file is read when its layout is first used."""
    return _Layouts()


def layout(name: str) -> Layout:
    """The packaged layout by id ("bochs_2.7", "hw_haswell"), in any case; UnknownName with the near ones."""
    ids = list(layouts())
    wanted = name.strip().lower()
    found = next((known for known in ids if known.lower() == wanted), None)
    if found is None:
        raise UnknownName("layout", name, near_names(name, ids) or tuple(ids))
    return _packaged(found)


@cache
def _packaged(name: str) -> Layout:
    return parse_layout(read_data(f"layouts/{name}.json"), f"layout {name}")


# --- recognition by content ------------------------------------------------------------------------------------------------------

_ZEROS = bytes(PAGE_SIZE)

FITS = 20
"""A candidate with fewer points does not count: the accidents that were met in real memory stay below 0, real VMCSs stand above 60,
pages of which a layout knows few fields reach about 25."""

_MARGIN = 0.15
"""Two candidates fit "equally well" when the weaker has at most this part less than the stronger."""


class Candidate(NamedTuple):
    """A layout that has the page's revision identifier, with how well the page's content fits it."""

    layout: Layout
    score: int
    evidence: Tuple[Evidence, ...]

    @property
    def fits(self) -> bool:
        return self.score >= FITS


def header_words(page: bytes) -> Tuple[int, bool, int]:
    """(revision identifier, shadow-VMCS indicator, abort indicator) of a page of at least 8 bytes."""
    first = int.from_bytes(page[0:4], "little")
    return first & (SHADOW_BIT - 1), bool(first & SHADOW_BIT), int.from_bytes(page[4:8], "little")


def is_empty(page: bytes, layout: Optional[Layout] = None) -> bool:
    """Nothing but the header: a VMXON region, a VMCS that no processor has written back yet, or zeros.

    The third dword is the launch state in some layouts, a field in others; where the layout is not known it counts as header.
    """
    first = 12 if layout is None or layout.launch_state is not None else 8
    return page[first:] == _ZEROS[first:len(page)]


def score_page(page: bytes, layout: Layout) -> Candidate:
    """How well the page's content fits `layout`, whatever its revision identifier is."""
    values = layout.raw_values(page)
    evidence = judge_values(values)
    evidence += _overlong(values)
    evidence += _header_evidence(page, layout)
    evidence += _coverage(page, layout)
    return Candidate(layout, sum(item.points for item in evidence), tuple(evidence))


def candidates(page: bytes, extra: Sequence[Layout] = ()) -> List[Candidate]:
    """The layouts that the page's revision identifier may mean, best first.  `extra`: a user's own layouts.

    A layout that needs more bytes than `page` has is left out.  Empty where nobody knows the revision identifier.
    """
    return rank(page, layouts_for(header_words(page)[0], extra))


def rank(page: bytes, considered: Sequence[Layout]) -> List[Candidate]:
    """`considered` with their scores, best first; a layout that needs more bytes than `page` has is left out."""
    scored = [score_page(page, item) for item in considered if item.extent <= len(page)]
    return sorted(scored, key=lambda item: (-item.score, -len(item.layout.fields), item.layout.id))


def _overlong(values: Mapping[int, int]) -> List[Evidence]:
    wide = [encoding for encoding, value in values.items() if value >> (vmcs_fields.fields()[encoding].size * 8)]
    return [Evidence(-3 * len(wide), f"{len(wide)} fields hold more bits than they have")] if wide else []


def _header_evidence(page: bytes, layout: Layout) -> List[Evidence]:
    evidence = []
    abort = int.from_bytes(page[layout.abort_offset:layout.abort_offset + 4], "little") if layout.abort_offset is not None else 0
    if abort > 0xFF:
        evidence.append(Evidence(-4, f"the abort indicator {abort:#x} is no VMX-abort code"))
    if layout.launch_state is not None and layout.launch_states:
        state = _at(page, layout.launch_state)
        if state not in layout.launch_states:
            evidence.append(Evidence(-4, f"the launch state {state:#x} is not one that the layout knows"))
    return evidence


def _at(page: bytes, span: Tuple[int, int]) -> int:
    return int.from_bytes(page[span[0]:span[0] + span[1]], "little")


def _coverage(page: bytes, layout: Layout) -> List[Evidence]:
    stray = sum(last - first - page.count(0, first, last) for first, last in layout.gaps(len(page)))
    inside = len(page) - page.count(0) - stray
    if not stray:
        return [Evidence(4, "every byte that is not 0 belongs to a field", "no stray bytes")] if layout.complete and inside > 16 else []
    if layout.complete:
        return [Evidence(-min(16, 1 + stray // 4), f"{stray} bytes that are not 0 belong to no field")]
    if stray < 64:
        return []
    return [Evidence(-min(8, stray // 64), f"{stray} bytes that are not 0 are outside the published fields")]


# --- decoding --------------------------------------------------------------------------------------------------------------------


def decode_page(page: bytes, layout: "Union[PathLike, Layout, None]" = None, source: str = "page", extra: Sequence[Layout] = ()) -> Vmcs:
    """The bytes of a VMCS region as values by field.

    `layout`: a name of `layouts()`, the path of a layout file, a Layout, or None to recognise it by content (`extra`: more layouts to
    consider).  `source` is what the bytes are ("page 0x6826000"); each value says "<source> offset 0x1c8, layout bochs_2.7".
    A page that holds nothing except its header gives a Vmcs without values, `empty` set, and a warning.

    Raises FormatError where the page is too short or longer than 4096 bytes, where no layout fits, or where two fit equally well and
    decode the page differently; UnknownName for a layout that does not exist.
    """
    page = bytes(page)
    if not 16 <= len(page) <= PAGE_SIZE:
        raise FormatError(source, f"{len(page)} bytes cannot be a VMCS region: 16 to {PAGE_SIZE} are needed, beginning at the revision identifier")
    if layout is not None:
        return _decode_as(page, find_layout(layout), source, extra)
    found = candidates(page, extra)
    if is_empty(page):
        return _empty(page, found, source, extra)
    if not found:
        raise _no_layout(page, source, extra)
    too_short = ", ".join(f"{item.id} needs {item.extent}" for item in layouts_for(header_words(page)[0], extra) if item.extent > len(page))
    return decode_candidates(page, found, source, f"the page has {len(page)} bytes and layout {too_short}" if too_short else "")


def decode_candidates(page: bytes, found: Sequence[Candidate], source: str, hint: str = "") -> Vmcs:
    """`decode_page` with candidates that are already ranked (at least one); `hint` is said where none of them fits."""
    best = _choose(page, found, source, hint)
    equals = ", ".join(item.layout.id for item in found if item is not best and item.fits and _same_values(page, best.layout, item.layout))
    warnings = [f"the content does not tell layout {best.layout.id} from {equals}: they decode this page to the same values"] if equals else []
    return _decoded(page, best.layout, source, found, warnings)


def find_layout(layout_or_name: "Union[PathLike, Layout]") -> Layout:
    """A layout as users name it: the id of a packaged one, the path of a file (it ends in .json or has a separator), or the thing itself."""
    if isinstance(layout_or_name, Layout):
        return layout_or_name
    if not isinstance(layout_or_name, str) or layout_or_name.endswith(".json") or os.sep in layout_or_name:
        return load_layout(layout_or_name)
    return layout(layout_or_name)


def _decode_as(page: bytes, wanted: Layout, source: str, extra: Sequence[Layout]) -> Vmcs:
    """With the layout that the user names: whatever speaks against it is a warning."""
    if len(page) < wanted.extent:
        raise FormatError(source, f"{len(page)} bytes are too short for layout {wanted.id}, which needs {wanted.extent}")
    if is_empty(page, wanted):
        return _empty(page, [Candidate(wanted, 0, ())], source, extra)
    revision = header_words(page)[0]
    given = score_page(page, wanted)
    warnings = []
    if revision not in wanted.revision_ids:
        warnings.append(f"the revision identifier {revision:#x} is not one of layout {wanted.id} ({_hex_list(wanted.revision_ids)})")
    others = [item for item in candidates(page, extra) if item.layout.id != wanted.id]
    if others and others[0].fits and others[0].score * (1 - _MARGIN) > given.score and not _same_values(page, wanted, others[0].layout):
        warnings.append(f"layout {others[0].layout.id} fits the content better ({others[0].score} points) than {wanted.id} ({given.score})")
    elif not given.fits:
        warnings.append(f"the content does not look like a VMCS in layout {wanted.id} ({given.score} points, {FITS} are needed to be recognised)")
    return _decoded(page, wanted, source, [given, *others], warnings)


def _no_layout(page: bytes, source: str, extra: Sequence[Layout]) -> FormatError:
    revision = header_words(page)[0]
    known = layouts_for(revision, extra)
    if known:
        return FormatError(source, f"{len(page)} bytes are too short for revision identifier {revision:#x}: "
                                   f"layout {known[0].id} needs {known[0].extent}")
    return FormatError(source, _unknown_revision(revision, extra))


def _choose(page: bytes, found: Sequence[Candidate], source: str, hint: str) -> Candidate:
    best = found[0]
    if not best.fits:
        revision = header_words(page)[0]
        seen = _unpublished(revision)
        why = hint or (f"it is also that of {seen}" if seen else "not a VMCS")
        raise FormatError(source, f"no layout with revision identifier {revision:#x} fits the content ({_scores(found)}; {FITS} points are needed): "
                                  f"{why}, or name the layout with --layout NAME|FILE")
    close = [item for item in found[1:] if item.fits and item.score >= best.score * (1 - _MARGIN)]
    rivals = [item for item in close if not _same_values(page, best.layout, item.layout)]
    if rivals:
        raise FormatError(source, f"more than one layout fits the content ({_scores([best, *rivals])}) and they decode it differently: "
                                  "choose with --layout")
    return best


def _unknown_revision(revision: int, extra: Sequence[Layout]) -> str:
    seen = _unpublished(revision)
    if seen:
        return f"revision identifier {revision:#x} is that of {seen}; give a layout of your own with --layout FILE"
    known = sorted({*revision_ids(), *(number for item in extra for number in item.revision_ids)})
    return f"no layout has the revision identifier {revision:#x} (known: {_hex_list(known)}): not a VMCS, or choose with --layout NAME|FILE"


def _unpublished(revision: int) -> str:
    """The processors that were seen with this revision identifier and whose layout nobody published; empty for none."""
    return next((row.title for row in index() if not row.layout and revision in row.revision_ids), "")


def _hex_list(numbers: Sequence[int]) -> str:
    return ", ".join(hex(number) for number in numbers)


def _scores(found: Sequence[Candidate]) -> str:
    return ", ".join(f"{item.layout.id} {item.score}" for item in found)


def _same_values(page: bytes, one: Layout, other: Layout) -> bool:
    """Do both decode the page to the same value in every field that both have?"""
    first, second = one.raw_values(page), other.raw_values(page)
    return all(second[encoding] == value for encoding, value in first.items() if encoding in second)


def _decoded(page: bytes, layout: Layout, source: str, found: Sequence[Candidate], warnings: Sequence[str]) -> Vmcs:
    known = vmcs_fields.fields()
    layout, doubt = _with_actual_access_rights(page, layout)
    values: Dict[int, FieldValue] = {}
    wide: List[str] = []
    for encoding, value in layout.raw_values(page).items():
        field, place = known[encoding], layout.fields[encoding]
        if value >> (field.size * 8):
            wide.append(field.name)
            value &= (1 << field.size * 8) - 1
        inferred = f", {place.note}" if place.inferred else ""
        values[encoding] = FieldValue(field, value, f"{source} offset {place.offset:#x}, layout {layout.id}{inferred}")
    told = [*warnings, *doubt, *layout.caveats]
    if wide:
        told.append(f"the stored slot holds more bits than the field has (cut off): {', '.join(wide)}")
    absent = {encoding: f"how layout {layout.id} stores access rights is not known" for encoding in ACCESS_RIGHTS_FIELDS & set(layout.fields)
              if layout.access_rights == "unknown"}
    revision, shadow, _ = header_words(page)
    return Vmcs(values, source, layout=layout, candidates=found, revision_id=revision, shadow=shadow, abort_indicator=_abort(page, layout),
                launch_state=_launch(page, layout), warnings=told, absent=absent)


def _with_actual_access_rights(page: bytes, layout: Layout) -> Tuple[Layout, List[str]]:
    """The layout with the form of access rights that the page has, and the warning where it is not the layout's own.

    Bochs' CPU models select the form.  Another form is taken only where three fields or more have reserved bits in the layout's own form, and
    none in the other.
    """
    places = [layout.fields[encoding] for encoding in sorted(ACCESS_RIGHTS_FIELDS & set(layout.fields))]
    stored = [number for number in (_at(page, (place.offset, place.size)) for place in places) if number]
    own = _UNPACK.get(layout.access_rights)
    if own is None or any(place.size != 4 for place in places):
        return layout, []
    wrong = sum(1 for number in stored if own(number) & _AR_RESERVED)
    if wrong < 3:
        return layout, []
    fitting = [form for form, unpack in _UNPACK.items() if not any(unpack(number) & _AR_RESERVED for number in stored)]
    if not fitting:
        return layout, []
    warning = f"access rights are {layout.access_rights} in layout {layout.id}: {wrong} would have reserved bits, decoded as {fitting[0]}"
    return replace(layout, access_rights=fitting[0]), [warning]


_AR_RESERVED = 0xFFFE0F00
_UNPACK = {"plain": lambda number: number, "packed": unpacked, "rotated": rotated_right}
"""Where plain and packed fit both, no segment is unusable and both give the same values."""


def _abort(page: bytes, layout: Layout) -> Optional[int]:
    return None if layout.abort_offset is None else _at(page, (layout.abort_offset, 4))


def _launch(page: bytes, layout: Layout) -> Optional[int]:
    return None if layout.launch_state is None else _at(page, layout.launch_state)


def _empty(page: bytes, found: Sequence[Candidate], source: str, extra: Sequence[Layout]) -> Vmcs:
    """No value: zeros that no processor has stored are not the fields' values."""
    revision, shadow, abort = header_words(page)
    if not found and revision == 0:
        raise FormatError(source, "the page holds only zeros: not a VMCS")
    if not found:
        raise _no_layout(page, source, extra)
    chosen = found[0].layout if len(found) == 1 else None
    warning = (f"the page holds nothing except its header (revision identifier {revision:#x}): a VMXON region, or a VMCS that has not been "
               "written back to memory; its fields are unknown, not 0")
    return Vmcs({}, source, layout=chosen, candidates=found, revision_id=revision, shadow=shadow, abort_indicator=abort,
                launch_state=_launch(page, chosen) if chosen else None, warnings=[warning], empty=True)
