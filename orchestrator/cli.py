"""The command `troupe`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from orchestrator.run import Run
    from placement.types import Stage

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def path(text: str) -> Path:
    """A path with `~` expanded: shells do not expand it in `--output=~/answers.jsonl` or within quotes."""
    return Path(text).expanduser()


Config = Annotated[Path, typer.Argument(parser=path, help="YAML file with the run's settings.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to override: a.b=c ...", show_default=False)]
Accept = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Resume an unfinished stage even if settings that affect its results have changed; finished stages do not change.",
    ),
]
StageOption = Annotated[
    str | None, typer.Option("--stage", help="Stage whose model is used; default: the last finished stage.")
]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; default: rollout.temperature.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Maximum tokens of a response; default: rollout.max_new_tokens.")
]
RunFolder = Annotated[Path, typer.Argument(parser=path, help="The run's folder, runs/<name>.")]


def _dashed(name: str, text: str, least: int = 1) -> Any:
    """An option of the original benchmark, whose names have underscores; dashes work too."""
    return typer.Option(f"--{name.replace('-', '_')}", f"--{name}", min=least, help=text)


def _print_versions(requested: bool) -> None:
    if requested:
        from orchestrator.run.versions import versions

        print("\n".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the versions of Troupe and its libraries."
        ),
    ] = False,
) -> None:
    """Train chat models from human feedback: supervised fine-tuning, reward model, PPO."""
    from orchestrator.console import make_output_hangup_safe

    make_output_hangup_safe()


@app.command()
def sft(config: Config, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Stage 1: fine-tune on demonstrations."""
    _run(config, overrides, ["sft"], accept_changes)


