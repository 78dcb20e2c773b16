"""The remote methods of workers: called by the driver, and by a trainer that sends weights.

A class whose methods are marked with `remote` declares a kind of worker; the worker's class implements it. Callers pass the
declared function, so a type checker finds misspelled names and wrong arguments:

    class JudgeApi(WorkerApi):                                      # also in a plugin: no registration is needed
        @remote(phase="score")
        @abstractmethod
        def judge(self, rollouts: SampleRefs) -> list[float]: ...

    class JudgeWorker(Worker, JudgeApi): ...

    group.call(JudgeApi.judge, rollouts)

A worker's class may mark its own methods instead if callers can import it. Ray transports arguments and results. A worker's
process rejects methods that are not declared. This module imports nothing heavy: drivers run without torch and vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_args

if TYPE_CHECKING:
    import numpy as np
    from ray.actor import ActorHandle

    from configs.schema import ModelSettings, OptimizerSettings, SamplingSettings
    from workers.data.batching import Rows
    from workers.data.samples import RaggedArray, RolloutBatch, SampleRefs
    from workers.data.step_inputs import RolloutInfo, ScoringRequest, SupervisedBatch, TrainStepInput
    from workers.process.inspection import ProcessLocation
    from workers.process.state_files import Files
    from workers.rewards.result import RewardResult
    from workers.training.schedule import StageStep
    from workers.training.skipped_steps import Arrays
    from workers.weight_sync.checksums import Checksums
    from workers.weight_sync.probe import Probe

Phase = Literal["start", "generate", "score", "train", "weight_sync", "save"]
"""Phase of a call. The settings `deadlines.<phase>` limit the time of a phase's calls."""

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_PHASE = "_remote_phase"


def remote(phase: Phase) -> Callable[[F], F]:
    """Declare a method of a worker as remote. Raises ValueError for an unknown phase."""
    if phase not in get_args(Phase):
        raise ValueError(f"phase of a remote method: was {phase!r}; must be {', '.join(get_args(Phase))}")

    def declare(method: F) -> F:
        setattr(method, _PHASE, phase)
        return method

    return declare


@dataclass(frozen=True)
class RemoteMethod:
    """Name and phase of a declared method."""

    name: str
    phase: Phase

    @classmethod
    def of(cls, method: Callable[..., Any]) -> RemoteMethod:
        """Raises TypeError if the method is not declared. An override of a declared method is not declared itself."""
        phase = getattr(method, _PHASE, None)
        if phase is None:
            raise TypeError(
                f"{method.__qualname__} cannot be called remotely: it is not marked with workers.api.remote"
            )
        return cls(method.__name__, phase)

    def __str__(self) -> str:
        return self.name


def is_remote(worker: type, name: str) -> bool:
    """Whether a worker's class or one of its bases declares a method of this name."""
    return any(hasattr(vars(base).get(name), _PHASE) for base in worker.__mro__)


@dataclass(frozen=True)
class Request(Generic[T]):
    """A call for one rank: a declared method and its arguments. `T` is the method's return type."""

    method: RemoteMethod
    args: tuple[Any, ...]


