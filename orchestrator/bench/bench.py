"""`troupe bench`: PPO on random prompts, with four random models of one size, in the normal training loop.

The successor of Colossal-AI's benchmark_gpt_dummy.py, with its flags and defaults; docs/bench.md lists the differences.
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
from orchestrator.api import resume
from orchestrator.bench.process_memory import MemoryMonitor
from orchestrator.run import Run, RunError
from orchestrator.storage import read_metrics
from orchestrator.worker_groups.team import Team
from placement.models import KV_BLOCK, LADDER, Architecture, SampleFlops, preset_config

PROMPTS = 1000
_MAKE_RANDOM_MODEL = (
    "import troupe.imports, runpy; "
    "runpy.run_module('workers.models.random_models', run_name='__main__', alter_sys=True)"
)
"""Instead of `python -m workers.models.random_models`: a user's folder may have another module of that name."""
PHASES = ("generate", "score", "train", "weight_sync")
MODELS: tuple[Role, ...] = ("actor", "critic", "reference", "reward")


@dataclass(frozen=True)
class Benchmark:
    """The settings of a benchmark: the original's flags, and ours."""

    model: str
    """A preset size, or a config.json."""
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
        """PPO steps: the original trains once every `update_timesteps` timesteps, counted over the episodes."""
        steps, rest = divmod(self.num_episodes * self.max_timesteps, self.update_timesteps)
        if rest or not steps:
            raise RunError(
                f"--update_timesteps: was {self.update_timesteps}, which does not divide the {self.num_episodes} x "
                f"{self.max_timesteps} timesteps (--num_episodes, --max_timesteps): the rest would not be trained on"
            )
        return steps

    @property
    def warm_up_steps(self) -> int:
        """Steps of the first episode. Like the original, do not count them if there are others."""
        return min(-(-self.max_timesteps // self.update_timesteps), self.steps - 1)

    @property
    def shares_reward(self) -> bool:
        """Whether reward model and critic are adapters on the base. Otherwise the reward model, from which the critic starts, is
        a second model, as in real runs."""
        shared = {"critic", "reward"} & set(self.share)
        if len(shared) == 1:
            raise RunError(
                f"--share: has only {shared.pop()} of critic and reward; needs both, as the critic starts from the reward model"
            )
        return bool(shared)

    def shape(self) -> dict[str, Any]:
        """The model's config.json. Raises RunError if it does not exist, or has too few positions."""
        if self.model in LADDER:
            config = preset_config(self.model)
        else:
            path = Path(self.model).expanduser()
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise RunError(f"--model: was {self.model!r}; must be one of {', '.join(LADDER)}, or a config.json")
            config = json.loads(path.read_text(encoding="utf-8"))
        positions = config.get("n_positions") or config.get("max_position_embeddings")
        if positions and self.total > positions:
            raise RunError(f"--lengths: {self.total} tokens in total, but the model has {positions} positions")
        ids = {"bos_token_id": None, "eos_token_id": config["vocab_size"] - 1, "pad_token_id": None}
        return {"initializer_range": 0.02} | config | ids

    def settings(self, folder: Path) -> dict[str, Any]:
        """The run's settings, as in a YAML file. One step is the work of the original between two updates."""
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
            "recovery": {"max_restarts": 0},
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
            **({"shared_base": list(self.share)} if self.share else {}),
        }

    def _kv_cache(self, shape: Architecture) -> int:
        """Bytes for all sequences of an engine, plus one block."""
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


class Measurement(Callback):
    """Measures the workers' memory in each phase, and times start and load."""

    def __init__(self, run: Run, monitor: MemoryMonitor, workers: dict[int, list[Role]]) -> None:
        self.run, self.monitor, self.workers = run, monitor, workers
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self.monitor.phase(name):
            yield
        if name in ("start", "load"):
            self.seconds[name] = time.monotonic() - started
            self.run.write("begun.json", self.seconds)

    def workers_changed(self, team: Team) -> None:
        import ray  # not above: orchestrator.run.ray_cluster sets variables that Ray reads on import

        self.monitor.gpus = team.plan.device == "cuda"
        this_node = ray.util.get_node_ip_address()
        for worker in team.workers():
            if worker["node"] == this_node:  # memory of other nodes cannot be measured
                roles = self.workers.setdefault(worker["pid"], [])
                roles += [role for role in [worker["role"]] if role not in roles]
        self.monitor.also |= self.workers.keys()  # needed on a cluster that this process did not start


def run_benchmark(benchmark: Benchmark, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run the benchmark in a temporary folder (TMPDIR). Returns the measurements as they go into JSON."""
    with tempfile.TemporaryDirectory(prefix="troupe-bench-") as name:
        folder = Path(name)
        shape = benchmark.shape()
        config = make_config(benchmark, overrides, folder)
        architecture = Architecture.read(shape)
        _write_prompts(folder / "prompts.jsonl", benchmark, architecture.vocabulary, config.seed)
        console.print(f"making random models of {architecture.parameters:,} parameters", style="dim")
        size = architecture.parameters * (4 if config.model.dtype == "float32" else 2)
        _check_disk(folder, size * (1 if benchmark.shares_reward else 2))
        _make_models(benchmark, folder, shape, config)
        workers: dict[int, list[Role]] = {}
        with MemoryMonitor(os.getpid()) as monitor:
            run = Run.begin(config, ["ppo"])
            resume(run, console, [Measurement(run, monitor, workers)], export=False)
        return _measured(benchmark, architecture, run, monitor, workers)


def make_config(benchmark: Benchmark, overrides: Sequence[str], folder: Path) -> RunConfig:
    """The run's settings, by way of a file in the folder. Raises ConfigError or RunError."""
    (folder / "settings.yaml").write_text(yaml.safe_dump(benchmark.settings(folder)), encoding="utf-8")
    return load_config(folder / "settings.yaml", overrides)


def _check_disk(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise RunError(
            f"TMPDIR: {folder.parent} has {free / 2**30:.1f} GiB free; the models need {size / 2**30:.1f} GiB"
        )


def _make_models(benchmark: Benchmark, folder: Path, shape: dict[str, Any], config: RunConfig) -> None:
    """Write the policy's folder and the reward model's."""
    model, reward, dtype = folder / "model", folder / "reward", config.model.dtype
    for path in (model, reward):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    _make_random_model("model", model, dtype, config.seed)
    if benchmark.shares_reward:
        _make_random_model("reward", reward, model, benchmark.lora_rank, config.seed)
    else:
        _make_random_model("scorer", reward, dtype, config.seed + 1)


def _make_random_model(*args: Any) -> None:
    """Runs in its own process, because it imports torch."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _MAKE_RANDOM_MODEL, *map(str, args)]
    subprocess.run(command, check=True, env=os.environ | quiet)


def _write_prompts(path: Path, benchmark: Benchmark, vocabulary: int, seed: int) -> None:
    """Prompts of uniformly random words, each one token of the tokenizer of workers.models.random_models; its last two tokens are
    not words."""
    ids = np.random.default_rng(seed).integers(0, vocabulary - 2, (PROMPTS, benchmark.prompt))
    path.write_text("".join(json.dumps({"prompt": " ".join(map(str, row))}) + "\n" for row in ids), encoding="utf-8")


# ---------------------------------------------------------------- measurements


def _measured(
    benchmark: Benchmark,
    shape: Architecture,
    run: Run,
    monitor: MemoryMonitor,
    workers: dict[int, list[Role]],
) -> dict[str, Any]:
    config = run.config  # with `auto` resolved
    assert config.ppo is not None
    lines = read_metrics(run.folder)
    counted = lines[benchmark.warm_up_steps :]
    seconds = {phase: sum(line[f"seconds/{phase}"] for line in counted) for phase in PHASES}
    samples, flops = len(counted) * config.ppo.sequences_per_step, benchmark.flops(config, shape)
    spent = {
        "experience": seconds["generate"] + seconds["score"],
        "learning": seconds["train"],
        "overall": sum(seconds.values()),
    }
    learning = {kind: config.ppo.epochs * getattr(flops, f"learning_{kind}") for kind in ("original", "cached")}
    operations = {
        kind: {
            "experience": getattr(flops, f"experience_{kind}"),
            "learning": learning[kind],
            "overall": getattr(flops, f"experience_{kind}") + learning[kind],
        }
        for kind in learning
    }
    summary = run.read("summary.json")
    names = {pid: "+".join(roles) for pid, roles in workers.items()}
    return {
        "asked": {"model": benchmark.model, "strategy": config.strategy_of("actor"), "precision": config.model.dtype}
        | {
            "lora_rank": benchmark.lora_rank,
            "share": list(benchmark.share),
            "layout": benchmark.layout,
            "devices": benchmark.devices,
        }
        | {
            "prompt": benchmark.prompt,
            "total": benchmark.total,
            "experience_batch_size": benchmark.experience_batch_size,
        }
        | {"train_batch_size": benchmark.train_batch_size, "epochs": config.ppo.epochs, "steps": config.ppo.steps},
        "hardware": summary["hardware"],
        "versions": summary["versions"],
        "parameters": {role: getattr(flops, role) for role in MODELS},
        "counted": {"steps": len(counted), "left_out": benchmark.warm_up_steps, "samples": samples},
        "seconds": run.read("begun.json") | seconds,
        "samples_per_second": {part: samples / spent[part] for part in spent},
        "tflops": {
            kind: {part: samples * operations[kind][part] / spent[part] / 1e12 for part in spent} for kind in operations
        },
        "generation_counted_over": flops.generation_original / flops.generation_cached,
        "experience_counted_over": flops.experience_original / flops.experience_cached,
        "peak_bytes": {
            "total": monitor.total,
            "phases": {
                phase: {"total": peak.total} | _by_role(names, peak.each) for phase, peak in monitor.peaks.items()
            },
            "roles": _by_role(names, monitor.each()),
            "devices": _by_role(names, monitor.devices()),
        },
    }


def _by_role(names: dict[int, str], sizes: dict[int, int]) -> dict[str, int]:
    """Role -> bytes of its workers, each at its own peak."""
    by_role: dict[str, int] = defaultdict(int)
    for pid, name in names.items():
        if pid in sizes:
            by_role[name] += sizes[pid]
    return dict(by_role)
