"""vtdbg in a real GDB on a live VMX target: a processor model with a small hypervisor behind a gdbstub.

Injection, layout learning, host or guest and the exit trace, with real VMREADs of that processor.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from support import gdbdocs
from support.live import PATIENCE, started
from support.livegdb import error, plugged, vtdbg
from support.ptygdb import PtyGdb
from support.vmxstub import EXITS, GUEST, GUEST_PML4, HANDLER, VMCS, VmxStub

import vtdbg as vtdbg_package
from vtdbg.commands.live import existing_msrs
from vtdbg.targets.gdbtext import error_of
from vtdbg.targets.inject import Injector
from vtdbg.targets.mi import MiPort
from vtdbg.targets.start import gdb_arguments, gdb_environment
from vtdbg.targets.writing import place_by_writing
from vtdbg.vmx.capabilities import VmxCapabilities
from vtdbg.vmx.layout_file import load_layout
from vtdbg.vmx.learn import learn, load_samples
from vtdbg.vmx.presence import to_ask
from vtdbg.vmx.vmcs import Vmcs

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def stub() -> Iterator[VmxStub]:
    with started("the VMX stub", VmxStub) as target:
        yield target


@pytest.fixture
def at_handler(stub: VmxStub) -> Iterator[MiPort]:
    """GDB with the plugin, the processor at the first instruction of the exit handler."""
    with plugged(stub.port) as gdb:
        gdb.execute(f"vmcs get GUEST_RIP --at {VMCS:#x}")
        assert gdb.run_to(HANDLER)
        yield gdb


def everything(gdb: MiPort) -> List[Any]:
    """All registers and the bytes around RIP and below RSP."""
    registers = gdb.registers()
    rip, rsp = registers["rip"] or 0, registers["rsp"] or 0
    return [registers, gdb.read_virtual(rip - 64, 256), gdb.read_virtual(rsp - 0x200, 0x200)]


def test_documented_sessions_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/gdb.md shows what GDB prints, from the first exit of a machine that has just been started."""
    monkeypatch.chdir(tmp_path)
    with VmxStub() as fresh, PtyGdb(f"target remote 127.0.0.1:{fresh.port}") as gdb:
        for line in (f"hbreak *{HANDLER:#x}", "continue", "delete", f"vmcs get GUEST_RIP --at {VMCS:#x}"):
            gdb.command(line)
        assert gdbdocs.check(gdb, "live, VMware at") >= 2


def test_host_mode_by_cr3(at_handler: MiPort) -> None:
    text = " ".join(at_handler.execute(f"vmcs get GUEST_RIP --at {VMCS:#x}").split())
    assert f"host mode (CR3 is the host's, by the VMCS at {VMCS:#x})" in text


def test_guest_mode_by_cr3(at_handler: MiPort) -> None:
    """Stepped into the guest, the live CR3 is GUEST_CR3; nothing may be injected there, and nothing is."""
    assert at_handler.run_to(GUEST + 2)
    assert at_handler.registers()["cr3"] == GUEST_PML4
    text = " ".join(at_handler.execute(f"vmcs get GUEST_CR3 --at {VMCS:#x}").split())
    assert f"GUEST mode (CR3 is that of the guest of the VMCS at {VMCS:#x}); control blocks are as of the last exit" in text
    before = everything(at_handler)
    assert "in the host only" in error(at_handler, f"vmcs dump {VMCS:#x} --vmread --yes")
    assert "in the host only" in error(at_handler, "cpuid 0 --yes")
    assert everything(at_handler) == before


def test_vmread_gives_what_the_page_holds(at_handler: MiPort, stub: VmxStub) -> None:
    """Every field that the processor's VMREAD gives is what its page holds where the processor's VMWRITE put it; all is as it was."""
    before = everything(at_handler)
    at_handler.execute("monitor phys")
    page = at_handler.read_virtual(VMCS, 4096)
    at_handler.execute("monitor virt")
    text = at_handler.execute(f"vmcs dump {VMCS:#x} --vmread --yes --json")
    report = json.loads(text[text.index("{"):])
    rows = {row["name"]: int(row["value"], 16) for row in report["vmcs"][0]["fields"]}
    offline = Vmcs.from_page(page, "bochs_2.8")
    compared = 0
    for item in offline.values():
        if item.field.name in rows and item.field.encoding in stub.layout:
            assert rows[item.field.name] == item.value, item.field.name
            compared += 1
    assert compared > 80
    assert rows["VM_EXIT_REASON"] in EXITS
    assert everything(at_handler) == before


