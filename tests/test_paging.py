"""x86 paging: page faults against a processor model in three modes, the rules of access, and hosts' own tables."""

from __future__ import annotations

import struct
from random import Random
from typing import Any, Dict, List, Optional, Tuple

import pytest
from support.tables import G1, K4, M2, TableBuilder
from support.vmxcpu import Case, Worker
from support.vmxcpu.places import FREE, PAE_PDPT, PD, PD32, PDPT

import vtdbg
from vtdbg.memory.views import LinearMemory
from vtdbg.walk import Access
from vtdbg.x86.paging import Paging, canonical, mode_named

XD = 1 << 63
TARGET = FREE + 3 * K4
READ, WRITE, FETCH = b"\x8a\x07\xf4", b"\x88\x07\xf4", b"\xff\xe7"
STUBS = {"r": READ, "w": WRITE, "x": FETCH}


# ---- against a processor model ------------------------------------------------------------------------------------------------------

def _entry(random: Random, target: int, rights: List[int], reserved: List[int]) -> int:
    """An entry for `target` with A and D set; sometimes without a right, sometimes with a bit that it should not have."""
    entry = target | 0x60 | random.choice(rights)
    if reserved and random.random() < 0.1:
        entry |= 1 << random.choice(reserved)
    return entry


def _plan(random: Random, mode: str) -> Tuple[Dict[int, bytes], int]:
    """(memory, linear address): a page of 4 KiB, 2 MiB, 4 MiB or 1 GiB whose entries are random."""
    rights = [7, 7, 7, 3, 5, 1, 6]
    nx = rights + [7 | XD, 5 | XD]
    page = TARGET >> 12
    if mode == "32-bit":
        # PDE 256, at linear 1 GiB.
        linear, at, width = 1 << 30, PD32 + 4 * 256, 4
        if random.random() < 0.4:
            return {at: struct.pack("<I", _entry(random, 0x80, rights, [12, 21, 21]))}, linear
        return {at: struct.pack("<I", _entry(random, FREE, rights, [8, 9])),
                FREE + width * page: struct.pack("<I", _entry(random, TARGET, rights, [7, 8]))}, linear
    if mode == "PAE":
        linear, top = 1 << 30, {PAE_PDPT + 8: struct.pack("<Q", FREE | 1)}
    else:
        linear, top = 1 << 30, {PDPT + 8: struct.pack("<Q", _entry(random, FREE, nx, [40, 45, 51, 9, 52]))}
        if random.random() < 0.2:
            return {PDPT + 8: struct.pack("<Q", _entry(random, 0x80, nx, [12, 13, 29, 40, 51, 55]))}, linear
    reserved = [40, 51] + ([52, 57, 62] if mode == "PAE" else [55])
    if random.random() < 0.4:
        return {**top, FREE: struct.pack("<Q", _entry(random, 0x80, nx, [12, 13, 20, *reserved]))}, linear
    return {**top, FREE: struct.pack("<Q", _entry(random, FREE + K4, nx, reserved)),
            FREE + K4 + 8 * page: struct.pack("<Q", _entry(random, TARGET, nx, reserved))}, linear


