"""The SVM exit codes: one row of `data/svm_exit_codes.csv` each, found by number or by any source's name for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Dict, List, Mapping, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.errors import UnknownName
from vtdbg.names import near_names
from vtdbg.record import name_index, name_key

INTERCEPT_WORDS: Tuple[Tuple[str, str], ...] = (
    ("intercept_cr", "intercept_cr"), ("intercept_dr", "intercept_dr"), ("intercept_exceptions", "exception_bitmap"),
    ("intercept_misc1", "intercept_misc1"), ("intercept_misc2", "intercept_misc2"), ("intercept_misc3", "intercept_misc3"))
"""(field, bit table) of the intercept words in their order: exit code n is bit n mod 32 of word n / 32
(APM vol. 2, appendix SVM Intercept Exit Codes and appendix VMCB Layout)."""


@dataclass(frozen=True)
class Intercept:
    """The bit that asks for an exit: field of the VMCB, bit number, identifier in the word's table."""

    field: str
    bit: int
    ident: str


@dataclass(frozen=True)
class ExitCode:
    """One row; the columns are described at the head of the CSV.  `code` is signed: INVALID is -1."""

    kind: str
    code: int
    name: str
    linux: str
    kvm: str
    title: str
    category: str
    advance: str
    info1: str
    info2: str
    nrip: bool
    insn: bool
    decode: bool
    length: Optional[int]
    handler: str
    see: str
    aliases: Tuple[str, ...]
    notes: str

    @property
    def number(self) -> int:
        return self.code

    @property
    def size(self) -> int:
        return 8

    @property
    def intercept(self) -> Optional[Intercept]:
        """The intercept bit that causes it; None for exits that no bit asks for (NPF, AVIC, VMGEXIT, INVALID)."""
        if self.kind != "exit" or not 0 <= self.code < 32 * len(INTERCEPT_WORDS):
            return None
        field, table = INTERCEPT_WORDS[self.code // 32]
        bit = self.code % 32
        return Intercept(field, bit, next(row.ident for row in bits.table(table).fields if row.low == bit))


def _row(row: Mapping[str, str]) -> ExitCode:
    names = tuple(filter(None, row["aliases"].split(";"))) + tuple(filter(None, (row["linux"], row["kvm"])))
    names += tuple(f"VMEXIT_{name}" for name in (row["name"],) + names[:1])
    return ExitCode(row["kind"], int(row["code"]), row["name"], row["linux"], row["kvm"], row["title"], row["class"], row["advance"], row["info1"],
                    row["info2"], row["nrip"] == "y", row["insn"] == "y", row["decode"] == "y", int(row["length"]) if row["length"] else None,
                    row["handler"], f"APM vol. 2, {row['see']}" if not row["see"].startswith("GHCB") else row["see"], names, row["source"])


@cache
def exit_codes() -> Mapping[int, ExitCode]:
    """Every known EXITCODE, and every SW_EXITCODE of a GHCB (`kind` "vmgexit"), by its signed number."""
    return {row.code: row for row in map(_row, bits.read_rows("svm_exit_codes.csv"))}


@cache
def _by_name() -> Dict[str, ExitCode]:
    return name_index(exit_codes().values())


def names() -> List[str]:
    """Canonical names (completion)."""
    return [row.name for row in exit_codes().values()]


def signed(code: int) -> int:
    """EXITCODE as the signed number that the manual means: 0xffffffff (what 32-bit prints show) and 2^64 - 1 are -1.

    Only the codes just below 0 are taken for a cut 64-bit number.
    """
    for width in (64, 32):
        wrapped = code - (1 << width)
        if -16 <= wrapped < 0:
            return wrapped
    return code


def get(name: Union[str, int]) -> Optional[ExitCode]:
    """The row by number ("0x400", 0x400, "-1") or by any name ("NPF", "SVM_EXIT_NPF", "VMEXIT_NPF", "npf"); None where nobody knows it."""
    if isinstance(name, int):
        return exit_codes().get(signed(name))
    try:
        return exit_codes().get(signed(int(name, 0)))
    except ValueError:
        # The uapi header's constants are SVM_EXIT_NPF, its strings for tools EXIT_NPF.
        key = name_key(name)
        bare = next((key[len(prefix):] for prefix in ("svmexit", "exit") if key.startswith(prefix)), key)
        return _by_name().get(key) or _by_name().get(bare)


def find(name: Union[str, int]) -> ExitCode:
    """Like `get`; UnknownName with the near names where nobody knows it."""
    found = get(name)
    if found is None:
        shown = hex(name) if isinstance(name, int) else name
        raise UnknownName("SVM exit code", shown, near_names(name.upper().replace("EXIT_", ""), names()) if isinstance(name, str) else ())
    return found
