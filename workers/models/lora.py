"""Adapter folders: a model's adapter in PEFT's format beside the merged model (with the head of a scalar model), and its base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "adapter"
"""Name of the adapter's folder in an exported model."""
NEAR = "base.json"
"""File beside an adapter's config: the relative path from its folder to its base's."""
HEAD = "base_model.model.score."
"""Prefix of the names of a scalar head's tensors in PEFT's files."""


def write_adapter(folder: Path, peft: Any, name: str, base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write one of a PEFT model's adapters, with the tokenizer, as a folder that PEFT loads from anywhere.

    base: folder or hub name of the base model. For a folder the relative path is written too: both may be moved together
    (`base_of`).
    """
    is_folder = os.path.isdir(base)
    config = peft.peft_config[name]
    config.base_model_name_or_path = os.path.abspath(base) if is_folder else base
    config.task_type = "CAUSAL_LM"
    peft.save_pretrained(folder, selected_adapters=[name])
    tokenizer.save_pretrained(folder)
    if is_folder:
        (folder / NEAR).write_text(json.dumps({"base_from_here": os.path.relpath(base, folder)}), encoding="utf-8")


def add_head(folder: Path, hf: PreTrainedModel) -> None:
    """Add a scalar model's head to the PEFT folder of its adapter, which must lie in the merged model's folder.

    PEFT then loads it as an adapter for sequence classification, with its head. config.json holds the number of labels and the
    scores' mean and standard deviation.
    """
    from safetensors.torch import load_file, save_file  # torch, which the driver does not import

    tensors = folder / "adapter_model.safetensors"
    head = {f"{HEAD}{name}": p.detach().cpu().contiguous() for name, p in hf.score.named_parameters()}
    save_file(load_file(tensors) | head, tensors, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "auto_mapping": None}
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    shutil.copy(folder.parent / "config.json", folder)


def scalar_adapter(model: str) -> Path | None:
    """Folder of the adapter and head of an exported scalar model; None where it has none."""
    folder = Path(model) / FOLDER
    config = folder / "adapter_config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8"))["task_type"] != "SEQ_CLS":
        return None
    return folder


def base_of(folder: Path) -> str:
    """An adapter's base model: a folder's real path, or a hub name.

    A folder at the relative path comes before the absolute path in the adapter's config: the run's folder may have been moved
    or copied.
    """
    if (relative := folder / NEAR).is_file():
        base = folder / json.loads(relative.read_text(encoding="utf-8"))["base_from_here"]
        if base.is_dir():
            return real(str(base))
    return real(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def real(model: str) -> str:
    """A folder's real path, or a hub name unchanged: equal for the same model."""
    return os.path.realpath(model) if os.path.isdir(model) else model


def refuse_other_base(model: str, base: str) -> None:
    """Raise ValueError where a reward model is not an adapter on this base."""
    adapter = scalar_adapter(model)
    if adapter is None:
        raise ValueError(
            f"{model} has no adapter with a head ({FOLDER}/), so it cannot share its base with other roles; train the "
            "reward model with lora, or leave critic and reward out of `shared_base`"
        )
    if base_of(adapter) != real(base):
        raise ValueError(
            f"{model} is an adapter on {base_of(adapter)}, and the roles of `shared_base` have {base} as base; train the reward "
            "model from that, or leave critic and reward out of `shared_base`"
        )
