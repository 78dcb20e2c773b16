"""metrics.jsonl, TensorBoard events, kept answers, the table of Ray's metrics, and the progress display."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from configs.schema import LoggerSettings, RayMetricsSettings, TensorBoardSettings
from orchestrator.loggers.base import Logger
from orchestrator.loggers.console import Progress
from orchestrator.loggers.ray_table import TABLE, markdown, row_of
from orchestrator.loggers.recorder import Recorder
from orchestrator.number_text import age, clock, percent, signed
from orchestrator.run.stop_signal import Stopped
from orchestrator.storage.metrics_file import FILE, MetricsError, read_metrics
from tests.support.recording import recording


def steps_of(folder: Path, stage: str) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if line["stage"] == stage]


def test_a_line_is_on_disk_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "ppo") as recorder:
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
    with recording(tmp_path, "demo", "sft") as recorder:
        recorder.record(1, values)
    (line,) = read_metrics(tmp_path)
    assert {name: line[name] for name in values} == values


def test_non_finite_values_become_null_and_the_file_stays_json(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, {"loss": math.nan, "kl": math.inf, "ok": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert (line["loss"], line["kl"], line["ok"]) == (None, None, 1.0)


def test_resuming_cuts_later_steps_of_this_stage_only(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "sft") as recorder:
        for step in range(1, 8):
            recorder.record(step, {"loss": step})
    with recording(tmp_path, "demo", "ppo") as recorder:
        for step in range(1, 6):
            recorder.record(step, {"kl": step})
    with recording(tmp_path, "demo", "ppo", resume_step=3) as recorder:
        assert steps_of(tmp_path, "ppo") == [1, 2, 3]
        recorder.record(4, {"kl": 40})
    assert steps_of(tmp_path, "ppo") == [1, 2, 3, 4]
    assert steps_of(tmp_path, "sft") == list(range(1, 8))
    assert [line["kl"] for line in read_metrics(tmp_path) if line["stage"] == "ppo"] == [1, 2, 3, 40]


def test_a_stage_that_starts_from_the_beginning_leaves_no_old_lines(tmp_path: Path) -> None:
    for _ in range(2):
        with recording(tmp_path, "demo", "rm") as recorder:
            recorder.record(0, {"accuracy": 0.5})
    assert steps_of(tmp_path, "rm") == [0]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "ppo") as recorder:
        recorder.record(1, {"kl": 0.1})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"stage": "ppo", "step": 2, "kl": 0.')
    assert steps_of(tmp_path, "ppo") == [1]
    with recording(tmp_path, "demo", "ppo", resume_step=5) as recorder:
        recorder.record(2, {"kl": 0.2})
    assert steps_of(tmp_path, "ppo") == [1, 2]
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_line_in_the_middle_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"stage": "ppo", "step": 1}\n{"stage": \n{"stage": "ppo", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["stage", "step", "time"])
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    with recording(tmp_path, "demo", "ppo") as recorder, pytest.raises(ValueError, match=f"metric '{name}'"):
        recorder.record(1, {name: 1.0})
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_numbers_and_drops_cut_steps(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "sft") as recorder:
        for step in (1, 2, 3, 4):
            recorder.record(step, {"loss": step})
    with recording(tmp_path, "demo", "ppo") as recorder:
        for step in (1, 2, 3):
            recorder.record(step, {"reward/mean": step / 2, "kl": math.nan})
    with recording(tmp_path, "demo", "ppo", resume_step=1) as recorder:
        recorder.record(2, {"reward/mean": 9.0})

    def scalars(stage: str, tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage))
        events.Reload()
        return [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]

    assert scalars("ppo", "ppo/reward/mean") == [(1, 0.5), (2, 9.0)]
    assert math.isnan(scalars("ppo", "ppo/kl")[0][1])
    assert scalars("sft", "sft/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


class Failing(Logger):
    """Raises in one method; stores the logged steps."""

    def __init__(self, method: str) -> None:
        self.steps: list[int] = []
        self.method = method

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)
        self._fail("log")

    def rewind(self, step: int) -> None:
        self._fail("rewind")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, method: str) -> None:
        if method == self.method:
            raise OSError(f"{method} failed")


@pytest.mark.parametrize("method", ["log", "rewind", "close"])
def test_a_logger_that_raises_stops_neither_the_stage_nor_other_loggers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    failing, told = Failing(method), list[str]()
    monkeypatch.setitem(Logger.kinds, "ray", lambda config, stage: failing)
    chosen: list[LoggerSettings] = [RayMetricsSettings(), TensorBoardSettings()]
    with Recorder(
        tmp_path, "demo", "sft", None, chosen, lambda name, error: told.append(f"{name}: {error}")
    ) as recorder:
        for step in (1, 2, 3):
            recorder.record(step, {"loss": step})
        recorder.rewind(3)
    assert told == [f"loggers.0 (ray): {method} failed"], "once"
    assert failing.steps == steps_of(tmp_path, "sft") == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    assert [event.step for event in events.Tensors("sft/loss")] == [1, 2, 3]


def test_a_stop_request_in_a_logger_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal handler raises in whatever code the driver runs."""

    class Interrupted(Logger):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise Stopped("stopped in step 1", 15)

    monkeypatch.setitem(Logger.kinds, "ray", Interrupted)
    with (
        pytest.raises(Stopped),
        Recorder(tmp_path, "demo", "sft", None, [RayMetricsSettings()], lambda name, error: None) as recorder,
    ):
        recorder.record(1, {"loss": 1})


