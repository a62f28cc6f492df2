"""A live target as a Machine: its memory by the best way there is, its processors, and in the header where the processor is."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from vtdbg.errors import MemoryUnavailable, UsageError, VtdbgError
from vtdbg.linux.kvm import KvmState
from vtdbg.machine import Cpu, Machine
from vtdbg.memory.base import CachedMemory, PhysicalMemory, Range
from vtdbg.numbers import size_text
from vtdbg.targets import stub as stubs
from vtdbg.targets.fast import FastMemory, NoFastPath, fast_memory
from vtdbg.targets.physical import PAGES_IN_CACHE, NoMemory, PhysicalMode, PortMemory, StubMemory
from vtdbg.targets.port import Port, TargetError, TargetGone, Unsupported
from vtdbg.targets.processors import Processors
from vtdbg.targets.where import Block, Where, of_host_save_area, of_vmcb, of_vmcs

SCANNED = 16 << 20
"""Bytes of RAM that are searched for control blocks without being asked, where every byte comes through the stub."""
SEARCH_SECONDS = 3.0
"""How long more than that is searched, once a connection."""
PUT_OFF = ("no control block known so far decides it, and the memory, which comes through the stub, was not searched: `vmcs list` and "
           "`vmcb list` do that")
NOT_SEARCHED = ("none of the control blocks in the first {covered} of {total} is this processor's; the rest takes about {seconds} s through the "
                "stub: type `vmcs list --scan all` or `vmcb list --scan all`, or name one by `vmcs dump ADDRESS`, `vmcb dump ADDRESS`")
NO_RANGES = ("which memory exists is not known, so it was not searched for control blocks: name one by `vmcs dump ADDRESS` or `vmcb dump ADDRESS`, "
             "or search a part by `vmcs list --scan A-B`")
THROUGH_GUEST = ("{expression}: the debugger has read memory for it through the page tables of the guest that the processor is in; what the "
                 "hypervisor has at such an address it does not read")
NOT_LOOKED = -1
"""The number of no processor."""
LEFT_PHYSICAL = ("the stub's memory packets were physical before this command (an earlier client left it so): virtual reads of every debugger "
                 "show physical memory; `maintenance packet Qqemu.PhyMemMode:0` ends it")


KINDS = {"vmcb": "vmcb", "host-save-area": "hsave", "vmcs": "vmcs"}


class _TimeOver(Exception):
    """A search has used up its time."""


class LiveMemory(PhysicalMemory):
    """The target's physical memory; `drop` when it has run."""

    def __init__(self, machine: "LiveMachine", memory: PhysicalMemory) -> None:
        self._machine, self.memory = machine, memory

    def read(self, address: int, size: int) -> bytes:
        return self.memory.read(address, size)

    def read_page(self, address: int) -> bytes:
        return self.memory.read_page(address)

    def ranges(self) -> Optional[List[Range]]:
        return self.memory.ranges()

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        return self.memory.views()

    @property
    def remote(self) -> bool:
        return self.memory.remote

    def drop(self) -> None:
        self._machine.ran()
        if isinstance(self.memory, CachedMemory):
            self.memory.drop()

    def close(self) -> None:
        self._machine.release()


