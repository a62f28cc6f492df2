"""Mistakes that enter and break later: what VT-x beginners write, and what costs an evening in a debugger.

None of them is a check of the processor; each says what will happen and when.  Dated 2026-11.
"""

from __future__ import annotations

import struct
from typing import List, Mapping, Optional, Tuple

from vtdbg import bits
from vtdbg.vmx.controls import WORDS
from vtdbg.vmx.entry import formats, msr_load
from vtdbg.vmx.entry.controls import MISC
from vtdbg.vmx.entry.formats import LME
from vtdbg.vmx.entry.guest_segments import UNUSABLE, VIRTUAL_8086, L
from vtdbg.vmx.entry.host_state import HOST_32, HOST_64
from vtdbg.vmx.entry.rules import EFER_MSR, Gate, Missing, Rule, RuleBook, State, all_of, any_of, mask_of, on

controls = RuleBook("controls", "SDM vol. 3, VM-Execution Control Fields", (), "lint")
host = RuleBook("host", "SDM vol. 3, Loading Host State", (), "lint")
guest = RuleBook("guest", "SDM vol. 3, Guest-State Area", (), "lint")

PAGE = 0x1000
SEE_SECONDARY = "SDM vol. 3, Secondary Processor-Based VM-Execution Controls"
SEE_HOST_SEGMENTS = "SDM vol. 3, Loading Host Segment and Descriptor-Table Registers"

# -- controls ---------------------------------------------------------------------------------------------------------------

INSTRUCTIONS: Mapping[str, Tuple[str, str]] = {
    "RDTSCP": ("RDTSCP and RDPID", "Windows 10 and Linux use it"), "INVPCID": ("INVPCID", "Windows 10 uses it from version 1803 on"),
    "XSAVES": ("XSAVES and XRSTORS", "Windows 10 switches threads with it"), "USR_WAIT_PAUSE": ("TPAUSE, UMONITOR and UMWAIT",
                                                                                                "newer kernels use it"),
}
"""Instructions that raise #UD in a guest while their secondary control is 0, whatever CPUID shows."""


def _instruction(ident: str) -> None:
    what, who = INSTRUCTIONS[ident]
    name = bits.table("sec")[ident].name

    def check(state: State) -> Optional[str]:
        return f'secondary control "{name}" is 0: {what} raise #UD in the guest' if state.supports("sec", ident) else None

    controls.add(f"lint.instruction.{ident.lower()}", "", f'"{name}" is 1 where the processor has it', (WORDS["sec"],), check,
                 when=lambda state: not state.on("sec", ident), see=SEE_SECONDARY,
                 hint=f"{who}: set the control where the processor allows it, or hide the instruction from CPUID")


for _ident in INSTRUCTIONS:
    _instruction(_ident)

ZERO_ADDRESSES: Tuple[Tuple[str, Tuple[str, str]], ...] = (
    ("MSR_BITMAP", ("proc", "USE_MSR_BITMAPS")), ("IO_BITMAP_A", ("proc", "USE_IO_BITMAPS")), ("IO_BITMAP_B", ("proc", "USE_IO_BITMAPS")),
    ("VIRTUAL_APIC_PAGE_ADDR", ("proc", "VIRTUAL_TPR")), ("APIC_ACCESS_ADDR", ("sec", "VIRT_APIC_ACCESSES")), ("PML_ADDRESS", ("sec",
                                                                                                                               "PAGE_MOD_LOGGING")),
    ("EPTP_LIST_ADDRESS", ("vmfunc", "EPTP_SWITCHING")), ("VMREAD_BITMAP", ("sec", "SHADOW_VMCS")), ("VMWRITE_BITMAP", ("sec", "SHADOW_VMCS")),
    ("VE_INFORMATION_ADDRESS", ("sec", "EPT_VIOLATION_VE")), ("POSTED_INTR_DESC_ADDR", ("pin", "POSTED_INTR")),
)


