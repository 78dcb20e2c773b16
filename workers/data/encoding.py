"""Datasets to token ids. Rows that are too long are cut, dropped or refused, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from configs.schema import Overlong
from workers.data.messages import Message, Prompt, as_messages
from workers.data.rows import Answer, Row
from workers.data.samples import RaggedArray, Sample
from workers.data.sources import DataError
from workers.data.templates import Tools
from workers.data.tokenization import Codec, Exchange, Tokens
from workers.data.tokens import Counts, Preferences, Sequences

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, and their rows."""

    ids: RaggedArray
    """int32"""
    rows: list[Row]

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of each prompt."""
        return np.diff(self.ids.offsets)


def encode_prompts(codec: Codec, rows: Items[Row], max_tokens: int, overlong: Overlong) -> tuple[Prompts, Counts]:
    """Prompts of at most max_tokens. Raises DataError where one has no tokens, or is too long and `overlong` is refuse."""
    limit = _Limit(max_tokens, "max_prompt_tokens", overlong, len(rows))
    with _with_place(rows) as located:
        texts = [codec.prompt_text(row.prompt, row.tools) for row in located]
    tokens = codec.tokens_of(prompts=texts)
    kept: list[Row] = []
    encoded: list[np.ndarray] = []
    counts = Counts("prompts", len(rows))
    with _with_place(rows) as located:
        for row, text in zip(located, texts, strict=True):
            ids = codec.encode_prompt(text, codec.is_chat(row.prompt), tokens)
            if not ids:
                raise DataError("prompt: has no tokens, so an engine cannot answer it")
            counts.longest = max(counts.longest, len(ids))
            if len(ids) > max_tokens:
                shorter = limit.allows_cut(row, len(ids)) and _shortened(codec, row.prompt, row.tools, max_tokens)
                if not shorter:
                    continue
                ids = shorter[1]
                counts.cut += 1
            kept.append(row)
            encoded.append(np.array(ids, np.int32))
    limit.raise_if_refused()
    prompts = Prompts(RaggedArray.of(encoded, np.int32), kept)
    return prompts, _counted(counts, codec, kept, prompts.ids.values, learnt=0)


def encode_demonstrations(
    codec: Codec, rows: Items[Row], max_length: int, overlong: Overlong, turns: Turns
) -> tuple[Sequences, Counts]:
    """Demonstrations of at most max_length tokens. turns: which turns of the assistant are learnt.

    Raises DataError, with the row's place, where a row cannot be tokenised as it will be used, or is too long and refused.
    """
    limit = _Limit(max_length, "max_length", overlong, len(rows))
    with _with_place(rows) as located:
        exchanges = [_exchange(codec, row, turns) for row in located]
    tokens = _tokens_of(codec, [exchange for exchange in exchanges if exchange])
    kept: list[Row] = []
    encoded: list[Sample] = []
    counts = Counts("rows", len(rows))
    with _with_place(rows) as located:
        for row, exchange in zip(located, exchanges, strict=True):
            sequence = (
                Sample.of(*codec.encode(exchange, tokens)) if exchange else _all_turns(codec, row, row.prompt, tokens)
            )
            counts.longest = max(counts.longest, len(sequence.ids))
            if len(sequence.ids) > max_length:
                shorter = limit.allows_cut(row, len(sequence.ids)) and _cut(codec, row, max_length, turns)
                if not shorter:
                    continue
                sequence = shorter
                counts.cut += 1
            kept.append(row)
            encoded.append(sequence)
    limit.raise_if_refused()
    sequences = Sequences.of(encoded)
    return sequences, _counted(counts, codec, kept, sequences.ids.values, int(sequences.learnt.sum()))


def encode_preferences(
    codec: Codec, rows: Items[Row], max_length: int, overlong: Overlong
) -> tuple[Preferences, Counts]:
    """Pairs, each side at most max_length tokens. Prompts are cut equally on both sides; pairs whose sides have the same tokens
    are left out. Raises DataError as `encode_demonstrations` does."""
    limit = _Limit(max_length, "max_length", overlong, len(rows))
    with _with_place(rows) as located:
        pairs = [[codec.exchange(*side, row.tools) for side in _sides(row)] for row in located]
    tokens = _tokens_of(codec, [exchange for pair in pairs for exchange in pair])
    kept: list[Row] = []
    encoded: list[tuple[Sample, Sample]] = []
    counts = Counts("pairs", len(rows))
    with _with_place(rows) as located:
        for row, pair in zip(located, pairs, strict=True):
            sides = [codec.encode(exchange, tokens) for exchange in pair]
            longest = max(len(prompt) + len(answer) for prompt, answer in sides)
            counts.longest = max(counts.longest, longest)
            if longest > max_length:
                shorter = limit.allows_cut(row, longest) and _cut_pair(codec, row, sides, max_length)
                if not shorter:
                    continue
                sides = shorter
            chosen, rejected = (Sample.of(*side) for side in sides)
            if np.array_equal(chosen.ids, rejected.ids):
                counts.equal += 1
                continue
            counts.cut += longest > max_length
            kept.append(row)
            encoded.append((chosen, rejected))
    limit.raise_if_refused()
    chosen_rows, rejected_rows = (Sequences.of([pair[side] for pair in encoded]) for side in (0, 1))
    preferences = Preferences(chosen_rows, rejected_rows, np.array([row.margin for row in kept], np.float32))
    ids = np.concatenate([chosen_rows.ids.values, rejected_rows.ids.values])
    return preferences, _counted(counts, codec, kept, ids, learnt=len(encoded))


# ---------------------------------------------------------------- parts of the encoders


def _exchange(codec: Codec, row: Row, turns: Turns) -> Exchange | None:
    """A row's texts; None where earlier turns of its conversation are learnt too."""
    assert row.completion is not None
    learnt = row.prompt[row.given :] if turns == "all" and isinstance(row.prompt, list) else []
    if any(message["role"] == "assistant" for message in learnt):
        return None
    return codec.exchange(row.prompt, row.completion, row.tools)


