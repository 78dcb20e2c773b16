"""The learning rate of a step: a function of the step, so there is no state to save."""

from __future__ import annotations

import math
from typing import NamedTuple

from configs.schema import OptimizerSettings


class StageStep(NamedTuple):
    """Position in a stage."""

    step: int
    """Number of the step, from 1."""
    steps: int
    """Total steps of the stage."""


def learning_rate(settings: OptimizerSettings, at: StageStep) -> float:
    """Learning rate of a step: a linear warm-up, then the schedule.

    Step k of a warm-up of W steps uses lr * k / W: the first step has a rate above 0, the last one `lr`. W is the share `warmup`
    of all steps, rounded up. The schedule then starts at `lr`; linear and cosine would reach 0 one step after the last.

    Raises ValueError if the stage has no such step.
    """
    step, steps = at
    if not 1 <= step <= steps:
        raise ValueError(f"step: was {step}, but the stage has the steps 1 to {steps}")
    warmup = max(1, math.ceil(settings.warmup * steps - 1e-9)) if settings.warmup else 0
    if step <= warmup:
        return settings.lr * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.lr * factors[settings.schedule]
