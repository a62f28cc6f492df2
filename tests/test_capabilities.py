"""Capability MSRs: what they allow, the allowed-0/allowed-1 arithmetic, and the forms in which people have the values."""

from __future__ import annotations

import json
import re
from typing import Any, Dict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vmxcpu import Case, Worker

from vtdbg import bits
from vtdbg.errors import FormatError, UnknownName, VtdbgError
from vtdbg.vmx.capabilities import WORD_SOURCES, VmxCapabilities
from vtdbg.vmx.capability_text import parse, preset_names, preset_title

WORDS = sorted(WORD_SOURCES)
DEFAULT1 = {"pin": {1, 2, 4}, "proc": {1, 4, 5, 6, 8, 13, 14, 15, 16, 26}, "exit": {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 14, 16, 17},
            "entry": {0, 1, 2, 3, 4, 5, 6, 7, 8, 12}}
"""SDM vol. 3, appendix VMX Capability Reporting Facility: the default1 class of each word."""


def truth_caps(truth: Dict[str, Any]) -> VmxCapabilities:
    return VmxCapabilities.from_msrs({key: int(value, 16) for key, value in truth["msrs"].items()}, physical_address_width=40)


def mask(numbers: "set[int]") -> int:
    return sum(1 << number for number in numbers)


def test_the_true_msrs_decide_where_basic_bit_55_is_1(intel_plain_truth: Dict[str, Any]) -> None:
    caps = truth_caps(intel_plain_truth)
    assert caps.true_controls is True
    assert caps.allowed("proc").source_msr == 0x48E
    assert caps.allowed("proc").must_be_one == int(intel_plain_truth["msrs"]["0x48e"], 16) & 0xFFFFFFFF
    # CR3-load exiting and CR3-store exiting are default1 controls that the TRUE MSR allows to be 0.
    assert caps.forced("proc", "CR3_LOAD_EXITING") is False
    plain = caps.from_msrs({**{key: value for key, value in caps.items() if not 0x48D <= key <= 0x490}, 0x480: caps.basic & ~(1 << 55)})
    assert plain.allowed("proc").source_msr == 0x482
    assert plain.forced("proc", "CR3_LOAD_EXITING") is True


def test_words_that_kvm_wrote_into_its_vmcs_are_allowed(intel_plain_truth: Dict[str, Any]) -> None:
    """KVM adjusts its controls by the same MSRs: the words in its own dump_vmcs have to satisfy them, and adjusting them changes nothing."""
    caps = truth_caps(intel_plain_truth)
    dump = {int(key, 16): int(value, 16) for key, value in intel_plain_truth["vms"]["B"]["dump_vmcs_by_encoding"].items()}
    for word, encoding in (("pin", 0x4000), ("proc", 0x4002), ("sec", 0x401E), ("exit", 0x400C), ("entry", 0x4012)):
        value = dump[encoding]
        assert caps.allowed(word).violations(value) == (0, 0), word
        adjusted = caps.adjust(word, value)
        assert (adjusted.value, adjusted.forced_on, adjusted.forced_off) == (value, (), ())


@pytest.mark.parametrize("name", preset_names())
def test_presets_agree_with_the_manuals_rules(name: str) -> None:
    """The default1 class is 1 in the plain MSRs' allowed-0 halves; a bit that must be 1 may be 1; the allowed-1 halves of the plain and the
    TRUE MSR are equal; CR0 and CR4 bits fixed to 1 may be 1."""
    caps = VmxCapabilities.preset(name)
    for word, default1 in DEFAULT1.items():
        source = WORD_SOURCES[word]
        plain = caps.msr(source.msr)
        assert plain & mask(default1) == mask(default1)
        assert plain & 0xFFFFFFFF & ~(plain >> 32) == 0
        if caps.true_controls:
            true = caps.msr(source.true_msr)
            assert true >> 32 == plain >> 32
            assert true & 0xFFFFFFFF & ~plain == 0
    assert caps.cr0_fixed0 & ~caps.cr0_fixed1 == 0 and caps.cr4_fixed0 & ~caps.cr4_fixed1 == 0
    assert caps.region_size and caps.region_size <= 4096 and caps.revision
    assert bits.table("vmx_basic").reserved_violations(caps.basic) == []
    assert caps.physical_address_width in (36, 38, 39, 40, 46)
    assert preset_title(name).split(":")[0] in caps.origin
    assert caps.problems() == [] and len(caps.warnings) == (1 if name == "bochscpu-sapphire-rapids" else 0)


