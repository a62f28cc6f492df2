"""`source scan`: everything that a scan finds, as hypervisors, their VMs, and the hypervisors inside those."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

from vtdbg.commands.scanning import scanned_blocks
from vtdbg.commands.select import STALE_VMCB, STALE_VMCS
from vtdbg.commands.session import Session
from vtdbg.errors import VtdbgError
from vtdbg.hierarchy import Block, Hierarchy, Hypervisor, KvmPair, Page, Vm, hierarchy
from vtdbg.report import Group, Lines, Report, Table, Value, hex_or_none, hexa, text
from vtdbg.scanner import Found
from vtdbg.vmx.vmcs import Vmcs


def scan_report(session: Session) -> Report:
    """The tree, what has no place in it, and the evidence for every page."""
    found, partial = scanned_blocks(session)
    report = Report("source scan", header=session.header(), notes=list(session.machine.warnings), python=_python(session))
    if partial:
        report.notes.append(partial)
    kinds = {item.kind for item in found}
    report.notes += [STALE_VMCS] * ("vmcs" in kinds) + [STALE_VMCB] * ("vmcb" in kinds)
    tree = hierarchy(session.machine, found, kvm_pairs(session))
    report.notes += tree.notes
    for hypervisor in tree.hypervisors:
        report.add(_group(hypervisor))
    if tree.rest:
        report.add(_rest(tree))
    report.add(found_table(found, "no VMCS and no VMCB found"))
    return report


def kvm_pairs(session: Session) -> Dict[int, KvmPair]:
    """Which vmcb02 stands for which vmcb12 by KVM's objects, where the debugger has symbols of them."""
    objects = getattr(session.machine, "kvm", None)
    try:
        state = objects() if objects is not None else None
    except VtdbgError:
        state = None
    pairs: Dict[int, KvmPair] = {}
    for vcpu in state.vcpus if state is not None else ():
        at = {block.name: block.address for block in vcpu.blocks}
        first, second = at.get("vmcb01"), at.get("vmcb02")
        if vcpu.vmcb12 is not None and first is not None and second is not None:
            pairs[second] = KvmPair(first, vcpu.vmcb12, f"by KVM's objects: {vcpu.title}")
    return pairs


def found_table(found: Sequence[Found], empty: str) -> Table:
    """Every page with what speaks for and against it."""
    table = Table("found", (("address", "address"), ("kind", "kind"), ("score", "score"), ("summary", "evidence")), title="Evidence",
                  empty=empty, wrap="summary")
    for item in found:
        verb = "vmcs dump" if item.vmcs is not None else "vmcb dump" if item.classification == "vmcb" else ""
        table.add(hexa(item.address, link=f"{verb} {item.address:#x}" if verb else ""), text(item.classification, "good" if verb else "dim"),
                  str(item.score), item.summary)
    return table


def _python(session: Session) -> List[str]:
    return [*session.python_open(), "from vtdbg.hierarchy import hierarchy", "from vtdbg.scanner import relate",
            "tree = hierarchy(machine, relate(vtdbg.scan(machine), machine))",
            "for hypervisor in tree.hypervisors:", "    for vm in hypervisor.vms:", "        print(hypervisor.title, vm.tables, len(vm.blocks))"]


def _group(item: Hypervisor) -> Group:
    lines = _pages(item.pages, 2)
    for vm in item.vms:
        lines += _vm(vm, 2)
    return Group("hypervisors", f"Hypervisor: {_named(item)}", [Lines("tree", lines)], _hypervisor_data(item))


def _named(item: Hypervisor) -> str:
    blocks = [block for vm in item.vms for block in vm.blocks]
    facts = [item.title]
    if item.cr3s:
        facts.append("host CR3 " + _some([f"{value:#x}" for value in item.cr3s]))
    facts += [_count(len(item.vms), "VM"), _count(len(blocks), "virtual processor")]
    return ", ".join(facts)


def _vm(vm: Vm, indent: int) -> List[Value]:
    facts = [vm.tables.name if vm.tables is not None else "without nested tables", *([_some(vm.tags)] if vm.tags else []),
             _count(len(vm.blocks), "virtual processor")]
    kind = {"vmcs": "ept", "vmcb": "npt"}[vm.blocks[0].kind]
    link = f"{kind} dump --{'eptp' if kind == 'ept' else 'ncr3'} {vm.tables.pointer:#x}" if vm.tables is not None and vm.parent is None else ""
    lines = [Value(None, f"{' ' * indent}VM: {', '.join(facts)}", "strong", link)]
    if vm.maps_itself:
        lines.append(_line(indent + 2, "its tables map its own control block: the guest can change it", "warn"))
    for block in vm.blocks:
        lines += _block(vm, block, indent + 2)
    lines += _pages(vm.pages, indent + 2)
    for inner in vm.hypervisors:
        lines.append(Value(None, f"{' ' * (indent + 2)}hypervisor inside: {_named(inner)}", "strong"))
        for nested in inner.vms:
            lines += _vm(nested, indent + 4)
    return lines


