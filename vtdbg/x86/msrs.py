"""MSR names by index and indexes by name: Intel, AMD and what both have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Dict, List, Mapping, Optional, Tuple, Union

from vtdbg.bits import BitTable, read_rows
from vtdbg.bits import table as bit_table
from vtdbg.errors import UnknownName
from vtdbg.names import near_names


@dataclass(frozen=True)
class Msr:
    """One index.  `name` is what is shown; `aliases` are other sources' names, some of them for other registers of other processors.

    `bits` is the id of the bit table that lays the value out, empty where there is none.
    """

    index: int
    name: str
    aliases: Tuple[str, ...]
    bits: str

    @property
    def table(self) -> Optional[BitTable]:
        return bit_table(self.bits) if self.bits else None

    @property
    def names(self) -> Tuple[str, ...]:
        return (self.name, *self.aliases)


@cache
def msrs() -> Mapping[int, Msr]:
    """Every named MSR by index, in index order."""
    rows = [Msr(int(row["index"], 16), row["name"], tuple(filter(None, row["aliases"].split("|"))), row["table"])
            for row in read_rows("msrs.csv")]
    return {row.index: row for row in sorted(rows, key=lambda row: row.index)}


def _key(name: str) -> str:
    """Names compare without case, punctuation and the prefixes that differ between sources: MSR_IA32_EFER, IA32_EFER, efer."""
    text = name.strip().upper()
    for prefix in ("MSR_", "IA32_"):
        if text.startswith(prefix):
            text = text[len(prefix):]
    return re.sub(r"[^A-Z0-9]+", "", text)


@cache
def _by_name() -> Dict[str, Tuple[int, ...]]:
    """Indexes by the whole name in upper case and by its key.

    Shown names come before aliases, and one name can belong to several indexes of several processors.
    """
    found: Dict[str, List[int]] = {}
    for shown in (True, False):
        for row in msrs().values():
            for name in (row.name,) if shown else row.aliases:
                for key in (name.upper(), _key(name)):
                    indexes = found.setdefault(key, [])
                    if row.index not in indexes:
                        indexes.append(row.index)
    return {key: tuple(indexes) for key, indexes in found.items()}


def names() -> List[str]:
    """The shown names, in index order (completion)."""
    return [row.name for row in msrs().values()]


def parse_index(text: str) -> Optional[int]:
    """"0x480", "480h" as an index; None for what is no hexadecimal index.  Bare decimal digits are decimal."""
    stripped = text.strip()
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}", stripped):
        return int(stripped, 16)
    if re.fullmatch(r"[0-9][0-9a-fA-F]{0,8}[hH]", stripped):
        return int(stripped[:-1], 16)
    return int(stripped) if re.fullmatch(r"[0-9]{1,10}", stripped) and int(stripped) < 1 << 32 else None


def indexes(name: str) -> Tuple[int, ...]:
    """Every index that some source calls `name`, the likeliest first; empty where nobody does."""
    return _by_name().get(name.strip().upper()) or _by_name().get(_key(name), ())


def _row_of(text: str) -> Optional[Msr]:
    """The MSR whose index stands in a log without 0x."""
    return msrs().get(int(text, 16)) if re.fullmatch(r"[0-9a-fA-F]{1,8}", text) else None


def find(name: Union[int, str]) -> Msr:
    """The MSR by index (an int, "0x480", "480h") or by any name in any case, with or without MSR_ and IA32_.

    An index without a name is an Msr called "MSR 0x...".  Raises UnknownName with the near names for a name that nobody knows, and for an
    index that does not fit in 32 bits.
    """
    if isinstance(name, str):
        index = parse_index(name)
        if index is None:
            known = indexes(name)
            if not known:
                meant = _row_of(name.strip())
                similar = near_names(name, names()) or near_names(f"IA32_{name}", names())
                raise UnknownName("MSR", name, (f"{meant.index:#x} ({meant.name})",) if meant is not None else similar)
            index = known[0]
    else:
        index = name
    if index < 0 or index >> 32:
        raise UnknownName("MSR", hex(index))
    return msrs().get(index) or Msr(index, f"MSR {index:#x}", (), "")


def name_of(index: int) -> str:
    """The shown name: "IA32_EFER" for 0xc0000080, "MSR 0x1234" for what has none."""
    known = msrs().get(index)
    return known.name if known else f"MSR {index:#x}"
