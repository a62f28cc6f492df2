"""Commands against what kernels and emulators said: the same truth that the modules are tested with, as a user gets it (--json)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List

import pytest

from vtdbg.commands.run import Outcome, run_words
from vtdbg.commands.session import Session


def run(words: str, source: "Path | None" = None) -> Outcome:
    session = Session()
    try:
        return run_words(shlex.split(words) + (["-s", str(source)] if source else []), session, lambda report, options: "")
    finally:
        session.close()


def data(words: str, source: "Path | None" = None) -> Dict[str, Any]:
    outcome = run(words + " --json", source)
    assert not outcome.error, outcome.error
    return json.loads(outcome.text)


GOLDEN = Path(__file__).parent / "golden"
VMCS_OF = {"A": "0x6826000", "B": "0x6bd9000"}


def fields(words: str, source: Path) -> Dict[str, int]:
    block = data(words, source)
    groups = block.get("vmcs") or block["vmcb"]
    assert len(groups) == 1
    return {row["name"]: int(row["value"], 16) for row in groups[0]["fields"]}


# --- VMCS and VMCB ---------------------------------------------------------------------------------------------------------------


def test_every_value_of_the_kernels_dump_vmcs_is_in_the_dump(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM's own dump of the failed entry, 101 values; EFER is computed by KVM because the field is not loaded, and that is said."""
    said = intel_plain_truth["vms"]["B"]["dump_vmcs_fields"]
    shown = fields("vmcs dump 0x6bd9000 --all", intel_plain)
    text = fields(f"vmcs dump --all --text {Path(__file__).parent / 'data/intel/kvm-bochs27.serial.log'}", intel_plain)
    assert len(said) == 101 and len(text) >= 100
    absent = {name for name in text if name not in shown}
    assert {name for name in text if name in shown and shown[name] != text[name]} == set()
    # The kernel prints a field that this processor does not have (VMREAD fails, and it prints 0).
    assert all(text[name] == 0 for name in absent), absent
    assert int(said["GUEST_EFER"], 16) == 0xD01 and "GUEST_IA32_EFER" not in text
    row = data("vmcs dump 0x6bd9000 --all", intel_plain)["vmcs"][0]["fields"]
    assert next(one for one in row if one["name"] == "GUEST_IA32_EFER")["used"] is False
    assert 'not loaded: VM-entry control "Load IA32_EFER" is 0' in " ".join((GOLDEN / "vmcs-dump-b-guest.txt").read_text().split())


def test_vmcb_dump_is_the_compilers_decode(amd_exit: Path) -> None:
    """DWARF of `struct vmcb`: every scalar of the control area, by value."""
    dwarf = json.loads((Path(__file__).parent / "data/amd/kvm96-exit.vmcb-dwarf.json").read_text())
    block = data("vmcb dump", amd_exit)["vmcb"][0]
    offsets = [(re.search(r"offset (0x[0-9a-f]+)", row["source"]), row) for row in block["fields"]]
    by_offset = {int(match.group(1), 16): int(row["value"], 16) for match, row in offsets if match}
    compared = 0
    for name, member in dwarf.items():
        if name.startswith("control.") and "val" in member and int(member["off"], 16) in by_offset and member["size"] in (4, 8):
            value = by_offset[int(member["off"], 16)]
            assert value & ((1 << member["size"] * 8) - 1) == int(member["val"], 16), name
            compared += 1
    assert compared >= 15


def moved_to_zero(source: Path, blocks: Dict[int, int], target: Path) -> Path:
    """A raw image with pages of `source` copied to other places: {from: to}."""
    from vtdbg import open as open_dump

    machine = open_dump(source)
    image = bytearray(16 << 12)
    for old, new in blocks.items():
        image[new:new + 4096] = machine.memory.read_page(old)
    machine.memory.close()  # type: ignore[attr-defined]
    target.write_bytes(image)
    return target


def test_physical_zero_is_an_address(amd_exit: Path, intel_plain: Path, tmp_path: Path) -> None:
    """Some hypervisors keep their VMCB at physical 0: it is found, dumped and used, never taken for "none"."""
    amd = moved_to_zero(amd_exit, {0x1F22000: 0}, tmp_path / "amd.raw")
    found = data("vmcb list", amd)["vmcb"]
    assert [(row["address"], row["kind"]) for row in found] == [("0x0", "vmcb")]
    assert fields("vmcb dump 0", amd)["nested_cr3"] == 0x1F52000
    assert fields("vmcb get rip --at 0", amd) == {"rip": 0xFFFF800000000091}
    intel = moved_to_zero(intel_plain, {0x6826000: 0}, tmp_path / "intel.raw")
    assert [row["address"] for row in data("vmcs list", intel)["vmcs"]] == ["0x0"]
    assert fields("vmcs get GUEST_RIP --at 0", intel) == {"GUEST_RIP": 0x1009D}
    # A table at 0 is a table too.
    assert data("npt walk 0x1000 --ncr3 0", amd)["walk"][0]["steps"][0]["address"] == "0x000000000"


