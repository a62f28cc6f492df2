"""Files that are plainly not an image of memory: each is named with what to do, instead of being decoded as raw bytes."""

from __future__ import annotations

from typing import NamedTuple, Optional


class Foreign(NamedTuple):
    offset: int
    magic: bytes
    name: str
    advice: str


_UNPACK = "decompress it first with `{}`"
_DISK = "that is a disk, not memory: dump the memory instead (QEMU: dump-guest-memory)"
_STATE = "a saved state mixes memory with devices: write a memory dump instead ({})"

KNOWN = (
    # Archives and compressed files.  Magic numbers: the formats' own specifications (RFC 1952, RFC 8878, xz-file-format 1.2, APPNOTE, POSIX pax).
    Foreign(0, b"\x1f\x8b\x08", "gzip-compressed", _UNPACK.format("gzip -d")),
    Foreign(0, b"\xfd7zXZ\x00", "xz-compressed", _UNPACK.format("xz -d")),
    Foreign(0, b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK.format("zstd -d")),
    Foreign(0, b"BZh", "bzip2-compressed", _UNPACK.format("bzip2 -d")),
    Foreign(0, b"\x04\x22\x4d\x18", "lz4-compressed", _UNPACK.format("lz4 -d")),
    Foreign(0, b"\x89LZO\x00\r\n\x1a\n", "lzop-compressed", _UNPACK.format("lzop -d")),
    Foreign(0, b"\xff\x06\x00\x00sNaPpY", "a snappy stream", "decompress it first with `snzip -d`"),
    Foreign(0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    Foreign(0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    Foreign(0, b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    Foreign(257, b"ustar", "a tar archive", "unpack it first"),
    # Disks.  QEMU docs/interop/qcow2, VMDK and VHDX specifications.
    Foreign(0, b"QFI\xfb", "a qcow2 disk image", _DISK),
    Foreign(0, b"KDMV", "a VMDK disk image", _DISK),
    Foreign(0, b"vhdxfile", "a VHDX disk image", _DISK),
    Foreign(0, b"conectix", "a VHD disk image", _DISK),
    Foreign(0x40, b"\x7f\x10\xda\xbe", "a VDI disk image", _DISK),
    Foreign(0x8001, b"CD001", "an ISO 9660 image", _DISK),
    # Saved states.
    Foreign(0, b"QEVM", "a QEMU migration stream (savevm)", _STATE.format("QEMU: dump-guest-memory")),
    Foreign(0, b"LibvirtQemudSave", "a libvirt saved domain", _STATE.format("virsh dump --memory-only")),
    Foreign(0, b"\x7fVirtualBox SavedState", "a VirtualBox saved state", _STATE.format("VBoxManage debugvm NAME dumpvmcore")),
    Foreign(0, b"XenSavedDomain", "a Xen saved domain", _STATE.format("xl dump-core")),
    # Crash dumps of one process, executables, documents.
    Foreign(0, b"MDMP", "a Windows minidump of one process", "physical memory is in a kernel memory dump (MEMORY.DMP, complete)"),
    Foreign(0, b"\xcf\xfa\xed\xfe", "a Mach-O file", "give a memory dump"),
    Foreign(0, b"\xfe\xed\xfa\xcf", "a Mach-O file", "give a memory dump"),
    Foreign(0, b"!<arch>\n", "an ar archive", "give a memory dump"),
    Foreign(0, b"SQLite format 3\x00", "an SQLite database", "give a memory dump"),
    Foreign(0, b"%PDF-", "a PDF document", "give a memory dump"),
    Foreign(0, b"\x89PNG\r\n\x1a\n", "a PNG picture", "give a memory dump"),
    Foreign(0, b"\xff\xd8\xff", "a JPEG picture", "give a memory dump"),
    Foreign(0, b"GIF8", "a GIF picture", "give a memory dump"),
)

HEADER_SIZE = 0x9000
"""How much of a file's beginning the tests below look at."""

_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")


def what_it_is(header: bytes) -> Optional[str]:
    """One line, "what: advice", if `header` (the first HEADER_SIZE bytes) is of a file that cannot be memory; else None."""
    for known in KNOWN:
        if header[known.offset:known.offset + len(known.magic)] == known.magic:
            return f"{known.name}: {known.advice}"
    if _is_portable_executable(header):
        return "a Windows executable (PE): give a memory dump"
    if _is_text(header[:4096]):
        return "a text file, not memory: a log is given with --text (the format raw takes any file for memory)"
    return None


def _is_portable_executable(header: bytes) -> bool:
    at = int.from_bytes(header[0x3C:0x40], "little")
    return header[:2] == b"MZ" and header[at:at + 4] == b"PE\0\0"


def _is_text(sample: bytes) -> bool:
    if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = sample[:len(sample) & ~1].decode("utf-16", errors="replace")
        return all(character.isprintable() or character.isspace() for character in text)
    if any(byte < 0x20 and byte not in _TEXT_CONTROLS for byte in sample):
        return False
    for cut in range(4):
        # The sample may end inside a character of up to four bytes.
        try:
            sample[:len(sample) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return len(sample) > cut
    return False
