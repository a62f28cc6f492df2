"""What KVM keeps in nested-table entries that the processor does not use: the only sight of it is the entry itself.

KVM installs, for a guest-physical page with no memory slot (MMIO), an entry that always faults and that says which page it is and which
generation of the memory slots it belongs to (Linux 6.1, arch/x86/kvm/mmu/spte.c, make_mmio_spte).  On EPT the entry has W and X without R
(a misconfiguration is cheaper to handle than a violation), with NPT it is present with reserved bit 51 set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Mapping, Optional, Tuple

from vtdbg import bits

if TYPE_CHECKING:
    from vtdbg.walk import Step

EPT_MARKER, EPT_MARKER_MASK = 0b110, 0b111
NPT_MARKER = NPT_MARKER_MASK = 1 << 51 | 1
MARKERS: Mapping[str, Tuple[int, int]] = {"ept": (EPT_MARKER, EPT_MARKER_MASK), "npt": (NPT_MARKER, NPT_MARKER_MASK)}
"""What KVM's MMIO entries have in common, and in which bits."""
_PAGE = 4095
_L1TF_BITS = 5
_LEAST_WIDTH = 40
"""No processor with memory encryption has narrower physical addresses (those that exist have 43 or more)."""


@dataclass(frozen=True)
class MmioEntry:
    """`generation` of the memory slots; `l1tf_low` is the lowest of the five address bits that KVM sets against L1TF, None without them."""

    generation: int
    l1tf_low: Optional[int]


def mmio_entry(entry: int, gpa: int, marker: int, marker_mask: int) -> Optional[MmioEntry]:
    """KVM's MMIO entry for `gpa`'s page, or None.

    The marker alone would also fit other software's entries, so the page number that KVM stores has to be the one that was walked.
    """
    table = bits.table("kvm_mmio_spte")
    if entry & marker_mask != marker or table.reserved_violations(entry):
        return None
    stored, page = table.get(entry, "ADDRESS") & ~marker, gpa & ~_PAGE
    generation = table.get(entry, "GENERATION_HIGH") << 8 | table.get(entry, "GENERATION_LOW")
    if stored == page:
        return MmioEntry(generation, None)
    # Processors with the L1TF bug: the five highest cacheable address bits are set, the page's own bits there move up by five
    # (Linux 6.1, spte.c, shadow_nonpresent_or_rsvd_mask).
    for low in range(32 - _L1TF_BITS, 47):
        moved = ((1 << _L1TF_BITS) - 1) << low
        if stored == (page & ~moved | moved | (page & moved) << _L1TF_BITS):
            return MmioEntry(generation, low)
    return None


def software_words(step: "Step", gpa: int, kind: str) -> str:
    """What software keeps in the entry of a step of a walk ("ept" or "npt") that the processor does not use; empty where there is nothing."""
    if not step.entry:
        return ""
    found = describe_mmio(step.entry, gpa, kind) if step.level == 1 else ""
    return found or (f"software bits {step.software_bits:#x}" if step.software_bits else "")


def describe_mmio(entry: int, gpa: int, kind: str) -> str:
    """One phrase for a reason; empty where the entry ("ept" or "npt") is not KVM's MMIO entry for `gpa`."""
    found = mmio_of(entry, gpa, kind)
    if found is None:
        return ""
    return f"software bits as in KVM's MMIO entry: page {gpa & ~_PAGE:#x} (the page walked), {about_mmio(found)}"


def mmio_of(entry: int, gpa: int, kind: str) -> Optional[MmioEntry]:
    """KVM's MMIO entry of "ept" or "npt" for `gpa`'s page, or None."""
    marker, mask = MARKERS[kind]
    if entry & mask != marker:
        return None
    found = mmio_entry(entry, gpa, marker, mask)
    low = 51
    while found is None and kind == "npt" and low > _LEAST_WIDTH and entry >> low - 1 & 1:
        # A host with memory encryption marks with all reserved address bits, from its physical-address width on, or, where that bit is the
        # C-bit, from the next one on (Linux 6.1, arch/x86/kvm/svm/svm.c, svm_adjust_mmio_mask).
        low -= 1
        wide = (1 << 52) - (1 << low) | 1
        found = mmio_entry(entry, gpa, wide, wide)
    return found


def about_mmio(found: MmioEntry) -> str:
    """What the entry says besides the page."""
    more = f", address bits {found.l1tf_low + _L1TF_BITS - 1}:{found.l1tf_low} set against L1TF" if found.l1tf_low is not None else ""
    return f"memory-slot generation {found.generation}{more}"
