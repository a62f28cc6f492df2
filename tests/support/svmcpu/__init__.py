"""An SVM processor that runs VMRUN for tests: QEMU's emulation (TCG), with a kernel of 200 lines (`vmrun.S`) that enters one VMCB after another.

Needs qemu-system-x86_64, as and ld.  A batch takes 0.2 s and about 20 us a VMCB.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

from support.live import Unavailable
from vtdbg.svm import fields

WORK = 0x1000000
"""Physical address of the VMCB; everything that it points to is in the pages behind it."""

SOURCE = Path(__file__).parent / "vmrun.S"
CPU = "EPYC,+svm,+npt"
PROGRAMS = ("qemu-system-x86_64", "as", "ld")
IOPM, MSRPM, TABLES, PAE_TABLE, NESTED, CODE, STACK = (WORK + page * 0x1000 for page in (1, 4, 6, 9, 0xA, 0x10, 0x11))
IMAGE_PAGES = 0x12


class Results(NamedTuple):
    """CPUID leaves of the emulated processor, and the EXITCODE of each VMCB as the emulator wrote it."""

    cpuid: Dict[Tuple[int, int], Tuple[int, int, int, int]]
    exit_codes: List[int]


BASE: Mapping[str, int] = {
    "intercept_exceptions": 0xFFFFFFFF, "intercept_misc1": 0xBD4C802F, "intercept_misc2": 0x7FFF, "iopm_base_pa": IOPM, "msrpm_base_pa": MSRPM,
    "asid": 1, "nested_ctl": 1, "nested_cr3": NESTED, "cs.selector": 8, "cs.attrib": 0xA9B, "cs.limit": 0xFFFFFFFF, "ss.selector": 0x10,
    "ss.attrib": 0xC93, "ss.limit": 0xFFFFFFFF, "ds.attrib": 0xC93, "ds.limit": 0xFFFFFFFF, "es.attrib": 0xC93, "es.limit": 0xFFFFFFFF,
    "efer": 0x1D00, "cr0": 0x80010011, "cr3": TABLES, "cr4": 0x620, "dr6": 0xFFFF0FF0, "dr7": 0x400, "rflags": 2, "rip": CODE, "rsp": STACK,
    "g_pat": 0x0007040600070406,
}
"""A guest in 64-bit mode whose first instruction is VMMCALL; everything is intercepted, its memory is a few pages."""

_LINEAR = {"cs.base": CODE, "rip": 0}
MODES: Mapping[str, Mapping[str, int]] = {
    "64-bit": {},
    "compatibility": {"cs.attrib": 0xC9B},
    "PAE": {**_LINEAR, "efer": 0x1800, "cs.attrib": 0xC9B, "cr3": PAE_TABLE},
    "protected, no paging": {**_LINEAR, "efer": 0x1000, "cr0": 0x11, "cr4": 0, "cs.attrib": 0xC9B},
    "real": {**_LINEAR, "efer": 0x1000, "cr0": 0x10, "cr4": 0, "cs.attrib": 0x9B, "ss.attrib": 0x93},
    "paged real": {**_LINEAR, "efer": 0x1800, "cr0": 0x80000010, "cs.attrib": 0x9B, "ss.attrib": 0x93, "cr3": PAE_TABLE},
    "64-bit, own tables": {"nested_ctl": 0},
    "PAE, own tables": {**_LINEAR, "efer": 0x1800, "cs.attrib": 0xC9B, "cr3": PAE_TABLE, "nested_ctl": 0},
}


def pages() -> bytes:
    """What is at WORK: VMCB, maps that intercept everything, the guest's page tables, the nested ones, code."""
    image = bytearray(IMAGE_PAGES * 0x1000)

    def entry(table: int, index: int, value: int) -> None:
        offset = table - WORK + 8 * index
        image[offset:offset + 8] = value.to_bytes(8, "little")

    for name, value in BASE.items():
        row = fields.find(name)
        image[row.offset:row.offset + row.size] = value.to_bytes(row.size, "little")
    image[IOPM - WORK:TABLES - WORK] = b"\xff" * (TABLES - IOPM)
    large = WORK >> 21
    pdpt, directory = TABLES + 0x1000, TABLES + 0x2000
    entry(TABLES, 0, pdpt | 0x27)
    entry(pdpt, 0, directory | 0x27)
    entry(directory, large, WORK | 0xE7)
    entry(PAE_TABLE, 0, directory | 1)
    # Nested: only the guest's tables, code and stack, so that nothing that goes wrong runs far.
    entry(NESTED, 0, NESTED + 0x1027)
    entry(NESTED + 0x1000, 0, NESTED + 0x2027)
    entry(NESTED + 0x2000, large, NESTED + 0x3027)
    for page in (TABLES, pdpt, directory, PAE_TABLE, CODE, STACK):
        entry(NESTED + 0x3000, (page >> 12) & 0x1FF, page | 0x67)
    image[CODE - WORK:STACK - WORK] = (b"\x0f\x01\xd9" * 0x556)[:0x1000]
    return bytes(image)


