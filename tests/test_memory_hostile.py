"""Dumps that are cut, spoiled or lie: one VtdbgError each, in bounded time and memory, and never a byte that the file does not hold."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import dumps
from support.work import processor_time

from vtdbg.errors import FormatError, MemoryUnavailable, VtdbgError
from vtdbg.memory import compression
from vtdbg.memory.open import open_machine

PAGE = 4096
NOISE = random.Random(11)
SEGMENTS = [(0x1000, NOISE.randbytes(PAGE) + bytes(PAGE)), (0x9000, b"text" * 1024), (0x20000, NOISE.randbytes(PAGE))]
FILES: Dict[str, bytes] = dumps.every_format(SEGMENTS)
NAMES = sorted(FILES)
STRUCTURES = [name for name in NAMES if name not in ("kdump-plain", "kdump-lzo", "kdump-snappy", "elf64")]
"""One of each layout: the compressions of a kdump share theirs."""

# (offset, length) of the structures whose fields are numbers.
PLACES: Dict[str, Tuple[Tuple[int, int], ...]] = {
    "windows": ((0, 0x110), (0x340, 0x80), (0xF98, 4), (0x2000, 0x60)), "windows32": ((0, 0x90), (0x320, 4), (0xF88, 4)),
    "kdump": ((0, 12), (404, 64), (PAGE, 112), (2 * PAGE, 8), (3 * PAGE, 8), (4 * PAGE, 96)),
    "flat": ((0, 32), (PAGE, 28), (PAGE + 16 + 424, 40), (PAGE + 1000, 80)), "elf": ((0, 400),), "lime": ((0, 32), (0x2020, 32)),
    "avml": ((0, 60), (8255, 32)), "vmware": ((0, 560),)}


def places(name: str) -> Tuple[Tuple[int, int], ...]:
    return next(at for prefix, at in sorted(PLACES.items(), reverse=True) if name.startswith(prefix))


def use(path: Path) -> None:
    """What commands do with a dump: all of it that is allowed to go wrong only with a VtdbgError."""
    machine = open_machine(path)
    with machine.memory as memory:
        assert machine.provenance and all("\n" not in text for text in machine.warnings)
        ranges = memory.ranges() or []
        for start, size in ranges[:4] + ranges[-2:]:
            for address, count in ((start, 16), (start + size - 8, 8), (start + size - 8, 16), (start, PAGE)):
                try:
                    assert len(memory.read(address, count)) == count
                except MemoryUnavailable as error:
                    assert address <= error.address < address + count
        for number, (_, view) in enumerate(memory.views()):
            assert len(view)
            if number == 8:
                break
        for cpu in machine.cpus:
            assert all(isinstance(value, int) for value in cpu.registers.values())


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from(NAMES), edits=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 600), st.sampled_from(
    [b"\0", b"\xff", b"\x80", b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\xf0\xff\xff\xff\xff\xff\xff\xff", b"\0\0\0\0\0\1"]) | st.binary(
        min_size=1, max_size=8)), min_size=1, max_size=6), keep=st.none() | st.integers(0, 40000))
def test_spoiled_headers_end_in_one_kind_of_error(tmp_path: Path, name: str, edits: List[Tuple[int, int, bytes]], keep: "int | None") -> None:
    content = bytearray(FILES[name])
    where = places(name)
    for place, offset, new in edits:
        start, length = where[place % len(where)]
        at = start + offset % length
        content[at:at + len(new)] = new
    path = tmp_path / "spoiled"
    path.write_bytes(content[:keep])
    try:
        use(path)
    except VtdbgError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_number_of_a_header_costs_time_or_memory(tmp_path: Path, name: str) -> None:
    """Each 4- and 8-byte field of each structure in turn says something huge: below 24 MiB, and no loop over the number."""
    path = tmp_path / name
    original = FILES[name]
    tracemalloc.start()
    try:
        for offset in (at for start, length in places(name) for at in range(start, start + length, 4)):
            for value in (struct.pack("<I", 0x7FFFFFFF), struct.pack(">Q" if name.startswith("flat") else "<Q", 0x00000FFFFFFFF000)):
                path.write_bytes(original[:offset] + value + original[offset + len(value):])
                with processor_time(60), contextlib.suppress(VtdbgError):
                    use(path)
                assert tracemalloc.get_traced_memory()[1] < 24 << 20, hex(offset)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", STRUCTURES)
def test_cut_at_any_byte(tmp_path: Path, name: str) -> None:
    """A cut file is refused, or opens with a warning, and every byte that it still gives is the right one."""
    truth = dumps.pages_of(SEGMENTS)
    path = tmp_path / name
    path.write_bytes(FILES[name])
    begins = {len(dumps.lime(SEGMENTS[:n])) if name == "lime" else len(dumps.avml(SEGMENTS[:n])) for n in range(1, 4)}
    size = len(FILES[name])
    outcomes = set()
    edges = {edge - n for edge in begins for n in (0, 1, 31) if edge - n < size}
    for cut in sorted({*range(size - 1, 0, -41), *range(min(size - 1, 160), 0, -1), *edges}, reverse=True):
        os.truncate(path, cut)
        try:
            machine = open_machine(path)
        except FormatError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
            continue
        if machine.format == "raw":
            # Less than a signature is left: nothing says what it was.
            assert cut < 16
            machine.memory.close()
            continue
        with machine.memory as memory:
            missing = 0
            for pfn, page in truth.items():
                try:
                    assert memory.read(pfn * PAGE, PAGE) == page
                except MemoryUnavailable:
                    missing += 1
            outcomes.add("opened")
            assert machine.warnings or not missing or (name in ("lime", "avml") and cut in begins), cut
    assert outcomes == {"refused", "opened"} or (name.startswith("flat") and "refused" in outcomes)


def test_an_empty_page_table_of_headers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(dumps.elf([(0x1000, bytes(PAGE))], loads=[]))
    with pytest.raises(FormatError, match="stores no memory"):
        open_machine(path)


def test_records_of_the_flattened_form_that_lie(tmp_path: Path) -> None:
    head = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0")
    path = tmp_path / "flat"
    for record, words in ((struct.pack(">qq", -5, 10), "damaged record"), (struct.pack(">qq", 1 << 62, 1 << 62), "damaged record"),
                          (b"", "no record"), (struct.pack(">qq", 0, 4) + b"text", "neither a kdump nor an ELF core")):
        path.write_bytes(head + record)
        with pytest.raises(FormatError, match=words):
            open_machine(path)


def test_a_damaged_page_is_unavailable_and_the_others_are_not(tmp_path: Path) -> None:
    content = bytearray(dumps.kdump([(0, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)]))
    at = content.rindex(b"\x78\x9c")
    for spoiled in (b"\xff\xff", struct.pack("<H", 0x9C78) + b"\xff\xff\xff"):
        broken = bytearray(content)
        broken[at:at + len(spoiled)] = spoiled
        path = tmp_path / "kdump"
        path.write_bytes(broken)
        with open_machine(path).memory as memory:
            assert memory.read(0, 2 * PAGE) == b"a" * PAGE + b"b" * PAGE
            with pytest.raises(MemoryUnavailable, match="does not decompress") as caught:
                memory.read(PAGE, 2 * PAGE)
            assert caught.value.address == 2 * PAGE
            assert b"".join(bytes(view) for _, view in memory.views()) == b"a" * PAGE + b"b" * PAGE


def test_a_descriptor_that_points_before_the_pages_is_damaged(tmp_path: Path) -> None:
    content = bytearray(dumps.kdump([(0, b"a" * PAGE)], "plain"))
    table = len(content) - PAGE - 24
    for offset, size in ((0, PAGE), (table, PAGE), (table + 24, 0), (table + 24, 0xFFFFFFFF)):
        struct.pack_into("<QI", content, table, offset, size)
        path = tmp_path / "kdump"
        path.write_bytes(content)
        with open_machine(path).memory as memory, pytest.raises(MemoryUnavailable, match="damaged page descriptor"):
            memory.read(0, 1)


DECOMPRESSORS: Dict[str, Tuple[Callable[[bytes, int], bytes], Callable[[bytes], bytes]]] = {
    "zlib": (compression.inflate, dumps.COMPRESSORS["zlib"][1]), "snappy": (compression.unsnappy, dumps.snappy_literals),
    "lzo": (compression.unlzo, dumps.lzo_literals)}


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(DECOMPRESSORS)), data=st.binary(max_size=300), limit=st.integers(0, 5000))
def test_decompressors_take_any_bytes(name: str, data: bytes, limit: int) -> None:
    """Any input gives at most `limit` bytes or ValueError."""
    with contextlib.suppress(ValueError):
        assert len(DECOMPRESSORS[name][0](data, limit)) <= limit


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(DECOMPRESSORS)), data=st.binary(min_size=4, max_size=700))
def test_decompressors_undo_their_compressors(name: str, data: bytes) -> None:
    expand, compress = DECOMPRESSORS[name]
    assert expand(compress(data), len(data)) == data
    with pytest.raises(ValueError):
        expand(compress(data), len(data) - 1)


def test_a_zlib_bomb_is_not_expanded() -> None:
    """16 MiB of zeros in 16 KiB: refused at the size of a page."""
    bomb = dumps.COMPRESSORS["zlib"][1](bytes(16 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 4096 bytes"):
            compression.inflate(bomb, PAGE)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("block", "words"), [
    (b"", "no length"), (b"\x05\x00a", "came out"), (b"\x04\xfc\xff\xff\xff\xff", "literal"), (b"\x08\x00a\x01\x05", "before the beginning"),
    (b"\x08\x00a\x0d", "inside a copy"), (b"\xff\xff\xff\xff\x7f\0", "at most")])
def test_snappy_blocks_that_break_the_rules(block: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compression.unsnappy(block, 4096)


def test_lzo_matches_of_every_kind() -> None:
    """One instruction of each encoding of lzo.rst: literal runs, 2-byte and 3-byte matches, M2, M3 with a long length, M4, end mark."""
    start = bytes(range(33, 53))
    stream = bytes([17 + len(start)]) + start                   # 20 literals; state 4
    expected = bytearray(start)

    def match(distance: int, length: int) -> None:
        for _ in range(length):
            expected.append(expected[-distance])

    stream += bytes([0x40 | 1 << 5 | (5 - 1) << 2 | 2, 0]) + b"xy"                   # 64..127: length 4, distance 5, then 2 literals
    match(5, 4)
    expected += b"xy"
    stream += bytes([(3 - 1) << 2 | 1, 0]) + b"z"                                   # 0..15 in state 2: length 2, distance 3, then 1 literal
    match(3, 2)
    expected += b"z"
    stream += bytes([0xE0 | (8 - 1) << 2 | 0, 0])                                   # 128..255: length 8, distance 8; state 0
    match(8, 8)
    stream += bytes([0, 0, 7]) + bytes(3 + 15 + 255 + 7)                             # 0..15 in state 0: a long literal run; state 4
    expected += bytes(3 + 15 + 255 + 7)
    stream += bytes([0x20, 0, 0, 9]) + struct.pack("<H", (100 - 1) << 2)              # 32..63: length 2 + 31 + 2 * 255 + 9, distance 100
    match(100, 2 + 31 + 2 * 255 + 9)
    stream += bytes([5]) + b"01234567" + bytes([0 << 2 | 3, 0])[:0]                   # 8 literals; state 4
    expected += b"01234567"
    padding = bytes(3 + 15 + 255 * 70 + 1)
    stream += bytes([0x40 | 0 << 5 | 0 << 2, 0])                                      # length 3, distance 1; state 0
    match(1, 3)
    stream += bytes([0]) + bytes(70) + bytes([1]) + padding                          # far enough for the encodings below
    expected += padding
    stream += bytes([(5 - 1) % 4 << 2 | 0, 1])                                        # 0..15 in state 4: length 3, distance 2049 + 4
    match(2049 + 4, 3)
    stream += bytes([0x10 | 3]) + struct.pack("<H", 77 << 2 | 1) + b"!"               # 16..31: length 5, distance 16384 + 77, then 1 literal
    match(16384 + 77, 5)
    expected += b"!"
    stream += b"\x11\0\0"
    assert compression.unlzo(stream, 1 << 16) == bytes(expected)
    with pytest.raises(ValueError, match="end mark"):
        compression.unlzo(stream[:-3], 1 << 16)