@app.command()
def rm(config: Config, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Stage 2: train the reward model on preferences."""
    _run(config, overrides, ["rm"], accept_changes)


@app.command()
def ppo(config: Config, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Stage 3: PPO with actor, critic, reference and reward model."""
    _run(config, overrides, ["ppo"], accept_changes)


@app.command()
def pipeline(config: Config, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Run all stages of the config; finished stages are skipped."""
    _run(config, overrides, None, accept_changes)


@app.command()
def resume(run: RunFolder, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Resume a run that was stopped or interrupted, also on other devices."""
    with _errors():
        from orchestrator.run import Run

        opened = Run.open(run, overrides or [], accept_changes)
        if opened.go_to_working_folder():
            print(f"working folder: {Path.cwd()}, where this run began")
        _resume(opened)


@app.command()
def status(run: RunFolder) -> None:
    """Show what a run is doing, or how it ended and how to resume it."""
    with _errors():
        from orchestrator.console import print_status
        from orchestrator.run import Run

        print_status(Run.open(run), Console())


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Folder that contains the runs (the setting `runs`).")] = Path("runs"),
) -> None:
    """List the runs in a folder: stage, step, state, result, age."""
    with _errors():
        from orchestrator.console import print_runs

        print_runs(folder.expanduser(), Console())


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Check a run without starting it: settings, data, tokenizers, models, rewards. Prints all problems at once."""
    with _errors():
        from configs import load_config
        from orchestrator.api import checked
        from orchestrator.run import Run, described

        settings, console = load_config(config, overrides or []), Console()
        _, report = checked(Run.begin(settings, described(settings)))
        for line in report.lines():
            console.print(line, soft_wrap=True)
        report.raise_if_refused()
        console.print(f"no problems; checked in {report.seconds:.1f} s")


@app.command()
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(parser=path, help="YAML file with the run's settings.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="Plan for this cluster, for example 4x8xA100-80GB, instead of this machine.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a config: PPO with four models of this size (8b, a folder, a hub name) on all GPUs."
        ),
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="The setting `strategy`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(parser=path, help="Write a chart of the memory by phase to this .svg, .png or .html."),
    ] = None,
) -> None:
    """Print each stage's placement, batch sizes and predicted memory; fail if its roles do not fit on the cluster."""
    with _errors():
        import json

        from orchestrator.console import load_settings, parse_cluster, plan_stages

        if picture:
            _check_output(picture, "--picture")
        if picture and picture.suffix not in (".svg", ".png", ".html"):
            raise typer.BadParameter(f"was {picture}; must end in .svg, .png, .html", param_hint="--picture")
        spec = parse_cluster(cluster)
        overrides = [*(overrides or []), *([f"strategy={strategy}"] if strategy else [])]
        reports, resolved = plan_stages(load_settings(config, model, overrides, spec), spec)
        if as_json:
            print(json.dumps({report.plan.stage: report.as_dict() for report in reports}, indent=1))
        else:
            from placement import render

            Console().print(*resolved, *(render(report.plan, report.memory) for report in reports), sep="\n")
        if picture:
            from orchestrator.report import draw_memory

            draw_memory(reports, picture)


@app.command()
def config(
    search: Annotated[str, typer.Argument(help="Show only settings whose path contains this text.")] = "",
) -> None:
    """List every setting with its meaning, type and default."""
    from rich.padding import Padding
    from rich.text import Text

    from configs.reference import describe

    settings = [setting for setting in describe() if search in setting.path]
    if not settings:
        raise typer.BadParameter(f"no setting's path contains {search!r}", param_hint="SEARCH")
    console = Console()
    for setting in settings:
        console.print(Text.assemble((setting.path, "bold"), f"  {setting.type}  [{setting.default}]"), soft_wrap=True)
        console.print(Padding(Text(setting.meaning), (0, 0, 0, 4)))


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html again."""
    with _errors():
        from orchestrator.report import write_report
        from orchestrator.run import Run

        print(write_report(Run.open(run).folder))


@app.command()
def generate(
    run: RunFolder,
    prompts: Annotated[
        Path,
        typer.Option(parser=path, help="JSONL or Parquet file with a `prompt` or `messages` column."),
    ],
    output: Annotated[Path, typer.Option(parser=path, help="JSONL file to write.")] = Path("answers.jsonl"),
    stage: StageOption = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Write responses of the trained model to the prompts of a file."""
    with _errors():
        from orchestrator.chat import Sampling, answer_file

        count = answer_file(run, stage, prompts, output, Sampling(temperature, max_new_tokens))
        print(f"{count} responses in {output}")


@app.command()
def chat(
    run: RunFolder,
    stage: StageOption = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Chat with the trained model. An empty line or Ctrl-D ends."""
    with _errors():
        from orchestrator.chat import Sampling, converse

        converse(run, stage, Console(), Sampling(temperature, max_new_tokens))


@app.command()
def bench(
    overrides: Overrides = None,
    model: Annotated[
        str, typer.Option(help="Size s, m, l, xl, 2b, ... 175b (GPT-2 shapes), or the path of a config.json.")
    ] = "s",
    strategy: Annotated[str, typer.Option(help="The setting `strategy`; the original's names work too.")] = "ddp",
    experience_batch_size: Annotated[
        int, _dashed("experience-batch-size", "Prompts per generated batch, per rank.")
    ] = 8,
    train_batch_size: Annotated[int, _dashed("train-batch-size", "Samples per optimizer step, per rank.")] = 8,
    num_episodes: Annotated[int, _dashed("num-episodes", "Episodes.")] = 3,
    max_timesteps: Annotated[int, _dashed("max-timesteps", "Experience batches per episode.")] = 8,
    update_timesteps: Annotated[int, _dashed("update-timesteps", "Experience batches between updates.")] = 8,
    max_epochs: Annotated[int, _dashed("max-epochs", "Epochs over the experience of an update.")] = 3,
    lora_rank: Annotated[int, _dashed("lora-rank", "Train adapters of this rank; 0: all weights.", 0)] = 0,
    share: Annotated[str, typer.Option(help="Roles that share one base: actor,critic,reference,reward.")] = "",
    layout: Annotated[str, typer.Option(help="Placement of the roles: separate, paired or colocated.")] = "separate",
    devices: Annotated[int, typer.Option(min=1, help="Ranks of each role.")] = 1,
    precision: Annotated[str, typer.Option(help="Data type: float32 or bfloat16.")] = "float32",
    lengths: Annotated[str, typer.Option(metavar="PROMPT,TOTAL", help="Tokens of a prompt, and in total.")] = "400,512",
    capacity: Annotated[
        bool,
        typer.Option(
            "--capacity",
            help="Find the largest model that runs: for ddp in float32 and for each strategy (comma-separated).",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="With --capacity: memory limit, for example 16GiB; default: the available memory."),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON; -: to standard output.")
    ] = None,
) -> None:
    """Benchmark PPO on random prompts and models: throughput, TFLOPS, memory.

    Flags and defaults are those of Colossal-AI's benchmark_gpt_dummy.py.
    """
    with _errors():
        from orchestrator.bench import Benchmark, memory_of, print_bench, run_benchmark, search_capacity, variants

        prompt, total = _lengths(lengths)
        if json_file and json_file != "-":
            _check_output(Path(json_file), "--json")
        benchmark = Benchmark(
            model=model,
            strategy=strategy,
            experience_batch_size=experience_batch_size,
            train_batch_size=train_batch_size,
            num_episodes=num_episodes,
            max_timesteps=max_timesteps,
            update_timesteps=update_timesteps,
            max_epochs=max_epochs,
            lora_rank=lora_rank,
            share=tuple(filter(None, share.split(","))),
            layout=layout,
            devices=devices,
            precision=precision,
            prompt=prompt,
            total=total,
        )
        console = Console(stderr=json_file == "-")
        if capacity:
            limit = memory_of(memory) if memory else None
            result = search_capacity(variants(benchmark, overrides or []), limit, console)
        else:
            result = run_benchmark(benchmark, overrides or [], console)
            print_bench(result, console)
        _write_json(result, json_file)


def _lengths(text: str) -> tuple[int, int]:
    try:
        prompt, total = map(int, text.split(","))
    except ValueError:
        prompt, total = 0, 0
    if not 0 < prompt < total:
        raise typer.BadParameter(f"was {text!r}; must be PROMPT,TOTAL, for example 400,512", param_hint="--lengths")
    return prompt, total


def _check_output(file: Path, option: str) -> None:
    """Refuse a file before the work starts if it could not be written at the end."""
    if not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"was {file}; the folder {file.parent} does not exist", param_hint=option)
    if file.is_dir():
        raise typer.BadParameter(f"was {file}, which is a folder", param_hint=option)


def _write_json(value: Any, file: str | None) -> None:
    import json

    if file == "-":
        print(json.dumps(value, indent=1))
    elif file:
        Path(file).expanduser().write_text(json.dumps(value, indent=1), encoding="utf-8")


def _run(path: Path, overrides: list[str] | None, stages: list[Stage] | None, accept_changes: bool) -> None:
    with _errors():
        from configs import load_config
        from orchestrator.run import Run, described

        settings = load_config(path, overrides or [])
        _resume(Run.begin(settings, stages or described(settings), accept_changes))


def _resume(run: Run) -> None:
    from orchestrator.api import resume
    from orchestrator.console import print_result

    console = Console()
    print_result(resume(run, console), console)


@contextmanager
def _errors() -> Iterator[None]:
    """Print errors that the user can fix in a few lines, without a traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        sys.exit(128 + getattr(error, "number", signal.SIGINT))  # StoppedAtOnce was explained already
    except Exception as error:
        name = type(error).__name__
        if name == "Stopped":
            print(error)
            sys.exit(128 + error.number)  # type: ignore[attr-defined]
        if name not in EXIT_CODES:
            raise
        print(f"troupe: {error}", file=sys.stderr)
        sys.exit(EXIT_CODES[name])


REFUSED = (
    "ConfigError",
    "DataError",
    "MetricsError",
    "PlanError",
    "PreflightError",
    "RewardError",
    "RunError",
    "UnknownNameError",
)
FAILED = ("DifferentModel", "DiskError", "LogProbGapError", "PlacementError", "SkippedStepsError", "WorkerError")
EXIT_CODES = dict.fromkeys(REFUSED, 2) | dict.fromkeys(FAILED, 1)
"""Keyed by name, so that only the commands that need an error's module import it."""


if __name__ == "__main__":
    app()
