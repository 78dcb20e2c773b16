"""Reward functions, good and bad. Light to import: their processes do it anew."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def length(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def vowels(prompts: list[str], answers: list[str], **columns: list[Any]) -> np.ndarray:
    return np.array([sum(c in "aeiou" for c in prompt) for prompt in prompts])


def letters(prompts: list[str], answers: list[str], wanted: list[str]) -> list[float]:
    """Share of the wanted letter."""
    return [answer.count(letter) / max(len(answer), 1) for answer, letter in zip(answers, wanted, strict=True)]


def by_label(prompts: list[str], answers: list[str], label: list[float], note: list[str | None]) -> list[float]:
    """Takes its columns by name, and needs a row of every column for each answer."""
    assert len(label) == len(note) == len(answers)
    return [x + (0.5 if text else 0.0) for x, text in zip(label, note, strict=True)]


def one_too_few(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [1.0] * (len(answers) - 1)


def a_column(prompts: list[str], answers: list[str], **columns: list[Any]) -> np.ndarray:
    return np.ones((len(answers), 1))


def one_for_all(prompts: list[str], answers: list[str], **columns: list[Any]) -> float:
    return 1.0


def not_a_number(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [math.nan if answer == "bb" else 1.0 for answer in answers]


def infinite(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [math.inf] * len(answers)


def nothing_for_some(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float | None]:
    return [None if answer == "bb" else 1.0 for answer in answers]


def nothing(prompts: list[str], answers: list[str], **columns: list[Any]) -> None:
    return None


def words(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[str]:
    return ["good"] * len(answers)


def broken(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    raise ZeroDivisionError("of the reward's own")


_calls = 0


def fewer_and_fewer(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float | None]:
    """Has a score for every answer in its first call, for all but the first in its second, for none in its third; and again."""
    global _calls
    _calls += 1
    missing = {1: 0, 2: 1, 0: len(answers)}[_calls % 3]
    return [None] * missing + [1.0] * (len(answers) - missing)


# ---------------------------------------------------------------- what a process may do to its owner


def sleep_at_wait(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    """Sleeps where an answer is `wait`."""
    print("scoring", len(answers), flush=True)
    if "wait" in answers:
        time.sleep(600)
    return [float(len(answer)) for answer in answers]


def sleep_at_bb(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    if "bb" in answers:
        time.sleep(600)
    return [1.0] * len(answers)


def process_number(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [float(os.getpid())] * len(answers)


def misbehave(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    """Does what the first answer says; else gives its process number."""
    match answers[0]:
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(4)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ZeroDivisionError("of the reward's own")
        case "print":
            print("to stdout", flush=True)
            print('{"scores": [7.0]}', file=sys.stderr)
            os.write(1, b"below Python\n")
        case "spin":  # in C, without letting another thread run
            sum(range(10**12))
    return [float(os.getpid())] * len(answers)


def leave_processes(prompts: list[str], answers: list[str], folder: list[str]) -> list[float]:
    """Leaves a process, one in another session, and an orphan of one that ended; their numbers are written to the folder."""
    leave = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, start_new_session=True).pid)"
    left = [subprocess.Popen(["sleep", "600"], start_new_session=apart).pid for apart in (False, True)]
    orphan = subprocess.run(
        [sys.executable, "-c", leave], stdout=subprocess.PIPE, check=True, text=True, close_fds=True
    )
    Path(folder[0], "left").write_text(" ".join(map(str, [*left, os.getpid(), os.getppid(), int(orphan.stdout)])))
    if answers[0] == "crash":
        os._exit(1)
    if answers[0] == "wait":
        time.sleep(600)
    return [1.0] * len(answers)


def fork_and_crash(prompts: list[str], answers: list[str], **columns: list[Any]) -> NoReturn:
    """A fork of it lives on, with its end of the connection."""
    if os.fork():
        os._exit(5)
    time.sleep(600)
    os._exit(0)


def mixed(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[Any]:
    """What is no score, beside two that are."""
    return [1.0, None, math.nan, "2.0", True, 1e300, 10**400, [3.0]]


def generator(prompts: list[str], answers: list[str], **columns: list[Any]) -> Any:
    return (1.0 for _ in answers)


def by_answer(prompts: list[str], answers: list[str], **columns: list[Any]) -> dict[str, float]:
    return dict.fromkeys(answers, 1.0)


not_a_function = 3
