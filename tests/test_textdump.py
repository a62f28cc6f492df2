"""VMCS and VMCB dumps out of pasted text.

The truth is a kernel's own dump in a log beside the page that it dumped, and texts in the formats that the programs' sources print,
with damage as public reports show it: whatever happens to the text, a wrong value is never read, and a whole one is found.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import textwriters as writers

from vtdbg.errors import FormatError, UsageError
from vtdbg.svm import fields as vmcb_fields
from vtdbg.svm.vmcb import Vmcb
from vtdbg.textdump import TextDump, parse, vmcb_from_text, vmcs_from_text
from vtdbg.textdump.lists import HAXM_ORDER
from vtdbg.vmx import fields as vmcs_fields
from vtdbg.vmx.vmcs import Vmcs

DATA = Path(__file__).parent / "data"
CASES = settings(max_examples=40, deadline=None)

KERNELS = ((4, 9), (5, 4), (5, 8), (5, 15), (5, 19), (6, 8), (6, 12))
AMD_KERNELS = ((4, 19), (5, 10), (5, 15), (6, 8), (6, 15), (6, 18), (6, 19))


def encoding(name: str) -> int:
    return vmcs_fields.find(name).encoding


def vmcs_values(seed: int) -> Dict[writers.Key, int]:
    """A value for every field: edges and random ones; access rights and vectors as wide as they can be."""
    source = random.Random(seed)
    values: Dict[writers.Key, int] = {}
    for number, row in vmcs_fields.fields().items():
        bits = row.size * 8
        values[number] = source.choice((0, 1, (1 << bits) - 1, source.getrandbits(bits), source.getrandbits(bits), source.getrandbits(12)))
        if row.name.endswith("_AR_BYTES"):
            values[number] = source.choice((0x10000, 0x1F0FF, 0xA09B, source.getrandbits(16) & 0xF0FF))
    return values


def vmcb_values(seed: int) -> Dict[writers.Key, int]:
    source = random.Random(seed)
    values: Dict[writers.Key, int] = {}
    for row in vmcb_fields.fields().values():
        bits = min(row.size * 8, 64)
        values[row.name] = source.choice((0, 1, (1 << bits) - 1, source.getrandbits(bits), source.getrandbits(bits)))
        if row.name.endswith(".attrib"):
            values[row.name] = source.getrandbits(12)
        elif row.name in ("nested_ctl", "virt_ext", "asid", "tlb_ctl", "pause_filter_count", "pause_filter_thresh", "cpl", "vmpl"):
            values[row.name] = source.getrandbits(min(bits - 1, 30))
    values["exit_code"] = source.choice((0x60, 0x400, 0x7B, 0xFFFFFFFFFFFFFFFF))
    return values


def numbers(dump: TextDump) -> Dict[writers.Key, int]:
    return {key: found.value for key, found in dump.values.items()}


def plain(rows: Sequence[writers.Row], values: Mapping[writers.Key, int], prefix: str = "none") -> Tuple[str, List[writers.Where]]:
    return writers.render([[row] for row in rows], values, writers.PREFIXES[prefix])


def assert_nothing_wrong(dumps: Sequence[TextDump], values: Mapping[writers.Key, int]) -> None:
    for dump in dumps:
        for key, found in dump.values.items():
            assert found.value == values[key], (dump.dialect, key if isinstance(key, str) else vmcs_fields.find(key).name, found)


def assert_found(dumps: Sequence[TextDump], where: Sequence[writers.Where]) -> None:
    """Every value of `where` is read, and from the line on which it stands."""
    read: Dict[writers.Key, int] = {}
    for dump in dumps:
        read.update(numbers(dump))
    missing = [item.key if isinstance(item.key, str) else vmcs_fields.find(item.key).name for item in where if item.key not in read]
    assert not missing


# --- the kernel's own dump beside the page -------------------------------------------------------------------------------------------


LOG = (DATA / "intel/kvm-bochs27.serial.log").read_text(errors="replace")


def test_kernel_log_gives_the_values_that_the_kernel_printed(intel_plain_truth: Dict[str, Any]) -> None:
    """KVM's dump_vmcs of the failed entry, on a serial line on which user space writes at the same time."""
    truth = {int(key, 16): int(value, 16) for key, value in intel_plain_truth["vms"]["B"]["dump_vmcs_by_encoding"].items()}
    dumps = parse(LOG)
    assert [(dump.kind, dump.dialect) for dump in dumps] == [("vmcs", "KVM dump_vmcs")]
    dump = dumps[0]
    read = numbers(dump)
    efer = truth.pop(encoding("GUEST_IA32_EFER"))
    assert len(truth) == 100
    assert {key: read.get(key) for key in truth} == truth
    # The log has five more: the four PDPTEs and the tertiary controls, printed as 0.
    assert set(read) - set(truth) == {encoding(name) for name in ("GUEST_PDPTR0", "GUEST_PDPTR1", "GUEST_PDPTR2", "GUEST_PDPTR3",
                                                                  "TERTIARY_VM_EXEC_CONTROL")}
    # "(effective)": KVM computed it, the field is not loaded (entry control bit 15 is 0) and is unknown here.
    assert dump.extras["effective_efer"] == efer == 0xD01
    assert "GUEST_IA32_EFER" not in dump.vmcs()
    assert any("effective" in note for note in dump.notes)
    assert any("ffff888006bd9000" in note and "CPU 0" in note for note in dump.notes)


def test_kernel_log_gives_the_same_vmcs_as_the_page(intel_plain: Path) -> None:
    """Text and page of the same VMCS agree in every field that both have, the effective EFER aside."""
    with open(intel_plain, "rb") as memory:
        memory.seek(0x6BD9000)
        page = Vmcs.from_page(memory.read(4096), "bochs_2.7")
    text = vmcs_from_text(LOG)
    both = [name for name in text if name in page]
    assert len(both) >= 100
    assert {name: text[name] for name in both} == {name: page[name] for name in both}
    assert [name for name in text if name not in page] in ([], ["TERTIARY_VM_EXEC_CONTROL"])


