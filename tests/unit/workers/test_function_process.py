"""Reward functions in their own processes: every failure is reported, and no process is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from configs.schema import FunctionSettings
from workers.rewards.function import RewardError, SampleRecord
from workers.rewards.function_process import FunctionProcess
from workers.rewards.result import RewardResult

FUNCTIONS = "tests.support.reward_functions"
SETTING = "ppo.rewards.0"
Start = Callable[..., FunctionProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(function, **settings): the function's process, after it is ready."""
    started: list[FunctionProcess] = []

    def get(function: str, plugins: tuple[str, ...] = (), **settings: Any) -> FunctionProcess:
        path = function if ":" in function else f"{FUNCTIONS}:{function}"
        settings = {"name": "f", "function": path, "timeout": 30.0} | settings
        started.append(FunctionProcess(FunctionSettings.model_validate(settings), SETTING, plugins))
        started[-1].wait_ready()
        return started[-1]

    yield get
    for process in started:
        process.close()


def score(process: FunctionProcess, *answers: str, **columns: list) -> RewardResult:
    return process.score([f"to {answer}" for answer in answers], list(answers), columns)


def without(scored: RewardResult) -> tuple[int, int]:
    return scored.timeouts, scored.errors


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether the processes end in time; zombies have ended."""
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_one_process_serves_call_after_call(start: Start) -> None:
    process = start("misbehave")
    first, second = score(process, "a", "b"), score(process, "c")
    assert first.values.dtype == np.float32 and first.values.shape == (2,) and without(first) == (0, 0)
    assert first.values[0] == second.values[0]
    assert first.example == ""


def test_a_large_batch_goes_through(start: Start) -> None:
    """Request and reply are larger than a socket's buffers."""
    result = score(start("length"), *["x" * 1000] * 20_000, label=list(range(20_000)))
    assert (result.values == 1000).all() and without(result) == (0, 0)


def test_no_answers_are_no_call(start: Start) -> None:
    assert score(start("misbehave")).values.shape == (0,)


# ---------------------------------------------------------------- what a function may be and give


def test_a_function_may_be_a_coroutine(start: Start) -> None:
    process = start("slowly", timeout=20.0)
    for answers in (["a", "bb"], ["ccc"]):
        assert score(process, *answers).values.tolist() == [len(answer) for answer in answers]
    result = score(start("broken_slowly"), "a", "b")
    assert result.example == "ZeroDivisionError: of the reward's own" and without(result) == (0, 2)
    assert without(score(start("never", timeout=0.5), "a")) == (1, 0)


def test_other_numbers_beside_a_score_are_measured(start: Start) -> None:
    result = score(start("detailed"), "a", "bb", "plain", "none", "lacking")
    np.testing.assert_array_equal(result.values, np.array([1, 2, 5, np.nan, np.nan], np.float32))
    assert without(result) == (0, 2)
    assert result.numbers.keys() == {"acc", "words"}, "text is no measure"
    np.testing.assert_array_equal(result.numbers["acc"], np.array([0, 1, np.nan, 1, np.nan], np.float32))
    assert result.means("reward/f") == pytest.approx({"reward/f": 8 / 3, "reward/f/acc": 2 / 3, "reward/f/words": 1.0})
    assert {fault.why for fault in result.faults} == {
        "gave None for an answer; one finite number is needed",
        "gave {'acc': nan} for an answer; one finite number is needed",
    }


def test_a_function_that_asks_for_samples_gets_them_and_no_other_does(start: Start) -> None:
    process = start("by_sample", batch_size=2)
    assert process.wants_samples
    assert not start("length").wants_samples
    records = [SampleRecord([1, 2], [3] * n, n != 2, n - 1, 7) for n in (1, 2, 3)]
    result = process.score(["p"] * 3, ["a"] * 3, {"column": [0, 0, 0]}, records)
    assert result.values.tolist() == [7, 7, 7]
    assert {name: x.tolist() for name, x in result.numbers.items()} == {
        "prompt": [2, 2, 2],
        "answer": [1, 2, 3],
        "last": [3, 3, 3],
        "ended": [1, 0, 1],
        "number": [0, 1, 2],
    }


def test_an_exception_is_told_with_its_traceback_and_its_answers(start: Start) -> None:
    result = score(start("misbehave", batch_size=1), "raise", "b", "raise")
    [fault] = result.faults
    assert fault.why == "ZeroDivisionError: of the reward's own" and fault.samples.tolist() == [0, 2]
    assert "reward_functions.py" in fault.detail and 'raise ZeroDivisionError("of the reward' in fault.detail


# ---------------------------------------------------------------- timeouts


