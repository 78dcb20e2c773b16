"""Text to token ids and back: the same for training, engines, reward models and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.schema import ModelSettings, RunConfig
from workers.data.messages import Message, Prompt, as_messages
from workers.data.rows import Answer
from workers.data.samples import Sample
from workers.data.sources import DataError
from workers.data.templates import ChatTemplate, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Callable[[str], list[int]]
"""Text -> token ids."""

_CACHED_PROMPTS = 100_000
"""Number of prompts whose text and ids are cached for the next dataset."""
_ANCHORS = ("\n", "a", "1", ":")
"""Prefixes for a text whose tokens on their own would begin with a space (SentencePiece)."""


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Raises ValueError where there is none: transformers may then return one without tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{path}: no tokenizer here, or one that gives no tokens for a text")
    return tokenizer


def end_tokens(path: str, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> list[int]:
    """Ids of the tokens that end an answer of a model, given by folder or hub name.

    Those of the setting `end_tokens`; else the tokenizer's eos token and those of the model's generation config.
    Raises DataError where a name is not a token, or there is no end token.
    """
    if settings.end_tokens:
        return [_single_token(tokenizer, name) for name in settings.end_tokens]
    ids = list(dict.fromkeys(_as_list(tokenizer.eos_token_id) + _generation_ends(path, settings.trust_remote_code)))
    if not ids:
        raise DataError(f"{path}: neither tokenizer nor generation config has an eos token; name one: model.end_tokens")
    return ids


def _single_token(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) == tokenizer.unk_token != name:
        raise DataError(f"model.end_tokens: {name!r} is not a token of {tokenizer.name_or_path}")
    return int(ids[0])


def _generation_ends(path: str, trust_remote_code: bool) -> list[int]:
    from transformers import AutoConfig, GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # the model has none
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    return _as_list(generation.eos_token_id)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Exchange(NamedTuple):
    """A prompt and its answer, as texts."""

    before: str
    answer: str
    chat: bool
    """Whether the chat template wrote them."""


class Codec:
    """Text to token ids and back.

    A sequence is exactly the ids that an engine gets as its prompt, then the ids of the answer, cut after its first end token.

    Plain text: a prompt begins with the bos token where the tokenizer adds one, so an empty prompt may have no ids; an end token
    follows the answer. Chat template (always for messages, with `chat_template` for text too): the prompt ends with the
    template's generation prompt, and the answer is the text that the template writes after it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: bool = False,
        ends: Items[int] = (),
        template: ChatTemplate | None = None,
    ) -> None:
        """ends: ids of the end tokens; empty: the tokenizer's eos token. template: None: the tokenizer's, without settings.

        Raises DataError where there is no end token.
        """
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template = template or ChatTemplate(tokenizer)
        self.ends = list(ends) or _as_list(tokenizer.eos_token_id)
        if not self.ends:
            raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no eos token; name one: model.end_tokens")
        eos = tokenizer.eos_token_id
        self.end = int(eos) if eos in self.ends else self.ends[0]
        """The end token of answers in plain text."""
        self._prompt_texts: dict[Any, str] = {}
        self._prompt_ids: dict[str, list[int]] = {}
        """Ids of prompts' texts: the datasets of several stages contain the same prompts."""
        with_special, plain = tokenizer("a")["input_ids"], self._tokens("a")
        self.bos: list[int] = with_special[:1] if with_special[0] not in plain else []

    @classmethod
    def load(cls, path: str, config: RunConfig, settings: ModelSettings, started: datetime | None = None) -> Codec:
        """The codec of a model, given by folder or hub name, under a run's settings.

        started: start of the run. Raises DataError, ValueError, OSError.
        """
        tokenizer = load_tokenizer(path, settings.trust_remote_code)
        template = ChatTemplate(tokenizer, config.system_prompt, config.chat_template_args, started)
        return cls(tokenizer, config.chat_template, end_tokens(path, tokenizer, settings), template)

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether a prompt goes through the chat template."""
        return self.chat_template or not isinstance(prompt, str)

    # ------------------------------------------------------------ texts

    def prompt_text(self, prompt: Prompt, tools: Tools = None) -> str:
        """The text of a prompt that is tokenised, without the bos token."""
        if not self.is_chat(prompt):
            assert isinstance(prompt, str)
            return prompt
        messages = as_messages(prompt)
        key = None if tools else tuple(value for message in messages for item in message.items() for value in item)
        if key in self._prompt_texts:
            return self._prompt_texts[key]
        text = self.template.prompt(self.template.conversation(messages), tools)
        if key and len(self._prompt_texts) < _CACHED_PROMPTS and all(isinstance(part, str) for part in key):
            self._prompt_texts[key] = text
        return text

    def exchange(self, prompt: Prompt, answer: Answer, tools: Tools = None) -> Exchange:
        """The texts of a prompt and its answer. Raises DataError where the template drops part of the answer."""
        before, chat = self.prompt_text(prompt, tools), self.is_chat(prompt)
        if chat:
            messages = self.template.conversation(as_messages(prompt))
            return Exchange(before, self.template.answer(messages, before, answer, tools), chat)
        if not isinstance(answer, str):
            raise DataError("the answer has tool calls or reasoning; its prompt must then be messages")
        return Exchange(before, answer, chat)

    def decode(self, ids: npt.ArrayLike, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens)

    def answer_text(self, ids: npt.ArrayLike) -> str:
        """Text of an answer without the end and pad tokens at its end; other special tokens, such as <think>, stay."""
        tokens = np.asarray(ids).tolist()
        while tokens and (tokens[-1] in self.ends or tokens[-1] == self.tokenizer.pad_token_id):
            tokens.pop()
        return self.decode(tokens, skip_special_tokens=False)

    # ------------------------------------------------------------ tokens

    def prompt_ids(self, prompt: Prompt, tools: Tools = None) -> list[int]:
        """Token ids of a prompt, as an engine gets them."""
        return self.encode_prompt(self.prompt_text(prompt, tools), self.is_chat(prompt), self._tokens)

    def sequence(self, prompt: Prompt, answer: Answer, tools: Tools = None) -> Sample:
        """Token ids of a prompt and of its answer, which is learnt or scored."""
        return Sample.of(*self.encode(self.exchange(prompt, answer, tools), self._tokens))

    def encode_prompt(self, text: str, chat: bool, tokens: Tokens) -> list[int]:
        return tokens(text) if chat else self.bos + tokens(text)

    def encode(self, exchange: Exchange, tokens: Tokens) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of its answer up to and including the first end token. tokens: text to ids."""
        start = tokens(exchange.before)
        ids = self._continued(start, exchange.before, exchange.answer, tokens)
        if exchange.chat:
            return start, self._to_end(ids)
        return self.bos + start, self._to_end([*ids, self.end])

    def conversation(self, messages: list[Message], given: int, answer: Answer, tools: Tools, tokens: Tokens) -> Sample:
        """Token ids of a conversation and its last answer. All turns of the assistant after the first `given` messages are
        learnt, each up to and including its first end token.

        Raises DataError where the template changes earlier turns once others follow.
        """
        whole = self.template.conversation(messages)
        given += len(whole) - len(messages)
        learnt = [k for k, message in enumerate(whole) if message["role"] == "assistant" and k >= given]
        texts = self.template.turns(whole, learnt, tools)
        ids, mask = tokens(texts[0]), list[bool]()
        first = len(ids)
        for text, following in pairwise(texts):
            rest = self._continued(ids, text, following[len(text) :], tokens)
            count = len(self._to_end(rest))
            mask += [True] * count + [False] * (len(rest) - count)
            ids = ids + rest
        last = self.template.answer(whole, texts[-1], answer, tools)
        end = self._to_end(self._continued(ids, texts[-1], last, tokens))
        mask = [False] * first + mask + [True] * len(end)
        return Sample(np.array(ids + end, np.int32), np.array(mask, np.bool_))

    def _to_end(self, ids: list[int]) -> list[int]:
        for k, token in enumerate(ids):
            if token in self.ends:
                return ids[: k + 1]
        names = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(token)) for token in self.ends)
        raise DataError(
            f"{self.template.source}: the chat template does not end an answer with an end token ({names}), but with "
            f"{self.decode(ids[-8:], skip_special_tokens=False)!r}; name its end token: model.end_tokens"
        )

    def _continued(self, before: list[int], text_before: str, text: str, tokens: Tokens) -> list[int]:
        """Tokens of `text` after the tokens `before` of `text_before`: those of the joint text, where it begins with `before`;
        else tokens of `text` on its own, with which the whole decodes to the joint text."""
        whole = tokens(text_before + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        wanted = self.decode(whole, skip_special_tokens=False)
        for ids in self._candidates(text):
            if self.decode(before + ids, skip_special_tokens=False) == wanted:
                return ids
        raise DataError(
            f"{self.template.source}: no tokens of {text[:40]!r} can follow those of {text_before[-40:]!r}: the border "
            "between prompt and answer lies within a token; move it"
        )

    def _candidates(self, text: str) -> Iterator[list[int]]:
        """Candidates for the tokens of a text within a longer text."""
        yield self._tokens(text)
        for anchor in _ANCHORS:
            first, both = self._tokens(anchor), self._tokens(anchor + text)
            if both[: len(first)] == first:
                yield both[len(first) :]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokens_of(self, prompts: Iterable[str] = (), others: Iterable[str] = ()) -> Tokens:
        """A function from text to ids that has already encoded these texts, in one fast batch. prompts: texts that are cached
        for later calls."""
        if len(self._prompt_ids) < _CACHED_PROMPTS:
            self._prompt_ids |= self._encoded(text for text in prompts if text not in self._prompt_ids)
        encoded = self._encoded(text for text in (*prompts, *others) if text not in self._prompt_ids)

        def tokens(text: str) -> list[int]:
            ids = self._prompt_ids.get(text) or encoded.get(text)
            return self._tokens(text) if ids is None else ids

        return tokens

    def _encoded(self, texts: Iterable[str]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        ids = self.tokenizer(unique, add_special_tokens=False)["input_ids"] if unique else []
        return dict(zip(unique, ids, strict=True))
