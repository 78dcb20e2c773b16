"""What vLLM's own processes import of Troupe, by a name that no module of a user's has (see troupe.imports)."""

import troupe.imports  # noqa: F401  before any other import of ours
from workers.weight_sync.receivers import WeightVerifier

__all__ = ["WeightVerifier"]
