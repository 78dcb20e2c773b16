"""Peak memory and time of a training step that computes log-probabilities in chunks of tokens, compared with full logits.

    python -m benchmarks.logits

The actor's training step of PPO (clipped loss and the mean entropy that is reported, backward pass, AdamW) on one row of 2,048
tokens: a Llama of random weights with the width, heads and vocabulary (49,152, tied) of SmolLM2-135M and 4 of its 30 layers, all
weights trained, float32, gradient checkpointing, on CPU. One side is workers.models.heads.LanguageModel. The other is the same
transformer with a log_softmax over the logits of all positions; its numbers are the same. Each side runs in fresh processes
with the workers' malloc settings (workers.process.malloc), in alternating order; the kernel counts the peak of resident memory
(VmHWM, reset before the timed steps).

"Held" is the memory between steps: weights, AdamW's states and the runtime. "The step" is the memory beyond that: gradients,
activations, logits. Prints medians and their ratios; exits with 1 if the step's memory is not at least 4 times lower than with
full logits, or its time more than 10% longer. --side chunks or full runs one side in this process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import psutil
import typer
from rich.console import Console

from benchmarks import peaks

LENGTH, VOCABULARY, LAYERS = 2048, 49_152, 4
WARM_UP, TIMED = 2, 3
MIN_MEMORY_RATIO, MAX_TIME_RATIO = 4.0, 1.1

Side = Literal["chunks", "full"]
SIDES: tuple[Side, ...] = ("chunks", "full")


def measure(side: Side) -> dict[str, float]:
    """Run one side in this process: bytes held between steps, further bytes of a step, seconds of a step, loss and entropy."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from configs.schema import PPOClipLoss
    from workers.data import Sample
    from workers.models.heads import Batch, LanguageModel
    from workers.process import malloc
    from workers.rl.losses import LossInputs, PolicyLoss, masked_sum

    malloc.keep_tensors_apart()
    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    hf: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True, max_position_embeddings=LENGTH))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).astype(np.int32)
    batch = Batch([Sample.of(ids[:1], ids[1:])], torch.device("cpu"))
    ours = LanguageModel(hf).train()
    hf.gradient_checkpointing_enable()
    advantages = torch.randn(1, LENGTH - 1)

    def chunks() -> tuple[torch.Tensor, torch.Tensor]:
        return ours(batch)

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        log_p = torch.log_softmax(hf(input_ids=batch.ids, use_cache=False).logits[:, :-1], -1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, batch.ids[:, 1:, None]).squeeze(-1), entropy

    forward: Callable[[], tuple[torch.Tensor, torch.Tensor]] = {"chunks": chunks, "full": full}[side]
    adam = torch.optim.AdamW(hf.parameters(), lr=1e-5, fused=True)

    def step() -> tuple[float, float]:
        log_probs, entropy = forward()
        old = log_probs.detach() - 0.1
        parts = PolicyLoss.of(PPOClipLoss())(LossInputs(log_probs, old, old, None, advantages, batch.mask))
        loss = masked_sum(parts.loss, batch.mask) / (LENGTH - 1)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss.detach()), float(masked_sum(entropy.detach(), batch.mask)) / (LENGTH - 1)

    for _ in range(WARM_UP):
        step()
    malloc.give_back()  # freed memory does not count as held
    held = peaks.resident()
    peaks.reset()
    seconds, cpu = [], []
    for _ in range(TIMED):
        start, before = time.perf_counter(), time.process_time()
        loss, entropy = step()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    peak = {"held": held, "step": peaks.highest() - held}
    return peak | {
        "seconds": statistics.median(seconds),
        "cpu": statistics.median(cpu),
        "loss": loss,
        "entropy": entropy,
    }


def measure_in_subprocess(side: Side) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.logits", "--side", side]
    measured: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return measured


def main(repetitions: Annotated[int, typer.Option(min=1)] = 5, side: Side | None = None) -> None:
    """Compare both sides. --side: run only this side, in this process, and print its measurements as JSON."""
    if side:
        print(json.dumps(measure(side)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for repetition in range(repetitions):
        for name in SIDES if repetition % 2 == 0 else reversed(SIDES):
            runs[name].append(measure_in_subprocess(name))
    sys.exit(_report(runs))


def _report(runs: dict[str, list[dict[str, float]]]) -> int:
    console = Console()
    middle: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(run[key] for run in side_runs) for key in side_runs[0]}
        for name, side_runs in runs.items()
    }
    console.print(f"{psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}; medians of {len(runs['full'])} runs")
    for name, values in middle.items():
        spread = [run["seconds"] for run in runs[name]]
        console.print(
            f"{name:>6}: held {values['held'] / 2**20:,.0f} MiB, the step {values['step'] / 2**20:,.0f} MiB more, "
            f"{values['seconds']:.2f} s ({min(spread):.2f} to {max(spread):.2f}; {values['cpu']:.2f} s of CPU), "
            f"loss {values['loss']:.5f}, entropy {values['entropy']:.5f}"
        )
    chunks, full = middle["chunks"], middle["full"]
    whole = (full["held"] + full["step"]) / (chunks["held"] + chunks["step"])
    memory, seconds = full["step"] / chunks["step"], chunks["seconds"] / full["seconds"]
    console.print(f"peak of the whole process: {whole:.2f} times lower")
    console.print(f"peak of the step: {memory:.2f} times lower (at least {MIN_MEMORY_RATIO:g})")
    console.print(f"time of the step: {seconds:.2f} times as long (at most {MAX_TIME_RATIO:g})")
    return int(memory < MIN_MEMORY_RATIO or seconds > MAX_TIME_RATIO)


if __name__ == "__main__":
    typer.run(main)
