"""GDB at a terminal with vtdbg inside, and Ctrl-C typed there: whatever an injected instruction is at, the target is as it was afterwards."""

from __future__ import annotations

import random
import re
import signal
import threading
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
from support.live import started
from support.ptygdb import PressingWire, PtyGdb
from support.vmxstub import GUEST, HANDLER, VMCS, VmxStub

pytestmark = pytest.mark.live

SNAPSHOT = """define snapshot
maintenance flush register-cache
info registers
x/128xb $rip-64
x/512xb $rsp-512
show scheduler-locking
show step-mode
end
"""
INTERRUPTED = "vt: interrupted; the target is as it was"


@pytest.fixture(scope="module")
def stub() -> Iterator[VmxStub]:
    with started("the VMX stub", VmxStub) as target:
        yield target


@pytest.fixture
def typed(stub: VmxStub, tmp_path: Path) -> "Iterator[Tuple[PtyGdb, PressingWire]]":
    """GDB at a terminal, the processor at the first instruction of the exit handler."""
    script = tmp_path / "snapshot.gdb"
    script.write_text(SNAPSHOT)
    with PressingWire(stub.port) as wire, PtyGdb(f"source {script}", f"target remote 127.0.0.1:{wire.port}") as gdb:
        gdb.command(f"vmcs get GUEST_RIP --at {VMCS:#x}")
        for line in (f"hbreak *{HANDLER:#x}", "continue", "delete"):
            gdb.command(line)
        gdb.command("stepi 2")
        wire.press = gdb.press
        yield gdb, wire


def snapshot(gdb: PtyGdb) -> str:
    """All registers from the stub, bytes around RIP and below RSP, and GDB's settings."""
    gdb.settle()
    return gdb.command("snapshot")


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_at_every_packet_of_an_injection(typed: "Tuple[PtyGdb, PressingWire]", late: bool) -> None:
    """Before the stub has the packet, and behind its answer: the same registers, code, stack and settings; one line, or the result."""
    gdb, wire = typed
    before = snapshot(gdb)
    assert "rip" in before and before.count("\n") > 80
    interrupted = 0
    for number in range(1, 400):
        wire.arm(number, late)
        shown = gdb.command("cpuid 0 --yes").strip()
        fired, packet = wire.fired, wire.packets[number - 1:number]
        wire.disarm()
        if not fired:
            break
        assert snapshot(gdb) == before, (number, packet, shown)
        interrupted += INTERRUPTED in shown
        assert INTERRUPTED in shown or "0x756e6547" in shown, (number, packet, shown)
        assert "Traceback" not in shown
    assert number > 60 and interrupted > number // 2
    assert "0x756e6547" in gdb.command("cpuid 0 --yes")


def test_ctrl_c_at_any_moment_of_an_injection(typed: "Tuple[PtyGdb, PressingWire]") -> None:
    """Between packets too, where GDB's settings are changed and put back."""
    gdb, _ = typed
    before = snapshot(gdb)
    moments = random.Random(7)
    for _ in range(40):
        delay = moments.uniform(0, 0.08)
        key = threading.Timer(delay, gdb.press)
        key.start()
        gdb.command("cpuid 0 --yes")
        key.join()
        assert snapshot(gdb) == before, delay


def blocked_signals(gdb: PtyGdb) -> int:
    """Those that GDB's main thread does not take at the moment (Linux, Documentation/filesystems/proc.rst)."""
    found = re.search(r"^SigBlk:\s*(\w+)", Path(f"/proc/{gdb.pid}/status").read_text(), re.M)
    assert found is not None
    return int(found.group(1), 16)


