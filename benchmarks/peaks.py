"""What the kernel tells of this process's memory, its peak among it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Bytes that are resident now."""
    return _status("VmRSS")


def highest() -> int:
    """The most bytes that were resident since `begin_anew`."""
    return _status("VmHWM")


def begin_anew() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
