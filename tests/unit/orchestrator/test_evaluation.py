"""Evaluations, and what is said of them, where scores are missing: none of it ends a run, and each source has its own pairs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestrator.console.run_summary import print_result
from orchestrator.evaluation.before_after import before_after_numbers
from orchestrator.evaluation.evaluate import Evaluation, record_faults
from orchestrator.report.report import write_report
from orchestrator.run.result import Result
from orchestrator.storage.failure_log import MAX_FILES, MAX_REASONS, FailureLog
from tests.unit.orchestrator.test_report import CONFIG, write_config
from workers.rewards.result import Fault, RewardResult

nan = math.nan


def evaluation(reward: list[float], judge: RewardResult, source: RewardResult | None = None) -> Evaluation:
    count = len(reward)
    scores = {"model": source or RewardResult.of([0.0] * count), "judge": judge}
    texts = [f"text {i}" for i in range(count)]
    return Evaluation(texts, texts, np.array(reward), scores, ["judge"], np.full(count, 0.1), np.full(count, 5))


# ---------------------------------------------------------------- numbers


def test_what_has_no_score_is_left_out_of_the_means() -> None:
    found = evaluation([1.0, nan, 3.0], RewardResult.of([None, 4.0, 6.0])).metrics()
    assert (found["evaluation/reward"], found["evaluation/judge"]) == (2.0, 5.0)
    assert (found["evaluation/unscored"], found["evaluation/distinct"]) == (1.0, 1.0)
    assert "evaluation/model" not in found, "its scores are in the reward"


def test_no_scores_at_all_are_no_error() -> None:
    """A judge that times out, a service that is down."""
    found = evaluation([nan, nan], RewardResult.nothing(2, "no answer in 60 s", timed_out=True)).metrics()
    assert found == pytest.approx(
        {"evaluation/kl": 0.1, "evaluation/length": 5.0, "evaluation/distinct": 1.0, "evaluation/unscored": 2.0}
    )


def test_other_numbers_of_sources_and_judges_are_measured() -> None:
    both = RewardResult.of([1.0, 2.0], {"acc": [1.0, None]})
    found = evaluation([1.0, 2.0], both, both).metrics()
    assert (found["evaluation/judge/acc"], found["evaluation/model/acc"]) == (1.0, 1.0)


def write_pair(folder: Path, before: list[Any], after: list[Any]) -> Path:
    """The two evaluations' files. Each of `before`, `after`: (reward, score of judge a, score of judge b), None for none."""
    (folder / "evaluation").mkdir()
    for name, scores in (("before", before), ("after", after)):
        lines = [
            {
                "prompt": f"p{i}",
                "answer": f"{name} {i}",
                "reward": r,
                "judges": {"a": a, "b": b},
                "kl": 0.5,
                "tokens": 4,
            }
            for i, (r, a, b) in enumerate(scores)
        ]
        (folder / "evaluation" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


MISSING = (
    [(0.0, 1.0, None), (1.0, None, None), (None, 3.0, None)],
    [(2.0, None, 5.0), (2.5, 7.0, 5.0), (9.0, 5.0, 5.0)],
)


def test_each_source_has_its_own_pairs(tmp_path: Path) -> None:
    found = before_after_numbers(write_pair(tmp_path, *MISSING))
    assert (found["reward_before"], found["reward_after"], found["reward_pairs"]) == (0.5, 2.25, 2)
    assert found["reward_change"] == fmean([2.0, 1.5])
    assert (found["judge/a_before"], found["judge/a_after"], found["judge/a_pairs"]) == (3.0, 5.0, 1)
    assert not [name for name in found if name.startswith("judge/b")], "it scored no prompt twice"
    assert (found["prompts"], found["distinct"], found["kl"]) == (3, 1.0, 0.5)


def test_a_report_and_the_last_words_do_without_what_is_missing(tmp_path: Path) -> None:
    write_pair(write_config(tmp_path), *MISSING)
    page = write_report(tmp_path).read_text()
    assert "Judge: a" in page and "Judge: b" not in page and "no score" in page
    none = [(None, None, None)]
    (tmp_path / "none").mkdir()
    write_pair(write_config(tmp_path / "none"), none, none)
    assert "KL to the reference" in write_report(tmp_path / "none").read_text()
    for folder in (tmp_path, tmp_path / "none"):
        said = io.StringIO()
        result = Result(
            folder, {"ppo": folder}, {"ppo": before_after_numbers(folder)}, {"ppo": 1.0}, folder / "report.html"
        )
        print_result(result, Console(file=said, width=200))
        assert "KL to the reference 0.500 nats per token" in said.getvalue()
        assert ("reward +0.500 -> +2.250" in said.getvalue()) == (folder == tmp_path)
    assert CONFIG["ppo"]


# ---------------------------------------------------------------- records


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_a_source_that_fails_leaves_a_file_that_counts(tmp_path: Path) -> None:
    log = FailureLog(tmp_path / "failures")
    fault = Fault("ZeroDivisionError: division by zero", np.array([0, 2]), "row 7 of prompts\nTraceback ...")
    failed = RewardResult(np.array([nan, 1.0, nan], np.float32), np.zeros(3, bool), (fault,))
    for step in (1, 2, 3):
        log.where = f"ppo, step {step} of 9"
        new = record_faults(log, {"fine": RewardResult.of([1.0] * 3), "my reward": failed})
        assert new == (
            ["my reward gave no score for 2 of 3 responses: ZeroDivisionError: division by zero"] * (step == 1)
        )
    [(name, text)] = texts(log.folder).items()
    assert name == "0001-reward-my_reward.txt"
    first, *lines = text.splitlines()
    assert first.endswith("ppo, step 1 of 9")
    assert lines[0] == "score: my reward gave no score for 2 of 3 responses: ZeroDivisionError: division by zero"
    assert lines[1:3] == ["row 7 of prompts", "Traceback ..."]
    assert lines[-1].startswith("3 times so far, the last: ") and lines[-1].endswith("ppo, step 3 of 9")


def test_a_source_that_fails_in_ever_new_words_leaves_ten_files(tmp_path: Path) -> None:
    log = FailureLog(tmp_path)
    for i in range(50):
        record_faults(
            log, {"f": RewardResult.nothing(4, f"KeyError: {i}"), "g": RewardResult.nothing(4, "late", timed_out=True)}
        )
    found = texts(tmp_path)
    assert len(found) == MAX_REASONS + 1
    assert "KeyError: 9\n" in found["0011-reward-f.txt"] and "41 times so far" in found["0011-reward-f.txt"]
    assert "50 times so far" in found["0002-reward-g.txt"]


def test_a_run_that_fails_for_ever_leaves_so_many_files(tmp_path: Path) -> None:
    log = FailureLog(tmp_path)
    for i in range(MAX_FILES + 3):
        log.write("actor-died", f"train: failure {i}")
    found = texts(tmp_path)
    assert len(found) == MAX_FILES + 1
    assert "train: failure 202" in found["more.txt"] and "3 more failures" in found["more.txt"]
    again = FailureLog(tmp_path)
    again.write("actor-died", "train: in another session")
    assert len(texts(tmp_path)) == MAX_FILES + 1


def test_an_exception_of_the_driver_leaves_its_traceback(tmp_path: Path) -> None:
    log = FailureLog(tmp_path)
    try:
        raise LookupError("no such thing\nat all")
    except LookupError as error:
        log.write_exception(error)
    [(name, text)] = texts(tmp_path).items()
    assert name == "0001-LookupError.txt"
    assert text.splitlines()[1] == "LookupError: no such thing"
    assert 'raise LookupError("no such thing' in text