def _zero_address(name: str, gate: Tuple[str, str]) -> None:
    def check(state: State) -> Optional[str]:
        return None if state[name] else f"{name} is 0: the processor uses the page at physical address 0 (the old real-mode vectors)"

    controls.add(f"lint.zero.{name.lower()}", "", f"{name} is not 0 while it is used", (name, WORDS[gate[0]]), check, when=on(*gate),
                 hint="a field that was never written is 0: allocate the page and write its physical address")


for _name, _gate in ZERO_ADDRESSES:
    _zero_address(_name, _gate)


@controls.rule("lint.eptp.root", "", "the EPT root is not at physical address 0", "EPT_POINTER", when=on("sec", "EPT"))
def _ept_root(state: State) -> Optional[str]:
    return None if state["EPT_POINTER"] & ~0xFFF else "EPT_POINTER has the root at physical address 0"


@controls.rule("lint.eptp.uncached", "", "EPT structures are read with memory type WB where the processor allows it", "EPT_POINTER", when=on("sec",
                                                                                                                                             "EPT"),
               hint="write 6 (WB) to EPTP[2:0]")
def _ept_uncached(state: State) -> Optional[str]:
    if state["EPT_POINTER"] & 7 or not state.capability("ept_vpid_cap", 0x48C, "WB"):
        return None
    return "EPT_POINTER has memory type 0 (UC): every walk reads the tables uncached, the guest runs many times slower"


LEAF, IGNORE_PAT = 1 << 7, 1 << 6
SAMPLED_TABLES = 64


def _leaf_types(state: State, table: int, level: int, budget: List[int]) -> List[int]:
    """Memory types of the leaves under `table`, of at most as many tables as `budget` says."""
    budget[0] -= 1
    types: List[int] = []
    for entry in struct.unpack("<512Q", state.read(table, PAGE)):
        if not entry & 7:
            continue
        if level == 1 or (entry & LEAF and level <= 3):
            types.append(entry >> 3 & 7)
        elif budget[0] > 0:
            types += _leaf_types(state, entry & 0xFFFFFFFFFF000, level - 1, budget)
    return types


@controls.rule("lint.ept.all_uncached", "", "some RAM is mapped WB by EPT", "EPT_POINTER", when=on("sec", "EPT"),
               see="SDM vol. 3, EPT and Memory Typing",
               hint="take each page's type from the MTRRs: WB (6) for RAM, UC (0) for devices")
def _ept_all_uncached(state: State) -> Optional[str]:
    eptp = state["EPT_POINTER"]
    if eptp >> 3 & 7 not in (3, 4):
        return None
    types = _leaf_types(state, eptp & 0xFFFFFFFFFF000, (eptp >> 3 & 7) + 1, [SAMPLED_TABLES])
    if types and not any(types):
        return f"all {len(types)} EPT leaf entries that were looked at have memory type 0 (UC): the guest runs many times slower"
    return None


@controls.rule("lint.default1", "", "the primary controls are not forced by the MSR without TRUE", WORDS["proc"],
               hint="adjust with IA32_VMX_TRUE_PROCBASED_CTLS (0x48E) where IA32_VMX_BASIC[55] is 1, or handle exit reason 28")
def _default1(state: State) -> Optional[str]:
    cr3 = mask_of("proc", "CR3_LOAD_EXITING") | mask_of("proc", "CR3_STORE_EXITING")
    value, old = state.word("proc"), state.msr(0x482) & 0xFFFFFFFF
    if value & cr3 != cr3 or value & old != old or not state.capability("vmx_basic", 0x480, "TRUE_CTLS") or state.msr(0x48E) & cr3:
        return None
    if not state.on("sec", "EPT") and value & ~old:
        return None     # without EPT a VMM wants to see CR3
    return "CR3-load and CR3-store exiting are 1 as IA32_VMX_PROCBASED_CTLS (0x482) forces them: every MOV to or from CR3 exits"


