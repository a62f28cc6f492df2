"""What a command line imports: start-up time is modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vtdbg.memory import open as opening

PROGRAM = "import sys; from vtdbg.cli import main; status = main(sys.argv[1:]); print(*sorted(sys.modules), file=sys.stderr); sys.exit(status)"


def modules(*words: str) -> "set[str]":
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_listing_a_raw_image_imports_no_other_reader_and_no_disassembler(intel_plain: Path) -> None:
    """A cold `vmcs list` is mostly imports: what the command does not use is not there."""
    loaded = modules("vmcs", "list", "-s", str(intel_plain))
    assert "vtdbg.memory.raw" in loaded and "vtdbg.scanner" in loaded
    for name in ("elf", "kdump", "flattened", "lime", "avml", "windows", "vmware"):
        assert f"vtdbg.memory.{name}" not in loaded, name
    assert not loaded & {"capstone", "pygdbmi", "difflib", "vtdbg.textdump", "vtdbg.vmx.exits", "vtdbg.targets", "vtdbg.enumeration"}


def test_every_reader_says_how_its_files_begin() -> None:
    """The first bytes that `open` compares before it imports a reader are those that the reader itself asks for."""
    for name, starts in opening._STARTS.items():
        reader = opening._reader(name)
        header = bytes(64)
        assert name == "raw" or not reader.recognise(header, "x"), name
        for magic in (getattr(reader, "MAGIC", None), getattr(reader, "SIGNATURE", None), *getattr(reader, "SIGNATURES", ())):
            assert magic is None or magic[:4] in starts, name
        for number in getattr(reader, "MAGICS", ()):
            assert number.to_bytes(4, "little") in starts
