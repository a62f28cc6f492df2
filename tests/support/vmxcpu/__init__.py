"""A real VMX processor for tests: Bochs' CPU model, in a process of its own.

    with Worker() as cpu:                                   # or the session fixture `vmx_worker`
        outcome = cpu.launch(cpu.baseline())                # Outcome(kind="exit", number=12): the guest ran an HLT that exits
        outcome = cpu.launch({**cpu.baseline("PAE"), 0x6820: 0})
        outcome.kind, outcome.number, outcome.qualification # ("entry-failure", 33, 0)
        outcome.failed_check                                # "RFLAGS[1] cleared"

Many cases go in one call, a quarter of a millisecond each: `cpu.launch_many([Case(values, memory={address: bytes}), ...])`.  Every case starts
from the same memory and the same processor; the values are written to the VMCS page as they are, so anything can be tried.

Parts of a `Case`:
  values       {encoding: value}; what is absent is 0.  Start from `cpu.baseline(mode, host)`: modes are in `guests.MODES`.
  memory       {physical address: bytes} written before the entry (places.py says what is where; FREE is free)
  registers    the general registers as the guest gets them: {"rax": 1}
  code         guest instructions; GUEST_RIP is set to where they were put (a new address for every new sequence: the model never
               looks again at code that it has decoded).  Ends in HLT, unless it exits before.  64-bit, PAE and 32-bit guests.
  host         the mode in which VMLAUNCH is executed: "64-bit" or "32-bit" (outside IA-32e mode); the host-state fields are `values`
  instruction  "vmlaunch" or "vmresume"
  header       the first dword of the VMCS page instead of the revision
  launched     the launch state is launched, as VMRESUME wants it
  fields       encodings to bring back from the VMCS afterwards, or "all"; EXIT_FIELDS are those that describe an exit
  want_registers, dump   bring back the general registers; memory, as (address, size) pairs
  budget       instructions until the model is stopped (then `kind` is "inside")

`cpu.run_guest(code, values, mode, registers=...)` runs instructions in a guest and brings all fields back: to learn how an instruction
exits, set its exiting control in `values` ({0x4002: cpu.baseline()[0x4002] | 1 << 12}) and look at `outcome.fields[0x440E]` and friends.
`cpu.guest_case` makes the same as a Case for a batch.

`cpu.ept_case("write", gpa, {address of an EPT entry: entry}, eptp)` is one guest access through EPT entries of your choice.

`Worker(model=...)`: other processors of Bochs' ("sapphire_rapids", "corei7_haswell_4770", "core2_penryn_t9600", ...): other capability
MSRs and VMCS revisions.  `cpu.msrs`, `cpu.cpuid`, `cpu.layout`, `cpu.revision`, `cpu.physical_address_width` say what it has.

What it cannot: port I/O (no devices), CET, FRED, LBR, PT; interrupts from outside.  Bochs stops at the first failed check, and orders
its checks a little differently from the manual.
"""

from __future__ import annotations

from .build import Unavailable
from .client import EXIT_FIELDS, Case, Outcome, Worker
from .guests import MODES, baseline

__all__ = ["EXIT_FIELDS", "MODES", "Case", "Outcome", "Unavailable", "Worker", "baseline"]
