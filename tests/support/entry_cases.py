"""VMCSs on the edges of the VM-entry rules, and what Bochs' messages mean in terms of the rules."""

from __future__ import annotations

import random
import re
import struct
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from support.vmxcpu import MODES, Case, Worker
from support.vmxcpu.places import FREE, IO_BITMAP_A, LINK, MSR_BITMAP, PML4, VIRTUAL_APIC, VMCS
from vtdbg.memory.base import PhysicalMemory, Range
from vtdbg.vmx.capabilities import VmxCapabilities

Values = Dict[int, int]
LIST = FREE + 0x1000
"""Where generated MSR-load areas lie."""


class ModelMemory(PhysicalMemory):
    """Memory as the model has it: what it starts with, what the case writes, zeros elsewhere."""

    def __init__(self, start: bytes, writes: Mapping[int, bytes], vmcs: bytes = b"") -> None:
        self._start, self._writes = start, writes

    def read(self, address: int, size: int) -> bytes:
        data = bytearray(self._start[address:address + size].ljust(size, b"\0"))
        for at, piece in self._writes.items():
            low, high = max(at, address), min(at + len(piece), address + size)
            if low < high:
                data[low - address:high - address] = piece[low - at:high - at]
        return bytes(data)

    def ranges(self) -> Optional[List[Range]]:
        return None


def capabilities(worker: Worker) -> VmxCapabilities:
    """What the model says of itself, but with 48-bit linear addresses.

    Bochs takes the width of the current paging for every linear address, the manual the processor's width for bases and MSRs (SDM vol. 3,
    Checks on Host Segment and Descriptor-Table Registers, footnote on linear-address width); its hosts here run with 4-level paging.
    """
    return VmxCapabilities.from_msrs(worker.msrs, physical_address_width=worker.physical_address_width, linear_address_width=48,
                                     cpuid={(leaf, 0): registers for leaf, registers in worker.cpuid.items()})


# -- what Bochs says --------------------------------------------------------------------------------------------------------

SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
MESSAGES: Sequence[Tuple[str, str]] = (
    (r"VMCS EXEC CTRL: VMX pin-based controls", "controls.pin.allowed"),
    (r"VMCS EXEC CTRL: VMX proc-based controls", "controls.proc.allowed"),
    (r"VMCS EXEC CTRL: VMX secondary controls", "controls.sec.allowed"),
    (r"VMCS EXEC CTRL: VMX tertiary controls", "controls.tert.allowed"),
    (r"VMCS EXEC CTRL: too may CR3 targets", "controls.cr3_targets"),
    (r"I/O bitmap A phy addr", "controls.io_bitmap_a"),
    (r"I/O bitmap B phy addr", "controls.io_bitmap_b"),
    (r"MSR bitmap phy addr", "controls.msr_bitmap"),
    (r"misconfigured virtual NMI control", "controls.virtual_nmis controls.nmi_window"),
    (r"VMREAD bitmap phy addr", "controls.shadow.vmread"),
    (r"VMWRITE bitmap phy addr", "controls.shadow.vmwrite"),
    (r"broken #VE information address", "controls.ve_information"),
    (r"virtual apic phy addr", "controls.virtual_apic"),
    (r"virtual interrupt delivery must be set together with external interrupt", "controls.interrupt_delivery.exiting"),
    (r"TPR threshold too big", "controls.tpr_threshold.reserved"),
    (r"TPR threshold > TPR shadow", "controls.tpr_threshold.vtpr"),
    (r"posted interrupts must be enabled together with virtual interrupt delivery", "controls.posted.delivery"),
    (r"posted interrupts notification vector", "controls.posted.vector"),
    (r"Posted Interrupt Descriptor phy addr", "controls.posted.descriptor"),
    (r"posted interrupts must be enabled together 'ack interrupt on exit'", "controls.posted.acknowledge"),
    (r"APIC virtualization is enabled without TPR shadow",
     "controls.x2apic.tpr_shadow controls.apic_register.tpr_shadow controls.interrupt_delivery.tpr_shadow controls.ipi_virtualization.tpr_shadow"),
    (r"apic access page phy addr", "controls.apic_access"),
    (r"virtualize X2APIC mode enabled together", "controls.x2apic.apic_access"),
    (r"invalid EPTPTR value",
     "controls.eptp.memory_type controls.eptp.walk_length controls.eptp.ad controls.eptp.sss controls.eptp.reserved"),
    (r"unrestricted guest without EPT", "controls.unrestricted_guest.ept"),
    (r"MBE is enabled without EPT", "controls.mode_based_execute.ept"),
    (r"guest VPID == 0", "controls.vpid"),
    (r"VM Functions control reserved bits", "controls.vmfunc.allowed"),
    (r"EPTP-SWITCHING: EPT disabled", "controls.eptp_switching.ept"),
    (r"eptp list phy addr", "controls.eptp_switching.list"),
    (r"PML is enabled without EPT", "controls.pml.ept"),
    (r"PML base phy addr", "controls.pml.address"),
    (r"SPP is enabled without EPT", "controls.sub_page_write.ept"),
    (r"SPP base phy addr", "controls.sub_page_write.table"),
    (r"TSC multiplier should be non zero", "controls.tsc_multiplier"),
    (r"VMX vmexit controls allowed", "controls.exit.allowed"),
    (r"VMX vmexit secondary controls", "controls.exit2.allowed"),
    (r"save_VMX_preemption_timer", "controls.preemption_timer.save"),
    (r"VMEXIT CTRL: msr store addr", "controls.exit_msr_store"),
    (r"VMEXIT CTRL: msr load addr", "controls.exit_msr_load"),
    (r"VMX vmentry controls allowed", "controls.entry.allowed"),
    (r"VMENTRY from outside SMM", "controls.smm"),
    (r"VMENTRY CTRL: msr load addr", "controls.entry_msr_load"),
    (r"VMENTRY broken interruption info", "controls.event.reserved"),
    (r"VMENTRY bad injected event vector", "controls.event.vector"),
    (r"VMENTRY bad injected event instr length", "controls.event.length"),
    (r"VMENTRY bad MTF injection", "controls.event.vector"),
    (r"VMENTRY bad injected event type", "controls.event.type"),
    (r"broken error code", "controls.event.error_code"),
    (r"VMENTRY bad error code", "controls.event.error_code_bits"),
    (r"x86-64 host control invalid", "host.size.long"),
    (r"x86-64 guest\(\d\)/host\(\d\) controls", "host.size.legacy"),
    (r"host state invalid CR0", "host.cr0"),
    (r"host state invalid CR3", "host.cr3"),
    (r"host state invalid CR4", "host.cr4"),
    (r"host CS selector 0", "host.cs.null"),
    (r"host SS selector 0", "host.ss.null"),
    (r"invalid host TR selector", "host.tr.null host.tr.selector"),
    (r"host (TR|FS|GS|GDTR|IDTR) BASE non canonical", "host.{}.base"),
    (r"host SYSENTER_ESP_MSR", "host.sysenter_esp"),
    (r"host SYSENTER_EIP_MSR", "host.sysenter_eip"),
    (r"invalid Memory Type in host MSR_PAT", "host.pat"),
    (r"invalid value in host IA32_SPEC_CTRL", "host.spec_ctrl"),
    (r"host EFER reserved bits", "host.efer.reserved"),
    (r"host EFER \(.*\) inconsistent", "host.efer.long_mode"),
    (r"host CR4.PAE=0 with x86-64 host", "host.size.pae"),
    (r"host RIP non-canonical", "host.rip"),
    (r"host RIP > 32 bit", "host.size.rip"),
    (r"host CR4.PCIDE set", "host.size.pcide"),
    (r"RFLAGS reserved bits are set", "guest.rflags.reserved"),
    (r"RFLAGS\[1\] cleared", "guest.rflags.reserved"),
    (r"Enter to x86-64 guest with RFLAGS.VM", "guest.rflags.vm"),
    (r"guest invalid CR0", "guest.cr0"),
    # Bochs reads PG as bits 63:31 here; with a high bit it is the reserved bit that fails.
    (r"unrestricted guest CR0.PG without CR0.PE", "guest.cr0.pg guest.cr0"),
    (r"guest invalid CR3", "guest.cr3"),
    (r"guest invalid CR4", "guest.cr4"),
    (r"guest CR4.PAE=0 in x86-64", "guest.long_mode.pae"),
    (r"CR4.PCIDE set in 32-bit guest", "guest.legacy.pcide"),
    (r"guest invalid DR7", "guest.dr7"),
    (r"v8086 guest bad (\w+).BASE", "guest.{}.v86_base"),
    (r"v8086 guest (\w+).LIMIT", "guest.{}.v86_limit"),
    (r"v8086 guest (\w+).AR", "guest.{}.v86_rights"),
    (r"guest (LDTR|TR|FS|GS).BASE non canonical", "guest.{}.base"),
    (r"guest (\w+).BASE > 32 bit", "guest.{}.base"),
    (r"guest (\w+) not segment", "guest.{}.s"),
    (r"guest (\w+) not present", "guest.{}.p"),
    (r"guest (\w+).AR/LIMIT malformed", "guest.{}.reserved guest.{}.granularity"),
    (r"unrestricted guest CS.DPL != 0", "guest.cs.dpl"),
    (r"guest CS.TYPE", "guest.cs.type"),
    (r"x86_64 guest wrong CS.D_B/L", "guest.cs.db"),
    (r"guest SS.TYPE", "guest.ss.type"),
    (r"guest (\w+) not ACCESSED", "guest.{}.type"),
    (r"guest CODE segment (\w+) not READABLE", "guest.{}.type"),
    (r"guest non-conforming (\w+).RPL < ", "guest.{}.dpl"),
    (r"guest non-conforming CS.DPL", "guest.cs.dpl"),
    (r"guest CS.RPL != SS.RPL", "guest.ss.rpl"),
    (r"guest SS.RPL <> SS.DPL", "guest.ss.dpl"),
    (r"unrestricted guest SS.DPL != 0", "guest.ss.dpl_0"),
    (r"guest IDTR/IDTR.BASE non canonical", "guest.gdtr.base guest.idtr.base"),
    (r"guest GDTR/IDTR limit", "guest.gdtr.limit guest.idtr.limit"),
    (r"guest (LDTR|TR).TI set", "guest.{}.ti"),
    (r"guest incorrect LDTR type", "guest.ldtr.type"),
    (r"guest (LDTR|TR) is not system segment", "guest.{}.s"),
    (r"guest TR invalid", "guest.tr.usable"),
    (r"guest incorrect TR type", "guest.tr.type"),
    (r"guest SYSENTER_ESP_MSR", "guest.sysenter_esp"),
    (r"guest SYSENTER_EIP_MSR", "guest.sysenter_eip"),
    (r"invalid Memory Type in guest MSR_PAT", "guest.pat"),
    (r"invalid value in guest MSR_IA32_SPEC_CTRL", "guest.spec_ctrl"),
    (r"guest EFER reserved bits", "guest.efer.reserved"),
    (r"guest EFER.LMA doesn't match", "guest.efer.lma"),
    (r"guest EFER \(.*\) inconsistent", "guest.efer.lme"),
    (r"guest RIP > 32 bit", "guest.rip.high"),
    (r"link pointer malformed", "guest.link_pointer"),
    (r"link pointer (must indicate shadow|incorrect revision)", "guest.link_pointer.revision"),
    (r"link pointer equal to current", "guest.link_pointer.current"),
    (r"tmpDR6 reserved bits", "guest.pending_debug.reserved guest.pending_debug.rtm"),
    (r"guest activity state -?\d+", "guest.activity.supported"),
    (r"guest HLT state with SS.DPL", "guest.activity.hlt_dpl"),
    (r"interruptibility state broken when entering non active", "guest.activity.blocking"),
    (r"interruptibility state broken", "guest.interruptibility.reserved guest.interruptibility.both guest.interruptibility.enclave"),
    (r"can't be blocked by STI when EFLAGS.IF", "guest.interruptibility.sti_if"),
    (r"blocked when injecting external interrupt", "guest.interruptibility.external guest.rflags.if"),
    (r"blocked when injecting NMI", "guest.interruptibility.nmi_mov_ss guest.interruptibility.nmi_sti guest.interruptibility.nmi"),
    (r"No guest interruptions are allowed|Only NMI or #MC", "guest.activity.event"),
    (r"SMM guest should block SMI", "guest.interruptibility.smi"),
    (r"must not indicate the wait-for-SIPI state", "guest.activity.smm"),
    (r"SMI blocked when not in SMM", "guest.interruptibility.smi"),
    (r"PDPTR", "guest.pdptes"),
    (r"Error when loading guest MSR", "guest.msr_load"),
)


