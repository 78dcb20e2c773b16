"""What `strategy: auto` becomes: the fastest strategy that fits by prediction. Pure: settings and a cluster in, settings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from configs import ZERO
from configs.schema import ROLES, Role, RunConfig, Strategy
from placement.cluster.spec import Cluster
from placement.memory.estimate import estimate_memory
from placement.models.shapes import NO_MODELS, read_shapes
from placement.plan.auto_dtype import with_dtype
from placement.plan.planner import make_plan
from placement.stages import STAGES
from placement.types import Device, PlanError, Problem, Stage

FASTEST_FIRST = tuple(ZERO)
"""Strategies from the fastest to the slowest: ZeRO stages by their communication, then offload to the host, then NVMe."""


def is_usable(strategy: Strategy, config: RunConfig, device: Device) -> bool:
    """Whether a strategy works for all roles: offload to the host needs a GPU, NVMe its folder; `shared_base` and `quantize` need
    unsharded parameters; an optimizer in bfloat16 cannot be offloaded."""
    zero = ZERO[strategy]
    place_exists = {"device": True, "host": device == "cuda", "nvme": config.offload.nvme_path is not None}[
        zero.optimizer
    ]
    whole = bool(config.shared_base) or bool(config.model.quantize)
    narrow = any(model.optimizer_dtype == "bfloat16" for _, _, model in config.trained_models())
    return place_exists and not (whole and zero.stage == 3) and (zero.bfloat16_optimizer or not narrow)


def auto_roles(config: RunConfig) -> tuple[Role, ...]:
    """The roles whose strategy is auto."""
    return tuple(role for role in ROLES if role != "rollout" and config.strategy_of(role) == "auto")


def with_ddp_for_auto(config: RunConfig) -> RunConfig:
    """The settings with ddp instead of each `auto`. Enough to check the placement, which does not depend on the choice."""
    return _with(config, dict.fromkeys(auto_roles(config), "ddp"))


def resolve(
    config: RunConfig, stages: Sequence[Stage], cluster: Cluster, reused: Mapping[Stage, Path] = NO_MODELS
) -> RunConfig:
    """The settings with a strategy instead of each `auto`: the fastest with which all stages fit; then, for single roles,
    a faster one that still fits. Where none fits, the one that misses the fewest bytes. reused: see read_shapes.

    Raises:
        PlanError: a stage cannot be placed, or memory cannot be predicted.
    """
    roles = auto_roles(config)
    if not roles:
        return config
    plans = [make_plan(with_ddp_for_auto(config), stage, cluster, reused) for stage in stages]
    try:
        shapes = [read_shapes(config, plan.stage, reused) for plan in plans]
    except ValueError as error:
        text = f"auto needs predicted memory, but {error}; name a strategy"
        raise PlanError(stages[0], [Problem("strategy", text)]) from None

    def missing(chosen: dict[Role, Strategy]) -> int:
        changed = _with(config, chosen)
        estimates = [estimate_memory(changed, plan, shape) for plan, shape in zip(plans, shapes, strict=True)]
        if any(place.size is None for memory in estimates for place in memory.places):
            text = "auto needs the memory size of every device, and some are not known; name a strategy"
            raise PlanError(stages[0], [Problem("strategy", text)])
        return sum(memory.missing for memory in estimates)

    usable = [strategy for strategy in FASTEST_FIRST if is_usable(strategy, config, plans[0].device)]
    missing_bytes = {strategy: missing(dict.fromkeys(roles, strategy)) for strategy in usable}
    best = min(usable, key=lambda strategy: (missing_bytes[strategy], usable.index(strategy)))
    chosen: dict[Role, Strategy] = dict.fromkeys(roles, best)
    trained = {role for stage in stages for role in STAGES[stage].trained}
    for role in roles:
        for faster in usable[: usable.index(best)]:
            trial = chosen | {role: faster}
            if role in trained and missing(trial) <= missing_bytes[best]:
                chosen = trial
                break
    return _with(config, chosen)


def keep_resolved(config: RunConfig, old: RunConfig) -> RunConfig:
    """The settings with the values that a run has started with (`old`) instead of each `auto`."""
    rm_dtype = old.rm.model.dtype if old.rm and old.rm.model else None
    config = with_dtype(config, old.model.dtype, rm_dtype)
    return _with(config, {role: old.strategy_of(role) for role in auto_roles(config)})


def _with(config: RunConfig, chosen: dict[Role, Strategy]) -> RunConfig:
    """The settings with the chosen strategies; one common `strategy` where all roles have the same."""
    if not chosen:
        return config
    strategies = {role: config.strategy_of(role) for role in ROLES if role != "rollout"} | chosen
    common = next(iter(strategies.values()))
    if len(set(strategies.values())) == 1:
        return config.model_copy(update={"strategy": common, "strategies": {}})
    rest = strategies["actor"]
    others = {role: strategy for role, strategy in strategies.items() if strategy != rest}
    return config.model_copy(update={"strategy": rest, "strategies": others})
