"""Types and symbols as an ELF file that a debugger loads: DWARF 4 for types out of BTF, and a symbol table of absolute addresses.

Sources: DWARF Debugging Information Format 4 (section 7, Data Representation); System V ABI, Object Files.
"""

from __future__ import annotations

import struct
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

from vtdbg.linux.btf import Btf, Type

_STRING, _REF, _SIZE, _FLAG, _UDATA, _SDATA, _BYTE = 0x08, 0x13, 0x06, 0x19, 0x0F, 0x0D, 0x0B
"""Forms: string, ref4, data4, flag_present, udata, sdata, data1."""
_NAME, _BYTES, _TYPE, _DECLARATION, _EXTERNAL, _PLACE, _BIT_SIZE, _BIT_PLACE = 0x03, 0x0B, 0x49, 0x3C, 0x3F, 0x38, 0x0D, 0x6B
_ENCODING, _COUNT, _VALUE, _LANGUAGE, _PRODUCER, _PROTOTYPED = 0x3E, 0x37, 0x1C, 0x13, 0x25, 0x27
_C99 = 0x0C
_NO, _YES = 0, 1
"""DW_CHILDREN_no, DW_CHILDREN_yes."""
_BOOLEAN, _FLOAT, _SIGNED, _UNSIGNED, _SIGNED_CHAR, _UNSIGNED_CHAR = 2, 4, 5, 7, 6, 8


class _Form(NamedTuple):
    """An abbreviation: the tag, whether children follow, and its attributes with their forms."""

    tag: int
    children: int
    attributes: Tuple[Tuple[int, int], ...]


_NAMED, _TYPED, _SIZED = (_NAME, _STRING), (_TYPE, _REF), (_BYTES, _SIZE)
_FORMS: Mapping[str, _Form] = {
    "unit": _Form(0x11, _YES, ((_PRODUCER, _STRING), (_LANGUAGE, _BYTE), _NAMED)),
    "INT": _Form(0x24, _NO, (_NAMED, _SIZED, (_ENCODING, _BYTE))),
    "PTR": _Form(0x0F, _NO, (_SIZED, _TYPED)),
    "PTR to void": _Form(0x0F, _NO, (_SIZED,)),
    "TYPEDEF": _Form(0x16, _NO, (_NAMED, _TYPED)),
    "TYPEDEF of void": _Form(0x16, _NO, (_NAMED,)),
    "CONST": _Form(0x26, _NO, (_TYPED,)), "CONST of void": _Form(0x26, _NO, ()),
    "VOLATILE": _Form(0x35, _NO, (_TYPED,)), "VOLATILE of void": _Form(0x35, _NO, ()),
    "RESTRICT": _Form(0x37, _NO, (_TYPED,)), "RESTRICT of void": _Form(0x37, _NO, ()),
    "STRUCT": _Form(0x13, _YES, (_NAMED, _SIZED)), "STRUCT without name": _Form(0x13, _YES, (_SIZED,)),
    "UNION": _Form(0x17, _YES, (_NAMED, _SIZED)), "UNION without name": _Form(0x17, _YES, (_SIZED,)),
    "STRUCT declared": _Form(0x13, _NO, (_NAMED, (_DECLARATION, _FLAG))),
    "UNION declared": _Form(0x17, _NO, (_NAMED, (_DECLARATION, _FLAG))),
    "ENUM": _Form(0x04, _YES, (_NAMED, _SIZED)), "ENUM without name": _Form(0x04, _YES, (_SIZED,)),
    "enumerator": _Form(0x28, _NO, (_NAMED, (_VALUE, _SDATA))),
    "ARRAY": _Form(0x01, _YES, (_TYPED,)),
    "range": _Form(0x21, _NO, ((_COUNT, _UDATA),)),
    "FUNC_PROTO": _Form(0x15, _NO, ((_PROTOTYPED, _FLAG),)),
    "member": _Form(0x0D, _NO, (_NAMED, _TYPED, (_PLACE, _UDATA))),
    "member without name": _Form(0x0D, _NO, (_TYPED, (_PLACE, _UDATA))),
    "bits": _Form(0x0D, _NO, (_NAMED, _TYPED, (_BIT_SIZE, _UDATA), (_BIT_PLACE, _UDATA))),
    "variable": _Form(0x34, _NO, (_NAMED, _TYPED, (_EXTERNAL, _FLAG), (_DECLARATION, _FLAG))),
}
_CODES = {name: code for code, name in enumerate(_FORMS, 1)}


