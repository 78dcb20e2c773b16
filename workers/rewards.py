"""The reward role: what an answer is worth, by trained models, Python functions and services."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from configs.schema import FunctionSettings, HttpReward, ModelSettings
from workers.batching import Rows
from workers.data import Codec
from workers.endpoint import Endpoint
from workers.function_process import FunctionProcess
from workers.functions import RewardError
from workers.models import ScalarModel, load_tokenizer
from workers.scored import Scored
from workers.sequences import Placed, Sample
from workers.shared import build
from workers.value import score
from workers.worker import Worker, WorkerSpec


class RewardWorker(Worker):
    """One rank of the reward role: its share of the answers, by every source."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.device = torch.device(spec.device)
        self.models: dict[str, ScalarModel] = {}
        self.sources: dict[str, FunctionProcess | Endpoint] = {}

    def tensors(self) -> Iterator[Tensor]:
        for model in self.models.values():
            yield from model.parameters()
            yield from model.buffers()

    def load(self, tokenizer_path: str, model_paths: dict[str, str]) -> int:
        """Load the reward models (name -> folder); start the functions and judges. Returns the parameter count."""
        self._start_sources()  # functions are imported while the models load
        self._load_models(tokenizer_path, model_paths)
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

    def _load_models(self, tokenizer_path: str, model_paths: dict[str, str]) -> None:
        trust = self.config.model.trust_remote_code
        self.codec = Codec(load_tokenizer(tokenizer_path, trust), self.config.chat_template)
        for name, path in model_paths.items():
            if load_tokenizer(path, trust).get_vocab() != self.codec.tokenizer.get_vocab():
                raise RewardError(
                    f"reward {name}: {path} has another tokenizer than the policy ({tokenizer_path}), whose tokens it is to score"
                )
            settings = ModelSettings(path=path, dtype=self.config.model.dtype, trust_remote_code=trust)
            hf, _ = build(self.base, path, settings, scalar=True, seed=self.config.seed, learns=False)
            self.models[name] = ScalarModel(hf).requires_grad_(False).eval().to(self.device)

    def scores(
        self, data: str, prompts: np.ndarray, rollouts: Placed, micro_batches: list[Rows], names: list[str]
    ) -> dict[str, Scored]:
        """What each of the named sources says of the samples; `prompts` are their rows in the dataset."""
        samples: list[Sample] = rollouts.fetch()
        found = {}
        for name in names:
            if name in self.models:
                found[name] = Scored.of(score(self.models[name], samples, micro_batches, self.device).tolist())
            else:
                found[name] = self._ask(self.sources[name], data, prompts, samples)
        return found

    def _ask(self, source: FunctionProcess | Endpoint, data: str, prompts: np.ndarray, samples: list[Sample]) -> Scored:
        rows = [self.datasets[data][i] for i in prompts]
        answers = [self.codec.decode(s.ids[s.prompt_length :]) for s in samples]
        names = dict.fromkeys(key for row in self.datasets[data] for key in row.columns)  # some rows may lack some
        columns = {key: [row.columns.get(key) for row in rows] for key in names}
        return source.score([row.prompt for row in rows], answers, columns)

    def texts(self, rollouts: Placed) -> list[tuple[str, str]]:
        """(prompt, answer) of each sample as text, for people to read."""
        samples: list[Sample] = rollouts.fetch()
        decode = self.codec.decode
        return [(decode(s.ids[: s.prompt_length]), decode(s.ids[s.prompt_length :])) for s in samples]
