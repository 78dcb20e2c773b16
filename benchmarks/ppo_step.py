"""Duration of a PPO step compared with the minimum for its arithmetic (workload W1).

    python -m examples.movies prepare --model smollm2 && python -m benchmarks.ppo_step

SmolLM2-135M in float32; separate actor, critic, reference and reward model, full training of actor and critic; 16 prompts of 41
tokens, 48 new tokens each (eos ignored), one epoch, one optimizer step. Prints seconds per phase and step, the peak of the
proportional set size of all processes together, and the floor: the step's matrix products at the rate that this machine
reaches on large ones, measured in the same run. The last line is the ratio of step to floor.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import typer
from rich.console import Console

from configs import RunConfig
from configs.schema import ROLES
from orchestrator.api import run_stages
from orchestrator.storage import read_metrics

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 41, 48
WARM_UP, TIMED = 1, 3
PHASES = ("generate", "score", "train", "weight_sync")

# Runs in a subprocess, so that this process never has torch's threads.
_RATE = """
import time, torch
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
def once():
    start = time.perf_counter(); a @ b
    return 2 * 2048**3 / (time.perf_counter() - start)
for _ in range(5): once()
print(max(once() for _ in range(20)))
"""


def matrix_product_rate() -> float:
    """FLOP/s of float32 products of 2048 x 2048 matrices on all cores, best of 20."""
    return float(subprocess.run([sys.executable, "-c", _RATE], capture_output=True, text=True, check=True).stdout)


def step_flops(model: str) -> float:
    """Multiplications and additions of a step's matrix products, without attention scores (about 1%).

    Forward: 2 per weight and token; backward: twice that. The head counts only for the answers' tokens.
    """
    c = SimpleNamespace(**json.loads((Path(model) / "config.json").read_text()))
    kv = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    layer = 2 * c.hidden_size**2 + 2 * c.hidden_size * kv + 3 * c.hidden_size * c.intermediate_size
    tokens, answers = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS), PROMPTS * NEW_TOKENS
    body, head = 2 * layer * c.num_hidden_layers * tokens, 2 * c.vocab_size * c.hidden_size * answers
    generate = reference = body + head
    critic = reward = body
    return generate + reference + critic + reward + 3 * (body + head) + 3 * body


def prompt_of(model: str, tokens: int) -> str:
    """A user message whose prompt has `tokens` tokens in the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Continue this film review:"
    while (
        len(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
        < tokens
    ):
        text += " good"
    return text


def write_reward_model(model: str, folder: Path) -> None:
    """The model with a new scalar head: a reward model is refused without one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


class PeakMemory(threading.Thread):
    """Peak of the summed proportional set size of this process and its descendants.

    A reading takes the kernel half a second per 10 GiB, so it pauses during the timed steps.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self.stopped = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            if len(steps_of(self.folder)) not in range(WARM_UP, WARM_UP + TIMED):
                self.peak = max(self.peak, _total())


def _total() -> int:
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if "seconds/generate" in line]


def settings(model: str, folder: Path, steps: int, layout: str) -> RunConfig:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # this process stays small
        prompt = pool.submit(prompt_of, model, PROMPT_TOKENS).result()
        pool.submit(write_reward_model, model, folder / "reward").result()
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for _ in range(PROMPTS)))
    return RunConfig.model_validate(
        {
            "name": "w1",
            "runs": str(folder),
            "model": {"path": model, "dtype": "float32"},
            "chat_template": True,
            "placement": {"layout": layout},
            "rollout": {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "kv_cache_gib": 0.1},
            "ppo": {
                "prompts": {"path": str(prompts)},
                "steps": steps,
                "prompts_per_step": PROMPTS,
                "micro_batch_tokens": 200,
                "rewards": [{"kind": "model", "path": str(folder / "reward")}],
                "max_prompt_tokens": PROMPT_TOKENS,
                "actor_optimizer": {"lr": 1e-6},
                "critic_optimizer": {"lr": 1e-6},
            },
        }
    )


def _flops_of(model: str) -> float:
    """FLOPs of a step; refuses a model that does not exist, or whose shape the formula does not cover."""
    try:
        return step_flops(model)
    except (OSError, ValueError, AttributeError) as error:
        raise typer.BadParameter(
            f"was {model!r}; must be a folder with a Llama model ({error}); "
            "python -m examples.movies prepare --model smollm2 creates data/movies/smollm2",
            param_hint="--model",
        ) from error


def main(model: str = "data/movies/smollm2", layout: Literal["separate", "paired", "colocated"] = "separate") -> None:
    """Measure: one step of warm-up, three timed steps, and one more for the memory."""
    console, flops = Console(), _flops_of(model)
    before = matrix_product_rate()
    with tempfile.TemporaryDirectory() as name:
        memory = PeakMemory(Path(name) / "w1")
        memory.start()
        run_stages(settings(model, Path(name), WARM_UP + TIMED + 1, layout), ["ppo"], console)
        lines = steps_of(Path(name) / "w1")
    memory.stopped.set()
    rate = max(before, matrix_product_rate())
    timed = lines[WARM_UP : WARM_UP + TIMED]
    seconds = {phase: statistics.median(line[f"seconds/{phase}"] for line in timed) for phase in PHASES}
    step = statistics.median(sum(line[f"seconds/{phase}"] for phase in PHASES) for line in timed)
    floor = flops / rate
    roles = ", ".join(f"{role} {lines[-1][f'memory_gib/{role}']:.2f}" for role in ROLES)
    console.print(
        f"{psutil.cpu_count()} cores; matrix products {rate / 1e9:.0f} GFLOP/s; {flops / 1e12:.2f} TFLOP per step"
    )
    console.print("  ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items()))
    console.print(f"peak memory {memory.peak / 1e9:.2f} GB; after the last step, in GiB: {roles}")
    console.print(f"step {step:.1f} s (median of {len(timed)}); floor {floor:.1f} s")
    console.print(f"ratio of step to floor: {step / floor:.2f}")


if __name__ == "__main__":
    typer.run(main)