def test_what_user_space_wrote_between_is_listed() -> None:
    """The serial line's other writer is not dropped silently: its words are listed with their lines."""
    unparsed = dict(parse(LOG)[0].unparsed)
    lines = LOG.split("\n")
    assert unparsed[119] == "AB: vm=B exit IO"
    assert all(text.split("...")[0].split()[0] in lines[number - 1] for number, text in unparsed.items())


def test_provenance_is_the_line_of_the_log() -> None:
    lines = LOG.split("\n")
    vmcs = vmcs_from_text(LOG)
    for value in vmcs.values():
        number = int(value.source.split()[2])
        digits = f"{value.value:x}"
        assert value.source.startswith("text line ") and digits in lines[number - 1]


# --- every program and version, whole -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("prefix", ["none", "dmesg", "dmesg module", "caller", "syslog", "iso", "module", "ftrace", "ftrace long"])
def test_kvm_intel(kernel: Tuple[int, int], prefix: str) -> None:
    values = vmcs_values(sum(kernel))
    rows = writers.kvm_intel(values, kernel, cet=kernel > (6, 10))
    text, where = plain(rows, values, prefix)
    dump, = parse(text)
    assert dump.dialect == "KVM dump_vmcs"
    assert numbers(dump) == {item.key: item.value for item in where} | {encoding("GUEST_INTR_STATUS"): values[encoding("GUEST_INTR_STATUS")]}
    assert dump.unparsed == []
    assert (dump.first_line, dump.last_line) == (1, len(rows))


@pytest.mark.parametrize("efer", ["effective", "autoload"])
def test_kvm_efer_with_a_remark_is_no_field(efer: str) -> None:
    """KVM prints the EFER of the guest as it computes it, or of the MSR-load list, where VM entry does not load the field."""
    values = vmcs_values(1)
    dump, = parse(plain(writers.kvm_intel(values, (6, 8), efer=efer), values)[0])
    assert encoding("GUEST_IA32_EFER") not in dump.values
    assert dump.values[encoding("HOST_IA32_EFER")].value == values[encoding("HOST_IA32_EFER")]
    assert dump.extras["effective_efer"] == 0xD01
    assert any(efer in note for note in dump.notes)


def test_kvm_msr_lists_are_kept() -> None:
    values = vmcs_values(2)
    msrs = [(0xC0000080, 0xD01), (0x277, 0x7040600070406)]
    dump, = parse(plain(writers.kvm_intel(values, (5, 15), msrs=msrs), values, "dmesg")[0])
    assert dump.extras["msr_lists"] == {"guest autoload": msrs}
    assert dump.unparsed == []


def test_kvm_ve_information() -> None:
    values = vmcs_values(3)
    dump, = parse(plain(writers.kvm_intel(values, (6, 12)), values)[0])
    assert dump.extras["ve_info"] == {"reason": 0x30, "delivery": 0xFFFFFFFF, "qualification": 0x181, "gla": 0x1000, "gpa": 0x2000, "eptp_index": 0}


@pytest.mark.parametrize("prefix", ["none", "xen", "xen date", "xen time", "domain"])
@pytest.mark.parametrize("keyhandler", [False, True])
def test_xen_intel(prefix: str, keyhandler: bool) -> None:
    """The value in the VMCS counts, not the register that Xen prints in parentheses beside it."""
    values = vmcs_values(4)
    text, where = plain(writers.xen_intel(values, keyhandler=keyhandler), values, prefix)
    dump, = parse(text)
    assert dump.dialect == "Xen vmcs_dump_vcpu"
    assert numbers(dump) == {item.key: item.value for item in where}
    assert dump.extras["current"]["rip"] == values[encoding("GUEST_RIP")] ^ 0x10
    assert dump.unparsed == []
    if keyhandler:
        assert (dump.extras["domain"], dump.extras["vcpu"]) == (1, 0)


@pytest.mark.parametrize("efer", ["", "list"])
def test_xen_efer(efer: str) -> None:
    """4.9 prints "EFER =", later versions say whether it is the field or from the MSR-load list."""
    values = vmcs_values(5)
    dump, = parse(plain(writers.xen_intel(values, efer=efer), values, "xen")[0])
    if efer:
        assert encoding("GUEST_IA32_EFER") not in dump.values and dump.extras["effective_efer"] == 0x501
    else:
        assert dump.values[encoding("GUEST_IA32_EFER")].value == values[encoding("GUEST_IA32_EFER")]


def test_xen_zero_of_an_optional_field_says_that_it_may_not_exist() -> None:
    """Xen's vmr() gives 0 where VMREAD fails."""
    values = {**vmcs_values(6), encoding("TSC_MULTIPLIER"): 0, encoding("EPTP_INDEX"): 3}
    vmcs = vmcs_from_text(plain(writers.xen_intel(values), values, "xen")[0])
    assert "lacks" in vmcs.source("TSC_MULTIPLIER") and "lacks" not in vmcs.source("EPTP_INDEX")


def test_xen_4_2() -> None:
    """Its VMExit ilen is the VM-entry instruction length and its qualification is cut to 32 bits: both fields are unknown."""
    values = {**vmcs_values(7), encoding("EXIT_QUALIFICATION"): 0xFFFF800012345678}
    text, where = plain(writers.xen_intel_old(values), values, "xen")
    dump, = parse(text)
    read = numbers(dump)
    assert_nothing_wrong([dump], {**values, encoding("GUEST_INTERRUPTIBILITY_INFO"): 1, encoding("GUEST_ACTIVITY_STATE"): 0,
                                  encoding("CR3_TARGET_COUNT"): 2})
    assert_found([dump], where)
    assert encoding("VM_EXIT_INSTRUCTION_LEN") not in read and encoding("EXIT_QUALIFICATION") not in read
    assert any("VM-exit instruction length is unknown" in note for note in dump.notes)


