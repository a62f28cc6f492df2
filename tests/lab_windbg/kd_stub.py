"""The kernel's side of the KD protocol (serial framing, ReactOS' windbgkd.h and kdpacket.c) over TCP: a live machine for dbgeng out of an Image.

The processors stand at a breakpoint.  Physical memory is read-only; a step is one instruction, as `execute` says what that does; `g` lets
the machine run until the debugger breaks in.
"""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional

from lab_windbg.image import DEBUGGER_BLOCK, MODULES, NT, PRCB, PRCB_CONTEXT, PRCB_SPECIAL, PRCB_THREAD, PROCESSOR_BLOCK, Image
from lab_windbg.lab import prompt

DATA, CONTROL = b"0000", b"iiii"
STATE_MANIPULATE, ACKNOWLEDGE, RESEND, RESET, STATE_CHANGE = 2, 4, 5, 6, 7
FIRST_ID, SYNC = 0x80800000, 0x800
SUCCESS, UNSUCCESSFUL, NOT_SUPPORTED = 0, 0xC0000001, 0xC00000BB
BREAKPOINT, SINGLE_STEP = 0x80000003, 0x80000004
CONTEXT_SIZE, CONTEXT_FLAGS, CONTEXT_RIP = 0x4D0, 0x44, 0xF8
MOST = 0xF80

READ_VIRTUAL, WRITE_VIRTUAL, GET_CONTEXT, SET_CONTEXT, WRITE_BREAKPOINT, RESTORE_BREAKPOINT = 0x3130, 0x3131, 0x3132, 0x3133, 0x3134, 0x3135
CONTINUE, READ_CONTROL, REBOOT, CONTINUE2, READ_PHYSICAL, WRITE_PHYSICAL = 0x3136, 0x3137, 0x313B, 0x313C, 0x313D, 0x313E
SET_CALL, CLEAR_CALLS, SET_INTERNAL, VERSION, WRITE_BREAKPOINTS, RESTORE_BREAKPOINTS = 0x3140, 0x3141, 0x3142, 0x3146, 0x3147, 0x3148
SWITCH, PAGE_IN, READ_MSR, WRITE_MSR, SEARCH, CLEAR_INTERNAL, QUERY = 0x3150, 0x3151, 0x3152, 0x3153, 0x3156, 0x315A, 0x315C
GET_CONTEXT_EX, SET_CONTEXT_EX = 0x315F, 0x3160
IGNORED = {RESTORE_BREAKPOINT, SET_CALL, CLEAR_CALLS, SET_INTERNAL, PAGE_IN, CLEAR_INTERNAL}

Execute = Callable[["Kernel", int], None]
"""What one instruction of a processor does: called with the kernel and the processor's number, RIP not yet advanced."""


def skip_instruction(kernel: "Kernel", cpu: int) -> None:
    """The image's code has VMCALL (3 bytes) and instructions of one byte; neither changes a register."""
    rip = kernel.rip(cpu)
    kernel.set_rip(cpu, rip + (3 if kernel.image.read_linear(rip, 3) == b"\x0f\x01\xc1" else 1))


class VmxRoot:
    """A processor in VMX root operation with a current VMCS: VMREAD and VMWRITE between registers, where the kernel's code at RIP is one.

    `values` by encoding; `executed` counts the instructions by address.  An encoding that is not among them fails with ZF and VM-instruction error 12
    (SDM vol. 3, VMREAD; VM Instruction Error Numbers).  RIP's code is what memory holds when the instruction is stepped: what the debugger wrote.
    """

    VMREAD, VMWRITE, ERROR, FLAGS, RAX = b"\x0f\x78", b"\x0f\x79", 0x4400, 0x8D5, 0x78

    def __init__(self, values: Mapping[int, int]) -> None:
        self.values, self.vmreads = dict(values), 0
        self.executed: Dict[int, int] = {}

    def __call__(self, kernel: "Kernel", cpu: int) -> None:
        context, rip = kernel.context[cpu], kernel.rip(cpu)
        code = kernel.image.read_linear(rip, 3)
        if code[:2] not in (self.VMREAD, self.VMWRITE) or code[2] < 0xC0:
            return skip_instruction(kernel, cpu)
        self.executed[rip] = self.executed.get(rip, 0) + 1
        # ModRM (SDM vol. 2, VMREAD and VMWRITE): bits 5:3 are the register with the field's encoding, bits 2:0 the one with its value.
        encoding, value = (self.RAX + 8 * (code[2] >> shift & 7) for shift in (3, 0))
        field, flags = struct.unpack_from("<Q", context, encoding)[0], struct.unpack_from("<I", context, CONTEXT_FLAGS)[0] & ~self.FLAGS
        if field not in self.values:
            flags, self.values[self.ERROR] = flags | 0x40, 12
        elif code[:2] == self.VMWRITE:
            self.values[field] = struct.unpack_from("<Q", context, value)[0]
        else:
            self.vmreads += 1
            struct.pack_into("<Q", context, value, self.values[field])
        struct.pack_into("<I", context, CONTEXT_FLAGS, flags)
        return kernel.set_rip(cpu, rip + 3)


