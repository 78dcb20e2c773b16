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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.schema import ModelSettings, Role, RunConfig
from configs.strategies import ZERO
from orchestrator.calls import Call, WorkerGroup, together
from orchestrator.deadlines import Deadlines
from orchestrator.failures import Rank, WorkerError, end, on_node
from orchestrator.recovery import Recovery
from orchestrator.rollouts import Column, Experience, Rollouts
from orchestrator.run import local
from orchestrator.snapshot import RankFiles, Snapshot, alive_nodes
from placement.groups import PlacementError, await_groups, bundle_of, create_groups, remove_groups
from placement.plan import Plan
from placement.shape import transport_of
from placement.site import floor_to
from placement.turns import by_turns
from troupe_imports import Actor
from workers.batching import Rows, aligned_micro_batches, balance
from workers.data import Row
from workers.files import copy_files
from workers.scored import Scored
from workers.sequences import Placed
from workers.work import MiniBatch, Part, StaleWeights, Work, Written
from workers.worker import WorkerSpec, environment

Changed = Callable[["Team"], None]

KINDS: dict[Role, str] = {
    "actor": "policy",
    "reference": "policy",
    "critic": "value",
    "reward": "rewards",
    "rollout": "rollout",
}


class Team:
    """The worker groups of one stage."""

    def __init__(self, config: RunConfig, plan: Plan, recovery: Recovery | None, changed: Changed | None) -> None:
        self.config = config
        self.plan = plan
        self._changed = changed or (lambda team: None)
        self.recovery = recovery or Recovery(config.recovery)
        self.deadlines = Deadlines(config.deadlines)
        self.groups: dict[Role, WorkerGroup] = {}
        self.lengths: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.version = 0
        """Policy version that the engines serve."""
        self._places: dict[str, PlacementGroup] = {}
        self._starts: Counter[tuple[Role, int]] = Counter()
        self.transport = transport_of(config, plan)

    # ------------------------------------------------------------ life

    @classmethod
    def start(
        cls,
        config: RunConfig,
        plan: Plan,
        recovery: Recovery | None = None,
        changed: Changed | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Team:
        """Reserve the placement groups and start every worker; nothing is loaded yet.

        recovery: which failures are survived, and where they are written; none: as the config says, and nowhere.
        changed: called with the team when there are new workers.
        say: called with a line that says who holds the room that the run waits for.
        """
        team = cls(config, plan, recovery, changed)
        try:
            team._places = create_groups(plan, config.name, config.placement.timeout, say)
            fellows: list[WorkerGroup] = []
            for role, planned in plan.roles.items():
                group = WorkerGroup(role, [], planned.group, team.deadlines, fellows=fellows)
                if role == "rollout" or (role in ("reference", "reward") and plan.stage == "ppo"):
                    # With a process that serves others too, what those had learned is gone.
                    group.mend = team._mend if planned.crew == (role,) else None
                    group.collective = role == "reference" or len(planned.crew) > 1
                team.groups[role] = group
                fellows.append(group)
            team._spawn({role: range(planned.ranks) for role, planned in plan.roles.items()})
            team._meet({role: list(range(len(group))) for role, group in team.groups.items()})
        except BaseException:
            team.stop()
            raise
        return team

    def _spawn(self, ranks: Mapping[Role, Sequence[int]]) -> None:
        """Start the processes of these ranks of roles; roles that share a process stand there with the same ranks."""
        for crew in dict.fromkeys(self.plan.roles[role].crew for role in ranks):
            for rank in ranks[crew[0]]:
                handle = self._start_process(crew, rank)
                for role in crew:
                    handles = self.groups[role].handles
                    handles[rank : rank + 1] = [handle]

    def _start_process(self, crew: tuple[Role, ...], rank: int) -> ActorHandle:
        """The process of a rank of one role, or of several that share one."""
        plans = [self.plan.roles[role] for role in crew]
        first, device = plans[0], self.plan.device
        place, bundle = bundle_of(self.plan, first.role, rank)
        started = self._starts[crew[0], rank]
        self._starts.update((role, rank) for role in crew)
        options: dict[str, Any] = {
            "name": f"{self.config.name}/{'+'.join(crew)}-{rank}" + (f" restart {started}" if started else ""),
            "namespace": "troupe",
            "num_cpus": floor_to(sum(planned.cpus for planned in plans), 4),
            "num_gpus": floor_to(sum(planned.gpus for planned in plans), 4),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._places[place], bundle),
            "runtime_env": {"env_vars": environment(self.config, first.role, device, first.threads)},
        }
        hosted = [
            (
                "value" if role == "reward" and self.plan.stage == "rm" else KINDS[role],
                WorkerSpec(self.config, role, rank, first.ranks, device, first.threads, by_turns(self.plan, role)),
            )
            for role in crew
        ]
        return ray.remote(Actor).options(**options).remote("workers.host:Host", hosted)

    def _meet(self, new: Mapping[Role, Sequence[int]]) -> None:
        """Find out where new workers are, and tell the ranks of each role where they meet."""
        found = together(*(self.groups[role].to(ranks, "whereabouts") for role, ranks in new.items()))
        for (role, ranks), places in zip(new.items(), found, strict=True):
            self.groups[role].whereabouts |= dict(zip(ranks, places, strict=True))
        self._changed(self)
        addresses = together(*(self.groups[role].to(ranks, "address") for role, ranks in new.items()))
        meet = {role: each[0] for role, each in zip(new, addresses, strict=True)}
        together(*(self.groups[role].to(ranks, "join", meet[role]) for role, ranks in new.items()))

    def stop(self) -> None:
        """End the workers and give their placement groups back."""
        for handle in {handle for group in self.groups.values() for handle in group.handles}:
            ray.kill(handle)
        try:
            remove_groups(self._places)
        except PlacementError as error:  # an end that is slow must not hide why it came
            logging.getLogger("troupe").warning("%s", error)
        self.groups, self._places = {}, {}

    # ------------------------------------------------------------ recovery

    def replace(self, error: WorkerError, anew: Sequence[Role] = ()) -> None:
        """Replace the casualties of a failure, all ranks of a role that compute together, and tell the new ones all that the
        old ones were told. What those had learned since is gone: see `restore`. `anew`: roles that begin anew as well.

        Raises the error where it is not to be survived, PlacementError where a lost node leaves no room.
        """
        try:
            self.recovery.consider(error)
        except WorkerError:
            end(error.failure.places)  # a stopped process would outlive the run
            raise
        lost: dict[Role, list[int]] = {}
        for role, rank in self._due(error):
            lost.setdefault(role, []).append(rank)
        for role in [*lost, *anew]:
            if role in anew or self.groups[role].collective:
                lost |= {fellow: list(range(len(self.groups[fellow]))) for fellow in self.plan.roles[role].crew}
        lost = {role: lost[role] for role in self.groups if role in lost}  # they load in the order of a start
        gone = [(role, rank) for role, ranks in lost.items() for rank in ranks]
        known = {place: where for role in lost for place, where in self.groups[role].places().items()}
        end({rank: known[rank] for rank in gone if rank in known})
        for role, rank in gone:
            ray.kill(self.groups[role].handles[rank])
        await_groups(self.plan, self.config.name, self._places, self.config.recovery.node_timeout)
        self._spawn(lost)
        self._meet(lost)
        for calls in zip_longest(*(self.groups[role].prepared(ranks) for role, ranks in lost.items())):
            together(*calls)
        if "rollout" in self.groups and lost.keys() & {"actor", "rollout"}:
            self._connect()

    def _due(self, error: WorkerError) -> list[Rank]:
        """The casualties that were not replaced since, because of another error that named them too."""
        known = error.failure.places
        return [
            (role, rank)
            for role, rank in error.failure.casualties
            if (role, rank) not in known or known[role, rank] == self.groups[role].whereabouts.get(rank)
        ]

    def _mend(self, error: WorkerError) -> None:
        """Replace workers without state. New engines get the weights that the others have."""
        if due := self._due(error):
            self.replace(error)
            if self.version and any(role == "rollout" for role, _ in due):
                self.publish(self.version)

    def snapshot(self, step: int, state: dict[str, Any], roles: Sequence[Role]) -> Snapshot:
        """Copy what roles have learned into the object store; where there are several nodes, onto another node too."""
        groups = [self.groups[role] for role in roles]
        found = together(*(group.scatter("snapshot", [()] * len(group), keep=1) for group in groups))
        nodes = sorted(alive_nodes())
        files: dict[Role, list[RankFiles]] = {role: [] for role in roles}
        for group, ranks in zip(groups, found, strict=True):
            for rank, (ref, names) in enumerate(ranks):
                node = group.whereabouts[rank].node
                others = [other for other in nodes if other != node]
                copies = {node: ref}
                if others:
                    other = others[rank % len(others)]
                    copies[other] = on_node(other, copy_files, ref)
                files[group.role].append(RankFiles(names, node, copies))
        return Snapshot(step, state, files)

    def restore(self, snapshot: Snapshot) -> None:
        """Give roles back what they had learned."""
        calls: list[Call[Any]] = []
        alive = alive_nodes()
        for role, ranks in snapshot.files.items():
            names = sorted({name for rank in ranks for name in rank.names})
            copies = [rank.copy_on(alive) for rank in ranks]
            calls.append(self.groups[role].scatter("restore_snapshot", [(mine, copies[0], names) for mine in copies]))
        together(*calls)

    def workers(self) -> list[dict[str, Any]]:
        """Role, rank, node, pid and restarts of every worker."""
        return [
            {"role": role, "rank": rank, "node": place.host, "pid": place.pid, "restarts": self._starts[role, rank] - 1}
            for role, group in self.groups.items()
            for rank, place in sorted(group.whereabouts.items())
        ]

    # ------------------------------------------------------------ models and data

    def load(self, model: str, reward_models: Mapping[str, str]) -> None:
        """Load every role of the PPO stage at the same time, and let the actor meet the engines. May be done again.

        model: folder that the actor, the reference and the engines start from. reward_models: name in `ppo.rewards` ->
        folder; the critic starts from the first, or from `model` where there is none.
        """
        groups, ppo = self.groups, self.config.ppo
        assert ppo is not None
        self.version = 0
        model, paths = local(model), {name: local(path) for name, path in reward_models.items()}
        actor = pretrained(self.config.model)
        if actor.lora:  # the policy that learns must be the policy that sampled
            actor = actor.model_copy(update={"lora": actor.lora.model_copy(update={"dropout": 0.0})})
        critic = next(iter(paths.values()), model)
        longest = ppo.max_prompt_tokens + self.config.rollout.max_new_tokens
        together(
            groups["actor"].prepare("load", model, actor, ppo.actor_optimizer),
            groups["critic"].prepare("load", critic, actor, ppo.critic_optimizer) if "critic" in groups else None,
            groups["reference"].prepare("load", model, actor, None),
            groups["reward"].prepare("load", model, paths),
            groups["rollout"].prepare("load", model, self.transport, longest),
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
        lengths = self.groups["rollout"].prepare("tokenize", name, self.config.ppo.max_prompt_tokens).get()[0]
        self.lengths[name] = (lengths, np.zeros_like(lengths))

    def add_data(self, name: str, rows: Sequence[Row], roles: Sequence[Role]) -> None:
        """Give a dataset to the workers of some roles, through the object store."""
        ref = ray.put(list(rows))
        together(*(self.groups[role].prepare("add_rows", name, ref) for role in roles))

    def memory(self) -> dict[Role, int]:
        """Bytes of each role's workers, proportional set size; of a process that serves several roles, each has an equal part."""
        roles = list(self.groups)
        found = together(*(self.groups[role].call("memory") for role in roles))
        return {role: sum(each) // len(self.plan.roles[role].crew) for role, each in zip(roles, found, strict=True)}

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

        args = [(data, prompts[share], numbers[share], step, self.version) for share in shares]
        work = float(self.lengths[data][0][prompts].sum() + len(prompts) * self.config.rollout.max_new_tokens)
        return group.scatter("generate", args, keep=1, work=work, then=gather)

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
        return self.groups[role].scatter(method, args, keep=1, work=float(rollouts.lengths.sum()), then=gather)

    def scores(self, rollouts: Rollouts, names: Sequence[str]) -> Call[dict[str, Scored]]:
        """What each of the named sources (rewards or judges) says of the answers: of each a score, a timeout or an error."""
        shards, micro_batches = self._shards("reward", rollouts.lengths)

        def gather(results: list[dict[str, Scored]]) -> dict[str, Scored]:
            return {name: Scored.gather(shards, [r[name] for r in results], len(rollouts)) for name in names}

        args = [
            (rollouts.data, rollouts.prompts[rows], rollouts.placed.take(rows), micro, list(names))
            for rows, micro in zip(shards, micro_batches, strict=True)
        ]
        call = self.groups["reward"].scatter("scores", args, work=float(rollouts.lengths.sum()), then=gather)
        assert self.config.ppo is not None
        call.allowance = self.config.ppo.longest_scoring(max(map(len, shards)))
        return call

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
        args = [(work, progress, seed) for work in works]
        tokens = float(experience.rollouts.lengths.sum())
        return self.groups[role].scatter(method, args, work=tokens, then=lambda results: results[0])

    def _works(self, role: Role, experience: Experience, step: int, update: bool) -> list[Work]:
        """Each rank's part of a step. Which samples make up a mini-batch does not depend on the number of ranks."""
        ppo, rollouts, ranks = self.config.ppo, experience.rollouts, len(self.groups[role])
        assert ppo is not None
        kept = np.arange(len(rollouts)) if experience.kept is None else experience.kept
        order = np.random.default_rng((self.config.seed, step)).permutation(kept)
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
        self.lengths[name] = self.groups[role].prepare("tokenize", name, kind, max_length).get()[0]

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
        if self.config.model.quantize and not self.version:
            self.publish(0)  # engines start from the folder's weights, of which the actor holds others

    def publish(self, version: int) -> int:
        """Give the actor's weights to every engine under a version. Returns the bytes of one copy.

        Engines that die meanwhile are replaced; weights that do not arrive as they were sent are sent once more.
        """
        damaged = 0
        while True:
            try:
                size = self.groups["actor"].call("publish", version).get()[0]
            except WorkerError as error:
                if isinstance(error.failure.cause, StaleWeights) and not damaged:
                    damaged += 1
                    self.recovery.record(error.failure, "sent once more")
                elif self._only_engines(error):
                    self.replace(error)
                else:
                    raise
            else:
                self.version = version
                return size

    def _only_engines(self, error: WorkerError) -> bool:
        """Whether nothing but engines is to be replaced: the actor's ranks are not left waiting for one another."""
        alone = len(self.groups["actor"]) == 1 or ZERO[self.config.strategy_of("actor")].stage < 3
        roles = {role for role, _ in error.failure.casualties}
        return alone and roles == {"rollout"}


def pretrained(settings: ModelSettings) -> ModelSettings:
    """The same for a model that has weights."""
    return settings.model_copy(update={"init": "pretrained"})


def _in_order(shards: list[Rows], parts: list[np.ndarray], count: int) -> np.ndarray:
    out = np.empty(count, parts[0].dtype)
    for rows, part in zip(shards, parts, strict=True):
        out[rows] = part
    return out
