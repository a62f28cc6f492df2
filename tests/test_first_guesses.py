"""What people type first: it works, or the error names the words that do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.live import PATIENCE

from vtdbg.cli import main
from vtdbg.svm import exit_codes
from vtdbg.vmx import exit_reasons

VMCS, VMCB = "0x6826000", "0x1f22000"


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Ran":
    monkeypatch.delenv("VTDBG_SOURCE", raising=False)
    return Ran(capsys)


class Ran:
    """A command line's (status, output, error)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str, *more: object) -> Tuple[int, str, str]:
        status = main([*line.split(), *map(str, more)])
        out, err = self._capsys.readouterr()
        return status, out, err

    def refused(self, line: str, *more: object) -> str:
        status, out, err = self(line, *more)
        assert (status, out) == (2, "") and err.count("\n") == 1 and err.isascii(), (status, out, err)
        return err


@pytest.mark.parametrize(("typed", "advice"), [
    ("dump vmcs", "did you mean vmcs dump?"), ("walk ept 0x1000", "did you mean ept walk?"), ("check", "vmcs check, vmcb check"),
    ("explain 48", "exit explain"), ("vcms dump", "did you mean vmcs?"), ("nonsense", "help"),
    ("vmcs check", "--text - reads the standard input"), ("vmcs check -", "a log with --text -"), ("vmcs dump dmesg.txt", "--text dmesg.txt"),
    ("vmcs dump mem.elf", "-s mem.elf"), ("vmcs get 681e -s sample:vmx", "0x681e (GUEST_RIP)"),
    ("vmcs get 4402 -s sample:vmx", "0x4402 (VM_EXIT_REASON)"),
    ("vmcs dump 6826000 -s sample:vmx", "without 0x is decimal; did you mean 0x6826000?"),
    ("msr 0x480", "did you mean msr show 0x480"), ("source mem.elf", "did you mean source info -s mem.elf?"),
    ("source info sample:vmx", "-s sample:vmx"), ("vmcs list mem.elf", "-s mem.elf"), ("vmcs dump --jsn", "did you mean --json"),
    ("msrbitmap dump 0x6826000 -s sample:vmx", "behind --vmcs"), ("gdt dump 0x6826000 -s sample:vmx", "behind --vmcs"),
    ("msr show effer", "IA32_EFER"), ("msr show c0000080", "0xc0000080 (IA32_EFER)"), ("caps show --msr 480=5", "write 0x480"),
    ("decode 0x480 5", "did you mean msr 0x480 (IA32_VMX_BASIC)?"),
    ("exit explain 80000021", "0x80000021 (INVALID_STATE)"), ("exit explain --reason 80000021", "0x80000021 (INVALID_STATE)"),
    ("exit explain 6826000 -s sample:vmx", "0x6826000"), ("exit explain EPT_VIOLATOIN", "did you mean EPT_VIOLATION?"),
    ("exit explain 48 1 2", "only qualification"), ("exit explain 48 --reason 3", "one of them"), ("exit reasons nothing", "unknown exit"),
    (f"vmcs dump {VMCB} -s sample:svm", f"vmcb dump {VMCB}"), (f"exit explain {VMCB} -s sample:svm", f"exit explain --vmcb {VMCB}"),
])
def test_an_error_says_what_to_type(ran: Ran, typed: str, advice: str) -> None:
    assert advice in ran.refused(typed)


