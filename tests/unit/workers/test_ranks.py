"""Training gives the same result for every number of ranks, sharding and split into micro-batches.

Each set-up trains the same jobs from the same start: demonstrations, pairs with dropout, and the policy and the critic on the
same answers. The expected result is that of one rank without sharding. Row counts are not divisible by the ranks, some answers
have no score, and some batches have fewer rows than ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import ZERO, Strategy
from configs.schema import OptimizerSettings, Role, RunConfig
from orchestrator.worker_groups.rollouts import Experience, Rollouts, TokenColumn
from orchestrator.worker_groups.team import Team
from placement import Cluster, make_plan
from tests.support.apis import OpenApi
from tests.support.models import VOCABULARY, encoded, make_model
from workers.api import PolicyApi, Request, TrainerApi, ValueApi, request
from workers.data import Row, RowKind
from workers.data.samples import RaggedArray, RolloutBatch, Sample, SampleRefs
from workers.data.step_inputs import KLTerm, SupervisedBatch
from workers.models.heads import Batch, LanguageModel
from workers.models.loading import load_hf
from workers.training.schedule import StageStep

T = TypeVar("T")

pytestmark = pytest.mark.slow

Ranks = tuple[int, int]
"""Number of ranks of the actor and of the critic."""
Setup = tuple[Strategy, Ranks, int]
"""Strategy, ranks, and tokens of a micro-batch."""
SETUPS: dict[str, Setup] = {
    "ddp, one rank, small micro-batches": ("ddp", (1, 1), 48),
    "ddp": ("ddp", (2, 2), 160),
    "zero2": ("zero2", (2, 2), 160),
    "ddp, more ranks, small micro-batches": ("ddp", (3, 4), 48),
    "zero1, more ranks": ("zero1", (3, 4), 160),
    "zero2, more ranks": ("zero2", (3, 4), 160),
    "zero3, more ranks": ("zero3", (3, 4), 160),
}
WHOLE: Setup = ("ddp", (1, 1), 100_000)
JOBS = ("demonstrations", "pairs", "policy", "critic")
ADAM = OptimizerSettings(lr=1e-3, warmup=0.0, weight_decay=0.01, max_grad_norm=2.0)
SAMPLES = 12
SCORED = (SAMPLES - 1, 3, 1)
"""Number of answers with a score in each PPO step."""
BATCHES = (7, 5, 2)
"""Rows of each step of the supervised jobs."""


@dataclass
class Trained:
    """A job's metrics per step, and its final model."""

    steps: list[dict[str, float]]
    weights: dict[str, Tensor]


# ---------------------------------------------------------------- data


def text(draw: np.random.Generator, low: int, high: int) -> str:
    return "".join(draw.choice(list("abcdefgh ")) for _ in range(draw.integers(low, high)))


def demonstrations(count: int) -> list[Row]:
    """Rows of different lengths; one has no prompt."""
    draw = np.random.default_rng(1)
    rows = [Row(text(draw, 1, 20), completion=text(draw, 1, 20)) for _ in range(count - 1)]
    return [*rows, Row("", completion=text(draw, 5, 10))]


def pairs(count: int) -> list[Row]:
    draw = np.random.default_rng(2)
    return [
        Row(text(draw, 1, 9), chosen=text(draw, 0, 30), rejected=text(draw, 0, 30), margin=float(draw.random()))
        for _ in range(count)
    ]


