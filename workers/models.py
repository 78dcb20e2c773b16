"""The two kinds of model: a language model that gives log-probabilities and a scalar model that gives values or scores.

Both run the transformer's body once and read its hidden states at the positions that matter: no logits are computed for
prompts or padding, and those of the answers only a chunk of tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from configs.schema import LoraSettings, ModelSettings
from placement.activations import LOGITS_CHUNK
from workers.batching import spans


class Batch:
    """Sequences of a micro-batch, padded on the right, and where their answers lie.

    ids: [B, T] int64; lengths, prompt_lengths: [B]; answers have R = max(lengths - prompt_lengths) columns when padded.
    """

    def __init__(self, rows: list[Any], device: torch.device) -> None:
        self.lengths = torch.tensor([len(r.ids) for r in rows])
        self.prompt_lengths = torch.tensor([r.prompt_length for r in rows])
        self.ids = torch.zeros(len(rows), int(self.lengths.max()), dtype=torch.long)
        for i, r in enumerate(rows):
            self.ids[i, : len(r.ids)] = torch.as_tensor(r.ids.astype("int64"))
        self.attention_mask = (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()
        answer_lengths = self.lengths - self.prompt_lengths
        columns = torch.arange(int(answer_lengths.max()))
        # After an empty prompt nothing stands before the first token: nothing predicts it.
        self.mask = (columns < answer_lengths[:, None]) & (columns + self.prompt_lengths[:, None] > 0)
        """[B, R] True on the answers' tokens that have a token before them."""
        self.rows, columns = self.mask.nonzero(as_tuple=True)
        self.before = columns + self.prompt_lengths[self.rows] - 1
        """Position whose hidden state predicts each answer token (flat, like rows)."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def padded(self, flat: Tensor) -> Tensor:
        """[answer tokens] -> [B, R], zeros outside the mask."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.mask, flat)


class HeadLogProbs(torch.autograd.Function):
    """Log-probabilities of given tokens, and entropies, from hidden states: the head and the softmax in one, in chunks.

    Neither pass holds more logits than those of one chunk of tokens; the backward pass computes them once more, and writes
    their gradient over them. With p the softmax, H its entropy and l = log p: d l_t = 1_t - p, d H = -p (l + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, H], weight [V, H], bias [V], targets [N] -> log-probabilities [N] and entropies [N], float32."""
        log_z, log_probs, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in spans(len(hidden), LOGITS_CHUNK):
            logits = _logits(hidden[rows], weight, bias, temperature)
            most = logits.amax(-1)
            logits.sub_(most[:, None])
            powers = logits.exp()  # the one pass of it: sum and entropy are made of the same
            total = powers.sum(-1)
            log_z[rows] = most + total.log()
            log_probs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - total.log()
            entropy[rows] = total.log() - torch.einsum("nv,nv->n", powers, logits) / total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.temperature = temperature
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden)
        for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        if of_log_probs is not None:
            of_log_probs = of_log_probs / ctx.temperature
        if of_entropy is not None:
            of_entropy = of_entropy / ctx.temperature
        for rows in spans(len(hidden), LOGITS_CHUNK):
            log_p = _logits(hidden[rows], weight, bias, ctx.temperature).sub_(log_z[rows, None])
            grad = log_p.exp() if of_entropy is not None else log_p.exp_()
            scale = torch.zeros(len(grad), 1, device=grad.device) if of_log_probs is None else of_log_probs[rows, None]
            if of_entropy is None:
                grad.mul_(-scale)
            else:
                grad.mul_(log_p.add_(entropy[rows, None]).mul_(of_entropy[rows, None]).add_(scale).neg_())
            grad = grad.scatter_add_(-1, targets[rows, None], scale).to(hidden.dtype)
            for_hidden[rows] = grad @ weight
            if for_weight is not None:
                for_weight.addmm_(grad.t(), hidden[rows])
            if for_bias is not None:
                for_bias.add_(grad.sum(0))
        return for_hidden, for_weight, for_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


