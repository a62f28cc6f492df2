"""The tests' side of the processor model: `Worker` starts the process that has it, cases go there and outcomes come back."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from . import build
from .guests import baseline

EXIT_FIELDS = (0x4400, 0x4402, 0x4404, 0x4406, 0x4408, 0x440A, 0x440C, 0x440E, 0x2400, 0x6400, 0x640A, 0x681C, 0x681E, 0x6820)
"""Instruction error, reason, interruption information and error code, IDT-vectoring information and error code, instruction length and
information, guest-physical address, qualification, guest-linear address; guest RSP, RIP, RFLAGS."""


@dataclass(frozen=True)
class Case:
    """One VM entry.  See the package's docstring for what each part does."""

    values: Mapping[int, int]
    memory: Mapping[int, bytes] = field(default_factory=dict)
    registers: Mapping[str, int] = field(default_factory=dict)
    code: Optional[bytes] = None
    host: str = "64-bit"
    instruction: str = "vmlaunch"
    header: Optional[int] = None
    launched: bool = False
    fields: Any = ()
    want_registers: bool = False
    dump: Sequence[Tuple[int, int]] = ()
    budget: int = 60

    def message(self) -> Dict[str, Any]:
        message = {"values": dict(self.values), "memory": dict(self.memory), "registers": dict(self.registers), "code": self.code,
                   "host": self.host, "instruction": self.instruction, "fields": self.fields if self.fields == "all" else tuple(self.fields),
                   "want_registers": self.want_registers, "launched": self.launched, "dump": tuple(self.dump), "budget": self.budget}
        if self.header is not None:
            message["header"] = self.header
        return message


@dataclass(frozen=True)
class Outcome:
    """What the processor did.

    kind "exit": the guest ran and exited, `number` is the basic reason; "inside": the guest ran and did not exit (it halts, or the budget ran
    out); "entry-failure": `number` is 33 or 34, `qualification` goes with it; "VMfailValid": `number` is the VM-instruction error;
    "VMfailInvalid"; "exception": the launching instruction itself faulted, `number` is the vector; "crash" and "hang": the model's fault.
    `messages` are Bochs' own lines.
    """

    kind: str
    number: int
    qualification: int
    log: str
    events: Sequence[Tuple[Any, ...]] = ()
    fields: Mapping[int, Optional[int]] = field(default_factory=dict)
    memory: Mapping[Tuple[int, int], bytes] = field(default_factory=dict)
    registers: Mapping[str, int] = field(default_factory=dict)

    @property
    def entered(self) -> bool:
        return self.kind in ("exit", "inside")

    @property
    def messages(self) -> List[str]:
        return self.log.splitlines()

    @property
    def failed_check(self) -> Optional[str]:
        """Bochs' words for the check that failed, without "VMFAIL: " or "VMENTER FAIL: "."""
        for line in self.messages:
            for prefix in ("VMFAIL: ", "VMENTER FAIL: "):
                if line.startswith(prefix):
                    return line[len(prefix):]
        return None


class Worker:
    """A process that has one processor model.  Use as a context manager, or call `close`.

    `revision`, `layout` ({encoding: (offset, bytes, rotation)}), `msrs` ({index: value}, absent where RDMSR faults), `cpuid`
    ({leaf: (eax, ebx, ecx, edx)}) and `physical_address_width` are what the processor says of itself; `memory` is its memory from address 0 at
    the start of a case.  Other addresses read as zeros until something writes them.
    """

    def __init__(self, model: str = "corei3_cnl") -> None:
        interpreter = build.python()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment.update(LD_PRELOAD=str(build.shim()), PYTHONPATH=str(build.wheel(interpreter)), VMXCPU_MODEL=model, PYTHONDONTWRITEBYTECODE="1")
        self._errors = tempfile.TemporaryFile()     # noqa: SIM115 - it lives as long as the process
        self.model = model
        self._process = subprocess.Popen([interpreter, str(build.HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors, env=environment)
        about = self._receive()
        self.revision: int = about["revision"]
        self.layout: Dict[int, Tuple[int, int, int]] = about["layout"]
        self.msrs: Dict[int, int] = about["msrs"]
        self.cpuid: Dict[int, Tuple[int, int, int, int]] = about["cpuid"]
        self.physical_address_width: int = about["physical_address_width"]
        self.memory: bytes = about["memory"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._errors.close()

    def _receive(self) -> Any:
        stream = self._process.stdout
        assert stream is not None
        header = stream.read(8)
        if len(header) < 8:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the processor model ended with status {self._process.returncode}:\n"
                               + self._errors.read().decode(errors="replace")[-4000:])
        return pickle.loads(stream.read(struct.unpack("<Q", header)[0]))

    def launch_many(self, cases: Iterable[Case]) -> List[Outcome]:
        """The outcomes of `cases`, in order; each case finds the memory as it was at the start."""
        data = pickle.dumps([case.message() for case in cases], protocol=4)
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<Q", len(data)) + data)
        self._process.stdin.flush()
        outcomes = []
        for result in self._receive():
            if "error" in result:
                raise RuntimeError(result["error"])
            outcomes.append(Outcome(**result))
        return outcomes

    def launch(self, values: Mapping[int, int], **rest: Any) -> Outcome:
        """One VM entry with these VMCS values (by encoding); `rest` are the other parts of a Case."""
        return self.launch_many([Case(values, **rest)])[0]

    def baseline(self, mode: str = "64-bit", host: str = "64-bit") -> Dict[int, int]:
        """A VMCS that enters, as {encoding: value}: see `guests.baseline`."""
        return baseline(self.msrs, mode, host)

    def guest_case(self, code: bytes, values: Optional[Mapping[int, int]] = None, mode: str = "64-bit", **rest: Any) -> Case:
        """A case that runs `code` in a guest; `values` are laid over the baseline.  All fields and registers come back."""
        merged = self.baseline(mode)
        merged.update(values or {})
        rest.setdefault("fields", "all")
        rest.setdefault("want_registers", True)
        return Case(merged, code=code, **rest)

    def run_guest(self, code: bytes, values: Optional[Mapping[int, int]] = None, mode: str = "64-bit", **rest: Any) -> Outcome:
        return self.launch_many([self.guest_case(code, values, mode, **rest)])[0]

    def ept_case(self, access: str, gpa: int, entries: Mapping[int, int], eptp: int, values: Optional[Mapping[int, int]] = None,
                 data: Optional[Mapping[int, bytes]] = None, **rest: Any) -> Case:
        """A case in which a 64-bit guest makes one access ("read", "write" or "fetch") to guest-physical `gpa` through EPT.

        `entries` are EPT entries by physical address of the entry, laid over a PML4 at EPT_PML4 that maps the first GiB onto itself with
        2 MiB pages (which the guest's own tables and code need).  `gpa` has to be below 1 GiB, or `values` has to bring a CR3 that maps it.
        """
        stub = {"read": b"\x8a\x07\xf4", "write": b"\x88\x07\xf4", "fetch": b"\xff\xe7"}[access]
        merged = self.baseline()
        merged[0x401E] |= 2
        merged[0x201A] = eptp
        merged.update(values or {})
        memory = {address: struct.pack("<Q", entry) for address, entry in entries.items()}
        memory.update(data or {})
        registers = {"rdi": gpa, **rest.pop("registers", {})}
        rest.setdefault("fields", EXIT_FIELDS)
        return Case(merged, code=stub, memory=memory, registers=registers, **rest)
