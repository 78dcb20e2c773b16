"""Troupe's import for vLLM's own processes, under a name that no user module has (see troupe.imports)."""

import troupe.imports  # noqa: F401  before any other import of ours
from workers.weight_sync.receivers import WeightVerifier

__all__ = ["WeightVerifier"]