def _block(vm: Vm, block: Block, indent: int) -> List[Value]:
    name = "VMCS" if block.kind == "vmcs" else "VMCB"
    facts = [block.mode] + [f"{register.upper()} {value:#x}" for register, value in block.registers.items() if value is not None]
    lines = [Value(None, f"{' ' * indent}{name} at {_place(block.address, block.found)}: {', '.join(facts)}",
                   link=f"{name.lower()} dump {block.found.address:#x}")]
    if block.shadow is not None:
        stands = f"; stands for the VMCS at guest-physical {block.shadow_of:#x}" if block.shadow_of is not None else ""
        lines.append(_line(indent + 2, f"shadow VMCS at {block.shadow.address:#x}: what its guest's VMREAD and VMWRITE reach{stands}"))
    for helper in block.ran_with:
        tables = f", {helper.tables.name}" if helper.tables is not None else ""
        evidence = f" ({block.ran_with_by[helper.address]})" if helper.address in block.ran_with_by else ""
        lines.append(_line(indent + 2, f"its guest ran with the {helper.kind.upper()} at {helper.found.address:#x} of the hypervisor below{tables}"
                                       f"{evidence}"))
    if block.copy is not None:
        lines.append(_line(indent + 2, f"this page is stale: its live copy is at {block.copy.address:#x}", "warn"))
    cr3 = block.registers["cr3"]
    if vm.parent is not None and cr3 is not None:
        lines.append(_line(indent + 2, _translation(vm, cr3)))
    return lines


def _translation(vm: Vm, cr3: int) -> str:
    """The page of CR3 from the guest down to the scanned memory: which tables each step uses, and where it leads."""
    page = cr3 & 0x000FFFFFFFFFF000
    steps, at, words = vm.steps_down(page), vm, []
    guest_level = _depth(vm)
    for number, address in enumerate(steps):
        level = guest_level - number
        words.append(f"L{level} {address:#x}" if address is not None else f"not mapped in L{level}")
    used = []
    vm_or_none: Optional[Vm] = at
    while vm_or_none is not None:
        used.append(vm_or_none.tables.name if vm_or_none.tables is not None else "no nested tables")
        vm_or_none = vm_or_none.parent
    return f"its CR3: {' -> '.join(words)} (through {', then '.join(used)})"


def _depth(vm: Vm) -> int:
    return 1 if vm.parent is None else 1 + _depth(vm.parent)


def _pages(pages: Sequence[Page], indent: int) -> List[Value]:
    lines = []
    for page in pages:
        copy = f"; the live copy is the VMCS at {page.copy.address:#x}" if page.copy is not None else ""
        lines.append(_line(indent, f"page {_place(page.address, page.found)}: {page.what}{copy}"))
    return lines


def _place(address: int, found: Found) -> str:
    """An address in the hypervisor's own memory, and where that is in the scanned memory."""
    return f"{address:#x}" if address == found.address else f"guest-physical {address:#x} ({found.address:#x})"


def _line(indent: int, words: str, style: str = "") -> Value:
    return Value(None, " " * indent + words, style)


def _some(words: Sequence[str], limit: int = 6) -> str:
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _rest(tree: Hierarchy) -> Lines:
    return Lines("elsewhere", [Value({"address": f"{item.address:#x}", "kind": item.classification},
                                     f"  {item.address:#x}: {item.title or item.classification}") for item in tree.rest],
                 title="Without a place in the tree")


# --- JSON --------------------------------------------------------------------------------------------------------------------------


def _hypervisor_data(item: Hypervisor) -> Dict[str, Any]:
    identity = "host_rip" if item.kind == "vmcs" else "io_bitmap"
    return {"kind": {"vmcs": "vt-x", "vmcb": "svm"}[item.kind], "level": item.level, identity: hex_or_none(item.identity),
            "host_cr3": [f"{value:#x}" for value in item.cr3s], "pages": [_page_data(page) for page in item.pages],
            "vms": [_vm_data(vm) for vm in item.vms]}


def _vm_data(vm: Vm) -> Dict[str, Any]:
    return {"tables": vm.tables.name.split()[0].lower() if vm.tables is not None else None,
            "pointer": hex_or_none(vm.tables.pointer if vm.tables is not None else None), "tags": vm.tags, "maps_itself": vm.maps_itself,
            "processors": [_block_data(vm, block) for block in vm.blocks], "pages": [_page_data(page) for page in vm.pages],
            "hypervisors": [{"title": _named(inner), **_hypervisor_data(inner)} for inner in vm.hypervisors]}


def _block_data(vm: Vm, block: Block) -> Dict[str, Any]:
    cr3 = block.registers["cr3"]
    down = [hex_or_none(step) for step in vm.steps_down(cr3 & 0x000FFFFFFFFFF000)] if cr3 is not None else []
    layout = block.fields.layout.id if isinstance(block.fields, Vmcs) and block.fields.layout is not None else None
    return {"address": f"{block.address:#x}", "page": f"{block.found.address:#x}", "layout": layout, "score": block.found.score, "mode": block.mode,
            **{name: hex_or_none(value) for name, value in block.registers.items()}, "cr3_down": down,
            "shadow": hex_or_none(block.shadow.address) if block.shadow is not None else None, "shadow_of": hex_or_none(block.shadow_of),
            "ran_with": [f"{helper.found.address:#x}" for helper in block.ran_with],
            "ran_with_evidence": [block.ran_with_by.get(helper.address) for helper in block.ran_with],
            "live_copy": hex_or_none(block.copy.address) if block.copy is not None else None}


def _page_data(page: Page) -> Dict[str, Any]:
    return {"address": f"{page.address:#x}", "page": f"{page.found.address:#x}", "what": page.what,
            "live_copy": hex_or_none(page.copy.address) if page.copy is not None else None}
