"""Tiny random models of real architectures, as Hugging Face folders: 2 layers, width 64, heads of 32, 120 tokens (not 128, which
vLLM would not have to pad)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from workers.data import Codec, Row, RowKind, encode_demonstrations, encode_preferences, encode_prompts

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "opt", "bloom")
GROUPED = ("llama", "qwen2", "qwen3")
"""Architectures that can share key-value heads between query heads."""

VOCABULARY, LAYERS, WIDTH, HEADS, POSITIONS = 120, 2, 64, 2, 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable ASCII character; <pad> is 0, <eos> is 1. Decoding gives the text back. It has a chat template."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # some model types require it
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    tokens = ["<pad>", "<eos>", "<unk>", *byte_level.pre_tokenize_str(characters)[0][0]]
    tokens += [f"<{i}>" for i in range(len(tokens), VOCABULARY)]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    bpe.pre_tokenizer = byte_level
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encoded(rows: Sequence[Row], kind: RowKind, max_length: int = 64) -> Any:
    """Rows tokenised with `make_tokenizer`: Sequences, Preferences, or the ids of prompts."""
    codec = Codec(make_tokenizer())
    if kind == "demonstration":
        return encode_demonstrations(codec, rows, max_length, "cut", "last")[0]
    if kind == "preference":
        return encode_preferences(codec, rows, max_length, "cut")[0]
    return encode_prompts(codec, rows, max_length, "refuse")[0].ids


def _settings(architecture: str, grouped: bool) -> dict[str, Any]:
    """The shape under the architecture's own setting names."""
    if architecture == "gpt2":
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS} | dropout
    if architecture == "bloom":
        return {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    common = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }
    if architecture == "opt":
        return common | {"ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH, "dropout": 0.0}
    return common | {
        "intermediate_size": 2 * WIDTH,
        "num_key_value_heads": 1 if grouped else HEADS,
        "head_dim": WIDTH // HEADS,
    }


def make_model(
    folder: str | Path,
    architecture: str = "llama",
    tied: bool = True,
    grouped: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a random model (float32) and its tokenizer to a folder; returns the folder.

    No parameter has a value that would hide a fault: biases are not 0, norms are not 1, and the next token is far from
    evenly distributed. settings: further settings of the model's config, which override ours.
    """
    if grouped and architecture not in GROUPED:
        raise ValueError(f"{architecture} has no grouped key-value heads")
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "initializer_range": 0.15} | ids
    config = CONFIG_MAPPING[architecture](**common | _settings(architecture, grouped) | settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_reward_model(policy: Path, folder: Path) -> Path:
    """Write a random scalar model of a policy's architecture, with scores that are to be normalised; returns the folder."""
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.config.score_mean, model.config.score_std = 0.1, 2.0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