def version() -> str:
    """"QEMU emulator version 7.2.22 (...)": which implementation the tests compare with."""
    return subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(folder: Path) -> Path:
    """The kernel, assembled into `folder`; Unavailable where a program is missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)}")
    kernel = folder / "vmrun.elf"
    try:
        subprocess.run(["as", "--32", "-o", str(folder / "vmrun.o"), str(SOURCE)], check=True, capture_output=True)
        subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x100000", "-e", "_start", "-o", str(kernel), str(folder / "vmrun.o")],
                       check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{error.cmd[0]}: {error.stderr.decode(errors='replace').strip()}") from error
    return kernel


def run(kernel: Path, cases: Sequence[Mapping[str, int]]) -> Results:
    """VMRUN on `BASE` with each case's fields changed.  AssertionError where the emulator stopped before the last one."""
    folder = kernel.parent
    image = pages()
    module = bytearray(struct.pack("<QQ", WORK, len(image)) + image)
    for case in cases:
        module += struct.pack("<Q", len(case))
        for name, value in case.items():
            row = fields.find(name)
            module += struct.pack("<IIQ", row.offset, row.size, value)
    module += struct.pack("<Q", 2**64 - 1)
    assert len(module) < 0x600000, "the module would reach the host-save area of the kernel"
    (folder / "cases.bin").write_bytes(module)
    output = folder / "out.bin"
    output.unlink(missing_ok=True)
    # One that hangs is told by its number: what was written before it is there.  A hundred times what a batch takes on an idle machine.
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["qemu-system-x86_64", "-M", "pc,accel=tcg", "-cpu", CPU, "-m", "64", "-display", "none", "-nodefaults", "-no-reboot",
                        "-debugcon", f"file:{output}", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel", str(kernel),
                        "-initrd", str(folder / "cases.bin")], timeout=120 + len(cases) / 100, capture_output=True, check=False)
    return _parse(output.read_bytes(), len(cases))


def run_all(kernel: Path, cases: Sequence[Mapping[str, int]], batch: int = 15000) -> Results:
    """`run` in as many goes as it takes."""
    parts = [run(kernel, cases[start:start + batch]) for start in range(0, len(cases), batch)]
    return Results(parts[0].cpuid, [code for part in parts for code in part.exit_codes])


def survives(case: Mapping[str, int]) -> bool:
    """Can the emulator leave this guest?  Out of a guest with EFER.LME = 1, CR0.PG = 0 and CR4.PAE = 0 QEMU 7.2 does not restore the host's CR0.

    #VMEXIT writes CR0 with the guest's EFER and CR4 still in place, which looks like an illegal change to long mode and is dropped
    (target/i386/helper.c, cpu_x86_update_cr0); the next VMRUN then never ends.
    """
    efer, cr0, cr4 = (case.get(name, BASE[name]) for name in ("efer", "cr0", "cr4"))
    return not (efer >> 8 & 1 and not cr0 >> 31 & 1 and not cr4 >> 5 & 1)


def _parse(output: bytes, count: int) -> Results:
    cpuid: Dict[Tuple[int, int], Tuple[int, int, int, int]] = {}
    at = 0
    while True:
        leaf, subleaf, *registers = struct.unpack_from("<6I", output, at)
        at += 24
        if leaf == 0xFFFFFFFF:
            break
        cpuid[leaf, subleaf] = (registers[0], registers[1], registers[2], registers[3])
    done = (len(output) - at) // 8
    assert output[-4:] == b"END!" and done == count, f"the emulator stopped at case {done} of {count}"
    return Results(cpuid, [number for number, in struct.iter_unpack("<Q", output[at:at + 8 * count])])
