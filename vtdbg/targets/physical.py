"""Physical memory through a debugger: the stub's physical mode is on only while bytes are read, and put back whatever happens."""

from __future__ import annotations

import binascii
from contextlib import contextmanager
from typing import Iterator, List, Optional

from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory, Range
from vtdbg.targets.interrupts import carried_out
from vtdbg.targets.port import Port, TargetError, TargetGone, Unsupported
from vtdbg.targets.stub import NO_PHYSICAL, QUERY, SET, Dialect

REACH = 1 << 52
LARGEST, SMALLEST = 0x8000, 0x40
"""Bytes of one packet: QEMU up to 8.1 refuses more than 0x800, newer ones take 0x8000 and more."""
TOO_LONG = b"E22"


class PhysicalMode:
    """The stub's switch between virtual and physical reads.

    QEMU keeps it when the debugger disconnects, and every later virtual read of anybody would then be a physical one.  So it is asked before
    it is changed, put back in `finally`, and read back.  Within `held` it stays on between reads and goes off at the first `virtual` or at the end.
    """

    def __init__(self, port: Port, dialect: Dialect) -> None:
        self.port, self.dialect = port, dialect
        self._before: Optional[bytes] = None
        self._depth = 0
        self.abandoned = False
        """The connection was lost while memory packets were physical."""

    @property
    def switched(self) -> bool:
        return self._before is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The reads inside share one switch."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.virtual()

    def physical(self) -> None:
        """From here on memory packets are physical; only inside `held`."""
        if self._before is not None:
            return
        if not self.dialect.physical:
            raise Unsupported(NO_PHYSICAL)
        if not self._depth:
            raise RuntimeError("physical mode outside of held()")
        if self.dialect.physical == "mode":
            before = self.port.packet(QUERY)
            if before not in (b"0", b"1"):
                raise TargetError(f"the stub does not say whether its memory packets are physical ({before[:20]!r})")
            # Noted first: a Ctrl-C that arrives while the packet is out must find that there is something to put back.
            self._before = before
            if before == b"0":
                self._expect(SET + "1")
        else:
            self._before = b"0"
            self.port.monitor("phys")

    def virtual(self) -> None:
        """As it was before `physical`.  A Ctrl-C in between waits until it is done; TargetGone where the connection is lost."""
        if self._before is not None:
            carried_out(self._put_back)

    def _put_back(self) -> None:
        before, now = self._before, self._before
        try:
            if self.dialect.physical == "monitor":
                self.port.monitor("virt")
            elif before == b"0":
                self._expect(SET + "0")
                now = self.port.packet(QUERY)
        except TargetGone:
            # Nobody is there to be told; the next connection finds the mode as it is and says so.
            self.abandoned = self.abandoned or before == b"0"
            self._before = None
            raise
        self._before = None
        if now != before:
            raise TargetError(f"the stub did not go back to virtual reads (PhyMemMode is {now!r}): do it by `maintenance packet {SET}0`")

    def _expect(self, packet: str) -> None:
        answer = self.port.packet(packet)
        if answer != b"OK":
            raise TargetError(f"the stub refuses {packet} ({answer[:20]!r})")


class StubMemory(PhysicalMemory):
    """Physical memory by `m` packets of the remote protocol.

    The packets go past the debugger's own caches: GDB's code cache is not flushed when the mode changes.  `known` is what exists; QEMU answers
    zeros for what does not.  None where nobody says, then whatever the stub answers is taken.
    """

    def __init__(self, mode: PhysicalMode, known: Optional[List[Range]]) -> None:
        self._mode, self._known = mode, known
        self._port, self._chunk = mode.port, LARGEST

    def ranges(self) -> Optional[List[Range]]:
        return self._known

    @property
    def remote(self) -> bool:
        return True

    def read(self, address: int, size: int) -> bytes:
        if size < 0 or address < 0 or address + size > REACH:
            raise MemoryUnavailable(address, size, "no physical address")
        self._check(address, size)
        if self._mode.switched:
            return self._pieces(address, size)
        with self._mode.held():
            self._mode.physical()
            return self._pieces(address, size)

    def _pieces(self, address: int, size: int) -> bytes:
        pieces, at, end = [], address, address + size
        while at < end:
            pieces.append(self._piece(at, min(self._chunk, end - at)))
            at += len(pieces[-1])
        return b"".join(pieces)

    def _piece(self, address: int, size: int) -> bytes:
        answer = self._port.packet(f"m{address:x},{size:x}")
        if len(answer) == 2 * size:
            try:
                return binascii.unhexlify(answer)
            except ValueError:
                pass
        if answer[:1] == b"E" and size > 1:
            if answer == TOO_LONG:
                self._chunk = min(self._chunk, max(size // 2, SMALLEST))
            if size > SMALLEST:
                half = size // 2
                return self._piece(address, half) + self._piece(address + half, size - half)
        return self._refused(address, size, answer)

    @staticmethod
    def _refused(address: int, size: int, answer: bytes) -> bytes:
        raise MemoryUnavailable(address, size, f"the stub answers {answer[:20].decode('ascii', 'replace')!r}")

    def _check(self, address: int, size: int) -> None:
        if self._known is None:
            return
        wanted, end = address, address + size
        for start, length in self._known:
            if start <= wanted < start + length:
                wanted = start + length
        if wanted < end:
            raise MemoryUnavailable(wanted, end - wanted, "no RAM there (by the emulator's memory map; the stub would answer zeros)")


class PortMemory(PhysicalMemory):
    """Physical memory of a debugger that reads it itself."""

    def __init__(self, port: Port, known: Optional[List[Range]]) -> None:
        self._port, self._known = port, known

    def ranges(self) -> Optional[List[Range]]:
        return self._known

    def read(self, address: int, size: int) -> bytes:
        if size < 0 or address < 0 or address + size > REACH:
            raise MemoryUnavailable(address, size, "no physical address")
        return self._port.read_physical(address, size)


class NoMemory(PhysicalMemory):
    """The memory of a target whose stub cannot read physical addresses: every read says why."""

    def ranges(self) -> Optional[List[Range]]:
        return None

    def read(self, address: int, size: int) -> bytes:
        raise Unsupported(NO_PHYSICAL)


PAGES_IN_CACHE = (64 << 20) // PAGE_SIZE
