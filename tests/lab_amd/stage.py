"""Run inside gdb: takes the paused machine to the next point, and leaves it paused.  LAB_PORT, LAB_POINT, LAB_READY, LAB_LOG, LAB_RESULT."""

import json
import os
import re

import gdb

GUEST_CODE = 0xFFFF800000000000
IN_GUEST = GUEST_CODE + 0x91
"""An instruction after the #UD that the guest raises: the VMCB still shows that exit."""
VMRUN = b"\x0f\x01\xd8"
NPF, HOLE = 0x400, 0x200000


def run(command):
    return gdb.execute(command, to_string=True)


def register(name):
    return int(gdb.parse_and_eval("$" + name)) & (1 << 64) - 1


def until(address):
    run("delete")
    run(f"hbreak *{address:#x}")
    run("continue")
    if register("rip") != address:
        raise gdb.GdbError(f"stopped at {register('rip'):#x}, not at {address:#x}")
    run("delete")


def physical(address, size):
    run("maintenance packet Qqemu.PhyMemMode:1")
    try:
        return bytes(gdb.selected_inferior().read_memory(address, size))
    finally:
        run("maintenance packet Qqemu.PhyMemMode:0")


def main():
    run("set pagination off")
    run("set confirm off")
    run("target remote 127.0.0.1:" + os.environ["LAB_PORT"])
    result = json.loads(os.environ["LAB_RESULT_SO_FAR"])
    if "vmrun" not in result:
        until(int(os.environ["LAB_READY"]))
        with open(os.environ["LAB_LOG"], encoding="ascii", errors="replace") as file:
            symbol = re.search(r"KSYM (\w+) t __svm_vcpu_run", file.read())
        start = int(symbol.group(1), 16)
        result["vmrun"] = start + bytes(gdb.selected_inferior().read_memory(start, 0x200)).index(VMRUN)
        until(result["vmrun"])
        result["vmcb"] = register("rax")
    point = os.environ["LAB_POINT"]
    if point in ("guest", "exit"):
        until(IN_GUEST)
    while point == "exit":
        until(result["vmrun"] + len(VMRUN))
        page = physical(result["vmcb"], 0x100)
        code, address = (int.from_bytes(page[at:at + 8], "little") for at in (0x70, 0x80))
        if (code, address) == (NPF, HOLE):
            break
    result["rip"], result["cr3"] = register("rip"), register("cr3")
    with open(os.environ["LAB_RESULT"], "w", encoding="ascii") as file:
        json.dump(result, file)
    # Not "detach" and no plain end: both resume the machine.
    run("disconnect")


main()
