"""The processor itself: Bochs' CPU model through the bochscpu wheel, in VMX root operation.

Imported only by `server.py`, in a process of its own with `shim.cc` preloaded.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any, Dict, Iterator, List, Optional, Tuple

import bochscpu
import bochscpu.cpu
import bochscpu.memory
from places import (
    CODE_POOL,
    CODE_POOL_END,
    DATA,
    EPT_PD,
    EPT_PDPT,
    EPT_PML4,
    FIXED_PAGES,
    GUEST_CODE,
    HOST_CODE,
    PAE_PDPT,
    PD,
    PD32,
    PDPT,
    PML4,
    STACK,
    TSS,
    VMCS,
    VMXON,
)

REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
VMPTRLD, VMCLEAR = bytes.fromhex("0fc73425"), bytes.fromhex("660fc73425")   # m64 at a 32-bit absolute address, 64-bit mode
VMPTRLD32 = bytes.fromhex("0fc735")                                         # the same in 32-bit mode
LAUNCH = {"vmlaunch": bytes.fromhex("0f01c2"), "vmresume": bytes.fromhex("0f01c3")}
READ_FLAGS = bytes.fromhex("9c5bf4")    # pushfq; pop rbx; hlt: the model computes flags lazily, so they are read by an instruction
LAUNCH_STATE = 8    # where Bochs keeps the launch state in the page: 0 clear, 1 launched
CAPABILITY_MSRS = (0x3A, *range(0x480, 0x494))

_shim = ctypes.CDLL(None)
_shim.vmxcpu_log_text.restype = ctypes.c_char_p
_WAIT = ctypes.CFUNCTYPE(None)


def log_text() -> str:
    return _shim.vmxcpu_log_text().decode(errors="replace")


def _segment(selector: int, attributes: int, base: int = 0, limit: int = 0xFFFFFFFF) -> Any:
    segment = bochscpu.Segment()
    segment.present, segment.selector, segment.base, segment.limit, segment.attr = True, selector, base, limit, attributes
    return segment


def every_encoding() -> Iterator[int]:
    """Full-access encodings of every width, type and index that VMWRITE could know."""
    return ((width << 13) | (kind << 10) | (index << 1) for width in range(4) for kind in range(4) for index in range(0x80))


class Processor:
    def __init__(self) -> None:
        self._host_page: Dict[int, int] = {}
        self._on_demand: List[int] = []
        self._placed: Dict[bytes, int] = {}
        self._free_code = CODE_POOL
        self._events: List[Tuple[Any, ...]] = []
        self._budget = 0
        self._stop_at_exception = True
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self._page_missing
        for number in [*range(FIXED_PAGES), *range(CODE_POOL >> 12, CODE_POOL_END >> 12)]:
            self._add_page(number << 12)
        self.hook = bochscpu.Hook()
        self.hook.exception = lambda s, c, vector, error: self._exception(vector, error)
        self.hook.hlt = lambda s, c: self._events.append(("hlt",))      # the wait that follows ends the run
        self.hook.vmexit = lambda s, c, reason, qualification: self._events.append(("vmexit", reason, qualification))
        self.hook.reset = lambda s, c, kind: self._stop(("reset", kind))
        self.hook.before_execution = self._count
        self._on_wait = _WAIT(lambda: self._stop(("wait",)))
        _shim.vmxcpu_on_wait(self._on_wait)
        self._lay_tables()
        self.msrs = {index: value for index in CAPABILITY_MSRS if (value := self.rdmsr(index)) is not None}
        self.revision = self.msrs[0x480] & 0x7FFFFFFF
        self._vmxon()
        self.layout = self._learn_layout()
        self.physical_address_width = self._cpuid(0x80000008)[0] & 0xFF
        self.cpuid = {leaf: self._cpuid(leaf) for leaf in (0, 1, 7, 0xD, 0x12, 0x14, 0x80000001, 0x80000008)}
        self.pristine = self.read(0, FIXED_PAGES << 12)

    # -- memory ------------------------------------------------------------------------------------------------------------

    def _add_page(self, address: int) -> None:
        host = bochscpu.memory.allocate_host_page()
        bochscpu.memory.page_insert(address, host)
        self._host_page[address] = host

    def _page_missing(self, address: int) -> None:
        page = address & ~0xFFF
        if page not in self._host_page:
            self._add_page(page)
            self._on_demand.append(page)

    def write(self, address: int, data: bytes) -> None:
        while data:
            page, offset = address & ~0xFFF, address & 0xFFF
            self._page_missing(page)
            piece = data[:0x1000 - offset]
            ctypes.memmove(self._host_page[page] + offset, piece, len(piece))
            address, data = address + len(piece), data[len(piece):]

    def read(self, address: int, size: int) -> bytes:
        pieces = []
        while size > 0:
            page, offset = address & ~0xFFF, address & 0xFFF
            self._page_missing(page)
            length = min(size, 0x1000 - offset)
            pieces.append(ctypes.string_at(self._host_page[page] + offset, length))
            address, size = address + length, size - length
        return b"".join(pieces)

    def restore(self) -> None:
        """Memory as it was before the case: the fixed pages put back, pages that appeared on demand emptied."""
        self.write(0, self.pristine)
        for page in self._on_demand:
            ctypes.memset(self._host_page[page], 0, 0x1000)

    @property
    def crowded(self) -> bool:
        return len(self._on_demand) > 512 or self._free_code > CODE_POOL_END - 0x2000

    def _lay_tables(self) -> None:
        def entries(*values: int) -> bytes:
            return struct.pack(f"<{len(values)}Q", *values)

        self.write(PML4, entries(PDPT | 7))
        self.write(PDPT, entries(PD | 7))
        self.write(PD, entries(*((index << 21) | 0xE7 for index in range(512))))
        self.write(PAE_PDPT, entries(*(PD | 1 for _ in range(4))))
        self.write(PD32, struct.pack("<1024I", *((index << 22) | 0xE7 for index in range(1024))))
        self.write(EPT_PML4, entries(EPT_PDPT | 7))
        self.write(EPT_PDPT, entries(EPT_PD | 7))
        self.write(EPT_PD, entries(*((index << 21) | 0xB7 for index in range(512))))
        self.write(GUEST_CODE, b"\xf4" * 4096)
        self.write(HOST_CODE, b"\xf4" * 4096)

    def place(self, code: bytes) -> int:
        """The address of `code`; a new sequence goes where nothing has run."""
        if code not in self._placed:
            if self._free_code + len(code) > CODE_POOL_END:
                raise MemoryError("the pool of code addresses is used up")
            self._placed[code] = self._free_code
            self.write(self._free_code, code)
            self._free_code += (len(code) + 63) & ~63
        return self._placed[code]

    # -- running -----------------------------------------------------------------------------------------------------------

    def _stop(self, event: Tuple[Any, ...]) -> None:
        self._events.append(event)
        self.session.stop()

    def _exception(self, vector: int, error: int) -> None:
        # In a case the exception may be the guest's, and intercepted: then the exit follows.
        self._events.append(("exception", vector, error))
        if self._stop_at_exception:
            self.session.stop()

    def _count(self, *_: Any) -> None:
        self._budget -= 1
        if self._budget <= 0:
            self._stop(("budget",))

    def _state(self, host: str) -> Any:
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.rsp, state.rflags = STACK + 0x800, 2
        state.cr0, state.cr3, state.cr4, state.efer, code = {
            "64-bit": (0x80050033, PML4, 0x2620, 0xD01, 0xA09B),
            "32-bit": (0x80050033, PD32, 0x2610, 0, 0xC09B),
        }[host]
        state.cs = _segment(0x10, code)
        for name in ("ss", "ds", "es", "fs", "gs"):
            setattr(state, name, _segment(0x18, 0xC093))
        state.tr = _segment(0x20, 0x8B, TSS, 0x67)
        return state

    def run(self, code: bytes, budget: int = 200, host: str = "64-bit", registers: Optional[Dict[str, int]] = None,
            stop_at_exception: bool = True) -> int:
        """Run `code` in VMX root operation until it halts; the flags."""
        self._stop_at_exception = stop_at_exception
        entry = self.place(code + READ_FLAGS)
        self._events, self._budget = [], budget
        _shim.vmxcpu_log_clear()
        state = self._state(host)
        state.rip = entry
        for name, value in (registers or {}).items():
            setattr(state, name, value)
        self.session.cpu.state = state
        self.session.run([self.hook])
        return int(self.session.cpu.rbx)

    def rdmsr(self, index: int) -> Optional[int]:
        self.run(bytes.fromhex("0f32"), registers={"rcx": index})
        if any(event[0] == "exception" for event in self._events):
            return None
        return int(((self.session.cpu.rdx & 0xFFFFFFFF) << 32) | (self.session.cpu.rax & 0xFFFFFFFF))

    def _cpuid(self, leaf: int) -> Tuple[int, int, int, int]:
        self.run(bytes.fromhex("0fa24889d8f4"), registers={"rax": leaf, "rcx": 0})     # cpuid; mov rax, rbx; hlt
        ebx, ecx, edx = (int(getattr(self.session.cpu, name)) & 0xFFFFFFFF for name in ("rbx", "rcx", "rdx"))
        self.run(bytes.fromhex("0fa2f4"), registers={"rax": leaf, "rcx": 0})
        return int(self.session.cpu.rax) & 0xFFFFFFFF, ebx, ecx, edx

    def _vmxon(self) -> None:
        header = struct.pack("<I", self.revision)
        self.write(VMXON, header)
        self.write(VMCS, header)
        self.write(DATA, struct.pack("<QQ", VMXON, VMCS))
        code = bytes.fromhex("b93a000000b80500000031d20f30")          # IA32_FEATURE_CONTROL = locked, VMXON outside SMX
        code += bytes.fromhex("f30fc73425") + struct.pack("<I", DATA)
        pointer = struct.pack("<I", DATA + 8)
        flags = self.run(code + VMCLEAR + pointer + VMPTRLD + pointer)
        if flags & 0x41 or any(event[0] == "exception" for event in self._events):
            raise RuntimeError(f"VMXON failed: flags {flags:#x}, {self._events}, {log_text()}")

    def _learn_layout(self) -> Dict[int, Tuple[int, int, int]]:
        """{encoding: (offset in the page, bytes, bits that the value is rotated left)}: VMWRITE, then look what changed."""
        layout: Dict[int, Tuple[int, int, int]] = {}
        for encoding in every_encoding():
            size = {0: 2, 1: 8, 2: 4, 3: 8}[encoding >> 13]
            places = [self._place_of(encoding, size, pattern) for pattern in (0x5AA5C33C69960FF0, 0xA55A3CC39669F00F)]
            if places[0] is not None and places[0] == places[1]:
                layout[encoding] = places[0]
        layout.update(self._read_only_places(layout))
        self.write(VMCS + 4, bytes(4092))
        return layout

    def _read_only_places(self, known: Dict[int, Tuple[int, int, int]]) -> Dict[int, Tuple[int, int, int]]:
        """Fields that VMWRITE refuses (processors without IA32_VMX_MISC[29]): a page of distinct dwords, then VMREAD."""
        page = self.read(VMCS, 12) + b"".join(struct.pack("<I", 0x9E3779B1 * index & 0xFFFFFFFF) for index in range(3, 1024))
        places = {}
        for encoding in every_encoding():
            if encoding >> 10 & 3 != 1 or encoding in known:
                continue
            size = {0: 2, 1: 8, 2: 4, 3: 8}[encoding >> 13]
            self.write(VMCS, page)      # a VMREAD that fails leaves its error number in the page
            flags = self.run(bytes.fromhex("0f78c8"), registers={"rcx": encoding})       # vmread rax, rcx
            if not flags & 0x41:
                stored = (int(self.session.cpu.rax) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
                if page.count(stored) == 1:
                    places[encoding] = (page.index(stored), size, 0)
        return places

    def _place_of(self, encoding: int, size: int, pattern: int) -> Optional[Tuple[int, int, int]]:
        before = self.read(VMCS, 4096)
        flags = self.run(bytes.fromhex("0f79c8"), registers={"rax": pattern, "rcx": encoding})      # vmwrite rcx, rax
        after = self.read(VMCS, 4096)
        if flags & 0x41 or before == after:
            return None
        first = next(index for index in range(4096) if before[index] != after[index])
        mask = (1 << 8 * size) - 1
        rotations = {0: pattern & mask}
        if size == 4:
            rotations[8] = ((pattern << 8) | (pattern >> 24 & 0xFF)) & mask
        for offset in range(max(first - size + 1, 8), first + 1):
            for rotation, stored in rotations.items():
                if after[offset:offset + size] == stored.to_bytes(size, "little"):
                    return offset, size, rotation
        return None

    # -- cases -------------------------------------------------------------------------------------------------------------

    def page(self, values: Dict[int, int], header: int) -> bytes:
        page = bytearray(4096)
        struct.pack_into("<I", page, 0, header)
        for encoding, value in values.items():
            place = self.layout.get(encoding)
            if place is None:
                continue
            offset, size, rotation = place
            value &= (1 << 8 * size) - 1
            if rotation:
                value = ((value << rotation) | (value >> (32 - rotation))) & 0xFFFFFFFF
            page[offset:offset + size] = value.to_bytes(size, "little")
        return bytes(page)

    def field(self, page: bytes, encoding: int) -> Optional[int]:
        place = self.layout.get(encoding)
        if place is None:
            return None
        offset, size, rotation = place
        value = int.from_bytes(page[offset:offset + size], "little")
        return ((value >> rotation) | (value << (32 - rotation))) & 0xFFFFFFFF if rotation else value

    def case(self, case: Dict[str, Any]) -> Tuple[Dict[str, Any], bool]:
        """(what the processor did, may this process go on)."""
        values = dict(case["values"])
        if case.get("code") is not None:
            values[0x681E] = self.place(case["code"])
        for address, data in case.get("memory", {}).items():
            self.write(address, data)
        host = case.get("host", "64-bit")
        self.write(VMCS, self.page(values, case.get("header", self.revision)))
        if case.get("launched"):
            self.write(VMCS + LAUNCH_STATE, struct.pack("<I", 1))
        load = VMPTRLD if host == "64-bit" else VMPTRLD32
        code = load + struct.pack("<I", DATA + 8) + LAUNCH[case.get("instruction", "vmlaunch")]
        flags = self.run(code, case.get("budget", 60), host, case.get("registers"), stop_at_exception=False)
        log, events = log_text(), list(self._events)
        page = self.read(VMCS, 4096)
        kind, number, qualification = self._ending(events, log, flags, page, self.place(code + READ_FLAGS))
        result: Dict[str, Any] = {"kind": kind, "number": number, "qualification": qualification, "log": log, "events": events}
        wanted = self.layout if case.get("fields") == "all" else case.get("fields") or ()
        result["fields"] = {encoding: self.field(page, encoding) for encoding in wanted}
        if case.get("want_registers"):
            result["registers"] = {name: int(getattr(self.session.cpu, name)) for name in REGISTERS}
        result["memory"] = {(address, size): self.read(address, size) for address, size in case.get("dump", ())}
        fine = kind in ("exit", "entry-failure", "VMfailInvalid", "VMfailValid")
        if fine:
            self.restore()
        return result, fine and not self.crowded

    def _ending(self, events: List[Tuple[Any, ...]], log: str, flags: int, page: bytes, host_code: int) -> Tuple[str, int, int]:
        """(kind, number, qualification); see Outcome in client.py."""
        for event in events:
            if event[0] == "vmexit":
                return ("entry-failure" if event[1] >> 31 else "exit"), event[1] & 0xFFFF, event[2]
        if "VMFAIL" in log:
            return ("VMfailInvalid", 0, 0) if flags & 1 else ("VMfailValid", self.field(page, 0x4400) or 0, 0)
        if events and events[0][0] == "exception" and host_code <= self.session.cpu.rip < host_code + 64:
            return "exception", events[0][1], events[0][2]
        return "inside", 0, 0


def start() -> Processor:
    os.environ.setdefault("VMXCPU_MODEL", "")
    return Processor()
