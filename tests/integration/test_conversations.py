"""Conversations to tokens: which tokens are learnt, with the templates of well-known families, against a slow oracle."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import ModelSettings, RunConfig
from tests.support.chat_templates import FAMILIES, make_sentencepiece, make_tokenizer, save
from workers.data import (
    ChatTemplate,
    Codec,
    DataError,
    Message,
    Row,
    Sample,
    encode_demonstrations,
    encode_preferences,
    encode_prompts,
    end_tokens,
)
from workers.data.probes import difference

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def codec_of(name: str, **settings: Any) -> Codec:
    tokenizer, family = make_tokenizer(name), FAMILIES[name]
    ends = tokenizer.convert_tokens_to_ids([family.eos, *family.ends])
    return Codec(tokenizer, ends=ends, template=ChatTemplate(tokenizer, **settings))


def learnt(codec: Codec, row: Row, turns: Any = "all", max_length: int = 1000) -> str:
    """The trained text of a row; a dot stands for the text between."""
    sequences, counts = encode_demonstrations(codec, [row], max_length, "cut", turns)
    assert counts.kept == 1
    return shown(codec, sequences[0])


def shown(codec: Codec, sequence: Sample) -> str:
    ids, mask = (x[sequence.prompt_length :] for x in (sequence.ids, sequence.loss_mask))
    borders = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(ids, borders), np.split(mask, borders), strict=True)
    return "".join(codec.decode(part, skip_special_tokens=False) if kept[0] else "·" for part, kept in parts)


# ---------------------------------------------------------------- one set of end tokens

ENDS = {
    "llama3": "<|eot_id|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "r1": "<eos>",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_end_tokens_are_those_of_tokenizer_and_generation_config(tmp_path: Path, name: str) -> None:
    folder = str(save(name, tmp_path))
    config = RunConfig.model_validate({"name": "a", "model": {"path": folder}})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    codec = Codec.load(folder, config, config.model)
    assert codec.tokenizer.convert_ids_to_tokens(codec.ends) == [FAMILIES[name].eos, *FAMILIES[name].ends]
    named = ModelSettings(path=folder, end_tokens=[ENDS[name]])
    assert end_tokens(folder, codec.tokenizer, named) == codec.tokenizer.convert_tokens_to_ids([ENDS[name]])
    with pytest.raises(DataError, match=r"model.end_tokens: '<nothing>' is not a token of"):
        end_tokens(folder, codec.tokenizer, ModelSettings(path=folder, end_tokens=["<nothing>"]))


def test_a_template_that_ends_turns_otherwise_needs_the_setting() -> None:
    tokenizer = make_tokenizer("qwen2.5")
    base = Codec(tokenizer, ends=tokenizer.convert_tokens_to_ids(["<|endoftext|>"]))
    with pytest.raises(DataError, match=r"end an answer with an end token \('<\|endoftext\|>'\).*model.end_tokens"):
        base.sequence([user("a")], "b")


# ---------------------------------------------------------------- trained tokens

THREE_TURNS = Row([user("one"), assistant("yes"), user("two"), assistant("no"), user("three")], completion="well")
THOUGHT = "<think>long thought</think> fine "


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "gemma"])
def test_all_turns_or_the_last(name: str) -> None:
    codec, end = codec_of(name), ENDS[name]
    assert learnt(codec, THREE_TURNS) == f"yes{end}·no{end}·well{end}"
    assert learnt(codec, THREE_TURNS, "last") == f"well{end}"
    given_alone = Row(THREE_TURNS.prompt, completion="well", given=5)
    assert learnt(codec, given_alone) == f"well{end}", "the messages of `prompt` are not learnt"


def test_spaces_of_the_template_are_learnt_too() -> None:
    assert learnt(codec_of("mistral"), THREE_TURNS) == " yes</s>· no</s>· well</s>"


def test_a_template_that_writes_the_latest_turn_otherwise() -> None:
    assert learnt(codec_of("qwen3"), THREE_TURNS) == (
        "yes<|im_end|>·no<|im_end|>·<think>\n\n</think>\n\nwell<|im_end|>"
    )
    assert learnt(codec_of("qwen3"), Row([user("a")], completion=THOUGHT)) == (
        "<think>\nlong thought\n</think>\n\nfine<|im_end|>"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_begins_with_the_prompt_of_the_engine(name: str) -> None:
    """The ids before each trained turn are those of the conversation up to that turn as a prompt."""
    codec = codec_of(name)
    row = Row([user("one")], completion=THOUGHT) if name == "r1" else THREE_TURNS
    sequence = encode_demonstrations(codec, [row], 1000, "refuse", "all")[0][0]
    mask = sequence.loss_mask
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    assert isinstance(row.prompt, list)
    asked = [k for k, message in enumerate(row.prompt) if message["role"] == "assistant"] + [len(row.prompt)]
    assert len(starts) == len(asked)
    for start, k in zip(starts, asked, strict=True):
        assert sequence.ids[:start].tolist() == codec.prompt_ids(row.prompt[:k])


WORDS = st.text("ab c\n", max_size=8)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from(["llama3", "qwen2.5", "gemma"]))
def test_masks_by_tokens_are_those_of_a_slow_oracle(exchanges: list[tuple[str, str]], name: str) -> None:
    """The oracle reads the rendered text: the text between an assistant's header and the end of its turn is trained on."""
    codec = CODECS[name]
    messages = [message for question, answer in exchanges for message in (user(question), assistant(answer))]
    row = Row(messages[:-1], completion=messages[-1]["content"])
    text = codec.tokenizer.apply_chat_template(messages, tokenize=False)
    header = {
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "qwen2.5": "<|im_start|>assistant\n",
        "gemma": "<start_of_turn>model\n",
    }[name]
    head, *turns = text.split(header)
    expected = [part[: part.index(ENDS[name])] + ENDS[name] for part in turns]
    sequence = encode_demonstrations(codec, [row], 10_000, "refuse", "all")[0][0]
    assert shown(codec, sequence).split("·") == expected
    whole = codec.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sequence.ids.tolist() == whole[: len(sequence.ids)]
    assert sequence.ids[: sequence.prompt_length].tolist() == codec._tokens(head + header)


