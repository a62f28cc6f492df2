"""The VMRUN checks: every rule has a VMCB that passes it and one that fails only it; a missing input never makes a pass or a fail."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vtdbg
from vtdbg.errors import UsageError
from vtdbg.findings import Finding, failures
from vtdbg.memory.open import open_machine
from vtdbg.svm import lint
from vtdbg.svm.capabilities import SvmCapabilities
from vtdbg.svm.entry import RULES, check_vmrun
from vtdbg.svm.exits import explain_svm_exit
from vtdbg.svm.lint import lint_vmcb
from vtdbg.svm.vmcb import Vmcb

VMCB_ADDRESS = 0x1F22000
PDPT = 0x1000

LEAVES: Dict[Any, Tuple[int, int, int, int]] = {
    0: (0xD, 0, 0, 0),
    1: (0, 0, 1 << 17 | 1 << 26, 0),
    7: (0, 1 | 1 << 7 | 1 << 20, 1 << 2 | 1 << 3 | 1 << 7, 0),
    (7, 1): (0, 0, 0, 0),
    0x80000000: (0x80000021, 0, 0, 0),
    0x80000001: (0, 0, 1 << 2 | 1 << 17, 1 << 29 | 1 << 25),
    0x80000008: (0x3028, 0, 0, 0),
    0x8000000A: (1, 0x8000, 0, 0xFFFFFFFF),
    0x8000001F: (0, 0, 0, 0),
    0x80000021: (0, 0, 0, 0),
}
"""A processor with everything that the rules ask for except 5-level paging and FRED: 40 physical and 48 linear bits, no memory encryption."""

HOST: Mapping[str, Optional[int]] = {"efer": 0x1D01, "cr0": 0x80050033, "cpl": 0, "u_cet": 0}


def caps(**changes: Tuple[int, int, int, int]) -> SvmCapabilities:
    return SvmCapabilities.from_cpuid({**LEAVES, **{int(key[1:], 16): value for key, value in changes.items()}})


@pytest.fixture(scope="module")
def base(amd_exit: Path) -> Vmcb:
    """KVM's VMCB, which an emulated processor entered with."""
    return Vmcb.from_page(open_machine(amd_exit).memory.read(VMCB_ADDRESS, 4096))


class Case(NamedTuple):
    """What to change of the base so that exactly one rule fails, or so that it is undecided."""

    values: Mapping[str, int] = {}
    host: Mapping[str, Optional[int]] = {}
    leaves: Mapping[str, Tuple[int, int, int, int]] = {}
    address: int = VMCB_ADDRESS
    memory: bytes = bytes(4096)


NP, SEV, SEV_ES = 1, 2, 4
INT_CTL = 0x1000005
AVIC = 1 << 31
PAE = {"efer": 0x1800, "cr0": 0x80050033, "cr4": 0x660, "cs.attrib": 0xC9B, "nested_ctl": 0, "rip": 0x91, "cr3": PDPT}
CET = {"cr4": 0x660 | 1 << 23}

