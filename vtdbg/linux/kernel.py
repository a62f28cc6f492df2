"""A running Linux through a debugger that has its symbols: addresses and offsets are the debugger's, memory is read through the host's own tables.

The debugger computes no value that is in memory: while the processor is in a guest its virtual reads would walk the guest's CR3.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from vtdbg.errors import MemoryUnavailable, UsageError, VtdbgError
from vtdbg.memory.base import PAGE_SIZE, PhysicalMemory
from vtdbg.memory.views import LinearMemory
from vtdbg.x86.paging import Paging

Registers = Mapping[str, Optional[int]]
Evaluate = Callable[[str], int]

PTI_USER = 1 << 12
"""With page-table isolation, bit 12 of CR3 is set while user tables are in use, which map little of the kernel (Linux, PTI_USER_PGTABLE_BIT)."""
_MASK = (1 << 64) - 1
_KERNEL_TEXT = 0xFFFFFFFF80000000
"""Where the kernel's image is mapped: physical = address - this + phys_base (Linux, __START_KERNEL_map, __phys_addr)."""
_ALIGNED, _PLACES = 2 << 20, 4096
"""The image is aligned to 2 MiB (CONFIG_PHYSICAL_ALIGN); how many places are tried where no CR3 of the host is known."""
LONGEST_LIST = 4096
MOST_NODES = 256
"""Nodes of an XArray; 4096 vCPUs, numbered one after the other, need 66."""


class NoSymbol(UsageError):
    """The debugger's symbols lack a name, a type or a member."""


class Root(NamedTuple):
    """`memory` is the kernel's linear memory, through the tables that `source` tells of."""

    memory: LinearMemory
    source: str


class Symbols:
    """What the debugger knows of the kernel, asked once."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._known: Dict[str, Optional[int]] = {}

    def get(self, expression: str) -> Optional[int]:
        """An expression that reads no memory; None where it has no value."""
        if expression not in self._known:
            try:
                self._known[expression] = self._evaluate(expression)
            except UsageError:
                self._known[expression] = None
        return self._known[expression]

    def address(self, symbol: str) -> int:
        """Raises NoSymbol."""
        found = self.get(f"&{symbol}")
        if found is None:
            raise NoSymbol(f"the debugger has no symbol {symbol}")
        return found

    def has(self, structure: str, member: str = "") -> bool:
        """Does the kernel's type exist, and have the member?"""
        return self._offset(structure, member) is not None if member else self.get(f"sizeof(struct {structure})") is not None

    def _offset(self, structure: str, member: str) -> Optional[int]:
        return self.get(f"&((struct {structure} *)0)->{member}")

    def offset(self, structure: str, member: str) -> int:
        """Raises NoSymbol, which says whether the type or the member is missing."""
        found = self._offset(structure, member)
        if found is not None:
            return found
        if not self.has(structure):
            raise NoSymbol(f"the debugger has no type `struct {structure}`: load the module's debugging information, or what `kvm symbols` makes")
        raise NoSymbol(f"struct {structure} of this kernel has no member {member}")

    def size(self, expression: str) -> Optional[int]:
        """`sizeof`; None where the type is not known."""
        return self.get(f"sizeof({expression})")


