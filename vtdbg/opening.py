"""`vtdbg.open`: whatever a command's --source takes, as a Machine."""

from __future__ import annotations

import os
from typing import Optional

from vtdbg.errors import UsageError
from vtdbg.machine import Machine

LIVE, SAMPLE = "gdb:", "sample:"


def open_source(source: "str | os.PathLike[str]", format: Optional[str] = None) -> Machine:
    """A dump by its path, a live target by "gdb:HOST:PORT", or a packaged sample by "sample:NAME": memory, processors, and in `warnings` what a
    reader has to know.

    A dump's format is recognised by content; `format` forces one (`vtdbg.memory.open.formats()` names them).  A live target is looked at
    through a gdb of its own, which is paused there and stays paused.  `machine.memory.close()` lets go of either (or `with machine.memory:`).

    Raises FormatError where a dump cannot be read, TargetError where nothing answers at HOST:PORT, UsageError where the source is written wrong.
    A file whose name begins with "gdb:" is opened as "./gdb:...".
    """
    name = os.fspath(source)
    if name.startswith((LIVE, SAMPLE)):
        if format is not None:
            raise UsageError(f"{name}: a format ({format!r}) is for dump files")
        if name.startswith(LIVE):
            from vtdbg.targets import connect

            return connect(name)
        from vtdbg.samples import open_sample

        return open_sample(name[len(SAMPLE):])
    from vtdbg.memory.open import open_machine

    return open_machine(source, format)
