"""Random models for benchmarks: the right size and dtype, complete in shards, with a tokenizer of one token per word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import ModelSettings
from placement.models import Architecture
from workers.models import random_models
from workers.models.lora import refuse_other_base
from workers.models.shared_base import SharedBase

SHAPE = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    ids = {"bos_token_id": None, "eos_token_id": 511, "initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(SHAPE | ids))
    return folder


def test_a_drawn_model_loads_whole_from_its_shards(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "SHARD_BYTES", 2**16)
    count = random_models.draw_model(base, torch.bfloat16, seed=1)
    assert count == Architecture.read(SHAPE).parameters
    assert len(list(base.glob("*.safetensors"))) > 1
    model, loading = AutoModelForCausalLM.from_pretrained(base, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    block = model.transformer.h[0]
    assert float(block.attn.c_attn.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    assert block.ln_1.weight.float().tolist() == [1.0] * 64 and not block.ln_1.bias.any()


def test_a_prompt_has_as_many_tokens_as_words(base: Path) -> None:
    random_models.draw_model(base, torch.float32, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer("0 40 400 9 509", add_special_tokens=False)["input_ids"] == [0, 40, 400, 9, 509]
    assert tokenizer.eos_token_id == 511


def test_a_drawn_reward_model_is_an_adapter_on_its_base(base: Path, tmp_path: Path) -> None:
    random_models.draw_model(base, torch.bfloat16, seed=1)
    reward = tmp_path / "reward"
    random_models.draw_reward_model(reward, base, rank=4, seed=1)
    refuse_other_base(str(reward), str(base))
    settings = ModelSettings(path=str(base), dtype="bfloat16")
    model = SharedBase().scalar_model(str(reward), settings, seed=1, begins_head=False)
    assert model.score.weight.shape == (1, 64)
