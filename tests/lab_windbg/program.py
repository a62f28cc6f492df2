"""Runs in Windows' Python: program.py MODULE WORDS...: as `python -m MODULE WORDS...` would, and leaves without unloading the engine."""

import importlib
import os
import sys

if __name__ == "__main__":
    module = {"vtdbg": "vtdbg.cli", "vtdbg_windbg": "vtdbg_windbg.app"}[sys.argv[1]]
    status = importlib.import_module(module).main(sys.argv[2:])
    print(f"status {status}", flush=True)
    os._exit(0)
