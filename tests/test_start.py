"""What a command line imports: start-up time is modules."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vtdbg
from vtdbg.errors import UnknownName
from vtdbg.memory import open as opening
from vtdbg.rows import read_data
from vtdbg.vmx import layouts

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
    # Of a page it needs the fields, not their bits, their links or when they count.
    assert not loaded & {"vtdbg.bits", "vtdbg.vmx.gates", "vtdbg.vmx.exit_reasons", "vtdbg.commands.field_links", "vtdbg.svm.vmcb"}


def test_importing_the_package_imports_nothing_else() -> None:
    """GDB and WinDbg load it at their start: the public names are looked up when they are used."""
    code = "import sys; before = set(sys.modules); import vtdbg; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=Path(vtdbg.__file__).parent.parent)
    assert set(done.stdout.split()) == {"__future__", "vtdbg"}


def test_the_tables_are_read_out_of_a_zip_file_too(tmp_path: Path) -> None:
    """Python imports packages from zip files (zipapp); what lies beside the modules is asked of the loader."""
    package = Path(vtdbg.__file__).parent
    with zipfile.ZipFile(tmp_path / "vtdbg.zip", "w") as archive:
        for file in [*package.rglob("*.py"), *package.rglob("*.csv"), *package.rglob("*.json")]:
            archive.write(file, file.relative_to(package.parent))
    code = "from vtdbg.vmx import fields, layouts; print(fields.__file__, fields.find('guest rip').encoding, layouts.layout('bochs_2.7').extent)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "vtdbg.zip")})
    place, encoding, extent = done.stdout.split()
    assert "vtdbg.zip" in place and int(encoding) == 0x681E and int(extent) == layouts.layout("bochs_2.7").extent
    with pytest.raises(UnknownName, match="data file"):
        read_data("layouts/none.json")


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
