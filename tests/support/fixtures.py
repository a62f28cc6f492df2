"""Fixtures on real engines.  An engine that cannot be had skips its tests, or fails them where VTDBG_REQUIRE_LIVE=1 asks for them."""

from __future__ import annotations

import os
from typing import Iterator

import pytest

from support.vmxcpu import Unavailable, Worker


def need(engine: str, problem: Exception) -> None:
    """Skip, or fail where the run must not go without `engine`."""
    if os.environ.get("VTDBG_REQUIRE_LIVE") == "1":
        pytest.fail(f"{engine} is required (VTDBG_REQUIRE_LIVE=1): {problem}")
    pytest.skip(f"{engine} is not here: {problem}")


@pytest.fixture(scope="session")
def vmx_worker() -> Iterator[Worker]:
    """Bochs' CPU model in VMX root operation (Cannon Lake: EPT, VPID, unrestricted guest, VMCS shadowing; no posted interrupts)."""
    try:
        worker = Worker()
    except Unavailable as problem:
        need("the VMX processor model", problem)
        raise
    with worker:
        yield worker


@pytest.fixture(scope="session")
def vmx_worker_new() -> Iterator[Worker]:
    """The same as a Sapphire Rapids: virtual-interrupt delivery, posted interrupts, PML, tertiary and secondary VM-exit controls."""
    try:
        worker = Worker("sapphire_rapids")
    except Unavailable as problem:
        need("the VMX processor model", problem)
        raise
    with worker:
        yield worker
