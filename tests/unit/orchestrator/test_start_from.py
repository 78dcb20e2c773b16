"""A run that takes the models of its first stages from another run, in one setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs import RunConfig, load_config
from configs.schema import ModelSettings
from orchestrator.console.plan_command import plan_stages
from orchestrator.preflight.settings_checks import check_start
from orchestrator.report.history import history
from orchestrator.run.run_dir import Run, RunError
from placement import Cluster
from placement.memory import MemoryEstimate
from placement.stages import STAGES
from placement.types import Stage
from tests.support.runs import check

ADAM = {"lr": 1e-4}
DATA = {"path": "rows.jsonl"}
SETTINGS = {
    "model": {"path": "preset:s"},
    "sft": {"train": DATA, "optimizer": ADAM},
    "rm": {"train": DATA, "optimizer": ADAM},
    "ppo": {"prompts": DATA, "steps": 2, "actor_optimizer": ADAM, "critic_optimizer": ADAM},
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a run `a` whose sft and rm stages are finished."""
    monkeypatch.chdir(tmp_path)
    finished("a", ["sft", "rm"])
    return tmp_path / "runs"


def settings(name: str, *overrides: str) -> RunConfig:
    return load_config(SETTINGS | {"name": name}, overrides)


def begin(name: str, stages: list[Stage], *overrides: str) -> Run:
    run = Run.begin(settings(name, *overrides), stages)
    left = [stage for stage in run.stages if not run.finished(stage)]
    check_start(run, left)
    check(run, left)
    return run


def finished(name: str, stages: list[Stage], *overrides: str) -> Run:
    """A run whose stages are done: as far as the folder tells."""
    run = Run.begin(settings(name, *overrides), stages)
    run.save()
    for stage in stages:
        run.model(stage).mkdir(parents=True, exist_ok=True)
        (run.model(stage) / "config.json").write_text("{}")
    return run


def refusal(name: str, stages: list[Stage], *overrides: str) -> str:
    with pytest.raises(RunError) as caught:
        begin(name, stages, *overrides)
    return str(caught.value).replace(f"{Path.cwd()}/", "")


def test_ppo_takes_both_models(runs: Path) -> None:
    run = begin("b", ["ppo"], "start_from=runs/a")
    assert run.starting_model("ppo") == str(runs / "a" / "models" / "sft")
    assert run.reward_models() == {"model": str(runs / "a" / "models" / "rm")}
    run.save()
    models = runs / "a" / "models"
    noted = json.loads((runs / "b" / "run.json").read_text())
    assert noted["from"] == {"ppo": {"model": str(models / "sft"), "rewards": {"model": str(models / "rm")}}}
    assert history(run.folder) == {"Starts from": "ppo: a/models/sft, a/models/rm"}


def test_what_a_run_does_itself_it_takes_from_nowhere(runs: Path) -> None:
    """A reward model of its own, on the other run's SFT model."""
    run = begin("b", ["rm", "ppo"], "start_from=runs/a")
    assert run.starting_model("rm") == run.starting_model("ppo") == str(runs / "a" / "models" / "sft")
    assert run.reward_models() == {"model": str(run.model("rm"))}
    run.save()
    noted = json.loads((runs / "b" / "run.json").read_text())["from"]
    assert noted["ppo"]["rewards"] == {"model": "models/rm"}
    assert history(run.folder) == {"Starts from": "rm: a/models/sft · ppo: a/models/sft"}


def test_a_run_that_was_itself_started_from_another(runs: Path) -> None:
    finished("b", ["rm"], "start_from=runs/a")
    run = begin("c", ["ppo"], "start_from=runs/b")
    assert run.starting_model("ppo") == str(runs / "a" / "models" / "sft")
    assert run.reward_models() == {"model": str(runs / "b" / "models" / "rm")}


def test_only_what_is_needed_must_be_there(runs: Path) -> None:
    finished("sft-only", ["sft"])
    rewards = "ppo.rewards=[{kind: function, name: short, function: 'tests.support.micro:short'}]"
    assert begin("b", ["ppo"], "start_from=runs/sft-only", rewards).reward_models() == {}
    assert refusal("c", ["ppo"], "start_from=runs/sft-only").startswith("ppo.rewards.0.path: not set")


