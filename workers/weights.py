"""The trainer's side of weight transfer: whole tensors out of a sharded model, layer by layer, and their checksums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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


_Make = Callable[[], Tensor]


@dataclass(frozen=True)
class _Weight:
    """One tensor of the model as others know it, and the parameters that it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[nn.Parameter, ...]
    make: _Make

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


def _merged_weights(module: nn.Module) -> dict[str, _Weight]:
    """Name -> tensor, under the names of a plain Hugging Face model: active adapters merged, tied weights once."""
    found: dict[str, _Weight] = {}
    seen: set[int] = set()
    adapters = _adapted(module)

    for prefix, child in module.named_modules():
        if any(prefix.startswith(adapter + ".") for adapter in adapters):
            continue
        layer = adapters.get(prefix)
        owner: Any = child if layer is None else layer.get_base_layer()
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            whole = _whole(module, owner, parameter)
            if layer is not None and name == "weight":
                active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
                parts = [part for adapter in active for part in _parts(layer, adapter).values()]
                whole = replace(whole, parts=(parameter, *parts), make=partial(_merged, whole.make, layer, active))
            found[full] = whole
    return found


def _adapter_weights(module: nn.Module, adapter: str) -> dict[str, _Weight]:
    """The adapter's own tensors, under the names of PEFT's files."""
    return {
        f"base_model.model.{prefix}.{name.replace(f'.{adapter}.', '.')}": _whole(module, layer, parameter)
        for prefix, layer in _adapted(module).items()
        for name, parameter in _parts(layer, adapter).items()
    }


def _adapted(module: nn.Module) -> dict[str, Any]:
    """The layers that have adapters."""
    return {name: child for name, child in module.named_modules() if hasattr(child, "get_delta_weight")}


def _parts(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    """A layer's parameters of one adapter, none where it has no such one: `lora_A.NAME.weight` and its like."""
    return {
        name: p for name, p in layer.named_parameters() if name.startswith("lora_") and name.split(".")[1] == adapter
    }


def _whole(module: nn.Module, owner: nn.Module, parameter: nn.Parameter) -> _Weight:
    """A parameter as it is or, where bitsandbytes holds it in fewer bits, in the model's type again."""
    if type(parameter).__name__ not in ("Params4bit", "Int8Params"):
        return _Weight(_whole_shape(parameter), parameter.dtype, (parameter,), parameter.detach)
    from peft.utils.integrations import dequantize_module_weight

    config: Any = module.config
    shape, dtype = getattr(parameter, "quant_state", parameter).shape, config.dtype
    return _Weight(tuple(shape), dtype, (parameter,), lambda: dequantize_module_weight(owner).detach().to(dtype))


def _layer(name: str) -> str:
    """What is gathered together: the part of a name up to its first number, so one layer of the stack at a time."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:end])


def _merged(base: _Make, layer: Any, adapters: Sequence[str]) -> Tensor:
    """The weight that computes what base and adapters compute together, one adapter after the other.

    DoRA (Liu et al. 2024, equation 5) scales what LoRA gives so that each output's weights have the length that was learned.
    PEFT takes the length for it from the base and this adapter alone, whatever other adapters made of the base before.
    """
    weight = merged = base()
    for adapter in adapters:
        delta = layer.get_delta_weight(adapter).to(weight.dtype)
        merged = merged + delta
        if adapter in layer.lora_magnitude_vector:
            inputs = 0 if layer.fan_in_fan_out else 1  # GPT-2's matrices lie the other way
            lengths = torch.linalg.vector_norm(weight + delta, dim=inputs, keepdim=True)
            merged = merged * (layer.lora_magnitude_vector[adapter].weight.detach().view_as(lengths) / lengths)
    return merged


class GatheredWeights:
    """A model's whole tensors from ZeRO 0 to 3, gathered one layer at a time.

    Active adapters are merged; or else one adapter is given alone.

    A vLLM WeightSource in all but name: importing that would cost every trainer a second and 80 MB. Iterating is collective
    under ZeRO-3: every rank must do it. `checksums` holds those of the last pass, where `checked`.
    """

    def __init__(self, module: nn.Module, checked: bool = False, alone: str | None = None) -> None:
        self._weights = _adapter_weights(module, alone) if alone else _merged_weights(module)
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
