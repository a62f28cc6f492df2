"""KVM's own objects through a debugger's symbols, and several processors, each decided by itself.

A real KVM on two processors under QEMU (smp.c: two VMs, one of which runs a guest of its own), in a real GDB with the plugin and through a gdb of our
own.  Compared with RAX at VMRUN, the kernel's MSRs and process numbers, bpftool's reading of BTF, QMP and GDB's own reads.
KVM's Intel objects stand in the memory of a processor model with VMX, where gcc and ld put them.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from lab_amd import Smp
from support import gdbdocs
from support.live import PATIENCE, Unavailable, had, started
from support.livegdb import body, error, plugged, vtdbg
from support.ptygdb import PtyGdb
from support.vmxstub import GUEST, GUEST_PML4, HANDLER, VMCS, VmxStub
from support.work import processor_time

from vtdbg.errors import FormatError
from vtdbg.linux.btf import Btf
from vtdbg.linux.dwarf import unit
from vtdbg.linux.symbols import STRUCTURES, btf_of
from vtdbg.targets.live import LiveMachine
from vtdbg.targets.mi import MiPort
from vtdbg.targets.start import gdb_arguments, gdb_environment
from vtdbg.targets.stub import of_processor
from vtdbg.targets.where import Block, decide

pytestmark = pytest.mark.live

OBJECTS = Path(__file__).parent / "support" / "kvm_objects.c"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smp]:
    with started("the AMD lab", lambda: Smp(tmp_path_factory.mktemp("smp"))) as machine:
        yield machine.advance("one")


@pytest.fixture(scope="module")
def vmlinux(lab: Smp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What /sys/kernel/btf/vmlinux of the kernel is."""
    path = tmp_path_factory.mktemp("btf") / "vmlinux"
    path.write_bytes(btf_of(str(lab.files.kernel)))
    return path