class LiveMachine(Machine):
    """What is behind a port.  `refresh` before each command: after the target ran, where it is has to be found out again.

    `where` and `cpus` depend on whether the processor is in the host: who asks for them has the memory searched for control blocks where nothing
    else tells (`settle`).  The header does not: where that takes seconds it says that it was not done.
    """

    _wanted = _put_off = False
    _where = Where("unknown", "not looked at yet")
    _cpus: "Sequence[Cpu]" = ()

    def __init__(self, port: Port, fast: bool = True, places: "Sequence[Tuple[str, int]]" = ()) -> None:
        """`places`: (kind, address) of control blocks that were found in this target before; they are read again."""
        self.port = port
        self.dialect = stubs.probe(port)
        self.mode = PhysicalMode(port, self.dialect)
        self.stale, self._searched, self._unsearched = True, False, ""
        self._number: Optional[int] = NOT_LOOKED
        self.processors = Processors(self, port)
        self.places: List[Tuple[str, int]] = list(places)
        self._left = self._mode_notes()
        self._fast, self._map, self._map_is_new = fast, self._memory_map(), True
        memory, how = self._memory()
        super().__init__(LiveMemory(self, memory), port.endpoint() or port.name, "live", live=True)
        self.details = {"debugger": port.name, "stub": self.dialect.title, "physical memory": how}
        if isinstance(memory, NoMemory):
            # The one thing that a user has to know; every read says it too.
            self._left.append(stubs.NO_PHYSICAL)

    def _mode_notes(self) -> List[str]:
        physical = self.dialect.physical == "mode" and self.port.packet(stubs.QUERY) == b"1"
        return [LEFT_PHYSICAL] if physical else []

    def _memory(self) -> Tuple[PhysicalMemory, str]:
        known = self.port.physical_ranges()
        if not self.dialect.physical:
            if known is None and not self._own_reads():
                return NoMemory(), "none"
            return CachedMemory(PortMemory(self.port, known), PAGES_IN_CACHE), f"by {self.port.name}"
        if self._map:
            known = stubs.ram_ranges(self._map) or None
        slow = CachedMemory(StubMemory(self.mode, known), PAGES_IN_CACHE)
        if self._fast and self.dialect.name == "qemu":
            try:
                with self.mode.held():
                    quick: FastMemory = fast_memory(self.port, slow, stubs.ram_blocks(self._map))
                slow.drop()
                return quick, quick.how + " (checked against the stub; --no-fast turns it off)"
            except NoFastPath as error:
                return slow, f"by packets of the stub; no fast path: {error}"
        return slow, "by packets of the stub"

    def _memory_map(self) -> str:
        return self.port.monitor("info mtree -f") if self.dialect.name == "qemu" and self.dialect.monitor else ""

    def _mapped_anew(self) -> None:
        """Guests move what is at an address while they run: ROM gives way to RAM, a PCI device's memory is put elsewhere."""
        new, self._map_is_new = self._map_is_new, False
        if new or not isinstance(self.memory, LiveMemory) or not self._map:
            return
        before, self._map = self._map, self._memory_map()
        if self._map == before:
            return
        old = self.memory.memory
        try:
            self.memory.memory, self.details["physical memory"] = self._memory()
        except BaseException:
            # A Ctrl-C: the map is that of the memory that is kept, or the next command would take it for up to date.
            self._map = before
            raise
        old.close()

    def _own_reads(self) -> bool:
        try:
            self.port.read_physical(0, 1)
        except Unsupported:
            return False
        except (TargetError, MemoryUnavailable):
            return True
        return True

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The physical reads inside share one switch of the stub's mode, undone at the end whatever happens."""
        with self.mode.held():
            yield

    def registers(self) -> "Dict[str, Optional[int]]":
        """The selected processor's, live: a guest's in guest mode."""
        self.mode.virtual()
        return dict(stubs.all_registers(self.port, self.dialect))

    def host_registers(self) -> "Mapping[str, Optional[int]]":
        self.refresh()
        return self.where.host if self.where.mode != "unknown" else {}

    @property
    def where(self) -> Where:
        """Where the selected processor is."""
        self.settle()
        return self._where

    @where.setter
    def where(self, found: Where) -> None:
        self._where = found

    @property
    def cpus(self) -> List[Cpu]:
        """The selected processor, with the host's registers."""
        self.settle()
        return list(self._cpus)

    @cpus.setter
    def cpus(self, found: Sequence[Cpu]) -> None:
        self._cpus = found

    def ran(self) -> None:
        """The target ran, or somebody wrote to it: nothing that was found out is still true."""
        self.stale, self._wanted = True, False

    def settle(self) -> None:
        """Searches the memory, where that was put off because it takes some seconds: something depends on where the processor is."""
        self._wanted = True
        if self._put_off:
            self.stale = True
            self.refresh()

    def refresh(self) -> None:
        """Finds out again where the selected processor is; nothing where the target has not run and no other processor was selected since."""
        number = self.port.selected()
        if not self.stale and number == self._number:
            return
        with self.reading():
            if self.stale:
                self.processors.forget()
                self._searched = self._put_off = False
                self._mapped_anew()
            seen = self.processors.selected()
        # Not by the properties, which settle.
        self._where = where = seen.where
        self._cpus, self._number = [Cpu(0 if number is None else number, where.host, f"{self.port.name}, {where.host_source}")], number
        whose = f", processor {number}" if number is not None else ""
        current = seen.current
        by_kvm = f"; current is the {current.kind.upper()} at {current.address:#x}: {current.evidence}" if current is not None else ""
        self.provenance = f"live, {self.dialect.title} at {self.name}{whose}: {where.text}{by_kvm}"
        self.warnings = [*self._left, *where.notes, *([seen.conflict] if seen.conflict else []), *self.processors.notes]
        self.stale = False

    def current(self, kind: str) -> Optional[int]:
        self.refresh()
        found = self.processors.selected().current
        return found.address if found is not None and found.kind == kind else None

    def kvm(self) -> Optional[KvmState]:
        """KVM's objects, where the debugger has symbols of them."""
        with self.reading():
            return self.processors.kvm()

    def kind_of(self, address: int) -> str:
        state = self.kvm()
        found = state.by_address.get(address) if state is not None else None
        return found[1].kind if found is not None else ""

    def owner(self, address: int) -> str:
        state = self.kvm()
        found = state.by_address.get(address) if state is not None else None
        return f"{found[0].title}, {found[1].name}" if found is not None else ""

    @property
    def readable(self) -> bool:
        """Is there a way to physical memory?"""
        return not (isinstance(self.memory, LiveMemory) and isinstance(self.memory.memory, NoMemory))

    def blocks(self) -> List[Block]:
        """The control blocks that are known, as they are in memory now."""
        found = []
        for kind, address in self.places:
            try:
                found += _block_in(kind, address, self.memory.read_page(address))
            except TargetGone:
                raise
            except VtdbgError:
                continue
        return found

    def add_place(self, kind: str, address: int) -> None:
        if (kind, address) not in self.places:
            self.places.append((kind, address))

    def search(self) -> str:
        """Searches the memory for control blocks, once a stop; where every byte comes through the stub not for long, once a connection, and only
        for what depends on it (`settle`).

        Says what to type where it has not seen all.
        """
        ranges = self.memory.ranges()
        if ranges is None:
            return NO_RANGES
        total = sum(length for _, length in ranges)
        quick = total <= SCANNED or isinstance(self.memory, LiveMemory) and isinstance(self.memory.memory, FastMemory)
        if self._searched or self._unsearched:
            return self._unsearched
        if not quick and not self._wanted:
            self._put_off = True
            return PUT_OFF
        found, covered = self._search(None if quick else SEARCH_SECONDS)
        self.places = [*found, *(place for place in self.places if place not in found)]
        if covered is not None:
            seconds = (total - covered) * SEARCH_SECONDS / max(covered, 1)
            sizes = {"covered": size_text(covered & -(1 << 20)), "total": size_text(total & -(1 << 20))}
            self._unsearched = NOT_SEARCHED.format(seconds=f"{seconds:.0f}", **sizes)
        self._searched = True
        return self._unsearched

    def _search(self, seconds: Optional[float]) -> "Tuple[List[Tuple[str, int]], Optional[int]]":
        """(kind, address) of what was found, and how many bytes were searched where the time was over before the end."""
        from vtdbg.scanner import scan

        found: List[Tuple[str, int]] = []
        end = None if seconds is None else time.monotonic() + seconds
        scanned = 0

        def watch(count: int) -> None:
            nonlocal scanned
            scanned = count
            if end is not None and time.monotonic() > end:
                raise _TimeOver

        try:
            for item in scan(self.memory, progress=watch):
                if item.classification in KINDS:
                    found.append((KINDS[item.classification], item.address))
        except _TimeOver:
            return found, scanned
        return found, None

    def consider(self, kind: str, address: int) -> None:
        """A control block that the user named or a scan found (`kind` as the scan classifies it): compared with when the mode is decided."""
        kind = KINDS.get(kind, "")
        if kind and (kind, address) not in self.places:
            self.places.append((kind, address))
            if self._where.mode == "unknown":
                self.processors.look_again()
                self._number, self._put_off = NOT_LOOKED, False

    def look_from(self, symbols: Sequence[str], thread: Optional[int]) -> None:
        """Has the debugger load files of symbols, and select a processor."""
        for path in symbols:
            self.port.load_symbols(path)
            self.stale = True
        if thread is not None and thread != self.port.selected():
            known = self.port.processors()
            if thread not in known:
                raise UsageError(f"there is no processor {thread}; there are {', '.join(str(number) for number in known)} (`where`)")
            self.mode.virtual()
            self.port.select(thread)

    def evaluate(self, expression: str) -> int:
        """An expression of the debugger's; `warnings` say where its value may not be the hypervisor's."""
        self.mode.virtual()
        value = self.port.evaluate(expression)
        doubt = self.doubt(expression)
        if doubt and doubt not in self.warnings:
            self.warnings.append(doubt)
        return value

    def doubt(self, expression: str) -> str:
        """What has to be said of the value that the debugger has just given; empty for nothing."""
        if self._where.mode != "guest":
            return ""
        self.mode.virtual()
        return THROUGH_GUEST.format(expression=expression) if self.port.reads_memory(expression) else ""

    def release(self) -> None:
        """Puts the stub's mode back and lets go of the target without resuming it."""
        memory = self.memory.memory if isinstance(self.memory, LiveMemory) else self.memory
        memory.close()
        try:
            self.mode.virtual()
        finally:
            self.port.close()