def test_xen_vmlaunch_error_makes_the_reason_stale() -> None:
    """"VMLAUNCH error: 0x7" stands before the dump; reason= is then what an earlier exit left."""
    values = vmcs_values(8)
    text, _ = plain(writers.xen_intel(values, keyhandler=False, failure="d1v0 VMLAUNCH error: 0x7"), values, "xen")
    vmcs = vmcs_from_text(text)
    assert vmcs["VM_INSTRUCTION_ERROR"] == 7
    assert vmcs["VM_EXIT_REASON"] == values[encoding("VM_EXIT_REASON")] and "stale" in vmcs.source("VM_EXIT_REASON")
    assert any("VMLAUNCH failed" in warning for warning in vmcs.warnings)


def test_xen_failure_line_and_registers() -> None:
    """The line that says what failed stands before the dump, the guest's registers after it; the hypervisor's own registers do not count."""
    values = vmcs_values(9)
    failure = "d12v0 vmentry failure (reason 0x80000022): MSR loading (entry 3)"
    text, _ = plain(writers.xen_intel(values, keyhandler=False, failure=failure), values, "xen")
    registers = "(XEN) rax: 0000000000000087   rbx: 0000019993e1c690   rcx: 00007ffe423fb064\n"
    guest = "(XEN) RFLAGS: 0000000000000046   CONTEXT: hvm guest (d10v0)\n"
    dump, = parse(text + guest + registers)
    assert dump.extras["failures"] == [failure]
    assert dump.extras["registers"] == {"rax": 0x87, "rbx": 0x19993E1C690, "rcx": 0x7FFE423FB064}
    assert "registers" not in parse(text + guest.replace("hvm guest (d10v0)", "hypervisor") + registers)[0].extras


@pytest.mark.parametrize("kernel", AMD_KERNELS)
@pytest.mark.parametrize("prefix", ["none", "svm", "dmesg", "amd", "iso"])
def test_kvm_amd(kernel: Tuple[int, int], prefix: str) -> None:
    values = vmcb_values(sum(kernel))
    text, where = plain(writers.kvm_amd(values, kernel), values, prefix)
    dump, = parse(text)
    assert (dump.kind, dump.dialect) == ("vmcb", "KVM dump_vmcb")
    expected = {item.key: item.value for item in where}
    for name in ("intercept_cr", "intercept_dr", "intercept_misc1", "intercept_misc2"):
        expected[name] = values[name]
    assert numbers(dump) == expected
    assert dump.unparsed == []
    assert dump.vmcb()["cs.attrib"] == values["cs.attrib"]


def test_kvm_amd_registers_beside_the_save_area() -> None:
    """From 6.15 KVM prints the general registers too; they are no fields of the VMCB."""
    values = vmcb_values(1)
    dump, = parse(plain(writers.kvm_amd(values, (6, 15)), values)[0])
    assert dump.extras["registers"] == {"rbx": 0xB0B, "r14": 0x14, "r15": 0x15}
    assert numbers(dump)["rax"] == values["rax"]


def test_kvm_amd_32_bit_exit_code() -> None:
    """VMEXIT_INVALID is -1 in 64 bits (APM vol. 2, appendix SVM Intercept Exit Codes); KVM prints the low half of it."""
    values = {**vmcb_values(2), "exit_code": 0xFFFFFFFFFFFFFFFF}
    vmcb = vmcb_from_text(plain(writers.kvm_amd(values, (5, 15)), values)[0])
    assert vmcb["exit_code"] == 0xFFFFFFFFFFFFFFFF and "32 of 64 bits" in vmcb.source("exit_code")


def test_kvm_amd_half_of_the_intercepts_is_no_field() -> None:
    """cr_read without cr_write leaves intercept_cr unknown."""
    values = vmcb_values(3)
    rows = [row for row in writers.kvm_amd(values, (5, 15)) if not str(row[0]).startswith("cr_write")]
    dump, = parse(plain(rows, values)[0])
    assert "intercept_cr" not in dump.values and numbers(dump)["intercept_dr"] == values["intercept_dr"]


@pytest.mark.parametrize("prefix", ["none", "xen", "xen date"])
def test_xen_amd(prefix: str) -> None:
    values = vmcb_values(4)
    text, where = plain(writers.xen_amd(values), values, prefix)
    dump, = parse(text)
    assert dump.dialect == "Xen svm_vmcb_dump"
    assert_nothing_wrong([dump], values)
    assert_found([dump], where)
    for name in ("int_ctl", "int_vector", "event_inj", "event_inj_err", "exit_int_info", "exit_int_info_err"):
        assert numbers(dump)[name] == values[name]


def test_hvext() -> None:
    values = vmcs_values(10)
    rows = writers.hvext(values)
    text, where = plain(rows, values)
    dump, = parse(text)
    assert dump.dialect == "hvext !dump_vmcs"
    assert numbers(dump) == {item.key: item.value for item in where} and len(where) > 180


def test_hvext_vmread_that_failed_is_unknown() -> None:
    """hvext prints ***** FAILED ***** for a field that the processor lacks."""
    dump, = parse("0x0000000000000010 Guest CS selector\n***** FAILED ***** Guest UINV\n0x0000000000001000 Guest RIP\n")
    assert numbers(dump) == {0x802: 0x10, 0x681E: 0x1000}
    assert dump.extras["failed"] == ["GUEST_UINV"] and dump.unparsed == []


@pytest.mark.parametrize("prefix", ["none", "haxm", "mac"])
def test_haxm(prefix: str) -> None:
    """HAXM's hexadecimal has neither 0x nor padding: 11ff, and 10 is 16."""
    values = vmcs_values(11)
    text, where = plain(writers.haxm(values, HAXM_ORDER), values, prefix)
    dump, = parse(text)
    assert dump.dialect == "HAXM" and numbers(dump) == {item.key: item.value for item in where}


@pytest.mark.parametrize("style", writers.LIST_STYLES)
def test_field_list(style: str) -> None:
    values = vmcs_values(12)
    text, where = plain(writers.field_list(values, style), values, "dmesg")
    dump, = parse(text)
    assert dump.kind == "vmcs" and numbers(dump) == {item.key: item.value for item in where}


