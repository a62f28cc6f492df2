"""Is the processor in the host or in a guest?  The stub does not say, and shows a guest's CR3 and GDTR as if they were the host's.

Decided by comparing the live registers with the host and the guest state of the control blocks in memory.  For SVM the host state is what
VMRUN saved at VM_HSAVE_PA: its format is the processor's own (APM vol. 2, VMRUN Instruction, Saving Host State), QEMU uses that of a VMCB.
For VMX it is the host-state area of the VMCS.  Where nothing decides, nothing is claimed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from vtdbg.svm.vmcb import Vmcb
from vtdbg.vmx.gates import gate_of
from vtdbg.vmx.vmcs import Vmcs

Registers = Mapping[str, Optional[int]]

_TABLES = ("gdtr_base", "idtr_base")
_CR3 = ~(0xFFF | 1 << 63)

# A VM entry loads them, and after #VMEXIT they are still the guest's until VMLOAD (APM vol. 2, #VMEXIT).
NOT_SWITCHED = ("tr_selector", "tr_base", "tr_limit", "tr_attributes", "ldtr_selector", "ldtr_base", "ldtr_limit", "ldtr_attributes",
                "fs_base", "gs_base", "k_gs_base", "fs", "gs")
LAST_EXIT = "control blocks are as of the last exit"


@dataclass(frozen=True)
class Block:
    """A control block's two sides, as far as it has them: `guest` and `host` registers by the names of Cpu.registers.

    `kind` "vmcb", "vmcs" or "hsave" (only a host side; `block` is then the VMCB that its RAX points to).
    """

    kind: str
    address: int
    guest: Registers = field(default_factory=dict)
    host: Registers = field(default_factory=dict)
    block: Optional[int] = None

    @property
    def title(self) -> str:
        return {"vmcb": "VMCB", "vmcs": "VMCS", "hsave": "host save area"}[self.kind] + f" at {self.address:#x}"


@dataclass(frozen=True)
class Where:
    """`mode` "host", "guest" or "unknown"; `reason` why; `block` whose guest it is (guest mode), or whose guest ran last, where known.

    `host` is what is known of the host's registers: in guest mode what was saved, in host mode the live ones without those that are the guest's.
    """

    mode: str
    reason: str
    block: Optional[Block] = None
    host: Registers = field(default_factory=dict)
    host_source: str = ""
    notes: Tuple[str, ...] = ()
    candidates: Tuple[Block, ...] = ()
    """Guest mode: the control blocks whose guest it can be, where that is not decided (`block` is None then)."""
    area: Optional[int] = None
    """The processor's host save area (SVM), where it was found."""

    @property
    def text(self) -> str:
        """For a header."""
        word = {"host": "host mode", "guest": "GUEST mode", "unknown": "host or guest is not known"}[self.mode]
        return f"{word} ({self.reason})" + (f"; {LAST_EXIT}" if self.mode == "guest" else "")


def of_vmcb(address: int, vmcb: Vmcb) -> Block:
    return Block("vmcb", address, guest=_save_area(vmcb))


def of_host_save_area(address: int, page: Vmcb) -> Block:
    """`page` decoded as a VMCB."""
    host = _save_area(page)
    return Block("hsave", address, host={name: value for name, value in host.items() if name not in NOT_SWITCHED}, block=page.get("rax"))


def _save_area(vmcb: Vmcb) -> Registers:
    found: Dict[str, Optional[int]] = {name: vmcb.get(name) for name in ("rip", "rsp", "rax", "rflags", "cr0", "cr3", "cr4", "efer")}
    for table in ("gdtr", "idtr"):
        found[f"{table}_base"], found[f"{table}_limit"] = vmcb.get(f"{table}.base"), vmcb.get(f"{table}.limit")
    found["tr_selector"], found["tr_base"], found["tr_limit"] = vmcb.get("tr.selector"), vmcb.get("tr.base"), vmcb.get("tr.limit")
    return found


_VMCS_SIDE = {"rip": "RIP", "rsp": "RSP", "cr0": "CR0", "cr3": "CR3", "cr4": "CR4", "efer": "IA32_EFER", "gdtr_base": "GDTR_BASE",
              "idtr_base": "IDTR_BASE", "tr_base": "TR_BASE", "tr_selector": "TR_SELECTOR", "fs_base": "FS_BASE", "gs_base": "GS_BASE"}


def of_vmcs(address: int, vmcs: Vmcs) -> Block:
    sides: List[Dict[str, Optional[int]]] = []
    for side in ("GUEST", "HOST"):
        sides.append({name: vmcs.get(f"{side}_{field}") for name, field in _VMCS_SIDE.items()})
        # A field that no control loads holds a number that is nobody's EFER (KVM without "load IA32_EFER": 0).
        if gate_of(vmcs, vmcs.field(f"{side}_IA32_EFER")).used is not True:
            sides[-1]["efer"] = None
    sides[0].update(gdtr_limit=vmcs.get("GUEST_GDTR_LIMIT"), idtr_limit=vmcs.get("GUEST_IDTR_LIMIT"), tr_limit=vmcs.get("GUEST_TR_LIMIT"),
                    rflags=vmcs.get("GUEST_RFLAGS"))
    return Block("vmcs", address, guest=sides[0], host=sides[1])


