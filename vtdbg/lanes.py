"""Many numbers side by side in one big number: a question to all of them at once costs a few operations of the interpreter, not one a number.

Lane 0 is the lowest.  Nothing here lets a lane spill into its neighbour.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Dict, Literal

_FORMS: "Dict[int, Literal['B', 'H', 'I', 'Q']]" = {1: "B", 2: "H", 4: "I", 8: "Q"}


@lru_cache(maxsize=128)
def lanes(value: int, width: int, count: int) -> int:
    """`value` in each of `count` lanes of `width` bytes."""
    return int.from_bytes(value.to_bytes(width, "little") * count, "little")


def column(data: memoryview, offset: int, width: int, stride: int) -> bytes:
    """The `width` (1, 2, 4 or 8) bytes at `offset` of each record of `stride` bytes, side by side.

    `data` is contiguous and holds whole records; the number does not cross the end of its record, and need not be aligned.
    """
    shift = offset % width
    aligned = data[shift:len(data) - (width - shift if shift else 0)]
    # Copied as bytes: no object for each number, and the same on a big-endian machine.
    return aligned.cast(_FORMS[width])[offset // width::stride // width].tobytes()


def zero_lanes(whole: int, width: int, count: int) -> bytes:
    """0x80 for each lane that is 0, 0 for the others: one byte a lane."""
    low = lanes((1 << 8 * width - 1) - 1, width, count)
    # The sum carries into a lane's top bit unless its other bits are all 0, and never out of it.
    found = ((whole & low) + low | whole | low) ^ lanes((1 << 8 * width) - 1, width, count)
    return found.to_bytes(width * count, "little")[width - 1::width]