def test_fields_that_the_processor_lacks_are_not_asked_for(stub: VmxStub) -> None:
    """Those that its capability MSRs say it lacks are those whose VMREAD fails, all of them; without asking them the VM-instruction error stays."""
    with MiPort(f"127.0.0.1:{stub.port}") as gdb:
        assert gdb.run_to(HANDLER)
        with Injector(gdb, lambda: None) as target:
            caps = VmxCapabilities.from_msrs(dict(existing_msrs(target.rdmsr)))
            asked = to_ask(caps)
            assert target.vmreads(asked).refused == ()
            everything = target.vmreads(to_ask(None))
            assert set(everything.refused) == set(to_ask(None)) - set(asked) and len(everything.refused) > 40
            assert set(everything.values) == set(asked)


def test_the_instruction_error_survives(at_handler: MiPort) -> None:
    text = " ".join(at_handler.execute(f"vmcs dump {VMCS:#x} --vmread --yes --group exit").split())
    assert "were not asked for: by its capability MSRs this processor lacks them" in text and "error to 12" not in text
    assert "error to 12" not in " ".join(at_handler.execute(f"vmcs dump {VMCS:#x} --vmread --yes --no-patch --caps bochscpu --group exit").split())


def test_vmread_that_stands_in_the_code(at_handler: MiPort) -> None:
    """--no-patch: no byte of code is written, a VMREAD of the handler itself is used."""
    before = everything(at_handler)
    patched, found = (at_handler.execute(f"vmcs dump {VMCS:#x} --vmread --yes {option} --group host") for option in ("", "--no-patch"))
    values = [dict(re.findall(r"^(HOST_\w+)\s+(0x[0-9a-f]+)", text, re.M)) for text in (patched, found)]
    assert values[0] == values[1] and values[0]["HOST_RIP"] == f"{HANDLER:#018x}"
    assert everything(at_handler) == before


def test_it_asks_before_it_changes_anything(at_handler: MiPort) -> None:
    before = everything(at_handler)
    for command in (f"vmcs dump {VMCS:#x} --vmread", "cpuid 0", "msr read 0x480", "sgdt"):
        assert "--yes" in error(at_handler, command)
    assert everything(at_handler) == before


def test_cpuid_msr_and_sgdt(at_handler: MiPort) -> None:
    """GenuineIntel, the revision identifier that the VMCS page begins with, and the task register that the host state has."""
    before = everything(at_handler)
    assert "0x756e6547" in at_handler.execute("cpuid 0 --yes")
    assert "REVISION=0x2b" in at_handler.execute("msr read IA32_VMX_BASIC --yes")
    assert "0x0020" in at_handler.execute("sgdt --yes")
    assert everything(at_handler) == before


def test_an_outer_frame_is_the_users_own(at_handler: MiPort) -> None:
    """In `frame 1` GDB's registers are what it takes for the caller's, and `set $rip` writes to the stack: what is shown and changed is the
    processor's, and the frame stays selected."""
    before = everything(at_handler)
    at_handler.execute("frame 1")
    assert at_handler.registers()["rip"] != HANDLER
    row = json.loads(at_handler.execute("vt where --json"))["processors"][0]
    assert int(row["rip"], 16) == HANDLER
    assert "0x756e6547" in at_handler.execute("cpuid 0 --yes")
    assert "level 1" in at_handler.execute("info frame")
    at_handler.execute("frame 0")
    assert everything(at_handler) == before


def test_checks_with_the_capabilities_of_the_live_processor(at_handler: MiPort) -> None:
    """RDMSR of the processor decides what is undecided without it; the VMCS of a guest that runs passes; the target is as it was."""
    before = everything(at_handler)
    without = at_handler.execute(f"vmcs check {VMCS:#x}")
    assert "without IA32_VMX_PROCBASED_CTLS2" in " ".join(without.split())
    text = " ".join(at_handler.execute(f"vmcs check {VMCS:#x} --rdmsr --yes").split())
    assert "capabilities: RDMSR and CPUID of the live processor" in text
    assert "controls.sec.allowed" not in text and "Failures" not in text
    assert everything(at_handler) == before


