"""WinDbg's engine itself: real dbgeng and pykd under Wine, on dumps that hold the memory of real hypervisors, and on a live kernel.

The same command has to print the same text whoever reads the memory: the core's own reader of dumps, dbgeng through ctypes, dbgeng through pykd,
and dbgeng over the KD protocol.
"""

from __future__ import annotations

import html
import json
import os
import random
import re
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import pytest
from lab_windbg.image import CODE, CR8, GDT, IDT, LDT_SELECTOR, NT, PAGE, PCR, PCR_STRIDE, TSS_SLOT, VMREAD_AT, Image, gather, wrap, write_dump
from lab_windbg.kd_stub import CONTINUE2, READ_MSR, READ_PHYSICAL, READ_VIRTUAL, KdStub, Kernel, VmxRoot
from lab_windbg.lab import HERE, Lab, windows_path
from support import dumps
from support.live import had

import vtdbg
from vtdbg.commands.registry import all_verbs
from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.render.text import render_text

pytestmark = pytest.mark.live

ROOT = Path(__file__).parent.parent

RUNS = 41
COMMANDS: Dict[str, List[str]] = {
    "intel": [
        "vmcs list",
        "vmcs dump 0x6826000",
        "vmcs check 0x6bd9000 --caps bochs-2.7-skylake-x",
        "vmcs get GUEST_RIP VM_EXIT_REASON",
        "ept walk 0x1000 --vmcs 0x6826000",
        "ept walk 0xd0000000 --vmcs 0x6826000 --caps bochs-2.7-skylake-x",
        "ept dump --vmcs 0x6826000",
        "gva walk 0xffff800000001000 --vmcs 0x6826000",
        "exit explain 0x6bd9000",
        "gdt dump --vmcs 0x6826000",
        "gdt dump --cpu 1",
        "idt dump --cpu 0",
        "tss dump --cpu 1",
        "phys 0x6826000",
        "msrbitmap dump --vmcs 0x6826000",
        "ept lint --vmcs 0x6826000",
        "source scan",
        "source info --json",
    ],
    "amd": [
        "vmcb list",
        "vmcb dump 0x1f22000",
        "vmcb check 0x1f22000",
        "vmcb get rip exit_code",
        "exit explain --vmcb 0x1f22000",
        "msrbitmap dump --vmcb 0x1f22000",
        "npt walk 0x1000 --vmcb 0x1f22000",
        "npt walk 0x200000 --vmcb 0x1f22000",
        "npt dump --vmcb 0x1f22000",
        "gva walk 0xffff800000000091 --vmcb 0x1f22000",
        "gdt dump --cpu 0",
        "idt dump --cpu 0",
        "tss dump --cpu 1",
        "phys 0x1f22000",
        "source info --json",
    ],
}
# The other verbs that read memory: on the dumps only, for live they read by the same calls as those above.
ON_DUMPS: Dict[str, List[str]] = {
    "intel": [
        "vmcs diff 0x6826000 0x6bd9000",
        "vmcs infer 0x6826000 --value GUEST_RIP=0x1009d --value HOST_RIP=0xffffffffc039d44e",
        "ept find 0x1e3d000 --vmcs 0x6826000",
        "ept diff --vmcs 0x6826000 --other-vmcs 0x6bd9000",
        "ept hooks --vmcs 0x6826000 --with 0x680205e",
        "ept roots",
        "ept map --vmcs 0x6826000",
        "iobitmap dump --vmcs 0x6826000",
        "iobitmap query 0x60 --vmcs 0x6826000",
        "msrbitmap query IA32_EFER --vmcs 0x6826000",
        "page vapic --at 0x6826000",
        "page pml --at 0x6826000 --pml-index 500",
        "page posted --at 0x6826000",
        "page ve --at 0x6826000",
        "page eptplist --at 0x6851000",
        "page vmread --at 0x6827000",
        "page vmwrite --at 0x6827000",
        "page vmxon 0x6692000",
        "page msrs 0x6826000",
        "page exceptions 0x6826000",
        "ldt dump --vmcs 0x6826000",
        "ldt dump --cpu 0",
        "idt dump --vmcs 0x6826000 --host",
        "gva walk 0xffffffffc039d44e --vmcs 0x6826000 --host",
        "phys 0x1000 --inside 0x6826000",
    ],
    "amd": [
        "vmcb diff 0x1f22000 0x1f22000",
        "npt find 0x1000",
        "npt diff --vmcb 0x1f22000 --other-vmcb 0x1f22000",
        "npt hooks",
        "npt lint",
        "npt roots",
        "npt map",
        "iobitmap dump",
        "iobitmap query 0x60",
        "msrbitmap query IA32_EFER",
        "gdt dump --vmcb 0x1f22000",
        "idt dump --vmcb 0x1f22000",
        "tss dump --vmcb 0x1f22000",
        "ldt dump --vmcb 0x1f22000",
        "phys 0x1000 --inside 0x1f22000",
    ],
}
# Verbs that read no memory of the session, those that need a live target (their own tests are below), and the one that writes a file.
NOT_COMPARED = {
    "caps adjust", "caps presets", "caps show", "caps support", "decode", "exit reasons", "gdt decode", "idt decode", "msr show", "vmcs layouts",
    "windbg", "cpuid", "exit trace", "kvm list", "kvm symbols", "msr read", "sgdt", "vmcs layout", "where", "report",
}
# What pykd is asked of a live kernel too; the rest of it is the same code as on a dump.
PYKD_LIVE = {"intel": ["ept walk 0x1000 --vmcs 0x6826000", "vmcs dump 0x6826000"], "amd": ["vmcb dump 0x1f22000", "npt walk 0x1000 --vmcb 0x1f22000"]}
MISSING = "phys 0x3000000000"
VMCS = 0x6826000
VMREAD = f"vmcs dump {VMCS:#x} --vmread --assume-host --json"
PHYS = f"phys {VMCS:#x} --length 16"
PART = f"vmcs list --scan {VMCS:#x}+4k"
Request = Dict[str, Any]
# Live, in this order, on a machine that has 16 GiB more of RAM: (name, request).
FAULTS: Dict[str, Request] = {
    "told to run": {"backend": "ctypes", "words": PHYS, "state": "go"},
    "told to run, pykd": {"backend": "pykd", "words": PHYS, "state": "go"},
    "runs": {"backend": "ctypes", "words": PHYS, "state": "running"},
    "broken into": {"backend": "ctypes", "words": PHYS},
    "long search": {"backend": "ctypes", "words": "vmcs list"},
    "part of it": {"backend": "ctypes", "words": PART},
    "no patch": {"backend": "ctypes", "words": f"{VMREAD} --yes --no-patch"},
    "broken injection": {"backend": "ctypes", "words": f"{VMREAD} --yes", "interrupt": ["step", 20]},
    "Ctrl-Break": {"backend": "ctypes", "words": PART, "interrupt": 0},
    "Ctrl-Break in a read": {"backend": "ctypes", "words": "gdt dump --cpu 1", "interrupt": ["read_physical", 1]},
    "Ctrl-Break in a read, pykd": {"backend": "pykd", "words": "gdt dump --cpu 1", "interrupt": ["read_physical", 1]},
    "Ctrl-Break elsewhere": {"backend": "ctypes", "words": "gdt dump --cpu 1", "interrupt": ["register", 3]},
    "late Ctrl-Break": {"backend": "ctypes", "words": PHYS, "interrupt": ["write", 1]},
    "exit trace": {"backend": "ctypes", "words": "exit trace @rip"},
    "MSR, pykd": {"backend": "pykd", "words": "msr read 0xc0000080 0x480"},
    "no such MSR, pykd": {"backend": "pykd", "words": "msr read 0x490"},
}
SLOW = {READ_PHYSICAL: 2, CONTINUE2: 9, READ_MSR: 3}
"""Of those, requests that a busy kernel answers only when the debugger has lost its patience and asked again: (number, which of its kind)."""
INJECTED = {"intel": [f"{VMREAD} --yes", VMREAD, "msr read 0xc0000080 0x480", "msr read 0x490"], "amd": []}
PAIRS = [(name, words) for name, commands in COMMANDS.items() for words in commands]
PROVENANCE = re.compile(r"\((KPRCB of processor \d+: ProcessorState|DbgEng)\)")