@pytest.fixture(scope="module")
def symbols(lab: Smp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kvm symbols` makes of the kernel's BTF and of its /proc/kallsyms."""
    folder = tmp_path_factory.mktemp("symbols")
    (folder / "kallsyms").write_text(lab.kallsyms())
    text = vtdbg("kvm", "symbols", str(lab.files.kernel), *(str(lab.files.modules / name) for name in ("kvm.ko", "kvm-amd.ko", "kvm-intel.ko")),
                 "--kallsyms", str(folder / "kallsyms"), "--out", str(folder / "kvm.debug"))
    assert "add-symbol-file" in text and "vtdbg needs them" not in text
    return folder / "kvm.debug"


@pytest.fixture
def one(lab: Smp) -> Smp:
    """Processor 2 in vCPU 1 of VM A, processor 1 in the host."""
    return lab.advance("one")


@pytest.fixture
def both(lab: Smp) -> Smp:
    """Both processors in VM A."""
    return lab.advance("both")


@pytest.fixture
def nested(lab: Smp) -> Smp:
    """Processor 1 in VM A, processor 2 in the guest of VM B's guest."""
    return lab.advance("nested")


def with_symbols(lab: Smp, symbols: Path) -> Any:
    return plugged(lab.port, "set width 150", f"add-symbol-file {symbols}")


def rows(text: str) -> Dict[int, Dict[str, Any]]:
    """The rows of `where --json` by processor."""
    return {row["thread"]["number"]: row for row in json.loads(text[text.index("{"):])["processors"]}


def head(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


# --- types -----------------------------------------------------------------------------------------------------------------------


def members(types: Dict[int, Dict[str, Any]], structure: Dict[str, Any]) -> Iterator[Tuple[str, int]]:
    """(name, byte) of the members that have an address, as bpftool reads them."""
    for member in structure["members"]:
        if member["name"] != "(anon)" and not member.get("bitfield_size"):
            yield member["name"], member["bits_offset"] // 8


def bpftool_path() -> str:
    found = shutil.which("bpftool") or shutil.which("bpftool", path="/usr/sbin:/sbin")
    if found is None:
        raise Unavailable("apt-get install bpftool")
    return found


def test_types_in_gdb_are_the_kernels(lab: Smp, symbols: Path, vmlinux: Path) -> None:
    """Every member of KVM's structures is in GDB where bpftool, which is the kernel's own reader of BTF, says that it is; sizes too."""
    bpftool = had("bpftool", bpftool_path)
    compared = 0
    with MiPort(f"127.0.0.1:{lab.port}") as gdb:
        gdb.load_symbols(str(symbols))
        for name in ("kvm", "kvm-amd", "kvm-intel"):
            command = [bpftool, "-j", "btf", "dump", "-B", str(vmlinux), "file", str(lab.files.modules / f"{name}.ko")]
            dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            types = {item["id"]: item for item in json.loads(dumped)["types"]}
            for item in types.values():
                if item["kind"] != "STRUCT" or item["name"] not in STRUCTURES:
                    continue
                assert gdb.evaluate(f"sizeof(struct {item['name']})") == item["size"], item["name"]
                for member, offset in members(types, item):
                    assert gdb.evaluate(f"&((struct {item['name']} *)0)->{member}") == offset, (item["name"], member)
                    compared += 1
    assert compared > 250


def test_btf_agrees_with_what_gdb_reads(lab: Smp, symbols: Path, vmlinux: Path) -> None:
    """Our own reading of a path through members gives what GDB gives for the DWARF that was made of it."""
    base = Btf(btf_of(str(vmlinux)), None, "vmlinux")
    amd = Btf(btf_of(str(lab.files.modules / "kvm-amd.ko")), base, "kvm_amd")
    with MiPort(f"127.0.0.1:{lab.port}") as gdb:
        gdb.load_symbols(str(symbols))
        for member in ("vmcb01.pa", "current_vmcb", "nested.vmcb02.ptr", "nested.vmcb12_gpa", "vcpu.vcpu_id", "vcpu.arch.apic"):
            assert gdb.evaluate(f"&((struct vcpu_svm *)0)->{member}") == amd.offset("vcpu_svm", member), member
    assert amd.offset("vcpu_svm", "no_such") is None and amd.offset("no_such", "x") is None


def symbols_error(folder: Path, btf: bytes, kallsyms: bytes, *more: str) -> str:
    """The one line that `kvm symbols` fails with."""
    (folder / "btf").write_bytes(btf)
    (folder / "kallsyms").write_bytes(kallsyms)
    text = vtdbg("kvm", "symbols", str(folder / "btf"), "--kallsyms", str(folder / "kallsyms"), "--out", str(folder / "out"), *more, status=2)
    assert text.count("\n") == 1 and "Traceback" not in text and not (folder / "out").exists()
    return text


def test_files_that_are_no_btf_or_no_kallsyms(vmlinux: Path, tmp_path: Path) -> None:
    """Each kind of wrong file is one line that says what it is instead or what to do."""
    good, names = vmlinux.read_bytes(), b"ffffffff81000000 T start_kernel\n"
    assert "all its addresses are 0: read /proc/kallsyms as root" in symbols_error(tmp_path, good, b"0000000000000000 T start_kernel\n")
    assert "no line of it is one of /proc/kallsyms" in symbols_error(tmp_path, good, b"nothing\n")
    assert "neither BTF nor an ELF file" in symbols_error(tmp_path, b"nothing", names)
    assert "the BTF is cut" in symbols_error(tmp_path, good[:100000], names)
    assert "it has no .BTF" in symbols_error(tmp_path, Path("/bin/true").read_bytes(), names)
    assert "compressed with zstd" in symbols_error(tmp_path, b"\x28\xb5\x2f\xfd" + bytes(100), names)
    assert "no structure is called 'nonesuch'" in symbols_error(tmp_path, good, names, "--type", "nonesuch")
    assert "give --kallsyms" in vtdbg("kvm", "symbols", str(vmlinux), status=2)


def test_damaged_btf_is_an_error_or_a_file(lab: Smp, vmlinux: Path) -> None:
    """Random bytes anywhere in a module's BTF: types that refer to themselves or to nothing end in one of our errors, in bounded time."""
    base = Btf(vmlinux.read_bytes(), None, "vmlinux")
    good = btf_of(str(lab.files.modules / "kvm-amd.ko"))
    outcomes = set()
    for seed in range(24):
        chance, data = random.Random(seed), bytearray(good)
        for _ in range(chance.choice((1, 4, 40, 1000))):
            data[chance.randrange(24, len(data))] = chance.randrange(256)
        try:
            with processor_time(60):
                damaged = Btf(bytes(data), base, "damaged")
                damaged.offset("vcpu_svm", "nested.vmcb02.pa")
                outcomes.add("file" if unit(damaged, STRUCTURES, {"svm_data": 1}) else "nothing")
        except FormatError:
            outcomes.add("error")
    assert outcomes == {"file", "error"}


# --- one processor in a guest, one in the host ----------------------------------------------------------------------------------------


def test_each_processor_is_decided_by_itself(one: Smp) -> None:
    """Thread 1 idles in the host, thread 2 is in a guest: `vt where` says so of each, and the selected thread is as it was."""
    with plugged(one.port) as gdb:
        for selected in (1, 2, 1):
            gdb.execute(f"thread {selected}")
            found = rows(gdb.execute("vt where --json"))
            assert [found[number]["mode"] for number in (1, 2)] == ["host", "GUEST"]
            assert int(found[2]["block"], 16) == one.state["vmcb"]["a1"]
            assert [int(found[number]["rip"], 16) for number in (1, 2)] == [one.state["rip"]["1"], one.state["rip"]["2"]]
            assert [found[number]["thread"]["selected"] for number in (1, 2)] == [selected == 1, selected == 2]
            assert gdb.execute("output $_thread") == str(selected)


def test_gdb_ends_as_it_should(one: Smp, symbols: Path) -> None:
    """Connected, asked, disconnected, ended: no crash, nothing on the error stream but GDB's own warning, and the machine is still paused."""
    commands = [f"target remote 127.0.0.1:{one.port}", f"add-symbol-file {symbols}", "vt where", "thread apply all -q vmcb get rip", "disconnect"]
    line = gdb_arguments(["-q", "-nx", "-batch", *(word for command in commands for word in ("-ex", command))])
    done = subprocess.run(line, env=gdb_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr
    assert done.stdout.count("current is the VMCB") == 3 and "1*" in done.stdout
    assert not one.running


def test_headers_and_functions_follow_the_thread(one: Smp) -> None:
    with plugged(one.port, "set width 150") as gdb:
        for _ in range(2):
            gdb.execute("thread 1")
            assert "processor 1: host mode" in head(gdb.execute("vmcb get rip --at " + hex(one.state["vmcb"]["a0"])))
            gdb.execute("thread 2")
            text = gdb.execute("vmcb get rip --at " + hex(one.state["vmcb"]["a0"]))
            assert f"processor 2: GUEST mode (GDTR and IDTR are those of the guest of the VMCB at {one.state['vmcb']['a1']:#x}" in head(text)
            assert gdb.evaluate('$vmcb("rip")') & ~0xFF == one.truth("a1_loop") & ~0xFF
        answers = gdb.execute('thread apply 1 2 -q print/x $vmcb("rip")')
        values = [int(value, 16) for value in re.findall(r"= (0x[0-9a-f]+)", answers)]
        assert [value & ~0xFF for value in values] == [one.truth(name) & ~0xFF for name in ("a0_loop", "a1_loop")]


def test_the_selected_frame_is_kept(one: Smp) -> None:
    """Looking from the other processor selects its thread and puts thread and frame back."""
    with plugged(one.port) as gdb:
        gdb.execute("thread 1")
        gdb.execute("frame 1")
        before = gdb.execute("info frame")
        gdb.execute("vt where")
        assert "level 1" in gdb.execute("info frame").lower() and gdb.execute("info frame") == before


def test_registers_are_those_of_the_processor(one: Smp) -> None:
    """QEMU's monitor shows its first processor whichever thread is selected; each thread gets the tables that QMP shows for its own."""
    text = one.qmp("human-monitor-command", **{"command-line": "info registers -a"})
    parts = re.split(r"CPU#(\d)", text)
    with plugged(one.port) as gdb:
        for thread, section in ((1, parts[2]), (2, parts[4])):
            gdb.execute(f"thread {thread}")
            wanted = {name: int(value, 16) for name, value in re.findall(r"^([GI]DT)=\s+([0-9a-f]+)", section, re.M)}
            found = json.loads(re.sub(r"(?s)^.*?\{", "{", gdb.execute("vt source info --json"), count=1))
            live = of_processor(text, gdb.registers())
            assert (live["gdtr_base"], live["idtr_base"]) == (wanted["GDT"], wanted["IDT"])
            saved = {row["register"]: int(row["value"], 16) for row in found["cpus"]}
            assert saved["gdtr_base"] >> 47, "the host's, also of the processor in the guest"
    assert [int(value, 16) >> 47 > 0 for value in re.findall(r"^GDT=\s+([0-9a-f]+)", text, re.M)] == [True, False]


def test_host_registers_of_each_are_its_own(one: Smp, symbols: Path) -> None:
    """The host's GDT is another one on each processor; the save area is the one whose address the kernel read from VM_HSAVE_PA there."""
    with with_symbols(one, symbols) as gdb:
        bases = []
        for thread in (1, 2):
            gdb.execute(f"thread {thread}")
            text = gdb.execute("vt source info --json")
            cpus = json.loads(text[text.index("{"):])["cpus"]
            bases.append(next(row["value"] for row in cpus if row["register"] == "gdtr_base"))
            assert any(f"{one.truth(f'hsave{thread - 1}'):#x}" in row["source"] for row in cpus) or thread == 1
            assert "code" in gdb.execute(f"gdt dump --cpu {thread}").lower()
        assert bases[0] != bases[1]
        text = gdb.execute("kvm list --json")
        areas = {row["cpu"]: int(row["save_area"], 16) for row in json.loads(text[text.index("{"):])["cpus"]}
        assert areas == {0: one.truth("hsave0"), 1: one.truth("hsave1")}


def test_nothing_is_injected_where_it_would_not_be_executed(one: Smp) -> None:
    """A halted processor does not step: refused at once, as is the one that is in a guest; both are as they were."""
    titles = one.qmp("human-monitor-command", **{"command-line": "info registers -a"})
    with plugged(one.port) as gdb:
        for thread, line in ((1, "the processor is halted (HLT)"), (2, "in the host only")):
            if thread == 1 and "HLT=1" not in titles.partition("CPU#1")[0]:
                continue
            gdb.execute(f"thread {thread}")
            assert line in error(gdb, "msr read 0xc0010117 --yes")
    assert one.qmp("human-monitor-command", **{"command-line": "info registers -a"}) == titles


def test_lists_say_which_processor_runs_which(one: Smp) -> None:
    with plugged(one.port, "set width 150") as gdb:
        text = gdb.execute("vmcb list")
        assert re.search(rf"{one.state['vmcb']['a1']:#x}\s+vmcb\s+2 in guest", text)
        assert re.search(rf"{one.state['vmcb']['a0']:#x}\s+vmcb\s+1 last", text)
        assert "whose" not in text


# --- KVM's objects -----------------------------------------------------------------------------------------------------------------


def kvm_list(text: str) -> Dict[Tuple[int, int], Dict[str, int]]:
    """{(process, vCPU): {block: address}} of `kvm list --json`."""
    found: Dict[Tuple[int, int], Dict[str, int]] = {}
    for row in json.loads(text[text.index("{"):])["vcpus"]:
        found.setdefault((row["pid"], row["vcpu"]), {})[row["block"]] = int(row["address"], 16)
    return found


def test_vms_and_vcpus(one: Smp, symbols: Path) -> None:
    """Processes, vCPU ids and VMCBs are what the VMMs printed and what RAX was at each VMRUN."""
    with with_symbols(one, symbols) as gdb:
        text = gdb.execute("kvm list --json")
        found = kvm_list(text)
        assert "as of Linux 6.1 or newer" in text and one.files.kernel.name.startswith("vmlinuz-6.")
        vmcb, (a, b) = one.state["vmcb"], (one.truth("pid_a"), one.truth("pid_b"))
        assert set(found) == {(a, 0), (a, 1), (b, 0)}
        assert (found[a, 0], found[a, 1]) == ({"vmcb01 (current)": vmcb["a0"]}, {"vmcb01 (current)": vmcb["a1"]})
        assert found[b, 0]["vmcb01 (current)"] == vmcb["b0"]


def test_gdb_itself_reads_the_same_in_the_host(one: Smp, symbols: Path) -> None:
    """On the processor that is in the host GDB's virtual reads are the host's: it follows vm_list and svm_data to the same values."""
    with with_symbols(one, symbols) as gdb:
        gdb.execute("thread 1")
        first = "((struct kvm *)((char *)((struct list_head *)&vm_list)->next - (long)&((struct kvm *)0)->vm_list))"
        pids = [gdb.evaluate(f"{first}->userspace_pid")]
        text = gdb.execute("kvm list --json")
        assert json.loads(text[text.index("{"):])["vcpus"][0]["pid"] == pids[0]
        offsets = [gdb.evaluate(f"((unsigned long *)&__per_cpu_offset)[{cpu}]") for cpu in (0, 1)]
        running = gdb.evaluate(f"((struct vcpu_svm *)*(struct kvm_vcpu **)((char *)&kvm_running_vcpu + {offsets[1]:#x}))->current_vmcb->pa")
        assert running == one.state["vmcb"]["a1"]
        assert gdb.evaluate(f"((struct svm_cpu_data *)((char *)&svm_data + {offsets[0]:#x}))->save_area_pa") == one.truth("hsave0")


def test_the_current_block_is_taken_without_an_address(one: Smp, symbols: Path) -> None:
    """Thread 2 has vCPU 1 loaded, thread 1 had vCPU 0 loaded last: dump, check and exit explain take those, and the header says by what."""
    a = one.truth("pid_a")
    with with_symbols(one, symbols) as gdb:
        for thread, vcpu, evidence in ((1, 0, "svm_data.current_vmcb of CPU 0"), (2, 1, "kvm_running_vcpu of CPU 1")):
            gdb.execute(f"thread {thread}")
            address = one.state["vmcb"][f"a{vcpu}"]
            for command in ("vmcb dump", "vmcb check", "vmcb get rip", "vt exit explain", "npt walk 0x1000"):
                text = gdb.execute(command)
                assert f"current is the VMCB at {address:#x}: {evidence}" in head(text), command
                assert f"VMCB at {address:#x}" in body(text) and "VMCB at" in body(text), command
                others = {f"VMCB at {other:#x}" for other in one.state["vmcb"].values()} - {f"VMCB at {address:#x}"}
                assert not any(other in body(text) for other in others), command
            assert f"vCPU {vcpu} of process {a}, vmcb01" in gdb.execute("vmcb get rip")
        assert f"{one.state['vmcb']['a1']:#x}  vmcb            2 in guest  vCPU 1 of process {a}, vmcb01" in gdb.execute("vmcb list")


def test_selectors(one: Smp, symbols: Path) -> None:
    """vcpu:ID, vcpu:PID/ID, vcpu:ID.BLOCK and cpu:N wherever a command takes an address; whatever is no such is one clear line."""
    vmcb, (a, b) = one.state["vmcb"], (one.truth("pid_a"), one.truth("pid_b"))
    with with_symbols(one, symbols) as gdb:
        for selector, address in (("vcpu:1", vmcb["a1"]), (f"vcpu:{b}/0", vmcb["b0"]), (f"vcpu:{a}/0.vmcb01", vmcb["a0"]), ("cpu:1", vmcb["a1"])):
            assert f"VMCB at {address:#x}" in gdb.execute(f"vmcb get rip --at {selector}"), selector
            assert f"VMCB at {address:#x}" in gdb.execute(f"vt exit explain {selector}"), selector
        assert "inside the guest of the VMCB" in head(gdb.execute("phys 0x10000 --inside vcpu:1"))
        for selector, line in (("vcpu:0", f"vcpu:{a}/0"), ("vcpu:9", "no such vCPU"), (f"vcpu:{a}/0.vmcb02", "has no vmcb02; it has vmcb01"),
                               ("vcpu:1.vmcs12", "has no vmcs12"), ("cpu:2", "CPUs are 0 to 1"), ("vcpu:x", "write vcpu:ID"),
                               (f"vcpu:{b}/0.vmcb12", "no guest of its own")):
            assert line in error(gdb, f"vmcb dump {selector}"), selector


def test_tab_completes_selectors(one: Smp, symbols: Path) -> None:
    """Every vCPU and every block that `kvm list` shows, and what is offered names just that."""
    with with_symbols(one, symbols) as gdb:
        def offered(typed: str) -> List[str]:
            return [line.rpartition(" ")[2] for line in gdb.execute(f"complete {typed}").splitlines()]

        wanted: Dict[str, int] = {}
        for (process, vcpu), blocks in kvm_list(gdb.execute("kvm list --json")).items():
            for name, address in blocks.items():
                selector = f"vcpu:{process}/{vcpu}"
                wanted[f"{selector}.{name.split()[0]}"] = address
                if "current" in name:
                    wanted.update({selector: address} if vcpu != 1 else {selector: address, "vcpu:1": address})
        assert {wanted[f"vcpu:{one.truth(f'pid_{vm[0]}')}/{vm[1]}.vmcb01"] for vm in ("a0", "a1", "b0")} == set(one.state["vmcb"].values())
        assert set(offered("vmcb dump vcpu:")) == set(wanted)
        assert offered("vmcb dump cpu:") == ["cpu:0", "cpu:1"] == offered("vmcb get rip --at cpu:")
        alone = f"vcpu:{one.truth('pid_a')}/0."
        assert offered(f"vmcb dump {alone}") == [f"{alone}vmcb01"]
        for selector, address in wanted.items():
            if not selector.endswith("vmcb12"):
                assert f"VMCB at {address:#x}" in gdb.execute(f"vmcb get rip --at {selector}"), selector
        gdb.execute("disconnect")
        assert offered("vmcb dump vcpu:") == []
    with plugged(one.port) as gdb:
        assert gdb.execute("complete vmcb dump vcpu:") == "" and '"0"' in gdb.execute("maintenance packet qqemu.PhyMemMode")


def test_a_gdb_of_our_own_gives_the_same(one: Smp, symbols: Path) -> None:
    """The same code over MI, with --symbols and --thread: the text is that of GDB with the plugin.  Linux' objects read by packets too."""
    common = ("-s", one.source, "--symbols", str(symbols), "--width", "150")
    with with_symbols(one, symbols) as gdb:
        gdb.execute("thread 2")
        inside = {command: body(gdb.execute(command)) for command in ("kvm list", "vmcb dump")}
        slow = body(gdb.execute("kvm list --no-fast"))
    assert slow.partition("read through")[0] == inside["kvm list"].partition("read through")[0]
    for command, text in inside.items():
        assert body(vtdbg(*command.replace("vt ", "").split(), *common, "--thread", "2")) == text, command
    assert not one.running
    assert "there is no processor 7; there are 1, 2" in vtdbg("where", *common, "--thread", "7", status=2)
    assert "no ELF file" in vtdbg("where", "-s", one.source, "--symbols", __file__, status=2)
    assert "in GDB: `add-symbol-file" in vtdbg("vmcb", "list", "-s", "sample:svm", "--thread", "1", status=2)


def test_without_symbols_all_is_as_before(one: Smp) -> None:
    with plugged(one.port) as gdb:
        gdb.execute("thread 2")
        text = gdb.execute("vmcb get rip")
        assert "current is" not in head(text) and text.count("VMCB at") >= 3
        assert "KVM's symbols in the debugger" in error(gdb, "kvm list")
        assert "KVM's symbols in the debugger" in error(gdb, "vmcb dump vcpu:1")
        assert "in GDB: `add-symbol-file FILE`, `thread N`" in error(gdb, "vmcb list --thread 2")
    assert "sample" in vtdbg("vmcb", "dump", "vcpu:1", "-s", "sample:svm", status=2)


def test_symbols_that_are_loaded_later_count_at_once(one: Smp, symbols: Path) -> None:
    with plugged(one.port) as gdb:
        assert "KVM's symbols" in error(gdb, "kvm list")
        gdb.execute(f"add-symbol-file {symbols}")
        assert "vmcb01" in gdb.execute("kvm list")


def made(lab: Smp, vmlinux: Path, folder: Path, kallsyms: str, *modules: str) -> Path:
    (folder / "kallsyms").write_text(kallsyms)
    vtdbg("kvm", "symbols", str(vmlinux), *(str(lab.files.modules / name) for name in modules), "--kallsyms", str(folder / "kallsyms"),
          "--out", str(folder / "other.debug"))
    return folder / "other.debug"


def test_symbols_of_another_boot_are_not_believed(one: Smp, vmlinux: Path, tmp_path: Path) -> None:
    """The same kernel at other addresses: vm_list is no list there.  It is said, and everything else is as without symbols."""
    moved = re.sub(r"^f\w{15}", lambda found: f"{int(found.group(), 16) + 0x5200000:016x}", one.kallsyms(), flags=re.M)
    with with_symbols(one, made(one, vmlinux, tmp_path, moved, "kvm.ko", "kvm-amd.ko")) as gdb:
        gdb.execute("thread 2")
        text = gdb.execute("vmcb get rip")
        assert "they are of another kernel" in head(text) and "GUEST mode" in head(text) and text.count("VMCB at") >= 3
        assert "they are of another kernel" in error(gdb, "kvm list")


def test_missing_types_are_named(one: Smp, vmlinux: Path, tmp_path: Path) -> None:
    """Without kvm-amd's types: which is missing and what would bring it, in one line, also in the notes of other commands."""
    with with_symbols(one, made(one, vmlinux, tmp_path, one.kallsyms(), "kvm.ko")) as gdb:
        line = error(gdb, "kvm list") if "struct vcpu_svm" not in gdb.execute("vmcb get rip") else ""
        text = " ".join(gdb.execute("vmcb get rip").split())
        assert "struct vcpu_svm" in line + text and "load the module's debugging information" in line + text


def test_a_list_that_does_not_close_is_said(one: Smp, symbols: Path) -> None:
    """One link of vm_list damaged: what can be read is shown with what cannot; put right again afterwards."""
    with with_symbols(one, symbols) as gdb:
        gdb.execute("thread 1")
        place = gdb.evaluate("&((struct list_head *)((struct list_head *)&vm_list)->next)->next")
        before = gdb.evaluate(f"*(unsigned long *){place:#x}")
        try:
            gdb.execute(f"set var *(unsigned long *){place:#x} = 0x1234567")
            text = " ".join(gdb.execute("kvm list").split())
            assert "KVM's objects: vm_list: cannot read" in text and "vmcb01" in text
        finally:
            gdb.execute(f"set var *(unsigned long *){place:#x} = {before:#x}")
        assert "vm_list:" not in gdb.execute("kvm list")


def test_a_vcpu_that_is_asked_to_leave_is_in_its_guest(one: Smp, symbols: Path) -> None:
    """Another processor that wants something makes IN_GUEST_MODE to EXITING_GUEST_MODE (kvm_vcpu_exiting_guest_mode), and then interrupts: until
    that arrives the guest goes on, and it is still this one's."""
    with with_symbols(one, symbols) as gdb:
        before = kvm_modes(gdb), rows(gdb.execute("vt where --json"))
        gdb.execute("thread 1")
        offset = gdb.evaluate("((unsigned long *)&__per_cpu_offset)[1]")
        mode = f"(*(struct kvm_vcpu **)((char *)&kvm_running_vcpu + {offset:#x}))->mode"
        assert gdb.evaluate(mode) == 1
        try:
            gdb.execute(f"set var {mode} = 2")
            assert (kvm_modes(gdb), rows(gdb.execute("vt where --json"))) == before
        finally:
            gdb.execute(f"set var {mode} = 1")


def kvm_modes(gdb: MiPort) -> List[Tuple[int, int, str]]:
    text = gdb.execute("kvm list --json")
    return [(row["pid"], row["vcpu"], row["mode"]) for row in json.loads(text[text.index("{"):])["vcpus"]]


# --- both processors in guests ----------------------------------------------------------------------------------------------------


def test_two_processors_in_guests_of_one_vm(both: Smp, symbols: Path) -> None:
    """GDTR, IDTR and CR3 of both vCPUs are equal: TR tells one, and the other one is what is left."""
    for gdb_of in (lambda: plugged(both.port), lambda: with_symbols(both, symbols)):
        with gdb_of() as gdb:
            found = rows(gdb.execute("vt where --json"))
            assert [(row["mode"], int(row["block"], 16)) for row in found.values()] == [
                ("GUEST", both.state["vmcb"]["a0"]), ("GUEST", both.state["vmcb"]["a1"])]


def test_kernel_is_found_while_no_processor_is_in_the_host(both: Smp, symbols: Path) -> None:
    """CR3 of both processors is a guest's: the host's tables are those that VMRUN saved, or that the kernel's image names."""
    with with_symbols(both, symbols) as gdb:
        found = kvm_list(gdb.execute("kvm list --json"))
        assert found[both.truth("pid_a"), 1] == {"vmcb01 (current)": both.state["vmcb"]["a1"]}
    with MiPort(f"127.0.0.1:{both.port}") as plain:
        from vtdbg.linux.kernel import Kernel, Symbols, find_root
        from vtdbg.linux.kvm import read_kvm

        plain.load_symbols(str(symbols))
        machine = LiveMachine(plain)
        known = Symbols(plain.evaluate)
        assert find_root(known, machine.memory, [(machine.registers(), "a guest's")]) is not None
        root = find_root(known, machine.memory, [])
        assert root is not None and "init_top_pgt" in root.source
        assert {block.address for vcpu in read_kvm(Kernel(known, root)).vcpus for block in vcpu.blocks} >= set(both.state["vmcb"].values())
        machine.mode.virtual()


# --- a guest's guest --------------------------------------------------------------------------------------------------------------


def test_a_guests_guest_is_not_guessed(nested: Smp) -> None:
    """L2 has the tables of VM A's guest and, as VMRUN loads no TR, a TR that says nothing.  The other processor is in such a guest too: both VMCBs
    are named and none is taken."""
    with plugged(nested.port, "set width 150") as gdb:
        found = rows(gdb.execute("vt where --json"))
        assert found[1]["mode"] == found[2]["mode"] == "GUEST" and found[2]["block"] is None
        for name in ("a0", "l2"):
            assert f"{nested.state['vmcb'][name]:#x}" in found[2]["reason"]
        gdb.execute("thread 2")
        assert "which VMCB?" in error(gdb, 'print $vmcb("rip")')


def test_documented_sessions_are_real(nested: Smp, symbols: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/gdb.md shows what GDB prints here, from the file of symbols that `kvm symbols` made on."""
    monkeypatch.chdir(symbols.parent)
    with PtyGdb(f"target remote 127.0.0.1:{nested.port}") as gdb:
        assert gdbdocs.check(gdb, "live, QEMU at", symbols=True) == 2
    assert not nested.running


class Cut(MiPort):
    """A Ctrl-C at the `at`-th command to gdb."""

    at, seen = -1, 0

    def _ask(self, command: str, patience: Any = None) -> List[Dict[str, Any]]:
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt
        return super()._ask(command, patience)


def test_ctrl_c_while_it_is_found_out_where_the_processors_are(nested: Smp, symbols: Path) -> None:
    """Whatever was being looked at: the next command finds the same as if there had been none, KVM's objects included."""
    def found(machine: LiveMachine) -> object:
        machine.refresh()
        state = machine.kvm()
        assert state is not None
        blocks = [(vcpu.title, block.name, block.address) for vcpu in state.vcpus for block in vcpu.blocks]
        return machine.provenance, machine.warnings, blocks, [(seen.where.text, seen.current) for seen in machine.processors.all()]

    with Cut(f"127.0.0.1:{nested.port}") as gdb:
        gdb.load_symbols(str(symbols))
        machine = LiveMachine(gdb)
        wanted = found(machine)
        machine.ran()
        gdb.seen = 0
        assert found(machine) == wanted
        whole = gdb.seen
        for number in range(1, whole + 1, max(whole // 16, 1)):
            machine.ran()
            gdb.at, gdb.seen = number, 0
            with pytest.raises(KeyboardInterrupt):
                found(machine)
            gdb.at = -1
            assert found(machine) == wanted, (number, whole)
        machine.mode.virtual()


def test_a_guests_guest_by_kvms_objects(nested: Smp, symbols: Path) -> None:
    """kvm_running_vcpu's current_vmcb is vmcb02, which RAX was at VMRUN; svm_data.current_vmcb is still what was loaded before."""
    vmcb, b = nested.state["vmcb"], nested.truth("pid_b")
    with with_symbols(nested, symbols) as gdb:
        found = rows(gdb.execute("vt where --json"))
        assert [int(row["block"], 16) for row in found.values()] == [vmcb["a0"], vmcb["l2"]]
        gdb.execute("thread 2")
        text = gdb.execute("vmcb get rip")
        assert f"current is the VMCB at {vmcb['l2']:#x}: kvm_running_vcpu of CPU 1: vCPU 0 of process {b}, vmcb02" in head(text)
        assert gdb.evaluate('$vmcb("rip")') & ~0xFF == nested.truth("l2_loop") & ~0xFF
        blocks = kvm_list(gdb.execute("kvm list --json"))[b, 0]
        assert blocks == {"vmcb01": vmcb["b0"], "vmcb02 (current)": vmcb["l2"], "vmcb12": 0x20000}


def test_vmcb12_in_the_guests_memory(nested: Smp, symbols: Path) -> None:
    """The VMCB that the guest made is found through its own nested tables: RIP is the L2 entry point that the VMM wrote there or later."""
    b = nested.truth("pid_b")
    with with_symbols(nested, symbols) as gdb:
        text = gdb.execute(f"vmcb get rip cr3 asid --at vcpu:{b}/0.vmcb12")
        address = int(re.search(r"VMCB at (0x[0-9a-f]+)", body(text)).group(1), 16)  # type: ignore[union-attr]
        assert "0x0000000000001000" in text
        page = (nested.folder / "ram").read_bytes()[address:address + 0x600]
        assert int.from_bytes(page[0x578:0x580], "little") & ~0xFF == nested.truth("l2_loop") & ~0xFF
        assert f"{int.from_bytes(page[0x578:0x580], 'little'):#018x}" in text


def ran_with(text: str) -> Dict[str, str]:
    """{vmcb02: by what} of `source scan --json`: what the guest of a guest ran with."""
    found: Dict[str, str] = {}

    def look(item: Any) -> None:
        if isinstance(item, dict) and "ran_with" in item:
            found.update(zip(item["ran_with"], item["ran_with_evidence"]))
        for inner in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            look(inner)

    look(json.loads(text[text.index("{"):]))
    return found


def test_vmcb02_is_paired_without_kvms_objects_as_they_pair_it(nested: Smp, symbols: Path) -> None:
    """While the guest's guest runs: by what KVM merges, and with the symbols by nested.vmcb02 and nested.vmcb12_gpa themselves."""
    with plugged(nested.port, "set width 150") as gdb:
        by_pages = ran_with(gdb.execute("vt source scan --json"))
    with with_symbols(nested, symbols) as gdb:
        by_objects = ran_with(gdb.execute("vt source scan --json"))
    assert list(by_pages) == list(by_objects) == [f"{nested.state['vmcb']['l2']:#x}"]
    (guessed,), (said,) = by_pages.values(), by_objects.values()
    assert said.startswith("by KVM's objects") and "KVM's objects" not in guessed, (guessed, said)


def test_exit_trace_of_two_processors(nested: Smp) -> None:
    """Last of these, for the machine runs: the exits of each processor are those of the guests that are pinned to it, with its own VMCB."""
    with plugged(nested.port, "set width 150") as gdb:
        gdb.execute("vt where")
        text = gdb.execute(f"vt exit trace {nested.state['vmrun'] + 3:#x} --count 40 --json")
        exits = json.loads(text[text.index("{"):])["exits"]
        pages = {"a0": {1}, "a1": {2}, "l2": {2}}
        seen = set()
        for row in exits:
            guest = [name for name in pages if int(row["rip"], 16) & ~0xFF == nested.truth(f"{name}_loop") & ~0xFF]
            if guest:
                assert row["processor"] in pages[guest[0]], row
                seen.add(row["processor"])
        assert len(exits) == 40 and seen == {1, 2}


def test_functions_in_a_condition_on_two_processors(nested: Smp, symbols: Path) -> None:
    """As the one before: GDB stops where the VMCB that is one of this processor's has the wanted exit code, in the memory as QEMU has it."""
    pages = {1: ("a0",), 2: ("a1", "b0", "l2")}
    # An interrupt: while GDB looks at the condition time goes on in QEMU, so that one waits whenever the guest goes on, and nothing else may happen.
    wanted = 0x60
    with with_symbols(nested, symbols) as gdb:
        for thread, names in pages.items():
            gdb.execute(f"hbreak *{nested.state['vmrun'] + 3:#x} if $_thread == {thread} && $exit_reason() == {wanted:#x}")
            gdb.execute("continue")
            assert gdb.registers()["rip"] == nested.state["vmrun"] + 3 and gdb.selected() == thread
            ram = (nested.folder / "ram").read_bytes()
            places = [nested.state["vmcb"][name] + 0x70 for name in names]
            assert wanted in [int.from_bytes(ram[at:at + 8], "little") for at in places] and gdb.evaluate("$exit_reason()") == wanted
            gdb.execute("delete")
    assert not nested.running


# --- what decides, without a machine ----------------------------------------------------------------------------------------------


def side(**values: int) -> Dict[str, Any]:
    return {"gdtr_base": 0x5000, "idtr_base": 0x6000, "tr_base": 0x7000, "tr_selector": 0x30, "cr3": 0x1000, **values}


HSAVES = [Block("hsave", 0x100000, host=side(gdtr_base=0xFFFF0000), block=0x1000),
          Block("hsave", 0x200000, host=side(gdtr_base=0xFFFF1000), block=0x2000)]


def test_equal_guests_are_not_told_apart() -> None:
    blocks = [Block("vmcb", 0x1000, guest=side()), Block("vmcb", 0x2000, guest=side()), *HSAVES]
    found = decide(side(), blocks)
    assert (found.mode, found.block, [item.address for item in found.candidates]) == ("guest", None, [0x1000, 0x2000])
    assert found.host == {} and "0x1000, 0x2000" in found.text
    alone = decide(side(), blocks, elsewhere=[0x100000])
    assert alone.block is not None and alone.block.address == 0x2000 and alone.area == 0x200000 and alone.host["gdtr_base"] == 0xFFFF1000


def test_what_ran_on_no_processor_is_no_candidate() -> None:
    """A VMCB that no host save area names is not being run (a copy in a guest's memory, a vCPU that waits)."""
    blocks = [Block("vmcb", 0x1000, guest=side()), Block("vmcb", 0x9000, guest=side()), *HSAVES]
    assert decide(side(), blocks).block == blocks[0]


def test_tr_decides_only_where_nobody_else_has_it() -> None:
    first, second, other = (Block("vmcb", at, guest=side(tr_base=tr)) for at, tr in ((0x1000, 0x7000), (0x2000, 0x7400), (0x9000, 0x7000)))
    assert decide(side(tr_base=0x7400), [first, second, *HSAVES]).block == second
    assert decide(side(), [first, second, *HSAVES]).block == first
    assert decide(side(), [first, second, other, *HSAVES]).block is None


def test_a_vcpu_that_moved_has_no_host_registers_of_another_processor() -> None:
    """Two save areas name the VMCB: which processor's host state is this one's is not known, until the other's is."""
    areas = [HSAVES[0], Block("hsave", 0x200000, host=side(gdtr_base=0xFFFF1000), block=0x1000)]
    blocks = [Block("vmcb", 0x1000, guest=side()), *areas]
    found = decide(side(), blocks)
    assert found.block == blocks[0] and found.host == {} and found.area is None
    assert decide(side(), blocks, elsewhere=[0x100000]).host["gdtr_base"] == 0xFFFF1000


def test_processors_that_share_tables_have_no_block_by_them() -> None:
    areas = [Block("hsave", at, host=side(gdtr_base=0xFFFF0000), block=vmcb) for at, vmcb in ((0x100000, 0x1000), (0x200000, 0x2000))]
    found = decide(side(gdtr_base=0xFFFF0000), [Block("vmcb", 0x1000, guest=side()), *areas])
    assert (found.mode, found.block, found.area) == ("host", None, None)


def test_the_monitors_processor_is_matched_by_registers() -> None:
    text = "".join(f"\nCPU#{number}\nRAX={rax:016x} RBX=0000000000000000\nRIP={rip:016x} RFL=2\n"
                   f"GDT=     {gdt:016x} 0000007f\nIDT=     {gdt:016x} 0fff\n"
                   for number, rax, rip, gdt in ((0, 1, 0x10, 0xA000), (1, 2, 0x10, 0xB000), (2, 2, 0x10, 0xC000)))
    assert of_processor(text, {"rax": 1, "rbx": 0, "rip": 0x10})["gdtr_base"] == 0xA000
    assert of_processor(text, {"rax": 2, "rip": 0x10}) == {} == of_processor(text, {"rax": 3, "rip": 0x10})
    assert of_processor(text, {"rax": 2, "rip": 0x10}, lambda: 2)["gdtr_base"] == 0xC000
    narrow = text.replace("RIP=00000000", "EIP=").replace("RAX=00000000", "EAX=")
    assert of_processor(narrow, {"rax": 1 << 32 | 1, "rip": 0x10})["gdtr_base"] == 0xA000


# --- KVM on Intel ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stub() -> Iterator[VmxStub]:
    with started("the VMX stub", VmxStub) as target:
        yield target


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tuple[Path, Path]]:
    """(ELF file, memory from 0x80a00000 on) of kvm_objects.c, by gcc and ld."""
    folder = tmp_path_factory.mktemp("objects")

    def make(*options: str) -> Tuple[Path, Path]:
        name = "".join(options).replace("-D", "_") or "new"
        elf, memory = folder / f"{name}.elf", folder / f"{name}.bin"
        commands: List[List[str]] = [
            ["gcc", "-g", "-O0", "-c", "-ffreestanding", "-fno-pic", "-mcmodel=large", "-fno-zero-initialized-in-bss", *options,
             "-o", str(folder / "o.o"), str(OBJECTS)],
            ["ld", "-o", str(elf), "-Tdata=0x80a00000", "--section-start=.percpu=0x40000", "-e", "0", str(folder / "o.o")],
            ["objcopy", "-O", "binary", "-j", ".data", str(elf), str(memory)]]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        return elf, memory

    return make


# The model maps linear 0 to 1 GiB onto itself; the third GiB becomes the kernel's map of physical memory.
PDPT, PD, DIRECT_MAP = 0x2000, 0x3000, 0x80000000


@pytest.mark.parametrize("options", [(), ("-DOLD",)])
def test_current_vmcs_of_kvm_intel(stub: VmxStub, linked: Callable[..., Tuple[Path, Path]], options: Tuple[str, ...]) -> None:
    """per-CPU current_vmcs is a kernel address: its page, not its value, is the VMCS; vm_list leads to vmcs01, vmcs02 and vmcs12 of each vCPU,
    by XArray (5.17 and newer) and by array.  The processor is found by its GS base, which the VMCS' host state gives it."""
    elf, memory = linked(*options)
    with plugged(stub.port, "set width 150") as gdb:
        gdb.execute(f"vmcs get GUEST_RIP --at {VMCS:#x}")
        assert gdb.run_to(HANDLER)
        gdb.execute(f"restore {memory} binary 0xa00000")
        gdb.write_virtual(PDPT + 8 * (DIRECT_MAP >> 30), (PD | 7).to_bytes(8, "little"))
        gdb.execute(f"add-symbol-file {elf}")
        area = gdb.evaluate("&area0") - 0x40000
        gdb.write_virtual(VMCS + stub.layout[0x6C08], area.to_bytes(8, "little"))
        assert gdb.run_to(GUEST + 2) and gdb.run_to(HANDLER)
        assert gdb.registers()["gs_base"] == area
        text = gdb.execute("vmcs get GUEST_CR3 VM_EXIT_REASON")
        assert f"current is the VMCS at {VMCS:#x}: current_vmcs of CPU 0: vCPU 0 of process 4711, vmcs01" in head(text)
        assert f"VMCS at {VMCS:#x} (vCPU 0 of process 4711, vmcs01)" in body(text) and f"{GUEST_PML4:#018x}" in text
        text = gdb.execute("kvm list --json")
        assert f"as of Linux {'3.1' if options else '5.17'} or newer" in text
        found = kvm_list(text)
        assert found == {(4711, 0): {"vmcs01 (current)": VMCS}, (4712, 70): {"vmcs01": 0x31000, "vmcs02 (current)": 0x32000, "vmcs12": 0x33000}}
        row = rows(gdb.execute("vt where --json"))[1]
        assert (row["mode"], int(row["block"], 16), row["cpu"]) == ("host", VMCS, 0) and "GS base" in row["reason"]
        assert f"VMCS at {VMCS:#x}" in gdb.execute("vt exit explain") and f"VMCS at {VMCS:#x}" in gdb.execute("vmcs check cpu:0")
        assert "vmcs12" in error(gdb, "vmcs dump vcpu:70.vmcs12") or "0x33000" in error(gdb, "vmcs dump vcpu:70.vmcs12")
        assert gdb.run_to(GUEST + 2)
        text = gdb.execute("vmcs get GUEST_CR3")
        assert "GUEST mode" in head(text) and f"current is the VMCS at {VMCS:#x}" in head(text)
        assert gdb.run_to(HANDLER)


def test_kvm_amd_before_vmcb01(stub: VmxStub, linked: Callable[..., Tuple[Path, Path]]) -> None:
    """Kernels before 5.13: one VMCB (vmcb, vmcb_pa), svm_data a pointer (before 6.1), vCPUs in an array (before 5.17)."""
    elf, memory = linked("-DOLD", "-DSVM")
    with plugged(stub.port, "set width 150") as gdb:
        assert gdb.run_to(HANDLER)
        gdb.execute(f"restore {memory} binary 0xa00000")
        gdb.write_virtual(PDPT + 8 * (DIRECT_MAP >> 30), (PD | 7).to_bytes(8, "little"))
        gdb.execute(f"add-symbol-file {elf}")
        text = gdb.execute("kvm list --json")
        assert kvm_list(text) == {(4711, 0): {"vmcb (current)": 0x30000}}
        assert "older than" in text
        cpus = {row["cpu"]: row for row in json.loads(text[text.index("{"):])["cpus"]}
        assert cpus[0]["current"] is None and int(cpus[1]["current"], 16) == 0x30000 and "svm_data.current_vmcb of CPU 1" in cpus[1]["evidence"]
