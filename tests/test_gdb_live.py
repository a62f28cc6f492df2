"""vtdbg in a real GDB on a real hypervisor: KVM on QEMU's emulated SVM, in guest mode first and then just after a #VMEXIT.

Compared with: QEMU's own dump of the same machine opened offline, the kernel's pagemap, raw packets, QMP.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Iterator

import pytest
from lab_amd import BareQemu, Lab
from support import gdbdocs
from support.live import started
from support.livegdb import Wire, body, error, plugged, vtdbg
from support.ptygdb import PressingWire, PtyGdb

from vtdbg.memory.open import open_machine
from vtdbg.svm.vmcb import Vmcb
from vtdbg.targets.mi import MiPort
from vtdbg.targets.port import TargetError

pytestmark = pytest.mark.live

MODE = "maintenance packet qqemu.PhyMemMode"
COMPARED = ("vmcb dump", "npt walk 0x20000", "npt walk 0x200000", "npt dump", "gva walk 0xffff800000000091", "vt exit explain", "vmcb check")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with started("the AMD lab", lambda: Lab(tmp_path_factory.mktemp("lab"))) as machine:
        yield machine


@pytest.fixture
def guest(lab: Lab) -> Lab:
    """The lab in guest mode, after an exit for #UD."""
    return lab.advance("guest")


@pytest.fixture
def host(lab: Lab) -> Lab:
    """The lab in the host just behind VMRUN, after a nested page fault."""
    return lab.advance("exit")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareQemu]:
    """A machine of 64 MiB with a pattern at 1 MiB."""
    with started("QEMU", lambda: BareQemu(tmp_path_factory.mktemp("bare"), bytes(range(256)) * 64, smp=2)) as machine:
        yield machine


# --- in the guest ------------------------------------------------------------------------------------------------------------------


def test_documented_sessions_are_real(guest: Lab) -> None:
    """README.md and docs/gdb.md show what GDB prints."""
    with PtyGdb(f"target remote 127.0.0.1:{guest.port}") as gdb:
        assert gdbdocs.check(gdb, "live, QEMU at") >= 2
    assert gdbdocs.unknown_sessions() == []


def test_guest_mode_is_said_and_the_vmcb_is_of_the_last_exit(guest: Lab) -> None:
    """QEMU shows the guest's CR3 as the processor's and says nothing; the VMCB still has the RIP of the #UD exit before."""
    with plugged(guest.port) as gdb:
        assert guest.state["rip"] == 0xFFFF800000000091
        text = gdb.execute("vmcb get rip exit_code")
        head = " ".join(text.partition("\n\n")[0].split())
        assert "GUEST mode" in head and f"guest of the VMCB at {guest.state['vmcb']:#x}" in head and "as of the last exit" in head
        assert "0xffff80000000008a" in text and "EXCP_UD" in text


def test_host_registers_in_guest_mode_are_those_that_vmrun_saved(guest: Lab) -> None:
    """The live CR3 is the guest's; the host's is at VM_HSAVE_PA, which the host's kernel told."""
    with plugged(guest.port) as gdb:
        text = gdb.execute("vt source info")
        assert f"host save area at {guest.truth('hsave'):#x}" in text
        saved = re.search(r"cr3\s+(0x[0-9a-f]+)", text)
        assert saved is not None and int(saved.group(1), 16) != guest.state["cr3"] == 0x1000


