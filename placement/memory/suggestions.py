"""A plan with its predicted memory and, where it does not fit, the settings that would help, each tried by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from configs.schema import LoraSettings, RunConfig, Strategy
from placement.memory.auto_strategy import COSTLIER, offers
from placement.memory.estimate import MemoryEstimate, estimate_memory
from placement.models.shapes import NOTHING, Shapes, longest_row, model_settings, read_shapes
from placement.types import GIB, TRAINED, Plan, Stage


@dataclass(frozen=True)
class PlanReport:
    """A plan and its predicted memory."""

    plan: Plan
    memory: MemoryEstimate | str
    """Why there is no prediction, where there is none."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.plan.as_dict() | {"memory": self.memory if isinstance(self.memory, str) else self.memory.as_dict()}


def with_memory(config: RunConfig, plan: Plan, taken: Mapping[Stage, Path] = NOTHING) -> PlanReport:
    """The plan with its predicted memory, or with the reason why there is none. taken: see read_shapes."""
    try:
        shapes = read_shapes(config, plan.stage, taken)
    except ValueError as error:
        return PlanReport(plan, f"not predicted: {error}")
    made = estimate_memory(config, plan, shapes)
    if made.missing:
        made = replace(made, advice=_advice(config, plan, shapes, made))
    return PlanReport(plan, made)


class Change(NamedTuple):
    """A setting, its new value, and the run's settings with it."""

    setting: str
    value: str
    apply: Callable[[RunConfig], RunConfig]


def _advice(config: RunConfig, plan: Plan, shapes: Shapes, made: MemoryEstimate) -> tuple[str, ...]:
    """The settings that alone would let it fit, in order of cost; where none does, the first that do together."""

    def missing(changed: RunConfig) -> int:
        return estimate_memory(changed, plan, shapes).missing

    alone: dict[str, str] = {}
    for change in _changes(config, plan):
        if change.setting not in alone and not missing(change.apply(config)):
            alone[change.setting] = change.value
    if alone:
        return tuple(f"{setting}={value} would fit" for setting, value in alone.items())
    run_concurrently, least = config, made.missing
    values: dict[str, str] = {}
    for change in _changes(config, plan):
        trial = change.apply(run_concurrently)
        if (left := missing(trial)) < least:
            run_concurrently, least = trial, left
            values[change.setting] = change.value
        if not left:
            break
    said = " ".join(f"{setting}={value}" for setting, value in values.items())
    if not least:
        return (f"{said} would fit together",)
    if not values:
        return ("no setting would help: it takes more memory or, for the trained roles, more devices",)
    return (
        f"{said} would help; {least / GIB:.1f} GiB more would still be missing: it takes more memory or more devices",
    )


def _changes(config: RunConfig, plan: Plan) -> list[Change]:
    """In order of what they cost: a pass done twice, smaller passes, communication, another kind of training, precision."""
    own = plan.stage == "rm" and config.rm is not None and config.rm.model is not None
    model, prefix = model_settings(config, plan.stage), "rm.model" if own else "model"
    changes = []
    if not model.gradient_checkpointing:
        changes.append(Change(f"{prefix}.gradient_checkpointing", "true", _models(gradient_checkpointing=True)))
    tokens, least = getattr(config, plan.stage).micro_batch_tokens // 2, longest_row(config, plan.stage)
    while tokens >= least:
        changes.append(Change(f"{plan.stage}.micro_batch_tokens", str(tokens), _micro_batch(plan.stage, tokens)))
        tokens //= 2
    weakest = min(COSTLIER.index(config.strategy_of(role)) for role in TRAINED[plan.stage] if role in plan.roles)
    offered = [strategy for strategy in COSTLIER[weakest + 1 :] if offers(strategy, config, plan.device)]
    changes += [Change("strategy", strategy, _strategy(strategy)) for strategy in offered]
    if model.lora is None:
        changes.append(Change(f"{prefix}.lora.rank", "16", _models(lora=LoraSettings(rank=16))))
    if plan.device == "cuda" and model.dtype == "float32":
        changes.append(Change(f"{prefix}.dtype", "bfloat16", _models(dtype="bfloat16")))
    return changes


def _models(**changes: LoraSettings | bool | Literal["bfloat16"]) -> Callable[[RunConfig], RunConfig]:
    def change(config: RunConfig) -> RunConfig:
        rm = config.rm
        if rm and rm.model:
            rm = rm.model_copy(update={"model": rm.model.model_copy(update=changes)})
        return config.model_copy(update={"model": config.model.model_copy(update=changes), "rm": rm})

    return change


def _micro_batch(stage: Stage, tokens: int) -> Callable[[RunConfig], RunConfig]:
    def change(config: RunConfig) -> RunConfig:
        return config.model_copy(
            update={stage: getattr(config, stage).model_copy(update={"micro_batch_tokens": tokens})}
        )

    return change


def _strategy(strategy: Strategy) -> Callable[[RunConfig], RunConfig]:
    return lambda config: config.model_copy(update={"strategy": strategy, "strategies": {}})
