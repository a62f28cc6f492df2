"""Instructions run on the stopped processor: VMREAD, RDMSR, CPUID, SGDT.  The target is put back as it was, and that is verified.

What changes for the time: the general registers, RIP, RFLAGS (IF and TF clear, so that no interrupt is taken), the code bytes at RIP, and some
bytes below RSP (a faulting instruction pushes its frame there, SGDT stores there).
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from vtdbg.errors import MemoryUnavailable, UsageError, VtdbgError
from vtdbg.targets.interrupts import carried_out, deliver, held_back
from vtdbg.targets.port import GENERAL, Port, TargetError, TargetGone

CF, ZF, TF, IF = 1 << 0, 1 << 6, 1 << 8, 1 << 9
SAVED = (*GENERAL, "rip", "rflags")
BELOW = 0x100
"""Bytes below RSP that are saved: a frame of an exception (6 numbers after alignment to 16), and room for SGDT."""
NEAR = 0x10000
"""How far from RIP an existing VMREAD is searched."""

VMREAD = bytes.fromhex("0f78c8")    # vmread rax, rcx
VMWRITE = bytes.fromhex("0f79c8")   # vmwrite rcx, rax
RDMSR = bytes.fromhex("0f32")
CPUID = bytes.fromhex("0fa2")
SGDT, SIDT = bytes.fromhex("0f0100"), bytes.fromhex("0f0108")   # at [rax]
STR, SLDT = bytes.fromhex("0f00c8"), bytes.fromhex("0f00c0")    # in eax

INSTRUCTION_ERROR = 0x4400
UNSUPPORTED_FIELD = 12
"""VM-instruction error of a VMREAD or VMWRITE of a component that the processor does not have (SDM vol. 3, VM Instruction Error Numbers)."""


class Fault(TargetError):
    """The instruction did not complete: it faulted, or the processor went elsewhere."""


@dataclass(frozen=True)
class State:
    """The processor and the bytes as they were."""

    registers: Mapping[str, int]
    others: Mapping[str, Optional[int]]
    code: bytes
    stack_at: int
    stack: bytes


@dataclass
class Injector:
    """Use as a context manager: the state is saved on entry and put back on exit, whatever happened in between.

    `instruction_at` is where instructions are executed: RIP, patched, or None until `run` needs it.
    """

    port: Port
    allowed: Callable[[], None]
    state: Optional[State] = None
    _patched: bytes = b""
    _around: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Injector":
        self.allowed()
        registers = self.port.registers()
        known: Dict[str, int] = {}
        for name in SAVED:
            value = registers.get(name)
            if value is None:
                raise TargetError(f"the debugger does not show {name}: it could not be put back")
            known[name] = value
        require_kernel_mode(registers)
        stack_at = (known["rsp"] - BELOW) & ~0xF
        code = self.port.read_virtual(known["rip"], 16)
        stack = self.port.read_virtual(stack_at, known["rsp"] - stack_at)
        # From here to the end of `__exit__` a Ctrl-C waits for the next `run` or for the end: the target is not as it was.
        with ExitStack() as around:
            around.enter_context(held_back())
            around.enter_context(self.port.quiet())
            around.enter_context(self.port.stepping())
            self._around = around.pop_all()
        self.state = State(known, registers, code, stack_at, stack)
        return self

    def __exit__(self, *_: object) -> None:
        with self._around:
            self.restore()

    def run(self, code: bytes, inputs: Mapping[str, int], at: Optional[int] = None, at_once: bool = False) -> Mapping[str, int]:
        """The registers after one instruction.  `at`: an instruction that stands there already, with these bytes, is used without patching.

        `at_once`: a Ctrl-C that waits goes on waiting, for an instruction that undoes another one.

        Raises Fault where RIP did not advance by the instruction's length.
        """
        state = self._saved()
        if not at_once:
            deliver()
        start = state.registers["rip"] if at is None else at
        if at is None and self._patched[:len(code)] != code:
            # An interrupt in the middle leaves it open what stands there.
            self._patched = b""
            self.port.write_virtual(start, code)
            self._patched = code
        for name, value in {"rflags": state.registers["rflags"] & ~(IF | TF), **inputs, "rip": start}.items():
            self.port.write_register(name, value)
        self.port.step()
        after = self.port.registers()
        if after.get("rip") != start + len(code):
            raise Fault(f"the instruction {code.hex()} did not complete (RIP {start:#x} became {after.get('rip') or 0:#x}): it faulted")
        return {name: value for name, value in after.items() if value is not None}

    def restore(self) -> None:
        """Puts everything back and reads it again.  Ctrl-C waits; what could not be put back is named, with the values."""
        state = self.state
        if state is not None:
            carried_out(lambda: self._restore(state))

    def _restore(self, state: State) -> None:
        problems = _put_back(self.port, state)
        self.state, self._patched = None, b""
        if problems:
            raise TargetError("the target could NOT be put back as it was: " + "; ".join(problems))

    def _saved(self) -> State:
        if self.state is None:
            raise RuntimeError("not inside `with`")
        return self.state

    # -- what is run -------------------------------------------------------------------------------------------------------------

    def rdmsr(self, index: int) -> int:
        """Raises Fault for an MSR that does not exist (#GP)."""
        after = self.run(RDMSR, {"rcx": index})
        return (after["rdx"] & 0xFFFFFFFF) << 32 | after["rax"] & 0xFFFFFFFF

    def cpuid(self, leaf: int, subleaf: int = 0) -> Tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        after = self.run(CPUID, {"rax": leaf, "rcx": subleaf})
        eax, ebx, ecx, edx = (after[name] & 0xFFFFFFFF for name in ("rax", "rbx", "rcx", "rdx"))
        return eax, ebx, ecx, edx

    def tables(self) -> Dict[str, int]:
        """GDTR, IDTR (base and limit), TR and LDTR (selectors)."""
        state, found = self._saved(), {}
        for name, code in (("gdtr", SGDT), ("idtr", SIDT)):
            self.run(code, {"rax": state.stack_at})
            data = self.port.read_virtual(state.stack_at, 10)
            found[f"{name}_limit"], found[f"{name}_base"] = int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")
        for name, code in (("tr_selector", STR), ("ldtr_selector", SLDT)):
            found[name] = self.run(code, {"rax": 0})["rax"] & 0xFFFF
        return found

    def vmreads(self, encodings: List[int], patch: bool = True) -> "VmreadResult":
        """The fields of the current VMCS, the VM-instruction error first: a VMREAD of a field that the processor lacks overwrites it."""
        reader = _Vmread(self, None if patch else self._existing())
        error, flags = reader.read(INSTRUCTION_ERROR)
        if flags & CF:
            raise TargetError("there is no current VMCS on this processor (VMREAD fails with CF set): "
                              "VMPTRLD has not been executed, or it was VMCLEARed")
        values, refused = {INSTRUCTION_ERROR: error}, []
        for encoding in encodings:
            if encoding == INSTRUCTION_ERROR:
                continue
            value, flags = reader.read(encoding)
            if flags & CF:
                raise TargetError(f"the current VMCS went away at field {encoding:#x}")
            if flags & ZF:
                refused.append(encoding)
            else:
                values[encoding] = value
        overwritten = bool(refused) and error != UNSUPPORTED_FIELD
        if overwritten and patch:
            overwritten = not self._error_put_back(error)
        return VmreadResult(values, tuple(refused), overwritten)

    def _error_put_back(self, error: int) -> bool:
        """Writes the VM-instruction error again, where the processor lets VMWRITE write read-only fields (IA32_VMX_MISC bit 29)."""
        flags = self.run(VMWRITE, {"rcx": INSTRUCTION_ERROR, "rax": error})["rflags"]
        return not flags & (CF | ZF)

    def _existing(self) -> "Tuple[int, bytes, str, str]":
        state = self._saved()
        for address, code, target, source in existing_vmreads(self.port, state.registers["rip"]):
            return address, code, target, source
        raise TargetError(f"no VMREAD between registers was found within {NEAR:#x} bytes of RIP: leave --no-patch out")


@dataclass(frozen=True)
class VmreadResult:
    """`values` by encoding; `refused` are encodings that the processor does not know; `overwritten`: the VM-instruction error is now 12."""

    values: Mapping[int, int]
    refused: Tuple[int, ...]
    overwritten: bool


class _Vmread:
    def __init__(self, injector: Injector, existing: Optional[Tuple[int, bytes, str, str]]) -> None:
        self._injector, self._existing = injector, existing

    def read(self, encoding: int) -> Tuple[int, int]:
        address, code, target, source = self._existing or (None, VMREAD, "rax", "rcx")
        try:
            after = self._injector.run(code, {target: 0, source: encoding}, address)
        except Fault as error:
            raise Fault(f"VMREAD faults: the processor is not in VMX root operation ({error})") from error
        return after[target], after["rflags"]


_REGISTER = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))


