"""Rows of datasets in their various forms: demonstrations, preferences, prompts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from configs.schema import DatasetSettings
from workers.data.messages import Message, Prompt, as_messages, brief, hh_dialogue, read_messages, read_tools
from workers.data.sources import DataError, records

RowKind = Literal["demonstration", "preference", "prompt"]
Answer = str | Message
"""An answer's text, or its message where it has tool calls or reasoning."""

_READ: Mapping[RowKind, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion", "messages", "input", "tools"),
    "preference": ("prompt", "chosen", "rejected", "margin", "input", "tools"),
    "prompt": ("prompt", "messages", "input", "tools"),
}
OURS = tuple(dict.fromkeys(name for names in _READ.values() for name in names))
_FAULTS_SHOWN = 5
_ALIKE, _MISTYPED = 0.6, 0.8
"""Similarity from which a name counts as a misspelling of one of ours. It is higher for prompts, whose other columns may have any
name."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset."""

    prompt: Prompt
    """Text, or the messages before the answer."""
    completion: Answer | None = None
    """A demonstration's last answer."""
    chosen: Answer | None = None
    """A preference's better answer."""
    rejected: Answer | None = None
    """The worse one."""
    rejected_prompt: Prompt | None = None
    """The prompt of `rejected`: normally `prompt`, but two different conversations may be compared."""
    margin: float = 0.0
    """By how much `chosen` is better; 0 where the dataset has no margin."""
    tools: list[Any] | None = None
    """Functions that the assistant may call, as JSON schemas."""
    given: int = 0
    """Number of first messages of the prompt that are never learnt, even where all turns of the assistant are."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset's other columns, for reward functions."""
    place: str = field(default="", compare=False)
    """File and line, for errors."""


def read_rows(data: DatasetSettings, kind: RowKind) -> list[Row]:
    """All rows of a dataset, up to data.limit.

    demonstration: `prompt` and `completion`, or `messages` that end with the assistant's.
    preference: `chosen` and `rejected`, each an answer to `prompt` or a whole conversation; optionally `margin`.
    prompt: `prompt`, or `messages`, of which a final answer is dropped.
    A prompt is text or a list of messages; an answer is text, a message of the assistant or several that end with one.
    `tools` go to the chat template; `input` is appended to a prompt of text after an empty line.

    Rows without these columns may have three other forms: ShareGPT (`conversations` with from and value, and `system`),
    Alpaca (`instruction`, `input`, `output`), and dialogues of Anthropic's HH data as text in `chosen` and `rejected`.

    Raises:
        DataError: names the first malformed rows (by line, or by row counted from 1) and their number.
    """
    for name in data.columns:
        similar = difflib.get_close_matches(name, OURS, n=1, cutoff=_MISTYPED if kind == "prompt" else _ALIKE)
        if name not in OURS and (similar or kind != "prompt"):
            hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(OURS)}"
            raise DataError(f"{data.name}: columns.{name}: no such column of ours; {hint}")
    rows: list[Row] = []
    faults: list[str] = []
    for place, record in islice(records(data), data.limit):
        try:
            rows.append(_row(record, data.columns, kind, place))
        except DataError as error:
            faults.append(f"{place}: {error}")
    if faults:
        total = f"{data.name}: {len(faults)} of {len(faults) + len(rows)} rows cannot be read as a {kind}"
        raise DataError("\n".join([*faults[:_FAULTS_SHOWN], total]))
    if not rows:
        raise DataError(f"{data.name}: has no rows")
    for name, theirs in data.columns.items():
        if name not in OURS and not any(name in row.columns for row in rows):
            raise DataError(f"{data.name}: columns.{name}: no row has the column {theirs}")
    return rows


