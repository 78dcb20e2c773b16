"""How long a call to a worker may take: as the config says, or in proportion to what the same call took before."""

from __future__ import annotations

import time
from typing import Literal, get_args

from configs.schema import DeadlineSettings

Phase = Literal["start", "generate", "score", "train", "publish", "save"]

PHASES: dict[str, Phase] = {
    **dict.fromkeys(("whereabouts", "address", "join", "load", "connect", "add_rows"), "start"),
    "generate": "generate",
    **dict.fromkeys(("log_probs", "values", "scores", "texts", "memory"), "score"),
    **dict.fromkeys(("publish", "probe", "prove"), "publish"),
    **dict.fromkeys(("save", "restore", "snapshot", "restore_snapshot", "export"), "save"),
}
"""Method of a worker -> phase; every other method trains."""


def phase_of(method: str) -> Phase:
    return PHASES.get(method, "train")


class Deadlines:
    """The deadlines of a team's calls. A call that has been made before gets `patience` times the longest that it took so
    far per token, and `least` seconds at least; a first call gets `first`. A phase that the config names gets what it says."""

    def __init__(self, settings: DeadlineSettings) -> None:
        self._settings = settings
        self._slowest: dict[str, float] = {}

    def seconds(self, method: str, work: float) -> float:
        """Seconds for a call on `work` tokens (1 where tokens say nothing)."""
        phase, settings = phase_of(method), self._settings
        if fixed := getattr(settings, phase):
            return float(fixed)
        if method not in self._slowest:
            return settings.first
        return max(settings.least, settings.patience * self._slowest[method] * work)

    def observe(self, method: str, work: float, began: float) -> None:
        """Note a call that began at `began` (time.monotonic) and has ended well."""
        self._slowest[method] = max(self._slowest.get(method, 0.0), (time.monotonic() - began) / work)

    def setting(self, method: str) -> str:
        """Dotted path of the setting that bounds a call."""
        phase = phase_of(method)
        return f"deadlines.{phase}" if getattr(self._settings, phase) else "deadlines.first, .least and .patience"


assert set(get_args(Phase)) <= set(DeadlineSettings.model_fields)
