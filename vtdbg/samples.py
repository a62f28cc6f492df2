"""Memory of real hypervisors that comes with the package: `-s sample:vmx` is a machine to try every command on."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import pkgutil
import tempfile
from typing import Dict, Tuple

from vtdbg.errors import UnknownName
from vtdbg.machine import Machine
from vtdbg.names import near_names

PREFIX = "sample:"
SAMPLES: Dict[str, Tuple[str, str]] = {
    "vmx": ("kvm-vmx.raw.xz", "KVM on Intel VMX (Linux 6.1 in Bochs 2.7): one VM stopped at a HLT exit, one that failed to enter"),
    "svm": ("kvm-svm.elf.xz", "KVM on AMD SVM (Linux 6.1 in QEMU): stopped in the host just after a #VMEXIT"),
}
CHUNK = 1 << 16


def open_sample(name: str) -> Machine:
    """The packaged machine by its name ("vmx", "svm"); UnknownName with the near ones."""
    if name not in SAMPLES:
        raise UnknownName("sample", name, near_names(name, SAMPLES) or tuple(SAMPLES))
    from vtdbg.memory.open import open_machine

    file, title = SAMPLES[name]
    descriptor, path = tempfile.mkstemp(prefix=f"vtdbg-{name}-")
    try:
        with os.fdopen(descriptor, "wb") as target:
            unpack_sparse(pkgutil.get_data("vtdbg", f"data/samples/{file}") or b"", target)
        machine = open_machine(path)
    finally:
        # Windows keeps a mapped file: it stays in the temporary folder.
        with contextlib.suppress(PermissionError):
            os.unlink(path)
    machine.name = PREFIX + name
    machine.provenance = f"packaged sample: {title}"
    return machine


def unpack_sparse(packed: bytes, target: "io.BufferedWriter") -> None:
    """Unpacks xz data; runs of zeros become holes of the file."""
    size = 0
    with lzma.open(io.BytesIO(packed)) as source:
        for chunk in iter(lambda: source.read(CHUNK), b""):
            if chunk.count(0) == len(chunk):
                target.seek(len(chunk), os.SEEK_CUR)
            else:
                target.write(chunk)
            size += len(chunk)
    target.truncate(size)
