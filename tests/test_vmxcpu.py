"""The processor model that other tests compare with is what it is taken for."""

from __future__ import annotations

import pytest
from support.vmxcpu import MODES, Case, Worker
from support.vmxcpu.places import EPT_PML4, FREE

pytestmark = pytest.mark.live


PAIRS = [(mode, host) for mode in MODES for host in ("64-bit", "PAE", "32-bit") if host == "64-bit" or mode not in ("64-bit", "compatibility")]


@pytest.mark.parametrize(("mode", "host"), PAIRS)
def test_every_baseline_enters_and_exits(vmx_worker: Worker, mode: str, host: str) -> None:
    outcome = vmx_worker.launch(vmx_worker.baseline(mode, host), host="64-bit" if host == "64-bit" else "32-bit")
    # HLT exits (12); in virtual-8086 mode it is privileged and raises #GP, which is intercepted (0).
    assert (outcome.kind, outcome.number) == ("exit", 0 if mode == "virtual-8086" else 12)


def test_failures_are_told_apart(vmx_worker: Worker) -> None:
    good = vmx_worker.baseline()
    control, host, guest, running = vmx_worker.launch_many([
        Case({**good, 0x4000: 0}), Case({**good, 0x6C00: 0}), Case({**good, 0x6820: 0}), Case({**good, 0x4002: good[0x4002] & ~0x80})])
    assert (control.kind, control.number) == ("VMfailValid", 7)
    assert (host.kind, host.number) == ("VMfailValid", 8)
    assert (guest.kind, guest.number, guest.failed_check) == ("entry-failure", 33, "RFLAGS[1] cleared")
    assert running.kind == "inside"


def test_a_case_leaves_nothing_behind(vmx_worker: Worker) -> None:
    """Memory that one case writes, or that its guest writes, is as before in the next."""
    store = bytes.fromhex("c7042500800100efbeadde") + b"\xf4"      # mov dword [0x18000], 0xdeadbeef; hlt
    first = vmx_worker.guest_case(store, dump=[(FREE, 8)], memory={FREE + 4: b"ABCD"})
    second = vmx_worker.guest_case(b"\xf4", dump=[(FREE, 8)])
    outcomes = vmx_worker.launch_many([first, second])
    assert [outcome.memory[(FREE, 8)] for outcome in outcomes] == [b"\xef\xbe\xad\xdeABCD", bytes(8)]


def test_exit_information_comes_back(vmx_worker: Worker) -> None:
    """MOV to CR3 from RDX with CR3-load exiting: reason 28, qualification CR 3, type 0 (to), register 2 (SDM vol. 3, Basic VM-Exit
    Information, table Exit Qualification for Control-Register Accesses)."""
    values = {0x4002: vmx_worker.baseline()[0x4002] | 1 << 15}
    outcome = vmx_worker.run_guest(bytes.fromhex("0f22da"), values, registers={"rdx": 0x1234})
    assert (outcome.kind, outcome.number, outcome.qualification) == ("exit", 28, 0x203)
    assert outcome.fields[0x440C] == 3
    assert outcome.registers["rdx"] == 0x1234


def test_ept_violation(vmx_worker: Worker) -> None:
    """A write through an entry that only allows reads: exit 48, write (bit 1), readable (bit 3), linear address valid (bits 7 and 8), and,
    as this processor reports advanced information, a user page (9) that the guest's tables make writable (10)."""
    table = FREE
    entries = {0x17000 + 8 * 2: table | 7, table: 0x19000 | 6 << 3 | 1}
    outcome = vmx_worker.launch_many([vmx_worker.ept_case("write", 0x400000, entries, EPT_PML4 | 3 << 3 | 6)])[0]
    assert (outcome.kind, outcome.number, outcome.qualification) == ("exit", 48, 0x78A)
    assert outcome.fields[0x2400] == 0x400000


@pytest.mark.parametrize(("model", "revision"), [("core2_penryn_t9600", 0x2B), ("sapphire_rapids", 4)])
def test_other_models(model: str, revision: int, vmx_worker: Worker) -> None:
    with Worker(model) as other:
        assert other.revision == revision != 0
        assert other.msrs[0x48B] != vmx_worker.msrs[0x48B]
        failed = other.launch({**other.baseline(), 0x4000: 0})
        assert (failed.kind, failed.number) == ("VMfailValid", 7)
        assert other.launch(other.baseline()).kind == "exit"
