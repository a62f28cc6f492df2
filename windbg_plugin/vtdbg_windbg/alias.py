"""The words of an alias: with the bare pykd.pyd `!py` passes a script empty strings, but the engine keeps `$$>a<` arguments as aliases."""

from __future__ import annotations

import re
from typing import List

_ARGUMENT = re.compile(r"^ *\$arg([1-9][0-9]*) +(.*?) *$", re.MULTILINE)


def words_of(listing: str) -> List[str]:
    """$arg1, $arg2, ... out of what the command `al` prints; it lists them in the order of the alphabet."""
    found = {int(number): word for number, word in _ARGUMENT.findall(listing)}
    return [found[number] for number in sorted(found)]


def run() -> None:
    """What the script of `vtdbg windbg` calls."""
    import pykd  # type: ignore[import-not-found]

    from vtdbg_windbg.app import main

    main(words_of(pykd.dbgCommand("al") or ""))
