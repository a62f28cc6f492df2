"""The processors of a live target, each decided by itself: host or guest, whose, and what Linux says that it has current."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Optional, Tuple

from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.linux.kernel import Kernel, NoSymbol, Registers, Symbols, find_root
from vtdbg.linux.kvm import CpuState, KvmState, is_linux, read_kvm
from vtdbg.targets import stub as stubs
from vtdbg.targets.port import Port
from vtdbg.targets.where import Block, Where, decide, guest_of

if TYPE_CHECKING:
    from vtdbg.targets.live import LiveMachine

UNTYPED = ("the debugger has the symbol vm_list without KVM's types (struct kvm): load the module with its debugging information, or the file that "
           "`kvm symbols` makes")
NO_ROOT = ("KVM's symbols are there, but through no page tables found `vm_list` is a list: they are of another kernel, or were loaded at "
           "other addresses")


@dataclass(frozen=True)
class Current:
    """The control block that a processor has current by KVM's objects; `evidence` which."""

    kind: str
    address: int
    evidence: str


@dataclass(frozen=True)
class Seen:
    """One processor: the debugger's `number` and `title`, its live registers, where it is.

    `cpu` is what Linux knows of it, found `by`; None without symbols, and where it is not known which of Linux' processors this is.
    """

    number: Optional[int]
    title: str
    registers: Registers
    where: Where
    cpu: Optional[CpuState] = None
    by: str = ""

    @property
    def current(self) -> Optional[Current]:
        """None where KVM says nothing, and where it says something else than what the processor's registers say."""
        cpu = self.cpu
        if cpu is None or cpu.block is None or self.conflict:
            return None
        return Current(cpu.kind, cpu.block, cpu.evidence)

    @property
    def conflict(self) -> str:
        """Where the processor is in the guest of another control block than KVM's objects say."""
        cpu, block = self.cpu, self.where.block
        if cpu is None or cpu.block is None or self.where.mode != "guest" or block is None or block.address == cpu.block:
            return ""
        return f"{cpu.evidence} (at {cpu.block:#x}) is not the {block.title} in whose guest the processor is"