def test_presets_know_what_their_processors_lack() -> None:
    assert VmxCapabilities.preset("core2-x6800").supports("sec", "EPT") is False           # no secondary controls at all
    assert VmxCapabilities.preset("xeon-x5482").supports("sec", "EPT") is False
    assert VmxCapabilities.preset("i7-3960x").supports("sec", "EPT") is True
    assert VmxCapabilities.preset("i7-3960x").supports("sec", "SHADOW_VMCS") is False      # Haswell was the first
    assert VmxCapabilities.preset("i7-5600u").supports("sec", "SHADOW_VMCS") is True


def test_the_bochs_preset_is_what_rdmsr_said(intel_plain_truth: Dict[str, Any]) -> None:
    caps = VmxCapabilities.preset("bochs-2.7-skylake-x")
    expected = {int(key, 16): int(value, 16) for key, value in intel_plain_truth["msrs"].items()}
    assert dict(caps.items()) == {index: value for index, value in expected.items() if index == 0x3A or 0x480 <= index <= 0x493}


@pytest.mark.live
def test_presets_of_the_processor_model_are_what_it_says(vmx_worker: Worker, vmx_worker_new: Worker) -> None:
    for name, worker in (("bochscpu", vmx_worker), ("bochscpu-sapphire-rapids", vmx_worker_new)):
        caps = VmxCapabilities.preset(name)
        assert dict(caps.items()) == {index: value for index, value in worker.msrs.items() if index >= 0x480}
        sizes = worker.cpuid[0x80000008][0]
        assert (caps.physical_address_width, caps.linear_address_width) == (sizes & 0xFF, sizes >> 8 & 0xFF)
        # Without anybody's word for it, CR4_FIXED1 gives the same linear width.
        assert VmxCapabilities.from_msrs(worker.msrs).linear_address_width == caps.linear_address_width


WORD_FIELDS = {"pin": 0x4000, "proc": 0x4002, "sec": 0x401E, "exit": 0x400C, "entry": 0x4012, "tert": 0x2034, "exit2": 0x2044}


@pytest.mark.live
@pytest.mark.parametrize("name", ["bochscpu", "bochscpu-sapphire-rapids"])
def test_the_processor_refuses_exactly_what_is_not_allowed(vmx_worker: Worker, vmx_worker_new: Worker, name: str) -> None:
    """Every bit of every control word flipped alone: the processor names its allowed-0 or allowed-1 check just where `allowed` says that the
    value violates it (other checks may refuse the value for reasons of their own), and takes what `adjust` makes of it past that check."""
    worker = vmx_worker if name == "bochscpu" else vmx_worker_new
    caps = VmxCapabilities.preset(name)
    good = dict(worker.baseline())
    for gate, bit in (("proc", 31), ("proc", 17), ("exit", 31)):
        if caps.allowed(gate).may_be_one >> bit & 1:
            good[WORD_FIELDS[gate]] |= 1 << bit
    cases, expected = [], []
    for word, encoding in WORD_FIELDS.items():
        allowed = caps.allowed(word)
        if encoding not in worker.layout or allowed.may_be_one == 0:
            continue
        # Bochs keeps the secondary VM-exit controls in 32 bits and never sees the upper half.
        for bit in range(32 if word == "exit2" else bits.table(word).width):
            value = good.get(encoding, 0) ^ 1 << bit
            missing, excess = allowed.violations(value)
            cases.append(Case({**good, encoding: value}))
            expected.append((word, bit, bool(missing or excess)))
            adjusted = caps.adjust(word, value)
            cases.append(Case({**good, encoding: adjusted.value}))
            expected.append((word, bit, False))
    for (word, bit, refused), outcome in zip(expected, worker.launch_many(cases)):
        said = outcome.failed_check or ""
        assert ("allowed 0-settings" in said or "allowed 1-settings" in said) is refused, (word, bit, outcome.kind, said)
        if refused:
            assert (outcome.kind, outcome.number) == ("VMfailValid", 7)
    assert len(cases) >= 2 * 32 * 5


