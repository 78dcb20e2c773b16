"""What steers a run is in its checkpoints, or follows from config, step and data: every field is one or the other."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.schema import AdaptiveKL, FixedKL
from orchestrator.algorithms.kl_controller import make_controller
from orchestrator.algorithms.runner import Runner

ROOT = Path(__file__).parents[3]

SAVED = {
    "Runner": {"done", "skipped"},
    "PPO": {"version", "kl"},
    "AdaptiveController": {"coefficient"},
    "Trainer": {"backend", "model", "module", "peft"},
    "DeepSpeedBackend": {"engine", "model"},  # weights, moments, count of steps
}
"""Fields whose state is in a checkpoint."""

DERIVABLE = {
    "Runner": {
        "algorithm run plan callbacks exports": "what was asked for",
        "console progress recorder status stop recovery": "the world outside; metrics.jsonl is cut to the checkpoint's step",
        "team loaded": "started anew",
        "first_state snapshots": "the state at another step",
        "seconds": "of the present step",
    },
    "Algorithm": {
        "run": "what was asked for",
        "data counts": "read and tokenised anew, the date in prompts that of the run's start",
    },
    "Supervised": {
        "settings": "config",
        "parameters": "of the model",
        "order": "a function of seed, lengths and batch size",
    },
    "SFT": {},
    "RewardModel": {
        "dropout": "config",
        "normalization": "of the model that is exported",
    },
    "PPO": {
        "ppo sources": "config",
        "ptx_batches": "a function of seed and lengths",
    },
    "FixedController": {"coefficient": "config"},
    "AdaptiveController": {"target horizon": "config"},
    "Team": {
        "config plan transport model": "what was asked for",
        "started": "the run's start, kept in run.json",
        "groups _places _starts _changed deadlines recovery": "processes, and how long they took",
        "lengths": "tokenised anew",
        "version": "published anew",
    },
    "Worker": {"spec config rank": "which worker it is", "datasets": "sent anew", "base": "loaded anew"},
    "Trainer": {
        "device path settings optimizer_settings tokenizer ends": "what was asked for",
        "skipped": "of the present step",
    },
    "DeepSpeedBackend": {"setup zero learns": "what was asked for", "_accept": "of the present step"},
    "PolicyWorker": {"client source sender": "connected anew"},
    "ValueWorker": {},
    "RolloutWorker": {
        "engine version adapter": "weights are published anew; a sample's seed is a function of run, step, prompt and number",
        "ends longest": "of the model and the settings",
    },
    "RewardWorker": {"device codec codecs models sources": "loaded anew; functions keep no state that Troupe knows of"},
}
"""Fields that need not be saved -> why."""


def fields() -> dict[str, set[str]]:
    """Class -> the fields that its methods assign, of all classes named above."""
    found: dict[str, set[str]] = {}
    for path in [*ROOT.glob("orchestrator/**/*.py"), *ROOT.glob("workers/**/*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in DERIVABLE:
                found[node.name] = {
                    target.attr
                    for target in ast.walk(node)
                    if isinstance(target, ast.Attribute)
                    and isinstance(target.ctx, ast.Store)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                }
    return found


@pytest.mark.parametrize("name", DERIVABLE)
def test_every_field_is_saved_or_follows(name: str) -> None:
    declared = SAVED.get(name, set()) | {field for names in DERIVABLE[name] for field in names.split()}
    assert fields()[name] == declared, "say of a new field how a resumed run gets it, and save it where it must"


def test_a_controller_goes_on_where_it_was() -> None:
    for settings in (FixedKL(coefficient=0.3), AdaptiveKL(coefficient=0.3, target=0.1, horizon=100)):
        first, second = make_controller(settings), make_controller(settings)
        for kl in (0.3, 0.2, 0.01):
            first.update(kl, 50)
        second.load(first.state())
        assert vars(second) == vars(first)


class Stateless:
    """What a Runner asks of an algorithm for its state: nothing of its own."""

    name, run = "ppo", None

    def state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("key", ["skipped", "refused"])
def test_the_count_of_skipped_steps_is_read_under_its_old_name_too(key: str) -> None:
    """Checkpoints of Troupe before this name have `refused`."""
    runner = Runner(Stateless(), Console())  # type: ignore[arg-type]
    runner.set_state({key: 3})
    assert runner.state() == {"skipped": 3}
