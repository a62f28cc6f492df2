"""`explain_vm_exit` against a processor: instructions run in a guest of Bochs' CPU model, and what the model reports has to be read as
the instruction that was executed.

What the instruction was is known twice: from the parts that the test put together, and from capstone's operands of the bytes.
"""

from __future__ import annotations

import random
import struct
from typing import Dict, List, Mapping, Optional, Tuple

import capstone
import pytest
from support.encode import NAMES, Memory, instruction
from support.vmxcpu import Case, Outcome, Worker
from support.vmxcpu.places import EPT_PML4, FREE, GUEST_CODE, MSR_BITMAP, STACK, TSS, VIRTUAL_APIC

from vtdbg import bits
from vtdbg.explain import Explanation
from vtdbg.memory.base import memory_from_segments
from vtdbg.vmx import causes, events, exits, fields
from vtdbg.vmx.bitmaps import msr_place
from vtdbg.vmx.exits import explain_vm_exit
from vtdbg.vmx.vmcs import Vmcs
from vtdbg.x86 import vectors
from vtdbg.x86.operand import MemoryOperand, RegisterOperand

pytestmark = pytest.mark.live

PROC, SEC, XBITMAP = 0x4002, 0x401E, 0x4004
DESC_EXITING, INVPCID_ENABLE, INVLPG_EXITING, SEC_ACTIVE = 1 << 2, 1 << 12, 1 << 9, 1 << 31
MASK64 = (1 << 64) - 1


def vmcs_of(outcome: Outcome) -> Vmcs:
    """The fields that the processor left, read back from its page."""
    known = {encoding: value for encoding, value in outcome.fields.items() if value is not None and fields.get(encoding)}
    return Vmcs.from_values(known, "processor")


def explained(outcome: Outcome, memory: Optional[Mapping[int, bytes]] = None) -> Explanation:
    assert outcome.kind == "exit", (outcome.kind, outcome.log)
    segments = memory_from_segments(list(memory.items())) if memory is not None else None
    # RSP of the guest is in the VMCS; the model's registers after the exit are otherwise the guest's.
    registers = {name: value for name, value in outcome.registers.items() if name != "rsp"}
    return explain_vm_exit(vmcs=vmcs_of(outcome), registers=registers, memory=segments)


