"""Batch arithmetic: does a step's work divide over the ranks, and what would."""

from __future__ import annotations

import math
from collections.abc import Mapping

from configs.schema import PPOSettings, Role, RunConfig
from placement.shape import TRAINED, BatchPlan, Problem, Stage


def plan_batch(config: RunConfig, stage: Stage, ranks: Mapping[Role, int]) -> tuple[BatchPlan, list[Problem]]:
    """The arithmetic of a stage's step and what does not divide; `ranks` holds each role's workers."""
    if stage == "ppo":
        assert config.ppo is not None
        return _ppo(config.ppo, ranks)
    settings = config.sft if stage == "sft" else config.rm
    assert settings is not None
    (role,) = TRAINED[stage]
    count, rows = ranks.get(role, 1), settings.batch_size
    problems = _divides(f"{stage}.batch_size", rows, role, count)
    kind = "pairs" if stage == "rm" else "rows"
    words = (f"{_many(rows, kind)} in an optimizer step: {_each(rows, role, count)}",)
    return BatchPlan(rows, 1, 1, settings.epochs, {role: rows // count}, words), problems


def _ppo(ppo: PPOSettings, ranks: Mapping[Role, int]) -> tuple[BatchPlan, list[Problem]]:
    prompts, samples, sequences = ppo.prompts_per_step, ppo.samples_per_prompt, ppo.sequences_per_step
    mini = sequences // ppo.mini_batches
    trained = {role: ranks[role] for role in TRAINED["ppo"] if role in ranks}
    step = f"{_many(prompts, 'prompts')} x {_many(samples, 'samples')} = {_many(sequences, 'sequences')}"
    fits = _prompts_that_fit(ppo, ranks)
    problems = [
        Problem(
            "ppo.prompts_per_step",
            f"{step} in {_many(ppo.mini_batches, 'mini-batches')} of {mini} do not divide by "
            f"{_many(count, f'{role} ranks')}; {fits} would fit",
        )
        for role, count in trained.items()
        if mini % count
    ]
    if (engines := ranks.get("rollout", 1)) > prompts:
        text = f"{_many(prompts, 'prompts')} leave some of {_many(engines, 'engines')} idle; {fits} would fit"
        problems.append(Problem("ppo.prompts_per_step", text))
    for role in ("reference", "reward"):
        if ranks.get(role, 1) > sequences:
            text = f"{step} leave some of {_many(ranks[role], f'{role} ranks')} idle; {fits} would fit"
            problems.append(Problem("ppo.prompts_per_step", text))
    if ppo.ptx is not None:
        problems += _divides("ppo.ptx.batch_size", ppo.ptx.batch_size, "actor", ranks.get("actor", 1))
    per_rank: dict[Role, int] = {role: mini // count for role, count in trained.items()}
    return BatchPlan(prompts, samples, ppo.mini_batches, ppo.epochs, per_rank, _ppo_words(ppo, step, ranks)), problems


def _ppo_words(ppo: PPOSettings, step: str, ranks: Mapping[Role, int]) -> tuple[str, ...]:
    mini = ppo.sequences_per_step // ppo.mini_batches
    trained = [_each(mini, role, ranks[role]) for role in TRAINED["ppo"] if role in ranks]
    scored = [_many(ranks[role], f"{role} ranks") for role in ("reference", "critic", "reward") if role in ranks]
    return (
        f"{step} in a step",
        f"generate: {_many(ppo.prompts_per_step, 'prompts')} over {_many(ranks.get('rollout', 1), 'engines')}, "
        "balanced by outstanding tokens",
        f"score: {_many(ppo.sequences_per_step, 'sequences')} over {', '.join(scored)}, balanced by tokens",
        f"train: {_many(ppo.epochs, 'epochs')} x {_many(ppo.mini_batches, 'mini-batches')} of "
        f"{_many(mini, 'sequences')} = {_many(ppo.epochs * ppo.mini_batches, 'optimizer steps')}: {', '.join(trained)}",
    )


def _prompts_that_fit(ppo: PPOSettings, ranks: Mapping[Role, int]) -> str:
    """The nearest numbers of prompts that divide over every trained rank and leave no worker idle."""
    every = ppo.mini_batches * math.lcm(*(ranks[role] for role in TRAINED["ppo"] if role in ranks))
    every //= math.gcd(every, ppo.samples_per_prompt)
    busy = max(ranks.get("reference", 1), ranks.get("reward", 1))
    return _nearest(ppo.prompts_per_step, every, max(ranks.get("rollout", 1), -(-busy // ppo.samples_per_prompt)))


def _divides(setting: str, rows: int, role: Role, count: int) -> list[Problem]:
    if rows % count == 0:
        return []
    text = f"{rows} does not divide by {_many(count, f'{role} ranks')}; {_nearest(rows, count, count)} would fit"
    return [Problem(setting, text)]


def _nearest(value: int, every: int, least: int) -> str:
    """The multiples of `every` next to `value` that are at least `least`: `8 or 12`."""
    lowest = -(-least // every) * every
    below, above = value // every * every, -(-value // every) * every
    return " or ".join(str(fit) for fit in sorted({max(below, lowest), max(above, lowest)}))


def _each(rows: int, role: Role, count: int) -> str:
    return f"{rows // count} on each of {count} {role} ranks" if count > 1 else f"{rows} on the {role} rank"


def _many(count: float, plural: str) -> str:
    """`1 prompt`, `2 prompts`."""
    singular = {"mini-batches": "mini-batch"}.get(plural, plural.removesuffix("s"))
    return f"{count:g} {singular if count == 1 else plural}"
