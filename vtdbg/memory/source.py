"""The bytes of a dump file: mapped, never copied whole, never read past their end."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from abc import ABC, abstractmethod
from typing import Any, Iterator, Optional, Tuple

from vtdbg.errors import FormatError, UsageError


class ByteSource(ABC):
    """What a format's reader reads: a file, or a container (the flattened form) that holds a file."""

    path: str
    size: int
    contiguous = True
    """Every slice is a view of the file itself, whatever its length."""

    @abstractmethod
    def slice(self, offset: int, size: int) -> memoryview:
        """The bytes of [offset, offset + size) that exist: shorter at the end of the file, empty beyond it.

        Without a copy where the bytes lie together in the mapped file.
        """

    def data(self, offset: int, size: int) -> memoryview:
        """`slice` for what becomes memory: ends before the first byte that the container does not hold, instead of taking it as zero."""
        return self.slice(offset, size)

    def extents(self, offset: int, size: int) -> Iterator[Tuple[int, int]]:
        """(offset, size) of the parts of [offset, offset + size) that are there, in order."""
        if offset < self.size and size > 0:
            yield offset, min(size, self.size - offset)

    @abstractmethod
    def close(self) -> None:
        """Give the mapping back.  Reading afterwards raises UsageError."""

    def unpack(self, layout: struct.Struct, offset: int, what: str) -> Tuple[Any, ...]:
        """`layout` at `offset`; FormatError naming `what` where the file ends before it."""
        data = self.slice(offset, layout.size)
        if len(data) < layout.size:
            raise self.error(f"the file ends inside {what} ({self.size:#x} bytes long); the copy is cut or the header lies", offset)
        return layout.unpack(data)

    def error(self, message: str, offset: Optional[int] = None) -> FormatError:
        """A FormatError about this file, to be raised by the caller."""
        return FormatError(self.path, message, offset)


class DumpFile(ByteSource):
    """A file, memory-mapped read-only.  The file handle is closed at once: the mapping keeps what it needs (Windows too)."""

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        self.path = os.fspath(path)
        self._map: Optional[mmap.mmap] = None
        try:
            # A FIFO would wait for its writer: it is opened to be refused.
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            raise FormatError(self.path, f"cannot be opened: {_reason(error)}") from error
        try:
            mode = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise self.error("not a regular file; give the path of a memory dump")
            self.size = os.lseek(descriptor, 0, os.SEEK_END)
            if self.size == 0:
                raise self.error("the file is empty; the dump was not written (disk full, or no permission to read memory?)")
            self._map = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            raise self.error(f"cannot be mapped into memory: {_reason(error)}") from error
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map)

    def slice(self, offset: int, size: int) -> memoryview:
        if self._map is None:
            raise UsageError(f"{self.path}: the dump has been closed")
        if offset < 0 or size <= 0 or offset >= self.size:
            return memoryview(b"")
        return self._view[offset:offset + size]

    def close(self) -> None:
        if self._map is None:
            return
        mapping, self._map = self._map, None
        self._view.release()
        try:
            mapping.close()
        except BufferError:
            # Somebody still holds a view of it: the mapping goes when the last view goes.
            return


def _reason(error: Exception) -> str:
    """The system's own words without the number and the path, which the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def size_text(size: int) -> str:
    """A number of bytes for people: "96 MiB", "1.5 KiB", "12 bytes"."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size} bytes"


def count_text(count: int, noun: str) -> str:
    """"1 run", "40 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
