"""What KVM's dump_vmcs and Xen's vmcs_dump_vcpu print: every phrase with its place in the order of printing.

Formats: Linux arch/x86/kvm/vmx/vmx.c, dump_vmcs, 4.4 to 6.18; Xen xen/arch/x86/hvm/vmx/vmcs.c, vmcs_dump_vcpu, 4.2 to 4.20.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Iterator, List, Mapping, Optional, Tuple

from vtdbg.textdump.lines import word_set
from vtdbg.textdump.phrases import Phrase, Table, phrase
from vtdbg.textdump.phrases import table as phrase_table

GUEST, HOST, CONTROL = 0, 1, 2
HEADERS = {"guest": GUEST, "host": HOST, "control": CONTROL}

Place = Tuple[int, int, str]
"""(block, position in the order of printing, prefix of the field name)."""


@dataclass(frozen=True)
class Row:
    """A phrase and where it may stand."""

    phrase: Phrase
    places: Tuple[Place, ...]


def _segment(name: str, position: int) -> List[Row]:
    low, high = name.lower(), f"GUEST_{name}_"
    return [
        _row(f"segment.{low}", f"{name}: sel=[0x]{{{high}SELECTOR:4}}, attr=[0x]{{{high}AR_BYTES:5+}}, limit=[0x]{{{high}LIMIT:8}}, "
                               f"base=[0x]{{{high}BASE:16}}", weak=True, guest=position),
        _row(f"xen-segment.{low}", f"{name}: {{{high}SELECTOR:4}} {{{high}AR_BYTES:5}} {{{high}LIMIT:8}} {{{high}BASE:16}}", weak=True,
             guest=position),
    ]


def _table_register(name: str, position: int) -> List[Row]:
    low, high = name.lower(), f"GUEST_{name}_"
    return [_row(f"table.{low}", f"{name}: limit=[0x]{{{high}LIMIT:8}}, base=[0x]{{{high}BASE:16}}", weak=True, guest=position),
            _row(f"xen-table.{low}", f"{name}: {{{high}LIMIT:8}} {{{high}BASE:16}}", weak=True, guest=position)]


def _row(identifier: str, form: str, *, weak: bool = False, symbol: bool = False, whole: bool = False, guest: Optional[int] = None,
         host: Optional[int] = None, control: Optional[int] = None, late_host: Optional[int] = None) -> Row:
    places: List[Place] = []
    if guest is not None:
        places.append((GUEST, guest, "GUEST_"))
    if host is not None:
        places.append((HOST, host, "HOST_"))
    if control is not None:
        places.append((CONTROL, control, ""))
    if late_host is not None:
        places.append((CONTROL, late_host, "HOST_"))
    return Row(phrase(identifier, form, strong=not weak, symbol=symbol, whole=whole), tuple(places))


def _rows() -> Iterator[Row]:
    """Every phrase.  A slot whose name begins with "_" is the rest of a field name: the place gives GUEST_ or HOST_."""
    for register, position in (("CR0", 1), ("CR4", 2)):
        yield _row(f"{register.lower()}", f"{register}: actual=[0x]{{GUEST_{register}:16}}, shadow=[0x]{{{register}_READ_SHADOW:16}}, "
                                          f"gh_mask=[0x]{{{register}_GUEST_HOST_MASK:16}}", guest=position)
    yield _row("cr3", "CR3 = 0x{GUEST_CR3:16}", weak=True, guest=3)
    yield _row("xen-old.cr3", "CR3: actual=[0x]{GUEST_CR3:16}, target_count={CR3_TARGET_COUNT:d}", guest=3)
    yield _row("xen-old.target0", "target0=[0x]{CR3_TARGET_VALUE0:16}, target1=[0x]{CR3_TARGET_VALUE1:16}", guest=3)
    yield _row("xen-old.target2", "target2=[0x]{CR3_TARGET_VALUE2:16}, target3=[0x]{CR3_TARGET_VALUE3:16}", guest=3)
    for number in range(4):
        yield _row(f"pdptr{number}", f"PDPTR{number} = [0x]{{GUEST_PDPTR{number}:16}}", guest=4)
        yield _row(f"pdpte{number}", f"PDPTE{number} = [0x]{{GUEST_PDPTR{number}:16}}", guest=4)
    yield _row("rsp", "RSP = 0x{_RSP:16}", weak=True, symbol=True, guest=5, host=41)
    yield _row("rip", "RIP = 0x{_RIP:16}", weak=True, symbol=True, guest=6, host=41)
    # Xen prints the field and, in parentheses, the register as it has it now: the field counts.
    yield _row("xen.rsp", "RSP = 0x{GUEST_RSP:16} (0x{now.rsp:16})", weak=True, whole=True, guest=5)
    yield _row("xen.rip", "RIP = 0x{GUEST_RIP:16} (0x{now.rip:16})", weak=True, whole=True, guest=6)
    yield _row("rflags", "RFLAGS=0x{GUEST_RFLAGS:8+}", weak=True, symbol=True, guest=7)
    yield _row("xen.rflags", "RFLAGS=0x{GUEST_RFLAGS:8|16+} (0x{now.rflags:8|16+})", weak=True, whole=True, guest=7)
    yield _row("dr7", "DR7 = 0x{GUEST_DR7:16}", weak=True, guest=8)
    yield _row("sysenter", "Sysenter RSP=[0x]{_SYSENTER_ESP:16} CS:RIP=[0x]{_SYSENTER_CS:4+}:{_SYSENTER_EIP:16}", guest=9, host=47)
    for position, name in enumerate(("CS", "DS", "SS", "ES", "FS", "GS"), 10):
        yield from _segment(name, position)
    yield from _table_register("GDTR", 16)
    yield from _segment("LDTR", 17)
    yield from _table_register("IDTR", 18)
    yield from _segment("TR", 19)
    yield _row("efer", "EFER= 0x{_IA32_EFER:16}", weak=True, guest=20, host=48)
    yield _row("xen.efer", "EFER(VMCS) = 0x{GUEST_IA32_EFER:16}", guest=20)
    yield _row("xen.efer-list", "EFER(MSR LL) = 0x{efer.list:16}", guest=20)
    yield _row("pat", "PAT = 0x{_IA32_PAT:16}", weak=True, guest=21, host=49)
    yield _row("xen-old.guest-pat", "Guest PAT = 0x{GUEST_IA32_PAT:16}", guest=21)
    yield _row("xen-old.host-pat", "Host PAT = 0x{HOST_IA32_PAT:16}", host=49)
    yield _row("preemption", "PreemptionTimer = [0x]{VMX_PREEMPTION_TIMER_VALUE:8}", guest=22)
    yield _row("smbase", "SM Base = [0x]{GUEST_SMBASE:8}", guest=23)
    yield _row("debugctl", "DebugCtl = [0x]{GUEST_IA32_DEBUGCTL:16}", guest=24)
    yield _row("debugexceptions", "DebugExceptions = [0x]{GUEST_PENDING_DBG_EXCEPTIONS:16}", guest=25)
    yield _row("perfglobctl", "PerfGlobCtl = [0x]{_IA32_PERF_GLOBAL_CTRL:16}", guest=26, host=50)
    yield _row("bndcfgs", "BndCfgS = [0x]{GUEST_BNDCFGS:16}", guest=27)
    yield _row("interruptibility", "Interruptibility = [0x]{GUEST_INTERRUPTIBILITY_INFO:8}", guest=28)
    yield _row("activity", "ActivityState = [0x]{GUEST_ACTIVITY_STATE:8}", guest=29)
    yield _row("xen-old.interruptibility", "Interruptibility={GUEST_INTERRUPTIBILITY_INFO:4} ActivityState={GUEST_ACTIVITY_STATE:4}", whole=True,
               guest=28)
    yield _row("intrstatus", "InterruptStatus = [0x]{GUEST_INTR_STATUS:4}", guest=30)
    yield _row("deadline.phy", "DeadlinePhy = [0x]{GUEST_DEADLINE_PHY:16}", guest=31)
    yield _row("deadline.vir", "DeadlineVir = [0x]{GUEST_DEADLINE_VIR:16}", guest=31)
    yield _row("apictimer", "GuestApicTimerVector = [0x]{GUEST_APIC_TIMER_VECTOR:4}", guest=31)
    yield _row("spec_ctrl", "SPEC_CTRL mask = [0x]{SPEC_CTRL_MASK:16} shadow = [0x]{SPEC_CTRL_SHADOW:16}", guest=31)
    # Some vendors' kernels print the host's CET state after the controls.
    yield _row("s_cet", "S_CET = [0x]{_S_CET:16}", guest=32, host=52, late_host=95)
    yield _row("ssp", "SSP = 0x{_SSP:16}", weak=True, guest=32, host=52, late_host=95)
    yield _row("ssp-table", "SSP TABLE = [0x]{_INTR_SSP_TABLE:16}", guest=32, host=52, late_host=95)
    yield _row("ssp-table-2", "INTR SSP TABLE = [0x]{_INTR_SSP_TABLE:16}", guest=32, host=52, late_host=95)

    for identifier, order in (("host.selectors", "CS SS DS ES FS GS TR"), ("xen-old.host.selectors", "CS DS ES FS GS SS TR")):
        yield _row(identifier, " ".join(f"{name}={{HOST_{name}_SELECTOR:4}}" for name in order.split()), weak=True, host=43)
    yield _row("host.bases", "FSBase=[0x]{HOST_FS_BASE:16} GSBase=[0x]{HOST_GS_BASE:16} TRBase=[0x]{HOST_TR_BASE:16}", host=44)
    yield _row("host.tables", "GDTBase=[0x]{HOST_GDTR_BASE:16} IDTBase=[0x]{HOST_IDTR_BASE:16}", host=45)
    yield _row("host.cr", "CR0={HOST_CR0:16} CR3={HOST_CR3:16} CR4={HOST_CR4:16}", weak=True, host=46)

    yield _row("pinbased", "PinBased=[0x]{PIN_BASED_VM_EXEC_CONTROL:8}", control=61)
    yield _row("cpubased", "CPUBased=[0x]{CPU_BASED_VM_EXEC_CONTROL:8}", control=61)
    yield _row("secondary", "SecondaryExec=[0x]{SECONDARY_VM_EXEC_CONTROL:8}", control=61)
    yield _row("tertiary", "TertiaryExec=[0x]{TERTIARY_VM_EXEC_CONTROL:16}", control=61)
    yield _row("entry", "EntryControls=[0x]{VM_ENTRY_CONTROLS:8}", control=61)
    yield _row("exit", "ExitControls=[0x]{VM_EXIT_CONTROLS:8}", control=61)
    yield _row("exit2", "SecondaryExitControls=[0x]{SECONDARY_VM_EXIT_CONTROLS:16}", control=61)
    yield _row("exceptions", "ExceptionBitmap=[0x]{EXCEPTION_BITMAP:8}", control=62)
    yield _row("pfecmask", "PFECmask=[0x]{PAGE_FAULT_ERROR_CODE_MASK:8}", control=62)
    yield _row("pfecmatch", "PFECmatch=[0x]{PAGE_FAULT_ERROR_CODE_MATCH:8}", control=62)
    yield _row("vmentry", "VMEntry: intr_info=[0x]{VM_ENTRY_INTR_INFO_FIELD:8} errcode=[0x]{VM_ENTRY_EXCEPTION_ERROR_CODE:8} "
                          "ilen=[0x]{VM_ENTRY_INSTRUCTION_LEN:8}", control=63)
    yield _row("vmexit", "VMExit: intr_info=[0x]{VM_EXIT_INTR_INFO:8} errcode=[0x]{VM_EXIT_INTR_ERROR_CODE:8} "
                         "ilen=[0x]{VM_EXIT_INSTRUCTION_LEN:8}", control=64)
    yield _row("reason", "reason=[0x]{VM_EXIT_REASON:8} qualification=[0x]{EXIT_QUALIFICATION:16}", control=65)
    yield _row("idtvectoring", "IDTVectoring: info=[0x]{IDT_VECTORING_INFO_FIELD:8} errcode=[0x]{IDT_VECTORING_ERROR_CODE:8}", control=66)
    # Xen 4.2 prints the TSC offset among the guest's state; its label is its own, so its place does not matter.
    yield _row("tscoffset", "TSC Offset = [0x]{TSC_OFFSET:16}")
    yield _row("tscmultiplier", "TSC Multiplier = [0x]{TSC_MULTIPLIER:16}", control=68)
    yield _row("svirvi", "SVI|RVI = {svi:2}|{rvi:2}", control=69)
    yield _row("tpr", "TPR Threshold = [0x]{TPR_THRESHOLD:2+}", control=69)
    yield _row("apicaccess", "APIC-access addr = [0x]{APIC_ACCESS_ADDR:16}", control=70)
    yield _row("virtapic", "virt-APIC addr = [0x]{VIRTUAL_APIC_PAGE_ADDR:16}", control=70)
    yield _row("postedvector", "PostedIntrVec = [0x]{POSTED_INTR_NV:2+}", control=71)
    yield _row("eptp", "EPT pointer = [0x]{EPT_POINTER:16}", control=72)
    yield _row("eptpindex", "EPTP index = [0x]{EPTP_INDEX:4}", control=72)
    for number in range(4):
        yield _row(f"target{number}", f"CR3 target{number}=[0x]{{CR3_TARGET_VALUE{number}:16}}", control=73)
        yield _row(f"target{number}b", f"target{number}=[0x]{{CR3_TARGET_VALUE{number}:16}}", weak=True, control=73)
    yield _row("ple", "PLE Gap=[0x]{PLE_GAP:8} Window=[0x]{PLE_WINDOW:8}", control=74)
    yield _row("vpid", "Virtual processor ID = [0x]{VIRTUAL_PROCESSOR_ID:4}", control=75)
    yield _row("vmfunc", "VMfunc controls = [0x]{VM_FUNCTION_CONTROL:16}", control=75)
    yield _row("ve", "VE info address = [0x]{VE_INFORMATION_ADDRESS:16}", control=76)
    yield _row("ve_info", "ve_info: [0x]{ve.reason:8} [0x]{ve.delivery:8} [0x]{ve.qualification:16} [0x]{ve.gla:16} [0x]{ve.gpa:16} "
                          "[0x]{ve.eptp_index:4}", control=77)


ALWAYS = frozenset((1, 2, 3, 5, 6, 7, 8, 9, *range(10, 20), 24, 25, 28, 29, 40, 41, 43, 44, 45, 46, 47, *range(60, 67)))
"""Positions that every version prints, the headers of the host (40) and the controls (60) included."""
HEADER_POSITION = {GUEST: 0, HOST: 40, CONTROL: 60}

XEN_FAIL_ZERO = frozenset(("TSC_MULTIPLIER", "POSTED_INTR_NV", "EPTP_INDEX", "VM_FUNCTION_CONTROL", "VMX_PREEMPTION_TIMER_VALUE", "GUEST_BNDCFGS",
                           "GUEST_IA32_PERF_GLOBAL_CTRL", "HOST_IA32_PERF_GLOBAL_CTRL", "GUEST_IA32_EFER", "HOST_IA32_EFER", "GUEST_IA32_PAT",
                           "HOST_IA32_PAT", "TPR_THRESHOLD", "SPEC_CTRL_MASK", "SPEC_CTRL_SHADOW"))
"""Fields that a processor can lack and that Xen prints all the same: its VMREAD gives 0 where the instruction fails."""


@cache
def rows() -> Mapping[str, Row]:
    return {row.phrase.id: row for row in _rows()}


@cache
def phrases() -> Table:
    return phrase_table([row.phrase for row in rows().values()])


KEYWORDS = word_set("""
    sel guest host control vmcs msr vmlaunch vmresume vmentry entry domain vcpu rax rdx rbp r9 r12 r15 context
    cr0 cr3 cr4 rsp rip rflags dr7 sysenter cs ds ss es fs gs gdtr ldtr idtr tr efer pat pdptr0 pdptr1 pdptr2 pdptr3 pdpte0 pdpte1 pdpte2 pdpte3
    preemptiontimer sm debugctl debugexceptions perfglobctl bndcfgs interruptibility activitystate interruptstatus
    deadlinephy deadlinevir guestapictimervector spec_ctrl s_cet ssp intr fsbase gdtbase gsbase trbase idtbase
    pinbased cpubased secondaryexec tertiaryexec entrycontrols exitcontrols secondaryexitcontrols exceptionbitmap
    pfecmask pfecmatch vmexit reason idtvectoring tsc svi tpr apic virt postedintrvec ept eptp ple virtual
    vmfunc ve ve_info suppressed target0 target1 target2 target3 targets
""")
"""Lower-case words one of which stands in every line that can matter."""

MARKERS = word_set("""
    gh_mask shadow sysenter debugctl debugexceptions interruptibility activitystate interruptstatus perfglobctl bndcfgs attr gdtr ldtr idtr
    pdptr0 pdptr2 pdpte0 pdpte2 preemptiontimer deadlinephy deadlinevir spec_ctrl s_cet fsbase gdtbase gsbase trbase idtbase pinbased cpubased
    secondaryexec tertiaryexec entrycontrols exitcontrols exceptionbitmap pfecmask pfecmatch vmentry vmexit qualification idtvectoring svi tpr
    postedintrvec eptp ept ple vmfunc ve_info tsc efer vpid
""")
"""Lower-case words that other logs seldom have."""