def rules_of(message: str) -> Set[str]:
    """The rules that a message of Bochs' can mean."""
    selector = re.search(r"host segreg (\d) TI/RPL", message)
    if selector:
        return {f"host.{SEGMENTS[int(selector.group(1))].lower()}.selector"}
    for pattern, ids in MESSAGES:
        found = re.search(pattern, message)
        if found:
            register = found.group(1).lower() if found.groups() else ""
            return {one.format(register) for one in ids.split()}
    return set()


# -- mutations --------------------------------------------------------------------------------------------------------------

class Edge(NamedTuple):
    """A field and the values on the edges of its rules; None stands for a bit flip of what is there."""

    field: int
    values: Sequence[int]
    flips: Sequence[int] = ()


CANONICAL = (0, 0x7FFFFFFFFFFF, 0x800000000000, 0xFFFF7FFFFFFFFFFF, 0xFFFF800000000000, 0xFFFFFFFFFFFFFFFF, 1 << 32, 0xFFFFFFFF)
ADDRESSES = (0, 0x18000, 0x18001, 0x18008, 0x18010, 0x18040, 0x18800, 0xFFFFFFF000, 1 << 40, 1 << 45, 0xFFFFF8000001A000, 1 << 52)
SELECTORS = (0, 8, 9, 0xB, 0x10, 0x13, 0x14, 0x18, 0x1B, 0x1C, 0x20, 0x24, 0xB00, 0xFFFF)
LIMITS = (0, 0x66, 0x67, 0xFFFE, 0xFFFF, 0xFFFFF, 0x100000, 0x100FFF, 0xFFFFFFFF, 0xFFFFEFFF, 0x80000FFF)
RIGHTS = (0x93, 0x9B, 0xC093, 0xC09B, 0xA09B, 0xE09B, 0xF3, 0xFB, 0xC0F3, 0xC0FB, 0xA0FB, 0x10000, 0x1C093, 0x8B, 0x82, 0x83, 0x89, 0xC097, 0xC09F,
          0xA09F,
          0xA0BB, 0xA0B9, 0xC0B3, 0xC091, 0xC099, 0xC09D, 0xC09A, 0x13, 0xC013, 0xC493, 0x2C093, 0x4093, 0x8093, 0x20093)