@pytest.mark.parametrize("mode", ["64-bit", "PAE", "32-bit"])
def test_page_faults_and_their_error_codes_are_a_processor_models(mode: str, vmx_worker: Worker) -> None:
    """Random tables, CR0.WP, CR4.SMEP and SMAP, EFER.NXE; reads, writes and fetches of supervisor mode: does it fault, and with which code?"""
    random = Random(mode)
    plans, cases = [], []
    for _ in range(1500):
        memory, linear = _plan(random, mode)
        # The guest's own code is in the first page of its tables: a supervisor page, so that SMEP and SMAP leave it alone.
        memory = {**memory, TARGET: b"\xf4" * K4, PD: struct.pack("<Q", 0xE3), PD32: struct.pack("<I", 0xE3)}
        access = random.choice("rrwwx")
        values = vmx_worker.baseline(mode)
        values[0x6800] = values[0x6800] & ~(1 << 16) | random.choice([0, 1 << 16])
        values[0x6804] |= random.choice([0, 0, 1 << 20, 1 << 21, 3 << 20])
        nxe = random.choice([0, 1 << 11]) if mode == "64-bit" else 0
        if mode == "64-bit":
            values[0x2806] = values[0x2806] & ~(1 << 11) | nxe
        paging = Paging.from_registers(values[0x6800], values[0x6802], values[0x6804], values.get(0x2806, 0), width=vmx_worker.physical_address_width)
        address = linear + TARGET + 0x800
        plans.append((memory, paging, access, address))
        cases.append(Case(values, code=STUBS[access], memory=memory, registers={"rdi": address}, fields=(0x4402, 0x4404, 0x4406, 0x6400)))
    tally: Dict[str, int] = {}
    for (memory, paging, access, address), outcome in zip(plans, vmx_worker.launch_many(cases)):
        image = bytearray(vmx_worker.memory)
        for at, data in memory.items():
            image[at:at + len(data)] = data
        attempt = Access(access == "r", access == "w", access == "x", user=False, ac=False)
        walk = paging.walk(vtdbg.memory_from_segments([(0, bytes(image))]), address, attempt)
        text = f"{mode} {paging.wp} {paging.nxe} {paging.smep} {paging.smap} {access} {[(step.name, hex(step.entry or 0)) for step in walk.steps]}"
        assert outcome.kind == "exit", text
        tally[walk.outcome] = tally.get(walk.outcome, 0) + 1
        if walk.outcome == "mapped":
            assert outcome.number == 12, f"{text}: we say mapped, the processor {outcome.number} {outcome.fields}"
            continue
        information = outcome.fields[0x4404]
        assert outcome.number == 0 and information is not None and information & 0xFF == 14, f"{text}: {walk.outcome} {walk.reason}"
        assert outcome.fields[0x6400] == address
        assert outcome.fields[0x4406] == walk.qualification, f"{text}: {outcome.fields[0x4406]:#x}, we say {walk.qualification:#x}: {walk.reason}"
    assert all(tally.get(word, 0) > 20 for word in ("mapped", "violation", "misconfiguration")), tally


# ---- the rules ----------------------------------------------------------------------------------------------------------------------

def one_page(leaf: int, size: int = K4, table: int = 7, address: int = 0x40000000, top: int = 4) -> Tuple[vtdbg.PhysicalMemory, int]:
    builder = TableBuilder(top=top, rights=7 | XD, inverse=XD)
    at, _ = builder.entry_address(address, {K4: 1, M2: 2, G1: 3}[size], table)
    builder.set(at, leaf)
    return builder.memory(), builder.root


def bits(**known: Any) -> Dict[str, Any]:
    return {"wp": True, "nxe": True, "smep": False, "smap": False, "pke": False, "pks": False, "width": 48, **known}


USER, SUPERVISOR = {"user": True}, {"user": False}


