"""Samples with gaps between their trained tokens, as of a conversation with several responses: log-probabilities, rewards,
advantages, loss and gradients against loops over one token after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.schema import ModelSettings, PPOClipLoss, PPOSettings
from placement import Cluster
from tests.support.models import VOCABULARY, make_model
from workers.data.samples import RaggedArray, RolloutBatch, Sample, SampleRefs
from workers.data.step_inputs import KLTerm, TrainStepInput
from workers.models.heads import Batch, LanguageModel
from workers.models.loading import load_hf
from workers.rl.losses import LossInputs, PPOClip
from workers.training.experience import TrainingBatch, prepare

CPU = torch.device("cpu")
GAMMA, LAM, KL = 0.9, 0.8, 0.3
PPO: dict[str, Any] = {
    "prompts": {"path": "p"},
    "steps": 1,
    "actor_optimizer": {"lr": 1},
    "critic_optimizer": {"lr": 1},
    "gamma": GAMMA,
    "gae_lambda": LAM,
    "whiten_advantages": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gaps"), "llama", seed=1)


@st.composite
def masks(draw: st.DrawFn) -> list[bool]:
    """Loss mask of a sample with at least one prompt token, then at least one trained token at any position."""
    mask = [False, *draw(st.lists(st.booleans(), min_size=1, max_size=14))]
    return mask if any(mask) else [*mask, True]


def samples_of(every: list[list[bool]], draw: np.random.Generator) -> list[Sample]:
    return [
        Sample(
            draw.integers(1, VOCABULARY, len(mask)).astype(np.int32),
            np.array(mask),
            draw.normal(-5, 0.3, sum(mask)).astype(np.float32),
            np.sort(draw.integers(0, 4, sum(mask))).astype(np.int32),
        )
        for mask in every
    ]


def trained_on(
    samples: list[Sample],
    columns: dict[str, list[np.ndarray]],
    scores: np.ndarray,
    advantages: np.ndarray | None = None,
) -> TrainingBatch:
    def refs(content: Any) -> SampleRefs:
        return SampleRefs.of([ray.put(content)], [np.arange(len(samples))], len(samples))

    reference, values = (refs(RaggedArray.of(columns[name], np.float32)) for name in ("reference", "values"))
    ids = np.arange(len(samples))
    rollouts, penalty = refs(RolloutBatch.of(samples)), KLTerm("k1", reward_coefficient=KL)
    step_input = TrainStepInput(rollouts, reference, values, scores, ids, ids, penalty, [], advantages)
    return prepare(step_input, PPOSettings.model_validate(PPO), lambda x: x, CPU)


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(every=st.lists(masks(), min_size=1, max_size=4), seed=st.integers(0, 9999))
def test_a_gap_has_no_effect(ray_here: Cluster, folder: Path, every: list[list[bool]], seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples = samples_of(every, draw)
    columns = {
        name: [draw.normal(0, 1, len(sample.log_probs)).astype(np.float32) for sample in samples]
        for name in ("reference", "values")
    }
    scores = draw.normal(0, 1, len(samples)).astype(np.float32)
    result = trained_on(samples, columns, scores)
    ours = LanguageModel(
        load_hf(ModelSettings(path=str(folder), dtype="float32"), str(folder), scalar=False, seed=0)
    ).eval()
    batch = Batch(samples, CPU)
    log_probs, _ = ours(batch)
    width = log_probs.shape[1]
    old = result.log_probs[:, :width]
    inputs = LossInputs(log_probs, old, old, None, result.advantages[:, :width], batch.mask)
    PPOClip(PPOClipLoss())(inputs).loss.sum().backward()

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss = torch.zeros(())
    for i, sample in enumerate(samples):
        ids, positions = torch.from_numpy(sample.ids.astype(np.int64)), np.flatnonzero(sample.loss_mask).tolist()
        all_log_probs = torch.log_softmax(plain(input_ids=ids[None]).logits[0].float(), -1)
        advantage, following, expected = 0.0, 0.0, dict[int, float]()
        for k in reversed(range(len(positions))):  # from one trained token to the one before it
            value = float(columns["values"][i][k])
            reward = -KL * float(sample.log_probs[k] - columns["reference"][i][k])
            reward += float(scores[i]) if k == len(positions) - 1 else 0.0
            advantage = reward + GAMMA * following - value + GAMMA * LAM * advantage
            following, expected[k] = value, advantage
        assert result.returns is not None
        for k, position in enumerate(positions):
            log_prob = all_log_probs[position - 1, ids[position]]
            assert float(log_probs[i, k]) == pytest.approx(float(log_prob), abs=1e-5)
            assert float(result.advantages[i, k]) == pytest.approx(expected[k], abs=1e-4)
            assert float(result.returns[i, k]) == pytest.approx(expected[k] + float(columns["values"][i][k]), abs=1e-4)
            loss = loss + clipped(log_prob - float(sample.log_probs[k]), expected[k])
        assert not batch.mask[i, len(positions) :].any()
    loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.hf.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)


def clipped(log_ratio: Tensor, advantage: float) -> Tensor:
    return -torch.minimum(log_ratio.exp() * advantage, log_ratio.exp().clamp(0.8, 1.2) * advantage)


def test_the_score_stands_at_the_last_trained_token_alone(ray_here: Cluster) -> None:
    """In a conversation with two responses, not at the end of each."""
    turns = samples_of([[False, True, True, False, False, True, False]], np.random.default_rng(0))
    zeros = [np.zeros(3, np.float32)]
    result = trained_on(turns, {"reference": [turns[0].log_probs], "values": zeros}, np.array([2.0], np.float32))
    assert result.advantages.tolist() == [pytest.approx([2 * (GAMMA * LAM) ** 2, 2 * GAMMA * LAM, 2.0])]


def test_an_advantage_per_answer_stands_at_each_trained_token(ray_here: Cluster) -> None:
    """Scores and the KL penalty are not used."""
    samples = samples_of([[False, True, False, True], [False, True]], np.random.default_rng(0))
    columns = {name: [np.full(n, np.nan, np.float32) for n in (2, 1)] for name in ("reference", "values")}
    unread = np.full(2, np.nan, np.float32)
    result = trained_on(samples, columns, unread, np.array([0.5, -2.0], np.float32))
    assert result.advantages.tolist() == [[0.5, 0.5], [-2.0, 0.0]]
    assert result.returns is None
    assert result.metrics["advantage/mean"] == pytest.approx(-1 / 3)
    assert "returns" not in result.arrays([np.array([0, 1])])
