"""`vtdbg shell`: through a terminal as a person uses it, and with commands piped in."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from support.live import PATIENCE

from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.render.text import render_text
from vtdbg.shell import PROMPT, Shell

pty = pytest.importorskip("pty")
pytest.importorskip("readline")


def piped(text: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "vtdbg", "shell", *words], input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)


# --- without a terminal -----------------------------------------------------------------------------------------------------------


def test_piped_lines_print_what_the_commands_print(intel_plain: Path) -> None:
    """The same command, the same text; comments and empty lines are allowed; the status is the worst one."""
    done = piped("# which VMs?\n\nvmcs list\nvmcs get GUEST_RIP --at 0x6826000\n", "-s", str(intel_plain))
    expected = ""
    session = Session(str(intel_plain))
    for words in (["vmcs", "list"], ["vmcs", "get", "GUEST_RIP", "--at", "0x6826000"]):
        expected += run_words(words, session, lambda report, _options: render_text(report, 80)).text
    session.close()
    assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0)


def test_errors_are_one_line_each_and_the_shell_goes_on(intel_plain: Path) -> None:
    done = piped("vmcs lsit\nvmcs get GUEST_RPI\nnothing\n\"\nvmcs get GUEST_RIP --at 0x6826000\n", "-s", str(intel_plain))
    assert len(done.stderr.splitlines()) == 4 and all(line.startswith("vtdbg: ") for line in done.stderr.splitlines())
    assert "did you mean" in done.stderr and "no closing quotation" in done.stderr
    assert "GUEST_RIP" in done.stdout and done.returncode == 2


def test_the_source_can_be_switched_and_stays_where_the_new_one_cannot_be_opened(intel_plain: Path, amd_exit: Path) -> None:
    lines = ["vmcs get GUEST_RIP --at 0x6826000", f"source {amd_exit}", "vmcb get rip", "source /no/such/dump", "vmcb get asid", "source info",
             "exit", "vmcs list"]
    done = piped("\n".join(lines), "-s", str(intel_plain))
    assert [word for word in ("GUEST_RIP", "rip  0x", "asid  0x", "ELF core") if word not in done.stdout] == []
    assert done.stderr.count("\n") == 1 and "/no/such/dump: cannot be opened" in done.stderr
    assert "no VMCS found" not in done.stdout


def test_no_source_and_bad_options_are_said() -> None:
    done = piped("vmcs list\n")
    assert "name a dump with -s FILE" in done.stderr and done.returncode == 2
    done = piped("", "--jsno")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--source" in piped("", "--help").stdout


def test_ctrl_c_in_a_command_ends_the_command_only() -> None:
    def stop(_report: object, _options: object) -> str:
        raise KeyboardInterrupt

    shell = Shell(Session(), stop)
    assert shell.run("vmcs layouts") == 2 and shell.run("exit") is None


# --- completion -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(intel_plain: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    session = Session(str(intel_plain))
    shell = Shell(session, lambda report, _options: render_text(report, 80))
    shell.run("vmcs list")
    capsys.readouterr()
    yield shell
    session.close()


def test_completion_of_everything_that_can_stand_there(shell: Shell, tmp_path: Path) -> None:
    """Groups, verbs, options, their choices, fields, files, layouts, and addresses that were printed."""
    (tmp_path / "dump_one").mkdir()
    (tmp_path / "dump two").mkdir()
    (tmp_path / "dump.raw").write_bytes(b"x")
    expected: Dict[str, List[str]] = {
        "vmcs |li": ["list"], "|vmc": ["vmcb", "vmcs"], "|ex": ["exit"], "help |vmcs": ["vmcs"], "help vmcs |la": ["layout", "layouts"],
        "vmcs dump |--gro": ["--group"], "vmcs dump --group |h": ["host"], "vmcs get |guest_ri": ["GUEST_RIP"], "vmcb get |exit_info_": [
            "exit_info_1", "exit_info_2"], "vmcs dump |0x682": ["0x6826000"], "ept walk |0x6bd9": ["0x6bd9000"],
        "ept walk 0x1000 --eptp |0x685": ["0x685105e"], "vmcs list --layout |bochs_2.7": ["bochs_2.7"],
            "vmcs lits |x": [], "nonsense |x": [], '"|x': []}
    for line, words in expected.items():
        before, _, prefix = line.partition("|")
        assert shell.complete(before, prefix) == words, line
    for before in ("source ", "vmcs list -s ", "vmcs dump --text "):
        assert shell.complete(before, f"{tmp_path}/dump") == [f"{tmp_path}/dump.raw", f"{tmp_path}/dump_one/"], before


def test_the_addresses_that_are_kept_are_bounded(shell: Shell) -> None:
    shell._remember(" ".join(f"{number:#x}" for number in range(0x10000, 0x12000)))
    assert len(shell.addresses) == 4096 and shell.addresses[-1] == "0x11fff"


# --- at a terminal ----------------------------------------------------------------------------------------------------------------


class Terminal:
    """A shell behind a pseudo-terminal: what a person types and sees."""

    def __init__(self, source: Path, history: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "VTDBG_HISTORY": str(history), "COLUMNS": "200", "INPUTRC": os.devnull}
        self.process = subprocess.Popen([sys.executable, "-m", "vtdbg", "shell", "-s", str(source)], stdin=slave, stdout=slave, stderr=slave,
                                        env=environment, start_new_session=True, preexec_fn=_controlling)
        os.close(slave)
        self.seen = ""

    def appears(self, words: str, patience: float) -> bool:
        end = time.monotonic() + patience
        while words not in self.seen:
            if time.monotonic() > end:
                return False
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:
                    data = b""
                assert data, f"no {words!r} in {self.seen!r}"
                # All of it: an escape sequence can come in two pieces.
                self.seen = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\a]", "", self.seen + data.decode())
        return True

    def until(self, words: str) -> str:
        """What appears up to `words`."""
        assert self.appears(words, PATIENCE), f"no {words!r} in {self.seen!r}"
        at = self.seen.index(words) + len(words)
        before, self.seen = self.seen[:at], self.seen[at:]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self, send: Callable[[], None]) -> None:
        """Until there is a prompt: Python's readline does not notice a signal that comes when it is about to wait for a key."""
        for _ in range(int(PATIENCE / 10)):
            send()
            if self.appears(PROMPT, 10):
                break
        self.until(PROMPT)

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            os.close(self.master)