def test_instructions_are_gdbs(at_handler: MiPort) -> None:
    """The exit handler, where paging maps every address to itself: addresses and mnemonics are those of GDB's disassembler."""
    at_handler.execute("set disassembly-flavor intel")
    theirs = re.findall(r"^\s*(?:=> )?(0x\w+):\s+(\w+)", at_handler.execute(f"x/14i {HANDLER:#x}"), re.M)
    text = at_handler.execute(f"phys {HANDLER:#x} 14i")
    ours = [(f"{int(at, 16):#x}", name) for at, name in re.findall(r"^(0x\w+)  (?:[0-9a-f]{2} )+ *(\w+)", text, re.M)]
    assert ours == theirs and len(ours) == 14 and "vmread" in text and "not known" not in text


def test_code_of_the_guest(at_handler: MiPort) -> None:
    """`phys --guest` with i: through EPT, in the guest's mode as its VMCS has it."""
    text = at_handler.execute(f"phys {GUEST:#x} 2i --guest")
    assert re.findall(r"  (xor eax, eax|cpuid)$", text, re.M) == ["xor eax, eax", "cpuid"] and "not known" not in text
    assert '"behind EPT 0x400000"' in at_handler.execute("phys 0x400000 s --guest")


class Interrupted(MiPort):
    """Ctrl-C arrives at the `at`-th command to gdb, before or after gdb has executed it."""

    at, seen, late = -1, 0, False

    def _ask(self, command: str, patience: Any = None) -> List[Dict[str, Any]]:
        self.seen += 1
        if self.seen == self.at and not self.late:
            raise KeyboardInterrupt
        answer = super()._ask(command, patience)
        if self.seen == self.at:
            raise KeyboardInterrupt
        return answer


def interrupted_at_every_step(stub: VmxStub, late: bool, inject: "Callable[[Injector, Interrupted], None]",
                              state: "Callable[[Interrupted], object]") -> int:
    """Ctrl-C at each of the commands that `inject` consists of, until there is none left: `state` is the same each time.  How many there were."""
    with Interrupted(f"127.0.0.1:{stub.port}") as gdb:
        assert gdb.run_to(HANDLER)
        before = state(gdb)
        gdb.late = late
        for number in range(1, 200):
            gdb.at, gdb.seen = number, 0
            completed = False
            try:
                with Injector(gdb, lambda: None) as target:
                    inject(target, gdb)
                    completed = True
            except KeyboardInterrupt:
                pass
            interrupted, gdb.at = gdb.seen >= number, -1
            assert state(gdb) == before, number
            if completed and not interrupted:
                return number
    pytest.fail("the injection never completed")


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_at_every_step_leaves_the_target_as_it_was(stub: VmxStub, late: bool) -> None:
    """Ctrl-C at each of the commands that an injected VMREAD consists of: all registers, code and stack bytes are the same afterwards."""
    def read(target: Injector, _: Interrupted) -> None:
        assert target.vmreads([0x681E]).values[0x681E] >= GUEST

    assert interrupted_at_every_step(stub, late, read, everything) > 40


def test_layout_is_learnt(at_handler: MiPort, stub: VmxStub, tmp_path: Path) -> None:
    """Every field of the processor gets its place: those that the page proves are where the processor's own VMWRITE writes, and so are those of the
    known layout that explains every value; the file is a layout that decodes the page."""
    path = tmp_path / "learnt.json"
    text = at_handler.execute(f"vmcs layout learn {VMCS:#x} --yes --out {path}")
    words = " ".join(text.split())
    assert "144 of 144 read" in words and re.search(r"known layout bochs_2\.8\b.*: every one of \d+ different values", words)
    learnt = load_layout(path)
    assert len(learnt.fields) == 144
    for encoding, place in learnt.fields.items():
        assert place.offset == stub.layout[encoding], hex(encoding)
    assert "GUEST_CR3" in at_handler.execute(f"vmcs get GUEST_CR3 --at {VMCS:#x} --layout {path}")


