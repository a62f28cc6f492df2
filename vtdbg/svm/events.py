"""Events in SVM words: EVENTINJ and EXITINTINFO, which share one format.  The valid bit comes first: without it the rest is of the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Optional, Tuple

from vtdbg import bits
from vtdbg.x86 import vectors

VALID = 1 << 31
ERROR_CODE = 1 << 11
INTERRUPT, NMI, EXCEPTION, SOFTWARE_INTERRUPT = 0, 2, 3, 4
TYPES = (INTERRUPT, NMI, EXCEPTION, SOFTWARE_INTERRUPT)
SEE_INJECTION = "APM vol. 2, Event Injection"
SEE_EXITINTINFO = "APM vol. 2, EXITINTINFO Pseudo-Code"


@dataclass(frozen=True)
class SvmEvent:
    """EVENTINJ or EXITINTINFO.  `error_code` is None where the event has none or where it is not known; `problems` says what cannot be."""

    field: str
    value: int
    valid: bool
    vector: int
    type: int
    error_code_valid: bool
    error_code: Optional[int]
    problems: Tuple[str, ...] = ()

    @property
    def type_name(self) -> str:
        return bits.table("event_inj")["TYPE"].meaning(self.value)

    @property
    def title(self) -> str:
        """"#UD (invalid opcode), exception" whether or not the valid bit is set."""
        if self.type == NMI:
            return "NMI"
        name = vectors.title(self.vector) if self.type == EXCEPTION else f"vector {self.vector:#x}"
        error = ""
        if self.error_code_valid:
            error = ", error code unknown" if self.error_code is None else f", error code {self.error_code:#x}"
            words = vectors.describe_error_code(self.vector, self.error_code or 0) if self.type == EXCEPTION and self.error_code is not None else ""
            error += f" ({words})" if words else ""
        return f"{name}, {self.type_name}{error}"

    @property
    def meaning(self) -> str:
        """What a reader has to know: the event, or that there is none."""
        if self.valid:
            return self.title
        if self.value == 0:
            return "no event: V is 0"
        return f"not valid: a past event (vector {self.vector}, {self.type_name})"


def decode(field: str, value: int, error_code: Optional[int] = None) -> SvmEvent:
    """`value` of `field` ("event_inj" or "exit_int_info"); bits 63:32, where they are set, are the error code (APM's 64-bit view).

    The error code counts only with V and EV set.
    """
    valid, with_error = bool(value & VALID), bool(value & ERROR_CODE)
    if value >> 32 and error_code is None:
        error_code = value >> 32
    low = value & 0xFFFF_FFFF
    return SvmEvent(field, low, valid, low & 0xFF, low >> 8 & 7, with_error, error_code if with_error else None,
                    tuple(_problems(field, low)) if valid else ())


def _problems(field: str, value: int) -> Iterator[str]:
    table = "event_inj" if field == "event_inj" else "svm_exit_int_info"
    vector, kind = value & 0xFF, value >> 8 & 7
    for row in bits.table(table).reserved_violations(value):
        yield f"reserved bits {row.field.bits} are {row.number:#x}"
    if kind not in TYPES:
        yield f"type {kind} is reserved"
    if kind == EXCEPTION and (vector == 2 or vector > 31):
        yield "vector 2 is the NMI, not an exception" if vector == 2 else f"vector {vector:#x} is no exception"
    if value & ERROR_CODE:
        row_of = vectors.vector(vector)
        if kind != EXCEPTION:
            yield "only an exception has an error code"
        elif row_of is not None and not row_of.has_error_code:
            yield f"{vectors.name(vector)} has no error code"
