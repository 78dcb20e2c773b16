"""`troupe bench`: the formulas against numbers worked by hand, exact sizes, a whole run, capacity under a limit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs import ConfigError
from orchestrator.bench.bench import PROMPTS, Benchmark
from orchestrator.bench.capacity import failure_of, memory_of, variants
from orchestrator.bench.process_memory import MemoryMonitor
from orchestrator.run.run_dir import RunError
from placement.models import Architecture, SampleFlops
from tests.support.runs import command

DEFAULTS: dict[str, Any] = {
    "model": "s",
    "strategy": "ddp",
    "experience_batch_size": 8,
    "train_batch_size": 8,
    "num_episodes": 3,
    "max_timesteps": 8,
    "update_timesteps": 8,
    "max_epochs": 3,
    "lora_rank": 0,
    "share": (),
    "layout": "separate",
    "devices": 1,
    "precision": "float32",
    "prompt": 400,
    "total": 512,
}
TINY = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY | {"initializer_range": 0.02}))
    return path


# ---------------------------------------------------------------- formulas


def test_operations_of_the_original_benchmark() -> None:
    """gpt2 s, 400 + 112 tokens: 2 N x (911 x 112 / 2) to generate, 2 N x 512 for each of four, 2 N x 512 x 3 for two."""
    flops = SampleFlops(
        actor=124_439_808, critic=124_440_576, reference=124_439_808, reward=124_440_576, prompt=400, total=512
    )
    assert flops.generation_original == 2 * 124_439_808 * 51_016 == 12_696_842_489_856
    assert flops.experience_original == 12_696_842_489_856 + 1024 * 497_760_768 == 13_206_549_516_288
    assert flops.learning_original == 1024 * 248_880_384 * 3 == 764_560_539_648


def test_operations_with_a_cached_generation() -> None:
    """511 tokens go through the model once; the actor's forward pass is not made, since the engine gives its numbers."""
    flops = SampleFlops(actor=100, critic=10, reference=100, reward=20, prompt=400, total=512)
    assert flops.generation_cached == 2 * 100 * 511
    assert flops.experience_cached == 2 * 100 * 511 + 2 * 512 * 130
    assert flops.learning_cached == flops.learning_original == 2 * 512 * 110 * 3


def test_the_original_counts_generation_a_hundredfold_and_experience_twentyfold() -> None:
    flops = SampleFlops(1, 1, 1, 1, prompt=400, total=512)
    assert flops.generation_original / flops.generation_cached == pytest.approx(99.8, abs=0.1)
    with_four_passes = flops.generation_cached + 2 * 512 * 4
    assert flops.experience_original / with_four_passes == pytest.approx(20.7, abs=0.1)


def test_checkpointing_adds_a_pass_and_a_frozen_base_saves_one() -> None:
    plain = SampleFlops(100, 100, 100, 100, prompt=4, total=8)
    checkpointed = SampleFlops(100, 100, 100, 100, prompt=4, total=8, checkpointing=True)
    frozen = SampleFlops(100, 100, 100, 100, prompt=4, total=8, frozen_base=True)
    one_pass = 2 * 8 * 200
    assert checkpointed.learning_original - plain.learning_original == one_pass
    assert plain.learning_cached - frozen.learning_cached == one_pass
    assert frozen.learning_original == plain.learning_original


@pytest.mark.parametrize(
    ("name", "count"), [("s", 124_439_808), ("m", 354_823_168), ("l", 774_030_080), ("xl", 1_557_611_200)]
)
def test_parameters_are_exact(name: str, count: int) -> None:
    assert Architecture.read(Benchmark(**DEFAULTS | {"model": name}).shape()).parameters == count


# ---------------------------------------------------------------- settings


def test_a_step_is_what_the_original_did_between_two_updates(tmp_path: Path) -> None:
    ppo = Benchmark(**DEFAULTS).settings(tmp_path)["ppo"]
    assert (ppo["steps"], ppo["prompts_per_step"], ppo["epochs"], ppo["mini_batches"]) == (3, 64, 3, 8)
    assert Benchmark(**DEFAULTS).warm_up_steps == 1