def _all_turns(codec: Codec, row: Row, prompt: Prompt, tokens: Tokens) -> Sample:
    """A conversation of which all turns are learnt. prompt: the row's prompt, or its latest messages."""
    assert row.completion is not None and isinstance(prompt, list)
    given = max(0, row.given - (len(row.prompt) - len(prompt)))
    return codec.conversation(prompt, given, row.completion, row.tools, tokens)


def _sides(row: Row) -> tuple[tuple[Prompt, Answer], tuple[Prompt, Answer]]:
    assert row.chosen is not None and row.rejected is not None
    rejected_prompt = row.prompt if row.rejected_prompt is None else row.rejected_prompt
    return (row.prompt, row.chosen), (rejected_prompt, row.rejected)


def _tokens_of(codec: Codec, exchanges: Items[Exchange]) -> Tokens:
    """A function from text to ids that has already encoded the texts that most exchanges need."""
    return codec.tokens_of([each.before for each in exchanges], [each.before + each.answer for each in exchanges])


def _counted(counts: Counts, codec: Codec, kept: Items[Row], ids: np.ndarray, learnt: int) -> Counts:
    counts.kept, counts.tokens, counts.learnt = len(kept), len(ids), learnt
    counts.dropped = counts.rows - counts.kept - counts.equal
    counts.conversations = sum(codec.is_chat(row.prompt) for row in kept)
    return counts


@contextmanager
def _with_place(rows: Items[Row]) -> Iterator[Iterator[Row]]:
    """Yields an iterator over the rows; a DataError raised in the block gets the place of the current row."""
    place = ""

    def each() -> Iterator[Row]:
        nonlocal place
        for row in rows:
            place = row.place
            yield row

    try:
        yield each()
    except DataError as error:
        raise DataError(f"{place}: {error}" if place else str(error)) from error


# ---------------------------------------------------------------- too long