def test_a_call_past_its_deadline_is_killed_and_a_fresh_process_serves_the_next(start: Start) -> None:
    process = start("sleep_at_wait", timeout=0.5)
    old = psutil.Process(process._process.pid)
    pids = [old.pid, *(child.pid for child in old.children())]
    assert len(pids) == 2
    began = time.monotonic()
    late = score(process, "a", "wait")
    assert 0.5 <= time.monotonic() - began < 4.0
    assert np.isnan(late.values).all() and without(late) == (2, 0)
    assert late.example == "no answer in 0.5 s (ppo.rewards.0.timeout): killed"
    assert gone(pids, 0.0)
    assert score(process, "abc").values.tolist() == [3.0]


def test_only_the_batch_of_the_late_answer_is_lost(start: Start) -> None:
    result = score(start("sleep_at_wait", timeout=1.0, batch_size=2), "a", "bb", "wait", "ccc", "dddd")
    np.testing.assert_array_equal(result.values, np.array([1, 2, np.nan, np.nan, 4], np.float32))
    assert result.timed_out.tolist() == [False, False, True, True, False] and without(result) == (2, 0)


@pytest.mark.parametrize("answer", ["stop", "spin"])
def test_a_process_that_cannot_run_its_own_code_is_killed(start: Start, answer: str) -> None:
    """Stopped, or in C code that holds the interpreter lock."""
    process = start("misbehave", timeout=0.5)
    children = [child.pid for child in psutil.Process(process._process.pid).children()]
    assert without(score(process, answer)) == (1, 0)
    assert gone(children, 0.0)
    assert without(score(process, "a")) == (0, 0)


def test_a_process_that_does_not_read_is_a_timeout_too(start: Start) -> None:
    """Stopped between calls, while a request is larger than the socket's buffers."""
    process = start("length", timeout=0.5)
    for child in psutil.Process(process._process.pid).children():
        child.suspend()
    result = score(process, *["x" * 1000] * 2000)
    assert without(result) == (2000, 0)
    assert without(score(process, "a")) == (0, 0)


def test_a_stopped_guard_does_not_hold_its_owner_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.rewards.function_process._KILL_TIMEOUT", 0.3)
    process = start("misbehave")
    guard = psutil.Process(process._process.pid)
    [child] = guard.children()
    child.suspend()  # so that it does not end by itself
    guard.suspend()
    process.close()
    assert gone([guard.pid, child.pid])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("answer", "example"),
    [
        ("segfault", "its process died of SIGSEGV"),
        ("exit", "its process ended with exit code 3"),
        ("sys.exit", "its process ended with exit code 4"),
        ("raise", "ZeroDivisionError: of the reward's own"),
    ],
)
def test_a_crash_or_an_exception_is_an_error_of_all_answers(start: Start, answer: str, example: str) -> None:
    process = start("misbehave")
    before = score(process, "a").values[0]
    result = score(process, answer, "b", "c")
    assert np.isnan(result.values).all() and without(result) == (0, 3)
    assert result.example == example
    after = score(process, "a").values[0]
    assert (after == before) == (answer == "raise")  # after an exception the process is kept


def test_a_crash_is_seen_at_once_though_a_fork_holds_the_connection(start: Start) -> None:
    began = time.monotonic()
    result = score(start("fork_and_crash"), "a")
    assert result.example == "its process ended with exit code 5" and without(result) == (0, 1)
    assert time.monotonic() - began < 10.0  # the timeout is 30


def test_a_process_that_died_between_calls_costs_nothing(start: Start) -> None:
    process = start("misbehave")
    for child in psutil.Process(process._process.pid).children():
        child.kill()
    process._process.wait(10)
    assert without(score(process, "a")) == (0, 0)


def test_what_is_no_finite_number_is_an_error_of_its_sample(start: Start) -> None:
    result = score(start("mixed"), *"abcdefgh")
    nan = np.nan
    np.testing.assert_array_equal(result.values, np.array([1, nan, nan, nan, 1, nan, nan, nan], np.float32))
    assert without(result) == (0, 6)
    assert result.example == "gave None for an answer; one finite number is needed"


@pytest.mark.parametrize(
    ("function", "example"),
    [
        ("one_too_few", "gave [1.0, 1.0, 1.0] for 4 answers; a list with one number each is needed"),
        ("one_for_all", "gave 1.0 for 4 answers"),
        ("nothing", "gave None for 4 answers"),
        ("generator", "gave <generator object"),
        ("by_answer", "gave {'a': 1.0, 'b': 1.0, 'c': 1.0, 'd': 1.0} for 4 answers"),
        ("a_column", "gave [1.0] for an answer; one finite number is needed"),
        ("words", "gave 'good' for an answer; one finite number is needed"),
        ("infinite", "gave inf for an answer; one finite number is needed"),
        ("by_label", "TypeError: by_label() missing 2 required positional arguments: 'label' and 'note'"),
    ],
)
def test_a_wrong_result_is_an_error_of_all_answers(start: Start, function: str, example: str) -> None:
    result = score(start(function), *"abcd")
    assert np.isnan(result.values).all() and without(result) == (0, 4)
    assert result.example.removeprefix("ValueError: ").startswith(example)


