"""The worker class of benchmarks.adversary."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ray.actor import ActorHandle
from torch import Tensor

from benchmarks.adversary import damage_mark
from workers.training.policy import PolicyWorker


class DamagingPolicy(PolicyWorker):
    """Flips a bit of a bucket's first tensor, after its checksum was computed."""

    def connect(self, engines: list[ActorHandle], transport: str, address: tuple[str, int]) -> None:
        super().connect(engines, transport, address)
        sender: Any = self.sender
        sender._send = partial(self._send, sender._send)

    def _send(self, send: Any, bucket: list[tuple[str, Tensor]]) -> None:
        mark = damage_mark(self.config)
        if mark.exists():
            mark.unlink()
            name, tensor = bucket[0]
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[0] ^= 1
            bucket = [(name, tensor), *bucket[1:]]
        send(bucket)
