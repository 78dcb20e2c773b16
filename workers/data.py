"""Data: rows read and checked, text to token ids, and the order in which rows are trained on.

Nothing here needs torch: the driver checks all data with it before anything starts.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from configs.schema import DatasetSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RowKind = Literal["demonstration", "preference", "prompt"]
Message = dict[str, str]
"""role and content."""
Prompt = str | list[Message]

_OURS = ("prompt", "completion", "messages", "chosen", "rejected", "margin")
_READ: Mapping[RowKind, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion", "messages"),
    "preference": ("prompt", "chosen", "rejected", "margin"),
    "prompt": ("prompt", "messages"),
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FAULTS_SHOWN = 5
_ALIKE, _MISTYPED = 0.6, 0.8
"""How like one of our names another is that was meant to be it; of prompts, whose other columns may have any name, it must be
more alike."""
_WINDOW = 16
"""Batches within which rows are sorted by length."""


class DataError(ValueError):
    """A dataset that cannot be used: says where, and what it may be."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset, whatever form it had there."""

    prompt: Prompt
    """Text, or the messages before the answer."""
    completion: str | None = None
    """A demonstration's answer."""
    chosen: str | None = None
    """A preference's better answer."""
    rejected: str | None = None
    """The worse one."""
    rejected_prompt: Prompt | None = None
    """What `rejected` answers: as a rule `prompt`, but conversations may be compared that began differently."""
    margin: float = 0.0
    """By how much `chosen` is better; 0 where the dataset does not say."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset's other columns, for reward functions."""


# ---------------------------------------------------------------- rows


def read_rows(data: DatasetSettings, kind: RowKind) -> list[Row]:
    """All rows of a .jsonl or .parquet file, a folder of datasets.save_to_disk or a hub dataset, up to data.limit.

    demonstration: `prompt` and `completion`, or `messages` that end with the assistant's.
    preference: `chosen` and `rejected`, each an answer beside a `prompt` or a whole conversation; optionally `margin`.
    prompt: `prompt`, or `messages`, of which a last answer is dropped.
    A prompt is text or a list of messages; an answer is text or a list with one message of the assistant.

    Raises:
        DataError: names the first malformed rows (by line, or by row counted from 1) and says how many there are.
    """
    for name in data.columns:
        close = difflib.get_close_matches(name, _OURS, n=1, cutoff=_MISTYPED if kind == "prompt" else _ALIKE)
        if name not in _OURS and (close or kind != "prompt"):
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_OURS)}"
            raise DataError(f"{data.path}: columns.{name}: no such column of ours; {hint}")
    rows: list[Row] = []
    faults: list[str] = []
    for place, record in islice(_records(data), data.limit):
        try:
            rows.append(_row(record, data.columns, kind))
        except DataError as error:
            faults.append(f"{place}: {error}")
    if faults:
        total = f"{data.path}: {len(faults)} of {len(faults) + len(rows)} rows cannot be read as a {kind}"
        raise DataError("\n".join([*faults[:_FAULTS_SHOWN], total]))
    if not rows:
        raise DataError(f"{data.path}: has no rows")
    for name, theirs in data.columns.items():
        if name not in _OURS and not any(name in row.columns for row in rows):
            raise DataError(f"{data.path}: columns.{name}: no row has the column {theirs}")
    return rows