def _block_in(kind: str, address: int, page: bytes) -> List[Block]:
    """The control block if it is there: people name pages that hold none, memory is used for something else, and a page of zeros has the tables
    of a processor that was just reset.  FormatError for a page that is no VMCS."""
    from vtdbg.svm.recognise import taken_for
    from vtdbg.svm.vmcb import Vmcb
    from vtdbg.vmx.vmcs import Vmcs

    if kind == "vmcs":
        return [of_vmcs(address, Vmcs.from_page(page))]
    if KINDS.get(taken_for(page)) != kind:
        return []
    return [(of_vmcb if kind == "vmcb" else of_host_save_area)(address, Vmcb.from_page(page))]


def connect(source: str, fast: bool = True, symbols: Sequence[str] = (), thread: Optional[int] = None) -> LiveMachine:
    """The live machine of "gdb:HOST:PORT", through a gdb of our own that has loaded the files `symbols` and looks from processor `thread`.

    Raises UsageError and TargetError in one line.
    """
    endpoint = source[len("gdb:"):]
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{source!r}: write gdb:HOST:PORT, for instance gdb:127.0.0.1:1234")
    from vtdbg.targets.mi import MiPort

    made = MiPort(endpoint)
    try:
        machine = LiveMachine(made, fast)
        machine.look_from(symbols, thread)
        machine.refresh()
        return machine
    except BaseException:
        made.close()
        raise
