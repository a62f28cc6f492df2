"""Which VMCS fields does a processor have?  By its capability MSRs, without asking it for one that it lacks.

Most fields exist only on processors that support the 1-setting of the control that makes them count (SDM vol. 3, appendix Field Encoding in VMCS,
the footnotes of its tables), and no field has a higher index than IA32_VMX_VMCS_ENUM says (appendix VMX Capability Reporting Facility, VMCS
Enumeration).  A VMREAD of a field that does not exist fails and overwrites the VM-instruction error.
"""

from __future__ import annotations

import re
from typing import Iterable, List, Mapping, Optional

from vtdbg import bits
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.fields import VmcsField, fields

VMCS_ENUM = 0x48A
_HIGHEST_INDEX = 0x3FE
_INDEX = 0x1FF

# Where what makes a field count is not what makes it exist.
_EXISTS: Mapping[str, str] = {"EPTP_INDEX": "sec.18", "GUEST_PHYSICAL_ADDRESS": "sec.1", "MSR_DATA": "tert.6", "GUEST_DR7": "",
                              "GUEST_IA32_DEBUGCTL": ""}


def exists(field: VmcsField, caps: VmxCapabilities) -> Optional[bool]:
    """False where the capabilities say that the processor lacks it, True where they say that it has it, None where they do not tell."""
    highest = caps.msr(VMCS_ENUM)
    if highest is not None and field.encoding >> 1 & _INDEX > (highest & _HIGHEST_INDEX) >> 1:
        return False
    gate = _EXISTS.get(field.name, field.gate)
    found = [_all([_token(token, caps) for token in part.split("&")]) for part in gate.split("|")] if gate else [None]
    if any(found):
        return True
    return None if None in found else False


def _all(found: List[Optional[bool]]) -> Optional[bool]:
    if False in found:
        return False
    return None if None in found else True


def _token(token: str, caps: VmxCapabilities) -> Optional[bool]:
    control = re.fullmatch(r"(pin|proc|sec|tert|entry|exit2|exit|vmfunc)\.(\d+)", token)
    if control:
        word, low = control.group(1), int(control.group(2))
        return caps.supports(word, next(row.ident for row in bits.table(word).fields if row.low == low))
    target = re.fullmatch(r"count\.CR3_TARGET_COUNT>(\d+)", token)
    if target:
        most = caps.cr3_target_max
        return None if most is None else int(target.group(1)) < most
    if token == "fred":
        return caps.supports("entry", "LOAD_IA32_FRED")
    # Fields of the SEAM module's own VMCSs are no business of a hypervisor outside of it, and no capability MSR tells of them.
    return False if token == "seam" else None


def to_ask(caps: Optional[VmxCapabilities], encodings: Optional[Iterable[int]] = None) -> List[int]:
    """Of `encodings` (default: every known field) those that the processor does not certainly lack; all of them without `caps`."""
    known = fields()
    wanted = sorted(encoding for encoding in (known if encodings is None else encodings) if not encoding & 1)
    return wanted if caps is None else [encoding for encoding in wanted if encoding not in known or exists(known[encoding], caps) is not False]
