"""Every error that a user can cause or meet.  One class hierarchy, so that a front end has one `except`.

The text of an error is one line that says what, where and, if there is something to try, what to try.
"""

from __future__ import annotations

from typing import Optional


class VtdbgError(Exception):
    """Base of all errors that are reported to the user as one line (exit status 2)."""


class UsageError(VtdbgError):
    """A command was called with arguments that cannot work."""


class NoMemory(UsageError):
    """A command needs memory to look at, and nobody has named any."""


class FormatError(VtdbgError):
    """A file, a page or a text is not what it has to be.

    `path` is the file (or a description of the input), `offset` the byte in it, if one is to blame.
    """

    def __init__(self, path: object, message: str, offset: Optional[int] = None) -> None:
        self.path, self.offset, self.message = str(path), offset, message
        where = f" at offset {offset:#x}" if offset is not None else ""
        super().__init__(f"{path}{where}: {message}")


class MemoryUnavailable(VtdbgError):
    """`size` bytes at physical `address` (or linear/guest-physical, see `space`) cannot be read.

    Raised instead of inventing bytes.  `reason` says why, for instance "not in the dump" or "level 2 entry not present".
    """

    def __init__(self, address: int, size: int, reason: str = "not in this memory", space: str = "physical") -> None:
        self.address, self.size, self.reason, self.space = address, size, reason, space
        super().__init__(f"cannot read {size:#x} bytes at {space} address {address:#x}: {reason}")


class UnknownName(VtdbgError, KeyError):
    """A name of a field, layout, register or table that nobody knows; the near ones are suggested."""

    def __init__(self, what: str, name: object, near: "tuple[str, ...]" = ()) -> None:
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        self.message = f"unknown {what} {name!r}{hint}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message
