"""MSR names: both ways, all sources' names, near names for the others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.errors import UnknownName, VtdbgError
from vtdbg.x86 import msrs


@pytest.mark.parametrize("name, index", [
    ("IA32_EFER", 0xC0000080), ("MSR_EFER", 0xC0000080), ("efer", 0xC0000080), ("IA32_FEATURE_CONTROL", 0x3A), ("MSR_IA32_FEAT_CTL", 0x3A),
    ("ia32_sysenter_eip", 0x176), ("MSR_LSTAR", 0xC0000082), ("KERNEL_GS_BASE", 0xC0000102), ("MSR_VM_HSAVE_PA", 0xC0010117),
    ("MSR_AMD64_SEV_ES_GHCB", 0xC0010130), ("IA32_VMX_EXIT_CTLS2", 0x493), ("IA32_PAT", 0x277), ("MSR_IA32_CR_PAT", 0x277), ("0x480", 0x480),
    ("480h", 0x480), ("1152", 0x480), ("MSR_K7_HWCR", 0xC0010015), ("IA32_MC3_STATUS", 0x40D), ("IA32_X2APIC_EOI", 0x80B),
])
def test_names_of_linux_intel_and_amd(name: str, index: int) -> None:
    """Indexes are those of Linux' msr-index.h and of the manuals."""
    assert msrs.find(name).index == index


def test_several_meanings_of_an_index_are_kept() -> None:
    """0x186 is a Pentium 4's MCG register in one source and PERFEVTSEL0 in the others."""
    names = msrs.find(0x186).names
    assert names[0] == "IA32_PERFEVTSEL0" and any("MCG" in name for name in names)


def test_a_shown_name_wins_over_an_alias() -> None:
    shown = {}
    for row in msrs.msrs().values():
        shown.setdefault(row.name, []).append(row.index)
    for name, indexes in shown.items():
        assert msrs.find(name).index in indexes, name
        assert set(indexes) <= set(msrs.indexes(name))


def test_an_index_without_a_name_says_so() -> None:
    assert msrs.name_of(0x12345) == "MSR 0x12345"
    assert msrs.find(0x12345).table is None


def test_bit_tables_of_msrs_exist() -> None:
    assert {row.bits for row in msrs.msrs().values() if row.bits} <= set(bits.tables())
    assert msrs.find("IA32_VMX_BASIC").table is bits.table("vmx_basic")


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UnknownName, match="IA32_SYSENTER_E"):
        msrs.find("IA32_SYSENTER_EIPP")
    with pytest.raises(UnknownName):
        msrs.find(1 << 32)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=20))
def test_any_name_is_found_or_refused(name: str) -> None:
    try:
        assert 0 <= msrs.find(name).index < 1 << 32
    except VtdbgError as error:
        assert "\n" not in str(error)
