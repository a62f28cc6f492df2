"""The plugin's own logic over an engine of numbers: what is retried, cached, restored and refused.  The real engine is in test_windbg.py."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Dict, List, Optional

import pytest

from vtdbg.errors import MemoryUnavailable, UsageError, VtdbgError
from vtdbg.targets.port import TargetError, Unsupported

sys.path.insert(0, str(Path(__file__).parent.parent / "windbg_plugin"))

from vtdbg_windbg.alias import words_of
from vtdbg_windbg.app import carried, execute, main, split_options
from vtdbg_windbg.engine import Debuggee, Engine, EngineError, Interrupted, check
from vtdbg_windbg.port import DbgEngPort
from vtdbg_windbg.target import machine_of

PAGE = 4096
LIVE = Debuggee("kernel", machine=0x8664, title="live")
DUMP = Debuggee("kernel", dump=True, machine=0x8664, title="complete dump")


class Numbers(Engine):
    """Pages that are full of their own address; every call is noted.  `whole` refuses reads that miss a byte, as pykd does."""

    name = "numbers"

    def __init__(self, pages: List[int], debuggee: Debuggee = LIVE, whole: bool = False, ranges: bool = True) -> None:
        self.pages = {page: struct.pack("<Q", page) * (PAGE // 8) for page in pages}
        self.state, self.whole, self.known = debuggee, whole, ranges
        self.calls: List[str] = []
        self.current, self.stop = 0, False
        self.registers_: Dict[str, int] = {"rip": 0x1000, "cr3": 0x2000}

    def debuggee(self) -> Debuggee:
        return self.state

    def read_physical(self, address: int, size: int) -> bytes:
        self.calls.append(f"read {address:#x}+{size:#x}")
        data, at = b"", address
        while len(data) < size and at & -PAGE in self.pages:
            data += self.pages[at & -PAGE][at % PAGE:at % PAGE + size - len(data)]
            at = address + len(data)
        return b"" if self.whole and len(data) < size else data

    def read_virtual(self, address: int, size: int) -> bytes:
        # A PHYSICAL_MEMORY_DESCRIPTOR at 0x10, its pointer at 8.
        runs = [(page // PAGE, 1) for page in sorted(self.pages)]
        block = struct.pack("<QQQ", 0, 0x10, len(runs)) + struct.pack("<Q", len(runs)) + b"".join(struct.pack("<QQ", *run) for run in runs)
        return block[address:address + size]

    def write_virtual(self, address: int, data: bytes) -> int:
        self.calls.append(f"write {address:#x}")
        return len(data)

    def register(self, name: str) -> Optional[int]:
        value = self.registers_.get(name)
        return None if value is None else value + self.current

    def write_register(self, name: str, value: int) -> None:
        self.calls.append(f"set {name}")

    def rdmsr(self, index: int) -> int:
        if index != 0xC0000080:
            raise EngineError("refused")
        return 0xD01

    def evaluate(self, expression: str) -> int:
        raise UsageError(f"{expression!r} is nothing")

    def execute(self, command: str) -> None:
        self.calls.append(command)
        if command == "~7s":
            raise EngineError("no such processor")
        self.current = int(command[1:-1])

    def step(self) -> None:
        self.calls.append("step")

    def processor(self) -> int:
        return self.current

    def processors(self) -> int:
        return 2

    def physical_memory_block(self) -> Optional[int]:
        return 8 if self.known else None

    def write(self, words: str, dml: bool = False) -> None:
        self.calls.append(words)

    def prefers_dml(self) -> bool:
        return False

    def interrupted(self) -> bool:
        return self.stop


@pytest.mark.parametrize("whole", [False, True])
def test_a_read_across_a_hole_names_the_first_missing_address(whole: bool) -> None:
    memory = DbgEngPort(Numbers([0x1000, 0x2000, 0x4000], whole=whole)).memory
    assert memory.read(0x1FF8, 16) == struct.pack("<QQ", 0x1000, 0x2000)
    with pytest.raises(MemoryUnavailable) as caught:
        memory.read(0x1F00, 0x3000)
    assert caught.value.address == 0x3000


def test_a_page_is_read_once_until_the_target_runs() -> None:
    engine = Numbers([0x1000])
    port = DbgEngPort(engine)
    for offset in range(0, PAGE, 8):
        port.memory.read_u64(0x1000 + offset)
    assert engine.calls == ["read 0x1000+0x1000"]
    engine.pages[0x1000] = bytes(PAGE)
    assert port.memory.read_u64(0x1000) == 0x1000
    port.step()
    assert port.memory.read_u64(0x1000) == 0


def test_views_skip_holes_and_lose_no_page() -> None:
    pages = [0x1000, 0x2000, 0x5000, 0x9000, 0x10000, 0x11000]
    for whole in (False, True):
        views = list(DbgEngPort(Numbers(pages, whole=whole)).memory.views())
        seen = [at + offset for at, view in views for offset in range(0, len(view), PAGE)]
        assert seen == pages
        assert all(view[:8] == struct.pack("<Q", at) for at, view in views)


def test_without_ranges_nothing_is_searched() -> None:
    memory = DbgEngPort(Numbers([0x1000], ranges=False)).memory
    assert memory.ranges() is None
    with pytest.raises(VtdbgError, match="give an address"):
        list(memory.views())


@pytest.mark.parametrize(("count", "run"), [(0, (1, 1)), (1 << 20, (1, 1)), (1, (1, 0)), (1, (1, 1 << 50)), (1, (1 << 60, 1))])
def test_a_damaged_memory_block_is_unknown(count: int, run: "tuple[int, int]") -> None:
    engine = Numbers([0x1000])
    damaged = struct.pack("<QQQQ", 0, 0x10, count, 0) + struct.pack("<QQ", *run)
    engine.read_virtual = lambda address, size: damaged[address:address + size]  # type: ignore[method-assign]
    assert DbgEngPort(engine).memory.ranges() is None


def test_the_processor_is_restored_even_after_an_error() -> None:
    engine = Numbers([0x1000])
    port = DbgEngPort(engine)
    with pytest.raises(RuntimeError), port.on(1):
        assert engine.current == 1
        raise RuntimeError
    assert engine.current == 0
    with pytest.raises(TargetError, match="processor 7"), port.on(7):
        pass
    assert engine.current == 0


def test_registers_of_each_processor_are_its_own_and_read_late() -> None:
    engine = Numbers([0x1000])
    machine = machine_of(DbgEngPort(engine))
    assert engine.calls == []
    assert [cpu.get("rip") for cpu in machine.cpus] == [0x1000, 0x1001]
    assert [cpu.get("efer") for cpu in machine.cpus] == [0xD01, 0xD01]
    assert machine.cpus[0].get("lstar") is None and machine.cpus[0].get("cr0") is None
    assert engine.current == 0 and engine.calls == ["~1s", "~0s"]


def test_nothing_is_written_to_a_dump() -> None:
    engine = Numbers([0x1000], DUMP)
    port = DbgEngPort(engine)
    for attempt in (lambda: port.write_virtual(0, b"x"), lambda: port.write_register("rax", 1), port.step, lambda: port.rdmsr(0xC0000080)):
        with pytest.raises(Unsupported):
            attempt()
    assert engine.calls == []
    assert machine_of(port).cpus[0].get("efer") is None


@pytest.mark.parametrize(("debuggee", "words"), [
    (Debuggee(), "no target"), (Debuggee("user"), "user-mode"), (Debuggee("kernel", machine=0x14C), "32-bit x86"),
    (Debuggee("kernel", machine=0xAA64), "ARM64"), (Debuggee("kernel", machine=0x1234), "0x1234"), (Debuggee("kernel", running=True), "running"),
])
def test_refusals_are_one_line(debuggee: Debuggee, words: str) -> None:
    with pytest.raises(TargetError, match=words) as caught:
        check(debuggee)
    assert "\n" not in str(caught.value)
    engine = Numbers([0x1000], debuggee)
    assert execute(engine, ["phys", "0x1000"], dml=False) == 2
    assert len(engine.calls) == 1 and engine.calls[0].startswith("vt: ") and engine.calls[0].count("\n") == 1


def test_a_command_without_memory_needs_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTDBG_SOURCE", "/nowhere/else.dmp")
    engine = Numbers([], Debuggee())
    assert execute(engine, ["decode", "cr0", "0x80000011"], dml=False) == 0
    engine = Numbers([0x1000])
    assert execute(engine, ["phys", "0x1000"], dml=True) == 0
    assert "0x0000000000001000" in "".join(engine.calls)


def test_a_click_looks_at_the_same_source_by_the_same_layout() -> None:
    """The options that decide what is read are carried on; how it is printed is not."""
    options = {"source": "C:\\my dumps\\a.dmp", "format": None, "layout": "haswell", "caps": None, "width": 100, "json": False}
    assert carried(options) == '--source "C:\\my dumps\\a.dmp" --layout haswell'
    assert carried({}) == ""


def test_an_interrupt_does_not_keep_a_target_from_being_put_back() -> None:
    """The engine refuses virtual memory while one waits: it is taken, the access repeated, and the next step reports it, once."""
    engine = Numbers([0x1000])
    real_read, real_write = engine.read_virtual, engine.write_virtual

    def taken() -> bool:
        engine.stop, before = False, engine.stop
        return before

    def write(address: int, data: bytes) -> int:
        if engine.stop:
            raise EngineError("refused")
        return real_write(address, data)

    engine.interrupted = taken  # type: ignore[method-assign]
    engine.read_virtual = lambda address, size: b"" if engine.stop else real_read(address, size)  # type: ignore[method-assign]
    engine.write_virtual = write  # type: ignore[method-assign]
    port = DbgEngPort(engine)
    engine.stop = True
    assert port.read_virtual(8, 8) == struct.pack("<Q", 0x10)
    engine.stop = True
    port.write_virtual(8, b"x")
    assert engine.calls == ["write 0x8"]
    with pytest.raises(Interrupted):
        port.step()
    port.step()
    assert engine.calls == ["write 0x8", "step"]


def test_an_interrupt_during_a_read_is_not_a_missing_page() -> None:
    engine = Numbers([0x1000])
    engine.read_physical = lambda address, size: (setattr(engine, "stop", True), b"")[1]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(Interrupted):
        DbgEngPort(engine).memory.read(0x1000, 8)


def test_an_interrupt_on_another_processor_is_reported_on_the_users_own() -> None:
    engine = Numbers([0x1000])
    port = DbgEngPort(engine)
    # As the engine does: asking takes it, and so does the command that switches.
    engine.interrupted = lambda: [engine.stop, setattr(engine, "stop", False)][0]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(Interrupted), port.on(1):
        assert engine.current == 1
        engine.stop = True
    assert engine.current == 0
    with port.on(1):
        pass


def test_output_stops_between_two_pieces() -> None:
    engine = Numbers([])
    engine.write = lambda words, dml=False: (engine.calls.append(words), setattr(engine, "stop", True))[0]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(Interrupted):
        execute(engine, ["exit", "reasons"], dml=False)
    assert len(engine.calls) == 1


def test_words_of_the_alias_come_in_the_order_of_their_numbers() -> None:
    rows = (("$arg0", "C:\\vt.wds"), ("$arg1", "ept"), ("$arg10", "last"), ("$arg2", "two words"), ("vt", "$$>a<C:\\vt.wds"))
    listing = "  Alias            Value  \n -------          ------- \n" + "".join(f" {name:<16} {value} \n" for name, value in rows)
    assert words_of(listing) == ["ept", "two words", "last"]
    assert words_of("No Alias entries to list. ") == []


def test_own_options_stand_before_the_command() -> None:
    assert split_options(["--backend", "pykd", "--plain", "vmcs", "dump", "-z"]) == ({"--backend": "pykd", "--plain": ""}, ["vmcs", "dump", "-z"])
    for wrong in (["--backend"], ["--backend", "gdb", "vmcs"], ["-z"]):
        with pytest.raises(UsageError):
            split_options(wrong)


@pytest.mark.skipif(sys.platform == "win32", reason="there is an engine")
def test_without_windows_it_says_what_would_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vmcs", "list"]) == 2
    assert capsys.readouterr().out == "vt: the debugger engine exists on Windows only; here open the dump itself: vtdbg -s MEMORY.DMP ...\n"
