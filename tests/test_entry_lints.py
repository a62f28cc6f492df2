"""Each lint has a VMCS without the mistake and one with it; lints never touch the verdict about the entry."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Dict, List

import pytest
from support.vmxcpu import Worker
from test_entry_rules import EPT, Row, build, page

from vtdbg import bits
from vtdbg.vmx.entry import check_vm_entry, lint_vm_entry, lints
from vtdbg.vmx.vmcs import Vmcs

INSTRUCTION_CONTROLS = [("sec", ident) for ident in lints.INSTRUCTIONS]
CLEAN = {
    "CR4_GUEST_HOST_MASK": 0x2000, "CR0_GUEST_HOST_MASK": 0x20, "GUEST_GDTR_LIMIT": 0xFFFF, "GUEST_GDTR_BASE": 0x7000, "HOST_GDTR_BASE": 0x8000,
    "GUEST_IDTR_BASE": 0x7800, "HOST_IDTR_BASE": 0x8800, "HOST_RSP": 0x40000, "GUEST_RSP": 0x90000, "HOST_TR_BASE": 0xA800, "HOST_GS_BASE": 0,
}
"""On top of the baseline, what a careful VMM writes."""
CLEAN_CONTROLS = [*INSTRUCTION_CONTROLS, ("exit", "LOAD_IA32_EFER")]
LEAVES = {"uc": 0x87, "wb": 0xB7}


def ept_pages(leaf: int) -> Dict[int, bytes]:
    return {0xE000: page(struct.pack("<Q", 0x16007)), 0x16000: page(struct.pack("<Q", 0x17007)),
            0x17000: struct.pack("<512Q", *(leaf | n << 21 for n in range(512)))}


def exit_list(*entries: "tuple[int, int, int]") -> Dict[int, bytes]:
    return {0x18000: page(b"".join(struct.pack("<IIQ", *entry) for entry in entries))}


def rows() -> List[Row]:
    table = [Row(f"lint.instruction.{ident.lower()}", turn_off=[("sec", ident)]) for ident in lints.INSTRUCTIONS]
    extra = {("sec", "VIRT_APIC_ACCESSES"): [], ("sec", "PAGE_MOD_LOGGING"): [EPT], ("vmfunc", "EPTP_SWITCHING"): [EPT, ("sec", "VMFUNC")],
             ("pin", "POSTED_INTR"): [("pin", "INTR_EXITING"), ("proc", "VIRTUAL_TPR"), ("sec", "VIRT_INTR_DELIVERY"), ("exit", "ACK_INTR_ON_EXIT")]}
    ept = {"memory": ept_pages(LEAVES["wb"]), "on": [EPT]}
    for name, gate in lints.ZERO_ADDRESSES:
        table.append(Row(f"lint.zero.{name.lower()}", {name: 0}, on=[gate, *extra.get(gate, [])], memory=ept_pages(LEAVES["wb"])))
    for save, load, _ in lints.SAVED:
        # A control that the other half needs too: the debug controls are default1 in the baseline's words.
        on = [("exit", save), ("entry", load)]
        restored = {load: "LOAD_IA32_PERF_GLOBAL_CTRL", "LOAD_IA32_PAT": "LOAD_IA32_PAT", "LOAD_IA32_EFER": "LOAD_IA32_EFER"}[load] \
            if load != "LOAD_DEBUG_CONTROLS" else None
        table.append(Row(f"lint.saved_not_loaded.{save.lower()}", on=[*on, *([("exit", restored)] if restored else [])], turn_off=[("entry", load)],
                         setup={"GUEST_IA32_PAT": 6}))
    for load, restore, _ in lints.RESTORED:
        table.append(Row(f"lint.loaded_not_restored.{load.lower()}", on=[("entry", load), ("exit", restore[0])], turn_off=[("exit", restore[0])],
                         setup={"GUEST_IA32_PAT": 6}))
    table += [
        Row("lint.eptp.root", {"EPT_POINTER": 0x1E}, on=[EPT], memory={**ept_pages(LEAVES["wb"]), 0: page(struct.pack("<Q", 0x16007))}),
        Row("lint.eptp.uncached", {"EPT_POINTER": 0xE018}, **ept),
        Row("lint.ept.all_uncached", {"EPT_POINTER": 0x2001E}, on=[EPT],
            memory={**ept_pages(LEAVES["wb"]), 0x20000: page(struct.pack("<Q", 0x21007)), 0x21000: page(struct.pack("<Q", LEAVES["uc"]))}),
        Row("lint.default1", {"CPU_BASED_VM_EXEC_CONTROL": 0x8401E1F2}, **ept, caps={0x482: 0xFFF9FFFE0401E172, 0x48E: 0xFFF9FFFE04006172}),
        Row("lint.preemption_timer", {"VMX_PREEMPTION_TIMER_VALUE": 0}, on=[("pin", "PREEMPTION_TIMER")], setup={"VMX_PREEMPTION_TIMER_VALUE": 1}),
        Row("lint.exit_msr_load", {"VM_EXIT_MSR_LOAD_COUNT": 2}, setup={"VM_EXIT_MSR_LOAD_COUNT": 1},
            memory=exit_list((0xC0000080, 0, 0xD01), (0xC0000082, 0, 0x800000000000))),
        Row("lint.host_rsp.alignment", {"HOST_RSP": 0x40008}), Row("lint.stack.shared", {"HOST_RSP": 0x90000, "GUEST_RSP": 0x8FF00}),
        Row("lint.stack.close", {"HOST_RSP": 0x92000, "GUEST_RSP": 0x91000}), Row("lint.host_gs.shared", {"HOST_GS_BASE": 0xFFFFF78000000000},
                                                                                    setup={"GUEST_GS_BASE": 0xFFFFF78000000000}),
        Row("lint.host_gs.user", {"HOST_GS_BASE": 0x7FF600000000}, setup={"HOST_RIP": 0xFFFFF80000001000}),
        Row("lint.host_fs.zero", {"HOST_FS_BASE": 0}, mode="PAE", host="PAE", setup={"HOST_FS_SELECTOR": 0x30, "HOST_FS_BASE": 0x1000}),
        Row("lint.host_gdtr.limit", {"GUEST_GDTR_LIMIT": 0x57}, setup={"HOST_GDTR_BASE": 0x7000}),
        Row("lint.host_tr.limit", {"GUEST_TR_LIMIT": 0x20AB}, setup={"HOST_TR_BASE": 0xA000}),
        Row("lint.cr4.vmxe", {"CR4_GUEST_HOST_MASK": 0}), Row("lint.cr0.ne", {"CR0_GUEST_HOST_MASK": 0x80000000}),
        Row("lint.pat", {"GUEST_IA32_PAT": 0}, on=[("entry", "LOAD_IA32_PAT"), ("exit", "LOAD_IA32_PAT")]),
        Row("lint.ss.unusable", {"GUEST_SS_AR_BYTES": 0x10000}, mode="32-bit"),
        Row("lint.ds.unusable", {"GUEST_DS_AR_BYTES": 0x10000}, mode="32-bit"),
        Row("lint.gdt.limit", {"GUEST_GDTR_LIMIT": 0x1F}),
    ]
    for name in lints.MSR_COUNTS:
        table.append(Row(f"lint.msr_count.{name.lower()}", {name: 513}, setup={name: 512, name.replace("COUNT", "ADDR"): 0x100000},
                         memory={0x100000: struct.pack("<IIQ", 0x10, 0, 0) * 513}))
    return table


ROWS = rows()


def vmcs_of(row: Row, *, broken: bool) -> "tuple[Vmcs, object, dict[str, object]]":
    return build(replace(row, on=[*CLEAN_CONTROLS, *row.on], setup={**CLEAN, **row.setup}), broken=broken)


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_lint_passes_and_fails_alone(row: Row) -> None:
    vmcs, caps, given = vmcs_of(row, broken=False)
    memory = given["memory"]
    assert [finding.id for finding in lint_vm_entry(vmcs, caps, memory) if finding.failed] == []
    vmcs, caps, _ = vmcs_of(row, broken=True)
    found = [finding for finding in lint_vm_entry(vmcs, caps, memory) if finding.failed]
    assert [finding.id for finding in found] == [row.id]
    assert found[0].severity == "lint" and found[0].message


def test_every_lint_is_in_the_table() -> None:
    assert {rule.id for rule in lints.RULES} == {row.id for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_what_a_lint_names_still_enters(row: Row) -> None:
    """A lint is no failed check: what it finds passes all of them."""
    vmcs, caps, given = vmcs_of(row, broken=True)
    assert [finding.id for finding in check_vm_entry(vmcs, caps, **given) if finding.failed] == []


def test_lints_come_after_the_checks_when_asked() -> None:
    vmcs, caps, given = vmcs_of(Row("", {"CR4_GUEST_HOST_MASK": 0}), broken=True)
    assert all(finding.severity == "fail" for finding in check_vm_entry(vmcs, caps, **given))
    findings = check_vm_entry(vmcs, caps, lint=True, **given)
    assert [finding.severity for finding in findings[-len(lints.RULES):]] == ["lint"] * len(lints.RULES)
    assert "lint.cr4.vmxe" in [finding.id for finding in findings if finding.failed]


def test_without_capabilities_a_lint_about_support_is_undecided() -> None:
    vmcs, _, _ = vmcs_of(Row("", turn_off=[("sec", "RDTSCP")]), broken=True)
    verdicts = {finding.id: finding.verdict for finding in lint_vm_entry(vmcs)}
    assert verdicts["lint.instruction.rdtscp"] == "undecided" and verdicts["lint.instruction.invpcid"] == "pass"


@pytest.mark.live
def test_instructions_without_their_control_raise_ud(vmx_worker: Worker) -> None:
    """RDTSCP with "Enable RDTSCP" = 0 exits as #UD (vector 6) on a processor that has it, and runs with the control (SDM vol. 3, Changes
    to Instruction Behavior in VMX Non-Root Operation)."""
    for ident, code in (("RDTSCP", "0f01f9"), ("INVPCID", "660f38820c24"), ("XSAVES", "0fc72c24")):
        control = bits.table("sec")[ident].mask
        off = vmx_worker.run_guest(bytes.fromhex(code) + b"\xf4", {0x401E: 0})
        on = vmx_worker.run_guest(bytes.fromhex(code) + b"\xf4", {0x401E: control, 0x6804: 0x42620})
        assert off.number == 0 and off.fields[0x4404] & 0xFF == 6, ident
        assert not (on.number == 0 and on.fields[0x4404] & 0xFF == 6), ident


@pytest.mark.live
def test_a_guest_that_owns_vmxe_faults(vmx_worker: Worker) -> None:
    """MOV to CR4 with VMXE = 0 raises #GP where the mask leaves VMXE to the guest, and exits (28) where the VMM owns it."""
    code = bytes.fromhex("0f22e0") + b"\xf4"       # mov cr4, rax
    free = vmx_worker.run_guest(code, {0x6002: 0, 0x6006: 0}, registers={"rax": 0x620})
    owned = vmx_worker.run_guest(code, {0x6002: 0x2000, 0x6006: 0x2000}, registers={"rax": 0x620})
    assert (free.number, free.fields[0x4404] & 0xFF) == (0, 13)
    assert owned.number == 28


@pytest.mark.live
def test_an_unusable_stack_segment_faults_at_the_first_push(vmx_worker: Worker) -> None:
    push = b"\x50\xf4"
    assert vmx_worker.run_guest(push, {}, mode="32-bit").number == 12
    faulted = vmx_worker.run_guest(push, {0x4818: 0x10000}, mode="32-bit")
    assert (faulted.number, faulted.fields[0x4404] & 0xFF) == (0, 12)
