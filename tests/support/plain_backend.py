"""A second training backend: PyTorch alone, for one rank. It shows what a backend must do, and that Trainer needs nothing else.

Its workers use it for the strategy ddp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import OptimizerSettings
from tests.support.learners import Open
from workers.training.backend import BACKENDS, BackendSetup, StepOutcome, TrainBackend
from workers.training.policy import PolicyWorker
from workers.weight_sync.gather import Unsharded

BACKENDS["ddp"] = "tests.support.plain_backend:PlainBackend"


class PlainBackend(Unsharded, TrainBackend):
    """AdamW on whole weights."""

    def __init__(self, setup: BackendSetup) -> None:
        self.setup = setup

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings | None) -> nn.Module:
        self.model = model.to(self.setup.device)
        if optimizer is None:
            return self.model.requires_grad_(False).eval()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.max_grad_norm = optimizer.max_grad_norm
        self.adam = torch.optim.AdamW(
            self.trained.values(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        return self.model

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepOutcome:
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm))
        if accepted := accept(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
        self.adam.zero_grad()
        return StepOutcome(norm, accepted)

    def resident_tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for parameter in self.trained.values():
            yield from self.adam.state[parameter].values()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        states = {f"{key} {name}": s for name, p in self.trained.items() for key, s in self.adam.state[p].items()}
        save_file({name: p.detach() for name, p in self.trained.items()} | states, folder / "state.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        for key, tensor in load_file(folder / "state.safetensors").items():
            state, _, name = key.rpartition(" ")
            if state:
                self.adam.state[self.trained[name]][state] = tensor
            else:
                self.trained[name].copy_(tensor)


class PlainPolicy(Open, PolicyWorker):
    """A language model, trained without DeepSpeed."""
