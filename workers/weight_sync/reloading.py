"""New weights in a live vLLM model: vLLM's layerwise reload, and what it leaves out.

vLLM 0.32 puts a layer's parameters on the meta device, keeps what `load_weights` brings for them until the layer is whole,
then fills it, processes it (on CPU: packs it) and copies the result to where the old weights lie. Left alone, it would be
silently wrong with

- experts on CPU: they are packed when the engine starts, and not again;
- tied word embeddings on CPU: the head keeps the packed copy of its old weights;
- tensors that a model's `load_weights` writes by itself rather than by the parameter's loader (gpt_oss: experts, sinks);

and would fail of loaders that are partial functions (minimax_m2), and after an update that broke off: its layers are half loaded.
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
    """Let the model take new weights through `load_weights`, in any number of calls."""
    finalize_layerwise_reload(model, config)  # what an update that broke off left half loaded
    _name_loaders(model)
    initialize_layerwise_reload(model)
    for layer in model.modules():
        if not _is_processed(layer):
            # Its tensors are used as they are loaded, so they may as well be written where they lie.
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            for tensor in get_layer_tensors(layer).values():  # biases never leave their layer: their loader was wrapped
                tensor.weight_loader = _get_original_loader(tensor)
            info.reset()
        elif current_platform.is_cpu() and isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None  # as before the first load, which is when experts are packed


def end_reload(model: nn.Module, config: ModelConfig) -> list[str]:
    """The new weights serve. Returns the layers that did not get all of theirs."""
    lacking = [name for name, layer in model.named_modules() if _is_lacking(model, layer)]
    finalize_layerwise_reload(model, config)
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)
    return lacking


def _name_loaders(model: nn.Module) -> None:
    """Loaders are recognised by their names, which partial functions do not have."""
    for tensor in model.parameters():
        loader = getattr(tensor, "weight_loader", None)
        if isinstance(loader, partial):
            loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]


def _is_processed(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase) or is_deferred_attention_layer(layer)


def _is_lacking(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer was to get weights and did not get all. Vocabularies are padded, which nothing is loaded for; a head that
    is the word embeddings too gets them as those."""
    info = get_layerwise_info(layer)
    if not info.can_load() or is_deferred_attention_layer(layer):
        return False  # it is whole already; or it has scales, which there may be or not
    parameters = _serving(layer)
    if not isinstance(layer, VocabParallelEmbedding):
        return bool(parameters) and info.load_numel < (info.load_numel_total or 0)
    others = [other for other in model.modules() if isinstance(other, VocabParallelEmbedding) and _has_loaded(other)]
    shared = any(mine is theirs for other in others for theirs in _serving(other) for mine in parameters)
    return not info.load_numel and not shared


def _has_loaded(layer: nn.Module) -> bool:
    """Whether it got weights: if all of them, it is processed already."""
    info = get_layerwise_info(layer)
    return not info.can_load() or bool(info.load_numel)


def _serving(layer: nn.Module) -> list[Tensor]:
    """The parameters that a layer computes with when an update is over: until it is whole they are put aside."""
    aside = get_layerwise_info(layer).kernel_tensors
    return list((aside[0] if aside else dict(layer.named_parameters(recurse=False))).values())


def by_expert(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights; gpt_oss's experts one by one, which its `load_weights` then gives to the parameters' loaders."""
    for name, tensor in weights:
        if type(model).__name__ == "GptOssForCausalLM" and ".mlp.experts." in name:
            layer, _, own = name.rpartition(".")
            yield from ((f"{layer}.{expert}.{own}", tensor[expert]) for expert in range(len(tensor)))
        else:
            yield name, tensor