class Answers(NamedTuple):
    """By backend and command: (status, text), and in order; what the session said at its end; the stub's side of a live one."""

    by_command: Dict[Tuple[str, str], Tuple[int, str]]
    in_order: List[Tuple[int, str]]
    longest: int
    end: Dict[str, Any]
    stub: "KdStub | None"


Segments = List[Tuple[int, bytes]]
Engines = Dict[str, "Future[Answers]"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    found = had("the Windows debugger engine", Lab().prepare)
    with found.running():
        yield found


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Sessions run side by side: opening and attaching is mostly waiting."""
    with ThreadPoolExecutor(3) as made:
        yield made


@pytest.fixture(scope="module")
def memories(intel_plain: Path, amd_exit: Path) -> Dict[str, Segments]:
    """Pages of the fixtures that hold something, in as many runs as a complete dump can name."""
    zeros = bytes(PAGE)
    found = {}
    for name, path in (("intel", intel_plain), ("amd", amd_exit)):
        memory = vtdbg.open(str(path)).memory
        frames = [at >> 12 for start, length in memory.ranges() or () for at in range(start, start + length, PAGE) if memory.read(at, PAGE) != zeros]
        found[name] = []
        for first, count in gather(frames, RUNS):
            pages = [memory.read(at << 12, PAGE) if at in set(frames) else zeros for at in range(first, first + count)]
            found[name].append((first << 12, b"".join(pages)))
    return found


@pytest.fixture(scope="module")
def windows_dumps(memories: Dict[str, Segments], dumps_dir: Path) -> Dict[str, Path]:
    return {name: write_dump(dumps_dir / f"{name}.dmp", wrap(segments)) for name, segments in memories.items()}


def ask(lab: Lab, folder: Path, target: str, requests: List[Dict[str, Any]], stub: "KdStub | None" = None) -> Answers:
    """One process of Windows' Python for all the requests."""
    file = folder / f"requests-{threading.get_ident()}-{time.monotonic_ns()}"
    file.write_text("".join(json.dumps({**request, "words": request["words"].split()}) + "\n" for request in requests))
    output = lab.run_python("session.py", target, windows_path(file))
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == len(requests) + 1, output[-3000:]
    answers = [json.loads(line) for line in lines]
    in_order = [(answer["status"], answer["text"]) for answer in answers[:-1]]
    by_command = {(request["backend"], request["words"]): answer for request, answer in zip(requests, in_order)}
    return Answers(by_command, in_order, max(answer["longest"] for answer in answers[:-1]), answers[-1], stub)


def vmcs_of(segments: Segments) -> vtdbg.Vmcs:
    return vtdbg.Vmcs.from_page(vtdbg.memory_from_segments(segments).read_page(VMCS))


def started(kernel: Kernel, began: "Path | None" = None, slow: Mapping[int, int] = {}) -> KdStub:
    stub = KdStub(kernel, began, slow)
    stub.start()
    return stub


@pytest.fixture(scope="module")
def engines(lab: Lab, memories: Dict[str, Segments], windows_dumps: Dict[str, Path], dumps_dir: Path, pool: ThreadPoolExecutor) -> Engines:
    """Every session at the same time: "intel dump", "amd live", ..., and "faults"."""
    # With the VMCS of the fixture as the current one of the live kernel's processor.
    fields = {item.field.encoding: item.value for item in vmcs_of(memories["intel"]).values()}
    sessions = {}
    for name, commands in COMMANDS.items():
        stub = started(Kernel(wrap(memories[name]), {0x480: 0xDA040000000016}, VmxRoot(fields)))
        live = [{"backend": "ctypes", "words": words} for words in [*commands, MISSING, *INJECTED[name]]]
        live += [{"backend": "pykd", "words": words} for words in (commands[0], *PYKD_LIVE[name], commands[-1])]
        sessions[f"{name} live"] = pool.submit(ask, lab, dumps_dir, f"kd:{stub.connection}", live, stub)
    page = vtdbg.memory_from_segments(memories["intel"]).read_page(VMCS)
    began = dumps_dir / "the machine runs"
    stub = started(Kernel(wrap([(VMCS, page)], empty=[(0x100000, 0x400000)]), {0x480: 0xDA040000000016}, VmxRoot(fields)), began, SLOW)
    faults = [{**request, "began": windows_path(began)} for request in FAULTS.values()]
    sessions["faults"] = pool.submit(ask, lab, dumps_dir, f"kd:{stub.connection}", faults, stub)
    for name, commands in COMMANDS.items():
        asked = [*commands, *ON_DUMPS[name], MISSING]
        both: List[Request] = [{"backend": backend, "words": words} for backend in ("ctypes", "pykd") for words in asked]
        both.append({"backend": "ctypes", "words": f"{commands[0]} --width 79", "interrupt": 0})
        both += [{"backend": backend, "words": "msr read 0x480"} for backend in ("ctypes", "pykd")]
        sessions[f"{name} dump"] = pool.submit(ask, lab, dumps_dir, windows_path(windows_dumps[name]), both)
    return sessions


def by_core(path: Path, words: str) -> Tuple[int, str]:
    """What the core prints of the dump without a debugger."""
    session = Session(source=str(path), program="vt")
    try:
        outcome = run_words(words.split(), session, lambda report, options: render_text(report, 80))
    finally:
        session.close()
    return outcome.status, outcome.error + "\n" if outcome.error else outcome.text


def body(text: str) -> str:
    """Without the first paragraph's first line or lines, which say who read the memory, and with no other mention of it."""
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if not line or line.startswith("! ")), 0)
    return PROVENANCE.sub("(SOURCE)", "\n".join(lines[start:]))


