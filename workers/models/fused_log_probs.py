"""The language-model head fused with the softmax: log-probabilities and entropies from hidden states, in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from placement.models.activations import LOGITS_CHUNK
from workers.data.batching import spans
from workers.models.logit_transforms import AfterHead


class TableGradient:
    """The gradient, in one pass, of a table that is both head and word embeddings.

    The head's backward pass stores its gradient here; the embeddings' backward pass, which runs later, adds its own in place.
    Autograd alone would hold two tensors of the table's size.
    """

    from_head: Tensor | None = None


class TiedEmbedding(torch.autograd.Function):
    """Embedding lookup in a tied table; its backward pass adds to the head's gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None, gradient: TableGradient) -> Tensor:
        """table [V, H], ids [...], padding: the token without a gradient here, if any -> [..., H]."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding, ctx.gradient = table.shape, padding, gradient
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grad_table, ctx.gradient.from_head = ctx.gradient.from_head, None
        if grad_table is None:
            grad_table = grad_output.new_zeros(ctx.shape, dtype=torch.float32)
        # Sum per distinct token first: each row is then added once, so the result is deterministic on a GPU too.
        tokens, positions = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(grad_output.float(), positions, len(tokens), -1, False)
        if ctx.padding is not None:
            sums[tokens == ctx.padding] = 0
        return grad_table.index_add_(0, tokens, sums), None, None, None


class HeadLogProbs(torch.autograd.Function):
    """Log-probabilities of target tokens, and entropies, from hidden states: head and softmax fused, in chunks of tokens.

    Either pass holds the logits of one chunk only. The backward pass starts with the last chunk, whose logits the forward pass
    kept, recomputes the logits of the others, and overwrites them with their gradient.
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

        tied: holds the weight's gradient until the embeddings' backward pass returns it; None: it is returned here.
        """
        log_z, log_probs, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        buffer, exp_buffer = _chunk_buffer(hidden, weight), _chunk_buffer(hidden, weight)
        for rows in spans(len(hidden), LOGITS_CHUNK):
            logits = _logits(hidden[rows], weight, bias, temperature, after, buffer)
            maximum = logits.amax(-1)
            logits.sub_(maximum[:, None])
            # The only pass of exp: the sum and the entropy use the same result.
            exps = torch.exp(logits, out=exp_buffer[: len(logits)])
            total = exps.sum(-1)
            log_z[rows] = maximum + total.log()
            log_probs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - total.log()
            entropy[rows] = total.log() - torch.einsum("nv,nv->n", exps, logits) / total
        ctx.kept_chunk = None
        if len(hidden) and any(ctx.needs_input_grad):
            logits.sub_(total.log()[:, None])
            ctx.kept_chunk = buffer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.temperature, ctx.tied, ctx.after = temperature, tied, after
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Sums over chunks are in float32; autograd rounds them once where the weight is narrower.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        if grad_log_probs is not None:
            grad_log_probs = grad_log_probs / ctx.temperature
        if grad_entropy is not None:
            grad_entropy = grad_entropy / ctx.temperature
        kept, ctx.kept_chunk = ctx.kept_chunk, None  # this pass overwrites it
        buffer = _chunk_buffer(hidden, weight) if kept is None else kept
        for rows in reversed(spans(len(hidden), LOGITS_CHUNK)):
            if kept is None:
                log_p = _logits(hidden[rows], weight, bias, ctx.temperature, ctx.after, buffer).sub_(log_z[rows, None])
            else:
                log_p, kept = kept[: len(hidden[rows])], None
            slope = ctx.after.slope(log_p, log_z[rows, None], ctx.temperature)
            grad_logits = log_p.exp() if grad_entropy is not None else log_p.exp_()
            scale = (
                torch.zeros(len(grad_logits), 1, device=grad_logits.device)
                if grad_log_probs is None
                else grad_log_probs[rows, None]
            )
            if grad_entropy is None:
                grad_logits.mul_(-scale)
            else:
                grad_logits.mul_(log_p.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(scale).neg_())
            grad_logits = grad_logits.scatter_add_(-1, targets[rows, None], scale).mul_(slope)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None and grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
            elif grad_weight is not None:  # PyTorch has no matrix product that adds to a wider dtype
                grad_weight.add_(grad_logits.t() @ hidden[rows])
        if ctx.tied is not None:
            ctx.tied.from_head, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunk_buffer(hidden: Tensor, weight: Tensor) -> Tensor:
    """Scratch buffer for the logits, reused for every chunk: allocating one per chunk costs more than the softmax."""
    return torch.empty(min(len(hidden), LOGITS_CHUNK), len(weight), device=hidden.device)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, after: AfterHead, buffer: Tensor
) -> Tensor:
    """Logits in float32, in the first rows of `buffer`."""
    logits = buffer[: len(hidden)]
    if weight.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(hidden @ weight.t())
    if bias is not None:
        logits.add_(bias)
    after.apply_(logits)
    return logits if temperature == 1.0 else logits.div_(temperature)
