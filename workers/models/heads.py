"""The two kinds of model: a language model that gives log-probabilities and a scalar model that gives values or scores.

Both run the transformer's body once and read its hidden states at the positions that matter: no logits are computed for
prompts or padding, and those of the answers only a chunk of tokens at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from configs.schema import LoraSettings, ModelSettings
from placement.models.activations import LOGITS_CHUNK
from workers.data import Sequence
from workers.data.batching import spans
from workers.models.logit_transforms import AfterHead
from workers.models.weight_coverage import refuse_unfilled

_STAND_IN = Sequence.of([0], [0])
"""One token of a prompt and one of an answer: token 0 is in every vocabulary."""


class Batch:
    """Sequences of a micro-batch, padded on the right, and where their answers lie.

    rows: have `ids`, `prompt_length` and, of the tokens from there on, `loss_mask`.
    ids: [B, T] int64; lengths, prompt_lengths: [B]; answers have R = max(lengths - prompt_lengths) columns when padded.

    A micro-batch without rows (B = 0) is padding: other ranks have one more than this rank, and all compute equally many
    passes. Then ids and attention_mask hold a row that stands in, and the models run over it; but the mask is [0, 1], so that
    their outputs have no row. Losses of it sum to 0, and so do its gradients, exactly: nothing is multiplied by a weight.
    """

    def __init__(self, rows: list[Any], device: torch.device, seeds: list[int] | None = None) -> None:
        """seeds: of each row's dropout."""
        real, rows = len(rows), rows or [_STAND_IN]
        self.lengths = torch.tensor([len(r.ids) for r in rows])
        self.prompt_lengths = torch.tensor([r.prompt_length for r in rows])
        self.ids = torch.zeros(len(rows), int(self.lengths.max()), dtype=torch.long)
        for i, r in enumerate(rows):
            self.ids[i, : len(r.ids)] = torch.as_tensor(r.ids.astype("int64"))
        self.attention_mask = (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()
        answer_lengths = self.lengths - self.prompt_lengths
        columns = torch.arange(int(answer_lengths.max()))
        self.mask = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        for i, r in enumerate(rows):
            self.mask[i, : len(r.loss_mask)] = torch.as_tensor(r.loss_mask.copy())
        # After an empty prompt nothing stands before the first token: nothing predicts it.
        self.mask &= columns + self.prompt_lengths[:, None] > 0
        self.mask = self.mask[:real]
        """[B, R] True on the tokens that are learnt and have a token before them."""
        self.lengths, self.prompt_lengths = self.lengths[:real], self.prompt_lengths[:real]
        self.rows, columns = self.mask.nonzero(as_tuple=True)
        self.before = columns + self.prompt_lengths[self.rows] - 1
        """Position whose hidden state predicts each answer token (flat, like rows)."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        self.seeds = seeds

    def padded(self, flat: Tensor) -> Tensor:
        """[answer tokens] -> [B, R], zeros outside the mask."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.mask, flat)


class TableGradient:
    """Of a table that is head and word embeddings at once, the gradient of one pass: what the head's backward pass leaves, to
    which that of the embeddings, which comes after it, adds. Left to autograd there are two tensors of the table's size."""

    from_head: Tensor | None = None


class TiedEmbedding(torch.autograd.Function):
    """Rows of a table, whose gradient is added to the head's."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None, gradient: TableGradient) -> Tensor:
        """table [V, H], ids [...], padding: the token that does not learn here, if any -> [..., H]."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding, ctx.gradient = table.shape, padding, gradient
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        whole, ctx.gradient.from_head = ctx.gradient.from_head, None
        if whole is None:
            whole = of_rows.new_zeros(ctx.shape, dtype=torch.float32)
        # The few tokens that occur, each once: their sum is then taken in one order, on a GPU too.
        tokens, places = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(of_rows.float(), places, len(tokens), -1, False)
        if ctx.padding is not None:
            sums[tokens == ctx.padding] = 0
        return whole.index_add_(0, tokens, sums), None, None, None


class HeadLogProbs(torch.autograd.Function):
    """Log-probabilities of given tokens, and entropies, from hidden states: the head and the softmax in one, in chunks.

    Neither pass holds more logits than those of one chunk of tokens; the backward pass begins with the last chunk's, which were
    kept, computes the others' once more, and writes their gradient over them.
    With p the softmax, H its entropy and l = log p: d l_t = 1_t - p, d H = -p (l + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        tied: TableGradient | None,
        after: AfterHead,
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, H], weight [V, H], bias [V], targets [N] -> log-probabilities [N] and entropies [N], float32.

        tied: where the weight's gradient is left for the embeddings' backward pass, which returns it; none: it is returned here.
        """
        log_z, log_probs, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        room, more_room = _room(hidden, weight), _room(hidden, weight)
        for rows in spans(len(hidden), LOGITS_CHUNK):
            logits = _logits(hidden[rows], weight, bias, temperature, after, room)
            most = logits.amax(-1)
            logits.sub_(most[:, None])
            # The one pass of it: sum and entropy are made of the same.
            powers = torch.exp(logits, out=more_room[: len(logits)])
            total = powers.sum(-1)
            log_z[rows] = most + total.log()
            log_probs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - total.log()
            entropy[rows] = total.log() - torch.einsum("nv,nv->n", powers, logits) / total
        ctx.room = None
        if len(hidden) and any(ctx.needs_input_grad):
            logits.sub_(total.log()[:, None])
            ctx.room = room
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.temperature, ctx.tied, ctx.after = temperature, tied, after
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden)
        # Sums over chunks are in float32; autograd rounds them once where the weight is narrower.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            for_bias = torch.zeros_like(bias, dtype=torch.float32)
        if of_log_probs is not None:
            of_log_probs = of_log_probs / ctx.temperature
        if of_entropy is not None:
            of_entropy = of_entropy / ctx.temperature
        kept, ctx.room = ctx.room, None  # it is written over
        room = _room(hidden, weight) if kept is None else kept
        for rows in reversed(spans(len(hidden), LOGITS_CHUNK)):
            if kept is None:
                log_p = _logits(hidden[rows], weight, bias, ctx.temperature, ctx.after, room).sub_(log_z[rows, None])
            else:
                log_p, kept = kept[: len(hidden[rows])], None
            slope = ctx.after.slope(log_p, log_z[rows, None], ctx.temperature)
            grad = log_p.exp() if of_entropy is not None else log_p.exp_()
            scale = torch.zeros(len(grad), 1, device=grad.device) if of_log_probs is None else of_log_probs[rows, None]
            if of_entropy is None:
                grad.mul_(-scale)
            else:
                grad.mul_(log_p.add_(entropy[rows, None]).mul_(of_entropy[rows, None]).add_(scale).neg_())
            grad = grad.scatter_add_(-1, targets[rows, None], scale).mul_(slope)
            if for_bias is not None:
                for_bias.add_(grad.sum(0))
            grad = grad.to(hidden.dtype)
            for_hidden[rows] = grad @ weight
            if for_weight is not None and for_weight.dtype == hidden.dtype:
                for_weight.addmm_(grad.t(), hidden[rows])
            elif for_weight is not None:  # no product of PyTorch's adds to a wider tensor
                for_weight.add_(grad.t() @ hidden[rows])
        if ctx.tied is not None:
            ctx.tied.from_head, for_weight = for_weight, None
        return for_hidden, for_weight, for_bias, None, None, None, None


