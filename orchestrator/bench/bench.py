"""`troupe bench`: PPO on random prompts, with all four models of one size drawn at random. The loop is the one that trains.

The successor of Colossal-AI's benchmark_gpt_dummy.py, with its flags and its defaults; docs/bench.md says what differs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from configs import RunConfig, load_config
from configs.schema import ROLES, Role
from orchestrator.algorithms import Callback
from orchestrator.api import go_on
from orchestrator.bench.process_memory import Footprint
from orchestrator.run.run_dir import Run, RunError
from orchestrator.storage.metrics_file import read_metrics
from orchestrator.worker_groups.team import Team
from placement.models import KV_BLOCK, LADDER, Architecture, SampleFlops, preset_config

PROMPTS = 1000
_RUN_DRAWING = (
    "import troupe.imports, runpy; "
    "runpy.run_module('workers.models.random_models', run_name='__main__', alter_sys=True)"
)
"""In place of `python -m workers.models.random_models`, which in a user's folder might be another module."""
PHASES = ("generate", "score", "train", "publish")
MODELS: tuple[Role, ...] = ("actor", "critic", "reference", "reward")


@dataclass(frozen=True)
class Benchmark:
    """What is asked for: the original's flags, and ours."""

    model: str
    """A name of the ladder, or a config.json."""
    strategy: str
    experience_batch_size: int
    train_batch_size: int
    num_episodes: int
    max_timesteps: int
    update_timesteps: int
    max_epochs: int
    lora_rank: int
    share: tuple[str, ...]
    layout: str
    devices: int
    precision: str
    prompt: int
    """Tokens of a prompt."""
    total: int
    """Tokens of a prompt and its answer."""

    @property
    def steps(self) -> int:
        """The original learns once every `update_timesteps` timesteps, counted over the episodes."""
        steps, rest = divmod(self.num_episodes * self.max_timesteps, self.update_timesteps)
        if rest or not steps:
            raise RunError(
                f"--update_timesteps: was {self.update_timesteps}, which does not divide the {self.num_episodes} x "
                f"{self.max_timesteps} timesteps (--num_episodes, --max_timesteps): what is left over would not be learnt from"
            )
        return steps

    @property
    def left_out(self) -> int:
        """Steps of the first episode, which the original does not count either where there are others."""
        return min(-(-self.max_timesteps // self.update_timesteps), self.steps - 1)

    @property
    def shares_reward(self) -> bool:
        """Whether reward model and critic are adapters on the base. Else the reward model, from which the critic starts, is one
        of its own, as a real one is another model than the policy."""
        shared = {"critic", "reward"} & set(self.share)
        if len(shared) == 1:
            raise RunError(
                f"--share: has {shared.pop()} alone of critic and reward, and the critic starts from the reward model"
            )
        return bool(shared)

    def shape(self) -> dict[str, Any]:
        """The model's config.json. Raises RunError where there is none, or it has too few positions."""
        if self.model in LADDER:
            found = preset_config(self.model)
        else:
            named = Path(self.model).expanduser()
            path = named / "config.json" if named.is_dir() else named
            if not path.is_file():
                raise RunError(f"--model: was {self.model!r}; must be one of {', '.join(LADDER)}, or a config.json")
            found = json.loads(path.read_text(encoding="utf-8"))
        most = found.get("n_positions") or found.get("max_position_embeddings")
        if most and self.total > most:
            raise RunError(f"--lengths: {self.total} tokens in all, and the model has {most} positions")
        ids = {"bos_token_id": None, "eos_token_id": found["vocab_size"] - 1, "pad_token_id": None}
        return {"initializer_range": 0.02} | found | ids

    def settings(self, folder: Path) -> dict[str, Any]:
        """The run's settings, as in a YAML file. One step is what the original did between two updates."""
        model = str(folder / "model")
        sequences = self.experience_batch_size * self.devices * self.update_timesteps
        return {
            "name": "bench",
            "runs": str(folder / "runs"),
            "strategy": self.strategy,
            "model": {
                "path": model,
                "dtype": self.precision,
                "lora": {"rank": self.lora_rank} if self.lora_rank else None,
            },
            "placement": {"layout": self.layout, "devices": dict.fromkeys(ROLES, self.devices)},
            "rollout": {
                "max_new_tokens": self.total - self.prompt,
                "ignore_eos": True,
                "max_sequences": self.experience_batch_size,
                "kv_cache_gib": self._kv_cache(Architecture.read(self.shape())) / 2**30,
            },
            "recovery": {"restarts": 0},
            "ppo": {
                "prompts": {"path": str(folder / "prompts.jsonl")},
                "steps": self.steps,
                "prompts_per_step": sequences,
                "epochs": self.max_epochs,
                "mini_batches": max(1, sequences // (self.train_batch_size * self.devices)),
                "micro_batch_tokens": self.train_batch_size * self.total,
                "max_prompt_tokens": self.prompt,
                "rewards": [{"kind": "model", "path": str(folder / "reward")}],
                "actor_optimizer": {"lr": 5e-6},
                "critic_optimizer": {"lr": 5e-6},
            },
            **({"share": list(self.share)} if self.share else {}),
        }

    def _kv_cache(self, shape: Architecture) -> int:
        """Bytes for all sequences of an engine, and a block beside them."""
        blocks = self.experience_batch_size * math.ceil(self.total / KV_BLOCK) + 1
        return blocks * KV_BLOCK * shape.kv_bytes(4 if self.precision == "float32" else 2)

    def flops(self, config: RunConfig, shape: Architecture) -> SampleFlops:
        lm, scalar = shape.parameters, shape.scalar_parameters
        return SampleFlops(
            actor=lm,
            critic=scalar,
            reference=lm,
            reward=scalar,
            prompt=self.prompt,
            total=self.total,
            checkpointing=config.model.gradient_checkpointing,
            frozen_base=config.model.lora is not None,
        )


class Watch(Callback):
    """Watches the workers' memory, phase by phase, and times start and load."""

    def __init__(self, run: Run, footprint: Footprint, workers: dict[int, list[Role]]) -> None:
        self.run, self.footprint, self.workers = run, footprint, workers
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self.footprint.phase(name):
            yield
        if name in ("start", "load"):
            self.seconds[name] = time.monotonic() - started
            self.run.write("begun.json", self.seconds)

    def workers_changed(self, team: Team) -> None:
        import ray  # not above: orchestrator.run.ray_cluster sets what Ray reads when it is imported

        self.footprint.gpus = team.plan.device == "cuda"
        here = ray.util.get_node_ip_address()
        for worker in team.workers():
            if worker["node"] == here:  # of other nodes nothing is seen from here
                roles = self.workers.setdefault(worker["pid"], [])
                roles += [role for role in [worker["role"]] if role not in roles]
        self.footprint.also |= self.workers.keys()  # where the cluster was there before the run


def bench(asked: Benchmark, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run the benchmark in a temporary folder (TMPDIR); what was measured, as it goes into JSON."""
    with tempfile.TemporaryDirectory(prefix="troupe-bench-") as name:
        folder = Path(name)
        shape = asked.shape()
        config = configured(asked, overrides, folder)
        architecture = Architecture.read(shape)
        _write_prompts(folder / "prompts.jsonl", asked, architecture.vocabulary, config.seed)
        console.print(f"drawing models of {architecture.parameters:,} parameters", style="dim")
        size = architecture.parameters * (4 if config.model.dtype == "float32" else 2)
        _check_disk(folder, size * (1 if asked.shares_reward else 2))
        _draw_models(asked, folder, shape, config)
        workers: dict[int, list[Role]] = {}
        with Footprint(os.getpid()) as footprint:
            run = Run.begin(config, ["ppo"])
            go_on(run, console, [Watch(run, footprint, workers)], export=False)
        return _measured(asked, architecture, run, footprint, workers)


def configured(asked: Benchmark, overrides: Sequence[str], folder: Path) -> RunConfig:
    """The run's settings, for which a file is written into the folder. Raises ConfigError or RunError."""
    (folder / "settings.yaml").write_text(yaml.safe_dump(asked.settings(folder)), encoding="utf-8")
    return load_config(folder / "settings.yaml", overrides)


def _check_disk(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise RunError(
            f"TMPDIR: {folder.parent} has {free / 2**30:.1f} GiB free; the models take {size / 2**30:.1f} GiB there"
        )


def _draw_models(asked: Benchmark, folder: Path, shape: dict[str, Any], config: RunConfig) -> None:
    """A folder for the policy and one for the reward model."""
    model, reward, dtype = folder / "model", folder / "reward", config.model.dtype
    for path in (model, reward):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    _draw("model", model, dtype, config.seed)
    if asked.shares_reward:
        _draw("reward", reward, model, asked.lora_rank, config.seed)
    else:
        _draw("scorer", reward, dtype, config.seed + 1)


def _draw(*args: Any) -> None:
    """In a process of its own, since it takes torch."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _RUN_DRAWING, *map(str, args)]
    subprocess.run(command, check=True, env=os.environ | quiet)


def _write_prompts(path: Path, asked: Benchmark, vocabulary: int, seed: int) -> None:
    """Words that the tokenizer of workers.models.random_models takes for one token each, drawn evenly; its last two are none."""
    ids = np.random.default_rng(seed).integers(0, vocabulary - 2, (PROMPTS, asked.prompt))
    path.write_text("".join(json.dumps({"prompt": " ".join(map(str, row))}) + "\n" for row in ids), encoding="utf-8")


# ---------------------------------------------------------------- what was measured


def _measured(
    asked: Benchmark,
    shape: Architecture,
    run: Run,
    footprint: Footprint,
    workers: dict[int, list[Role]],
) -> dict[str, Any]:
    config = run.config  # in which `auto` has become a strategy
    assert config.ppo is not None
    lines = read_metrics(run.folder)
    counted = lines[asked.left_out :]
    seconds = {phase: sum(line[f"seconds/{phase}"] for line in counted) for phase in PHASES}
    samples, flops = len(counted) * config.ppo.sequences_per_step, asked.flops(config, shape)
    spent = {
        "experience": seconds["generate"] + seconds["score"],
        "learning": seconds["train"],
        "overall": sum(seconds.values()),
    }
    learnt = {kind: config.ppo.epochs * getattr(flops, f"learning_{kind}") for kind in ("original", "cached")}
    operations = {
        kind: {
            "experience": getattr(flops, f"experience_{kind}"),
            "learning": learnt[kind],
            "overall": getattr(flops, f"experience_{kind}") + learnt[kind],
        }
        for kind in learnt
    }
    summary = run.read("summary.json")
    names = {pid: "+".join(roles) for pid, roles in workers.items()}
    return {
        "asked": {"model": asked.model, "strategy": config.strategy_of("actor"), "precision": config.model.dtype}
        | {"lora_rank": asked.lora_rank, "share": list(asked.share), "layout": asked.layout, "devices": asked.devices}
        | {"prompt": asked.prompt, "total": asked.total, "experience_batch_size": asked.experience_batch_size}
        | {"train_batch_size": asked.train_batch_size, "epochs": config.ppo.epochs, "steps": config.ppo.steps},
        "hardware": summary["hardware"],
        "versions": summary["versions"],
        "parameters": {role: getattr(flops, role) for role in MODELS},
        "counted": {"steps": len(counted), "left_out": asked.left_out, "samples": samples},
        "seconds": run.read("begun.json") | seconds,
        "samples_per_second": {part: samples / spent[part] for part in spent},
        "tflops": {
            kind: {part: samples * operations[kind][part] / spent[part] / 1e12 for part in spent} for kind in operations
        },
        "generation_counted_over": flops.generation_original / flops.generation_cached,
        "experience_counted_over": flops.experience_original / flops.experience_cached,
        "peak_bytes": {
            "total": footprint.total,
            "phases": {
                phase: {"total": peak.total} | _by_role(names, peak.each) for phase, peak in footprint.peaks.items()
            },
            "roles": _by_role(names, footprint.each()),
            "devices": _by_role(names, footprint.devices()),
        },
    }


def _by_role(names: dict[int, str], sizes: dict[int, int]) -> dict[str, int]:
    """Bytes of the workers of each role, each at its own highest moment."""
    found: dict[str, int] = defaultdict(int)
    for pid, name in names.items():
        if pid in sizes:
            found[name] += sizes[pid]
    return dict(found)
