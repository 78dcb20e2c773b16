"""The head and the softmax in one: log-probabilities and entropies from hidden states, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from placement.models.activations import LOGITS_CHUNK
from workers.data.batching import spans
from workers.models.logit_transforms import AfterHead


class TableGradient:
    """Of a table that is head and word embeddings at once, the gradient of one pass: what the head's backward pass leaves, to
    which that of the embeddings, which comes after it, adds. Left to autograd there are two tensors of the table's size."""

    from_head: Tensor | None = None


class TiedEmbedding(torch.autograd.Function):
    """Rows of a table, whose gradient is added to the head's."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None, gradient: TableGradient) -> Tensor:
        """table [V, H], ids [...], padding: the token that does not learn here, if any -> [..., H]."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding, ctx.gradient = table.shape, padding, gradient
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        whole, ctx.gradient.from_head = ctx.gradient.from_head, None
        if whole is None:
            whole = of_rows.new_zeros(ctx.shape, dtype=torch.float32)
        # The few tokens that occur, each once: their sum is then taken in one order, on a GPU too.
        tokens, places = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(of_rows.float(), places, len(tokens), -1, False)
        if ctx.padding is not None:
            sums[tokens == ctx.padding] = 0
        return whole.index_add_(0, tokens, sums), None, None, None


class HeadLogProbs(torch.autograd.Function):
    """Log-probabilities of given tokens, and entropies, from hidden states: the head and the softmax in one, in chunks.

    Neither pass holds more logits than those of one chunk of tokens; the backward pass begins with the last chunk's, which were
    kept, computes the others' once more, and writes their gradient over them.
    With p the softmax, H its entropy and l = log p: d l_t = 1_t - p, d H = -p (l + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        tied: TableGradient | None,
        after: AfterHead,
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, H], weight [V, H], bias [V], targets [N] -> log-probabilities [N] and entropies [N], float32.

        tied: where the weight's gradient is left for the embeddings' backward pass, which returns it; none: it is returned here.
        """
        log_z, log_probs, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        room, more_room = _room(hidden, weight), _room(hidden, weight)
        for rows in spans(len(hidden), LOGITS_CHUNK):
            logits = _logits(hidden[rows], weight, bias, temperature, after, room)
            most = logits.amax(-1)
            logits.sub_(most[:, None])
            # The one pass of it: sum and entropy are made of the same.
            powers = torch.exp(logits, out=more_room[: len(logits)])
            total = powers.sum(-1)
            log_z[rows] = most + total.log()
            log_probs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - total.log()
            entropy[rows] = total.log() - torch.einsum("nv,nv->n", powers, logits) / total
        ctx.room = None
        if len(hidden) and any(ctx.needs_input_grad):
            logits.sub_(total.log()[:, None])
            ctx.room = room
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.temperature, ctx.tied, ctx.after = temperature, tied, after
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden)
        # Sums over chunks are in float32; autograd rounds them once where the weight is narrower.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            for_bias = torch.zeros_like(bias, dtype=torch.float32)
        if of_log_probs is not None:
            of_log_probs = of_log_probs / ctx.temperature
        if of_entropy is not None:
            of_entropy = of_entropy / ctx.temperature
        kept, ctx.room = ctx.room, None  # it is written over
        room = _room(hidden, weight) if kept is None else kept
        for rows in reversed(spans(len(hidden), LOGITS_CHUNK)):
            if kept is None:
                log_p = _logits(hidden[rows], weight, bias, ctx.temperature, ctx.after, room).sub_(log_z[rows, None])
            else:
                log_p, kept = kept[: len(hidden[rows])], None
            slope = ctx.after.slope(log_p, log_z[rows, None], ctx.temperature)
            grad = log_p.exp() if of_entropy is not None else log_p.exp_()
            scale = torch.zeros(len(grad), 1, device=grad.device) if of_log_probs is None else of_log_probs[rows, None]
            if of_entropy is None:
                grad.mul_(-scale)
            else:
                grad.mul_(log_p.add_(entropy[rows, None]).mul_(of_entropy[rows, None]).add_(scale).neg_())
            grad = grad.scatter_add_(-1, targets[rows, None], scale).mul_(slope)
            if for_bias is not None:
                for_bias.add_(grad.sum(0))
            grad = grad.to(hidden.dtype)
            for_hidden[rows] = grad @ weight
            if for_weight is not None and for_weight.dtype == hidden.dtype:
                for_weight.addmm_(grad.t(), hidden[rows])
            elif for_weight is not None:  # no product of PyTorch's adds to a wider tensor
                for_weight.add_(grad.t() @ hidden[rows])
        if ctx.tied is not None:
            ctx.tied.from_head, for_weight = for_weight, None
        return for_hidden, for_weight, for_bias, None, None, None, None


def _room(hidden: Tensor, weight: Tensor) -> Tensor:
    """Where the logits of one chunk after the other lie: fresh memory for each costs more than what is done with it."""
    return torch.empty(min(len(hidden), LOGITS_CHUNK), len(weight), device=hidden.device)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, after: AfterHead, room: Tensor
) -> Tensor:
    """In float32, in the first rows of `room`."""
    logits = room[: len(hidden)]
    if weight.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(hidden @ weight.t())
    if bias is not None:
        logits.add_(bias)
    after.apply_(logits)
    return logits if temperature == 1.0 else logits.div_(temperature)