def agrees(live: Registers, side: Registers) -> Optional[bool]:
    """Are these the live registers' owner?  By GDTR and IDTR, which hardly ever change; by CR3 where the stub does not show them, or where
    they are equal.  None where nothing can be compared."""
    tables = [live[name] == side[name] for name in _TABLES if live.get(name) is not None and side.get(name) is not None]
    if tables:
        return all(tables)
    return _same_cr3(live, side)


def _same_cr3(live: Registers, side: Registers) -> Optional[bool]:
    mine, other = live.get("cr3"), side.get("cr3")
    return None if mine is None or other is None else mine & _CR3 == other & _CR3


def _by(live: Registers) -> str:
    return "GDTR and IDTR are" if live.get("gdtr_base") is not None else "CR3 is"


def _those(live: Registers) -> str:
    return "those" if live.get("gdtr_base") is not None else "that"


def decide(live: Registers, blocks: Sequence[Block], elsewhere: Sequence[int] = ()) -> Where:
    """Where the processor with these registers is, by the control blocks that were found.

    `elsewhere` are addresses of host save areas of which it is known that they are other processors'.
    """
    if not blocks:
        return Where("unknown", "no VMCS, VMCB or host save area was found to compare with", host=live, host_source="live")
    hosts = [block for block in blocks if block.host and agrees(live, block.host)]
    guests = [block for block in blocks if block.guest and agrees(live, block.guest)]
    if hosts and guests:
        # A hypervisor that moves its own system into the guest shares the tables with it: CR3 may still tell.
        hosts = [block for block in hosts if _same_cr3(live, block.host)]
        guests = [block for block in guests if _same_cr3(live, block.guest)]
    if hosts and not guests:
        return _host(live, hosts, blocks)
    if guests and not hosts:
        return _guest(live, guests, blocks, elsewhere)
    if guests:
        return Where("unknown", f"the live {_by(live)} {_those(live)} of the host and of the guest of {guests[0].title}")
    if not any(block.host for block in blocks):
        return Where("unknown", f"{_by(live)} not {_those(live)} of any guest found, and no host state is in memory", host_source="live")
    return Where("unknown", f"the live {_by(live)} neither the host's nor a guest's of the control blocks found")


def _host(live: Registers, hosts: Sequence[Block], blocks: Sequence[Block]) -> Where:
    guest = next((block for block in blocks if block.guest and block.guest.get("tr_base") == live.get("tr_base") is not None
                  and block.guest.get("tr_selector") == live.get("tr_selector")), None)
    host, notes = dict(live), []
    if guest is not None and guest.kind == "vmcb":
        for name in NOT_SWITCHED:
            host[name] = None
        notes.append(f"TR, LDTR, FS and GS are still those of the guest of the {guest.title} (until VMLOAD): not the host's")
    # Processors that share their tables cannot be told apart by them: then nobody knows which control block was this one's.
    ran = {found.address if found.kind == "vmcs" else found.block for found in hosts}
    block = None
    if len(ran) == 1:
        block = hosts[0] if hosts[0].kind == "vmcs" else _of_address(blocks, hosts[0].block)
    others = f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
    area = hosts[0].address if len(hosts) == 1 and hosts[0].kind == "hsave" else None
    return Where("host", f"{_by(live)} the host's, by the {hosts[0].title}{others}", block, host, "live", tuple(notes), area=area)


def _guest(live: Registers, guests: Sequence[Block], blocks: Sequence[Block], elsewhere: Sequence[int]) -> Where:
    by = ""
    if len(guests) > 1:
        # Guests of one kernel have equal tables.  What ran last on some processor is what the host save areas say.
        ran = {block.block for block in blocks if block.kind == "hsave" and block.address not in elsewhere}
        guests = [block for block in guests if block.address in ran] or guests
    if len(guests) > 1:
        # TR is each virtual processor's own and hardly ever changes.  It counts only where no other control block has it: VMRUN does not load
        # it, so that the guest of a guest runs with the TR that was loaded from another VMCB (KVM: that of vmcb01).
        same = [block for block in blocks if block.guest and _same_task(live, block.guest)]
        if len(same) == 1 and same[0] in guests:
            guests, by = same, ", and so is TR"
    if len(guests) > 1:
        listed = ", ".join(f"{block.address:#x}" for block in guests[:8]) + (" ..." if len(guests) > 8 else "")
        return Where("guest", f"{_by(live)} {_those(live)} of the guests of several {guests[0].kind.upper()}s: {listed}",
                     candidates=tuple(guests))
    return guest_of(live, guests[0], blocks, by, elsewhere)


def guest_of(live: Registers, found: Block, blocks: Sequence[Block], by: str = "", elsewhere: Sequence[int] = ()) -> Where:
    """In the guest of `found`; `by` says what else than the tables decided."""
    areas = [block for block in blocks if block.kind == "hsave" and block.block == found.address and block.address not in elsewhere]
    # A vCPU that moved left its VMCB's address in the save area of the processor that it came from, too.
    area = areas[0] if len(areas) == 1 else None
    saved, source = (found.host, found.title) if found.host else (area.host, area.title) if area is not None else ({}, "")
    return Where("guest", f"{_by(live)} {_those(live)} of the guest of the {found.title}{by}", found, saved, source,
                 area=None if area is None else area.address)


def _same_task(live: Registers, side: Registers) -> bool:
    return all(live.get(name) is not None and live.get(name) == side.get(name) for name in ("tr_base", "tr_selector"))


def _of_address(blocks: Sequence[Block], address: Optional[int]) -> Optional[Block]:
    return next((block for block in blocks if block.kind == "vmcb" and block.address == address), None)