SAVED: Tuple[Tuple[str, str, str], ...] = (
    ("SAVE_IA32_EFER", "LOAD_IA32_EFER", "IA32_EFER"), ("SAVE_IA32_PAT", "LOAD_IA32_PAT", "IA32_PAT"),
    ("SAVE_IA32_PERF_GLOBAL_CTL", "LOAD_IA32_PERF_GLOBAL_CTRL", "IA32_PERF_GLOBAL_CTRL"), ("SAVE_DEBUG_CONTROLS", "LOAD_DEBUG_CONTROLS",
                                                                                           "DR7 and IA32_DEBUGCTL"),
)
RESTORED: Tuple[Tuple[str, Tuple[str, ...], str], ...] = (
    ("LOAD_IA32_EFER", ("LOAD_IA32_EFER",), "IA32_EFER"), ("LOAD_IA32_PAT", ("LOAD_IA32_PAT",), "IA32_PAT"),
    ("LOAD_IA32_PERF_GLOBAL_CTRL", ("LOAD_IA32_PERF_GLOBAL_CTRL",), "IA32_PERF_GLOBAL_CTRL"), ("LOAD_BNDCFGS", ("CLEAR_BNDCFGS",), "IA32_BNDCFGS"),
    ("LOAD_IA32_RTIT_CTL", ("CLEAR_IA32_RTIT_CTL",), "IA32_RTIT_CTL"), ("LOAD_CET_STATE", ("LOAD_CET_STATE",), "the CET state"),
    ("LOAD_PKRS", ("LOAD_PKRS",), "IA32_PKRS"), ("LOAD_GUEST_IA32_LBR_CTL", ("CLEAR_IA32_LBR_CTL",), "IA32_LBR_CTL"), ("LOAD_UINV", ("CLEAR_UINV",),
                                                                                                                       "UINV"),
)


def _pair(id: str, word: Tuple[str, str], others: Tuple[Tuple[str, str], ...], message: str, must: str, hint: str) -> None:
    def check(state: State) -> Optional[str]:
        return None if any(state.on(*other) for other in others) else message

    controls.add(id, "", must, (WORDS["entry"], WORDS["exit"]), check, when=on(*word), hint=hint,
                 see="SDM vol. 3, VM-Exit Controls; VM-Entry Controls")


for _save, _load, _what in SAVED:
    _pair(f"lint.saved_not_loaded.{_save.lower()}", ("exit", _save), (("entry", _load),),
          f"VM exits save {_what} in the VMCS and VM entries do not load it: the saved value is never used",
          f"what VM exits save of {_what}, VM entries load", f'set VM-entry control "{bits.table("entry")[_load].name}" too')
for _load, _restore, _what in RESTORED:
    _pair(f"lint.loaded_not_restored.{_load.lower()}", ("entry", _load), tuple(("exit", one) for one in _restore),
          f"VM entries load {_what} and VM exits do not put the host's back: the VMM runs with the guest's",
          f"what VM entries load of {_what}, VM exits replace", f'set VM-exit control "{bits.table("exit")[_restore[0]].name}" too')


@controls.rule("lint.preemption_timer", "", "the preemption timer lets the guest run", "VMX_PREEMPTION_TIMER_VALUE", when=on("pin",
                                                                                                                             "PREEMPTION_TIMER"))
def _preemption_timer(state: State) -> Optional[str]:
    return None if state["VMX_PREEMPTION_TIMER_VALUE"] else "VMX_PREEMPTION_TIMER_VALUE is 0: the guest exits (52) before its first instruction"


MSR_COUNTS = ("VM_EXIT_MSR_STORE_COUNT", "VM_EXIT_MSR_LOAD_COUNT", "VM_ENTRY_MSR_LOAD_COUNT")


def _msr_count(name: str) -> None:
    def check(state: State) -> Optional[str]:
        count = state[name]
        if count <= 512:
            return None     # every processor takes 512
        most = 512 * (state.capability("vmx_misc", MISC, "MSR_LIST_MAX") + 1)
        return f"{name} is {count}, the processor is specified up to {most}: beyond it anything may happen" if count > most else None

    controls.add(f"lint.msr_count.{name.lower()}", "", f"{name} is within IA32_VMX_MISC[27:25]", (name,), check,
                 see="SDM vol. 3, VM-Exit Controls for MSRs")