@pytest.mark.parametrize("leaf, access, known, code", [
    (0x1007, Access(read=True, **USER), bits(), None), (0x1003, Access(read=True, **USER), bits(), 0b00101),
    (0x1005, Access(write=True, **USER), bits(), 0b00111), (0x1005, Access(write=True, **SUPERVISOR), bits(), 0b00011),
    (0x1005, Access(write=True, **SUPERVISOR), bits(wp=False), None), (0x1005, Access(write=True, **USER), bits(wp=False), 0b00111),
    (0x1007 | XD, Access(fetch=True, **USER), bits(), 0b10101), (0x1007 | XD, Access(read=True, **USER), bits(), None),
    (0x1007 | XD, Access(read=True, **USER), bits(nxe=False), 0b01101),
    (0x1007, Access(fetch=True, **SUPERVISOR), bits(smep=True), 0b10001), (0x1007, Access(fetch=True, **SUPERVISOR), bits(), None),
    (0x1007, Access(fetch=True, **SUPERVISOR), bits(smep=True, nxe=False), 0b10001),
    (0, Access(fetch=True, **SUPERVISOR), bits(nxe=False), 0), (0, Access(fetch=True, **SUPERVISOR), bits(), 0b10000),
    (0x1007, Access(read=True, **SUPERVISOR), bits(smap=True), 0b00001), (0x1007, Access(read=True, ac=True, **SUPERVISOR), bits(smap=True), None),
    (0x1007, Access(read=True, ac=True, implicit=True), bits(smap=True), 0b00001),
    (0x1003, Access(read=True, **SUPERVISOR), bits(smap=True, smep=True), None),
    (0x1003, Access(read=True, implicit=True, **USER), bits(), None),
    (0, Access(write=True, **USER), bits(), 0b00110), (0x1006, Access(read=True, **SUPERVISOR), bits(), 0),
    (0x1007 | 5 << 59, Access(read=True, **USER), bits(pke=True, pkru=1 << 10), 0b100101),
    (0x1007 | 5 << 59, Access(write=True, **USER), bits(pke=True, pkru=2 << 10), 0b100111),
    (0x1007 | 5 << 59, Access(read=True, **USER), bits(pke=True, pkru=2 << 10), None),
    (0x1007 | 5 << 59, Access(fetch=True, **USER), bits(pke=True, pkru=3 << 10), None),
    (0x1007 | 5 << 59, Access(write=True, **SUPERVISOR), bits(pke=True, pkru=2 << 10, wp=False), None),
    (0x1003 | 5 << 59, Access(read=True, **SUPERVISOR), bits(pke=True, pkru=1 << 10), None),
    (0x1003 | 5 << 59, Access(read=True, **SUPERVISOR), bits(pks=True, pkrs=1 << 10), 0b100001),
    (0x1005 | 0x40, Access(write=True, shadow_stack=True, **USER), bits(), None),
    (0x1007 | 0x40, Access(write=True, shadow_stack=True, **USER), bits(), 0b1000111),
    (0x1005, Access(read=True, shadow_stack=True, **USER), bits(), 0b1000101),
    (0x1001 | 0x40, Access(read=True, shadow_stack=True, **USER), bits(), 0b1000101),
])
def test_access_rights(leaf: int, access: Access, known: Dict[str, Any], code: Optional[int]) -> None:
    """SDM vol. 3, Determination of Access Rights; Protection Keys; Shadow-Stack Accesses; Page-Fault Exceptions."""
    memory, root = one_page(leaf)
    walk = Paging("4-level", root, **known).walk(memory, 0x40000000, access)
    assert walk.qualification == code, walk.reason
    assert walk.mapped == (code is None) and not any("CR" in text for text in walk.assumptions)


def test_unknown_registers_are_said_where_they_matter() -> None:
    memory, root = one_page(0x1007)
    walk = Paging.named("4-level", root).walk(memory, 0x40000000, "x")
    assert walk.mapped and {"CR4.SMEP unknown: 0 taken", "privilege of the access unknown: supervisor taken"} <= set(walk.assumptions)
    assert "CR0.WP unknown: 1 taken" not in walk.assumptions
    memory, root = one_page(0x1005)
    assert "CR0.WP unknown: 1 taken" in Paging.named("4-level", root).walk(memory, 0x40000000, "w").assumptions


@pytest.mark.parametrize("level, bit, wrong", [(4, 7, True), (4, 8, False), (4, 11, False), (3, 9, False), (4, 52, False), (2, 62, False),
                                               (3, 51, True), (3, 48, True)])
