"""What a trained model is asked with: prompts in the form that its stage was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import load_config
from orchestrator.api import checked
from orchestrator.chat import codec_of
from orchestrator.run.run_dir import Run
from tests.support.models import make_model
from workers.data import Message, load_tokenizer

TEXT = {"prompt": "Who is it? ", "completion": "Me."}
CHAT = {"messages": [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Me."}]}


@pytest.mark.parametrize(
    ("rows", "settings", "asked"),
    [
        ([TEXT, TEXT], {}, "How are you?"),
        ([CHAT, CHAT], {}, "user: How are you?<eos>assistant: "),
        ([TEXT, CHAT], {}, "How are you?"),
        ([TEXT, TEXT], {"chat_template": True}, "user: How are you?<eos>assistant: "),
        ([CHAT, CHAT], {"system_prompt": "Lie."}, "system: Lie.<eos>user: How are you?<eos>assistant: "),
    ],
    ids=["text", "chat", "mixed", "text in the template", "chat with a system prompt"],
)
def test_a_prompt_of_text_is_asked_in_the_form_that_the_stage_was_trained_on(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], asked: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model(tmp_path / "model")
    sft = {"train": {"path": str(data)}, "batch_size": 2, "optimizer": {"lr": 1e-3}}
    base = {"name": "r", "runs": str(tmp_path), "model": {"path": str(model)}, "sft": sft}
    run = Run.begin(load_config(base | settings, []), ["sft"])
    jobs, _ = checked(run)
    run.save({job.name: job.counts[job.learns_from].form for job in jobs})
    shutil.copytree(model, run.model("sft"))

    codec = codec_of(Run.open(run.folder), "sft")
    plain = load_tokenizer(str(model))
    assert codec.prompt_ids("How are you?") == plain(asked, add_special_tokens=False)["input_ids"]
    conversation: list[Message] = [{"role": "user", "content": "How are you?"}]
    assert plain.decode(codec.prompt_ids(conversation)).endswith("user: How are you?<eos>assistant: "), "always"
