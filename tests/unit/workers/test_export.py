"""Exported models, read back by plain transformers and peft: the same outputs as the trainer's own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.families.zoo import make
from configs.schema import LoraSettings, ModelSettings, OptimizerSettings, Strategy
from orchestrator.worker_groups.calls import WorkerGroup
from orchestrator.worker_groups.failures import WorkerError
from tests.support.apis import FaultyPolicyApi, OpenApi
from tests.support.hosts import Hosts, run_config
from tests.support.models import encoded, make_model
from workers.api import TrainerApi, ValueApi, WorkerApi
from workers.data import Row
from workers.models.export import write_settings, write_weights
from workers.models.lora import base_of
from workers.process.worker import environment
from workers.weight_sync import gather

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(3, 100, (3, 17)).tolist()
LORA = LoraSettings(rank=4, alpha=16.0)
DORA = LoraSettings(rank=4, alpha=16.0, rslora=True, dora=True)
SAME = 1e-5


def group_with(
    hosts: Hosts, kind: str, folder: Path, strategy: Strategy = "ddp", lora: LoraSettings | None = None
) -> WorkerGroup:
    """Change the model, so that it differs from the one in its folder."""
    group = hosts.group(kind, "actor", strategy, 2 if strategy == "zero3" else 1)
    group.call(
        TrainerApi.load,
        str(folder),
        ModelSettings(path=str(folder), dtype="float32", lora=lora),
        OptimizerSettings(lr=0.03),
    ).get()
    group.call(OpenApi.add_noise, 0.05, 1).get()
    return group


def outputs(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


def export(group: WorkerGroup, folder: Path) -> np.ndarray:
    """Export the model; returns the trainer's outputs."""
    group.call(TrainerApi.export, str(folder)).get()
    for file in folder.rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o777 == 0o644, f"{file}: others cannot read it"
    return group.call(OpenApi.logits, IDS).get()[0]


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


GENERATION = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 2], "pad_token_id": 0}
"""As Llama 2's: transformers refuses to save a temperature with do_sample: false."""


def test_a_generation_config_is_exported_as_it_was(hosts: Hosts, tmp_path: Path) -> None:
    start = make_model(tmp_path / "start", "llama")
    (start / "generation_config.json").write_text(json.dumps(GENERATION))
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.1}))  # as in older models
    expected = export(group_with(hosts, "faulty_policy", start), tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: generation.get(name) for name in GENERATION} == GENERATION
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.9, 0.6)
    np.testing.assert_allclose(outputs(model), expected, SAME, SAME)


LONG = 48
"""Length of an answer without an end token."""


def made_to_end_soon(folder: Path, of_tokenizer: bool) -> int:
    """A model whose answers contain <|im_end|> as the most likely token, and as every third token otherwise. Its configs name
    another end token; the tokenizer names either. Returns the id of <|im_end|>."""
    make_model(folder, "gpt2", tied=False, vocab_size=160)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.eos_token = "<|im_end|>" if of_tokenizer else tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 4.4 / model.config.n_embd
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 1 != end
    model.save_pretrained(folder)
    return end


def written(folder: Path, **options: Any) -> list[int]:
    """An answer from plain transformers."""
    torch.manual_seed(3)
    ids = AutoTokenizer.from_pretrained(folder)("It is", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.generate(ids, max_new_tokens=LONG, **options)[0, ids.shape[1] :].tolist()


VLLM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=2**25)
asked = [llm.get_default_sampling_params(), SamplingParams(), SamplingParams(temperature=0.0)]
for each in asked:
    each.max_tokens = int(sys.argv[2])