PATS = (0, 0x0007040600070406, 0x0202020202020202, 0x0007040600070403, 0x0307040600070406, 0x0807040600070406, 0x0505050505050505)
EFERS = (0, 1, 0x100, 0x400, 0x500, 0x501, 0xD01, 0xD00, 0x901, 0xC01, 0x1D01, 0x2D01, 0xD03, 1 << 32 | 0xD01)
WORD = tuple(range(32))


def edges() -> List[Edge]:
    table = [
        Edge(0x4000, (), WORD), Edge(0x4002, (), WORD), Edge(0x401E, (), WORD), Edge(0x400C, (), WORD), Edge(0x4012, (), WORD),
        Edge(0x2034, (0, 0x80, 1, 2, 0x10, 0x81), tuple(range(0, 64, 5))), Edge(0x2044, (0, 4, 5, 8, 0xF), (0, 1, 2, 3, 40)), Edge(0x2018, (0, 1, 2,
                                                                                                                                            3)),
        Edge(0x400A, (0, 1, 3, 4, 5, 0xFFFFFFFF)), Edge(0x0000, (0, 1, 0xFFFF)), Edge(0x0002, (0, 0xFF, 0x100, 0xFFFF)), Edge(0x2032, (0, 1,
                                                                                                                                       1 << 48)),
        Edge(0x401C, (0, 1, 3, 0xF, 0x10, 0x1F)), Edge(0x201A, (0, 0xE01E, 0xE018, 0xE01C, 0xE05E, 0xE09E, 0xE026, 0xE016, 0xE11E, 1 << 40 | 0xE01E,
                                                                0xE81E)),
        Edge(0x6C00, (0,), (0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31, 32, 40)), Edge(0x6C04, (0, 0x20), tuple(range(26)) + (32,)),
        Edge(0x6800, (0, 0x20, 0x21, 0x80000021, 0x80000020, 0xE0000031), (0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31, 32, 40)),
        Edge(0x6804, (0, 0x20, 0x2000, 0x2020), tuple(range(26)) + (32,)),
        Edge(0x6C02, (0x1000, 0x1018, 1 << 39, 1 << 40, 1 << 51, 1 << 61, 1 << 63)), Edge(0x6802, (0x1000, 0x14000, 0x14020, 0x15000, 1 << 40,
                                                                                                   1 << 51, 1 << 63)),
        Edge(0x2C00, PATS), Edge(0x2804, PATS), Edge(0x2C02, EFERS), Edge(0x2806, EFERS), Edge(0x681A, (0, 0x400, 0xFFFFFFFF, 1 << 32, 1 << 63)),
        Edge(0x2802, (0, 1, 2, 3, 4, 8, 0x40, 0x8000, 0x10000)), Edge(0x2C1A, (0, 1, 7, 0x80, 1 << 20)), Edge(0x282E, (0, 1, 7, 0x80, 1 << 20)),
        Edge(0x681E, (0xB000, 0xFFFFFFFF, 0x10000B000, *CANONICAL)), Edge(0x6C16, (0xC000, *CANONICAL)),
        Edge(0x6820, (0, 2, 0x202, 0x102, 0x302, 0x20002, 0x3002, 0x23002, 0x10002), (1, 3, 5, 9, 15, 17, 22, 31, 32, 63)),
        Edge(0x4826, (0, 1, 2, 3, 4, 0x80000000)), Edge(0x4824, (0, 1, 2, 3, 4, 5, 8, 9, 0xA, 0x10, 0x12, 0x20, 0x80000000)),
        Edge(0x6822, (0, 1, 0xF, 0x10, 0x800, 0x1000, 0x2000, 0x4000, 0x5001, 0x8000, 0x10000, 0x11000, 0x11001, 0x20000, 1 << 40)),
        Edge(0x2800, (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF00000000, 0, LINK, LINK + 8, VMCS, 1 << 40, 0x5000, FREE)),
        Edge(0x4810, (0, 0xFFFF, 0x10000, 0xFFFFFFFF)), Edge(0x4812, (0, 0xFFFF, 0x10000, 0xFFFFFFFF)),
        Edge(0x480C, LIMITS), Edge(0x480E, LIMITS), Edge(0x4820, (0x82, 0x10082, 0x10000, 0x92, 2, 0x83, 0xF82, 0x8082, 0x20082)),
        Edge(0x4822, (0x8B, 0x83, 0x89, 0x81, 0x1008B, 0xB, 0x9B, 0x808B, 0xF8B, 0x2008B, 0x93)),
        Edge(0x080C, SELECTORS), Edge(0x080E, SELECTORS), Edge(0x4014, (0, 1, 2)), Edge(0x400E, (0, 1, 0x200)), Edge(0x4010, (0, 1, 0x200)),
        Edge(0x401A, (0, 1, 15, 16, 0xFFFFFFFF)), Edge(0x4018, (0, 0xFFFF, 0x10000, 0x7FFF, 0x8000, 0x80000000, 0xFFFFFFFF)),
    ]
    table += [Edge(field, ADDRESSES) for field in (0x2000, 0x2002, 0x2004, 0x2006, 0x2008, 0x200A, 0x200E, 0x2012, 0x2014, 0x2016, 0x2024, 0x2026,
                                                   0x2028,
                                                   0x202A, 0x2030)]
    table += [Edge(field, CANONICAL) for field in (0x6C06, 0x6C08, 0x6C0A, 0x6C0C, 0x6C0E, 0x6C10, 0x6C12, 0x6824, 0x6826, 0x6816, 0x6818, 0x6812,
                                                   0x6814)]
    table += [Edge(0x0C00 + 2 * index, SELECTORS) for index in range(7)]
    for index in range(6):
        table += [Edge(0x0800 + 2 * index, SELECTORS), Edge(0x4800 + 2 * index, LIMITS), Edge(0x4814 + 2 * index, RIGHTS, tuple(range(18)) + (31,)),
                  Edge(0x6806 + 2 * index, (*CANONICAL, 0xB000, 0x9000))]
    table += [Edge(0x280A + 2 * index, (0, 1, 0x3001, 0x3003, 0x3021, 0x3101, 0x3E19, 1 << 40 | 1, 1 << 63 | 1,
                                        0xFFFFFFFFFFFFFFFE)) for index in range(4)]
    return table


