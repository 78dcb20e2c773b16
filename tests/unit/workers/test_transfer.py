"""What an update is made of: checksums against a plain oracle, and whole tensors under the names that others know."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.families.zoo import make
from configs.schema import LoraSettings
from tests.support.models import ARCHITECTURES, make_model
from workers.models.loading import add_lora
from workers.weight_sync.checksums import checksum

WORD, ROW = 8, 8 * 4096  # bytes
SIZES = st.one_of(st.integers(1, 100), st.integers(ROW - 9, ROW + 9), st.integers(2 * ROW, 5 * ROW))


def random_bytes(size: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, np.uint8))


def oracle(tensor: Tensor) -> int:
    """The docstring's definition, in Python's integers."""
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    raw += b"\0" * (-len(raw) % ROW)
    words = np.frombuffer(raw, "<u8").reshape(-1, 4096).astype(object)
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    for sums in (words.sum(0) if len(words) else [0] * 4096, words.sum(1)):
        digest.update(b"".join(int(total % 2**64).to_bytes(8, "little") for total in sums))
    return int.from_bytes(digest.digest(), "little")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0,), torch.float32),
        ((3, 0, 2), torch.float32),
        ((), torch.float32),
        ((1,), torch.uint8),
        ((7, 3), torch.bfloat16),
        ((4096,), torch.int64),
        ((129, 517), torch.float32),
        ((60_001,), torch.float16),
    ],
)
def test_a_checksum_is_what_it_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = int(np.prod(shape)) * dtype.itemsize
    tensor = random_bytes(size, 1).view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    assert checksum(tensor) == oracle(tensor)
    assert 0 <= checksum(tensor) < 2**64


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32), st.data())
def test_any_changed_byte_changes_it(size: int, seed: int, data: st.DataObject) -> None:
    tensor = random_bytes(size, seed)
    before = checksum(tensor)
    at = data.draw(st.integers(0, size - 1))
    tensor[at] ^= data.draw(st.integers(1, 255))
    assert checksum(tensor) != before


@settings(deadline=None)
@given(st.integers(2, 3 * 4096), st.integers(0, 2**32), st.data())
def test_two_words_exchanged_change_it(count: int, seed: int, data: st.DataObject) -> None:
    words = random_bytes(count * WORD, seed).view(torch.int64)
    i = data.draw(st.integers(0, count - 1))
    j = data.draw(st.integers(0, count - 1).filter(lambda j: j != i))
    if data.draw(st.booleans()):
        words[j] = words[i] ^ data.draw(st.sampled_from([1, 2**31, 2**62, -(2**63)]))  # hardly different, sign alone
    before = checksum(words)
    words[[i, j]] = words[[j, i]]
    assert checksum(words) != before


def test_words_on_a_diagonal_exchanged_change_it() -> None:
    words = random_bytes(2 * ROW, 3).view(torch.int64)
    before = checksum(words)
    words[[1, 4096]] = words[[4096, 1]]  # (0, 1) and (1, 0)
    assert checksum(words) != before


def test_only_values_type_and_shape_count() -> None:
    tensor = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    strided = tensor.t().contiguous().t()
    assert not strided.is_contiguous() and checksum(strided) == checksum(tensor)
    assert checksum(torch.nn.Parameter(tensor)) == checksum(tensor) == checksum(tensor.clone())
    others = [tensor.view(48, 64), tensor.t(), tensor.view(torch.int32), tensor.bfloat16(), tensor[:-1]]
    assert len({checksum(t) for t in [tensor, *others]}) == 1 + len(others)


def test_zeros_at_the_end_count() -> None:
    assert len({checksum(torch.zeros(n, dtype=torch.uint8)) for n in range(20)}) == 20


# ------------------------------------------------------------ whole tensors

IMPORTS = pytest.mark.slow  # DeepSpeed's and vLLM's imports take seconds


@IMPORTS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tensors_of_a_model_are_those_of_its_file(tmp_path: Path, architecture: str, tied: bool) -> None:
    from workers.weight_sync.gather import GatheredWeights

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, architecture, tied))
    source = GatheredWeights(model, checked=True)
    sent = dict(source)
    written = load_file(tmp_path / "model.safetensors")
    assert {name.removeprefix("transformer.") for name in sent} == {n.removeprefix("transformer.") for n in written}
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, written.get(name, written.get(name.removeprefix("transformer."))))
    assert source.checksums == {name: checksum(tensor) for name, tensor in sent.items()}
    assert list(sent) == [meta.name for meta in source.metadata()], "receivers count on the order"
    assert [(t.dtype, tuple(t.shape)) for t in sent.values()] == [(m.dtype, m.shape) for m in source.metadata()]


MIXTURES = ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "minimax_m2")


@IMPORTS
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_buffers_have_the_names_of_the_file(tmp_path: Path, family: str) -> None:
    """transformers holds experts otherwise than checkpoints do; correction biases are buffers."""
    from workers.weight_sync.gather import GatheredWeights

    model = AutoModelForCausalLM.from_pretrained(make(tmp_path, family))
    source = GatheredWeights(model, checked=True)
    sent, written = dict(source), load_file(tmp_path / "model.safetensors")
    assert sent.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in sent.items())
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, t.dtype, t.shape) for n, t in sent.items()]
    assert any("correction_bias" in name for name in sent) == (family in ("deepseek_v3", "minimax_m2"))
    assert not source.lacking()


@IMPORTS
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_adapters_of_experts_come_merged(tmp_path: Path, family: str) -> None:
    from workers.weight_sync.gather import GatheredWeights

    model, _ = adapted(make(tmp_path / "start", family), LoraSettings(rank=8))
    adapted_parameters = {layer.parameter_name for layer in model.modules() if hasattr(layer, "parameter_name")}
    assert adapted_parameters == {"gate_up_proj", "down_proj", "weight"}
    source = GatheredWeights(model)
    assert not source.lacking()
    shutil.copytree(tmp_path / "start", tmp_path / "merged")
    save_file(dict(source), tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(5, 40)[None]
    logits = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits for name in ("start", "merged")
    }
    torch.testing.assert_close(logits["merged"], model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
    assert (logits["merged"] - logits["start"]).abs().max() > 0.1


@IMPORTS
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_small_adapter_is_merged_in_float32_and_rounded_once(tmp_path: Path, family: str) -> None:
    """In bfloat16 throughout, the product would be rounded before it is added."""
    from workers.weight_sync.gather import GatheredWeights

    model = AutoModelForCausalLM.from_pretrained(make(tmp_path, family), dtype=torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    for each in (model, wide):
        add_lora(each, LoraSettings(rank=4, alpha=4.0), seed=1)
        move_adapter(each, seed=2)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if name in adapters:
                parameter.copy_(adapters[name])
    exact = dict(GatheredWeights(wide))
    for name, tensor in GatheredWeights(model):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16())


def adapted(folder: Path, lora: LoraSettings) -> tuple[PreTrainedModel, PeftModel]:
    """A model whose adapter does something, and PEFT's wrapper of it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    wrapper = add_lora(model, lora, seed=1)
    move_adapter(model, seed=2)
    return model, wrapper


