"""A plan with its predicted memory and, where it does not fit, setting changes that would help, each tried by the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from configs.schema import LoraSettings, RunConfig, Strategy
from placement.memory.auto_strategy import FASTEST_FIRST, is_usable
from placement.memory.estimate import MemoryEstimate, estimate_memory
from placement.models.shapes import NO_MODELS, Shapes, longest_row, model_settings, read_shapes
from placement.stages import STAGES
from placement.types import GIB, Plan, Stage


@dataclass(frozen=True)
class PlanReport:
    """A plan and its predicted memory."""

    plan: Plan
    memory: MemoryEstimate | str
    """A text says why there is no prediction."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.plan.as_dict() | {"memory": self.memory if isinstance(self.memory, str) else self.memory.as_dict()}


def with_memory(config: RunConfig, plan: Plan, reused: Mapping[Stage, Path] = NO_MODELS) -> PlanReport:
    """The plan with its predicted memory, or with the reason why there is none. reused: see read_shapes."""
    try:
        shapes = read_shapes(config, plan.stage, reused)
    except ValueError as error:
        return PlanReport(plan, f"not predicted: {error}")
    estimate = estimate_memory(config, plan, shapes)
    if estimate.missing:
        estimate = replace(estimate, advice=_suggestions(config, plan, shapes, estimate))
    return PlanReport(plan, estimate)


class Change(NamedTuple):
    """A setting, its new value, and a function that applies it to the run's settings."""

    setting: str
    value: str
    apply: Callable[[RunConfig], RunConfig]


def _suggestions(config: RunConfig, plan: Plan, shapes: Shapes, estimate: MemoryEstimate) -> tuple[str, ...]:
    """The changes that are each enough alone, in order of cost; where none is, the first ones that are enough together."""

    def missing(changed: RunConfig) -> int:
        return estimate_memory(changed, plan, shapes).missing

    alone: dict[str, str] = {}
    for change in _changes(config, plan):
        if change.setting not in alone and not missing(change.apply(config)):
            alone[change.setting] = change.value
    if alone:
        return tuple(f"{setting}={value} would fit" for setting, value in alone.items())
    combined, least = config, estimate.missing
    values: dict[str, str] = {}
    for change in _changes(config, plan):
        trial = change.apply(combined)
        if (left := missing(trial)) < least:
            combined, least = trial, left
            values[change.setting] = change.value
        if not left:
            break
    changes = " ".join(f"{setting}={value}" for setting, value in values.items())
    if not least:
        return (f"{changes} would fit together",)
    if not values:
        return ("no setting would help: more memory or, for the trained roles, more devices are needed",)
    return (
        f"{changes} would help, but {least / GIB:.1f} GiB would still be missing: more memory or more devices are needed",
    )


def _changes(config: RunConfig, plan: Plan) -> list[Change]:
    """In order of cost: recomputed passes, smaller passes, communication, another kind of training, precision."""
    model = model_settings(config, plan.stage)
    prefix = "rm.model" if plan.stage == "rm" and config.rm and config.rm.model else "model"
    changes = []
    if not model.gradient_checkpointing:
        changes.append(Change(f"{prefix}.gradient_checkpointing", "true", _models(gradient_checkpointing=True)))
    tokens, least = config.section(plan.stage).micro_batch_tokens // 2, longest_row(config, plan.stage)
    while tokens >= least:
        changes.append(Change(f"{plan.stage}.micro_batch_tokens", str(tokens), _micro_batch(plan.stage, tokens)))
        tokens //= 2
    fastest = min(
        FASTEST_FIRST.index(config.strategy_of(role)) for role in STAGES[plan.stage].trained if role in plan.roles
    )
    slower = [strategy for strategy in FASTEST_FIRST[fastest + 1 :] if is_usable(strategy, config, plan.device)]
    changes += [Change("strategy", strategy, _strategy(strategy)) for strategy in slower]
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
            update={stage: config.section(stage).model_copy(update={"micro_batch_tokens": tokens})}
        )

    return change


def _strategy(strategy: Strategy) -> Callable[[RunConfig], RunConfig]:
    return lambda config: config.model_copy(update={"strategy": strategy, "strategies": {}})