def _controlling() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_person_completes_repeats_interrupts_and_leaves(intel_plain: Path, tmp_path: Path) -> None:
    """Tab completes a verb, a field and an address that was printed; the arrow repeats; Ctrl-C clears the line; Ctrl-D leaves.  The next shell
    has the history."""
    history = tmp_path / "state" / "history"
    terminal = Terminal(intel_plain, history)
    terminal.until("raw image, 128 MiB\n")
    terminal.until(PROMPT)
    terminal.type("vmcs lis\t\n")
    assert "vmcs list" in terminal.until("VMs: VMCSs")
    terminal.until(PROMPT)
    terminal.type("vmcs get GUEST_RI\t--at 0x682\t\n")
    shown = terminal.until(PROMPT)
    assert "GUEST_RIP --at 0x6826000" in shown and re.search(r"GUEST_RIP  0x[0-9a-f]{16}", shown)
    terminal.type("\x1b[A\n")
    assert re.search(r"GUEST_RIP  0x[0-9a-f]{16}", terminal.until(PROMPT))
    terminal.type("vmcs nonsense")
    terminal.until("nonsense")
    terminal.interrupt(lambda: terminal.type("\x03"))
    terminal.type("caps\n")
    terminal.until("capability MSRs")
    terminal.until(PROMPT)
    terminal.type("\x04")
    assert terminal.end() == 0
    lines = history.read_text().splitlines()
    assert [line.rstrip() for line in lines] == ["vmcs list", "vmcs get GUEST_RIP --at 0x6826000", "caps"]
    again = Terminal(intel_plain, history)
    again.until(PROMPT)
    again.type("\x1b[A\n")
    again.until("capability MSRs")
    again.until(PROMPT)
    again.type("exit\n")
    assert again.end() == 0


def test_a_signal_at_the_prompt_does_not_end_the_shell(intel_plain: Path, tmp_path: Path) -> None:
    terminal = Terminal(intel_plain, tmp_path / "history")
    terminal.until(PROMPT)
    terminal.interrupt(lambda: terminal.process.send_signal(signal.SIGINT))
    terminal.type("quit\n")
    assert terminal.end() == 0