def test_reserved_bits_of_table_entries(level: int, bit: int, wrong: bool) -> None:
    builder = TableBuilder(rights=7)
    builder.map(0, 0x1000, K4, 7, 7)
    at, _ = builder.entry_address(0, level)
    entry = builder.get(at) | 1 << bit
    builder.set(at, entry)
    walk = Paging("4-level", builder.root, **bits()).walk(builder.memory(), 0, "r")
    assert (walk.outcome == "misconfiguration") == wrong
    assert not wrong or walk.qualification == 0b1001


@pytest.mark.parametrize("address, width, good", [
    (0, 48, True), (0x7FFFFFFFFFFF, 48, True), (0x800000000000, 48, False), (0xFFFF7FFFFFFFFFFF, 48, False), (0xFFFF800000000000, 48, True),
    ((1 << 64) - 1, 48, True), (0x800000000000, 57, True), (0xFFFFFFFFFFFFFF, 57, True), (1 << 56, 57, False), (0xFF00000000000000, 57, True)])
def test_canonical_addresses(address: int, width: int, good: bool) -> None:
    assert canonical(address, width) == good
    walk = Paging.named("4-level" if width == 48 else "5-level", 0).walk(vtdbg.memory_from_segments([(0, bytes(K4))]), address, "r")
    assert ("canonical" in walk.reason) == (not good) and (walk.qualification is None) == (not good)


def test_32_bit_paging_with_4_mib_pages_beyond_4_gib() -> None:
    """PSE-36: bits 20:13 of the PDE are address bits 39:32; a processor with fewer address bits reserves the upper ones."""
    directory = struct.pack("<4I", 0x00400087 | 0x25 << 13, 0x2007, 0, 0x80000001) + bytes(K4 - 16)
    table = struct.pack("<2I", 0x9007, 0xA005) + bytes(K4 - 8)
    memory = vtdbg.memory_from_segments([(0x1000, directory), (0x2000, table)])
    paging = Paging("32-bit", 0x1018, wp=True, pse=True, width=40)
    assert paging.walk(memory, 0x12345).hpa == 0x25_0041_2345 and paging.walk(memory, 0x12345).page_size == 1 << 22
    assert Paging("32-bit", 0x1000, pse=True, width=37).walk(memory, 0x12345).outcome == "misconfiguration"
    assert Paging("32-bit", 0x1000, pse=True, width=38).walk(memory, 0x12345).mapped
    assert paging.walk(memory, 0x401234, "w").hpa == 0xA234 or paging.walk(memory, 0x401234, "w").outcome == "violation"
    assert paging.walk(memory, 0x400234, "user w").permissions == "rwxu"
    assert paging.walk(memory, 0x401234, "w").qualification == 0b011
    assert paging.walk(memory, 0x800000, "r").qualification == 0
    assert "32 bits" in paging.walk(memory, 1 << 32).reason
    assert Paging("32-bit", 0x1000, pse=False).walk(memory, 0).steps[0].table.id == "pde32", "PS is ignored without CR4.PSE"


def test_pae_entries_out_of_memory_and_out_of_registers() -> None:
    directory = struct.pack("<Q", 0x200083) + bytes(K4 - 8)
    memory = vtdbg.memory_from_segments([(0x1020, struct.pack("<4Q", 0x5001, 0, 0x4001, 0)), (0x4000, directory), (0x5000, bytes(K4))])
    paging = Paging.from_registers(0x80000001, 0x1020, 0x20, 0)
    assert paging.mode == "PAE" and paging.root == 0x1020
    assert paging.walk(memory, 0x80001234).hpa == 0x201234
    registers = Paging.from_registers(0x80000001, 0x1020, 0x20, 0, pdptes=(0x4001, 0, 0, 0))
    walk = registers.walk(memory, 0x1234)
    assert walk.hpa == 0x201234 and walk.steps[0].address is None and walk.steps[0].place == "PDPTE0"
    assert registers.walk(memory, 0x80001234).outcome == "violation" and "PDPTE2" in registers.walk(memory, 0x80001234).reason
    assert LinearMemory(memory, registers).ranges() == []
    [row] = vtdbg_ranges(memory, registers)
    assert (row.start, row.target, row.permissions) == (0, 0x200000, "rwx-")


