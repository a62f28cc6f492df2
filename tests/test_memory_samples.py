"""Dumps that QEMU and makedumpfile wrote (tests/data/dumps), against QEMU's own word and against what other readers read."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import struct
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from vtdbg.errors import FormatError, MemoryUnavailable
from vtdbg.machine import Cpu, Machine
from vtdbg.memory import compression
from vtdbg.memory.base import PhysicalMemory
from vtdbg.memory.open import open_machine

PAGE = 4096
RAM = 8 << 20
DATA = Path(__file__).parent / "data" / "dumps"
NAMES = sorted(path.name[:-3] for path in DATA.glob("*.xz") if path.name != "kdbg.dmp.xz")
OTHERS: Dict[str, Dict[str, Dict[str, Any]]] = json.loads((DATA / "others.json").read_text())

# What memory each file stores.  The program headers of qemu-paging.elf and makedumpfile-nozeros.elf as `readelf -lW` shows them.
BIOS = (0xFFFF0000, 0x10000)
RAM_WITHOUT_VGA = [(0, 0xA0000), (0xC0000, RAM - 0xC0000)]
RANGES: Dict[str, List[Tuple[int, int]]] = {
    "qemu.raw": [(0, RAM)], "qemu.elf": [(0, RAM), BIOS], "qemu-zlib.flat": [(0, RAM), BIOS], "qemu-zlib.kdump": [(0, RAM), BIOS],
    "qemu32.raw": [(0, 4 << 20)], "qemu32.elf": [(0, 4 << 20), BIOS], "qemu32-zlib.flat": [(0, 4 << 20), BIOS],
    "qemu-paging.elf": [(0, 0xC0000), (0x110000, 0x10000), (0x400000, 0x200000)], "makedumpfile-nozeros.elf": [(0x100000, 0x80000)],
    "makedumpfile-lzo.kdump": [(0, RAM)], "makedumpfile-lzo.flat": [(0, RAM)],
    "ranges.dmp": [(0x1000, 0x9F000), RAM_WITHOUT_VGA[1]],
    **dict.fromkeys(("snappy.kdump", "zstd.kdump", "snappy.avml", "ranges.lime", "inside.vmsn", "bitmap.dmp"), RAM_WITHOUT_VGA),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for name in NAMES:
        (folder / name).write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return folder


@pytest.fixture(scope="module")
def ram(files: Path) -> bytes:
    """What QEMU's pmemsave wrote of physical 0 to 8 MiB."""
    return (files / "qemu.raw").read_bytes()


def opened(files: Path, name: str) -> Machine:
    if name == "zstd.kdump" and compression.unzstd_or_none() is None:
        with pytest.raises(FormatError, match="zstd-compressed: pip install zstandard"):
            open_machine(files / name)
        pytest.skip("zstd.kdump needs zstandard or Python 3.14; its error message is checked")
    return open_machine(files / name)


def test_every_sample_is_known_to_these_tests() -> None:
    assert set(NAMES) == set(RANGES)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_qemu_saved(files: Path, name: str) -> None:
    """Every page below 8 MiB that a file stores equals pmemsave's; the BIOS of this machine is 64 KiB of zeros."""
    ram = (files / ("qemu32.raw" if name.startswith("qemu32") else "qemu.raw")).read_bytes()
    machine = opened(files, name)
    assert machine.warnings == []
    with machine.memory as memory:
        assert memory.ranges() == RANGES[name]
        for start, size in RANGES[name]:
            assert memory.read(start, size) == (ram[start:start + size] if start < RAM else bytes(size))
        seen = 0
        for address, view in memory.views():
            assert bytes(view) == (ram[address:address + len(view)] if address < RAM else bytes(len(view)))
            seen += len(view)
        # Raw views leave out what a sparse file does not store.
        assert seen == sum(size for _, size in RANGES[name]) or (name.endswith(".raw") and seen < len(ram))
        holes = [start + size for start, size in RANGES[name]]
        for hole in holes:
            with pytest.raises(MemoryUnavailable) as caught:
                memory.read(hole - 4, 8)
            assert caught.value.address == hole


def digest(memory: PhysicalMemory) -> Tuple[int, str]:
    """As tests/data/dumps/others.py: pages, and SHA-256 over (address, page)."""
    total, pages = hashlib.sha256(), 0
    for at in [*range(0, RAM, PAGE), *range(*(BIOS[0], BIOS[0] + BIOS[1]), PAGE)]:
        try:
            page = memory.read(at, PAGE)
        except MemoryUnavailable:
            continue
        pages += 1
        total.update(struct.pack("<Q", at) + page)
    return pages, total.hexdigest()


@pytest.mark.parametrize(("name", "reader"), [(name, reader) for name in sorted(OTHERS) for reader in sorted(OTHERS[name])])
def test_other_readers_read_the_same(files: Path, name: str, reader: str) -> None:
    """libkdumpfile, volatility3 and kdmp-parser read the same pages with the same bytes, and none more."""
    with opened(files, name).memory as memory:
        assert digest(memory) == (OTHERS[name][reader]["pages"], OTHERS[name][reader]["sha256"])