prompts = [TokensPrompt(prompt_token_ids=[5, 6, 7])] * len(asked)
print(json.dumps([list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, asked, use_tqdm=False)]))
"""


@pytest.mark.parametrize("of_tokenizer", [True, False], ids=["the tokenizer's", "named by model.end_tokens"])
def test_an_exported_folder_ends_its_answers_by_itself(hosts: Hosts, tmp_path: Path, of_tokenizer: bool) -> None:
    """With trained end tokens that the start model's configs do not name, in plain transformers and plain vLLM."""
    end = made_to_end_soon(start := tmp_path / "start", of_tokenizer)
    settings = {"path": str(start), "dtype": "float32", "end_tokens": None if of_tokenizer else ["<|im_end|>"]}
    group = hosts.group("faulty_policy", "actor")
    group.call(TrainerApi.load, str(start), ModelSettings.model_validate(settings), OptimizerSettings(lr=0.03)).get()
    group.call(TrainerApi.export, str(out := tmp_path / "out")).get()
    assert written(start) == [end] * LONG, "the start model does not stop"
    assert written(out) == [end]
    assert written(start, do_sample=True).count(end) > 1
    sampled = written(out, do_sample=True)
    assert sampled.index(end) == len(sampled) - 1
    if of_tokenizer:
        return

    env = environment(run_config(), "rollout", "cpu", 1) | {"VLLM_HOST_IP": "127.0.0.1"}
    command = [sys.executable, "-c", VLLM, str(out), str(LONG)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert answer.index(end) == len(answer) - 1


def test_what_an_export_would_refuse_is_refused_before_anything_is_trained(hosts: Hosts, tmp_path: Path) -> None:
    start = make_model(tmp_path / "start", "llama")
    settings = ModelSettings(path=str(start), dtype="float32")
    group = hosts.group("faulty_policy", "actor")
    group.call(FaultyPolicyApi.refuse_descriptions, True).get()
    try:
        with pytest.raises(WorkerError, match=r"^actor rank 0 failed in load: ValueError: no description of this"):
            group.call(TrainerApi.load, str(start), settings, OptimizerSettings(lr=0.03)).get()
        group.call(TrainerApi.load, str(start), settings, None).get()
    finally:
        group.call(FaultyPolicyApi.refuse_descriptions, False).get()


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_an_export_that_fails_on_the_rank_that_writes_leaves_no_rank_waiting(
    hosts: Hosts, tmp_path: Path, strategy: Strategy
) -> None:
    start = make_model(tmp_path / "start", "llama")
    group = group_with(hosts, "faulty_policy", start, strategy, LORA)
    (tmp_path / "taken").write_text("a file, where a folder is to be")
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^actor rank 0 failed in export: FileExistsError: "):
        group.call(TrainerApi.export, str(tmp_path / "taken")).get()
    assert len({str(logits) for logits in group.call(OpenApi.logits, IDS).get()}) == 1, "all ranks answer"
    assert time.monotonic() - began < 60
    export(group, tmp_path / "out")


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_and_buffers_are_read_back(
    hosts: Hosts, tmp_path: Path, family: str, lora: LoraSettings | None, strategy: Strategy
) -> None:
    """Adapters of experts are merged too, correction biases are written, and the names are the checkpoint's."""
    start = make(tmp_path / "start", family)
    group = group_with(hosts, "faulty_policy", start, strategy, lora)
    expected = export(group, tmp_path / "out")
    np.testing.assert_allclose(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, 1e-4, 1e-4)
    written, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "start"))
    assert written.keys() == before.keys()
    biases = [name for name in written if "correction_bias" in name]
    assert bool(biases) == (family == "deepseek_v3")
    assert all(torch.equal(written[name], before[name]) and written[name].any() for name in biases)
    if lora:
        base = AutoModelForCausalLM.from_pretrained(start)
        np.testing.assert_allclose(
            outputs(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")), expected, 1e-4, 1e-4
        )


@pytest.mark.parametrize("kind", ["faulty_policy", "open_value"])
def test_an_adapters_folder_is_whole(hosts: Hosts, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT finds the base and the task from any working folder, the tokenizer is in the folder, and base and adapter may be moved
    together."""
    start = make_model(tmp_path / "here" / "start", "llama")
    group = group_with(hosts, kind, start, lora=LORA)
    expected = export(group, tmp_path / "here" / "out")
    adapter = tmp_path / "here" / "out" / "adapter"
    monkeypatch.chdir("/")
    if kind == "open_value":
        task, read = "SEQ_CLS", AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1)
    else:
        task, read = "CAUSAL_LM", AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == task
    np.testing.assert_allclose(outputs(read), expected, SAME, SAME)
    assert (
        AutoTokenizer.from_pretrained(adapter).decode(AutoTokenizer.from_pretrained(adapter)("It is.")["input_ids"])
        == "It is."
    )
    assert base_of(adapter) == str(start.resolve())
    (tmp_path / "here").rename(tmp_path / "there")
    assert base_of(tmp_path / "there" / "out" / "adapter") == str((tmp_path / "there" / "start").resolve())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_scalar_model_is_read_back(hosts: Hosts, tmp_path: Path, lora: LoraSettings | None) -> None:
    start = make_model(tmp_path / "start", "llama")
    group = group_with(hosts, "open_value", start, lora=lora)
    rows = [Row(prompt="It is ", completion=completion) for completion in ("so bad.", "good", "a film of films")]
    group.call(WorkerApi.add_rows, "sft", encoded(rows, "demonstration")).get()
    moments = group.first(ValueApi.normalize, "sft", [np.arange(3)])
    expected = export(group, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(outputs(model), expected, SAME, SAME)
    assert expected.shape == (3, 1) and np.ptp(expected) > 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == pytest.approx(moments)
    assert (model.config.score_mean, model.config.score_std) == pytest.approx(moments)
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    # Loaded again, its scores have mean 0 and standard deviation 1.
    again = group_with_export(hosts, tmp_path / "out", rows)
    assert again == pytest.approx((0.0, 1.0), abs=1e-4)


def group_with_export(hosts: Hosts, folder: Path, rows: list[Row]) -> tuple[float, float]:
    """Mean and standard deviation of an exported model's normalised scores."""
    group = hosts.group("open_value", "actor")
    group.call(TrainerApi.load, str(folder), ModelSettings(path=str(folder), dtype="float32"), None).get()
    return group.first(ValueApi.normalize, "sft", [np.arange(len(rows))])


def test_a_large_model_is_written_in_several_files_with_an_index(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "start", "llama", tied=False))
    (tmp_path / "out").mkdir()
    write_settings(model, AutoTokenizer.from_pretrained(tmp_path / "start"), [1], tmp_path / "out")
    write_weights(model, tmp_path / "out", writes=True, shard_bytes=60_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(outputs(read), outputs(model))


def test_a_tensor_that_would_not_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "start", "deepseek_v3"))
    monkeypatch.setattr(gather, "_saved", lambda owner: owner.named_parameters(recurse=False))  # without buffers
    with pytest.raises(
        RuntimeError, match=r"export: 1 tensors .* first model.layers.1.mlp.gate.e_score_correction_bias"
    ):
        write_weights(model, tmp_path, writes=True)
