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
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each output's weights apart from their direction (Liu et al. 2024). Slower; always sent merged."""
    dropout: BelowOne = 0.0
    """Dropout before the adapters, not in PPO. Each rank draws it for each micro-batch: results depend on the number of both."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class ModelSettings(Settings):
    """The language model that the run starts from."""

    path: ModelPath
    """Hugging Face folder or hub name: config.json, tokenizer, and weights unless `init` is random."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: a new model of the shape in config.json, drawn with the run's seed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the parameters. auto: bfloat16 where the device multiplies it faster (GPUs; CPUs with AMX or AVX-512 bf16, by a
    short measurement that run.json notes), else float32. Beside bfloat16 the optimizer has weights of its own, in float32."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the optimizer's weights and moments. bfloat16: half the memory, and small updates are lost in rounding; for
    models in bfloat16 under zero1, zero2 and zero3."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep the layers' inputs, which are all that gradient checkpointing keeps, in host memory. Without effect on CPU."""
    lora: LoraSettings | None = None
    """Train adapters in place of all weights, in every trained role."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep the frozen weights below the adapters in 4 or 8 bits (Dettmers et al. 2023): on GPU, with the package bitsandbytes."""
    end_tokens: Annotated[list[str], Field(min_length=1)] | None = None
    """Tokens of which each ends an answer, in training, sampling, scoring and the exported model. none: the tokenizer's eos
    token and those of generation_config.json. Name them where the chat template ends a turn with another one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you trust its author."""

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
                f"quantize: was {self.quantize!r}, but init is random, and such weights have all to be trained"
            )
        if self.quantize and not self.lora:
            raise ValueError(
                f"quantize: was {self.quantize!r}, but weights of so few bits cannot be trained, and there are no adapters; "
                "set lora too (lora.rank), or leave quantize out"
            )
        return self