@pytest.mark.parametrize(("typed", "full"), [
    ("exit explain EPT_VIOLATION 0x182", "exit explain --reason EPT_VIOLATION --qualification 0x182"),
    ("exit explain EXIT_REASON_EPT_VIOLATION", "exit explain --reason 48"),
    ("exit explain 0x80000021", "exit explain --reason 0x80000021"),
    ("exit explain NPF 0x4 0x1000", "exit explain --exit-code 0x400 --exit-info-1 4 --exit-info-2 0x1000"),
    ("exit explain 0x400", "exit explain --exit-code NPF"),
    ("exit explain 0xffffffff", "exit explain --exit-code -1"),
    (f"vmcs get {VMCS} GUEST_RIP -s sample:vmx", f"vmcs get GUEST_RIP --at {VMCS} -s sample:vmx"),
    (f"vmcs get GUEST_RIP {VMCS} -s sample:vmx", f"vmcs get 26654 --at {VMCS} -s sample:vmx"),
    (f"vmcb get rip {VMCB} -s sample:svm", f"vmcb get rip --at {VMCB} -s sample:svm"),
    ("decode msr 0x480 5", "decode msr IA32_VMX_BASIC 5"), ("decode ept pte 0x7", "decode ept_pte 0x7"), ("decode attr 0xa09b", "decode ar 0xa09b"),
    ("caps adjust sec SECONDARY_EXEC_ENABLE_EPT SECONDARY_EXEC_XSAVES --processor i7-6700k", "caps adjust sec EPT XSAVES --processor i7-6700k"),
    ("caps adjust proc CPU_BASED_HLT_EXITING HLT --processor i7-6700k", "caps adjust proc HLT_EXITING --processor i7-6700k"),
    ("phys 0x6826000 x/4gx -s sample:vmx", "phys 0x6826000 4gx -s sample:vmx"), ("vmcs help", "vmcs --help"), ("version", "--version"),
    ("exit reasons intel", "exit reasons vmx"), ("exit reasons AMD", "exit reasons svm"),
])
def test_a_short_form_is_the_long_one(ran: Ran, typed: str, full: str) -> None:
    short = ran(typed)
    assert short[0] == 0 and short == ran(full)


def test_a_number_that_is_an_exit_of_both_makers_is_said_to_be_one(ran: Ran) -> None:
    """48 is EPT_VIOLATION on VMX and the write of DR0 on SVM (appendices of both manuals): which one was taken is no secret."""
    status, out, _ = ran("exit explain 48 0x182")
    assert status == 0 and "taken for VMX exit reason 48" in out and "--exit-code 48" in out and "(WRITE_DR0)" in out
    # "VMLAUNCH failed with error 7" is neither.
    assert "--instruction-error 7 (ENTRY_INVALID_CONTROL_FIELD)" in " ".join(ran("exit explain 7")[1].split())
    assert "SVM (NPF)" in ran("exit explain --reason 0x400")[1]


def test_digits_that_a_log_means_as_hexadecimal_are_said_to_be_decimal(ran: Ran) -> None:
    """KVM prints CR0=0000000080050033: without the leading zeros nothing in it says hexadecimal."""
    assert "80050033 is decimal here; hexadecimal would be 0x80050033" in ran("decode cr0 80050033")[1]
    assert "decimal" not in ran("decode cr0 0x80050033")[1] and "decimal" not in ran("decode activity 1")[1]
    assert "write 0x0000000080050033," in ran.refused("decode cr0 0000000080050033")


@pytest.mark.parametrize(("typed", "command"), [
    ("decode exit_qualification 0x182", "exit explain REASON 0x182"), ("decode VM_EXIT_REASON 0x80000021", "exit explain --reason 0x80000021"),
    ("decode VMX_INSTRUCTION_INFO 5", "--instruction-info 0x5"), ("decode VM_INSTRUCTION_ERROR 7", "exit explain --instruction-error 7"),
    ("decode exit_code 0x400", "exit explain --exit-code 0x400"), ("decode exit_info_1 4", "--exit-info-1 0x4"),
])
def test_numbers_of_an_exit_lead_to_the_command_that_knows_them(ran: Ran, typed: str, command: str) -> None:
    """The form of a qualification depends on the reason (SDM vol. 3, Basic VM-Exit Information): no table of bits is right for all."""
    status, out, _ = ran(typed)
    assert status == 0 and f"{command}`" in " ".join(out.split()) and "nobody lays" not in out
    words = command.replace("REASON", "48").replace("CODE", "0x400")
    assert ran(words if words.startswith("exit") else f"exit explain 48 {words}" if "info-1" not in words else f"exit explain 0x400 {words}")[0] == 0


def test_what_no_msr_says_is_unknown_and_not_blank(ran: Ran) -> None:
    out = ran("caps show --msr 0x485=0")[1]
    assert [line.split()[-1] for line in out.splitlines()[:3]] == ["unknown"] * 3


def test_a_page_address_is_an_address_wherever_there_is_memory(ran: Ran) -> None:
    assert "VMCS at 0x6826000" in ran(f"exit explain {VMCS} -s sample:vmx")[1]
    assert "no memory" in ran.refused(f"exit explain {VMCS}")
    assert "VMX exit reason 0" in ran("exit explain 0")[1]


