"""Tiny random models of many families of language models, as Hugging Face folders.

Two layers (four where the family alternates between kinds of layer), width 64, heads of size 32, 120 tokens, which vLLM pads.
No tensor has values that could hide an error: biases and correction biases are not 0, norms are not 1, and the next token is
far from uniformly distributed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import make_tokenizer

VOCABULARY, LAYERS, WIDTH, HEADS, HEAD_SIZE, INNER, POSITIONS = 120, 2, 64, 2, 32, 128, 256

_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = _COMMON | {"num_key_value_heads": 1}
_HEAD = {"head_dim": HEAD_SIZE}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 512,  # with 64 below the only size that vLLM's CPU kernel has
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
_DEEPSEEK = _COMMON | _LATENT | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_SCALED = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}
_FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
_ROUTED = _FEW | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
_CONVOLUTION = {
    "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_dim": WIDTH, "block_dim": WIDTH,
    "block_ff_dim": INNER,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _GROUPED | _HEAD | _SLIDING | _FEW | {
        "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "score_func": "sigmoid", "route_norm": True,
    },
    "apertus": _GROUPED | _HEAD,
    "arcee": _GROUPED | _HEAD,
    "bamba": _GROUPED | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "cohere": _GROUPED | {"logit_scale": 0.5, "use_qk_norm": False},
    "cohere2": _GROUPED | _HEAD | _SLIDING | {"logit_scale": 0.5},
    "cohere2_moe": _GROUPED | _HEAD | _EXPERTS | {"logit_scale": 0.5},
    "cwm": _GROUPED | _HEAD | _SLIDING | {"bos_token_id": 1},
    "deepseek_v2": _DEEPSEEK | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": _DEEPSEEK | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "dots1": _GROUPED | _HEAD | _ROUTED,
    "ernie4_5": _GROUPED | _HEAD,
    "ernie4_5_moe": _GROUPED | _HEAD | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "exaone4": _GROUPED | _HEAD | _SLIDING,
    "exaone_moe": _GROUPED | _HEAD | _SLIDING | _FEW | {
        "num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "falcon": {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "new_decoder_architecture": False,
        "multi_query": True, "parallel_attn": True, "bias": True, "alibi": False,
    },
    "flex_olmo": _GROUPED | _EXPERTS | {"intermediate_size": 64},
    "gemma": _GROUPED | _HEAD,
    "gemma2": _GROUPED | _HEAD | {"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": _GROUPED | _HEAD | _SLIDING | {"query_pre_attn_scalar": 32},
    "glm": _GROUPED | _HEAD,
    "glm4": _GROUPED | _HEAD,
    "glm4_moe": _GROUPED | _HEAD | _ROUTED | {"use_qk_norm": True},
    "glm4_moe_lite": _DEEPSEEK | {"n_group": 1},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT | {"multi_query": True},
    "gpt_neox": _COMMON | {"rotary_pct": 0.5},
    "gpt_oss": _GROUPED | _HEAD | _SLIDING | _LOCAL,
    "gptj": _GPT | {"rotary_dim": 16},
    "granite": _GROUPED | _SCALED,
    "granite_swa": _GROUPED | _SCALED | _SLIDING,
    "granitemoe": _GROUPED | _SCALED | _LOCAL,
    "granitemoeshared": _GROUPED | _SCALED | _LOCAL | {"shared_intermediate_size": 64},
    "helium": _GROUPED | _HEAD,
    "hunyuan_v1_dense": _GROUPED | _HEAD,
    "hunyuan_v1_moe": _GROUPED | _HEAD | {"num_experts": 4, "moe_topk": 2, "intermediate_size": 64},
    "hyperclovax": _GROUPED | _HEAD | _SCALED,
    "jais2": _GROUPED | _HEAD,
    "jamba": _GROUPED | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 16, "use_mamba_kernels": False,
    },
    "lfm2": _GROUPED | _CONVOLUTION,
    "lfm2_moe": _GROUPED | _CONVOLUTION | _EXPERTS | {"num_dense_layers": 1},
    "llama": _GROUPED | _HEAD,
    "llama4_text": _GROUPED | _HEAD | _LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": INNER},
    "mamba": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 16, "use_mambapy": False},
    "mellum": _GROUPED | _HEAD | _EXPERTS,
    "minicpm3": _COMMON | _LATENT | {
        "kv_lora_rank": 32, "qk_rope_head_dim": 32, "dim_model_base": 32, "scale_emb": 2.0, "scale_depth": 1.4,
    },
    "minimax": _GROUPED | _HEAD | {
        "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "minimax_m2": _GROUPED | _HEAD | _LOCAL | {
        "rotary_dim": HEAD_SIZE, "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True,
    },
    "ministral3": _GROUPED | _HEAD,
    "mistral": _GROUPED | _HEAD | {"sliding_window": 16},
    "mixtral": _GROUPED | _HEAD | _LOCAL,
    "mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    "nemotron": _GROUPED | _HEAD,
    "olmo": _GROUPED | _HEAD,
    "olmo2": _GROUPED | _HEAD,
    "olmo3": _GROUPED | _HEAD | _SLIDING,
    "olmoe": _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "opt": {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS, "ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH,
    },
    "phi": _COMMON | {"partial_rotary_factor": 0.5},
    "phi3": _GROUPED | {"partial_rotary_factor": 1.0},
    "phimoe": _GROUPED | _LOCAL,
    "qwen2": _GROUPED,
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3": _GROUPED | _HEAD,
    "qwen3_moe": _GROUPED | _HEAD | _EXPERTS,
    "qwen3_next": _GROUPED | _HEAD | _EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "seed_oss": _GROUPED | _HEAD,
    "smollm3": _GROUPED | _HEAD,
    "solar_open": _GROUPED | _HEAD | _FEW | {"n_routed_experts": 4, "n_shared_experts": 1},
    "stablelm": _GROUPED | {"partial_rotary_factor": 0.5},
    "starcoder2": _GROUPED,
    "vaultgemma": _GROUPED | _HEAD | _SLIDING | {"query_pre_attn_scalar": 32, "final_logit_softcapping": 3.0},
}  # fmt: skip
"""Model type -> shape, as fields of its config."""


def make(folder: Path, family: str, seed: int = 0, **settings: Any) -> Path:
    """Write a random model of a family (float32) and a tokenizer to a folder; returns the folder.

    settings: further settings of the model's config, which override ours.
    """
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.15} | ids
    config = CONFIG_MAPPING[family](**common | FAMILIES[family] | settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_constants(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize_constants(model: PreTrainedModel) -> None:
    """Randomize tensors with equal elements: biases, norms, and saved buffers."""
    saved = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    for name, tensor in [*model.named_parameters(), *buffers]:
        if not tensor.is_floating_point():
            continue
        flat = tensor.flatten()
        if tensor.dim() == 1 or bool((flat == flat[0]).all()):
            scale = 0.5 if name.endswith("correction_bias") else 0.1
            tensor.add_(scale * torch.randn_like(tensor))
