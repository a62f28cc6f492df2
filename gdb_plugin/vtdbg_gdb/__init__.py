"""vtdbg in GDB: `source .../vtdbg_gdb/__init__.py`, or `vtdbg gdb [arguments of gdb]`.  See docs/gdb.md.

Nothing is installed and the target is not touched when this is sourced.
"""

from __future__ import annotations

import glob
import os
import sys

MISSING = ("vtdbg: the Python inside GDB ({version}) cannot import {name}: start GDB by `vtdbg gdb`, or install vtdbg's dependencies where that "
           "Python finds them (python{version} -m pip install tabulate capstone)")


def _search_path() -> None:
    """Where `vtdbg` and this package are: beside each other when installed, two levels up in a checkout."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = [here] if os.path.isdir(os.path.join(here, "vtdbg")) else [os.path.dirname(here), here]
    sys.path[:0] = [place for place in places if place not in sys.path]
    # Behind everything else: an environment made for another Python version serves with its pure modules only.
    last = os.environ.get("VTDBG_SITE", "").split(os.pathsep)
    last += sorted(glob.glob(os.path.join(places[0], ".venv", "lib", "python3*", "site-packages")))
    sys.path.extend(place for place in last if place and place not in sys.path)


def load() -> bool:
    """Registers the commands and functions in the GDB that this runs in; False, and one line that says why, where that cannot be."""
    import gdb

    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < (3, 9):  # noqa: UP036  # whatever Python this GDB was built with
        gdb.write(f"vtdbg: the Python inside GDB is {version}; 3.9 or newer is needed\n", gdb.STDERR)
        return False
    _search_path()
    import importlib.util

    for name in ("vtdbg", "tabulate"):
        if importlib.util.find_spec(name) is None:
            gdb.write(MISSING.format(version=version, name=name) + "\n", gdb.STDERR)
            return False
    from vtdbg_gdb import plugin

    plugin.register()
    return True


if __name__ == "__main__":
    load()
