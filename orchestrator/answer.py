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
from placement.shape import Stage
from workers.data import DataError, Prompt, Row, read_rows
from workers.worker import WorkerSpec, environment


def last_stage(run: Run, stage: str | None) -> Stage:
    """The stage whose model answers: the one that is named, else the last finished. Raises RunError where there is none."""
    finished = [s for s in STAGES if s != "rm" and run.finished(s)]
    if not finished or (stage and stage not in finished):
        raise RunError(
            f"{run.folder}: has no finished {stage or 'sft or ppo'} stage; finished: {', '.join(finished) or 'none'}"
        )
    return next(s for s in finished if s == (stage or finished[-1]))


class Answerer:
    """The model of a run's stage, in an engine."""

    def __init__(self, run: Run, stage: Stage) -> None:
        machine = Cluster.this_machine()
        device = "cuda" if machine.gpus and run.config.device != "cpu" else "cpu"
        threads = int(machine.cpus)
        os.environ |= environment(run.config, "rollout", device, threads)
        self.run, self.log, self.asked = run, run.folder / "answer.log", 0
        with quiet(self.log):
            from workers.rollout import RolloutWorker  # imports torch and vLLM, which read the environment

            one = run.config.rollout.model_copy(update={"tensor_parallel": 1})
            spec = WorkerSpec(run.config.model_copy(update={"rollout": one}), "rollout", 0, 1, device, threads)
            self.worker = RolloutWorker(spec)
            self.longest = run.config.ppo.max_prompt_tokens if run.config.ppo else 512
            length = self.longest + run.config.rollout.max_new_tokens
            self.worker.load(str(run.model(stage)), "object_store", length)

    @property
    def converses(self) -> bool:
        return self.run.config.chat_template

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt leaves room for an answer."""
        return len(self.worker.codec.prompt_ids(prompt)) <= self.longest

    def answer(self, prompts: list[Prompt]) -> list[str]:
        """One sampled answer each; the prompts fit."""
        self.asked += 1  # another seed each time
        with quiet(self.log):
            self.worker.add_rows("asked", [Row(prompt) for prompt in prompts])
            self.worker.tokenize("asked", self.longest)
            chunk, _ = self.worker.generate("asked", np.arange(len(prompts)), np.zeros(len(prompts), int), self.asked)
        return [
            self.worker.codec.answer_text(s.ids[s.prompt_length :]) for s in (chunk.row(i) for i in range(len(prompts)))
        ]


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


def answer_file(folder: Path, stage: str | None, prompts: Path, output: Path) -> int:
    """Write {"prompt", "answer"} lines, and the rows' other columns, for the prompts of a file. Returns their number.

    Raises DataError or RunError before the model is loaded where the file or the folder of the output is wrong.
    """
    rows = read_rows(DatasetSettings(path=str(prompts)), "prompt")
    if not output.absolute().parent.is_dir():
        raise RunError(f"{output}: there is no folder {output.parent}")
    run = Run.open(folder)
    answerer = Answerer(run, last_stage(run, stage))
    if long := [number for number, row in enumerate(rows, start=1) if not answerer.fits(row.prompt)]:
        raise DataError(
            f"{prompts}: {len(long)} of {len(rows)} prompts are longer than {answerer.longest} tokens "
            f"(ppo.max_prompt_tokens), first row {long[0]}"
        )
    answers = answerer.answer([row.prompt for row in rows])
    with open(output, "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            line = {"prompt": row.prompt, "answer": answer, **row.columns}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return len(rows)


def converse(folder: Path, stage: str | None, console: Console) -> None:
    """Lines in, answers out. A chat model sees the conversation, as much of it as fits; a plain one goes on with the line."""
    run = Run.open(folder)
    chosen = last_stage(run, stage)
    console.print(f"loading the {chosen} model of {folder}; some 20 seconds", style="dim", soft_wrap=True)
    answerer = Answerer(run, chosen)
    way = "ask, and it answers" if answerer.converses else "begin, and it goes on"
    console.print(f"{way}; an empty line ends")
    messages: list[dict[str, str]] = []
    while line := _line(console):
        messages.append({"role": "user", "content": line})
        while answerer.converses and len(messages) > 1 and not answerer.fits(messages):
            del messages[:2]
        asked: Prompt = list(messages) if answerer.converses else line
        if not answerer.fits(asked):
            console.print(f"that is longer than {answerer.longest} tokens (ppo.max_prompt_tokens)", style="red")
            messages.pop()
            continue
        [answer] = answerer.answer([asked])
        messages.append({"role": "assistant", "content": answer})
        console.print(answer if answerer.converses else line + answer, markup=False, highlight=False)


def _line(console: Console) -> str:
    """What was typed; empty at the end of the input."""
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
