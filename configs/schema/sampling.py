"""How responses are sampled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from configs.schema.base import Settings


class SamplingSettings(Settings):
    """How engines sample responses."""

    max_new_tokens: PositiveInt = 128
    """Longest response in tokens."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature; log-probabilities are computed with it. vLLM would raise lower values to 0.01."""
    ignore_eos: bool = False
    """Continue to max_new_tokens after an end token (for benchmarks)."""
