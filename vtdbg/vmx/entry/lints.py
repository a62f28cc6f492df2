"""later"""
from __future__ import annotations

from typing import Tuple

from vtdbg.vmx.entry.rules import Rule

RULES: Tuple[Rule, ...] = ()
