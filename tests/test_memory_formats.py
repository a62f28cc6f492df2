"""The same memory written as every format reads back the same, holes included; what a header line says of it."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Dict, List, Set, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import dumps

from vtdbg.errors import FormatError, MemoryUnavailable, UnknownName, UsageError
from vtdbg.machine import Machine
from vtdbg.memory.base import PhysicalMemory, memory_from_segments, merge_ranges
from vtdbg.memory.open import formats, open_machine

PAGE = 4096
Segments = List[Tuple[int, bytes]]

KINDS = ("elf", "kdump", "flattened kdump", "flattened elf", "lime", "avml", "windows", "vmware")


def page_segments(pages: Set[int], seed: int) -> Segments:
    """Disjoint page-aligned segments; pages are zeros, repetitive or noise, as `seed` has it."""
    chance = random.Random(seed)
    segments: Segments = []
    for pfn in sorted(pages):
        page = (bytes(PAGE), bytes([pfn % 251 + 1]) * PAGE, chance.randbytes(PAGE))[chance.randrange(3)]
        if segments and segments[-1][0] + len(segments[-1][1]) == pfn * PAGE and chance.randrange(4):
            segments[-1] = segments[-1][0], segments[-1][1] + page
        else:
            segments.append((pfn * PAGE, page))
    return segments


def check_reads(memory: PhysicalMemory, segments: Segments, reads: List[Tuple[int, int]]) -> None:
    """Every read gives the bytes of the segments, or fails at the first address that no segment has."""
    truth = {address + n: data[n:n + PAGE] for address, data in segments for n in range(0, len(data), PAGE)}
    assert memory.ranges() == merge_ranges((address, len(data)) for address, data in segments)
    for address, size in reads:
        expected = bytearray()
        at = address
        while at < address + size and at & -PAGE in truth:
            piece = truth[at & -PAGE][at % PAGE:][:address + size - at]
            expected += piece
            at += len(piece)
        if at >= address + size:
            assert memory.read(address, size) == bytes(expected)
        else:
            with pytest.raises(MemoryUnavailable) as caught:
                memory.read(address, size)
            assert caught.value.address == at


def check_views(memory: PhysicalMemory, segments: Segments) -> None:
    """The views hold every stored byte once, in address order."""
    seen = bytearray()
    last = 0
    for address, view in memory.views():
        assert address >= last
        last = address + len(view)
        seen += view
        assert bytes(view) == memory.read(address, len(view))
    assert bytes(seen) == b"".join(data for _, data in segments)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(pages=st.sets(st.integers(0, 60) | st.integers(0, 2047), min_size=1, max_size=24), seed=st.integers(0, 1 << 32),
       reads=st.lists(st.tuples(st.integers(0, 2050 * PAGE), st.integers(0, 3 * PAGE)), max_size=12))
def test_the_same_segments_as_every_format_read_back_the_same(tmp_path: Path, pages: Set[int], seed: int, reads: List[Tuple[int, int]]) -> None:
    segments = page_segments(pages, seed)
    reads = reads + [(address + len(data) - 8, 16) for address, data in segments] + [(max(address - 8, 0), 16) for address, _ in segments]
    for name, content in dumps.every_format(segments).items():
        path = tmp_path / name
        path.write_bytes(content)
        machine = open_machine(path)
        assert machine.format in KINDS and name.startswith(machine.format.replace("flattened ", "flat-")) and not machine.warnings
        with machine.memory as memory:
            check_reads(memory, segments, reads)
            check_views(memory, segments)
    vmem = dumps.vmware_pair(segments, tmp_path, "pair")
    for path in (vmem, vmem.with_suffix(".vmss")):
        machine = open_machine(path)
        assert machine.format == "vmware"
        with machine.memory as memory:
            check_reads(memory, segments, reads)
            check_views(memory, segments)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(cuts=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), min_size=1, max_size=12), reads=st.lists(
    st.tuples(st.integers(0, 9000), st.integers(0, 300)), max_size=10))
def test_formats_without_pages_keep_segments_of_any_alignment(tmp_path: Path, cuts: List[Tuple[int, int]], reads: List[Tuple[int, int]]) -> None:
    segments: Segments = []
    end = 0
    for gap, size in cuts:
        segments.append((end + gap, random.Random(size).randbytes(size)))
        end += gap + size
    expected = memory_from_segments(segments)
    core = dumps.elf(segments)
    for name, content in {"elf": core, "lime": dumps.lime(segments), "flat": dumps.flattened(core, range(0, 40000, 997))}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with open_machine(path).memory as memory:
            assert memory.ranges() == expected.ranges()
            for address, size in reads:
                assert _read(memory, address, size) == _read(expected, address, size)


def _read(memory: PhysicalMemory, address: int, size: int) -> object:
    try:
        return memory.read(address, size)
    except MemoryUnavailable as error:
        return error.address


def test_addresses_above_4_gib(tmp_path: Path) -> None:
    """A machine with 4 GiB or more has memory on both sides of the PCI hole."""
    segments = [(0x1000, b"low." * 1024), (0xBFFFF000, b"end." * 1024), (0x100000000, b"high" * 2048)]
    for name, content in dumps.every_format(segments).items():
        if name in ("elf32", "kdump-32"):
            continue
        path = tmp_path / name
        path.write_bytes(content)
        with open_machine(path).memory as memory:
            assert memory.read(0x100000FFC, 8) == b"highhigh", name
            assert memory.ranges() == [(0x1000, PAGE), (0xBFFFF000, PAGE), (0x100000000, 2 * PAGE)], name
            with pytest.raises(MemoryUnavailable) as caught:
                memory.read(0xBFFFFFFC, 8)
            assert caught.value.address == 0xC0000000


def test_raw_is_the_fallback_and_its_holes_are_zeros(tmp_path: Path) -> None:
    path = tmp_path / "ram.bin"
    path.write_bytes(dumps.raw([(0x2000, b"\x01" * PAGE)]))
    machine = open_machine(path)
    assert (machine.format, machine.warnings, machine.cpus) == ("raw", [], [])
    with machine.memory as memory:
        assert memory.ranges() == [(0, 0x3000)]
        assert memory.read(0x1FFE, 4) == b"\0\0\x01\x01"
        with pytest.raises(MemoryUnavailable) as caught:
            memory.read(0x2FFF, 2)
        assert caught.value.address == 0x3000


def test_a_sparse_raw_image_shows_only_what_is_stored(tmp_path: Path) -> None:
    """The views of a 4 GiB file with one page in it have that page and (nearly) nothing else: a scan costs what the file stores."""
    path = tmp_path / "sparse"
    with open(path, "wb") as out:
        out.seek(0x7654000)
        out.write(b"\x55" * PAGE)
        out.truncate(4 << 30)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    machine = open_machine(path)
    with machine.memory as memory:
        views = [(address, len(view)) for address, view in memory.views()]
        assert sum(size for _, size in views) <= 1 << 20
        assert any(address <= 0x7654000 < address + size for address, size in views)
        assert memory.read((4 << 30) - 8, 8) == bytes(8)
    assert any("3 GiB" in text for text in machine.warnings)


@pytest.mark.parametrize("kind", ["raw", "elf", "lime", "windows", "kdump"])
def test_the_heap_does_not_grow_with_the_dump(tmp_path: Path, kind: str) -> None:
    """A dump of 64 GiB (a sparse file) costs less than 512 KiB of heap to open, to read at both ends and to list."""
    size = 64 << 30
    page = b"\x5a" * PAGE
    head = {"raw": b"", "kdump": dumps.kdump([(0x1000, page)], max_mapnr=size // PAGE),
            "elf": dumps.elf([(0, page)], loads=[(0, 0, 0, size)]), "lime": struct.pack("<4sIQQQ", b"EMiL", 1, 0, size - 1, 0) + page,
            "windows": dumps.windows64([(0x1000, page)])}[kind]
    if kind == "windows":
        head = head[:0xA0] + struct.pack("<Q", size // PAGE) + head[0xA8:]
    path = tmp_path / kind
    path.write_bytes(head)
    if kind != "kdump":
        os.truncate(path, len(head) - PAGE * bool(head) + size)
    if path.stat().st_blocks * 512 > 16 << 20:
        pytest.skip("this file system has no sparse files")
    with open_machine(path).memory as memory:
        memory.read(0x1000, PAGE)
    tracemalloc.start()
    try:
        machine = open_machine(path)
        with machine.memory as memory:
            memory.read(0x1000, 8)
            if kind != "kdump":
                memory.read(size - PAGE, PAGE)
            assert memory.ranges()
            assert machine.warnings == [] or kind == "raw"
        assert tracemalloc.get_traced_memory()[1] < 512 << 10
    finally:
        tracemalloc.stop()


def test_an_image_that_is_not_whole_pages_opens_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"\x00\x01" * 3000)
    machine = open_machine(path)
    with machine.memory:
        assert "4 KiB" in machine.warnings[0]


def test_a_vmem_without_its_state_file_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "vm.vmem"
    path.write_bytes(b"\x00\x01" * 4096)
    with open_machine(path).memory as memory:
        assert memory.ranges() == [(0, 8192)]
    with pytest.raises(FormatError, match=r"vmss or \.vmsn"):
        open_machine(path, format="vmware")


def test_a_state_file_without_its_image_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "vm.vmss"
    path.write_bytes(dumps.vmware_state([(0, 0, 1)]))
    with pytest.raises(FormatError, match=r"no \.vmem of the same name"):
        open_machine(path)


def test_vmware_registers_as_blocks_and_as_tags(tmp_path: Path) -> None:
    """crash's vmware_vmss.c: gpregs is rax, rcx, rdx, rbx, rbp, rsp, rsi, rdi, r8 ...; CR64 is cr0 ...; IDTR is a limit and a base."""
    general = struct.pack("<16Q", *range(0x100, 0x110))
    cpu = dumps.vmware_tag("cpu:numVCPUs", (), 2)
    cpu += dumps.vmware_block("gpregs", (0,), general, padding=3) + dumps.vmware_block("CR64", (0,), struct.pack("<9Q", *range(9)))
    cpu += dumps.vmware_block("IDTR", (0,), struct.pack("<HQ", 0xFFF, 0xFFFFFE0000000000)) + dumps.vmware_tag("rip", (0,), 0xFFFFFFFF81000000, 8)
    cpu += dumps.vmware_tag("rax", (1,), 77, 8) + dumps.vmware_tag("CR64", (1, 3), 0x1000, 8) + dumps.vmware_tag("eflags", (1,), 0x246)
    cpu += dumps.vmware_tag("IDTR", (1, 1), 0x1000) + dumps.vmware_tag("IDTR", (1, 2), 0xFFFFFE00)
    path = tmp_path / "vm.vmsn"
    path.write_bytes(dumps.vmware_state([], bytes(PAGE), cpu))
    machine = open_machine(path)
    with machine.memory:
        names = ["rax", "rcx", "rdx", "rbx", "rbp", "rsp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
        assert machine.cpus[0].registers == {
            **dict(zip(names, range(0x100, 0x110))),
            "cr0": 0, "cr2": 2, "cr3": 3, "cr4": 4, "cr8": 8, "idtr_limit": 0xFFF, "idtr_base": 0xFFFFFE0000000000, "rip": 0xFFFFFFFF81000000}
        assert machine.cpus[1].registers == {"rax": 77, "cr3": 0x1000, "rflags": 0x246, "idtr_base": 0xFFFFFE0000001000}


def test_windows_registers_are_those_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "w.dmp"
    path.write_bytes(dumps.windows64([(0x1000, bytes(PAGE))], cr3=0x1AB000, rip=0xFFFFF80012345678, rax=5, r15=6))
    machine = open_machine(path)
    with machine.memory:
        get = machine.cpus[0].get
        assert (get("cr3"), get("rip"), get("rax"), get("r15")) == (0x1AB000, 0xFFFFF80012345678, 5, 6)
        assert (get("cs_selector"), get("rflags")) == (0x10, 0x246)
        assert get("cr4") is None and get("efer") is None
        assert machine.details["bugcheck"] == "0xe2 (0x1, 0x2, 0x3, 0x4)"
        assert machine.details["KdDebuggerDataBlock"] == "0xfffff80000004000"


def test_windows_32_bit_registers(tmp_path: Path) -> None:
    path = tmp_path / "w.dmp"
    path.write_bytes(dumps.windows32([(0x1000, bytes(PAGE))]))
    machine = open_machine(path)
    with machine.memory:
        get = machine.cpus[0].get
        assert (get("cr3"), get("rip"), get("rsp"), get("rdi"), get("rax"), get("ss_selector")) == (0x39000, 0x80401000, 0x8054A000, 1, 6, 0x10)


def test_a_header_without_context_leaves_the_registers_unknown(tmp_path: Path) -> None:
    """Windows fills what it does not write with "PAGE": that is no register value."""
    content = bytearray(dumps.windows64([(0x1000, bytes(PAGE))]))
    content[0x348:0xF00] = b"PAGE" * ((0xF00 - 0x348) // 4)
    path = tmp_path / "w.dmp"
    path.write_bytes(content)
    machine = open_machine(path)
    with machine.memory:
        assert machine.cpus[0].registers == {"cr3": 0x1AA000}
        assert any("no CONTEXT" in text for text in machine.warnings)


@pytest.mark.parametrize(("dump_type", "words"), [(3, "header only"), (4, "triage"), (2, "old form"), (0x77, "type 0x77")])
def test_windows_dumps_without_physical_memory_are_refused_by_name(tmp_path: Path, dump_type: int, words: str) -> None:
    path = tmp_path / "w.dmp"
    path.write_bytes(dumps.windows64([(0x1000, bytes(PAGE))], dump_type=dump_type))
    with pytest.raises(FormatError, match=words):
        open_machine(path)


def test_overlapping_program_headers_are_one_memory(tmp_path: Path) -> None:
    """QEMU's dump with paging names a page once for each virtual address that maps it; the bytes are in the file once."""
    data = random.Random(1).randbytes(8 * PAGE)
    loads = [(0, at * PAGE, at * PAGE, count * PAGE) for at, count in ((3, 1), (0, 2), (1, 4), (3, 1), (6, 2))]
    path = tmp_path / "paging"
    path.write_bytes(dumps.elf([(0, data)], loads=loads))
    machine = open_machine(path)
    with machine.memory as memory:
        assert memory.ranges() == [(0, 5 * PAGE), (6 * PAGE, 2 * PAGE)]
        assert memory.read(0, 5 * PAGE) == data[:5 * PAGE]
        assert [address for address, _ in memory.views()] == [0, 6 * PAGE]
        assert "stored twice" not in machine.details


def test_memory_that_an_elf_core_stores_twice_is_said(tmp_path: Path) -> None:
    """/proc/vmcore stores the kernel's text twice (text mapping, direct mapping): that is told, and one of them is read."""
    loads = [(0, 0, 0x1000, 4 * PAGE), (1, 0, 0x2000, PAGE)]
    path = tmp_path / "vmcore"
    path.write_bytes(dumps.elf([(0, b"A" * 4 * PAGE), (0, b"B" * PAGE)], loads=loads))
    machine = open_machine(path)
    with machine.memory as memory:
        assert memory.read(0x2000, 4) == b"AAAA"
        assert machine.details["stored twice"].startswith("4 KiB")


def test_more_than_65534_program_headers(tmp_path: Path) -> None:
    """System V gABI: then e_phnum is PN_XNUM and sh_info of section 0 has the number."""
    count = 70000
    path = tmp_path / "many"
    path.write_bytes(dumps.elf([(0, random.Random(2).randbytes(count + 7))], extended=True, loads=[(0, n, 2 * n, 1) for n in range(count)]))
    machine = open_machine(path)
    with machine.memory as memory:
        assert machine.details["program headers"] == str(count + 1)
        assert memory.read(2 * (count - 1), 1) == random.Random(2).randbytes(count + 7)[count - 1:count]
        with pytest.raises(MemoryUnavailable):
            memory.read(1, 1)


def test_records_of_the_flattened_form_may_come_in_any_order_and_overwrite(tmp_path: Path) -> None:
    """makedumpfile seeks back and writes the header again at the end: the later record holds."""
    plain = dumps.kdump([(0, random.Random(3).randbytes(9 * PAGE))])
    cuts = list(range(0, len(plain), 1111))
    order = list(range(len(cuts)))
    random.Random(4).shuffle(order)
    spoiled = bytearray(dumps.flattened(plain, cuts, order, end=False))
    body = spoiled[4096:]
    first = struct.pack(">qq", 0, 5000) + b"\xee" * 5000 + struct.pack(">qq", 9000, 300) + b"\xdd" * 300
    path = tmp_path / "flat"
    path.write_bytes(bytes(spoiled[:4096]) + first + bytes(body) + struct.pack(">qq", -1, -1))
    machine = open_machine(path)
    with machine.memory as memory:
        assert memory.read(0, 9 * PAGE) == random.Random(3).randbytes(9 * PAGE)
        assert machine.warnings == []


def test_bytes_that_the_flattened_form_lacks_are_no_memory(tmp_path: Path) -> None:
    """A record that is missing in the middle leaves a hole in the file: its bytes are not known to be zeros."""
    core = dumps.elf([(0, b"\x11" * 4 * PAGE)])
    start = len(core) - 4 * PAGE
    flat = dumps.flattened(core, [start + PAGE, start + 2 * PAGE], order=[0, 2])
    path = tmp_path / "flat"
    path.write_bytes(flat)
    with open_machine(path).memory as memory:
        assert memory.ranges() == [(0, PAGE), (2 * PAGE, 2 * PAGE)]
        assert memory.read(0, PAGE) == b"\x11" * PAGE
        assert memory.read(2 * PAGE, 2 * PAGE) == b"\x11" * 2 * PAGE
        with pytest.raises(MemoryUnavailable) as caught:
            memory.read(PAGE - 4, 8)
        assert caught.value.address == PAGE


def test_pages_that_makedumpfile_left_out_say_so(tmp_path: Path) -> None:
    path = tmp_path / "filtered"
    path.write_bytes(dumps.kdump([(0x1000, b"x" * PAGE)], excluded=[2]))
    with open_machine(path).memory as memory:
        with pytest.raises(MemoryUnavailable, match=r"left out of the dump \(dump level 31\)"):
            memory.read(0x2000, 1)
        with pytest.raises(MemoryUnavailable, match="not in the dump"):
            memory.read(0, 1)


def test_registers_and_vmcoreinfo_of_a_kdump(tmp_path: Path) -> None:
    path = tmp_path / "k"
    notes = dumps.qemu_note(rip=0x1234, cr3=0x5000) + dumps.qemu_note(rip=0x5678)
    path.write_bytes(dumps.kdump([(0, bytes(PAGE))], notes=notes, vmcoreinfo=b"OSRELEASE=6.1.0\nCRASHTIME=5\n"))
    machine = open_machine(path)
    with machine.memory:
        assert [(cpu.index, cpu.get("rip"), cpu.get("cr3")) for cpu in machine.cpus] == [(0, 0x1234, 0x5000), (1, 0x5678, 0)]
        assert machine.details["kernel release"] == "6.1.0"


@pytest.mark.parametrize("version", range(1, 7))
def test_fields_of_later_header_versions_are_not_read_from_earlier_ones(tmp_path: Path, version: int) -> None:
    """makedumpfile's IMPLEMENTATION: VMCOREINFO came with version 3, notes with 4, 64-bit max_mapnr with 6; what stands there before is not it."""
    content = bytearray(dumps.kdump([(0x1000, b"v" * PAGE)], notes=dumps.qemu_note(rip=9), vmcoreinfo=b"OSRELEASE=5\n", version=version))
    if version < 6:
        struct.pack_into("<Q", content, PAGE + 96, 1 << 40)
    path = tmp_path / "k"
    path.write_bytes(content)
    machine = open_machine(path)
    with machine.memory as memory:
        assert memory.read(0x1000, 4) == b"vvvv"
        assert (len(machine.cpus), "vmcoreinfo" in machine.details) == (version >= 4, version >= 3)


def test_diskdump_is_read_without_its_sub_header(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(dumps.kdump([(0x1000, b"d" * PAGE)], signature=b"DISKDUMP", version=1, split=1))
    machine = open_machine(path)
    with machine.memory as memory:
        assert (machine.format, memory.read(0x1FFC, 4), machine.cpus) == ("kdump", b"dddd", [])


def test_closing_gives_the_file_back(tmp_path: Path) -> None:
    """After `close` reads are refused; a view that somebody still holds stays valid."""
    path = tmp_path / "ram"
    path.write_bytes(b"\x00\x07" * 4096)
    memory = open_machine(path).memory
    (_, view), = memory.views()
    memory.close()
    memory.close()
    assert bytes(view[:2]) == b"\x00\x07"
    view.release()
    with pytest.raises(UsageError, match="closed"):
        memory.read(0, 1)


def test_formats_have_names_that_force_them(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(dumps.elf([(0, b"e" * PAGE)]))
    with open_machine(path, format="raw").memory as memory:
        assert memory.read(0, 4) == b"\x7fELF"
    for name, title in formats():
        assert title
        if name not in ("raw", "elf"):
            with pytest.raises(FormatError):
                open_machine(path, format=name)
    with pytest.raises(UnknownName, match="did you mean .*kdump"):
        open_machine(path, format="kdmp")


FOREIGN: Dict[str, Tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"VMCS 0x1000, last attempted VM-entry on CPU 0\n" * 9, "text file"),
    "utf8": ("Grüße an die Ebene 1\n".encode() * 300, "text file"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(99), "gzip -d"),
    "xz": (b"\xfd7zXZ\0" + bytes(99), "xz -d"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "zstd -d"),
    "zip": (b"PK\x03\x04" + bytes(99), "zip archive"),
    "qcow2": (b"QFI\xfb\0\0\0\x03" + bytes(99), "qcow2"),
    "savevm": (b"QEVM\0\0\0\x03" + bytes(99), "migration stream"),
    "minidump": (b"MDMP\x93\xa7" + bytes(99), "minidump"),
    "pdf": (b"%PDF-1.7\n\x00\x01" + bytes(99), "PDF"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG"),
    "pe": (b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80) + bytes(0x40) + b"PE\0\0" + bytes(99), "Windows executable"),
    "vmlinux": (dumps.elf([(0, bytes(PAGE))]).replace(b"\x04\0\x3e\0", b"\x02\0\x3e\0", 1), "executable"),
    "aarch64": (dumps.elf([(0, bytes(PAGE))]).replace(b"\x04\0\x3e\0", b"\x04\0\xb7\0", 1), "AArch64"),
    "process": (dumps.elf([(0, bytes(PAGE)), (0, b"x" * PAGE)]), "core of a process"),
    "split": (dumps.kdump([(0, bytes(PAGE))], split=1), "--reassemble"),
    "kdump-arm": (dumps.kdump([(0, bytes(PAGE))], machine=b"aarch64"), "aarch64"),
    "kdump-7": (dumps.kdump([(0, bytes(PAGE))], version=7), "version 7"),
    "lime-2": (b"EMiL" + struct.pack("<IQQQ", 2, 0, 4095, 0) + bytes(PAGE), "LiME version 2"),
    "vmss-32": (dumps.vmware_state([], bytes(PAGE), magic=0xBED0BED0), "32-bit form"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_no_memory_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    content, words = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words) as caught:
        open_machine(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "not a regular file"), (tmp_path / "absent", "No such file"), (tmp_path / ("x" * 300), "cannot be opened")):
        with pytest.raises(FormatError, match=words):
            open_machine(path)


def test_opening_by_str_and_by_path_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(dumps.elf([(0x1000, b"e" * PAGE)], dumps.qemu_note(rip=7)))
    machines: List[Machine] = [open_machine(path), open_machine(str(path))]
    assert [machine.name for machine in machines] == ["core", "core"]
    assert machines[0].provenance == machines[1].provenance == "ELF core, 4 KiB in 1 run, 1 processor"
    for machine in machines:
        machine.memory.close()
