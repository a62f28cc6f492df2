"""`!py -g -m vtdbg_windbg ...` in WinDbg, `python -m vtdbg_windbg ...` beside it."""

import sys

from vtdbg_windbg.app import main

if __name__ == "__main__":
    # In the debugger's process, whose output is no file, a SystemExit would be printed as a traceback: only a process of our own has a status.
    _status = main(sys.argv[1:])
    if _status and hasattr(sys.stdout, "fileno"):
        sys.exit(_status)