def test_field_names_of_every_source_are_known() -> None:
    """Linux', VirtualBox', Bochs', ia32-doc's names and the manual's titles, mixed as people mix them."""
    text = ("VMX_VMCS32_CTRL_PIN_EXEC 0x1f\nVMCS_64BIT_GUEST_IA32_EFER = 0xd01\nVMCS_GUEST_RIP: 0x1000\nGuest CR0: 0x80050033\n"
            "GUEST_CS_SELECTOR=0x10, GUEST_CS_AR_BYTES=0xa09b\n")
    assert dict(vmcs_from_text(text).items()) == {
        "PIN_BASED_VM_EXEC_CONTROL": 0x1F, "GUEST_IA32_EFER": 0xD01, "GUEST_RIP": 0x1000, "GUEST_CR0": 0x80050033, "GUEST_CS_SELECTOR": 0x10,
        "GUEST_CS_AR_BYTES": 0xA09B}


def test_halves_of_a_32_bit_hypervisor_are_joined() -> None:
    """A 32-bit VMREAD gives half of a 64-bit field; the odd encoding the other half (SDM vol. 3, VMCS access)."""
    vmcs = vmcs_from_text("EPT_POINTER: 0x5678901e\nEPT_POINTER_HIGH: 0x1\nTSC_OFFSET_HIGH: 0xffffffff\n0x2800 0xffffffff\n0x2801 0xffffffff\n")
    assert dict(vmcs.items()) == {"EPT_POINTER": 0x15678901E, "VMCS_LINK_POINTER": 0xFFFFFFFFFFFFFFFF}


def test_digits_without_0x_can_be_decimal() -> None:
    """"10" is 10 or 16 where nothing shows which: such a value is left out, one digit is not in doubt, and letters settle it."""
    dump, = parse("GUEST_CS_SELECTOR: 10\nGUEST_ACTIVITY_STATE: 0\n")
    assert numbers(dump) == {0x4826: 0}
    assert any("decimal or hexadecimal" in note for note in dump.notes)
    dump, = parse("GUEST_CS_SELECTOR: 10\nGUEST_RIP: fffff80012345678\n")
    assert numbers(dump)[0x802] == 0x10


def test_source_text_is_no_dump() -> None:
    """#define GUEST_RIP 0x681e gives an encoding, not a value."""
    source = "".join(f"\t{row.name:<40} = {number:#010x},\n" for number, row in vmcs_fields.fields().items())
    assert parse(source) == []
    assert parse("".join(f"#define {row.name} {number:#x}\n" for number, row in vmcs_fields.fields().items())) == []


def test_a_value_wider_than_its_field_is_none() -> None:
    dump, = parse("GUEST_CS_SELECTOR: 0x12345\nGUEST_RIP: 0x1000\n")
    assert numbers(dump) == {0x681E: 0x1000}


# --- QEMU and bhyve -------------------------------------------------------------------------------------------------------------------


QEMU = """KVM: entry failed, hardware error 0x80000021

If you're running a guest on an Intel machine without unrestricted mode
support, the failure can be most likely due to the guest entering an invalid
state for Intel VT. For example, the guest maybe running in big real mode
which is not supported on less recent Intel processors.

EAX=000000b5 EBX=00000001 ECX=00000002 EDX=00000003
ESI=0008f000 EDI=00006000 EBP=00000000 ESP=00006f04
EIP=000fffc3 EFL=00010006 [-----P-] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0010 00000000 ffffffff 00c09300 DPL=0 DS   [-WA]
CS =0008 00000000 ffffffff 00c09b00 DPL=0 CS32 [-RA]
SS =0010 00000000 ffffffff 00c09300 DPL=0 DS   [-WA]
DS =0000 00000000 0000ffff 00000000
FS =0000 00000000 0000ffff 00009300 DPL=0 DS16 [-WA]
GS =0033 00000000 ffffffff 00a0fb00 DPL=3 CS64 [-RA]
LDT=0000 00000000 0000ffff 00008200 DPL=0 LDT
TR =0000 00000000 0000ffff 00008b00 DPL=0 TSS32-busy
GDT=     000f6be8 00000037
IDT=     000f6c26 00000000
CR0=60000011 CR2=00000000 CR3=00000000 CR4=00000000
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000000
Code=66 ba 70 00 b0 8f ee
"""


def test_qemu_registers_after_a_failed_entry() -> None:
    """QEMU's segment flags are bits 8 to 23 of a descriptor's upper half: access rights are the same bits without the limit's."""
    vmcs = vmcs_from_text(QEMU)
    assert (vmcs["GUEST_CS_AR_BYTES"], vmcs["GUEST_FS_AR_BYTES"], vmcs["GUEST_TR_AR_BYTES"]) == (0xC09B, 0x93, 0x8B)
    assert vmcs["GUEST_GS_AR_BYTES"] == 0xA0FB
    assert (vmcs["GUEST_RIP"], vmcs["GUEST_RFLAGS"], vmcs["GUEST_RSP"]) == (0xFFFC3, 0x10006, 0x6F04)
    assert (vmcs["GUEST_GDTR_BASE"], vmcs["GUEST_IDTR_LIMIT"]) == (0xF6BE8, 0)
    assert vmcs["VM_EXIT_REASON"] == 0x80000021
    assert "QEMU register dump" in vmcs.source("GUEST_RIP")


def test_qemu_registers_that_are_no_fields() -> None:
    """CR0 and CR4 there are what the guest reads through the shadow; a segment that is not present has unknown access rights."""
    dump, = parse(QEMU)
    vmcs = dump.vmcs()
    for name in ("GUEST_CR0", "GUEST_CR4", "CR0_READ_SHADOW", "GUEST_IA32_EFER", "GUEST_DS_AR_BYTES", "HOST_CR0"):
        assert name not in vmcs
    assert vmcs["GUEST_DS_LIMIT"] == 0xFFFF
    assert dump.extras["registers"]["cr0"] == 0x60000011 and dump.extras["registers"]["eax"] == 0xB5


