"""What lies on disk when a process is killed, the disk is full, or bytes change."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from configs import RunConfig
from orchestrator.run.run_dir import Run
from orchestrator.storage.atomic_files import (
    CHECKSUMS,
    DiskError,
    atomic_directory,
    verify,
    write_checksums,
    write_json,
)
from orchestrator.storage.metrics_file import read_metrics
from tests.support.recording import recording
from tests.support.runs import flip_bit

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(RunConfig.model_validate({"name": "a", "model": {"path": "m"}}), tmp_path / "a")
    run.save()
    return run


def save(run: Run, step: int, size: int = 100_000) -> Path:
    with run.saving("ppo", step) as folder:
        (folder / "actor").mkdir()
        (folder / "actor" / "weights").write_bytes(step.to_bytes(4, "little") * (size // 4))
        (folder / "state.json").write_text(json.dumps({"step": step}))
    return run.checkpoint("ppo", step)


# ---------------------------------------------------------------- damage


def flip(folder: Path) -> None:
    flip_bit(folder / "actor" / "weights", 77_777)


DAMAGES = [
    (flip, "actor/weights has changed since it was saved"),
    (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    (lambda folder: os.truncate(folder / "actor" / "weights", 99_999), "has 99,999 bytes, had 100,000"),
    (lambda folder: (folder / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing"),
    (lambda folder: os.truncate(folder / CHECKSUMS, 40), f"{CHECKSUMS} cannot be read"),
    (lambda folder: (folder / CHECKSUMS).write_bytes(b"\xff"), f"{CHECKSUMS} cannot be read"),
    (lambda folder: (folder / CHECKSUMS).write_text('{"state.json": 3}'), f"{CHECKSUMS} cannot be read"),
    (lambda folder: (folder / CHECKSUMS).write_text("[]"), f"{CHECKSUMS} cannot be read"),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(run: Run, damage, fault: str) -> None:
    warnings: list[str] = []
    good, bad = save(run, 2), save(run, 4)
    assert verify(good) == verify(bad) == []
    assert run.sound_checkpoint("ppo", warnings.append) == 4
    assert warnings == []
    damage(bad)
    assert run.sound_checkpoint("ppo", warnings.append) == 2
    (warning,) = warnings
    assert str(bad) in warning and fault in warning and "4.damaged" in warning
    assert run.checkpoints("ppo") == [2]
    run.prune("ppo", 1)
    assert sorted(path.name for path in bad.parent.iterdir()) == ["2", "4.damaged"]


def test_when_all_are_damaged_there_is_none(run: Run) -> None:
    warnings: list[str] = []
    for step in (2, 4):
        flip(save(run, step))
    assert run.sound_checkpoint("ppo", warnings.append) is None
    flip(save(run, 4))
    assert run.sound_checkpoint("ppo", warnings.append) is None
    assert len(warnings) == 3
    names = sorted(path.name for path in run.checkpoint("ppo", 4).parent.iterdir())
    assert names == ["2.damaged", "4.damaged", "4.damaged1"]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"\x00\xff\x10")
    write_checksums(tmp_path)
    for bit in range(24):
        data = bytearray(b"\x00\xff\x10")
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "small").write_bytes(data)
        assert verify(tmp_path) == ["small has changed since it was saved"]


# ---------------------------------------------------------------- killed

SAVE = """
import sys
from pathlib import Path
from orchestrator.run.run_dir import Run
run = Run.open(Path(sys.argv[1]))
with run.locked():
    for step in range(int(sys.argv[2]), 1000):
        with run.saving("ppo", step % 3) as folder:
            for k in range(20):
                (folder / f"part-{k}").write_bytes(bytes([k]) * 50_000)
        run.prune("ppo", 2)
        print(step, flush=True)
