"""Bytes of a log as text, whatever wrote it."""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE


def decode(data: bytes) -> str:
    """UTF-8, or UTF-16 where its byte-order mark says so (PowerShell's >, WinDbg's .logopen /u); what is neither is replaced, not fatal.

    Lines end in a line feed alone afterwards.
    """
    encoding = "utf-16" if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig"
    return data.decode(encoding, "replace").replace("\r\n", "\n").replace("\r", "\n")