def _row(record: Any, columns: Mapping[str, str], kind: RowKind) -> Row:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"must be a mapping of columns, was {_brief(record)}")
    for ours, theirs in columns.items():
        if theirs not in record and ours in _READ[kind]:
            raise DataError(f"no column {theirs} (for {ours}); there are {', '.join(record)}")
    sources = {ours: columns.get(ours, ours) for ours in _READ[kind]}
    found = {ours: record[theirs] for ours, theirs in sources.items() if record.get(theirs) is not None}
    rest = _other_columns({name: value for name, value in record.items() if name not in sources.values()}, columns)
    prompt = _prompt(found["prompt"], "prompt") if "prompt" in found else None
    if kind == "demonstration":
        return _demonstration(found, prompt, rest, record)
    if kind == "preference":
        return _preference(found, prompt, rest, record)
    if prompt is None:
        _require(found, ["messages"], "prompt or messages", record)
        prompt = _messages(found["messages"], "messages")
        prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    if not prompt:
        raise DataError("prompt: is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError("prompt: ends with a message of the assistant, so there is nothing to answer")
    return Row(prompt, columns=rest)


def _other_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """What is none of our columns, under the names that the settings give it."""
    found = dict(record)
    for name, theirs in columns.items():
        if name not in _OURS and theirs in found:
            if name in found:
                raise DataError(f"columns.{name}: there is a column {name} already, beside {theirs}")
            found[name] = found.pop(theirs)
    return found


def _demonstration(found: dict[str, Any], prompt: Prompt | None, rest: dict[str, Any], record: dict[str, Any]) -> Row:
    needed = "prompt and completion, or messages"
    if "completion" in found:
        _require(found, ["prompt"], needed, record)
        asked, answer = _exchange(prompt, found["completion"], "completion")
    else:
        _require(found, ["messages"], needed, record)
        asked, answer = _exchange(None, _messages(found["messages"], "messages"), "messages")
    if not answer:
        raise DataError("the answer is empty, so there is nothing to learn")
    return Row(asked, completion=answer, columns=rest)


def _preference(found: dict[str, Any], prompt: Prompt | None, rest: dict[str, Any], record: dict[str, Any]) -> Row:
    _require(found, ["chosen", "rejected"], "chosen and rejected", record)
    asked, chosen = _exchange(prompt, found["chosen"], "chosen")
    rejected_asked, rejected = _exchange(prompt, found["rejected"], "rejected")
    if isinstance(asked, str) != isinstance(rejected_asked, str):
        raise DataError("chosen and rejected: one is text, the other messages")
    margin = _margin(found.get("margin", 0.0))
    return Row(asked, chosen=chosen, rejected=rejected, rejected_prompt=rejected_asked, margin=margin, columns=rest)


def _margin(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond all floats
            if math.isfinite(margin := float(value)):
                return margin
    raise DataError(f"margin: must be a finite number, was {_brief(value)}")


def _require(found: Mapping[str, Any], names: list[str], needed: str, record: Mapping[str, Any]) -> None:
    for name in names:
        if name not in found:
            raise DataError(f"{name}: missing; needs {needed}; its columns are {', '.join(record) or 'none'}")


def _exchange(prompt: Prompt | None, answer: Any, name: str) -> tuple[Prompt, str]:
    """(prompt, answer's text) from an answer or a whole conversation."""
    if isinstance(answer, str):
        if prompt is None:
            raise DataError(f"prompt: missing; text in {name} needs one beside it")
        return prompt, answer
    *asked, last = _messages(answer, name)
    if last["role"] != "assistant":
        raise DataError(f"{name}: the last message must be the assistant's, was the {last['role']}'s")
    if prompt is None and not asked:
        raise DataError(f"{name}: has no message before the assistant's")
    if prompt is not None and not asked:
        return _as_messages(prompt), last["content"]
    if isinstance(prompt, list) and asked != prompt:
        raise DataError(f"{name}: does not begin with the messages of prompt")
    if isinstance(prompt, str) and prompt not in [message["content"] for message in asked]:
        raise DataError(f"{name}: none of its messages is the prompt")
    return asked, last["content"]


def _prompt(value: Any, name: str) -> Prompt:
    return value if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name}: must be text or a list of messages, was {_brief(value)}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{name}.{index}: must have role and content, was {_brief(message)}")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise DataError(f"{name}.{index}.role: must be {', '.join(_ROLES)}, was {_brief(role)}")
        if not isinstance(content, str):
            raise DataError(f"{name}.{index}.content: must be text, was {_brief(content)}")
        messages.append({"role": role, "content": content})
    return messages


def _as_messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ---------------------------------------------------------------- sources


def _records(data: DatasetSettings) -> Iterator[tuple[str, Any]]:
    """(where it stands, record or DataError) of each row."""
    path = Path(data.path)
    if path.is_dir():
        return _dataset(data, _load_folder(path))
    if path.is_file():
        if data.split is not None:
            raise DataError(f"{path}: split {data.split}: a file has no splits; leave it out")
        if path.suffix == ".jsonl":
            return _jsonl(path)
        if path.suffix == ".parquet":
            return _parquet(path)
        raise DataError(f"{path}: must be a .jsonl or .parquet file, a folder of datasets.save_to_disk or a hub name")
    if path.suffix in (".jsonl", ".parquet") or path.is_absolute() or data.path[0] == "." or len(path.parts) > 2:
        raise DataError(f"{data.path}: no such file or folder")
    return _dataset(data, _load_hub(data))


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:  # bytes: only there is a line just what ends with \n
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield f"{path}:{number}", _from_json(line)


def _from_json(line: bytes) -> Any:
    """A line's value; DataError where it has none."""
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip())
        if rb"\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, though JSON can write it
        return value
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: {error.reason} at byte {error.start + 1}")
    except UnicodeEncodeError as error:
        return DataError(f"not text: half a surrogate pair, {error.object[error.start]!a}")
    except RecursionError:
        return DataError("not JSON: nested too deeply")
    except ValueError as error:
        return DataError(f"not JSON: {error}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        records = (record for batch in table.iter_batches() for record in batch.to_pylist())
        for number, record in enumerate(records, start=1):
            yield f"{path}: row {number}", record
    except Exception as error:  # of damaged bytes the library makes errors of many types
        raise DataError(f"{path}: cannot be read as Parquet: {_reason(error)}") from error


def _load_folder(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: a folder that datasets.save_to_disk did not write") from None
    except Exception as error:  # of damaged bytes the library makes errors of many types
        raise DataError(f"{path}: a damaged dataset: {_reason(error)}") from error


def _load_hub(data: DatasetSettings) -> Any:
    import datasets

    try:
        return datasets.load_dataset(data.path, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{data.path}: no file or folder here, and not to be had from the hub: {_reason(error)}"
        ) from error


def _dataset(data: DatasetSettings, loaded: Any) -> Iterator[tuple[str, Any]]:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        names = ", ".join(loaded)
        if data.split is None and len(loaded) != 1:
            raise DataError(f"{data.path}: split: missing; there are {names}")
        if data.split is not None and data.split not in loaded:
            raise DataError(f"{data.path}: split {data.split}: no such split; there are {names}")
        loaded = loaded[data.split] if data.split else next(iter(loaded.values()))
    elif data.split is not None and Path(data.path).is_dir():
        raise DataError(f"{data.path}: split {data.split}: this folder holds a single dataset; leave it out")
    where = f"{data.path} {data.split}" if data.split else data.path
    try:
        for number, record in enumerate(loaded, start=1):
            yield f"{where}: row {number}", record
    except Exception as error:  # as above
        raise DataError(f"{where}: a damaged dataset: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True, eq=False, slots=True)
class Sequence:
    """A prompt with its completion."""

    ids: npt.NDArray[np.int32]
    """[length] the prompt's and the completion's tokens, end of sequence included unless it was cut off."""
    prompt_length: int


class Codec:
    """Text to token ids and back, the same for training and for the engines.

    Prompt and completion are tokenised apart, so that a sequence begins with exactly the ids that an engine gets.
    Plain text: a prompt begins with the bos token where the tokenizer adds one; an empty prompt may thus have no ids at
    all. A completion ends with the tokenizer's eos token, and at the first one that stands in its text.
    Chat template (always for messages; with chat_template=True for text too): the prompt ends with the template's
    generation prompt, and a completion is what the template writes after it, up to and with the first eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        if tokenizer.eos_token_id is None:
            raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no eos token")
        self.eos: int = tokenizer.eos_token_id
        with_special, plain = tokenizer("a")["input_ids"], self._tokens("a")
        self._bos: list[int] = with_special[:1] if with_special[0] not in plain else []

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as an engine gets them."""
        if self._is_chat(prompt):
            return self._tokens(self._render(_as_messages(prompt), answer=None))
        assert isinstance(prompt, str)
        return self._bos + self._tokens(prompt)

    def sequence(self, prompt: Prompt, completion: str, max_length: int) -> Sequence:
        """Token ids of both, at most max_length of them.

        What is too long is cut: first the prompt, on the left, down to half of max_length; then the completion, on the
        right, which so loses its eos token. At least one token of the completion stays.
        """
        start = self.prompt_ids(prompt)
        end = (
            self._answer_ids(_as_messages(prompt), completion) if self._is_chat(prompt) else self._text_ids(completion)
        )
        kept = min(len(start), max(max_length - len(end), max_length // 2))
        start, end = start[len(start) - kept :], end[: max_length - kept]
        return Sequence(np.array(start + end, dtype=np.int32), kept)

    def answer_text(self, ids: npt.ArrayLike) -> str:
        """Text of an answer's tokens, as rewards and people get it: without end and pad tokens. Other special tokens stay:
        `<think>` is one in some models."""
        left_out = {self.eos, self.tokenizer.pad_token_id}
        return self.decode([i for i in np.asarray(ids).tolist() if i not in left_out], skip_special_tokens=False)

    def decode(self, ids: npt.ArrayLike, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens)

    def _is_chat(self, prompt: Prompt) -> bool:
        return self.chat_template or not isinstance(prompt, str)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text_ids(self, completion: str) -> list[int]:
        return self._to_eos([*self._tokens(completion), self.eos])

    def _answer_ids(self, messages: list[Message], completion: str) -> list[int]:
        before = self._render(messages, answer=None)
        whole = self._render(messages, answer=completion)
        if not whole.startswith(before):
            raise DataError(
                f"{self.tokenizer.name_or_path}: the chat template writes an answer otherwise than after its own "
                f"generation prompt {before[-40:]!r}, so it cannot be trained on"
            )
        ids = self._tokens(whole[len(before) :])
        if self.eos not in ids:
            raise DataError(
                f"{self.tokenizer.name_or_path}: the chat template does not end an answer with the eos token "
                f"{self.tokenizer.eos_token!r}, but with {whole[-20:]!r}"
            )
        return self._to_eos(ids)

    def _to_eos(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos) + 1]

    def _render(self, messages: list[Message], answer: str | None) -> str:
        """The template's text of the messages, up to where an answer begins or with it."""
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.tokenizer.name_or_path}: the tokenizer has no chat template, which messages need")
        if answer is not None:
            messages = [*messages, {"role": "assistant", "content": answer}]
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)
        except TemplateError as error:
            raise DataError(f"{self.tokenizer.name_or_path}: the chat template refuses messages: {error}") from error


# ---------------------------------------------------------------- order


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """[n] the rows in the order of an epoch: a permutation, the same on every machine."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(lengths: npt.ArrayLike, batch_size: int, epochs: float, seed: int) -> list[npt.NDArray[np.int64]]:
    """The rows of each optimizer step, [batch_size] each; ceil(epochs * N / batch_size) steps, at least one.

    The steps end to end run through epoch after epoch, each with every row once, in a random order. Where an epoch ends
    within a batch, the next epoch's first rows fill it, after the last epoch too: no row is dropped, and a few are
    seen once more. Rows of like length go together, as far as 16 batches of the epoch's order allow; batches come in a
    random order. More epochs continue fewer: the first steps stay the same.

    lengths: [N] tokens of each row.
    """
    lengths = np.asarray(lengths)
    n = len(lengths)
    steps = max(1, math.ceil(epochs * n / batch_size - 1e-9))
    stream = np.concatenate([
        _sorted_within(epoch_order(n, seed, epoch), lengths, -epoch * n % batch_size, batch_size, (seed, epoch, 1))
        for epoch in range(math.ceil(steps * batch_size / n))
    ])  # fmt: skip
    return list(stream[: steps * batch_size].reshape(steps, batch_size))


def _sorted_within(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[Any], start: int, batch_size: int, seed: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """An epoch's order whose whole batches, the first at `start`, hold rows of like length."""
    count = max(0, len(order) - start) // batch_size
    whole = order[start : start + count * batch_size]
    for window in np.split(whole, range(_WINDOW * batch_size, len(whole), _WINDOW * batch_size)):
        window[:] = window[np.argsort(lengths[window], kind="stable")]
    whole[:] = whole.reshape(count, batch_size)[np.random.default_rng(seed).permutation(count)].ravel()
    return order
