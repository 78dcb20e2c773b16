"""Exported models, read back by plain transformers and peft: the same outputs as the trainer's own model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.schema import LoraSettings, ModelSettings, OptimizerSettings, Strategy
from orchestrator.calls import WorkerGroup
from tests.hosts import Hosts
from tests.models import encoded, make_model
from workers.data import Row

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(3, 100, (3, 17)).tolist()
LORA = LoraSettings(rank=4, alpha=16.0)
DORA = LoraSettings(rank=4, alpha=16.0, rslora=True, dora=True)
SAME = 1e-5


def group_with(
    hosts: Hosts, kind: str, folder: Path, strategy: Strategy = "ddp", lora: LoraSettings | None = None
) -> WorkerGroup:
    """A model that is no longer the one in its folder."""
    group = hosts.group(kind, "actor", strategy, 2 if strategy == "zero3" else 1)
    group.call("load", str(folder), ModelSettings(path=str(folder), lora=lora), OptimizerSettings(lr=0.03)).get()
    group.call("add_noise", 0.05, 1).get()
    return group


def outputs(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


def export(group: WorkerGroup, folder: Path) -> np.ndarray:
    """Export; returns the trainer's own outputs."""
    group.call("export", str(folder)).get()
    for file in folder.rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o777 == 0o644, f"{file}: others cannot read it"
    return group.call("logits", IDS).get()[0]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("lora", [None, LORA, DORA], ids=["full", "lora", "dora-rslora"])
@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("gpt2", False)])
def test_a_language_model_is_read_back(
    hosts: Hosts, tmp_path: Path, architecture: str, tied: bool, lora: LoraSettings | None, strategy: Strategy
) -> None:
    start = make_model(tmp_path / "start", architecture, tied)
    group = group_with(hosts, "faulty_policy", start, strategy, lora)
    expected = export(group, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(outputs(model), expected, SAME, SAME)
    assert np.abs(outputs(AutoModelForCausalLM.from_pretrained(start)) - expected).max() > 0.1
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("It is so.")["input_ids"]) == "It is so."
    assert tokenizer.chat_template
    assert (tmp_path / "out" / "adapter").exists() == (lora is not None)
    if lora:
        base = AutoModelForCausalLM.from_pretrained(start)
        np.testing.assert_allclose(
            outputs(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")), expected, SAME, SAME
        )


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_scalar_model_is_read_back(hosts: Hosts, tmp_path: Path, lora: LoraSettings | None) -> None:
    start = make_model(tmp_path / "start", "llama")
    group = group_with(hosts, "open_value", start, lora=lora)
    rows = [Row(prompt="It is ", completion=completion) for completion in ("so bad.", "good", "a film of films")]
    group.call("add_rows", "sft", encoded(rows, "demonstration")).get()
    moments = group.first("normalize", "sft", [np.arange(3)])
    expected = export(group, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(outputs(model), expected, SAME, SAME)
    assert expected.shape == (3, 1) and np.ptp(expected) > 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == pytest.approx(moments)
    assert (model.config.score_mean, model.config.score_std) == pytest.approx(moments)
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    # What it scores after a second reading has mean 0 and deviation 1.
    again = group_with_export(hosts, tmp_path / "out", rows)
    assert again == pytest.approx((0.0, 1.0), abs=1e-4)


def group_with_export(hosts: Hosts, folder: Path, rows: list[Row]) -> tuple[float, float]:
    """Mean and deviation of an exported model's normalised scores."""
    group = hosts.group("open_value", "actor")
    group.call("load", str(folder), ModelSettings(path=str(folder)), None).get()
    return group.first("normalize", "sft", [np.arange(len(rows))])
