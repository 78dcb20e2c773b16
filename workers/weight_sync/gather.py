"""The trainer's side of a weight update: gathers whole tensors of a sharded model, layer by layer, with checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from workers.api import Request, RolloutApi, request
from workers.weight_sync.checksums import Checksums, checksum

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import ParamMeta


_Make = Callable[[], Tensor]
_ShapeOf = Callable[[Tensor], tuple[int, ...]]


class ParameterGatherer(Protocol):
    """Gathers parameters of a model that may be sharded over ranks. Every training backend is one."""

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[bool]:
        """Context: these parameters (or buffers) are whole on every rank, for reading. Collective if they are sharded.

        Yields whether their memory is freed at the end of the context: tensors needed later must then be copied.
        """

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the gathered parameter."""


class Unsharded:
    """The gatherer of a model that is whole on every rank."""

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)


UNSHARDED = Unsharded()


@dataclass(frozen=True)
class _Weight:
    """One tensor under its name in a checkpoint, and the parameters (or the buffer) that it is computed from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    make: _Make


def _merged_weights(module: nn.Module, shape_of: _ShapeOf) -> dict[str, _Weight]:
    """Name -> tensor, with the names that the module would have without adapters: all of its state_dict, including persistent
    buffers; active adapters are merged, tied weights occur once."""
    weights: dict[str, _Weight] = {}
    seen: set[int] = set()
    for prefix, owner, wrappers in _owners(module):
        for name, tensor in _saved(owner):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = f"{prefix}.{name}" if prefix else name
            whole = _whole(module, owner, tensor, shape_of)
            if (layer := wrappers.get(name)) is not None:
                active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
                parts = [part for adapter in active for part in _parts(layer, adapter).values()]
                whole = replace(whole, parts=(*whole.parts, *parts), make=partial(_merged, whole.make, layer, active))
            weights[full] = whole
    return weights


def _owners(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """All modules except adapters: name without adapters, module, and PEFT's layer around each of its parameters.

    PEFT wraps a linear layer in a layer that adapts its `weight`. If it adapts several parameters of a module, such as experts,
    it nests several layers.
    """
    wrappers: dict[str, Any] = {}
    while hasattr(module, "get_delta_weight"):
        wrappers[getattr(module, "parameter_name", "weight")] = module
        module = module.base_layer  # type: ignore[assignment]
    yield prefix, module, wrappers
    for name, child in module.named_children():
        yield from _owners(child, f"{prefix}.{name}" if prefix else name)


def _saved(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors in its state_dict."""
    yield from owner.named_parameters(recurse=False)
    for name, buffer in owner.named_buffers(recurse=False):
        if name not in owner._non_persistent_buffers_set:
            yield name, buffer


def _adapter_weights(module: nn.Module, adapter: str, shape_of: _ShapeOf) -> dict[str, _Weight]:
    """The adapter's tensors, with the names in PEFT's files."""
    return {
        f"base_model.model.{prefix}.{name.replace(f'.{adapter}.', '.')}": _whole(module, layer, parameter, shape_of)
        for prefix, layer in _adapted(module).items()
        for name, parameter in _parts(layer, adapter).items()
    }


def _adapted(module: nn.Module) -> dict[str, Any]:
    """The layers with adapters."""
    return {name: child for name, child in module.named_modules() if hasattr(child, "get_delta_weight")}


