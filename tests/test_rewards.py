"""Rewards: what Python functions and models give for answers, and that nothing wrong of it goes on silently."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from configs.schema import Role, RunConfig
from orchestrator.calls import WorkerGroup, together
from orchestrator.evaluation import weighted_sum
from orchestrator.failures import WorkerError
from placement import Cluster
from tests.hosts import DEADLINES
from tests.models import VOCABULARY, make_model, make_tokenizer
from workers.data import Row
from workers.functions import RewardError, find_function
from workers.host import Host
from workers.models import load_tokenizer
from workers.rewards import RewardWorker
from workers.sequences import Chunk, Placed, Ragged
from workers.worker import WorkerSpec, environment

HERE = "tests.test_rewards"
PROMPTS = ["one", "two", "three", "four"]
ANSWERS = ["a", "bb", "", "dddd"]


# ---------------------------------------------------------------- functions that settings name


def length(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def vowels(prompts: list[str], answers: list[str], **columns: list[Any]) -> np.ndarray:
    return np.array([sum(c in "aeiou" for c in prompt) for prompt in prompts])


def by_label(prompts: list[str], answers: list[str], label: list[float], note: list[str | None]) -> list[float]:
    """Takes its columns by name, and needs a row of every column for each answer."""
    assert len(label) == len(note) == len(answers)
    return [x + (0.5 if text else 0.0) for x, text in zip(label, note, strict=True)]


def one_too_few(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [1.0] * (len(answers) - 1)


def a_column(prompts: list[str], answers: list[str], **columns: list[Any]) -> np.ndarray:
    return np.ones((len(answers), 1))


def one_for_all(prompts: list[str], answers: list[str], **columns: list[Any]) -> float:
    return 1.0


def not_a_number(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [math.nan if answer == "bb" else 1.0 for answer in answers]


def infinite(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    return [math.inf] * len(answers)


def nothing_for_some(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float | None]:
    return [None if answer == "bb" else 1.0 for answer in answers]


def nothing(prompts: list[str], answers: list[str], **columns: list[Any]) -> None:
    return None


def words(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[str]:
    return ["good"] * len(answers)


def broken(prompts: list[str], answers: list[str], **columns: list[Any]) -> list[float]:
    raise ZeroDivisionError("of the reward's own")


WRONG = {
    "one_too_few": r"gave \[1\.0, 1\.0, 1\.0\] for 4 answers; one finite number each is needed",
    "a_column": r"for 4 answers; one finite number each",
    "one_for_all": r"gave 1\.0 for 4 answers; one finite number each",
    "not_a_number": r"gave \[1\.0, nan, 1\.0, 1\.0\] for 4 answers; one finite number each",
    "infinite": r"one finite number each",
    "nothing_for_some": r"gave \[1\.0, None, 1\.0, 1\.0\] for 4 answers; one finite number each",
    "nothing": r"gave None for 4 answers; one finite number each",
    "words": r"ValueError: could not convert string to float: 'good'",
    "broken": r"ZeroDivisionError: of the reward's own",
}


# ---------------------------------------------------------------- workers


def run_config(*sources: dict[str, Any], judges: tuple[str, ...] = ()) -> RunConfig:
    data, adam = {"path": "rows.jsonl"}, {"lr": 1e-4}
    ppo: dict[str, Any] = {"prompts": data, "steps": 1, "actor_optimizer": adam, "critic_optimizer": adam}
    if judges:
        ppo["evaluation"] = {"prompts": data, "judges": [{"name": j, "function": f"{HERE}:{j}"} for j in judges]}
    return RunConfig.model_validate({"name": "r", "model": {"path": "m"}, "ppo": ppo | {"rewards": list(sources)}})


def function(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"kind": "function", "name": name, "function": f"{HERE}:{name}", "weight": weight}


def model(name: str, path: Path) -> dict[str, Any]:
    return {"kind": "model", "name": name, "path": str(path)}


def spec(config: RunConfig, role: Role = "reward", rank: int = 0, world: int = 1) -> WorkerSpec:
    return WorkerSpec(config, role, rank, world, "cpu", 1)


def answers_of(tokenizer: Any) -> Chunk:
    """PROMPTS and ANSWERS as an engine would have written them; each answer ends with eos."""
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    answers = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ANSWERS]
    return Chunk(
        tokens=Ragged.of([np.array(p + a) for p, a in zip(prompts, answers, strict=True)], np.int32),
        log_probs=Ragged.of([np.zeros(len(a)) for a in answers], np.float32),
        prompt_lengths=np.array([len(p) for p in prompts], np.int32),
    )


ROWS = [
    Row("one", columns={"label": 1.0}),
    Row("two", columns={"label": 2.0, "note": "well"}),
    Row("three", columns={"label": 3.0}),
    Row("four", columns={"label": 4.0, "other": 1}),
]
Scores = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "llama", seed=1)


@pytest.fixture
def scores(ray_here: Cluster, folder: Path) -> Scores:
    """scores(sources, rows, prompts, judges, names): what a reward worker in this process gives for ANSWERS."""

    def get(
        *sources: dict[str, Any],
        rows: list[Row] = ROWS,
        prompts: tuple[int, ...] = (0, 1, 2, 3),
        judges: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        worker = RewardWorker(spec(run_config(*sources, judges=judges)))
        worker.load(str(folder), {s["name"]: s["path"] for s in sources if s["kind"] == "model"})
        worker.add_rows("prompts", rows)
        chunk = answers_of(worker.codec.tokenizer)
        placed = Placed.of([ray.put(chunk)], [np.arange(len(chunk.tokens))], len(chunk.tokens)).take(np.array(prompts))
        micro = [np.arange(len(prompts))[:2], np.arange(len(prompts))[2:]]
        names = [s["name"] for s in sources] + list(judges)
        return worker.scores("prompts", np.array(prompts), placed, micro, names)

    return get


def test_a_function_gets_prompts_and_answers_as_text(scores: Scores) -> None:
    found = scores(function("length"), judges=("vowels",))
    assert found["length"].tolist() == [1, 2, 0, 4]  # without eos
    assert found["vowels"].tolist() == [2, 1, 2, 2]
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_columns_of_the_rows_reach_the_function(scores: Scores) -> None:
    """Also one that only some rows have, even where no row of this rank's answers has it."""
    columns = {"label", "note"}
    rows = [Row(row.prompt, columns={k: v for k, v in row.columns.items() if k in columns}) for row in ROWS]
    assert scores(function("by_label"), rows=rows)["by_label"].tolist() == [1.0, 2.5, 3.0, 4.0]
    assert scores(function("by_label"), rows=rows, prompts=(3, 0, 0))["by_label"].tolist() == [4.0, 1.0, 1.0]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_score_is_an_error_that_names_the_reward(scores: Scores, name: str) -> None:
    with pytest.raises(RewardError, match=rf"(?s)^reward {name}: .*{WRONG[name]}"):
        scores(function("length"), function(name))


