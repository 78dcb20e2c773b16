"""Facts of models before their weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families.zoo import make
from configs.schema import LoraSettings, ModelSettings
from tests.support.models import VOCABULARY, make_model, make_reward_model
from workers.models.logit_transforms import AfterHead
from workers.models.model_facts import longest_context, model_facts

pytestmark = pytest.mark.slow  # imports of transformers and PEFT take seconds

LORA = LoraSettings(rank=4)


def facts(
    path: Path | str, *heads: Any, lora: LoraSettings | None = LORA, init: Any = "pretrained", **asked: Any
) -> Any:
    return model_facts(str(path), ModelSettings(path=str(path), dtype="float32", lora=lora, init=init), heads, **asked)


def test_nothing_stands_against_a_plain_model(tmp_path: Path) -> None:
    result = facts(
        make_model(tmp_path, "llama"), "language", "scalar", learns=True, served_on="cpu", adapter_served=True
    )
    assert result.problems == ()
    assert (result.model_type, result.vocabulary, result.longest) == ("llama", VOCABULARY, 256)
    assert (result.has_scalar_head, result.after_head, result.weights_checked) == (True, AfterHead(), True)
    assert result.parameters == sum(p.numel() for p in _tensors(tmp_path))


def _tensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_a_shape_without_weights_is_built(tmp_path: Path) -> None:
    make_model(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    assert facts(tmp_path, "language", init="random", learns=True).problems == ()
    (problem,) = facts(tmp_path, "language").problems
    assert "model.safetensors" in problem


@pytest.mark.parametrize(
    ("family", "after"),
    [
        ("gemma2", AfterHead(cap=3.0)),
        ("cohere", AfterHead(scale=0.5)),
        ("granite", AfterHead(scale=0.5)),
        ("hyperclovax", AfterHead(scale=2.0)),
        ("minicpm3", AfterHead(scale=0.5)),
        ("olmo", AfterHead()),
        ("opt", AfterHead()),
    ],
)
def test_what_comes_after_the_head_is_known(tmp_path: Path, family: str, after: AfterHead) -> None:
    result = facts(make(tmp_path, family), "language")
    assert result.after_head == after and not result.problems


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Of a mixture of experts without a scalar head in transformers, whose adapters vLLM does not apply."""
    folder = make(tmp_path, "granitemoe")
    result = facts(folder, "language", "scalar", learns=True, served_on="cpu", adapter_served=True)
    assert not result.has_scalar_head
    assert [problem for problem in result.problems if "no granitemoe with a scalar head" in problem]
    assert [problem for problem in result.problems if problem.startswith("weight_sync.lora: was 'adapter', but vLLM")]
    assert len(result.problems) == 2
    result = facts(folder, "language", lora=LoraSettings(targets=["nothing"]), learns=True)
    assert [problem for problem in result.problems if problem.startswith("model.lora.targets: ")]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mpt", "MptForCausalLM is not served: vLLM dropped it after 0.28.0"),
        ("mamba", "mamba is not served: .* vLLM's CPU build lacks"),
        ("qwen3_next", "qwen3_next is not served: .* bfloat16 only"),
    ],
)
def test_a_family_that_engines_cannot_serve_is_refused_by_name(tmp_path: Path, family: str, message: str) -> None:
    result = facts(make(tmp_path, family), "language", served_on="cpu")
    assert len(result.problems) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.problems[0])
    assert not facts(tmp_path, "language").problems, "SFT alone needs no engine"


def test_weights_that_do_not_fill_the_model_are_named(tmp_path: Path) -> None:
    policy = make_model(tmp_path / "policy", "llama", tied=False)
    reward_model = make_reward_model(policy, tmp_path / "reward")
    assert facts(reward_model, "scalar").problems == ()
    (problem,) = facts(reward_model, "language").problems
    assert problem.startswith(str(reward_model)) and "1 missing (lm_head.weight)" in problem
    (problem,) = facts(policy, "scalar").problems
    assert "1 missing (score.weight)" in problem
    assert facts(policy, "scalar", learns=True).problems == ()


def test_what_an_export_could_not_write_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "llama")
    kind = type(AutoTokenizer.from_pretrained(folder))
    monkeypatch.setattr(kind, "save_pretrained", lambda *_args, **_options: (_ for _ in ()).throw(OSError("no way")))
    assert facts(folder, "language").problems == ()
    assert facts(folder, "language", learns=True).problems == ("no way",)


@pytest.mark.parametrize(
    ("kind", "settings", "longest"),
    [
        ("llama", {"max_position_embeddings": 512}, 512),
        ("llama", {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ("llama", {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 512),
        ("gpt2", {"n_positions": 300}, 300),
        ("bloom", {}, None),
        ("cohere", {"max_position_embeddings": 512, "model_max_length": 4096}, 4096),
    ],
)
def test_the_longest_context_is_vllms(kind: str, settings: dict[str, Any], longest: int | None) -> None:
    rope = settings.get("rope_parameters")
    if rope:
        settings = settings | {"rope_parameters": rope | {"rope_theta": 10_000.0}}
    assert longest_context(CONFIG_MAPPING[kind](**settings)) == longest


def test_a_hub_name_that_was_not_downloaded_is_built_from_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.from_pretrained(make_model(tmp_path, "llama"))
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_args, **_options: config)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # or it asks again and again where there is no hub
    result = facts("somebody/something", "language")
    assert not result.weights_checked and result.parameters and not result.problems