CODECS = {name: codec_of(name) for name in FAMILIES}


# ---------------------------------------------------------------- nothing is dropped

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}])


def test_tool_calls_and_tools_reach_the_template() -> None:
    row = Row([user("1 + 1?")], completion=CALL, tools=TOOLS)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert learnt(codec_of("qwen2.5"), row) == call
    assert '"parameters": {"type": "object"}' in codec_of("qwen2.5").prompt_text(row.prompt, TOOLS)
    assert learnt(codec_of("llama3"), row) == '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
    answered = Row([*row.prompt, CALL, {"role": "tool", "content": "2"}], completion="Two.", tools=TOOLS)
    assert learnt(codec_of("qwen2.5"), answered) == f"{call}·Two.<|im_end|>"
    for name in ("gemma", "mistral"):
        with pytest.raises(DataError, match="drops part of the answer"):
            learnt(codec_of(name), row)


def test_reasoning_is_learnt_or_refused() -> None:
    row = Row([user("a")], completion=assistant("fine", reasoning_content="two and two"))
    assert learnt(codec_of("qwen3"), row) == "<think>\ntwo and two\n</think>\n\nfine<|im_end|>"
    assert learnt(codec_of("r1"), row) == "two and two\n</think>\n\nfine<eos>"
    for name in ("llama3", "qwen2.5", "gemma", "mistral"):
        with pytest.raises(DataError, match=r"drops part of the answer .* '<think>two and two"):
            learnt(codec_of(name), row)


def test_a_template_that_drops_part_of_the_answer_is_refused() -> None:
    codec = codec_of("qwen2.5")
    codec.tokenizer.chat_template = codec.tokenizer.chat_template.replace(
        "m.content", "m.content.split('</think>')[-1]"
    )
    with pytest.raises(
        DataError, match=r"drops part of the answer .* '<think>long thought</think> fine ' became ' fine "
    ):
        learnt(codec, Row([user("a")], completion=THOUGHT))
    same = Row([user("a")], chosen="<think>good</think>b", rejected="<think>bad</think>b")
    with pytest.raises(DataError, match="drops part of the answer"):
        encode_preferences(codec, [same], 100, "cut")


