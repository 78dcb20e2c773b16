"""Something small that is done again and again while a program does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Repeating:
    """Calls a function every so many seconds, from a thread of its own, until it is stopped.

    The function must not raise, and what it shares with other threads it must guard itself.
    """

    def __init__(self, function: Callable[[], None], seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"repeating {function.__qualname__}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the function is not running and will not be called again."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            self._function()