def test_qemu_on_amd() -> None:
    """A failed VMRUN is hardware error -1: the registers are then a VMCB's, attributes in 12 bits."""
    vmcb = vmcb_from_text(QEMU.replace("0x80000021", "0xffffffff"))
    assert isinstance(vmcb, Vmcb)
    assert (vmcb["cs.attrib"], vmcb["tr.attrib"], vmcb["rip"], vmcb["exit_code"]) == (0xC9B, 0x8B, 0xFFFC3, 0xFFFFFFFFFFFFFFFF)


def test_qemu_error_of_the_instruction_itself() -> None:
    """KVM gives the VM-instruction error where VMLAUNCH failed: 7, no exit reason."""
    vmcs = vmcs_from_text("KVM: entry failed, hardware error 0x7\n")
    assert dict(vmcs.items()) == {"VM_INSTRUCTION_ERROR": 7}


def test_registers_alone_belong_to_neither_vendor() -> None:
    dump, = parse(QEMU.split("processors.\n")[1])
    assert dump.kind == "registers" and dump.values == {}
    with pytest.raises(FormatError, match="no VMCS dump"):
        vmcs_from_text(QEMU.split("processors.\n")[1])


def test_kernel_dump_wins_over_qemu_registers() -> None:
    """The usual paste has both; CR0= and EFER= of QEMU's block do not leak into the VMCS."""
    values = vmcs_values(13)
    text, where = plain(writers.kvm_intel(values, (5, 4)), values, "dmesg")
    for whole in (QEMU + text, text + QEMU):
        dumps = parse(whole)
        assert sorted(dump.dialect for dump in dumps) == ["KVM dump_vmcs", "QEMU register dump"]
        vmcs = vmcs_from_text(whole)
        assert all(vmcs[item.key] == item.value for item in where)


@pytest.mark.parametrize("blank", ["\t\t", "  "])
def test_bhyve_exit(blank: str) -> None:
    """bhyve prints the exit reason in decimal: 28 is 0x1c, a control-register access."""
    rows = {"reason": "VMX", "rip": "0x0000000000001028", "inst_length": "3", "status": "0", "exit_reason": "28",
            "qualification": "0x0000000000010030", "inst_type": "0", "inst_error": "0"}
    text = "vm exit[1]\n" + "".join(f"\t{name}{blank}{value}\n" for name, value in rows.items())
    dump, = parse(text)
    assert dict(dump.vmcs().items()) == {"VM_EXIT_REASON": 28, "VM_EXIT_INSTRUCTION_LEN": 3, "EXIT_QUALIFICATION": 0x10030, "GUEST_RIP": 0x1028}
    assert "bits 15:0" in dump.vmcs().source("VM_EXIT_REASON") and dump.extras["vcpu"] == 1


def test_bhyve_exit_on_amd() -> None:
    dump, = parse("vm exit[0]\n\treason\t\tSVM\n\trip\t\t0x0000000000001028\n\tinst_length\t3\n\texitcode\t\t0x400\n\texitinfo1\t0x4\n"
                  "\texitinfo2\t0x2000\n")
    assert dict(dump.vmcb().items()) == {"exit_code": 0x400, "exit_info_1": 4, "exit_info_2": 0x2000, "rip": 0x1028}


# --- damage ---------------------------------------------------------------------------------------------------------------------------


ORIGINS: Mapping[str, Tuple[Any, Tuple[str, ...]]] = {
    "kvm 4.9": (lambda values: writers.kvm_intel(values, (4, 9)), ("none", "dmesg", "syslog", "caller", "module", "ftrace")),
    "kvm 6.8": (lambda values: writers.kvm_intel(values, (6, 8), efer="effective"), ("none", "dmesg module", "iso", "caller", "ftrace long")),
    "kvm 6.18": (lambda values: writers.kvm_intel(values, (6, 18), cet=True), ("none", "dmesg module", "module")),
    "xen": (lambda values: writers.xen_intel(values, keyhandler=False), ("none", "xen", "xen date", "domain")),
    "kvm amd 4.19": (lambda values: writers.kvm_amd(values, (4, 19)), ("none", "svm", "dmesg")),
    "kvm amd 6.8": (lambda values: writers.kvm_amd(values, (6, 8)), ("none", "amd", "iso")),
    "xen amd": (lambda values: writers.xen_amd(values), ("none", "xen", "xen time")),
}


def values_for(origin: str, seed: int) -> Dict[writers.Key, int]:
    return vmcb_values(seed) if "amd" in origin else vmcs_values(seed)


@st.composite
def damaged(draw: st.DrawFn, cuts: bool = False) -> Tuple[str, Dict[writers.Key, int], str, List[writers.Where]]:
    """(origin, values, text, where each whole value stands): wrapped, quoted, prefixed, with other blanks and case, hidden values, noise."""
    origin = draw(st.sampled_from(sorted(ORIGINS)))
    values = values_for(origin, draw(st.integers(0, 10_000)))
    write, prefixes = ORIGINS[origin]
    rows: List[writers.Row] = write(values)
    if draw(st.integers(0, 3)) == 0:
        hidden = draw(st.sets(st.integers(1, 120), max_size=10))
        rows = writers.private(rows, lambda number: number in hidden)
    rows = writers.on_text(rows, writers.CASES[draw(st.sampled_from(["kept", "kept", "kept", "lower", "upper"]))])
    rows = writers.on_text(rows, writers.BLANKS[draw(st.sampled_from(sorted(writers.BLANKS)))])
    if draw(st.integers(0, 4)) == 0:
        rows = writers.lost_colons(rows)
    records: List[List[writers.Row]] = []
    source = random.Random(draw(st.integers(0, 1 << 30)))
    wrapping, noisy = draw(st.sampled_from([0.0, 0.2, 0.6])), draw(st.sampled_from([0.0, 0.1, 0.4]))
    for row in rows:
        if source.random() < noisy:
            records.append([[source.choice(writers.NOISE)]])
        points = writers.break_points(row)
        broken = source.sample(points, source.randint(1, min(2, len(points)))) if points and source.random() < wrapping else []
        records.append(writers.wrap(row, broken))
    prefix = writers.PREFIXES[draw(st.sampled_from(prefixes))]
    noise = {number for number, record in enumerate(records) if len(record) == 1 and record[0] and record[0][0] in writers.NOISE}
    quote = draw(st.sampled_from(["", "", "> ", ">> ", ">>>> ", "| "]))
    trailing = draw(st.sampled_from(["", " ", "\r"]))
    text, where = writers.render(records, values, lambda number: "" if number in noise else prefix(number), quote, trailing)
    return origin, values, text, where


