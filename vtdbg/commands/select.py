"""Which control block does the user mean?  By address, by text, or found by scanning; shared by every command that needs one."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, ContextManager, List, NamedTuple, Optional, Sequence, Tuple

from vtdbg.commands.scanning import STALE_VMCB as STALE_VMCB
from vtdbg.commands.scanning import STALE_VMCS as STALE_VMCS
from vtdbg.commands.scanning import scanned_blocks
from vtdbg.commands.session import Session
from vtdbg.errors import FormatError, UsageError
from vtdbg.numbers import parse_number, size_text
from vtdbg.plain_text import decode
from vtdbg.scanner import Found
from vtdbg.svm import recognise
from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx.vmcs import Vmcs

if TYPE_CHECKING:
    from vtdbg.textdump import TextDump

# Layouts that no processor uses: KVM's vmcs12 and its like in other hypervisors.
SOFTWARE_LAYOUTS = ("kvm_", "hyperv_", "virtualbox_", "xen_", "vmware_")
LONGEST_TEXT = 256 << 20
NESTED_ADDRESSES = "of a hypervisor inside a guest: its addresses are physical in that guest, not in this memory"


class VmcsAt(NamedTuple):
    """A decoded VMCS and where it is; `found` is the scan's evidence, None where the user named the address."""

    address: Optional[int]
    vmcs: Vmcs
    found: Optional[Found] = None
    text: "Optional[TextDump]" = None
    owner: str = ""
    """Whose it is by KVM's own objects, where the debugger has their symbols."""
    inside: bool = False
    """The memory is that of a guest (--inside): a software layout there is of the guest's own VMCS."""

    @property
    def nested(self) -> bool:
        """Is it a VMCS that a hypervisor keeps for a hypervisor in its guest?  Its addresses are physical in that guest, not in this memory."""
        # A shadow VMCS holds what such a hypervisor wrote, too (SDM vol. 3, VMCS Shadowing).
        software = self.vmcs.layout is not None and self.vmcs.layout.id.startswith(SOFTWARE_LAYOUTS)
        return bool(self.vmcs.shadow) or (software and not self.inside)

    @property
    def title(self) -> str:
        where = f"VMCS at {self.address:#x}" if self.address is not None else f"VMCS from {self.vmcs.origin}"
        whose = self.owner or (self.found.title if self.found else "")
        return where + (f" ({whose})" if whose else "")


class VmcbAt(NamedTuple):
    """A decoded VMCB and where it is.  0 is a legal address."""

    address: Optional[int]
    vmcb: Vmcb
    found: Optional[Found] = None
    text: "Optional[TextDump]" = None
    owner: str = ""

    @property
    def title(self) -> str:
        where = f"VMCB at {self.address:#x}" if self.address is not None else f"VMCB from {self.vmcb.origin}"
        return where + (f" ({self.owner})" if self.owner else "")


def read_text(path: str) -> str:
    """The text of a file, or of the standard input for "-"; undecodable bytes are replaced, not fatal."""
    try:
        with _opened(path) as file:
            content = file.read(LONGEST_TEXT + 1)
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error
    if len(content) > LONGEST_TEXT:
        raise FormatError(path, f"more than {size_text(LONGEST_TEXT)}: no log is so long (a memory image is named with -s)")
    found = decode(content)
    if not found.strip():
        raise FormatError(path, "there is no text in it")
    return found


def _opened(path: str) -> ContextManager[BinaryIO]:
    """The file as bytes: what the standard input's text layer makes of them depends on the locale."""
    if path != "-":
        return open(path, "rb")
    if sys.stdin is None:
        raise FormatError(path, "there is no standard input")
    return nullcontext(getattr(sys.stdin, "buffer", None) or BytesIO(sys.stdin.read().encode()))


def text_dumps(path: str, kind: str, index: Optional[int]) -> "List[TextDump]":
    """The dumps of a kind in a log: all of them, or the one with this index."""
    from vtdbg import textdump

    try:
        found = textdump.of_kind(textdump.parse(read_text(path)), kind)
    except FormatError as error:
        raise FormatError(path, error.message) from error
    if index is None:
        return found
    return [of_index(found, index, f"{kind.upper()} dump")]


def aligned_page(session: Session, address: int, what: str) -> bytes:
    """The 4 KiB at an address that has to be page-aligned."""
    if address & 0xFFF:
        if address < 0:
            raise UsageError(f"{what} address {address:#x} is negative")
        as_hexadecimal = int(str(address), 16)
        meant = f"{address} without 0x is decimal; did you mean 0x{address}?" if as_hexadecimal and not as_hexadecimal & 0xFFF else \
            f"did you mean {address & ~0xFFF:#x}?"
        raise UsageError(f"{what} address {address:#x} is not 4 KiB aligned (bits 11:0 must be 0); {meant}")
    return session.machine.memory.read_page(address)


def of_index(dumps: "Sequence[TextDump]", index: int, what: str) -> "TextDump":
    """The dump that --index names."""
    if 0 <= index < len(dumps):
        return dumps[index]
    has = f"one {what}, index 0" if len(dumps) == 1 else f"{len(dumps)} {what}s, index 0 to {len(dumps) - 1}"
    raise UsageError(f"--index {index}: the text has {has}")


def fields_and_address(words: Sequence[str], at: Optional[int], numbers_below: int) -> Tuple[List[str], Optional[int]]:
    """The names of fields, and the address of the control block: `dump` and `check` take it in front, so that people write it there too."""
    names = list(words)
    for position in (0, -1):
        if at is None and len(names) > 1 and names[position][:1].isdigit():
            try:
                number = parse_number(names[position])
            except UsageError:
                continue
            if number >= numbers_below:
                at = number
                names.pop(position)
    return names, at