FAILING: Mapping[str, List[Case]] = {
    "host.svme": [Case(host={"efer": 0xD01})],
    "host.cpl": [Case(host={"cpl": 3})],
    "host.vmcb_address": [Case(address=0x1F22010), Case(address=1 << 40), Case(address=1 << 52)],
    "host.nested_paging": [Case(host={"cr0": 0x50033})],
    "controls.vmrun_intercept": [Case({"intercept_misc2": 0x6E7E})],
    "controls.msrpm": [Case({"msrpm_base_pa": (1 << 40) - 0x1000}), Case({"msrpm_base_pa": 1 << 40}), Case({"msrpm_base_pa": 2**64 - 1})],
    "controls.iopm": [Case({"iopm_base_pa": (1 << 40) - 0x2000}), Case({"iopm_base_pa": 0xFFFF888001FA4000})],
    "controls.asid": [Case({"asid": 0})],
    "controls.nested_paging": [Case(leaves={"x8000000a": (1, 0x8000, 0, 0xFFFFFFFE)})],
    "controls.nested_cr3": [Case({"nested_cr3": 1 << 40}), Case({"nested_cr3": 1 << 63}), Case({"nested_cr3": 0xFFFF888001F52000})],
    "controls.vnmi": [Case({"int_ctl": INT_CTL | 1 << 26, "intercept_misc1": 0xBD4C8025})],
    "controls.avic.supported": [Case({"int_ctl": INT_CTL | AVIC}, leaves={"x8000000a": (1, 0x8000, 0, 0xFFFFFFFF & ~(1 << 13))})],
    "controls.avic.x2avic": [Case({"int_ctl": INT_CTL | 1 << 30})],
    "controls.avic.backing_page": [Case({"int_ctl": INT_CTL | AVIC, "avic_backing_page": 1 << 40})],
    "controls.avic.logical_id": [Case({"int_ctl": INT_CTL | AVIC, "avic_logical_id": 1 << 51})],
    "controls.avic.physical_id": [Case({"int_ctl": INT_CTL | AVIC, "avic_physical_id": 1 << 52})],
    "controls.avic.max_index": [Case({"int_ctl": INT_CTL | AVIC, "avic_physical_id": 0xFF})],
    "controls.sev.nested": [Case({"nested_ctl": SEV})],
    "controls.sev.es": [Case({"nested_ctl": NP | SEV_ES})],
    "controls.sev.vmsa": [Case({"nested_ctl": NP | SEV | SEV_ES, "vmsa_pa": 0x1008}), Case({"nested_ctl": NP | SEV | SEV_ES, "vmsa_pa": 1 << 41})],
    "controls.event.type": [Case({"event_inj": 0x80000000 | kind << 8 | 6}) for kind in (1, 5, 6, 7)],
    "controls.event.vector": [Case({"event_inj": 0x80000302}), Case({"event_inj": 0x80000320}), Case({"event_inj": 0x800003FF})],
    "guest.efer.svme": [Case({"efer": 0xD00})],
    "guest.cr0.cd_nw": [Case({"cr0": 0x80050033 | 1 << 29})],
    "guest.cr0.high": [Case({"cr0": 0x80050033 | 1 << 32}), Case({"cr0": 0x80050033 | 1 << 63})],
    "guest.cr3": [Case({"cr3": 1 << 40}), Case({"cr3": 1 << 52}), Case({"cr3": 0xFFFF888000001000})],
    "guest.cr4": [Case({"cr4": 0x660 | 1 << bit}) for bit in (12, 13, 14, 15, 19, 24, 25, 27, 28, 31, 32, 33, 63)],
    "guest.dr6.high": [Case({"dr6": 0x1_FFFF0FF0})],
    "guest.dr7.high": [Case({"dr7": 0x8000_0000_0000_0400})],
    "guest.efer.reserved": [Case({"efer": 0x1D00 | 1 << bit}) for bit in (1, 7, 9, 16, 17, 18, 19, 20, 21, 22, 63)],
    "guest.efer.long_mode": [Case(leaves={"x80000001": (0, 0, 1 << 2 | 1 << 17, 1 << 25)})],
    "guest.long.pae": [Case({"cr4": 0x640})],
    "guest.long.pe": [Case({"cr0": 0x80050032})],
    "guest.long.cs": [Case({"cs.attrib": 0xE9B})],
    "guest.s_cet": [Case({**CET, "s_cet": 1 << 6}), Case({"s_cet": 1 << 2}), Case({"s_cet": 1 << 12})],
    "guest.cet.wp": [Case({**CET, "cr0": 0x80040033})],
    "guest.cet.vm86": [Case({**CET, "rflags": 0x20002}, host={"u_cet": 1})],
    "guest.g_pat": [Case({"g_pat": value}) for value in (2, 3 << 56, 8 << 8, 0x80 << 24)],
    "guest.pdpte": [Case({**PAE}, memory=value.to_bytes(8, "little").ljust(4096, b"\0"))
                    for value in (0x2003, 0x2009 | 1 << 7, 0x2001 | 1 << 63, 1 | 1 << 40)],
}

NEVER_DECIDED: FrozenSet[str] = frozenset({"controls.sev.allowed_features"})
"""What only the encrypted VMSA tells."""


