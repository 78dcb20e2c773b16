"""Export of a trained model as a plain Hugging Face folder, as transformers' own `save_pretrained` writes it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.weight_sync.gather import UNSHARDED, GatheredWeights, ParameterGatherer

SHARD_BYTES = 5 * 10**9
"""Size of a weights file, unless one tensor is larger. At most one file is held in memory."""


def write_weights(
    hf: PreTrainedModel,
    folder: Path,
    writes: bool,
    gatherer: ParameterGatherer = UNSHARDED,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all tensors of the model's state_dict, adapters merged, in one or more files. Collective where parameters are
    sharded.

    writes: whether this rank writes. An error while writing is raised at the end, since the other ranks wait for this one in
    every gather. Raises RuntimeError where the files would lack a tensor of the model.
    """
    source = GatheredWeights(hf, gatherer)
    if missing := source.lacking():
        raise RuntimeError(f"export: {len(missing)} tensors of the model would not be written, first {missing[0]}")
    plan = split_torch_state_dict_into_shards(source.shapes, max_shard_size=shard_bytes)
    files: dict[str, dict[str, Tensor]] = {}
    error: Exception | None = None
    for name, tensor in source:
        if not writes or error:
            continue
        file = plan.tensor_to_filename[name]
        files.setdefault(file, {})[name] = tensor.cpu().contiguous()
        if len(files[file]) == len(plan.filename_to_tensors[file]):
            try:
                save_file(files.pop(file), folder / file, metadata={"format": "pt"})
            except Exception as failure:
                error = failure
                files.clear()
    if error:
        raise error
    if writes and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_settings(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int], folder: Path) -> None:
    """Write config, generation config and tokenizer, as the start model had them.

    ends: ids of the end tokens that the model was trained with. Both configs name them, so that plain transformers and vLLM
    stop there too.
    """
    config: Any = copy.copy(hf.config)
    config.architectures = [type(hf).__name__]
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    vars(config).pop("quantization_config", None)  # the written weights are not quantized
    for name in config._get_generation_parameters():  # in old configs; transformers refuses to write them there
        setattr(config, name, None)
    config.save_pretrained(folder)
    if hf.can_generate():
        generation = copy.deepcopy(hf.generation_config)
        generation.eos_token_id = config.eos_token_id
        # GenerationConfig.save_pretrained refuses some published configs, such as a temperature with do_sample: false.
        generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