def test_what_is_missing_is_unknown() -> None:
    empty = VmxCapabilities.from_msrs({})
    for word in WORDS:
        assert empty.allowed(word) is None
        assert empty.supports(word, bits.table(word).idents()[0]) is None
        assert empty.adjust(word, 0).value is None and empty.adjust(word, 0).notes
    assert empty.revision is None and empty.msr_list_max is None and empty.physical_address_width is None
    assert empty.true_controls is None and empty.linear_address_width is None


def test_without_basic_nobody_knows_which_msr_decides() -> None:
    """0x482 alone answers "may it be 1" (both MSRs agree on that), not "must it be 1"; adjust gives a value that either kind accepts."""
    caps = VmxCapabilities.from_msrs({0x482: 0xFFF9FFFE0401E172})
    assert caps.supports("proc", "USE_MSR_BITMAPS") is True
    assert caps.allowed("proc") is None and caps.forced("proc", "CR3_LOAD_EXITING") is None
    adjusted = caps.adjust("proc", ["USE_MSR_BITMAPS"])
    assert adjusted.value == 0x0401E172 | 1 << 28
    assert "IA32_VMX_BASIC" in adjusted.notes[0]


def test_adjust_names_what_was_forced_and_by_which_bit(intel_plain_truth: Dict[str, Any]) -> None:
    caps = truth_caps(intel_plain_truth)
    adjusted = caps.adjust("sec", ["EPT", "ENCLS_EXITING"])
    assert adjusted.value == 2 and adjusted.possible is False
    (off,) = adjusted.forced_off
    assert (off.ident, off.bit, off.value) == ("ENCLS_EXITING", 15, 0)
    assert "IA32_VMX_PROCBASED_CTLS2[47]" in off.why
    tertiary = caps.adjust("tert", ["HLAT"])
    assert tertiary.value == 0 and "cannot be activated" in tertiary.forced_off[0].why
    pin = caps.adjust("pin", 0)
    assert {row.bit for row in pin.forced_on} == {1, 2, 4} and all("default1" in row.why for row in pin.forced_on)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(WORDS), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_adjust_arithmetic(word: str, low: int, high: int, wanted: int) -> None:
    """Whatever a consistent MSR says: the result is accepted, differs from the wish only in forced bits, and adjusting it again is idle."""
    source = WORD_SOURCES[word]
    width = bits.table(word).width
    wanted &= (1 << width) - 1
    value = (low & high & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 if source.halves else high
    activating = {0x480: 0, 0x482: 0xFFFFFFFF << 32, 0x483: 0xFFFFFFFF << 32, 0x48B: 0xFFFFFFFF << 32}
    caps = VmxCapabilities.from_msrs({**activating, source.msr: value})
    if word in ("proc", "exit"):
        caps = VmxCapabilities.from_msrs({0x480: 0, source.msr: value})
    adjusted = caps.adjust(word, wanted)
    assert caps.allowed(word).violations(adjusted.value) == (0, 0)
    forced = mask({row.bit for row in adjusted.forced_on + adjusted.forced_off})
    assert adjusted.value ^ wanted == forced
    assert caps.adjust(word, adjusted.value).value == adjusted.value


def test_linear_width_follows_cr4_fixed1() -> None:
    """CR4.LA57 that may be 1 in VMX operation shows 57-bit linear addresses (SDM vol. 3, VMX-Fixed Bits in CR4)."""
    assert VmxCapabilities.from_msrs({0x489: 0x3727FF}).linear_address_width == 48
    assert VmxCapabilities.from_msrs({0x489: 0x3727FF | 1 << 12}).linear_address_width == 57
    cpuid = {(0x80000008, 0): (0x3027, 0, 0, 0)}
    caps = VmxCapabilities.from_msrs({}, cpuid=cpuid)
    assert (caps.physical_address_width, caps.linear_address_width) == (39, 48)


SESSION = """\
$ sudo rdmsr -a 0x480
da040000000012
da040000000012
# rdmsr -d 0x481
545460846614
0x482 0xfff9fffe0401e172
IA32_VMX_MISC: 0x300481e5
lkd> rdmsr 483
msr[483] = 007fffff`00036dff
MSR 484 = 0000ffff000011ff
00:00:22.366069 HM: MSR_IA32_FEATURE_CONTROL          = 0x5
EPT and VPID capabilities
  Hex: 0xf0106734141
IA32_VMX_PROCBASED_CTLS2 MSR (48Bh) = 0x57cff00000000
cpu0: MSR_IA32_VMX_VMFUNC: 0x00000001 (EPTP switching)
48d: edx:eax = 0000007f:00000016
address sizes\t: 39 bits physical, 48 bits virtual
   0x00000001 0x00: eax=0x000306d4 ebx=0x00100800 ecx=0x7ffafbbf edx=0xbfebfbff
this line is from somewhere else
"""


def test_text_in_the_forms_that_people_paste() -> None:
    caps = parse(SESSION)
    assert dict(caps.items()) == {
        0x3A: 5, 0x480: 0xDA040000000012, 0x481: 0x7F00000016, 0x482: 0xFFF9FFFE0401E172, 0x483: 0x7FFFFF00036DFF, 0x484: 0xFFFF000011FF,
        0x485: 0x300481E5, 0x48B: 0x57CFF00000000, 0x48C: 0xF0106734141, 0x48D: 0x7F00000016, 0x491: 1}
    assert (caps.physical_address_width, caps.linear_address_width) == (39, 48)
    assert caps.cpuid_bit(1, "ecx", 5) is True
    assert len(caps.warnings) == 1 and "line 19" in caps.warnings[0] and "somewhere else" in caps.warnings[0]


VMXCAP_NAMES = {
    "pin": "External interrupt exiting=0 NMI exiting=3 Virtual NMIs=5 Activate VMX-preemption timer=6 Process posted interrupts=7",
    "proc": "Interrupt window exiting=2 Use TSC offsetting=3 HLT exiting=7 INVLPG exiting=9 MWAIT exiting=10 RDPMC exiting=11 RDTSC exiting=12 "
            "CR3-load exiting=15 CR3-store exiting=16 Activate tertiary controls=17 CR8-load exiting=19 CR8-store exiting=20 Use TPR shadow=21 "
            "NMI-window exiting=22 MOV-DR exiting=23 Unconditional I/O exiting=24 Use I/O bitmaps=25 Monitor trap flag=27 Use MSR bitmaps=28 "
            "MONITOR exiting=29 PAUSE exiting=30 Activate secondary control=31",
    "sec": "Virtualize APIC accesses=0 Enable EPT=1 Descriptor-table exiting=2 Enable RDTSCP=3 Virtualize x2APIC mode=4 Enable VPID=5 "
           "WBINVD exiting=6 Unrestricted guest=7 APIC register emulation=8 Virtual interrupt delivery=9 PAUSE-loop exiting=10 RDRAND exiting=11 "
           "Enable INVPCID=12 Enable VM functions=13 VMCS shadowing=14 Enable ENCLS exiting=15 RDSEED exiting=16 Enable PML=17 "
           "EPT-violation #VE=18 Conceal non-root operation from PT=19 Enable XSAVES/XRSTORS=20 Mode-based execute control (XS/XU)=22 "
           "Sub-page write permissions=23 GPA translation for PT=24 TSC scaling=25 User wait and pause=26 ENCLV exiting=28",
    "tert": "Enable IPI virtualization=4",
    "exit": "Save debug controls=2 Host address-space size=9 Load IA32_PERF_GLOBAL_CTRL=12 Acknowledge interrupt on exit=15 Save IA32_PAT=18 "
            "Load IA32_PAT=19 Save IA32_EFER=20 Load IA32_EFER=21 Save VMX-preemption timer value=22 Clear IA32_BNDCFGS=23 "
            "Conceal VM exits from PT=24 Clear IA32_RTIT_CTL=25",
    "entry": "Load debug controls=2 IA-32e mode guest=9 Entry to SMM=10 Deactivate dual-monitor treatment=11 Load IA32_PERF_GLOBAL_CTRL=13 "
             "Load IA32_PAT=14 Load IA32_EFER=15 Load IA32_BNDCFGS=16 Conceal VM entries from PT=17 Load IA32_RTIT_CTL=18",
}
"""Names and bits that QEMU's scripts/kvm/vmxcap prints."""
VMXCAP_HEADINGS = {"pin": "pin-based controls", "proc": "primary processor-based controls", "sec": "secondary processor-based controls",
                   "tert": "tertiary processor-based controls", "exit": "VM-Exit controls", "entry": "VM-Entry controls"}


def vmxcap_output(caps: VmxCapabilities) -> str:
    """What vmxcap prints on this processor, by the rules of its Control.show and Misc.show; an MSR that cannot be read counts as 0 there."""
    lines = ["Basic VMX Information", f"  Hex: {caps.basic:#x}", "  Revision                                 4"]
    for word, names in VMXCAP_NAMES.items():
        source = WORD_SOURCES[word]
        lines.append(VMXCAP_HEADINGS[word])
        plain, true = caps.msr(source.msr) or 0, (caps.msr(source.true_msr) or 0) if source.true_msr else 0
        for name, bit in re.findall(r"(\S.*?)=(\d+)(?:\s|$)", names):
            at = 1 << int(bit)
            must, may = (plain & at, plain >> 32 & at) if source.halves else (0, plain & at)
            if source.true_msr and not true & at and true >> 32 & at and may and must:
                says = "default"
            else:
                says = "yes" if may and not must else "forced" if may else "no"
            lines.append(f"  {name:40} {says}")
    return "\n".join([*lines, "Miscellaneous data", f"  Hex: {caps.misc:#x}", "  HLT activity state                       yes",
                      "VPID and EPT capabilities", f"  Hex: {caps.ept_vpid_cap or 0:#x}", "VM Functions", f"  Hex: {caps.msr(0x491) or 0:#x}"])


@pytest.mark.parametrize("name", ["i7-6700k", "xeon-x5482", "pentium-n3530", "bochscpu-sapphire-rapids"])
def test_vmxcap_output_answers_like_the_msrs(name: str) -> None:
    """Every control that vmxcap lists: may it be 1, must it be 1, as from the MSRs themselves; what it does not list stays unknown, and so
    does the value to write."""
    caps = VmxCapabilities.preset(name)
    read = parse(vmxcap_output(caps))
    assert read.warnings == () and (read.basic, read.misc) == (caps.basic, caps.misc)
    for word, names in VMXCAP_NAMES.items():
        table = bits.table(word)
        by_bit = {row.low: row.ident for row in table.fields if row.ident}
        for bit in re.findall(r"=(\d+)(?:\s|$)", names):
            ident = by_bit[int(bit)]
            if word == "tert" and caps.msr(0x492) is None:
                continue        # vmxcap prints "no" where it could not read the MSR
            assert read.supports(word, ident) == caps.supports(word, ident), (word, ident)
            if caps.supports(word, ident):
                assert read.forced(word, ident) == caps.forced(word, ident), (word, ident)
    assert read.allowed("pin") is None and read.adjust("pin", 0).value is None
    if caps.supports("proc", "SEC_CONTROLS"):
        assert read.supports("sec", "NOTIFY_VM_EXITING") is None


def test_processors_that_disagree_are_named() -> None:
    caps = parse("# rdmsr -a 0x480\nda040000000012\nda040000000013\n")
    assert caps.basic == 0xDA040000000012
    assert "line 2" in caps.warnings[0] and "line 3" in caps.warnings[0]


@pytest.mark.parametrize("command", ["rdmsr 0x480", "$ rdmsr -p 0 0x480", "# rdmsr 0x480 -p 0", "rdmsr 1152", "rdmsr -x -0 0x480", "lkd> rdmsr 480",
                                     "root@host:~# sudo rdmsr -a 0x480"])
def test_rdmsr_commands(command: str) -> None:
    """msr-tools reads a bare index as decimal, WinDbg as hexadecimal; -p takes a processor number."""
    assert parse(f"{command}\nda040000000012\n").basic == 0xDA040000000012


def test_json_at_the_top_or_under_msrs() -> None:
    values = {"0x480": "0xda040000000012", "IA32_VMX_MISC": 0x300481E5}
    for text in (json.dumps(values), json.dumps({"msrs": values, "physical_address_width": 39, "cpuid": {"1": [0, 0, 1 << 5, 0]}})):
        caps = parse(text)
        assert caps.revision == 0x12 and caps.misc == 0x300481E5
    assert caps.physical_address_width == 39 and caps.cpuid_bit(1, "ecx", 5) is True


def test_the_fixture_truth_file_is_an_input(intel_plain_truth: Dict[str, Any]) -> None:
    caps = parse(json.dumps(intel_plain_truth))
    assert caps.revision == intel_plain_truth["vmcs_revision_id"]


@pytest.mark.parametrize("text, named", [
    ("", "no MSR value"), ("nothing here", "line 1"), ("{", "not JSON"), ("{}", "no MSR value"), ('{"0x480": "da04"}', "0x480"),
    ('{"0x480": 1.5}', "0x480"), ("\n0x480 0x10000000000000000", "line 2"), ('{"msrs": 3}', "msrs"), ('{"0x480": 1, "cpuid": {"1": [1]}}', "cpuid 1"),
    ('{"0x480": 1, "physical_address_width": 5}', "physical_address_width"),
])
def test_bad_input_names_the_place(text: str, named: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(text)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_values_that_no_processor_has_are_named() -> None:
    """What happens when a VMM prints MSRs with a 32-bit format, or mixes two columns up."""
    cut = VmxCapabilities.from_msrs({0x481: 0x16, 0x480: 0x12})
    assert "cut to 32 bits" in cut.problems()[0] and "0 bytes" in cut.problems()[1]
    mixed = VmxCapabilities.from_msrs({0x482: 0xFFF9FFFE0401E172, 0x48E: 0xF7F9FFFE04006172, 0x486: 0x80000021, 0x487: 0x21})
    assert len(mixed.problems()) == 2 and "differ" in mixed.problems()[0]


def test_replaced_keeps_what_it_does_not_change() -> None:
    caps = VmxCapabilities.preset("i7-6700k").replaced({"IA32_VMX_MISC": 0})
    assert (caps.misc, caps.physical_address_width, caps.revision) == (0, 39, 4)


def test_unknown_names_suggest() -> None:
    with pytest.raises(UnknownName, match="i7-6700k"):
        VmxCapabilities.preset("i7-6700")
    with pytest.raises(UnknownName, match="sec"):
        VmxCapabilities.from_msrs({}).allowed("secondary")
    with pytest.raises(UnknownName):
        VmxCapabilities.from_msrs({}).supports("sec", "NO_SUCH_CONTROL")
    with pytest.raises(UnknownName):
        VmxCapabilities.load("/no/such/file")


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(SESSION.splitlines() + ["0x", "rdmsr", "rdmsr -", "{", "msr[", "480:"]), max_size=8)
                 .map("\n".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        caps = parse(text)
    except VtdbgError:
        return
    assert all(0 <= value < 1 << 64 for _, value in caps.items())
