"""The worker groups of a stage, and what the driver asks of them.

    team = Team.start(config, plan)
    team.load(model, {"model": reward_model})
    team.add_prompts("prompts", rows)
    rollouts = team.generate("prompts", picked, step).get()               # references and lengths, no tokens
    reference, values, scores = together(team.log_probs(rollouts), team.values(rollouts), team.scores(rollouts, ["model"]))
    together(team.train_actor(...), team.train_critic(...))
    team.publish(version)

`generate`, `log_probs`, `values`, `scores` and `train_...` give a Call, to be run alone (`.get()`) or with others (`together`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.schema import ModelSettings, Role, RunConfig
from orchestrator.calls import Call, WorkerGroup, together
from orchestrator.run import local
from placement.groups import PlacementError, bundle_of, create_groups, remove_groups
from placement.plan import Plan
from workers.batching import Rows, aligned_micro_batches, balance
from workers.data import Row
from workers.host import Host
from workers.sequences import Placed
from workers.work import MiniBatch, Part, Work, Written
from workers.worker import WorkerSpec, environment

KINDS: dict[Role, str] = {
    "actor": "policy",
    "reference": "policy",
    "critic": "value",
    "reward": "rewards",
    "rollout": "rollout",
}


@dataclass(frozen=True)
class Rollouts:
    """A step's answers: where they lie, and what the driver may know of them. Arrays are [samples]."""

    data: str
    prompts: np.ndarray
    """Rows of the dataset."""
    placed: Placed
    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    ended: np.ndarray
    """Which answers ended by themselves."""
    versions: frozenset[int]
    """Policy versions that wrote them."""

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.answer_lengths

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Column:
    """A value per answer token, where it lies, and one number per answer."""

    placed: Placed
    per_answer: np.ndarray


@dataclass(frozen=True)
class Experience:
    """Scored rollouts."""

    rollouts: Rollouts
    reference: Column
    values: Column | None
    scores: np.ndarray
    """[samples] as they are trained on."""
    kl_coefficient: float
    ptx: list[np.ndarray] = field(default_factory=list)
    """Rows of demonstrations beside each mini-batch."""


