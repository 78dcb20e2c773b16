"""The two kinds of model: a language model returns log-probabilities, a scalar model returns values or scores.

Both run the transformer's body once and select the hidden states that they need. Logits are computed for trained tokens only, in
chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from workers.data import Sample
from workers.data.batching import NO_ROWS
from workers.models.fused_log_probs import HeadLogProbs, TableGradient, TiedEmbedding
from workers.models.logit_transforms import AfterHead

_PADDING_ROW = Sample.of([0], [0])
"""A prompt and an answer of one token each: token 0 is in every vocabulary."""


class Batch:
    """Samples of a micro-batch, padded on the right, and the positions of their trained tokens.

    ids: [B, T] int64; lengths: [B]. Per-token data is padded to R columns, the largest number of trained tokens of a sample:
    column k is a sample's k-th trained token, also if other tokens are between them.

    A micro-batch without rows (B = 0) is padding: all ranks compute the same number of passes, and another rank has more rows.
    Then ids and attention_mask hold a padding row, which the models compute; but the mask is [0, 1], so their outputs have no
    row. Its loss and gradients are exactly 0, without multiplication by a weight.
    """

    def __init__(self, rows: Sequence[Sample], device: torch.device, seeds: list[int] | None = None) -> None:
        """seeds: of the dropout, one per row."""
        real, rows = len(rows), rows or [_PADDING_ROW]
        self.lengths = torch.tensor([len(r.ids) for r in rows])
        self.ids = torch.zeros(len(rows), int(self.lengths.max()), dtype=torch.long)
        for i, r in enumerate(rows):
            self.ids[i, : len(r.ids)] = torch.as_tensor(r.ids.astype("int64"))
        self.attention_mask = (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()
        self.lengths = self.lengths[:real]
        before = [np.flatnonzero(r.loss_mask[1:]) for r in rows[:real]]  # no token predicts a row's first token
        counts = torch.tensor([len(positions) for positions in before], dtype=torch.long)
        self.mask = torch.arange(max([1, *map(len, before)])) < counts[:, None]
        """[B, R] True on trained tokens, False on padding."""
        self.rows = torch.arange(real).repeat_interleave(counts)
        self.before = torch.from_numpy(np.concatenate([NO_ROWS, *before]))
        """Position of the hidden state that predicts each trained token (flat, like rows)."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        self.seeds = seeds

    def padded(self, flat: Tensor) -> Tensor:
        """[trained tokens] -> [B, R], zeros outside the mask."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.mask, flat)


class LanguageModel(nn.Module):
    """A causal language model that returns log-probabilities of the trained tokens."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.after = AfterHead.of(hf)
        self.hf = hf
        self.tied: TableGradient | None = None
        embeddings = hf.get_input_embeddings()
        if type(embeddings) is nn.Embedding and embeddings.weight is hf.get_output_embeddings().weight:
            embeddings.register_forward_hook(self._embed)

    def _embed(self, embeddings: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of tied embeddings: the same output, whose gradient is added to the head's."""
        if not (torch.is_grad_enabled() and embeddings.weight.requires_grad):
            return output
        self.tied = TableGradient()
        return TiedEmbedding.apply(embeddings.weight, *args, embeddings.padding_idx, self.tied)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each trained token and entropy of its distribution, [B, R] each, zeros outside the mask."""
        self.tied = None
        hidden = self.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        hidden = hidden[batch.rows, batch.before]
        targets = batch.ids[batch.rows, batch.before + 1]
        head = self.hf.get_output_embeddings()
        log_probs, entropy = HeadLogProbs.apply(
            hidden, head.weight, head.bias, targets, temperature, self.tied, self.after
        )
        return batch.padded(log_probs), batch.padded(entropy)


class ScalarModel(nn.Module):
    """A transformer with a scalar head: the critic's values, the reward model's scores.

    Its output is (head output - mean) / standard deviation; both numbers are in the model's config, so every copy of the model
    has them. The head computes in float32 for all weight types: bfloat16 has only eight bits for a score.

    Each row's dropout has its own seed (`Batch.seeds`): it does not depend on the other rows of the micro-batch, nor on the
    rank.
    """

    def __init__(self, hf: PreTrainedModel, dropout: float = 0.0) -> None:
        super().__init__()
        self.hf = hf
        hf.score.forward = partial(_in_float32, hf.score)
        self.dropout = dropout
        self.generators: list[torch.Generator] = []
        """Dropout generator of each row of the current pass; empty without dropout."""
        self.lengths: list[int] = []
        """Lengths of the same rows."""
        if dropout:
            hf.get_input_embeddings().register_forward_hook(self._drop_embeddings)

    @property
    def normalization(self) -> tuple[float, float]:
        return getattr(self.hf.config, "score_mean", 0.0), getattr(self.hf.config, "score_std", 1.0)

    def _at(self, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        self.generators = self._generators(batch)
        self.lengths = batch.lengths.tolist() if self.generators else []
        hidden = self.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        hidden = hidden[rows, columns]
        if self.generators:
            masks = self._keep_masks(rows.bincount(minlength=len(self.generators)).tolist(), hidden.shape[-1])
            hidden = hidden * torch.cat(masks).to(hidden.dtype) / (1 - self.dropout)
        mean, std = self.normalization
        return (self.hf.score(hidden).squeeze(-1) - mean) / std

    def _generators(self, batch: Batch) -> list[torch.Generator]:
        """One generator per row; empty without dropout, and for a micro-batch without rows."""
        if not (self.dropout and self.training):
            return []
        if batch.seeds is None:
            raise ValueError("a scalar model with dropout needs batches with seeds")
        return [torch.Generator(batch.ids.device).manual_seed(seed) for seed in batch.seeds]

    def _keep_masks(self, counts: list[int], width: int) -> list[Tensor]:
        """Per row, [count, width]: True for kept elements. Advances the row's generator."""
        return [
            torch.rand(count, width, generator=generator, device=generator.device) >= self.dropout
            for count, generator in zip(counts, self.generators, strict=True)
        ]

    def _drop_embeddings(self, embeddings: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook: dropout of each row's tokens, [B, T, H]; padding is set to 0."""
        if not self.generators:
            return output
        keep = torch.nn.utils.rnn.pad_sequence(self._keep_masks(self.lengths, output.shape[-1]), batch_first=True)
        return output * keep.to(output.dtype) / (1 - self.dropout)

    def forward(self, batch: Batch, per_token: bool) -> Tensor:
        """per_token: the value before each trained token, [B, R]. Otherwise scores at the sequences' last tokens, [B].

        The last token's position is the length minus one, not the first pad token: pad may equal eos.
        """
        if per_token:
            return batch.padded(self._at(batch, batch.rows, batch.before))
        return self._at(batch, torch.arange(len(batch.lengths), device=batch.ids.device), batch.lengths - 1)


def _in_float32(head: nn.Linear, hidden: Tensor) -> Tensor:
    return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())
