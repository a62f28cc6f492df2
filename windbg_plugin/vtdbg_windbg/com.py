"""COM by ctypes: just enough to call dbgeng.  No comtypes, nothing to install."""

from __future__ import annotations

import ctypes as C
import uuid
from typing import Any, Callable

from vtdbg_windbg.engine import EngineError

# HRESULTs that say more than their number (winerror.h).
KNOWN = {
    0x80004001: "not implemented", 0x80004002: "no such interface", 0x80004005: "failed", 0x8000FFFF: "not possible with this target",
    0x80070005: "access denied", 0x80070057: "wrong argument", 0x80040205: "nothing there", 0x800706BA: "the debugging server is not there",
    0x80070002: "file not found", 0xD0000001: "the target refuses", 0x8007001E: "the target refuses the read",
}


def interface_id(text: str) -> Any:
    return (C.c_char * 16).from_buffer_copy(uuid.UUID(text).bytes_le)


def result_text(result: int) -> str:
    code = result & 0xFFFFFFFF
    return f"{KNOWN.get(code, 'refused')} (HRESULT {code:#010x})"


class Interface:
    """A COM pointer.  `method(index, *types)` makes the call at that place of its table: HRESULTs below 0 raise EngineError."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        self._table = C.cast(C.cast(pointer, C.POINTER(C.c_void_p))[0], C.POINTER(C.c_void_p))

    def method(self, index: int, what: str, *types: Any) -> Callable[..., int]:
        function = C.WINFUNCTYPE(C.c_long, C.c_void_p, *types)(self._table[index])
        pointer = self.pointer

        def call(*arguments: Any) -> int:
            result: int = function(pointer, *arguments)
            if result < 0:
                raise EngineError(f"{what}: {result_text(result)}")
            return result

        return call

    def query(self, text: str) -> "Interface":
        pointer = C.c_void_p()
        self.method(0, "QueryInterface", C.c_void_p, C.c_void_p)(interface_id(text), C.byref(pointer))
        return Interface(pointer)


def created(function: Any, *arguments: Any, what: str, identifier: str) -> Interface:
    """DebugCreate or DebugConnect: what they make, as an Interface."""
    pointer = C.c_void_p()
    result = function(*arguments, interface_id(identifier), C.byref(pointer))
    if C.c_long(result).value < 0:
        raise EngineError(f"{what}: {result_text(result)}")
    return Interface(pointer)
