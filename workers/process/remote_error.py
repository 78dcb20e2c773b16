"""Exceptions on their way from a worker to the driver, and the line of an error that says what happened."""

from __future__ import annotations

import re

from ray import cloudpickle
from ray.exceptions import RayError

_KNOWN = ("builtins", "configs", "placement", "workers")
"""Packages whose exceptions the driver can load without importing a plugin, torch or vLLM."""
_SHOWN_CHARACTERS = 400
_ANNOUNCES = re.compile(r"\d+ validation errors? for .*|.*:")
"""A line that says nothing without those after it."""
_FURTHER_LINES = 2


class RemoteError(Exception):
    """An exception of a worker that cannot travel as an object: the name of its type and its whole message."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name, self.message = type_name, message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


def portable(error: BaseException) -> BaseException:
    """The exception itself where every driver can load it, else a RemoteError with its type, message and traceback.

    Ray replaces an exception that cannot be pickled by one without a type, and a worker dies of one that raises while it is
    pickled, and of SystemExit. One that can be pickled but not loaded, or whose module the driver does not have, would arrive
    as text only.
    """
    if isinstance(error, RayError):
        return error  # Ray's own, or one that another worker has already made portable
    known = isinstance(error, Exception) and type(error).__module__.partition(".")[0] in _KNOWN
    if known and _survives_pickling(error):
        return error
    carried = RemoteError(_type_name(error), _message(error))
    carried.__traceback__ = error.__traceback__
    carried.__cause__, carried.__context__ = error.__cause__, error.__context__
    carried.__suppress_context__ = error.__suppress_context__
    return carried


def _survives_pickling(error: BaseException) -> bool:
    try:
        return type(cloudpickle.loads(cloudpickle.dumps(error))) is type(error)
    except Exception:  # whatever its own methods raise
        return False


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its message cannot be shown)"


def summary(error: BaseException) -> str:
    """`TypeName: headline` of an exception, in one line."""
    name, message = type(error).__name__, _message(error)
    if isinstance(error, RemoteError):
        name, message = error.type_name.rpartition(".")[2], error.message
    return f"{name}: {headline(message)}".removesuffix(": ")


def headline(message: str) -> str:
    """The first line of a message, with those after it where the first only announces them; one line, at most 400 characters.

    Libraries say first what happened and then what one might try.

    >>> headline("no such model: gpt-9\\nCheck your internet connection")
    'no such model: gpt-9'
    >>> headline("1 validation error for ModelConfig\\n  Value error, 262 is more than 256\\n")
    '1 validation error for ModelConfig Value error, 262 is more than 256'
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    count = 1 + _FURTHER_LINES if _ANNOUNCES.fullmatch(lines[0]) else 1
    text = " ".join(line for line in lines[:count] if not line.startswith("For further information"))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def headline_of_traceback(text: str) -> str:
    """The headline of the exception that a traceback ends with, `TypeName: ...`; empty where the text is no traceback.

    Accepts Python's tracebacks and Ray's, which begin with `ray::` and the name of the call.
    """
    lines = text.splitlines()
    starts = [k for k, line in enumerate(lines) if "ray::" in line or "Traceback (most recent call last)" in line]
    if not starts:
        return ""
    indent = len(lines[starts[-1]]) - len(lines[starts[-1]].lstrip())
    for k, line in enumerate(lines[starts[-1] + 1 :], start=starts[-1] + 1):
        if line.strip() and not line[indent:].startswith(" "):
            name, colon, rest = "\n".join(lines[k:]).strip().partition(":")
            return f"{name.rpartition('.')[2]}: {headline(rest)}" if colon else headline(name)
    return ""
