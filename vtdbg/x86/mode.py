"""The mode that a processor's registers put it in, in words."""

from __future__ import annotations

from typing import Optional

PE, PG, PAE, VM = 1 << 0, 1 << 31, 1 << 5, 1 << 17
"""CR0.PE, CR0.PG, CR4.PAE, RFLAGS.VM (SDM vol. 3, Modes of Operation; Control Registers)."""


def mode_name(cr0: Optional[int], cr4: Optional[int], long_mode: Optional[bool], rflags: Optional[int] = None, cs_long: Optional[bool] = None) -> str:
    """"64-bit", "compatibility" (32-bit code of a 64-bit system), "PAE", "32-bit", "32-bit without paging", "real", "v86", or "unknown".

    `long_mode` is EFER.LMA, `cs_long` the L bit of CS.  None is unknown: what it would decide is then left open ("PAE or 64-bit").
    """
    if cr0 is None:
        return {True: "64-bit", None: "unknown", False: "unknown"}[long_mode]
    if not cr0 & PE:
        return "real"
    if long_mode:
        return "compatibility" if cs_long is False else "64-bit"
    if rflags is not None and rflags & VM:
        return "v86"
    if not cr0 & PG:
        return "32-bit without paging"
    if cr4 is None:
        return "32-bit or PAE" + (" or 64-bit" if long_mode is None else "")
    if not cr4 & PAE:
        return "32-bit"
    return "PAE or 64-bit" if long_mode is None else "PAE"
