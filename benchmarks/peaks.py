"""This process's resident memory and its peak, from the kernel."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Resident bytes."""
    return _status("VmRSS")


def highest() -> int:
    """Peak of the resident bytes since `reset`."""
    return _status("VmHWM")


def reset() -> None:
    """Reset the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
