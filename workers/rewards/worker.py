"""The reward role: scores answers by trained models, Python functions and services."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from configs.schema import FunctionSettings, HttpReward, ModelReward, ModelSettings
from workers.api import RewardsApi
from workers.data import Codec, DataError, Row, load_tokenizer
from workers.data.batching import Rows, micro_batches
from workers.data.samples import Sample, SampleRefs
from workers.data.step_inputs import ScoringRequest
from workers.models.heads import ScalarModel
from workers.models.loading import context_length
from workers.models.shared_base import build
from workers.process.remote_error import summary
from workers.process.worker import Worker, WorkerSpec
from workers.rewards.function import RewardError, SampleRecord
from workers.rewards.function_process import FunctionProcess
from workers.rewards.http import Endpoint
from workers.rewards.result import Fault, RewardResult
from workers.training.value import score

_SHOWN_ANSWERS, _SHOWN_CHARACTERS = 3, 500
"""Limits on the answers without a score that are shown in the record of a failure."""


class RewardWorker(Worker, RewardsApi):
    """One rank of the reward role: scores its share of the answers with every source."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.device = torch.device(spec.device)
        self.models: dict[str, ScalarModel] = {}
        self.codecs: dict[str, Codec] = {}
        """Codecs of the reward models that use their own tokenizer."""
        self.sources: dict[str, FunctionProcess | Endpoint] = {}

    def tensors(self) -> Iterator[Tensor]:
        for model in self.models.values():
            yield from model.parameters()
            yield from model.buffers()

    def load(self, policy: str, model_paths: dict[str, str]) -> int:
        """Load the reward models (name -> folder); start the functions and judges. Returns the parameter count.

        policy: folder of the model whose answers are scored.
        """
        self._start_sources()  # functions are imported while the models load
        self._load_models(policy, model_paths)
        for source in self.sources.values():
            if isinstance(source, FunctionProcess):
                source.wait_ready()
        return sum(p.numel() for m in self.models.values() for p in m.parameters())

    def _start_sources(self) -> None:
        ppo = self.config.ppo
        assert ppo is not None
        judges = ppo.evaluation.judges if ppo.evaluation else []
        places = [f"ppo.rewards.{i}" for i in range(len(ppo.rewards))]
        places += [f"ppo.evaluation.judges.{i}" for i in range(len(judges))]
        for place, settings in zip(places, [*ppo.rewards, *judges], strict=True):
            if isinstance(settings, FunctionSettings):
                self.sources[settings.name] = FunctionProcess(settings, place, self.config.plugins)
            elif isinstance(settings, HttpReward):
                self.sources[settings.name] = Endpoint(settings, place)

    def _load_models(self, policy: str, model_paths: dict[str, str]) -> None:
        assert self.config.ppo is not None
        trust, started = self.config.model.trust_remote_code, self.spec.started
        self.codec = Codec.load(policy, self.config, self.config.model, started)
        own = {s.name for s in self.config.ppo.rewards if isinstance(s, ModelReward) and s.tokenizer == "own"}
        for name, path in model_paths.items():
            settings = ModelSettings(path=path, dtype=self.config.model.dtype, trust_remote_code=trust)
            if name in own:
                self.codecs[name] = Codec.load(path, self.config, settings, started)
            elif load_tokenizer(path, trust).get_vocab() != self.codec.tokenizer.get_vocab():
                raise RewardError(
                    f"reward {name}: {path} has another tokenizer than the policy ({policy}), whose tokens it must score; "
                    "tokenizer: own would fit"
                )
            hf, _ = build(self.base, path, settings, scalar=True, seed=self.config.seed, learns=False)
            self.models[name] = ScalarModel(hf).requires_grad_(False).eval().to(self.device)

    def scores(
        self, request: ScoringRequest, rollouts: SampleRefs, batches: list[Rows], names: list[str]
    ) -> dict[str, RewardResult]:
        """Scores of the request's samples from each of the named sources."""
        samples: list[Sample] = rollouts.fetch()
        results = {}
        for name in names:
            if name in self.codecs:
                results[name] = self._score_texts(name, request, samples)
            elif name in self.models:
                results[name] = RewardResult.of(score(self.models[name], samples, batches, self.device).tolist())
            else:
                results[name] = self._ask(self.sources[name], request, samples)
        return results

    def _score_texts(self, name: str, request: ScoringRequest, samples: list[Sample]) -> RewardResult:
        """Scores of a model with its own tokenizer and chat template: the answers are decoded and tokenised again."""
        assert self.config.ppo is not None
        model, longest = self.models[name], context_length(self.models[name].hf.config)
        rows = self.datasets[request.data]
        values: list[float | str] = []
        sequences: list[Sample] = []
        for row, sample in zip(request.prompts, samples, strict=True):
            try:
                sequence = self._read(self.codecs[name], rows[row], sample)
            except DataError as error:
                values.append(str(error))
                continue
            if longest is not None and len(sequence.ids) > longest:
                values.append(f"{len(sequence.ids)} tokens with the prompt, but the model takes at most {longest}")
                continue
            sequences.append(sequence)
            values.append(math.nan)
        if sequences:
            batches = micro_batches([len(s.ids) for s in sequences], self.config.ppo.micro_batch_tokens)
            scores = iter(score(model, sequences, batches, self.device).tolist())
            values = [value if isinstance(value, str) else next(scores) for value in values]
        return RewardResult.of(values)

    def _read(self, codec: Codec, row: Row, sample: Sample) -> Sample:
        """A sample in another codec's tokens; without an end token if the answer was cut off."""
        answer = sample.ids[sample.prompt_length :]
        sequence = codec.sequence(row.prompt, self.codec.answer_text(answer), row.tools)
        if answer[-1] in self.codec.ends:
            return sequence
        return Sample(sequence.ids[:-1], sequence.loss_mask[:-1])

    def _ask(self, source: FunctionProcess | Endpoint, request: ScoringRequest, samples: list[Sample]) -> RewardResult:
        rows = [self.datasets[request.data][i] for i in request.prompts]
        answers = [self.codec.answer_text(s.ids[s.prompt_length :]) for s in samples]
        names = dict.fromkeys(
            key for row in self.datasets[request.data] for key in row.columns
        )  # some rows may not have all columns
        columns = {key: [row.columns.get(key) for row in rows] for key in names}
        records = _records(request, samples) if source.wants_samples else None
        try:
            scored = source.score([row.prompt for row in rows], answers, columns, records)
        except Exception as error:  # a failing source must not end the others or the run
            # The message may quote the request to the service, including its token.
            secret = isinstance(source, Endpoint)
            why, detail = (type(error).__name__, "") if secret else (summary(error), traceback.format_exc())
            scored = RewardResult.nothing(len(answers), why, detail=detail)
        return replace(scored, faults=tuple(self._with_answers(fault, request, answers) for fault in scored.faults))

    def _with_answers(self, fault: Fault, request: ScoringRequest, answers: list[str]) -> Fault:
        """The fault with its first answers, for people to read."""
        lines = [
            f"row {request.prompts[i] + 1} of {request.data}, answer {request.numbers[i] + 1}: {answers[i][:_SHOWN_CHARACTERS]!r}"
            for i in fault.samples[:_SHOWN_ANSWERS]
        ]
        return replace(fault, detail="\n".join(filter(None, [*lines, fault.detail])))

    def texts(self, rollouts: SampleRefs) -> list[tuple[str, str]]:
        """(prompt, answer) of each sample as text, for people to read."""
        samples: list[Sample] = rollouts.fetch()
        codec = self.codec
        return [(codec.decode(s.ids[: s.prompt_length]), codec.answer_text(s.ids[s.prompt_length :])) for s in samples]


def _records(request: ScoringRequest, samples: list[Sample]) -> list[SampleRecord]:
    return [
        SampleRecord(
            sample.ids[: sample.prompt_length].tolist(),
            sample.ids[sample.prompt_length :].tolist(),
            bool(ended),
            int(number),
            request.step,
        )
        for sample, ended, number in zip(samples, request.ended, request.numbers, strict=True)
    ]
