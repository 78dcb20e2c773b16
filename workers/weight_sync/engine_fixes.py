"""Fixes to vLLM 0.32 where it computes a family differently from transformers. They patch its classes before an engine is built.

Each difference was found by comparing log-probabilities (`python -m benchmarks.families`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.lora import model_manager
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import apertus, bloom


def apply_fixes() -> None:
    """Patch the classes of this process."""
    # BLOOM's activation is GELU approximated by tanh; vLLM uses the exact GELU.
    bloom.get_act_fn = lambda name: torch.nn.GELU(approximate="tanh")
    # Apertus's activation has parameters of the model's type; vLLM's are always bfloat16.
    apertus.XIELU = lambda: _XIELU(dtype=torch.get_default_dtype())
    cpu_router.CPURouter._compute_routing = _biased
    RotaryEmbedding.forward_cpu = _rotated
    model_manager.is_supported_lora_module = _takes_adapter


_XIELU: Any = apertus.XIELU
_routing: Any = cpu_router.CPURouter._compute_routing
_rotary: Any = RotaryEmbedding.forward_cpu
_supported: Any = model_manager.is_supported_lora_module


def _biased(self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **options: Any) -> Any:
    """On CPU vLLM ignores the correction bias of ungrouped experts and has no sigmoid for them. Its code for grouped experts
    has both, so they are routed as one group."""
    if self.e_score_correction_bias is None or self.use_grouped_topk or self.scoring_func not in ("softmax", "sigmoid"):
        return _routing(self, hidden_states, router_logits, *args, **options)
    return cpu_router._grouped_topk(
        router_logits,
        self.top_k,
        self.renormalize,
        num_expert_group=1,
        topk_group=1,
        scoring_func=self.scoring_func,
        routed_scaling_factor=self.routed_scaling_factor,
        e_score_correction_bias=self.e_score_correction_bias,
    )


def _rotated(self: Any, positions: torch.Tensor, query: torch.Tensor, *args: Any) -> Any:
    """The CPU kernel mistakes the heads of three-dimensional queries (DeepSeek's attention) for tokens: use the native code."""
    return (self.forward_native if query.dim() == 3 else partial(_rotary, self))(positions, query, *args)


def _takes_adapter(name: str, module: torch.nn.Module, supported: Any) -> bool:
    """No adapters for embeddings and heads: `add_lora` makes none, and a head on CPU that is prepared for one fails when
    log-probabilities of prompts are requested."""
    return not isinstance(module, VocabParallelEmbedding) and bool(_supported(name, module, supported))