@pytest.fixture(scope="module")
def guest_dump(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.advance("guest").dump(tmp_path_factory.mktemp("dump") / "guest.elf")


@pytest.mark.parametrize("command", COMPARED)
def test_the_same_text_as_from_a_dump(command: str, guest: Lab, guest_dump: Path) -> None:
    """QEMU's own dump of this very machine, opened offline, gives the same report; so does the way through the stub's packets."""
    words = command.replace("vt ", "").split()
    offline = body(vtdbg(*words, "-s", str(guest_dump), "--width", "80", status=None))
    with plugged(guest.port, "set width 80") as gdb:
        assert body(gdb.execute(command + " --width 80")) == offline != ""


def test_the_stub_gives_what_the_fast_path_gives(guest: Lab) -> None:
    """Every nested table and the VMCB by packets, the mode back at virtual afterwards."""
    with plugged(guest.port) as gdb:
        for command in (f"vmcb dump {guest.state['vmcb']:#x}", f"npt dump --vmcb {guest.state['vmcb']:#x}"):
            assert body(gdb.execute(command)) == body(gdb.execute(command + " --no-fast")) != ""
            assert '"0"' in gdb.execute(MODE)


def test_without_the_fast_path_the_search_is_bounded_and_says_what_to_type(guest: Lab) -> None:
    """96 MiB through packets: some seconds of them are searched unasked, here none.  What the header says to type finds this guest's VMCB; nothing
    is claimed before."""
    with plugged(guest.port) as gdb:
        gdb.execute("python import vtdbg.targets.live as live; live.SEARCH_SECONDS = 0.0")
        text = " ".join(gdb.execute("vt source info --no-fast").split())
        assert "GUEST mode" not in text and "host or guest is not known (none of the control blocks in the first" in text
        typed = re.search(r"or `(vmcb list --scan all)`", text)
        assert typed is not None
        gdb.execute(typed.group(1) + " --no-fast")
        text = " ".join(gdb.execute("vt source info --no-fast").split())
        assert f"GUEST mode (GDTR and IDTR are those of the guest of the VMCB at {guest.state['vmcb']:#x})" in text
        assert '"0"' in gdb.execute(MODE)


class Counting(Wire):
    """A relay that counts the bytes of memory that are asked for."""

    asked = 0

    def passing(self, data: bytes, to_stub: bool) -> None:
        if to_stub:
            self.asked += sum(int(size, 16) for size in re.findall(rb"\$m[0-9a-f]+,([0-9a-f]+)#", data))


def test_nothing_is_searched_where_nothing_depends_on_it(guest: Lab) -> None:
    """Through the stub, where every byte costs: a named control block is looked at, and tells where the processor is; for memory at an address the
    header says that it does not know, and why.  What depends on it searches."""
    with Counting(guest.port) as wire, plugged(wire.port) as gdb:
        text = " ".join(gdb.execute("phys 0x1000 --no-fast").split())
        assert "host or guest is not known (no control block known so far decides it" in text and "was not searched" in text
        text = " ".join(gdb.execute("vmcb dump 0x3000 --no-fast").split())
        assert "host or guest is not known (no control block known so far decides it" in text
        text = " ".join(gdb.execute(f"vmcb get rip --at {guest.state['vmcb']:#x} --no-fast").split())
        assert f"GUEST mode (GDTR and IDTR are those of the guest of the VMCB at {guest.state['vmcb']:#x})" in text
        assert f"VMCB at {guest.state['vmcb']:#x}" in gdb.execute("vt where --no-fast")
        assert wire.asked < 1 << 17
    with Counting(guest.port) as wire, plugged(wire.port) as gdb:
        gdb.execute("vt where --no-fast")
        assert wire.asked > 1 << 17


def test_nested_tables_agree_with_the_kernels_pagemap(guest: Lab) -> None:
    """$hpa of every guest page that is mapped is what /proc/self/pagemap of the VMM said."""
    checked = 0
    with plugged(guest.port) as gdb:
        for gpa, hpa in guest.pagemap():
            try:
                found = gdb.evaluate(f"$hpa({gpa:#x})")
            except Exception as problem:    # noqa: BLE001 - a page that the guest has not touched is not in the nested tables
                assert "level" in str(problem) or "not present" in str(problem), problem
                continue
            assert found == hpa, hex(gpa)
            checked += 1
    assert checked >= 15


def test_functions_work_in_conditions(guest: Lab) -> None:
    with plugged(guest.port) as gdb:
        assert gdb.evaluate('$vmcb("rip")') == 0xFFFF80000000008A
        assert gdb.evaluate(f'$vmcb("exit_code", {guest.state["vmcb"]:#x})') == gdb.evaluate("$exit_reason()") == 0x46
        assert gdb.evaluate("$gpa($rip)") == 0x10091
        gdb.execute('break *0x1000 if $vmcb("rip") == 1')
        assert 'vmcb("rip")' in gdb.execute("info breakpoints")
        gdb.execute("delete")
        assert "not mapped" in error(gdb, "print $gpa(0xffff800000006000)") or "present" in error(gdb, "print $gpa(0xffff800000006000)")


def test_commands_take_expressions(guest: Lab) -> None:
    with plugged(guest.port) as gdb:
        gdb.execute(f"set $where = {guest.state['vmcb']:#x}")
        assert body(gdb.execute("vmcb dump $where")).splitlines()[0] == f"VMCB at {guest.state['vmcb']:#x}"
        assert "no_such" in error(gdb, "vmcb dump no_such_symbol")
        assert "has no value" in error(gdb, "vmcb dump $no_such")
        assert "not 4 KiB aligned" in error(gdb, "vmcb dump $where+8")


def test_completion_and_help(guest: Lab) -> None:
    with plugged(guest.port) as gdb:
        assert gdb.execute("complete vmcb get exit_info_").split("\n")[:2] == ["vmcb get exit_info_1", "vmcb get exit_info_2"]
        assert "vmcb dump" in gdb.execute("complete vmcb d")
        assert "vmcs get GUEST_RIP" in gdb.execute("complete vmcs get GUEST_RI").split("\n")
        assert "vt vmcb" in gdb.execute("complete vt vm")
        assert "usage:" in gdb.execute("vmcs get --help")
        assert "Exit gdb" in gdb.execute("help exit") and "vt exit explain" in gdb.execute("vt exit")


def test_outside_ram_is_no_zeros(guest: Lab) -> None:
    """QEMU answers zeros for physical addresses that do not exist, even at 0x7fffffff000."""
    with plugged(guest.port) as gdb:
        gdb.execute("vt source info")
        for option in ("", " --no-fast"):
            assert "no RAM there" in error(gdb, "vmcb dump 0x7fffffff000" + option)


def test_a_session_of_our_own_leaves_the_machine_paused(guest: Lab) -> None:
    """`vtdbg -s gdb:` drives a gdb of its own and disconnects: gdb's own end would resume QEMU."""
    text = vtdbg("vmcb", "get", "rip", "-s", guest.source)
    assert "0xffff80000000008a" in text and "GUEST mode" in " ".join(text.split())
    assert not guest.running


def test_a_second_client_is_told(guest: Lab) -> None:
    """QEMU serves one debugger and never answers another."""
    with plugged(guest.port):
        text = vtdbg("vmcb", "list", "-s", guest.source, status=2)
        assert "is another one connected?" in text and text.count("\n") == 1


def test_interrupted_dump_puts_the_mode_back(guest: Lab) -> None:
    """Ctrl-C while `npt dump` reads through the stub: memory packets are virtual again and no register has changed."""
    with PressingWire(guest.port) as wire, plugged(wire.port) as gdb:
        before = gdb.execute("info registers")
        gdb.execute("vt source info")
        assert gdb._gdb is not None and gdb._gdb.gdb_process is not None
        pid = gdb._gdb.gdb_process.pid
        wire.press = lambda: os.kill(pid, signal.SIGINT)
        for number, late in ((1, True), (30, False), (100, True), (300, False)):
            wire.arm(number, late)
            try:
                text = gdb.execute("vmcb list --scan all --no-fast")
                assert "partial" in text, number
            except TargetError as stopped:
                assert re.search("interrupted|Quit|Interrupt", str(stopped)), (number, stopped)
            wire.disarm()
            assert wire.fired and '"0"' in gdb.execute(MODE), number
        assert gdb.execute("info registers") == before
    assert not guest.running


def test_a_connection_that_breaks_in_a_read_is_repaired(guest: Lab) -> None:
    """QEMU keeps physical mode over a disconnect: the next command after connecting again ends it, and says so."""
    with Wire(guest.port, after=b"$m", count=300) as wire, plugged(wire.port) as gdb:
        before = gdb.execute("info registers")
        line = error(gdb, "vmcb list --scan all --no-fast")
        assert "connection to the target is lost" in line
        assert "no target" in error(gdb, "vmcb list")
    with MiPort(f"127.0.0.1:{guest.port}") as plain:
        assert '"1"' in plain.execute(MODE)
        assert plain.execute("info registers") == before
    text = vtdbg("vmcb", "get", "rip", "-s", guest.source)
    assert "Qqemu.PhyMemMode:0" in text
    with MiPort(f"127.0.0.1:{guest.port}") as plain:
        plain.execute("maintenance packet Qqemu.PhyMemMode:0")


def test_a_gdb_that_loses_its_target_in_a_read_and_connects_again(guest: Lab) -> None:
    """The connection is cut while the plugin reads physical memory; in the same GDB, connected again, memory packets are virtual before anything
    else is typed, and registers and commands are as before."""
    dump = f"vmcb dump {guest.state['vmcb']:#x}"
    with Wire(guest.port, after=b"$m", count=1 << 20) as wire, plugged(wire.port) as gdb:
        registers, text = gdb.execute("info registers"), body(gdb.execute(dump))
        wire.count_down(300)
        for command in ("vmcb list --scan all --no-fast", "vt source info"):
            line = error(gdb, command)
            assert "connection to the target is lost" in line or "connect first" in line
        said = gdb.execute(f"target remote 127.0.0.1:{wire.port}")
        assert '"0"' in gdb.execute(MODE)
        said += gdb.execute("info registers")
        assert registers in said
        text_again = gdb.execute(dump)
        assert body(text_again) == text and "was left" not in text_again and "were physical before" not in text_again
        assert '"0"' in gdb.execute(MODE)
    assert not guest.running


# --- in the host -------------------------------------------------------------------------------------------------------------------


def test_host_mode_around_vmrun(host: Lab) -> None:
    """GDTR is the host's again, TR still the guest's until VMLOAD: it is not paired with the host's GDT."""
    with plugged(host.port) as gdb:
        text = " ".join(gdb.execute("vmcb get exit_code exit_info_2").split())
        assert "host mode (GDTR and IDTR are the host's, by the host save area" in text and "TR, LDTR, FS and GS are still those of the guest" in text
        assert "NPF" in text and "0x0000000000200000" in text
        assert "unknown" in gdb.execute("tss dump --cpu 1")
        assert gdb.evaluate("$exit_reason()") == 0x400


def test_injection_reads_what_the_kernel_read(host: Lab) -> None:
    """RDMSR of VM_HSAVE_PA gives what the kernel's /dev/cpu/0/msr gave, CPUID names AMD; registers and code are as they were."""
    with plugged(host.port) as gdb:
        gdb.execute("vt source info")
        before = gdb.registers(), gdb.read_virtual(host.state["rip"], 16)
        assert f"{host.truth('hsave'):#018x}" in gdb.execute("msr read 0xc0010117 --yes")
        assert "0x68747541" in gdb.execute("cpuid 0 --yes")
        assert (gdb.registers(), gdb.read_virtual(host.state["rip"], 16)) == before


def test_an_instruction_that_faults_is_undone(host: Lab) -> None:
    """VMREAD is #UD on this processor: RIP goes to the kernel's handler, a frame is pushed; everything is put back."""
    with plugged(host.port) as gdb:
        gdb.execute("vt source info")
        rsp = gdb.registers()["rsp"] or 0
        before = gdb.registers(), gdb.read_virtual(host.state["rip"], 16), gdb.read_virtual(rsp - 0x100, 0x200)
        assert "not in VMX root operation" in error(gdb, "vmcs dump --vmread --yes")
        assert (gdb.registers(), gdb.read_virtual(host.state["rip"], 16), gdb.read_virtual(rsp - 0x100, 0x200)) == before


def test_vmcb_by_register(host: Lab) -> None:
    """RAX at VMRUN is the VMCB's physical address."""
    with plugged(host.port) as gdb:
        assert f"VMCB at {host.state['vmcb']:#x}" in gdb.execute("vmcb get rip --at $rax")


def test_gdt_of_the_host(host: Lab, lab: Lab) -> None:
    """The host's GDT through the host's CR3: Linux' kernel code segment at selector 0x10 is 64-bit."""
    with plugged(host.port) as gdb:
        text = gdb.execute("gdt dump --cpu 1")
        row = next(line for line in text.splitlines() if re.search(r"\b0x0*10\b", line))
        assert "code" in row.lower(), text


def test_a_run_forgets_what_was_read(host: Lab) -> None:
    """One instruction later the header is made anew: VMCB values are read again, not remembered."""
    with plugged(host.port) as gdb:
        first = gdb.evaluate('$vmcb("exit_code")')
        address = host.state["vmcb"] + 0x70
        gdb.execute("maintenance packet Qqemu.PhyMemMode:1")
        gdb.execute(f"maintenance packet M{address:x},8:7200000000000000")
        gdb.execute("maintenance packet Qqemu.PhyMemMode:0")
        gdb.execute("stepi")
        assert (first, gdb.evaluate('$vmcb("exit_code")')) == (0x400, 0x72)
        assert gdb.evaluate("$exit_reason()") == 0x72
        gdb.execute("maintenance packet Qqemu.PhyMemMode:1")
        gdb.execute(f"maintenance packet M{address:x},8:0004000000000000")
        gdb.execute("maintenance packet Qqemu.PhyMemMode:0")


def test_offline_decode_of_the_live_page(host: Lab) -> None:
    """The VMCB as raw packets give it, decoded without vtdbg's memory code."""
    with plugged(host.port) as gdb:
        gdb.execute("maintenance packet Qqemu.PhyMemMode:1")
        page = b"".join(bytes.fromhex(gdb.packet(f"m{host.state['vmcb'] + at:x},400").decode()) for at in (0, 0x400))
        gdb.execute("maintenance packet Qqemu.PhyMemMode:0")
        assert gdb.evaluate('$vmcb("nested_cr3")') == Vmcb.from_page(page)["nested_cr3"]


# --- a machine without a hypervisor -----------------------------------------------------------------------------------------------


def test_process_memory_and_stub_agree(bare: BareQemu, tmp_path: Path) -> None:
    """RAM that is not a file is read from QEMU's process, verified; the bytes are those of the loader and of QEMU's dump."""
    dump = open_machine(bare.dump(tmp_path / "bare.elf"))
    with dump.memory, plugged(bare.port) as gdb:
        assert "RAM read from process" in " ".join(gdb.execute("vt source info").split())
        assert dump.memory.read(0x100000, 16) == bytes(range(16))
        fast, slow = (body(gdb.execute("phys 0x100000 --length 256" + option)) for option in ("", " --no-fast"))
        assert fast == slow and "0x0706050403020100" in fast
        # ROM between two pieces of one RAM is no RAM: the reset vector's jump is there, at both its places.
        for address in (0xFFFF0, 0xFFFFFFF0, 0xC0000):
            texts = {body(gdb.execute(f"phys {address:#x} 16xb{option}")) for option in ("", " --no-fast")}
            assert len(texts) == 1 and (address == 0xC0000 or "  0xea  " in texts.pop()), hex(address)
        assert '"0"' in gdb.execute(MODE)


FORMATS = (*(f"9{letter}{size}" for letter in "xzduotacf" for size in "bhwg"), "9a", "9c", "3s")


def test_formats_are_gdbs(bare: BareQemu) -> None:
    """`phys ADDR FMT` prints value for value what GDB's own `x/FMT` prints (paging is off: its addresses are physical), in both orders."""
    with plugged(bare.port, "set target-charset ASCII") as gdb:
        for number, wanted in enumerate(FORMATS):
            # Odd places and the boundary between 0xff and 0: signs, infinities, characters of all kinds, strings with an end.
            address = 0x100000 + 5 + 27 * (number % 9)
            if "s" in wanted:
                theirs = re.findall(r":\s(.*)", gdb.execute(f"x/{wanted} {address:#x}"))
                ours = re.findall(r"^0x\w+  (.*)", body(gdb.execute(f"phys {address:#x} {wanted}")), re.M)
            else:
                theirs = [words for line in gdb.execute(f"x/{wanted} {address:#x}").splitlines() for words in line.split("\t")[1:]]
                lines = [line[16:] for line in body(gdb.execute(f"phys /{wanted} {address:#x}")).splitlines()]
                ours = [words.strip() for line in lines for words in re.split(r"\s{2,}(?!')", line.strip())]
            assert ours == theirs and len(ours) >= 2, (wanted, hex(address))
        assert '"0"' in gdb.execute(MODE)


def test_a_page_that_holds_no_vmcb_decides_nothing(bare: BareQemu) -> None:
    """A processor after reset has GDTR and IDTR 0, as a page of zeros has where a VMCB has the guest's: that is nobody's guest."""
    with plugged(bare.port) as gdb:
        assert all(int(base, 16) == 0 for base in re.findall(r"^[GI]DT=\s+([0-9a-f]+)", gdb.execute("monitor info registers"), re.M))
        for option in ("", " --no-fast"):
            assert "host or guest is not known" in " ".join(gdb.execute(f"vmcb dump 0x2000{option}").split())
            assert "GUEST" not in gdb.execute(f"vt where{option}")


def test_no_control_block_is_no_claim(bare: BareQemu) -> None:
    with plugged(bare.port) as gdb:
        assert "host or guest is not known" in " ".join(gdb.execute("vt source info").split())
        assert "no VMCB found" in error(gdb, "vmcb dump")


def test_without_a_target(bare: BareQemu) -> None:
    with plugged(bare.port) as gdb:
        gdb.execute("disconnect")
        assert "connect first" in error(gdb, "vmcb list")
        assert "EPT_VIOLATION" in gdb.execute("vt exit explain --reason 48")


def test_nothing_listens() -> None:
    assert "nothing to connect to" in vtdbg("vmcb", "list", "-s", "gdb:127.0.0.1:1", status=2)
    assert "write gdb:HOST:PORT" in vtdbg("vmcb", "list", "-s", "gdb:nowhere", status=2)


def test_running_target(bare: BareQemu) -> None:
    """Last of these: the machine runs afterwards."""
    with plugged(bare.port) as gdb:
        gdb.execute("continue &")
        assert "stop it first" in error(gdb, "vmcb list")
        gdb.execute("interrupt")