def existing_vmreads(port: Port, rip: int) -> Iterator[Tuple[int, bytes, str, str]]:
    """(address, bytes, target register, register with the encoding) of VMREADs near RIP whose operands are two different registers."""
    for page in sorted(range((rip - NEAR) & ~0xFFF, rip + NEAR, 0x1000), key=lambda at: abs(at - rip)):
        try:
            data = port.read_virtual(page, 0x1000)
        except MemoryUnavailable:
            continue
        for found in re.finditer(rb"([\x40-\x4f]?)\x0f\x78([\xc0-\xff])", data):
            rex, operands = (found.group(1) or b"\0")[0], found.group(2)[0]
            target, source = _REGISTER[operands & 7 | (rex & 1) << 3], _REGISTER[operands >> 3 & 7 | (rex & 4) << 1]
            if target != source and "rsp" not in (target, source):
                yield page + found.start(), found.group(), target, source


def require_kernel_mode(registers: Mapping[str, Optional[int]]) -> None:
    """Raises UsageError where instructions must not be injected: outside of 64-bit code at CPL 0."""
    selector, efer, cr0 = registers.get("cs"), registers.get("efer"), registers.get("cr0")
    if selector is None or selector & 3:
        raise UsageError(f"the processor is not at CPL 0 (CS {selector if selector is not None else 'unknown'}): stop it in the hypervisor")
    if (cr0 is not None and not cr0 & 1) or (efer is not None and not efer & 1 << 10):
        raise UsageError("the processor is not in 64-bit mode: instructions are injected into 64-bit code only")