@torch.no_grad()
def _check_head(hf: PreTrainedModel) -> None:
    """Raises ValueError where the model's logits are not its head's output, but scaled or capped afterwards."""
    hf.eval()
    ids = torch.arange(8)[None]
    logits = hf.get_output_embeddings()(hf.base_model(input_ids=ids, use_cache=False)[0])
    if not torch.equal(logits, hf(input_ids=ids, use_cache=False).logits):
        raise ValueError(f"model: {hf.config.model_type} changes its logits after the head, which is not supported")


class LanguageModel(nn.Module):
    """A causal language model that returns the log-probabilities of its answers' tokens."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        _check_head(hf)
        self.hf = hf

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token and entropy of its distribution, [B, R] each, zeros outside the mask."""
        hidden = self.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        hidden = hidden[batch.rows, batch.before]
        targets = batch.ids[batch.rows, batch.before + 1]
        head = self.hf.get_output_embeddings()
        log_probs, entropy = HeadLogProbs.apply(hidden, head.weight, head.bias, targets, temperature)
        return batch.padded(log_probs), batch.padded(entropy)


class ScalarModel(nn.Module):
    """A transformer with a scalar head: the critic's values, the reward model's scores.

    Its output is (head - mean) / deviation; both numbers live in the model's config, so that they travel with it.
    """

    def __init__(self, hf: PreTrainedModel, dropout: float = 0.0) -> None:
        super().__init__()
        self.hf = hf
        self.dropout = dropout
        if dropout:
            hf.get_input_embeddings().register_forward_hook(lambda _m, _i, out: F.dropout(out, dropout, self.training))

    @property
    def normalization(self) -> tuple[float, float]:
        return getattr(self.hf.config, "score_mean", 0.0), getattr(self.hf.config, "score_std", 1.0)

    def _at(self, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        hidden = self.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        hidden = F.dropout(hidden[rows, columns], self.dropout, self.training)
        mean, std = self.normalization
        return (self.hf.score(hidden).squeeze(-1).float() - mean) / std

    def forward(self, batch: Batch, per_token: bool) -> Tensor:
        """per_token: values of the states before each answer token, [B, R]. Else scores at the sequences' last tokens, [B].

        The last token is found by the sequence's length, so that a pad token equal to eos does no harm.
        """
        if per_token:
            return batch.padded(self._at(batch, batch.rows, batch.before))
        return self._at(batch, torch.arange(len(batch.lengths), device=batch.ids.device), batch.lengths - 1)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Raises ValueError where there is none, for which transformers may give one without tokens."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{path}: no tokenizer is here, or one that finds no token in a text")
    return tokenizer


def load_config(path: str, settings: ModelSettings, scalar: bool) -> PreTrainedConfig:
    """A model's config. Its dropout is turned off: the policy that learns must be the policy that sampled."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    if scalar:
        config.num_labels = 1
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_hf(settings: ModelSettings, path: str, scalar: bool, seed: int) -> PreTrainedModel:
    """A Hugging Face model with a language-model or a scalar head, from weights or drawn with the seed."""
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = load_config(path, settings, scalar)
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if settings.quantize:
        options |= _quantized(settings)
    torch.manual_seed(seed)
    if settings.init == "random":
        model = auto.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
    else:
        model = auto.from_pretrained(path, config=config, trust_remote_code=settings.trust_remote_code, **options)
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
    if head is not None:
        head.requires_grad_(True)
    return wrapper


def tell_zero3(hf: PreTrainedModel) -> None:
    """DoRA reads weights of other modules, which ZeRO-3 has put away when those are through: tell it who else reads them."""
    from deepspeed import zero

    for layer in hf.modules():
        for adapter, reader in getattr(layer, "lora_magnitude_vector", nn.ModuleDict()).items():
            for owner in (layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]):
                for parameter in owner.parameters(recurse=False):
                    zero.register_external_parameter(reader, parameter)
