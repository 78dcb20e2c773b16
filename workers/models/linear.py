"""Linear layers that accumulate their weight gradients over micro-batches inside the matrix product."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(torch.autograd.Function):
    """`x @ weight.T + bias`; the backward pass adds to `weight.grad` in place.

    Autograd alone allocates a tensor of the weight's size for each micro-batch, then reads it again to add it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in], bias [out] -> [..., out]."""
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad_output @ ctx.weight if ctx.needs_input_grad[0] else None
        rows = grad_output.flatten(0, -2)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.weight.grad is None:
            return grad_x, rows.t() @ x.flatten(0, -2), grad_bias
        ctx.weight.grad.addmm_(rows.t(), x.flatten(0, -2))
        return grad_x, None, grad_bias


def add_in_place(model: nn.Module) -> None:
    """Use `Linear` in all linear layers that are trained. The model must have no hooks on its gradients: none would be called."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    output: Tensor = Linear.apply(x, layer.weight, layer.bias)
    return output
