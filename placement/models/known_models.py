"""Shapes of common models by hub name, so that a plan needs no network: the numbers of their config.json."""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def _qwen2(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> dict[str, Any]:
    return _llama(hidden, layers, heads, kv_heads, inner, vocab, tied) | {"model_type": "qwen2"}


def _opt(hidden: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    } | other


KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-360M": _llama(960, 32, 15, 5, 2560, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(2048, 24, 32, 32, 8192, 49152, True),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 64, 40, 8, 27648, 152064, False),
    "Qwen/Qwen2.5-72B": _qwen2(8192, 80, 64, 8, 29568, 152064, False),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, 128256, True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192, 128256, True),
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, 128256, False),
    "meta-llama/Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672, 128256, False),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
}


def known_config(name: str) -> dict[str, Any] | None:
    """The config.json of a hub name, None where it is not known. An `-Instruct` model has its base's shape."""
    return KNOWN.get(name.removesuffix("-Instruct"))
