"""How a check is written down and decided: rules, what they read, and the three verdicts.  VM-entry checks, VMRUN checks and lints are rules.

A rule has a condition under which it applies (`when`) and a check that says what is wrong, or None.  Each of the two may need an input
that is not there; then it raises `Missing`.  The rule fails only where it applies and something is wrong, passes where one of the two is
known not to hold, and is undecided otherwise: a missing input never makes a pass or a fail.

`S` is what the rules of a book read: the state of a VMCS or a VMCB with what is known of the processor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Callable, Generic, List, NamedTuple, Optional, Tuple, TypeVar, Union

from vtdbg import bits
from vtdbg.findings import FAIL, PASS, UNDECIDED, Finding

S = TypeVar("S")
Outcome = Tuple[Union[str, int], ...]


class Missing(Exception):
    """An input of a rule is not known.  Internal: the engine turns it into an undecided finding."""

    def __init__(self, *names: str) -> None:
        self.names = names
        super().__init__(", ".join(names))


class Failure(NamedTuple):
    """What a check found wrong, with a hint of its own or the number of the list entry that is to blame."""

    message: str
    hint: str = ""
    number: Optional[int] = None


Gate = Callable[[S], bool]
Check = Callable[[S], Union[None, str, Failure]]


@cache
def mask_of(table: str, ident: str) -> int:
    return bits.table(table)[ident].mask


def all_of(*gates: Gate[S]) -> Gate[S]:
    """Every gate holds; one that is known not to hold decides, whatever is missing for the others."""
    def gate(state: S) -> bool:
        missing: List[str] = []
        for one in gates:
            try:
                if not one(state):
                    return False
            except Missing as problem:
                missing.extend(problem.names)
        if missing:
            raise Missing(*missing)
        return True
    return gate


def any_of(*gates: Gate[S]) -> Gate[S]:
    """One gate holds; one that is known to hold decides."""
    def gate(state: S) -> bool:
        missing: List[str] = []
        for one in gates:
            try:
                if one(state):
                    return True
            except Missing as problem:
                missing.extend(problem.names)
        if missing:
            raise Missing(*missing)
        return False
    return gate


@dataclass(frozen=True)
class Rule(Generic[S]):
    """One check of the manual.

    `id` is what a finding carries; `row` is the row of the inventory of checks that it implements; `must` is the requirement in words.
    `outcome` is how the processor reports a failure: ('VMfailValid', 7), ('entry-failure', 33, 0), ...
    """

    id: str
    row: str
    area: str
    must: str
    see: str
    fields: Tuple[str, ...]
    outcome: Outcome
    check: Check[S]
    when: Optional[Gate[S]] = None
    hint: str = ""
    severity: str = "fail"
    passed: Finding = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", self.finding(PASS, self.must))

    def finding(self, verdict: str, message: str, hint: str = "", missing: Tuple[str, ...] = ()) -> Finding:
        return Finding(self.id, self.area, verdict, message, self.see, self.fields, hint, self.severity, missing)

    def decide(self, state: S) -> Tuple[Finding, Optional[Failure]]:
        """The finding, and what failed."""
        missing: Tuple[str, ...] = ()
        if self.when is not None:
            try:
                if not self.when(state):
                    return self.passed, None
            except Missing as problem:
                missing = tuple(dict.fromkeys(problem.names))
        try:
            wrong = self.check(state)
        except Missing as problem:
            missing = tuple(dict.fromkeys(missing + problem.names))
        else:
            if wrong is None:
                return self.passed, None
            if not missing:
                failure = Failure(wrong) if isinstance(wrong, str) else wrong
                return self.finding(FAIL, failure.message, failure.hint or self.hint), failure
        return self.finding(UNDECIDED, f"undecided without {', '.join(missing)}: {self.must}", missing=missing), None


class RuleBook(Generic[S]):
    """Collects the rules of one module in the manual's order while the module is imported."""

    def __init__(self, area: str, see: str, outcome: Outcome, severity: str = "fail") -> None:
        self.area, self.see, self.outcome, self.severity = area, see, outcome, severity
        self._rules: List[Rule[S]] = []

    def add(self, id: str, row: str, must: str, fields: Tuple[str, ...], check: Check[S], *,
            when: Optional[Gate[S]] = None, hint: str = "", see: str = "", outcome: Optional[Outcome] = None) -> None:
        self._rules.append(Rule(id, row, self.area, must, see or self.see, fields, outcome or self.outcome, check, when, hint, self.severity))

    def rule(self, id: str, row: str, must: str, *fields: str, when: Optional[Gate[S]] = None, hint: str = "", see: str = "",
             outcome: Optional[Outcome] = None) -> Callable[[Check[S]], Check[S]]:
        """The decorator: the function is the rule's check."""
        def register(check: Check[S]) -> Check[S]:
            self.add(id, row, must, fields, check, when=when, hint=hint, see=see, outcome=outcome)
            return check
        return register

    @property
    def rules(self) -> Tuple[Rule[S], ...]:
        return tuple(self._rules)


def bit_list(value: int) -> str:
    """"bit 3", "bits 7, 5:4": the 1 bits of a value, highest first."""
    ranges: List[str] = []
    high: Optional[int] = None
    count = 0
    for bit in range(value.bit_length() - 1, -2, -1):
        is_set = bit >= 0 and value >> bit & 1
        count += 1 if is_set else 0
        if is_set and high is None:
            high = bit
        elif not is_set and high is not None:
            ranges.append(str(high) if high == bit + 1 else f"{high}:{bit + 1}")
            high = None
    return f"bit{'s' if count > 1 else ''} {', '.join(ranges)}"


def named_bits(table: str, value: int) -> str:
    """The 1 bits of `value` by the names of a bit table: "bit 13 (VMXE), bit 5 (PAE)"; the rest as numbers."""
    words = []
    rest = value
    for row in bits.table(table).fields:
        part = value & row.mask
        if part and row.ident and row.high == row.low:
            words.append(f"bit {row.low} ({row.name})")
            rest &= ~part
    if rest:
        words.append(bit_list(rest))
    return ", ".join(words)
