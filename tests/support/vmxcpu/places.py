"""Where things lie in the model's memory: shared by the process that has the processor and by the tests that fill a VMCS for it.

Linear addresses below 1 GiB are physical addresses in every paging mode that the processor is given here.
"""

from __future__ import annotations

PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
"""4-level tables: 2 MiB pages, user, writable, the first GiB onto itself."""
VMXON, VMCS, DATA, STACK, TSS, GUEST_CODE, HOST_CODE = 0x5000, 0x6000, 0x7000, 0x9000, 0xA000, 0xB000, 0xC000
"""GUEST_CODE and HOST_CODE are filled with HLT; DATA holds pointers that the model itself uses."""
EPT_PML4, MSR_BITMAP, IO_BITMAP_A, IO_BITMAP_B, VIRTUAL_APIC, LINK = 0xE000, 0xF000, 0x10000, 0x11000, 0x12000, 0x13000
"""Pages of zeros for the controls that want an address, and an EPT PML4 that maps the first GiB onto itself."""
PAE_PDPT, PD32 = 0x14000, 0x15000
"""PAE tables (the four entries share PD) and a 32-bit page directory of 4 MiB pages."""
EPT_PDPT, EPT_PD = 0x16000, 0x17000
FREE = 0x18000
"""0x18000 to 0x1ffff: nobody's; tests put MSR lists and the like here."""
CODE_POOL, CODE_POOL_END = 0x80000, 0xA0000
"""Every distinct instruction sequence gets an address of its own here: the model keeps decoded instructions for ever."""
FIXED_PAGES = 0x20
"""Pages that are there from the start and that are put back after every case."""
