"""The allowed-0/allowed-1 arithmetic: from the controls that a VMM wants to the value that VM entry accepts, and why they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.errors import FormatError
from vtdbg.vmx.capabilities import WORD_SOURCES, Allowed, VmxCapabilities, msr_name
from vtdbg.vmx.controls import ACTIVATED_BY, find_control


@dataclass(frozen=True)
class ForcedBit:
    """One bit that the processor decides.  `name` is empty for a reserved bit; `why` cites MSR and bit."""

    bit: int
    ident: str
    name: str
    value: int
    why: str


@dataclass(frozen=True)
class Adjustment:
    """`value` is what to write, None where the capability MSR is unknown.

    `forced_on`: bits that were not wanted and must be 1.  `forced_off`: bits that were wanted and must be 0.  `source_msr` decides.
    `notes`: the word's activating control, an MSR that stood in for another, an MSR that contradicts itself.
    """

    word: str
    wanted: int
    value: Optional[int]
    forced_on: Tuple[ForcedBit, ...]
    forced_off: Tuple[ForcedBit, ...]
    source_msr: Optional[int]
    notes: Tuple[str, ...]

    @property
    def possible(self) -> Optional[bool]:
        """Does the processor have everything that was wanted?  None: unknown."""
        return None if self.value is None else not self.forced_off


def adjust(caps: VmxCapabilities, word: str, wanted: Union[int, Iterable[str]]) -> Adjustment:
    """`(wanted | allowed-0) & allowed-1` for control word `word`; `wanted` is a number or the identifiers of the controls.

    SDM vol. 3, appendix VMX Capability Reporting Facility: a control may be 0 if its allowed-0 bit is 0, may be 1 if its allowed-1 bit is 1.
    Where IA32_VMX_BASIC[55] or a TRUE MSR is unknown, the plain MSR decides: its value is accepted by either kind of processor, and a note says so.
    Raises UnknownName for a control that does not exist, FormatError for a number wider than the word.
    """
    table = bits.table(word)
    if isinstance(wanted, int):
        number = wanted
    else:
        number = 0
        for ident in wanted:
            number |= find_control(word, ident).mask
    if number < 0 or number >> table.width:
        raise FormatError(table.title, f"{number:#x} does not fit in {table.width} bits")
    notes = []
    allowed = caps.allowed(word)
    if allowed is None:
        allowed, note = _stand_in(caps, word)
        notes.append(note)
    if allowed is None:
        return Adjustment(word, number, None, (), (), None, tuple(notes))
    gate = ACTIVATED_BY.get(word)
    if gate is not None:
        notes.append(_gate_note(caps, word, gate))
    contradiction = allowed.must_be_one & ~allowed.may_be_one
    if contradiction:
        notes.append(f"{msr_name(allowed.source_msr)} contradicts itself: bits {contradiction:#x} must be 1 and must be 0")
    missing, excess = allowed.violations(number)
    value = (number | allowed.must_be_one) & allowed.may_be_one
    return Adjustment(word, number, value, _forced(table, missing, 1, allowed), _forced(table, excess, 0, allowed),
                      allowed.source_msr, tuple(notes))


def _stand_in(caps: VmxCapabilities, word: str) -> Tuple[Optional[Allowed], str]:
    """The plain MSR where the TRUE one is wanted and unknown: default1 controls are then 1, which every processor accepts."""
    source = WORD_SOURCES[word]
    value = caps.msr(source.msr)
    if value is None:
        return None, f"{msr_name(source.msr)} is unknown: give its value"
    if source.true_msr is None:
        return None, f"whether the word can be activated is unknown: give {msr_name(WORD_SOURCES[ACTIVATED_BY[word][0]].msr)}"
    lacking = "IA32_VMX_BASIC" if caps.true_controls is None else msr_name(source.true_msr)
    note = f"{lacking} is unknown: {msr_name(source.msr)} is used, so default1 controls are 1 even where the processor would allow 0"
    return Allowed(value & 0xFFFFFFFF, value >> 32, source.msr), note


def _gate_note(caps: VmxCapabilities, word: str, gate: Tuple[str, str]) -> str:
    name = bits.table(gate[0])[gate[1]].name
    supported = caps.supports(*gate)
    title = bits.table(gate[0]).title
    if supported is False:
        return f'the processor has no control "{name}" ({title}): the word must be 0'
    unknown = "" if supported else "; whether the processor has it is unknown"
    return f'the word counts only while "{name}" ({title}) is 1{unknown}'


def _forced(table: bits.BitTable, mask: int, value: int, allowed: Allowed) -> Tuple[ForcedBit, ...]:
    return tuple(_forced_bit(table, bit, value, allowed) for bit in range(table.width) if mask >> bit & 1)


def _forced_bit(table: bits.BitTable, bit: int, value: int, allowed: Allowed) -> ForcedBit:
    row = next((row for row in table.fields if row.low <= bit <= row.high), None)
    known = row is not None and row.kind not in bits.NO_MEANING
    name = row.name if row is not None else "undefined"
    halves = WORD_SOURCES[table.id].halves
    msr = msr_name(allowed.source_msr)
    if allowed.source_msr not in (WORD_SOURCES[table.id].msr, WORD_SOURCES[table.id].true_msr):
        why = f"the word cannot be activated ({msr})"
    elif value:
        why = f"{msr}[{bit}] is 1: the control may not be 0"
    else:
        why = f"{msr}[{bit + 32 if halves else bit}] is 0: the control may not be 1"
    if row is not None and row.kind == "default1" and value:
        why += " (reserved, default1)"
    return ForcedBit(bit, row.ident if known and row is not None else "", name, value, why)