def fake_experience(folder: Path, config: RunConfig) -> Experience:
    """Answers in the object store, as from two engines, and random scores."""
    draw = np.random.default_rng(3)
    prompt_lengths, answer_lengths = draw.integers(1, 12, SAMPLES), draw.integers(1, 20, SAMPLES)
    ids = [draw.integers(1, VOCABULARY, n).astype(np.int32) for n in prompt_lengths + answer_lengths]
    samples = [Sample.of(row[:n], row[n:]) for row, n in zip(ids, prompt_lengths, strict=True)]
    batch = Batch(samples, torch.device("cpu"))
    with torch.no_grad():
        model_log_probs, _ = LanguageModel(load_hf(config.model, str(folder), scalar=False, seed=1)).eval()(batch)
    log_probs = [
        (row[mask].numpy() + draw.normal(0, 0.2, int(mask.sum()))).astype(np.float32)
        for row, mask in zip(model_log_probs, batch.mask, strict=True)
    ]
    engines = [np.arange(0, SAMPLES, 2), np.arange(1, SAMPLES, 2)]
    batches = [
        RolloutBatch.of([replace(samples[i], log_probs=log_probs[i], versions=0 * log_probs[i]) for i in share])
        for share in engines
    ]

    def column(scale: float) -> TokenColumn:
        rows = [draw.normal(0, scale, n).astype(np.float32) for n in answer_lengths]
        return TokenColumn(
            refs([RaggedArray.of([rows[i] for i in share], np.float32) for share in engines]), np.zeros(SAMPLES)
        )

    def refs(parts: list[Any]) -> SampleRefs:
        return SampleRefs.of([ray.put(part) for part in parts], engines, SAMPLES)

    rollouts = Rollouts(
        "prompts",
        prompts=np.arange(SAMPLES) // 2,
        groups=np.arange(SAMPLES) // 2,
        numbers=np.arange(SAMPLES) % 2,
        step=1,
        refs=refs(batches),
        prompt_lengths=prompt_lengths,
        answer_lengths=answer_lengths,
        trained_tokens=answer_lengths,
        ended=np.ones(SAMPLES, bool),
        min_versions=np.zeros(SAMPLES, int),
        max_versions=np.zeros(SAMPLES, int),
    )
    scores, ptx = draw.normal(0, 1, SAMPLES), [np.arange(5), np.arange(5, 7)]
    return Experience(rollouts, column(2.0), column(0.5), scores, KLTerm("k3", loss_coefficient=0.05), ptx=ptx)


def of_step(experience: Experience, step: int) -> Experience:
    """The experience with the number of scores of this step."""
    unscored = np.random.default_rng(step).permutation(SAMPLES)[SCORED[step - 1] :]
    scores = experience.scores.copy()
    scores[unscored] = np.nan
    return replace(experience, scores=scores)


# ---------------------------------------------------------------- training


def run_config(folder: Path, strategy: Strategy, ranks: Ranks, micro_batch_tokens: int) -> RunConfig:
    data, devices = {"path": "rows.jsonl"}, dict(zip(("actor", "critic"), ranks, strict=True))
    ppo = {
        "prompts": data,
        "steps": len(SCORED),
        "prompts_per_step": SAMPLES,
        "epochs": 2,
        "mini_batches": 2,
        "micro_batch_tokens": micro_batch_tokens,
        "entropy_coefficient": 0.01,
        "ptx": {"data": data, "coefficient": 0.5, "batch_size": 4},
        "actor_optimizer": ADAM,
        "critic_optimizer": ADAM,
    }
    return RunConfig.model_validate({
        "name": f"{max(ranks)}-ranks",
        "seed": 7,
        "plugins": ["tests.support.learners"],
        "strategies": {"actor": strategy, "critic": strategy},
        "model": {"path": str(folder), "dtype": "float32"},
        "rm": {"train": data, "optimizer": ADAM, "margin": 0.3, "center": 0.01},
        "ppo": ppo,
        "placement": {"devices": devices, "cpus_per_device": 0.5},
        "deadlines": {"initial_timeout": 240},
    })  # fmt: skip


@contextmanager
def learners(config: RunConfig, cluster: Cluster) -> Iterator[Team]:
    """A team of only the actor and the critic."""
    plan = make_plan(config, "ppo", cluster)
    learning: tuple[Role, ...] = ("actor", "critic")
    roles = {role: plan.roles[role] for role in learning}
    groups = tuple(plan.group(planned.group) for planned in roles.values())
    team = Team.start(config, replace(plan, roles=roles, groups=groups))
    try:
        yield team
    finally:
        team.stop()


