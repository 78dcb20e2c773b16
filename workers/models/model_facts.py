"""Facts and problems of a model, from building it without weights on the meta device.

For the checks before a run starts: about a second per model once transformers is imported, only the headers of weight files are
read, and neither Ray nor a device is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from configs.schema import ModelSettings
from workers.data import end_tokens, load_tokenizer
from workers.models.export import write_settings
from workers.models.loading import add_lora, has_scalar_head, load_config, load_hf
from workers.models.logit_transforms import AfterHead
from workers.models.served import Device, why_no_adapter, why_not_served

Head = Literal["language", "scalar"]


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model, and the problems with the requested use."""

    model_type: str
    parameters: int
    """With the first of the requested heads; adapters are not counted."""
    vocabulary: int
    """Rows of the word embeddings: token ids must be below."""
    longest: int | None
    """Longest sequence that vLLM allows, in tokens: the trained positions times the config's rope scaling. None: no limit (ALiBi,
    state space models)."""
    has_scalar_head: bool
    """Whether transformers has this family with a scalar head, for critics and reward models."""
    after_head: AfterHead
    """Transform of the head's output; the identity for a scalar model."""
    weights_checked: bool
    """Whether the names and shapes of the folder's weights were compared. They are not for a hub name that is not downloaded yet,
    nor where `init` is random."""
    problems: tuple[str, ...]
    """Why the requested use is impossible: one sentence each, which names the folder, the family or the setting below `model`.
    Empty: no problem is known."""


def model_facts(
    path: str,
    settings: ModelSettings,
    heads: Collection[Head],
    *,
    learns: bool = False,
    served_on: Device | None = None,
    adapter_served: bool = False,
) -> ModelFacts:
    """Facts of a model, and all problems at once.

    path: folder or hub name. settings: of the run's model; its path is not used.
    heads: "language" for an actor, a reference or SFT; "scalar" for a critic or a reward model; both where it serves as both.
    learns: the model will be trained: also test its adapters, if the settings have some, and what an export writes beside the
    weights; a scalar head may be new where the folder holds a language model. served_on: device of the engines that will serve
    it. adapter_served: engines get only its adapter (`weight_sync.lora=adapter`).

    Raises OSError or ValueError where the config cannot be read; the text names the path.
    """
    settings = settings.model_copy(update={"dtype": "float32", "quantize": None})
    config = load_config(path, settings, scalar=False)
    problems: list[str] = []
    checked = settings.init == "pretrained"
    built: PreTrainedModel | None = None
    after = AfterHead()
    for head in sorted(heads):
        model, was_checked = _build(path, settings, head == "scalar", learns, problems)
        checked = checked and was_checked
        if model is None:
            continue
        built = built or model
        if head == "language":
            after = _try(problems, lambda: AfterHead.of(model)) or after  # noqa: B023  called at once
        if learns:
            _try(problems, lambda: _write_dry(path, settings, model))  # noqa: B023
            if settings.lora:
                _try(problems, lambda: _add_lora(model, settings))  # noqa: B023
    if served_on and (reason := why_not_served(config, served_on)):
        problems.append(reason)
    if adapter_served and (reason := why_no_adapter(config)):
        problems.append(f"weight_sync.lora: was 'adapter', but {reason}; merged would fit")
    embeddings = built.get_input_embeddings().weight if built is not None else None
    return ModelFacts(
        model_type=config.model_type,
        parameters=sum(p.numel() for name, p in built.named_parameters() if ".lora_" not in name) if built else 0,
        vocabulary=len(embeddings) if embeddings is not None else config.vocab_size,
        longest=longest_context(config),
        has_scalar_head=has_scalar_head(config),
        after_head=after,
        weights_checked=checked,
        problems=tuple(dict.fromkeys(problems)),
    )


def longest_context(config: PreTrainedConfig) -> int | None:
    """Longest sequence in tokens (`ModelFacts.longest`), as in vLLM's ModelConfig: the smallest limit, or `model_max_length` if
    the config has it, times the rope factor of those kinds of scaling whose limit does not include it yet."""
    limits = [getattr(config, name, None) for name in _LIMITS]
    longest = getattr(config, "model_max_length", None) or min((limit for limit in limits if limit), default=None)
    if longest is None or "gemma3" in config.model_type:
        return longest
    factor = 1.0
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") not in _STRETCHED:
            factor = rope.get("factor") or factor
    return int(longest * factor)


_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_STRETCHED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The rope parameters: one for all layers, or one per kind of layer."""
    return (
        [parameters] if "rope_type" in parameters else [each for each in parameters.values() if isinstance(each, dict)]
    )


def _build(
    path: str, settings: ModelSettings, scalar: bool, learns: bool, problems: list[str]
) -> tuple[PreTrainedModel | None, bool]:
    """The model on the meta device (None: a problem), and whether its weights' names and shapes were compared."""

    def build(settings: ModelSettings, **options: Any) -> PreTrainedModel:
        with torch.device("meta"):
            return load_hf(settings, path, scalar, seed=0, begins_head=learns, **options)

    has_files = settings.init == "pretrained"
    if has_files and not Path(path).is_dir():
        try:
            return build(settings, device_map="meta", local_files_only=True), True
        except OSError:  # not downloaded yet
            has_files = False
    if has_files:
        return _try(problems, lambda: build(settings, device_map="meta")), True
    return _try(problems, lambda: build(settings.model_copy(update={"init": "random"}))), False


def _add_lora(model: PreTrainedModel, settings: ModelSettings) -> None:
    assert settings.lora
    with torch.device("meta"):
        add_lora(model, settings.lora, seed=0)


def _write_dry(path: str, settings: ModelSettings, model: PreTrainedModel) -> None:
    """Write an export's config and tokenizer to a temporary folder."""
    tokenizer = load_tokenizer(path, settings.trust_remote_code)
    with TemporaryDirectory() as folder:
        write_settings(model, tokenizer, end_tokens(path, tokenizer, settings), Path(folder))


Result = TypeVar("Result")


def _try(problems: list[str], function: Callable[[], Result]) -> Result | None:
    """The function's result; on an error None, and its text is added to `problems`."""
    try:
        return function()
    except (ValueError, OSError) as error:
        problems.append(str(error))
    except Exception as error:  # libraries raise anything for a model that they do not support
        problems.append(f"{type(error).__name__}: {error}")
    return None