def test_ctrl_c_waits_for_the_answer_to_a_monitor_command(typed: "Tuple[PtyGdb, PressingWire]", monkeypatch: pytest.MonkeyPatch) -> None:
    """GDB ends its `monitor` on Ctrl-C without the answer, and takes that for the answer to the next packet: every later read gives the bytes of
    the one before.  Ours are held; the user's own are GDB's."""
    gdb, wire = typed
    held: List[bool] = []
    relay = wire.passing

    def passing(data: bytes, to_stub: bool) -> None:
        if to_stub and b"$qRcmd" in data:
            held.append(bool(blocked_signals(gdb) & 1 << signal.SIGINT - 1))
        relay(data, to_stub)

    monkeypatch.setattr(wire, "passing", passing)
    gdb.command(f"phys {VMCS:#x}")
    assert len(held) >= 2 and all(held)
    held.clear()
    gdb.command("monitor help")
    assert held == [False]


def test_ctrl_c_ends_a_long_injection_at_once(typed: "Tuple[PtyGdb, PressingWire]") -> None:
    """160 VMREADs are not waited for: the Ctrl-C comes through at the next step."""
    gdb, wire = typed
    before = snapshot(gdb)
    dump = f"vmcs dump {VMCS:#x} --vmread --yes"
    wire.arm(-1, late=False)
    assert INTERRUPTED not in gdb.command(dump)
    whole = len(wire.packets)
    wire.arm(whole // 10, late=True)
    shown = gdb.command(dump)
    packets = len(wire.packets)
    wire.disarm()
    assert INTERRUPTED in shown and packets < whole // 2, (packets, whole)
    assert snapshot(gdb) == before


def test_it_asks_at_a_terminal(typed: "Tuple[PtyGdb, PressingWire]") -> None:
    """The question stands before anything is written; "n" and Ctrl-C are no."""
    gdb, wire = typed
    before = snapshot(gdb)
    for answer, said in (("n", "vt: cpuid changes the target for a moment"), ("y", "0x756e6547")):
        wire.arm(-1, late=False)
        gdb.type("cpuid 0")
        gdb.until("Do it? (y or n) ")
        assert not any(packet.startswith(b"$M") for packet in wire.packets)
        gdb.type(answer)
        shown = gdb.prompt()
        assert said in shown, shown
        assert any(packet.startswith(b"$M") for packet in wire.packets) == (answer == "y")
    gdb.type("cpuid 0")
    gdb.until("Do it? (y or n) ")
    gdb.press()
    assert "0x756e6547" not in gdb.prompt()
    assert snapshot(gdb) == before


def test_ctrl_c_in_the_guest_and_in_a_trace(typed: "Tuple[PtyGdb, PressingWire]") -> None:
    """`vt exit trace` ended by Ctrl-C shows what it has, and its breakpoint is gone."""
    gdb, wire = typed
    # Some exits are shown by then.
    wire.arm(300, late=True)
    shown = gdb.command(f"vt exit trace {HANDLER:#x} --count 100000 --vmcs {VMCS:#x}")
    assert "of 100000 exits" in " ".join(shown.split()) and "CPUID" in shown and f"{GUEST + 2:#x}" in shown, shown[-600:]
    assert "No breakpoints" in gdb.command("info breakpoints")


def test_ctrl_c_at_the_packets_of_a_trace(typed: "Tuple[PtyGdb, PressingWire]") -> None:
    """Where the breakpoint is set, met, found and removed: it is gone afterwards, and nothing is said but the report or one line."""
    gdb, wire = typed
    trace = f"vt exit trace {HANDLER:#x} --count 2 --vmcs {VMCS:#x}"
    wire.arm(-1, late=False)
    assert "By reason" in gdb.command(trace)
    whole = len(wire.packets)
    for number in range(1, whole, max(whole // 24, 1)):
        wire.arm(number, late=bool(number % 2))
        shown = gdb.command(trace)
        wire.disarm()
        gdb.settle()
        assert "Traceback" not in shown and ("By reason" in shown or INTERRUPTED in shown or "no exit" in shown), (number, shown)
        assert "No breakpoints" in gdb.command("info breakpoints"), (number, shown)
