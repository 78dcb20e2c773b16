"""The trainer's side of weight transfer: whole tensors out of a sharded model, layer by layer, and their checksums."""

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
    """Gives the whole parameters of a model that may be sharded over ranks. Every training backend is one."""

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[bool]:
        """Within it these parameters (or buffers) are whole on every rank, to be read. Collective where they are sharded.

        It yields whether their memory is freed at its end, so that what is still needed then must be copied.
        """

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape that a parameter has when it is gathered."""


class Unsharded:
    """The gatherer of a model that is whole on every rank."""

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)


UNSHARDED = Unsharded()


@dataclass(frozen=True)
class _Weight:
    """One tensor of the model as others know it, and the parameters (or the buffer) that it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    make: _Make


def _merged_weights(module: nn.Module, shape_of: _ShapeOf) -> dict[str, _Weight]:
    """Name -> tensor, under the names that the module would have without adapters: all that its state_dict holds, so
    persistent buffers too; active adapters merged, tied weights once."""
    found: dict[str, _Weight] = {}
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
            found[full] = whole
    return found


def _owners(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """All modules but those of adapters: name without adapters, module, and PEFT's layer around each of its parameters.

    PEFT puts a layer around a linear layer, whose `weight` it adapts, and one around the other where it adapts several
    parameters of a module, as it does with experts.
    """
    wrappers: dict[str, Any] = {}
    while hasattr(module, "get_delta_weight"):
        wrappers[getattr(module, "parameter_name", "weight")] = module
        module = module.base_layer  # type: ignore[assignment]
    yield prefix, module, wrappers
    for name, child in module.named_children():
        yield from _owners(child, f"{prefix}.{name}" if prefix else name)


def _saved(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors that a state_dict holds."""
    yield from owner.named_parameters(recurse=False)
    for name, buffer in owner.named_buffers(recurse=False):
        if name not in owner._non_persistent_buffers_set:
            yield name, buffer


def _adapter_weights(module: nn.Module, adapter: str, shape_of: _ShapeOf) -> dict[str, _Weight]:
    """The adapter's own tensors, under the names of PEFT's files."""
    return {
        f"base_model.model.{prefix}.{name.replace(f'.{adapter}.', '.')}": _whole(module, layer, parameter, shape_of)
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


def _whole(module: nn.Module, owner: nn.Module, tensor: Tensor, shape_of: _ShapeOf) -> _Weight:
    """A parameter or buffer as it is or, where bitsandbytes holds it in fewer bits, in the model's type again."""
    if type(tensor).__name__ not in ("Params4bit", "Int8Params"):
        return _Weight(shape_of(tensor), tensor.dtype, (tensor,), tensor.detach)
    from peft.utils.integrations import dequantize_module_weight

    config: Any = module.config
    shape, dtype = getattr(tensor, "quant_state", tensor).shape, config.dtype
    return _Weight(tuple(shape), dtype, (tensor,), lambda: dequantize_module_weight(owner).detach().to(dtype))


def _layer(name: str) -> str:
    """What is gathered together: the part of a name up to its first number, so one layer of the stack at a time."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:end])


def _merged(base: _Make, layer: Any, adapters: Sequence[str]) -> Tensor:
    """The weight that computes what base and adapters compute together, one adapter after the other, rounded once.

    DoRA (Liu et al. 2024, equation 5) scales what LoRA gives so that each output's weights have the length that was learned.
    PEFT takes the length for it from the base and this adapter alone, whatever other adapters made of the base before.
    """
    rounded = base()
    weight = merged = rounded.float()
    for adapter in adapters:
        delta = _delta(layer, adapter)
        merged = merged + delta
        if adapter in layer.lora_magnitude_vector:
            inputs = 0 if layer.fan_in_fan_out else 1  # GPT-2's matrices lie the other way
            lengths = torch.linalg.vector_norm(weight + delta, dim=inputs, keepdim=True)
            magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
            merged = merged * (magnitude.view_as(lengths) / lengths)
    return merged.to(rounded.dtype)


def _delta(layer: Any, adapter: str) -> Tensor:
    """What an adapter adds to a weight, in float32; PEFT's `get_delta_weight` rounds to the type of adapter or weight."""
    a, b = layer.lora_A[adapter].weight.detach().float(), layer.lora_B[adapter].weight.detach().float()
    if (experts := getattr(layer, "num_experts", 1)) == 1:
        delta = (b @ a).t() if layer.fan_in_fan_out else b @ a
    else:  # of each expert r rows of a and r columns of b; whether inputs come last depends on the family
        order = "eoi" if layer._did_swap_in_out_features else "eio"
        of_each = a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts)
        delta = torch.einsum(f"eri,ore->{order}", *of_each)
    return delta * layer.scaling[adapter]


class GatheredWeights:
    """A model's whole tensors, gathered one layer at a time where they are sharded.

    Active adapters are merged, and names and shapes are those of a checkpoint: transformers holds the experts of a layer as
    one tensor, and checkpoints mostly have one for each. Or else one adapter is given alone, under the names of PEFT's files.

    A vLLM WeightSource in all but name: importing that would cost every trainer a second and 80 MB. Iterating is collective
    where parameters are sharded: every rank must do it. `checksums` holds those of the last pass, where `checked`.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        gatherer: ParameterGatherer = UNSHARDED,
        checked: bool = False,
        alone: str | None = None,
    ) -> None:
        self._module = module
        self._gatherer = gatherer
        self._alone = alone is not None
        shape_of = self._gatherer.whole_shape
        self._weights = _adapter_weights(module, alone, shape_of) if alone else _merged_weights(module, shape_of)
        self._checked = checked
        self.checksums: Checksums = {}
        layers: dict[str, list[str]] = {}
        for name in self._weights:
            layers.setdefault(_layer(name), []).append(name)
        self._layers = list(layers.values())
        self._written: dict[str, Tensor] = {}
        for names in self._layers:
            shapes = {name: (self._weights[name].shape, self._weights[name].dtype) for name in names}
            self._written |= self._as_written(
                {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
            )

    def metadata(self) -> list[ParamMeta]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._written.items()]

    @property
    def shapes(self) -> dict[str, Tensor]:
        """What iterating gives, in its order, without values."""
        return self._written

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._written.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(tensor.nbytes for tensor in self._written.values())

    def lacking(self) -> list[str]:
        """Keys of the module's state_dict that belong neither to adapters nor to a tensor that is given, under this name or
        another, nor to the form in which bitsandbytes holds one."""
        given = {id(tensor) for weight in self._weights.values() for tensor in weight.parts}
        lacking = []
        for key, tensor in self._module.state_dict(keep_vars=True).items():
            name = key.replace(".base_layer", "")
            held = any(name.startswith(f"{parent}.") for parent in self._weights) if id(tensor) not in given else True
            if not held and ".lora_" not in name:
                lacking.append(name)
        return lacking

    def _as_written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one layer under the names and in the shapes of files."""
        if self._alone:
            return tensors
        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self._module, tensors).items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.checksums = {}
        for names in self._layers:
            parts = [p for name in names for p in self._weights[name].parts]
            with self._gatherer.gathered(parts) as freed_after, torch.no_grad():
                tensors = self._as_written({name: self._weights[name].make() for name in names})
                if freed_after:  # receivers keep some until a bucket is full
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
            calls.append(_send(handle, request(RolloutApi.init_weight_transfer_engine, info)))
        ray.get(calls)

    def start_weight_update(self) -> None:
        self._all(request(RolloutApi.start_weight_update))

    def update_weights(self, update_info: Any) -> None:
        self._all(request(RolloutApi.update_weights, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(request(RolloutApi.finish_weight_update, self.version, self.source.checksums))

    def _all(self, asked: Request[None]) -> None:
        ray.get([_send(handle, asked) for handle in self.handles])


def _send(engine: ActorHandle, asked: Request[None]) -> ray.ObjectRef:
    return engine.call.remote("rollout", asked.method.name, *asked.args)
