"""Answers from a run's trained model: one vLLM engine in this process, no cluster."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console

from configs.schema import DatasetSettings
from orchestrator.run import STAGES, Run, RunError
from placement import Cluster
from workers.data import Prompt, Row, read_rows
from workers.worker import WorkerSpec, environment


class Answerer:
    """The model of a run's stage, in an engine."""

    def __init__(self, folder: Path, stage: str | None) -> None:
        run = Run.open(folder)
        finished = [s for s in STAGES if s != "rm" and run.finished(s)]
        if not finished or (stage and stage not in finished):
            raise RunError(
                f"{folder}: has no finished {stage or 'sft or ppo'} stage; finished: {', '.join(finished) or 'none'}"
            )
        chosen = next(s for s in STAGES if s == (stage or finished[-1]))
        device = "cuda" if Cluster.this_machine().gpus else "cpu"
        threads = int(Cluster.this_machine().cpus)
        os.environ |= environment(run.config, "rollout", device, threads)
        with quiet(run.folder / "answer.log"):
            from workers.rollout import RolloutWorker  # imports torch and vLLM, which read the environment

            spec = WorkerSpec(run.config, "rollout", 0, 1, device, threads)
            self.worker = RolloutWorker(spec)
            longest = run.config.ppo.max_prompt_tokens if run.config.ppo else 512
            self.room = longest + run.config.rollout.max_new_tokens
            self.worker.load(str(run.model(chosen).absolute()), "object_store", self.room)
        self.run, self.asked = run, 0

    @property
    def converses(self) -> bool:
        return self.run.config.chat_template

    def answer(self, prompts: list[Prompt]) -> list[str]:
        """One sampled answer each. Raises ValueError where a prompt leaves no room for an answer."""
        self.worker.add_rows("asked", [Row(prompt) for prompt in prompts])
        self.worker.tokenize("asked", self.room - self.run.config.rollout.max_new_tokens)
        self.asked += 1  # another seed each time
        chunk, _ = self.worker.generate("asked", np.arange(len(prompts)), np.zeros(len(prompts), int), self.asked)
        return [self.worker.codec.decode(s.ids[s.prompt_length :]) for s in (chunk.row(i) for i in range(len(prompts)))]


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What this process and the libraries below it print goes to a file."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


def answer_file(answerer: Answerer, prompts: Path, output: Path) -> int:
    """Write {"prompt", "answer"} lines for the prompts of a file. Returns their number."""
    rows = read_rows(DatasetSettings(path=str(prompts)), "prompt")
    answers = answerer.answer([row.prompt for row in rows])
    with open(output, "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            file.write(
                json.dumps({"prompt": row.prompt, "answer": answer, **row.columns}, ensure_ascii=False, default=str)
                + "\n"
            )
    return len(rows)


def converse(answerer: Answerer, console: Console) -> None:
    """Lines in, answers out. A chat model sees the whole conversation, a plain one the line alone."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except EOFError:
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        [answer] = answerer.answer([list(messages) if answerer.converses else line])
        messages.append({"role": "assistant", "content": answer})
        console.print(answer if answerer.converses else line + answer, markup=False, highlight=False)
