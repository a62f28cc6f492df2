"""Layouts out of VMREAD values and pages: what is claimed is true whatever the layout, and a known layout is believed only where it explains all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg.errors import FormatError
from vtdbg.vmx.fields import fields, find
from vtdbg.vmx.infer import Sample
from vtdbg.vmx.layout_file import load_layout
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS
from vtdbg.vmx.layouts import layouts
from vtdbg.vmx.learn import ENOUGH, learn, load_samples, save

REVISION = 0x1234


def made(seed: int, stops: int, wide: bool) -> "Tuple[Dict[int, int], List[Sample]]":
    """A layout out of thin air and what VMREAD gives at some stops; `wide` numbers are distinctive, others are small and collide."""
    chosen = random.Random(seed)
    encodings = [encoding for encoding in fields() if not encoding & 1 and encoding not in ACCESS_RIGHTS_FIELDS]
    chosen.shuffle(encodings)
    places: Dict[int, int] = {}
    at = 8
    for encoding in encodings[:60]:
        size = find(encoding).size
        at = (at + min(size, 4) - 1) // min(size, 4) * min(size, 4) + chosen.choice((0, 0, 0, 4))
        places[encoding] = at
        at += size
    samples = []
    for _ in range(stops):
        page = bytearray(REVISION.to_bytes(4, "little") + bytes(4092))
        values = {}
        for encoding, offset in places.items():
            size = find(encoding).size
            values[encoding] = chosen.choice((0, chosen.getrandbits(8 * size) if wide else chosen.randrange(6)))
            page[offset:offset + size] = values[encoding].to_bytes(size, "little")
        samples.append(Sample(bytes(page), values, "made"))
    return places, samples


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 1 << 32), st.integers(1, 4), st.booleans())
def test_what_is_placed_is_placed_right(seed: int, stops: int, wide: bool) -> None:
    """Unique or by elimination, in one stop or several: never at a wrong place.  No packaged layout explains such a page."""
    places, samples = made(seed, stops, wide)
    learnt = learn(samples)
    assert learnt.known == () and learnt.from_known == ()
    assert {encoding: place.offset for encoding, place in learnt.layout.fields.items()}.items() <= places.items()
    for place in learnt.inference.places:
        if place.status == "ambiguous" and place.count == len(place.candidates):
            assert places[place.encoding] in place.candidates, find(place.encoding).name
        assert place.status != "absent"


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 1 << 32))
def test_more_stops_place_more(seed: int) -> None:
    _, samples = made(seed, 5, wide=True)
    counts = [len(learn(samples[:count]).layout.fields) for count in range(1, 6)]
    assert counts == sorted(counts) and counts[-1] > 50


def test_one_value_that_contradicts_a_known_layout_is_enough() -> None:
    """A packaged layout that explains all but one value is not believed."""
    known = layouts()["bochs_2.8"]
    chosen = random.Random(1)
    plain = {encoding: place for encoding, place in known.fields.items() if encoding not in ACCESS_RIGHTS_FIELDS}
    values = {encoding: chosen.getrandbits(8 * place.size - 1) | 1 for encoding, place in plain.items()}
    silent = sorted(values)[::3]
    values.update(dict.fromkeys(silent, 0))
    page = known.write_page(values)
    learnt = learn([Sample(page, values)])
    assert "bochs_2.8" in learnt.known and set(learnt.layout.fields) == set(values)
    assert all(place.offset == plain[encoding].offset for encoding, place in learnt.layout.fields.items())
    assert set(silent) <= set(learnt.from_known) and "bochs_2.8" in learnt.layout.fields[silent[0]].note
    for encoding in (silent[0], sorted(values)[1]):
        wrong = learn([Sample(page, {**values, encoding: values[encoding] ^ 4})])
        assert "bochs_2.8" not in wrong.known, hex(encoding)
        assert silent[1] not in wrong.layout.fields or wrong.known


def test_few_values_prove_no_known_layout() -> None:
    known = layouts()["bochs_2.8"]
    few = sorted(encoding for encoding in known.fields if encoding not in ACCESS_RIGHTS_FIELDS)[:ENOUGH - 1]
    values = {encoding: 0x101 + number for number, encoding in enumerate(few)}
    assert learn([Sample(known.write_page(values), values)]).known == ()


def test_the_file_is_a_layout_and_keeps_what_was_seen(tmp_path: Path) -> None:
    _, samples = made(3, 2, wide=True)
    learnt = learn(samples)
    path = str(tmp_path / "learnt.json")
    save(learnt, samples, path)
    assert load_layout(path) == learnt.layout
    again = load_samples(path)
    assert [(sample.page, dict(sample.values)) for sample in again] == [(sample.page, dict(sample.values)) for sample in samples]


@pytest.mark.parametrize("damage", [
    {"page": "00"}, {"page": "zz" * 4096}, {"page": 7}, {"values": {"0x681e": "x"}}, {"values": {"0xfff0": "0x1"}}, {"values": []}, {"page": None}])
def test_a_damaged_file_is_one_line(damage: "Dict[str, object]", tmp_path: Path) -> None:
    _, samples = made(3, 1, wide=True)
    path = tmp_path / "learnt.json"
    save(learn(samples), samples, str(path))
    content = json.loads(path.read_text())
    content["samples"][0].update(damage)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError) as raised:
        load_samples(str(path))
    assert "sample 0" in str(raised.value) and "\n" not in str(raised.value)
