"""The layout of a processor's VMCS out of VMREAD values and pages: what the pages alone prove, and what a known layout says that explains them all.

What was seen is kept in the layout file: a later stop, with other values, narrows down what the first one left open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from vtdbg.errors import FormatError, UnknownName
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.infer import Inference, Place, Sample, infer
from vtdbg.vmx.layout_file import parse_layout, save_layout
from vtdbg.vmx.layout_map import PAGE_SIZE, SHADOW_BIT, Layout, LayoutField

ENOUGH = 16
"""Different values other than 0 that a known layout has to explain before it is believed."""


@dataclass(frozen=True)
class Learnt:
    """`layout` has the fields that are placed, by the pages or as in the layouts `known` that explain every value of every page.

    `inference` is what the pages alone say; `from_known` are the fields that only `known` places; `explained` values other than 0 of the pages
    are explained by them.
    """

    layout: Layout
    inference: Inference
    known: Tuple[str, ...]
    from_known: Tuple[int, ...]
    explained: int
    written: Tuple[int, ...] = ()
    """Fields whose place was seen when they were written."""

    @property
    def status(self) -> Dict[int, Place]:
        """What the pages say of each field, by encoding."""
        return {place.encoding: place for place in self.inference.places}

    @property
    def open(self) -> Tuple[Place, ...]:
        """Fields without a place."""
        return tuple(place for place in self.inference.places if place.encoding not in self.layout.fields)


def learn(samples: Sequence[Sample], known: Optional[Mapping[str, Layout]] = None, written: Optional[Mapping[int, LayoutField]] = None,
          form: str = "unknown") -> Learnt:
    """The layout behind `samples`: pages and the values that VMREAD gives for them, of one processor.

    `known` are the layouts that are compared (default: the packaged ones); `written` places that were seen when the fields were written, which
    nothing overrules, and the `form` of access rights that this showed.  Raises FormatError as `infer` does.
    """
    revision = int.from_bytes(samples[0].page[:4], "little") & ~SHADOW_BIT if samples else 0
    found = infer(samples, f"learnt_{revision:x}")
    candidates = _packaged() if known is None else known
    seen = dict(written or {})
    for encoding, place in found.layout.fields.items():
        if encoding not in seen and _is_free(place, seen):
            seen[encoding] = place
    fitting = {name: layout for name, layout in candidates.items() if _explains(layout, samples, seen)}
    read = {encoding for sample in samples for encoding in sample.values}
    places: Dict[int, LayoutField] = dict(seen)
    more: List[int] = []
    for encoding in sorted(read - set(places)):
        said = {(layout.fields[encoding].offset, layout.fields[encoding].size) for layout in fitting.values() if encoding in layout.fields}
        if len(said) == 1:
            offset, size = said.pop()
            place = LayoutField(offset, size, f"as in {', '.join(fitting)}")
            if _is_free(place, places):
                places[encoding] = place
                more.append(encoding)
    forms = {layout.access_rights for layout in fitting.values()}
    if form == "unknown":
        form = found.layout.access_rights if found.layout.access_rights != "unknown" or len(forms) != 1 else forms.pop()
    caveats = (f"{len(more)} of {len(places)} places are those of {', '.join(fitting)}, which explains every value read",) if more else ()
    layout = replace(found.layout, access_rights=form, fields=dict(sorted(places.items())), caveats=(*caveats, *found.layout.caveats),
                     title=f"learnt by VMREAD, revision {revision:#x}")
    explained = len({value for sample in samples for value in sample.values.values() if value}) if fitting else 0
    return Learnt(layout, found, tuple(fitting), tuple(more), explained, tuple(written or ()))


def _is_free(place: LayoutField, taken: Mapping[int, LayoutField]) -> bool:
    return not any(other.offset < place.end and place.offset < other.end for other in taken.values())


def _packaged() -> Mapping[str, Layout]:
    from vtdbg.vmx.layouts import layouts

    return layouts()


def _explains(layout: Layout, samples: Sequence[Sample], proved: Mapping[int, LayoutField]) -> bool:
    """Does every value stand where the layout has its field, zeros too, enough of them, and no place contradict what is proved?"""
    distinct = set()
    for sample in samples:
        raw = layout.raw_values(sample.page)
        for encoding, value in sample.values.items():
            if encoding not in raw:
                continue
            if raw[encoding] != value:
                return False
            if value:
                distinct.add(value)
    contradicted = any(layout.fields[encoding].offset != place.offset for encoding, place in proved.items() if encoding in layout.fields)
    return len(distinct) >= ENOUGH and not contradicted


def save(learnt: Learnt, samples: Sequence[Sample], path: str) -> None:
    """A layout file that keeps what was seen.  Raises FormatError where it cannot be written."""
    kept = [{"page": sample.page.hex(), "values": {f"{encoding:#06x}": hex(value) for encoding, value in sorted(sample.values.items())}}
            for sample in samples]
    save_layout(learnt.layout, path, kept)


def load_samples(path: str) -> List[Sample]:
    """What an earlier `save` kept.  Raises FormatError naming what is wrong: no such file, no layout file, no samples, damaged ones."""
    try:
        with open(path, "rb") as file:
            data = file.read((1 << 20) + 1)
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error
    parse_layout(data[:(1 << 20) + 1], path)
    rows: Any = json.loads(data).get("samples")
    if not isinstance(rows, list) or not rows:
        raise FormatError(path, "has no samples: it was not written by `vmcs layout learn --out`")
    return [_sample(path, number, row) for number, row in enumerate(rows)]


def _sample(path: str, number: int, row: Any) -> Sample:
    try:
        page = bytes.fromhex(row["page"])
        values = {vmcs_fields.find(int(encoding, 16)).encoding: int(value, 16) for encoding, value in row["values"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, UnknownName) as error:
        raise FormatError(path, f"sample {number} is damaged ({' '.join(str(error).split())[:80]})") from error
    if len(page) != PAGE_SIZE:
        raise FormatError(path, f"sample {number} has {len(page)} bytes of page, not {PAGE_SIZE}")
    return Sample(page, values, f"{path}, sample {number}")
