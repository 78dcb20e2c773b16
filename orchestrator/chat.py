"""Answers from a run's trained model: one vLLM engine in this process, no cluster."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from configs import ConfigError
from configs.schema import DatasetSettings, RolloutSettings
from orchestrator.run.run_dir import Run, RunError
from placement import Cluster
from placement.stages import STAGES
from placement.types import Stage
from workers.data import Codec, Message, Prompt, Row, encode_prompts, read_rows
from workers.process.worker import WorkerSpec, environment
from workers.weight_sync.probe import Probe


def last_stage(run: Run, stage: str | None) -> Stage:
    """The stage whose model answers: the one that is named, else the last finished. Raises RunError where there is none."""
    finished = [s for s in STAGES if STAGES[s].chats and run.finished(s)]
    if not finished or (stage and stage not in finished):
        raise RunError(
            f"{run.folder}: has no finished {stage or 'sft or ppo'} stage; finished: {', '.join(finished) or 'none'}"
        )
    return next(s for s in finished if s == (stage or finished[-1]))


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; none: as in training."""

    temperature: float | None = None
    max_new_tokens: int | None = None

    def applied(self, rollout: RolloutSettings) -> RolloutSettings:
        """The engine's settings with these. Raises ConfigError where they are none that an engine takes."""
        asked = {name: value for name, value in vars(self).items() if value is not None}
        try:
            return RolloutSettings.model_validate(rollout.model_dump() | asked)
        except ValidationError as error:
            raise ConfigError([f"--{e['loc'][0]}: was {e['input']}: {e['msg']}" for e in error.errors()]) from None


def codec_of(run: Run, stage: Stage) -> Codec:
    """The codec of a stage's model, by which prompts of text go through the chat template if its rows did."""
    codec = Codec.load(str(run.model(stage)), run.config, run.config.model, run.started)
    codec.chat_template = run.form(stage) == "chat"
    return codec


class Answerer:
    """The model of a run's stage, in an engine."""

    def __init__(self, run: Run, stage: Stage, sampling: Sampling) -> None:
        machine = Cluster.this_machine()
        device = "cuda" if machine.gpus and run.config.device != "cpu" else "cpu"
        threads = int(machine.cpus)
        os.environ |= environment(run.config, "rollout", device, threads)
        rollout = sampling.applied(run.config.rollout).model_copy(update={"tensor_parallel": 1})
        self.log, self.asked = run.folder / "answer.log", 0
        with quiet(self.log):
            from workers.rollout.engine import RolloutWorker  # imports torch and vLLM, which read the environment

            spec = WorkerSpec(run.config.model_copy(update={"rollout": rollout}), "rollout", 0, 1, device, threads)
            self.worker = RolloutWorker(spec)
            self.longest = run.config.ppo.max_prompt_tokens if run.config.ppo else 512
            path = str(run.model(stage))
            self.worker.load(path, "object_store", self.longest + rollout.max_new_tokens)
            if probe := Probe.load(run.model(stage)):
                self.worker.prove(0, probe)
            self.codec = codec_of(run, stage)

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt leaves room for an answer."""
        return len(self.codec.prompt_ids(prompt)) <= self.longest

    def answer(self, rows: Sequence[Row]) -> list[str]:
        """One sampled answer to each prompt. Raises DataError where one is too long."""
        self.asked += 1  # another seed each time
        encoded, _ = encode_prompts(self.codec, rows, self.longest, "refuse")
        with quiet(self.log):
            self.worker.add_rows("asked", encoded.ids)
            chunk, _ = self.worker.generate("asked", np.arange(len(rows)), np.zeros(len(rows), int), self.asked)
        samples = (chunk.row(i) for i in range(len(rows)))
        return [self.codec.answer_text(sample.ids[sample.prompt_length :]) for sample in samples]


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


def answer_file(folder: Path, stage: str | None, prompts: Path, output: Path, sampling: Sampling) -> int:
    """Write {"prompt", "answer"} lines, and the rows' other columns, for the prompts of a file. Returns their number.

    Raises DataError or RunError before the model is loaded where the file or the folder of the output is wrong.
    """
    rows = read_rows(DatasetSettings(path=str(prompts)), "prompt")
    if not output.absolute().parent.is_dir():
        raise RunError(f"{output}: there is no folder {output.parent}")
    run = Run.open(folder)
    answers = Answerer(run, last_stage(run, stage), sampling).answer(rows)
    with open(output, "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            line = {"prompt": row.prompt, "answer": answer, **row.columns}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return len(rows)


def converse(folder: Path, stage: str | None, console: Console, sampling: Sampling) -> None:
    """Lines in, answers out. A chat model sees the conversation, as much of it as fits; a plain one goes on with the line."""
    run = Run.open(folder)
    chosen = last_stage(run, stage)
    console.print(f"loading the {chosen} model of {folder}; some 20 seconds", style="dim", soft_wrap=True)
    answerer = Answerer(run, chosen, sampling)
    chats = answerer.codec.chat_template  # it was trained on conversations
    way = "it was trained on conversations: ask, and it answers" if chats else "begin a text, and it goes on"
    console.print(f"{way}; an empty line ends")
    messages: list[Message] = []
    while line := _line(console):
        messages.append({"role": "user", "content": line})
        while chats and len(messages) > 1 and not answerer.fits(messages):
            del messages[:2]
        asked: Prompt = list(messages) if chats else line
        if not answerer.fits(asked):
            console.print(f"that is longer than {answerer.longest} tokens (ppo.max_prompt_tokens)", style="red")
            messages.pop()
            continue
        [answer] = answerer.answer([Row(asked)])
        messages.append({"role": "assistant", "content": answer})
        console.print(answer if chats else line + answer, markup=False, highlight=False)


def _line(console: Console) -> str:
    """What was typed; empty at the end of the input."""
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