def test_the_five_vmcs_of_the_nested_dump_are_told_apart(intel_nested: Path) -> None:
    found = {row["address"]: row for row in data("vmcs list", intel_nested)["vmcs"]}
    kinds = {address: row["kind"] for address, row in found.items()}
    assert kinds["0x6b53000"] == kinds["0x6ba1000"] == "vmcs"
    assert kinds["0x6ba3000"] == "shadow-vmcs"
    assert kinds["0x6530000"] == kinds["0x2997000"] == "kvm-vmcs12"
    assert kinds["0x2998000"] == "empty"
    assert "0x6ba3000" in found["0x6b53000"]["summary"] and "0x6b53000" in found["0x6ba3000"]["summary"]


# --- walks -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vm", ["A", "B"])
def test_ept_walk_agrees_with_pagemap(intel_plain: Path, intel_plain_truth: Dict[str, Any], vm: str) -> None:
    truth = intel_plain_truth["vms"][vm]
    vmcs = VMCS_OF[vm]
    for gpa, hpa in truth["gpa_to_hpa_pagemap"].items():
        walk = data(f"ept walk {gpa} --vmcs {vmcs}", intel_plain)["walk"][0]
        if gpa in truth["not_in_ept"]:
            assert walk["outcome"] == "violation"
        else:
            assert walk["outcome"] == "mapped" and int(walk["result"]["hpa"], 16) == int(hpa, 16)