def facts(text: str) -> Tuple[Any, Any]:
    """Of `source info --json`: memory ranges; registers that every way knows."""
    data = json.loads(text)
    return data["ranges"], [(row["cpu"], row["register"], row["value"]) for row in data["cpus"] if row["register"] != "efer"]


def assert_same(one: Tuple[int, str], other: Tuple[int, str], words: str) -> None:
    assert one[0] == other[0], f"{words}: status {one[0]} and {other[0]}\n{other[1]}"
    if words.endswith("--json"):
        assert facts(one[1]) == facts(other[1])
    else:
        assert body(one[1]) == body(other[1])


@pytest.mark.parametrize(("name", "words"), PAIRS)
def test_the_same_text_from_the_core_and_from_dbgeng(name: str, words: str, windows_dumps: Dict[str, Path], engines: Engines) -> None:
    """Through ctypes, through pykd, and live; the commands find something, so that equal does not mean equally empty."""
    core = by_core(windows_dumps[name], words)
    assert core[0] in (0, 1) and len(core[1]) > 100, core
    dump, live = engines[f"{name} dump"].result(), engines[f"{name} live"].result()
    for answers in (dump.by_command["ctypes", words], dump.by_command["pykd", words], live.by_command["ctypes", words]):
        assert_same(core, answers, words)
    if ("pykd", words) in live.by_command:
        assert_same(core, live.by_command["pykd", words], words)


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, commands in ON_DUMPS.items() for words in commands])
def test_the_same_text_of_a_dump(name: str, words: str, windows_dumps: Dict[str, Path], engines: Engines) -> None:
    core, dump = by_core(windows_dumps[name], words), engines[f"{name} dump"].result()
    assert core[0] in (0, 1) and len(core[1]) > 100, core
    for backend in ("ctypes", "pykd"):
        assert_same(core, dump.by_command[backend, words], words)


