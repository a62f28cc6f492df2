"""Who runs whom: the tree of hypervisors, VMs and nested hypervisors, compared with what the hypervisor's kernel and its guests said."""

from __future__ import annotations

import json
import lzma
import struct
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from support.work import processor_time

from vtdbg.commands.run import run_words
from vtdbg.commands.select import NESTED_ADDRESSES
from vtdbg.commands.session import Session
from vtdbg.enumeration import Enumeration
from vtdbg.hierarchy import Hierarchy, Hypervisor, KvmPair, hierarchy
from vtdbg.machine import Machine
from vtdbg.memory.base import PhysicalMemory, memory_from_segments
from vtdbg.memory.open import open_machine
from vtdbg.render.text import render_text
from vtdbg.scanner import Found, relate, scan
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm.npt import Npt
from vtdbg.vmx import layouts
from vtdbg.vmx.find import Budget
from vtdbg.vmx.kvm_nested import nested_records
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86.mode import mode_name

VM_A = 0x6826000


def tree_of(machine: "Machine | PhysicalMemory") -> Hierarchy:
    return hierarchy(machine, relate(scan(machine), machine))


def command(words: str, session: Session) -> str:
    outcome = run_words(words.split(), session, lambda report, _options: render_text(report, 80))
    assert not outcome.error, outcome.error
    return outcome.text


# --- real memory ------------------------------------------------------------------------------------------------------------------