def test_stops_are_merged(at_handler: MiPort, stub: VmxStub, tmp_path: Path) -> None:
    """What the pages prove without any known layout is true, and grows from stop to stop; --merge takes what earlier files have seen."""
    found, merge = [], ""
    while at_handler.evaluate("$exit_reason()") != EXITS[0]:
        # The page of a CPUID exit proves the fewest places: the next ones have more to tell.
        assert at_handler.run_to(HANDLER)
    for number in range(3):
        path = tmp_path / f"stop{number}.json"
        at_handler.execute(f"vmcs layout learn {VMCS:#x} --yes --out {path} {merge}")
        merge = f"--merge {path}"
        samples = load_samples(str(path))
        assert len(samples) == number + 1
        alone = learn(samples, known={})
        assert alone.known == () and alone.from_known == ()
        for encoding, place in alone.layout.fields.items():
            assert place.offset == stub.layout[encoding], hex(encoding)
        found.append(len(alone.layout.fields))
        assert {place.status for place in alone.open} <= {"ambiguous", "silent", "conflict"}
        assert at_handler.run_to(HANDLER)
    assert found == sorted(found) and found[-1] > found[0] >= 18, found
    assert "has no samples" in error(at_handler, f"vmcs layout learn {VMCS:#x} --yes --merge {_without_samples(path, tmp_path)}")
    assert "cannot be read" in error(at_handler, f"vmcs layout learn {VMCS:#x} --yes --merge {tmp_path}/nothing")


def vmcs_page(gdb: MiPort) -> bytes:
    gdb.execute("monitor phys")
    try:
        return gdb.read_virtual(VMCS, 4096)
    finally:
        gdb.execute("monitor virt")


def test_fields_are_placed_by_writing(at_handler: MiPort, stub: VmxStub, tmp_path: Path) -> None:
    """Without any known layout every writable field is where the processor's own VMWRITE writes, 0 or not; page, registers and code are the same
    to the byte afterwards."""
    before, page = everything(at_handler), vmcs_page(at_handler)
    path = tmp_path / "written.json"
    text = " ".join(at_handler.execute(f"vmcs layout learn {VMCS:#x} --yes --by-writing --out {path}").split())
    assert (everything(at_handler), vmcs_page(at_handler)) == (before, page)
    count = re.search(r"by writing (\d+)", text)
    assert count is not None and int(count.group(1)) == sum(encoding >> 10 & 3 != 1 for encoding in load_layout(path).fields)
    with Injector(at_handler, lambda: None) as target:
        values = target.vmreads(sorted(load_layout(path).fields)).values

        def page_now() -> bytes:
            return vmcs_page(at_handler)

        found = place_by_writing(target, values, page_now)
    assert found.elsewhere == () and found.form == "rotated" and len(found.places) > 120
    assert {encoding: place.offset for encoding, place in found.places.items()} == {encoding: stub.layout[encoding] for encoding in found.places}
    assert (everything(at_handler), vmcs_page(at_handler)) == (before, page)
    alone = learn(load_samples(str(path)), known={}, written=found.places, form=found.form)
    assert len(alone.layout.fields) > 124 and all(place.offset == stub.layout[encoding] for encoding, place in alone.layout.fields.items())
    assert "--no-patch does not allow" in error(at_handler, f"vmcs layout learn {VMCS:#x} --yes --by-writing --no-patch")


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_at_every_step_of_writing_leaves_the_vmcs_as_it_was(stub: VmxStub, late: bool) -> None:
    """Ctrl-C at each command while one field is changed, looked for and put back: the same page, registers and code."""
    def write(target: Injector, gdb: Interrupted) -> None:
        assert place_by_writing(target, {0x6C16: HANDLER}, lambda: vmcs_page(gdb)).places[0x6C16].offset == stub.layout[0x6C16]

    def state(gdb: Interrupted) -> object:
        gdb.execute("monitor virt")
        return everything(gdb), vmcs_page(gdb)

    assert interrupted_at_every_step(stub, late, write, state) > 60


def _without_samples(path: Path, folder: Path) -> Path:
    content = json.loads(path.read_text())
    del content["samples"]
    (folder / "bare.json").write_text(json.dumps(content))
    return folder / "bare.json"


