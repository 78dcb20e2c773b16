"""The language model and the scalar model, compared with plain Hugging Face models, one row at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from configs.schema import ModelSettings
from tests.support.models import ARCHITECTURES, GROUPED, VOCABULARY, WIDTH, make_model
from workers.data import Codec, Sample, load_tokenizer
from workers.models import fused_log_probs
from workers.models.heads import Batch, LanguageModel, ScalarModel
from workers.models.loading import load_hf
from workers.models.logit_transforms import AfterHead
from workers.rl.losses import LossInputs, PPOClip

CPU = torch.device("cpu")
KINDS = [
    *[(architecture, tied, False) for architecture in ARCHITECTURES for tied in (True, False)],
    *[(architecture, True, True) for architecture in GROUPED],
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{'tied' if kind[1] else 'untied'}{'-gqa' * kind[2]}")
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture, tied, grouped = request.param
    return make_model(tmp_path, architecture, tied, grouped, seed=1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_model(tmp_path, "llama", tied=True, grouped=False, seed=1)


def sequences(lengths: list[tuple[int, int]], seed: int = 0, low: int = 0) -> list[Sample]:
    """Random rows of (prompt, answer) tokens."""
    draw = np.random.default_rng(seed)
    return [Sample.of(draw.integers(low, VOCABULARY, p), draw.integers(low, VOCABULARY, a)) for p, a in lengths]


ROWS = sequences([(5, 7), (1, 1), (9, 2), (3, 12), (2, 4)])


def load(path: Path, scalar: bool = False, **settings: Any) -> PreTrainedModel:
    return load_hf(
        ModelSettings(**({"path": str(path), "dtype": "float32"} | settings)),
        str(path),
        scalar,
        seed=3,
        begins_head=scalar,
    ).eval()


def language_model(path: Path, **settings: Any) -> LanguageModel:
    return LanguageModel(load(path, **settings)).eval()


def plain_log_probs(hf: PreTrainedModel, row: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each predicted answer token, from all logits of this single row."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    log_softmax = torch.log_softmax(hf(input_ids=ids[None]).logits[0].double() / temperature, -1)
    before = torch.arange(max(row.prompt_length, 1), len(ids)) - 1
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax[before, ids[before + 1]], entropy[before]


def plain_values(hf: Any, row: Sample) -> Tensor:
    """The scalar head's output at every token of this row alone."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    return hf.score(hf.base_model(input_ids=ids[None])[0])[0, :, 0]


# ---------------------------------------------------------------- language model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_plain_model(folder: Path, temperature: float) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = Batch(ROWS, CPU)
    with torch.no_grad():
        log_probs, entropy = language_model(folder)(batch, temperature)
        for i, row in enumerate(ROWS):
            expected_log_probs, expected_entropy = plain_log_probs(plain, row, temperature)
            torch.testing.assert_close(log_probs[i][batch.mask[i]].double(), expected_log_probs, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(entropy[i][batch.mask[i]].double(), expected_entropy, atol=2e-5, rtol=1e-5)
    assert not log_probs[~batch.mask].any()
    assert not entropy[~batch.mask].any()
    assert log_probs.shape == (len(ROWS), 12)


def test_gradients_are_those_of_the_plain_model(folder: Path) -> None:
    plain, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), language_model(folder)
    weights = torch.randn(len(ROWS), 12, generator=torch.Generator().manual_seed(0))
    log_probs, entropy = ours(Batch(ROWS, CPU), 0.7)
    (log_probs * weights + 0.3 * entropy).sum().backward()
    for row, weight in zip(ROWS, weights, strict=True):
        plain_log_prob, plain_entropy = plain_log_probs(plain, row, 0.7)
        (plain_log_prob * weight[: len(plain_log_prob)] + 0.3 * plain_entropy).sum().backward()
    same_gradients(ours.hf, plain)


def same_gradients(a: nn.Module, b: nn.Module) -> None:
    expected = {name: p.grad for name, p in b.named_parameters() if p.grad is not None}
    assert expected
    for name, parameter in a.named_parameters():
        if name in expected:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5 * max(scale, 1.0), rtol=1e-4)
        else:
            assert parameter.grad is None


