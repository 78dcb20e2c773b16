"""The engines' side of weight transfer: vLLM transports, each wrapped so that what arrives is checked.

    trainer                                              every engine
    -------                                              ------------
    start_weight_update                             ->   serves nothing from here on
    for each bucket: gather layer by layer, send    ->   load_weights; a checksum of each tensor as it arrived
    finish_weight_update(version, checksums)        ->   equal to its own: serves the new version; else an error,
                                                         and it still serves nothing

Transports: `object_store` (ours: buckets in Ray's shared memory), `nccl` and `ipc` (vLLM's). vLLM imports this module in each
of its worker processes, as the module of its `worker_extension_cls`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from workers.checksums import Checksums, checksum


class _Verified:
    """Mixin of a transport's engine side: checksums of what load_weights is given, and the repairs a reload needs on CPU."""

    received: Checksums

    def start_weight_update(self) -> None:
        self.received = {}
        # An update that broke off leaves layers with some of its tensors: without this they would count as loaded now.
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[attr-defined]
        initialize_layerwise_reload(self.model)  # type: ignore[attr-defined]

    def receive_weights(self, update_info: Any) -> None:
        load = self.model.load_weights  # type: ignore[attr-defined]

        def checked(weights: Iterable[tuple[str, Tensor]]) -> Any:
            return load(self._witness(weights))

        self.model.load_weights = checked  # type: ignore[attr-defined]
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            del self.model.load_weights  # type: ignore[attr-defined]

    def _witness(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.received[name] = checksum(tensor)
            yield name, tensor

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[attr-defined]
        # With tied embeddings the reload leaves the head with the packed copy of its old weights: pack again.
        for module in self.model.modules():  # type: ignore[attr-defined]
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    arrays: list[np.ndarray]
    """uint8 views of the tensors, in shared memory; the engine may keep them until the update is finished."""


class _ObjectStoreReceiver(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        raise NotImplementedError

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        info = update_info
        self.model.load_weights(
            (name, torch.frombuffer(array, dtype=getattr(torch, dtype)).view(shape).to(self.device))
            for name, dtype, shape, array in zip(info.names, info.dtypes, info.shapes, info.arrays, strict=True)
        )

    def shutdown(self) -> None:
        pass


class ObjectStoreEngine(_Verified, _ObjectStoreReceiver):
    """Engine side of `object_store`."""


class NCCLEngine(_Verified, NCCLWeightTransferEngine):
    """Engine side of `nccl`."""


class IPCEngine(_Verified, IPCWeightTransferEngine):
    """Engine side of `ipc`."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()


class Witness:
    """Extension of vLLM's worker, through which an engine shows what it received."""

    def forget_weight_update(self) -> None:
        """Let an update begin though the last one was never finished."""
        self._weight_update_active = False

    def weight_checksums(self) -> Checksums:
        return self.weight_transfer_engine.received  # type: ignore[attr-defined]


ENGINES: dict[str, type[WeightTransferEngine]] = {
    "object_store": ObjectStoreEngine,
    "nccl": NCCLEngine,
    "ipc": IPCEngine,
}
for _name, _engine in ENGINES.items():
    WeightTransferEngineFactory.register_engine(f"verified_{_name}", _engine)
