"""What a check found out: the one result type of the VM-entry checks, the VMRUN checks, and the lints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, List, Tuple

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
AREAS = ("controls", "host", "guest")


@dataclass(frozen=True)
class Finding:
    """One rule and how it came out.

    `id` names the rule ("guest.cs.type"); `area` is 'controls', 'host' or 'guest'; `verdict` is 'pass', 'fail' or 'undecided'.
    `message` says it in a developer's words, with the offending bits; `see` cites the manual's section by title; `fields` are the
    identifiers of what the rule read.  `hint` is what to try where the mistake is a known one.  `severity` is 'fail' for what stops the
    entry and 'lint' for what enters and breaks later.  `missing` names the inputs without which the rule is undecided.
    """

    id: str
    area: str
    verdict: str
    message: str
    see: str
    fields: Tuple[str, ...] = ()
    hint: str = ""
    severity: str = "fail"
    missing: Tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.verdict == FAIL

    @property
    def undecided(self) -> bool:
        return self.verdict == UNDECIDED


def failures(findings: Iterable[Finding]) -> List[Finding]:
    """Those that stop the entry, in their order (which is the processor's)."""
    return [finding for finding in findings if finding.failed and finding.severity == "fail"]


def undecided(findings: Iterable[Finding]) -> List[Finding]:
    return [finding for finding in findings if finding.undecided and finding.severity == "fail"]