class TablesAllocated(TorchDispatchMode):
    """Records operations that allocate a tensor of the word embeddings' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == (VOCABULARY, WIDTH):
            given = [each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)]
            if result.untyped_storage().data_ptr() not in given:
                self.by.append(str(func))
        return result


@pytest.mark.parametrize(("architecture", "padding"), [("gpt2", None), ("opt", 7)])  # no other matrix has its shape
def test_a_tied_table_has_one_gradient_of_its_size(architecture: str, padding: int | None, tmp_path: Path) -> None:
    """Also with two forward passes before the first backward pass. A padding token has a gradient from the head only."""
    folder = make_model(tmp_path, architecture, seed=1, pad_token_id=padding)
    plain, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), language_model(folder)
    assert ours.hf.get_input_embeddings().padding_idx == padding
    batches = [Batch(ROWS, CPU), Batch(sequences([(4, 9), (60, 60)], seed=4), CPU)]
    assert any((batch.ids == 7).any() for batch in batches)
    losses = [ours(batch)[0].sum() for batch in batches]
    with TablesAllocated() as tables:
        losses[0].backward()
    assert tables.by == ["aten.zeros_like.default"]
    losses[1].backward()
    for batch in batches:
        for ids, length, first in zip(
            batch.ids, batch.lengths, batch.before.split(batch.mask.sum(1).tolist()), strict=True
        ):
            prompt = int(first[0]) + 1
            row = Sample.of(ids[:prompt].numpy(), ids[prompt:length].numpy())
            plain_log_probs(plain, row, 1.0)[0].sum().backward()
    same_gradients(ours.hf, plain)


class LargestLogits(TorchDispatchMode):
    """Records the largest number of rows of logits in the output of any operation."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.dim() > 1 and each.shape[-1] == VOCABULARY:
                rows = each.numel() // VOCABULARY
                self.most = max(self.most, rows if rows != WIDTH else 0)  # a head's weight, transposed
        return result


@pytest.mark.parametrize("chunk", [1, 3, 26])
def test_chunks_of_tokens_change_nothing(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on the chunk. No operation computes more logits than a chunk, so none for prompts and padding."""
    folder = make_model(tmp_path, "gpt2", seed=1)  # only the vocabulary has the width 120
    rows = [*ROWS, *sequences([(60, 1)])]
    answers = sum(len(row.ids) - row.prompt_length for row in rows)
    monkeypatch.setattr(fused_log_probs, "LOGITS_CHUNK", answers)
    whole, cut = language_model(folder), language_model(folder)
    expected = whole(Batch(rows, CPU))
    (expected[0].sum() + expected[1].sum()).backward()
    monkeypatch.setattr(fused_log_probs, "LOGITS_CHUNK", chunk)
    with LargestLogits() as logits:
        outputs = cut(Batch(rows, CPU))
        (outputs[0].sum() + outputs[1].sum()).backward()
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    same_gradients(cut.hf, whole.hf)
    assert logits.most == chunk


def test_two_backward_passes_through_a_graph(folder: Path) -> None:
    """The first backward pass overwrites the logits that the forward pass kept."""
    once, twice = language_model(folder), language_model(folder)
    log_probs, entropy = once(Batch(ROWS, CPU))
    (2 * (log_probs.sum() + entropy.sum())).backward()
    log_probs, entropy = twice(Batch(ROWS, CPU))
    loss = log_probs.sum() + entropy.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    same_gradients(once.hf, twice.hf)


def test_values_need_no_tensor_of_the_vocabularys_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory of critic and reward model does not depend on the vocabulary; the reference adds one chunk. For its backward
    pass, the actor keeps only the head and the buffer of one chunk."""
    folder, batch = make_model(tmp_path, "gpt2", seed=1), Batch(ROWS, CPU)  # only the vocabulary has the width 120
    monkeypatch.setattr(fused_log_probs, "LOGITS_CHUNK", 2)
    values, policy = scalar_model(folder), language_model(folder)
    with LargestLogits() as logits:
        for per_token in (True, False):
            values(batch, per_token).sum().backward()
    assert logits.most == 0
    with LargestLogits() as logits, torch.no_grad():
        policy(batch)
    assert logits.most == 2
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        policy(batch)
    assert kept
    assert not [shape for shape in kept if VOCABULARY in shape and shape != (VOCABULARY, WIDTH)]


def test_the_first_token_of_an_answer_without_a_prompt_has_no_log_prob(folder: Path) -> None:
    rows = [*sequences([(0, 5)], seed=4), ROWS[3], *sequences([(0, 1)], seed=5)]
    batch = Batch(rows, CPU)
    assert batch.mask[0].tolist() == [True] * 4 + [False] * 8
    assert batch.before[:4].tolist() == [0, 1, 2, 3]
    assert not batch.mask[2].any()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        log_probs, _ = language_model(folder)(batch)
        for i, row in enumerate(rows):
            expected, _ = plain_log_probs(plain, row, 1.0)
            torch.testing.assert_close(log_probs[i][batch.mask[i]].double(), expected, atol=2e-5, rtol=1e-5)


def test_rows_of_one_token_alone_have_no_log_probs(llama: Path) -> None:
    log_probs, entropy = language_model(llama)(Batch(sequences([(0, 1), (0, 1)]), CPU))
    assert not log_probs.any()
    assert not entropy.any()


def test_an_empty_prompt_gives_rows_of_this_kind(llama: Path) -> None:
    row = Codec(load_tokenizer(str(llama)), chat_template=False).sequence("", "ab")
    assert row.prompt_length == 0
    assert int(Batch([row], CPU).mask.sum()) == 2  # b and eos


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gpt2", {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3}),
        ("bloom", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_a_model_in_training_is_the_model_that_sampled(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    model = language_model(make_model(tmp_path, architecture, seed=1, **settings))
    with torch.no_grad():
        expected = model(Batch(ROWS, CPU))
        outputs = model.train()(Batch(ROWS, CPU))
    torch.testing.assert_close(outputs, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "tied"), [*((architecture, True) for architecture in ARCHITECTURES), ("llama", False)]
)
@pytest.mark.parametrize("scalar", [False, True], ids=["language", "scalar"])
def test_a_micro_batch_without_rows_runs_the_model_and_has_zero_gradients(
    tmp_path: Path, architecture: str, tied: bool, scalar: bool
) -> None:
    """Padding, for a rank with fewer rows than others: the same modules run, without any output."""
    folder = make_model(tmp_path, architecture, tied, seed=1)
    model = scalar_model(folder) if scalar else language_model(folder)
    model.hf.gradient_checkpointing_enable()
    model.train()
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))

    def learn(rows: list[Sample]) -> tuple[float, dict[str, Tensor], list[str]]:
        """Loss, gradients, and the modules in the order of execution."""
        model.zero_grad()
        ran.clear()
        loss = _any_loss(model, Batch(rows, CPU), scalar)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, list(ran)

    _, some, modules = learn(ROWS)
    loss, none, in_padding = learn([])
    assert loss == 0.0
    assert none.keys() == some.keys()
    assert not any(gradient.any() for gradient in none.values())
    assert in_padding == modules, "ranks gather the same weights in the same order"


