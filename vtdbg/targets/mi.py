"""A gdb of our own, driven through MI by pygdbmi: `vtdbg -s gdb:HOST:PORT`.

Ending gdb detaches, and QEMU resumes a target that is detached.  So the port always says `disconnect` first, and gdb is started so that it is
killed rather than told to quit when this process dies: a connection that breaks leaves the target stopped.
"""

from __future__ import annotations

import os
import select
import shutil
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from vtdbg.errors import UsageError
from vtdbg.targets.gdbtext import GdbPort, error_of
from vtdbg.targets.interrupts import held_back, waiting_at_most
from vtdbg.targets.port import TargetError, TargetGone, unavailable

if TYPE_CHECKING:
    from pygdbmi.gdbcontroller import GdbController

PATIENCE = 20.0
"""Seconds that gdb may take for one command; its own remote timeout is shorter."""
SETTINGS = ("confirm off", "pagination off", "height 0", "width 0", "auto-load off", "remotetimeout 5", "tcp auto-retry off",
            "architecture i386:x86-64")
NOBODY = "no answer from the stub at {endpoint} within {seconds:.0f} s: it serves one debugger, is another one connected?"


def _command(gdb: str) -> List[str]:
    # A Ctrl-C of the terminal is for this process, not for gdb (setsid); gdb must not outlive it and detach (the parent-death signal).
    prefix = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    prefix += ["setsid"] if shutil.which("setsid") else []
    return [*prefix, gdb, "--nx", "--quiet", "--interpreter=mi3"]


def _stopped(records: List[Dict[str, Any]]) -> bool:
    return any(item["type"] == "notify" and item["message"] == "stopped" for item in records)


