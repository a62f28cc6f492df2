"""Memory that has to be decompressed: chunk by chunk, when a chunk is asked for, with a bounded cache."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from typing import Iterator, NamedTuple, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.memory.source import ByteSource

CACHE_BYTES = 16 << 20
_PIECE = 1 << 20
_WHOLE = 1 << 16              # a chunk of this size is a view of its own


class Chunk(NamedTuple):
    """What is decompressed at once: `key` finds it in the file, `address` and `size` are physical."""

    key: int
    address: int
    size: int


class ChunkMemory(PhysicalMemory):
    """Subclasses say where a chunk is and how it is decompressed."""

    def __init__(self, source: ByteSource, chunk_size: int) -> None:
        self._source = source
        self._limit = max(CACHE_BYTES // chunk_size, 1)
        self._cache: "OrderedDict[int, bytes]" = OrderedDict()

    @abstractmethod
    def locate(self, address: int) -> Chunk:
        """The chunk that holds `address`; MemoryUnavailable(address, 1, why) where none does."""

    @abstractmethod
    def load(self, chunk: Chunk) -> bytes:
        """All bytes of the chunk; MemoryUnavailable where the file does not hold them undamaged."""

    def read(self, address: int, size: int) -> bytes:
        if size < 0 or address < 0:
            raise MemoryUnavailable(address, size, "negative address or size")
        wanted, end, pieces = address, address + size, []
        while wanted < end:
            try:
                chunk = self.locate(wanted)
                data = self._cached(chunk)
            except MemoryUnavailable as error:
                raise MemoryUnavailable(wanted, end - wanted, error.reason) from None
            piece = data[wanted - chunk.address:end - chunk.address]
            if not piece:
                raise MemoryUnavailable(wanted, end - wanted, "a chunk is shorter than its index says")
            pieces.append(piece)
            wanted += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _cached(self, chunk: Chunk) -> bytes:
        data = self._cache.get(chunk.key)
        if data is None:
            data = self.load(chunk)
            self._cache[chunk.key] = data
            if len(self._cache) > self._limit:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(chunk.key)
        return data

    def views(self) -> Iterator[Tuple[int, memoryview]]:
        """Decompressed pieces of at most about 1 MiB; what cannot be decompressed is left out.  The cache stays as it is."""
        piece, start = bytearray(), 0
        for first, length in self.ranges() or ():
            at, end = first, first + length
            while at < end:
                try:
                    chunk = self.locate(at)
                    data = self.load(chunk)[at - chunk.address:end - chunk.address]
                except MemoryUnavailable:
                    at = (at & -PAGE_SIZE) + PAGE_SIZE
                    continue
                if not piece and len(data) >= _WHOLE and not at % PAGE_SIZE and not len(data) % PAGE_SIZE:
                    yield at, memoryview(data)
                    at += len(data)
                    continue
                if piece and (start + len(piece) != at or len(piece) >= _PIECE):
                    yield start, memoryview(piece)
                    piece = bytearray()
                if not piece:
                    start = at
                piece += data
                at += len(data)
        if piece:
            yield start, memoryview(piece)

    def close(self) -> None:
        self._cache.clear()
        self._source.close()