EDGES = edges()


def pick(rng: random.Random, edge: Edge, values: Values) -> None:
    count = len(edge.values) + len(edge.flips)
    index = rng.randrange(count)
    if index < len(edge.values):
        values[edge.field] = edge.values[index]
    else:
        values[edge.field] = values.get(edge.field, 0) ^ 1 << edge.flips[index - len(edge.values)]


def inject(rng: random.Random, values: Values) -> None:
    """An event to inject, mostly near a valid one."""
    kind = rng.choice((0, 2, 2, 3, 3, 3, 4, 5, 6, 7, 1))
    vector = {2: 2, 7: 0}.get(kind, rng.choice((0, 1, 3, 6, 8, 13, 14, 17, 18, 21, 31, 32, 0x30, 0xFF)))
    if rng.random() < 0.15:
        vector = rng.choice((0, 1, 2, 3, 32))
    info = 1 << 31 | kind << 8 | vector
    if kind == 3 and (vector in (8, 10, 11, 12, 13, 14, 17)) != (rng.random() < 0.1):
        info |= 1 << 11
    if rng.random() < 0.1:
        info |= 1 << rng.choice((11, 12, 13, 20, 30))
    values[0x4016] = info
    values[0x401A] = rng.choice((0, 1, 2, 15, 16)) if rng.random() < 0.4 else 2
    if kind == 0 and rng.random() < 0.7:
        values[0x6820] = values[0x6820] | 0x200