"""


def test_killed_at_any_moment_the_checkpoints_are_sound(run: Run) -> None:
    """Each process saves checkpoints, over those of the same name too, until it is killed; what it leaves is whole."""
    for moment in range(12):
        saving = subprocess.Popen(
            [sys.executable, "-c", SAVE, str(run.folder), str(moment)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert saving.stdout is not None
        saving.stdout.readline()
        saving.stdout.readline()
        time.sleep(moment * 0.004)
        saving.send_signal(signal.SIGKILL)
        saving.wait()
        saving.stdout.close()
        with run.locked():
            left = sorted(path.name for path in run.checkpoint("ppo", 0).parent.iterdir())
            assert left == [str(step) for step in run.checkpoints("ppo")]
        assert len(left) >= 2
        for step in run.checkpoints("ppo"):
            assert verify(run.checkpoint("ppo", step)) == []


def test_killed_between_the_two_renames_the_old_folder_comes_back(run: Run) -> None:
    folder = save(run, 3)
    os.rename(folder, folder.with_name("3.old"))
    (folder.with_name("3.partial")).mkdir()
    (run.folder / "summary.json.partial").touch()
    with run.locked():
        assert run.checkpoints("ppo") == [3]
        assert verify(folder) == []
        assert [path.name for path in folder.parent.iterdir()] == ["3"]
        assert not (run.folder / "summary.json.partial").exists()


# ---------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB; where none may be mounted, a limit of 1 MB on the size of a file, which fails in the same way."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode == 0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_checkpoint_that_finds_no_room_harms_no_other(small_disk: Path) -> None:
    run = Run(RunConfig.model_validate({"name": "a", "model": {"path": "m"}}), small_disk / "a")
    run.save()
    first = save(run, 1)
    with pytest.raises(DiskError, match=r"checkpoints/ppo/2: cannot be written: .* MiB free\)"):
        save(run, 2, size=2_000_000)
    assert run.checkpoints("ppo") == [1]
    assert verify(first) == []
    assert [path.name for path in first.parent.iterdir()] == ["1"], "what could not be finished gives its space back"
    with pytest.raises(DiskError, match="checkpoints/ppo/1: cannot be written"):
        save(run, 1, size=2_000_000)
    assert verify(first) == []
    save(run, 2)
    assert run.checkpoints("ppo") == [1, 2]


def test_a_library_that_hides_the_reason_is_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.save says of a full disk names neither file nor disk."""
    monkeypatch.setattr("orchestrator.storage.atomic_files._FULL_BELOW", 2**60)
    with (
        pytest.raises(DiskError, match="x: cannot be written: the disk is full"),
        atomic_directory(tmp_path / "x"),
    ):
        raise RuntimeError("unexpected pos 576 vs 534")


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_the_config_says_whether_training_goes_on(small_disk: Path, on_error: str) -> None:
    settings = {"name": "a", "model": {"path": "m"}, "checkpoint": {"on_error": on_error}}
    run = Run(RunConfig.model_validate(settings), small_disk / "a")
    warnings: list[str] = []

    def tolerated() -> None:
        with run.tolerating(warnings.append):
            save(run, 2, size=2_000_000)

    if on_error == "continue":
        tolerated()
        assert "cannot be written" in warnings[0] and "the run continues" in warnings[0]
    else:
        with pytest.raises(DiskError):
            tolerated()
        assert warnings == []


def test_a_small_file_stays_as_it_was(small_disk: Path) -> None:
    path = small_disk / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(DiskError, match=r"summary\.json: cannot be written"):
        write_json(path, {"a": "x" * 2_000_000})
    assert [path.name for path in small_disk.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def events(folder: Path) -> list[int]:
    """Steps in TensorBoard's files, read to their ends."""
    paths = sorted((folder / "tensorboard" / "ppo").iterdir())
    return [event.step for path in paths for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]


def test_metrics_that_find_no_room_wait_for_it(small_disk: Path) -> None:
    recorder = recording(small_disk, "a", "ppo")
    for step in (1, 2):
        recorder.record(step, {"kl": step})
    for step in (3, 4):  # lines that do not fit, of which some bytes do
        with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: .* MiB free\)"):
            recorder.record(step, {f"{'x' * 1_500_000}": step} if step == 3 else {"kl": step})
        assert [line["step"] for line in read_metrics(small_disk)] == [1, 2]
        assert (small_disk / "metrics.jsonl").read_bytes().endswith(b"\n")
    recorder.rewind(2)  # what waits is dropped with its step
    for step in (3, 4):
        recorder.record(step, {"kl": 10 * step})
    recorder.close()
    assert [line["kl"] for line in read_metrics(small_disk)] == [1, 2, 30, 40]
    assert events(small_disk) == [1, 2, 3, 4]


def test_metrics_are_complete_once_there_is_room(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with recording(tmp_path, "a", "ppo") as recorder:
        recorder.record(1, {"kl": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, hard))
        try:
            for step in range(2, 100):
                with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: File too large"):
                    recorder.record(step, {"kl": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        recorder.record(100, {"kl": 100})
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 101))
    assert events(tmp_path) == list(range(1, 101))
