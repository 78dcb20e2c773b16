"""A folder whose weights are not exactly the model's is refused: no weight is silently random."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from configs.schema import ModelSettings
from tests.support.models import make_model, make_reward_model
from workers.models.loading import load_hf

Weights = dict[str, Tensor]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_model(tmp_path / "llama", "llama", tied=False)


def rewritten(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """The same model with other weights in its file."""
    copy = folder.parent / "rewritten"
    shutil.copytree(folder, copy)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def load(folder: Path, scalar: bool = False, begins_head: bool = False) -> None:
    load_hf(ModelSettings(path=str(folder), dtype="float32"), str(folder), scalar, seed=1, begins_head=begins_head)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_with_a_prefix_of_another_program_are_refused(llama: Path, prefix: str) -> None:
    folder = rewritten(llama, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    text = rf"21 missing \(lm_head.weight, .*21 unknown \({prefix}lm_head.weight, .*names begin with '{prefix}'"
    with pytest.raises(ValueError, match=text):
        load(folder)


def test_a_layer_that_is_missing_is_refused(llama: Path) -> None:
    folder = rewritten(llama, lambda weights: {n: t for n, t in weights.items() if "layers.1." not in n})
    with pytest.raises(ValueError, match=r"do not fill a LlamaForCausalLM: 9 missing \(model.layers.1.input_layernorm"):
        load(folder)


def test_names_without_the_bodys_prefix_are_known(llama: Path) -> None:
    load(rewritten(llama, lambda weights: {name.removeprefix("model."): tensor for name, tensor in weights.items()}))


def test_masks_that_old_versions_saved_are_left_out(llama: Path) -> None:
    load(rewritten(llama, lambda weights: weights | {"model.layers.0.attn.masked_bias": torch.zeros(1)}))


def test_a_language_model_gives_no_scores_but_a_scalar_model_may_begin_from_it(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing \(score.weight\).* needs a head named `score`"):
        load(llama, scalar=True)
    load(llama, scalar=True, begins_head=True)


@pytest.mark.parametrize("head", ["v_head", "value_head"])
def test_a_head_of_another_name_is_refused(llama: Path, head: str) -> None:
    folder = rewritten(llama, lambda weights: weights | {f"{head}.weight": torch.zeros(1, 64)})
    for scalar, begins in ((True, False), (True, True), (False, False)):
        with pytest.raises(ValueError, match=rf"1 unknown \({head}.weight\)"):
            load(folder, scalar, begins)


@pytest.mark.parametrize("begins_head", [True, False])
def test_a_head_with_two_outputs_is_refused(llama: Path, begins_head: bool) -> None:
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2).save_pretrained(llama.parent / "two")
    with pytest.raises(
        ValueError, match=r"score.weight has another shape \(\(2, 64\) in the folder, \(1, 64\) in the model"
    ):
        load(llama.parent / "two", scalar=True, begins_head=begins_head)


def test_a_reward_model_is_not_taken_for_a_language_model(llama: Path) -> None:
    reward_model = make_reward_model(llama, llama.parent / "reward")
    load(reward_model, scalar=True)
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\); 1 unknown \(score.weight\)"):
        load(reward_model)