def _parts(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    """A layer's parameters of one adapter, such as `lora_A.NAME.weight`; empty if the layer does not have this adapter."""
    return {
        name: p for name, p in layer.named_parameters() if name.startswith("lora_") and name.split(".")[1] == adapter
    }


def _whole(module: nn.Module, owner: nn.Module, tensor: Tensor, shape_of: _ShapeOf) -> _Weight:
    """A parameter or buffer, converted back to the model's type if bitsandbytes quantized it."""
    if type(tensor).__name__ not in ("Params4bit", "Int8Params"):
        return _Weight(shape_of(tensor), tensor.dtype, (tensor,), tensor.detach)
    from peft.utils.integrations import dequantize_module_weight

    config: Any = module.config
    shape, dtype = getattr(tensor, "quant_state", tensor).shape, config.dtype
    return _Weight(tuple(shape), dtype, (tensor,), lambda: dequantize_module_weight(owner).detach().to(dtype))


def _layer(name: str) -> str:
    """Key of the tensors that are gathered together, one layer at a time: the name up to its first number."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:end])


def _merged(base: _Make, layer: Any, adapters: Sequence[str]) -> Tensor:
    """The merged weight of base and adapters, applied one after the other and rounded once.

    DoRA (Liu et al. 2024, equation 5) scales the result of LoRA so that each output's weights have the learned norm. Like PEFT,
    this takes the norm before scaling from the base and this adapter only, without the other adapters.
    """
    rounded = base()
    weight = merged = rounded.float()
    for adapter in adapters:
        delta = _delta(layer, adapter)
        merged = merged + delta
        if adapter in layer.lora_magnitude_vector:
            inputs = 0 if layer.fan_in_fan_out else 1  # GPT-2's matrices are transposed
            norms = torch.linalg.vector_norm(weight + delta, dim=inputs, keepdim=True)
            magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
            merged = merged * (magnitude.view_as(norms) / norms)
    return merged.to(rounded.dtype)


def _delta(layer: Any, adapter: str) -> Tensor:
    """An adapter's change of a weight, in float32; PEFT's `get_delta_weight` rounds to the type of adapter or weight."""
    a, b = layer.lora_A[adapter].weight.detach().float(), layer.lora_B[adapter].weight.detach().float()
    if (experts := getattr(layer, "num_experts", 1)) == 1:
        delta = (b @ a).t() if layer.fan_in_fan_out else b @ a
    else:  # per expert, r rows of a and r columns of b; the order of inputs and outputs depends on the family
        order = "eoi" if layer._did_swap_in_out_features else "eio"
        a, b = a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts)
        delta = torch.einsum(f"eri,ore->{order}", a, b)
    return delta * layer.scaling[adapter]


class GatheredWeights:
    """A model's whole tensors, gathered one layer at a time if they are sharded.

    Active adapters are merged, and names and shapes are those of a checkpoint: transformers stores the experts of a layer in one
    tensor, most checkpoints in one per expert. With `adapter`, only this adapter's tensors, with the names in PEFT's files.

    It has the interface of vLLM's WeightSource but does not import it, which would cost every trainer a second and 80 MB.
    Iteration is collective if parameters are sharded: every rank must iterate. With `checked`, `checksums` holds the checksums of
    the last pass.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        gatherer: ParameterGatherer = UNSHARDED,
        checked: bool = False,
        adapter: str | None = None,
    ) -> None:
        self._module = module
        self._gatherer = gatherer
        self._adapter_only = adapter is not None
        shape_of = self._gatherer.whole_shape
        self._weights = _adapter_weights(module, adapter, shape_of) if adapter else _merged_weights(module, shape_of)
        self._checked = checked
        self.checksums: Checksums = {}
        layers: dict[str, list[str]] = {}
        for name in self._weights:
            layers.setdefault(_layer(name), []).append(name)
        self._layers = list(layers.values())
        self._templates: dict[str, Tensor] = {}
        for names in self._layers:
            shapes = {name: (self._weights[name].shape, self._weights[name].dtype) for name in names}
            self._templates |= self._in_checkpoint_form(
                {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
            )

    def metadata(self) -> list[ParamMeta]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._templates.items()]

    @property
    def shapes(self) -> dict[str, Tensor]:
        """The tensors in the order of iteration, without values (on the meta device)."""
        return self._templates

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._templates.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(tensor.nbytes for tensor in self._templates.values())

    def lacking(self) -> list[str]:
        """Keys of the module's state_dict that iteration does not cover: not of adapters, not of bitsandbytes' quantization data,
        and not another name of a tensor that it yields."""
        yielded = {id(tensor) for weight in self._weights.values() for tensor in weight.parts}
        missing = []
        for key, tensor in self._module.state_dict(keep_vars=True).items():
            name = key.replace(".base_layer", "")
            covered = id(tensor) in yielded or any(name.startswith(f"{parent}.") for parent in self._weights)
            if not covered and ".lora_" not in name:
                missing.append(name)
        return missing

    def _in_checkpoint_form(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one layer with names and shapes of a checkpoint."""
        if self._adapter_only:
            return tensors
        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self._module, tensors).items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.checksums = {}
        for names in self._layers:
            parts = [p for name in names for p in self._weights[name].parts]
            with self._gatherer.gathered(parts) as freed_after, torch.no_grad():
                tensors = self._in_checkpoint_form({name: self._weights[name].make() for name in names})
                if freed_after:  # consumers hold tensors until a bucket is full
                    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                if self._checked:
                    self.checksums[name] = checksum(tensor)
                yield name, tensor


class EngineClient:
    """The calls of one update to all engines (vLLM's VLLMWeightSyncClient); the last one sends version and checksums."""

    def __init__(self, engines: list[ActorHandle], source: GatheredWeights, tensor_parallel: int) -> None:
        self.handles = engines
        self.source = source
        self.tensor_parallel = tensor_parallel
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """In a joint communicator, each engine's ranks follow those of the previous engine."""
        calls = []
        for i, handle in enumerate(self.handles):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += i * self.tensor_parallel
            calls.append(_send(handle, request(RolloutApi.init_weight_transfer_engine, info)))
        ray.get(calls)

    def start_weight_update(self) -> None:
        self._all(request(RolloutApi.start_weight_update))

    def update_weights(self, update_info: Any) -> None:
        self._all(request(RolloutApi.update_weights, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(request(RolloutApi.finish_weight_update, self.version, self.source.checksums))

    def _all(self, call: Request[None]) -> None:
        ray.get([_send(handle, call) for handle in self.handles])


def _send(engine: ActorHandle, call: Request[None]) -> ray.ObjectRef:
    return engine.call.remote("rollout", call.method.name, *call.args)
