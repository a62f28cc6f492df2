"""VMCS values that enter, for every kind of guest, made from the processor's own capability MSRs."""

from __future__ import annotations

from typing import Dict, Mapping

from .places import EPT_PML4, GUEST_CODE, HOST_CODE, PAE_PDPT, PD32, PML4, STACK, TSS

MODES = ("64-bit", "compatibility", "PAE", "32-bit", "real", "virtual-8086", "unpaged")
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")


def _host(host: str) -> Dict[int, int]:
    long_mode = host == "64-bit"
    cr3 = {"64-bit": PML4, "PAE": PAE_PDPT, "32-bit": PD32}[host]
    return {
        0x6C00: 0x80050033, 0x6C02: cr3, 0x6C04: 0x2610 if host == "32-bit" else 0x2620,
        0x2C02: 0xD01 if long_mode else 0, 0x2C00: 0x0007040600070406,
        0x6C14: STACK + 0xC00, 0x6C16: HOST_CODE, 0x6C0A: TSS, 0x6C0C: 0, 0x6C0E: 0, 0x6C06: 0, 0x6C08: 0,
        0x0C00: 0x18, 0x0C02: 0x10, 0x0C04: 0x18, 0x0C06: 0x18, 0x0C08: 0, 0x0C0A: 0, 0x0C0C: 0x20,
        0x4C00: 0, 0x6C10: 0, 0x6C12: 0,
    }


def _true(msrs: Mapping[int, int], true: int, old: int) -> int:
    """The bits that have to be 1."""
    return msrs.get(true, msrs[old]) & 0xFFFFFFFF


def baseline(msrs: Mapping[int, int], mode: str = "64-bit", host: str = "64-bit") -> Dict[int, int]:
    """{encoding: value}: a guest of `mode` at an HLT that exits (reason 12), every exception exits too.

    "real" and "unpaged" are unrestricted guests on EPT; "compatibility" is 32-bit code in IA-32e mode.  `host` is the hypervisor's
    mode ("64-bit", "PAE", "32-bit") in the host-state area.
    """
    long_guest = mode in ("64-bit", "compatibility")
    exit_controls = _true(msrs, 0x48F, 0x483)
    entry_controls = _true(msrs, 0x490, 0x484)
    efer = bool(msrs.get(0x490, msrs[0x484]) >> 32 & 1 << 15)
    if host == "64-bit":
        exit_controls |= 1 << 9 | (1 << 21 if efer else 0)
    if efer:
        entry_controls |= 1 << 15
    if long_guest:
        entry_controls |= 1 << 9
    secondary = bool(msrs[0x482] >> 63)
    values = {
        0x4000: _true(msrs, 0x48D, 0x481), 0x4002: _true(msrs, 0x48E, 0x482) | 1 << 7 | (1 << 31 if secondary else 0), 0x401E: 0,
        0x400C: exit_controls, 0x4012: entry_controls, 0x4004: 0xFFFFFFFF, 0x4006: 0, 0x4008: 0, 0x400A: 0, 0x400E: 0, 0x4010: 0,
        0x4014: 0, 0x4016: 0, 0x4018: 0, 0x401A: 0, 0x401C: 0,
        0x2800: (1 << 64) - 1, 0x681A: 0x400, 0x6820: 2, 0x681C: STACK + 0x400, 0x681E: GUEST_CODE, 0x6822: 0,
        0x2802: 0, 0x2804: 0x0007040600070406, 0x4824: 0, 0x4826: 0, 0x482A: 0, 0x6824: 0, 0x6826: 0,
        0x6816: 0, 0x6818: 0, 0x4810: 0xFFFF, 0x4812: 0xFFFF,
        0x080C: 0, 0x480C: 0, 0x4820: 0x10000, 0x6812: 0,
        0x080E: 0x20, 0x480E: 0x67, 0x4822: 0x8B, 0x6814: TSS,
        **_host(host),
    }
    values.update(_registers(mode))
    for index, name in enumerate(SEGMENTS):
        selector, limit, rights, base = _segment(mode, name)
        values.update({0x0800 + 2 * index: selector, 0x4800 + 2 * index: limit, 0x4814 + 2 * index: rights, 0x6806 + 2 * index: base})
    if mode in ("real", "unpaged"):
        values[0x401E] |= 1 << 1 | 1 << 7
        values[0x201A] = EPT_PML4 | 3 << 3 | 6
    return values


def _registers(mode: str) -> Dict[int, int]:
    cr0, cr3, cr4, efer = {
        "64-bit": (0x80050033, PML4, 0x2620, 0xD01),
        "compatibility": (0x80050033, PML4, 0x2620, 0xD01),
        "PAE": (0x80050033, PAE_PDPT, 0x2620, 0),
        "32-bit": (0x80050033, PD32, 0x2610, 0),
        "virtual-8086": (0x80050033, PD32, 0x2610, 0),
        "real": (0x00000030, 0, 0x2000, 0),
        "unpaged": (0x00000031, 0, 0x2000, 0),
    }[mode]
    values = {0x6800: cr0, 0x6802: cr3, 0x6804: cr4, 0x2806: efer}
    if mode == "virtual-8086":
        values[0x6820] = 0x20002 | 3 << 12
        values[0x681E] = GUEST_CODE & 0xFFF
        values[0x681C] = 0x800
    if mode == "real":
        values[0x681E] = GUEST_CODE & 0xFFF
        values[0x681C] = 0x800
    return values


def _segment(mode: str, name: str) -> "tuple[int, int, int, int]":
    """(selector, limit, access rights, base)"""
    if mode == "virtual-8086" or mode == "real":
        selector = {"CS": GUEST_CODE >> 4, "SS": STACK >> 4}.get(name, 0)
        rights = 0xF3 if mode == "virtual-8086" else (0x9B if name == "CS" else 0x93)
        return selector, 0xFFFF, rights, selector << 4
    if name == "CS":
        return 0x10, 0xFFFFFFFF, 0xA09B if mode == "64-bit" else 0xC09B, 0
    if name in ("FS", "GS"):
        return 0, 0, 0x10000, 0
    return 0x18, 0xFFFFFFFF, 0xC093, 0