def _room(hidden: Tensor, weight: Tensor) -> Tensor:
    """Where the logits of one chunk after the other lie: fresh memory for each costs more than what is done with it."""
    return torch.empty(min(len(hidden), LOGITS_CHUNK), len(weight), device=hidden.device)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, after: AfterHead, room: Tensor
) -> Tensor:
    """In float32, in the first rows of `room`."""
    logits = room[: len(hidden)]
    if weight.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(hidden @ weight.t())
    if bias is not None:
        logits.add_(bias)
    after.apply_(logits)
    return logits if temperature == 1.0 else logits.div_(temperature)


class LanguageModel(nn.Module):
    """A causal language model that returns the log-probabilities of its answers' tokens."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.after = AfterHead.of(hf)
        self.hf = hf
        self.tied: TableGradient | None = None
        embeddings = hf.get_input_embeddings()
        if type(embeddings) is nn.Embedding and embeddings.weight is hf.get_output_embeddings().weight:
            embeddings.register_forward_hook(self._embed)

    def _embed(self, embeddings: nn.Embedding, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
        """What the embeddings give, with a gradient that joins the head's."""
        if not (torch.is_grad_enabled() and embeddings.weight.requires_grad):
            return found
        self.tied = TableGradient()
        return TiedEmbedding.apply(embeddings.weight, *args, embeddings.padding_idx, self.tied)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token and entropy of its distribution, [B, R] each, zeros outside the mask."""
        self.tied = None
        hidden = self.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        hidden = hidden[batch.rows, batch.before]
        targets = batch.ids[batch.rows, batch.before + 1]
        head = self.hf.get_output_embeddings()
        log_probs, entropy = HeadLogProbs.apply(
            hidden, head.weight, head.bias, targets, temperature, self.tied, self.after
        )
        return batch.padded(log_probs), batch.padded(entropy)


class ScalarModel(nn.Module):
    """A transformer with a scalar head: the critic's values, the reward model's scores.

    Its output is (head - mean) / deviation; both numbers live in the model's config, so that they travel with it. The head
    computes in float32, whatever the type of its weights: bfloat16 has eight bits for a score.

    Dropout is drawn row by row, with the seed that the batch has for each: what beside a row goes through the model, on this
    rank or on another, does not change it.
    """

    def __init__(self, hf: PreTrainedModel, dropout: float = 0.0) -> None:
        super().__init__()
        self.hf = hf
        hf.score.forward = partial(_in_float32, hf.score)
        self.dropout = dropout
        self.draws: list[torch.Generator] = []
        self.lengths: list[int] = []
        """Of the rows of the pass that is under way: what draws their dropout, and their lengths."""
        if dropout:
            hf.get_input_embeddings().register_forward_hook(self._drop_embeddings)

    @property
    def normalization(self) -> tuple[float, float]:
        return getattr(self.hf.config, "score_mean", 0.0), getattr(self.hf.config, "score_std", 1.0)

    def _at(self, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        self.draws = self._generators(batch)
        self.lengths = batch.lengths.tolist() if self.draws else []
        hidden = self.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        hidden = hidden[rows, columns]
        if self.draws:
            kept = self._kept(rows.bincount(minlength=len(self.draws)).tolist(), hidden.shape[-1])
            hidden = hidden * torch.cat(kept).to(hidden.dtype) / (1 - self.dropout)
        mean, std = self.normalization
        return (self.hf.score(hidden).squeeze(-1) - mean) / std

    def _generators(self, batch: Batch) -> list[torch.Generator]:
        """None where nothing is to be dropped, as of a micro-batch without rows."""
        if not (self.dropout and self.training):
            return []
        if batch.seeds is None:
            raise ValueError("a scalar model with dropout trains on batches with seeds")
        return [torch.Generator(batch.ids.device).manual_seed(seed) for seed in batch.seeds]

    def _kept(self, counts: list[int], width: int) -> list[Tensor]:
        """Of each row [count, width], which numbers are kept: the next that its generator draws."""
        return [
            torch.rand(count, width, generator=draw, device=draw.device) >= self.dropout
            for count, draw in zip(counts, self.draws, strict=True)
        ]

    def _drop_embeddings(self, embeddings: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> Tensor:
        """[B, T, H] without what is dropped of each row's tokens; of the padding all is."""
        if not self.draws:
            return found
        kept = torch.nn.utils.rnn.pad_sequence(self._kept(self.lengths, found.shape[-1]), batch_first=True)
        return found * kept.to(found.dtype) / (1 - self.dropout)

    def forward(self, batch: Batch, per_token: bool) -> Tensor:
        """per_token: values of the states before each answer token, [B, R]. Else scores at the sequences' last tokens, [B].

        The last token is found by the sequence's length, so that a pad token equal to eos does no harm.
        """
        if per_token:
            return batch.padded(self._at(batch, batch.rows, batch.before))
        return self._at(batch, torch.arange(len(batch.lengths), device=batch.ids.device), batch.lengths - 1)


