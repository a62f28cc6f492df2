"""A real gdb with the plugin in it, driven by pygdbmi; a command line of vtdbg; a wire that can be cut."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Iterator, List, Optional

import pytest

from support.live import PATIENCE
from vtdbg.targets.mi import MiPort
from vtdbg.targets.port import TargetError
from vtdbg.targets.start import gdb_environment, plugin_file


@contextmanager
def plugged(port: int, *before: str, patience: float = PATIENCE) -> Iterator[MiPort]:
    """A gdb connected to the stub at `port` of this machine, with the plugin sourced; disconnected at the end."""
    os.environ["VTDBG_SITE"] = gdb_environment()["VTDBG_SITE"]
    gdb = MiPort(f"127.0.0.1:{port}", patience=patience)
    try:
        for command in (*before, f"source {plugin_file()}"):
            said = gdb.execute(command)
            assert "vtdbg:" not in said, said
        yield gdb
    finally:
        gdb.close()


def error(gdb: MiPort, command: str) -> str:
    """The one line that a command fails with."""
    with pytest.raises(TargetError) as raised:
        gdb.execute(command)
    text = str(raised.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def vtdbg(*words: str, status: Optional[int] = 0) -> str:
    """What `vtdbg WORDS` prints; on the error stream where the status is 2."""
    done = subprocess.run([sys.executable, "-m", "vtdbg", *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert status is None or done.returncode == status, (done.returncode, done.stderr)
    return done.stderr if done.returncode == 2 else done.stdout


def body(text: str) -> str:
    """A report without its head: where it is from and what has to be said of that (up to the first blank line)."""
    return text.partition("\n\n")[2]


class Wire:
    """A TCP relay to the stub at `port` that can be cut after a number of packets that begin with `after`."""

    def __init__(self, port: int, after: bytes = b"", count: int = 0) -> None:
        self._target, self._after, self._left = port, after, count
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._ends: List[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def count_down(self, count: int) -> None:
        """Cut after that many packets from now on."""
        self._left = count

    def _serve(self) -> None:
        """One connection behind the other; only the first one is cut."""
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ends = [near, far]
            back = threading.Thread(target=self._relay, args=(far, near), daemon=True)
            back.start()
            self._relay(near, far, counted=True)
            back.join()
            near.close()
            far.close()
            self._after = b""

    def passing(self, data: bytes, to_stub: bool) -> None:
        """Before data are handed on."""

    def passed(self, to_stub: bool) -> None:
        """After data have been handed on."""

    def _relay(self, source: socket.socket, sink: socket.socket, counted: bool = False) -> None:
        while True:
            try:
                data = source.recv(65536)
                if counted and self._after and self._after in data:
                    self._left -= data.count(self._after)
                    if self._left < 0:
                        data = b""
                if not data:
                    break
                self.passing(data, counted)
                sink.sendall(data)
                self.passed(counted)
            except OSError:
                break
        self.cut()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self.cut()
        for end in [*self._ends, self._listener]:
            end.close()