def vmcs_at(session: Session, address: int) -> VmcsAt:
    """The VMCS in the page at `address`; errors name the address."""
    page = aligned_page(session, address, "VMCS")
    try:
        vmcs = Vmcs.from_page(page, session.layout, f"page {address:#x}")
    except FormatError as error:
        if _vmcb_points(page) >= recognise.FITS:
            raise UsageError(f"{error}; it looks like a VMCB: `vmcb dump {address:#x}`, `exit explain --vmcb {address:#x}`") from error
        raise
    session.machine.consider("vmcs", address)
    return VmcsAt(address, vmcs, owner=session.machine.owner(address), inside=session.machine.guest)


def _vmcb_points(page: bytes) -> int:
    kind, evidence = recognise.judge_page(page)
    return sum(item.points for item in evidence) if kind == recognise.VMCB else 0


def _doubt(page: bytes, address: int) -> List[str]:
    """What is said of a page that the user names as a VMCB and that does not look like one."""
    points = _vmcb_points(page)
    if points >= recognise.FITS:
        return []
    try:
        layout = Vmcs.from_page(page).layout
        other = f"; it is a VMCS (layout {layout.id}): `vmcs dump {address:#x}`" if layout is not None else ""
    except FormatError:
        other = ""
    return [f"this page does not look like a VMCB ({points} points of evidence, real ones have {recognise.FITS} and more){other}"]


def found_blocks(session: Session, kind: str) -> List[Found]:
    """What a scan of the memory finds, kept until the target runs."""
    found, partial = scanned_blocks(session, (kind,))
    if partial:
        # A command that works on all control blocks must not take some for all.
        raise KeyboardInterrupt
    for item in found:
        session.machine.consider(item.classification, item.address)
    return found


def chosen_vmcs(session: Session, address: Optional[int] = None, text: Optional[str] = None, index: Optional[int] = None) -> List[VmcsAt]:
    """The VMCS that the user named, or the selected processor's current one where KVM's objects tell, or every real one that a scan finds
    (pages that hold only a revision id are left out)."""
    if text is not None:
        return [VmcsAt(None, dump.vmcs(), text=dump) for dump in text_dumps(text, "vmcs", index)]
    if address is not None:
        return [vmcs_at(session, address)]
    current = session.machine.current("vmcs")
    if current is not None:
        return [vmcs_at(session, current)]
    inside = session.machine.guest
    chosen = [VmcsAt(found.address, found.vmcs, found, inside=inside) for found in found_blocks(session, "vmcs") if found.vmcs is not None]
    if not chosen:
        raise FormatError(
            session.machine.name, "no VMCS found; give its address, or a layout with --layout (`vmcs list --rejected` shows what came near)"
        )
    return chosen


def host_vmcs(session: Session, address: Optional[int] = None) -> List[VmcsAt]:
    """The VMCS whose addresses are physical in this memory: the named one (UsageError where it is not such), or all that a scan finds."""
    chosen = chosen_vmcs(session, address)
    usable = [item for item in chosen if not item.nested]
    if not usable:
        raise UsageError(f"{chosen[0].title} is {NESTED_ADDRESSES} (`source scan` shows whose it is)")
    return usable


def chosen_vmcb(
    session: Session, address: Optional[int] = None, text: Optional[str] = None, index: Optional[int] = None, layout: str = "vmcb"
) -> List[VmcbAt]:
    """The VMCB that the user named, or the selected processor's current one where KVM's objects tell, or every one that a scan finds."""
    if text is not None:
        return [VmcbAt(None, dump.vmcb(), text=dump) for dump in text_dumps(text, "vmcb", index)]
    if address is None:
        address = session.machine.current("vmcb")
    if address is not None:
        page = aligned_page(session, address, "VMCB")
        session.machine.consider("vmcb", address)
        vmcb = Vmcb.from_page(page, layout)
        vmcb.warnings += _doubt(page, address) if layout == "vmcb" else []
        return [VmcbAt(address, vmcb, owner=session.machine.owner(address))]
    chosen = [
        VmcbAt(found.address, Vmcb.from_page(session.machine.memory.read_page(found.address)), found)
        for found in found_blocks(session, "vmcb")
        if found.classification == "vmcb"
    ]
    if not chosen:
        raise FormatError(session.machine.name, "no VMCB found; give its physical address")
    return chosen


def chosen_blocks(session: Session, vmcs: Optional[int], vmcb: Optional[int]) -> Tuple[List[VmcsAt], List[VmcbAt], List[str]]:
    """The control blocks of a command that takes --vmcs and --vmcb: the named one, or all that a scan finds of both kinds.

    The third item is what has to be said of how fresh they are.  All empty where a scan finds nothing.
    """
    if vmcs is not None and vmcb is not None:
        raise UsageError("give one of --vmcs and --vmcb")
    intel = host_vmcs(session, vmcs) if vmcs is not None or (vmcb is None and _any(session, "vmcs")) else []
    amd = chosen_vmcb(session, vmcb) if vmcb is not None or (vmcs is None and _any(session, "vmcb")) else []
    return intel, amd, [STALE_VMCS] * bool(intel) + [STALE_VMCB] * bool(amd)


def _any(session: Session, kind: str) -> bool:
    if any(session.machine.current(name) is not None for name in ("vmcs", "vmcb")):
        return session.machine.current(kind) is not None
    return any(found.vmcs is not None or found.classification == "vmcb" for found in found_blocks(session, kind))
