"""A function that a background thread calls at regular intervals."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Repeating:
    """Calls a function every `seconds` seconds in its own thread until `stop`.

    The function must not raise, and must lock the state that it shares with other threads.
    """

    def __init__(self, function: Callable[[], None], seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"repeating {function.__qualname__}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the calls; waits for a call that is running."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._function()