def _leb(value: int) -> bytes:
    output = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        output.append(low | (0x80 if value else 0))
        if not value:
            return bytes(output)


def _signed_leb(value: int) -> bytes:
    output = bytearray()
    while True:
        low, value = value & 0x7F, value >> 7
        if (value == 0 and not low & 0x40) or (value == -1 and low & 0x40):
            return bytes(output) + bytes((low,))
        output.append(low | 0x80)


def _abbreviations() -> bytes:
    output = bytearray()
    for name, form in _FORMS.items():
        output += _leb(_CODES[name]) + _leb(form.tag) + bytes((form.children,))
        for attribute, kind in form.attributes:
            output += _leb(attribute) + _leb(kind)
        output += b"\0\0"
    return bytes(output) + b"\0"


class _Unit:
    """One compilation unit: the types of `btf` that `roots` need, and variables."""

    def __init__(self, btf: Btf, roots: Sequence[int]) -> None:
        self.btf = btf
        self.output = bytearray(11)
        self._places: Dict[int, int] = {}
        self._references: List[Tuple[int, int]] = []
        self._wanted: List[int] = []
        self._seen: Dict[int, bool] = {}
        # Not the bare name: GDB would take `kvm` in an expression for this file.
        self._put("unit", "vtdbg, out of BTF", _C99, f"{btf.name}.btf")
        for number in roots:
            self._whole(number)

    def _whole(self, number: int) -> None:
        """Wants a type with everything that it contains; what it only points to is declared."""
        waiting = [number]
        while waiting:
            number = waiting.pop()
            if self._seen.get(number):
                continue
            self._seen[number] = True
            found = self.btf[number]
            waiting += [member.type for member in found.members]
            if found.kind in ("TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG", "ARRAY", "VAR"):
                waiting.append(found.target)
            elif found.kind == "PTR":
                self._pointed(found.target)

    def _pointed(self, number: int) -> None:
        for _ in range(64):
            if number in self._seen:
                return
            self._seen[number] = False
            found = self.btf[number]
            if found.kind not in ("TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG", "PTR", "ARRAY"):
                return
            number = found.target

    def _put(self, form: str, *values: object) -> None:
        self.output += _leb(_CODES[form])
        for (_, kind), value in zip((item for item in _FORMS[form].attributes if item[1] != _FLAG), values):
            if kind == _STRING:
                self.output += str(value).encode("utf-8", "replace").replace(b"\0", b"") + b"\0"
            else:
                assert isinstance(value, int)
                self._number(kind, value)

    def _number(self, kind: int, value: int) -> None:
        if kind == _REF:
            self._references.append((len(self.output), value))
            value = 0
        self.output += {_UDATA: _leb, _SDATA: _signed_leb}[kind](value) if kind in (_UDATA, _SDATA) else value.to_bytes(
            1 if kind == _BYTE else 4, "little")

    def types(self) -> None:
        for number, whole in self._seen.items():
            found = self.btf[number]
            self._places[number] = len(self.output)
            self._type(found, whole)

    def _type(self, found: Type, whole: bool) -> None:
        kind = found.kind
        if kind == "TYPE_TAG":
            kind = "CONST"
        if kind in ("STRUCT", "UNION"):
            if (not whole and found.name) or found.count < 0:
                self._put(f"{kind} declared", found.name)
            else:
                self._compound(found, whole)
        elif kind in ("ENUM", "ENUM64"):
            self._put("ENUM" if found.name else "ENUM without name", *([found.name] if found.name else []), found.size)
            for name, value in found.values:
                self._put("enumerator", name, value)
            self.output.append(0)
        elif kind in ("INT", "FLOAT"):
            self._put("INT", found.name, found.size, _encoding(found))
        elif kind == "ARRAY":
            self._put("ARRAY", found.target)
            self._put("range", found.count)
            self.output.append(0)
        elif kind == "PTR":
            self._put(*(("PTR", 8, found.target) if self._is_type(found.target) else ("PTR to void", 8)))
        elif kind == "TYPEDEF":
            self._put(*(("TYPEDEF", found.name, found.target) if self._is_type(found.target) else ("TYPEDEF of void", found.name)))
        elif kind in ("CONST", "VOLATILE", "RESTRICT"):
            self._put(*((kind, found.target) if self._is_type(found.target) else (f"{kind} of void",)))
        else:
            # A function's type, or what is no type: nothing is read through it.
            self._put("FUNC_PROTO")

    def _is_type(self, number: int) -> bool:
        return number != 0 and number in self._seen

    def _compound(self, found: Type, whole: bool) -> None:
        self._put(found.kind if found.name else f"{found.kind} without name", *([found.name] if found.name else []), found.size)
        for member in found.members if whole else ():
            held = self.btf.resolved(member.type)
            bits = member.bits or (held.bits if held.kind == "INT" and held.bits != 8 * held.size else 0)
            if bits and member.name:
                self._put("bits", member.name, member.type, bits, member.bit)
            elif member.name:
                self._put("member", member.name, member.type, member.bit // 8)
            elif held.kind in ("STRUCT", "UNION"):
                self._put("member without name", member.type, member.bit // 8)
        self.output.append(0)

    def variable(self, name: str, number: int) -> None:
        """A variable whose address is in the symbol table; `number` is its type's id and was among the roots."""
        self._put("variable", name, number)

    def finished(self) -> bytes:
        self.output.append(0)
        for at, number in self._references:
            self.output[at:at + 4] = struct.pack("<I", self._places[number])
        struct.pack_into("<IHIB", self.output, 0, len(self.output) - 4, 4, 0, 8)
        return bytes(self.output)


def _encoding(found: Type) -> int:
    if found.kind == "FLOAT":
        return _FLOAT
    if found.boolean:
        return _BOOLEAN
    if found.size == 1:
        return _SIGNED_CHAR if found.signed or found.name == "char" else _UNSIGNED_CHAR
    return _SIGNED if found.signed else _UNSIGNED


def unit(btf: Btf, structures: Sequence[str], addresses: Mapping[str, int]) -> bytes:
    """The DWARF of the named structures and unions, and of the variables of `btf` that have an address."""
    found = [btf.find(kind, name) for name in structures for kind in ("STRUCT", "UNION")]
    variables = [(name, btf[btf.find("VAR", name) or 0].target) for name in btf.variables() if name in addresses]
    made = _Unit(btf, [*(number for number in found if number is not None), *(number for _, number in variables)])
    made.types()
    for name, number in variables:
        if made.btf[number].kind != "VOID":
            made.variable(name, number)
    return made.finished()


def elf_file(units: Sequence[bytes], addresses: Mapping[str, int], functions: Mapping[str, int]) -> bytes:
    """An ELF file for x86-64 with these compilation units and symbols; nothing in it is loaded."""
    names, symbols = bytearray(b"\0"), bytearray(24)
    # STB_GLOBAL; variables are STT_OBJECT and SHN_ABS, functions STT_FUNC in the section of code, so that a debugger sets breakpoints there.
    for group, kind, section in ((addresses, 1, 0xFFF1), (functions, 2, 1)):
        for name, address in group.items():
            symbols += struct.pack("<IBBHQQ", len(names), 1 << 4 | kind, 0, section, address, 0)
            names += name.encode("ascii", "replace") + b"\0"
    # GDB 13 crashes on symbols of a file that has no section of code.
    rows = [("", 0, b"", 0, 0, 0), (".text", 1, b"", 0, 0, 0),
            (".debug_info", 1, b"".join(units), 0, 0, 0), (".debug_abbrev", 1, _abbreviations(), 0, 0, 0),
            (".symtab", 2, bytes(symbols), 5, 1, 24), (".strtab", 3, bytes(names), 0, 0, 0), (".shstrtab", 3, b"", 0, 0, 0)]
    titles, places = bytearray(), []
    for title, *_ in rows:
        places.append(len(titles))
        titles += title.encode() + b"\0"
    rows[-1] = (".shstrtab", 3, bytes(titles), 0, 0, 0)
    body, table = bytearray(64), bytearray()
    for (title, kind, data, link, info, size), place in zip(rows, places):
        flags, at, align = (6 if title == ".text" else 0), (len(body) if kind else 0), (1 if kind else 0)
        table += struct.pack("<IIQQQQIIQQ", place, kind, flags, 0, at, len(data), link, info, align, size)
        body += data
    body += bytes(-len(body) % 8)
    struct.pack_into("<4sBBB9xHHIQQQIHHHHHH", body, 0, b"\x7fELF", 2, 1, 1, 2, 62, 1, 0, 0, len(body), 0, 64, 56, 0, 64, len(rows), len(rows) - 1)
    return bytes(body + table)
