"""Exceptions that are sent from a worker to the driver, and the one line that summarizes an error."""

from __future__ import annotations

import re

from ray import cloudpickle
from ray.exceptions import RayError

_IMPORTABLE = ("builtins", "configs", "placement", "workers")
"""Packages whose exceptions the driver can load without importing a plugin, torch or vLLM."""
_SHOWN_CHARACTERS = 400
_ANNOUNCES = re.compile(r"\d+ validation errors? for .*|.*:")
"""A line that only announces the following lines."""
_FURTHER_LINES = 2


class RemoteError(Exception):
    """An exception of a worker that cannot travel as an object: the name of its type and its whole message."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name, self.message = type_name, message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


def portable(error: BaseException) -> BaseException:
    """The exception itself if every driver can load it, otherwise a RemoteError with its type, message and traceback.

    Ray replaces an exception that cannot be pickled by one without a type. An exception that raises while it is pickled, and
    SystemExit, would end the worker. If the driver cannot unpickle it, or lacks its module, only text would arrive.
    """
    if isinstance(error, RayError):
        return error  # Ray's own, or already made portable by another worker
    importable = isinstance(error, Exception) and type(error).__module__.partition(".")[0] in _IMPORTABLE
    if importable and _survives_pickling(error):
        return error
    remote = RemoteError(_type_name(error), _message(error))
    remote.__traceback__ = error.__traceback__
    remote.__cause__, remote.__context__ = error.__cause__, error.__context__
    remote.__suppress_context__ = error.__suppress_context__
    return remote


def _survives_pickling(error: BaseException) -> bool:
    try:
        return type(cloudpickle.loads(cloudpickle.dumps(error))) is type(error)
    except Exception:  # its methods may raise anything
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
    """The first line of a message, plus the next lines if the first only announces them; one line, at most 400 characters.

    Libraries write first the error, then advice.

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
    """The headline of the exception that a traceback ends with, `TypeName: ...`; empty if the text is no traceback.

    Accepts tracebacks of Python and of Ray, which begin with `ray::` and the name of the call.
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
