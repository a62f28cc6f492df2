"""Values of VMCB fields in words: by the bit table, and for what no bit table says (exit names, segment types)."""

from __future__ import annotations

from vtdbg import bits
from vtdbg.svm import exit_codes
from vtdbg.svm.fields import VmcbField


def value_in_words(field: VmcbField, value: int) -> str:
    """What the number says; empty where the number is all there is to say."""
    if field.name == "exit_code":
        known = exit_codes.get(value)
        return known.name if known is not None else "no such exit code"
    if field.bits == "vmcb_attrib":
        return _attributes(field, value)
    if field.name.endswith(".selector") and value & 0xFFFC == 0:
        return "null"
    return field.table.describe(value) if field.table is not None else ""


def _attributes(field: VmcbField, value: int) -> str:
    from vtdbg.x86.descriptors import type_in_any_mode

    table = bits.table("vmcb_attrib")
    if not table.test(value, "P") and not field.name.startswith(("tr.", "cs.")):
        return f"not present ({value:#x})" if value else "not present"
    flags = [ident for ident in ("P", "G", "L", "DB", "AVL") if table.test(value, ident)]
    words = [type_in_any_mode(table.get(value, "TYPE"), table.test(value, "S")), f"DPL {table.get(value, 'DPL')}", " ".join(flags)]
    return ", ".join(filter(None, words))