def test_a_stage_rewinds(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "sft") as recorder:
        recorder.record(5, {"loss": 5})
    with recording(tmp_path, "demo", "ppo") as recorder:
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


# ---------------------------------------------------------------- kept answers


def keep(recorder: Recorder, step: int, count: int = 2, most_bytes: int = 2**20, text: str = "é") -> None:
    """Keep answers of a step, and record it."""
    recorder.keep_answers(step, [{"answer": f"{text} {step}.{k}"} for k in range(count)], most_bytes)
    recorder.record(step, {"kl": step})


def kept(folder: Path) -> list[str]:
    path = folder / "samples" / "ppo.jsonl"
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()] if path.exists() else []


def test_kept_answers_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    with recording(tmp_path, "demo", "ppo") as recorder:
        keep(recorder, 1)
        keep(recorder, 2)
        recorder.keep_answers(3, [{"answer": "of a step that failed"}], 2**20)
        recorder.rewind(1)
        assert kept(tmp_path) == ["é 1.0", "é 1.1"]
        keep(recorder, 2, text="again")
    with recording(tmp_path, "demo", "rm") as recorder:
        recorder.record(1, {"loss": 1})
    with recording(tmp_path, "demo", "ppo", resume_step=2) as recorder:
        keep(recorder, 3)
    assert kept(tmp_path) == ["é 1.0", "é 1.1", "again 2.0", "again 2.1", "é 3.0", "é 3.1"]
    with recording(tmp_path, "demo", "ppo"):
        assert kept(tmp_path) == [], "the stage starts from the beginning"
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["ppo.jsonl"]


def test_the_file_of_kept_answers_does_not_grow_without_end(tmp_path: Path) -> None:
    path, most = tmp_path / "samples" / "ppo.jsonl", 1000
    with recording(tmp_path, "demo", "ppo") as recorder:
        for step in range(1, 101):
            keep(recorder, step, most_bytes=most)
            assert path.stat().st_size <= most
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == sorted([*range(steps[0], 101)] * 2), "the newest steps, complete"
        keep(recorder, 101, count=60, most_bytes=most)
    assert {json.loads(line)["step"] for line in path.read_text().splitlines()} == {101}, "a step stays complete"


def test_the_last_kept_answers(tmp_path: Path) -> None:
    from orchestrator.evaluation.sample_log import last_samples

    assert last_samples(tmp_path, "ppo") == []
    with recording(tmp_path, "demo", "ppo") as recorder:
        keep(recorder, 1)
        keep(recorder, 10)
    assert [line["answer"] for line in last_samples(tmp_path, "ppo")] == ["é 10.0", "é 10.1"]


# ---------------------------------------------------------------- the table of Ray's metrics


