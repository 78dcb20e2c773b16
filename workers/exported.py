"""The configs of an exported model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def write_configs(hf: PreTrainedModel, ends: list[int], folder: Path) -> None:
    """Write config.json and, of a model that generates, generation_config.json, as its start model had it.

    ends: ids of the end tokens that it was trained with; both name them, so that plain transformers and vLLM stop there too.
    """
    config: Any = copy.copy(hf.config)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.architectures = [type(hf).__name__]
    vars(config).pop("quantization_config", None)  # what was written has all its bits
    for name in config._get_generation_parameters():  # of an old config, which transformers refuses to write there
        setattr(config, name, None)
    config.save_pretrained(folder)
    if hf.can_generate():
        # Its own `save_pretrained` refuses what models are published with, such as a temperature beside do_sample: false.
        generation = copy.deepcopy(hf.generation_config)
        generation.eos_token_id = config.eos_token_id
        generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
