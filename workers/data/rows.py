"""Rows of a dataset, whatever form they have there: demonstrations, preferences, prompts."""

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
"""An answer's text or, where it has more than text (tool calls, reasoning), its message."""

_READ: Mapping[RowKind, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion", "messages", "input", "tools"),
    "preference": ("prompt", "chosen", "rejected", "margin", "input", "tools"),
    "prompt": ("prompt", "messages", "input", "tools"),
}
OURS = tuple(dict.fromkeys(name for names in _READ.values() for name in names))
_FAULTS_SHOWN = 5
_ALIKE, _MISTYPED = 0.6, 0.8
"""How like one of our names another is that was meant to be it; of prompts, whose other columns may have any name, it must be
more alike."""


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
    """What `rejected` answers: as a rule `prompt`, but conversations may be compared that began differently."""
    margin: float = 0.0
    """By how much `chosen` is better; 0 where the dataset does not say."""
    tools: list[Any] | None = None
    """Functions that the assistant may call, as JSON schemas."""
    given: int = 0
    """The prompt's first so many messages are not learnt from, also where all turns of the assistant are."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset's other columns, for reward functions."""
    place: str = field(default="", compare=False)
    """File and line, for errors."""


def read_rows(data: DatasetSettings, kind: RowKind) -> list[Row]:
    """All rows of a dataset, up to data.limit.

    demonstration: `prompt` and `completion`, or `messages` that end with the assistant's.
    preference: `chosen` and `rejected`, each an answer beside a `prompt` or a whole conversation; optionally `margin`.
    prompt: `prompt`, or `messages`, of which a last answer is dropped.
    A prompt is text or a list of messages; an answer is text, a message of the assistant or several that end with one.
    `tools` go to the chat template; `input` is text that is added to a prompt of text after an empty line.

    Without these columns three other forms are known: ShareGPT (`conversations` with from and value, beside `system`),
    Alpaca (`instruction`, `input`, `output`), and dialogues of Anthropic's HH data as text in `chosen` and `rejected`.

    Raises:
        DataError: names the first malformed rows (by line, or by row counted from 1) and says how many there are.
    """
    for name in data.columns:
        close = difflib.get_close_matches(name, OURS, n=1, cutoff=_MISTYPED if kind == "prompt" else _ALIKE)
        if name not in OURS and (close or kind != "prompt"):
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(OURS)}"
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
    found = {ours: record[theirs] for ours, theirs in sources.items() if record.get(theirs) is not None}
    rest = _other_columns({name: value for name, value in record.items() if name not in sources.values()}, columns)
    if not found.keys() & {"prompt", "messages", "chosen"}:
        found, rest = _of_known_form(found, rest, kind)
    prompt = _prompt(found["prompt"]) if "prompt" in found else None
    if found.get("input"):
        prompt = _with_input(prompt, found["input"])
    known: dict[str, Any] = {"tools": read_tools(found.get("tools")), "columns": rest, "place": place}
    if kind == "demonstration":
        return _demonstration(found, prompt, known, record)
    if kind == "preference":
        return _preference(found, prompt, known, record)
    if prompt is None:
        _require(found, ["messages"], "prompt or messages", record)
        prompt = read_messages(found["messages"], "messages")
        prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    if not prompt:
        raise DataError("prompt: is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError("prompt: ends with a message of the assistant, so there is nothing to answer")
    return Row(prompt, **known)


def _other_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns that are none of ours, under the names that the settings give them."""
    found = dict(record)
    for name, theirs in columns.items():
        if name not in OURS and theirs in found:
            if name in found:
                raise DataError(f"columns.{name}: there is a column {name} already, beside {theirs}")
            found[name] = found.pop(theirs)
    return found


def _of_known_form(found: dict[str, Any], rest: dict[str, Any], kind: RowKind) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record of ShareGPT's or Alpaca's form in our columns, and its others."""
    rest = dict(rest)
    if isinstance(rest.get("conversations"), list | str):
        messages = read_messages(rest.pop("conversations"), "conversations")
        system = rest.pop("system", None)
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return found | {"messages": messages}, rest
    if "instruction" in rest:
        found = found | {"prompt": rest.pop("instruction")}
        if kind == "demonstration" and rest.get("output") is not None and "completion" not in found:
            found["completion"] = rest.pop("output")
    return found, rest


def _with_input(prompt: Prompt | None, text: Any) -> Prompt:
    if not isinstance(text, str) or not isinstance(prompt, str):
        raise DataError(f"input: must be text beside a prompt of text, was {brief(text)}")
    return f"{prompt}\n\n{text}"


def _demonstration(found: dict[str, Any], prompt: Prompt | None, known: dict[str, Any], record: dict[str, Any]) -> Row:
    needed = "prompt and completion, or messages"
    if "completion" in found:
        _require(found, ["prompt"], needed, record)
        asked, answer = _exchange(prompt, found["completion"], "completion")
    else:
        _require(found, ["messages"], needed, record)
        prompt = None
        asked, answer = _exchange(None, read_messages(found["messages"], "messages"), "messages")
    if not answer:
        raise DataError("the answer is empty, so there is nothing to learn")
    given = len(as_messages(prompt)) if prompt is not None else 0
    return Row(asked, completion=answer, given=given if isinstance(asked, list) else 0, **known)


def _preference(found: dict[str, Any], prompt: Prompt | None, known: dict[str, Any], record: dict[str, Any]) -> Row:
    _require(found, ["chosen", "rejected"], "chosen and rejected", record)
    if prompt is None:  # whole dialogues as text
        found |= {
            name: hh_dialogue(found[name]) or found[name] for name in ("chosen", "rejected") if _is_text(found[name])
        }
    asked, chosen = _exchange(prompt, found["chosen"], "chosen")
    rejected_asked, rejected = _exchange(prompt, found["rejected"], "rejected")
    if isinstance(asked, str) != isinstance(rejected_asked, str):
        raise DataError("chosen and rejected: one is text, the other messages")
    margin = _margin(found.get("margin", 0.0))
    return Row(asked, chosen=chosen, rejected=rejected, rejected_prompt=rejected_asked, margin=margin, **known)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _margin(value: Any) -> float:
    with suppress(OverflowError, ValueError):  # an integer beyond all floats, a table's cell that is no number
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(margin := float(number)):
            return margin
    raise DataError(f"margin: must be a finite number, was {brief(value)}")


def _require(found: Mapping[str, Any], names: list[str], needed: str, record: Mapping[str, Any]) -> None:
    for name in names:
        if name not in found:
            raise DataError(f"{name}: missing; needs {needed}; its columns are {', '.join(record) or 'none'}")


def _exchange(prompt: Prompt | None, answer: Any, name: str) -> tuple[Prompt, Answer]:
    """(prompt, last answer) from an answer or a whole conversation."""
    if isinstance(answer, str) and (prompt is not None or hh_dialogue(answer) is None):
        if prompt is None:
            raise DataError(f"prompt: missing; text in {name} needs one beside it")
        return prompt, answer
    *asked, last = read_messages([answer] if isinstance(answer, dict) else answer, name)
    if last["role"] != "assistant":
        raise DataError(f"{name}: the last message must be the assistant's, was the {last['role']}'s")
    if prompt is None and not asked:
        raise DataError(f"{name}: has no message before the assistant's")
    if prompt is not None:
        asked = _after(as_messages(prompt), asked, isinstance(prompt, str), name)
    return asked, last["content"] if last.keys() == {"role", "content"} else last


def _after(prompt: list[Message], asked: list[Message], was_text: bool, name: str) -> list[Message]:
    """The conversation before the last answer: a prompt, and what an answer of several messages adds to it."""
    if not asked or asked[0]["role"] in ("assistant", "tool"):
        return [*prompt, *asked]
    if was_text and prompt[0]["content"] not in [message["content"] for message in asked]:
        raise DataError(f"{name}: none of its messages is the prompt")
    if not was_text and asked[: len(prompt)] != prompt:
        raise DataError(f"{name}: does not begin with the messages of prompt")
    return asked


def _prompt(value: Any) -> Prompt:
    return value if isinstance(value, str) else read_messages(value, "prompt")