def _any_loss(model: nn.Module, batch: Batch, scalar: bool) -> Tensor:
    """A loss from all outputs of a model; its targets are nan where there are no rows."""
    if scalar:
        values, scores = model(batch, per_token=True), model(batch, per_token=False)
        assert values.shape == batch.mask.shape and scores.shape == batch.lengths.shape
        return values.sum() + scores.sum()
    log_probs, entropy = model(batch, 0.7)
    assert log_probs.shape == entropy.shape == batch.mask.shape
    other = torch.full_like(log_probs, 0.5 if len(batch.lengths) else torch.nan)
    inputs = LossInputs(log_probs, other, other, None, other, batch.mask)
    return PPOClip(PPOClip.Config())(inputs).loss.sum() + entropy.sum()


TINY = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "eos_token_id": 1}


def other_model(kind: str, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TINY, **settings))


CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"final_logit_softcapping": 1.5}),
    ("cohere", {"logit_scale": 0.0625}),
    ("granite", {"logits_scaling": 8.0}),
    ("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32}),
]


@pytest.mark.parametrize(("kind", "settings"), CHANGED, ids=[kind for kind, _ in CHANGED])
def test_logits_that_are_scaled_or_capped_after_the_head(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities, entropies and gradients equal the plain model's at any temperature and chunk size."""
    torch.manual_seed(1)
    plain = other_model(kind, **settings).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    monkeypatch.setattr(fused_log_probs, "LOGITS_CHUNK", 5)
    ours = LanguageModel(copy.deepcopy(plain)).eval()
    assert ours.after != AfterHead()
    batch = Batch(ROWS, CPU)
    log_probs, entropy = ours(batch, 0.7)
    (log_probs.sum() + 0.3 * entropy.sum()).backward()
    for i, row in enumerate(ROWS):
        expected, plain_entropy = plain_log_probs(plain, row, 0.7)
        (expected.sum() + 0.3 * plain_entropy.sum()).backward()
        torch.testing.assert_close(log_probs[i][batch.mask[i]].double(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[i][batch.mask[i]].double(), plain_entropy, atol=2e-5, rtol=1e-5)
    same_gradients(ours.hf, plain)


@pytest.mark.parametrize(
    ("kind", "settings"), [("gemma2", {"final_logit_softcapping": None}), ("granite", {"logits_scaling": 1.0})]
)
def test_a_model_that_could_change_its_logits_but_does_not(kind: str, settings: dict[str, Any]) -> None:
    assert LanguageModel(other_model(kind, **settings)).after == AfterHead()


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = other_model("granite", logits_scaling=8.0)
    model.config.logits_scaling = 4.0  # the model does not scale
    monkeypatch.setattr(type(model), "forward", _halved(type(model).forward))
    with pytest.raises(
        ValueError, match="granite changes its logits around the head in a way that Troupe does not support"
    ):
        LanguageModel(model)


def _halved(forward: Any) -> Any:
    def changed(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.logits = output.logits / 3
        return output

    return changed


def test_a_cap_on_attention_is_applied(tmp_path: Path) -> None:
    """torch's fused attention ignores Gemma 2's cap; engines apply it."""
    folder = tmp_path / "model"
    model = other_model("gemma2", attn_logit_softcapping=0.1, initializer_range=0.3)
    model.save_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    without = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    ids = torch.arange(5, 40)[None]
    assert torch.equal(load(folder)(ids).logits, expected(ids).logits)
    assert (without(ids).logits - expected(ids).logits).abs().max() > 1e-3


# ---------------------------------------------------------------- scalar model


def scalar_model(path: Path, dropout: float = 0.0) -> ScalarModel:
    return ScalarModel(load(path, scalar=True), dropout).eval()


@torch.no_grad()
def test_scores_and_values_are_those_of_the_plain_model(folder: Path) -> None:
    model = scalar_model(folder)
    batch = Batch(ROWS, CPU)
    scores, values = model(batch, per_token=False), model(batch, per_token=True)
    assert scores.shape == (len(ROWS),)
    assert values.shape == batch.mask.shape
    for i, row in enumerate(ROWS):
        expected = plain_values(model.hf, row)
        torch.testing.assert_close(scores[i], expected[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[i][batch.mask[i]], expected[row.prompt_length - 1 : -1], atol=1e-5, rtol=1e-5)
    assert not values[~batch.mask].any()


@torch.no_grad()
def test_the_score_is_at_the_last_token_also_if_it_is_eos(llama: Path) -> None:
    """Rows with the pad token, which equals eos (0, also our padding), in the middle and at the end."""
    model = scalar_model(llama)
    model.hf.config.pad_token_id = model.hf.config.eos_token_id = 0
    rows = [
        Sample.of(ids[:2], ids[2:])
        for ids in ([5, 6, 7, 0], [5, 6, 0, 7, 0], [5, 0, 7, 8, 9, 10], [5, 6, 0, 0, 0], [0, 0, 0])
    ]
    scores = model(Batch(rows, CPU), per_token=False)
    expected = torch.stack([plain_values(model.hf, row)[-1] for row in rows])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert len(set(scores.tolist())) == len(rows)


@torch.no_grad()
def test_padding_changes_no_score(llama: Path) -> None:
    """Padding has no influence: the same rows in a batch with a longer one have the same scores."""
    model, long = scalar_model(llama), sequences([(20, 30)])
    alone, beside = model(Batch(ROWS, CPU), per_token=False), model(Batch(ROWS + long, CPU), per_token=False)
    torch.testing.assert_close(alone, beside[:-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_answers_without_a_prompt_have_scores(folder: Path) -> None:
    model, rows = scalar_model(folder), [*sequences([(0, 4), (0, 1)], seed=6), ROWS[0]]
    scores = model(Batch(rows, CPU), per_token=False)
    expected = torch.stack([plain_values(model.hf, row)[-1] for row in rows])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_normalisation_shifts_and_scales_and_travels_with_the_model(llama: Path, tmp_path: Path) -> None:
    model = scalar_model(llama)
    batch = Batch(ROWS, CPU)
    raw = model(batch, per_token=False), model(batch, per_token=True)
    model.hf.config.score_mean, model.hf.config.score_std = 0.25, 2.0
    model.hf.save_pretrained(tmp_path / "saved")
    again = ScalarModel(load(tmp_path / "saved", scalar=True)).eval()
    for normalised in (model, again):
        torch.testing.assert_close(normalised(batch, per_token=False), (raw[0] - 0.25) / 2.0)
        values = normalised(batch, per_token=True)
        torch.testing.assert_close(values[batch.mask], (raw[1][batch.mask] - 0.25) / 2.0)
        assert not values[~batch.mask].any()


@torch.no_grad()
def test_dropout_is_applied_in_training_only(llama: Path) -> None:
    plain, model, batch = scalar_model(llama), scalar_model(llama, dropout=0.3), Batch(ROWS, CPU)
    expected = plain(batch, per_token=False)
    torch.testing.assert_close(model(batch, per_token=False), expected, atol=0, rtol=0)

    def trained(seed: int) -> Tensor:
        seeds = [seed + k for k in range(len(ROWS))]
        return model.train()(Batch(ROWS, CPU, seeds), per_token=False)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    assert not torch.equal(trained(1), expected)
    torch.testing.assert_close(model.eval()(batch, per_token=False), expected, atol=0, rtol=0)


def test_dropout_is_on_the_embeddings_and_before_the_head(llama: Path) -> None:
    """With everything dropped, both outputs are zero."""
    model = scalar_model(llama, dropout=1 - 1e-9).train()
    seen: list[Tensor] = []
    model.hf.base_model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    scores = model(Batch(ROWS, CPU, list(range(len(ROWS)))), per_token=False)
    assert not seen[0].any()
    assert not scores.any()


def test_dropout_drops_its_share_and_keeps_the_mean(llama: Path) -> None:
    model, rows = scalar_model(llama, dropout=0.3).train(), sequences([(60, 60), (60, 60)])
    whole = model.hf.get_input_embeddings().weight[Batch(rows, CPU).ids]
    seen: list[Tensor] = []
    model.hf.base_model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(Batch(rows, CPU, [3, 4]), per_token=False)
    kept = seen[0] != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(seen[0], torch.where(kept, whole / 0.7, 0))
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("per_token", [False, True])
def test_dropout_of_a_row_depends_on_its_seed_alone(llama: Path, per_token: bool) -> None:
    """Not on the other rows, the row's position or its padding; the same holds for the gradients."""
    model = scalar_model(llama, dropout=0.3).train()

    def computed(*parts: list[int]) -> tuple[dict[int, Tensor], list[Tensor]]:
        model.zero_grad()
        of: dict[int, Tensor] = {}
        for part in parts:
            batch = Batch([ROWS[i] for i in part], CPU, [100 + i for i in part])
            out = model(batch, per_token)
            of |= {i: out[k][batch.mask[k]] if per_token else out[k] for k, i in enumerate(part)}
        torch.cat([each.view(-1).square() for each in of.values()]).sum().backward()
        return of, [p.grad for p in model.parameters() if p.grad is not None]

    everything = list(range(len(ROWS)))
    (values, gradients), cut = computed(everything), computed(*[[i] for i in reversed(everything)], [])
    for i in everything:
        torch.testing.assert_close(cut[0][i], values[i], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cut[1], gradients, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- loading


def test_a_random_model_is_drawn_with_the_seed(llama: Path, tmp_path: Path) -> None:
    load(llama).config.save_pretrained(tmp_path / "shape")
    settings = ModelSettings(path="shape", dtype="float32", init="random")

    def drawn(seed: int) -> Tensor:
        return load_hf(settings, str(tmp_path / "shape"), scalar=False, seed=seed).lm_head.weight

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_new_scalar_head_is_drawn_with_the_seed_and_the_body_kept(llama: Path) -> None:
    body, scalar, other = load(llama), load(llama, scalar=True), load(llama, scalar=True)
    assert torch.equal(scalar.score.weight, other.score.weight)
    assert scalar.score.weight.shape == (1, 64)
    torch.testing.assert_close(scalar.model.state_dict(), body.model.state_dict())
    assert isinstance(scalar, type(AutoModelForSequenceClassification.from_config(scalar.config)))


def test_gradient_checkpointing_changes_no_gradient(llama: Path) -> None:
    plain, frugal = language_model(llama).train(), language_model(llama, gradient_checkpointing=True).train()
    for model in (plain, frugal):
        model(Batch(ROWS, CPU))[0].sum().backward()
    same_gradients(frugal.hf, plain.hf)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, architecture: str) -> None:
    """For some model types transformers returns an empty tokenizer."""
    for file in make_model(tmp_path, architecture).glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer"):
        load_tokenizer(str(tmp_path))