def registers_of(text: str) -> Dict[str, int]:
    """The values of QEMU's `info registers` by our names."""
    found: Dict[str, int] = {}
    for name, value in re.findall(r"\b([ER][A-Z]{2}|R\d+|EFL|RFL|CR[0234]) ?=([0-9a-f]+)", text):
        found["rflags" if name.endswith("FL") else name.lower().replace("e", "r", 1) if name[0] == "E" else name.lower()] = int(value, 16)
    for name, selector, base, limit, flags in re.findall(r"^([CDEFGS]S|LDT|TR) ?=([0-9a-f]{4}) ([0-9a-f]+) ([0-9a-f]{8}) ([0-9a-f]{8})", text, re.M):
        prefix = "ldtr" if name == "LDT" else name.lower()
        found[f"{prefix}_selector"], found[f"{prefix}_base"], found[f"{prefix}_limit"] = int(selector, 16), int(base, 16), int(limit, 16)
        found[f"{prefix}_attributes"] = int(flags, 16) >> 8 & 0xF0FF
    for name, base, limit in re.findall(r"^([GI]DT)= +([0-9a-f]+) ([0-9a-f]+)", text, re.M):
        found[f"{name.lower()}r_base"], found[f"{name.lower()}r_limit"] = int(base, 16), int(limit, 16)
    return found


def check_registers(cpu: Cpu, text: str) -> None:
    """Everything that the note has equals QEMU's `info registers`, which shows 32 bits where the code segment is not 64-bit."""
    shown = registers_of(text.replace("\r", ""))
    wide = "RIP=" in text
    assert len(shown) > 50 - 8 * (not wide)
    for name, value in shown.items():
        assert cpu.get(name) == value, name
    assert set(cpu.registers) - set(shown) <= {"kernel_gs_base", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"}
    assert cpu.get("efer") is None and cpu.source == "QEMU note"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("qemu", "makedumpfile")) and not name.endswith("raw")])
def test_registers_are_what_qemu_shows(files: Path, name: str) -> None:
    truth = json.loads((DATA / ("truth32.json" if name.startswith("qemu32") else "truth.json")).read_text())
    machine = opened(files, name)
    with machine.memory:
        assert [cpu.index for cpu in machine.cpus] == list(range(len(truth["info_registers"])))
        for cpu, text in zip(machine.cpus, truth["info_registers"]):
            check_registers(cpu, text)
        if not name.startswith("qemu32"):
            assert machine.cpus[0].get("kernel_gs_base") == 0xFFFFFFFF81234000
            assert machine.cpus[0].get("cr3") == 0x100000


@pytest.mark.parametrize("name", ["qemu.elf", "qemu32.elf", "qemu-zlib.kdump"])
def test_prstatus_alone_gives_the_general_registers(files: Path, tmp_path: Path, name: str) -> None:
    """Without QEMU's own note there is NT_PRSTATUS, of 64 or 32 bits: general registers and selectors, nothing of the system registers."""
    content = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content.replace(b"QEMU\0\0\0\0", b"XXXX\0\0\0\0"))
    truth = json.loads((DATA / ("truth32.json" if name.startswith("qemu32") else "truth.json")).read_text())
    machine = open_machine(path)
    with machine.memory:
        assert machine.warnings == []
        for cpu, text in zip(machine.cpus, truth["info_registers"]):
            shown = registers_of(text.replace("\r", ""))
            assert cpu.source == "NT_PRSTATUS note" and cpu.get("cr3") is None
            for register in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip", "rflags", "cs_selector", "ss_selector", "gs_selector"):
                assert cpu.get(register) == shown[register], register


def test_the_kernel_of_a_makedumpfile_dump_is_named(files: Path) -> None:
    for name in ("makedumpfile-lzo.kdump", "makedumpfile-lzo.flat", "makedumpfile-nozeros.elf"):
        machine = opened(files, name)
        with machine.memory:
            assert machine.details["kernel release"] == "6.1.0-sample"
            assert machine.details["kernel offset (KASLR)"] == "0"
            assert machine.details["crash time"] == "2023-11-14 22:13:20 UTC"
            assert "SYMBOL(init_top_pgt)=ffffffff80100000" in machine.details["vmcoreinfo"].splitlines()


def test_windows_registers(files: Path) -> None:
    """kdmp-parser reads the same CR3 and RIP from the header."""
    for name in ("bitmap.dmp", "ranges.dmp"):
        with opened(files, name).memory:
            cpu = opened(files, name).cpus[0]
            assert (cpu.get("cr3"), cpu.get("rip"), cpu.get("rax")) == (0x100000, 0x7654321, 0x1111111122222222)


