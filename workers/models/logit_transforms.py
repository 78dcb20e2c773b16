"""Transforms of a language model around its head: some families scale the head's input, scale the logits or cap them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

_TOLERANCE = {4: (1e-4, 1e-5), 2: (2e-2, 1e-2)}
"""Bytes per number -> relative and absolute tolerance for the same arithmetic in another order."""


class AfterHead(NamedTuple):
    """logits = cap * tanh(scale * head output / cap); without a cap scale * head output."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, hf: PreTrainedModel) -> Self:
        """A model's transform. Raises ValueError where its logits do not follow from its config. On the meta device there are
        no values to compare: there it raises only where the config has no transform."""
        output, logits, plain = _logits(hf)
        if plain:
            return cls()
        transform = cls.from_config(hf.config)
        if transform is not None and not output.is_meta:
            expected = output.float().clone()
            transform.apply_(expected)
            if not torch.allclose(expected, logits.float(), *_TOLERANCE[output.itemsize]):
                transform = None
        if transform is None:
            raise ValueError(
                f"model: {hf.config.model_type} changes its logits around the head in a way that Troupe does not support"
            )
        return transform

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Self | None:
        """The transform that a config states, or None: Cohere's `logit_scale`, Granite's `logits_scaling` (a divisor; of the
        head's input in MiniCPM3; a factor in HyperCLOVA X), Falcon-H1's `lm_head_multiplier`, Gemma 2's
        `final_logit_softcapping`."""
        names = ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping")
        factor, divisor, multiplier, cap = (getattr(config, name, None) for name in names)
        if config.model_type == "hyperclovax":
            multiplier, divisor = divisor, None
        if factor is divisor is multiplier is cap is None:
            return None
        return cls((factor or 1.0) * (multiplier or 1.0) / (divisor or 1.0), cap)

    def apply_(self, logits: Tensor) -> None:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, log_p: Tensor, log_z: Tensor, temperature: float) -> Tensor | float:
        """d logits / d head output, where logits / temperature = log_p + log_z; a float where it is constant."""
        if self.cap is None:
            return self.scale
        return torch.add(log_p, log_z).mul_(temperature / self.cap).square_().sub_(1.0).mul_(-self.scale)


@torch.no_grad()
def _logits(hf: PreTrainedModel) -> tuple[Tensor, Tensor, bool]:
    """For the same hidden states: the head's output, the model's logits, and whether the model does nothing but call its head
    on them."""
    head: Any = hf.get_output_embeddings()
    weight: Tensor = head.weight
    hidden = torch.linspace(-3.0, 3.0, 8 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 8, -1)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _module, args, output: calls.append((args[0], output)))
    try:
        with _body_returns(hf, hidden):
            ids = torch.zeros(1, 8, dtype=torch.long, device=weight.device)
            logits = hf(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    given, output = calls[0]
    # A model may slice the states to the positions whose logits it computes.
    same = given is hidden or given._base is hidden._base
    return F.linear(hidden, weight, head.bias), logits, same and output is logits


class _Hidden(tuple[Tensor]):
    """Output of a model's body: hidden states; every other attribute that a head reads is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


@contextmanager
def _body_returns(hf: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Inside, the model's body returns these hidden states."""
    bodies = {hf.base_model, hf.get_decoder()}  # OPT calls only the second
    for body in bodies:
        body.forward = lambda *args, **options: _Hidden((hidden,))
    try:
        yield
    finally:
        for body in bodies:
            del body.forward