class Processors:
    """Looked at when they are asked for, and kept until `forget`: the target ran, or symbols were loaded."""

    def __init__(self, machine: "LiveMachine", port: Port, linux: bool = True) -> None:
        """`linux`: the target may be one, whose symbols the debugger may have.  Where it is none, a look from another processor is slow."""
        self._machine, self._port, self._linux = machine, port, linux
        self._registers: Dict[Optional[int], Registers] = {}
        self._seen: Dict[Optional[int], Seen] = {}
        self._state: Optional[KvmState] = None
        self._asked: Optional[Symbols] = None
        self.notes: Tuple[str, ...] = ()
        """What has to be said of KVM's objects: why there are none, or which could not be read."""

    def forget(self) -> None:
        self._registers.clear()
        self._seen.clear()
        self._state, self._asked, self.notes = None, None, ()

    def look_again(self) -> None:
        """More control blocks are known to compare with."""
        self._seen.clear()

    def numbers(self) -> Dict[int, str]:
        """The debugger's numbers of the processors, with a title each."""
        found = self._port.processors()
        if found:
            return found
        number = self._port.selected()
        return {} if number is None else {number: f"processor {number}"}

    def selected(self) -> Seen:
        return self._look(self._port.selected())

    def all(self) -> List[Seen]:
        """Every processor; the debugger's selection is as before."""
        with self._machine.reading():
            return [replace(self._look(number), title=title) for number, title in self.numbers().items()]

    def unasked(self) -> List[Seen]:
        """The processors that a command looks at without being asked to."""
        return self.all() if self._linux else [self.selected()]

    def registers(self, number: Optional[int]) -> Registers:
        """The live registers of a processor."""
        if number not in self._registers:
            with self._viewed(number):
                self._registers[number] = self._machine.registers()
        return self._registers[number]

    @contextmanager
    def _viewed(self, number: Optional[int]) -> Iterator[None]:
        if number is None:
            yield
            return
        # GDB reads registers and frames when it switches: virtual reads.
        self._machine.mode.virtual()
        with self._port.viewed_from(number):
            yield

    def _look(self, number: Optional[int]) -> Seen:
        if number not in self._seen:
            live = self.registers(number)
            where = self._where(number, live)
            cpu, by = self._cpu(live, where)
            self._seen[number] = Seen(number, "", live, where, cpu, by)
        return self._seen[number]

    def _where(self, number: Optional[int], live: Registers) -> Where:
        machine = self._machine
        if not machine.readable:
            return Where("unknown", "control blocks cannot be read to compare with")
        found = decide(live, machine.blocks())
        if found.mode == "unknown" or found.candidates:
            state = self.kvm(live, found)
            if state is not None:
                for kind, address in _places(state):
                    machine.add_place(kind, address)
                found = decide(live, machine.blocks())
        if found.mode == "unknown":
            reason = machine.search()
            # What a search that was cut short has found can be enough.
            found = decide(live, machine.blocks())
            if found.mode == "unknown" and reason:
                found = Where("unknown", reason)
        unsaved = found.mode == "guest" and not found.host
        return self._narrowed(number, live, found) if found.candidates or unsaved else found

    def _narrowed(self, number: Optional[int], live: Registers, found: Where) -> Where:
        """Guests with equal tables: not those that the other processors' host state and KVM's objects give to others."""
        blocks = self._machine.blocks()
        others = {other: self.registers(other) for other in self.numbers() if other != number}
        elsewhere = [area for area in (decide(registers, blocks).area for registers in others.values()) if area is not None]
        found = decide(live, blocks, elsewhere) if elsewhere else found
        state = self.kvm(live, found)
        if not found.candidates or state is None:
            return found
        return self._by_kvm(number, live, found, state, blocks, others)

    def _by_kvm(self, number: Optional[int], live: Registers, found: Where, state: KvmState, blocks: List[Block],
                others: Dict[int, Registers]) -> Where:
        # Which of Linux' processors the other threads are, where they are in the host.
        known = {other: cpu.number for other, registers in others.items() for cpu in state.cpus if cpu.offset in _areas(registers)}
        elsewhere = list(known.values())
        running = {cpu.block: cpu for cpu in state.cpus if cpu.number not in elsewhere and cpu.vcpu is not None and cpu.vcpu.in_guest is not False}
        possible = [block for block in found.candidates if block.address in running]
        by = ", which KVM runs"
        if len(possible) > 1 and number is not None:
            names = {other: stubs.number_in(title) for other, title in self.numbers().items()}
            if any(names[other] != cpu for other, cpu in known.items()):
                # This stub does not count its processors as Linux does.
                return found
            named = names.get(number)
            possible = [block for block in possible if running[block.address].number == named]
            by = f", which KVM runs on CPU {named}, as the stub names the thread"
        return guest_of(live, possible[0], blocks, by) if len(possible) == 1 else found

    # -- what Linux knows ------------------------------------------------------------------------------------------------------

    def kvm(self, live: Optional[Registers] = None, where: Optional[Where] = None) -> Optional[KvmState]:
        """KVM's objects; None where the debugger has no symbols of them (`notes` says why, where it has some)."""
        if self._asked is not None or not self._linux:
            return self._state
        symbols = Symbols(self._port.evaluate)
        self.notes = ()
        if not is_linux(symbols):
            self._asked = symbols
            if symbols.get("&vm_list") is not None:
                self.notes = (UNTYPED,)
            return None
        try:
            root = find_root(symbols, self._machine.memory, list(self._hosts(live, where)))
            if root is None:
                # Control blocks that are found later may know the host's page tables.
                self._asked = None if where is not None and where.mode == "unknown" else symbols
                self.notes = (NO_ROOT,)
                return None
            self._state = read_kvm(Kernel(symbols, root))
            self.notes = tuple(f"KVM's objects: {note}" for note in self._state.notes)
        except (NoSymbol, MemoryUnavailable, UsageError) as error:
            self.notes = (f"KVM's objects: {error}",)
        # Last: what a Ctrl-C has cut short is asked for again.
        self._asked = symbols
        return self._state

    def _hosts(self, live: Optional[Registers], where: Optional[Where]) -> Iterator[Tuple[Registers, str]]:
        """Registers that may be the host's, the likeliest first; `find_root` believes none of them."""
        if where is not None and where.host.get("cr3") is not None:
            yield where.host, "the live registers" if where.host_source == "live" else where.host_source
        if live is not None and (where is None or where.mode == "unknown"):
            yield live, "the live registers"
        for block in self._machine.blocks():
            if block.host.get("cr3") is not None:
                yield block.host, block.title
        for number in self.numbers():
            yield self.registers(number), f"the registers of processor {number}"

    def _cpu(self, live: Registers, where: Where) -> Tuple[Optional[CpuState], str]:
        """Which of Linux' processors this is, and by what."""
        state = self.kvm(live, where)
        if state is None:
            return None, ""
        if len(state.cpus) == len(self.numbers()) == 1:
            return state.cpus[0], "being the only one"
        return _first(
            (lambda cpu: where.mode != "guest" and cpu.offset in _areas(live), "GS base"),
            (lambda cpu: where.area is not None and cpu.save_area == where.area, "host save area"),
            (lambda cpu: where.mode == "guest" and where.block is not None and cpu.block == where.block.address, "control block"),
        )(state)


def _first(*tests: Tuple[Callable[[CpuState], bool], str]) -> Callable[[KvmState], Tuple[Optional[CpuState], str]]:
    def choose(state: KvmState) -> Tuple[Optional[CpuState], str]:
        for test, by in tests:
            found = [cpu for cpu in state.cpus if test(cpu)]
            if len(found) == 1:
                return found[0], by
        return None, ""

    return choose


def _areas(live: Registers) -> Tuple[Optional[int], ...]:
    """The bases that one of which is the processor's per-CPU area: SWAPGS exchanges them on the way to user space."""
    return tuple(base for base in (live.get("gs_base"), live.get("k_gs_base")) if base)


def _places(state: KvmState) -> Iterator[Tuple[str, int]]:
    for vcpu in state.vcpus:
        for block in vcpu.blocks:
            # vmcs12 and shadow VMCSs are nobody's whom the processor enters.
            if block.address is not None and block.name not in ("vmcs12", "shadow"):
                yield block.kind, block.address
    for cpu in state.cpus:
        if cpu.save_area is not None:
            yield "hsave", cpu.save_area