class Kernel:
    """Memory and processors as the kernel's own debugging code sees them."""

    def __init__(self, image: Image, msrs: Optional[Mapping[int, int]] = None, execute: Execute = skip_instruction) -> None:
        self.image, self.current, self.execute = image, 0, execute
        self.prcb = [int.from_bytes(image.read_linear(PROCESSOR_BLOCK + 8 * number, 8), "little") for number in range(image.cpus)]
        self.context = [bytearray(image.read_linear(prcb + PRCB_CONTEXT, CONTEXT_SIZE)) for prcb in self.prcb]
        self.msrs: Dict[int, int] = {0xC0000080: 0xD01, 0xC0000101: self.prcb[0] - PRCB, **(msrs or {})}
        self.list_head = DEBUGGER_BLOCK - 0x100
        image.write_linear(self.list_head, struct.pack("<QQ", DEBUGGER_BLOCK, DEBUGGER_BLOCK))

    def rip(self, cpu: int) -> int:
        return int(struct.unpack_from("<Q", self.context[cpu], CONTEXT_RIP)[0])

    def set_rip(self, cpu: int, value: int) -> None:
        struct.pack_into("<Q", self.context[cpu], CONTEXT_RIP, value)

    def control_space(self, cpu: int, what: int) -> bytes:
        """Of x64: 0 the KPCR's address, 1 the KPRCB's, 2 special registers, 3 the current thread's address."""
        prcb = self.prcb[cpu]
        parts = {0: struct.pack("<Q", prcb - PRCB), 1: struct.pack("<Q", prcb)}
        places = {2: (prcb + PRCB_SPECIAL, 0xD8), 3: (prcb + PRCB_THREAD, 8)}
        return self.image.read_linear(*places[what]) if what in places else parts.get(what, b"")

    def state_change(self, code: int) -> bytes:
        """DBGKD_ANY_WAIT_STATE_CHANGE: an exception, and the control report of the processor."""
        cpu = self.current
        rip, flags = self.rip(cpu), struct.unpack_from("<I", self.context[cpu], CONTEXT_FLAGS)[0]
        thread = int.from_bytes(self.image.read_linear(self.prcb[cpu] + PRCB_THREAD, 8), "little")
        head = struct.pack("<IHHIIQQ", 0x3030, 6, cpu, self.image.cpus, 0, thread, rip)
        exception = struct.pack("<IIQQII15QII", code, 0, 0, rip, 0, 0, *[0] * 15, 1, 0)
        code_bytes = self.image.read_linear(rip, 16)
        report = struct.pack("<QQIHH", 0xFFFF0FF0, 0x400, flags, len(code_bytes), 3) + code_bytes.ljust(16, b"\0")
        return head + exception + report + struct.pack("<4H", 0x10, 0x2B, 0x2B, 0x53)


