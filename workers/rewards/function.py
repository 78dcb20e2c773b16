"""Reward functions and judges: Python functions named module:function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter
from typing import Any

Score = float | None | dict[str, Any]
"""Score of an answer: a number, None for no score, or a dict with the number under `score` and further numbers to report."""
RewardFunction = Callable[..., Any]
"""(prompts, answers, **columns) -> Sequence[Score], one per answer, or a coroutine of it; columns: the prompts' other columns, a
list each. A function with a keyword-only parameter `samples` also gets a SampleRecord of each answer."""

SAMPLES = "samples"
"""Name of the parameter that takes the SampleRecords."""


class RewardError(ValueError):
    """A source of rewards that cannot be used."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One answer as it was sampled, for functions that need more than its text."""

    prompt_ids: list[int]
    """Token ids of the prompt, as the engine received them."""
    answer_ids: list[int]
    """Token ids of the answer, with the token that ended it."""
    ended: bool
    """Whether the answer ended by itself; False: it was cut off at the token limit."""
    number: int
    """Index of the answer among those to its prompt in this step, from 0."""
    step: int
    """Training step, from 1; 0 in evaluations."""


def find_function(path: str, setting: str) -> RewardFunction:
    """The function module:function. Raises RewardError that names the setting."""
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{setting}: cannot import {path!r}: {error}") from error
    if not callable(function):
        raise RewardError(f"{setting}: {path!r} is not a function but {function!r:.100}")
    return function


def wants_samples(function: RewardFunction) -> bool:
    """Whether a function has the keyword-only parameter `samples`."""
    signature = _signature(function)
    parameter = signature.parameters.get(SAMPLES) if signature else None
    return parameter is not None and parameter.kind is Parameter.KEYWORD_ONLY


def check_columns(function: RewardFunction, setting: str, columns: Collection[str], dataset: str) -> None:
    """Check that a function can be called with a dataset's columns.

    setting: dotted path of the function's setting. columns: the dataset's columns except the prompt. dataset: dotted path of its
    setting, and its file, for the error.

    Raises:
        RewardError: names the setting, the column and a fix.
    """
    signature = _signature(function)
    if signature is None:
        return
    records = [SAMPLES] if wants_samples(function) else []
    try:
        if {*records} & {*columns}:
            raise TypeError
        signature.bind([], [], **{name: [] for name in (*columns, *records)})
    except TypeError as error:
        why = _misfit(signature, columns, records) or str(error)
        raise RewardError(f"{setting}: the function cannot be called with the columns of {dataset}: {why}") from None


def _misfit(signature: inspect.Signature, columns: Collection[str], records: Collection[str]) -> str:
    """Why the function cannot be called with these columns; empty where the reason is unknown."""
    parameters = list(signature.parameters.values())
    first = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)][:2]
    if len(first) < 2 and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return "it must take prompts and answers as its first two arguments"
    taken = {*records, *(p.name for p in first if p.kind is not Parameter.POSITIONAL_ONLY)}
    if clashes := [name for name in columns if name in taken]:
        return (
            f"the column {clashes[0]} has the name of one of its own arguments; give the column another name, for example by "
            f"`columns: {{own_{clashes[0]}: {clashes[0]}}}` of the dataset"
        )
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in named and p not in first and p.default is Parameter.empty]
    if missing := [name for name in needed if name not in {*columns, *records}]:
        names = ", ".join(columns) or "none"
        return f"it needs the column {', '.join(missing)}, and there are: {names}"
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return ""
    accepted = {p.name for p in parameters if p.kind in named}
    extra = [name for name in columns if name not in accepted]
    return f"it does not take the column {', '.join(extra)}; give it a parameter **columns" if extra else ""


def _signature(function: RewardFunction) -> inspect.Signature | None:
    """A function's signature; None where it has none, as some functions written in C."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def as_sequence(values: Any) -> Sequence[Any] | None:
    """The values as a list, also those of an array, tensor or series; None for anything else."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    return plain if isinstance(plain, list | tuple) else None
