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
    """Share of the steps in which the rate rises to `lr`, rounded up: of W such steps the first has 1 / W of it, the last all."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on after the warm-up; linear and cosine fall towards 0, which would come one step after the last."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    refuse_grad_norm: PositiveFloat = 1e5
    """A step is not applied where the global norm is larger than this before scaling, or where it or the loss is not finite."""


class BatchSettings(Settings):
    """What the supervised stages share."""

    train: DatasetSettings
    """Rows to train on."""
    validation: DatasetSettings | None = None
    """Held-out rows."""
    epochs: PositiveFloat = 1.0
    """Passes over the training rows (a fraction is allowed)."""
    batch_size: PositiveInt = 32
    """Rows (pairs, for the reward model) in one optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, in one forward pass of one rank; of a pair (for the reward model) both sides count."""
    max_length: PositiveInt = 512
    """Longest sequence in tokens."""
    overlong: Overlong = "cut"
    """Rows longer than max_length. cut: the prompt's text is cut on the left (of a conversation the oldest turns go first; the
    template's headers stay), down to half of max_length, then the answer on the right. drop: they are left out. refuse: the run
    does not start."""
    validate_every: PositiveInt | None = None
    """Steps between validations, with `validation`; none: only at the end."""
    optimizer: OptimizerSettings
    """AdamW."""

    @model_validator(mode="after")
    def _validates(self) -> Self:
        # With `validation: none` somebody has turned it off, and the rest of the section may stay as it is.
        if self.validate_every and "validation" not in self.model_fields_set:
            raise ValueError(
                f"validate_every: was {self.validate_every}, but there are no held-out rows to validate on (validation)"
            )
        return self


class SFTSettings(BatchSettings):
    """Supervised fine-tuning: loss on the assistant's tokens only."""

    turns: Literal["all", "last"] = "all"
    """Which turns of the assistant are learnt from `messages`: all of them, or the last one alone."""


class RewardModelSettings(BatchSettings):
    """Reward model: pairwise logistic loss (Bradley & Terry 1952; Ouyang et al. 2022)."""

    model: ModelSettings | None = None
    """Start from another model than the SFT stage's."""
    margin: NonNegativeFloat = 0.0
    """Factor of the rows' `margin` column, subtracted from the difference of the scores (Touvron et al. 2023)."""
    center: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores, which keeps them near 0."""
    dropout: BelowOne = 0.0
    """Dropout on the hidden states before the head and on the embeddings, against overfitting of small models."""
    normalize_on: DatasetSettings | None = None
    """Demonstrations on which scores get mean 0 and deviation 1. none: the rows of `sft.train`; without a section `sft` scores
    stay as they are."""
