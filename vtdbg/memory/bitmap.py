"""A bitmap of pages in a file: which pages are stored, and the how-manyth a stored page is."""

from __future__ import annotations

import re
from array import array
from typing import Callable, Iterator, List, Optional, Tuple

from vtdbg.memory.source import ByteSource

_BLOCK = 256                    # bytes of bitmap for each entry of the index: 2,048 pages, 8 MiB of memory
_CHUNK = 1 << 16

_STRETCH = re.compile(rb"\x00+|\xff+|[^\x00\xff]+", re.DOTALL)


def _count_slowly(number: int) -> int:
    return bin(number).count("1")


_count: Callable[[int], int] = getattr(int, "bit_count", _count_slowly)      # Python 3.10 has int.bit_count

_RUNS_OF_BYTE: "List[Tuple[Tuple[int, int], ...]]" = [
    tuple((m.start(), m.end()) for m in re.finditer("1+", f"{value:08b}"[::-1])) for value in range(256)]


class PageBitmap:
    """`bits` bits from `offset` of the file, the least significant bit of each byte first.  Read in place; the index is 8 bytes for
    each 8 MiB of memory."""

    def __init__(self, source: ByteSource, offset: int, bits: int) -> None:
        self._source, self._offset, self.bits = source, offset, bits
        self._before = array("Q")
        total = 0
        size = (bits + 7) // 8
        for chunk_at in range(0, size, _CHUNK):
            chunk = self._bytes(chunk_at, min(_CHUNK, size - chunk_at))
            empty = chunk.count(0) == len(chunk)
            for at in range(0, len(chunk), _BLOCK):
                self._before.append(total)
                if not empty:
                    total += _count(int.from_bytes(chunk[at:at + _BLOCK], "little"))
        self.total = total
        """Number of set bits."""

    def _bytes(self, at: int, count: int) -> bytes:
        """Bytes of the bitmap, with the bits after the last one cleared."""
        data = bytes(self._source.slice(self._offset + at, count))
        if (at + count) * 8 > self.bits:
            keep = self.bits - at * 8
            data = (int.from_bytes(data, "little") & ((1 << keep) - 1)).to_bytes(count, "little")
        return data

    def rank(self, index: int) -> Optional[int]:
        """How many set bits precede bit `index`; None if bit `index` is not set (or does not exist)."""
        if not 0 <= index < self.bits:
            return None
        block, bit = divmod(index, _BLOCK * 8)
        whole, part = divmod(bit, 8)
        data = self._source.slice(self._offset + block * _BLOCK, whole + 1)
        if len(data) <= whole or not data[whole] >> part & 1:
            return None
        return self._before[block] + _count(int.from_bytes(data, "little") & ((1 << bit) - 1))

    def __contains__(self, index: int) -> bool:
        if not 0 <= index < self.bits:
            return False
        data = self._source.slice(self._offset + index // 8, 1)
        return len(data) == 1 and bool(data[0] >> index % 8 & 1)

    def runs(self) -> Iterator[Tuple[int, int]]:
        """(first, count) of each run of set bits."""
        size = (self.bits + 7) // 8
        start = end = 0
        for chunk_at in range(0, size, _CHUNK):
            chunk = self._bytes(chunk_at, min(_CHUNK, size - chunk_at))
            for match in _STRETCH.finditer(chunk):
                at = (chunk_at + match.start()) * 8
                kind = chunk[match.start()]
                if kind == 0:
                    continue
                if kind == 0xFF:
                    pieces = [(at, (chunk_at + match.end()) * 8)]
                else:
                    pieces = [(at + n * 8 + first, at + n * 8 + last) for n, byte in enumerate(match.group()) for first, last in _RUNS_OF_BYTE[byte]]
                for first, last in pieces:
                    if first == end:
                        end = last
                        continue
                    if end > start:
                        yield start, end - start
                    start, end = first, last
        if end > start:
            yield start, end - start
