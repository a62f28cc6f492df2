"""`vtdbg gdb [arguments of gdb]`: a gdb with the commands loaded."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Dict, List, Sequence

import vtdbg


def plugin_file() -> str:
    """The file that GDB sources: beside `vtdbg` when installed, in gdb_plugin in a checkout; empty where it is missing."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(vtdbg.__file__)))
    for folder in (os.path.join(home, "gdb_plugin"), home):
        found = os.path.join(folder, "vtdbg_gdb", "__init__.py")
        if os.path.exists(found):
            return found
    return ""


def gdb_environment() -> Dict[str, str]:
    """The environment in which the Python inside GDB finds what this Python finds."""
    import tabulate

    site = os.path.dirname(os.path.abspath(tabulate.__file__))
    # A module up to version 0.9, a package since.
    if hasattr(tabulate, "__path__"):
        site = os.path.dirname(site)
    return {**os.environ, "VTDBG_SITE": site}


def gdb_arguments(arguments: Sequence[str]) -> List[str]:
    """The command line of gdb.  Raises FileNotFoundError where there is no gdb or no plugin."""
    gdb = os.environ.get("VTDBG_GDB", "gdb")
    plugin = plugin_file()
    if shutil.which(gdb) is None:
        raise FileNotFoundError(f"{gdb} is not installed (VTDBG_GDB names another one)")
    if not plugin:
        raise FileNotFoundError("the plugin vtdbg_gdb is missing beside vtdbg: install vtdbg again")
    # Before what the user gives, so that -ex commands of theirs can use it.
    return [gdb, "-iex", f"source {plugin}", *arguments]


def start_gdb(arguments: Sequence[str]) -> int:
    """Becomes gdb; returns an exit status only where that fails."""
    try:
        command = gdb_arguments(arguments)
        os.execvpe(command[0], command, gdb_environment())
    except OSError as error:
        print(f"vtdbg: gdb: {error}", file=sys.stderr)
    return 2
