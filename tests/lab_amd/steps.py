"""What both stages do inside gdb: reach an instruction, look at the stopped machine, say where it got to, and leave it paused.

LAB_PORT, LAB_POINT, LAB_READY, LAB_LOG and LAB_RESULT tell them which machine and what is wanted.
"""

import json
import os
import re

import gdb

VMRUN = b"\x0f\x01\xd8"


def run(command):
    return gdb.execute(command, to_string=True)


def register(name):
    return int(gdb.parse_and_eval("$" + name)) & (1 << 64) - 1


def log():
    with open(os.environ["LAB_LOG"], encoding="ascii", errors="replace") as file:
        return file.read()


def until(address, thread=None, tries=1):
    """Runs until an instruction at `address` is reached, on `thread` where that is given; `tries` stops may be elsewhere."""
    run("delete")
    run(f"hbreak *{address:#x}")
    for _ in range(tries):
        run("continue")
        if register("rip") == address and thread in (None, gdb.selected_thread().num):
            run("delete")
            return
    raise gdb.GdbError(f"stopped at {register('rip'):#x}, not at {address:#x}")


def physical(address, size):
    run("maintenance packet Qqemu.PhyMemMode:1")
    try:
        return bytes(gdb.selected_inferior().read_memory(address, size))
    finally:
        run("maintenance packet Qqemu.PhyMemMode:0")


def begin():
    """Connected; what the stages before have found."""
    run("set pagination off")
    run("set confirm off")
    run("target remote 127.0.0.1:" + os.environ["LAB_PORT"])
    return json.loads(os.environ["LAB_RESULT_SO_FAR"])


def booted(tries=1):
    """KVM is there and its guests are about to run: the address of its VMRUN instruction."""
    until(int(os.environ["LAB_READY"]), tries=tries)
    start = int(re.search(r"KSYM (\w+) t __svm_vcpu_run", log()).group(1), 16)
    return start + bytes(gdb.selected_inferior().read_memory(start, 0x200)).index(VMRUN)


def finish(result):
    with open(os.environ["LAB_RESULT"], "w", encoding="ascii") as file:
        json.dump(result, file)
    # Not "detach" and no plain end: both resume the machine.
    run("disconnect")
