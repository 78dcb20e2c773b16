"""The optimizer, supervised fine-tuning and the reward model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from configs.schema.base import BelowOne, Fraction, Overlong, Settings
from configs.schema.data import DatasetSettings
from configs.schema.model import ModelSettings


class OptimizerSettings(Settings):
    """AdamW (Loshchilov & Hutter 2019) with warm-up."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup: Fraction = 0.0
    """Share of the steps in which the rate rises linearly to `lr`, rounded up to W steps: the first has lr / W, the last lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine decay to 0, which they would reach one step after the last."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    skip_grad_norm: PositiveFloat = 1e5
    """A step is skipped if the global norm before scaling is larger than this, or if the norm or the loss is not finite."""


class BatchSettings(Settings):
    """Settings that both supervised stages have."""

    train: DatasetSettings
    """Rows to train on."""
    validation: DatasetSettings | None = None
    """Held-out rows."""
    epochs: PositiveFloat = 1.0
    """Passes over the training rows (fractions are allowed)."""
    batch_size: PositiveInt = 32
    """Rows (pairs, for the reward model) in one optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, in one forward pass of one rank; both sides of a pair (reward model) count."""
    max_length: PositiveInt = 512
    """Longest sequence in tokens."""
    overlong: Overlong = "cut"
    """Rows longer than max_length. cut: the prompt's text is cut on the left (a conversation loses its oldest turns first and
    keeps the template's headers), down to half of max_length, then the response on the right. drop: these rows are not used.
    refuse: the run does not start."""
    validate_every: PositiveInt | None = None
    """Steps between validations on `validation`; none: only at the end."""
    optimizer: OptimizerSettings
    """AdamW."""

    @model_validator(mode="after")
    def _validates(self) -> Self:
        # An explicit `validation: none` turns it off, and the other settings of the section may stay.
        if self.validate_every and "validation" not in self.model_fields_set:
            raise ValueError(f"validate_every: was {self.validate_every}, but there are no held-out rows (validation)")
        return self


class SFTSettings(BatchSettings):
    """Supervised fine-tuning: loss on the assistant's tokens only."""

    turns: Literal["all", "last"] = "all"
    """Assistant turns of `messages` that are trained: all, or only the last."""


class RewardModelSettings(BatchSettings):
    """Reward model: pairwise logistic loss (Bradley & Terry 1952; Ouyang et al. 2022)."""

    model: ModelSettings | None = None
    """Model to start from, instead of the SFT stage's."""
    margin: NonNegativeFloat = 0.0
    """Factor of the rows' `margin` column, which is subtracted from the difference of the scores (Touvron et al. 2023)."""
    center: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores; this term keeps scores near 0."""
    dropout: BelowOne = 0.0
    """Dropout on the hidden states before the head and on the embeddings, against overfitting of small models."""
    normalize_on: DatasetSettings | None = None
    """Demonstrations whose scores are normalized to mean 0 and standard deviation 1. none: the rows of `sft.train`; without a
    section `sft` scores are not normalized."""