def evaluate(team: Team, experience: Experience) -> dict[str, float]:
    """Metrics of the untrained models on the data, without training."""
    settings = team.config
    assert settings.ppo is not None
    tokens = settings.ppo.micro_batch_tokens
    metrics: dict[str, float] = {}

    def measure(
        role: Role, name: str, rows: list[Row], kind: RowKind, ask: Callable[[SupervisedBatch], Request[T]]
    ) -> list[T]:
        team.add_data(name, encoded(rows, kind, 40), role)
        parts = team.parts(role, name, np.arange(len(rows)), tokens)
        results = team.groups[role].scatter([ask(part) for part in parts]).get()
        assert all(result == results[0] for result in results), "every rank reports the whole"
        return results

    for role in ("actor", "critic"):
        team.groups[role].call(TrainerApi.load, settings.model.path, settings.model, ADAM).get()
    [loss, *_] = measure(
        "actor", "sft", demonstrations(13), "demonstration", lambda part: request(PolicyApi.demonstration_loss, part)
    )
    [pair, *_] = measure("critic", "pairs", pairs(3), "preference", lambda part: request(ValueApi.pair_accuracy, part))
    metrics |= {"demonstrations": loss["loss"], "pairs": pair["loss"], "accuracy": pair["accuracy"]}
    [(mean, deviation), *_] = measure(
        "critic",
        "demonstrations",
        demonstrations(13),
        "demonstration",
        lambda part: request(ValueApi.normalize, part.data, part.micro_batches),
    )
    metrics |= {"mean": mean, "deviation": deviation}
    rollouts = experience.rollouts  # all but one: they do not divide among the ranks
    some = {
        name: getattr(rollouts, name)[:-1]
        for name in ("prompts", "groups", "prompt_lengths", "answer_lengths", "trained_tokens", "ended")
    }
    call = team.values(replace(rollouts, refs=rollouts.refs.take(np.arange(SAMPLES - 1)), **some))
    assert call is not None
    values = call.get()
    for i, row in enumerate(values.refs.fetch()):
        assert len(row) == rollouts.answer_lengths[i]
        assert row[0] == values.per_answer[i]
        metrics |= {f"value {t} of {i}": float(value) for t, value in enumerate(row)}
    return metrics


def train(team: Team, job: str, experience: Experience, exported: Path, dropout: float) -> Trained:
    """Train three steps of a job from the start."""
    role: Role = "actor" if job in ("demonstrations", "policy") else "critic"
    group, settings = team.groups[role], team.config
    assert settings.ppo is not None
    tokens = settings.ppo.micro_batch_tokens
    group.call(TrainerApi.load, settings.model.path, settings.model, ADAM, dropout).get()
    kind: RowKind
    rows, kind = (pairs(8), "preference") if job == "pairs" else (demonstrations(13), "demonstration")
    name = "sft" if role == "actor" else "pairs"
    if job != "critic":
        team.add_data(name, encoded(rows, kind, 40), role)
    steps: list[dict[str, float]] = []
    if job in ("policy", "critic"):
        for step in range(1, len(SCORED) + 1):
            call = team.train_actor if job == "policy" else team.train_critic
            step_call = call(of_step(experience, step), step, len(SCORED))
            assert step_call is not None
            steps.append(step_call.get())
    else:
        draw = np.random.default_rng(4)
        method: Callable[[Any, SupervisedBatch, StageStep, tuple[int, ...]], dict[str, float]]
        method = PolicyApi.train_demonstrations if job == "demonstrations" else ValueApi.train_pairs
        for step, size in enumerate(BATCHES, start=1):
            parts = team.parts(role, name, draw.permutation(len(rows))[:size], tokens)
            at, seed = StageStep(step, len(BATCHES)), (settings.seed, step)
            first, *others = group.scatter([request(method, part, at, seed) for part in parts]).get()
            assert all(other == first for other in others), "every rank reports the whole"
            steps.append(first)
    group.call(TrainerApi.export, str(exported)).get()
    return Trained(steps, load_file(exported / "model.safetensors"))


@dataclass
class SetupResult:
    """Results of a set-up."""

    jobs: dict[str, Trained]
    evaluation: dict[str, float]
    repeated: list[Trained]
    """Pairs again from the same start: with and without dropout."""