def vtdbg_ranges(memory: vtdbg.PhysicalMemory, paging: Paging) -> List[Any]:
    from vtdbg.enumeration import ranges

    return list(ranges(memory, paging))


@pytest.mark.parametrize("cr0, cr4, efer, mode", [
    (0, 0, 0, "none"), (0x80000001, 0, 0, "32-bit"), (0x80000001, 0x20, 0, "PAE"), (0x80000001, 0x20, 0x500, "4-level"),
    (0x80000001, 0x1020, 0x500, "5-level"), (0x80000001, 0x1020, 0x100, "PAE")])
def test_modes_out_of_registers(cr0: int, cr4: int, efer: int, mode: str) -> None:
    paging = Paging.from_registers(cr0, 0x1000, cr4, efer)
    assert paging.mode == mode and not paging.unknown


def test_modes_out_of_too_few_registers_say_what_was_taken() -> None:
    assert len(Paging.from_registers(None, 0, None, None).unknown) == 3
    assert Paging.from_registers(0x80000001, 0, 0, None).mode == "32-bit" and not Paging.from_registers(0x80000001, 0, 0, None).unknown
    assert Paging.from_registers(0x80000001, 0, 0x20, None).unknown == ("IA32_EFER.LMA unknown: long mode taken",)
    assert not Paging.from_registers(0x80000001, 0, 0x20, None, long_mode=True).unknown


def test_paging_of_a_vmcs() -> None:
    """EFER is in force only with "load IA32_EFER"; otherwise "IA-32e mode guest" says whether the guest is in long mode."""
    base = {"GUEST_CR0": 0x80050033, "GUEST_CR3": 0x1000, "GUEST_CR4": 0x6E0, "GUEST_IA32_EFER": 0, "VM_ENTRY_CONTROLS": 0x51FF | 1 << 9}
    paging = Paging.from_vmcs(vtdbg.Vmcs.from_values(base))
    assert (paging.mode, paging.nxe, paging.wp) == ("4-level", None, True)
    loaded = Paging.from_vmcs(vtdbg.Vmcs.from_values({**base, "GUEST_IA32_EFER": 0xD01, "VM_ENTRY_CONTROLS": base["VM_ENTRY_CONTROLS"] | 1 << 15}))
    assert (loaded.mode, loaded.nxe) == ("4-level", True)
    pae = {**base, "VM_ENTRY_CONTROLS": 0x11FF, "CPU_BASED_VM_EXEC_CONTROL": 1 << 31, "SECONDARY_VM_EXEC_CONTROL": 2,
           "GUEST_PDPTR0": 0x4001, "GUEST_PDPTR1": 0, "GUEST_PDPTR2": 0, "GUEST_PDPTR3": 0}
    assert Paging.from_vmcs(vtdbg.Vmcs.from_values(pae)).pdptes == (0x4001, 0, 0, 0)
    assert Paging.from_vmcs(vtdbg.Vmcs.from_values({**pae, "SECONDARY_VM_EXEC_CONTROL": 0})).pdptes is None
    with pytest.raises(vtdbg.VtdbgError, match="GUEST_CR3"):
        Paging.from_vmcs(vtdbg.Vmcs.from_values({"GUEST_RIP": 0}))


