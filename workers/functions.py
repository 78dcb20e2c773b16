"""Reward functions and judges: Python functions named module:function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

RewardFunction = Callable[..., Sequence[float]]
"""(prompts, answers, **columns) -> one number per answer; columns are the prompts' other columns, a list each."""


class RewardError(ValueError):
    """A reward function cannot be had, or gave something that is not one finite number per answer."""


def find_function(path: str, setting: str) -> RewardFunction:
    """The function module:function, looked for from the working folder on. Raises RewardError that names the setting."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise RewardError(f"{setting}: cannot import {path!r}: {error}") from error
