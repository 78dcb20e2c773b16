"""The contract between Trainer and the training library.

Trainer contains the algorithm of an optimizer step: losses, learning rate, seeds, and which steps are skipped. A backend manages
the model's states: how they are sharded over the ranks, where they are stored, the sum of gradients, AdamW, and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from configs.schema import ModelSettings, OptimizerSettings
from configs.zero import ZERO, Strategy
from workers.weight_sync.gather import ParameterGatherer

BACKENDS: dict[str, str] = dict.fromkeys(ZERO, "workers.training.deepspeed.backend:DeepSpeedBackend")
"""Strategy -> class of its backend, as "module:class". The import takes seconds, so only the backend in use is imported. A plugin
may change the table."""


@dataclass(frozen=True)
class BackendSetup:
    """Arguments of a backend: it holds one model on one rank."""

    strategy: Strategy
    model: ModelSettings
    device: torch.device
    rank: int
    world_size: int
    name: str
    """Names run, role and rank, for folders and messages."""
    nvme_path: str | None
    """Folder for states on NVMe, if the strategy puts states there."""


class StepOutcome(NamedTuple):
    """Result of an optimizer step; the same on every rank."""

    grad_norm: float
    """2-norm of the gradients of the whole batch over all ranks, before clipping. Not finite, or negative, if a gradient is not
    finite."""
    applied: bool
    """Whether the weights were updated."""


class TrainBackend(ParameterGatherer, Protocol):
    """Holds one model, frozen or trained by AdamW. Created from a BackendSetup after torch.distributed is initialized.

    Every rank calls the same methods in the same order; all except `resident_tensors` may be collective. An optimizer step, with
    the same number of micro-batches on every rank:

        for loss, last in micro_batches:
            backward(loss(), last)
        step(lr, accept)
    """

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings | None) -> nn.Module:
        """Take over a model that is whole on the host; called once. Returns the module to call instead of the model.

        With optimizer settings, AdamW trains the parameters that have requires_grad, with these betas, weight decay and
        max_grad_norm, and the other methods may be called. Without them, the model is frozen: no parameter has requires_grad,
        the model is in evaluation mode, and `backward`, `step`, `save` and `load` are not called.

        The model's modules and parameters stay the same objects, with the same types.
        """

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the loss. They are summed over micro-batches and ranks, not averaged.

        last: this is the last micro-batch of the optimizer step.
        """

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepOutcome:
        """If `accept(norm of the gradients)` is True, clip the gradients to max_grad_norm and take AdamW's step.

        accept: depends only on the norm, and is the same on every rank; it may be called several times. If it returns False,
        weights, moments and step count stay unchanged, bit for bit. In both cases the gradients are dropped afterwards.
        """

    def resident_tensors(self) -> Iterator[Tensor]:
        """All tensors that hold memory between calls, on any device: weights, gradients, AdamW's states, and their buffers.
        The memory of each tensor may be released and later restored with the same content (DeviceTimeSharing)."""

    def save(self, folder: Path) -> None:
        """Write weights and AdamW's states, for `load`. Every rank writes its own files, the first also the shared ones.

        File names differ between ranks. Frozen weights below adapters may be omitted.
        """

    def load(self, folder: Path) -> None:
        """Load the files of `save`; called directly after `prepare`. With the same number of ranks and the same strategy,
        training continues bit for bit as it did after `save`.

        Another number of ranks must be supported if all ranks see all files; otherwise ValueError gives the reason. With the same
        number, only the files of this rank and of the first rank are read: the others may be empty. Raises ValueError, before
        any change, if the saved strategy is incompatible, and FileNotFoundError if there is no state.
        """


def make_backend(setup: BackendSetup) -> TrainBackend:
    """The backend of a strategy."""
    module, _, name = BACKENDS[setup.strategy].partition(":")
    backend: TrainBackend = getattr(import_module(module), name)(setup)
    return backend
