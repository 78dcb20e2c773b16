"""Batch arithmetic: how a step's rows are divided among the ranks. Any number of rows fits on any number of ranks, as long as
each rank gets at least one."""

from __future__ import annotations

from collections.abc import Mapping

from configs.schema import PPOSettings, Role, RunConfig
from placement.stages import PPO, STAGES
from placement.types import BatchPlan, Problem, Stage


def plan_batch(config: RunConfig, stage: Stage, ranks: Mapping[Role, int]) -> tuple[BatchPlan, list[Problem]]:
    """The arithmetic of a stage's step, and the settings that leave workers idle in every step. ranks: role -> workers."""
    if stage == PPO.name:
        assert config.ppo is not None
        return _ppo(config.ppo, ranks)
    settings, spec = config.section(stage), STAGES[stage]
    (role,) = spec.trained
    count, rows = ranks.get(role, 1), settings.batch_size
    step = f"{_count(rows, spec.rows)} in an optimizer step"
    problems = []
    if count > rows:
        text = f"{step} leave some of {_count(count, f'{role} ranks')} idle; {count} or more would fit"
        problems.append(Problem(f"{stage}.batch_size", text))
    description = (f"{step}: {_each(rows, 1, role, count)}",)
    return BatchPlan(rows, 1, 1, settings.epochs, {role: _ceil_div(rows, count)}, description), problems


def _ppo(ppo: PPOSettings, ranks: Mapping[Role, int]) -> tuple[BatchPlan, list[Problem]]:
    prompts, samples, sequences = ppo.prompts_per_step, ppo.samples_per_prompt, ppo.sequences_per_step
    step = f"{_count(prompts, 'prompts')} x {_count(samples, 'samples')} = {_count(sequences, 'sequences')}"
    trained = {role: ranks[role] for role in PPO.trained if role in ranks}
    divided = f"{step} in {_count(ppo.mini_batches, 'mini-batches')} of {_size(sequences, ppo.mini_batches)}"
    busy = [(divided, role, count, _ceil_div(sequences, ppo.mini_batches)) for role, count in trained.items()]
    busy += [(step, role, ranks.get(role, 1), sequences) for role in ("reference", "reward")]
    idle = [
        f"{rows} leave some of {_count(count, f'{role} ranks')} idle"
        for rows, role, count, most in busy
        if count > most
    ]
    if (engines := ranks.get("rollout", 1)) > prompts:
        idle.append(f"{_count(prompts, 'prompts')} leave some of {_count(engines, 'engines')} idle")
    problems = [
        Problem("ppo.prompts_per_step", f"{text}; {_fewest_prompts(ppo, ranks)} or more would fit") for text in idle
    ]
    per_rank: dict[Role, int] = {
        role: _ceil_div(sequences, ppo.mini_batches * count) for role, count in trained.items()
    }
    description = _describe_ppo(ppo, step, ranks)
    return BatchPlan(prompts, samples, ppo.mini_batches, ppo.epochs, per_rank, description), problems


def _describe_ppo(ppo: PPOSettings, step: str, ranks: Mapping[Role, int]) -> tuple[str, ...]:
    sequences, minis = ppo.sequences_per_step, ppo.mini_batches
    trained = [_each(sequences, minis, role, ranks[role]) for role in PPO.trained if role in ranks]
    scored = [_count(ranks[role], f"{role} ranks") for role in ("reference", "critic", "reward") if role in ranks]
    mini = f"{_size(sequences, minis)} {_plural(_ceil_div(sequences, minis), 'sequences')}"
    return (
        f"{step} in a step",
        f"generate: {_count(ppo.prompts_per_step, 'prompts')} over {_count(ranks.get('rollout', 1), 'engines')}, "
        "balanced by outstanding tokens",
        f"score: {_count(sequences, 'sequences')} over {', '.join(scored)}, balanced by tokens",
        f"train: {_count(ppo.epochs, 'epochs')} x {_count(minis, 'mini-batches')} of {mini} = "
        f"{_count(ppo.epochs * minis, 'optimizer steps')}: {', '.join(trained)}",
    )


def _fewest_prompts(ppo: PPOSettings, ranks: Mapping[Role, int]) -> int:
    """The fewest prompts that leave no worker idle: some mini-batch has a sequence for each trained rank, each scoring rank has
    a sequence to score, and each engine a prompt."""
    trained = max(ranks.get(role, 1) for role in PPO.trained)
    sequences = max(ppo.mini_batches * (trained - 1) + 1, ranks.get("reference", 1), ranks.get("reward", 1))
    return max(ranks.get("rollout", 1), _ceil_div(sequences, ppo.samples_per_prompt))


def _each(rows: int, parts: int, role: Role, count: int) -> str:
    """A rank's rows of one of `parts` mini-batches: `21 or 22 on each of 3 actor ranks`."""
    size = _size(rows, parts * count)
    return f"{size} on each of {count} {role} ranks" if count > 1 else f"{size} on the {role} rank"


def _size(rows: int, parts: int) -> str:
    """Rows of one part, where rows are divided as evenly as possible: `4`, `3 or 4`."""
    return " or ".join(str(size) for size in sorted({rows // parts, _ceil_div(rows, parts)}))


def _ceil_div(rows: int, parts: int) -> int:
    return -(-rows // parts)


def _count(count: float, plural: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{count:g} {_plural(count, plural)}"


def _plural(count: float, plural: str) -> str:
    singular = {"mini-batches": "mini-batch"}.get(plural, plural.removesuffix("s"))
    return singular if count == 1 else plural
