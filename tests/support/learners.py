"""Trainers with state that tests can read and steps that tests can spoil. The plugin `tests.support.learners` makes them a team's
actor and critic, and adds them as kinds of worker. It does not import vLLM, which is slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from configs.schema import OffloadSettings, Strategy
from tests.support.apis import OpenApi
from workers.process.time_sharing import DeviceTimeSharing
from workers.process.worker_process import KINDS
from workers.training.deepspeed.backend import DeepSpeedBackend
from workers.training.policy import PolicyWorker
from workers.training.trainer import Trainer
from workers.training.value import ValueWorker

POLICY, VALUE = "tests.support.learners:OpenPolicy", "tests.support.learners:OpenValue"
KINDS |= {"policy": POLICY, "open_policy": POLICY, "value": VALUE, "open_value": VALUE}
KINDS["open_plain"] = "tests.support.plain_backend:PlainPolicy"


def _nan_gradients(loss: Tensor) -> Tensor:
    """The same loss, whose gradients are NaN."""
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "nan loss": lambda loss: loss * math.nan,
    "infinite loss": lambda loss: loss * math.inf,
    "infinite loss, finite gradients": lambda loss: loss + math.inf,
    "finite loss, nan gradients": _nan_gradients,
    "overflow": lambda loss: loss * 1e30,
    "explosion": lambda loss: loss * 1e8,
}


class Open(Trainer, OpenApi):
    """A trainer whose weights, gradients and strategy a test can read or change."""

    spoiled: str = ""

    def spoil(self, how: str) -> None:
        """Change the loss of this rank's last micro-batch in the next optimizer step. how: a key of SPOILED."""
        self.spoiled = how

    def optimize(self, losses: Iterable[Callable[[], Tensor]], *args: Any) -> dict[str, float]:
        how, self.spoiled = self.spoiled, ""
        *others, last = losses
        return super().optimize([*others, (lambda: SPOILED[how](last())) if how else last], *args)

    def become(self, strategy: Strategy, offload: dict[str, str]) -> None:
        """Train under another strategy from the next `load` on."""
        settings: dict[str, Any] = {
            "strategy": strategy,
            "strategies": {},
            "offload": OffloadSettings.model_validate(offload),
        }
        self.config = self.config.model_copy(update=settings)

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine:
        """DeepSpeed's engine; the model must be trained, not frozen."""
        assert isinstance(self.backend, DeepSpeedBackend) and self.backend.engine is not None
        return self.backend.engine

    def stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return int(self.engine.zero_optimization_stage())

    def held(self) -> dict[str, np.ndarray]:
        """All tensors that training changes, as this rank holds them: weights, and AdamW's copies and states."""
        adam = self.engine.basic_optimizer
        tensors = {name: getattr(p, "ds_tensor", p) for name, p in self.model.named_parameters()}
        for i, master in enumerate(self._masters()):
            tensors |= {f"master {i}": master, **{f"{name} {i}": v for name, v in adam.state.get(master, {}).items()}}
        # A clone: memory that numpy refers to cannot be released.
        return {name: tensor.detach().float().clone().numpy() for name, tensor in tensors.items()}

    def gradients(self) -> list[int]:
        """Addresses of the gradients that are allocated."""
        return [p.grad.data_ptr() for p in self.model.parameters() if p.grad is not None]

    def offload_and_onload(self) -> tuple[int, int]:
        """Offload and onload, as between phases on a time-shared device. Returns the bytes held before and while offloaded."""
        sharing = DeviceTimeSharing([self], "cpu")
        # On CPU some tensors cannot release their memory, such as a mapped file.
        tensors = [t for t in self.tensors() if t.untyped_storage().resizable()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        before = sum(storage.nbytes() for storage in held.values())
        sharing.offload(tensors)
        meanwhile = sum(storage.nbytes() for storage in held.values())
        sharing.onload()
        return before, meanwhile

    def _masters(self) -> list[Tensor]:
        """The tensors that AdamW updates."""
        whole = [p for group in self.engine.basic_optimizer.param_groups for p in group["params"]]
        return list(getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", whole))

    def dtypes(self) -> tuple[set[str], set[str]]:
        """Types of the weights, and of AdamW's weights and moments."""
        adam, adams = self.engine.basic_optimizer, self._masters()
        adams += [state[name] for state in adam.state.values() if state for name in ("exp_avg", "exp_avg_sq")]
        return {str(p.dtype) for p in self.model.parameters()}, {str(tensor.dtype) for tensor in adams}

    def add_noise(self, scale: float, seed: int) -> None:
        """Move every parameter that is trained."""
        torch.manual_seed(seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        sharded = hasattr(trained[0], "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters(trained, modifier_rank=0) if sharded else nullcontext():
            for parameter in trained:
                parameter.add_(scale * torch.randn_like(parameter))

    def logits(self, ids: list[list[int]]) -> np.ndarray:
        """[rows, tokens, vocabulary] or, of a scalar model, [rows, 1]: from the Hugging Face model itself."""
        with self.evaluating():
            return self.model.hf(input_ids=torch.tensor(ids)).logits.float().numpy()


class OpenPolicy(Open, PolicyWorker):
    """A language model."""


class OpenValue(Open, ValueWorker):
    """A scalar model."""
