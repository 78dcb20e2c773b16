"""Loading of models: config, weights and LoRA adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from configs.schema import LoraSettings, ModelSettings
from workers.models.weight_coverage import refuse_unfilled


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence that a model was built for, in tokens; None where it has no limit (ALiBi)."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    return None


def load_config(path: str, settings: ModelSettings, scalar: bool) -> PreTrainedConfig:
    """A model's config, with dropout turned off: the policy that is trained must be the policy that sampled."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    if scalar:
        config.num_labels = 1
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def has_scalar_head(config: PreTrainedConfig) -> bool:
    """Whether a model of this family can have a scalar head."""
    own_classes = getattr(config, "auto_map", None) or {}
    return (
        type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or "AutoModelForSequenceClassification" in own_classes
    )


def load_hf(
    settings: ModelSettings, path: str, scalar: bool, seed: int, begins_head: bool = False, **options: Any
) -> PreTrainedModel:
    """A Hugging Face model with a language-model or a scalar head, with the folder's weights or random ones from the seed.

    begins_head: a scalar head may be random where the folder holds a language model. options: arguments of from_pretrained.

    Raises ValueError where the folder's weights are not exactly the model's.
    """
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = load_config(path, settings, scalar)
    if scalar and not has_scalar_head(config):
        raise ValueError(
            f"{path}: transformers has no {config.model_type} with a scalar head, so it cannot give values or scores"
        )
    options |= {"dtype": getattr(torch, settings.dtype), "trust_remote_code": settings.trust_remote_code}
    if getattr(config, "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # other implementations ignore the cap
    if settings.quantize:
        options |= _quantized(settings)
    torch.manual_seed(seed)
    if settings.init == "random":
        model = auto.from_config(config, **options)
    else:
        checked = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = auto.from_pretrained(path, **checked, **options)
        refuse_unfilled(path, model, info, begins_head)
    if scalar and not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{path}: a {type(model).__name__} has no linear head named `score`, so it cannot give values or scores"
        )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _quantized(settings: ModelSettings) -> dict[str, Any]:
    """Options with which from_pretrained quantizes all matrices but the heads, on this process's GPU.

    4 bits: normal floats with quantized scales (Dettmers et al. 2023, section 3).
    """
    bits = BitsAndBytesConfig(
        load_in_4bit=settings.quantize == "4bit",
        load_in_8bit=settings.quantize == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": bits, "device_map": {"": torch.cuda.current_device()}}


LEARNS = "default"
"""Name of the adapter that `add_lora` adds: PEFT's default."""


def add_lora(hf: PreTrainedModel, settings: LoraSettings, seed: int) -> nn.Module:
    """Add adapters to the model, in place; returns the PEFT wrapper. A scalar head has no adapter: all of it is trained.

    Raises ValueError where `lora.targets` names a layer that takes no adapter, or matches no layer.
    """
    from peft import LoraConfig, get_peft_model  # two seconds and 80 MB that full training need not spend

    torch.manual_seed(seed)
    head = getattr(hf, "score", None)
    try:
        wrapper = get_peft_model(
            hf,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=settings.targets,
                exclude_modules=None if head is None else ["score"],
                use_rslora=settings.rslora,
                use_dora=settings.dora,
            ),
        )
    except ValueError as error:
        raise ValueError(f"model.lora.targets: {error}") from error
    for layer in (hf.get_input_embeddings(), hf.get_output_embeddings()):
        if hasattr(layer, "lora_A"):
            raise ValueError(
                f"model.lora.targets: was {settings.targets}, but embeddings and the language-model head take no adapter here"
            )
    for name, layer in hf.named_modules():
        if hasattr(layer, "get_delta_weight") and not (hasattr(layer, "parameter_name") or _is_linear(layer)):
            raise ValueError(
                f"model.lora.targets: was {settings.targets}, but {name} is a {type(layer.get_base_layer()).__name__}, and only "
                "linear layers and experts take an adapter here"
            )
    if head is not None:
        head.requires_grad_(True)
    return wrapper


def _is_linear(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
