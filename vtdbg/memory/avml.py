"""AVML, version 2: each range of memory behind a 32-byte header like LiME's, its bytes in a framed snappy stream, then the stream's length.

Layout: microsoft/avml src/image.rs, google/snappy framing_format.txt (both read November 2026).  A frame expands to 64 KiB at most, so
that one block is expanded when it is read; the walk over the frames is done once, when the file is opened.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from typing import List, NamedTuple, Tuple

from vtdbg.errors import MemoryUnavailable
from vtdbg.machine import Machine
from vtdbg.memory.base import Range, merge_ranges
from vtdbg.memory.chunks import Chunk, ChunkMemory
from vtdbg.memory.compression import Decompress, best_snappy
from vtdbg.memory.lime import RangeFormat, RangeHeaders
from vtdbg.memory.source import ByteSource, count_text, size_text

FORMAT = "avml"
TITLE = "AVML, compressed"

MAGIC = b"AVML"
_AVML = RangeFormat("AVML", MAGIC, 2)
_TRAILER = struct.Struct("<Q")
FRAME = 1 << 16

_COMPRESSED, _PLAIN, _STREAM = 0x00, 0x01, 0xFF
_CRC = 4


class AvmlMemory(ChunkMemory):
    """One snappy frame is one chunk; the index has 24 bytes for each 64 KiB of memory."""

    def __init__(self, source: ByteSource, frames: "_Frames", decompress: Decompress) -> None:
        super().__init__(source, FRAME)
        self._frames, self._decompress = frames, decompress

    def locate(self, address: int) -> Chunk:
        index = bisect_right(self._frames.addresses, address) - 1
        if index >= 0:
            start, size = self._frames.addresses[index], self._frames.sizes[index]
            if address < start + size:
                return Chunk(index, start, size)
        raise MemoryUnavailable(address, 1, "not in the dump")

    def load(self, chunk: Chunk) -> bytes:
        offset = self._frames.offsets[chunk.key]
        word = int.from_bytes(self._source.slice(offset, 4), "little")
        kind, size = word & 0xFF, word >> 8
        stored = bytes(self._source.slice(offset + 4 + _CRC, size - _CRC))
        if len(stored) < size - _CRC:
            raise MemoryUnavailable(chunk.address, chunk.size, "beyond the end of the file")
        try:
            data = stored if kind == _PLAIN else self._decompress(stored, FRAME)
        except ValueError as error:
            raise MemoryUnavailable(chunk.address, chunk.size, f"the snappy frame at file offset {offset:#x} does not decompress: {error}") from error
        if len(data) < chunk.size:
            raise MemoryUnavailable(chunk.address, chunk.size, f"the snappy frame at file offset {offset:#x} is too short")
        return data[:chunk.size]

    def ranges(self) -> List[Range]:
        return merge_ranges(zip(self._frames.addresses, self._frames.sizes))


class _Frames(NamedTuple):
    """Physical address, expanded size and file offset of each frame, by address."""

    addresses: "array[int]"
    sizes: "array[int]"
    offsets: "array[int]"


def recognise(header: bytes, path: str) -> bool:
    return header[:4] == MAGIC


def read(source: ByteSource) -> Machine:
    frames = _Frames(array("Q"), array("Q"), array("Q"))
    warnings: List[str] = []
    headers = RangeHeaders(source, _AVML, warnings)
    for header in headers:
        headers.next = _walk_frames(source, header.data, header.first, header.last + 1, frames, warnings)
        if warnings:
            break
    frames, dropped = _by_address(frames)
    if dropped:
        warnings.append(f"{count_text(dropped, 'frame')} that overlap an earlier range left out")
    total = sum(frames.sizes)
    if not total:
        raise source.error("an AVML file that ends before its first byte of memory; the copy is cut", 0)
    details = {"file size": size_text(source.size), "ranges": str(headers.count), "compression": "snappy"}
    return Machine(AvmlMemory(source, frames, best_snappy()), os.path.basename(source.path), FORMAT,
                   f"AVML, {size_text(total)} in {count_text(headers.count, 'range')}", [], details, warnings)


def _walk_frames(source: ByteSource, at: int, address: int, end: int, frames: _Frames, warnings: List[str]) -> int:
    """Index the frames of one range; returns where the next range header is.  A cut file ends in a warning."""
    begin = at
    while address < end:
        head = bytes(source.slice(at, 13))
        if len(head) < 4:
            warnings.append(f"the file is cut: {size_text(end - address)} of memory from {address:#x} on are missing; reads of them fail")
            return source.size
        kind, size = head[0], int.from_bytes(head[1:4], "little")
        if kind == _STREAM:
            if head[4:10] != b"sNaPpY"[:len(head) - 4]:
                raise source.error("a snappy stream that does not begin with sNaPpY: the file is damaged", at)
        elif kind in (_COMPRESSED, _PLAIN):
            expanded = _expanded_size(source, at, kind, size, head)
            if at + 4 + size > source.size:
                warnings.append(f"the file is cut: {size_text(end - address)} of memory from {address:#x} on are missing; reads of them fail")
                return source.size
            frames.addresses.append(address)
            frames.sizes.append(min(expanded, end - address))
            frames.offsets.append(at)
            address += expanded
        elif kind < 0x80:
            raise source.error(f"a snappy frame of unknown type {kind:#x}: the file is damaged", at)
        at += 4 + size
    trailer = source.slice(at, _TRAILER.size)
    if len(trailer) < _TRAILER.size:
        warnings.append(f"the file is cut: it ends inside the trailer of the range that ends at {end:#x}; later ranges, if any, are missing")
    elif _TRAILER.unpack(trailer)[0] != at - begin:
        raise source.error(f"the snappy stream of a range has {at - begin:#x} bytes, its trailer says {_TRAILER.unpack(trailer)[0]:#x}: "
                           "the file is damaged", at)
    return at + _TRAILER.size


def _expanded_size(source: ByteSource, at: int, kind: int, size: int, head: bytes) -> int:
    """How many bytes a data frame expands to: its own length, or the number that the snappy block begins with."""
    if size < _CRC:
        raise source.error(f"a snappy frame of {size} bytes: too short for its checksum; the file is damaged", at)
    expanded = size - _CRC
    if kind == _COMPRESSED:
        expanded = 0
        for position, byte in enumerate(head[4 + _CRC:]):
            expanded |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                break
    if expanded == 0:
        raise source.error("a snappy frame that expands to nothing: the file is damaged", at)
    if expanded > FRAME:
        raise source.error(f"a snappy frame of {expanded} bytes: more than 64 KiB; the file is damaged", at)
    return expanded


def _by_address(frames: _Frames) -> Tuple[_Frames, int]:
    """Sorted by address, and the number of frames that were dropped because they overlap the one before."""
    addresses, sizes = frames.addresses, frames.sizes
    if all(addresses[i] + sizes[i] <= addresses[i + 1] for i in range(len(addresses) - 1)):
        return frames, 0
    out, end = _Frames(array("Q"), array("Q"), array("Q")), 0
    for index in sorted(range(len(addresses)), key=addresses.__getitem__):
        if addresses[index] >= end:
            out.addresses.append(addresses[index])
            out.sizes.append(sizes[index])
            out.offsets.append(frames.offsets[index])
            end = addresses[index] + sizes[index]
    return out, len(addresses) - len(out.addresses)
