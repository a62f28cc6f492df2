"""`report`: one HTML page of everything that the other commands say of a dump or target, with pictures of its address spaces and MSR bitmaps."""

from __future__ import annotations

import os
import tempfile

from vtdbg.commands.registry import Arg, Opt, verb
from vtdbg.commands.report_page import MOST_BLOCKS, ReportPage
from vtdbg.commands.session import Session
from vtdbg.errors import FormatError, UsageError
from vtdbg.numbers import size_text
from vtdbg.report import FINDINGS, FINE, Pairs, Report, Value

FIRST_LINE = b"<!doctype html>"


@verb(
    "report",
    "one HTML page of it all: VMs, checks, exits, address spaces, MSR bitmaps",
    Arg("out", "path", "file to write (.html); an existing file is replaced only if it is a page of this kind"),
    Opt("--limit", "int", "at most this many control blocks in full", default=MOST_BLOCKS),
)
def report(session: Session, out: str, limit: int) -> Report:
    """The page needs no network and no other file, and can be read without a mouse, in light, dark and on paper."""
    if limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 control block")
    made = ReportPage(session, limit)
    content = made.render()
    write(out, content)
    facts = Pairs("report")
    facts.add("file", "written", out)
    facts.add("bytes", "size", Value(len(content), f"less than {size_text(1 << len(content).bit_length())}"))
    facts.add("blocks", "control blocks", Value(made.shown, str(made.shown) + (f" of {made.total}" if made.total > made.shown else "")))
    facts.add("maps", "address spaces", str(len(made.maps)))
    facts.add("msrs", "MSR bitmaps", str(len(made.msrs)))
    facts.add("failing", "blocks with failures", Value(made.failing, str(made.failing), "bad" if made.failing else "good"))
    return Report("report", [facts], session.header(), list(session.machine.warnings), FINDINGS if made.failing else FINE,
                  ["from vtdbg.commands.report import write", "from vtdbg.commands.report_page import ReportPage",
                   "from vtdbg.commands.session import Session", f"session = Session({session.source!r}, {session.format!r})",
                   f"write({out!r}, ReportPage(session, {limit}).render())"])


def write(path: str, content: bytes) -> None:
    """The whole file or nothing; a file that is no such page is not replaced: a dump whose name stands where OUT belongs has to survive."""
    try:
        if os.path.exists(path):
            with open(path, "rb") as existing:
                if existing.read(len(FIRST_LINE)).lower() not in (FIRST_LINE, b""):
                    raise UsageError(f"{path} exists and is no HTML page: it is not replaced; name another file (the source goes after -s)")
        folder = os.path.dirname(os.path.abspath(path))
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".vtdbg-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise FormatError(path, f"cannot be written: {error.strerror or error}") from error
