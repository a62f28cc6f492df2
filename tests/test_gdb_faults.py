"""What is in the way of a live target, in the plugin inside GDB and through a gdb of our own: one clear line each, and the target as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Iterator, List

import pytest
from lab_amd import BareQemu
from pygdbmi import gdbcontroller
from support.live import PATIENCE, had, started
from support.livegdb import Wire, error, plugged, vtdbg
from support.ptygdb import PressingWire

from vtdbg.cli import main
from vtdbg.targets.mi import MiPort
from vtdbg.targets.port import TargetError
from vtdbg.targets.start import gdb_arguments, gdb_environment

pytestmark = pytest.mark.live

MODE = "maintenance packet qqemu.PhyMemMode"
OUTSIDE = "0x7fffffff000"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareQemu]:
    with started("QEMU", lambda: BareQemu(tmp_path_factory.mktemp("bare"), bytes(range(256)) * 64)) as machine:
        yield machine


def as_it_was(bare: BareQemu, registers: str) -> None:
    """Memory packets are virtual, no register has changed, the machine does not run."""
    with MiPort(f"127.0.0.1:{bare.port}") as gdb:
        assert '"0"' in gdb.execute(MODE)
        assert gdb.execute("info registers") == registers
    assert not bare.running


@pytest.fixture
def registers(bare: BareQemu) -> str:
    with MiPort(f"127.0.0.1:{bare.port}") as gdb:
        return gdb.execute("info registers")


FAULTS = [
    (f"vmcs dump {OUTSIDE}", "no RAM there"), (f"vmcb dump {OUTSIDE}", "no RAM there"), (f"phys {OUTSIDE}", "no RAM there"),
    ("vmcs dump 0x1008", "not 4 KiB aligned"), ("vmcs dump 0x1000", "VMCS"),
    ("vmcs dump no_such_symbol", "no_such_symbol"), ("phys no_such_symbol 4x", "no_such_symbol"), ("vmcb list --at", "unrecognized"),
    ("vmcs get NO_SUCH_FIELD --at 0x1000", ""), ("vmcs dump --vmread --yes", "not known whether the processor is in the host"),
    ("cpuid 0 --yes --assume-host", "64-bit"), ("msr read NO_SUCH_MSR --yes", "NO_SUCH_MSR"),
]


@pytest.mark.parametrize("option", ["", " --no-fast"])
def test_bad_input_in_the_plugin(bare: BareQemu, registers: str, option: str) -> None:
    with plugged(bare.port) as gdb:
        for command, said in FAULTS:
            assert said in error(gdb, command + option), command
            assert '"0"' in gdb.execute(MODE)
    as_it_was(bare, registers)


@pytest.mark.parametrize(("command", "said"), [item for item in FAULTS if "dump" in item[0]][:6])
def test_bad_input_through_a_gdb_of_our_own(bare: BareQemu, registers: str, command: str, said: str) -> None:
    line = vtdbg(*command.split(), "-s", bare.source, status=2)
    assert said in line and line.count("\n") == 1 and "Traceback" not in line
    as_it_was(bare, registers)


@pytest.mark.parametrize("count", [10, 60, 900])
def test_stub_gone_in_a_command_of_our_own_gdb(bare: BareQemu, registers: str, count: int) -> None:
    """The wire is cut early and late: one line, and the next session ends the physical mode that QEMU was left in, or says so."""
    with Wire(bare.port, after=b"$m", count=count) as wire:
        line = vtdbg("vmcb", "list", "--scan", "all", "--no-fast", "-s", f"gdb:127.0.0.1:{wire.port}", status=2)
        assert "connection to the target is lost" in line and line.count("\n") == 1
    text = vtdbg("phys", "0x100000", "-s", bare.source)
    with MiPort(f"127.0.0.1:{bare.port}") as gdb:
        if '"1"' in gdb.execute(MODE):
            assert "memory packets were physical before this command" in " ".join(text.split())
            gdb.execute("maintenance packet Qqemu.PhyMemMode:0")
    as_it_was(bare, registers)


@pytest.mark.parametrize("number", [1, 3, 30, 200, 900])
def test_ctrl_c_in_a_command_of_our_own_gdb(bare: BareQemu, registers: str, number: int) -> None:
    """SIGINT while it connects and while memory is read through the stub: packets are virtual again, and the machine does not run."""
    with PressingWire(bare.port) as wire:
        process = subprocess.Popen([sys.executable, "-m", "vtdbg", "vmcb", "list", "--scan", "all", "--no-fast", "-s", f"gdb:127.0.0.1:{wire.port}"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wire.press = lambda: os.kill(process.pid, signal.SIGINT)
        wire.arm(number, late=bool(number % 2))
        text, errors = process.communicate(timeout=PATIENCE)
        assert wire.fired and "interrupted" in text + errors and "Traceback" not in errors, (text, errors)
    as_it_was(bare, registers)


class Pressed:
    """gdb's output, which comes in small pieces; the user presses Ctrl-C when one has been taken that ends within an escape, for the Nth time."""

    def __init__(self, stream: IO[bytes], left: List[int]) -> None:
        self._stream, self._left = stream, left

    def flush(self) -> None:
        self._stream.flush()

    def read(self) -> bytes:
        data = os.read(self._stream.fileno(), 7)
        if data.endswith(b"\\"):
            self._left[0] -= 1
            if not self._left[0]:
                # To this thread, as in a process that has no other: stubs of other tests have threads here.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return data


