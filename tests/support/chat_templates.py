"""Tokenizers with chat templates like those of well-known models: they write, refuse, drop and prefill the same parts.

One token per byte, so that tokens are readable; each special token of a family is a single token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A family's special tokens, and its chat template."""

    template: str
    eos: str
    ends: tuple[str, ...] = ()
    """End tokens that generation_config.json names."""
    bos: str | None = None
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    """Added tokens that are not special."""


HEADERS = """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}{"name": "{{ call.name }}", "parameters": {{
call.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

CHATML = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

THINKING = """\
{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}
{%- endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}
{%- set thought = m.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}
{%- if loop.index0 > ns.asked %}<think>
{{ thought | trim }}
</think>

{% endif %}{{ parts[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TURNS = """\
{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate, and there is no system role') }}{% endif %}<start_of_turn>
{{- 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

BRACKETS = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""

PREFILLED = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}
{%- elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""

FAMILIES = {
    "llama3": Family(
        HEADERS, "<|end_of_text|>", ("<|eot_id|>",), "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>")
    ),
    "qwen2.5": Family(CHATML, "<|im_end|>", ("<|endoftext|>",), None, ("<|im_start|>",), ("<tool_call>", "</tool_call>")),
    "qwen3": Family(THINKING, "<|im_end|>", ("<|endoftext|>",), None, ("<|im_start|>",), ("<think>", "</think>")),
    "gemma": Family(TURNS, "<eos>", ("<end_of_turn>",), "<bos>", ("<start_of_turn>",)),
    "mistral": Family(BRACKETS, "</s>", (), "<s>", ("[INST]", "[/INST]")),
    "r1": Family(PREFILLED, "<eos>", (), "<bos>", ("<|User|>", "<|Assistant|>"), ("<think>", "</think>")),
}  # fmt: skip


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with one token per byte."""
    family = FAMILIES[name]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([token for token in (family.bos, family.eos, *family.ends, *family.special) if token])
    bpe.add_tokens(list(family.added))
    if family.bos:
        single = [(family.bos, bpe.token_to_id(family.bos))]
        bpe.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=single)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: spaces are parts of words, and a text on its own begins with one."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(pieces)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=276, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(["the film is good", "the plot is dull", "a film of films: good, or bad?"] * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def save(name: str, folder: Path) -> Path:
    """Write a family's tokenizer to a folder, with a generation config that names its end tokens."""
    from transformers import GenerationConfig

    tokenizer, family = make_tokenizer(name), FAMILIES[name]
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([family.eos, *family.ends])
    GenerationConfig(eos_token_id=ids).save_pretrained(folder)
    return folder
