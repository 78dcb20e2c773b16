"""Settings that a stage's results depend on, and their differences between two configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs import RunConfig
from placement.stages import STAGES
from placement.types import Stage

FREE = (
    "name",
    "cluster",
    "checkpoint",
    "deadlines",
    "loggers",
    "recovery",
    "runs",
    "placement",
    "strategy",
    "strategies",
    "offload",
    "shared_base",
    "verify",
)
"""Settings that may change at any time: no result depends on them (placement and sharding change results within float
tolerance only). `ppo.answer_log` may change too."""


def changes(old: RunConfig, new: RunConfig, stage: Stage, start: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and affect a stage's results: dotted path -> (old, new), sorted by path.

    start: the models that the stage started from, as in run.json; the settings of the stages that trained them count too.
    """
    changed = differences(_relevant(old, stage, start), _relevant(new, stage, start))
    return dict(sorted(changed.items()))


def _relevant(config: RunConfig, stage: Stage, start: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's own settings, those of the stages of this run whose models it started from, and the common settings."""
    models = {start.get("model"), *start.get("rewards", {}).values()}
    before = {other for other in STAGES if f"models/{other}" in models}
    others = {name for other in STAGES if other not in {stage, *before} for name in (other, *STAGES[other].settings)}
    unused = {"start_from"} if stage == "sft" else set()
    exclude: dict[str, Any] = {"ppo": {"answer_log"}} | dict.fromkeys([*FREE, *others, *unused], True)
    settings = config.model_dump(mode="json", exclude=exclude)
    if config.sft and "sft" not in settings and _uses_demonstrations(config, stage):
        settings["sft"] = {"train": config.sft.train.model_dump(mode="json")}
    return settings


def _uses_demonstrations(config: RunConfig, stage: Stage) -> bool:
    """Whether a stage uses the rows of `sft.train`, as the default of a setting of its own."""
    if stage == "rm":
        return config.rm is not None and config.rm.normalize_on is None
    return stage == "ppo" and config.ppo is not None and config.ppo.ptx is not None and config.ppo.ptx.data is None


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted path -> (old, new)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed[f"{prefix}{key}"] = (a, b)
    return changed
