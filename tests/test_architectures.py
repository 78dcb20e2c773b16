"""PPO, whole and small, on each architecture: two steps with a reward model and a function, on random models.

The second step's answers come from the weights that the first one published: its log-probability gap, and its
policy version, say that they arrived.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.schema import RunConfig
from orchestrator.api import run_stages
from placement import Cluster
from tests.models import make_model, make_reward_model

pytestmark = pytest.mark.slow

KINDS = {
    "gpt2": ("gpt2", True, False),
    "opt": ("opt", True, False),
    "bloom": ("bloom", True, False),
    "llama, tied, grouped": ("llama", True, True),
    "qwen2, untied": ("qwen2", False, True),
    "qwen3, untied": ("qwen3", False, False),
}
PROMPTS = ["a", "bc", "the film", "what a plot", "why", "it was 1999", "no", "cast: "]


def run_config(folder: Path, model: Path, reward: Path) -> RunConfig:
    rows = [{"prompt": prompt, "wanted": prompt[0]} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ppo: dict[str, Any] = {
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "steps": 2,
        "prompts_per_step": 8,
        "mini_batches": 2,
        "max_prompt_tokens": 16,
        "rewards": [
            {"kind": "model", "path": str(reward)},
            {"kind": "function", "name": "letters", "function": "tests.reward_functions:letters", "weight": 0.5},
        ],
        "max_log_prob_gap": 1e-3,
        "actor_optimizer": {"lr": 0.003},
        "critic_optimizer": {"lr": 0.003},
    }
    return RunConfig.model_validate({
        "name": "architecture",
        "runs": str(folder / "runs"),
        "model": {"path": str(model)},
        "ppo": ppo,
        "rollout": {"max_new_tokens": 8, "kv_cache_gib": 0.03125, "max_sequences": 8},
        "placement": {"cpus_per_device": 1},
        "deadlines": {"first": 240},
    })  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_runs_on(ray_here: Cluster, tmp_path: Path, kind: str) -> None:
    architecture, tied, grouped = KINDS[kind]
    start = make_model(tmp_path / "model", architecture, tied, grouped, seed=1)
    config = run_config(tmp_path, start, make_reward_model(start, tmp_path / "reward"))
    result = run_stages(config, ["ppo"], Console(file=io.StringIO()))

    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for step, metrics in enumerate(lines, start=1):
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        assert all(math.isfinite(value) for value in numbers.values()), metrics
        assert metrics["log_prob_gap"] <= 1e-3
        assert metrics["policy_version"] == step - 1
        assert metrics["grad_norm/actor"] > 0
        assert metrics["grad_norm/critic"] > 0
        total = metrics["reward/model"] + 0.5 * metrics["reward/letters"]
        assert metrics["reward/mean"] == pytest.approx(total, abs=1e-5)
    assert abs(lines[0]["kl"]) < 1e-3, "the actor is the reference at first"
    assert lines[1]["kl"] > 0.01, "and then no longer"

    exported = AutoModelForCausalLM.from_pretrained(result.models["ppo"])
    assert type(exported).__name__ == type(AutoModelForCausalLM.from_pretrained(start)).__name__
    assert exported.config.tie_word_embeddings is tied
    before, after = load_file(start / "model.safetensors"), load_file(result.models["ppo"] / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before), "every weight has learnt"
