"""vtdbg in WinDbg: a kernel session or crash dump through the debugger engine, output that can be clicked through.  See docs/windbg.md."""