def test_hlat_paging_translates_until_an_entry_says_restart() -> None:
    """Addresses whose upper bits are all 1 go through the HLAT tables; bit 11 (R) of a present entry there leads back to CR3's."""
    upper = 0xFFFF800000000000
    builder = TableBuilder(rights=7)
    builder.map(upper & (1 << 48) - 1, 0x7000, K4, 7, 7)
    builder.map(upper + K4 & (1 << 48) - 1, 0x8000, K4, 0x805, 7)
    hlat = builder.root
    ordinary = TableBuilder(base=0x80000, rights=7)
    ordinary.map(upper + K4 & (1 << 48) - 1, 0x9000, K4, 7, 7)
    ordinary.map(0x1000, 0xA000, K4, 0x807, 7)
    memory = vtdbg.memory_from_segments([(at, bytes(page)) for tables in (builder, ordinary) for at, page in tables.pages.items()])
    paging = Paging("4-level", ordinary.root, wp=True, nxe=True, hlatp=hlat, hlat_prefix=1)
    walk = paging.walk(memory, upper, "r")
    assert (walk.hpa, walk.structure) == (0x7000, "HLAT, 4-level paging")
    walk = paging.walk(memory, upper + K4, "r")
    assert (walk.hpa, walk.structure) == (0x9000, "4-level paging") and "restart" in walk.notes[0]
    assert paging.walk(memory, 0x1000).hpa == 0xA000, "bit 11 is ignored by ordinary paging, and the lower half is not HLAT's"
    assert paging.walk(memory, upper + 2 * K4, "user w").qualification == 1 << 7 | 0b110
    controls = {"CPU_BASED_VM_EXEC_CONTROL": 1 << 17, "TERTIARY_VM_EXEC_CONTROL": 2, "HLATP": hlat, "HLAT_PREFIX_SIZE": 1, "GUEST_CR0": 0x80050033,
                "GUEST_CR3": ordinary.root, "GUEST_CR4": 0x6E0, "VM_ENTRY_CONTROLS": 1 << 9}
    assert Paging.from_vmcs(vtdbg.Vmcs.from_values(controls)).walk(memory, upper).hpa == 0x7000


@pytest.mark.parametrize("name, mode", [("4-level", "4-level"), ("4level", "4-level"), ("LONG", "4-level"), ("pae", "PAE"), ("la57", "5-level"),
                                        ("32bit", "32-bit"), ("legacy", "32-bit"), ("off", "none")])
def test_modes_by_name(name: str, mode: str) -> None:
    assert mode_named(name) == mode


def test_a_mode_that_nobody_knows_suggests_one() -> None:
    with pytest.raises(vtdbg.VtdbgError, match="4-level"):
        mode_named("4-levels")


# ---- a kernel's own tables ----------------------------------------------------------------------------------------------------------

def test_a_kernels_addresses_go_where_its_symbols_and_its_walker_say(amd_exit: Any, amd_exit_truth: Dict[str, Any]) -> None:
    """Linux' own tables through CR3 of the dump's CPU state: the direct map, the kernel's text and modules, its stack."""
    machine = vtdbg.open(str(amd_exit))
    for linear, physical in amd_exit_truth["l1_va_to_pa"].items():
        found = vtdbg.translate(machine, int(linear, 16))
        assert found.hpa == int(physical, 16), linear
        assert found.final is None and found.gpa == found.hpa and found.dimension is None
    assert found.guest.structure == "4-level paging" and not any("level" in text for text in found.assumptions), "the mode is CPU 0's"


def test_linear_memory_reads_what_the_processor_would(amd_exit: Any, amd_exit_truth: Dict[str, Any]) -> None:
    machine = vtdbg.open(str(amd_exit))
    registers = machine.cpus[0].registers
    linear = LinearMemory(machine.memory, Paging.from_registers(registers["cr0"], registers["cr3"] or 0, registers["cr4"], None))
    rip = int(amd_exit_truth["stage"]["gdb_regs"]["rip"], 16)
    assert linear.read(rip - 3, 3) == b"\x0f\x01\xd8", "VMRUN is the instruction before the one it stopped at"
    with pytest.raises(vtdbg.MemoryUnavailable) as error:
        linear.read(0x800000000000, 8)
    assert error.value.space == "linear" and "canonical" in str(error.value)
