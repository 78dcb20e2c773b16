"""Predicted memory beside measured memory, process by process, on this machine's CPU.

    python -m benchmarks.predicted [--only PART_OF_A_NAME] [--json FILE]

Each case is a trainer (an optimizer step over two micro-batches of 4 rows of 128 tokens, twice, after one that was not
measured) or an engine (16 answers of 64 tokens) with a random model, in fresh processes without Ray. Peak: the highest
resident set of that time less what other processes share of it, so the proportional set size at its peak. Fixed: the same
of a model of 0.2 million parameters, less what is predicted for that; it is the runtime's share, and left out on both sides.
The last line is the largest error; it exits with an error where that is above 12%.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.schema import RunConfig, Strategy
from placement.activations import Adapters
from placement.architecture import Architecture
from placement.memory import Model, Sharding
from placement.phases import ENGINE_RUNTIME, TRAINER_RUNTIME, Work, engine, trainer
from placement.places import GIB, MIB
from workers.worker import environment

ROWS, LENGTH, ANSWERS, NEW_TOKENS, KV_CACHE = 4, 128, 16, 64, 0.25
BOUND = 0.12
RUNS = {"policy": "policy", "value": "value", "engine": "serving"}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "gpt2", "vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt2 124M": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "llama 51M": {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "tie_word_embeddings": False,
    },
    "llama 135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    },
    "qwen2 79M": {
        "model_type": "qwen2",
        "vocab_size": 32768,
        "hidden_size": 640,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "intermediate_size": 1728,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Case:
    """One combination. `kind`: policy (demonstrations), value (pairs) or engine."""

    shape: str
    kind: str = "policy"
    strategy: Strategy = "ddp"
    ranks: int = 1
    dtype: str = "float32"
    lora: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    """Further settings of the model."""

    @property
    def name(self) -> str:
        words = [self.kind, self.shape, self.dtype]
        if self.kind != "engine":
            words += [self.strategy, f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"]
        words += [f"LoRA {self.lora}"] if self.lora else []
        return ", ".join([*words, *(name.replace("_", " ") for name in self.model)])

    @property
    def size(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def config(self, folder: Path) -> RunConfig:
        data, adam = {"path": "rows.jsonl"}, {"lr": 1e-4}
        supervised = {"train": data, "optimizer": adam}
        model = {"path": str(folder), "init": "random", "dtype": self.dtype} | self.model
        if self.lora:
            model["lora"] = {"rank": self.lora}
        return RunConfig.model_validate(
            {
                "name": "memory",
                "model": model,
                "strategy": self.strategy,
                "sft": supervised,
                "rm": supervised,
                "rollout": {
                    "kv_cache_gib": KV_CACHE,
                    "max_new_tokens": NEW_TOKENS,
                    "max_sequences": ANSWERS,
                    "ignore_eos": True,
                },
            }
        )

    def predicted(self) -> tuple[int, int]:
        """Bytes beyond the runtime: at the peak, and held after it."""
        shape = Architecture.read(_CONFIGS[self.shape])
        adapters = Adapters(self.lora) if self.lora else None
        model = Model(shape, self.size, self.kind == "value", adapters)
        if self.kind == "engine":
            served = engine(model, "cpu", 1, int(KV_CACHE * GIB), ANSWERS, 0, None)
            return served["generate"].host.total - ENGINE_RUNTIME, served["save"].host.total - ENGINE_RUNTIME
        sides = 2 if self.kind == "value" else 1
        work = Work(sides * ROWS * LENGTH, LENGTH, self.model.get("gradient_checkpointing", False))
        narrow = self.model.get("optimizer_dtype") == "bfloat16"
        sharding = Sharding(self.strategy, self.ranks, "cpu", 2 if narrow else 4)
        uses = trainer(model, sharding, work, scores=False)
        return uses["train"].host.total - TRAINER_RUNTIME, uses["publish"].host.total - TRAINER_RUNTIME


_CONFIGS = {name: {"n_positions": 1024, "max_position_embeddings": 1024} | config for name, config in CONFIGS.items()}

CASES = (
    Case("gpt2 124M"),
    Case("llama 135M", model={"gradient_checkpointing": True}),
    Case("llama 51M", ranks=2),
    Case("qwen2 79M", dtype="bfloat16"),
    Case("gpt2 124M", kind="value"),
    Case("gpt2 124M", lora=16),
    Case("llama 135M", lora=8, dtype="bfloat16"),
    Case("gpt2 124M", strategy="zero1", ranks=2),
    Case("qwen2 79M", strategy="zero1", ranks=2, dtype="bfloat16", model={"optimizer_dtype": "bfloat16"}),
    Case("gpt2 124M", strategy="zero2", ranks=2),
    Case("llama 51M", strategy="zero2", ranks=2, dtype="bfloat16"),
    Case("qwen2 79M", strategy="zero2", ranks=2, lora=16),
    Case("gpt2 124M", strategy="zero3"),
    Case("gpt2 124M", strategy="zero3", ranks=2),
    Case("qwen2 79M", strategy="zero3", ranks=2, dtype="bfloat16"),
    Case("llama 51M", strategy="zero1_offload"),
    Case("gpt2 124M", strategy="zero2_offload", ranks=2),
    Case("gpt2 124M", strategy="zero3_offload"),
    Case("qwen2 79M", strategy="zero3_offload", ranks=2, dtype="bfloat16"),
    Case("gpt2 124M", kind="engine"),
    Case("llama 135M", kind="engine"),
    Case("qwen2 79M", kind="engine", dtype="bfloat16"),
)


# ---------------------------------------------------------------- measuring


def measure(case: Case) -> tuple[int, int]:
    """Bytes of the first rank's process: at the peak, and held after it."""
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), case.shape)
        config = case.config(Path(folder))
        role: Any = {"policy": "actor", "value": "reward", "engine": "rollout"}[case.kind]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(case.ranks):
            env = os.environ | environment(config, role, "cpu", max(1, (os.cpu_count() or 1) // case.ranks))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank)}
            env |= {"WORLD_SIZE": str(case.ranks), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
            command = [sys.executable, "-c", f"from benchmarks import predicted; predicted.{RUNS[case.kind]}()"]
            started.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        asked = json.dumps({"config": config.model_dump(mode="json"), "role": role, "ranks": case.ranks})
        for process in started:
            assert process.stdin
            process.stdin.write(asked)
            process.stdin.close()
        said = [process.stdout.read() if process.stdout else "" for process in started]
        if any(process.wait() for process in started):
            raise RuntimeError(f"{case.name}: a process failed")
    peak, held = json.loads(said[0].splitlines()[-1])
    return peak, held


def _write_model(folder: Path, shape: str) -> None:
    from tests.models import make_tokenizer

    (folder / "config.json").write_text(json.dumps(_CONFIGS[shape] | {"eos_token_id": 1, "pad_token_id": 0}))
    make_tokenizer().save_pretrained(folder)


def _spec() -> Any:
    """Of this process, from what it was told."""
    from workers.worker import WorkerSpec

    sys.modules["triton"] = None  # type: ignore[assignment]  # as in workers/host.py
    told = json.load(sys.stdin)
    config, rank = RunConfig.model_validate(told["config"]), int(os.environ["RANK"])
    return WorkerSpec(config, told["role"], rank, told["ranks"], "cpu", int(os.environ["OMP_NUM_THREADS"]))


def _rows(vocabulary: int) -> list[Any]:
    import numpy as np

    from workers.data import Sequence

    drawn = np.random.default_rng(int(os.environ["RANK"])).integers(2, vocabulary, (2 * ROWS, LENGTH), np.int32)
    return [Sequence(ids, LENGTH // 2) for ids in drawn]


def policy() -> None:
    """A process that learns from demonstrations."""
    import numpy as np

    from workers.policy import PolicyWorker
    from workers.work import Part

    spec = _spec()
    worker = PolicyWorker(spec)
    assert spec.config.sft
    worker.load(spec.config.model.path, spec.config.model, spec.config.sft.optimizer)
    worker.sequences["rows"] = _rows(worker.model.hf.config.vocab_size)
    part = Part("rows", [np.arange(ROWS), np.arange(ROWS, 2 * ROWS)], 2 * ROWS * LENGTH // 2 * spec.world_size)
    _watch(lambda step: worker.train_demonstrations(part, 0.5, (1, step)))


def value() -> None:
    """A process that learns from pairs."""
    import numpy as np

    from workers.trainer import Preference
    from workers.value import ValueWorker
    from workers.work import Part

    spec = _spec()
    worker = ValueWorker(spec)
    assert spec.config.rm
    worker.load(spec.config.model.path, spec.config.model, spec.config.rm.optimizer)
    rows = _rows(worker.model.hf.config.vocab_size)
    worker.sequences["rows"] = [Preference(a, b, 0.0) for a, b in zip(rows, rows[::-1], strict=True)]
    part = Part("rows", [np.arange(ROWS), np.arange(ROWS, 2 * ROWS)], 2 * ROWS * spec.world_size)
    _watch(lambda step: worker.train_pairs(part, 0.5, (1, step)))


# `engine` is the memory model's name here.
def serving() -> None:
    """A process that answers prompts."""
    import numpy as np
    from transformers import AutoConfig, AutoModelForCausalLM

    from workers.rollout import RolloutWorker

    spec = _spec()
    path = spec.config.model.path
    import torch

    AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(path), dtype=getattr(torch, spec.config.model.dtype)
    ).save_pretrained(path)
    worker = RolloutWorker(spec)
    worker.load(path, "object_store", LENGTH)
    worker.prompts = {"rows": [row.ids[: LENGTH - NEW_TOKENS].tolist() for row in _rows(1024)] * 2}
    prompts = np.arange(ANSWERS)
    _watch(lambda step: worker.generate("rows", prompts, np.zeros_like(prompts), step))


def _watch(step: Any) -> None:
    """One step to settle, then two that are measured. Prints [peak, held]."""
    import ctypes

    def trim() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # as workers/host.py does after each call

    step(1)
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    step(2)
    step(3)
    peak = _status("VmHWM")
    trim()
    others = _status("VmRSS") - _proportional()
    print(json.dumps([peak - others, _proportional()]))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _proportional() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


# ---------------------------------------------------------------- table


def main(
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Add the results to this file.")] = None,
) -> None:
    """Measure, and print a row for each case in MiB beyond the runtime."""
    fixed: dict[tuple[str, int, bool], tuple[int, int]] = {}
    results: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}
    print(f"{'case':64} {'fixed':>6} {'peak':>6} {'said':>6} {'error':>6} {'held':>6} {'said':>6} {'error':>6}")
    for case in (case for case in CASES if only in case.name):
        kind = (case.kind, case.ranks, case.lora is not None)
        if kind not in fixed:
            small = Case("tiny", case.kind, ranks=case.ranks, lora=case.lora)
            fixed[kind] = tuple(a - b for a, b in zip(measure(small), small.predicted(), strict=True))  # type: ignore[assignment]
        found = [a - b for a, b in zip(measure(case), fixed[kind], strict=True)]
        row = [round(x / MIB) for x in (fixed[kind][0], found[0], case.predicted()[0], found[1], case.predicted()[1])]
        errors = [row[2] / row[1] - 1, row[4] / row[3] - 1]
        print(
            f"{case.name:64} {row[0]:6} {row[1]:6} {row[2]:6} {errors[0]:6.1%} {row[3]:6} {row[4]:6} {errors[1]:6.1%}",
            flush=True,
        )
        results[case.name] = {"fixed": row[0], "peak": row[1], "said": row[2], "held": row[3], "held_said": row[4]}
        if file:
            file.write_text(json.dumps(results, indent=1))
    worst = max(abs(row["said"] / row["peak"] - 1) for row in results.values())
    print(f"largest error of a peak: {worst:.1%}")
    if worst > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
