"""The remote methods: what the driver, and a trainer that sends weights, may call in a worker's process.

A kind of worker is declared by a class whose methods are marked with `remote`; the worker's class implements it. Callers name
the declared function, so that a type checker sees a misspelled name and a wrong argument:

    class JudgeApi(WorkerApi):                                      # in a plugin too: nothing needs to be registered
        @remote(phase="score")
        @abstractmethod
        def judge(self, rollouts: SampleRefs) -> list[float]: ...

    class JudgeWorker(Worker, JudgeApi): ...

    group.call(JudgeApi.judge, rollouts)

A worker's class may mark its own methods instead, where callers can import it. Arguments and results travel through Ray. The
process of a worker refuses a method that is not declared. Nothing heavy is imported here: drivers do without torch and vLLM.
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

    from configs.schema import ModelSettings, OptimizerSettings
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
"""What a call belongs to. The settings `deadlines.<phase>` bound the calls of a phase."""

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_PHASE = "_remote_phase"


def remote(phase: Phase) -> Callable[[F], F]:
    """Declare a method of a worker as remote. Raises ValueError where there is no such phase."""
    if phase not in get_args(Phase):
        raise ValueError(f"no phase of a remote method: {phase!r}; there are {', '.join(get_args(Phase))}")

    def declare(method: F) -> F:
        setattr(method, _PHASE, phase)
        return method

    return declare


@dataclass(frozen=True)
class RemoteMethod:
    """The name and the phase of a declared method."""

    name: str
    phase: Phase

    @classmethod
    def of(cls, method: Callable[..., Any]) -> RemoteMethod:
        """Raises TypeError where the method is not declared: one that overrides a declared method is not."""
        phase = getattr(method, _PHASE, None)
        if phase is None:
            raise TypeError(
                f"{method.__qualname__} cannot be called remotely: it is not marked with workers.api.remote"
            )
        return cls(method.__name__, phase)

    def __str__(self) -> str:
        return self.name


def is_remote(worker: type, name: str) -> bool:
    """Whether a worker's class, or one that it derives from, declares a method of this name."""
    return any(hasattr(vars(base).get(name), _PHASE) for base in worker.__mro__)


@dataclass(frozen=True)
class Request(Generic[T]):
    """What one rank is asked: a declared method and its arguments. `T` is what the method returns."""

    method: RemoteMethod
    args: tuple[Any, ...]


def request(method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Request[T]:
    """A request with these arguments, which a type checker compares with the method's parameters.

    Raises TypeError where the method is not declared remote, or has parameters that only a keyword can give.
    """
    if kwargs:  # only positional arguments travel
        bound = signature(method).bind(None, *args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(f"{method.__qualname__} takes {', '.join(bound.kwargs)} by keyword alone")
        return Request(RemoteMethod.of(method), bound.args[1:])
    return Request(RemoteMethod.of(method), args)


# ---------------------------------------------------------------- the kinds of worker


class WorkerApi(ABC):
    """What every worker can be asked."""

    @remote(phase="start")
    @abstractmethod
    def location(self) -> ProcessLocation:
        """Where its process is."""

    @remote(phase="start")
    @abstractmethod
    def address(self) -> tuple[str, int]:
        """Host and a free port."""

    @remote(phase="start")
    @abstractmethod
    def join(self, address: tuple[str, int]) -> None:
        """Get ready for a process group whose first rank listens at this address."""

    @remote(phase="start")
    @abstractmethod
    def add_rows(self, name: str, rows: Any) -> None:
        """Store a dataset under a name. rows: the dataset, or a reference to it in the object store."""

    @remote(phase="start")
    @abstractmethod
    def mark(self, folder: str) -> str:
        """Make an empty file in a folder and return its name."""

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
        """What the model computes for random tokens, which depend on the version."""

    @remote(phase="train")
    @abstractmethod
    def skipped_batch(self) -> Arrays | None:
        """What this rank brought to the last optimizer step that was not applied; None where there is nothing new."""

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
        """Continue from this rank's and the first rank's files; `names` are those of all ranks."""

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
        """Log-probabilities of the answers' tokens; per answer, the sum of log(actor / this model)."""

    @remote(phase="train")
    @abstractmethod
    def train_answers(self, work: TrainStepInput, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
        """The policy's updates of one PPO step. Returns metrics of the whole step."""

    @remote(phase="start")
    @abstractmethod
    def connect(self, engines: list[ActorHandle], transport: str, address: tuple[str, int]) -> None:
        """Meet the engines that weights will be sent to."""

    @remote(phase="weight_sync")
    @abstractmethod
    def sync_weights(self, version: int) -> tuple[int, Probe]:
        """Send the weights to every engine. Returns the bytes of one copy, and what the engines must compute now."""


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
        """Give the scores mean 0 and deviation 1 on a dataset. Returns the mean and deviation that they had."""

    @remote(phase="score")
    @abstractmethod
    def values(self, rollouts: SampleRefs, micro_batches: list[Rows]) -> tuple[RaggedArray, np.ndarray]:
        """The value before each answer token; per answer, the first of them."""

    @remote(phase="train")
    @abstractmethod
    def train_values(self, work: TrainStepInput, at: StageStep, seed: tuple[int, ...]) -> dict[str, float]:
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
        """What each of the named sources says of the answers."""

    @remote(phase="score")
    @abstractmethod
    def texts(self, rollouts: SampleRefs) -> list[tuple[str, str]]:
        """(prompt, answer) of each sample as text."""


class RolloutApi(WorkerApi):
    """An engine that writes answers. A trainer calls the last four methods, in this order, when it sends weights."""

    @remote(phase="start")
    @abstractmethod
    def load(self, path: str, transport: str, max_length: int) -> None:
        """Start the engine on the model of a folder. max_length: tokens of the longest sequence."""

    @remote(phase="generate")
    @abstractmethod
    def generate(
        self, data: str, prompts: np.ndarray, samples: np.ndarray, step: int, version: int | None = None
    ) -> tuple[RolloutBatch, RolloutInfo]:
        """Answer number samples[i] to row prompts[i] of a dataset, for each i. Raises StaleWeights."""

    @remote(phase="weight_sync")
    @abstractmethod
    def prove(self, version: int, probe: Probe) -> float:
        """The mean difference between what the engine and the trainer compute. Raises DifferentModel."""

    @remote(phase="weight_sync")
    @abstractmethod
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer."""

    @remote(phase="weight_sync")
    @abstractmethod
    def start_weight_update(self) -> None:
        """Stop serving the version that is there."""

    @remote(phase="weight_sync")
    @abstractmethod
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take some of the tensors."""

    @remote(phase="weight_sync")
    @abstractmethod
    def finish_weight_update(self, version: int, checksums: Checksums) -> None:
        """Serve the version if what arrived is what was sent. Raises StaleWeights."""