for _name in MSR_COUNTS:
    _msr_count(_name)


@host.rule("lint.exit_msr_load", "", "every entry of the VM-exit MSR-load area can be loaded", "VM_EXIT_MSR_LOAD_ADDR", "VM_EXIT_MSR_LOAD_COUNT",
           when=lambda state: state["VM_EXIT_MSR_LOAD_COUNT"] != 0, see="SDM vol. 3, Loading MSRs; VMX Aborts")
def _exit_msr_load(state: State) -> Optional[str]:
    unknown: List[str] = []
    for entry in msr_load.read_area(state, state["VM_EXIT_MSR_LOAD_ADDR"], state["VM_EXIT_MSR_LOAD_COUNT"]):
        try:
            wrong = _host_efer(state, entry) if entry.msr == EFER_MSR and not entry.reserved else msr_load.problem(state, entry)
        except Missing as problem:
            unknown.extend(problem.names)
            continue
        if wrong is not None:
            return f"{entry.title} of the VM-exit MSR-load area: {wrong}; the next VM exit ends in VMX abort 4 (the processor shuts down)"
    if unknown:
        raise Missing(*unknown[:3])
    return None


def _host_efer(state: State, entry: msr_load.MsrEntry) -> Optional[str]:
    wrong = formats.efer_reserved("the value", entry.value)
    if wrong is None and bool(entry.value & LME) != state.on("exit", "HOST_ADDR_SPACE_SIZE"):
        return "LME cannot change while the host's CR0.PG is 1"
    return wrong


# -- host -------------------------------------------------------------------------------------------------------------------

@host.rule("lint.host_rsp.alignment", "", "HOST_RSP is aligned as the ABI wants it", "HOST_RSP",
           hint="round the top of the stack down to 16 bytes (the handler's first CALL pushes 8)")
def _host_rsp(state: State) -> Optional[str]:
    alignment = 16 if state.on("exit", "HOST_ADDR_SPACE_SIZE") else 4
    value = state["HOST_RSP"]
    return f"HOST_RSP {value:#x} is not aligned to {alignment} bytes: SSE spills in the exit handler fault" if value % alignment else None


SAME_SPACE: Gate = lambda state: state["HOST_CR3"] & ~0xFFF == state["GUEST_CR3"] & ~0xFFF    # noqa: E731 - a gate beside the others


@host.rule("lint.stack.shared", "", "the host's and the guest's stack are not in one page", "HOST_RSP", "GUEST_RSP", "HOST_CR3", "GUEST_CR3",
           when=SAME_SPACE,
           hint="give the exit handler a stack of its own for each processor")
def _stack_shared(state: State) -> Optional[str]:
    host_rsp, guest_rsp = state["HOST_RSP"], state["GUEST_RSP"]
    if host_rsp and (host_rsp - 1) // PAGE == (guest_rsp - 1) // PAGE:
        return f"HOST_RSP {host_rsp:#x} and GUEST_RSP {guest_rsp:#x} are in one page of one address space: each exit overwrites the guest's stack"
    return None


@host.rule("lint.stack.close", "", "the exit handler has 8 KiB of stack above the guest's", "HOST_RSP", "GUEST_RSP", "HOST_CR3", "GUEST_CR3",
           when=SAME_SPACE,
           hint="check what was allocated: the top of a stack of one page is its address + 0x1000")
def _stack_close(state: State) -> Optional[str]:
    room = state["HOST_RSP"] - state["GUEST_RSP"]
    if 0 < room <= 2 * PAGE and (state["HOST_RSP"] - 1) // PAGE != (state["GUEST_RSP"] - 1) // PAGE:
        return f"HOST_RSP is {room:#x} bytes above GUEST_RSP: a handler that uses more writes over the guest's stack"
    return None


@host.rule("lint.host_gs.shared", "", "HOST_GS_BASE is not the guest's", "HOST_GS_BASE", "GUEST_GS_BASE", when=HOST_64,
           hint="right for a handler in a kernel whose guest enters in ring 0; the guest's value changes with SWAPGS, the host's stays")
