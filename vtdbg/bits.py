"""The one primitive for bit layouts: a table of (bits, identifier, name, kind, values), read from `data/bits/*.csv`.

Every control word, qualification format, register, table entry and capability MSR is such a table.  Decoding, help text, JSON and
completion come out of it; a new bit is one row.  `data/bits/tables.csv` cites the manual's section for each table.

Kinds of a field:
  flag       one bit with a meaning when 1 (and, if `values` says so, when 0)
  inverted   a flag that says its thing when it is 0
  enum       a number whose values have names
  number     a decimal number
  hex        a number that people read in hexadecimal
  address    physical-address bits, kept in place (not shifted); the part at or above MAXPHYADDR is reserved
  linear     the same for a linear address
  reserved0  must be 0
  reserved1  must be 1
  default1   reserved, reads as 1 unless the processor's capability MSRs allow 0
  ignored    the processor does not look at it: software may
  undefined  holds anything
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from vtdbg.errors import UnknownName
from vtdbg.names import near_names
from vtdbg.rows import read_rows as read_rows

NO_MEANING = frozenset({"reserved0", "reserved1", "default1", "ignored", "undefined"})


def mask(high: int, low: int = 0) -> int:
    """The number with bits `high` to `low` (inclusive) set."""
    return ((1 << (high - low + 1)) - 1) << low


@dataclass(frozen=True)
class BitField:
    """One row.  `ident` is what is typed ("EPT_VIOLATION_VE"), `name` what is read ("EPT-violation #VE")."""

    high: int
    low: int
    ident: str
    name: str
    kind: str
    values: Mapping[int, str] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def mask(self) -> int:
        return mask(self.high, self.low)

    @property
    def bits(self) -> str:
        return str(self.low) if self.high == self.low else f"{self.high}:{self.low}"

    def of(self, value: int) -> int:
        """The field's number inside `value`; addresses stay in place."""
        part = value & self.mask
        return part if self.kind in ("address", "linear") else part >> self.low

    def meaning(self, value: int) -> str:
        """What the field's number says, without its name: "WB", "3", "0x1000", or "1"."""
        number = self.of(value)
        if number in self.values:
            return self.values[number]
        if self.kind == "enum":
            return f"{number} (reserved)"
        if self.kind in ("hex", "address", "linear") or self.kind in NO_MEANING:
            return f"{number:#x}"
        return str(number)


class BitValue(NamedTuple):
    """One decoded field: its row, its number, its meaning in words."""

    field: BitField
    number: int
    meaning: str

    @property
    def ident(self) -> str:
        return self.field.ident