def test_registers_of_all_windows_processors_are_what_dbgeng_shows(tmp_path: Path) -> None:
    """Two processors out of their KPRCBs: general, control and descriptor-table registers, as Microsoft's debugger engine prints them."""
    path = tmp_path / "kdbg.dmp"
    path.write_bytes(lzma.decompress((DATA / "kdbg.dmp.xz").read_bytes()))
    machine = open_machine(path)
    names = {"efl": "rflags", "gdtr": "gdtr_base", "gdtl": "gdtr_limit", "idtr": "idtr_base", "idtl": "idtr_limit", "tr": "tr_selector",
             "ldtr": "ldtr_selector", **{f"{s}s": f"{s}s_selector" for s in "cdefgs"}}
    with machine.memory as memory:
        shown = (DATA / "kdbg.dbgeng.txt").read_text().split("kd> ~1s")
        assert [cpu.index for cpu in machine.cpus] == [0, 1] and machine.warnings == []
        for cpu, text in zip(machine.cpus, shown):
            pairs = re.findall(r"\b(?!iopl)([a-z]\w{1,3})=([0-9a-f]+)", text.split("kd> d")[0])
            values = {names.get(name, name): int(value, 16) for name, value in pairs}
            assert len(values) == 17 + 1 + 6 + 11
            assert {name: cpu.get(name) for name in values} == values
        assert machine.cpus[0].get("cr2") != machine.cpus[1].get("cr2")
        assert memory.read(0x800000, 8) == struct.pack("<II", 4, 0)
        with pytest.raises(MemoryUnavailable):
            memory.read(0x9F000, 1)


@pytest.mark.parametrize("kind", ["encoded", "absent", "nowhere"])
def test_without_the_debugger_data_block_the_header_remains(tmp_path: Path, kind: str) -> None:
    """KDDEBUGGER_DATA64 can be encoded or missing: then only the header's CONTEXT and CR3 are known, and that is said."""
    content = bytearray(lzma.decompress((DATA / "kdbg.dmp.xz").read_bytes()))
    if kind == "encoded":
        at = content.index(b"KDBG")
        content[at - 16:at + 0x330] = bytes(byte ^ 0x5A for byte in content[at - 16:at + 0x330])
    elif kind == "absent":
        struct.pack_into("<Q", content, 0x80, 0xFFFFF80000FFF000)
    else:
        struct.pack_into("<Q", content, 0x10, 1 << 40)
    path = tmp_path / "kdbg.dmp"
    path.write_bytes(content)
    machine = open_machine(path)
    with machine.memory:
        (cpu,) = machine.cpus
        assert (cpu.get("rdx"), cpu.get("rip"), cpu.get("cr4")) == (0x3333, 0xFFFFF80000001000, None)
        words = "encoded or damaged" if kind == "encoded" else "not in the dump"
        assert any(text.startswith("2 processors") and words in text for text in machine.warnings)


@pytest.mark.parametrize("which", ["exit", "l2"])
def test_amd_fixtures_have_the_registers_of_the_debugger(which: str, request: pytest.FixtureRequest) -> None:
    """The note of the ELF core equals what GDB read from QEMU's stub and the monitor's `info registers` at that stop."""
    truth = request.getfixturevalue(f"amd_{which}_truth")
    machine = open_machine(request.getfixturevalue(f"amd_{which}"))
    with machine.memory:
        (cpu,) = machine.cpus
        check_registers(cpu, truth["stage"]["info_registers"])
        names = {"eflags": "rflags", "k_gs_base": "kernel_gs_base", **{f"{s}s": f"{s}s_selector" for s in "cdefgs"}}
        compared = {names.get(name, name): int(value, 16) for name, value in truth["stage"]["gdb_regs"].items() if name not in ("cr8", "efer")}
        assert {name: cpu.get(name) for name in compared} == compared
        assert machine.memory.read_page(int(truth["stage"]["vmcb_pa"], 16))[:4] != bytes(4)
        assert machine.warnings == []


def test_intel_fixtures_are_raw_ram(intel_plain: Path, intel_nested: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """128 MiB, and the VMCS of VM A begins with the revision identifier that IA32_VMX_BASIC reports."""
    for path in (intel_plain, intel_nested):
        machine = open_machine(path)
        with machine.memory as memory:
            assert (machine.format, memory.ranges(), machine.cpus) == ("raw", [(0, 128 << 20)], [])
    with open_machine(intel_plain).memory as memory:
        assert memory.read_u32(0x6826000) == intel_plain_truth["vmcs_revision_id"] == int(intel_plain_truth["msrs"]["0x480"], 16) & 0x7FFFFFFF


@pytest.mark.parametrize("name", ["makedumpfile-lzo.kdump", "snappy.kdump", "snappy.avml"])
def test_pure_python_decompressors_read_what_compiled_ones_wrote(files: Path, ram: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without python-lzo and python-snappy installed the bytes are the same."""
    monkeypatch.setattr(compression, "_import", lambda name: None)
    with opened(files, name).memory as memory:
        assert memory.read(0x100000, 0x80000) == ram[0x100000:0x180000]
