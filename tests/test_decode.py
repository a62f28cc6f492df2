"""One name space over every table: what people type finds the table that the manuals mean, and what is wrong is named."""

from __future__ import annotations

from typing import Any, Dict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtdbg import bits
from vtdbg.decode import control_settings, decode, names
from vtdbg.errors import UnknownName, UsageError, VtdbgError
from vtdbg.vmx import fields as vmcs_fields


@pytest.mark.parametrize("name, table", [
    ("cr0", "cr0"), ("CR4", "cr4"), ("efer", "efer"), ("rflags", "rflags"), ("eflags", "rflags"), ("dr6", "dr6"), ("dr7", "dr7"), ("xcr0", "xcr0"),
    ("feature_control", "feature_control"), ("IA32_FEATURE_CONTROL", "feature_control"), ("vmx_basic", "vmx_basic"), ("vmx-misc", "vmx_misc"),
    ("ept_vpid_cap", "ept_vpid_cap"), ("eptp", "eptp"), ("EPT_POINTER", "eptp"), ("ar", "access_rights"), ("GUEST_CS_AR_BYTES", "access_rights"),
    ("interruptibility", "interruptibility"), ("activity", "activity"), ("intr-info", "exit_int_info"),
    ("VM_ENTRY_INTR_INFO_FIELD", "entry_int_info"),
    ("pat", "pat"), ("GUEST_IA32_PAT", "pat"), ("debugctl", "debugctl"), ("mtrr", "mtrr_def_type"), ("IA32_MTRR_PHYSBASE0", "mtrr_physbase"),
    ("primary", "proc"), ("CPU_BASED_VM_EXEC_CONTROL", "proc"), ("secondary", "sec"), ("0x681e", None),
    ("GUEST_RIP", None), ("msr 0x480", "vmx_basic"),
    ("msr IA32_EFER", "efer"), ("msr MSR_LSTAR", None), ("int_ctl", "int_ctl"), ("ept_pte", "ept_pte"), ("npt_pde_2m", "npt_pde_2m"), ("pte", "pte"),
    ("exit_reason", "exit_reason"), ("event_inj", "event_inj"), ("vm_cr", "vm_cr"), ("VM_CR", "vm_cr"), ("GuestCr0", "cr0"), ("selector", "selector"),
])
def test_names_lead_to_their_table(name: str, table: "str | None") -> None:
    found = decode(name, 0)
    assert (found.table.id if found.table else None) == table


def test_every_offered_name_decodes() -> None:
    for name in names():
        assert decode(name, 0).what


def test_every_table_decodes_under_its_own_name() -> None:
    for table_id, table in bits.tables().items():
        assert decode(table_id, 0).table is table


def test_vmcs_fields_of_the_truth_decode_without_a_problem(intel_plain_truth: Dict[str, Any]) -> None:
    """Every value that KVM dumped for VM B is legal in its bits: only what the program spoilt (CS type) fails, and that is not a reserved bit."""
    for encoding, value in intel_plain_truth["vms"]["B"]["dump_vmcs_by_encoding"].items():
        found = decode(encoding, int(value, 16))
        assert found.problems == (), (found.name, found.problems)
        assert found.name == vmcs_fields.find(encoding).name


def test_reserved_bits_and_values_are_problems() -> None:
    assert decode("cr4", 1 << 15).problems == ("reserved bit 15 is 1: it has to be 0",)
    assert decode("rflags", 0).problems == ("reserved bit 1 is 0: it has to be 1",)
    assert "WALK_LENGTH" in decode("eptp", 0x1000 | 6).problems[0]
    assert "bits above 31" in decode("pin", 1 << 40).problems[0]
    assert any("PA1" in problem for problem in decode("pat", 0x0007040600070206).problems)


def test_an_event_without_its_valid_bit_is_old() -> None:
    """KVM's fixture keeps 0x306 in the entry interruption information: not a pending event."""
    old = decode("entry_int_info", 0x306)
    assert "valid bit is 0" in old.notes[0] and old.problems == ()
    assert decode("entry_int_info", 0x80000306).notes == ()


@pytest.mark.parametrize("name, leaf", [("ept_pde", "ept_pde_2m"), ("pde", "pde_2m"), ("npt_pdpte", "npt_pdpte_1g"), ("ept level2", "ept_pde_2m"),
                                        ("pae_pde", "pae_pde_2m"), ("pde32", "pde32_4m")])
def test_an_entry_with_bit_7_maps_a_page(name: str, leaf: str) -> None:
    """Bits 20:12 of a 2-MByte EPT entry are reserved; of an entry that references a table they are address bits."""
    found = decode(name, 0x40000000 | 0x80 | 7)
    assert found.table.id == leaf and "maps a page" in found.notes[0] and found.problems == ()
    assert decode(name, 0x40000000 | 7).table.id != leaf


def test_an_entry_that_is_not_present_has_no_reserved_bits() -> None:
    """A swapped-out page keeps a swap offset in its entry; EPT without R, W, X is not present either."""
    for name in ("pte", "pde_2m", "ept_pte", "npt_pte", "pae_pdpte"):
        table = bits.table(name)
        assert decode(name, table.kind_mask("reserved0") & ~0x407).problems == ()
        assert any("not present" in note for note in decode(name, 0).notes)
    assert decode("ept_pte", 1 << 3 | 1).problems == () and decode("ept_pte", 2 << 3 | 1).problems


def test_words_are_the_tables() -> None:
    found = decode("cr0", 0x80050033)
    assert found.words == "PG AM WP NE ET MP PE"
    assert [row.ident for row in found.rows if row.number and row.ident] == found.words.split()
    assert decode("GUEST_RIP", 0x1000).words == "0x1000" and "nobody lays" in decode("GUEST_RIP", 0x1000).notes[0]


def test_capability_msrs_decode_to_settings() -> None:
    """IA32_VMX_PINBASED_CTLS: the allowed-0 half is bits 31:0, the allowed-1 half 63:32."""
    found = decode("IA32_VMX_PINBASED_CTLS", 0x0000007F00000016)
    settings_by_bit = {row.bit: row.setting for row in found.settings}
    assert settings_by_bit[0] == "0 or 1" and settings_by_bit[1] == "must be 1" and settings_by_bit[7] == "must be 0"
    assert found.notes == ()
    assert {row.ident: row.setting for row in control_settings(0x491, 1)}["EPTP_SWITCHING"] == "0 or 1"
    assert {row.bit: row.setting for row in control_settings(0x481, 1)}[0] == "contradictory"
    assert control_settings(0x480, 1) == ()


def test_unknown_names_and_values() -> None:
    with pytest.raises(UnknownName, match="GUEST_INTERRUPTIBILITY"):
        decode("GUEST_INTERRUPTIBILTY_INFO", 0)
    with pytest.raises(UnknownName):
        decode("", 0)
    with pytest.raises(UnknownName):
        decode("msr NO_SUCH_MSR_AT_ALL", 0)
    for value in (-1, 1 << 64):
        with pytest.raises(UsageError):
            decode("cr0", value)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.sampled_from(sorted(bits.tables())), st.text(max_size=12)), st.integers(0, (1 << 64) - 1))
def test_any_name_and_value(name: str, value: int) -> None:
    try:
        found = decode(name, value)
    except VtdbgError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(found.words, str) and found.value == value
    if found.table is not None:
        covered = sum(row.number << (0 if row.field.kind in ("address", "linear") else row.field.low) for row in found.rows)
        assert covered == value & found.table.defined_mask()