class KdStub(threading.Thread):
    """Serves one debugger on a port of its own choice; `requests` counts the calls by number, `ran` how often the machine was let run, `failure`
    is what ended it, if not the debugger.  `began` is a file that is there once the machine was let run.  `slow`: the Nth request of that number is
    not answered until the debugger has asked again; `repeated` counts what was asked again."""

    def __init__(self, kernel: Kernel, began: Optional[Path] = None, slow: Optional[Mapping[int, int]] = None) -> None:
        super().__init__(daemon=True)
        self.kernel, self._began, self._slow = kernel, began, dict(slow or {})
        self.requests: Dict[int, int] = {}
        self.repeated: Dict[int, int] = {}
        self.processors_seen: List[int] = []
        self.ran = 0
        self.failure: Optional[Exception] = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._packet_id, self._last, self._buffer, self._waiting = FIRST_ID, b"", b"", b""
        self._answered = 0
        self._peer: Optional[socket.socket] = None

    @property
    def connection(self) -> str:
        """What dbgeng is told: the options of AttachKernel."""
        return f"com:ipport={self._listener.getsockname()[1]},port=127.0.0.1"

    def run(self) -> None:
        try:
            with self._listener:
                self._peer = self._listener.accept()[0]
            with self._peer, prompt():
                self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._serve()
        except (EOFError, ConnectionError):
            return
        except Exception as error:  # noqa: BLE001 - kept for the test, which runs in another thread
            self.failure = error

    def _wait_for(self, count: int) -> None:
        assert self._peer is not None
        while len(self._buffer) < count:
            data = self._peer.recv(65536)
            if not data:
                raise EOFError
            self._buffer += data

    def _read(self, count: int) -> bytes:
        self._wait_for(count)
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _write(self, data: bytes) -> None:
        assert self._peer is not None
        self._peer.sendall(self._waiting + data)
        self._waiting = b""

    def _send_control(self, kind: int, packet_id: int = 0) -> None:
        packet = CONTROL + struct.pack("<HHII", kind, 0, packet_id, 0)
        if kind == ACKNOWLEDGE:
            # Goes out with the answer: one wake-up of the debugger instead of two.
            self._waiting = packet
        else:
            self._write(packet)

    def _send_data(self, kind: int, payload: bytes, sync: int = 0) -> None:
        self._last = DATA + struct.pack("<HHII", kind, len(payload), self._packet_id | sync, sum(payload) & 0xFFFFFFFF) + payload + b"\xaa"
        self._write(self._last)

    def _send_state(self, code: int = BREAKPOINT, sync: int = 0) -> None:
        self._send_data(STATE_CHANGE, self.kernel.state_change(code), sync)

    def _serve(self) -> None:
        leader = b""
        while True:
            byte = self._read(1)
            if byte == b"b" and not leader:                    # the debugger breaks in
                self._send_state()
            elif byte not in (b"i", b"0"):
                leader = b""
            else:
                leader = leader + byte if leader[:1] in (b"", byte) else byte
                if len(leader) == 4:
                    self._packet(leader)
                    leader = b""

    def _packet(self, leader: bytes) -> None:
        kind, size, packet_id, checksum = struct.unpack("<HHII", self._read(12))
        if leader == CONTROL:
            if kind == RESET:
                self._packet_id, self._answered = FIRST_ID, 0
                self._send_control(RESET)
                self._send_state(sync=SYNC)
            elif kind == ACKNOWLEDGE and packet_id & ~SYNC == self._packet_id:
                self._packet_id ^= 1
            elif kind == RESEND:
                self._write(self._last)
            return None
        data = self._read(size + 1)[:size]
        if sum(data) & 0xFFFFFFFF != checksum:
            return self._send_control(RESEND)
        (api,) = struct.unpack_from("<I", data)
        if packet_id & ~SYNC == self._answered:
            # Sent again by a debugger that got impatient: acknowledgement and answer are on their way, and TCP loses nothing.
            self.repeated[api] = self.repeated.get(api, 0) + 1
            return None
        if self._slow.get(api) == self.requests.get(api, 0) + 1:
            self._wait_for(1)
        self._send_control(ACKNOWLEDGE, packet_id & ~SYNC)
        self._answered = packet_id & ~SYNC
        if kind == STATE_MANIPULATE:
            self._manipulate(data)
        return None

    def _manipulate(self, data: bytes) -> None:
        """One DBGKD_MANIPULATE_STATE64: number, level, processor, status, 40 bytes of arguments, then data."""
        api, level, cpu = struct.unpack_from("<IHH", data)
        self.requests[api] = self.requests.get(api, 0) + 1
        if cpu >= self.kernel.image.cpus:
            cpu = self.kernel.current
        if api == SWITCH:
            self.processors_seen.append(cpu)
            self.kernel.current = cpu
            return self._send_state()
        if api == CONTINUE2 and struct.unpack_from("<I", data, 20)[0]:
            self.kernel.execute(self.kernel, self.kernel.current)
            return self._send_state(SINGLE_STEP)
        if api in (CONTINUE, CONTINUE2):
            # The acknowledgement, and nothing more until the debugger breaks in.
            self.ran += 1
            self._write(b"")
            if self._began is not None:
                self._began.touch()
            return None
        if api == REBOOT:
            return self._write(b"")
        arguments = bytearray(data[16:56])
        status, out = self._answer(api, cpu, arguments, data[56:])
        self._send_data(STATE_MANIPULATE, struct.pack("<IHHII", api, level, cpu, status, 0) + bytes(arguments) + out)
        return None

    def _answer(self, api: int, cpu: int, arguments: bytearray, extra: bytes) -> "tuple[int, bytes]":
        """Status and data; the arguments are changed to what is sent back."""
        kernel, image = self.kernel, self.kernel.image
        if api in (READ_VIRTUAL, READ_PHYSICAL):
            address, size = struct.unpack_from("<QI", arguments)
            out = (image.read_linear if api == READ_VIRTUAL else image.read)(address, min(size, MOST))
            struct.pack_into("<I", arguments, 12, len(out))
            return (SUCCESS if out else UNSUCCESSFUL), out
        if api in (WRITE_VIRTUAL, WRITE_PHYSICAL):
            address, size = struct.unpack_from("<QI", arguments)
            written = image.write_linear(address, extra[:size]) if api == WRITE_VIRTUAL else 0
            struct.pack_into("<I", arguments, 12, written)
            return (SUCCESS if written else UNSUCCESSFUL), b""
        if api == GET_CONTEXT:
            return SUCCESS, bytes(kernel.context[cpu])
        if api == SET_CONTEXT:
            kernel.context[cpu][:len(extra)] = extra[:CONTEXT_SIZE]
            return SUCCESS, b""
        if api == GET_CONTEXT_EX:
            offset, size = struct.unpack_from("<II", arguments)
            out = bytes(kernel.context[cpu][offset:offset + size])
            struct.pack_into("<I", arguments, 8, len(out))
            return SUCCESS, out
        if api == SET_CONTEXT_EX:
            offset, size = struct.unpack_from("<II", arguments)
            kernel.context[cpu][offset:offset + size] = extra[:size]
            struct.pack_into("<I", arguments, 8, size)
            return SUCCESS, b""
        if api == READ_CONTROL:
            what, size = struct.unpack_from("<QI", arguments)
            out = kernel.control_space(cpu, what)[:size]
            struct.pack_into("<I", arguments, 12, len(out))
            return (SUCCESS if out else UNSUCCESSFUL), out
        if api == VERSION:
            arguments[:] = struct.pack("<HHBBHHBBBBHQQQ", 15, 7601, 6, 0, 7, 0x8664, 12, 3, 0x33, 0, 0, NT, MODULES, kernel.list_head)
            return SUCCESS, b""
        if api == READ_MSR:
            value = kernel.msrs.get(struct.unpack_from("<I", arguments)[0])
            struct.pack_into("<II", arguments, 4, (value or 0) & 0xFFFFFFFF, (value or 0) >> 32)
            return (UNSUCCESSFUL if value is None else SUCCESS), b""
        if api == SEARCH:
            address, size, length = struct.unpack_from("<QQI", arguments)
            at = image.read_linear(address, min(size, 1 << 24)).find(extra[:length])
            if at < 0:
                return UNSUCCESSFUL, b""
            struct.pack_into("<Q", arguments, 0, address + at)
            return SUCCESS, b""
        if api == QUERY:                                       # the kernel's, readable, writable, executable
            struct.pack_into("<4I", arguments, 8, 0, 0, 2, 7)
            return SUCCESS, b""
        if api == WRITE_BREAKPOINT:
            struct.pack_into("<I", arguments, 8, 1)
            return SUCCESS, b""
        if api == WRITE_BREAKPOINTS:
            (count,) = struct.unpack_from("<I", arguments)
            return SUCCESS, extra if len(extra) < 16 * count else b"".join(
                struct.pack("<QI4x", struct.unpack_from("<Q", extra, 16 * index)[0], index + 1) for index in range(count))
        if api == RESTORE_BREAKPOINTS:
            return SUCCESS, extra
        return (SUCCESS if api in IGNORED else NOT_SUPPORTED), b""
