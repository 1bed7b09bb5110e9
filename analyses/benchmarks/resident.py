"""The resident memory of this process, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str = "VmRSS") -> int:
    """Bytes that are resident now (VmRSS), or at most since `highest` began (VmHWM)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def highest(run: Callable[[], Any]) -> int:
    """By how many bytes the process grows at most while this runs."""
    before = resident()
    _RESET.write_text("5")
    result = run()
    grown = resident("VmHWM") - before
    del result
    return grown
