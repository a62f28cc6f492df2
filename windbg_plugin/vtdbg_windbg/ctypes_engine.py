"""dbgeng through ctypes: the engine of the process that runs us, one of our own on a dump, or another debugger's by its server.

Places in the method tables are those of dbgeng.h (Windows SDK 10.0.26100; the interfaces named here have not changed since 2004).
"""

from __future__ import annotations

import ctypes as C
import os
import sys
from typing import Callable, Dict, Optional

from vtdbg.errors import UsageError
from vtdbg_windbg.com import Interface, created
from vtdbg_windbg.engine import Debuggee, Engine, EngineError

CLIENT, CONTROL = "27fe5639-8407-4f47-8364-ee118fb08ac8", "5182e668-105e-416e-ad92-24ef800424ba"
DATA_SPACES, REGISTERS = "88f7dfab-3ea7-4c3a-aefb-c4e8106173aa", "ce289126-9e84-45a7-937e-67bb18691493"
SYSTEM_OBJECTS = "6b86fe2c-2c4f-4f0c-9da2-174311acc327"

# Constants of dbgeng.h.
CLASS_UNINITIALIZED, CLASS_KERNEL = 0, 1
DUMP_QUALIFIERS = {1024: "small dump", 1025: "kernel dump", 1026: "complete dump", 1027: "dump"}
STATUS_BREAK, STATUS_STEP_INTO, STATUS_NO_DEBUGGEE = 6, 5, 7
OUTCTL_THIS_CLIENT, OUTCTL_IGNORE, OUTCTL_AMBIENT_TEXT, OUTCTL_AMBIENT_DML = 0, 3, 0xFFFFFFFF, 0xFFFFFFFE
OUTPUT_NORMAL, EXECUTE_NOT_LOGGED = 1, 2
ENGOPT_PREFER_DML = 0x00040000
VALUE_INT64 = 4
DATA_MM_PHYSICAL_MEMORY_BLOCK = 624
INFINITE = 0xFFFFFFFF
DLL_FOLDERS = "VTDBG_DBGENG"
"""Where dbgeng.dll is for a Python outside a debugger, if not in pykd's folder or on the PATH."""


def _engine_here() -> bool:
    """Whether a debugger engine runs in this process."""
    if sys.platform != "win32":
        raise EngineError("the debugger engine exists on Windows only; here open the dump itself: vtdbg -s MEMORY.DMP ...")
    kernel32 = C.WinDLL("kernel32")
    kernel32.GetModuleHandleW.restype = C.c_void_p
    return bool(kernel32.GetModuleHandleW("dbgeng.dll"))


def _load_engine() -> "C.CDLL":
    """dbgeng.dll: the one of this process if it has one, else of VTDBG_DBGENG, of an installed pykd, or of the PATH."""
    if _engine_here():
        return C.WinDLL("dbgeng.dll")
    import importlib.util

    package = importlib.util.find_spec("pykd")
    folders = [os.environ.get(DLL_FOLDERS, ""), os.path.dirname(package.origin or "") if package is not None else ""]
    for folder in filter(None, folders):
        if os.path.exists(os.path.join(folder, "dbgeng.dll")):
            # dbgeng finds its companions only if they are loaded already.
            for name in ("dbghelp", "dbgmodel"):
                if os.path.exists(os.path.join(folder, name + ".dll")):
                    C.WinDLL(os.path.join(folder, name + ".dll"))
            return C.WinDLL(os.path.join(folder, "dbgeng.dll"))
    return C.WinDLL("dbgeng.dll")


