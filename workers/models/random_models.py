"""Models of a given shape with random weights, each with a tokenizer: for benchmarks, which need no trained model.

python -m workers.models.random_models model FOLDER float32 1       # FOLDER/config.json gives the shape
python -m workers.models.random_models reward FOLDER BASE 8 1       # an adapter of rank 8 and a head on the model in BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from configs.schema import LoraSettings
from workers.models.loading import add_lora
from workers.models.lora import FOLDER as ADAPTER
from workers.models.lora import add_head

SHARD_BYTES = 2**28
"""Size of a weights file, unless one tensor is larger. At most one file is held in memory."""


def draw_model(folder: Path, dtype: torch.dtype, seed: int, scalar: bool = False) -> int:
    """Write weights and tokenizer beside a config.json. scalar: with a scalar head. Returns the number of parameters.

    Matrices are normal with the standard deviation `initializer_range`, norms are 1, biases 0, as in common decoders.
    """
    config = AutoConfig.from_pretrained(folder, **({"num_labels": 1} if scalar else {}))
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(
            config, dtype=dtype
        )
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes = dict(model.named_parameters())  # tied ones once
    generator = torch.Generator().manual_seed(seed)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        shard = {name: _random_tensor(name, shapes[name], config.initializer_range, generator) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return sum(p.numel() for p in shapes.values())


def _random_tensor(name: str, like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    if like.dim() > 1:
        return torch.empty(like.shape, dtype=like.dtype).normal_(0.0, std, generator=generator)
    return torch.full(like.shape, float(name.endswith("weight")), dtype=like.dtype)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word `i`, except the last two: a prompt of n words has n tokens."""
    words = {**{str(i): i for i in range(vocabulary - 2)}, "<unk>": vocabulary - 2, "<eos>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def draw_reward_model(folder: Path, base: Path, rank: int, seed: int) -> None:
    """Write a reward model as the rm stage exports it: an adapter and a head on a base, for roles that share one base.

    The adapter is new: it adds zero to the base's weights.
    """
    hf = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
    hf.config.save_pretrained(folder)
    peft: Any = add_lora(hf, LoraSettings(rank=rank), seed)
    peft.save_pretrained(folder / ADAPTER)
    add_head(folder / ADAPTER, hf)
    config = folder / ADAPTER / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    word_tokenizer(hf.config.vocab_size).save_pretrained(folder)


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    if command in ("model", "scorer"):
        draw_model(Path(folder), getattr(torch, rest[0]), int(rest[1]), scalar=command == "scorer")
    else:
        draw_reward_model(Path(folder), Path(rest[0]), int(rest[1]), int(rest[2]))
