"""Microsoft's debugger engine on Linux: dumps and a live kernel made here, dbgeng and pykd from PyPI, run by Wine."""