@pytest.mark.parametrize(
    ("metric", "name", "labels"),
    [
        ("kl", "troupe_kl_nats", {}),
        ("reward/mean", "troupe_reward_mean", {}),
        ("reward/brief", "troupe_reward_source_mean", {"source": "brief"}),
        ("reward/brief_std", "troupe_reward_source_std", {"source": "brief"}),
        ("reward/odd_std", "troupe_reward_source_mean", {"source": "odd_std"}),  # a source of this name
        ("reward/actor", "troupe_reward_source_mean", {"source": "actor"}),
        ("reward/a/b c", "troupe_reward_source_mean", {"source": "a/b c"}),
        ("timeouts/brief", "troupe_reward_timeouts_total", {"source": "brief"}),
        ("evaluation/kl", "troupe_evaluation_kl_nats", {}),
        ("evaluation/vader", "troupe_evaluation_judge_mean", {"source": "vader"}),
        ("seconds/step", "troupe_step_seconds", {}),
        ("seconds/train", "troupe_phase_seconds", {"phase": "train"}),
        ("memory_gib/actor", "troupe_memory_bytes", {"role": "actor"}),
        ("grad_norm/critic", "troupe_gradient_norm", {"role": "critic"}),
        ("failures/actor/died", "troupe_failures_total", {"role": "actor", "kind": "died"}),
        ("loss/of a plugin", "troupe_metric", {"metric": "loss/of a plugin"}),
    ],
)
def test_a_metric_has_a_name_and_labels_for_prometheus(metric: str, name: str, labels: dict[str, str]) -> None:
    row, found = row_of(metric, {metric: 1.0, "reward/brief": 1.0})
    assert (row.name, found) == (name, labels)


def test_the_table_follows_the_conventions_of_prometheus() -> None:
    kinds: dict[str, tuple[object, ...]] = {}
    for row in TABLE:
        assert re.fullmatch(r"troupe_[a-z_]+", row.name), row.name
        assert row.name.endswith("_total") == (row.kind == "counter"), row.name
        assert not re.search(r"gib|mib|percent|milli|(?<!per)_second(_|$)", row.name), row.name
        assert row.help.endswith("."), row.name
        assert len(row.help) > 20, row.name
        assert kinds.setdefault(row.name, (row.kind, row.labels)) == (row.kind, row.labels), "one name, one kind"


def test_the_document_of_rays_metrics_is_the_table() -> None:
    assert (Path(__file__).parents[3] / "docs" / "ray_metrics.md").read_text() == markdown()


# ---------------------------------------------------------------- progress


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=40), out


def test_plain_lines_are_few_but_first_and_last_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("orchestrator.loggers.console.time.monotonic", lambda: now[0])
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


SHOW = """
from orchestrator.loggers.console import Progress
from orchestrator.loggers.recorder import Recorder
with Progress("ppo", 12000) as shown:
    shown.phase("evaluating held-out prompts")
    shown._live.refresh()
    for step in range(1, 4):
        shown.update(step, {"reward/mean": 0.123, "kl": 0.05, "accuracy": 0.5, "tokens_per_second": 1234.5})
        shown._live.refresh()
"""


def frames(columns: int) -> list[str]:
    """Lines that a terminal of this width shows."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    command = [sys.executable, "-c", SHOW]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3], env=environment, stdin=terminal, stdout=terminal)
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
    os.close(screen)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", output.decode())
    return [line.strip() for line in re.split(r"[\r\n]+", plain) if "ppo" in line]


@pytest.mark.parametrize("columns", [20, 60, 80, 140])
def test_the_step_and_the_time_left_stay_in_a_narrow_terminal(columns: int) -> None:
    shown = frames(columns)
    assert all(len(line) <= columns for line in shown), "one line each"
    assert all(re.match(r"\S+ (\S+ )?ppo \d+/12000( ·|$)", line) for line in shown), shown
    assert "evaluating" in shown[0] if columns > 20 else "…" in shown[0]
    third = next(line for line in shown if "3/12000" in line)
    if columns > 20:
        assert re.search(r"3/12000 (· \d+:\d\d )?· [\d:]+ left · reward \+0\.123", third)
    assert ("tokens/s 1,234" in third) == (columns == 140)
    assert ("━" in third) == (columns == 140)


def test_the_time_left_does_not_count_the_time_lost_by_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("orchestrator.loggers.console.time.monotonic", lambda: now[0])
    console, out = plain_console()
    with Progress("ppo", 100, console) as shown:
        for step, seconds in [(1, 10), (2, 10), (3, 10), (2, 500), (3, 10), (4, 10)]:
            now[0] += seconds
            shown.update(step, {})
    assert out.getvalue().splitlines()[-1] == "ppo 4/100 · 16:00 left"


# ---------------------------------------------------------------- numbers as text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (600, "10:00"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1, "100%"),
        (0, "0%"),
        (255 / 256, "99.6%"),
        (0.9996, "99.96%"),
        (0.99999, "99.999%"),
        (1e-4, "0.01%"),
        (0.25, "25.0%"),
    ],
)
def test_a_percentage_is_not_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59.9, "60 s"), (60, "1 min"), (3600, "1 h"), (1e6, "11 d")]
)
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_a_number_that_rounds_to_0_has_no_minus() -> None:
    assert (signed(-1e-9, 3), signed(-1, 1)) == ("+0.000", "−1.0")
