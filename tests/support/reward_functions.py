"""Reward functions, correct and faulty. Fast to import: every process imports them again."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from workers.rewards.function import SampleRecord


def length(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def vowels(prompts: list[str], answers: list[str], **columns: list[Any]) -> np.ndarray:
    return np.array([sum(c in "aeiou" for c in prompt) for prompt in prompts])


def letters(prompts: list[str], answers: list[str], wanted: list[str]) -> list[float]:
    """Share of the wanted letter."""
    return [answer.count(letter) / max(len(answer), 1) for answer, letter in zip(answers, wanted, strict=True)]


def by_label(prompts: list[str], answers: list[str], label: list[float], note: list[str | None]) -> list[float]:
    """Takes columns by name, and requires one value of every column per answer."""
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
    """Scores every answer in its first call, all but the first in its second, none in its third; then repeats."""
    global _calls
    _calls += 1
    missing = {1: 0, 2: 1, 0: len(answers)}[_calls % 3]
    return [None] * missing + [1.0] * (len(answers) - missing)


async def slowly(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    """All answers concurrently, on the same event loop in every call."""
    LOOPS.append(asyncio.get_running_loop())
    assert LOOPS[0] is LOOPS[-1]

    async def score(answer: str) -> float:
        await asyncio.sleep(0.01)
        return float(len(answer))

    return await asyncio.gather(*map(score, answers))


LOOPS: list[Any] = []


async def broken_slowly(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    await asyncio.sleep(0)
    raise ZeroDivisionError("of the reward's own")


async def never(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    await asyncio.sleep(600)
    return [0.0] * len(answers)


def detailed(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[Any]:
    """Scores, some with further numbers."""
    scores: list[Any] = [{"score": float(len(a)), "acc": a == "bb", "words": 1, "why": "text"} for a in answers]
    for i, answer in enumerate(answers):
        if answer == "plain":
            scores[i] = 5.0
        elif answer == "none":
            scores[i] = {"score": None, "acc": 1}
        elif answer == "lacking":
            scores[i] = {"acc": math.nan}
    return scores


async def half_of_them(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[Any]:
    """Scores answers whose characters have an even sum; fails for the others."""
    if sum(map(ord, answers[0])) % 2:
        raise ValueError("an odd answer")
    return [{"score": 1.0, "even": 1.0}]


def by_sample(prompts: list[str], answers: list[str], *, samples: list[SampleRecord], **columns: Any) -> list[Any]:
    """The fields of the records, as numbers."""
    return [
        {
            "score": r.step,
            "prompt": len(r.prompt_ids),
            "answer": len(r.answer_ids),
            "last": r.answer_ids[-1],
            "ended": r.ended,
            "number": r.number,
        }
        for r in samples
    ]


def thinks(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    """A format reward."""
    return [float(answer.startswith("<think>") and "</think>" in answer) for answer in answers]


# ---------------------------------------------------------------- harmful behaviour of a process


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
    """Does what the first answer names; otherwise returns its process id."""
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
    """Leaves three processes: a child, one in another session and an orphan. Writes their process ids to the folder."""
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
    """A fork of the process stays alive and holds the connection open."""
    if os.fork():
        os._exit(5)
    time.sleep(600)
    os._exit(0)


def mixed(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[Any]:
    """Two scores, and values that are not scores."""
    return [1.0, None, math.nan, "2.0", True, 1e300, 10**400, [3.0]]


def generator(prompts: list[str], answers: list[str], **columns: list[Any]) -> Any:
    return (1.0 for _ in answers)


def by_answer(prompts: list[str], answers: list[str], **columns: list[Any]) -> dict[str, float]:
    return dict.fromkeys(answers, 1.0)


not_a_function = 3
