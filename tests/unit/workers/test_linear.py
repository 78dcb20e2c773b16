"""Gradients that linear layers accumulate in place equal those of autograd."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from workers.models.linear import add_in_place


def gradients(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the weights and of each micro-batch's input."""
    by_input = {}
    for k, x in enumerate(inputs):
        x = x.clone().requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        by_input[f"input {k}"] = x.grad
    return by_input | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    frozen = nn.Linear(6, 6).requires_grad_(False)
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), shared, frozen, shared, nn.Linear(6, 3, bias=False)).double()
    added = copy.deepcopy(plain)
    add_in_place(added)
    for step in range(2):
        inputs = [torch.randn(2, rows, 5, dtype=torch.float64) for rows in (3, 1, 4)]
        expected, actual = gradients(plain, inputs), gradients(added, inputs)
        addresses = [p.grad.data_ptr() for p in added.parameters() if p.grad is not None]
        assert actual.keys() == expected.keys(), step
        for name in expected:
            assert torch.allclose(actual[name], expected[name]), name
        for model in (plain, added):
            model.zero_grad(set_to_none=False)
        assert [p.grad.data_ptr() for p in added.parameters() if p.grad is not None] == addresses


def test_nothing_is_kept_without_gradients() -> None:
    layer = nn.Linear(4, 4)
    add_in_place(layer)
    with torch.no_grad():
        assert layer(torch.ones(1, 4)).grad_fn is None