def run(base: Vmcb, case: Case = Case()) -> List[Finding]:  # noqa: B008  (a NamedTuple of constants)
    memory = vtdbg.memory_from_segments([(PDPT, case.memory)])
    return check_vmrun(base.replaced(case.values), caps(**case.leaves), memory, host={**HOST, **case.host}, vmcb_address=case.address)


def test_a_vmcb_that_a_processor_entered_with_passes_every_rule(base: Vmcb) -> None:
    assert {finding.id: finding.verdict for finding in run(base) if finding.verdict != "pass"} == {}


def test_every_rule_has_a_case() -> None:
    assert set(FAILING) | NEVER_DECIDED == {rule.id for rule in RULES}
    assert len(RULES) == len({rule.id for rule in RULES})


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, cases in FAILING.items() for case in cases])
def test_each_rule_fails_alone(base: Vmcb, rule: str, case: Case) -> None:
    """One thing wrong, one rule that says so; its message holds the number that is to blame."""
    found = failures(run(base, case))
    assert [finding.id for finding in found] == [rule]
    assert found[0].see.startswith("APM vol. 2, ") and found[0].message
    if case.values and rule.startswith("guest") and rule != "guest.pdpte":
        assert any(f"{value:#x}" in found[0].message for value in case.values.values()), found[0].message


ALLOWED = [
    Case({"cr4": 0x7FF | 1 << 11 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21 | 1 << 22}),     # every bit that the processor has
    Case({"cr0": 0x80050033 | 3 << 29}), Case({"cr0": 0x80050033 | 1 << 30}),                       # CD with and without NW
    Case({"efer": 0x1D00 | 1 << 13 | 1 << 14 | 1 << 15}),                                           # LMSLE, FFXSR, TCE
    Case({"cr3": 0xFF_FFFF_F018}), Case({"cr3": 0xFFF}),                                            # low reserved bits are not checked
    Case({"msrpm_base_pa": (1 << 40) - 0x2000}), Case({"iopm_base_pa": (1 << 40) - 0x3000}),        # the last place that a map has
    Case({"msrpm_base_pa": 0x487C123}),                                                             # low bits are ignored
    Case({"event_inj": 0x80000B0E}), Case({"event_inj": 0x80000030}), Case({"event_inj": 0x80000202}), Case({"event_inj": 0x80000480}),
    Case({"event_inj": 0x00000302}), Case({"event_inj": 0x00000706}),                               # V is 0: nothing is injected
    Case({"efer": 0x1800, "cr0": 0x10, "cs.attrib": 0x9B}),                                         # real mode
    Case({"efer": 0x1800, "cr0": 0x80000010, "cs.attrib": 0x9B}),                                   # paged real mode, which SVM allows
    Case({"efer": 0x1900, "cr0": 0x11, "cr4": 0, "cs.attrib": 0xC9B}),                              # LME without paging
    Case({"efer": 0x1D00, "cs.attrib": 0xC9B}),                                                     # compatibility mode
    Case({"g_pat": 0x0007040600070406}), Case({"g_pat": 2, "nested_ctl": 0}),                       # G_PAT only counts with nested paging
    Case({"nested_cr3": 1 << 63, "nested_ctl": 0}), Case({"nested_cr3": 0x1F52FFF}),
    Case({"int_ctl": INT_CTL | 1 << 26}), Case({"int_ctl": INT_CTL | AVIC, "avic_physical_id": 0x20FE}),
    Case({**CET, "s_cet": 3}), Case({**CET, "rflags": 0x20002}),
    Case({**PAE}, memory=(0x2001).to_bytes(8, "little").ljust(4096, b"\0")), Case({**PAE}, memory=(0x1E6).to_bytes(8, "little").ljust(4096, b"\0")),
    Case({"vmsa_pa": 1, "ghcb_gpa": 5}),
]


@pytest.mark.parametrize("case", ALLOWED)
def test_what_the_manual_allows_passes(base: Vmcb, case: Case) -> None:
    assert [finding.id for finding in run(base, case) if finding.verdict != "pass"] == []


