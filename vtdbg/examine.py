"""Memory in the formats of GDB's `x` command: a count, a letter and a size, "8gx" or "/8gx" (GDB manual, Examining Memory)."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from vtdbg.errors import MemoryUnavailable, UsageError
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory

SIZES: Mapping[str, int] = {"b": 1, "h": 2, "w": 4, "g": 8}
LETTERS: Mapping[str, str] = {
    "x": "hexadecimal", "z": "hexadecimal", "d": "signed", "u": "unsigned", "o": "octal", "t": "binary", "a": "address", "c": "character",
    "f": "floating point", "s": "string", "i": "instruction",
}
_DEFAULT_SIZE: Mapping[str, str] = {"a": "g", "c": "b", "s": "b", "i": "b"}
"""Others are words, as in a GDB that has not been told otherwise."""
_IN_A_ROW: Mapping[str, int] = {"b": 8, "h": 8, "w": 4, "g": 2}
LONGEST_STRING = 200
MOST_BYTES = 1 << 16
WIDEST = 64
"""Columns for the values of one row."""

_ESCAPES: Mapping[int, str] = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 27: "\\033", 92: "\\\\"}


@dataclass(frozen=True)
class Format:
    """`letter` one of LETTERS, `size` one of SIZES; `count` at least 1."""

    count: int
    letter: str
    size: str

    @property
    def width(self) -> int:
        """Bytes of one element (of one character of a string)."""
        return SIZES[self.size]

    @property
    def text(self) -> str:
        return f"{self.count}{self.letter}" + ("" if self.letter == "i" else self.size)


def parse_format(text: str) -> Format:
    """The format that `text` says, with or without the slash; letters in any order.  Raises UsageError with what there is."""
    found = re.fullmatch(r"(?:x?/)?(-?\d*)([a-z]*)", text)
    known = f"a count, one of {' '.join(LETTERS)}, and one of {' '.join(SIZES)}, for instance 8gx or 4i"
    if found is None or not (found.group(1) or found.group(2)):
        raise UsageError(f"format {text!r}: {known}")
    if found.group(1).startswith("-"):
        raise UsageError(f"format {text!r}: memory before the address is not shown; give a lower address")
    # GDB lets the last letter of a kind count; two that differ are a typo more often than a wish.
    letters = sorted({item for item in found.group(2) if item in LETTERS})
    sizes = sorted({item for item in found.group(2) if item in SIZES})
    unknown = [item for item in found.group(2) if item not in LETTERS and item not in SIZES]
    if unknown or len(letters) > 1 or len(sizes) > 1:
        what = f"{unknown[0]!r} is no format" if unknown else f"{' and '.join(letters if len(letters) > 1 else sizes)} exclude each other"
        raise UsageError(f"format {text!r}: {what}: {known}")
    letter = letters[0] if letters else "x"
    size = sizes[0] if sizes else _DEFAULT_SIZE.get(letter, "w")
    if letter == "s" and size == "g":
        raise UsageError(f"format {text!r}: characters of a string are b, h or w")
    count = int(found.group(1)) if found.group(1) else 1
    most = MOST_BYTES // SIZES[size]
    if not 0 < count <= most:
        raise UsageError(f"format {text!r}: from 1 to {most} of them")
    return Format(count, letter, size)


Element = Union[int, float, str]


@dataclass(frozen=True)
class Row:
    """One line: values from `address` on, as a machine wants them and as a person does."""

    address: int
    data: Tuple[Element, ...]
    texts: Tuple[str, ...]


def rows(memory: PhysicalMemory, address: int, wanted: Format) -> List[Row]:
    """What stands at `address` in a format that is not "i".  Raises MemoryUnavailable where a byte cannot be read."""
    if wanted.letter == "s":
        return list(_strings(memory, address, wanted))
    data = memory.read(address, wanted.count * wanted.width)
    numbers = [int.from_bytes(data[at:at + wanted.width], "little") for at in range(0, len(data), wanted.width)]
    made = [_MAKERS[wanted.letter](number, wanted.width) for number in numbers]
    longest = max(len(words) for _, words in made)
    in_a_row = _IN_A_ROW[wanted.size]
    while in_a_row > 1 and in_a_row * (longest + 2) - 2 > WIDEST:
        in_a_row //= 2
    found = []
    for first in range(0, len(made), in_a_row):
        part = made[first:first + in_a_row]
        found.append(Row(address + first * wanted.width, tuple(value for value, _ in part), tuple(words.ljust(longest) for _, words in part)))
    return found


def _signed(number: int, width: int) -> int:
    return number - (1 << 8 * width) if number >> (8 * width - 1) else number


def _hexadecimal(number: int, width: int) -> Tuple[Element, str]:
    words = f"{number:#0{2 * width + 2}x}"
    return words, words


def _decimal(number: int, width: int) -> Tuple[Element, str]:
    return _signed(number, width), str(_signed(number, width))


def _unsigned(number: int, _width: int) -> Tuple[Element, str]:
    return number, str(number)


def _octal(number: int, _width: int) -> Tuple[Element, str]:
    words = f"0{number:o}" if number else "0"
    return words, words


def _binary(number: int, width: int) -> Tuple[Element, str]:
    words = f"{number:0{8 * width}b}"
    return words, words


def _address(number: int, width: int) -> Tuple[Element, str]:
    words = f"{_signed(number, width) & (1 << 64) - 1:#x}"
    return words, words


def _character(number: int, _width: int) -> Tuple[Element, str]:
    byte = number & 0xFF
    shown = "\\'" if byte == 0x27 else _printed(byte)
    return _signed(byte, 1), f"{_signed(byte, 1)} '{shown}'"


_FLOATS: Mapping[int, Tuple[str, str, int]] = {4: ("<f", ".9g", 23), 8: ("<d", ".17g", 52)}
"""IEEE 754 single and double: how they are unpacked, digits that tell every value from its neighbours, bits of the fraction."""


def _floating(number: int, width: int) -> Tuple[Element, str]:
    if width not in _FLOATS:
        # As GDB does: there is no floating-point type of that size.
        return _decimal(number, width)
    form, digits, fraction = _FLOATS[width]
    value = float(struct.unpack(form, number.to_bytes(width, "little"))[0])
    if math.isnan(value):
        words = ("-" if number >> (8 * width - 1) else "") + f"nan({number & (1 << fraction) - 1:#x})"
        return words, words
    words = f"{value:{digits}}"
    # JSON has no infinity.
    return (words if math.isinf(value) else value), words


_MAKERS: Dict[str, Callable[[int, int], Tuple[Element, str]]] = {
    "x": _hexadecimal, "z": _hexadecimal, "d": _decimal, "u": _unsigned, "o": _octal, "t": _binary, "a": _address, "c": _character, "f": _floating,
}


def _printed(character: int) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if 0x20 <= character < 0x7F:
        return chr(character)
    return f"\\{character:03o}" if character < 0x100 else f"\\u{character:04x}" if character < 0x10000 else f"\\U{character:08x}"


def _strings(memory: PhysicalMemory, address: int, wanted: Format) -> Iterator[Row]:
    """One string a row; one that has no end within LONGEST_STRING characters is cut, and the next row goes on where it was cut."""
    at = address
    for _ in range(wanted.count):
        characters, ended, problem = _string(memory, at, wanted.width)
        if problem is not None and not characters:
            raise problem
        shown = "".join('\\"' if item == 0x22 else _printed(item) for item in characters)
        tail = "" if ended else "..." if problem is None else f" <{problem.reason}>"
        yield Row(at, (shown + tail,), (f'{_PREFIX[wanted.width]}"{shown}"{tail}',))
        if problem is not None:
            return
        at += (len(characters) + ended) * wanted.width


_PREFIX: Mapping[int, str] = {1: "", 2: "u", 4: "U"}


def _string(memory: PhysicalMemory, address: int, width: int) -> "Tuple[List[int], bool, Optional[MemoryUnavailable]]":
    """(characters, whether a zero ended them, what kept them from being read further)."""
    characters: List[int] = []
    data, at = b"", address
    while len(characters) < LONGEST_STRING:
        if len(data) < width:
            # No further than the page: what is behind it may not exist, and need not.
            piece = max(min(PAGE_SIZE - at % PAGE_SIZE, LONGEST_STRING * width), width - len(data))
            more, problem = _available(memory, at, piece)
            data += more
            at += len(more)
            if len(data) < width and problem is not None:
                return characters, False, problem
        number, data = int.from_bytes(data[:width], "little"), data[width:]
        if number == 0:
            return characters, True, None
        characters.append(number)
    return characters, False, None


def _available(memory: PhysicalMemory, address: int, size: int) -> "Tuple[bytes, Optional[MemoryUnavailable]]":
    """As many of the bytes as there are in one piece, and why there are no more."""
    try:
        return memory.read(address, size), None
    except MemoryUnavailable as error:
        before = error.address - address
        if error.space != "physical" or not 0 < before < size:
            return b"", error
        return memory.read(address, before), error


def code(memory: PhysicalMemory, address: int, count: int, mode: int) -> Iterator[Tuple[int, bytes, str]]:
    """(address, bytes, text) of `count` instructions in 16-, 32- or 64-bit `mode`; "(bad)" and one byte where there is none.

    Branch targets are counted from the address that was given, physical as it is.  Stops before the first instruction that cannot be read;
    raises MemoryUnavailable where not even one byte can, UsageError where capstone is not installed.
    """
    from vtdbg.x86.disasm import MAX_LENGTH, disassemble

    for number in range(count):
        # In two pieces where they are on two pages: a guest's pages are not neighbours in its host.
        data, problem = _available(memory, address, min(MAX_LENGTH, PAGE_SIZE - address % PAGE_SIZE))
        if problem is None and len(data) < MAX_LENGTH:
            more, problem = _available(memory, address + len(data), MAX_LENGTH - len(data))
            data += more
        if not data and problem is not None:
            if number == 0:
                raise problem
            yield address, b"", f"({problem.reason})"
            return
        found = disassemble(data, address, mode)
        if found is None and problem is not None:
            yield address, data, f"(no instruction, or one that goes on where it cannot be read: {problem})"
            return
        length, words = (found.length, found.text) if found is not None else (1, "(bad)")
        yield address, data[:length], words
        address += length