def _host_gs_shared(state: State) -> Optional[str]:
    value = state["HOST_GS_BASE"]
    if value and value == state["GUEST_GS_BASE"]:
        return f"HOST_GS_BASE equals GUEST_GS_BASE ({value:#x}): after an exit the handler uses the guest's per-processor block"
    return None


@host.rule("lint.host_gs.user", "", "HOST_GS_BASE is no user address while HOST_RIP is a kernel's", "HOST_GS_BASE", "HOST_RIP", when=HOST_64,
           hint="in ring 0 the kernel's block is in IA32_GS_BASE (0xC0000101); IA32_KERNEL_GS_BASE (0xC0000102) has the user's")
def _host_gs_user(state: State) -> Optional[str]:
    base = state["HOST_GS_BASE"]
    if base and not base >> 47 and state["HOST_RIP"] >> 47:
        return f"HOST_GS_BASE {base:#x} is in the lower half while HOST_RIP {state['HOST_RIP']:#x} is in the upper: taken from IA32_KERNEL_GS_BASE?"
    return None


@host.rule("lint.host_fs.zero", "", "a 32-bit host with an FS selector has an FS base", "HOST_FS_BASE", "HOST_FS_SELECTOR", "VM_EXIT_CONTROLS",
           see=SEE_HOST_SEGMENTS, when=all_of(HOST_32, lambda state: state["HOST_FS_SELECTOR"] != 0),
           hint="write the base of the descriptor, or reload FS first thing in the exit handler")
def _host_fs_zero(state: State) -> Optional[str]:
    if state["HOST_FS_BASE"]:
        return None
    return f"HOST_FS_BASE is 0 while HOST_FS_SELECTOR is {state['HOST_FS_SELECTOR']:#x}: a VM exit takes the base from the VMCS, " \
           "and a 32-bit Windows kernel finds its processor block through FS"


@host.rule("lint.host_gdtr.limit", "", "the host's descriptor-table limits are the guest's 0xffff", "HOST_GDTR_BASE", "GUEST_GDTR_BASE",
           "GUEST_GDTR_LIMIT",
           "HOST_IDTR_BASE", "GUEST_IDTR_BASE", "GUEST_IDTR_LIMIT", see=SEE_HOST_SEGMENTS,
           hint="restore with LGDT and LIDT in the handler if the host's kernel looks at them (Windows' PatchGuard does)")
def _gdtr_limit(state: State) -> Optional[str]:
    wrong = []
    for table in ("GDTR", "IDTR"):
        base, limit = state[f"GUEST_{table}_BASE"], state[f"GUEST_{table}_LIMIT"]
        if base and base == state[f"HOST_{table}_BASE"] and limit != 0xFFFF:
            wrong.append(f"{table} {limit:#x}")
    return f"host and guest share descriptor tables whose limit is {', '.join(wrong)}: a VM exit sets it to 0xffff" if wrong else None


@host.rule("lint.host_tr.limit", "", "the host's TSS needs no more than 0x68 bytes", "HOST_TR_BASE", "GUEST_TR_BASE", "GUEST_TR_LIMIT",
           see=SEE_HOST_SEGMENTS, hint="the I/O permission bitmap behind the TSS is cut off in the host: reload TR")
def _tr_limit(state: State) -> Optional[str]:
    limit = state["GUEST_TR_LIMIT"]
    if state["HOST_TR_BASE"] == state["GUEST_TR_BASE"] and limit > 0x67:
        return f"host and guest share a TSS with limit {limit:#x}: a VM exit sets TR.limit to 0x67"
    return None


# -- guest ------------------------------------------------------------------------------------------------------------------

@guest.rule("lint.cr4.vmxe", "", "the VMM owns CR4.VMXE", "CR4_GUEST_HOST_MASK", "GUEST_CR4", see="SDM vol. 3, Guest/Host Masks and Read Shadows",
            hint="set bit 13 of the CR4 guest/host mask, clear it in the read shadow")
