"""Of the preflight: every model of a run, built without weights, with the heads, lengths and tokens that it is needed for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from configs.schema import ModelSettings, RunConfig
from placement.cluster import Cluster
from workers.data import Codec

Head = Literal["language", "scalar"]


class Refuses(Protocol):
    """Where problems go."""

    def refuse(self, setting: str, text: str) -> None: ...


@dataclass(frozen=True)
class ModelUse:
    """What a stage needs of a model."""

    setting: str
    """Dotted path of the setting that names it."""
    path: str
    settings: ModelSettings
    heads: tuple[Head, ...]
    learns: bool = False
    served: bool = False
    """Whether engines answer with it."""
    longest: int = 0
    """Tokens of the longest sequence that it is given."""
    longest_setting: str = ""
    """The settings that say so, with their values."""


@dataclass(frozen=True)
class Reader:
    """A model that must read the policy's tokens as the policy does."""

    setting: str
    codec: Codec
    own_tokenizer: bool
    """Whether it reads text with a tokenizer of its own."""


def check_models(report: Refuses, uses: Iterable[ModelUse], config: RunConfig) -> None:
    """Build every model on the meta device, with each head that it needs, and compare lengths."""
    from workers.model_facts import model_facts  # imports torch and transformers

    device = _device(config)
    seen: dict[tuple[str, str, bool, bool], set[Head]] = {}
    for use in uses:
        key = use.path, use.settings.model_dump_json(), use.learns, use.served
        heads = set(use.heads) - seen.setdefault(key, set())
        seen[key] |= heads
        try:
            facts = model_facts(
                use.path,
                use.settings,
                heads or use.heads,
                learns=use.learns,
                served_on=device if use.served else None,
                adapter_served=use.served and config.publish.lora == "adapter",
            )
        except (OSError, ValueError) as error:
            report.refuse(use.setting, f"was {use.path!r}: {str(error).strip().splitlines()[0]}")
            continue
        for problem in facts.problems:
            report.refuse(use.setting, problem)
        if facts.longest is not None and use.longest > facts.longest:
            report.refuse(
                use.longest_setting,
                f"{use.longest} tokens, but {use.path} ({facts.model_type}) takes sequences of {facts.longest} tokens",
            )


def _device(config: RunConfig) -> Literal["cpu", "cuda"] | None:
    """Where engines will run; none where only the cluster knows."""
    if config.device != "auto":
        return config.device
    if config.cluster.address:
        return None
    return "cuda" if Cluster.this_machine().gpus else "cpu"
