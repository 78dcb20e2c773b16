"""Predicted and measured memory of single processes on this machine's CPU.

    python -m benchmarks.predicted [--only PART_OF_A_NAME] [--json FILE]

Each case is a trainer (two optimizer steps over two micro-batches of 4 rows of 256 tokens, after one unmeasured step) or an
engine (16 answers of 64 tokens) with a random model, in subprocesses without Ray that have the workers' malloc settings
(workers.process.malloc). Peak: the highest resident set minus memory shared with other processes, so the proportional set size at
its peak. Fixed: the memory of the runtime, which is subtracted on both sides: the peak of a model of 0.2 million parameters minus
its prediction. The last line is the largest error; the exit status is 1 if it exceeds 12%.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import peaks
from configs.schema import Role, RunConfig, Strategy
from placement.memory.phases import ENGINE_RUNTIME, TRAINER_RUNTIME, PassSize, engine_memory, trainer_memory
from placement.memory.states import Model, Sharding
from placement.models import Adapters, Architecture
from placement.types import GIB, MIB
from workers.process import malloc
from workers.process.worker import WorkerSpec, environment
from workers.training.schedule import StageStep

ROWS, LENGTH, ANSWERS, NEW_TOKENS, KV_CACHE = 4, 256, 16, 64, 0.25
STEPS = 3
BOUND = 0.12
ROLES: dict[str, Role] = {"policy": "actor", "value": "reward", "engine": "rollout"}
Step = Callable[[int], object]
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
    """One case. `kind`: policy (demonstrations), value (pairs) or engine."""

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
        """Bytes beyond the runtime: at the peak, and held after the step."""
        shape = Architecture.read(_CONFIGS[self.shape])
        adapters = Adapters(self.lora) if self.lora else None
        model = Model(shape, self.size, self.kind == "value", adapters)
        if self.kind == "engine":
            served = engine_memory(model, "cpu", 1, int(KV_CACHE * GIB), ANSWERS, 0, None)
            return served["generate"].host.total - ENGINE_RUNTIME, served["save"].host.total - ENGINE_RUNTIME
        sides = 2 if self.kind == "value" else 1
        work = PassSize(sides * ROWS * LENGTH, LENGTH, self.model.get("gradient_checkpointing", False))
        narrow = self.model.get("optimizer_dtype") == "bfloat16"
        sharding = Sharding(self.strategy, self.ranks, "cpu", 2 if narrow else 4)
        uses = trainer_memory(model, sharding, work, scores=False)
        return uses["train"].host.total - TRAINER_RUNTIME, uses["weight_sync"].host.total - TRAINER_RUNTIME


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
    """Bytes of the first rank's process: at the peak, and held after the step."""
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), case.shape)
        config = case.config(Path(folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = max(1, (os.cpu_count() or 1) // case.ranks)
        os.environ |= environment(config, ROLES[case.kind], "cpu", threads)
        context = get_context("spawn" if case.kind == "engine" else "forkserver")
        if case.kind != "engine":
            context.set_forkserver_preload(["workers.training.policy", "workers.training.value"])
        ends = []
        for rank in range(case.ranks):
            ours, theirs = context.Pipe(duplex=False)
            spec = WorkerSpec(config, ROLES[case.kind], rank, case.ranks, "cpu", threads)
            process = context.Process(target=run, args=(case.kind, spec, port, theirs), daemon=True)  # type: ignore[attr-defined]
            process.start()
            theirs.close()
            ends.append((process, ours))
        measured = [end.recv() for _, end in ends]
        for process, _ in ends:
            process.join()
        peak, held = measured[0]
        return peak, held


def run(kind: str, spec: WorkerSpec, port: int, end: Any) -> None:
    """Run one rank in this process."""
    malloc.configure(spec.role)
    import torch

    torch.set_num_threads(spec.threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(spec.rank), "WORLD_SIZE": str(spec.world_size), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    end.send(_watch({"policy": policy, "value": value, "engine": serving}[kind](spec)))


def _write_model(folder: Path, shape: str) -> None:
    from tests.support.models import make_tokenizer

    (folder / "config.json").write_text(json.dumps(_CONFIGS[shape] | {"eos_token_id": 1, "pad_token_id": 0}))
    make_tokenizer().save_pretrained(folder)


def _rows(vocabulary: int) -> list[Any]:
    import numpy as np

    from workers.data import Sample

    drawn = np.random.default_rng(1).integers(2, vocabulary, (2 * ROWS, LENGTH), np.int32)
    return [Sample.of(ids[: LENGTH // 2], ids[LENGTH // 2 :]) for ids in drawn]


def policy(spec: WorkerSpec) -> Step:
    """A training step on demonstrations."""
    import numpy as np

    from workers.data.step_inputs import SupervisedBatch
    from workers.training.policy import PolicyWorker

    worker = PolicyWorker(spec)
    assert spec.config.sft
    worker.load(spec.config.model.path, spec.config.model, spec.config.sft.optimizer)
    worker.datasets["rows"] = _rows(worker.model.hf.config.vocab_size)
    tokens = ROWS * LENGTH * spec.world_size
    part = SupervisedBatch("rows", [np.arange(ROWS), np.arange(ROWS, 2 * ROWS)], tokens)
    return lambda step: worker.train_demonstrations(part, StageStep(step, STEPS), (1, step))


def value(spec: WorkerSpec) -> Step:
    """A training step on pairs."""
    import numpy as np

    from workers.data import Preference
    from workers.data.step_inputs import SupervisedBatch
    from workers.training.value import ValueWorker

    worker = ValueWorker(spec)
    assert spec.config.rm
    worker.load(spec.config.model.path, spec.config.model, spec.config.rm.optimizer)
    rows = _rows(worker.model.hf.config.vocab_size)
    worker.datasets["rows"] = [Preference(a, b, 0.0) for a, b in zip(rows, rows[::-1], strict=True)]
    part = SupervisedBatch("rows", [np.arange(ROWS), np.arange(ROWS, 2 * ROWS)], 2 * ROWS * spec.world_size)
    return lambda step: worker.train_pairs(part, StageStep(step, STEPS), (1, step))


def serving(spec: WorkerSpec) -> Step:
    """A generation step."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from workers.data.samples import RaggedArray
    from workers.rollout.engine import RolloutWorker

    path, dtype = spec.config.model.path, getattr(torch, spec.config.model.dtype)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype).save_pretrained(path)
    worker = RolloutWorker(spec)
    worker.load(path, "object_store", LENGTH)
    worker.datasets["rows"] = RaggedArray.of([row.ids[: LENGTH - NEW_TOKENS] for row in _rows(1024)] * 2, np.int32)
    prompts = np.arange(ANSWERS)
    return lambda step: worker.generate("rows", prompts, np.zeros_like(prompts), step)


def _watch(step: Step) -> tuple[int, int]:
    """One unmeasured step, then the measured ones. Returns the bytes at the peak, and held."""
    step(1)
    malloc.give_back()
    peaks.reset()
    for k in range(2, STEPS + 1):
        step(k)
    peak = peaks.highest()
    malloc.give_back()
    others = peaks.resident() - _proportional()
    return peak - others, _proportional()


def _proportional() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


# ---------------------------------------------------------------- table


def main(
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Add the results to this file.")] = None,
) -> None:
    """Measure, and print a row for each case in MiB beyond the runtime."""
    cases = [case for case in CASES if only in case.name]
    if not cases:
        raise typer.BadParameter(f"no case's name contains {only!r}; one is {CASES[0].name!r}", param_hint="--only")
    if file and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file}: the folder {file.parent} does not exist", param_hint="--json")
    results: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}
    print(f"{'case':64} {'fixed':>6} {'peak':>6} {'pred.':>6} {'error':>6} {'held':>6} {'pred.':>6} {'error':>6}")
    for case in cases:
        small = Case("tiny", case.kind, ranks=case.ranks, lora=case.lora)
        if small.name not in results:
            results[small.name] = [a - b for a, b in zip(measure(small), small.predicted(), strict=True)]
        fixed: list[int] = results[small.name]
        peak, held = (a - b for a, b in zip(measure(case), fixed, strict=True))
        predicted = case.predicted()
        print(
            f"{case.name:64} {fixed[0] // MIB:6} {peak // MIB:6} {predicted[0] // MIB:6} {predicted[0] / peak - 1:6.1%} "
            f"{held // MIB:6} {predicted[1] // MIB:6} {predicted[1] / held - 1:6.1%}",
            flush=True,
        )
        results[case.name] = [peak, held]
        if file:
            file.write_text(json.dumps(results, indent=1))
    measured = [(case, results[case.name]) for case in CASES if case.name in results]
    worst = max(abs(case.predicted()[0] / peak - 1) for case, (peak, _) in measured)
    print(f"{len(measured)} cases, largest error of a peak: {worst:.1%}")
    if worst > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