Learn = Callable[[Setup], SetupResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", tied=True, grouped=True, seed=5)


@pytest.fixture(scope="module")
def learned(ray_here: Cluster, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learn]:
    """Returns the result of a set-up; each is run once. A team runs all set-ups of its ranks, one after the other, and is stopped
    before the next team starts."""
    experience = fake_experience(folder, run_config(folder, *WHOLE))
    with ExitStack() as stack:
        teams: dict[Ranks, Team] = {}

        def team_of(ranks: Ranks) -> Team:
            if ranks not in teams:
                stack.close()
                teams.clear()
                teams[ranks] = stack.enter_context(learners(run_config(folder, "ddp", ranks, 160), ray_here))
            return teams[ranks]

        @cache
        def get(setup: Setup) -> SetupResult:
            strategy, ranks, _ = setup
            team = team_of(ranks)
            team.config = run_config(folder, *setup)
            for group in team.groups.values():
                group.call(OpenApi.become, strategy, {}).get()

            def run(job: str, dropout: float = 0.3) -> Trained:
                """dropout: of pairs."""
                dropout = dropout if job == "pairs" else 0.0
                return train(team, job, experience, tmp_path_factory.mktemp("exported"), dropout)

            jobs = {job: run(job) for job in JOBS}
            for group in team.groups.values():
                assert group.call(OpenApi.stage).get() == [ZERO[strategy].stage] * len(group)
            return SetupResult(
                jobs=jobs,
                evaluation=evaluate(team, experience),
                repeated=[run("pairs"), run("pairs", dropout=0.0)] if setup == SETUPS["ddp"] else [],
            )

        yield get


def same_numbers(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(actual) == len(expected)
    for step, (a, b) in enumerate(zip(actual, expected, strict=True), start=1):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), f"{name} of step {step}"


def test_the_jobs_learn(learned: Learn, folder: Path) -> None:
    """The jobs change weights and metrics, so comparing set-ups by them is a real test."""
    for job, result in learned(WHOLE).jobs.items():
        assert result.weights.keys() >= {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"}
        before = load_file(folder / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
        moved = (result.weights["model.layers.1.self_attn.q_proj.weight"] - before).abs()
        assert float(moved.median()) > 3e-4, job
        assert all(np.isfinite(value) for step in result.steps for value in step.values()), job
    policy = learned(WHOLE).jobs["policy"].steps
    assert 0.1 < policy[0]["logprob_mismatch"] < 0.25, "the noise that was added, 0.2 * sqrt(2 / pi)"
    assert 3 < policy[0]["loss/ptx"] < 10, "nats per token of demonstrations"
    assert all(step["clip_fraction"] > 0 for step in policy)
    assert [step["updates"] for step in policy] == [4, 4, 2], "one answer is one mini-batch"


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("job", JOBS)
def test_every_set_up_learns_the_same(learned: Learn, setup: str, job: str) -> None:
    actual, expected = learned(SETUPS[setup]).jobs[job], learned(WHOLE).jobs[job]
    same_numbers(actual.steps, expected.steps)
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        # Adam moves a weight by about lr per step for any gradient size: if the gradient is only rounding error, weights differ.
        difference = (actual.weights[name] - weight).abs()
        assert float(difference.mean()) < 2e-6, name
        assert float(difference.max()) < 1e-3, name


@pytest.mark.parametrize("setup", SETUPS)
def test_every_set_up_evaluates_the_same(learned: Learn, setup: str) -> None:
    same_numbers([learned(SETUPS[setup]).evaluation], [learned(WHOLE).evaluation])


def test_a_step_repeated_is_the_same_step_with_the_same_dropout(learned: Learn) -> None:
    result = learned(SETUPS["ddp"])
    first, (second, without) = result.jobs["pairs"], result.repeated
    assert first.steps == second.steps
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert first.steps[0]["loss"] != pytest.approx(without.steps[0]["loss"], rel=1e-3), "there was dropout"


def test_a_penalty_in_the_loss_pulls_towards_the_reference(ray_here: Cluster, folder: Path) -> None:
    """Without any reward, the actor moves towards the reference's log-probabilities."""
    config = run_config(folder, *WHOLE)
    assert config.ppo is not None
    changes = {"entropy_coefficient": 0.0, "ptx": None}
    penalty = KLTerm("k2", loss_coefficient=1.0)
    config = config.model_copy(update={"name": "penalty", "ppo": config.ppo.model_copy(update=changes)})
    answers = fake_experience(folder, config)
    samples = answers.rollouts.refs.fetch()

    def column(rows: list[np.ndarray]) -> TokenColumn:
        return TokenColumn(
            SampleRefs.of([ray.put(RaggedArray.of(rows, np.float32))], [np.arange(SAMPLES)], SAMPLES), np.zeros(SAMPLES)
        )

    reference = [sample.log_probs + 2 for sample in samples]
    values, scores = column([0 * row for row in reference]), np.zeros(SAMPLES)
    experience = replace(answers, reference=column(reference), values=values, scores=scores, kl=penalty, ptx=[])

    with learners(config, ray_here) as team:
        actor = team.groups["actor"]

        def distance() -> float:
            refs = experience.rollouts.refs
            log_probs, _ = actor.first(PolicyApi.log_probs, refs, [np.arange(SAMPLES)])
            return float(np.square(log_probs.values - np.concatenate(reference)).mean())

        actor.call(TrainerApi.load, str(folder), config.model, ADAM).get()
        before = distance()
        team.train_actor(experience, 1, 1).get()
        assert distance() < 0.9 * before
