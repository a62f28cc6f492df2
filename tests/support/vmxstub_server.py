"""A live VMX target: a processor model in VMX root operation behind a gdbstub, with a small hypervisor in its memory.

Run by `vmxstub.py` in the processor model's interpreter: vmxstub_server.py DIALECT.  DIALECT "vmware" answers `monitor phys` and
`monitor virt` and shows control registers; "plain" has neither, like Bochs' own stub.  When it listens it prints "READY", its port and
the layout of the VMCS.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from pathlib import Path
from typing import Dict, List, Optional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "vmxcpu"), str(HERE.parent)]

import bochscpu  # noqa: E402
import bochscpu.cpu  # noqa: E402
from places import DATA, EPT_PD, EPT_PML4, PDPT, STACK, VMCS  # noqa: E402
from processor import Processor  # noqa: E402

from support.vmxcpu.guests import baseline  # noqa: E402

START, HANDLER, GUEST, GUEST_PML4, SCRATCH, STAGING = 0x1A000, 0x1A400, 0x1B000, 0x1C000, 0x1D000, 0x1E000
REMAPPED, REMAPPED_TO, HOLE = 0x400000, 0x600000, 0x800000
"""Guest-physical 2 MiB that EPT maps elsewhere, and 2 MiB that it does not map."""

LAUNCH = bytes.fromhex("0f01c2") + b"\xf4"
HANDLE = b"".join(bytes.fromhex(part) for part in (
    "50", "51", "52",                   # push rax, rcx, rdx
    "b902440000", "0f78c8",             # vmread rax, [EXIT_REASON]
    "b90c440000", "0f78ca",             # vmread rdx, [VM_EXIT_INSTRUCTION_LEN]
    "b91e680000", "0f78c8",             # vmread rax, [GUEST_RIP]
    "4801d0", "0f79c8",                 # add rax, rdx; vmwrite [GUEST_RIP], rax
    "5a", "59", "58", "0f01c3", "f4"))  # pop; vmresume
GUEST_LOOP = b"".join(bytes.fromhex(part) for part in (
    "31c0", "0fa2",                     # cpuid leaf 0
    "0f01c1",                           # vmcall
    "b910000000", "0f32",               # rdmsr 0x10
    )) + bytes.fromhex("488b0425") + struct.pack("<I", HOLE + 0x123) + b"\xf4"     # mov rax, [HOLE + 0x123]; hlt
GUEST_CODE = GUEST_LOOP + b"\xeb" + struct.pack("b", -(len(GUEST_LOOP) + 2))

CORE = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)), "rip"]
SEGMENTS = ["cs", "ss", "ds", "es", "fs", "gs"]
SYSTEM = ["fs_base", "gs_base", "k_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"]
FLOAT = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"]


def description() -> str:
    kinds = {"rip": "code_ptr", "rsp": "data_ptr", "rbp": "data_ptr"}
    rows = [f'<reg name="{name}" bitsize="64" type="{kinds.get(name, "int64")}"/>' for name in CORE]
    rows += [f'<reg name="{name}" bitsize="32" type="int32"/>' for name in ["eflags", *SEGMENTS]]
    rows += [f'<reg name="st{number}" bitsize="80" type="i387_ext"/>' for number in range(8)]
    rows += [f'<reg name="{name}" bitsize="32" type="int" group="float"/>' for name in FLOAT]
    rows += [f'<reg name="{name}" bitsize="64" type="int64"/>' for name in SYSTEM]
    return ('<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target><architecture>i386:x86-64</architecture>'
            f'<feature name="org.gnu.gdb.i386.core">{"".join(rows)}</feature></target>')


class Target:
    """The processor between two instructions."""

    def __init__(self) -> None:
        self.processor = Processor()
        self.session = self.processor.session
        self.cpu = self.session.cpu
        self.guest = False
        self.flags: Optional[int] = None
        self.count = 0
        self.hook = bochscpu.Hook()
        self.hook.before_execution = self._before
        self.hook.vmexit = self._exit
        self._load()

    def _load(self) -> None:
        processor = self.processor
        for address, data in ((START, LAUNCH), (HANDLER, HANDLE), (GUEST, GUEST_CODE), (GUEST_PML4, struct.pack("<Q", PDPT | 7))):
            processor.write(address, data)
        processor.write(SCRATCH, bytes.fromhex("9c5bf4"))           # pushfq; pop rbx
        processor.write(SCRATCH + 0x10, bytes.fromhex("f3a4f4"))    # rep movsb; hlt
        processor.write(EPT_PD + 8 * (REMAPPED >> 21), struct.pack("<Q", REMAPPED_TO | 0xB7))
        processor.write(EPT_PD + 8 * (HOLE >> 21), bytes(8))
        processor.write(REMAPPED_TO, b"behind EPT 0x400000")
        values = baseline(processor.msrs)
        values[0x401E] |= 1 << 1
        values.update({0x201A: EPT_PML4 | 3 << 3 | 6, 0x6C16: HANDLER, 0x6C14: STACK + 0xC00, 0x681E: GUEST, 0x6802: GUEST_PML4,
                       0x2800: (1 << 64) - 1})
        processor.write(VMCS, processor.page(values, processor.revision))
        # The processor loads the page that was just filled.
        processor.run(bytes.fromhex("660fc73425") + struct.pack("<I", DATA + 8))
        processor.write(VMCS, processor.page(values, processor.revision))
        processor.run(bytes.fromhex("0fc73425") + struct.pack("<I", DATA + 8))
        state = processor._state("64-bit")
        state.rip, state.rsp = START, STACK + 0x800
        self.cpu.state = state

    def _before(self, *_: object) -> None:
        self.count += 1
        if self.count > 1:
            self.session.stop()

    def _exit(self, *_: object) -> None:
        self.guest = False

    def step(self) -> None:
        self._store_flags()
        start = self.cpu.rip
        code = self.processor.read(start, 3) if start < 1 << 30 else b""
        self.count = 0
        self.session.run([self.hook])
        self.flags = None
        if code in (b"\x0f\x01\xc2", b"\x0f\x01\xc3") and self.cpu.rip != start + 3:
            self.guest = True

    def read_flags(self) -> int:
        """The model computes flags when an instruction asks for them: one has to."""
        if self.flags is None:
            if self.guest:
                return int(self.cpu.rflags)
            kept = self.cpu.rip, self.cpu.rsp, self.cpu.rbx
            self.cpu.rip, self.cpu.rsp = SCRATCH, SCRATCH + 0x800
            for _ in range(2):
                self.count = 0
                self.session.run([self.hook])
            self.flags = int(self.cpu.rbx)
            self.cpu.rip, self.cpu.rsp, self.cpu.rbx = kept
            self.cpu.rflags = self.flags
        return self.flags

    def _store_flags(self) -> None:
        if self.flags is not None:
            self.cpu.rflags = self.flags

    def get(self, name: str) -> int:
        if name == "eflags":
            return self.read_flags()
        if name in SEGMENTS:
            return int(getattr(self.cpu, name).selector)
        if name in ("fs_base", "gs_base"):
            return int(getattr(self.cpu, name[:2]).base)
        if name == "cr3":
            return int(self.cpu.cr3)
        if name in SYSTEM:
            return int(getattr(self.cpu.state, {"k_gs_base": "kernel_gs_base"}.get(name, name)))
        return int(getattr(self.cpu, name)) if name in CORE else 0

    def set(self, name: str, value: int) -> bool:
        if name == "eflags":
            self.flags = value | 2
            self.cpu.rflags = self.flags
        elif name in CORE:
            self.read_flags()
            setattr(self.cpu, name, value)
        return name in CORE or name == "eflags"

    def write(self, address: int, data: bytes) -> None:
        """By the processor itself in the host: it does not look again at code that somebody else has written."""
        if self.guest:
            self.processor.write(address, data)
            return
        flags, state = self.read_flags(), self.cpu.state
        self.processor.write(STAGING, data)
        work = self.processor._state("64-bit")
        work.rip, work.rsi, work.rdi, work.rcx = SCRATCH + 0x10, STAGING, address, len(data)
        self.cpu.state = work
        self.processor._events, self.processor._budget = [], 0x2000
        self.session.run([self.processor.hook])
        self.cpu.state = state
        self.flags = flags
        self.cpu.rflags = flags


class Stub:
    def __init__(self, target: Target, dialect: str) -> None:
        self.target, self.dialect, self.physical = target, dialect, False
        self.breakpoints: set[int] = set()
        self.named = [*CORE, "eflags", *SEGMENTS, *(f"st{number}" for number in range(8)), *FLOAT, *(SYSTEM if dialect == "vmware" else [])]
        self.sizes = [8] * len(CORE) + [4] * (1 + len(SEGMENTS)) + [10] * 8 + [4] * len(FLOAT) + [8] * len(SYSTEM)
        self.ack = True

    def serve(self, connection: socket.socket) -> None:
        buffer, self.ack = b"", True
        self.connection = connection
        while True:
            data = connection.recv(65536)
            if not data:
                return
            buffer += data
            while True:
                start = buffer.find(b"$")
                end = buffer.find(b"#", start)
                if start < 0 or end < 0 or len(buffer) < end + 3:
                    break
                packet, buffer = buffer[start + 1:end], buffer[end + 3:]
                if self.ack:
                    connection.sendall(b"+")
                answer = self.answer(packet)
                if answer is not None:
                    connection.sendall(b"$" + answer + b"#%02x" % (sum(answer) & 0xFF))
                if packet == b"QStartNoAckMode":
                    self.ack = False

    def answer(self, packet: bytes) -> Optional[bytes]:
        text = packet.decode("latin-1")
        kind, rest = text[:1], text[1:]
        if kind == "?":
            return b"S05"
        if kind == "g":
            values = zip(self.named, self.sizes)
            return b"".join((self.target.get(name) & (1 << 8 * size) - 1).to_bytes(size, "little").hex().encode() for name, size in values)
        if kind == "p":
            number = int(rest, 16)
            if number >= len(self.named):
                return b"E01"
            return (self.target.get(self.named[number]) & (1 << 8 * self.sizes[number]) - 1).to_bytes(self.sizes[number], "little").hex().encode()
        if kind == "P":
            number, _, value = rest.partition("=")
            return b"OK" if self.target.set(self.named[int(number, 16)], int.from_bytes(bytes.fromhex(value), "little")) else b"E01"
        if kind == "G":
            data, at = bytes.fromhex(rest), 0
            for name, size in zip(self.named, self.sizes):
                self.target.set(name, int.from_bytes(data[at:at + size], "little"))
                at += size
            return b"OK"
        if kind in "mM":
            return self.memory(kind, rest)
        if kind in "sc" or text.startswith("vCont;"):
            return self.resume(step=kind == "s" or text.startswith("vCont;s"))
        if kind in "zZ" and rest[:1] in "01":
            address = int(rest.split(",")[1], 16)
            (self.breakpoints.add if kind == "Z" else self.breakpoints.discard)(address)
            return b"OK"
        if kind == "H" or kind == "T":
            return b"OK"
        if kind == "D":
            return b"OK"
        return self.query(text)

    def query(self, text: str) -> bytes:
        if text.startswith("qSupported"):
            return b"PacketSize=4000;QStartNoAckMode+" + (b";qXfer:features:read+" if self.dialect == "vmware" else b"")
        if text == "QStartNoAckMode":
            return b"OK"
        if text == "vCont?":
            return b"vCont;c;s"
        if text == "qfThreadInfo":
            return b"m1"
        if text == "qsThreadInfo":
            return b"l"
        if text == "qC":
            return b"QC1"
        if text == "qAttached":
            return b"1"
        if text.startswith("qXfer:features:read:target.xml:") and self.dialect == "vmware":
            offset, length = (int(part, 16) for part in text.rpartition(":")[2].split(","))
            xml = description().encode()
            piece = xml[offset:offset + length]
            return (b"m" if offset + length < len(xml) else b"l") + piece
        if text.startswith("qRcmd,") and self.dialect == "vmware":
            return self.monitor(bytes.fromhex(text[6:]).decode())
        return b""

    def monitor(self, command: str) -> bytes:
        if command in ("phys", "virt"):
            self.physical = command == "phys"
            return b"OK"
        return b"Available commands: help, phys, virt\n".hex().encode() if command == "help" else b"E01"

    def memory(self, kind: str, rest: str) -> bytes:
        place, _, data = rest.partition(":")
        address, size = (int(part, 16) for part in place.split(","))
        if address + size > 1 << 30:
            return b"E14"
        if kind == "m":
            return self.target.processor.read(address, size).hex().encode()
        self.target.write(address, bytes.fromhex(data))
        return b"OK"

    def resume(self, step: bool) -> bytes:
        for count in range(1, 2_000_000):
            self.target.step()
            if step or self.target.cpu.rip in self.breakpoints:
                return b"S05"
            if count % 256 == 0 and select.select([self.connection], [], [], 0)[0] and b"\x03" in self.connection.recv(16):
                return b"S02"
        return b"S02"


def main(arguments: List[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)       # the model prints where it likes
    stub = Stub(Target(), arguments[0])
    listener = socket.create_server(("127.0.0.1", 0))
    layout: Dict[int, int] = {encoding: place[0] for encoding, place in stub.target.processor.layout.items()}
    answers.write(f"READY {(listener.getsockname()[1], layout)!r}\n")
    answers.flush()
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            stub.serve(connection)
        except OSError:
            continue
        finally:
            connection.close()


main(sys.argv[1:])