def _in_float32(head: nn.Linear, hidden: Tensor) -> Tensor:
    return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model was made for; None where it sets no limit (ALiBi)."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    return None


def load_config(path: str, settings: ModelSettings, scalar: bool) -> PreTrainedConfig:
    """A model's config. Its dropout is turned off: the policy that learns must be the policy that sampled."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    if scalar:
        config.num_labels = 1
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def has_scalar_head(config: PreTrainedConfig) -> bool:
    """Whether a model of this family can have a scalar head."""
    of_its_own = getattr(config, "auto_map", None) or {}
    return (
        type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or "AutoModelForSequenceClassification" in of_its_own
    )


def load_hf(
    settings: ModelSettings, path: str, scalar: bool, seed: int, begins_head: bool = False, **options: Any
) -> PreTrainedModel:
    """A Hugging Face model with a language-model or a scalar head, from weights or drawn with the seed.

    begins_head: a scalar head may be drawn where the folder is a language model's. options: of from_pretrained.

    Raises ValueError where the folder's weights are not exactly those that the model has.
    """
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = load_config(path, settings, scalar)
    if scalar and not has_scalar_head(config):
        raise ValueError(
            f"{path}: transformers has no {config.model_type} with a scalar head, so it cannot give values or scores"
        )
    options |= {"dtype": getattr(torch, settings.dtype), "trust_remote_code": settings.trust_remote_code}
    if getattr(config, "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # the others leave the cap out
    if settings.quantize:
        options |= _quantized(settings)
    torch.manual_seed(seed)
    if settings.init == "random":
        model = auto.from_config(config, **options)
    else:
        known = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = auto.from_pretrained(path, **known, **options)
        refuse_unfilled(path, model, info, begins_head)
    if scalar and not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{path}: a {type(model).__name__} has no linear head named `score`, so it cannot give values or scores"
        )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _quantized(settings: ModelSettings) -> dict[str, Any]:
    """Options by which from_pretrained puts all matrices but the heads into fewer bits, on this process's GPU.

    4 bits: normal floats with quantized scales (Dettmers et al. 2023, section 3).
    """
    bits = BitsAndBytesConfig(
        load_in_4bit=settings.quantize == "4bit",
        load_in_8bit=settings.quantize == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": bits, "device_map": {"": torch.cuda.current_device()}}


LEARNS = "default"
"""PEFT's own name for the adapter that `add_lora` puts in."""