@CASES
@given(damaged())
def test_whole_values_survive_damage(case: Tuple[str, Dict[writers.Key, int], str, List[writers.Where]]) -> None:
    """Prefixes, wraps, quote marks, blanks, case, lost colons, hidden values, other lines in between: all that is whole is read, nothing else."""
    _, values, text, where = case
    dumps = [dump for dump in parse(text) if dump.kind != "registers"]
    assert len(dumps) == 1
    assert_nothing_wrong(dumps, values)
    assert_found(dumps, where)


@CASES
@given(damaged(), st.data())
def test_cut_anywhere(case: Tuple[str, Dict[writers.Key, int], str, List[writers.Where]], data: st.DataObject) -> None:
    """A text that ends or begins inside a word: no value is read from a piece of a number."""
    _, values, text, where = case
    at = data.draw(st.integers(0, len(text)))
    head, tail = parse(text[:at]), parse(text[at:])
    assert_nothing_wrong(head, values)
    assert_nothing_wrong(tail, values)
    # Printed lines that stand whole before the cut are still read: what says whose they are has been printed before them.
    first_cut = min((item.record for item in where if item.end >= at), default=len(text))
    whole = [item for item in where if "\n" in text[item.end:at] and item.record < first_cut]
    if len(whole) > 3:
        assert_found(head, whole)


@CASES
@given(st.sampled_from(sorted(ORIGINS)), st.integers(0, 1000), st.data())
def test_lines_missing_in_the_middle(origin: str, seed: int, data: st.DataObject) -> None:
    """Lines taken out, with or without a mark: what could be the guest's or the host's is left out rather than guessed."""
    values = values_for(origin, seed)
    write, prefixes = ORIGINS[origin]
    rows: List[writers.Row] = write(values)
    first = data.draw(st.integers(0, len(rows) - 1))
    last = data.draw(st.integers(first, len(rows)))
    mark: List[writers.Row] = data.draw(st.sampled_from([[], [["..."]], [["[  700.000007] printk: 52 messages suppressed"]], [["[snip]"]]]))
    text, _ = plain(rows[:first] + mark + rows[last:], values, data.draw(st.sampled_from(prefixes)))
    assert_nothing_wrong(parse(text), values)


AMBIGUOUS = ("_RSP", "_RIP", "_SYSENTER_ESP", "_SYSENTER_CS", "_SYSENTER_EIP", "_IA32_EFER", "_IA32_PAT", "_IA32_PERF_GLOBAL_CTRL", "_S_CET", "_SSP",
             "_INTR_SSP_TABLE")


@pytest.mark.parametrize("origin", [name for name in sorted(ORIGINS) if "amd" not in name])
def test_headless_dump(origin: str) -> None:
    """A tail, from every line on: what its label names is read, and a shared label goes to the block that the lines around it show."""
    values = values_for(origin, 5)
    rows = ORIGINS[origin][0](values)
    for first in range(len(rows) - 1):
        text, where = plain(rows[first:], values, "dmesg")
        dumps = parse(text)
        assert_nothing_wrong(dumps, values)
        assert_found(dumps, [item for item in where if not vmcs_fields.find(item.key).name.endswith(AMBIGUOUS)])


def test_headless_efer_of_the_host() -> None:
    """The text begins inside the host's block: "EFER =" right before the controls is the host's."""
    text = ("EFER = 0x0000000000000d01  PAT = 0x0407050600070106\n*** Control State ***\n"
            "PinBased=0000003f CPUBased=b5986dfa SecondaryExec=000034ea\n")
    vmcs = vmcs_from_text(text)
    assert (vmcs["HOST_IA32_EFER"], vmcs["HOST_IA32_PAT"]) == (0xD01, 0x0407050600070106)
    assert "GUEST_IA32_EFER" not in vmcs and "GUEST_IA32_PAT" not in vmcs


def test_efer_without_context_is_unknown() -> None:
    """After a hole in the text nothing says whose EFER it is."""
    dump, = parse("CR0: actual=0x0000000080050033, shadow=0x0000000080050033, gh_mask=fffffffffffefff7\n...\n"
                  "EFER = 0x0000000000000d01  PAT = 0x0407050600070106\n...\nTPR Threshold = 0x00\n")
    assert dict(dump.vmcs().items()) == {"CR0_GUEST_HOST_MASK": 0xFFFFFFFFFFFEFFF7, "CR0_READ_SHADOW": 0x80050033, "GUEST_CR0": 0x80050033,
                                         "TPR_THRESHOLD": 0}
    assert [line for line, _ in dump.unparsed] == [3]


def test_private_values_are_unknown() -> None:
    dump, = parse("CR0: actual=<private>, shadow=0x0000000080050033, gh_mask=<private>\n"
                  "CR4: actual=0x00000000000026e0, shadow=<private>, gh_mask=0\n")
    assert dict(dump.vmcs().items()) == {"CR0_READ_SHADOW": 0x80050033, "GUEST_CR4": 0x26E0}