def test_functions_in_a_breakpoints_condition(at_handler: MiPort, stub: VmxStub) -> None:
    """GDB goes on until the exit is the wanted one, by the processor's own VMCS: five exits in a loop, each of them found, though GDB says of a
    target whose condition it looks at that it runs."""
    for wanted in (12, 18, 48, 31, 10, 10):
        at_handler.execute(f"hbreak *{HANDLER:#x} if $exit_reason() == {wanted}")
        at_handler.execute("continue")
        assert at_handler.registers()["rip"] == HANDLER
        place = stub.layout[0x4402]
        assert int.from_bytes(vmcs_page(at_handler)[place:place + 2], "little") == wanted == at_handler.evaluate("$exit_reason()")
        at_handler.execute("delete")
    at_handler.execute(f'hbreak *{HANDLER:#x} if $vmcs("GUEST_RIP", {VMCS:#x}) == {GUEST + 4:#x} && $exit_reason() == 18')
    at_handler.execute("continue")
    assert at_handler.evaluate('$vmcs("GUEST_RIP")') == GUEST + 4
    at_handler.execute("delete")


def test_exit_trace(at_handler: MiPort) -> None:
    """The guest's loop exits for CPUID, VMCALL, RDMSR, an EPT violation and HLT, in this order for ever; the breakpoint is gone afterwards."""
    text = at_handler.execute(f"vt exit trace {HANDLER:#x} --count 10 --vmcs {VMCS:#x} --json")
    report = json.loads(text[text.index("{"):])
    codes = [int(row["code"]) for row in report["exits"]]
    start = EXITS.index(codes[0])
    assert codes == [EXITS[(start + number) % 5] for number in range(10)]
    assert {row["what"]: row["count"] for row in report["accesses"]} == {"MSR 0x10 read": "2"}
    assert "No breakpoints" in at_handler.execute("info breakpoints")
    assert at_handler.registers()["rip"] == HANDLER


def test_exit_trace_stops_at_a_breakpoint_of_the_user(at_handler: MiPort) -> None:
    at_handler.execute(f"hbreak *{GUEST + 2:#x}")
    text = at_handler.execute(f"vt exit trace {HANDLER:#x} --count 50 --vmcs {VMCS:#x}")
    assert "the target stopped elsewhere" in " ".join(text.split())
    assert at_handler.execute("info breakpoints").count("hw breakpoint") == 1
    at_handler.execute("delete")


def test_through_ept(at_handler: MiPort) -> None:
    """The hypervisor's EPT maps guest-physical 4 MiB to 6 MiB; what stands there is found through the functions too."""
    assert at_handler.evaluate("$hpa(0x400010)") == 0x600010
    assert at_handler.evaluate("$hpa($gpa(0x400010))") == 0x600010
    assert at_handler.evaluate("$exit_reason()") in EXITS
    assert "behind EPT 0x400" in at_handler.execute("phys 0x400000 --guest --length 32")
    assert "not present" in error(at_handler, "phys 0x800000 --guest")
    assert "not present" in error(at_handler, "print $hpa(0x800000)")


def test_expressions_in_a_session_of_our_own(stub: VmxStub) -> None:
    """`vtdbg -s gdb:` takes what GDB understands wherever an address is wanted; one line where that has no value."""
    source = f"gdb:127.0.0.1:{stub.port}"
    with MiPort(source[4:]) as gdb:
        rip = gdb.registers()["rip"]
    assert f"{rip:#014x}" in vtdbg("phys", "$rip", "2xb", "-s", source)
    assert f"VMCS at {VMCS:#x}" in vtdbg("vmcs", "get", "HOST_RIP", "--at", f"{VMCS - 0x1000:#x}+0x1000", "-s", source)
    for text, said in (("no_such_symbol", "no_such_symbol"), ("$nothing", "$nothing"), ("1/0", "1/0")):
        for words in (("phys", text), ("vmcs", "dump", text)):
            line = vtdbg(*words, "-s", source, status=2)
            assert said in line and line.count("\n") == 1, line
    assert "is not a number" in vtdbg("phys", "$rip", "-s", "sample:svm", status=2)


