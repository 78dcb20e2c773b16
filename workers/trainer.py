"""A rank that holds a model, and trains it with DeepSpeed where the role learns."""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.schema import ModelSettings, OptimizerSettings
from workers.data import Codec, RowKind, Sequence
from workers.files import Files, read_files, write_files
from workers.models import LanguageModel, ScalarModel, add_lora, load_hf, load_tokenizer
from workers.weights import GatheredWeights, gathered
from workers.worker import Worker, WorkerSpec

# The op serves only inference_all_reduce, and building it would need a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_BUCKET_ELEMENTS = 16_000_000
"""Elements that are reduced or gathered at a time."""


def learning_rate(settings: OptimizerSettings, progress: float) -> float:
    """Rate at `progress` in [0, 1) of a stage: linear warm-up, then the schedule. There is no state to save."""
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    rest = (progress - settings.warmup) / (1.0 - settings.warmup) if settings.warmup < 1 else 0.0
    factor = {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1.0 + math.cos(math.pi * rest))}[
        settings.schedule
    ]
    return settings.lr * factor


@dataclass(frozen=True)
class Preference:
    """A tokenised pair."""

    chosen: Sequence
    rejected: Sequence
    margin: float


class Trainer(Worker):
    """Builds, trains, saves and exports one model."""

    scalar = False
    """Whether the model has a scalar head."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # touches all memory
        self.device = torch.device(spec.device)
        self.model: LanguageModel | ScalarModel
        self.engine: deepspeed.DeepSpeedEngine | None = None
        self.peft: Any = None
        self.sequences: dict[str, list[Any]] = {}

    # ------------------------------------------------------------ building

    def load(
        self, path: str, settings: ModelSettings, optimizer: OptimizerSettings | None, dropout: float = 0.0
    ) -> int:
        """Build the model from a folder; with an optimizer it learns, without it is frozen. Returns its parameter count."""
        self.tokenizer = load_tokenizer(path, settings.trust_remote_code)
        self.codec = Codec(self.tokenizer, self.config.chat_template)
        self.path, self.settings, self.optimizer_settings = path, settings, optimizer
        self._meet("gloo" if self.device.type == "cpu" else "nccl")
        hf = load_hf(settings, path, self.scalar, self.config.seed)
        count = sum(p.numel() for p in hf.parameters())
        if optimizer and settings.lora:
            self.peft = add_lora(hf, settings.lora, self.config.seed)
        self.model = ScalarModel(hf, dropout) if self.scalar else LanguageModel(hf)
        self.module = self._initialize(optimizer)
        return count

    def _meet(self, backend: str) -> None:
        """Meet the group's other ranks, listening on one address: by itself torch would listen on every interface."""
        host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.spec.world_size
        listener = socket.create_server((host, port)).detach() if self.rank == 0 else None
        store = dist.TCPStore(host, port, size, self.rank == 0, master_listen_fd=listener)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=size)
        deepspeed.init_distributed(dist_backend=backend)

    def _initialize(self, optimizer: OptimizerSettings | None) -> nn.Module:
        strategy = self.config.strategy_of(self.spec.role)
        if optimizer is None and strategy != "zero3":
            return self.model.requires_grad_(False).eval().to(self.device)
        stage = 0 if strategy == "ddp" else int(strategy[-1])
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": self.device.type == "cuda",
                # DeepSpeed's own default is half a billion, and it takes several such buffers.
                "reduce_bucket_size": _BUCKET_ELEMENTS,
                "allgather_bucket_size": _BUCKET_ELEMENTS,
                "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
            },
            "bf16": {"enabled": self.settings.dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if optimizer is None:
            self.engine, *_ = deepspeed.initialize(model=self.model.requires_grad_(False).eval(), config=settings)
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            adam = torch.optim.AdamW(
                trained, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
            )
            if stage or self.settings.dtype == "bfloat16":
                settings["gradient_clipping"] = optimizer.max_grad_norm
            else:  # plain float32 Adam: there DeepSpeed would clip without telling the norm, at 1 unless told not to
                settings["gradient_clipping"] = 0.0
                clip = torch.nn.utils.clip_grad_norm_
                adam.register_step_pre_hook(
                    lambda adam, *_: setattr(adam, "_global_grad_norm", float(clip(trained, optimizer.max_grad_norm)))
                )
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=adam, config=settings)
            # Unsharded gradients are reduced through a flat copy: by default one of all of them.
            self.engine.allreduce_gradients = partial(self.engine.allreduce_gradients, bucket_size=_BUCKET_ELEMENTS)
        return self.engine

    # ------------------------------------------------------------ data

    def tokenize(self, name: str, kind: RowKind, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a dataset's rows, which are kept. Returns two [rows]: tokens that a row brings to a forward pass (the
        longer sequence, for a preference) and completion tokens (1 for a preference)."""
        rows = self.datasets[name]
        made: list[Any]
        if kind == "preference":
            made = [
                Preference(
                    self.codec.sequence(row.prompt, row.chosen, max_length),
                    self.codec.sequence(
                        row.prompt if row.rejected_prompt is None else row.rejected_prompt, row.rejected, max_length
                    ),
                    row.margin,
                )
                for row in rows
            ]
            lengths = [max(len(p.chosen.ids), len(p.rejected.ids)) for p in made]
            completions = [1] * len(made)
        else:
            made = [self.codec.sequence(row.prompt, row.completion, max_length) for row in rows]
            lengths = [len(s.ids) for s in made]
            completions = [len(s.ids) - max(s.prompt_length, 1) for s in made]  # nothing predicts a first token
        self.sequences[name] = made
        return np.array(lengths), np.array(completions)

    # ------------------------------------------------------------ training

    def optimize(
        self, losses: Iterable[Callable[[], Tensor]], progress: float, seed: tuple[int, ...]
    ) -> dict[str, float]:
        """One optimizer step over the micro-batches of this rank; every rank must bring equally many.

        losses: each runs a forward pass and returns its share of the loss, already divided by the global count, so that the
        sum over micro-batches and ranks is the loss of the whole batch, whatever way it was cut.
        progress: share of the stage that is done, for the learning rate.
        seed: draws dropout; with the rank added, so that a step repeated is the same step.
        """
        assert self.engine is not None and self.optimizer_settings is not None
        rate = learning_rate(self.optimizer_settings, progress)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((*seed, self.rank)) % 2**63)
        self.engine.train()
        pending = list(losses)
        total = 0.0
        for k, share in enumerate(pending):
            self.engine.set_gradient_accumulation_boundary(k == len(pending) - 1)
            loss = share()
            total += float(loss.detach())
            # DeepSpeed averages gradients over ranks; our losses are shares of one global mean, to be summed.
            self.engine.backward(loss * self.spec.world_size)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return {"loss": self.sum_over_ranks({"loss": total})["loss"], "lr": rate, "grad_norm": norm}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.module.eval()
        with torch.no_grad():
            yield

    def total(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if self.spec.world_size > 1:
            dist.all_reduce(x)
        return x

    def sum_over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        """The same keys on every rank; one all-reduce."""
        keys = sorted(sums)
        values = torch.tensor([sums[k] for k in keys], dtype=torch.float64, device=self.device)
        return dict(zip(keys, self.total(values).tolist(), strict=True))

    # ------------------------------------------------------------ saving

    def save(self, folder: str) -> None:
        """Model, optimizer and their shards, for `restore`."""
        assert self.engine is not None
        os.makedirs(folder, exist_ok=True)
        self.engine.save_checkpoint(folder, tag="state", exclude_frozen_parameters=bool(self.settings.lora))

    def restore(self, folder: str) -> None:
        assert self.engine is not None
        path, _ = self.engine.load_checkpoint(folder, tag="state", load_module_strict=not self.settings.lora)
        if path is None:
            raise FileNotFoundError(f"{folder}: holds no state of {self!r}")

    def snapshot(self) -> tuple[Files, list[str]]:
        """What `save` writes of this rank, and the names of its files."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files = read_files(Path(folder))
        return files, list(files)

    def restore_snapshot(self, mine: Files, first: Files, names: list[str]) -> None:
        """`restore` from this rank's and the first rank's files; `names` are those of all ranks."""
        with tempfile.TemporaryDirectory() as folder:
            for name in names:  # DeepSpeed asks that all are there, and reads no other rank's
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).touch()
            write_files(Path(folder), first | mine)
            self.restore(folder)

    def export(self, folder: str) -> None:
        """A plain Hugging Face folder, adapters merged, and the adapter beside it. Collective."""
        state = {name: tensor.cpu().contiguous() for name, tensor in GatheredWeights(self.model.hf) if self.rank == 0}
        if self.rank == 0:
            os.makedirs(folder, exist_ok=True)
            save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            hf = self.model.hf
            hf.config.architectures = [type(hf).__name__]
            hf.config.save_pretrained(folder)
            if hf.can_generate():
                hf.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.peft is not None and not self.scalar:  # a scalar head is trained in full, and no adapter holds it
            if os.path.isdir(self.path):
                base = os.path.relpath(self.path, Path(folder) / "adapter")
                self.peft.peft_config["default"].base_model_name_or_path = base
            with gathered([p for name, p in self.peft.named_parameters() if "lora_" in name]):
                if self.rank == 0:
                    self.peft.save_pretrained(Path(folder) / "adapter")
        if self.rank == 0:
            for file in Path(folder).rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors lets its owner alone read it
        if self.spec.world_size > 1:
            dist.barrier()
