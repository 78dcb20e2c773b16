"""GSPO as a plugin of one file: its loss and gradient against the formula, and a run."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import load_config
from orchestrator import run_stages
from placement import Cluster
from tests.support.micro import write_micro
from workers.rl.losses import LossInputs

torch.set_num_threads(1)


@pytest.fixture
def gspo() -> ModuleType:
    return import_module("tests.plugins.gspo")


@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 9999), lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_the_loss_of_a_sequence_is_the_formula(gspo: ModuleType, seed: int, lengths: list[int]) -> None:
    """-min(s A, clip(s) A) with s the geometric mean of the tokens' ratios, and its gradient in every token."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    old = torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    new = old + 0.1 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)
    outside = [x.masked_fill(~mask, torch.nan) for x in (new, old, advantages[:, None].expand(mask.shape))]
    outside[0].requires_grad_()
    low, high = 0.02, 0.03
    loss = gspo.GSPO(gspo.GSPO.Config(clip_low=low, clip_high=high))
    found = loss(LossInputs(outside[0], outside[1], outside[1], None, outside[2], mask)).loss
    assert not found[~mask].any()
    means = found.sum(1) / mask.sum(1)
    for row, n in enumerate(lengths):
        gap, a = new[row, :n] - old[row, :n], float(advantages[row])
        s = math.exp(sum(gap.tolist()) / n)
        clipped = min(max(s, 1 - low), 1 + high)
        assert float(means[row]) == pytest.approx(-min(s * a, clipped * a))
        (gradient,) = torch.autograd.grad(means[row], outside[0], retain_graph=True)
        slope = -a * s / n if s * a <= clipped * a else 0.0
        assert gradient[row, :n].tolist() == pytest.approx([slope] * n)


def test_its_own_clip_and_mean(gspo: ModuleType) -> None:
    loss = gspo.GSPO(gspo.GSPO.Config())
    assert (loss.config.clip_low, loss.config.clip_high, loss.aggregation) == (3e-4, 4e-4, "sequence_mean")


@pytest.mark.slow
def test_a_run(tmp_path: Path, ray_here: Cluster) -> None:
    """Two steps: the clip, so narrow, takes tokens that PPO's would leave; its KL penalty is in the loss."""
    overrides = ["plugins=[tests.plugins.gspo]", "ppo.loss=gspo", "ppo.kl={apply_to: loss, estimator: k3}"]
    overrides += ["ppo.rewards=[{kind: function, name: brief, function: 'tests.plugins.reward:brevity'}]"]
    config = load_config(write_micro(tmp_path), [*overrides, "ppo.steps=2", "ppo.evaluation=none"])
    folder = run_stages(config, ["ppo"]).folder
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(np.isfinite(step["loss/policy"]) and step["updates"] == 2.0 for step in steps)
    assert max(step["clip_fraction"] for step in steps) > 0.1
    for step in steps:  # of the reward, which reads token ids and whether an answer ended
        assert step["reward/brief/ended"] == pytest.approx(1 - step["truncated"])
        assert step["reward/mean"] == pytest.approx(step["reward/brief/ended"] - step["length/response"] / 10, abs=1e-6)
        assert 0 < step["reward/brief/distinct_tokens"] <= 1
    assert "kind: gspo" in (folder / "config.yaml").read_text()