def decode(code: bytes, address: int, mode: int) -> "capstone.CsInsn":
    engine = capstone.Cs(capstone.CS_ARCH_X86, {32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[mode])
    engine.detail = True
    return next(engine.disasm(code, address))


def memory_of(decoded: "capstone.CsInsn") -> "capstone.x86.X86OpMem":
    return next(item.mem for item in decoded.operands if item.type == capstone.x86.X86_OP_MEM)


def address_by_capstone(decoded: "capstone.CsInsn", registers: Mapping[str, int], bases: Mapping[str, int], mode: int) -> Tuple[str, int]:
    """(segment, linear address) of the memory operand, computed from capstone's reading of the bytes and the registers."""
    operand = memory_of(decoded)
    width = decoded.addr_size * 8

    def value(register: int) -> int:
        name = decoded.reg_name(register)
        if name in ("rip", "eip"):
            return decoded.address + decoded.size
        whole = {"e": "r" + name[1:], "r": name}.get(name[0], "r" + name)
        return registers[whole.rstrip("d") if whole[1].isdigit() else whole] & ((1 << width) - 1)

    base = value(operand.base) if operand.base else 0
    index = value(operand.index) if operand.index else 0
    offset = (base + index * operand.scale + operand.disp) & ((1 << width) - 1)
    stack = operand.base and decoded.reg_name(operand.base).lstrip("er") in ("sp", "bp")
    segment = decoded.reg_name(operand.segment) if operand.segment else "ss" if stack else "ds"
    if mode == 64:
        return segment, (offset + (bases[segment] if segment in ("fs", "gs") else 0)) & MASK64
    return segment, (offset + bases[segment]) & 0xFFFFFFFF


VMX_FORMS = [("INVEPT", "0f3880", None, "66", 50), ("INVVPID", "0f3881", None, "66", 53), ("VMPTRLD", "0fc7", 6, "", 21),
             ("VMPTRST", "0fc7", 7, "", 22), ("VMCLEAR", "0fc7", 6, "66", 19), ("VMXON", "0fc7", 6, "f3", 27),
             ("VMREAD", "0f78", None, "", 23), ("VMWRITE", "0f79", None, "", 25)]
OTHER_FORMS = [("INVPCID", "0f3882", None, "66", 58), ("SGDT", "0f01", 0, "", 46), ("SIDT", "0f01", 1, "", 46), ("LGDT", "0f01", 2, "", 46),
               ("LIDT", "0f01", 3, "", 46), ("SLDT", "0f00", 0, "", 47), ("STR", "0f00", 1, "", 47), ("LLDT", "0f00", 2, "", 47),
               ("LTR", "0f00", 3, "", 47)]
"""(mnemonic, opcode, ModRM.reg or None for a register operand, mandatory prefix, exit reason)"""


def random_operand(rng: random.Random, mode: int) -> Memory:
    count = 16 if mode == 64 else 8
    address_bits = rng.choice([64, 64, 32] if mode == 64 else [32, 32, 16])
    width = rng.choice([0, 1, 4])
    displacement = {0: 0, 1: rng.randint(-128, 127), 4: rng.choice([rng.randint(-2**31, 2**31 - 1), -1, -8, 0x7FFFFFFF])}[width]
    segment = rng.choice([None, None, "ds", "es", "ss", "cs", "fs", "gs"])
    if address_bits == 16:
        base, index = rng.choice([(3, 6), (3, 7), (5, 6), (5, 7), (6, None), (7, None), (5, None), (3, None), (None, None)])
        return Memory(base, index, 1, displacement if width != 4 else rng.randint(0, 0xFFFF), width, segment, 16)
    if mode == 64 and rng.random() < 0.12:
        return Memory(displacement=rng.randint(-2**31, 2**31 - 1), segment=segment, bits=address_bits, rip=True)
    base = rng.choice([None, *range(count)])
    index = rng.choice([None, *(number for number in range(count) if number != 4)])
    if base is None:
        displacement = rng.randint(-2**31, 2**31 - 1)
    return Memory(base, index, rng.choice([1, 2, 4, 8]) if index is not None else 1, displacement, width, segment, address_bits)


def random_registers(rng: random.Random, mode: int) -> Dict[str, int]:
    return {name: rng.getrandbits(64 if mode == 64 else 32) for name in NAMES}


def exiting(cpu: Worker, mode: str) -> Dict[int, int]:
    base = cpu.baseline(mode)
    return {PROC: base[PROC] | SEC_ACTIVE | INVLPG_EXITING, SEC: base[SEC] | DESC_EXITING | INVPCID_ENABLE}


def segment_values(rng: random.Random, mode: int) -> Tuple[Dict[int, int], Dict[str, int]]:
    """Random segment bases as VMCS fields, and the same by name; flat limits."""
    names = ("es", "cs", "ss", "ds", "fs", "gs")
    if mode == 64:
        bases = dict.fromkeys(names, 0)
        bases.update(fs=rng.getrandbits(46), gs=MASK64 - rng.getrandbits(46))
        # DS and ES have a base that 64-bit code does not look at.
        ignored = {0x680C: rng.getrandbits(32), 0x6806: rng.getrandbits(32)}
        return {**ignored, 0x680E: bases["fs"], 0x6810: bases["gs"]}, bases
    bases = {name: rng.getrandbits(32) if name not in ("cs",) else 0 for name in names}
    values = {0x6806 + 2 * index: bases[name] for index, name in enumerate(names)}
    for index in (4, 5):
        values.update({0x0800 + 2 * index: 0x18, 0x4800 + 2 * index: 0xFFFFFFFF, 0x4814 + 2 * index: 0xC093})
    return values, bases


@pytest.mark.parametrize(("mode", "count"), [("64-bit", 600), ("32-bit", 250), ("compatibility", 150)])
def test_memory_operands(vmx_worker: Worker, mode: str, count: int) -> None:
    """Instruction information and qualification give the operand: segment, base, index, scale, displacement and the linear address
    (SDM vol. 3, Information for VM Exits Due to Instruction Execution; a RIP-relative displacement is stored with RIP already added)."""
    rng = random.Random(f"operands {mode}")
    code_mode = 64 if mode == "64-bit" else 32
    forms = OTHER_FORMS if mode == "compatibility" else VMX_FORMS + OTHER_FORMS     # VMX instructions are #UD in compatibility mode
    cases: List[Case] = []
    built = []
    for number in range(count):
        mnemonic, opcode, reg, mandatory, reason = forms[number % len(forms)]
        operand = random_operand(rng, code_mode)
        second = reg if reg is not None else rng.randrange(16 if code_mode == 64 else 8)
        code = instruction(opcode, second, operand, mode=code_mode, mandatory=mandatory)
        registers = random_registers(rng, code_mode)
        values, bases = segment_values(rng, code_mode)
        values.update(exiting(vmx_worker, mode))
        values[0x681C] = registers["rsp"]
        cases.append(vmx_worker.guest_case(code, values, mode, registers={name: value for name, value in registers.items() if name != "rsp"}))
        built.append((mnemonic, reason, operand, second if reg is None else None, code, registers, bases))
    for (mnemonic, reason, operand, second, code, registers, bases), outcome in zip(built, vmx_worker.launch_many(cases)):
        about = f"{mnemonic} {operand} {code.hex()}"
        assert (outcome.kind, outcome.number) == ("exit", reason), about
        explanation = explained(outcome)
        assert not [text for text in explanation.warnings() if "impossible" in text], about
        shown = explanation.operand
        assert isinstance(shown, MemoryOperand), about
        rip = outcome.fields[0x681E]
        assert rip is not None
        decoded = decode(code, rip, code_mode)
        assert decoded.size == len(code)
        segment, linear = address_by_capstone(decoded, registers, bases, code_mode)
        assert shown.linear == linear, about
        assert shown.address_size == operand.bits == decoded.addr_size * 8, about
        assert shown.base == (NAMES[operand.base].upper() if operand.base is not None else None), about
        assert shown.index == (NAMES[operand.index].upper() if operand.index is not None else None), about
        assert shown.scale == operand.scale, about
        if code_mode == 32 or segment in ("fs", "gs"):
            assert shown.segment == segment.upper(), about
        named = explanation.fact("instruction")
        assert named is not None and named.meaning == mnemonic == decoded.mnemonic.upper(), about
        if second is not None:
            texts = [fact.meaning for fact in explanation.facts if fact.label.startswith("reg2")]
            assert len(texts) == 1 and texts[0].split(" ")[0] == NAMES[second].upper(), about
        advance = explanation.advised("rip")[0].text
        assert f"VM_EXIT_INSTRUCTION_LEN = {len(code)}, GUEST_RIP = {rip + len(code):#x}" in advance, about


def test_where_the_guest_stores(vmx_worker: Worker) -> None:
    """The linear address that the exit of SGDT, SIDT, SLDT or STR is said to have is where the same instruction stores without the exit."""
    rng = random.Random("stores")
    pages = range(FREE, FREE + 0x6000)
    exit_cases, store_cases, wanted = [], [], []
    for number in range(60):
        mnemonic, opcode, reg, mandatory, _ = OTHER_FORMS[1:3][number % 2] if number % 4 < 2 else OTHER_FORMS[5:7][number % 2]
        base, index = rng.sample([number for number in range(16) if number != 4], 2)
        target, scale = rng.choice(pages) & ~15 | rng.randrange(6), rng.choice([1, 2, 4, 8])
        registers = {NAMES[base]: rng.getrandbits(31), NAMES[index]: rng.getrandbits(10)}
        gs = rng.getrandbits(20)
        short = rng.randint(-128, 127)
        registers[NAMES[base]] = (target - gs - registers[NAMES[index]] * scale - short) & MASK64
        code = instruction(opcode, reg or 0, Memory(base, index, scale, short, 1, "gs"), mandatory=mandatory)
        state = {0x6810: gs, 0x6816: 0xFFFF876543210000, 0x6818: 0xFFFF812345670000, 0x4810: 0x5AA5, 0x4812: 0x3CC3, 0x080E: 0x28,
                 0x080C: 0x30, 0x4820: 0x82, 0x480C: 0xFF}
        exit_cases.append(vmx_worker.guest_case(code, {**state, **exiting(vmx_worker, "64-bit")}, registers=registers))
        # SLDT and STR store two bytes, SGDT and SIDT ten; the pages around hold a pattern that none of them is.
        store_cases.append(vmx_worker.guest_case(code, state, registers=registers, memory={FREE: b"\xee" * 0x8000}, dump=[(FREE, 0x8000)]))
        wanted.append((mnemonic, target))
    outcomes = vmx_worker.launch_many(exit_cases + store_cases)
    for (mnemonic, target), exited, stored in zip(wanted, outcomes, outcomes[len(wanted):]):
        shown = explained(exited).operand
        assert isinstance(shown, MemoryOperand)
        after = stored.memory[(FREE, 0x8000)]
        changed = [FREE + at for at, byte in enumerate(after) if byte != 0xEE]
        assert changed[0] == shown.linear == target, mnemonic
        assert len(changed) == shown.size == (10 if mnemonic in ("SGDT", "SIDT") else 2), mnemonic


def test_register_operands(vmx_worker: Worker) -> None:
    """Bit 10 of the information: VMREAD, VMWRITE, SLDT, STR, LLDT and LTR with a register operand (reg1)."""
    cases, built = [], []
    for mnemonic, opcode, reg, mandatory, reason in [form for form in VMX_FORMS + OTHER_FORMS if form[4] in (23, 25, 47)]:
        for first in range(16):
            second = reg if reg is not None else (first * 7 + 3) % 16
            code = instruction(opcode, second, first, mandatory=mandatory)
            registers = {name: 0x1000 + 0x111 * number for number, name in enumerate(NAMES) if number != 4}
            cases.append(vmx_worker.guest_case(code, exiting(vmx_worker, "64-bit"), registers=registers))
            built.append((mnemonic, reason, first, second if reg is None else None, code))
    for (mnemonic, reason, first, second, code), outcome in zip(built, vmx_worker.launch_many(cases)):
        assert (outcome.kind, outcome.number) == ("exit", reason), code.hex()
        explanation = explained(outcome)
        shown = explanation.operand
        assert isinstance(shown, RegisterOperand), mnemonic
        assert shown.register == NAMES[first].upper(), code.hex()
        assert shown.value == (STACK + 0x400 if first == 4 else 0x1000 + 0x111 * first)
        if second is not None:
            fact = explanation.fact("VMCS field") or explanation.fact("selected by register")
            assert fact is not None and fact.value == (STACK + 0x400 if second == 4 else 0x1000 + 0x111 * second)


@pytest.mark.parametrize(("opcode", "reg", "bit", "reason"), [("0fc7", 6, 11, 57), ("0fc7", 7, 16, 61)])
def test_rdrand_and_rdseed(vmx_worker: Worker, opcode: str, reg: int, bit: int, reason: int) -> None:
    """The destination register and its size, 64 bits with REX.W.  (The model reports 32 bits for the 16-bit form too: left out here.)"""
    base = vmx_worker.baseline()
    values = {PROC: base[PROC] | SEC_ACTIVE, SEC: 1 << bit}
    forms = [(number, mandatory, wide, size) for number in range(16) for mandatory, wide, size in (("", False, 4), ("", True, 8))]
    outcomes = vmx_worker.launch_many(
        vmx_worker.guest_case(instruction(opcode, reg, number, mandatory=mandatory, wide=wide), values) for number, mandatory, wide, _ in forms)
    for (number, _, _, size), outcome in zip(forms, outcomes):
        assert (outcome.kind, outcome.number) == ("exit", reason)
        shown = explained(outcome).operand
        assert isinstance(shown, RegisterOperand)
        assert (shown.register, shown.size) == (NAMES[number].upper(), size)


def test_mov_cr_and_dr(vmx_worker: Worker) -> None:
    """MOV to and from CR0, CR3, CR4, CR8 and DR0-DR7 with each general register: the sentence is what capstone says of the bytes."""
    base = vmx_worker.baseline()
    # Every bit of CR0 and CR4 host-owned, and shadows that differ from any written value here.
    values = {PROC: base[PROC] | 1 << 15 | 1 << 16 | 1 << 19 | 1 << 20 | 1 << 23, 0x6000: MASK64, 0x6002: MASK64, 0x6004: 0, 0x6006: 0}
    built = []
    for number in range(16):
        if number == 4:
            continue
        for register, opcode in [(0, "0f22"), (3, "0f22"), (4, "0f22"), (8, "0f22"), (3, "0f20"), (8, "0f20")] + [
                (register, opcode) for register in (0, 1, 2, 3, 6, 7) for opcode in ("0f21", "0f23")]:
            built.append((28 if opcode in ("0f22", "0f20") else 29, instruction(opcode, register, number)))
    outcomes = vmx_worker.launch_many(
        vmx_worker.guest_case(code, values, registers={name: 0xABC for name in NAMES if name != "rsp"}) for _, code in built)
    for (reason, code), outcome in zip(built, outcomes):
        assert (outcome.kind, outcome.number) == ("exit", reason), code.hex()
        decoded = decode(code, 0, 64)
        said = explained(outcome).summary
        assert said.split(":")[0] == f"MOV {decoded.op_str.upper()}", code.hex()


def test_clts_and_lmsw(vmx_worker: Worker) -> None:
    """CLTS, LMSW from each register and from memory: access type, source data, and the linear address of the memory operand."""
    rng = random.Random("lmsw")
    values = {0x6000: MASK64, 0x6004: 8}
    clts = explained(vmx_worker.run_guest(bytes.fromhex("0f06"), values))
    assert clts.summary.startswith("CLTS")
    built = []
    for number in range(16):
        data = rng.getrandbits(16) & ~15 | 7      # bits 3:0 differ from the shadow
        built.append((instruction("0f01", 6, number), {NAMES[number]: data} if number != 4 else {}, {}, data if number != 4 else STACK + 0x407, None))
    for _ in range(60):
        base, data = rng.choice([0, 1, 3, 5, 7, 13]), rng.getrandbits(16) & ~15 | 6
        target, fs = FREE + rng.randrange(0x7000), rng.getrandbits(20)
        code = instruction("0f01", 6, Memory(base, None, 1, 0x40, 1, "fs"))
        built.append((code, {NAMES[base]: (target - fs - 0x40) & MASK64, "fs": fs}, {target: struct.pack("<H", data)}, data, target))
    cases = []
    for code, registers, memory, _, _ in built:
        more = {**values, 0x680E: registers.get("fs", 0), 0x681C: STACK + 0x407}
        cases.append(vmx_worker.guest_case(code, more, memory=memory, registers={name: value for name, value in registers.items() if name != "fs"}))
    for (code, _, _, data, target), outcome in zip(built, vmx_worker.launch_many(cases)):
        assert (outcome.kind, outcome.number) == ("exit", 28), code.hex()
        explanation = explained(outcome)
        fact = explanation.fact("LMSW source data")
        assert fact is not None and fact.value == data, code.hex()
        assert explanation.summary.startswith(f"LMSW {data:#x} from {'a register' if target is None else 'memory'}")
        linear = explanation.fact("guest-linear address")
        assert (linear.value if linear is not None else None) == target


def test_cr_masks_decide(vmx_worker: Worker) -> None:
    """A write of CR0 or CR4 exits exactly where `exiting_bits` of value, mask and shadow is not 0 (SDM vol. 3, Guest/Host Masks and Read
    Shadows; CLTS and LMSW in Instructions That Cause VM Exits Conditionally)."""
    rng = random.Random("masks")
    # LMSW can set PE but not clear it, so PE alone has its own cases; CLTS looks at TS only.
    wanted = [(access, 0, value, owned, shadow) for access in (2, 3) for value in (0, 1, 8, 9) for owned in (1, 8, 9) for shadow in (0, 1, 8, 9)]
    for _ in range(320):
        access = rng.choice([0, 0, 2, 3])
        number = rng.choice([0, 4]) if access == 0 else 0
        real = {0: 0x80050033, 4: 0x2620}[number]
        owned = rng.choice([0, 1, 2, 4, 8, 0xE, 0xF, 0x10000, MASK64, rng.getrandbits(12)])
        shadow = rng.choice([0, 8, 0xF, real, rng.getrandbits(32)])
        value = rng.choice([real, real ^ 8, real & ~1, 0, 1, 6, 0xF, shadow & 0xFFFF]) & (0xFFFF if access == 3 else MASK64)
        wanted.append((access, number, value, owned, shadow))
    cases, built = [], []
    for access, number, value, owned, shadow in wanted:
        code = {0: instruction("0f22", number, 0), 2: bytes.fromhex("0f06"), 3: instruction("0f01", 6, 0)}[access]
        cases.append(vmx_worker.guest_case(code + b"\xf4", {0x6000 + number // 2: owned, 0x6004 + number // 2: shadow}, registers={"rax": value}))
        built.append((access, number, value, owned, shadow))
    outcomes = vmx_worker.launch_many(cases)
    seen = set()
    for (access, number, value, owned, shadow), outcome in zip(built, outcomes):
        about = f"access {access} CR{number} value {value:#x} mask {owned:#x} shadow {shadow:#x}"
        exited = (outcome.kind, outcome.number) == ("exit", 28)
        seen.add((access, exited))
        bits_of = causes.exiting_bits(access, value, owned, shadow)
        assert exited == bool(bits_of), about
        if exited:
            cause = explained(outcome).advised("cause")[0].text
            assert bits.table(f"cr{number}").describe(bits_of) in cause and "no bit differs" not in cause, about
    assert seen == {(access, way) for access in (0, 2, 3) for way in (False, True)}


CONTROLLED: List[Tuple[int, bytes, str, Dict[str, int]]] = [
    (12, b"\xf4", "proc.HLT_EXITING", {}), (14, bytes.fromhex("0f0138"), "proc.INVLPG_EXITING", {"rax": 0x1234}),
    (15, bytes.fromhex("0f33"), "proc.RDPMC_EXITING", {"rcx": 0}), (16, bytes.fromhex("0f31"), "proc.RDTSC_EXITING", {}),
    (29, bytes.fromhex("0f21c0"), "proc.MOV_DR_EXITING", {}), (39, bytes.fromhex("0f01c8"), "proc.MONITOR_EXITING", {"rax": FREE}),
    (40, bytes.fromhex("f390"), "proc.PAUSE_EXITING", {}), (46, bytes.fromhex("0f010425") + struct.pack("<I", FREE), "sec.DESC_EXITING", {}),
    (47, bytes.fromhex("0f00c8"), "sec.DESC_EXITING", {}), (54, bytes.fromhex("0f09"), "sec.WBINVD_EXITING", {}),
    (57, bytes.fromhex("0fc7f0"), "sec.RDRAND_EXITING", {}), (61, bytes.fromhex("0fc7f8"), "sec.RDSEED_EXITING", {}),
]


@pytest.mark.parametrize(("reason", "code", "cause", "registers"), CONTROLLED, ids=[str(item[0]) for item in CONTROLLED])
def test_the_cause_is_the_control(vmx_worker: Worker, reason: int, code: bytes, cause: str, registers: Dict[str, int]) -> None:
    """With the control of the `cause` column the instruction exits with this reason; with the advice of `avoid` followed it does not."""
    assert exits.reasons()[reason].cause.split("|")[0] == cause
    word, ident = cause.split(".")
    row = bits.table(word)[ident]
    base = vmx_worker.baseline()
    off = {PROC: (base[PROC] | SEC_ACTIVE) & ~0x80, SEC: 0}
    encoding = {"proc": PROC, "sec": SEC}[word]
    on = {**off, encoding: off[encoding] | row.mask}
    # An instruction that does not exit is followed by UD2, whose #UD exits.
    with_control, without = vmx_worker.launch_many([vmx_worker.guest_case(code + b"\x0f\x0b", values, registers=registers) for values in (on, off)])
    assert (with_control.kind, with_control.number) == ("exit", reason)
    explanation = explained(with_control)
    assert f'"{row.name}" (bit {row.low}) is 1' in explanation.advised("cause")[0].text
    assert f'"{row.name}"' in explanation.advised("avoid")[0].text
    assert (without.kind, without.number) != ("exit", reason)
    assert with_control.fields[0x440C] == len(code)


UNCONDITIONAL = [(10, "0fa2"), (13, "0f08"), (18, "0f01c1"), (20, "0f01c2"), (24, "0f01c3"), (26, "0f01c4"), (55, "0f01d1")]


@pytest.mark.parametrize(("reason", "code"), UNCONDITIONAL)
def test_unconditional(vmx_worker: Worker, reason: int, code: str) -> None:
    """CPUID, INVD, VMCALL, VMLAUNCH, VMRESUME, VMXOFF and XSETBV exit with no control set: the advice says that nothing avoids it."""
    # CR4.OSXSAVE, without which XSETBV is #UD.
    outcome = vmx_worker.run_guest(bytes.fromhex(code), {0x6804: 0x42620, 0x4002: vmx_worker.baseline()[PROC] & ~0x80 & ~SEC_ACTIVE})
    assert (outcome.kind, outcome.number) == ("exit", reason)
    explanation = explained(outcome)
    assert explanation.advised("cause")[0].text.startswith("unconditional")
    assert explanation.advised("avoid")[0].text == "cannot be avoided"
    assert not explanation.warnings()


def test_msr_bitmap(vmx_worker: Worker) -> None:
    """RDMSR and WRMSR exit exactly where the byte and bit that the advice names is 1; MSRs outside the two ranges always exit."""
    rng = random.Random("msrs")
    base = vmx_worker.baseline()
    values = {PROC: base[PROC] | 1 << 28, 0x2004: MSR_BITMAP}
    page = bytes(rng.getrandbits(8) for _ in range(4096))
    indexes = [0x10, 0x1B, 0x174, 0x175, 0x176, 0x277, 0x3A, 0x480, 0xC0000080, 0xC0000081, 0xC0000100, 0xC0000102, 0x2000, 0x40000000, 0xC0002000,
               0x1FFF, 0xC0001FFF, 0xBFFFFFFF, *(rng.randrange(0x2000) for _ in range(60)), *(0xC0000000 + rng.randrange(0x2000) for _ in range(60))]
    built = [(index, write) for index in indexes for write in (False, True)]
    outcomes = vmx_worker.launch_many(
        vmx_worker.guest_case(b"\x0f\x30\xf4" if write else b"\x0f\x32\xf4", values, memory={MSR_BITMAP: page},
                              registers={"rcx": index, "rax": 0, "rdx": 0})
        for index, write in built)
    seen = set()
    for (index, write), outcome in zip(built, outcomes):
        place = msr_place(index, "write" if write else "read")
        wanted = place is None or bool(page[place[0]] >> place[1] & 1)
        exited = (outcome.kind, outcome.number) == ("exit", 32 if write else 31)
        assert exited == wanted, (hex(index), write)
        seen.add((place is None, exited))
        if exited:
            cause = explained(outcome, {MSR_BITMAP: page}).advised("cause")[0].text
            assert "always exits" in cause if place is None else cause.endswith("which is 1"), cause
    assert seen == {(False, False), (False, True), (True, True)}


def test_page_fault_filter(vmx_worker: Worker) -> None:
    """A page fault exits where bit 14 of the exception bitmap is (PFEC & mask == match) (SDM vol. 3, Exception Bitmap)."""
    rng = random.Random("pfec")
    accesses = {0: bytes.fromhex("8a07"), 2: bytes.fromhex("8807"), 0x10: bytes.fromhex("ffe7")}     # read, write, fetch at [RDI], not present
    cases, built = [], []
    for _ in range(150):
        error = rng.choice(list(accesses))
        wanted, filter_mask, match = rng.getrandbits(1), rng.choice([0, 1, 2, 0x10, 0x12, 0x1F]), rng.choice([0, 1, 2, 0x10, 0x12])
        bitmap = 0xFFFFBFFF | wanted << 14
        cases.append(vmx_worker.guest_case(accesses[error], {XBITMAP: bitmap, 0x4006: filter_mask, 0x4008: match}, registers={"rdi": 0x80000000}))
        built.append((error, bitmap, filter_mask, match))
    seen = set()
    for (error, bitmap, filter_mask, match), outcome in zip(built, vmx_worker.launch_many(cases)):
        info = outcome.fields[0x4404] or 0
        # Without its exit the fault goes to an IDT at 0 that has nothing: another exception exits, on the way to #PF's handler.
        exited = (outcome.kind, outcome.number) == ("exit", 0) and info & 0xFF == 14
        assert exited == causes.page_fault_exits(bitmap, filter_mask, match, error)
        seen.add(exited)
        if exited:
            explanation = explained(outcome)
            assert outcome.fields[0x4406] == error and explanation.summary == "at 0x80000000"
            assert "do not give this exit" not in explanation.advised("cause")[0].text
            assert f"{vectors.describe_page_fault(error)}" in str([fact.meaning for fact in explanation.group("VM_EXIT_INTR_INFO")])
    assert seen == {False, True}


ACCESSES = {"read": 0, "write": 1, "fetch": 2}


def test_ept_violations(vmx_worker: Worker) -> None:
    """Each access through each combination of leaf permissions: what is said of the access and of the permissions is what the entry has."""
    rng = random.Random("ept")
    cases, built = [], []
    for permissions in range(8):
        for access in ACCESSES:
            gpa = 0x400000 + (rng.randrange(0x1000) << 4 & ~0xFFF | rng.randrange(0xFF0))
            entries = {0x17000 + 8 * 2: FREE | 7, FREE + 8 * (gpa >> 12 & 511): 0x19000 | 6 << 3 | permissions}
            cases.append(vmx_worker.ept_case(access, gpa, entries, EPT_PML4 | 3 << 3 | 6))
            built.append((permissions, access, gpa))
    violations = 0
    for (permissions, access, gpa), outcome in zip(built, vmx_worker.launch_many(cases)):
        if outcome.number == 49:
            assert permissions in (2, 6)     # write without read is a misconfiguration
            assert "misconfiguration" in explain_vm_exit(49, vmcs=vmcs_of(outcome)).title
            continue
        if outcome.number != 48:
            continue
        violations += 1
        explanation = explained(outcome)
        address = explanation.fact("guest-physical address")
        assert address is not None and address.value == gpa
        word = "instruction fetch" if access == "fetch" else access
        assert explanation.summary.startswith(f"{word} at linear address {gpa:#x}, guest-physical {gpa:#x}; "), explanation.summary
        table = bits.table("qual_ept")
        labels = {fact.label for fact in explanation.group("EXIT_QUALIFICATION")}
        for bit, ident in enumerate(("READABLE", "WRITABLE", "EXECUTABLE")):
            assert (table[ident].name in labels) == bool(permissions >> bit & 1)
        if permissions:
            assert f"EPT allows {''.join(letter if permissions >> bit & 1 else '-' for bit, letter in enumerate('rwx'))}, " in explanation.summary
            assert explanation.summary.endswith(f"{'execute' if access == 'fetch' else access} is missing")
        else:
            # The bits are those that all levels have: 0 says no more than that.
            assert "; EPT allows nothing there (not present, or " in explanation.summary
    assert violations >= 9


def gate(handler: int, kind: int = 0xE, present: bool = True, dpl: int = 3) -> bytes:
    """A 64-bit interrupt gate to `handler` in the code segment 0x10."""
    low = handler & 0xFFFF | 0x10 << 16 | (kind | dpl << 5 | (0x80 if present else 0)) << 40 | (handler >> 16 & 0xFFFF) << 48
    return struct.pack("<QQ", low, handler >> 32)


GDT, IDT, HANDLER = FREE, FREE + 0x1000, GUEST_CODE + 0x800
GDT_BYTES = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)


def idt(vector: int) -> Dict[int, bytes]:
    """A GDT and an IDT in which only `vector` has a gate: its handler is HLT."""
    return {GDT: GDT_BYTES, IDT: bytes(4096), IDT + 16 * vector: gate(HANDLER)}


@pytest.mark.parametrize(("code", "vector", "kind", "length", "error"), [
    ("cd30", 0x30, 4, 2, None), ("cc", 3, 6, 1, None), ("f1", 1, 5, 1, None), ("0f0b", 6, 3, None, None), ("8a07", 14, 3, None, 0),
    ("f30f0b", 6, 3, None, None)])
def test_event_delivered_again(vmx_worker: Worker, code: str, vector: int, kind: int, length: Optional[int], error: Optional[int]) -> None:
    """An exit during event delivery loses the event; the words that the advice says to write deliver it, with the return address that the
    instruction would have had (SDM vol. 3, Event Injection): behind INT n, INT3 and INT1, at the faulting instruction otherwise."""
    # Only #GP exits: the gate of the vector is beyond the IDT's limit, so delivery ends in #GP.
    state = {XBITMAP: 1 << 13, 0x6818: IDT, 0x4812: 0, 0x6816: GDT, 0x4810: 31}
    first = vmx_worker.run_guest(bytes.fromhex(code), state, registers={"rdi": 0x80000000}, memory=idt(vector))
    assert (first.kind, first.number) == ("exit", 0) and (first.fields[0x4404] or 0) & 0xFF == 13
    during = events.decode("idt_vectoring_info", first.fields[0x4408] or 0)
    assert (during.valid, during.vector, during.type, during.error_code_valid) == (True, vector, kind, error is not None)
    made = events.injection(during, first.fields[0x440A], first.fields[0x440C])
    assert not made.missing
    advised = [item.text for item in explained(first).advised("event")]
    assert any(made.text in text for text in advised)
    # The next entry: the same guest with a whole IDT and the advised words, and nothing else changed.
    values = {encoding: value for encoding, value in first.fields.items() if value is not None}
    values.update({0x4812: 0xFFF, **{fields.find(name).encoding: value for name, value in made.fields}})
    again = vmx_worker.launch(values, memory={**idt(vector), HANDLER: b"\xf4" * 4}, dump=[(STACK, 0x1000)], fields="all", want_registers=True)
    assert (again.kind, again.number) == ("exit", 12), again.log
    assert again.fields[0x681E] == HANDLER
    stack = again.fields[0x681C] or 0
    frame = struct.unpack_from("<3Q", again.memory[(STACK, 0x1000)], stack - STACK)
    if error is not None:
        assert frame[0] == error
        frame = frame[1:]
    assert frame[0] == (first.fields[0x681E] or 0) + (length or 0)
    assert frame[1] == 0x10


def test_double_faults(vmx_worker: Worker) -> None:
    """Which second exception becomes #DF: the model with only #DF and the second exception exiting, against the table of classes."""
    triggers = {0: "31c9f7f1", 6: "0f0b", 13: "b8ffff00008ed8", 14: "8a0425000000c0"}
    seconds = {13: ("limit", {0x4812: 0}), 11: ("not present", {0x4812: 0xFFF}), 14: ("no page", {0x4812: 0xFFF, 0x6818: 0x80000000})}
    cases, built = [], []
    for first, code in triggers.items():
        for second, (_, more) in seconds.items():
            memory = {GDT: GDT_BYTES, IDT: bytes(4096), IDT + 16 * first: gate(HANDLER, present=False)}
            state = {XBITMAP: 1 << 8, 0x6818: IDT, 0x6816: GDT, 0x4810: 31, **more}
            cases.append(vmx_worker.guest_case(bytes.fromhex(code), state, registers={"rdx": 0, "rax": 1}, memory=memory))
            built.append((first, second))
    seen = set()
    for (first, second), outcome in zip(built, vmx_worker.launch_many(cases)):
        # One after the other, or #DF at once.  A second exception that is handled fails like the first, so that #DF exits in any case.
        chain = [event[1] for event in outcome.events if event[0] == "exception"]
        assert chain[:2] == [first, second], (first, second, chain)
        doubled = chain[2] == 8
        assert doubled == (vectors.double_fault(first, second) == "#DF"), (first, second, chain)
        seen.add(doubled)
        assert (outcome.kind, outcome.number) == ("exit", 0) and (outcome.fields[0x4404] or 0) & 0xFF == 8
        assert not [text for text in explained(outcome).warnings() if "impossible" in text]
    assert seen == {False, True}


def test_rip_of_software_exceptions(vmx_worker: Worker) -> None:
    """INT3 and INT1 that exit leave GUEST_RIP at the instruction, with its length; UD2 is a fault and has none."""
    for code, vector, kind in ((b"\xcc", 3, events.SOFTWARE), (b"\xf1", 1, events.PRIVILEGED_SOFTWARE), (b"\x0f\x0b", 6, events.HARDWARE)):
        outcome = vmx_worker.run_guest(code)
        event = events.decode("exit_int_info", outcome.fields[0x4404] or 0)
        assert (event.vector, event.type, event.problems) == (vector, kind, ())
        explanation = explained(outcome)
        rip = explanation.advised("rip")[0].text
        if kind == events.HARDWARE:
            assert rip.startswith("do not advance RIP")
        else:
            assert f"add VM_EXIT_INSTRUCTION_LEN = 1, GUEST_RIP = {(outcome.fields[0x681E] or 0) + 1:#x}" in rip


def test_instruction_and_operand_from_memory(vmx_worker: Worker) -> None:
    """With the guest's memory: the bytes at GUEST_RIP through guest paging are the instruction that ran, and an INVPCID descriptor and a
    VMPTRLD pointer are what the guest had put there."""
    descriptor = struct.pack("<QQ", 0x123, 0xFFFF800000001000)
    place = Memory(displacement=FREE + 0x10)
    cases = [(instruction("0f3882", 2, place, mandatory="66"), {"rdx": 0}), (instruction("0fc7", 6, place), {})]
    outcomes = vmx_worker.launch_many(
        vmx_worker.guest_case(code, exiting(vmx_worker, "64-bit"), registers=registers, memory={FREE + 0x10: descriptor},
                              dump=[(0, 0x20000), (0x80000, 0x20000)])
        for code, registers in cases)
    for (code, _), outcome in zip(cases, outcomes):
        memory = {address: data for (address, _), data in outcome.memory.items()}
        explanation = explained(outcome, memory)
        assert explanation.instruction is not None
        assert explanation.instruction.data == code and explanation.instruction.address == outcome.fields[0x681E]
        if outcome.number == 58:
            found = {fact.label: fact.value for fact in explanation.group("operand")}
            assert (found["PCID"], found["address to invalidate"], found["type"]) == (0x123, 0xFFFF800000001000, 0)
        else:
            pointer = explanation.fact("VMCS pointer")
            assert pointer is not None and pointer.value == 0x123 and "aligned" in pointer.warning
        # Without the page that the operand is in, the failing step is named, and nothing is made up.
        poorer = explained(outcome, {address: data[:FREE] if address == 0 else data for address, data in memory.items()})
        unread = poorer.fact("operand in memory")
        assert unread is not None and unread.value is None and f"{FREE + 0x10:#x}" in unread.meaning


def test_trap_like_and_access_exits(vmx_worker: Worker) -> None:
    """TPR below threshold: GUEST_RIP is behind the MOV to CR8; an APIC access: at the instruction, with access type and register."""
    base = vmx_worker.baseline()
    tpr = {PROC: base[PROC] | 1 << 21, 0x2012: VIRTUAL_APIC, 0x401C: 5}
    apic = {PROC: base[PROC] | SEC_ACTIVE | 1 << 21, SEC: 1, 0x2014: FREE + 0x3000, 0x2012: VIRTUAL_APIC}
    moved, read, written = vmx_worker.launch_many([
        vmx_worker.guest_case(bytes.fromhex("440f22c0f4"), tpr, registers={"rax": 0}, memory={VIRTUAL_APIC + 0x80: b"\x60"}),
        vmx_worker.guest_case(bytes.fromhex("8b07f4"), apic, registers={"rdi": FREE + 0x3030}),
        vmx_worker.guest_case(bytes.fromhex("8907f4"), apic, registers={"rdi": FREE + 0x3300})])
    start = moved.fields[0x681E]
    assert moved.number == 43 and start is not None and start % 64 == 4      # sequences begin at multiples of 64
    assert explained(moved).advised("rip")[0].text.startswith("do not advance RIP: trap-like")
    for outcome, words in ((read, "data read of APIC register 0x30 APIC_LVR"), (written, "data write of APIC register 0x300 APIC_ICR")):
        explanation = explained(outcome)
        assert explanation.code == 44 and explanation.summary.startswith(words)
        assert (outcome.fields[0x681E] or 0) % 64 == 0 and explanation.advised("rip")[0].text.startswith("do not advance RIP when")
        assert '"Virtualize APIC accesses" (bit 0) is 1' in explanation.advised("cause")[0].text


def test_page_modification_log_full(vmx_worker_new: Worker) -> None:
    """With the index past the end the write exits before it is made: RIP stays, the write runs again after the log is emptied."""
    base = vmx_worker_new.baseline()
    values = {PROC: base[PROC] | SEC_ACTIVE, SEC: 2 | 1 << 17, 0x201A: EPT_PML4 | 6 | 3 << 3 | 1 << 6, 0x200E: FREE, 0x0812: 0xFFFF}
    outcome = vmx_worker_new.run_guest(bytes.fromhex("8907f4"), values, registers={"rdi": 0x600000})
    explanation = explained(outcome)
    assert explanation.name == "PML_FULL" and (outcome.fields[0x681E] or 0) % 64 == 0
    assert explanation.advised("rip")[0].text.startswith("do not advance RIP when the cause is removed")
    assert not explanation.advised("shadow") and not explanation.warnings()


NEWER: List[Tuple[int, str, Dict[int, int]]] = [
    (67, "f20faef3", {SEC: 1 << 26, PROC: 1 << 12}), (68, "66410faef1", {SEC: 1 << 26, PROC: 1 << 12}),
    (59, "0f01d4", {SEC: 1 << 13 | 2, 0x201A: EPT_PML4 | 6 | 3 << 3, 0x2018: 0}), (51, "0f01f9", {SEC: 1 << 3, PROC: 1 << 12}),
    (36, "0f01c9", {PROC: 1 << 10}), (54, "f30f09", {SEC: 1 << 6})]


@pytest.mark.parametrize(("reason", "code", "values"), NEWER, ids=[str(item[0]) for item in NEWER])
def test_newer_instructions(vmx_worker_new: Worker, reason: int, code: str, values: Dict[int, int]) -> None:
    """UMWAIT, TPAUSE, VMFUNC, RDTSCP, MWAIT, WBNOINVD: two controls at once where the manual asks for two.  (The model leaves the
    instruction information of UMWAIT and TPAUSE 0: their operand is not compared.)"""
    given = {**values, PROC: vmx_worker_new.baseline()[PROC] | SEC_ACTIVE | values.get(PROC, 0)}
    outcome = vmx_worker_new.run_guest(bytes.fromhex(code), given)
    explanation = explained(outcome)
    assert explanation.code == reason and not explanation.warnings()
    assert outcome.fields[0x440C] == len(code) // 2
    cause = explanation.advised("cause")[0].text
    assert cause.count(" is 1") == exits.reasons()[reason].cause.count(".") and "do not give" not in cause


TASK_GDT = struct.pack("<6Q", 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x67 | (FREE + 0x2000) << 16 | 0x89 << 40, 0)
TASK_GATE = struct.pack("<Q", 0x20 << 16 | 0xE5 << 40)


@pytest.mark.parametrize(("code", "source", "length", "vector"), [("ea000000002000", "JMP", 7, None), ("9a000000002000", "CALL", 7, None),
                                                                  ("cf", "IRET", 1, None), ("cd30", "a task gate in the IDT", 2, 0x30),
                                                                  ("0f0b", "a task gate in the IDT", None, 6)])
def test_task_switches(vmx_worker: Worker, code: str, source: str, length: Optional[int], vector: Optional[int]) -> None:
    """JMP, CALL and IRET to a task, and an event through a task gate: source, selector, and whether the event has to be injected again
    (the emulated task switch is its delivery)."""
    table = bytearray(TASK_GDT)
    table[4 * 8 + 5] |= 2 if source == "IRET" else 0     # IRET returns to a busy task
    memory = {GDT: bytes(table), IDT + 8 * (vector or 0): TASK_GATE, FREE + 0x2000: bytes(0x68), TSS: struct.pack("<H", 0x20)}
    state = {0x6816: GDT, 0x4810: 0x3F, 0x6818: IDT, 0x4812: 0x7FF, XBITMAP: 0xFFFFFFFF & ~(1 << 6), 0x6820: 0x4002 if source == "IRET" else 2}
    outcome = vmx_worker.run_guest(bytes.fromhex(code), state, "32-bit", memory=memory)
    explanation = explained(outcome)
    assert explanation.code == 9 and explanation.summary == f"task switch to TSS selector 0x20 by {source}"
    assert not explanation.warnings()
    shown = explanation.fact("instruction length")
    assert (shown.value if shown is not None else None) == length
    advised = [item.text for item in explanation.advised("event")]
    if vector is None:
        assert not advised and "add VM_EXIT_INSTRUCTION_LEN" in explanation.advised("rip")[0].text
    else:
        assert len(advised) == 1 and "do not inject it again" in advised[0] and vectors.name(vector) in advised[0]


def test_ept_violation_walk_agrees(vmx_worker: Worker) -> None:
    """With memory the EPT walk gives the same qualification as the processor did; after the entry is repaired it says that it changed."""
    gpa = 0x400000
    entries = {0x17000 + 8 * 2: FREE | 7, FREE: 0x19000 | 6 << 3 | 1}
    case = vmx_worker.ept_case("write", gpa, entries, EPT_PML4 | 3 << 3 | 6, dump=[(0, 0x20000)], fields="all", want_registers=True)
    outcome = vmx_worker.launch_many([case])[0]
    memory = {address: data for (address, _), data in outcome.memory.items()}
    walk = explained(outcome, memory).fact("EPT walk")
    assert walk is not None and walk.meaning.startswith("violation: ") and "level 1" in walk.meaning and not walk.warning
    repaired = bytearray(memory[0])
    struct.pack_into("<Q", repaired, FREE, 0x19000 | 6 << 3 | 7)
    changed = explained(outcome, {0: bytes(repaired)}).fact("EPT walk")
    assert changed is not None and "changed since" in changed.warning and "0x19000" in changed.meaning
