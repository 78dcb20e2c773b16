"""A rank that holds a model, and trains it with DeepSpeed where the role learns."""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import ZERO
from configs.schema import ModelSettings, OptimizerSettings
from placement.memory import BUCKET_ELEMENTS
from workers.api import TrainerApi
from workers.data import end_tokens, load_tokenizer
from workers.models.export import write_settings, write_weights
from workers.models.heads import LanguageModel, ScalarModel
from workers.models.linear import add_in_place
from workers.models.loading import LEARNS, context_length
from workers.models.lora import FOLDER as ADAPTER
from workers.models.lora import add_head, write_adapter
from workers.models.shared_base import build
from workers.process.state_files import Files, read_files, write_files
from workers.process.worker import Worker, WorkerSpec
from workers.training.deepspeed.config import deepspeed_settings, takes_over
from workers.training.deepspeed.nvme import own_folder, read_states, write_states
from workers.training.deepspeed.universal_checkpoint import universal
from workers.training.schedule import StageStep, learning_rate
from workers.training.skipped_steps import Arrays
from workers.weight_sync.gather import gathered
from workers.weight_sync.probe import LENGTH, Probe, draw

# The op serves only inference_all_reduce, and building it would need a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_TAG, _NOTE = "state", "cut.json"
"""Below a saved folder: what DeepSpeed wrote, and how it was cut into shards."""


