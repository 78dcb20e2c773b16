"""A trained model as a plain Hugging Face folder: what transformers' own `save_pretrained` would write of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_BYTES = 5 * 10**9
"""Of a file of weights, unless one tensor is larger: no more than that is held at a time."""


def write_weights(hf: PreTrainedModel, folder: Path, writes: bool, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all that the model's state_dict holds, adapters merged, in as many files as it takes. Collective under ZeRO-3.

    writes: whether this rank does. Raises RuntimeError where the files would lack a tensor of the model.
    """
    from workers.weights import GatheredWeights  # DeepSpeed, which settings are written without

    source = GatheredWeights(hf)
    if lacking := source.lacking():
        raise RuntimeError(f"export: {len(lacking)} tensors of the model would not be written, first {lacking[0]}")
    plan = split_torch_state_dict_into_shards(source.shapes, max_shard_size=shard_bytes)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source:
        if writes:
            file = plan.tensor_to_filename[name]
            files.setdefault(file, {})[name] = tensor.cpu().contiguous()
            if len(files[file]) == len(plan.filename_to_tensors[file]):
                save_file(files.pop(file), folder / file, metadata={"format": "pt"})
    if writes and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_settings(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write config, generation config and tokenizer."""
    config = copy.copy(hf.config)
    config.architectures = [type(hf).__name__]
    vars(config).pop("quantization_config", None)  # what was written has all its bits
    config.save_pretrained(folder)
    if hf.can_generate():
        hf.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