def test_a_guest_whose_state_is_encrypted_is_not_checked_in_the_save_area(base: Vmcb) -> None:
    """SEV-ES: the save area of the VMCB is not loaded, and the VMSA cannot be read: its checks are undecided."""
    findings = run(base, Case({"nested_ctl": NP | SEV | SEV_ES, "vmsa_pa": 0x5000, "efer": 0, "cr0": 1 << 63, "allowed_sev_features": 1 << 63}))
    assert failures(findings) == []
    assert {finding.id for finding in findings if finding.undecided} == {"controls.sev.vmsa", "controls.sev.allowed_features"}


@pytest.mark.parametrize(("case", "rule", "missing"), [
    (Case({"event_inj": 0x8000030F}), "controls.event.vector", "exception with vector 15"),
    (Case({"efer": 0x1800, "cr0": 0x11, "cr3": 1 << 33, "cs.attrib": 0xC9B}), "guest.cr3", "outside long mode"),
    (Case({"int_ctl": INT_CTL | AVIC | 1 << 30, "avic_physical_id": 0x200}), "controls.avic.max_index", "x2AVIC index")])
def test_what_no_input_decides_is_undecided(base: Vmcb, case: Case, rule: str, missing: str) -> None:
    findings = [finding for finding in run(base, case) if finding.verdict != "pass"]
    assert [(finding.id, finding.verdict) for finding in findings] == [(rule, "undecided")]
    assert missing in findings[0].message


def test_without_a_processor_what_depends_on_it_is_undecided_and_names_the_input(base: Vmcb) -> None:
    changed = base.replaced({"cr4": 0x660 | 1 << 12, "efer": 0x1D00 | 1 << 20, "cr3": 1 << 45})
    verdicts = {finding.id: finding for finding in check_vmrun(changed) if finding.area != "host"}
    undecided = {name: finding.missing for name, finding in verdicts.items() if finding.undecided}
    assert set(undecided) == {"controls.nested_paging", "guest.cr3", "guest.cr4", "guest.efer.reserved", "guest.efer.long_mode"}
    assert "0007 ECX[16]" in undecided["guest.cr4"][0]
    assert "8000_0021 EAX[7]" in undecided["guest.efer.reserved"][0]
    assert failures(list(verdicts.values())) == []


def test_the_encryption_bit_is_not_an_address_bit(base: Vmcb) -> None:
    """With memory encryption bit 47 of N_CR3 and of the maps is the C-bit (Linux sets it with sme_me_mask); bit 46 is still wrong."""
    encrypted = SvmCapabilities.from_cpuid({**LEAVES, 0x8000001F: (3, 47, 0, 0)})
    good = base.replaced({"nested_cr3": 1 << 47 | 0x1F52000, "msrpm_base_pa": 1 << 47 | 0x487C000})
    assert failures(check_vmrun(good, encrypted)) == []
    assert [finding.id for finding in failures(check_vmrun(base.replaced({"nested_cr3": 1 << 46}), encrypted))] == ["controls.nested_cr3"]
    # CR3 of a guest without SEV has no C-bit.
    assert [finding.id for finding in failures(check_vmrun(base.replaced({"cr3": 1 << 47}), encrypted))] == ["guest.cr3"]
    unknown = SvmCapabilities(physical_address_width=40)
    assert [finding.missing[0][:8] for finding in check_vmrun(good, unknown) if finding.id == "controls.nested_cr3"] == ["position"]


MUTATIONS = st.lists(st.sampled_from([(rule, index) for rule, cases in FAILING.items() for index in range(len(cases))]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(chosen=MUTATIONS, gone=st.lists(st.sampled_from(sorted({name for rule in RULES for name in rule.fields})), min_size=1, max_size=3),
       without_caps=st.booleans())
def test_less_information_never_changes_a_verdict_except_to_undecided(base: Vmcb, chosen: List[Tuple[str, int]], gone: List[str],
                                                                      without_caps: bool) -> None:
    """A field, a capability or a register that is not known makes a rule undecided, never pass instead of fail or the other way round."""
    values: Dict[str, int] = {}
    for rule, index in chosen:
        values.update(FAILING[rule][index].values)
    changed = base.replaced(values)
    memory = vtdbg.memory_from_segments([(PDPT, bytes(4096))])
    full = check_vmrun(changed, caps(), memory, host=HOST, vmcb_address=VMCB_ADDRESS)
    less = check_vmrun(changed.without(*gone), None if without_caps else caps(), None, host={}, vmcb_address=None)
    for before, after in zip(full, less):
        assert before.id == after.id
        assert after.verdict in (before.verdict, "undecided"), (before, after)
        if after.undecided:
            assert after.missing and all(name in after.message for name in after.missing)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32))