class Trainer(Worker, TrainerApi):
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
        self.loss = 0.0
        self.refused: Arrays | None = None

    @property
    def on_nvme(self) -> bool:
        return ZERO[self.config.strategy_of(self.spec.role)].optimizer == "nvme"

    # ------------------------------------------------------------ building

    def load(
        self, path: str, settings: ModelSettings, optimizer: OptimizerSettings | None, dropout: float = 0.0
    ) -> int:
        """Build the model from a folder; with an optimizer it learns, without it is frozen. Returns its parameter count."""
        self.tokenizer = load_tokenizer(path, settings.trust_remote_code)
        self.ends = end_tokens(path, self.tokenizer, settings)
        self.path, self.settings, self.optimizer_settings = path, settings, optimizer
        self._meet("gloo" if self.device.type == "cpu" else "nccl")
        hf, self.peft = build(self.base, path, settings, self.scalar, self.config.seed, learns=optimizer is not None)
        count = sum(p.numel() for name, p in hf.named_parameters() if "lora_" not in name)
        self.model = ScalarModel(hf, dropout) if self.scalar else LanguageModel(hf)
        if optimizer and self.rank == 0:
            self._try_export()
        self.module = self._initialize(optimizer)
        return count

    def _meet(self, backend: str) -> None:
        """Meet the group's other ranks, listening on one address: by itself torch would listen on every interface."""
        if dist.is_initialized():
            return
        host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.spec.world_size
        listener = socket.create_server((host, port)).detach() if self.rank == 0 else None
        store = dist.TCPStore(host, port, size, self.rank == 0, master_listen_fd=listener)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=size)
        deepspeed.init_distributed(dist_backend=backend)

    def _initialize(self, optimizer: OptimizerSettings | None) -> nn.Module:
        strategy = self.config.strategy_of(self.spec.role)
        if optimizer is None and ZERO[strategy].stage < 3:
            return self.model.requires_grad_(False).eval().to(self.device)
        settings = deepspeed_settings(strategy, self.settings, self.device, self._nvme_folder())
        if (
            ZERO[strategy].stage == 3
        ):  # tensor by tensor: DeepSpeed alone would first move all of the model to the device
            deepspeed.zero.Init(module=self.model, config_dict_or_path=settings)
        if optimizer is None:
            self.engine, *_ = deepspeed.initialize(model=self.model.requires_grad_(False).eval(), config=settings)
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            adam = torch.optim.AdamW(
                trained, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
            )
            plain = not ZERO[strategy].stage and self.settings.dtype == "float32"
            if not plain:
                settings["gradient_clipping"] = optimizer.max_grad_norm
            else:  # there DeepSpeed would clip without telling the norm, at 1 unless told not to
                settings["gradient_clipping"] = 0.0
                clip = torch.nn.utils.clip_grad_norm_
                adam.register_step_pre_hook(
                    lambda adam, *_: setattr(adam, "_global_grad_norm", float(clip(trained, optimizer.max_grad_norm)))
                )
            # Until then no step counts: one of DeepSpeed's optimizers takes one to build its states.
            adam.found_inf = torch.ones((), device=self.device)  # type: ignore[attr-defined]
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=adam, config=settings)
            if not ZERO[strategy].stage:  # DeepSpeed sums gradients in float32 with ZeRO alone: here PyTorch does
                for parameter in trained:
                    parameter.grad_dtype = torch.float32
            # Unsharded gradients are reduced through a flat copy: by default one of all of them.
            self.engine.allreduce_gradients = partial(self.engine.allreduce_gradients, bucket_size=BUCKET_ELEMENTS)
            adam.register_step_pre_hook(self._before_adam)
            if plain and self.device.type == "cpu":
                # DeepSpeed would free them after each step, for the next to fetch as many pages from the system anew.
                self.engine.zero_grad = partial(self.model.zero_grad, set_to_none=False)
                if self.peft is None:  # adapters have small matrices, for which it costs more than it saves
                    add_in_place(self.model)
        return self.engine

    def _nvme_folder(self) -> str | None:
        if not self.on_nvme:
            return None
        assert self.config.offload.nvme_path is not None
        return own_folder(self.config.offload.nvme_path, f"{self.config.name}-{self!r}")

    def _before_adam(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Runs when the global norm is known and AdamW is about to move the weights (under ZeRO-3 in several goes).

        The fused AdamW is made to be told that gradients are infinite, and then leaves weights, moments and its count of
        steps as they are. What surrounds it goes on as in any step, so that the gradients are thrown away as always.
        """
        assert self.engine is not None
        refuses = self._refuses(self.loss, float(self.engine.optimizer._global_grad_norm))
        home = adam.param_groups[0]["params"][0].device  # of its tensors: the host where they are offloaded
        adam.found_inf = torch.ones((), device=home) if refuses else None  # type: ignore[attr-defined]

    def _refuses(self, loss: float, norm: float) -> bool:
        """Of numbers that are the same on every rank. DeepSpeed's norm of gradients that are not finite may be -1."""
        assert self.optimizer_settings is not None
        return not (math.isfinite(loss) and 0.0 <= norm <= self.optimizer_settings.refuse_grad_norm)

    def tensors(self) -> Iterator[Tensor]:
        """Weights, gradients, AdamW's states and their buffers, in whatever way DeepSpeed cut them."""
        if not hasattr(self, "model"):
            return
        for parameter in self.model.parameters():
            yield parameter
            yield from filter(torch.is_tensor, (parameter.grad, getattr(parameter, "ds_tensor", None)))
        yield from self.model.buffers()
        if self.engine is not None and self.optimizer_settings is not None:
            for group in self.engine.basic_optimizer.param_groups:
                yield from group["params"]
            for state in self._adam_states():
                yield from state.values()
            zero3: dict[str, Any] = vars(self.engine.optimizer)
            yield from zero3.get("fp32_partitioned_groups_flat", ())
            yield from filter(torch.is_tensor, (zero3.get("lp_param_buffer"), zero3.get("grad_partitions_flat_buffer")))

    # ------------------------------------------------------------ training

    def optimize(
        self,
        losses: Iterable[Callable[[], Tensor]],
        at: StageStep,
        seed: tuple[int, ...],
        seen: Callable[[], Arrays],
    ) -> dict[str, float]:
        """One optimizer step over the micro-batches of this rank; every rank must bring equally many, padding among them.

        losses: each runs a forward pass and returns its share of the loss, already divided by the global count, so that the
        sum over micro-batches and ranks is the loss of the whole batch, whatever way it was cut.
        at: the step, for the learning rate.
        seed: draws the dropout of adapters; with the rank added, so that a step repeated is the same step.
        seen: what the losses are made of; asked for where the step is refused.

        A step whose loss or gradients are not finite, or whose gradients' norm is above `refuse_grad_norm`, is refused on
        all ranks: weights and optimizer stay as they are, bit for bit, `refused` is 1, and `refused_batch` tells more.
        """
        assert self.engine is not None and self.optimizer_settings is not None
        rate = learning_rate(self.optimizer_settings, at)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((*seed, self.rank)) % 2**63)
        self.engine.train()
        pending = list(losses)
        shares: list[float] = []
        for k, share in enumerate(pending):
            self.engine.set_gradient_accumulation_boundary(k == len(pending) - 1)
            with self._activations():
                loss = share()
            shares.append(float(loss.detach()))
            # DeepSpeed averages gradients over ranks; our losses are shares of one global mean, to be summed.
            self.engine.backward(loss * self.spec.world_size)
        self.loss = self.sum_over_ranks({"loss": sum(shares)})["loss"]
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        refused = self._refuses(self.loss, norm)
        if refused:
            self.refused = seen() | {
                "losses": np.array(shares),
                "loss": np.array(self.loss),
                "grad_norm": np.array(norm),
            }
        return {"loss": self.loss, "lr": rate, "grad_norm": norm, "refused": float(refused)}

    def _activations(self) -> AbstractContextManager[Any]:
        """Within it what autograd keeps goes to host memory, where the settings say so and there is another."""
        if self.settings.activation_offload and self.device.type == "cuda":
            return torch.autograd.graph.save_on_cpu(pin_memory=True)
        return nullcontext()

    def skipped_batch(self) -> Arrays | None:
        """What this rank brought to the last step that was refused; None where none was since this was last asked.

        losses [micro-batches] are this rank's shares of `loss`. Rows stand micro-batch after micro-batch (`micro_batch`).
        """
        found, self.refused = self.refused, None
        return found

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

    # ------------------------------------------------------------ proof

    def probe(self, version: int) -> Probe:
        """What the model makes of random tokens, other ones for each version. Collective."""
        vocabulary = min(len(self.tokenizer), self.model.hf.get_input_embeddings().num_embeddings)
        longest = context_length(self.model.hf.config)
        ids = draw(vocabulary, LENGTH if longest is None else min(LENGTH, longest), self.config.seed, version)
        started = time.monotonic()
        return Probe(ids, self.says(ids), time.monotonic() - started)

    def says(self, ids: np.ndarray) -> np.ndarray:
        """What the model says of rows of tokens [rows, length], as a Probe has it. Collective."""
        raise NotImplementedError

    def read_back(self, folder: str, ids: np.ndarray) -> np.ndarray:
        """The same, of an exported folder read from disk."""
        raise NotImplementedError

    # ------------------------------------------------------------ saving

    def save(self, folder: str) -> None:
        """Model, optimizer and their shards, for `restore`, and a note of how they were cut."""
        assert self.engine is not None
        os.makedirs(folder, exist_ok=True)
        if self.on_nvme:
            write_states(self.engine.optimizer, Path(folder) / _TAG / f"rank-{self.rank}")
        else:
            self.engine.save_checkpoint(folder, tag=_TAG, exclude_frozen_parameters=bool(self.settings.lora))
        if self.rank == 0:
            (Path(folder) / _NOTE).write_text(json.dumps(self._cut() | {"stepped": bool(self._adam_states())}))

    def restore(self, folder: str) -> None:
        """Go on from what `save` wrote, also where other ranks than these did, ZeRO 2 in place of 1, or one that offloads.

        Needs a model that was just loaded. With as many ranks, what follows is bit for bit what followed then.
        """
        assert self.engine is not None
        saved = json.loads((Path(folder) / _NOTE).read_text())
        stepped, cut = saved.pop("stepped"), self._cut()
        if not takes_over(cut["strategy"], saved["strategy"]):
            raise ValueError(
                f"strategy: {folder} was saved with {saved['strategy']}, and cannot go on with {cut['strategy']}"
            )
        same_ranks = saved["ranks"] == cut["ranks"]
        if self.on_nvme:
            if not same_ranks:
                text = f"{folder} was saved by {saved['ranks']} ranks, and {cut['ranks']} cannot go on: "
                raise ValueError(f"strategy: {text}zero3_nvme knows no other number")
            read_states(self.engine.optimizer, Path(folder) / _TAG / f"rank-{self.rank}")
        elif same_ranks or cut["strategy"] == "ddp":
            self._load_state(folder)
        elif stepped:
            with universal(folder, _TAG, self.engine) as whole:
                self._load_state(whole)
            for state in self._adam_states():
                state["step"] = state["step"].clone()  # DeepSpeed gives the parts of ZeRO-3 one count to share

    def _load_state(self, folder: str) -> None:
        assert self.engine is not None
        path, _ = self.engine.load_checkpoint(folder, tag=_TAG, load_module_strict=not self.settings.lora)
        if path is None:
            raise FileNotFoundError(f"{folder}: holds no state of {self!r}")

    def _cut(self) -> dict[str, Any]:
        return {"ranks": self.spec.world_size, "strategy": self.config.strategy_of(self.spec.role)}

    def _adam_states(self) -> list[dict[str, Any]]:
        """AdamW's states of each of its tensors; none before its first step."""
        assert self.engine is not None
        return [state for state in self.engine.basic_optimizer.state.values() if state]

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
        """A plain Hugging Face folder, adapters merged, and the adapter beside it. Collective.

        Raises DifferentModel where what was written, read back, does not compute what this model does. What fails on the first
        rank, which writes, is raised once all ranks are through: they would wait for it.
        """
        errors: list[Exception] = []

        def write(action: Callable[[], Any], everywhere: bool = False) -> None:
            if everywhere or (self.rank == 0 and not errors):
                try:
                    action()
                except Exception as error:
                    errors.append(error)

        target = Path(folder)
        write(lambda: self._write_description(target))
        write(lambda: write_weights(self.model.hf, target, writes=self.rank == 0 and not errors), everywhere=True)
        if self.peft is not None:
            with gathered([p for p in self.peft.parameters() if p.requires_grad]):
                write(lambda: self._write_adapter(target / ADAPTER))
        write(lambda: _make_readable(target))
        probe = self.probe(0)
        write(lambda: self._read_back(target, probe))
        if self.spec.world_size > 1:
            dist.barrier()
        if errors:
            raise errors[0]

    def _read_back(self, folder: Path, probe: Probe) -> None:
        bound = self.config.gap_bound(self.settings)
        probe.require(self.read_back(str(folder), probe.ids), bound, f"the exported model in {folder}")
        probe.save(folder)

    def _write_description(self, folder: Path) -> None:
        """All of an exported folder but the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(self.model.hf, self.tokenizer, self.ends, folder)

    def _write_adapter(self, folder: Path) -> None:
        write_adapter(folder, self.peft, LEARNS, self.path, self.tokenizer)
        if self.scalar:
            add_head(folder, self.model.hf)

    def _try_export(self) -> None:
        """Write what an export writes, but for the weights, to find out before training what it will refuse."""
        with tempfile.TemporaryDirectory() as folder:
            self._write_description(Path(folder))


def _make_readable(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors lets its owner alone read it
