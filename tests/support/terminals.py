"""A process in a terminal of its own; a test can type into the terminal and close it."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import termios
import threading
import time
from collections.abc import Mapping
from pathlib import Path


class Terminal:
    """A pseudo-terminal with a command as its session's leader. A thread reads its output."""

    def __init__(self, command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self._own_end, child_end = os.openpty()
        self._shown = bytearray()
        self._closing = threading.Event()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=child_end,
            stdout=child_end,
            stderr=child_end,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C goes to the session of this terminal
        )
        os.close(child_end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            time.sleep(0.02)

    def press_ctrl_c(self) -> None:
        os.write(self._own_end, b"\x03")

    def close(self) -> None:
        """Close it like a window: later writes to it fail."""
        self._closing.set()
        self._reader.join()

    def _read(self) -> None:
        while not self._closing.is_set():
            ready, _, _ = select.select([self._own_end], [], [], 0.05)
            try:
                self._shown += os.read(self._own_end, 65536) if ready else b""
            except OSError:  # the last process in the terminal has ended
                break
        os.close(self._own_end)