def test_any_page_gives_a_verdict_for_every_rule(seed: int) -> None:
    vmcb = Vmcb.from_page(random.Random(seed).randbytes(4096))
    for findings, rules in ((check_vmrun(vmcb), RULES), (lint_vmcb(vmcb), lint.RULES)):
        assert [finding.id for finding in findings] == [rule.id for rule in rules]
        assert all(finding.verdict in ("pass", "fail", "undecided") and finding.message.isascii() for finding in findings)


def test_several_mistakes_are_all_reported_in_order(base: Vmcb) -> None:
    wrong = {"efer": 0xD00, "asid": 0, "cr0": 0x80050033 | 1 << 29, "intercept_misc2": 0, "dr7": 1 << 40}
    found = [finding.id for finding in failures(run(base, Case(wrong)))]
    assert found == ["controls.vmrun_intercept", "controls.asid", "guest.efer.svme", "guest.cr0.cd_nw", "guest.dr7.high"]


def test_a_refused_vmrun_explains_itself(base: Vmcb) -> None:
    """EXITCODE -1 in a VMCB: the explanation names the checks that fail."""
    explained = explain_svm_exit(vmcb=base.replaced({"exit_code": 2**64 - 1, "asid": 0}))
    assert explained.name == "ERR"
    assert [advice.text for advice in explained.advised("fix")] == ["asid is 0"]


def test_a_vmsa_cannot_be_checked_alone() -> None:
    with pytest.raises(UsageError, match="VMSA"):
        check_vmrun(Vmcb.from_page(bytes(4096), layout="vmsa"))


LINTS: Mapping[str, List[Case]] = {
    "lint.intercept.shutdown": [Case({"intercept_misc1": 0x3D4C8027})],
    "lint.intercept.intr": [Case({"intercept_misc1": 0xBD4C8026})],
    "lint.intercept.nmi": [Case({"intercept_misc1": 0xBD4C8025})],
    "lint.intercept.io": [Case({"intercept_misc1": 0xBD4C8027 & ~(1 << 27)})],
    "lint.intercept.msr": [Case({"intercept_misc1": 0xBD4C8027 & ~(1 << 28)})],
    "lint.intercept.invlpga": [Case({"intercept_misc1": 0xBD4C8027 & ~(1 << 26)})],
    "lint.intercept.vmload": [Case({"intercept_misc2": 0x6E7F & ~(1 << 2)})],
    "lint.intercept.vmsave": [Case({"intercept_misc2": 0x6E7F & ~(1 << 3)})],
    "lint.intercept.stgi": [Case({"intercept_misc2": 0x6E7F & ~(1 << 4)})],
    "lint.intercept.clgi": [Case({"intercept_misc2": 0x6E7F & ~(1 << 5)})],
    "lint.intercept.skinit": [Case({"intercept_misc2": 0x6E7F & ~(1 << 6)})],
    "lint.iopm_base_pa": [Case({"iopm_base_pa": 0}), Case({"iopm_base_pa": 0x1FA4800})],
    "lint.msrpm_base_pa": [Case({"msrpm_base_pa": 0x10}), Case({"msrpm_base_pa": 0x487C001})],
    "lint.asid.range": [Case({"asid": 0x8000})],
    "lint.tlb_control": [Case({"tlb_ctl": 2}), Case({"tlb_ctl": 3}, leaves={"x8000000a": (1, 0x8000, 0, 0xFFFFFFBF)})],
    "lint.sev_es.lbr": [Case({"nested_ctl": NP | SEV | SEV_ES})],
    "lint.avic.nested": [Case({"int_ctl": INT_CTL | AVIC, "nested_ctl": 0})],
    "lint.event.error_code": [Case({"event_inj": 0x8000030D}), Case({"event_inj": 0x80000B06}), Case({"event_inj": 0x80000A02})],
    "lint.event.vector64": [Case({"event_inj": 0x80000305})],
    "lint.event.interrupt_flag": [Case({"event_inj": 0x80000030}), Case({"event_inj": 0x80000030, "rflags": 0x246, "int_state": 1})],
    "lint.event.return_address": [Case({"event_inj": 0x80000480}), Case({"event_inj": 0x80000303})],
    "lint.efer.lma": [Case({"efer": 0x1900})],
    "lint.cpl": [Case({"cpl": 3})],
    "lint.rflags": [Case({"rflags": 0x44}), Case({"rflags": 0xFFFF800000003FF2})],
    "lint.rip": [Case({"rip": 0x8000_0000_0000_0000}), Case({"cs.attrib": 0xC9B})],
    "lint.bases": [Case({"fs.base": 0x8000_0000_0000_0000}), Case({"kernel_gs_base": 1 << 47})],
    "lint.no_paging": [Case({"nested_ctl": 0, "cr0": 0x11, "efer": 0x1800, "rip": 0x91})],
    "lint.g_pat.zero": [Case({"g_pat": 0})],
}


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, cases in LINTS.items() for case in cases])
def test_each_lint_speaks_alone_and_no_check_fails(base: Vmcb, rule: str, case: Case) -> None:
    """What enters and breaks later: VMRUN accepts it, one lint names it."""
    changed = base.replaced(case.values)
    found = lint_vmcb(changed, caps(**case.leaves))
    assert [finding.id for finding in found if finding.verdict != "pass"] == [rule]
    assert {finding.severity for finding in found} == {"lint"}
    assert failures(check_vmrun(changed, caps(**case.leaves))) == []


