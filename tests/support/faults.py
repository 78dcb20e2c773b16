"""Workers with faults on request. The plugin `tests.support.faults` adds them to the kinds of worker.

They prove that a check detects its fault: it must fail with the fault and pass without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from ray.actor import ActorHandle
from torch import Tensor
from vllm import TokensPrompt
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from tests.support.apis import FaultyPolicyApi, FaultyRolloutApi
from tests.support.learners import OpenPolicy
from workers.process.worker_process import KINDS
from workers.rollout.engine import RolloutWorker
from workers.weight_sync.receivers import ObjectStoreEngine, ObjectStoreUpdateInfo
from workers.weight_sync.senders import ObjectStoreSender

KINDS |= {
    "faulty_policy": "tests.support.faults:FaultyPolicy",
    "faulty_rollout": "tests.support.faults:FaultyRollout",
}


class FaultyEngine(ObjectStoreEngine):
    """The engine's side of a weight update, with one of its precautions left out."""

    without: ClassVar[str] = ""
    memory: ClassVar[np.ndarray] = np.empty(2**24, np.uint8)

    def start_weight_update(self) -> None:
        self.received = {}
        if self.without == "fresh start":
            with patch("workers.weight_sync.reloading.finalize_layerwise_reload"):
                super().start_weight_update()
        elif self.without != "layerwise reload":
            super().start_weight_update()

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        if self.without == "memory of their own":  # all buckets in the same memory, as in a streaming receiver
            arrays, start = [], 0
            for array in update_info.arrays:
                view = self.memory[start : start + array.nbytes]
                view[:] = array
                arrays.append(view)
                start += array.nbytes
            update_info = replace(update_info, arrays=arrays)
        super().receive_weights(update_info)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        if self.without == "experts one by one":
            return type(self.model).load_weights(self.model, weights)
        return super().load(weights)

    def finish_weight_update(self) -> None:
        if self.without == "repacking":
            finalize_layerwise_reload(self.model, self.model_config)
        elif self.without != "layerwise reload":
            super().finish_weight_update()


class FaultyRollout(RolloutWorker, FaultyRolloutApi):
    """A rollout worker that can leave out a precaution when loaded with the transport "faulty"."""

    def leave_out(self, precaution: str) -> None:
        """One of: layerwise reload, repacking, memory of their own, fresh start, prefix cache, experts one by one; "": none."""
        FaultyEngine.without = precaution
        vars(self.engine).pop("reset_prefix_cache", None)
        if precaution == "prefix cache":
            self.engine.reset_prefix_cache = lambda: True

    def begin_answer(self) -> None:
        """Leave a request unfinished, as an interrupted call does."""
        self.engine.add_request("unfinished", TokensPrompt(prompt_token_ids=[5, 6, 7]), self._sampling(None, 1))
        self.engine.step()

    def drop_answer(self) -> None:
        self.engine.abort_request(["unfinished"])


class FaultySender(ObjectStoreSender):
    """The trainer's side; `fault` changes the tensors of one update after their checksums were taken."""

    fault: str = ""
    sent: int = 0

    def send_weights(self) -> None:
        self.sent = 0
        super().send_weights()

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
        self.sent += 1
        fault, self.fault = self.fault, ""
        if fault == "flip":
            name, tensor = bucket[0]
            flipped = tensor.clone()
            flipped.view(torch.uint8).view(-1)[-1] ^= 1
            bucket = [(name, flipped), *bucket[1:]]
        elif fault == "lose":
            bucket = bucket[1:]
        elif fault == "exchange":
            (first, a), (second, b) = next(
                (x, y) for x in bucket for y in bucket if x[0] < y[0] and x[1].shape == y[1].shape and x[1].dim() == 2
            )
            swapped = {first: b, second: a}
            bucket = [(name, swapped.get(name, tensor)) for name, tensor in bucket]
        super()._send(bucket)
        if fault == "break off":
            raise ConnectionError("the trainer broke off")


class FaultyPolicy(OpenPolicy, FaultyPolicyApi):
    """A language model whose weight updates can be disturbed."""

    sender: FaultySender

    def connect_with(self, engines: list[ActorHandle], bucket_bytes: int) -> None:
        """Meet the engines over the object store, with buckets smaller than the settings allow."""
        self.connect(engines, "object_store", ("", 0))
        self.sender = FaultySender(self.client, self.source, self.rank == 0, bucket_bytes)

    def disturb(self, fault: str) -> None:
        """One of flip, lose, exchange, break off; it happens in the next update."""
        self.sender.fault = fault

    def refuse_descriptions(self, refuse: bool) -> None:
        """Make an export fail when it writes its configs, or no longer."""

        def refused(folder: Path) -> None:
            raise ValueError(f"no description of this model is written to {folder}")

        vars(self).pop("_write_description", None)
        if refuse:
            vars(self)["_write_description"] = refused

    def buckets(self) -> int:
        """Buckets of the last update."""
        return self.sender.sent


WeightTransferEngineFactory.register_engine("verified_weights_faulty", FaultyEngine)
