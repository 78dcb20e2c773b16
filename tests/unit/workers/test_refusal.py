"""A step gone wrong on one rank is applied on none, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from orchestrator.worker_groups.calls import WorkerGroup
from tests.support.apis import OpenApi
from tests.support.hosts import Held, Hosts, load, same_held, train
from tests.support.learners import SPOILED
from tests.support.models import VOCABULARY, make_model
from workers.api import PolicyApi, TrainerApi, ValueApi, request
from workers.data.batching import NO_ROWS
from workers.data.samples import RaggedArray, RolloutBatch, Sample, SampleRefs
from workers.data.step_inputs import KLTerm, MiniBatch, SupervisedBatch, TrainStepInput
from workers.training.schedule import StageStep
from workers.training.skipped_steps import Arrays

pytestmark = pytest.mark.slow

SAMPLES = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(params=["ddp", "zero1", "zero2", "zero3"])
def group(hosts: Hosts, request: pytest.FixtureRequest) -> WorkerGroup:
    """Two ranks under each strategy."""
    return hosts.group("open_policy", "actor", request.param, 2)


def skipped(group: WorkerGroup) -> list[Arrays]:
    """What each rank brought to the step that was not applied."""
    found = [arrays for arrays in group.call(TrainerApi.skipped_batch).get() if arrays is not None]
    assert len(found) == len(group)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spoiled_step_is_as_if_it_had_never_been(group: WorkerGroup, model: Path, dtype: str) -> None:
    load(group, model, dtype=dtype)
    wanted = [train(group, step) for step in (1, 2, 3)]
    after: Held = group.call(OpenApi.held).get()
    assert all(step["skipped"] == 0.0 for step in wanted)

    load(group, model, dtype=dtype)
    assert train(group, 1, spoil="nan loss")["skipped"] == 1.0, "before AdamW has any state"
    found = [train(group, step) for step in (1, 2)]
    before: Held = group.call(OpenApi.held).get()
    for how in SPOILED:
        assert train(group, 3, spoil=how)["skipped"] == 1.0, how
        same_held(group.call(OpenApi.held).get(), before)
    found.append(train(group, 3))
    assert found == wanted
    same_held(group.call(OpenApi.held).get(), after)
    with pytest.raises(AssertionError):
        same_held(after, before)
    assert all(skipped(group))
    assert group.call(TrainerApi.skipped_batch).get() == [None, None], "told once"


def test_weights_wait_for_the_first_step(group: WorkerGroup, model: Path) -> None:
    """One of DeepSpeed's optimizers takes a step to build its states, in which weights would decay."""
    load(group, model, dtype="bfloat16")
    before: Held = group.call(OpenApi.held).get()
    train(group, 1, spoil="nan loss")
    after: Held = group.call(OpenApi.held).get()
    for a, b in zip(after, before, strict=True):
        for name, value in a.items():
            if name.startswith(("step", "exp_avg")):
                assert not value.any(), name
            else:
                np.testing.assert_array_equal(value, b[name], name)


def test_each_rank_keeps_what_it_saw(hosts: Hosts, model: Path) -> None:
    group = hosts.group("open_policy", "actor", "ddp", 2)
    load(group, model)
    metrics = train(group, 5, spoil="finite loss, nan gradients")
    first, second = skipped(group)
    rows = np.random.default_rng(5).permutation(16)[:8].reshape(2, 4)
    for found, mine in zip((first, second), rows, strict=True):
        assert found["micro_batch"].tolist() == [0, 0, 1, 1]
        assert found["loss"] == metrics["loss"] == pytest.approx(first["losses"].sum() + second["losses"].sum())
        assert not np.isfinite(found["grad_norm"])
        lengths = [len(f"{i} and {i} is ") for i in mine]
        assert found["prompt_lengths"].tolist() == lengths
        assert np.diff(found["offsets"]).tolist() == [
            n + len(f"{2 * i}") + 1 for n, i in zip(lengths, mine, strict=True)
        ]
        assert found["offsets"][-1] == len(found["ids"])

    train(group, 5, spoil="nan loss")
    first, second = skipped(group)
    assert np.isfinite(first["losses"]).all(), "the other rank's were good"
    assert np.isnan(second["losses"]).tolist() == [False, True]