def features(rng: random.Random, values: Values) -> None:
    """Controls that bring others with them, mostly complete."""
    which = rng.randrange(12)
    extra = 0
    if which == 0:
        values[0x4002] |= 1 << 25
        values[0x2000], values[0x2002] = IO_BITMAP_A, IO_BITMAP_A
    elif which == 1:
        values[0x4002] |= 1 << 28
        values[0x2004] = MSR_BITMAP
    elif which == 2:
        values[0x4002] |= 1 << 21
        values[0x2012] = VIRTUAL_APIC
        values[0x401C] = rng.choice((0, 1, 3, 7, 0xF, 0x10))
        extra = rng.choice((0, 1, 1 << 4, 1 << 8, 1 << 9, 1 << 8 | 1 << 9, 1 | 1 << 4))
    elif which == 3:
        values[0x4000] |= rng.choice((1 << 3, 1 << 3 | 1 << 5, 1 << 5))
        values[0x4002] |= rng.choice((0, 1 << 22))
    elif which == 4:
        values[0x201A] = rng.choice((0xE01E, 0xE018, 0xE05E, 0xE026))
        extra = 2 | rng.choice((0, 1 << 7, 1 << 17, 1 << 22, 1 << 23, 1 << 5, 1 << 18))
        values[0x0000] = rng.choice((0, 1))
    elif which == 5:
        extra = rng.choice((1 << 5, 1 << 7, 1 << 13, 1 << 14, 1 << 17, 1 << 18, 1 << 22, 1 << 23, 1 << 25))
        values[0x0000] = rng.choice((0, 1))
        values[0x2032] = rng.choice((0, 1 << 48))
    elif which == 6:
        values[0x400C] |= rng.choice((1 << 19, 1 << 12, 1 << 22, 1 << 15, 1 << 18, 1 << 20, 1 << 31))
        values[0x4000] |= rng.choice((0, 1 << 6))
        values[0x2044] = rng.choice((0, 4))
    elif which == 7:
        values[0x4012] |= rng.choice((1 << 2, 1 << 14, 1 << 13, 1 << 16, 1 << 24))
        values[0x2802] = rng.choice((0, 1, 2, 4, 8, 0x8000, 1 << 20))
    elif which == 8:
        values[0x4000] |= 1 << 7 | rng.choice((0, 1))
        values[0x4002] |= rng.choice((0, 1 << 21))
        values[0x400C] |= rng.choice((0, 1 << 15))
        values[0x2012], values[0x2016], values[0x0002] = VIRTUAL_APIC, FREE, 0x20
        extra = rng.choice((0, 1 << 9))
    elif which == 9:
        values[0x4002] |= 1 << 17
        values[0x2034] = rng.choice((0, 1 << 7, 1 << 4, 1))
    elif which == 10:
        values[0x201A] = 0xE01E
        extra = 2 | 1 << 13
        values[0x2018], values[0x2024] = rng.choice((0, 1, 3)), rng.choice((FREE, FREE + 8))
    else:
        extra = 1 << 14
        values[0x2026], values[0x2028] = FREE, FREE
    if extra:
        values[0x401E] |= extra


