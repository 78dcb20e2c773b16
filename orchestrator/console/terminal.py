"""A terminal, or the reader of a pipe, that may go away while a run goes on."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO, cast

from rich.console import Console

_GONE = (errno.EIO, errno.EPIPE)
"""What a write fails with where the terminal was closed, or the program that read the pipe has ended."""


class Lasting:
    """A text stream that can be written to after its reader is gone: what nobody can read is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        """From here on the stream leads nowhere; what it still holds is flushed when the process ends, which must not fail."""
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_output_last() -> None:
    """Let all that this process prints outlast the terminal."""
    sys.stdout, sys.stderr = (cast(TextIO, Lasting(stream)) for stream in (sys.stdout, sys.stderr))


def lasting_console() -> Console:
    """A console on standard output that outlasts the terminal."""
    return Console(file=cast(TextIO, Lasting(sys.stdout)))