class CtypesEngine(Engine):
    """`inside`: the session of this process; else make one with `open_dump` or `connect`."""

    name = "ctypes"

    def __init__(self, client: Interface, inside: bool = False) -> None:
        self.inside = inside
        self.client, self.control = client, client.query(CONTROL)
        data, registers, system = client.query(DATA_SPACES), client.query(REGISTERS), client.query(SYSTEM_OBJECTS)
        control = self.control
        self._interrupt = control.method(3, "GetInterrupt")
        self._output = control.method(16, "ControlledOutput", C.c_uint32, C.c_uint32, C.c_char_p, C.c_char_p)
        self._type = control.method(34, "GetDebuggeeType", C.c_void_p, C.c_void_p)
        self._machine = control.method(35, "GetActualProcessorType", C.c_void_p)
        self._count = control.method(39, "GetNumberProcessors", C.c_void_p)
        self._status = control.method(49, "GetExecutionStatus", C.c_void_p)
        self._set_status = control.method(50, "SetExecutionStatus", C.c_uint32)
        self._options = control.method(53, "GetEngineOptions", C.c_void_p)
        self._evaluate = control.method(63, "Evaluate", C.c_char_p, C.c_uint32, C.c_void_p, C.c_void_p)
        self._execute = control.method(66, "Execute", C.c_uint32, C.c_char_p, C.c_uint32)
        self._wait = control.method(93, "WaitForEvent", C.c_uint32, C.c_uint32)
        self._read_virtual = data.method(3, "ReadVirtual", C.c_uint64, C.c_void_p, C.c_uint32, C.c_void_p)
        self._write_virtual = data.method(4, "WriteVirtual", C.c_uint64, C.c_void_p, C.c_uint32, C.c_void_p)
        self._read_physical = data.method(10, "ReadPhysical", C.c_uint64, C.c_void_p, C.c_uint32, C.c_void_p)
        self._read_msr = data.method(16, "ReadMsr", C.c_uint32, C.c_void_p)
        self._debugger_data = data.method(21, "ReadDebuggerData", C.c_uint32, C.c_void_p, C.c_uint32, C.c_void_p)
        self._index = registers.method(5, "GetIndexByName", C.c_char_p, C.c_void_p)
        self._value = registers.method(6, "GetValue", C.c_uint32, C.c_void_p)
        self._set_value = registers.method(7, "SetValue", C.c_uint32, C.c_void_p)
        self._thread = system.method(5, "GetCurrentThreadId", C.c_void_p)
        self._indices: Dict[str, Optional[int]] = {}

    @classmethod
    def of_this_process(cls) -> "CtypesEngine":
        """The session that runs us; EngineError outside of a debugger."""
        if not _engine_here():
            raise EngineError("this Python does not run in a debugger: -z MEMORY.DMP opens a dump, "
                              "--remote tcp:server=...,port=... a .server of WinDbg")
        return cls(created(_load_engine().DebugCreate, what="DebugCreate", identifier=CLIENT), inside=True)

    @classmethod
    def open_dump(cls, path: str) -> "CtypesEngine":
        """An engine of our own with the dump open."""
        engine = cls(created(_load_engine().DebugCreate, what="DebugCreate", identifier=CLIENT))
        engine.client.method(19, f"{path}: OpenDumpFile", C.c_char_p)(os.path.abspath(path).encode("mbcs"))
        engine._wait(0, INFINITE)
        return engine

    @classmethod
    def connect(cls, options: str) -> "CtypesEngine":
        """Another debugger's session, by the options of its `.server`: "tcp:server=localhost,port=5005"."""
        return cls(created(_load_engine().DebugConnect, options.encode("mbcs"), what=f"DebugConnect {options}", identifier=CLIENT))

    def debuggee(self) -> Debuggee:
        kind, qualifier, status, machine = C.c_uint32(), C.c_uint32(), C.c_uint32(), C.c_uint32()
        self._type(C.byref(kind), C.byref(qualifier))
        self._status(C.byref(status))
        if kind.value == CLASS_UNINITIALIZED or status.value == STATUS_NO_DEBUGGEE:
            return Debuggee()
        dump = qualifier.value in DUMP_QUALIFIERS
        running = status.value != STATUS_BREAK
        try:
            self._machine(C.byref(machine))
        except EngineError:
            machine.value = 0
        title = DUMP_QUALIFIERS.get(qualifier.value, "live")
        return Debuggee("kernel" if kind.value == CLASS_KERNEL else "user", dump, machine.value or None, running, title)

    def read_physical(self, address: int, size: int) -> bytes:
        return self._bytes(self._read_physical, address, size)

    def read_virtual(self, address: int, size: int) -> bytes:
        return self._bytes(self._read_virtual, address, size)

    @staticmethod
    def _bytes(read: Callable[..., int], address: int, size: int) -> bytes:
        data, count = C.create_string_buffer(size), C.c_uint32()
        try:
            read(address, data, size, C.byref(count))
        except EngineError:
            return b""
        return data.raw[:count.value]

    def write_virtual(self, address: int, data: bytes) -> int:
        count = C.c_uint32()
        self._write_virtual(address, data, len(data), C.byref(count))
        return count.value

    def _register_index(self, name: str) -> Optional[int]:
        if name not in self._indices:
            index = C.c_uint32()
            try:
                self._index(name.encode("ascii"), C.byref(index))
                self._indices[name] = index.value
            except EngineError:
                self._indices[name] = None
        return self._indices[name]

    def register(self, name: str) -> Optional[int]:
        index = self._register_index(name)
        if index is None:
            return None
        value = (C.c_ubyte * 32)()
        try:
            self._value(index, value)
        except EngineError:
            return None
        return int.from_bytes(bytes(value[:8]), "little")

    def write_register(self, name: str, value: int) -> None:
        index = self._register_index(name)
        if index is None:
            raise EngineError(f"the engine has no register {name}")
        # DEBUG_VALUE: the number in its first 8 bytes, its type in the last 4 of 32.
        self._set_value(index, (C.c_ubyte * 32).from_buffer_copy(value.to_bytes(8, "little") + bytes(20) + VALUE_INT64.to_bytes(4, "little")))

    def rdmsr(self, index: int) -> int:
        value = C.c_uint64()
        self._read_msr(index, C.byref(value))
        return value.value

    def evaluate(self, expression: str) -> int:
        value = (C.c_ubyte * 32)()
        rest = C.c_uint32()
        try:
            self._evaluate(expression.encode("ascii", "replace"), VALUE_INT64, value, C.byref(rest))
        except EngineError as error:
            raise UsageError(f"{expression!r} is neither a number nor an expression of the debugger") from error
        return int.from_bytes(bytes(value[:8]), "little")

    def execute(self, command: str) -> None:
        self._execute(OUTCTL_IGNORE, command.encode("ascii"), EXECUTE_NOT_LOGGED)

    def step(self) -> None:
        self._set_status(STATUS_STEP_INTO)
        self._wait(0, INFINITE)

    def processor(self) -> int:
        number = C.c_uint32()
        self._thread(C.byref(number))
        return number.value

    def processors(self) -> int:
        number = C.c_uint32()
        self._count(C.byref(number))
        return number.value

    def physical_memory_block(self) -> Optional[int]:
        value = C.c_uint64()
        try:
            self._debugger_data(DATA_MM_PHYSICAL_MEMORY_BLOCK, C.byref(value), 8, None)
        except EngineError:
            return None
        return value.value or None

    def write(self, words: str, dml: bool = False) -> None:
        if self.inside:
            self._output(OUTCTL_AMBIENT_DML if dml else OUTCTL_AMBIENT_TEXT, OUTPUT_NORMAL, b"%s", words.encode("ascii", "replace"))
        else:
            sys.stdout.write(words)

    def prefers_dml(self) -> bool:
        options = C.c_uint32()
        self._options(C.byref(options))
        return self.inside and bool(options.value & ENGOPT_PREFER_DML)

    def interrupted(self) -> bool:
        # S_OK: an interrupt is waiting, and is taken by asking; S_FALSE: none.
        return self._interrupt() == 0
