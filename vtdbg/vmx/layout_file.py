"""Layout files: JSON in, a checked Layout out, and back.  The packaged layouts are such files too."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple, Union

from vtdbg.errors import FormatError, UnknownName
from vtdbg.names import near_names
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.fields import VmcsField
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, ACCESS_RIGHTS_FORMS, PAGE_SIZE, SHADOW_BIT, Layout, LayoutField, Span

PathLike = Union[str, "os.PathLike[str]"]

_MAX_FILE = 1 << 20
_KEYS = frozenset({"id", "title", "revision_ids", "region_size", "header", "launch_states", "access_rights", "complete", "other",
                   "fields", "sources", "caveats", "notes", "valid_for", "samples"})
_STORED_SIZES = {"16": (2, 4, 8), "32": (4, 8), "64": (8,), "natural": (4, 8)}
"""Bytes that a field may occupy: its own size, or a wider slot (Xen stores everything in 8); 32-bit hypervisors store natural-width
fields in 4."""


def load_layout(path: PathLike) -> Layout:
    """A layout out of a user's JSON file:

        {"id": "mine", "title": "...", "revision_ids": ["0x2b"], "access_rights": "plain",
         "header": {"revision_id": [0, 4], "abort_indicator": [4, 4], "launch_state": [8, 4]}, "launch_states": {"0": "clear", "1": "launched"},
         "fields": {"GUEST_RIP": "0x1c8", "0x4402": 364, "GUEST_ES_AR_BYTES": {"offset": 34, "size": 2, "note": "inferred from ..."}}}

    Needed: id, revision_ids, fields.  A field is named by any known name or by its encoding; its place is an offset, or an object with
    offset, size (default: the field's own, 2 for packed access rights) and note.  Numbers may be strings in hexadecimal.
    Optional: title, region_size (4096), header (as above, without launch_state), launch_states, access_rights ("plain", "rotated",
    "packed", "unknown"; default "plain"), complete (false), other (name: [offset, size] of what is known and no field), sources,
    caveats (told with the values), notes, valid_for, samples (not looked at: what `vmcs layout learn` has seen).

    Raises FormatError naming the file, the field and the offsets: bad JSON, unknown key or field, a field named twice, wrong size,
    a place outside the region, an overlap with the header or another field.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise FormatError(path, f"cannot read the layout file: {error.strerror or error}") from error
    if len(data) > _MAX_FILE:
        raise FormatError(path, f"larger than {_MAX_FILE >> 20} MiB: not a layout file")
    return parse_layout(data, os.fsdecode(path))


def parse_layout(data: bytes, path: str) -> Layout:
    """The layout in the JSON text `data`; `path` names it in errors.  See `load_layout`."""
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=lambda pairs: _without_duplicates(pairs, path))
    except RecursionError as error:
        raise FormatError(path, "not a layout file: JSON nested too deeply") from error
    except UnicodeDecodeError as error:
        raise FormatError(path, f"not a layout file: no UTF-8 text at byte {error.start:#x}") from error
    except ValueError as error:
        raise FormatError(path, f"not a layout file: {_one_line(error)}") from error
    return _LayoutFile(path, content).layout()


def save_layout(layout: Layout, path: PathLike, samples: Sequence[Mapping[str, Any]] = ()) -> None:
    """`layout` as a JSON file that `load_layout` reads back to an equal layout.  Raises FormatError where the file cannot be written.

    `samples` are kept in it for who goes on learning (vmx/learn.py) and are no part of the layout.
    """
    content: Dict[str, Any] = {"id": layout.id, "title": layout.title, "revision_ids": [hex(number) for number in layout.revision_ids],
                               "region_size": layout.region_size}
    header: Dict[str, List[int]] = {"revision_id": [layout.revision_offset, 4]}
    if layout.abort_offset is not None:
        header["abort_indicator"] = [layout.abort_offset, 4]
    if layout.launch_state is not None:
        header["launch_state"] = list(layout.launch_state)
    content["header"] = header
    content["launch_states"] = {str(value): word for value, word in layout.launch_states.items()}
    content.update(access_rights=layout.access_rights, complete=layout.complete, valid_for=layout.valid_for,
                   other={name: list(span) for name, span in layout.other.items()}, sources=list(layout.sources),
                   caveats=list(layout.caveats), notes=list(layout.notes))
    content["fields"] = {vmcs_fields.find(encoding).name: {"offset": place.offset, "size": place.size, **({"note": place.note} if place.note else {})}
                         for encoding, place in layout.fields.items()}
    if samples:
        content["samples"] = list(samples)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise FormatError(path, f"cannot write the layout file: {error.strerror or error}") from error


