"""One rank of a model, trained or frozen: the algorithm of an optimizer step, with any training backend."""

from __future__ import annotations

import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import ModelSettings, OptimizerSettings
from workers.api import TrainerApi
from workers.data import end_tokens, load_tokenizer
from workers.models.export import write_settings, write_weights
from workers.models.heads import LanguageModel, ScalarModel
from workers.models.loading import LEARNS, context_length
from workers.models.lora import FOLDER as ADAPTER
from workers.models.lora import add_head, write_adapter
from workers.models.shared_base import build
from workers.process.state_files import Files, read_files, write_files
from workers.process.worker import Worker, WorkerSpec
from workers.training.backend import BackendSetup, TrainBackend, make_backend
from workers.training.schedule import StageStep, learning_rate
from workers.training.skipped_steps import Arrays
from workers.weight_sync.probe import LENGTH, Probe, draw


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
        self.backend: TrainBackend
        self.peft: Any = None
        self.skipped: Arrays | None = None

    # ------------------------------------------------------------ building

    def load(
        self, path: str, settings: ModelSettings, optimizer: OptimizerSettings | None, dropout: float = 0.0
    ) -> int:
        """Build the model from a folder; trained with an optimizer, otherwise frozen. Returns its parameter count."""
        self.tokenizer = load_tokenizer(path, settings.trust_remote_code)
        self.ends = end_tokens(path, self.tokenizer, settings)
        self.path, self.settings, self.optimizer_settings = path, settings, optimizer
        self._join_ranks("gloo" if self.device.type == "cpu" else "nccl")
        hf, self.peft = build(self.base, path, settings, self.scalar, self.config.seed, learns=optimizer is not None)
        count = sum(p.numel() for name, p in hf.named_parameters() if "lora_" not in name)
        self.model = ScalarModel(hf, dropout) if self.scalar else LanguageModel(hf)
        if optimizer and self.rank == 0:
            self._try_export()
        self.backend = make_backend(self._backend_setup())
        self.module = self.backend.prepare(self.model, optimizer)
        return count

    def _backend_setup(self) -> BackendSetup:
        return BackendSetup(
            strategy=self.config.strategy_of(self.spec.role),
            model=self.settings,
            device=self.device,
            rank=self.rank,
            world_size=self.spec.world_size,
            name=f"{self.config.name}-{self!r}",
            nvme_path=self.config.offload.nvme_path,
        )

    def _join_ranks(self, communication: str) -> None:
        """Connect to the other ranks of the group. Listens on one address only; torch alone would listen on all interfaces."""
        if dist.is_initialized():
            return
        host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.spec.world_size
        listener = socket.create_server((host, port)).detach() if self.rank == 0 else None
        store = dist.TCPStore(host, port, size, self.rank == 0, master_listen_fd=listener)  # type: ignore[attr-defined]
        dist.init_process_group(communication, store=store, rank=self.rank, world_size=size)

    def tensors(self) -> Iterable[Tensor]:
        """Weights, gradients, AdamW's states and their buffers."""
        return self.backend.resident_tensors() if hasattr(self, "backend") else ()

    # ------------------------------------------------------------ training

    def optimize(
        self,
        losses: Iterable[Callable[[], Tensor]],
        at: StageStep,
        seed: tuple[int, ...],
        debug_batch: Callable[[], Arrays],
    ) -> dict[str, float]:
        """One optimizer step over the micro-batches of this rank; every rank must have the same number, padding included.

        losses: each runs a forward pass and returns its share of the loss, already divided by the global count. The sum over
        micro-batches and ranks is therefore the loss of the whole batch, however the batch was split.
        at: the step, for the learning rate.
        seed: together with the rank, seeds the dropout of adapters, so that a repeated step gives the same result.
        debug_batch: returns the data of the losses; called if the step is skipped.

        A step is skipped on all ranks if its loss or gradients are not finite, or its gradient norm is above `skip_grad_norm`:
        weights and optimizer stay unchanged, bit for bit, `skipped` is 1, and `skipped_batch` returns the data.
        """
        assert self.optimizer_settings is not None
        rate = learning_rate(self.optimizer_settings, at)
        torch.manual_seed(hash((*seed, self.rank)) % 2**63)
        self.module.train()
        pending = list(losses)
        shares: list[float] = []
        for k, share in enumerate(pending):
            with self._activations():
                loss = share()
            shares.append(float(loss.detach()))
            self.backend.backward(loss, last=k == len(pending) - 1)
        total = self.sum_over_ranks({"loss": sum(shares)})["loss"]
        norm, applied = self.backend.step(rate, lambda norm: self._accepts(total, norm))
        if not applied:
            self.skipped = debug_batch() | {
                "losses": np.array(shares),
                "loss": np.array(total),
                "grad_norm": np.array(norm),
            }
        return {"loss": total, "lr": rate, "grad_norm": norm, "skipped": float(not applied)}

    def _accepts(self, loss: float, norm: float) -> bool:
        """Whether a step is applied. The arguments are the same on every rank. The norm may be negative if gradients are not
        finite (StepOutcome)."""
        assert self.optimizer_settings is not None
        return math.isfinite(loss) and 0.0 <= norm <= self.optimizer_settings.skip_grad_norm

    def _activations(self) -> AbstractContextManager[Any]:
        """Context: autograd stores activations in host memory, if `activation_offload` is set and the device is a GPU."""
        if self.settings.activation_offload and self.device.type == "cuda":
            return torch.autograd.graph.save_on_cpu(pin_memory=True)
        return nullcontext()

    def skipped_batch(self) -> Arrays | None:
        """This rank's data of the last skipped step; None if no step was skipped since the previous call.

        losses [micro-batches] are this rank's shares of `loss`. Rows are in micro-batch order (`micro_batch`).
        """
        batch, self.skipped = self.skipped, None
        return batch

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
        """The model's outputs on random tokens; the tokens differ between versions. Collective."""
        vocabulary = min(len(self.tokenizer), self.model.hf.get_input_embeddings().num_embeddings)
        longest = context_length(self.model.hf.config)
        ids = draw(vocabulary, LENGTH if longest is None else min(LENGTH, longest), self.config.seed, version)
        started = time.monotonic()
        return Probe(ids, self.probe_outputs(ids), time.monotonic() - started)

    def probe_outputs(self, ids: np.ndarray) -> np.ndarray:
        """The model's outputs on rows of tokens [rows, length], in the form of Probe. Collective."""
        raise NotImplementedError

    def read_back(self, folder: str, ids: np.ndarray) -> np.ndarray:
        """`probe_outputs` of an exported folder, read from disk."""
        raise NotImplementedError

    # ------------------------------------------------------------ saving

    def save(self, folder: str) -> None:
        """Write model and optimizer shards, for `restore`. Collective."""
        self.backend.save(Path(folder))

    def restore(self, folder: str) -> None:
        """Continue from the files of `save`, also with other ranks or another strategy if the backend can. Collective.

        The model must have just been loaded. With the same number of ranks, training continues bit for bit as before.
        """
        self.backend.load(Path(folder))

    def snapshot(self) -> tuple[Files, list[str]]:
        """This rank's files of `save`, and their names."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files = read_files(Path(folder))
        return files, list(files)

    def restore_snapshot(self, mine: Files, first: Files, names: list[str]) -> None:
        """`restore` from the files of this rank and of the first rank; `names`: file names of all ranks."""
        with tempfile.TemporaryDirectory() as folder:
            for name in names:  # a backend may require that all files exist, but reads no other rank's
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).touch()
            write_files(Path(folder), first | mine)
            self.restore(folder)

    def export(self, folder: str) -> None:
        """Write a plain Hugging Face folder with merged adapters, and the adapter in a subfolder. Collective.

        Raises DifferentModel if the written model, read back, computes something else. The first rank writes; its error is raised
        after all ranks have finished, because they would wait for it otherwise.
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
        write(
            lambda: write_weights(self.model.hf, target, self.rank == 0 and not errors, self.backend),
            everywhere=True,
        )
        if self.peft is not None:
            with self.backend.gathered([p for p in self.peft.parameters() if p.requires_grad]):
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
        """Write an exported folder without the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(self.model.hf, self.tokenizer, self.ends, folder)

    def _write_adapter(self, folder: Path) -> None:
        write_adapter(folder, self.peft, LEARNS, self.path, self.tokenizer)
        if self.scalar:
            add_head(folder, self.model.hf)

    def _try_export(self) -> None:
        """Write an export without the weights, so that an export error shows before training."""
        with tempfile.TemporaryDirectory() as folder:
            self._write_description(Path(folder))


def _make_readable(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes it readable by its owner only