def states(rng: random.Random, values: Values) -> None:
    """Activity, interruptibility, pending debug exceptions, flags and an event, each on an edge of what the others allow."""
    values[0x4826] = rng.choice((0, 0, 0, 1, 1, 2, 3))
    values[0x4824] = rng.choice((0, 0, 1, 2, 3, 4, 8, 9))
    values[0x6820] = (values[0x6820] & 0x20000) | 2 | rng.choice((0, 0x200, 0x300, 0x100))
    values[0x6822] = rng.choice((0, 0, 0x4000, 0x1000, 0x5001, 0x11000))
    values[0x2802] = rng.choice((0, 0, 2, 1))
    values[0x4000] |= rng.choice((0, 1 << 3, 1 << 3 | 1 << 5))
    if rng.random() < 0.6:
        flags = values[0x6820]
        inject(rng, values)
        if rng.random() < 0.5:
            values[0x6820] = flags


def levels(rng: random.Random, values: Values) -> None:
    """Selectors and DPLs of another ring, in most registers together."""
    ring = rng.choice((0, 1, 3))
    for index in range(6):
        if rng.random() < 0.75 and not values[0x4814 + 2 * index] & 0x10000:
            values[0x0800 + 2 * index] = values[0x0800 + 2 * index] & ~3 | ring
            values[0x4814 + 2 * index] = values[0x4814 + 2 * index] & ~0x60 | ring << 5
    if rng.random() < 0.3:
        values[0x4816] = values[0x4816] & ~0xF | rng.choice((3, 9, 11, 13, 15))


MSR_ENTRIES: Sequence[Tuple[int, int, int]] = (
    (0x10, 0, 5), (0x174, 0, 0x10), (0x175, 0, 0xFFFF800000000000), (0x175, 0, 0x800000000000), (0xC0000081, 0, 1 << 48), (0xC0000082, 0, 0x1000),
    (0xC0000082, 0, 1 << 63), (0xC0000084, 0, 0x700), (0xC0000100, 0, 0), (0xC0000101, 0, 0), (0xC0000102, 0, 0xFFFF900000000000), (0x802, 0, 0),
    (0x8FF, 0, 0), (0x277, 0, 0x0007040600070406), (0x277, 0, 2), (0x174, 1, 0), (0xC0000080, 0, 0xD01), (0xC0000080, 0, 0x1D01), (0xC0000080, 0, 0),
)


def msr_load(rng: random.Random, values: Values) -> bytes:
    count = rng.randint(1, 3)
    values[0x4014], values[0x200A] = count, LIST
    return b"".join(struct.pack("<IIQ", *rng.choice(MSR_ENTRIES)) for _ in range(count))


def generate(rng: random.Random, worker: Worker) -> Tuple[str, Case]:
    """(mode, case): a VMCS that enters, with one to four mutations."""
    mode = rng.choice(MODES)
    host = "64-bit" if mode in ("64-bit", "compatibility") or rng.random() < 0.7 else rng.choice(("PAE", "32-bit"))
    values, memory = worker.baseline(mode, host), {}
    executed = host if host == "64-bit" else "32-bit"
    if rng.random() < 0.02:
        executed = rng.choice(("64-bit", "32-bit"))
    special: Sequence[Callable[[random.Random, Values], None]] = (inject, features, states, levels)
    if rng.random() < 0.5:
        rng.choice(special)(rng, values)
    if rng.random() < 0.05:
        memory[LIST] = msr_load(rng, values)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        pick(rng, rng.choice(EDGES), values)
    if values[0x2800] in (LINK, FREE) and rng.random() < 0.7:
        header = rng.choice((worker.revision, worker.revision | 1 << 31, worker.revision + 1))
        memory[values[0x2800]] = struct.pack("<I", header)
    if mode == "PAE" and values[0x6802] & ~0xFFF != PML4 and rng.random() < 0.15:
        memory[(values[0x6802] & 0xFFFFF000) + 8 * rng.randrange(4)] = struct.pack("<Q", rng.choice((0, 0x3003, 0x3001, 0x3E01, 0x3021, 1 << 40 | 1)))
    if values[0x401C] and rng.random() < 0.5:
        memory[VIRTUAL_APIC + 0x80] = bytes([rng.choice((0, 0x10, 0x30, 0xF0))])
    return mode, Case(values, memory=memory, host=executed)
