"""The checks of a VM entry: which one fails, all of them at once, and what the processor would report."""

from __future__ import annotations

from vtdbg.vmx.entry.predict import check_vm_entry, lint_vm_entry, predict_vm_entry

__all__ = ["check_vm_entry", "lint_vm_entry", "predict_vm_entry"]