@pytest.mark.parametrize("name", ["EXIT_REASON_CPUID", "VMX_EXIT_CPUID", "exit_reason_cpuid", "CPUID_INSTRUCTION", "cpuid"])
def test_vmx_reasons_by_the_names_of_other_sources(name: str) -> None:
    """EXIT_REASON_ is Linux', VMX_EXIT_ VirtualBox'; ia32-doc adds nothing to the name."""
    assert exit_reasons.find(name).number == 10


def test_every_name_finds_its_own_reason() -> None:
    for row in exit_reasons.reasons().values():
        for name in (row.name, row.linux or row.name, f"EXIT_REASON_{row.name}", row.name.lower().replace("_", "-")):
            assert exit_reasons.find(name) is row, name
    for code in exit_codes.exit_codes().values():
        if code.kind == "exit":
            assert exit_codes.find(f"EXIT_{code.name}") is code and exit_codes.find(f"SVM_EXIT_{code.name}") is code, code.name


def test_reasons_by_part_of_a_name_and_by_number(ran: Ran) -> None:
    shown = ran("exit reasons ept")[1]
    assert all(name in shown for name in ("EPT_VIOLATION", "EPT_MISCONFIG", "INVEPT")) and "CPUID" not in shown
    assert [line for line in ran("exit reasons EXIT_REASON_HLT")[1].splitlines() if "HLT" in line] == ["12      0x0c  HLT   HLT"]
    both = ran("exit reasons 48")[1]
    assert "EPT_VIOLATION" in both and "WRITE_DR0" in both


def test_a_page_that_is_no_vmcb_is_said_to_look_like_none(ran: Ran) -> None:
    """VMRUN fails on it all the same: the checks are made, and the doubt stands above them."""
    for verb in ("vmcb dump", "vmcb check"):
        text = " ".join(ran(f"{verb} {VMCS} -s sample:vmx")[1].split())
        assert "does not look like a VMCB" in text and f"`vmcs dump {VMCS}`" in text, verb
        assert "does not look like" not in ran(f"{verb} {VMCB} -s sample:svm")[1]


LOG = (Path(__file__).parent / "data" / "intel" / "kvm-bochs27.serial.log").read_text()


@pytest.mark.parametrize("content", [
    LOG.encode(), LOG.encode("utf-16"), LOG.replace("\n", "\r\n").encode("utf-8-sig"), b"\xff\x80 not UTF-8 \x81\n" + LOG.encode(),
], ids=["plain", "utf-16", "windows", "garbage"])
def test_logs_in_the_encodings_that_tools_write(ran: Ran, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """PowerShell's > and WinDbg's .logopen /u write UTF-16; a log cut from a serial line holds bytes that are no UTF-8 at all."""
    path = tmp_path / "log"
    path.write_bytes(content)
    assert "0x000000000001009e" in ran("vmcs get GUEST_RIP --text", path)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert "0x000000000001009e" in ran("vmcs get GUEST_RIP --text -")[1]


def test_a_text_without_end_is_refused(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtdbg.commands.select.LONGEST_TEXT", 1 << 16)
    assert "no log is so long" in ran.refused("vmcs dump --text /dev/zero")


def test_a_file_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    """A path is bytes: it need not be in the terminal's encoding, nor in any."""
    for name, shown in ((b"\xd1\x84.raw", "\\u0444.raw"), (b"\xff.raw", "\\udcff.raw")):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(bytes(4096))
        done = subprocess.run([sys.executable, "-m", "vtdbg", "source", "info", "-s", path], capture_output=True, text=True, timeout=PATIENCE,
                              env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"})
        assert done.returncode == 0 and shown in done.stdout and not done.stderr, done


def test_a_fifo_is_refused_and_not_waited_for(ran: Ran, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in ran.refused("vmcs list -s", tmp_path / "fifo")


def test_what_a_file_of_values_holds_is_printed_in_ascii(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "msrs").write_bytes(bytes(range(256)) * 40)
    assert "no MSR value" in ran.refused("caps show", tmp_path / "msrs")


@given(st.text(max_size=20))
def test_any_word_is_an_exit_or_one_line(word: str) -> None:
    assert main(["exit", "reasons", "--", word]) in (0, 2)
    assert main(["exit", "explain", "--", word]) in (0, 2)
