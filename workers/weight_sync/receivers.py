"""Receivers, the engine's side of a weight update (protocol: workers.weight_sync): vLLM's transports with checksums.

Transports: `object_store` (ours: buckets in Ray's shared memory), `nccl` and `ipc` (vLLM's). Each carries either all weights,
which replace the old ones, or an adapter's, which are stored until the update is finished and then applied to the weights that
the engine started with. vLLM imports this module in each of its worker processes, as the module of its `worker_extension_cls`.
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
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from workers.weight_sync.checksums import Checksums, checksum
from workers.weight_sync.engine_fixes import apply_fixes
from workers.weight_sync.reloading import begin_reload, by_expert, end_reload

apply_fixes()  # vLLM imports this module before it builds a model


class _Verified:
    """Mixin of a transport's receiver: a checksum of every tensor that load_weights gets."""

    received: Checksums

    def start_weight_update(self) -> None:
        self.received = {}

    def receive_weights(self, update_info: Any) -> None:
        load = self.load

        def checked(weights: Iterable[tuple[str, Tensor]]) -> Any:
            return load(self._with_checksums(weights))

        self.model.load_weights = checked  # type: ignore[attr-defined]
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            del self.model.load_weights  # type: ignore[attr-defined]

    def _with_checksums(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.received[name] = checksum(tensor)
            yield name, tensor

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        raise NotImplementedError


class _Weights(_Verified):
    """All weights: a reload, with its corrections (workers.weight_sync.reloading)."""

    incomplete: list[str]

    def start_weight_update(self) -> None:
        super().start_weight_update()
        begin_reload(self.model, self.model_config)  # type: ignore[attr-defined]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        model = self.model  # type: ignore[attr-defined]
        return type(model).load_weights(model, by_expert(model, weights))

    def finish_weight_update(self) -> None:
        self.incomplete = end_reload(self.model, self.model_config)  # type: ignore[attr-defined]


class _Adapter(_Verified):
    """An adapter: copies of its tensors, since vLLM multiplies the scale into them."""

    tensors: dict[str, Tensor]

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.tensors = {}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        self.tensors |= {name: tensor.to("cpu", copy=True) for name, tensor in weights}

    def finish_weight_update(self) -> None:
        """vLLM drops all adapters after this; `WeightVerifier.apply_adapter` follows."""


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Empty: this transport needs no rendezvous."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    arrays: list[np.ndarray]
    """uint8 views of the tensors, in shared memory. The engine may hold them until the update is finished."""


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


class ObjectStoreEngine(_Weights, _ObjectStoreReceiver):
    """All weights over `object_store`."""


class ObjectStoreAdapter(_Adapter, _ObjectStoreReceiver):
    """An adapter over `object_store`."""


class NCCLEngine(_Weights, NCCLWeightTransferEngine):
    """All weights over `nccl`."""


class NCCLAdapter(_Adapter, NCCLWeightTransferEngine):
    """An adapter over `nccl`."""


class _Closing:
    """Mixin of `ipc`: releases the trainer's memory."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        self._packed_importer.close()  # type: ignore[attr-defined]


class IPCEngine(_Closing, _Weights, IPCWeightTransferEngine):
    """All weights over `ipc`."""


class IPCAdapter(_Closing, _Adapter, IPCWeightTransferEngine):
    """An adapter over `ipc`."""


class WeightVerifier:
    """Extension of vLLM's worker: reports what an engine received."""

    def forget_weight_update(self) -> None:
        """Allow an update to start although the last one was not finished."""
        self._weight_update_active = False

    def weight_checksums(self) -> Checksums:
        return self.weight_transfer_engine.received  # type: ignore[attr-defined]

    def layers_without_weights(self) -> list[str]:
        """Layers that got no weights in the last update, although all tensors arrived: vLLM loaded them elsewhere."""
        return getattr(self.weight_transfer_engine, "incomplete", [])  # type: ignore[attr-defined]

    def apply_adapter(self, config: dict[str, Any]) -> None:
        """Replace the last adapter by the one that arrived. config: PEFT's.

        Raises ValueError where it has layers to which this engine applies no adapter.
        """
        lora_manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        manager = lora_manager._adapter_manager
        names = getattr(manager.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            self.weight_transfer_engine.tensors,  # type: ignore[attr-defined]
            PEFTHelper.from_dict(config),
            device="cpu",  # activate_adapter copies them to the engine's device
            dtype=lora_manager.lora_config.lora_dtype,
            weights_mapper=names and names.get_rename_mapper(),
        )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapter)
        if unsupported := adapter.loras.keys() - manager.modules.keys():
            raise ValueError(
                f"weight_sync.lora: was 'adapter', but vLLM applies none to {', '.join(sorted(unsupported)[:3])}; merged would "
                "fit"
            )
        manager.activate_adapter(ADAPTER_ID)
        self.weight_transfer_engine.tensors = {}  # type: ignore[attr-defined]


ADAPTER_ID = 1
"""vLLM's id of an engine's only adapter."""

ENGINES: dict[str, type[WeightTransferEngine]] = {
    "weights_object_store": ObjectStoreEngine,
    "weights_nccl": NCCLEngine,
    "weights_ipc": IPCEngine,
    "adapter_object_store": ObjectStoreAdapter,
    "adapter_nccl": NCCLAdapter,
    "adapter_ipc": IPCAdapter,
}
for _name, _engine in ENGINES.items():
    WeightTransferEngineFactory.register_engine(f"verified_{_name}", _engine)
