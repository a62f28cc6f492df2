"""What the MSR and I/O bitmaps of VT-x and of SVM have in common: a question, its answer, and ranges of MSRs with names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Optional, Tuple

from vtdbg.errors import FormatError, UsageError
from vtdbg.x86 import msrs

READ, WRITE = "read", "write"
ACCESSES = (READ, WRITE)


def need_size(name: str, data: bytes, size: int) -> None:
    """FormatError where `data` has another size: a cut bitmap has no bits to invent."""
    if len(data) != size:
        raise FormatError(name, f"{len(data)} bytes; it has {size}")


@dataclass(frozen=True)
class MsrRange:
    """MSRs `first` to `last`; `names` are those of them that have one."""

    first: int
    last: int
    names: Tuple[str, ...]

    @property
    def count(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class BitmapQuery:
    """One question.  `byte` and `bit` place the deciding bit (None where no bit decides); `exits` None: unknown.  `why` says it in words."""

    what: str
    byte: Optional[int]
    bit: Optional[int]
    exits: Optional[bool]
    why: str


def named_ranges(ranges: Iterable[Tuple[int, int]], first: int = 0) -> Tuple[MsrRange, ...]:
    """Bit ranges as MSR ranges with names; `first` is the MSR of bit 0."""
    found = []
    for low, high in ranges:
        names = tuple(row.name for index, row in msrs.msrs().items() if first + low <= index <= first + high)
        found.append(MsrRange(first + low, first + high, names))
    return tuple(found)


def check_access(access: str) -> None:
    if access not in ACCESSES:
        raise UsageError(f"an MSR access is 'read' or 'write', not {access!r}")