class MiPort(GdbPort):
    """`endpoint` is "HOST:PORT" of a gdbstub that nobody else is connected to."""

    name = "gdb (MI)"

    def __init__(self, endpoint: str, gdb: Optional[str] = None, patience: float = PATIENCE) -> None:
        from pygdbmi.gdbcontroller import GdbController

        program = gdb or os.environ.get("VTDBG_GDB", "gdb")
        if shutil.which(program) is None:
            raise TargetError(f"{program} is not installed: a live source needs GDB 11 or newer (VTDBG_GDB names another one)")
        self._endpoint, self._patience, self._token = endpoint, patience, 0
        self._unread: List[Dict[str, Any]] = []
        self._gdb: "Optional[GdbController]" = GdbController(_command(program), time_to_check_for_additional_output_sec=0.0001)
        try:
            for setting in SETTINGS:
                self.execute(f"set {setting}")
            self._connect(endpoint)
        except BaseException:
            self._end()
            raise

    def _connect(self, endpoint: str) -> None:
        started = time.monotonic()
        try:
            self._ask(f"-target-select remote {endpoint}", min(self._patience, 12.0))
        except TargetGone as error:
            if "refused" in str(error).lower() or time.monotonic() - started < 1:
                raise TargetError(f"nothing to connect to at {endpoint}: {error}") from error
            raise TargetError(NOBODY.format(endpoint=endpoint, seconds=time.monotonic() - started)) from error
        except TargetError as error:
            if "refused" in str(error).lower():
                raise TargetError(f"nothing to connect to: nobody listens at {endpoint}") from error
            if time.monotonic() - started > 4:
                raise TargetError(NOBODY.format(endpoint=endpoint, seconds=time.monotonic() - started)) from error
            raise TargetError(f"cannot connect to {endpoint}: {error}") from error

    def execute(self, command: str) -> str:
        quoted = command.replace("\\", "\\\\").replace('"', '\\"')
        return self._text(self._ask(f'-interpreter-exec console "{quoted}"'))

    @staticmethod
    def _text(records: List[Dict[str, Any]]) -> str:
        return "".join(str(item["payload"]) for item in records if item["type"] in ("console", "target") and item["payload"] is not None)

    def _ask(self, command: str, patience: Optional[float] = None) -> List[Dict[str, Any]]:
        """The records up to the result of this very command: the answers of commands that a Ctrl-C cut short are passed over."""
        gdb = self._gdb
        if gdb is None:
            raise TargetGone("the connection is closed")
        self._token += 1
        token = last = self._token
        records: List[Dict[str, Any]] = []
        self._write(gdb, f"{token}{command}")
        end = time.monotonic() + (patience or self._patience)
        while True:
            if not self._unread:
                self._fill(gdb, end)
            while self._unread:
                # What comes with the result and behind it (a stop) is for who asks next.
                record = self._unread.pop(0)
                records.append(record)
                if record["type"] != "result":
                    continue
                if record.get("token") in (token, last):
                    if record["message"] == "error":
                        raise error_of(str((record.get("payload") or {}).get("msg", "")), self._endpoint)
                    if record["message"] != "running" or not command.startswith("-interpreter-exec"):
                        return records
                    # A console command that resumes is answered when it resumes, and goes on: it is over when the next one is answered.
                    self._token = last = token + 1
                    self._write(gdb, f"{last}-list-features")
                else:
                    records.clear()
            if time.monotonic() > end:
                raise TargetGone(f"no answer from the target within {patience or self._patience:.0f} s ({command[:60]})")

    @staticmethod
    def _write(gdb: "GdbController", line: str) -> None:
        try:
            gdb.write(line, read_response=False)
        except OSError as error:
            raise TargetGone(f"gdb has ended: {error}") from error

    def _fill(self, gdb: "GdbController", end: float) -> None:
        """Adds what gdb has said to `_unread`; waits for it, but not past `end` and not for long, so that the caller can look at the time."""
        wait = max(min(end - time.monotonic(), 0.5), 0.001)
        if os.name == "posix":
            # The wait can be interrupted; reading cannot: pygdbmi would lose what it has taken from the pipe, and read the rest of a line as a line.
            select.select(gdb.io_manager.read_list, [], [], wait)
            wait = 0.0
        with held_back():
            try:
                found: List[Dict[str, Any]] = gdb.get_gdb_response(timeout_sec=wait, raise_error_on_timeout=False)
            except ValueError:
                # A Ctrl-C can be held back from this thread only: where another one took it, the rest of a line may stand here, of a command
                # whose answer nobody waits for any more.
                found = []
            self._unread += found
        if not found and gdb.gdb_process is not None and gdb.gdb_process.poll() is not None:
            raise TargetGone(f"gdb has ended with status {gdb.gdb_process.returncode}")

    def read_virtual(self, address: int, size: int) -> bytes:
        try:
            records = self._ask(f"-data-read-memory-bytes {address:#x} {size}")
        except TargetGone:
            raise
        except TargetError as error:
            raise unavailable(address, size, str(error)) from error
        memory = (records[-1].get("payload") or {}).get("memory", [])
        data = b"".join(bytes.fromhex(block["contents"]) for block in memory)
        if len(data) != size:
            raise unavailable(address + len(data), size - len(data), "GDB reads no further")
        return data

    def write_virtual(self, address: int, data: bytes) -> None:
        try:
            self._ask(f"-data-write-memory-bytes {address:#x} {data.hex()}")
        except TargetGone:
            raise
        except TargetError as error:
            raise unavailable(address, len(data), str(error)) from error

    def load_symbols(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                if file.read(4) != b"\x7fELF":
                    raise UsageError(f"{path} is no ELF file: symbols for GDB are (`kvm symbols` makes one)")
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
        quoted = os.path.abspath(path).replace("\\", "\\\\").replace('"', '\\"')
        self.execute(f'add-symbol-file "{quoted}"')

    def endpoint(self) -> Optional[str]:
        return self._endpoint

    def step(self) -> None:
        with self.stepping(), waiting_at_most():
            self._until_stopped("-exec-step-instruction", self._patience)

    def _resume(self, timeout: Optional[float]) -> None:
        self._until_stopped("-exec-continue", timeout or 3600.0)

    def _until_stopped(self, command: str, patience: float) -> None:
        records = self._ask(command)
        end = time.monotonic() + patience
        gdb = self._gdb
        try:
            while gdb is not None and not _stopped(records):
                if not self._unread:
                    self._fill(gdb, end)
                records, self._unread = self._unread, []
                if time.monotonic() > end:
                    raise TargetError(f"the target did not stop within {patience:.0f} s")
        except (TargetError, KeyboardInterrupt):
            self._interrupt()
            raise

    def _interrupt(self) -> None:
        gdb = self._gdb
        if gdb is None or gdb.gdb_process is None or gdb.gdb_process.poll() is not None:
            return
        import signal

        os.kill(gdb.gdb_process.pid, signal.SIGINT)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            self._fill(gdb, end)
            records, self._unread = self._unread, []
            if _stopped(records):
                return

    def close(self) -> None:
        if self._gdb is None:
            return
        try:
            self._ask("-target-disconnect")
        except TargetError:
            pass
        finally:
            self._end()

    def _end(self) -> None:
        gdb, self._gdb = self._gdb, None
        process = gdb.gdb_process if gdb is not None else None
        if gdb is None or process is None:
            return
        # Killed, not asked: a gdb that ends by itself detaches, and a detached QEMU runs.
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        gdb.gdb_process = None
