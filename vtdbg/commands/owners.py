"""Two columns for a list of control blocks of a live target: which processor runs or ran it, and whose it is by KVM's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Tuple

from vtdbg.report import Value, text

if TYPE_CHECKING:
    from vtdbg.commands.session import Session
    from vtdbg.targets.processors import Seen


class Columns(NamedTuple):
    """`heads` for a Table, and the cells of a control block; both empty where nothing is known."""

    heads: Tuple[Tuple[str, str], ...]
    cells: Callable[[int], List[Value]]


def owner_columns(session: "Session") -> Columns:
    """The columns that the target can fill: none for a dump, the second one only with KVM's symbols."""
    machine = session.machine
    if not machine.live:
        # Before the import: a list of a dump's control blocks is what a cold process is asked first.
        return Columns((), lambda _: [])
    from vtdbg.targets.live import LiveMachine

    if not isinstance(machine, LiveMachine):
        return Columns((), lambda _: [])
    running: Dict[int, List[Value]] = {}
    for seen in machine.processors.unasked():
        for address, cell in _of(seen):
            running.setdefault(address, []).append(cell)
    symbols = machine.kvm() is not None
    heads = (("processor", "processor"),) * bool(running) + (("owner", "whose"),) * symbols

    def cells(address: int) -> List[Value]:
        found = running.get(address, [])
        first = Value([cell.data for cell in found], ", ".join(cell.text for cell in found), found[0].style if found else "")
        return [first] * bool(running) + [text(machine.owner(address))] * symbols

    return Columns(heads, cells)


def _of(seen: "Seen") -> List[Tuple[int, Value]]:
    """What the processor has to do with which control blocks."""
    where = seen.where
    if where.mode == "guest" and where.block is not None:
        return [(where.block.address, Value({"number": seen.number, "state": "guest"}, f"{seen.number} in guest", "strong"))]
    if where.candidates:
        data = {"number": seen.number, "state": "one of"}
        return [(block.address, Value(data, f"{seen.number} in one of several", "warn")) for block in where.candidates]
    current = seen.current
    if current is not None and seen.cpu is not None and seen.cpu.running:
        return [(current.address, Value({"number": seen.number, "state": "loaded"}, f"{seen.number} loaded"))]
    if where.block is not None:
        return [(where.block.address, Value({"number": seen.number, "state": "last"}, f"{seen.number} last"))]
    return []
