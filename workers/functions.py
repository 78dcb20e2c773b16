"""Reward functions and judges: Python functions named module:function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

RewardFunction = Callable[..., Sequence[float | None]]
"""(prompts, answers, **columns) -> one number per answer; columns are the prompts' other columns, a list each."""


class RewardError(ValueError):
    """A source of rewards that cannot be had."""


def find_function(path: str, setting: str) -> RewardFunction:
    """The function module:function. Raises RewardError that names the setting."""
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{setting}: cannot import {path!r}: {error}") from error
    if not callable(found):
        raise RewardError(f"{setting}: {path!r} is no function but {found!r:.100}")
    return found
