"""One frozen base in a process, for the models of several roles.

Each role has modules of its own, and the adapters and the head in them; only the base's parameters are common. So a role
computes, trains, saves and publishes what it would with a base to itself, and sees no other role's adapter:

    actor       base + adapter, which learns
    reference   base
    reward      base + adapter (frozen) + head
    critic      base + the reward model's adapter (frozen) + adapter and head, which learn
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
from workers.models.heads import LEARNS, add_lora, load_config, load_hf
from workers.models.lora import HEAD, base_of, real, refuse_other_base, scalar_adapter

START = "start"
"""Name in PEFT of the adapter that a scalar model starts from; what learns is `LEARNS`."""


class SharedBase:
    """The base of a process: loaded for the first role that asks, frozen, and never given away but by its parameters."""

    def __init__(self) -> None:
        self.path = ""
        self.model: PreTrainedModel | None = None

    def language_model(self, path: str, settings: ModelSettings, seed: int) -> PreTrainedModel:
        """The base itself, in modules of its own."""
        if self.model is None:
            self.path = real(path)
            self.model = load_hf(settings, path, scalar=False, seed=seed).requires_grad_(False)
        if real(path) != self.path:
            raise ValueError(f"{path}: the roles of this process share {self.path} as base, and cannot have another")
        return _twin(self.model)

    def scalar_model(self, path: str, settings: ModelSettings, seed: int, begins_head: bool) -> PreTrainedModel:
        """The base with a scalar head: that of the adapter beside the model, or a new one where the model is the base."""
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
        if lacking := [name for name, p in model.named_parameters() if p.is_meta]:
            raise ValueError(
                f"share: {config.model_type} with a scalar head has more than its base and the head: {lacking}"
            )
        return model


def build(
    base: SharedBase | None, path: str, settings: ModelSettings, scalar: bool, seed: int, learns: bool
) -> tuple[PreTrainedModel, Any]:
    """A role's Hugging Face model, on the base that it shares or on its own, and the PEFT wrapper of its adapters (or None).

    learns: adapters or all weights, as the settings say; then a scalar head may begin, too.
    """
    if base is None:
        hf = load_hf(settings, path, scalar, seed, begins_head=learns)
    elif scalar:
        hf = base.scalar_model(path, settings, seed, begins_head=learns)
    else:
        hf = base.language_model(path, settings, seed)
    peft = add_lora(hf, settings.lora, seed) if settings.lora and learns else None
    if base is not None and scalar and (adapter := scalar_adapter(path)):
        peft = _put_below(hf, peft, adapter)
    return hf, peft


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules, which hold the same parameters and buffers."""
    common = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, common)


def _put_below(hf: PreTrainedModel, peft: Any, folder: Path) -> Any:
    """Add an adapter from its folder, frozen, below what learns."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    # The head is the model's own, which does not learn here by PEFT; what is frozen is not dropped either.
    config.modules_to_save, config.task_type, config.lora_dropout = None, None, 0.0
    if peft is None:
        peft = PeftModel(hf, config, adapter_name=START, autocast_adapter_dtype=False)
    else:
        peft.add_adapter(START, config, autocast_adapter_dtype=False)
        peft.base_model.set_adapter([START, LEARNS])
    found = set_peft_model_state_dict(peft, _read(folder)[0], adapter_name=START)
    strange = [*found.unexpected_keys, *(name for name in found.missing_keys if f".{START}." in name)]
    if strange:
        raise ValueError(
            f"{folder}: is not an adapter of this model; {len(strange)} weights do not fit, first {strange[0]}"
        )
    for name, parameter in hf.named_parameters():
        if f".{START}" in name:
            parameter.requires_grad_(False)
    return peft


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter's own tensors, and those of its head, under the head's names."""
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}, head
