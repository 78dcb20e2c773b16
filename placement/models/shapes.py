"""The shapes of a stage's models, their longest sequence, and an engine's smallest key-value cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from configs.schema import ModelReward, ModelSettings, RunConfig
from placement.models.architecture import Architecture
from placement.stages import STAGES
from placement.types import Device, Stage

SIZES = {"float32": 4, "bfloat16": 2}
KV_BLOCK = 128
"""Tokens of a block of an engine's key-value cache on CPU."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of a stage's models: the policy, and the models with a scalar head. The critic has the first one's shape."""

    policy: Architecture
    scalars: tuple[Architecture, ...]


NO_MODELS: Mapping[Stage, Path] = MappingProxyType({})
"""No models are reused from another run."""


def read_shapes(config: RunConfig, stage: Stage, reused: Mapping[Stage, Path] = NO_MODELS) -> Shapes:
    """reused: folders of models reused from another run (`start_from`), by the stage that trained them there.

    Raises ValueError where a model's config.json cannot be read."""
    read = Architecture.of
    policy = str(reused.get("sft", config.model.path)) if stage != "sft" else config.model.path
    scored = config.rm.model.path if config.rm and config.rm.model else policy
    if stage != "ppo":
        scalar = "reward" in STAGES[stage].trained
        shape = read(scored if scalar else policy)
        return Shapes(shape, (shape,) if scalar else ())
    assert config.ppo is not None
    trained = str(reused.get("rm", scored))
    paths = [source.path or trained for source in config.ppo.rewards if isinstance(source, ModelReward)]
    return Shapes(read(policy), tuple(read(path) for path in paths))


def model_settings(config: RunConfig, stage: Stage) -> ModelSettings:
    return config.rm.model if stage == "rm" and config.rm and config.rm.model else config.model


def longest_row(config: RunConfig, stage: Stage) -> int:
    """Tokens of the longest row; for a pair, of both sides. A smaller micro-batch than that changes nothing."""
    if stage == "ppo":
        assert config.ppo is not None
        return config.ppo.max_prompt_tokens + config.rollout.max_new_tokens
    return int(STAGES[stage].sequences_per_row * config.section(stage).max_length)


def min_kv_cache(config: RunConfig, policy: Architecture, device: Device) -> int:
    """Bytes of the keys and values of one sequence of full length: with less, vLLM starts no engine. On CPU its blocks are
    large, and one is never used (measured with 24 and 129 tokens: it starts with 2 and 3 blocks, but not with 1 and 2)."""
    tokens = longest_row(config, "ppo")
    if device == "cpu":
        tokens = (math.ceil(tokens / KV_BLOCK) + 1) * KV_BLOCK
    return tokens * policy.kv_bytes(SIZES[config.model.dtype])
