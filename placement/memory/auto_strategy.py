"""What `strategy: auto` becomes: the fastest that fits, by the plan. Pure: settings and a cluster in, settings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.schema import ROLES, Role, RunConfig, Strategy
from configs.zero import ZERO
from placement.cluster.spec import Cluster
from placement.memory.estimate import estimate_memory
from placement.models.shapes import NOTHING, read_shapes
from placement.plan.auto_dtype import with_dtype
from placement.plan.planner import make_plan
from placement.types import TRAINED, Device, PlanError, Problem, Stage

COSTLIER = tuple(ZERO)
"""From the fastest to the slowest: ZeRO's stages by what they communicate, then states that cross to the host, then NVMe."""


def offers(strategy: Strategy, config: RunConfig, device: Device) -> bool:
    """Whether a strategy can serve all roles. On CPU the host's memory is the device's; NVMe needs its folder; `share` keeps a
    base whole; an optimizer in bfloat16 is not offloaded."""
    zero = ZERO[strategy]
    able = {"device": True, "host": device == "cuda", "nvme": config.offload.nvme_path is not None}[zero.optimizer]
    whole = bool(config.share) or bool(config.model.quantize)
    narrow = any(model.optimizer_dtype == "bfloat16" for _, _, model in config.learners())
    return able and not (whole and zero.stage == 3) and (zero.bfloat16_optimizer or not narrow)


def automatic(config: RunConfig) -> tuple[Role, ...]:
    """The roles whose strategy is to be chosen."""
    return tuple(role for role in ROLES if role != "rollout" and config.strategy_of(role) == "auto")


def undecided_as_ddp(config: RunConfig) -> RunConfig:
    """The settings with ddp in place of each `auto`: whether a stage can be placed does not depend on what it becomes."""
    return _with(config, dict.fromkeys(automatic(config), "ddp"))


def resolve(
    config: RunConfig, stages: Sequence[Stage], cluster: Cluster, taken: Mapping[Stage, Path] = NOTHING
) -> RunConfig:
    """The settings with a strategy in place of each `auto`: the first, from the fastest on, with which all stages fit; then for
    single roles faster ones that still do. Where none fits, that of which the least is missing. taken: see read_shapes.

    Raises:
        PlanError: a stage cannot be placed, or memory cannot be predicted.
    """
    roles = automatic(config)
    if not roles:
        return config
    plans = [make_plan(undecided_as_ddp(config), stage, cluster, taken) for stage in stages]
    try:
        known = [(plan, read_shapes(config, plan.stage, taken)) for plan in plans]
    except ValueError as error:
        text = f"auto needs memory to be predicted, and {error}; name a strategy"
        raise PlanError(stages[0], [Problem("strategy", text)]) from None

    def missing(chosen: dict[Role, Strategy]) -> int:
        found = [estimate_memory(_with(config, chosen), plan, shapes) for plan, shapes in known]
        if any(place.size is None for memory in found for place in memory.places):
            text = "auto needs the size of the memory, which is not known of every device; name a strategy"
            raise PlanError(stages[0], [Problem("strategy", text)])
        return sum(memory.missing for memory in found)

    offered = [strategy for strategy in COSTLIER if offers(strategy, config, plans[0].device)]
    lacks = {strategy: missing(dict.fromkeys(roles, strategy)) for strategy in offered}
    best = min(offered, key=lambda strategy: (lacks[strategy], offered.index(strategy)))
    chosen: dict[Role, Strategy] = dict.fromkeys(roles, best)
    learning = {role for stage in stages for role in TRAINED[stage]}
    for role in roles:
        for faster in offered[: offered.index(best)]:
            trial = chosen | {role: faster}
            if role in learning and missing(trial) <= lacks[best]:
                chosen = trial
                break
    return _with(config, chosen)


def kept(config: RunConfig, old: RunConfig) -> RunConfig:
    """The settings with what a run has begun with in place of each `auto`."""
    own = old.rm.model.dtype if old.rm and old.rm.model else None
    config = with_dtype(config, old.model.dtype, own)
    return _with(config, {role: old.strategy_of(role) for role in automatic(config)})


def _with(config: RunConfig, chosen: dict[Role, Strategy]) -> RunConfig:
    """As one setting where all roles are alike."""
    if not chosen:
        return config
    strategies = {role: config.strategy_of(role) for role in ROLES if role != "rollout"} | chosen
    common = next(iter(strategies.values()))
    if len(set(strategies.values())) == 1:
        return config.model_copy(update={"strategy": common, "strategies": {}})
    rest = strategies["actor"]
    others = {role: strategy for role, strategy in strategies.items() if strategy != rest}
    return config.model_copy(update={"strategy": rest, "strategies": others})
