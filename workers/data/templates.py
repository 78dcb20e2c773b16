"""Chat templates: the text of a conversation before an answer, and the text of the answer."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from workers.data.messages import REASONING, Message
from workers.data.rows import Answer
from workers.data.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[Any] | None


class ChatTemplate:
    """A tokenizer's chat template, under a run's settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        arguments: dict[str, Any] | None = None,
        started: datetime | None = None,
    ) -> None:
        """arguments: further variables of the template. started: the time that templates may write (None: now)."""
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        # Templates call strftime_now to write the date. A run always writes the date of its start, also after midnight.
        self.arguments = {"strftime_now": (started or datetime.now()).strftime, **(arguments or {})}

    @property
    def source(self) -> str:
        return str(self.tokenizer.name_or_path)

    def conversation(self, messages: list[Message]) -> list[Message]:
        """The messages, with the run's system prompt where they have none."""
        if self.system_prompt is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def prompt(self, messages: list[Message], tools: Tools) -> str:
        """The text before the assistant's answer."""
        return self._render(messages, tools, to_answer=True)

    def answer(self, messages: list[Message], before: str, answer: Answer, tools: Tools) -> str:
        """The text that follows the prompt's text `before` for this answer, with the end of the turn.

        Raises DataError where the template drops part of the answer, or begins every answer with text that this one lacks.
        """
        message = as_message(answer)
        whole = self._render([*messages, message], tools, to_answer=False)
        if whole.startswith(before) and _contains(text := whole[len(before) :], message):
            return text
        prefill, ending = self._prefill(messages, before, tools)
        if not prefill:
            shown = whole[_common_prefix(before, whole) :]
            raise DataError(
                f"{self.source}: the chat template drops part of the answer or writes it differently from after its own "
                f"generation prompt: {_text_of(message)[:60]!r} became {shown[:60]!r}"
            )
        text, tag = _text_of(message).lstrip(), prefill.strip()
        if not text.startswith(tag):
            raise DataError(
                f"{self.source}: the chat template begins every answer with {prefill!r}, and the answer {text[:40]!r} does "
                "not begin so"
            )
        # The prompt already has the white space after the tag.
        return text[len(tag) :].removeprefix(prefill[len(prefill.rstrip()) :]) + ending

    def turns(self, messages: list[Message], learnt: list[int], tools: Tools) -> list[str]:
        """The text before each of the assistant's turns `learnt` (indices), and last the text before the next answer. Each text
        starts with the previous one; the rest is that turn and the messages up to the next.

        Raises DataError where the template writes an earlier turn differently once other messages follow.
        """
        texts = [*(self._render(messages[:k], tools, to_answer=True) for k in learnt), self.prompt(messages, tools)]
        for k, text, following in zip(learnt, texts, texts[1:], strict=False):
            if not following.startswith(text) or not _contains(following[len(text) :], messages[k]):
                raise DataError(
                    f"{self.source}: the chat template writes message {k + 1} differently once others follow it, so it "
                    "cannot be learnt in its place; sft.turns=last learns only the last turn"
                )
        return texts

    def _prefill(self, messages: list[Message], before: str, tools: Tools) -> tuple[str, str]:
        """The beginning of an answer that the prompt already contains, and the text after an answer."""
        probe = "x"
        whole = self._render([*messages, as_message(probe)], tools, to_answer=False)
        common = _common_prefix(before, whole)
        after = whole[common:].lstrip()
        return (before[common:], after[len(probe) :]) if after.startswith(probe) else ("", "")

    def _render(self, messages: list[Message], tools: Tools, to_answer: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.source}: the tokenizer has no chat template, which messages need")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=to_answer, tokenize=False, **self.arguments
            )
            return text
        except (TemplateError, TypeError, KeyError, ValueError) as error:  # raised by templates, or by their code
            raise DataError(f"{self.source}: the chat template refuses messages: {error}") from error


def _common_prefix(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    return next((k for k, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def as_message(answer: Answer) -> Message:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _text_of(message: Message) -> str:
    """An assistant's text, after its reasoning between the tags that most models use."""
    reasoning = "".join(message.get(key, "") for key in REASONING)
    return f"<think>{reasoning}\n</think>\n\n{message['content']}" if reasoning else message["content"]


def _contains(text: str, message: Message) -> bool:
    """Whether a rendered turn contains all parts of its message, apart from white space."""
    parts = [message.get(key, "") for key in REASONING] + [message["content"]]
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        parts += [function["name"], *function["arguments"]]
    rendered = "".join(text.split())
    return all("".join(part.split()) in rendered for part in parts)