def test_one_hypervisor_with_a_vm_for_each_ept(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM returns to vmx_vmexit on every exit, and both VMs belong to one process."""
    tree = tree_of(open_machine(intel_plain))
    kvm, = tree.hypervisors
    assert kvm.identity == int(intel_plain_truth["symbols"]["vmx_vmexit"], 16) and kvm.level == 0 and len(kvm.cr3s) == 1
    assert [block.address for vm in kvm.vms for block in vm.blocks] == [VM_A, int(intel_plain_truth["vms"]["B"]["vmcs_pa"], 16)]
    assert [block.mode for vm in kvm.vms for block in vm.blocks] == ["64-bit", "64-bit"]
    assert [page.address for page in kvm.pages] == [0x6692000] and not tree.rest and not tree.notes


def test_the_nested_hypervisor_is_in_the_vm_that_runs_it(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """vmcs01 with its shadow VMCS; in its guest a hypervisor whose flushed vmcs12 is at 0x31000 and ran with vmcs02; the page of the current
    vmcs12 at 0x32000 is stale, its values are in KVM's cached vmcs12."""
    truth = intel_nested_truth["nested"]
    at = {name: int(words.split()[0], 16) for name, words in truth["found"].items()}
    pages = {int(gpa, 16): int(hpa, 16) for gpa, hpa in truth["gpa_to_hpa"].items()}
    tree = tree_of(open_machine(intel_nested))
    kvm, = tree.hypervisors
    assert not tree.rest and len(kvm.vms) == 3
    vm, = [vm for vm in kvm.vms if vm.hypervisors or vm.pages]
    vmcs01, = vm.blocks
    current = int(truth["current_vmcs12_gpa"].split()[0], 16)
    assert vmcs01.address == at["vmcs01"] and vmcs01.shadow is not None and vmcs01.shadow.address == at["shadow_vmcs"]
    assert vmcs01.shadow_of == current
    inner, = vm.hypervisors
    assert inner.level == 1
    nested, = inner.vms
    vmcs12, = nested.blocks
    assert (vmcs12.address, vmcs12.found.address) == (int(truth["flushed_vmcs12_gpa"], 16), pages[0x31000])
    assert [helper.address for helper in vmcs12.ran_with] == [at["vmcs02"]]
    stale, = [page for page in vm.pages if page.address == current]
    assert stale.found.address == pages[current] and stale.copy is not None and stale.copy.address == at["cached_vmcs12"]
    assert stale.copy.vmcs is not None and stale.copy.vmcs["GUEST_RIP"] == 0x1122334455667788
    vmxon, = [page for page in vm.pages if page.address == int(truth["vmxon_gpa"], 16)]
    assert vmxon.what.startswith("VMXON region") and vmxon.found.address == pages[vmxon.address]


def test_an_l2_address_goes_through_l1_to_the_scanned_memory(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """The nested hypervisor uses no EPT: an L2 address is an L1 address, and pagemap says where those are."""
    kvm, = tree_of(open_machine(intel_nested)).hypervisors
    nested, = [inner for vm in kvm.vms for item in vm.hypervisors for inner in item.vms]
    for gpa, hpa in intel_nested_truth["nested"]["gpa_to_hpa"].items():
        assert nested.steps_down(int(gpa, 16)) == [int(gpa, 16), int(gpa, 16), int(hpa, 16)]
    assert nested.steps_down(0x7FFF0000) == [0x7FFF0000, 0x7FFF0000, None]


def test_svm_by_its_io_bitmap_and_nested_tables(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    tree = tree_of(open_machine(amd_exit))
    kvm, = tree.hypervisors
    vm, = kvm.vms
    assert kvm.kind == "vmcb" and [block.address for block in vm.blocks] == [int(amd_exit_truth["vmcb_pa"], 16)]
    assert [page.address for page in kvm.pages] == [int(amd_exit_truth["vm_hsave_pa"], 16)] and vm.blocks[0].mode == "64-bit"


def test_the_commands_show_the_tree_and_nest_the_json(intel_nested: Path) -> None:
    session = Session(str(intel_nested))
    words = command("source scan", session)
    assert "its CR3: L2 0x1000 -> L1 0x1000 -> L0 0x7ee7000" in words
    assert "\n    hypervisor inside: VT-x" in words
    data = json.loads(command("source scan --json", session))
    inner = data["hypervisors"][0]["vms"][2]["hypervisors"][0]["vms"][0]["processors"][0]
    assert inner["address"] == "0x31000" and inner["ran_with"] == ["0x6ba1000"] and inner["cr3_down"] == ["0x1000", "0x1000", "0x7ee7000"]
    # vmcs02 is no VM of its own.
    rows = json.loads(command("vmcs list --json", session))["vms"]
    assert [(row["tags"], row["blocks"]) for row in rows] == [(["0x1"], ["0x65e9000"]), (["0x2"], ["0x6ac4000"]), (["0x3"], ["0x6b53000"])]
    session.close()


# --- made memory: real EPT12, loops, lies -------------------------------------------------------------------------------------------


class Ram:
    """Pages by address."""

    def __init__(self) -> None:
        self.pages: Dict[int, bytearray] = {}

    def page(self, address: int) -> bytearray:
        return self.pages.setdefault(address, bytearray(4096))

    def put(self, address: int, data: bytes) -> None:
        self.page(address & -4096)[address & 4095:(address & 4095) + len(data)] = data

    def map(self, root: int, pages: Dict[int, int], host: "Dict[int, int] | None" = None) -> None:
        """EPT tables at root (+0x1000, ...) that map guest pages below 2 MiB; `host` says where a table's address is in this memory."""
        where = (lambda address: address) if host is None else (lambda address: host[address])
        for level in range(3):
            self.put(where(root + 0x1000 * level), struct.pack("<Q", root + 0x1000 * (level + 1) | 7))
        for gpa, target in pages.items():
            self.put(where(root + 0x3000) + (gpa >> 12) * 8, struct.pack("<Q", target | 0x37))

    @property
    def memory(self) -> PhysicalMemory:
        return memory_from_segments([(address, bytes(data)) for address, data in self.pages.items()])


@pytest.fixture(scope="module")
def values(intel_plain: Path) -> Dict[int, int]:
    with open_machine(intel_plain).memory as memory:
        return {field.encoding: value.value for value in Vmcs.from_page(memory.read_page(VM_A)).values() for field in [value.field]}


def vmcs_page(values: Dict[int, int], eptp: int, host_rip: int = 0xFFFFFFFF81000000) -> bytes:
    return layouts.layout("bochs_2.7").write_page({**values, 0x201A: eptp, 0x6C16: host_rip, 0x2800: (1 << 64) - 1})


def shape(hypervisors: List[Hypervisor]) -> List[Tuple[int, List[Tuple[List[int], Any]]]]:
    """(host RIP, [(addresses of its control blocks, the same of the hypervisors inside)])"""
    return [(item.identity or 0, [([block.address for block in vm.blocks], shape(vm.hypervisors)) for vm in item.vms]) for item in hypervisors]


def three_levels(values: Dict[int, int]) -> Ram:
    """L0 runs L1, whose VMCS at guest-physical 0x5000 has an EPT of its own for L2, in whose memory is the VMCS of an L3 at 0x7000."""
    ram = Ram()
    ram.put(0x100000, vmcs_page(values, 0x200000 | 0x1E))
    l1 = {0x5000: 0x300000, 0x7000: 0x310000, **{0x20000 + 0x1000 * n: 0x320000 + 0x1000 * n for n in range(4)}, 0x9000: 0x340000}
    ram.map(0x200000, l1)
    ram.put(0x300000, vmcs_page(values, 0x20000 | 0x1E, 0xFFFF800000000100))
    # L2's 0x7000 is L1's 0x9000, which is 0x340000.
    ram.map(0x20000, {0x7000: 0x9000}, l1)
    ram.put(0x340000, vmcs_page(values, 0x66000 | 0x1E, 0xFFFF900000000200))
    return ram


def test_each_level_is_found_through_the_tables_of_the_level_below(values: Dict[int, int]) -> None:
    tree = tree_of(three_levels(values).memory)
    assert shape(tree.hypervisors) == [
        (0xFFFFFFFF81000000, [([0x100000], [
            (0xFFFF800000000100, [([0x5000], [
                (0xFFFF900000000200, [([0x7000], [])])])])])])]
    vm = tree.hypervisors[0].vms[0].hypervisors[0].vms[0]
    assert vm.steps_down(0x7000) == [0x7000, 0x9000, 0x340000]
    assert vm.memory.read(0x7000, 4) == bytes(three_levels(values).pages[0x340000][:4])


def test_two_processors_of_one_vm_are_one_vm(values: Dict[int, int]) -> None:
    ram = Ram()
    for at in (0x100000, 0x101000):
        ram.put(at, vmcs_page(values, 0x200000 | 0x1E))
    ram.put(0x102000, vmcs_page(values, 0x210000 | 0x1E))
    ram.map(0x200000, {})
    assert shape(tree_of(ram.memory).hypervisors) == [(0xFFFFFFFF81000000, [([0x100000, 0x101000], []), ([0x102000], [])])]


def test_a_guest_that_can_see_its_own_vmcs_is_not_its_own_hypervisor(values: Dict[int, int]) -> None:
    """A hypervisor under a running system often maps all memory, itself included: then the tables prove no nesting."""
    ram = Ram()
    ram.put(0x100000, vmcs_page(values, 0x200000 | 0x1E))
    ram.put(0x101000, vmcs_page(values, 0x210000 | 0x1E))
    ram.map(0x200000, {0x1000: 0x100000, 0x2000: 0x101000})
    ram.map(0x210000, {0x1000: 0x100000, 0x2000: 0x101000})
    tree = tree_of(ram.memory)
    assert shape(tree.hypervisors) == [(0xFFFFFFFF81000000, [([0x100000], []), ([0x101000], [])])]
    assert [vm.maps_itself for vm in tree.hypervisors[0].vms] == [True, True]


@pytest.mark.parametrize("length", [2, 3, 5])
def test_vms_that_contain_each_other_are_shown_side_by_side(values: Dict[int, int], length: int) -> None:
    """Each EPT maps the next VM's VMCS, the last one the first: nobody is inside anybody."""
    ram = Ram()
    for number in range(length):
        ram.put(0x100000 + 0x1000 * number, vmcs_page(values, 0x200000 + 0x10000 * number | 0x1E))
        ram.map(0x200000 + 0x10000 * number, {0x1000: 0x100000 + 0x1000 * ((number + 1) % length)})
    tree = tree_of(ram.memory)
    assert sorted(block.address for vm in tree.hypervisors[0].vms for block in vm.blocks) == [0x100000 + 0x1000 * n for n in range(length)]


def test_an_ept_of_which_every_entry_is_itself_ends(values: Dict[int, int]) -> None:
    ram = Ram()
    ram.put(0x100000, vmcs_page(values, 0x200000 | 0x1E))
    ram.put(0x200000, struct.pack("<Q", 0x200037 & ~0x30) * 512)
    ram.put(0x101000, vmcs_page(values, 0x300000 | 0x1E))
    with processor_time(60):
        assert len(tree_of(ram.memory).hypervisors[0].vms) == 2


def test_memory_full_of_vmcss_is_bounded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page is taken for a VMCS, whose EPT is another page of tables that all point on: a lie of this size is cut, and said."""
    monkeypatch.setattr("vtdbg.hierarchy.BLOCK_LIMIT", 500)
    count = 550
    memory = memory_from_segments([(0, b"".join(struct.pack("<Q", number * 4096 + 0x1007) * 512 for number in range(count)))])
    vmcs = [Vmcs.from_values({0x201A: number * 4096 | 0x1E, 0x6C16: 0x1000, 0x401E: 2, 0x4002: 1 << 31}) for number in range(count)]
    found = [Found("vmcs", number * 4096, "vmcs", 100, vmcs=vmcs[number]) for number in range(count)]
    with processor_time(120):
        tree = hierarchy(memory, found)
    assert any("50 of" in note for note in tree.notes) and len(tree.rest) >= 50


# --- KVM's record -------------------------------------------------------------------------------------------------------------------


def test_a_record_counts_only_where_an_address_that_can_be_meant_stands_before_the_pointer() -> None:
    pointer = 0xFFFF9A0000000000 | 0x6530000
    good = struct.pack("<QQQQ", 0x30000, 1, 0x32000, pointer)
    for words, expected in ((good, (0x32000, 0x30000)), (struct.pack("<QQQQ", 5, 1, 0x32000, pointer), (0x32000, None)),
                            (struct.pack("<QQQQ", 0x30000, 1, 0x33000, pointer), None), (struct.pack("<QQQQ", 0x30000, 1, 0x32000, 0x6530000), None),
                            (struct.pack("<QQQQ", 0x30000, 1, 0x32000, pointer | 8), None)):
        for at in (0x100, (1 << 20) - 16, (1 << 20) - 32):
            data = bytearray(2 << 20)
            data[at:at + 32] = words
            records = nested_records(memory_from_segments([(0x1000000, bytes(data))]), [0x6530000], {0x30000, 0x32000}).get(0x6530000, [])
            assert [(record.current, record.vmxon) for record in records] == ([expected] if expected else [])


def test_a_budget_of_tables_is_shared() -> None:
    assert Budget(3).left == 3


# --- modes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("registers", "words"), [
    ((0x80000011, 0x20, True, 2, True), "64-bit"), ((0x80000011, 0x20, True, 2, False), "compatibility"),
    ((0x80000011, 0x20, False, 2, False), "PAE"), ((0x80000011, 0, False, 2, False), "32-bit"),
    ((0x11, 0, False, 2, False), "32-bit without paging"), ((0x10, 0, False, 2, False), "real"),
    ((0x80000011, 0, False, 0x20002, False), "v86"), ((0x80000011, 0x20, None, 2, None), "PAE or 64-bit"),
    ((None, None, None, None, None), "unknown")])
def test_the_mode_of_a_guest(registers: Tuple[Any, ...], words: str) -> None:
    """SDM vol. 3, Modes of Operation and Paging Modes: PE, then LMA, RFLAGS.VM, PG and PAE."""
    assert mode_name(*registers) == words


# --- interruption -------------------------------------------------------------------------------------------------------------------


class Interrupted(PhysicalMemory):
    """Ctrl-C while the second run of pages is read."""

    def __init__(self, first: bytes) -> None:
        self.first = first

    def read(self, address: int, size: int) -> bytes:
        return memory_from_segments([(0x1000, self.first)]).read(address, size)

    def ranges(self) -> List[Tuple[int, int]]:
        return [(0x1000, len(self.first)), (0x100000, 4096)]

    def views(self) -> Any:
        yield 0x1000, memoryview(self.first)
        raise KeyboardInterrupt


@pytest.mark.parametrize("verb", ["vmcs list", "source scan"])
def test_ctrl_c_shows_what_was_found_and_says_that_it_is_partial(verb: str, values: Dict[int, int]) -> None:
    session = Session(_machine=Machine(Interrupted(vmcs_page(values, 0x200000 | 0x1E)), "x", "test", "test"))
    words = command(verb, session)
    assert "0x1000" in words and "interrupted after 4 KiB" in " ".join(words.split())
    # A command for all control blocks does not take some for all.
    with pytest.raises(KeyboardInterrupt):
        command("vmcs dump", session)


# --- inside a guest: the same commands on its memory ----------------------------------------------------------------------------------


def answer(words: str, session: Session) -> Any:
    outcome = run_words([*words.split(), "--json"], session, lambda report, _options: "")
    return json.loads(outcome.text) if not outcome.error else outcome.error


def test_commands_inside_a_guest_use_its_addresses(intel_nested: Path, intel_nested_truth: Dict[str, Any]) -> None:
    """The guest hypervisor's own words: VMXON region at 0x30000, the VMCS that it flushed at 0x31000; their frames by pagemap."""
    truth, session = intel_nested_truth["nested"], Session(str(intel_nested))
    vmcs01 = truth["found"]["vmcs01"]
    rows = answer(f"vmcs list --inside {vmcs01}", session)["vmcs"]
    assert [row["address"] for row in rows] == ["0x30000", "0x31000", "0x32000"]
    for gpa, hpa in truth["gpa_to_hpa"].items():
        inside = answer(f"phys {gpa} --length 4096 --inside {vmcs01}", session)["rows"]
        assert [row["bytes"] for row in inside] == [row["bytes"] for row in answer(f"phys {hpa} --length 4096", session)["rows"]]
    # Its addresses are those of this memory now: nothing has to be left out.
    notes = [" ".join(answer(words, session)["notes"]) for words in (f"vmcs check 0x31000 --inside {vmcs01}",
                                                                     f"vmcs check {truth['gpa_to_hpa']['0x31000']}")]
    assert NESTED_ADDRESSES not in notes[0] and NESTED_ADDRESSES in notes[1]
    tree = answer(f"source scan --inside {vmcs01}", session)
    assert [row["address"] for row in tree["hypervisors"][0]["vms"][0]["processors"]] == ["0x31000"]
    session.close()


def test_the_processor_inside_is_the_guest_s_as_of_its_last_exit(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """What KVM_GET_SREGS said; RIP is that of the exit.  No control loads or saves EFER, so that the field is not the guest's: unknown."""
    session = Session(str(intel_plain))
    info = {row["register"]: row["value"] for row in answer(f"source info --inside {VM_A:#x}", session)["cpus"]}
    sregs = intel_plain_truth["vms"]["A"]["kvm_get_sregs"]
    assert {name: int(info[name], 16) for name in ("cr0", "cr3")} == {name: int(sregs[name], 16) for name in ("cr0", "cr3")}
    assert int(info["gdtr_base"], 16) == int(sregs["gdt"].split("/")[0], 16)
    assert "efer" not in info
    session.close()


def test_svm_guest_from_inside(amd_l2: Path, amd_l2_truth: Dict[str, Any]) -> None:
    """Guest-virtual addresses walked in the guest's own memory end where the walk of both dimensions does (the guest's own table of them)."""
    session = Session(str(amd_l2))
    for row in amd_l2_truth["gva_walks"]:
        found = answer(f"gva walk {row['gva']} --cr3 0x1000 --inside {amd_l2_truth['vmcb_pa']}", session)["walk"][0]
        steps = [step for part in found["guest"] for step in part["steps"]]
        assert [[int(step["address"], 16), int(step["entry"], 16)] for step in steps] == [
            [int(address, 16), int(entry, 16)] for _, address, entry in row["guest_path"]]
    session.close()


def test_guests_of_guests_stack(values: Dict[int, int], tmp_path: Path) -> None:
    """L3's VMCS is at 0x7000 for L2, 0x9000 for L1, 0x340000 for the machine."""
    path, ram = tmp_path / "ram.raw", three_levels(values)
    image = bytearray(max(ram.pages) + 4096)
    for address, data in ram.pages.items():
        image[address:address + 4096] = data
    path.write_bytes(image)
    session = Session(str(path))
    for words in ("vmcs get HOST_RIP --at 0x340000", "vmcs get HOST_RIP --at 0x9000 --inside 0x100000",
                  "vmcs get HOST_RIP --at 0x7000 --inside 0x100000 --inside 0x5000"):
        assert answer(words, session)["vmcs"][0]["fields"][0]["value"] == "0xffff900000000200"
    # Each command says anew where it looks, and scans of the one are not taken for scans of the other.
    assert [row["address"] for row in answer("vmcs list", session)["vmcs"]] == ["0x100000", "0x300000", "0x340000"]
    assert [row["address"] for row in answer("vmcs list --inside 0x100000", session)["vmcs"]] == ["0x5000", "0x9000"]
    assert [row["address"] for row in answer("vmcs list", session)["vmcs"]] == ["0x100000", "0x300000", "0x340000"]
    session.close()


def test_inside_what_is_no_control_block(intel_plain: Path) -> None:
    session = Session(str(intel_plain))
    assert "neither a VMCB nor a VMCS" in answer("vmcs list --inside 0x6827000", session)
    assert "not aligned" in answer(f"vmcs list --inside {VM_A + 8:#x}", session)
    assert "0x100000000" in answer("vmcs list --inside 0x100000000", session)
    assert "live target" in answer(f"msr read 0x480 --inside {VM_A:#x}", session)
    session.close()


# --- nested SVM -----------------------------------------------------------------------------------------------------------------------


def nested_svm(page: bytes) -> Ram:
    """KVM's way: vmcb01 runs L1, in whose memory vmcb12 (guest-physical 0x5000) has nested tables of L1's own; L0 ran L2 with vmcb02."""
    def vmcb(ncr3: int, iopm: int, **values: int) -> bytes:
        made = bytearray(page)
        for offset, value in {0xB0: ncr3, 0x40: iopm, **{vmcb_fields.find(name).offset: value for name, value in values.items()}}.items():
            struct.pack_into("<Q", made, offset, value)
        return bytes(made)

    ram = Ram()
    l2 = {"rip": 0x401000, "rsp": 0x7FFE0000, "cr3": 0x3000}
    ram.put(0x100000, vmcb(0x200000, 0x600000))
    ram.put(0x110000, vmcb(0x210000, 0x600000, **l2))
    l1 = {0x5000: 0x300000, **{0x20000 + 0x1000 * n: 0x320000 + 0x1000 * n for n in range(4)}, 0x9000: 0x340000}
    ram.map(0x200000, l1)
    ram.put(0x300000, vmcb(0x20000, 0x8000, **l2))
    # L2's 0x3000 is L1's 0x9000; the tables with which L0 runs L2 say the same in one step.
    ram.map(0x20000, {0x3000: 0x9000}, l1)
    ram.map(0x210000, {0x3000: 0x340000})
    ram.put(0x340000, bytes(4096))
    return ram


def test_a_vmcb_in_a_guests_memory_belongs_to_the_hypervisor_in_it(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """vmcb12 is under the VM of vmcb01, with tables that L1 made; vmcb02 holds the same guest and is no VM of its own."""
    with open_machine(amd_exit).memory as memory:
        page = memory.read_page(int(amd_exit_truth["vmcb_pa"], 16))
    tree = tree_of(nested_svm(page).memory)
    assert shape(tree.hypervisors) == [(0x600000, [([0x100000], [(0x8000, [([0x5000], [])])])])] and not tree.rest
    nested = tree.hypervisors[0].vms[0].hypervisors[0].vms[0]
    assert [helper.found.address for helper in nested.blocks[0].ran_with] == [0x110000]
    assert nested.steps_down(0x3123) == [0x3123, 0x9123, 0x340123]
    # A VMCB with another guest is another VM.
    other = nested_svm(page)
    struct.pack_into("<Q", other.pages[0x110000], vmcb_fields.find("rip").offset, 0x402000)
    assert [[block.address for block in vm.blocks] for vm in tree_of(other.memory).hypervisors[0].vms] == [[0x100000], [0x110000]]


def test_the_commands_show_nested_svm(amd_exit: Path, amd_exit_truth: Dict[str, Any], tmp_path: Path) -> None:
    with open_machine(amd_exit).memory as memory:
        page = memory.read_page(int(amd_exit_truth["vmcb_pa"], 16))
    ram = nested_svm(page)
    image = bytearray(max(ram.pages) + 4096)
    for address, data in ram.pages.items():
        image[address:address + 4096] = data
    path = tmp_path / "svm.raw"
    path.write_bytes(image)
    session = Session(str(path))
    words = command("source scan", session)
    assert "hypervisor inside: SVM" in words and "its guest ran with the VMCB at 0x110000 of the hypervisor below" in words
    assert "its CR3: L2 0x3000 -> L1 0x9000 -> L0 0x340000" in words
    assert not run_words(["report", str(tmp_path / "x.html")], session, lambda report, _options: "").error
    content = (tmp_path / "x.html").read_text()
    assert "Guest-physical address space through nCR3 0x20000" in content and "through nCR3 0x210000" in content
    session.close()


# --- nested SVM as KVM does it ------------------------------------------------------------------------------------------------------

VMCB01, VMCB02, VMCB12, VMCB12_GPA = 0x5C6B000, 0x1E64000, 0x59C8000, 0x20000


@pytest.fixture
def kvm_nested() -> Ram:
    """Pages of a machine with KVM (Linux 6.1) on an emulated SVM processor, stopped while the guest of VM B's guest ran: the VMCBs, their nested
    tables and the guest pages.  vmcb02 and vmcb12 hold the same guest state there; that KVM's objects pair the same ones is tested live."""
    data = lzma.decompress((Path(__file__).parent / "data" / "amd" / "kvm-nested-svm.pages.xz").read_bytes())
    ram = Ram()
    for at in range(0, len(data), 8 + 4096):
        ram.put(struct.unpack_from("<Q", data, at)[0], data[at + 8:at + 8 + 4096])
    return ram


def changed(ram: Ram, vmcb: int, **values: int) -> None:
    for name, value in values.items():
        row = vmcb_fields.find(name.replace("__", "."))
        ram.put(vmcb + row.offset, value.to_bytes(row.size, "little"))


def ran_with(ram: Ram, kvm: "Dict[int, KvmPair] | None" = None) -> Tuple[Dict[int, str], List[int]]:
    """What vmcb12's guest ran with, and the control blocks that are VMs of the hypervisor itself."""
    tree = hierarchy(ram.memory, relate(scan(ram.memory), ram.memory), kvm)
    vms = [vm for top in tree.hypervisors for vm in top.vms]
    nested, = [block for vm in vms for inner in vm.hypervisors for one in inner.vms for block in one.blocks]
    assert nested.address == VMCB12_GPA and nested.found.address == VMCB12
    return nested.ran_with_by, sorted(block.address for vm in vms for block in vm.blocks)


def moved_on(ram: Ram) -> Ram:
    """The nested guest ran on since VMRUN: other registers, another stack."""
    changed(ram, VMCB02, rip=0x10345, rsp=0x7FF00, rax=5, rflags=0x202)
    return ram


def test_right_after_the_nested_exit_the_guest_state_says_it(kvm_nested: Ram) -> None:
    assert ran_with(kvm_nested) == ({VMCB02: "the same guest state"}, [0x4361000, VMCB01, 0x5DBD000])


def test_a_nested_guest_that_runs_is_known_by_what_kvm_merged(kvm_nested: Ram) -> None:
    """vmcb02 has the intercepts of both, vmcb01's maps (vmcb12 intercepts no MSR), the sum of the TSC offsets, and maps what both levels map."""
    found, others = ran_with(moved_on(kvm_nested))
    assert list(found) == [VMCB02] and found[VMCB02].startswith("intercepts, permission maps and TSC offset") and VMCB02 not in others


@pytest.mark.parametrize(("at", "values"), [
    (VMCB02, {"tsc_offset": 5}), (VMCB02, {"iopm_base_pa": 0x1E24000}), (VMCB02, {"msrpm_base_pa": 0x5DBE000}), (VMCB02, {"gdtr__base": 0x9000}),
    (VMCB02, {"efer": 0x1D01}), (VMCB02, {"intercept_misc1": 0xBD4C8026}), (VMCB12, {"intercept_misc2": 0x80001}), (VMCB12, {"tsc_offset": 1}),
    (VMCB12, {"intercept_misc1": 1 << 28})], ids=str)
def test_one_thing_that_does_not_fit_and_nothing_is_claimed(at: int, values: Dict[str, int], kvm_nested: Ram) -> None:
    changed(moved_on(kvm_nested), at, **values)
    found, others = ran_with(kvm_nested)
    assert not found and VMCB02 in others


def test_tables_that_lead_elsewhere_do_not_fit(kvm_nested: Ram) -> None:
    """One page of the tables with which the guest's guest ran, moved to another frame."""
    moved_on(kvm_nested)
    tables = Npt(int.from_bytes(kvm_nested.pages[VMCB02][0xB0:0xB8], "little"))
    leaf = next(iter(Enumeration(kvm_nested.memory, tables).leaves()))
    assert leaf.entry_address is not None
    kvm_nested.put(leaf.entry_address, struct.pack("<Q", leaf.entry ^ 0x10000000))
    assert ran_with(kvm_nested)[0] == {}


def test_two_that_fit_alike_are_not_told_apart_by_guessing(kvm_nested: Ram) -> None:
    moved_on(kvm_nested)
    kvm_nested.put(0x1E65000, bytes(kvm_nested.pages[VMCB02]))
    found, others = ran_with(kvm_nested)
    assert not found and {VMCB02, 0x1E65000} <= set(others)


def test_kvms_objects_come_before_what_the_pages_say(kvm_nested: Ram) -> None:
    changed(moved_on(kvm_nested), VMCB02, tsc_offset=5)
    found, others = ran_with(kvm_nested, {VMCB02: KvmPair(VMCB01, VMCB12_GPA, "by KVM's objects: vCPU 0 of process 77")})
    assert found == {VMCB02: "by KVM's objects: vCPU 0 of process 77"} and VMCB02 not in others
    # Of another vCPU, or of another page of its guest: nothing is said of this one.
    for pair in (KvmPair(0x4361000, VMCB12_GPA, "x"), KvmPair(VMCB01, 0x21000, "x")):
        assert ran_with(kvm_nested, {VMCB02: pair})[0] == {}


def test_the_evidence_is_printed(kvm_nested: Ram, tmp_path: Path) -> None:
    moved_on(kvm_nested)
    image = bytearray(max(kvm_nested.pages) + 4096)
    for address, data in kvm_nested.pages.items():
        image[address:address + 4096] = data
    path = tmp_path / "nested.raw"
    path.write_bytes(image)
    session = Session(str(path))
    words = " ".join(command("source scan", session).split())
    assert "its guest ran with the VMCB at 0x1e64000 of the hypervisor below, nCR3 0x4370000 (intercepts, permission maps and TSC offset" in words
    session.close()
