"""Preflight checks of a run's models: builds each without weights, and checks its heads, length and vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from configs.schema import ModelSettings, RunConfig
from placement.cluster import Cluster
from workers.data import Codec
from workers.data.probes import Form, difference

Head = Literal["language", "scalar"]
Refuse = Callable[[str, str], None]
"""Records a problem: the setting's dotted path, and what is wrong."""


@dataclass(frozen=True)
class ModelUse:
    """How a stage uses a model."""

    setting: str
    """Dotted path of the setting that names the model."""
    path: str
    settings: ModelSettings
    heads: frozenset[Head]
    learns: bool = False
    served: bool = False
    """Whether engines serve it."""
    reads_text: bool = False
    """Whether it reads the policy's answers as text, with its own tokenizer."""
    longest: int = 0
    """Tokens of the longest input sequence; 0: not known before the run."""
    longest_settings: str = ""
    """The settings that determine `longest`."""


def check_models(uses: Sequence[ModelUse], codec_of: Callable[[ModelUse], Codec | None], refuse: Refuse) -> None:
    """Build every model on the meta device with each of its heads, and compare its maximum length and its vocabulary with its
    inputs. codec_of: the codec of a model; None if it cannot be loaded, which another check reports."""
    from workers.models.model_facts import model_facts  # imports torch and transformers

    for use in _joined(uses):
        try:
            with _quiet():
                facts = model_facts(use.path, use.settings, use.heads, learns=use.learns)
        except (OSError, ValueError) as error:
            refuse(use.setting, unreadable(use.path, error))
            continue
        for problem in facts.problems:
            refuse(use.setting, problem)
        for other in uses:
            if other.path == use.path and facts.longest is not None and other.longest > facts.longest:
                text = f"{other.longest} tokens, but {use.path} ({facts.model_type}) takes {facts.longest} at most"
                refuse(other.longest_settings, text)
        codec = codec_of(use)
        if codec is not None and (tokens := len(codec.tokenizer)) > facts.vocabulary:
            text = f"{use.path}: its tokenizer has {tokens} tokens, but its embeddings have {facts.vocabulary} rows"
            refuse(use.setting, text)


def unreadable(path: str, error: Exception) -> str:
    """Why a model cannot be read: the first line of the library's error."""
    return f"was {path!r}: {str(error).strip().splitlines()[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars and warnings: problems are reported by the preflight."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _joined(uses: Sequence[ModelUse]) -> list[ModelUse]:
    """Merge the uses of the same model. Trained and frozen uses stay separate: a frozen model must have its head already."""
    joined: dict[tuple[str, str, bool], ModelUse] = {}
    for use in uses:
        key = use.path, use.settings.model_dump_json(), use.learns
        previous = joined.get(key, use)
        joined[key] = ModelUse(
            previous.setting,
            use.path,
            use.settings,
            previous.heads | use.heads,
            learns=use.learns,
            served=previous.served or use.served,
        )
    return list(joined.values())


def check_serving(uses: Sequence[ModelUse], config: RunConfig, cluster: Cluster | None, refuse: Refuse) -> None:
    """Check that engines can serve their models. cluster: None: not known yet."""
    from transformers import AutoConfig

    from workers.models.served import why_no_adapter, why_not_served

    device = _device(config, cluster)
    for use in (use for use in uses if use.served):
        try:
            hf_config = AutoConfig.from_pretrained(use.path, trust_remote_code=use.settings.trust_remote_code)
        except (OSError, ValueError):
            continue  # `check_models` reports it
        if device and (reason := why_not_served(hf_config, device)):
            refuse(use.setting, reason)
        if config.weight_sync.lora == "adapter" and (reason := why_no_adapter(hf_config)):
            refuse("weight_sync.lora", f"was 'adapter', but {reason}; use merged")


def check_reader(policy: Codec, use: ModelUse, codec: Codec, form: Form, refuse: Refuse) -> None:
    """Check that a model that scores the policy's tokens has the same tokenization."""
    if not use.reads_text and (mismatch := difference(policy, codec, form)):
        setting = use.setting.rpartition(".")[0] + ".tokenizer"
        refuse(
            setting,
            f"was policy, but {use.path} has {mismatch}; use own: the model then reads text, not the policy's tokens",
        )


def _device(config: RunConfig, cluster: Cluster | None) -> Literal["cpu", "cuda"] | None:
    """The device of the engines; None if it depends on a cluster that is not known yet."""
    if config.device != "auto":
        return config.device
    return ("cuda" if cluster.gpus else "cpu") if cluster else None