def test_unpadded_number_at_the_end_of_a_cut_text() -> None:
    """HAXM's `VMX_VPID: 1` at the end of a text without a line end can be the beginning of 1f; 0 cannot be, nothing is printed as 0f."""
    assert numbers(parse("4000 VMX_PIN_CONTROLS: 1f\n0000 VMX_VPID: 1")[0]) == {0x4000: 0x1F}
    assert numbers(parse("4000 VMX_PIN_CONTROLS: 1f\n0000 VMX_VPID: 0")[0]) == {0x4000: 0x1F, 0: 0}
    assert numbers(parse("4000 VMX_PIN_CONTROLS: 1f\n0000 VMX_VPID: 1\n")[0]) == {0x4000: 0x1F, 0: 1}
    # A line that somebody typed is taken as it is, and says that it may be cut.
    vmcs = vmcs_from_text("GUEST_RIP: 0x1000")
    assert vmcs["GUEST_RIP"] == 0x1000 and "may be cut" in vmcs.source("GUEST_RIP")


# --- several dumps ---------------------------------------------------------------------------------------------------------------------


def test_several_vcpus_of_several_domains() -> None:
    """Xen's key handler prints every vCPU of every domain: each is a dump of its own, chosen by index."""
    all_values = [vmcs_values(seed) for seed in range(20, 24)]
    text = "(XEN) *********** VMCS Areas **************\n"
    for number, values in enumerate(all_values):
        rows = writers.xen_intel(values, domain=1 + number // 2, vcpu=number % 2)
        text += plain(rows[1:] if number % 2 else rows, values, "xen")[0]
    dumps = parse(text)
    assert [(dump.extras["domain"], dump.extras["vcpu"]) for dump in dumps] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for dump, values in zip(dumps, all_values):
        assert_nothing_wrong([dump], values)
    assert vmcs_from_text(text, 2)["GUEST_RIP"] == all_values[2][encoding("GUEST_RIP")]


def test_several_dumps_have_to_be_chosen() -> None:
    values, other = vmcs_values(24), vmcs_values(25)
    text = plain(writers.kvm_intel(values), values, "dmesg")[0] + plain(writers.kvm_intel(other), other, "dmesg")[0]
    with pytest.raises(FormatError, match=r"2 VMCS dumps.*0: KVM dump_vmcs, lines 1-.*1: KVM dump_vmcs"):
        vmcs_from_text(text)
    assert vmcs_from_text(text, 0)["GUEST_CR3"] == values[encoding("GUEST_CR3")]
    assert vmcs_from_text(text, 1)["GUEST_CR3"] == other[encoding("GUEST_CR3")]
    with pytest.raises(UsageError, match="no VMCS dump 2"):
        vmcs_from_text(text, 2)


def test_a_dump_whose_header_is_lost_is_a_dump_of_its_own() -> None:
    values, other = vmcs_values(26), vmcs_values(27)
    first, second = writers.kvm_intel(values, (4, 9)), writers.kvm_intel(other, (4, 9))
    dumps = parse(plain(first, values)[0] + plain(second[1:], other)[0])
    assert len(dumps) == 2
    assert_nothing_wrong(dumps[:1], values)
    assert_nothing_wrong(dumps[1:], other)


def _interleave(one: str, two: str, seed: int) -> str:
    source = random.Random(seed)
    rows = [one.splitlines(keepends=True), two.splitlines(keepends=True)]
    text = ""
    while rows[0] or rows[1]:
        which = source.randrange(2) if rows[0] and rows[1] else (0 if rows[0] else 1)
        for _ in range(source.randint(1, 3)):
            if rows[which]:
                text += rows[which].pop(0)
    return text


@CASES
@given(st.integers(0, 1 << 30))
def test_two_processors_with_their_thread_ids(seed: int) -> None:
    """[T1] and [T2] in the prefix tell interleaved lines apart."""
    values, other = vmcs_values(28), vmcs_values(29)
    texts = [writers.render([[row] for row in writers.kvm_intel(one)], one, lambda number, tag=tag: f"[  100.000{number:03}][{tag}] ")[0]
             for one, tag in ((values, "T1001"), (other, "T1002"))]
    dumps = parse(_interleave(*texts, seed))
    assert len(dumps) == 2
    for dump in dumps:
        mine = values if dump.values[encoding("GUEST_CR3")].value == values[encoding("GUEST_CR3")] else other
        assert_nothing_wrong([dump], mine)
        assert len(dump.values) > 110


def _of_one_source(dump: TextDump, sources: Sequence[Mapping[writers.Key, int]]) -> bool:
    return any(all(source[key] == found.value for key, found in dump.values.items()) for source in sources)


@CASES
@given(st.integers(0, 1 << 30), st.sampled_from(["kvm", "xen", "haxm", "kvm amd"]))
def test_two_processors_without_anything_to_tell_them_apart(seed: int, program: str) -> None:
    """Interleaved lines of two dumps: no dump that comes out mixes values of both."""
    make = vmcb_values if "amd" in program else vmcs_values
    values = make(seed % 1000)
    other = {**values, **{key: value for key, value in make(seed % 1000 + 1).items() if random.Random(seed + hash(str(key))).random() < 0.9}}
    write = {"kvm": lambda one: writers.kvm_intel(one, (5, 4)), "xen": lambda one: writers.xen_intel(one, keyhandler=False),
             "haxm": lambda one: writers.haxm(one, HAXM_ORDER), "kvm amd": lambda one: writers.kvm_amd(one, (5, 4))}[program]
    text = _interleave(plain(write(values), values, "none")[0], plain(write(other), other, "none")[0], seed)
    for dump in parse(text):
        assert _of_one_source(dump, (values, other)), dump.notes


def test_haxm_dumps_one_after_the_other_are_two() -> None:
    values, other = vmcs_values(30), vmcs_values(31)
    text = plain(writers.haxm(values, HAXM_ORDER), values, "haxm")[0] + plain(writers.haxm(other, HAXM_ORDER), other, "haxm")[0]
    dumps = parse(text)
    assert [numbers(dump)[0x681E] for dump in dumps] == [values[0x681E], other[0x681E]]


# --- errors, hostile text, size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n", "no dump here\n", "*** Guest State ***\n", "(XEN) ************* VMCS Area **************\n",
                                  "\0\xff" * 100])
