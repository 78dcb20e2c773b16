"""How long a call to a worker may take: as the config says, or in proportion to what the same call took before."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import Literal, get_args

from configs.schema import DeadlineSettings, Role

Phase = Literal["start", "generate", "score", "train", "publish", "save"]

PHASES: dict[str, Phase] = {
    **dict.fromkeys(("location", "address", "join", "mark", "load", "connect", "add_rows"), "start"),
    "generate": "generate",
    **dict.fromkeys(("log_probs", "values", "scores", "texts", "memory"), "score"),
    **dict.fromkeys(("publish", "probe", "prove"), "publish"),
    **dict.fromkeys(("save", "restore", "snapshot", "restore_snapshot", "export"), "save"),
}
"""Method of a worker -> phase; every other method trains."""

BACKWARD = 3.0
"""What a forward and a backward pass of a token cost together, in forward passes."""
_REMEMBERED = 20
"""Calls of a method, the latest ones, that deadlines are learnt from: a machine may become slower, and what the first calls
took is no measure for ever."""


def phase_of(method: str) -> Phase:
    return PHASES.get(method, "train")


@dataclass(frozen=True)
class Workload:
    """What a call has to do, in units of two kinds. The time of a call is at most proportional to the larger of the two."""

    tokens: float = 1.0
    """Tokens through a model, over all ranks; one that is trained on counts `BACKWARD` times."""
    steps: float = 1.0
    """What comes one after the other however few tokens there are: tokens of an engine's longest answer, micro-batches that are
    scored, updates of a model's weights."""

    def times(self, other: Workload) -> float:
        """How many times as long as the other this may take, at least once: small calls have their fixed costs. Infinite where
        this does something of which the other did nothing."""
        return max(1.0, _ratio(self.tokens, other.tokens), _ratio(self.steps, other.steps))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf if a else 0.0


@dataclass(frozen=True)
class Awaited:
    """A call that the driver waits for; of several the one whose deadline is the next."""

    role: Role
    ranks: tuple[int, ...]
    """Those that have not answered."""
    method: str
    since: float
    """Seconds since the epoch, as is `until`, its deadline."""
    until: float
    setting: str
    """Dotted path of the setting that bounds it."""


class Deadlines:
    """The deadlines of a team's calls. A call that has been made before gets `patience` times what the latest calls of its
    name took, in proportion to what it has to do where that is more than they did, and `least` seconds at least; one that is
    like none before gets `first`. A phase that the config names gets what it says."""

    def __init__(self, settings: DeadlineSettings) -> None:
        self._settings = settings
        self._seen: dict[str, deque[tuple[Workload, float]]] = {}
        self._missed: Counter[str] = Counter()
        self.awaited: Awaited | None = None
        """What the driver waits for at this moment."""
        self.busy: dict[tuple[Role, str], float] = defaultdict(float)
        """Seconds that answered calls took, by role and method."""

    def seconds(self, method: str, work: Workload) -> float:
        """Seconds for a call that may have to do so much."""
        phase, settings = phase_of(method), self._settings
        if fixed := getattr(settings, phase):
            return float(fixed)
        expected = [seconds * work.times(done) for done, seconds in self._seen.get(method, ())]
        if not (known := [seconds for seconds in expected if math.isfinite(seconds)]):
            return settings.first
        # Who was slow and healthy must not be ended again and again: the next attempt gets twice the time.
        return max(settings.least, settings.patience * max(known)) * 2.0 ** self._missed[method]

    def observe(self, method: str, done: Workload, seconds: float) -> None:
        """Note that a call did so much in so many seconds."""
        self._seen.setdefault(method, deque(maxlen=_REMEMBERED)).append((done, seconds))
        self._missed[method] = 0

    def missed(self, method: str) -> None:
        """Note that a call did not end by its deadline."""
        self._missed[method] += 1

    def taken(self) -> dict[tuple[Role, str], float]:
        """What `busy` holds since this was last called."""
        taken, self.busy = self.busy, defaultdict(float)
        return taken

    def setting(self, method: str) -> str:
        """Dotted path of the setting that bounds a call."""
        phase = phase_of(method)
        return f"deadlines.{phase}" if getattr(self._settings, phase) else "deadlines.first, .least and .patience"


assert set(get_args(Phase)) <= set(DeadlineSettings.model_fields)
