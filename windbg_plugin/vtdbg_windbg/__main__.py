"""`!py -m vtdbg_windbg ...` in WinDbg, `python -m vtdbg_windbg ...` beside it."""

import sys

from vtdbg_windbg.app import main

if __name__ == "__main__":
    # In the debugger's process a SystemExit would be printed as a traceback: the status matters only to a process of our own.
    _status = main(sys.argv[1:])
    if _status and not hasattr(sys.stdout, "writedml"):
        sys.exit(_status)