def _one_line(error: ValueError) -> str:
    return " ".join(str(error).split())[:200]


def _without_duplicates(pairs: List[Tuple[str, Any]], path: str) -> Dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(path, f"{twice!r} is given twice")
    return content


class _LayoutFile:
    """One layout file while it is being checked: every complaint names the file."""

    def __init__(self, path: str, content: Any) -> None:
        self.path = path
        self.content = self._object("the file", content)

    def layout(self) -> Layout:
        content = self.content
        for key in content:
            if key not in _KEYS:
                hint = near_names(key, _KEYS)
                raise self._error(f"unknown key {key!r}" + (f"; did you mean {', '.join(hint)}?" if hint else ""))
        for key in ("id", "revision_ids", "fields"):
            if key not in content:
                raise self._error(f"the key {key!r} is missing")
        revisions = tuple(self._number("revision_ids", item) for item in self._list("revision_ids"))
        if not revisions or any(number >= SHADOW_BIT for number in revisions):
            raise self._error("'revision_ids' needs at least one number below 0x80000000 (bit 31 marks a shadow VMCS)")
        form = content.get("access_rights", "plain")
        if not isinstance(form, str) or form not in ACCESS_RIGHTS_FORMS:
            raise self._error(f"'access_rights' is {form!r}, not one of {', '.join(ACCESS_RIGHTS_FORMS)}")
        region = self._number("region_size", content.get("region_size", PAGE_SIZE))
        if not 16 <= region <= PAGE_SIZE:
            raise self._error(f"'region_size' is {region}, not 16 to {PAGE_SIZE} (a VMCS region is at most one page)")
        header = {name: self._span(f"header {name}", span) for name, span in self._object("'header'", content.get("header", _HEADER)).items()}
        self._check_header(header)
        fields = dict(sorted(self._fields(form)))
        other = {name: self._span(f"other {name}", span) for name, span in self._object("'other'", content.get("other", {})).items()}
        self._check_places(header, other, fields, region)
        complete = content.get("complete", False)
        if not isinstance(complete, bool):
            raise self._error("'complete' is not true or false")
        states = self._object("'launch_states'", content.get("launch_states", {}))
        return Layout(
            self._text("id", content["id"]), self._text("title", content.get("title", content["id"])), revisions, region, form, fields,
            header["revision_id"][0], header["abort_indicator"][0] if "abort_indicator" in header else None, header.get("launch_state"),
            {self._number("launch_states", value): self._text("launch_states", word) for value, word in states.items()}, complete, other,
            self._texts("sources"), self._texts("caveats"), self._texts("notes"), self._text("valid_for", content.get("valid_for", "")))

    def _fields(self, form: str) -> Iterator[Tuple[int, LayoutField]]:
        named: Dict[int, str] = {}
        canonical = vmcs_fields.by_canonical_name()
        for name, place in self._object("'fields'", self.content["fields"]).items():
            field = canonical.get(name) or self._field(name)
            if field.encoding in named:
                raise self._error(f"{field.name} is given twice, as {named[field.encoding]!r} and {name!r}")
            named[field.encoding] = name
            packed = form == "packed" and field.encoding in ACCESS_RIGHTS_FIELDS
            own_size = 2 if packed else field.size
            if isinstance(place, dict):
                for key in place:
                    if key not in ("offset", "size", "note"):
                        raise self._error(f"{name}: unknown key {key!r}; a place has offset, size and note")
                if "offset" not in place:
                    raise self._error(f"{name} has no offset")
                size, note = self._number(name, place.get("size", own_size)), self._text(name, place.get("note", ""))
                found = LayoutField(self._number(name, place["offset"]), size, note)
            else:
                found = LayoutField(self._number(name, place), own_size)
            sizes = (2, 4, 8) if packed else _STORED_SIZES[field.width]
            if form == "rotated" and field.encoding in ACCESS_RIGHTS_FIELDS:
                sizes = (4,)
            if found.size not in sizes:
                raise self._error(f"{name} ({field.width}{'-bit' if field.width != 'natural' else ' width'}) cannot be {found.size} bytes: "
                                  f"{' or '.join(str(size) for size in sizes)}")
            yield field.encoding, found

    def _field(self, name: str) -> VmcsField:
        try:
            return vmcs_fields.find(name)
        except UnknownName as error:
            raise self._error(str(error)) from error

    def _check_header(self, header: Mapping[str, Span]) -> None:
        for name, (offset, size) in header.items():
            if name not in ("revision_id", "abort_indicator", "launch_state"):
                raise self._error(f"unknown header part {name!r}; known: revision_id, abort_indicator, launch_state")
            if name != "launch_state" and size != 4 or not 1 <= size <= 8:
                raise self._error(f"header {name} at {offset:#x} cannot be {size} bytes")
        if header.get("revision_id") != (0, 4):
            raise self._error("header revision_id has to be [0, 4]: the processor looks at the first four bytes")

    def _check_places(self, header: Mapping[str, Span], other: Mapping[str, Span], fields: Mapping[int, LayoutField], region: int) -> None:
        places = [(span[0], span[1], f"header {name}") for name, span in header.items()]
        places += [(span[0], span[1], name) for name, span in other.items()]
        places += [(place.offset, place.size, vmcs_fields.find(encoding).name) for encoding, place in fields.items()]
        taken, before = 0, ""
        for offset, size, name in sorted(places):
            place = f"{name} at {offset:#x} to {offset + size:#x}"
            if offset + size > region:
                raise self._error(f"{place} is outside the region of {region:#x} bytes")
            if offset < taken:
                raise self._error(f"{place} overlaps {before}")
            taken, before = offset + size, place

    def _span(self, what: str, span: Any) -> Span:
        if not isinstance(span, list) or len(span) != 2:
            raise self._error(f"{what} is not [offset, size]")
        offset, size = self._number(what, span[0]), self._number(what, span[1])
        if size == 0:
            raise self._error(f"{what} has no bytes")
        return offset, size

    def _number(self, what: str, value: Any) -> int:
        if isinstance(value, str) and len(value) <= 20:
            try:
                value = int(value, 0)
            except ValueError:
                raise self._error(f"{what}: {value!r} is not a number") from None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise self._error(f"{what}: {str(value)[:40]!r} is not a number that can be an offset, a size or an identifier")
        return value

    def _text(self, what: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._error(f"{what!r}: {str(value)[:40]!r} is not a text")
        return value

    def _texts(self, key: str) -> Tuple[str, ...]:
        return tuple(self._text(key, item) for item in self._list(key))

    def _list(self, key: str) -> List[Any]:
        value = self.content.get(key, [])
        if not isinstance(value, list):
            raise self._error(f"{key!r} is not a list")
        return value

    def _object(self, what: str, value: Any) -> Dict[str, Any]:
        if not isinstance(value, dict):
            raise FormatError(self.path, f"{what} is not a JSON object")
        return value

    def _error(self, message: str) -> FormatError:
        return FormatError(self.path, message)


_HEADER: Mapping[str, Any] = {"revision_id": [0, 4], "abort_indicator": [4, 4]}
