"""BTF, the type information that Linux carries in itself (/sys/kernel/btf, section .BTF of vmlinux and of its modules).

Source: Linux, Documentation/bpf/btf.rst (BTF Type and String Encoding), 6.1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Dict, List, Optional, Set, Tuple

from vtdbg.errors import FormatError

MAGIC = 0xEB9F
KINDS = ("VOID", "INT", "PTR", "ARRAY", "STRUCT", "UNION", "ENUM", "FWD", "TYPEDEF", "VOLATILE", "CONST", "RESTRICT", "FUNC", "FUNC_PROTO",
         "VAR", "DATASEC", "FLOAT", "DECL_TAG", "TYPE_TAG", "ENUM64")
_EXTRA = {"INT": 4, "ARRAY": 12, "VAR": 4, "DECL_TAG": 4}
_EACH = {"STRUCT": 12, "UNION": 12, "ENUM": 8, "FUNC_PROTO": 8, "DATASEC": 12, "ENUM64": 12}
"""Bytes behind the 12 that every type has: once, and for each of its `vlen` members."""
_LONGEST = 64
"""Types that one may be made of by typedef, const and the like."""


@dataclass(frozen=True)
class Member:
    """`bit` from the start of the structure; `bits` of a bit field, else 0."""

    name: str
    type: int
    bit: int
    bits: int


@dataclass(frozen=True)
class Type:
    """`number` is its id; `size` in bytes where the kind has one, else `target` is another type's id (0 is void).  `signed` of integers."""

    number: int
    kind: str
    name: str
    size: int
    target: int
    members: Tuple[Member, ...] = ()
    values: Tuple[Tuple[str, int], ...] = ()
    count: int = 0
    signed: bool = False
    boolean: bool = False
    bits: int = 0