def test_ctrl_c_between_reading_and_keeping_what_gdb_said(bare: BareQemu, registers: str, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """A piece would be lost, and what is before and behind it read as one line, which ends in a complaint of pygdbmi's parser."""
    left = [0]

    class Controller(gdbcontroller.GdbController):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.io_manager.stdout = Pressed(self.io_manager.stdout, left)

    command = ["phys", "0x1000", "16x", "--no-fast", "-s", bare.source]
    assert main(command) == 0
    shown = capsys.readouterr().out.splitlines()[-4:]
    with monkeypatch.context() as patch:
        patch.setattr(gdbcontroller, "GdbController", Controller)
        assert main(command) == 0 and capsys.readouterr().out.splitlines()[-4:] == shown
        pieces = -left[0]
        assert pieces > 10
        for number in range(1, pieces, max(pieces // 25, 1)):
            left[0] = number
            status = main(command)
            captured = capsys.readouterr()
            assert (status, captured.out, captured.err) == (130, "", "vtdbg: interrupted\n") or left[0] > 0, (number, captured)
    as_it_was(bare, registers)


def test_a_second_client_in_the_plugin(bare: BareQemu, registers: str) -> None:
    """GDB itself gives up; vtdbg in it says that there is no target, and the first client's session goes on."""
    with plugged(bare.port) as first:
        connect = f"target remote 127.0.0.1:{bare.port}"
        words = [word for command in ("set tcp auto-retry off", "set remotetimeout 1", connect, "vmcb list") for word in ("-ex", command)]
        done = subprocess.run(gdb_arguments(["-q", "-nx", "-batch", *words]), env=gdb_environment(), capture_output=True, text=True,
                              timeout=PATIENCE, check=False)
        assert done.stderr.splitlines()[-1].startswith("vt: GDB has no target: connect first")
        assert "0x0706050403020100" in first.execute("phys 0x100000")
    as_it_was(bare, registers)


def test_stub_gone_between_commands(tmp_path: Path) -> None:
    """QEMU ends while GDB is connected: the next command says it, in one line, and so does every later one."""
    machine = had("QEMU", lambda: BareQemu(tmp_path))
    with plugged(machine.port) as gdb:
        gdb.execute("phys 0x1000 4x")
        machine.close()
        assert "lost" in error(gdb, "phys 0x2000 4x --no-fast")
        for command in ("phys 0x2000 4x --no-fast", "vmcb list", "cpuid 0 --yes"):
            assert "connect" in error(gdb, command)
        assert "EPT_VIOLATION" in gdb.execute("vt exit explain --reason 48")


def when_stopped(gdb: MiPort, command: str) -> str:
    """`interrupt` does not wait for the target to stop."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            return gdb.execute(command)
        except TargetError as problem:
            if "is running" not in str(problem) or time.monotonic() > last:
                raise


def test_a_running_target(tmp_path: Path) -> None:
    """In GDB: one line.  A gdb of our own stops what it connects to, as every debugger does at this stub, and leaves it stopped."""
    with started("QEMU", lambda: BareQemu(tmp_path)) as machine:
        with plugged(machine.port) as gdb:
            gdb.execute("vt source info")
            gdb.execute("continue &")
            for command in ("vmcb list", "phys 0x1000 4x", "cpuid 0 --yes", "vmcs layout learn 0x1000 --yes"):
                assert "the target is running: stop it first" in error(gdb, command)
            assert machine.running
            gdb.execute("interrupt")
            assert "0x0" in when_stopped(gdb, "phys 0x1000 4x")
        machine.qmp("cont")
        assert machine.running
        assert "0x000000001000" in vtdbg("phys", "0x1000", "4x", "-s", machine.source)
        assert not machine.running
