"""Answers of a run's trained model, from one vLLM engine in this process, without a cluster."""

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
from orchestrator.run import Run, RunError
from placement import Cluster
from placement.stages import STAGES
from placement.types import Stage
from workers.data import Codec, Message, Prompt, Row, encode_prompts, read_rows
from workers.process.worker import WorkerSpec, environment
from workers.weight_sync.probe import Probe


def last_stage(run: Run, stage: str | None) -> Stage:
    """The stage whose model answers: the named one, or else the last finished one. Raises RunError if it is not finished."""
    finished = [s for s in STAGES if STAGES[s].chats and run.finished(s)]
    if not finished or (stage and stage not in finished):
        raise RunError(
            f"{run.folder}: no finished {stage or 'sft or ppo'} stage; finished: {', '.join(finished) or 'none'}"
        )
    return next(s for s in finished if s == (stage or finished[-1]))


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. None: as in training."""

    temperature: float | None = None
    max_new_tokens: int | None = None

    def applied(self, rollout: RolloutSettings) -> RolloutSettings:
        """The engine's settings with these values. Raises ConfigError if a value is not valid."""
        overrides = {name: value for name, value in vars(self).items() if value is not None}
        try:
            return RolloutSettings.model_validate(rollout.model_dump() | overrides)
        except ValidationError as error:
            raise ConfigError([f"--{e['loc'][0]}: was {e['input']}: {e['msg']}" for e in error.errors()]) from None


def codec_of(run: Run, stage: Stage) -> Codec:
    """The codec of a stage's model. Plain text prompts go through the chat template if the stage's training rows did."""
    codec = Codec.load(str(run.model(stage)), run.config, run.config.model, run.started)
    codec.chat_template = run.form(stage) == "chat"
    return codec


class Answerer:
    """An engine with the model of a run's stage."""

    def __init__(self, run: Run, stage: Stage, sampling: Sampling) -> None:
        machine = Cluster.this_machine()
        device = "cuda" if machine.gpus and run.config.device != "cpu" else "cpu"
        threads = int(machine.cpus)
        os.environ |= environment(run.config, "rollout", device, threads)
        rollout = sampling.applied(run.config.rollout).model_copy(update={"tensor_parallel": 1})
        self.log, self.calls = run.folder / "answer.log", 0
        with quiet(self.log):
            from workers.rollout.engine import RolloutWorker  # imports torch and vLLM, which read the environment

            spec = WorkerSpec(run.config.model_copy(update={"rollout": rollout}), "rollout", 0, 1, device, threads)
            self.worker = RolloutWorker(spec)
            self.max_prompt_tokens = run.config.ppo.max_prompt_tokens if run.config.ppo else 512
            path = str(run.model(stage))
            self.worker.load(path, "object_store", self.max_prompt_tokens + rollout.max_new_tokens)
            if probe := Probe.load(run.model(stage)):
                self.worker.prove(0, probe)
            self.codec = codec_of(run, stage)

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt is short enough."""
        return len(self.codec.prompt_ids(prompt)) <= self.max_prompt_tokens

    def answer(self, rows: Sequence[Row]) -> list[str]:
        """One sampled answer to each prompt. Raises DataError if a prompt is too long."""
        self.calls += 1  # the seed: another one for each call
        encoded, _ = encode_prompts(self.codec, rows, self.max_prompt_tokens, "refuse")
        with quiet(self.log):
            self.worker.add_rows("prompts", encoded.ids)
            chunk, _ = self.worker.generate("prompts", np.arange(len(rows)), np.zeros(len(rows), int), self.calls)
        samples = (chunk.row(i) for i in range(len(rows)))
        return [self.codec.answer_text(sample.ids[sample.prompt_length :]) for sample in samples]


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Redirect the output of this process, libraries included, to a file."""
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
    """Answer the prompts of a file: writes lines {"prompt", "answer", other columns of the row}. Returns the number of lines.

    Raises DataError or RunError before the model is loaded, if the prompts or the output's folder are wrong.
    """
    rows = read_rows(DatasetSettings(path=str(prompts)), "prompt")
    if not output.absolute().parent.is_dir():
        raise RunError(f"{output}: the folder {output.parent} does not exist")
    run = Run.open(folder)
    answers = Answerer(run, last_stage(run, stage), sampling).answer(rows)
    with open(output, "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            line = {"prompt": row.prompt, "answer": answer, **row.columns}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return len(rows)


def converse(folder: Path, stage: str | None, console: Console, sampling: Sampling) -> None:
    """Answer lines from standard input. A chat model sees the latest turns that fit; a plain model continues the line."""
    run = Run.open(folder)
    chat_stage = last_stage(run, stage)
    console.print(f"loading the {chat_stage} model of {folder}: about 20 seconds", style="dim", soft_wrap=True)
    answerer = Answerer(run, chat_stage, sampling)
    is_chat = answerer.codec.chat_template  # it was trained on conversations
    hint = (
        "trained on conversations: write a message, and it responds"
        if is_chat
        else "begin a text, and it continues the text"
    )
    console.print(f"{hint}; an empty line ends")
    messages: list[Message] = []
    while line := _line(console):
        messages.append({"role": "user", "content": line})
        while is_chat and len(messages) > 1 and not answerer.fits(messages):
            del messages[:2]
        prompt: Prompt = list(messages) if is_chat else line
        if not answerer.fits(prompt):
            console.print(f"longer than {answerer.max_prompt_tokens} tokens (ppo.max_prompt_tokens)", style="red")
            messages.pop()
            continue
        [answer] = answerer.answer([Row(prompt)])
        messages.append({"role": "assistant", "content": answer})
        console.print(answer if is_chat else line + answer, markup=False, highlight=False)


def _line(console: Console) -> str:
    """A line of input; empty at the end of the input."""
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
