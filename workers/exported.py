"""The configs of an exported model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def write_configs(hf: PreTrainedModel, folder: Path) -> None:
    """Write config.json and, of a model that generates, generation_config.json, as its start model had it.

    The end tokens that a model was trained with would be set here, in both.
    """
    config: Any = copy.copy(hf.config)
    config.architectures = [type(hf).__name__]
    vars(config).pop("quantization_config", None)  # what was written has all its bits
    for name in config._get_generation_parameters():  # of an old config, which transformers refuses to write there
        setattr(config, name, None)
    config.save_pretrained(folder)
    if hf.can_generate():
        # Its own `save_pretrained` refuses what models are published with, such as a temperature beside do_sample: false.
        hf.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
