"""The engines' side of weight transfer: vLLM transports, each wrapped so that what arrives is checked.

    trainer                                              every engine
    -------                                              ------------
    start_weight_update                             ->   serves nothing from here on
    for each bucket: gather layer by layer, send    ->   load_weights; a checksum of each tensor as it arrived
    finish_weight_update(version, checksums)        ->   equal to its own: serves the new version; else an error,
                                                         and it still serves nothing

Transports: `object_store` (ours: buckets in Ray's shared memory), `nccl` and `ipc` (vLLM's). Over each come either all weights,
which are loaded in place of the old, or those of an adapter, which are kept until the update is finished and then applied
beside the weights that the engine started with. vLLM imports this module in each of its worker processes, as the module of its
`worker_extension_cls`.
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
from workers.weight_sync.engine_fixes import repair
from workers.weight_sync.reloading import begin_reload, by_expert, end_reload

repair()  # vLLM imports this before it builds a model


class _Verified:
    """Mixin of a transport's engine side: checksums of what load_weights is given."""

    received: Checksums

    def start_weight_update(self) -> None:
        self.received = {}

    def receive_weights(self, update_info: Any) -> None:
        load = self.load

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

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        raise NotImplementedError


class _Weights(_Verified):
    """All weights: a reload, and the repairs that it needs (workers.weight_sync.reloading)."""

    lacking: list[str]

    def start_weight_update(self) -> None:
        super().start_weight_update()
        begin_reload(self.model, self.model_config)  # type: ignore[attr-defined]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        model = self.model  # type: ignore[attr-defined]
        return type(model).load_weights(model, by_expert(model, weights))

    def finish_weight_update(self) -> None:
        self.lacking = end_reload(self.model, self.model_config)  # type: ignore[attr-defined]


class _Adapter(_Verified):
    """An adapter: its tensors in memory of their own, for vLLM multiplies the scale into them."""

    tensors: dict[str, Tensor]

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.tensors = {}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        self.tensors |= {name: tensor.to("cpu", copy=True) for name, tensor in weights}

    def finish_weight_update(self) -> None:
        """vLLM drops all adapters after this; `Witness.apply_adapter` follows."""


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


class ObjectStoreEngine(_Weights, _ObjectStoreReceiver):
    """All weights over `object_store`."""


class ObjectStoreAdapter(_Adapter, _ObjectStoreReceiver):
    """An adapter over `object_store`."""


class NCCLEngine(_Weights, NCCLWeightTransferEngine):
    """All weights over `nccl`."""


class NCCLAdapter(_Adapter, NCCLWeightTransferEngine):
    """An adapter over `nccl`."""


class _Closing:
    """Mixin of `ipc`: it lets go of the trainer's memory."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        self._packed_importer.close()  # type: ignore[attr-defined]


class IPCEngine(_Closing, _Weights, IPCWeightTransferEngine):
    """All weights over `ipc`."""


class IPCAdapter(_Closing, _Adapter, IPCWeightTransferEngine):
    """An adapter over `ipc`."""


class WeightVerifier:
    """Extension of vLLM's worker, through which an engine shows what it received."""

    def forget_weight_update(self) -> None:
        """Let an update begin though the last one was never finished."""
        self._weight_update_active = False

    def weight_checksums(self) -> Checksums:
        return self.weight_transfer_engine.received  # type: ignore[attr-defined]

    def layers_without_weights(self) -> list[str]:
        """Layers that the last update did not reach, though all of it arrived: vLLM loaded it elsewhere."""
        return getattr(self.weight_transfer_engine, "lacking", [])  # type: ignore[attr-defined]

    def apply_adapter(self, config: dict[str, Any]) -> None:
        """Put the adapter that arrived in the place of the last one. config: PEFT's.

        Raises ValueError where it is for layers to which this engine cannot apply it.
        """
        workers = self.model_runner.lora_manager  # type: ignore[attr-defined]
        manager = workers._adapter_manager
        names = getattr(manager.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            self.weight_transfer_engine.tensors,  # type: ignore[attr-defined]
            PEFTHelper.from_dict(config),
            device="cpu",  # whence activate_adapter takes them to the engine's device
            dtype=workers.lora_config.lora_dtype,
            weights_mapper=names and names.get_rename_mapper(),
        )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapter)
        if strange := adapter.loras.keys() - manager.modules.keys():
            raise ValueError(
                f"publish.lora: was 'adapter', but vLLM applies none to {', '.join(sorted(strange)[:3])}; merged would fit"
            )
        manager.activate_adapter(ADAPTER_ID)
        self.weight_transfer_engine.tensors = {}  # type: ignore[attr-defined]


ADAPTER_ID = 1
"""Number of the one adapter that an engine has, in vLLM's words."""

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