def test_every_verb_that_reads_memory_is_compared() -> None:
    compared = {" ".join(words.split()[:2]) for lists in (COMMANDS, ON_DUMPS) for commands in lists.values() for words in commands}
    names = {verb.name for verb in all_verbs()}
    assert {name for name in names if not any(words == name or words.startswith(f"{name} ") for words in compared)} == NOT_COMPARED


@pytest.mark.parametrize("name", COMMANDS)
def test_the_header_says_who_read_the_memory(name: str, engines: Engines) -> None:
    words = COMMANDS[name][0]
    dump, live = engines[f"{name} dump"].result(), engines[f"{name} live"].result()
    for answers, backend, start in ((dump, "ctypes", "complete dump"), (dump, "pykd", "complete dump"), (live, "ctypes", "live kernel"),
                                    (live, "pykd", "live kernel")):
        assert answers.by_command[backend, words][1].startswith(f"{start} through DbgEng ({backend})")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_that_is_not_there_is_one_line(name: str, windows_dumps: Dict[str, Path], engines: Engines) -> None:
    dump, live = engines[f"{name} dump"].result(), engines[f"{name} live"].result()
    core = by_core(windows_dumps[name], MISSING)
    assert core == dump.by_command["ctypes", MISSING] == dump.by_command["pykd", MISSING]
    status, text = live.by_command["ctypes", MISSING]
    assert status == 2 and text == "vt: cannot read 0x80 bytes at physical address 0x3000000000: the target does not answer for it\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_break_is_one_line(name: str, engines: Engines) -> None:
    status, text = engines[f"{name} dump"].result().by_command["ctypes", COMMANDS[name][0] + " --width 79"]
    assert (status, text) == (2, "vt: interrupted (Ctrl-Break)\n")