def test_a_function_that_lacks_a_column_is_an_error_that_names_the_reward(scores: Scores) -> None:
    with pytest.raises(RewardError, match=r"^reward by_label: TypeError: .*missing 2 required positional arguments"):
        scores(function("by_label"), rows=[Row(prompt) for prompt in PROMPTS])


def test_a_model_scores_the_last_token(scores: Scores, folder: Path, tmp_path: Path) -> None:
    """As the plain model does for each sequence alone; two models do not get in each other's way."""
    from transformers import AutoModelForSequenceClassification

    paths, plain = [tmp_path / "one", tmp_path / "two"], []
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        plain.append(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval())
        plain[-1].config.score_mean, plain[-1].config.score_std = 0.5, 2.0
        plain[-1].save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    found = scores(model("one", paths[0]), function("length"), model("two", paths[1]))
    chunk = answers_of(load_tokenizer(str(folder)))
    for name, hf in zip(("one", "two"), plain, strict=True):
        for i in range(4):
            ids = torch.from_numpy(chunk.tokens.row(i).astype(np.int64))[None]
            assert int(ids.max()) < VOCABULARY
            with torch.no_grad():
                wanted = (float(hf.score(hf.base_model(ids)[0])[0, -1, 0]) - 0.5) / 2.0
            assert found[name][i] == pytest.approx(wanted, abs=1e-5)
    assert not np.allclose(found["one"], found["two"])


def test_a_model_with_another_tokenizer_is_refused(scores: Scores, folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["another"])
    make_model(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(RewardError, match=rf"^reward other: {tmp_path}/other has another tokenizer than .*{folder}"):
        scores(model("other", tmp_path / "other"))


def test_the_reward_is_the_weighted_sum() -> None:
    ppo = run_config(function("length", 2.0), function("vowels", -0.5)).ppo
    assert ppo is not None
    given = {"length": np.array([1.0, 2.0]), "vowels": np.array([4.0, 0.0]), "a judge": np.array([100.0, 100.0])}
    np.testing.assert_allclose(weighted_sum(given, ppo), [0.0, 4.0])
    assert weighted_sum(given, ppo).shape == (2,)


@pytest.mark.parametrize("judges", [(), ("length",)])
def test_names_tell_rewards_and_judges_apart(tmp_path: Path, judges: tuple[str, ...]) -> None:
    sources = [function("length")] if judges else [model("length", tmp_path), function("length")]
    with pytest.raises(ValueError, match=r"rewards: the name length stands more than once"):
        run_config(*sources, judges=judges)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tests.nowhere:length", "No module named 'tests.nowhere'"),
        (f"{HERE}:no_such", "has no attribute 'no_such'"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_that_names_the_setting(path: str, text: str) -> None:
    with pytest.raises(RewardError, match=rf"^ppo\.rewards\.0\.function: cannot import '{path}': .*{text}"):
        find_function(path, "ppo.rewards.0.function")


@pytest.mark.slow
def test_from_a_worker_the_error_comes_with_role_rank_and_reward(ray_here: Cluster, folder: Path) -> None:
    """On two ranks, each with its part of the answers."""
    config = run_config(function("length"), function("not_a_number"), function("by_label"))
    env = {"env_vars": environment(config, "reward", "cpu", 1)}
    handles = [
        ray.remote(Host).options(num_cpus=1, runtime_env=env).remote("rewards", spec(config, rank=rank, world=2))
        for rank in range(2)
    ]
    group = WorkerGroup("reward", handles, "reward", DEADLINES)
    try:
        group.call("load", str(folder), {}).get()
        group.call("add_rows", "prompts", ROWS).get()
        placed = Placed.of([ray.put(answers_of(load_tokenizer(str(folder))))], [np.arange(4)], 4)
        shards = [np.array([2, 3]), np.array([0, 1])]

        def ask(name: str) -> Any:
            args = [("prompts", rows, placed.take(rows), [np.arange(2)], [name]) for rows in shards]
            return together(group.scatter("scores", args))[0]

        assert [found["length"].tolist() for found in ask("length")] == [[0, 4], [1, 2]]
        with pytest.raises(
            WorkerError, match=r"^reward rank 1 failed in scores: RewardError: reward not_a_number: gave"
        ):
            ask("not_a_number")
        with pytest.raises(
            WorkerError, match=r"reward rank [01] failed in scores: RewardError: reward by_label: TypeE"
        ):
            ask("by_label")  # the column `other` is none of its arguments
    finally:
        for handle in handles:
            ray.kill(handle)
