"""Run inside gdb: takes the machine with two processors to the next point, and leaves it paused.  LAB_PORT, LAB_POINT, LAB_LOG, LAB_RESULT."""

import json
import os
import re

import gdb

VMRUN = b"\x0f\x01\xd8"
TRIES = 40


def run(command):
    return gdb.execute(command, to_string=True)


def register(name):
    return int(gdb.parse_and_eval("$" + name)) & (1 << 64) - 1


def log():
    with open(os.environ["LAB_LOG"], encoding="ascii", errors="replace") as file:
        return file.read()


def truth(name):
    return int(re.search(rf"\b{name}=(0x[0-9a-f]+|\d+)", log()).group(1), 0)


def until(address, thread=None):
    """Runs until an instruction at `address` is reached, on `thread` where that is given."""
    run("delete")
    run(f"hbreak *{address:#x}")
    for _ in range(TRIES):
        run("continue")
        if register("rip") == address and thread in (None, gdb.selected_thread().num):
            run("delete")
            return
    raise gdb.GdbError(f"stopped at {register('rip'):#x}, not at {address:#x}")


def rip_of(thread):
    run(f"thread {thread}")
    return register("rip")


def physical(address, size):
    run("maintenance packet Qqemu.PhyMemMode:1")
    try:
        return bytes(gdb.selected_inferior().read_memory(address, size))
    finally:
        run("maintenance packet Qqemu.PhyMemMode:0")


def guest_of(rip):
    """Whose code an address in a guest is."""
    return next((name for name in ("a0", "a1", "l2") if truth(f"{name}_loop") & ~0xFF == rip & ~0xFF), "b0" if rip < 0x200000 else "")


def vmruns(result, *wanted):
    """Until the processor has executed VMRUN for each of these guests: RAX is the VMCB, RIP in it tells whose it is."""
    run("delete")
    run(f"hbreak *{result['vmrun']:#x}")
    for _ in range(20 * TRIES):
        if set(wanted) <= set(result["vmcb"]):
            run("delete")
            return
        run("continue")
        address = register("rax")
        name = guest_of(int.from_bytes(physical(address + 0x578, 8), "little"))
        result["vmcb"][name], result["thread"][name] = address, gdb.selected_thread().num
    raise gdb.GdbError(f"no VMRUN for {wanted}: {result}")


def main():
    run("set pagination off")
    run("set confirm off")
    run("target remote 127.0.0.1:" + os.environ["LAB_PORT"])
    result = json.loads(os.environ["LAB_RESULT_SO_FAR"])
    if "vmrun" not in result:
        until(int(os.environ["LAB_READY"]))
        start = int(re.search(r"KSYM (\w+) t __svm_vcpu_run", log()).group(1), 16)
        result["vmrun"] = start + bytes(gdb.selected_inferior().read_memory(start, 0x200)).index(VMRUN)
        result["vmcb"], result["thread"] = {}, {}
        vmruns(result, "a0", "a1")
    point = os.environ["LAB_POINT"]
    for _ in range(TRIES):
        if point == "one":
            until(truth("a1_loop"), 2)
            if rip_of(1) >> 47:
                break
        elif point == "both":
            until(truth("a0_loop"), 1)
            if guest_of(rip_of(2)) == "a1":
                break
        else:
            vmruns(result, "b0", "l2")
            until(truth("l2_loop"), 2)
            break
    else:
        raise gdb.GdbError(f"never {point}")
    result["rip"], result["cr3"] = {}, {}
    for thread in (1, 2):
        result["rip"][thread], result["cr3"][thread] = rip_of(thread), register("cr3")
    with open(os.environ["LAB_RESULT"], "w", encoding="ascii") as file:
        json.dump(result, file)
    # Not "detach" and no plain end: both resume the machine.
    run("disconnect")


main()
