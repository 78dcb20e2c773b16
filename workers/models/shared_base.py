"""One frozen base in a process, shared by the models of several roles.

Each role has its own modules, adapters and head; only the base's parameters are shared. A role computes, trains, saves and
publishes exactly what it would with a base of its own, and has no access to another role's adapter:

    actor       base + adapter (trained)
    reference   base
    reward      base + adapter (frozen) + head
    critic      base + the reward model's adapter (frozen) + adapter and head (trained)
"""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from configs.schema import ModelSettings
from workers.models.loading import LEARNS, add_lora, load_config, load_hf
from workers.models.lora import HEAD, base_of, real, refuse_other_base, scalar_adapter

START = "start"
"""Name in PEFT of the frozen adapter that a scalar model starts from; the trained one is `LEARNS`."""


class SharedBase:
    """The frozen base of a process, loaded for the first role that needs it. Each role gets a copy of its modules."""

    def __init__(self) -> None:
        self.path = ""
        self.model: PreTrainedModel | None = None

    def language_model(self, path: str, settings: ModelSettings, seed: int) -> PreTrainedModel:
        """The base in new modules that hold its parameters."""
        if self.model is None:
            self.path = real(path)
            self.model = load_hf(settings, path, scalar=False, seed=seed).requires_grad_(False)
        if real(path) != self.path:
            raise ValueError(f"{path}: the roles of this process share {self.path} as base, and cannot have another")
        return _copy_modules(self.model)

    def scalar_model(self, path: str, settings: ModelSettings, seed: int, begins_head: bool) -> PreTrainedModel:
        """The base with a scalar head: the exported adapter's head, or a new one where the model is the base."""
        adapter = scalar_adapter(path)
        config = load_config(path, settings, scalar=True)
        if adapter is None and config.architectures and "SequenceClassification" in config.architectures[0]:
            refuse_other_base(path, self.path)
        if adapter is None and not begins_head:
            raise ValueError(f"{path}: has no scalar head, so it gives no scores")
        base = self.language_model(base_of(adapter) if adapter else path, settings, seed)
        dtype = getattr(torch, settings.dtype)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
        setattr(model, model.base_model_prefix, base.base_model)
        model.score.to_empty(device="cpu")
        if adapter:
            model.score.load_state_dict(_read(adapter)[1])
        else:
            torch.manual_seed(seed)
            model._init_weights(model.score)
        if missing := [name for name, p in model.named_parameters() if p.is_meta]:
            raise ValueError(
                f"shared_base: {config.model_type} with a scalar head has weights beside its base and the head: {missing}"
            )
        return model


def build(
    base: SharedBase | None, path: str, settings: ModelSettings, scalar: bool, seed: int, learns: bool
) -> tuple[PreTrainedModel, Any]:
    """A role's Hugging Face model, on a shared base or its own, and the PEFT wrapper of its adapters (or None).

    learns: the role is trained (adapters or all weights, by the settings); a scalar head may then be new.
    """
    if base is None:
        hf = load_hf(settings, path, scalar, seed, begins_head=learns)
    elif scalar:
        hf = base.scalar_model(path, settings, seed, begins_head=learns)
    else:
        hf = base.language_model(path, settings, seed)
    peft = add_lora(hf, settings.lora, seed) if settings.lora and learns else None
    if base is not None and scalar and (adapter := scalar_adapter(path)):
        peft = _add_frozen_adapter(hf, peft, adapter)
    return hf, peft


def _copy_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules with the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _add_frozen_adapter(hf: PreTrainedModel, peft: Any, folder: Path) -> Any:
    """Add a frozen adapter from its folder, applied together with the trained one."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    # The model already has the head, and PEFT must not wrap it; a frozen adapter has no dropout.
    config.modules_to_save, config.task_type, config.lora_dropout = None, None, 0.0
    if peft is None:
        peft = PeftModel(hf, config, adapter_name=START, autocast_adapter_dtype=False)
    else:
        peft.add_adapter(START, config, autocast_adapter_dtype=False)
        peft.base_model.set_adapter([START, LEARNS])
    loaded = set_peft_model_state_dict(peft, _read(folder)[0], adapter_name=START)
    mismatched = [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if f".{START}." in name)]
    if mismatched:
        raise ValueError(
            f"{folder}: is not an adapter of this model; {len(mismatched)} weights do not fit, first {mismatched[0]}"
        )
    for name, parameter in hf.named_parameters():
        if f".{START}" in name:
            parameter.requires_grad_(False)
    return peft


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter's tensors, and its head's tensors under the head's own names."""
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}, head
