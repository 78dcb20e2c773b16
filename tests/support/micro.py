"""A tiny run whose stages take seconds: 2 layers of width 64, 60 rows, a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SUBJECTS = ("film", "plot", "cast", "score", "end")
VERDICTS = ("dull", "fine", "great")


def write_micro(folder: Path, **settings: Any) -> Path:
    """Write model, data and config.yaml of all three stages; returns the config. settings: replace sections of the config."""
    from tests.support.models import make_model  # imports torch, which the process of `short` does not need

    folder.mkdir(exist_ok=True)
    make_model(folder / "model")
    sentences = [
        (f"the {subject} {i}", f" is {verdict}")
        for i in range(4)
        for subject in SUBJECTS
        for verdict in VERDICTS
    ]  # fmt: skip
    _write(folder / "sft.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion in sentences])
    _write(
        folder / "pairs.jsonl",
        [{"prompt": prompt, "chosen": " is great", "rejected": completion} for prompt, completion in sentences],
    )
    _write(folder / "prompts.jsonl", [{"prompt": prompt, "wanted": "great"} for prompt, _ in sentences])
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_settings(folder) | settings, sort_keys=False))
    return config


def _settings(folder: Path) -> dict[str, Any]:
    def rows(name: str, limit: int | None = None) -> dict[str, Any]:
        return {"path": str(folder / name)} | ({"limit": limit} if limit else {})

    supervised = {"batch_size": 20, "max_length": 48, "optimizer": {"lr": 3e-3}}
    return {
        "name": "micro",
        "runs": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "sft": {"train": rows("sft.jsonl"), "validation": rows("sft.jsonl", 10), "epochs": 4, **supervised},
        "rm": {"train": rows("pairs.jsonl"), "validation": rows("pairs.jsonl", 10), "epochs": 4.5, **supervised},
        "ppo": {
            "prompts": rows("prompts.jsonl"),
            "steps": 6,
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "mini_batches": 2,
            "max_prompt_tokens": 16,
            "actor_optimizer": {"lr": 1e-3},
            "critic_optimizer": {"lr": 1e-3},
            "evaluation": {
                "prompts": rows("prompts.jsonl", 6),
                "judges": [{"name": "short", "function": "tests.support.micro:short"}],
            },
        },
        "rollout": {"max_new_tokens": 8, "kv_cache_gib": 0.03125},
        "placement": {"cpus_per_device": 1},
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def short(prompts: list[str], answers: list[str], **columns: Any) -> list[float]:
    """A judge, and a reward: short answers are good."""
    return [-len(answer) / 10 for answer in answers]