def _row(record: Any, columns: Mapping[str, str], kind: RowKind, place: str) -> Row:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"must be a mapping of columns, was {brief(record)}")
    for ours, theirs in columns.items():
        if theirs not in record and ours in _READ[kind]:
            raise DataError(f"no column {theirs} (for {ours}); there are {', '.join(record)}")
    sources = {ours: columns.get(ours, ours) for ours in _READ[kind]}
    values = {ours: record[theirs] for ours, theirs in sources.items() if record.get(theirs) is not None}
    rest = _other_columns({name: value for name, value in record.items() if name not in sources.values()}, columns)
    if not values.keys() & {"prompt", "messages", "chosen"}:
        values, rest = _from_other_form(values, rest, kind)
    prompt = _prompt(values["prompt"]) if "prompt" in values else None
    if values.get("input"):
        prompt = _with_input(prompt, values["input"])
    common: dict[str, Any] = {"tools": read_tools(values.get("tools")), "columns": rest, "place": place}
    if kind == "demonstration":
        return _demonstration(values, prompt, common, record)
    if kind == "preference":
        return _preference(values, prompt, common, record)
    if prompt is None:
        _require(values, ["messages"], "prompt or messages", record)
        prompt = read_messages(values["messages"], "messages")
        prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    if not prompt:
        raise DataError("prompt: is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError("prompt: ends with a message of the assistant, so there is nothing to answer")
    return Row(prompt, **common)


def _other_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The dataset's further columns, under the names that the settings give them."""
    renamed = dict(record)
    for name, theirs in columns.items():
        if name not in OURS and theirs in renamed:
            if name in renamed:
                raise DataError(f"columns.{name}: there is a column {name} already, beside {theirs}")
            renamed[name] = renamed.pop(theirs)
    return renamed


def _from_other_form(
    values: dict[str, Any], rest: dict[str, Any], kind: RowKind
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our columns and the further columns of a record in the form of ShareGPT or Alpaca."""
    rest = dict(rest)
    if isinstance(rest.get("conversations"), list | str):
        messages = read_messages(rest.pop("conversations"), "conversations")
        system = rest.pop("system", None)
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return values | {"messages": messages}, rest
    if "instruction" in rest:
        values = values | {"prompt": rest.pop("instruction")}
        if kind == "demonstration" and rest.get("output") is not None and "completion" not in values:
            values["completion"] = rest.pop("output")
    return values, rest


def _with_input(prompt: Prompt | None, text: Any) -> Prompt:
    if not isinstance(text, str) or not isinstance(prompt, str):
        raise DataError(f"input: must be text beside a prompt of text, was {brief(text)}")
    return f"{prompt}\n\n{text}"


def _demonstration(
    values: dict[str, Any], prompt: Prompt | None, common: dict[str, Any], record: dict[str, Any]
) -> Row:
    needed = "prompt and completion, or messages"
    if "completion" in values:
        _require(values, ["prompt"], needed, record)
        before, answer = _exchange(prompt, values["completion"], "completion")
    else:
        _require(values, ["messages"], needed, record)
        prompt = None
        before, answer = _exchange(None, read_messages(values["messages"], "messages"), "messages")
    if not answer:
        raise DataError("the answer is empty, so there is nothing to learn")
    given = len(as_messages(prompt)) if prompt is not None else 0
    return Row(before, completion=answer, given=given if isinstance(before, list) else 0, **common)


def _preference(values: dict[str, Any], prompt: Prompt | None, common: dict[str, Any], record: dict[str, Any]) -> Row:
    _require(values, ["chosen", "rejected"], "chosen and rejected", record)
    if prompt is None:  # whole dialogues as text
        values |= {
            name: hh_dialogue(values[name]) or values[name] for name in ("chosen", "rejected") if _is_text(values[name])
        }
    before, chosen = _exchange(prompt, values["chosen"], "chosen")
    rejected_before, rejected = _exchange(prompt, values["rejected"], "rejected")
    if isinstance(before, str) != isinstance(rejected_before, str):
        raise DataError("chosen and rejected: one is text, the other messages")
    margin = _margin(values.get("margin", 0.0))
    return Row(before, chosen=chosen, rejected=rejected, rejected_prompt=rejected_before, margin=margin, **common)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _margin(value: Any) -> float:
    with suppress(OverflowError, ValueError):  # an integer too large for a float, or a CSV cell that is not a number
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(margin := float(number)):
            return margin
    raise DataError(f"margin: must be a finite number, was {brief(value)}")


def _require(values: Mapping[str, Any], names: list[str], needed: str, record: Mapping[str, Any]) -> None:
    for name in names:
        if name not in values:
            raise DataError(f"{name}: missing; needs {needed}; its columns are {', '.join(record) or 'none'}")


def _exchange(prompt: Prompt | None, answer: Any, name: str) -> tuple[Prompt, Answer]:
    """(prompt, last answer) from an answer or a whole conversation."""
    if isinstance(answer, str) and (prompt is not None or hh_dialogue(answer) is None):
        if prompt is None:
            raise DataError(f"prompt: missing; text in {name} needs one beside it")
        return prompt, answer
    *before, last = read_messages([answer] if isinstance(answer, dict) else answer, name)
    if last["role"] != "assistant":
        raise DataError(f"{name}: the last message must be the assistant's, was the {last['role']}'s")
    if prompt is None and not before:
        raise DataError(f"{name}: has no message before the assistant's")
    if prompt is not None:
        before = _after(as_messages(prompt), before, isinstance(prompt, str), name)
    return before, last["content"] if last.keys() == {"role", "content"} else last


def _after(prompt: list[Message], before: list[Message], was_text: bool, name: str) -> list[Message]:
    """The conversation before the last answer: the prompt, and the earlier messages of an answer of several messages."""
    if not before or before[0]["role"] in ("assistant", "tool"):
        return [*prompt, *before]
    if was_text and prompt[0]["content"] not in [message["content"] for message in before]:
        raise DataError(f"{name}: none of its messages is the prompt")
    if not was_text and before[: len(prompt)] != prompt:
        raise DataError(f"{name}: does not begin with the messages of prompt")
    return before


def _prompt(value: Any) -> Prompt:
    return value if isinstance(value, str) else read_messages(value, "prompt")
