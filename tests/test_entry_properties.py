"""What has to hold for every VMCS: a missing input never makes a pass or a fail, and nothing that a dump can hold raises."""

from __future__ import annotations

import random
from typing import Any, Dict, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.entry_cases import EDGES, features, inject, levels, pick, states
from support.vmxcpu import MODES
from support.vmxcpu.guests import baseline
from test_entry_rules import CPUID, GOOD, MEMORY, every_capability

from vtdbg.findings import FAIL, PASS, UNDECIDED
from vtdbg.memory.base import memory_from_segments
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.entry import check_vm_entry, lint_vm_entry, predict_vm_entry
from vtdbg.vmx.vmcs import Vmcs

CAPS = every_capability()
MEMORY_AT_0 = {**MEMORY, 0x13000: b"\x11" + bytes(4095)}
GIVEN: Dict[str, Any] = {"vmcs_address": 0x6000, "host_long_mode": True}


def mutated(seed: int) -> Dict[str, int]:
    """A VMCS on the edges of the rules, every field there."""
    rng = random.Random(seed)
    mode = rng.choice(MODES)
    values = {field.encoding: GOOD.get(field.name, 0) for field in vmcs_fields.fields().values()}
    values.update(baseline(CAPS, mode, "64-bit"))
    for change in (inject, features, states, levels):
        if rng.random() < 0.4:
            change(rng, values)
    for _ in range(rng.randint(0, 6)):
        pick(rng, rng.choice(EDGES), values)
    known = vmcs_fields.fields()
    return {known[encoding].name: value & (1 << 8 * known[encoding].size) - 1 for encoding, value in values.items()}


def capabilities(msrs: Dict[int, int], width: bool = True) -> VmxCapabilities:
    return VmxCapabilities.from_msrs(msrs, physical_address_width=46 if width else None, linear_address_width=48 if width else None,
                                     cpuid=CPUID if width else None)


def verdicts(values: Dict[str, int], caps: VmxCapabilities, memory: Any) -> Dict[str, str]:
    vmcs = Vmcs.from_values(values)
    return {finding.id: finding.verdict for finding in check_vm_entry(vmcs, caps, memory, lint=True, **GIVEN)}


def assert_only_less_is_known(before: Dict[str, str], after: Dict[str, str]) -> None:
    changed = {one: (verdict, after[one]) for one, verdict in before.items() if after[one] != verdict}
    assert all(now == UNDECIDED for _, now in changed.values()), changed


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), data=st.data())
def test_a_field_that_is_missing_makes_verdicts_undecided_and_nothing_else(seed: int, data: Any) -> None:
    values, caps, memory = mutated(seed), capabilities(CAPS), memory_from_segments(list(MEMORY_AT_0.items()))
    before = verdicts(values, caps, memory)
    gone = data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=8))
    assert_only_less_is_known(before, verdicts({name: value for name, value in values.items() if name not in gone}, caps, memory))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), data=st.data())
def test_capabilities_that_are_missing_make_verdicts_undecided_and_nothing_else(seed: int, data: Any) -> None:
    values, memory = mutated(seed), memory_from_segments(list(MEMORY_AT_0.items()))
    before = verdicts(values, capabilities(CAPS), memory)
    gone = data.draw(st.lists(st.sampled_from(sorted(CAPS)), max_size=6))
    width = data.draw(st.booleans())
    assert_only_less_is_known(before, verdicts(values, capabilities({index: value for index, value in CAPS.items() if index not in gone}, width),
                                               memory))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_memory_that_is_missing_makes_verdicts_undecided_and_nothing_else(seed: int) -> None:
    values, caps = mutated(seed), capabilities(CAPS)
    assert_only_less_is_known(verdicts(values, caps, memory_from_segments(list(MEMORY_AT_0.items()))), verdicts(values, caps, None))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_prediction_follows_the_findings(seed: int) -> None:
    """'enters' means that all pass; a failure means that one fails; 'undecided' means that an input is missing."""
    vmcs, caps, memory = Vmcs.from_values(mutated(seed)), capabilities(CAPS), memory_from_segments(list(MEMORY_AT_0.items()))
    found = [finding.verdict for finding in check_vm_entry(vmcs, caps, memory, **GIVEN)]
    outcome = predict_vm_entry(vmcs, caps, memory, **GIVEN)
    if outcome == "enters":
        assert set(found) == {PASS}
    elif outcome[0] == "undecided":
        assert UNDECIDED in found and outcome[2]
    else:
        assert FAIL in found


FIELD_VALUES = st.dictionaries(st.sampled_from(sorted(vmcs_fields.names())), st.integers(0, (1 << 64) - 1), max_size=207)


@settings(max_examples=60, deadline=None)
@given(values=FIELD_VALUES, msrs=st.dictionaries(st.sampled_from([0x3A, *range(0x480, 0x494)]), st.integers(0, (1 << 64) - 1)),
       noise=st.binary(max_size=64))
def test_nothing_that_a_dump_can_hold_raises(values: Dict[str, int], msrs: Dict[int, int], noise: bytes) -> None:
    fitting = {name: value & (1 << 8 * vmcs_fields.find(name).size) - 1 for name, value in values.items()}
    vmcs, caps = Vmcs.from_values(fitting), VmxCapabilities.from_msrs(msrs)
    memory = memory_from_segments([(0, noise), (0x1000, noise * 64)])
    for source in (None, memory):
        findings = check_vm_entry(vmcs, caps, source, lint=True, instruction="vmlaunch")
        assert all(finding.message.isascii() and (finding.missing != ()) == finding.undecided for finding in findings)
        predict_vm_entry(vmcs, None, source)
        lint_vm_entry(vmcs, caps, source)


@pytest.mark.parametrize("count", [0xFFFFFFFF, 1 << 20])
def test_a_damaged_count_reads_a_bounded_list(count: int) -> None:
    """4096 entries at most are read, and what lies beyond them is undecided."""
    sizes = []

    class Counting(type(memory_from_segments([]))):     # type: ignore[misc]
        def read(self, address: int, size: int) -> bytes:
            sizes.append(size)
            return ((b"\x10" + bytes(15)) * (size // 16 + 1))[:size]

    values = dict.fromkeys(vmcs_fields.names(), 0)
    values.update({"VM_ENTRY_MSR_LOAD_COUNT": count, "VM_EXIT_MSR_LOAD_COUNT": count, "VM_ENTRY_MSR_LOAD_ADDR": 0x1000,
                   "VM_EXIT_MSR_LOAD_ADDR": 0x1000})
    findings = check_vm_entry(Vmcs.from_values(values), capabilities(CAPS), Counting([]), lint=True)
    assert max(sizes) <= 16 * 4096
    loaded = next(finding for finding in findings if finding.id == "guest.msr_load")
    assert loaded.undecided and "beyond" in loaded.missing[0]


def test_findings_are_plain_data() -> None:
    found: Tuple[Any, ...] = tuple(check_vm_entry(Vmcs.from_values({"GUEST_RFLAGS": 0})))
    assert all(isinstance(finding.fields, tuple) and finding.see for finding in found)
    assert {finding.area for finding in found} == {"controls", "host", "guest"}
