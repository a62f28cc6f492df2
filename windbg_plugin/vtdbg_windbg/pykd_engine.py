"""dbgeng through pykd 0.3.4: what is there when `!py` runs and ctypes cannot reach the engine."""

from __future__ import annotations

import re
import struct
from typing import Any, List, Optional

from vtdbg.errors import UsageError
from vtdbg_windbg.engine import AMD64, Debuggee, Engine, EngineError

PAGE = 4096
# KDDEBUGGER_DATA64 (wdbgexts.h): tag (the size of the block follows it), MmPhysicalMemoryBlock.
KDBG, KDBG_TAG, KDBG_BLOCK = b"KDBG", 0x10, 0x270
_KERNEL = re.compile(r"Kernel base = 0x([0-9a-f`]+)")
NOTHING = ".echo"
PIECE, MOST_SEARCHED = 0x10000, 0x2000000
"""How the kernel's image is searched for the debugger data block."""


class PykdEngine(Engine):
    """`inside` is False where a Python of its own imported pykd."""

    name = "pykd"

    def __init__(self) -> None:
        import pykd  # type: ignore[import-not-found]

        self.pykd: Any = pykd
        self.inside = bool(pykd.isWindbgExt())
        self._taken = False
        """A Ctrl-Break was taken that nobody was told of."""
        self._failures = (pykd.DbgException, pykd.MemoryException, pykd.SymbolException, RuntimeError)

    def _ask(self, what: str, *arguments: Any) -> Any:
        """A function of pykd by name; its exceptions, which are many lines, as one."""
        try:
            return getattr(self.pykd, what)(*arguments)
        except self._failures as error:
            raise EngineError(f"{what}: {' '.join(str(error).split())}") from error

    def debuggee(self) -> Debuggee:
        pykd = self.pykd
        try:
            status = str(self._ask("getExecutionStatus"))
            if status == "NoDebuggee":
                return Debuggee()
            if status == "Go":
                return Debuggee("kernel", running=True, title="running")
            kernel, dump = self._ask("isKernelDebugging"), self._ask("isDumpAnalyzing")
            machine = AMD64 if self._ask("getCPUType") == pykd.CPUType.AMD64 else 0x14C
        except EngineError:
            return Debuggee()
        kinds = {"KernelFull": "complete dump", "Kernel": "kernel dump", "KernelSmall": "small dump"}
        title = kinds.get(str(self._ask("getDumpType")), "dump") if kernel and dump else "live"
        return Debuggee("kernel" if kernel else "user", dump, machine, title=title)

    def read_physical(self, address: int, size: int) -> bytes:
        return self._read(address, size, physical=True)

    def read_virtual(self, address: int, size: int) -> bytes:
        return self._read(address, size, physical=False)

    def _read(self, address: int, size: int, physical: bool) -> bytes:
        """All or nothing in pykd: where all fails, the part up to the first bad page."""
        try:
            return self._load(address, size, physical)
        except self._failures:
            pass
        # While a Ctrl-Break waits the engine refuses all memory; any command takes it.  Inside WinDbg pykd takes it too, a quarter of a second later.
        self._command(NOTHING)
        try:
            data = self._load(address, size, physical)
            self._taken = True
            return data
        except self._failures:
            pass
        pieces: List[bytes] = []
        end = address + size
        while address < end:
            count = min(end, (address | (PAGE - 1)) + 1) - address
            try:
                pieces.append(self._load(address, count, physical))
            except self._failures:
                break
            address += count
        return b"".join(pieces)

    def _load(self, address: int, size: int, physical: bool) -> bytes:
        # Lists of 64-bit numbers come twice as fast as lists of bytes.
        if not address % 8 and not size % 8:
            return struct.pack(f"<{size // 8}Q", *self.pykd.loadQWords(address, size // 8, physical))
        return bytes(self.pykd.loadBytes(address, size, physical))

    def write_virtual(self, address: int, data: bytes) -> int:
        # On a dump pykd's writes return without an error and change nothing.
        if self._ask("isDumpAnalyzing"):
            raise EngineError("a dump is not written to")
        self._ask("writeBytes", address, list(data))
        return len(data)

    def register(self, name: str) -> Optional[int]:
        try:
            return int(self._ask("reg", name))
        except EngineError:
            return None

    def write_register(self, name: str, value: int) -> None:
        self._ask("setReg", name, value)

    def rdmsr(self, index: int) -> int:
        return int(self._ask("rdmsr", index))

    def evaluate(self, expression: str) -> int:
        try:
            return int(self._ask("expr", expression)) & (1 << 64) - 1
        except (EngineError, TypeError, ValueError) as error:
            raise UsageError(f"{expression!r} is neither a number nor an expression of the debugger") from error

    def execute(self, command: str) -> None:
        self._ask("dbgCommand", command)

    def step(self) -> None:
        self._ask("trace")

    def processor(self) -> int:
        # The engine's thread ids are processor numbers in a kernel session.
        return int(self._ask("getCurrentThreadId"))

    def processors(self) -> int:
        return int(self._ask("getNumberThreads"))

    def physical_memory_block(self) -> Optional[int]:
        """By symbol; else out of the debugger data block, which the engine searches for in the kernel's image."""
        try:
            return int(self._ask("getOffset", "nt!MmPhysicalMemoryBlock"))
        except EngineError:
            pass
        found = _KERNEL.search(self._command("vertarget"))
        if found is None:
            return None
        base = int(found.group(1).replace("`", ""), 16)
        # Not by the command `s`: over the KD protocol it reads on behind the first match.
        for at in range(base, base + self._image_size(base), PIECE):
            data = self.read_virtual(at, PIECE)
            tag = data.find(KDBG)
            while tag >= 0:
                pointer = self.read_virtual(at + tag - KDBG_TAG + KDBG_BLOCK, 8)
                size = int.from_bytes(self.read_virtual(at + tag + 4, 4), "little")
                if KDBG_BLOCK < size < PAGE and len(pointer) == 8 and pointer[7] == 0xFF:
                    return int.from_bytes(pointer, "little")
                tag = data.find(KDBG, tag + 1)
        return None

    def _image_size(self, base: int) -> int:
        """SizeOfImage of the PE header at `base` (Microsoft's PE format, Optional Header), 0 if there is none."""
        header = self.read_virtual(base, PAGE)
        start = int.from_bytes(header[0x3C:0x40], "little")
        size = int.from_bytes(header[start + 0x50:start + 0x54], "little") if header[start:start + 4] == b"PE\0\0" else 0
        return min(size, MOST_SEARCHED)

    def _command(self, text: str) -> str:
        try:
            return str(self._ask("dbgCommand", text) or "")
        except EngineError:
            return ""

    def write(self, words: str, dml: bool = False) -> None:
        if self.inside:
            self.pykd.dprint(words, dml)
        else:
            print(words, end="")

    def prefers_dml(self) -> bool:
        return self.inside and " on " in self._command(".prefer_dml")

    def interrupted(self) -> bool:
        # pykd itself ends a script on Ctrl-Break, by an exception (see app.main), and has no function to ask for one.
        taken, self._taken = self._taken, False
        return taken
