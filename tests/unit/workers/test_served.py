"""Which families engines serve, by their configs only."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from workers.models.served import engine_options, why_no_adapter, why_not_served


def config(kind: str, architecture: str = "", **settings: Any) -> Any:
    return SimpleNamespace(model_type=kind, architectures=[architecture] if architecture else None, **settings)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config("mpt", "MptForCausalLM"), "MptForCausalLM is not served: vLLM dropped it after 0.28.0"),
        (config("jamba", "JambaForCausalLM"), "jamba is not served: its state space layers need a kernel"),
        (
            config("somebodys", "SomebodysForCausalLM", layer_types=["linear_attention", "full_attention"]),
            "its Transformers backend cannot do layers of linear_attention",
        ),
        (
            config("gpt_oss", "GptOssForCausalLM", quantization_config={"quant_method": "mxfp4"}),
            r"gpt_oss is not served: its weights are quantized \(mxfp4\)",
        ),
    ],
)
def test_what_engines_do_not_serve_is_named(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(why_not_served(model, "cpu"))


@pytest.mark.parametrize(
    "model",
    [
        config("llama", "LlamaForCausalLM"),
        config("gpt_neox", "GPTNeoXForCausalLM"),  # by vLLM's Transformers backend
        config("somebodys", "SomebodysForCausalLM", layer_types=["sliding_attention", "full_attention"]),
    ],
)
def test_others_are_tried(model: Any) -> None:
    assert why_not_served(model, "cpu") is None


def test_some_are_refused_on_cpu_alone() -> None:
    assert why_not_served(config("mamba", "MambaForCausalLM"), "cpu")
    assert why_not_served(config("mamba", "MambaForCausalLM"), "cuda") is None


def test_vllm_is_not_imported_for_it() -> None:
    code = (
        "import sys; from types import SimpleNamespace as Config; from workers.models.served import why_not_served; "
        "assert why_not_served(Config(model_type='mpt', architectures=['MptForCausalLM']), 'cpu'); "
        "assert not {'vllm', 'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("model", "refused"), [(config("gpt2"), True), (config("llama"), False), (config("qwen3_moe", num_experts=4), True)]
)
def test_adapters_alone(model: Any, refused: bool) -> None:
    assert (why_no_adapter(model) is not None) == refused


def test_what_engines_are_told() -> None:
    assert engine_options(config("llama"), "cpu") == {}
    assert engine_options(config("deepseek_v3", kv_lora_rank=512), "cpu") == {"attention_backend": "CPU_MLA"}
    assert engine_options(config("deepseek_v3", kv_lora_rank=512), "cuda") == {}
    assert engine_options(config("cohere2", sliding_window=4096), "cuda") == {"hf_overrides": {"sliding_window": 4095}}
