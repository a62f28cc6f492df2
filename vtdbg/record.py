"""Values by field with their provenance: what a VMCS and a VMCB have in common.

A field is a row of a table (`VmcsField`, `VmcbField`) with a number that identifies it: the encoding or the offset.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Callable, Dict, Generic, Iterable, Iterator, Mapping, NamedTuple, Optional, Tuple, TypeVar, Union

from vtdbg.errors import FormatError, UnknownName

Name = Union[str, int]


if TYPE_CHECKING:
    from typing import Protocol

    class Field(Protocol):
        """What a row of a field table has."""

        @property
        def name(self) -> str: ...

        @property
        def title(self) -> str: ...

        @property
        def aliases(self) -> Tuple[str, ...]: ...

        @property
        def size(self) -> int:
            """Bytes."""

        @property
        def number(self) -> int:
            """What identifies the field: the encoding, the offset."""

    class Value(Protocol):
        """A value of a record, with where it is from ("page offset 0x1c8, layout bochs_2.7", "text line 12")."""

        @property
        def field(self) -> Any: ...

        @property
        def value(self) -> int: ...

        @property
        def source(self) -> str: ...


F = TypeVar("F", bound="Field")
V = TypeVar("V", bound="Value")


class MissingField(UnknownName):
    """The field exists, this record does not have its value: the layout lacks it, or nobody gave it."""

    def __init__(self, field: Field, origin: str) -> None:
        self.field = field
        super().__init__("value", field.name)
        self.message = f"{field.name} ({field.title}) is unknown: {origin}"
        self.args = (self.message,)


class Gate(NamedTuple):
    """Does the processor use a field?  `used` True, False, or None where an input is missing; `why` in words when it is not True."""

    used: Optional[bool]
    why: str = ""


USED = Gate(used=True)


class Record(Generic[F, V]):
    """Values by field.  A field that is absent is unknown, never 0.  A subclass knows its table (`_find`, `_known`)."""

    def __init__(self, values: Mapping[int, V], origin: str, warnings: Iterable[str] = ()) -> None:
        self._values: Dict[int, V] = dict(sorted(values.items()))
        self.origin = origin
        self.warnings = list(warnings)

    def _find(self, name: Name) -> F:
        """The field; UnknownName where nobody knows it."""
        raise NotImplementedError

    def _known(self, name: Name) -> Optional[F]:
        """The field, None where nobody knows it."""
        raise NotImplementedError

    def _lacking(self, field: F) -> str:
        """Why `field` has no value here."""
        return f"not in the {self.origin}"

    def field(self, name: Name) -> F:
        """The field's row, whether its value is known here or not; UnknownName where nobody knows it."""
        return self._find(name)

    def __getitem__(self, name: Name) -> int:
        return self.value(name).value

    def value(self, name: Name) -> V:
        """The value with its provenance; UnknownName for no such field, MissingField (a KeyError) where this record lacks it."""
        field = self._find(name)
        found = self._values.get(field.number)
        if found is None:
            raise MissingField(field, self._lacking(field))
        return found

    def get(self, name: Name, default: Optional[int] = None) -> Optional[int]:
        """The value, or `default` where it is unknown; a name that nobody knows still raises UnknownName."""
        found = self._values.get(self._find(name).number)
        return default if found is None else found.value

    def source(self, name: Name) -> str:
        return self.value(name).source

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, (str, int)):
            return False
        field = self._known(name)
        return field is not None and field.number in self._values

    def __iter__(self) -> Iterator[str]:
        return (value.field.name for value in self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[Tuple[str, int]]:
        """(canonical name, value) in the order of the table."""
        return ((value.field.name, value.value) for value in self._values.values())

    def values(self) -> Iterator[V]:
        """Every known value with its field and provenance, in the order of the table."""
        return iter(self._values.values())


def checked_values(values: Mapping[Name, int], find: Callable[[Name], F], make: Callable[[F, int], V]) -> Dict[int, V]:
    """Values by field number out of values by name.

    Raises UnknownName for a field that nobody knows, FormatError for a value wider than the field.
    """
    checked: Dict[int, V] = {}
    for name, value in values.items():
        field = find(name)
        if value < 0 or value >> (field.size * 8):
            raise FormatError(field.name, f"value {value:#x} does not fit in {field.size * 8} bits")
        checked[field.number] = make(field, value)
    return checked


@lru_cache(maxsize=8192)
def name_key(name: str) -> str:
    """Names compare without case and punctuation: `GUEST_ES_AR_BYTES`, `GuestEsArBytes`, `guest es ar bytes` are one."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def name_index(rows: Iterable[F]) -> Dict[str, F]:
    """Rows by the key of every name.  Canonical names win over aliases: a source's name sometimes equals another field's canonical name."""
    rows = list(rows)
    names: Dict[str, F] = {}
    for row in rows:
        for alias in row.aliases + (row.title,):
            names.setdefault(name_key(alias), row)
    for row in rows:
        names[name_key(row.name)] = row
    return names