@torch.no_grad()
def move_adapter(model: nn.Module, seed: int, adapter: str = "default") -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


VARIANTS: list[dict[str, Any]] = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]


@IMPORTS
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant) or "lora")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_adapters_come_merged_and_do_not_accumulate(tmp_path: Path, architecture: str, variant: dict[str, Any]) -> None:
    from workers.weight_sync.gather import GatheredWeights

    folder = make_model(tmp_path, architecture)
    model, wrapper = adapted(folder, LoraSettings(rank=4, alpha=16.0, **variant))
    source = GatheredWeights(model, checked=True)
    first, second = dict(source), dict(source)

    merged = wrapper.merge_and_unload().state_dict()
    plain = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert set(first) == set(plain)
    changed = [name for name, tensor in first.items() if not torch.equal(tensor, plain[name])]
    assert changed and all(name.endswith("weight") for name in changed)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, merged[name])
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


@IMPORTS
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_one_adapter_of_two_is_merged_or_sent(tmp_path: Path, dora: bool) -> None:
    """The other, on some of the same layers, changes nothing; alone, an adapter is what PEFT writes of it."""
    from workers.weight_sync.gather import GatheredWeights

    model, wrapper = adapted(make_model(tmp_path, "llama"), LoraSettings(rank=4, dora=dora))
    alone, merged = dict(GatheredWeights(model, adapter="default")), dict(GatheredWeights(model))
    wrapper.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=dora))
    move_adapter(model, seed=3, adapter="other")
    for name, tensor in (dict(GatheredWeights(model)) | dict(GatheredWeights(model, adapter="default"))).items():
        assert torch.equal(tensor, (merged | alone)[name])
    wrapper.set_adapter("other")
    other = dict(GatheredWeights(model))
    written = {
        n.removesuffix(".weight"): t for n, t in get_peft_model_state_dict(wrapper, adapter_name="other").items()
    }
    sent = {n.removesuffix(".weight"): t for n, t in GatheredWeights(model, adapter="other")}
    assert sent.keys() == written.keys()
    assert all(torch.equal(sent[name], written[name]) for name in sent)
    wrapper.base_model.set_adapter(["default", "other"])
    both = AutoModelForCausalLM.from_pretrained(tmp_path)
    both.load_state_dict(dict(GatheredWeights(model)), strict=False)
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(both.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    oracle = wrapper.merge_and_unload(adapter_names=["other"]).state_dict()
    for name, tensor in other.items():
        torch.testing.assert_close(tensor, oracle[name])


@IMPORTS
def test_an_adapter_of_rank_8_is_a_small_part_of_the_model() -> None:
    """Of SmolLM2-135M's shape at most 3%, what is counted in `weight_sync_mib`."""
    from workers.weight_sync.gather import GatheredWeights

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=True))
        add_lora(model, LoraSettings(rank=8), seed=1)
    whole, alone = GatheredWeights(model), GatheredWeights(model, adapter="default")
    assert whole.nbytes == 4 * 134_515_008
    assert 0 < alone.nbytes <= 0.03 * whole.nbytes
    assert alone.nbytes == 4 * 8 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["lm_head"], "head take no adapter"), (["wte", "c_attn"], "embeddings"), (["no"], "not found")],
)
def test_targets_that_cannot_have_an_adapter_are_refused(tmp_path: Path, targets: list[str], said: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, "gpt2"))
    with pytest.raises(ValueError, match=rf"model\.lora\.targets: .*{said}"):
        add_lora(model, LoraSettings(targets=targets), seed=1)