def test_a_prompt_that_begins_the_answer() -> None:
    codec = codec_of("r1")
    assert codec.prompt_text([user("a")]).endswith("<|Assistant|><think>\n")
    assert learnt(codec, Row([user("a")], completion=THOUGHT)) == "long thought</think> fine <eos>"
    assert learnt(codec, Row([user("a")], completion="<think>\nlong</think>b")) == "long</think>b<eos>"
    with pytest.raises(
        DataError, match=r"begins every answer with '<think>\\n', and the answer 'fine' does not begin so"
    ):
        learnt(codec, Row([user("a")], completion="fine"))
    with pytest.raises(DataError, match=r"writes message 2 differently once others follow.*sft.turns=last"):
        learnt(codec, Row([user("a"), assistant(THOUGHT), user("b")], completion=THOUGHT))


def test_the_system_prompt_and_further_variables() -> None:
    codec = codec_of("qwen2.5", system_prompt="Be brief.")
    assert codec.prompt_ids([user("a")]) == codec_of("qwen2.5").prompt_ids([SYSTEM, user("a")])
    other = {"role": "system", "content": "Be long."}
    assert codec.prompt_ids([other, user("a")]) == codec_of("qwen2.5").prompt_ids([other, user("a")])
    chosen = codec_of("qwen2.5", arguments={"mode": "short"})
    chosen.tokenizer.chat_template += "{% if mode == 'short' %}!{% endif %}"
    assert chosen.prompt_text([user("a")]).endswith("assistant\n!")


def test_templates_write_the_day_that_the_run_began() -> None:
    codec = codec_of("qwen2.5", started=datetime(2026, 7, 26, 23, 59))
    codec.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + codec.tokenizer.chat_template
    assert codec.prompt_text([user("a")]).startswith("26 Jul 2026\n")


# ---------------------------------------------------------------- text

SENTENCEPIECE = Codec(make_sentencepiece())


@given(prompt=st.text("the film is good,:\n ", max_size=20), completion=st.text("the film is good,:\n ", max_size=20))
def test_a_completion_has_the_tokens_of_the_whole_text(prompt: str, completion: str) -> None:
    try:
        sequence = SENTENCEPIECE.sequence(prompt, completion)
    except DataError as error:
        if "lies within a token" in str(error):
            return
        raise
    whole = SENTENCEPIECE.tokenizer(prompt + completion)["input_ids"]
    assert SENTENCEPIECE.decode(sequence.ids[:-1]) == SENTENCEPIECE.decode(whole), "no space is added between them"
    start = SENTENCEPIECE.prompt_ids(prompt)
    assert sequence.ids[: sequence.prompt_length].tolist() == start
    if whole[: len(start)] == start:
        assert sequence.ids.tolist() == [*whole, SENTENCEPIECE.end]


def test_a_word_after_a_prompt_does_not_begin_with_two_spaces() -> None:
    sequence = SENTENCEPIECE.sequence("the film", " is good")
    assert SENTENCEPIECE.decode(sequence.ids) == "the film is good"
    assert sequence.ids[:-1].tolist() == SENTENCEPIECE.tokenizer("the film is good")["input_ids"]