class Team:
    """The worker groups of one stage."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self.config = config
        self.plan = plan
        self.groups: dict[Role, WorkerGroup] = {}
        self.lengths: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._places: dict[str, PlacementGroup] = {}
        self.transport = _transport(config, plan)

    # ------------------------------------------------------------ life

    @classmethod
    def start(cls, config: RunConfig, plan: Plan) -> Team:
        """Reserve the placement groups and start every worker; nothing is loaded yet."""
        team = cls(config, plan)
        try:
            team._places = create_groups(plan, config.name, config.placement.timeout)
            team.groups = {role: team._start_role(role) for role in plan.roles}
            team._meet()
        except BaseException:
            team.stop()
            raise
        return team

    def _start_role(self, role: Role) -> WorkerGroup:
        planned = self.plan.roles[role]
        kind = "value" if role == "reward" and self.plan.stage == "rm" else KINDS[role]
        handles = []
        for rank in range(planned.ranks):
            place, bundle = bundle_of(self.plan, role, rank)
            spec = WorkerSpec(self.config, role, rank, planned.ranks, self.plan.device, planned.threads)
            options: dict[str, Any] = {
                "name": f"{self.config.name}/{role}-{rank}",
                "namespace": "troupe",
                "num_cpus": planned.cpus,
                "num_gpus": planned.gpus,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._places[place], bundle),
                "runtime_env": {"env_vars": environment(self.config, role, self.plan.device, planned.threads)},
            }
            handles.append(ray.remote(Host).options(**options).remote(kind, spec))
        return WorkerGroup(role, tuple(handles), planned.group, self.config.cluster.call_timeout)

    def _meet(self) -> None:
        """Tell the ranks of each training role where they meet."""
        starting = [replace(group, timeout=self.config.cluster.start_timeout) for group in self.groups.values()]
        addresses = together(*(group.call("address") for group in starting))
        together(*(group.call("join", ranks[0]) for group, ranks in zip(starting, addresses, strict=True)))

    def stop(self) -> None:
        """End the workers and give their placement groups back."""
        for group in self.groups.values():
            for handle in group.handles:
                ray.kill(handle)
        try:
            remove_groups(self._places)
        except PlacementError as error:  # an end that is slow must not hide why it came
            logging.getLogger("troupe").warning("%s", error)
        self.groups, self._places = {}, {}

    def load(self, model: str, reward_models: Mapping[str, str]) -> None:
        """Load every role of the PPO stage at the same time, and let the actor meet the engines.

        model: folder that the actor, the reference and the engines start from. reward_models: name in `ppo.rewards` ->
        folder; the critic starts from the first, or from `model` where there is none.
        """
        groups, ppo = self.groups, self.config.ppo
        assert ppo is not None
        model, paths = local(model), {name: local(path) for name, path in reward_models.items()}
        actor = pretrained(self.config.model)
        if actor.lora:  # the policy that learns must be the policy that sampled
            actor = actor.model_copy(update={"lora": actor.lora.model_copy(update={"dropout": 0.0})})
        critic = next(iter(paths.values()), model)
        longest = ppo.max_prompt_tokens + self.config.rollout.max_new_tokens
        together(
            groups["actor"].call("load", model, actor, ppo.actor_optimizer),
            groups["critic"].call("load", critic, actor, ppo.critic_optimizer) if "critic" in groups else None,
            groups["reference"].call("load", model, actor, None),
            groups["reward"].call("load", model, paths),
            groups["rollout"].call("load", model, self.transport, longest),
        )
        self._connect()

    def export(self, role: Role, folder: str | Path) -> None:
        """Write a role's model as a plain Hugging Face folder: adapters merged, and the adapter beside it."""
        self.groups[role].call("export", str(Path(folder).absolute())).get()

    def add_prompts(self, name: str, rows: Sequence[Row]) -> None:
        """Give prompts to the engines, and to the reward role, whose functions get the rows' other columns.

        Raises WorkerError where a prompt is longer than `ppo.max_prompt_tokens`.
        """
        assert self.config.ppo is not None
        self.add_data(name, rows, ["rollout", "reward"])
        lengths = self.groups["rollout"].call("tokenize", name, self.config.ppo.max_prompt_tokens).get()[0]
        self.lengths[name] = (lengths, np.zeros_like(lengths))

    def add_data(self, name: str, rows: Sequence[Row], roles: Sequence[Role]) -> None:
        """Give a dataset to the workers of some roles, through the object store."""
        ref = ray.put(list(rows))
        together(*(self.groups[role].call("add_rows", name, ref) for role in roles))

    def memory(self) -> dict[Role, int]:
        """Bytes of each role's workers, proportional set size."""
        roles = list(self.groups)
        return dict(
            zip(roles, (sum(m) for m in together(*(self.groups[r].call("memory") for r in roles))), strict=True)
        )

    # ------------------------------------------------------------ rollouts

    def generate(self, data: str, rows: np.ndarray, step: int, samples: int = 1) -> Call[Rollouts]:
        """Answer each of the dataset's rows `samples` times; answers to one prompt stand side by side."""
        group = self.groups["rollout"]
        times = [int((rows[:i] == row).sum()) for i, row in enumerate(rows)]  # a prompt may come twice in a step
        prompts = np.repeat(rows, samples)
        numbers = np.concatenate([np.arange(samples) + samples * before for before in times])
        shares = self._share_out(self.lengths[data][0][prompts], len(group))

        def gather(results: list[tuple[Any, Written]]) -> Rollouts:
            def ordered(name: str) -> np.ndarray:
                return _in_order(shares, [getattr(written, name) for _, written in results], len(prompts))

            placed = Placed.of([ref for ref, _ in results], shares, len(prompts))
            return Rollouts(
                data,
                prompts,
                placed,
                prompt_lengths=ordered("prompt_lengths"),
                answer_lengths=ordered("answer_lengths"),
                ended=ordered("ended"),
                versions=frozenset(written.version for _, written in results),
            )

        args = [(data, prompts[share], numbers[share], step) for share in shares]
        return group.scatter("generate", args, keep=1, then=gather)

    def _share_out(self, prompt_lengths: np.ndarray, engines: int) -> list[np.ndarray]:
        """Give each answer, the longest first, to the engine with the fewest tokens outstanding."""
        outstanding = [0] * engines
        shares: list[list[int]] = [[] for _ in range(engines)]
        for i in np.argsort(-prompt_lengths, kind="stable"):
            engine = outstanding.index(min(outstanding))
            outstanding[engine] += int(prompt_lengths[i]) + self.config.rollout.max_new_tokens
            shares[engine].append(int(i))
        return [np.sort(np.array(share, np.intp)) for share in shares]

    # ------------------------------------------------------------ scores

    def log_probs(self, rollouts: Rollouts) -> Call[Column]:
        """The reference's log-probabilities; per answer, the sum of log(actor / reference)."""
        return self._column("reference", "log_probs", rollouts)

    def values(self, rollouts: Rollouts) -> Call[Column] | None:
        """The critic's values, where there is a critic."""
        return self._column("critic", "values", rollouts) if "critic" in self.groups else None

    def _column(self, role: Role, method: str, rollouts: Rollouts) -> Call[Column]:
        shards, micro_batches = self._shards(role, rollouts.lengths)

        def gather(results: list[tuple[Any, np.ndarray]]) -> Column:
            placed = Placed.of([ref for ref, _ in results], shards, len(rollouts))
            return Column(placed, _in_order(shards, [numbers for _, numbers in results], len(rollouts)))

        args = [(rollouts.placed.take(rows), micro) for rows, micro in zip(shards, micro_batches, strict=True)]
        return self.groups[role].scatter(method, args, keep=1, then=gather)

    def scores(self, rollouts: Rollouts, names: Sequence[str]) -> Call[dict[str, np.ndarray]]:
        """Scores [samples] by each of the named sources (rewards or judges)."""
        shards, micro_batches = self._shards("reward", rollouts.lengths)

        def gather(results: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
            return {name: _in_order(shards, [r[name] for r in results], len(rollouts)) for name in names}

        args = [
            (rollouts.data, rollouts.prompts[rows], rollouts.placed.take(rows), micro, list(names))
            for rows, micro in zip(shards, micro_batches, strict=True)
        ]
        return self.groups["reward"].scatter("scores", args, then=gather)

    def texts(self, rollouts: Rollouts) -> list[tuple[str, str]]:
        """(prompt, answer) of each sample, for people to read."""
        return self.groups["reward"].first("texts", rollouts.placed)

    def _shards(self, role: Role, lengths: np.ndarray) -> tuple[list[Rows], list[list[Rows]]]:
        """Samples of each rank and its micro-batches of them, balanced by tokens.

        Ranks work in lockstep on equally many samples: where they do not divide, the first samples are scored twice.
        """
        assert self.config.ppo is not None
        ranks = len(self.groups[role])
        rows = np.resize(np.arange(len(lengths)), -(-len(lengths) // ranks) * ranks)
        shards = [rows[part] for part in balance(lengths[rows], ranks)]
        return shards, aligned_micro_batches([lengths[s] for s in shards], self.config.ppo.micro_batch_tokens)

    # ------------------------------------------------------------ training

    def train_actor(
        self, experience: Experience, progress: float, step: int, update: bool = True
    ) -> Call[dict[str, float]]:
        """The policy's updates of a step. Without `update` the weights stay and only the log-prob gap is measured."""
        return self._train("actor", "train_answers", experience, progress, step, update)

    def train_critic(self, experience: Experience, progress: float, step: int) -> Call[dict[str, float]] | None:
        """The critic's updates of a step, where there is a critic."""
        if "critic" not in self.groups:
            return None
        return self._train("critic", "train_values", experience, progress, step, True)

    def _train(
        self, role: Role, method: str, experience: Experience, progress: float, step: int, update: bool
    ) -> Call[dict[str, float]]:
        works = self._works(role, experience, step, update)
        seed = (self.config.seed, step)
        return self.groups[role].scatter(
            method, [(work, progress, seed) for work in works], then=lambda results: results[0]
        )

    def _works(self, role: Role, experience: Experience, step: int, update: bool) -> list[Work]:
        """Each rank's part of a step. Which samples make up a mini-batch does not depend on the number of ranks."""
        ppo, rollouts, ranks = self.config.ppo, experience.rollouts, len(self.groups[role])
        assert ppo is not None
        order = np.random.default_rng((self.config.seed, step)).permutation(len(rollouts))
        mine: list[list[Rows]] = [[] for _ in range(ranks)]
        minis: list[list[MiniBatch]] = [[] for _ in range(ranks)]
        for k, samples in enumerate(np.split(order, ppo.mini_batches)):
            shards = [samples[part] for part in balance(rollouts.lengths[samples], ranks)]
            micro_batches = aligned_micro_batches([rollouts.lengths[s] for s in shards], ppo.micro_batch_tokens)
            ptx = (
                self.parts("actor", "sft", experience.ptx[k], ppo.micro_batch_tokens)
                if role == "actor" and experience.ptx
                else None
            )
            tokens = int(rollouts.answer_lengths[samples].sum())
            for rank, (rows, micro) in enumerate(zip(shards, micro_batches, strict=True)):
                before = sum(map(len, mine[rank]))
                minis[rank].append(MiniBatch([before + m for m in micro], tokens, ptx[rank] if ptx else None))
                mine[rank].append(rows)
        return [
            self._work(experience, np.concatenate(rows), mini, update) for rows, mini in zip(mine, minis, strict=True)
        ]

    def _work(self, experience: Experience, rows: Rows, mini_batches: list[MiniBatch], update: bool) -> Work:
        return Work(
            rollouts=experience.rollouts.placed.take(rows),
            reference=experience.reference.placed.take(rows),
            values=experience.values.placed.take(rows) if experience.values else None,
            scores=experience.scores[rows].astype(np.float32),
            groups=experience.rollouts.prompts[rows],
            kl_coefficient=experience.kl_coefficient,
            mini_batches=mini_batches,
            update=update,
        )

    def tokenize(self, role: Role, name: str, kind: str, max_length: int) -> None:
        """Let a role's ranks tokenise a dataset's rows."""
        self.lengths[name] = self.groups[role].call("tokenize", name, kind, max_length).get()[0]

    def parts(self, role: Role, name: str, rows: np.ndarray, max_tokens: int) -> list[Part]:
        """Each rank's part of a batch of dataset rows, balanced by tokens."""
        lengths, completions = self.lengths[name]
        shards = [rows[part] for part in balance(lengths[rows], len(self.groups[role]))]
        micro_batches = aligned_micro_batches([lengths[s] for s in shards], max_tokens)
        count = int(completions[rows].sum())
        return [Part(name, [s[m] for m in micro], count) for s, micro in zip(shards, micro_batches, strict=True)]

    # ------------------------------------------------------------ weights

    def _connect(self) -> None:
        """Let the actor's ranks meet the engines."""
        actor, engines = self.groups["actor"], list(self.groups["rollout"].handles)
        address = actor.call("address").get()[0]
        actor.call("connect", engines, self.transport, address).get()

    def publish(self, version: int) -> int:
        """Give the actor's weights to every engine under a version. Returns the bytes of one copy."""
        return self.groups["actor"].call("publish", version).get()[0]


def pretrained(settings: ModelSettings) -> ModelSettings:
    """The same for a model that has weights."""
    return settings.model_copy(update={"init": "pretrained"})


def _in_order(shards: list[Rows], parts: list[np.ndarray], count: int) -> np.ndarray:
    out = np.empty(count, parts[0].dtype)
    for rows, part in zip(shards, parts, strict=True):
        out[rows] = part
    return out


def _transport(config: RunConfig, plan: Plan) -> str:
    if config.publish.transport != "auto":
        return config.publish.transport
    if plan.device == "cpu":
        return "object_store"
    same = "rollout" in plan.roles and plan.roles["actor"].group == plan.roles["rollout"].group
    return "ipc" if same else "nccl"
