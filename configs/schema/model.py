"""The model that a run starts from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.schema.base import BelowOne, ModelPath, Settings


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021): the base weights stay frozen."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale: the adapter's product is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that high ranks learn too (Kalajdzievski 2023)."""
    dora: bool = False
    """Train magnitude and direction of each output's weights separately (Liu et al. 2024). Slower; always sent merged."""
    dropout: BelowOne = 0.0
    """Dropout before the adapters, not in PPO. Drawn per rank and micro-batch, so results depend on the number of both."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the modules with an adapter."""


class ModelSettings(Settings):
    """The language model that the run starts from."""

    path: ModelPath
    """Hugging Face folder or hub name: config.json, tokenizer, and weights unless `init` is random."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: a new model with the shape in config.json, initialized with the run's seed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the parameters. auto: bfloat16 where the device multiplies it faster (GPUs; CPUs with AMX or AVX-512 bf16, after a
    short measurement noted in run.json), else float32. With bfloat16 the optimizer keeps a copy of the weights in float32."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the optimizer's weights and moments. bfloat16: half the memory, but rounding loses small updates; only for models
    in bfloat16 with zero1, zero2 and zero3."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep the inputs of the layers in host memory; needs gradient checkpointing, which keeps only these. No effect on CPU."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights, in every trained role."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep the frozen base weights in 4 or 8 bits (Dettmers et al. 2023); needs a GPU and the package bitsandbytes."""
    end_tokens: Annotated[list[str], Field(min_length=1)] | None = None
    """Tokens that end a response, in training, sampling, scoring and the exported model. none: the tokenizer's eos token and
    those of generation_config.json. Set them where the chat template ends a turn with another token."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Enable only if you trust its author."""

    @model_validator(mode="after")
    def _offered(self) -> Self:
        if self.optimizer_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(
                f"optimizer_dtype: was 'bfloat16', which is for models with dtype bfloat16; dtype was {self.dtype!r}"
            )
        if self.activation_offload and not self.gradient_checkpointing:
            raise ValueError("activation_offload: was true, which needs gradient_checkpointing: true")
        return self

    @model_validator(mode="after")
    def _quantized(self) -> Self:
        if self.quantize and self.init == "random":
            raise ValueError(
                f"quantize: was {self.quantize!r}, but init is random, and random weights must all be trained"
            )
        if self.quantize and not self.lora:
            raise ValueError(
                f"quantize: was {self.quantize!r}, but quantized weights cannot be trained, and there are no adapters; "
                "set lora too (lora.rank), or remove quantize"
            )
        return self
