"""Which fields does the processor use?  The gates of `data/vmcs_fields.csv`, evaluated on a VMCS.

A field that the controls leave unused still holds a number; shown as if it counted it would mislead (KVM's dump prints a computed
EFER where the VMCS field is never loaded).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Callable, Dict, Mapping, Match, Optional, Sequence, Tuple

from vtdbg import bits
from vtdbg.record import USED, Gate
from vtdbg.vmx.controls import control, control_name
from vtdbg.vmx.exit_reasons import ENTRY_FAILURE
from vtdbg.vmx.fields import VmcsField
from vtdbg.vmx.vmcs import Vmcs


def gate_of(vmcs: Vmcs, field: VmcsField) -> Gate:
    """Does the processor use (or did the last exit write) this field of this VMCS?"""
    failed = _entry_failure(vmcs, field)
    if failed is not None:
        return failed
    if not field.gate:
        return USED
    if field.gate.startswith(("entry.", "exit.", "exit2.")):
        return _loaded(vmcs, field)
    alternatives = [_all_of(vmcs, field, part) for part in field.gate.split("|")]
    for gate in alternatives:
        if gate.used:
            return gate
    undecided = [gate for gate in alternatives if gate.used is None]
    return undecided[0] if undecided else alternatives[0]


def unused_because(vmcs: Vmcs, field: VmcsField) -> Optional[str]:
    """Why the field does not count ("not loaded: VM-entry control ... is 0"), None where it does or where that is unknown."""
    gate = gate_of(vmcs, field)
    return gate.why if gate.used is False else None


def _entry_failure(vmcs: Vmcs, field: VmcsField) -> Optional[Gate]:
    """A failed VM entry writes the exit reason and the qualification and nothing else.

    SDM vol. 3, VM-Entry Failures During or After Loading Guest State.
    """
    reason = vmcs.get("VM_EXIT_REASON")
    if field.group != "exit-info" or reason is None or not reason & ENTRY_FAILURE:
        return None
    if field.name in ("VM_EXIT_REASON", "EXIT_QUALIFICATION"):
        return USED
    return Gate(used=False, why="not written by a failed VM entry: the value of an older exit")


def _all_of(vmcs: Vmcs, field: VmcsField, part: str) -> Gate:
    gates = [_token(vmcs, field, token) for token in part.split("&")]
    for gate in gates:
        if gate.used is False:
            return gate
    return next((gate for gate in gates if gate.used is None), USED)


@cache
def _ident_at(word: str, bit: int) -> str:
    return next(row.ident for row in bits.table(word).fields if row.low == bit)


def _control(vmcs: Vmcs, word: str, bit: int) -> Gate:
    ident = _ident_at(word, bit)
    on = control(vmcs, word, ident)
    if on is None:
        return Gate(used=None, why=f"{control_name(word, ident)} is unknown")
    return USED if on else Gate(used=False, why=f"{control_name(word, ident)} is 0")


def _loaded(vmcs: Vmcs, field: VmcsField) -> Gate:
    """State that an entry or exit control loads or saves: loaded is what counts; saved is at least fresh."""
    by_word: Dict[str, Gate] = {}
    for token in field.gate.split("|"):
        word, _, bit = token.partition(".")
        by_word[word] = _control(vmcs, word, int(bit))
    loader = next(iter(by_word.values()))
    if loader.used or loader.used is None:
        return loader
    saver = by_word.get("exit") if len(by_word) > 1 else None
    if saver is not None and saver.used and field.group != "host":
        return Gate(used=True, why=f"saved by VM exits, not loaded: {loader.why}")
    return Gate(used=False, why=f"not loaded: {loader.why}")


def _count(vmcs: Vmcs, _field: VmcsField, match: Match[str]) -> Gate:
    name, least = match.group(1), int(match.group(2))
    count = vmcs.get(name)
    if count is None:
        return Gate(used=None, why=f"{name} is unknown")
    return USED if count > least else Gate(used=False, why=f"unused: {name} is {count}")


def _word_bit(vmcs: Vmcs, field: VmcsField, match: Match[str]) -> Gate:
    name, bit = match.group(1), int(match.group(2))
    value = vmcs.get(name)
    if value is None:
        return Gate(used=None, why=f"{name} is unknown")
    if value >> bit & 1:
        return USED
    what = "not valid" if bit == 31 else "no error code"
    return Gate(used=False, why=f"{what}: bit {bit} is 0" + ("" if name == field.name else f" in {name}"))


def _event_type(vmcs: Vmcs, _field: VmcsField, match: Match[str]) -> Gate:
    name, types = match.group(1), [int(number) for number in match.group(2).split(",")]
    value = vmcs.get(name)
    if value is None:
        return Gate(used=None, why=f"{name} is unknown")
    row = bits.table("entry_int_info")["TYPE"]
    return USED if row.of(value) in types else Gate(used=False, why=f"unused: the event is a {row.meaning(value)}")


def _reason(vmcs: Vmcs, _field: VmcsField, match: Match[str]) -> Gate:
    reason = vmcs.get("VM_EXIT_REASON")
    if reason is None:
        return Gate(used=None, why="VM_EXIT_REASON is unknown")
    if reason & 0xFFFF in [int(number) for number in match.group(1).split(",")]:
        return USED
    return Gate(used=False, why=f"not written by this exit (reason {reason & 0xFFFF}): the value of an older one")


def _exception(vmcs: Vmcs, _field: VmcsField, match: Match[str]) -> Gate:
    bitmap, vector = vmcs.get("EXCEPTION_BITMAP"), int(match.group(1))
    if bitmap is None:
        return Gate(used=None, why="EXCEPTION_BITMAP is unknown")
    # With the bit clear the mask and match decide too: a mismatch inverts it (SDM vol. 3, Exception Bitmap).
    mask, matched = vmcs.get("PAGE_FAULT_ERROR_CODE_MASK"), vmcs.get("PAGE_FAULT_ERROR_CODE_MATCH")
    if bitmap >> vector & 1 or mask or matched:
        return USED
    return Gate(used=False, why="no effect: mask and match are 0, the exception bitmap alone decides")


def _linear_address(vmcs: Vmcs, _field: VmcsField, _match: Match[str]) -> Gate:
    """Exits that write the guest-linear address (SDM vol. 3, Basic VM-Exit Information)."""
    reason, qualification = vmcs.get("VM_EXIT_REASON"), vmcs.get("EXIT_QUALIFICATION")
    if reason is None or qualification is None:
        return Gate(used=None, why="exit reason or qualification is unknown")
    basic = reason & 0xFFFF
    writes = {48: bool(qualification & 0x80), 30: bool(qualification & 0x10), 28: qualification & 0x70 == 0x70}
    if writes.get(basic):
        return USED
    return Gate(used=False, why=f"not written by this exit (reason {basic}): the value of an older one")


def _pae_guest(vmcs: Vmcs, _field: VmcsField, _match: Match[str]) -> Gate:
    cr0, cr4, long_mode = vmcs.get("GUEST_CR0"), vmcs.get("GUEST_CR4"), control(vmcs, "entry", "IA32E_MODE")
    if cr0 is None or cr4 is None or long_mode is None:
        return Gate(used=None, why="the guest's paging mode is unknown")
    pae = cr0 >> 31 & 1 and cr4 >> 5 & 1 and not long_mode
    return USED if pae else Gate(used=False, why="unused: the guest does not use PAE paging")


def _words(words: str, used: Optional[bool] = False) -> Callable[[Vmcs, VmcsField, Match[str]], Gate]:
    return lambda _vmcs, _field, _match: Gate(used, words)


TOKENS: Sequence[Tuple[str, Callable[[Vmcs, VmcsField, Match[str]], Gate]]] = (
    (r"count\.(\w+)>(\d+)", _count),
    (r"word\.(\w+)\.(\d+)", _word_bit),
    (r"type\.(\w+):([\d,]+)", _event_type),
    (r"reason\.([\d,]+)", _reason),
    (r"exception\.(\d+)", _exception),
    (r"gla", _linear_address),
    (r"pae", _pae_guest),
    (r"smm", _words("used by SMM VM exits only", used=None)),
    (r"vmfail", _words("written by a VMfail only", used=None)),
    (r"fred", _words("used with FRED only", used=None)),
    (r"seam", _words("used in SEAM (TDX) only", used=None)),
)


def _token(vmcs: Vmcs, field: VmcsField, token: str) -> Gate:
    plain = re.fullmatch(r"(pin|proc|sec|tert|entry|exit2|exit|vmfunc)\.(\d+)", token)
    if plain:
        gate = _control(vmcs, plain.group(1), int(plain.group(2)))
        return gate if gate.used is not False else Gate(used=False, why=f"unused: {gate.why}")
    for pattern, evaluate in TOKENS:
        match = re.fullmatch(pattern, token)
        if match:
            return evaluate(vmcs, field, match)
    raise AssertionError(f"{field.name}: unknown gate {token!r} in vmcs_fields.csv")


def gates(vmcs: Vmcs) -> Mapping[str, Gate]:
    """The gate of every known field of the VMCS by name."""
    return {value.field.name: gate_of(vmcs, value.field) for value in vmcs.values()}

