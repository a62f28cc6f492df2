"""Reading structures from memory that can have holes: what is there is used, what is not is known to be missing."""

from __future__ import annotations

from typing import Callable, List, Protocol, Tuple, Union

from vtdbg.errors import MemoryUnavailable

PAGE = 4096
ADDRESS_MASK = (1 << 64) - 1


class Readable(Protocol):
    """Anything that reads bytes by address, or raises MemoryUnavailable: physical, guest-physical or linear memory."""

    def read(self, address: int, size: int) -> bytes: ...


class Span:
    """Bytes `base` to `base + length`, read page by page when it is made.

    Where a page cannot be read whole (a stored run ends inside it), the readable bytes at its start and at its end are kept.
    """

    def __init__(self, memory: Readable, base: int, length: int) -> None:
        self.base, self.length = base, length
        self._data = bytearray(length)
        self._holes: List[Tuple[int, int, str]] = []
        self._reason = ""
        at = 0
        while at < length:
            piece = min(length - at, PAGE - (base + at) % PAGE)
            self._fetch(memory, at, piece)
            at += piece

    def _fetch(self, memory: Readable, at: int, piece: int) -> None:
        if self._read(memory, at, piece):
            return
        reason = self._reason
        before = _longest(piece, lambda size: self._read(memory, at, size))
        after = _longest(piece - before, lambda size: self._read(memory, at + piece - size, size))
        self._holes.append((at + before, at + piece - after, reason))

    def _read(self, memory: Readable, at: int, size: int) -> bool:
        try:
            self._data[at:at + size] = memory.read(self.base + at & ADDRESS_MASK, size)
        except MemoryUnavailable as error:
            self._reason = str(error)
            return False
        return True

    @property
    def complete(self) -> bool:
        return not self._holes

    def get(self, at: int, size: int) -> Union[bytes, str]:
        """The bytes at offset `at`, or why they cannot be read."""
        for first, end, reason in self._holes:
            if at < end and first < at + size:
                return reason
        return bytes(self._data[at:at + size])

    def prefix(self) -> bytes:
        """The bytes before the first hole."""
        end = min((first for first, _, _ in self._holes), default=self.length)
        return bytes(self._data[:end])


def _longest(most: int, readable: Callable[[int], bool]) -> int:
    """The largest size below `most` that is readable, by bisection: 0 where one byte is not."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if readable(middle) else (low, middle)
    return low
