"""Run inside gdb: takes the machine with two processors to the next point, and leaves it paused."""

import os
import re
import sys

import gdb

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from steps import begin, booted, finish, log, physical, register, run, until

TRIES = 40


def truth(name):
    return int(re.search(rf"\b{name}=(0x[0-9a-f]+|\d+)", log()).group(1), 0)


def rip_of(thread):
    run(f"thread {thread}")
    return register("rip")


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
    result = begin()
    if "vmrun" not in result:
        result["vmrun"] = booted(TRIES)
        result["vmcb"], result["thread"] = {}, {}
        vmruns(result, "a0", "a1", "b0")
    point = os.environ["LAB_POINT"]
    for _ in range(TRIES):
        if point == "one":
            until(truth("a1_loop"), 2, TRIES)
            if rip_of(1) >> 47:
                break
        elif point == "both":
            until(truth("a0_loop"), 1, TRIES)
            if guest_of(rip_of(2)) == "a1":
                break
        else:
            vmruns(result, "l2")
            until(truth("l2_loop"), 2, TRIES)
            if guest_of(rip_of(1)) != "a0":
                until(truth("a0_loop"), 1, TRIES)
            if [guest_of(rip_of(thread)) for thread in (1, 2)] == ["a0", "l2"]:
                break
    else:
        raise gdb.GdbError(f"never {point}")
    result["rip"], result["cr3"] = {}, {}
    for thread in (1, 2):
        result["rip"][thread], result["cr3"][thread] = rip_of(thread), register("cr3")
    finish(result)


main()
