"""Where a field of the current VMCS lies, by changing it: VMWRITE of the complement, a look at the page, VMWRITE of the old value.

This proves the place of every writable field, whatever stands in it, on processors that keep the current VMCS in memory (emulators, and
hypervisors that emulate VMX).  A processor that keeps it on chip shows no change, and nothing is claimed.  VMWRITE changes data only: a field
takes effect at the next VM entry (SDM vol. 3, VMWRITE - Write Field to Virtual-Machine Control Structure), before which it is what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Tuple

from vtdbg.errors import FormatError, VtdbgError
from vtdbg.targets.inject import CF, VMREAD, VMWRITE, ZF, Injector
from vtdbg.targets.interrupts import carried_out
from vtdbg.targets.port import TargetError, TargetGone
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.layout_map import ACCESS_RIGHTS_FIELDS, LayoutField, stored_access_rights

READ_ONLY = 1
"""Bits 11:10 of the encoding of VM-exit information fields (SDM vol. 3, appendix Field Encoding in VMCS)."""


@dataclass(frozen=True)
class Written:
    """`places` that are proved, by encoding; `form` of access rights ("plain", "rotated", "packed", "unknown"); `elsewhere`: writable fields for
    which the page did not change, or not as the field's bytes."""

    places: Mapping[int, LayoutField]
    form: str
    elsewhere: Tuple[int, ...]


def place_by_writing(target: Injector, values: Mapping[int, int], read_page: Callable[[], bytes]) -> Written:
    """Changes every writable field of `values` (by encoding, what VMREAD gives now) for a moment, one at a time.

    `read_page` reads the page of the current VMCS from memory, not from a cache.  Raises TargetError where a field or the page is not what it
    was, naming the field and the value to put back.
    """
    before = read_page()
    places: Dict[int, LayoutField] = {}
    forms: List[str] = []
    elsewhere = []
    for encoding, value in sorted(values.items()):
        if encoding >> 10 & 3 == READ_ONLY:
            continue
        changed = _changed(target, encoding, value, read_page)
        found = None if changed is None else _place(encoding, value, before, changed)
        if found is None:
            elsewhere.append(encoding)
            continue
        places[encoding] = found[0]
        forms += [found[1]] if found[1] else []
    _verify(target, values, before, read_page())
    form = forms[0] if forms and len(set(forms)) == 1 else "unknown"
    return Written(places, form, tuple(elsewhere))


def _complement(encoding: int, value: int) -> int:
    return value ^ ((1 << 8 * vmcs_fields.find(encoding).size) - 1)


def _changed(target: Injector, encoding: int, value: int, read_page: Callable[[], bytes]) -> Optional[bytes]:
    """The page while the field is changed; None where VMWRITE refuses."""
    try:
        flags = target.run(VMWRITE, {"rcx": encoding, "rax": _complement(encoding, value)})["rflags"]
        return None if flags & (CF | ZF) else read_page()
    finally:
        _put_back(target, encoding, value)


def _put_back(target: Injector, encoding: int, value: int) -> None:
    """Whatever has happened; a Ctrl-C waits until it is done."""
    what = f"{vmcs_fields.find(encoding).name} of the current VMCS was being changed, put it back by VMWRITE {encoding:#x}, {value:#x}"

    def put_back() -> None:
        flags = target.run(VMWRITE, {"rcx": encoding, "rax": value}, at_once=True)["rflags"]
        if flags & (CF | ZF):
            # Refused as before: then there is nothing to put back, which VMREAD tells.
            now = target.run(VMREAD, {"rcx": encoding, "rax": 0}, at_once=True)
            if now["rflags"] & (CF | ZF) or now["rax"] != value:
                raise TargetError("VMWRITE fails")

    try:
        carried_out(put_back)
    except VtdbgError as error:
        raise (TargetGone if isinstance(error, TargetGone) else TargetError)(f"{error}; {what}") from error


def _place(encoding: int, value: int, before: bytes, after: bytes) -> "Optional[Tuple[LayoutField, str]]":
    """The place, and the form of access rights: every byte of the field has changed, and no other one."""
    different = [at for at in range(len(before)) if before[at] != after[at]]
    if not different:
        return None
    first, size = different[0], different[-1] - different[0] + 1
    field = vmcs_fields.find(encoding)
    new = _complement(encoding, value)
    for form in ("plain", "rotated", "packed") if encoding in ACCESS_RIGHTS_FIELDS else ("",):
        width = 2 if form == "packed" else field.size
        try:
            stored = [stored_access_rights(field, number, form) if form else number for number in (value, new)]
            old_bytes, new_bytes = (number.to_bytes(width, "little") for number in stored)
        except (FormatError, OverflowError):
            continue
        if size == width and before[first:first + size] == old_bytes and after[first:first + size] == new_bytes:
            return LayoutField(first, size), form
    return None


def _verify(target: Injector, values: Mapping[int, int], before: bytes, after: bytes) -> None:
    if before != after:
        wrong = [at for at in range(len(before)) if before[at] != after[at]]
        raise TargetError(f"the VMCS page is NOT what it was: {len(wrong)} bytes from {wrong[0]:#x} on; it was "
                          f"{before[wrong[0]:wrong[-1] + 1].hex()}")
    for encoding, value in values.items():
        now = target.run(VMREAD, {"rcx": encoding, "rax": 0})
        if now["rflags"] & (CF | ZF) or now["rax"] != value:
            raise TargetError(f"{vmcs_fields.find(encoding).name} is NOT what it was: {now['rax']:#x}, it was {value:#x}")
