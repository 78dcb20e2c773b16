"""Output that survives a closed terminal or pipe: a run continues without its reader."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO, cast

from rich.console import Console

_CLOSED = (errno.EIO, errno.EPIPE)
"""Errors of a write after the terminal was closed, or the program that read the pipe has ended."""


class HangupSafeStream:
    """A text stream that discards output once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard_output(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard_output(error)

    def _discard_output(self, error: OSError) -> None:
        """Redirect the stream to /dev/null: its buffer is flushed when the process ends, which must not fail."""
        if error.errno not in _CLOSED:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_output_hangup_safe() -> None:
    """Let the output of this process survive a closed terminal."""
    sys.stdout, sys.stderr = (cast(TextIO, HangupSafeStream(stream)) for stream in (sys.stdout, sys.stderr))


def hangup_safe_console() -> Console:
    """A console on standard output that survives a closed terminal."""
    return Console(file=cast(TextIO, HangupSafeStream(sys.stdout)))
