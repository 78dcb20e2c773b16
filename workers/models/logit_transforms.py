"""What a language model does around its head: some families scale the logits, or what goes into the head, or cap them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

_TOLERANCE = {4: (1e-4, 1e-5), 2: (2e-2, 1e-2)}
"""Relative and absolute, by the bytes of a number: of the same arithmetic in another order."""


class AfterHead(NamedTuple):
    """logits = cap * tanh(scale * head output / cap); without a cap scale * head output."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, hf: PreTrainedModel) -> Self:
        """What a model does. Raises ValueError where that is not what its config says; on the meta device, where values cannot
        be compared, where the config says nothing."""
        found, logits, plain = _logits(hf)
        if plain:
            return cls()
        said = cls.said(hf.config)
        if said is not None and not found.is_meta:
            wanted = found.float().clone()
            said.apply_(wanted)
            said = said if torch.allclose(wanted, logits.float(), *_TOLERANCE[found.itemsize]) else None
        if said is None:
            raise ValueError(
                f"model: {hf.config.model_type} changes its logits around the head in a way that is not known here"
            )
        return said

    @classmethod
    def said(cls, config: PreTrainedConfig) -> Self | None:
        """What a config says, if anything: Cohere's `logit_scale`, Granite's `logits_scaling` (a divisor; MiniCPM3 divides what
        goes into the head, HyperCLOVA X multiplies by it), Falcon-H1's `lm_head_multiplier`, Gemma 2's
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
        """d logits / d head output, where logits / temperature = log_p + log_z; a number where it is the same everywhere."""
        if self.cap is None:
            return self.scale
        return torch.add(log_p, log_z).mul_(temperature / self.cap).square_().sub_(1.0).mul_(-self.scale)


@torch.no_grad()
def _logits(hf: PreTrainedModel) -> tuple[Tensor, Tensor, bool]:
    """What the head alone makes of some hidden states, the logits that the model makes of them, and whether these are its head's
    output for just these states."""
    head: Any = hf.get_output_embeddings()
    weight: Tensor = head.weight
    hidden = torch.linspace(-3.0, 3.0, 8 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 8, -1)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    try:
        with _body_gives(hf, hidden):
            ids = torch.zeros(1, 8, dtype=torch.long, device=weight.device)
            logits = hf(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    given, output = seen[0]
    same = given is hidden or given._base is hidden._base  # it may be cut to the tokens whose logits are wanted
    return F.linear(hidden, weight, head.bias), logits, same and output is logits


class _Hidden(tuple[Tensor]):
    """Output of a model's body: hidden states, and none of the rest that heads look for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


@contextmanager
def _body_gives(hf: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Within it the model is its head on these hidden states."""
    bodies = {hf.base_model, hf.get_decoder()}  # OPT calls the second alone
    for body in bodies:
        body.forward = lambda *args, **options: _Hidden((hidden,))
    try:
        yield
    finally:
        for body in bodies:
            del body.forward
