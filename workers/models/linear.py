"""Linear layers whose weights' gradients are summed over micro-batches by the matrix products that make them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(torch.autograd.Function):
    """`x @ weight.T + bias`, whose backward pass adds the weight's gradient to the one that is there.

    Left to autograd, each micro-batch makes a tensor of the weight's size, which is then read once more and added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in], bias [out] -> [..., out]."""
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, of_found: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = of_found @ ctx.weight if ctx.needs_input_grad[0] else None
        rows = of_found.flatten(0, -2)
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.weight.grad is None:
            return of_x, rows.t() @ x.flatten(0, -2), of_bias
        ctx.weight.grad.addmm_(rows.t(), x.flatten(0, -2))
        return of_x, None, of_bias


def add_in_place(model: nn.Module) -> None:
    """Let all linear layers that learn do so. For a model without hooks on its gradients: they would not be called."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = Linear.apply(x, layer.weight, layer.bias)
    return found
