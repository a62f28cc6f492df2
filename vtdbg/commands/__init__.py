"""The verbs.  `run_line` is all that a front end needs: words in, text and exit status out."""

from __future__ import annotations

from vtdbg.commands.run import Outcome, run_words
from vtdbg.commands.session import Session

__all__ = ["Outcome", "Session", "run_words"]
