"""Fixtures on real engines.  An engine that cannot be had skips its tests, or fails them where VTDBG_REQUIRE_LIVE=1 asks for them."""

from __future__ import annotations

from typing import Iterator

import pytest

from support.live import had
from support.vmxcpu import Worker


@pytest.fixture(scope="session")
def vmx_worker() -> Iterator[Worker]:
    """Bochs' CPU model in VMX root operation (Cannon Lake: EPT, VPID, unrestricted guest, VMCS shadowing; no posted interrupts)."""
    with had("the VMX processor model", Worker) as worker:
        yield worker


@pytest.fixture(scope="session")
def vmx_worker_new() -> Iterator[Worker]:
    """The same as a Sapphire Rapids: virtual-interrupt delivery, posted interrupts, PML, tertiary and secondary VM-exit controls."""
    with had("the VMX processor model", lambda: Worker("sapphire_rapids")) as worker:
        yield worker
