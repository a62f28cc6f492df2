"""`kvm list|symbols`: KVM's VMs and vCPUs by its own objects, and the file of symbols that a debugger needs for that."""

from __future__ import annotations

from typing import List, Optional

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.selector import kvm_state
from vtdbg.commands.session import Session
from vtdbg.errors import FormatError, UsageError
from vtdbg.linux.kvm import VARIANTS, KvmState, Vcpu
from vtdbg.numbers import size_text
from vtdbg.report import Pairs, Report, Table, Value, hexa, text

STALE = "a vCPU's control block is as of its last exit; KVM's objects are as the processors left them when the target stopped"


@verb("kvm list", "VMs, vCPUs and their control blocks by KVM's own objects (live, with the kernel's symbols)", live=True)
def list_(session: Session) -> Report:
    """vm_list, each VM's vCPUs, each vCPU's VMCSs or VMCBs, and what each of Linux' processors has current.

    Needs the symbols and types of the kernel and of kvm and kvm-amd or kvm-intel in the debugger; `kvm symbols` makes a file with them.
    Every block can be named: vcpu:ID, vcpu:PID/ID, vcpu:ID.vmcb02, cpu:N.
    """
    state = kvm_state(session.machine, "kvm list")
    report = Report("kvm list", header=session.header(), notes=[*session.machine.warnings, STALE])
    report.add(_vcpus(state))
    report.add(_processors(state))
    facts = Pairs("kernel")
    facts.add("vendor", "module", {"svm": "kvm-amd", "vmx": "kvm-intel"}[state.vendor])
    facts.add("since", "types", f"as of Linux {state.since} or newer" if state.since else f"older than Linux {VARIANTS[-1].since}")
    facts.add("tables", "read through", f"page tables of {state.root}")
    report.add(facts)
    report.python = [*session.python_open(), "state = machine.kvm()", "for vcpu in state.vcpus:", "    print(vcpu.title, vcpu.cpu, vcpu.blocks)"]
    return report


def _vcpus(state: KvmState) -> Table:
    columns = [("pid", "process"), ("vm", "struct kvm"), ("vcpu", "vCPU"), ("cpu", "CPU"), ("mode", "mode"), ("block", "block"), ("address", "at")]
    table = Table("vcpus", tuple(columns), title="vCPUs", empty="KVM has no vCPU" if not state.vms else "its VMs have no vCPUs")
    for vcpu in state.vcpus:
        for first, cells in enumerate(_blocks(vcpu)):
            whose = [Value(vcpu.pid, "" if vcpu.pid is None else str(vcpu.pid)), hexa(vcpu.vm), Value(vcpu.id, str(vcpu.id)),
                     Value(vcpu.cpu, "" if vcpu.cpu is None else str(vcpu.cpu)), _mode(vcpu)]
            table.add(*(Value(cell.data, "" if first else cell.text, cell.style) for cell in whose), *cells)
    return table


def _mode(vcpu: Vcpu) -> Value:
    if vcpu.in_guest is None:
        return Value(None, "", "dim")
    return text("in guest", "strong") if vcpu.in_guest else text("out of guest")


def _blocks(vcpu: Vcpu) -> List[List[Value]]:
    rows = []
    for block in vcpu.blocks:
        link = f"{block.kind} dump {block.address:#x}" if block.address is not None else ""
        rows.append([text(f"{block.name}{' (current)' if block.current else ''}", "strong" if block.current else ""), hexa(block.address, link=link)])
    if vcpu.vmcb12 is not None:
        rows.append([text("vmcb12"), Value(f"{vcpu.vmcb12:#x}", f"GPA {vcpu.vmcb12:#x}")])
    return rows or [[text("none", "dim"), Value(None, "", "dim")]]


def _processors(state: KvmState) -> Table:
    table = Table("cpus", (("cpu", "CPU"), ("current", "current"), ("save_area", "host save area"), ("evidence", "by")), title="Linux' processors",
                  wrap="evidence", empty="none")
    for cpu in state.cpus:
        current = hexa(cpu.block, link=f"{cpu.kind} dump {cpu.block:#x}") if cpu.block is not None else Value(None, "none", "dim")
        area = hexa(cpu.save_area) if cpu.save_area is not None else Value(None, "", "dim")
        table.add(Value(cpu.number, str(cpu.number)), current, area, cpu.evidence)
    return table


@verb(
    "kvm symbols",
    "make a file of KVM's types and symbols for a debugger, out of BTF and kallsyms",
    Arg("btf", "path", "files with BTF, the kernel's first: /sys/kernel/btf/vmlinux (or vmlinux, vmlinuz), then kvm, kvm_amd or kvm_intel (or .ko)",
        nargs="+"),
    Opt("--kallsyms", "path", "/proc/kallsyms of the running kernel, read by root; System.map serves a kernel without KASLR and modules"),
    Opt("--out", "path", "the ELF file to write", metavar="FILE"),
    Opt("--type", "text", "one more structure to put into it", many=True, metavar="NAME"),
)
def symbols(session: Session, btf: List[str], kallsyms: Optional[str], out: Optional[str], type: Optional[List[str]]) -> Report:
    """Distributions ship kernels without debugging information but with BTF, which has the kernel's types.  The file is for `add-symbol-file`:
    structures as this kernel has them, with symbols at the addresses that this boot gave them.
    """
    from vtdbg.linux.symbols import make_symbols

    if not kallsyms or not out:
        raise UsageError("give --kallsyms FILE (what /proc/kallsyms of the running kernel says) and --out FILE")
    made = make_symbols(btf, kallsyms, type or ())
    try:
        with open(out, "wb") as file:
            file.write(made.data)
    except OSError as error:
        raise FormatError(out, f"cannot be written: {error.strerror or error}") from error
    report = Report("kvm symbols", header=f"{out}, {size_text(len(made.data))}")
    facts = Pairs("symbols")
    facts.add("types", "types read", ", ".join(f"{name} {count}" for name, count in made.types.items()))
    facts.add("addresses", "symbols", str(made.addresses))
    facts.add("load", "load it by", f"add-symbol-file {out}")
    report.add(facts)
    if made.missing:
        report.notes.append(f"not in {kallsyms}: {', '.join(made.missing)}; vtdbg needs them to find KVM's objects")
    report.python = ["from vtdbg.linux.symbols import make_symbols", f"data = make_symbols({btf!r}, {kallsyms!r}).data"]
    return report
