"""Which models vLLM 0.32 serves with the results of transformers, and the engine options that this needs.

A model's config is enough: the driver asks before a run starts, an engine before it loads. The entries for single families come
from comparing log-probabilities (`python -m benchmarks.families`, docs/models.md).
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Device = Literal["cpu", "cuda"]

NO_SCAN = "its state space layers need a kernel (selective_scan) that vLLM's CPU build lacks"
NO_DELTA = "vLLM computes its gated delta nets on CPU in bfloat16 only"

UNSERVED: dict[str, str] = {
    "phimoe": "vLLM's Transformers backend cannot route to its experts",
    "vaultgemma": "vLLM does not load new weights of its head",
}
"""Model type -> why vLLM does not serve it on any device."""

UNSERVED_ON_CPU: dict[str, str] = {
    "falcon_h1": NO_SCAN,
    "falcon_mamba": NO_SCAN,
    "granitemoehybrid": NO_SCAN,
    "jamba": NO_SCAN,
    "mamba": NO_SCAN,
    "mamba2": NO_SCAN,
    "nemotron_h": NO_SCAN,
    "olmo_hybrid": NO_DELTA,
    "qwen3_5": NO_DELTA,
    "qwen3_5_moe": NO_DELTA,
    "qwen3_5_moe_text": NO_DELTA,
    "qwen3_5_text": NO_DELTA,
    "qwen3_next": NO_DELTA,
    "zamba2": NO_SCAN,
}
"""Model type -> why it is not served on CPU."""

NO_ADAPTERS = ("bloom", "falcon", "glm4", "gpt2", "gpt_bigcode", "gptj", "stablelm")
"""Model types for which weight_sync.lora must be merged. The same holds for mixtures of experts: with adapters of any layer vLLM
uses expert kernels that a CPU does not have."""


def why_not_served(config: PreTrainedConfig, device: Device) -> str | None:
    """Why vLLM does not serve a model with the results of transformers; None where no reason is known."""
    kind, (architecture, *_) = config.model_type, config.architectures or [""]
    if reason := UNSERVED.get(kind) or (UNSERVED_ON_CPU.get(kind) if device == "cpu" else None):
        return f"{kind} is not served: {reason}"
    if quantized := getattr(config, "quantization_config", None):
        method = quantized["quant_method"] if isinstance(quantized, dict) else quantized.quant_method
        return f"{kind} is not served: its weights are quantized ({method}), which updates are not; dequantize the folder first"
    registered, dropped = _registry()
    if last := dropped.get(architecture):
        return f"{architecture} is not served: vLLM dropped it after {last}"
    if architecture in registered or getattr(config, "auto_map", None):
        return None
    unsupported = {*(getattr(config, "layer_types", None) or [])} - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    if unsupported:
        return (
            f"{architecture} is not served: vLLM has no implementation of its own, and its Transformers backend cannot do layers "
            f"of {', '.join(sorted(unsupported))}"
        )
    return None


def why_no_adapter(config: PreTrainedConfig | SimpleNamespace) -> str | None:
    """Why engines cannot apply a model's adapter to the weights that they started with; None where no reason is known.

    config: transformers' config, or the contents of config.json.
    """
    kind = config.model_type
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if kind in NO_ADAPTERS or any(getattr(config, name, None) for name in experts):
        return f"vLLM serves no adapters of {kind} models"
    return None


def engine_options(config: PreTrainedConfig, device: Device) -> dict[str, Any]:
    """EngineArgs of vLLM that a family needs."""
    options: dict[str, Any] = {}
    if device == "cpu" and getattr(config, "kv_lora_rank", None):
        options["attention_backend"] = "CPU_MLA"  # the other backend, for AMX, has no float32
    if device == "cpu" and {"conv", "linear_attention", "mamba"} & {*(getattr(config, "layer_types", None) or [])}:
        options["enable_prefix_caching"] = False  # caching states needs chunked prefill
    if config.model_type == "cohere2" and config.sliding_window:
        # The window in vLLM is one token larger than in transformers.
        options["hf_overrides"] = {"sliding_window": config.sliding_window - 1}
    return options


@cache
def _registry() -> tuple[Collection[str], dict[str, str]]:
    """The architectures that vLLM implements, and of dropped ones the last version that had them; both empty without vLLM.

    Read from the source of vLLM's registry: importing it takes many seconds.
    """
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return (), {}
    source = Path(spec.submodule_search_locations[0]) / "model_executor" / "models" / "registry.py"
    tables: dict[str, dict[str, Any]] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            items = [
                (key, value) for key, value in zip(node.value.keys, node.value.values, strict=True) if key is not None
            ]
            tables[node.targets[0].id] = {ast.literal_eval(key): ast.literal_eval(value) for key, value in items}
    registered = (
        tables["_TEXT_GENERATION_MODELS"] | tables["_TRANSFORMERS_SUPPORTED_MODELS"] | tables["_MULTIMODAL_MODELS"]
    )
    return frozenset(registered), tables["_PREVIOUSLY_SUPPORTED_MODELS"]
