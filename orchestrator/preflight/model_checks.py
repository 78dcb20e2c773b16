"""Of the preflight: every model of a run, built without weights, with the heads, lengths and tokens that it is needed for."""

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
"""Takes note of a problem: the setting's dotted path, and what is wrong."""


@dataclass(frozen=True)
class ModelUse:
    """What a stage needs of a model."""

    setting: str
    """Dotted path of the setting that names it."""
    path: str
    settings: ModelSettings
    heads: frozenset[Head]
    learns: bool = False
    served: bool = False
    """Whether engines answer with it."""
    reads_text: bool = False
    """Whether it reads the policy's answers with a tokenizer of its own."""
    longest: int = 0
    """Tokens of the longest sequence that it is given; 0: that is not known before."""
    longest_settings: str = ""
    """The settings that say so."""


def check_models(uses: Sequence[ModelUse], codec_of: Callable[[ModelUse], Codec | None], refuse: Refuse) -> None:
    """Build every model on the meta device with each of its heads, and compare its length and its vocabulary with what it is
    given. codec_of: the codec of a model; None where it has none, which is noted elsewhere."""
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
        for given in uses:
            if given.path == use.path and facts.longest is not None and given.longest > facts.longest:
                text = f"{given.longest} tokens, but {use.path} ({facts.model_type}) takes {facts.longest} at most"
                refuse(given.longest_settings, text)
        codec = codec_of(use)
        if codec is not None and (tokens := len(codec.tokenizer)) > facts.vocabulary:
            text = f"{use.path}: its tokenizer has {tokens} tokens, but its embeddings have {facts.vocabulary} rows"
            refuse(use.setting, text)


def unreadable(path: str, error: Exception) -> str:
    """Why there is no such model: what the library says first."""
    return f"was {path!r}: {str(error).strip().splitlines()[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what is wrong becomes a problem."""
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
    """Each model once, with all that is needed of it; twice where it is also used as it is, with a head that it must have."""
    joined: dict[tuple[str, str, bool], ModelUse] = {}
    for use in uses:
        key = use.path, use.settings.model_dump_json(), use.learns
        known = joined.get(key, use)
        joined[key] = ModelUse(
            known.setting,
            use.path,
            use.settings,
            known.heads | use.heads,
            learns=use.learns,
            served=known.served or use.served,
        )
    return list(joined.values())


def check_serving(uses: Sequence[ModelUse], config: RunConfig, cluster: Cluster | None, refuse: Refuse) -> None:
    """Whether engines can serve the models that they are to serve. cluster: none: it is not known yet."""
    from transformers import AutoConfig

    from workers.models.served import why_no_adapter, why_not_served

    device = _device(config, cluster)
    for use in (use for use in uses if use.served):
        try:
            found = AutoConfig.from_pretrained(use.path, trust_remote_code=use.settings.trust_remote_code)
        except (OSError, ValueError):
            continue  # which `check_models` says
        if device and (reason := why_not_served(found, device)):
            refuse(use.setting, reason)
        if config.publish.lora == "adapter" and (reason := why_no_adapter(found)):
            refuse("publish.lora", f"was 'adapter', but {reason}; merged would fit")


def check_reader(policy: Codec, use: ModelUse, codec: Codec, form: Form, refuse: Refuse) -> None:
    """Whether a model that scores the policy's tokens reads them as the policy means them."""
    if not use.reads_text and (what := difference(policy, codec, form)):
        setting = use.setting.rpartition(".")[0] + ".tokenizer"
        refuse(
            setting,
            f"was policy, but {use.path} has {what}. own would fit: it then reads text, not the policy's tokens",
        )


def _device(config: RunConfig, cluster: Cluster | None) -> Literal["cpu", "cuda"] | None:
    """Where engines will run; none where only the cluster knows."""
    if config.device != "auto":
        return config.device
    return ("cuda" if cluster.gpus else "cpu") if cluster else None