def test_text_without_a_dump(text: str) -> None:
    with pytest.raises(FormatError, match="no VMCS dump in it; looked for KVM dump_vmcs"):
        vmcs_from_text(text)
    with pytest.raises(FormatError, match="no VMCB dump"):
        Vmcb.from_text(text)


def test_the_other_kind_is_named() -> None:
    values = vmcb_values(5)
    with pytest.raises(FormatError, match="no VMCS dump in it; it has 0: KVM dump_vmcb"):
        Vmcs.from_text(plain(writers.kvm_amd(values), values)[0])


def test_lines_that_were_not_understood_are_listed_with_their_numbers() -> None:
    values = vmcs_values(32)
    rows = writers.kvm_intel(values, (5, 4))
    rows.insert(7, ["this is somebody's remark"])
    rows.insert(20, ["TR:   sel=0x00"])
    dump, = parse(plain(rows, values)[0])
    assert dump.unparsed == [(8, "this is somebody's remark"), (21, "TR: sel=0x00")]
    assert dump.counts["unparsed"] == 2
    assert any("2 lines of the dump were not understood" in warning for warning in dump.vmcs().warnings)


FRAGMENTS = (
    "*** Guest State ***", "*** Host State ***", "CR0: actual=", "RIP = 0x", "0" * 16, "EFER=", "(", ")", "\n", " ", ",", ":", "|", "\u00a0",
    "VMCB Control Area:", "es: s: 0010 a: 0c93 l: ffffffff b:", "GUEST_RIP", "0x681e", "vm exit[0]", "MSR guest autoload:", "<private>", "...",
    ">>>>", "[  1.000000]", "(XEN)", "4012 VMX_ENTRY_CONTROLS:", "EIP=0000fff0 EFL=00000002 [", "SVI|RVI =", "TSC", "Offset", "virt-APIC")


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=400), st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join)))
def test_any_text(text: str) -> None:
    """Hostile text raises nothing, and every value says its line."""
    for dump in parse(text):
        count = text.count("\n") + 1
        assert 1 <= dump.first_line <= dump.last_line <= count
        assert all(1 <= found.line <= count for found in dump.values.values())
        if dump.kind == "vmcs":
            dump.vmcs()
        elif dump.kind == "vmcb":
            dump.vmcb()


HOSTILE = ("CR0: actual=" * 8000, "0x" * 50_000, "RSP = 0x" + "0" * 100_000, " " * 100_000, ">" * 100_000, "[" * 50_000, "*" * 100_000,
           "GUEST_RIP " * 10_000, "a_" * 50_000, "(XEN) " * 15_000, "EFER(" * 20_000, "es: s: " * 15_000, "." * 100_000, "RIP = " * 16_000,
           "4000 VMX_A: " * 8000, "TSC " * 25_000, "0x4000 a" + " a" * 49_000)


@pytest.mark.parametrize("line", HOSTILE)
def test_hostile_lines_are_read_in_bounded_time(line: str) -> None:
    """Every pattern works from left to right: 100 kB that look like the beginning of something everywhere take no longer than other text."""
    assert parse(line + "\n" + line) is not None


def test_size_of_the_log_costs_lines_not_squares() -> None:
    """Lines far from anything that only a dump prints are split into words once and not read."""
    from vtdbg.textdump import FARTHEST, _candidates
    from vtdbg.textdump.lines import Lines

    values = vmcs_values(33)
    dump_text = plain(writers.kvm_intel(values), values, "dmesg")[0]
    count = 10_000
    noise = "".join(f"[{number:12.6f}] audit: RIP: 0010:vmx_vcpu_run+0x{number:x} CS: 0010 CR0: 0000000080050033\n" for number in range(count))
    candidates = _candidates(Lines(noise + dump_text + noise))
    assert all(number > count - FARTHEST for numbers in candidates for number in numbers)
    assert max(len(numbers) for numbers in candidates) <= 2 * FARTHEST + dump_text.count("\n")
    dump, = parse(noise + dump_text + noise)
    assert len(dump.values) > 110 and dump.first_line == count + 1
    assert [len(numbers) for numbers in _candidates(Lines(noise))] == [0, 0, 0, 0]


def test_json_of_our_own_commands() -> None:
    """What `vmcs dump --json` prints is read back; anything that names fields and gives numbers as hexadecimal strings."""
    vmcs = vmcs_from_text('{"schema": 1, "fields": [{"name": "GUEST_RIP", "value": "0x1000"}, {"name": "HOST_RIP", "value": "0x2000"}]}')
    assert dict(vmcs.items()) == {"GUEST_RIP": 0x1000, "HOST_RIP": 0x2000}
    vmcb = vmcb_from_text('{"control": {"asid": 1, "exit_code": "0x400"}}')
    assert dict(vmcb.items()) == {"asid": 1, "exit_code": 0x400}


# --- pastes, as files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, least", [("kvm-mail-quoted", 98), ("kvm-tail", 28), ("xen-web", 98)])
def test_pastes_of_the_failed_entry(name: str, least: int, intel_plain_truth: Dict[str, Any]) -> None:
    """The kernel's failed entry as a quoted and wrapped mail, as the end of a log, and as a web page makes it of Xen's format."""
    truth = {int(key, 16): int(value, 16) for key, value in intel_plain_truth["vms"]["B"]["dump_vmcs_by_encoding"].items()}
    text = (DATA / f"text/{name}.txt").read_text(encoding="utf-8")
    dump, = parse(text)
    read = {key: value for key, value in numbers(dump).items() if key in truth}
    assert read == {key: truth[key] for key in read} and len(read) >= least
    assert name != "kvm-tail" or not any(found in dump.vmcs() for found in ("GUEST_IA32_PAT", "GUEST_SYSENTER_ESP", "GUEST_RIP"))
    assert ("lines are missing here" in " ".join(dump.notes)) == (name != "kvm-mail-quoted")
