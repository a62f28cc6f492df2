"""Run inside gdb: takes the paused machine with one guest to the next point, and leaves it paused."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from steps import VMRUN, begin, booted, finish, physical, register, until

GUEST_CODE = 0xFFFF800000000000
IN_GUEST = GUEST_CODE + 0x91
"""An instruction after the #UD that the guest raises: the VMCB still shows that exit."""
UD, NPF, HOLE = 0x46, 0x400, 0x200000


def last_exit(result):
    """EXITCODE and EXITINFO2 of the VMCB."""
    page = physical(result["vmcb"], 0x100)
    return [int.from_bytes(page[at:at + 8], "little") for at in (0x70, 0x80)]


def main():
    result = begin()
    if "vmrun" not in result:
        result["vmrun"] = booted()
        until(result["vmrun"])
        result["vmcb"] = register("rax")
    point = os.environ["LAB_POINT"]
    while point in ("guest", "exit"):
        until(IN_GUEST)
        # A timer of the host can come between the exit for #UD and here.
        if last_exit(result)[0] == UD:
            break
    while point == "exit":
        until(result["vmrun"] + len(VMRUN))
        if last_exit(result) == [NPF, HOLE]:
            break
    result["rip"], result["cr3"] = register("rip"), register("cr3")
    finish(result)


main()