def test_an_expression_that_reads_memory_in_a_guest(at_handler: MiPort, stub: VmxStub) -> None:
    """GDB reads through the guest's CR3 then, without an error: that is said, in the plugin and outside; not of registers, and not in the host."""
    said, memory = "through the page tables of the guest", f"*(unsigned long *){GUEST:#x} & 0xfff"
    assert said not in " ".join(at_handler.execute(f"phys '{memory}' 1x").split())
    assert at_handler.run_to(GUEST + 2)
    at_handler.execute(f"vmcs get GUEST_RIP --at {VMCS:#x}")
    assert said in " ".join(at_handler.execute(f"phys '{memory}' 1x").split())
    for other in ("$rip", "$rax * 0 + 4096", "0x1000"):
        assert said not in " ".join(at_handler.execute(f"phys '{other}' 1x").split()), other
    assert at_handler.run_to(HANDLER)
    assert at_handler.reads_memory(memory) and not at_handler.reads_memory("(unsigned long *)$rax") and not at_handler.reads_memory("$rax*2")


def test_a_session_of_our_own(stub: VmxStub) -> None:
    text = vtdbg("vmcs", "dump", hex(VMCS), "--vmread", "--yes", "--group", "host", "-s", f"gdb:127.0.0.1:{stub.port}", status=None)
    assert "HOST_RIP" in text or "in the host only" in text


def test_open_takes_a_live_target(stub: VmxStub) -> None:
    """vtdbg.open("gdb:HOST:PORT") is a machine like any other; closing it lets go and leaves the target where it was."""
    machine = vtdbg_package.open(f"gdb:127.0.0.1:{stub.port}")
    with machine.memory:
        assert machine.live and machine.format == "live"
        page = machine.memory.read_page(VMCS)
        assert vtdbg_package.Vmcs.from_page(page, "bochs_2.8")["HOST_RIP"] == HANDLER
        assert "VMware at 127.0.0.1" in machine.provenance
        rip = machine.port.registers()["rip"]  # type: ignore[attr-defined]
    with MiPort(f"127.0.0.1:{stub.port}") as gdb:
        assert gdb.registers()["rip"] == rip


def test_the_python_that_is_printed_reads_the_same(stub: VmxStub) -> None:
    """--python of a live source is `vtdbg.open`, or what takes the options that were given."""
    source = f"gdb:127.0.0.1:{stub.port}"
    with MiPort(source[4:]) as gdb:
        page = vmcs_page(gdb)
    for options, opened in (((), f"machine = vtdbg.open({source!r})"),
                            (("--no-fast", "--thread", "1"), f"machine = connect({source!r}, fast=False, thread=1)")):
        script = vtdbg("phys", hex(VMCS), "--length", "64", "--python", "-s", source, *options)
        assert opened in script.splitlines()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.stdout.strip(), done.stderr) == (page[:64].hex(), "")


def test_open_says_what_is_wrong_with_a_live_source() -> None:
    for source, options, said in (("gdb:127.0.0.1:1", {}, "nothing to connect to"), ("gdb:nowhere", {}, "write gdb:HOST:PORT"),
                                  ("gdb:127.0.0.1:1", {"format": "raw"}, "is for dump files"), ("sample:nothing", {}, "unknown sample")):
        with pytest.raises(vtdbg_package.VtdbgError) as raised:
            vtdbg_package.open(source, **options)
        assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_stub_without_physical_reads_says_what_is_impossible() -> None:
    """Bochs' own stub is such a one: no control registers, no monitor, no physical mode."""
    with VmxStub("plain") as plain, plugged(plain.port) as gdb:
        line = error(gdb, f"vmcs dump {VMCS:#x}")
        assert "cannot read physical memory" in line and "PhyMemMode" in line and "monitor phys" in line
        assert "host or guest is not known" in " ".join(gdb.execute("vt source info").split())


def test_wrong_architecture_is_recognised() -> None:
    """A stub that does not describe its registers, and a GDB that takes it for 32-bit: the fix that is printed works."""
    with VmxStub("plain") as plain:
        connect = f"target remote 127.0.0.1:{plain.port}"
        commands = ["set architecture i386", connect, "vmcs list", "set architecture i386:x86-64", connect, "vt source info", "disconnect"]
        line = gdb_arguments(["-q", "-nx", "-batch", *(word for command in commands for word in ("-ex", command))])
        done = subprocess.run(line, env=gdb_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert "'g' packet" in done.stderr
        assert "vt: GDB has no target" in done.stderr and "set architecture i386:x86-64" in done.stderr
        assert "a stub without physical reads" in " ".join(done.stdout.split())
    assert "set architecture i386:x86-64" in str(error_of("Remote 'g' packet reply is too long (expected 560 bytes, got 608 bytes): 00", "here:1"))