@dataclass(frozen=True, eq=False)
class BitTable:
    """A bit layout: fields in descending order, disjoint, inside `width` bits.

    Compared and hashed by identity: there is one object for each table, and it is the key of caches.
    """

    id: str
    title: str
    width: int
    see: str
    fields: Tuple[BitField, ...]

    def __getitem__(self, ident: str) -> BitField:
        """The field by identifier or name, in any case; UnknownName with the near ones."""
        found = self._by_name().get(ident.lower())
        if found is None:
            raise UnknownName(f"field of {self.title}", ident, near_names(ident, self.idents()))
        return found

    def _by_name(self) -> Dict[str, BitField]:
        return _names_of(self)

    def idents(self) -> List[str]:
        return [row.ident for row in self.fields if row.ident]

    def get(self, value: int, ident: str) -> int:
        """The number of field `ident` inside `value`."""
        return self[ident].of(value)

    def test(self, value: int, ident: str) -> bool:
        return bool(value & self[ident].mask)

    def encode(self, **numbers: int) -> int:
        """The word with the named fields set, everything else 0: `table.encode(vector=6, valid=1)`."""
        word = 0
        for ident, number in numbers.items():
            row = self[ident]
            shifted = number if row.kind in ("address", "linear") else number << row.low
            if shifted & ~row.mask:
                raise UnknownName(f"value of {row.ident} ({row.bits})", hex(number))
            word |= shifted
        return word

    def decode(self, value: int) -> List[BitValue]:
        """Every field of the table, in descending bit order."""
        return [BitValue(row, row.of(value), row.meaning(value)) for row in self.fields]

    def shown(self, value: int) -> List[BitValue]:
        """The fields that a reader wants to see: flags that are 1, numbers, enumerations; wrong reserved bits too."""
        return [decoded for decoded in self.decode(value) if _is_shown(decoded)]

    def describe(self, value: int, names: bool = False) -> str:
        """One line: "PG AM WP NE ET PE", "vector 6, hardware exception"; reserved bits that are wrong are named.

        `names` says the readable names instead of the identifiers.
        """
        words: List[str] = []
        for decoded in self.shown(value):
            row = decoded.field
            label = row.name if names or not row.ident else row.ident
            if row.kind in ("reserved0", "reserved1"):
                words.append(f"reserved {row.bits}={decoded.number:#x}!")
            elif row.kind in ("flag", "inverted") and row.high == row.low:
                words.append(row.values.get(decoded.number, label))
            else:
                words.append(f"{label}={decoded.meaning}")
        outside = value & ~self.defined_mask()
        if outside:
            words.append(f"undefined bits {outside:#x}!")
        return (", " if names else " ").join(words) or "0"

    def describe_mask(self, value: int) -> str:
        """A mask over this layout: the bits in it, or "all but ..." where that is shorter.  Reserved bits in a mask are nobody's mistake."""
        flags = [row for row in self.fields if row.kind not in NO_MEANING]
        inside = [row.ident for row in flags if value & row.mask == row.mask]
        outside = [row.ident for row in flags if not value & row.mask]
        if not outside and inside:
            return "all"
        return "all but " + " ".join(outside) if len(inside) > len(outside) else " ".join(inside) or "0"

    def defined_mask(self) -> int:
        """Bits that some row describes."""
        covered = 0
        for row in self.fields:
            covered |= row.mask
        return covered

    def kind_mask(self, *kinds: str) -> int:
        covered = 0
        for row in self.fields:
            if row.kind in kinds:
                covered |= row.mask
        return covered

    def reserved_violations(self, value: int) -> List[BitValue]:
        """Rows of kind reserved0 that are not 0 and of kind reserved1 that are not all ones."""
        return [BitValue(row, row.of(value), row.meaning(value)) for row in self.fields if _is_wrong(row, value)]


def _is_wrong(row: BitField, value: int) -> bool:
    part = value & row.mask
    return (row.kind == "reserved0" and part != 0) or (row.kind == "reserved1" and part != row.mask)


def _is_shown(decoded: BitValue) -> bool:
    row = decoded.field
    if row.kind in ("reserved0", "reserved1"):
        whole = row.mask >> row.low
        return decoded.number != (whole if row.kind == "reserved1" else 0)
    if row.kind in NO_MEANING:
        return False
    if row.kind == "inverted":
        return decoded.number == 0
    if row.kind == "flag":
        return decoded.number != 0 or 0 in row.values
    return decoded.number != 0 or row.kind in ("enum", "address", "linear") or 0 in row.values


@cache
def _names_of(table: BitTable) -> Dict[str, BitField]:
    names: Dict[str, BitField] = {}
    for row in table.fields:
        for name in (row.name, row.ident):
            if name:
                names[name.lower()] = row
    return names


def parse_bits(text: str) -> Tuple[int, int]:
    """"31:16" -> (31, 16); "7" -> (7, 7)."""
    high, _, low = text.partition(":")
    return int(high), int(low or high)


def _field(row: Mapping[str, str]) -> BitField:
    high, low = parse_bits(row["bits"])
    values = {}
    for item in filter(None, row["values"].split(";")):
        number, _, text = item.partition("=")
        values[int(number, 0)] = text
    return BitField(high, low, row["ident"], row["name"], row["kind"], values, row["source"])


FILES = ("controls", "capabilities", "formats", "registers", "paging", "svm")


@cache
def tables() -> Mapping[str, BitTable]:
    """Every packaged table by id."""
    fields: Dict[str, List[BitField]] = {}
    for name in FILES:
        for row in read_rows(f"bits/{name}.csv"):
            fields.setdefault(row["table"], []).append(_field(row))
    return {row["table"]: BitTable(row["table"], row["title"], int(row["width"]), row["see"],
                                   tuple(sorted(fields.get(row["table"], ()), key=lambda item: -item.high)))
            for row in read_rows("bits/tables.csv")}


def table(name: str) -> BitTable:
    """The table by id ("pin", "eptp", "cr0", "ept_pde_2m", ...); UnknownName with the near ones."""
    found = tables().get(name)
    if found is None:
        raise UnknownName("bit table", name, near_names(name, tables()))
    return found


def describe(name: Optional[str], value: int) -> str:
    """One line of words for `value` in table `name`; empty for no table."""
    return table(name).describe(value) if name else ""
