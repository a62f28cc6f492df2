"""Physical memory: the protocol (`base`), the readers of dump files (one module a format) and `open.open_machine`, which picks one."""
