"""The reward role: what an answer is worth, by trained models and by Python functions."""

from __future__ import annotations

import numpy as np
import torch

from configs.schema import FunctionReward, Judge, ModelSettings
from workers.batching import Rows
from workers.data import Codec
from workers.functions import RewardError, RewardFunction, find_function
from workers.models import ScalarModel, load_hf, load_tokenizer
from workers.sequences import Placed, Sample
from workers.value import score
from workers.worker import Worker, WorkerSpec


class RewardWorker(Worker):
    """One rank of the reward role: its share of the answers, by every source."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.device = torch.device(spec.device)
        self.models: dict[str, ScalarModel] = {}
        self.functions: dict[str, RewardFunction] = {}

    def load(self, tokenizer_path: str, model_paths: dict[str, str]) -> int:
        """Load the reward models (name -> folder) and import the functions and judges. Returns the parameter count."""
        ppo = self.config.ppo
        assert ppo is not None
        trust = self.config.model.trust_remote_code
        self.codec = Codec(load_tokenizer(tokenizer_path, trust), self.config.chat_template)
        for name, path in model_paths.items():
            if load_tokenizer(path, trust).get_vocab() != self.codec.tokenizer.get_vocab():
                raise RewardError(
                    f"reward {name}: {path} has another tokenizer than the policy ({tokenizer_path}), whose tokens it is to score"
                )
            settings = ModelSettings(path=path, dtype=self.config.model.dtype, trust_remote_code=trust)
            hf = load_hf(settings, path, scalar=True, seed=self.config.seed)
            self.models[name] = ScalarModel(hf).requires_grad_(False).eval().to(self.device)
        judges = ppo.evaluation.judges if ppo.evaluation else []
        for source in [*ppo.rewards, *judges]:
            if isinstance(source, FunctionReward | Judge):
                self.functions[source.name] = find_function(source.function, f"rewards {source.name}")
        return sum(p.numel() for m in self.models.values() for p in m.parameters())

    def scores(
        self, data: str, prompts: np.ndarray, rollouts: Placed, micro_batches: list[Rows], names: list[str]
    ) -> dict[str, np.ndarray]:
        """Source -> float32 [samples] for the named sources; `prompts` are the samples' rows in the dataset."""
        samples: list[Sample] = rollouts.fetch()
        found = {}
        for name in names:
            if name in self.models:
                found[name] = score(self.models[name], samples, micro_batches, self.device)
            else:
                found[name] = self._call(name, data, prompts, samples)
        return found

    def _call(self, name: str, data: str, prompts: np.ndarray, samples: list[Sample]) -> np.ndarray:
        rows = [self.datasets[data][i] for i in prompts]
        answers = [self.codec.decode(s.ids[s.prompt_length :]) for s in samples]
        names = dict.fromkeys(key for row in self.datasets[data] for key in row.columns)  # some rows may lack some
        columns = {key: [row.columns.get(key) for row in rows] for key in names}
        try:
            values = self.functions[name]([row.prompt for row in rows], answers, **columns)
            scores = np.asarray(values, dtype=np.float32)
        except Exception as error:  # whatever it is: it must be known whose it is
            raise RewardError(f"reward {name}: {type(error).__name__}: {error}") from error
        if scores.shape != (len(samples),) or not np.isfinite(scores).all():
            raise RewardError(
                f"reward {name}: gave {values!r} for {len(samples)} answers; one finite number each is needed"
            )
        return scores

    def texts(self, rollouts: Placed) -> list[tuple[str, str]]:
        """(prompt, answer) of each sample as text, for people to read."""
        samples: list[Sample] = rollouts.fetch()
        decode = self.codec.decode
        return [(decode(s.ids[: s.prompt_length]), decode(s.ids[s.prompt_length :])) for s in samples]
