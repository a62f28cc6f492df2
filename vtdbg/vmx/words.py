"""Values of VMCS fields in words: by the bit table, and for what no bit table says (exit names, segment types, lengths)."""

from __future__ import annotations

from vtdbg import bits
from vtdbg.vmx.fields import VmcsField

NO_POINTER = (1 << 64) - 1
# Their value selects bits of another word: a set bit is not a mistake, whatever it selects.
MASKS = {"CR0_GUEST_HOST_MASK": "cr0", "CR4_GUEST_HOST_MASK": "cr4", "PAGE_FAULT_ERROR_CODE_MASK": "pfec", "PAGE_FAULT_ERROR_CODE_MATCH": "pfec"}


def value_in_words(field: VmcsField, value: int) -> str:
    """What the number says; empty where the number is all there is to say."""
    if field.name in MASKS:
        return bits.table(MASKS[field.name]).describe_mask(value)
    if field.bits == "access_rights":
        return _access_rights(value)
    if field.name == "VM_EXIT_REASON":
        return _exit_reason(value)
    if field.table is not None:
        return field.table.describe(value)
    return _number(field, value)


def _access_rights(value: int) -> str:
    from vtdbg.x86.descriptors import type_in_any_mode

    table = bits.table("access_rights")
    if table.test(value, "UNUSABLE"):
        return "unusable" + (f" (rest {value & 0xFFFF:#x})" if value & 0xFFFF else "")
    flags = [ident for ident in ("P", "G", "L", "DB", "AVL") if table.test(value, ident)]
    words = [type_in_any_mode(table.get(value, "TYPE"), table.test(value, "S")), f"DPL {table.get(value, 'DPL')}", " ".join(flags)]
    words += [f"reserved {wrong.field.bits}={wrong.number:#x}!" for wrong in table.reserved_violations(value)]
    return ", ".join(filter(None, words))


def _exit_reason(value: int) -> str:
    from vtdbg.vmx.exits import reasons

    table = bits.table("exit_reason")
    basic = table.get(value, "BASIC")
    known = reasons().get(basic)
    name = f"{basic} {known.name}" if known is not None else f"{basic} (no such reason)"
    flags = [decoded.ident or f"reserved {decoded.field.bits}!" for decoded in table.shown(value) if decoded.ident != "BASIC"]
    return " ".join([name, *flags])


def _number(field: VmcsField, value: int) -> str:
    if field.name == "VMCS_LINK_POINTER":
        return "none (all ones)" if value == NO_POINTER else "of a shadow VMCS"
    if field.name == "VM_INSTRUCTION_ERROR":
        from vtdbg.vmx.exits import instruction_errors

        known = instruction_errors().get(value)
        return known.title if known is not None else ""
    if field.name.endswith("_SELECTOR"):
        return "null" if value & 0xFFFC == 0 else bits.describe("selector", value)
    if field.name.endswith(("_COUNT", "_LEN")) or field.name in ("VIRTUAL_PROCESSOR_ID", "TPR_THRESHOLD", "PLE_GAP", "PLE_WINDOW"):
        return str(value) if value > 9 else ""
    if field.name == "TSC_OFFSET" and value >> 63:
        return f"-{(1 << 64) - value:#x}"
    return ""