def test_every_lint_has_a_case_and_a_real_vmcb_has_none(base: Vmcb) -> None:
    assert set(LINTS) == {rule.id for rule in lint.RULES}
    assert [finding.id for finding in lint_vmcb(base, caps()) if finding.verdict != "pass"] == []


def test_capabilities_of_a_processor_and_of_nothing() -> None:
    known, nothing = caps(), SvmCapabilities()
    assert (known.physical_address_width, known.linear_address_width, known.asids, known.encryption_bit) == (40, 48, 0x8000, 0)
    assert (known.feature("NP"), known.feature("AVIC")) == (True, True)
    assert (nothing.physical_address_width, nothing.asids, nothing.feature("NP"), nothing.encryption_bit) == (None, None, None, None)
    with pytest.raises(vtdbg.VtdbgError, match="unknown field"):
        known.feature("NPT")
    with pytest.raises(vtdbg.VtdbgError, match="not between 32 and 52"):
        SvmCapabilities(physical_address_width=64)


def test_a_leaf_above_the_highest_is_zero_and_not_unknown() -> None:
    """CPUID leaf 0x80000000 gives the highest extended leaf: the features of a leaf beyond it are absent (APM vol. 3, CPUID Fn8000_0000)."""
    old = SvmCapabilities.from_cpuid({0x80000000: (0x8000000A, 0, 0, 0)})
    assert old.encryption_bit == 0
    # QEMU 7.2's EPYC ends at leaf 0x8000001e and answers for 0x8000001f with another leaf.
    emulated = SvmCapabilities.from_cpuid({0x80000000: (0x8000001E, 0, 0, 0), 0x8000001F: (7, 0x240, 0x340, 0)})
    assert emulated.encryption_bit == 0
    assert old.efer().may_be_one >> 20 & 3 == 0 and all(not mask >> 20 for mask in old.efer().unknown)


def test_why_svm_cannot_be_used() -> None:
    off = SvmCapabilities.from_cpuid({0x80000001: (0, 0, 0, 0)}, msrs={0xC0010114: 0x18, 0xC0000080: 0xD01})
    assert [problem.split(":")[0] for problem in off.problems()] == ["CPUID Fn8000_0001 ECX[2] is 0", "VM_CR.SVMDIS is 1", "EFER.SVME is 0"]
    assert SvmCapabilities.from_cpuid(LEAVES, msrs={0xC0010114: 0x8, 0xC0000080: 0x1D01}).problems() == []