def _vmxe(state: State) -> Optional[str]:
    if state["CR4_GUEST_HOST_MASK"] & mask_of("cr4", "VMXE"):
        return None
    return "CR4.VMXE (bit 13) is not in CR4_GUEST_HOST_MASK: the guest reads it as 1, and a MOV to CR4 with 0 there raises #GP"


@guest.rule("lint.cr0.ne", "", "the VMM owns CR0.NE", "CR0_GUEST_HOST_MASK", see="SDM vol. 3, Guest/Host Masks and Read Shadows",
            hint="set bit 5 of the CR0 guest/host mask where the guest may clear it (real-mode and old 32-bit guests do)")
def _ne(state: State) -> Optional[str]:
    if state["CR0_GUEST_HOST_MASK"] & mask_of("cr0", "NE"):
        return None
    return "CR0.NE (bit 5) is not in CR0_GUEST_HOST_MASK: a MOV to CR0 that clears it raises #GP in the guest"


@guest.rule("lint.pat", "", "guest IA32_PAT has a cacheable type", "GUEST_IA32_PAT", when=on("entry", "LOAD_IA32_PAT"))
def _pat(state: State) -> Optional[str]:
    return None if state["GUEST_IA32_PAT"] else "GUEST_IA32_PAT is 0: every page of the guest is uncached (the reset value is 0x0007040600070406)"


def _unusable(name: str) -> Gate:
    return lambda state: bool(state[f"GUEST_{name}_AR_BYTES"] & UNUSABLE)


@guest.rule("lint.ss.unusable", "", "SS is usable outside 64-bit mode", "GUEST_SS_AR_BYTES", "GUEST_CS_AR_BYTES", "VM_ENTRY_CONTROLS",
            when=all_of(_unusable("SS"), any_of(lambda state: not state.on("entry", "IA32E_MODE"), lambda state: not state["GUEST_CS_AR_BYTES"] & L)),
            hint="fill access rights, base and limit from the GDT, or have the guest load SS before its first push, call or interrupt")
def _ss_unusable(state: State) -> Optional[str]:
    return f"GUEST_SS_AR_BYTES {state['GUEST_SS_AR_BYTES']:#x}: SS is unusable outside 64-bit mode; the first use of the stack raises #SS"


@guest.rule("lint.ds.unusable", "", "DS is usable outside 64-bit mode", "GUEST_DS_AR_BYTES", "GUEST_CS_AR_BYTES", "VM_ENTRY_CONTROLS",
            when=all_of(_unusable("DS"), any_of(lambda state: not state.on("entry", "IA32E_MODE"), lambda state: not state["GUEST_CS_AR_BYTES"] & L)),
            hint="fill access rights, base and limit from the GDT, or have the guest load DS before its first memory access")
def _ds_unusable(state: State) -> Optional[str]:
    return f"GUEST_DS_AR_BYTES {state['GUEST_DS_AR_BYTES']:#x}: DS is unusable outside 64-bit mode; the first data access raises #GP"


@guest.rule("lint.gdt.limit", "", "the guest's selectors are inside its GDT", "GUEST_GDTR_LIMIT", *(f"GUEST_{name}_SELECTOR" for name in ("CS", "SS",
                                                                                                                                          "TR")),
            when=lambda state: not VIRTUAL_8086(state) and bool(state["GUEST_CR0"] & 1),
            hint="an interrupt or IRET in the guest loads the selector again and raises #GP")
def _gdt_limit(state: State) -> Optional[str]:
    limit = state["GUEST_GDTR_LIMIT"]
    outside = [f"{name} {state[f'GUEST_{name}_SELECTOR']:#x}" for name in ("CS", "SS", "TR")
               if not state[f"GUEST_{name}_SELECTOR"] & 4 and state[f"GUEST_{name}_SELECTOR"] > 3 and state[f"GUEST_{name}_SELECTOR"] | 7 > limit]
    return f"{', '.join(outside)} is beyond GUEST_GDTR_LIMIT {limit:#x}" if outside else None


RULES: Tuple[Rule, ...] = controls.rules + host.rules + guest.rules
