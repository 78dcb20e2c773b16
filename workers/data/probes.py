"""Compares the tokens of two models on a few conversations."""

from __future__ import annotations

from typing import Literal

from workers.data.messages import Message, Prompt
from workers.data.sources import DataError
from workers.data.tokenization import Codec

Form = Literal["text", "chat"]

_SYSTEM: Message = {"role": "system", "content": "Answer in one word."}
_USER: Message = {"role": "user", "content": "How was the film?"}
_ASSISTANT: Message = {"role": "assistant", "content": "Great."}
_PROBES: dict[Form, list[Prompt]] = {
    "text": ["How was the film?"],
    "chat": [[_USER], [_SYSTEM, _USER], [_USER, _ASSISTANT, _USER]],
}


def difference(policy: Codec, other: Codec, form: Form) -> str | None:
    """The first difference between two codecs, with both texts; None where they give the same tokens.

    form: whether conversations go through chat templates. A conversation that both templates refuse is no difference.
    """
    if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        return f"another vocabulary ({len(other.tokenizer)} tokens; the policy has {len(policy.tokenizer)})"
    if set(policy.ends) != set(other.ends):
        ours, theirs = (_names(codec) for codec in (policy, other))
        return f"other end tokens ({theirs}; the policy has {ours}); set model.end_tokens for both"
    for prompt in _PROBES[form]:
        ours, theirs = _read(policy, prompt), _read(other, prompt)
        if ours != theirs:
            return f"another form of a conversation: {theirs!r}; the policy has {ours!r}"
    return None


def _names(codec: Codec) -> str:
    return ", ".join(str(codec.tokenizer.convert_ids_to_tokens(token)) for token in codec.ends)


def _read(codec: Codec, prompt: Prompt) -> str:
    """The tokens of a prompt with an answer as text, special tokens included; or the text of the refusal."""
    try:
        return codec.decode(codec.sequence(prompt, "Great.").ids, skip_special_tokens=False)
    except DataError as error:
        return str(error).partition(": ")[2]
