"""Data: rows of every form, malformed rows, token ids, the order of training."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from configs.schema import DatasetSettings
from workers.data import (
    Codec,
    DataError,
    Row,
    RowKind,
    Sample,
    batches,
    encode_demonstrations,
    epoch_order,
    read_rows,
)

USER = {"role": "user", "content": "How was it?"}
ANSWER = {"role": "assistant", "content": "Good."}
WORSE = {"role": "assistant", "content": "Bad."}


def read(path: Path | str, kind: RowKind, **settings: Any) -> list[Row]:
    return read_rows(DatasetSettings(path=str(path), **settings), kind)


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(path: Path | str, kind: RowKind, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(path, kind, **settings)
    return str(caught.value).replace(f"{path}:", "FILE:").replace(f"{path} ", "FILE ").splitlines()


# ---------------------------------------------------------------- rows

FORMS: list[tuple[RowKind, dict[str, Any], Row]] = [
    ("demonstration", {"prompt": "a", "completion": "b"}, Row("a", completion="b")),
    ("demonstration", {"prompt": "", "completion": "b"}, Row("", completion="b")),
    (
        "demonstration",
        {"prompt": "a", "completion": [ANSWER]},
        Row([{"role": "user", "content": "a"}], "Good.", given=1),
    ),
    ("demonstration", {"prompt": [USER], "completion": [ANSWER]}, Row([USER], completion="Good.", given=1)),
    ("demonstration", {"messages": [USER, ANSWER, USER, WORSE]}, Row([USER, ANSWER, USER], completion="Bad.")),
    (
        "demonstration",
        {"prompt": "a", "messages": [{**USER, "name": "x"}, ANSWER], "id": 7},
        Row([{**USER, "name": "x"}], completion="Good.", columns={"id": 7}),
    ),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "", "margin": 2},
        Row("a", chosen="b", rejected="", rejected_prompt="a", margin=2.0),
    ),
    (
        "preference",
        {"prompt": [USER], "chosen": "Good.", "rejected": "Bad.", "margin": None},
        Row([USER], chosen="Good.", rejected="Bad.", rejected_prompt=[USER]),
    ),
    *(
        (
            "preference",
            {"chosen": [USER, ANSWER], "rejected": [USER, WORSE], "score": 1, **prompt},
            Row([USER], chosen="Good.", rejected="Bad.", rejected_prompt=[USER], columns={"score": 1}),
        )
        for prompt in ({}, {"prompt": "How was it?"}, {"prompt": [USER]})
    ),
    (
        "preference",
        {"prompt": "How was it?", "chosen": [ANSWER], "rejected": [WORSE]},
        Row([USER], chosen="Good.", rejected="Bad.", rejected_prompt=[USER]),
    ),
    (
        "preference",
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE]},
        Row([USER], chosen="Good.", rejected="Bad.", rejected_prompt=[USER, ANSWER, USER]),
    ),
    ("prompt", {"prompt": "a", "completion": "b"}, Row("a", columns={"completion": "b"})),
    ("prompt", {"prompt": [USER]}, Row([USER])),
    ("prompt", {"messages": [USER, ANSWER]}, Row([USER])),
    ("prompt", {"messages": [USER]}, Row([USER])),
]


@pytest.mark.parametrize(("kind", "record", "row"), FORMS)
def test_forms(tmp_path: Path, kind: RowKind, record: dict[str, Any], row: Row) -> None:
    """Every form gives the same row from every source."""
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "rows.parquet")
    datasets.Dataset.from_list([record]).save_to_disk(str(tmp_path / "saved"))
    for source in (jsonl(tmp_path, record), tmp_path / "rows.parquet", tmp_path / "saved"):
        assert read(source, kind) == [row], source


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "a", "reply": "b", "prompt": "c"})
    columns = {"prompt": "question", "completion": "reply"}
    assert read(path, "demonstration", columns=columns) == [Row("a", completion="b", columns={"prompt": "c"})]
    assert read(path, "prompt", columns=columns) == [Row("a", columns={"reply": "b", "prompt": "c"})]
    assert refused(path, "prompt", columns={"promt": "question"}) == [
        "FILE: columns.promt: no such column of ours; did you mean prompt?"
    ]
    assert refused(path, "prompt", columns={"prompt": "qestion"})[0] == (
        "FILE:1: no column qestion (for prompt); there are question, reply, prompt"
    )


def test_a_column_of_prompts_may_get_another_name(tmp_path: Path) -> None:
    """A reward function already has arguments `prompts` and `answers`; a column of that name needs another name."""
    path = jsonl(tmp_path, {"prompt": "a", "answers": ["b"]}, {"prompt": "c", "id": 1})
    assert read(path, "prompt", columns={"gold": "answers"}) == [
        Row("a", columns={"gold": ["b"]}),
        Row("c", columns={"id": 1}),
    ]
    assert refused(path, "prompt", columns={"gold": "answer"}) == ["FILE: columns.gold: no row has the column answer"]
    twice = jsonl(tmp_path, {"prompt": "a", "answers": "b", "gold": "c"})
    assert refused(twice, "prompt", columns={"gold": "answers"})[0] == (
        "FILE:1: columns.gold: there is a column gold already, beside answers"
    )
    assert refused(path, "demonstration", columns={"gold": "answers"}) == [
        "FILE: columns.gold: no such column of ours; there are "
        "prompt, completion, messages, input, tools, chosen, rejected, margin"
    ]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "broken")
    assert [row.prompt for row in read(path, "prompt", limit=2)] == ["a", "b"]


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b\x85"}\r\n\r\n{"prompt": "é"}'.encode())
    assert [row.prompt for row in read(path, "prompt")] == ["a\u2028b\x85", "é"]


KEYS = (
    "prompt.0.weight: no such key of a message; there are role, content, name, tool_calls, tool_call_id, "
    "reasoning_content, reasoning, thinking"
)
PART = 'prompt.0.content.0: must be a part of text ({type: text, text: ...}), was {"type": "image_url"}'
MALFORMED: list[tuple[RowKind, Any, str]] = [
    ("prompt", '{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
    ("prompt", [1], "must be a mapping of columns, was [1]"),
    ("prompt", {"text": "a"}, "messages: missing; needs prompt or messages; its columns are text"),
    ("prompt", {"prompt": None}, "messages: missing; needs prompt or messages; its columns are prompt"),
    ("prompt", {"prompt": ""}, "prompt: is empty"),
    ("prompt", {"prompt": 3}, "prompt: must be text or a list of messages, was 3"),
    ("prompt", {"prompt": []}, "prompt: must be text or a list of messages, was []"),
    ("prompt", {"messages": [ANSWER]}, "prompt: is empty"),
    (
        "prompt",
        {"prompt": [USER, ANSWER]},
        "prompt: ends with a message of the assistant, so there is nothing to answer",
    ),
    ("prompt", {"prompt": ["hello"]}, 'prompt.0: must have role and content, was "hello"'),
    ("prompt", {"prompt": [{"role": "user"}]}, 'prompt.0: must have role and content, was {"role": "user"}'),
    (
        "prompt",
        {"prompt": [USER, {"role": "human", "content": "x"}]},
        'prompt.1.role: must be system, developer, user, assistant, tool, was "human"',
    ),
    (
        "prompt",
        {"prompt": [{"role": "user", "content": None}]},
        'prompt.0: must have role and content, was {"role": "user", "content": null}',
    ),
    ("prompt", {"prompt": [{**USER, "weight": 0}]}, KEYS),
    ("prompt", {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, PART),
    (
        "demonstration",
        {"prompt": "a"},
        "messages: missing; needs prompt and completion, or messages; its columns are prompt",
    ),
    (
        "demonstration",
        {"completion": "a"},
        "prompt: missing; needs prompt and completion, or messages; its columns are completion",
    ),
    ("demonstration", {"prompt": "a", "completion": ""}, "the answer is empty, so there is nothing to learn"),
    ("demonstration", {"prompt": "a", "completion": 1}, "completion: must be text or a list of messages, was 1"),
    (
        "demonstration",
        {"messages": [ANSWER, USER]},
        "messages: the last message must be the assistant's, was the user's",
    ),
    ("demonstration", {"messages": [ANSWER]}, "messages: has no message before the assistant's"),
    ("demonstration", {"messages": "a"}, 'messages: must be text or a list of messages, was "a"'),
    (
        "preference",
        {"prompt": "a", "chosen": "b"},
        "rejected: missing; needs chosen and rejected; its columns are prompt, chosen",
    ),
    ("preference", {"chosen": "b", "rejected": "c"}, "prompt: missing; text in chosen needs one beside it"),
    (
        "preference",
        {"prompt": [ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        "chosen: does not begin with the messages of prompt",
    ),
    (
        "preference",
        {"prompt": "b", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        "chosen: none of its messages is the prompt",
    ),
    (
        "preference",
        {"prompt": "a", "chosen": [ANSWER], "rejected": "b"},
        "chosen and rejected: one is text, the other messages",
    ),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"},
        'margin: must be a finite number, was "much"',
    ),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "margin: must be a finite number, was NaN",
    ),
]


@pytest.mark.parametrize(("kind", "record", "error"), MALFORMED)
def test_malformed_row(tmp_path: Path, kind: RowKind, record: Any, error: str) -> None:
    good = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
    assert refused(jsonl(tmp_path, good, record, good), kind) == [
        f"FILE:2: {error}",
        f"FILE: 1 of 3 rows cannot be read as a {kind}",
    ]


def test_many_malformed_rows_are_counted(tmp_path: Path) -> None:
    lines = refused(jsonl(tmp_path, {"prompt": "a"}, *["{"] * 20), "prompt")
    assert [line.partition(": ")[0] for line in lines] == ["FILE:2", "FILE:3", "FILE:4", "FILE:5", "FILE:6", "FILE"]
    assert lines[-1] == "FILE: 20 of 21 rows cannot be read as a prompt"


def test_malformed_rows_of_other_sources(tmp_path: Path) -> None:
    records = [{"prompt": "a"}, {"prompt": ""}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    assert refused(tmp_path / "rows.parquet", "prompt")[0] == "FILE: row 2: prompt: is empty"
    datasets.DatasetDict(test=datasets.Dataset.from_list(records)).save_to_disk(str(tmp_path / "saved"))
    assert refused(tmp_path / "saved", "prompt", split="test")[0] == "FILE test: row 2: prompt: is empty"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert refused(path, "prompt")[0] == "FILE:1: not UTF-8: invalid start byte at byte 13"


def test_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a"}])
    others = datasets.Dataset.from_list([{"prompt": "b"}])
    datasets.DatasetDict(train=rows, test=others).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "one"))
    rows.save_to_disk(str(tmp_path / "none"))
    assert read(tmp_path / "two", "prompt", split="test") == [Row("b")]
    assert read(tmp_path / "one", "prompt") == read(tmp_path / "none", "prompt") == [Row("a")]
    assert refused(tmp_path / "two", "prompt") == ["FILE: split: missing; there are train, test"]
    assert refused(tmp_path / "two", "prompt", split="dev") == ["FILE: split dev: no such split; there are train, test"]
    assert refused(tmp_path / "none", "prompt", split="dev") == [
        "FILE: split dev: this folder holds a single dataset; leave it out"
    ]
    assert refused(jsonl(tmp_path, {"prompt": "a"}), "prompt", split="train") == [
        "FILE: split train: a file has no splits; leave it out"
    ]


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.txt").write_text("prompt\na\n")
    (tmp_path / "rows.parquet").write_text("prompt\na\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path / "rows.txt", "prompt")[0].startswith(
        "FILE: must be a file that ends in .jsonl, .json, .csv"
    )
    assert refused(tmp_path / "rows.parquet", "prompt")[0].startswith("FILE: cannot be read as Parquet: ")
    assert refused(tmp_path / "empty.jsonl", "prompt") == ["FILE: has no rows"]
    assert refused(tmp_path / "folder", "prompt")[0].startswith("FILE: a folder without data files")
    for missing in ("rows.jsonl", "./nothing", "a/b/c", "/a"):
        assert refused(missing, "prompt") == ["FILE: no such file or folder"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refused("nobody/nothing", "prompt")[0].startswith(
        "FILE: no file or folder here, and it cannot be loaded from the hub"
    )


# ---------------------------------------------------------------- tokens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(pad_is_eos: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the film is good", "the film is bad", "how was the film?"] * 5, trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text(pad_is_eos: bool, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(pad_is_eos, adds_bos)
    codec = Codec(tokenizer, chat_template=False)
    bos = [tokenizer.bos_token_id] if adds_bos else []
    plain = tokenizer("the film", add_special_tokens=False)["input_ids"]
    assert codec.prompt_ids("the film") == bos + plain
    assert codec.prompt_ids("") == bos
    sequence = codec.sequence("the film", " is good")
    answer = tokenizer(" is good", add_special_tokens=False)["input_ids"]
    assert sequence.ids.dtype == np.int32
    assert sequence.ids.tolist() == bos + plain + answer + [tokenizer.eos_token_id]
    assert sequence.prompt_length == len(bos + plain)
    assert codec.decode(sequence.ids) == "the film is good"
    assert codec.decode(sequence.ids, skip_special_tokens=False).endswith(" is good</s>")


def test_an_empty_answer_is_eos_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    for codec in (Codec(tokenizer, True), Codec(tokenizer, False)):
        sequence = codec.sequence("the film", "")
        assert sequence.ids[sequence.prompt_length :].tolist() == [tokenizer.eos_token_id]


def test_eos_within_a_text_ends_it(tokenizer: PreTrainedTokenizerFast) -> None:
    for codec in (Codec(tokenizer, True), Codec(tokenizer, False)):
        assert codec.sequence("a", "good</s> bad").ids.tolist() == codec.sequence("a", "good").ids.tolist()


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = [USER, ANSWER, USER]
    codec = Codec(tokenizer, chat_template=False)
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert codec.prompt_ids(conversation) == expected
    sequence = codec.sequence(conversation, "Bad.")
    assert sequence.ids[: sequence.prompt_length].tolist() == expected
    assert codec.decode(sequence.ids[sequence.prompt_length :], skip_special_tokens=False) == "Bad.</s>"
    wrapped = Codec(tokenizer, chat_template=True)
    assert wrapped.prompt_ids("How was it?") == codec.prompt_ids([USER]) != codec.prompt_ids("How was it?")
    assert wrapped.sequence("How was it?", "Bad.").ids.tolist() == codec.sequence([USER], "Bad.").ids.tolist()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            TEMPLATE.replace("{{ eos_token }}", "<end>"),
            r"does not end an answer with an end token \('</s>'\), but with '.*<end>",
        ),
        (
            TEMPLATE.replace("<|assistant|>", "<|assistant|><think>"),
            "begins every answer with '<think>', and the answer 'b' does",
        ),
        ("{{ raise_exception('roles must alternate') }}", "refuses messages: roles must alternate"),
        (None, "has no chat template"),
    ],
)
def test_chat_templates_that_cannot_be_used(template: str | None, text: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=text):
        Codec(tokenizer, chat_template=True).sequence("a", "b")


def test_tokenizer_without_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no eos token"):
        Codec(tokenizer, chat_template=False)


PLAIN = Codec(make_tokenizer(), chat_template=False)


@given(prompt=st.text(max_size=30), completion=st.text(max_size=30), max_length=st.integers(4, 60))
def test_cutting_plain_text(prompt: str, completion: str, max_length: int) -> None:
    whole = PLAIN.sequence(prompt, completion)
    start, end = whole.ids[: whole.prompt_length].tolist(), whole.ids[whole.prompt_length :].tolist()
    assert start == PLAIN.prompt_ids(prompt), "the engine's prompt"
    assert end.index(PLAIN.end) == len(end) - 1, "one end token, at the end"
    sequence = cut(PLAIN, Row(prompt, completion=completion), max_length)
    kept_start, kept_end = (
        sequence.ids[: sequence.prompt_length].tolist(),
        sequence.ids[sequence.prompt_length :].tolist(),
    )
    assert len(sequence.ids) == min(max_length, len(whole.ids))
    assert kept_start[:1] == start[:1], "the bos token stays"
    assert start[len(start) - len(kept_start) + 1 :] == kept_start[1:]
    assert end[: len(kept_end)] == kept_end
    assert kept_end
    assert len(kept_start) >= min(len(start), max_length // 2)
    if kept_end != end:
        assert len(kept_start) == min(len(start), max_length // 2), "the completion is cut last"


def cut(codec: Codec, row: Row, max_length: int) -> Sample:
    sequences, counts = encode_demonstrations(codec, [row], max_length, "cut", "all")
    assert counts.kept == 1
    return sequences[0]


# ---------------------------------------------------------------- order


@given(n=st.integers(1, 200), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
def test_epoch_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert np.array_equal(order, epoch_order(n, seed, epoch))


def test_epoch_order_is_pinned() -> None:
    """Another order would change what a resumed run trains on."""
    assert epoch_order(8, 1, 0).tolist() == [5, 0, 1, 4, 2, 6, 3, 7]
    assert epoch_order(8, 1, 1).tolist() == [6, 1, 4, 0, 3, 2, 5, 7]
    assert epoch_order(8, 2, 0).tolist() != [5, 0, 1, 4, 2, 6, 3, 7]


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120),
    batch_size=st.integers(1, 40),
    epochs=st.floats(0.05, 3.5),
    seed=st.integers(0, 2**31 - 1),
)
def test_batches(lengths: list[int], batch_size: int, epochs: float, seed: int) -> None:
    n = len(lengths)
    steps = batches(lengths, batch_size, epochs, seed)
    assert {len(batch) for batch in steps} == {batch_size}
    assert (len(steps) - 1) * batch_size < max(epochs * n, 1) <= len(steps) * batch_size + 1e-6
    stream = np.concatenate(steps)
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n)), "each row once in every epoch"
    counts = Counter(stream.tolist())
    assert max(counts.values()) - min(counts[row] for row in range(n)) <= 1
    longer = batches(lengths, batch_size, epochs + 1, seed)
    assert all(np.array_equal(one, other) for one, other in zip(steps, longer, strict=False))


def test_batches_hold_rows_of_like_length() -> None:
    """Except the batches in which an epoch ends: 1007 is not a multiple of 10."""
    lengths = np.random.default_rng(0).integers(1, 100, size=1007)
    steps = batches(lengths, 10, 3, seed=3)
    assert len(steps) == 303
    spread = np.array([np.ptp(lengths[batch]) for batch in steps])
    assert np.flatnonzero(spread > 40).tolist() == [100, 201, 302]
    assert np.median(spread) < 10
    assert not np.array_equal(np.concatenate(steps), np.concatenate(batches(lengths, 10, 3, seed=4)))


def test_short_and_long_batches_come_in_a_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=1000)
    means = np.array([lengths[batch].mean() for batch in batches(lengths, 10, 1, seed=3)])
    assert 35 < np.count_nonzero(np.diff(means) > 0) < 65
