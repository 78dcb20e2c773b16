"""An optimizer step with bad values on one rank is skipped on all ranks and changes no state."""

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
    """Each rank's data of the skipped step."""
    batches = [batch for batch in group.call(TrainerApi.skipped_batch).get() if batch is not None]
    assert len(batches) == len(group)
    return batches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_step_changes_no_state(group: WorkerGroup, model: Path, dtype: str) -> None:
    load(group, model, dtype=dtype)
    expected = [train(group, step) for step in (1, 2, 3)]
    after: Held = group.call(OpenApi.held).get()
    assert all(step["skipped"] == 0.0 for step in expected)

    load(group, model, dtype=dtype)
    assert train(group, 1, spoil="nan loss")["skipped"] == 1.0, "before AdamW has any state"
    metrics = [train(group, step) for step in (1, 2)]
    before: Held = group.call(OpenApi.held).get()
    for how in SPOILED:
        assert train(group, 3, spoil=how)["skipped"] == 1.0, how
        same_held(group.call(OpenApi.held).get(), before)
    metrics.append(train(group, 3))
    assert metrics == expected
    same_held(group.call(OpenApi.held).get(), after)
    with pytest.raises(AssertionError):
        same_held(after, before)
    assert all(skipped(group))
    assert group.call(TrainerApi.skipped_batch).get() == [None, None], "returned once"


def test_a_skipped_first_step_leaves_the_weights_unchanged(group: WorkerGroup, model: Path) -> None:
    """One of DeepSpeed's optimizers takes a step to build its states; weight decay would change the weights."""
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


def test_each_rank_keeps_its_batch(hosts: Hosts, model: Path) -> None:
    group = hosts.group("open_policy", "actor", "ddp", 2)
    load(group, model)
    metrics = train(group, 5, spoil="finite loss, nan gradients")
    first, second = skipped(group)
    rows = np.random.default_rng(5).permutation(16)[:8].reshape(2, 4)
    for batch, mine in zip((first, second), rows, strict=True):
        assert batch["micro_batch"].tolist() == [0, 0, 1, 1]
        assert batch["loss"] == metrics["loss"] == pytest.approx(first["losses"].sum() + second["losses"].sum())
        assert not np.isfinite(batch["grad_norm"])
        lengths = [len(f"{i} and {i} is ") for i in mine]
        assert batch["prompt_lengths"].tolist() == lengths
        assert np.diff(batch["offsets"]).tolist() == [
            n + len(f"{2 * i}") + 1 for n, i in zip(lengths, mine, strict=True)
        ]
        assert batch["offsets"][-1] == len(batch["ids"])

    train(group, 5, spoil="nan loss")
    first, second = skipped(group)
    assert np.isfinite(first["losses"]).all(), "the other rank's losses are finite"
    assert np.isnan(second["losses"]).tolist() == [False, True]


def test_a_rank_without_rows_skips_with_the_others(hosts: Hosts, model: Path) -> None:
    """It computes padding, so its batch is empty."""
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


def test_each_rank_keeps_its_pairs(hosts: Hosts, model: Path) -> None:
    group = hosts.group("open_value", "reward", "ddp", 2)
    load(group, model, "preference")
    assert train(group, 5, ValueApi.train_pairs, spoil="explosion")["skipped"] == 1.0
    for batch in skipped(group):
        assert len(batch["margins"]) == len(batch["chosen_prompt_lengths"]) == len(batch["rejected_offsets"]) - 1 == 4
    assert train(group, 5, ValueApi.train_pairs)["skipped"] == 0.0


def make_step_input(rank: int) -> TrainStepInput:
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
def test_a_skipped_mini_batch_is_counted_and_the_others_are_trained(
    hosts: Hosts, model: Path, kind: str, method: Callable[..., dict[str, float]], role: str
) -> None:
    group = hosts.group(kind, "actor" if role == "actor" else "reward", "ddp", 2)
    load(group, model, "demonstration" if role == "actor" else "preference")
    step_inputs = [make_step_input(rank) for rank in range(2)]
    requests = [request(method, step_input, StageStep(1, 1), (1, 1)) for step_input in step_inputs]
    loss = {"actor": "loss/policy", "critic": "loss/value"}[role]

    group.scatter([request(OpenApi.spoil, how) for how in ("", "nan loss")]).get()
    metrics = group.scatter(requests).get()[0]
    assert metrics[f"skipped/{role}"] == 1.0
    assert metrics.get("updates", 1.0) == 1.0
    assert np.isfinite(metrics[loss]), "the loss of the applied mini-batch"
    for step_input, batch in zip(step_inputs, skipped(group), strict=True):
        samples = step_input.rollouts.fetch()[:2]
        assert batch["ids"].tolist() == np.concatenate([s.ids for s in samples]).tolist()
        assert batch["micro_batch"].tolist() == [0, 1]
        assert batch["log_probs"].tolist() == np.concatenate([s.log_probs for s in samples]).tolist()
        answer_tokens = sum(len(s.log_probs) for s in samples)
        assert all(batch[name].shape == (answer_tokens,) for name in ("advantages", "returns", "values"))
        assert np.isnan(batch["loss"])

    metrics = group.scatter(requests).get()[0]
    assert metrics[f"skipped/{role}"] == 0.0
    assert metrics.get("updates", 2.0) == 2.0
