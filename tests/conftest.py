"""Dumps of real hypervisors, decompressed once a test session, and what the hypervisor's own kernel said about them."""

from __future__ import annotations

import json
import lzma
import os
import signal
from pathlib import Path
from typing import Any, Dict

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["support.fixtures"]

DATA = Path(__file__).parent / "data"
_ZEROS = bytes(4096)

# What a test says must not depend on the day or on how busy the machine is: each run draws the same examples (`make fuzz` draws others), and none
# is refused for the time that it takes or that making it takes.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")

# What the user's environment says to programs: a source, how wide and how coloured their output is, how lines are edited.
for name in ("VTDBG_SOURCE", "VTDBG_HISTORY", "COLUMNS", "LINES", "NO_COLOR", "XDG_STATE_HOME"):
    os.environ.pop(name, None)
os.environ["INPUTRC"] = os.devnull

# A shell starts what it puts into the background with SIGINT ignored, and every program below inherits that: Ctrl-C would be tested in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def unpack_sparse(packed: Path, target: Path) -> Path:
    """`packed` (.xz) as a file in which pages of zeros are holes: 128 MiB of RAM take the room of what is stored in them."""
    with lzma.open(packed) as source, open(target, "wb") as output:
        size = 0
        while True:
            block = source.read(1 << 20)
            if not block:
                break
            for at in range(0, len(block), 4096):
                page = block[at:at + 4096]
                if page != _ZEROS[:len(page)]:
                    output.seek(size + at)
                    output.write(page)
            size += len(block)
        output.truncate(size)
    return target


def _truth(path: str) -> Dict[str, Any]:
    return json.loads((DATA / path).read_text())


@pytest.fixture(scope="session")
def dumps_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="session")
def intel_plain(dumps_dir: Path) -> Path:
    """Raw RAM of KVM on Bochs 2.7: VM A (VMCS 0x6826000, HLT exit) and VM B (VMCS in the truth, failed entry)."""
    return unpack_sparse(DATA / "intel/kvm-bochs27.raw.xz", dumps_dir / "kvm-bochs27.raw")


@pytest.fixture(scope="session")
def intel_nested(dumps_dir: Path) -> Path:
    """Raw RAM of KVM on Bochs 2.7 with a hypervisor in its guest: vmcs01, vmcs02, shadow, cached vmcs12, flushed and stale vmcs12 pages."""
    return unpack_sparse(DATA / "intel/kvm-bochs27-nested.raw.xz", dumps_dir / "kvm-bochs27-nested.raw")


@pytest.fixture(scope="session")
def amd_exit(dumps_dir: Path) -> Path:
    """ELF core of KVM-AMD stopped in the host just after #VMEXIT 0x400."""
    return unpack_sparse(DATA / "amd/kvm96-exit.trim.elf.xz", dumps_dir / "kvm96-exit.elf")


@pytest.fixture(scope="session")
def amd_l2(dumps_dir: Path) -> Path:
    """ELF core of KVM-AMD stopped while the guest runs: the VMCB is as of the last #VMEXIT."""
    return unpack_sparse(DATA / "amd/kvm96-l2.trim.elf.xz", dumps_dir / "kvm96-l2.elf")


@pytest.fixture(scope="session")
def intel_plain_truth() -> Dict[str, Any]:
    return _truth("intel/kvm-bochs27.truth.json")


@pytest.fixture(scope="session")
def intel_nested_truth() -> Dict[str, Any]:
    return _truth("intel/kvm-bochs27-nested.truth.json")


@pytest.fixture(scope="session")
def amd_exit_truth() -> Dict[str, Any]:
    return _truth("amd/kvm96-exit.truth.json")


@pytest.fixture(scope="session")
def amd_l2_truth() -> Dict[str, Any]:
    return _truth("amd/kvm96-l2.truth.json")
