"""What a Ctrl-C must not leave behind inside vtdbg: a signal that stays blocked, memory that is closed, a machine that believes it knows."""

from __future__ import annotations

import signal
from typing import Any, Callable, Iterator, List

import pytest
from lab_amd import BareQemu
from support.live import started

from vtdbg.targets import interrupts
from vtdbg.targets.fast import FastMemory
from vtdbg.targets.interrupts import carried_out, held_back
from vtdbg.targets.live import LiveMachine, LiveMemory
from vtdbg.targets.mi import MiPort


def blocked() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_ctrl_c_just_before_it_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """pthread_sigmask runs the handlers of what came before it, after it has changed the mask (Python, signal module): the exception is its own, and
    the mask must not stay."""
    real, left = signal.pthread_sigmask, [0]

    def pressed(how: int, mask: Any) -> Any:
        result = real(how, mask)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(interrupts.signal, "pthread_sigmask", pressed)
    for number in (1, 2):
        left[0] = number
        with pytest.raises(KeyboardInterrupt), held_back():
            pass
        assert not blocked(), number


def test_a_ctrl_c_that_is_held_back_comes_at_the_end() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done and not blocked()


def test_what_puts_back_is_carried_out() -> None:
    """Begun again after each Ctrl-C, which comes once, when it is done; its own errors come at once."""
    begun: List[int] = []

    def put_back() -> None:
        begun.append(len(begun))
        if len(begun) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carried_out(put_back)
    assert begun == [0, 1, 2]
    assert carried_out(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        carried_out(lambda: 1 // 0)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareQemu]:
    """A machine of 64 MiB with a pattern at 1 MiB."""
    with started("QEMU", lambda: BareQemu(tmp_path_factory.mktemp("bare"), bytes(range(256)) * 64)) as machine:
        yield machine


class Remapped(MiPort):
    """The monitor's map of memory can change, and a Ctrl-C comes where the new one is looked at."""

    map_of: Callable[[str], str] = staticmethod(lambda text: text)
    press = False

    def monitor(self, command: str) -> str:
        if command.startswith("gpa2hva") and self.press:
            raise KeyboardInterrupt
        text = super().monitor(command)
        return self.map_of(text) if command.startswith("info mtree") else text


@pytest.mark.live
def test_ctrl_c_while_a_new_map_of_memory_is_taken_over(bare: BareQemu) -> None:
    """The old memory serves until the new one is there: nothing is closed that is still read, and the next command takes over the new map."""
    with Remapped(f"127.0.0.1:{bare.port}") as gdb:
        machine = LiveMachine(gdb)
        machine.refresh()
        assert isinstance(machine.memory, LiveMemory)
        before = machine.memory.memory
        assert isinstance(before, FastMemory) and before.read(0x100000, 4) == bytes(range(4))
        # As where something else is put over the last page of RAM.
        gdb.map_of = lambda text: text.replace("-0000000003ffffff (", "-0000000003ffefff (")
        known = machine.memory.ranges()
        for _ in range(2):
            machine.memory.drop()
            gdb.press = True
            with pytest.raises(KeyboardInterrupt):
                machine.refresh()
            assert machine.memory.memory is before and before.read(0x100000, 4) == bytes(range(4)) and machine.memory.ranges() == known
        gdb.press = False
        machine.refresh()
        after = machine.memory.memory
        assert isinstance(after, FastMemory) and after is not before and after.read(0x100000, 4) == bytes(range(4))
        ranges = machine.memory.ranges()
        assert ranges is not None and ranges[0] == (0, (64 << 20) - 0x1000)
        after.close()
        assert '"0"' in gdb.execute("maintenance packet qqemu.PhyMemMode")
