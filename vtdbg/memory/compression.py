"""Decompression of one page or block: zlib by the standard library, LZO1X and snappy here in Python, zstd by whichever package is there.

A compiled package is used where it can be imported.  Every function takes (data, limit) and gives at most `limit` bytes or raises ValueError.
Formats: Linux Documentation/staging/lzo.rst; google/snappy format_description.txt and framing_format.txt (both read November 2026).
"""

from __future__ import annotations

import importlib
import zlib
from types import ModuleType
from typing import Callable, Optional

Decompress = Callable[[bytes, int], bytes]

ZSTD_HELP = "pip install zstandard (or use Python 3.14, which has it)"


def inflate(data: bytes, limit: int) -> bytes:
    """zlib (RFC 1950), as kdump's "compressed" pages are."""
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(out) > limit:
        raise ValueError(f"more than {limit} bytes come out")
    if not stream.eof:
        raise ValueError("the compressed data are cut")
    return out


def unsnappy(data: bytes, limit: int) -> bytes:
    """One raw snappy block."""
    size, at = _snappy_length(data)
    if size > limit:
        raise ValueError(f"a block of {size} bytes where at most {limit} fit")
    out = bytearray()
    end = len(data)
    while at < end:
        tag = data[at]
        at += 1
        kind = tag & 3
        if kind == 0:
            length = (tag >> 2) + 1
            if length > 60:
                extra = length - 60
                length = int.from_bytes(data[at:at + extra], "little") + 1
                at += extra
            if at + length > end or len(out) + length > size:
                raise ValueError("a literal runs over the end of the block")
            out += data[at:at + length]
            at += length
            continue
        if kind == 1:
            length, width = (tag >> 2 & 7) + 4, 1
        else:
            length, width = (tag >> 2) + 1, 2 if kind == 2 else 4
        if at + width > end:
            raise ValueError("the block ends inside a copy")
        distance = int.from_bytes(data[at:at + width], "little")
        if kind == 1:
            distance |= tag >> 5 << 8
        at += width
        _copy(out, distance, length, size)
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes came out of a block of {size}")
    return bytes(out)


def unlzo(data: bytes, limit: int) -> bytes:
    """One LZO1X block (no header, as kdump stores it).  Written out in one loop: this is what scanning a dump of RHEL's kdump waits for."""
    out = bytearray()
    end, made = len(data), 0
    at, state = 0, 0
    try:
        if data[0] > 17:
            # The first byte alone may be a run of literals: fewer than 4 count as literals after a match.
            tail, at, state = data[0] - 17, 1, min(data[0] - 17, 4)
        else:
            tail = 0
        while True:
            if tail:
                made += tail
                if made > limit or at + tail > end:
                    raise ValueError("literals run over the end of the data or of the page")
                out += data[at:at + tail]
                at += tail
            code = data[at]
            at += 1
            if code >= 64:
                length = (code >> 5) + 1
                distance = (data[at] << 3) + (code >> 2 & 7) + 1
                at += 1
                tail = code & 3
            elif code >= 16:
                near = code >= 32
                length = code & (31 if near else 7)
                if not length:
                    length, at = _lzo_length(data, at, 31 if near else 7, limit)
                length += 2
                low = data[at] | data[at + 1] << 8
                at += 2
                tail = low & 3
                distance = (low >> 2) + (1 if near else 16384 + ((code & 8) << 11))
                if distance == 16384 and not near:
                    return bytes(out)
            elif state == 0:
                tail = code + 3
                if not code:
                    tail, at = _lzo_length(data, at, 18, limit)
                state = 4
                continue
            else:
                length = 3 if state == 4 else 2
                distance = (data[at] << 2) + (code >> 2) + (2049 if state == 4 else 1)
                at += 1
                tail = code & 3
            state = tail
            start = made - distance
            made += length
            if start < 0 or made > limit:
                raise ValueError("a copy from before the beginning or over the end of the page")
            if distance >= length:
                out += out[start:start + length]
            else:
                # The copy overlaps what it writes: the last `distance` bytes, repeated.
                out += (out[start:] * (length // distance + 1))[:length]
    except IndexError:
        raise ValueError("the data end without an end mark") from None


def unzstd_or_none() -> Optional[Decompress]:
    """A zstd decompressor out of the packages that can be imported, or None."""
    for name in ("compression.zstd", "backports.zstd"):
        module = _import(name)
        if module is not None:
            return _unzstd_standard(module)
    module = _import("zstandard")
    return _unzstd_zstandard(module) if module is not None else None


def best_snappy() -> Decompress:
    """python-snappy where it is installed, else `unsnappy`."""
    module = _import("snappy")
    if module is None:
        return unsnappy

    def decompress(data: bytes, limit: int) -> bytes:
        size, _ = _snappy_length(data)
        if size > limit:
            raise ValueError(f"a block of {size} bytes where at most {limit} fit")
        try:
            return bytes(module.uncompress(data))
        except module.UncompressError as error:
            raise ValueError(str(error)) from error
    return decompress


def best_lzo() -> Decompress:
    """python-lzo where it is installed, else `unlzo`."""
    module = _import("lzo")
    if module is None or not hasattr(module, "decompress"):
        return unlzo

    def decompress(data: bytes, limit: int) -> bytes:
        try:
            return bytes(module.decompress(data, False, limit))  # noqa: FBT003 (C function)
        except module.error as error:
            raise ValueError(str(error)) from error
    return decompress


def _import(name: str) -> Optional[ModuleType]:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _unzstd_standard(module: ModuleType) -> Decompress:
    def decompress(data: bytes, limit: int) -> bytes:
        try:
            return bytes(module.ZstdDecompressor().decompress(data, limit))
        except (module.ZstdError, EOFError) as error:
            raise ValueError(str(error)) from error
    return decompress


def _unzstd_zstandard(module: ModuleType) -> Decompress:
    def decompress(data: bytes, limit: int) -> bytes:
        try:
            # The frame's own size is what this package allocates, so it is looked at first.
            if module.frame_content_size(data) > limit:
                raise ValueError(f"a frame of more than {limit} bytes")
            return bytes(module.ZstdDecompressor().decompress(data, max_output_size=limit))
        except module.ZstdError as error:
            raise ValueError(str(error)) from error
    return decompress


def _snappy_length(data: bytes) -> "tuple[int, int]":
    """(uncompressed size, where the elements begin): a little-endian base-128 number of at most 32 bits."""
    size = 0
    for at in range(min(5, len(data))):
        size |= (data[at] & 0x7F) << 7 * at
        if data[at] < 0x80:
            return size, at + 1
    raise ValueError("no length at the beginning of a snappy block")


def _lzo_length(data: bytes, at: int, full: int, limit: int) -> "tuple[int, int]":
    """A length that does not fit its opcode: `full`, 255 more for each byte of zero, and the first byte that is not zero."""
    length = full
    while data[at] == 0:
        length += 255
        at += 1
        if length > limit:
            raise ValueError(f"more than {limit} bytes come out")
    return length + data[at], at + 1


def _copy(out: bytearray, distance: int, length: int, limit: int) -> None:
    """`length` bytes from `distance` back, which may overlap what is being written."""
    start = len(out) - distance
    if distance == 0 or start < 0:
        raise ValueError("a copy from before the beginning")
    if len(out) + length > limit:
        raise ValueError(f"more than {limit} bytes come out")
    if distance >= length:
        out += out[start:start + length]
    else:
        piece = bytes(out[start:])
        out += (piece * (length // distance + 1))[:length]