def request(method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Request[T]:
    """A request with these arguments, which a type checker compares with the method's parameters.

    Raises TypeError if the method is not declared remote, or has keyword-only parameters.
    """
    if kwargs:  # only positional arguments are sent
        bound = signature(method).bind(None, *args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(f"{method.__qualname__} has keyword-only parameters: {', '.join(bound.kwargs)}")
        return Request(RemoteMethod.of(method), bound.args[1:])
    return Request(RemoteMethod.of(method), args)


# ---------------------------------------------------------------- the kinds of worker


class WorkerApi(ABC):
    """Methods of every worker."""

    @remote(phase="start")
    @abstractmethod
    def location(self) -> ProcessLocation:
        """Location of its process."""

    @remote(phase="start")
    @abstractmethod
    def address(self) -> tuple[str, int]:
        """Host and a free port."""

    @remote(phase="start")
    @abstractmethod
    def join(self, address: tuple[str, int]) -> None:
        """Prepare for a process group whose first rank listens at this address."""

    @remote(phase="start")
    @abstractmethod
    def add_rows(self, name: str, rows: Any) -> None:
        """Store a dataset under a name. rows: the dataset, or a reference to it in the object store."""

    @remote(phase="start")
    @abstractmethod
    def mark(self, folder: str) -> str:
        """Create an empty file in a folder and return its name."""

    @remote(phase="score")
    @abstractmethod
    def memory(self) -> int:
        """Bytes of its process."""


class TrainerApi(WorkerApi):
    """A rank that holds a model, trained or frozen."""

    @remote(phase="start")
    @abstractmethod
    def load(
        self, path: str, settings: ModelSettings, optimizer: OptimizerSettings | None, dropout: float = 0.0
    ) -> int:
        """Load the model of a folder; without an optimizer it is frozen. Returns its parameter count."""

    @remote(phase="weight_sync")
    @abstractmethod
    def probe(self, version: int) -> Probe:
        """The model's outputs on random tokens, which depend on the version."""

    @remote(phase="train")
    @abstractmethod
    def skipped_batch(self) -> Arrays | None:
        """This rank's data of the last skipped optimizer step; None if no step was skipped since the previous call."""

    @remote(phase="save")
    @abstractmethod
    def save(self, folder: str) -> None:
        """Write a checkpoint."""

    @remote(phase="save")
    @abstractmethod
    def restore(self, folder: str) -> None:
        """Continue from a checkpoint."""

    @remote(phase="save")
    @abstractmethod
    def snapshot(self) -> tuple[Files, list[str]]:
        """This rank's files of a checkpoint, and their names."""

    @remote(phase="save")
    @abstractmethod
    def restore_snapshot(self, mine: Files, first: Files, names: list[str]) -> None:
        """Continue from the files of this rank and of the first rank; `names`: file names of all ranks."""

    @remote(phase="save")
    @abstractmethod
    def export(self, folder: str) -> None:
        """Write the model as a Hugging Face folder."""


class PolicyApi(TrainerApi):
    """The actor and the reference."""

    @remote(phase="train")
    @abstractmethod
    def train_demonstrations(self, part: SupervisedBatch, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """One optimizer step on demonstrations. Returns metrics of the whole batch."""

    @remote(phase="train")
    @abstractmethod
    def demonstration_loss(self, part: SupervisedBatch) -> dict[str, float]:
        """The mean loss on demonstrations, without training."""

    @remote(phase="score")
    @abstractmethod
    def log_probs(self, rollouts: SampleRefs, micro_batches: list[Rows]) -> tuple[RaggedArray, np.ndarray]:
        """Log-probabilities of the answers' tokens, and each answer's sum of log(actor / this model)."""

    @remote(phase="train")
    @abstractmethod
    def train_answers(self, step_input: TrainStepInput, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """The policy's updates of one PPO step. Returns metrics of the whole step."""

    @remote(phase="start")
    @abstractmethod
    def connect(self, engines: list[ActorHandle], transport: str, address: tuple[str, int]) -> None:
        """Connect to the engines that will receive weights."""

    @remote(phase="weight_sync")
    @abstractmethod
    def sync_weights(self, version: int) -> tuple[int, Probe]:
        """Send the weights to every engine. Returns the bytes of one copy, and the outputs that the engines must reproduce."""


class ValueApi(TrainerApi):
    """The critic, and the reward model while it is trained."""

    @remote(phase="train")
    @abstractmethod
    def train_pairs(self, part: SupervisedBatch, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """One optimizer step on preferences. Returns metrics of the whole batch."""

    @remote(phase="train")
    @abstractmethod
    def pair_accuracy(self, part: SupervisedBatch) -> dict[str, float]:
        """Loss and accuracy on preferences, without training."""

    @remote(phase="train")
    @abstractmethod
    def normalize(self, data: str, micro_batches: list[Rows]) -> tuple[float, float]:
        """Normalize the scores to mean 0 and deviation 1 on a dataset. Returns the mean and deviation before."""

    @remote(phase="score")
    @abstractmethod
    def values(self, rollouts: SampleRefs, micro_batches: list[Rows]) -> tuple[RaggedArray, np.ndarray]:
        """The value before each answer token, and the first value of each answer."""

    @remote(phase="train")
    @abstractmethod
    def train_values(self, step_input: TrainStepInput, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """The critic's updates of one PPO step. Returns metrics of the whole step."""


class RewardsApi(WorkerApi):
    """The reward role of PPO: reward models, functions and services."""

    @remote(phase="start")
    @abstractmethod
    def load(self, policy: str, model_paths: dict[str, str]) -> int:
        """Load the reward models (name -> folder) and start the other sources. Returns the parameter count."""

    @remote(phase="score")
    @abstractmethod
    def scores(
        self, request: ScoringRequest, rollouts: SampleRefs, batches: list[Rows], names: list[str]
    ) -> dict[str, RewardResult]:
        """Scores of the answers from each of the named sources."""

    @remote(phase="score")
    @abstractmethod
    def texts(self, rollouts: SampleRefs) -> list[tuple[str, str]]:
        """(prompt, answer) of each sample as text."""


class RolloutApi(WorkerApi):
    """An engine that generates answers. A trainer that sends weights calls the last four methods, in this order."""

    @remote(phase="start")
    @abstractmethod
    def load(self, path: str, transport: str, max_length: int) -> None:
        """Start the engine on the model of a folder. max_length: tokens of the longest sequence."""

    @remote(phase="generate")
    @abstractmethod
    def generate(
        self,
        data: str,
        prompts: np.ndarray,
        samples: np.ndarray,
        step: int,
        version: int | None = None,
        sampling: SamplingSettings | None = None,
    ) -> tuple[RolloutBatch, RolloutInfo]:
        """For each i, generate answer number samples[i] to row prompts[i] of a dataset. sampling: None: as in training.
        Raises StaleWeights."""

    @remote(phase="weight_sync")
    @abstractmethod
    def prove(self, version: int, probe: Probe) -> float:
        """The mean difference between the engine's and the trainer's outputs. Raises DifferentModel."""

    @remote(phase="weight_sync")
    @abstractmethod
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""

    @remote(phase="weight_sync")
    @abstractmethod
    def start_weight_update(self) -> None:
        """Stop serving the current version."""

    @remote(phase="weight_sync")
    @abstractmethod
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some of the tensors."""

    @remote(phase="weight_sync")
    @abstractmethod
    def finish_weight_update(self, version: int, checksums: Checksums) -> None:
        """Serve the version if the checksums match. Raises StaleWeights otherwise."""