def _put_back(port: Port, state: State) -> List[str]:
    """What could not be put back, in words; empty when everything reads as it was."""
    problems: List[str] = []

    def attempt(what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except TargetGone as error:
            values = ", ".join(f"{name}={value:#x}" for name, value in state.registers.items())
            raise TargetGone(f"{error}; the target was being changed, put back by hand: {values}, "
                             f"bytes at {state.registers['rip']:#x}: {state.code.hex()}") from error
        except VtdbgError as error:
            problems.append(f"{what}: {error}")

    attempt("code", lambda: port.write_virtual(state.registers["rip"], state.code))
    if state.stack:
        attempt("stack", lambda: port.write_virtual(state.stack_at, state.stack))
    for name, value in state.registers.items():
        attempt(name, lambda name=name, value=value: port.write_register(name, value))  # type: ignore[misc]
    attempt("check", lambda: problems.extend(_differences(port, state)))
    return problems


def _differences(port: Port, state: State) -> List[str]:
    now = port.registers()
    wrong = [f"{name} is {now.get(name) or 0:#x} and was {value:#x}" for name, value in state.registers.items() if now.get(name) != value]
    wrong += [f"{name} is {now[name] or 0:#x} and was {value:#x}" for name, value in state.others.items()
              if name not in state.registers and name in ("cs", "ss", "cr0", "cr3", "cr4", "efer") and value is not None and now.get(name) != value]
    if port.read_virtual(state.registers["rip"], len(state.code)) != state.code:
        wrong.append(f"the code at {state.registers['rip']:#x} was {state.code.hex()}")
    return wrong