def add_lora(hf: PreTrainedModel, settings: LoraSettings, seed: int) -> nn.Module:
    """Put adapters into the model, in place; returns the PEFT wrapper. A scalar head has none: it stays trainable in full.

    Raises ValueError where `lora.targets` names something that cannot have an adapter, or nothing in the model.
    """
    from peft import LoraConfig, get_peft_model  # two seconds and 80 MB that full training need not spend

    torch.manual_seed(seed)
    head = getattr(hf, "score", None)
    try:
        wrapper = get_peft_model(
            hf,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=settings.targets,
                exclude_modules=None if head is None else ["score"],
                use_rslora=settings.rslora,
                use_dora=settings.dora,
            ),
        )
    except ValueError as error:
        raise ValueError(f"model.lora.targets: {error}") from error
    for layer in (hf.get_input_embeddings(), hf.get_output_embeddings()):
        if hasattr(layer, "lora_A"):
            raise ValueError(
                f"model.lora.targets: was {settings.targets}, but embeddings and the language-model head take no adapter here"
            )
    for name, layer in hf.named_modules():
        if hasattr(layer, "get_delta_weight") and not (hasattr(layer, "parameter_name") or _is_linear(layer)):
            raise ValueError(
                f"model.lora.targets: was {settings.targets}, but {name} is a {type(layer.get_base_layer()).__name__}, and only "
                "linear layers and experts take an adapter here"
            )
    if head is not None:
        head.requires_grad_(True)
    return wrapper


def _is_linear(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
