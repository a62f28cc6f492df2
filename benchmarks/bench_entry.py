#!/usr/bin/env python3
"""All checks of a VM entry on a full VMCS, in milliseconds and as a ratio to other ways in the same run.

    bench_entry.py

Other ways: looking up the fields that the checks read, by name, in the VMCS (what any check has to do at least); and, where the processor model
of the tests is installed, one VM entry on it, which stops at the first failed check.  Fails above 1 ms for the checks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.vmxcpu import Case, Unavailable, Worker  # noqa: E402
from test_entry_rules import EPT, Row, build  # noqa: E402

from vtdbg.vmx.entry import check_vm_entry, lint_vm_entry, predict_vm_entry  # noqa: E402
from vtdbg.vmx.entry.predict import all_rules  # noqa: E402

LIMIT_MS = 1.0


def best(action: Callable[[], object], least: float = 1.0) -> float:
    """Milliseconds for one call: the best of as many as fit in `least` seconds."""
    fastest, end = float("inf"), time.perf_counter() + least
    while time.perf_counter() < end:
        begin = time.perf_counter()
        action()
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest * 1000


def model_entry_ms() -> float:
    with Worker() as worker:
        values = worker.baseline()
        cases = [Case(values)] * 200
        return best(lambda: worker.launch_many(cases)) / len(cases)


def main() -> int:
    vmcs, caps, given = build(Row("", on=[EPT]), broken=False)
    names = [name for rule in all_rules() for name in rule.fields]
    check = best(lambda: check_vm_entry(vmcs, caps, **given))
    rows = [("every check", check), ("every check and the prediction", check + best(lambda: predict_vm_entry(vmcs, caps, **given))),
            ("lints", best(lambda: lint_vm_entry(vmcs, caps, given["memory"]))),
            (f"{len(names)} field look-ups by name", best(lambda: [vmcs.get(name) for name in names]))]
    try:
        rows.append(("one entry on the processor model", model_entry_ms()))
    except Unavailable as problem:
        print(f"no processor model: {problem}")
    print(f"{len(all_rules())} rules on {len(vmcs)} fields")
    for title, took in rows:
        print(f"{title:36} {took:8.3f} ms   {took / check:6.2f} of the checks")
    if check > LIMIT_MS:
        print(f"the checks take more than {LIMIT_MS} ms")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
