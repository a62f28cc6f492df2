"""A real hypervisor for the live tests: Debian's kernel with its own kvm-amd on QEMU's emulated SVM, run to a chosen point and paused.

    build.py      the kernel (apt-get download), the small VMM (gcc) and the initial RAM disk, made once into a cache directory
    machine.py    `Lab`: one QEMU on loopback, advanced by a real gdb from point to point; ended by its pid
    stage.py      what that gdb runs
    smp.c, init_smp, stage_smp.py   the same for two processors, two VMs and a nested guest
    vmm.c, init   the VMM, which prints where its guest's memory is (TRUTH lines, from the kernel's pagemap), and the first process
"""

from .build import Unavailable
from .machine import BareQemu, Lab, Smp

__all__ = ["BareQemu", "Lab", "Smp", "Unavailable"]
