"""Live machines: the debugger port, the stubs' dialects, physical memory through them, host or guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

if TYPE_CHECKING:
    from vtdbg.targets.live import LiveMachine

__all__ = ["connect"]


def connect(source: str, fast: bool = True, symbols: "Sequence[str]" = (), thread: "Optional[int]" = None) -> "LiveMachine":
    """The live machine of "gdb:HOST:PORT"; see `live.connect`."""
    from vtdbg.targets import live

    return live.connect(source, fast, symbols, thread)