class _Limit:
    """Policy for rows that are longer than a limit."""

    def __init__(self, limit: int, setting: str, overlong: Overlong, rows: int) -> None:
        self.limit, self.setting, self.overlong, self.rows = limit, setting, overlong, rows
        self.refused: list[tuple[int, str]] = []

    def allows_cut(self, row: Row, length: int) -> bool:
        """Whether to cut a row that is too long. Records the row where such rows are refused."""
        if self.overlong == "refuse":
            self.refused.append((length, row.place or "a row"))
        return self.overlong == "cut"

    def raise_if_refused(self) -> None:
        if self.refused:
            length, place = max(self.refused)
            raise DataError(
                f"{len(self.refused)} of {self.rows} rows are longer than {self.limit} tokens ({self.setting}), the longest has "
                f"{length} ({place}); `overlong: cut` or `drop` would fit"
            )


def _cut(codec: Codec, row: Row, max_length: int, turns: Turns) -> Sample | None:
    """A demonstration cut to max_length: first its oldest turns, then its prompt, then its answer."""
    assert row.completion is not None
    prompt = row.prompt
    if isinstance(prompt, list) and turns == "all":
        while shorter := _without_oldest(prompt):
            prompt = shorter
            sequence = _all_turns(codec, row, prompt, codec.tokens_of())
            if len(sequence.ids) <= max_length:
                return sequence
    _, answer = codec.encode(codec.exchange(prompt, row.completion, row.tools), codec.tokens_of())
    shorter_prompt = _shortened(codec, prompt, row.tools, max(max_length - len(answer), max_length // 2))
    if shorter_prompt is None:
        return None
    _, ids = shorter_prompt
    return Sample.of(ids, answer[: max_length - len(ids)])


def _cut_pair(
    codec: Codec, row: Row, sides: list[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[list[int], list[int]]] | None:
    """Both sides cut to max_length. Equal prompts are cut equally, so that lengths do not show which side is better."""
    prompt_limit = max(max_length - max(len(answer) for _, answer in sides), max_length // 2)
    prompts = [_shortened(codec, prompt, row.tools, prompt_limit) for prompt, _ in _sides(row)]
    if None in prompts:
        return None
    return [
        (prompt, answer[: max_length - len(prompt)])
        for (_, prompt), (_, answer) in zip(filter(None, prompts), sides, strict=True)
    ]


def _shortened(codec: Codec, prompt: Prompt, tools: Tools, limit: int) -> tuple[Prompt, list[int]] | None:
    """A prompt cut to `limit` tokens, and its ids. Text is cut on the left; a conversation loses its oldest turns, then the
    beginning of its longest message. None where the template alone is longer."""
    ids = codec.prompt_ids(prompt, tools)
    if not codec.is_chat(prompt):
        kept = min(len(ids), limit) - len(codec.bos)
        return prompt, codec.bos + ids[len(ids) - kept :] if kept > 0 else codec.bos[:limit]
    messages = as_messages(prompt)
    while len(ids) > limit:
        shorter = _without_oldest(messages)
        if shorter is None:
            return _with_less_text(codec, messages, tools, limit)
        messages, ids = shorter, codec.prompt_ids(shorter, tools)
    return messages, ids


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """A conversation without its oldest exchange, but with its system messages; None where it has only one exchange."""
    start = next((k for k, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    later = [k for k, message in enumerate(messages) if message["role"] == "user" and k > start]
    return messages[:start] + messages[later[0] :] if later else None


def _with_less_text(
    codec: Codec, messages: list[Message], tools: Tools, limit: int
) -> tuple[list[Message], list[int]] | None:
    """The messages, with the longest one (no system message) cut on the left as far as needed."""
    at = max(
        (k for k, message in enumerate(messages) if message["role"] not in ("system", "developer")),
        key=lambda k: len(messages[k]["content"]),
        default=0,
    )
    text = messages[at]["content"]

    def ending(characters: int) -> list[Message]:
        return [*messages[:at], {**messages[at], "content": text[len(text) - characters :]}, *messages[at + 1 :]]

    fits, too_long = 0, len(text)
    if len(codec.prompt_ids(ending(fits), tools)) > limit:
        return None
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if len(codec.prompt_ids(ending(middle), tools)) <= limit else (fits, middle)
    return ending(fits), codec.prompt_ids(ending(fits), tools)
