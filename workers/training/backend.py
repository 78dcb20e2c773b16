"""The contract between Trainer and the library that trains.

Trainer keeps the algorithm of an optimizer step: losses, learning rate, seeds, and which steps are skipped. A backend keeps the
model's states: what is sharded over the ranks, where it lies, how gradients are summed and AdamW is run, and checkpoints of them.
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
"""Strategy -> class of its backend, as "module:class": imported where it is used, since importing one takes seconds. A plugin may
change it."""


@dataclass(frozen=True)
class BackendSetup:
    """What a backend is made for: one model of one rank."""

    strategy: Strategy
    model: ModelSettings
    device: torch.device
    rank: int
    world_size: int
    name: str
    """Of the run, the role and the rank: for folders and messages."""
    nvme_path: str | None
    """Folder for states on NVMe, where the strategy puts them there."""


class StepOutcome(NamedTuple):
    """What became of an optimizer step; the same on every rank."""

    grad_norm: float
    """2-norm of the gradients of the whole batch over all ranks, before they were clipped. Not finite or negative where a
    gradient is not finite."""
    applied: bool
    """Whether the weights were moved."""


class TrainBackend(ParameterGatherer, Protocol):
    """Holds one model, frozen or trained by AdamW. Made with a BackendSetup once torch.distributed is initialized.

    Every rank calls the same methods in the same order; all of them may be collective but `resident_tensors`. One optimizer
    step is, on every rank, with equally many micro-batches:

        for loss, last in micro_batches:
            backward(loss(), last)
        step(lr, accept)
    """

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings | None) -> nn.Module:
        """Take over a model that is whole on the host; called once. Returns the module to call instead of the model.

        With optimizer settings, what has requires_grad is trained by AdamW with their betas, weight decay and max_grad_norm,
        and the other methods may be called. Without, the model is frozen: no parameter has requires_grad, it is in evaluation
        mode, and `backward`, `step`, `save` and `load` are not called.

        The model's own modules and parameters stay the same objects, in the same types.
        """

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the loss. Over micro-batches and ranks they are summed, not averaged.

        last: whether it is the last micro-batch of the optimizer step.
        """

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepOutcome:
        """Ask `accept` with the norm of the gradients, and if it agrees clip them to max_grad_norm and take AdamW's step.

        accept: gives the same answer for the same norm, and is the same on every rank; it may be asked several times. Where it
        does not agree, weights, moments and count of steps stay as they are, bit for bit. In both cases the gradients are
        dropped.
        """

    def resident_tensors(self) -> Iterator[Tensor]:
        """All tensors that hold memory between calls, on whatever device: weights, gradients, AdamW's states, and buffers of
        them. Each tensor's memory may be taken away and given back with the same content (DeviceTimeSharing)."""

    def save(self, folder: Path) -> None:
        """Write weights and AdamW's states, for `load`. Every rank writes its own files, and the first rank what all need.

        The names of the files differ between ranks. Frozen weights below adapters may be left out.
        """

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote; called right after `prepare`. With as many ranks and the same strategy, all that follows is
        bit for bit what followed then.

        Another number of ranks must be able to, where all ranks see all files; or ValueError says why not. With the same number,
        the files of other ranks than this and the first may be empty. Raises ValueError, before anything is changed, where the
        state was saved under a strategy that cannot be taken up, and FileNotFoundError where there is no state.
        """


def make_backend(setup: BackendSetup) -> TrainBackend:
    """The backend of a strategy."""
    module, _, name = BACKENDS[setup.strategy].partition(":")
    backend: TrainBackend = getattr(import_module(module), name)(setup)
    return backend