@pytest.mark.parametrize(
    ("stages", "named", "says"),
    [
        (["ppo"], "runs/none", "start_from: was 'runs/none', which is not a run's folder (no config.yaml)"),
        (["ppo"], "runs/b", "start_from: was 'runs/b', which leads back to the run itself; name another run"),
        (
            ["sft", "rm", "ppo"],
            "runs/a",
            "start_from: was 'runs/a', but this run would use none of its models: it runs sft, rm, ppo itself, and that run "
            "has finished sft, rm. To train a model of that run further: model.path=runs/a/models/sft",
        ),
        (
            ["sft"],
            "runs/a",
            "start_from: was 'runs/a', but this run would use none of its models: it runs sft itself, and that run has "
            "finished sft, rm. To train a model of that run further: model.path=runs/a/models/sft",
        ),
        (
            ["ppo"],
            "runs/half",
            "start_from: was 'runs/half', but runs/half has not finished its stage sft, whose model is needed; finish it first: "
            "troupe resume runs/half",
        ),
    ],
)
def test_refused_before_anything_starts(runs: Path, stages: list[Stage], named: str, says: str) -> None:
    Run.begin(settings("half"), ["sft", "rm"]).save()
    assert refusal("b", stages, f"start_from={named}") == says
    assert not (runs / "b").exists()


def test_a_circle_of_runs_is_refused(runs: Path) -> None:
    finished("b", ["ppo"], "start_from=runs/a")
    Run.begin(settings("c", "start_from=runs/b"), ["ppo"]).save()
    with (runs / "a" / "config.yaml").open("a") as file:
        file.write("start_from: runs/b\n")
    (runs / "a" / "run.json").write_text('{"stages": []}')
    assert "leads back" in refusal("d", ["ppo"], "start_from=runs/b", "model.path=preset:m")


def test_other_models_and_forms_are_refused(runs: Path) -> None:
    assert refusal("b", ["ppo"], "start_from=runs/a", "model.path=preset:m") == (
        "model.path: was 'preset:m', but runs/a, whose sft model start_from uses, began with 'preset:s'; use that path, or "
        "leave start_from out"
    )
    begin("b", ["ppo"], "start_from=runs/a", "model.path=runs/a/models/sft")
    assert refusal("b", ["ppo"], "start_from=runs/a", "chat_template=true") == (
        "chat_template: was True, but runs/a, whose sft model start_from uses, was trained with False; must be the same"
    )
    for other in ("system_prompt=Be brief.", "chat_template_args={thinking: false}", "model.end_tokens=[<end>]"):
        assert refusal("b", ["ppo"], "start_from=runs/a", other).startswith(f"{other.partition('=')[0]}: was ")


def test_the_plan_reads_the_shapes_of_the_models_that_are_taken(runs: Path) -> None:
    """The other run's reward model may be larger than the policy."""
    from placement.models import preset_config

    for stage, shape in (("sft", "s"), ("rm", "m")):
        (runs / "a" / "models" / stage / "config.json").write_text(json.dumps(preset_config(shape)))
    cluster = Cluster.parse("1x8cpu,host=64GB")

    def parameters(*overrides: str) -> dict[str, int]:
        (report,), _ = plan_stages(settings("b", "sft=none", "rm=none", *overrides), cluster)
        assert isinstance(report.memory, MemoryEstimate)
        return {role: known.uses["score"].host.parameters for role, known in report.memory.roles.items()}

    alone, taken = parameters(), parameters("start_from=runs/a")
    assert taken["actor"] == alone["actor"]
    assert taken["reward"] > 2.5 * alone["reward"]
    assert taken["critic"] > 2.5 * alone["critic"]


def test_taken_weights_are_weights_though_the_config_draws_some(runs: Path) -> None:
    random = ["model={path: preset:s, init: random}"]
    finished("drawn", ["sft", "rm"], *random)
    run = begin("b", ["ppo"], "start_from=runs/drawn", *random)
    assert run.config.model == ModelSettings(path="preset:s", init="random")
    assert "model.init: was 'random'" in refusal("c", ["ppo"], *random)


def test_start_from_may_change_until_it_has_been_used(runs: Path) -> None:
    finished("b", ["sft"])
    begin("b", ["ppo"], "start_from=runs/a").save()
    line = {"stage": "ppo", "step": 1, "time": 0.0}
    (runs / "b" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RunError, match=r"has begun \(sft, ppo\).*\n  start_from: 'runs/a' in the run, None now$"):
        Run.begin(settings("b"), ["ppo"])
    assert [stage for stage in STAGES if Run.open(runs / "b").finished(stage)] == ["sft"]
