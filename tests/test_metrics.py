"""metrics.jsonl, TensorBoard events, gauge names, and the progress display."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from orchestrator.metrics import FILE, MetricsError, Recorder, gauge_name, read_metrics
from orchestrator.progress import Progress, clock


def steps_of(folder: Path, stage: str) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if line["stage"] == stage]


def test_a_line_is_on_disk_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, {"reward/mean": 0.5, "kl": 1})
        (line,) = read_metrics(tmp_path)
    assert {key: line[key] for key in ("stage", "step", "reward/mean", "kl")} == {
        "stage": "ppo",
        "step": 1,
        "reward/mean": 0.5,
        "kl": 1.0,
    }
    assert line["time"] > 1.7e9


def test_values_survive_bit_for_bit(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-308, "c": -math.pi * 1e30}
    with Recorder(tmp_path, "demo", "sft") as recorder:
        recorder.record(1, values)
    (line,) = read_metrics(tmp_path)
    assert {name: line[name] for name in values} == values


def test_non_finite_values_become_null_and_the_file_stays_json(tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, {"loss": math.nan, "kl": math.inf, "ok": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert (line["loss"], line["kl"], line["ok"]) == (None, None, 1.0)


def test_resuming_cuts_later_steps_of_this_stage_only(tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "sft") as recorder:
        for step in range(1, 8):
            recorder.record(step, {"loss": step})
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        for step in range(1, 6):
            recorder.record(step, {"kl": step})
    with Recorder(tmp_path, "demo", "ppo", resume_step=3) as recorder:
        assert steps_of(tmp_path, "ppo") == [1, 2, 3]
        recorder.record(4, {"kl": 40})
    assert steps_of(tmp_path, "ppo") == [1, 2, 3, 4]
    assert steps_of(tmp_path, "sft") == list(range(1, 8))
    assert [line["kl"] for line in read_metrics(tmp_path) if line["stage"] == "ppo"] == [1, 2, 3, 40]


def test_a_stage_that_begins_anew_leaves_no_old_lines(tmp_path: Path) -> None:
    for _ in range(2):
        with Recorder(tmp_path, "demo", "rm") as recorder:
            recorder.record(0, {"accuracy": 0.5})
    assert steps_of(tmp_path, "rm") == [0]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, {"kl": 0.1})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"stage": "ppo", "step": 2, "kl": 0.')
    assert steps_of(tmp_path, "ppo") == [1]
    with Recorder(tmp_path, "demo", "ppo", resume_step=5) as recorder:
        recorder.record(2, {"kl": 0.2})
    assert steps_of(tmp_path, "ppo") == [1, 2]
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_line_in_the_middle_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"stage": "ppo", "step": 1}\n{"stage": \n{"stage": "ppo", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["stage", "step", "time"])
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    with Recorder(tmp_path, "demo", "ppo") as recorder, pytest.raises(ValueError, match=f"metric '{name}'"):
        recorder.record(1, {name: 1.0})
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_numbers_and_forgets_what_was_cut(tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "sft") as recorder:
        for step in (1, 2, 3, 4):
            recorder.record(step, {"loss": step})
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        for step in (1, 2, 3):
            recorder.record(step, {"reward/mean": step / 2, "kl": math.nan})
    with Recorder(tmp_path, "demo", "ppo", resume_step=1) as recorder:
        recorder.record(2, {"reward/mean": 9.0})

    def scalars(stage: str, tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage))
        events.Reload()
        return [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]

    assert scalars("ppo", "ppo/reward/mean") == [(1, 0.5), (2, 9.0)]
    assert math.isnan(scalars("ppo", "ppo/kl")[0][1])
    assert scalars("sft", "sft/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_stage_rewinds(tmp_path: Path) -> None:
    with Recorder(tmp_path, "demo", "sft") as recorder:
        recorder.record(5, {"loss": 5})
    with Recorder(tmp_path, "demo", "ppo") as recorder:
        for step in (1, 2, 3):
            recorder.record(step, {"kl": step})
        recorder.rewind(1)
        assert (steps_of(tmp_path, "ppo"), steps_of(tmp_path, "sft")) == ([1], [5])
        for step in (2, 3):
            recorder.record(step, {"kl": 10 * step})
        recorder.rewind(3)
        recorder.record(4, {"kl": 40})
    assert [line["kl"] for line in read_metrics(tmp_path) if line["stage"] == "ppo"] == [1, 20, 30, 40]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo"))
    events.Reload()
    shown = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("ppo/kl")]
    assert shown == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("broken", [b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_damaged_line_is_an_error_with_file_and_line(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / FILE).write_bytes(b'{"stage": "ppo", "step": 1}\n' + broken + b"\n")
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("kl", ("troupe_kl", "")),
        ("reward/mean", ("troupe_reward_mean", "")),
        ("seconds/generate", ("troupe_seconds_generate", "")),
        ("grad_norm/actor", ("troupe_grad_norm", "actor")),
        ("memory_gib/reward", ("troupe_memory_gib", "reward")),
        ("role/critic/queue/length", ("troupe_queue_length", "critic")),
        ("evaluation/reward", ("troupe_evaluation_reward", "")),
        ("reward/actor", ("troupe_reward_actor", "")),
        ("reward/my judge-2", ("troupe_reward_my_judge_2", "")),
    ],
)
def test_gauge_names_are_legal_and_carry_the_role(metric: str, expected: tuple[str, str]) -> None:
    assert gauge_name(metric) == expected


# ---------------------------------------------------------------- progress


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=40), out


def test_plain_lines_are_few_but_first_and_last_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("orchestrator.progress.time.monotonic", lambda: now[0])
    console, out = plain_console()
    with Progress("ppo", 100, console) as shown:
        shown.phase("starting workers")
        for step in range(1, 101):
            now[0] += 0.1
            shown.update(step, {"reward/mean": step / 100, "kl": 0.05, "tokens_per_second": 1234.5})
    lines = out.getvalue().splitlines()
    assert lines[0] == "ppo: starting workers"
    assert lines[1].startswith("ppo 1/100 ·")
    assert lines[-1] == "ppo 100/100 · reward +1.000 · KL 0.050 · tokens/s 1,234"
    assert len(lines) == 1 + 1 + 4 + 1  # start-up; step 1; one each 2 s of 10 s; step 100
    assert lines[2] == "ppo 21/100 · 0:08 left · reward +0.210 · KL 0.050 · tokens/s 1,234"


def test_an_interrupted_run_still_shows_its_last_step() -> None:
    console, out = plain_console()

    def interrupted() -> None:
        with Progress("sft", 10, console) as shown:
            shown.update(1, {"loss": 3.0})
            shown.update(2, {"loss": 2.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("sft 2/10")
    assert last.endswith("loss 2.500")


def test_notes_are_printed_as_they_are() -> None:
    console, out = plain_console()
    with Progress("rm", 3, console) as shown:
        shown.note("[bold]not markup[/bold] " + "x" * 60)
    assert out.getvalue() == "[bold]not markup[/bold] " + "x" * 60 + "\n"


def test_the_terminal_gets_its_cursor_back_after_ctrl_c() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)

    def interrupted() -> None:
        with Progress("ppo", 10, console, start=4) as shown:
            shown.phase("starting workers")
            shown.update(5, {"reward/mean": 0.25})
            shown.note("a note")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = out.getvalue()
    assert all(part in text for part in ("5/10", "reward +0.250", "a note"))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (600, "10:00"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
