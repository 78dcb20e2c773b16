"""New weights in a running vLLM model: vLLM's layerwise reload, and corrections to it.

vLLM 0.32 puts a layer's parameters on the meta device and buffers the tensors from `load_weights` until the layer is complete. It
then fills the layer, processes it (on CPU: packs it) and copies the result over the old weights. Without corrections it would be
silently wrong for

- experts on CPU: they are packed when the engine starts, and never again;
- tied word embeddings on CPU: the head keeps the packed copy of its old weights;
- tensors that a model's `load_weights` writes directly, not through the parameter's loader (gpt_oss: experts, sinks);

and would fail on loaders that are partial functions (minimax_m2), and after an interrupted update, whose layers are half loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform


def begin_reload(model: nn.Module, config: ModelConfig) -> None:
    """Prepare the model for new weights through `load_weights`, in any number of calls."""
    finalize_layerwise_reload(model, config)  # layers that an interrupted update left half loaded
    _name_loaders(model)
    initialize_layerwise_reload(model)
    for layer in model.modules():
        if not _is_processed(layer):
            # Its tensors are used as they are loaded: write them in place.
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            for tensor in get_layer_tensors(layer).values():  # biases stay in their layer, but their loader was wrapped
                tensor.weight_loader = _get_original_loader(tensor)
            info.reset()
        elif current_platform.is_cpu() and isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None  # the state before the first load: experts are packed again


def end_reload(model: nn.Module, config: ModelConfig) -> list[str]:
    """Put the new weights into use. Returns the layers that did not get all of their weights."""
    incomplete = [name for name, layer in model.named_modules() if _is_incomplete(model, layer)]
    finalize_layerwise_reload(model, config)
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)
    return incomplete


def _name_loaders(model: nn.Module) -> None:
    """Give names to loaders that are partial functions: vLLM recognises loaders by name."""
    for tensor in model.parameters():
        loader = getattr(tensor, "weight_loader", None)
        if isinstance(loader, partial):
            loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]


def _is_processed(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase) or is_deferred_attention_layer(layer)


def _is_incomplete(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer expects weights and did not get all of them. The padding of vocabularies gets none; a tied head gets its
    weights as word embeddings."""
    info = get_layerwise_info(layer)
    if not info.can_load() or is_deferred_attention_layer(layer):
        return False  # it is complete; or it has only scales, which are optional
    parameters = _parameters_in_use(layer)
    if not isinstance(layer, VocabParallelEmbedding):
        return bool(parameters) and info.load_numel < (info.load_numel_total or 0)
    others = [other for other in model.modules() if isinstance(other, VocabParallelEmbedding) and _has_loaded(other)]
    shared = any(own is other_own for other in others for other_own in _parameters_in_use(other) for own in parameters)
    return not info.load_numel and not shared


def _has_loaded(layer: nn.Module) -> bool:
    """Whether a layer got weights. One that got all of them is processed already."""
    info = get_layerwise_info(layer)
    return not info.can_load() or bool(info.load_numel)


def _parameters_in_use(layer: nn.Module) -> list[Tensor]:
    """The parameters that a layer computes with after an update; vLLM holds them aside until the layer is complete."""
    aside = get_layerwise_info(layer).kernel_tensors
    return list((aside[0] if aside else dict(layer.named_parameters(recurse=False))).values())


def by_expert(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights, with gpt_oss's experts one by one: its `load_weights` then uses the parameters' loaders."""
    for name, tensor in weights:
        if type(model).__name__ == "GptOssForCausalLM" and ".mlp.experts." in name:
            layer, _, own = name.rpartition(".")
            yield from ((f"{layer}.{expert}.{own}", tensor[expert]) for expert in range(len(tensor)))
        else:
            yield name, tensor