def test_a_long_error_text_is_cut(start: Start) -> None:
    result = score(start("one_too_few"), *["a"] * 10_000)
    assert result.errors == 10_000 and len(result.example) < 500


def test_what_a_function_prints_is_output(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    result = score(start("misbehave"), "print")
    assert without(result) == (0, 0) and result.values[0] != 7.0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["to stdout", "below Python"]
    assert err.splitlines() == ['{"scores": [7.0]}']


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("tests.nowhere:f", r"^ppo\.rewards\.0\.function: cannot import 'tests\.nowhere:f': No module named"),
        (f"{FUNCTIONS}:no_such", r"^ppo\.rewards\.0\.function: cannot import .* has no attribute 'no_such'"),
        (f"{FUNCTIONS}:not_a_function", r"^ppo\.rewards\.0\.function: '.*:not_a_function' is not a function but 3"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_the_start(start: Start, function: str, text: str) -> None:
    with pytest.raises(RewardError, match=text):
        start(function)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a module `fickle` that the process can import; the test writes it."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "fickle.py"


def test_an_import_that_hangs_or_dies_is_refused_at_the_start(start: Start, module: Path) -> None:
    module.write_text("import time; time.sleep(600)")
    with pytest.raises(RewardError, match=r"^ppo\.rewards\.0\.start_timeout: 'fickle:f' was not imported in 0\.5 s"):
        start("fickle:f", start_timeout=0.5)
    module.write_text("import os; os._exit(9)")
    with pytest.raises(RewardError, match=r"^ppo\.rewards\.0\.function: its process ended with exit code 9 while"):
        start("fickle:f")


def test_an_import_that_fails_later_on_is_an_error_of_that_call(start: Start, module: Path) -> None:
    good = "def f(prompts, answers):\n    if 'wait' in answers: import time; time.sleep(600)\n    return [1] * len(answers)"
    module.write_text(good)
    process = start("fickle:f", timeout=1.0)
    module.write_text("raise RuntimeError('for a while')")
    assert without(score(process, "wait")) == (1, 0)
    result = score(process, "a", "b")
    assert without(result) == (0, 2) and result.example == "for a while"
    module.write_text(good)
    score(process, "a")  # this process may have started before the module was fixed
    assert without(score(process, "a", "b")) == (0, 0)


def test_plugins_are_imported_first(start: Start, module: Path) -> None:
    module.write_text("import sys\ndef f(prompts, answers): return ['plugged' in sys.modules] * len(answers)")
    module.with_name("plugged.py").write_text("")
    assert score(start("fickle:f"), "a").values.tolist() == [0.0]
    assert score(start("fickle:f", plugins=("plugged",)), "a").values.tolist() == [1.0]


def test_a_function_brings_no_torch_into_its_process(start: Start, module: Path) -> None:
    module.write_text("import sys\ndef f(prompts, answers): return ['torch' in sys.modules or 'ray' in sys.modules]")
    assert score(start("fickle:f"), "a").values.tolist() == [0.0]


# ---------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("how", ["close", "crash", "wait"])
def test_what_a_function_started_ends_with_its_process(start: Start, tmp_path: Path, how: str) -> None:
    process = start("leave_processes", timeout=3.0)
    result = score(process, how, folder=[str(tmp_path)])
    assert without(result) == {"close": (0, 0), "crash": (0, 1), "wait": (1, 0)}[how]
    left = [int(pid) for pid in (tmp_path / "left").read_text().split()]
    assert len(left) == 5
    if how == "close":
        assert not gone(left[:1], 0.0)
        process.close()
    assert gone(left, 0.0)


OWNER = """
import sys, time
from configs.schema import FunctionSettings
from workers.rewards.function_process import FunctionProcess

settings = {"name": "f", "function": "tests.support.reward_functions:leave_processes"}
process = FunctionProcess(FunctionSettings.model_validate(settings), "f", [])
print("scoring", flush=True)
process.score(["a"], [sys.argv[1]], {"folder": [sys.argv[2]]})
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["idle", "wait"])
def test_nothing_outlives_an_owner_that_was_killed(tmp_path: Path, when: str) -> None:
    """Between calls and during one."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, when, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout and owner.stdout.readline() == b"scoring\n"
        deadline = time.monotonic() + 30
        while not (tmp_path / "left").exists() or len((tmp_path / "left").read_text().split()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        left = [int(pid) for pid in (tmp_path / "left").read_text().split()]
        assert not any(gone([pid], 0.0) for pid in left)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert gone(left), json.dumps([psutil.Process(pid).cmdline() for pid in left if psutil.pid_exists(pid)])
