"""A model's adapter, of a scalar model with its head, as a PEFT folder beside the merged model; and which base it lies on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "adapter"
"""Of an exported model: where its adapter is."""
NEAR = "base.json"
"""Beside an adapter's config: the way from its folder to its base's."""
HEAD = "base_model.model.score."
"""What stands before the names of a scalar head's tensors in PEFT's files."""


def write_adapter(folder: Path, peft: Any, name: str, base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write one of a PEFT model's adapters, with the tokenizer, as a folder that PEFT loads from anywhere.

    base: the folder or hub name of the model that it lies on; of a folder its place from here is noted too, for where both are
    moved together (`base_of`).
    """
    here = os.path.isdir(base)
    config = peft.peft_config[name]
    config.base_model_name_or_path = os.path.abspath(base) if here else base
    config.task_type = "CAUSAL_LM"
    peft.save_pretrained(folder, selected_adapters=[name])
    tokenizer.save_pretrained(folder)
    if here:
        (folder / NEAR).write_text(json.dumps({"base_from_here": os.path.relpath(base, folder)}), encoding="utf-8")


def add_head(folder: Path, hf: PreTrainedModel) -> None:
    """Add a scalar model's head to the PEFT folder that its adapter was just written to, below that of the merged model.

    It is then an adapter for sequence classification, which PEFT loads with its head; config.json says of how many labels
    the head is, and the scores' mean and deviation.
    """
    from safetensors.torch import load_file, save_file  # torch, which the driver does not import

    tensors = folder / "adapter_model.safetensors"
    head = {f"{HEAD}{name}": p.detach().cpu().contiguous() for name, p in hf.score.named_parameters()}
    save_file(load_file(tensors) | head, tensors, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    said |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "auto_mapping": None}
    config.write_text(json.dumps(said, indent=2, sort_keys=True), encoding="utf-8")
    shutil.copy(folder.parent / "config.json", folder)


def scalar_adapter(model: str) -> Path | None:
    """Folder of the adapter with a head that lies beside an exported scalar model; None where there is none."""
    folder = Path(model) / FOLDER
    config = folder / "adapter_config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8"))["task_type"] != "SEQ_CLS":
        return None
    return folder


def base_of(folder: Path) -> str:
    """The model that an adapter lies on: a folder's real path, or a hub name.

    A folder that lies as it did when the adapter was written comes before the path in the adapter's config: a run's folder may
    have been moved or copied.
    """
    if (near := folder / NEAR).is_file():
        base = folder / json.loads(near.read_text(encoding="utf-8"))["base_from_here"]
        if base.is_dir():
            return real(str(base))
    return real(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def real(model: str) -> str:
    """A folder without links, a hub name as it is: the same for the same model."""
    return os.path.realpath(model) if os.path.isdir(model) else model


def refuse_other_base(model: str, base: str) -> None:
    """Raises ValueError where a reward model is not an adapter on this base."""
    adapter = scalar_adapter(model)
    if adapter is None:
        raise ValueError(
            f"{model} has no adapter with a head ({FOLDER}/), so that it cannot share its base with other roles; train the "
            "reward model with lora, or leave critic and reward out of `share`"
        )
    if base_of(adapter) != real(base):
        raise ValueError(
            f"{model} is an adapter on {base_of(adapter)}, and the roles of `share` have {base} as base; train the reward "
            "model from that, or leave critic and reward out of `share`"
        )
