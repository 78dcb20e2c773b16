"""Troupe's public face: what `orchestrator` offers, under one name. Importing it imports nothing heavy.

import troupe
config = troupe.load_config("configs/movies/tiny.yaml", ["name=mine"])
result = troupe.run_stages(config)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import troupe.imports  # noqa: F401  before any other import of ours


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(import_module("orchestrator"), name)


def __dir__() -> list[str]:
    return sorted(import_module("orchestrator").__all__)