def test_msrs_come_from_a_live_kernel_only(engines: Engines) -> None:
    """dbgeng's ReadMsr fails on every dump; live it is RDMSR of the kernel: EFER 0xd01 there (SCE, LME, LMA, NXE)."""
    words = "source info --json"
    dump, live = engines["intel dump"].result(), engines["intel live"].result()
    for backend in ("ctypes", "pykd"):
        told = json.loads(dump.by_command[backend, words][1])
        assert told["source"]["msrs"] == "a dump has no MSRs: RDMSR works on a live kernel only"
        assert [row for row in told["cpus"] if row["register"] == "efer"] == []
        shown = json.loads(live.by_command[backend, words][1])
        assert {row["value"] for row in shown["cpus"] if row["register"] == "efer"} == {"0x0000000000000d01"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_processor_is_switched_and_restored(name: str, engines: Engines) -> None:
    """Commands looked at both processors of the live kernel; the one that was selected is again, and so is RIP."""
    live = engines[f"{name} live"].result()
    assert live.stub is not None and live.stub.failure is None
    assert set(live.stub.processors_seen) == {0, 1} and live.stub.processors_seen[-1] == 0
    assert live.end["ctypes"] == live.end["pykd"] == [0, 0xFFFFF80000001000]


def test_no_piece_of_output_is_cut(engines: Engines) -> None:
    assert all(engines[f"{name} {kind}"].result().longest < 16383 for name in COMMANDS for kind in ("dump", "live"))


def test_vmread_by_injection(memories: Dict[str, Segments], engines: Engines) -> None:
    """Every field of the current VMCS by a VMREAD that is written at RIP and stepped over KD; afterwards code and registers are as they were."""
    live = engines["intel live"].result()
    status, text = live.by_command["ctypes", f"{VMREAD} --yes"]
    assert status == 0, text
    read = {row["name"]: int(row["value"], 16) for group in json.loads(text)["vmcs"] for row in group["fields"]}
    page = {item.field.name: item.value for item in vmcs_of(memories["intel"]).values()}
    assert {name: value for name, value in page.items() if value} == {name: value for name, value in read.items() if value}
    assert live.stub is not None and live.stub.failure is None
    kernel, fresh = live.stub.kernel, Kernel(wrap(memories["intel"]))
    assert isinstance(kernel.execute, VmxRoot) and kernel.execute.vmreads >= len(page)
    assert bytes(kernel.context[0][:0x100]) == bytes(fresh.context[0][:0x100])
    assert kernel.image.read_linear(kernel.rip(0) - 16, 64) == fresh.image.read_linear(fresh.rip(0) - 16, 64)


def test_injection_needs_a_yes(engines: Engines) -> None:
    status, text = engines["intel live"].result().by_command["ctypes", VMREAD]
    assert status == 2 and text.startswith("vt: --vmread changes the target for a moment") and text.count("\n") == 1


def test_rdmsr_is_the_engines_own(engines: Engines) -> None:
    """Nothing is injected for it; an MSR that the target refuses is one line, and so is one of a dump."""
    live, faults, dump = engines["intel live"].result(), fault(engines), engines["intel dump"].result()
    for status, text in (live.by_command["ctypes", "msr read 0xc0000080 0x480"], faults["MSR, pykd"]):
        assert status == 0 and "0x0000000000000d01" in text and "0x00da040000000016" in text
    for status, text in (live.by_command["ctypes", "msr read 0x490"], faults["no such MSR, pykd"]):
        assert status == 2 and text.startswith("vt: MSR 0x490: the target refuses RDMSR") and text.count("\n") == 1
    for backend in ("ctypes", "pykd"):
        status, text = dump.by_command[backend, "msr read 0x480"]
        assert status == 2 and text.startswith("vt: the debugger's session is a dump: this needs a live") and text.count("\n") == 1


# --- faults, live -----------------------------------------------------------------------------------------------------------------


def fault(engines: Engines) -> Dict[str, Tuple[int, str]]:
    session = engines["faults"].result()
    assert session.stub is not None and session.stub.failure is None
    return dict(zip(FAULTS, session.in_order))


def test_a_running_target_is_refused(engines: Engines) -> None:
    """The machine runs, as the kernel's side sees it; nothing is read of it, and after the break-in everything is as before."""
    answers, stub = fault(engines), engines["faults"].result().stub
    for name in ("told to run", "told to run, pykd", "runs"):
        assert answers[name] == (2, "vt: the target is running: break in first (Ctrl-Break)\n"), name
    assert stub is not None and stub.ran == 1
    status, text = answers["broken into"]
    assert status == 0 and "0x000006826000  0x000000000000002b" in text


def test_a_search_that_takes_hours_is_not_begun(engines: Engines, memories: Dict[str, Segments]) -> None:
    """16 GiB over KD; a part of it is searched."""
    answers = fault(engines)
    status, text = answers["long search"]
    assert status == 2 and text.count("\n") == 1
    assert re.match(r"vt: searching 16 GiB takes about \d+ (minutes|hours?|days?) through this connection \(\d+\.?\d* MB/s\): give the ", text), text
    status, text = answers["part of it"]
    assert status == 0 and re.search(r"^0x6826000 +vmcs ", text, re.MULTILINE)


def test_an_impatient_debugger_is_answered_once(engines: Engines) -> None:
    """A request that was sent again while its answer was late is executed once, a step above all; the session goes on as if nothing had been."""
    stub = engines["faults"].result().stub
    assert stub is not None and stub.failure is None
    assert set(SLOW) <= set(stub.repeated)


def test_vmread_without_a_patch(engines: Engines, memories: Dict[str, Segments]) -> None:
    """The hypervisor's own VMREAD RAX, RDX is stepped, for every field; no code is written."""
    answers, stub = fault(engines), engines["faults"].result().stub
    status, text = answers["no patch"]
    assert status == 0, text
    read = {row["name"]: int(row["value"], 16) for group in json.loads(text)["vmcs"] for row in group["fields"]}
    page = {item.field.name: item.value for item in vmcs_of(memories["intel"]).values()}
    assert {name: value for name, value in page.items() if value} == {name: value for name, value in read.items() if value}
    assert stub is not None and isinstance(stub.kernel.execute, VmxRoot)
    # At RIP there are only those of the injection that was broken off.
    assert stub.kernel.execute.executed[VMREAD_AT] >= len(page) and stub.kernel.execute.executed.get(CODE, 0) <= 20


def test_ctrl_break_during_an_injection_leaves_the_target_as_it_was(engines: Engines, memories: Dict[str, Segments]) -> None:
    """With an interrupt waiting the engine refuses virtual memory, which would keep the target from being put back."""
    answers, stub = fault(engines), engines["faults"].result().stub
    assert answers["broken injection"] == answers["Ctrl-Break"] == (2, "vt: interrupted (Ctrl-Break)\n")
    assert stub is not None and isinstance(stub.kernel.execute, VmxRoot)
    assert 0 < stub.kernel.execute.executed[CODE] <= 20
    kernel, fresh = stub.kernel, Kernel(wrap([(VMCS, bytes(PAGE))], empty=[(0x100000, 0x400000)]))
    assert bytes(kernel.context[0][:0x100]) == bytes(fresh.context[0][:0x100])
    assert kernel.image.read_linear(CODE - 16, 0x100) == fresh.image.read_linear(CODE - 16, 0x100)


def test_a_read_that_ctrl_break_refuses_is_not_missing_memory(engines: Engines) -> None:
    """dbgeng refuses all reads while a Ctrl-Break waits: what it comes in must not say that the target has no such page."""
    answers = fault(engines)
    for name in ("Ctrl-Break in a read", "Ctrl-Break in a read, pykd"):
        assert answers[name] == (2, "vt: interrupted (Ctrl-Break)\n")
    # One that comes behind the last piece of output is not the next command's.
    assert answers["late Ctrl-Break"] == answers["broken into"] and answers["exit trace"][1].startswith("vt: in WinDbg")


def test_ctrl_break_while_another_processor_is_looked_at(engines: Engines) -> None:
    """The user's processor is selected again, and the Ctrl-Break, which `~0s` takes, is not lost."""
    session = engines["faults"].result()
    assert fault(engines)["Ctrl-Break elsewhere"] == (2, "vt: interrupted (Ctrl-Break)\n")
    assert session.end["ctypes"][0] == session.end["pykd"][0] == 0


def test_exit_trace_is_refused(engines: Engines) -> None:
    status, text = fault(engines)["exit trace"]
    assert status == 2 and text.startswith("vt: in WinDbg nothing is run to an address") and text.count("\n") == 1


def test_registers_of_every_processor(engines: Engines) -> None:
    """As the kernel's KPRCBs say, through both backends, of a dump and live; EFER and the other MSRs live only."""
    for kind in ("dump", "live"):
        for found in engines[f"intel {kind}"].result().end["registers"].values():
            for number, registers in enumerate(found):
                area = PCR + number * PCR_STRIDE
                expected = {"rip": NT + 0x1000 + number, "cr0": 0x80050031, "cr4": 0x426F8, "cr8": CR8, "gdtr_base": area + GDT, "gdtr_limit": 0x4F,
                            "idtr_base": area + IDT, "idtr_limit": 0x7FF, "tr_selector": 8 * TSS_SLOT, "ldtr_selector": LDT_SELECTOR}
                assert {name: registers[name] for name in expected} == expected
                assert registers["cr3"] > 0 and registers["cr3"] % PAGE == 0
                assert registers["efer"] == (0xD01 if kind == "live" else None)
                assert registers["gs_base"] == (PCR if kind == "live" else None) and registers["lstar"] is None


@pytest.fixture(scope="module")
def debugger(lab: Lab, windows_dumps: Dict[str, Path], dumps_dir: Path, engines: Engines, pool: ThreadPoolExecutor) -> "Future[Dict[str, str]]":
    """A session in the debugger's own process: pykd loaded, the alias as `vtdbg windbg` says, commands typed.  Command -> output."""
    return pool.submit(typed_commands, lab, windows_dumps["intel"], dumps_dir)


@pytest.fixture(scope="module")
def output(debugger: "Future[Dict[str, str]]") -> Dict[str, str]:
    return debugger.result()


SCRIPTS = ("modules", "reading", "writing", "reading_by_pykd")


def typed_commands(lab: Lab, dump: Path, folder: Path) -> Dict[str, str]:
    told = lab.run_python("program.py", "vtdbg", "windbg", "--out", windows_path(folder / "script"))
    typed = [line for line in told.splitlines() if line.startswith((".load", ".prefer_dml", "aS "))]
    assert len(typed) == 3, told
    commands = [typed[0], typed[2], "vt vmcs get GUEST_RIP --at 0x6826000", 'vt vmcs get "GUEST_RIP" --at "0x6826000"',
                "vt gdt decode 0x00209b0000000000", "~1s", "vt gdt dump --cpu 0",
                "r rip", "vt exit reasons", "vt phys @rip-@rip+0x6826000", "vt vmcs get NOBODY", "vt", typed[1], "!dml vt vmcs list",
                "!dml vt ept walk 0x1000 --vmcs 0x6826000", "!dml vt vmcs dump 0x6826000 --layout bochs_2.7",
                "!dml vt vmcs get GUEST_RIP --json --at 0x6826000", ".prefer_dml 0", "!dml vt vmcs list --width 81"]
    commands += [f"{command} --width 80" for _, command, _ in documented()]
    # The bare pykd.pyd gives scripts no arguments.
    program = (HERE / "in_debugger.py").read_text()
    for name in SCRIPTS:
        script = folder / f"{name}.py"
        paths = [windows_path(path) for path in (ROOT, ROOT / "windbg_plugin")]
        script.write_text(f"import sys\nsys.path[:0] = [path for path in {paths!r} if path not in sys.path]\nsys.argv = ['', {name!r}]\n{program}")
        commands.append(f"!py -g {windows_path(script)}")
    outputs = lab.run_host(windows_path(dump), *commands)
    shown = [*(command.replace("!dml ", "dml ") for command in commands[:-len(SCRIPTS)]), *SCRIPTS]
    return dict(zip(shown, outputs))


def documented() -> List[Tuple[Path, str, str]]:
    """(document, command, output) of every block that begins with "kd> vt"."""
    return [(path, found.group(1), found.group(2)) for path in (ROOT / "README.md", ROOT / "docs/windbg.md")
            for found in re.finditer(r"^```\nkd> (vt [^\n]*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)]


def test_documented_sessions_are_real(output: Dict[str, str]) -> None:
    """What README.md and docs/windbg.md show is what the debugger prints.  VTDBG_UPDATE_GOLDEN=1 rewrites them."""
    assert len(documented()) >= 4
    for path, command, text in documented():
        real = output[f"{command} --width 80"].strip("\n") + "\n"
        if os.environ.get("VTDBG_UPDATE_GOLDEN"):
            path.write_text(path.read_text().replace(f"```\nkd> {command}\n{text}```", f"```\nkd> {command}\n{real}```"))
        else:
            assert text == real, f"{path.name}: {command}"


def test_the_alias_carries_the_words(output: Dict[str, str], windows_dumps: Dict[str, Path]) -> None:
    """`!py` of the bare pykd.pyd passes empty strings; through the alias the words arrive, quoted ones too, and no word of an earlier command."""
    words = "vmcs get GUEST_RIP --at 0x6826000"
    assert body(output[f"vt {words}"].rstrip("\n")) == body(by_core(windows_dumps["intel"], words)[1])
    assert output['vt vmcs get "GUEST_RIP" --at "0x6826000"'] == output[f"vt {words}"]
    assert "code" in output["vt gdt decode 0x00209b0000000000"]
    assert output["vt"].startswith("usage: vt GROUP VERB")


def test_the_users_processor_stays_selected(output: Dict[str, str]) -> None:
    """After ~1s a command that looks at processor 0 leaves the debugger at processor 1, whose RIP is another."""
    assert "GDT of processor 0" in output["vt gdt dump --cpu 0"]
    assert output["r rip"].strip() == "rip=fffff80000001001"


def test_expressions_of_the_debugger_are_numbers(output: Dict[str, str]) -> None:
    assert "0x000006826000" in output["vt phys @rip-@rip+0x6826000"]


def test_a_typo_is_one_line(output: Dict[str, str]) -> None:
    assert output["vt vmcs get NOBODY"].strip() == "vt: unknown VMCS field 'NOBODY'"


def test_long_output_arrives_whole(output: Dict[str, str]) -> None:
    """dbgeng keeps 16,383 characters of one call."""
    session = Session(program="vt")
    whole = run_words(["exit", "reasons"], session, lambda report, options: render_text(report, 80)).text
    assert len(whole) > 16383
    assert output["vt exit reasons"].strip() == whole.strip()


def test_dml_reaches_the_window(output: Dict[str, str], windows_dumps: Dict[str, Path]) -> None:
    """The engine delivers what it parsed as DML (\\x03); what is shown is the plain text; a click on a VMCS runs the next command."""
    told = output["dml vt vmcs list"].replace("\x03", "").replace("\x04", "")
    assert '<exec cmd="vt vmcs dump 0x6826000">0x6826000</exec>' in told
    assert body(re.sub(r"<[^>]*>", "", told).rstrip("\n")) == body(by_core(windows_dumps["intel"], "vmcs list")[1])
    walk = output["dml vt ept walk 0x1000 --vmcs 0x6826000"]
    assert re.search(r'<exec cmd="vt phys 0x[0-9a-f]+">0x001e3d000</exec>', walk)


def test_the_fields_of_a_vmcs_are_links(output: Dict[str, str], windows_dumps: Dict[str, Path]) -> None:
    """Addresses run the command that shows what lies there, with the layout that the user forced."""
    told = output["dml vt vmcs dump 0x6826000 --layout bochs_2.7"].replace("\x03", "").replace("\x04", "")
    for command in ("ept dump --eptp 0x685105e", "msrbitmap dump --at 0x6827000", "exit explain 0x6826000", "gdt dump --vmcs 0x6826000"):
        assert f'<exec cmd="vt {command} --layout bochs_2.7">' in told
    core = by_core(windows_dumps["intel"], "vmcs dump 0x6826000 --layout bochs_2.7")[1]
    assert body(html.unescape(re.sub(r"<[^>]*>", "", told)).rstrip("\n")) == body(core)


def test_ctrl_break_in_the_debugger_is_one_line(output: Dict[str, str]) -> None:
    """While memory is read, and between two pieces of output; where the engine's interrupt is pykd's to take it comes as SystemExit."""
    for name in ("reading", "writing", "reading_by_pykd"):
        lines = [line for line in output[name].splitlines() if line.startswith(("vt:", "status"))]
        assert lines == ["vt: interrupted (Ctrl-Break)", "status 2"], output[name]
        assert "Traceback" not in output[name]
    assert "host RIP" not in output["reading"] + output["reading_by_pykd"]
    assert 15000 < len(output["writing"]) < len(output["vt exit reasons"])


def test_as_the_bootstrapper_runs_it(output: Dict[str, str], windows_dumps: Dict[str, Path]) -> None:
    """`!py -g -m vtdbg_windbg WORDS`: by runpy, with an empty argv[0], below 500 calls; a refusal is a line, not a traceback of SystemExit."""
    parts = output["modules"].split("[-m ")[1:]
    told = {words: text.rstrip("\n") for words, _, text in (part.partition("]\n") for part in parts)}
    for words in ("vmcs get GUEST_RIP --at 0x6826000", "vmcs dump 0x6826000"):
        assert body(told[words]) == body(by_core(windows_dumps["intel"], words)[1])
    assert told["vmcs get NOBODY"] == "vt: unknown VMCS field 'NOBODY'"


def test_json_and_plain_text_have_no_tags(output: Dict[str, str]) -> None:
    assert "<" not in output["dml vt vmcs get GUEST_RIP --json --at 0x6826000"]
    assert "<" not in output["dml vt vmcs list --width 81"]


NO_USE = {
    "-": "vt: the debugger has no target: open a kernel dump (-z MEMORY.DMP) or attach to a kernel",
    "process": "vt: a user-mode session has no physical memory and no control registers: open a kernel dump or attach to a kernel",
    "x86": "vt: the target is 32-bit x86, not x86-64: its hypervisor structures are not read here",
}


@pytest.fixture(scope="module")
def refusals(lab: Lab, dumps_dir: Path, debugger: "Future[Dict[str, str]]", pool: ThreadPoolExecutor) -> "Dict[str, Future[List[str]]]":
    """What both backends say in sessions of no use."""
    old = dumps_dir / "x86.dmp"
    old.write_bytes(dumps.windows32([(0x1000, bytes(0x20000))]))
    targets = {"-": "-", "process": f"proc:{windows_path(lab.python / 'python.exe')}", "x86": windows_path(old)}

    def typed(target: str) -> List[str]:
        debugger.result()
        alias = f"aS vt $$>a<{windows_path(dumps_dir / 'script' / 'vt.wds')}"
        return lab.run_host(target, lab.load, alias, "vt vmcs list", "vt --backend pykd vmcs list")[2:]

    return {name: pool.submit(typed, target) for name, target in targets.items()}


@pytest.mark.parametrize("name", NO_USE)
def test_sessions_that_cannot_work_are_refused_in_one_line(name: str, refusals: "Dict[str, Future[List[str]]]") -> None:
    """No target, a user-mode process, a 32-bit kernel: each is opened for real, and asked through both backends."""
    for told in refusals[name].result():
        assert [found for found in told.splitlines() if found.startswith("vt:")] == [NO_USE[name]], told
        assert "Traceback" not in told


@pytest.fixture(scope="module")
def others(lab: Lab, windows_dumps: Dict[str, Path], dumps_dir: Path, refusals: "Dict[str, Future[List[str]]]",
           pool: ThreadPoolExecutor) -> "Dict[str, Future[str]]":
    """`python -m vtdbg_windbg` beside the debugger: on a dump, at the `.server` of a debugger, and by itself."""
    dump = windows_path(windows_dumps["intel"])

    def remote() -> str:
        port, served = free_port(), dumps_dir / "served"
        with ThreadPoolExecutor(1) as beside:
            server = beside.submit(lab.run_host, dump, f".server tcp:port={port}", f"!serve {windows_path(served)}")
            try:
                while not Path(f"{served}.ready").exists():
                    assert not server.done(), server.result()
                    time.sleep(0.05)
                return lab.run_python("program.py", "vtdbg_windbg", "--remote", f"tcp:server=127.0.0.1,port={port}", *WALK.split())
            finally:
                served.touch()
                server.result()

    return {
        "remote": pool.submit(remote),
        "own": pool.submit(lab.run_python, "program.py", "vtdbg_windbg", "-z", dump, *WALK.split()),
        "lonely": pool.submit(lab.run_python, "program.py", "vtdbg_windbg", "vmcs", "list"),
        "module": pool.submit(lab.run_module, "vtdbg_windbg", "-z", dump, *WALK.split()),
    }


WALK = "ept walk 0x1000 --vmcs 0x6826000"


def test_a_python_of_its_own_opens_a_dump_or_a_server(windows_dumps: Dict[str, Path], others: "Dict[str, Future[str]]") -> None:
    """Without pykd: `-z DUMP`, and `--remote` to the `.server` of a debugger; for Pythons that pykd is not made for."""
    core = by_core(windows_dumps["intel"], WALK)[1]
    assert body(others["own"].result()) == body(others["remote"].result()) == body(core) + "\nstatus 0"
    assert body(others["module"].result()) == body(core).rstrip("\n")
    assert others["lonely"].result().strip().splitlines()[0].startswith("vt: this Python does not run in a debugger")


def free_port() -> int:
    """Below those that the system gives away by itself, of which another program could have it by the time that the debugger wants it."""
    for port in random.Random().sample(range(20000, 30000), 1000):
        with suppress(OSError), socket.create_server(("0.0.0.0", port)):
            return port
    raise AssertionError("no free port")


def test_live_reads_are_cached(memories: Dict[str, Segments], engines: Engines) -> None:
    """A page is asked for once in a command, in two packets of at most 4,000 bytes: not once for each entry of a table."""
    live = engines["intel live"].result()
    assert live.stub is not None
    pages = sum(len(data) for _, data in memories["intel"]) // PAGE + 0x100
    scans = 14
    assert live.stub.requests[READ_PHYSICAL] < 2 * 2 * pages + scans * 60
    assert live.stub.requests[READ_VIRTUAL] < 2000


def test_image_is_what_the_fixture_holds(memories: Dict[str, Segments]) -> None:
    """The lab's own wrapping changes no byte of the memory that it wraps."""
    for segments in memories.values():
        image: Image = wrap(segments)
        for address, data in segments:
            assert image.read(address, len(data)) == data
