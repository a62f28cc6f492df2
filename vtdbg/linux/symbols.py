"""A file with the types and symbols of KVM for a debugger, out of what a running kernel tells of itself.

Distributions ship kernels without debugging information, but with BTF; the addresses of a running kernel are in its /proc/kallsyms.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import struct
import zlib
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

from vtdbg.errors import FormatError
from vtdbg.linux.btf import MAGIC, Btf
from vtdbg.linux.dwarf import elf_file, unit

STRUCTURES = ("kvm", "kvm_vcpu", "vcpu_svm", "vcpu_vmx", "svm_cpu_data", "svm_nested_state", "nested_vmx", "kvm_vmcb_info", "loaded_vmcs",
              "vmcs", "vmcs12", "vmcb", "xarray", "xa_node", "list_head", "task_struct", "pid")
LARGEST = 1 << 30
"""Bytes of a file, and of what a compressed one may become."""

_ELF, _XZ, _GZIP, _ZSTD, _LZ4 = b"\x7fELF", b"\xfd7zXZ\0", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"
_NO_ZSTD = "it is compressed with {what}: unpack it first ({tool})"
_LINE = re.compile(rb"^([0-9a-fA-F]+) (\S) (\S+)(?:[ \t]+\[(\S+)\])?[ \t\r]*$", re.M)


class Symbols(NamedTuple):
    """`data` is the ELF file; `types` how many types each file of BTF has; `missing` names of symbols that vtdbg uses and nobody gave."""

    data: bytes
    types: Dict[str, int]
    addresses: int
    missing: Tuple[str, ...]


# What the kernel calls what vtdbg asks for; a kernel has those of one vendor.
WANTED = (("vm_list",), ("__per_cpu_offset",), ("kvm_running_vcpu",), ("svm_data", "current_vmcs"), ("phys_base",), ("init_top_pgt",))


def read_file(path: str) -> bytes:
    """A file's bytes, unpacked where it is compressed by xz or gzip.  Raises FormatError."""
    try:
        with open(path, "rb") as file:
            # /sys and /proc tell no size.
            data = file.read(LARGEST)
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error
    return _unpacked(data, path)


def _unpacked(data: bytes, path: str) -> bytes:
    try:
        if data.startswith(_XZ):
            return lzma.LZMADecompressor().decompress(data, LARGEST)
        if data.startswith(_GZIP):
            return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, LARGEST)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise FormatError(path, f"cannot be unpacked: {error}") from error
    if data.startswith(_ZSTD):
        raise FormatError(path, _NO_ZSTD.format(what="zstd", tool="zstd -d"))
    if data.startswith(_LZ4):
        raise FormatError(path, _NO_ZSTD.format(what="LZ4", tool="lz4 -d, or the kernel's scripts/extract-vmlinux"))
    return data


def _vmlinux_of(image: bytes, path: str) -> bytes:
    """The kernel in a bzImage (Linux, Documentation/arch/x86/boot.rst, payload_offset and payload_length)."""
    try:
        sectors, = struct.unpack_from("<B", image, 0x1F1)
        offset, length = struct.unpack_from("<II", image, 0x248)
    except struct.error:
        raise FormatError(path, "the kernel image is cut") from None
    start = (sectors + 1) * 512 + offset
    return _unpacked(image[start:start + length], path)


def btf_of(path: str) -> bytes:
    """The BTF in a file: of its own (/sys/kernel/btf), in an ELF file's .BTF, or in the ELF file of a bzImage.  Raises FormatError."""
    data = read_file(path)
    if data[0x202:0x206] == b"HdrS":
        data = _vmlinux_of(data, path)
    if data[:2] == struct.pack("<H", MAGIC):
        return data
    if not data.startswith(_ELF):
        raise FormatError(path, "it is neither BTF nor an ELF file nor a kernel image")
    return _section(data, b".BTF", path)


def _section(data: bytes, wanted: bytes, path: str) -> bytes:
    try:
        at, = struct.unpack_from("<Q", data, 0x28)
        size, count, names = struct.unpack_from("<HHH", data, 0x3A)
        rows = [struct.unpack_from("<IIQQQQ", data, at + size * index) for index in range(count)]
        titles = rows[names][4]
        for title, _, _, _, start, length in rows:
            if data[titles + title:titles + title + len(wanted) + 1] == wanted + b"\0":
                return data[start:start + length]
    except (struct.error, IndexError):
        raise FormatError(path, "its section headers are cut") from None
    raise FormatError(path, "it has no .BTF: the kernel was built without CONFIG_DEBUG_INFO_BTF (for a module, CONFIG_DEBUG_INFO_BTF_MODULES)")


def kallsyms(text: bytes, path: str = "kallsyms") -> Tuple[Dict[str, int], Dict[str, int]]:
    """(functions, everything else) by name, out of /proc/kallsyms or a System.map.  Raises FormatError.

    Where several symbols have one name the first counts: of KVM's none has another's.
    """
    functions: Dict[str, int] = {}
    others: Dict[str, int] = {}
    for address, kind, name, _ in _LINE.findall(text):
        target = functions if kind in b"tTwW" else others
        target.setdefault(name.decode("ascii", "replace"), int(address, 16) & (1 << 64) - 1)
    if not functions and not others:
        raise FormatError(path, "no line of it is one of /proc/kallsyms (address, type, name)")
    if not any(functions.values()) and not any(others.values()):
        raise FormatError(path, "all its addresses are 0: read /proc/kallsyms as root, with kernel.kptr_restrict below 2")
    return functions, others


def make_symbols(btf: Sequence[str], symbols: str, structures: Sequence[str] = ()) -> Symbols:
    """The file that a debugger loads.  `btf` are paths, the kernel's own first; `symbols` the path of /proc/kallsyms; `structures` more types.

    Raises FormatError where a file is not what it has to be.
    """
    functions, others = kallsyms(read_file(symbols), symbols)
    files: List[Btf] = []
    for path in btf:
        files.append(Btf(btf_of(path), files[0] if files else None, _title(path)))
    wanted = [*STRUCTURES, *(name for name in structures if name not in STRUCTURES)]
    for name in structures:
        if all(item.find(kind, name) is None for item in files for kind in ("STRUCT", "UNION")):
            raise FormatError(", ".join(btf), f"no structure is called {name!r}")
    known: Mapping[str, int] = {**functions, **others}
    missing = tuple(" or ".join(names) for names in WANTED if not any(name in known for name in names))
    data = elf_file([unit(item, wanted, others) for item in files], others, functions)
    return Symbols(data, {item.name: item.end - (item.base.end if item.base else 1) for item in files}, len(known), missing)


def _title(path: str) -> str:
    """A name for the unit: the module's."""
    name = os.path.basename(path).partition(".")[0]
    return "vmlinux" if name.startswith("vmlinu") else name.replace("-", "_") or "BTF"