def test_batches_are_per_rank(tmp_path: Path) -> None:
    ppo = Benchmark(**DEFAULTS | {"devices": 4}).settings(tmp_path)["ppo"]
    assert (ppo["prompts_per_step"], ppo["mini_batches"]) == (256, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "--model: was 'huge'; must be one of s, m,"),
        ({"total": 2048}, "--lengths: 2048 tokens in total, but the model has 1024 positions"),
        ({"update_timesteps": 7}, "--update_timesteps: was 7, which does not divide the 3 x 8 timesteps"),
    ],
)
def test_refusals_name_the_flag(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Benchmark(**DEFAULTS | changes).settings(tmp_path)


def test_critic_and_reward_model_share_together_or_not_at_all(tmp_path: Path) -> None:
    assert Benchmark(**DEFAULTS | {"share": ("actor", "critic", "reference", "reward")}).shares_reward
    assert not Benchmark(**DEFAULTS | {"share": ("actor", "reference")}).shares_reward
    with pytest.raises(RunError, match="--share: has only critic of critic and reward"):
        _ = Benchmark(**DEFAULTS | {"share": ("actor", "critic")}).shares_reward


def test_sizes_of_memory() -> None:
    assert (memory_of("16GiB"), memory_of("1.5gib"), memory_of("500MB")) == (16 * 2**30, 3 * 2**29, 500_000_000)
    with pytest.raises(RunError, match="--memory: was 'much'; must be a size, for example 16GiB"):
        memory_of("much")


def test_capacity_refuses_a_strategy_that_there_is_not_before_it_tries_one() -> None:
    with pytest.raises(ConfigError, match=r"^strategy: was \"zero9\""):
        variants(Benchmark(**DEFAULTS | {"strategy": "zero2,zero9"}), [])


def test_capacity_compares_with_plain_ddp() -> None:
    asked = Benchmark(**DEFAULTS | {"strategy": "ddp,zero2", "lora_rank": 8, "precision": "bfloat16"})
    found = variants(asked, ["weight_sync.bucket_mib=8"])
    assert list(found) == ["ddp float32", "ddp bfloat16 LoRA 8", "zero2 bfloat16 LoRA 8"]
    assert not any("lora" in flag for flag in found["ddp float32"])
    assert all("weight_sync.bucket_mib=8" in flags for flags in found.values())


# ---------------------------------------------------------------- memory, watched


def test_a_short_peak_of_a_process_below_is_seen() -> None:
    code = "import time; time.sleep(1.5); x = bytearray(300 * 2**20); time.sleep(0.3); del x; time.sleep(0.7)"
    process = subprocess.Popen([sys.executable, "-c", code])
    with MemoryMonitor(os.getpid()) as monitor, monitor.phase("work"):
        process.wait()
    assert 300 < monitor.each()[process.pid] / 2**20 < 340
    assert monitor.total > monitor.each()[process.pid]
    assert monitor.peaks["work"].total == monitor.total


def test_passing_a_limit_is_noticed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; x = bytearray(200 * 2**20); time.sleep(60)"])
    try:
        with MemoryMonitor(process.pid, limit=100 * 2**20) as monitor:
            assert monitor.over_limit.wait(30)
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_whole_benchmark(tiny: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    flags = ["--lengths=8,16", "--num_episodes=2", "--max_timesteps=2", "--update-timesteps=2", "--max_epochs=1"]
    done = subprocess.run(
        command("bench", f"--model={tiny}", f"--json={result}", *flags), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    shape = Architecture.read(TINY)
    assert found["parameters"]["actor"] == found["parameters"]["reference"] == shape.parameters
    assert found["parameters"]["critic"] == shape.parameters + 64
    assert found["counted"] == {"steps": 1, "left_out": 1, "samples": 16}
    generate, score, train = (found["seconds"][phase] for phase in ("generate", "score", "train"))
    assert found["samples_per_second"]["experience"] == pytest.approx(16 / (generate + score))
    flops = 2 * 16 * (2 * shape.parameters + 64) * 3  # of a sample, learning: one epoch
    for kind in ("original", "cached"):
        assert found["tflops"][kind]["learning"] == pytest.approx(16 * flops / train / 1e12)
    peak = found["peak_bytes"]
    assert set(peak["roles"]) == {"actor", "critic", "reference", "reward", "rollout"}
    assert all(size > 100 * 2**20 for size in peak["roles"].values())
    assert peak["total"] == max(sizes["total"] for sizes in peak["phases"].values()) > max(peak["roles"].values())
    assert {"load", "generate", "score", "train", "weight_sync"} <= set(peak["phases"])
    for text in ("original formula", "cached generation", "peak memory", f"{shape.parameters:,}"):
        assert text in done.stdout
    assert PROMPTS == 1000


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("noise\ntroupe: stage ppo cannot be placed:\n  a: one\n  b: two\nnoise\n", "stage ppo cannot be placed: a: one; b: two"),
        ("troupe: no room\n", "no room"),
        ("Traceback\n  File\nMemoryError: 3\n\n", "MemoryError: 3"),
        ('Traceback (most recent call last):\n  File "a.py"\nOSError: no model\nTry another', "OSError: no model"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_a_failed_attempt_says_why_in_one_line(log: str, said: str) -> None:
    assert failure_of(io.BytesIO(log.encode())) == said


@pytest.mark.slow
@pytest.mark.long
def test_capacity_under_a_limit_that_nothing_passes() -> None:
    """The smallest model's weights fit into the limit, and its run does not: it is ended whole."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:  # short: Ray's sockets may lie below it
        result = Path(name) / "result.json"
        done = subprocess.run(
            command("bench", "--capacity", "--memory=500MiB", "--lengths=8,16", f"--json={result}"),
            capture_output=True,
            text=True,
            timeout=280,
            env=os.environ | {"TMPDIR": name},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ddp float32, s: exceeds the limit" in done.stdout
        assert "ddp float32: no preset model runs" in done.stdout
        found = json.loads(result.read_text())
        assert found["ways"]["ddp float32"]["largest"] is None
        assert found["limit_bytes"] == 500 * 2**20 < found["ways"]["ddp float32"]["attempts"][0]["peak"]
        assert [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])] == []
        assert [path.name for path in Path(name).iterdir()] == ["result.json"]