def test_a_rank_without_rows_refuses_with_the_others(hosts: Hosts, model: Path) -> None:
    """It computes padding, and saw nothing."""
    group = hosts.group("open_policy", "actor", "ddp", 2)
    load(group, model)
    parts = [
        SupervisedBatch("rows", [np.array([k]) for k in (3, 5)], 8),
        SupervisedBatch("rows", [NO_ROWS, NO_ROWS], 8),
    ]
    requests = [request(PolicyApi.train_demonstrations, part, StageStep(1, 1), (1, 1)) for part in parts]
    good = group.scatter(requests).get()
    assert good[0] == good[1] and good[0]["skipped"] == 0.0 and good[0]["grad_norm"] > 0.0
    group.scatter([request(OpenApi.spoil, how) for how in ("explosion", "")]).get()
    bad = group.scatter(requests).get()
    assert bad[0] == bad[1] and bad[0]["skipped"] == 1.0
    first, second = skipped(group)
    assert first["micro_batch"].tolist() == [0, 1]
    assert second["losses"].tolist() == [0.0, 0.0]
    assert [len(second[name]) for name in ("micro_batch", "ids", "prompt_lengths", "offsets")] == [0, 0, 0, 1]


def test_each_rank_keeps_the_pairs_it_saw(hosts: Hosts, model: Path) -> None:
    group = hosts.group("open_value", "reward", "ddp", 2)
    load(group, model, "preference")
    assert train(group, 5, ValueApi.train_pairs, spoil="explosion")["skipped"] == 1.0
    for found in skipped(group):
        assert len(found["margins"]) == len(found["chosen_prompt_lengths"]) == len(found["rejected_offsets"]) - 1 == 4
    assert train(group, 5, ValueApi.train_pairs)["skipped"] == 0.0


def work(rank: int) -> TrainStepInput:
    """A rank's part of a PPO step: four answers in two mini-batches of two micro-batches."""
    draw = np.random.default_rng(rank)
    count = SAMPLES // 2
    answers = draw.integers(2, 9, count)

    def refs(content: Any) -> SampleRefs:
        return SampleRefs.of([ray.put(content)], [np.arange(count)], count)

    def column(scale: float, shift: float = 0.0) -> RaggedArray:
        return RaggedArray.of([shift + scale * draw.standard_normal(n) for n in answers], np.float32)

    ids, log_probs = [draw.integers(1, VOCABULARY, 3 + n) for n in answers], column(0.1, -5.0)
    samples = [Sample.of(row[:3], row[3:], log_probs.row(i), 0) for i, row in enumerate(ids)]
    minis = [MiniBatch([np.array([k]), np.array([k + 1])], 20, 4, 4) for k in (0, 2)]
    scores, groups = draw.standard_normal(count).astype(np.float32), np.arange(count)
    penalty, values = KLTerm(reward_coefficient=0.1), refs(column(1.0))
    rollouts, reference = refs(RolloutBatch.of(samples)), refs(column(0.1, -5.0))
    return TrainStepInput(rollouts, reference, values, scores, groups, answers, penalty, minis)


@pytest.mark.parametrize(
    ("kind", "method", "role"),
    [("open_policy", PolicyApi.train_answers, "actor"), ("open_value", ValueApi.train_values, "critic")],
)
def test_a_spoiled_mini_batch_is_counted_and_the_others_are_learned(
    hosts: Hosts, model: Path, kind: str, method: Callable[..., dict[str, float]], role: str
) -> None:
    group = hosts.group(kind, "actor" if role == "actor" else "reward", "ddp", 2)
    load(group, model, "demonstration" if role == "actor" else "preference")
    works = [work(rank) for rank in range(2)]
    requests = [request(method, one, StageStep(1, 1), (1, 1)) for one in works]
    loss = {"actor": "loss/policy", "critic": "loss/value"}[role]

    group.scatter([request(OpenApi.spoil, how) for how in ("", "nan loss")]).get()
    metrics = group.scatter(requests).get()[0]
    assert metrics[f"skipped/{role}"] == 1.0
    assert metrics.get("updates", 1.0) == 1.0
    assert np.isfinite(metrics[loss]), "of the mini-batch that was applied"
    for one, found in zip(works, skipped(group), strict=True):
        samples = one.rollouts.fetch()[:2]
        assert found["ids"].tolist() == np.concatenate([s.ids for s in samples]).tolist()
        assert found["micro_batch"].tolist() == [0, 1]
        assert found["log_probs"].tolist() == np.concatenate([s.log_probs for s in samples]).tolist()
        answer_tokens = sum(len(s.log_probs) for s in samples)
        assert all(found[name].shape == (answer_tokens,) for name in ("advantages", "returns", "values"))
        assert np.isnan(found["loss"])

    metrics = group.scatter(requests).get()[0]
    assert metrics[f"skipped/{role}"] == 0.0
    assert metrics.get("updates", 2.0) == 2.0