class Kernel:
    """Symbols and memory of one kernel, at one stop."""

    def __init__(self, symbols: Symbols, root: Root) -> None:
        self.symbols, self.root = symbols, root
        self._pages: Dict[int, bytes] = {}

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel address; pages are kept, for one stop.  Raises MemoryUnavailable."""
        address &= _MASK
        page, at = divmod(address, PAGE_SIZE)
        if at + size > PAGE_SIZE:
            return self.root.memory.read(address, size)
        if page not in self._pages:
            try:
                self._pages[page] = self.root.memory.read(page * PAGE_SIZE, PAGE_SIZE)
            except MemoryUnavailable:
                # For the address that was asked for, not the page's.
                return self.root.memory.read(address, size)
        return self._pages[page][at:at + size]

    def u64(self, address: int) -> int:
        """Raises MemoryUnavailable."""
        return int.from_bytes(self.read(address, 8), "little")

    def i32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little", signed=True)

    def pointer(self, base: int, structure: str, member: str) -> int:
        """A member of 8 bytes."""
        return self.u64(base + self.symbols.offset(structure, member))

    def number(self, base: int, structure: str, member: str) -> int:
        """A member that is an int."""
        return self.i32(base + self.symbols.offset(structure, member))

    def physical(self, address: int) -> Optional[int]:
        """Where a kernel address is in physical memory, without the bit that marks encrypted memory; None where it is not mapped."""
        memory = self.root.memory
        found = memory.structure.walk(memory.memory, address & _MASK).hpa
        return None if found is None else self.plain(found)

    def plain(self, address: int) -> int:
        """A physical address without the bit that marks encrypted memory (`sme_me_mask`, 0 where there is none)."""
        place = self.symbols.get("&sme_me_mask")
        try:
            return address & ~self.u64(place) if place is not None else address
        except MemoryUnavailable:
            return address

    def per_cpu(self, symbol: str, offset: int) -> int:
        """The address of a per-processor variable on the processor whose area is at `offset`."""
        return self.symbols.address(symbol) + offset & _MASK

    def offsets(self) -> List[int]:
        """`__per_cpu_offset` of each processor that can exist; [0] for a kernel for one processor."""
        table = self.symbols.get("&__per_cpu_offset")
        if table is None:
            return [0]
        count = self._processors()
        found: List[int] = []
        for number in range(count):
            value = self.u64(table + 8 * number)
            if not value or value in found:
                # Processors that cannot exist keep the number of the image's own area.
                break
            found.append(value)
        return found

    def _processors(self) -> int:
        place = self.symbols.get("&nr_cpu_ids")
        if place is not None:
            return max(1, min(self.i32(place), LONGEST_LIST))
        return min((self.symbols.size("__per_cpu_offset") or 8 * 64) // 8, LONGEST_LIST)

    def list(self, head: int) -> Iterator[int]:
        """The addresses of a list's links, without the head.  Raises UsageError where the list does not close."""
        link = self.u64(head)
        for _ in range(LONGEST_LIST):
            if link == head:
                return
            yield link
            link = self.u64(link)
        raise UsageError(f"the list at {head:#x} does not end")

    def array(self, xarray: int) -> Iterator[Tuple[int, int]]:
        """(index, pointer) of an XArray that holds pointers (Linux, Documentation/core-api/xarray.rst; include/linux/xarray.h, 6.1)."""
        entry = self.pointer(xarray, "xarray", "xa_head")
        waiting, nodes = [(0, entry, 64)], 0
        while waiting:
            index, entry, above = waiting.pop()
            if not entry:
                continue
            if entry & 3 != 2 or entry <= 4096:
                # Internal entries end in 10b; those up to 4096 are no nodes but marks (retry, zero, sibling).
                if not entry & 3:
                    yield index, entry
                continue
            node, nodes = entry - 2, nodes + 1
            shift = self.read(node + self.symbols.offset("xa_node", "shift"), 1)[0]
            if shift >= above or nodes > MOST_NODES:
                raise UsageError(f"the XArray at {xarray:#x} is no tree")
            slots = node + self.symbols.offset("xa_node", "slots")
            count = (self.symbols.size("((struct xa_node *)0)->slots") or 512) // 8
            for number in reversed(range(min(count, 64))):
                waiting.append((index + (number << shift), self.u64(slots + 8 * number), shift))


def find_root(symbols: Symbols, memory: PhysicalMemory, hosts: Sequence[Tuple[Registers, str]]) -> Optional[Root]:
    """The kernel's page tables: out of the registers that may be the host's (with a title each), else where the image says that they are.

    Nothing is believed: through the right tables `vm_list` is a list whose first link points back at it.
    """
    for registers, title in hosts:
        cr3 = registers.get("cr3")
        if cr3 is None:
            continue
        for root in dict.fromkeys((cr3, cr3 & ~PTI_USER)):
            found = _tried(symbols, memory, root, registers)
            if found is not None:
                return Root(found, title if root == cr3 else f"{title}, without the bit of the user's tables")
    return _by_image(symbols, memory)


def _tried(symbols: Symbols, memory: PhysicalMemory, cr3: int, registers: Registers) -> Optional[LinearMemory]:
    try:
        paging = Paging.from_registers(registers.get("cr0"), cr3, registers.get("cr4"), registers.get("efer"), long_mode=True)
        linear = LinearMemory(memory, paging)
        head = symbols.address("vm_list")
        first = int.from_bytes(linear.read(head, 8), "little")
        return linear if int.from_bytes(linear.read(first + 8 & _MASK, 8), "little") == head else None
    except (VtdbgError, ValueError):
        return None


def _by_image(symbols: Symbols, memory: PhysicalMemory) -> Optional[Root]:
    """`init_top_pgt`, whose physical address follows from `phys_base`, which is found where it says itself that it is."""
    base, tables = symbols.get("&phys_base"), symbols.get("&init_top_pgt")
    if base is None or tables is None:
        return None
    for number in range(_PLACES):
        # The image is moved by multiples of 2 MiB in both spaces, independently: phys_base can be below 0.
        at = base % _ALIGNED + number * _ALIGNED
        shift = at - (base - _KERNEL_TEXT)
        try:
            if int.from_bytes(memory.read(at, 8), "little") != shift & _MASK:
                continue
        except MemoryUnavailable:
            continue
        physical = tables - _KERNEL_TEXT + shift
        for la57 in (0, 1 << 12):
            found = _tried(symbols, memory, physical & _MASK, {"cr0": 1 << 31, "cr4": 1 << 5 | la57, "efer": 0xD00})
            if found is not None:
                return Root(found, f"init_top_pgt at {physical:#x}")
    return None
