"""The three stages end to end on a tiny model, with real Ray, vLLM and DeepSpeed: what a run leaves, stops and goes on with."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator import Result, RunError, Stopped, load_config, run_stages
from orchestrator.console.run_summary import print_result
from orchestrator.loggers.ray_table import row_of
from orchestrator.number_text import clock
from orchestrator.run.condition import Condition
from orchestrator.run.run_dir import Run
from orchestrator.storage.atomic_files import DiskError
from orchestrator.storage.metrics_file import read_metrics
from orchestrator.storage.metrics_file import repeatable as lines
from placement.cluster import Cluster
from tests.support.report_oracle import check_report
from tests.support.runs import ROOT, TWO_ENGINES, begun, command, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def environment(ray_here: Cluster) -> dict[str, str]:
    """For commands that use the tests' cluster."""
    import ray

    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


# ---------------------------------------------------------------- files of a run


def test_a_run_leaves_the_documented_files(whole: Result) -> None:
    from safetensors.torch import load_file

    files = (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "evaluation",
        "tensorboard",
        "logs",
    )
    assert all((whole.folder / name).exists() for name in files)
    assert not list(whole.folder.rglob("*.partial"))
    assert not list(whole.folder.glob("checkpoints/*/*"))
    assert list(whole.models) == ["sft", "rm", "ppo"]
    counts = json.loads((whole.folder / "summary.json").read_text())["data"]
    assert {setting: (of["rows"], of["kept"], of["equal"]) for setting, of in counts.items()} == {
        "sft.train": (60, 60, 0),
        "sft.validation": (10, 10, 0),
        "rm.train": (60, 40, 20),
        "rm.validation": (10, 7, 3),
        "rm.normalize_on": (60, 60, 0),
        "ppo.prompts": (60, 60, 0),
        "ppo.evaluation.prompts": (6, 6, 0),
    }
    assert "rm.train: 40 of 60 pairs, 20 left out with two equal answers" in whole.report.read_text()
    weights = {stage: load_file(model / "model.safetensors") for stage, model in whole.models.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not weights["sft"][name].equal(weights["ppo"][name])
    assert not weights["sft"][name].equal(weights["rm"][name])


def test_numbers_of_the_whole_run(whole: Result) -> None:
    sft, rm, ppo = (lines(whole.folder, stage) for stage in ("sft", "rm", "ppo"))
    assert [line["step"] for line in sft] == list(range(1, 13))
    assert [line["step"] for line in rm] == list(range(1, 10))
    assert [line["step"] for line in ppo] == list(range(7))  # 0: the evaluation before
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert all(line["logprob_mismatch"] < 1e-3 for line in ppo[1:])
    assert [line["policy_version"] for line in ppo[1:]] == list(range(6))  # the version that wrote the step's answers
    assert ppo[1]["kl"] == pytest.approx(0, abs=1e-4)
    assert ppo[-1]["kl"] != pytest.approx(0, abs=1e-4)

    numbers = whole.numbers["ppo"]
    before, after = (
        [json.loads(line) for line in (whole.folder / "evaluation" / f"{when}.jsonl").read_text().splitlines()]
        for when in ("before", "after")
    )
    assert len(before) == len(after) == numbers["prompts"] == 6
    assert numbers["reward_after"] == pytest.approx(sum(line["reward"] for line in after) / 6)
    assert numbers["reward_after"] == pytest.approx(ppo[-1]["evaluation/reward"])
    assert numbers["reward_change"] == pytest.approx(numbers["reward_after"] - numbers["reward_before"])
    assert numbers["judge/short_before"] == pytest.approx(sum(line["judges"]["short"] for line in before) / 6)
    check_report(whole.folder)
    assert whole.numbers["sft"]["validation/perplexity"] == sft[-1]["validation/perplexity"]
    assert whole.numbers["rm"]["validation/accuracy"] == rm[-1]["validation/accuracy"]


def test_every_metric_has_a_name_of_its_own_on_rays_port(whole: Result) -> None:
    recorded = [line for stage in ("sft", "rm", "ppo") for line in lines(whole.folder, stage)]
    alone = ("stage", "step", "lr", "grad_norm", "skipped")  # the last three get their stage's role
    unnamed = {name for line in recorded for name in line if row_of(name, line)[0].name == "troupe_metric"}
    assert unnamed <= {*alone}


def test_answers_of_training_are_kept(whole: Result, micro: Path) -> None:
    kept = [json.loads(line) for line in (whole.folder / "samples" / "ppo.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1] * 8 + [6] * 8  # every 10 steps, and the first and the last
    rows = [json.loads(line)["prompt"] for line in (micro.parent / "prompts.jsonl").read_text().splitlines()]
    of_step = {line["step"]: line for line in read_metrics(whole.folder) if line["stage"] == "ppo"}
    for step in (1, 6):
        mine, metrics = [line for line in kept if line["step"] == step], of_step[step]
        assert [line["prompt"] for line in mine] == [rows[line["row"]] for line in mine]
        assert len({line["row"] for line in mine}) == 4, "all of a step's 4 x 2 answers"
        tokens = [line["tokens"] for line in mine]
        assert sum(tokens) == metrics["tokens"]
        assert sum(line["reward"] for line in mine) / 8 == pytest.approx(metrics["reward/mean"], abs=1e-6)
        assert [line["rewards"] for line in mine] == [{"model": line["reward"]} for line in mine]
        kl = sum(line["kl"] * line["tokens"] for line in mine) / sum(tokens)
        assert kl == pytest.approx(metrics["kl"], abs=1e-6)
        assert sum(not line["ended"] for line in mine) / 8 == metrics["truncated"]
        assert all(line["ended"] or line["tokens"] == 8 for line in mine)
        assert len({line["answer"] for line in mine}) > 1


def test_status_and_list_of_a_finished_run(whole: Result) -> None:
    shown = subprocess.run(command("status", str(whole.folder)), cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{whole.folder.name} is finished" in shown.stdout
    assert "6 held-out prompts, before -> after" in shown.stdout
    assert f"total time {clock(sum(whole.seconds.values()))}" in shown.stdout
    assert "restarts" not in shown.stdout
    shown = subprocess.run(
        command("list", str(whole.folder.parent)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith(whole.folder.name + " ")]
    assert line.split()[1:4] == ["ppo", "6/6", "finished"]


def test_a_finished_stage_is_not_run_again(whole: Result, micro: Path) -> None:
    recorded = read_metrics(whole.folder)
    again = run_stages(load_config(micro, [TWO_ENGINES]))
    assert again == whole
    assert read_metrics(whole.folder) == recorded


def test_other_settings_are_refused_with_the_difference(whole: Result, micro: Path) -> None:
    with pytest.raises(RunError) as caught:
        run_stages(load_config(micro, [TWO_ENGINES, "ppo.steps=7", "seed=5"]))
    first, *differences = str(caught.value).splitlines()
    assert "has finished (sft, rm, ppo) with other settings" in first
    assert f"start_from={whole.folder}" in first
    assert differences == ["  ppo.steps: 6 in the run, 7 now", "  seed: 1 in the run, 5 now"]
    noted = (whole.folder / "config.yaml").read_text()
    run_stages(load_config(micro, ["checkpoint.every=2", "deadlines.initial_timeout=999"]))
    assert (whole.folder / "config.yaml").read_text() == noted, "nothing was run with these"


def test_settings_of_a_stage_that_has_not_begun_may_change(whole: Result, micro: Path, tmp_path: Path) -> None:
    from orchestrator.run.run_dir import Run

    begun(whole, tmp_path, without=("ppo",))
    changed = [TWO_ENGINES, f"runs={tmp_path}", "ppo.steps=3", "rollout.max_new_tokens=5"]
    assert Run.begin(load_config(micro, changed), ["ppo"]).config.ppo.steps == 3  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"has finished \(rm\)"):
        Run.begin(load_config(micro, [*changed, "rm.epochs=2"]), ["ppo"])


# ---------------------------------------------------------------- stopped and resumed


def test_sft_stopped_by_a_signal_goes_on(whole: Result, micro: Path, tmp_path: Path) -> None:
    config = load_config(micro, [TWO_ENGINES, f"runs={tmp_path}", "checkpoint.every=2", "checkpoint.keep=2"])
    folder = tmp_path / "micro"

    def stop() -> None:
        wait_for(lambda: len(lines(folder, "sft")) >= 5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match=r"stopped after step \d+ of 12 of sft; resume with: troupe resume"):
        run_stages(config, ["sft"])
    thread.join()
    done = len(lines(folder, "sft"))
    kept = sorted(int(path.name) for path in (folder / "checkpoints" / "sft").iterdir())
    assert kept == [(done - 1) // 2 * 2, done]  # the last two: at every second step, and where it stopped
    assert not (folder / "models" / "sft").exists()
    run = Run.open(folder)
    stopped = Condition.of(run)
    assert (stopped.state, stopped.why) == ("stopped", f"stopped after step {done} of 12 of sft")

    resumed = run_stages(config, ["sft"])
    assert lines(folder, "sft") == lines(whole.folder, "sft")
    assert resumed.seconds["sft"] > stopped.seconds["sft"] > 0, "those of both sessions"
    out = io.StringIO()
    print_result(resumed, Console(file=out, width=200))
    assert f"12 steps in {clock(resumed.seconds['sft'])}" in out.getvalue()
    assert Condition.of(run).state == "finished"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint folder for a new run, on a disk that is smaller than one checkpoint."""
    folder = tmp_path / "micro" / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_training_goes_on_though_the_disk_is_too_small_for_checkpoints(
    whole: Result, micro: Path, tmp_path: Path, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [TWO_ENGINES, f"runs={tmp_path}", "checkpoint.every=5"]
    with pytest.raises(DiskError, match=r"checkpoints/sft/5: cannot be written: the disk is full"):
        run_stages(load_config(micro, config), ["sft"])
    run_stages(load_config(micro, [*config, "checkpoint.on_error=continue"]), ["sft"])
    assert capsys.readouterr().out.count("the run continues (checkpoint.on_error: continue)") == 2
    assert lines(tmp_path / "micro", "sft") == lines(whole.folder, "sft")
    assert list((full_disk / "sft").iterdir()) == []
    first, second = sorted((tmp_path / "micro" / "failures").iterdir())
    assert first.name == "0001-DiskError.txt" and "Traceback" in first.read_text()
    assert second.name == "0002-DiskError.txt" and "2 times so far" in second.read_text()


# ---------------------------------------------------------------- other settings


def ppo_alone(whole: Result, micro: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Two steps of PPO from the whole run's models; its metrics."""
    start = [f"runs={folder}", f"start_from={whole.folder}", "ppo.steps=2"]
    run_stages(load_config(micro, [*start, *overrides]), ["ppo"])
    return lines(folder / "micro", "ppo")


def test_where_roles_lie_changes_nothing_and_models_are_taken_from_another_run(
    whole: Result, micro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colocated with one engine, against separate with two engines; both from the same models."""
    found = ppo_alone(whole, micro, tmp_path, "placement.layout=colocated")
    models = f"{whole.folder}/models/sft, {whole.folder}/models/rm"
    assert f"models of other runs (start_from): {models}\n" in capsys.readouterr().out
    starts = json.loads((tmp_path / "micro" / "run.json").read_text())["from"]
    assert starts == {"ppo": {"model": str(whole.models["sft"]), "rewards": {"model": str(whole.models["rm"])}}}
    assert "ppo: micro/models/sft, micro/models/rm" in (tmp_path / "micro" / "report.html").read_text()
    expected = lines(whole.folder, "ppo")
    assert [line["step"] for line in found] == [0, 1, 2]
    for name in ("reward/mean", "kl", "entropy", "length/response", "loss/policy", "loss/value"):
        assert [line[name] for line in found[1:]] == pytest.approx([line[name] for line in expected[1:3]], abs=1e-4), (
            name
        )


def test_every_metric_is_documented(whole: Result) -> None:
    """In docs/metrics.md, where a part in braces stands for a name."""
    names = {
        "source": "model",
        "judge": "short",
        "role": "actor|critic|reference|reward|rollout|driver",
        "phase": r"\w+",
    }
    table = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    named = [re.escape(name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    patterns = [re.sub(r"\\{(\w+)\\}", lambda part: f"({names.get(part[1], '.+')})", name) for name in named]
    recorded = {name for line in read_metrics(whole.folder) for name in line} - {"stage", "step", "time"}
    assert [name for name in sorted(recorded) if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_without_critic_with_a_custom_advantage_pretraining_mix_and_two_rewards(
    whole: Result, micro: Path, tmp_path: Path
) -> None:
    folder = micro.parent
    rewards = "[{kind: model}, {kind: function, name: brief, function: 'tests.support.micro:short', weight: 0.5}]"
    found = ppo_alone(
        whole,
        micro,
        tmp_path,
        "placement.layout=paired",
        "ppo.critic=false",
        "plugins=[tests.plugins.token_advantage]",
        "ppo.advantage={kind: whole_reward, factor: 0.25}",
        f"ppo.ptx={{coefficient: 5, batch_size: 60, data: {{path: {folder / 'sft.jsonl'}}}}}",
        f"ppo.rewards={rewards}",
    )
    for line in found[1:]:
        assert line["loss/ptx"] > 0
        assert line["reward/mean"] == pytest.approx(line["reward/model"] + 0.5 * line["reward/brief"], abs=1e-5)
        assert not [name for name in line if "critic" in name or "value" in name]
    assert found[1]["loss/ptx"] > found[2]["loss/ptx"]


def test_failures_outside_of_the_training_leave_a_record_and_the_model(
    whole: Result, micro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge that never replies, a reward function that gives some answers no score, and steps too far from the reference, which
    change neither the actor nor the critic."""
    functions = "tests.support.reward_functions"
    sources = f"{{kind: function, name: half, function: '{functions}:half_of_them', batch_size: 1, weight: 0.5}}"
    found = ppo_alone(
        whole,
        micro,
        tmp_path,
        "ppo.steps=3",
        "ppo.actor_optimizer.lr=0.01",  # so far that the estimate of the KL is positive, whatever the answers
        f"ppo.rewards=[{{kind: model, path: {whole.models['rm']}}}, {sources}]",
        "ppo.max_unscored=0.9",
        "ppo.max_kl_per_step=1e-6",
        "recovery.max_skipped_steps=9",
        f"ppo.evaluation.judges=[{{name: never, function: '{functions}:never', timeout: 0.5}}]",
    )
    folder = tmp_path / "micro"
    for line in found[1:]:
        assert line["reward/half/even"] == 1.0, "of the answers that have a score"
        assert 8 > line["unscored"] >= line["errors/half"]
    assert sum(line["errors/half"] for line in found[1:]) > 0
    assert [line.get("skipped/actor") for line in found[1:]] == [0, 1, 1]
    assert [line.get("skipped/critic") for line in found[1:]] == [0, 1, 1]
    assert ["loss/value" in line for line in found[1:]] == [True, False, False]
    assert [line["policy_version"] for line in found[1:]] == [0, 1, 1]
    assert not [name for line in found for name in line if "never" in name and line[name]]

    failures = {path.name[5:]: path.read_text() for path in (folder / "failures").iterdir()}
    assert failures.keys() == {
        "reward-never.txt",
        "reward-half.txt",
        "actor-skipped.txt",
        "critic-skipped.txt",
    }
    assert "never gave no score for 6 of 6 responses: no answer in 0.5 s" in failures["reward-never.txt"]
    assert "2 times so far" in failures["reward-never.txt"], "before and after"
    assert (
        "ValueError: an odd answer" in failures["reward-half.txt"]
        and "reward_functions.py" in failures["reward-half.txt"]
    )
    assert "row " in failures["reward-half.txt"]
    said = capsys.readouterr().out
    assert said.index("warning: never gave no score for 6 of 6 responses") < said.index("ppo 1/3"), (
        "before the first step"
    )

    numbers = json.loads((folder / "summary.json").read_text())["stages"]["ppo"]
    assert not [name for name in numbers if name.startswith("judge/")]
    assert (folder / "report.html").exists() and (folder / "models" / "ppo" / "model.safetensors").exists()


# ---------------------------------------------------------------- the trained model


def test_generate_and_chat(whole: Result, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "the film", "id": 7}\n{"prompt": "the plot", "id": 8}\n')
    options = ["--prompts", str(prompts), "--output", str(answers)]
    done = subprocess.run(
        command("generate", str(whole.folder), *options), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"2 responses in {answers}\n"
    assert done.stderr == ""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(row["prompt"], row["id"]) for row in rows] == [("the film", 7), ("the plot", 8)]
    assert all(isinstance(row["answer"], str) for row in rows)

    typed = "the cast\nthis line is longer than it may be\nthe end\n\n"
    said = subprocess.run(
        command("chat", str(whole.folder), "--stage", "sft"),
        cwd=ROOT,
        input=typed,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stderr == ""
    assert f"loading the sft model of {whole.folder}" in said.stdout
    assert "begin a text, and it continues the text" in said.stdout, "as it was trained"
    assert "> the cast" in said.stdout
    assert "longer than 16 tokens" in said.stdout
    assert "> the end" in said.stdout