def test_npt_walk_agrees_with_pagemap(amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    """26 truths: 19 equal, 7 not present, 0 wrong."""
    equal = absent = 0
    for row in amd_exit_truth["gpa_truth"]:
        walk = data(f"npt walk {row['gpa']}", amd_exit)["walk"][0]
        if walk["outcome"] == "mapped":
            assert int(walk["result"]["hpa"], 16) == int(row["hpa_pagemap"], 16)
            equal += 1
        else:
            assert row["hpa_npt_walk"] is None or int(row["hpa_npt_walk"], 16) >> 51
            absent += 1
    assert (equal, absent) == (19, 7)


def test_gva_walk_agrees_with_kvm_translate(intel_plain: Path, intel_plain_truth: Dict[str, Any]) -> None:
    """KVM_TRANSLATE gives the guest-physical address; whether the EPT maps that is another question."""
    rows = intel_plain_truth["vms"]["A"]["gva_to_gpa_kvm_translate"]
    assert len(rows) == 10
    for gva, gpa in rows.items():
        found = data(f"gva walk {gva} --vmcs {VMCS_OF['A']}", intel_plain)["walk"][0]
        assert int(found["result"]["gpa"], 16) == int(gpa, 16), gva


# --- bitmaps, descriptors, capabilities, words -----------------------------------------------------------------------------------


def test_msr_bitmaps_pass_exactly_the_msrs_of_the_kernels(intel_plain: Path, amd_exit: Path, amd_exit_truth: Dict[str, Any]) -> None:
    def passed(words: str, source: Path, access: str) -> List[int]:
        rows = data(words, source)["bitmaps"][0][access]
        return [index for row in rows for index in range(int(row["first"], 16), int(row["last"] or row["first"], 16) + 1)]

    common = [0x174, 0x175, 0x176, 0xC0000100, 0xC0000101, 0xC0000102]
    assert passed("msrbitmap dump --vmcs 0x6826000", intel_plain, "read") == [0x10, *common]
    assert passed("msrbitmap dump --vmcs 0x6826000", intel_plain, "write") == common
    eleven = [int(row[0], 16) for row in amd_exit_truth["msrpm_not_fully_intercepted"]]
    assert passed("msrbitmap dump", amd_exit, "read") == passed("msrbitmap dump", amd_exit, "write") == eleven and len(eleven) == 11


def test_query_says_byte_bit_and_the_rule_outside_the_ranges(intel_plain: Path) -> None:
    answers = data("msrbitmap query 0x10 0x40000000 --vmcs 0x6826000", intel_plain)["bitmaps"][0]["answers"]
    assert [row["exits"] for row in answers] == [False, True, True, True]
    assert (answers[0]["byte"], answers[0]["bit"]) == ("0x002", 0) and answers[2]["byte"] is None and "always exits" in answers[2]["why"]


def test_host_tss_is_where_the_gdt_says(intel_plain: Path) -> None:
    """HOST_TR_BASE equals the TSS base in the host GDT at selector 0x40."""
    gdt = data("gdt dump --host --vmcs 0x6826000", intel_plain)["tables"][0]
    row = next(row for row in gdt["entries"] if row["selector"] == "0x0040")
    assert int(row["base"], 16) == fields("vmcs get HOST_TR_BASE --at 0x6826000", intel_plain)["HOST_TR_BASE"]
    # Linux' kernel code descriptor, as VMWRITE wants its access rights.
    assert next(row for row in gdt["entries"] if row["selector"] == "0x0010")["access_rights"] == "0xa09b"


def test_the_spoilt_segment_of_vm_b_is_found_against_its_descriptor(intel_plain: Path) -> None:
    rows = data("gdt dump --vmcs 0x6bd9000", intel_plain)["tables"][0]["segments"]
    code = next(row for row in rows if row["name"] == "CS")
    assert any(difference["field"] == "TYPE" for difference in code["state"]["differences"])


def test_the_failing_check_is_named_from_the_page_and_from_the_log(intel_plain: Path) -> None:
    log = Path(__file__).parent / "data/intel/kvm-bochs27.serial.log"
    for words in ("vmcs check 0x6bd9000 --caps bochs-2.7-skylake-x", f"vmcs check --text {log} --caps bochs-2.7-skylake-x"):
        outcome = run(words + " --json", intel_plain)
        failures = json.loads(outcome.text)["vmcs"][0]["failures"]
        assert outcome.status == 1 and [row["id"] for row in failures] == ["guest.cs.type"]
        assert failures[0]["see"] and "GUEST_CS_AR_BYTES" in failures[0]["fields"]
    assert run("vmcs check 0x6826000 --caps bochs-2.7-skylake-x", intel_plain).status == 0


def test_adjusted_controls_are_what_the_manual_computes() -> None:
    """(wanted | allowed-0) & allowed-1 with IA32_VMX_PINBASED_CTLS of the Bochs processor, 0x7f00000016."""
    found = data("caps adjust pin 0xffffffff --msr 0x480=0 --msr 0x481=0x0000007f00000016")["adjustment"]
    assert found["value"] == "0x0000007f"
    found = data("caps adjust pin 0 --msr 0x480=0 --msr 0x481=0x0000007f00000016")["adjustment"]
    assert found["value"] == "0x00000016"


def test_words_by_name() -> None:
    rows = {row["ident"].text if hasattr(row["ident"], "text") else row["ident"]: row for row in data("decode cr0 0x80050033")["bits"]}
    assert set(rows) == {"PG", "AM", "WP", "NE", "ET", "MP", "PE"}
    assert run("decode eptp 0x121e").status == 1
    assert "did you mean" in run("decode eptpp 1").error


def test_exits_from_numbers_of_both_vendors() -> None:
    assert data("exit explain --reason 48 --qualification 0x182")["exit"][0]["name"] == "EPT_VIOLATION"
    assert data("exit explain --exit-code 0x400 --exit-info-1 0x10000000e --exit-info-2 0x200000")["exit"][0]["kind"] == "svm"
    assert "an exit is one or the other" in run("exit explain --reason 1 --exit-info-1 2").error


@pytest.mark.parametrize("reason", range(86))
def test_explain_answers_for_every_basic_reason(reason: int) -> None:
    found = data(f"exit explain --reason {reason}")["exit"][0]
    assert found["code"] == reason and found["name"]


def test_explain_answers_for_every_svm_code() -> None:
    from vtdbg.svm.exit_codes import exit_codes

    for code in exit_codes():
        found = data(f"exit explain --exit-code={code:#x}")["exit"][0]
        assert found["known"], hex(code)


def test_an_unused_page_is_said_to_be_unused(intel_plain: Path) -> None:
    block = data("page vapic 0x6826000", intel_plain)["pages"][0]
    assert "Use TPR shadow" in block["why"][0]


def test_several_dumps_in_one_log_are_all_shown(tmp_path: Path, intel_plain: Path) -> None:
    lines = (Path(__file__).parent / "data/intel/kvm-bochs27.serial.log").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if "Guest State" in line)
    dump = lines[first - 2:first + 60]
    log = tmp_path / "two.log"
    log.write_text("\n".join([*dump, "something else in between", *dump]) + "\n")
    assert len(data(f"vmcs get GUEST_RIP --text {log}", intel_plain)["vmcs"]) == 2
    assert len(data(f"vmcs get GUEST_RIP --text {log} --index 1", intel_plain)["vmcs"]) == 1
    assert "--index 2" in run(f"vmcs get GUEST_RIP --text {log} --index 2", intel_plain).error
