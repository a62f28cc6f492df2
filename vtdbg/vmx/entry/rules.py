"""What the VM-entry rules read: the state of a VMCS with what is known of the processor.  How a rule is decided: `vtdbg.rules`."""

from __future__ import annotations

from typing import Callable, Dict, Iterable, Optional, Union

from vtdbg import bits, rules
from vtdbg.errors import MemoryUnavailable
from vtdbg.memory.base import PhysicalMemory
from vtdbg.rules import Failure, Missing, all_of, any_of, bit_list, mask_of, named_bits
from vtdbg.vmx.capabilities import WORD_SOURCES, VmxCapabilities, msr_name
from vtdbg.vmx.controls import ACTIVATED_BY, WORDS
from vtdbg.vmx.vmcs import Vmcs

__all__ = ["Check", "Failure", "Gate", "Missing", "Rule", "RuleBook", "State", "all_of", "any_of", "bit_list", "mask_of", "named_bits", "off", "on"]

MAXPHYADDR = "physical-address width (CPUID.80000008H:EAX[7:0])"
LINEAR_WIDTH = "linear-address width (CPUID.80000008H:EAX[15:8])"
EFER_MSR = 0xC0000080


class State:
    """What the rules read: the fields, the processor's capabilities, memory, and what is known of the processor at the time of the entry."""

    def __init__(self, vmcs: Vmcs, caps: Optional[VmxCapabilities] = None, memory: Optional[PhysicalMemory] = None, *,
                 vmcs_address: Optional[int] = None, host_long_mode: Optional[bool] = None, in_smm: bool = False,
                 instruction: Optional[str] = None) -> None:
        self.vmcs, self.caps, self.memory = vmcs, caps, memory
        self.vmcs_address, self.host_long_mode, self.in_smm, self.instruction = vmcs_address, host_long_mode, in_smm, instruction
        self.fields: Dict[str, int] = {value.field.name: value.value for value in vmcs.values()}
        self._words: Dict[str, Optional[int]] = {word: self._effective(word) for word in WORDS}
        self._msrs: Dict[int, int] = dict(caps.items()) if caps is not None else {}
        self._width = caps.structure_address_width if caps is not None else None
        self._linear_width = caps.linear_address_width if caps is not None else None

    def __getitem__(self, name: str) -> int:
        """The field by its canonical name."""
        try:
            return self.fields[name]
        except KeyError:
            raise Missing(name) from None

    def _effective(self, word: str) -> Optional[int]:
        gate = ACTIVATED_BY.get(word)
        if gate is not None:
            above = self._effective(gate[0])
            if above is None:
                return None
            if not above & mask_of(*gate):
                return 0
        return self.fields.get(WORDS[word])

    def test(self, word: str, mask: int) -> bool:
        """Is one of the bits of `mask` on in the control word as the processor uses it?"""
        value = self._words[word]
        if value is not None:
            return value & mask != 0
        raw = self.fields.get(WORDS[word])
        if raw is not None and not raw & mask:
            return False    # whether the word is active or not
        raise Missing(*self._unknown(word))

    def _unknown(self, word: str) -> Iterable[str]:
        if WORDS[word] not in self.fields:
            yield WORDS[word]
        gate = ACTIVATED_BY.get(word)
        if gate is not None and self._words[gate[0]] is None:
            yield from self._unknown(gate[0])

    def on(self, word: str, ident: str) -> bool:
        """`on("sec", "EPT")`"""
        return self.test(word, mask_of(word, ident))

    def word(self, word: str) -> int:
        """The control word as the processor uses it: 0 while nothing activates it."""
        value = self._words[word]
        if value is None:
            raise Missing(*self._unknown(word))
        return value

    def msr(self, index: int) -> int:
        """A capability MSR."""
        value = self._msrs.get(index)
        if value is None:
            raise Missing(msr_name(index))
        return value

    def capability(self, table: str, index: int, ident: str) -> int:
        """A field of a capability MSR: `capability("vmx_misc", 0x485, "ZERO_LEN_INS")`."""
        return bits.table(table).get(self.msr(index), ident)

    def supports(self, word: str, ident: str) -> bool:
        """May the control be 1 on this processor?"""
        answer = self.caps.supports(word, ident) if self.caps is not None else None
        if answer is None:
            raise Missing(msr_name(WORD_SOURCES[word].msr))
        return answer

    def cpuid(self, leaf: int, register: str, bit: int, what: str, subleaf: int = 0) -> bool:
        """A feature bit of CPUID; `what` names the feature where it is unknown."""
        answer = self.caps.cpuid_bit(leaf, register, bit, subleaf) if self.caps is not None else None
        if answer is None:
            raise Missing(f"CPUID.{leaf:02X}H: {what}")
        return answer

    def too_wide(self, address: int) -> int:
        """The bits of `address` beyond the processor's physical-address width.

        Every processor has 32 bits and none more than 52, so the width is not needed for what lies outside the two.
        """
        if not address >> 32:
            return 0
        if self._width is None:
            if address >> 52:
                return address >> 52 << 52
            raise Missing(MAXPHYADDR)
        return address >> self._width << self._width

    def canonical(self, address: int) -> bool:
        """Is the linear address canonical for the processor's width (48 or 57)?

        That is what segment and table bases and MSRs have to be, whatever CR4.LA57 is.
        """
        if is_canonical(address, 48):
            return True
        if not is_canonical(address, 57):
            return False
        if self._linear_width is None:
            raise Missing(LINEAR_WIDTH)
        return is_canonical(address, self._linear_width)

    @property
    def linear_width(self) -> int:
        if self._linear_width is None:
            raise Missing(LINEAR_WIDTH)
        return self._linear_width

    def read(self, address: int, size: int) -> bytes:
        """Physical memory."""
        if self.memory is None:
            raise Missing(f"memory at {address:#x}")
        try:
            return self.memory.read(address, size)
        except MemoryUnavailable as problem:
            raise Missing(f"memory at {problem.address:#x}") from None


def is_canonical(address: int, width: int) -> bool:
    """Are bits 63:width-1 equal?"""
    top = address >> (width - 1)
    return top in (0, (1 << (65 - width)) - 1)


Gate = Callable[[State], bool]
Check = Callable[[State], Union[None, str, Failure]]
Rule = rules.Rule[State]
RuleBook = rules.RuleBook[State]


def on(word: str, ident: str) -> Gate:
    """The control is 1."""
    mask = mask_of(word, ident)
    return lambda state: state.test(word, mask)


def off(word: str, ident: str) -> Gate:
    mask = mask_of(word, ident)
    return lambda state: not state.test(word, mask)
