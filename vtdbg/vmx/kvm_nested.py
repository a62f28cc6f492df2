"""KVM's own record of a nested hypervisor: which page of its guest the cached vmcs12 stands for.

While a nested hypervisor uses a VMCS, its page is stale: KVM keeps the values in `cached_vmcs12` until VMCLEAR.  `struct nested_vmx` holds the
pointer to that copy, and right before it `current_vmptr`, the guest-physical address that the copy stands for (Linux 6.1,
arch/x86/kvm/vmx/vmx.h; `vmxon_ptr` is two words further in front).  Where another version orders its members otherwise, nothing is found.
"""

from __future__ import annotations

import struct
from typing import Collection, Dict, List, NamedTuple, Optional, Sequence

from vtdbg.memory.base import PhysicalMemory

_WORDS = struct.Struct("<QQQQ")
_KNOWN_BITS = (1 << 30) - 1
"""The kernel's direct map begins at a multiple of 1 GiB: a pointer ends in the same 30 bits as the physical address."""
_KERNEL = 0xFF
_CHUNK = 1 << 20
_HITS = 1 << 16
"""Places that are looked at for one page: hostile memory can hold nothing else."""


class Record(NamedTuple):
    """`current` and `vmxon` are guest-physical addresses; `address` is where the pointer to the copy is."""

    address: int
    current: int
    vmxon: Optional[int]


def nested_records(memory: PhysicalMemory, copies: Sequence[int], places: Collection[int]) -> Dict[int, List[Record]]:
    """{address of a copy: records that point to it} for cached vmcs12 pages `copies`.

    `places` are the guest-physical addresses that can be meant: pages that hold a vmcs12 revision identifier.  A word that only looks like the
    pointer is not followed by chance by one of those.
    """
    found: Dict[int, List[Record]] = {}
    left = dict.fromkeys(copies, _HITS)
    for start, view in memory.views():
        data = view.cast("B") if view.format != "B" else view
        for at in range(0, len(data), _CHUNK):
            # The record may begin in the piece before.
            first = max(at - _WORDS.size, 0)
            piece = bytes(data[first:at + _CHUNK])
            for copy in copies:
                for record in _in_piece(piece, start + first, copy, places, left):
                    if record not in found.setdefault(copy, []):
                        found[copy].append(record)
    return found


def _in_piece(piece: bytes, address: int, copy: int, places: Collection[int], left: Dict[int, int]) -> List[Record]:
    records = []
    needle = copy.to_bytes(8, "little")[:3]
    at = piece.find(needle)
    while at >= 0 and left[copy] > 0:
        left[copy] -= 1
        if (address + at) % 8 == 0 and at >= _WORDS.size - 8 and at + 8 <= len(piece):
            vmxon, _, current, pointer = _WORDS.unpack_from(piece, at - _WORDS.size + 8)
            if pointer >> 56 == _KERNEL and not (pointer ^ copy) & _KNOWN_BITS and current in places and pointer & 0xFFF == 0:
                records.append(Record(address + at, current, vmxon if vmxon in places and vmxon != current else None))
        at = piece.find(needle, at + 1)
    return records
