"""Which VMCS fields a processor has, by its capability MSRs; what a processor itself says is compared in test_gdb_vmx.py."""

from __future__ import annotations

from typing import Dict

import pytest

from vtdbg.vmx.capabilities import VmxCapabilities, presets
from vtdbg.vmx.fields import fields, find
from vtdbg.vmx.presence import exists, to_ask


def test_without_capabilities_nothing_is_known() -> None:
    """Missing MSRs do not make a field absent."""
    empty = VmxCapabilities.from_msrs({})
    assert all(exists(field, empty) is None for field in fields().values() if field.gate != "seam")
    assert to_ask(None) == sorted(encoding for encoding in fields() if not encoding & 1)


@pytest.mark.parametrize("name", presets())
def test_fields_that_every_processor_has(name: str) -> None:
    """Guest and host state of the first VMX processors, whatever the capabilities."""
    asked = set(to_ask(VmxCapabilities.preset(name)))
    for field in ("GUEST_RIP", "HOST_RIP", "GUEST_CR3", "VM_EXIT_REASON", "EXIT_QUALIFICATION", "GUEST_ES_AR_BYTES", "VM_INSTRUCTION_ERROR"):
        assert find(field).encoding in asked, field


def test_processors_differ_by_their_generation() -> None:
    """EPT came with Nehalem, VMCS shadowing with Haswell, PML with Broadwell servers, tertiary controls and FRED much later."""
    first = {"EPT_POINTER": ("core2-x6800", "i5-3570"), "VMREAD_BITMAP": ("i5-3570", "i7-5600u"), "PML_ADDRESS": ("i5-3570", "i7-6700k")}
    for field, (without, having) in first.items():
        assert exists(find(field), VmxCapabilities.preset(without)) is False
        assert exists(find(field), VmxCapabilities.preset(having)) is True
    assert exists(find("TERTIARY_VM_EXEC_CONTROL"), VmxCapabilities.preset("i7-6700k")) is False


def test_the_highest_index_bounds_all() -> None:
    """IA32_VMX_VMCS_ENUM bits 9:1: no field of the processor has a higher index."""
    values: Dict[int, int] = {0x48A: 0x14 << 1}
    caps = VmxCapabilities.from_msrs(values)
    assert exists(find("EPT_POINTER"), caps) is None and find("EPT_POINTER").encoding >> 1 & 0x1FF == 13
    assert exists(find("PID_POINTER_TABLE"), caps) is False and find("PID_POINTER_TABLE").encoding >> 1 & 0x1FF > 0x14