class Btf:
    """The types of one file; `base` are those of vmlinux for a module, whose ids and strings go on where those end."""

    def __init__(self, data: bytes, base: "Optional[Btf]" = None, name: str = "BTF") -> None:
        self.name, self.base = name, base
        self.end: int
        self.string_end: int
        try:
            magic, _, _, header, types_at, types_size, strings_at, strings_size = struct.unpack_from("<HBBIIIII", data)
        except struct.error:
            raise FormatError(name, "it is too short for BTF") from None
        if magic != MAGIC:
            raise FormatError(name, f"it is no BTF: the magic is {magic:#x}, not {MAGIC:#x}")
        self._types = data[header + types_at:header + types_at + types_size]
        self._strings = data[header + strings_at:header + strings_at + strings_size]
        if len(self._types) != types_size or len(self._strings) != strings_size:
            raise FormatError(name, "the BTF is cut")
        self._first = base.end if base is not None else 1
        self._first_string = base.string_end if base is not None else 0
        self._places: List[int] = []
        self._names: Dict[Tuple[str, str], int] = {}
        self._index()
        self.end, self.string_end = self._first + len(self._places), self._first_string + strings_size

    def _index(self) -> None:
        at, types = 0, self._types
        while at < len(types):
            try:
                name, info, _ = struct.unpack_from("<III", types, at)
            except struct.error:
                raise FormatError(self.name, "a type of the BTF is cut", at) from None
            number = info >> 24 & 0x1F
            if not 0 < number < len(KINDS):
                raise FormatError(self.name, f"BTF has a kind of type that is not known here ({number})", at)
            kind = KINDS[number]
            if name and kind in ("STRUCT", "UNION", "TYPEDEF", "VAR", "ENUM"):
                self._names.setdefault((kind, self.string(name)), self._first + len(self._places))
            self._places.append(at)
            at += 12 + _EXTRA.get(kind, 0) + _EACH.get(kind, 0) * (info & 0xFFFF)
        if at != len(types):
            raise FormatError(self.name, "the last type of the BTF is cut", at)

    def string(self, offset: int) -> str:
        if offset < self._first_string:
            return self.base.string(offset) if self.base is not None else ""
        at = offset - self._first_string
        end = self._strings.find(b"\0", at)
        if not 0 <= at < len(self._strings) or end < 0:
            raise FormatError(self.name, f"a name at {offset:#x} is outside of the BTF's strings")
        return self._strings[at:end].decode("utf-8", "replace")

    def find(self, kind: str, name: str) -> Optional[int]:
        """The id of the type; where a module and its base have it, the module's (the base's may be an outline)."""
        own = self._names.get((kind, name))
        return own if own is not None or self.base is None else self.base.find(kind, name)

    def variables(self) -> List[str]:
        """The names of the per-processor variables whose types this file tells."""
        return [name for kind, name in self._names if kind == "VAR"]

    def __getitem__(self, number: int) -> Type:
        """Raises FormatError where there is no such type."""
        if number == 0:
            return Type(0, "VOID", "void", 0, 0)
        if number < self._first and self.base is not None:
            return self.base[number]
        if not 0 <= number - self._first < len(self._places):
            raise FormatError(self.name, f"the BTF has no type {number}")
        at = self._places[number - self._first]
        name, info, last = struct.unpack_from("<III", self._types, at)
        return self._decoded(number, KINDS[info >> 24 & 0x1F], self.string(name), info, last, at + 12)

    def _decoded(self, number: int, kind: str, name: str, info: int, last: int, at: int) -> Type:
        length, flag, types = info & 0xFFFF, bool(info >> 31), self._types
        if kind == "INT":
            extra, = struct.unpack_from("<I", types, at)
            return Type(number, kind, name, last, 0, signed=bool(extra >> 24 & 1), boolean=bool(extra >> 26 & 1), bits=extra & 0xFF)
        if kind == "ARRAY":
            element, _, count = struct.unpack_from("<III", types, at)
            return Type(number, kind, name, 0, element, count=count)
        if kind in ("STRUCT", "UNION"):
            members = []
            for index in range(length):
                label, target, place = struct.unpack_from("<III", types, at + 12 * index)
                members.append(Member(self.string(label), target, place & 0xFFFFFF if flag else place, place >> 24 if flag else 0))
            return Type(number, kind, name, last, 0, tuple(members))
        if kind == "ENUM":
            pairs = (struct.unpack_from("<Ii" if flag else "<II", types, at + 8 * index) for index in range(length))
            return Type(number, kind, name, last, 0, values=tuple((self.string(label), value) for label, value in pairs))
        if kind == "ENUM64":
            parts = (struct.unpack_from("<III", types, at + 12 * index) for index in range(length))
            return Type(number, kind, name, last, 0, values=tuple((self.string(label), low | high << 32) for label, low, high in parts))
        if kind == "FLOAT":
            return Type(number, kind, name, last, 0)
        if kind == "FWD":
            return Type(number, "UNION" if flag else "STRUCT", name, 0, 0, count=-1)
        return Type(number, kind, name, 0, last)

    def resolved(self, number: int) -> Type:
        """The type behind typedefs and qualifiers."""
        for _ in range(_LONGEST):
            found = self[number]
            if found.kind not in ("TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG"):
                return found
            number = found.target
        raise FormatError(self.name, f"type {number} of the BTF refers to itself")

    def offset(self, struct_name: str, member: str) -> Optional[int]:
        """Byte offset of a member ("a.b" of a member's member), through members without a name; None where the type lacks it."""
        number = self.find("STRUCT", struct_name)
        if number is None:
            return None
        at = 0
        for part in member.split("."):
            found = self._member(number, part, set())
            if found is None:
                return None
            at, number = at + found[0], found[1]
        return at

    def _member(self, number: int, name: str, seen: Set[int]) -> Optional[Tuple[int, int]]:
        found = self.resolved(number)
        if found.number in seen or len(seen) > _LONGEST:
            return None
        seen.add(found.number)
        for item in found.members:
            if item.name == name:
                return item.bit // 8, item.type
            if not item.name:
                inner = self._member(item.type, name, seen)
                if inner is not None:
                    return item.bit // 8 + inner[0], inner[1]
        return None
