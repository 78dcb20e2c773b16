"""The trainer's side of weight transfer: whole tensors out of a sharded model, layer by layer, and their checksums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import ray
import torch
from deepspeed import zero
from ray.actor import ActorHandle
from torch import Tensor, nn

from workers.checksums import Checksums, checksum

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import ParamMeta


@dataclass(frozen=True)
class _Weight:
    """One tensor of the model as others know it, and the parameters that it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[nn.Parameter, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _sharded(parameters: Sequence[nn.Parameter]) -> bool:
    return any(hasattr(p, "ds_id") for p in parameters)


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within it the parameters are whole, to be read. Collective under ZeRO-3; elsewhere they always are."""
    return zero.GatheredParameters(parameters, modifier_rank=None) if _sharded(parameters) else nullcontext()


def _weights(module: nn.Module) -> dict[str, _Weight]:
    """Name -> tensor, under the names of a plain Hugging Face model: adapters merged, tied weights once."""
    found: dict[str, _Weight] = {}
    seen: set[int] = set()
    adapters = {n: m for n, m in module.named_modules() if hasattr(m, "get_delta_weight")}

    def add(name: str, parameter: nn.Parameter, parts: tuple[nn.Parameter, ...], make: Callable[[], Tensor]) -> None:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = _Weight(_whole_shape(parameter), parameter.dtype, parts, make)

    for prefix, child in module.named_modules():
        if any(prefix.startswith(adapter + ".") for adapter in adapters):
            continue
        layer = adapters.get(prefix)
        owner: Any = child if layer is None else layer.get_base_layer()
        for name, parameter in owner.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if layer is not None and name == "weight":
                parts = (parameter, *(p for n, p in layer.named_parameters() if "lora_" in n))
                add(full, parameter, parts, partial(_merged, parameter, layer))
            else:
                add(full, parameter, (parameter,), partial(torch.Tensor.detach, parameter))
    return found


def _layer(name: str) -> str:
    """What is gathered together: the part of a name up to its first number, so one layer of the stack at a time."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:end])


def _merged(base: nn.Parameter, layer: Any) -> Tensor:
    whole = base.detach()
    for name in set(layer.active_adapters) & set(layer.lora_A):
        whole = whole + layer.get_delta_weight(name).to(base.dtype)
    return whole


class GatheredWeights:
    """A model's whole tensors from ZeRO 0 to 3, adapters merged, gathered one layer at a time.

    A vLLM WeightSource in all but name: importing that would cost every trainer a second and 80 MB. Iterating is collective
    under ZeRO-3: every rank must do it. `checksums` holds those of the last pass, where `checked`.
    """

    def __init__(self, module: nn.Module, checked: bool = False) -> None:
        self._weights = _weights(module)
        self._checked = checked
        self.checksums: Checksums = {}

    def metadata(self) -> list[ParamMeta]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, w.dtype, w.shape) for name, w in self._weights.items()]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(w.nbytes for w in self._weights.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(w.nbytes for w in self._weights.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.checksums = {}
        for _, names in groupby(self._weights, _layer):
            group = list(names)
            parts = [p for name in group for p in self._weights[name].parts]
            with gathered(parts), torch.no_grad():
                tensors = {name: self._weights[name].make() for name in group}
                if _sharded(parts):  # their tensors end with this block; receivers keep some until a bucket is full
                    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                if self._checked:
                    self.checksums[name] = checksum(tensor)
                yield name, tensor


class EngineClient:
    """The calls of one update to all engines (vLLM's VLLMWeightSyncClient); its end carries the version and the checksums."""

    def __init__(self, engines: list[ActorHandle], source: GatheredWeights, tensor_parallel: int) -> None:
        self.handles = engines
        self.source = source
        self.tensor_parallel = tensor_parallel
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine's ranks in a joint communicator follow those of the one before."""
        calls = []
        for i, handle in enumerate(self.handles):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += i * self.tensor_parallel
            calls.append(handle.call.remote("rollout", "init_weight_transfer_engine", info))
        ray.get(calls)

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", self.version, self.source.checksums)

    def _all(self, method: str, *args: Any) -> None:
        ray.get([handle.call.remote("rollout", method, *args) for handle in self.handles])
