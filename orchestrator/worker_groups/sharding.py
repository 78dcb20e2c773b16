"""Which samples and rows each rank gets, and in which micro-batches. Pure: lengths in, indices out; no Ray.

Every sample or row is in exactly one micro-batch of one rank. All ranks have the same number of micro-batches
(workers.data.batching).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.schema import PPOSettings
from orchestrator.worker_groups.rollouts import Experience
from workers.data.batching import Rows, aligned_micro_batches, balance, mini_batches
from workers.data.step_inputs import MiniBatch, SupervisedBatch, TrainStepInput


def share_prompts(prompt_lengths: np.ndarray, engines: int, max_new_tokens: int) -> list[Rows]:
    """The prompts of each engine. The longest prompt is assigned first, each to the engine with the fewest tokens so far.

    prompt_lengths: [prompts]. Each engine's prompts are in ascending order; an engine may have none.
    """
    outstanding = [0] * engines
    shares: list[list[int]] = [[] for _ in range(engines)]
    for i in np.argsort(-prompt_lengths, kind="stable"):
        engine = outstanding.index(min(outstanding))
        outstanding[engine] += int(prompt_lengths[i]) + max_new_tokens
        shares[engine].append(int(i))
    return [np.sort(np.array(share, np.intp)) for share in shares]


def shard_samples(lengths: np.ndarray, ranks: int, max_tokens: int) -> tuple[list[Rows], list[list[Rows]]]:
    """The samples of each rank, balanced by tokens, and its micro-batches: indices among the rank's samples.

    lengths: [samples]. max_tokens: of a micro-batch, padding included.
    """
    shards = balance(lengths, ranks)
    return shards, aligned_micro_batches([lengths[shard] for shard in shards], max_tokens)


def supervised_batches(
    data: str, rows: Rows, lengths: np.ndarray, trained: np.ndarray, ranks: int, max_tokens: int
) -> list[SupervisedBatch]:
    """Each rank's part of a batch of dataset rows, balanced by tokens.

    lengths, trained: of all rows of the dataset, tokens and trained tokens (of pairs: 1). max_tokens: of a micro-batch.
    """
    shards, micro_batches = shard_samples(lengths[rows], ranks, max_tokens)
    count = int(trained[rows].sum())
    return [
        SupervisedBatch(data, [rows[shard][m] for m in micro], count)
        for shard, micro in zip(shards, micro_batches, strict=True)
    ]


def train_step_inputs(
    experience: Experience,
    ppo: PPOSettings,
    ranks: int,
    seed: tuple[int, ...],
    update: bool = True,
    ptx: Sequence[Sequence[SupervisedBatch]] = (),
) -> list[TrainStepInput]:
    """Each rank's part of a step. The samples of a mini-batch do not depend on the number of ranks.

    Samples without a score are left out; the others of their group are trained on. A mini-batch may have only a part of a
    group: advantages per response come from the whole group, computed before; `prompt_mean` is over the part in the mini-batch.

    seed: for the order of the samples. ptx: per mini-batch, each rank's part of its demonstrations; empty: no demonstrations.

    Raises ValueError if no sample has a score.
    """
    rollouts = experience.rollouts
    if not len(experience.scored):
        raise ValueError(
            f"step {rollouts.step}: none of the {len(rollouts)} samples has a score: there is nothing to train on"
        )
    order = np.random.default_rng(seed).permutation(experience.scored)
    samples_of: list[list[Rows]] = [[] for _ in range(ranks)]
    mini_batches_of: list[list[MiniBatch]] = [[] for _ in range(ranks)]
    prompt_tokens = np.zeros(len(rollouts), np.int64)
    for k, samples in enumerate(mini_batches(order, ppo.mini_batches)):
        shards, micro_batches = shard_samples(rollouts.lengths[samples], ranks, ppo.micro_batch_tokens)
        trained, groups = rollouts.trained_tokens[samples], rollouts.groups[samples]
        tokens_of_groups = np.bincount(groups, trained).astype(np.int64)
        prompt_tokens[samples] = tokens_of_groups[groups]
        counts = int(trained.sum()), len(samples), int(np.count_nonzero(tokens_of_groups))
        for rank, (shard, micro) in enumerate(zip(shards, micro_batches, strict=True)):
            before = sum(map(len, samples_of[rank]))
            demonstrations = ptx[k][rank] if ptx else None
            mini_batches_of[rank].append(MiniBatch([before + m for m in micro], *counts, ptx=demonstrations))
            samples_of[rank].append(samples[shard])
    return [
        _train_step_input(experience, np.concatenate(samples), prompt_tokens, minis, update)
        for samples, minis in zip(samples_of, mini_batches_of, strict=True)
    ]


def _train_step_input(
    experience: Experience, rows: Rows, prompt_tokens: np.ndarray, minis: list[MiniBatch], update: bool
) -> TrainStepInput:
    advantages = experience.advantages
    return TrainStepInput(
        rollouts=experience.rollouts.refs.take(rows),
        reference=experience.reference.refs.take(rows) if experience.reference else None,
        values=experience.values.refs.take(rows) if experience.values else None,
        scores=experience.scores[rows].astype(np.float32),
        groups=experience.rollouts.groups[rows],
        prompt_tokens=prompt_tokens[rows],
        kl=experience.kl,
        advantages=None if advantages is None else advantages[rows].astype(np.float32),
        mini_batches=minis,
        update=update,
    )


def in_order(shards: Sequence[Rows], parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The ranks' parts as one array [count]: parts[k] are the entries at shards[k]."""
    joined = np.empty(count, parts[0].dtype)
    for rows, part in zip(shards, parts, strict=True):
        joined[rows] = part
    return joined
