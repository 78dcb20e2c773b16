"""Which settings a stage's results depend on, and which of them two configs have otherwise."""

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
    "recovery",
    "runs",
    "placement",
    "strategy",
    "strategies",
    "offload",
    "share",
    "verify",
)
"""Settings that may change at any time: no result depends on them (on where roles lie and how they are sharded, none beyond
float tolerance). Nor does one depend on `ppo.answer_log`."""


def changes(old: RunConfig, new: RunConfig, stage: Stage, start: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that a stage's results depend on and that differ: dotted path -> both values, in the paths' order.

    start: what the stage started from, as run.json notes it; the settings of those stages count too.
    """
    found = differences(_relevant(old, stage, start), _relevant(new, stage, start))
    return dict(sorted(found.items()))


def _relevant(config: RunConfig, stage: Stage, start: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's own settings, those of the stages of this run whose models it started from, and the common ones."""
    models = {start.get("model"), *start.get("rewards", {}).values()}
    before = {other for other in STAGES if f"models/{other}" in models}
    others = {name for other in STAGES if other not in {stage, *before} for name in (other, *STAGES[other].settings)}
    elsewhere = {"start_from"} if stage == "sft" else set()
    exclude: dict[str, Any] = {"ppo": {"answer_log"}} | dict.fromkeys([*FREE, *others, *elsewhere], True)
    found = config.model_dump(mode="json", exclude=exclude)
    if config.sft and "sft" not in found and _takes_demonstrations(config, stage):
        found["sft"] = {"train": config.sft.train.model_dump(mode="json")}
    return found


def _takes_demonstrations(config: RunConfig, stage: Stage) -> bool:
    """Whether a stage takes the rows of `sft.train` where it names none of its own."""
    if stage == "rm":
        return config.rm is not None and config.rm.normalize_on is None
    return stage == "ppo" and config.ppo is not None and config.ppo.ptx is not None and config.ppo.ptx.data is None


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted path -> both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found
