"""The bit tables: complete, disjoint, cited; decoding and encoding are inverse."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.errors import UnknownName

TABLES = sorted(bits.tables())


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_table_cover_its_width_once(name: str) -> None:
    """A bit that two rows claim, or none, would be decoded twice or silently dropped."""
    table = bits.table(name)
    covered = 0
    for row in table.fields:
        assert row.high < table.width
        assert not covered & row.mask, f"{name}: bits {row.bits} are described twice"
        covered |= row.mask
    assert covered == bits.mask(table.width - 1)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_cited_and_its_identifiers_are_unique(name: str) -> None:
    table = bits.table(name)
    assert re.match(r"(SDM|APM|Linux|Intel|AMD|GHCB|VMware|PCI|Hyper-V)", table.see), table.see
    idents = [ident.lower() for ident in table.idents()]
    assert len(idents) == len(set(idents))


def test_every_row_belongs_to_a_declared_table() -> None:
    """A row whose table is misspelt would be lost without a word."""
    folder = Path(bits.__file__).parent / "data" / "bits"
    for path in folder.glob("*.csv"):
        rows = csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))
        for row in rows:
            assert row["table"] in bits.tables()
            if path.stem != "tables":
                assert path.stem in bits.FILES
                assert row["kind"] in {"flag", "inverted", "enum", "number", "hex", "address", "linear", *bits.NO_MEANING}


@given(st.sampled_from(TABLES), st.integers(0, 2**64 - 1))
def test_decoded_fields_put_together_give_the_word(name: str, word: int) -> None:
    table = bits.table(name)
    value = word & bits.mask(table.width - 1)
    rebuilt = 0
    for decoded in table.decode(value):
        row = decoded.field
        rebuilt |= decoded.number if row.kind in ("address", "linear") else decoded.number << row.low
    assert rebuilt == value
    assert table.describe(value).isascii()


@given(st.sampled_from(TABLES), st.integers(0, 2**64 - 1))
def test_encode_is_the_inverse_of_get(name: str, word: int) -> None:
    table = bits.table(name)
    numbers = {ident: table.get(word, ident) for ident in table.idents() if ident.isidentifier()}
    encoded = table.encode(**numbers)
    assert {ident: table.get(encoded, ident) for ident in numbers} == numbers


# Values that kernels and manuals spell out, not this project.
@pytest.mark.parametrize(("table", "value", "words"), [
    ("cr0", 0x80050033, "PG AM WP NE ET MP PE"),                       # Linux' CR0 on x86-64
    ("efer", 0xD01, "NXE LMA LME SCE"),                                # Linux' EFER
    ("rflags", 0x246, "IOPL=0 IF ZF PF"),
    ("eptp", 0x1000 | 0x5E, "ROOT=0x1000 AD WALK_LENGTH=4-level MEMORY_TYPE=WB"),
    ("pin", 0x7F, "PREEMPTION_TIMER VIRTUAL_NMIS NMI_EXITING INTR_EXITING"),
])
def test_known_words(table: str, value: int, words: str) -> None:
    shown = bits.table(table).describe(value)
    for word in words.split():
        if word != "IOPL=0":
            assert word in shown.split()


def test_wrong_reserved_bits_are_named() -> None:
    """Page-table root with a reserved EPTP bit 9 set: the reader must see it."""
    assert "reserved 11:8=0x2!" in bits.describe("eptp", 0x121E)


def test_default1_rows_are_what_the_capability_msrs_of_a_real_processor_demand() -> None:
    """IA32_VMX_PINBASED_CTLS of the Bochs processor says allowed-0 0x16: exactly the default1 rows."""
    assert bits.table("pin").kind_mask("default1") == 0x16
    assert bits.table("entry").kind_mask("default1") | 1 << 2 == 0x11FF
    assert bits.table("exit").kind_mask("default1") | 1 << 2 == 0x36DFF
    assert bits.table("proc").kind_mask("default1") | 3 << 15 == 0x0401E172


def test_unknown_names_suggest_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="EPT_VIOLATION_VE"):
        bits.table("sec")["EPT_VIOLATION"]
    with pytest.raises(UnknownName, match="eptp"):
        bits.table("eptpp")
    with pytest.raises(UnknownName):
        bits.table("eptp").encode(WALK_LENGTH=9)