def test_answers_keep_their_special_tokens_and_lose_their_end() -> None:
    tokenizer = make_tokenizer("qwen2.5")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    codec = Codec(tokenizer, ends=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    text = "<think>two and two</think>4"
    for ending in ("<|im_end|>", "<|endoftext|>", ""):
        assert codec.answer_text(tokenizer(text + ending, add_special_tokens=False)["input_ids"]) == text


# ---------------------------------------------------------------- too long

LONG = "x" * 40


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3", "gemma", "mistral"])
def test_a_long_prompt_keeps_its_headers(name: str) -> None:
    codec = codec_of(name)
    whole = codec.prompt_text([user(LONG + "end")])
    short = len(codec.prompt_ids([user("")])) + 5
    prompts, counts = encode_prompts(codec, [Row([user(LONG + "end")])], short, "cut")
    assert (counts.cut, counts.kept) == (1, 1)
    assert codec.decode(prompts.ids.row(0), skip_special_tokens=False) == whole.replace(LONG + "end", "xxend")
    nothing, counts = encode_prompts(codec, [Row([user(LONG)])], short - 6, "cut")
    assert (counts.dropped, len(nothing.rows)) == (1, 0), "the template alone is longer"


def test_the_oldest_turns_go_first() -> None:
    codec = codec_of("qwen2.5")
    conversation = [SYSTEM, user("one"), assistant("yes"), user("two"), assistant("no"), user("three")]
    newest = [SYSTEM, user("two"), assistant("no"), user("three")]
    limit = len(codec.prompt_ids(newest))
    prompts, _ = encode_prompts(codec, [Row(conversation)], limit, "cut")
    assert prompts.ids.row(0).tolist() == codec.prompt_ids(newest)
    row = Row(conversation, completion="well")
    assert learnt(codec, row, "all", limit + 5) == "no<|im_end|>·well<|im_end|>"


def test_a_pair_is_cut_once_for_both_sides() -> None:
    """Lengths must not show which side is better."""
    codec = codec_of("qwen2.5")
    row = Row([user(LONG)], chosen="yes", rejected="no, " * 5)
    limit = len(codec.prompt_ids(row.prompt)) + 5
    pairs, counts = encode_preferences(codec, [row], limit, "cut")
    pair = pairs[0]
    assert counts.cut == 1
    assert pair.chosen.prompt_length == pair.rejected.prompt_length
    start = pair.chosen.ids[: pair.chosen.prompt_length]
    assert np.array_equal(start, pair.rejected.ids[: pair.rejected.prompt_length])
    assert codec.decode(start, skip_special_tokens=False).startswith("<|im_start|>user\nx")
    assert shown(codec, pair.chosen) == "yes<|im_end|>"
    assert shown(codec, pair.rejected) == "no, " * 5 + "<|im_end|>"
    plain = Codec(make_tokenizer("mistral"))
    text = encode_preferences(plain, [Row(LONG, chosen="yes", rejected="no, " * 5)], 30, "cut")[0][0]
    assert text.chosen.prompt_length == text.rejected.prompt_length == 15
    assert text.chosen.ids[0] == text.rejected.ids[0] == plain.bos[0]


def test_pairs_that_are_equal_are_left_out() -> None:
    codec = codec_of("qwen2.5")
    rows = [
        Row([user("a")], chosen="same", rejected="same"),
        Row([user("a")], chosen=LONG + "good", rejected=LONG + "bad"),
        Row([user("a")], chosen="good", rejected="bad"),
    ]
    limit = len(codec.prompt_ids([user("a")])) + 20
    pairs, counts = encode_preferences(codec, rows, limit, "cut")
    assert (len(pairs), counts.kept, counts.equal) == (1, 1, 2), (
        "the second pair differs only in the part that was cut off"
    )
    assert "2 left out with two equal answers" in counts.describe()


def test_rows_that_are_too_long_are_left_out_or_refused() -> None:
    codec = Codec(make_tokenizer("mistral"))
    rows = [Row("a", completion="b", place="rows.jsonl:1"), Row("a", completion=LONG, place="rows.jsonl:2")]
    sequences, counts = encode_demonstrations(codec, rows, 20, "drop", "all")
    assert (len(sequences), counts.dropped, counts.longest) == (1, 1, 43)
    with pytest.raises(DataError) as refused:
        encode_demonstrations(codec, rows, 20, "refuse", "all")
    assert str(refused.value) == (
        "1 of 2 rows are longer than 20 tokens (max_length), the longest has 43 (rows.jsonl:2); "
        "`overlong: cut` or `drop` would fit"
    )


def test_a_prompt_without_tokens_is_refused() -> None:
    codec = Codec(make_tokenizer("qwen2.5"))
    with pytest.raises(DataError, match=r"^prompts.jsonl:4: prompt: has no tokens"):
        encode_prompts(codec, [Row("a"), Row("", place="prompts.jsonl:4")], 20, "refuse")


# ---------------------------------------------------------------- two models


def test_models_that_read_the_same_conversation_otherwise() -> None:
    base, instruct = codec_of("llama3"), codec_of("llama3")
    assert difference(base, instruct, "chat") is None
    instruct = codec_of("llama3")
    instruct.tokenizer.chat_template = "{{ bos_token }}" + instruct.tokenizer.chat_template
    text = difference(base, instruct, "chat")
    assert (
        text is not None
        and "<|begin_of_text|><|begin_of_text|>" in text
        and "the policy has '<|begin_of_text|><|start" in text
    )
    assert difference(base, instruct, "text") is None, "plain text does not use the template"
    other_end = Codec(make_tokenizer("llama3"))
    assert "other end tokens (<|end_of_text|>; the policy has <|end_of_text|>, <|eot_id|>)" in str(
        difference(base, other_end, "text")
    )
    assert "another vocabulary" in str(difference(base, codec_of("gemma"), "text"))
